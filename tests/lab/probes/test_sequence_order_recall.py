"""Recall of order with and without the text, on models whose answers are known, and on a random one under remedies."""

from __future__ import annotations

import json

import pytest
import torch

import seqwise.lab.probes.sequence_order_recall as probe
from seqwise.core.errors import UsageError
from seqwise.lab.probes._remedies import DEFAULT
from seqwise.lab.probes.base import Progress, Settings
from seqwise.lab.probes.sequence_order_recall import (
    INSIDE,
    NOT_FOUND,
    RECALLS,
    WITHOUT,
    SequenceOrderRecall,
    items,
)
from seqwise.lab.rows import PLAIN

LINES = [
    {"text": "one two three four five six seven", "first": "two", "second": "six seven"},
    {"text": "Ann came. Tom left.\nZoe stayed.", "first": "Ann came.", "second": "Tom left."},
    {"text": "a b c d e f", "first": "b c", "second": "d"},
]


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)) + "\n\n")
    return str(path)


def answering(monkeypatch, rule):
    """rule(text or "", first, second, method) -> log-odds of A."""

    def choice_logps(model, tokenizer, asked, choices, method=None):
        assert choices == ("A", "B")
        odds = []
        for one in asked:
            parts = {part["type"]: part for part in one.messages[0]["content"]}
            shown = [text.split(": ", 1)[1].strip() for text in parts["set"]["items"]]
            odds.append(rule(parts.get("context", {"text": ""})["text"], *shown, method))
        return torch.tensor([[x, 0.0] for x in odds])

    monkeypatch.setattr(probe, "choice_logps", choice_logps)


def run(settings, records=None):
    return SequenceOrderRecall().run(None, None, settings, Progress(records if records is not None else {}))


def value(result, group, method, what):
    (row,) = [r for r in result.rows if (r.group, r.method, r.what) == (group, method, what)]
    return row.value


def searches(text, first, second, method):
    return float(text.find(second) - text.find(first))


def test_a_model_that_searches_the_text_recalls(monkeypatch):
    answering(monkeypatch, searches)
    result = run(Settings(remedies=("Full()",), items=12))
    assert value(result, INSIDE, PLAIN, "accuracy") == 1.0 and value(result, INSIDE, PLAIN, "fixed label") == 0.0
    assert value(result, INSIDE, PLAIN, "A is said") == 0.5
    assert value(result, WITHOUT, PLAIN, "accuracy") == 0.5 and value(result, WITHOUT, PLAIN, "fixed label") == 1.0
    (verdict,) = result.verdicts
    assert verdict.verdict == RECALLS and "100%" in verdict.reading and "+100 points" in verdict.reading


def test_a_model_that_says_a_does_not(monkeypatch):
    answering(monkeypatch, lambda text, first, second, method: 3.0)
    result = run(Settings(remedies=("Full()",), items=12))
    assert value(result, INSIDE, PLAIN, "accuracy") == 0.5 and value(result, INSIDE, PLAIN, "A is said") == 1.0
    assert value(result, INSIDE, PLAIN, "fixed label") == 1.0
    assert result.verdicts[0].verdict == NOT_FOUND


def test_what_a_habit_hides_is_seen_without_it(monkeypatch):
    """Log-odds of A: 3 from habit, 1 from recall."""
    answering(monkeypatch, lambda *a: 3.0 + (1.0 if searches(*a) > 0 else -1.0))
    result = run(Settings(remedies=("Full()",), items=12))
    assert value(result, INSIDE, PLAIN, "accuracy") == 0.5
    assert value(result, INSIDE, PLAIN, "accuracy without the habit") == 1.0
    assert value(result, WITHOUT, PLAIN, "accuracy without the habit") == 0.0, "equal margins tell nothing"
    assert result.verdicts[0].verdict == RECALLS


