"""Captions in the wrong order, for scorers whose answers are known and for a random model under remedies."""

from __future__ import annotations

import json

import pytest
import torch

import seqwise.lab.probes.bags_of_words as probe
from seqwise.core.errors import UsageError
from seqwise.lab.probes._remedies import DEFAULT
from seqwise.lab.probes.bags_of_words import (
    ATTRIBUTION,
    BLIND,
    CONVERSE,
    FLUENT,
    NOT_FOUND,
    ORDER,
    PARTS,
    RELATION,
    USES,
    BagsOfWords,
    attributes,
    orders,
    relations,
)
from seqwise.lab.probes.base import Progress, Settings
from seqwise.lab.rows import PLAIN

MADE = {RELATION: relations, ATTRIBUTION: attributes, ORDER: orders}
PAIR = {"description": ["The cat is red.", "The dog is old."], "caption": "The red cat and the old dog"}
LINES = [
    {**PAIR, "swapped": "the old cat and the red dog", "kind": "attribution", "group": "red, old"},
    {"description": "B is right of A.", "caption": "A is left of B", "swapped": "B is left of A"},
    {"description": "A cat runs.", "caption": "a small cat runs over the road"},
]


def reads(scene, caption):
    """The relation or the properties of the scene; of other orders the one of a template."""
    words = caption.split()
    if " and the " in caption:
        return all(f"the {words[i + 1]} is {words[i]}." in scene for i in (1, 5))
    for relation in CONVERSE:
        first, found, second = caption.removeprefix("the ").partition(f" is {relation} the ")
        if found:
            return f"the {second} is {CONVERSE[relation]} the {first}." in scene
    if len(words) != 8:
        return False
    told = (f"the {words[2]} is {words[1]}.", f"the {words[2]} {words[3]} {words[4]} the {words[7]}.")
    return words[0] == words[5] == "the" and all(one in scene for one in told)


def answering(monkeypatch, score):
    """score(scene, caption, method) -> nats."""

    def choice_logps(model, tokenizer, asked, choices, method=None):
        (one,) = asked
        sets = [part["items"] for part in one.messages[0]["content"] if part["type"] == "set"]
        scene = "".join(sets[0]).lower() if sets else ""
        return torch.tensor([[score(scene, choice, method) for choice in choices]])

    monkeypatch.setattr(probe, "choice_logps", choice_logps)


def run(settings, records=None):
    return BagsOfWords().run(None, None, settings, Progress(records if records is not None else {}))


def value(result, part, method, what="accuracy"):
    (row,) = [r for r in result.rows if (r.group, r.method, r.what) == (part, method, what)]
    return row.value


def test_a_reader_gets_all_and_nothing_without_the_scene(monkeypatch):
    answering(monkeypatch, lambda scene, caption, method: float(reads(scene, caption)))
    result = run(Settings(items=12, remedies=("Full()",)))
    for part, chance in ((RELATION, 0.5), (ATTRIBUTION, 0.5), (ORDER, 0.2)):
        assert value(result, part, PLAIN) == 1.0 and value(result, part, PLAIN, BLIND) == pytest.approx(chance)
    assert [one.verdict for one in result.verdicts] == [USES] * 3


def test_a_bag_of_words_gets_chance_and_no_remedy_is_judged(monkeypatch):
    answering(monkeypatch, lambda scene, caption, method: -float(len(caption)) / 7)
    records = {}
    result = run(Settings(items=12), records)
    for part, chance in ((RELATION, 0.5), (ATTRIBUTION, 0.5), (ORDER, 0.2)):
        assert value(result, part, PLAIN) == pytest.approx(chance)
    assert [one.verdict for one in result.verdicts] == [NOT_FOUND] * 3
    assert len(records) == 2 * 3 * 12 and {row.status for row in result.rows if row.method != PLAIN} == {"not judged"}


def test_fluency_alone_is_told_apart(monkeypatch):
    """It likes captions of the template, seen or not."""
    answering(monkeypatch, lambda scene, caption, method: float(caption.split()[0] == caption.split()[-3] == "the"))
    result = run(Settings(items=30, remedies=("Full()",)))
    assert {one.part: one.verdict for one in result.verdicts} == {
        RELATION: NOT_FOUND,
        ATTRIBUTION: NOT_FOUND,
        ORDER: FLUENT,
    }
    assert value(result, ORDER, PLAIN) == value(result, ORDER, PLAIN, BLIND)


