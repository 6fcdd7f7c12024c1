import copy
from dataclasses import replace
from itertools import combinations, pairwise
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqwise.core.errors import UnsupportedModel
from seqwise.core.method import Method
from seqwise.methods.reduce.todre import ToDRE, central, diverse, relevance
from seqwise.testing.families import FAMILIES


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_diverse(X: torch.Tensor, k: int, pivot: int, objective: str) -> list[int]:
    """In order of choosing, every sum and maximum anew."""
    X = X.double() / X.double().norm(dim=-1, keepdim=True)
    C = [pivot]
    while len(C) < min(k, len(X)):
        cost = {}
        for j in range(len(X)):
            if j not in C:
                similar = [float(X[j] @ X[c]) for c in C]
                cost[j] = sum(similar) if objective == "maxsum" else max(similar)
        C.append(min(cost, key=cost.__getitem__))
    return C


def in_order(X: torch.Tensor, k: int, pivot: int, objective: str = "maxsum") -> list[int]:
    """The order of choosing, from the sets of 1, 2, ... k."""
    sets = [set(diverse(X, size, pivot, objective).tolist()) for size in range(1, k + 1)]
    return [(later - earlier).pop() for earlier, later in pairwise([set(), *sets])]


BOTH = ("maxsum", "kcenter")


@pytest.mark.parametrize("objective", BOTH)
@pytest.mark.parametrize("k", [1, 2, 7, 30, 63])
def test_diverse_equals_sums_and_maxima_computed_anew(objective, k):
    X = random(2, 63, 5) + 0.3
    got = diverse(X, k, torch.tensor([4, 62]), objective)
    assert got.tolist() == [sorted(plain_diverse(X[b], k, p, objective)) for b, p in enumerate((4, 62))]


@pytest.mark.parametrize("objective", BOTH)
def test_a_budget_of_all_tokens_or_more_keeps_all_and_one_keeps_the_pivot(objective):
    X = random(9, 4)
    assert diverse(X, 9, 3, objective).tolist() == diverse(X, 50, 3, objective).tolist() == list(range(9))
    assert diverse(X, 1, 3, objective).tolist() == [3]


def test_copies_of_a_direction_are_taken_in_turns():
    X = torch.eye(5).repeat(4, 1) * torch.arange(1, 21)[:, None]  # of many lengths
    assert in_order(X, 8, 0) == [0, 1, 2, 3, 4, 5, 6, 7]  # directions 0 1 2 3 4, then 0 1 2
    shuffled = X[torch.randperm(20, generator=torch.Generator().manual_seed(3))]
    for k in range(1, 6):
        for objective in BOTH:
            assert len(set(shuffled[diverse(shuffled, k, 7, objective)].argmax(-1).tolist())) == k


def test_nearly_equal_similarities_go_to_the_earlier_token():
    X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1e-7, 1.0], [-1e-3, 1.0]])
    assert in_order(X[:3], 3, 0) == [0, 1, 2], "1e-7 less similar, and later"
    assert in_order(X, 2, 0) == [0, 3], "1e-3 is a difference"


def test_max_sum_goes_for_the_opposite_and_k_center_covers():
    angle = torch.tensor([0.0, 3.1, 3.2, 1.0, 1.6])  # radians
    X = torch.stack([angle.cos(), angle.sin()], -1)
    assert in_order(X, 3, 0) == [0, 1, 2], "two neighbours, because both lie opposite to the pivot"
    assert in_order(X, 3, 0, "kcenter") == [0, 1, 4]


def test_greedy_choices_come_close_to_the_best_and_beat_chance():
    greedy, chance = [], []
    for seed in range(40):
        X = torch.nn.functional.normalize(random(11, 4, seed=seed), dim=-1)
        distance = 1 - X @ X.mT
        worth = {C: sum(float(distance[i, j]) for i, j in combinations(C, 2)) for C in combinations(range(11), 4)}
        chosen = worth[tuple(diverse(X, 4, 0).tolist())]
        assert chosen >= 0.5 * max(worth.values())
        greedy.append(chosen)
        chance.append(sum(worth.values()) / len(worth))
    assert sum(greedy) > 1.2 * sum(chance)


