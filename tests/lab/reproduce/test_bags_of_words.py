from collections import Counter

import numpy as np
import pytest
import torch

import seqwise.lab.reproduce.bags_of_words as module
from seqwise.insight.probe.bags_of_words import hard_captions
from seqwise.lab.reproduce.bags_of_words import COLOURS, SHAPES, SIDE, TAGS, DualEncoder


def test_the_words_of_a_scene_tell_its_image_and_the_scene_its_caption():
    train, test = module.scenes(0)
    captions = train.captions + test.captions
    assert len(test.captions) == module.TEST and len(captions) == 28 * 28 * 2
    assert len({tuple(sorted(Counter(c).items())) for c in captions}) == len(captions), "one scene per bag of words"
    for cells, caption in zip(train.cells[:80], train.captions[:80], strict=True):
        places = cells.flatten(0, 1).sum(-1).nonzero().flatten().tolist()
        assert len(places) == 2 and cells.sum() == 4
        first, second = ((p // SIDE, p % SIDE) for p in places)
        axis = 0 if "above" in caption else 1
        assert first[1 - axis] == second[1 - axis] and (first[axis], second[axis]) == (0, 1)
        names = [cells.flatten(0, 1)[p].nonzero().flatten().tolist() for p in places]
        told = [[COLOURS[c], SHAPES[s - len(COLOURS)]] for c, s in names]
        assert caption[1:3] == told[0] and caption[7:] == told[1] and len(caption) == len(TAGS)


def test_both_arms_start_alike_and_see_the_same_images(monkeypatch):
    seen = {False: [], True: []}
    data = module.scenes(0)[0]
    monkeypatch.setattr(module, "STEPS", 3)
    monkeypatch.setattr(module, "BATCH", 8)
    first = {}
    for hard in (False, True):

        def loss(images, texts, scale, hard=hard):
            seen[hard].append((len(images), len(texts)))
            first.setdefault(hard, images.detach().clone())
            return images.sum() + texts.sum() + scale * 0

        monkeypatch.setattr(module, "negclip_loss", loss)
        module.train(4, data, hard)
    assert first[False].equal(first[True])
    assert [n for n, _ in seen[False]] == [n for n, _ in seen[True]]
    assert all(m == n for n, m in seen[False]) and all(m == 2 * n for n, m in seen[True])


def test_hard_captions_of_a_scene():
    caption = "the red circle is left of the blue square"
    swaps = hard_captions(caption.split(), TAGS, np.random.default_rng(0))
    assert sorted(map(" ".join, swaps)) == [
        "the blue circle is left of the red square",
        "the blue square is left of the red circle",
        "the red square is left of the blue circle",
    ]


def test_a_pooled_encoder_without_places_gets_half():
    data = module.scenes(1)[1]
    model = DualEncoder().eval()
    model.texts = lambda words: torch.nn.functional.normalize(model.out(model.word(words).mean(1)), dim=-1)
    relation = [[c, [*c[:1], *c[7:], *c[3:7], *c[1:3]]] for c in data.captions]
    assert module.chosen(model, data, relation) == [0.5] * module.TEST


def test_measures_every_testable_claim(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(module, "BATCH", 6)
    monkeypatch.setattr(module, "TEST", 20)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert all(len(one.ours) == len(one.baseline) == 20 for one in found.values())
    assert set(found["clip-relation"].baseline) == {0.5}
    assert found["relation"].baseline == found["clip-relation"].ours
    assert found["retrieval"].baseline == found["retrieval-needs-no-order"].baseline
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"


def test_retrieval_counts_captions_whose_image_is_nearest():
    data = module.Scenes(torch.eye(3), [["a"], ["b"], ["c"]])

    class Known:
        images = staticmethod(lambda cells: cells)
        texts = staticmethod(lambda words: torch.eye(3)[words[:, 0]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ids", lambda captions: torch.tensor([[0], [2], [2]]))
        assert module.retrieved(Known, data, data.captions) == [1.0, 0.0, 1.0]
