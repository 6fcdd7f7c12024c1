import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import PromptError, UnsupportedModel
from seqwise.core.method import Method
from seqwise.core.plan import average_share
from seqwise.methods.reduce.vflowopt import (
    VFlowOpt,
    context_relevance,
    hubs,
    importance,
    patch_entropy,
    prune_counts,
    recycle,
    stage_count,
    streamed_context_relevance,
)
from seqwise.testing.families import FAMILIES

IMAGE = 97  # the placeholder token of the families
NAN = float("nan")


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attention(*shape: int, seed: int = 0) -> torch.Tensor:
    """Peaked, so that some columns receive much more than others."""
    return (2 * torch.randn(*shape, shape[-1], generator=draw(seed)) + torch.arange(shape[-1]) % 3).softmax(-1)


# context relevance


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0, 1.7, 3.0])
def test_only_the_rows_of_hubs_vote(t):
    A = attention(3, 17)
    found = context_relevance(A, t)
    for a, c in zip(A, found, strict=True):
        recv = [sum(float(a[i, j]) for i in range(17)) / 17 for j in range(17)]
        G = [j for j in range(17) if recv[j] > t * sum(recv) / 17] or [max(range(17), key=lambda j: recv[j])]
        wanted = [sum(float(a[i, j]) for i in G) / len(G) for j in range(17)]
        assert c.tolist() == pytest.approx(wanted, abs=1e-6)


def test_at_t_zero_all_vote_and_relevance_is_what_is_received():
    A = attention(2, 9)
    assert bool(hubs(A.mean(-2), 0.0).all())
    torch.testing.assert_close(context_relevance(A, 0.0), A.mean(-2))


@pytest.mark.parametrize("t", [9.0, 34.76, 1e6])
def test_where_none_can_pass_the_largest_alone_votes(t):
    A = attention(2, 9)  # recv <= 1, and its mean is 1 / 9
    best = A.mean(-2).argmax(-1)
    assert hubs(A.mean(-2), t).nonzero().tolist() == [[0, best[0]], [1, best[1]]]
    torch.testing.assert_close(context_relevance(A, t), A[torch.arange(2), best])
    assert hubs(torch.ones(4), t).tolist() == [True, False, False, False]


def test_sums_and_means_find_the_same_hubs():
    A = attention(4, 31)
    assert torch.equal(hubs(A.mean(-2), 1.3), hubs(A.sum(-2), 1.3))


@pytest.mark.parametrize("specials, n", [(0, 25), (1, 26), (1, 101)])
@pytest.mark.parametrize("t", [0.0, 1.1, 200.0])
def test_streaming_gives_the_same_without_an_n_by_n_tensor(specials, n, t):
    query, key = torch.randn(2, 2, 3, n, 8, generator=draw(n)).unbind(0)
    A = (query @ key.mT * 0.5).softmax(-1).mean(1)
    wanted = context_relevance(A[:, specials:, specials:], t)
    found = streamed_context_relevance(query, key, t, specials, scaling=0.5)
    torch.testing.assert_close(found, wanted)


def test_padded_patches_neither_vote_nor_count():
    query, key = torch.randn(2, 1, 2, 12, 8, generator=draw(1)).unbind(0)
    live = (torch.arange(12) < 9)[None]
    found = streamed_context_relevance(query, key, 0.5, 1, live=live)
    assert found.shape == (1, 11) and float(found[0, 8:].abs().max()) == 0
    A = (query[:, :, :9] @ key[:, :, :9].mT * 8**-0.5).softmax(-1).mean(1)[:, 1:, 1:]
    recv = A.mean(-2)
    G = (recv > 0.5 * recv.sum() / 11)[0]  # the mean runs over the tower's grid
    torch.testing.assert_close(found[0, :8], A[0, G].mean(0))


# entropy and the map


def entropy_by_hand(pixels: torch.Tensor, patch: int) -> list[float]:
    _, height, width = pixels.shape
    found = []
    for top in range(0, height - patch + 1, patch):
        for left in range(0, width - patch + 1, patch):
            counts: dict[int, int] = {}
            for y in range(top, top + patch):
                for x in range(left, left + patch):
                    grey = round(sum(0.3333 * 255 * float(pixels[c, y, x]) for c in range(3)))
                    counts[grey] = counts.get(grey, 0) + 1
            p = [count / patch**2 for count in counts.values()]
            found.append(-sum(q * math.log2(q + 1e-10) for q in p))
    return found


