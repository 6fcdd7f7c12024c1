import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqwise.methods.attend.attention_calibration import (
    accepted_heads,
    calibrate,
    calibrate_map,
    calibrated_layers,
    column_mean,
    mean_from_sums,
    sink_set,
    threshold,
)


def causal_map(n, seed=0, heads=2, sinks=((0, 4.0), (5, 3.0))):
    """Random causal probabilities (heads, n, n) whose columns `sinks` receive extra logits."""
    logits = torch.randn(heads, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for column, extra in sinks:
        if column < n:
            logits[..., column] += extra
    return logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1).float()


def reference(A, beta, tau):
    """Steps 1 to 4 in plain loops over one (n, n) map."""
    n = A.shape[-1]
    a = [sum(float(A[i, j]) for i in range(j, n)) / (n - j) for j in range(n)]
    S = [j for j in range(1, n) if a[j] > tau]
    out = A.clone()
    for i in range(1, n):
        freed = (1 - beta) * sum(float(A[i, j]) for j in S)
        rest = sum(float(A[i, u]) for u in range(n) if u not in S)
        for j in range(n):
            out[i, j] = beta * A[i, j] if j in S else A[i, j] + freed * A[i, j] / rest
    out[0] = 0.0
    out[0, 0] = 1.0
    return out, a, S


@pytest.mark.parametrize("n", [1, 7, 23])
@pytest.mark.parametrize("rule", ["absolute:0.1", "relative:5"])
def test_equals_plain_loops(n, rule):
    A = causal_map(n)
    tau = threshold(rule, n)
    out = calibrate_map(A, beta=0.4, rule=rule)
    for head in range(A.shape[0]):
        expected, a, S = reference(A[head], 0.4, tau)
        torch.testing.assert_close(column_mean(A[head]), torch.tensor(a))
        assert sink_set(column_mean(A[head]), tau).nonzero().flatten().tolist() == S
        torch.testing.assert_close(out[head], expected)
    if n == 23 and rule == "absolute:0.1":
        assert S, "the planted sink must be found, or this test compares nothing"


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 17), seed=st.integers(0, 99), beta=st.floats(0, 1))
def test_rows_keep_their_sum_and_causal_zeros(n, seed, beta):
    A = causal_map(n, seed)
    out = calibrate_map(A, beta)
    torch.testing.assert_close(out.sum(-1), torch.ones(2, n))
    assert (out >= 0).all()
    assert (out.triu(1) == 0).all()


def test_beta_one_and_an_empty_set_are_the_identity():
    A = causal_map(13)
    S = sink_set(column_mean(A), 0.1)
    assert S.any()
    torch.testing.assert_close(calibrate(A, S, beta=1.0), A, rtol=0, atol=0)
    torch.testing.assert_close(calibrate(A, torch.zeros_like(S), beta=0.4), A, rtol=0, atol=0)


def test_sinks_keep_exactly_beta_of_their_column_mean():
    A = causal_map(31)
    a = column_mean(A)
    S = sink_set(a, 0.1)
    after = column_mean(calibrate(A, S, beta=0.25))
    torch.testing.assert_close(after[S], 0.25 * a[S])
    assert (after[~S] > a[~S])[1:].any()


def test_drops_token_0_and_not_the_first_sink_found():
    A = causal_map(40, sinks=((5, 4.0), (9, 4.0)))
    a = column_mean(A)[0]
    a[0] = 0.01  # token 0 is no sink here: the first element above tau is token 5
    S = sink_set(a, 0.1)
    assert S[5] and S[9] and not S[0]


def test_threshold_is_strict_and_relative_to_the_real_length():
    assert sink_set(torch.tensor([0.5, 0.1, 0.2]), 0.1).tolist() == [False, False, True]
    assert threshold("absolute:0.15", 1000) == 0.15
    assert threshold("relative:5", 50) == 0.1
    torch.testing.assert_close(threshold("relative:5", torch.tensor([10, 50])), torch.tensor([0.5, 0.1]))


@pytest.mark.parametrize("rule", ["0.1", "absolute", "relative:-1", "relative:0", "absolute:nan", "share:1"])
def test_refuses_other_rules(rule):
    with pytest.raises(ValueError, match="threshold must be 'absolute:x' or 'relative:x'"):
        threshold(rule, 10)


@pytest.mark.parametrize("beta", [-0.1, 1.5, math.nan])
def test_refuses_beta_outside_its_range(beta):
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\], got"):
        calibrate(causal_map(5), torch.zeros(5, dtype=torch.bool), beta)


