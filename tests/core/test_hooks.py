"""The hooks that change what a model sees: masks by rule, own kernels, RoPE moves, frequencies, reworded prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from seqwise.core.engine import Block, Kernel
from seqwise.core.errors import PromptError, SlotConflict, UnsupportedModel
from seqwise.core.method import Method
from seqwise.core.observe import masked_logits, normalised
from seqwise.core.segments import Segments
from seqwise.methods import A2SF, FlowCut, TokenRecycling
from seqwise.testing import FAMILIES
from seqwise.testing.families import marked

LLAMA, LLAVA = FAMILIES["llama"], FAMILIES["llava"]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}


@dataclass(frozen=True)
class Blocks(Method):
    """Rows see no other member of their own set."""

    slots: ClassVar[tuple[str, ...]] = ("mask",)

    def facts(self):
        return {"set"}

    def mark(self, segments, run):
        return {"set": segments.set, "member": segments.member}

    def sees(self, query, key):
        return (query["set"] < 0) | (query["set"] != key["set"]) | (query["member"] == key["member"])


@dataclass(frozen=True)
class Both(Blocks):
    """Rows see all real tokens of the prompt."""

    looks_ahead: ClassVar[bool] = True

    def sees(self, query, key):
        return (key["order"] >= 0) & (query["order"] >= 0)


@dataclass(frozen=True)
class Own(Method):
    """The model's attention written out, its keys and queries moved by as much."""

    slots: ClassVar[tuple[str, ...]] = ("attention.kernel",)
    rotates: ClassVar[bool] = True

    def attend(self, kernel: Kernel):
        shift = torch.tensor(7.0)
        q = kernel.rope.rotate(kernel.query, shift.expand(1, 1, kernel.query.shape[2]))
        k = kernel.rope.rotate(kernel.key, shift.expand(1, 1, kernel.key.shape[2]))
        if kernel.phase == "decode":  # unrotated and rotated again by what the engine says of their places
            k = kernel.rope.rotate(kernel.rope.rotate(kernel.key, -kernel.key_positions), kernel.key_positions + 7)
        p = normalised(masked_logits(q, k, kernel.visible, kernel.scaling, kernel.softcap))
        kernel.pairs = 1
        return p.to(q.dtype) @ kernel.value.repeat_interleave(q.shape[1] // k.shape[1], 1)


@dataclass(frozen=True)
class Slow(Method):
    slots: ClassVar[tuple[str, ...]] = ("positions",)

    def frequencies(self, inv_freq, anatomy):
        return inv_freq / 2


@dataclass(frozen=True)
class Places(Method):
    """All tokens of a set at the same place."""

    slots: ClassVar[tuple[str, ...]] = ("positions",)

    def place(self, segments, anatomy):
        step = segments.real & ~((segments.set >= 0) & torch.nn.functional.pad(segments.set >= 0, (1, 0))[:, :-1])
        return (step.cumsum(-1) - 1).clamp(min=0).float()


@dataclass(frozen=True)
class Twice(Method):
    slots: ClassVar[tuple[str, ...]] = ("prompt",)

    def reword(self, ids, segments):
        return torch.cat([ids, ids], 1), segments.take(torch.arange(2 * ids.shape[1])[None] % ids.shape[1])


@dataclass(frozen=True)
class Last(Method):
    """Sharpens the last row of the prompt and of each step."""

    slots: ClassVar[tuple[str, ...]] = ("attention.probs",)

    def rewritten_heads(self, layer, anatomy):
        return (0, 3) if layer == 1 else ()

    def rewritten_rows(self, rows):
        return slice(-1, None)

    def rewrite(self, probabilities, block: Block):
        assert probabilities.shape[2] == 1 and torch.equal(probabilities, normalised(block.logits))
        return (3 * block.logits).softmax(-1)


def dense(model, batch, seen, positions=None):
    """Logits of the plain model under a 4-D mask (B, 1, n, n)."""
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False).logits


def under(method, model, batch, chunk=None, **options):
    with method.on(model, chunk=chunk) as run:
        run.bind(marked(batch))
        return model.generate(**batch, **GREEDY | options), run


def causal(n):
    return torch.ones(n, n).tril().bool()


