import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from seqwise.core.errors import AlreadyAttached, CacheError, UnsupportedModel, UsageError
from seqwise.methods.order.giraffe import (
    Giraffe,
    alter_document,
    alter_number,
    base_frequencies,
    cos_sin,
    cutoffs,
    draw_positions,
    frequency_map,
    linear,
    lines,
    power,
    present,
    random_positions,
    randomise,
    truncated,
    xpos_rotate,
    xpos_scale,
    xpos_scores,
)
from seqwise.testing.families import FAMILIES

# frequency maps


def reference(d, s, kappa, T):
    """One frequency after the other, in Python floats."""
    out = []
    for i in range(d // 2):
        f = 10_000 ** (-2 * i / d) / s * (1 - 2 * i / d) ** kappa
        if T is not None:
            b, a, rho = 2 * math.pi / T, 2 * math.pi / (8 * T), 2 * math.pi / (16 * T)
            f = f if f >= b else rho if f >= a else 0.0
        out.append(f)
    return out


@pytest.mark.parametrize(
    "s, kappa, T",
    [(1, 0, None), (4, 0, None), (16, 0, None), (1, 0.5, None), (1, 0.1, None), (1, 0, 2048), (4, 0, 2048),
     (1, 0.5, 2048), (2.5, 0.3, 100)],
)  # fmt: skip
@pytest.mark.parametrize("d", [2, 16, 128])
def test_every_map_equals_the_formula(d, s, kappa, T):
    f = frequency_map(base_frequencies(d), s, kappa, T)
    assert f.dtype == torch.float32 and f.shape == (d // 2,)
    torch.testing.assert_close(f, torch.tensor(reference(d, s, kappa, T)), rtol=1e-6, atol=0)


def test_thresholds_compare_the_frequency_after_division():
    f = frequency_map(base_frequencies(16), s=4, T=32)
    rho = 0.0122718
    torch.testing.assert_close(f, torch.tensor([0.25, rho, rho, 0, 0, 0, 0, 0]), rtol=1e-5, atol=0)
    theta = base_frequencies(16)
    assert theta[1] > cutoffs(32)[1] > theta[1] / 4, "or this example would not tell"


def test_truncation_at_2048_removes_9_of_64_frequencies():
    theta = base_frequencies(128)
    f = frequency_map(theta, T=2048)
    a, b, rho = cutoffs(2048)
    assert int((f == 0).sum()) == 9
    assert f[theta >= b].equal(theta[theta >= b])
    assert rho < a and set(f[(theta >= a) & (theta < b)].tolist()) == {torch.tensor(rho).item()}


def test_power_spares_the_fast_and_stops_the_slow():
    theta = base_frequencies(64)
    ratio = power(theta, 0.5) / theta
    assert ratio[0] == 1 and (ratio.diff() < 0).all()
    torch.testing.assert_close(ratio[-1], torch.tensor(1 / 32).sqrt(), rtol=1e-4, atol=0)


def test_neutral_settings_are_plain_rope_bit_by_bit():
    theta = base_frequencies(64)
    assert frequency_map(theta).equal(theta)
    assert frequency_map(theta, s=1, kappa=0, T=10**6).equal(theta)  # every frequency makes a turn within T
    assert linear(theta, 1.0).equal(theta) and power(theta, 0.0).equal(theta)


def test_a_bound_itself_belongs_to_the_band_above():
    f = torch.tensor([1.0, 0.5, 0.25, 0.125])
    assert truncated(f, a=0.25, b=0.5, rho=0.1).tolist() == pytest.approx([1.0, 0.5, 0.1, 0.0])


def test_a_removed_frequency_carries_no_position():
    f = frequency_map(base_frequencies(16), T=8)
    assert (f == 0).any()
    cos, sin = cos_sin(f, torch.arange(1000))
    assert cos.isfinite().all() and sin.isfinite().all()
    still = torch.cat([f, f]) == 0
    assert (cos[:, still] == 1).all() and (sin[:, still] == 0).all()


def test_tables_are_float32_and_hold_the_halves_alike():
    f = base_frequencies(8)
    p = torch.tensor([[0.0, 1.5, 4001.0]])
    cos, sin = cos_sin(f, p.long().to(torch.float64) + 0.5)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (1, 3, 8)
    for j, position in enumerate([0.5, 1.5, 4001.5]):
        for i in range(4):
            angle = torch.tensor(position * float(f[i])).float()
            for column in (i, i + 4):
                torch.testing.assert_close(cos[0, j, column], angle.cos(), rtol=0, atol=5e-4)
                torch.testing.assert_close(sin[0, j, column], angle.sin(), rtol=0, atol=5e-4)
    whole = cos_sin(f, torch.arange(300).bfloat16().float())[0]
    exact = cos_sin(f, torch.arange(300))[0]
    assert (whole - exact).abs().max() > 0.1, "half precision positions would be wrong from 256 on"
    assert cos_sin(f.bfloat16(), torch.arange(300))[0].dtype == torch.float32


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: linear(base_frequencies(4), 0.99), r"s must be >= 1, got 0.99"),
        (lambda: linear(base_frequencies(4), math.nan), r"s must be >= 1, got nan"),
        (lambda: power(base_frequencies(4), -0.1), r"kappa must be >= 0, got -0.1"),
        (lambda: cutoffs(0), r"T must be >= 1, got 0"),
        (lambda: base_frequencies(7), r"d must be an even number >= 2, got 7"),
        (lambda: Giraffe(linear=0.5), r"Giraffe.linear must be >= 1, got 0.5"),
        (lambda: Giraffe(power=-1.0), r"Giraffe.power must be >= 0, got -1.0"),
        (lambda: Giraffe(truncate=0), r"Giraffe.truncate must be >= 1, got 0"),
        (lambda: Giraffe(linear=math.inf), r"Giraffe.linear must be a number, got inf"),
    ],
)
def test_values_out_of_range_are_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# random positions


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 2, width=32), min_size=1, max_size=40))
def test_random_positions_equal_the_running_sum(u):
    total, p = 0.0, []
    for step in u:
        total += step
        p.append(total)
    shrink = min(1.0, len(u) / total) if total else 1.0
    found = random_positions(torch.tensor([u]))
    torch.testing.assert_close(found[0], torch.tensor([x * shrink for x in p]), rtol=1e-4, atol=1e-5)


