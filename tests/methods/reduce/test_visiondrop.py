import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from seqwise.core.errors import UnsupportedModel
from seqwise.core.method import Method
from seqwise.methods.reduce.visiondrop import (
    VisionDrop,
    encoder_score,
    image_attention,
    key_metric,
    reduce,
    schedule,
)
from seqwise.testing.families import FAMILIES

IMAGE = 97  # the placeholder token of the families


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_reduce(X, s, M, D, C):
    """One set of tokens, token by token: contents, origin and members (a dict of lists) of the D + C that come out."""
    n = len(X)
    dominant = sorted(sorted(range(n), key=lambda i: -float(s[i]))[:D])
    rest = [i for i in range(n) if i not in dominant]
    step = max(1, len(rest) // C) if C else 1
    targets = rest[::step][:C]
    groups = {t: [] for t in targets}
    for i in rest:
        if targets and i not in targets:
            cosines = [float(M[i] @ M[t] / M[i].norm() / M[t].norm()) for t in targets]
            groups[targets[cosines.index(max(cosines))]].append(i)
    merged = [X[t] + (X[members].mean(0) if members else 0) for t, members in groups.items()]
    return torch.stack([*(X[i] for i in dominant), *merged]), dominant + targets, groups


@pytest.mark.parametrize(
    "n, D, C", [(13, 4, 3), (13, 0, 5), (13, 12, 1), (13, 8, 3), (7, 3, 0), (36, 8, 3), (36, 5, 4)]
)
def test_reduce_equals_the_plain_operator(n, D, C):
    X, s, M = random(3, n, 6), random(3, n, seed=1), random(3, n, 4, seed=2)
    made = reduce(X, s, M, D, C)
    assert made.tokens.shape == (3, D + C, 6)
    for b in range(3):
        tokens, origin, groups = plain_reduce(X[b], s[b], M[b], D, C)
        torch.testing.assert_close(made.tokens[b], tokens)
        assert made.origin[b].tolist() == origin
        wanted = [-1] * n
        for place, token in enumerate(origin):
            for i in [token, *groups.get(token, [])]:
                wanted[i] = place
        assert made.member[b].tolist() == wanted
        alone = reduce(X[b], s[b], M[b], D, C)
        torch.testing.assert_close(alone.tokens, made.tokens[b])


def test_all_dominant_is_the_identity_and_all_targets_only_reorder():
    X, s, M = random(9, 4), random(9, seed=1), random(9, 4, seed=2)
    assert reduce(X, s, M, 9, 0).tokens.equal(X)
    made = reduce(X, s, M, 4, 5)
    assert made.tokens.equal(X[made.origin])  # targets get nothing
    assert sorted(made.origin.tolist()) == list(range(9))
    assert made.origin[:4].tolist() == sorted(made.origin[:4].tolist()) != list(range(4))


def test_a_contextual_token_is_a_sum_and_its_norm_about_doubles():
    X = torch.ones(5, 3)
    made = reduce(X, torch.arange(5.0), X, 1, 1)
    assert made.tokens.tolist() == [[1.0] * 3, [2.0] * 3]  # the target plus the mean of three others


def test_equal_scores_go_to_the_earlier_token_and_equal_cosines_to_the_first_target():
    X = random(6, 3)
    assert reduce(X, torch.zeros(6), X, 2, 0).origin.tolist() == [0, 1]
    M = torch.tensor([[1.0, 0.0]]).repeat(6, 1)
    assert reduce(X, torch.zeros(6), M, 0, 3).member.tolist() == [0, 0, 1, 0, 2, 0]


def test_the_length_of_the_metric_does_not_matter():
    X, s, M = random(11, 4), random(11, seed=1), random(11, 4, seed=2)
    scaled = M * torch.rand(11, 1, generator=torch.Generator().manual_seed(3)).add(0.1)
    assert reduce(X, s, M, 3, 2).member.equal(reduce(X, s, scaled, 3, 2).member)


@pytest.mark.parametrize("D, C", [(-1, 2), (2, -1), (5, 3)])
def test_reduce_refuses_counts_that_do_not_fit(D, C):
    with pytest.raises(ValueError, match=rf"D and C must be >= 0 with D \+ C <= 7, got D = {D}, C = {C}"):
        reduce(random(7, 2), random(7), random(7, 2), D, C)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), data=st.data(), seed=st.integers(0, 999))
