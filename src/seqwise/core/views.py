"""What methods see of a model at work: a module's transition, a cut between layers, an attention map or call, a step.

Views hold tensors of the engine; a method reads them and writes only to `state` and `shared`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seqwise.core.caches import SlotLayer
from seqwise.core.errors import SeqwiseError
from seqwise.core.observe import attention_statistics
from seqwise.core.rope import Rope
from seqwise.core.segments import look_up
from seqwise.core.select import compact
from seqwise.core.visible import Visible

Projection = tuple[Tensor, Tensor, Tensor, float, "float | None"]  # query, key, value, scaling, softcap


@dataclass
class Transition:
    """Input (after its norm) and output (before the residual) of one module of a watched layer: (B, r, d)."""

    layer: int
    module: str  # "attention" or "mlp"
    before: Tensor
    after: Tensor
    live: Tensor | None  # (B, r)
    state: dict[str, Tensor]  # (B, r) each, gathered with the rows


@dataclass
class Stage:
    """A cut: the rows about to enter layer `layer` of a prompt; layer 0 where they enter the language model."""

    layer: int
    layers: int
    order: Tensor  # (B, r)
    live: Tensor  # (B, r) bool
    visual: Tensor  # (B, r) bool
    image: Tensor  # (B, r), which image of the sample, -1 elsewhere
    entered: Tensor  # (B, images) visual tokens of each image that the language model got
    state: dict[str, Tensor]  # (B, r) each
    patches: Tensor  # (B, images) visual tokens of each image's tiles, before anything was dropped
    hidden: Tensor  # (B, r, d), before the layer's norm
    _fact: Callable[[str], Tensor]
    scorer: Callable[[], Tensor] | None = None  # as `on` got it
    _project: Callable[[], Projection] | None = None
    _visible: Visible | None = None
    _previous: Projection | None = None
    _visible_before: Visible | None = None
    replaced: tuple[Tensor, Tensor | None] | None = None

    @property
    def after_image(self) -> Tensor:
        """(B, r) bool: real rows behind the sample's last visual row: the instruction."""
        last = torch.where(self.visual, self.order, -1).amax(-1, keepdim=True)
        return self.live & (self.order > last)

    def fact(self, name: str) -> Tensor:
        """(B, r) int64: a fact of `Segments` ("tile", "row", "column", "part", ...) of each row, -1 where unknown. On
        tiled models tile 0 is the overview and tile 1 the joint map of the others, whose newline tokens have column -1.
        """
        return self._fact(name)

    def replace(self, hidden: Tensor, member: Tensor | None = None) -> None:
        """Rows go on with these contents (B, r, d); those that are cut do not matter. member: (B, r) index of the row
        that each row was merged into, -1 for none."""
        self.replaced = (hidden, member)

    def projections(self) -> tuple[Tensor, Tensor, Tensor]:
        """query (B, H, r, D), key, value (B, Hkv, r, D) of the layer that comes, after its norm and RoPE."""
        query, key, value, *_ = self._coming()
        return query, key, value

    def previous(self) -> tuple[Tensor, Tensor, Tensor]:
        """query, key, value of the layer that has just run, as `projections`."""
        query, key, value, *_ = self._just_run()
        return query, key, value

    def received(self, rows: Tensor, **options: Any) -> Tensor:
        """Attention of the layer that comes, summed over rows (B, r) bool: (B, H, r) fp32 (see `observe.received`)."""
        return _summed(self._coming(), self._visible, rows, options)

    def received_before(self, rows: Tensor, **options: Any) -> Tensor:
        """`received` of the layer that has just run."""
        return _summed(self._just_run(), self._visible_before, rows, options)

    def _coming(self) -> Projection:
        if self._project is None:
            raise SeqwiseError("rows that enter the language model have no attention yet; cut them between layers")
        return self._project()

    def _just_run(self) -> Projection:
        if self._previous is None:
            raise SeqwiseError("rows that enter the language model have no attention yet; cut them between layers")
        return self._previous


def _summed(projection: Projection, visible: Visible | None, rows: Tensor, options: dict[str, Any]) -> Tensor:
    query, key, _, scaling, softcap = projection
    assert visible is not None
    index, chosen = compact(rows)  # (B, m): the rows that count, often few
    query = query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1]))
    order = visible.order_q.expand(index.shape[0], -1).gather(1, index).masked_fill(~chosen, -1)
    visible = replace(visible, order_q=order, live_q=chosen, offset=None)
    return attention_statistics(
        query, key, visible=visible, weight=chosen.float(), scaling=scaling, softcap=softcap, **options
    )["sum"]


