"""LazyEviction's state, score and selection against a plain per-slot reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqwise.methods.cache.lazy_eviction import due, group_attention, mri_score, select, track


def reference_score(t, last, mri):
    def tail(x):
        return 0.0 if x > 700 else 2 / (1 + math.exp(x))

    return tail(1 + (t - last) / (mri + 1e-5)), (0.0 if mri == 0 else tail(mri - 1))


def reference_run(rows, prompt, alpha, budget, window):
    """The algorithm on Python lists: rows[t - 1] maps token -> probability. Yields the slots after each step."""
    slots = [{"token": i, "last": 0, "mri": 0} for i in range(prompt)]
    for t, row in enumerate(rows, 1):
        slots.append({"token": prompt + t - 1, "last": t - 1, "mri": 0})
        for slot in slots:
            if row[slot["token"]] >= alpha:
                slot["mri"] = max(slot["mri"], t - slot["last"])
                slot["last"] = t
        if len(slots) > budget and t % window == 0:
            old, new = slots[:-window], slots[-window:]
            rank = sorted(
                range(len(old)), key=lambda i: (-sum(reference_score(t, old[i]["last"], old[i]["mri"])), -i)
            )
            slots = [old[i] for i in sorted(rank[: budget - window])] + new
        yield [dict(slot) for slot in slots]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 9), st.floats(0.01, 0.4))
def test_a_decode_run_equals_the_plain_algorithm(seed, window, prompt, alpha):
    budget, steps = window + 6, 41
    generator = torch.Generator().manual_seed(seed)
    rows = torch.softmax(3 * torch.randn(steps, prompt + steps, generator=generator), -1)
    last = mri = torch.zeros(prompt, dtype=torch.int32)
    token = torch.arange(prompt)
    expected = reference_run(rows.tolist(), prompt, torch.tensor(alpha).item(), budget, window)
    for t, (row, slots) in enumerate(zip(rows, expected, strict=True), 1):
        token = torch.cat([token, torch.tensor([prompt + t - 1])])
        last, mri = track(last, mri, row[token], alpha, t)
        if due(t, len(token), budget, window):
            kept = select(mri_score(t, last, mri), budget, window)
            token, last, mri = token[kept], last[kept], mri[kept]
        assert token.tolist() == [slot["token"] for slot in slots]
        assert last.tolist() == [slot["last"] for slot in slots]
        assert mri.tolist() == [slot["mri"] for slot in slots]
        assert len(token) <= max(budget + window - 1, prompt + window)


def test_track_by_hand():
    last, mri = torch.tensor([0, 3, 2, 4]), torch.tensor([0, 3, 1, 0])
    attention = torch.tensor([0.3, 0.1, 0.05, 0.2])
    # a first activation of a prompt slot gives mri = t, of the newest slot 1; an equal probability is active
    new_last, new_mri = track(last, mri, attention, 0.1, 5)
    assert (new_last.tolist(), new_mri.tolist()) == ([5, 5, 2, 5], [5, 3, 1, 1])
    again = track(last[:3], mri[:3], attention, 0.1, 5)  # the slot of this step is added
    assert torch.equal(again[0], new_last) and torch.equal(again[1], new_mri)


def test_counters_are_exact_integers_whatever_dtype_the_attention_has():
    last = torch.tensor([[2049, 0]], dtype=torch.int32)
    new_last, new_mri = track(
        last, torch.zeros_like(last), torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16), 0.5, 4097
    )
    assert new_last.dtype == new_mri.dtype == torch.int32
    assert (new_last.tolist(), new_mri.tolist()) == ([[2049, 4097]], [[0, 4097]])


def test_leading_dimensions_are_independent():
    generator = torch.Generator().manual_seed(1)
    last = torch.randint(0, 9, (2, 3, 13), generator=generator)
    mri = torch.randint(0, 9, (2, 3, 13), generator=generator)
    attention = torch.rand(2, 3, 13, generator=generator)
    together = track(last, mri, attention, 0.5, 10)
    kept = select(mri_score(10, *together), 7, 2)
    for b in range(2):
        for h in range(3):
            alone = track(last[b, h], mri[b, h], attention[b, h], 0.5, 10)
            assert torch.equal(together[0][b, h], alone[0]) and torch.equal(together[1][b, h], alone[1])
            assert torch.equal(kept[b, h], select(mri_score(10, *alone), 7, 2))


@given(st.integers(1, 5_000), st.data())
def test_score_equals_the_scalar_formula(t, data):
    last, mri = data.draw(st.integers(0, t)), data.draw(st.integers(0, t))
    first, second = reference_score(t, last, mri)
    at = torch.tensor([last]), torch.tensor([mri])
    assert mri_score(t, *at).item() == pytest.approx(first + second, rel=1e-5, abs=1e-30)
    assert mri_score(t, *at, score="first_term").item() == pytest.approx(first, rel=1e-5, abs=1e-30)


def test_bounds_of_both_terms_and_the_exact_zero():
    t, last = 100, torch.tensor([100, 100, 0, 99])
    mri = torch.tensor([1, 50, 1, 0])
    assert mri_score(t, last, mri)[0].item() == pytest.approx(2 / (1 + math.e) + 1)
    assert mri_score(t, last, mri, "first_term")[1].item() == pytest.approx(2 / (1 + math.e))
    assert mri_score(t, last, mri)[2].item() == pytest.approx(1)  # one burst, silent for ever: still above 0.54
    assert mri_score(t, last, mri)[3].item() == 0  # never active


def test_ties_keep_the_newer_and_indices_ascend():
    score = torch.tensor([0.0, 0.7, 0.0, 0.0, 0.2, 9.0, 9.0])
    assert select(score, 4, 2).tolist() == [1, 4, 5, 6]
    assert select(score, 5, 2).tolist() == [1, 3, 4, 5, 6]
    assert select(torch.zeros(7), 4, 2).tolist() == [3, 4, 5, 6]


def test_the_window_is_kept_unscored():
    score = torch.tensor([1.0, 2.0, 3.0, -5.0, -6.0])
    assert select(score, 3, 2).tolist() == [2, 3, 4]


def test_everything_stays_within_the_budget():
    assert select(torch.rand(5), 5, 2).tolist() == [0, 1, 2, 3, 4]
    assert select(torch.rand(2), 5, 3).tolist() == [0, 1]


@pytest.mark.parametrize("window", [0, 4, 5])
def test_a_window_that_leaves_no_slot_to_choose_is_refused(window):
    with pytest.raises(ValueError, match=rf"window must be in \[1, budget\) = \[1, 4\), got {window}"):
        select(torch.rand(9), 4, window)


def test_eviction_is_due_above_the_budget_at_multiples_of_the_window():
    assert [t for t in range(1, 20) if due(t, 10 + t, 15, 4)] == [8, 12, 16]
    assert not due(8, 15, 15, 4)


def test_group_attention_is_the_maximum_of_the_group():
    attention = torch.tensor([[[0.1, 0.9], [0.3, 0.7], [0.5, 0.5], [0.2, 0.8]]])
    torch.testing.assert_close(group_attention(attention, 2), torch.tensor([[[0.3, 0.9], [0.5, 0.8]]]))
    assert torch.equal(group_attention(attention, 4), attention)


def periodic_tokens_alive(score, noise_steps, noise_rate, period, trials=10, seed=0):
    """Share of 4 tokens re-activated every `period` steps that survive 600 steps of one noise token each."""
    budget, window, steps = 64, 16, 600
    generator = torch.Generator().manual_seed(seed)
    last = mri = torch.zeros(trials, 4, dtype=torch.int32)
    token = torch.arange(4).expand(trials, -1)  # 0..3 periodic, 3 + t noise born at step t
    for t in range(1, steps + 1):
        token = torch.cat([token, torch.full((trials, 1), 3 + t)], -1)
        age = t - (token - 3)
        noise = (age == 0) | ((age < noise_steps) & (torch.rand(token.shape, generator=generator) < noise_rate))
        active = torch.where(token < 4, torch.tensor(t % period == 0), noise)
        last, mri = track(last, mri, active.float(), 0.5, t)
        if due(t, token.shape[-1], budget, window):
            kept = select(mri_score(t, last, mri, score), budget, window)
            token, last, mri = (x.gather(-1, kept) for x in (token, last, mri))
    return (token < 4).float().sum(-1).mean().item() / 4


@pytest.mark.parametrize("period", [5, 12])
def test_recurrent_tokens_outlive_recurrent_noise(period):
    assert periodic_tokens_alive("code", noise_steps=60, noise_rate=0.1, period=period) >= 0.9


@pytest.mark.parametrize("period", [12, 25])
def test_after_one_burst_of_noise_the_second_term_loses_what_the_first_alone_keeps(period):
    burst = {"noise_steps": 10, "noise_rate": 0.1, "period": period}
    assert periodic_tokens_alive("code", **burst) == 0.0
    assert periodic_tokens_alive("first_term", **burst) == 1.0