@pytest.mark.parametrize("method", [Blocks(), Both()])
def test_a_rule_is_the_mask_it_says(method):
    model, batch = LLAMA.tiny(), LLAMA.prompt(40)
    facts = marked(batch)
    member = facts.member[0]
    if method == Both():
        seen = torch.ones(40, 40, dtype=torch.bool)
    else:
        apart = (member[:, None] >= 0) & (member[None] >= 0) & (member[:, None] != member[None])
        seen = causal(40) & ~apart
    with torch.no_grad(), method.on(model) as run:
        run.bind(facts)
        logits = model(**batch).logits
        assert run.acted
    torch.testing.assert_close(logits, dense(model, batch, seen[None, None]), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits, dense(model, batch, causal(40)[None, None]), atol=1e-2)


def test_a_rule_holds_in_padded_batches_in_chunks_and_for_beams():
    model, prompts = LLAMA.tiny(), [LLAMA.prompt(30, seed=1), LLAMA.prompt(44, seed=2)]
    alone = [under(Blocks(), model, prompt)[0] for prompt in prompts]
    together, _ = under(Blocks(), model, LLAMA.pad_left(prompts))
    for b, one in enumerate(alone):
        torch.testing.assert_close(together.scores[-1][b], one.scores[-1][0], atol=1e-5, rtol=1e-4)
    chunked, _ = under(Blocks(), model, prompts[1], chunk=7)
    torch.testing.assert_close(chunked.scores[0], alone[1].scores[0], atol=1e-5, rtol=1e-4)
    beams, _ = under(Blocks(), model, LLAMA.pad_left(prompts), num_beams=2, num_return_sequences=2)
    assert beams.sequences.shape[0] == 4


def test_generated_tokens_see_everything_and_a_later_turn_may_bring_a_set():
    model, batch = LLAMA.tiny(), LLAMA.prompt(30)
    out, _ = under(Blocks(), model, batch)
    n = out.sequences.shape[1]
    member = torch.cat([marked(batch).member[0], torch.full((n - 30,), -1)])
    apart = (member[:, None] >= 0) & (member[None] >= 0) & (member[:, None] != member[None])
    logits = dense(model, {"input_ids": out.sequences}, (causal(n) & ~apart)[None, None])
    torch.testing.assert_close(torch.stack(out.scores, 1)[0], logits[0, 29 : n - 1], atol=1e-5, rtol=1e-4)
    with torch.no_grad(), Blocks().on(model) as run:
        run.bind(marked(batch))
        cache = model(**batch).cache
        run.begin_prompt()
        second = LLAMA.prompt(20, seed=9)
        run.bind(marked(second))
        last = model(input_ids=second["input_ids"], cache=cache).logits
    both = torch.cat([batch["input_ids"], second["input_ids"]], 1)
    first, then = marked(batch), marked(second)
    member = torch.cat([first.member[0], then.member[0]])
    kind = torch.cat([first.set[0], torch.where(then.set[0] >= 0, 1, -1)])  # both are number 0 of their own prompt
    apart = (kind[:, None] >= 0) & (kind[:, None] == kind[None]) & (member[:, None] != member[None])
    expected = dense(model, {"input_ids": both}, (causal(50) & ~apart)[None, None])
    torch.testing.assert_close(last[0], expected[0, 30:], atol=1e-5, rtol=1e-4)


def test_a_rule_composes_with_eviction():
    model, batch = LLAMA.tiny(), LLAMA.prompt(40)
    _, run = under(Blocks() | A2SF(budget=0.5), model, batch)
    assert max(run.report().kept) < 40


def test_a_prompt_without_the_facts_is_refused_before_anything_runs():
    model, batch = LLAMA.tiny(), LLAMA.prompt(20)
    with Blocks().on(model) as run, pytest.raises(PromptError, match=r"Blocks\(\) needs a set of pieces; build"):
        model.generate(**batch, **GREEDY)
    assert run.engine.ledger.kept == {}


@pytest.mark.parametrize("name", ["llama", "qwen3", "neox"])
def test_an_own_kernel_gets_what_the_model_would_compute_with_and_knows_where_keys_stand(name):
    family = FAMILIES[name]
    model, prompts = family.tiny(), [family.prompt(20, seed=1), family.prompt(33, seed=2)]
    batch = family.pad_left(prompts)
    expected = model.generate(**batch, **GREEDY)
    for chunk in (None, 6):
        with Own().on(model, chunk=chunk) as run:
            out = model.generate(**batch, **GREEDY)
            assert run.acted and run.report().attention_work < 0.1
        assert out.sequences.equal(expected.sequences)
        for mine, theirs in zip(out.scores, expected.scores, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-3)


