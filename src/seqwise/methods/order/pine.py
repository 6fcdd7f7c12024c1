"""PINE: documents see each other, and the model's own attention, not the prompt, puts them in order.

    prompt    prefix, documents 1..K of lengths l_j, suffix;   E = end of the documents
    base      every document ends at E:  its tokens stand at E-l_j .. E-1;   all others at their ordinary positions
    raw       q k^T / sqrt(D) before RoPE, over document tokens
    I[i, j]   = sum_{t in i} mean_{u in j} softmax_{u not in i}(raw)[t, u]    query document i: i, then by falling I
    I[t, j]   = mean_{u in j} softmax_u(raw)[t, u]                            later query t: all by falling I
    shift[j]  = total length of the documents ranked before j;   keys of j are rotated at  base - shift[j]
    mask      document i: prefix, all other documents, itself causally;   every other query: causal

Per layer and query head, in float32. So the most important document stands directly before the query, whatever the
prompt's order. Scores depend on position differences alone: R(b - s) k against R(p) q equals R(b) k against R(p + s) q,
so queries are rotated once per document, and no key is copied per query.
"Eliminating Position Bias of Language Models: A Mechanistic Approach", arXiv 2407.01100.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import PromptError, SlotConflict, UnsupportedModel
from seqwise.core.method import Method
from seqwise.core.rope import rotate
from seqwise.core.segments import Segments
from seqwise.core.views import Kernel
from seqwise.methods.order.base import members

if TYPE_CHECKING:
    from seqwise.core.run import Run

_CELLS = 1 << 22  # numbers in the largest intermediate of a block of rows


def layout(document: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths l_j of the documents, and the tokens of documents behind each (E minus its end): int64 (B, K) both.

    document: (B, n), which document each token of a prompt is in, 0..K-1 in any order, -1 at other tokens. Samples with
    fewer documents than K have some of length 0.
    """
    B, n = document.shape
    K = max(1, int(document.max()) + 1)
    slot = torch.where(document >= 0, document, K)  # (B, n), all else goes to a spare column
    lengths = document.new_zeros(B, K + 1).scatter_add(1, slot, torch.ones_like(slot))[:, :K]
    at = torch.arange(n, device=document.device).expand(B, n)
    start = document.new_full((B, K + 1), n).scatter_reduce(1, slot, at, "amin")[:, :K]
    behind = (lengths[:, None] * (start[:, None] > start[:, :, None])).sum(-1)
    return lengths, behind


def base_positions(document: Tensor) -> Tensor:
    """Base positions of a prompt that begins at 0, int64 (B, n): documents end at E, other tokens stay."""
    _, behind = layout(document)
    return torch.arange(document.shape[1], device=document.device) + _of_document(behind, document)


def mean_attention(raw: Tensor, document: Tensor, K: int, own: Tensor | None = None) -> Tensor:
    """Mean over each document's columns of softmax(raw), float32 (..., t, K): I[t, j] of later queries.

    raw: (..., t, u), scores before RoPE. document: (..., u), -1 at columns of no document, which are left out, as
    are those of the row's own document, own (..., t), -1 where it has none.
    """
    left_out = (document < 0)[..., None, :]
    if own is not None:
        left_out = left_out | ((document[..., None, :] == own[..., :, None]) & (own >= 0)[..., :, None])
    p = raw.float().masked_fill(left_out, float("-inf")).softmax(-1)
    p = p.nan_to_num(nan=0.0)  # of a single document nothing is left
    columns = (document[..., None] == torch.arange(K, device=raw.device)).float()  # (..., u, K)
    return p @ columns / columns.sum(-2, keepdim=True).clamp(min=1)


def document_importance(mean: Tensor, own: Tensor) -> Tensor:
    """I[i, j] = sum of mean (..., t, K) over the rows t whose own document (..., t) is i: (..., K, K)."""
    rows = (own[..., None] == torch.arange(mean.shape[-1], device=mean.device)).float()  # (..., t, K)
    return rows.mT @ mean