def test_sums_beyond_the_length_shrink_and_others_are_not_stretched():
    p = random_positions(torch.tensor([[2.0, 2.0, 2.0, 2.0], [0.5, 0.5, 0.5, 0.5]]))
    assert p.tolist() == [[1, 2, 3, 4], [0.5, 1, 1.5, 2]]


def test_padding_gives_what_each_sample_gives_alone():
    u = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) * 2
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    mask[2, 6:] = 0
    p = random_positions(u, mask)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p[0], random_positions(u[:1])[0])
    torch.testing.assert_close(p[1, 4:], random_positions(u[1:2, 4:])[0])
    torch.testing.assert_close(p[2, :6], random_positions(u[2:, :6])[0])
    assert (p[1, :4] == 0).all()
    assert random_positions(u, torch.zeros(3, 9)).isfinite().all()


def test_draws_differ_between_calls_and_rows_and_repeat_with_the_seed():
    generator = torch.Generator().manual_seed(7)
    first, second = draw_positions(2, 50, generator), draw_positions(2, 50, generator)
    assert not first.equal(second) and not first[0].equal(first[1])
    assert first.equal(draw_positions(2, 50, torch.Generator().manual_seed(7)))
    steps = draw_positions(200, 200, torch.Generator().manual_seed(1)).diff()
    assert (steps >= 0).all() and (steps <= 2).all()
    assert abs(float(steps.mean()) - 1) < 0.05 and float(steps.std()) > 0.5
    assert draw_positions(200, 64, generator).max() <= 64 * (1 + 1e-6)


# xPos


