import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from seqwise.core.errors import AlreadyAttached, PromptError, UnsupportedModel, UsageError
from seqwise.learn.nn.contextual_memory_reweaving import (
    Reweaving,
    attention_relevance,
    blend,
    capture,
    default_layers,
    document_loss,
    later_attention,
    memories,
    reconstruct,
    relevance,
    split,
)
from seqwise.testing.families import FAMILIES

TEXT = ("llama", "qwen3", "mistral", "gemma2", "neox", "gpt2")
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# the formulas


def test_relevance_is_the_sigmoid_of_a_linear_head_on_the_normed_state():
    h, w = randn(3, 5, 7), randn(7, seed=1)
    r = relevance(h, w, 0.3)
    for i in range(3):
        for t in range(5):
            x = h[i, t] / math.sqrt(float((h[i, t] ** 2).mean()) + 1e-6)
            assert float(r[i, t]) == pytest.approx(1 / (1 + math.exp(-float(w @ x) - 0.3)), abs=1e-6)
    assert relevance(h, torch.zeros(7), 0.0).eq(0.5).all()
    assert relevance(torch.zeros(2, 7), w, 0.0).eq(0.5).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 5), st.data())
def test_attention_relevance_is_the_mean_over_heads_and_later_real_rows(heads, q, before, data):
    n = q + before
    real = torch.tensor([data.draw(st.lists(st.booleans(), min_size=q, max_size=q)) for _ in range(2)])
    attention = randn(2, heads, q, n).softmax(-1)
    found = attention_relevance(attention, real)
    for b in range(2):
        for t in range(n):
            rows = [i for i in range(q) if before + i > t and real[b, i]]
            wanted = sum(float(attention[b, :, i, t].mean()) for i in rows) / max(len(rows), 1)
            assert float(found[b, t]) == pytest.approx(wanted, abs=1e-6)
    assert found[:, -1].eq(0).all()


def test_attention_over_two_blocks_of_rows_adds_up_to_that_of_all():
    attention = randn(2, 3, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).softmax(-1)
    whole, rows = later_attention(attention)
    first, count = later_attention(attention[:, :, :4, :4])
    second, more = later_attention(attention[:, :, 4:])
    second[:, :4] += first
    more[:, :4] += count
    torch.testing.assert_close(second, whole)
    assert more.equal(rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12), st.integers(1, 14))
def test_capture_keeps_the_best_and_among_equals_the_newer(candidates, m):
    r = torch.tensor([[value / 4 for value, _ in candidates]])
    live = torch.tensor([[alive for _, alive in candidates]])
    index, kept = capture(r, m, live)
    assert index.shape == kept.shape == (1, min(m, len(candidates)))
    assert index[0].tolist() == sorted(set(index[0].tolist()))
    alive = [i for i in range(len(candidates)) if live[0, i]]
    best = sorted(alive, key=lambda i: (-float(r[0, i]), -i))[:m]
    assert index[kept].tolist() == sorted(best)


def test_capture_at_equal_relevance_is_a_queue_of_the_newest():
    index, live = capture(torch.full((2, 3, 9), 0.5), 4)
    assert index.eq(torch.tensor([5, 6, 7, 8])).all() and live.all()
    with pytest.raises(ValueError, match="m must be >= 1, got 0"):
        capture(torch.zeros(3), 0)


def plain_reconstruct(h, key, value, r, Wq, live):
    """Query by query, entry by entry."""
    d = h.shape[-1]
    z = torch.zeros_like(h)
    for b in range(h.shape[0]):
        seen = [j for j in range(key.shape[1]) if live[b, j]]
        for t in range(h.shape[1]):
            if not seen:
                continue
            q = Wq @ (h[b, t] / ((h[b, t] ** 2).mean() + 1e-6).sqrt())
            logits = torch.stack([q @ key[b, j] / d**0.5 for j in seen])
            weight = (logits - logits.max()).exp() * torch.stack([r[b, j].clamp(min=1e-6) for j in seen])
            z[b, t] = sum(weight[i] / weight.sum() * value[b, j] for i, j in enumerate(seen))
    return z


