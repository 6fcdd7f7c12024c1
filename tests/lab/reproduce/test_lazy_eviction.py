import pytest
import torch

import seqwise.lab.reproduce.lazy_eviction as module
from seqwise.lab.zoo.recall import FILLER_ID, KEY_ID, VALUE_ID, VALUES, recall_model


def test_streams_ask_for_every_fact_in_turn():
    ids, columns, answers = module.stream_batch(4, torch.Generator().manual_seed(0))
    assert ids.shape == (4, 128) and columns.tolist() == list(range(34, 128, 3))
    for sequence, values in zip(ids.tolist(), answers.tolist(), strict=True):
        facts = {fact // VALUES: fact % VALUES for fact in sequence[:32] if fact < FILLER_ID}
        assert len(facts) == 8 and not any(token < FILLER_ID for token in sequence[32:])
        asked = [sequence[column] - KEY_ID for column in columns]
        assert [facts[key] for key in asked] == [value - VALUE_ID for value in values]
        assert set(asked[:8]) == set(facts) and asked[8:] == asked[:-8]  # each returns after 24 tokens
        others = [sequence[i] for i in range(32, 128) if i not in columns.tolist()]
        assert all(FILLER_ID <= token < KEY_ID for token in others)


@pytest.mark.parametrize("policy", ["code", "first_term", "h2o", "a2sf"])
def test_without_noise_to_speak_of_short_periods_live(policy, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 150)
    monkeypatch.setattr(module, "TRIALS", 3)
    assert module.simulate(policy, (1, 0.0), 2, 0) == module.simulate(policy, (1, 0.0), 2, 0) == [1.0] * 3
    never = module.simulate(policy, (60, 0.5), 1000, 0)  # tokens that are never active do not outlive active ones
    assert never == [0.0] * 3


def test_gaps_are_those_of_the_attention():
    """A model that attends alike to all: every context slot is active at each step until the share is below alpha."""
    model = recall_model(0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    ids, _, _ = module.stream_batch(2, torch.Generator().manual_seed(0))
    intervals, share = module.gaps(model, ids)
    assert share == 1.0 and intervals.unique().tolist() == [1.0]
    assert model.config._attn_implementation == "sdpa"


def test_training_lowers_the_loss():
    losses = []
    module.train_stream(0, 8, lambda step, loss: losses.append(loss))
    assert len(losses) == 8 and sum(losses[-3:]) < sum(losses[:3])


def test_measures_every_testable_claim(monkeypatch):
    monkeypatch.setattr(module, "train_stream", lambda seed, steps, progress: recall_model(seed))
    for name, value in (("SEQUENCES", 3), ("TRIALS", 2), ("STEPS", 60)):
        monkeypatch.setattr(module, name, value)
    said = []
    found = module.REPRODUCTION.measure(0, said.append)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    for key, measured in found.items():
        assert len(measured.ours) == len(measured.baseline) == (2 if key.startswith(("lasting", "burst")) else 3)
    assert any("quantiles" in text for text in said)
