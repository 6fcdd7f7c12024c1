"""The model's own rotation on bare tensors: it undoes, adds up, and gives what the model computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import UnsupportedModel
from seqwise.core.rope import Rope, frequencies_of, rotate
from seqwise.testing import FAMILIES

FREQUENCIES = 1.0 / 100 ** (torch.arange(0, 6, 2) / 6)


def reference(x, position, inv_freq, interleaved):
    """One vector (D,), pair by pair."""
    out, half = x.clone(), len(inv_freq)
    for i, f in enumerate(inv_freq.tolist()):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        angle = torch.tensor(position * f)
        out[a] = x[a] * angle.cos() - x[b] * angle.sin()
        out[b] = x[b] * angle.cos() + x[a] * angle.sin()
    return out


@given(st.booleans(), st.integers(6, 9), st.floats(-50, 50), st.integers(0, 99))
def test_rotates_pair_by_pair_and_leaves_the_other_dimensions(interleaved, D, position, seed):
    x = torch.randn(1, 2, 3, D, generator=torch.Generator().manual_seed(seed))
    positions = torch.tensor([position, 0.0, position + 1])
    turned = rotate(x, positions, FREQUENCIES, interleaved=interleaved)
    for h in range(2):
        for n, p in enumerate(positions.tolist()):
            torch.testing.assert_close(turned[0, h, n], reference(x[0, h, n], p, FREQUENCIES, interleaved))


@given(st.floats(-30, 30), st.floats(-30, 30))
def test_rotations_add_up(a, b):
    x = torch.randn(2, 1, 4, 6, generator=torch.Generator().manual_seed(1))
    one, other = torch.full((2, 1, 4), a), torch.full((1, 1, 4), b)
    twice = rotate(rotate(x, one, FREQUENCIES), other, FREQUENCIES)
    torch.testing.assert_close(twice, rotate(x, one + other, FREQUENCIES), atol=1e-4, rtol=1e-4)


def test_dtype_stays_and_angles_are_exact_at_far_positions_in_half_precision():
    x = torch.randn(1, 1, 1, 6, generator=torch.Generator().manual_seed(2))
    far = torch.tensor([4099.0])
    half = rotate(x.bfloat16(), far, FREQUENCIES)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), rotate(x, far, FREQUENCIES), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("name", ["llama", "qwen3", "neox", "mistral"])
def test_gives_what_the_models_own_code_computes(name):
    anatomy = Anatomy.of(FAMILIES[name].tiny())
    rope = Rope.of(anatomy)
    D = 8
    ids = torch.tensor([[3, 0, 17, 4]])
    cos, sin = anatomy.decoder.rotary_emb(torch.zeros(1, 4, D), position_ids=ids)
    d = cos.shape[-1]
    x = torch.randn(1, 2, 4, D, generator=torch.Generator().manual_seed(3))
    half = torch.cat([-x[..., d // 2 : d], x[..., : d // 2]], -1)
    expected = torch.cat([x[..., :d] * cos[:, None] + half * sin[:, None], x[..., d:]], -1)
    torch.testing.assert_close(rope.rotate(x, ids[:, None]), expected)


def test_models_without_one_rope_are_refused():
    with pytest.raises(UnsupportedModel, match="no single set of rotary frequencies"):
        Rope.of(Anatomy.of(FAMILIES["gpt2"].tiny()))
    model = FAMILIES["llama"].tiny()
    model.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(UnsupportedModel, match="changes its rotary frequencies with the length"):
        frequencies_of(Anatomy.of(model))