@pytest.mark.parametrize("L", [1, 6, 7])
def test_xpos_scores_are_relative_and_decay(L):
    d, S = 8, 4.0
    f = base_frequencies(d)
    q, k = torch.randn(2, 3, L, d, generator=torch.Generator().manual_seed(0)).double()
    scores = xpos_scores(q, k, f, xpos_scale(L, d, S))
    assert scores.shape == (3, L, L)
    expected = torch.zeros(3, L, L, dtype=torch.float64)
    for m in range(L):
        for n in range(L):
            for i in range(d // 2):
                zeta = (2 * i + 0.4 * d) / (1.4 * d)
                a = torch.complex(q[:, m, 2 * i], q[:, m, 2 * i + 1])
                b = torch.complex(k[:, n, 2 * i], k[:, n, 2 * i + 1])
                turn = complex(math.cos((m - n) * f[i]), math.sin((m - n) * f[i]))
                expected[:, m, n] += (a * b.conj() * turn).real * zeta ** ((m - n) / S)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-4)


def test_xpos_shifts_exponents_to_the_middle_but_not_the_rotation():
    for L, first in ((6, -3), (7, -4)):
        scale = xpos_scale(L, 4, 2.0)
        zeta = torch.tensor([0.4 / 1.4, (2 + 1.6) / 5.6])
        assert scale.shape == (L, 2)
        torch.testing.assert_close(scale, zeta ** (torch.arange(first, first + L) / 2.0)[:, None])
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    turned = xpos_rotate(x, base_frequencies(4), torch.ones(5, 2))
    torch.testing.assert_close(turned[0], x[0])  # position 0 is not rotated
    assert xpos_scale(2048, 128).half().isfinite().all() and (xpos_scale(2048, 128).half() > 0).all()


def test_xpos_of_llama_weights_pairs_the_halves():
    q, k = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    f, scale = base_frequencies(8), xpos_scale(5, 8)
    order = torch.arange(8).view(2, 4).T.flatten()  # (0, 4, 1, 5, ...): pairs (i, i + 4) side by side
    halves = xpos_scores(q, k, f, scale, interleaved=False)
    torch.testing.assert_close(halves, xpos_scores(q[:, order], k[:, order], f, scale))
    assert (halves - xpos_scores(q, k, f, scale)).abs().max() > 0.1


# tasks


def test_lines_ask_for_one_of_many_values():
    for seed in range(5):
        prompt, answer = lines(30, random.Random(seed))
        rows = prompt.splitlines()
        assert len(rows) == 31
        asked = rows[-1].split("line ")[1].split("?")[0]
        assert [row for row in rows[:-1] if row == f"line {asked}: the value is {answer}"]
        assert len({row.split(":")[0] for row in rows[:-1]}) == 30
    assert lines(30, random.Random(0)) == lines(30, random.Random(0)) != lines(30, random.Random(1))


def test_altered_numbers():
    draw = random.Random(0)
    for year in ("1000", "1987", "2099"):
        assert {int(alter_number(year, draw)) - int(year) for _ in range(500)} == {*range(-10, 11)} - {0}
    for number in ("7", "0", "42", "9999", "3000", "100", "123456"):
        others = {alter_number(number, draw) for _ in range(300)}
        assert number not in others and {len(other) for other in others} == {len(number)}
    assert {alter_number("3", draw) for _ in range(300)} == set("012456789")
    for wrong in ("", "3.5", "two", "-1"):
        with pytest.raises(ValueError, match="answer must be a whole number, got"):
            alter_number(wrong, draw)


def test_documents_are_altered_where_the_number_stands_alone():
    text = "In 1987, not 11987 or 19870; (1987) and a1987b."
    assert alter_document(text, "1987", "1990") == "In 1990, not 11987 or 19870; (1990) and a1990b."


def test_presence():
    assert present("It was 1990, I think.", "1990") and not present("It was 199", "1990")


# the method on a model

OPTIONS = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
ACTIVE = Giraffe(linear=4.0, power=0.5, truncate=8)


def test_linear_scaling_equals_the_librarys_own():
    family = FAMILIES["llama"]
    model, batch = family.tiny(), family.prompt(40)
    config = LlamaConfig(**{**model.config.to_dict(), "rope_parameters": {
        "rope_type": "linear", "rope_theta": model.config.rope_parameters["rope_theta"], "factor": 4.0}})  # fmt: skip
    scaled = LlamaForCausalLM(config).eval()
    scaled.load_state_dict(model.state_dict())
    wanted = scaled.generate(**batch, **OPTIONS)
    with Giraffe(linear=4.0).on(model):
        found = model.generate(**batch, **OPTIONS)
    plain = model.generate(**batch, **OPTIONS)
    torch.testing.assert_close(found.scores, wanted.scores, **family.tolerance)
    assert (found.scores[0] - plain.scores[0]).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "neox", "llava", "qwen25_vl"])
