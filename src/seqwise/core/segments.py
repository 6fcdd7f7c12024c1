"""Per-token facts of a prompt, beside an ordinary batch: type, image, tile or frame, grid cell, set, member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from seqwise.core.errors import PromptError

PAD, TEXT, IMAGE = 0, 1, 2
CONTEXT, QUESTION = 0, 1


@dataclass(frozen=True)
class Segments:
    """Facts of each token, (B, N) int64 each; -1 where a fact does not apply.

    type: PAD, TEXT or IMAGE. image: which image of the sample, tile: which tile or frame of it, row and column: the
    grid cell. set and member: which set of the prompt the token belongs to, and which of its members. part: CONTEXT or
    QUESTION. box: (B, N, 4) float32, left, top, right, bottom of the element on its page, y downwards; NaN elsewhere.
    """

    type: Tensor
    image: Tensor
    tile: Tensor
    row: Tensor
    column: Tensor
    set: Tensor
    member: Tensor
    part: Any = None  # (B, N), unknown where not given
    box: Any = None  # (B, N, 4), likewise

    def __post_init__(self) -> None:
        if self.part is None:
            object.__setattr__(self, "part", torch.full_like(self.type, -1))
        if self.box is None:
            object.__setattr__(self, "box", torch.full((*self.type.shape, 4), float("nan"), device=self.type.device))
        for spec in fields(self):
            value = getattr(self, spec.name)
            shape = (*self.type.shape, 4) if spec.name == "box" else tuple(self.type.shape)
            if tuple(value.shape) != shape or self.type.dim() != 2:
                raise PromptError(f"segments.{spec.name} must have shape {shape}, got {tuple(value.shape)}")

    @property
    def visual(self) -> Tensor:
        return self.type == IMAGE

    @property
    def real(self) -> Tensor:
        return self.type != PAD

    def has(self, fact: str) -> bool:
        """Whether any token has this fact ("set", "part", "box", ...)."""
        value: Tensor = getattr(self, fact)
        return bool((~value.isnan()).any()) if fact == "box" else bool((value >= 0).any())

    def sample(self, b: int) -> Segments:
        """Facts of one sample, (1, N) each."""
        return Segments(**{spec.name: getattr(self, spec.name)[b : b + 1] for spec in fields(self)})

    def columns(self, start: int, stop: int) -> Segments:
        """Facts of the columns [start, stop)."""
        return Segments(**{spec.name: getattr(self, spec.name)[:, start:stop] for spec in fields(self)})

    def repeat(self, copies: int) -> Segments:
        """Each sample so many times (beams, several returned sequences)."""
        if copies == 1:
            return self
        return Segments(**{spec.name: getattr(self, spec.name).repeat_interleave(copies, 0) for spec in fields(self)})

    @classmethod
    def padded(cls, samples: Sequence[Segments], width: int) -> Segments:
        """Facts of several samples (1, n) as one batch (B, width), padding on the left."""

        def join(name: str) -> Tensor:
            rows = []
            for sample in samples:
                value: Tensor = getattr(sample, name)
                before = width - value.shape[1]
                sides = (0, 0, before, 0) if name == "box" else (before, 0)
                fill = {"type": PAD, "box": float("nan")}.get(name, -1)
                rows.append(torch.nn.functional.pad(value, sides, value=fill))
            return torch.cat(rows)

        return cls(**{spec.name: join(spec.name) for spec in fields(cls)})

    def take(self, index: Tensor, live: Tensor | None = None) -> Segments:
        """Facts of the tokens index (B, k); where `live` (B, k) is False, those of padding."""
        B, k = index.shape

        def pick(name: str, fill: float) -> Tensor:
            value: Tensor = getattr(self, name)
            at = index if value.dim() == 2 else index[..., None].expand(B, k, 4)
            found = value.expand(B, *value.shape[1:]).gather(1, at)
            if live is None:
                return found
            return found.masked_fill(~(live if found.dim() == 2 else live[..., None]), fill)

        fill = {"type": PAD, "box": float("nan")}
        return Segments(**{spec.name: pick(spec.name, fill.get(spec.name, -1)) for spec in fields(self)})

    @classmethod
    def infer(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        image_token: int | Sequence[int] | None,
        grid: tuple[int, int] | None = None,
    ) -> Segments:
        """Facts that ids alone tell: padding, image spans (one image per run of placeholders), and the grid cells of
        images that have as many tokens as the tower's grid (rows, columns) has cells, in raster order.

        image_token: the placeholder's id, or those of images and videos."""
        type_ = torch.full_like(input_ids, TEXT)
        unknown = torch.full_like(input_ids, -1)
        image = row = column = unknown
        if image_token is not None:
            visual = torch.isin(input_ids, torch.tensor(image_token, device=input_ids.device))
            type_ = torch.where(visual, IMAGE, type_)
            image = image_runs(visual)
            if grid is not None and min(grid) > 0:
                row, column = _raster(image, grid)
        if attention_mask is not None:
            type_ = torch.where(attention_mask.bool(), type_, PAD)
        return cls(type_, image, unknown, row, column, unknown, unknown)


def image_runs(is_visual: Tensor, image: Tensor | None = None) -> Tensor:
    """Number of the image that each token belongs to, in order of appearance, -1 at text: int64 (B, L).

    is_visual: bool (B, L). An image is a stretch of consecutive visual tokens, all its tiles together; where image
    (B, L), an id per token, changes inside a stretch, the next image starts.
    """
    starts = is_visual & ~torch.nn.functional.pad(is_visual[:, :-1], (1, 0))
    if image is not None:
        starts = starts | (is_visual & torch.nn.functional.pad(image[:, 1:] != image[:, :-1], (1, 0)))
    return (starts.cumsum(-1) - 1).masked_fill(~is_visual, -1)


def by_order(value: Tensor, order: Tensor, fill: float = -1) -> Tensor:
    """(B, L): facts `value` (B, N) of prompt columns, told by the original position `order` (B or 1, N) of their tokens
    instead; L is one more than the longest sample has tokens, and the last entry is `fill`, for what is no token of it.
    """
    order = order.expand(value.shape[0], -1)
    n = int(order.max()) + 1
    table = torch.full((value.shape[0], n + 1), fill, dtype=value.dtype, device=value.device)
    return table.scatter(1, torch.where(order >= 0, order, n), value).index_fill(
        1, torch.tensor([n], device=value.device), fill
    )


def look_up(table: Tensor, order: Tensor) -> Tensor:
    """Facts of the tokens with these original positions (B or 1, ...), from a table of `by_order`: (B, ...)."""
    B, last = table.shape[0], table.shape[1] - 1
    at = torch.where((order < 0) | (order > last), last, order).expand(B, *order.shape[1:])
    return table.gather(1, at.reshape(B, -1)).view(at.shape)


def _raster(image: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Grid cells of visual tokens in raster order; -1 in images whose tokens are not as many as the cells."""
    unknown = torch.full_like(image, -1)
    n = image.shape[1]
    columns = torch.arange(n, device=image.device).expand_as(image)
    starts = (image >= 0) & (image != torch.nn.functional.pad(image[:, :-1], (1, 0), value=-1))
    first = torch.where(starts, columns, 0).cummax(-1).values
    place = columns - first
    slot = image.clamp(min=0)
    tokens = torch.zeros_like(image).scatter_add(1, slot, (image >= 0).long()).gather(1, slot)
    fits = (image >= 0) & (tokens == grid[0] * grid[1])
    return torch.where(fits, place // grid[1], unknown), torch.where(fits, place % grid[1], unknown)
