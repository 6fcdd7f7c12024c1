"""The recall task says what it promises, and the tiny model learns it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqwise.lab.zoo.recall import (
    FILLER_ID,
    KEY_ID,
    VALUE_ID,
    VALUES,
    VOCABULARY,
    recall_accuracy,
    recall_batch,
    recall_model,
    train_recall,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 24), st.integers(0, 7), st.data())
def test_every_query_has_one_answer_in_the_context(seed, items, slack, data):
    queries = data.draw(st.integers(1, items))
    length = items + queries + slack
    ids, targets, sources = recall_batch(3, length, generator=seeded(seed), items=items, queries=queries)
    assert ids.shape == (3, length) and targets.shape == sources.shape == (3, queries)
    context = length - queries
    for row, answer, source in zip(ids.tolist(), targets.tolist(), sources.tolist(), strict=True):
        facts = [(place, token) for place, token in enumerate(row) if token < FILLER_ID]
        found = {token // VALUES: (place, token % VALUES) for place, token in facts}
        assert len(found) == items == len(facts)
        assert all(token < KEY_ID for token in row[:context])
        assert len(set(row[context:])) == queries
        for token, value, place in zip(row[context:], answer, source, strict=True):
            assert found[token - KEY_ID] == (place, value - VALUE_ID)


def test_ids_are_disjoint_and_fill_the_vocabulary():
    assert (FILLER_ID, KEY_ID, VALUE_ID, VOCABULARY) == (192, 208, 232, 240)


def test_span_confines_the_items():
    batch = recall_batch(50, 64, generator=seeded(1), span=(3, 20))
    places = (batch.input_ids < FILLER_ID).nonzero()[:, 1]
    assert (places.min(), places.max()) == (3, 19)
    everywhere = recall_batch(50, 64, generator=seeded(1))
    assert (everywhere.input_ids < FILLER_ID).nonzero()[:, 1].max() == 55


def test_batch_depends_on_its_generator_only():
    first = recall_batch(4, 40, generator=seeded(5))
    torch.manual_seed(123)
    for again, other, same in zip(
        recall_batch(4, 40, generator=seeded(5)), recall_batch(4, 40, generator=seeded(6)), first, strict=True
    ):
        assert torch.equal(again, same) and not torch.equal(other, same)


@pytest.mark.parametrize(
    "settings_, message",
    [
        ({"batch": 0}, r"batch must be >= 1, got 0"),
        ({"items": 25}, r"items must be in \[1, 24\], got 25"),
        ({"queries": 9}, r"queries must be in \[1, items\] = \[1, 8\], got 9"),
        ({"span": (0, 7)}, r"place for each of the 8 items, got 7 places"),
        ({"span": (30, 57)}, r"context \[0, 56\), got \(30, 57\)"),
        ({"length": 12}, r"place for each of the 8 items, got 4 places"),
    ],
)
def test_counts_that_do_not_fit_are_refused(settings_, message):
    with pytest.raises(ValueError, match=message):
        recall_batch(**{"batch": 2, "length": 64, "generator": seeded(0), **settings_})


def test_training_needs_steps_and_lengths():
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        train_recall(0, steps=0)
    with pytest.raises(ValueError, match="lengths must name at least one"):
        train_recall(0, steps=1, lengths=())
    with pytest.raises(ValueError, match="layers must be >= 1, got 0"):
        recall_model(0, layers=0)


def test_seed_alone_decides_the_weights_and_the_global_state_is_kept():
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first = train_recall(3, steps=2, lengths=(16,))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(8)
    again, other = train_recall(3, steps=2, lengths=(16,)), train_recall(4, steps=2, lengths=(16,))
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)
    assert not first.training


def test_accuracy_counts_the_right_answers():
    class Oracle(torch.nn.Module):
        def __init__(self, answers):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(()))
            self.answers = answers

        def forward(self, input_ids, logits_to_keep, use_cache):
            assert logits_to_keep == self.answers.shape[1]
            logits = torch.nn.functional.one_hot(self.answers, VOCABULARY).float()
            return type("Output", (), {"logits": logits})

    batch = recall_batch(5, 20, generator=seeded(0), items=4, queries=4)
    answers = batch.targets.clone()
    answers[:, 0] = FILLER_ID
    assert recall_accuracy(Oracle(batch.targets), batch) == 1.0
    assert recall_accuracy(Oracle(answers), batch) == 0.75


def test_the_model_learns_and_the_answer_comes_from_the_context():
    losses: list[float] = []
    model = train_recall(0, steps=160, progress=lambda step, loss: losses.append(loss), lengths=(16, 24))
    assert len(losses) == 160 and losses[-1] < losses[0] / 4
    batch = recall_batch(128, 24, generator=seeded(99))
    assert recall_accuracy(model, batch) > 0.9
    assert recall_accuracy(recall_model(0), batch) < 0.3
    lost = batch.input_ids.clone()
    lost.scatter_(1, batch.sources, FILLER_ID)  # without the items only a guess among 8 values is left
    assert recall_accuracy(model, batch._replace(input_ids=lost)) < 0.3
