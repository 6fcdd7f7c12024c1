import pytest
import torch

import seqwise.lab.reproduce.token_recycling as module
from seqwise.lab.zoo.grammar import WORDS, grammar_model


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(module, "train_grammar", lambda seed, steps: grammar_model(seed))
    monkeypatch.setattr(module, "PROMPTS", 2)
    monkeypatch.setattr(module, "LENGTH", 9)
    monkeypatch.setattr(module, "NEW", 8)


def test_measures_every_testable_claim_once_per_prompt(small):
    said = []
    found = module.REPRODUCTION.measure(0, said.append)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert all(len(measured.ours) == len(measured.baseline) == 2 for measured in found.values())
    assert found["same-text"].ours == (1.0, 1.0)
    assert found["forwards"].baseline == (1.0, 1.0), "plain decoding: one forward per token, the prompt's included"
    assert found["hot"].ours[0] == found["hot"].baseline[0], "the first prompt finds an empty table either way"
    assert said[0] == "training the grammar model"
    assert module.REPRODUCTION.measure(0, said.append) == found, "the seed decides everything"


def test_surprise_and_entropy_of_a_known_distribution():
    class Fixed(torch.nn.Module):
        def forward(self, ids, use_cache):
            logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(1, ids.shape[1], 3)
            return type("Output", (), {"logits": logits})

    surprise, entropy = module.surprise_and_entropy(Fixed(), torch.tensor([2, 0, 1]), 1)
    assert surprise == pytest.approx((1 + 2) / 2 * 0.693147, abs=1e-5)
    assert entropy == pytest.approx(1.5 * 0.693147, abs=1e-5)


def test_forwards_are_counted_while_watched_only():
    model, ids = grammar_model(0), torch.tensor([[1, 2, len(WORDS) - 1]])
    with module.forwards(model) as count:
        model(ids)
        model(ids)
    model(ids)
    assert count == [2]
