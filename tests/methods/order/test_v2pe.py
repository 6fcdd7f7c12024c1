import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqwise.core.errors import PromptError, UnsupportedModel, UsageError
from seqwise.core.segments import IMAGE, PAD, TEXT, Segments, image_runs
from seqwise.methods.order.v2pe import (
    STRIDES,
    V2PE,
    draw_deltas,
    largest_delta,
    next_position,
    positions,
)
from seqwise.testing.families import FAMILIES


def visual(text):
    """A prompt as text, `v` for a visual token -> bool (1, L)."""
    return torch.tensor([[c == "v" for c in text]])


def reference(flags, deltas):
    """Token by token in exact fractions; a text token goes to the next whole number + 1."""
    p, out, run = None, [], -1
    for j, v in enumerate(flags):
        if v:
            run += j == 0 or not flags[j - 1]
        if p is None:
            p = Fraction(0)
        elif v:
            p += deltas[run]
        else:
            p = Fraction(math.ceil(p)) + 1
        out.append(float(p))
    return out


def interleaved():
    """784 tokens: text, an image of one tile, text, an image of two tiles, text."""
    return [False] * 6 + [True] * 256 + [False] * 5 + [True] * 512 + [False] * 5


@pytest.mark.parametrize("stride", STRIDES)
def test_interleaved_images_equal_the_recursion(stride):
    flags = interleaved()
    p = positions(torch.tensor([flags]), stride / 256)
    assert p.dtype == torch.float32
    assert p[0].tolist() == reference(flags, [Fraction(stride, 256)] * 2)


def test_tag_tiles_and_closing_tag_by_hand():
    p = positions(visual("..vvvv.."), 0.25)[0]
    assert p.tolist() == [0, 1, 1.25, 1.5, 1.75, 2.0, 3, 4]
    # a run that ends between whole numbers: text goes to ceil + 1
    assert positions(visual(".vvv.."), 0.5)[0].tolist() == [0, 0.5, 1.0, 1.5, 3, 4]


def test_stride_256_is_ordinary_positions():
    flags = torch.rand(3, 201, generator=torch.Generator().manual_seed(0)) < 0.6
    torch.testing.assert_close(positions(flags, 1.0), torch.arange(201.0).expand(3, -1), rtol=0, atol=0)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.data())
def test_random_prompts_with_a_delta_per_image_equal_the_recursion(flags, data):
    runs = sum(v and (j == 0 or not flags[j - 1]) for j, v in enumerate(flags))
    strides = data.draw(st.lists(st.sampled_from(STRIDES), min_size=runs, max_size=runs))
    deltas = torch.tensor([[s / 256 for s in strides]]) if runs else 0.5
    p = positions(torch.tensor([flags]), deltas)[0]
    assert p.tolist() == reference(flags, [Fraction(s, 256) for s in strides])
    assert p[~torch.tensor(flags)].frac().eq(0).all()


def test_left_padding_gives_what_each_prompt_gives_alone():
    prompts, L = [".vv.", "vvv..v.", ".....", "..vvvv.vv."], 11
    batch = torch.zeros(len(prompts), L, dtype=torch.bool)
    mask = torch.zeros(len(prompts), L, dtype=torch.long)
    for b, text in enumerate(prompts):
        batch[b, L - len(text) :] = visual(text)[0]
        mask[b, L - len(text) :] = 1
    batch[0, 0] = True  # whatever stands at padding must not matter
    delta = torch.tensor([0.25, 0.5, 1.0, 0.125])
    p = positions(batch, delta, mask)
    following = next_position(p, mask)
    for b, text in enumerate(prompts):
        alone = positions(visual(text), float(delta[b]))
        assert p[b, L - len(text) :].tolist() == alone[0].tolist(), text
        assert (p[b, : L - len(text)] == 1).all()
        assert following[b] == next_position(alone)[0]
    right = positions(visual(".vv.v"), 0.5, torch.tensor([[1, 1, 1, 1, 0]]))
    assert right[0].tolist() == [0, 0.5, 1.0, 2.0, 1.0]


def test_generated_tokens_continue_from_the_last_real_token():
    assert next_position(positions(visual(".vv."), 0.5)).tolist() == [3.0]
    assert next_position(positions(visual(".v"), 0.5)).tolist() == [2.0]
    p, mask = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[0, 0, 1]])
    assert next_position(p, mask).tolist() == [1.0]


