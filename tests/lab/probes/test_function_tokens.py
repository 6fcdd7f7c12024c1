import json

import numpy as np
import pytest

from seqwise.core.errors import UsageError
from seqwise.lab.probes.base import Progress, Settings
from seqwise.lab.probes.function_tokens import BEHIND, ELSEWHERE, GROUPS, ITEMS, OPEN, FunctionTokensProbe
from seqwise.lab.zoo.text import paragraphs


def records(documents):
    """documents: per document (loss, tokens) in the order of GROUPS."""
    return {
        "function": [1, 2],
        "0 to 9": [{"loss": list(loss), "tokens": list(tokens)} for loss, tokens in documents],
    }


def found(*documents, **settings):
    return FunctionTokensProbe().result(Settings(**settings), records(documents))


def rows_of(result, group):
    return {row.what: row for row in result.rows if row.group.startswith(group)}


def test_groups_are_told_per_token_and_as_shares():
    result = found(((2.0, 12.0, 2.0, 20.0), (2, 2, 2, 10)), ((2.0, 6.0, 2.0, 10.0), (2, 1, 2, 5)))
    per_token, loss, tokens = (
        rows_of(result, group) for group in ("loss per token", "share of the l", "share of the t")
    )
    mean = 56 / 26
    assert [per_token[what].value for what in GROUPS] == pytest.approx([1 / mean, 6 / mean, 1 / mean, 2 / mean])
    assert per_token["f->c"].note == "6.00 nats" and per_token["f->c"].n == 2
    assert [loss[what].value for what in GROUPS] == pytest.approx([4 / 56, 18 / 56, 4 / 56, 30 / 56])
    assert [tokens[what].value for what in GROUPS] == pytest.approx([4 / 26, 3 / 26, 4 / 26, 15 / 26])
    (verdict,) = result.verdicts
    assert verdict.verdict == BEHIND and "f->c 6.00" in verdict.reading
    assert "most of the loss is in c->c, 54%; f->c holds 32% of it at 12% of the tokens" in verdict.reading


def test_intervals_are_over_documents():
    generator = np.random.default_rng(0)
    tokens = np.full((40, 4), 10)
    loss = generator.uniform(10, 30, (40, 1)) * np.array([1.0, 2.0, 1.0, 1.0]) * generator.uniform(0.9, 1.1, (40, 4))
    rows = rows_of(found(*zip(loss, tokens, strict=True)), "share of the loss")
    share = loss[:, 1].sum() / loss.sum()
    # the error of a ratio of sums, to first order
    error = (loss[:, 1] - share * loss.sum(1)).std(ddof=1) * 40**0.5 / loss.sum()
    assert rows["f->c"].value == pytest.approx(share)
    assert rows["f->c"].high - rows["f->c"].low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_verdicts():
    same = [((20.0, 40.0, 20.0, 20.0), (10, 10, 10, 10)), ((20.0, 20.0, 20.0, 40.0), (10, 10, 10, 10))]
    assert found(*same * 3).verdicts[0].verdict == OPEN
    assert found(*same[1:] * 3).verdicts[0].verdict == ELSEWHERE
    assert found(same[0]).verdicts[0].verdict == OPEN  # one document has no interval
    assert found(same[0]).rows[0].low is None


def test_a_group_without_tokens_says_so():
    result = found(*[((0.0, 9.0, 4.0, 5.0), (0, 3, 4, 5))] * 3)
    assert result.verdicts[0].verdict == BEHIND
    row = rows_of(result, "loss per token")["f->f"]
    assert (row.status, row.value) == ("not judged", None) and "no such pair" in row.reason


def test_nothing_measured_yet_says_nothing():
    assert FunctionTokensProbe().result(Settings(), {"function": [1]}).rows == []
    assert found(((1.0,) * 4, (1,) * 4), remedies=("PINE",)).notes[-1] == "this probe judges no methods"


def test_counted_and_measured_paragraphs_are_apart():
    measured, counted = FunctionTokensProbe().texts(Settings())
    assert len(measured) == ITEMS and not set(measured) & set(counted)
    assert len(counted) == len(paragraphs()) - len(paragraphs()) // 5
    assert FunctionTokensProbe().texts(Settings(seed=1))[0] != measured


def test_measures_once(tiny):
    kept = []
    progress = Progress(kept=lambda: kept.append(1))
    result = FunctionTokensProbe().run(*tiny, Settings(items=12), progress)
    assert progress.done == progress.total == 3 and len(kept) == 3
    assert {row.n for row in result.rows} == {12} and not result.failed
    assert sum(row.value for row in result.rows if row.group == "share of the tokens") == pytest.approx(1)
    assert " " in [tiny[1].decode([one]) for one in progress.records["function"]]
    again = Progress(progress.records, kept=lambda: kept.append(2))
    assert FunctionTokensProbe().run(*tiny, Settings(items=12), again) == result and 2 not in kept


def test_data_of_your_own(tiny, tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [{"text": "aab" * 9}, {"text": "ab"}, {"text": "xxxxxyz", "use": "count"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    probe, progress = FunctionTokensProbe(), Progress()
    assert probe.facts(Settings(task=str(path))) == {"items": 2, "counted": 1}
    probe.run(*tiny, Settings(task=str(path)), progress)
    assert [tiny[1].decode([one]) for one in progress.records["function"]] == ["x"]
    path.write_text(json.dumps(lines[0]))
    assert probe.texts(Settings(task=str(path)))[1] == list(paragraphs())


@pytest.mark.parametrize(
    "line, said",
    [
        ({"text": ""}, "line 1: field 'text'"),
        ({"text": "a", "use": "train"}, "line 1: field 'use' must be 'measure' or 'count', got 'train'"),
        ({"text": "a", "use": "count"}, "must have a line to measure"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path, line, said):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(line))
    with pytest.raises(UsageError, match=said):
        FunctionTokensProbe().facts(Settings(task=str(path)))