def test_every_token_is_in_one_group_and_dominants_are_untouched(n, data, seed):
    D = data.draw(st.integers(0, n))
    C = data.draw(st.integers(0, n - D))
    X, s, M = random(n, 3, seed=seed), random(n, seed=seed + 1), random(n, 5, seed=seed + 2)
    made = reduce(X, s, M, D, C)
    assert made.tokens.shape == (D + C, 3) and made.origin.unique().numel() == D + C
    assert made.tokens[:D].equal(X[made.origin[:D]])
    assert made.member[made.origin].tolist() == list(range(D + C))
    assert (made.member >= (0 if C else -1)).all() and (made.member[made.member >= 0] < D + C).all()
    others = torch.ones(n, dtype=torch.bool).index_fill(0, made.origin[:D], False)
    if 0 < D < n:
        assert s[made.origin[:D]].min() >= s[others].max() - 1e-3


def test_half_precision_is_merged_in_full_and_comes_back_in_half():
    X, s, M = random(30, 8), random(30, seed=1), random(30, 8, seed=2)
    half = reduce(X.bfloat16(), s, M.bfloat16(), 5, 3)
    assert half.tokens.dtype == torch.bfloat16
    wanted = reduce(X.bfloat16().float(), s, M.bfloat16().float(), 5, 3)
    torch.testing.assert_close(half.tokens.float(), wanted.tokens, atol=2e-2, rtol=1e-2)


def test_the_encoders_score_is_a_sum_over_heads_without_cls():
    row = torch.tensor([[0.4, 0.1, 0.5], [0.2, 0.6, 0.2]])
    torch.testing.assert_close(encoder_score(row), torch.tensor([0.7, 0.7]))
    torch.testing.assert_close(encoder_score(row, 0), torch.tensor([0.6, 0.7, 0.7]))
    assert encoder_score(row.bfloat16()).dtype == torch.float32


def plain_attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q (H, n, D), k (Hkv, n, D) of one prompt: (H, n, n)."""
    H, n, D = q.shape
    logits = q @ k.repeat_interleave(H // len(k), 0).mT / math.sqrt(D)
    return logits.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")).softmax(-1)


def test_image_attention_is_the_mean_over_heads_and_image_rows_with_all_keys_in_the_softmax():
    q, k = random(2, 6, 13, 4), random(2, 3, 13, 4, seed=1)
    got = image_attention(q, k, (3, 8))
    for b in range(2):
        torch.testing.assert_close(got[b], plain_attention(q[b], k[b])[:, 3:8, 3:8].mean((0, 1)))
    assert (got.sum(-1) < 1).all(), "tokens before the image have their share"


def test_what_comes_behind_the_image_changes_nothing():
    q, k = random(1, 4, 13, 4), random(1, 2, 13, 4, seed=1)
    before = image_attention(q, k, (3, 8))
    q[:, :, 8:], k[:, :, 8:] = torch.nan, torch.nan
    torch.testing.assert_close(image_attention(q, k, (3, 8)), before)


def test_image_attention_of_padded_prompts_equals_each_alone():
    q, k = random(2, 4, 13, 4), random(2, 2, 13, 4, seed=1)
    real = torch.ones(2, 13, dtype=torch.bool)
    real[0, :2] = False
    got = image_attention(q, k, (4, 9), real)
    torch.testing.assert_close(got[0], plain_attention(q[0, :, 2:], k[0, :, 2:])[:, 2:7, 2:7].mean((0, 1)))
    torch.testing.assert_close(got[1], plain_attention(q[1], k[1])[:, 4:9, 4:9].mean((0, 1)))


def test_even_attention_favours_early_tokens():
    """s_j = 1/n sum_{i >= j} 1 / (b + i + 1): a causal bias that stays although text has no say."""
    b, n = 3, 9
    s = image_attention(torch.zeros(1, 2, b + n, 4), torch.zeros(1, 2, b + n, 4), (b, b + n))[0]
    wanted = [sum(1 / (b + i + 1) for i in range(j, n)) / n for j in range(n)]
    torch.testing.assert_close(s, torch.tensor(wanted))
    assert (s.diff() < 0).all()


@pytest.mark.parametrize("image", [(3, 3), (-1, 2), (2, 7)])
def test_image_attention_refuses_a_span_that_cannot_be(image):
    with pytest.raises(ValueError, match=r"0 <= start < stop <= 6"):
        image_attention(random(1, 2, 6, 4), random(1, 2, 6, 4), image)


def test_image_attention_takes_another_scale():
    q, k = random(1, 2, 6, 4), random(1, 2, 6, 4, seed=1)
    torch.testing.assert_close(image_attention(q, k, (1, 5), scale=0.25), image_attention(0.5 * q, k, (1, 5)))


def test_the_metric_of_grouped_heads_is_that_of_repeated_ones():
    k = random(2, 3, 7, 4)
    torch.testing.assert_close(key_metric(k), key_metric(k.repeat_interleave(2, 1)))
    torch.testing.assert_close(key_metric(k)[0, 5], (k[0, 0, 5] + k[0, 1, 5] + k[0, 2, 5]) / 3)


def test_the_schedule_scales_the_published_one():
    assert schedule(32) == ((48, 35, 26, 19), (6, 5, 4, 3))
    assert schedule(64) == ((96, 70, 52, 38), (12, 10, 8, 6))
    assert schedule(1) == ((2, 1, 1, 1), (0, 0, 0, 0))
    assert VisionDrop.averaging(32) == VisionDrop()
    assert VisionDrop.averaging(128).budget == (192, 140, 104, 76)
    with pytest.raises(ValueError, match="average must be >= 1, got 0"):
        schedule(0)


# the class, on tiny random models

STAGES = {"prune_after": (1, 2, 3), "budget": (10, 7, 5, 3), "contextual": (3, 2, 2, 1)}


@torch.no_grad()
def logits(model, batch, method: Method | None = None):
    """Logits of one forward, and the run."""
    if method is None:
        return model(**batch).logits, None
    with method.on(model) as run:
        return model(**batch).logits, run


@pytest.fixture(scope="module")
def llava():
    return FAMILIES["llava"].tiny()


@torch.no_grad()
def encoded_by_hand(model, pixels: torch.Tensor, k: int, C: int, keep_cls: bool = True):
    """One image behind the tower, from the tower's own weights: its k features (k, D), in sequence."""
    tower = model.model.vision_tower
    states = tower(pixels, output_hidden_states=True).hidden_states
    layer = tower.encoder.layers[len(states) - 3]  # its output is hidden state -2
    x = layer.layer_norm1(states[-3])
    q, key = (getattr(layer.self_attn, f"{n}_proj")(x).unflatten(-1, (2, -1)).transpose(1, 2) for n in "qk")
    A = (q @ key.mT * q.shape[-1] ** -0.5).softmax(-1)  # (1, h, 17, 17)
    s, M, X = A[0, :, 0, 1:].sum(0), key[0, :, 1:].mean(0), states[-2][0]
    tokens, origin, _ = plain_reduce(X[1:], s, M, k - C - keep_cls, C)
    if keep_cls:
        tokens = torch.cat([X[:1], tokens])
    return model.model.multi_modal_projector(tokens), origin


