"""The baselines of visual-token pruning: exact counts, even spacing, averages, and FastV against eager attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqwise.core.errors import UnsupportedModel
from seqwise.methods import AveragePool, FastV, FlowCut, RandomTokens, UniformGrid
from seqwise.methods.reduce.baselines import grid_shape, spaced_cells
from seqwise.testing import FAMILIES

IMAGE, N = 97, 16
LLAVA = FAMILIES["llava"]


@given(H=st.integers(1, 40), W=st.integers(1, 40), share=st.floats(0.01, 1))
def test_a_smaller_grid_fits_the_count_and_has_the_proportions(H, W, share):
    count = max(1, int(share * H * W))
    h, w = grid_shape((H, W), count)
    assert 1 <= h <= H and 1 <= w <= W and h * w <= count
    assert (h + 1) * w > count or h == H, "no further row fits"
    assert grid_shape((H, W), H * W) == (H, W)


def test_square_grids_stay_square_where_that_fits():
    assert [grid_shape((8, 8), k) for k in (64, 32, 16, 8, 4, 1)] == [(8, 8), (5, 6), (4, 4), (2, 4), (2, 2), (1, 1)]
    assert grid_shape((3, 9), 12) == (2, 6)


@given(H=st.integers(1, 12), W=st.integers(1, 12), count=st.integers(1, 150))
def test_spaced_cells_are_as_many_as_asked_and_ascend(H, W, count):
    cells = spaced_cells((H, W), count).tolist()
    assert len(cells) == min(count, H * W) and cells == sorted(set(cells)) and cells[0] >= 0 and cells[-1] < H * W


def test_spaced_cells_spread_over_the_grid():
    assert spaced_cells((4, 4), 4).tolist() == [5, 7, 13, 15]
    assert spaced_cells((4, 4), 16).tolist() == list(range(16))


@pytest.mark.parametrize(
    "method", [RandomTokens(budget=0.25), UniformGrid(budget=0.25), AveragePool(budget=4)], ids=str
)
@pytest.mark.parametrize("name", ["llava", "qwen25_vl", "idefics3", "internvl", "llava_next"])
@torch.no_grad()
def test_each_image_keeps_its_share(method, name):
    family = FAMILIES[name]
    model, batch = family.tiny(), family.prompt(12, images=2)
    with method.on(model) as run:
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        kept, facts = run.kept()[0].get("input"), run.segments
    tokens = [int((facts.image[0] == i).sum()) for i in range(2)]
    if kept is None:  # at most as many tokens as the budget
        assert isinstance(method.budget, int) and max(tokens) <= method.budget
        return
    left = [sum(int(facts.image[0, p]) == i for p in kept) for i in range(2)]
    if name == "llava_next":  # a share of the overview and of the joint map, without newline tokens
        assert all(0 < few < n for few, n in zip(left, tokens, strict=True))
        if not isinstance(method, RandomTokens):
            assert all(int(facts.column[0, p]) >= 0 or int(facts.image[0, p]) < 0 for p in kept)
    else:
        wanted = [max(1, int(n * method.budget)) if isinstance(method.budget, float) else min(4, n) for n in tokens]
        assert left == wanted


@torch.no_grad()
def test_random_tokens_depend_on_the_seed_alone():
    model = LLAVA.tiny()
    prompts = [LLAVA.prompt(9, 1), LLAVA.prompt(14, 2)]

    def kept(seed, batch, row):
        with RandomTokens(budget=5, seed=seed).on(model) as run:
            model(**batch)
            facts = run.segments
            cells = facts.row[row] * 4 + facts.column[row]
            visual = facts.visual[row].nonzero()[:, 0]
            base = int(facts.real[row].long().cumsum(-1)[visual[0]]) - 1
            return [int(cells[visual[0] + p - base]) for p in run.kept()[row]["input"] if 0 <= p - base < N]

    alone = [kept(3, prompt, 0) for prompt in prompts]
    both = LLAVA.pad_left(prompts)
    assert alone[0] == alone[1] == kept(3, both, 0) == kept(3, both, 1) and len(alone[0]) == 5
    assert kept(4, prompts[0], 0) != alone[0]


@torch.no_grad()
def test_pooled_tokens_are_the_means_of_their_cells():
    model, batch = LLAVA.tiny(), LLAVA.prompt(10)
    features = torch.cat(list(model.model.get_image_features(batch["pixel_values"]).pooler_output))  # (16, D)
    pooled = features.view(2, 2, 2, 2, -1).mean((1, 3)).flatten(0, 1)  # (4, D)
    ids = batch["input_ids"][0]
    first = int((ids == IMAGE).nonzero()[0])
    rows = model.get_input_embeddings()(ids)
    rows = torch.cat([rows[:first], pooled, rows[first + N :]])
    wanted = model.lm_head(model.model.language_model(inputs_embeds=rows[None]).last_hidden_state)
    with AveragePool(budget=4).on(model) as run:
        torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-5, rtol=1e-4)
        (members,) = run.members("input")
    corners = {first + 2 * (i // 2) * 4 + 2 * (i % 2) for i in range(4)}
    assert set(members) == corners and sorted(p for group in members.values() for p in group) == list(
        range(first, first + N)
    )
    assert members[first] == [first, first + 1, first + 4, first + 5]


@pytest.mark.parametrize("method", [UniformGrid(budget=4), AveragePool(budget=4)], ids=str)
@torch.no_grad()
def test_a_grid_that_the_tower_thinned_is_spaced_or_averaged_over_what_is_left(method):
    model, batch = LLAVA.tiny(), LLAVA.prompt(10)
    first = int((batch["input_ids"][0] == IMAGE).nonzero()[0])
    with (FlowCut(budget=9) | method).on(model) as run:
        model(**batch)
        left, kept, (members,) = set(run.tower_kept[0]), run.kept()[0]["input"], run.members("input")
    cells = [p - first for p in kept if first <= p < first + N]
    assert set(cells) <= left and 1 <= len(cells) <= 4
    if isinstance(method, AveragePool):
        assert {p - first for group in members.values() for p in group} == left
        for group in members.values():
            assert len({((p - first) // 8, (p - first) % 4 // 2) for p in group}) == 1
    else:
        assert cells == [sorted(left)[i] for i in (1, 3, 5, 7)]


@pytest.mark.parametrize("layer", [1, 3])
@torch.no_grad()
def test_fastv_keeps_what_the_last_token_attends_to(layer):
    model, batch = LLAVA.tiny(), LLAVA.prompt(12, images=2)
    model.set_attn_implementation({"text_config": "eager"})
    attention = model(**batch, output_attentions=True).attentions[layer - 1][0, :, -1].mean(0)
    model.set_attn_implementation({"text_config": "sdpa"})
    images = (batch["input_ids"][0] == IMAGE).nonzero()[:, 0].view(2, N)
    wanted = sorted(int(image[i]) for image in images for i in attention[image].topk(5).indices)
    with FastV(budget=5, layer=layer).on(model) as run:
        model(**batch)
        kept = run.kept()[0][f"layer {layer}"]
    assert [p for p in kept if p in images.flatten().tolist()] == wanted


def test_fastv_refuses_layers_that_are_not_there():
    with pytest.raises(UnsupportedModel, match=r"FastV\.layer must be < the model's 4 layers, got 4"):
        FastV(layer=4).on(LLAVA.tiny())
