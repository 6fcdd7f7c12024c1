"""VFlowOpt: an importance map of image tokens from the vision tower prunes at the input, with recycling, and later.

    recv_j = mean_i A_ij        G = {j : recv_j > t mean(recv)}        c_j = mean_{i in G} A_ij
    H = - sum_bins p log2(p + 1e-10)       grey values of the raw patch in 256 bins       e = softmax(H)
    imp = c + alpha e

    input    R = round(N (1 - r0)), M = int(N / m^2); the R + M tokens of least imp leave. Those of one m x m cell of
             the grid become one token, sum(imp x) / sum(imp), in the place of the cell's most important one
    stage i  at the input of that layer the round(n (1 - r_i)) tokens of least imp leave; imp is never computed again

A is the attention of the layer that the projector reads, mean over heads, without CLS; so only rows of a few hubs vote.
N counts an image's tokens; newline tokens of tiled models have imp 1 and stay at the input. r0, r1, r2, t, m and alpha
are found by search under a budget (`seqwise plan`), so that the last token's final hidden state changes least.
"VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization", arXiv 2508.05211.
Defaults are the released numbers for 25 % on LLaVA-OneVision-7B. Ours: where no patch passes t the largest recv alone
votes; negative imp weighs 0 in a cell; single images and videos are recycled too; M is 0 where R is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import floor
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import PromptError, UnsupportedModel, UsageError
from seqwise.core.method import Method, param
from seqwise.core.observe import received
from seqwise.core.plan import last_share
from seqwise.core.select import descending, keep_best
from seqwise.core.towers import Tower
from seqwise.core.views import Stage
from seqwise.core.visible import Visible

if TYPE_CHECKING:
    from seqwise.core.run import Run

_SIDE = 27  # of the grid for which the paper's code has search bounds


def hubs(recv: Tensor, t: float) -> Tensor:
    """G as a mask: attention received (..., N) by each patch -> (..., N) bool, at least one True in each row.

    recv may be a mean or a sum over rows. No patch can pass t >= N; the largest alone does then, the first of equals.
    """
    passed = recv > t * recv.mean(-1, keepdim=True)
    largest = torch.zeros_like(passed).scatter(-1, descending(recv, k=1), True)
    return torch.where(passed.any(-1, keepdim=True), passed, largest)


def context_relevance(A: Tensor, t: float) -> Tensor:
    """c of patches: attention (..., N, N), rows attend to columns, mean over heads, without special tokens -> (..., N).

    The rows of A need not sum to 1: without CLS they do not. t = 0 lets all rows vote.
    """
    G = hubs(A.mean(-2), t).to(A.dtype)
    return (G[..., None, :] @ A)[..., 0, :] / G.sum(-1, keepdim=True)


def streamed_context_relevance(
    query: Tensor, key: Tensor, t: float, specials: int = 0, scaling: float | None = None, live: Tensor | None = None
) -> Tensor:
    """`context_relevance` from query and key (T, h, specials + N, d), float32 (T, N), in O(N) memory.

    The first `specials` tokens take part in the softmax alone. scaling: of the logits, d^-0.5 by default. live: (T,
    specials + N), nonzero on what is no padding.
    """
    T, n = query.shape[0], query.shape[2]
    visible = Visible.of(n, n, causal=False, padding=live, device=query.device)
    patch = torch.ones(T, n, device=query.device) if live is None else live.float()  # (T, n), rows that vote
    patch[:, :specials] = 0.0

    def votes(weight: Tensor) -> Tensor:  # (T, N)
        heads = received(query, key, visible=visible, weight=weight, scaling=scaling)
        return heads.mean(1)[:, specials:] / weight.sum(-1, keepdim=True)

    G = hubs(votes(patch), t)
    return votes(torch.nn.functional.pad(G.float(), (specials, 0)))


def patch_entropy(pixels: Tensor, patch: int) -> Tensor:
    """H in bits: images (..., 3, height, width) with values in 0..1 -> (..., N), patches of patch x patch pixels in
    raster order; pixels beyond the last whole patch do not count."""
    grey = (0.3333 * 255 * pixels.float().clamp(0, 1)).sum(-3).round().long()  # (..., height, width)
    patches = grey.unfold(-2, patch, patch).unfold(-2, patch, patch).flatten(-2).flatten(-3, -2)  # (..., N, pixels)
    bins = torch.zeros(*patches.shape[:-1], 256, device=pixels.device)
    p = bins.scatter_add(-1, patches, torch.ones_like(patches, dtype=bins.dtype)) / patch**2
    return -(p * (p + 1e-10).log2()).sum(-1)


def importance(c: Tensor, H: Tensor, alpha: float) -> Tensor:
    """imp: c and H of one image's patches, (..., N) each -> (..., N). It may be negative where alpha is."""
    return c + alpha * H.softmax(-1)


