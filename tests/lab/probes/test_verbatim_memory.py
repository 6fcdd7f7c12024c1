import json
import math

import pytest

from seqwise.core.errors import UsageError
from seqwise.insight.probe.verbatim_memory import LIST1, LIST2, bca_median, novel_pairing
from seqwise.lab.probes.base import Progress, Settings
from seqwise.lab.probes.verbatim_memory import (
    ITEMS,
    NO_NOVEL,
    NOTHING,
    WORDS,
    WORDS_AND_ORDER,
    VerbatimMemoryProbe,
)


def item(repeated, permuted, novel=None, first=4.0, n=5):
    """Surprisals of five words; those of the second list as a share of the first's."""
    found = {"Repeated": repeated, "Permuted": permuted} | ({} if novel is None else {"Novel": novel})
    return {name: [[first] * n, [99.0] + [first * share] * (n - 1)] for name, share in found.items()}


def found(*items, **settings):
    return VerbatimMemoryProbe().result(Settings(**settings), {"0 to 9": list(items)})


def rows_of(result, group):
    return {row.what: row for row in result.rows if row.group.startswith(group)}


def test_medians_of_the_ratio_per_text():
    shares = [0.1, 0.2, 0.2, 0.3, 0.6, 0.7, 0.9]
    result = found(*[item(share, share + 0.25, 1.0) for share in shares])
    rows = rows_of(result, "surprisal of the second list")
    assert [row.value for row in rows.values()] == pytest.approx([0.3, 0.55, 1.0])
    median, low, high = bca_median(shares)
    assert (rows["Repeated"].low, rows["Repeated"].high) == pytest.approx((low, high)) and rows["Repeated"].n == 7
    assert rows["Repeated"].note == "MAD 20%"
    differences = rows_of(result, "differences")
    assert differences["order: Permuted - Repeated"].value == pytest.approx(0.25)
    assert differences["words: Novel - Repeated"].value == pytest.approx(0.7)
    places = rows_of(result, "Repeated: by position")
    assert list(places) == ["1", "2", "3", "4", "5"]
    assert places["1"].value == pytest.approx(99 / 4) and places["2"].value == pytest.approx(0.3)
    assert result.verdicts[0].reading == "median of second over first list: Repeated 30%, Permuted 55%, Novel 100%"


@pytest.mark.parametrize(
    "items, verdict",
    [
        ([item(0.1, 0.4, 1.0), item(0.2, 0.4, 1.0)] * 4, WORDS_AND_ORDER),
        ([item(0.1, 0.05, 1.0), item(0.2, 0.25, 1.0)] * 4, WORDS),
        ([item(1.0, 1.2, 0.9), item(1.0, 1.3, 1.1)] * 4, NOTHING),
        ([item(1.0, 1.0, 0.8), item(1.0, 1.0, 0.7)] * 4, NOTHING),
        ([item(0.1, 0.4, 1.0)], NOTHING),  # one text has no interval
        ([item(0.1, 0.4)] * 4, NO_NOVEL),
    ],
)
def test_verdicts(items, verdict):
    assert [one.verdict for one in found(*items).verdicts] == [verdict]


def test_first_lists_without_surprise_do_not_count():
    result = found(item(0.5, 0.5, 1.0), item(0.1, 0.1, 1.0, first=1e-9), item(0.5, 0.5, 1.0))
    assert rows_of(result, "surprisal")["Repeated"].n == 2
    result = found(item(0.1, 0.1, 1.0, first=0.0))
    row = rows_of(result, "surprisal")["Repeated"]
    assert (row.status, row.value) == ("not judged", None) and result.verdicts[0].verdict == NO_NOVEL


def test_lists_of_different_lengths_share_the_table_by_position():
    places = rows_of(found(item(0.5, 0.6, 1.0, n=3), item(0.5, 0.6, 1.0, n=5)), "Repeated: by position")
    assert [places[f"{k}"].n for k in range(1, 6)] == [2, 2, 2, 1, 1]


