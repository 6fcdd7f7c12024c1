"""Streamed attention statistics and the fused attention beside them, against dense float64 attention."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from seqwise.core import observe
from seqwise.core.observe import (
    attention,
    attention_statistics,
    lse_available,
    probabilities,
    received,
    take_slots,
)
from seqwise.core.visible import Visible

REDUCTIONS = ("sum", "mean", "count", "max", "entropy")
LONG = 75  # rows enough for several blocks, and an odd number of them


def seen_by_all(visible, B, Hkv, q, n):
    """The whole mask (B, Hkv, q, n) of a Visible; tests/core/test_visible.py holds it against one written by hand."""
    tile = visible.tile(0, q, 0, n)
    seen = torch.ones(B, Hkv, q, n, dtype=torch.bool) if tile is None else tile.expand(B, Hkv, q, n)
    return seen if visible.live_q is None else seen & visible.live_q[:, None, :, None]


@dataclass
class Dense:
    """Attention written out, in float64."""

    p: torch.Tensor  # (B, H, q, n)
    lse: torch.Tensor  # (B, H, q)
    seen: torch.Tensor  # (B, H, q, n)

    @classmethod
    def of(cls, query, key, visible, scaling=None, softcap=None):
        B, H, q, D = query.shape
        Hkv, n = key.shape[1:3]
        logits = (
            query.double() @ key.double().repeat_interleave(H // Hkv, 1).mT * (D**-0.5 if scaling is None else scaling)
        )
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        seen = seen_by_all(visible, B, Hkv, q, n).repeat_interleave(H // Hkv, 1)
        logits = logits.masked_fill(~seen, float("-inf"))
        return cls(logits.softmax(-1).nan_to_num(0.0), logits.logsumexp(-1), seen)

    def rows(self, at):
        """Rows at (B, R)."""
        at = at[:, None, :, None].expand(-1, self.p.shape[1], -1, self.p.shape[-1])
        return Dense(self.p.gather(2, at), self.lse.gather(2, at[..., 0]), self.seen.gather(2, at))

    def statistics(self, weight, Hkv, heads):
        """All reductions; weight: (B or 1, R)."""
        total = (self.p * weight.double()[:, None, :, None]).sum(2)
        count = self.seen.double().sum(2)
        top, plain = self.p.amax(2), self.p.sum(2)
        if heads == "kv":
            total, plain = (x.unflatten(1, (Hkv, -1)).sum(2) for x in (total, plain))
            top, count = (x.unflatten(1, (Hkv, -1)).amax(2) for x in (top, count))
        entropy = -torch.special.xlogy(self.p, self.p).sum(-1)
        return {"sum": total, "mean": plain / count.clamp(min=1), "count": count, "max": top, "entropy": entropy}


@st.composite
def calls(draw):
    """One ordinary attention call: the last q of n columns attend."""
    B, Hkv, g = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    n = draw(st.one_of(st.integers(1, 24), st.just(LONG)))
    q = draw(st.one_of(st.just(n), st.integers(1, n)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    padding, mask = None, None
    kind = draw(st.sampled_from(["none", "left", "holes"]))
    if kind == "left":
        padding = torch.arange(n) >= torch.tensor([[min(7, n - 1)], [0]])[:B]
    elif kind == "holes":
        padding = torch.rand(B, n, generator=random) < 0.7
    if draw(st.integers(0, 3)) == 0:
        mask = torch.rand(draw(st.sampled_from([1, B])), 1, q, n, generator=random) < 0.6
        if draw(st.booleans()):
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    return {
        "query": (torch.randn(B, Hkv * g, q, 8, generator=random) * 1.5).to(dtype),
        "key": (torch.randn(B, Hkv, n, 8, generator=random) * 1.5).to(dtype),
        "value": torch.randn(B, Hkv, n, 8, generator=random).to(dtype),
        "visible": Visible.of(
            q, n, causal=draw(st.sampled_from([True, True, False])), padding=padding, mask=mask,
            window=draw(st.sampled_from([None, None, 1, 5, 40])),
        ),
        "scaling": draw(st.sampled_from([None, 0.1])),
    }  # fmt: skip


def chosen_rows(draw, B, q):
    """A `rows` argument and the same as indices (B, R)."""
    kind = draw(st.sampled_from(["all", "last", "window", "strided", "sampled", "own"]))
    everything = torch.arange(q).expand(B, -1)
    if kind == "all":
        return None, everything
    if kind in ("last", "window", "strided"):
        rows = {"last": slice(q - 1, q), "window": slice(-min(q, 5), None), "strided": slice(0, None, 2)}[kind]
        return rows, everything[:, rows]
    if kind == "sampled":
        rows = torch.tensor(draw(st.lists(st.integers(0, q - 1), min_size=1, max_size=6)))
        return rows, rows.expand(B, -1)
    rows = torch.tensor([draw(st.lists(st.integers(0, q - 1), min_size=3, max_size=3)) for _ in range(B)])
    return rows, rows


@given(
    call=calls(),
    lse=st.sampled_from(["none", "kernel", "dense"]),
    heads=st.sampled_from(["query", "kv"]),
    data=st.data(),
)
def test_every_statistic_of_every_call(call, lse, heads, data):
    query, key, visible, scaling = (call[name] for name in ("query", "key", "visible", "scaling"))
    B, q, Hkv = query.shape[0], query.shape[2], key.shape[1]
    dense = Dense.of(query, key, visible, scaling)
    given_lse = None
    if lse == "kernel":
        _, given_lse = attention(query, key, call["value"], visible, scaling=scaling, want_lse=True)
    elif lse == "dense":
        given_lse = dense.lse.float()
    rows, at = chosen_rows(data.draw, B, q)
    R = at.shape[1]
    weight = None
    kind = data.draw(st.sampled_from(["none", "forget", "text"]))
    if kind == "forget":
        weight = 0.9 ** torch.arange(R - 1, -1, -1.0)
    elif kind == "text":  # some rows per sample, as bools
        weight = torch.rand(B, R, generator=torch.Generator().manual_seed(R)) < 0.5
    full = torch.ones(1, R) if weight is None else weight.float().view(-1, R)
    wanted = dense.rows(at).statistics(full, Hkv, heads)
    got = attention_statistics(
        query,
        key,
        visible=visible,
        rows=rows,
        weight=weight,
        reduce=REDUCTIONS,
        heads=heads,
        lse=given_lse,
        scaling=scaling,
    )
    # the kernel's log-sum-exp of bf16 rows is itself only as good as bf16 products
    coarse = lse == "kernel" and query.dtype == torch.bfloat16
    for name in REDUCTIONS:
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(
            got[name].double(),
            wanted[name],
            rtol=5e-3 if coarse else 1e-4,
            atol=5e-3 if coarse else 2e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@given(call=calls(), reduce=st.sampled_from(REDUCTIONS), have_lse=st.booleans())
def test_one_reduction_alone_is_the_same_as_among_others(call, reduce, have_lse):
    query, key, visible = call["query"], call["key"], call["visible"]
    lse = Dense.of(query, key, visible).lse.float() if have_lse else None
    together = attention_statistics(query, key, visible=visible, reduce=REDUCTIONS, lse=lse)
    alone = received(query, key, visible=visible, reduce=reduce, lse=lse)
    torch.testing.assert_close(alone, together[reduce], rtol=1e-5, atol=1e-6)


@given(call=calls(), cap=st.sampled_from([0.5, 5.0]), heads=st.sampled_from(["query", "kv"]))
def test_capped_logits_whatever_lse_comes_along(call, cap, heads):
    query, key, visible, scaling = (call[name] for name in ("query", "key", "visible", "scaling"))
    dense = Dense.of(query, key, visible, scaling, cap)
    weight = torch.ones(1, query.shape[2])
    useless = torch.zeros(query.shape[:3])  # a fused kernel knows nothing of the cap
    got = attention_statistics(
        query, key, visible=visible, reduce=REDUCTIONS, heads=heads, scaling=scaling, softcap=cap, lse=useless
    )
    for name, wanted in dense.statistics(weight, key.shape[1], heads).items():
        torch.testing.assert_close(got[name].double(), wanted, rtol=1e-4, atol=2e-5)


@st.composite
def evicted(draw):
    """A cache whose slots hold other tokens per head, in any order, some dead."""
    B, Hkv, g, n, q = 2, 2, 2, draw(st.integers(2, 20)), draw(st.integers(1, 3))
    random = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    order_k = torch.rand(B, Hkv, 3 * n, generator=random).argsort(-1)[..., :n]
    if draw(st.booleans()):
        order_k = order_k[:, :1]  # the same tokens in all heads, but not all alive in all heads
    live_k = torch.rand(B, Hkv, n, generator=random) < 0.8
    order_q = 3 * n + torch.arange(q) - draw(st.integers(0, 2 * n))
    return {
        "query": torch.randn(B, Hkv * g, q, 8, generator=random),
        "key": torch.randn(B, Hkv, n, 8, generator=random),
        "value": torch.randn(B, Hkv, n, 8, generator=random),
        "visible": Visible(order_q[None], order_k, None, live_k, window=draw(st.sampled_from([None, n]))),
    }


@given(call=evicted(), lse=st.booleans(), heads=st.sampled_from(["query", "kv"]))
def test_slots_in_any_order(call, lse, heads):
    query, key, visible = call["query"], call["key"], call["visible"]
    dense = Dense.of(query, key, visible)
    out, kernel = attention(query, key, call["value"], visible, want_lse=lse)
    values = call["value"].double().repeat_interleave(2, 1)
    torch.testing.assert_close(out.double(), dense.p @ values, rtol=1e-4, atol=1e-5)
    got = attention_statistics(query, key, visible=visible, reduce=REDUCTIONS, heads=heads, lse=kernel)
    for name, wanted in dense.statistics(torch.ones(1, query.shape[2]), 2, heads).items():
        torch.testing.assert_close(got[name].double(), wanted, rtol=1e-4, atol=2e-5)


def test_garbage_in_dead_slots_and_padding_rows_goes_nowhere():
    n = 40
    padding = torch.ones(2, n, dtype=torch.bool)
    padding[0, :9] = False
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, n, 8, generator=random), torch.randn(2, 2, n, 8, generator=random)
    visible = Visible.of(n, n, padding=padding)
    wanted = attention_statistics(query, key, visible=visible, reduce=REDUCTIONS)
    lse = Dense.of(query, key, visible).lse.float()
    query[0, :, :9], key[0, :, :9] = 300.0, 300.0  # logits beyond what exp can hold
    for pad in (0.0, float("-inf"), torch.finfo(torch.float32).min):
        lse[0, :, :9] = pad  # kernels and mask values differ in what they give for such rows
        for some in (REDUCTIONS, ("sum", "mean", "count", "max")):
            got = attention_statistics(query, key, visible=visible, reduce=some, lse=lse)
            for name in some:
                torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5)


@given(call=calls(), want=st.booleans(), spans=st.booleans())
def test_attention_on_every_path(call, want, spans):
    query, key, value, visible, scaling = (call[name] for name in ("query", "key", "value", "visible", "scaling"))
    dense = Dense.of(query, key, visible, scaling)
    places = None
    if spans and visible.live_q is not None and query.shape[2] == key.shape[2]:
        places = contiguous(visible.live_q)
    out, lse = attention(query, key, value, visible, scaling=scaling, spans=places, want_lse=want)
    wanted = dense.p @ value.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    coarse = query.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), wanted, rtol=2e-2 if coarse else 1e-4, atol=2e-2 if coarse else 2e-5)
    assert out.dtype == query.dtype
    assert (lse is not None) == want
    if lse is not None:
        some = dense.seen.any(-1)  # where a row sees nothing, the log-sum-exp has no meaning
        torch.testing.assert_close(
            lse.double()[some], dense.lse[some], rtol=1e-2 if coarse else 1e-4, atol=1e-2 if coarse else 2e-5
        )


def contiguous(live):
    """[start, stop) of each sample's real rows, None if one has holes."""
    places = []
    for row in live.tolist():
        at = [i for i, real in enumerate(row) if real]
        if at and at[-1] - at[0] + 1 != len(at):
            return None
        places.append((at[0], at[-1] + 1) if at else (0, 0))
    return places


