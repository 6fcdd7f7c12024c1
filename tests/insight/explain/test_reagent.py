import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from seqwise.core.attribution import Span
from seqwise.core.errors import PromptError, UsageError
from seqwise.insight.explain.base import Explainer
from seqwise.insight.explain.reagent import (
    ReAGent,
    aggregate,
    importance,
    inferential_sampler,
    kept_positions,
    non_special_ids,
    rationale,
    reproduces,
    uniform_sampler,
    update,
)

V = 40


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def llama(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,  # or every next-token distribution is flat
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **changes,
    )
    return LlamaForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config)


class Lookup(nn.Module):
    """Predicts `target` with probability 0.8 as long as place j holds `fact`, else with 0.1."""

    def __init__(self, j, fact, target=5):
        super().__init__()
        self.j, self.fact, self.target, self.calls = j, fact, target, 0
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=V))

    def forward(self, input_ids, attention_mask, use_cache):
        assert attention_mask.all()
        self.calls += 1
        intact = (input_ids[:, self.j] == self.fact)[:, None]
        p = torch.full((len(input_ids), V), 0.0).masked_fill(~intact, 0.2)
        p[:, 8:] = 0.2 / (V - 8)
        p[:, self.target] = torch.where(intact[:, 0], 0.8, 0.1)
        return SimpleNamespace(logits=p.log()[:, None].expand(-1, input_ids.shape[1], -1))


def context(n=20, seed=0):
    return torch.randint(8, V, (n,), generator=generator(seed))


# formulas


def test_update_moves_replaced_and_kept_in_opposite_directions():
    ell = torch.tensor([[0.5, 0.1, 0.0]])
    m = torch.tensor([[True, False, True]])
    out = update(ell, m, torch.tensor([0.3]))
    g = 2 * math.atanh(0.3)
    torch.testing.assert_close(out, torch.tensor([[0.5 + g, 0.1 - g, g]]))
    torch.testing.assert_close(update(ell, m, torch.tensor([-0.3])), torch.tensor([[0.5 - g, 0.1 + g, -g]]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=5), st.integers(1, 9), st.integers(0, 999))
def test_update_equals_the_logit_formula_and_stays_finite(d, n, seed):
    ell = torch.rand(len(d), n, generator=generator(seed), dtype=torch.float64)
    m = torch.rand(len(d), n, generator=generator(seed + 1)) < 0.4
    out = update(ell, m, torch.tensor(d, dtype=torch.float64))
    for b in range(len(d)):
        for i in range(n):
            u = max(-1 + 1e-6, min(1 - 1e-6, d[b] if m[b, i] else -d[b]))
            x = (u + 1) / 2
            assert out[b, i].item() == pytest.approx(ell[b, i].item() + math.log(x / (1 - x)), abs=1e-8)


def test_certain_to_impossible_in_float_is_finite():
    assert update(torch.zeros(2, 2), torch.tensor([[True, False]] * 2), torch.tensor([1.0, -1.0])).isfinite().all()


def test_stopped_probes_stay():
    ell = torch.rand(2, 4, generator=generator())
    out = update(ell, torch.ones(2, 4, dtype=torch.bool), torch.tensor([0.5, 0.5]), torch.tensor([True, False]))
    assert out[0].equal(ell[0]) and (out[1] > ell[1]).all()


def test_importance_leaves_unscored_positions_out():
    ell = torch.tensor([[1.0, 9.0, 2.0]])
    s = importance(ell, torch.tensor([True, False, True]))
    torch.testing.assert_close(s, torch.tensor([[1.0, -math.inf, 2.0]]).softmax(-1))
    torch.testing.assert_close(importance(ell), ell.softmax(-1))


def test_kept_positions_prefer_the_earlier_and_keep_what_is_not_scored():
    s = torch.tensor([[0.2, 0.5, 0.2, 0.0, 0.2]])
    assert kept_positions(s, 2).tolist() == [[True, True, False, False, False]]
    scored = torch.tensor([False, True, True, True, True])
    assert kept_positions(s, 2, scored).tolist() == [[True, True, True, False, False]]
    assert kept_positions(s, 9).all()


