import pytest
import torch

import seqwise.lab.reproduce.fopru as module
from seqwise.core.config import known_classes
from seqwise.core.method import Method
from seqwise.lab.reproduce._glyphs import RandomPatches, answered
from seqwise.lab.zoo import glyphs
from seqwise.methods.reduce.fopru import FoPru


@pytest.fixture(scope="module")
def model():
    return glyphs.build(0)


def test_measures_every_testable_claim_once_per_image(monkeypatch, model):
    monkeypatch.setattr(module, "trained", lambda seed, progress: model)
    monkeypatch.setattr(module, "IMAGES", 6)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert list(found) == [claim.key for claim in module.REPRODUCTION.testable]
    assert all(len(measured.ours) == len(measured.baseline) == 6 for measured in found.values())
    assert set(found["objects-kept"].ours) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"


def test_kept_objects_counts_object_patches_of_each_image(model):
    drawn = glyphs.batch(8, seed=1)
    _, run = answered(model, drawn, FoPru(budget=1 / 3))
    shares = module.kept_objects(run, drawn)
    for b, stages in enumerate(run.kept()):
        kept = [position for position in stages["input"] if drawn.input_ids[b, position] == glyphs.IMAGE_ID]
        assert len(kept) == 12
        assert shares[b] == sum(1 + patch in kept for patch in drawn.objects[b].tolist()) / 4


def test_chance_keeps_as_many_patches_and_differs_by_image_and_seed(model):
    drawn = glyphs.batch(8, seed=1)
    kept = []
    for seed in (0, 0, 1):
        _, run = answered(model, drawn, RandomPatches(count=9, seed=seed))
        kept.append([stages["input"][1:-1] for stages in run.kept()])
        assert all(len(row) == 9 and row == sorted(row) for row in kept[-1])
    assert kept[0] == kept[1] != kept[2] and kept[0][0] != kept[0][1]
    assert "RandomPatches" not in known_classes(Method)


def test_answered_marks_each_right_answer(model):
    drawn = glyphs.batch(8, seed=2)
    with torch.no_grad():
        told = model(input_ids=drawn.input_ids, pixel_values=drawn.pixel_values).logits[:, -1].argmax(-1)
    wrong = torch.where(torch.arange(8) < 2, told + 1, told)
    assert answered(model, drawn._replace(answers=wrong))[0] == [0.0] * 2 + [1.0] * 6
