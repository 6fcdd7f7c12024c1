"""FoPru: keep the visual tokens that the vision tower itself attends to most.

    s_j = mean_h sum_{i in R} A[h, i, j]     R = all rows, or the CLS row alone
    rank: the max(1, floor(r N)) tokens of largest s
    row:  the max(1, floor(r H)) rows of the H x W patch grid of largest sum, each kept whole

Survivors stay in raster order. A comes from the layer whose output the projector reads.
"FoPru: Focal Pruning for Efficient Large Vision-Language Models", arXiv 2411.14164.
The layer, R and the rounding are our reading; the paper's formula for s was not available.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor
from typing import ClassVar, Literal

import torch
from torch import Tensor

from seqwise.core.errors import UsageError
from seqwise.core.method import Method, budget_param
from seqwise.core.select import top_k
from seqwise.core.towers import Tower


def significance(received: Tensor, specials: int = 1) -> Tensor:
    """Attention received per patch, averaged over heads.

    received: (..., h, specials + N), the attention summed over the rows R: `A.sum(-2)` for all
    rows, `A[..., 0, :]` for CLS. The first `specials` columns are no patches. Returns (..., N).
    """
    return received[..., specials:].mean(-2)


def rank_strategy(s: Tensor, r: float) -> Tensor:
    """Scores (..., N) -> kept indices (..., k), ascending; k = max(1, floor(r N))."""
    return top_k(s, max(1, floor(r * s.shape[-1])))


def row_strategy(s: Tensor, r: float, grid: tuple[int, int]) -> Tensor:
    """Scores (..., H W) -> kept indices (..., m W), ascending; m = max(1, floor(r H)).

    Raises:
        ValueError: the scores are not H W patches; a CLS score must be dropped before.
    """
    H, W = grid
    if s.shape[-1] != H * W:
        raise ValueError(f"row_strategy: grid must hold all {s.shape[-1]} scores, got {H} x {W}")
    rows = top_k(s.unflatten(-1, (H, W)).sum(-1), max(1, floor(r * H)))  # (..., m)
    columns = torch.arange(W, device=s.device)
    return (rows[..., None] * W + columns).flatten(-2)


@dataclass(frozen=True)
class FoPru(Method):
    """Prunes visual tokens before the language model by attention inside the vision tower.

    Tiles of one image are pruned apart. `rows="cls"` needs a tower with a CLS token.
    """

    budget: int | float = budget_param(0.25, "visual tokens kept of each tile")
    strategy: Literal["rank", "row"] = "rank"
    rows: Literal["all", "cls"] = "all"

    slots: ClassVar[tuple[str, ...]] = ("input.rows",)

    def identity(self) -> Method:
        return replace(self, budget=1.0)

    def needs(self) -> set[str]:
        return {"vision tower", "CLS token"} if self.rows == "cls" else {"vision tower"}

    def keep_input(self, tower: Tower) -> Tensor:  # (tiles, k)
        s = significance(tower.received(rows=self.rows), tower.specials)
        # a count as a share: half a token more, so that floor gives the count back
        r = self.budget if isinstance(self.budget, float) else min(1.0, (self.budget + 0.5) / s.shape[-1])
        if self.strategy == "rank":
            return rank_strategy(s, r)
        if tower.patches < tower.grid[0] * tower.grid[1]:
            raise UsageError("FoPru(strategy='row') needs whole rows, but the tower was pruned; use strategy='rank'")
        return row_strategy(s, r, tower.grid)