def test_positions_of_keys_travel_with_the_slots_that_eviction_leaves():
    model, batch = LLAMA.tiny(), LLAMA.prompt(40)
    evict = A2SF(budget=0.4, recent=2)
    expected = under(evict, model, batch)[0]
    out = under(evict | Own(), model, batch)[0]
    for mine, theirs in zip(out.scores, expected.scores, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-3)


@dataclass(frozen=True)
class Marks(Own):
    """Looks up which member each slot belongs to, and counts how often it was asked to mark."""

    slots: ClassVar[tuple[str, ...]] = ("mask", "attention.kernel")

    def mark(self, segments, run):
        run.state[self] = run.state.get(self, 0) + 1
        return {"member": segments.member}

    def sees(self, query, key):
        return torch.ones((), dtype=torch.bool)

    def attend(self, kernel):
        kernel.facts["seen"] = kernel.marked("member", kernel.order)
        assert kernel.capacity(7) == [7] * kernel.query.shape[0] and kernel.capacity(1.0) is None
        return super().attend(kernel)


def test_marks_are_made_once_saved_with_a_context_and_follow_the_samples(tmp_path):
    model, batch = LLAMA.tiny(), LLAMA.pad_left([LLAMA.prompt(20, seed=1), LLAMA.prompt(32, seed=2)])
    facts = marked(batch)
    with torch.no_grad(), Marks().on(model) as run:
        run.bind(facts)
        cache = model(**batch).cache
        assert run.state[Marks()] == 1
        table = run.engine.ledger.facts["marks"]["member"].clone()
        path = run.save(tmp_path / "c.safetensors")
        cache.batch_select_indices(torch.tensor([1, 1, 0]))
        assert run.engine.ledger.facts["marks"]["member"].equal(table[[1, 1, 0]])
    with torch.no_grad(), Marks().on(model) as run:
        cache = run.load(path)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        model(input_ids=torch.tensor([[3], [4]]), attention_mask=mask, cache=cache)
        seen = run.engine.ledger.facts["seen"]
    assert seen[:, 0, :-1].equal(facts.member) and (seen[..., -1] == -1).all()


def test_what_cannot_work_together_is_refused_by_name():
    with pytest.raises(SlotConflict, match=r"TokenRecycling.*Own\(\)"):
        (Own() | TokenRecycling()).on(LLAMA.tiny())


def test_frequencies_are_the_methods_while_attached_and_the_models_under_plain_and_after():
    model, batch = LLAMA.tiny(), LLAMA.prompt(30)
    own = model.model.rotary_emb.inv_freq
    with torch.no_grad():
        plain = model(**batch).logits
        model.model.rotary_emb.inv_freq = own / 2
        slow = model(**batch).logits
        model.model.rotary_emb.inv_freq = own
        with Slow().on(model) as run:
            torch.testing.assert_close(model(**batch).logits, slow)
            assert run.acted
            with run.plain():
                torch.testing.assert_close(model(**batch).logits, plain)
            torch.testing.assert_close(model(**batch).logits, slow)
        assert model.model.rotary_emb.inv_freq is own
        torch.testing.assert_close(model(**batch).logits, plain)