def test_reconstruct_weighs_by_match_times_relevance():
    B, n, c, d = 3, 5, 7, 6
    h, key, value, Wq = randn(B, n, d), randn(B, c, d, seed=1), randn(B, c, d, seed=2), randn(d, d, seed=3)
    r = torch.rand(B, c, generator=torch.Generator().manual_seed(4))
    r[0, 0] = 0.0  # clamped: the logarithm stays finite
    live = torch.tensor([[True] * c, [True, False] * 3 + [True], [False] * c])
    found = reconstruct(h, key, value, r, Wq, live)
    torch.testing.assert_close(found, plain_reconstruct(h, key, value, r, Wq, live), atol=1e-5, rtol=1e-4)
    assert found[2].eq(0).all(), "nothing live, nothing read"
    assert reconstruct(h, key[:, :0], value[:, :0], r[:, :0], Wq).eq(0).all()
    torch.testing.assert_close(
        reconstruct(h, key, value, r, Wq), plain_reconstruct(h, key, value, r, Wq, torch.ones_like(live)), **CLOSE
    )


def test_reconstruct_has_finite_gradients_where_nothing_is_live():
    parts = [randn(2, 4, 5, seed=i).requires_grad_() for i in range(3)]
    r = torch.full((2, 4), 0.5, requires_grad=True)
    reconstruct(*parts, r, torch.eye(5), torch.tensor([[False] * 4, [True] * 4])).square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (*parts, r))
    assert r.grad[1].ne(0).any()


def test_blend_adds_a_gated_projection():
    h, z, Wo, u = randn(2, 3, 4), randn(2, 3, 4, seed=1), randn(4, 4, seed=2), randn(8, seed=3)
    found = blend(h, z, Wo, u, -0.5)
    for i in range(2):
        for t in range(3):
            g = 1 / (1 + math.exp(-float(u @ torch.cat([h[i, t], z[i, t]])) + 0.5))
            torch.testing.assert_close(found[i, t], h[i, t] + g * (Wo @ z[i, t]))
    assert blend(h, z, torch.zeros(4, 4), u, 9.0).equal(h)


def test_memories_lists_layer_after_layer():
    states, P, e = randn(2, 3, 4, 5), randn(3, 5, 5, seed=1), randn(3, 5, seed=2)
    M = memories(states, P, e)
    assert M.shape == (2, 12, 5)
    torch.testing.assert_close(M[1, 4 + 2], P[1] @ states[1, 1, 2] + e[1])
    assert memories(states, torch.eye(5).repeat(3, 1, 1), torch.zeros(3, 5)).equal(states.flatten(1, 2))


def test_default_layers_stand_at_the_quarters():
    assert default_layers(12) == (2, 5, 8)
    assert default_layers(32) == (7, 15, 23)
    assert default_layers(4) == (0, 1, 2)
    assert [default_layers(depth) for depth in (1, 2, 3)] == [(0,), (0, 1), (0, 1, 2)]
    for depth in range(1, 50):
        assert default_layers(depth)[-1] < depth


def test_split_covers_the_document():
    ids, mask = torch.arange(22).view(2, 11), torch.ones(2, 11)
    parts = list(split(ids, 4, mask))
    assert [part.shape[1] for part, _ in parts] == [4, 4, 3]
    assert torch.cat([part for part, _ in parts], 1).equal(ids)
    assert all(m.shape == part.shape for part, m in split(ids, 5))
    with pytest.raises(ValueError, match="size must be >= 1, got 0"):
        list(split(ids, 0))


# on a model


