import torch

import seqwise.lab.reproduce.temporal_grounding as module
from seqwise.lab.reproduce.temporal_grounding import AFTER, ASK, BEFORE, NO, STORY, YES


def test_questions_have_their_answers():
    batch = module.draw(torch.Generator().manual_seed(0), (BEFORE, AFTER), 20)
    assert batch.ids.shape == (20, STORY + 8 * 4)
    for b in range(20):
        ids = batch.ids[b].tolist()
        story = ids[:STORY]
        assert len(set(story)) == STORY and max(story) < module.EVENTS
        for q in range(8):
            ask, first, word, second = ids[STORY + 4 * q : STORY + 4 * q + 4]
            places = [story.index(first), story.index(second)]
            assert ask == ASK and places == batch.places[b, q].tolist() and places[0] != places[1]
            true = (places[0] < places[1]) if word == BEFORE else (places[0] > places[1])
            assert int(batch.answers[b, q]) == (YES if true else NO) and word in (BEFORE, AFTER)
            assert [ids[m] for m in batch.marks[q]] == [first, second] and ids[batch.at[q]] == second
    one = module.draw(torch.Generator().manual_seed(0), (BEFORE,), 20)
    assert one.ids[:, :STORY].equal(batch.ids[:, :STORY]) and not (one.ids == AFTER).any(), "the arms see the same"
    assert one.places.equal(batch.places)


def test_measures_every_testable_claim(monkeypatch):
    """A model that looks at its first question alone: it reads what it is given, so every claim's value is known."""
    trained = []

    def oracle(model, ids):
        found = []
        for row in ids.tolist():
            earlier = row.index(row[STORY + 1]) < row.index(row[STORY + 3])
            asked = row[STORY + 2] if model == (BEFORE, AFTER) else BEFORE  # the first arm takes after for before
            found.append(earlier == (asked == BEFORE))
        return found

    monkeypatch.setattr(module, "ITEMS", 9)
    monkeypatch.setattr(module, "train", lambda seed, directions: trained.append(directions) or directions)
    monkeypatch.setattr(module, "answers", oracle)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert trained == [(BEFORE,), (BEFORE, AFTER)]
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert found["trained-direction"].ours == found["trained-direction"].baseline == (1.0,) * 9
    assert found["inconsistent"].ours == (1.0,) * 9 and found["inconsistent"].baseline == (0.0,) * 9
    assert found["both-right"].ours == (0.0,) * 9 and found["both-right"].baseline == (1.0,) * 9


def test_both_arms_run(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(module, "ITEMS", 5)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert all(len(one.ours) == len(one.baseline) == 5 for one in found.values())
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"
