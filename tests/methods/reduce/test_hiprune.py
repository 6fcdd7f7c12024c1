import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_outputs import BaseModelOutputWithPooling

from seqwise.core.errors import SlotConflict, UnsupportedModel
from seqwise.core.observe import received
from seqwise.core.visible import Visible
from seqwise.methods.reduce.flowcut import FlowCut
from seqwise.methods.reduce.fopru import FoPru
from seqwise.methods.reduce.hiprune import (
    HiPrune,
    add_by_text,
    anchor_count,
    anchors,
    buffers,
    global_attention,
    vote,
)
from seqwise.testing.families import FAMILIES

IMAGE = 97  # the placeholder token of the families


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def best(scores: list[float], k: int, out: set[int] = frozenset()) -> list[int]:
    return sorted((j for j in range(len(scores)) if j not in out), key=lambda j: (-scores[j], j))[:k]


def plain_vote(a_l, a_deep, B, grid, alpha, edges):
    """One image, patch by patch: the kept set and A, the anchors with their buffers."""
    r, c = grid
    N = r * c
    seeds = set()
    for x in best(a_l, min(round(B * alpha / 5), B // 5)):
        seeds.add(x)
        for i, j in ((0, -1), (0, 1), (-1, 0), (1, 0)):
            y, inside = x + i * c + j, 0 <= x // c + i < r and 0 <= x % c + j < c
            if edges == "clamp":
                seeds.add(min(max(y, 0), N - 1))
            elif inside or (edges == "drop" and 0 <= y < N):
                seeds.add(y)
    return sorted(seeds | set(best(a_deep, B - len(seeds), seeds))), seeds


def test_attention_received_counts_all_rows_but_no_cls_column():
    A = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).softmax(-1)
    a = global_attention(A.sum(-2))
    for b in range(2):
        for j in range(7):
            wanted = sum(A[b, h, i, 1 + j] for h in range(3) for i in range(8)) / 24
            torch.testing.assert_close(a[b, j], wanted)
    torch.testing.assert_close(global_attention(A.sum(-2), specials=0), A.mean((1, 2)))


def test_streamed_column_sums_give_what_the_whole_map_gives():  # in several blocks of rows
    q, k = (torch.randn(2, 3, 131, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    A = (q @ k.mT / 8**0.5).softmax(-1)
    streamed = received(q, k, visible=Visible.of(131, 131, causal=False))
    torch.testing.assert_close(global_attention(streamed), A.mean((1, 2))[:, 1:])


@pytest.mark.parametrize(
    "B, alpha, count",
    [(192, 0.1, 4), (128, 0.1, 3), (64, 0.1, 1), (32, 0.1, 1), (24, 0.1, 0), (25, 0.1, 0)]  # 25: half to even
    + [(75, 0.1, 2), (64, 1.0, 12), (13, 1.0, 2), (4, 1.0, 0), (64, 0.0, 0)],
)
def test_anchors_are_a_fifth_of_alpha_b_and_fit_with_their_buffers(B, alpha, count):
    assert anchor_count(B, alpha) == count and 5 * count <= B
    a = draw(2, 576)
    assert anchors(a, B, alpha).tolist() == [sorted(best(row, count)) for row in a.tolist()]


@pytest.mark.parametrize(
    "edges, corner, end, last",
    [
        ("clamp", [0, 1, 0, 4], [2, 4, 0, 7], [10, 11, 7, 11]),  # above the first row stands patch 0, below it N - 1
        ("drop", [0, 1, 0, 4], [2, 4, 3, 7], [10, 11, 7, 11]),  # a row's end still has the next row's start beside it
        ("grid", [0, 1, 0, 4], [2, 3, 3, 7], [10, 11, 7, 11]),
    ],
)
def test_buffers_at_the_edges_of_three_rows_of_four(edges, corner, end, last):
    x = torch.tensor([0, 3, 11])
    assert buffers(x, (3, 4), edges).tolist() == [corner, end, last]
    assert buffers(torch.tensor([5]), (3, 4), edges).tolist() == [[4, 6, 1, 9]]


def test_edges_differ_where_an_anchor_stands_at_one():
    a_l, a_deep = torch.zeros(12), torch.arange(12.0).flip(0)
    a_deep[[0, 4]] = -1.0
    a_l[3] = 1.0  # the end of the first row
    kept = {edges: vote(a_l, a_deep, 6, (3, 4), 1.0, edges).tolist() for edges in ("clamp", "drop", "grid")}
    assert kept == {"clamp": [0, 1, 2, 3, 4, 7], "drop": [1, 2, 3, 4, 5, 7], "grid": [1, 2, 3, 5, 6, 7]}
    assert vote(a_l, a_deep, 6, (3, 4), 1.0).tolist() == kept["clamp"], "the official code's edges are the default"
    a_l[8], a_l[3] = 1.0, 0.0  # the last row: below it stands N - 1, before its start the row above
    kept = {edges: vote(a_l, a_deep - 20, 5, (3, 4), 1.0, edges).tolist() for edges in ("clamp", "drop", "grid")}
    assert kept == {"clamp": [4, 7, 8, 9, 11], "drop": [1, 4, 7, 8, 9], "grid": [1, 2, 4, 8, 9]}


grids = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=120, deadline=None)
@given(
    grid=grids, share=st.floats(0.01, 1.0), alpha=st.floats(0, 1), edges=st.sampled_from(["clamp", "drop", "grid"]),
    seed=st.integers(0, 10_000),
)  # fmt: skip
def test_the_vote_against_sets(grid, share, alpha, edges, seed):
    N = grid[0] * grid[1]
    B = max(1, int(N * share))
    a_l, a_deep = draw(2, N, seed=seed), draw(2, N, seed=seed + 1)
    before = a_deep.clone()
    kept = vote(a_l, a_deep, B, grid, alpha, edges)
    assert kept.shape == (2, B) and torch.equal(a_deep, before)
    for b in range(2):
        wanted, seeds = plain_vote(a_l[b].tolist(), a_deep[b].tolist(), B, grid, alpha, edges)
        assert kept[b].tolist() == wanted and seeds <= set(wanted)


def test_without_anchors_the_output_layer_decides_alone():
    a_l, a_deep = draw(2, 36), draw(2, 36, seed=1)
    assert vote(a_l, a_deep, 9, (6, 6), 0.0).tolist() == [sorted(best(row, 9)) for row in a_deep.tolist()]
    assert vote(a_l, a_deep, 36, (6, 6), 1.0).tolist() == [list(range(36))] * 2
    assert vote(a_l, a_deep, 99, (6, 6), 0.5).tolist() == [list(range(36))] * 2


def test_equal_scores_go_to_the_earlier_patch():
    flat = torch.ones(16)
    assert vote(flat, flat, 7, (4, 4), 1.0).tolist() == [0, 1, 2, 3, 4, 5, 6]  # one anchor, patch 0, with 1 and 4
    assert add_by_text(torch.tensor([3, 9]), torch.ones(16, 2), torch.ones(2), 1.0).tolist() == [0, 1, 3, 9]


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"B": 0}, r"vote: B must be >= 1, got 0"),
        ({"grid": (3, 5)}, r"vote: grid must hold all 16 patches, got 3 x 5"),
    ],
)
def test_bad_arguments_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        vote(**{"a_l": draw(16), "a_deep": draw(16), "B": 4, "grid": (4, 4), **fields})