def drawn(model, seed=0, **options):
    """A memory whose every parameter matters."""
    memory = Reweaving.of(model, **{"segment": 8, "capacity": 5, "layers": (0, 1, 2), **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in memory.named_parameters():
            x.add_(torch.randn(x.shape, generator=generator) * (0.2 if x.dim() > 1 else 1.0))
            if name == "b":
                x.fill_(1.0)
    return memory


def documents(lengths, seed=0):
    """Left-padded documents: ids and mask (B, longest)."""
    ids = torch.randint(1, 97, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids * mask, mask.long()


@torch.no_grad()
def read(model, memory, ids, mask=None, size=8):
    """Logits of a document's segments, each a forward of its own."""
    memory.reset()
    with memory.on(model):
        parts = split(ids, size, mask)
        return torch.cat([model(input_ids=i, attention_mask=m, use_cache=False).logits for i, m in parts], 1)


@torch.no_grad()
def plain(model, ids, size=8):
    return torch.cat([model(input_ids=i, attention_mask=m, use_cache=False).logits for i, m in split(ids, size)], 1)


@pytest.mark.parametrize("family", TEXT)
def test_at_its_start_the_model_is_the_base_model_exactly(family):
    model, (ids, _) = FAMILIES[family].tiny(), documents([21, 21])
    wanted = plain(model, ids)
    memory = Reweaving.of(model, segment=8, capacity=5)
    assert read(model, memory, ids).equal(wanted)
    assert memory.bank.live.all(), "something was there to be read"
    changed = read(model, drawn(model), ids)
    assert changed[:, :8].equal(wanted[:, :8]), "the first segment has nothing to read"
    assert (changed[:, 8:] - wanted[:, 8:]).abs().amax(-1).min() > 1e-3


def test_half_precision_starts_exactly_too():
    model, (ids, _) = FAMILIES["llama"].tiny().bfloat16(), documents([21, 21])
    memory = Reweaving.of(model, segment=8)
    assert read(model, memory, ids).equal(plain(model, ids))
    assert memory.bank.states.dtype == torch.bfloat16
    assert read(model, drawn(model), ids).isfinite().all()


@pytest.mark.parametrize("relevance_kind", ["learned", "attention"])
@pytest.mark.parametrize("family", TEXT)
def test_a_padded_batch_reads_and_keeps_what_each_document_does_alone(family, relevance_kind):
    model = FAMILIES[family].tiny()
    if relevance_kind == "attention":
        model.set_attn_implementation("eager")
    # the rounding of float32 grows from segment to segment; eager attention knows no pads in float64
    exact = model.config._attn_implementation != "eager"
    model = model.double() if exact else model
    memory = drawn(model, relevance=relevance_kind).to(next(model.parameters()))
    # pads fill whole segments, part of one, none: the segments of a row alone are cut at the same places
    lengths = [13, 24, 19]
    ids, mask = documents(lengths)
    together = read(model, memory, ids, mask)
    bank = memory.bank
    for b, length in enumerate(lengths):
        start = 24 - length
        first = start // 8 * 8
        alone = read(model, memory, ids[b : b + 1, first:], mask[b : b + 1, first:])
        torch.testing.assert_close(
            together[b, start:], alone[0, start - first :], atol=1e-9 if exact else 1e-3, rtol=1e-3
        )
        for layer in range(3):
            kept = bank.live[b, layer]
            mine = memory.bank.live[0, layer]
            assert bank.position[b, layer][kept].equal(memory.bank.position[0, layer][mine])
            torch.testing.assert_close(bank.r[b, layer][kept], memory.bank.r[0, layer][mine], **CLOSE)


def test_pads_are_never_captured_and_positions_count_real_tokens():
    model = FAMILIES["llama"].tiny()
    memory = drawn(model, capacity=64)
    ids, mask = documents([3, 20, 11])
    read(model, memory, ids, mask)
    for b, length in enumerate([3, 20, 11]):
        for layer in range(3):
            position = memory.bank.position[b, layer]
            assert position[position >= 0].tolist() == list(range(length))
    other = ids.clone()
    other[mask == 0] = 50
    states = memory.bank.states[memory.bank.live]
    read(model, memory, other, mask)
    torch.testing.assert_close(memory.bank.states[memory.bank.live], states)


def recorded(model, layers):
    """What each layer put out, by forward; hooks registered now run before those that are attached later."""
    found, handles = [], []
    for layer in layers:
        outputs = []
        found.append(outputs)
        handles.append(
            model.model.layers[layer].register_forward_hook(lambda m, a, out, outputs=outputs: outputs.append(out))
        )
    return found, handles


def test_reads_and_captures_what_the_formulas_say():
    model, (ids, _) = FAMILIES["llama"].tiny(), documents([24, 24])
    memory = drawn(model, layers=(1, 2))
    with torch.no_grad(), memory.on(model):
        before, handles = recorded(model, (1, 2))
        # hooks run in the order of registration: these must see what comes out of the layer itself
        for layer in (1, 2):
            hooks = model.model.layers[layer]._forward_hooks
            hooks.move_to_end(next(reversed(hooks)), last=False)
        after, more = recorded(model, (1, 2))
        old = None
        for number, (part, _) in enumerate(split(ids, 8)):
            model(input_ids=part, use_cache=False)
            r = [relevance(after[k][number], memory.w[k], memory.c[k]) for k in (0, 1)]
            if number:
                M = memories(old.states, memory.P, memory.e)
                key, value, live = M @ memory.Wk.T, M @ memory.Wv.T, torch.ones(M.shape[:2], dtype=torch.bool)
                for k in (0, 1):
                    h = before[k][number]
                    z = plain_reconstruct(h, key, value, old.r.flatten(1), memory.Wq, live)
                    torch.testing.assert_close(after[k][number], blend(h, z, memory.Wo, memory.u[k], 1.0), **CLOSE)
            else:
                assert all(before[k][0].equal(after[k][0]) for k in (0, 1))
            for k in (0, 1):
                for b in (0, 1):
                    entries = (
                        [] if old is None else list(zip(old.r[b, k], old.position[b, k], old.states[b, k], strict=True))
                    )
                    entries += [(r[k][b, t], torch.tensor(8 * number + t), after[k][number][b, t]) for t in range(8)]
                    best = sorted(entries, key=lambda entry: -float(entry[0]))[:5]
                    best.sort(key=lambda entry: int(entry[1]))
                    assert memory.bank.position[b, k].tolist() == [int(entry[1]) for entry in best]
                    torch.testing.assert_close(memory.bank.states[b, k], torch.stack([entry[2] for entry in best]))
                    torch.testing.assert_close(memory.bank.r[b, k], torch.stack([entry[0] for entry in best]))
            old = memory.bank
        for handle in handles + more:
            handle.remove()
    assert old.position.max() > 16 and old.position.min() < 16, "old and new entries compete"


def test_relevance_is_stored_once():
    model, (ids, _) = FAMILIES["llama"].tiny(), documents([8])
    memory = drawn(model, capacity=16)
    read(model, memory, ids)
    before = memory.bank.r.clone()
    with torch.no_grad(), memory.on(model):
        memory.w.add_(1.0)
        model(input_ids=ids, use_cache=False)
    assert memory.bank.r[..., :8].equal(before)
    assert (memory.bank.r[..., 8:] - before).abs().max() > 0.01


def test_what_is_kept_has_no_graph_and_the_relevance_head_learns_from_the_next_segment():
    model, (ids, _) = FAMILIES["llama"].tiny(), documents([16])
    model.requires_grad_(False)
    memory = drawn(model)
    gradients = []
    with memory.on(model):
        for part, _ in split(ids, 8):
            memory.zero_grad()
            loss = model(input_ids=part, labels=part, use_cache=False).loss
            assert not memory.bank.states.requires_grad and not memory.bank.r.requires_grad
            if loss.requires_grad:
                loss.backward()
            gradients.append({name: x.grad for name, x in memory.named_parameters()})
    assert all(gradient is None for gradient in gradients[0].values()), "the first segment reads nothing"
    assert all(gradient.abs().max() > 0 for gradient in gradients[1].values())


def test_documents_are_kept_apart_by_reset():
    model, (ids, _) = FAMILIES["llama"].tiny(), documents([16, 16])
    memory = drawn(model)
    first = read(model, memory, ids)
    with torch.no_grad(), memory.on(model):
        carried = model(input_ids=ids[:, :8], use_cache=False).logits
        assert (carried - first[:, :8]).abs().max() > 1e-3
        memory.reset()
        assert model(input_ids=ids[:, :8], use_cache=False).logits.equal(first[:, :8])
        # one sequence of the batch begins anew, the other goes on
        memory.reset(torch.tensor([True, False]))
        mixed = model(input_ids=ids[:, 8:], use_cache=False).logits
    torch.testing.assert_close(mixed[1], first[1, 8:], **CLOSE)
    torch.testing.assert_close(mixed[0], plain(model, ids[:1, 8:])[0], **CLOSE)
    assert memory.bank.position[0].max() == 7 and memory.bank.position[1].max() == 15


@pytest.mark.parametrize("kind", ["layers", "whole"])
def test_checkpointing_captures_once_and_gives_the_same_gradients(kind):
    ids, _ = documents([24, 24])
    model = FAMILIES["llama"].tiny().train()
    memory = drawn(model)

    def gradients(wrapped):
        memory.reset()
        banks = []
        with memory.on(model):
            for part, _ in split(ids, 8):

                def loss(part=part):
                    return model(input_ids=part, labels=part, use_cache=False).loss

                value = checkpoint(loss, use_reentrant=False) if wrapped else loss()
                banks.append(memory.bank)
                value.backward()
                assert memory.bank is banks[-1]
                assert memory.bank.live.sum(-1).max() <= 5
        found = {name: x.grad for name, x in (*memory.named_parameters(), *model.named_parameters())}
        memory.zero_grad()
        model.zero_grad()
        return found, banks

    wanted, banks = gradients(False)
    if kind == "layers":
        model.activation_checkpointing_enable()
    found, again = gradients(kind == "whole")
    assert model.model.layers[0].gradient_checkpointing == (kind == "layers")
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, **CLOSE)
    for a, b in zip(banks, again, strict=True):
        assert a.position.equal(b.position)
        torch.testing.assert_close(a.states, b.states)


def test_document_loss_counts_every_token_once_also_across_segments():
    model, (ids, mask) = FAMILIES["llama"].tiny(), documents([19, 12])
    memory = drawn(model)
    logits = read(model, memory, ids, mask)
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 5] = -100
    targets = [(b, t) for b, start in ((0, 1), (1, 8)) for t in range(start, 19) if (b, t) != (0, 5)]
    losses = [cross_entropy(logits[b, t - 1], ids[b, t]) for b, t in targets]
    with torch.no_grad(), memory.on(model):
        model(input_ids=ids[:, :8])  # a document before, to be forgotten
        found = document_loss(model, memory, ids, labels, mask)
        torch.testing.assert_close(found, torch.stack(losses).mean(), **CLOSE)
        labels[mask == 0] = 7  # pads count for nothing, whatever their labels are
        assert document_loss(model, memory, ids, labels, mask) == found
        with pytest.raises(UsageError, match="labels must hold a target"):
            document_loss(model, memory, ids, torch.full_like(ids, -100), mask)


def test_training_changes_its_own_parameters_only():
    model, (ids, _) = FAMILIES["llama"].tiny(), documents([24, 24])
    before = copy.deepcopy(model.state_dict())
    memory = Reweaving.of(model, segment=8, capacity=16)
    owned = {name.split(".")[0] for name in memory.state_dict()}
    assert owned == {"Wq", "Wk", "Wv", "Wo", "w", "c", "P", "e", "u", "b"}
    model.requires_grad_(False)
    optimizer = torch.optim.Adam(memory.parameters(), lr=0.02)
    losses = []
    with memory.on(model):
        for _ in range(25):
            memory.reset()
            total = 0.0
            for number, (part, _) in enumerate(split(ids, 8)):
                loss = model(input_ids=part, labels=part, use_cache=False).loss
                if number:  # the first segment reads nothing and has no gradient
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total += loss.item()
            losses.append(total)
    assert losses[-1] < 0.8 * losses[0]
    assert all(x.equal(before[name]) for name, x in model.state_dict().items())
    assert all(x.grad is not None for x in memory.parameters())


# generate


OPTIONS = {"max_new_tokens": 14, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_generation_captures_every_segment_of_generated_tokens(family):
    model, batch = FAMILIES[family].tiny(), FAMILIES[family].prompt(5)
    wanted = model.generate(**batch, **OPTIONS)
    fresh = Reweaving.of(model, segment=6, capacity=64)
    with fresh.on(model):
        same = model.generate(**batch, **OPTIONS)
    assert same.sequences.equal(wanted.sequences)
    assert all(a.equal(b) for a, b in zip(same.scores, wanted.scores, strict=True))

    memory = drawn(model, segment=6, capacity=64)
    sizes = []
    with memory.on(model):
        handle = model.register_forward_hook(lambda *_: sizes.append(memory.bank.live.shape[-1]))
        changed = model.generate(**batch, **OPTIONS)
        handle.remove()
    assert sizes == [5] * 6 + [11] * 6 + [17] * 2, "the prompt, then every six generated tokens"
    assert changed.scores[0].equal(wanted.scores[0])
    assert (changed.scores[1] - wanted.scores[1]).abs().max() > 1e-3
    assert memory.bank.position[0, 0].tolist() == list(range(17))
    # the last token was never an input; a segment that is still open is closed by the next one
    with torch.no_grad(), memory.on(model):
        model(input_ids=batch["input_ids"], use_cache=False)
    assert memory.bank.position[0, 0].tolist() == list(range(18 + 5))


def test_a_padded_batch_generates_what_each_prompt_does_alone():
    family = FAMILIES["llama"]
    model, prompts = family.tiny().double(), [family.prompt(3, seed=1), family.prompt(6, seed=2)]
    memory = drawn(model, segment=6).double()
    with memory.on(model):
        together = model.generate(**family.pad_left(prompts), **OPTIONS)
        for b, prompt in enumerate(prompts):
            memory.reset()
            alone = model.generate(**prompt, **OPTIONS)
            assert together.sequences[b, -14:].equal(alone.sequences[0, -14:])
            for ours, theirs in zip(together.scores, alone.scores, strict=True):
                torch.testing.assert_close(ours[b], theirs[0], **family.tolerance)


def test_a_long_prompt_goes_in_chunks():
    model, batch = FAMILIES["llama"].tiny(), FAMILIES["llama"].prompt(21)
    memory = drawn(model, capacity=64)
    with memory.on(model):
        with pytest.raises(PromptError, match=r"at most 8 tokens, got 21; .*prefill_chunk_size=8"):
            model.generate(**batch, **OPTIONS)
        memory.reset()
        model.generate(**batch, **OPTIONS, prefill_chunk_size=8)
    assert memory.bank.position[0, 0].tolist() == list(range(21 + 8))


def test_generation_refuses_what_the_memory_cannot_follow():
    model, batch = FAMILIES["llama"].tiny(), FAMILIES["llama"].prompt(5)
    memory = drawn(model)
    with memory.on(model):
        for options in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"assistant_model": model}):
            with pytest.raises(UnsupportedModel, match=rf"generate\({next(iter(options))}=\.\.\.\)"):
                model.generate(**batch, max_new_tokens=2, **options)
        model.generate(**batch, max_new_tokens=2, num_beams=1, do_sample=True, num_return_sequences=3)
        assert len(memory.bank.states) == 3
        with pytest.raises(PromptError, match=r"the memory holds 3 sequences, got 1; reset\(\)"):
            model.generate(**batch, max_new_tokens=2)


