import pytest
import torch

import seqwise.lab.reproduce.contextual_memory_reweaving as module
from seqwise.learn.nn.contextual_memory_reweaving import Reweaving


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("window, segments, test", [(16, 3, False), (64, 9, False), (64, 9, True), (32, 2, False)])
def test_every_query_asks_for_one_item_that_has_been_shown(window, segments, test):
    ids, answers = module.documents(20, generator(), window, segments, test=test)
    assert ids.shape == (20, segments, window) and answers.shape == (20, segments, module.QUERIES)
    distances = set()
    for document, wanted in zip(ids.tolist(), answers.tolist(), strict=True):
        shown = {}
        for number, segment in enumerate(document):
            items = [divmod(token, module.VALUES) for token in segment if token < module.FILLER_ID]
            assert len(items) == (module.ITEMS if number < 8 else 0)
            shown |= {key: (number, value) for key, value in items}
            for token, answer in zip(segment[-module.QUERIES :], wanted[number], strict=True):
                where, value = shown[token - module.KEY_ID]
                assert answer == module.VALUE_ID + value
                if not test:
                    distances.add(number - where)
                elif number == segments - 1:
                    assert 2 <= number - where <= 8
                else:
                    assert number == where, "in a test, nothing repeats an item before it is asked for"
        assert len(shown) == module.ITEMS * min(segments, 8)
    assert test or distances == set(range(segments))


def test_random_capture_is_a_uniform_sample_that_hardly_weighs(monkeypatch):
    for name, value in {"BASE_STEPS": 1, "BASE_BATCH": 2}.items():
        monkeypatch.setattr(module, name, value)
    model = module.base_model(0)
    memory = module.RandomCapture.of(model, segment=64)
    memory.draws = generator()
    ids, answers = module.documents(60, generator(), test=True)
    module.accuracies(model, memory, ids, answers)
    kept = torch.stack([(memory.bank.position // 64 == segment).sum((1, 2)) for segment in range(9)], -1).double()
    assert kept.sum(-1).eq(3 * 64).all()
    assert (kept.mean(0) - 3 * 64 / 9).abs().max() < 3
    assert memory.bank.r.min() >= 0.5 and memory.bank.r.max() <= 0.55


def test_the_base_model_is_frozen_and_the_memory_learns(monkeypatch):
    small = {"BASE_STEPS": 2, "BASE_BATCH": 2, "STEPS": 2, "SHORT_STEPS": 1, "SHORT": (16, 2, 2), "LONG": ((16, 3, 2),)}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    model = module.base_model(0)
    again = module.base_model(0)
    weights = [x.clone() for x in model.parameters()]
    assert all(a.equal(b) for a, b in zip(weights, again.parameters(), strict=True)), "the seed decides everything"
    memory = Reweaving.of(model, segment=64)
    module.train(model, memory, 0)
    assert not any(x.requires_grad for x in model.parameters())
    assert all(a.equal(b) for a, b in zip(weights, model.parameters(), strict=True))
    assert memory.Wo.abs().max() > 0 and memory.bank is None
    assert "generate" not in vars(model), "nothing stays attached"


def test_measures_every_testable_claim_once_per_document(monkeypatch):
    small = {"BASE_STEPS": 1, "BASE_BATCH": 2, "STEPS": 2, "SHORT_STEPS": 1, "DOCUMENTS": 3}
    for name, value in {**small, "SHORT": (16, 2, 2), "LONG": ((16, 2, 2),)}.items():
        monkeypatch.setattr(module, name, value)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert all(len(measured.ours) == len(measured.baseline) == 3 for measured in found.values())
    assert module.REPRODUCTION.measure(0, lambda text: None) == found
