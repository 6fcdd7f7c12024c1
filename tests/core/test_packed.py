"""The bit store against plain lists of codes, and its bytes against arithmetic."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqwise.core.packed import BITS, Packed, pack_bits, storage_bytes, unpack_bits

bits_ = st.sampled_from(BITS)
sizes = st.integers(1, 19)


def codes_of(bits, *shape, seed=0):
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def packed_of(bits, m=7, D=5, seed=0, B=2, H=3, scale=True):
    """Parameters per token, the scale per channel."""
    random = torch.Generator().manual_seed(seed)
    minimum, step = torch.randn(B, H, m, 1, generator=random), torch.rand(B, H, m, 1, generator=random)
    factor = torch.rand(B, H, 1, D, generator=random) + 0.5 if scale else None
    return Packed.pack(codes_of(bits, B, H, m, D, seed=seed), bits, minimum, step, factor)


@given(bits=bits_, D=sizes, seed=st.integers(0, 99))
def test_packing_loses_nothing(bits, D, seed):
    codes = codes_of(bits, 2, 3, D, seed=seed)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, ceil(D * bits / 8))
    assert torch.equal(unpack_bits(packed, bits, D), codes)


@given(bits=bits_, D=sizes)
def test_the_layout_is_low_bits_first_and_zeros_last(bits, D):
    codes = codes_of(bits, D)
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    assert pack_bits(codes, bits).tolist() == list(number.to_bytes(ceil(D * bits / 8), "little"))


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match=r"^bits must be one of \(1, 2, 4, 8\), got 3$"):
        pack_bits(codes_of(2, 4), 3)


@given(bits=bits_, D=sizes, m=st.integers(1, 6), scale=st.booleans())
def test_values_are_codes_times_step_plus_minimum_times_scale(bits, D, m, scale):
    codes = codes_of(bits, 2, 3, m, D)
    p = packed_of(bits, m, D, scale=scale)
    wanted = codes.float() * p.step + p.minimum
    if scale:
        wanted = wanted * p.scale
    torch.testing.assert_close(p.dequantize(torch.float32), wanted)
    assert p.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert p.dequantize(torch.float32).shape == (2, 3, m, D)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("per", ["token", "channel", "head"])
def test_gather_takes_the_same_tokens_of_values_and_parameters(bits, per):
    B, H, m, D = 2, 3, 7, 5
    shape = {"token": (B, H, m, 1), "channel": (B, H, 1, D), "head": (1, H, 1, 1)}[per]
    minimum, step, scale = (torch.rand(shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
    p = Packed.pack(codes_of(bits, B, H, m, D), bits, minimum, step, scale)
    index = torch.tensor([[[0, 3, 6], [1, 2, 2], [6, 5, 0]], [[4, 4, 4], [0, 1, 2], [3, 5, 6]]])
    wanted = p.dequantize(torch.float32).gather(2, index[..., None].expand(-1, -1, -1, D))
    torch.testing.assert_close(p.gather(index).dequantize(torch.float32), wanted, rtol=0, atol=0)


def test_gathered_tokens_take_the_bytes_of_their_number():
    p = packed_of(4, m=8)
    half = p.gather(torch.arange(4).expand(2, 3, 4))
    assert half.codes.untyped_storage().nbytes() * 2 == p.codes.untyped_storage().nbytes()
    assert half.step.untyped_storage().nbytes() * 2 == p.step.untyped_storage().nbytes()


def test_select_takes_samples_and_leaves_shared_parameters():
    p = packed_of(2)
    p = Packed(p.codes, p.bits, p.size, p.minimum[:1], p.step, p.scale)
    batch = torch.tensor([1, 1, 0])
    chosen = p.select(batch)
    assert chosen.minimum.shape[0] == 1
    torch.testing.assert_close(chosen.dequantize(torch.float32), p.dequantize(torch.float32)[batch], rtol=0, atol=0)


@given(bits=bits_, D=sizes, m=st.integers(1, 6))
def test_bytes_are_those_of_codes_and_parameters(bits, D, m):
    B, H = 2, 3
    p = packed_of(bits, m, D)
    assert p.nbytes == B * H * m * ceil(D * bits / 8) + 2 * 4 * B * H * m + 4 * B * H * D


def test_storage_is_counted_once_and_in_full():
    x, y = torch.zeros(4, 8), torch.zeros(3, dtype=torch.uint8)
    assert storage_bytes([]) == 0
    assert storage_bytes([x]) == storage_bytes([x[:1]]) == storage_bytes([x[:, :1].expand(9, 4, 8)]) == 4 * 8 * 4
    assert storage_bytes([x, x[2:], y]) == 4 * 8 * 4 + 3
