import torch

from seqwise.lab.reproduce._recall import hits, stepwise
from seqwise.lab.zoo.recall import recall_batch, recall_model
from seqwise.methods.baselines import Full, Recent


def test_steps_under_the_full_cache_are_the_plain_forward():
    model = recall_model(0)
    ids = recall_batch(3, 30, generator=torch.Generator().manual_seed(0)).input_ids
    with torch.no_grad():
        plain = model(ids).logits[:, 22:]
    run, logits = stepwise(model, ids, 22, Full())
    torch.testing.assert_close(logits, plain, atol=1e-4, rtol=1e-4)
    assert run.kept(layer=0) == [[list(range(30))] * 2] * 3
    run, logits = stepwise(model, ids, 22, Recent(budget=9, sinks=0))
    assert run.kept(layer=1) == [[list(range(21, 30))] * 2] * 3
    assert not torch.allclose(logits, plain, atol=1e-2)


def test_hits_are_shares_per_sequence():
    logits = torch.eye(5)[torch.tensor([[1, 2], [3, 4]])]
    assert hits(logits, torch.tensor([[1, 0], [3, 4]])) == [0.5, 1.0]
