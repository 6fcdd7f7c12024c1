import torch

import seqwise.lab.reproduce.token_activation_map as module
from seqwise.lab.zoo import scenes
from seqwise.lab.zoo.scenes_data import GRID


def test_drawn_maps_hold_each_words_object_and_shares_of_the_words_before(monkeypatch):
    monkeypatch.setattr(module, "SALT", 0.0)
    maps, t, mask = module.drawn_maps(torch.Generator().manual_seed(0))
    assert maps.shape == (5, 14, 14) and mask.sum() == 16 and set(maps[0].unique().tolist()) == {0.0, 1.0}
    assert (t >= 0.3).all() and (t <= 0.9).all()
    own = maps.clone()
    for n in range(1, 5):
        own[n] -= sum(t[n, j] * maps[j] for j in range(n))
    torch.testing.assert_close(own[-1], mask.float(), atol=1e-6, rtol=0)
    assert (own.round().sum(0) <= 1).all(), "objects do not overlap"
    assert not maps[-1][~mask].eq(0).all(), "the last map shows other objects, too"


def test_salt_is_seen():
    maps, _, _ = module.drawn_maps(torch.Generator().manual_seed(0))
    assert len(maps[0].unique()) > 2


def test_mean_filter_and_scaling():
    x = torch.arange(12.0).view(3, 4)
    assert module.mean_filter(x)[1, 1] == x[:3, :3].mean() and module.mean_filter(x).shape == (3, 4)
    assert module.mean_filter(x)[0, 0] == torch.tensor([[5.0, 4, 5], [1, 0, 1], [5, 4, 5]]).mean()
    assert module.scaled(x).max() == 255 and module.scaled(x).min() == 0
    assert module.scaled(torch.ones(2, 3, 3)).max() == 0


def test_class_activation_is_read_from_the_models_logits():
    model, _ = scenes.load()
    example = scenes.scenes(1, 5, types=("colour",))[0]
    inputs = scenes.batch([example]).inputs()
    found = module.class_activation(model, inputs, [7, 9])
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    rows = (inputs["input_ids"][0] == 4).nonzero()[:, 0]
    assert found.shape == (2, GRID, GRID)
    torch.testing.assert_close(found[1, 2, 3], logits[rows[2 * GRID + 3], 9].relu())
    mask = module.asked(example)
    assert mask.flatten().nonzero()[:, 0].tolist() == sorted(example.relevant) and mask.any()


def test_measures_every_testable_claim(monkeypatch):
    monkeypatch.setattr(module, "DRAWS", 3)
    monkeypatch.setattr(module, "QUESTIONS", 4)
    said = []
    found = module.REPRODUCTION.measure(0, said.append)
    assert list(found) == [claim.key for claim in module.REPRODUCTION.testable]
    lengths = {key: len(measured.ours) for key, measured in found.items()}
    assert lengths == {**dict.fromkeys(("eci", "filter-mean", "filter-none"), 3),
                       **dict.fromkeys(("noun", "answer", "answer-chance", "f1"), 4)}  # fmt: skip
    assert found["eci"].ours == found["filter-none"].baseline and found["filter-mean"].ours == found["filter-none"].ours
    assert found["answer"].ours == found["answer-chance"].ours
    assert found["answer"].baseline != found["answer-chance"].baseline
    assert all(0 <= x <= 1 for measured in found.values() for x in (*measured.ours, *measured.baseline))
    assert said[-1] == "4 of 4 questions explained"
    assert module.REPRODUCTION.measure(0, said.append) == found, "the seed decides everything"
