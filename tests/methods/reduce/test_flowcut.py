import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqwise.methods.reduce.flowcut import (
    accumulate,
    attention_term,
    decoder_score,
    drop_count,
    entropy_ratio,
    layer_score,
    semantic_term,
    value_norm,
)

B, h, n, D = 2, 3, 7, 5  # n patches beside one CLS row


def qkv(seed: int = 0, heads: int = h, rows: int = n + 1) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(3, B, heads, rows, D, generator=torch.Generator().manual_seed(seed)))


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in values)
    return [math.exp(x) / total for x in values]


def dot(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(sum(p * q for p, q in zip(x.tolist(), y.tolist(), strict=True)))


def test_terms_of_a_tower_layer_with_cls():
    q, k, v = qkv()
    for b in range(B):
        a, g = torch.zeros(n + 1), torch.zeros(n + 1)
        for head in range(h):
            a += torch.tensor(softmax([dot(q[b, head, 0], k[b, head, j]) / math.sqrt(D) for j in range(n + 1)])) / h
            g += torch.tensor(softmax([dot(v[b, head, 0], v[b, head, j]) for j in range(n + 1)])) / h
        e = [sum(abs(sum(v[b, head, j, c] for head in range(h)) / h) for c in range(D)) for j in range(1, n + 1)]
        torch.testing.assert_close(attention_term(q, k)[b], a[1:])
        torch.testing.assert_close(semantic_term(v)[b], g[1:])
        torch.testing.assert_close(value_norm(v[..., 1:, :])[b], torch.tensor(e))
        assert a[1:].sum() < 1  # the CLS column took part in the softmax


def test_without_cls_the_mean_query_attends_every_token():
    q, k, _ = qkv(1)
    A = (q.mean(-2, keepdim=True) @ k.mT / math.sqrt(D)).softmax(-1)
    a = attention_term(q, k, cls=False)
    torch.testing.assert_close(a, A[..., 0, :].mean(1))
    torch.testing.assert_close(a.sum(-1), torch.ones(B))


def test_terms_take_half_precision_and_answer_in_float32():
    q, k, v = (x.bfloat16() for x in qkv(2))
    exact_q, exact_k, exact_v = q.float(), k.float(), v.float()
    for got, wanted in (
        (attention_term(q, k), attention_term(exact_q, exact_k)),
        (semantic_term(v), semantic_term(exact_v)),
        (value_norm(v), value_norm(exact_v)),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted)


def test_layer_score_weighs_both_shares_by_the_norm():
    a, g, e = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([[2.0, 2.0], [1.0, 4.0]]), torch.tensor([3.0, 5.0])
    torch.testing.assert_close(layer_score(a, g, e), torch.tensor([[3 * 0.75, 5 * 1.25], [3 * 0.7, 5 * 1.3]]))
    torch.testing.assert_close(layer_score(a, None, e), torch.tensor([[0.75, 3.75], [1.5, 2.5]]))


def test_running_score_halves_the_past_at_every_layer():
    S = [torch.tensor([8.0, 0.0]), torch.tensor([0.0, 4.0]), torch.tensor([2.0, 2.0])]
    C = None
    for layer in S:
        C = accumulate(C, layer)
    torch.testing.assert_close(C, torch.tensor([0.25 * 8 + 0.5 * 2, 0.25 * 4 + 0.5 * 2]))


def test_entropy_ratio_ends_and_a_value_by_hand():
    a = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.3, 0.0, 0.0, 0.0], [0.2, 0.1, 0.1, 0.0]])
    wanted = [1.0, 0.0, (0.5 * math.log(2) + 2 * 0.25 * math.log(4)) / math.log(4)]
    rho = entropy_ratio(a)
    assert not rho.isnan().any()  # 0 ln 0 counts as 0
    torch.testing.assert_close(rho, torch.tensor(wanted), atol=1e-6, rtol=0)


def test_entropy_ratio_with_the_small_addition_inside_the_logarithm():
    a = torch.tensor([0.5, 0.3, 0.2])
    wanted = -sum(p * math.log(p + 0.25) for p in a.tolist()) / math.log(3)
    torch.testing.assert_close(entropy_ratio(a, eps=0.25).item(), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rem, wanted", [(4, 0), (2, 0), (0, 5), (3, 0)])
def test_uniform_attention_drops_nothing_before_the_last_cut(rem, wanted):
    assert drop_count(torch.full((2, 8), 0.1), T=3, rem=rem).tolist() == [wanted] * 2


@pytest.mark.parametrize("rem, wanted", [(20, 99), (18, 104), (4, 221), (2, 313), (0, 442), (1, 0), (19, 0)])
def test_one_hot_attention_drops_the_whole_share(rem, wanted):
    a = torch.zeros(1, 570).index_fill(1, torch.tensor([5]), 0.4)
    assert drop_count(a, T=128, rem=rem).tolist() == [wanted]  # round(442 / sqrt(rem))


@pytest.mark.parametrize("n, wanted", [(6, 2), (8, 4), (10, 4), (12, 6), (7, 3)])
def test_halves_round_to_the_even_count(n, wanted):
    one_hot = torch.zeros(n).index_fill(0, torch.tensor([0]), 1.0)
    assert drop_count(one_hot, T=1, rem=4).item() == wanted  # 2.5, 3.5, 4.5, 5.5, 3


def test_each_image_drops_its_own_count():
    sharp, flat = torch.tensor([0.9, 0.0, 0.0, 0.0, 0.0, 0.0]), torch.full((6,), 0.15)
    assert drop_count(torch.stack([sharp, flat]), T=2, rem=4).tolist() == [2, 0]
    assert drop_count(flat[None], T=2, rem=4).tolist() == [0]


def test_counts_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"T must be >= 1, got 0"):
        drop_count(torch.ones(3), T=0, rem=0)
    with pytest.raises(ValueError, match=r"rem must be >= 0, got -1"):
        drop_count(torch.ones(3), T=1, rem=-1)


@settings(max_examples=50, deadline=None)
@given(
    patches=st.integers(1, 40),
    T=st.integers(1, 40),
    s=st.integers(1, 23),
    sharpness=st.floats(0, 30),
    seed=st.integers(0, 999),
)
def test_a_whole_schedule_ends_at_the_target_and_never_below(patches, T, s, sharpness, seed):
    generator = torch.Generator().manual_seed(seed)
    left = patches
    for i in range(s):
        a = (sharpness * torch.randn(left, generator=generator)).softmax(-1)
        drop = int(drop_count(a, T, rem=s - i - 1))
        assert drop == 0 or (s - i) % 2 == 1
        left -= drop
        assert left >= min(T, patches)
    assert left == min(T, patches)


def test_decoder_score_with_grouped_heads():
    H, Hkv = 6, 3
    generator = torch.Generator().manual_seed(4)
    q_last = torch.randn(B, H, D, generator=generator)
    k, v = torch.randn(2, B, Hkv, n, D, generator=generator)
    v_last = torch.randn(B, Hkv, D, generator=generator)
    got = decoder_score(q_last, k, v_last, v)
    for b in range(B):
        rel, sem, mean = torch.zeros(n), torch.zeros(n), torch.zeros(n, D)
        for head in range(H):
            kv = head // (H // Hkv)
            rel += torch.tensor(softmax([dot(q_last[b, head], k[b, kv, j]) / math.sqrt(D) for j in range(n)])) / H
            sem += torch.tensor(softmax([dot(v_last[b, kv], v[b, kv, j]) / math.sqrt(D) for j in range(n)])) / H
            mean += v[b, kv] / H
        torch.testing.assert_close(got[b], (rel + sem) * mean.abs().sum(-1))
