"""ZipCache's saliency, subsets and quantisers against plain loops, and its claims on tensors built for them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqwise.core.method import seeded as drawn
from seqwise.core.packed import Packed
from seqwise.methods.cache.a2sf import A2SF
from seqwise.methods.cache.zipcache import (
    ZipCache,
    channel_scale,
    dequantize,
    probe_rows,
    quantize_keys,
    quantize_values,
    saliency,
    split,
)
from seqwise.testing.families import FAMILIES


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def pick(x, index):
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))


def causal_attention(seed, B=2, H=4, L=21):
    z = torch.randn(B, H, L, L, generator=seeded(seed))
    return z.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)


@pytest.mark.parametrize("length, drawn, recent", [(1, 0, 1), (19, 0, 1), (20, 1, 1), (41, 2, 3), (1000, 50, 50)])
def test_probe_rows(length, drawn, recent):
    rows = probe_rows(length, seeded(0)).tolist()
    assert rows == sorted(set(rows)) and len(rows) == drawn + recent
    assert rows[drawn:] == list(range(length - recent, length))
    assert all(0 <= row < length - recent for row in rows[:drawn])


def test_probe_rows_follow_their_generator():
    torch.manual_seed(0)
    first = probe_rows(400, seeded(3))
    torch.manual_seed(1)
    assert torch.equal(first, probe_rows(400, seeded(3)))
    assert not torch.equal(first, probe_rows(400, seeded(4)))


@pytest.mark.parametrize("denominator", ["probe", "all"])
def test_saliency_counts_the_rows_that_see_a_token(denominator):
    L, Hkv = 21, 2
    attention = causal_attention(1, L=L)
    rows = [3, 7, 7, 18, 19, 20]  # a repeated row counts twice
    A = attention[:, :, rows]
    s = saliency(A.unflatten(1, (Hkv, -1)).sum((2, 3)), torch.tensor(rows), denominator=denominator)
    for b in range(2):
        for h in range(Hkv):
            for i in range(L):
                total = sum(attention[b, head, r, i].item() for head in (2 * h, 2 * h + 1) for r in rows)
                seen_by = sum(r >= i for r in rows) if denominator == "probe" else L - i
                assert s[b, h, i].item() == pytest.approx(total / seen_by, rel=1e-5)


def test_the_two_denominators_rank_differently():
    rows = torch.tensor([2, 18, 19, 20])
    received = torch.ones(1, 1, 21)
    by_probe = saliency(received, rows)[0, 0]
    by_all = saliency(received, rows, denominator="all")[0, 0]
    assert by_probe[10] == by_probe[17] and by_all[10] < by_all[17]


def test_saliency_of_a_left_padded_sample_equals_its_own():
    pads, L = 6, 21
    received = torch.rand(2, 2, L, generator=seeded(2))
    rows = torch.tensor([1, 9, 20])
    padded = torch.nn.functional.pad(received[:1], (pads, 0))
    both = torch.cat([padded, torch.rand(1, 2, L + pads, generator=seeded(3))])
    positions = torch.stack([torch.arange(-pads, L).clamp(min=-1), torch.arange(L + pads)])[:, None]
    table = torch.tensor([[-1, -1, 1, 9, 20], [0, 4, 13, 25, 26]])
    for denominator in ("probe", "all"):
        s = saliency(both, table, positions=positions, denominator=denominator)
        alone = saliency(received[:1], rows, denominator=denominator)
        torch.testing.assert_close(s[:1, :, pads:], alone)
        assert not s[0, :, :pads].any()


def test_a_token_that_no_probe_row_sees_scores_zero():
    received = torch.tensor([[[1.0, 0.5, 0.5, 0.0, 0.0]]])
    for denominator in ("probe", "all"):
        assert saliency(received, torch.tensor([1, 2]), denominator=denominator)[0, 0, 3:].tolist() == [0, 0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from([0.0, 0.1, 0.4, 0.6, 1.0]))
def test_split_is_a_partition_by_rising_score(seed, n, ratio):
    score = torch.rand(2, 3, n, generator=seeded(seed))
    live = torch.rand(2, n, generator=seeded(seed + 1)) < 0.7
    (low, low_live), (high, high_live) = split(score, ratio, live)
    for b in range(2):
        tokens = live[b].nonzero()[:, 0].tolist()
        for h in range(3):
            ranked = sorted(tokens, key=lambda i: (score[b, h, i].item(), i))
            m = int(ratio * len(tokens))
            assert low[b, h][low_live[b, h]].tolist() == ranked[:m]
            assert high[b, h][high_live[b, h]].tolist() == sorted(ranked[m:])


def test_split_orders_the_unsalient_by_score_and_the_salient_by_position():
    score = torch.tensor([[[0.9, 0.1, 0.8, 0.05, 0.7]]])
    (low, _), (high, _) = split(score)
    assert (low.tolist(), high.tolist()) == ([[[3, 1]]], [[[0, 2, 4]]])
    (low, _), (high, _) = split(torch.ones(1, 1, 5))  # ties: the lowest index first
    assert (low.tolist(), high.tolist()) == ([[[0, 1]]], [[[2, 3, 4]]])


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ValueError, match=rf"ratio must be in \[0, 1\], got {ratio}"):
        split(torch.rand(1, 1, 4), ratio)


def reference_codes(x, bits):
    """Codes of a flat list that shares one minimum and maximum."""
    low, high = min(x), max(x)
    step = (high - low) / (2**bits - 1)
    return [round((v - low) / step) if step else 0 for v in x], low, step


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_keys_are_channelwise(bits):
    x = torch.randn(2, 3, 11, 5, generator=seeded(bits), dtype=torch.float64).float()
    codes, minimum, step = quantize_keys(x, bits)
    assert codes.dtype == torch.uint8 and minimum.shape == step.shape == (2, 3, 1, 5)
    for b in range(2):
        for h in range(3):
            for d in range(5):
                expected, low, width = reference_codes(x[b, h, :, d].tolist(), bits)
                assert codes[b, h, :, d].tolist() == expected
                assert minimum[b, h, 0, d].item() == low
                assert step[b, h, 0, d].item() == pytest.approx(width, rel=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_values_are_channel_scaled_and_tokenwise_over_all_heads(bits):
    x = torch.randn(2, 3, 11, 5, generator=seeded(bits)) * torch.tensor([1.0, 1, 9, 1, 0.1])
    scale = channel_scale(x)
    for b in range(2):
        for h in range(3):
            for d in range(5):
                largest = max(abs(v) for v in x[b, h, :, d].tolist())
                assert scale[b, h, 0, d].item() == pytest.approx(largest**0.5, rel=1e-6)
    subset = x[:, :, ::2]
    codes, minimum, step, same = quantize_values(subset, bits, scale)
    assert same is scale and minimum.shape == step.shape == (2, 1, 6, 1)
    for b in range(2):
        for j in range(6):
            row = (subset[b, :, j] / scale[b, :, 0]).flatten().tolist()
            expected, low, width = reference_codes(row, bits)
            assert codes[b, :, j].flatten().tolist() == expected
            assert minimum[b, 0, j, 0].item() == low
            assert step[b, 0, j, 0].item() == pytest.approx(width, rel=1e-5)


def test_heads_share_a_row_by_place_in_their_lists():
    """Reordering one head's list regroups the rows: values change, keys only move."""
    x = torch.randn(1, 2, 4, 3, generator=seeded(5))
    index = torch.tensor([[[0, 1, 2, 3], [0, 1, 2, 3]]])
    other = torch.tensor([[[0, 1, 2, 3], [3, 2, 1, 0]]])
    scale = channel_scale(x)

    def restored(quantizer, order):
        back = torch.empty_like(x)
        return back.scatter_(2, order[..., None].expand_as(x), dequantize(*quantizer(pick(x, order))))

    def keys(part):
        return quantize_keys(part, 2)

    def values(part):
        return quantize_values(part, 2, scale)

    assert torch.equal(restored(keys, index), restored(keys, other))
    assert not torch.allclose(restored(values, index), restored(values, other))


