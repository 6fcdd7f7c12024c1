"""A2SF's score and selection against plain loops, its presets, and the attached class against a plain simulation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqwise.core.method import Method
from seqwise.methods.cache.a2sf import (
    A2SF,
    H2O,
    TOVA,
    SnapKV,
    accumulate,
    group_heads,
    prefill_score,
    row_weights,
    select,
)
from seqwise.testing.families import FAMILIES

ALPHAS = (1.0, 0.9, 0.5, 0.0)


def causal(seed, n, heads=2):
    z = 2 * torch.randn(heads, n, n, generator=torch.Generator().manual_seed(seed))
    return z.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf).softmax(-1)


@given(st.integers(0, 10_000), st.integers(1, 33), st.sampled_from(ALPHAS), st.data())
def test_recursion_equals_the_closed_form_in_chunks_of_any_size(seed, n, alpha, data):
    S = causal(seed, n)
    closed = [[sum(alpha ** (n - 1 - q) * S[h, q, k].item() for q in range(n)) for k in range(n)] for h in range(2)]
    torch.testing.assert_close(prefill_score(S, alpha), torch.tensor(closed), rtol=1e-4, atol=1e-5)
    A = torch.zeros(2, 0)
    start = 0
    while start < n:
        stop = start + data.draw(st.integers(1, n - start))
        A = accumulate(A, S[:, start:stop, :stop], alpha)
        start = stop
    torch.testing.assert_close(A, prefill_score(S, alpha), rtol=1e-4, atol=1e-5)


def test_alpha_one_accumulates_and_alpha_zero_sees_the_last_row_only():
    S = causal(1, 9)
    torch.testing.assert_close(prefill_score(S, 1.0), S.sum(-2))
    assert torch.equal(prefill_score(S, 0.0), S[:, -1])
    assert row_weights(4, 0.5).tolist() == [0.125, 0.25, 0.5, 1.0] and row_weights(2, 0.0).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("alpha", [0.9, 0.5])
def test_forgetting_after_adding_is_a_shifted_start(alpha):
    """score = (score + s) * alpha is alpha times the recursion that starts from A_0 / alpha."""
    S = causal(2, 20)
    stored = prefill_score(S[:, :8, :8], alpha)
    ours = stored / alpha
    for q in range(8, 20):
        stored = alpha * (torch.nn.functional.pad(stored, (0, 1)) + S[:, q, : q + 1])
        ours = accumulate(ours, S[:, q : q + 1, : q + 1], alpha)
    torch.testing.assert_close(stored, alpha * ours)
    assert not torch.allclose(ours, prefill_score(S, alpha))  # the start is not forgotten at once


def test_uniform_attention_favours_the_oldest_unless_it_is_forgotten():
    n = 400
    S = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    A = prefill_score(S, 1.0)
    assert (A.diff() < 0).all() and A[0] / A[-1] > 1000
    A = prefill_score(S, 0.9)
    assert A[0] / A[-1] < 1 / (1 - 0.9) + 1


def test_scores_are_float32_whatever_the_attention_is():
    S = torch.full((3000, 1), 1e-3, dtype=torch.bfloat16)
    A = prefill_score(S, 0.9999)
    expected = S[0].float().item() * (1 - 0.9999**3000) / (1 - 0.9999)
    assert A.dtype == torch.float32 and A.item() == pytest.approx(expected, rel=1e-3)


def test_query_heads_are_summed_into_their_kv_head():
    score = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [10.0, 20.0], [30.0, 40.0]]])
    assert group_heads(score, 2).tolist() == [[[4.0, 6.0], [40.0, 60.0]]]
    assert torch.equal(group_heads(score, 4), score)


@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 25), st.integers(0, 25))
def test_select_keeps_the_recent_and_the_best_of_the_others(seed, n, budget, recent):
    score = torch.randint(0, 4, (2, 3, n), generator=torch.Generator().manual_seed(seed)).float()
    kept = select(score, budget, recent)
    assert kept.shape == (2, 3, min(budget, n))
    R = min(recent, budget, n)
    for row, found in zip(score.flatten(0, 1).tolist(), kept.flatten(0, 1).tolist(), strict=True):
        best = sorted(range(n - R), key=lambda i: (-row[i], -i))[: min(budget, n) - R]
        assert found == sorted(best) + list(range(n - R, n))


def test_ties_of_exact_zeros_go_to_the_newer():
    assert select(torch.tensor([0.0, 0.0, 5.0, 0.0, 0.0, 0.0]), 3, 1).tolist() == [2, 4, 5]


# the attached class


def simulate(q, k, ids, prompt, budget, recent, alpha, evict="every_step", window=None):
    """Kept tokens per KV head after the prompt and after each step, on plain lists."""
    H, Hkv, D = q.shape[0], k.shape[0], q.shape[-1]
    g, n = H // Hkv, len(ids)
    history = []
    slots = [list(range(prompt)) for _ in range(Hkv)]
    A = [dict.fromkeys(range(prompt), 0.0) for _ in range(Hkv)]

    def row(h, i, tokens):
        z = torch.stack([q[h, i] @ k[h // g, j] for j in tokens]) / math.sqrt(D)
        return dict(zip(tokens, z.softmax(0).tolist(), strict=True))

    def evicted(h):
        tokens = slots[h]
        if len(tokens) <= budget:
            return tokens
        old, young = tokens[: len(tokens) - recent], tokens[len(tokens) - recent :]
        best = sorted(old, key=lambda j: (-A[h][j], -j))[: budget - recent]
        return sorted(best) + young

    for h in range(Hkv):
        for i in range(prompt):
            if window is not None and i < prompt - window:
                continue
            for head in range(h * g, (h + 1) * g):
                for j, p in row(head, i, range(i + 1)).items():
                    A[h][j] += alpha ** (prompt - 1 - i) * p
        slots[h] = evicted(h)
    history.append([list(s) for s in slots])
    for i in range(prompt, n):
        for h in range(Hkv):
            slots[h] = [*slots[h], i]
            A[h] = {j: alpha * A[h].get(j, 0.0) for j in slots[h]}
            for head in range(h * g, (h + 1) * g):
                for j, p in row(head, i, slots[h]).items():
                    A[h][j] += p
            if evict == "every_step":
                slots[h] = evicted(h)
        history.append([list(s) for s in slots])
    return history


@pytest.mark.parametrize(
    "method, settings",
    [
        (A2SF(budget=11, forget=0.9, recent=3), {"alpha": 0.9, "recent": 3}),
        (A2SF(budget=11, forget=0.5, recent=0), {"alpha": 0.5, "recent": 0}),
        (A2SF(budget=11, forget=0.9, recent=11), {"alpha": 0.9, "recent": 11}),
        (A2SF(budget=11, forget=0.9, recent=3, evict="prefill"), {"alpha": 0.9, "recent": 3, "evict": "prefill"}),
        (H2O(budget=11, recent=3), {"alpha": 1.0, "recent": 3}),
        (TOVA(budget=11), {"alpha": 0.0, "recent": 0}),
        (
            SnapKV(budget=11, window=4, recent=4, pool=1),
            {"alpha": 1.0, "recent": 4, "window": 4, "evict": "prefill"},
        ),
    ],
    ids=str,
)
def test_keeps_what_a_plain_simulation_keeps(tools, method, settings):
    model = tools.build()
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(3))[:33]
    q, k, _ = tools.first_layer(model, ids)
    expected = simulate(q, k, ids, prompt=21, budget=11, **settings)
    for (run, _), kept in zip(tools.by_steps(model, ids[None], 21, method), expected, strict=True):
        assert run.kept(layer=0) == [kept]


@pytest.mark.parametrize(
    "method",
    [
        A2SF(budget=12, recent=4),
        A2SF(budget=0.5, recent=2),
        H2O(budget=10, recent=3),
        TOVA(budget=9),
        SnapKV(budget=14, window=4, recent=4, pool=3),
    ],
    ids=str,
)
def test_left_padding_changes_nothing(tools, method):
    tools.assert_padded_equals_alone(method)


@pytest.mark.parametrize("method", [A2SF(budget=1.0), A2SF(budget=60, forget=0.3), H2O(budget=1.0), TOVA(budget=100)])
def test_a_budget_of_everything_changes_nothing(tools, llama, method):
    batch = FAMILIES["llama"].prompt(40)
    plain, _ = tools.generate(llama, batch)
    ours, run = tools.generate(llama, batch, method)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert not run.acted and run.kept(layer=3) == [[list(range(51))] * 2]


def test_the_cache_keeps_its_size_while_decoding_and_takes_fewer_bytes(tools, llama):
    batch = FAMILIES["llama"].prompt(40)
    for new in (2, 12):
        run = tools.generate(llama, batch, A2SF(budget=0.25, recent=4), new)[1]
        report = run.report()
        assert report.kept == [10.0] * 4
        assert report.cache_bytes < report.plain_bytes / 2 and report.live_bytes == 10 * 4 * 2 * 2 * 8 * 4
    run = tools.generate(llama, batch, SnapKV(budget=10, window=4, recent=4), 12)[1]
    assert run.report().kept == [21.0] * 4  # nothing is evicted after the prompt


def test_each_layer_has_its_own_budget_alpha_and_recent(tools, llama):
    batch = FAMILIES["llama"].prompt(40)
    budgets, recents = (5, 20, 10, 40), (1, 20, 4, 0)
    run = tools.generate(llama, batch, A2SF(budget=budgets, forget=(1.0, 0.9, 0.5, 0.0), recent=recents), 8)[1]
    assert run.report().kept == [5.0, 20.0, 10.0, 40.0]
    assert run.kept(layer=1) == [[list(range(27, 47))] * 2]  # all of its budget is recent
    first = tools.generate(llama, batch, A2SF(budget=5, forget=1.0, recent=1), 8)[1]
    assert first.kept(layer=0) == run.kept(layer=0)


@pytest.mark.parametrize("field, value", [("forget", (0.9, 0.5)), ("recent", (4, 4, 4))])
def test_one_entry_per_layer(llama, field, value):
    with pytest.raises(ValueError, match=rf"A2SF.{field} must have one entry per layer \(4\), got {len(value)}"):
        A2SF(budget=8, **{field: value}).on(llama)


def test_pooling_spreads_scores_to_neighbours_but_not_from_the_recent(tools):
    model = tools.build(heads=2, kv_heads=2)
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(4))[:30]
    q, k, _ = tools.first_layer(model, ids)
    z = q[:, -5:] @ k.mT / q.shape[-1] ** 0.5
    mask = torch.ones(30, 30, dtype=torch.bool).triu(1)[-5:]
    score = z.masked_fill(mask, -math.inf).softmax(-1).sum(-2)  # (2, 30) of the last 5 rows
    kept = next(iter(tools.by_steps(model, ids[None], 30, SnapKV(budget=12, window=5, recent=5, pool=5))))[0].kept(0)[0]
    for h in range(2):
        old = score[h, :25].tolist()
        pooled = [max(old[max(0, i - 2) : i + 3]) for i in range(25)]
        best = sorted(range(25), key=lambda i: (-pooled[i], -i))[:7]
        assert kept[h] == sorted(best) + list(range(25, 30))


def test_long_rows_of_a_kept_cache_decay_by_their_number(tools):
    """A block of rows after the prompt equals the same rows one by one, in the score that is kept."""
    model = tools.build()
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(5))[None, :30]
    method = A2SF(budget=40, forget=0.7, recent=4)  # nothing is evicted: the state is the score
    for run, _ in tools.by_steps(model, ids, 20, method):
        stepped = run.cache.layers[0].state["score"]
    with method.on(model) as run, torch.no_grad():
        model(input_ids=ids[:, :20], use_cache=True)
        run.end_prompt()
        model(input_ids=ids[:, 20:], position_ids=torch.arange(20, 30)[None], cache=run.cache, use_cache=True)
        block = run.cache.layers[0].state["score"]
    torch.testing.assert_close(block, stepped)


def test_chunked_prefill_with_room_for_everything_is_exact(tools, llama):
    batch = FAMILIES["llama"].prompt(40)
    plain, _ = tools.generate(llama, batch)
    with A2SF(budget=100).on(llama, chunk=7):
        out = llama.generate(
            **batch, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    torch.testing.assert_close(torch.stack(out.logits), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: A2SF(forget=1.1), r"A2SF.forget must be .*1.1"),
        (lambda: A2SF(recent=-1), r"A2SF.recent must be .*-1"),
        (lambda: A2SF(budget=0), r"A2SF.budget must be .*0"),
        (lambda: A2SF(pool=4), r"A2SF.pool must be an odd whole number >= 1, got 4"),
        (lambda: H2O(forget=0.9), r"H2O.forget must be .*0.9 .*use A2SF to forget"),
        (lambda: TOVA(forget=0.9), r"TOVA.forget must be .*0.9"),
        (lambda: SnapKV(pool=2), r"SnapKV.pool must be an odd"),
    ],
)
def test_bad_hyperparameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_methods_are_written_as_they_are_read():
    for method in (A2SF(budget=0.25, forget=(0.9, 1.0), recent=(4, 8)), H2O(budget=9), TOVA(), SnapKV(window=None)):
        assert Method.parse(str(method)) == method
