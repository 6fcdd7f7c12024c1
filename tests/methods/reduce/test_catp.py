import copy
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seqwise.methods.reduce.catp as module
from seqwise.core.errors import UnsupportedModel
from seqwise.core.method import Method
from seqwise.methods.reduce.catp import CATP, context_score, cover, keep_count, query_score
from seqwise.testing.families import FAMILIES


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(x: torch.Tensor) -> torch.Tensor:
    return x.double() / x.double().norm(dim=-1, keepdim=True)


def F(X: torch.Tensor, v: torch.Tensor, Y, lambda1: float) -> float:
    similar = (1 + unit(X)[list(Y)] @ unit(X).mT) / 2  # (|Y|, n)
    agreement = (1 + unit(X)[list(Y)] @ unit(v)) / 2 if v.any() else torch.full((len(Y),), 0.5)
    return float(similar.amax(0).sum() + lambda1 * agreement.sum())


def plain_cover(X: torch.Tensor, v: torch.Tensor, k: int, lambda1: float) -> list[int]:
    """In order of choosing, by whole values of F."""
    Y: list[int] = []
    while len(Y) < k:
        worth = torch.tensor([-1.0 if j in Y else F(X, v, [*Y, j], lambda1) for j in range(len(X))]).double()
        Y.append(int((worth >= worth.max() - 1e-6).nonzero()[0]))
    return Y


def in_order(X: torch.Tensor, v: torch.Tensor, k: int, lambda1: float = 0.7) -> list[int]:
    """The order of choosing, from the sets of 1, 2, ... k."""
    sets = [set(cover(X, v, size, lambda1).tolist()) for size in range(1, k + 1)]
    return [(later - earlier).pop() for earlier, later in pairwise([set(), *sets])]


@pytest.mark.parametrize("lambda1", [0.0, 0.7, 30.0])
@pytest.mark.parametrize("n, k", [(1, 1), (17, 9), (17, 17), (41, 13)])
def test_cover_equals_the_plain_greedy_choice(n, k, lambda1):
    X, v = random(n, 5) + 0.4, random(5, seed=1)
    assert in_order(X, v, k, lambda1) == plain_cover(X, v, k, lambda1)


def test_many_tokens_are_covered_without_all_similarities_alike(monkeypatch):
    X, v = random(301, 8) + 0.4, random(8, seed=1)
    wanted = [cover(X, v, k) for k in (1, 40, 200)]
    monkeypatch.setattr(module, "_SQUARE", 0)
    monkeypatch.setattr(module, "_BLOCK", 7)
    assert all(cover(X, v, k).equal(kept) for k, kept in zip((1, 40, 200), wanted, strict=True))


def test_greedy_covers_within_its_guarantee_and_gains_fall():
    for seed in range(25):
        X, v = random(10, 3, seed=seed), random(3, seed=100 + seed)
        best = max(F(X, v, Y, 0.7) for Y in combinations(range(10), 4))
        assert F(X, v, cover(X, v, 4).tolist(), 0.7) >= (1 - 1 / 2.7182818) * best
        order = in_order(X, v, 10)
        worth = [F(X, v, order[:k], 0.7) for k in range(1, 11)]
        gains = [later - earlier for earlier, later in pairwise([0.0, *worth])]
        assert all(later <= earlier + 1e-9 for earlier, later in pairwise(gains))


def test_no_copy_is_kept_while_other_tokens_remain():
    distinct = random(6, 4)
    X = torch.cat([distinct, distinct])[torch.randperm(12, generator=torch.Generator().manual_seed(5))]
    kept = X[cover(X, torch.zeros(4), 6, lambda1=0.0)]
    assert len(kept.unique(dim=0)) == 6


def test_two_tokens_that_only_have_each_other_tie_and_the_earlier_wins():
    for seed in range(20):  # both gains are 1 + cos01 - best_a - best_b: rounding must not decide
        a, tilt = random(16, seed=seed), 0.3 * random(16, seed=100 + seed)
        X = torch.stack([3 * a, a + tilt])
        for pair in (X, X.flip(0)):
            assert in_order(pair, torch.zeros(16), 1, lambda1=0.0) == [0]


def test_gains_within_a_millionth_are_equal():
    assert in_order(torch.eye(2), torch.tensor([1.0, 1.0 + 1e-6]), 2) == [0, 1], "2.5e-7 more gain, and later"
    assert in_order(torch.eye(2), torch.tensor([1.0, 1.0 + 1e-4]), 2) == [1, 0], "2.5e-5 is a difference"


