"""Intervals, groups and tiers from made-up measurements."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqwise.lab.intervals import wilson
from seqwise.lab.measure import Measurement
from seqwise.lab.rows import PLAIN, Cell, by_depth, difference, equal_cost, groups_of, newcombe, rows_of, tiers

CELL = Cell("needle", "blind", 512)
PAIRS = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=2, max_size=40)


def measured(values, metric="accuracy", cost=100, **more):
    facts = {
        "text": "", "tokens": 10, "kept_tokens": 5.0, "cache_bytes": cost, "live_bytes": cost, "plain_bytes": 200,
        "peak_bytes": 200, "attention_work": 0.5, "acted": True, "prefill_s": 1.0, "decode_s": 0.1,
    }  # fmt: skip
    return {i: Measurement(scores={metric: float(x)}, **{**facts, **more}) for i, x in enumerate(values)}


@given(PAIRS)
def test_newcombe_is_an_interval_of_the_difference(pairs):
    a, b = zip(*pairs, strict=True)
    low, high = newcombe(a, b)
    value = (sum(a) - sum(b)) / len(a)
    assert -1 <= low <= value + 1e-12 and value - 1e-12 <= high <= 1 and low < high
    mirrored = newcombe(b, a)
    assert mirrored == (pytest.approx(-high), pytest.approx(-low))


def test_newcombe_without_correlation_adds_the_squares():
    a, b = [1, 1, 0, 0] * 5, [1, 0, 1, 0] * 5  # phi = 0
    one = wilson(10, 20)
    half = (2 * (one.high - 0.5) ** 2) ** 0.5
    assert newcombe(a, b) == (pytest.approx(-half), pytest.approx(half))


def test_newcombe_is_narrower_where_pairs_agree():
    same, mixed = [1, 0] * 10, [0, 1] * 10
    assert newcombe(same, same)[1] < newcombe(same, mixed)[1]


def test_newcombe_covers():
    draw, hits, times, n = random.Random(0), 0, 2000, 25
    for _ in range(times):
        pairs = [
            (1, 1) if (u := draw.random()) < 0.4 else (1, 0) if u < 0.7 else (0, 1) if u < 0.8 else (0, 0)
            for _ in range(n)
        ]
        low, high = newcombe(*zip(*pairs, strict=True))
        hits += low <= 0.2 <= high
    assert hits / times >= 0.93


def test_few_prompts_do_not_make_a_difference_certain():
    ours, theirs = measured([0, 0]), measured([1, 1])
    found = difference("accuracy", ours, theirs)
    assert found["value"] == -1 and found["high"] > -0.2
    wobbly = difference("nll", measured([1.0, 1.4, 1.1], "nll"), measured([1.0, 1.0, 1.0], "nll"))
    assert wobbly["low"] < 0 < wobbly["value"] < wobbly["high"]  # a bootstrap of three would say [0, 0.4]


def test_differences_are_paired():
    spread = [1.0, 5.0, 9.0, 13.0]
    found = difference("nll", measured([x + 0.1 for x in spread], "nll"), measured(spread, "nll"))
    assert found["low"] == pytest.approx(0.1) and found["high"] == pytest.approx(0.1)
    part = difference("nll", measured([1.0, 2.0], "nll"), measured(spread, "nll"))
    assert part["value"] == pytest.approx(-1.5)


def test_ratios_are_medians_of_pairs():
    plain = {i: one for s in (1.0, 2.0, 3.0) for i, one in [(int(s), measured([1], prefill_s=s)[0])]}
    ours = {i: measured([1], prefill_s=factor * i, decode_s=None)[0] for i, factor in ((1, 1.0), (2, 1.5), (3, 9.0))}
    row = rows_of(CELL, {"accuracy": "higher"}, {PLAIN: plain, "Ours()": ours}, {})[1]
    assert row["prefill_ratio"] == 1.5 and row["decode_ratio"] is None


def test_equal_cost_starts_a_group_at_more_than_ten_per_cent():
    assert equal_cost({"c": 1.11, "a": 1.0, "b": 1.1, "d": 1.2}) == [["a", "b"], ["c", "d"]]
    assert equal_cost({}) == []


def ones(share, n=30):
    return measured([i < share * n for i in range(n)])


def test_tiers_need_thirty_prompts_and_an_interval():
    found = {"good": ones(0.9), "near": ones(0.85), "bad": ones(0.2)}
    assert tiers("accuracy", "higher", found, list(found)) == [["good", "near"], ["bad"]]
    assert tiers("accuracy", "lower", found, list(found)) == [["bad"], ["near", "good"]]
    assert tiers("accuracy", "higher", {**found, "few": ones(0.5, n=29)}, [*found, "few"]) is None


def test_depths_are_counted_in_fifths_and_unknown_ones_left_out():
    known = {i: replace(one, depth=depth) for (i, one), depth in zip(
        measured([1, 0, 1, 1]).items(), (0.0, 0.199, 1.0, None), strict=True)}  # fmt: skip
    rows = by_depth(CELL, {"accuracy": "higher"}, {PLAIN: known, "Other": measured([1, 1])})
    assert [(row["method"], row["depth"], row["n"], row["value"]) for row in rows] == [
        (PLAIN, [0.0, 0.2], 2, 0.5),
        (PLAIN, [0.8, 1.0], 1, 1.0),
    ]
    assert rows[0]["low"] < 0.5 < rows[0]["high"] and rows[1]["low"] is None
    assert by_depth(CELL, {"accuracy": "higher"}, {PLAIN: measured([1, 0])}) == []


def test_groups_put_methods_of_one_cost_side_by_side():
    found = {PLAIN: measured([1] * 30, cost=200), "A()": ones(0.9), "B()": measured([0] * 30, cost=105)}
    groups = [g for g in groups_of(CELL, {"accuracy": "higher"}, found) if g["cost"] == "cache_bytes"]
    assert [g["methods"] for g in groups] == [["A()", "B()"], [PLAIN]]
    assert groups[0]["share"] == [0.5, 0.525] and groups[0]["tiers"] == [["A()"], ["B()"]]
