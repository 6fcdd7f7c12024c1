"""CMR, our reading of it: hidden states of past segments are kept in a memory and blended into later ones.

    r_l[t] = sigmoid(w_l . norm(h_l[t]) + c_l)                      relevance, norm = RMS without weights
    M_l    = the m states of largest r among the old entries and the segment's rows; ties to the newer
    M      = concat over layers l of (P_l M_l + e_l)
    z      = softmax(Wq norm(h_l[t]) (Wk M)^T / sqrt(d) + log r) (Wv M)
    h_l[t] <- h_l[t] + g Wo z,   g = sigmoid(u_l . [h_l[t]; z] + b_l)

"Contextual Memory Reweaving in Large Language Models Using Layered Latent State Reconstruction", arXiv 2502.02046.
The paper has no equation, no algorithm, no training recipe, no named data and no code. What it says in words is:
states of several layers are captured where they are relevant for long-range dependencies, and are reconstructed layer
by layer and blended, with adjusted weights, into the final representation. Every formula and every default here is
our own choice, and the paper's tables can be neither checked nor claimed for it.

Ours in detail: one head; Wq, Wk, Wv, Wo are shared by all layers, the rest is per layer; P starts as the identity, Wo,
w, c, u, e at zero and b at -4, so that the model starts as it was. What is scored and captured is the output after the
blend, without its graph. All layers of a segment read the memory as it was at the segment's start. r is stored once; in
training its gradient is that of the present w and c at the stored state, since w would never learn otherwise. Captured
states carry no order among themselves beyond what is in them. Full attention over all of the text leaves nothing to
remember: use it with a sliding window, or segment by segment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from seqwise.core import hf
from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import AlreadyAttached, PromptError, UnsupportedModel, UsageError
from seqwise.core.select import top_k

Relevance = Literal["learned", "attention"]
FLOOR = 1e-6  # of r before the logarithm
EPS = 1e-6
_FORMAT = "seqwise-reweaving-1"


def norm(h: Tensor) -> Tensor:
    """h / sqrt(mean h^2 + 1e-6) over the last axis: RMS norm without weights, any shape."""
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)


def relevance(h: Tensor, w: Tensor, c: Tensor | float) -> Tensor:
    """r = sigmoid(w . norm(h) + c): h (..., d), w (d,), c a number -> (...), in (0, 1)."""
    return torch.sigmoid((norm(h) * w).sum(-1) + c)


def later_attention(attention: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention that each position received from rows after its own, averaged over heads, and how many rows that were.

    attention: probabilities (B, H, q, n), the rows being the last q of the n positions. real: (B, q) bool, False at
    pad rows, which do not count. Returns the sum and the count, both (B, n).
    """
    B, H, q, n = attention.shape
    rows = torch.ones(B, q, dtype=torch.bool, device=attention.device) if real is None else real
    weight = rows.to(attention.dtype)
    received = attention.mean(1).masked_fill(~rows[..., None], 0.0).tril(n - q - 1).sum(1)  # (B, n)
    passed = pad(weight.cumsum(-1), (n - q, 0))  # (B, n), real rows up to the position's own
    return received, weight.sum(-1, keepdim=True) - passed


def attention_relevance(attention: Tensor, real: Tensor | None = None) -> Tensor:
    """Training-free r_t: mean attention that t receives from the segment's later rows, over heads and rows.

    attention: probabilities (B, H, q, n); real: (B, q) bool, False at pad rows. The own row does not count, and a
    position without later rows has 0. Returns (B, n), in [0, 1].
    """
    received, count = later_attention(attention, real)
    return received / count.clamp(min=1)