def test_attention_relevance_of_a_generation_counts_the_segments_later_tokens():
    model, batch = FAMILIES["llama"].tiny(), FAMILIES["llama"].prompt(5)
    model.set_attn_implementation("eager")
    memory = drawn(model, segment=6, capacity=64, relevance="attention", layers=(1,))
    assert not hasattr(memory, "w")
    seen = []
    with torch.no_grad(), memory.on(model):
        handle = model.model.layers[1].self_attn.register_forward_hook(lambda m, a, out: seen.append(out[1]))
        model.generate(**batch, max_new_tokens=7, do_sample=False)
        handle.remove()
    r = memory.bank.r[0, 0]
    assert memory.bank.position[0, 0].tolist() == list(range(11))
    prompt, steps = seen[0][0].mean(0), [weights[0, :, 0].mean(0) for weights in seen[1:]]
    for t in range(5):
        later = [float(prompt[i, t]) for i in range(t + 1, 5)]
        assert float(r[t]) == pytest.approx(sum(later) / max(len(later), 1), abs=1e-6)
    for t in range(6):
        later = [float(steps[i][5 + t]) for i in range(t + 1, 6)]
        assert float(r[5 + t]) == pytest.approx(sum(later) / max(len(later), 1), abs=1e-6)


def test_attention_relevance_needs_attention_weights():
    model, (ids, _) = FAMILIES["llama"].tiny(), documents([5])
    memory = Reweaving.of(model, segment=8, relevance="attention")
    with memory.on(model), pytest.raises(UnsupportedModel, match="attn_implementation='eager'"):
        model(input_ids=ids)