@pytest.mark.parametrize("beta, more", [(0.0, 0), (0.1, 1), (0.25, 2), (0.35, 4), (9.0, 21)])  # 2.5 -> 2, 3.5 -> 4
def test_text_adds_a_share_of_the_budget_by_cosine(beta, more):
    tokens, text = torch.randn(2, 31, 5, generator=torch.Generator().manual_seed(1)), draw(2, 5, seed=2) - 0.5
    tokens *= draw(2, 31, 1, seed=3) * 9  # lengths have no say
    kept = torch.stack([torch.randperm(31, generator=torch.Generator().manual_seed(b))[:10] for b in range(2)])
    found = add_by_text(kept.sort(-1).values, tokens, text, beta)
    assert found.shape == (2, 10 + more)
    for b in range(2):
        cos = [float(x @ text[b] / (x.norm() * text[b].norm())) for x in tokens[b]]
        own = set(kept[b].tolist())
        assert found[b].tolist() == sorted(own | set(best(cos, more, own)))


# the class, on tiny random models


@pytest.fixture(scope="module")
def llava():
    return FAMILIES["llava"].tiny()


def logits(model, batch, method=None):
    """Logits of one forward, and the run."""
    with torch.no_grad():
        if method is None:
            return model(**batch).logits, None
        with method.on(model) as run:
            return model(**batch).logits, run


