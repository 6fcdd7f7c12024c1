import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from seqwise.core.config import known_classes
from seqwise.core.errors import PromptError, UnsupportedModel, UsageError
from seqwise.core.method import Method
from seqwise.insight.probe import token_reduction_beyond_efficiency as module
from seqwise.insight.probe.token_reduction_beyond_efficiency import (
    FACETS,
    NO_POWER,
    NOT_SUPPORTED,
    SUPPORTED,
    BeyondEfficiency,
    Item,
    Paired,
    absent_objects,
    attention_score,
    check_facets,
    coverage_entropy,
    distil,
    efficiency_reward,
    entropy_score,
    exact_length_reward,
    excess_loss_mask,
    first_unused_layer,
    gradient_score,
    hit_rate,
    judge,
    kept_count,
    loss_spikes,
    lower_half_share,
    maximum_length_reward,
    merge,
    modality_gap,
    nearest,
    norm_variation,
    object_purity,
    package,
    paired_bootstrap,
    pool,
    position_correlation,
    presence_f1,
    prune,
    recall_area,
    reduce,
    repeated_ngrams,
    similarity_score,
    steps_to,
    tokens_per_correct,
    training_role,
    withdrawal_kl,
    word_alignment,
    yes_rate,
)
from seqwise.methods.reduce.baselines import AveragePool
from seqwise.methods.reduce.fopru import FoPru
from seqwise.testing.families import FAMILIES


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# the taxonomy


def test_facets_are_checked_and_made_tuples():
    said = {"modality": "multimodal", "criterion": ["attention(text)", "transition"], "aims": ()}
    assert check_facets(said) == {
        "modality": ("multimodal",), "criterion": ("attention(text)", "transition"), "aims": ()
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"facet site must be some of encoder, .*, got 'decoder'"):
        check_facets({"site": "decoder"})
    with pytest.raises(ValueError, match=r"facets must be some of modality, .*, got 'colour'"):
        check_facets({"colour": "red"})
    assert all(check_facets({name: values}) == {name: values} for name, values in FACETS.items())


# the workflow


@pytest.mark.parametrize("N, keep, M", [(40, 1 - 0.7, 12), (40, 0.3, 12), (10, 1.0, 10), (10, 0.29, 2), (3, 0.1, 0)])
def test_counts_survive_rounding(N, keep, M):
    assert kept_count(N, keep) == M


def test_keep_is_a_share_of_what_stays():
    for keep in (0.0, -0.5, 1.5):
        with pytest.raises(ValueError, match=r"keep must be in \(0, 1\]"):
            kept_count(10, keep)
    with pytest.raises(ValueError, match=r"keep must leave at least one of 3 tokens, got 0\.1"):
        reduce(draw(3, 2), torch.rand(3), "prune-hard", 0.1)
    with pytest.raises(ValueError, match=r"strategy must be one of prune-hard, .*, got 'drop'"):
        reduce(draw(3, 2), torch.rand(3), "drop", 1.0)


def test_attention_of_all_rows_is_the_column_mean_times_their_number():
    A = draw(2, 3, 7, 7).softmax(-1)
    torch.testing.assert_close(attention_score(A), A.mean(-3).mean(-2) * 7)
    cls = torch.arange(7) == 0
    torch.testing.assert_close(attention_score(A, cls), A[..., 0, :].mean(-2))


def test_criteria():
    X = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    torch.testing.assert_close(similarity_score(X), torch.tensor([0.5, 0.5, 1.0]))  # the third repeats nobody
    assert gradient_score(torch.tensor([[3.0, 4.0]])).tolist() == [5.0]
    torch.testing.assert_close(entropy_score(torch.zeros(2, 8)), torch.full((2,), math.log(8)))
    assert entropy_score(torch.tensor([0.0, 100.0])) < 1e-6


def test_pruning_keeps_the_order():
    X = draw(5, 3)
    s = torch.tensor([0.1, 0.9, 0.3, 0.9, 0.5])
    tokens, index = prune(X, s, 3)
    assert index.tolist() == [1, 3, 4] and tokens.equal(X[[1, 3, 4]])


