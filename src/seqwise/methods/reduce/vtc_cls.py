"""VTC-CLS: keep the patches that the vision tower's CLS token attends to, summed over its late layers.

    c_l[j] = mean_h A_l[h, CLS, j]                 softmax over CLS and patches, then the CLS column is dropped
    s[j]   = sum_{l = start .. L - 2} c_l[j]       L - 2 (0-based): the layer whose output the projector reads
    keep the U patches of largest s, in raster order

The tower's own summary knows what is in the image before the language model has read a row of it; attention of the
prompt knows the question, not the answer.
"[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs", arXiv 2412.05819.
The official code knows one image of one tile; several tiles share U evenly here, which is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import UnsupportedModel
from seqwise.core.method import Method, budget_param, param
from seqwise.core.select import budget_count, keep_best, top_k
from seqwise.core.towers import Tower


def cls_score(attention: Tensor, specials: int = 1) -> Tensor:
    """s: attention that each patch gets from CLS, mean over heads, sum over layers.

    attention: (K, ..., h, specials + N), the CLS row of each of the K layers after its softmax, `A_l[..., 0, :]`. The
    first `specials` columns (CLS, registers) are no patches; nothing is normalised anew. Returns (..., N).
    """
    return attention[..., specials:].mean(-2).sum(0)


def keep_patches(s: Tensor, U: int) -> Tensor:
    """Scores (..., N) -> indices of the U largest, ascending: (..., min(U, N)). Ties go to the earlier patch.

    Raises:
        ValueError: U < 1.
    """
    if U < 1:
        raise ValueError(f"keep_patches: U must be >= 1, got {U}")
    return top_k(s, U)


@dataclass(frozen=True)
class VTCCLS(Method):
    """Prunes visual tokens before the language model by the CLS attention of several tower layers.

    budget: U, visual tokens per image (paper: 256, 128, 64 of 576), split evenly over the image's tiles; or the share
    kept of each tile. start: first tower layer of the sum, 0-based; the last is the feature layer. None: two thirds of
    the tower's depth, layer 16 of CLIP-L's 24 as in the official scripts. Where several patches make one visual token,
    its score is their mean. With a sum of one layer it composes with methods that shorten the tower.
    """

    budget: int | float = budget_param(128, "visual tokens kept per image")
    start: int | None = param(None, ge=0, doc="0-based tower layer where the sum begins")

    slots: ClassVar[tuple[str, ...]] = ("input.rows",)

    def identity(self) -> Method:
        return replace(self, budget=1.0)

    def needs(self) -> set[str]:
        return {"vision tower"}

    def check(self, anatomy: Anatomy) -> None:
        vision = anatomy.vision
        assert vision is not None  # needs() asks for it
        if not vision.specials:
            raise UnsupportedModel(
                f"{self} needs a CLS token in its vision tower, which {type(anatomy.model).__name__} lacks; "
                "FoPru(rows='all') ranks patches by the attention of all rows instead"
            )
        if self.start is not None and self.start > vision.feature_layer:
            raise UnsupportedModel(
                f"VTCCLS.start must be <= {vision.feature_layer}, the layer whose output the projector of "
                f"{type(anatomy.model).__name__} reads, got {self.start}"
            )

    def watched_tower(self, anatomy: Anatomy) -> tuple[int, ...]:
        assert anatomy.vision is not None
        return self._layers(anatomy.vision.feature_layer)[:-1]

    def keep_input(self, tower: Tower) -> Tensor:
        layers = self._layers(tower.feature_layer)
        s = cls_score(torch.stack([tower.received(rows="cls", layer=layer) for layer in layers]), tower.specials)
        if isinstance(self.budget, float):
            return keep_patches(s, budget_count(self.budget, s.shape[-1]))
        U = (self.budget // tower.tiles).clamp(min=1)  # (T,)
        return keep_best(s, torch.ones_like(s, dtype=torch.bool), U)

    def _layers(self, feature_layer: int) -> tuple[int, ...]:
        # CLIP towers have one more layer behind the feature layer, so this is two thirds of their depth
        first = 2 * (feature_layer + 2) // 3 if self.start is None else self.start
        return tuple(range(min(first, feature_layer), feature_layer + 1))
