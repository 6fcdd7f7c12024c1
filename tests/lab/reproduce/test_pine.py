import torch

import seqwise.lab.reproduce._documents as task
import seqwise.lab.reproduce.pine as module
from seqwise.methods.order.pine import PINE


def test_answers_are_sorted_by_the_place_of_the_gold_document():
    model = task.model(0).eval()
    prompts = task.draw(4, torch.Generator().manual_seed(0))
    found, right = module.answers(model, prompts, None)
    assert found.shape == right.shape == (8, 4)
    for i, order in enumerate(task.rotations(8)):
        moved = prompts.permuted(order)
        with torch.no_grad():
            answer = model(moved.ids).logits[:, -1].argmax(-1)
        assert found[i].equal(answer)
        for b in range(4):
            assert right[moved.gold[b], b] == float(answer[b] == prompts.answers[b])


def test_under_pine_the_place_does_not_matter():
    model = task.model(0).eval()
    prompts = task.draw(6, torch.Generator().manual_seed(0))
    found, right = module.answers(model, prompts, PINE())
    assert (found == found[0]).all() and (right == right[0]).all()
    assert not (module.answers(model, prompts, None)[0] == found).all()


def test_measures_every_testable_claim(monkeypatch):
    monkeypatch.setattr(task, "BATCH", 4)
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(module, "PROMPTS", 5)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert {key: len(measured.ours) for key, measured in found.items()} == {
        "flat": 1, "same-answer": 5, "worst-place": 5, "average-place": 5,
    }  # fmt: skip
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"