@pytest.mark.parametrize("height, width, patch", [(8, 12, 4), (10, 7, 3), (5, 5, 5)])
def test_entropy_of_random_patches(height, width, patch):
    pixels = torch.randint(0, 256, (3, height, width), generator=draw(2)).float() / 255
    pixels[:, :4, :4] = pixels[:, :1, :1]
    found = patch_entropy(pixels.expand(2, -1, -1, -1), patch)
    assert found[0].tolist() == pytest.approx(entropy_by_hand(pixels, patch), abs=1e-5)
    assert torch.equal(found[0], found[1])


def test_a_constant_patch_has_no_entropy_and_196_greys_have_the_most():
    assert patch_entropy(torch.full((3, 14, 14), 0.7), 14).tolist() == pytest.approx([0.0], abs=1e-6)
    ramp = (torch.arange(196.0) / 255).view(14, 14).expand(3, -1, -1)
    assert patch_entropy(ramp, 14).tolist() == pytest.approx([math.log2(196)], abs=1e-4)
    assert patch_entropy(torch.full((3, 4, 4), 1.5), 4).tolist() == pytest.approx([0.0], abs=1e-6)  # clamped to white


def test_the_map_adds_the_softmax_of_the_entropy():
    c, H = torch.rand(2, 2, 7, generator=draw(3)).unbind(0)
    e = H.exp() / H.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(importance(c, H, -0.7), c - 0.7 * e)
    assert torch.equal(importance(c, H, 0.0), c)


# counts


def test_counts_of_the_input_and_of_stages():
    assert prune_counts(729, 0.2651, 15.58) == (round(729 * 0.7349), int(729 / 15.58**2)) == (536, 3)
    assert prune_counts(16, 0.5, 5.0) == (8, 0)  # a cell larger than the image
    assert prune_counts(16, 0.5, None) == (8, 0)
    assert prune_counts(16, 1.0, 2.0) == (0, 0)  # what keeps all merges nothing
    assert [stage_count(n, 0.4) for n in (0, 1, 5, 10, 36)] == [0, 1, 2, 4, 14]
    assert stage_count(3, 0.01) == 1 and stage_count(7, 1.0) == 7


# recycling


def recycled_by_hand(x, imp, cell):
    merged, anchor, member = x.clone(), [False] * len(imp), [-1] * len(imp)
    for name in {c for c in cell if c >= 0}:
        group = [j for j in range(len(imp)) if cell[j] == name]
        best = max(group, key=lambda j: (imp[j], -j))
        weight = [max(imp[j], 0.0) for j in group]
        weight = weight if sum(weight) > 0 else [1.0] * len(group)
        merged[best] = sum(w * x[j] for w, j in zip(weight, group, strict=True)) / sum(weight)
        anchor[best] = True
        for j in group:
            member[j] = best
    return merged, anchor, member


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 30), cells=st.integers(1, 9), seed=st.integers(0, 10_000), levels=st.integers(2, 12))
def test_recycling_against_a_loop_over_cells(n, cells, seed, levels):
    random = draw(seed)
    x = torch.randn(n, 5, generator=random)
    imp = torch.randint(-3, levels, (n,), generator=random).float() / 4  # ties, zeros and negative ones
    cell = torch.randint(-1, cells, (n,), generator=random)
    merged, anchor, member = recycle(x, imp, cell)
    wanted = recycled_by_hand(x, imp.tolist(), cell.tolist())
    torch.testing.assert_close(merged, wanted[0])
    assert anchor.tolist() == wanted[1] and member.tolist() == wanted[2]


def test_the_weighted_mass_of_a_cell_is_conserved():
    x, imp = torch.randn(12, 6, generator=draw(4)), torch.rand(12, generator=draw(5))
    cell = torch.arange(12) % 3
    merged, anchor, _ = recycle(x, imp, cell)
    for name in range(3):
        mine = cell == name
        torch.testing.assert_close(merged[anchor & mine][0] * imp[mine].sum(), (imp[mine, None] * x[mine]).sum(0))
    assert anchor.sum() == 3


