import torch

import seqwise.lab.reproduce.saliency_verbalization as module
from seqwise.insight.explain.saliency_verbalization import SaliencyVerbalization


def test_paragraphs_are_of_a_size_and_have_one_topic_each():
    data = module.paragraphs()
    assert data.counts.shape == (len(data.words), len(data.number)) and len(data.words) == len(data.label)
    assert all(module.SHORTEST <= len(words) <= module.LONGEST for words in data.words)
    assert data.label.unique().tolist() == list(range(module.TOPICS))
    assert data.counts.sum(1).tolist() == [len(words) for words in data.words]


def test_scores_add_up_to_the_logit_against_the_mean():
    torch.manual_seed(0)
    data = module.paragraphs()
    model = torch.nn.Linear(data.counts.shape[1], module.TOPICS, bias=False).requires_grad_(False)
    columns = torch.tensor([data.number[word.lower()] for word in data.words[3]])
    logits = model(data.counts[3])
    a = module.scores(model, columns, 2)
    torch.testing.assert_close(a.sum(), logits[2] - logits.mean())


def test_random_places_are_as_many_words():
    said = SaliencyVerbalization(quantile=0.0).verbalize_scores(torch.arange(1.0, 21), [str(i) for i in range(20)])
    wanted = sum(stop - start for start, stop in said.spans)
    g = torch.Generator().manual_seed(0)
    drawn = [module.random_places(said, g) for _ in range(5)]
    assert all(int(places.sum()) == wanted for places in drawn) and not drawn[0].equal(drawn[1])


def test_a_cited_word_is_cited_everywhere():
    assert module._all_of(["A", "b", "a"], torch.tensor([True, False, False])).tolist() == [True, False, True]


def test_measures_every_testable_claim(monkeypatch):
    monkeypatch.setattr(module, "PLANTED", 5)
    monkeypatch.setattr(module, "EPOCHS", 2)
    said = []
    found = module.REPRODUCTION.measure(0, said.append)
    assert list(found) == [claim.key for claim in module.REPRODUCTION.testable]
    assert len(found["planted"].ours) == 5 and set(found["planted"].baseline) == {module.SHARE}
    told = found["simulatable-random"]
    assert found["simulatable-tokens"].ours == told.ours and len(told.ours) == len(found["faithful"].ours) > 100
    assert (
        found["simulatable-tokens"].baseline != told.baseline and found["faithful"].ours != found["faithful"].baseline
    )
    assert all(0 <= x <= 1 for measured in found.values() for x in (*measured.ours, *measured.baseline))
    assert said[-1].endswith("paragraphs verbalized")
    assert module.REPRODUCTION.measure(0, said.append) == found, "the seed decides everything"
