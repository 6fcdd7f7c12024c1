"""LazyEviction's state, score and selection against a plain per-slot reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqwise.core.errors import PromptError
from seqwise.core.select import descending
from seqwise.methods.cache.lazy_eviction import LazyEviction, due, group_attention, mri_score, select, track
from seqwise.testing.families import FAMILIES


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
            rank = sorted(range(len(old)), key=lambda i: (-sum(reference_score(t, old[i]["last"], old[i]["mri"])), -i))
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
    new_last, new_mri = track(last, torch.zeros_like(last), torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16), 0.5, 4097)
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


# the attached class


def simulate(q, k, prompt, alpha, budget, window, first_term=False):
    """Kept tokens per KV head after the prompt and each step: attention over the slots held, maximum of each group."""
    H, Hkv, D = q.shape[0], k.shape[0], q.shape[-1]
    g = H // Hkv
    slots = [[{"token": i, "last": 0, "mri": 0} for i in range(prompt)] for _ in range(Hkv)]
    history = [[[slot["token"] for slot in head] for head in slots]]
    for t, i in enumerate(range(prompt, q.shape[1]), 1):
        for h in range(Hkv):
            slots[h].append({"token": i, "last": t - 1, "mri": 0})
            keys = k[h, [slot["token"] for slot in slots[h]]]
            a = (q[h * g : (h + 1) * g, i] @ keys.mT / math.sqrt(D)).softmax(-1).amax(0)
            for slot, p in zip(slots[h], a.tolist(), strict=True):
                if p >= alpha:
                    slot["mri"] = max(slot["mri"], t - slot["last"])
                    slot["last"] = t
            if len(slots[h]) > budget and t % window == 0:
                old, new = slots[h][:-window], slots[h][-window:]

                state = (torch.tensor([slot[name] for slot in old]) for name in ("last", "mri"))
                value = mri_score(t, *state, "first_term" if first_term else "code")  # checked above by itself
                rank = descending(value, "later").tolist()  # states whose terms sum to the same are ties
                slots[h] = [old[n] for n in sorted(rank[: budget - window])] + new
        history.append([[slot["token"] for slot in head] for head in slots])
    return history


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("score", ["code", "first_term"])
def test_keeps_what_a_plain_simulation_keeps(tools, heads, kv_heads, score):
    model = tools.build(heads=heads, kv_heads=kv_heads)
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(6))[:60]
    q, k, _ = tools.first_layer(model, ids)
    expected = simulate(q, k, 19, 0.06, 14, 5, score == "first_term")
    assert len({len(kept[0]) for kept in expected}) > 5  # it is cut several times
    method = LazyEviction(budget=14, window=5, alpha=0.06, score=score)
    for (run, _), kept in zip(tools.by_steps(model, ids[None], 19, method), expected, strict=True):
        assert run.kept(layer=0) == [kept]


def test_nothing_goes_before_a_window_has_passed_and_the_cache_stays_below_budget_and_window(tools):
    model = tools.build(layers=2)
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(7))[None, :70]
    sizes = [
        len(run.kept(layer=1)[0][0])
        for run, _ in tools.by_steps(model, ids, 30, LazyEviction(budget=12, window=4, alpha=0.05))
    ]
    assert sizes[:5] == [30, 31, 32, 33, 12]  # a prompt above the budget waits as well
    assert sizes[4:] == [12 + t % 4 for t in range(37)] and max(sizes[4:]) == 12 + 4 - 1


def test_a_cache_within_the_budget_is_left_alone_at_the_end_of_a_window(tools):
    model = tools.build()
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(8))[None, :20]
    sizes = [
        len(run.kept(layer=0)[0][0]) for run, _ in tools.by_steps(model, ids, 4, LazyEviction(budget=12, window=4))
    ]
    assert sizes == [4, *range(5, 12), 12, 13, 14, 15, 12, 13, 14, 15, 12]


@pytest.mark.parametrize("method", [LazyEviction(budget=14, window=4, alpha=0.02), LazyEviction(window=3, alpha=0.05)])
def test_left_padding_changes_nothing(tools, method):
    tools.assert_padded_equals_alone(method)


@pytest.mark.parametrize("method", [LazyEviction(budget=1.0), LazyEviction(budget=60, window=5)])
def test_a_budget_of_everything_changes_nothing(tools, llama, method):
    batch = FAMILIES["llama"].prompt(40)
    plain, _ = tools.generate(llama, batch)
    ours, run = tools.generate(llama, batch, method)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert not run.acted


def test_a_new_prompt_on_a_kept_cache_resets_the_state(tools):
    """Slots of both prompts start anew, as old as the prompt is; steps between them are no silence."""
    model = tools.build()
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(9))[None, :40]
    method = LazyEviction(budget=80, window=30, alpha=0.03)
    with method.on(model) as run, torch.no_grad():

        def feed(start, stop):
            positions = torch.arange(start, stop)[None]
            model(input_ids=ids[:, start:stop], position_ids=positions, cache=run.cache, use_cache=True)

        feed(0, 10)
        run.end_prompt()
        for column in range(10, 20):
            feed(column, column + 1)
        state = run.cache.layers[0].state
        assert state["mri"].any()
        run.begin_prompt()
        feed(20, 30)
        run.end_prompt()
        state = run.cache.layers[0].state
        assert not state["mri"].any() and (state["last"] == 10).all()
        feed(30, 31)
        assert set(run.cache.layers[0].state["mri"].unique().tolist()) <= {0, 1}


def test_a_block_of_rows_counts_as_single_steps(tools):
    model = tools.build()
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(10))[None, :30]
    method = LazyEviction(budget=60, window=50, alpha=0.05)
    for run, _ in tools.by_steps(model, ids, 15, method):
        stepped = dict(run.cache.layers[0].state)
    with method.on(model) as run, torch.no_grad():
        model(input_ids=ids[:, :15], use_cache=True)
        run.end_prompt()
        model(input_ids=ids[:, 15:], position_ids=torch.arange(15, 30)[None], cache=run.cache, use_cache=True)
        block = run.cache.layers[0].state
    assert stepped["mri"].max() > 3
    for name in ("last", "mri"):
        assert torch.equal(block[name], stepped[name].to(block[name].dtype))


def test_window_and_budget_are_checked_when_they_are_known(tools, llama):
    with pytest.raises(ValueError, match=r"LazyEviction.window must be in \[1, budget\) = \[1, 27\), got 27"):
        LazyEviction(budget=27)
    with pytest.raises(ValueError, match=r"= \[1, 9\), got 10"):
        LazyEviction(budget=(30, 9), window=10)
    with pytest.raises(ValueError, match=r"LazyEviction.alpha must be .*got 0"):
        LazyEviction(alpha=0.0)
    with pytest.raises(PromptError, match="must be < the budget, which is 20 slots for this prompt, got 27"):
        tools.generate(llama, FAMILIES["llama"].prompt(40), LazyEviction(budget=0.5))
    assert "_seqwise_run" not in vars(llama)