def test_packaging_conserves_the_weighted_sum():
    X, s = draw(2, 9, 3), torch.rand(2, 9, generator=torch.Generator().manual_seed(1))
    tokens, index = package(X, s, 4)
    assert tokens.shape == (2, 5, 3)
    dropped = s.sum(-1) - s.gather(-1, index).sum(-1)
    weight = torch.cat([s.gather(-1, index), dropped[:, None]], -1)
    torch.testing.assert_close((weight[..., None] * tokens).sum(-2), (s[..., None] * X).sum(-2))
    alike, _ = package(X[0], torch.tensor([1.0] * 4 + [0.0] * 5), 4)
    torch.testing.assert_close(alike[-1], X[0, 4:].mean(0))
    assert package(X, s, 9)[0].equal(X)  # nothing to package


@given(seed=st.integers(0, 10_000), n=st.integers(2, 9))
def test_merging_with_sizes_is_associative(seed, n):
    g = torch.Generator().manual_seed(seed)
    X, sizes = draw(n, 3, seed=seed).double(), torch.randint(1, 5, (n,), generator=g)
    first, second = torch.randint(4, (n,), generator=g), torch.randint(2, (4,), generator=g)
    once, total = merge(X, second[first], 2, sizes)
    half, between = merge(X, first, 4, sizes)
    twice, same = merge(half, second, 2, between)
    assert total.equal(same) and total.sum() == sizes.sum()
    torch.testing.assert_close(once, twice)


def test_merging_read_by_eye():
    X = torch.tensor([[1.0], [3.0], [8.0]])
    tokens, sizes = merge(X, torch.tensor([0, 0, 2]), 3, torch.tensor([1, 3, 1]))
    assert tokens.flatten().tolist() == [2.5, 0.0, 8.0] and sizes.tolist() == [4, 0, 1]


def test_half_precision_counts_all_patches():
    X = torch.ones(1001, 1, dtype=torch.bfloat16)
    tokens, sizes = merge(X, torch.zeros(1001, dtype=torch.long), 1)
    assert sizes.tolist() == [1001] and tokens.tolist() == [[1]] and tokens.dtype == torch.bfloat16


def test_centres_are_their_own():
    X = torch.tensor([[1.0, 0.0], [5.0, 0.1], [0.0, 1.0], [0.2, 1.0]])
    assert nearest(X, torch.tensor([0, 3])).tolist() == [0, 0, 1, 1]
    assert nearest(X[[0, 0]], torch.tensor([0, 1])).tolist() == [0, 1]  # although they are the same


def test_pooling_and_distilling():
    X = draw(6, 4)
    torch.testing.assert_close(pool(X, 3), X.view(3, 2, 4).mean(1))
    Q, W_K, W_V = draw(2, 5, seed=1), draw(4, 5, seed=2), draw(4, 3, seed=3)
    wanted = torch.stack([
        sum(w * (x @ W_V) for w, x in zip((Q[i] @ (X @ W_K).T / 5**0.5).softmax(-1), X, strict=True)) for i in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(distil(X, Q, W_K, W_V), wanted)


@pytest.mark.parametrize("strategy", ["prune-hard", "prune-soft", "merge", "transform"])
def test_the_workflow(strategy):
    X, s = draw(2, 8, 3), torch.rand(2, 8, generator=torch.Generator().manual_seed(2))
    whole = reduce(X, s, strategy, 1.0)
    torch.testing.assert_close(whole.tokens, X)
    assert whole.sizes.eq(1).all() and whole.member.equal(torch.arange(8).expand(2, 8))
    half = reduce(X, s, strategy, 0.5)
    M = 5 if strategy == "prune-soft" else 4
    assert half.tokens.shape == (2, M, 3) and half.sizes.shape == (2, M)
    lost = 4 if strategy == "prune-hard" else 0
    assert (half.member < 0).sum(-1).tolist() == [lost] * 2 and half.sizes.sum(-1).tolist() == [8 - lost] * 2
    for j in range(M):
        assert (half.member == j).sum(-1).tolist() == half.sizes[:, j].tolist()
    if strategy != "transform":
        same = reduce(X, lambda x: s, strategy, 0.5)
        assert same.tokens.equal(half.tokens)
        kept = s.topk(4).indices.sort(-1).values
        assert half.member.gather(-1, kept).equal(torch.arange(4).expand(2, 4))
    if strategy == "merge":
        weighed = reduce(X, s, strategy, 0.5, sizes=torch.arange(1, 9).expand(2, 8))
        torch.testing.assert_close(weighed.tokens, merge(X, half.member, 4, torch.arange(1, 9).expand(2, 8))[0])
        assert weighed.sizes.sum() == 2 * 36


# metrics


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12))
def test_position_correlation_is_spearmans_with_ties(s):
    found = float(position_correlation(torch.tensor(s).float()))
    if len(set(s)) == 1:
        assert found == 0
    else:
        assert found == pytest.approx(spearmanr(s, range(len(s))).statistic)