def test_adjacent_images_are_separate_runs_where_ids_say_so():
    flags, image = visual(".vvvvv."), torch.tensor([[0, 1, 1, 1, 2, 2, 0]])
    assert image_runs(flags).tolist() == [[-1, 0, 0, 0, 0, 0, -1]]
    assert image_runs(flags, image).tolist() == [[-1, 0, 0, 0, 1, 1, -1]]
    p = positions(flags, torch.tensor([[0.5, 0.25]]), image=image)[0]
    assert p.tolist() == [0, 0.5, 1.0, 1.5, 2.25, 2.5, 4]


def test_rounding_errors_never_add_a_step():
    flags = torch.tensor([[False] + [True] * 100 + [False]])
    for hundredths in range(1, 101):
        assert positions(flags, hundredths / 100)[0, -1] == hundredths + 1, hundredths


def test_quarter_positions_survive_far_out():
    p = positions(torch.tensor([[False] * 1001 + [True]]), 0.25)
    assert p[0, -1] == 1000.25  # half precision would give 1000 or 1000.5


@pytest.mark.parametrize("delta", [0.0, -0.5, 1.5, math.nan, torch.tensor([0.5, 2.0])])
def test_refuses_a_delta_out_of_range(delta):
    with pytest.raises(ValueError, match=r"delta must be in \(0, 1\], got"):
        positions(visual(".v").expand(2, -1), delta)


def test_refuses_too_few_deltas():
    with pytest.raises(ValueError, match=r"delta must have shape .*, \(1, >= 2\), got \(1, 1\)"):
        positions(visual("v.v"), torch.tensor([[0.5]]))


def test_largest_delta_that_fits_per_sample():
    texts = ["." + "v" * 64 + ".", "." * 66]
    flags = torch.cat([visual(text) for text in texts])
    # 64 visual tokens of step d and the tag: last position ceil(64 d) + 1
    for window in (3, 18, 34, 66):
        with_text_only = flags[:1]
        d = float(largest_delta(with_text_only, window)[0])
        assert positions(with_text_only, d).max() < window
        assert d == 1.0 or positions(with_text_only, 2 * d).max() >= window
    assert largest_delta(flags, 66).tolist() == [1.0, 1.0]
    assert largest_delta(flags[:1], 34).tolist() == [0.5]
    assert largest_delta(flags[:1], 34, new_tokens=1).tolist() == [0.25]
    padded = torch.cat([torch.ones(1, 9, dtype=torch.bool), flags[:1]], dim=1)
    mask = torch.cat([torch.zeros(1, 9), torch.ones(1, 66)], dim=1)
    assert largest_delta(padded, 34, mask).tolist() == [0.5]


def test_says_which_sample_does_not_fit():
    flags = torch.cat([visual(".v." + "." * 20), visual("." * 23)])
    with pytest.raises(UsageError, match=r"window must be > 22 for sample 0 even at delta = 1/256, got 20"):
        largest_delta(flags, 20)


def test_draws_each_stride_equally_often_and_repeats_with_the_seed():
    drawn = draw_deltas((300, 30), torch.Generator().manual_seed(0))
    counts = Counter((drawn * 256).flatten().tolist())
    assert set(counts) == set(STRIDES)
    assert all(abs(count - 1000) < 150 for count in counts.values())  # about five standard deviations
    assert drawn.equal(draw_deltas((300, 30), torch.Generator().manual_seed(0)))
    assert drawn[0].unique().numel() > 1  # images of one sample differ


# the method on a model


def segments_of(flags, mask=None, image=None):
    """Segments of bool (B, L) flags; image ids count the runs where none are given."""
    unknown = torch.full(flags.shape, -1)
    kind = torch.where(flags, IMAGE, TEXT)
    if mask is not None:
        kind = kind.masked_fill(mask == 0, PAD)
    return Segments(kind, image_runs(flags) if image is None else image, *[unknown] * 5)


OPTIONS = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}


def attached(model, method, segments, batch):
    with method.on(model) as run:
        run.bind(segments)
        return model.generate(**batch, **OPTIONS)


FLAGS = visual("..vvvv.vv..vvv...")


@pytest.mark.parametrize("family", ["llama", "qwen3", "neox"])
def test_equals_the_model_called_with_these_positions_step_by_step(family):
    model, batch = FAMILIES[family].tiny(), FAMILIES[family].prompt(17)
    found = attached(model, V2PE(delta=0.25), segments_of(FLAGS), batch)
    ids, p = batch["input_ids"], positions(FLAGS, 0.25)
    for step in range(5):
        with torch.no_grad():
            logits = model(ids, attention_mask=torch.ones_like(ids), position_ids=p, use_cache=False).logits[:, -1]
        torch.testing.assert_close(found.scores[step], logits, **FAMILIES[family].tolerance)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        p = torch.cat([p, next_position(p)[:, None]], 1)
    assert found.sequences.equal(ids)


