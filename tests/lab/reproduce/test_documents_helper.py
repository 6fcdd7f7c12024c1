import torch

import seqwise.lab.reproduce._documents as module


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_each_document_holds_one_item_and_the_gold_one_the_answer():
    prompts = module.draw(50, generator(0))
    assert prompts.ids.shape == (50, sum(prompts.lengths) + 3)
    facts = prompts.segments
    for b in range(50):
        ids, items = prompts.ids[b], []
        assert ids[0] == module.BOS_ID and ids[-2] == module.ASK_ID and (facts.member[b, [0, -2, -1]] == -1).all()
        for j, length in enumerate(prompts.lengths):
            document = ids[facts.member[b] == j]
            assert len(document) == length and 2 <= length <= 5
            (item,) = [token for token in document.tolist() if token < module.FILLER_ID]
            items.append(divmod(item, module.VALUES))
        assert len({key for key, _ in items}) == module.DOCUMENTS
        assert (ids[-1] - module.KEY_ID, prompts.answers[b] - module.VALUE_ID) == items[prompts.gold[b]]


def test_permuted_prompts_hold_the_same_documents_and_rotations_put_the_answer_everywhere():
    prompts = module.draw(20, generator(1))
    orders = module.rotations(module.DOCUMENTS)
    places = []
    for order in orders:
        moved = prompts.permuted(order)
        for i, j in enumerate(order):
            assert moved.ids[moved.segments.member == i].equal(prompts.ids[prompts.segments.member == j])
        assert moved.answers.equal(prompts.answers) and moved.lengths == tuple(prompts.lengths[j] for j in order)
        assert torch.tensor(order)[moved.gold].equal(prompts.gold)
        places.append(moved.gold)
    assert torch.stack(places).sort(0).values.equal(torch.arange(8)[:, None].expand(8, 20))
    assert prompts.permuted(orders[0]).ids.equal(prompts.ids)


def test_training_prompts_have_the_answer_in_front_most_of_the_time():
    gold = torch.cat([batch.gold for _, batch in zip(range(40), module.batches(3), strict=False)])
    assert abs(float((gold == 0).double().mean()) - module.FIRST) < 0.05
    assert len(set(gold.tolist())) == module.DOCUMENTS
    even = module.draw(4000, generator(2)).gold.bincount(minlength=8) / 4000
    assert float((even - 1 / 8).abs().max()) < 0.03


def test_training_is_the_seeds_and_lowers_the_loss():
    a, b = (module.train(module.model(0), module.batches(0), 12, 3e-3) for _ in range(2))
    assert all(x.equal(y) for x, y in zip(a.parameters(), b.parameters(), strict=True)) and not a.training
    prompts = module.draw(64, generator(5))
    before, after = (
        float(torch.nn.functional.cross_entropy(module.last_logits(m, prompts), prompts.answers))
        for m in (module.model(0).eval(), a)
    )
    assert after < before