def test_nothing_to_recycle_and_one_cell_for_all():
    x, imp = torch.randn(6, 2, generator=draw(6)), torch.rand(6, generator=draw(7))
    merged, anchor, member = recycle(x, imp, torch.full((6,), -1))
    assert torch.equal(merged, x) and not anchor.any() and member.tolist() == [-1] * 6
    _, anchor, member = recycle(x, imp, torch.zeros(6, dtype=torch.long))
    assert anchor.nonzero().tolist() == [[int(imp.argmax())]] and set(member.tolist()) == {int(imp.argmax())}


def test_contents_of_tokens_outside_of_cells_do_not_matter():
    x, imp = torch.randn(5, 3, generator=draw(8)), torch.tensor([0.5, NAN, 0.2, 0.3, 0.1])
    x[1] = NAN
    merged, _, _ = recycle(x, imp.nan_to_num(), torch.tensor([-1, -1, 0, 0, 1]))
    assert merged[2:].isfinite().all()


# the class


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


SMALL = VFlowOpt(budget=(0.5, 0.75, 0.5), prune_at=(1, 3), t=1.2, m=2.0, alpha=0.4)


def map_of(model, prompt, method) -> torch.Tensor:
    """imp (T, N) of LLaVA's images, from eager attention."""
    vision = model.model.vision_tower
    vision.set_attn_implementation("eager")
    with torch.no_grad():
        A = vision(prompt["pixel_values"], output_attentions=True).attentions[-2].mean(1)[:, 1:, 1:]
    vision.set_attn_implementation("sdpa")
    pixels = torch.stack([(x - x.min()) / (x.max() - x.min()) for x in prompt["pixel_values"]])
    H = torch.tensor([entropy_by_hand(x, 4) for x in pixels])
    return importance(context_relevance(A, method.t), H, method.alpha)