@dataclass
class Block:
    """The attention map of one layer, as `attention.probs` methods see it: all of it by statistics, rows by blocks."""

    layer: int
    heads: tuple[int, ...]
    phase: str
    rows: Tensor  # (B or 1, r) original positions of the rows at hand
    order: Tensor  # (B or 1, 1 or h, n) original positions of the slots
    live: Tensor  # (B, h, n) bool
    lengths: Tensor  # (B,) real tokens so far
    state: dict[str, Tensor]  # (B, H, n) each, travels with the slots
    query_heads: int  # H
    statistics: Callable[[tuple[str, ...]], dict[str, Tensor]]  # of the chosen heads' whole map: (B, h, n) each
    logits: Tensor  # (B, h, r, n) fp32 of the rows at hand, scaled, -inf where not seen
    marks: dict[str, Tensor]  # (B, L) by name and original position, see `Method.mark`

    def marked(self, name: str, order: Tensor) -> Tensor:
        """The number `name` of the tokens with these original positions (B or 1, ...), -1 where none: (B, ...)."""
        return look_up(self.marks[name], order)


@dataclass
class Kernel:
    """One layer's attention call, as `attention.kernel` methods see it. Slots have no order; the newest q are last."""

    layer: int
    layers: int
    phase: str
    query: Tensor  # (B, H, q, D)
    key: Tensor  # (B, Hkv, n, D)
    value: Tensor
    visible: Visible
    scaling: float
    softcap: float | None
    state: dict[str, Tensor]  # (B, Hkv or H, n) each, travels with the slots
    facts: dict[str, Any]  # lives as long as the prompt and what follows it
    marks: dict[str, Tensor]  # (B, L) by name and original position, see `Method.mark`
    rope: Rope | None  # where the method rotates
    query_positions: Tensor | None  # (B or 1, q) RoPE positions of the rows, where the method rotates
    key_positions: Tensor | None  # (B, Hkv, n) and of the slots, as stored
    plain: Callable[[], Tensor]  # the model's own attention
    capacity: Callable[[int | float], list[int] | None]  # tokens per sample that a budget allows, None for 1.0
    pairs: int | None = None  # query-key products per head that `attend` computed, samples of the batch alike

    @property
    def order(self) -> Tensor:
        """(B or 1, Hkv or 1, n): the original position of each slot's token, -1 on padding."""
        return self.visible.order_k

    @property
    def rows(self) -> Tensor:
        """(B or 1, q): the original position of each row's token, -1 on padding."""
        return self.visible.order_q

    @property
    def live(self) -> Tensor:
        """(B, Hkv, n) bool."""
        shape = self.key.shape[:3]
        if self.visible.live_k is None:
            return torch.ones(shape, dtype=torch.bool, device=self.key.device)
        return self.visible.live_k.expand(shape)

    def marked(self, name: str, order: Tensor) -> Tensor:
        """The number `name` of the tokens with these original positions (B or 1, ...), -1 where none: (B, ...)."""
        return look_up(self.marks[name], order)


@dataclass
class Read:
    """A one-row step of one layer, as `cache.read` methods see it."""

    layer: int
    layers: int
    query: Tensor  # (B, H, 1, D)
    key: Tensor  # (B, Hkv, n, D)
    live: Tensor | None  # (B, 1 or Hkv, n), None where all are
    scaling: float
    shared: dict[str, Any]  # lives for one step, across layers
    cache: SlotLayer

    def capacity(self, budget: int | float) -> list[int] | None:
        """Slots per sample that a budget allows (a share refers to the prompt); None for the share 1.0."""
        return self.cache.capacity(budget)

    def positions(self, index: Tensor, live: Tensor) -> Tensor:
        """Original positions (B, H, k) of slots index (B, H, k), -1 where not live."""
        assert self.cache.order is not None
        order = self.cache.order.expand(-1, self.key.shape[1], -1)
        return gather_heads(order, index).masked_fill(~live, -1)

    def slots_of(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Slots of this layer that hold these original positions (B, H, k), and where they are still held."""
        assert self.cache.order is not None
        B, H, k = positions.shape
        Hkv = self.key.shape[1]
        if self.cache.in_columns and self.live is None and self.cache.slots == self.cache.ledger.columns:
            return positions.clamp(min=0), positions >= 0
        sorted_order, at = self.cache.order.expand(B, Hkv, -1).sort(-1)
        wanted = positions.reshape(B, Hkv, -1)
        found = torch.searchsorted(sorted_order.contiguous(), wanted.contiguous()).clamp(max=sorted_order.shape[-1] - 1)
        held = (sorted_order.gather(-1, found) == wanted) & (wanted >= 0)
        index = at.gather(-1, found)
        if self.live is not None:
            held = held & self.live.expand(B, Hkv, -1).gather(-1, index)
        return index.view(B, H, k), held.view(B, H, k)


def gather_heads(x: Tensor, index: Tensor) -> Tensor:
    """x (B, Hkv, n) at index (B, H, k): each query head reads from its KV head."""
    B, H, k = index.shape
    return x.gather(2, index.reshape(B, x.shape[1], -1)).view(B, H, k)
