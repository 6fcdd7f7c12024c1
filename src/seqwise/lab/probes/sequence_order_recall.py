"""Which of two segments of a text came first? Asked with the text in the prompt, and without it.

    prompts     each pair is shown in both orders: A is the earlier one once, the later one once
    margin      g = log p(A) - log p(B) where A is the earlier one, g' where it is the later one
    accuracy    ([g >= 0] + [g' < 0]) / 2; without the habit of saying A: [g - g' > 0]
    fixed label the same label in both orders: the order of showing, not that of the text, has decided

The items are those of the paper's generator (arXiv 2410.08133). The two segments are a marked set, the text is a marked
context: a remedy can take their order of showing away, or read the text twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seqwise.core.errors import UsageError
from seqwise.core.method import Method
from seqwise.insight.probe.sequence_order_recall import (
    LABELS,
    PREFIX,
    SYSTEM,
    ask,
    draw_items,
    occurrences,
    sentence_starts,
)
from seqwise.lab.probes import _remedies as shared
from seqwise.lab.probes.base import Asked, Probe, Progress, Result, Row, Settings, Verdict, choice_logps, share
from seqwise.lab.probes.lines import Line, read_lines
from seqwise.lab.rows import PLAIN
from seqwise.lab.zoo.text import paragraphs

ITEMS = 10
EXCERPT, SEGMENT = 48, 6  # words
EDGES = (SEGMENT, EXCERPT // 2, EXCERPT * 8 // 10)
SPARE = 60  # excerpts; many have no sentences at both distances
RESERVE = 4  # for excerpts that repeat themselves
INSIDE, WITHOUT = "text in the prompt", "without the text"
BINS = ("near", "far")
RECALLS, NOT_FOUND = "recalls order", "no recall of order found at this size"
FORM = '{"text": ..., "first": ..., "second": ...} with two passages of the text, the earlier one as "first"'


@dataclass(frozen=True)
class Item:
    """A text and two passages of it, the earlier one first. bin: "near" or "far", half a text apart or more."""

    text: str
    first: str
    second: str
    bin: str


def items(n: int, seed: int) -> list[Item]:
    """n items of Python's own prose, near and far in turn; half of each on n even."""
    words = " ".join(paragraphs()).split()
    half = (n + 1) // 2
    more = half + RESERVE
    spare = SPARE + 3 * more
    drawn = draw_items(len(words), EXCERPT, SEGMENT, EDGES, more, seed, extra=spare, sentences=sentence_starts(words))
    clear = np.flatnonzero(drawn.unambiguous(words).all(0))[:half]  # a passage that comes twice has no place
    found = []
    for k in clear.tolist():
        text = " ".join(drawn.excerpt_of(words, k))
        for b, name in enumerate(BINS):
            pair = [" ".join(one) for one in drawn.segments_of(words, b, k)]
            first, second = pair if drawn.answers[b, k] == 0 else pair[::-1]
            found.append(Item(text, first, second, name))
    return found[:n]


