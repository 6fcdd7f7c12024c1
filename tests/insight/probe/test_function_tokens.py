import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqwise.core.errors import PromptError, UsageError
from seqwise.insight.probe.base import surprisals
from seqwise.insight.probe.function_tokens import (
    CONTENT,
    FUNCTION,
    IGNORED,
    FunctionTokens,
    TopKSAE,
    activation_rate,
    active_features,
    by_frequency,
    count_tokens,
    coverage_at,
    cumulative_coverage,
    degrees,
    feature_edges,
    group_losses,
    grouped_next_token_loss,
    half_fall,
    hidden_states,
    last_function,
    learned_features,
    mean_active,
    per_occurrence,
    reactivated,
    steer,
    steering,
    token_classes,
    train_sae,
)
from seqwise.lab.zoo.recall import recall_model

# classes


def test_counts_and_documents_that_hold_a_token():
    counts, containing = count_tokens([[1, 1, 2], torch.tensor([2, 3]), [1]], 5)
    assert counts.tolist() == [0, 3, 2, 1, 0] and containing.tolist() == [0, 2, 2, 1, 0]


def test_the_token_that_crosses_the_share_is_a_function_token():
    counts = torch.tensor([10, 35, 30, 15, 10, 0])  # by frequency 35, 65, 80, 90, 100
    assert (token_classes(counts) == FUNCTION).nonzero()[:, 0].tolist() == [1, 2]
    assert (token_classes(counts, 0.35) == FUNCTION).nonzero()[:, 0].tolist() == [1]  # reached exactly
    assert (token_classes(counts, 1.0) == FUNCTION).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]  # never unseen ones


def test_a_share_of_whole_occurrences_is_reached_in_spite_of_rounding():
    counts = torch.ones(30, dtype=torch.long)
    for k in range(1, 31):
        assert int((token_classes(counts, k / 30) == FUNCTION).sum()) == k


def test_ties_go_to_the_smaller_id():
    counts = torch.tensor([2, 5, 5, 5, 2, 1])
    assert by_frequency(counts).tolist() == [1, 2, 3, 0, 4, 5]
    assert (token_classes(counts, 0.5) == FUNCTION).nonzero()[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize("share", [0, -0.1, 1.1])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
        token_classes(torch.tensor([1]), share)
    with pytest.raises(ValueError, match=r"FunctionTokens.share must be in \(0, 1\]"):
        FunctionTokens(share=share)


def test_nothing_counted_is_refused():
    with pytest.raises(ValueError, match="at least one occurrence"):
        token_classes(torch.zeros(3, dtype=torch.long))


def test_classes_from_ids_are_those_of_the_counts():
    corpus = [[0, 1, 1, 2], [1, 3, 3]]
    probe = FunctionTokens()
    found = probe.function_ids(corpus, 6)
    assert found == [1] and probe.class_ids(found, 6).tolist() == token_classes(count_tokens(corpus, 6)[0]).tolist()


# losses


def plain_groups(loss, labels, classes):
    total, tokens = torch.zeros(2, 2, 2, dtype=torch.float64)
    for row, ids in zip(loss, labels, strict=True):
        for t in range(1, len(ids)):
            if IGNORED not in (ids[t - 1], ids[t]):
                total[classes[ids[t - 1]], classes[ids[t]]] += row[t]
                tokens[classes[ids[t - 1]], classes[ids[t]]] += 1
    return total, tokens


@given(st.integers(0, 1000), st.integers(1, 9))
def test_groups_are_those_of_a_loop(seed, n):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 7, (3, n), generator=generator)
    labels[labels == -1] = IGNORED
    loss, classes = torch.rand(3, n, generator=generator), torch.randint(2, (7,), generator=generator)
    loss[:, 0] = math.nan
    found, (total, tokens) = group_losses(loss, labels, classes), plain_groups(loss, labels.tolist(), classes)
    torch.testing.assert_close(found.total.double(), total, atol=1e-5, rtol=0)
    assert found.tokens.tolist() == tokens.tolist()


def test_the_current_token_is_the_row_and_the_label_the_column():
    classes = torch.tensor([FUNCTION, CONTENT])
    found = group_losses(torch.tensor([math.nan, 3.0, 5.0]), torch.tensor([0, 1, 1]), classes)
    assert found.total.tolist() == [[0.0, 3.0], [0.0, 5.0]] and found.tokens.tolist() == [[0, 1], [0, 1]]
    assert found.mean()[FUNCTION, CONTENT] == 3 and found.mean()[FUNCTION, FUNCTION].isnan()
    assert found.share()[CONTENT, CONTENT] == 5 / 8 and found.token_share()[CONTENT, CONTENT] == 0.5