def test_half_precision_tokens_are_compared_in_float32():
    X = (random(400, 16) + 0.5).bfloat16()
    assert diverse(X, 250, 1).equal(diverse(X.float(), 250, 1)), "sums of 250 similarities lose their order in bf16"


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), k=st.integers(1, 22), seed=st.integers(0, 999), objective=st.sampled_from(BOTH))
def test_lengths_do_not_matter_and_places_ascend(n, k, seed, objective):
    X, pivot = random(n, 3, seed=seed), seed % n
    kept = diverse(X, k, pivot, objective)
    assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == min(k, n) and pivot in kept
    scale = 0.5 + torch.rand(n, 1, generator=torch.Generator().manual_seed(seed))
    assert diverse(X * scale, k, pivot, objective).tolist() == kept.tolist()


def test_diverse_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        diverse(random(4, 3), 0, 0)
    with pytest.raises(ValueError, match="'maxsum' or 'kcenter', got 'sum'"):
        diverse(random(4, 3), 2, 0, "sum")


def test_the_central_token_is_the_one_nearest_to_the_mean():
    X = random(3, 9, 4)
    for b in range(3):
        distances = [float((X[b, j] - X[b].mean(0)).norm()) for j in range(9)]
        assert int(central(X)[b]) == distances.index(min(distances))
    assert int(central(torch.tensor([[9.0, 0], [1, 0], [-1, 0], [-9, 0]]))) == 1, "a tie goes to the earlier token"


def test_relevance_equals_sums_over_a_whole_matrix():
    A = random(2, 3, 12, 12).masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(-1).mean(1)  # (2, n, n)
    kind = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 1, 1, 2, 2, 2], [0, 2, 2, 1, 1, 1, 1, 1, 1, 1, 2, 2]])
    text, visual = kind == 2, kind == 1
    sums = [(A * rows[..., None]).sum(-2) for rows in (text, visual)]
    r_tv, r_vt = relevance(*sums, text, visual)
    for b in range(2):
        of_text, of_visual = A[b][text[b]], A[b][visual[b]]
        torch.testing.assert_close(r_tv[b], of_text[:, visual[b]].sum() / text[b].sum())  # rows sum to 1
        torch.testing.assert_close(r_vt[b], of_visual[:, text[b]].sum() / visual[b].sum())


def test_relevance_without_visual_tokens_is_nothing():
    nothing = torch.zeros(1, 5, dtype=torch.bool)
    shares = relevance(torch.full((1, 5), 1.0), torch.zeros(1, 5), ~nothing, nothing)
    assert [share.tolist() for share in shares] == [[0.0], [0.0]]


# the class, on tiny random models


IMAGE = 97  # the placeholder token of the families
OPEN = 9.0  # a tau that every share is below


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


def eager(model):
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return model


def spans(ids: torch.Tensor) -> list[torch.Tensor]:
    """Columns of each image."""
    columns = (ids == IMAGE).nonzero()[:, 0]
    starts = [0, *((columns.diff() > 1).nonzero()[:, 0] + 1).tolist(), len(columns)]
    return [columns[i:j] for i, j in pairwise(starts)]


@torch.no_grad()
def chosen_by_hand(model, prompt, method: ToDRE, k: int) -> list[int]:
    """Columns of the prompt that stay in front of a LLaVA's language model."""
    out = eager(model).model.vision_tower(prompt["pixel_values"], output_attentions=True)
    cls = out.attentions[-1 if method.pivot_layer is None else method.pivot_layer][:, :, 0, 1:].mean(1)  # (images, N)
    ids = prompt["input_ids"][0]
    stay = (ids != IMAGE).nonzero()[:, 0].tolist()
    for columns, X, score in zip(spans(ids), model.get_image_features(prompt["pixel_values"]).pooler_output, cls):  # noqa: B905
        stay += columns[sorted(plain_diverse(X, k, int(score.argmax()), method.objective))].tolist()
    return sorted(stay)


@torch.no_grad()
def embedded(model, ids, pixels) -> torch.Tensor:
    """The rows (1, n, d) of a prompt in front of the decoder."""
    x = model.get_input_embeddings()(ids)
    features = torch.cat(list(model.get_image_features(pixels).pooler_output))
    return x.masked_scatter((ids == IMAGE)[..., None], features)


@torch.no_grad()
def decoded(model, x: torch.Tensor, stay_behind: torch.Tensor | None = None, l: int = 99) -> torch.Tensor:  # noqa: E741
    """Logits of rows x (1, n, d), of which only `stay_behind` (n,) bool go on behind the 0-based layer l."""
    decoder, positions = model.model.language_model, torch.arange(x.shape[1])
    for number, layer in enumerate(decoder.layers):
        r = x.shape[1]
        mask = torch.full((r, r), float("-inf")).triu(1)[None, None]
        rope = decoder.rotary_emb(x, positions[None])
        x = layer(x, attention_mask=mask, position_embeddings=rope, position_ids=positions[None])
        if number == l:
            x, positions = x[:, stay_behind], positions[stay_behind]
    return model.lm_head(decoder.norm(x))


