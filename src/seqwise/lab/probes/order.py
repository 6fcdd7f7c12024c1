"""Does the answer change when the same documents, or the same options, come in another order?

    prompts    per item the K cyclic permutations of its K members: the right one stands at each position p once
    accuracy   a_p = mean over items of [answer at p is right], and its mean over p
    spread     max_p a_p - min_p a_p; p-value: the share of shufflings of each item's hits over the positions with at
               least this spread
    flip rate  share of items whose K answers are not all the same; pairs: share of the K (K - 1) / 2 pairs that differ
    letters    P(letter | options that all read "N/A"), normalised over the K letters; deviation 1/2 sum |P - 1/K|

Members carry no letters where options are permuted: a letter that moves with its option is another option, and one that
stays in place belongs to a position. So the text of the option is the answer there; letters have a prompt of their own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seqwise.core.errors import SeqwiseError, UsageError
from seqwise.core.method import Method
from seqwise.lab.compare import reason
from seqwise.lab.intervals import LEVEL
from seqwise.lab.probes.base import (
    Asked,
    Probe,
    Progress,
    Result,
    Row,
    Settings,
    Verdict,
    choice_logps,
    paired,
    replies,
    share,
)
from seqwise.lab.probes.lines import Line, read_lines
from seqwise.lab.registry import load_methods, parse_methods
from seqwise.lab.rows import PLAIN
from seqwise.lab.tasks import NOUNS, answered

MEMBERS, ITEMS = 5, 30
ORDER_WING = "seqwise.methods.order."
DOCUMENTS, OPTIONS = "documents", "options"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NO_POWER = "no power"
DEPENDS = "depends on order"
NOT_FOUND = "no dependence found at this size"
BOOTSTRAP, SHUFFLES = 2_000, 2_000

Array = npt.NDArray[np.float64]

NAMES = ("Alice", "Anna", "David", "Emma", "John", "Lucy", "Maria", "Mark", "Paul", "Peter", "Sarah", "Tom")
KINDS = {
    "fruit": ["apple", "banana", "cherry", "grape", "lemon", "peach", "pear"],
    "animal": ["bear", "cat", "dog", "horse", "lion", "rabbit", "sheep", "tiger"],
    "color": ["black", "blue", "green", "purple", "red", "white", "yellow"],
    "tool": ["axe", "drill", "hammer", "knife", "saw", "shovel"],
    "vehicle": ["bicycle", "boat", "bus", "car", "train", "truck"],
    "musical instrument": ["drum", "flute", "guitar", "piano", "trumpet", "violin"],
    "clothing": ["coat", "dress", "hat", "jacket", "shirt", "sock"],
    "body part": ["ear", "finger", "foot", "hand", "knee", "nose"],
}


@dataclass(frozen=True)
class Item:
    """A question on a set. gold: the member that answers it. choices: one per member, what the answer is chosen from;
    none where the reply is free. answer: what a free reply must hold. prefix: how the reply begins."""

    question: str
    members: tuple[str, ...]
    gold: int
    choices: tuple[str, ...] = ()
    answer: str = ""
    prefix: str = ""


def rotated(members: Sequence[str], gold: int, position: int) -> tuple[str, ...]:
    """The cyclic permutation of the members that has `members[gold]` at this position."""
    turn = (gold - position) % len(members)
    return (*members[turn:], *members[:turn])


# data that needs no download; item i depends on (seed, i) alone


def documents(n: int, seed: int) -> list[Item]:
    """Notes that hold a password each; one is asked for."""
    items = []
    for i in range(n):
        draw = random.Random(f"order documents {seed} {i}")
        names, words, gold = draw.sample(NAMES, MEMBERS), draw.sample(NOUNS, MEMBERS), draw.randrange(MEMBERS)
        told = tuple(f"The password of {name} is {word}." for name, word in zip(names, words, strict=True))
        asked = f"The password of {names[gold]} is"
        items.append(Item(f"What is the password of {names[gold]}?", told, gold, tuple(words), prefix=asked))
    return items


def options(n: int, seed: int) -> list[Item]:
    """Words of different kinds; one kind is asked for."""
    items = []
    for i in range(n):
        draw = random.Random(f"order options {seed} {i}")
        kinds, gold = draw.sample(sorted(KINDS), MEMBERS), draw.randrange(MEMBERS)
        words = tuple(draw.choice(KINDS[kind]) for kind in kinds)
        asked = f"option that is a kind of {kinds[gold]}"
        question = f"Which option is a kind of {kinds[gold]}?"
        items.append(Item(question, words, gold, words, prefix=f"The {asked} is"))
    return items


_FORM = (
    '{"question": ..., "options": [...], "answer": index} or '
    '{"question": ..., "documents": [...], "gold": index, "answer": text}'
)


def read_items(path: str) -> dict[str, list[Item]]:
    """Items of your own from a JSON Lines file, by part: lines with "options" and lines with "documents".

    Raises UsageError with file, line and field for a line that is not so.
    """
    found: dict[str, list[Item]] = {DOCUMENTS: [], OPTIONS: []}

    def take(line: Line) -> None:
        part, item = _item(line)
        first = len(found[part][0].members) if found[part] else len(item.members)
        if len(item.members) != first:
            raise UsageError(
                f"{line.where}: field {part!r} must hold as many as in the first such line, {first}, "
                f"got {len(item.members)}; positions are compared"
            )
        found[part].append(item)

    read_lines(path, take, _FORM)
    return {part: items for part, items in found.items() if items}


def _item(line: Line) -> tuple[str, Item]:
    if (OPTIONS in line.fields) == (DOCUMENTS in line.fields):
        raise UsageError(f"{line.where}: must have one of the fields 'options' and 'documents'")
    part, most = (OPTIONS, len(LETTERS)) if OPTIONS in line.fields else (DOCUMENTS, 100)
    members = line.fields[part]
    if not isinstance(members, list) or not all(isinstance(one, str) and one.strip() for one in members):
        raise line.fail(part, "a list of texts that are not empty")
    members = tuple(one.strip() for one in members)
    if not 2 <= len(set(members)) == len(members) <= most:
        raise line.fail(part, f"a list of 2 to {most} different texts")
    index = "answer" if part == OPTIONS else "gold"
    gold = line.fields.get(index)
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(members):
        raise line.fail(index, f"a whole number in [0, {len(members) - 1}], an index of {part!r}")
    if part == OPTIONS:
        return part, Item(line.text("question"), members, gold, members, prefix="The answer is")
    return part, Item(line.text("question"), members, gold, answer=line.text("answer"))


# prompts


def prompt(part: str, question: str, members: Sequence[str], prefix: str) -> Asked:
    """The members as a marked set between an opening and the question."""
    opening, form = ("Read these notes.\n\n", "{}\n") if part == DOCUMENTS else ("Options:\n", "- {}\n")
    return _asked(opening, [form.format(member) for member in members], question, prefix)


def content_free(question: str, count: int) -> Asked:
    """The question on options that all read "N/A", with their letters."""
    lettered = [f"{letter}. N/A\n" for letter in LETTERS[:count]]
    return _asked("Options:\n", lettered, question, "The letter of the right option is")


def _asked(opening: str, members: list[str], question: str, prefix: str) -> Asked:
    content = [
        {"type": "text", "text": opening},
        {"type": "set", "items": members},
        {"type": "text", "text": "\n"},
        {"type": "question", "text": question},
    ]
    # Without a chat template the reply follows the question directly.
    return Asked([{"role": "user", "content": content}], prefix)


# statistics


def flips(answers: Sequence[Hashable]) -> tuple[float, float]:
    """Of one item's answers: 1.0 where they are not all the same, and the share of pairs that differ."""
    pairs = [a != b for a, b in combinations(answers, 2)]
    return float(any(pairs)), sum(pairs) / len(pairs)


