"""Which original token each surviving row and slot is.

A prompt's real tokens are counted from 0 per sample (padding is -1): this `order` never changes, however many rows
disappear in the vision tower, at the language model's input or between its layers. It drives causality, sliding
windows and reports; RoPE positions are separate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from seqwise.core.segments import Segments

Phase = Literal["prefill", "decode"]


@dataclass
class Rows:
    """The rows that one forward carries at some depth.

    order: (B, r) int64, -1 on padding. live: (B, r) or None where all are real. spans: per sample the [start, stop) of
    its real rows, if they are contiguous, on the host. offset: the column of the first row in the layer's cache.
    """

    order: Tensor
    live: Tensor | None = None
    spans: list[tuple[int, int]] | None = None

    @property
    def count(self) -> int:
        return self.order.shape[1]

    def lengths(self, batch: int) -> list[int]:
        """Real rows per sample, on the host."""
        if self.spans is not None:
            return [stop - start for start, stop in self.spans]
        if self.live is not None:
            return self.live.sum(-1).tolist()
        return [self.count] * batch

    def gather(self, index: Tensor, live: Tensor) -> Rows:
        """Survivors (B, k): padding in front, as `select.compact` lays them out."""
        order = self.order.expand(index.shape[0], -1).gather(1, index).masked_fill(~live, -1)
        counts = live.sum(-1).tolist()
        width = index.shape[1]
        if min(counts) == width:
            return Rows(order)
        return Rows(order, live, [(width - count, width) for count in counts])


@dataclass
class Ledger:
    """The life of one prompt and of what was generated after it; lives in the cache."""

    batch: int
    layers: int
    method: str  # whose slots these are
    phase: Phase = "prefill"
    step: int = 0  # decode rows so far
    columns: int = 0  # columns the model has seen, padding included
    prompt_columns: int = 0  # of these, the prompt's
    length: Tensor | None = None  # (B,) real tokens seen
    rows: list[Rows] = field(default_factory=list)  # of the current forward, per layer
    entered: list[list[int]] = field(default_factory=list)  # real prompt rows that reached each layer, per sample
    padded: bool = False
    expected: list[int] | None = None  # real tokens of the whole prompt, where generate told them
    expected_columns: int | None = None
    # stage -> per sample, original positions that stayed; None where the sample lost nothing there
    kept: dict[str, list[list[int] | None]] = field(default_factory=dict)
    members: dict[str, list[dict[int, list[int]]]] = field(default_factory=dict)  # likewise, who was merged into it
    shift: dict[int, Tensor] = field(default_factory=dict)  # first layer -> (B,) renumbered positions to take off
    # what is remembered for this prompt: tensors (B, ...), tuples and dicts of them, or objects whose `select(batch)`
    # reorders their samples
    facts: dict[str, Any] = field(default_factory=dict)
    fresh: bool = True
    last_position: Tensor | None = None  # (B,) of the newest token, where a method set positions
    ids: Tensor | None = None  # (B, columns) of the prompt, where it came as ids
    whole: Segments | None = None  # facts of the prompt under way, all of its columns
    whole_at: int = 0  # the column where it begins
    places: Tensor | None = None  # (B, columns of it) positions that a method gave it
    bytes: dict[int, int] = field(default_factory=dict)  # per layer, now
    peak_bytes: int = 0

    def weigh(self, layer: int, nbytes: int) -> None:
        """Notes what a layer's cache takes now."""
        self.bytes[layer] = nbytes
        self.peak_bytes = max(self.peak_bytes, sum(self.bytes.values()))

    def begin(self, mask: Tensor | None, count: int, device: torch.device, depth: Tensor | None = None) -> Rows:
        """Enters `count` new columns. mask: the 2-D mask of all columns, or None. depth: (count,) of the nodes of a
        draft tree, whose rows are no sequence. Returns the rows of layer 0."""
        self.fresh = self.columns == 0
        if self.length is None:
            self.length = torch.zeros(self.batch, dtype=torch.long, device=device)
        live = None if mask is None else mask[:, -count:].bool()
        spans = None
        if depth is not None:
            live = None
        elif live is not None and (count > 1 or self.fresh):
            if bool(live.all()):
                live = None
            else:
                self.padded = True
                spans = _contiguous(live)
        elif not self.padded:
            live = None  # one-row steps of an unpadded prompt: no look at the device
        if live is None:
            steps = torch.arange(count, device=device) if depth is None else depth
            new = steps[None] + self.length[:, None]
            self.length = self.length + count
        else:
            new = torch.where(live, self.length[:, None] + live.cumsum(-1) - 1, -1)
            self.length = self.length + live.sum(-1)
        self.columns += count
        rows = Rows(new, live, spans)
        self.rows = [rows] * self.layers
        if self.phase == "decode":
            self.step += count
        return rows

    def enter(self) -> None:
        """Counts the rows that reached each layer, once their cuts are known: called at the end of a prompt forward."""
        counts = [rows.lengths(self.batch) for rows in self.rows]
        if not self.entered:
            self.entered = counts
        else:
            self.entered = [
                [a + b for a, b in zip(old, new, strict=True)] for old, new in zip(self.entered, counts, strict=True)
            ]

    def stages(self) -> dict[str, float]:
        """Real rows of the prompt that came ("prompt"), and that were left behind each stage; means over samples."""
        if self.whole is None or (self.phase == "prefill" and not self.entered):
            return {}
        rows = self.whole.real.sum(-1).tolist()
        found = {"prompt": sum(rows) / len(rows)}
        for name, kept in self.kept.items():
            rows = [n if left is None else len(left) for n, left in zip(rows, kept, strict=False)]
            found[name] = sum(rows) / len(rows)
        return found

    def base(self, layer: int) -> list[int]:
        """Real prompt tokens per sample that a share of this layer's cache refers to."""
        if self.expected is not None:
            return self.expected
        current = self.rows[layer].lengths(self.batch) if self.phase == "prefill" else [0] * self.batch
        before = self.entered[layer] if self.entered else [0] * self.batch
        return [a + b for a, b in zip(before, current, strict=True)]

    def cut(self, layer: int, index: Tensor, live: Tensor) -> None:
        """Layers from `layer` on carry only rows index (B, k)."""
        rows = self.rows[layer].gather(index, live)
        self.padded = self.padded or rows.live is not None
        self.rows[layer:] = [rows] * (self.layers - layer)

    def note_members(self, stage: str, order: Tensor, keep: Tensor, member: Tensor | None) -> None:
        """Which original positions each surviving row stands for, where rows were merged.

        order, keep: (B, r) of the rows before the cut. member: (B, r) index of the row that each went into, -1: none.
        """
        if member is None:
            return
        noted = []
        for positions, stays, into in zip(order.tolist(), keep.tolist(), member.tolist(), strict=True):
            groups: dict[int, list[int]] = {p: [] for p, stay in zip(positions, stays, strict=True) if stay and p >= 0}
            for position, target in zip(positions, into, strict=True):
                if target >= 0 and stays[target]:
                    groups[positions[target]].append(position)
            noted.append({p: sorted(group) for p, group in groups.items() if group})
        self.members[stage] = noted

    def select(self, batch: Tensor) -> None:
        """Samples `batch` (beam search, repetition)."""
        at = batch.tolist()
        if self.length is not None:
            self.length = self.length.index_select(0, batch.to(self.length.device))
        self.batch = len(at)
        self.entered = [[counts[i] for i in at] for counts in self.entered]
        self.kept = {stage: [kept[i] for i in at] for stage, kept in self.kept.items()}
        self.members = {stage: [noted[i] for i in at] for stage, noted in self.members.items()}
        self.shift = {layer: shift.index_select(0, batch.to(shift.device)) for layer, shift in self.shift.items()}
        self.facts = {name: _selected(value, batch) for name, value in self.facts.items()}
        if self.expected is not None:
            self.expected = [self.expected[i] for i in at]
        if self.ids is not None:
            self.ids = self.ids.index_select(0, batch.to(self.ids.device))
        if self.last_position is not None:
            self.last_position = self.last_position.index_select(0, batch.to(self.last_position.device))


def _selected(value: Any, batch: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(0, batch.to(value.device))
    if isinstance(value, tuple):
        return tuple(_selected(item, batch) for item in value)
    if isinstance(value, dict):
        return {name: _selected(item, batch) for name, item in value.items()}
    if hasattr(value, "select"):
        value.select(batch)
    return value


def _contiguous(live: Tensor) -> list[tuple[int, int]] | None:
    """[start, stop) of the real rows of each sample, or None where they have holes."""
    spans = []
    for row in live.tolist():
        count = sum(row)
        start = row.index(True) if count else 0
        if not all(row[start : start + count]):
            return None
        spans.append((start, start + count))
    return spans