def test_places_of_a_whole_prompt_hold_in_chunks_and_a_later_turn_goes_on():
    model, batch = LLAMA.tiny(), LLAMA.prompt(40)
    whole, chunked = under(Places(), model, batch)[0], under(Places(), model, batch, chunk=9)[0]
    for a, b in zip(whole.scores, chunked.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    with torch.no_grad(), Places().on(model) as run:
        run.bind(marked(batch))
        cache = model(**batch).cache
        last = Places().place(marked(batch), None)[0, -1]
        assert run.engine.ledger.last_position.tolist() == [last]
        run.begin_prompt()
        second = LLAMA.prompt(20, seed=4)
        run.bind(marked(second))
        model(input_ids=second["input_ids"], cache=cache)
        assert run.engine.ledger.last_position.tolist() == [last + 1 + Places().place(marked(second), None)[0, -1]]


def test_a_reworded_prompt_answers_under_the_callers_own_ids():
    model, prompts = LLAMA.tiny(), [LLAMA.prompt(12, seed=1), LLAMA.prompt(17, seed=2)]
    batch = LLAMA.pad_left(prompts)
    with Twice().on(model) as run:
        out = model.generate(**batch, **GREEDY)
        assert run.acted
    assert out.sequences[:, :17].equal(batch["input_ids"])
    for b, prompt in enumerate(prompts):
        twice = torch.cat([prompt["input_ids"]] * 2, 1)
        expected = model.generate(twice, attention_mask=torch.ones_like(twice), **GREEDY)
        assert out.sequences[b, 17:].equal(expected.sequences[0, twice.shape[1] :])
        torch.testing.assert_close(out.scores[0][b], expected.scores[0][0], atol=1e-5, rtol=1e-4)
    ids = Twice().on(model)
    with ids:
        sampled = model.generate(**batch, max_new_tokens=3, num_return_sequences=2, do_sample=True)
    assert sampled.shape == (4, 20) and sampled[:, :17].equal(batch["input_ids"].repeat_interleave(2, 0))


def test_a_prompt_with_images_cannot_be_reworded():
    with Twice().on(LLAVA.tiny()) as run, pytest.raises(UnsupportedModel, match="rewords texts"):
        run.model.generate(**LLAVA.prompt(20), max_new_tokens=2)


def test_a_reworded_prompt_goes_with_chunks_and_eviction_and_needs_an_empty_cache():
    model, batch = LLAMA.tiny(), LLAMA.prompt(20)
    with (Twice() | A2SF(budget=10)).on(model, chunk=8) as run:
        out = model.generate(**batch, **GREEDY)
        assert max(run.report().kept) <= 16
        with pytest.raises(PromptError, match="start it on an empty cache"):
            model.generate(out.sequences, cache=run.cache, max_new_tokens=2)


def test_the_last_row_alone_may_be_rewritten():
    model, batch = LLAMA.tiny(), LLAMA.prompt(20)
    with torch.no_grad():
        plain = model(**batch).logits
        with Last().on(model):
            logits = model(**batch).logits
    torch.testing.assert_close(logits[:, :-1], plain[:, :-1], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(logits[:, -1], plain[:, -1], atol=1e-2)


@dataclass(frozen=True)
class Looks(Method):
    """Marks each visual token with the rank of its patch by CLS attention in the first tower layer."""

    slots: ClassVar[tuple[str, ...]] = ("attention.probs",)

    def watched_tower(self, anatomy):
        return (0,)

    def watch_tower(self, tower, run):
        run.state[self] = tower.received(rows="cls", layer=0).sum(1)[:, tower.specials :]

    def mark(self, segments, run):
        rank = run.state[self].argsort(-1).argsort(-1).flatten()
        return {"rank": torch.full_like(segments.type, -1).masked_scatter(segments.visual, rank)}

    def rewritten_heads(self, layer, anatomy):
        return (0,) if layer == 0 else ()

    def rewrite(self, probabilities, block):
        rank = block.marked("rank", block.order)
        return torch.where(rank == 0, 0.0, probabilities)


def test_a_tower_may_be_watched_beside_a_reducer_and_not_beside_a_pruner():
    model, batch = LLAVA.tiny(), LLAVA.prompt(20, images=2)
    with Looks().on(model) as run:
        model.generate(**batch, **GREEDY)
        assert run.state[Looks()].shape == (2, 16)
    with (
        pytest.raises(SlotConflict, match=r"Looks\(\) reads the whole vision tower, which FlowCut"),
        (Looks() | FlowCut(budget=0.5)).on(model),
    ):
        pass


def test_facts_need_a_cache_in_generate():
    model, batch = LLAMA.tiny(), LLAMA.prompt(20)
    with Blocks().on(model) as run, pytest.raises(PromptError, match="generate with use_cache=True"):
        run.bind(marked(batch))
        model.generate(**batch, max_new_tokens=2, use_cache=False)


def test_bound_facts_of_another_length_are_refused():
    model, batch = LLAMA.tiny(), LLAMA.prompt(20)
    facts = marked(batch)
    with Blocks().on(model, chunk=6) as run, pytest.raises(PromptError, match="cover the prompt's 20 tokens, got 19"):
        run.bind(facts.columns(0, 19))
        model.generate(**batch, **GREEDY)
    assert replace(facts, set=facts.set).has("set") and isinstance(facts, Segments)
