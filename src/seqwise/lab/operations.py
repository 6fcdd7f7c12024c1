"""Floating point operations of a prefill, from the rows that each layer really got.

    per layer with n rows:  2 n W + 4 n^2 d          W: weights of its linear layers, d: width of its attention
                            the second term halved where attention is causal

Embeddings, projector, head and what a method itself computes are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from seqwise.core import hf
from seqwise.core.anatomy import Anatomy


@dataclass
class Rows:
    """Rows that entered each layer of tower and decoder, per call: [layer][call] of (samples, rows)."""

    tower: list[list[tuple[int, int]]] = field(default_factory=list)
    decoder: list[list[tuple[int, int]]] = field(default_factory=list)
    _weights: list[float] = field(default_factory=list)
    _widths: list[float] = field(default_factory=list)

    @property
    def operations(self) -> float:
        layers = [*((calls, 1) for calls in self.tower), *((calls, 2) for calls in self.decoder)]
        return sum(
            samples * (2.0 * n * weight + 4.0 * n * n * width / half)
            for (calls, half), weight, width in zip(layers, self._weights, self._widths, strict=True)
            for samples, n in calls
        )


@contextmanager
def counted(anatomy: Anatomy) -> Iterator[Rows]:
    """Counts the rows of all forwards inside. Entered after a method is attached, it sees what the layers get."""
    tower = () if anatomy.vision is None else anatomy.vision.layers
    found = Rows([[] for _ in tower], [[] for _ in anatomy.layers])
    handles = []
    for layer, calls in zip((*tower, *anatomy.layers), (*found.tower, *found.decoder), strict=True):
        linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        found._weights.append(float(sum(module.weight.numel() for module in linear)))
        found._widths.append(float(max((module.in_features for module in linear[:1]), default=0)))

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any], calls: list[tuple[int, int]] = calls) -> None:
            hidden = hf.hidden_argument(args, kwargs)
            calls.append((hidden.shape[0], hidden.shape[1]) if hidden.dim() == 3 else (1, hidden.shape[0]))

        handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
