import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, Gemma2Config, LlavaConfig, LlavaForConditionalGeneration

from seqwise.core.attribution import Attribution
from seqwise.core.errors import PromptError, UnsupportedModel, UsageError
from seqwise.insight.explain.token_activation_map import (
    TokenActivationMap,
    activations,
    as_uint8,
    estimated_causal_inference,
    f1_iou,
    function_iou,
    interference,
    joint_normalise,
    object_iou,
    otsu,
    rank_gaussian_filter,
    subtract,
)
from seqwise.lab.zoo import scenes
from seqwise.testing import FAMILIES

VISION = [name for name, family in FAMILIES.items() if family.vision]
IMAGE = 97  # the families' placeholder


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_eci(maps, t, texts):
    """One token after the other, as the definition reads."""
    out = []
    for n in range(len(maps)):
        J = [j for j in range(n) if texts[j] != texts[n]]
        total = sum(float(t[n, j]) for j in J) + 1e-8
        I = torch.zeros_like(maps[n])  # noqa: E741
        for j in J:
            I += float(t[n, j]) / total * maps[j]  # noqa: E741
        square = float(I @ I)
        s = float(maps[n] @ I) / square if square else 0.0
        out.append((maps[n] - s * I).relu())
    return torch.stack(out)


def naive_filter(x, k):
    h, w = x.shape
    r = k // 2

    def at(i, size):  # reflection without repeating the edge, or the edge where there is no room
        if size > r:
            i = abs(i)
            return i if i < size else 2 * (size - 1) - i
        return min(max(i, 0), size - 1)

    if min(h, w) <= r:
        grid = [[float(x[min(max(i, 0), h - 1), min(max(j, 0), w - 1)]) for j in range(-r, w + r)]
                for i in range(-r, h + r)]  # fmt: skip
    else:
        grid = [[float(x[at(i, h), at(j, w)]) for j in range(-r, w + r)] for i in range(-r, h + r)]
    out = torch.zeros(h, w, dtype=x.dtype)
    for i in range(h):
        for j in range(w):
            z = sorted(grid[i + a][j + b] for a in range(k) for b in range(k))
            mu = sum(z) / len(z)
            if mu <= 0:
                continue
            sigma = math.sqrt(sum((v - mu) ** 2 for v in z) / len(z)) / mu
            if sigma < 1e-6:
                out[i, j] = z[len(z) // 2]
                continue
            g = [math.exp(-((a - k * k // 2) ** 2) / (2 * sigma**2)) for a in range(k * k)]
            out[i, j] = sum(a * b for a, b in zip(g, z, strict=True)) / sum(g)
    return out


# formulas


def test_activations_are_the_heads_logits():
    head = torch.nn.Linear(6, 9)
    H = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    c = torch.tensor([3, 3, 8])
    torch.testing.assert_close(activations(H, head.weight[c], head.bias[c]), head(H)[:, c])
    assert activations(H.bfloat16(), head.weight[c].bfloat16()).dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 12), st.integers(0, 999))
def test_eci_equals_the_definition(K, N, seed):
    maps, t = rand(K, N, seed=seed), (rand(K, K, seed=seed + 1) - 0.3).relu()
    texts = [str(i) for i in torch.randint(0, 3, (K,), generator=torch.Generator().manual_seed(seed)).tolist()]
    torch.testing.assert_close(estimated_causal_inference(maps, t, texts), naive_eci(maps, t, texts))


def test_the_scale_is_the_least_squares_one():
    M, I = rand(20, seed=1), rand(20, seed=2)  # noqa: E741
    scales = torch.linspace(-2, 3, 200_001, dtype=torch.float64)
    best = scales[((M - scales[:, None] * I) ** 2).sum(-1).argmin()]
    torch.testing.assert_close(subtract(M, I), (M - best * I).relu(), atol=1e-4, rtol=0)


def test_what_is_a_multiple_vanishes_and_what_is_orthogonal_stays():
    I = torch.tensor([[1.0, 2.0, 0.0, 0.0]])  # noqa: E741
    assert subtract(3 * I, I).abs().max() < 1e-6
    M = torch.tensor([[0.0, 0.0, 2.0, 5.0]])
    assert subtract(M, I).equal(M) and subtract(M, torch.zeros(1, 4)).equal(M)


def test_a_common_factor_of_the_maps_before_changes_nothing():
    maps, t, texts = rand(5, 30), rand(5, 5, seed=1), list("abcde")
    once = estimated_causal_inference(maps, t, texts)[-1]
    scaled = torch.cat([7 * maps[:-1], maps[-1:]])
    torch.testing.assert_close(estimated_causal_inference(scaled, t, texts)[-1], once)


def test_a_repeated_word_is_no_interference_of_itself():
    maps, t = rand(3, 8), rand(3, 3, seed=1)
    assert estimated_causal_inference(maps[:2], t[:2, :2], ["cat", "cat"]).equal(maps[:2]), "and nothing crashes"
    found = estimated_causal_inference(maps, t, ["cat", "dog", "cat"])
    torch.testing.assert_close(found[2], subtract(maps[2], maps[1]))
    same = torch.eye(3, dtype=torch.bool)
    w = t[2, :2] / (t[2, :2].sum() + 1e-8)
    torch.testing.assert_close(interference(maps, t, same)[2], w[0] * maps[0] + w[1] * maps[1])
    assert interference(maps, torch.zeros(3, 3).double(), same).abs().max() == 0


def test_normalisation_is_joint():
    maps, t = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([[9.0, 5.0], [2.0, 7.0]])
    shown = torch.tensor([[False, True], [True, False]])
    image, text = joint_normalise(maps, t, shown)
    torch.testing.assert_close(image, torch.tensor([[0.0, 0.5], [0.0, 0.0]]))
    assert text[0, 0].isnan() and text[0, 1] == 1 and text[1, 0] == 0 and text[1, 1].isnan()
    alone, _ = joint_normalise(maps, t, torch.zeros_like(shown))
    assert alone[0].tolist() == [0.0, 1.0], "without text the image alone"


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3, 5]), st.integers(0, 999), st.floats(0, 0.9))
def test_filter_equals_plain_loops_and_stays_inside_its_window(h, w, k, seed, sparse):
    x = (rand(h, w, seed=seed) - sparse).relu()
    found = rank_gaussian_filter(x, k)
    torch.testing.assert_close(found, naive_filter(x, k))
    assert (found <= x.max() + 1e-12).all() and (found >= x.min() - 1e-12).all()
    both = rank_gaussian_filter(torch.stack([x, 2 * x]), k)
    torch.testing.assert_close(both[1], 2 * found)


