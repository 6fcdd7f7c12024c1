"""Which tokens stay: budgets, top-k with defined ties, per-head keeps under a validity mask. Pure tensor functions.

Ties. Equal tokens at two places have equal scores up to rounding, so a batch and a single prompt could order
them differently. Scores are therefore rounded to 16 bits of mantissa (a relative `TIE`) before they are compared, and
among equals the earlier token (or the later, where a paper says so) wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import Literal

import torch
from torch import Tensor

from seqwise.core.errors import PromptError

Budget = int | float | tuple[int | float, ...]

_DROPPED_BITS = 7  # of float32's 23 bits of mantissa
TIE = 2.0 ** (_DROPPED_BITS - 23)


def budget_count(budget: int | float, length: int) -> int:
    """Tokens kept out of `length`: min(budget, length) for an int, max(1, floor(budget * length)) for a share."""
    if isinstance(budget, float):
        return max(1, floor(budget * length + 1e-9)) if length else 0
    return min(budget, length)


def layer_budget(budget: Budget, layer: int, layers: int, owner: str = "budget") -> int | float:
    """The budget of one layer; a tuple must hold one budget per layer."""
    if not isinstance(budget, tuple):
        return budget
    if len(budget) != layers:
        raise PromptError(f"{owner} must have one entry per layer ({layers}), got {len(budget)}")
    return budget[layer]


def _coarse(score: Tensor) -> Tensor:
    """fp32 scores rounded to a relative `TIE`."""
    bits = score.float().view(torch.int32)
    half = 1 << (_DROPPED_BITS - 1)
    coarse = ((bits + half) & -(1 << _DROPPED_BITS)).view(torch.float32)
    return torch.where(torch.isinf(score), score.float(), coarse)


def descending(score: Tensor, prefer: Literal["earlier", "later"] = "earlier", k: int | None = None) -> Tensor:
    """Indices (..., n) by falling score (..., n), rounded to a relative `TIE`; among equals `prefer` decides. k: only
    the first so many."""
    n = score.shape[-1]
    bits = (_coarse(score) + 0.0).view(torch.int32)  # + 0.0: -0 and 0 are equal
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    at = torch.arange(n, device=score.device)
    unique = (rank.long() << 32) | (n - 1 - at if prefer == "earlier" else at)
    return unique.topk(n if k is None else min(k, n), dim=-1).indices


def top_k(score: Tensor, k: int, prefer: Literal["earlier", "later"] = "earlier") -> Tensor:
    """Indices of the k largest scores, ascending: (..., n) -> (..., min(k, n))."""
    return descending(score, prefer, k).sort(dim=-1).values


def keep_top(
    score: Tensor,
    live: Tensor,
    count: Sequence[int],
    *,
    protected: Tensor | None = None,
    prefer: Literal["earlier", "later"] = "earlier",
) -> tuple[Tensor, Tensor]:
    """The `count[b]` best live slots per sample and head, in slot order.

    score, live, protected: (B, H, n); protected slots come first, whatever their score.
    Returns (index, live), both (B, H, max(count)): samples with a smaller count are padded with dead slots.
    """
    width = max(count)
    ranked = score.float().clamp(min=torch.finfo(torch.float32).min / 2).masked_fill(~live, float("-inf"))
    if protected is not None:
        ranked = ranked.masked_fill(protected & live, float("inf"))
    index = descending(ranked, prefer, width)  # (B, H, width)
    keeps = torch.arange(width, device=score.device) < torch.tensor(count, device=score.device)[:, None, None]
    keeps = keeps & live.gather(-1, index)
    # dead padding goes to the front, so that slots stay in order and the newest stays last
    place = torch.where(keeps, index, index - score.shape[-1])
    place, inner = place.sort(dim=-1)
    return place.clamp(min=0), keeps.gather(-1, inner)


def keep_all_but_one(
    score: Tensor, *, protected: Tensor | None = None, prefer: Literal["earlier", "later"] = "earlier"
) -> Tensor:
    """What `keep_top` keeps of n live slots when n - 1 fit, without sorting: (..., n) -> (..., n - 1) ascending."""
    n = score.shape[-1]
    ranked = _coarse(score.float().clamp(min=torch.finfo(torch.float32).min / 2))
    if protected is not None:
        ranked = ranked.masked_fill(protected, float("inf"))
    at = torch.arange(n, device=score.device)
    worst = ranked == ranked.amin(-1, keepdim=True)
    out = torch.where(worst, at, -1).amax(-1) if prefer == "earlier" else torch.where(worst, at, n).amin(-1)
    kept = at[: n - 1]
    return kept + (kept >= out[..., None])


def keep_best(score: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
    """The `count` (B,) best candidates (B, n) bool by score (B, n), as a mask (B, n); ties to the earlier token."""
    rank = torch.empty_like(candidates, dtype=torch.long)
    order = descending(score.float().masked_fill(~candidates, float("-inf")))
    rank.scatter_(-1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order))
    return candidates & (rank < count[:, None])


def compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """A boolean keep mask (..., n) as indices, left-padded where counts differ.

    Returns (index, live), both (..., m) with m the largest count: kept indices ascending at the end, dead padding in
    front, so that the last kept token stays last. Reads m on the host.
    """
    width = int(keep.sum(-1).max())
    index = keep.to(torch.int8).argsort(dim=-1, stable=True)[..., keep.shape[-1] - width :]
    return index, keep.gather(-1, index)
