import copy
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_outputs import BaseModelOutputWithPooling

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import SlotConflict, UnsupportedModel
from seqwise.methods.reduce.flowcut import FlowCut
from seqwise.methods.reduce.fopru import FoPru
from seqwise.methods.reduce.vtc_cls import VTCCLS, cls_score, keep_patches
from seqwise.testing.families import FAMILIES

IMAGE = 97  # the placeholder token of the families


def attention(*shape: int, seed: int = 0) -> torch.Tensor:
    """Probabilities (*shape, n, n) over n = shape[-1] tokens."""
    return torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(seed)).softmax(-1)


def plain_score(maps: list[torch.Tensor], specials: int) -> list[float]:
    """Over layers (h, n, n): the sum of the head means of the CLS row, token by token."""
    h, n, _ = maps[0].shape
    return [sum(sum(float(A[i, 0, j]) for i in range(h)) / h for A in maps) for j in range(specials, n)]


@pytest.mark.parametrize("specials", [1, 5])  # CLS alone, and CLS with four registers behind it
def test_the_score_is_the_cls_row_without_the_columns_that_are_no_patches(specials):
    A = attention(3, 2, 4, 11)  # three layers, two images, four heads
    s = cls_score(A[..., 0, :], specials)
    for b in range(2):
        torch.testing.assert_close(s[b], torch.tensor(plain_score(list(A[:, b]), specials)))
    assert (s.sum(-1) < 3).all()  # nothing was normalised anew


def test_one_layer_is_its_head_mean_and_heads_have_no_order():
    A = attention(3, 2, 4, 11, seed=1)[..., 0, :]
    torch.testing.assert_close(cls_score(A[-1:]), A[-1, ..., 1:].mean(-2))
    torch.testing.assert_close(cls_score(A[:, :, [2, 0, 3, 1]]), cls_score(A))


def test_patches_read_by_eye():
    s = torch.tensor([[0.1, 0.4, 0.4, 0.0, 0.9], [0.2, 0.2, 0.2, 0.2, 0.2]])
    assert keep_patches(s, 2).tolist() == [[1, 4], [0, 1]]  # the earlier of two equals
    assert keep_patches(s, 9).tolist() == [[0, 1, 2, 3, 4]] * 2
    with pytest.raises(ValueError, match=r"keep_patches: U must be >= 1, got 0"):
        keep_patches(s, 0)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 9), U=st.integers(1, 9), seed=st.integers(0, 10_000))
def test_kept_patches_are_the_best_set_in_raster_order(n, U, seed):
    s = torch.randint(1, 40, (n,), generator=torch.Generator().manual_seed(seed)).float()
    kept = keep_patches(s, U)
    assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == min(U, n)
    assert s[kept].sum() == max(s[list(c)].sum() for c in combinations(range(n), len(kept)))


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


@pytest.mark.parametrize("start", [None, 0, 2, 4])
def test_the_sum_runs_from_start_to_the_feature_layer(llava, start):
    prompt = FAMILIES["llava"].prompt(11, seed=4)
    maps = tower_maps(llava, prompt["pixel_values"])
    assert maps.shape[0] == 6 and Anatomy.of(llava).vision.feature_layer == 4  # hidden state -2 of six layers
    first = 4 if start is None else start
    s = torch.tensor(plain_score([A[0] for A in maps[first:-1]], 1))
    _, run = logits(llava, prompt, VTCCLS(budget=5, start=start))
    assert visual(run, prompt) == s.argsort(descending=True)[:5].sort().values.tolist()


@pytest.mark.parametrize("layers, feature, first", [(24, -2, 16), (6, -2, 4), (24, -1, 16), (3, -2, 1), (2, -2, 0)])
def test_the_default_begins_at_two_thirds_of_the_tower(layers, feature, first):
    anatomy = SimpleNamespace(vision=SimpleNamespace(feature_layer=layers + feature))
    assert VTCCLS().watched_tower(anatomy) == tuple(range(first, layers + feature))  # the feature layer is seen anyway


def test_one_layer_is_the_plain_rule(llava):
    prompt = FAMILIES["llava"].prompt(9, seed=5, images=2)
    ours, run = logits(llava, prompt, VTCCLS(budget=0.3, start=4))
    theirs, other = logits(llava, prompt, FoPru(budget=0.3, rows="cls"))
    assert run.kept() == other.kept() and torch.equal(ours, theirs)


def test_the_question_has_no_say(llava):
    one, two = FAMILIES["llava"].prompt(13, seed=4), FAMILIES["llava"].prompt(13, seed=9)
    two["pixel_values"] = one["pixel_values"]
    assert not one["input_ids"].equal(two["input_ids"])
    kept = [visual(logits(llava, prompt, VTCCLS(budget=6, start=2))[1], prompt) for prompt in (one, two)]
    assert kept[0] == kept[1] and len(kept[0]) == 6


