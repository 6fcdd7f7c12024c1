import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seqwise
import seqwise.methods.order.pine as module
from seqwise.core.errors import MissingExtra, PromptError, SlotConflict, UnsupportedModel
from seqwise.core.method import Method
from seqwise.core.rope import rotate
from seqwise.core.segments import Segments
from seqwise.methods import A2SF, V2PE, ZipCache
from seqwise.methods.order.pine import (
    PINE,
    base_positions,
    document_importance,
    layout,
    mean_attention,
    pine_attention,
    sees,
    shifts,
)
from seqwise.testing.families import FAMILIES

LLAMA = FAMILIES["llama"]
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
INV_FREQ = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)


def documents(P, lengths, S, numbers=None):
    """Document of each token, (n,)."""
    numbers = range(len(lengths)) if numbers is None else numbers
    inside = [j for j, length in zip(numbers, lengths, strict=True) for _ in range(length)]
    return torch.tensor([-1] * P + inside + [-1] * S)


def tensors(n, seed=0, H=4, Hkv=2):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(heads, n, 8, generator=generator) for heads in (H, Hkv, Hkv)]


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def turned(x, position):
    """One vector rotated to a position, pair by pair."""
    half = len(x) // 2
    angle = position * INV_FREQ
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def by_the_book(q, k, v, P, lengths):
    """The whole prompt's attention, one head, query and key at a time; keys are moved, not queries."""
    H, n, D = q.shape
    K, E, group = len(lengths), P + sum(lengths), H // len(k)
    start = [P + sum(lengths[:j]) for j in range(K)]
    document = documents(P, lengths, n - E).tolist()
    base = [E - lengths[j] + t - start[j] if j >= 0 else t for t, j in enumerate(document)]
    inside = range(P, E)

    def attention_to_documents(h, t, columns):
        scores = [float(q[h, t] @ k[h // group][u]) / math.sqrt(D) for u in columns]
        return dict(zip(columns, softmax(scores), strict=True)) if columns else {}

    def shifted(ranked):
        found, total = {}, 0
        for j in ranked:
            found[j], total = total, total + lengths[j]
        return found

    out = torch.zeros(H, n, v.shape[-1])
    for h in range(H):
        importance = [[0.0] * K for _ in range(K)]
        for t in inside:
            p = attention_to_documents(h, t, [u for u in inside if document[u] != document[t]])
            for u, share in p.items():
                importance[document[t]][document[u]] += share / lengths[document[u]]
        for t in range(n):
            i = document[t]
            if t < P:
                shift, keys = {}, range(t + 1)
            elif i >= 0:
                others = sorted((j for j in range(K) if j != i), key=lambda j: -importance[i][j])
                shift = shifted([i, *others])
                keys = [u for u in range(E) if document[u] != i or u <= t]
            else:
                p = attention_to_documents(h, t, list(inside))
                mean = [sum(p[u] for u in inside if document[u] == j) / lengths[j] for j in range(K)]
                shift = shifted(sorted(range(K), key=lambda j: -mean[j]))
                keys = range(t + 1)
            query = turned(q[h, t], base[t])
            placed = [turned(k[h // group][u], base[u] - shift.get(document[u], 0)) for u in keys]
            p = softmax([float(query @ key) / math.sqrt(D) for key in placed])
            out[h, t] = sum(share * v[h // group][u] for share, u in zip(p, keys, strict=True))
    return out


def ordinary(q, k, v):
    """Causal attention with RoPE."""
    n, group = q.shape[1], len(q) // len(k)
    at = torch.arange(n)
    q, k = rotate(q, at, INV_FREQ), rotate(k, at, INV_FREQ).repeat_interleave(group, 0)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
    return scores.softmax(-1) @ v.repeat_interleave(group, 0)


def attended(q, k, v, document):
    return pine_attention(q[None], k[None], v[None], document[None], INV_FREQ)[0]


# the parts


def test_layout_counts_documents_in_any_order_and_batches_of_fewer():
    document = torch.stack([documents(2, [3, 1, 2], 1, numbers=(2, 0, 1)), documents(1, [4, 3], 1)])
    lengths, behind = layout(document)
    assert lengths.tolist() == [[1, 2, 3], [4, 3, 0]]
    assert behind[0].tolist() == [2, 0, 3] and behind[1, :2].tolist() == [3, 0]


def test_every_document_ends_where_the_last_one_does():
    document = documents(2, [3, 1, 2], 2)
    assert base_positions(document[None]).tolist() == [[0, 1, 5, 6, 7, 7, 6, 7, 8, 9]]
    assert base_positions(torch.full((1, 4), -1)).tolist() == [[0, 1, 2, 3]]


def test_means_leave_out_the_own_document_and_text_and_do_not_favour_length():
    raw = torch.log(torch.tensor([[4.0, 1, 1, 2, 2, 100]]))
    document = torch.tensor([0, 1, 1, 2, 2, -1])
    torch.testing.assert_close(mean_attention(raw, document, 3), torch.tensor([[0.4, 0.1, 0.2]]))
    found = mean_attention(raw.expand(3, -1), document, 3, torch.tensor([0, 2, -1]))
    wanted = torch.tensor([[0, 1 / 6, 2 / 6], [4 / 6, 1 / 6, 0], [0.4, 0.1, 0.2]])
    torch.testing.assert_close(found, wanted)
    alone = mean_attention(torch.zeros(1, 2), torch.tensor([0, 0]), 1, torch.tensor([0]))
    assert alone.tolist() == [[0.0]], "a single document has no other to attend to"


def test_a_documents_importance_sums_its_own_rows():
    mean = torch.tensor([[0.0, 1], [0, 2], [3, 0], [9, 9]])
    assert document_importance(mean, torch.tensor([0, 0, 1, -1])).tolist() == [[0, 3], [3, 0]]


def test_the_most_important_document_is_not_shifted_and_ties_go_by_number():
    lengths = torch.tensor([3, 5, 2])
    assert shifts(torch.tensor([0.1, 0.5, 0.2]), lengths).tolist() == [7, 0, 5]
    assert shifts(torch.tensor([0.1, 0.1, 0.2]), lengths).tolist() == [2, 5, 0]
    assert shifts(torch.tensor([0.1, 0.5, 0.2]), lengths, torch.tensor(0)).tolist() == [0, 3, 8]
    # two documents: the closed form
    both = shifts(torch.rand(2, 2), torch.tensor([4, 7]), torch.tensor([0, 1]))
    assert both.tolist() == [[0, 4], [7, 0]]


def test_the_sort_is_in_float32():
    importance = torch.tensor([0.5, 0.5 + 2**-12])  # equal in half precision
    assert importance.half()[0] == importance.half()[1]
    assert shifts(importance, torch.tensor([1, 1])).tolist() == [1, 0]
    raw = torch.log(torch.tensor([[1.0, 1 + 2**-6]])).bfloat16()
    assert mean_attention(raw, torch.tensor([0, 1]), 2).dtype == torch.float32


def test_visibility_pair_by_pair():
    document = documents(2, [2, 3], 2)
    place = torch.arange(9)
    found = sees(place[:, None], document[:, None], place, document)
    for t in range(9):
        for u in range(9):
            other = 2 <= t < 7 and 2 <= u < 7 and document[t] != document[u]
            assert bool(found[t, u]) == (u <= t or other)


# the whole layer


@pytest.mark.parametrize(
    "P, lengths, S", [(3, [2, 4, 3], 4), (1, [5, 1], 2), (2, [3], 3), (4, [1, 1, 6, 2], 1), (1, [2, 2, 2, 2, 2], 3)]
)
def test_a_layer_equals_the_rule_key_by_key(P, lengths, S):
    n = P + sum(lengths) + S
    q, k, v = tensors(n, seed=n)
    wanted, document = by_the_book(q, k, v, P, lengths), documents(P, lengths, S)
    torch.testing.assert_close(attended(q, k, v, document), wanted, atol=1e-5, rtol=1e-4)
    for r in (1, S):  # steps: the last rows alone
        torch.testing.assert_close(attended(q[:, n - r :], k, v, document), wanted[:, n - r :], atol=1e-5, rtol=1e-4)


def test_blocks_of_rows_change_nothing(monkeypatch):
    q, k, v = tensors(40, seed=3)
    document = documents(3, [7, 12, 9], 9)
    whole = attended(q, k, v, document)
    for cells in (1, 4 * 5 * 40):
        monkeypatch.setattr(module, "_CELLS", cells)
        torch.testing.assert_close(attended(q, k, v, document), whole, atol=1e-6, rtol=1e-5)


def test_samples_of_a_batch_have_their_own_documents():
    layouts = [documents(2, [3, 4], 11), documents(5, [1, 2, 3], 9), torch.full((20,), -1)]
    parts = [tensors(20, seed=b) for b in range(3)]
    together = pine_attention(*(torch.stack(x) for x in zip(*parts, strict=True)), torch.stack(layouts), INV_FREQ)
    for b in range(3):
        torch.testing.assert_close(together[b], attended(*parts[b], layouts[b]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(together[2], ordinary(*parts[2]), atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(4)), st.lists(st.integers(1, 5), min_size=4, max_size=4), st.integers(0, 100))
def test_permuted_documents_permute_their_rows_and_change_no_others(order, lengths, seed):
    P, S = 2, 3
    n = P + sum(lengths) + S
    q, k, v = tensors(n, seed)
    starts = [P + sum(lengths[:j]) for j in range(4)]
    index = torch.cat(
        [torch.arange(P), *(torch.arange(starts[j], starts[j] + lengths[j]) for j in order), torch.arange(n - S, n)]
    )
    out = attended(q, k, v, documents(P, lengths, S))
    for numbers in (order, range(4)):  # documents keep their numbers, or get those of their new places
        moved = documents(P, [lengths[j] for j in order], S, numbers)
        permuted = attended(q[:, index], k[:, index], v[:, index], moved)
        torch.testing.assert_close(permuted, out[:, index], atol=1e-5, rtol=1e-4)


def test_one_document_is_ordinary_attention():
    q, k, v = tensors(12)
    for document in (documents(3, [5], 4), documents(12, [], 0)):
        torch.testing.assert_close(attended(q, k, v, document), ordinary(q, k, v), atol=1e-5, rtol=1e-4)


def test_each_query_head_has_its_own_order():
    q, k, v = tensors(1 + 4 + 1, H=2, Hkv=1)
    k[0, 1:3], k[0, 3:5] = torch.eye(8)[0] * 4, torch.eye(8)[1] * 4
    q[0, -1], q[1, -1] = torch.eye(8)[0] * 4, torch.eye(8)[1] * 4
    torch.testing.assert_close(
        attended(q, k, v, documents(1, [2, 2], 1)), by_the_book(q, k, v, 1, [2, 2]), atol=1e-5, rtol=1e-4
    )
    raw = q[:, -1:] @ k[0, 1:5].T
    order = shifts(mean_attention(raw, torch.tensor([0, 0, 1, 1]), 2), torch.tensor([2, 2]))
    assert order[:, 0].tolist() == [[0, 2], [2, 0]]


# on models


def arranged(lengths, order, seed=0, prefix=2, suffix=4):
    """A prompt with its documents in this order, and its facts; documents are numbered as they stand."""
    generator = torch.Generator().manual_seed(seed)
    own = [torch.randint(1, 97, (length,), generator=generator) for length in lengths]
    head, tail = (torch.randint(1, 97, (length,), generator=generator) for length in (prefix, suffix))
    ids = torch.cat([head, *(own[i] for i in order), tail])[None]
    member = documents(prefix, [lengths[i] for i in order], suffix)[None]
    facts = replace(Segments.infer(ids, None, None), set=torch.where(member >= 0, 0, -1), member=member)
    return ids, facts


def forward(model, ids, facts, method=None, **options):
    with torch.no_grad(), (method or PINE()).on(model) as run:
        run.bind(facts)
        return model(ids, **options).logits


def generated(model, ids, facts, method=None, chunk=None, **options):
    with (method or PINE()).on(model, chunk=chunk) as run:
        run.bind(facts)
        return model.generate(ids, attention_mask=torch.ones_like(ids), **{**OPTIONS, **options})


@pytest.mark.parametrize("name", ["llama", "qwen3", "neox"])
def test_no_order_of_the_documents_changes_what_follows(name):
    model = FAMILIES[name].tiny()
    seen, plain = [], []
    for order in itertools.permutations(range(3)):
        ids, facts = arranged([4, 2, 5], order)
        seen.append(forward(model, ids, facts)[:, -4:])
        with torch.no_grad():
            plain.append(model(ids).logits[:, -4:])
    assert max(float((x - seen[0]).abs().max()) for x in seen) < 1e-4
    assert max(float((x - plain[0]).abs().max()) for x in plain) > 1e-2
    assert float((seen[0] - plain[0]).abs().max()) > 1e-2


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(4)), st.lists(st.integers(1, 5), min_size=4, max_size=4), st.integers(0, 100))
def test_a_generation_does_not_depend_on_the_order(order, lengths, seed):
    model = LLAMA.tiny()
    first, second = (generated(model, *arranged(lengths, one, seed)) for one in (range(4), order))
    for a, b in zip(first.scores, second.scores, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_a_model_sees_the_layer_by_the_book():
    """Each layer's output before its projection, from that layer's own q, k and v before RoPE."""
    model = LLAMA.tiny()
    ids, facts = arranged([3, 2, 4], range(3))
    seen = {}
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        attention.register_forward_pre_hook(
            lambda m, args, kwargs, i=i: seen.setdefault(i, {}).update(x=kwargs["hidden_states"]), with_kwargs=True
        )
        attention.o_proj.register_forward_pre_hook(lambda m, args, i=i: seen[i].update(out=args[0]))
    forward(model, ids, facts)
    for i, layer in enumerate(model.model.layers):
        a, x = layer.self_attn, seen[i]["x"]
        with torch.no_grad():
            q, k, v = (p(x)[0].unflatten(-1, (-1, 8)).transpose(0, 1) for p in (a.q_proj, a.k_proj, a.v_proj))
        wanted = by_the_book(q, k, v, 2, [3, 2, 4]).transpose(0, 1).flatten(1)
        torch.testing.assert_close(seen[i]["out"][0], wanted, atol=1e-4, rtol=1e-3)


def test_steps_with_a_cache_equal_the_whole_sequence_again():
    model = LLAMA.tiny()
    ids, facts = arranged([4, 2, 6], (1, 2, 0))
    out = generated(model, ids, facts)
    n, m = ids.shape[1], out.sequences.shape[1]
    longer = facts.take(torch.arange(m)[None].clamp(max=n - 1))  # what was generated is text like the suffix
    for use_cache in (True, False):
        logits = forward(model, out.sequences, longer, use_cache=use_cache)
        for step, scores in enumerate(out.scores):
            torch.testing.assert_close(scores, logits[:, n - 1 + step], atol=2e-4, rtol=1e-3)


def test_padded_prompts_of_other_layouts_equal_each_alone():
    model = LLAMA.tiny()
    prompts = [arranged([3, 5], range(2), 1), arranged([2, 4, 1, 6], range(4), 2), arranged([9], [0], 3)]
    width = max(ids.shape[1] for ids, _ in prompts)
    batch = LLAMA.pad_left([{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids, _ in prompts])
    with PINE().on(model) as run:
        run.bind(Segments.padded([facts for _, facts in prompts], width))
        together = model.generate(**batch, **OPTIONS)
    for b, (ids, facts) in enumerate(prompts):
        alone = generated(model, ids, facts)
        for ours, theirs in zip(together.scores, alone.scores, strict=True):
            torch.testing.assert_close(ours[b], theirs[0], **LLAMA.tolerance)


def test_equal_documents_are_harmless():
    model = LLAMA.tiny()
    ids, facts = arranged([3, 4, 2], (0, 1, 2))
    ids[0, 2:5] = ids[0, 9:12]  # suffix tokens again, then the same document twice
    twin = torch.cat([ids[:, :5], ids[:, 2:5], ids[:, 5:]], 1)
    member = torch.cat([facts.member[:, :5], torch.full((1, 3), 3), facts.member[:, 5:]], 1)
    both = replace(Segments.infer(twin, None, None), set=torch.where(member >= 0, 0, -1), member=member)
    swapped = replace(both, member=torch.where(member == 3, 0, torch.where(member == 0, 3, member)))
    torch.testing.assert_close(
        forward(model, twin, both)[:, -4:], forward(model, twin, swapped)[:, -4:], atol=1e-4, rtol=1e-4
    )


def test_one_document_changes_nothing():
    model = LLAMA.tiny()
    ids, facts = arranged([7], [0])
    with torch.no_grad():
        torch.testing.assert_close(forward(model, ids, facts), model(ids).logits, **LLAMA.tolerance)


def test_half_precision_computes_in_float32():
    model = LLAMA.tiny().to(torch.bfloat16)
    seen = []
    for order in ((0, 1, 2), (2, 0, 1)):
        ids, facts = arranged([4, 2, 5], order)
        seen.append(forward(model, ids, facts)[:, -4:])
    assert seen[0].dtype == torch.bfloat16 and seen[0].isfinite().all()


def test_caches_may_be_packed_or_evicted():
    model = LLAMA.tiny()
    ids, facts = arranged([6, 9, 7, 5], range(4), suffix=6)
    full = generated(model, ids, facts)
    for other, error in ((A2SF(budget=1.0), 1e-4), (ZipCache(bits=(8, 8)), 0.5)):
        out = generated(model, ids, facts, PINE() | other)
        assert out.sequences.equal(full.sequences)
        for ours, theirs in zip(out.scores, full.scores, strict=True):
            assert float((ours - theirs).abs().max()) < error
    evicting = PINE() | A2SF(budget=0.5, recent=2)
    with evicting.on(model) as run:
        run.bind(facts)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)
        assert max(run.report().kept) < 24
    torch.testing.assert_close(out.scores[0], full.scores[0], **LLAMA.tolerance)
    assert out.scores[1].isfinite().all() and not torch.allclose(out.scores[1], full.scores[1], atol=1e-3)


def test_slots_that_eviction_leaves_are_attended_as_such():
    """Of slots in any order, each head its own: the same as the live ones alone."""
    q, k, v = (x[None] for x in tensors(20, seed=5))
    document = documents(3, [4, 6, 3], 4)[None]
    kept = torch.tensor([[0, 2, 3, 5, 8, 9, 10, 13, 14, 16, 19], [1, 4, 6, 7, 8, 11, 12, 15, 17, 18, 19]])[None]
    live = torch.ones(1, 2, 11, dtype=torch.bool)
    live[0, 0, 3] = False
    rows = module._Tokens(torch.tensor([[19]]), document[:, 19:])
    slots = module._Tokens(kept, document[:, None].expand(-1, 2, -1).gather(2, kept))
    held = [x.gather(2, kept[..., None].expand(-1, -1, -1, 8)) for x in (k, v)]
    call = (layout(document), INV_FREQ, False, 8**-0.5)
    found = module._attention(q[:, :, 19:], *held, rows, slots, live, *call)[0]
    for h in range(2):  # one KV head at a time, without the dead slot, in reverse order
        own = kept[0, h][live[0, h]].flip(0)
        slots = module._Tokens(own[None, None], document[:, own][:, None])
        part = module._attention(
            q[:, 2 * h : 2 * h + 2, 19:], k[:, h : h + 1, own], v[:, h : h + 1, own], rows, slots,
            torch.ones(1, 1, len(own), dtype=torch.bool), *call,
        )[0]  # fmt: skip
        torch.testing.assert_close(found[:, 2 * h : 2 * h + 2], part, atol=1e-6, rtol=1e-5)


def test_work_is_counted():
    model = LLAMA.tiny()
    ids, facts = arranged([4, 4], range(2))
    with torch.no_grad(), PINE().on(model) as run:
        run.bind(facts)
        model(ids)
        assert run.acted
        assert run.report().attention_work == pytest.approx((14 * 8 + 14 * 14) / (14 * 15 / 2))


# refusals


@pytest.mark.parametrize(
    "sets, numbers, message",
    [
        ([-1, 0, 0, 1, 1, -1], [-1, 0, 1, 0, 1, -1], "one set of documents; sample 0 has another one"),
        ([0, 0, 0, -1, -1, -1], [0, 1, 1, -1, -1, -1], "begins with a document"),
        ([-1, -1, 0, 0, 0, 0], [-1, -1, 0, 0, 1, 1], "ends with a document; put a question behind it"),
        ([-1, 0, 0, 0, 0, -1], [-1, 0, 2, 2, 2, -1], "member 1 of set 0 has no tokens"),
        ([-1, 0, 0, 0, 0, -1], [-1, 0, 1, 0, 0, -1], "members must not overlap"),
        ([-1, 0, -1, 0, 0, -1], [-1, 0, -1, 1, 1, -1], "separators belong to the members"),
    ],
)
def test_prompts_that_have_no_documents_in_place_are_refused(sets, numbers, message):
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    facts = replace(Segments.infer(ids, None, None), set=torch.tensor([sets]), member=torch.tensor([numbers]))
    with pytest.raises(PromptError, match=message):
        forward(LLAMA.tiny(), ids, facts)


@dataclass(frozen=True)
class Repeats(Method):
    """Gives the model the prompt twice, the second set another one."""

    slots: ClassVar[tuple[str, ...]] = ("prompt",)

    def reword(self, ids, segments):
        n = ids.shape[1]
        twice = segments.take(torch.arange(2 * n)[None] % n)
        again = (torch.arange(2 * n)[None] >= n) & (twice.set >= 0)
        return torch.cat([ids, ids], 1), replace(twice, set=twice.set + again.long())


def test_a_composition_that_repeats_the_documents_is_refused_by_name():
    ids, facts = arranged([4, 5], range(2))
    with pytest.raises(
        SlotConflict, match=r"PINE\(\) orders one set of documents, Repeats\(\) makes a prompt of several"
    ):
        generated(LLAMA.tiny(), ids, facts, PINE() | Repeats())


def test_a_saved_context_goes_on(tmp_path):
    model = LLAMA.tiny()
    ids, facts = arranged([4, 5], range(2))
    out = generated(model, ids, facts)
    step = out.sequences[:, ids.shape[1] : ids.shape[1] + 1]
    with torch.no_grad(), PINE().on(model) as run:
        run.bind(facts)
        model(ids)
        run.save(tmp_path / "context.safetensors")
    with torch.no_grad(), PINE().on(model) as run:
        cache = run.load(tmp_path / "context.safetensors")
        logits = model(step, cache=cache).logits[:, -1]
    torch.testing.assert_close(logits, out.scores[1], **LLAMA.tolerance)


def test_chunks_are_refused_however_they_come():
    model = LLAMA.tiny()
    ids, facts = arranged([4, 5], range(2))
    with pytest.raises(PromptError, match="attach without chunk"):
        generated(model, ids, facts, chunk=4)
    with pytest.raises(PromptError, match="in one piece"):
        generated(model, ids, facts, prefill_chunk_size=4)


def test_a_later_turn_is_text_and_brings_no_second_set():
    model = LLAMA.tiny()
    ids, facts = arranged([4, 5], range(2))
    more, others = arranged([2, 3], range(2), seed=7)
    with torch.no_grad(), PINE().on(model) as run:
        run.bind(facts)
        model(ids)
        run.begin_prompt()
        later = model(more, cache=run.cache).logits
        run.begin_prompt()
        run.bind(others)
        with pytest.raises(PromptError, match="has another one, give it as text"):
            model(more, cache=run.cache)
    whole = torch.cat([ids, more], 1)
    longer = facts.take(torch.arange(whole.shape[1])[None].clamp(max=ids.shape[1] - 1))
    torch.testing.assert_close(later, forward(model, whole, longer)[:, ids.shape[1] :], atol=2e-4, rtol=1e-3)


def test_models_that_cannot_are_refused():
    for name, message in (("gpt2", "rotary positions"), ("mistral", "sliding windows"), ("qwen25_vl", "3-axis RoPE")):
        with pytest.raises(UnsupportedModel, match=rf"PINE\(\) needs .*{message}"):
            PINE().on(FAMILIES[name].tiny())
    capped = LLAMA.tiny()
    capped.config.attn_logit_softcapping = 50.0
    with pytest.raises(UnsupportedModel, match="no rule for capped attention logits"):
        PINE().on(capped)
    with pytest.raises(SlotConflict, match="positions"):
        PINE() | V2PE()
    with PINE().on(LLAMA.tiny()) as run, pytest.raises(PromptError, match="needs a set of pieces"):
        run.model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2)


@pytest.mark.slow
def test_a_real_models_answer_does_not_depend_on_the_order():
    from seqwise.lab.zoo import load_model

    try:
        model, tokenizer = load_model()
    except MissingExtra as error:
        pytest.skip(str(error))
    items = ["The apple costs 31 coins. ", "The lamp costs 77 coins. ", "A violin costs 12 coins, says Ann. "]
    seen = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        content = [
            {"type": "text", "text": "Read these prices: "},
            {"type": "set", "items": [items[i] for i in order]},
            {"type": "text", "text": "How much does the violin cost?"},
        ]
        batch, facts = seqwise.prepare(tokenizer, [{"role": "user", "content": content}])
        with PINE().on(model) as run:
            run.bind(facts)
            out = model.generate(**batch, **OPTIONS)
        seen.append((out.sequences[0, batch["input_ids"].shape[1] :].tolist(), out.scores[0]))
    assert max(float((scores - seen[0][1]).abs().max()) for _, scores in seen) < 1e-3
    assert all(tokens == seen[0][0] for tokens, _ in seen)