def test_a_selector_of_the_last_tokens_is_biased_and_covers_little():
    kept = torch.arange(64) >= 48
    assert position_correlation(torch.arange(64.0)) == pytest.approx(1)
    assert lower_half_share(kept) == 1
    assert coverage_entropy(kept, (8, 8)) == pytest.approx(math.log(4) / math.log(16))  # the lowest row of cells


def test_a_selector_by_chance_is_unbiased_and_covers_all():
    luck = torch.rand(400, 64, generator=torch.Generator().manual_seed(0))
    kept = luck >= luck.kthvalue(48, -1, keepdim=True).values
    assert abs(float(position_correlation(luck).mean())) < 0.02
    assert abs(float(lower_half_share(kept).mean()) - 0.5) < 0.02
    assert 0.75 < float(coverage_entropy(kept, (8, 8)).mean()) < 0.95
    assert coverage_entropy(torch.ones(64, dtype=torch.bool), (8, 8)) == pytest.approx(1)
    assert coverage_entropy(torch.arange(63) == 5, (7, 9)) == 0
    assert lower_half_share(torch.tensor([True, True, True, False, False])) == 0  # the middle one is no lower half


def test_hits():
    kept = torch.tensor([True, False, True, False])
    assert hit_rate(kept, torch.tensor([True, True, False, False])) == 0.5
    assert hit_rate(kept, torch.zeros(4, dtype=torch.bool)).isnan()


def test_withdrawal():
    p, q = torch.tensor([0.5, 0.5, 1e-30]), torch.tensor([0.9, 0.1, 1e-30])
    kl = withdrawal_kl(p.log(), torch.stack([p, q]).log())
    assert kl[0].abs() < 1e-9 and float(kl[1]) == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5))
    assert first_unused_layer(torch.tensor([0.9, 0.04, 0.2]), 0.05) == 2
    assert first_unused_layer(torch.tensor([0.9, 0.9]), 0.05) is None


def test_alignment_metrics():
    words, visual = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[5.0, 0.0], [1.0, 1.0]])
    assert float(word_alignment(words, visual)) == pytest.approx((1 + 0.5**0.5) / 2)
    assert float(modality_gap(visual[:1], words[:1])) == 0
    assert float(modality_gap(-visual[:1], words[:1])) == pytest.approx(2)
    purity = object_purity(torch.tensor([0, 0, 0, 1, -1, 1]), torch.tensor([2, 2, -1, 0, 0, -1]), 3)
    assert purity[:2].tolist() == pytest.approx([2 / 3, 0.5]) and purity[2].isnan()


def test_output_metrics():
    assert tokens_per_correct([4, 6, 10], [True, False, True]) == 10 and tokens_per_correct([3], [False]) == math.inf
    assert repeated_ngrams([1, 2, 3, 1, 2, 3, 1], 3) == pytest.approx(2 / 5) and repeated_ngrams([1, 2], 3) == 0
    assert yes_rate([True, False, False, True]) == 0.5
    yes, truth = [True, True, False, False], [True, False, True, False]
    assert presence_f1(yes, truth) == 0.5 and presence_f1([False], [False]) == 0
    assert absent_objects(["cup", "dog", "dog", "cat"], ["cat"]) == 2


