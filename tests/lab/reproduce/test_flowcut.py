import seqwise.lab.reproduce.flowcut as module
from seqwise.lab.zoo import glyphs


def test_measures_every_testable_claim_once_per_image(monkeypatch):
    model = glyphs.build(0)
    monkeypatch.setattr(module, "trained", lambda seed, progress: model)
    monkeypatch.setattr(module, "IMAGES", 6)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert list(found) == [claim.key for claim in module.REPRODUCTION.testable]
    assert all(len(measured.ours) == len(measured.baseline) == 6 for measured in found.values())
    assert set(found["keep-33"].ours) <= {0.0, 1.0}
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"