def test_the_text_pulls_tokens_in_by_shifted_cosine():
    X = torch.eye(4)
    assert in_order(X, torch.tensor([0.0, 0.0, 5.0, 1.0]), 4) == [2, 3, 0, 1]
    assert in_order(X, torch.tensor([-1.0, -1.0, -1.0, 0.0]), 1) == [3]
    assert in_order(X, torch.zeros(4), 4) == [0, 1, 2, 3], "no text: all agree alike"


def test_half_precision_tokens_are_covered_as_their_float_values():
    X, v = (random(90, 16) + 0.5).bfloat16(), random(16, seed=1).bfloat16()
    assert cover(X, v, 50).equal(cover(X.float(), v.float(), 50))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), k=st.integers(1, 22), seed=st.integers(0, 999))
def test_lengths_do_not_matter_and_places_ascend(n, k, seed):
    X, v = random(n, 3, seed=seed), random(3, seed=seed + 1)
    kept = cover(X, v, k)
    assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == min(k, n)
    scale = 0.5 + torch.rand(n, 1, generator=torch.Generator().manual_seed(seed))
    assert F(X, v, cover(X * scale, 3 * v, k).tolist(), 0.7) == pytest.approx(F(X, v, kept.tolist(), 0.7), abs=1e-5)


def test_cover_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        cover(random(4, 3), random(3), 0)


@pytest.mark.parametrize(
    "S, R, left",
    [(576, 0.0, 576), (576, 0.778, 127), (576, 0.389, 351), (36, 0.778, 7), (10, 0.7, 3), (100, 0.9, 10), (5, 0.99, 1)],
)
def test_counts_are_floors_in_spite_of_rounding(S, R, left):
    assert keep_count(S, R) == left


def test_context_score_by_hand():
    A_K, A_before = torch.tensor([0.5, 0.1, 0.2]), torch.tensor([0.1, 0.4, 0.0])
    h, v = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]]), torch.tensor([4.0, 0.0])
    torch.testing.assert_close(context_score(A_K, A_before, h, v), torch.tensor([0.4 + 0.6, -0.6, 0.2]))
    torch.testing.assert_close(context_score(A_K, A_before, h, v, 0.0), torch.tensor([0.4, 0.0, 0.2]))
    torch.testing.assert_close(context_score(A_K, A_before, h, v, 0.6, True), torch.tensor([1.6, -0.6, 0.5]))


def test_equal_attention_in_both_layers_leaves_the_cosine_alone():
    A, h, v = random(2, 9).softmax(-1), random(2, 9, 4), random(2, 4, seed=1)
    for normalise in (False, True):
        assert context_score(A, A, h, v, 0.6, normalise).equal(0.6 * query_score(h, v))


def test_query_score_is_the_plain_cosine():
    h, v = 300 * random(2, 9, 64), 300 * random(2, 64, seed=1)
    wanted = torch.stack([unit(h[b]) @ unit(v[b]) for b in range(2)]).float()
    torch.testing.assert_close(query_score(h, v), wanted)
    assert wanted.min() < 0, "not shifted to 0..1"
    torch.testing.assert_close(query_score(h.half(), v.half()), wanted, atol=2e-3, rtol=0)


# the class, on tiny random models


IMAGE = 97  # the placeholder token of the families


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


def numbered(ids: torch.Tensor) -> torch.Tensor:
    """Per token which image it belongs to, -1 for text: every run of placeholders is one image."""
    visual = ids == IMAGE
    starts = visual & ~torch.cat([torch.tensor([False]), visual[:-1]])
    return torch.where(visual, starts.cumsum(0) - 1, -1)


@torch.no_grad()
def embedded(model, ids, pixels) -> torch.Tensor:
    """The rows (1, n, d) of a prompt in front of the decoder."""
    x = model.get_input_embeddings()(ids)
    features = torch.cat(list(model.get_image_features(pixels).pooler_output))
    return x.masked_scatter((ids == IMAGE)[..., None], features)


def best(score: dict[int, float], count: int) -> set[int]:
    return set(sorted(score, key=lambda j: (-score[j], j))[:count])


