import torch

import seqwise.lab.reproduce.tidal_decode as module
from seqwise.lab.zoo.recall import recall_batch, recall_model
from seqwise.methods.cache.tidal_decode import TidalDecode


def test_the_stack_has_equal_scores_and_different_outputs_in_all_layers():
    model = module.equal_scores_stack(0)
    ids = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    for attention in attentions[1:]:
        assert torch.equal(attention, attentions[0])
    model.set_attn_implementation("sdpa")
    outputs = module.attention_outputs(model, ids, 15, TidalDecode(budget=30, start=1, correction=4))
    assert outputs.shape == (6, 5, 2, 32)
    assert not torch.allclose(outputs[1], outputs[2])


def test_positions_by_chance_differ_from_each_layers_own():
    model = module.equal_scores_stack(0)
    ids = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(0))
    tidal, oracle, anywhere = (
        module.attention_outputs(model, ids, 25, kind(budget=4, start=1, correction=4))
        for kind in (TidalDecode, module._Oracle, module._Anywhere)
    )
    torch.testing.assert_close(tidal, oracle)
    reuse = torch.tensor([2, 3, 5])
    assert not torch.isclose(anywhere[reuse], oracle[reuse], atol=1e-3).flatten(1).all(1).any()
    torch.testing.assert_close(anywhere[[0, 1, 4]], oracle[[0, 1, 4]])  # attended in full


def test_overlap_of_a_stack_with_equal_scores_is_whole():
    ids = torch.randint(97, (3, 30), generator=torch.Generator().manual_seed(0))
    assert module.overlaps(module.equal_scores_stack(0), ids, 5) == [1.0, 1.0, 1.0]
    random = recall_model(0, layers=6)
    batch = recall_batch(8, 40, generator=torch.Generator().manual_seed(0))
    assert all(0 <= share < 0.9 for share in module.overlaps(random, batch.input_ids, 5))


def test_measures_every_testable_claim(monkeypatch):
    monkeypatch.setattr(module, "train_recall", lambda seed, layers: recall_model(seed, layers))
    monkeypatch.setattr(module, "SEQUENCES", 3)
    monkeypatch.setattr(module, "STACK_STEPS", 4)
    said = []
    found = module.REPRODUCTION.measure(0, said.append)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert found["exact"].ours == (0.0,)
    assert found["keys-read"].ours == found["keys-read"].baseline
    assert 0 < found["reads-fewer"].ours[0] < 1
    assert len(found["persisted"].ours) == module.STACK
    assert sum("overlap" in text for text in said) == 2
    assert module.REPRODUCTION.measure(0, said.append) == found, "the seed decides everything"
