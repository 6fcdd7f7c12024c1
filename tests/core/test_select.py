"""Selections against plain Python: sort by score, then by place."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqwise.core.errors import PromptError
from seqwise.core.select import (
    budget_count,
    compact,
    descending,
    keep_all_but_one,
    keep_best,
    keep_top,
    layer_budget,
    top_k,
)

inf = float("inf")


def scores(seed, *shape, levels=6):
    """Few different values, so that ties are common; all far apart."""
    return torch.randint(-levels, levels, shape, generator=torch.Generator().manual_seed(seed)).float()


def plainly(row, k, prefer):
    """The k best places of a list, ascending."""
    sign = 1 if prefer == "earlier" else -1
    return sorted(sorted(range(len(row)), key=lambda j: (-row[j], sign * j))[:k])


@pytest.mark.parametrize(
    ("budget", "length", "count"),
    [
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996
        (0.57, 100, 57),
        (0.1, 9, 1),  # at least one
        (0.5, 7, 3),  # rounded down
        (1.0, 7, 7),
        (0.5, 0, 0),
        (1, 7, 1),
        (9, 7, 7),
        (9, 0, 0),
    ],
)
def test_budgets_in_tokens(budget, length, count):
    assert budget_count(budget, length) == count


@given(st.integers(1, 1000), st.integers(1, 3000))
def test_a_share_in_thousandths_is_rounded_down_exactly(thousandths, length):
    assert budget_count(thousandths / 1000, length) == max(1, int(Fraction(thousandths, 1000) * length))


def test_a_layers_budget():
    assert layer_budget(0.5, 2, 3) == 0.5
    assert layer_budget((1, 0.5, 3), 2, 3) == 3
    with pytest.raises(PromptError, match=r"^X\.budget must have one entry per layer \(3\), got 2$"):
        layer_budget((1, 2), 0, 3, "X.budget")


@given(
    seed=st.integers(0, 999), n=st.integers(1, 12), k=st.integers(0, 14), prefer=st.sampled_from(["earlier", "later"])
)
def test_top_k_is_the_sorted_list(seed, n, k, prefer):
    s = scores(seed, 2, 3, n, levels=3)
    kept = top_k(s, k, prefer)
    assert kept.shape == (2, 3, min(k, n))
    for b in range(2):
        for h in range(3):
            assert kept[b, h].tolist() == plainly(s[b, h].tolist(), k, prefer)


@given(seed=st.integers(0, 999), n=st.integers(1, 12), prefer=st.sampled_from(["earlier", "later"]))
def test_descending_is_a_permutation_by_falling_score(seed, n, prefer):
    s = scores(seed, 4, n)
    order = descending(s, prefer)
    assert torch.equal(order.sort(-1).values, torch.arange(n).expand(4, n))
    assert (s.gather(-1, order).diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("value", [1.0, -3.0, 0.0, 1e-6, 2.5e7])
def test_rounding_noise_does_not_decide(value):
    noisy = torch.tensor([value, value * (1 + 2e-7), value * (1 - 2e-7), value])
    assert descending(noisy).tolist() == [0, 1, 2, 3]
    assert descending(noisy, "later").tolist() == [3, 2, 1, 0]


def test_differences_above_the_tolerance_decide_whatever_the_magnitude():
    for base in (1e-20, 0.37, 1.0, 4.2e12):
        assert top_k(torch.tensor([base, base * (1 + 1e-4)]), 1).item() == 1
        assert top_k(torch.tensor([-base, -base * (1 + 1e-4)]), 1).item() == 0


def test_infinities_are_the_largest_and_the_smallest():
    assert descending(torch.tensor([-inf, 3e38, inf, -3e38, 0.0])).tolist() == [2, 1, 4, 3, 0]
    assert top_k(torch.tensor([3.4028e38, inf]), 1).item() == 1, "the largest finite number is no infinity"


def test_half_precision_scores_are_compared_exactly():
    s = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)  # neighbours in bf16
    assert top_k(s, 1).item() == 1


def keep_plainly(score, live, count, protected, prefer):
    """One head of keep_top."""
    n = len(score)
    sign = 1 if prefer == "earlier" else -1
    places = [j for j in range(n) if live[j]]
    places.sort(key=lambda j: (not protected[j], 0 if protected[j] else -score[j], sign * j))
    return sorted(places[:count])


@given(
    seed=st.integers(0, 9999),
    n=st.integers(1, 10),
    protect=st.booleans(),
    prefer=st.sampled_from(["earlier", "later"]),
    low=st.booleans(),
)
def test_keep_top_per_sample_and_head(seed, n, protect, prefer, low):
    random = torch.Generator().manual_seed(seed)
    B, H = 3, 2
    s = scores(seed, B, H, n, levels=3)
    if low:
        s[s == s.min()] = -inf  # a live slot without any score is still better than a dead one
    live = torch.rand(B, H, n, generator=random) < 0.7
    protected = torch.rand(B, H, n, generator=random) < 0.3
    count = torch.randint(1, n + 1, (B,), generator=random).tolist()
    index, alive = keep_top(s, live, count, protected=protected if protect else None, prefer=prefer)
    assert index.shape == alive.shape == (B, H, max(count))
    assert (index >= 0).all() and (index < n).all(), "padding must be a valid index as well"
    for b in range(B):
        for h in range(H):
            shield = protected[b, h].tolist() if protect else [False] * n
            wanted = keep_plainly(s[b, h].tolist(), live[b, h].tolist(), count[b], shield, prefer)
            assert index[b, h][alive[b, h]].tolist() == wanted
            assert alive[b, h].tolist() == sorted(alive[b, h].tolist()), "dead padding stands in front"


@given(seed=st.integers(0, 999), n=st.integers(1, 10))
def test_keep_best_marks_the_best_candidates(seed, n):
    random = torch.Generator().manual_seed(seed)
    s = scores(seed, 3, n, levels=2)
    candidates = torch.rand(3, n, generator=random) < 0.7
    count = torch.randint(0, n + 1, (3,), generator=random)
    kept = keep_best(s, candidates, count)
    for b in range(3):
        wanted = keep_plainly(s[b].tolist(), candidates[b].tolist(), int(count[b]), [False] * n, "earlier")
        assert kept[b].nonzero()[:, 0].tolist() == wanted


@given(seed=st.integers(0, 999), n=st.integers(1, 10), density=st.sampled_from([0.0, 0.2, 0.7, 1.0]))
def test_compact_lists_what_a_mask_keeps(seed, n, density):
    keep = torch.rand(3, 2, n, generator=torch.Generator().manual_seed(seed)) < density
    index, live = compact(keep)
    assert index.shape == live.shape == (3, 2, int(keep.sum(-1).max()))
    for row, places, alive in zip(keep.view(6, n), index.view(6, -1), live.view(6, -1), strict=True):
        assert places[alive].tolist() == row.nonzero()[:, 0].tolist()
        assert alive.tolist() == sorted(alive.tolist()), "the last kept token stays last"


@given(
    seed=st.integers(0, 9999),
    n=st.integers(2, 10),
    protect=st.booleans(),
    prefer=st.sampled_from(["earlier", "later"]),
)
def test_keeping_all_but_one_is_keeping_the_best(seed, n, protect, prefer):
    s = scores(seed, 3, 2, n, levels=3)
    shield = torch.rand(3, 2, n, generator=torch.Generator().manual_seed(seed)) < 0.4
    protected = shield if protect else None
    live = torch.ones_like(shield)
    index, alive = keep_top(s, live, [n - 1] * 3, protected=protected, prefer=prefer)
    assert alive.all() and keep_all_but_one(s, protected=protected, prefer=prefer).equal(index)
