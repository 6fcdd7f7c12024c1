"""TidalDecode's schedule, selection and gathered attention against masked attention."""

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from seqwise.core.errors import UnsupportedModel
from seqwise.methods.baselines import Full
from seqwise.methods.cache.a2sf import A2SF
from seqwise.methods.cache.tidal_decode import TidalDecode, schedule, scores, select, selected_attention
from seqwise.methods.reduce.fopru import FoPru
from seqwise.testing.families import FAMILIES


def tensors(seed, B=2, H=6, Hkv=2, n=23, D=5, Dv=5):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(B, H, 1, D, generator=g),
        torch.randn(B, Hkv, n, D, generator=g),
        torch.randn(B, Hkv, n, Dv, generator=g),
    )


def dense(q, K, V, seen=None):
    """Attention with repeated KV heads; seen: (B, H, n) bool."""
    g = q.shape[1] // K.shape[1]
    z = (q @ K.repeat_interleave(g, 1).mT / math.sqrt(q.shape[-1])).squeeze(2)
    if seen is not None:
        z = z.masked_fill(~seen, float("-inf"))
    return z, z.softmax(-1)[:, :, None] @ V.repeat_interleave(g, 1)


def as_mask(idx, n):
    return torch.zeros(*idx.shape[:-1], n, dtype=torch.bool).scatter(-1, idx, True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([(4, 4), (6, 2), (3, 1)]), st.booleans())
def test_gathered_attention_equals_masked_attention(seed, k, heads, keep_current):
    q, K, V = tensors(seed, H=heads[0], Hkv=heads[1], Dv=3)
    idx = select(scores(q, K), k, keep_current)
    z, _ = dense(q, K, V)
    assert idx.shape == (2, heads[0], min(k, 23))
    assert torch.equal(idx, idx.sort(-1).values)
    for b in range(2):
        for h in range(heads[0]):
            row = z[b, h].tolist()
            if keep_current:
                row[-1] = math.inf
            best = sorted(range(23), key=lambda i: (-row[i], i))[:k]
            assert idx[b, h].tolist() == sorted(best)
    torch.testing.assert_close(selected_attention(q, K, V, idx), dense(q, K, V, as_mask(idx, 23))[1])


def test_a_budget_of_the_whole_cache_is_full_attention():
    q, K, V = tensors(3)
    for k in (23, 24, 512):
        idx = select(scores(q, K), k)
        assert idx.tolist() == torch.arange(23).expand(2, 6, -1).tolist()
        full = torch.nn.functional.scaled_dot_product_attention(q, K, V, enable_gqa=True)
        torch.testing.assert_close(selected_attention(q, K, V, idx), full)
    q, K, V = tensors(4, H=2)
    assert torch.equal(
        selected_attention(q, K, V, select(scores(q, K), 99)),
        torch.nn.functional.scaled_dot_product_attention(q, K, V),
    )


def test_only_the_chosen_keys_and_values_are_read():
    q, K, V = tensors(5, H=2)
    idx = select(scores(q, K), 4)
    out = selected_attention(q, K, V, idx)
    hidden = ~as_mask(idx, 23)[..., None]
    poisoned = selected_attention(q, K.masked_fill(hidden, math.nan), V.masked_fill(hidden, math.nan), idx)
    assert torch.equal(out, poisoned)


def test_the_current_token_is_kept_at_the_cost_of_the_weakest():
    z = torch.tensor([[[5.0, 4.0, 3.0, 2.0, -9.0]]])
    assert select(z, 3).tolist() == [[[0, 1, 4]]]
    assert select(z, 3, keep_current=False).tolist() == [[[0, 1, 2]]]
    assert select(z, 1).tolist() == [[[4]]]
    assert z[0, 0, -1] == -9  # the scores are left alone


def test_ties_go_to_the_earlier_position():
    assert select(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), 3).tolist() == [0, 1, 4]
    assert select(torch.zeros(6), 2, keep_current=False).tolist() == [0, 1]