def test_generation_equals_the_model_whose_frequencies_were_changed(family):
    family = FAMILIES[family]
    model, batch = family.tiny(), family.prompt(17)
    plain = model.generate(**batch, **OPTIONS)
    undo = ACTIVE.apply(model)
    wanted = model.generate(**batch, **OPTIONS)
    undo()
    assert (wanted.scores[0] - plain.scores[0]).abs().max() > 0.001
    with ACTIVE.on(model) as run:
        found = model.generate(**batch, **OPTIONS)
        assert run.acted
    assert found.sequences.equal(wanted.sequences)
    torch.testing.assert_close(found.scores, wanted.scores, **family.tolerance)
    again = model.generate(**batch, **OPTIONS)
    assert all(a.equal(b) for a, b in zip(again.scores, plain.scores, strict=True))


def test_the_frequencies_return_also_after_an_error():
    model = FAMILIES["llama"].tiny()
    rotary = model.model.rotary_emb
    before = rotary.inv_freq
    with ACTIVE.on(model):
        assert rotary.inv_freq.equal(frequency_map(before, 4.0, 0.5, 8))
    assert rotary.inv_freq is before
    with pytest.raises(RuntimeError, match="inside"), ACTIVE.on(model):
        raise RuntimeError("inside")
    assert rotary.inv_freq is before
    assert "inv_freq" not in model.state_dict()


def test_padded_prompts_equal_each_alone():
    family = FAMILIES["llama"]
    model, prompts = family.tiny(), [family.prompt(9, seed=1), family.prompt(30, seed=2)]
    with ACTIVE.on(model):
        together = model.generate(**family.pad_left(prompts), **OPTIONS)
        for b, batch in enumerate(prompts):
            alone = model.generate(**batch, **OPTIONS)
            assert together.sequences[b, -5:].equal(alone.sequences[0, -5:])
            torch.testing.assert_close(together.scores[0][b], alone.scores[0][0], **family.tolerance)


def test_a_cache_is_not_continued_under_another_scale():
    family = FAMILIES["llama"]
    model, batch = family.tiny(), family.prompt(12)
    cache = DynamicCache()
    with Giraffe(linear=2.0).on(model):
        model(**batch, cache=cache)
    with pytest.raises(CacheError, match="continue it under the same method"), Giraffe(linear=4.0).on(model):
        model(batch["input_ids"][:, :1], cache=cache)


def test_identity_changes_nothing():
    family = FAMILIES["llama"]
    model, batch = family.tiny(), family.prompt(20)
    plain = model.generate(**batch, **OPTIONS)
    with ACTIVE.identity().on(model):
        same = model.generate(**batch, **OPTIONS)
    torch.testing.assert_close(same.scores, plain.scores, **family.tolerance)


def test_models_without_one_set_of_frequencies_are_refused():
    with pytest.raises(UnsupportedModel, match="RoPE"):
        Giraffe().on(FAMILIES["gpt2"].tiny())
    with pytest.raises(UnsupportedModel, match="RoPE"):
        Giraffe().apply(FAMILIES["gpt2"].tiny())
    model = FAMILIES["llama"].tiny()
    config = LlamaConfig(**{**model.config.to_dict(), "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}})  # fmt: skip
    dynamic = LlamaForCausalLM(config)
    for use in (Giraffe().on, Giraffe().apply):
        with pytest.raises(UnsupportedModel, match="changes its rotary frequencies with the length"):
            use(dynamic)


def test_apply_lasts_until_it_is_undone_and_trains():
    model, batch = FAMILIES["llama"].tiny(), FAMILIES["llama"].prompt(20)
    before = model.model.rotary_emb.inv_freq
    undo = Giraffe(linear=2.0).apply(model)
    assert model.model.rotary_emb.inv_freq.equal(before / 2)
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with Giraffe(linear=3.0).on(model):  # another factor on top
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, before / 6)
        with pytest.raises(AlreadyAttached, match="apply outside of its `with`"):
            Giraffe().apply(model)
    assert model.model.rotary_emb.inv_freq.equal(before / 2)
    undo()
    assert model.model.rotary_emb.inv_freq is before


def test_frequencies_of_half_precision_models_are_computed_in_float32():
    model = FAMILIES["llama"].tiny().bfloat16()
    model.model.rotary_emb.inv_freq = base_frequencies(8)  # as from_pretrained leaves it
    undo = Giraffe(linear=3.0).apply(model)
    assert model.model.rotary_emb.inv_freq.equal(base_frequencies(8) / 3)
    undo()


# training on random positions


def placed(model):
    """The positions that every forward gives its layers, in a list that grows."""
    given = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(kwargs["position_ids"].clone()), with_kwargs=True
        )
    return given