FIRST = [
    ToDRE(budget=0.3, tau=0.0),
    ToDRE(budget=5, tau=0.0, pivot_layer=2),
    ToDRE(budget=0.5, tau=0.0, objective="kcenter"),
]


@pytest.mark.parametrize("method", FIRST, ids=str)
@pytest.mark.parametrize("images", [1, 3])
def test_the_model_answers_as_on_the_diverse_tokens_alone(llava, method, images):
    prompt = FAMILIES["llava"].prompt(13, seed=4, images=images)
    k = method.budget if isinstance(method.budget, int) else int(16 * method.budget)
    stay = chosen_by_hand(llava, prompt, method, k)
    ours, run = logits(llava, prompt, method)
    assert run.acted and run.kept()[0]["input"] == run.rows[0] == stay
    x = embedded(llava, prompt["input_ids"], prompt["pixel_values"])[:, stay]
    torch.testing.assert_close(ours, decoded(llava, x), atol=5e-5, rtol=1e-4)  # compact positions


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_behind_the_checked_layer_no_visual_row_runs_or_is_cached(llava, layer):
    prompt = FAMILIES["llava"].prompt(11, seed=6, images=2)
    method = ToDRE(budget=0.25, tau=OPEN, check_layer=layer)
    stay = chosen_by_hand(llava, prompt, method, 4)
    ids, n = prompt["input_ids"], prompt["input_ids"].shape[1]
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with method.on(llava) as run:
        out = llava.generate(**prompt, **options)
    text = (ids[0] != IMAGE).nonzero()[:, 0].tolist()
    assert run.kept()[0] | {"input": stay, f"layer {layer + 1}": text} == run.kept()[0]
    cached = [len(run.kept(number)[0][0]) for number in range(4)]
    assert cached == [len(stay) + 4 if number <= layer else n - 32 + 4 for number in range(4)]
    later = llava.get_input_embeddings()(out.sequences[:, n:-1])
    x = torch.cat([embedded(llava, ids, prompt["pixel_values"])[:, stay], later], 1).detach()
    go_on = torch.cat([ids[0, stay] != IMAGE, torch.ones(4, dtype=torch.bool)])
    # later tokens go on from the length that entered, whatever layers drop
    torch.testing.assert_close(
        torch.stack(out.logits, 1), decoded(llava, x, go_on, layer)[:, -5:], atol=5e-5, rtol=1e-4
    )


class Told(ToDRE):
    """Notes its two shares."""

    abstract: ClassVar[bool] = True
    told: ClassVar[dict[int, list[torch.Tensor]]] = {}

    def keep_rows(self, stage):
        self.told[stage.layer - 1] = self.shares(stage)
        return super().keep_rows(stage)


@torch.no_grad()
def shares_by_hand(model, prompt, system: int | None = None) -> dict[int, tuple[float, float]]:
    ids = prompt["input_ids"][0]
    maps = eager(model)(**prompt, output_attentions=True).attentions
    visual = ids == IMAGE
    first = int(visual.nonzero()[0]) if system is None else system
    text = ~visual & (torch.arange(len(ids)) >= first)
    shares = {}
    for layer, A in enumerate(maps[:3]):
        A = A[0].mean(0)
        shares[layer] = (
            float(A[text][:, visual].sum() / A[text].sum()),
            float(A[visual][:, text].sum() / A[visual].sum()),
        )
    return shares


@pytest.mark.parametrize("images, system", [(1, None), (2, None), (2, 2), (1, 0)])
def test_shares_equal_those_of_the_whole_attention_maps(llava, images, system):
    prompt = FAMILIES["llava"].prompt(15, seed=8, images=images)
    logits(llava, prompt, Told(budget=1.0, tau=1e-9, check_layer=(0, 1, 2), system=system))
    for layer, wanted in shares_by_hand(llava, prompt, system).items():
        torch.testing.assert_close([float(share) for share in Told.told[layer]], list(wanted), atol=1e-5, rtol=1e-4)
    # causality: image rows see text only where some text stands in front of them
    text_before = images == 2 or system is not None
    assert all((float(Told.told[layer][1]) > 0) == text_before for layer in range(3))