@torch.no_grad()
def by_hand(model, method: VisionDrop, prompt, later: torch.Tensor | None = None):
    """The decoder's layers one after another on one prompt, whose one image stands in one run, and on tokens `later`
    (m,): rows that reached each layer, logits."""
    decoder, ids = model.model.language_model, prompt["input_ids"][0]
    start = int((ids == IMAGE).nonzero()[0])
    k, C = method.budget[0], method.contextual[0]
    features, _ = encoded_by_hand(model, prompt["pixel_values"], k, C, method.keep_cls)
    text = model.get_input_embeddings()(ids)
    behind = text[start + 16 :]
    if later is not None:
        behind = torch.cat([behind, model.get_input_embeddings()(later)])
    x = torch.cat([text[:start], features, behind])[None]
    rows = []
    for number, layer in enumerate(decoder.layers, 1):
        n = x.shape[1]
        rows.append(n)
        positions = torch.arange(n)[None]
        rope = decoder.rotary_emb(x, positions)
        mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
        x = layer(x, attention_mask=mask, position_embeddings=rope, position_ids=positions)
        if number not in method.prune_after:
            continue
        coming, stop = decoder.layers[number], start + k
        q, key = (
            getattr(coming.self_attn, f"{name}_proj")(coming.input_layernorm(x)).unflatten(-1, (-1, 8)).transpose(1, 2)
            for name in "qk"
        )
        q, key = apply_rotary_pos_emb(q, key, *rope)
        s = plain_attention(q[0], key[0])[:, start:stop, start:stop].mean((0, 1))
        index = 1 + method.prune_after.index(number)
        k, C = method.budget[index], method.contextual[index]
        tokens, _, _ = plain_reduce(x[0, start:stop], s, key[0, :, start:stop].mean(0), k - C, C)
        x = torch.cat([x[0, :start], tokens, x[0, stop:]])[None]
    return rows, model.lm_head(decoder.norm(x))