def test_remedies_are_compared_item_by_item(monkeypatch):
    """Plain: always A. With the remedy: the order of the text."""
    answering(monkeypatch, lambda *a: 1.0 if a[3] is None else searches(*a))
    result = run(Settings(remedies=("PINE()",), items=12))
    assert value(result, INSIDE, "PINE()", "fixed label") == 0.0
    (row,) = [r for r in result.rows if (r.method, r.what) == ("PINE()", "fixed label")]
    assert row.difference["value"] == -1.0 and row.difference["high"] < 0
    effect = result.verdicts[1]
    assert (effect.method, effect.verdict) == ("PINE()", "showing decides less often, recall rises")
    assert not [r for r in result.rows if r.method == "PINE()" and r.group == WITHOUT]


def test_a_remedy_that_fails_is_a_row_and_the_rest_goes_on(monkeypatch):
    def rule(text, first, second, method):
        if method is not None and "SetBased" in str(method):
            raise RuntimeError("no such thing")
        return searches(text, first, second, method)

    answering(monkeypatch, rule)
    records = {}
    result = run(Settings(items=4), records)
    (row,) = [r for r in result.rows if r.status == "failed"]
    assert row.method == "SetBasedPrompting()" and "RuntimeError: no such thing" in row.reason and result.failed
    assert {v.method for v in result.verdicts} == {PLAIN, "PINE()", "JustReadTwice()"}
    answering(monkeypatch, lambda *a: 1 / 0)
    assert run(Settings(items=4), records).rows == result.rows, "nothing is measured twice"


def test_a_plain_model_that_fails_says_where(monkeypatch):
    answering(monkeypatch, lambda *a: 1 / 0)
    with pytest.raises(UsageError, match="the plain model fails on text in the prompt, item 1 of 4: ZeroDivisionError"):
        run(Settings(items=4))


def test_items_are_passages_in_the_order_of_the_text():
    found = items(13, 0)
    assert len(found) == 13 and [one.bin for one in found[:4]] == ["near", "far"] * 2
    for one in found:
        words = one.text.split()
        places = [one.text.find(part) for part in (one.first, one.second)]
        assert 0 <= places[0] < places[1] and len(words) == probe.EXCERPT
    assert items(13, 0) == found and items(13, 1) != found


def test_own_items(task):
    settings = Settings(task=task, items=2)
    found, notes = SequenceOrderRecall().items(settings)
    assert [one.bin for one in found] == ["far", "near"] and found[1].text == "Ann came. Tom left. Zoe stayed."
    assert notes == ["the first 2 of 3 lines; --items 3 takes all"]
    assert SequenceOrderRecall().facts(settings) == {"remedies": list(DEFAULT), "items": 2}


@pytest.mark.parametrize(
    "change, told",
    [
        ({"text": ""}, "field 'text' must be a text that is not empty, got ''"),
        ({"first": None}, "field 'first' must be a text"),
        ({"second": "tw"}, r"field 'second' must be a passage in whole words that occurs once in 'text' \(0 times"),
        ({"text": "two one two six seven"}, r"field 'first' .* \(2 times there\)"),
        ({"first": "six seven", "second": "two"}, "field 'second' must be a passage that comes after 'first'"),
    ],
    ids=str,
)
def test_own_items_that_are_wrong_name_line_and_field(tmp_path, change, told):
    path = tmp_path / "own.jsonl"
    path.write_text(f"{json.dumps(LINES[1])}\n\n{json.dumps({**LINES[0], **change})}\n")
    with pytest.raises(UsageError, match=f"own.jsonl, line 3: {told}"):
        SequenceOrderRecall().facts(Settings(task=str(path)))


def test_a_random_model_under_the_remedies(tiny, task):
    records = {}
    result = SequenceOrderRecall().run(*tiny, Settings(task=task), Progress(records))
    assert not result.failed and {v.method for v in result.verdicts} == {PLAIN, *DEFAULT}
    for i in range(len(LINES)):
        margins = [records[f"{INSIDE}/{name}/{i}"]["margins"] for name in (PLAIN, *DEFAULT)]
        assert len({tuple(one) for one in margins}) == 4, "each remedy takes part"
    assert records[f"{INSIDE}/{PLAIN}/0"] != records[f"{WITHOUT}/{PLAIN}/0"]
    assert len(records) == len(LINES) * 5