def test_remedies_are_compared_item_by_item(monkeypatch):
    def score(scene, caption, method):
        if method is not None and "JustRead" in str(method):
            raise RuntimeError("no such thing")
        return float(reads(scene, caption)) if method is None else 0.0

    answering(monkeypatch, score)
    result = run(Settings(items=12, remedies=("PINE()", "JustReadTwice()")))
    (row,) = [r for r in result.rows if (r.group, r.method) == (RELATION, "PINE()")]
    assert row.value == 0.5 and row.difference["value"] == -0.5
    assert [v.verdict for v in result.verdicts if v.method == "PINE()"] == ["accuracy falls"] * 3
    failed = [r for r in result.rows if r.status == "failed"]
    assert [r.group for r in failed] == list(PARTS) and "RuntimeError: no such thing" in failed[0].reason


@pytest.mark.parametrize("part", PARTS)
def test_items_hold_one_true_caption_of_the_same_words(part):
    found = MADE[part](24, 5)
    assert found[:7] == MADE[part](7, 5) and found[:7] != MADE[part](7, 6)
    for item in found:
        scene = "\n".join(item.scene).lower()
        assert [reads(scene, option) for option in item.options][:1] == [True]
        assert len({tuple(sorted(option.split())) for option in item.options}) == 1
        assert len(set(item.options)) == len(item.options) == (5 if part == ORDER else 2)
        if part != ORDER:
            assert not reads(scene, item.options[1])
    assert part == ORDER or len({item.group for item in found}) > 3


def test_the_average_over_groups_stands_beside(monkeypatch):
    answering(monkeypatch, lambda scene, caption, method: float(reads(scene, caption) and "left" in caption))
    result = run(Settings(items=6, remedies=("Full()",)))
    (row,) = [r for r in result.rows if (r.group, r.what) == (RELATION, "accuracy")]
    assert row.value == pytest.approx((2 * 1 + 4 * 0.5) / 6) and row.note == "62% over 4 groups"


def test_own_items(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, [*LINES, LINES[1]])))
    parts, notes = BagsOfWords().parts(Settings(task=str(path), items=1))
    assert {part: len(items) for part, items in parts.items()} == dict.fromkeys(PARTS, 1)
    assert parts[ATTRIBUTION][0].options == ("the red cat and the old dog", "the old cat and the red dog")
    assert parts[RELATION][0].scene == ("B is right of A.",) and len(parts[ORDER][0].options) == 3
    assert notes == ["relation: the first 1 of 2 lines; --items 2 takes all"]
    alone = tmp_path / "alone.jsonl"
    alone.write_text(json.dumps(LINES[2]))
    assert BagsOfWords().parts(Settings(task=str(alone)))[0][ORDER] == parts[ORDER]


@pytest.mark.parametrize(
    "change, told",
    [
        ({"description": []}, "field 'description' must be a list of 1 or more texts"),
        ({"description": ""}, "field 'description' must be a text that is not empty"),
        ({"caption": None}, "field 'caption' must be a text"),
        ({"swapped": "the red cat and the dog"}, "field 'swapped' must be the words of 'caption' in another order"),
        ({"swapped": PAIR["caption"]}, "field 'swapped' must be the words"),
        ({"kind": "other"}, "field 'kind' must be 'relation' or 'attribution', got 'other'"),
        ({"image": "a.png"}, "field 'image' must be left out: a language model sees no image"),
    ],
    ids=str,
)
def test_own_items_that_are_wrong_name_line_and_field(tmp_path, change, told):
    path = tmp_path / "own.jsonl"
    path.write_text(f"\n{json.dumps({**LINES[0], **change})}\n")
    with pytest.raises(UsageError, match=f"own.jsonl, line 2: {told}"):
        BagsOfWords().facts(Settings(task=str(path)))


@pytest.mark.parametrize(
    "line, told",
    [
        (
            {"description": "x", "caption": "one two"},
            "field 'caption' must be a text that each perturbation can change",
        ),
        (
            {"description": "x", "caption": "a b c d", "tags": ["DT"]},
            "field 'tags' must be one Penn Treebank tag per word",
        ),
    ],
)
def test_captions_without_other_orders_are_refused(tmp_path, line, told):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"description": "x", **line}))
    with pytest.raises(UsageError, match=f"own.jsonl, line 1: {told}"):
        BagsOfWords().facts(Settings(task=str(path)))


def test_a_random_model_under_the_remedies(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "_above", lambda values, level: True)
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(LINES[0]))
    records = {}
    result = BagsOfWords().run(*tiny, Settings(task=str(path)), Progress(records))
    assert not result.failed and len(records) == 5
    scores = {tuple(record["scores"]) for record in records.values()}
    assert len(scores) == 5, "each remedy takes part, and so does the scene"
    assert {row.method for row in result.rows} == {PLAIN, *DEFAULT}
