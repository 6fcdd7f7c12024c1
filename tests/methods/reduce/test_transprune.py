import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from seqwise.core.errors import UnsupportedModel
from seqwise.core.method import Method
from seqwise.lab.zoo import staged
from seqwise.methods.reduce.transprune import (
    TransPrune,
    accumulate,
    instruction_attention,
    keep_count,
    stage_score,
    transition,
)
from seqwise.testing.families import FAMILIES


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_transition(x: list[list[float]], y: list[list[float]]) -> list[float]:
    norm = [(math.hypot(*p), math.hypot(*q)) for p, q in zip(x, y, strict=True)]
    dots = [sum(a * b for a, b in zip(p, q, strict=True)) for p, q in zip(x, y, strict=True)]
    e = [math.exp(1 - s / (p * q)) for s, (p, q) in zip(dots, norm, strict=True)]
    return [q / p * e_j / sum(e) for e_j, (p, q) in zip(e, norm, strict=True)]


def test_transition_equals_the_plain_formula():
    x, y = random(2, 7, 5), random(2, 7, 5, seed=1)
    wanted = torch.tensor([plain_transition(x[b].tolist(), y[b].tolist()) for b in range(2)])
    torch.testing.assert_close(transition(x, y), wanted)


def test_an_unchanged_token_weighs_its_share_and_a_turned_one_e_squared_more():
    x = random(9, 4)
    torch.testing.assert_close(transition(x, x), torch.full((9,), 1 / 9))
    y = torch.cat([-x[:1], x[1:]])
    total = math.exp(2) + 8
    torch.testing.assert_close(transition(x, y), torch.tensor([math.exp(2) / total] + [1 / total] * 8))


def test_scaling_the_output_scales_the_weights():
    x, y = random(2, 7, 5), random(2, 7, 5, seed=1)
    torch.testing.assert_close(transition(x, 3.5 * y), 3.5 * transition(x, y))


def test_padding_and_batch_mates_change_nothing():
    x, y = random(2, 7, 5), random(2, 7, 5, seed=1)
    real = torch.tensor([[False, False, False, True, True, True, True], [True] * 7])
    x[0, :3], y[0, :3] = torch.nan, torch.nan
    w = transition(x, y, real)
    torch.testing.assert_close(w[0, 3:], transition(x[0, 3:], y[0, 3:]))
    torch.testing.assert_close(w[1], transition(x[1], y[1]))
    assert w[0, :3].tolist() == [0, 0, 0]


def test_transition_survives_a_zero_input_and_half_precision():
    x, y = torch.zeros(3, 4), random(3, 4)
    assert transition(x, y).isfinite().all()
    x, y = (300 * random(2, 5, 64)).half(), (300 * random(2, 5, 64, seed=1)).half()  # squares overflow in fp16
    w = transition(x, y)
    assert w.dtype == torch.float32
    torch.testing.assert_close(w, transition(x.float(), y.float()))


def test_accumulation_follows_the_tokens_that_stay():
    w = random(6, 2, 5).abs()
    ttv = accumulate(accumulate(None, w[0], w[1]), w[2], w[3])
    torch.testing.assert_close(ttv, w[:4].sum(0))
    kept = torch.tensor([[0, 2], [1, 4]])
    short = accumulate(ttv.gather(-1, kept), w[4, :, :2], w[5, :, :2])
    torch.testing.assert_close(short, w[:4].sum(0).gather(-1, kept) + w[4, :, :2] + w[5, :, :2])