def test_training_metrics():
    assert norm_variation([1.0, 3.0]) == 0.5 and norm_variation([2.0, 2.0]) == 0
    flat = [1.0, 1.1] * 30
    assert loss_spikes(flat) == 0 and loss_spikes([*flat, 9.0, *flat]) == 1 and loss_spikes([9.0] * 20) == 0
    assert loss_spikes([0.0, 9.0, *[1.0] * 48]) == 0  # no window before them
    assert steps_to([3.0, 2.0, 1.0], 2.0) == 2 and steps_to([3.0], 2.0) is None
    current, reference = torch.tensor([3.0, 3.0, 0.1, 2.0]), torch.tensor([3.0, 1.0, 0.1, 1.5])
    assert excess_loss_mask(current, reference, 0.5).tolist() == [False, True, False, True]
    assert recall_area([10, 20, 40], [1.0, 0.5, 0.5]) == pytest.approx((7.5 + 10) / 30)


@pytest.mark.parametrize(
    "correct, n, exact, maximum",
    [(True, 100, 1.0, 0.5), (True, 60, 0.6, 0.9), (True, 300, -1.0, 0.0), (False, 90, -0.1, 0.0), (True, 20, 0.2, 1.0)],
)
def test_length_rewards(correct, n, exact, maximum):
    assert exact_length_reward(correct, 100, n, 0.01) == pytest.approx(exact)
    assert maximum_length_reward(correct, 100, n, 0.01) == pytest.approx(maximum)


def test_efficiency_reward():
    assert efficiency_reward(50, 1.0, 100, 0.5, 2.0) == pytest.approx(2.0)
    assert efficiency_reward(100, 0.5, 100, 0.5, 2.0) == 0


# intervals and verdicts