def spread(correct: Array) -> float:
    """Best minus worst accuracy over positions; correct: (items, K), 0 or 1."""
    return float(np.ptp(correct.mean(0)))


def shuffled_p(correct: Array, seed: int = 0) -> float:
    """How often hits (items, K) that are shuffled inside each item spread as much as these, or more; in (0, 1]."""
    rng, more, block = np.random.default_rng(seed), 0, 50
    for _ in range(SHUFFLES // block):
        shuffled = rng.permuted(np.broadcast_to(correct, (block, *correct.shape)), axis=2)  # (block, items, K)
        more += int((np.ptp(shuffled.mean(1), axis=1) >= spread(correct) - 1e-12).sum())
    return (1 + more) / (1 + SHUFFLES)


def deviation(letters: Sequence[float]) -> float:
    """Total variation distance of probabilities (K,) from the uniform ones: 0 for uniform, 1 - 1/K for one letter."""
    return sum(abs(p - 1 / len(letters)) for p in letters) / 2


def _spread_bounds(correct: Array, plain: Array | None = None) -> tuple[float | None, float | None]:
    """Bootstrap over items of the spread, or of its difference to the plain model's on the same items."""
    n = len(correct)
    if n < 2:
        return None, None
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP) / n  # (R, n)
    values = np.ptp(weights @ correct, axis=1)  # (R,)
    if plain is not None:
        values = values - np.ptp(weights @ plain, axis=1)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = spread(correct) - (0.0 if plain is None else spread(plain))
    return min(float(low), value), max(float(high), value)  # resampled spreads are larger than the sample's