@given(call=calls(), cap=st.sampled_from([0.5, 5.0]))
def test_capped_attention(call, cap):
    query, key, value, visible, scaling = (call[name] for name in ("query", "key", "value", "visible", "scaling"))
    dense = Dense.of(query, key, visible, scaling, cap)
    out, lse = attention(query, key, value, visible, scaling=scaling, softcap=cap, want_lse=True)
    wanted = dense.p @ value.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    coarse = query.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), wanted, rtol=2e-2 if coarse else 1e-4, atol=2e-2 if coarse else 2e-5)
    assert lse is None
    p = probabilities(query, key, visible, scaling=scaling, softcap=cap)
    real = torch.ones_like(dense.seen) if visible.live_q is None else visible.live_q[:, None, :, None].expand_as(p)
    torch.testing.assert_close(p.double()[real], dense.p[real], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("pad", [0, 37])
@pytest.mark.parametrize("first", [0, 100])
def test_more_rows_than_one_block_of_the_masked_kernel(window, pad, first):
    n = 601
    random = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, 2, n, 4, generator=random) for _ in range(3))
    padding = (torch.arange(n) >= pad)[None] if pad else None
    visible = Visible.of(n - first, n, padding=padding, window=window)
    query = query[:, :, first:]
    dense = Dense.of(query, key, visible)
    out, lse = attention(query, key, value, visible, want_lse=True)
    torch.testing.assert_close(out.double(), dense.p @ value.double(), rtol=1e-4, atol=1e-5)
    for given_lse in (lse, None):
        got = attention_statistics(query, key, visible=visible, reduce=("sum", "mean", "entropy"), lse=given_lse)
        for name, wanted in dense.statistics(torch.ones(1, n - first), 2, "query").items():
            if name in got:
                torch.testing.assert_close(got[name].double(), wanted, rtol=1e-4, atol=2e-5)


