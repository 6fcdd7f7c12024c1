import copy
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seqwise.methods.attend.imbalanced_attention as module
from seqwise.core.errors import PromptError, SlotConflict, UnsupportedModel
from seqwise.core.method import Method
from seqwise.methods.attend.imbalanced_attention import (
    PAINT,
    boost,
    cls_score,
    guided,
    local_set,
    summary_set,
    token_sets,
)
from seqwise.methods.reduce.flowcut import FlowCut
from seqwise.methods.reduce.fopru import FoPru
from seqwise.testing.families import FAMILIES

LLAVA = FAMILIES["llava"]
IMAGE, N = 97, 16  # the placeholder, and the patches of an image
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scores(n, seed=0, outliers=()):
    s = torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.5
    s[list(outliers)] += 9.0
    return s


# the formulas


@pytest.mark.parametrize("specials", [1, 2, 0])
def test_cls_score_sums_heads_and_leaves_out_what_is_no_patch(specials):
    A = draw(2, 3, 9, 9).softmax(-1)
    s = cls_score(A[..., 0, :], specials)
    assert s.shape == (2, 9 - specials)
    for b in range(2):
        for j in range(9 - specials):
            torch.testing.assert_close(s[b, j], sum(A[b, h, 0, specials + j] for h in range(3)))


def test_cls_score_of_half_precision_is_summed_in_fp32():
    row = torch.full((300, 5), 0.1).bfloat16()
    assert cls_score(row).dtype == torch.float32
    torch.testing.assert_close(cls_score(row), row[:, 1:].double().sum(0).float())


@pytest.mark.parametrize(
    ("n", "ratio"), [(576, 0.25), (36, 0.25), (37, 0.25), (63, 0.1), (63, 0.3), (10, 1.0), (7, 0.1)]
)
def test_local_set_is_the_top_floor_of_the_ratio(n, ratio):
    s = scores(n, seed=n)
    chosen = local_set(s, ratio)
    best = sorted(range(n), key=lambda j: -float(s[j]))[: math.floor(ratio * n)]
    assert chosen.nonzero().flatten().tolist() == sorted(best)


def test_local_set_gives_ties_to_the_earlier_patch():
    s = torch.tensor([[1.0, 2.0, 2.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    assert local_set(s, 0.5).tolist() == [[False, True, True, False], [True, True, False, False]]


@pytest.mark.parametrize("n", [576, 36, 37, 63])
@pytest.mark.parametrize("outliers", [(), (3,), (0, 5, 9), range(8)])
def test_summary_set_is_the_top_share_of_numpys_outliers(n, outliers):
    s = scores(n, seed=n, outliers=outliers)
    values = s.numpy()
    low, high = np.percentile(values, 25), np.percentile(values, 75)
    rho = np.mean(values > high + 1.5 * (high - low))
    S = summary_set(s)
    assert S.float().mean().item() == pytest.approx(rho)
    top = np.argsort(-values)[: round(rho * n)]
    assert S.nonzero().flatten().tolist() == sorted(top.tolist())
    assert S.nonzero().flatten().tolist() == sorted(outliers), "as planted"


def test_summary_set_is_found_in_each_image_alone_and_strictly_above():
    s = torch.stack([scores(24, 1, [2]), scores(24, 2), scores(24, 3, [7, 8])]).reshape(3, 1, 24)
    assert [row.nonzero().flatten().tolist() for row in summary_set(s)[:, 0]] == [[2], [], [7, 8]]
    # Q1 = 1, Q3 = 2: the fence is 3.5
    fence = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.5])
    assert not summary_set(fence).any()
    fence[-1] = 3.51
    assert summary_set(fence).nonzero().flatten().tolist() == [7]
    assert not summary_set(torch.full((9,), 0.5)).any()


def test_local_tokens_that_are_summary_tokens_go_and_nobody_takes_their_place():
    s_loc, s_sum = scores(40, 5, outliers=[1, 2, 3]), scores(40, 6, outliers=[2, 30])
    T, S = token_sets(s_loc, s_sum, 0.25)
    assert S.nonzero().flatten().tolist() == [2, 30]
    before = local_set(s_loc, 0.25)
    assert before[2] and T.equal(before & ~S)
    assert T.sum() == 10 - int(before[2]) - int(before[30]) and not (T & S).any()


@pytest.mark.parametrize("n", [1, 9, 33])
def test_boost_equals_a_plain_loop(n):
    z = draw(2, 3, n, seed=n)
    T, S = draw(2, 1, n, seed=n + 1) > 0.5, draw(2, 1, n, seed=n + 2) > 0.9
    S = S & ~T
    out = boost(z, T, S, alpha=0.6, beta=0.2)
    for b in range(2):
        for h in range(3):
            for j in range(n):
                gain = 0.6 if T[b, 0, j] else 0.2 if S[b, 0, j] else 0.0
                torch.testing.assert_close(out[b, h, j], z[b, h, j] + gain * abs(z[b, h, j]))


def test_boost_raises_negative_scores_and_leaves_zero_and_what_is_not_seen():
    z = torch.tensor([-2.0, 0.0, 2.0, -torch.inf, -torch.inf, 1.0])
    T = torch.tensor([True, True, True, True, False, False])
    out = boost(z, T, torch.zeros(6, dtype=torch.bool), alpha=0.5)
    assert out.tolist() == [-1.0, 0.0, 3.0, -math.inf, -math.inf, 1.0]
    out = boost(z, torch.zeros(6, dtype=torch.bool), T, beta=0.25)
    assert out.tolist() == [-1.5, 0.0, 2.5, -math.inf, -math.inf, 1.0]
    assert not boost(z, T, ~T).isnan().any()


def test_boost_depends_on_the_level_of_the_scores():
    z, T = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([True, False, False])
    none = torch.zeros(3, dtype=torch.bool)
    torch.testing.assert_close(z.softmax(-1), (z + 4).softmax(-1))
    gap = boost(z, T, none).softmax(-1) - boost(z + 4, T, none).softmax(-1)
    assert gap.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_boost_keeps_the_dtype(dtype):
    z, T = draw(4).to(dtype), torch.tensor([True, False, True, False])
    out = boost(z, T, ~T)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), boost(z.float(), T, ~T), rtol=1e-2, atol=1e-2)