class _Arm:
    """One part under one method: values per item, in the order of the items."""

    def __init__(self, found: Mapping[int, Mapping[str, Any]]) -> None:
        self.items = sorted(found)
        self.n = len(self.items)
        self.correct: Array = np.array([found[i]["correct"] for i in self.items], dtype=np.float64)  # (n, K)
        self.accuracy = [float(row.mean()) for row in self.correct]
        changed = [flips(found[i]["answers"]) for i in self.items]
        self.any, self.pairs = [one for one, _ in changed], [two for _, two in changed]
        self.letters = [found[i]["letters"] for i in self.items if "letters" in found[i]]

    def at(self, position: int) -> list[float]:
        """Hits with the right member at this position, per item."""
        return [float(hit) for hit in self.correct[:, position]]

    def prior(self, letter: int) -> list[float]:
        return [one[letter] for one in self.letters]

    def powerful(self, chance: float) -> bool:
        """Whether the accuracy over all positions is above chance."""
        low, _ = share(self.accuracy)
        return low is not None and low > chance + 1e-9  # a mean of shares may be off by a rounding error


# the probe


class Order(Probe):
    name: ClassVar[str] = "order"
    asks: ClassVar[str] = "Does the answer change when the same documents, or the same options, come in another order?"
    reading: ClassVar[str] = (
        "Flip rate 0 %: the same answer in every order. Accuracy by position tells whether the place of the right one "
        "matters: a U means that the middle is overlooked. p: how often chance alone spreads accuracy as much. Letters "
        "of options that say nothing should be equally likely; what is left is a habit. Without accuracy above chance "
        "a model mostly guesses: its flips say nothing of order, and no remedy is judged."
    )
    finding: ClassVar[str] = (
        "Set-Based Prompting (arXiv 2406.06581): answers of GPT-2, Llama and Mistral no longer depend on the order of "
        "options, and accuracy mostly stays between that of the best and the worst order. PINE (arXiv 2407.01100): 8 "
        "to 10 points more on RewardBench's reasoning pairs in most cases, with models that are strong already."
    )

    def facts(self, settings: Settings) -> dict[str, Any]:
        return {
            "remedies": [str(method) for method in self.remedies(settings)],
            "items": {part: len(items) for part, items in self.parts(settings)[0].items()},
        }

    def remedies(self, settings: Settings) -> list[Method]:
        """Those asked for, else the order methods of the package that need to know of a set or a question, no more."""
        if settings.remedies:
            return [method for method in parse_methods(settings.remedies) if str(method) != PLAIN]
        known = [kind for _, kind in sorted(load_methods().items()) if kind.__module__.startswith(ORDER_WING)]
        own = [kind() for kind in known if all(spec.default is not MISSING for spec in fields(kind))]
        return [method for method in own if method.facts() and method.facts() <= {"set", "part"}]

    def parts(self, settings: Settings) -> tuple[dict[str, list[Item]], list[str]]:
        """The items by part, and notes on them."""
        n = settings.items or ITEMS
        if settings.task is None:
            return {DOCUMENTS: documents(n, settings.seed), OPTIONS: options(n, settings.seed)}, []
        found = read_items(settings.task)
        left = [
            f"{part}: the first {n} of {len(items)} lines; --items {len(items)} takes all"
            for part, items in found.items()
            if len(items) > n
        ]
        return {part: items[:n] for part, items in found.items()}, left

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, progress: Progress
    ) -> None:
        remedies, (parts, _) = self.remedies(settings), self.parts(settings)
        progress.plan(sum(map(len, parts.values())) * (1 + len(remedies)))
        for part, items in parts.items():
            found = {}
            for i, item in enumerate(items):
                where = f"{part}, item {i + 1} of {len(items)}"
                ask = partial(_plain, model, tokenizer, part, item, where)
                found[i] = progress.once(f"{part}/{PLAIN}/{i}", f"{where}: plain model", ask)
            if not _Arm(found).powerful(_chance(items)):
                progress.skip(len(items) * len(remedies))
                continue
            failed = {str(method) for method in remedies if f"{part}/{method}" in progress.records}
            progress.skip(len(items) * len(failed))
            for i, item in enumerate(items):
                for method in remedies:
                    name, where = str(method), f"{part}, item {i + 1} of {len(items)}: {method}"
                    if name not in failed:
                        try:
                            ask = partial(_measured, model, tokenizer, part, item, method)
                            progress.once(f"{part}/{name}/{i}", where, ask)
                        except Exception as error:
                            failed.add(name)
                            progress.keep(f"{part}/{name}", {"failed": reason(error)})
                            progress.skip(len(items) - i)

    def result(self, settings: Settings, records: Mapping[str, Any]) -> Result:
        parts, notes = self.parts(settings)
        names = [str(method) for method in self.remedies(settings)]
        rows: list[Row] = []
        verdicts: list[Verdict] = []
        for part, items in parts.items():
            arms = {name: _found(records, part, name, len(items)) for name in [PLAIN, *names]}
            if not arms[PLAIN]:
                continue
            plain, chance = _Arm(arms[PLAIN]), _chance(items)
            rows += _rows(part, PLAIN, plain, None, chance)
            verdicts.append(_verdict(part, plain, chance))
            for name in names:
                if not plain.powerful(chance):
                    why = f"{NO_POWER}: the plain model's accuracy is not above chance"
                    rows.append(Row(part, name, "accuracy", status="not judged", reason=why))
                elif f"{part}/{name}" in records:
                    why = records[f"{part}/{name}"]["failed"]
                    rows.append(Row(part, name, "accuracy", status="failed", reason=why))
                elif arms[name]:  # a stopped run may have measured the plain model further
                    ours, same = _Arm(arms[name]), _Arm({i: arms[PLAIN][i] for i in arms[name]})
                    rows += _rows(part, name, ours, same, chance)
                    verdicts.append(_effect(part, name, ours, same, chance))
        if not names:
            notes = [*notes, "no remedy was judged; --remedy takes methods"]
        return Result(verdicts, rows, notes)