def _line(line: Line) -> Item:
    text, first, second = (" ".join(line.text(name).split()) for name in ("text", "first", "second"))
    words = text.split()
    places = []
    for name, part in (("first", first), ("second", second)):
        times = occurrences(words, part.split())
        if times != 1:
            raise line.fail(name, f"a passage in whole words that occurs once in 'text' ({times} times there)")
        size = len(part.split())
        places.append(next(i for i in range(len(words)) if words[i : i + size] == part.split()))
    if places[0] >= places[1]:
        raise line.fail("second", "a passage that comes after 'first'")
    return Item(text, first, second, BINS[places[1] - places[0] > len(words) // 2])


class SequenceOrderRecall(Probe):
    name: ClassVar[str] = "sequence-order-recall"
    asks: ClassVar[str] = "Does the model know which of two segments of a text came first?"
    reading: ClassVar[str] = (
        "Accuracy: over both orders of showing; chance is 50 %. Fixed label: pairs that get the same letter in both "
        "orders, so that showing decides; at 100 % accuracy is 50 % whatever the model recalls, and only the accuracy "
        "without that habit can tell more. What the text in the prompt adds over the same question without it is "
        "memory in context; what is above chance without it was guessed from the segments, or known from training."
    )
    finding: ClassVar[str] = (
        "Sequence Order Recall Tasks (arXiv 2410.08133): instruction-tuned models are highly accurate with the text in "
        "the prompt and below 60 %, near chance, without it; training on the text is not enough."
    )

    def facts(self, settings: Settings) -> dict[str, Any]:
        return {"remedies": [str(one) for one in shared.remedies(settings)], "items": len(self.items(settings)[0])}

    def items(self, settings: Settings) -> tuple[list[Item], list[str]]:
        """The items, and notes on them."""
        n = settings.items or ITEMS
        if settings.task is None:
            return _drawn(n, settings.seed), []
        found = read_lines(settings.task, _line, FORM)
        notes = [f"the first {n} of {len(found)} lines; --items {len(found)} takes all"] if len(found) > n else []
        return found[:n], notes

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, progress: Progress
    ) -> None:
        found, methods = self.items(settings)[0], shared.remedies(settings)
        progress.plan(len(found) * (2 + len(methods)))

        def ask_item(part: str, i: int, method: Method | None) -> dict[str, Any]:
            return _measured(model, tokenizer, found[i], part == INSIDE, method)

        for part in (INSIDE, WITHOUT):
            shared.measure_plain(progress, part, len(found), lambda i, method, part=part: ask_item(part, i, method))  # type: ignore[misc]
        shared.measure_remedies(progress, INSIDE, len(found), lambda i, method: ask_item(INSIDE, i, method), methods)

    def result(self, settings: Settings, records: Mapping[str, Any]) -> Result:
        found, notes = self.items(settings)
        rows: list[Row] = []
        verdicts: list[Verdict] = []
        plain = {part: shared.found(records, part, PLAIN, len(found)) for part in (INSIDE, WITHOUT)}
        for part in (INSIDE, WITHOUT):
            if plain[part]:
                rows += _rows(part, PLAIN, _values(plain[part]), None)
        if plain[INSIDE]:
            by_bin = {name: {i: one for i, one in plain[INSIDE].items() if found[i].bin == name} for name in BINS}
            group = f"{INSIDE}: accuracy without the habit, by distance"
            rows += [shared.row(group, PLAIN, name, _values(ones)["unbiased"]) for name, ones in by_bin.items() if ones]
            both = {i: plain[WITHOUT][i] for i in plain[INSIDE] if i in plain[WITHOUT]}
            same = {i: plain[INSIDE][i] for i in both}
            verdicts.append(_verdict(_values(plain[INSIDE]), _values(same), _values(both)))
        for method in map(str, shared.remedies(settings)):
            ours = shared.found(records, INSIDE, method, len(found))
            if f"{INSIDE}/{method}" in records:
                why = records[f"{INSIDE}/{method}"]["failed"]
                rows.append(Row(INSIDE, method, "accuracy", status="failed", reason=why))
            elif ours:
                arm, before = _values(ours), _values({i: plain[INSIDE][i] for i in ours})
                rows += _rows(INSIDE, method, arm, before)
                verdicts.append(_effect(method, arm, before))
        return Result(verdicts, rows, notes)


def _drawn(n: int, seed: int) -> list[Item]:
    try:
        return items(n, seed)
    except ValueError as error:
        raise UsageError(f"cannot draw {n} items: {error}") from None


def _measured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, item: Item, inside: bool, method: Method | None
) -> dict[str, Any]:
    """g and g' of one item, in nats."""
    asked = []
    for first, second in ((item.first, item.second), (item.second, item.first)):
        question = ask(first, second, item.text if inside else None)
        content: list[dict[str, Any]] = [{"type": "text", "text": SYSTEM + "\n\n"}]
        if question.excerpt:
            content.append({"type": "context", "text": question.excerpt})
        content += [
            {"type": "set", "items": list(question.segments)},
            {"type": "question", "text": question.question},
        ]
        asked.append(Asked([{"role": "user", "content": content}], PREFIX))
    logps = choice_logps(model, tokenizer, asked, LABELS, method)  # (2, 2)
    return {"margins": [round(float(one), 6) for one in logps[:, 0] - logps[:, 1]]}


def _values(found: Mapping[int, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Per item: accuracy over both orders, accuracy without the habit, whether the label is fixed, share of A."""
    margins = [found[i]["margins"] for i in sorted(found)]
    said = [(g >= 0, h >= 0) for g, h in margins]  # A, in each order
    return {
        "accuracy": [(a + (not b)) / 2 for a, b in said],
        "unbiased": [float(g > h) for g, h in margins],
        "fixed": [float(a == b) for a, b in said],
        "A": [(a + b) / 2 for a, b in said],
    }


def _rows(
    part: str, method: str, arm: Mapping[str, Sequence[float]], plain: Mapping[str, Sequence[float]] | None
) -> list[Row]:
    columns = {
        "accuracy": "accuracy",
        "unbiased": "accuracy without the habit",
        "fixed": "fixed label",
        "A": "A is said",
    }
    return [
        shared.row(part, method, what, arm[name], None if plain is None else plain[name])
        for name, what in columns.items()
    ]


def _above_chance(values: Sequence[float]) -> bool:
    low, _ = share(values)
    return low is not None and low > 0.5 + 1e-9


def _verdict(
    arm: Mapping[str, Sequence[float]], same: Mapping[str, Sequence[float]], without: Mapping[str, Sequence[float]]
) -> Verdict:
    """same, without: the items that were also asked without the text, with it and without it."""
    said = f"accuracy {shared.percent(arm['accuracy'])}, {shared.percent(arm['unbiased'])} without the habit of a label"
    habit = f"the order of showing decides in {shared.percent(arm['fixed'])} of pairs"
    gain = (
        f"; the text adds {shared.points(same['unbiased'], without['unbiased'])} to the latter" if without["A"] else ""
    )
    if _above_chance(arm["accuracy"]) or _above_chance(arm["unbiased"]):
        return Verdict(INSIDE, PLAIN, RECALLS, f"{said}; {habit}{gain}")
    return Verdict(INSIDE, PLAIN, NOT_FOUND, f"{said}, chance 50%; {habit}{gain}")


def _effect(method: str, arm: Mapping[str, Sequence[float]], plain: Mapping[str, Sequence[float]]) -> Verdict:
    habit = {-1: "showing decides less often", 0: "no change of the habit found", 1: "showing decides more often"}
    recall = {-1: "recall falls", 0: "no change of recall found", 1: "recall rises"}
    words = (
        f"{habit[shared.direction(arm['fixed'], plain['fixed'])]}, "
        f"{recall[shared.direction(arm['unbiased'], plain['unbiased'])]}"
    )
    told = (
        f"fixed label {shared.points(arm['fixed'], plain['fixed'])}, accuracy "
        f"{shared.points(arm['accuracy'], plain['accuracy'])}, without the habit "
        f"{shared.points(arm['unbiased'], plain['unbiased'])} against the plain model, {len(arm['A'])} items"
    )
    return Verdict(INSIDE, method, words, told)