def test_without_a_mask_the_output_is_the_fused_kernels_own_to_the_bit():
    random = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, 33, 8, generator=random)
    key, value = torch.randn(2, 2, 2, 33, 8, generator=random)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    for want in (False, True):
        assert torch.equal(attention(query, key, value, Visible.of(33, 33), want_lse=want)[0], plain)


def test_a_padded_sample_is_to_the_bit_what_it_is_alone():
    random = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 2, 33, 8, generator=random) for _ in range(3))
    padding = torch.arange(33) >= torch.tensor([[5], [0]])
    visible = Visible.of(33, 33, padding=padding)
    out, lse = attention(query, key, value, visible, spans=[(5, 33), (0, 33)], want_lse=True)
    alone, one = attention(query[:1, :, 5:], key[:1, :, 5:], value[:1, :, 5:], Visible.of(28, 28), want_lse=True)
    assert torch.equal(out[:1, :, 5:], alone) and torch.equal(lse[:1, :, 5:], one)
    assert not out[0, :, :5].any()


def test_statistics_ask_for_no_gradient_and_attention_passes_one_on():
    random = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 2, 20, 8, generator=random, requires_grad=True) for _ in range(3))
    visible = Visible.of(20, 20, padding=(torch.arange(20) >= 3)[None])
    out, lse = attention(query, key, value, visible, want_lse=True)
    assert not received(query, key, visible=visible, lse=lse).requires_grad
    assert not received(query, key, visible=visible).requires_grad
    out.square().sum().backward()
    mine = [x.grad.clone() for x in (query, key, value)]
    for x in (query, key, value):
        x.grad = None
    seen = seen_by_all(visible, 1, 2, 20, 20)
    p = (query @ key.mT * 8**-0.5).masked_fill(~seen, -1e30).softmax(-1)
    (p @ value)[:, :, 3:].square().sum().backward()
    for got, x in zip(mine, (query, key, value), strict=True):
        torch.testing.assert_close(got, x.grad, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.nbytes = max(self.nbytes, x.numel() * x.element_size())
        return result


@pytest.mark.parametrize("have_lse", [True, False])
@pytest.mark.parametrize("pad", [0, 50])
def test_nothing_of_the_size_of_the_matrix_is_ever_made(have_lse, pad):
    n = 1024
    query, key = torch.randn(2, 1, 2, n, 8, generator=torch.Generator().manual_seed(0))
    padding = (torch.arange(n) >= pad)[None] if pad else None
    visible = Visible.of(n, n, padding=padding)
    lse = torch.zeros(1, 2, n) if have_lse else None
    with Largest() as largest:
        attention_statistics(query, key, visible=visible, reduce=("sum", "mean", "max"), lse=lse)
        attention(query, key, key, visible, spans=[(pad, n)], want_lse=have_lse)
    assert largest.nbytes <= 0.05 * query.shape[1] * n * n * 4


def test_the_fall_back_without_a_log_sum_exp(monkeypatch):
    random = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 2, 21, 8, generator=random) for _ in range(3))
    visible = Visible.of(21, 21, padding=torch.arange(21) >= torch.tensor([[4], [0]]))
    with_lse = attention(query, key, value, visible, want_lse=True)
    assert with_lse[1] is not None
    monkeypatch.setattr(observe, "lse_available", lambda device, dtype: False)
    without = attention(query, key, value, visible, want_lse=True)
    assert without[1] is None
    torch.testing.assert_close(with_lse[0], without[0], rtol=1e-5, atol=1e-6)


