"""What methods that read a cache sparsely share: a layer's tokens in their order, whatever became of the slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seqwise.core.observe import take_slots
from seqwise.core.views import Kernel


@dataclass(frozen=True)
class Held:
    """Where the tokens of a layer are.

    slots: (B, V, n) by token, dead ones first, where they do not stand so already; V is 1 or the number of KV heads.
    dead: (B, V) slots in front that hold no token, None for none.
    """

    slots: Tensor | None
    dead: Tensor | None

    @classmethod
    def of(cls, order: Tensor, live: Tensor | None, in_columns: bool) -> Held:
        """order, live: (B or 1, 1 or Hkv, n), as a layer or `Visible` has them. Looks at the device unless no slot was
        ever evicted or padded."""
        if in_columns and live is None:
            return cls(None, None)
        if live is not None:
            order = torch.where(live, order, -1)
        dead = None if live is None else (order < 0).sum(-1)
        if bool((order[..., 1:] >= order[..., :-1]).all()):
            return cls(None, dead)
        return cls(order.argsort(dim=-1, stable=True), dead)

    def arrange(self, x: Tensor) -> Tensor:
        """x (B, Hkv, n, D) or (B, 1 or Hkv, n) by token."""
        if self.slots is None:
            return x
        if x.dim() == 3:
            heads = max(x.shape[1], self.slots.shape[1])
            return x.expand(self.slots.shape[0], heads, -1).gather(-1, self.slots.expand(-1, heads, -1))
        return take_slots(x, self.slots.expand(*x.shape[:2], -1))

    def slot(self, index: Tensor) -> Tensor:
        """Slots of the tokens index (B, H, k), counted from the first slot; query heads follow their KV head."""
        if self.slots is None:
            return index
        slots = self.slots.repeat_interleave(index.shape[1] // self.slots.shape[1], dim=1)
        return slots.gather(-1, index)


def by_sample(kernel: Kernel, attend: Callable[[Kernel, Tensor | None, int], Tensor]) -> Tensor:
    """What `attend(kernel, dead, sample)` gives for rows whose slots are by token, (B, H, q, D): once for the batch
    (sample 0), or for each sample where their lengths differ; then without its padding.

    dead: (B or 1, 1 or Hkv) slots in front that hold no token, None for none.
    """
    visible = kernel.visible
    held = Held.of(visible.order_k, visible.live_k, visible.offset is not None)
    if held.slots is not None:
        live = None if visible.live_k is None else held.arrange(visible.live_k)
        visible = replace(visible, order_k=held.arrange(visible.order_k), live_k=live, offset=None)
    ordered = replace(kernel, visible=visible, key=held.arrange(kernel.key), value=held.arrange(kernel.value))
    if held.dead is None and visible.live_q is None:
        out = attend(ordered, None, 0)
        kernel.pairs = ordered.pairs
        return out
    B, H, q, _ = kernel.query.shape
    out = kernel.value.new_zeros(B, H, q, kernel.value.shape[-1])
    kernel.pairs = 0
    for b in range(B):
        rows = torch.arange(q, device=out.device) if visible.live_q is None else visible.live_q[b].nonzero()[:, 0]
        if len(rows):
            alone, dead = _alone(ordered, b, rows)
            out[b, :, rows] = attend(alone, dead, b)[0]
            kernel.pairs = max(kernel.pairs, alone.pairs or 0)
    return out


def _alone(kernel: Kernel, b: int, rows: Tensor) -> tuple[Kernel, Tensor | None]:
    """Sample b with these rows, and the slots from its first token on."""
    visible = kernel.visible

    def own(x: Tensor) -> Tensor:
        return x if x.shape[0] == 1 else x[b : b + 1]

    dead, first = None, 0
    if visible.live_k is not None:
        dead = (~own(visible.live_k)).sum(-1)  # (1, V)
        first = int(dead.min())
        dead = dead - first if bool((dead > first).any()) else None
    rule = visible.rule
    seen = replace(
        visible,
        order_q=own(visible.order_q)[:, rows],
        order_k=own(visible.order_k)[..., first:],
        live_q=None,
        live_k=None if dead is None or visible.live_k is None else own(visible.live_k)[..., first:],
        offset=None,
        rule=None if rule is None else lambda order_q, order_k: own(rule(order_q, order_k)),
    )
    positions = kernel.query_positions
    return replace(
        kernel,
        query=kernel.query[b : b + 1].index_select(2, rows),
        key=kernel.key[b : b + 1, :, first:],
        value=kernel.value[b : b + 1, :, first:],
        visible=seen,
        query_positions=None if positions is None else own(positions)[:, rows],
    ), dead
