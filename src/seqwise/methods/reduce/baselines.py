"""What every comparison of visual-token pruners needs and no paper of ours owns.

RandomTokens   visual tokens by chance
UniformGrid    evenly spaced cells of each image's grid
AveragePool    the grid averaged down to a smaller one
FastV          the tokens to which the prompt's last token attends most in an early layer (arXiv 2403.06764)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import floor, sqrt
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import PromptError, UnsupportedModel
from seqwise.core.method import Method, budget_param, param
from seqwise.core.plan import stage_space, stages_at
from seqwise.core.select import budget_count, keep_best, top_k
from seqwise.core.views import Stage
from seqwise.methods.reduce.base import rows_of_images


def grid_shape(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """The h x w <= `count` that is most like a grid (H, W) in its proportions, 1 <= h <= H and 1 <= w <= W."""
    H, W = grid
    h = min(H, max(1, floor(sqrt(count * H / W) + 1e-9)))
    w = min(W, max(1, count // h))
    return min(H, max(1, count // w)), w


def spaced_cells(grid: tuple[int, int], count: int) -> Tensor:
    """`count` cells (count,) of a grid (H, W), ascending: an evenly spaced lattice, the rest spread over the others."""
    H, W = grid
    h, w = grid_shape(grid, min(count, H * W))
    rows, columns = (((torch.arange(m) + 0.5) * M / m).long() for m, M in ((h, H), (w, W)))
    lattice = (rows[:, None] * W + columns).flatten()
    more = min(count, H * W) - h * w
    others = torch.ones(H * W, dtype=torch.bool).index_fill(0, lattice, False).nonzero()[:, 0]
    between = ((torch.arange(more) + 0.5) * len(others) / max(more, 1)).long()
    return torch.cat([lattice, others[between]]).sort().values


class _Map(NamedTuple):
    """Visual tokens of one grid: an image, a tile, a frame, a joint map of tiles, in raster order."""

    sample: int
    rows: Tensor  # (n,)
    row: Tensor  # (n,) cells
    column: Tensor
    grid: tuple[int, int]

    @property
    def whole(self) -> bool:
        return len(self.rows) == self.grid[0] * self.grid[1]


def _maps(stage: Stage) -> Iterator[_Map]:
    """Every map of a prompt, without newline tokens. Raises PromptError where the cells of its tokens are unknown."""
    tile, row, column = (stage.fact(name) for name in ("tile", "row", "column"))
    if bool((stage.visual & (row < 0)).any()):
        raise PromptError(
            "the grid cells of this prompt's visual tokens are unknown; bind segments with row and column"
        )
    for b in range(stage.visual.shape[0]):
        shown = stage.visual[b] & (column[b] >= 0)
        for image, number in torch.stack([stage.image[b], tile[b]], -1)[shown].unique(dim=0).tolist():  # maps are few
            rows = (shown & (stage.image[b] == image) & (tile[b] == number)).nonzero()[:, 0]
            r, c = row[b, rows], column[b, rows]
            yield _Map(b, rows, r, c, (int(r.max()) + 1, int(c.max()) + 1))


@dataclass(frozen=True)
class RandomTokens(Method):
    """Keeps visual tokens by chance; a token's luck depends on the seed and on its place in its image."""

    budget: int | float = budget_param(0.25, "visual tokens kept per image")
    seed: int = param(0, ge=0)

    slots: ClassVar[tuple[str, ...]] = ("input.rows",)

    def identity(self) -> Method:
        return replace(self, budget=1.0)

    def needs(self) -> set[str]:
        return {"vision tower"}

    def cut_input(self, stage: Stage) -> Tensor:
        keep = ~stage.visual
        for b, rows in rows_of_images(stage.visual, stage.image):
            luck = torch.rand(len(rows), generator=torch.Generator().manual_seed(self.seed))
            keep[b, rows[top_k(luck, budget_count(self.budget, len(rows))).to(rows.device)]] = True
        return keep


