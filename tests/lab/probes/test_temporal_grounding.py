"""Timelines of models whose answers are known, and of a random one."""

from __future__ import annotations

import json

import pytest
import torch

import seqwise.lab.probes.temporal_grounding as probe
from seqwise.core.errors import UsageError
from seqwise.lab.probes.base import Progress, Settings
from seqwise.lab.probes.temporal_grounding import (
    BY_TELLING,
    CONSISTENT,
    GROUP,
    INCONSISTENT,
    TOLD,
    UNCLEAR,
    WRONG,
    TemporalGrounding,
    items,
)

LINE = {"story": "A came. Then B came.", "question": "Did A come before B?", "answer": "Yes"}


def truth(story, question):
    """The right answer, from the words alone."""
    acts = [act for act in probe.ACTS if act in story]
    acts.sort(key=story.index)
    if "Before that" in story:
        acts[:2] = acts[1::-1]
    asked = sorted((act for act in acts if act in question), key=question.index)
    second, first = (acts.index(act) for act in asked)
    return (first < second) == (" before " in question)


def answering(monkeypatch, rule):
    def choice_logps(model, tokenizer, asked, choices, method=None):
        assert choices == ("yes", "no") and method is None
        rows = []
        for one in asked:
            story, question = (part["text"] for part in one.messages[0]["content"])
            rows.append([0.0, -1.0] if rule(story, question) else [-1.0, 0.0])
        return torch.tensor(rows)

    monkeypatch.setattr(probe, "choice_logps", choice_logps)


def run(settings=None, records=None):
    settings = settings or Settings()
    return TemporalGrounding().run(None, None, settings, Progress(records if records is not None else {}))


@pytest.mark.parametrize(
    "rule, verdict, shares",
    [
        (truth, CONSISTENT, (1, 0, 0, 1, 0.5)),
        (lambda s, q: not truth(s, q), WRONG, (0, 0, 1, 0, 0.5)),
        (lambda s, q: True, INCONSISTENT, (0, 1, 0, 0.5, 1)),
        (lambda s, q: False, INCONSISTENT, (0, 1, 0, 0.5, 0)),
        (lambda s, q: truth(s, q) if "Then" in s else not truth(s, q), UNCLEAR, (0.5, 0, 0.5, 0.5, 0.5)),
    ],
    ids=["right", "wrong", "yes", "no", "order of telling"],
)
def test_timelines(monkeypatch, rule, verdict, shares):
    answering(monkeypatch, rule)
    result = run()
    assert [row.value for row in result.rows if row.group == GROUP] == list(shares)
    assert [one.verdict for one in result.verdicts] == [verdict]
    told = {row.what: row.value for row in result.rows if row.group == BY_TELLING}
    assert set(told) == set(TOLD[:2]) and (told[TOLD[0]] + told[TOLD[1]]) / 2 == shares[0]


def test_items_have_one_right_answer_and_all_kinds():
    found = items(48, 3)
    assert all(one.yes == truth(one.story, one.question) for one in found)
    kinds = [(one.told, " before " in one.question, one.yes) for one in found]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(kinds, 6) and len(set(kinds)) == 8
    assert items(5, 3) == found[:5] and items(5, 4) != found[:5]


def test_own_items(tmp_path, monkeypatch):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps(LINE | {"answer": a}) for a in ("Yes", "no", "NO")))
    answering(monkeypatch, lambda s, q: "before" in q)
    result = run(Settings(task=str(path), items=2))
    assert [row.value for row in result.rows[:3]] == [0.5, 0.0, 0.5] and len(result.rows) == 5
    assert result.notes == ["the first 2 of 3 lines; --items 3 takes all"]


@pytest.mark.parametrize(
    "change, told",
    [
        ({"story": " "}, "field 'story' must be a text that is not empty"),
        ({"answer": "maybe"}, "field 'answer' must be 'yes' or 'no', got 'maybe'"),
        ({"question": "When?"}, "field 'question' must be a text with 'before' or 'after', got 'When[?]'"),
    ],
    ids=str,
)
def test_own_items_that_are_wrong_name_line_and_field(tmp_path, change, told):
    path = tmp_path / "own.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n{json.dumps(LINE | change)}\n")
    with pytest.raises(UsageError, match=f"own.jsonl, line 2: {told}"):
        TemporalGrounding().facts(Settings(task=str(path)))


def test_a_random_model_and_a_stopped_run(tiny):
    records = {}
    result = TemporalGrounding().run(*tiny, Settings(items=3), Progress(records))
    assert len(records) == 3 and sum(row.value for row in result.rows[:3]) == pytest.approx(1)
    assert TemporalGrounding().result(Settings(items=3), {}).rows == ()
    first = dict(list(records.items())[:1])
    assert TemporalGrounding().result(Settings(items=3), first).rows[0].n == 1
