"""HiP attention's tree search and block-sparse attention against plain loops, and the attached class."""

import itertools
import math
from dataclasses import dataclass, fields
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqwise.core.errors import SlotConflict, UnsupportedModel
from seqwise.methods import A2SF, TidalDecode, ZipCache
from seqwise.methods.cache.hip_attention import (
    HiPAttention,
    block_sparse_attention,
    branch,
    chunks,
    hip_attention,
    key_blocks,
    products,
    rounds,
    runs,
    scored_rows,
    search,
)
from seqwise.testing.families import FAMILIES


def walks(seed, B=1, H=2, Hkv=1, q=21, T=53, D=8):
    """Queries, and keys that change little from token to token."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(B, H, q, D, generator=g),
        torch.randn(B, Hkv, T, D, generator=g).cumsum(2) / 3,
        torch.randn(B, Hkv, T, D, generator=g),
    )


# the plain search of one head, step by step


def plain_search(q, k, budget, block_q, block_k, window, stride, representative):
    """q (Q, D), k (T, D) -> per query block (list of chosen blocks, how many count)."""
    Q, T = len(q), len(k)
    found = []
    for r0 in range(0, Q, block_q):
        rows = list(range(r0, min(r0 + block_q, Q)))
        visible = T - Q + rows[-1] + 1
        searchable = max(0, visible - window)
        M, n = math.ceil(searchable / block_k), math.ceil(budget / block_k)
        if searchable <= budget:
            found.append((list(range(M)), M))
            continue
        edges = [M * i // n for i in range(n + 1)]
        parts = [(a, b - a) for a, b in itertools.pairwise(edges)]
        scoring = rows[stride - 1 :: stride] or rows[-1:]
        g = M / n
        while g > 1:
            halves = [half for s, z in parts for half in ((s, z // 2), (s + z // 2, z - z // 2))]
            scores = []
            for s, z in halves:
                at = s + z // 2 if representative == "centre" else s
                keys = range(at * block_k, min(at * block_k + block_k, visible))
                scores.append(max((float(q[i] @ k[j]) for i in scoring for j in keys), default=-32000) if z else -32000)
            best = sorted(range(2 * n), key=lambda i: (-scores[i], halves[i]))[:n]
            parts = [halves[i] for i in sorted(best)]
            g /= 2
        assert [z for _, z in parts] == [1] * n
        found.append((sorted(s for s, _ in parts), n))
    return found


def plain_attention(q, k, v, found, block_q, block_k, window, sinks):
    """Attention of one head under a mask of the union of blocks, window and sinks."""
    Q, T = len(q), len(k)
    seen = torch.zeros(Q, T, dtype=torch.bool)
    for i in range(Q):
        blocks, _ = found[i // block_q]
        at = T - Q + i
        chosen = {j for b in blocks for j in range(b * block_k, (b + 1) * block_k)}
        for j in range(at + 1):
            seen[i, j] = j in chosen or j > at - window or j < sinks
    z = (q @ k.T / math.sqrt(q.shape[-1])).masked_fill(~seen, float("-inf"))
    return z.softmax(-1) @ v, seen


SETTINGS = [
    {"budget": 8, "block_q": 8, "block_k": 2, "window": 4, "stride": 2},
    {"budget": 5, "block_q": 4, "block_k": 2, "window": 3, "stride": 2},
    {"budget": 7, "block_q": 5, "block_k": 3, "window": 7, "stride": 2},
    {"budget": 3, "block_q": 4, "block_k": 1, "window": 1, "stride": 1},
    {"budget": 4, "block_q": 6, "block_k": 4, "window": 1, "stride": 4},
    {"budget": 1, "block_q": 3, "block_k": 2, "window": 2, "stride": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("representative", ["centre", "first"])
def test_search_and_attention_follow_the_algorithm(settings, representative):
    for seed, (q_rows, T) in enumerate([(21, 53), (53, 53), (1, 40), (17, 18)]):
        q, k, v = walks(seed, B=2, H=4, Hkv=2, q=q_rows, T=T)
        names = {name: settings[name] for name in ("block_q", "block_k", "window", "stride")}
        blocks, count = key_blocks(q, k, settings["budget"], representative=representative, **names)
        out = hip_attention(q, k, v, settings["budget"], sinks=2, representative=representative, **names)
        assert blocks.shape[2] == -(-q_rows // settings["block_q"]) and count.shape == blocks.shape[:3]
        for b in range(2):
            for h in range(4):
                found = plain_search(q[b, h], k[b, h // 2], representative=representative, **settings)
                for i, (chosen, valid) in enumerate(found):
                    assert count[b, h, i] == valid
                    got = blocks[b, h, i, :valid].tolist()
                    assert got == [settings["block_k"] * c for c in chosen] == sorted(set(got))
                expected, _ = plain_attention(
                    q[b, h], k[b, h // 2], v[b, h // 2], found, names["block_q"], names["block_k"], names["window"], 2
                )
                torch.testing.assert_close(out[b, h], expected)


@given(st.integers(1, 300), st.integers(1, 40))
def test_chunks_are_contiguous_even_and_exact(M, n):
    start, size = chunks(torch.tensor([M]), n)
    assert start[0].tolist() == [M * i // n for i in range(n)]
    assert (start + size)[0].tolist() == [M * (i + 1) // n for i in range(n)]
    assert int(size.max() - size.min()) <= 1


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 5), st.integers(1, 50))
def test_rounds_are_the_halvings_until_a_chunk_is_one_block(longest, budget, block, window):
    searchable = max(0, longest - window)
    M, n = math.ceil(searchable / block), math.ceil(budget / block)
    halvings, g = 0, M / n
    while searchable > budget and g > 1:
        g, halvings = g / 2, halvings + 1
    assert rounds(longest, budget, block, window) == halvings


def test_more_halvings_than_needed_change_nothing():
    """Query blocks of one call share the number of rounds, that of the longest."""
    q, k, _ = walks(3, q=48, T=48)
    together = key_blocks(q, k, 6, block_q=4, block_k=2, window=2)
    for i in range(12):
        stop = 4 * (i + 1)
        blocks, count = key_blocks(q[:, :, stop - 4 : stop], k[:, :, :stop], 6, block_q=4, block_k=2, window=2)
        valid = int(count[0, 0, 0])
        assert torch.equal(blocks[:, :, 0, :valid], together[0][:, :, i, :valid])


def test_halves_of_uneven_chunks():
    start, size = branch(torch.tensor([0, 5, 6]), torch.tensor([5, 1, 0]))
    assert start.tolist() == [0, 2, 5, 5, 6, 6] and size.tolist() == [2, 3, 0, 1, 0, 0]


def test_every_second_row_scores_and_a_single_row_scores_itself():
    q = torch.arange(12.0).view(1, 1, 2, 6, 1)
    assert scored_rows(q, torch.tensor([6, 3]))[0, 0, :, :, 0].tolist() == [[1, 3, 5], [7, 7, 7]]
    assert scored_rows(q, torch.tensor([6, 1]))[0, 0, :, :, 0].tolist() == [[1, 3, 5], [6, 6, 6]]
    assert scored_rows(q[..., :1, :], torch.tensor([1, 1]))[0, 0, :, :, 0].tolist() == [[0], [6]]
    assert scored_rows(q, torch.tensor([6, 6]), stride=4)[0, 0, :, :, 0].tolist() == [[3], [9]]


def test_ties_go_to_the_earlier_block():
    q, k = torch.ones(1, 1, 4, 3), torch.ones(1, 1, 60, 3)
    blocks, count = key_blocks(q, k, 6, block_q=4, block_k=2, window=4)
    assert int(count) == 3 and blocks[0, 0, 0].tolist() == [0, 2, 4]


def test_a_budget_of_everything_is_full_attention():
    q, k, v = walks(4, B=2, H=4, Hkv=2, q=37, T=53)
    full = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.ones(37, 53, dtype=torch.bool).tril(16), enable_gqa=True
    )
    for budget, window in ((53, 1), (60, 3), (33, 20)):
        torch.testing.assert_close(hip_attention(q, k, v, budget, block_q=8, window=window, sinks=0), full)


def test_only_listed_tokens_are_read_and_each_counts_once():
    q, k, v = walks(5, q=4, T=40)
    names = {"block_q": 4, "block_k": 2, "window": 3}
    blocks, count = key_blocks(q, k, 6, **names)
    found = [(blocks[0, h, 0] // 2).tolist() for h in range(2)]
    union = {2 * c + i for own in found for c in own for i in (0, 1)} | set(range(5)) | set(range(34, 40))
    hidden = torch.tensor([j not in union for j in range(40)])[:, None]
    assert hidden.any()
    out = hip_attention(q, k, v, 6, sinks=5, **names)
    poisoned = block_sparse_attention(
        q[:, :, None], k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.nan), blocks // 2, count,
        torch.tensor([[[36]]]), block=2, window=3, sinks=5,
    )  # fmt: skip
    assert torch.equal(out, poisoned[:, :, 0])
    # ones as values: any token that counted twice would still give 1, so weights are compared through distinct values
    eye = torch.eye(40).expand(1, 1, 40, 40)
    weights = hip_attention(q, k, eye, 6, sinks=5, **names)
    for h in range(2):
        expected, seen = plain_attention(q[0, h], k[0, 0], eye[0, 0], [(found[h], 3)], 4, 2, 3, 5)
        torch.testing.assert_close(weights[0, h], expected)
        assert torch.equal(weights[0, h] > 0, seen)


def test_rows_mask_chosen_tokens_that_come_after_them_and_never_see_nothing():
    q, k, v = walks(6, q=32, T=32)
    k[:, :, 24:] = 40 * q[:, :1, 24:32]  # the search, on behalf of the block's last row, likes what is new
    eye = torch.eye(32).expand(1, 1, 32, 32)
    weights = hip_attention(q, k, eye, 4, block_q=32, block_k=2, window=1, sinks=0)
    assert torch.equal(weights, weights.tril()) and torch.allclose(weights.sum(-1), torch.ones(1, 2, 32))
    first = weights[0, :, 0]
    assert torch.equal(first, torch.eye(32)[:1].expand(2, -1))  # its window is all it has


def test_slots_without_a_token_are_skipped():
    q, k, v = walks(7, B=1, H=4, Hkv=2, q=9, T=30)
    names = {"block_q": 4, "block_k": 2, "window": 3, "sinks": 2}
    alone = hip_attention(q, k, v, 6, **names)
    pads = 7
    padded = [torch.cat([torch.full((1, 2, pads, 8), 1e4), x], 2) for x in (k, v)]
    for dead in (torch.tensor([[pads]]), torch.tensor([[pads, pads]])):
        torch.testing.assert_close(hip_attention(q, *padded, 6, dead=dead, **names), alone)
    shorter = [torch.cat([x[:, :1], torch.cat([torch.full((1, 1, 11, 8), 1e4), x[:, 1:, 11:]], 2)], 1) for x in (k, v)]
    mixed = hip_attention(q, *shorter, 6, dead=torch.tensor([[0, 11]]), **names)
    torch.testing.assert_close(mixed[:, :2], alone[:, :2])
    torch.testing.assert_close(mixed[:, 2:], hip_attention(q[:, 2:], k[:, 1:, 11:], v[:, 1:, 11:], 6, **names))


def test_other_scaling():
    q, k, v = walks(8)
    torch.testing.assert_close(
        hip_attention(q, k, v, 6, block_q=4, window=3, scaling=0.2),
        hip_attention(q * 0.2 * math.sqrt(8), k, v, 6, block_q=4, window=3),
    )


def test_half_precision():
    q, k, v = (x.bfloat16() for x in walks(9))
    out = hip_attention(q, k, v, 6, block_q=4, window=3)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


@pytest.mark.parametrize("length", [1, 3])
def test_runs_of_a_cache_with_spare_slots(length):
    buffer = torch.randn(2, 2, 20, 3)
    x = buffer[:, :, :13]
    first = torch.randint(13 - length + 1, (2, 4, 2, 5), generator=torch.Generator().manual_seed(0))
    expected = torch.stack(
        [torch.stack([x[b, h // 2][first[b, h][..., None] + torch.arange(length)] for h in range(4)]) for b in range(2)]
    )
    assert torch.equal(runs(x, first, length), expected)
    assert torch.equal(runs(x.transpose(1, 2).contiguous().transpose(1, 2), first, length), expected)


def test_keys_that_a_search_scores_grow_like_the_logarithm():
    n = 16
    scored = [rounds(T, 2 * n, 2, 8) * 2 * n for T in (520, 1032, 2056, 4104, 8200)]
    steps = [b - a for a, b in itertools.pairwise(scored)]
    assert steps == [2 * n] * 4 and scored[-1] == 8 * 2 * n


def test_products_are_at_most_those_of_the_rows_and_the_searches():
    q, k, v = walks(10, q=45, T=45)
    names = {"block_q": 8, "block_k": 2, "window": 3, "stride": 2}
    blocks, count = key_blocks(q, k, 6, **names)
    seen = 0
    for h in range(2):
        found = [((blocks[0, h, i] // 2)[: count[0, h, i]].tolist(), 0) for i in range(6)]
        seen += int(plain_attention(q[0, h], k[0, 0], v[0, 0], found, 8, 2, 3, 2)[1].sum())
    searched = sum(rounds(min(8 * (i + 1), 45), 6, 2, 3) * 12 * (4 if i < 5 else 2) for i in range(6))
    total = products(45, 45, 6, sinks=2, **names)
    assert seen / 2 <= total - searched <= 45 * (2 + 6 + 3)


def recall(q, k, blocks, T):
    """Share of the true attention of one row per head on the tokens of its blocks."""
    p = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)[:, :, 0]  # (B, H, T)
    tokens = (blocks[..., None] + torch.arange(2)).flatten(-2)
    return p.gather(-1, tokens.clamp(max=T - 1)).sum(-1).mean()


@pytest.mark.parametrize("rho", [0.9, 0.97])
def test_finds_more_attention_than_chance_and_less_than_the_best(rho):
    g = torch.Generator().manual_seed(11)
    T, k, D = 256, 32, 16
    keys = [torch.randn(40, 1, D, generator=g)]
    for _ in range(T - 1):
        keys.append(rho * keys[-1] + math.sqrt(1 - rho**2) * torch.randn(40, 1, D, generator=g))
    K, q = torch.stack(keys, 2), torch.randn(40, 1, 1, D, generator=g) * 2
    blocks, _ = key_blocks(q, K, k, block_q=1, block_k=2, window=0)
    p = (q @ K.mT / math.sqrt(D)).softmax(-1)[:, :, 0]
    best = p.topk(k).values.sum(-1).mean()
    chance = torch.rand(40, 1, T // 2, generator=g).topk(k // 2).indices * 2
    assert recall(q, K, chance, T) + 0.1 < recall(q, K, blocks[:, :, 0], T) < best


# the attached class

SMALL = HiPAttention(budget=6, block_q=8, window=2, sinks=1, stride=4, refresh=3, dense=1)


@dataclass(frozen=True)
class Watched(HiPAttention):
    """Notes what each read saw and chose."""

    abstract: ClassVar[bool] = True
    seen: ClassVar[list] = []

    def read(self, read):
        choice = super().read(read)
        self.seen.append((read.layer, read.query.clone(), read.key.clone(), choice))
        return choice


def watched(method):
    Watched.seen.clear()
    return Watched(**{f.name: getattr(method, f.name) for f in fields(method)})


def test_steps_search_once_in_a_period_and_the_window_moves_on(tools):
    model = tools.build(layers=3)
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(3))[:80].view(2, 40)
    for _ in tools.by_steps(model, ids, 31, watched(SMALL)):
        pass
    steps = [Watched.seen[i : i + 3] for i in range(0, len(Watched.seen), 3)]
    assert len(steps) == 9
    for number, step in enumerate(steps):
        n = 32 + number
        assert step[0][3] is None  # a dense layer
        source = steps[number // 3 * 3]
        for layer in (1, 2):
            index, live = step[layer][3]
            then = n - number % 3
            query, key = source[layer][1], source[layer][2][:, :, :then]
            blocks, _ = key_blocks(query, key, 6, block_q=1, window=2, stride=4)
            for b in range(2):
                for h in range(4):
                    tokens = index[b, h][live[b, h]].tolist()
                    assert len(tokens) == len(set(tokens))  # each once
                    chosen = {t + i for t in blocks[b, h, 0].tolist() for i in (0, 1)}
                    assert set(tokens) == {0} | chosen | {n - 2, n - 1}
    assert any(not torch.equal(steps[0][1][3][0][:, :, :7], step[1][3][0][:, :, :7]) for step in steps[3:])


def expected_outputs(model, method, ids):
    """The plain model's layers with masks of the method's own sets, for a prompt in one forward: logits (1, n, V)."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    handles = []
    for index, layer in enumerate(model.model.layers):
        if index < method.dense:
            continue

        def masked(module, args, kwargs, output):
            x, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
            q, k, v = (
                p(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
                for p in (module.q_proj, module.k_proj, module.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            outs = []
            for h in range(q.shape[1]):
                kv = h * k.shape[1] // q.shape[1]
                found = plain_search(
                    q[0, h], k[0, kv], method.budget, method.block_q, method.block_k, method.window, method.stride,
                    method.representative,
                )  # fmt: skip
                outs.append(
                    plain_attention(
                        q[0, h], k[0, kv], v[0, kv], found, method.block_q, method.block_k, method.window, method.sinks
                    )[0]
                )
            return (module.o_proj(torch.stack(outs, 1).flatten(1)[None]), *output[1:])

        handles.append(layer.self_attn.register_forward_hook(masked, with_kwargs=True))
    with torch.no_grad():
        logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return logits


def test_prompts_are_read_block_by_block(tools):
    model = tools.build(layers=3)
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(4))[None, :61]
    expected = expected_outputs(model, SMALL, ids)
    with torch.no_grad(), SMALL.on(model) as run:
        logits = model(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, expected, atol=1e-2)
    pairs = 4 * (61 * 62 // 2 + 2 * products(61, 61, 6, block_q=8, block_k=2, window=2, sinks=1, stride=4))
    assert run.engine.account.pairs == pairs and run.report().attention_work < 1


def test_chunks_of_whole_query_blocks_change_nothing(tools, llama):
    """Each chunk's query blocks begin at its first row."""
    batch = FAMILIES["llama"].prompt(61)
    method = HiPAttention(budget=6, block_q=4, window=2, sinks=1, dense=0, stride=2)
    with torch.no_grad():
        with method.on(llama):
            whole = llama(**batch).logits[:, -1]
        with method.on(llama, chunk=16) as run:
            chunked = llama.generate(
                **batch, max_new_tokens=1, output_logits=True, return_dict_in_generate=True, do_sample=False
            ).logits[0]
    assert run.acted
    torch.testing.assert_close(chunked, whole, **FAMILIES["llama"].tolerance)


def test_a_block_of_rows_after_the_prompt_is_read_sparsely(tools, llama):
    ids = FAMILIES["llama"].prompt(61)["input_ids"]
    method = HiPAttention(budget=6, block_q=4, window=2, sinks=1, dense=0)
    with torch.no_grad():
        with method.on(llama):
            whole = llama(input_ids=ids).logits
        with method.on(llama) as run:
            llama(input_ids=ids[:, :40], use_cache=True)
            run.end_prompt()
            at = torch.arange(40, 61)[None]
            rest = llama(input_ids=ids[:, 40:], position_ids=at, cache=run.cache, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 40:], **FAMILIES["llama"].tolerance)


@pytest.mark.parametrize(
    "method", [HiPAttention(budget=1.0, dense=0), HiPAttention(budget=60, window=3, dense=0)], ids=str
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
        HiPAttention(budget=0.2, block_q=4, window=3, sinks=2, dense=0, refresh=4),
        HiPAttention(
            budget=14, block_q=5, block_k=1, window=4, sinks=0, dense=0, refresh=5
        ),  # the short prompt grows into it
        HiPAttention(budget=8, block_q=5, block_k=3, window=20, dense=0, refresh=5),  # is shorter than the window
        HiPAttention(budget=6, window=2, dense=1, block_q=3, representative="first"),
    ],
    ids=str,
)
def test_left_padding_changes_nothing(tools, method):
    tools.assert_padded_equals_alone(method, new=14)


@pytest.mark.parametrize(
    "other", [A2SF(budget=20, recent=2), A2SF(budget=(30, 20, 12, 9), recent=2), ZipCache(gap=5)], ids=str
)
def test_reads_what_another_method_left(tools, llama, other):
    batch = FAMILIES["llama"].prompt(40)
    logits, run = tools.generate(llama, batch, SMALL | other)
    assert logits.isfinite().all() and run.acted
    everything = HiPAttention(budget=200, window=1, dense=0) | other
    ours, alone = (tools.generate(llama, batch, method)[0] for method in (everything, other))
    torch.testing.assert_close(ours, alone, **FAMILIES["llama"].tolerance)


def test_blocks_follow_the_beams(llama):
    batch = FAMILIES["llama"].prompt(40)
    with HiPAttention(budget=6, window=2, dense=0, refresh=100).on(llama) as run:
        llama.generate(**batch, num_beams=3, max_new_tokens=3, do_sample=False)
    ledger = run.engine.ledger
    _, blocks, listed = ledger.facts["hip"][0]
    assert blocks.shape == (3, 4, 3) and listed.all()
    blocks[2] += 1
    ledger.select(torch.tensor([2, 2, 0]))
    assert torch.equal(ledger.facts["hip"][0][1], blocks[[2, 2, 0]])


def test_a_second_turn_searches_anew(tools, llama):
    batch = FAMILIES["llama"].prompt(40)
    method = HiPAttention(budget=6, block_q=4, window=2, dense=0, refresh=100)
    Watched.seen.clear()
    with torch.no_grad(), watched(method).on(llama) as run:
        out = llama.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, FAMILIES["llama"].prompt(30, seed=9)["input_ids"]], 1)
        run.begin_prompt()
        llama.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), cache=run.cache, max_new_tokens=3, do_sample=False
        )
    index, live = Watched.seen[-1][3]
    n = Watched.seen[-1][2].shape[2]
    assert n == 76 and ((index > 43) & (index < n - 2) & live).any()  # of the new turn


