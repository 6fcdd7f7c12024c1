import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression

from seqwise.core.errors import PromptError, UnsupportedModel
from seqwise.insight.probe.base import surprisals
from seqwise.insight.probe.prior_distribution import (
    INSTRUCTION,
    Adapters,
    Item,
    PriorInfluence,
    affine_lens,
    answer_scores,
    average_ranks,
    bystander,
    computed_inside,
    last_streams,
    lens,
    log_prior,
    logistic_slope,
    margins,
    prior_layer,
    rival,
    spearman,
    split_answers,
    towards_prior,
    truth_rank,
    unlikely,
)
from seqwise.lab.zoo.recall import recall_model

# the prior


def test_the_prior_is_a_mean_over_templates_normalised_over_answers():
    scores = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -2.0, 0.0]])
    found = log_prior(scores)
    mean = torch.tensor([-2.0, -2.0, -2.0])
    torch.testing.assert_close(found, mean.double().log_softmax(-1))
    assert float(found.exp().sum()) == pytest.approx(1)
    assert log_prior(scores[:1]).tolist() == pytest.approx((scores[0] - scores[0].exp().sum().log()).tolist())


@pytest.mark.parametrize(
    "log_pi, truth, wanted",
    [
        ([1.0, 2.0, 3.0, 4.0], 1, True),  # one of four below
        ([1.0, 2.0, 3.0, 4.0], 2, False),  # two of four: not fewer than half
        ([1.0, 2.0, 3.0], 1, True),
        ([1.0, 2.0, 3.0], 2, False),
        ([2.0, 2.0, 2.0], 2, True),  # none is strictly smaller
    ],
)
def test_unlikely_is_the_bottom_half(log_pi, truth, wanted):
    assert unlikely(torch.tensor(log_pi), truth) is wanted


def test_errors_towards_the_prior():
    log_pi = torch.tensor([-1.0, -2.0, -1.0])
    assert towards_prior(log_pi, 1, 0) is True and towards_prior(log_pi, 0, 1) is False
    assert towards_prior(log_pi, 0, 2) is False and towards_prior(log_pi, 1, 1) is False


@given(st.integers(1, 21), st.integers(0, 50))
def test_halves_are_disjoint_and_alike_in_prior(n, seed):
    log_pi = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    one, two = split_answers(log_pi, seed)
    assert sorted([*one, *two]) == list(range(n)) and abs(len(one) - len(two)) <= 1
    assert one == sorted(one)
    order = log_pi.argsort(descending=True, stable=True).tolist()
    for start in range(0, n - 1, 2):
        pair = set(order[start : start + 2])
        assert len(pair & set(one)) == len(pair & set(two)) == 1
    assert split_answers(log_pi, seed) == (one, two)


def test_halves_depend_on_the_seed():
    assert len({str(split_answers(torch.arange(20.0), seed)) for seed in range(5)}) == 5


# ranks and regressions


@given(st.lists(st.integers(0, 4), min_size=3, max_size=12), st.integers(0, 99))
def test_rank_correlation_with_ties_is_scipys(values, seed):
    x = torch.tensor(values, dtype=torch.float64)
    y = torch.randint(4, x.shape, generator=torch.Generator().manual_seed(seed)).double()
    found = float(spearman(x, y))
    if len(set(values)) == 1 or len(set(y.tolist())) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(spearmanr(values, y).statistic, abs=1e-12)