# attaching, refusing, saving


def test_detaching_leaves_the_model_as_it_was():
    model, (ids, _) = FAMILIES["llama"].tiny(), documents([16])
    wanted = plain(model, ids)
    memory = drawn(model)
    modules = {name: dict(vars(module)) for name, module in model.named_modules()}

    def hooks():
        return [
            len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
        ], "generate" in vars(model)

    before = hooks()
    with pytest.raises(RuntimeError, match="inside"), memory.on(model):
        assert hooks() != before
        with pytest.raises(AlreadyAttached, match="attached already"):
            memory.attach(model)
        model(input_ids=ids[:, :8])
        raise RuntimeError("inside")
    assert hooks() == before
    assert {name: set(vars(module)) for name, module in model.named_modules()} == {
        n: set(v) for n, v in modules.items()
    }
    assert plain(model, ids).equal(wanted)
    memory.attach(model)
    memory.detach()
    assert hooks() == before
    own = model.generate
    model.generate = own
    with memory.on(model):
        assert model.generate is not own
    assert model.generate is own


def test_a_failed_forward_leaves_no_rows_behind():
    model, (ids, _) = FAMILIES["llama"].tiny(), documents([16])
    memory = drawn(model, capacity=64)
    with torch.no_grad(), memory.on(model):
        handle = model.model.layers[3].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=ids[:, :8])
        handle.remove()
        model(input_ids=ids[:, 8:])
    assert memory.bank.position[0, 0].tolist() == list(range(8))


