import pytest
import torch

import seqwise.lab.reproduce.lexrank as module
from seqwise.insight.explain.lexrank import graph_centrality, idf_cosine
from seqwise.lab.reproduce.lexrank import BACKGROUND, DOCUMENTS, SENTENCES, TOPIC, WORDS, cluster, found


def test_a_cluster_has_core_sentences_that_draw_from_its_topic():
    drawn = cluster(torch.Generator().manual_seed(0))
    assert drawn.tf.shape == (80, BACKGROUND + TOPIC) and (drawn.tf.sum(1) == WORDS).all()
    assert drawn.core.view(DOCUMENTS, SENTENCES).sum(1).tolist() == [2] * 8
    topical = drawn.tf[:, BACKGROUND:].sum(1)
    assert (topical[drawn.core] == 8).all() and (topical[~drawn.core] == 2).all()
    assert drawn.place.tolist() == list(range(10)) * 8


def test_unrelated_documents_have_topics_of_their_own_and_no_core():
    noisy = cluster(torch.Generator().manual_seed(0), unrelated=2)
    assert noisy.tf.shape == (100, BACKGROUND + 3 * TOPIC) and not noisy.core[80:].any()
    topics = noisy.tf[:, BACKGROUND:].view(100, 3, TOPIC).sum(-1)
    assert topics[:80, 1:].sum() == 0 and topics[80:90, [0, 2]].sum() == 0 and topics[90:, :2].sum() == 0
    assert sorted(topics[80:90, 1].tolist()) == [2.0] * 8 + [8.0] * 2


def test_mixing_keeps_the_cluster_as_it_is():
    drawn, other = cluster(torch.Generator().manual_seed(0)), cluster(torch.Generator().manual_seed(1), 2)
    noisy = module._mixed(drawn, other)
    assert noisy.tf[:80, : drawn.tf.shape[1]].equal(drawn.tf) and noisy.tf[80:].equal(other.tf[80:])
    assert noisy.core[:80].equal(drawn.core) and not noisy.core[80:].any() and (noisy.tf.sum(1) == WORDS).all()


def test_found_counts_core_sentences_among_as_many_best():
    core = torch.tensor([True, False, True, False])
    assert found(torch.tensor([3.0, 2, 1, 0]), core) == 0.5 and found(core.double(), core) == 1


def test_measures_every_testable_claim_once_per_cluster(monkeypatch):
    monkeypatch.setattr(module, "CLUSTERS", 4)
    said = []
    measured = module.REPRODUCTION.measure(0, said.append)
    assert list(measured) == [claim.key for claim in module.REPRODUCTION.testable]
    assert all(len(each.ours) == len(each.baseline) == 4 for each in measured.values())
    assert measured["noise-2"].baseline == measured["lexrank-lead"].ours == measured["noise-4"].baseline
    assert measured["lexrank-continuous"].baseline == measured["continuous-lead"].ours
    assert measured["lexrank-random"].baseline != measured["lexrank-lead"].baseline
    assert sum(measured["lexrank-random"].baseline) / 4 == pytest.approx(0.2, abs=0.15)
    assert said[-1] == "4 of 4 clusters ranked"
    assert module.REPRODUCTION.measure(0, said.append) == measured, "the seed decides everything"
    assert module.REPRODUCTION.measure(1, said.append) != measured


def test_every_arm_is_the_formula_it_names(monkeypatch):
    """On clusters without any topic, where the arms differ."""
    monkeypatch.setattr(module, "CLUSTERS", 6)
    monkeypatch.setattr(module, "CORE_TOPIC", 3)
    measured = module.REPRODUCTION.measure(0, lambda text: None)
    ours, g = [], torch.Generator().manual_seed(0)
    for _ in range(6):
        drawn = cluster(g)
        similarity = idf_cosine(drawn.tf, torch.ones(drawn.tf.shape[1], dtype=torch.float64))
        ours.append(found(graph_centrality(similarity, 0.1, 0.15), drawn.core))
        torch.rand(80, generator=g)  # the random arm
    assert list(measured["lexrank-lead"].ours) == ours
    arms = [measured[f"lexrank-{rival}"].baseline for rival in ("continuous", "degree", "centroid", "lead", "random")]
    assert len({*arms, tuple(ours)}) == 6