@pytest.mark.parametrize("k", [3, 8, 50])
def test_left_padding_changes_nothing(k):
    q, K, V = tensors(6)
    pads = 9
    live = torch.ones(2, 23 + pads, dtype=torch.bool)
    live[:, :pads] = False
    Kp = torch.cat([20 * q[:, :2].expand(-1, -1, pads, -1), K], 2)  # pads would win every top-k
    Vp = torch.cat([torch.full((2, 2, pads, 5), 1e4), V], 2)
    alone = select(scores(q, K), k)
    for shape in (live, live[:, None], live[:, None].expand(-1, 2, -1)):
        idx = select(scores(q, Kp, live=shape), k)
        kept = [[[i - pads for i in row if i >= pads] for row in sample] for sample in idx.tolist()]
        assert kept == alone.tolist()
        torch.testing.assert_close(selected_attention(q, Kp, Vp, idx, live=shape), selected_attention(q, K, V, alone))


def test_rows_of_different_length_take_what_they_have():
    q, K, V = tensors(7)
    live = torch.ones(2, 23, dtype=torch.bool)
    live[0, :20] = False  # three live slots, k = 5
    idx = select(scores(q, K, live=live), 5)
    assert all({20, 21, 22} <= set(row) for row in idx[0].tolist())
    expected = dense(q, K, V, as_mask(idx, 23) & live[:, None])[1]
    torch.testing.assert_close(selected_attention(q, K, V, idx, live=live), expected)


def test_each_kv_head_may_hold_other_live_slots():
    q, K, V = tensors(11)
    live = torch.rand(2, 2, 23, generator=torch.Generator().manual_seed(1)) < 0.4
    live[..., -1] = True
    seen = live.repeat_interleave(3, dim=1)  # (B, H, n)
    idx = select(scores(q, K, live=live), 23)
    torch.testing.assert_close(selected_attention(q, K, V, idx, live=live), dense(q, K, V, seen)[1])
    best = select(dense(q, K, V, seen)[0], 4)
    assert torch.equal(select(scores(q, K, live=live), 4), best)


def test_scaling_is_the_callers():
    q, K, V = tensors(8)
    idx = select(scores(q, K), 6)
    torch.testing.assert_close(scores(q, K, scaling=1.0), scores(q, K) * math.sqrt(5))
    torch.testing.assert_close(
        selected_attention(q, K, V, idx, scaling=0.3), selected_attention(q * 0.3 * math.sqrt(5), K, V, idx)
    )


def test_half_precision_ranks_in_float32():
    q, K, _ = tensors(9)
    assert scores(q.bfloat16(), K.bfloat16()).dtype == torch.float32


def test_schedule():
    assert schedule(8, 2, 5) == ("full", "full", "select", "reuse", "reuse", "select", "reuse", "reuse")
    assert schedule(3, 0, 2) == ("select", "reuse", "select")
    assert [i for i, role in enumerate(schedule(32)) if role == "select"] == [2, 13]


@pytest.mark.parametrize(
    "layers, start, correction, message",
    [
        (12, 2, 13, r"correction must be in \[1, layers\) = \[1, 12\), got 13"),
        (12, 2, 12, r"correction must be in \[1, layers\) = \[1, 12\), got 12"),
        (12, 5, 5, r"start must be in \[0, correction\) = \[0, 5\), got 5"),
        (12, -1, 5, r"start must be in \[0, correction\) = \[0, 5\), got -1"),
    ],
)
def test_selection_layers_must_exist(layers, start, correction, message):
    with pytest.raises(ValueError, match=message):
        schedule(layers, start, correction)


def test_a_budget_below_one_is_refused():
    with pytest.raises(ValueError, match="budget must be >= 1, got 0"):
        select(torch.zeros(1, 1, 4), 0)


def run_stack(layers, roles, k):
    outs, idx, read = [], None, 0
    for (q, K, V), role in zip(layers, roles, strict=True):
        if role == "reuse":
            outs.append(selected_attention(q, K, V, idx))
            read += idx.shape[-1]
        else:
            if role == "select":
                idx = select(scores(q, K), k)
            outs.append(dense(q, K, V)[1])
            read += K.shape[2]
    return outs, read


