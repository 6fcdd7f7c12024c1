"""FoPru: keep the visual tokens that the vision tower itself attends to most.

    s_j = mean_h sum_{i in R} A[h, i, j]     R = all rows, or the CLS row alone
    rank: the max(1, floor(r N)) tokens of largest s
    row:  the max(1, floor(r H)) rows of the H x W patch grid of largest sum, each kept whole

Survivors stay in raster order. A comes from the layer whose output the projector reads.
"FoPru: Focal Pruning for Efficient Large Vision-Language Models", arXiv 2411.14164.
The layer, R and the rounding are our reading; the paper's formula for s was not available.
"""

from __future__ import annotations

from math import floor

import torch
from torch import Tensor

from seqwise.core.select import top_k


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
