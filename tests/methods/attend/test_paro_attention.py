import math
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.overrides import TorchFunctionMode

import seqwise.methods.attend.paro_attention as module
from seqwise.core.errors import AlreadyAttached, MissingExtra, PromptError, UnsupportedModel, UsageError
from seqwise.methods.attend.paro_attention import (
    ORDERS,
    Calibration,
    PAROAttention,
    PermutationPlan,
    always_kept,
    attach,
    block_counts,
    block_maxima,
    block_sparse_attention,
    block_statistics,
    block_sums,
    choose_order,
    dequantise,
    incoherence,
    kept_blocks,
    kept_mass,
    order_tables,
    permute,
    permute_map,
    permuted_attention,
    quantise,
    quantise_qk,
    sparsity_score,
    static_mask,
    time_group,
    unpermute,
)

GRID, TEXT = (2, 3, 4), 3
FHW, FWH, HWF, HFW, WHF, WFH = range(6)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention_map(H, n, seed=0, spread=2.0):
    return (spread * draw(H, n, n, seed=seed)).softmax(-1)


def random_mask(H, nb, seed=0, share=0.4):
    mask = torch.rand(H, nb, nb, generator=torch.Generator().manual_seed(seed)) < share
    return mask | torch.eye(nb, dtype=torch.bool)


def dense(q, k, v, mask, b, scale=None):
    """Softmax over the entries of the kept blocks, with an n x n mask per head."""
    n, group = q.shape[-2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    allowed = mask.repeat_interleave(b, -2).repeat_interleave(b, -1)[..., :n, :n]
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1) @ v


# orders


def test_tables_of_the_six_orders_equal_nested_loops():
    size = dict(zip("FHW", GRID, strict=True))
    tables = order_tables(GRID, TEXT)
    assert tables.shape == (6, TEXT + 24)
    for table, order in zip(tables.tolist(), ORDERS, strict=True):
        expected = [*range(TEXT)]
        for cell in product(*(range(size[axis]) for axis in order)):  # the first axis is the slowest
            at = dict(zip(order, cell, strict=True))
            expected.append(TEXT + (at["F"] * 3 + at["H"]) * 4 + at["W"])
        assert table == expected, order


def test_wfh_begins_with_the_whole_first_column_frame_by_frame():
    assert order_tables(GRID)[WFH, :7].tolist() == [0, 4, 8, 12, 16, 20, 1]
    assert order_tables(GRID)[HWF, :4].tolist() == [0, 12, 1, 13]


def test_four_orders_undo_themselves_and_two_each_other():
    inverse = {FHW: FHW, FWH: FWH, HFW: HFW, WHF: WHF, HWF: WFH, WFH: HWF}
    tables = order_tables(GRID)
    for order, back in inverse.items():
        permuted = tuple(GRID["FHW".index(axis)] for axis in ORDERS[order])  # the grid as it is now
        assert tables[order][order_tables(permuted)[back]].tolist() == [*range(24)]


@given(st.tuples(*[st.integers(1, 4)] * 3), st.integers(0, 5), st.integers(1, 2), st.integers(0, 10**6))
def test_unpermute_undoes_permute_for_any_grid(grid, n_text, batch, seed):
    tables = order_tables(grid, n_text)
    assert all(table.sort().values.equal(torch.arange(tables.shape[1])) for table in tables)
    orders = torch.randint(6, (3,), generator=torch.Generator().manual_seed(seed))
    x = draw(batch, 3, tables.shape[1], 2, seed=seed)
    y = permute(x, tables, orders)
    for h, order in enumerate(orders.tolist()):
        assert y[:, h].equal(x[:, h, tables[order]])
    assert unpermute(y, tables, orders).equal(x)
    assert y[..., :n_text, :].equal(x[..., :n_text, :])


def test_a_permuted_batch_of_one_is_not_an_alias():
    x = draw(1, 2, 24, 3)
    before = x.clone()
    permute(x, order_tables(GRID), torch.tensor([HWF, WHF])).zero_()
    assert x.equal(before)


def test_permuted_maps_are_the_maps_of_permuted_tokens():
    tables, orders = order_tables(GRID, TEXT), torch.tensor([HWF, WFH, FHW])
    q, k = draw(2, 3, 27, 5), draw(2, 3, 27, 5, seed=1)
    A = permute_map((q @ k.mT).softmax(-1), tables, orders)
    torch.testing.assert_close(A, (permute(q, tables, orders) @ permute(k, tables, orders).mT).softmax(-1))
    assert A[0, 0, 5, 9] == (q @ k.mT).softmax(-1)[0, 0, tables[HWF, 5], tables[HWF, 9]]


def test_an_image_has_two_distinct_orders():
    tables = order_tables((1, 3, 4), 2)
    assert len({tuple(table) for table in tables.tolist()}) == 2


@pytest.mark.parametrize("grid, n_text", [((2, 3), 0), ((2, 0, 3), 0), ((2, 3, 4), -1)])
def test_refuses_what_is_no_grid(grid, n_text):
    with pytest.raises(ValueError, match="grid must be three numbers >= 1 and n_text >= 0, got"):
        order_tables(grid, n_text)


# blocks and scores


