"""The one cache layer: slots that can be evicted, packed and sparsely read; positions survive all of it.

A layer holds packed chunks first and a full-precision tail after them. Per slot it knows the original token (`order`),
whether it is live, and whatever a method remembers (`state`); all of these move together. The order of slots carries no
meaning: the engine's attention function builds its masks from `order`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from seqwise.core.errors import CacheError
from seqwise.core.ledger import Ledger
from seqwise.core.observe import probabilities, received, take_slots
from seqwise.core.packed import Packed, storage_bytes
from seqwise.core.select import budget_count, compact, keep_all_but_one, keep_top

Kept: TypeAlias = "tuple[Tensor, Tensor | None]"  # slots (B, Hkv, k) and which of them are no padding, None for all
_SPARE = 16  # one slot in so many is allocated ahead, so that a step does not copy the whole cache


@dataclass(frozen=True)
class Chunk:
    """Packed keys and values of slots `index` (B, Hkv, m) of the tail; `live` (B, Hkv, m) is False on padding."""

    keys: Packed
    values: Packed
    index: Tensor
    live: Tensor

    @property
    def count(self) -> int:
        return self.keys.codes.shape[2]


@dataclass
class Stored:
    """A chunk inside the layer."""

    keys: Packed
    values: Packed

    @property
    def count(self) -> int:
        return self.keys.codes.shape[2]


class SlotLayer(CacheLayerMixin):
    """One decoder layer's slots, as transformers' cache layer."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, ledger: Ledger, index: int) -> None:
        super().__init__()
        self.ledger = ledger
        self.index = index
        self.chunks: list[Stored] = []
        self.order: Tensor | None = None  # (B, 1 or Hkv, n)
        self.live: Tensor | None = None  # (B, 1 or Hkv, n), None while all are live
        self.state: dict[str, Tensor] = {}  # name -> (B, Hkv or H, n)
        self.in_columns = True  # slots are the columns seen so far, in order
        self.columns = 0  # that went through this layer; the ledger's also count a forward that is under way
        self.tail = 0  # full-precision slots in use
        self.unpacked_rows = 0  # rows appended since the last packing, whatever became of them
        self.dead = 0  # slots per head known to be dead and not yet compacted
        self.shrank = False  # the last forward evicted: the next one fills what that left
        self.attached = True

    # transformers' side

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[-1])
        self.values = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.attached:
            raise CacheError("this cache was filled under a method; continue inside `with method.on(model)`")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.append(key_states, value_states)
        return self.read()

    def get_seq_length(self) -> int:
        """Columns this layer has seen, not slots held: positions go on counting."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.__init__(Ledger(self.ledger.batch, self.ledger.layers, self.ledger.method), self.index)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    # slots

    @property
    def packed(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    @property
    def slots(self) -> int:
        return self.packed + self.tail

    def append(self, k: Tensor, v: Tensor) -> None:
        """New rows (B, Hkv, q, D) with the order and validity the ledger gives them."""
        rows = self.ledger.rows[self.index]
        q = k.shape[2]
        before, total = self.slots, self.slots + q
        self.keys = _grown(self.keys, self.tail, k, not self.shrank)
        self.values = _grown(self.values, self.tail, v, not self.shrank)
        self.shrank = False
        self.tail += q
        self.columns = self.ledger.columns
        self.unpacked_rows += q
        B = k.shape[0]
        order = rows.order[:, None].expand(B, -1, -1)
        self.order = order if self.order is None else _joined(self.order, order)
        if rows.live is not None or self.live is not None:
            old = self.live
            if old is None:
                old = torch.ones(B, 1, before, dtype=torch.bool, device=k.device)
            new = rows.live
            if new is None:
                new = torch.ones(B, q, dtype=torch.bool, device=k.device)
            self.live = _joined(old, new[:, None].expand(B, -1, -1))
        for name, value in self.state.items():
            self.state[name] = torch.nn.functional.pad(value, (0, total - value.shape[-1]))
        self.ledger.weigh(self.index, self.nbytes)

    def read(self) -> tuple[Tensor, Tensor]:
        """All slots in full precision: (B, Hkv, n, D) each."""
        keys, values = self.keys[:, :, : self.tail], self.values[:, :, : self.tail]
        if not self.chunks:
            return keys, values
        return (
            torch.cat([*(chunk.keys.dequantize(self.dtype) for chunk in self.chunks), keys], 2),
            torch.cat([*(chunk.values.dequantize(self.dtype) for chunk in self.chunks), values], 2),
        )

    def live_mask(self) -> Tensor:
        """(B, Hkv, n) bool."""
        shape = (self.keys.shape[0], self.keys.shape[1], self.slots)
        if self.live is None:
            return torch.ones(shape, dtype=torch.bool, device=self.keys.device)
        return self.live.expand(shape)

    def keep(self, index: Tensor, live: Tensor | None) -> None:
        """Evicts all slots but index (B, Hkv, k); `live` (B, Hkv, k) is False on padding."""
        if self.chunks:
            self._mark(index, live)
        elif live is None and index.shape[-1] == self.tail - 1 and not self.keys.requires_grad:
            self._fill_hole(index)
        else:
            self.keys = take_slots(self.keys[:, :, : self.tail], index)
            self.values = take_slots(self.values[:, :, : self.tail], index)
            self.tail = index.shape[-1]
            self._gather_facts(index, live)
        self.shrank = True
        self.ledger.weigh(self.index, self.nbytes)

    def _fill_hole(self, index: Tensor) -> None:
        """Evicts the one slot per head that index (B, Hkv, n - 1) leaves out: the newest slot takes its place, so that
        a step moves one slot and not the cache."""
        k = self.tail - 1
        at = torch.arange(k, device=index.device)
        hole = (index == at).sum(-1, keepdim=True)  # ascending: what comes before the hole stands in its own place
        into = hole[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        self.keys.scatter_(2, into, self.keys[:, :, k : k + 1].clone())
        into = hole[..., None].expand(-1, -1, -1, self.values.shape[-1])
        self.values.scatter_(2, into, self.values[:, :, k : k + 1].clone())
        self.tail = k
        self._gather_facts(torch.where(at == hole, k, at), None)

    def forget_outside(self, window: int) -> None:
        """Drops slots that no later row can see through a sliding window, a few at a time."""
        if self.slots <= window - 1 + (window // 16 if self.ledger.phase == "decode" else 0):
            return
        assert self.order is not None
        live = self.live_mask()
        self.keep(*keep_top(self.order.float().expand_as(live), live, [window - 1] * live.shape[0]))

    def _mark(self, index: Tensor, live: Tensor | None) -> None:
        """Packed slots die in place and are compacted once an eighth is dead: a compaction reads the device."""
        n = self.slots
        kept = torch.zeros(*index.shape[:2], n, dtype=torch.bool, device=index.device)
        if live is not None:
            # padding may point at a kept slot: write True only, by scattering to a spare column
            index = torch.where(live, index, n)
            kept = torch.nn.functional.pad(kept, (0, 1)).scatter(-1, index, True)[..., :n]
        else:
            kept = kept.scatter(-1, index, True)
        self.live = self.live_mask() & kept
        self.in_columns = False
        self.dead = n - index.shape[-1]
        if self.dead * 8 >= n:
            self.compact()

    def compact(self) -> None:
        """Drops dead slots from storage, chunk by chunk."""
        live = self.live_mask()
        at, indices, lives, chunks = 0, [], [], []
        for chunk in self.chunks:
            index, alive = compact(live[..., at : at + chunk.count])
            if index.shape[-1]:
                chunks.append(Stored(chunk.keys.gather(index), chunk.values.gather(index)))
                indices.append(index + at)
                lives.append(alive)
            at += chunk.count
        index, alive = compact(live[..., at:])
        self.keys = take_slots(self.keys[:, :, : self.tail], index)
        self.values = take_slots(self.values[:, :, : self.tail], index)
        self.chunks, self.tail, self.dead = chunks, index.shape[-1], 0
        self._gather_facts(torch.cat([*indices, index + at], -1), torch.cat([*lives, alive], -1))

    def _gather_facts(self, index: Tensor, live: Tensor | None) -> None:
        """order, live and state of the slots that stay, after keys and values have been moved."""
        B, Hkv, _ = index.shape
        assert self.order is not None
        self.order = self.order.expand(B, Hkv, -1).gather(-1, index)
        if self.live is not None or live is not None:
            old = index.new_ones(index.shape, dtype=torch.bool)
            if self.live is not None:
                old = self.live.expand(B, Hkv, -1).gather(-1, index)
            self.live = old if live is None else old & live
            self.order = self.order.masked_fill(~self.live, -1)
            self.ledger.padded = True
        self.state = {name: gather_state(value, index) for name, value in self.state.items()}
        self.in_columns = False

    def pack(self, chunks: Sequence[Chunk]) -> None:
        """Replaces the full-precision tail by packed chunks, which must cover its live slots."""
        if not chunks:
            return
        index = torch.cat([chunk.index for chunk in chunks], -1)
        live = torch.cat([chunk.live for chunk in chunks], -1)
        front = torch.arange(self.packed, device=index.device).expand(*index.shape[:2], -1)
        everything = torch.cat([front, index + self.packed], -1)
        alive = torch.cat([torch.ones_like(front, dtype=torch.bool), live], -1)
        padded = not bool(live.all())
        self._gather_facts(everything, alive if padded else None)
        self.chunks += [Stored(chunk.keys, chunk.values) for chunk in chunks]
        self.keys, self.values = self.keys[:, :, :0].clone(), self.values[:, :, :0].clone()
        self.tail = self.unpacked_rows = 0
        self.ledger.weigh(self.index, self.nbytes)

    def accept(self, path: Tensor, rejected: int) -> None:
        """Of the last `rejected + r` rows (a draft tree), keeps the accepted ones: path (r,), counted from 0."""
        start = self.tail - rejected - path.shape[0]
        index = torch.cat([torch.arange(start, device=path.device), start + path])
        at = torch.cat([torch.arange(self.packed + start, device=path.device), self.packed + start + path])
        self.keys = self.keys.index_select(2, index)
        self.values = self.values.index_select(2, index)
        assert self.order is not None
        self.order = self.order.index_select(-1, at)
        self.live = None if self.live is None else self.live.index_select(-1, at)
        self.state = {name: value.index_select(-1, at) for name, value in self.state.items()}
        self.tail = index.shape[0]
        self.unpacked_rows -= rejected
        self.columns = self.ledger.columns

    def select(self, batch: Tensor) -> None:
        """Samples `batch` of the batch axis."""
        if not self.is_initialized:
            return
        at = batch.to(self.device)
        self.keys, self.values = self.keys.index_select(0, at), self.values.index_select(0, at)
        self.chunks = [Stored(c.keys.select(at), c.values.select(at)) for c in self.chunks]
        self.order = None if self.order is None else self.order.index_select(0, at)
        self.live = None if self.live is None else self.live.index_select(0, at)
        self.state = {name: value.index_select(0, at) for name, value in self.state.items()}
        if self.index == 0:
            self.ledger.select(batch)

    def capacity(self, budget: int | float) -> list[int] | None:
        """Slots per sample that a budget allows; None where it drops nothing (the share 1.0)."""
        if isinstance(budget, int):
            return [budget] * self.ledger.batch
        if budget == 1.0:
            return None
        return [budget_count(budget, length) for length in self.ledger.base(self.index)]

    # accounts

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in storage, spare and dead slots included."""
        if not self.is_initialized:
            return 0
        return storage_bytes([self.keys, self.values, *self._packed_tensors()])

    def _packed_tensors(self) -> list[Tensor]:
        return [x for chunk in self.chunks for x in (*chunk.keys.tensors, *chunk.values.tensors)]

    def live_bytes(self) -> int:
        """Bytes that live slots alone would take."""
        if not self.is_initialized:
            return 0
        share = float(self.live_mask().float().mean()) if self.slots else 0.0
        packed = storage_bytes(self._packed_tensors())
        token = self.keys.shape[-1] * self.keys.element_size() + self.values.shape[-1] * self.values.element_size()
        return round(share * (packed + self.keys.shape[0] * self.keys.shape[1] * self.tail * token))

    def kept(self) -> list[list[list[int]]]:
        """Original positions held, per sample and KV head, ascending."""
        if not self.is_initialized or self.order is None:
            return []
        live = self.live_mask()
        order = self.order.expand_as(live)
        return [[sorted(order[b, h][live[b, h]].tolist()) for h in range(live.shape[1])] for b in range(live.shape[0])]


