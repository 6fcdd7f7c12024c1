import pytest
import torch

import seqwise.lab.reproduce.landmark_attention as module
from seqwise.lab.zoo.recall import VOCABULARY
from seqwise.learn.nn.landmark_attention import LandmarkMemory, insert_landmarks


@pytest.mark.parametrize("length", [*module.TRAINED, module.FOUR_TIMES, module.SIXTEEN_TIMES])
def test_no_landmark_stands_among_the_questions(length):
    ids = module.texts(2, length, 0).input_ids
    inserted = insert_landmarks(ids, module.LANDMARK, module.EVERY)
    assert inserted.input_ids[:, -module.QUERIES :].equal(ids[:, -module.QUERIES :])
    assert inserted.landmark[:, -module.QUERIES - 1].all()


def test_measures_every_testable_claim_once_per_text(monkeypatch):
    for name, value in {"STEPS": 2, "PROMPTS": 3, "SIXTEEN_TIMES": 127}.items():
        monkeypatch.setattr(module, name, value)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert all(len(measured.ours) == len(measured.baseline) == 3 for measured in found.values())
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"


def test_both_arms_begin_alike_and_differ_by_the_landmarks(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 2)
    begun, original = [], module.answers

    def spy(model, batch, landmarks):
        begun.append((model.get_input_embeddings().weight.detach().clone(), batch.input_ids))
        return original(model, batch, landmarks)

    monkeypatch.setattr(module, "answers", spy)
    first, again, other = (module.train(0, landmarks) for landmarks in (True, True, False))
    assert begun[0][0].equal(begun[4][0]) and not begun[1][0].equal(begun[5][0])
    assert begun[0][1].equal(begun[4][1]) and begun[1][1].equal(begun[5][1])
    rows = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(a.equal(b) for a, b, _ in rows)
    assert any(not a.equal(c) for a, _, c in rows)


def test_random_blocks_are_real_ones_and_hits_are_counted_per_question(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 1)
    model = module.train(0, True)
    assert model.get_input_embeddings().num_embeddings == VOCABULARY + 1
    batch = module.texts(4, module.FOUR_TIMES, 1)
    every = LandmarkMemory(model, module.LANDMARK, every=module.EVERY, k=40, chunk=module.CHUNK)
    every.read(batch.input_ids)
    assert module.fetched(every, batch) == [1.0] * 4
    chance = module.RandomBlocks(model, module.LANDMARK, every=module.EVERY, k=2, chunk=module.CHUNK, seed=0)
    chance.read(batch.input_ids)
    picked = chance.picked[-1]
    assert picked.shape == (4, 2, 34, 2) and picked.min() == 0 and picked.max() == 27
    assert (picked[..., 0] < picked[..., 1]).all() and len(picked.unique()) == 28
    queries = picked[:, :, -module.QUERIES :]
    shares = []
    for b in range(4):
        asked = [(q, int(s)) for q, s in enumerate(batch.sources[b]) if s < 224]
        shares.append(sum(s // 8 in queries[b, :, q].flatten().tolist() for q, s in asked) / len(asked))
    assert module.fetched(chance, batch) == pytest.approx(shares)
    assert torch.tensor(shares).mean() < 0.5