def test_both_shares_must_be_below_tau(llava):
    prompt = FAMILIES["llava"].prompt(15, seed=8, images=2)
    r_tv, r_vt = shares_by_hand(llava, prompt)[1]
    low, high = sorted((r_tv, r_vt))
    assert high - low > 1e-3
    for tau, drops in ((low * 0.99, False), ((low + high) / 2, False), (high * 1.01, True)):
        _, run = logits(llava, prompt, ToDRE(budget=1.0, tau=tau, check_layer=1))
        assert ("layer 2" in run.kept()[0]) == drops == run.acted


def test_the_first_of_several_checked_layers_that_passes_decides(llava):
    prompt = FAMILIES["llava"].prompt(15, seed=8)
    r_tv = [shares_by_hand(llava, prompt)[layer][0] for layer in range(3)]
    tau = sorted(r_tv)[1] * 1.001  # two layers pass
    passing = [layer for layer in range(3) if r_tv[layer] < tau]
    _, run = logits(llava, prompt, ToDRE(budget=1.0, tau=tau, check_layer=(2, 1, 0)))
    assert [stage for stage in run.kept()[0] if stage.startswith("layer")] == [f"layer {passing[0] + 1}"]


def test_each_sample_of_a_batch_has_its_own_gate(llava):
    family = FAMILIES["llava"]
    prompts = [family.prompt(17, seed=1), family.prompt(6, seed=2, images=2), family.prompt(30, seed=3, images=0)]
    passes = [max(shares_by_hand(llava, prompt)[1]) for prompt in prompts[:2]]
    method = ToDRE(budget=1.0, tau=sum(passes) / 2, check_layer=1)
    together, run = logits(llava, family.pad_left(prompts), method)
    dropped = []
    for i, prompt in enumerate(prompts):
        alone, single = logits(llava, prompt, method)
        dropped.append("layer 2" in single.kept()[0])
        assert run.kept()[i].get("layer 2") == single.kept()[0].get("layer 2")
        torch.testing.assert_close(together[i, -1], alone[0, -1], **family.tolerance)
    assert sorted(dropped[:2]) == [False, True] and not dropped[2]


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "qwen25_vl"])
def test_a_left_padded_batch_gives_what_each_prompt_gives_alone(name):
    family = FAMILIES[name]
    model, prompts = family.tiny(), [family.prompt(17, seed=1), family.prompt(6, seed=2, images=2)]
    prompts.append(family.prompt(30, seed=3, images=0))
    method = ToDRE(budget=0.3, tau=OPEN, check_layer=1)
    together, run = logits(model, family.pad_left(prompts), method)
    for i, prompt in enumerate(prompts):
        alone, single = logits(model, prompt, method)
        wanted = single.kept()[0]
        assert all(run.kept()[i].get(stage) == wanted.get(stage) for stage in ("input", "layer 2"))
        assert ("layer 2" in wanted) == ("pixel_values" in prompt)
        torch.testing.assert_close(together[i, -1], alone[0, -1], **family.tolerance)


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "qwen25_vl"])
def test_the_whole_budget_changes_nothing(name):
    family = FAMILIES[name]
    model, prompt = family.tiny(), family.prompt(11, images=2)
    ours, run = logits(model, prompt, ToDRE(budget=0.2).identity())
    torch.testing.assert_close(ours, logits(model, prompt)[0], **family.tolerance)
    assert not run.acted


def test_a_prompt_without_image_is_left_alone(llava):
    prompt = FAMILIES["llava"].prompt(12, images=0)
    ours, run = logits(llava, prompt, ToDRE(budget=0.1, tau=OPEN, check_layer=1))
    torch.testing.assert_close(ours, logits(llava, prompt)[0], atol=2e-5, rtol=1e-4)
    assert not run.acted


