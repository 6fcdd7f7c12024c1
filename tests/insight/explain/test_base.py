import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from seqwise.core.attribution import Attribution
from seqwise.core.errors import UnsupportedModel, UsageError
from seqwise.insight.explain.base import (
    divergence,
    faithfulness,
    keep_probabilities,
    next_logits,
    reading,
    soft_mask,
    soft_nc,
    soft_ns,
)

nan = math.nan


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def attribution(scores, **more):
    scores = torch.tensor(scores)
    n = scores.shape[1]
    return Attribution(scores, ["x"] * n, ["t"] * len(scores), input_ids=list(range(3, 3 + n)), **more)


def test_divergence_is_root_two_times_the_squared_hellinger_distance():
    p, q = torch.rand(2, 3, 7, dtype=torch.float64).softmax(-1)
    hellinger = torch.sqrt(1 - (p * q).sqrt().sum(-1))
    torch.testing.assert_close(divergence(p, q), math.sqrt(2) * hellinger**2)
    assert divergence(p, p).abs().max() == 0
    apart = divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert apart.item() == pytest.approx(math.sqrt(2))


def test_soft_mask_keeps_elements_with_their_token_s_probability():
    u = torch.rand(3, 20_000, generator=torch.Generator().manual_seed(0))
    stays = soft_mask(torch.tensor([0.0, 0.3, 1.0]), u)
    torch.testing.assert_close(stays.float().mean(-1), torch.tensor([0.0, 0.3, 1.0]), rtol=0, atol=0.02)
    assert not stays[0].any() and stays[2].all()
    assert 0 < stays[1].float().std() < 1, "elements are drawn apart, not tokens"


def test_normalised_metrics_by_hand():
    s_0 = torch.tensor([0.4, 0.4, 1.0])
    torch.testing.assert_close(
        soft_ns(torch.tensor([0.7, 0.1, 1.0]), s_0), torch.tensor([0.5, 0.0, nan]), equal_nan=True
    )
    torch.testing.assert_close(
        soft_nc(torch.tensor([0.3, 0.6, 0.0]), s_0), torch.tensor([0.5, 1.0, nan]), equal_nan=True
    )


def test_equals_a_plain_loop():
    model = llama()
    scores = [[0.1, 0.7, 0.2, nan, nan], [0.3, nan, 0.1, 0.2, 0.4]]
    a = attribution(scores, seen=[3, 5])
    found = faithfulness(model, a, draws=4, seed=2)
    with torch.no_grad():
        for t, count in enumerate(a.seen):
            e = model.get_input_embeddings()(torch.tensor(a.input_ids))[:count]
            keep_s = [1.0 if math.isnan(x) else x for x in scores[t][:count]]
            keep_c = [1.0 if math.isnan(x) else 1 - x for x in scores[t][:count]]

            def p(masked):
                return model(inputs_embeds=masked[None]).logits[0, -1].softmax(-1)

            def d(left, right):
                return sum((math.sqrt(x) - math.sqrt(y)) ** 2 for x, y in zip(left, right, strict=True)) / math.sqrt(2)

            q, zeroed = p(e), e.clone()
            for i, x in enumerate(scores[t][:count]):
                if not math.isnan(x):
                    zeroed[i] = 0
            s_0 = 1 - d(p(zeroed), q)
            g = torch.Generator().manual_seed(2 + t)
            for k in range(4):
                u = torch.rand(2, *e.shape, generator=g)
                sufficient = 1 - d(p(e * (u[0] < torch.tensor(keep_s)[:, None])), q)
                missed = d(p(e * (u[1] < torch.tensor(keep_c)[:, None])), q)
                assert found.soft_ns[t, k].item() == pytest.approx(max(0, sufficient - s_0) / (1 - s_0), abs=1e-4)
                assert found.soft_nc[t, k].item() == pytest.approx(missed / (1 - s_0), abs=1e-4)


def test_extremes():
    model = llama()
    everything = faithfulness(model, attribution([[1.0] * 4]), draws=3)
    torch.testing.assert_close(everything.soft_ns, torch.ones(1, 3))
    torch.testing.assert_close(everything.soft_nc, torch.ones(1, 3))
    nothing = faithfulness(model, attribution([[0.0] * 4]), draws=3)
    torch.testing.assert_close(nothing.soft_ns, torch.zeros(1, 3))
    torch.testing.assert_close(nothing.soft_nc, torch.zeros(1, 3), rtol=0, atol=1e-5)
    unscored = faithfulness(model, attribution([[nan] * 4]), draws=3)
    assert unscored.soft_ns.isnan().all(), "nothing could be zeroed: undefined"


def test_prefers_the_token_that_matters():
    """The model reads one embedding only: naming that token beats naming another."""

    class ReadsPlace2(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

        def get_input_embeddings(self):
            return self.embed

        def forward(self, inputs_embeds, attention_mask, use_cache):
            return type("Output", (), {"logits": self.head(3 * inputs_embeds[:, 2:3])})

    right = faithfulness(ReadsPlace2(), attribution([[0.0, 0.05, 0.9, 0.05]]))
    wrong = faithfulness(ReadsPlace2(), attribution([[0.9, 0.05, 0.0, 0.05]]))
    assert right.soft_ns.mean() > 0.5 > wrong.soft_ns.mean()
    assert right.soft_nc.mean() > 0.5 > wrong.soft_nc.mean()


def test_same_seed_same_draws_and_no_trace():
    model = llama().train()
    a = attribution([[0.2, 0.3, 0.5]])
    first, second = faithfulness(model, a, draws=3), faithfulness(model, a, draws=3)
    assert first.soft_ns.equal(second.soft_ns) and first.soft_nc.equal(second.soft_nc)
    assert not first.soft_nc.equal(faithfulness(model, a, draws=3, seed=9).soft_nc)
    assert model.training and all(module.training for module in model.modules())


def test_scores_of_any_scale_through_softmax():
    raw = torch.tensor([[2.0, nan, -3.0, 0.0]])
    kept = keep_probabilities(raw, softmax=True)
    torch.testing.assert_close(kept[0, [0, 2, 3]], torch.tensor([2.0, -3.0, 0.0]).softmax(-1))
    assert kept[0, 1] == 1
    assert faithfulness(llama(), attribution([[5.0, -2.0, 0.1]]), draws=2, softmax=True).soft_nc.isfinite().all()
    with pytest.raises(UsageError, match=r"scores must be in \[0, 1\], got -2 to 5 .*softmax=True"):
        faithfulness(llama(), attribution([[5.0, -2.0, 0.1]]))


def test_refusals():
    a = Attribution(torch.tensor([[0.5, 0.5]]), ["a", "b"], ["t"])
    with pytest.raises(UsageError, match="input_ids must be the attribution's 2 inputs, got none"):
        faithfulness(llama(), a)
    with pytest.raises(UsageError, match="inputs, got 3"):
        faithfulness(llama(), a, torch.tensor([3, 4, 5]))
    with pytest.raises(UsageError, match="draws must be >= 1, got 0"):
        faithfulness(llama(), a, torch.tensor([3, 4]), draws=0)
    with pytest.raises(UnsupportedModel, match="get_input_embeddings"):
        faithfulness(nn.Linear(2, 2), a, torch.tensor([3, 4]))
    assert faithfulness(llama(), a, torch.tensor([3, 4]), draws=2).soft_ns.shape == (1, 2)


def test_next_logits_equals_the_whole_forward_s_last_row():
    model, ids = llama(), torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(next_logits(model, input_ids=ids), model(ids).logits[:, -1])


def test_reading_restores_the_flags_after_an_exception():
    model = llama().train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="inside"), reading(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == flags
