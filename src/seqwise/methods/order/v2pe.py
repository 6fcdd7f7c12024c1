"""V2PE: a visual token moves the RoPE position by a small delta, so that many images fit the trained window.

    p_0 = 0,   p_j = p_{j-1} + 1 for text (image tags included),   p_{j-1} + delta for a visual token
    visual token r = 1..R of an image whose tag stands at the whole number p_img:   p_img + r delta
    the text token after it:                                                       ceil(p_img + R delta) + 1

delta = s / 256 for a stride s in {1, 2, 4, ..., 256} (an image tile is 256 tokens); s = 256 is ordinary RoPE.
Training draws s anew for every image ("v2pe_rnd"); inference takes one, the largest that fits the window
("v2pe_fix"). Frequencies are not interpolated; the same positions serve every layer; generated tokens add 1.
"V2PE: Improving Multimodal Long-Context Capability of Vision-Language Models with Variable Visual Position
Encoding", arXiv 2412.09616.
Positions are float32: half precision cannot hold 1000.25, whole numbers would lose delta. Pass a mask of ones
beside them, since steps other than 1 are otherwise read as packed sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import UsageError
from seqwise.core.method import Method, param
from seqwise.core.segments import Segments, image_runs

STRIDES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TILE = 256  # visual tokens per tile: delta = stride / TILE


def positions(
    is_visual: Tensor,
    delta: float | Tensor,
    attention_mask: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """Position ids of a batch of prompts.

    is_visual: bool (B, L). delta: one number in (0, 1], one per sample (B,), or one per image run (B, I), in
    order. attention_mask: (B, L), 0 at padding, which gets position 1. image: see `image_runs`;
    adjacent images without text between them each start from a whole number. Returns (B, L), float32.
    Raises ValueError where a delta is out of range or an image run has none.
    """
    live = torch.ones_like(is_visual) if attention_mask is None else attention_mask.bool()
    visual = is_visual & live
    run = image_runs(visual, image)  # (B, L)
    slot = run.clamp(min=0)
    d = _per_run(delta, len(run), int(run.max()) + 1, run.device)  # (B, I), float64 keeps r * delta exact
    R = torch.zeros_like(d).scatter_add(1, slot, visual.to(d.dtype))  # (B, I)
    # A run without a tag before it holds token 0 of the sequence: it counts from -delta, not from -1.
    opens = (visual & (live.cumsum(-1) == 1)).any(-1)  # (B,)
    untagged = torch.zeros_like(d)
    untagged[:, 0] = torch.where(opens, 1 - d[:, 0], untagged[:, 0])
    # R * delta may miss a whole number by a rounding error, and ceil would make a whole step of it.
    advance = torch.ceil(untagged + R * d - 1e-9)  # (B, I)
    after = pad(advance.cumsum(-1), (1, 0))  # (B, I + 1), the advance of the first i runs

    texts = (live & ~visual).cumsum(-1)  # (B, L), text tokens so far
    index = torch.arange(run.shape[1], device=run.device)
    changes = run != pad(run[:, :-1], (1, 0), value=-2)
    r = 1 + index - torch.where(changes, index, 0).cummax(-1).values  # (B, L), place in the run
    p_img = texts - 1 + (after[:, :-1] + untagged).gather(1, slot)
    p_text = texts - 1 + after.gather(1, run.cummax(-1).values + 1)
    p = torch.where(visual, p_img + r * d.gather(1, slot), p_text)
    return torch.where(live, p, 1.0).float()


def next_position(position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Position of the first generated token, float32 (B,): the whole number after the last real token's."""
    if attention_mask is not None:
        position_ids = position_ids.masked_fill(~attention_mask.bool(), float("-inf"))
    return position_ids.amax(-1).ceil() + 1  # positions never fall, so the largest is the last


def largest_delta(
    is_visual: Tensor,
    window: int,
    attention_mask: Tensor | None = None,
    image: Tensor | None = None,
    new_tokens: int = 0,
) -> Tensor:
    """Per sample the largest delta in {1, 1/2, ..., 1/256} whose positions stay below the window: (B,).

    window: positions that the model was trained on. new_tokens: how many are still to be generated.
    Raises UsageError where even 1/256 does not fit.
    """
    live = torch.ones_like(is_visual) if attention_mask is None else attention_mask.bool()
    deltas = torch.tensor(STRIDES, device=is_visual.device) / TILE  # ascending
    tried = torch.stack([positions(is_visual, d, attention_mask, image) for d in deltas.tolist()])
    last = tried.masked_fill(~live, 0).amax(-1)  # (9, B)
    fits = last.ceil() + new_tokens < window
    if not fits[0].all():
        b = int((~fits[0]).nonzero()[0])
        raise UsageError(
            f"window must be > {int(last[0, b].ceil()) + new_tokens} for sample {b} even at delta = 1/256,"
            f" got {window} (positions the model was trained on)"
        )
    return deltas[fits.sum(0) - 1]  # positions grow with delta: those that fit are the first ones


def draw_deltas(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Training: a delta per image, s / 256 with s uniform over {1, 2, 4, ..., 256}; float32 of this shape."""
    s = torch.tensor(STRIDES)[torch.randint(len(STRIDES), shape, generator=generator)]
    return s / TILE


def _per_run(delta: float | Tensor, batch: int, runs: int, device: torch.device) -> Tensor:
    d = torch.as_tensor(delta, dtype=torch.float64, device=device)
    if not ((d > 0) & (d <= 1)).all():
        raise ValueError(f"delta must be in (0, 1], got {delta} (position step of a visual token)")
    if d.ndim < 2:
        return d.reshape(-1, 1).expand(batch, max(runs, 1)).clone()
    if d.shape[0] != batch or d.shape[1] < runs:
        raise ValueError(f"delta must have shape (), ({batch},), ({batch}, >= {runs}), got {tuple(d.shape)}")
    return d if d.shape[1] else d.new_ones(batch, 1)


@dataclass(frozen=True)
class V2PE(Method):
    """Lets RoPE positions advance by delta per visual token, for models tuned that way (or to fit their window).

    delta: step of a visual token, None for the largest of 1, 1/2, ..., 1/256 whose prompt fits the model's window.
    """

    delta: float | None = param(0.25, gt=0, le=1, doc="position step of a visual token")

    slots: ClassVar[tuple[str, ...]] = ("positions",)

    def identity(self) -> Method:
        return replace(self, delta=1.0)

    def needs(self) -> set[str]:
        return {"RoPE", "1-D positions"}

    def place(self, segments: Segments, anatomy: Anatomy) -> Tensor:
        visual, real, image = segments.visual, segments.real, segments.image
        delta: float | Tensor
        if self.delta is None:
            delta = largest_delta(visual, anatomy.config.max_position_embeddings, real, image)
        else:
            delta = self.delta
        return positions(visual, delta, real, image)
