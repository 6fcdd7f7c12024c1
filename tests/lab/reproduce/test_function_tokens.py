import math

import pytest
import torch

import seqwise.lab.reproduce.function_tokens as module
from seqwise.insight.probe.function_tokens import CONTENT, FUNCTION, GroupedLoss


def test_documents_are_words_behind_a_break():
    every, vocabulary = module.documents()
    assert len(every) > 500 and 2_000 < vocabulary < 5_000
    assert all(int(one[0]) == 0 and not (one[1:] == 0).any() for one in every)
    assert int(torch.cat(every).max()) == vocabulary - 1


def test_only_paragraphs_with_both_transitions_are_compared():
    whole = GroupedLoss(torch.tensor([[1.0, 6.0], [1.0, 4.0]]), torch.tensor([[1, 2], [1, 4]]))
    partial = GroupedLoss(torch.tensor([[1.0, 0.0], [1.0, 4.0]]), torch.tensor([[1, 0], [1, 4]]))
    found = module.hardest([whole, partial])
    assert (found.ours, found.baseline) == ((3.0,), (1.0,))


def test_half_falls_are_timed_per_fold(monkeypatch):
    monkeypatch.setattr(module, "CHECKPOINTS", (0, 10, 20))
    monkeypatch.setattr(module, "FOLDS", 2)

    def at(function, content):
        return GroupedLoss(torch.tensor([[function, content], [function, content]]), torch.ones(2, 2))

    groups = [[at(8.0, 8.0), at(8.0, 8.0)], [at(4.0, 8.0), at(2.0, 6.0)], [at(0.0, 0.0), at(0.0, 2.0)]]
    assert module.half_falls(groups, FUNCTION) == pytest.approx([10.0, 10 * 4 / 6])
    assert module.half_falls(groups, CONTENT) == pytest.approx([15.0, 10 + 10 / 4])


def test_measures_every_testable_claim(monkeypatch):
    for name, value in {
        "CHECKPOINTS": (0, 4, 8), "EARLY": 4, "DOCUMENTS": 12, "FOLDS": 3, "FEATURES": 64, "ACTIVE": 4, "SAE_STEPS": 3,
        "DRAWS": 4, "WIDTH": 16, "LENGTH": 24, "BATCH": 4,
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)
    every, vocabulary = module.documents()
    monkeypatch.setattr(module, "documents", lambda: (every[:60], vocabulary))
    said = []
    found = module.REPRODUCTION.measure(1, said.append)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert len(found["hardest"].ours) == len(found["hardest-early"].ours) > 5
    assert len(found["function-first"].ours) == 3 and len(found["cover"].baseline) == len(found["occurrence"].ours) == 4
    assert len(found["growth"].ours) == module.REPEATS
    assert all(0 < value <= 1 for key in ("cover", "occurrence", "growth") for value in found[key].baseline)
    assert found["hardest"] != found["hardest-early"] and "4 steps: 4 features per token" in said
    assert all(math.isfinite(value) for one in found.values() for value in one.ours)
    assert module.REPRODUCTION.measure(1, said.append) == found, "the seed decides everything"