def test_layers_with_equal_scores_lose_nothing_against_their_own_top_k():
    q, K, _ = tensors(10)
    layers = [(q, K, tensors(20 + layer)[2]) for layer in range(7)]
    roles = schedule(7, 1, 4)
    outs, read = run_stack(layers, roles, 8)
    for (q, K, V), role, out in zip(layers, roles, outs, strict=True):
        oracle = select(scores(q, K), 8)
        expected = selected_attention(q, K, V, oracle) if role == "reuse" else dense(q, K, V)[1]
        assert torch.equal(out, expected)
    assert read == 3 * 23 + 4 * 8  # keys read per head: layers 0, 1 and 4 in full


def test_the_correction_layer_replaces_the_positions():
    layers = [tensors(30 + layer) for layer in range(4)]
    outs, _ = run_stack(layers, schedule(4, 0, 2), 5)
    q, K, V = layers[3]
    corrected = selected_attention(q, K, V, select(scores(*layers[2][:2]), 5))
    stale = selected_attention(q, K, V, select(scores(*layers[0][:2]), 5))
    assert torch.equal(outs[3], corrected) and not torch.allclose(corrected, stale)


# the attached class


@dataclass(frozen=True)
class Watched(TidalDecode):
    """Notes what each layer's read saw and chose: (layer, query, key, live, choice)."""

    abstract: ClassVar[bool] = True
    seen: ClassVar[list] = []

    def read(self, read):
        choice = super().read(read)
        self.seen.append((read.layer, read.query.clone(), read.key.clone(), read.live, choice))
        return choice


def reading(method, steps):
    """What a run of `by_steps` read, per step a list over the layers."""
    Watched.seen.clear()
    for _ in steps(Watched(**{f.name: getattr(method, f.name) for f in fields(method)})):
        pass
    layers = max(entry[0] for entry in Watched.seen) + 1
    return [Watched.seen[i : i + layers] for i in range(0, len(Watched.seen), layers)]