def shifts(importance: Tensor, lengths: Tensor, first: Tensor | None = None) -> Tensor:
    """Total length of the documents ranked before each, int64 (..., K), by falling importance (..., K).

    lengths: broadcastable to (..., K). first: (...), the document that comes before all others, -1 for none. Equal
    importances leave the documents in the order of their numbers.
    """
    K = importance.shape[-1]
    if first is not None:
        leads = torch.arange(K, device=importance.device) == first[..., None]
        importance = importance.masked_fill(leads, float("inf"))
    order = importance.float().argsort(dim=-1, descending=True, stable=True)
    ranked = lengths.expand(order.shape).gather(-1, order)
    return torch.zeros_like(order).scatter(-1, order, ranked.cumsum(-1) - ranked)


def sees(place_q: Tensor, document_q: Tensor, place_k: Tensor, document_k: Tensor) -> Tensor:
    """Whether a query sees a key, bool; all broadcast: what stands before it, and all of other documents if it is in
    one. place: position or order in the prompt, document: -1 outside of all."""
    return (place_k <= place_q) | ((document_q >= 0) & (document_k >= 0) & (document_k != document_q))


def pine_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document: Tensor,
    inv_freq: Tensor,
    *,
    interleaved: bool = False,
    scaling: float | None = None,
) -> Tensor:
    """One layer's attention, (B, H, r, Dv): of a whole prompt (r = n), or of its last r tokens (a step).

    q: (B, H, r, D), k: (B, Hkv, n, D), before RoPE; v: (B, Hkv, n, Dv). The rows are the last r of the n tokens, which
    stand at 0..n-1. document: (B, n), -1 outside of all; a document is one stretch of tokens. Where rows are in
    documents, all documents' rows must be there. inv_freq: (d / 2,), see `core.rope.rotate`. scaling: default
    1 / sqrt(D).
    """
    n, r = k.shape[2], q.shape[2]
    place = torch.arange(n, device=q.device).expand(document.shape)
    live = torch.ones_like(document, dtype=torch.bool)
    return _attention(
        q, k, v, _Tokens(place[:, n - r :], document[:, n - r :]), _Tokens(place[:, None], document[:, None]),
        live[:, None], layout(document), inv_freq, interleaved, q.shape[-1] ** -0.5 if scaling is None else scaling,
    )[0]  # fmt: skip


@dataclass(frozen=True)
class _Tokens:
    """Ordinary positions and documents of rows (B, r) or slots (B, h, n), h being Hkv or 1."""

    place: Tensor
    document: Tensor