def test_left_padding_gives_what_the_prompt_gives_alone():
    lengths, n = [9, 14], 14
    alone = [causal_map(length, seed=length) for length in lengths]
    A = torch.rand(2, 2, n, n, generator=torch.Generator().manual_seed(1))  # garbage at padding
    live = torch.zeros(2, 1, n, dtype=torch.bool)
    for b, length in enumerate(lengths):
        A[b, :, n - length :, n - length :] = alone[b]
        live[b, :, n - length :] = True
    for rule in ("absolute:0.1", "relative:2"):
        out = calibrate_map(A, 0.4, rule, live)
        a = column_mean(A, live)
        for b, length in enumerate(lengths):
            inner = out[b, :, n - length :, n - length :]
            torch.testing.assert_close(inner, calibrate_map(alone[b], 0.4, rule))
            torch.testing.assert_close(a[b, :, n - length :], column_mean(alone[b]))
            assert (a[b, :, : n - length] == 0).all()
    torch.testing.assert_close(out[0, :, : n - 9], A[0, :, : n - 9], rtol=0, atol=0)


def test_padding_receives_nothing():
    live = torch.tensor([False, True, True, True])
    row = torch.tensor([[0.2, 0.3, 0.1, 0.4]])  # a padded key with mass, as a careless mask would leave it
    out = calibrate(row, torch.tensor([False, False, False, True]), 0.5, live)
    torch.testing.assert_close(out, torch.tensor([[0.2, 0.3 + 0.2 * 0.75, 0.1 + 0.2 * 0.25, 0.2]]))


def test_a_row_with_all_its_mass_on_sinks_stays():
    A = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.25, 0.25]])
    out = calibrate(A, torch.tensor([False, True, False]), 0.4)
    assert out[0].tolist() == [0.0, 1.0, 0.0]
    torch.testing.assert_close(out[1], torch.tensor([0.6, 0.1, 0.3]))


def test_a_tiny_recipient_takes_the_freed_mass_without_overflow():
    out = calibrate(torch.tensor([[1e-38, 1.0, 0.0]]), torch.tensor([False, True, False]), 0.4)
    torch.testing.assert_close(out, torch.tensor([[0.6, 0.4, 0.0]]))


def test_decode_row_equals_the_same_row_of_the_block():
    A = causal_map(21)
    S = sink_set(column_mean(A), 0.1)
    torch.testing.assert_close(calibrate(A, S)[:, -1:], calibrate(A[:, -1:], S))
    torch.testing.assert_close(calibrate(A[:, -1:], S).sum(-1), torch.ones(2, 1))


def test_streamed_sums_give_the_dense_mean():
    A = causal_map(19)
    colsum, count = torch.zeros(2, 19), torch.zeros(19, dtype=torch.long)
    for start in range(0, 19, 4):
        rows = torch.arange(start, min(start + 4, 19))
        colsum += A[:, rows].sum(-2)
        count += (rows[:, None] >= torch.arange(19)).sum(0)
    torch.testing.assert_close(mean_from_sums(colsum, count), column_mean(A))
    assert mean_from_sums(torch.zeros(3), torch.zeros(3)).tolist() == [0, 0, 0]


def test_sliding_window_counts_only_the_queries_that_see_the_key():
    n, w = 12, 4
    i = torch.arange(n)
    sees = (i[:, None] >= i) & (i[:, None] - i < w)
    A = sees / sees.sum(-1, keepdim=True)
    expected = [sum(float(A[q, j]) for q in range(j, min(n, j + w))) / min(w, n - j) for j in range(n)]
    torch.testing.assert_close(column_mean(A, window=w), torch.tensor(expected))


def test_half_precision_is_summed_in_fp32():
    n = 4096
    A = torch.full((n, n), 1.0 / n).tril().to(torch.float16)
    assert column_mean(A).dtype == torch.float32
    torch.testing.assert_close(column_mean(A)[0], A[:, 0].double().mean().float())
    out = calibrate(A[-1:].bfloat16(), torch.arange(n) == 7, 0.4)
    assert out.dtype == torch.bfloat16


def test_layers_and_heads():
    assert list(calibrated_layers(32)) == list(range(2, 31))
    assert list(calibrated_layers(32, spare_last=False)) == list(range(2, 32))
    assert list(calibrated_layers(2)) == []
    accuracy = torch.tensor([[0.5, 0.6, math.nan], [0.61, 0.4, 0.7]])
    assert accepted_heads(accuracy, 0.5) == ((0, 1), (1, 0), (1, 2))
    assert accepted_heads(accuracy, 0.5, margin=0.15) == ((1, 2),)
