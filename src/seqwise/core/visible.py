"""Which keys each query row may see, without an n x n mask.

A slot is seen when its token is not younger than the query's, is live, and lies inside the sliding window:

    seen(i, j) = order_k[j] <= order_q[i]  and  live_k[j]  and  order_q[i] - order_k[j] < window

`order` counts a sample's real tokens from 0 and is -1 on padding. A `rule` may hide more, or replace causality. Masks
exist only as tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visible:
    """Visibility of n slots to q query rows.

    order_q: (B or 1, q); order_k: (B or 1, Hkv or 1, n); live_q: (B or 1, q) or None (all live);
    live_k: (B or 1, Hkv or 1, n) or None. `offset` is set where slots are in column order and row i is column
    offset + i: tiles above the diagonal are then skipped. `extra` (B or 1, 1, q, n) is a further mask, True where seen.
    `rule` (order of the rows (B or 1, 1, r, 1), of the slots (B or 1, h, 1, c)) -> bool, broadcastable to (B, h, r, c),
    is one more; with `causal=False` it decides alone.
    """

    order_q: Tensor
    order_k: Tensor
    live_q: Tensor | None = None
    live_k: Tensor | None = None
    causal: bool = True
    window: int | None = None
    offset: int | None = None
    extra: Tensor | None = None
    rule: Callable[[Tensor, Tensor], Tensor] | None = None

    @classmethod
    def of(
        cls,
        rows: int,
        slots: int,
        *,
        causal: bool = True,
        padding: Tensor | None = None,
        mask: Tensor | None = None,
        window: int | None = None,
        device: torch.device | None = None,
    ) -> Visible:
        """Visibility of an ordinary call: the last `rows` of `slots` columns attend.

        padding: (B, slots), nonzero on real tokens. mask: (B or 1, 1, rows, slots), bool (True = seen) or additive.
        """
        if padding is None:
            order = torch.arange(slots, device=device)[None]  # (1, n)
            live = None
        else:
            live = padding.bool()
            order = torch.where(live, live.cumsum(-1) - 1, -1)  # (B, n)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask > torch.finfo(mask.dtype).min / 2
        return cls(
            order_q=order[:, slots - rows :],
            order_k=order[:, None],
            live_q=None if live is None else live[:, slots - rows :],
            live_k=None if live is None else live[:, None],
            causal=causal,
            window=window,
            offset=slots - rows,
            extra=mask,
        )

    @property
    def slots(self) -> int:
        return self.order_k.shape[-1]

    @property
    def rows(self) -> int:
        return self.order_q.shape[-1]

    def take(self, rows: Tensor | slice) -> Visible:
        """The same slots seen by some of the rows: a slice, (R,) or (B, R) indices."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.rows)
            offset = None if self.offset is None or step != 1 else self.offset + start
            pick = slice(start, stop, step)
            order_q = self.order_q[:, pick]
            live_q = None if self.live_q is None else self.live_q[:, pick]
            extra = None if self.extra is None else self.extra[:, :, pick]
        else:
            offset = None
            rows = rows if rows.dim() == 2 else rows[None]
            batch = max(rows.shape[0], self.order_q.shape[0], 1 if self.extra is None else self.extra.shape[0])
            rows = rows.expand(batch, -1)
            order_q = self.order_q.expand(batch, -1).gather(1, rows)
            live_q = None if self.live_q is None else self.live_q.expand(batch, -1).gather(1, rows)
            extra = self.extra
            if extra is not None:
                at = rows[:, None, :, None].expand(-1, 1, -1, extra.shape[-1])
                extra = extra.expand(batch, -1, -1, -1).gather(2, at)
        return replace(self, order_q=order_q, live_q=live_q, offset=offset, extra=extra)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Columns [low, high) outside of which rows start..stop see nothing for sure."""
        if self.offset is None or not self.causal:
            return 0, self.slots
        low = 0
        if self.window is not None and self.live_k is None:
            low = max(0, self.offset + start - self.window + 1)
        return low, min(self.slots, self.offset + stop)

    def open_until(self, start: int, stop: int, low: int, high: int) -> int:
        """The column in [low, high] before which rows start..stop see every live slot: no mask is needed there."""
        if self.offset is None or self.extra is not None or self.rule is not None:
            return low
        if self.window is not None and low < self.offset + stop - self.window:
            return low
        return max(low, min(high, self.offset + start + 1)) if self.causal else high

    def tile(self, start: int, stop: int, low: int, high: int, dead: bool = True) -> Tensor | None:
        """(B or 1, Hkv or 1, stop - start, high - low), True where seen; None where all is seen.

        `dead=False` leaves dead slots in, for callers that strike them out themselves.
        """
        parts: list[Tensor] = []
        q = self.order_q[:, None, start:stop, None]
        k = self.order_k[..., None, low:high]
        if self.causal and (self.offset is None or high > self.offset + start + 1):
            parts.append(k <= q)
        if self.window is not None and (self.offset is None or low < self.offset + stop - self.window):
            parts.append(q - k < self.window)
        if dead and self.live_k is not None:
            parts.append(self.live_k[..., None, low:high])
        if self.extra is not None:
            parts.append(self.extra[..., start:stop, low:high])
        if self.rule is not None:
            parts.append(self.rule(q, k))
        if not parts:
            return None
        seen = parts[0]
        for part in parts[1:]:
            seen = seen & part
        return seen
