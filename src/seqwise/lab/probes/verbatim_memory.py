"""Does a model retrieve the words of a list it has read, and their order?

    texts      a list of nouns, a sentence, and the list again (Repeated), reordered (Permuted), or another one (Novel)
    value      R = surprisal of the second list over that of the first, per text, without the first word of each
    summary    median over texts with its BCa bootstrap interval; note: median absolute deviation
    order      per text R(Permuted) - R(Repeated); words: R(Novel) - R(Repeated)

Without data of your own: 23 lists of ten nouns in all their rotations, a different list first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seqwise.core.errors import UsageError
from seqwise.insight.probe.verbatim_memory import (
    CONDITIONS,
    LIST1,
    LIST2,
    Trial,
    VerbatimMemory,
    bca_median,
    list_surprisals,
    mad,
    repeat_surprisal,
    story,
    trials_of,
)
from seqwise.lab.probes.base import Probe, Progress, Result, Row, Settings, Verdict
from seqwise.lab.probes.lines import Line, read_lines
from seqwise.lab.rows import PLAIN

ITEMS = 16
BLOCK = 4  # texts measured at once, in three conditions each
REPEATED, PERMUTED, NOVEL = CONDITIONS
WORDS_AND_ORDER = "retrieves words and order"
WORDS = "retrieves words, no order found"
NOTHING = "no retrieval found at this size"
NO_NOVEL = "no comparison: no list has a novel one"
FORM = '{"words": [...]}, with "preface" and "between" of your own'


class VerbatimMemoryProbe(Probe):
    name: ClassVar[str] = "verbatim-memory"
    asks: ClassVar[str] = "Does a list of nouns surprise less when it is read again, and does its order count?"
    reading: ClassVar[str] = (
        "100 %: the second list is as surprising as the first. Repeated far below 100 %: its words are retrieved. "
        "Permuted above Repeated: so is their order; a model that is sure of the order makes Permuted worse than "
        "Novel. Novel far from 100 %: the mere form of a second list helps or hinders. The first word has no cue of "
        "its own and counts only in the table by position."
    )
    finding: ClassVar[str] = (
        "Verbatim memory (arXiv 2210.13569): a 12-layer transformer trained on WikiText-103 has 88 % for repeated, "
        "92 % for permuted and 99 % for novel lists of ten nouns; GPT-2 falls much further. An LSTM retrieves little, "
        "mostly the beginning of lists after short texts, and no order."
    )

    def facts(self, settings: Settings) -> dict[str, Any]:
        return {"items": len(self.trials(settings))}

    def trials(self, settings: Settings) -> list[Trial]:
        n = settings.items or ITEMS
        if settings.task is not None:
            return _own(settings.task)[:n]
        every = VerbatimMemory().trials()
        draw = random.Random(f"verbatim memory {settings.seed}")
        bases = draw.sample(range(len(every) // 10), len(every) // 10)
        turns = {base: draw.sample(range(10), 10) for base in bases}
        return [every[10 * base + turns[base][turn]] for turn in range(10) for base in bases][:n]

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, progress: Progress
    ) -> None:
        if not tokenizer.is_fast:
            raise UsageError("verbatim-memory needs a tokenizer that tells where in a text its tokens are (a fast one)")
        trials = self.trials(settings)
        blocks = [range(start, min(start + BLOCK, len(trials))) for start in range(0, len(trials), BLOCK)]
        progress.plan(len(blocks))
        for block in blocks:

            def read(block: range = block) -> list[dict[str, Any]]:
                some = [trials[i] for i in block]
                found = VerbatimMemory().surprisals(model, tokenizer, some)
                return [_lists(trial, losses) for trial, losses in zip(some, found, strict=True)]

            said = f"lists {block[0] + 1} to {block[-1] + 1} of {len(trials)}"
            progress.once(f"{block[0]} to {block[-1]}", said, read)

    def result(self, settings: Settings, records: Mapping[str, Any]) -> Result:
        items = [one for block in records.values() for one in block]
        by_condition = {name: [_repeat(one[name]) for one in items if name in one] for name in CONDITIONS}
        rows = [
            _row("surprisal of the second list, over the first", name, values)
            for name, values in by_condition.items()
            if values
        ]
        both = [(_repeat(one[NOVEL]), _repeat(one[REPEATED])) for one in items if NOVEL in one]
        order = [_repeat(one[PERMUTED]) - _repeat(one[REPEATED]) for one in items]
        words = [novel - repeated for novel, repeated in both]
        if items:
            rows.append(_row("differences", "words: Novel - Repeated", words))
            rows.append(_row("differences", "order: Permuted - Repeated", order))
            rows += _positions(items)
        notes = ["this probe judges no methods"] if settings.remedies else []
        return Result([_verdict(by_condition, words, order)] if items else [], rows, notes)


def _lists(trial: Trial, losses: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Per condition the surprisals of the words of both lists."""
    return {
        name: [list_surprisals(losses[name], text, marker).tolist() for marker in (LIST1, LIST2)]
        for name, text in trial.texts.items()
    }