def test_the_probe_knows_this_cpu_and_refuses_what_it_cannot_ask():
    assert lse_available("cpu", torch.float32) and lse_available("cpu", torch.bfloat16)
    assert not lse_available("meta", torch.float32)
    assert not lse_available("cpu", torch.int32)


def test_rows_that_see_nothing_give_and_receive_nothing():
    query, key, value = torch.randn(3, 1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    visible = Visible.of(6, 6, mask=torch.zeros(1, 1, 6, 6, dtype=torch.bool))
    for want in (False, True):
        out, lse = attention(query, key, value, visible, want_lse=want)
        assert not out.any()
        for name in REDUCTIONS:
            assert not received(query, key, visible=visible, reduce=name, lse=lse).any()


def test_values_may_be_narrower_or_wider_than_keys():
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 9, 8, generator=random)
    for width in (5, 11):
        value = torch.randn(1, 2, 9, width, generator=random)
        for spans, padding in ((None, None), ([(2, 9)], (torch.arange(9) >= 2)[None])):
            visible = Visible.of(9, 9, padding=padding)
            out, lse = attention(query, key, value, visible, spans=spans, want_lse=True)
            torch.testing.assert_close(
                out.double(), Dense.of(query, key, visible).p @ value.double(), rtol=1e-4, atol=1e-5
            )
            assert lse is None  # the kernel with a log-sum-exp takes equal widths only