@pytest.mark.parametrize("n, b", [(8, 4), (27, 4), (5, 7), (9, 1)])
def test_blocks_equal_loops_also_partial_ones(n, b):
    A, nb = attention_map(2, n), math.ceil(n / b)
    sums, maxima, counts = block_sums(A, b), block_maxima(A, b), block_counts(n, b)
    assert sums.shape == maxima.shape == (2, nb, nb)
    for h, i, j in product(range(2), range(nb), range(nb)):
        block = A[h, i * b : (i + 1) * b, j * b : (j + 1) * b]
        torch.testing.assert_close(sums[h, i, j], block.sum())
        assert maxima[h, i, j] == block.max()
        assert counts[i, j] == block.numel()


@pytest.mark.parametrize("n, b, scale", [(27, 4, None), (16, 8, 0.7), (5, 7, None)])
def test_streamed_statistics_equal_those_of_whole_maps(n, b, scale):
    q, k = draw(2, 4, n, 6), draw(2, 2, n, 6, seed=1)  # two query heads share a key head
    A = (q @ k.repeat_interleave(2, 1).mT * (6**-0.5 if scale is None else scale)).softmax(-1)
    sums, maxima = block_statistics(q, k, b, scale)
    torch.testing.assert_close(sums, block_sums(A, b))
    torch.testing.assert_close(maxima, block_maxima(A, b))
    torch.testing.assert_close(block_statistics(q.bfloat16(), k.bfloat16(), b, scale)[0], sums, atol=0.05, rtol=0.05)


def test_sparsity_counts_blocks_below_a_share_of_the_largest():
    sums = torch.tensor([[[10.0, 0.009], [0.0, 0.02]], [[1.0, 1.0], [1.0, 1.0]]])
    assert sparsity_score(sums).tolist() == [0.5, 0.0]
    assert sparsity_score(sums, threshold=0.01).tolist() == [0.75, 0.0]


def test_incoherence_is_max_over_mean_per_block():
    A = torch.tensor([[0.0, 0.5, 0.5], [0.25, 0.75, 0.0], [0.0, 0.0, 1.0]])
    psi = incoherence(block_sums(A, 2), block_maxima(A, 2), block_counts(3, 2))
    # blocks: 0.75 over 1.5 / 4, 0.5 over 0.5 / 2, an empty one, 1 over 1
    assert psi.item() == pytest.approx((2.0 + 2.0 + 1.0 + 1.0) / 4)
    uniform = torch.full((9, 9), 1 / 9)
    assert incoherence(block_sums(uniform, 4), block_maxima(uniform, 4), block_counts(9, 4)).item() == pytest.approx(1)


def test_the_order_of_best_mixed_score_wins():
    sparsity = torch.tensor([0.1, 0.9, 0.5, 0.1, 0.1, 0.1])
    psi = torch.tensor([10.0, 9.0, 2.0, 10.0, 10.0, 10.0])
    # scaled to [0, 1]: S' of the second and third 1 and 1/2, Psi' 7/8 and 0
    assert choose_order(sparsity, psi, weight=1.0) == 1
    assert choose_order(sparsity, psi, weight=0.0) == 2
    assert choose_order(sparsity, psi) == 2  # 1/4 above 1/2 - 7/16
    assert choose_order(sparsity, psi, weight=0.6) == 2  # 0.3 above 0.6 - 0.35
    assert choose_order(sparsity, psi, weight=0.7) == 1  # 0.7 - 0.2625 above 0.35
    both = choose_order(torch.stack([sparsity, sparsity.flip(0)]), torch.stack([psi, psi.flip(0)]))
    assert both.tolist() == [2, 3]


def test_equal_orders_tie_to_the_earlier_one():
    flat = torch.full((6,), 0.3)
    assert choose_order(flat, flat) == 0
    noise = flat * (1 + 1e-8 * torch.arange(6))  # rounding is not worth an order
    assert choose_order(noise, 5 * flat) == 0
    twice = torch.tensor([0.1, 0.4, 0.4, 0.1, 0.4, 0.1])
    assert choose_order(twice, flat) == 1


def test_text_partial_last_block_and_diagonal_are_always_kept():
    always = always_kept(n=19, n_text=5, b=4)  # blocks 0 and 1 hold text, block 4 is partial
    expected = torch.eye(5, dtype=torch.bool)
    for i in (0, 1, 4):
        expected[i], expected[:, i] = True, True
    assert always.equal(expected)
    assert always_kept(16, 0, 4).equal(torch.eye(4, dtype=torch.bool))
    video = always_kept(226 + 17550, 226, 64)  # CogVideoX: 226 text tokens end inside the fourth block
    assert video.shape == (278, 278)
    assert video.all(0).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 277]


def test_the_static_mask_keeps_the_largest_blocks_at_the_density():
    sums = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    always = torch.eye(8, dtype=torch.bool)
    mask = static_mask(sums, 0.25, always)
    assert mask.dtype == torch.bool and (mask.sum((-2, -1)) == 16).all()
    assert mask[..., always].all()
    for kept, row in zip(mask.flatten(0, 1), sums.flatten(0, 1), strict=True):
        assert row[kept & ~always].min() > row[~kept].max()