@settings(max_examples=80, deadline=None)
@given(
    z=st.lists(st.integers(-40, 40), min_size=3, max_size=17),
    size=st.integers(1, 16),
    alpha=st.floats(0.1, 0.9),
)
def test_the_mass_on_the_boosted_set_rises_unless_its_scores_are_zero(z, size, alpha):
    z = torch.tensor(z, dtype=torch.float64) / 10
    T = torch.arange(len(z)) < min(size, len(z) - 1)
    none = torch.zeros_like(T)
    before, after = z.softmax(-1)[T].sum(), boost(z, T, none, alpha).softmax(-1)[T].sum()
    if (z[T] != 0).any():
        assert after > before
    else:
        assert after == before
    assert boost(z, none, T, beta=alpha).equal(boost(z, T, none, alpha))
    assert boost(z, T, none, alpha=0.0).equal(z)


@pytest.mark.parametrize("gamma", [1.1, 2.0, 0.5])
def test_guided_equals_a_plain_loop(gamma):
    conditional, unconditional = 1.5 * draw(2, 11, seed=1), 1.5 * draw(2, 11, seed=2)
    out = guided(conditional, unconditional, gamma)
    dropped = 0
    for b in range(2):
        lc = [float(x) - math.log(sum(map(math.exp, conditional[b].tolist()))) for x in conditional[b]]
        lu = [float(x) - math.log(sum(map(math.exp, unconditional[b].tolist()))) for x in unconditional[b]]
        for v in range(11):
            if lc[v] < max(lc) + math.log(0.1):
                assert out[b, v] == -math.inf
                dropped += 1
            else:
                assert out[b, v].item() == pytest.approx(gamma * (lc[v] - lu[v]) + lu[v], abs=1e-5)
    assert 0 < dropped < 22


def test_guidance_of_one_is_off():
    conditional, unconditional = 5 * draw(11, seed=1), draw(11, seed=2)
    assert guided(conditional, unconditional, 1.0).equal(conditional.log_softmax(-1))
    assert guided(conditional, unconditional, 1).isfinite().all(), "no cut-off either"


# the method on a model