def test_no_rows_at_all():
    query, key = torch.randn(2, 1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    got = attention_statistics(query, key, rows=torch.zeros(0, dtype=torch.long), reduce=REDUCTIONS)
    assert got["entropy"].shape == (1, 2, 0)
    assert not any(got[name].any() for name in ("sum", "mean", "count", "max"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "avg"}, "reduce must be among ('sum', 'mean', 'count', 'max', 'entropy'), got 'avg'"),
        ({"weight": torch.ones(5)}, "weight must have shape (6,) or (1, 6), got (1, 5)"),
        ({"weight": torch.ones(3, 6)}, "weight must have shape (6,) or (1, 6), got (3, 6)"),
    ],
)
def test_bad_arguments(options, message):
    query, key = torch.randn(2, 1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=re.escape(message)):
        received(query, key, **options)


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match=r"^query heads must be a multiple of KV heads \(2\), got 3$"):
        received(torch.zeros(1, 3, 4, 8), torch.zeros(1, 2, 4, 8))


def test_inputs_stay_as_they_were():
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 6, 4, generator=random)
    visible = Visible.of(6, 6, padding=(torch.arange(6) > 0)[None])
    lse = torch.zeros(1, 2, 6)
    before = [x.clone() for x in (query, key, lse)]
    attention_statistics(query, key, visible=visible, reduce=REDUCTIONS, lse=lse, weight=torch.ones(6))
    assert all(torch.equal(x, y) for x, y in zip((query, key, lse), before, strict=True))


KINDS = st.sampled_from(["own", "spare", "view"])


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 6), st.integers(0, 5), KINDS)
def test_slots_are_taken_as_gather_takes_them(B, h, n, k, kind):
    random = torch.Generator().manual_seed(B * 100 + h * 10 + n)
    x = torch.randn(B, h, n + 3, 4, generator=random)
    x = x[:, :, :n] if kind == "spare" else x[:, :, :n].clone()
    if kind == "view":  # as queries come: rows of all heads beside each other
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    index = torch.randint(max(n, 1), (B, h, k if n else 0), generator=random)
    assert take_slots(x, index).equal(x.gather(2, index[..., None].expand(-1, -1, -1, 4)))
