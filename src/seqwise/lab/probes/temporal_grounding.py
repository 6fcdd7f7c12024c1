"""Does the model hold one timeline? Each question on a story is asked as it is, and with before and after exchanged.

    yes          log p(yes) >= log p(no) after the reply's beginning
    both right   the answers to a question and its reversal are right, hence opposite
    inconsistent exactly one of them is right: the same answer to both
    yes rate     share of yes among all answers, 50 % on a consistent timeline

The measures are those of arXiv 2311.08398. Half of the generated stories tell their events in the order of time, half
step back once ("Before that, ..."), so that the order of telling alone does not answer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seqwise.core.method import Method
from seqwise.insight.probe.temporal_grounding import NO, YES, consistency, reverse, yes_rate
from seqwise.lab.probes import _remedies as shared
from seqwise.lab.probes.base import Asked, Probe, Progress, Result, Row, Settings, Verdict, choice_logps, share
from seqwise.lab.probes.lines import Line, read_lines
from seqwise.lab.probes.order import NAMES
from seqwise.lab.rows import PLAIN

ITEMS = 24
GROUP = "questions and their reversals"
BY_TELLING = f"{GROUP}: both right, by telling"
TOLD = ("in the order of time", "with a step back", "own")
PREFIX = "The answer is"
CONSISTENT, INCONSISTENT, WRONG, UNCLEAR = (
    "one timeline, the right one", "contradicts itself", "one timeline, a wrong one", "not clear at this size"
)  # fmt: skip
FORM = '{"story": text, "question": text with before or after, "answer": "yes" or "no"}'
ACTS = (
    "opened the window", "fed the cat", "washed the car", "read a letter", "baked a cake", "called a friend",
    "cleaned the kitchen", "bought some milk", "watered the plants", "fixed the lamp", "played the piano",
    "painted the door",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A story and a question with before or after; yes: its right answer. told: one of `TOLD`."""

    story: str
    question: str
    yes: bool
    told: str = TOLD[2]


def items(n: int, seed: int) -> list[Item]:
    """Stories of three acts; item i depends on (seed, i) alone. All four kinds of question and answer come in turn."""
    found = []
    for i in range(n):
        draw = random.Random(f"temporal {seed} {i}")
        name, acts = draw.choice(NAMES), draw.sample(ACTS, 3)  # acts in the order of time
        back, before, yes = bool(i // 4 % 2), bool(i % 2), bool(i // 2 % 2)
        story = (
            f"{name} {acts[1]}. Before that, {name} {acts[0]}. At last, {name} {acts[2]}."
            if back
            else f"{name} {acts[0]}. Then {name} {acts[1]}. At last, {name} {acts[2]}."
        )
        a, b = (0, 1) if back else sorted(draw.sample(range(3), 2))
        early, late = acts[a], acts[b]
        first, second = (early, late) if before == yes else (late, early)
        question = f"Was it {'before' if before else 'after'} {name} {second} that {name} {first}?"
        found.append(Item(story, question, yes, TOLD[back]))
    return found


def _line(line: Line) -> Item:
    story, question, answer = (line.text(name) for name in ("story", "question", "answer"))
    if answer.lower() not in (YES, NO):
        raise line.fail("answer", f"{YES!r} or {NO!r}")
    try:
        reverse(question)
    except ValueError:
        raise line.fail("question", "a text with 'before' or 'after'") from None
    return Item(story, question, answer.lower() == YES)


class TemporalGrounding(Probe):
    name: ClassVar[str] = "temporal-grounding"
    asks: ClassVar[str] = "Does the model hold one timeline of a story, or does it contradict itself?"
    reading: ClassVar[str] = (
        "Both right, inconsistent and both wrong add up to 100 %. Independent guessing gets 25, 50 and 25 %; one "
        "answer to everything gets 0, 100 and 0 % though half of its answers are right. Both wrong is a timeline "
        "too, a wrong one. A yes rate far from 50 % is the usual cause of contradictions."
    )
    finding: ClassVar[str] = (
        "Are Large Language Models Temporally Grounded? (arXiv 2311.08398), both right / inconsistent on "
        "TempEvalQA-Bi: GPT-4 67 % / 27 % with three examples, Llama-2-70B-chat 47 % / 47 %, Llama-2-7B-chat "
        "21 % / 71 %, Llama-2-7B without examples 0 % / 100 %."
    )

    def facts(self, settings: Settings) -> dict[str, Any]:
        return {"items": len(self.items(settings)[0])}

    def items(self, settings: Settings) -> tuple[list[Item], list[str]]:
        """The items, and notes on them."""
        n = settings.items or ITEMS
        if settings.task is None:
            return items(n, settings.seed), []
        found = read_lines(settings.task, _line, FORM)
        notes = [f"the first {n} of {len(found)} lines; --items {len(found)} takes all"] if len(found) > n else []
        return found[:n], notes

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, progress: Progress
    ) -> None:
        found = self.items(settings)[0]
        progress.plan(len(found))

        def ask(i: int, method: Method | None) -> dict[str, Any]:
            item = found[i]
            asked = [_asked(item.story, question) for question in (item.question, reverse(item.question))]
            logps = choice_logps(model, tokenizer, asked, (YES, NO), method)  # (2, 2)
            return {"odds": [round(float(one), 6) for one in logps[:, 0] - logps[:, 1]]}

        shared.measure_plain(progress, GROUP, len(found), ask)

    def result(self, settings: Settings, records: Mapping[str, Any]) -> Result:
        own, notes = self.items(settings)
        found = shared.found(records, GROUP, PLAIN, len(own))
        if not found:
            return Result((), (), notes)
        said: dict[int, tuple[bool | None, bool | None]] = {
            i: (one["odds"][0] >= 0, one["odds"][1] >= 0) for i, one in found.items()
        }
        pairs = {i: consistency([pair], [own[i].yes]) for i, pair in said.items()}
        columns = {
            "both right": [pair.acc for pair in pairs.values()],
            "inconsistent": [pair.inconsistent for pair in pairs.values()],
            "both wrong": [pair.both_wrong for pair in pairs.values()],
            "single answers right": [(1 + pair.acc - pair.both_wrong) / 2 for pair in pairs.values()],
            "yes rate": [yes_rate([pair]) for pair in said.values()],
        }
        rows: list[Row] = [shared.row(GROUP, PLAIN, what, values) for what, values in columns.items()]
        for told in TOLD:
            right = [pair.acc for i, pair in pairs.items() if own[i].told == told]
            if right and len(right) < len(pairs):
                rows.append(shared.row(BY_TELLING, PLAIN, told, right))
        return Result([_verdict(columns)], rows, notes)


def _asked(story: str, question: str) -> Asked:
    content = [
        {"type": "context", "text": f"{story}\n\n"},
        {"type": "question", "text": f"{question} Answer with yes or no."},
    ]
    return Asked([{"role": "user", "content": content}], PREFIX)


def _verdict(columns: Mapping[str, Sequence[float]]) -> Verdict:
    """Whichever of the three is the share of more than half of the pairs, by its interval."""
    words = {"both right": CONSISTENT, "inconsistent": INCONSISTENT, "both wrong": WRONG}
    verdict = UNCLEAR
    for what, word in words.items():
        low, _ = share(columns[what])
        if low is not None and low > 0.5:
            verdict = word
    told = ", ".join(f"{what} {shared.percent(columns[what])}" for what in [*words, "yes rate"])
    return Verdict(GROUP, PLAIN, verdict, f"{told}; {len(columns['both right'])} pairs")
