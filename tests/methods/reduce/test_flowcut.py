import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import UnsupportedModel
from seqwise.core.method import Method
from seqwise.methods.reduce.flowcut import (
    FlowCut,
    accumulate,
    attention_term,
    decoder_score,
    drop_count,
    entropy_ratio,
    layer_score,
    semantic_term,
    value_norm,
)
from seqwise.testing.families import FAMILIES

IMAGE = 97  # the placeholder token of the families

B, h, n, D = 2, 3, 7, 5  # n patches beside one CLS row


def qkv(seed: int = 0, heads: int = h, rows: int = n + 1) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(3, B, heads, rows, D, generator=torch.Generator().manual_seed(seed)))


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in values)
    return [math.exp(x) / total for x in values]


def dot(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(sum(p * q for p, q in zip(x.tolist(), y.tolist(), strict=True)))


def test_terms_of_a_tower_layer_with_cls():
    q, k, v = qkv()
    for b in range(B):
        a, g = torch.zeros(n + 1), torch.zeros(n + 1)
        for head in range(h):
            a += torch.tensor(softmax([dot(q[b, head, 0], k[b, head, j]) / math.sqrt(D) for j in range(n + 1)])) / h
            g += torch.tensor(softmax([dot(v[b, head, 0], v[b, head, j]) for j in range(n + 1)])) / h
        e = [sum(abs(sum(v[b, head, j, c] for head in range(h)) / h) for c in range(D)) for j in range(1, n + 1)]
        torch.testing.assert_close(attention_term(q, k)[b], a[1:])
        torch.testing.assert_close(semantic_term(v)[b], g[1:])
        torch.testing.assert_close(value_norm(v[..., 1:, :])[b], torch.tensor(e))
        assert a[1:].sum() < 1  # the CLS column took part in the softmax


def test_without_cls_the_mean_query_attends_every_token():
    q, k, _ = qkv(1)
    A = (q.mean(-2, keepdim=True) @ k.mT / math.sqrt(D)).softmax(-1)
    a = attention_term(q, k, cls=False)
    torch.testing.assert_close(a, A[..., 0, :].mean(1))
    torch.testing.assert_close(a.sum(-1), torch.ones(B))


def test_terms_take_half_precision_and_answer_in_float32():
    q, k, v = (x.bfloat16() for x in qkv(2))
    exact_q, exact_k, exact_v = q.float(), k.float(), v.float()
    for got, wanted in (
        (attention_term(q, k), attention_term(exact_q, exact_k)),
        (semantic_term(v), semantic_term(exact_v)),
        (value_norm(v), value_norm(exact_v)),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted)


def test_layer_score_weighs_both_shares_by_the_norm():
    a, g, e = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([[2.0, 2.0], [1.0, 4.0]]), torch.tensor([3.0, 5.0])
    torch.testing.assert_close(layer_score(a, g, e), torch.tensor([[3 * 0.75, 5 * 1.25], [3 * 0.7, 5 * 1.3]]))
    torch.testing.assert_close(layer_score(a, None, e), torch.tensor([[0.75, 3.75], [1.5, 2.5]]))


def test_running_score_halves_the_past_at_every_layer():
    S = [torch.tensor([8.0, 0.0]), torch.tensor([0.0, 4.0]), torch.tensor([2.0, 2.0])]
    C = None
    for layer in S:
        C = accumulate(C, layer)
    torch.testing.assert_close(C, torch.tensor([0.25 * 8 + 0.5 * 2, 0.25 * 4 + 0.5 * 2]))


def test_entropy_ratio_ends_and_a_value_by_hand():
    a = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.3, 0.0, 0.0, 0.0], [0.2, 0.1, 0.1, 0.0]])
    wanted = [1.0, 0.0, (0.5 * math.log(2) + 2 * 0.25 * math.log(4)) / math.log(4)]
    rho = entropy_ratio(a)
    assert not rho.isnan().any()  # 0 ln 0 counts as 0
    torch.testing.assert_close(rho, torch.tensor(wanted), atol=1e-6, rtol=0)