def test_nothing_measured_yet_says_nothing():
    empty = VerbatimMemoryProbe().result(Settings(remedies=("PINE",)), {})
    assert (empty.verdicts, empty.rows, empty.notes) == ([], [], ["this probe judges no methods"])


def words(text, marker):
    return [text.text[a:b] for (a, b), m in zip(text.spans, text.markers, strict=True) if m == marker]


def test_the_default_lists_are_all_different_first():
    probe = VerbatimMemoryProbe()
    trials = probe.trials(Settings(items=46))
    first = [words(trial.texts["Repeated"], LIST1) for trial in trials]
    assert len({frozenset(one) for one in first[:23]}) == 23 and len({tuple(one) for one in first}) == 46
    assert probe.facts(Settings()) == {"items": ITEMS} and probe.facts(Settings(items=500)) == {"items": 230}
    assert probe.trials(Settings(items=9)) == trials[:9] != probe.trials(Settings(items=9, seed=1))
    assert novel_pairing([j // 10 for j in range(230)])  # every list has another one
    assert all(len(trial.texts) == 3 for trial in trials)


def test_measures_once(tiny):
    kept = []
    progress = Progress(kept=lambda: kept.append(1))
    result = VerbatimMemoryProbe().run(*tiny, Settings(items=5), progress)
    assert progress.done == progress.total == 2 and len(kept) == 2 and not result.failed
    (one, *_) = progress.records["4 to 4"]
    assert {name: [len(values) for values in lists] for name, lists in one.items()} == {
        "Repeated": [10, 10], "Permuted": [10, 10], "Novel": [10, 10],
    }  # fmt: skip
    assert one["Repeated"][0] == pytest.approx(one["Permuted"][0]) and one["Repeated"][1] != one["Permuted"][1]
    assert all(math.isfinite(value) for lists in one.values() for values in lists for value in values)
    again = Progress(progress.records, kept=lambda: kept.append(2))
    assert VerbatimMemoryProbe().run(*tiny, Settings(items=5), again) == result and 2 not in kept


def write(path, *lines):
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_lists_of_your_own(tiny, tmp_path):
    path = write(
        tmp_path / "own.jsonl",
        {"words": ["ox", "bee", "cow"], "preface": "Here:", "between": "Again:"},
        {"words": ["ox", "ant", "cat"]},
        {"words": ["red", "blue", "green", "pink"]},
    )
    trials = VerbatimMemoryProbe().trials(Settings(task=path))
    assert trials[0].texts["Repeated"].text == "Here: ox, bee, cow. Again: ox, bee, cow."
    assert words(trials[0].texts["Novel"], LIST2) == ["red", "blue", "green"]  # the first that shares no word
    assert (
        words(trials[1].texts["Novel"], LIST2) == ["red", "blue", "green"] and "Mary" in trials[1].texts["Novel"].text
    )
    assert "Novel" not in trials[2].texts  # no other list is as long
    result = VerbatimMemoryProbe().run(*tiny, Settings(task=path))
    assert {row.what: row.n for row in result.rows if row.group.startswith("surprisal")} == {
        "Repeated": 3, "Permuted": 3, "Novel": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    "line, said",
    [
        ({}, "line 1: field 'words' must be a list of 3 or more texts .* got nothing"),
        ({"words": ["a", "b"]}, "line 1: field 'words' must be a list of 3 or more"),
        ({"words": ["a", "b", "a"]}, "line 1: field 'words' must be a list of different texts"),
        ({"words": ["a", "b", "c"], "preface": ""}, "line 1: field 'preface'"),
        ({"words": ["a", "b", "c"], "between": 3}, "line 1: field 'between'"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path, line, said):
    with pytest.raises(UsageError, match=said):
        VerbatimMemoryProbe().facts(Settings(task=write(tmp_path / "own.jsonl", line)))


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UsageError, match="where in a text its tokens are"):
        VerbatimMemoryProbe().measure(None, Slow(), Settings(), Progress())
