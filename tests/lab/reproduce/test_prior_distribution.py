import math

import pytest
import torch

import seqwise.lab.reproduce.prior_distribution as module


def test_counted_prompts_hold_so_many_marks():
    numbers = torch.tensor([0, 1, 5, 16])
    ids = module.counted(numbers, torch.Generator().manual_seed(0))
    assert ids.shape == (4, module.LENGTH + 2)
    assert (ids[:, 1:-1] == module.MARK).sum(-1).tolist() == numbers.tolist()
    assert set(ids[:, 0].tolist()) == {module.COUNT} and set(ids[:, -1].tolist()) == {module.ASK}
    others = ids[:, 1:-1][ids[:, 1:-1] != module.MARK]
    assert set(others.tolist()) == set(range(module.FILLER_ID, module.FILLER_ID + module.FILLERS))


def test_copied_prompts_hold_one_letter():
    letters = torch.tensor([0, 7, 15])
    ids = module.copied(letters, torch.Generator().manual_seed(0))
    assert [int(row[row >= module.LETTER_ID]) - module.LETTER_ID for row in ids] == letters.tolist()
    assert set(ids[:, 0].tolist()) == {module.COPY}


def test_frequent_numbers_are_not_small_ones():
    weights = module.frequencies(3)
    assert float(weights.sum()) == pytest.approx(1) and not torch.equal(weights, weights.sort(descending=True).values)
    ordered = weights.sort(descending=True).values
    assert float(ordered[0] / ordered[3]) == pytest.approx(4**module.ZIPF)
    assert not torch.equal(weights, module.frequencies(4))


def test_measures_every_testable_claim(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 3)
    monkeypatch.setattr(module, "EACH", 4)
    monkeypatch.setattr(module, "FOLDS", 2)
    monkeypatch.setattr(module, "TUNING", 64)
    said = []
    found = module.REPRODUCTION.measure(0, said.append)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert len(found["slope"].ours) == len(found["prior-dominated"].ours) == len(found["uncorrelated"].ours) == 2
    assert len(found["layer"].ours) == 8 * 4 and len(found["not-merely-rare"].ours) == 8 * 4
    assert 0 < len(found["held-out"].ours) < 8 * 4 and len(found["inside"].ours) > 30
    assert all(math.isfinite(value) for one in found.values() for value in [*one.ours, *one.baseline])
    assert len(said) == 2 + module.LAYERS and said[2] != said[3].replace("layer 2", "layer 1")
    assert module.REPRODUCTION.measure(0, said.append) == found, "the seed decides everything"