def test_entropy_ratio_with_the_small_addition_inside_the_logarithm():
    a = torch.tensor([0.5, 0.3, 0.2])
    wanted = -sum(p * math.log(p + 0.25) for p in a.tolist()) / math.log(3)
    torch.testing.assert_close(entropy_ratio(a, eps=0.25).item(), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rem, wanted", [(4, 0), (2, 0), (0, 5), (3, 0)])
def test_uniform_attention_drops_nothing_before_the_last_cut(rem, wanted):
    assert drop_count(torch.full((2, 8), 0.1), T=3, rem=rem).tolist() == [wanted] * 2


@pytest.mark.parametrize("rem, wanted", [(20, 99), (18, 104), (4, 221), (2, 313), (0, 442), (1, 0), (19, 0)])
def test_one_hot_attention_drops_the_whole_share(rem, wanted):
    a = torch.zeros(1, 570).index_fill(1, torch.tensor([5]), 0.4)
    assert drop_count(a, T=128, rem=rem).tolist() == [wanted]  # round(442 / sqrt(rem))


@pytest.mark.parametrize("n, wanted", [(6, 2), (8, 4), (10, 4), (12, 6), (7, 3)])
def test_halves_round_to_the_even_count(n, wanted):
    one_hot = torch.zeros(n).index_fill(0, torch.tensor([0]), 1.0)
    assert drop_count(one_hot, T=1, rem=4).item() == wanted  # 2.5, 3.5, 4.5, 5.5, 3


def test_each_image_drops_its_own_count():
    sharp, flat = torch.tensor([0.9, 0.0, 0.0, 0.0, 0.0, 0.0]), torch.full((6,), 0.15)
    assert drop_count(torch.stack([sharp, flat]), T=2, rem=4).tolist() == [2, 0]
    assert drop_count(flat[None], T=2, rem=4).tolist() == [0]


def test_counts_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"T must be >= 1, got 0"):
        drop_count(torch.ones(3), T=0, rem=0)
    with pytest.raises(ValueError, match=r"rem must be >= 0, got -1"):
        drop_count(torch.ones(3), T=1, rem=-1)


@settings(max_examples=50, deadline=None)
@given(
    patches=st.integers(1, 40),
    T=st.integers(1, 40),
    s=st.integers(1, 23),
    sharpness=st.floats(0, 30),
    seed=st.integers(0, 999),
)
def test_a_whole_schedule_ends_at_the_target_and_never_below(patches, T, s, sharpness, seed):
    generator = torch.Generator().manual_seed(seed)
    left = patches
    for i in range(s):
        a = (sharpness * torch.randn(left, generator=generator)).softmax(-1)
        drop = int(drop_count(a, T, rem=s - i - 1))
        assert drop == 0 or (s - i) % 2 == 1
        left -= drop
        assert left >= min(T, patches)
    assert left == min(T, patches)


def test_decoder_score_with_grouped_heads():
    H, Hkv = 6, 3
    generator = torch.Generator().manual_seed(4)
    q_last = torch.randn(B, H, D, generator=generator)
    k, v = torch.randn(2, B, Hkv, n, D, generator=generator)
    v_last = torch.randn(B, Hkv, D, generator=generator)
    got = decoder_score(q_last, k, v_last, v)
    for b in range(B):
        rel, sem, mean = torch.zeros(n), torch.zeros(n), torch.zeros(n, D)
        for head in range(H):
            kv = head // (H // Hkv)
            rel += torch.tensor(softmax([dot(q_last[b, head], k[b, kv, j]) / math.sqrt(D) for j in range(n)])) / H
            sem += torch.tensor(softmax([dot(v_last[b, kv], v[b, kv, j]) / math.sqrt(D) for j in range(n)])) / H
            mean += v[b, kv] / H
        torch.testing.assert_close(got[b], (rel + sem) * mean.abs().sum(-1))


# the class, on tiny random models


def logits(model, batch, method: Method | None = None):
    """Logits of one forward, and the run."""
    with torch.no_grad():
        if method is None:
            return model(**batch).logits, None
        with method.on(model) as run:
            return model(**batch).logits, run


def recorded(modules: dict[str, nn.Module], call) -> dict[str, torch.Tensor]:
    """Output of each module during the call; of a decoder or tower layer's input, prefix its name with '>'."""
    seen: dict[str, torch.Tensor] = {}

    def before(name):
        return lambda module, args, kwargs: seen.update({name: args[0] if args else kwargs["hidden_states"]})

    hooks = [
        module.register_forward_pre_hook(before(name), with_kwargs=True)
        if name.startswith(">")
        else module.register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: out}))
        for name, module in modules.items()
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def projections(attention: nn.Module, call, head: int) -> list[torch.Tensor]:
    """q, k, v (1, h, n, D) that the module's projections gave during the call."""
    parts = {name: getattr(attention, f"{name}_proj") for name in "qkv"}
    seen = recorded(parts, call)
    return [seen[name].unflatten(-1, (-1, head)).transpose(1, 2) for name in "qkv"]


