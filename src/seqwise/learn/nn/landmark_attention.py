"""Landmark attention: one landmark token per block gates the attention to its block, and finds the block again later.

    input      after every b tokens the landmark token
    x_ij       q_i . k_j / sqrt(D), over the visible j
    blk(j)     the number of landmarks strictly before j;  own(i) = max_j blk(j): the block that row i stands in
    groups     "local": the tokens of block own(i) and the landmarks of earlier blocks;  "b": the tokens of block b
    g_ij       softmax of x_i within j's group;  the landmark of block own(i) is masked
    a_ij       g_ij                     j a token of block own(i)
               g_ij g_i,landmark(b)     j a token of an earlier block b
               0                        j a landmark

Training is next-token prediction on windows with landmarks. A long context is read in chunks: keys are kept before
RoPE, in blocks of b + 1; rows score landmarks alone, fetch the k best blocks and attend to these, to the incomplete
block behind them and to their chunk. Positions are "stingy": with N > k blocks kept, the last k have the slots 1..k,
all older ones share slot 0; a slot is b + 1 positions, so all stay below (k + 1)(b + 1) + b + chunk.
"Landmark Attention: Random-Access Infinite Context Length for Transformers", arXiv 2305.16300.
Ours: with at most k blocks block i has slot i, so that reading in chunks is reading at once; behind a whole block the
next token is predicted at its landmark; each row of a batch keeps blocks and a tail of its own.

    tokenizer.add_special_tokens({"additional_special_tokens": ["<landmark>"]})
    model.resize_token_embeddings(len(tokenizer))
    landmark_id = tokenizer.convert_tokens_to_ids("<landmark>")
    with landmark_training(model, landmark_id):
        Trainer(model, arguments, data_collator=LandmarkCollator(landmark_id), train_dataset=dataset).train()

    memory = LandmarkMemory(model, landmark_id, k=4)
    memory.read(**tokenizer(book, return_tensors="pt"), logits_to_keep=1)
    memory.generate(**tokenizer(question, return_tensors="pt"), max_new_tokens=50)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.utils.checkpoint import checkpoint

from seqwise.core import hf
from seqwise.core.anatomy import Anatomy
from seqwise.core.config import Configured, param
from seqwise.core.errors import AlreadyAttached, PromptError, UnsupportedModel, UsageError
from seqwise.core.rope import Rope
from seqwise.core.run import refuse_attached
from seqwise.core.select import top_k

Selection = Literal["per_token_and_head", "max_over_heads", "max_over_tokens"]

ATTENTION = "seqwise-landmark"  # in transformers' registries
_IGNORED = -100  # the label that transformers' losses skip
_ROWS = 128  # query rows per block: bounds the logits to (B, H, _ROWS, n)
_NEEDS = {"full attention", "1-D positions"}


# input


class Inserted(NamedTuple):
    """A batch with landmarks. source: each column's column in the original batch, -1 at landmarks and padding."""

    input_ids: Tensor  # (B, m)
    attention_mask: Tensor  # (B, m) int64, 1 at tokens and landmarks
    landmark: Tensor  # (B, m) bool
    source: Tensor  # (B, m)


def insert_landmarks(
    ids: Tensor, landmark_id: int, every: int = 50, attention_mask: Tensor | None = None, *, tail: Tensor | None = None
) -> Inserted:
    """The landmark id after every `every` real tokens of each row, after the last one too where the count fits.

    ids: (B, n). attention_mask: (B, n), 0 at padding; each row counts its real tokens alone, and rows stay padded on
    the side where they were. tail: (B,), tokens that each row's text already has after its last landmark.
    Raises ValueError for an `every` or a tail out of range, UsageError where the ids hold the landmark already.
    """
    _at_least_one("insert_landmarks", every=every)
    B, n = ids.shape
    live = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if bool(((ids == landmark_id) & live).any()):
        raise UsageError(f"ids must not hold the landmark already, got {landmark_id} among them")
    begun = ids.new_zeros(B) if tail is None else tail.to(ids.device)
    if bool(((begun < 0) | (begun >= every)).any()):
        raise ValueError(f"tail must be in [0, {every}), got {begun.tolist()} (tokens after a row's last landmark)")
    count = live.long().cumsum(-1)  # (B, n), real tokens so far
    place = count - 1 + (begun[:, None] + count - 1) // every  # (B, n), columns of the real tokens in the new row
    width = count[:, -1] + (begun + count[:, -1]) // every  # (B,)
    m = int(width.max())
    left = bool((~live[:, 0] & live[:, -1]).any())
    offset = m - width if left else torch.zeros_like(width)
    rows, columns = live.nonzero(as_tuple=True)
    source = ids.new_full((B, m), -1)
    source[rows, (place + offset[:, None])[rows, columns]] = columns
    column = torch.arange(m, device=ids.device)
    inside = (column >= offset[:, None]) & (column < (offset + width)[:, None])  # (B, m)
    landmark = inside & (source < 0)
    padding = ids.gather(1, (~live).long().argmax(-1, keepdim=True))  # (B, 1), what stands at a row's own padding
    text = torch.where(source < 0, padding, ids.gather(1, source.clamp(min=0)))
    return Inserted(text.masked_fill(landmark, landmark_id), inside.long(), landmark, source)


