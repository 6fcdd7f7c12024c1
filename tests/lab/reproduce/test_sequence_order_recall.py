import torch

import seqwise.lab.reproduce._order as order
import seqwise.lab.reproduce.sequence_order_recall as module


def test_training_questions_have_their_answers():
    batch = module.draw(torch.Generator().manual_seed(0))
    assert batch.ids.shape == (module.BATCH, 16 + 8 * 5) and batch.answers.shape == (module.BATCH, 8)
    for b in range(4):
        ids = batch.ids[b].tolist()
        context = ids[:16]
        assert len(set(context)) == 16 and max(context) < module.SYMBOLS
        for q in range(8):
            ask, *shown = ids[16 + 5 * q : 21 + 5 * q]
            places = [context.index(shown[0]), context.index(shown[2])]
            assert ask == module.ASK and [context.index(s) for s in shown] == [p + i for p in places for i in (0, 1)]
            assert places == batch.places[b, q].tolist() and abs(places[0] - places[1]) >= 2
            assert int(batch.answers[b, q]) == (module.A if places[0] < places[1] else module.B)
            assert [ids[m] for m in batch.marks[q]] == [shown[1], shown[3]] and ids[batch.at[q]] == shown[3]
    assert 0.4 < (batch.answers == module.A).float().mean() < 0.6


def test_a_sequence_repeats_no_symbol_within_an_excerpt():
    text = module.sequence(400, 3)
    assert all(len(set(text[i : i + 16])) == 16 for i in range(385)) and len(set(text)) == module.SYMBOLS
    assert text == module.sequence(400, 3) != module.sequence(400, 4)


def test_questions_are_on_their_excerpts(monkeypatch):
    monkeypatch.setattr(module, "ITEMS", 10)
    excerpts, asked, answers = module.questions(0)
    assert excerpts.shape == (30, 16) and asked.shape == (30, 5) and (asked[:, 0] == module.ASK).all()
    places = torch.stack([(excerpts == asked[:, i : i + 1]).int().argmax(-1) for i in (1, 3)], -1)
    assert (excerpts.gather(1, places) == asked[:, [1, 3]]).all()
    assert ((places[:, 0] > places[:, 1]).long() == answers).all()


def test_measures_every_testable_claim(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(module, "ITEMS", 4)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert all(len(one.ours) == 12 for one in found.values()) and set(found["without"].baseline) == {0.5}
    assert found["in-context"].ours == found["order-of-the-excerpt"].ours
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"


def test_training_learns_and_leaves_random_numbers_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    model = order.model(0, module.SYMBOLS + 3, 56)
    loss = []
    for steps in (1, 60):
        trained = order.train(order.model(0, module.SYMBOLS + 3, 56), module.draw, steps, 0, 16)
        batch = module.draw(torch.Generator().manual_seed(9))
        with torch.no_grad():
            logits = trained(batch.ids).logits[:, batch.at]
        loss.append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())))
    assert loss[1] < loss[0] - 0.5 and not trained.training
    assert torch.random.get_rng_state().equal(before)
    found = order.logps(model, batch.ids[:, :21], (module.A, module.B))
    with torch.no_grad():
        assert torch.allclose(found, model(batch.ids).logits[:, 20].log_softmax(-1)[:, -2:], atol=1e-5)