def test_stop_test_counts_ranks_and_ties_by_id():
    logits = torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert [reproduces(logits, 3, K).tolist() for K in (2, 3, 4)] == [[False] * 2, [False] * 2, [True] * 2]
    assert reproduces(logits, torch.tensor([1, 0]), 3).tolist() == [True, True]
    assert reproduces(logits, 2, 2).tolist() == [True, False]
    random = torch.randn(30, 50, generator=generator())
    inside = (random.topk(3).indices == 7).any(-1)
    assert reproduces(random, 7, 3).equal(inside) and inside.any()


def test_aggregate_is_the_mean_of_the_stopped_or_of_all():
    s = torch.rand(2, 3, 4, generator=generator())
    stopped = torch.tensor([[True, False, True], [False, False, False]])
    mean, converged = aggregate(s, stopped)
    torch.testing.assert_close(mean[0], (s[0, 0] + s[0, 2]) / 2)
    torch.testing.assert_close(mean[1], s[1].mean(0))
    assert converged.tolist() == [True, False]


def test_rationale_counts_all_probes():
    s = torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.1, 0.3], [0.1, 0.3, 0.6]])
    assert rationale(s, 1, 2).tolist() == [True, False, False]
    assert rationale(s, 2, 2).tolist() == [True, True, True]
    assert rationale(s, 2, 3).tolist() == [False, False, False]


@pytest.mark.parametrize("rho", [0.1, 0.3])
def test_the_one_position_that_matters_wins_after_ten_updates(rho):
    """The update alone, on a model that depends on place 7 of 20 only (a - b = 0.7), 100 runs of 8 probes."""
    g = generator()
    ell = torch.rand(100, 8, 20, generator=g)
    for _ in range(10):
        m = torch.rand(100, 8, 20, generator=g) < rho
        ell = update(ell, m, 0.7 * m[..., 7])
    mean, _ = aggregate(importance(ell), torch.ones(100, 8, dtype=torch.bool))
    assert (mean.argmax(-1) == 7).all()


# samplers


def test_uniform_sampler_draws_all_allowed_ids_and_no_other():
    draw = uniform_sampler(torch.tensor([3, 5, 9]))
    drawn = draw(torch.zeros(20, 50, dtype=torch.long), generator())
    counts = {i: int((drawn == i).sum()) for i in (3, 5, 9)}
    assert sum(counts.values()) == 1000 and all(abs(count - 333) < 75 for count in counts.values())
    assert drawn.equal(draw(torch.zeros(20, 50, dtype=torch.long), generator()))


def test_non_special_ids_know_config_and_tokenizer():
    assert non_special_ids(llama()).tolist() == list(range(3, V))
    words = {f"w{i}": i for i in range(30)} | {"[U]": 30, "[X]": 31}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[U]")), unk_token="[U]", cls_token="[X]"
    )
    assert non_special_ids(llama(), tokenizer).tolist() == list(range(3, 30)), "embeddings beyond it are no tokens"


def test_inferential_sampler_is_the_greedy_prediction_from_the_true_prefix():
    model, y = llama().eval(), context(9)
    drawn = inferential_sampler(model)(y.expand(2, -1), generator())
    expected = [int(y[0])] + [int(model(y[None, :i]).logits[0, -1].argmax()) for i in range(1, 9)]
    assert drawn.tolist() == [expected, expected]


# the explainer


def reference(method, model, y, z, seed, scored=None):
    """The documented order of draws, one probe and one forward at a time."""
    n, B, g = len(y), method.probes, generator(seed)
    scored = torch.ones(n, dtype=torch.bool) if scored is None else scored
    allowed = non_special_ids(model)

    def p(ids):
        return model(ids[None]).logits[0, -1].softmax(-1)

    def sample():
        return allowed[torch.randint(len(allowed), (B, n), generator=g)]

    p_0, ell, stopped = p(y)[z], torch.rand(B, n, generator=g), [False] * B
    for _ in range(method.max_steps):
        m, r = torch.rand(B, n, generator=g) < method.rho, sample()
        again = sample()
        for b in range(B):
            if stopped[b]:
                continue
            replaced = m[b] & scored
            d = p_0 - p(torch.where(replaced, r[b], y))[z]
            ell[b] += torch.where(replaced, 1, -1) * torch.log((1 + d) / (1 - d))
            s = ell[b].masked_fill(~scored, -math.inf).softmax(-1)
            keep = s.argsort(descending=True)[: method.top_n]
            y_2 = again[b].clone()
            y_2[keep] = y[keep]
            y_2[~scored] = y[~scored]
            stopped[b] = bool((p(y_2).argsort(descending=True)[: method.top_k] == z).any())
        if all(stopped):
            break
    s = ell.masked_fill(~scored, -math.inf).softmax(-1)
    rows = s[torch.tensor(stopped)] if any(stopped) else s
    return rows.mean(0), stopped