def test_static_mask_ties_go_to_the_earlier_block_and_the_always_kept_all_stay():
    always = torch.eye(4, dtype=torch.bool)
    mask = static_mask(torch.ones(4, 4), 0.375, always)
    assert (mask & ~always).nonzero().tolist() == [[0, 1], [0, 2]]
    assert static_mask(torch.ones(4, 4), 0.01, always).equal(always)
    assert static_mask(torch.rand(4, 4), 1.0, always).all()
    assert static_mask(torch.rand(4, 4), 1, always).all()


def test_kept_mass_is_the_share_inside_the_mask():
    sums = torch.tensor([[3.0, 1.0], [0.0, 4.0]])
    assert kept_mass(sums, torch.eye(2, dtype=torch.bool)) == 7 / 8


def test_time_groups_by_hand():
    assert [time_group(step, 50, 10) for step in (0, 3, 4, 8, 9, 43, 44, 48, 49)] == [0, 0, 1, 1, 2, 8, 9, 9, 9]
    assert {time_group(step, 7, 1) for step in range(7)} == {0}
    for step in (-1, 50):
        with pytest.raises(ValueError, match=r"step must be in \[0, 50\), got"):
            time_group(step, 50, 10)


# rounding


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("n, D, tile", [(8, 6, (4, 6)), (11, 7, (4, 3)), (3, 2, (5, 5))])
def test_quantise_equals_loops(n, D, tile, bits):
    x = 3 * draw(2, n, D)
    codes, scale = quantise(x, tile, bits)
    rows, columns = math.ceil(n / tile[0]), math.ceil(D / tile[1])
    assert codes.shape == x.shape and codes.dtype == torch.int8 and scale.shape == (2, rows, columns)
    back = dequantise(codes, scale, tile)
    for a, i, j in product(range(2), range(rows), range(columns)):
        at = (a, slice(i * tile[0], (i + 1) * tile[0]), slice(j * tile[1], (j + 1) * tile[1]))
        top = x[at].abs().max() / (2 ** (bits - 1) - 1)
        torch.testing.assert_close(scale[a, i, j], top)
        assert codes[at].equal((x[at] / top).round().to(torch.int8))
        torch.testing.assert_close(back[at], codes[at] * top)
        assert (back[at] - x[at]).abs().max() <= top / 2 + 1e-6


def test_a_tile_of_zeros_stays_zero():
    codes, scale = quantise(torch.zeros(1, 4, 4), (2, 4))
    assert not codes.any() and not scale.any()
    assert not dequantise(codes, scale, (2, 4)).any()


@pytest.mark.parametrize("bits", [1, 9, 4.5])
def test_refuses_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=r"bits must be in \[2, 8\], got"):
        quantise(torch.ones(2, 2), (2, 2), bits)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_softmax_scale_and_log2_e_are_folded_into_the_scales_of_q(scale):
    q, k = draw(1, 2, 130, 8), draw(1, 2, 130, 8, seed=1)
    q_codes, q_scale, k_codes, k_scale = quantise_qk(q, k, 64, 8, scale)
    assert q_scale.shape == (1, 2, 5, 1) and k_scale.shape == (1, 2, 3, 1)  # 32 rows of q, 64 of k
    used = 8**-0.5 if scale is None else scale
    torch.testing.assert_close(q_scale[0, 1, 2, 0], q[0, 1, 64:96].abs().max() / 127 * used * math.log2(math.e))
    torch.testing.assert_close(k_scale[0, 1, 2, 0], k[0, 1, 128:].abs().max() / 127)
    logits = dequantise(q_codes, q_scale, (32, 8)) @ dequantise(k_codes, k_scale, (64, 8)).mT
    P = torch.exp2(logits)
    torch.testing.assert_close(P / P.sum(-1, keepdim=True), (q @ k.mT * used).softmax(-1), atol=2e-3, rtol=0.2)


# attention


@pytest.mark.parametrize("n, b", [(24, 4), (27, 4), (13, 16), (30, 1)])
@pytest.mark.parametrize("Hkv", [4, 2, 1])
def test_block_sparse_attention_is_softmax_over_the_kept_entries(n, b, Hkv):
    q, k, v = draw(2, 4, n, 6), draw(2, Hkv, n, 6, seed=1), draw(2, Hkv, n, 5, seed=2)
    mask = random_mask(4, math.ceil(n / b))
    for scale in (None, 0.9):
        out = block_sparse_attention(q, k, v, mask, b, scale=scale)
        torch.testing.assert_close(out, dense(q, k, v, mask, b, scale), atol=1e-6, rtol=1e-5)
    assert block_sparse_attention(q, k, v, kept_blocks(mask), b).equal(block_sparse_attention(q, k, v, mask, b))


class Products(TorchFunctionMode):
    """Sums query-key pairs over all attention that runs inside."""

    pairs = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is sdpa:
            self.pairs += args[0].shape[:-1].numel() * args[1].shape[-2]
        return func(*args, **(kwargs or {}))


def test_skipped_blocks_are_not_computed():
    b, mask = 4, random_mask(2, 6)
    mask[:, :, 4] = False
    mask[:, 4] = False
    mask[:, 4, 4] = True  # block 4 is seen by itself alone
    q, k, v = (draw(1, 2, 24, 6, seed=seed) for seed in range(3))
    with Products() as counted:
        out = block_sparse_attention(q, k, v, mask, b)
    assert counted.pairs == int(mask.sum()) * b * b < 2 * 24 * 24
    k[:, :, 16:20], v[:, :, 16:20] = torch.nan, torch.nan
    poisoned = block_sparse_attention(q, k, v, mask, b)
    others = [*range(16), *range(20, 24)]
    assert poisoned[:, :, others].equal(out[:, :, others])
    assert poisoned[:, :, 16:20].isnan().all()


