"""Does a model answer wrong because the right answer is improbable beforehand, and does it know better inside?

    counting   a list of 1 to 20 words; which number word comes behind "the number of words in this list is"
    acronyms   the first letters of words, which spell a word or nothing; the right one among four
    prior      log pi of every answer of a part behind neutral beginnings; an item is unlikely or likely by its own
    told       the same items behind the sentence that asks to leave the prior aside, paired
    inside     of wrong answers: some layer, read by the logit lens, prefers the right one

Data of your own come with their candidates; the answers of one file, or of each "task" in it, share a prior.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seqwise.insight.probe.prior_distribution import (
    Item,
    PriorInfluence,
    computed_inside,
    logistic_slope,
    prior_layer,
    towards_prior,
    unlikely,
)
from seqwise.lab.probes.base import Probe, Progress, Result, Row, Settings, Verdict, paired, share
from seqwise.lab.probes.lines import Line, read_lines
from seqwise.lab.rows import PLAIN
from seqwise.lab.tasks import NOUNS

ITEMS, BLOCK = 20, 10  # per part; items measured at once
COUNTING, ACRONYMS = "counting", "acronyms"
TOLD = "told to compute"
_NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
NUMBERS = tuple(_NUMBERS.split())
SPELLED = ("cat", "dog", "sun", "map", "red", "hat", "box", "pen", "car", "tea")
TEMPLATES = ("The answer is", "It is", "Answer:")
INFLUENCED = "fails where the right answer is unlikely"
NOT_FOUND = "no influence of the prior found at this size"
ALL_RIGHT, ALL_WRONG = "all answers are right", "all answers are wrong"
FORM = '{"prompt": ..., "candidates": [...], "answer": index}, with a "task" where there are several'


@dataclass(frozen=True)
class Question:
    """prompt: a text that the answer goes on; candidates: what is compared; truth: index of the right one."""

    prompt: str
    candidates: tuple[str, ...]
    truth: int


def counting(n: int, seed: int) -> list[Question]:
    """Lists of words whose lengths are spread over all numbers."""
    found = []
    for i in range(n):
        draw = random.Random(f"prior counting {seed} {i}")
        count = 1 + (i + seed) % len(NUMBERS)
        listed = ", ".join(draw.sample(NOUNS, count))
        found.append(Question(f"List: {listed}. The number of words in this list is", NUMBERS, count - 1))
    return found


def acronyms(n: int, seed: int) -> list[Question]:
    """First letters of three nouns: of every two one is a word, and the other one with a letter replaced."""
    initials = sorted({noun[0] for noun in NOUNS})
    by_initial = {letter: [noun for noun in NOUNS if noun[0] == letter] for letter in initials}
    words = [word for word in SPELLED if all(letter in by_initial for letter in word)]
    found = []
    for i in range(n):
        draw = random.Random(f"prior acronyms {seed} {i // 2}")
        word = words[(i // 2 + seed) % len(words)]
        near: list[str] = []
        while len(near) < 3:
            place = draw.randrange(3)
            other = word[:place] + draw.choice(initials) + word[place + 1 :]
            if other != word and other not in near and other not in SPELLED:
                near.append(other)
        candidates = (word, *near)
        truth = i % 2
        nouns = [draw.choice(by_initial[letter]) for letter in candidates[truth]]
        prompt = f"The first letters of {nouns[0]}, {nouns[1]}, {nouns[2]} spell"
        found.append(Question(prompt, candidates, truth))
    return found


class PriorDistribution(Probe):
    name: ClassVar[str] = "prior-distribution"
    asks: ClassVar[str] = "Are answers wrong because the right one is improbable beforehand, and is it known inside?"
    reading: ClassVar[str] = (
        "The prior of an answer is how likely it is behind a beginning that says nothing of the task. Unlikely: at "
        "least half of the candidates have at least the right one's prior. Accuracy that rises with the prior (slope "
        "above 0, small p) is its influence. Wrong towards the prior: wrong answers that are likelier beforehand than "
        "the right one. Known inside: wrong answers where some layer prefers the right one. Many layers prefer many "
        "things: it is known as far as it is preferred more often than another wrong answer is. The lens reads first "
        "tokens alone. A sentence that asks to compute shows what a prompt can do."
    )
    finding: ClassVar[str] = (
        "Prior influence (arXiv 2504.12585): models fail tasks such as counting and acronyms where the right answer is "
        "improbable, though it is often computed inside. A sentence that asks not to rely on the prior helps much on "
        "such tasks; so does tuning only the layers that carry the prior, also for answers that were held out, after "
        "which errors no longer depend on the prior."
    )

    def facts(self, settings: Settings) -> dict[str, Any]:
        return {"items": {part: len(items) for part, items in self.parts(settings).items()}}

    def parts(self, settings: Settings) -> dict[str, list[Question]]:
        n = settings.items or ITEMS
        if settings.task is None:
            return {COUNTING: counting(n, settings.seed), ACRONYMS: acronyms(n, settings.seed)}
        found: dict[str, list[Question]] = {}
        for part, question in read_lines(settings.task, _line, FORM):
            found.setdefault(part, []).append(question)
        return {part: questions[:n] for part, questions in found.items()}

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, progress: Progress
    ) -> None:
        parts, probe = self.parts(settings), PriorInfluence()

        def answer(text: str) -> list[int]:
            return tokenizer.encode(f" {text}", add_special_tokens=False)

        plan = [
            (part, told, start)
            for part, questions in parts.items()
            for told in (False, True)
            for start in range(0, len(questions), BLOCK)
        ]
        progress.plan(len(parts) + len(plan))
        for part, questions in parts.items():
            every = sorted({candidate for question in questions for candidate in question.candidates})

            def prior(every: Sequence[str] = every) -> dict[str, float]:
                templates = [tokenizer.encode(template) for template in TEMPLATES]
                found = probe.log_prior(model, templates, [answer(text) for text in every])
                return dict(zip(every, found.tolist(), strict=True))

            progress.once(f"{part}/prior", f"{part}: the prior of {len(every)} answers", prior)
        for part, told, start in plan:
            some, log_pi = parts[part][start : start + BLOCK], progress.records[f"{part}/prior"]

            def read(
                some: Sequence[Question] = some, log_pi: Mapping[str, float] = log_pi, told: bool = told
            ) -> list[dict[str, Any]]:
                items = [
                    Item(
                        tokenizer.encode(probe.instructed(one.prompt) if told else one.prompt),
                        [answer(candidate) for candidate in one.candidates],
                        one.truth,
                    )
                    for one in some
                ]
                pi = [_prior_of(one, log_pi) for one in some]
                return [
                    {
                        "answer": found.answer,
                        "right": int(found.right),
                        "inside": _inside(found.margin) if found.distinct else None,
                        "chance": None if found.bystander is None or not found.distinct else _inside(found.bystander),
                        "rho": [round(value, 6) if math.isfinite(value) else None for value in found.rho.tolist()],
                    }
                    for found in probe.read(model, items, pi)
                ]

            method = TOLD if told else PLAIN
            said = f"{part}, {method}: items {start + 1} to {start + len(some)}"
            progress.once(f"{part}/{method}/{start}", said, read)

    def result(self, settings: Settings, records: Mapping[str, Any]) -> Result:
        rows: list[Row] = []
        verdicts: list[Verdict] = []
        for part, questions in self.parts(settings).items():
            arms = {method: _found(records, part, method, len(questions)) for method in (PLAIN, TOLD)}
            if not arms[PLAIN]:
                continue
            log_pi = records[f"{part}/prior"]
            plain = _Arm(questions, arms[PLAIN], log_pi)
            rows += _rows(part, PLAIN, plain, None)
            verdicts.append(_verdict(part, plain))
            if arms[TOLD]:
                ours = _Arm(questions, arms[TOLD], log_pi)
                same = _Arm(questions, arms[PLAIN][: len(arms[TOLD])], log_pi)
                rows += _rows(part, TOLD, ours, same)
        return Result(verdicts, rows, ["this probe judges no methods"] if settings.remedies else [])


class _Arm:
    """One part under one prompt: values of the items measured, in their order."""

    def __init__(
        self, questions: Sequence[Question], found: Sequence[Mapping[str, Any]], log_pi: Mapping[str, float]
    ) -> None:
        questions = questions[: len(found)]
        priors = [_prior_of(one, log_pi) for one in questions]
        self.right = [float(one["right"]) for one in found]
        self.log_pi = [float(pi[one.truth]) for one, pi in zip(questions, priors, strict=True)]
        self.unlikely = [unlikely(pi, one.truth) for one, pi in zip(questions, priors, strict=True)]
        wrong = [i for i, one in enumerate(found) if not one["right"]]
        self.towards = [float(towards_prior(priors[i], questions[i].truth, found[i]["answer"])) for i in wrong]
        self.inside, self.chance = (
            [float(found[i][name]) for i in wrong if found[i][name] is not None] for name in ("inside", "chance")
        )
        rho = torch.tensor([[math.nan if x is None else x for x in one["rho"]] for one in found], dtype=torch.float64)
        self.rho = rho.nanmean(0)  # (layers + 1,)

    def half(self, unlikely: bool) -> list[float]:
        return [right for right, which in zip(self.right, self.unlikely, strict=True) if which == unlikely]


def _inside(margin: torch.Tensor) -> int:
    """Whether some layer before the last prefers it to the answer given."""
    return int(computed_inside(margin[:-1]))


def _prior_of(question: Question, log_pi: Mapping[str, float]) -> torch.Tensor:
    return torch.tensor([log_pi[candidate] for candidate in question.candidates], dtype=torch.float64)


def _found(records: Mapping[str, Any], part: str, method: str, n: int) -> list[Any]:
    """What has been measured without a gap from the first item on."""
    found: list[Any] = []
    for start in range(0, n, BLOCK):
        if f"{part}/{method}/{start}" not in records:
            break
        found += records[f"{part}/{method}/{start}"]
    return found


def _rows(part: str, method: str, arm: _Arm, plain: _Arm | None) -> list[Row]:
    kinds: tuple[tuple[str, Callable[[_Arm], list[float]], bool], ...] = (
        ("accuracy", lambda a: a.right, True),
        ("of likely answers", lambda a: a.half(False), True),
        ("of unlikely answers", lambda a: a.half(True), True),
        ("wrong towards the prior", lambda a: a.towards, False),  # of other items in either arm: no pairs
        ("wrong, known inside", lambda a: a.inside, False),
        ("wrong, another one inside", lambda a: a.chance, False),
    )
    rows = []
    for what, values_of, pairs in kinds:
        values = values_of(arm)
        if not values:
            rows.append(Row(part, method, what, status="not judged", reason=f"no item for {what!r}"))
            continue
        low, high = share(values)
        change = None if plain is None or not pairs else paired(values, values_of(plain), hits=True)
        rows.append(Row(part, method, what, sum(values) / len(values), low, high, len(values), change))
    return rows


def _verdict(part: str, arm: _Arm) -> Verdict:
    layer = prior_layer(arm.rho)
    where = f"the prior enters most at layer {layer} of {len(arm.rho) - 1}"
    where += f" (rank correlation {arm.rho[layer - 1]:+.2f} to {arm.rho[layer]:+.2f})"
    if len(set(arm.right)) == 1:
        return Verdict(part, PLAIN, ALL_RIGHT if arm.right[0] else ALL_WRONG, f"so accuracy has no slope; {where}")
    slope = logistic_slope(torch.tensor(arm.log_pi), torch.tensor(arm.right))
    rises, p = slope.slope > 0, slope.p
    said = f"log-odds of a right answer per nat of prior {slope.slope:+.2f}"
    if math.isnan(p):
        hits, misses = ([pi for pi, r in zip(arm.log_pi, arm.right, strict=True) if r == one] for one in (1.0, 0.0))
        rises = min(hits) > max(misses)
        apart = rises or max(hits) < min(misses)
        p = min(1.0, 2 / math.comb(len(arm.right), len(hits))) if apart else 1.0
        said = f"the prior separates right from wrong answers, {'the right ones above' if rises else 'not upwards'}"
    word = INFLUENCED if rises and p < 0.05 else NOT_FOUND
    return Verdict(part, PLAIN, word, f"{said}, p = {p:.2g}; {where}")


def _line(line: Line) -> tuple[str, Question]:
    candidates = line.texts("candidates", 2)
    if len(set(candidates)) < len(candidates):
        raise line.fail("candidates", "a list of different texts")
    truth = line.fields.get("answer")
    if isinstance(truth, bool) or not isinstance(truth, int) or not 0 <= truth < len(candidates):
        raise line.fail("answer", f"a whole number in [0, {len(candidates) - 1}], an index of 'candidates'")
    part = line.text("task") if "task" in line.fields else "own"
    return part, Question(line.text("prompt"), tuple(candidates), truth)