def test_periods_begin_with_each_turn(monkeypatch, llama):
    searched = []

    def counted(rows, *args, **options):
        searched.append(rows.shape[3] == 1)
        return search(rows, *args, **options)

    monkeypatch.setattr("seqwise.methods.cache.hip_attention.search", counted)
    batch, ids = FAMILIES["llama"].prompt(40), None
    with HiPAttention(budget=6, block_q=64, window=2, dense=3, refresh=4).on(llama) as run:
        for new, expected in ((7, 2), (5, 1), (6, 2)):  # one token less comes as a step
            searched.clear()
            ids = batch["input_ids"] if ids is None else torch.cat([ids, batch["input_ids"]], 1)
            run.begin_prompt()
            ids = llama.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), cache=run.cache, max_new_tokens=new, do_sample=False
            )
            assert sum(searched) == expected


def test_refuses_what_it_cannot_serve():
    with pytest.raises(UnsupportedModel, match="full attention"):
        HiPAttention().on(FAMILIES["mistral"].tiny())
    with pytest.raises(SlotConflict, match=r"cache\.read"):
        HiPAttention() | TidalDecode()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("budget", 0, r"HiPAttention.budget must be .*got 0"),
        ("window", 0, r"HiPAttention.window must be >= 1, got 0 \(newest tokens"),
        ("block_q", 0, r"HiPAttention.block_q must be >= 1, got 0"),
        ("representative", "last", r"HiPAttention.representative must be one of 'centre', 'first', got 'last'"),
    ],
)
def test_bad_hyperparameters_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        HiPAttention(**{name: value})