def _attention(
    q: Tensor, k: Tensor, v: Tensor, rows: _Tokens, slots: _Tokens, live: Tensor, prompt: tuple[Tensor, Tensor],
    inv_freq: Tensor, interleaved: bool, scaling: float,
) -> tuple[Tensor, int]:  # fmt: skip
    """`pine_attention` over slots in any order, of which `live` (B, h, n) count; `prompt` is `layout` of all documents,
    whatever the slots still hold of them. Also returns the query-key products per head."""
    B, H, r, D = q.shape
    Hkv, g = k.shape[1], H // k.shape[1]
    lengths, behind = prompt
    K = lengths.shape[1]
    index, held, L = _by_document(slots.document, live, K)  # (B, h, K L + T): documents, then the other slots
    U, width = K * L, index.shape[-1]
    k, v = _take(k.float(), index), _take(v, index)
    place = slots.place.gather(-1, index)
    column = torch.arange(width, device=q.device)
    document = torch.where(held & (column < U), column // max(1, L), -1)  # (B, h, width)
    base_k = place + _of_document(behind[:, None].expand(-1, index.shape[1], -1), document)
    base_q = rows.place + _of_document(behind, rows.document)  # (B, r)
    rotated = rotate(k, base_k, inv_freq, interleaved=interleaved)
    k_documents, k_texts = rotated[:, :, :U].unflatten(2, (K, L)), rotated[:, :, U:]
    q = q.float().view(B, Hkv, g, r, D)
    own = rows.document[:, None, None]  # (B, 1, 1, r)
    block = max(1, _CELLS // (B * H * max(width, K * D)))
    spans = [(start, min(start + block, r)) for start in range(0, r, block)]

    def products(x: Tensor, y: Tensor) -> Tensor:
        """(B, Hkv, g, R, D) and (B, Hkv, c, D) -> (B, Hkv, g, R, c)."""
        return (x.flatten(2, 3) @ y.mT).unflatten(2, x.shape[2:4]) * scaling

    means = [
        mean_attention(products(q[..., a:b, :], k[:, :, :U]), document[:, :, None, :U], K, own[..., a:b])
        for a, b in spans
    ]
    mean = torch.cat(means, 3)  # (B, Hkv, g, r, K)
    among = document_importance(mean, own)  # (B, Hkv, g, K, K)
    at = own[..., None].clamp(min=0).expand(B, Hkv, g, r, K)
    importance = torch.where(own[..., None] >= 0, among.gather(-2, at), mean)
    shift = shifts(importance, lengths[:, None, None, None], own.expand(B, Hkv, g, r))  # (B, Hkv, g, r, K)

    outs = []
    for a, b in spans:
        x, p = q[..., a:b, :], base_q[:, None, None, a:b]
        moved = rotate(  # (B, Hkv, g, R, K, D): the query as each document's keys meet it
            x[..., None, :].expand(*x.shape[:-1], K, D), p[..., None] + shift[..., a:b, :], inv_freq,
            interleaved=interleaved,
        )  # fmt: skip
        moved = moved.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)  # (B, Hkv, K, g R, D)
        scores = (moved @ k_documents.mT).transpose(2, 3).reshape(B, Hkv, g, b - a, U) * scaling
        scores = torch.cat([scores, products(rotate(x, p, inv_freq, interleaved=interleaved), k_texts)], -1)
        seen = held[:, :, None] & sees(
            rows.place[:, None, a:b, None], rows.document[:, None, a:b, None], place[:, :, None], document[:, :, None]
        )  # (B, h, R, width)
        probabilities = scores.masked_fill(~seen[:, :, None], float("-inf")).softmax(-1).nan_to_num(nan=0.0)  # padding
        outs.append((probabilities.to(v.dtype).flatten(2, 3) @ v).unflatten(2, (g, b - a)))
    return torch.cat(outs, 3).flatten(1, 2), r * (U + width)


def _by_document(document: Tensor, live: Tensor, K: int) -> tuple[Tensor, Tensor, int]:
    """Live slots (B, h, n) sorted into K documents of L places each and T places for the others.

    Returns index (B, h, K L + T), which of these places are taken, and L.
    """
    group = torch.where(live, torch.where(document >= 0, document, K), K + 1)
    order = group.argsort(dim=-1, stable=True)
    counts = group.new_zeros(*group.shape[:2], K + 2).scatter_add(-1, group, torch.ones_like(group))
    starts = counts.cumsum(-1) - counts
    L, T = torch.stack([counts[..., :K].max(), counts[..., K].max()]).tolist()
    steps, others = (torch.arange(count, device=group.device) for count in (L, T))
    at = torch.cat([(starts[..., :K, None] + steps).flatten(-2), starts[..., K, None] + others], -1)
    held = torch.cat([(steps < counts[..., :K, None]).flatten(-2), others < counts[..., K, None]], -1)
    return order.gather(-1, at.clamp(max=group.shape[-1] - 1)), held, L


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x (B, Hkv, n, D) at index (B, h, c): (B, Hkv, c, D)."""
    return x.gather(2, index.expand(-1, x.shape[1], -1)[..., None].expand(-1, -1, -1, x.shape[-1]))


def _of_document(value: Tensor, document: Tensor) -> Tensor:
    """value (..., K) of each token's document (..., n), 0 outside of all."""
    return value.gather(-1, document.clamp(min=0)).masked_fill(document < 0, 0)


@dataclass(frozen=True)
class PINE(Method):
    """Makes the model's answer independent of the order of the documents in its prompt, on any model with RoPE.

    The documents are the members of one set: mark it with `seqwise.prepare` (a part of type "set") and
    `run.bind(segments)`. Text has to stand before and behind it, and none between the documents. A model that is not
    strong may lose accuracy with many documents. A document sees the later ones, so a prompt cannot come in chunks.
    """

    slots: ClassVar[tuple[str, ...]] = ("attention.kernel", "positions", "mask")
    looks_ahead: ClassVar[bool] = True
    rotates: ClassVar[bool] = True

    # No identity: documents always see each other. With one document the prompt is the ordinary one.

    def needs(self) -> set[str]:
        return {"RoPE", "1-D positions", "full attention"}

    def check(self, anatomy: Anatomy) -> None:
        if getattr(anatomy.config, "attn_logit_softcapping", None):
            raise UnsupportedModel(
                f"{self} has no rule for capped attention logits ({type(anatomy.model).__name__}); use another model"
            )

    def facts(self) -> set[str]:
        return {"set"}

    def begin(self, run: Run) -> None:
        run.state[self] = set()  # numbers of the sets that this prompt has brought; those of a later turn are others

    def mark(self, segments: Segments, run: Run) -> dict[str, Tensor]:
        earlier, found = run.state[self], members(segments, self)
        sets = {piece.set for own in found for piece in own}
        for b, own in enumerate(found):
            if not own:
                continue
            if len({piece.set for piece in own}) > 1 or (earlier and sets - earlier):
                worder = next((part for part in run.method.parts if "prompt" in part.slots), None)
                if worder is not None:
                    raise SlotConflict(f"{self} orders one set of documents, {worder} makes a prompt of several")
                raise PromptError(f"{self} orders one set of documents; sample {b} has another one, give it as text")
            if run.chunk is not None:
                raise PromptError(f"{self}: documents see later ones; attach without chunk")
            real = segments.real[b].nonzero()[:, 0].tolist()
            if own[0].start == real[0]:
                raise PromptError(f"{self}: sample {b} begins with a document; put text (a start token) before it")
            if own[-1].stop == real[-1] + 1:
                raise PromptError(f"{self}: sample {b} ends with a document; put a question behind it")
        run.state[self] = earlier | sets
        return {"document": segments.member}

    def sees(self, query: Mapping[str, Tensor], key: Mapping[str, Tensor]) -> Tensor:
        return sees(query["order"], query["document"], key["order"], key["document"])

    def attend(self, kernel: Kernel) -> Tensor:
        assert kernel.rope is not None and kernel.query_positions is not None and kernel.key_positions is not None
        prompt = layout(kernel.marks["document"])
        document = kernel.marked("document", kernel.order)  # (B, h, n), h = 1 while all heads hold the same slots
        live = kernel.visible.live_k
        live = torch.ones_like(document, dtype=torch.bool) if live is None else live
        document, live = torch.broadcast_tensors(document, live)
        slots = _Tokens(kernel.key_positions[:, : document.shape[1]], document)
        rows = _Tokens(kernel.query_positions.expand(len(kernel.query), -1), kernel.marked("document", kernel.rows))
        if kernel.layer == 0:
            held, whole = (rows.document >= 0).sum(-1), prompt[0].sum(-1)
            if bool(((held > 0) & (held < whole)).any()):
                raise PromptError(f"{self}: documents see later ones; give the prompt in one piece")
        rope = kernel.rope
        q = rope.rotate(kernel.query.float(), -kernel.query_positions[:, None])
        k = rope.rotate(kernel.key.float(), -kernel.key_positions)
        out, kernel.pairs = _attention(
            q, k, kernel.value, rows, slots, live, prompt, rope.inv_freq, rope.interleaved, kernel.scaling
        )
        return out