def test_halves_round_to_even():
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.0])[None, None, :, None]
    assert quantize_keys(x, 2)[0].flatten().tolist() == [0, 0, 2, 2, 3]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000), st.sampled_from([1, 2, 4, 8]), st.integers(1, 9), st.floats(1e-6, 1e6), st.floats(-1e3, 1e3)
)
def test_error_is_at_most_half_a_step(seed, bits, m, size, shift):
    x = torch.randn(2, 2, m, 3, generator=seeded(seed)) * size + shift
    codes, minimum, step = quantize_keys(x, bits)
    assert codes.max() <= 2**bits - 1
    slack = 4e-7 * x.abs().max()  # float32 rounding of the values themselves
    assert ((dequantize(codes, minimum, step) - x).abs() <= step / 2 + slack).all()
    codes, minimum, step, scale = quantize_values(x, bits, channel_scale(x))
    assert codes.max() <= 2**bits - 1
    assert ((dequantize(codes, minimum, step, scale) - x).abs() <= (step / 2) * scale + 4 * slack).all()


def test_constant_channels_single_tokens_and_dead_channels():
    x = torch.randn(1, 2, 6, 3, generator=seeded(6))
    x[..., 1] = -0.7
    assert torch.equal(dequantize(*quantize_keys(x, 4))[..., 1], x[..., 1])
    single = x[:, :, :1]
    assert (quantize_keys(single, 2)[2] > 0).all()  # 0 / 0 has no integer code
    assert torch.equal(dequantize(*quantize_keys(single, 2)), single)
    x[..., 1] = 0.0
    back = dequantize(*quantize_values(x, 4, channel_scale(x)))
    assert back.isfinite().all() and back[..., 1].abs().max() < 1e-30
    zeros = torch.zeros_like(x)
    assert not dequantize(*quantize_values(zeros, 2, channel_scale(zeros))).any()