@torch.no_grad()
def by_hand(model, prompt, method: CATP, later: torch.Tensor | None = None):
    """Columns that stay at each cut, and the logits; `later` ids (m,) follow the prompt and are never scored."""
    ids, n = prompt["input_ids"][0], prompt["input_ids"].shape[1]
    x, image, columns = embedded(model, ids[None], prompt["pixel_values"]), numbered(ids), torch.arange(n)
    query, kept = int(image.max()), {}
    sizes = [int((image == i).sum()) for i in range(query + 1)]
    whole = isinstance(method.budget, float)
    left = [method.budget * S if whole else min(method.budget, S) for S in sizes]
    text_of = torch.where(image >= 0, image, 0).cummax(0).values.masked_fill(image >= 0, -1)
    text_of[: int((image == 0).nonzero()[0])] = -1  # what stands in front of the first image

    stay = image < 0
    for i, S in enumerate(sizes):
        rows, own = (image == i).nonzero()[:, 0], text_of == i
        v = x[0, own].mean(0) if own.any() else torch.zeros(x.shape[-1])
        k = int(S * (1 - (1 - left[i] / S) / 2) + 1e-9)
        stay[rows[sorted(plain_cover(x[0, rows], v, k, method.lambda1))]] = True
    x, image, columns = x[:, stay], image[stay], columns[stay]
    kept["input"] = columns.tolist()

    eager, positions = copy.deepcopy(model), columns
    eager.set_attn_implementation("eager")
    out = eager.model.language_model(
        inputs_embeds=x, position_ids=positions[None], output_attentions=True, output_hidden_states=True
    )
    K = method.layer
    h, last = out.hidden_states[K][0].double(), [A[0, :, -1].mean(0) for A in out.attentions]
    start = int((image == query).nonzero()[0])
    v_q = h[start:].mean(0)
    dA = (last[K - 1] - last[K - 2]).clamp(min=0)
    if method.normalise:
        dA = dA / max(dA[(image >= 0) & (image < query)].tolist(), default=1.0)
    context = {}
    for j in ((image >= 0) & (image < query)).nonzero()[:, 0].tolist():
        context[j] = float(dA[j] + method.lambda2 * (unit(h[j]) @ unit(v_q)))
    go_on = best(context, max(1, int(sum(left[:query]) + 1e-9)))

    if later is not None:
        x = torch.cat([x, model.get_input_embeddings()(later)[None]], 1)
        positions = torch.cat([positions, n + torch.arange(len(later))])
    decoder, prompt_rows = model.model.language_model, len(image)
    for number, layer in enumerate(decoder.layers, 1):
        r = x.shape[1]
        mask = torch.full((r, r), float("-inf")).triu(1)[None, None]
        rope = decoder.rotary_emb(x, positions[None])
        x = layer(x, attention_mask=mask, position_embeddings=rope, position_ids=positions[None])
        if number == K + 1:
            h = x[0, :prompt_rows].double()
            known = (image >= 0) & (image < query)
            if not query:
                known = torch.arange(len(image)) > int((image == query).nonzero()[-1])
            v_c = h[known].mean(0)
            asking = {j: float(unit(h[j]) @ unit(v_c)) for j in (image == query).nonzero()[:, 0].tolist()}
            go_on = best(asking, max(1, int(left[query] + 1e-9)))
        if number in (K, K + 1):
            stay = torch.ones(x.shape[1], dtype=torch.bool)
            for j in context if number == K else asking:
                stay[j] = j in go_on
            x, positions = x[:, stay], positions[stay]
            stay = stay[:prompt_rows]
            image, columns = image[stay], columns[stay]
            prompt_rows = len(image)
            kept[f"layer {number}"] = columns.tolist()
    return kept, model.lm_head(decoder.norm(x))


VARIANTS = [
    CATP(budget=0.4, layer=2),
    CATP(budget=0.1, layer=2, lambda1=5.0, lambda2=0.0),
    CATP(budget=5, layer=2, normalise=True),
]


@pytest.mark.parametrize("images", [1, 2, 4])
@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_the_cuts_are_those_made_by_hand(llava, method, images):
    prompt = FAMILIES["llava"].prompt(21, seed=4, images=images)
    ours, run = logits(llava, prompt, method)
    kept, wanted = by_hand(llava, prompt, method)
    if images == 1:
        del kept["layer 2"]  # no demonstration, nothing to cut
    stages = run.kept()[0]
    assert {name: stages[name] for name in kept} == kept
    torch.testing.assert_close(ours, wanted, atol=5e-5, rtol=1e-4)


def test_demonstrations_compete_for_what_they_keep(llava):
    prompt = FAMILIES["llava"].prompt(21, seed=4, images=4)
    _, run = logits(llava, prompt, CATP(budget=0.25, layer=2))
    image = numbered(prompt["input_ids"][0])
    counts = {stage: image[columns].tolist() for stage, columns in run.kept()[0].items() if "cache" not in stage}
    at_input = [counts["input"].count(i) for i in range(4)]
    behind = [counts["layer 2"].count(i) for i in range(4)]
    assert at_input == [10] * 4, "floor(16 * (1 - 0.75 / 2)) of each"
    assert sum(behind[:3]) == 12 and behind[:3] != [4, 4, 4] and behind[3] == 10
    assert counts["layer 3"].count(3) == 4