def test_ranks_share_ties_and_batch():
    x = torch.tensor([[3.0, 1.0, 3.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert average_ranks(x).tolist() == [[3.5, 2.0, 3.5, 1.0], [2.5] * 4]
    y = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    z = torch.randn(7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(spearman(y, z.expand_as(y)), torch.stack([spearman(row, z) for row in y]))


def test_the_slope_is_the_unpenalised_maximum():
    x = torch.linspace(-4, 3, 60, dtype=torch.float64) * 2 - 7
    hits = (torch.rand(60, generator=torch.Generator().manual_seed(0)) < (0.8 * (x + 8)).sigmoid()).double()
    found = logistic_slope(x, hits)
    other = LogisticRegression(C=1e12, tol=1e-10, max_iter=10_000).fit(x[:, None].numpy(), hits.numpy())
    assert found.slope == pytest.approx(float(other.coef_[0, 0]), rel=1e-3)
    assert found.intercept == pytest.approx(float(other.intercept_[0]), rel=1e-3)
    p = (found.intercept + found.slope * x).sigmoid()
    X = torch.stack([torch.ones_like(x), x], -1)
    error = torch.linalg.inv(X.mT @ (X * (p * (1 - p))[:, None]))[1, 1].sqrt()
    assert found.error == pytest.approx(float(error), rel=1e-6)
    assert found.p == pytest.approx(math.erfc(abs(found.slope / found.error) / 2**0.5), rel=1e-6)
    mirrored = logistic_slope(-x, hits)
    assert (mirrored.slope, mirrored.p) == pytest.approx((-found.slope, found.p))


@pytest.mark.parametrize(
    "x, hits",
    [
        ([1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1]),  # separated
        ([1.0, 2.0, 3.0, 4.0], [1, 1, 0, 0]),
        ([1.0, 2.0, 2.0, 4.0], [0, 0, 1, 1]),  # up to a tie: no finite slope either
        ([1.0, 2.0, 3.0], [1, 1, 1]),
        ([2.0, 2.0, 2.0], [0, 1, 1]),
        ([], []),
    ],
)
def test_without_a_finite_slope_all_is_nan(x, hits):
    assert all(map(math.isnan, logistic_slope(torch.tensor(x), torch.tensor(hits))))


# the lens


def test_the_lens_norms_once():
    h = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    head, bias = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)), torch.arange(4.0)
    norm = torch.nn.LayerNorm(5)
    torch.testing.assert_close(lens(h, norm, head, bias), norm(h) @ head.T + bias)
    torch.testing.assert_close(lens(h, None, head), h @ head.T)
    assert lens(h.bfloat16(), None, head.bfloat16()).dtype == torch.float32


def test_an_affine_lens_learns_the_translation():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(400, 6, generator=generator) + 2
    A, c = torch.randn(6, 6, generator=generator), torch.randn(6, generator=generator)
    found_A, found_c = affine_lens(h, h @ A + c, ridge=1e-8)
    torch.testing.assert_close(found_A, A, atol=1e-3, rtol=0)
    torch.testing.assert_close(found_c, c, atol=5e-3, rtol=0)
    few_A, few_c = affine_lens(h[:3], h[:3], ridge=0.1)  # fewer states than directions: the identity
    torch.testing.assert_close(few_A, torch.eye(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(few_c, torch.zeros(6), atol=1e-5, rtol=0)


def test_the_rival_is_the_wrong_answer_or_the_runner_up():
    assert rival(torch.tensor([1.0, 5.0, 3.0]), 2) == 1 and rival(torch.tensor([1.0, 5.0, 3.0]), 1) == 2
    assert rival(torch.tensor([3.0, 5.0, 3.0]), 1) == 0  # ties: the earlier
    assert [bystander(4, truth, wrong) for truth, wrong in ((0, 1), (0, 2), (3, 0))] == [2, 1, 1]
    assert bystander(2, 0, 1) is None


def test_margins_ranks_and_layers():
    L = torch.tensor([[0.0, 1.0, 1.0], [3.0, 1.0, 2.0], [1.0, 1.0, 5.0], [0.0, 0.0, 9.0]])
    assert margins(L, 0, 2).tolist() == [-1, 1, -4, -9]
    assert truth_rank(L, 0).tolist() == [3, 1, 2.5, 2.5] and truth_rank(L, 1).tolist() == [1.5, 3, 2.5, 2.5]
    assert computed_inside(margins(L, 0, 2)).tolist() is True and computed_inside(margins(L, 1, 2)).tolist() is False
    assert computed_inside(torch.tensor([[-1.0, 0.0], [2.0, -1.0]])).tolist() == [True, False]


def test_the_prior_layer_has_the_largest_rise():
    assert prior_layer(torch.tensor([0.9, 0.1, 0.3, 0.8, 0.9])) == 3
    assert prior_layer(torch.tensor([0.0, 0.5, 0.0, 0.5])) == 1  # ties: the earlier; never the embedding
    assert prior_layer(torch.tensor([math.nan, 0.1, 0.2])) == 2


# a model


def test_answers_are_scored_whole_and_by_length():
    model = recall_model(0)
    prompts, answers = [[1, 2, 3], [4, 5]], [[7], [8, 9, 10]]
    found = answer_scores(model, prompts, answers)
    for p, prompt in enumerate(prompts):
        for y, answer in enumerate(answers):
            (s,) = surprisals(model, [[*prompt, *answer]])
            assert float(found[p, y]) == pytest.approx(-float(s[len(prompt) :].sum()) / len(answer), rel=1e-5)
    with pytest.raises(PromptError, match=r"one token each, got \[1, 0\]"):
        answer_scores(model, prompts, [[7], []])


def test_streams_are_those_of_each_prompt_alone_and_not_normed():
    model = recall_model(0, layers=3)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9], *[[i, i + 1] for i in range(9)]]
    h, logps = last_streams(model, prompts)
    assert h.shape == (4, 11, 64) and logps.shape == (11, 240)
    for p in (0, 1, 10):
        with torch.no_grad():
            out = model(torch.tensor([prompts[p]]), output_hidden_states=True)
        for layer in range(3):
            torch.testing.assert_close(h[layer, p], out.hidden_states[layer][0, -1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.model.norm(h[3, p]), out.hidden_states[3][0, -1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logps[p], out.logits[0, -1].log_softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("longer", [False, True])
def test_a_reading_is_made_of_the_formulas(longer):
    model = recall_model(0)
    candidates = [[100 + k, 7] if longer else [100 + k] for k in range(5)]
    items = [Item([1, 2, 3], candidates, 1), Item([9, 8, 7, 6], candidates, 4)]
    log_pi = torch.tensor([-1.0, -3.0, -2.0, -2.0, -0.5])
    found = PriorInfluence().read(model, items, [log_pi] * 2)
    h, logps = last_streams(model, [item.prompt for item in items])
    for p, (item, one) in enumerate(zip(items, found, strict=True)):
        scores = answer_scores(model, [item.prompt], candidates)[0]
        torch.testing.assert_close(one.scores, scores, atol=1e-4, rtol=1e-4)
        assert one.answer == int(scores.argmax()) and one.right == (one.answer == item.truth)
        with torch.no_grad():
            L = model.lm_head(model.model.norm(h[:, p]))[:, 100:105]
        wrong = rival(scores, item.truth)
        torch.testing.assert_close(one.margin, margins(L, item.truth, wrong), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            one.bystander, L[:, bystander(5, item.truth, wrong)] - L[:, wrong], atol=1e-4, rtol=1e-4
        )
        assert torch.equal(one.rank, truth_rank(L, item.truth))
        torch.testing.assert_close(one.rho, torch.stack([spearman(row, log_pi) for row in L]))
        if not longer:
            torch.testing.assert_close(L[-1] - L[-1, 0], logps[p, 100:105] - logps[p, 100], atol=1e-3, rtol=1e-3)


def test_first_tokens_that_are_the_same_are_told():
    model = recall_model(0)
    found = PriorInfluence().read(model, [Item([1, 2], [[100, 5], [100, 6]], 0)], [torch.zeros(2)])
    assert found[0].distinct is False and found[0].bystander is None and found[0].margin.tolist() == [0.0] * 3
    assert PriorInfluence().read(model, [Item([1, 2], [[100], [101]], 0)], [torch.zeros(2)])[0].distinct is True


@pytest.mark.parametrize("candidates, truth, pi", [([[1]], 0, 1), ([[1], [2]], 2, 2), ([[1], [2]], 0, 3)])
def test_items_that_do_not_fit_are_refused(candidates, truth, pi):
    with pytest.raises(PromptError, match="item 1 must have two candidates"):
        PriorInfluence().read(recall_model(0), [Item([1], candidates, truth)], [torch.zeros(pi)])


def test_the_instruction_comes_first_and_is_a_setting():
    assert PriorInfluence().instructed("Count.") == f"{INSTRUCTION} Count."
    assert PriorInfluence(instruction="Think.").instructed("Count.") == "Think. Count."


@pytest.mark.parametrize("field", [{"rank": 0}, {"rate": 0.0}, {"epochs": 0}, {"alpha": -1.0}, {"batch": 0}])
def test_settings_outside_their_range(field):
    (name,) = field
    with pytest.raises(ValueError, match=f"PriorInfluence.{name} must be"):
        PriorInfluence(**field)


# tuning


def test_adapters_begin_without_a_change_and_are_added_to_one_layer():
    model = recall_model(0)
    ids = torch.arange(9)[None]
    before = model(ids).logits
    adapters = Adapters(model, 2, rank=3, alpha=6.0)
    assert len(adapters.A) == 7 and len(list(adapters.parameters())) == 14  # of the adapters, not of the model
    with adapters.on():
        assert torch.equal(model(ids).logits, before)
    with torch.no_grad():
        for B in adapters.B:
            B.normal_(generator=torch.Generator().manual_seed(0))
    with adapters.on():
        during = model(ids).logits
    assert torch.equal(model(ids).logits, before)
    matrices = [one for one in model.model.layers[1].modules() if isinstance(one, torch.nn.Linear)]
    with torch.no_grad():
        for matrix, A, B in zip(matrices, adapters.A, adapters.B, strict=True):
            matrix.weight += 2.0 * B @ A
    torch.testing.assert_close(during, model(ids).logits, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(during, before, atol=1e-2)


@pytest.mark.parametrize("layer", [0, 3])
def test_layers_are_counted_from_1(layer):
    with pytest.raises(ValueError, match=r"layer must be in \[1, 2\]"):
        Adapters(recall_model(0), layer)


def test_a_layer_without_matrices_is_refused():
    model = recall_model(0)
    for parent, name in [(model.model.layers[0].self_attn, p) for p in ("q_proj", "k_proj", "v_proj", "o_proj")] + [
        (model.model.layers[0].mlp, p) for p in ("gate_proj", "up_proj", "down_proj")
    ]:
        setattr(parent, name, torch.nn.Identity())
    with pytest.raises(UnsupportedModel, match=r"layer 1 of LlamaForCausalLM has no nn\.Linear"):
        Adapters(model, 1)


def test_tuning_learns_the_answers_and_leaves_the_model():
    model = recall_model(0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    candidates = [[100, 30], [101], [102, 31, 32]]
    items = [Item([5, truth, 6 + truth], candidates, truth) for truth in (0, 1, 2)] * 8
    probe = PriorInfluence(rate=1e-2, epochs=12, batch=8)
    adapters = probe.tune(model, 1, items)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())

    def loss():
        told = surprisals(model, [[*item.prompt, *item.candidates[item.truth]] for item in items[:3]])
        return [float(one[3:].mean()) for one in told]

    before = loss()
    with adapters.on():
        after = loss()
    assert all(b < a - 1 for a, b in zip(before, after, strict=True))  # every token of the longer answers, too
    again = probe.tune(model, 1, items)
    assert all(torch.equal(a, b) for a, b in zip(adapters.parameters(), again.parameters(), strict=True))
    assert not torch.equal(probe.tune(model, 1, items, seed=1).A[0], adapters.A[0])