def landmark_labels(inserted: Inserted, labels: Tensor | None = None, *, ignore_landmarks: bool = False) -> Tensor:
    """Labels (B, m) of a batch with landmarks, for models that shift labels themselves; -100 at padding.

    labels: (B, n) of the original batch, None for its ids. The landmarks are targets as in the paper's code, whose
    position makes them easy; ignore_landmarks leaves them out.
    """
    ids, mask, landmark, source = inserted
    text = ids if labels is None else labels.gather(1, source.clamp(min=0))
    text = torch.where(landmark, ids, text).masked_fill(mask == 0, _IGNORED)
    return text.masked_fill(landmark, _IGNORED) if ignore_landmarks else text


@dataclass(frozen=True)
class LandmarkCollator(Configured):
    """A data collator for trainers: texts of any length -> one batch with landmarks, padded on the right.

    Features have `input_ids`, and may have `labels` (of the same length, not shifted) and an `attention_mask`.
    """

    landmark_id: int = param(ge=0, doc="the landmark's token id")
    every: int = param(50, ge=1, doc="tokens between landmarks")
    pad_id: int = param(0, ge=0, doc="id at padding")
    ignore_landmarks: bool = False

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        def padded(name: str, fill: int) -> Tensor:
            rows = [torch.as_tensor(feature[name]) for feature in features]
            return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)

        ids = padded("input_ids", self.pad_id)
        labels = padded("labels", _IGNORED) if "labels" in features[0] else None
        if "attention_mask" in features[0]:
            mask = padded("attention_mask", 0)
        else:
            lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        inserted = insert_landmarks(ids, self.landmark_id, self.every, mask)
        wanted = landmark_labels(inserted, labels, ignore_landmarks=self.ignore_landmarks)
        return {"input_ids": inserted.input_ids, "attention_mask": inserted.attention_mask, "labels": wanted}


# the grouped softmax


def grouped_softmax(logits: Tensor, landmark: Tensor, visible: Tensor) -> Tensor:
    """Attention weights a under the grouped softmax.

    logits: (..., n), a row per query. landmark, visible: bool, of shapes that broadcast to it: which keys are
    landmarks, and which ones the row may see. Returns (..., n) in the logits' dtype, computed in float32 at least.
    Rows sum to 1 where each visible landmark of an earlier block has a visible token; rows that see nothing are 0.
    A group that is empty, or whose logits are all -inf, weighs 0.
    """
    return _grouped(logits, landmark, visible)[0].to(logits.dtype)


def group_probabilities(logits: Tensor, landmark: Tensor, visible: Tensor) -> Tensor:
    """What each row's landmarks weigh: g_i,landmark(b) per block b, 0 for the own block and later ones.

    Arguments as in `grouped_softmax`. Returns (..., N), in float32 at least, N the largest number of landmarks of a
    row; the rest of each row's attention, 1 - sum, is its own block's.
    """
    return _grouped(logits, landmark, visible)[1][..., :-1]


