import pytest
import torch

import seqwise.lab.reproduce.catp as module
from seqwise.lab.zoo import scenes
from seqwise.methods.reduce.catp import CATP


@pytest.fixture(scope="module")
def model():
    return scenes.build(0)


def test_measures_every_testable_claim_once_per_prompt(monkeypatch, model):
    monkeypatch.setattr(module, "load", lambda: (model, None))
    monkeypatch.setattr(module, "PROMPTS", 3)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert all(len(measured.ours) == len(measured.baseline) == 3 for measured in found.values())
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"


def test_answered_marks_each_right_answer_in_batches(monkeypatch, model):
    asked = scenes.multi(5, 3, images=(2, 3))
    drawn = scenes.batch(asked)
    with torch.no_grad():
        told = model(**drawn.inputs()).logits[:, -1].argmax(-1)
    wrong = torch.where(torch.arange(5) < 2, told + 1, told)
    monkeypatch.setattr(module, "batch", lambda some: drawn._replace(answers=wrong))
    assert module.answered(model, asked) == [0.0] * 2 + [1.0] * 3
    monkeypatch.undo()
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    right = (told == drawn.answers).double().tolist()
    assert module.answered(model, asked) == right
    assert len(module.answered(model, asked, CATP(budget=0.2, layer=2))) == 5
