"""What reducers of whole images share: which rows stand for patches, and the images of a prompt one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from seqwise.core.views import Stage


def patch_rows(stage: Stage) -> Tensor:
    """(B, r) bool: visual rows except the newline tokens that tiled models put between the lines of their patches."""
    return stage.visual & ~((stage.fact("tile") >= 0) & (stage.fact("column") < 0))


def rows_of_images(tokens: Tensor, image: Tensor) -> list[tuple[int, Tensor]]:
    """Sample and rows (n,), ascending, of each image, sample by sample.

    tokens: (B, r) bool, the rows that count; image: (B, r), which image of its sample each belongs to.
    """
    sample, row = tokens.nonzero(as_tuple=True)
    found, count = torch.unique_consecutive(torch.stack([sample, image[sample, row]]), dim=1, return_counts=True)
    return list(zip(found[0].tolist(), row.split(count.tolist()), strict=True))


def with_newlines(stage: Stage, patches: Tensor, keep: Tensor) -> Tensor:
    """keep (B, r) and the newline tokens of the images that lose no patch: newlines carry the grid, which is gone as
    soon as any patch is. patches: (B, r), see `patch_rows`."""
    image = stage.image.clamp(min=0)
    lost = torch.zeros(image.shape[0], int(image.max()) + 1, dtype=torch.long, device=image.device)
    lost = lost.scatter_add(1, image, (patches & ~keep).long())
    return keep | (stage.visual & ~patches & (lost.gather(1, image) == 0))