def test_refuses_what_does_not_fit():
    llama, (ids, _) = FAMILIES["llama"].tiny(), documents([16])
    with pytest.raises(UnsupportedModel, match=r"Reweaving\(hidden_size=32, layers=\(9,\)\) does not fit"):
        Reweaving.of(llama, layers=(9,)).attach(llama)
    with pytest.raises(UnsupportedModel, match="hidden size 32 and 4 layers"):
        Reweaving(16, (0,), segment=8).attach(llama)
    with pytest.raises(UnsupportedModel, match="not a transformers model"):
        Reweaving(16, (0,), segment=8).attach(nn.Linear(2, 2))
    memory = Reweaving.of(llama, segment=8)
    with memory.on(llama), pytest.raises(PromptError, match="2-D"):
        llama(input_ids=ids[:, :4], attention_mask=torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number >= 1, got 0"),
        ({"segment": 2.0}, "segment must be a whole number >= 1, got 2.0"),
        ({"capacity": True}, "capacity must be a whole number >= 1, got True"),
        ({"layers": ()}, "layers must be distinct, ascending and >= 0"),
        ({"layers": (2, 1)}, r"got \(2, 1\)"),
        ({"layers": (-1, 1)}, r"got \(-1, 1\)"),
        ({"relevance": "random"}, r"relevance must be one of \('learned', 'attention'\), got 'random'"),
    ],
)
def test_refuses_bad_settings(change, words):
    with pytest.raises(ValueError, match=words):
        Reweaving(**{"hidden_size": 4, "layers": (0,), "segment": 8, **change})


