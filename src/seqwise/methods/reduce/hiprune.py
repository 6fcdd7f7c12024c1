"""HiPrune: two layers of the vision tower vote, a middle one for objects and the output layer for the whole image.

    a_t[j]  = mean_{h, i} A_t[h, i, j]             attention that patch j receives in tower layer t, from all rows
    anchors:   the Na = round(B alpha / 5) patches of largest a_l, l the object layer
    buffers:   the four neighbours of each anchor on the grid
    registers: the B - |A| patches of largest a_deep outside A = anchors + buffers, deep the feature's layer

B patches stay in raster order. HiPrune++ adds round(beta B) more, those most like the text:

    cos(token_j, mean text embedding)              tokens after the projector

Needs no CLS token and, without ++, no text.
"HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models", arXiv 2508.00553.
The code clamps neighbours to the index range, so that an anchor in the first row adds token 0; the paper drops them.
Both work on flat indices, where the neighbour of a row's end is the next row's start. Na is at most B // 5 here, where
the code fails. ++ has a text and a pseudo-code that differ in the count; this is the text's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import UnsupportedModel
from seqwise.core.method import Method, budget_param, param
from seqwise.core.select import top_k
from seqwise.core.towers import Tower

Edges: TypeAlias = Literal["clamp", "drop", "grid"]


def global_attention(received: Tensor, specials: int = 1) -> Tensor:
    """a of one layer: attention that each patch receives, mean over heads and over all rows, CLS row included.

    received: (..., h, specials + N), the attention summed over its specials + N rows: `A.sum(-2)`. The first `specials`
    columns are no patches. Returns (..., N).
    """
    return received[..., specials:].mean(-2) / received.shape[-1]


def anchor_count(B: int, alpha: float) -> int:
    """Na = round(B alpha / 5), halves to the even number, at most B // 5: anchors and their buffers fit into B."""
    return min(round(B * alpha / 5), B // 5)


def anchors(a_l: Tensor, B: int, alpha: float) -> Tensor:
    """The Na patches of largest a_l (..., N), ascending: (..., Na). Ties go to the earlier patch."""
    return top_k(a_l, anchor_count(B, alpha))


def buffers(x: Tensor, grid: tuple[int, int], edges: Edges = "clamp") -> Tensor:
    """The left, right, upper and lower neighbour of each anchor x (..., Na) on a grid (rows, columns): (..., Na, 4).

    edges: what stands for a neighbour that is not there. "clamp": the first or the last patch, and beyond a row's end
    the next row's start (the official code); "drop": the anchor itself, but rows still wrap (the paper); "grid": the
    anchor itself, rows do not wrap.
    """
    r, c = grid
    y = x[..., None] + torch.tensor([-1, 1, -c, c], device=x.device)
    if edges == "clamp":
        return y.clamp(0, r * c - 1)
    there = (y >= 0) & (y < r * c)
    if edges == "grid":
        here = x[..., None]
        there &= (y // c == here // c) | (y % c == here % c)
    return torch.where(there, y, x[..., None])


def vote(
    a_l: Tensor, a_deep: Tensor, B: int, grid: tuple[int, int], alpha: float = 0.1, edges: Edges = "clamp"
) -> Tensor:
    """The min(B, N) patches that stay, ascending: a_l, a_deep (..., N) -> (..., min(B, N)).

    grid: rows and columns of the N patches. alpha = 0 is the top B of a_deep.

    Raises:
        ValueError: the grid does not hold N patches, or B < 1.
    """
    N = a_deep.shape[-1]
    if grid[0] * grid[1] != N:
        raise ValueError(f"vote: grid must hold all {N} patches, got {grid[0]} x {grid[1]}")
    if B < 1:
        raise ValueError(f"vote: B must be >= 1, got {B}")
    x = anchors(a_l, min(B, N), alpha)  # (..., Na)
    A = torch.cat([x, buffers(x, grid, edges).flatten(-2)], -1)  # (..., 5 Na), with repetitions
    return top_k(a_deep.scatter(-1, A, float("inf")), B)


def add_by_text(kept: Tensor, tokens: Tensor, text: Tensor, beta: float = 0.1) -> Tensor:
    """HiPrune++: `kept` (..., B) and the round(beta B) other tokens most like the text, ascending.

    tokens: (..., N, D) in the space of the text embedding; text: (..., D). Returns (..., min(N, B + round(beta B))).
    """
    B = kept.shape[-1]
    score = cosine_similarity(tokens.float(), text.float()[..., None, :], dim=-1)  # (..., N)
    return top_k(score.scatter(-1, kept, float("inf")), B + round(beta * B))


@dataclass(frozen=True)
class HiPrune(Method):
    """Prunes visual tokens before the language model by the attention of two layers of the vision tower.

    budget: B, visual tokens per image (paper: 192, 128, 64 of 576), split evenly over the image's tiles, overview
    included; or the share kept of each tile, rounded to the nearest count. layer: the object layer l, 1-based; None: 9
    of CLIP's 24 layers in proportion, or the middle of a tower without CLS (16 of Qwen2.5-VL's 32). alpha: share of B
    for anchors and buffers. edges: see `buffers`. beta: HiPrune++ (paper: 0.1) adds round(beta B) tokens to B; 0: none.
    With alpha = 0 it composes with methods that shorten the tower; anchors need the whole grid.
    """

    budget: int | float = budget_param(128, "visual tokens kept per image")
    layer: int | None = param(None, ge=1, doc="1-based tower layer of the anchors")
    alpha: float = param(0.1, ge=0, le=1, doc="share of the budget for anchors and buffers")
    edges: Edges = "clamp"
    beta: float = param(0.0, ge=0, doc="tokens added by likeness to the text, per token of the budget")

    slots: ClassVar[tuple[str, ...]] = ("input.rows",)

    def identity(self) -> Method:
        return replace(self, budget=1.0)

    def needs(self) -> set[str]:
        return {"vision tower"}

    def check(self, anatomy: Anatomy) -> None:
        assert anatomy.vision is not None  # needs() asks for it
        deep = anatomy.vision.feature_layer + 1
        if self.layer is not None and self.layer > deep:
            raise UnsupportedModel(
                f"HiPrune.layer must be <= {deep}, the layer whose output the projector of "
                f"{type(anatomy.model).__name__} reads, got {self.layer}"
            )

    def watched_tower(self, anatomy: Anatomy) -> tuple[int, ...]:
        assert anatomy.vision is not None
        return (self._object_layer(anatomy.vision.feature_layer, anatomy.vision.specials),) if self.alpha else ()

    def keep_input(self, tower: Tower) -> Tensor:  # (T, N) bool
        a_l = a_deep = global_attention(tower.received(), tower.specials)  # (T, N)
        grid = (1, tower.patches)  # without anchors no neighbour is asked for, and the tower may have been shortened
        if self.alpha:
            layer = self._object_layer(tower.feature_layer, tower.specials)
            a_l, grid = global_attention(tower.received(layer=layer), tower.specials), tower.grid
        keep = torch.zeros_like(a_deep, dtype=torch.bool)
        for tiles in tower.tiles.unique().tolist():  # images of as many tiles share B
            at = (tower.tiles == tiles).nonzero()[:, 0]
            chosen = vote(a_l[at], a_deep[at], self._count(tower.patches, tiles), grid, self.alpha, self.edges)
            if self.beta:
                chosen = add_by_text(chosen, tower.projected[at], tower.text()[at], self.beta)
            keep[at] = keep[at].scatter(-1, chosen, True)
        return keep

    def _count(self, N: int, tiles: int) -> int:
        return max(1, round(N * self.budget) if isinstance(self.budget, float) else self.budget // tiles)

    def _object_layer(self, feature_layer: int, specials: int) -> int:
        """0-based."""
        if self.layer is not None:
            return self.layer - 1
        # towers with CLS are read one layer before their end
        return max(1, round(9 / 24 * (feature_layer + 2)) if specials else (feature_layer + 1) // 2) - 1