def test_groups_sum_to_the_ordinary_loss_with_its_gradient():
    logits = torch.randn(2, 9, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(1))
    labels[0, 0] = labels[1, 5:] = IGNORED
    classes = torch.arange(11) % 2
    found = grouped_next_token_loss(logits, labels, classes)
    keep = (labels[:, :-1] != IGNORED) & (labels[:, 1:] != IGNORED)
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1][keep], labels[:, 1:][keep], reduction="sum")
    torch.testing.assert_close(found.total.sum(), wanted)
    assert int(found.tokens.sum()) == int(keep.sum()) == 7 + 4
    (ours,), (theirs,) = (torch.autograd.grad(loss, logits) for loss in (found.total.sum(), wanted))
    torch.testing.assert_close(ours, theirs)


def test_one_token_has_no_transition():
    found = grouped_next_token_loss(torch.randn(1, 1, 4), torch.tensor([[2]]), torch.zeros(4, dtype=torch.long))
    assert int(found.tokens.sum()) == 0 and float(found.total.sum()) == 0


def test_losses_of_documents_leave_special_tokens_out():
    model, classes = recall_model(0), torch.arange(240) % 2
    documents = [[7, 4, 9, 12], [7, 5, 5, 7, 6, 1, 2]]
    found = FunctionTokens().losses(model, documents, classes, special=[7])
    assert [int(one.tokens.sum()) for one in found] == [2, 3]
    loss = surprisals(model, documents)
    assert float(found[0].total.sum()) == pytest.approx(float(loss[0][2:].sum()), rel=1e-5)
    assert float(found[1].total.sum()) == pytest.approx(float(loss[1][2] + loss[1][5] + loss[1][6]), rel=1e-5)
    assert int(FunctionTokens().losses(model, documents, classes)[0].tokens.sum()) == 3


def test_half_of_a_fall_lies_between_checkpoints():
    steps = torch.tensor([0, 10, 20, 40])
    losses = torch.tensor([[8.0, 6.0, 2.0, 0.0], [8.0, 0.0, 1.0, 2.0], [4.0, 4.0, 4.0, 4.0], [1.0, 2.0, 3.0, 0.0]])
    found = half_fall(steps, losses)
    assert found[:2].tolist() == [15.0, 5.0] and found[2].isnan()
    assert float(found[3]) == pytest.approx(20 + 20 * 2.5 / 3)  # half is reached at last, after a rise


# features


def plain_edges(tokens, active):
    return sorted(
        {(int(v), i) for v, row in zip(tokens, active.tolist(), strict=True) for i, on in enumerate(row) if on}
    )


def drawn(seed, N=23, F=13, V=6):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (N,), generator=generator)
    return tokens, torch.rand(N, F, generator=generator) < 0.15


@given(st.integers(0, 1000))
def test_edges_degrees_and_coverage_are_those_of_sets(seed):
    tokens, active = drawn(seed)
    edges, wanted = feature_edges(tokens, active), plain_edges(tokens, active)
    assert list(map(tuple, edges.tolist())) == wanted
    sets = [{i for v, i in wanted if v == token} for token in range(7)]
    assert degrees(edges, 7).tolist() == [len(one) for one in sets]
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))  # 6 never occurs
    every = set().union(*sets)
    so_far = [len(set().union(*[sets[v] for v in order[: r + 1]])) / len(every) for r in range(7)]
    coverage = cumulative_coverage(edges, order)
    assert coverage.tolist() == pytest.approx(so_far)
    assert float(coverage[-1]) == 1 and bool((coverage.diff() >= 0).all())
    assert cumulative_coverage(edges, order[:3]).tolist() == pytest.approx(so_far[:3])
    assert activation_rate(edges, 13) == len(every) / 13


def test_occurrences_of_a_type_are_interchangeable_and_batches_join():
    tokens, active = drawn(3)
    edges = feature_edges(tokens, active)
    turned = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    assert torch.equal(feature_edges(tokens[turned], active[turned]), edges)
    halves = [feature_edges(tokens[:9], active[:9]), feature_edges(tokens[9:], active[9:])]
    assert torch.equal(torch.cat(halves).unique(dim=0), edges)


def test_active_is_above_the_threshold_not_above_zero():
    pre = torch.tensor([[0.5, 0.5, -1.0], [2.0, 0.3, 0.0]])
    assert active_features(pre).tolist() == [[True, True, False], [True, True, False]]
    assert active_features(pre, torch.tensor([1.0, 0.3, -0.5])).tolist() == [[False, True, False], [True, False, True]]


def test_coverage_at_positions():
    active = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]).bool()
    assert coverage_at(active, torch.tensor([0, 1])) == 2 / 4 and coverage_at(active, torch.arange(4)) == 1.0
    assert learned_features(active) == 4 and mean_active(active) == 5 / 4


