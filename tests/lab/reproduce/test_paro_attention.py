import pytest
import torch

import seqwise.lab.reproduce.paro_attention as module
from seqwise.methods.attend.paro_attention import ORDERS, PermutationPlan


@pytest.fixture(autouse=True)
def small(monkeypatch):
    sizes = {
        "MAP_GRID": (4, 4, 4),
        "MAP_BLOCK": 8,
        "GRID": (4, 4, 4),
        "BLOCK": 8,
        "STEPS": 2,
        "CALIBRATION": 1,
        "TEST": 2,
    }
    for name, value in sizes.items():
        monkeypatch.setattr(module, name, value)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_measures_every_testable_claim_from_the_seed_alone():
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    for key, measured in found.items():
        items = 6 if key.startswith("maps") else 12 if key in ("heads-differ", "trained-mass") else 2
        assert len(measured.ours) == len(measured.baseline) == items, key
    assert module.REPRODUCTION.measure(0, lambda text: None) == found
    assert module.REPRODUCTION.measure(1, lambda text: None) != found


@pytest.mark.parametrize("wide", module.WIDE)
def test_a_map_attends_along_its_wide_axes(wide, monkeypatch):
    monkeypatch.setattr(module, "NOISE", 0.0)
    monkeypatch.setattr(module, "NARROW", 0.2)
    (A,) = module.maps(wide, 1, generator())
    torch.testing.assert_close(A.sum(-1), torch.ones(64))
    cells = torch.cartesian_prod(*(torch.arange(4),) * 3)
    narrow = ["FHW".index(axis) for axis in "FHW" if axis not in wide]
    same = (cells[:, None, narrow] == cells[:, narrow]).all(-1)
    torch.testing.assert_close(A, same / same.sum(-1, keepdim=True), atol=1e-6, rtol=0)


def test_noise_differs_between_maps_of_a_head():
    A, B = module.maps("F", 2, generator())
    assert not torch.allclose(A, B, atol=1e-3) and module.maps("F", 2, generator())[0].equal(A)


def test_an_arm_in_a_fitting_order_is_better_and_a_full_mask_is_exact(monkeypatch):
    seen, new = module.maps("F", 2, generator()), module.maps("F", 1, generator(1))
    v = torch.randn(64, 3, generator=generator(2))
    usual, ours = module.arm(0, seen, new, v), module.arm(ORDERS.index("WHF"), seen, new, v)
    assert ours.mass > usual.mass and ours.output < usual.output
    assert 0 < ours.rounding < 0.1
    monkeypatch.setattr(module, "DENSITY", 1.0)
    exact = module.arm(ORDERS.index("WHF"), seen, new, v)
    assert exact.mass == pytest.approx(1) and exact.output < 1e-6


def test_videos_are_moving_discs_in_the_usual_order_of_tokens():
    tokens = module.videos(3, generator())
    assert tokens.shape == (3, 64, 4) and tokens.min() >= -1 and tokens.max() <= 1 and tokens.max() > 0
    pixels = tokens.view(3, 4, 4, 4, 2, 2).transpose(3, 4).reshape(3, 4, 8, 8)
    smooth = (pixels[..., 1:] - pixels[..., :-1]).abs().mean(), (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().mean()
    shuffled = pixels.flatten()[torch.randperm(pixels.numel(), generator=generator())].view(pixels.shape)
    assert max(smooth) < 0.5 * (shuffled[..., 1:] - shuffled[..., :-1]).abs().mean()
    assert not pixels[:, 0].equal(pixels[:, 1])


def test_a_full_plan_predicts_as_full_attention():
    model, clean = module.train(0), module.videos(2, generator())
    exact, wanted = module.predictions(model, module.full, clean, 5)
    assert exact.shape == wanted.shape == (4, 2, 64, 4)
    orders = torch.randint(6, (module.LAYERS, module.HEADS), generator=generator())
    masks = torch.ones(1, module.LAYERS, module.HEADS, 8, 8, dtype=torch.bool)
    plan = PermutationPlan(module.GRID, 0, orders, masks, 8)
    found, again = module.predictions(model, module.under(plan), clean, 5)
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-4)
    assert again.equal(wanted) and model.attend is module.full
    assert module.mass(model, plan, clean, 5) == pytest.approx([1.0] * module.LAYERS * module.HEADS)


def test_the_baseline_has_the_usual_order_and_the_same_density():
    model = module.train(0)
    plan, fhw = module.plans(model, module.videos(1, generator()), 0)
    assert not fhw.orders.any() and plan.orders.any()
    assert plan.density == fhw.density == pytest.approx(0.25)


def test_noise_levels_mix_video_and_noise():
    clean = torch.ones(2, 64, 4)
    x, velocity = module.noisy(clean, torch.tensor([0.0, 1.0]), generator())
    assert x[0].equal(clean[0])
    torch.testing.assert_close(x[1] - velocity[1], clean[1])