def test_a_prompt_that_ends_with_its_image_keeps_it_between_layers(llava):
    prompt = FAMILIES["llava"].prompt(12)
    stop = int((prompt["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
    prompt |= {name: prompt[name][:, :stop] for name in ("input_ids", "attention_mask")}
    _, run = logits(llava, prompt, ToDRE(budget=1.0, tau=OPEN, check_layer=1))
    assert not run.acted


def test_the_pivot_of_a_tiled_image_comes_from_its_overview_and_newlines_go():
    family = FAMILIES["llava_next"]
    model, prompt = family.tiny(), family.prompt(9, seed=5, images=2)  # of three tiles, and of another number
    ids = prompt["input_ids"][0]
    _, run = logits(model, prompt, ToDRE(budget=1, tau=0.0))
    kept = [column for column in run.kept()[0]["input"] if ids[column] == IMAGE]
    with torch.no_grad():
        tower = eager(model).model.vision_tower(prompt["pixel_values"][:, 0], output_attentions=True)
    best = tower.attentions[-1][:, :, 0, 1:].mean(1).argmax(-1)  # of each overview
    assert kept == [int(columns[0] + patch) for columns, patch in zip(spans(ids), best, strict=True)]


def test_newlines_stay_where_no_patch_goes():
    family = FAMILIES["llava_next"]
    model, prompt = family.tiny(), family.prompt(9, seed=5, images=2)
    small, large = sorted(len(columns) for columns in spans(prompt["input_ids"][0]))
    _, run = logits(model, prompt, ToDRE(budget=large - 12, tau=0.0))
    ids = prompt["input_ids"][0]
    left = [sum(column in run.kept()[0]["input"] for column in columns.tolist()) for columns in spans(ids)]
    assert sorted(left) == [small, large - 12]


def test_a_tower_without_cls_starts_from_the_central_token():
    family = FAMILIES["llava_onevision"]
    model, prompt = family.tiny(), family.prompt(9, seed=5)
    (columns,) = spans(prompt["input_ids"][0])
    inputs: list[torch.Tensor] = []
    decoder = model.model.language_model
    hook = decoder.register_forward_pre_hook(lambda _m, _a, kw: inputs.append(kw["inputs_embeds"]), with_kwargs=True)
    logits(model, prompt)
    hook.remove()
    X = inputs[0][0, columns]
    newline = torch.isclose(X, model.model.image_newline).all(-1)
    assert newline.any()
    patches = (~newline).nonzero()[:, 0]
    wanted = plain_diverse(X[patches], 5, int(central(X[patches])), "maxsum")
    _, run = logits(model, prompt, ToDRE(budget=5, tau=0.0))
    kept = [column for column in run.kept()[0]["input"] if column in columns]
    assert kept == columns[patches[sorted(wanted)]].tolist()


def test_what_the_model_lacks_is_named(llava):
    with pytest.raises(UnsupportedModel, match="vision tower"):
        ToDRE(tau=0.0).on(FAMILIES["llama"].tiny())
    with pytest.raises(UnsupportedModel, match=r"check_layer must be < 3 on this model of 4 layers.*None means \(3,\)"):
        ToDRE().on(llava)
    with pytest.raises(UnsupportedModel, match=r"check_layer must be < 3 .*\(1, 3\)"):
        ToDRE(check_layer=(1, 3)).on(llava)
    with pytest.raises(UnsupportedModel, match=r"pivot_layer must be < the tower's 6 layers, got 6"):
        ToDRE(tau=0.0, pivot_layer=6).on(llava)
    with pytest.raises(UnsupportedModel, match=r"pivot_layer needs a CLS token, which Siglip\w+ has not"):
        ToDRE(tau=0.0, pivot_layer=2).on(FAMILIES["llava_onevision"].tiny())


def test_the_default_layer_is_seven_eighths_of_the_way():
    for L, layer in ((32, 28), (28, 24), (40, 35), (16, 14)):
        assert ToDRE()._checked(L) == (layer,)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"budget": 0}, r"ToDRE\.budget must be"),
        ({"budget": 1.5}, r"share in \(0\.0, 1\.0\], got 1\.5"),
        ({"tau": -0.1}, r"ToDRE\.tau must be >= 0, got -0\.1"),
        ({"objective": "sum"}, r"ToDRE\.objective must be one of 'maxsum', 'kcenter', got 'sum'"),
        ({"check_layer": ()}, r"ToDRE\.check_layer must name at least one layer, got \(\)"),
        ({"check_layer": (1, -1)}, r"ToDRE\.check_layer must be >= 0, got -1"),
        ({"pivot_layer": -1}, r"ToDRE\.pivot_layer must be >= 0, got -1"),
        ({"system": -1}, r"ToDRE\.system must be >= 0, got -1"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ToDRE(**values)


def test_the_text_of_a_method_reads_back():
    for method in (*FIRST, ToDRE(check_layer=(1, 2)), replace(ToDRE(), tau=0.0, check_layer=3)):
        assert Method.parse(str(method)) == method