VARIANTS = [
    VisionDrop(**STAGES),
    VisionDrop(**STAGES, keep_cls=False),
    VisionDrop(prune_after=(1, 2, 3), budget=(10, 7, 5, 3), contextual=(0, 0, 0, 0)),
    VisionDrop(prune_after=(2,), budget=(12, 4), contextual=(1, 3)),
    VisionDrop(prune_after=(), budget=(6,), contextual=(2,)),
]


@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_all_stages_are_what_they_are_by_hand(llava, method):
    prompt = FAMILIES["llava"].prompt(11, seed=6)
    ours, run = logits(llava, prompt, method)
    rows, wanted = by_hand(llava, method, prompt)
    stages = run.kept()[0]
    names = ["input", *(f"layer {number}" for number in method.prune_after)]
    assert [len(stages[name]) for name in names] == [rows[0], *(rows[number] for number in method.prune_after)]
    torch.testing.assert_close(ours, wanted, atol=5e-5, rtol=1e-4)


def test_decoding_goes_on_with_each_layers_own_rows_and_positions(llava):
    prompt, method = FAMILIES["llava"].prompt(11, seed=7), VisionDrop(**STAGES)
    n = prompt["input_ids"].shape[1]
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with method.on(llava) as run:
        out = llava.generate(**prompt, **options)
    assert [len(run.kept(layer)[0][0]) for layer in range(4)] == [n - 16 + k + 4 for k in method.budget]
    _, wanted = by_hand(llava, method, prompt, out.sequences[0, n:-1])
    # a later token has no part in the scores, so the prompt's rows are cut alike
    torch.testing.assert_close(torch.stack(out.logits, 1), wanted[:, -5:], atol=5e-5, rtol=1e-4)


def test_the_question_does_not_decide_what_stays(llava):
    prompt = FAMILIES["llava"].prompt(20, seed=3)
    other = prompt["input_ids"].clone()
    behind = int((other[0] == IMAGE).nonzero()[-1]) + 2
    other[0, behind:] = other[0, behind:].flip(0)
    (one, run), (two, second) = (
        logits(llava, prompt | {"input_ids": ids}, VisionDrop(**STAGES)) for ids in (prompt["input_ids"], other)
    )
    assert run.kept() == second.kept() and run.members("layer 2") == second.members("layer 2")
    assert not torch.allclose(one[:, -1], two[:, -1], atol=1e-3)


def test_the_ledger_knows_who_was_merged_and_cls_takes_a_free_cell(llava):
    prompt = FAMILIES["llava"].prompt(11, seed=6)
    _, run = logits(llava, prompt, VisionDrop(**STAGES))
    start = int((prompt["input_ids"][0] == IMAGE).nonzero()[0])
    _, origin = encoded_by_hand(llava, prompt["pixel_values"], 10, 3)
    free = min(set(range(16)) - set(origin))
    cells = sorted({free, *origin})
    visual = [p - start for p in run.kept()[0]["input"] if start <= p < start + 16]
    assert visual == cells and len(cells) == 10
    groups = run.members("input")[0]
    assert start + cells[0] not in groups, "CLS, the first token, stands for no patch"
    assert [len(groups[start + cell]) for cell in cells[1:7]] == [1] * 6, "dominant tokens stand for themselves"
    assert sorted(p for group in groups.values() for p in group) == list(range(start, start + 16)), "none is lost"


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_whole_shares_change_nothing(name, images):
    family = FAMILIES[name]
    model, prompt = family.tiny(), family.prompt(11, images=images)
    ours, run = logits(model, prompt, VisionDrop(**STAGES).identity())
    torch.testing.assert_close(ours, logits(model, prompt)[0], **family.tolerance)
    assert not run.acted


def test_a_budget_that_an_image_does_not_reach_changes_nothing(llava):
    prompt = FAMILIES["llava"].prompt(11)
    ours, run = logits(llava, prompt, VisionDrop(budget=16, contextual=4, prune_after=(1, 2)))
    torch.testing.assert_close(ours, logits(llava, prompt)[0], **FAMILIES["llava"].tolerance)
    assert not run.acted


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_a_left_padded_batch_gives_what_each_prompt_gives_alone(name, positions):
    family = FAMILIES[name]
    model, prompts = family.tiny(), [family.prompt(17, seed=1), family.prompt(6, seed=2, images=2)]
    prompts.append(family.prompt(30, seed=3, images=0))
    method = VisionDrop(
        budget=(0.6, 0.5, 0.3, 3), contextual=(0.2, 1, 0.1, 2), prune_after=(1, 2, 3), positions=positions
    )
    together, run = logits(model, family.pad_left(prompts), method)
    for i, prompt in enumerate(prompts):
        alone, single = logits(model, prompt, method)
        if "pixel_values" in prompt:
            for stage in ("input", "layer 1", "layer 2", "layer 3"):
                assert [row for row in run.kept()[i][stage] if row >= 0] == single.kept()[0][stage]
        torch.testing.assert_close(together[i, -1], alone[0, -1], **family.tolerance)