def test_frequency_alone_makes_no_difference_per_occurrence():
    """All positions alike: the frequent class covers more in all, and no more per occurrence."""
    generator = torch.Generator().manual_seed(0)
    active, function = torch.rand(400, 60, generator=generator) < 0.02, torch.arange(400) < 300
    assert coverage_at(active, function.nonzero()[:, 0]) > coverage_at(active, (~function).nonzero()[:, 0]) + 0.05
    found = per_occurrence(active, function, 40)
    assert found.shape == (40, 3) and float((found[:, 0] - found[:, 1]).mean().abs()) < 0.05
    active[:300] = active[:1]  # the same few features at each function token
    found = per_occurrence(active, function, 40)
    assert bool((found[:, 0] < found[:, 1]).all())
    assert torch.equal(found, per_occurrence(active, function, 40)) and found[:, 1].unique().numel() > 1
    assert not torch.equal(found, per_occurrence(active, function, 40, seed=1))


def test_per_occurrence_needs_both_classes():
    with pytest.raises(ValueError, match="got 1 and 3"):
        per_occurrence(torch.ones(4, 2, dtype=torch.bool), torch.arange(4) < 1, 3)


def test_reactivated_features_have_fired_before():
    active = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1]]).bool()
    assert reactivated(active).tolist() == [
        [False, False, False], [True, False, False], [False, True, True], [True, True, True],
    ]  # fmt: skip
    assert torch.equal(reactivated(torch.stack([active, active.flip(0)]))[0], reactivated(active))


# the autoencoder


def test_only_the_largest_positive_features_are_active():
    sae = TopKSAE(5, 12, k=3)
    h = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    z, pre = sae.encode(h), (h - sae.b_d) @ sae.encoder.mT + sae.b_e
    for row, values in zip(z, pre, strict=True):
        largest = values.topk(3).indices
        wanted = torch.zeros(12).scatter(0, largest, values[largest].clamp_min(0))
        assert torch.equal(row, wanted)
    torch.testing.assert_close(sae.decode(z), z @ sae.decoder + sae.b_d)
    with pytest.raises(ValueError, match=r"k must be in \[1, width\]"):
        TopKSAE(5, 2, k=3)


def test_training_explains_states_made_of_few_directions():
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=-1)
    chosen = torch.rand(2000, 24, generator=generator).argsort(-1)[:, :3]
    h = 1.0 + directions[chosen].sum(1) * 3  # (2000, 16)
    sae = train_sae(h, 48, 3, steps=300, batch=128, rate=5e-3)
    torch.testing.assert_close(sae.decoder.norm(dim=-1), torch.ones(48))
    left = (h - sae.decode(sae.encode(h))).square().mean() / (h - h.mean(0)).square().mean()
    assert float(left) < 0.35 and not any(p.requires_grad for p in sae.parameters())
    assert learned_features(sae.encode(h) > 0) > 36  # few stay dead
    again = train_sae(h, 48, 3, steps=300, batch=128, rate=5e-3)
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), again.parameters(), strict=True))


# a model


def test_steering_adds_at_one_position():
    h, f = torch.zeros(2, 4, 3), torch.tensor([1.0, 0.0, -2.0])
    found = steer(h, f, 0.5, 2)
    assert found[:, 2].tolist() == [[0.5, 0.0, -1.0]] * 2 and int(found.count_nonzero()) == 4


def test_a_steered_model_is_changed_at_the_position_and_only_meanwhile():
    model = recall_model(0)
    ids = torch.tensor([[3, 200, 17, 210, 9]])
    f = torch.randn(64, generator=torch.Generator().manual_seed(0))
    before = [hidden_states(model, ids, layer) for layer in (0, 1)]
    with steering(model, f, 2.0, layer=0, position=3):
        during = hidden_states(model, ids, 0)
        later = hidden_states(model, ids, 1)
        told = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        single = model(ids[:, :1]).logits
    torch.testing.assert_close(during[:, 3], before[0][:, 3] + 2 * f)
    assert torch.equal(during[:, :3], before[0][:, :3]) and torch.equal(during[:, 4:], before[0][:, 4:])
    assert torch.equal(later[:, :3], before[1][:, :3]) and not torch.allclose(later[:, 4], before[1][:, 4])
    assert told.shape == (1, 8) and torch.equal(hidden_states(model, ids, 1), before[1])
    assert torch.equal(model(ids[:, :1]).logits, single)


@pytest.mark.parametrize(
    "layer, position, said", [(2, 0, r"layer must be in \[0, 1\]"), (0, -1, "position must be >= 0")]
)
def test_places_that_are_not_there_are_refused(layer, position, said):
    with pytest.raises(UsageError, match=said), steering(recall_model(0), torch.zeros(64), 1.0, layer, position):
        pass


def test_the_last_function_token_of_a_prompt():
    classes = torch.tensor([FUNCTION, CONTENT, CONTENT])
    assert last_function(torch.tensor([1, 0, 2, 0, 1]), classes) == 3
    with pytest.raises(PromptError, match="none among 2"):
        last_function(torch.tensor([1, 2]), classes)
