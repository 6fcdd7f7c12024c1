"""CCA: image tokens are numbered by rings from the border inwards, so that no part of an image is far from the text.

    c(y, x) = min(y, x, Hg-1-y, Wg-1-x)        ring of a cell of the Hg x Wg grid, R = ceil(min(Hg, Wg) / 2) rings
    position   text: one more than before;   image whose first token would stand at a:  a + c;   text after it:  a + R
    mask       two tokens of one image:  query of ring p sees keys of rings <= p;   all other pairs: causal

The order of the tokens in the sequence stays raster. 24 x 24 tokens take 12 positions instead of 576. A model has to
be trained with it.
"Mitigating Object Hallucination via Concentric Causal Attention", arXiv 2410.15926.
The official code gives all samples of a batch the last one's positions and only the first one the mask; here each
sample has its own. Grids that are not square, and several images, are ours: each image has its own rings and is
causal towards the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import PromptError, UnsupportedModel
from seqwise.core.method import Method
from seqwise.core.segments import Segments, image_runs

if TYPE_CHECKING:
    from seqwise.core.run import Run


def ring_of(row: Tensor, column: Tensor, Hg: int | Tensor, Wg: int | Tensor) -> Tensor:
    """c(y, x) of cells in Hg x Wg grids; all broadcast. 0 at the border, R - 1 in the centre."""
    return torch.minimum(torch.minimum(row, Hg - 1 - row), torch.minimum(column, Wg - 1 - column))


def rings(Hg: int, Wg: int) -> Tensor:
    """Ring of each cell of a grid, int64 (Hg, Wg). Raises ValueError for an empty grid."""
    if Hg < 1 or Wg < 1:
        raise ValueError(f"a grid must have at least one row and one column, got {Hg} x {Wg}")
    return ring_of(torch.arange(Hg)[:, None], torch.arange(Wg), Hg, Wg)


def positions(ring: Tensor, image: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
    """Position ids of a batch of prompts, int64 (B, L).

    ring: (B, L), -1 at text. image: see `image_runs`, by default each run of visual tokens is one image.
    attention_mask: (B, L), 0 at padding, which gets position 1.
    """
    live = torch.ones_like(ring, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    visual = (ring >= 0) & live
    run = image_runs(visual, image)  # (B, L)
    slot = run.clamp(min=0)
    R = ring.new_zeros(len(ring), int(run.max()) + 2).scatter_reduce(  # (B, I + 1), rings of each image
        1, slot, torch.where(visual, ring + 1, 0), "amax"
    )
    texts = (live & ~visual).cumsum(-1)  # (B, L), text tokens so far
    passed = pad(R.cumsum(-1), (1, 0))  # (B, I + 2), positions taken by the first i images
    a = texts + passed.gather(1, slot)
    p_text = texts - 1 + passed.gather(1, run.cummax(-1).values + 1)
    return torch.where(visual, a + ring, p_text).masked_fill(~live, 1)


def next_position(position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Position of the first generated token, (B,): one more than the largest of the real tokens."""
    if attention_mask is not None:
        position_ids = position_ids.masked_fill(~attention_mask.bool(), -1)
    return position_ids.amax(-1) + 1


def visible(
    order_q: Tensor, image_q: Tensor, ring_q: Tensor, order_k: Tensor, image_k: Tensor, ring_k: Tensor
) -> Tensor:
    """Whether a query sees a key, bool; all arguments broadcast. order: place in the sample; image: -1 at text."""
    return torch.where((image_q == image_k) & (image_q >= 0), ring_k <= ring_q, order_k <= order_q)