def capture(r: Tensor, m: int, live: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which candidates stay: the m of largest relevance, ties to the newer.

    r: (..., c), candidates from old to new. live: bool (..., c), False where there is none (pads). Relevances count as
    equal within `core.select.TIE`. Returns (index, live), both (..., min(m, c)), indices ascending; where fewer than
    that are live, dead candidates fill up. Raises ValueError for m < 1.
    """
    if m < 1:
        raise ValueError(f"m must be >= 1, got {m} (entries per layer)")
    live = torch.ones_like(r, dtype=torch.bool) if live is None else live
    index = top_k(r.float().masked_fill(~live, float("-inf")), m, prefer="later")
    return index, live.gather(-1, index)


def memories(states: Tensor, P: Tensor, e: Tensor) -> Tensor:
    """M: captured states of L layers (B, L, c, d), P (L, d, d), e (L, d) -> (B, L c, d), layer after layer."""
    return (torch.einsum("lde,blce->blcd", P, states) + e[:, None]).flatten(1, 2)


def reconstruct(h: Tensor, key: Tensor, value: Tensor, r: Tensor, Wq: Tensor, live: Tensor | None = None) -> Tensor:
    """z = softmax(Wq norm(h) key^T / sqrt(d) + log r) value, one head.

    h: (B, n, d). key, value: Wk M and Wv M, (B, c, d). r: (B, c), clamped at 1e-6. Wq: (d, d). live: bool (B, c), False
    at empty slots; a sequence without a live one gets z = 0. Returns (B, n, d).
    """
    live = torch.ones_like(r, dtype=torch.bool) if live is None else live
    if r.shape[-1] == 0:
        return torch.zeros_like(h)
    logits = (norm(h) @ Wq.mT) @ key.mT * h.shape[-1] ** -0.5  # (B, n, c)
    logits = logits + r.clamp(min=FLOOR).log()[:, None]
    # the lowest number, not -inf: rows that see nothing stay finite, and are cleared by the mask
    weights = logits.masked_fill(~live[:, None], torch.finfo(logits.dtype).min).softmax(-1)
    return (weights * live[:, None]) @ value


def blend(h: Tensor, z: Tensor, Wo: Tensor, u: Tensor, b: Tensor | float) -> Tensor:
    """h + g Wo z with g = sigmoid(u . [h; z] + b): h, z (..., d), Wo (d, d), u (2 d,) -> (..., d)."""
    g = torch.sigmoid((torch.cat([h, z], -1) * u).sum(-1, keepdim=True) + b)
    return h + g * (z @ Wo.mT)


def default_layers(depth: int) -> tuple[int, ...]:
    """0-based layers whose outputs stand at 1/4, 1/2 and 3/4 of the depth: 12 -> (2, 5, 8)."""
    return tuple(sorted({-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3)}))


def split(input_ids: Tensor, size: int, attention_mask: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch of documents as consecutive segments: (B, N) -> (ids, mask) of at most `size` columns each."""
    if size < 1:
        raise ValueError(f"size must be >= 1, got {size} (tokens of a segment)")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    yield from zip(input_ids.split(size, 1), mask.split(size, 1), strict=True)


@dataclass
class Bank:
    """What is remembered: entries per sequence and layer, in order of position; position -1 marks an empty slot."""

    states: Tensor  # (B, L, c, d)
    r: Tensor  # (B, L, c)
    position: Tensor  # (B, L, c), among the document's real tokens

    @property
    def live(self) -> Tensor:
        return self.position >= 0

    def followed_by(self, newer: Bank) -> Bank:
        pairs = ((self.states, newer.states), (self.r, newer.r), (self.position, newer.position))
        return Bank(*(torch.cat(pair, 2) for pair in pairs))


@dataclass
class _Reader:
    """A bank made ready for queries: Wk M, Wv M, r and liveness of all its layers."""

    key: Tensor  # (B, L c, d)
    value: Tensor
    r: Tensor  # (B, L c)
    live: Tensor


@dataclass
class _Rows:
    """The rows of one forward, and the memory that they read."""

    real: Tensor  # (B, n) bool
    step: bool  # one generated token
    bank: Bank | None
    reader: _Reader | None
    states: dict[int, Tensor] = field(default_factory=dict)  # per place in `layers`: (B, n, d)
    received: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # sum and count, (B, open rows)


class Reweaving(nn.Module):
    """A memory of past hidden states for a causal language model of transformers, attached by forward hooks.

    hidden_size: d. layers: 0-based decoder layers that are captured and read into, ascending. capacity: m, entries per
    layer and sequence. segment: S, the most tokens of one forward. relevance: "learned", or "attention" for what a
    position receives from its segment's later rows (no parameters w, c; needs a model that returns attention weights,
    `attn_implementation="eager"`). seed: of Wq, Wk and Wv. Raises ValueError for values out of range.

    The base model is no part of it: `parameters()`, `state_dict()` and `save` hold the new parameters only.

    >>> memory = Reweaving.of(model, segment=64)
    >>> model.requires_grad_(False)
    >>> with memory.on(model):
    ...     document_loss(model, memory, ids, labels=ids).backward()  # forgets the document before
    ...     memory.reset()
    ...     model.generate(prompt, prefill_chunk_size=64)

    A forward of several rows is a segment, captured at its end. One row on a filled cache is a generated token; these
    are captured every S tokens. Prompts longer than S go through `generate(prefill_chunk_size=S)`. A backward pass that
    recomputes a whole forward (checkpointing of the model as one) must come before the next forward.
    """

    def __init__(
        self,
        hidden_size: int,
        layers: Sequence[int],
        *,
        segment: int,
        capacity: int = 64,
        relevance: Relevance = "learned",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, number, doc in (
            ("hidden_size", hidden_size, "width of the hidden states"),
            ("segment", segment, "tokens of a segment"),
            ("capacity", capacity, "entries per layer"),
        ):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"Reweaving.{name} must be a whole number >= 1, got {number!r} ({doc})")
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise ValueError(f"Reweaving.layers must be distinct, ascending and >= 0, at least one, got {layers!r}")
        if relevance not in get_args(Relevance):
            raise ValueError(f"Reweaving.relevance must be one of {get_args(Relevance)}, got {relevance!r}")
        self.layers, self.capacity, self.segment = tuple(layers), capacity, segment
        self.relevance: Relevance = relevance
        d, L = hidden_size, len(self.layers)
        generator = torch.Generator().manual_seed(seed)

        def drawn() -> nn.Parameter:
            return nn.Parameter(torch.randn(d, d, generator=generator) * d**-0.5)

        self.Wq, self.Wk, self.Wv = drawn(), drawn(), drawn()
        self.Wo = nn.Parameter(torch.zeros(d, d))
        if relevance == "learned":
            self.w = nn.Parameter(torch.zeros(L, d))
            self.c = nn.Parameter(torch.zeros(L))
        self.P = nn.Parameter(torch.eye(d).repeat(L, 1, 1))
        self.e = nn.Parameter(torch.zeros(L, d))
        self.u = nn.Parameter(torch.zeros(L, 2 * d))
        self.b = nn.Parameter(torch.full((L,), -4.0))

        self.bank: Bank | None = None
        self._seen: Tensor | None = None  # (B,) real tokens of the document so far
        self._open: list[_Rows] = []  # generated tokens that are not captured yet
        self._rows: _Rows | None = None  # of the forward at work, or of the last one
        self._inside = False
        self._undos: list[Callable[[], Any]] = []

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        layers: Sequence[int] | None = None,
        capacity: int = 64,
        segment: int | None = None,
        relevance: Relevance = "learned",
        seed: int = 0,
    ) -> Reweaving:
        """A memory that fits a model, on its device.

        layers: None for those at 1/4, 1/2 and 3/4 of the depth. segment: None for the model's attention window, or for
        all positions where it has none.
        """
        anatomy = Anatomy.of(model)
        windows = [window for window in anatomy.windows if window is not None]
        return cls(
            anatomy.config.hidden_size,
            default_layers(len(anatomy.layers)) if layers is None else layers,
            segment=min([*windows, anatomy.config.max_position_embeddings]) if segment is None else segment,
            capacity=capacity,
            relevance=relevance,
            seed=seed,
        ).to(next(model.parameters()).device)

    # on a model

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[Reweaving]:
        """Attached to a model for the time of a `with` block."""
        self.attach(model)
        try:
            yield self
        finally:
            self.detach()

    def attach(self, model: nn.Module) -> None:
        """Hooks the model until `detach`. Raises UnsupportedModel where the two do not fit, AlreadyAttached."""
        if self._undos:
            raise AlreadyAttached("this Reweaving is attached already; detach() it first")
        anatomy = Anatomy.of(model)
        if anatomy.config.hidden_size != self.Wq.shape[0] or self.layers[-1] >= len(anatomy.layers):
            raise UnsupportedModel(
                f"Reweaving(hidden_size={self.Wq.shape[0]}, layers={self.layers}) does not fit {type(model).__name__}"
                f" with hidden size {anatomy.config.hidden_size} and {len(anatomy.layers)} layers; use Reweaving.of"
            )
        add = self._undos.append
        add(anatomy.decoder.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
        for place, index in enumerate(self.layers):
            add(anatomy.layers[index].register_forward_hook(self._after_layer(place)).remove)
            if self.relevance == "attention":
                add(anatomy.attentions[index].register_forward_hook(self._after_attention(place)).remove)
        add(anatomy.decoder.register_forward_hook(self._after_model).remove)
        if hasattr(model, "generate"):
            own, original = vars(model), model.generate
            add((lambda: own.update(generate=original)) if "generate" in own else (lambda: own.pop("generate")))
            own["generate"] = _without_beams(model, original)  # type: ignore[arg-type]

    def detach(self) -> None:
        """Leaves the model as it was; the memory stays."""
        while self._undos:
            self._undos.pop()()
        self._inside = False

    def reset(self, rows: Tensor | None = None) -> None:
        """Forgets everything, or what belongs to some sequences of the batch: rows bool (B,)."""
        if rows is None or self._seen is None:
            self.bank, self._seen, self._open, self._rows = None, None, [], None
            return
        self._capture()
        keep = ~rows.to(self._seen.device)
        self._seen = self._seen * keep
        if self.bank is not None:
            position = torch.where(keep[:, None, None], self.bank.position, -1)
            self.bank = Bank(self.bank.states, self.bank.r, position)

    # on disk

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes parameters and settings, not the memory, as one safetensors file; returns its path."""
        from safetensors.torch import save_file

        facts = {
            "format": _FORMAT, "hidden_size": self.Wq.shape[0], "layers": self.layers, "capacity": self.capacity,
            "segment": self.segment, "relevance": self.relevance,
        }  # fmt: skip
        save_file({name: x.contiguous() for name, x in self.state_dict().items()}, path, {"seqwise": json.dumps(facts)})
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Reweaving:
        """Reads what `save` wrote. Raises UsageError for another file."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("seqwise", "{}"))
            if facts.pop("format", None) != _FORMAT:
                raise UsageError(f"{path} was not written by Reweaving.save")
            made = cls(facts.pop("hidden_size"), facts.pop("layers"), **facts)
            made.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return made

    # one forward

    def score(self, place: int, states: Tensor) -> Tensor:
        """Relevance of new rows of `layers[place]`: states (B, n, d) -> (B, n)."""
        return relevance(states, self.w[place], self.c[place])

    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if _replaying():
            if self._rows is not None:
                self._rows.reader = self._ready(self._rows.bank)
            self._inside = True
            return
        source = next(x for x in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args) if x is not None)
        B, n = source.shape[:2]
        cache = hf.find_cache(args, kwargs)
        step = n == 1 and cache is not None and cache.get_seq_length() > 0
        if n > self.segment:
            raise PromptError(
                f"a segment must have at most {self.segment} tokens, got {n}; cut the text with split(ids, size), or"
                f" use generate(prefill_chunk_size={self.segment})"
            )
        if not step:
            self._capture()
        if self._seen is not None and len(self._seen) != B:
            raise PromptError(f"the memory holds {len(self._seen)} sequences, got {B}; reset() it between documents")
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise PromptError("attention_mask must be a 2-D (batch, tokens) mask while Reweaving is attached")
        device = self.Wq.device
        real = torch.ones(B, n, dtype=torch.bool, device=device) if mask is None else mask[:, -n:].bool().to(device)
        if self._open and not torch.is_grad_enabled():
            reader = self._open[-1].reader  # between two captures a generation reads one and the same memory
        else:
            reader = self._ready(self.bank)
        self._rows = _Rows(real, step, self.bank, reader)
        self._inside = True

    def _after_layer(self, place: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            rows = self._rows
            if rows is None or not (self._inside or _replaying()):
                return None
            h = hf.hidden_of(output)
            if rows.reader is not None:
                x = h.to(self.Wq)
                reader = rows.reader
                z = reconstruct(x, reader.key, reader.value, reader.r, self.Wq, reader.live)
                delta = blend(x, z, self.Wo, self.u[place], self.b[place]) - x
                h = torch.where(rows.real[..., None].to(h.device), h + delta.to(h), h)
                output = hf.with_hidden(output, h)
            if not _replaying():
                rows.states[place] = h.detach()
            return output

        return hook

    def _after_attention(self, place: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            rows = self._rows
            if rows is None or not self._inside or _replaying():
                return
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if weights is None:
                raise UnsupportedModel(
                    "Reweaving(relevance='attention') needs attention weights; load the model with"
                    " attn_implementation='eager', or use relevance='learned'"
                )
            width = sum(part.real.shape[1] for part in self._open) + rows.real.shape[1]
            weights = weights.detach()[..., -width:].to(self.Wq)
            weights = pad(weights, (width - weights.shape[-1], 0))  # what a window no longer sees receives nothing
            rows.received[place] = later_attention(weights, rows.real)

        return hook

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside = False
        rows = self._rows
        if rows is None or _replaying():
            return
        self._open.append(rows)
        if not rows.step or sum(part.real.shape[1] for part in self._open) >= self.segment:
            self._capture()

    @torch.no_grad()
    def _capture(self) -> None:
        """The open rows become candidates beside the bank's entries, and the best m of each layer stay."""
        if not self._open:
            return
        rows, self._open = self._open, []
        real = torch.cat([part.real for part in rows], 1)  # (B, n)
        B, n = real.shape
        layers, r = [], []
        for place in range(len(self.layers)):
            h = torch.cat([part.states[place] for part in rows], 1).to(self.Wq.device)  # (B, n, d)
            layers.append(h)
            if self.relevance == "attention":
                r.append(_mean_received([part.received[place] for part in rows], n))
            else:
                r.append(self.score(place, h.to(self.Wq)))
        seen = torch.zeros(B, dtype=torch.long, device=real.device) if self._seen is None else self._seen
        order = torch.where(real, seen[:, None] + real.cumsum(-1) - 1, -1)  # (B, n)
        new = Bank(torch.stack(layers, 1), torch.stack(r, 1), order[:, None].expand(-1, len(self.layers), -1))
        if self.bank is not None:
            new = self.bank.followed_by(new)
        index, live = capture(new.r, self.capacity, new.live)  # (B, L, c)
        wide = index[..., None].expand(-1, -1, -1, new.states.shape[-1])
        states = new.states.gather(2, wide).masked_fill(~live[..., None], 0.0)  # pad rows can hold anything, NaN too
        position = new.position.gather(2, index).masked_fill(~live, -1)
        self.bank = Bank(states, new.r.gather(2, index), position)
        self._seen = seen + real.sum(-1)

    def _ready(self, bank: Bank | None) -> _Reader | None:
        if bank is None:
            return None
        states = bank.states.to(self.Wq)
        r = bank.r
        if self.relevance == "learned" and torch.is_grad_enabled():
            now = torch.sigmoid((norm(states) * self.w[:, None]).sum(-1) + self.c[:, None])
            r = r + (now - now.detach())  # the stored value, the present gradient
        M = memories(states, self.P, self.e)
        return _Reader(M @ self.Wk.mT, M @ self.Wv.mT, r.flatten(1), bank.live.flatten(1))


def document_loss(
    model: nn.Module,
    memory: Reweaving,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Mean next-token cross-entropy of a batch of documents, read segment by segment with an attached, empty memory.

    input_ids, attention_mask: (B, N). labels: (B, N), each predicted from the column before, also from one segment to
    the next; -100 and pads count for nothing. Gradients stay inside segments. Raises UsageError if nothing counts.
    """
    memory.reset()
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    paired = mask[:, 1:].bool() & mask[:, :-1].bool()  # a first token has nothing to be predicted from
    wanted = pad(labels[:, 1:].masked_fill(~paired, -100), (0, 1), value=-100)  # (B, N)
    count = int((wanted != -100).sum())
    if not count:
        raise UsageError("labels must hold a target behind the first column, got none (ids, or -100 to leave out)")
    losses = []
    segments = split(input_ids, memory.segment, mask)
    for (ids, real), targets in zip(segments, wanted.split(memory.segment, 1), strict=True):
        logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits.float()
        losses.append(cross_entropy(logits.flatten(0, 1), targets.flatten().to(logits.device), reduction="sum"))
    return torch.stack(losses).sum() / count


def _mean_received(parts: Sequence[tuple[Tensor, Tensor]], n: int) -> Tensor:
    """Sums and counts of consecutive forwards, each as long as the text was then, as one mean (B, n)."""
    received, count = (torch.stack([pad(part[i], (0, n - part[i].shape[1])) for part in parts]).sum(0) for i in (0, 1))
    return received / count.clamp(min=1)


def _replaying() -> bool:
    """Whether a backward pass is at work: a forward inside it recomputes one that was made before."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def _without_beams(model: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    """`generate` that refuses what reorders sequences or takes tokens back, which the memory cannot follow."""

    def generate(*args: Any, **kwargs: Any) -> Any:
        configs = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]
        for name, plain in (("num_beams", 1), ("assistant_model", None), ("prompt_lookup_num_tokens", None)):
            given = kwargs.get(name, next((getattr(c, name, None) for c in configs if c is not None), None))
            if given not in (None, plain):
                raise UnsupportedModel(
                    f"generate({name}=...) reorders or takes back tokens; leave it out with Reweaving"
                )
        return original(*args, **kwargs)

    return generate
