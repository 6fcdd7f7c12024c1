"""What is known of a prompt's tokens: bound or inferred once for the whole prompt, then told row by row.

A prompt may come in chunks and a conversation in turns; methods see whole prompts: `place` and `mark` are asked once,
at a prompt's first rows, and what they say is kept by column (positions) or by original position (marks).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seqwise.core.errors import PromptError
from seqwise.core.ledger import Ledger, Rows
from seqwise.core.method import Method
from seqwise.core.segments import Segments, by_order

if TYPE_CHECKING:
    from seqwise.core.engine import Engine

_FACTS = {  # what a method can ask of a prompt -> how to give it
    "set": "a set of pieces; build the prompt with seqwise.prepare (a part of type 'set') and run.bind(segments)",
    "part": "context and question apart; build the prompt with seqwise.prepare (parts 'context' and 'question') and "
    "run.bind(segments)",
    "box": "set members with a box; build the prompt with seqwise.prepare (items with 'box') and run.bind(segments)",
}


class PromptFacts:
    """Facts of the prompts of one run."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.bound: Segments | None = None  # by the user, for the next prompt

    def take_bound(self, batch: int) -> Segments | None:
        """The bound facts, for a batch of so many (copies of) samples, once."""
        bound, self.bound = self.bound, None
        return None if bound is None else bound.repeat(batch // bound.type.shape[0])

    def require(self, segments: Segments | None) -> None:
        """Refuses a prompt without the facts that a method needs."""
        for part in self.engine.run.method.parts:
            for fact in sorted(part.facts()):
                if segments is None or not segments.has(fact):
                    raise PromptError(f"{part} needs {_FACTS[fact]}")

    def of_rows(self, ledger: Ledger, rows: Rows, q: int, mask: Tensor | None) -> Segments | None:
        """Facts of this forward's tokens; those of the whole prompt are read when its first rows come."""
        at = ledger.columns - q - ledger.whole_at
        if ledger.whole is None or not 0 <= at < ledger.whole.type.shape[1]:
            start, at = ledger.columns - q, 0
            ids, announced = self.engine.input_ids, self.engine.run.announced
            columns = q
            if announced is not None and announced.columns > ledger.columns:
                columns, mask = announced.columns - start, announced.mask
                ids = None if announced.ids is None else announced.ids[:, start:]
                if ids is not None:
                    ids = ids.repeat_interleave(ledger.batch // ids.shape[0], 0).to(rows.order.device)
                if mask is not None:
                    mask = mask.repeat_interleave(ledger.batch // mask.shape[0], 0).to(rows.order.device)
            whole = self.take_bound(ledger.batch)
            if whole is None and ids is not None and ids.shape[1] == columns:
                vision = self.engine.anatomy.vision
                tokens, grid = (None, None) if vision is None else (vision.tokens, vision.grid)
                whole = Segments.infer(ids, None if mask is None else mask[:, -columns:], tokens or None, grid)
            if ledger.fresh:
                self.require(whole)
            if whole is not None and whole.type.shape[1] != columns:
                raise PromptError(f"segments must cover the prompt's {columns} tokens, got {whole.type.shape[1]}")
            if whole is None and ("layer.rows" in self.engine.by_slot or self.engine.placer is not None):
                raise PromptError(
                    "the prompt's token types are unknown (it came as embeddings); bind them: run.bind(segments)"
                )
            if whole is not None and whole.has("set"):  # a later turn's sets are others
                before = ledger.facts.get("sets", 0)
                whole = replace(whole, set=torch.where(whole.set >= 0, whole.set + before, -1))
                ledger.facts["sets"] = int(whole.set.max()) + 1
            ledger.whole, ledger.whole_at, ledger.places = whole, start, None
            if whole is not None:
                self._mark(ledger, rows, whole)
        if ledger.whole is None:
            return None
        return ledger.whole if q == ledger.whole.type.shape[1] else ledger.whole.columns(at, at + q)

    def _mark(self, ledger: Ledger, rows: Rows, whole: Segments) -> None:
        """What methods mark the whole prompt's tokens with, from now on told by original position."""
        marks: dict[str, Tensor] = ledger.facts.setdefault("marks", {})
        assert ledger.length is not None
        before = ledger.length - (rows.count if rows.live is None else rows.live.sum(-1))  # (B,)
        order = torch.where(whole.real, before[:, None] + whole.real.cumsum(-1) - 1, -1)  # (B, W)
        for part in self.engine.run.method.parts:
            if not {"mask", "attention.kernel", "attention.probs"} & set(part.slots):
                continue
            for name, value in part.mark(whole, self.engine.run).items():
                table, old = by_order(value, order), marks.get(name)
                if old is not None:  # an earlier turn's
                    held = table[:, : old.shape[1] - 1]
                    table[:, : old.shape[1] - 1] = torch.where(held == -1, old[:, :-1], held)
                marks[name] = table

    def places(self, placer: Method, ledger: Ledger, q: int) -> Tensor:
        """(B, rows) positions of this forward's tokens; those of the whole prompt are asked for at its first rows."""
        assert ledger.whole is not None and self.engine.segments is not None
        if ledger.places is None:
            # rows that a reducer dropped have no place; such a prompt comes in one piece
            whole = self.engine.segments if ledger.whole.type.shape[1] == q else ledger.whole
            places = placer.place(whole, self.engine.anatomy)
            if places is None or not places.is_floating_point():
                got = None if places is None else places.dtype
                raise TypeError(f"{placer}.place must return float positions, got {got}")
            if ledger.last_position is not None:  # a later turn goes on behind the earlier ones
                places = places + ledger.last_position[:, None] + 1
            ledger.places = places
            ledger.last_position = places.masked_fill(~whole.real, float("-inf")).amax(-1).ceil()
            if q == ledger.whole.type.shape[1]:
                return places
        at = ledger.columns - q - ledger.whole_at
        return ledger.places[:, at : at + q]
