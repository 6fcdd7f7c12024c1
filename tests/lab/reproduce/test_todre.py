import pytest
import torch

import seqwise.lab.reproduce.todre as module
from seqwise.core.config import known_classes
from seqwise.core.method import Method
from seqwise.lab.reproduce._glyphs import answered
from seqwise.lab.zoo import glyphs


@pytest.fixture(scope="module")
def model():
    return glyphs.build(0)


def test_measures_every_testable_claim_once_per_image(monkeypatch, model):
    monkeypatch.setattr(module, "trained", lambda seed, progress: model)
    monkeypatch.setattr(module, "IMAGES", 6)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert all(len(measured.ours) == len(measured.baseline) == 6 for measured in found.values())
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"


def test_shares_are_those_of_the_question_row(model):
    drawn = glyphs.batch(5, seed=1)
    shares = module.text_to_image(model, drawn)
    eager = glyphs.build(0)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        maps = eager(input_ids=drawn.input_ids, pixel_values=drawn.pixel_values, output_attentions=True).attentions
    assert sorted(shares) == [0, module.HALF, module.LATE]
    for layer, got in shares.items():
        wanted = maps[layer].mean(1)[:, -1, 1:37].sum(-1)  # BOS is the system prompt
        torch.testing.assert_close(torch.tensor(got), wanted)


def test_forcing_leaves_no_visual_row_in_the_last_layers(model):
    drawn = glyphs.batch(3, seed=1)
    for layer in (module.HALF, module.LATE):
        _, run = answered(model, drawn, module.ToDRE(budget=1.0, tau=module.FORCED, check_layer=layer))
        assert [stages[f"layer {layer + 1}"] for stages in run.kept()] == [[0, 37]] * 3


def test_random_pivots_differ_by_image_and_seed(model):
    drawn = glyphs.batch(8, seed=1)
    kept = []
    for seed in (0, 0, 1):
        _, run = answered(model, drawn, module.RandomPivot(budget=1, tau=0.0, seed=seed))
        kept.append([stages["input"][1] for stages in run.kept()])
    assert kept[0] == kept[1] != kept[2] and len(set(kept[0])) > 1
    assert "RandomPivot" not in known_classes(Method)
