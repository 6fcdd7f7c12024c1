import json
import math

import pytest
import torch

from seqwise.core.errors import UsageError
from seqwise.insight.probe.prior_distribution import logistic_slope
from seqwise.lab.intervals import wilson
from seqwise.lab.probes import prior_distribution as module
from seqwise.lab.probes.base import Progress, Settings
from seqwise.lab.probes.prior_distribution import (
    ACRONYMS,
    ALL_RIGHT,
    ALL_WRONG,
    COUNTING,
    INFLUENCED,
    ITEMS,
    NOT_FOUND,
    NUMBERS,
    SPELLED,
    TOLD,
    PriorDistribution,
    Question,
    acronyms,
    counting,
)
from seqwise.lab.rows import PLAIN, newcombe

# questions


def test_lists_have_as_many_words_as_the_answer_says():
    questions = counting(40, 3)
    for one in questions:
        listed = one.prompt.removeprefix("List: ").split(".")[0].split(", ")
        assert NUMBERS[len(listed) - 1] == one.candidates[one.truth] and len(set(listed)) == len(listed)
    assert sorted(one.truth for one in questions) == sorted([*range(20), *range(20)])
    assert counting(3, 3) == questions[:3] != counting(3, 4)


def test_letters_are_first_ones_and_every_second_answer_is_no_word():
    questions = acronyms(20, 0)
    for i, one in enumerate(questions):
        nouns = one.prompt.removeprefix("The first letters of ").removesuffix(" spell").split(", ")
        assert "".join(noun[0] for noun in nouns) == one.candidates[one.truth]
        assert len(set(one.candidates)) == 4
        assert (one.candidates[one.truth] in SPELLED) == (i % 2 == 0)
        near = [candidate for candidate in one.candidates if candidate != one.candidates[0]]
        assert all(sum(a != b for a, b in zip(other, one.candidates[0], strict=True)) == 1 for other in near)
    assert [a.candidates for a in questions[::2]] == [b.candidates for b in questions[1::2]]  # matched pairs
    assert acronyms(6, 0) == questions[:6] != acronyms(6, 1)


# results


def found(answers, log_pi, *, told=None, inside=None, monkeypatch=None, truth=0):
    """Items with candidates of their own, c0 .. of which `truth` is right; log_pi: per item, of its candidates."""
    names = [tuple(f"{i} {k}" for k in range(len(pi))) for i, pi in enumerate(log_pi)]
    questions = [Question("?", candidates, truth) for candidates in names]
    monkeypatch.setattr(module, "BLOCK", 100)
    monkeypatch.setattr(PriorDistribution, "parts", lambda self, settings: {"own": questions})
    prior = {name: pi for one, pis in zip(names, log_pi, strict=True) for name, pi in zip(one, pis, strict=True)}

    def records(given):
        return [
            {
                "answer": answer,
                "right": int(answer == truth),
                "inside": None if inside is None else inside[i],
                "chance": 0,
                "rho": [0.0, 0.2, 0.9, None],
            }
            for i, answer in enumerate(given)
        ]

    kept = {"own/prior": prior, f"own/{PLAIN}/0": records(answers)}
    if told is not None:
        kept[f"own/{TOLD}/0"] = records(told)
    return PriorDistribution().result(Settings(), kept)


def rows_of(result, method=PLAIN):
    return {row.what: row for row in result.rows if row.method == method}


def test_accuracy_is_told_by_halves_and_errors_by_their_prior(monkeypatch):
    likely, rare = [-1.0, -2.0, -3.0], [-3.0, -2.0, -1.0]
    result = found([0, 0, 1, 1, 0, 2], [likely] * 3 + [rare] * 3, inside=[1, 1, 0, 1, 1, None], monkeypatch=monkeypatch)
    rows = rows_of(result)
    assert rows["accuracy"].value == 0.5 and rows["accuracy"].low == wilson(3, 6).low
    assert rows["of likely answers"].value == pytest.approx(2 / 3) and rows["of likely answers"].n == 3
    assert rows["of unlikely answers"].value == pytest.approx(1 / 3)
    assert rows["wrong towards the prior"].value == pytest.approx(2 / 3)  # the third error went to an unlikely answer
    assert rows["wrong, known inside"].value == 0.5 and rows["wrong, known inside"].n == 2
    assert rows["wrong, another one inside"].value == 0.0
    assert "the prior enters most at layer 2 of 3 (rank correlation +0.20 to +0.90)" in result.verdicts[0].reading


def test_the_told_arm_is_paired(monkeypatch):
    likely, rare = [-1.0, -2.0], [-2.0, -1.0]
    result = found([0, 1, 1, 1], [likely, likely, rare, rare], told=[0, 1, 0, 0], monkeypatch=monkeypatch)
    rows = rows_of(result, TOLD)
    assert rows["accuracy"].difference["value"] == 0.5
    low, high = newcombe([1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0])
    assert (rows["accuracy"].difference["low"], rows["accuracy"].difference["high"]) == (low, high)
    assert rows["of unlikely answers"].difference["value"] == 1 and rows["of likely answers"].difference["value"] == 0
    assert rows["wrong towards the prior"].difference is None
    assert rows["wrong, known inside"].status == "not judged"


