"""Does the model read a sentence, or a bag of its words? Captions of a scene against the same words reordered.

    score      s(scene, c) = mean log-probability per token of c as the reply to the described scene
    relation   "the X is left of the Y" against its sides swapped; the description says it the other way round
    attribution  "the A X and the B Y" against its adjectives swapped
    order      a caption against four perturbations of its words
    accuracy   credit of the true caption, shared among equal scores; also without the scene, where only fluency helps

Tasks and perturbations are those of arXiv 2210.01936, with the scene in words instead of an image. The sentences of a
description are a marked set: their order says nothing, so a remedy may take it away.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seqwise.core.method import Method
from seqwise.insight.probe.bags_of_words import credit, macro_average, order_options, words_of
from seqwise.lab.probes import _remedies as shared
from seqwise.lab.probes.base import Asked, Probe, Progress, Result, Row, Settings, Verdict, choice_logps, share
from seqwise.lab.probes.lines import Line, read_lines
from seqwise.lab.probes.order import KINDS
from seqwise.lab.rows import PLAIN

ITEMS = 4  # per part; each caption is a row of its own
RELATION, ATTRIBUTION, ORDER = "relation", "attribution", "order"
PARTS = (RELATION, ATTRIBUTION, ORDER)
BLIND = "without the scene"
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
ADJECTIVES = ("red", "blue", "green", "white", "black", "yellow", "old", "new", "small", "large")
THINGS = (*KINDS["animal"], *KINDS["fruit"], *KINDS["tool"])
VERBS = ("sleeps", "stands", "waits", "lies")
TOLERANCE = 1e-6  # nats per token: what counts as equal
USES, FLUENT, NOT_FOUND = "uses order", "solved by fluency alone", "no use of order found at this size"
FORM = (
    '{"description": text or list of texts, "caption": text, "swapped": text, "kind": "relation" or "attribution"} or '
    '{"description": ..., "caption": text, "tags": [one per word]}'
)


@dataclass(frozen=True)
class Item:
    """A scene in sentences, and captions of the same words, the true one first. group: for the average over groups."""

    scene: tuple[str, ...]
    options: tuple[str, ...]
    group: str = ""


# data that needs no download; item i depends on (seed, i) alone


def relations(n: int, seed: int) -> list[Item]:
    """Two pairs of things, each beside or above one another; the caption is about one pair."""
    found = []
    for i in range(n):
        draw = random.Random(f"bags relation {seed} {i}")
        x, y, z, w = draw.sample(THINGS, 4)
        relation = tuple(CONVERSE)[i % len(CONVERSE)]
        scene = [f"The {y} is {CONVERSE[relation]} the {x}.", f"The {z} is {draw.choice(tuple(CONVERSE))} the {w}."]
        draw.shuffle(scene)
        found.append(Item(tuple(scene), (f"the {x} is {relation} the {y}", f"the {y} is {relation} the {x}"), relation))
    return found


def attributes(n: int, seed: int) -> list[Item]:
    """Two things with a property each."""
    found = []
    for i in range(n):
        draw = random.Random(f"bags attribution {seed} {i}")
        (x, y), (a, b) = draw.sample(THINGS, 2), draw.sample(ADJECTIVES, 2)
        scene = [f"The {x} is {a}.", f"The {y} is {b}."]
        draw.shuffle(scene)
        found.append(Item(tuple(scene), (f"the {a} {x} and the {b} {y}", f"the {b} {x} and the {a} {y}"), f"{a}, {b}"))
    return found


def orders(n: int, seed: int) -> list[Item]:
    """Captions with two things, their properties and a relation, and their perturbations."""
    found: list[Item] = []
    i = 0
    while len(found) < n:
        draw = random.Random(f"bags order {seed} {i}")
        (x, y), (a, b) = draw.sample(THINGS, 2), draw.sample(ADJECTIVES, 2)
        verb, relation = draw.choice(VERBS), draw.choice(("above", "below", "behind", "near"))
        words = ["the", a, x, verb, relation, "the", b, y]
        tags = ["DT", "JJ", "NN", "VBZ", "IN", "DT", "JJ", "NN"]
        options = order_options(words, tags, np.random.default_rng([seed, i]))
        i += 1
        if options is not None:
            scene = [f"The {x} is {a}.", f"The {y} is {b}.", f"The {x} {verb} {relation} the {y}."]
            found.append(Item(tuple(scene), tuple(" ".join(one) for one in options)))
    return found


def _line(line: Line) -> tuple[str, Item]:
    if "image" in line.fields:
        raise line.fail("image", "left out: a language model sees no image, put the scene into 'description'")
    described = line.fields.get("description")
    scene = line.texts("description") if isinstance(described, list) else [line.text("description")]
    caption = line.text("caption")
    if "swapped" in line.fields:
        kind = line.fields.get("kind", RELATION)
        if kind not in (RELATION, ATTRIBUTION):
            raise line.fail("kind", f"{RELATION!r} or {ATTRIBUTION!r}")
        true, false = (" ".join(words_of(one)) for one in (caption, line.text("swapped")))
        if sorted(true.split()) != sorted(false.split()) or true == false:
            raise line.fail("swapped", "the words of 'caption' in another order")
        group = line.text("group") if "group" in line.fields else ""
        return kind, Item(tuple(scene), (true, false), group)
    words = words_of(caption)
    tags = line.texts("tags") if "tags" in line.fields else None
    if tags is not None and len(tags) < len(words):
        raise line.fail("tags", f"one Penn Treebank tag per word of 'caption', {len(words)}")
    # drawn from the caption itself, so that other lines change nothing
    rng = np.random.default_rng(list(caption.encode()))
    options = order_options(words, None if tags is None else tags[: len(words)], rng)
    if options is None:
        raise line.fail("caption", "a text that each perturbation can change (two nouns or adjectives, four words)")
    return ORDER, Item(tuple(scene), tuple(" ".join(one) for one in options))


class BagsOfWords(Probe):
    name: ClassVar[str] = "bags-of-words"
    asks: ClassVar[str] = "Does the model use the order of words, or would a bag of them do?"
    reading: ClassVar[str] = (
        "Accuracy: how often the true caption of a scene is the likeliest among the same words in other orders; a bag "
        "of words gets chance, 50 % for relation and attribution, 20 % for order (33 % without tags). What is reached "
        "without the scene is fluency: only the difference says that the scene was read. Relation and attribution "
        "cannot be told by fluency, so they are the harder test. Remedies are judged where the plain model is above "
        "chance."
    )
    finding: ClassVar[str] = (
        "When and why vision-language models behave like bags-of-words (arXiv 2210.01936): CLIP ViT-B/32 gets 0.59 on "
        "relations, 0.62 on attribution and 0.46 on order of captions; with hard captions in its loss 0.81, 0.71, 0.86."
    )

    def facts(self, settings: Settings) -> dict[str, Any]:
        return {
            "remedies": [str(method) for method in shared.remedies(settings)],
            "items": {part: len(items) for part, items in self.parts(settings)[0].items()},
        }

    def parts(self, settings: Settings) -> tuple[dict[str, list[Item]], list[str]]:
        """The items by part, and notes on them."""
        n, seed = settings.items or ITEMS, settings.seed
        if settings.task is None:
            return {RELATION: relations(n, seed), ATTRIBUTION: attributes(n, seed), ORDER: orders(n, seed)}, []
        lines = read_lines(settings.task, _line, FORM)
        found = {part: [item for kind, item in lines if kind == part] for part in PARTS}
        notes = [
            f"{part}: the first {n} of {len(items)} lines; --items {len(items)} takes all"
            for part, items in found.items()
            if len(items) > n
        ]
        return {part: items[:n] for part, items in found.items() if items}, notes

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, progress: Progress
    ) -> None:
        parts, methods = self.parts(settings)[0], shared.remedies(settings)
        progress.plan(sum(map(len, parts.values())) * (2 + len(methods)))
        for part, items in parts.items():

            def ask(i: int, method: Method | None, items: list[Item] = items) -> dict[str, Any]:
                return _measured(model, tokenizer, items[i], items[i].scene, method)

            def blind(i: int, method: Method | None, items: list[Item] = items) -> dict[str, Any]:
                return _measured(model, tokenizer, items[i], (), method)

            plain = shared.measure_plain(progress, part, len(items), ask)
            shared.measure_plain(progress, f"{part}, {BLIND}", len(items), blind)
            if _above(_credits(plain), _chance(items)):
                shared.measure_remedies(progress, part, len(items), ask, methods)
            else:
                progress.skip(len(items) * len(methods))

    def result(self, settings: Settings, records: Mapping[str, Any]) -> Result:
        parts, notes = self.parts(settings)
        rows: list[Row] = []
        verdicts: list[Verdict] = []
        for part, items in parts.items():
            plain = shared.found(records, part, PLAIN, len(items))
            blind = shared.found(records, f"{part}, {BLIND}", PLAIN, len(items))
            if not plain:
                continue
            rows.append(shared.row(part, PLAIN, "accuracy", _credits(plain), note=_macro(plain, items)))
            if blind:
                rows.append(shared.row(part, PLAIN, BLIND, _credits(blind)))
            both = [i for i in plain if i in blind]
            same = _credits({i: plain[i] for i in both}), _credits({i: blind[i] for i in both})
            verdicts.append(_verdict(part, _credits(plain), *same, _chance(items)))
            for method in map(str, shared.remedies(settings)):
                ours = shared.found(records, part, method, len(items))
                if not _above(_credits(plain), _chance(items)):
                    why = "the plain model's accuracy is not above chance"
                    rows.append(Row(part, method, "accuracy", status="not judged", reason=why))
                elif f"{part}/{method}" in records:
                    why = records[f"{part}/{method}"]["failed"]
                    rows.append(Row(part, method, "accuracy", status="failed", reason=why))
                elif ours:
                    arm, before = _credits(ours), _credits({i: plain[i] for i in ours})
                    rows.append(shared.row(part, method, "accuracy", arm, before))
                    verdicts.append(_effect(part, method, arm, before))
        return Result(verdicts, rows, notes)


def _measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    item: Item,
    scene: Sequence[str],
    method: Method | None,
) -> dict[str, Any]:
    """The credit of the true caption, and all scores in nats per token."""
    question = {"type": "question", "text": "Describe the scene in one sentence, in small letters."}
    content: list[dict[str, Any]] = [question]
    if scene:
        told = [f"{sentence}\n" for sentence in scene]
        content = [
            {"type": "text", "text": "A scene:\n"},
            {"type": "set", "items": told},
            {"type": "text", "text": "\n"},
            question,
        ]
    logps = choice_logps(model, tokenizer, [Asked([{"role": "user", "content": content}])], item.options, method)[0]
    scores = [round(float(one), 6) for one in logps]
    return {"credit": float(credit(torch.tensor(scores), tolerance=TOLERANCE)), "scores": scores}


def _credits(found: Mapping[int, Mapping[str, Any]]) -> list[float]:
    return [found[i]["credit"] for i in sorted(found)]


def _macro(found: Mapping[int, Mapping[str, Any]], items: Sequence[Item]) -> str:
    """The average over groups, where there are several with several items."""
    groups = [items[i].group for i in sorted(found)]
    if not all(groups) or not 1 < len(set(groups)) < len(groups):
        return ""
    mean, means = macro_average(_credits(found), groups)
    return f"{mean:.0%} over {len(means)} groups"


def _chance(items: Sequence[Item]) -> float:
    return sum(1 / len(item.options) for item in items) / len(items)


def _above(values: Sequence[float], level: float) -> bool:
    low, _ = share(values)
    return low is not None and low > level + 1e-9


def _verdict(part: str, arm: Sequence[float], same: Sequence[float], blind: Sequence[float], chance: float) -> Verdict:
    said = f"accuracy {shared.percent(arm)}, chance {chance:.0%}"
    if blind:
        said += f"; {shared.percent(blind)} {BLIND}, so the scene adds {shared.points(same, blind)}"
    if not _above(arm, chance):
        return Verdict(part, PLAIN, NOT_FOUND, said)
    fluent = _above(blind, chance) and shared.direction(same, blind) <= 0
    return Verdict(part, PLAIN, FLUENT if fluent else USES, said)


def _effect(part: str, method: str, arm: Sequence[float], plain: Sequence[float]) -> Verdict:
    words = {-1: "accuracy falls", 0: "no change of accuracy found", 1: "accuracy rises"}
    told = f"accuracy {shared.points(arm, plain)} against the plain model, {len(arm)} items"
    return Verdict(part, method, words[shared.direction(arm, plain)], told)
