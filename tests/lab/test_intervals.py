import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqwise.lab import intervals
from seqwise.lab.intervals import bootstrap_mean, clustered_mean, paired_difference, rank_correlation, wilson

values = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9)
clusters = st.lists(values, min_size=1, max_size=5)


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 400)


@pytest.mark.parametrize(
    "hits, n, low, high",
    # solved by hand from |share - p| = z sqrt(p (1 - p) / n)
    [(0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (5, 10, 0.236593, 0.763407), (1, 29, 0.006113, 0.171765)],
)
def test_wilson_known_values(hits, n, low, high):
    interval = wilson(hits, n)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((hits / n, low, high), abs=1e-5)


@given(st.integers(1, 500), st.data())
def test_wilson_ends_solve_the_score_equation(n, data):
    hits = data.draw(st.integers(0, n))
    interval = wilson(hits, n)
    assert 0.0 <= interval.low <= interval.mean <= interval.high <= 1.0
    for end in {interval.low, interval.high} - {0.0, 1.0}:
        assert abs(interval.mean - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-4)


@pytest.mark.parametrize("hits, n", [(0, 0), (-1, 4), (5, 4)])
def test_wilson_refuses(hits, n):
    with pytest.raises(ValueError, match=r"hits in \[0, n\]"):
        wilson(hits, n)


@given(values)
def test_bootstrap_holds_its_mean_and_stays_in_the_data(items):
    interval = bootstrap_mean(items)
    assert interval.mean == pytest.approx(float(np.mean(items)))
    assert interval.low <= interval.mean <= interval.high
    assert interval.low >= min(items) - 1e-9 * (1 + abs(min(items)))
    assert interval.high <= max(items) + 1e-9 * (1 + abs(max(items)))
    assert interval == bootstrap_mean(items)  # seeded


def test_bootstrap_has_the_standard_error_width():
    items = np.random.default_rng(3).normal(2.0, 1.0, 400).tolist()
    interval = bootstrap_mean(items)
    expected = 1.96 * np.std(items) / 20
    assert interval.mean - interval.low == pytest.approx(expected, rel=0.15)
    assert interval.high - interval.mean == pytest.approx(expected, rel=0.15)
    assert interval != bootstrap_mean(items, seed=1)


def test_resampled_means_have_the_distribution_of_drawing_items():
    """Drawing counts per distinct value is drawing items: compare with the plain index matrix."""
    data = np.array([0.0, 0.0, 1.0, 3.0, 3.0, 3.0, 10.0])
    rng = np.random.default_rng(0)
    fast = intervals._resampled_means(data, 40_000, rng)
    plain = data[rng.integers(len(data), size=(40_000, len(data)))].mean(-1)
    for q in (0.025, 0.3, 0.5, 0.8, 0.975):
        assert np.quantile(fast, q) == pytest.approx(np.quantile(plain, q), abs=0.15)
    assert fast.std() == pytest.approx(plain.std(), rel=0.03)


@given(clusters)
def test_clustered_mean_weighs_clusters_alike_and_ignores_the_order_of_items(groups):
    interval = clustered_mean(groups)
    assert interval.mean == pytest.approx(float(np.mean([np.mean(group) for group in groups])), abs=1e-9)
    assert interval.low <= interval.mean <= interval.high
    turned = clustered_mean([group[::-1] for group in groups])
    assert (turned.low, turned.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-6)


# Whole numbers: a shift must not make two values one by rounding, which changes what is drawn.
@given(
    st.lists(st.lists(st.integers(-99, 99), min_size=1, max_size=9), min_size=1, max_size=5),
    st.floats(-50, 50),
    st.floats(0.1, 10),
)
def test_clustered_mean_moves_and_scales_with_its_values(groups, shift, scale):
    plain = clustered_mean(groups)
    moved = clustered_mean([[scale * value + shift for value in group] for group in groups])
    assert moved.low == pytest.approx(scale * plain.low + shift, rel=1e-6, abs=1e-5)
    assert moved.high == pytest.approx(scale * plain.high + shift, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("f, t", [(1, 12.7062), (1.5, 6.01666), (2, 4.30265), (7.3, 2.34536), (30, 2.04227)])
def test_t_quantiles(f, t):
    assert intervals._t_quantile(f) == pytest.approx(t, rel=2e-4)


def test_one_item_per_seed_gives_the_t_interval_of_the_seeds():
    interval = clustered_mean([[0.1], [0.2], [0.6]])
    half = 4.30265 * np.std([0.1, 0.2, 0.6], ddof=1) / math.sqrt(3)
    assert (interval.low, interval.high) == pytest.approx((0.3 - half, 0.3 + half), rel=1e-4)


def test_seeds_that_agree_are_not_punished_for_being_three():
    """Where items vary and seeds do not, the interval is near that of all items together."""
    items = np.random.default_rng(0).normal(0, 1, (3, 300))
    items -= items.mean(1, keepdims=True)
    interval = clustered_mean(items.tolist())
    plain = 1.96 / math.sqrt(900)
    assert plain < interval.high - interval.low < 2 * 1.6 * plain


@pytest.mark.parametrize("spread, least", [(0.0, 0.95), (0.3, 0.85), (2.0, 0.9)])
def test_coverage_with_three_seeds(spread, least):
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(200):
        groups = [rng.normal(rng.normal(0, spread) if spread else 0.0, 1.0, 20).tolist() for _ in range(3)]
        interval = clustered_mean(groups, seed=trial)
        hits += interval.low <= 0.0 <= interval.high
    assert hits / 200 >= least


@given(clusters)
def test_paired_difference_is_antisymmetric_in_the_mean_and_zero_against_itself(groups):
    assert paired_difference(groups, groups) == clustered_mean([[0.0] * len(group) for group in groups])
    zeros = [[0.0] * len(group) for group in groups]
    assert paired_difference(groups, zeros).mean == -paired_difference(zeros, groups).mean


def test_pairing_removes_what_items_share():
    items = np.random.default_rng(0).normal(0, 100, (3, 40))
    interval = paired_difference((items + 0.5).tolist(), items.tolist())
    assert interval.low == pytest.approx(0.5) and interval.high == pytest.approx(0.5)


@pytest.mark.parametrize("ours, baseline", [([[1.0]], [[1.0], [2.0]]), ([[1.0, 2.0]], [[1.0]])])
def test_what_does_not_pair_is_refused(ours, baseline):
    with pytest.raises(ValueError, match="as many clusters and items"):
        paired_difference(ours, baseline)


@pytest.mark.parametrize("bad", [[], [math.nan], [1.0, math.inf]])
def test_no_values_or_no_numbers_are_refused(bad):
    with pytest.raises(ValueError, match="finite numbers, at least one"):
        bootstrap_mean(bad)
    with pytest.raises(ValueError, match="finite numbers, at least one"):
        clustered_mean([[1.0], bad])
    with pytest.raises(ValueError, match="at least one cluster"):
        clustered_mean([])


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30))
def test_rank_correlation_is_spearmans(pairs):
    a, b = zip(*pairs, strict=True)
    found = rank_correlation(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert found is None
    else:
        ranks = [[sum(y < x for y in side) + (side.count(x) + 1) / 2 for x in side] for side in (a, b)]
        assert found == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_rank_correlation_of_nothing():
    assert rank_correlation([], []) is None is rank_correlation([1.0], [2.0])