def test_empty_subsets():
    x = torch.randn(2, 3, 0, 4)
    assert dequantize(*quantize_keys(x, 2)).shape == x.shape
    assert dequantize(*quantize_values(x, 2, channel_scale(x))).shape == x.shape
    (low, _), (high, _) = split(torch.rand(1, 1, 2))  # floor(0.4 * 2) = 0
    assert (low.shape[-1], high.shape[-1]) == (0, 2)


@pytest.mark.parametrize("bits", [0, 3, 16])
def test_unknown_bits_are_refused(bits):
    with pytest.raises(ValueError, match=rf"bits must be one of \(1, 2, 4, 8\), got {bits}"):
        quantize_keys(torch.rand(1, 1, 2, 2), bits)


def compress(x_keys, x_values, score, live=None, bits=(4, 2)):
    """Steps 4 to 7, scattered back: keys and values as they come out of storage."""
    scale = channel_scale(x_values, live)
    keys, values = torch.zeros_like(x_keys), torch.zeros_like(x_values)
    for (index, alive), b in zip(reversed(split(score, 0.4, live)), bits, strict=True):
        spots = torch.where(alive, index, x_keys.shape[2])[..., None]  # dead entries go to a spare row
        for out, x, quantized in (
            (keys, x_keys, quantize_keys(pick(x_keys, index), b, alive)),
            (values, x_values, quantize_values(pick(x_values, index), b, scale, alive)),
        ):
            spare = torch.nn.functional.pad(out, (0, 0, 0, 1))
            spare.scatter_(2, spots.expand(-1, -1, -1, x.shape[-1]), dequantize(*quantized))
            out.copy_(spare[:, :, :-1])
    return keys, values