def plain_iga(q: torch.Tensor, k: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """One prompt, dense, over all rows: q (H, n, D), k (Hkv, n, D) -> (stop - start,)."""
    H, n, D = q.shape
    logits = q @ k.repeat_interleave(H // len(k), 0).mT / math.sqrt(D)
    A = logits.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")).softmax(-1)
    return A[:, stop:, start:stop].mean((0, 1))


def test_instruction_attention_with_grouped_heads_against_a_dense_matrix():
    q, k = random(2, 6, 11, 4), random(2, 3, 11, 4, seed=1)
    got = instruction_attention(q[:, :, 7:], k, (2, 7))
    for b in range(2):
        torch.testing.assert_close(got[b], plain_iga(q[b], k[b], 2, 7))


def test_instruction_attention_of_padded_prompts_equals_each_alone():
    q, k = random(2, 4, 13, 4), random(2, 2, 13, 4, seed=1)
    real = torch.ones(2, 13, dtype=torch.bool)
    real[0, :2], real[1, 11:] = False, False  # one padded on the left, one on the right
    got = instruction_attention(q[:, :, 8:], k, (3, 8), real)
    torch.testing.assert_close(got[0], plain_iga(q[0, :, 2:], k[0, :, 2:], 1, 6))
    torch.testing.assert_close(got[1], plain_iga(q[1, :, :11], k[1, :, :11], 3, 8))


def test_instruction_attention_takes_another_scale():
    q, k = random(1, 2, 6, 4), random(1, 2, 6, 4, seed=1)
    torch.testing.assert_close(
        instruction_attention(q[:, :, 4:], k, (1, 4), scale=0.25), instruction_attention(0.5 * q[:, :, 4:], k, (1, 4))
    )


@pytest.mark.parametrize("image", [(3, 3), (-1, 2), (2, 5)])
def test_instruction_attention_refuses_a_span_that_cannot_be(image):
    with pytest.raises(ValueError, match=r"0 <= start < stop <= 4"):
        instruction_attention(random(1, 2, 2, 4), random(1, 2, 6, 4), image)


def test_stage_score_adds_both_shares():
    ttv, iga = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.02, 0.02], [0.01, 0.03]])
    torch.testing.assert_close(stage_score(ttv, iga), torch.tensor([[0.75, 1.25], [0.25, 0.75]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(stage_score(ttv, None), torch.tensor([[0.25, 0.75], [0.0, 0.0]]))
    torch.testing.assert_close(stage_score(None, iga), iga / (iga.sum(-1, keepdim=True) + 1e-8))


def test_stage_score_needs_one_of_its_terms():
    with pytest.raises(ValueError, match="must not both be None"):
        stage_score(None, None)


@pytest.mark.parametrize(
    "N, r, wanted",
    [(576, 0.875, 504), (576, 0.625, 360), (576, 0.125, 72), (36, 0.625, 22), (5, 0.125, 1), (7, 1.0, 7)],
)
def test_keep_count_truncates_and_leaves_one(N, r, wanted):
    assert keep_count(N, r) == wanted


@settings(max_examples=40, deadline=None)
@given(c=st.floats(0.1, 10), t=st.integers(1, 9), seed=st.integers(0, 999))
def test_transition_does_not_see_the_size_of_both(c, t, seed):
    x, y = random(t, 3, seed=seed), random(t, 3, seed=seed + 1)
    torch.testing.assert_close(transition(c * x, c * y), transition(x, y))


# the class, on tiny random models


IMAGE = 97  # the placeholder token of the families
STAGES = {"prune_after": (1, 2, 3), "budget": (0.8, 0.5, 0.2), "layers": (1, 3)}


def logits(model, batch, method: Method | None = None):
    """Logits of one forward, and the run."""
    with torch.no_grad():
        if method is None:
            return model(**batch).logits, None
        with method.on(model) as run:
            return model(**batch).logits, run


@pytest.fixture(scope="module")
def llava():
    return FAMILIES["llava"].tiny()


def image_of(ids: torch.Tensor) -> torch.Tensor:
    """Per token which image it belongs to, -1 for text: every run of placeholders is one image."""
    visual = ids == IMAGE
    starts = visual & ~torch.cat([torch.tensor([False]), visual[:-1]])
    return torch.where(visual, starts.cumsum(0) - 1, -1)


def watch(seen: dict[str, torch.Tensor], name: str):
    def hook(_module, args, kwargs, out):
        seen[name + " x"] = args[0] if args else kwargs["hidden_states"]
        seen[name + " y"] = out[0] if isinstance(out, tuple) else out

    return hook


@torch.no_grad()
def by_hand(model, method: TransPrune, x: torch.Tensor, image: torch.Tensor, prompt: int):
    """The decoder's layers one after another on rows (1, n, d) of one prompt: rows kept at each stage, logits.

    image: (n,), which image a row belongs to, -1 for text. Only the first `prompt` rows take part in scores, the
    others are tokens that came later: they go on with their position lowered as much as the prompt got shorter.
    """
    decoder, n = model.model.language_model, x.shape[1]
    rows, positions = torch.arange(n), torch.arange(n)
    N = [int((image == i).sum()) for i in range(int(image.max()) + 1)]
    ttv, kept = torch.zeros(n), {}
    for number, layer in enumerate(decoder.layers, 1):
        r = x.shape[1]
        seen: dict[str, torch.Tensor] = {}

        hooks = [
            layer.self_attn.register_forward_hook(watch(seen, "attn"), with_kwargs=True),
            layer.mlp.register_forward_hook(watch(seen, "mlp"), with_kwargs=True),
        ]
        mask = torch.full((r, r), float("-inf")).triu(1)[None, None]
        rope = decoder.rotary_emb(x, positions[None])
        x = layer(x, attention_mask=mask, position_embeddings=rope, position_ids=positions[None])
        for hook in hooks:
            hook.remove()
        of_prompt = rows < prompt
        p = int(of_prompt.sum())
        if method.layers[0] <= number <= method.layers[1]:
            for part in ("attn", "mlp"):
                ttv[:p] += transition(seen[part + " x"][0, :p], seen[part + " y"][0, :p])
        if number not in method.prune_after:
            continue
        iga = None
        at = image[rows]
        if method.iga:
            coming = decoder.layers[number]
            normed = coming.input_layernorm(x[:, :p])
            rope = decoder.rotary_emb(x, positions[None, :p])
            q, k = (
                getattr(coming.self_attn, f"{name}_proj")(normed).unflatten(-1, (-1, 8)).transpose(1, 2)
                for name in "qk"
            )
            q, k = apply_rotary_pos_emb(q, k, *rope)
            behind = int((at >= 0).nonzero().max()) + 1
            A = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / 8**0.5 + torch.full((p, p), -math.inf).triu(1)
            iga = A.softmax(-1)[0, :, behind:].mean((0, 1))
        stay = at < 0
        for i, total in enumerate(N):
            here = (at == i).nonzero()[:, 0]
            s = stage_score(ttv[here] if method.ttv else None, None if iga is None else iga[here])
            count = max(1, int(total * method.budget[method.prune_after.index(number)]))
            stay[here[s.argsort(descending=True, stable=True)[:count]]] = True
        x, rows, ttv = x[:, stay], rows[stay], ttv[stay]
        kept[f"layer {number}"] = rows[rows < prompt].tolist()
        positions = torch.arange(len(rows)) if method.positions == "renumber" else positions[stay]
    return kept, model.lm_head(decoder.norm(x))


def embedded(model, prompt) -> torch.Tensor:
    """The rows that enter the decoder."""
    first: list[torch.Tensor] = []
    take = lambda _m, args, kwargs: first.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
    hook = model.model.language_model.layers[0].register_forward_pre_hook(take, with_kwargs=True)
    try:
        logits(model, prompt)
    finally:
        hook.remove()
    return first[0]


VARIANTS = [
    TransPrune(**STAGES),
    TransPrune(**STAGES, positions="renumber"),
    TransPrune(**STAGES, ttv=False),
    TransPrune(**STAGES, iga=False, positions="renumber"),
    TransPrune(prune_after=(2,), budget=(0.4,), layers=(2, 2)),
    TransPrune(prune_after=(1, 3), budget=(0.7, 0.3), layers=(3, 3), positions="renumber"),  # no TTV at the first
]


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_the_stages_cut_what_they_cut_by_hand(llava, method, images):
    prompt = FAMILIES["llava"].prompt(11, seed=6, images=images)
    ids = prompt["input_ids"][0]
    ours, run = logits(llava, prompt, method)
    kept, wanted = by_hand(llava, method, embedded(llava, prompt), image_of(ids), len(ids))
    stages = run.kept()[0]
    assert {name: stages[name] for name in kept} == kept
    for name, share in zip(kept, method.budget, strict=True):
        assert sum(ids[position] == IMAGE for position in kept[name]) == images * int(16 * share)  # of the first count
    torch.testing.assert_close(ours, wanted, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_decoding_goes_on_with_each_layers_own_rows_and_positions(llava, positions):
    prompt = FAMILIES["llava"].prompt(11, seed=7)
    method, n = TransPrune(**STAGES, positions=positions), prompt["input_ids"].shape[1]
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with method.on(llava) as run:
        out = llava.generate(**prompt, **options)
    assert [len(run.kept(layer)[0][0]) for layer in range(4)] == [n - d + 4 for d in (0, 16 - 12, 16 - 8, 16 - 3)]
    ids = out.sequences[0, :-1]
    x = torch.cat([embedded(llava, prompt), llava.get_input_embeddings()(ids[None, n:])], 1).detach()
    _, wanted = by_hand(llava, method, x, image_of(ids), n)
    torch.testing.assert_close(torch.stack(out.logits, 1), wanted[:, -5:], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "qwen25_vl"])
def test_whole_shares_change_nothing(name):
    family = FAMILIES[name]
    model, prompt = family.tiny(), family.prompt(11, images=2)
    ours, run = logits(model, prompt, TransPrune(**STAGES).identity())
    torch.testing.assert_close(ours, logits(model, prompt)[0], **family.tolerance)
    assert not run.acted


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_a_left_padded_batch_gives_what_each_prompt_gives_alone(name, positions):
    family = FAMILIES[name]
    model, prompts = family.tiny(), [family.prompt(17, seed=1), family.prompt(6, seed=2, images=2)]
    prompts.append(family.prompt(30, seed=3, images=0))
    method = TransPrune(**STAGES, positions=positions)
    together, run = logits(model, family.pad_left(prompts), method)
    for i, prompt in enumerate(prompts):
        alone, single = logits(model, prompt, method)
        if "pixel_values" in prompt:
            wanted = single.kept()[0]
            found = [[row for row in run.kept()[i][name] if row >= 0] for name in ("layer 1", "layer 2", "layer 3")]
            assert found == [wanted[name] for name in ("layer 1", "layer 2", "layer 3")]
        torch.testing.assert_close(together[i, -1], alone[0, -1], **family.tolerance)


def test_a_prompt_without_image_is_left_alone(llava):
    prompt = FAMILIES["llava"].prompt(12, images=0)
    ours, run = logits(llava, prompt, TransPrune(**STAGES))
    torch.testing.assert_close(ours, logits(llava, prompt)[0], atol=2e-5, rtol=1e-4)
    assert not run.acted


def test_rows_between_layers_see_only_what_is_left(llava):
    """Deeper layers really get fewer rows."""
    prompt = FAMILIES["llava"].prompt(11, seed=6)
    seen = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
        for layer in llava.model.language_model.layers
    ]
    logits(llava, prompt, TransPrune(**STAGES))
    for hook in hooks:
        hook.remove()
    n = prompt["input_ids"].shape[1]
    assert seen == [n, n - 4, n - 8, n - 13]


def test_the_models_own_mask_is_honoured_between_cuts():
    """The staged model hides the image from the text in its first layers: its text rows know nothing of it there."""
    model = staged.build(0)
    drawn = staged.batch(3, seed=1, questions=2)
    batch = {"input_ids": drawn.input_ids, "pixel_values": drawn.pixel_values}
    method = TransPrune(prune_after=(1, 2), budget=(0.5, 0.1), layers=(1, 2), positions="renumber")

    def text_rows(pixels):  # in front of layer 3, the first that lets the text see the image
        rows: list[torch.Tensor] = []
        hook = model.model.language_model.layers[1].register_forward_hook(lambda _m, _a, out: rows.append(out))
        _, run = logits(model, {**batch, "pixel_values": pixels}, method)
        hook.remove()
        assert all(len(stages["layer 1"]) == 5 + 18 and len(stages["layer 2"]) == 5 + 3 for stages in run.kept())
        return rows[0][:, -4:]

    torch.testing.assert_close(text_rows(drawn.pixel_values), text_rows(drawn.pixel_values + 1), atol=1e-6, rtol=1e-5)
    one, run = logits(model, batch, method)
    other, _ = logits(model, {**batch, "pixel_values": drawn.pixel_values + 1}, method)
    assert not torch.allclose(one[:, -1], other[:, -1], atol=1e-4)  # what stays is seen from layer 3 on
    alone, single = logits(model, {name: value[:1] for name, value in batch.items()}, method)
    assert single.kept()[0] == run.kept()[0]
    torch.testing.assert_close(alone[0], one[0], atol=1e-5, rtol=1e-4)


def test_what_cannot_work_on_a_model_is_refused(llava):
    with pytest.raises(UnsupportedModel, match=r"prune_after must be < the model's 4 layers, got \(7, 9, 12\)"):
        TransPrune().on(llava)
    with pytest.raises(UnsupportedModel, match=r"prune_after must be < the model's 4 layers, got \(4,\)"):
        TransPrune(prune_after=(4,), budget=(0.5,), layers=(1, 4)).on(llava)  # behind the last layer
    with pytest.raises(UnsupportedModel, match="vision tower"):
        TransPrune(**STAGES).on(FAMILIES["llama"].tiny())
    with pytest.raises(UnsupportedModel, match="3-axis RoPE"):
        TransPrune(**STAGES, positions="renumber").on(FAMILIES["qwen25_vl"].tiny())


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"budget": (0.5, 0.0, 0.1)}, r"TransPrune\.budget must be in \(0, 1\], got 0\.0"),
        ({"budget": (0.5,)}, r"TransPrune\.budget must have one share per stage \(3\), got \(0\.5,\)"),
        ({"prune_after": (7, 7, 9)}, r"TransPrune\.prune_after must ascend without repetition, got \(7, 7, 9\)"),
        ({"prune_after": (0, 1, 2)}, r"TransPrune\.prune_after must be >= 1, got 0"),
        ({"layers": (9, 7)}, r"TransPrune\.layers must be \(first, last\) with first <= last, got \(9, 7\)"),
        ({"ttv": False, "iga": False}, r"TransPrune\.ttv must be True where iga is False"),
        ({"iga": False, "layers": (8, 12)}, r"TransPrune\.layers must begin at or before the first stage \(7\)"),
        ({"layers": (13, 14)}, r"TransPrune\.layers must begin at or before the last stage \(12\).*got \(13, 14\)"),
        ({"positions": "new"}, r"TransPrune\.positions must be one of 'keep', 'renumber', got 'new'"),
    ],
)
def test_bad_fields_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        TransPrune(**fields)
