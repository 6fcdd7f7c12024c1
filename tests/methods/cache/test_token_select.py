"""TokenSelect's fingerprint, vote, selection and re-indexed attention against plain loops, and the attached class."""

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from seqwise.core.errors import SlotConflict, UnsupportedModel
from seqwise.core.rope import rotate
from seqwise.methods import A2SF, V2PE, TidalDecode, ZipCache
from seqwise.methods.cache.token_select import (
    TokenSelect,
    compact,
    fingerprint,
    logits,
    reindexed_attention,
    select,
    smooth,
    soft_vote,
)
from seqwise.testing.families import FAMILIES

FREQ = 10_000.0 ** -(torch.arange(0, 8, 2) / 8)


def tensors(seed, B=1, H=6, Hkv=2, C=1, N=40, D=8):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(B, H, C, D, generator=g),
        torch.randn(B, Hkv, N, D, generator=g),
        torch.randn(B, Hkv, N, D, generator=g),
    )


# the plain method on one sample, keys and queries without RoPE


def turned(x, position, freq):
    """One vector at one position, pair by pair."""
    half = len(freq)
    out = x.clone()
    for i in range(half):
        c, s = math.cos(position * float(freq[i])), math.sin(position * float(freq[i]))
        out[i], out[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
    return out


def plain_kept(q, k, sinks, budget, local, pool=None, freq=FREQ, scaling=1.0):
    """q (H, C, D), k (Hkv, N, D) -> kept tokens, ascending, and the logits (H, M)."""
    H, C, _ = q.shape
    N, g = k.shape[1], H // len(k)
    if sinks + budget + local >= N:
        return list(range(N)), None
    z = torch.zeros(H, N - sinks - local)
    for h in range(H):
        mean = torch.stack([turned(q[h, i], local + i, freq) for i in range(C)]).mean(0)
        for j in range(z.shape[1]):
            z[h, j] = mean @ k[h // g, sinks + j] * scaling
    s = sum(row.softmax(0) for row in z).tolist()
    if pool is not None:
        s = [max(s[max(0, j - pool // 2) : j + pool // 2 + 1]) for j in range(len(s))]
    best = sorted(range(len(s)), key=lambda j: (-s[j], j))[:budget]
    return [*range(sinks), *(sinks + j for j in sorted(best)), *range(N - local, N)], z


def plain_attention(q, k, v, kept, freq=FREQ, scaling=None):
    """q (H, C, D), k and v (Hkv, N, D) -> (H, C, D): positions count within the kept tokens."""
    H, C, D = q.shape
    g, m, out = H // len(k), len(kept), torch.zeros(H, C, v.shape[2])
    for h in range(H):
        keys = torch.stack([turned(k[h // g, j], place, freq) for place, j in enumerate(kept)])
        for i in range(C):
            row = m - C + i
            z = keys[: row + 1] @ turned(q[h, i], row, freq) * (scaling or D**-0.5)
            out[h, i] = z.softmax(0) @ v[h // g, kept[: row + 1]]
    return out


@pytest.mark.parametrize("pool", [None, 3, 5])
@pytest.mark.parametrize("C, N", [(1, 40), (3, 33), (4, 16)])
def test_selection_and_attention_follow_the_algorithm(C, N, pool):
    for seed in range(3):
        q, k, v = tensors(seed, B=2, C=C, N=N)
        index, live = select(fingerprint(q, FREQ, 5), k, [6, 6], sinks=3, local=5, pool=pool)
        assert live.all() and index.shape == (2, 1, 14)
        out = reindexed_attention(q, k, v, index, live, FREQ)
        for b in range(2):
            kept, z = plain_kept(q[b], k[b], 3, 6, 5, pool)
            assert index[b, 0].tolist() == kept
            torch.testing.assert_close(logits(fingerprint(q, FREQ, 5), k)[b, :, 3 : N - 5], z, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(out[b], plain_attention(q[b], k[b], v[b], kept), atol=1e-5, rtol=1e-4)


def test_query_heads_read_the_kv_head_of_their_group():
    q, k, _ = tensors(3, H=6, Hkv=2)
    z = logits(fingerprint(q, FREQ, 5), k)
    q_bar = fingerprint(q, FREQ, 5)[0]
    torch.testing.assert_close(z[0], torch.stack([k[0, h // 3] @ q_bar[h] for h in range(6)]))
    assert not torch.allclose(z[0, 1], k[0, 1] @ q_bar[1])  # h % Hkv, as in the released kernel


def test_a_fingerprint_is_the_mean_of_rotated_queries():
    q, _, _ = tensors(4, C=3)
    expected = torch.stack([turned(q[0, 2, i], 5 + i, FREQ) for i in range(3)]).mean(0)
    torch.testing.assert_close(fingerprint(q, FREQ, 5)[0, 2], expected)
    assert torch.equal(fingerprint(q, None, 5), q.mean(2))
    one = q[:, :, :1]
    torch.testing.assert_close(fingerprint(one, FREQ, 5), rotate(one, torch.tensor([5.0]), FREQ)[:, :, 0])
    assert fingerprint(q.bfloat16(), FREQ, 5).dtype == torch.float32


def test_each_head_has_one_vote():
    z = torch.tensor([[0.0, 3.0, 0.0], [50.0, 0.0, 40.0]])
    s = soft_vote(z)
    torch.testing.assert_close(s, z[0].softmax(0) + z[1].softmax(0))
    assert s.argmax() == 0 and float(s.sum()) == pytest.approx(2)
    assert s[1] > s[2]  # though the sum of raw logits says the reverse: large norms do not decide alone


@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 1000))
def test_pooling_keeps_length_and_place(M, half, seed):
    s = torch.rand(2, 3, M, generator=torch.Generator().manual_seed(seed))
    pooled = smooth(s, 2 * half + 1)
    assert pooled.shape == s.shape
    for j in range(M):
        torch.testing.assert_close(pooled[..., j], s[..., max(0, j - half) : j + half + 1].amax(-1))
    assert smooth(s, None) is s


@pytest.mark.parametrize("pool", [2, 6, 0])
def test_even_pools_are_refused(pool):
    with pytest.raises(ValueError, match=f"TokenSelect.pool must be odd or None, got {pool}"):
        smooth(torch.ones(1, 4), pool)


def test_a_cut_through_equal_pooled_scores_goes_to_the_earlier_tokens():
    k = torch.zeros(1, 1, 12, 2)
    k[0, 0, 6, 0] = 9.0
    q_bar = torch.tensor([[[1.0, 0.0]]])
    index, _ = select(q_bar, k, [2], sinks=1, local=2, pool=3)
    assert index[0, 0].tolist() == [0, 5, 6, 10, 11]  # 5, 6 and 7 have the peak's score
    index, _ = select(q_bar, k, [3], sinks=1, local=2)
    assert index[0, 0].tolist() == [0, 1, 2, 6, 10, 11]  # a one-hot vote fills up from the front
    edge = torch.zeros(1, 1, 12, 2)
    edge[0, 0, [0, 11], 0] = 99.0  # a sink and a local token do not reach the candidates beside them
    edge[0, 0, 4, 0] = 1.0
    assert select(q_bar, edge, [3], sinks=1, local=2, pool=3)[0][0, 0, 1:4].tolist() == [3, 4, 5]


def test_all_tokens_that_fit_are_kept_once():
    q, k, v = tensors(5, N=13)
    for sinks, count, local in ((3, 6, 5), (0, 9, 4), (8, 8, 8), (20, 1, 1), (2, 3, 20)):
        index, live = select(fingerprint(q, FREQ, local), k, [count], sinks=sinks, local=local)
        if sinks + count + local >= 13:
            assert index[live].tolist() == list(range(13))
            whole = reindexed_attention(q, k, v, index, live, FREQ)
            torch.testing.assert_close(whole[0], plain_attention(q[0], k[0], v[0], list(range(13))))


def test_samples_may_choose_different_numbers():
    q, k, _ = tensors(6, B=2)
    index, live = select(fingerprint(q, FREQ, 5), k, [4, 7], sinks=2, local=5)
    for b, count in enumerate((4, 7)):
        assert index[b, 0][live[b, 0]].tolist() == plain_kept(q[b], k[b], 2, count, 5)[0]


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("N, pads", [(40, 4), (12, 30), (4, 20)])
def test_slots_without_a_token_are_no_sinks_no_candidates_and_have_no_place(sets, N, pads):
    q, k, v = tensors(7, C=3, N=N)
    q_bar = fingerprint(q, FREQ, 5)
    alone, all_live = select(q_bar, k, [6], sinks=3, local=5, sets=sets)
    padded = [torch.cat([torch.full((1, 2, pads, 8), 99.0), x], 2) for x in (k, v)]
    dead = torch.full((1, sets), pads)
    index, live = select(q_bar, padded[0], [6], sinks=3, local=5, sets=sets, dead=dead)
    assert torch.equal(index[live], alone[all_live] + pads)
    torch.testing.assert_close(
        reindexed_attention(q, *padded, index, live, FREQ), reindexed_attention(q, k, v, alone, all_live, FREQ)
    )


def test_kv_heads_with_other_tokens_vote_for_their_own():
    q, k, v = tensors(8, H=4)
    q_bar = fingerprint(q, FREQ, 5)
    dead = torch.tensor([[0, 9]])
    index, live = select(q_bar, k, [6], sinks=3, local=5, sets=2, dead=dead)
    out = reindexed_attention(q, k, v, index, live, FREQ)
    for head, first in enumerate((0, 9)):
        own = slice(2 * head, 2 * head + 2)
        keys, values = (x[0, head : head + 1, first:] for x in (k, v))
        kept, _ = plain_kept(q[0, own], keys, 3, 6, 5)
        assert (index[0, head][live[0, head]] - first).tolist() == kept
        torch.testing.assert_close(out[0, own], plain_attention(q[0, own], keys, values, kept))


def test_compact_positions_skip_what_is_not_live():
    place, at = compact(torch.tensor([[False, True, True, False, True, True]]), 2)
    assert place[0, [1, 2, 4, 5]].tolist() == [0, 1, 2, 3] and at.tolist() == [[2, 3]]


# the attached class


@torch.no_grad()
def projections(module, x):
    return [
        p(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj)
    ]


def expected_logits(model, method, ids, prompt, decide=None):
    """The model with this attention written out, ids (1, n): a prompt in blocks, then single steps.

    decide(layer, q_bar) says for each step whether the layer keeps its last choice.
    """
    n, freq = ids.shape[1], model.model.rotary_emb.inv_freq
    last = {}

    def attention(index, module, args, kwargs, output):
        q, k, v = (x[0] for x in projections(module, kwargs["hidden_states"]))
        out = torch.zeros_like(q)
        start = 0
        while start < n:
            stop = min(start + method.block, prompt) if start < prompt else start + 1
            kept, _ = plain_kept(
                q[:, start:stop], k[:, :stop], method.sinks, method.budget, method.local, method.pool, freq,
                module.scaling if method.scaled else 1.0,
            )  # fmt: skip
            if start >= prompt and len(kept) < stop:
                q_bar = fingerprint(q[None, :, start:stop], freq, method.local).flatten()
                old = last.get(index)
                if old is not None and cosine_similarity(q_bar, old[0], dim=0) >= (method.reuse or 2):
                    kept = [*old[1], *range(stop - method.local, stop)]
                    reused.append((index, start))
                else:
                    last[index] = q_bar, kept[: -method.local]
            out[:, start:stop] = plain_attention(q[:, start:stop], k[:, :stop], v[:, :stop], kept, freq)
            start = stop
        return (module.o_proj(out.transpose(0, 1).flatten(1)[None]), *output[1:])

    reused = []
    handles = [
        layer.self_attn.register_forward_hook(lambda m, a, kw, o, i=i: attention(i, m, a, kw, o), with_kwargs=True)
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        out = model(ids).logits[0]
    for handle in handles:
        handle.remove()
    return out, reused


SMALL = TokenSelect(budget=6, sinks=2, local=5, block=4)


@pytest.mark.parametrize(
    "method",
    [
        TokenSelect(budget=6, sinks=2, local=5, block=4, reuse=None),
        TokenSelect(budget=6, sinks=2, local=5, block=5, pool=3, reuse=-1.0),
        TokenSelect(budget=5, sinks=0, local=7, block=3, reuse=0.5),
        TokenSelect(budget=6, sinks=2, local=5, block=4, reuse=None, scaled=True),
    ],
    ids=str,
)
def test_prompts_and_steps_follow_the_algorithm(tools, method):
    model = tools.build(layers=2)
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(3))[None, :40]
    expected, reused = expected_logits(model, method, ids, 30)
    assert len(reused) == 0 if method.reuse is None else len(reused) == 18 if method.reuse < 0 else 0 < len(reused) < 18
    got = torch.cat([step for _, step in tools.by_steps(model, ids, 30, method)])
    torch.testing.assert_close(got, expected[29:], atol=2e-5, rtol=1e-4)
    with torch.no_grad(), method.on(model):
        torch.testing.assert_close(model(ids[:, :30]).logits[0], expected[:30], atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits[0, 29:], expected[29:], atol=1e-2)


def test_products_count_scored_keys_and_kept_ones(tools):
    model = tools.build(layers=1)
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(4))[None, :40]
    *_, (run, _) = tools.by_steps(model, ids, 37, TokenSelect(budget=6, sinks=2, local=5, block=5, reuse=None))
    total = 0
    for start in range(0, 37, 5):
        C = min(5, 37 - start)
        N = start + C
        total += C * (min(N, 13) - C) + C * (C + 1) // 2 + (N - 7 if N > 13 else 0)
    total += sum(13 + n - 7 for n in (38, 39, 40))
    assert run.engine.account.pairs == 4 * total
    *_, (run, _) = tools.by_steps(model, ids, 37, TokenSelect(budget=6, sinks=2, local=5, block=5, reuse=-1.0))
    assert run.engine.account.pairs == 4 * (total - (39 - 7) - (40 - 7))  # the first step alone chooses


def test_no_position_exceeds_what_is_kept(tools, monkeypatch):
    """The model never sees its keys further apart than m: a position beyond it cannot change the result."""
    model = tools.build(layers=2)
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(5))[None, :60]
    near = torch.arange(60)[None]
    method = TokenSelect(budget=6, sinks=2, local=5, block=5)
    outs = []
    for positions in (near, near + 37):
        with torch.no_grad(), method.on(model) as run:
            out = [model(ids[:, :50], position_ids=positions[:, :50], use_cache=True).logits[:, -1]]
            run.end_prompt()
            for i in range(50, 60):
                at = positions[:, i : i + 1]
                out.append(model(ids[:, i : i + 1], position_ids=at, cache=run.cache, use_cache=True).logits[:, -1])
        outs.append(torch.cat(out))
    torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)


def test_positions_with_gaps_are_closed_up(tools):
    """Places that are not one apart (another method's, say) make no difference once tokens are re-indexed."""
    model = tools.build(layers=2)
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(6))[None, :40]
    method = TokenSelect(budget=6, sinks=2, local=5, block=5, reuse=0.5)
    outs = []
    for places in (torch.arange(40.0), torch.arange(40.0).sqrt().cumsum(0)):
        with torch.no_grad(), method.on(model) as run:
            out = [model(ids[:, :30], position_ids=places[None, :30], use_cache=True).logits[:, -1]]
            run.end_prompt()
            for i in range(30, 40):
                at = places[None, i : i + 1]
                out.append(model(ids[:, i : i + 1], position_ids=at, cache=run.cache, use_cache=True).logits[:, -1])
        outs.append(torch.cat(out))
    torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "method", [TokenSelect(budget=1.0), TokenSelect(budget=40, sinks=2, local=20, block=7)], ids=str
)
def test_a_budget_of_everything_is_plain_bit_for_bit(tools, llama, method):
    batch = FAMILIES["llama"].prompt(40)
    plain, _ = tools.generate(llama, batch)
    ours, run = tools.generate(llama, batch, method)
    assert torch.equal(ours, plain) and not run.acted and run.report().attention_work == 1.0


@pytest.mark.parametrize(
    "method",
    [
        SMALL,
        TokenSelect(budget=6, sinks=2, local=5, block=4, reuse=0.3),
        TokenSelect(budget=0.2, sinks=1, local=4, block=3, reuse=0.2, pool=3),
        TokenSelect(budget=13, sinks=2, local=5, block=5, reuse=-1.0),  # the short prompt grows out of it
    ],
    ids=str,
)
def test_left_padding_changes_nothing(tools, method):
    tools.assert_padded_equals_alone(method, new=14)


def test_chunks_of_whole_blocks_change_nothing(tools, llama):
    batch = FAMILIES["llama"].prompt(61)
    with torch.no_grad():
        with SMALL.on(llama):
            whole = llama(**batch).logits[:, -1]
        with SMALL.on(llama, chunk=12) as run:
            chunked = llama.generate(
                **batch, max_new_tokens=1, output_logits=True, return_dict_in_generate=True, do_sample=False
            ).logits[0]
    assert run.acted
    torch.testing.assert_close(chunked, whole, **FAMILIES["llama"].tolerance)


@dataclass(frozen=True)
class Watched(TokenSelect):
    """Counts how often each layer chose."""

    abstract: ClassVar[bool] = True
    chosen: ClassVar[list] = []

    def _choose(self, kernel, *args):
        self.chosen.append((kernel.layer, kernel.key.shape[2]))
        return super()._choose(kernel, *args)


def watched(method):
    Watched.chosen.clear()
    return Watched(**{f.name: getattr(method, f.name) for f in fields(method)})


@pytest.mark.parametrize("reuse, expected", [(None, 11), (1.0, 11), (-1.0, 1)])
def test_a_choice_stays_while_fingerprints_are_alike(tools, llama, reuse, expected):
    batch = FAMILIES["llama"].prompt(40)
    method = TokenSelect(budget=6, sinks=2, local=5, block=4, reuse=reuse)
    tools.generate(llama, batch, watched(method), new=12)
    assert [n for layer, n in Watched.chosen if layer == 2] == list(range(41, 41 + expected))


def test_repeated_queries_keep_the_choice_and_cost_no_scoring(tools):
    """The same token at each step has nearly the same query in layer 0."""
    model = tools.build(layers=1)
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(5))[None, :50]
    ids[:, 40:] = 7
    for _ in tools.by_steps(model, ids, 40, watched(TokenSelect(budget=6, sinks=2, local=5, block=5))):
        pass
    assert Watched.chosen == [(0, 41)]


def test_rows_that_come_in_between_make_the_next_step_choose(tools, llama):
    batch = FAMILIES["llama"].prompt(40)
    method = TokenSelect(budget=6, sinks=2, local=5, block=4, reuse=-1.0)
    with torch.no_grad(), watched(method).on(llama) as run:
        out = llama.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, FAMILIES["llama"].prompt(30, seed=9)["input_ids"]], 1)
        run.begin_prompt()
        llama.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), cache=run.cache, max_new_tokens=3, do_sample=False
        )
    assert [n for layer, n in Watched.chosen if layer == 1] == [41, 75]


def test_a_second_turn_equals_one_prompt(llama):
    family = FAMILIES["llama"]
    ids = family.prompt(60)["input_ids"]
    with torch.no_grad():
        with SMALL.on(llama):
            whole = llama(input_ids=ids).logits[:, 40:]
        with SMALL.on(llama) as run:
            llama(input_ids=ids[:, :40], use_cache=True)
            run.end_prompt()
            at = torch.arange(40, 60)[None]
            rest = llama(input_ids=ids[:, 40:], position_ids=at, cache=run.cache, use_cache=True).logits
    torch.testing.assert_close(rest, whole, **family.tolerance)


def test_what_a_layer_knows_follows_the_beams(llama):
    """Beams that all change places at each step, against the same beams with nothing remembered."""
    batch = FAMILIES["llama"].prompt(40)
    outs = []
    for forget in (False, True):

        @dataclass(frozen=True)
        class Forgetful(TokenSelect):
            abstract: ClassVar[bool] = True

            def _unrotated(self, kernel, forget=forget):
                if forget:
                    kernel.facts.pop("token-select keys", None)
                return super()._unrotated(kernel)

        method = Forgetful(budget=6, sinks=2, local=2, block=2, reuse=None)
        with method.on(llama) as run:
            outs.append(llama.generate(**batch, num_beams=4, max_new_tokens=14, do_sample=False))
    assert torch.equal(*outs)
    ledger = run.engine.ledger
    before = {name: value.clone() for name, value in ledger.facts["token-select"][1].items() if name not in ("n",)}
    ledger.select(torch.tensor([3, 0, 0]))
    for name, value in before.items():
        assert torch.equal(ledger.facts["token-select"][1][name], value[[3, 0, 0]])


@pytest.mark.parametrize(
    "other", [A2SF(budget=20, recent=2), A2SF(budget=(30, 20, 12, 9), recent=2), ZipCache(gap=5)], ids=str
)
def test_reads_what_another_method_left(tools, llama, other):
    batch = FAMILIES["llama"].prompt(40)
    logits, run = tools.generate(llama, batch, TokenSelect(budget=3, sinks=1, local=3, block=3) | other)
    assert logits.isfinite().all() and run.acted
    everything, alone = (
        tools.generate(llama, batch, method)[0]
        for method in (TokenSelect(budget=200, sinks=1, local=3, block=3) | other, other)
    )
    assert torch.equal(everything, alone)


def test_scaled_votes_are_the_attention_s_own_logits():
    q, k, _ = tensors(9)
    index, _ = select(fingerprint(q, FREQ, 5), k, [6], sinks=3, local=5, scaling=8**-0.5)
    assert index[0, 0].tolist() == plain_kept(q[0], k[0], 3, 6, 5, scaling=8**-0.5)[0]
    torch.testing.assert_close(logits(fingerprint(q, FREQ, 5), k, 0.5), logits(fingerprint(q, FREQ, 5), k) / 2)


def test_composes_with_a_method_that_sets_positions(tools):
    family = FAMILIES["llava"]
    model, batch = family.tiny(), family.prompt(40, images=2)
    logits, run = tools.generate(model, batch, TokenSelect(budget=6, sinks=2, local=5, block=4) | V2PE(delta=0.25))
    assert logits.isfinite().all() and run.acted


def test_refuses_what_it_cannot_serve():
    with pytest.raises(UnsupportedModel, match="full attention"):
        TokenSelect().on(FAMILIES["mistral"].tiny())
    with pytest.raises(UnsupportedModel, match="RoPE"):
        TokenSelect().on(FAMILIES["gpt2"].tiny())
    with pytest.raises(SlotConflict, match=r"cache\.read"):
        TokenSelect() | TidalDecode()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": 0}, r"TokenSelect.budget must be .*got 0"),
        ({"block": 513}, r"TokenSelect.block must be in \[1, local\] = \[1, 512\], got 513"),
        ({"local": 100}, r"TokenSelect.block must be in \[1, local\] = \[1, 100\], got 512"),
        ({"pool": 6}, r"TokenSelect.pool must be odd or None, got 6"),
        ({"reuse": 1.5}, r"TokenSelect.reuse must be in \[-1, 1\], got 1.5"),
    ],
)
def test_bad_hyperparameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TokenSelect(**options)
