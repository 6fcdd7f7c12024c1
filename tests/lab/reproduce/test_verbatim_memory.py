import math

import pytest
import torch

import seqwise.lab.reproduce.verbatim_memory as module
from seqwise.insight.probe.base import surprisals


def test_texts_have_two_lists_and_what_stands_between():
    generator = torch.Generator().manual_seed(0)
    first, other = module.drawn(50, generator)
    assert all(len(set(row.tolist())) == 10 for row in torch.cat([first, other], 1))
    assert int(torch.cat([first, other]).max()) == module.NOUNS - 1
    ids = module.texts(first, other, 3, generator)
    assert ids.shape == (50, 2 * module.N + 3 + 4)
    assert torch.equal(ids[:, 1:6], first) and torch.equal(ids[:, 11:16], other)
    assert [int(ids[0, i]) for i in (0, 6, 10, 16)] == [module.BOS, module.SEP, module.CUE, module.SEP]
    assert set(ids[:, 7:10].unique().tolist()) == set(range(module.NOUNS, module.NOUNS + module.FILLERS))


@pytest.mark.parametrize("kind", ["2 layers", "LSTM"])
def test_repeat_surprisal_of_a_text_leaves_the_first_words_out(kind):
    model = module.untrained(kind, 0).eval()
    generator = torch.Generator().manual_seed(0)
    ids = module.texts(*module.drawn(3, generator), 2, generator)
    found = module.repeat(model, ids)
    for row, value in zip(ids, found, strict=True):
        (s,) = surprisals(model, [row.tolist()])
        assert value == pytest.approx(100 * float(s[11:15].mean() / s[2:6].mean()), rel=1e-5)


def test_models_learn_from_the_same_texts(monkeypatch):
    seen = []
    texts = module.texts
    monkeypatch.setattr(module, "texts", lambda *args: seen.append(texts(*args)) or seen[-1])
    monkeypatch.setattr(module, "STEPS", 3)
    one, two = module.trained("1 layer", 5), module.trained("LSTM", 5)
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))
    assert not one.training and not two.training
    repeated = torch.cat([(ids[:, 1:6] == ids[:, -6:-1]).all(-1) for ids in seen[:3]]).float().mean()
    assert 0.6 < float(repeated) < 0.8


def test_measures_every_testable_claim(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(module, "TEXTS", 4)
    said = []
    found = module.REPRODUCTION.measure(0, said.append)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert {len(one.ours) for key, one in found.items() if key != "delay"} == {8} and len(found["delay"].ours) == 4
    assert all(math.isfinite(value) for one in found.values() for value in [*one.ours, *one.baseline])
    assert found["words"].ours == found["attention"].baseline == found["recurrent"].baseline
    assert found["attention"].ours != found["attention"].baseline and len(said) == 7
    assert found["delay"].ours != found["delay"].baseline
    assert module.REPRODUCTION.measure(0, said.append) == found, "the seed decides everything"