def test_verdicts(monkeypatch):
    spread = [[-float(i % 10), -4.5] for i in range(40)]
    rising = [0 if i % 10 < 6 or i % 20 == 17 else 1 for i in range(40)]
    result = found(rising, spread, monkeypatch=monkeypatch)
    slope = logistic_slope(torch.tensor([pi[0] for pi in spread]), torch.tensor([float(a == 0) for a in rising]))
    assert result.verdicts[0].verdict == INFLUENCED and slope.p < 0.05
    assert f"{slope.slope:+.2f}, p = {slope.p:.2g}" in result.verdicts[0].reading
    falling = [1 - answer for answer in rising]
    assert found(falling, spread, monkeypatch=monkeypatch).verdicts[0].verdict == NOT_FOUND
    even = [i // 10 % 2 for i in range(40)]
    assert found(even, spread, monkeypatch=monkeypatch).verdicts[0].verdict == NOT_FOUND
    assert found([0] * 5, spread[:5], monkeypatch=monkeypatch).verdicts[0].verdict == ALL_RIGHT
    assert found([1] * 5, spread[:5], monkeypatch=monkeypatch).verdicts[0].verdict == ALL_WRONG


def test_answers_that_the_prior_separates(monkeypatch):
    spread = [[-float(i), -4.5] for i in range(8)]
    apart = found([0] * 4 + [1] * 4, spread, monkeypatch=monkeypatch).verdicts[0]
    assert apart.verdict == INFLUENCED and f"p = {2 / math.comb(8, 4):.2g}" in apart.reading
    assert found([0] + [1] * 7, spread, monkeypatch=monkeypatch).verdicts[0].verdict == NOT_FOUND  # p = 0.25
    assert found([1] * 4 + [0] * 4, spread, monkeypatch=monkeypatch).verdicts[0].verdict == NOT_FOUND  # not upwards


def test_nothing_measured_yet_says_nothing():
    assert PriorDistribution().result(Settings(), {}).rows == []


# a model


def test_measures_once(tiny):
    kept = []
    progress = Progress(kept=lambda: kept.append(1))
    settings = Settings(items=2)
    result = PriorDistribution().run(*tiny, settings, progress)
    assert progress.done == progress.total == 6 and len(kept) == 6 and not result.failed
    assert {row.group for row in result.rows} == {COUNTING, ACRONYMS}
    assert len(progress.records[f"{COUNTING}/prior"]) == 20
    assert sum(math.exp(value) for value in progress.records[f"{COUNTING}/prior"].values()) == pytest.approx(1)
    again = Progress(progress.records, kept=lambda: kept.append(2))
    assert PriorDistribution().run(*tiny, settings, again) == result and 2 not in kept


def write(path, *lines):
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


OWN = {"prompt": "Two and two is", "candidates": ["four", "five"], "answer": 0}


def test_questions_of_your_own(tiny, tmp_path):
    path = write(
        tmp_path / "own.jsonl", OWN, {**OWN, "task": "sums"}, {**OWN, "candidates": ["six", "four"], "answer": 1}
    )
    parts = PriorDistribution().parts(Settings(task=path))
    assert {part: len(items) for part, items in parts.items()} == {"own": 2, "sums": 1}
    progress = Progress()
    result = PriorDistribution().run(*tiny, Settings(task=path), progress)
    assert set(progress.records["own/prior"]) == {"four", "five", "six"}  # all answers of the task
    assert set(progress.records["sums/prior"]) == {"four", "five"} and len(result.verdicts) == 2
    assert PriorDistribution().facts(Settings()) == {"items": {COUNTING: ITEMS, ACRONYMS: ITEMS}}


@pytest.mark.parametrize(
    "line, said",
    [
        ({**OWN, "prompt": ""}, "line 1: field 'prompt'"),
        ({**OWN, "candidates": ["four"]}, "line 1: field 'candidates' must be a list of 2 or more"),
        ({**OWN, "candidates": ["a", "a"]}, "line 1: field 'candidates' must be a list of different texts"),
        ({**OWN, "answer": 2}, r"line 1: field 'answer' must be a whole number in \[0, 1\]"),
        ({**OWN, "answer": True}, "line 1: field 'answer'"),
        ({"prompt": "a", "candidates": ["a", "b"]}, "line 1: field 'answer' .* got nothing"),
        ({**OWN, "task": 3}, "line 1: field 'task'"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path, line, said):
    with pytest.raises(UsageError, match=said):
        PriorDistribution().facts(Settings(task=write(tmp_path / "own.jsonl", line)))