@pytest.mark.parametrize("junk", [1e4, float("nan")])
def test_padding_and_batch_mates_change_nothing(junk):
    g = seeded(7)
    keys, values, score = (torch.randn(1, 2, 17, 4, generator=g) for _ in range(3))
    score = score[..., 0]
    mate = torch.randn(1, 2, 26, 4, generator=g) * 50

    def padded(x):
        return torch.nn.functional.pad(x, (0, 0, 9, 0), value=junk)

    live = torch.ones(2, 26, dtype=torch.bool)
    live[0, :9] = False
    scores = torch.cat([torch.nn.functional.pad(score, (9, 0), value=-5.0), torch.rand(1, 2, 26, generator=g)])
    alone = compress(keys, values, score)
    for form in (live, live[:, None].expand(-1, 2, -1)):
        together = compress(torch.cat([padded(keys), mate]), torch.cat([padded(values), mate]), scores, form)
        for one, both in zip(alone, together, strict=True):
            assert torch.equal(both[:1, :, 9:], one)


def test_dead_entries_have_code_zero_and_finite_parameters():
    x = torch.randn(2, 2, 5, 3, generator=seeded(12))
    x[0] = float("nan")
    x[1, :, 2] = -9.0
    live = torch.tensor([[False] * 5, [True, True, False, True, True]])
    for codes, *parameters in (quantize_keys(x, 2, live), quantize_values(x, 2, channel_scale(x, live), live)):
        assert not codes[0].any() and not codes[1, :, 2].any()
        assert all(parameter.isfinite().all() for parameter in parameters)


def test_half_precision_input_is_quantised_in_float32():
    x = torch.randn(1, 2, 7, 4, generator=seeded(8)).bfloat16()
    codes, minimum, step = quantize_keys(x, 4)
    assert minimum.dtype == step.dtype == torch.float32
    assert torch.equal(codes, quantize_keys(x.float(), 4)[0])
    assert channel_scale(x).dtype == torch.float32


def test_channel_scales_help_values_with_outlier_channels():
    x = torch.randn(1, 2, 50, 16, generator=seeded(9))
    x[..., 3] *= 12
    x[:, :, 20] *= 3  # one large token spoils channelwise parameters

    def error(quantized):
        return (dequantize(*quantized) - x).square().mean().item()

    separable = error(quantize_values(x, 4, channel_scale(x)))
    assert separable < 0.7 * error(quantize_values(x, 4, torch.ones(1, 2, 1, 16)))
    assert separable < 0.7 * error(quantize_keys(x, 4))


def test_codes_and_parameters_fit_the_packed_store_at_a_fifth_of_half_precision():
    L, Hkv, D = 2000, 2, 32
    x = torch.randn(1, Hkv, L, D, generator=seeded(10))
    stored = 0
    for (index, _), bits in zip(split(torch.rand(1, Hkv, L, generator=seeded(11))), (2, 4), strict=True):
        part = pick(x, index)
        codes, *parameters = quantize_keys(part, bits)
        keys = Packed.pack(codes, bits, *parameters)
        assert torch.equal(keys.dequantize(torch.float32), dequantize(codes, *parameters))
        codes, *parameters = quantize_values(part, bits, channel_scale(x))
        values = Packed.pack(codes, bits, *parameters)
        assert torch.equal(values.dequantize(torch.float32), dequantize(codes, *parameters))
        stored += keys.nbytes + values.nbytes
    # 3.2 bits on average, and 8 bytes per row of 64 values
    assert 4.0 < 2 * x.numel() * 2 / stored < 5.0


# the attached class