def test_counts_are_split_over_the_tiles_of_an_image_and_hold_for_the_whole_at_the_stages():
    family = FAMILIES["llava_next"]  # two images of two and of four tiles, the overview included
    model, prompt = family.tiny(), family.prompt(11, images=2)
    method = VisionDrop(budget=(20, 9), contextual=(4, 2), prune_after=(2,))
    _, run = logits(model, prompt, method)
    image = run.segments.image[0]
    tiles = [int(n) // 16 for n in run.engine.ledger.facts["patches"][0]]
    assert tiles == [3, 5]
    kept = {stage: image[run.kept()[0][stage]] for stage in ("input", "layer 2")}
    assert int((kept["input"] == 0).sum()) == 20 // 3 * 3
    assert 9 < int((kept["input"] == 1).sum()) < 20 // 5 * 5, "the model cuts off the second image's empty borders"
    assert [int((kept["layer 2"] == i).sum()) for i in range(2)] == [9, 9]


def test_newline_tokens_go_with_the_grid_and_are_no_patches():
    family = FAMILIES["llava_next"]
    model, prompt = family.tiny(), family.prompt(11)
    _, run = logits(model, prompt, VisionDrop(budget=(1.0, 9), contextual=0, prune_after=(2,)))
    facts, kept = run.segments, run.kept()[0]
    assert "input" not in kept
    newline = (facts.tile[0] >= 0) & (facts.column[0] < 0)
    assert newline.any() and not newline[kept["layer 2"]].any()
    assert int(facts.visual[0, kept["layer 2"]].sum()) == 9


def test_a_prompt_without_image_is_left_alone(llava):
    prompt = FAMILIES["llava"].prompt(12, images=0)
    ours, run = logits(llava, prompt, VisionDrop(**STAGES))
    torch.testing.assert_close(ours, logits(llava, prompt)[0], atol=2e-5, rtol=1e-4)
    assert not run.acted


def test_what_cannot_work_on_a_model_is_refused(llava):
    with pytest.raises(UnsupportedModel, match=r"prune_after must be < the model's 4 layers, got \(8, 16, 24\)"):
        VisionDrop().on(llava)
    with pytest.raises(UnsupportedModel, match="vision tower"):
        VisionDrop(**STAGES).on(FAMILIES["llama"].tiny())
    with pytest.raises(UnsupportedModel, match="3-axis RoPE"):
        VisionDrop(**STAGES).on(FAMILIES["qwen25_vl"].tiny())
    with pytest.raises(UnsupportedModel, match="of several patches or of images of any size: use FoPru there"):
        VisionDrop(**STAGES, positions="keep").on(FAMILIES["qwen25_vl"].tiny())


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"budget": (48, 35, 0, 19)}, r"VisionDrop\.budget must be a whole number of tokens >= 1 or a share .*got 0"),
        ({"budget": (48, 35)}, r"VisionDrop\.budget must have a number for the encoder and one per stage \(4\), got"),
        ({"contextual": (6, 5)}, r"VisionDrop\.contextual must have a number .* \(4\), got \(6, 5\)"),
        ({"contextual": (6, 5, 4, -3)}, r"VisionDrop\.contextual must be >= 0, got -3"),
        ({"contextual": (6, 35, 4, 3)}, r"VisionDrop\.contextual must be < 1\.0 and < budget \(35\), got 35"),
        ({"contextual": 1.0}, r"VisionDrop\.contextual must be < 1\.0 and < budget \(48\), got 1\.0"),
        ({"prune_after": (8, 8, 9)}, r"VisionDrop\.prune_after must ascend without repetition, got \(8, 8, 9\)"),
        ({"prune_after": (0, 1, 2)}, r"VisionDrop\.prune_after must be >= 1, got 0"),
        ({"positions": "new"}, r"VisionDrop\.positions must be one of 'renumber', 'keep', got 'new'"),
    ],
)
def test_bad_fields_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        VisionDrop(**fields)
