import pytest

import seqwise.lab.reproduce.vtc_cls as module
from seqwise.lab.reproduce._glyphs import answered
from seqwise.lab.zoo import glyphs
from seqwise.methods.reduce.vtc_cls import VTCCLS


@pytest.fixture(scope="module")
def model():
    return glyphs.build(0)


def test_measures_every_testable_claim_once_per_image(monkeypatch, model):
    monkeypatch.setattr(module, "trained", lambda seed, progress: model)
    monkeypatch.setattr(module, "IMAGES", 6)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert list(found) == [claim.key for claim in module.REPRODUCTION.testable]
    assert all(len(measured.ours) == len(measured.baseline) == 6 for measured in found.values())
    assert set(found["objects-11"].ours) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"


def test_kept_objects_counts_object_patches_of_each_image(model):
    drawn = glyphs.batch(8, seed=1)
    _, run = answered(model, drawn, VTCCLS(budget=12, start=module.START))
    shares = module.kept_objects(run, drawn)
    for b, stages in enumerate(run.kept()):
        kept = [position for position in stages["input"] if drawn.input_ids[b, position] == glyphs.IMAGE_ID]
        assert len(kept) == 12
        assert shares[b] == sum(1 + patch in kept for patch in drawn.objects[b].tolist()) / 4


def test_the_arms_add_up_two_layers_and_one(model):
    layers = [model.config.vision_config.num_hidden_layers - 2 - start for start in (module.START, module.LAST)]
    assert layers == [1, 0]  # layers before the feature layer