def stored(run, layer=0):
    """What the cache of a layer holds by original position: keys and values (B, Hkv, L, D), and the bits of each."""
    slot = run.cache.layers[layer]
    keys, values = slot.read()
    bits = torch.cat(
        [torch.full((chunk.count,), chunk.keys.bits) for chunk in slot.chunks] + [torch.full((slot.tail,), 32)]
    )
    order = slot.order.expand(keys.shape[:3])
    assert slot.live is None or bool(slot.live.all())
    place = order.argsort(-1)
    assert order.gather(-1, place).tolist() == torch.arange(order.shape[-1]).expand_as(order).tolist()
    return pick(keys, place), pick(values, place), bits.expand_as(order).gather(-1, place)


@pytest.mark.parametrize("denominator", ["probe", "all"])
@pytest.mark.parametrize("bits", [(4, 2), (8, 1)])
def test_stores_what_the_formulas_give(tools, denominator, bits):
    L, Hkv, seed = 61, 2, 5
    model = tools.build()
    ids = torch.arange(L)
    q, k, v = tools.first_layer(model, ids)
    rows = probe_rows(L, drawn(seed, 0, L, torch.device("cpu")))
    attention = (q @ k.repeat_interleave(2, 0).mT / q.shape[-1] ** 0.5).masked_fill(
        torch.ones(L, L, dtype=torch.bool).triu(1), float("-inf")
    )
    received = attention.softmax(-1)[:, rows].unflatten(0, (Hkv, -1)).sum((1, 2))[None]
    score = saliency(received, rows, denominator=denominator)
    keys, values = compress(k[None], v[None], score, bits=bits)
    run, logits = next(tools.by_steps(model, ids[None], L, ZipCache(bits=bits, denominator=denominator, seed=seed)))
    found = stored(run)
    torch.testing.assert_close(found[0], keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], values, atol=1e-5, rtol=1e-5)
    (unsalient, _), _ = split(score)
    assert torch.equal(found[2] == bits[1], torch.zeros(1, Hkv, L, dtype=torch.bool).scatter(-1, unsalient, True))
    with torch.no_grad():  # the prompt's own output comes from full precision
        torch.testing.assert_close(logits, model(ids[None]).logits[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("probe", ["last", "sampled"])
def test_new_tokens_stay_in_full_precision_until_a_gap_is_full(tools, probe):
    model = tools.build()
    ids = torch.arange(60)[None]
    gap = 7
    for step, (run, _) in enumerate(tools.by_steps(model, ids, 30, ZipCache(gap=gap, probe=probe))):
        slot = run.cache.layers[0]
        assert (slot.packed, slot.tail) == (30 + step // gap * gap, step % gap)
        assert len(slot.chunks) == 2 * (1 + step // gap)  # each gap brings parameters of its own
        bits = stored(run)[2]
        for block in range(step // gap):
            counts = (bits[..., 30 + block * gap : 30 + (block + 1) * gap] == 2).sum(-1)
            assert (counts == int(0.4 * gap)).all()
    assert run.kept(layer=0) == [[list(range(60))] * 2]  # nothing is evicted


def test_packed_chunks_are_not_packed_again(tools):
    model = tools.build()
    codes = None
    for run, _ in tools.by_steps(model, torch.arange(60)[None], 30, ZipCache(gap=5)):
        chunk = run.cache.layers[0].chunks[0]
        assert codes is None or torch.equal(chunk.keys.codes, codes)
        codes = chunk.keys.codes


def gap_scores(q, k, slots, rows):
    """Attention of rows over the slots held, summed over each group: (Hkv, slots)."""
    g = q.shape[0] // k.shape[0]
    total = torch.zeros(k.shape[0], slots)
    for row in rows:
        a = (q[:, row, None] @ k[:, : row + 1].repeat_interleave(g, 0).mT / q.shape[-1] ** 0.5).softmax(-1)[:, 0]
        total[:, : row + 1] += a.unflatten(0, (-1, g)).sum(1)
    return total


@pytest.mark.parametrize("probe", ["last", "sampled"])
def test_the_tokens_of_a_gap_are_split_by_their_probes(tools, probe):
    """8 bits for all, so that what is stored does not disturb the attention: only who is called unsalient matters."""
    L, gap, seed = 30, 20, 3
    model = tools.build()
    ids = torch.arange(L + gap)
    q, k, _ = tools.first_layer(model, ids)
    method = ZipCache(bits=(8, 8), gap=gap, probe=probe, seed=seed)
    run = [run for run, _ in tools.by_steps(model, ids[None], L, method)][-1]
    if probe == "last":
        score = gap_scores(q, k, L + gap, [L + gap - 1])[:, L:]
    else:
        rows = probe_rows(gap, drawn(seed, 0, 0, torch.device("cpu")))
        seen_by = (rows >= torch.arange(gap)[:, None]).sum(-1)
        score = gap_scores(q, k, L + gap, (rows + L).tolist())[:, L:] / seen_by
    unsalient = score.argsort(-1)[:, : int(0.4 * gap)]
    chunk = run.cache.layers[0]
    order = chunk.order[0, :, L : L + int(0.4 * gap)] - L
    assert order.tolist() == unsalient.tolist()


@pytest.mark.parametrize(
    "method",
    [
        ZipCache(gap=5),
        ZipCache(gap=5, probe="sampled", denominator="all"),
        ZipCache(bits=(4, 1), ratio=0.6),
        A2SF(budget=12, recent=4) | ZipCache(gap=5),
    ],
    ids=str,
)
def test_left_padding_changes_nothing_in_the_model(tools, method):
    tools.assert_padded_equals_alone(method)


@pytest.mark.parametrize("n", [1, 2, 5, 19])
def test_short_prompts_have_no_random_probes_and_maybe_no_unsalient_tokens(tools, llama, n):
    logits, run = tools.generate(llama, FAMILIES["llama"].prompt(n), ZipCache(gap=4), new=9)
    assert logits.isfinite().all() and run.kept(layer=0) == [[list(range(n + 8))] * 2]


@pytest.mark.parametrize("ratio, sets", [(0.0, [4]), (1.0, [2]), (0.4, [2, 4])])
def test_a_ratio_at_its_ends_leaves_one_set(tools, llama, ratio, sets):
    run = tools.generate(llama, FAMILIES["llama"].prompt(30), ZipCache(ratio=ratio), new=2)[1]
    assert [chunk.keys.bits for chunk in run.cache.layers[0].chunks] == sets


def test_eight_bits_are_close_and_fewer_are_further(tools, llama):
    batch = FAMILIES["llama"].prompt(60)
    plain, _ = tools.generate(llama, batch, new=2)
    errors = [
        (tools.generate(llama, batch, ZipCache(bits=bits), new=2)[0][1] - plain[1]).abs().mean().item()
        for bits in ((8, 8), (4, 4), (4, 2), (1, 1))
    ]
    assert errors == sorted(errors) and errors[0] < errors[3] / 10


def test_bytes_are_those_in_storage(tools):
    """Codes of 3.2 bits on average, minimum and step per channel (keys) and row (values), one scale per channel."""
    L, Hkv, D = 200, 2, 8
    run, _ = next(tools.by_steps(tools.build(), torch.arange(L)[None] % 97, L, ZipCache()))
    low, high = 80, 120
    codes = 2 * Hkv * D * (low * 2 + high * 4) // 8
    parameters = 4 * (2 * 2 * Hkv * D + 2 * L + Hkv * D)
    report = run.report()
    assert report.cache_bytes == codes + parameters
    assert report.plain_bytes == L * Hkv * D * 2 * 4


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ZipCache(bits=(4, 3)), r"ZipCache.bits must each be one of \(1, 2, 4, 8\), got \(4, 3\)"),
        (lambda: ZipCache(ratio=1.5), r"ZipCache.ratio must be .*got 1.5"),
        (lambda: ZipCache(gap=0), r"ZipCache.gap must be .*got 0"),
        (lambda: ZipCache(probe="all"), r"ZipCache.probe must be .*'all'"),
    ],
)
def test_bad_hyperparameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
