"""What every comparison needs and no paper of ours owns: the full cache, recent tokens with sinks, random tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from seqwise.core.caches import Kept, View
from seqwise.core.method import Method, budget_param, param, seeded
from seqwise.core.select import layer_budget


@dataclass(frozen=True)
class Full(Method):
    """The plain model: keeps everything. The yardstick of every table."""

    slots: ClassVar[tuple[str, ...]] = ("cache.retain",)

    def identity(self) -> Method:
        return self

    def retain(self, view: View) -> None:
        return None


@dataclass(frozen=True)
class Recent(Method):
    """StreamingLLM (arXiv 2309.17453): the first `sinks` tokens and the most recent others.

    budget: slots per layer and KV head, sinks included: tokens, or the share of the prompt's real tokens.
    """

    budget: int | float | tuple[int | float, ...] = budget_param(0.5, "KV slots kept per layer and head")
    sinks: int = param(4, ge=0, doc="first tokens always kept")

    slots: ClassVar[tuple[str, ...]] = ("cache.retain",)

    def identity(self) -> Method:
        return replace(self, budget=1.0)

    def retain(self, view: View) -> Kept | None:
        capacity = view.capacity(layer_budget(self.budget, view.layer, view.layers))
        score = view.order.float().expand_as(view.live)
        protected = (view.order >= 0) & (view.order < self.sinks)
        return view.keep(score, capacity, protected=protected.expand_as(view.live))


@dataclass(frozen=True)
class Random(Method):
    """Keeps slots by chance, the same for every model run with the same seed; the `recent` newest always stay.

    A slot's luck depends on the seed, the layer, the KV head and its position in its own prompt only.
    """

    budget: int | float | tuple[int | float, ...] = budget_param(0.5, "KV slots kept per layer and head")
    recent: int = param(16, ge=0, doc="newest slots always kept")
    seed: int = param(0, ge=0)

    slots: ClassVar[tuple[str, ...]] = ("cache.retain",)

    def identity(self) -> Method:
        return replace(self, budget=1.0)

    def retain(self, view: View) -> Kept | None:
        capacity = view.capacity(layer_budget(self.budget, view.layer, view.layers))
        if capacity is None or view.slots <= min(capacity):
            return None
        generator = seeded(self.seed, view.layer, 0, torch.device("cpu"))
        # one number per original position and head: the same token has the same luck alone and in a batch
        heads, positions = view.key.shape[1], view.ledger.columns
        luck = torch.rand(positions, heads, generator=generator).to(view.key.device)  # (positions, Hkv)
        order = view.order.clamp(min=0).expand_as(view.live)
        score = luck.mT[None].expand(order.shape[0], -1, -1).gather(-1, order)
        return view.keep(score, capacity, recent=self.recent)
