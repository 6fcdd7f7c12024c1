"""A method at work on a model: attached and gone without trace, in every phase, saved and reopened.

The methods here are the smallest that use a slot; what the engine does with them is compared with the plain model, or
with the plain model under a mask written by hand.
"""

from __future__ import annotations

import copy
import os
import re
import stat
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, GenerationConfig, StaticCache

from seqwise.core import engine as engine_module
from seqwise.core.caches import Chunk, SlotLayer, View
from seqwise.core.engine import Block, Read, Stage, Transition
from seqwise.core.errors import (
    AlreadyAttached,
    CacheError,
    PromptError,
    SeqwiseError,
    UnsupportedModel,
    UsageError,
)
from seqwise.core.method import Method, budget_param, param
from seqwise.core.packed import Packed
from seqwise.core.run import Loop, Run
from seqwise.core.segments import Segments
from seqwise.testing import FAMILIES

LLAMA = FAMILIES["llama"]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


# the smallest methods


@dataclass(frozen=True)
class All(Method):
    """Keeps everything and looks at everything."""

    slots: ClassVar[tuple[str, ...]] = ("cache.retain",)

    def observes(self, phase: str) -> bool:
        return True

    def retain(self, view: View) -> None:
        view.received()
        return None


@dataclass(frozen=True)
class Newest(Method):
    """A sliding window: what it leaves is known without looking at scores."""

    budget: int | float = budget_param(8, "newest slots kept")

    slots: ClassVar[tuple[str, ...]] = ("cache.retain",)

    def retain(self, view: View) -> tuple[torch.Tensor, torch.Tensor] | None:
        score = view.order.float().expand_as(view.live)
        return view.keep(score, view.capacity(self.budget))


@dataclass(frozen=True)
class Heavy(Method):
    """The slots that received the most attention."""

    budget: int | float = budget_param(8, "slots kept")

    slots: ClassVar[tuple[str, ...]] = ("cache.retain",)

    def observes(self, phase: str) -> bool:
        return True

    def retain(self, view: View) -> tuple[torch.Tensor, torch.Tensor] | None:
        score = view.received()
        if "score" in view.state:
            score = score + view.state["score"]
        view.state["score"] = score
        return view.keep(score, view.capacity(self.budget), recent=2)


@dataclass(frozen=True)
class Bytes(Method):
    """Stores the prompt in eight bits per element."""

    slots: ClassVar[tuple[str, ...]] = ("cache.store",)

    def store(self, view: View) -> list[Chunk] | None:
        tail = view.slots - view.cache.packed
        if view.phase != "prefill" or not tail:
            return None

        def packed(x: torch.Tensor) -> Packed:
            x = x[:, :, -tail:]
            low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
            step = (high - low).clamp(min=1e-9) / 255
            return Packed.pack(((x - low) / step).round().to(torch.uint8), 8, low, step)

        B, Hkv = view.key.shape[:2]
        index = torch.arange(tail).expand(B, Hkv, tail)
        return [Chunk(packed(view.key), packed(view.value), index, view.live[..., -tail:])]


