"""One attention call of one layer: what is seen, who computes it, and what becomes of the cache afterwards.

mask from slots -> an own kernel, a sparse read or the fused kernel -> rewrite -> retain, then store
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seqwise.core.caches import SlotLayer, View
from seqwise.core.ledger import Rows
from seqwise.core.method import Method
from seqwise.core.observe import (
    attention,
    attention_statistics,
    gathered_attention,
    masked_logits,
    normalised,
    probabilities,
)
from seqwise.core.segments import look_up
from seqwise.core.select import budget_count
from seqwise.core.views import Block, Kernel, Read
from seqwise.core.visible import Visible

if TYPE_CHECKING:
    from seqwise.core.engine import Engine

_REWRITE_ROWS = 128


class AttentionDriver:
    """Attention of an attached model, for all its decoder layers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def _visible(self, index: int, q: int, layer: SlotLayer | None, extra: Tensor | None = None) -> Visible:
        assert self.engine.ledger is not None
        rows = self.engine.ledger.rows[index]
        window = self.engine.anatomy.windows[index]
        masker, rule = self.engine.by_slot.get("mask"), None
        if masker is not None and self.engine.ledger.phase == "prefill" and self.engine.ledger.facts.get("marks"):
            rule = functools.partial(_rule, masker, self.engine.ledger.facts["marks"])
            self.engine.account.acted = True
        causal = rule is None or not masker.looks_ahead  # type: ignore[union-attr]
        if layer is None:
            live = None if rows.live is None else rows.live[:, None]
            return Visible(rows.order, rows.order[:, None], rows.live, live, causal, window, 0, extra, rule)
        assert layer.order is not None
        offset = layer.slots - q if layer.in_columns and self.engine.tree is None else None
        if self.engine.tree is not None:
            extra = torch.ones(1, 1, q, layer.slots, dtype=torch.bool, device=self.engine.tree.device)
            extra[..., layer.slots - q :] = self.engine.tree
        return Visible(rows.order, layer.order, rows.live, layer.live, causal, window, offset, extra, rule)

    def attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float,
        softcap: float | None, extra: Tensor | None, positions: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ledger = self.engine.ledger
        assert ledger is not None
        layer: SlotLayer | None = self.engine.cache.layers[index] if self.engine.cache is not None else None
        H, q, n = query.shape[1], query.shape[2], key.shape[2]
        visible = self._visible(index, q, layer, extra)
        retainer, storer = self.engine.by_slot.get("cache.retain"), self.engine.by_slot.get("cache.store")
        watching = [m for m in (retainer, storer) if m is not None and layer is not None]
        want = any(method.observes(ledger.phase) for method in watching) and self.engine.tree is None
        spans = ledger.rows[index].spans if n == q else None
        before = ledger.columns - q
        self.engine.account.plain_pairs += H * (q * before + q * (q + 1) // 2)
        row_probabilities = lse = None

        def own() -> Tensor:
            return attention(
                query, key, value, visible, scaling=scaling, softcap=softcap, dropout=dropout, spans=spans
            )[0]

        replaced = self._replaced(index, layer, query, key, value, scaling, softcap, visible, positions, own)
        chosen = None
        if replaced is None and q == 1 and "cache.read" in self.engine.by_slot and softcap is None:  # else all is read
            chosen = self._read(index, layer, query, key, scaling)
        if replaced is not None:
            out, pairs = replaced
            self.engine.account.pairs += H * (q * (n - q) + q * (q + 1) // 2 if pairs is None else pairs)
            self.engine.account.acted = True
        elif chosen is not None:
            out = gathered_attention(query, key, value, *chosen, scaling=scaling)
            self.engine.account.pairs += H * chosen[0].shape[-1]
            self.engine.account.acted = True
        else:
            self.engine.account.pairs += H * (q * (n - q) + q * (q + 1) // 2)
            if want and q == 1:
                row_probabilities = probabilities(query, key, visible, scaling=scaling, softcap=softcap)  # (B, H, 1, n)
                out = _weighted(row_probabilities, value)
            else:
                out, lse = attention(
                    query,
                    key,
                    value,
                    visible,
                    scaling=scaling,
                    softcap=softcap,
                    dropout=dropout,
                    spans=spans,
                    want_lse=want,
                )
        rewriter = self.engine.by_slot.get("attention.probs")
        if rewriter is not None:
            out = self._rewrite(rewriter, index, query, key, value, out, visible, layer, scaling, softcap, lse)
        if self.engine.stages is not None and index + 1 in self.engine.stages.layers and ledger.phase == "prefill":
            self.engine.stages.previous = (query, key, value, scaling, softcap)
        if layer is not None and watching:
            if self.engine.deferred is not None:
                self.engine.deferred[index] = (query, scaling, softcap)
            else:
                self.settle(index, layer, query, key, value, scaling, softcap, visible, lse, row_probabilities)
        if layer is not None and visible.window is not None and self.engine.tree is None:
            layer.forget_outside(visible.window)
        return out

    def _replaced(
        self, index: int, layer: SlotLayer | None, query: Tensor, key: Tensor, value: Tensor, scaling: float,
        softcap: float | None, visible: Visible, positions: Tensor | None, own: Callable[[], Tensor],
    ) -> tuple[Tensor, int | None] | None:  # fmt: skip
        """What an `attention.kernel` method makes of this call, and the pairs per head that it computed."""
        method, ledger = self.engine.by_slot.get("attention.kernel"), self.engine.ledger
        if method is None:
            return None
        assert ledger is not None
        state = layer.state if layer is not None else {}
        key_positions = None
        if self.engine.rope is not None:
            positions = (visible.order_q if positions is None else positions).float()  # (B or 1, q)
            B, Hkv, n, _ = key.shape
            q = query.shape[2]
            known = state.get("rope")
            key_positions = torch.zeros(B, Hkv, n, device=key.device) if known is None else known
            key_positions[..., n - q :] = positions[:, None]
            state["rope"] = key_positions

        def capacity(budget: int | float) -> list[int] | None:
            if layer is not None:
                return layer.capacity(budget)
            if isinstance(budget, int):
                return [budget] * ledger.batch
            return None if budget == 1.0 else [budget_count(budget, n) for n in ledger.base(index)]

        kernel = Kernel(
            index, len(self.engine.anatomy.layers), ledger.phase, query, key, value, visible, scaling, softcap, state,
            ledger.facts, ledger.facts.get("marks", {}), self.engine.rope, positions, key_positions, own,
            capacity,
        )  # fmt: skip
        out = method.attend(kernel)
        return None if out is None else (out, kernel.pairs)

    def _read(
        self, index: int, layer: SlotLayer | None, query: Tensor, key: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor] | None:
        assert self.engine.ledger is not None
        if self.engine.ledger.phase != "decode" or layer is None:
            return None
        read = Read(index, len(self.engine.anatomy.layers), query, key, layer.live, scaling, self.engine.shared, layer)
        return self.engine.by_slot["cache.read"].read(read)

    def settle(
        self, index: int, layer: SlotLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float,
        softcap: float | None, visible: Visible, lse: Tensor | None, row_probabilities: Tensor | None,
    ) -> None:  # fmt: skip
        """Retain, then store, on what the attention of these rows has shown."""
        ledger = layer.ledger
        final = ledger.expected_columns is None or ledger.columns >= ledger.expected_columns
        view = View(
            index,
            len(self.engine.anatomy.layers),
            layer,
            query,
            key,
            value,
            scaling,
            softcap,
            visible,
            lse,
            row_probabilities,
            final,
        )
        retainer, storer = self.engine.by_slot.get("cache.retain"), self.engine.by_slot.get("cache.store")
        if retainer is not None:
            kept = retainer.retain(view)
            if kept is not None:
                slots = layer.slots
                layer.keep(*kept)
                self.engine.account.acted = (
                    self.engine.account.acted or kept[0].shape[-1] < slots or layer.live is not None
                )
                if storer is not None:  # what the rows have shown still holds for the slots that are left
                    view.key, view.value = layer.read()
                    view.visible, view.row_probabilities = self._visible(index, query.shape[2], layer), None
        if storer is not None:
            chunks = storer.store(view)
            if chunks:
                layer.pack(chunks)
                self.engine.account.acted = True

    def settle_tree(self, path: Tensor, count: int) -> None:
        """A verified draft: only the accepted rows stay, then the methods see them as steps."""
        assert self.engine.ledger is not None and self.engine.cache is not None
        ledger = self.engine.ledger
        r = path.shape[0]
        self.engine.account.acted = True
        ledger.columns -= count - r
        ledger.step -= count - r
        assert ledger.length is not None
        ledger.length = ledger.length - (count - r)
        rows = Rows(ledger.length[:, None] - r + torch.arange(r, device=path.device))
        ledger.rows = [rows] * ledger.layers
        if ledger.last_position is not None:
            ledger.last_position = self.engine._last_before + r
        deferred, self.engine.deferred = self.engine.deferred or {}, None
        for index, layer in enumerate(self.engine.cache.layers):
            layer.accept(path, count - r)
            if index in deferred:
                query, scaling, softcap = deferred[index]
                key, value = layer.read()
                visible = self._visible(index, r, layer)
                self.settle(
                    index, layer, query.index_select(2, path), key, value, scaling, softcap, visible, None, None
                )

    def _rewrite(
        self, method: Method, index: int, query: Tensor, key: Tensor, value: Tensor, out: Tensor, visible: Visible,
        layer: SlotLayer | None, scaling: float, softcap: float | None, lse: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Replaces the chosen heads' output by rewritten probabilities times values, in blocks of rows."""
        heads = method.rewritten_heads(index, self.engine.anatomy)
        if not heads:
            return out
        ledger = self.engine.ledger
        assert ledger is not None and ledger.length is not None
        B, H, q, _ = query.shape
        g = H // key.shape[1]
        pick = torch.tensor(heads, device=query.device)
        chosen_q = query.index_select(1, pick)
        chosen_k = key.index_select(1, pick // g)
        chosen_v = value.index_select(1, pick // g)
        # each node of a draft is a step
        picked_rows = slice(None) if self.engine.tree is not None else method.rewritten_rows(q)
        rows = range(*picked_rows.indices(q))
        chosen_q, visible = chosen_q[:, :, rows.start : rows.stop], visible.take(slice(rows.start, rows.stop))
        lse = None if lse is None else lse[:, :, rows.start : rows.stop].index_select(1, pick)
        h, n = len(heads), key.shape[2]

        def per_head(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[1] == 1 else x.index_select(1, pick // g)

        order_k, live_k = per_head(visible.order_k), per_head(visible.live_k)
        assert order_k is not None
        own = replace(visible, order_k=order_k, live_k=live_k)

        def statistics(reduce: tuple[str, ...]) -> dict[str, Tensor]:
            return attention_statistics(
                chosen_q, chosen_k, visible=own, lse=lse, scaling=scaling, softcap=softcap,
                reduce=reduce,  # type: ignore[arg-type]
            )  # fmt: skip

        live = torch.ones(B, h, n, dtype=torch.bool, device=query.device) if live_k is None else live_k.expand(B, h, n)
        state = layer.state if layer is not None else {}
        block = Block(
            index, heads, ledger.phase, visible.order_q, order_k, live, ledger.length, state, H, statistics,
            torch.zeros(0), ledger.facts.get("marks", {}),
        )  # fmt: skip
        method.prepare(block)
        pieces = []
        for start in range(0, len(rows), _REWRITE_ROWS):
            stop = min(start + _REWRITE_ROWS, len(rows))
            part = own.take(slice(start, stop))
            block.logits = masked_logits(chosen_q[:, :, start:stop], chosen_k, part, scaling, softcap)
            block.rows = part.order_q
            own_p = normalised(block.logits)
            p = method.rewrite(own_p, block)
            self.engine.account.acted = self.engine.account.acted or p is not own_p
            pieces.append(p.to(value.dtype) @ chosen_v)
        if len(rows) == q:
            return out.index_copy(1, pick, torch.cat(pieces, 2))
        out = out.clone()
        out[:, pick, rows.start : rows.stop] = torch.cat(pieces, 2)
        return out


def _rule(masker: Method, marks: dict[str, Tensor], order_q: Tensor, order_k: Tensor) -> Tensor:
    """`Visible.rule` of a method: rows (B or 1, 1, r, 1) and slots (B or 1, h, 1, c) by original position."""

    def told(order: Tensor) -> dict[str, Tensor]:
        return {"order": order} | {name: look_up(table, order) for name, table in marks.items()}

    return masker.sees(told(order_q), told(order_k))


def _weighted(p: Tensor, value: Tensor) -> Tensor:
    """Probabilities (B, H, q, n) times values (B, Hkv, n, D), query heads grouped by KV head."""
    B, H, q, n = p.shape
    Hkv = value.shape[1]
    grouped = p.to(value.dtype).reshape(B, Hkv, -1, n) @ value  # (B, Hkv, g q, D)
    return grouped.reshape(B, H, q, value.shape[-1])
