import torch

import seqwise.lab.reproduce.zipcache as module
from seqwise.lab.zoo.recall import recall_model
from seqwise.methods.cache.zipcache import saliency


def unsalient(model, ids, method):
    """Tokens of the first chunk of layer 0, which are the unsalient ones: (Hkv, m)."""
    with torch.no_grad(), method.on(model) as run:
        model(input_ids=ids, use_cache=True)
    slot = run.cache.layers[0]
    assert slot.chunks[0].keys.bits == method.bits[1]
    return slot.order[0, :, : slot.chunks[0].count]


def test_arms_differ_in_the_salient_set_only():
    model = recall_model(0)
    model.set_attn_implementation("eager")
    ids = torch.randint(240, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention = model(ids, output_attentions=True).attentions[0]  # (1, 2, 40, 40)
    rows, received = torch.arange(40), attention.sum(2)
    for method, score in (
        (module._AllRows(bits=(4, 1), ratio=0.6), saliency(received, rows)),
        (module._PlainSum(bits=(4, 1), ratio=0.6), received),
    ):
        assert torch.equal(unsalient(model, ids, method), score[0].argsort(-1)[:, :24])
    ours, other = (unsalient(model, ids, module._RandomSet(bits=(4, 1), ratio=0.6, seed=s)) for s in (0, 1))
    assert ours.shape == (2, 24) and not torch.equal(ours, other)


def test_channel_scales_win_on_every_built_tensor():
    separable, plain = module.value_errors(torch.Generator().manual_seed(0))
    assert len(separable) == module.TENSORS and all(a < b for a, b in zip(separable, plain, strict=True))


def test_compression_counts_codes_and_parameters(monkeypatch):
    monkeypatch.setattr(module, "CACHE_TOKENS", 500)
    channels = module.CACHE_HEADS * module.CACHE_WIDTH
    codes = 2 * channels * (200 * 2 + 300 * 4) / 8
    parameters = 4 * (4 * channels + 2 * 500 + channels)
    assert module.compression(0) == 500 * channels * 2 * 2 / (codes + parameters)


def test_measures_every_testable_claim(monkeypatch):
    monkeypatch.setattr(module, "train_recall", lambda seed: recall_model(seed))
    for name, value in (("SEQUENCES", 4), ("TENSORS", 2), ("CACHE_TOKENS", 100)):
        monkeypatch.setattr(module, name, value)
    said = []
    found = module.REPRODUCTION.measure(0, said.append)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert len(found["separable"].ours) == 2 and len(found["memory"].ours) == 1
    assert all(len(found[key].ours) == 4 for key in ("lossless", "normalised", "probes", "random-set", "uniform"))
    assert module.REPRODUCTION.measure(0, said.append) == found, "the seed decides everything"