def test_filter_of_a_constant_is_the_constant_and_of_nothing_nothing():
    for value in (0.0, 0.3, 1.0):
        x = torch.full((4, 5), value)
        torch.testing.assert_close(rank_gaussian_filter(x), x)
    assert rank_gaussian_filter(rand(3, 4), 1).equal(rand(3, 4))


def test_salt_is_attenuated_more_than_by_the_mean():
    x = torch.full((5, 5), 0.5)
    x[2, 2] = 0.8
    assert 0.5 <= rank_gaussian_filter(x)[2, 2] < x[1:4, 1:4].mean()


def test_uint8_is_floored():
    assert as_uint8(torch.tensor([0.0, 0.999, 1.0, 0.5])).tolist() == [0, 254, 255, 127]


def test_otsu_is_the_best_split():
    for seed in range(5):
        x = as_uint8(rand(6, 7, seed=seed) ** 3)
        values, best = x.double().flatten(), []
        for t in range(256):
            low, high = values[values <= t], values[values > t]
            gap = float(low.mean() - high.mean()) if len(low) and len(high) else 0.0
            best.append(len(low) * len(high) * gap**2)
        assert best[int(otsu(x))] == pytest.approx(max(best))
    assert otsu(torch.stack([x, x])).shape == (2,)


def test_metrics():
    x = torch.tensor([[10, 10, 200], [10, 220, 210]], dtype=torch.uint8)
    mask = torch.tensor([[False, True, True], [False, False, True]])
    assert object_iou(x, mask).item() == pytest.approx(2 / 4)
    assert object_iou(torch.zeros_like(x), mask).item() == 0, "an even map finds nothing"
    assert object_iou(x, x > 100).item() == 1
    assert function_iou(x, 200.0).item() == pytest.approx(3 / 6)
    assert f1_iou(torch.tensor([0.5, 0.0]), torch.tensor([1.0, 0.0])).tolist() == pytest.approx([2 / 3, 0.0])


@pytest.mark.parametrize("seed", range(3))
def test_eci_uncovers_an_object_beneath_earlier_ones(seed):
    objects = torch.block_diag(*torch.ones(4, 1, 6))  # disjoint
    t = 0.3 + 0.6 * rand(4, 4, seed=seed).float()
    maps = objects.clone()
    for n in range(1, 4):
        maps[n] += t[n, :n] @ maps[:n]
    found = estimated_causal_inference(maps, t, list("abcd"))[-1]
    assert found[18:].min() > found[:18].max(), "the last object is the brightest"
    assert maps[-1, :18].max() > 0.4