def _grown(buffer: Tensor, used: int, new: Tensor, ahead: bool) -> Tensor:
    """`buffer` with `new` written behind its first `used` slots, reallocated when full; `ahead`: with a spare."""
    total = used + new.shape[2]
    if buffer.shape[2] < total or buffer.untyped_storage().nbytes() != buffer.numel() * buffer.element_size():
        spare = max(4, total // _SPARE) if used and ahead else 0
        larger = buffer.new_empty(*buffer.shape[:2], total + spare, buffer.shape[-1])
        larger[:, :, :used] = buffer[:, :, :used]
        buffer = larger
    buffer[:, :, used:total] = new
    return buffer


def _joined(old: Tensor, new: Tensor) -> Tensor:
    heads = max(old.shape[1], new.shape[1])
    return torch.cat([old.expand(-1, heads, -1), new.expand(-1, heads, -1)], -1)


def gather_state(value: Tensor, index: Tensor) -> Tensor:
    """State (B, Hkv or H, n) at index (B, Hkv, k): query heads follow their KV head."""
    groups = value.shape[1] // index.shape[1]
    return value.gather(-1, index if groups == 1 else index.repeat_interleave(groups, dim=1))


@dataclass
class View:
    """One layer right after its attention, as a retain or store policy sees it."""

    layer: int
    layers: int
    cache: SlotLayer
    query: Tensor  # (B, H, q, D)
    key: Tensor  # (B, Hkv, n, D), all slots, the newest q last
    value: Tensor
    scaling: float
    softcap: float | None
    visible: Any
    lse: Tensor | None
    row_probabilities: Tensor | None  # (B, H, q, n) where the engine has them anyway (few rows)
    final: bool  # the prompt is complete with this forward, as far as known

    @property
    def ledger(self) -> Ledger:
        return self.cache.ledger

    @property
    def phase(self) -> str:
        return self.ledger.phase

    @property
    def new(self) -> int:
        """Rows of this forward."""
        return self.query.shape[2]

    @property
    def step(self) -> int:
        """Decode rows so far, this forward's included."""
        return self.ledger.step

    @property
    def slots(self) -> int:
        return self.key.shape[2]

    @property
    def state(self) -> dict[str, Tensor]:
        """Per-slot tensors (B, Hkv or H, n) that travel with the slots; new slots enter as 0."""
        return self.cache.state

    @property
    def order(self) -> Tensor:
        """(B, 1 or Hkv, n): the original position of each slot's token, -1 on padding."""
        assert self.cache.order is not None
        return self.cache.order

    @property
    def live(self) -> Tensor:
        """(B, Hkv, n) bool."""
        return self.cache.live_mask()

    @property
    def newest(self) -> Tensor:
        """(B, 1, 1): the original position of the newest real token."""
        assert self.ledger.length is not None
        return (self.ledger.length - 1)[:, None, None]

    def received(self, *, heads: str = "kv", **options: Any) -> Tensor:
        """`observe.received` of this layer's rows: fp32 (B, Hkv or H, n); no options beyond weight, rows, reduce."""
        if (
            self.row_probabilities is not None
            and set(options) <= {"weight", "reduce"}
            and options.get("reduce", "sum") == "sum"
        ):
            p = self.row_probabilities  # (B, H, q, n)
            weight = options.get("weight")
            if weight is not None:
                p = p * (weight if weight.dim() == 2 else weight[None])[:, None, :, None]
            total = p.sum(2)
            return total.unflatten(1, (self.key.shape[1], -1)).sum(2) if heads == "kv" else total
        return received(
            self.query, self.key, visible=self.visible, heads=heads, lse=self.lse,  # type: ignore[arg-type]
            scaling=self.scaling, softcap=self.softcap, **options,
        )  # fmt: skip

    def capacity(self, budget: int | float) -> list[int] | None:
        """Slots per sample that a budget allows; None where it drops nothing (the share 1.0)."""
        return self.cache.capacity(budget)

    def probabilities(self) -> Tensor:
        """Dense fp32 probabilities (B, H, q, n) of this forward's rows: for few rows (steps), never for prompts."""
        if self.row_probabilities is None:
            self.row_probabilities = probabilities(
                self.query, self.key, self.visible, scaling=self.scaling, softcap=self.softcap
            )
        return self.row_probabilities

    def keep(
        self,
        score: Tensor,
        capacity: list[int] | None,
        *,
        recent: int = 0,
        protected: Tensor | None = None,
        prefer: str = "earlier",
    ) -> Kept | None:
        """The `capacity` best slots by score (B, Hkv, n) and always the `recent` newest tokens; None if all fit."""
        if capacity is None or self.slots <= min(capacity):
            return None
        if recent:
            spare = torch.tensor([min(recent, count) for count in capacity], device=score.device)[:, None, None]
            young = (self.order > self.newest - spare).expand_as(score)
            protected = young if protected is None else protected.expand_as(score) | young
        counts = [min(c, self.slots) for c in capacity]
        options: dict[str, Any] = {"protected": protected, "prefer": prefer}
        full = self.cache.live is None and len(set(counts)) == 1  # no padding comes in
        if full and counts[0] == self.slots - 1:
            return keep_all_but_one(score, **options), None
        index, live = keep_top(score, self.live, counts, **options)
        return index, None if full else live
