"""TidalDecode: find the important cache positions in one layer, and let the layers above read only those.

    layer l < s          full attention
    l = s (start)        full attention, and I = top-k positions of z = q K^T / sqrt(D), per query head
    s < l < c            attention over the positions I alone, softmax renormalised over I
    l = c (correction)   full attention, and I chosen anew from this layer's z
    l > c                attention over the new I alone

for each decode step anew (one query row; prefill and steps of several rows are full attention). Every layer's cache
grows as usual: nothing is evicted, fewer keys are read. The current token always belongs to I, as in the paper's
kernels (the k - 1 best of the others, and itself); `keep_current=False` is the top k of all positions.

Under grouped-query attention each query head keeps its own I and reads it from its KV head; a kernel that loads keys
once per KV head reads the union of its group's sets, at most g k keys.

"TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention", arXiv 2410.05076.
s = 2 and c = 13 are the code's for a model of 32 layers; c is chosen per model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqwise.core.anatomy import Anatomy
from seqwise.core.engine import Read
from seqwise.core.errors import UnsupportedModel
from seqwise.core.method import Method, budget_param, param
from seqwise.core.observe import gathered_attention
from seqwise.core.select import top_k

Role = Literal["full", "select", "reuse"]


def schedule(layers: int, start: int = 2, correction: int = 13) -> tuple[Role, ...]:
    """What each of `layers` decoder layers does at a decode step; "select" is full attention that chooses I.

    Raises:
        ValueError: unless 0 <= start < correction < layers.
    """
    if not 0 < correction < layers:
        raise ValueError(f"TidalDecode.correction must be in [1, layers) = [1, {layers}), got {correction}")
    if not 0 <= start < correction:
        raise ValueError(f"TidalDecode.start must be in [0, correction) = [0, {correction}), got {start}")

    def role(layer: int) -> Role:
        if layer in (start, correction):
            return "select"
        return "full" if layer < start else "reuse"

    return tuple(role(layer) for layer in range(layers))


def scores(q: Tensor, K: Tensor, *, live: Tensor | None = None, scaling: float | None = None) -> Tensor:
    """Attention logits z of one query row per head: fp32 (B, H, n), -inf where not live.

    q: (B, H, 1, D), K: (B, Hkv, n, D), after RoPE; H is a multiple of Hkv. live: (B, n) or (B, 1 or Hkv, n) bool,
    False on padding. scaling: default 1 / sqrt(D).
    """
    B, H, _, D = q.shape
    Hkv, n = K.shape[1], K.shape[2]
    scaling = D**-0.5 if scaling is None else scaling
    grouped = q.float().reshape(B, Hkv, H // Hkv, D)
    z = (grouped @ K.float().mT * scaling).reshape(B, H, n)
    return z if live is None else z.masked_fill(~_per_query_head(live, H), float("-inf"))


def select(z: Tensor, k: int, keep_current: bool = True) -> Tensor:
    """Positions I (B, H, min(k, n)), ascending, of the k largest logits z (B, H, n).

    keep_current: the last slot, which holds the current token, always counts among the k. Padding (z = -inf) comes
    last: a row with fewer than k live slots gets all of them, and padding that `selected_attention` masks. Ties go to
    the earlier slot.

    Raises:
        ValueError: k < 1.
    """
    if k < 1:
        raise ValueError(f"TidalDecode.budget must be >= 1, got {k}")
    if keep_current:
        z = torch.cat([z[..., :-1], torch.full_like(z[..., -1:], float("inf"))], -1)
    return top_k(z, k)


def selected_attention(
    q: Tensor, K: Tensor, V: Tensor, idx: Tensor, *, live: Tensor | None = None, scaling: float | None = None
) -> Tensor:
    """Attention of one query row per head over its positions idx (B, H, k), reading only these keys and values.

    q: (B, H, 1, D), K: (B, Hkv, n, D), V: (B, Hkv, n, Dv); live and scaling as in `scores`. Returns (B, H, 1, Dv),
    equal to attention under a mask that shows each head its idx. Every head needs at least one live position.
    """
    seen = None if live is None else _per_query_head(live, idx.shape[1]).expand(*idx.shape[:2], -1).gather(2, idx)
    return gathered_attention(q, K, V, idx, seen, scaling=scaling)


def _per_query_head(live: Tensor, heads: int) -> Tensor:  # (B, 1 or H, n)
    live = live.bool()[:, None] if live.dim() == 2 else live.bool()
    return live if live.shape[1] == 1 else live.repeat_interleave(heads // live.shape[1], dim=1)


@dataclass(frozen=True)
class TidalDecode(Method):
    """Reads only the positions that a selection layer found important; the cache itself stays whole.

    budget: k, positions read per query head in the layers that reuse a selection: tokens, or the share of the prompt's
    real tokens. start, correction: 0-based layers that select; `correction` is a choice per model.
    keep_current: see `select`.
    """

    budget: int | float = budget_param(256, "positions read per query head")
    start: int = param(2, ge=0, doc="first layer that selects, 0-based")
    correction: int = param(13, ge=1, doc="layer that selects again, 0-based")
    keep_current: bool = True

    slots: ClassVar[tuple[str, ...]] = ("cache.read",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start >= self.correction:
            raise ValueError(f"TidalDecode.start must be in [0, correction) = [0, {self.correction}), got {self.start}")

    def identity(self) -> Method:
        return replace(self, budget=1.0)

    def needs(self) -> set[str]:
        return {"full attention"}

    def check(self, anatomy: Anatomy) -> None:
        if self.correction >= len(anatomy.layers):
            raise UnsupportedModel(
                f"TidalDecode.correction must be < the model's {len(anatomy.layers)} layers, got {self.correction}; "
                "choose a layer of this model"
            )

    def read(self, read: Read) -> tuple[Tensor, Tensor] | None:
        role = schedule(read.layers, self.start, self.correction)[read.layer]
        budgets = read.capacity(self.budget)
        if role == "full" or budgets is None:
            return None
        if role == "reuse":
            if read.key.shape[2] <= min(budgets):
                return None  # within the budget: all of it through the fused kernel, bit for bit
            return read.slots_of(read.shared["positions"])
        z = scores(read.query, read.key, live=read.live, scaling=read.scaling)
        # samples may have different budgets: each selects alone, and what fills up is not live
        width = min(max(budgets), z.shape[-1])
        chosen = [select(z[b : b + 1], k, self.keep_current) for b, k in enumerate(budgets)]
        index = torch.cat([pad(own, (width - own.shape[-1], 0), value=-1) for own in chosen])  # (B, H, width)
        live = (index >= 0) & (z.gather(-1, index.clamp(min=0)) > float("-inf"))
        read.shared["positions"] = read.positions(index.clamp(min=0), live)
        return None