def test_a_row_without_a_block_keeps_its_diagonal():
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[0, 0, 1] = True
    out = block_sparse_attention(*(draw(1, 1, 10, 4, seed=seed) for seed in range(3)), mask, 4)
    assert out.isfinite().all()
    rows = kept_blocks(mask)
    assert [(row.tolist(), key.tolist()) for row, key in rows] == [([1, 2], [[1], [2]]), ([0], [[0, 1]])]


def test_gathering_in_parts_changes_nothing(monkeypatch):
    q, k, v = (draw(2, 3, 22, 6, seed=seed) for seed in range(3))
    whole = block_sparse_attention(q, k, v, random_mask(3, 6), 4)
    monkeypatch.setattr(module, "_GATHERED", 100)
    torch.testing.assert_close(block_sparse_attention(q, k, v, random_mask(3, 6), 4), whole)


def test_half_precision_stays_half_precision():
    q, k, v = (draw(1, 2, 27, 8, seed=seed) for seed in range(3))
    mask = random_mask(2, 7)
    for bits in (None, 8):
        out = block_sparse_attention(*(x.bfloat16() for x in (q, k, v)), mask, 4, qk_bits=bits, pv_bits=bits)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), dense(q, k, v, mask, 4), atol=0.05, rtol=0.05)