def test_the_model_answers_as_on_the_prompt_of_the_tokens_that_stay(llava):
    prompt = FAMILIES["llava"].prompt(11, seed=4, images=2)
    ids, pixels = prompt["input_ids"][0], prompt["pixel_values"]
    patches = keep_patches(cls_score(tower_maps(llava, pixels)[2:5, ..., 0, :]), 7)  # (2, 7)
    image = (ids == IMAGE).nonzero()[:, 0].view(2, 16)
    stay = torch.cat([(ids != IMAGE).nonzero()[:, 0], image.gather(1, patches).flatten()]).sort().values
    ours, run = logits(llava, prompt, VTCCLS(budget=7, start=2))
    assert run.acted and run.kept()[0]["input"] == run.rows[0] == stay.tolist()
    with torch.no_grad():
        features = torch.stack(list(llava.get_image_features(pixels).pooler_output))  # (2, 16, d)
        few = features.gather(1, patches[..., None].expand(-1, -1, features.shape[-1]))
        ready = BaseModelOutputWithPooling(pooler_output=list(few))
        wanted = llava(input_ids=ids[None, stay], mm_encoder_outputs={"image": ready}).logits  # compact positions
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
@pytest.mark.parametrize("method", [VTCCLS().identity(), VTCCLS(budget=1.0, start=1)], ids=str)
def test_the_whole_budget_changes_nothing(name, method):
    family = FAMILIES[name]
    model, prompt = family.tiny(), family.prompt(11, images=2)
    ours, run = logits(model, prompt, method)
    torch.testing.assert_close(ours, logits(model, prompt)[0], **family.tolerance)
    assert not run.acted


@pytest.mark.parametrize("method", [VTCCLS(budget=0.3, start=2), VTCCLS(budget=11, start=2)], ids=str)
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_a_left_padded_batch_gives_what_each_prompt_gives_alone(name, method):
    family = FAMILIES[name]
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
    assert pixels.shape[1] == 5
    scores = [cls_score(tower_maps(model, tiles)[2:5, ..., 0, :]) for tiles in (pixels[0, :3], pixels[1])]
    _, run = logits(model, prompt, VTCCLS(budget=16, start=2))
    kept = set(run.kept()[0]["input"])
    starts = [int(p) for p in (ids == IMAGE).nonzero()[:, 0] if ids[p - 1] != IMAGE]
    for start, s, count in zip(starts, scores, (5, 3), strict=True):
        overview = [patch for patch in range(16) if start + patch in kept]
        assert overview == keep_patches(s[0], count).tolist()
    # the first image's two tiles side by side, a newline behind each of the four rows; nothing is unpadded
    best = keep_patches(scores[0], 5)
    joint = {16 + (p // 4) * 9 + tile * 4 + p % 4 for tile in (0, 1) for p in best[1 + tile].tolist()}
    assert {p - starts[0] for p in kept if starts[0] + 16 <= p < starts[0] + 16 + 36} == joint
    _, run = logits(model, prompt, VTCCLS(budget=2, start=2))
    overviews = [sum(start + patch in run.kept()[0]["input"] for patch in range(16)) for start in starts]
    assert overviews == [1, 1], "at least one patch of each tile stays"


def test_a_shortened_tower_can_only_be_ranked_by_its_feature_layer(llava):
    prompt = FAMILIES["llava"].prompt(7)
    _, run = logits(llava, prompt, VTCCLS(budget=4, start=4) | FlowCut(budget=8))
    _, other = logits(llava, prompt, FoPru(budget=4, rows="cls") | FlowCut(budget=8))
    assert run.kept()[0]["input"] == other.kept()[0]["input"]
    assert len(visual(run, prompt)) == 4 and set(visual(run, prompt)) < set(run.tower_kept[0])
    with pytest.raises(SlotConflict, match=r"VTCCLS\(budget=4, start=3\) .*FlowCut\(budget=8\)"):
        logits(llava, prompt, VTCCLS(budget=4, start=3) | FlowCut(budget=8))


def test_what_a_model_lacks_is_named_with_what_to_use_instead(llava):
    with pytest.raises(UnsupportedModel, match="vision tower"):
        VTCCLS().on(FAMILIES["llama"].tiny())
    for name in ("llava_onevision", "qwen25_vl"):
        with pytest.raises(UnsupportedModel, match=r"VTCCLS\(.*needs a CLS token.*FoPru\(rows='all'\)"):
            VTCCLS().on(FAMILIES[name].tiny())
    with pytest.raises(UnsupportedModel, match=r"VTCCLS\.start must be <= 4,.*got 5"):  # the last layer is not read
        VTCCLS(start=5).on(llava)


@pytest.mark.parametrize("fields", [{"budget": 0}, {"budget": 1.5}, {"budget": True}])
def test_bad_budgets_are_refused(fields):
    with pytest.raises(ValueError, match=r"VTCCLS\.budget must be .*share in \(0\.0, 1\.0\].*kept per image"):
        VTCCLS(**fields)


def test_a_bad_start_is_refused():
    with pytest.raises(ValueError, match=r"VTCCLS\.start must be >= 0, got -1"):
        VTCCLS(start=-1)