def _repeat(lists: Sequence[Sequence[float]]) -> float:
    """R as a share, of the surprisals of both lists by position."""
    x1, x2 = (torch.tensor(one[1:], dtype=torch.float64).mean() for one in lists)
    return float(repeat_surprisal(x1, x2)) / 100


def _row(group: str, what: str, values: Sequence[float]) -> Row:
    known = _finite(values)
    if not known:
        why = "no text could be compared"
        return Row(group, PLAIN, what, status="not judged", reason=why)
    middle, low, high = _bounds(known)
    return Row(group, PLAIN, what, middle, low, high, len(known), note=f"MAD {mad(known):.0%}")


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _bounds(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    middle, low, high = bca_median(values)
    if math.isnan(low) or math.isnan(high):
        return middle, None, None
    return middle, min(low, middle), max(high, middle)


def _positions(items: Sequence[Mapping[str, Any]]) -> list[Row]:
    """By position: the word's surprisal at the second reading over the first, repeated lists."""
    rows = []
    for k in range(max(len(one[REPEATED][0]) for one in items)):
        pairs = [[torch.tensor(x[k]) for x in one[REPEATED]] for one in items if k < len(one[REPEATED][0])]
        values = [float(repeat_surprisal(x1, x2)) / 100 for x1, x2 in pairs]
        rows.append(_row("Repeated: by position in the list", f"{k + 1}", values))
    return rows


def _verdict(by_condition: Mapping[str, Sequence[float]], words: Sequence[float], order: Sequence[float]) -> Verdict:
    kept = {name: _finite(values) for name, values in by_condition.items()}
    told = ", ".join(f"{name} {median(values):.0%}" for name, values in kept.items() if values)
    known = _finite(words)
    if not known:
        return Verdict(
            "second list", PLAIN, NO_NOVEL, f"median of second over first list: {told or 'none could be compared'}"
        )
    found = []
    for values in (known, _finite(order)):
        _, low, _ = _bounds(values)
        found.append(low is not None and low > 0)
    word = NOTHING if not found[0] else WORDS_AND_ORDER if found[1] else WORDS
    return Verdict("second list", PLAIN, word, f"median of second over first list: {told}")


def _own(path: str) -> list[Trial]:
    lists = read_lines(path, _line, FORM)
    novel = []
    for i, (words, _) in enumerate(lists):
        others = (other[: len(words)] for other, _ in [*lists[i + 1 :], *lists[:i]])
        novel.append(next((other for other in others if len(other) == len(words) and not {*words} & {*other}), None))
    return trials_of([words for words, _ in lists], novel, [prose for _, prose in lists])


def _line(line: Line) -> tuple[list[str], tuple[str, str]]:
    """The words, and the text before and behind them."""
    words = line.texts("words", 3)
    if len(set(words)) < len(words):
        raise line.fail("words", "a list of different texts")
    preface, between = story(1)
    preface = line.text("preface") if "preface" in line.fields else preface
    return words, (preface, line.text("between") if "between" in line.fields else between)