@pytest.mark.parametrize("make", [llama, gpt2])
def test_equals_a_plain_loop(make):
    model, y = make().eval(), context(11)
    method = ReAGent(top_n=3, top_k=2, max_steps=12, probes=4)
    with torch.no_grad():
        z = int(model(y[None]).logits[0, -1].argmax())
        expected, stopped = reference(method, model, y, z, seed=3)
    found = method.explain(model, y, seed=3)
    torch.testing.assert_close(found.scores[0], expected, rtol=1e-3, atol=1e-5)
    assert found.details["stopped"] == [sum(stopped)] and found.target_ids == (z,)
    assert found.input_ids == tuple(y.tolist()) and found.seen == (11,)


@pytest.mark.parametrize("method", [ReAGent(), ReAGent(rho=0.1), ReAGent(top_n=0.1, top_k=1)])
def test_finds_the_fact_of_a_lookup_model(method):
    hits = 0
    for seed in range(10):
        y = context(20, seed)
        found = method.explain(Lookup(7, int(y[7])), y, seed=seed)
        hits += found.top(1) == [7]
        assert found.details["converged"] == [True]
        assert found.details["probability"][0] == pytest.approx(0.8, abs=1e-5)
    assert hits == 10


def test_stops_early_and_rests_when_it_does():
    y = context(20)
    model = Lookup(7, int(y[7]))
    found = ReAGent(top_n=20).explain(model, y)  # everything is kept: the first stop test succeeds
    assert found.details["steps"] == [1] and found.details["stopped"] == [8]
    assert model.calls == 4


def test_says_when_nothing_converged():
    y = context(20)
    found = ReAGent(top_k=1, max_steps=2).explain(Lookup(7, int(y[7])), y, target=39)  # never the likeliest
    assert found.details["converged"] == [False] and found.details["stopped"] == [0]
    torch.testing.assert_close(found.scores.sum(), torch.tensor(1.0))


def test_left_padding_gives_what_the_prompt_gives_alone():
    model, y = llama(), context(9)
    method = ReAGent(top_n=3, max_steps=5)
    alone = method.explain(model, y)
    padded = torch.cat([torch.zeros(4, dtype=torch.long), y])[None]
    mask = torch.cat([torch.zeros(4), torch.ones(9)])[None]
    assert method.explain(model, padded, attention_mask=mask).to_dict() == alone.to_dict()


def test_frozen_tokens_are_neither_replaced_nor_scored():
    y, seen = context(12), []
    frozen = torch.zeros(12, dtype=torch.bool)
    frozen[[0, 5, 11]] = True

    class Watching(Lookup):
        def forward(self, input_ids, **kw):
            seen.append(input_ids)
            return super().forward(input_ids, **kw)

    found = ReAGent(top_n=1, max_steps=20).explain(Watching(7, int(y[7])), y, frozen=frozen)
    assert found.scores[0].isnan().equal(frozen)
    ids = torch.cat(seen)
    assert (ids[:, frozen] == y[frozen]).all() and (ids[:, 3] != y[3]).any()
    torch.testing.assert_close(found.scores.nansum(), torch.tensor(1.0))
    assert not set(found.details["rationale"][0]) & {0, 5, 11}


def test_frozen_left_padded_prompts():
    model, y = llama(), context(6)
    frozen = torch.tensor([0, 0, 1, 0, 0, 0, 0, 1]).bool()
    mask = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1])
    padded = torch.cat([torch.zeros(2, dtype=torch.long), y])
    found = ReAGent(max_steps=2).explain(model, padded, frozen=frozen, attention_mask=mask)
    assert found.scores[0].isnan().tolist() == [True, False, False, False, False, True]


def test_a_generated_text_is_explained_token_by_token():
    model, y = llama(), context(7)
    new = torch.tensor([9, 30, 11])
    method = ReAGent(top_n=2, max_steps=4)
    found = method.explain(model, y[None], target=new[None], seed=5)
    assert found.scores.shape == (3, 9) and found.seen == (7, 8, 9)
    assert found.scores.isnan().equal(torch.ones(3, 9).triu(7).bool())
    for t in range(3):
        one = method.explain(model, torch.cat([y, new[:t]]), target=int(new[t]), seed=5 + t)
        assert found.scores[t, : 7 + t].equal(one.scores[0])


