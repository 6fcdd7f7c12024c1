"""Rotary positions of a model, applied to bare keys and queries: move a cached key to another place, or undo RoPE.

    R(p) x = x cos(p f) + rotate_half(x) sin(p f),     R(p) R(s) = R(p + s)

so a key that was stored at position s moves to p by R(p - s), and R(-s) gives it back unrotated.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import UnsupportedModel


def frequencies_of(anatomy: Anatomy) -> nn.Module:
    """The module that holds a model's inverse frequencies as `inv_freq` (d / 2,).

    Raises UnsupportedModel where there is none, or where they change with the length or from layer to layer.
    """
    name = type(anatomy.model).__name__
    rotary = getattr(anatomy.decoder, "rotary_emb", None)
    if rotary is None or not isinstance(getattr(rotary, "inv_freq", None), Tensor):
        raise UnsupportedModel(
            f"{name} has no single set of rotary frequencies; use a model with one RoPE for all layers"
        )
    if str(getattr(rotary, "rope_type", "default")) in ("dynamic", "longrope"):
        raise UnsupportedModel(f"{name} changes its rotary frequencies with the length; use another rope_type")
    return rotary


@dataclass(frozen=True)
class Rope:
    """A model's rotation. inv_freq: (d / 2,), read from the model at each use; the first d dimensions rotate."""

    module: nn.Module
    interleaved: bool = False

    @classmethod
    def of(cls, anatomy: Anatomy) -> Rope:
        """Raises UnsupportedModel for a model without one RoPE, or one that rotates in a way of its own."""
        module = frequencies_of(anatomy)
        turn = getattr(sys.modules[type(anatomy.attentions[0]).__module__], "rotate_half", None)
        probe = torch.tensor([1.0, 2.0, 3.0, 4.0])
        turned = turn(probe).tolist() if turn is not None else None
        if turned == [-3.0, -4.0, 1.0, 2.0]:
            return cls(module)
        if turned == [-2.0, 1.0, -4.0, 3.0]:
            return cls(module, interleaved=True)
        raise UnsupportedModel(f"{type(anatomy.model).__name__} rotates its keys in a way that seqwise does not know")

    @property
    def inv_freq(self) -> Tensor:
        return self.module.inv_freq  # type: ignore[return-value]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """R(positions) x in x's dtype. x: (B, H, n, D), positions: (B or 1, H or 1, n), negative ones turn back."""
        return rotate(x, positions, self.inv_freq, interleaved=self.interleaved)


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, *, interleaved: bool = False) -> Tensor:
    """R(positions) x. x: (..., n, D), positions: broadcastable to (..., n), inv_freq: (d / 2,) with d <= D.

    Pairs are (i, i + d / 2), or (2i, 2i + 1) if interleaved; dimensions from d on stay. Angles are float32.
    """
    angle = positions.float()[..., None] * inv_freq.float().to(x.device)  # (..., n, d / 2)
    d = 2 * angle.shape[-1]
    cos, sin = angle.cos(), angle.sin()
    if interleaved:
        a, b = x[..., :d:2].float(), x[..., 1:d:2].float()
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = x[..., : d // 2].float(), x[..., d // 2 : d].float()
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    turned = turned.to(x.dtype)
    return turned if d == x.shape[-1] else torch.cat([turned, x[..., d:].expand(*turned.shape[:-1], -1)], -1)