@pytest.mark.parametrize("keep_current", [True, False])
def test_layers_reuse_the_positions_of_the_last_selecting_layer_of_the_same_step(tools, keep_current):
    model = tools.build(layers=6)
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(3))[:60].view(2, 30)
    method = TidalDecode(budget=5, start=1, correction=3, keep_current=keep_current)
    steps = reading(method, lambda m: tools.by_steps(model, ids, 21, m))
    assert len(steps) == 9
    chosen = []
    for number, step in enumerate(steps):
        n = 22 + number
        for layer, role in enumerate(schedule(6, 1, 3)):
            at, q, K, live, choice = step[layer]
            assert at == layer and K.shape[2] == n and live is None  # nothing is evicted
            if role == "reuse":
                source = step[1 if layer < 3 else 3]
                z, _ = dense(source[1], source[2], source[2])
                if keep_current:
                    z[..., -1] = math.inf
                assert torch.equal(choice[0], z.topk(5).indices.sort(-1).values)
                assert choice[1].all()
                chosen.append(choice[0])
            else:
                assert choice is None  # full attention, in selecting layers as well
    assert not torch.equal(chosen[0], chosen[1])  # the correction changes the positions
    with_current = [(index == 21 + i // 3).any(-1).all().item() for i, index in enumerate(chosen)]
    assert all(with_current) == keep_current


def test_every_layer_equals_attention_under_a_mask_of_its_positions(tools):
    """Logits of a step against a plain forward in which reusing layers are masked."""
    model = tools.build(layers=3)
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(4))[None, :25]
    Watched.seen.clear()
    logits = [logits for _, logits in tools.by_steps(model, ids, 24, Watched(budget=6, start=0, correction=1))][-1]
    seen = as_mask(Watched.seen[-1][-1][0], 25)  # (1, H, 25) of layer 2
    attention = model.model.layers[2].self_attn

    def masked(module, args, kwargs, output):
        x, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        q, K, V = (
            p(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
            for p in (module.q_proj, module.k_proj, module.v_proj)
        )
        q, K = apply_rotary_pos_emb(q, K, cos, sin)
        last = dense(q[:, :, -1:], K, V, seen)[1]  # (1, H, 1, D)
        last = module.o_proj(last.transpose(1, 2).flatten(2))
        return (torch.cat([output[0][:, :-1], last], 1), *output[1:])

    handle = attention.register_forward_hook(masked, with_kwargs=True)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
        handle.remove()
        plain = model(input_ids=ids).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-3)


@pytest.mark.parametrize(
    "method", [TidalDecode(budget=1.0, start=0, correction=2), TidalDecode(budget=60, start=0, correction=1)]
)
def test_a_budget_of_everything_is_plain_decoding_bit_for_bit(tools, llama, method):
    batch = FAMILIES["llama"].prompt(40)
    full, _ = tools.generate(llama, batch, Full())
    ours, run = tools.generate(llama, batch, method)
    assert torch.equal(ours, full)
    assert not run.acted and run.report().attention_work == 1.0


def test_keys_read_are_the_schedules_and_the_cache_stays_whole(tools, llama):
    batch = FAMILIES["llama"].prompt(40)
    run = tools.generate(llama, batch, TidalDecode(budget=7, start=0, correction=2), new=11)[1]
    steps = range(41, 51)  # keys at each of the ten forwards after the prompt
    prompt = 4 * 4 * 40 * 41 // 2  # layers, heads
    assert run.engine.account.pairs == prompt + 4 * sum(2 * n + 2 * 7 for n in steps)
    assert run.engine.account.plain_pairs == prompt + 4 * sum(4 * n for n in steps)
    report = run.report()
    assert run.acted and report.kept == [50.0] * 4 and report.attention_work < 1


@pytest.mark.parametrize(
    "method", [TidalDecode(budget=6, start=0, correction=1), TidalDecode(budget=0.4, start=1, correction=2)], ids=str
)
def test_left_padding_changes_nothing_in_the_model(tools, method):
    tools.assert_padded_equals_alone(method)


def test_prompts_and_blocks_of_rows_are_attended_in_full(tools, llama):
    ids = FAMILIES["llama"].prompt(40)["input_ids"]
    with torch.no_grad():
        plain = llama(input_ids=ids).logits
        with TidalDecode(budget=4, start=0, correction=1).on(llama) as run:
            first = llama(input_ids=ids[:, :25], use_cache=True).logits
            run.end_prompt()
            block = llama(
                input_ids=ids[:, 25:], position_ids=torch.arange(25, 40)[None], cache=run.cache, use_cache=True
            ).logits
    torch.testing.assert_close(torch.cat([first, block], 1), plain, **FAMILIES["llama"].tolerance)
    assert not run.acted


def test_reads_what_another_method_left(tools, llama):
    batch = FAMILIES["llama"].prompt(40)
    method = TidalDecode(budget=6, start=0, correction=1) | A2SF(budget=(30, 20, 12, 4), recent=2)
    logits, run = tools.generate(llama, batch, method)
    assert logits.isfinite().all() and run.report().kept == [30.0, 20.0, 12.0, 4.0]
    tools.assert_padded_equals_alone(method)


def test_models_that_cannot_serve_are_refused_with_what_to_do(llama):
    with pytest.raises(UnsupportedModel, match="correction must be < the model's 4 layers, got 13; choose a layer"):
        TidalDecode().on(llama)
    with pytest.raises(UnsupportedModel, match="full attention"):
        TidalDecode(start=0, correction=1).on(FAMILIES["mistral"].tiny())


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: TidalDecode(start=5, correction=5),
            r"TidalDecode.start must be in \[0, correction\) = \[0, 5\), got 5",
        ),
        (lambda: TidalDecode(budget=0), r"TidalDecode.budget must be .*got 0"),
        (lambda: TidalDecode(correction=0), r"TidalDecode.correction must be .*got 0"),
    ],
)
def test_bad_hyperparameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_positions_are_found_in_layers_that_have_lost_rows():
    """Behind a reducer a slot's number is no longer its token's position."""
    family = FAMILIES["llava"]
    model, batch = family.tiny(), family.prompt(20)
    both = FoPru(budget=0.25) | TidalDecode(budget=6, start=1, correction=2)
    with both.on(model) as run:
        out = model.generate(**batch, max_new_tokens=4, do_sample=False)
        assert run.report().attention_work < 1
    assert out.shape[1] == batch["input_ids"].shape[1] + 4
