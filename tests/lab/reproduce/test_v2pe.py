import random

import pytest
import torch

import seqwise.lab.reproduce.v2pe as module
from seqwise.methods.order.v2pe import V2PE, positions


@pytest.mark.parametrize("images, questions, length", [(2, 2, 128), (5, 4, 128), (40, 4, None)])
def test_a_prompt_holds_each_asked_item_in_one_image(images, questions, length):
    for seed in range(10):
        ids, answers = module.prompt(images, questions, random.Random(seed), length)
        assert len(ids) == (length or images * 18 + questions)
        opens = [i for i, token in enumerate(ids) if token == module.OPEN_ID]
        assert len(opens) == images
        items = []
        for i in opens:
            inside = ids[i + 1 : i + 17]
            assert ids[i + 17] == module.CLOSE_ID and all(token < module.TEXT_ID for token in inside)
            (item,) = [token for token in inside if token < module.FILLER_ID]
            items.append(divmod(item, module.VALUES))
        for asked, answer in zip(ids[-questions:], answers, strict=True):
            assert [value for key, value in items if module.KEY_ID + key == asked] == [answer - module.VALUE_ID]


def test_many_images_fit_the_window_only_with_a_small_delta():
    ids, _ = module.prompts(3, module.MANY, module.QUESTIONS, "any")
    visual = ids < module.TEXT_ID
    assert positions(visual, 1 / 16).max() < module.WINDOW <= positions(visual, 1 / 8).max()
    assert ids.equal(module.prompts(3, module.MANY, module.QUESTIONS, "any")[0])
    assert not ids.equal(module.prompts(3, module.MANY, module.QUESTIONS, "other")[0])


def test_measures_every_testable_claim_once_per_prompt(monkeypatch):
    for name, value in {"STEPS": 2, "BATCH": 2, "PROMPTS": 3, "MANY": 9, "WINDOW": 128}.items():
        monkeypatch.setattr(module, name, value)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert all(len(measured.ours) == len(measured.baseline) == 3 for measured in found.values())
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"


def test_both_arms_begin_alike_and_differ_by_their_positions(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 1)
    monkeypatch.setattr(module, "BATCH", 2)
    first, again, other = (module.train(0, deltas) for deltas in ("random", "random", "ordinary"))
    rows = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(a.equal(b) for a, b, _ in rows) and not all(a.equal(c) for a, _, c in rows)


def test_accuracy_under_delta_1_is_the_plain_models(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 1)
    monkeypatch.setattr(module, "BATCH", 2)
    model = module.train(0, "ordinary")
    ids, _ = module.prompts(4, 3, 2, "any")
    with torch.no_grad():
        answers = model(ids, logits_to_keep=2).logits.argmax(-1)
    answers[0, 0] += 1
    assert module.accuracies(model, None, ids, answers) == [0.5, 1, 1, 1]
    assert module.accuracies(model, V2PE(delta=1.0), ids, answers) == [0.5, 1, 1, 1]
