import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqwise.methods.reduce.transprune import (
    accumulate,
    instruction_attention,
    keep_count,
    stage_score,
    transition,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_transition(x: list[list[float]], y: list[list[float]]) -> list[float]:
    norm = [(math.hypot(*p), math.hypot(*q)) for p, q in zip(x, y, strict=True)]
    dots = [sum(a * b for a, b in zip(p, q, strict=True)) for p, q in zip(x, y, strict=True)]
    e = [math.exp(1 - s / (p * q)) for s, (p, q) in zip(dots, norm, strict=True)]
    return [q / p * e_j / sum(e) for e_j, (p, q) in zip(e, norm, strict=True)]


def test_transition_equals_the_plain_formula():
    x, y = random(2, 7, 5), random(2, 7, 5, seed=1)
    wanted = torch.tensor([plain_transition(x[b].tolist(), y[b].tolist()) for b in range(2)])
    torch.testing.assert_close(transition(x, y), wanted)


def test_an_unchanged_token_weighs_its_share_and_a_turned_one_e_squared_more():
    x = random(9, 4)
    torch.testing.assert_close(transition(x, x), torch.full((9,), 1 / 9))
    y = torch.cat([-x[:1], x[1:]])
    total = math.exp(2) + 8
    torch.testing.assert_close(transition(x, y), torch.tensor([math.exp(2) / total] + [1 / total] * 8))


def test_scaling_the_output_scales_the_weights():
    x, y = random(2, 7, 5), random(2, 7, 5, seed=1)
    torch.testing.assert_close(transition(x, 3.5 * y), 3.5 * transition(x, y))


def test_padding_and_batch_mates_change_nothing():
    x, y = random(2, 7, 5), random(2, 7, 5, seed=1)
    real = torch.tensor([[False, False, False, True, True, True, True], [True] * 7])
    x[0, :3], y[0, :3] = torch.nan, torch.nan
    w = transition(x, y, real)
    torch.testing.assert_close(w[0, 3:], transition(x[0, 3:], y[0, 3:]))
    torch.testing.assert_close(w[1], transition(x[1], y[1]))
    assert w[0, :3].tolist() == [0, 0, 0]


def test_transition_survives_a_zero_input_and_half_precision():
    x, y = torch.zeros(3, 4), random(3, 4)
    assert transition(x, y).isfinite().all()
    x, y = (300 * random(2, 5, 64)).half(), (300 * random(2, 5, 64, seed=1)).half()  # squares overflow in fp16
    w = transition(x, y)
    assert w.dtype == torch.float32
    torch.testing.assert_close(w, transition(x.float(), y.float()))


def test_accumulation_follows_the_tokens_that_stay():
    w = random(6, 2, 5).abs()
    ttv = accumulate(accumulate(None, w[0], w[1]), w[2], w[3])
    torch.testing.assert_close(ttv, w[:4].sum(0))
    kept = torch.tensor([[0, 2], [1, 4]])
    short = accumulate(ttv.gather(-1, kept), w[4, :, :2], w[5, :, :2])
    torch.testing.assert_close(short, w[:4].sum(0).gather(-1, kept) + w[4, :, :2] + w[5, :, :2])


def plain_iga(q: torch.Tensor, k: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """One prompt, dense, over all rows: q (H, n, D), k (Hkv, n, D) -> (stop - start,)."""
    H, n, D = q.shape
    logits = q @ k.repeat_interleave(H // len(k), 0).mT / math.sqrt(D)
    A = logits.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")).softmax(-1)
    return A[:, stop:, start:stop].mean((0, 1))


def test_instruction_attention_with_grouped_heads_against_a_dense_matrix():
    q, k = random(2, 6, 11, 4), random(2, 3, 11, 4, seed=1)
    got = instruction_attention(q[:, :, 7:], k, (2, 7))
    for b in range(2):
        torch.testing.assert_close(got[b], plain_iga(q[b], k[b], 2, 7))


def test_instruction_attention_of_padded_prompts_equals_each_alone():
    q, k = random(2, 4, 13, 4), random(2, 2, 13, 4, seed=1)
    real = torch.ones(2, 13, dtype=torch.bool)
    real[0, :2], real[1, 11:] = False, False  # one padded on the left, one on the right
    got = instruction_attention(q[:, :, 8:], k, (3, 8), real)
    torch.testing.assert_close(got[0], plain_iga(q[0, :, 2:], k[0, :, 2:], 1, 6))
    torch.testing.assert_close(got[1], plain_iga(q[1, :, :11], k[1, :, :11], 3, 8))


def test_instruction_attention_takes_another_scale():
    q, k = random(1, 2, 6, 4), random(1, 2, 6, 4, seed=1)
    torch.testing.assert_close(
        instruction_attention(q[:, :, 4:], k, (1, 4), scale=0.25), instruction_attention(0.5 * q[:, :, 4:], k, (1, 4))
    )


@pytest.mark.parametrize("image", [(3, 3), (-1, 2), (2, 5)])
def test_instruction_attention_refuses_a_span_that_cannot_be(image):
    with pytest.raises(ValueError, match=r"0 <= start < stop <= 4"):
        instruction_attention(random(1, 2, 2, 4), random(1, 2, 6, 4), image)


def test_stage_score_adds_both_shares():
    ttv, iga = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.02, 0.02], [0.01, 0.03]])
    torch.testing.assert_close(stage_score(ttv, iga), torch.tensor([[0.75, 1.25], [0.25, 0.75]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(stage_score(ttv, None), torch.tensor([[0.25, 0.75], [0.0, 0.0]]))
    torch.testing.assert_close(stage_score(None, iga), iga / (iga.sum(-1, keepdim=True) + 1e-8))


def test_stage_score_needs_one_of_its_terms():
    with pytest.raises(ValueError, match="must not both be None"):
        stage_score(None, None)


@pytest.mark.parametrize(
    "N, r, wanted",
    [(576, 0.875, 504), (576, 0.625, 360), (576, 0.125, 72), (36, 0.625, 22), (5, 0.125, 1), (7, 1.0, 7)],
)
def test_keep_count_truncates_and_leaves_one(N, r, wanted):
    assert keep_count(N, r) == wanted


@settings(max_examples=40, deadline=None)
@given(c=st.floats(0.1, 10), t=st.integers(1, 9), seed=st.integers(0, 999))
def test_transition_does_not_see_the_size_of_both(c, t, seed):
    x, y = random(t, 3, seed=seed), random(t, 3, seed=seed + 1)
    torch.testing.assert_close(transition(c * x, c * y), transition(x, y))
