import seqwise.lab.reproduce.a2sf as module
from seqwise.lab.zoo.recall import recall_model


def test_measures_every_testable_claim_per_sequence(monkeypatch):
    monkeypatch.setattr(module, "train_recall", lambda seed: recall_model(seed))
    # an untrained model is never right; any number that follows its logits tells the arms apart
    monkeypatch.setattr(module, "hits", lambda logits, targets: logits.std(-1).mean(-1).tolist())
    monkeypatch.setattr(module, "SEQUENCES", 5)
    said = []
    found = module.REPRODUCTION.measure(0, said.append)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert all(len(measured.ours) == len(measured.baseline) == 5 for measured in found.values())
    assert found["forgetting-24"].ours == found["interior-24"].ours != found["forgetting-24"].baseline
    assert found["reversal-16"].ours != found["forgetting-16"].baseline, "other items"
    assert len(said) == 1 + 2 * 2
    assert module.REPRODUCTION.measure(0, said.append) == found, "the seed decides everything"