def test_paired_bootstrap():
    ours = [1.0, 0.0, 1.0, 1.0] * 10
    theirs = [1.0, 0.0, 0.0, 1.0] * 10
    found = paired_bootstrap(ours, theirs)
    assert found.mean == 0.25 and found.low < 0.25 < found.high and found.n == 40
    assert 0.05 < found.low < 0.2 and paired_bootstrap(ours, theirs) == found
    spread = [x / 7 for x in range(20)]
    assert paired_bootstrap(spread, [0.0] * 20, 1) != paired_bootstrap(spread, [0.0] * 20)
    same = paired_bootstrap(theirs, theirs)
    assert (same.low, same.high) == (0, 0)
    with pytest.raises(ValueError, match="as many items on both sides, got 2 and 1"):
        paired_bootstrap([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    "low, high, verdict, no_less",
    [
        (0.01, 0.2, SUPPORTED, SUPPORTED),
        (-0.02, 0.2, NO_POWER, SUPPORTED),
        (-0.2, 0.2, NO_POWER, NO_POWER),
        (-0.2, 0.04, NOT_SUPPORTED, NO_POWER),
        (-0.2, -0.01, NOT_SUPPORTED, NOT_SUPPORTED),
    ],
)
def test_verdicts(low, high, verdict, no_less):
    found = Paired((low + high) / 2, low, high, 40)
    assert judge(found, 0.05) == verdict and judge(found, 0.05, no_less=True) == no_less
    assert judge(replace(found, n=7), 0.05) == NO_POWER


# the probe


@dataclass(frozen=True)
class Last(Method):
    """Keeps the last `count` visual tokens."""

    abstract: ClassVar[bool] = True
    count: int = 4

    slots: ClassVar[tuple[str, ...]] = ("input.rows",)

    def cut_input(self, stage):
        behind = stage.visual.flip(-1).cumsum(-1).flip(-1)
        return stage.live & ~(stage.visual & (behind > self.count))


@pytest.fixture(scope="module")
def llava():
    return FAMILIES["llava"].tiny()


def items_of(n: int = 9, lengths=(6,), **facts) -> list[Item]:
    family = FAMILIES["llava"]
    relevant = torch.arange(16) >= 14
    made = []
    for i in range(n):
        batch = family.prompt(lengths[i % len(lengths)], seed=i)
        made.append(Item(batch, answer=1 + i, relevant=relevant, **facts))
    return made


def row(found, metric, baseline=None):
    (one,) = [r for r in found.rows if r.metric == metric and baseline in (None, r.baseline)]
    return one


def test_the_last_tokens_hit_what_is_below_and_nothing_else(llava):
    found = BeyondEfficiency(max_new_tokens=2).probe(llava, items_of(), Last(count=4))
    hit = row(found, "hit rate")
    assert (hit.ours, hit.theirs, hit.verdict) == (1.0, 0.25, SUPPORTED) and hit.difference.n == 9
    assert hit.pairs == ((1.0, 0.25),) * 9
    bias = row(found, "position bias")
    assert bias.ours == 0.5 > bias.theirs and bias.verdict == NOT_SUPPORTED and bias.difference.high < 0
    coverage = row(found, "coverage")  # one line of four cells
    assert coverage.ours == pytest.approx(0.5) and coverage.theirs == pytest.approx(0.5)
    assert found.kept == 0.25 and 0 < found.work < 1
    assert len(found.depth) == 3 and all(kl > 0 for kl in found.depth)
    missed = BeyondEfficiency(max_new_tokens=2).probe(
        llava, [replace(item, relevant=torch.arange(16) < 2) for item in items_of()], Last(count=4)
    )
    assert row(missed, "hit rate").verdict == NOT_SUPPORTED


def test_a_model_that_ignores_its_image_loses_nothing_without_it():
    blind = FAMILIES["llava"].tiny()
    for layer in blind.model.language_model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    found = BeyondEfficiency(max_new_tokens=1).probe(blind, items_of(), Last())
    assert max(found.depth) < 1e-9
    (late,) = [r for r in found.rows if r.metric.startswith("KL without")]
    assert late.verdict == SUPPORTED and late.theirs == pytest.approx(0.05)


def test_withdrawal_equals_a_run_without_the_image_rows(llava):
    """After the last layer but one, the image reaches the last row through one attention."""
    item = items_of(1)[0]
    found = BeyondEfficiency(max_new_tokens=1).probe(llava, [item], Last())
    with torch.no_grad():
        full = llava(**item.inputs).logits[0, -1]
        with FoPru(budget=1.0).on(llava):
            assert llava(**item.inputs).logits[0, -1].equal(full)
        with module._Withdrawn(layer=2).on(llava) as run:
            cut = llava(**item.inputs).logits[0, -1]
    assert len(run.kept()[0]["layer 2"]) == 8  # six words and the two marks around the image
    assert found.depth[1] == pytest.approx(float(withdrawal_kl(full, cut[None])[0]), rel=1e-4)


def test_chance_keeps_as_many_tokens_and_the_seed_decides(llava):
    items = items_of(3)
    found = [BeyondEfficiency(max_new_tokens=1, seed=seed).probe(llava, items, Last()) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    masks = []
    hook = llava.model.language_model.layers[0].register_forward_pre_hook(lambda m, a: masks.append(a[0].shape[1]))
    try:
        BeyondEfficiency(max_new_tokens=1).probe(llava, items[:1], Last())
    finally:
        hook.remove()
    assert masks[:3] == [24, 12, 12]  # plain, the method, chance


def test_alignment_reads_the_tokens_that_stay(llava):
    items = items_of(9)
    found = BeyondEfficiency(max_new_tokens=1).probe(llava, items, Last())
    with torch.no_grad():
        wanted = []
        for item in items:
            features = llava.get_image_features(item.inputs["pixel_values"]).pooler_output[0][-4:]
            word = llava.get_input_embeddings().weight[item.answer]
            wanted.append(torch.cosine_similarity(word[None], features).max())
    assert row(found, "word alignment").ours == pytest.approx(float(torch.stack(wanted).mean()), abs=1e-5)
    assert row(found, "modality gap").theirs > 0
    assert row(found, "object purity").note == "no item tells"


def test_purity_of_merged_tokens(llava):
    owner = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3])
    found = BeyondEfficiency(max_new_tokens=1).probe(llava, items_of(9, owner=owner), AveragePool(budget=4))
    purity = row(found, "object purity")
    assert purity.ours == 1.0 > purity.theirs and purity.verdict == SUPPORTED


