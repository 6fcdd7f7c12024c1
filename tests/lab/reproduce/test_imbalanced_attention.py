import pytest
import torch

import seqwise.lab.reproduce.imbalanced_attention as module
from seqwise.core.config import known_classes
from seqwise.core.method import Method
from seqwise.lab.zoo import glyphs
from seqwise.methods.attend.imbalanced_attention import PAINT


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(module, "trained", lambda seed, progress: glyphs.build(seed))
    for name, value in {"STEPS": 2, "BATCH": 4, "IMAGES": 6}.items():
        monkeypatch.setattr(module, name, value)


def test_measures_every_testable_claim_once_per_image(small):
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert list(found) == [claim.key for claim in module.REPRODUCTION.testable]
    assert all(len(measured.ours) == len(measured.baseline) == 6 for measured in found.values())
    assert set(found["informed-tokens"].ours) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert min(found["informed-tokens"].baseline) >= 9 / 36
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"


def test_hints_are_right_where_asked_and_never_elsewhere():
    drawn = glyphs.batch(200, seed=3)
    right = torch.arange(200) < 80
    ids = module.hinted(drawn, right, torch.Generator().manual_seed(0)).input_ids
    assert ids.shape == (200, 39)
    assert ids[:, :37].equal(drawn.input_ids[:, :37]) and ids[:, -1].equal(drawn.input_ids[:, -1])
    assert (ids[:, 37] == drawn.answers).equal(right)
    wrong = (ids[80:, 37] - drawn.answers[80:]) % len(glyphs.COLOURS)
    assert set(wrong.tolist()) == {1, 2, 3, 4, 5}
    assert ids[:, 37].min() >= glyphs.COLOUR_ID and ids[:, 37].max() < glyphs.VOCABULARY


def test_noise_spans_its_range():
    drawn = glyphs.batch(300, seed=3)
    sd = (module.noisy(drawn, torch.Generator().manual_seed(0)).pixel_values - drawn.pixel_values).flatten(1).std(-1)
    total = (sd**2 + glyphs.NOISE**2).sqrt()
    assert total.min() < 0.2 and 0.9 < total.max() < 1.1 and 0.5 < total.mean() < 0.65


def test_training_leaves_the_vision_tower_alone(small):
    before, after = glyphs.build(0), module.train(0, lambda text: None)
    rows = list(zip(before.named_parameters(), after.parameters(), strict=True))
    assert all(a.equal(b) for (name, a), b in rows if "vision_tower" in name)
    assert not any(a.equal(b) for (name, a), b in rows if "o_proj" in name or "linear_1.weight" in name)


def test_given_sets_are_those_that_are_boosted():
    model = glyphs.build(0)
    drawn = module.hinted(glyphs.batch(8, seed=1), torch.zeros(8, dtype=torch.bool), torch.Generator().manual_seed(0))
    prompt = {"input_ids": drawn.input_ids, "pixel_values": drawn.pixel_values, "logits_to_keep": 1}
    with torch.no_grad():
        plain = model(**prompt).logits
    with torch.no_grad(), PAINT(alpha=3.0).on(model) as run:
        expected = model(**prompt).logits
        sets = run.state[PAINT(alpha=3.0)]
    given = module.Given(alpha=3.0)
    with torch.no_grad(), given.on(model) as run:
        run.state[given] = sets
        torch.testing.assert_close(model(**prompt).logits, expected)
        run.state[given] = torch.zeros_like(sets)
        torch.testing.assert_close(model(**prompt).logits, plain)
    assert (expected - plain).abs().max() > 1e-4
    assert "Given" not in known_classes(Method)


def test_answered_marks_each_right_answer():
    model, drawn = glyphs.build(0), glyphs.batch(8, seed=2)
    with torch.no_grad():
        told = model(input_ids=drawn.input_ids, pixel_values=drawn.pixel_values).logits[:, -1].argmax(-1)
    drawn = drawn._replace(answers=torch.where(torch.arange(8) < 2, told + 1, told))
    assert module.answered(model, drawn)[0] == [0.0] * 2 + [1.0] * 6
    assert module.answered(model, drawn, PAINT().identity())[0] == [0.0] * 2 + [1.0] * 6