def tower_maps(model, pixels: torch.Tensor) -> torch.Tensor:
    """Probabilities (layers, tiles, h, n, n) of the whole tower, by eager attention."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(eager.model.vision_tower(pixels, output_attentions=True).attentions)


def visual(run, prompt, b: int = 0) -> list[int]:
    """Positions of the visual tokens that went on, from the first one of the sample."""
    ids = prompt["input_ids"][b]
    start = int((ids == IMAGE).nonzero()[0])
    return [position - start for position in run.kept()[b]["input"] if ids[position] == IMAGE]


def wanted_patches(model, prompt, method, layer, B):
    """Per tile of a LLaVA prompt, from dense maps: hidden state -2 of six layers is the output of layer index 4."""
    maps = tower_maps(model, prompt["pixel_values"])
    a = maps.mean((2, 3))[..., 1:]  # (layers, tiles, 16)
    return [
        plain_vote(a[layer - 1, t].tolist(), a[4, t].tolist(), B, (4, 4), method.alpha, method.edges)[0]
        for t in range(a.shape[1])
    ]


@pytest.mark.parametrize(
    "method, layer, B",
    [
        (HiPrune(budget=7, layer=1, alpha=0.8), 1, 7),
        (HiPrune(budget=11, alpha=1.0, edges="grid"), 2, 11),  # of six layers, as 9 of 24
        (HiPrune(budget=0.6, layer=5, alpha=1.0, edges="drop"), 5, 10),  # 9.6, rounded
        (HiPrune(budget=0.35), 2, 6),  # 5.6, rounded; no anchor
    ],
    ids=str,
)
def test_the_model_answers_as_on_the_prompt_of_the_tokens_that_stay(llava, method, layer, B):
    prompt = FAMILIES["llava"].prompt(11, seed=4, images=2)
    ids, pixels = prompt["input_ids"][0], prompt["pixel_values"]
    patches = torch.tensor(wanted_patches(llava, prompt, method, layer, B))  # (2, B)
    image = (ids == IMAGE).nonzero()[:, 0].view(2, 16)
    stay = torch.cat([(ids != IMAGE).nonzero()[:, 0], image.gather(1, patches).flatten()]).sort().values
    ours, run = logits(llava, prompt, method)
    assert run.acted and run.kept()[0]["input"] == run.rows[0] == stay.tolist()
    with torch.no_grad():
        features = torch.stack(list(llava.get_image_features(pixels).pooler_output))  # (2, 16, d)
        few = features.gather(1, patches[..., None].expand(-1, -1, features.shape[-1]))
        ready = BaseModelOutputWithPooling(pooler_output=list(few))
        wanted = llava(input_ids=ids[None, stay], mm_encoder_outputs={"image": ready}).logits  # compact positions
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "feature_layer, specials, layer",  # 0-based, beside the 1-based layer of the rule
    [(22, 1, 9), (4, 1, 2), (26, 0, 13), (31, 0, 16), (0, 0, 1)],  # CLIP-L, six CLIP layers, SigLIP, Qwen2.5-VL, one
)
def test_the_object_layer_by_default(feature_layer, specials, layer):
    anatomy = SimpleNamespace(vision=SimpleNamespace(feature_layer=feature_layer, specials=specials))
    assert HiPrune().watched_tower(anatomy) == (layer - 1,)
    assert HiPrune(layer=1).watched_tower(anatomy) == (0,)
    assert HiPrune(alpha=0.0).watched_tower(anatomy) == ()


def test_text_brings_tokens_of_its_own(llava):
    prompt = FAMILIES["llava"].prompt(11, seed=4, images=2)
    ids = prompt["input_ids"][0]
    method = HiPrune(budget=7, layer=1, alpha=0.8, beta=0.3)  # round(2.1) = 2 more
    first = wanted_patches(llava, prompt, method, 1, 7)
    with torch.no_grad():
        tokens = torch.stack(list(llava.get_image_features(prompt["pixel_values"]).pooler_output))  # (2, 16, d)
        text = llava.get_input_embeddings()(ids[ids != IMAGE]).mean(0)
    wanted = []
    for image in range(2):
        cos = torch.nn.functional.cosine_similarity(tokens[image], text, dim=-1).tolist()
        wanted += [16 * image + j for j in sorted({*first[image], *best(cos, 2, set(first[image]))})]
    _, run = logits(llava, prompt, method)
    image = (ids == IMAGE).nonzero()[:, 0]
    assert [p for p in run.kept()[0]["input"] if ids[p] == IMAGE] == image[wanted].tolist()
    other = {**prompt, "input_ids": torch.where(prompt["input_ids"] < 90, prompt["input_ids"] + 3, prompt["input_ids"])}
    assert logits(llava, other, method)[1].kept() != run.kept(), "the question has a say"


@pytest.mark.parametrize("method", [HiPrune().identity(), HiPrune(budget=1.0, alpha=0.5, beta=0.1)], ids=str)
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "qwen25_vl"])
def test_the_whole_budget_changes_nothing(name, method):
    family = FAMILIES[name]
    model, prompt = family.tiny(), family.prompt(11, images=2)
    ours, run = logits(model, prompt, method)
    torch.testing.assert_close(ours, logits(model, prompt)[0], **family.tolerance)
    assert not run.acted


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "qwen25_vl"])
def test_a_left_padded_batch_gives_what_each_prompt_gives_alone(name, share):
    family = FAMILIES[name]
    method = HiPrune(budget=0.5 if share else 2 if name == "qwen25_vl" else 11, layer=1, alpha=1.0, beta=0.2)
    model, prompts = family.tiny(), [family.prompt(17, seed=1), family.prompt(6, seed=2, images=2)]
    prompts.append(family.prompt(30, seed=3, images=0))
    together, run = logits(model, family.pad_left(prompts), method)
    for i, prompt in enumerate(prompts):
        alone, single = logits(model, prompt, method)
        if "pixel_values" in prompt:
            assert single.kept()[0]["input"] == run.kept()[i]["input"]
        torch.testing.assert_close(together[i, -1], alone[0, -1], **family.tolerance)


def test_a_count_is_split_over_the_tiles_of_each_image():
    """Images of three and of five tiles in one batch: the same budget is another count for each of their tiles."""
    family = FAMILIES["llava_next"]
    model, prompt = family.tiny(), family.prompt(9, seed=5, images=2)
    ids, pixels = prompt["input_ids"][0], prompt["pixel_values"]
    method = HiPrune(budget=29, layer=2, alpha=1.0)
    _, run = logits(model, prompt, method)
    kept = set(run.kept()[0]["input"])
    starts = [int(p) for p in (ids == IMAGE).nonzero()[:, 0] if ids[p - 1] != IMAGE]
    for start, tiles, B in zip(starts, (pixels[0, :3], pixels[1]), (9, 5), strict=True):
        of_tile = wanted_patches(model, {"pixel_values": tiles}, method, 2, B)
        assert [patch for patch in range(16) if start + patch in kept] == of_tile[0]
        if B == 9:  # the two tiles side by side, a newline behind each of the four rows; nothing is unpadded
            joint = {16 + (p // 4) * 9 + tile * 4 + p % 4 for tile in (0, 1) for p in of_tile[1 + tile]}
            assert {p - start for p in kept if start + 16 <= p < start + 16 + 36} == joint


def test_images_of_different_size_have_grids_of_their_own():
    """Qwen2.5-VL merges 2 x 2 patches: 16 x 16 and 24 x 16 pixels are 2 x 2 and 3 x 2 tokens; the budget is each's."""
    family = FAMILIES["qwen25_vl"]
    model, prompt = family.tiny(), family.prompt(9, seed=5, images=2)
    ids = prompt["input_ids"][0]
    assert int((ids == IMAGE).sum()) == 4 + 6
    _, run = logits(model, prompt, HiPrune(budget=0.5, layer=1))
    starts = [int(p) for p in (ids == IMAGE).nonzero()[:, 0] if ids[p - 1] != IMAGE]
    kept = [p for p in run.kept()[0]["input"] if ids[p] == IMAGE]
    assert [sum(start <= p < start + 6 for p in kept) for start in starts] == [2, 3]