def test_random_positions_in_train_mode_only():
    model, batch = FAMILIES["llama"].tiny(), FAMILIES["llama"].prompt(30)
    plain = model(**batch).logits
    given = placed(model)
    undo = randomise(model, torch.Generator().manual_seed(3))
    assert model(**batch).logits.equal(plain) and given[0].tolist() == [list(range(30))]
    given.clear()
    model.train()
    model(**batch)
    model(**batch)
    layers = len(model.model.layers)
    generator = torch.Generator().manual_seed(3)
    for forward in (given[:layers], given[layers:]):
        wanted = draw_positions(1, 30, generator, batch["attention_mask"])
        assert all(p.equal(wanted) for p in forward)  # all layers share the draw, the next forward has its own
    undo()
    assert model(**batch).logits.equal(plain)
    model.eval()
    assert model(**batch).logits.equal(plain)


def test_random_positions_are_not_read_as_packed_sequences():
    model, batch = FAMILIES["llama"].tiny().train(), FAMILIES["llama"].prompt(30)
    for call in ({}, {"use_cache": False}, {"attention_mask": batch["attention_mask"]}):
        undo = randomise(model, torch.Generator().manual_seed(3))
        found = model(batch["input_ids"], **call).logits
        undo()
        p = draw_positions(1, 30, torch.Generator().manual_seed(3))
        torch.testing.assert_close(found, model(**batch, position_ids=p, use_cache=False).logits)
    packed = model(batch["input_ids"], position_ids=p, use_cache=False).logits
    assert (packed - found).abs().max() > 0.01, "a model that minds nothing would prove nothing"


def test_random_positions_respect_padding_and_vision_models():
    family = FAMILIES["llava"]
    model = family.tiny().train()
    batch = family.pad_left([family.prompt(9, seed=1), family.prompt(30, seed=2)])
    given = []
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["position_ids"]), with_kwargs=True
    )
    undo = randomise(model, torch.Generator().manual_seed(0))
    model(**batch)
    undo()
    wanted = draw_positions(*batch["input_ids"].shape, torch.Generator().manual_seed(0), batch["attention_mask"])
    assert given[0].equal(wanted)
    assert (given[0][0, batch["attention_mask"][0] == 0] == 0).all()


def test_random_positions_refuse_to_continue_a_cache():
    model, batch = FAMILIES["llama"].tiny().train(), FAMILIES["llama"].prompt(12)
    undo = randomise(model, torch.Generator())
    with pytest.raises(UsageError, match=r"cannot continue a cache; call model.eval\(\)"):
        model.generate(**batch, max_new_tokens=3)
    undo()
    with pytest.raises(UnsupportedModel, match="RoPE"):
        randomise(FAMILIES["gpt2"].tiny(), torch.Generator())
    with pytest.raises(UnsupportedModel, match="one position per token"):
        randomise(FAMILIES["qwen25_vl"].tiny(), torch.Generator())


def test_random_positions_under_the_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = FAMILIES["llama"].tiny()
    given = placed(model)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 97, (8, 12))]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
    undo = randomise(model, torch.Generator().manual_seed(5))
    trainer.train()
    generator = torch.Generator().manual_seed(5)
    layers = len(model.model.layers)
    assert [p.tolist() for p in given[::layers]] == [draw_positions(4, 12, generator).tolist() for _ in range(2)]
    given.clear()
    trainer.evaluate()
    assert given and all(p.expand(1, -1).tolist() == [list(range(12))] for p in given)
    undo()