def _grouped(logits: Tensor, landmark: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (..., n) and, per block, the landmark's weight (..., N + 1); block N is what follows the last one."""
    x, inf = logits.to(torch.promote_types(logits.dtype, torch.float32)), float("inf")
    rows = x.shape[:-1]
    blk = landmark.long().cumsum(-1) - landmark.long()
    own = torch.where(visible, blk, -1).amax(-1, keepdim=True)
    N = int(landmark.sum(-1).max())
    index = blk.expand(x.shape)
    inner = x.masked_fill(~(visible & ~landmark), -inf)
    outer = x.masked_fill(~(visible & landmark & (blk < own)), -inf)

    # The maxima only keep exp in range, each group's own: the weights do not depend on them, nor does the gradient.
    top = x.new_full((*rows, N + 1), -inf).scatter_reduce(-1, index, inner.detach(), "amax")
    e = (inner - _finite(top).gather(-1, index)).exp()
    total = x.new_zeros((*rows, N + 1)).scatter_add(-1, index, e)  # (..., N + 1)
    own = own.clamp(min=0).expand(*rows, 1)
    top_own = top.gather(-1, own)
    top_local = _finite(torch.maximum(top_own, outer.detach().amax(-1, keepdim=True)))
    gate = (outer - top_local).exp()
    scale_own = (top_own - top_local).exp()  # 0 where the own block is empty
    local = _divisor(total.gather(-1, own) * scale_own + gate.sum(-1, keepdim=True))
    p = x.new_zeros((*rows, N + 1)).scatter_add(-1, index, gate / local)  # landmark b stands in block b
    factor = (p / _divisor(total)).scatter(-1, own, scale_own / local)
    return e * factor.gather(-1, index), p


def _finite(top: Tensor) -> Tensor:
    return top.masked_fill(top == float("-inf"), 0.0)


def _divisor(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, 1.0)


def landmark_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmark: Tensor,
    live: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention under the grouped softmax, in blocks of rows: memory grows with n, in the backward pass too.

    query: (B, H, q, D), rotated, the last q of the n tokens. key, value: (B, Hkv, n, D). landmark: bool (B, n).
    live: bool (B, n), False at padding. scaling: None for 1 / sqrt(D). dropout: on the weights. Returns (B, H, q, D).
    """
    q, n = query.shape[2], key.shape[2]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    pieces = []
    for start in range(0, q, _ROWS):
        stop = min(start + _ROWS, q)
        m = n - q + stop  # keys that this block's last row sees
        alive = None if live is None else live[:, :m]
        block = (query[:, :, start:stop], key[:, :, :m], value[:, :, :m], landmark[:, :m], alive, scaling, dropout)
        if grad:  # otherwise autograd would keep the weights of every block
            piece = checkpoint(_attend_rows, *block, use_reentrant=False, preserve_rng_state=dropout > 0)
        else:
            piece = _attend_rows(*block)
        pieces.append(piece)
    return torch.cat(pieces, 2)


def _attend_rows(
    query: Tensor, key: Tensor, value: Tensor, landmark: Tensor, live: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    (B, H, r, D), (Hkv, n) = query.shape, key.shape[1:3]
    grouped = query.reshape(B, Hkv, -1, D)  # (B, Hkv, g r, D)
    logits = (grouped @ key.mT * scaling).view(B, Hkv, -1, r, n)
    column = torch.arange(n, device=key.device)
    visible = column <= column[n - r :, None]  # (r, n)
    if live is not None:
        visible = visible & live[:, None, None, None]  # (B, 1, 1, r, n)
    weights = drop(grouped_softmax(logits, landmark[:, None, None, None], visible), dropout)
    return (weights.view(B, Hkv, -1, n) @ value).view(B, H, r, -1)


# training


@dataclass
class _Window:
    """One training forward: whole sequences with their landmarks."""

    landmark: Tensor  # (B, n) bool
    live: Tensor | None  # (B, n) bool

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        if key.shape[2] != self.landmark.shape[1]:
            raise PromptError(
                f"landmark_training needs whole sequences, got {self.landmark.shape[1]} tokens on a cache; "
                "generate with LandmarkMemory"
            )
        landmark = self.landmark.to(query.device)  # layers may lie on several devices
        live = None if self.live is None else self.live.to(query.device)
        return landmark_attention(query, key, value, landmark, live, scaling=scaling, dropout=dropout)


@contextmanager
def landmark_training(model: nn.Module, landmark_id: int) -> Iterator[None]:
    """Inside, the model attends by the grouped softmax, in training and evaluation, under transformers' Trainer too.

    model: a decoder of transformers. Batches bring `input_ids` that hold the landmark id already (`LandmarkCollator`,
    `insert_landmarks`) and, where there is padding, a 2-D `attention_mask`; whole sequences, neither cached nor
    packed. On leaving, the model attends as before.
    Raises UnsupportedModel for another model, ValueError for an id without an embedding, AlreadyAttached inside of
    a method or of another landmark_training; all before any change.
    """
    anatomy = _anatomy(model, landmark_id, _NEEDS)

    def add_window(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "landmarks" in kwargs:  # a memory reads
            return None
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if ids is None:
            raise PromptError("landmark_training needs input_ids, got embeddings: it cannot see their landmarks")
        if mask is not None and mask.dim() != 2:
            raise PromptError(f"attention_mask must be 2-D (batch, tokens) with landmarks, got {mask.dim()} dimensions")
        positions = kwargs.get("position_ids")
        if mask is None and positions is not None and bool((positions.diff(dim=-1) != 1).any()):
            raise PromptError("landmark_training cannot tell packed sequences apart; give one sequence per row")
        window = _Window(ids == landmark_id, None if mask is None else mask.bool())
        return args, {**kwargs, "landmarks": window}

    if _served(anatomy):
        raise AlreadyAttached(f"{type(model).__name__} already runs under landmark_training")
    with _serving(anatomy):
        hook = anatomy.decoder.register_forward_pre_hook(add_window, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    landmarks: Any = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; what it needs came down as a keyword of the model's forward."""
    if landmarks is None or softcap is not None:
        lack = "hands no keywords down to its attention" if landmarks is None else "caps its attention logits"
        raise UnsupportedModel(f"landmark attention cannot serve {type(module).__name__}, which {lack}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = landmarks.attend(module, query, key, value, scaling, dropout)
    return out.transpose(1, 2).contiguous(), None


def _served(anatomy: Anatomy) -> bool:
    return bool(anatomy.attentions[0].config._attn_implementation == ATTENTION)  # type: ignore[union-attr]


@contextmanager
def _serving(anatomy: Anatomy) -> Iterator[None]:
    """Routes the decoder's attention to `_attend`."""
    refuse_attached(anatomy.model)
    hf.register_attention(_attend, ATTENTION)
    undo = hf.route_attention(list(anatomy.decoder.modules()), ATTENTION)
    try:
        yield
    finally:
        undo()


def _anatomy(model: nn.Module, landmark_id: int, needs: set[str]) -> Anatomy:
    anatomy = Anatomy.of(model)
    anatomy.require(needs, "landmark attention")
    if anatomy.vision is not None:
        raise UnsupportedModel(f"landmark attention needs a text model, {type(model).__name__} reads images too")
    if not getattr(anatomy.decoder, "_supports_attention_backend", False):
        raise UnsupportedModel(f"{type(model).__name__} does not call transformers' attention interface")
    size = anatomy.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if isinstance(landmark_id, bool) or not 0 <= landmark_id < size:
        raise ValueError(
            f"landmark_id must be in [0, {size}), got {landmark_id!r} (add it to the tokenizer, then "
            "model.resize_token_embeddings)"
        )
    return anatomy


# reading long contexts


def stingy_slots(count: Tensor, k: int, blocks: int) -> Tensor:
    """The slots at which landmarks are scored: of the `count` (B,) blocks of a row, oldest first -> (B, blocks).

    With count > k the last k have the slots 1..k and all older ones slot 0; otherwise block i has slot i. A slot is
    every + 1 positions, the landmark stands at its last one.
    """
    age = torch.arange(blocks, device=count.device)
    late = (age - (count[:, None] - k) + 1).clamp(min=0)
    return torch.where(count[:, None] > k, late, age)


def retrieved_slots(picked: Tensor, count: Tensor, k: int) -> Tensor:
    """The slots at which retrieved blocks are attended to: r, plus 1 for one of the last k blocks where count > k.

    picked: (B, ..., r), per row the retrieved blocks' places by age, ascending. count: (B,). Returns picked's shape.
    """
    count = count.view(-1, *[1] * (picked.dim() - 1))
    r = torch.arange(picked.shape[-1], device=picked.device)
    return r + ((count > k) & (picked >= count - k)).long()


def chunk_start(count: Tensor, tail: Tensor, k: int, every: int) -> Tensor:
    """Position of a chunk's first token, (B,): behind min(count, k + 1) slots and the tail's tokens."""
    return count.clamp(max=k + 1) * (every + 1) + tail


def retrieve(
    query: Tensor,
    landmark_key: Tensor,
    live: Tensor,
    k: int,
    selection: Selection = "per_token_and_head",
    *,
    real: Tensor | None = None,
    scaling: float | None = None,
) -> Tensor:
    """The blocks that a chunk's rows fetch: the top k by the softmax over landmark logits, oldest first.

    query: (B, H, T, D) and landmark_key: (B, Hkv, N, D), both rotated. live: bool (B, N), False where a row has fewer
    blocks. real: bool (B, T), False at padding rows. "per_token_and_head": for each row and KV head (the maximum over
    its query heads), "max_over_heads": for each row, "max_over_tokens": for each KV head.
    Returns (B, Hkv or 1, T or 1, min(k, N)), ascending; where a row has fewer live blocks, dead ones follow them.
    """
    B, _, T, D = query.shape
    Hkv, N = landmark_key.shape[1:3]
    scaling = D**-0.5 if scaling is None else scaling
    x = (query.reshape(B, Hkv, -1, D) @ landmark_key.mT).float() * scaling  # (B, Hkv, g T, N)
    alive = live[:, None, None]
    p = x.masked_fill(~alive, torch.finfo(x.dtype).min).softmax(-1).view(B, Hkv, -1, T, N).amax(2)  # (B, Hkv, T, N)
    if selection == "max_over_heads":
        p = p.amax(1, keepdim=True)
    if selection == "max_over_tokens":
        p = p if real is None else p * real[:, None, :, None]
        p = p.amax(2, keepdim=True)
    return top_k(p.masked_fill(~alive, -1.0), k)


@dataclass
class _Store:
    """One layer's keys before RoPE and its values, in slots of whole blocks: (B, Hkv, S, every + 1, D)."""

    keys: Tensor
    values: Tensor


@dataclass
class _Chunk:
    """One chunk on its way through the layers."""

    memory: LandmarkMemory
    flag: Tensor  # (B, T) bool, landmarks
    real: Tensor  # (B, T) bool
    positions: Tensor  # (B, T)
    length: Tensor  # (B,), read before

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        flag, real, positions, length = (
            x.to(query.device) for x in (self.flag, self.real, self.positions, self.length)
        )
        here = _Chunk(self.memory, flag, real, positions, length)
        out = self.memory._attend(module.layer_idx, here, query, key, value, scaling)
        self.memory._store(module.layer_idx, here, key, value)
        return out


class LandmarkMemory:
    """Everything that a trained model has read, block by block, of any length; rows attend to the k best blocks.

    every: tokens between landmarks, as in training. k: blocks that are fetched. selection: who chooses, see
    `retrieve`; with "per_token_and_head" each row gathers k blocks of its own, "max_over_tokens" takes the least
    memory. blocks: how many are kept; beyond it the oldest are forgotten. chunk: tokens that are read at once; with k
    it should fit the trained length, (k + 1)(every + 1) + chunk.

    length: (B,), tokens read so far with their landmarks, None before the first. picked: per layer the blocks that
    the last chunk fetched, by number from the start of the text, (B, Hkv or 1, T or 1, up to k), -1 where a row has
    fewer; None where there was no block yet.
    """

    def __init__(
        self,
        model: nn.Module,
        landmark_id: int,
        *,
        every: int = 50,
        k: int = 2,
        selection: Selection = "per_token_and_head",
        blocks: int = 1024,
        chunk: int = 250,
    ) -> None:
        """Raises ValueError for bad numbers, UnsupportedModel for a model without one RoPE for all layers."""
        _at_least_one("LandmarkMemory", every=every, k=k, blocks=blocks, chunk=chunk)
        if selection not in get_args(Selection):
            raise ValueError(
                f"LandmarkMemory.selection must be one of {', '.join(get_args(Selection))}, got {selection!r}"
            )
        if blocks * every < chunk:
            raise ValueError(
                f"LandmarkMemory.blocks must be >= {-(-chunk // every)} for a chunk of {chunk}, got {blocks} "
                "(a chunk's own blocks have to fit)"
            )
        self._anatomy = _anatomy(model, landmark_id, _NEEDS | {"RoPE"})
        self._rope = Rope.of(self._anatomy)
        self.model: Any = model
        self.landmark_id = landmark_id
        self.every, self.k, self.selection, self.blocks, self.chunk = every, k, selection, blocks, chunk
        self.length: Tensor | None = None
        self.picked: list[Tensor | None] = [None] * len(self._anatomy.layers)
        self._stores: list[_Store | None] = [None] * len(self._anatomy.layers)

    @torch.no_grad()
    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, logits_to_keep: int = 0) -> Tensor:
        """Reads on, landmarks inserted by itself; each row of the batch goes on from what it read before.

        input_ids: (B, n). attention_mask: (B, n), 0 at padding, on either side; a row may be all padding.
        logits_to_keep: of how many last columns, 0 for all. Returns logits (B, n or logits_to_keep, vocabulary): at
        each token the prediction of the next real one, so behind the last token of a block that of its landmark;
        zeros at padding. Raises PromptError where the batch has another size than before, or no token.
        """
        B, n = input_ids.shape
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if n == 0 or not bool(real.any()):
            raise PromptError("there is nothing to read; give at least one token")
        if self.length is None:
            self.length = input_ids.new_zeros(B)
        elif len(self.length) != B:
            raise PromptError(f"this memory holds {len(self.length)} texts, the batch has {B}; start a new one")
        order = (~real).long().argsort(dim=-1, stable=True)  # (B, n), tokens first: chunks then begin alike in all rows
        text, mask, flags, source = insert_landmarks(
            input_ids.gather(1, order),
            self.landmark_id,
            self.every,
            real.gather(1, order),
            tail=self._tail(self.length),
        )
        kept = n if logits_to_keep == 0 else min(logits_to_keep, n)
        # the columns of `text` whose logits predict the next real token, at the caller's columns
        predicts = torch.zeros_like(order)
        rows, columns = (source >= 0).nonzero(as_tuple=True)
        follows = nn.functional.pad(flags[:, 1:], (0, 1))[rows, columns].long()  # a landmark follows
        predicts[rows, order[rows, source[rows, columns]]] = columns + follows
        wanted, predicts = real[:, n - kept :], predicts[:, n - kept :]

        inside = mask.bool()
        step = self.chunk + self.chunk // self.every
        logits = None
        with _serving(self._anatomy):
            for start in range(0, text.shape[1], step):
                stop = min(start + step, text.shape[1])
                here = wanted & (predicts >= start) & (predicts < stop)
                b, j = here.nonzero(as_tuple=True)
                found = self._forward(text[:, start:stop], flags[:, start:stop], inside[:, start:stop], len(b) > 0)
                if logits is None:
                    logits = found.new_zeros(B, kept, found.shape[-1])
                if len(b):
                    logits[b, j] = found[b, predicts[b, j] - start]
        assert logits is not None
        return logits

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, streamer: Any = None, **kwargs: Any
    ) -> Any:
        """The model's own `generate` on this memory: landmarks are inserted when due and never emitted.

        input_ids: (B, n), padded on the left, read on from what was read before. streamer, kwargs: of transformers'
        generate (max_new_tokens, do_sample, temperature, processors, stopping criteria, ...); no beams. Returns what
        it returns, ids (B, n + new); all of them have been read afterwards. Raises PromptError for beams and for
        padding on the right.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not bool(mask[:, -1].all()):
            raise PromptError("generate needs padding on the left")

        def decode(
            model: Any, input_ids: Tensor, logits_processor: Any = None, stopping_criteria: Any = None,
            generation_config: Any = None, **kwargs: Any,
        ) -> Any:  # fmt: skip
            if getattr(generation_config, "num_beams", 1) not in (None, 1):
                raise PromptError("LandmarkMemory does not search beams; use num_beams=1")
            ids = self._decode(
                input_ids, kwargs["attention_mask"], logits_processor, stopping_criteria, generation_config, streamer
            )
            return hf.generated(ids, None) if generation_config.return_dict_in_generate else ids

        return self.model.generate(input_ids, attention_mask=mask, custom_generate=decode, use_cache=False, **kwargs)

    def _decode(
        self, ids: Tensor, mask: Tensor, process: Any, stops: Any, generation_config: Any, streamer: Any
    ) -> Tensor:
        padding = _padding(generation_config)
        going = torch.ones_like(ids[:, 0], dtype=torch.bool)
        if streamer is not None:
            streamer.put(ids.cpu())
        logits = self.read(ids, mask, logits_to_keep=1)[:, -1]  # (B, V)
        while bool(going.any()):
            scores = process(ids, logits.float())
            scores[:, self.landmark_id] = float("-inf")
            if generation_config.do_sample:
                chosen = torch.multinomial(scores.softmax(-1), 1)[:, 0]
            else:
                chosen = scores.argmax(-1)
            chosen = torch.where(going, chosen, padding)
            ids = torch.cat([ids, chosen[:, None]], 1)
            if streamer is not None:
                streamer.put(chosen.cpu())
            logits = self.read(chosen[:, None], going[:, None])[:, -1]
            going = going & ~stops(ids, None)
        if streamer is not None:
            streamer.end()
        return ids

    # state

    @property
    def _width(self) -> int:
        return self.every + 1

    def _count(self, length: Tensor) -> Tensor:
        """(B,), blocks that are kept of texts of these lengths."""
        return (length // self._width).clamp(max=self.blocks)

    def _tail(self, length: Tensor) -> Tensor:
        """(B,), tokens behind the last landmark."""
        return length % self._width

    def _place(self, block: Tensor) -> Tensor:
        """Where the block of that number, from the start of the text, is kept; one slot is for the tail."""
        return block % (self.blocks + 1)

    def _forward(self, ids: Tensor, flag: Tensor, real: Tensor, wants_logits: bool) -> Tensor:
        assert self.length is not None
        start = chunk_start(self._count(self.length), self._tail(self.length), self.k, self.every)
        positions = start[:, None] + torch.arange(ids.shape[1], device=ids.device)  # (B, T)
        chunk = _Chunk(self, flag, real, positions, self.length)
        logits: Tensor = self.model(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            landmarks=chunk,
            logits_to_keep=int(not wants_logits),
        ).logits
        self.length = self.length + real.sum(-1)
        return logits

    def _store(self, layer: int, chunk: _Chunk, key: Tensor, value: Tensor) -> None:
        """Keeps a chunk's keys, RoPE undone, and values; the oldest blocks are overwritten once all slots are full."""
        store = self._stores[layer]
        needed = min(self.blocks + 1, int(chunk.length.max() + key.shape[2]) // self._width + 1)
        held = 0 if store is None else store.keys.shape[2]
        if needed > held:
            more = min(self.blocks + 1, max(needed, 2 * held)) - held  # doubling: a slot is copied once on average
            spare_k, spare_v = (x.new_zeros(*x.shape[:2], more, self._width, x.shape[-1]) for x in (key, value))
            if store is None:
                store = _Store(spare_k, spare_v)
            else:
                store = _Store(torch.cat([store.keys, spare_k], 2), torch.cat([store.values, spare_v], 2))
            self._stores[layer] = store
        assert store is not None
        bare = self._rope.rotate(key, -chunk.positions[:, None])
        number = chunk.length[:, None] + chunk.real.long().cumsum(-1) - 1  # (B, T), of each token in its text
        rows, columns = chunk.real.nonzero(as_tuple=True)
        number = number[rows, columns]
        slot, place = self._place(number // self._width), number % self._width
        store.keys[rows, :, slot, place] = bare[rows, :, columns]
        store.values[rows, :, slot, place] = value[rows, :, columns]

    # attention

    def choose(self, query: Tensor, landmark_key: Tensor, live: Tensor, real: Tensor, scaling: float) -> Tensor:
        """The blocks that a chunk's rows fetch, see `retrieve`; a subclass may choose otherwise."""
        return retrieve(query, landmark_key, live, self.k, self.selection, real=real, scaling=scaling)

    def _attend(self, layer: int, chunk: _Chunk, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        B, H, T, D = query.shape
        Hkv, w, device, length = key.shape[1], self._width, query.device, chunk.length
        store, count, tail = self._stores[layer], self._count(length), self._tail(length)
        N = int(count.max())
        b = torch.arange(B, device=device)
        first = length // w - count  # (B,), the oldest block's number

        # what all rows of the chunk may see: the tail, then the chunk up to themselves
        near_k, near_v, near_flag, near_live = key, value, chunk.flag, chunk.real
        behind = int(tail.max())
        if store is not None and behind:
            slot = self._place(length // w)
            place = torch.arange(behind, device=device)
            at = (chunk.positions[:, :1] - tail[:, None] + place)[:, None]  # (B, 1, behind)
            near_k = torch.cat([self._rope.rotate(store.keys[b, :, slot, :behind], at), key], 2)
            near_v = torch.cat([store.values[b, :, slot, :behind], value], 2)
            near_flag = torch.cat([chunk.flag.new_zeros(B, behind), chunk.flag], 1)
            near_live = torch.cat([place < tail[:, None], chunk.real], 1)
        column = torch.arange(near_k.shape[2], device=device)
        near_live = near_live[:, None] & (column <= column[-T:, None])  # (B, T, behind + T)

        picked = None
        self.picked[layer] = None
        if store is not None and N:
            age = torch.arange(N, device=device)
            slots = self._place(first[:, None] + age)  # (B, N)
            marks = store.keys[b[:, None], :, slots, -1].transpose(1, 2)  # (B, Hkv, N, D)
            at = stingy_slots(count, self.k, N)[:, None] * w + self.every
            live = age < count[:, None]
            picked = self.choose(query, self._rope.rotate(marks, at), live, chunk.real, scaling)
            number = picked + first[:, None, None, None]
            self.picked[layer] = number.masked_fill(picked >= count[:, None, None, None], -1)

        pieces = []
        for start in range(0, T, _ROWS):
            stop = min(start + _ROWS, T)
            r = stop - start
            # (B, Hkv, r, g, D): keys may differ from row to row, so rows are a batch axis
            q = query[:, :, start:stop].view(B, Hkv, -1, r, D).transpose(2, 3)
            logits = _times(q, near_k.mT[:, :, None]) * scaling
            flag, visible = near_flag[:, None, None], near_live[:, None, start:stop]  # (B, 1, 1 or r, c)
            if picked is not None and store is not None:
                mine = picked if picked.shape[2] == 1 else picked[:, :, start:stop]
                far_k, far_v, far_live = self._fetch(store, mine, count, first)
                logits = torch.cat([_times(q, far_k.mT) * scaling, logits], -1)
                m = far_k.shape[3]
                closes = torch.arange(m, device=device) % w == self.every
                flag = torch.cat([closes.expand(B, 1, 1, m), flag], -1)
                far_live, visible = (x.expand(B, mine.shape[1], r, -1) for x in (far_live, visible))
                visible = torch.cat([far_live, visible], -1)
            weights = grouped_softmax(logits, flag[..., None, :], visible[..., None, :])
            near = near_k.shape[2]
            out = _times(weights[..., -near:], near_v[:, :, None])
            if picked is not None:
                out = out + _times(weights[..., :-near], far_v)
            pieces.append(out.transpose(2, 3).reshape(B, H, r, -1))
        return torch.cat(pieces, 2)

    def _fetch(self, store: _Store, picked: Tensor, count: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The picked (B, Hkv or 1, R, k) blocks: rotated keys and values (B, Hkv, R, k w, D), live (B, ., R, k w)."""
        B, h, R, k = picked.shape
        Hkv, w = store.keys.shape[1], self._width
        slot = self._place(picked + first[:, None, None, None])
        b = torch.arange(B, device=picked.device)[:, None, None, None]
        head = torch.arange(Hkv, device=picked.device)[:, None, None]
        place = torch.arange(w, device=picked.device)
        at = (retrieved_slots(picked, count, self.k)[..., None] * w + place).view(B, h, -1)
        keys = self._rope.rotate(store.keys[b, head, slot].flatten(2, 4), at).view(B, Hkv, R, k * w, -1)
        live = (picked < count[:, None, None, None]).repeat_interleave(w, -1)
        return keys, store.values[b, head, slot].flatten(3, 4), live


def _times(x: Tensor, y: Tensor) -> Tensor:
    """x (B, Hkv, r, g, a) times y (B, Hkv, r or 1, a, c); a shared y is not copied for each row."""
    B, Hkv, r, g, a = x.shape
    return (x.reshape(B, Hkv, y.shape[2], -1, a) @ y).view(B, Hkv, r, g, -1)


def _padding(generation_config: Any) -> int:
    """What stands behind a row that ended: the padding id, or as transformers has it, the first end token."""
    ends = generation_config.eos_token_id
    ends = [0] if ends is None else ends if isinstance(ends, list) else [ends]
    return int(ends[0] if generation_config.pad_token_id is None else generation_config.pad_token_id)


def _at_least_one(owner: str, **numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{owner}.{name} must be a whole number >= 1, got {value!r}")
