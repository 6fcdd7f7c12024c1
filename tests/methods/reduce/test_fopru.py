import copy
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_outputs import BaseModelOutputWithPooling

from seqwise.core.errors import UnsupportedModel, UsageError
from seqwise.core.method import Method
from seqwise.methods.reduce.flowcut import FlowCut
from seqwise.methods.reduce.fopru import FoPru, rank_strategy, row_strategy, significance
from seqwise.testing.families import FAMILIES


def attention(heads: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, heads, n, n, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_significance_of_all_rows_counts_the_cls_row_but_no_cls_column():
    A = attention(heads=3, n=8)
    s = significance(A.sum(-2))
    for b in range(2):
        for j in range(7):
            wanted = sum(A[b, h, i, 1 + j] for h in range(3) for i in range(8)) / 3
            torch.testing.assert_close(s[b, j], wanted)


def test_significance_of_the_cls_row():
    A = attention(heads=3, n=8)
    torch.testing.assert_close(significance(A[..., 0, :]), A[..., 0, 1:].mean(1))


def test_significance_without_special_tokens_keeps_every_column():
    A = attention(heads=2, n=6)
    torch.testing.assert_close(significance(A.sum(-2), specials=0), A.mean(1).sum(-2))


def test_both_strategies_on_a_grid_read_by_eye():
    s = torch.tensor([[1.0, 9.0, 0.0], [4.0, 4.0, 4.0], [0.0, 8.0, 2.0]]).flatten()
    assert rank_strategy(s, 0.25).tolist() == [1, 7]  # floor(0.25 * 9) = 2
    assert row_strategy(s, 0.4, (3, 3)).tolist() == [3, 4, 5]  # floor(0.4 * 3) = 1, sums 10, 12, 10
    assert row_strategy(s, 0.7, (3, 3)).tolist() == [0, 1, 2, 3, 4, 5]  # the tie goes to the earlier row


def test_all_tokens_kept_at_ratio_one():
    s = torch.rand(2, 15, generator=torch.Generator().manual_seed(1))
    for kept in (rank_strategy(s, 1.0), row_strategy(s, 1.0, (3, 5))):
        assert kept.tolist() == [list(range(15))] * 2


def test_at_least_one_token_or_one_row_stays():
    s = torch.rand(2, 15, generator=torch.Generator().manual_seed(2))
    assert rank_strategy(s, 0.002).tolist() == s.argmax(-1, keepdim=True).tolist()
    best = s.view(2, 3, 5).sum(-1).argmax(-1)
    assert row_strategy(s, 0.002, (3, 5)).tolist() == [[5 * r + c for c in range(5)] for r in best.tolist()]


def test_equal_scores_go_to_the_earlier_token():
    assert rank_strategy(torch.ones(9), 0.5).tolist() == [0, 1, 2, 3]
    assert row_strategy(torch.ones(9), 0.7, (3, 3)).tolist() == [0, 1, 2, 3, 4, 5]


def test_row_strategy_refuses_a_grid_that_leaves_a_cls_score_over():
    with pytest.raises(ValueError, match=r"grid must hold all 10 scores, got 3 x 3"):
        row_strategy(torch.rand(10), 0.5, (3, 3))


grids = st.tuples(st.integers(1, 4), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(grid=grids, r=st.floats(0.01, 1.0), seed=st.integers(0, 10_000))
def test_kept_sets_are_the_best_of_their_kind(grid, r, seed):
    H, W = grid
    s = torch.randint(1, 50, (H * W,), generator=torch.Generator().manual_seed(seed)).float()
    rank, row = rank_strategy(s, r), row_strategy(s, r, grid)
    for kept in (rank, row):
        assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(rank) == max(1, int(r * H * W)) and len(row) == W * max(1, int(r * H))
    assert s[rank].sum() == max(s[list(c)].sum() for c in combinations(range(H * W), len(rank)))
    sums = s.view(H, W).sum(-1)
    assert s[row].sum() == max(sums[list(c)].sum() for c in combinations(range(H), len(row) // W))
    assert s[rank_strategy(s, (len(row) + 1e-6) / (H * W))].sum() >= s[row].sum()


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


def dense_attention(model, pixels: torch.Tensor) -> torch.Tensor:
    """Probabilities (tiles, h, n, n) of the tower layer whose output is the feature, by eager attention."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        out = eager.model.vision_tower(pixels, output_attentions=True)
    return out.attentions[eager.config.vision_feature_layer]


BOTH = [
    FoPru(budget=0.3),
    FoPru(budget=0.3, rows="cls"),
    FoPru(budget=0.5, strategy="row"),
    FoPru(budget=0.5, strategy="row", rows="cls"),
    FoPru(budget=0.01, rows="cls"),
]


@pytest.mark.parametrize("method", BOTH, ids=str)
def test_the_model_answers_as_on_the_prompt_of_the_tokens_that_stay(llava, method):
    prompt = FAMILIES["llava"].prompt(11, seed=4, images=2)
    ids, pixels = prompt["input_ids"][0], prompt["pixel_values"]
    A = dense_attention(llava, pixels)
    s = significance(A.sum(-2) if method.rows == "all" else A[..., 0, :])
    patches = rank_strategy(s, method.budget) if method.strategy == "rank" else row_strategy(s, method.budget, (4, 4))
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


@pytest.mark.parametrize("strategy", ["rank", "row"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_the_whole_budget_changes_nothing(name, strategy):
    family = FAMILIES[name]
    model, prompt = family.tiny(), family.prompt(11, images=2)
    ours, run = logits(model, prompt, FoPru(strategy=strategy).identity())
    torch.testing.assert_close(ours, logits(model, prompt)[0], **family.tolerance)
    assert not run.acted


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_a_left_padded_batch_gives_what_each_prompt_gives_alone(name):
    family = FAMILIES[name]
    model, prompts = family.tiny(), [family.prompt(17, seed=1), family.prompt(6, seed=2, images=2)]
    prompts.append(family.prompt(30, seed=3, images=0))
    together, run = logits(model, family.pad_left(prompts), FoPru(budget=0.3))
    for i, prompt in enumerate(prompts):
        alone, single = logits(model, prompt, FoPru(budget=0.3))
        if "pixel_values" in prompt:
            assert single.kept()[0]["input"] == run.kept()[i]["input"]
        torch.testing.assert_close(together[i, -1], alone[0, -1], **family.tolerance)


def test_tiles_are_pruned_apart_and_newline_rows_go():
    family = FAMILIES["llava_next"]
    model, prompt = family.tiny(), family.prompt(9, seed=5)  # 16 x 32 px: the overview and two tiles, nothing unpadded
    ids = prompt["input_ids"][0]
    _, run = logits(model, prompt, FoPru(budget=0.25))
    start = int((ids == IMAGE).nonzero()[0])
    kept = [position - start for position in run.kept()[0]["input"] if ids[position] == IMAGE]
    expected = []
    patches = rank_strategy(significance(dense_attention(model, prompt["pixel_values"][0]).sum(-2)), 0.25)
    for tile, of_tile in enumerate(patches.tolist()):
        for patch in of_tile:
            r, c = divmod(patch, 4)
            # the overview comes first; then rows of two tiles side by side, with a newline behind each
            expected.append(patch if tile == 0 else 16 + r * 9 + (tile - 1) * 4 + c)
    assert len(kept) == 12 and kept == sorted(expected)


def test_generation_continues_from_the_whole_prompt_and_caches_only_what_stays(llava):
    prompt = FAMILIES["llava"].prompt(11, seed=4)
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with FoPru(budget=0.25).on(llava) as run:
        out = llava.generate(**prompt, **options)
    n = prompt["input_ids"].shape[1]
    assert out.sequences[:, :n].equal(prompt["input_ids"]) and out.sequences.shape[1] == n + 5
    assert [len(run.kept(layer)[0][0]) for layer in range(4)] == [n - 12 + 4] * 4
    whole = {**prompt, "input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
    forward, _ = logits(llava, whole, FoPru(budget=0.25))  # later tokens do not change what stays
    torch.testing.assert_close(torch.stack(out.logits, 1), forward[:, -6:-1], atol=5e-5, rtol=1e-4)


def test_a_prompt_without_image_is_left_alone(llava):
    prompt = FAMILIES["llava"].prompt(12, images=0)
    ours, run = logits(llava, prompt, FoPru(budget=0.1))
    torch.testing.assert_close(ours, logits(llava, prompt)[0], atol=2e-5, rtol=1e-4)
    assert not run.acted


def test_what_the_model_lacks_is_named():
    with pytest.raises(UnsupportedModel, match="vision tower"):
        FoPru().on(FAMILIES["llama"].tiny())
    with pytest.raises(UnsupportedModel, match=r"FoPru\(.*rows='cls'\).*CLS token"):
        FoPru(rows="cls").on(FAMILIES["llava_onevision"].tiny())


def test_whole_rows_of_a_pruned_tower_are_refused_and_ranking_goes_on_from_what_is_left(llava):
    prompt = FAMILIES["llava"].prompt(7)
    with pytest.raises(UsageError, match=r"needs whole rows, but the tower was pruned; use strategy='rank'"):
        logits(llava, prompt, FoPru(strategy="row") | FlowCut(budget=8))
    _, run = logits(llava, prompt, FoPru(budget=0.5) | FlowCut(budget=8))
    start = int((prompt["input_ids"][0] == IMAGE).nonzero()[0])
    kept = [p - start for p in run.kept()[0]["input"] if prompt["input_ids"][0, p] == IMAGE]
    assert len(kept) == 4 and set(kept) < set(run.tower_kept[0])


@pytest.mark.parametrize("budget", [0, -0.5, 1.5, True])
def test_bad_budgets_are_refused(budget):
    with pytest.raises(
        ValueError, match=r"FoPru\.budget must be .*share in \(0\.0, 1\.0\].*visual tokens kept of each tile"
    ):
        FoPru(budget=budget)


@pytest.mark.parametrize("strategy", ["rank", "row"])
def test_a_whole_number_counts_tokens(llava, strategy):
    prompt = FAMILIES["llava"].prompt(7)
    _, run = logits(llava, prompt, FoPru(budget=5, strategy=strategy))
    vision = llava.config.vision_config
    width = vision.image_size // vision.patch_size
    visual = [p for p in run.kept()[0]["input"] if prompt["input_ids"][0, p] == IMAGE]
    assert len(visual) == (5 if strategy == "rank" else max(1, 5 // width) * width)