def ran(layer: nn.Module, x: torch.Tensor, out: list[torch.Tensor]) -> None:
    out.append(layer(x, None))


def tower_by_hand(model, tile: torch.Tensor, T: int) -> tuple[list[int], torch.Tensor]:
    """The tower's layers one after another on one tile (1, 3, h, w): patches that are left, hidden rows at the end."""
    vision = Anatomy.of(model).vision
    cls, s = vision.specials, vision.feature_layer
    with torch.no_grad():
        x = recorded({">in": vision.layers[0]}, lambda: vision.tower(tile))[">in"]
        left, C = list(range(x.shape[1] - cls)), None
        for i in range(s + 1):
            out: list[torch.Tensor] = []
            run = partial(ran, vision.layers[i], x, out)
            q, k, v = projections(vision.attentions[i], run, vision.attentions[i].head_dim)
            x = out[0]
            a = attention_term(q, k, cls=bool(cls))
            C = accumulate(C, layer_score(a, semantic_term(v) if cls else None, value_norm(v)[:, cls:]))
            if i == s or len(left) <= T:
                continue
            drop = int(drop_count(a, T, s - i - 1, 0.0 if cls else 1e-7))
            best = sorted(C[0].argsort(descending=True, stable=True)[: len(left) - drop].tolist())
            left, C = [left[j] for j in best], C[:, best]
            x = x[:, [*range(cls), *(cls + j for j in best)]]
    return left, x


@pytest.fixture(scope="module")
def llava():
    return FAMILIES["llava"].tiny()


@pytest.fixture(scope="module")
def tiled():
    return FAMILIES["llava_next"].tiny()


@pytest.mark.parametrize("T", [1, 3, 7, 12])
def test_the_tower_drops_what_it_drops_by_hand(llava, T):
    batch = FAMILIES["llava"].pad_left([FAMILIES["llava"].prompt(9, seed=i) for i in range(3)])
    with torch.no_grad(), FlowCut(budget=T).on(llava) as run:
        rows = recorded({">in": llava.model.language_model.layers[0]}, lambda: llava(**batch))[">in"]
    kept = [stages["input"] for stages in run.kept()]
    for i in range(3):
        left, x = tower_by_hand(llava, batch["pixel_values"][i : i + 1], T)
        assert run.tower_kept[i] == left and len(left) == T
        start = int((batch["input_ids"][i] == IMAGE).nonzero()[0])
        at = [position for position in kept[i] if start <= position < start + 16]
        assert [position - start for position in at] == left
        with torch.no_grad():
            features = llava.model.multi_modal_projector(x[:, 1:])[0]  # the CLS row still in front
        columns = [kept[i].index(position) for position in at]
        torch.testing.assert_close(rows[i, columns], features, atol=1e-5, rtol=1e-4)


def test_a_tower_without_cls_is_cut_by_its_mean_query(llava):
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**tower, image_size=16, patch_size=4),
        text_config=llava.config.text_config,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlavaForConditionalGeneration(config).eval()
    prompt = FAMILIES["llava"].prompt(9, images=2)
    for T in (4, 11):
        _, run = logits(model, prompt, FlowCut(budget=T))
        for i, kept in enumerate(run.tower_kept):
            assert kept == tower_by_hand(model, prompt["pixel_values"][i : i + 1], T)[0] and len(kept) == T


@pytest.mark.parametrize("budget", [1.0, 16])
def test_a_target_that_all_patches_meet_changes_nothing(llava, budget):
    prompt = FAMILIES["llava"].prompt(11, images=2)
    ours, run = logits(llava, prompt, FlowCut(budget=budget))
    torch.testing.assert_close(ours, logits(llava, prompt)[0], atol=2e-5, rtol=1e-4)
    assert not run.acted and run.tower_kept == [list(range(16))] * 2