def test_a_share_of_positions_is_rounded_up():
    y = context(20)
    model = Lookup(7, int(y[7]))
    for share, count in ((0.1, 2), (0.11, 3), (1.0, 20), (0.07, 2)):
        method = ReAGent(top_n=share)
        assert method._kept(torch.ones(20, dtype=torch.bool)) == count
    assert ReAGent(top_n=0.07)._kept(torch.ones(100, dtype=torch.bool)) == 7, "0.07 * 100 > 7 by rounding only"
    assert ReAGent(top_n=1.0).explain(model, y).details["steps"] == [1]


def test_reads_the_model_and_changes_nothing():
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    y, method = context(8), ReAGent(max_steps=3)
    first = method.explain(model, y)
    assert {name: module.training for name, module in model.named_modules()} == before
    state = torch.get_rng_state()
    assert method.explain(model, y).to_dict() == first.to_dict(), "dropout must be off"
    assert torch.get_rng_state().equal(state), "the global generator is left alone"
    assert method.explain(model, y, seed=1).to_dict() != first.to_dict()
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


def test_own_sampler_and_inferential_one():
    model, y = llama(), context(8)

    def sevens(ids, generator):
        return torch.full_like(ids, 7)

    found = ReAGent(max_steps=3).explain(model, y, sampler=sevens)
    assert found.to_dict() != ReAGent(max_steps=3).explain(model, y).to_dict()
    assert ReAGent(max_steps=3, sampler="inferential").explain(model, y).scores.isfinite().all()
    with pytest.raises(UsageError, match=r"sampler must return ids of shape \(8, 8\), got \(8,\)"):
        ReAGent().explain(model, y, sampler=lambda ids, g: ids[:, 0])


def test_texts_and_special_tokens_come_from_the_tokenizer():
    words = {f"w{i}": i for i in range(V - 1)} | {"[S]": V - 1}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), bos_token="[S]")
    y = torch.tensor([V - 1, 8, 9])
    found = ReAGent(max_steps=1).explain(llama(), y, target=[10], tokenizer=tokenizer)
    assert found.inputs == ("[S]", " w8", " w9") and found.targets == (" w10",)
    assert found.spans == (Span("special", 0, 1),)
    assert found.method == str(ReAGent(max_steps=1))
    assert Explainer.parse(found.method) == ReAGent(max_steps=1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, r"must be one prompt, \(n,\) or \(1, n\), got \(2, 3\)"),
        ({"attention_mask": torch.ones(2)}, "attention_mask must have 4 entries like input_ids, got 2"),
        ({"attention_mask": torch.zeros(4)}, "at least one token that is not padding"),
        ({"frozen": torch.ones(4)}, "frozen must leave at least one token"),
        ({"frozen": torch.ones(3)}, "frozen must have one entry per input id, got 3"),
    ],
)
def test_refuses_prompts_that_do_not_fit(arguments, message):
    with pytest.raises(PromptError, match=message):
        ReAGent().explain(llama(), **{"input_ids": torch.tensor([8, 9, 10, 11]), **arguments})


@pytest.mark.parametrize("target", [[], [-1], V])
def test_refuses_targets_outside_the_vocabulary(target):
    with pytest.raises(UsageError, match=rf"target must be ids in \[0, {V}\), at least one"):
        ReAGent().explain(llama(), context(4), target=target)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"top_n": 0}, "ReAGent.top_n must be a whole number of tokens >= 1 or a share"),
        ({"top_n": (2, 3)}, r"ReAGent.top_n must be .*got \(2, 3\)"),
        ({"top_k": 0}, "ReAGent.top_k must be >= 1, got 0"),
        ({"rho": 1.0}, r"ReAGent.rho must be in \(0, 1\), got 1.0"),
        ({"max_steps": 0}, "ReAGent.max_steps must be >= 1, got 0"),
        ({"probes": 1}, "ReAGent.overlap must be <= probes = 1, got 2"),
        ({"sampler": "postag"}, "ReAGent.sampler must be one of 'uniform', 'inferential', got 'postag'"),
    ],
)
def test_refuses_bad_hyperparameters(values, message):
    with pytest.raises(ValueError, match=message):
        ReAGent(**values)
