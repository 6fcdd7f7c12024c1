import math

import torch

import seqwise.lab.reproduce.hip_attention as module
from seqwise.lab.reproduce._recall import stepwise
from seqwise.lab.zoo.grammar import grammar_model, stories
from seqwise.lab.zoo.recall import recall_batch, recall_model
from seqwise.methods.baselines import Full
from seqwise.methods.cache.hip_attention import HiPAttention


def test_walks_have_unit_variance_and_the_correlation_asked_for():
    for rho in (0.0, 0.97):
        _, k = module.walk(rho, torch.Generator().manual_seed(0))
        assert abs(float(k.var()) - 1) < 0.1
        assert abs(float((k[:, :, 1:] * k[:, :, :-1]).mean()) - rho) < 0.1


def test_masses_are_shares_and_no_set_beats_the_best():
    q, k = module.walk(0.9, torch.Generator().manual_seed(1))
    ours, chance, best = module.masses(q, k, torch.Generator().manual_seed(2))
    assert len(ours) == len(chance) == len(best) == module.SAMPLES
    assert all(0 < a < c <= 1 and 0 < b < c for a, b, c in zip(ours, chance, best, strict=True))


def test_nats_are_the_models_loss():
    model, ids = grammar_model(0), stories(3, 40, "test")
    each = module.nats(model, ids, Full())
    with torch.no_grad():
        log_p = model(ids).logits.log_softmax(-1)
    expected = [-sum(float(log_p[b, i, ids[b, i + 1]]) for i in range(39)) / 39 for b in range(3)]
    torch.testing.assert_close(torch.tensor(each), torch.tensor(expected))
    assert module.nats(model, ids, HiPAttention(budget=4, window=3, **module.STORY)) != each


def test_random_blocks_are_as_many_and_others():
    batch = recall_batch(3, 64, generator=torch.Generator().manual_seed(0))
    steps = {"budget": 6, "window": 3, "sinks": 1, "dense": 0, "refresh": 1, "block_q": 8}
    logits = [
        stepwise(recall_model(0), batch.input_ids, 56, kind(**steps))[1]
        for kind in (HiPAttention, module._Anywhere, module._Anywhere)
    ]
    assert torch.equal(logits[1], logits[2]) and not torch.allclose(logits[0], logits[1], atol=1e-3)


def test_growth_of_full_attention_is_nearly_quadratic():
    ours, plain = module.growth(
        grammar_model(0), stories(1, 128, "test"), HiPAttention(budget=8, window=8, **module.STORY)
    )
    assert math.isclose(plain, 128 * 129 / (32 * 33)) and 4 < ours < plain


def test_measures_every_testable_claim(monkeypatch):
    monkeypatch.setattr(module, "train_grammar", lambda seed, length: grammar_model(seed))
    monkeypatch.setattr(module, "train_recall", lambda seed, lengths: recall_model(seed))
    for name, value in {"SAMPLES": 4, "TEXTS": 3, "WORDS": 96, "SEQUENCES": 3}.items():
        monkeypatch.setattr(module, name, value)
    said = []
    found = module.REPRODUCTION.measure(0, said.append)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert max(found["exact"].ours) < module.EXACT
    assert found["sub-quadratic"].ours[0] > 4
    assert len(found["degradation"].ours) == len(found["needles"].ours) == 3
    assert sum("nats per word" in text for text in said) == 1
    assert module.REPRODUCTION.measure(0, said.append) == found, "the seed decides everything"