def _chance(items: Sequence[Item]) -> float:
    return 1 / len(items[0].choices) if items[0].choices else 0.0


def _found(records: Mapping[str, Any], part: str, method: str, n: int) -> dict[int, Any]:
    return {i: records[f"{part}/{method}/{i}"] for i in range(n) if f"{part}/{method}/{i}" in records}


def _plain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, part: str, item: Item, where: str
) -> dict[str, Any]:
    try:
        return _measured(model, tokenizer, part, item, None)
    except SeqwiseError:
        raise
    except Exception as error:
        raise UsageError(f"the plain model fails on {where}: {reason(error)}") from error


def _measured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, part: str, item: Item, method: Method | None
) -> dict[str, Any]:
    """One item in all its orders: the answer and whether it is right, by the position of the right member."""
    K = len(item.members)
    asked = [prompt(part, item.question, rotated(item.members, item.gold, p), item.prefix) for p in range(K)]
    if not item.choices:
        texts = replies(model, tokenizer, asked, method)
        hits = [int(answered(text, item.answer)) for text in texts]
        plain = [" ".join(text.casefold().split()) for text in texts]
        # another wording of the right answer is no flip
        said = [item.answer if hit else text for text, hit in zip(plain, hits, strict=True)]
        return {"answers": said, "correct": hits}
    best = choice_logps(model, tokenizer, asked, item.choices, method).argmax(-1).tolist()
    found: dict[str, Any] = {"answers": best, "correct": [int(answer == item.gold) for answer in best]}
    if part == OPTIONS:
        empty = choice_logps(model, tokenizer, [content_free(item.question, K)], LETTERS[:K], method)
        found["letters"] = [round(p, 6) for p in empty[0].softmax(-1).tolist()]
    return found