# the explainer


def reference(model, batch, answer, kernel=3, prompt=False, official=False, skip=()):
    """Per target (image map before it is cut to cells, text scores by position), from the whole model's own logits."""
    ids, n = batch["input_ids"][0].tolist() + answer, batch["input_ids"].shape[1]
    longer = {**batch, "input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if "mm_token_type_ids" in batch:
        longer["mm_token_type_ids"] = (longer["input_ids"] == IMAGE).long()
    with torch.no_grad():
        logits = model(**longer).logits[0].double()
    visual = [i for i in range(n) if ids[i] == IMAGE]
    text = [i for i in range(visual[0], n) if ids[i] != IMAGE and i not in skip]
    P = len(text)
    text += range(n, len(ids))
    row = [i if i < n else i - 1 for i in text]
    c = [ids[i] for i in text]
    if official:
        c[P] = ids[n - 1]
    raw = torch.stack([logits[visual, v].relu() for v in c])
    t = torch.stack([logits[row, v].relu() for v in c])
    maps = naive_eci(raw, t, [str(ids[i]) for i in text])
    told = []
    for k in range(0 if prompt else P, len(text)):
        beside = t[k, :P] if k < P else t[k, :k]
        joined = torch.cat([maps[k], beside])
        joined = (joined - joined.min()) / (joined.max() - joined.min()).clamp(min=1e-300)
        told.append((dict(zip(visual, joined[: len(visual)], strict=True)),
                     dict(zip(text, joined[len(visual) :], strict=False))))  # fmt: skip
    return told


def check(attribution, told, kernel=3):
    positions = attribution.details["positions"]
    at = {p: i for i, p in enumerate(positions)}
    for k, (image, text) in enumerate(told):
        row = attribution.scores[k]
        grids = [span for span in attribution.spans if span.grid]
        for span in grids:
            x = torch.stack([image[positions[i]] for i in range(span.start, span.stop)]).view(span.grid)
            expected = naive_filter(x, kernel).flatten().float()
            torch.testing.assert_close(row[span.start : span.stop], expected, atol=2e-4, rtol=0)
        scored = {at[p] for p in text} | {i for span in grids for i in range(span.start, span.stop)}
        for p, value in text.items():
            assert row[at[p]].item() == pytest.approx(value.item(), abs=2e-4)
        assert {i for i in range(len(row)) if not row[i].isnan()} == scored


EXPECTED = {  # grids of two images; those of the other families are all alike and square
    "llava_next": [(4, 4), (4, 8), (4, 4), (8, 6)],
    "llava_onevision": [(4, 4), (4, 8), (4, 4), (8, 6)],
    "qwen2_vl": [(2, 2), (3, 2)],
    "qwen25_vl": [(2, 2), (3, 2)],
}


@pytest.mark.parametrize("name", VISION)
def test_each_family_with_several_images(name):
    family = FAMILIES[name]
    model, batch = family.tiny(), family.prompt(12, images=2)
    answer = [5, 30, 5, 41]
    found = TokenActivationMap().explain(model, batch, answer)
    side = math.isqrt(int((batch["input_ids"] == IMAGE).sum()) // 2)
    assert [span.grid for span in found.spans] == EXPECTED.get(name, [(side, side)] * 2) and side > 1
    assert found.target_ids == tuple(answer) and found.scores.shape[0] == 4
    positions, ids = found.details["positions"], batch["input_ids"][0].tolist() + answer
    assert list(found.input_ids) == [ids[p] for p in positions]
    dropped = set(range(len(ids) - 1)) - set(positions)
    assert all(ids[p] == IMAGE for p in dropped) and bool(dropped) == name.startswith("llava_")
    n = batch["input_ids"].shape[1] - len(dropped)
    assert list(found.seen) == [n, n + 1, n + 2, n + 3]
    check(found, reference(model, batch, answer))
    assert found.scores.nan_to_num(0).min() >= 0 and found.scores.nan_to_num(0).max() <= 1 + 1e-6


@pytest.mark.parametrize("name", ["llava", "qwen25_vl"])
def test_the_model_stays_as_it_was(name):
    family = FAMILIES[name]
    model, batch = family.tiny(), family.prompt(9)
    model(**batch)  # transformers adds hooks of its own at the first forward
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    model.train()
    implementation = model.config.text_config._attn_implementation
    assert implementation == "sdpa"
    before = set(vars(model)) | set(vars(model.model))
    TokenActivationMap(max_new_tokens=2).explain(model, batch)
    assert model.training and model.config.text_config._attn_implementation == implementation
    assert set(vars(model)) | set(vars(model.model)) == before
    assert hooks == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    model.eval()
    plain = model(**batch).logits
    TokenActivationMap(max_new_tokens=2).explain(model, batch)
    assert model(**batch).logits.equal(plain)


def test_explains_its_own_greedy_answer_until_it_ends():
    family = FAMILIES["llava"]
    model, batch = family.tiny(), family.prompt(9)
    said = model.generate(**batch, do_sample=False, max_new_tokens=4)[0, batch["input_ids"].shape[1] :].tolist()
    found = TokenActivationMap(max_new_tokens=4).explain(model, batch)
    assert list(found.target_ids) == said
    check(found, reference(model, batch, said))
    model.generation_config.eos_token_id = [said[2], 99]
    cut = TokenActivationMap(max_new_tokens=4).explain(model, batch)
    assert list(cut.target_ids) == said[: said.index(said[2])] or said.index(said[2]) == 0
    model.generation_config.eos_token_id = said[0]
    assert list(TokenActivationMap(max_new_tokens=4).explain(model, batch).target_ids) == said[:1]


def test_predicting_rows_hold_generates_own_logits():
    family = FAMILIES["llava"]
    model, batch = family.tiny(), family.prompt(9)
    out = model.generate(
        **batch, do_sample=False, max_new_tokens=3, output_logits=True, return_dict_in_generate=True, use_cache=True
    )
    n = batch["input_ids"].shape[1]
    with torch.no_grad():
        H = model.model(input_ids=out.sequences, pixel_values=batch["pixel_values"]).last_hidden_state[0]
    F = activations(H[n - 1 : -1], model.lm_head.weight)
    torch.testing.assert_close(F, torch.cat(out.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_left_padding_changes_nothing(name):
    family = FAMILIES[name]
    model, batch = family.tiny(), family.prompt(9)
    padded = dict(batch)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in batch:
            padded[key] = torch.nn.functional.pad(batch[key], (5, 0))
    frozen = torch.zeros_like(batch["input_ids"][0])
    frozen[-2] = 1
    one = TokenActivationMap().explain(model, batch, [4, 8], frozen=frozen)
    two = TokenActivationMap().explain(model, padded, [4, 8], frozen=torch.nn.functional.pad(frozen, (5, 0), value=1))
    assert one.scores.nan_to_num(-1).equal(two.scores.nan_to_num(-1)) and one.inputs == two.inputs
    assert one.spans == two.spans and one.details == two.details


def test_frozen_tokens_and_text_before_the_image_are_not_scored_and_explain_nothing():
    family = FAMILIES["llava"]
    model, batch = family.tiny(), family.prompt(12)
    n = batch["input_ids"].shape[1]
    frozen = torch.zeros(1, n, dtype=torch.bool)
    frozen[0, [n - 1, n - 4]] = True
    found = TokenActivationMap().explain(model, batch, [7, 8], frozen=frozen)
    check(found, reference(model, batch, [7, 8], skip=(n - 1, n - 4)))
    assert found.scores[:, :7].isnan().all(), "text before the image"


def test_prompt_tokens_meet_the_whole_prompt_but_only_earlier_maps():
    family = FAMILIES["llava"]
    model, batch = family.tiny(), family.prompt(12)
    found = TokenActivationMap(prompt_tokens=True).explain(model, batch, [7, 8])
    told = reference(model, batch, [7, 8], prompt=True)
    assert len(found.targets) == len(told) == 9
    check(found, told)
    assert list(found.seen) == [batch["input_ids"].shape[1]] * 8 + [batch["input_ids"].shape[1] + 1]
    short = TokenActivationMap().explain(model, batch, [7, 8])
    assert short.scores.nan_to_num(-1).equal(found.scores[-2:].nan_to_num(-1))


def test_the_official_first_token_is_the_last_input_token():
    family = FAMILIES["llava"]
    model, batch = family.tiny(), family.prompt(12)
    found = TokenActivationMap(official_first_token=True).explain(model, batch, [7, 8])
    check(found, reference(model, batch, [7, 8], official=True))
    ours = TokenActivationMap().explain(model, batch, [7, 8])
    assert not ours.scores[0].nan_to_num(0).equal(found.scores[0].nan_to_num(0))


def test_the_kernel_is_the_filters():
    family = FAMILIES["llava"]
    model, batch = family.tiny(), family.prompt(12)
    for kernel in (1, 5):
        found = TokenActivationMap(kernel=kernel).explain(model, batch, [7])
        check(found, reference(model, batch, [7]), kernel)


def test_bfloat16():
    family = FAMILIES["llava"]
    model, batch = family.tiny().bfloat16(), family.prompt(12)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    found = TokenActivationMap().explain(model, batch, [7, 8])
    assert found.scores.dtype == torch.float32 and found.scores.nan_to_num(0).max() <= 1


def test_a_map_of_negative_logits_is_empty_and_told():
    family = FAMILIES["llava"]
    model, batch = family.tiny(), family.prompt(12)
    visual = batch["input_ids"][0] == IMAGE
    with torch.no_grad():
        H = model.model(**batch).last_hidden_state[0, visual]  # (16, 32)
    model.lm_head.weight.data[9] = torch.linalg.lstsq(H, -torch.ones(16, 1)).solution[:, 0]
    found = TokenActivationMap().explain(model, batch, [8, 9])
    assert found.details["empty"] == [1]
    assert found.scores[1, 7:23].abs().max() == 0 and found.scores[0, 7:23].max() > 0, "not shifted"


class Capped(LlavaForConditionalGeneration):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        cap = self.config.text_config.final_logit_softcapping
        out.logits = cap * torch.tanh(out.logits / cap)
        return out


class Shifted(LlavaForConditionalGeneration):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + 3.0
        return out


def gemma(make):
    llava = FAMILIES["llava"].tiny().config
    text = Gemma2Config(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=64, final_logit_softcapping=2.0,
        initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    tower = CLIPVisionConfig(**llava.vision_config.to_dict())
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=IMAGE, vision_feature_layer=-2)
    return make(config).eval()


@pytest.mark.parametrize("make", [Capped, LlavaForConditionalGeneration])
def test_logits_are_capped_as_the_model_caps_them(make):
    model, batch = gemma(make), FAMILIES["llava"].prompt(12)
    check(TokenActivationMap().explain(model, batch, [7, 8]), reference(model, batch, [7, 8]))


def test_an_unknown_transform_of_the_logits_is_refused():
    with pytest.raises(UnsupportedModel, match="Shifted: its logits are not hidden states times the output head"):
        TokenActivationMap().explain(gemma(Shifted), FAMILIES["llava"].prompt(12), [7, 8])


def test_real_words_special_tokens_and_the_report():
    model, processor = scenes.load()
    example = scenes.scenes(1, 3, types=("colour",))[0]
    inputs = processor(images=example.images(), text=example.prompt, return_tensors="pt")
    found = TokenActivationMap(max_new_tokens=2).explain(model, inputs, tokenizer=processor.tokenizer)
    assert found.targets[0].strip() == example.answer and len(found.targets) == 1, "<eos> is no word of the answer"
    (image,) = [span for span in found.spans if span.grid]
    assert image.grid == (8, 8) and image.name == "image 0"
    assert set(found.inputs[image.start : image.stop]) == {""}
    words = example.question.split()
    assert [text.strip() for text in found.inputs[image.stop :]] == words
    assert found.scores[0, image.stop :].isfinite().all() and found.scores[0, : image.start].isnan().all()
    assert [span.start for span in found.spans if span.name == "special"] == [0], "<bos>"
    again = Attribution.from_dict(found.to_dict())
    assert again.spans == found.spans and "class=grid" in found.to_html()
    assert found.to_words().spans[0].grid == (8, 8)


def test_bad_input_is_named():
    family = FAMILIES["llava"]
    model, batch = family.tiny(), family.prompt(12)
    explain = TokenActivationMap().explain
    with pytest.raises(UnsupportedModel, match="vision tower"):
        explain(FAMILIES["llama"].tiny(), FAMILIES["llama"].prompt(9), [3])
    with pytest.raises(PromptError, match="without any"):
        explain(model, family.prompt(9, images=0), [3])
    with pytest.raises(PromptError, match=r"one prompt, input_ids \(1, n\), got \(2, "):
        explain(model, family.pad_left([batch, batch]), [3])
    with pytest.raises(PromptError, match="frozen must have one entry per input id, 30, got 3"):
        explain(model, batch, [3], frozen=torch.zeros(3))
    with pytest.raises(PromptError, match="not padding"):
        explain(model, {**batch, "attention_mask": torch.zeros_like(batch["input_ids"])}, [3])
    for target in ([], [101], [-1]):
        with pytest.raises(UsageError, match=r"target must be ids in \[0, 101\)"):
            explain(model, batch, target)
    for field, value in (("kernel", 2), ("kernel", 0), ("max_new_tokens", 0)):
        with pytest.raises(ValueError, match=rf"TokenActivationMap.{field} must be .*got {value}"):
            TokenActivationMap(**{field: value})