def prune_counts(N: int, r0: float, m: float | None) -> tuple[int, int]:
    """R and M of an image of N tokens: what goes, and how many more are recycled; m None recycles nothing.

    M is 0 where m^2 > N: as there is a token for each cell all the same, more than N - R stay.
    """
    R = round(N * (1 - r0))
    return R, int(N / m**2) if R and m is not None else 0


def recycle(x: Tensor, imp: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merges the tokens of each cell: x (n, D), imp (n,), cell (n,) int64, -1 for tokens that are no part of any.

    Returns (merged, anchor, member): merged (n, D) is x, where a cell's token of largest imp, the first among equals,
    is the cell's mean weighted by max(imp, 0), or its plain mean where all weigh 0; anchor (n,) bool marks these;
    member (n,) holds for each token of a cell the anchor's index, else -1.
    """
    n = x.shape[0]
    own = cell >= 0
    if not bool(own.any()):
        return x, own, torch.full_like(cell, -1)
    names, of = cell[own].unique(return_inverse=True)  # (C,), (k,)
    rank = torch.empty_like(cell).scatter(0, descending(imp), torch.arange(n, device=cell.device))[own]
    best = torch.full_like(names, n).scatter_reduce(0, of, rank, "amin")  # (C,)
    index = own.nonzero()[:, 0]
    at = torch.empty_like(names).scatter(0, of[rank == best[of]], index[rank == best[of]])  # (C,) each cell's anchor
    weight = imp[own].float().clamp(min=0)
    total = torch.zeros(len(names), device=x.device).index_add(0, of, weight)
    weight = torch.where(total[of] > 0, weight, 1.0)
    total = torch.zeros(len(names), device=x.device).index_add(0, of, weight)
    mean = torch.zeros(len(names), x.shape[1], device=x.device).index_add(0, of, x[own].float() * weight[:, None])
    merged = x.index_copy(0, at, (mean / total[:, None]).to(x.dtype))
    anchor = torch.zeros_like(own).index_fill(0, at, True)
    return merged, anchor, torch.full_like(cell, -1).index_copy(0, index, at[of])


def stage_count(n: int, r: float) -> int:
    """Tokens of an image that a stage leaves: n - round(n (1 - r)), at least 1."""
    return max(min(n, 1), n - round(n * (1 - r)))


@dataclass(frozen=True)
class VFlowOpt(Method):
    """Prunes an image's tokens at the language model's input, where it merges what it drops, and between its layers.

    budget: r0 at the input and one share per stage, each of the image's tokens that are still there. prune_at: the
    stages. t: how many times the mean attention a patch must receive to vote; none can pass at the number of patches or
    above, so small grids need a small t. m: side of a recycling cell in patches, None to drop without merging. alpha:
    weight of the patch entropy, which the released settings switch off; it reads the tower's pixels, stretched to 0..1
    over the tiles of each image, as their mean and standard deviation are not known here.
    """

    budget: tuple[float, ...] = param((0.2651, 0.9833, 0.8773), gt=0, le=1, doc="share kept at the input, per stage")
    prune_at: tuple[int, ...] = param((9, 18), ge=1, doc="0-based layers whose input is cut")
    t: float = param(34.76, ge=0, doc="of the mean attention received, from which on a patch votes")
    m: float | None = param(15.58, gt=0, doc="side of a recycling cell, in patches")
    alpha: float = param(0.0, ge=-1, le=1, doc="weight of the patch entropy")

    slots: ClassVar[tuple[str, ...]] = ("input.rows", "layer.rows")
    positions: ClassVar[str] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.budget) != len(self.prune_at) + 1:
            raise ValueError(
                f"VFlowOpt.budget must have one share for the input and one per stage ({len(self.prune_at) + 1}), got "
                f"{self.budget!r}"
            )
        if list(self.prune_at) != sorted(set(self.prune_at)):
            raise ValueError(f"VFlowOpt.prune_at must ascend without repetition, got {self.prune_at!r}")

    def identity(self) -> Method:
        return replace(self, budget=(1.0,) * len(self.budget))

    def needs(self) -> set[str]:
        return {"vision tower"}

    def check(self, anatomy: Anatomy) -> None:
        if self.prune_at and self.prune_at[-1] >= len(anatomy.layers):
            raise UnsupportedModel(
                f"VFlowOpt.prune_at must be < the model's {len(anatomy.layers)} layers, got {self.prune_at!r}; choose "
                "stages of this model"
            )
        if self.alpha and not _reads_pixels(anatomy):
            raise UnsupportedModel(
                f"VFlowOpt(alpha={self.alpha!r}) needs the pixels of each visual token, which "
                f"{type(anatomy.model).__name__} merges or packs; use alpha=0.0"
            )

    def watch_tower(self, tower: Tower, run: Run) -> dict[str, Tensor]:
        query, key, _, scaling = tower.layers[tower.feature_layer]
        imp = streamed_context_relevance(query, key, self.t, tower.specials, scaling, tower.live)  # (T, patches)
        if tower.groups is not None:  # several patches are one token
            T, (_, N, each) = imp.shape[0], tower.groups.shape
            imp = imp.gather(1, tower.groups.expand(T, -1, -1).flatten(1)).view(T, N, each).mean(-1)
        if self.alpha:
            assert tower.pixels is not None
            rows, columns = tower.grid
            if imp.shape[1] != rows * columns:
                raise UsageError("VFlowOpt's patch entropy needs whole grids, but the tower was pruned; use alpha=0.0")
            pixels = _stretched(tower.pixels, tower.tiles.tolist())
            imp = importance(imp, patch_entropy(pixels, tower.pixels.shape[-1] // columns), self.alpha)
        return {"imp": imp}

    def cut_input(self, stage: Stage) -> Tensor:
        tile, column = stage.fact("tile"), stage.fact("column")
        newline = stage.visual & (tile >= 0) & (column < 0)
        imp = torch.where(newline, 1.0, _carried(stage))  # (B, r)
        stage.state["imp"] = imp
        pruned = torch.zeros_like(stage.visual)
        for image, entered in enumerate(stage.entered.T.tolist()):
            rows = stage.visual & ~newline & (stage.image == image)
            leave = torch.tensor([sum(prune_counts(N, self.budget[0], self.m)) for N in entered], device=imp.device)
            pruned |= rows & ~keep_best(imp, rows, (rows.sum(-1) - leave).clamp(min=0))
        if self.m is None:
            return stage.live & ~pruned
        y, x = ((place / self.m).floor().long() for place in (stage.fact("row"), column))
        cell = torch.arange(len(imp), device=imp.device)[:, None].expand_as(y)
        for part in (stage.image, tile, y, x):  # one number for sample, image, tile, row and column of the cell
            cell = cell * (part.max() + 2) + part + 1
        cell = torch.where(pruned, cell, -1)
        merged, anchor, member = recycle(stage.hidden.flatten(0, 1), imp.flatten(), cell.flatten())
        if bool(pruned.any()):
            first = torch.arange(len(imp), device=imp.device)[:, None] * imp.shape[1]
            member = member.view_as(imp)
            stage.replace(merged.view_as(stage.hidden), torch.where(member >= 0, member - first, -1))
        return stage.live & (~pruned | anchor.view_as(pruned))

    def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
        return self.prune_at

    def keep_rows(self, stage: Stage) -> Tensor:
        imp, r = _carried(stage), self.budget[1 + self.prune_at.index(stage.layer)]
        keep = stage.live & ~stage.visual
        for image in range(stage.entered.shape[1]):
            rows = stage.visual & (stage.image == image)
            count = [stage_count(n, r) for n in rows.sum(-1).tolist()]
            keep = keep | keep_best(imp, rows, torch.tensor(count, device=imp.device))
        return keep

    def search_space(self, anatomy: Anatomy, budget: float) -> dict[str, tuple[float, float]]:
        """Bounds of r0, r1, ... (all shares but the last), t, m and alpha for an average share `budget`.

        On the paper's model and budget (729 patches, 25 %) they are its code's; otherwise r0 and m move with the
        budget, t with the number of patches, m with the side of the grid too.
        """
        rows, columns = _grid(anatomy)
        high = 1.5 * budget
        if self.prune_at:  # r0 leaves something for the layers behind the last stage
            high = min(high, 0.98 * budget * len(anatomy.layers) / self.prune_at[-1])
        space = {"r0": (budget, max(budget, min(1.0, high)))} if self.prune_at else {}
        space |= {f"r{i}": (0.8 / 1.5, 1.0) for i in range(1, len(self.prune_at))}
        space["t"] = (0.0, min(50.0, max(5.0, 50 * rows * columns / _SIDE**2)))
        if self.m is not None:
            low = 1.5 / budget**0.5  # M is at most 4 / 9 of the tokens that stay
            space["m"] = (low, max(low, 24 / _SIDE * max(rows, columns)))
        if _reads_pixels(anatomy):
            space["alpha"] = (-1.0, 1.0)
        return space

    def planned(self, point: Mapping[str, float], anatomy: Anatomy, budget: float) -> VFlowOpt:
        """The method at a point of the search space, its last share solved for the budget. What the point leaves out
        is as it is here, within bounds, and its shares are uniform: r0 the budget, the others 1.

        A point's r0 counts all that enters. A grid has more cells than the M that make room for them unless m
        divides its sides, which matters on small ones: the method's r0 is smaller by the difference.
        """
        space = self.search_space(anatomy, budget)
        own = {"t": self.t, "m": self.m or 1.0, "alpha": self.alpha, "r0": budget}
        value = {
            name: float(min(max(point.get(name, own.get(name, 1.0)), low), high)) for name, (low, high) in space.items()
        }
        t, m, alpha = (round(value[name], 4) if name in value else getattr(self, name) for name in ("t", "m", "alpha"))
        shares = [value[f"r{i}"] for i in range(len(self.prune_at))]
        shares.append(last_share(budget, (0, *self.prune_at), shares, len(anatomy.layers)))
        if m is not None and shares[0] < 1:
            rows, columns = _grid(anatomy)
            cells = (floor((rows - 1) / m) + 1) * (floor((columns - 1) / m) + 1)
            shares[0] -= (cells - int(rows * columns / m**2)) / (rows * columns)
        return replace(self, budget=tuple(map(_rounded_down, shares)), t=t, m=m, alpha=alpha)


def _grid(anatomy: Anatomy) -> tuple[int, int]:
    """Of a tile, or the paper's where images differ in size."""
    return anatomy.vision.grid if anatomy.vision is not None and anatomy.vision.sized else (_SIDE, _SIDE)


def _rounded_down(share: float) -> float:
    return max(1e-4, floor(share * 1e4 + 1e-6) / 1e4)


def _carried(stage: Stage) -> Tensor:
    if "imp" not in stage.state:
        raise PromptError("VFlowOpt scores images in the vision tower, which did not run; give pixel_values")
    return stage.state["imp"]


def _reads_pixels(anatomy: Anatomy) -> bool:
    return anatomy.vision is not None and anatomy.vision.sized and anatomy.vision.merge == 1


def _stretched(pixels: Tensor, tiles: list[int]) -> Tensor:
    """Pixels (T, 3, height, width) of all tiles, to 0..1 over the tiles of an image; tiles: how many it has."""
    sizes: list[int] = []
    while sum(sizes) < len(tiles):
        sizes.append(min(tiles[sum(sizes)], len(tiles) - sum(sizes)))
    images = pixels.float().split(sizes)
    return torch.cat([(x - x.min()) / (x.max() - x.min()).clamp(min=1e-12) for x in images])