def test_gradients_flow_through_kept_blocks():
    q, k, v = (draw(1, 2, 22, 4, seed=seed).requires_grad_() for seed in range(3))
    mask = random_mask(2, 6)
    ours = torch.autograd.grad(block_sparse_attention(q, k, v, mask, 4).pow(2).sum(), (q, k, v))
    theirs = torch.autograd.grad(dense(q, k, v, mask, 4).pow(2).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("qk_bits, pv_bits", [(8, None), (None, 8), (4, 4)])
def test_rounded_attention_equals_dense_attention_of_rounded_numbers(qk_bits, pv_bits):
    n, b, D = 70, 64, 8
    q, k, v = draw(1, 2, n, D), draw(1, 2, n, D, seed=1), draw(1, 2, n, D, seed=2)
    mask = torch.tensor([[[True, False], [True, True]], [[True, True], [True, True]]])
    out = block_sparse_attention(q, k, v, mask, b, qk_bits=qk_bits, pv_bits=pv_bits)
    q_, k_, v_ = q, k, v
    if qk_bits:
        q_ = dequantise(*quantise(q, (32, D), qk_bits), (32, D))
        k_ = dequantise(*quantise(k, (b, D), qk_bits), (b, D))
    P = dense(q_, k_, torch.eye(n).expand(1, 2, n, n), mask, b)
    if pv_bits:
        P = dequantise(*quantise(P, (b, b), pv_bits), (b, b))
        v_ = dequantise(*quantise(v, (b, D), pv_bits), (b, D))
    torch.testing.assert_close(out, P @ v_, atol=1e-5, rtol=1e-4)
    assert (out - dense(q, k, v, mask, b)).abs().max() > 1e-4


@pytest.mark.parametrize("orders", [[FHW, FWH], [HWF, HFW], [WHF, WFH]])
@pytest.mark.parametrize("n_text", [0, 3])
def test_any_order_with_a_full_mask_is_plain_attention(orders, n_text):
    n, b = n_text + 24, 4
    q, k, v = draw(2, 4, n, 6), draw(2, 2, n, 6, seed=1), draw(2, 2, n, 6, seed=2)  # one order per KV head
    full = torch.ones(4, math.ceil(n / b), math.ceil(n / b), dtype=torch.bool)
    out = permuted_attention(q, k, v, order_tables(GRID, n_text), torch.tensor(orders), full, b)
    torch.testing.assert_close(out, sdpa(q, k, v, enable_gqa=True), atol=1e-6, rtol=1e-5)


def test_the_mask_is_one_of_permuted_tokens():
    tables, orders, b = order_tables(GRID, TEXT), torch.tensor([WFH]), 4
    q, k, v = (draw(1, 1, 27, 6, seed=seed) for seed in range(3))
    mask = random_mask(1, 7)
    out = permuted_attention(q, k, v, tables, orders, mask, b)
    rank = tables[WFH].argsort()  # where a token goes
    allowed = mask[0][rank // b][:, rank // b]
    expected = (q @ k.mT * 6**-0.5).masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


# plans


def plan_of(grid=GRID, n_text=TEXT, b=4, layers=2, heads=2, groups=1, seed=0, share=0.4):
    nb = math.ceil((n_text + math.prod(grid)) / b)
    generator = torch.Generator().manual_seed(seed)
    orders = torch.randint(6, (layers, heads), generator=generator)
    masks = random_mask(groups * layers * heads, nb, seed, share).view(groups, layers, heads, nb, nb)
    return PermutationPlan(grid, n_text, orders, masks, b)


def test_a_plan_computes_the_attention_of_its_layer_and_group():
    plan = plan_of(groups=3)
    q, k, v = (draw(2, 2, 27, 6, seed=seed) for seed in range(3))
    for layer, group in product(range(2), range(3)):
        expected = permuted_attention(q, k, v, plan.tables, plan.orders[layer], plan.masks[group, layer], 4)
        assert plan.attention(q, k, v, layer, group).equal(expected)
        rounded = permuted_attention(
            q, k, v, plan.tables, plan.orders[layer], plan.masks[group, layer], 4, scale=0.4, qk_bits=8, pv_bits=4
        )
        assert plan.attention(q, k, v, layer, group, scale=0.4, qk_bits=8, pv_bits=4).equal(rounded)


def test_a_plan_survives_its_file(tmp_path):
    plan = replace(plan_of(groups=3), fingerprint="abc")
    loaded = PermutationPlan.load(plan.save(tmp_path / "plan.safetensors"))
    assert loaded.orders.equal(plan.orders) and loaded.masks.equal(plan.masks)
    assert (loaded.grid, loaded.n_text, loaded.block, loaded.fingerprint) == (GRID, TEXT, 4, "abc")
    assert repr(loaded) == repr(plan)
    assert (tmp_path / "plan.safetensors").stat().st_size < plan.masks.numel() // 8 + 1000  # a bit per block


def test_another_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"orders": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"other\.safetensors was not written by PermutationPlan\.save"):
        PermutationPlan.load(tmp_path / "other.safetensors")


def test_a_plan_says_what_it_is():
    plan = PermutationPlan((1, 2, 2), 0, torch.tensor([[FHW, WHF], [WHF, WFH]]), torch.ones(1, 2, 2, 2, 2).bool(), 2)
    assert repr(plan) == (
        "PermutationPlan(grid=(1, 2, 2), n_text=0, block=2; 2 layers x 2 heads, 1 time groups, density 1.000; "
        "FHW 1, WHF 2, WFH 1)"
    )


def test_a_plan_refuses_another_grid():
    plan = plan_of()
    plan.require(GRID, TEXT)
    for grid, n_text in (((2, 4, 3), TEXT), (GRID, 0)):
        with pytest.raises(PromptError, match=r"the plan is for grid \(2, 3, 4\) behind 3 text tokens, got"):
            plan.require(grid, n_text)
    q = torch.zeros(1, 2, 28, 4)
    with pytest.raises(PromptError, match="27 in all, got 28; calibrate a plan for it"):
        plan.attention(q, q, q, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"orders": torch.tensor([[0, 6], [0, 0]])}, r"orders must be .* in \[0, 6\)"),
        ({"orders": torch.tensor([[0, -1], [0, 0]])}, r"orders must be .* in \[0, 6\)"),
        ({"orders": torch.zeros(3, 2, dtype=torch.long)}, r"masks must have shape \(groups, 3, multiple of 2, 7, 7\)"),
        ({"orders": torch.zeros(2, 3, dtype=torch.long)}, "multiple of 3"),
        ({"grid": (2, 3, 9)}, "15, 15"),
        ({"block": 8}, "4, 4"),
    ],
)
def test_a_plan_of_parts_that_do_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(plan_of(), **change)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("budget", 0.0, r"PAROAttention.budget must be in \(0, 1\], got 0.0"),
        ("budget", 1.5, r"PAROAttention.budget must be in \(0, 1\], got 1.5"),
        ("weight", -0.1, r"PAROAttention.weight must be in \[0, 1\], got -0.1"),
        ("threshold", 1.0, r"PAROAttention.threshold must be in \[0, 1\), got 1.0"),
        ("block", 0, "PAROAttention.block must be >= 1, got 0"),
        ("groups", 0, "PAROAttention.groups must be >= 1, got 0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        PAROAttention(**{field: value})
    assert PAROAttention.parse("PAROAttention(budget=0.3, groups=10)") == PAROAttention(budget=0.3, groups=10)


# calibration


def local(grid, wide, n_text=0, heads=1, batch=1, seed=0, sharp=40.0):
    """q = k whose heads look at tokens of the same coordinates, except along the axes `wide`."""
    cells = torch.cartesian_prod(*(torch.arange(size) for size in grid))
    parts = [
        torch.nn.functional.one_hot(cells[:, a], grid[a]) for a in range(3) if "FHW"[a] not in wide and grid[a] > 1
    ]
    code = torch.cat(parts, 1).float() * sharp
    x = torch.cat([torch.zeros(n_text, code.shape[1]), code])
    return x + 0.1 * draw(batch, heads, *x.shape, seed=seed)


def calibrated(method, grid, maps, n_text=0):
    """The plan of [(layer, q, k, group), ...], each shown in both passes."""
    calibration = Calibration(method, grid, n_text)
    for layer, q, k, group in maps:
        calibration.add(layer, q, k, group, scale=1.0)
    calibration.choose()
    for layer, q, k, group in maps:
        calibration.add(layer, q, k, group, scale=1.0)
    return calibration.plan()


@pytest.mark.parametrize("n_text", [0, 5])
@pytest.mark.parametrize(
    "wide, orders, budget",
    [  # a block holds one whole row of the grid's fastest axis
        ("F", (HWF, WHF), 1 / 16),
        ("H", (FWH, WFH), 1 / 16),
        ("W", (FHW, HFW), 1 / 16),
        ("FH", (FWH, WFH, HWF, WHF), 1 / 4),
        ("HW", (FWH, WFH, FHW, HFW), 1 / 4),
    ],
)
def test_a_heads_order_has_an_axis_it_looks_along_fastest(wide, orders, budget, n_text):
    grid, b = (4, 4, 4), 4
    q = local(grid, wide, n_text)
    plan = calibrated(PAROAttention(block=b, budget=budget), grid, [(0, q, q, 0)], n_text)
    assert int(plan.orders[0, 0]) in orders
    always = always_kept(plan.tokens, n_text, b)
    assert plan.masks[0, 0, 0][always].all()
    assert int(plan.masks.sum()) == max(math.floor(budget * plan.masks.numel()), int(always.sum()))
    if n_text == 0:  # then every pattern is whole blocks in these orders, and in no other
        for order in range(6):
            q_ = q[..., plan.tables[order], :]
            sums, _ = block_statistics(q_, q_, b, 1.0)
            mass = float(kept_mass(sums, static_mask(sums, budget, always)))
            assert mass > 0.99 if order in orders else mass < 0.9, ORDERS[order]
        q_ = permute(q, plan.tables, plan.orders[0])
        sums, _ = block_statistics(q_, q_, b, 1.0)
        assert kept_mass(sums, plan.masks[0, 0]) > 0.99


def test_scores_are_means_over_maps_and_masks_means_per_group():
    grid, b, nb = (2, 3, 4), 4, 6
    generator = torch.Generator().manual_seed(0)
    maps = [
        (layer, 3 * torch.randn(2, 4, 24, 6, generator=generator), torch.randn(2, 2, 24, 6, generator=generator), group)
        for layer, group in ((0, 0), (1, 0), (0, 2), (1, 2), (0, 2), (1, 2))
    ]
    method = PAROAttention(block=b, budget=0.5, groups=3, threshold=0.05, weight=0.4)
    plan = calibrated(method, grid, maps)
    assert plan.masks.shape == (3, 2, 4, nb, nb) and plan.orders.shape == (2, 2)
    tables = order_tables(grid)
    for layer, h in product(range(2), range(2)):
        scores = []
        for order in range(6):
            found = []
            for at, q, k, _ in maps:
                A = (q @ k.repeat_interleave(2, 1).mT).softmax(-1)[:, 2 * h : 2 * h + 2]  # the heads of one KV head
                A = A[..., tables[order], :][..., tables[order]]
                sums = block_sums(A, b)
                S, psi = sparsity_score(sums, 0.05), incoherence(sums, block_maxima(A, b), block_counts(24, b))
                if at == layer:
                    found.append(torch.stack([S.mean(), psi.mean()]))
            scores.append(torch.stack(found).mean(0))
        S, psi = torch.stack(scores, 1)
        assert plan.orders[layer, h] == choose_order(S, psi, 0.4)
    for layer, h in product(range(2), range(4)):
        table, means = tables[plan.orders[layer, h // 2]], {}
        for group in (0, 2):
            of_group = [
                (q @ k.repeat_interleave(2, 1).mT).softmax(-1)[:, h]
                for at, q, k, g in maps
                if (at, g) == (layer, group)
            ]
            A = torch.cat(of_group)[:, table][:, :, table]
            means[group] = block_sums(A, b).mean(0)
        means[1] = (means[0] + means[2]) / 2  # no map was seen of this group
        for group, mean in means.items():
            assert plan.masks[group, layer, h].equal(static_mask(mean, 0.5, always_kept(24, 0, b)))


def test_text_says_nothing_about_the_order():
    grid, n_text, b = (4, 4, 4), 8, 4
    q = local(grid, "F", n_text)
    noisy = q.clone()
    noisy[:, :, :n_text] = 5 * draw(1, 1, n_text, q.shape[-1])
    text_only = torch.zeros_like(q)  # every token looks at one text token alone
    text_only[..., 0] = 1.0
    key = torch.zeros_like(q)
    key[..., 3, 0] = 50.0
    maps = {"quiet": (q, q), "noisy": (noisy, q), "text": (text_only, key)}
    found = {name: calibrated(PAROAttention(block=b), grid, [(0, *qk, 0)], n_text) for name, qk in maps.items()}
    assert int(found["quiet"].orders) == int(found["noisy"].orders) in (HWF, WHF)
    assert int(found["text"].orders) == FHW  # all orders are equal, the first is taken


def test_a_single_frame_ties_to_the_earlier_of_equal_orders():
    grid = (1, 8, 4)
    plan = calibrated(PAROAttention(block=4), grid, [(0, local(grid, "H"), local(grid, "H"), 0)])
    assert int(plan.orders) == FWH  # WHF and WFH are the same tables
    plan = calibrated(PAROAttention(block=4), grid, [(0, local(grid, "W"), local(grid, "W"), 0)])
    assert int(plan.orders) == FHW


def test_orders_may_be_given_by_hand():
    q = local((4, 4, 4), "F")
    calibration = Calibration(PAROAttention(block=4), (4, 4, 4))
    calibration.orders = torch.tensor([[WFH]])
    calibration.add(0, q, q)
    assert calibration.plan("id").orders.tolist() == [[WFH]]
    assert calibration.plan("id").fingerprint == "id"


def test_calibration_says_what_it_lacks():
    q = draw(1, 1, 24, 4)
    calibration = Calibration(PAROAttention(block=4), GRID)
    with pytest.raises(UsageError, match="orders need the maps of every layer from 0 on, got those of none"):
        calibration.choose()
    calibration.add(1, q, q)
    with pytest.raises(UsageError, match=r"from 0 on, got those of \[1\]"):
        calibration.choose()
    with pytest.raises(UsageError, match="after its orders are known"):
        calibration.plan()
    calibration.add(0, q, q)
    calibration.choose()
    calibration.add(0, q, q)
    with pytest.raises(UsageError, match="after its orders are known; layer 1 has none"):
        calibration.plan()
    with pytest.raises(PromptError, match="24 in all, got 23"):
        calibration.add(0, q[:, :, 1:], q[:, :, 1:])
    with pytest.raises(ValueError, match=r"PAROAttention\.block must leave blocks without text, got 32 for 27 tokens"):
        Calibration(PAROAttention(block=32), GRID, TEXT)


# diffusers


def test_says_how_to_install_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r'pip install "seqwise\[diffusers\]"'):
        attach(torch.nn.Linear(2, 2), plan_of())


class Video:
    """A tiny diffusers transformer whose grid is GRID, and calls of it."""

    def __init__(self, kind):
        diffusers = pytest.importorskip("diffusers")
        torch.manual_seed(0)
        self.kind = kind
        if kind == "cogvideox":
            self.n_text = TEXT
            self.model = diffusers.CogVideoXTransformer3DModel(
                num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
                text_embed_dim=8, num_layers=2, sample_width=8, sample_height=6, sample_frames=5,
                max_text_seq_length=TEXT, use_rotary_positional_embeddings=True,
            )  # fmt: skip
            angle = draw(24, 8, seed=5).repeat_interleave(2, -1)
            self.rotary = (angle.cos(), angle.sin())
        else:
            self.n_text = 0
            self.model = diffusers.WanTransformer3DModel(
                patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
                text_dim=8, freq_dim=8, ffn_dim=16, num_layers=2, rope_max_seq_len=32,
            )  # fmt: skip
        for parameter in self.model.parameters():  # or attention is as good as uniform
            if parameter.dim() > 1:
                parameter.data *= 3
        self.model.eval()

    def latent(self, batch=1, grid=GRID, seed=0):
        F, rows, columns = grid
        x = draw(batch, F, 4, 2 * rows, 2 * columns, seed=seed)
        return x if self.kind == "cogvideox" else x.transpose(1, 2)

    @torch.no_grad()
    def __call__(self, x, t=500):
        text = draw(1, self.n_text or 4, 8, seed=9).expand(len(x), -1, -1)
        more = {"image_rotary_emb": self.rotary} if self.kind == "cogvideox" else {}
        return self.model(hidden_states=x, encoder_hidden_states=text, timestep=torch.full((len(x),), t), **more).sample

    def plan(self, **kwargs):
        return plan_of(n_text=self.n_text, **kwargs)


@pytest.fixture(params=["cogvideox", "wan"])
def video(request):
    return Video(request.param)


def test_any_order_with_a_full_mask_leaves_a_transformer_as_it_is(video):
    x = video.latent(2)
    plain = video(x)
    for seed in range(3):
        with attach(video.model, video.plan(share=1.1, seed=seed)):
            torch.testing.assert_close(video(x), plain, atol=1e-5, rtol=1e-5)
    with attach(video.model, video.plan(share=0.2)):
        assert (video(x) - plain).abs().max() > 1e-2


def test_processors_come_back_also_after_an_exception(video):
    before, plain = video.model.attn_processors, video(video.latent())
    keys, hooks = [*video.model.state_dict()], len(video.model._forward_pre_hooks)
    with pytest.raises(ZeroDivisionError), attach(video.model, video.plan()):
        replaced = [name for name, one in video.model.attn_processors.items() if one is not before[name]]
        assert len(replaced) == 2 and all("attn1" in name for name in replaced)  # no cross-attention
        raise ZeroDivisionError
    attached = attach(video.model, video.plan())
    assert not video(video.latent()).equal(plain)
    attached.detach()
    attached.detach()
    after = video.model.attn_processors
    assert all(after[name] is one for name, one in before.items()) and len(after) == len(before)
    assert [*video.model.state_dict()] == keys and len(video.model._forward_pre_hooks) == hooks
    assert video(video.latent()).equal(plain)


def test_a_second_plan_is_refused(video):
    with attach(video.model, video.plan()):
        with pytest.raises(AlreadyAttached, match="already has its attention replaced"):
            attach(video.model, video.plan())
        with pytest.raises(AlreadyAttached, match="already has its attention replaced"):
            PAROAttention(block=4).calibrate(video.model, lambda: None, grid=GRID, n_text=video.n_text)


def test_another_grid_is_refused(video):
    with attach(video.model, video.plan()):
        with pytest.raises(PromptError, match="frames of 3 x 4 tokens, got 4 x 3; calibrate a plan"):
            video(video.latent(grid=(2, 4, 3)))  # as many tokens
        if video.kind == "wan":  # CogVideoX adds rotary embeddings of 24 tokens first
            with pytest.raises(PromptError, match="24 in all, got 36; calibrate a plan"):
                video(video.latent(grid=(3, 3, 4)))


def test_a_batch_shares_the_masks(video):
    x = video.latent(3)
    with attach(video.model, video.plan()):
        together = video(x)
        for b in range(3):
            torch.testing.assert_close(together[b], video(x[b : b + 1])[0], atol=1e-5, rtol=1e-5)


def test_each_step_has_the_masks_of_its_group(video):
    x, plan = video.latent(), video.plan(groups=2, share=0.3)
    alone = []
    for group in range(2):
        with attach(video.model, replace(plan, masks=plan.masks[group : group + 1])):
            alone.append({t: video(x, t) for t in (900, 600, 300, 100)})
    with attach(video.model, plan, steps=4):
        for _ in range(2):  # a second generation begins with a higher timestep
            for step, t in enumerate((900, 600, 300, 100)):
                assert video(x, t).equal(alone[time_group(step, 4, 2)][t]), (step, t)
                assert video(x, t).equal(alone[time_group(step, 4, 2)][t]), "guidance as a second forward"
        with pytest.raises(UsageError, match="steps must be that of the generation, got 4 and now another timestep"):
            video(x, 50)
    assert not alone[0][900].equal(alone[1][900])


def test_several_groups_need_the_number_of_steps(video):
    with pytest.raises(UsageError, match="steps must be >= 1 for 2 time groups, got None"):
        attach(video.model, video.plan(groups=2))
    assert all(type(one).__name__ != "ReroutedProcessor" for one in video.model.attn_processors.values())


class Captured(TorchFunctionMode):
    """Keeps q and k of every self-attention that runs inside."""

    def __init__(self):
        super().__init__()
        self.pairs = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is sdpa:
            q, k = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
            if q.shape == k.shape:
                self.pairs.append((q, k))
        return out


def test_calibrated_on_a_transformer(video):
    x, times, seen = video.latent(2), (800, 400, 200), []

    def run():
        seen.extend(video(x, t) for t in times)

    method = PAROAttention(budget=0.65, block=4, groups=3)
    plan = method.calibrate(video.model, run, grid=GRID, n_text=video.n_text, steps=3)
    expected = Calibration(method, GRID, video.n_text)
    for _ in range(2):
        for step, t in enumerate(times):
            with Captured() as captured:
                plain = video(x, t)
            torch.testing.assert_close(seen.pop(0), plain, atol=1e-5, rtol=1e-5)  # it reads and changes nothing
            for layer, (q, k) in enumerate(captured.pairs):
                expected.add(layer, q, k, time_group(step, 3, 3))
        if expected.orders is None:
            expected.choose()
    assert not seen and (plan.layers, plan.heads, plan.groups) == (2, 2, 3)
    assert plan.orders.equal(expected.orders) and plan.masks.equal(expected.plan().masks)
    attach(video.model, plan, steps=3).detach()
    next(iter(video.model.parameters())).data += 1
    with pytest.raises(UnsupportedModel, match="calibrated on another model"):
        attach(video.model, plan, steps=3)
    attach(video.model, replace(plan, fingerprint=""), steps=3).detach()


def test_a_run_that_never_calls_the_transformer_is_refused(video):
    before = video.model.attn_processors
    with pytest.raises(UsageError, match="orders need the maps of every layer"):
        PAROAttention(block=4).calibrate(video.model, lambda: None, grid=GRID, n_text=video.n_text)
    assert video.model.attn_processors == before


def test_rounding_costs_little_at_8_bits_and_more_at_4(video):
    x, plan = video.latent(), video.plan()
    errors = []
    with attach(video.model, plan):
        exact = video(x)
    for bits in (8, 4):
        with attach(video.model, plan, qk_bits=bits, pv_bits=bits):
            errors.append(float((video(x) - exact).norm() / exact.norm()))
    assert 0 < errors[0] < 0.01 and errors[1] > 5 * errors[0]
    for name in ("qk_bits", "pv_bits"):
        with pytest.raises(ValueError, match=rf"{name} must be in \[2, 8\], got 16"):
            attach(video.model, plan, **{name: 16})


def test_refuses_models_that_do_not_fit():
    video = Video("wan")
    for wrong in (video.plan(layers=3), video.plan(heads=4)):
        with pytest.raises(UnsupportedModel, match="WanTransformer3DModel has 2 layers of 2 heads"):
            attach(video.model, wrong)
    with pytest.raises(UnsupportedModel, match="needs a diffusers transformer with self-attention, got Linear"):
        attach(torch.nn.Linear(2, 2), video.plan())


class Other:
    """A processor that does not come to torch's attention, or comes with a mask."""

    def __init__(self, masked):
        self.masked = masked

    def __call__(self, attn, hidden_states, *args):
        if self.masked:
            q = hidden_states.unflatten(-1, (2, -1)).transpose(1, 2)
            sdpa(q, q, q, attn_mask=torch.ones(24, 24, dtype=torch.bool))
        return hidden_states


def test_refuses_attention_that_it_cannot_replace():
    video = Video("wan")
    for masked, message in ((False, "Other must call torch's .* once, got 0 calls"), (True, "without mask")):
        for block in video.model.blocks:
            block.attn1.set_processor(Other(masked))
        with attach(video.model, video.plan()), pytest.raises(UnsupportedModel, match=message):
            video(video.latent())