@dataclass(frozen=True)
class Half(Method):
    """Reads the newest slots only, in steps."""

    budget: int = param(8, ge=1)

    slots: ClassVar[tuple[str, ...]] = ("cache.read",)

    def read(self, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
        B, H = read.query.shape[:2]
        Hkv, n = read.key.shape[1], read.key.shape[2]
        order = read.cache.order.expand(B, Hkv, n)
        if read.live is not None:
            order = order.masked_fill(~read.live, -1)
        newest = order.topk(min(self.budget, n), dim=-1)
        return tuple(x.repeat_interleave(H // Hkv, 1) for x in (newest.indices, newest.values >= 0))


@dataclass(frozen=True)
class Flat(Method):
    """Head 1 of layer 2 attends to all it sees alike."""

    slots: ClassVar[tuple[str, ...]] = ("attention.probs",)

    def rewritten_heads(self, layer: int, anatomy: object) -> tuple[int, ...]:
        return (1,) if layer == 2 else ()

    def rewrite(self, probabilities: torch.Tensor, block: Block) -> torch.Tensor:
        seen = (probabilities > 0).float()
        return seen / seen.sum(-1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Same(Flat):
    """Rewrites every head to what it was."""

    def rewritten_heads(self, layer: int, anatomy: object) -> tuple[int, ...]:
        return tuple(range(anatomy.heads))

    def rewrite(self, probabilities: torch.Tensor, block: Block) -> torch.Tensor:
        return probabilities


@dataclass(frozen=True)
class Places(Method):
    """Positions one by one, as the model's own, from `first` on."""

    first: float = param(0.0, ge=0)

    slots: ClassVar[tuple[str, ...]] = ("positions",)

    def place(self, segments: Segments, anatomy: object) -> torch.Tensor:
        return (segments.real.cumsum(-1) - 1).clamp(min=0).float() + self.first


ORACLE: list[int] = []  # what `Greedy` guesses, by place in the text


@dataclass(frozen=True)
class Greedy(Method):
    """A decode loop of its own; its draft of two right guesses in a row and a wrong one is verified."""

    slots: ClassVar[tuple[str, ...]] = ("decode.loop",)

    def decode(self, loop: Loop) -> torch.Tensor:
        loop.prefill()
        ids = loop.input_ids
        while True:
            n = ids.shape[1]
            first, second = ORACLE[n : n + 2] if n % 3 else (1, 2)  # at times all are wrong
            draft = torch.tensor([[int(ids[0, -1]), 3, first, second]])
            sees = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()
            logits = loop.verify(draft, torch.tensor([0, 1, 1, 2]), sees)
            path, new = [0], [int(logits[0, 0].argmax())]
            for node in (2, 3):
                if len(path) == node - 1 and new[-1] == int(draft[0, node]):
                    path.append(node)
                    new.append(int(logits[0, node].argmax()))
            taken, done = loop.stop(ids, torch.tensor(new))
            loop.accept(torch.tensor(path[:taken]), 4)
            ids = torch.cat([ids, torch.tensor([new[:taken]])], 1)
            if done:
                ORACLE.append(loop.forwards)
                return ids


@dataclass(frozen=True)
class Broken(Method):
    """Fails in the middle of a forward."""

    slots: ClassVar[tuple[str, ...]] = ("cache.retain",)

    def retain(self, view: View) -> None:
        if view.layer == 2:
            raise KeyError("in the middle")
        return None


# tools


@pytest.fixture(scope="module")
def model():
    return LLAMA.tiny()


@pytest.fixture(autouse=True)
def restored(request):
    """Whatever a test does, the shared model is as it was."""
    if "model" not in request.fixturenames:
        yield
        return
    model = request.getfixturevalue("model")
    before = snapshot(model)
    yield
    assert snapshot(model) == before, "something was left on the model"


def snapshot(model):
    """All that a model's modules carry as attributes, by identity."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key == "rope_deltas":  # the model's own, of its last prompt
                continue
            if isinstance(value, dict):  # parameters, buffers, modules, hooks
                value = (id(value), tuple((k, id(v)) for k, v in value.items()))
            elif isinstance(value, (bool, int, float, str, type(None))):
                value = (type(value), value)
            else:
                value = id(value)
            found[name, key] = value
    return found, model.config._attn_implementation, len(engine_module._SITES)


def words(n, seed=0):
    return LLAMA.prompt(n, seed)["input_ids"]


def padded(*lengths):
    return LLAMA.pad_left([LLAMA.prompt(n, seed) for seed, n in enumerate(lengths)])


def steps(model, prompt, new, **cache):
    """Logits of each new token given all before it, one forward each."""
    out = model(prompt, **cache)
    logits, cache = [out.logits[:, -1]], out.cache
    for i in range(new.shape[1]):
        logits.append(model(new[:, i : i + 1], cache=cache).logits[:, -1])
    return torch.stack(logits, 1)


def no_grad(function):
    return torch.no_grad()(function)


# attach and leave


METHODS = [All(), Newest(), Heavy(), Bytes(), Half(), Flat(), Same(), Places(), Heavy() | Bytes() | Half()]


@pytest.mark.parametrize("method", METHODS, ids=str)
@no_grad
def test_nothing_is_left_on_the_model(model, method):
    before, plain = snapshot(model), model(words(20)).logits
    with method.on(model) as run:
        assert snapshot(model) != before
        model.generate(words(20), **GREEDY)
        assert run.method == method
    assert snapshot(model) == before
    assert torch.equal(model(words(20)).logits, plain)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_nothing_is_left_on_any_family(name):
    family = FAMILIES[name]
    model, batch = family.tiny(), family.prompt(20)
    with torch.no_grad():
        plain = model(**batch).logits  # the library itself hangs hooks on a vision tower at its first forward
        before = snapshot(model)
        with Heavy().on(model):
            model.generate(**batch, **GREEDY)
        assert snapshot(model) == before
        assert torch.equal(model(**batch).logits, plain)


def test_nothing_is_left_after_an_exception(model):
    before = snapshot(model)
    with pytest.raises(KeyError, match=r"in the middle"), Broken().on(model):
        model(words(20))
    assert snapshot(model) == before
    with pytest.raises(ZeroDivisionError), All().on(model):
        raise ZeroDivisionError
    assert snapshot(model) == before


def test_nothing_is_left_when_attaching_itself_fails(model, monkeypatch):
    before = snapshot(model)

    def fail(run, original):
        raise MemoryError

    monkeypatch.setattr(Run, "_generate", fail)
    with pytest.raises(MemoryError):
        All().attach(model)
    assert snapshot(model) == before


@no_grad
def test_a_run_goes_on_after_an_exception_inside(model):
    with Newest(budget=4).on(model) as run:
        with pytest.raises(PromptError):
            model.generate(words(5)[:, :0], **GREEDY)
        model.generate(words(20), **GREEDY)
        assert run.report().kept == [4.0] * 4


def test_attach_lasts_until_detach(model):
    before = snapshot(model)
    run = All().attach(model)
    assert snapshot(model) != before
    run.detach()
    assert snapshot(model) == before
    run.detach()
    assert snapshot(model) == before


def test_entering_twice_is_refused(model):
    with All().on(model) as run:
        inside = snapshot(model)
        for again in (run, Newest().on(model)):
            with pytest.raises(
                AlreadyAttached, match=r"^LlamaForCausalLM already runs under All\(\); compose with `\|` instead$"
            ):
                again.__enter__()
        assert snapshot(model) == inside, "the run that was there goes on"


def test_an_attribute_of_the_instance_comes_back(model):
    mine = model.generate
    model.generate = mine
    with All().on(model):
        assert vars(model)["generate"] is not mine
    assert vars(model)["generate"] is mine
    del model.generate


@no_grad
def test_a_model_that_shares_the_config_is_left_alone(model):
    other = type(model)(model.config).eval()
    plain = other.generate(words(20), **GREEDY)
    with Newest(budget=2).on(model):
        assert other.config is model.config or other.config._attn_implementation == "sdpa"
        assert torch.equal(other.generate(words(20), **GREEDY), plain)
        with All().on(other):  # both at once
            assert torch.equal(other.generate(words(20), **GREEDY), plain)


@no_grad
def test_a_copy_made_inside_says_what_it_is(model):
    with All().on(model):
        twin = copy.deepcopy(model)
    with pytest.raises(
        SeqwiseError, match=r"this model is a copy made while a method was attached; copy it outside of `with`"
    ):
        twin(words(5))


def test_the_saved_config_says_nothing_of_a_method(model, tmp_path):
    with All().on(model):
        model.config.save_pretrained(tmp_path)
    assert "seqwise" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("chunk", [0, -1, True, 2.0, "8"])
def test_a_bad_chunk(model, chunk):
    with pytest.raises(
        ValueError, match=rf"^chunk must be a whole number of tokens >= 1, got {re.escape(repr(chunk))}$"
    ):
        All().on(model, chunk=chunk)


# what the model computes under a method that changes nothing


IDENTITIES = [All(), Newest(budget=1.0), Same(), Places(), All() | Same() | Places()]


@pytest.mark.parametrize("method", IDENTITIES, ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
@no_grad
def test_logits_are_the_plain_models(model, method, use_cache):
    batch = padded(7, 30, 19)
    plain = model.generate(**batch, **GREEDY, output_logits=True, return_dict_in_generate=True)
    with method.on(model):
        mine = model.generate(**batch, **GREEDY, output_logits=True, return_dict_in_generate=True, use_cache=use_cache)
    assert torch.equal(mine.sequences, plain.sequences)
    for got, wanted in zip(mine.logits, plain.logits, strict=True):
        torch.testing.assert_close(got, wanted, **LLAMA.tolerance)


@no_grad
def test_an_unpadded_prompt_is_equal_to_the_bit(model):
    plain = model(words(33)).logits
    with Newest(budget=1.0).on(model):
        assert torch.equal(model(words(33)).logits, plain)
        assert torch.equal(model(words(33), use_cache=False).logits, plain)


@pytest.mark.parametrize("mask", ["right", "holes"])
@no_grad
def test_padding_elsewhere_than_on_the_left(model, mask):
    keep = torch.ones(1, 30, dtype=torch.long)
    keep[:, slice(24, None) if mask == "right" else slice(9, 14)] = 0
    plain = model(words(30), attention_mask=keep).logits[keep.bool()]
    with All().on(model):
        torch.testing.assert_close(model(words(30), attention_mask=keep).logits[keep.bool()], plain, **LLAMA.tolerance)


@no_grad
def test_sampling_beams_and_several_sequences(model):
    batch = padded(9, 30)
    for options in (
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "do_sample": False, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True},
    ):
        torch.manual_seed(7)
        plain = model.generate(**batch, max_new_tokens=6, **options)
        with All().on(model) as run:
            torch.manual_seed(7)
            assert torch.equal(model.generate(**batch, max_new_tokens=6, **options), plain), options
        assert not run.acted


@no_grad
def test_beams_choose_among_what_an_evicting_cache_holds(model):
    """Every beam continues from its own slots: its score is that of its tokens alone."""
    prompt = words(24)
    with Newest(budget=6).on(model) as run:
        out = model.generate(prompt, max_new_tokens=4, num_beams=3, num_return_sequences=3, do_sample=False,
                             output_scores=True, return_dict_in_generate=True)  # fmt: skip
        assert run.report().kept == [6.0] * 4
    for ids, score in zip(out.sequences, out.sequences_scores, strict=True):
        with Newest(budget=6).on(model):
            logits = steps(model, prompt, ids[None, 24:-1])[0]
        own = logits.log_softmax(-1).gather(-1, ids[24:, None]).sum() / 4
        torch.testing.assert_close(own, score, rtol=1e-4, atol=1e-4)


@no_grad
def test_half_precision(model):
    low = copy.deepcopy(model).to(torch.bfloat16)
    batch = padded(7, 30)
    plain = low.generate(**batch, **GREEDY)
    with All().on(low):
        assert torch.equal(low.generate(**batch, **GREEDY), plain)
    with (Heavy(budget=6) | Bytes()).on(low) as run:
        low.generate(**batch, **GREEDY)
    assert run.report().kept == [6.0] * 4


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_gradients_flow(model, use_cache, train):
    if train:
        model.train()
    try:
        batch = padded(7, 20)
        grads = []
        for attach in (False, True):
            embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
            inputs = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"], "use_cache": use_cache}
            if attach:
                with Heavy(budget=1.0).on(model):
                    out = model(**inputs, labels=batch["input_ids"])
                    out.loss.backward()
            else:
                model(**inputs, labels=batch["input_ids"]).loss.backward()
            grads.append((embeds.grad, model.model.layers[1].self_attn.k_proj.weight.grad.clone()))
            model.zero_grad(set_to_none=True)
        for plain, mine in zip(*grads, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-5)
    finally:
        model.eval()


def test_a_prompt_whose_cache_is_cut_can_still_be_differentiated(model):
    embeds = model.get_input_embeddings()(words(20)).detach().requires_grad_()
    with Heavy(budget=4).on(model):
        model(inputs_embeds=embeds).logits.sum().backward()
    plain = embeds.grad.clone()
    embeds.grad = None
    model(inputs_embeds=embeds).logits.sum().backward()
    model.zero_grad(set_to_none=True)
    torch.testing.assert_close(plain, embeds.grad, **LLAMA.tolerance)


# evicting


def windowed(n, budget, prompt):
    """What rows see when a cache of `budget` newest slots is cut after the prompt and after every step."""
    i, j = torch.arange(n)[:, None], torch.arange(n)
    # a step sees the budget that the last one left, and itself
    return (j <= i) & ((i < prompt) | (i - j <= budget))


@pytest.mark.parametrize("budget", [1, 5, 12])
@no_grad
def test_eviction_is_attention_under_a_mask(model, budget):
    ids = words(40)
    seen = windowed(40, budget, 24)
    wanted = model(ids, attention_mask=torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]).logits
    with Newest(budget=budget).on(model) as run:
        got = steps(model, ids[:, :24], ids[:, 24:])
        assert run.acted and run.kept(2) == [[list(range(40 - budget, 40))] * 2]
    torch.testing.assert_close(got, wanted[:, 23:], **LLAMA.tolerance)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "neox", "gpt2"])
@pytest.mark.parametrize("method", [Newest(budget=5), Heavy(budget=0.4), Heavy(budget=6) | Half(budget=4)], ids=str)
@no_grad
def test_a_padded_batch_is_what_each_prompt_is_alone(name, method):
    family = FAMILIES[name]
    model = family.tiny()
    prompts = [family.prompt(n, seed) for seed, n in enumerate((17, 30, 6))]
    with method.on(model) as run:
        together = model.generate(
            **family.pad_left(prompts), **GREEDY, output_logits=True, return_dict_in_generate=True
        )
        kept = run.kept()
    for b, prompt in enumerate(prompts):
        with method.on(model) as run:
            alone = model.generate(**prompt, **GREEDY, output_logits=True, return_dict_in_generate=True)
            assert run.kept()[0] == kept[b]
        for got, wanted in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(got[b], wanted[0], **family.tolerance)


@no_grad
def test_a_padded_batch_in_packed_storage(model):
    """Rounding to codes turns a difference in the last bit into one of a step, so logits are only close."""
    method, prompts = (
        Heavy(budget=6) | Bytes() | Half(budget=4),
        [LLAMA.prompt(n, seed) for seed, n in enumerate((17, 30, 6))],
    )
    with method.on(model) as run:
        together = (
            model(**LLAMA.pad_left(prompts)).logits[:, -1],
            model(words(3)[0][:, None], cache=run.cache).logits[:, -1],
        )
        kept = run.kept()
    for b, prompt in enumerate(prompts):
        with method.on(model) as run:
            alone = model(**prompt).logits[0, -1], model(words(3)[:, b : b + 1], cache=run.cache).logits[0, -1]
            assert run.kept()[0] == kept[b]
        torch.testing.assert_close(together[0][b], alone[0], **LLAMA.tolerance)
        torch.testing.assert_close(together[1][b], alone[1], rtol=1e-2, atol=2e-2)


@no_grad
def test_samples_that_keep_different_counts_are_padded_and_told_apart(model):
    with Newest(budget=0.5).on(model) as run:
        model(**padded(10, 30))
        report = run.report()
    assert [len(sample[0]) for sample in run.kept(0)] == [5, 15]
    assert report.kept == [10.0] * 4
    assert report.live_bytes * 3 == report.cache_bytes * 2, "the shorter sample's padding is allocated, not live"


# phases


@no_grad
def test_a_prompt_ends_with_the_first_single_row(model):
    with Heavy(budget=1.0).on(model) as run:
        model(words(9))
        ledger = run.engine.ledger
        assert ledger.phase == "prefill" and ledger.step == 0
        model(words(1), cache=run.cache)
        assert ledger.phase == "decode" and ledger.step == 1
        model(words(3), cache=run.cache)
        assert ledger.phase == "decode" and ledger.step == 4, "later blocks count as single steps"


@no_grad
def test_blocks_before_the_first_single_row_are_one_prompt(model):
    with Newest(budget=0.5).on(model) as run:
        cache = model(words(8)).cache
        model(words(8, 1), cache=cache)
        assert run.engine.ledger.phase == "prefill" and run.report().kept == [8.0] * 4
        model(words(1), cache=cache)
        assert run.report().kept == [8.0] * 4, "the share is fixed at the end of the prompt"


@no_grad
def test_generate_ends_the_prompt(model):
    phases = []

    @dataclass(frozen=True)
    class Notes(All):
        def retain(self, view: View) -> None:
            if view.layer == 0:
                phases.append((view.phase, view.new, view.final))

    with Notes().on(model):
        model.generate(words(9), **GREEDY)
    assert phases == [("prefill", 9, True)] + [("decode", 1, True)] * 5
    phases.clear()
    with Notes().on(model, chunk=4):
        model.generate(words(9), **GREEDY)
    assert [phase for phase, *_ in phases[:3]] == ["prefill"] * 3
    assert [final for *_, final in phases[:3]] == [False, False, True]
    assert phases[3:] == [("decode", 1, True)] * 5
    phases.clear()
    with Notes().on(model):
        model.generate(words(1), **GREEDY)
    assert phases == [("prefill", 1, True)] + [("decode", 1, True)] * 5, "a prompt may have one token"


@no_grad
def test_end_prompt_and_begin_prompt(model):
    with Heavy(budget=1.0).on(model) as run:
        model(words(9))
        run.end_prompt()
        model(words(4), cache=run.cache)
        assert run.engine.ledger.step == 4, "a continuation that is to be scored is no prompt"
        run.begin_prompt()
        model(words(4), cache=run.cache)
        assert run.engine.ledger.phase == "prefill" and run.engine.ledger.step == 4
        model(words(1), cache=run.cache)
        assert run.engine.ledger.phase == "decode"


@no_grad
def test_plain_is_the_unmodified_model(model):
    batch = padded(9, 30)
    plain, wanted = model.generate(**batch, **GREEDY), model(words(20)).logits
    with Newest(budget=2).on(model) as run:
        out = model.generate(words(24), **GREEDY)
        cache, kept = run.cache, run.kept()
        with run.plain():
            assert torch.equal(model.generate(**batch, **GREEDY), plain)
            with run.plain():
                pass
            assert torch.equal(model(words(20)).logits, wanted), "still plain after an inner block"
        assert run.cache is cache and run.kept() == kept, "what was known stays"
        model.generate(torch.cat([out, words(3)], 1), cache=cache, **GREEDY)
        assert run.report().kept == [2.0] * 4, "and the method goes on"


@pytest.mark.parametrize("chunk", [1, 4, 7, 24, 50])
@no_grad
def test_chunks_are_the_whole_prompt_where_nothing_is_evicted(model, chunk):
    batch = padded(11, 24)
    plain = model.generate(**batch, **GREEDY)
    with All().on(model, chunk=chunk) as run:
        assert torch.equal(model.generate(**batch, **GREEDY), plain)
        assert run.kept(0)[0][0] == list(range(11 + 5))


@no_grad
def test_chunks_take_less_memory(model):
    peaks, kept = [], []
    for chunk in (None, 32, 8):
        with Newest(budget=8).on(model, chunk=chunk) as run:
            model.generate(words(90), **GREEDY)
            peaks.append(run.peak_bytes)
            kept.append(run.kept(3))
    assert peaks[0] > peaks[1] > peaks[2]
    assert kept[0] == kept[1] == kept[2]
    token = 2 * 2 * 8 * 4  # keys and values, KV heads, head size, bytes
    assert peaks[0] >= 90 * token and peaks[2] <= (4 * 8 + 8 + 8) * token


@no_grad
def test_a_share_of_a_prompt_in_chunks_is_of_the_whole_prompt(model):
    for chunk in (None, 10):
        with Newest(budget=0.5).on(model, chunk=chunk) as run:
            model.generate(**padded(20, 40), **GREEDY)
            assert [len(sample[0]) for sample in run.kept(1)] == [10, 20]


# turns


@pytest.mark.parametrize("name", ["llama", "mistral", "neox", "gpt2"])
@pytest.mark.parametrize("begin", [True, False])
@no_grad
def test_a_kept_cache_is_one_whole_prompt_where_nothing_is_evicted(name, begin):
    family = FAMILIES[name]
    model = family.tiny()
    batch = family.pad_left([family.prompt(9), family.prompt(20, 1)])
    more = torch.cat([family.prompt(5, 2)["input_ids"], family.prompt(5, 3)["input_ids"]])

    def turns(attached):
        run = All().attach(model) if attached else None
        first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, ids.shape[1] - 20, dtype=torch.long)], 1)
        if run is None:
            return model.generate(ids, attention_mask=mask, **GREEDY)
        if begin:
            run.begin_prompt()
        second = model.generate(ids, attention_mask=mask, cache=run.cache, **GREEDY)
        run.detach()
        return second

    assert torch.equal(turns(True), turns(False))


@no_grad
def test_a_second_turn_sees_what_the_first_one_left(model):
    ids = words(40)
    seen = windowed(40, 6, 20)
    seen[30:] = torch.ones(40, 40).tril().bool()[30:] & (torch.arange(40) >= 24)
    additive = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    wanted = model(ids, attention_mask=additive).logits[:, 30:]
    with Newest(budget=6).on(model) as run:
        steps(model, ids[:, :20], ids[:, 20:30])  # slots 24..29 are left
        run.begin_prompt()
        got = model(ids[:, 30:], cache=run.cache).logits
        assert run.kept(0) == [[list(range(34, 40))] * 2]
    torch.testing.assert_close(got, wanted, **LLAMA.tolerance)


@no_grad
def test_a_new_prompt_starts_afresh(model):
    with Heavy(budget=5).on(model) as run:
        first = model.generate(words(30), **GREEDY)
        kept = run.kept()
        model.generate(words(12, 1), **GREEDY)
        assert run.report().tokens == 12 + 5
        assert torch.equal(model.generate(words(30), **GREEDY), first) and run.kept() == kept


@no_grad
def test_the_callers_own_cache_is_the_one_that_fills(model):
    cache = DynamicCache(config=model.config)
    with Newest(budget=4).on(model) as run:
        model(words(20), cache=cache)
        assert run.cache is cache and all(isinstance(layer, SlotLayer) for layer in cache.layers)
        assert cache.get_seq_length() == 20 and cache.layers[0].read()[0].shape[2] == 4


# refusals


@no_grad
def test_caches_that_cannot_be_used(model):
    filled = model(words(5)).cache
    with Newest(budget=4).on(model) as run:
        with pytest.raises(
            CacheError, match=r"^this cache was filled without the method; start with an empty one inside"
        ):
            model(words(2), cache=filled)
        with pytest.raises(CacheError, match=r"^static caches are not supported; use the default dynamic cache$"):
            model.generate(words(5), cache=StaticCache(model.config, max_cache_len=32), **GREEDY)
        model(words(9))
        mine = run.cache
        with pytest.raises(CacheError, match=r"^the cache holds 1 samples, the batch has 2$"):
            model(words(3).expand(2, -1), cache=mine)
    with pytest.raises(
        CacheError, match=r"^this cache was filled under a method; continue inside `with method\.on\(model\)`$"
    ):
        model(words(1), cache=mine)
    with (
        Newest(budget=5).on(model),
        pytest.raises(
            CacheError, match=r"^this cache was filled under Newest\(budget=4\); continue it under the same method$"
        ),
    ):
        model(words(1), cache=mine)
    with Newest(budget=4).on(model) as run:  # attached again, it goes on
        model(words(1), cache=mine)
        assert run.report().tokens == 10


CROP = "generate({}=...) cannot crop a cache that a method has changed; leave it out"
STATIC = "cache_implementation='static' is not supported; use the default dynamic cache"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_num_tokens": 3}, CROP.format("prompt_lookup_num_tokens")),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, CROP.format("prompt_lookup_num_tokens")),
        ({"assistant_model": object()}, CROP.format("assistant_model")),
        ({"cache_implementation": "static"}, STATIC),
        ({"generation_config": GenerationConfig(cache_implementation="static")}, STATIC),
    ],
    ids=["lookup", "lookup in config", "assistant", "static", "static in config"],
)
def test_ways_to_generate_that_cannot_work(model, options, message):
    with All().on(model), pytest.raises(UnsupportedModel, match=f"^{re.escape(message)}$"):
        model.generate(words(5), max_new_tokens=2, **options)


def test_images_are_not_split_over_chunks(model):
    with All().on(model, chunk=4), pytest.raises(UnsupportedModel, match=r"^chunk: images cannot be split over chunks"):
        model.generate(words(5), pixel_values=torch.zeros(1), max_new_tokens=2)


@no_grad
def test_prompts_that_cannot_be(model):
    empty = "^the prompt is empty; give at least one token$"
    blank = r"^a prompt of the batch is empty \(all padding\); give each at least one token$"
    mask = torch.tensor([[1] * 5, [0] * 5])
    for chunk in (None, 2):
        with All().on(model, chunk=chunk) as run:
            with pytest.raises(PromptError, match=empty):
                model.generate(words(5)[:, :0], **GREEDY)
            with pytest.raises(PromptError, match=blank):
                model.generate(words(5).expand(2, -1), attention_mask=mask, **GREEDY)
            with pytest.raises(PromptError, match=blank):
                model(words(5).expand(2, -1), attention_mask=mask)
            with pytest.raises(PromptError, match=empty):
                model(words(5)[:, :0])
            with pytest.raises(PromptError, match=r"^attention_mask must be a 2-D "):
                model(words(5), attention_mask=torch.ones(1, 1, 5, 5))
            model(words(5))
            with pytest.raises(PromptError, match=r"^attention_mask must cover the 3 new tokens, got 2 columns$"):
                model(words(3), attention_mask=torch.ones(1, 2), cache=run.cache)


@no_grad
def test_segments_must_fit_the_prompt(model):
    wrong = Segments.infer(words(4), None, None)
    with Places().on(model) as run:
        run.bind(wrong)
        with pytest.raises(PromptError, match=r"^segments must cover the prompt's 9 tokens, got 4$"):
            model(words(9))
        with pytest.raises(
            PromptError, match=r"^the prompt's token types are unknown .*; bind them: run\.bind\(segments\)$"
        ):
            model(inputs_embeds=model.get_input_embeddings()(words(9)))
        run.bind(Segments.infer(words(9), None, None))
        model(inputs_embeds=model.get_input_embeddings()(words(9)))


# other slots


@no_grad
def test_stored_bytes_are_a_quarter_and_values_nearly_the_same(model):
    plain = model.generate(words(40), **GREEDY, output_logits=True, return_dict_in_generate=True)
    with Bytes().on(model) as run:
        mine = model.generate(words(40), **GREEDY, output_logits=True, return_dict_in_generate=True)
        report = run.report()
    assert run.acted
    for got, wanted in zip(mine.logits, plain.logits, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.15)
    assert any(not torch.equal(got, wanted) for got, wanted in zip(mine.logits[1:], plain.logits[1:], strict=True))
    # codes and two float parameters per token (head size 8), and steps in full precision
    assert report.cache_bytes < 0.65 * report.plain_bytes


@no_grad
def test_reading_few_slots_is_attention_under_a_mask(model):
    ids = words(40)
    i, j = torch.arange(40)[:, None], torch.arange(40)
    seen = (j <= i) & ((i < 24) | (i - j < 8))
    wanted = model(ids, attention_mask=torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]).logits
    with Half(budget=8).on(model) as run:
        got = steps(model, ids[:, :24], ids[:, 24:])
    torch.testing.assert_close(got, wanted[:, 23:], **LLAMA.tolerance)
    assert run.acted and run.report().kept == [40.0] * 4, "read sparsely, held in full"
    pairs = sum(range(1, 25)) + 16 * 8
    assert run.report().attention_work == pytest.approx(pairs / sum(range(1, 41)))


@no_grad
def test_a_rewritten_head_changes_and_the_others_keep_the_fused_path(model):
    outputs = {}

    def catch(name):
        return model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(
            lambda module, args: outputs.__setitem__(name, args[0].view(*args[0].shape[:2], 4, 8))
        )

    handle = catch("plain")
    model(words(40))
    handle.remove()
    handle = catch("mine")
    values = {}
    value = model.model.layers[2].self_attn.v_proj.register_forward_hook(lambda m, a, out: values.__setitem__("v", out))
    with Flat().on(model) as run:
        model(words(40))
    handle.remove()
    value.remove()
    assert run.acted
    for head in (0, 2, 3):
        assert torch.equal(outputs["mine"][:, :, head], outputs["plain"][:, :, head])
    v = values["v"].view(1, -1, 2, 8)[:, :, 0]  # KV head of query head 1
    running = v.cumsum(1) / torch.arange(1, v.shape[1] + 1)[None, :, None]
    torch.testing.assert_close(outputs["mine"][:, :, 1], running, rtol=1e-4, atol=1e-5)


@no_grad
def test_positions_go_on_from_where_they_were_placed(model):
    ids = words(30)
    position = torch.arange(30)[None] + 7
    wanted = model(ids, position_ids=position).logits
    with Places(first=7.0).on(model):
        got = steps(model, ids[:, :20], ids[:, 20:])
    torch.testing.assert_close(got, wanted[:, 19:], **LLAMA.tolerance)


@pytest.mark.parametrize("method", [Greedy(), Greedy() | All()], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "neox"])
@no_grad
def test_a_decode_loop_with_a_verified_tree_is_lossless(name, method):
    family = FAMILIES[name]
    model, prompt = family.tiny(), family.prompt(20)
    plain = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    ORACLE[:] = [*plain[0].tolist(), 0, 0]
    with method.on(model) as run:
        assert torch.equal(model.generate(**prompt, max_new_tokens=16, do_sample=False), plain)
        assert ORACLE.pop() < 12, "of 16 tokens, some came along with others"
        held = run.kept(0)[0][0]
        assert held == list(range(held[0], held[-1] + 1)), "nothing of a rejected branch stays"


@no_grad
def test_a_decode_loop_takes_one_prompt(model):
    with Greedy().on(model):
        for batch, message in (
            ({"input_ids": words(5).expand(2, -1)}, "one prompt at a time, got a batch of 2$"),
            ({"input_ids": words(5), "num_beams": 2}, "does not search beams; use num_beams=1$"),
        ):
            with pytest.raises(PromptError, match=message):
                model.generate(**batch, max_new_tokens=2)


@pytest.mark.parametrize("chunk", [None, 7])
@no_grad
def test_sliding_windows_hold_what_can_still_be_seen(chunk):
    family = FAMILIES["mistral"]
    model = family.tiny()
    batch = family.pad_left([family.prompt(40), family.prompt(60, 1)])
    plain = model.generate(**batch, max_new_tokens=20, do_sample=False)
    with All().on(model, chunk=chunk) as run:
        assert torch.equal(model.generate(**batch, max_new_tokens=20, do_sample=False), plain)
        # a window of 12: the newest row, and 11 before it
        assert run.report().kept == [11.0] * 4 and not run.acted


@no_grad
def test_a_slot_that_the_engine_does_not_serve_is_refused(model):
    @dataclass(frozen=True)
    class Later(Method):
        slots: ClassVar[tuple[str, ...]] = ("hidden",)

    with pytest.raises(
        SeqwiseError, match=r"^Later\(\) claims the slot 'hidden', which the engine does not serve yet$"
    ):
        Later().on(model)


# between the layers


@dataclass(frozen=True)
class Thin(Method):
    """Drops every second visual row in front of a layer."""

    layer: int = 2

    slots: ClassVar[tuple[str, ...]] = ("layer.rows",)

    def stages(self, anatomy: object) -> tuple[int, ...]:
        return (self.layer,)

    def watched(self, anatomy: object) -> tuple[int, ...]:
        return (self.layer - 1,)

    def observe_transition(self, transition: Transition) -> None:
        assert transition.before.shape == transition.after.shape
        transition.state["seen"] = transition.before.norm(dim=-1)

    def keep_rows(self, stage: Stage) -> torch.Tensor:
        assert stage.state["seen"].shape == stage.live.shape
        every = stage.visual.cumsum(-1) % 2 == 1
        return ~stage.visual | every


@pytest.mark.parametrize("layer", [1, 2, 3])
@no_grad
def test_rows_between_layers_are_attention_under_a_mask(layer):
    """What a dropped row no longer does: being seen from that layer on. Its own output is not asked for."""
    family = FAMILIES["llava"]
    model, batch = family.tiny(), family.prompt(12)
    ids = batch["input_ids"]
    n = ids.shape[1]
    visual = (ids == 97)[0]
    dropped = visual & (visual.cumsum(-1) % 2 == 0)
    causal = torch.ones(n, n).tril().bool()

    def masked(module, args, kwargs):
        seen = causal & ~dropped if module.layer_idx >= layer else causal
        kwargs["attention_mask"] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        return args, kwargs

    handles = [
        x.self_attn.register_forward_pre_hook(masked, with_kwargs=True) for x in model.model.language_model.layers
    ]
    wanted = model(**batch).logits[0][~dropped]
    for handle in handles:
        handle.remove()
    with Thin(layer).on(model) as run:
        got = model(**batch).logits[0]
        left = [i for i in range(n) if not dropped[i]]
        assert run.rows == [left] and run.kept()[0][f"layer {layer}"] == left
        assert [len(run.kept(i)[0][0]) for i in range(4)] == [n] * layer + [len(left)] * (4 - layer)
        assert run.acted and run.report().attention_work < 1
    torch.testing.assert_close(got, wanted, **family.tolerance)


# on disk


def saved(model, method, path, batch):
    with method.on(model) as run:
        model(**batch)
        run.save(path)
    return run


@pytest.mark.parametrize(
    "method",
    [
        All(),
        Heavy(budget=6),
        Heavy(budget=0.3) | Bytes(),
        Bytes(),
        Places(first=3.0),
        Newest(budget=4) | Half(budget=3),
    ],
    ids=str,
)
@no_grad
def test_a_saved_context_answers_as_the_live_one(model, method, tmp_path):
    batch = padded(9, 30)
    question = torch.cat([words(4, 5), words(4, 6)])
    ids = torch.cat([batch["input_ids"], question], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(question)], 1)
    with method.on(model) as run:
        model(**batch)
        path = run.save(tmp_path / "context.safetensors")
        wanted = model.generate(
            ids, attention_mask=mask, cache=run.cache, **GREEDY, output_logits=True, return_dict_in_generate=True
        )
    assert path == tmp_path / "context.safetensors"
    for _ in range(2):  # reopened for many questions
        with method.on(model) as run:
            cache = run.load(path)
            assert torch.equal(run.context_ids, batch["input_ids"])
            got = model.generate(
                ids, attention_mask=mask, cache=cache, **GREEDY, output_logits=True, return_dict_in_generate=True
            )
        assert torch.equal(got.sequences, wanted.sequences)
        for x, y in zip(got.logits, wanted.logits, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@no_grad
def test_a_reopened_context_says_what_it_holds(model, tmp_path):
    run = saved(model, Heavy(budget=6), tmp_path / "c", padded(9, 30))
    with Heavy(budget=6).on(model) as again:
        again.load(tmp_path / "c")
        assert again.kept() == run.kept()
        assert again.report().kept == run.report().kept and again.report().tokens == 30
        assert again.report().cache_bytes == run.report().live_bytes


@no_grad
def test_a_context_is_refused_on_another_model_or_method(model, tmp_path):
    path = tmp_path / "context.safetensors"
    saved(model, Heavy(budget=6), path, padded(9, 30))
    with (
        Heavy(budget=7).on(model) as run,
        pytest.raises(
            CacheError,
            match=rf"^{re.escape(str(path))} was saved under Heavy\(budget=6\); open it under the same method$",
        ),
    ):
        run.load(path)
    other = copy.deepcopy(model)
    other.lm_head.weight.mul_(1.5)
    with (
        Heavy(budget=6).on(other) as run,
        pytest.raises(CacheError, match=r"was saved from another model \(\w+, this one is \w+\)$"),
    ):
        run.load(path)


@pytest.mark.parametrize("content", [b"", b"not a file of ours", b"\xff" * 500, None])
def test_files_that_are_no_context(model, tmp_path, content):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with All().on(model) as run:
        with pytest.raises(CacheError, match=rf"^cannot read a context from {re.escape(str(path))}: "):
            run.load(path)
        assert run.cache is None


@no_grad
def test_a_truncated_or_foreign_file_is_no_context(model, tmp_path):
    from safetensors.torch import save_file

    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(2)}, foreign)
    save_file({"x": torch.zeros(2)}, tmp_path / "odd", {"seqwise": "{broken"})
    path = tmp_path / "context.safetensors"
    saved(model, All(), path, padded(9, 30))
    path.write_bytes(path.read_bytes()[:-100])
    with All().on(model) as run:
        with pytest.raises(CacheError, match=r"foreign\.safetensors is no saved context$"):
            run.load(foreign)
        for broken in (path, tmp_path / "odd"):
            with pytest.raises(CacheError, match=r"^cannot read a context from "):
                run.load(broken)


def test_there_may_be_nothing_to_save(model, tmp_path):
    with All().on(model) as run:
        with pytest.raises(CacheError, match=r"^nothing to save: run a prompt with a cache first$"):
            run.save(tmp_path / "c")
        with torch.no_grad():
            model(words(5), use_cache=False)
        with pytest.raises(CacheError, match=r"^nothing to save"):
            run.save(tmp_path / "c")
    assert not list(tmp_path.iterdir())


@no_grad
def test_a_full_disk_leaves_nothing_behind(model, tmp_path, monkeypatch):
    import safetensors.torch

    before = tmp_path / "context.safetensors"
    saved(model, All(), before, padded(5, 9))
    content = before.read_bytes()

    def full(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with All().on(model) as run:
        model(words(5))
        with pytest.raises((OSError, SeqwiseError), match=r"No space left on device"):
            run.save(before)
    assert [path.name for path in tmp_path.iterdir()] == [before.name] and before.read_bytes() == content


@no_grad
def test_a_folder_that_is_missing_or_read_only_is_named(model, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    with All().on(model) as run:
        model(words(5))
        with pytest.raises((OSError, SeqwiseError), match=r"nowhere"):
            run.save(tmp_path / "nowhere" / "c")
        if os.geteuid() != 0:  # root may write anywhere
            folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
            with pytest.raises((OSError, SeqwiseError), match=r"closed"):
                run.save(folder / "c")
            folder.chmod(stat.S_IRWXU)
    assert not list(folder.iterdir()) and [path.name for path in tmp_path.iterdir()] == ["closed"]


# what a run tells


@no_grad
def test_a_method_that_never_acts_says_so(model):
    with Newest(budget=1.0).on(model) as run:
        assert not run.acted and run.kept() == [] and run.rows == [] and run.cache is None and run.peak_bytes == 0
        model.generate(words(9), **GREEDY)
    assert not run.acted and "(never acted)" in str(run)
    with Newest(budget=3).on(model) as run:
        model.generate(words(9), **GREEDY)
    assert run.acted and "never acted" not in str(run)


@no_grad
def test_the_report_adds_up(model):
    with Newest(budget=8).on(model) as run:
        model.generate(words(24), max_new_tokens=9, do_sample=False)
    report = run.report()
    token = 4 * 2 * 2 * 8 * 4  # layers, KV heads, keys and values, head size, bytes
    assert report.method == "Newest(budget=8)" and report.tokens == 24 + 8 and report.kept == [8.0] * 4
    assert report.plain_bytes == 32 * token and report.live_bytes == 8 * token
    assert report.cache_bytes == 9 * token, "the slot that each step fills before another one goes"
    assert report.peak_bytes == (24 + 3 * 8) * token // 4, "each layer is cut before the next one fills"
    assert report.attention_work == pytest.approx((sum(range(1, 25)) + 8 * 9) / sum(range(1, 33)))
    assert report.to_dict()["kept"] == [8.0] * 4
    text = str(run)
    assert text.splitlines()[0] == "Newest(budget=8)"
    for part in (
        "tokens seen        32",
        "kept per layer     8 to 8",
        "cache              0.00 MiB allocated, 0.00 MiB live, 0.02 MiB plain",
        "of the plain model's",
    ):
        assert part in text


@no_grad
def test_kept_layers_are_counted_from_zero(model):
    with Newest(budget=8).on(model) as run:
        model(words(24))
    assert run.kept(3) == [[list(range(16, 24))] * 2]
    assert set(run.kept()[0]) == {f"cache {i}" for i in range(4)}
    for layer in (-1, 4):
        with pytest.raises(UsageError, match=rf"^layer must be in \[0, 3\], got {layer}$"):
            run.kept(layer)


@no_grad
def test_rows_are_the_logits_rows(model):
    with All().on(model) as run:
        model(**padded(3, 5))
        assert run.rows == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]
        model(words(2).expand(2, -1), cache=run.cache)
        assert run.rows == [[3, 4], [5, 6]]


@settings(max_examples=10)
@given(data=st.data())
def test_any_way_to_cut_a_prompt_in_blocks_is_the_whole_prompt(data):
    model = cached_llama()
    ids = words(24)
    cuts = sorted(data.draw(st.sets(st.integers(2, 22), max_size=4)))
    blocks = [b - a for a, b in zip([0, *cuts], [*cuts, 24], strict=True)]
    with torch.no_grad(), All().on(model) as run:
        wanted = model(ids).logits
        cache, logits = None, []
        for block in ids.split(blocks, 1):
            out = model(block, cache=cache)
            cache = out.cache
            logits.append(out.logits)
        assert run.report().tokens == 24
    torch.testing.assert_close(torch.cat(logits, 1), wanted, **LLAMA.tolerance)


_CACHED = []


def cached_llama():
    if not _CACHED:
        _CACHED.append(LLAMA.tiny())
    return _CACHED[0]
