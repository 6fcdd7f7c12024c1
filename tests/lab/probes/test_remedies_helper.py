"""Measuring under remedies, and what is said of it."""

from __future__ import annotations

from seqwise.lab.intervals import wilson
from seqwise.lab.probes._remedies import (
    DEFAULT,
    direction,
    found,
    measure_plain,
    measure_remedies,
    percent,
    points,
    remedies,
    row,
)
from seqwise.lab.probes.base import Progress, Settings
from seqwise.lab.registry import load_methods


def test_remedies_are_the_three_or_those_asked_for():
    load_methods()
    assert tuple(map(str, remedies(Settings()))) == DEFAULT
    assert [str(one) for one in remedies(Settings(remedies=("PINE()", "Full()")))] == ["PINE()"]


def test_a_failing_remedy_stops_alone():
    load_methods()
    progress = Progress()
    progress.plan(12)
    seen = []

    def ask(i, method):
        if str(method) == "PINE()" and i == 1:
            raise ValueError("no")
        seen.append((str(method), i))
        return {"i": i}

    measure_plain(progress, "part", 3, ask)
    measure_remedies(progress, "part", 3, ask, remedies(Settings()))
    assert progress.records["part/PINE()"]["failed"].startswith("ValueError: no")
    assert list(found(progress.records, "part", "PINE()", 3)) == [0]
    assert list(found(progress.records, "part", "JustReadTwice()", 3)) == [0, 1, 2]
    assert progress.done == progress.total == 10
    count = len(seen)
    measure_remedies(progress, "part", 3, ask, remedies(Settings()))
    assert len(seen) == count


def test_rows_and_words():
    one = row("g", "m", "w", [1, 0, 0, 1], [1, 1, 1, 1], note="n")
    assert (one.value, one.low, one.high, one.n, one.note) == (0.5, wilson(2, 4).low, wilson(2, 4).high, 4, "n")
    assert one.difference["value"] == -0.5
    assert percent([1.0, 0.0]) == f"50% [{wilson(1, 2).low:.0%}, {wilson(1, 2).high:.0%}]" and percent([1.0]) == "100%"
    assert points([0.0] * 20, [1.0] * 20).startswith("-100 points [-100, ")
    assert direction([0.0] * 20, [1.0] * 20) == -1 and direction([1.0] * 20, [0.0] * 20) == 1
    assert direction([0.5, 0.25], [0.5, 0.25]) == 0 and direction([1.0], [0.0]) == 0