@pytest.mark.parametrize("m", [2.0, 1.6, 100.0, None])
def test_each_image_is_cut_at_the_input_and_at_the_stages_by_one_map(llava, m):
    method = VFlowOpt(budget=SMALL.budget, prune_at=(1, 3), t=1.2, m=m, alpha=0.4)
    prompt = FAMILIES["llava"].prompt(14, seed=3, images=2)
    places = (prompt["input_ids"][0] == IMAGE).nonzero()[:, 0].view(2, 16).tolist()
    _, run = logits(llava, prompt, method)
    kept, members = run.kept()[0], run.members("input")[0]
    M = int(16 / m**2) if m else 0
    for imp, at in zip(map_of(llava, prompt, method).tolist(), places, strict=True):
        ranked = sorted(range(16), key=lambda j: -imp[j])
        stay, pruned = ranked[: 16 - 8 - M], ranked[16 - 8 - M :]
        cells: dict[tuple[int, int], list[int]] = {}
        for j in pruned if m else ():
            cells.setdefault((int(j // 4 / m), int(j % 4 / m)), []).append(j)
        anchors = {max(group, key=lambda j: imp[j]): sorted(group) for group in cells.values()}
        left = sorted([*stay, *anchors], key=lambda j: -imp[j])
        assert [p for p in kept["input"] if p in at] == sorted(at[j] for j in left)
        for anchor, group in anchors.items():
            assert members[at[anchor]] == [at[j] for j in group]
        for name, r in (("layer 1", 0.75), ("layer 3", 0.5)):
            left = left[: len(left) - round(len(left) * (1 - r))]
            assert [p for p in kept[name] if p in at] == sorted(at[j] for j in left)
    assert run.acted


def test_recycled_tokens_are_means_of_projected_features_weighted_by_the_map(llava):
    prompt = FAMILIES["llava"].prompt(9, seed=5)
    method = VFlowOpt(budget=(0.25,), prune_at=(), t=1.2, m=2.0)
    seen = []
    hook = llava.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        _, run = logits(llava, prompt, method)
    finally:
        hook.remove()
    with torch.no_grad():
        x = llava.model.get_image_features(prompt["pixel_values"]).pooler_output[0]
    imp = map_of(llava, prompt, method)[0]
    first = int((prompt["input_ids"][0] == IMAGE).nonzero()[0])
    merged = [(anchor, group) for anchor, group in run.members("input")[0].items() if len(group) > 1]
    assert merged
    for anchor, group in merged:
        j = torch.tensor(group) - first
        wanted = (imp[j, None] * x[j]).sum(0) / imp[j].sum()
        torch.testing.assert_close(seen[0][0, run.kept()[0]["input"].index(anchor)], wanted, atol=1e-5, rtol=1e-4)


def test_a_cell_as_large_as_the_grid_leaves_one_recycled_token(llava):
    prompt = FAMILIES["llava"].prompt(9, seed=5)
    _, run = logits(llava, prompt, VFlowOpt(budget=(0.25,), prune_at=(), t=1.2, m=4.0))
    (merged,) = [group for group in run.members("input")[0].values() if len(group) > 1]
    assert len(merged) == 12 + 1  # R and M, into one token: the budget of 4 is met
    assert sum(prompt["input_ids"][0, p] == IMAGE for p in run.kept()[0]["input"]) == 4


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "qwen25_vl"])
def test_the_identity_changes_nothing_at_all(name):
    family = FAMILIES[name]
    model, prompt = family.tiny(), family.prompt(20, images=2)
    found, run = logits(model, prompt, VFlowOpt(prune_at=(1, 3), t=1.0, m=2.0).identity())
    torch.testing.assert_close(found, logits(model, prompt)[0], **family.tolerance)
    assert not run.acted


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_newlines_stay_at_the_input_and_no_cell_spans_tiles(name):
    family = FAMILIES[name]
    model, prompt = family.tiny(), family.prompt(20, images=2)
    method = VFlowOpt(budget=(0.2, 0.9), prune_at=(2,), t=1.2, m=2.0)
    facts = {}

    class Watched(VFlowOpt):
        abstract = True

        def cut_input(self, stage):
            keep = super().cut_input(stage)
            facts.update({name: stage.fact(name)[0] for name in ("tile", "row", "column")}, image=stage.image[0])
            facts["imp"] = stage.state["imp"][0]
            return keep

    watched = Watched(budget=method.budget, prune_at=method.prune_at, t=1.2, m=2.0)
    _, run = logits(model, prompt, watched)
    tile, row, column, imp = (facts[name].tolist() for name in ("tile", "row", "column", "imp"))
    newline = [p for p, t in enumerate(tile) if t == 1 and column[p] == -1]
    assert len(newline) > 4 and {imp[p] for p in newline} == {1.0}  # one a line of both images' joint maps
    stay = set(newline)
    for image in (0, 1):
        every = (facts["image"] == image).nonzero()[:, 0].tolist()
        ranked = sorted(set(every) - stay, key=lambda p: (-imp[p], p))
        kept = max(0, len(ranked) - sum(prune_counts(len(every), 0.2, 2.0)))
        cells: dict[tuple[int, int, int], list[int]] = {}
        for p in ranked[kept:]:  # the first of a cell is its most important
            cells.setdefault((tile[p], int(row[p] / 2.0), int(column[p] / 2.0)), []).append(p)
        for group in cells.values():
            assert run.members("input")[0][group[0]] == sorted(group)
        stay |= {*ranked[:kept], *(group[0] for group in cells.values())}
    visual = (facts["image"] >= 0).nonzero()[:, 0].tolist()
    assert [p for p in run.kept()[0]["input"] if p in set(visual)] == sorted(stay)


def test_t_beyond_the_number_of_patches_still_ranks(llava):
    prompt = FAMILIES["llava"].prompt(9, seed=5)
    found, run = logits(llava, prompt, VFlowOpt(prune_at=(1, 3)))  # t = 34.76 of 16 patches
    assert run.acted and found.isfinite().all()


def test_a_negative_alpha_ranks_by_less_entropy_and_merges_without_dividing_by_zero(llava):
    prompt = FAMILIES["llava"].prompt(9, seed=5)
    method = VFlowOpt(budget=(0.25,), prune_at=(), t=1.2, m=2.0, alpha=-1.0)
    assert (map_of(llava, prompt, method) < 0).any()
    found, _ = logits(llava, prompt, method)
    assert found.isfinite().all()


def test_rows_of_a_padded_batch_are_as_alone_also_without_an_image(llava):
    family = FAMILIES["llava"]
    prompts = [family.prompt(20, seed=1), family.prompt(9, seed=2, images=2), family.prompt(12, seed=3, images=0)]
    together, run = logits(llava, family.pad_left(prompts), SMALL)
    for i, prompt in enumerate(prompts):
        alone, single = logits(llava, prompt, SMALL)
        torch.testing.assert_close(together[i, -1], alone[0, -1], **family.tolerance)
        for stage, kept in single.kept()[0].items():
            assert run.kept()[i][stage] == kept
    assert not any(name.startswith(("input", "layer")) for name in run.kept()[2])


def test_positions_are_kept_between_layers(llava):
    prompt = FAMILIES["llava"].prompt(20, seed=1)
    seen = {}

    def watch(layer: int) -> None:
        def hook(_, args, kwargs):
            seen[layer] = kwargs["position_ids"][0].tolist()

        hooks.append(llava.model.language_model.layers[layer].register_forward_pre_hook(hook, with_kwargs=True))

    hooks = []
    with SMALL.on(llava) as run, torch.no_grad():
        for layer in (0, 1, 3):
            watch(layer)  # behind the method's own hooks
        try:
            llava(**prompt)
        finally:
            for hook in hooks:
                hook.remove()
    entered = run.kept()[0]["input"]
    assert seen[0] == list(range(len(entered)))
    for layer in (1, 3):
        assert seen[layer] == [entered.index(p) for p in run.kept()[0][f"layer {layer}"]]


def test_features_without_their_pixels_are_refused(llava):
    prompt = FAMILIES["llava"].prompt(9, seed=5)
    with torch.no_grad(), SMALL.on(llava) as run, run.plain():
        ready = llava.model.get_image_features(prompt.pop("pixel_values"))
    with pytest.raises(PromptError, match="give pixel_values"):
        logits(llava, {**prompt, "mm_encoder_outputs": {"image": ready}}, SMALL)


def test_what_a_model_lacks_is_named(llava):
    with pytest.raises(UnsupportedModel, match=r"prune_at must be < the model's 4 layers, got \(9, 18\)"):
        VFlowOpt().on(llava)
    with pytest.raises(UnsupportedModel, match=r"use alpha=0\.0"):
        VFlowOpt(prune_at=(1, 3), alpha=0.5).on(FAMILIES["qwen25_vl"].tiny())
    with pytest.raises(UnsupportedModel, match="vision tower"):
        VFlowOpt(prune_at=(1, 3)).on(FAMILIES["llama"].tiny())


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"budget": (0.5, 0.5)}, r"VFlowOpt\.budget must have one share for the input and one per stage \(3\)"),
        ({"budget": (0.5, 0.5, 0.0)}, r"VFlowOpt\.budget must be in \(0, 1\], got 0\.0"),
        ({"prune_at": (18, 9)}, r"VFlowOpt\.prune_at must ascend"),
        ({"prune_at": (0, 9)}, r"VFlowOpt\.prune_at must be >= 1, got 0"),
        ({"t": -1.0}, r"VFlowOpt\.t must be >= 0, got -1\.0"),
        ({"m": 0.0}, r"VFlowOpt\.m must be > 0, got 0\.0"),
        ({"alpha": 1.5}, r"VFlowOpt\.alpha must be in \[-1, 1\], got 1\.5"),
    ],
)
def test_bad_settings_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        VFlowOpt(**fields)