def test_a_shortened_tower_has_registers_but_no_anchors(llava):
    prompt = FAMILIES["llava"].prompt(7)
    _, run = logits(llava, prompt, HiPrune(budget=6, alpha=0.0) | FlowCut(budget=9))
    _, other = logits(llava, prompt, FoPru(budget=6) | FlowCut(budget=9))
    assert run.kept()[0]["input"] == other.kept()[0]["input"]
    assert len(visual(run, prompt)) == 6 and set(visual(run, prompt)) < set(run.tower_kept[0])
    with pytest.raises(SlotConflict, match=r"HiPrune\(budget=6\) .*FlowCut\(budget=9\)"):
        logits(llava, prompt, HiPrune(budget=6) | FlowCut(budget=9))


def test_what_cannot_work_on_a_model_is_refused(llava):
    with pytest.raises(UnsupportedModel, match="vision tower"):
        HiPrune().on(FAMILIES["llama"].tiny())
    with pytest.raises(UnsupportedModel, match=r"HiPrune\.layer must be <= 5,.*got 6"):
        HiPrune(layer=6).on(llava)


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"budget": 0}, r"HiPrune\.budget must be .*share in \(0\.0, 1\.0\], got 0 "),
        ({"budget": 1.5}, r"HiPrune\.budget must be .*share in \(0\.0, 1\.0\], got 1\.5 "),
        ({"layer": 0}, r"HiPrune\.layer must be >= 1, got 0"),
        ({"alpha": 1.1}, r"HiPrune\.alpha must be in \[0, 1\], got 1\.1"),
        ({"beta": -0.1}, r"HiPrune\.beta must be >= 0, got -0\.1"),
        ({"edges": "wrap"}, r"HiPrune\.edges must be one of 'clamp', 'drop', 'grid', got 'wrap'"),
    ],
)
def test_bad_fields_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        HiPrune(**fields)
