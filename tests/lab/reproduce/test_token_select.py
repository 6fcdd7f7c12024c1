import torch

import seqwise.lab.reproduce.token_select as module
from seqwise.lab.reproduce._recall import stepwise
from seqwise.lab.zoo.recall import recall_batch, recall_model
from seqwise.methods.cache.token_select import TokenSelect

SIZES = {"budget": 6, "sinks": 2, "local": 4, "block": 4, "reuse": None}


def logits(method, n=40, prompt=32):
    ids = recall_batch(3, n, generator=torch.Generator().manual_seed(0)).input_ids
    return stepwise(recall_model(0), ids, prompt, method)[1]


def test_in_place_differs_by_positions_alone(monkeypatch):
    """Under a rotation that does nothing, positions are all alike."""
    ours, in_place = logits(TokenSelect(**SIZES)), logits(module._InPlace(**SIZES))
    assert not torch.allclose(ours, in_place, atol=1e-2)
    model = recall_model(0)
    model.model.rotary_emb.inv_freq.zero_()
    monkeypatch.setattr(f"{__name__}.recall_model", lambda seed: model)
    torch.testing.assert_close(logits(TokenSelect(**SIZES)), logits(module._InPlace(**SIZES)), atol=1e-4, rtol=1e-4)


def test_in_place_with_room_for_all_is_full_attention():
    whole = logits(TokenSelect(budget=60, sinks=2, local=4, block=4))
    torch.testing.assert_close(logits(module._InPlace(budget=34, sinks=2, local=4, block=4)), whole)


def test_random_tokens_are_as_many_and_others():
    batch = recall_batch(3, 40, generator=torch.Generator().manual_seed(0))
    runs = [
        stepwise(recall_model(0), batch.input_ids, 32, method)
        for method in (TokenSelect(**SIZES), module._Anywhere(**SIZES))
    ]
    assert runs[0][0].engine.account.pairs == runs[1][0].engine.account.pairs
    assert not torch.allclose(runs[0][1], runs[1][1], atol=1e-2)
    assert torch.equal(runs[1][1], logits(module._Anywhere(**SIZES)))


def test_measures_every_testable_claim(monkeypatch):
    monkeypatch.setattr(module, "train_recall", lambda seed: recall_model(seed))
    monkeypatch.setattr(module, "SEQUENCES", 3)
    monkeypatch.setattr(module, "LONG", 96)
    said = []
    found = module.REPRODUCTION.measure(0, said.append)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert found["exact"].ours == (0.0,)
    assert all(len(found[key].ours) == 3 for key in ("extrapolation", "re-indexing", "selection", "selection-cache"))
    assert 0 <= found["skipped"].ours[0] < 1
    assert any("accuracy at" in text for text in said)
    assert module.REPRODUCTION.measure(0, said.append) == found, "the seed decides everything"
