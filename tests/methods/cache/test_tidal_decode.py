"""TidalDecode's schedule, selection and gathered attention against masked attention."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqwise.methods.cache.tidal_decode import schedule, scores, select, selected_attention


def tensors(seed, B=2, H=6, Hkv=2, n=23, D=5, Dv=5):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(B, H, 1, D, generator=g),
        torch.randn(B, Hkv, n, D, generator=g),
        torch.randn(B, Hkv, n, Dv, generator=g),
    )


def dense(q, K, V, seen=None):
    """Attention with repeated KV heads; seen: (B, H, n) bool."""
    g = q.shape[1] // K.shape[1]
    z = (q @ K.repeat_interleave(g, 1).mT / math.sqrt(q.shape[-1])).squeeze(2)
    if seen is not None:
        z = z.masked_fill(~seen, float("-inf"))
    return z, z.softmax(-1)[:, :, None] @ V.repeat_interleave(g, 1)


def as_mask(idx, n):
    return torch.zeros(*idx.shape[:-1], n, dtype=torch.bool).scatter(-1, idx, True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([(4, 4), (6, 2), (3, 1)]), st.booleans())
def test_gathered_attention_equals_masked_attention(seed, k, heads, keep_current):
    q, K, V = tensors(seed, H=heads[0], Hkv=heads[1], Dv=3)
    idx = select(scores(q, K), k, keep_current)
    z, _ = dense(q, K, V)
    assert idx.shape == (2, heads[0], min(k, 23))
    assert torch.equal(idx, idx.sort(-1).values)
    for b in range(2):
        for h in range(heads[0]):
            row = z[b, h].tolist()
            if keep_current:
                row[-1] = math.inf
            best = sorted(range(23), key=lambda i: (-row[i], i))[:k]
            assert idx[b, h].tolist() == sorted(best)
    torch.testing.assert_close(selected_attention(q, K, V, idx), dense(q, K, V, as_mask(idx, 23))[1])


def test_a_budget_of_the_whole_cache_is_full_attention():
    q, K, V = tensors(3)
    for k in (23, 24, 512):
        idx = select(scores(q, K), k)
        assert idx.tolist() == torch.arange(23).expand(2, 6, -1).tolist()
        full = torch.nn.functional.scaled_dot_product_attention(q, K, V, enable_gqa=True)
        torch.testing.assert_close(selected_attention(q, K, V, idx), full)
    q, K, V = tensors(4, H=2)
    assert torch.equal(
        selected_attention(q, K, V, select(scores(q, K), 99)),
        torch.nn.functional.scaled_dot_product_attention(q, K, V),
    )


def test_only_the_chosen_keys_and_values_are_read():
    q, K, V = tensors(5, H=2)
    idx = select(scores(q, K), 4)
    out = selected_attention(q, K, V, idx)
    hidden = ~as_mask(idx, 23)[..., None]
    poisoned = selected_attention(q, K.masked_fill(hidden, math.nan), V.masked_fill(hidden, math.nan), idx)
    assert torch.equal(out, poisoned)


def test_the_current_token_is_kept_at_the_cost_of_the_weakest():
    z = torch.tensor([[[5.0, 4.0, 3.0, 2.0, -9.0]]])
    assert select(z, 3).tolist() == [[[0, 1, 4]]]
    assert select(z, 3, keep_current=False).tolist() == [[[0, 1, 2]]]
    assert select(z, 1).tolist() == [[[4]]]
    assert z[0, 0, -1] == -9  # the scores are left alone


def test_ties_go_to_the_earlier_position():
    assert select(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), 3).tolist() == [0, 1, 4]
    assert select(torch.zeros(6), 2, keep_current=False).tolist() == [0, 1]


@pytest.mark.parametrize("k", [3, 8, 50])
def test_left_padding_changes_nothing(k):
    q, K, V = tensors(6)
    pads = 9
    live = torch.ones(2, 23 + pads, dtype=torch.bool)
    live[:, :pads] = False
    Kp = torch.cat([20 * q[:, :2].expand(-1, -1, pads, -1), K], 2)  # pads would win every top-k
    Vp = torch.cat([torch.full((2, 2, pads, 5), 1e4), V], 2)
    alone = select(scores(q, K), k)
    for shape in (live, live[:, None], live[:, None].expand(-1, 2, -1)):
        idx = select(scores(q, Kp, live=shape), k)
        kept = [[[i - pads for i in row if i >= pads] for row in sample] for sample in idx.tolist()]
        assert kept == alone.tolist()
        torch.testing.assert_close(selected_attention(q, Kp, Vp, idx, live=shape), selected_attention(q, K, V, alone))


def test_rows_of_different_length_take_what_they_have():
    q, K, V = tensors(7)
    live = torch.ones(2, 23, dtype=torch.bool)
    live[0, :20] = False  # three live slots, k = 5
    idx = select(scores(q, K, live=live), 5)
    assert all({20, 21, 22} <= set(row) for row in idx[0].tolist())
    expected = dense(q, K, V, as_mask(idx, 23) & live[:, None])[1]
    torch.testing.assert_close(selected_attention(q, K, V, idx, live=live), expected)


def test_each_kv_head_may_hold_other_live_slots():
    q, K, V = tensors(11)
    live = torch.rand(2, 2, 23, generator=torch.Generator().manual_seed(1)) < 0.4
    live[..., -1] = True
    seen = live.repeat_interleave(3, dim=1)  # (B, H, n)
    idx = select(scores(q, K, live=live), 23)
    torch.testing.assert_close(selected_attention(q, K, V, idx, live=live), dense(q, K, V, seen)[1])
    best = select(dense(q, K, V, seen)[0], 4)
    assert torch.equal(select(scores(q, K, live=live), 4), best)


def test_scaling_is_the_callers():
    q, K, V = tensors(8)
    idx = select(scores(q, K), 6)
    torch.testing.assert_close(scores(q, K, scaling=1.0), scores(q, K) * math.sqrt(5))
    torch.testing.assert_close(
        selected_attention(q, K, V, idx, scaling=0.3), selected_attention(q * 0.3 * math.sqrt(5), K, V, idx)
    )


def test_half_precision_ranks_in_float32():
    q, K, _ = tensors(9)
    assert scores(q.bfloat16(), K.bfloat16()).dtype == torch.float32


def test_schedule():
    assert schedule(8, 2, 5) == ("full", "full", "select", "reuse", "reuse", "select", "reuse", "reuse")
    assert schedule(3, 0, 2) == ("select", "reuse", "select")
    assert [i for i, role in enumerate(schedule(32)) if role == "select"] == [2, 13]


@pytest.mark.parametrize(
    "layers, start, correction, message",
    [
        (12, 2, 13, r"correction must be in \[1, layers\) = \[1, 12\), got 13"),
        (12, 2, 12, r"correction must be in \[1, layers\) = \[1, 12\), got 12"),
        (12, 5, 5, r"start must be in \[0, correction\) = \[0, 5\), got 5"),
        (12, -1, 5, r"start must be in \[0, correction\) = \[0, 5\), got -1"),
    ],
)
def test_selection_layers_must_exist(layers, start, correction, message):
    with pytest.raises(ValueError, match=message):
        schedule(layers, start, correction)


def test_a_budget_below_one_is_refused():
    with pytest.raises(ValueError, match="budget must be >= 1, got 0"):
        select(torch.zeros(1, 1, 4), 0)


def run_stack(layers, roles, k):
    outs, idx, read = [], None, 0
    for (q, K, V), role in zip(layers, roles, strict=True):
        if role == "reuse":
            outs.append(selected_attention(q, K, V, idx))
            read += idx.shape[-1]
        else:
            if role == "select":
                idx = select(scores(q, K), k)
            outs.append(dense(q, K, V)[1])
            read += K.shape[2]
    return outs, read


def test_layers_with_equal_scores_lose_nothing_against_their_own_top_k():
    q, K, _ = tensors(10)
    layers = [(q, K, tensors(20 + layer)[2]) for layer in range(7)]
    roles = schedule(7, 1, 4)
    outs, read = run_stack(layers, roles, 8)
    for (q, K, V), role, out in zip(layers, roles, outs, strict=True):
        oracle = select(scores(q, K), 8)
        expected = selected_attention(q, K, V, oracle) if role == "reuse" else dense(q, K, V)[1]
        assert torch.equal(out, expected)
    assert read == 3 * 23 + 4 * 8  # keys read per head: layers 0, 1 and 4 in full


def test_the_correction_layer_replaces_the_positions():
    layers = [tensors(30 + layer) for layer in range(4)]
    outs, _ = run_stack(layers, schedule(4, 0, 2), 5)
    q, K, V = layers[3]
    corrected = selected_attention(q, K, V, select(scores(*layers[2][:2]), 5))
    stale = selected_attention(q, K, V, select(scores(*layers[0][:2]), 5))
    assert torch.equal(outs[3], corrected) and not torch.allclose(corrected, stale)