@dataclass(frozen=True)
class UniformGrid(Method):
    """Keeps evenly spaced cells of each image's grid; newline tokens of tiled models go as soon as any cell goes."""

    budget: int | float = budget_param(0.25, "visual tokens kept per image, or per tile of it")

    slots: ClassVar[tuple[str, ...]] = ("input.rows",)

    def identity(self) -> Method:
        return replace(self, budget=1.0)

    def needs(self) -> set[str]:
        return {"vision tower"}

    def cut_input(self, stage: Stage) -> Tensor | None:
        if self.budget == 1.0 and isinstance(self.budget, float):
            return None
        keep = ~stage.visual
        for one in _maps(stage):
            n = len(one.rows)  # of a thinned grid, evenly spaced ones of those that are left
            cells = spaced_cells(one.grid if one.whole else (1, n), budget_count(self.budget, n))
            keep[one.sample, one.rows[cells.to(one.rows.device)]] = True
        return keep


@dataclass(frozen=True)
class AveragePool(Method):
    """Averages each image's grid down to the largest h x w grid within the budget, of about its proportions.

    Each token belongs to one cell of the smaller grid; of a grid that a tower pruner thinned, the tokens that are left.
    """

    budget: int | float = budget_param(0.25, "visual tokens per image, or per tile of it, at most")

    slots: ClassVar[tuple[str, ...]] = ("input.rows",)

    def identity(self) -> Method:
        return replace(self, budget=1.0)

    def needs(self) -> set[str]:
        return {"vision tower"}

    def cut_input(self, stage: Stage) -> Tensor | None:
        if self.budget == 1.0 and isinstance(self.budget, float):
            return None
        keep, hidden = ~stage.visual, stage.hidden.clone()
        member = torch.full_like(stage.order, -1)
        for b, rows, row, column, (H, W) in _maps(stage):
            h, w = grid_shape((H, W), budget_count(self.budget, len(rows)))
            _, cell = (row * h // H * w + column * w // W).unique(return_inverse=True)  # (n,) those that have tokens
            count = int(cell.max()) + 1
            total = hidden.new_zeros(count, hidden.shape[-1]).index_add(0, cell, hidden[b, rows])
            first = rows.new_full((count,), stage.order.shape[1]).scatter_reduce(0, cell, rows, "amin")
            hidden[b, first] = total / cell.bincount()[:, None]
            member[b, rows] = first[cell]
            keep[b, first] = True
        stage.replace(hidden, member)
        return keep


@dataclass(frozen=True)
class FastV(Method):
    """Behind decoder layer `layer` (1-based) each image keeps the tokens that get most of the last token's attention in
    that layer, averaged over heads ("An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764)."""

    budget: int | float = budget_param(0.5, "visual tokens kept per image")
    layer: int = param(2, ge=1, doc="1-based layer whose output is cut")

    slots: ClassVar[tuple[str, ...]] = ("layer.rows",)

    def identity(self) -> Method:
        return replace(self, budget=1.0)

    def needs(self) -> set[str]:
        return {"vision tower"}

    def check(self, anatomy: Anatomy) -> None:
        if self.layer >= len(anatomy.layers):
            raise UnsupportedModel(f"FastV.layer must be < the model's {len(anatomy.layers)} layers, got {self.layer}")

    def search_space(self, anatomy: Anatomy, budget: float) -> dict[str, tuple[float, float]]:
        return stage_space(1, len(anatomy.layers), budget)

    def planned(self, point: Mapping[str, float], anatomy: Anatomy, budget: float) -> Method:
        (layer,), (share,) = stages_at(point, (self.layer,), len(anatomy.layers), budget)
        return replace(self, layer=layer, budget=share)

    def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
        return (self.layer,)

    def keep_rows(self, stage: Stage) -> Tensor:
        newest = torch.where(stage.live, stage.order, -1).amax(-1, keepdim=True)
        last = stage.live & (stage.order == newest)
        score = stage.received_before(last).mean(1)  # (B, r)
        keep = stage.live & ~stage.visual
        for image, entered in enumerate(stage.entered.T):  # images of a prompt are few
            count = torch.tensor([budget_count(self.budget, int(n)) for n in entered], device=score.device)
            keep = keep | keep_best(score, stage.image == image, count)
        return keep
