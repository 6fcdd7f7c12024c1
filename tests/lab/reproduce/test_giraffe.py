import copy

import pytest
import torch

import seqwise.lab.reproduce.giraffe as module
from seqwise.lab.zoo.recall import FILLER_ID, FILLERS, KEY_ID, KEYS, VALUE_ID, VALUES, recall_model
from seqwise.methods.order.giraffe import Giraffe


def small(monkeypatch, **more):
    sizes = {"STEPS": 1, "MORE_STEPS": 1, "BATCH": 2, "SEQUENCES": 8, "LENGTHS": (20,), "TRAINED": 20, "LONG": 24}
    for name, value in {**sizes, "LONGEST": 28, **more}.items():
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("length", [17, 64])
def test_sequences_hold_items_text_by_the_rule_and_queries(length):
    batch = module.draw(50, length, torch.Generator().manual_seed(0))
    assert batch.ids.shape == batch.text.shape == (50, length)
    for ids, targets, text in zip(batch.ids.tolist(), batch.targets.tolist(), batch.text.tolist(), strict=True):
        items = dict(divmod(token, VALUES) for token in ids[:-8] if token < FILLER_ID)
        asked = [token - KEY_ID for token in ids[-8:]]
        assert all(0 <= key < KEYS for key in asked) and len(set(asked)) == 8 == len(items)
        assert targets == [VALUE_ID + items[key] for key in asked]
        fillers = [FILLER_ID <= token < KEY_ID for token in ids]
        assert text == [j >= 2 and fillers[j] and fillers[j - 2] for j in range(length)]


def test_most_fillers_follow_from_the_one_two_before():
    batch = module.draw(200, 64, torch.Generator().manual_seed(1))
    j = batch.text.nonzero()
    now, before = batch.ids[j[:, 0], j[:, 1]], batch.ids[j[:, 0], j[:, 1] - 2]
    regular = (now == FILLER_ID + (5 * (before - FILLER_ID) + 3) % FILLERS).double().mean()
    assert abs(float(regular) - (0.8 + 0.2 / 16)) < 0.02


def test_losses_are_of_text_and_answers_apart():
    model, batch = recall_model(0), module.draw(3, 24, torch.Generator().manual_seed(0))
    with torch.no_grad():
        text, answers, right = module.losses(model, batch)
        logps = model(batch.ids).logits.log_softmax(-1)
    for b in range(3):
        told = [-logps[b, j - 1, batch.ids[b, j]] for j in range(24) if batch.text[b, j]]
        torch.testing.assert_close(text[b], torch.stack(told).mean())
        asked = torch.stack([-logps[b, 16 + q, batch.targets[b, q]] for q in range(8)])
        torch.testing.assert_close(answers[b], asked.mean())
        assert right[b] == (logps[b, 16:].argmax(-1) == batch.targets[b]).double().mean()


def test_measures_every_testable_claim_per_sequence(monkeypatch):
    small(monkeypatch)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert all(len(measured.ours) == len(measured.baseline) == 8 for measured in found.values())
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"


def test_tuning_copies_the_base_and_leaves_its_frequencies(monkeypatch):
    small(monkeypatch)
    base = recall_model(0)
    before, theta = copy.deepcopy(base.state_dict()), base.model.rotary_emb.inv_freq.clone()
    arms = {}
    for name, how in {**module.MAPS, "random": "random"}.items():
        model = module.tuned(base, 0, how)
        assert model.model.rotary_emb.inv_freq.equal(theta) and not model.training
        assert not model.model._forward_pre_hooks
        arms[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert all(before[name].equal(value) for name, value in base.state_dict().items())
    assert arms["plain"].equal(
        torch.cat([p.detach().flatten() for p in module.tuned(base, 0, Giraffe(linear=1.0)).parameters()])
    )
    names = list(arms)
    assert all(not arms[a].equal(arms[b]) for a in names for b in names if a < b), "arms train under their own map"


def test_evaluation_under_a_neutral_map_is_the_plain_models(monkeypatch):
    small(monkeypatch)
    model = recall_model(3)
    plain = module.evaluate(model, None, 24, 0)
    neutral = module.evaluate(model, Giraffe(linear=1.0), 24, 0)
    scaled = module.evaluate(model, Giraffe(linear=4.0), 24, 0)
    torch.testing.assert_close(neutral, plain)
    assert (scaled[0] - plain[0]).abs().max() > 1e-3