class Dense:
    """Eager attention of a Llama whose last row is boosted on given labels: the plain reference of the attached method.

    labels: (B, prompt columns), 0 none, 1 local, 2 summary.
    """

    def __init__(self, labels, alpha=0.7, beta=0.3, start=2, end=4):
        self.labels, self.gain, self.layers = labels, {1: alpha, 2: beta}, range(start, end)
        self.rows = 0

    def __call__(self, module_, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        g = query.shape[1] // key.shape[1]
        k, v = key.repeat_interleave(g, 1), value.repeat_interleave(g, 1)
        z = (query @ k.mT * scaling + attention_mask[:, :, :, : k.shape[2]]).float()  # (B, H, q, n)
        if module_.layer_idx in self.layers:
            for b in range(z.shape[0]):
                for j in self.labels[b].nonzero().flatten().tolist():
                    z[b, :, -1, j] += self.gain[int(self.labels[b, j])] * z[b, :, -1, j].abs()
            self.rows += 1
        return (z.softmax(-1).to(v.dtype) @ v).transpose(1, 2).contiguous(), None


@torch.no_grad()
def sets(model, pixels, ratio):
    """(images, N) labels from the whole attention maps of the tower."""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    maps = tower(pixels, output_attentions=True).attentions
    assert len(maps) == 6 and maps[0].shape[-2:] == (1 + N, 1 + N)
    T, S = token_sets(maps[0][:, :, 0, 1:].sum(1), maps[-2][:, :, 0, 1:].sum(1), ratio)
    return T.long() + 2 * S.long()


def labels(model, batch, ratio=0.25):
    """(B, columns): each image's own sets at its own tokens."""
    out = torch.zeros_like(batch["input_ids"])
    left = sets(model, batch["pixel_values"], ratio).flatten().tolist()
    for b, row in enumerate(batch["input_ids"].tolist()):
        for column, token in enumerate(row):
            if token == IMAGE:
                out[b, column] = left.pop(0)
    assert not left
    return out


@pytest.fixture(scope="module")
def sharp():
    """A LLaVA whose tower has outliers among the 16 patches of most images; the tiny one has none."""
    model = LLAVA.tiny()
    for layer in model.model.vision_tower.modules():
        if type(layer).__name__ == "CLIPAttention":
            layer.q_proj.weight.data *= 12
    return model


@contextmanager
def dense(model, batch, method, copies=1):
    """Inside, the model is eager and boosted on the labels of the batch (each sample `copies` times), given back."""
    import transformers.models.llama.modeling_llama as llama

    own = llama.eager_attention_forward
    label = labels(model, batch, method.ratio).repeat_interleave(copies, 0)
    eager = Dense(label, method.alpha, method.beta, method.start, method.end or 4)
    try:
        llama.eager_attention_forward = eager
        model.set_attn_implementation("eager")
        yield label
    finally:
        llama.eager_attention_forward = own
        model.set_attn_implementation("sdpa")
    assert eager.rows


def assert_same(found, expected):
    assert found.sequences.equal(expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, **LLAVA.tolerance)


def batched(images=(2, 1, 3)):
    return LLAVA.pad_left([LLAVA.prompt(12 + 5 * i, seed=i, images=n) for i, n in enumerate(images)])


@pytest.mark.parametrize(
    "method",
    [PAINT(), PAINT(alpha=0.4, beta=0.9, ratio=0.5, start=0, end=3), PAINT.pai()],
    ids=["default", "own", "pai"],
)
@pytest.mark.parametrize("images", [(1,), (2, 1, 3)])
def test_prompt_and_steps_equal_boosted_eager_attention(sharp, method, images):
    batch = batched(images)
    plain = sharp.generate(**batch, **OPTIONS)
    with dense(sharp, batch, method) as label:
        expected = sharp.generate(**batch, **OPTIONS)
    assert (label == 2).any() and (label == 1).any(), "both sets must act, or this compares too little"
    with method.on(sharp) as run:
        found = sharp.generate(**batch, **OPTIONS)
    assert run.acted and (found.scores[0] - plain.scores[0]).abs().max() > 0.01
    assert_same(found, expected)


def test_pai_boosts_every_image_token_alike(sharp):
    batch = batched()
    assert sets(sharp, batch["pixel_values"], 1.0).min() > 0
    assert PAINT.pai() == PAINT(alpha=0.5, beta=0.5, ratio=1.0) and PAINT.pai(0.7).beta == 0.7
    assert Method.parse(str(PAINT.pai())) == PAINT.pai()


@torch.no_grad()
def test_only_the_last_row_of_a_prompt_changes(sharp):
    batch = batched()
    plain = sharp(**batch).logits
    with PAINT().on(sharp):
        found = sharp(**batch).logits
    real = batch["attention_mask"].bool()
    real[:, -1] = False
    torch.testing.assert_close(found[real], plain[real], **LLAVA.tolerance)
    assert ((found - plain)[:, -1].abs().amax(-1) > 0.01).all()


def test_each_image_of_a_batch_has_its_own_sets(sharp):
    batch = batched()
    assert len({tuple(row) for row in sets(sharp, batch["pixel_values"], 0.25).tolist()}) > 1
    with PAINT().on(sharp):
        together = sharp.generate(**batch, **OPTIONS)
        for b, images in enumerate((2, 1, 3)):
            alone = sharp.generate(**LLAVA.prompt(12 + 5 * b, seed=b, images=images), **OPTIONS)
            for ours, theirs in zip(together.scores, alone.scores, strict=True):
                torch.testing.assert_close(ours[b], theirs[0], **LLAVA.tolerance)


def test_images_without_a_word_between_them(sharp):
    two = LLAVA.prompt(12, images=2)
    words = two["input_ids"][two["input_ids"] != IMAGE]
    ids = torch.cat([words[:4], torch.full((2 * N,), IMAGE), words[4:]])[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": two["pixel_values"]}
    with dense(sharp, batch, PAINT()):
        expected = sharp.generate(**batch, **OPTIONS)
    with PAINT().on(sharp):
        assert_same(sharp.generate(**batch, **OPTIONS), expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_keep_the_sets_of_their_prompt(sharp, options):
    batch, method = batched((2, 1)), PAINT(alpha=2.0, beta=1.0)
    plain = sharp.generate(**batch, **OPTIONS, **options)
    with dense(sharp, batch, method, options["num_beams"]):
        expected = sharp.generate(**batch, **OPTIONS, **options)
    with method.on(sharp):
        found = sharp.generate(**batch, **OPTIONS, **options)
    assert found.sequences.equal(expected.sequences) and not found.sequences.equal(plain.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, **LLAVA.tolerance)


def test_steps_without_a_cache_are_boosted_too(sharp):
    batch = LLAVA.prompt(12, images=2)
    with dense(sharp, batch, PAINT()):
        expected = sharp.generate(**batch, **OPTIONS, use_cache=False)
    with PAINT().on(sharp):
        assert_same(sharp.generate(**batch, **OPTIONS, use_cache=False), expected)


@torch.no_grad()
def test_a_prompt_in_pieces_is_boosted_at_its_end_only(sharp):
    batch = LLAVA.prompt(12)
    ids, n = batch["input_ids"], batch["input_ids"].shape[1]
    with PAINT(alpha=2.0).on(sharp) as run:
        whole = sharp(**batch, logits_to_keep=1).logits
        with run.expect(ids, n):
            cache = sharp(input_ids=ids[:, : n - 3], pixel_values=batch["pixel_values"], use_cache=True).cache
            last = sharp(input_ids=ids[:, n - 3 :], cache=cache, use_cache=True, logits_to_keep=1).logits
        torch.testing.assert_close(last, whole, **LLAVA.tolerance)
        cache = sharp(input_ids=ids[:, : n - 3], pixel_values=batch["pixel_values"], use_cache=True).cache
        other = sharp(input_ids=ids[:, n - 3 :], cache=cache, use_cache=True, logits_to_keep=1).logits
    assert (other - whole).abs().max() > 1e-3, "two forwards that nobody announced are two prompts"


@torch.no_grad()
@pytest.mark.parametrize("begins", [False, True], ids=["goes on", "new prompt"])
def test_a_second_turn_is_boosted_on_the_image_of_the_first(sharp, begins):
    first, question = LLAVA.prompt(12), LLAVA.prompt(6, seed=9, images=0)["input_ids"]
    with dense(sharp, first, PAINT()):
        cache = sharp(**first, use_cache=True).cache
        expected = sharp(input_ids=question, cache=cache, logits_to_keep=1).logits
    plain = sharp(input_ids=question, cache=sharp(**first, use_cache=True).cache, logits_to_keep=1).logits
    with PAINT().on(sharp) as run:
        sharp(**first, use_cache=True)
        if begins:
            run.begin_prompt()
        else:
            run.end_prompt()
        found = sharp(input_ids=question, cache=run.cache, logits_to_keep=1).logits
    torch.testing.assert_close(found, expected, **LLAVA.tolerance)
    assert (found - plain).abs().max() > 0.01


def test_text_alone_is_the_plain_model(sharp):
    text, image = LLAVA.prompt(20, images=0), LLAVA.prompt(12)
    plain = sharp.generate(**text, **OPTIONS)
    with PAINT().on(sharp):
        sharp.generate(**image, **OPTIONS)
        found = sharp.generate(**text, **OPTIONS)
    assert_same(found, plain)


def test_identity_changes_nothing(sharp):
    batch = batched()
    plain = sharp.generate(**batch, **OPTIONS)
    with PAINT().identity().on(sharp):
        found = sharp.generate(**batch, **OPTIONS)
    assert_same(found, plain)


@torch.no_grad()
def test_what_a_reducer_dropped_is_boosted_nowhere(monkeypatch, sharp):
    batch, seen = LLAVA.prompt(12), []

    def spy(z, T, S, alpha, beta):
        seen.append((T[0, 0, 0].sum().item(), S[0, 0, 0].sum().item(), z.shape[-1]))
        return boost(z, T, S, alpha, beta)

    monkeypatch.setattr(module, "boost", spy)
    with (PAINT(ratio=0.5) | FoPru(budget=0.5)).on(sharp) as run:
        sharp(**batch)
    kept = run.kept()[0]["input"]
    label = labels(sharp, batch, 0.5)[0]
    left = label[kept]
    assert seen == [(int((left == 1).sum()), int((left == 2).sum()), len(kept))] * 2
    assert 0 < int((left == 1).sum()) < int((label == 1).sum())


def test_refuses_a_tower_that_another_method_shortens(sharp):
    with pytest.raises(SlotConflict, match=r"PAINT\(\) reads the whole vision tower, which FlowCut"):
        (PAINT() | FlowCut(budget=8)).on(sharp).__enter__()


def test_refuses_images_whose_tower_it_has_not_seen(sharp):
    batch = LLAVA.prompt(12)
    with torch.no_grad():
        features = sharp.model.get_image_features(batch.pop("pixel_values"))
    with PAINT().on(sharp), pytest.raises(PromptError, match=r"has not seen these images; pass pixel_values"):
        sharp(**batch, mm_encoder_outputs={"image": features})


def test_refuses_features_that_are_no_patches():
    model = LLAVA.tiny()
    model.config.vision_feature_select_strategy = "full"  # CLS among the features
    with pytest.raises(UnsupportedModel, match=r"its visual tokens are not patches"):
        PAINT().on(model).__enter__()


def test_refuses_models_that_lack_a_part():
    with pytest.raises(UnsupportedModel, match=r"PAINT\(\) needs a CLS token|PAINT\(\) needs a vision tower"):
        PAINT().on(FAMILIES["llama"].tiny())
    with pytest.raises(UnsupportedModel, match=r"PAINT\(\) needs a CLS token"):
        PAINT().on(FAMILIES["llava_onevision"].tiny())
    with pytest.raises(UnsupportedModel, match=r"packs an image's tiles with newline tokens; use a model"):
        PAINT().on(FAMILIES["llava_next"].tiny())


def test_refuses_layers_that_do_not_exist(sharp):
    with pytest.raises(ValueError, match=r"PAINT\.start must be < 4, the decoder layers of .*, got 4"):
        PAINT(start=4).on(sharp)
    with pytest.raises(ValueError, match=r"PAINT\.end must be <= 4, the decoder layers of .*, got 32"):
        PAINT(end=32).on(sharp)
    with pytest.raises(ValueError, match=r"PAINT\.end must be > start = 2, got 2"):
        PAINT(end=2)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [("alpha", -0.1, ">= 0"), ("beta", -1.0, ">= 0"), ("ratio", 1.5, "in [0, 1]"), ("start", -1, ">= 0")],
)
def test_refuses_values_outside_their_range(field, value, allowed):
    with pytest.raises(ValueError) as error:
        PAINT(**{field: value})
    assert f"PAINT.{field} must be {allowed}, got {value!r}" in str(error.value)


def test_acts_in_the_layers_it_names(sharp):
    anatomy = PAINT().on(sharp).anatomy
    acting = {
        str(method): [layer for layer in range(4) if method.rewritten_heads(layer, anatomy) == (0, 1, 2, 3)]
        for method in (PAINT(), PAINT(start=1, end=3))
    }
    assert acting == {"PAINT()": [2, 3], "PAINT(start=1, end=3)": [1, 2]}
    assert PAINT().watched_tower(anatomy) == (0, 4), "of six tower layers"