def test_it_prints_and_parses():
    assert Method.parse(str(SMALL)) == SMALL and Method.parse(str(VFlowOpt(m=None))) == VFlowOpt(m=None)


# the search space


class Deep:
    """An anatomy of the paper's model, as far as a plan reads it."""

    layers = (None,) * 28

    class vision:
        grid, sized, merge = (27, 27), True, 1


def test_the_bounds_at_25_percent_are_the_papers():
    space = VFlowOpt().search_space(Deep, 0.25)
    wanted = {"r0": (0.25, 0.375), "r1": (0.2 / 0.375, 1), "t": (0, 50), "m": (3, 24), "alpha": (-1, 1)}
    assert list(space) == list(wanted)
    for name, bounds in wanted.items():
        assert space[name] == pytest.approx(bounds)


@settings(max_examples=80, deadline=None)
@given(
    budget=st.floats(0.03, 1.0), u=st.lists(st.floats(0, 1), min_size=8, max_size=8), last=st.integers(1, 39),
    stages=st.integers(0, 4), more=st.integers(1, 10),
)  # fmt: skip
def test_every_point_of_the_space_keeps_to_the_budget(budget, u, last, stages, more):
    layers = last + more
    prune_at = tuple(sorted({max(1, last * (i + 1) // stages) for i in range(stages)}))
    anatomy = type("Shallow", (Deep,), {"layers": (None,) * layers})
    method = VFlowOpt(budget=(0.5,) * (1 + len(prune_at)), prune_at=prune_at, m=None)
    space = method.search_space(anatomy, budget)
    point = {name: low + x * (high - low) for (name, (low, high)), x in zip(space.items(), u, strict=False)}
    for planned in (method.planned(point, anatomy, budget), method.planned({}, anatomy, budget)):
        average = average_share((0, *prune_at), planned.budget, layers)
        assert average <= budget + 2e-4
        assert planned.budget[-1] == 1.0 or average == pytest.approx(budget, abs=4e-4)
    assert planned.budget == pytest.approx((budget, *[1.0] * len(prune_at)), abs=3e-4), "the uniform schedule"


@pytest.mark.parametrize("budget", [0.2, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 1.0])
def test_what_enters_counts_the_recycled_tokens(llava, budget, place):
    """Measured on a grid so small that m divides it seldom; alpha makes the map rank every patch apart."""
    method = VFlowOpt(prune_at=(1, 3), t=1.2, alpha=0.3)
    space = method.search_space(Anatomy.of(llava), budget)
    low, high = space["m"]
    planned = method.planned({"r0": budget, "m": low + place * (high - low)}, Anatomy.of(llava), budget)
    prompt = FAMILIES["llava"].prompt(9, seed=5)
    _, run = logits(llava, prompt, planned)
    entered = sum(int(prompt["input_ids"][0, p] == IMAGE) for p in run.kept()[0]["input"])
    assert entered <= round(16 * budget) and entered >= round(16 * budget) - 1


def test_on_the_papers_grid_recycling_takes_one_token():
    planned = VFlowOpt().planned({"r0": 0.265103, "r1": 0.983343, "t": 34.76, "m": 15.58, "alpha": 0.0}, Deep, 0.25)
    assert planned.budget == pytest.approx((0.265103 - 1 / 729, 0.9833, 0.8700), abs=1e-4)
    whole = VFlowOpt().planned({"r0": 1.0, "r1": 1.0}, Deep, 1.0)
    assert whole == VFlowOpt(budget=(1.0, 1.0, 1.0))


def test_points_outside_are_clipped_and_small_grids_get_a_small_t(llava):
    anatomy = Anatomy.of(llava)
    method = VFlowOpt(prune_at=(1, 3))
    space = method.search_space(anatomy, 0.5)
    assert space["t"] == (0.0, 5.0) and space["m"][1] == pytest.approx(24 / 27 * 4)
    planned = method.planned({"r0": 9.0, "t": 77.0, "m": 0.1, "alpha": -3.0}, anatomy, 0.5)
    assert planned.t == 5.0 and planned.alpha == -1.0 and planned.m == pytest.approx(1.5 / 0.5**0.5, abs=1e-4)
    bare = VFlowOpt(prune_at=(1, 3), m=None).planned({"r0": 9.0}, anatomy, 0.5)
    assert bare.budget[0] == pytest.approx(space["r0"][1], abs=1e-4)
    assert "alpha" not in VFlowOpt(prune_at=(1,), budget=(1.0, 1.0)).search_space(
        Anatomy.of(FAMILIES["qwen25_vl"].tiny()), 0.5
    )
    assert "m" not in VFlowOpt(m=None, prune_at=(1, 3)).search_space(anatomy, 0.5)