def _rows(part: str, method: str, arm: _Arm, plain: _Arm | None, chance: float) -> list[Row]:
    """All numbers of one part under one method; plain: the plain model on the same items, None for itself."""

    def row(group: str, what: str, values: Callable[[_Arm], Sequence[float]], *, hits: bool = False) -> Row:
        ours = values(arm)
        low, high = share(ours)
        difference = None if plain is None else paired(ours, values(plain), hits=hits)
        return Row(group, method, what, sum(ours) / len(ours), low, high, len(ours), difference)

    p = shuffled_p(arm.correct)
    low, high = _spread_bounds(arm.correct)
    change: dict[str, float | None] | None = None
    if plain is not None:
        bounds = _spread_bounds(arm.correct, plain.correct)
        change = {"value": spread(arm.correct) - spread(plain.correct), "low": bounds[0], "high": bounds[1]}
    places = f"{part}: accuracy by position of the right one"
    rows = [
        row(part, "accuracy", lambda a: a.accuracy),
        row(part, "flip rate", lambda a: a.any, hits=True),
        row(part, "pairs that differ", lambda a: a.pairs),
        Row(part, method, "best - worst", spread(arm.correct), low, high, arm.n, change, note=f"p = {p:.2g}"),
        *(row(places, f"{k + 1}", partial(_Arm.at, position=k), hits=True) for k in range(arm.correct.shape[1])),
    ]
    if arm.letters:
        group = 'options: probability of letters where all options read "N/A"'
        rows.append(row(group, "deviation", lambda a: [deviation(one) for one in a.letters]))
        rows += [row(group, LETTERS[k], partial(_Arm.prior, letter=k)) for k in range(len(arm.letters[0]))]
    return rows


def _verdict(part: str, arm: _Arm, chance: float) -> Verdict:
    low, high = share(arm.accuracy)
    accuracy = f"accuracy {_percent(arm.accuracy)}{_span(low, high)}, chance {chance:.0%}"
    if not arm.powerful(chance):
        return Verdict(part, PLAIN, NO_POWER, f"{accuracy}: not above chance, so nothing is said of order")
    below, above = share(arm.pairs)
    word = DEPENDS if below is not None and below > 0 else NOT_FOUND
    p, by_place = shuffled_p(arm.correct), [f"{a:.0%}" for a in arm.correct.mean(0)]
    pattern = "differs" if p < 0.05 else "does not clearly differ"
    return Verdict(
        part,
        PLAIN,
        word,
        f"answers change in {sum(arm.any):.0f} of {arm.n} items, {_percent(arm.pairs)}{_span(below, above)} of pairs "
        f"differ; accuracy {pattern} by position ({', '.join(by_place)}; p = {p:.2g}); {accuracy}",
    )


def _effect(part: str, method: str, arm: _Arm, plain: _Arm, chance: float) -> Verdict:
    pairs, accuracy = paired(arm.pairs, plain.pairs), paired(arm.accuracy, plain.accuracy)
    words = {-1: "less dependent on order", 0: "no change of dependence found", 1: "more dependent on order"}
    more = {-1: "accuracy falls", 0: "no change of accuracy found", 1: "accuracy rises"}
    same = "the same answer in every order of every item; " if not any(arm.any) else ""
    low, high = share(arm.accuracy)
    guess = (
        f"; its accuracy, {_percent(arm.accuracy)}{_span(low, high)}, is not above chance: it may have lost the task"
    )
    return Verdict(
        part,
        method,
        f"{words[_sign(pairs)]}, {more[_sign(accuracy)]}",
        f"{same}pairs that differ {_points(pairs)}, accuracy {_points(accuracy)} against the plain model, "
        f"{arm.n} items{'' if arm.powerful(chance) else guess}",
    )


def _sign(difference: Mapping[str, float | None]) -> int:
    """-1, 1 where the interval lies below or above 0, else 0."""
    low, high = difference["low"], difference["high"]
    return 0 if low is None or high is None else int(low > 0) - int(high < 0)


def _percent(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.0%}"


def _span(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{low:.0%}, {high:.0%}]"


def _points(difference: Mapping[str, float | None]) -> str:
    value, low, high = (None if x is None else 100 * x for x in difference.values())
    return f"{value:+.0f} points" + ("" if low is None or high is None else f" [{low:+.0f}, {high:+.0f}]")