def test_delta_1_changes_nothing_and_a_small_one_does():
    model, batch = FAMILIES["llama"].tiny(), FAMILIES["llama"].prompt(17)
    plain = model.generate(**batch, **OPTIONS)
    same = attached(model, V2PE().identity(), segments_of(FLAGS), batch)
    torch.testing.assert_close(same.scores, plain.scores, **FAMILIES["llama"].tolerance)
    other = attached(model, V2PE(delta=1 / 256), segments_of(FLAGS), batch)
    assert (other.scores[0] - plain.scores[0]).abs().max() > 0.01
    text_only = attached(model, V2PE(delta=1 / 256), segments_of(visual("." * 17)), batch)
    torch.testing.assert_close(text_only.scores, plain.scores, **FAMILIES["llama"].tolerance)


def test_without_a_mask_and_without_a_cache_nothing_is_read_as_packed_sequences():
    model, batch = FAMILIES["llama"].tiny(), FAMILIES["llama"].prompt(17)
    with torch.no_grad():
        expected = model(**batch, position_ids=positions(FLAGS, 0.25), use_cache=False).logits
        packed = model(batch["input_ids"], position_ids=positions(FLAGS, 0.25), use_cache=False).logits
        with V2PE(delta=0.25).on(model) as run:
            run.bind(segments_of(FLAGS))
            found = model(batch["input_ids"], use_cache=False).logits
    assert (packed - expected).abs().max() > 0.01, "a model that minds nothing would prove nothing"
    torch.testing.assert_close(found, expected, **FAMILIES["llama"].tolerance)


@pytest.mark.parametrize("delta", [0.25, None])
def test_padded_prompts_of_several_images_equal_each_alone(delta):
    family = FAMILIES["llava"]
    model = family.tiny()
    prompts = [family.prompt(9, seed=1), family.prompt(25, seed=2, images=3), family.prompt(20, seed=3, images=2)]
    model.config.text_config.max_position_embeddings = 40  # the longest prompt does not fit at delta = 1
    with V2PE(delta=delta).on(model):
        together = model.generate(**family.pad_left(prompts), **OPTIONS)
        for b, batch in enumerate(prompts):
            alone = model.generate(**batch, **OPTIONS)
            assert together.sequences[b, -5:].equal(alone.sequences[0, -5:])
            for ours, theirs in zip(together.scores, alone.scores, strict=True):
                torch.testing.assert_close(ours[b], theirs[0], **family.tolerance)


def test_half_precision_models_get_float32_positions():
    model, batch = FAMILIES["llama"].tiny().bfloat16(), FAMILIES["llama"].prompt(17)
    given = []
    model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["position_ids"]), with_kwargs=True
    )
    attached(model, V2PE(delta=0.25), segments_of(FLAGS), batch)
    assert {p.dtype for p in given} == {torch.float32}
    assert given[0].tolist() == positions(FLAGS, 0.25).tolist()
    last = positions(FLAGS, 0.25)[0, -1].item()
    assert [p.tolist() for p in given[1:]] == [[[last + step]] for step in (1, 2, 3, 4)]


def test_no_delta_takes_the_largest_that_fits_the_models_window():
    family = FAMILIES["llama"]
    model, batch = family.tiny(), family.prompt(17)
    model.config.max_position_embeddings = 12
    fitting = largest_delta(FLAGS, 12)
    assert 0 < float(fitting) < 1
    found = attached(model, V2PE(delta=None), segments_of(FLAGS), batch)
    wanted = attached(model, V2PE(delta=float(fitting)), segments_of(FLAGS), batch)
    assert all(a.equal(b) for a, b in zip(found.scores, wanted.scores, strict=True))
    model.config.max_position_embeddings = 5
    with pytest.raises(UsageError, match=r"window must be > \d+ for sample 0 even at delta = 1/256, got 5"):
        attached(model, V2PE(delta=None), segments_of(FLAGS), batch)


def test_refuses_other_positions_and_other_lengths():
    for family in ("gpt2", "qwen25_vl"):
        with pytest.raises(UnsupportedModel, match="V2PE"):
            V2PE().on(FAMILIES[family].tiny())
    with pytest.raises(PromptError, match="segments must cover the prompt's 12 tokens, got 17"):
        attached(FAMILIES["llama"].tiny(), V2PE(), segments_of(FLAGS), FAMILIES["llama"].prompt(12))
    for delta in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"V2PE.delta must be in \(0, 1\], got {delta}"):
            V2PE(delta=delta)