def concentric_mask(ring: Tensor, image: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
    """The mask of a batch, bool (B, 1, L, L), True where seen. Arguments as in `positions`.

    Padding is seen by itself alone, so that no row is empty.
    """
    order = torch.arange(ring.shape[1], device=ring.device)
    live = torch.ones_like(ring, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    run = image_runs((ring >= 0) & live, image)
    seen = visible(order[:, None], run[:, :, None], ring[:, :, None], order, run[:, None], ring[:, None])  # (B, L, L)
    return ((seen & live[:, None]) | (order[:, None] == order))[:, None]


def locate(segments: Segments, grid: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Ring and image number of each token of a batch of prompts, (B, N) int64 each, -1 at text and padding.

    grid: rows and columns of every image, None where they differ: then each image's cells tell. Tokens without a cell
    fill the grid in raster order.
    Raises PromptError for an image whose tokens do not fit its grid, lie at no known cell or have others between them.
    """
    visual = segments.visual
    told = bool(visual.any()) and bool((segments.image[visual] >= 0).all())
    run = image_runs(visual, segments.image if told else None)
    for b in range(len(run) if told else 0):
        stretches = int(run[b].max()) + 1
        if len(segments.image[b][visual[b]].unique()) != stretches:
            raise PromptError(
                f"each image of sample {b} must be one stretch of tokens, got {stretches} stretches of fewer images"
            )
    slot = run.clamp(min=0)
    images = int(run.max()) + 1

    def per_image(value: Tensor) -> Tensor:
        """Largest value among an image's tokens, (B, I), told to each of its tokens: (B, N)."""
        found = value.new_full((len(value), images + 1), -1).scatter_reduce(
            1, torch.where(visual, slot, images), value, "amax"
        )
        return found.gather(1, slot)

    index = torch.arange(run.shape[1], device=run.device)
    place = index - torch.where(run != pad(run[:, :-1], (1, 0), value=-2), index, 0).cummax(-1).values
    count = per_image(place) + 1
    row, column = segments.row, segments.column
    bare = per_image(((row < 0) | (column < 0)).long()) > 0  # some token of the image has no cell
    if grid is not None:
        Hg, Wg = (torch.full_like(row, side) for side in grid)
        row, column = torch.where(bare, place // grid[1], row), torch.where(bare, place % grid[1], column)
        wrong = (bare & (count != Hg * Wg)) | (row >= Hg) | (column >= Wg)
    else:
        Hg, Wg = per_image(row) + 1, per_image(column) + 1
        wrong = bare | (count != Hg * Wg)
    wrong = wrong & visual
    if bool(wrong.any()):
        b, j = (int(x) for x in wrong.nonzero()[0])
        shape = f"a {grid[0]} x {grid[1]} grid" if grid is not None else "a grid without gaps"
        raise PromptError(
            f"image {int(run[b, j])} of sample {b} must have the cells of {shape}, got {int(count[b, j])} tokens"
            f"{' without cells' if bool(bare[b, j]) else ''}; give each its cell: run.bind(segments)"
        )
    return ring_of(row, column, Hg, Wg).masked_fill(~visual, -1), run


def training_inputs(
    input_ids: Tensor, image_token: int, grid: tuple[int, int], attention_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """What a training batch needs beside its ids: `position_ids` (B, L) and `attention_mask` (B, 1, L, L), bool.

    input_ids: (B, L), each run of `image_token` is one image of this grid (rows, columns). attention_mask: (B, L), 0 at
    padding. Every sample has its own positions and mask; samples without an image are plain.
    The mask is for SDPA: eager attention adds masks, and needs `torch.where(mask, 0, torch.finfo(dtype).min)`.
    Raises PromptError for a run of another length than the grid has cells.
    """
    ring, image = locate(Segments.infer(input_ids, attention_mask, image_token), grid)
    return {
        "position_ids": positions(ring, image, attention_mask),
        "attention_mask": concentric_mask(ring, image, attention_mask),
    }


@dataclass(frozen=True)
class ConcentricCausalAttention(Method):
    """Ring positions and the ring mask for image tokens, for models trained with them (see `training_inputs`).

    Text-only prompts stay plain. A text model takes bound segments whose visual tokens have grid cells.
    """

    slots: ClassVar[tuple[str, ...]] = ("positions", "mask")
    looks_ahead: ClassVar[bool] = True

    # No identity: the rule has no parameter that would give back raster order.

    def needs(self) -> set[str]:
        return {"RoPE", "1-D positions"}

    def check(self, anatomy: Anatomy) -> None:
        if anatomy.vision is not None and anatomy.vision.tiled:
            raise UnsupportedModel(
                f"{self} needs images of one grid; {type(anatomy.model).__name__} cuts them into tiles. Use LLaVA-1.5"
            )

    def place(self, segments: Segments, anatomy: Anatomy) -> Tensor:
        ring, image = locate(segments, _grid(anatomy))
        return positions(ring, image, segments.real).float()

    def begin(self, run: Run) -> None:
        run.state[self] = 0  # images so far, of this prompt and its later turns

    def mark(self, segments: Segments, run: Run) -> dict[str, Tensor]:
        ring, image = locate(segments, _grid(run.anatomy))
        before, images = run.state[self], int(image.max()) + 1
        if images and run.chunk is not None:
            raise PromptError(f"{self}: tokens of an image see later ones; attach without chunk")
        run.state[self] = before + images
        return {"ring": ring, "image": torch.where(image >= 0, image + before, -1)}

    def sees(self, query: Mapping[str, Tensor], key: Mapping[str, Tensor]) -> Tensor:
        return visible(query["order"], query["image"], query["ring"], key["order"], key["image"], key["ring"])


def _grid(anatomy: Anatomy) -> tuple[int, int] | None:
    """The grid of every image, where the vision tower tells it."""
    return anatomy.vision.grid if anatomy.vision is not None and min(anatomy.vision.grid) > 0 else None