def test_features_of_an_uncut_tower_are_bit_equal(llava):
    prompt = FAMILIES["llava"].prompt(5)
    plain = recorded({"f": llava.model.multi_modal_projector}, lambda: logits(llava, prompt))["f"]
    ours = recorded({"f": llava.model.multi_modal_projector}, lambda: logits(llava, prompt, FlowCut(budget=16)))["f"]
    assert ours.equal(plain)


def test_a_share_refers_to_the_patches_of_an_image(llava):
    prompt = FAMILIES["llava"].prompt(11, images=3)
    _, run = logits(llava, prompt, FlowCut(budget=0.4))
    assert [len(kept) for kept in run.tower_kept] == [6, 6, 6]  # floor(0.4 * 16)
    _, run = logits(llava, prompt, FlowCut(budget=0.01))
    assert [len(kept) for kept in run.tower_kept] == [1, 1, 1]
    assert int((torch.tensor(run.rows) >= 0).sum()) == prompt["input_ids"].shape[1] - 3 * 15


@pytest.mark.parametrize("name, budget", [("llava", 5), ("llava_next", 9), ("llava_next", 0.3)])
def test_a_left_padded_batch_gives_what_each_prompt_gives_alone(name, budget):
    family = FAMILIES[name]
    model, prompts = family.tiny(), [family.prompt(17, seed=1), family.prompt(6, seed=2, images=2)]
    together, run = logits(model, family.pad_left(prompts), FlowCut(budget=budget))
    for i, prompt in enumerate(prompts):
        alone, single = logits(model, prompt, FlowCut(budget=budget))
        assert single.kept()[0] == run.kept()[i]
        torch.testing.assert_close(together[i, -1], alone[0, -1], **family.tolerance)


def test_a_prompt_without_image_is_left_alone(llava):
    prompt = FAMILIES["llava"].prompt(12, images=0)
    ours, run = logits(llava, prompt, FlowCut(budget=3))
    torch.testing.assert_close(ours, logits(llava, prompt)[0], atol=2e-5, rtol=1e-4)
    assert not run.acted


def test_several_feature_layers_and_cls_features_are_refused():
    for name, value in (("vision_feature_layer", [-2, -1]), ("vision_feature_select_strategy", "full")):
        model = FAMILIES["llava"].tiny()
        setattr(model.config, name, value)
        with (
            pytest.raises(UnsupportedModel, match="several feature layers, CLS among the features"),
            FlowCut().on(model),
        ):
            pass


def test_a_text_model_is_refused():
    with pytest.raises(UnsupportedModel, match="vision tower"):
        FlowCut().on(FAMILIES["llama"].tiny())


@pytest.mark.parametrize("budget", [0, -3, 0.0, 1.2, True])
def test_bad_budgets_are_refused(budget):
    with pytest.raises(ValueError, match=r"FlowCut\.budget must be a whole number of tokens >= 1 or a share in"):
        FlowCut(budget=budget)


# the second cut, in the decoder of models that cut images into tiles


