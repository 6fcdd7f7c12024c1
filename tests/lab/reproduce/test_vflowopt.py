import pytest
import torch

import seqwise.lab.reproduce.vflowopt as module
from seqwise.lab.reproduce._glyphs import answered
from seqwise.lab.search import Objective
from seqwise.lab.zoo import glyphs

pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def model():
    return glyphs.build(0)


def test_measures_every_testable_claim(monkeypatch, model):
    monkeypatch.setattr(module, "trained", lambda seed, progress: model)
    for name, value in (("IMAGES", 6), ("PROMPTS", 4), ("EVALUATIONS", 4), ("SEARCHES", 2), ("TOWER_STEPS", 2)):
        monkeypatch.setattr(module, name, value)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert list(found) == [claim.key for claim in module.REPRODUCTION.testable]
    sizes = {"search": 12, "accuracy": 12, "quality": 12, "alpha": 2, "recycling": 6, "map": 6}
    assert {key: len(measured.ours) for key, measured in found.items()} == sizes
    assert set(found["map"].ours) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert found["quality"].baseline[:6] == found["quality"].baseline[6:]
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"


def test_with_and_without_recycling_as_many_tokens_enter(model):
    drawn = glyphs.batch(8, seed=1)
    dropped = module.replace(module.AT_10, budget=(module.LEFT_AT_10 / 36, *module.AT_10.budget[1:]), m=None)
    counts = []
    for method in (module.AT_10, dropped):
        _, run = answered(model, drawn, method)
        counts.append(
            [[sum(0 < p <= 36 for p in stages[name]) for name in ("input", "layer 3")] for stages in run.kept()]
        )
    assert counts[0] == counts[1] == [[6, 4]] * 8


def test_the_uniform_schedule_keeps_a_quarter_in_every_layer(model):
    objective = Objective(model, module.prompts(glyphs.batch(4, seed=2)))
    planned = module.AT_25.planned({}, objective.anatomy, 0.25)
    assert objective(planned).shares == [0.25] * 4


def test_objects_found_counts_object_patches_among_the_top_nine(monkeypatch):
    drawn = glyphs.batch(5, seed=3)
    A = torch.zeros(5, 1, 36, 36)
    A[torch.arange(5)[:, None], 0, :, drawn.objects[:, :3]] = 1.0  # all look at three of the four objects
    fillers = [[p for p in range(36) if p not in own][:6] for own in drawn.objects.tolist()]
    for b, six in enumerate(fillers):
        A[b, 0, :, six] = 0.5

    class Tower:
        def __call__(self, pixels, output_attentions):
            return type("Out", (), {"attentions": [A * 0, A]})

    assert module.objects_found(Tower(), drawn, 0.0) == [0.75] * 5