def test_defaults_follow_the_model():
    memory = Reweaving.of(FAMILIES["mistral"].tiny())
    assert (memory.layers, memory.segment, memory.capacity) == ((0, 1, 2), 12, 64)
    llama = FAMILIES["llama"].tiny()
    assert Reweaving.of(llama).segment == 512
    with pytest.raises(ValueError, match="segment must be a whole number >= 1, got 0"):
        Reweaving.of(llama, segment=0)
    assert memory.Wq.equal(Reweaving.of(FAMILIES["mistral"].tiny()).Wq)
    assert not memory.Wq.equal(Reweaving.of(FAMILIES["mistral"].tiny(), seed=1).Wq)
    assert memory.Wo.eq(0).all() and memory.b.eq(-4).all() and memory.P.eq(torch.eye(32)).all()


@pytest.mark.parametrize("kind", ["learned", "attention"])
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    model, (ids, _) = FAMILIES["llama"].tiny(), documents([24])
    model.set_attn_implementation("eager")
    memory = drawn(model, relevance=kind)
    wanted = read(model, memory, ids)
    loaded = Reweaving.load(memory.save(tmp_path / "memory.safetensors"))
    assert (loaded.layers, loaded.segment, loaded.capacity, loaded.relevance) == ((0, 1, 2), 8, 5, kind)
    assert loaded.bank is None, "what was read is not saved"
    assert read(model, loaded, ids).equal(wanted)
    other = Reweaving.of(model, layers=(0, 1, 2), relevance=kind, segment=8, capacity=5)
    other.load_state_dict(memory.state_dict())
    assert read(model, other, ids).equal(wanted)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="was not written by Reweaving"):
        Reweaving.load(tmp_path / "other.safetensors")


def test_works_around_a_vision_language_model():
    family = FAMILIES["llava"]
    model, batch = family.tiny(), family.prompt(20)
    wanted = model.generate(**batch, **OPTIONS)
    fresh = Reweaving.of(model)
    with fresh.on(model):
        assert model.generate(**batch, **OPTIONS).sequences.equal(wanted.sequences)
    assert fresh.bank.live.all()
    memory = drawn(model, segment=64)
    with memory.on(model):
        changed = model.generate(**batch, **OPTIONS)
    assert (changed.scores[1] - wanted.scores[1]).abs().max() > 1e-3