def test_layers_cache_three_lengths_and_decoding_goes_on(llava):
    prompt = FAMILIES["llava"].prompt(21, seed=5, images=3)
    n, method = prompt["input_ids"].shape[1], CATP(budget=0.25, layer=2)
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with method.on(llava) as run:
        out = llava.generate(**prompt, **options)
    text = n - 48
    lengths = [len(run.kept(layer)[0][0]) for layer in range(4)]
    assert lengths == [text + 30 + 4, text + 30 + 4, text + 8 + 10 + 4, text + 8 + 4 + 4]
    _, wanted = by_hand(llava, prompt, method, later=out.sequences[0, n:-1])
    torch.testing.assert_close(torch.stack(out.logits, 1), wanted[:, -5:], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "qwen25_vl"])
def test_a_left_padded_batch_gives_what_each_prompt_gives_alone(name):
    family = FAMILIES[name]
    model = family.tiny()
    prompts = [family.prompt(17, seed=1, images=3), family.prompt(6, seed=2, images=2), family.prompt(9, seed=3)]
    prompts.append(family.prompt(30, seed=4, images=0))
    method = CATP(budget=0.3, layer=2)
    together, run = logits(model, family.pad_left(prompts), method)
    for i, prompt in enumerate(prompts):
        alone, single = logits(model, prompt, method)
        wanted = single.kept()[0]
        assert all(run.kept()[i].get(stage) == wanted.get(stage) for stage in ("input", "layer 2", "layer 3"))
        assert ("layer 3" in wanted) == ("pixel_values" in prompt)
        torch.testing.assert_close(together[i, -1], alone[0, -1], **family.tolerance)


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "qwen25_vl"])
def test_the_whole_budget_changes_nothing(name):
    family = FAMILIES[name]
    model, prompt = family.tiny(), family.prompt(11, images=2)
    ours, run = logits(model, prompt, CATP(layer=2).identity())
    torch.testing.assert_close(ours, logits(model, prompt)[0], **family.tolerance)
    assert not run.acted


def test_a_prompt_without_image_is_left_alone(llava):
    prompt = FAMILIES["llava"].prompt(12, images=0)
    ours, run = logits(llava, prompt, CATP(budget=0.1, layer=2))
    torch.testing.assert_close(ours, logits(llava, prompt)[0], atol=2e-5, rtol=1e-4)
    assert not run.acted


def test_counts_of_tiled_images_leave_their_newlines_out():
    family = FAMILIES["llava_next"]
    model, prompt = family.tiny(), family.prompt(9, seed=5, images=2)
    ids = prompt["input_ids"][0]
    image = numbered(ids)
    rows = [int((image == i).sum()) for i in range(2)]  # 48 patches and 4 newlines, and another number of tiles
    _, run = logits(model, prompt, CATP(budget=0.5, layer=2))
    kept = {stage: image[columns].tolist() for stage, columns in run.kept()[0].items() if "cache" not in stage}
    patches = [rows[0] - 4, rows[1] - {52: 4}.get(rows[1], 8)]
    assert [kept["input"].count(i) for i in range(2)] == [int(0.75 * S) for S in patches]
    assert [kept["layer 3"].count(i) for i in range(2)] == [S // 2 for S in patches]


def test_what_the_model_lacks_is_named(llava):
    with pytest.raises(UnsupportedModel, match="vision tower"):
        CATP().on(FAMILIES["llama"].tiny())
    with pytest.raises(UnsupportedModel, match=r"CATP\.layer must be in \[2, 2\] on this model of 4 layers.*got 6"):
        CATP().on(llava)
    with pytest.raises(UnsupportedModel, match="got 3"):
        CATP(layer=3).on(llava)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"budget": 0}, r"CATP\.budget must be"),
        ({"budget": 1.5}, r"share in \(0\.0, 1\.0\], got 1\.5"),
        ({"layer": 1}, r"CATP\.layer must be >= 2, got 1"),
        ({"lambda1": -0.1}, r"CATP\.lambda1 must be >= 0, got -0\.1"),
        ({"lambda2": -1}, r"CATP\.lambda2 must be >= 0, got -1"),
        ({"normalise": 1}, r"CATP\.normalise must be True or False, got 1"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CATP(**values)


def test_the_text_of_a_method_reads_back():
    for method in VARIANTS:
        assert Method.parse(str(method)) == method