def test_alignment_reads_merged_tokens_as_they_are(llava):
    items = items_of(9)
    found = BeyondEfficiency(max_new_tokens=1).probe(llava, items, AveragePool(budget=4))
    with torch.no_grad():
        wanted = []
        for item in items:
            whole = llava.get_image_features(item.inputs["pixel_values"]).pooler_output[0]
            pooled = whole.view(2, 2, 2, 2, -1).mean((1, 3)).flatten(0, 1)
            wanted.append(torch.cosine_similarity(llava.get_input_embeddings().weight[item.answer][None], pooled).max())
    assert row(found, "word alignment").ours == pytest.approx(float(torch.stack(wanted).mean()), abs=1e-5)


def test_answers_are_compared_with_the_plain_model_and_with_chance(llava):
    items = items_of(10)
    with torch.no_grad():
        said = [int(llava(**item.inputs).logits[0, -1].argmax()) for item in items]
    yes = max(set(said), key=said.count)
    items = [replace(item, present=False, answer=word) for item, word in zip(items, said, strict=True)]
    found = BeyondEfficiency(max_new_tokens=3).probe(llava, items, Last(), yes=yes)
    absent = row(found, "yes to absent objects", "the plain model")
    assert absent.theirs == pytest.approx(said.count(yes) / 10)
    assert found.accuracy[1] == 1.0 and found.tokens_per_correct[1] == 3
    for baseline in ("the plain model", "chance"):
        length = row(found, "tokens per answer", baseline)
        assert (length.ours, length.theirs, length.verdict) == (3, 3, NOT_SUPPORTED)
    silent = BeyondEfficiency(max_new_tokens=1).probe(llava, items, Last())
    assert row(silent, "yes to absent objects", "chance").note == "no item tells"


def test_what_was_not_measured_has_no_power(llava):
    found = BeyondEfficiency(max_new_tokens=1).probe(llava, items_of(3), FoPru(budget=1.0))
    assert {r.verdict for r in found.role(1) if r.metric in ("hit rate", "coverage")} == {NO_POWER}
    assert found.role(4)[0].verdict == NO_POWER and "training_role" in found.role(4)[0].note
    assert found.role(5)[0].note == "all prompts have one length"
    assert all(r.verdict == NO_POWER for r in found.rows if r.difference is not None)  # under eight items


def test_long_input_is_an_area_over_lengths(llava):
    items = items_of(9, lengths=(6, 10, 40))
    with torch.no_grad():
        said = [int(llava(**item.inputs).logits[0, -1].argmax()) for item in items]
    items = [replace(item, answer=said[i] if i % 3 < 2 else said[i] - 1) for i, item in enumerate(items)]
    found = BeyondEfficiency(max_new_tokens=1).probe(llava, items, FoPru(budget=1.0))
    assert found.accuracy == (6 / 9, 6 / 9)
    assert row(found, "area under recall over length").ours == pytest.approx(recall_area([24, 28, 58], [1, 1, 0]))


def test_training_rows():
    full = [[3.0 - 0.01 * i for i in range(100)]] * 9
    fast = [[3.0 - 0.02 * i for i in range(100)]] * 9
    spikes, steps = training_role(full, fast, 2.5)
    assert (steps.ours, steps.theirs) == pytest.approx((0.26, 0.51)) and steps.verdict == SUPPORTED
    assert spikes.verdict == NOT_SUPPORTED and spikes.role == 4
    assert training_role(full[:2], fast[:2], 2.5)[1].verdict == NO_POWER


def test_refusals(llava):
    probe = BeyondEfficiency(max_new_tokens=1)
    with pytest.raises(UsageError, match="items must hold at least one prompt"):
        probe.probe(llava, [], Last())
    with pytest.raises(PromptError, match="item 0 has no visual tokens"):
        probe.probe(llava, [Item(FAMILIES["llava"].prompt(6, images=0), 1)], Last())
    with pytest.raises(PromptError, match="item 0: relevant must have 16 entries, one per visual token, got 3"):
        probe.probe(llava, [replace(items_of(1)[0], relevant=torch.ones(3, dtype=torch.bool))], Last())
    with pytest.raises(UnsupportedModel, match="vision tower"):
        probe.probe(FAMILIES["llama"].tiny(), items_of(1), Last())
    with pytest.raises(ValueError, match=r"BeyondEfficiency\.cells must be >= 2, got 1"):
        BeyondEfficiency(cells=1)
    assert not {"_Only", "_Withdrawn"} & set(known_classes(Method))