def decoder_by_hand(model, entered: torch.Tensor, image: torch.Tensor, prompt_rows: int, T: list[int]):
    """Decoder on rows (1, r, d), cut behind layer index 1 among the first `prompt_rows`: kept rows, logits.

    image: (r,), which image a row belongs to, -1 for text. T: rows that stay of each image.
    """
    decoder = model.model.language_model

    def run(x, layers, positions):
        mask = torch.full((x.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        rope = decoder.rotary_emb(x, positions[None])
        for layer in layers:
            x = layer(x, attention_mask=mask, position_embeddings=rope, position_ids=positions[None])
        return x, rope

    with torch.no_grad():
        everything = torch.arange(entered.shape[1])
        x, rope = run(entered, decoder.layers[:1], everything)
        out: list[torch.Tensor] = []
        attention = decoder.layers[1].self_attn
        q, k, v = projections(attention, lambda: out.append(run(x, decoder.layers[1:2], everything)[0]), 8)
        q, k = apply_rotary_pos_emb(q, k, *rope)
        keep = image < 0
        last = prompt_rows - 1
        for i, count in enumerate(T):
            at = (image == i).nonzero()[:, 0]
            S = decoder_score(q[:, :, last], k[:, :, at], v[:, :, last], v[:, :, at])[0]
            keep[at[S.argsort(descending=True, stable=True)[:count]]] = True
        rows = keep.nonzero()[:, 0]
        x, _ = run(out[0][:, rows], decoder.layers[2:], torch.arange(len(rows)))
        return rows, model.lm_head(decoder.norm(x))


@pytest.mark.parametrize("budget", [9, 1, 0.3])
@pytest.mark.parametrize("images", [1, 2])
def test_tiles_are_cut_to_half_in_the_tower_and_the_image_to_the_target_behind_layer_1(tiled, budget, images):
    family = FAMILIES["llava_next"]
    prompt = family.prompt(15, seed=3, images=images)
    tiles = [3, 5][:images]  # the overview and two or four more
    T = [budget if isinstance(budget, int) else int(budget * 16 * n) for n in tiles]
    with torch.no_grad(), FlowCut(budget=budget).on(tiled) as run:
        ours: list[torch.Tensor] = []
        first = tiled.model.language_model.layers[0]
        entered = recorded({">in": first}, lambda: ours.append(step(tiled, prompt)))[">in"]
    halves = [max(1, t // 2) for t, n in zip(T, tiles, strict=True) for _ in range(n)]
    assert [len(kept) for kept in run.tower_kept] == [min(16, half) for half in halves]

    stages, ids = run.kept()[0], prompt["input_ids"][0]
    assert entered.shape[1] == len(stages["input"])
    image = image_of(ids)[stages["input"]]
    rows, wanted = decoder_by_hand(tiled, entered, image, len(image), T)
    assert stages["layer 2"] == [stages["input"][row] for row in rows.tolist()]
    at = image[rows]
    for i, count in enumerate(T):
        assert int((at == i).sum()) == min(count, int((image == i).sum()))
    torch.testing.assert_close(ours[0], wanted[:, -1], atol=5e-5, rtol=1e-4)


def step(model, batch) -> torch.Tensor:
    """Logits (B, V) of the first new token, by `generate`."""
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**batch, **options).logits[0]


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_a_plain_forward_halves_the_target_of_a_tile_too(name):
    family = FAMILIES[name]
    _, run = logits(family.tiny(), family.prompt(9), FlowCut(budget=9))
    assert [len(kept) for kept in run.tower_kept] == [4, 4, 4]


def test_layers_before_the_decoder_cut_keep_the_whole_cache_and_new_tokens_follow_each_layers_own_rows(tiled):
    family = FAMILIES["llava_next"]
    prompt = family.prompt(15, seed=3)
    with torch.no_grad(), FlowCut(budget=7).on(tiled) as run:
        first: list[torch.Tensor] = []
        start = lambda _m, args, kwargs: first.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
        hook = tiled.model.language_model.layers[0].register_forward_pre_hook(start, with_kwargs=True)
        try:
            out = tiled.generate(
                **prompt, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        finally:
            hook.remove()
    assert out.sequences[:, : prompt["input_ids"].shape[1]].equal(prompt["input_ids"])
    stages = run.kept()[0]
    text = prompt["input_ids"].shape[1] - int((prompt["input_ids"] == IMAGE).sum())
    assert len(stages["input"]) > len(stages["layer 2"]) == 7 + text
    assert [len(run.kept(layer)[0][0]) for layer in range(4)] == [len(stages["input"]) + 4] * 2 + [7 + text + 4] * 2

    image = image_of(prompt["input_ids"][0])[stages["input"]]
    every = torch.cat([image, torch.full((4,), -1)])
    _, wanted = decoder_by_hand(tiled, torch.cat(first, 1), every, len(image), [7])  # the 4 new tokens as more rows
    torch.testing.assert_close(torch.stack(out.logits, 1), wanted[:, -5:], atol=5e-5, rtol=1e-4)


def test_the_whole_budget_cuts_no_newline_row(tiled):
    prompt = FAMILIES["llava_next"].prompt(9)
    ours, run = logits(tiled, prompt, FlowCut(budget=1.0))
    torch.testing.assert_close(ours, logits(tiled, prompt)[0], atol=5e-5, rtol=1e-4)
    assert not run.acted


def image_of(ids: torch.Tensor) -> torch.Tensor:
    """Per token which image it belongs to, -1 for text: every run of placeholders is one image."""
    visual = ids == IMAGE
    starts = visual & ~torch.cat([torch.tensor([False]), visual[:-1]])
    return torch.where(visual, starts.cumsum(0) - 1, -1)
