"""Shortened images against the model run by hand: the tower layer by layer, the language model on gathered rows."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import UnsupportedModel
from seqwise.core.method import Method
from seqwise.core.towers import Merged, Tower, TowerLayer
from seqwise.testing import FAMILIES

IMAGE, N = 97, 16  # the placeholder, and the patches of a tile
LLAVA = FAMILIES["llava"]
TILED = ["llava_next", "llava_onevision"]
HEARD: list[torch.Tensor] = []  # what `Listen` was told


@dataclass(frozen=True)
class Pick(Method):
    """Of each tile, every `step`-th patch of those that are left."""

    step: int = 2
    offset: int = 1

    slots: ClassVar[tuple[str, ...]] = ("input.rows",)

    def keep_input(self, tower: Tower) -> torch.Tensor:
        tiles = tower.received().shape[0]
        return torch.arange(self.offset, tower.patches, self.step).expand(tiles, -1)


@dataclass(frozen=True)
class Listen(Method):
    """Keeps all patches and notes the attention that they received."""

    rows: str = "all"

    slots: ClassVar[tuple[str, ...]] = ("input.rows",)

    def keep_input(self, tower: Tower) -> torch.Tensor:
        received = tower.received(self.rows)
        HEARD.append(received)
        return torch.arange(tower.patches).expand(received.shape[0], -1)


@dataclass(frozen=True)
class Prune(Method):
    """Drops the first `drop` patches after tower layers 1 and 3."""

    drop: int = 3

    slots: ClassVar[tuple[str, ...]] = ("tower.rows",)

    def prune_tower(self, layer: TowerLayer) -> torch.Tensor | None:
        n = layer.query.shape[2] - layer.specials
        assert layer.key.shape == layer.value.shape == layer.query.shape
        assert layer.patches == N and layer.grid == (4, 4)
        if layer.index == 0:
            layer.state["place"] = torch.arange(n)[None]
        assert torch.equal(layer.state["place"], torch.arange(N - n, N)[None]), "state goes along with the survivors"
        return torch.arange(self.drop, n)[None] if layer.index in (1, 3) else None


def left_of(method):
    """Patches that stay of every tile."""
    patches = torch.arange(N)
    if isinstance(method, Prune):
        return patches[2 * method.drop :]
    if isinstance(method, Pick):
        return patches[method.offset :: method.step]
    first, second = method.parts  # the tower's first
    return left_of(first)[second.offset :: second.step]


def pruned_features(model, pixels, drop):
    """The tower by hand: (T, left, d) rows of the feature layer that survive, through the projector."""
    vision = Anatomy.of(model).vision
    body = vision.tower
    hidden = body.pre_layrnorm(body.embeddings(pixels))
    for i, layer in enumerate(vision.layers[: vision.feature_layer + 1]):
        out = layer(hidden, attention_mask=None)
        hidden = out[0] if isinstance(out, tuple) else out
        if i in (1, 3) and drop:
            hidden = torch.cat([hidden[:, :1], hidden[:, 1 + drop :]], 1)
    return vision.projector(hidden[:, 1:])


def by_hand(model, batch, method, new):
    """Logits of the prompt's last row and of each new token, the language model run on the rows that stay."""
    ids = batch["input_ids"][0]
    drop = next((part.drop for part in method.parts if isinstance(part, Prune)), 0)
    left = left_of(method)
    features = pruned_features(model, batch["pixel_values"], drop)
    features = features[:, left - 2 * drop].flatten(0, 1)
    visual = ids == IMAGE
    keep = ~visual
    keep[visual] = torch.isin(torch.arange(N), left).repeat(int(visual.sum()) // N)
    rows = model.get_input_embeddings()(ids)
    rows[visual & keep] = features
    rows = torch.cat([rows[keep], model.get_input_embeddings()(new[0])])
    hidden = model.model.language_model(inputs_embeds=rows[None]).last_hidden_state
    return model.lm_head(hidden)[0, -1 - new.shape[1] :], keep.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("method", [Pick(), Pick(step=5, offset=0), Prune(), Prune(drop=7), Prune() | Pick()], ids=str)
@pytest.mark.parametrize("images", [1, 2])
@torch.no_grad()
def test_generation_is_the_language_model_on_the_rows_that_stay(method, images):
    model, batch = LLAVA.tiny(), LLAVA.prompt(12, images=images)
    n = batch["input_ids"].shape[1]
    with method.on(model) as run:
        out = model.generate(
            **batch, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert run.acted
        kept = run.kept()[0]
        cached = [len(kept[f"cache {i}"][0]) for i in range(4)]
    assert torch.equal(out.sequences[:, :n], batch["input_ids"]), "the caller's whole prompt comes back"
    wanted, left = by_hand(model, batch, method, out.sequences[:, n:-1])
    torch.testing.assert_close(torch.cat(out.logits), wanted, **LLAVA.tolerance)
    assert kept["input"] == left and cached == [len(left) + 5] * 4
    assert run.rows == [[n + 4]], "original positions go on behind the whole prompt"


@pytest.mark.parametrize("method", [Pick(), Prune(), Prune() | Pick()], ids=str)
@pytest.mark.parametrize("name", ["llava", *TILED])
@torch.no_grad()
def test_a_padded_batch_is_what_each_prompt_is_alone(name, method):
    family = FAMILIES[name]
    model = family.tiny()
    prompts = [family.prompt(9, 1), family.prompt(20, 2, images=2), family.prompt(14, 3, images=0)]
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with method.on(model) as run:
        together = model.generate(**family.pad_left(prompts), **options)
        kept = run.kept()
    for b, prompt in enumerate(prompts):
        with method.on(model) as run:
            alone = model.generate(**prompt, **options)
            # a text prompt alone never reaches the stage
            assert run.kept()[0].get("input") == kept[b].get("input")
            assert run.acted == (b < 2)
        for got, wanted in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(got[b], wanted[0], **family.tolerance)


@pytest.mark.parametrize("rows", ["all", "cls"])
@torch.no_grad()
def test_attention_received_is_eager_attention_summed(rows):
    model, batch = LLAVA.tiny(), LLAVA.prompt(9, images=2)
    eager = copy.deepcopy(model.model.vision_tower)
    eager.set_attn_implementation("eager")
    vision = Anatomy.of(model).vision
    maps = eager(batch["pixel_values"], output_attentions=True).attentions[vision.feature_layer]  # (T, h, 1 + N, 1 + N)
    HEARD.clear()
    with Listen(rows).on(model):
        model(**batch)
    wanted = maps.sum(-2) if rows == "all" else maps[:, :, 0]
    torch.testing.assert_close(HEARD[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", *TILED])
@torch.no_grad()
def test_keeping_every_patch_changes_nothing(name):
    family = FAMILIES[name]
    model, batch = family.tiny(), family.prompt(12, images=2)
    plain = model(**batch).logits
    for method in (Listen(), Prune(drop=0), Prune(drop=0) | Listen()):
        with method.on(model) as run:
            torch.testing.assert_close(model(**batch).logits, plain, **family.tolerance)
        assert not run.acted
        assert run.rows == [list(range(batch["input_ids"].shape[1]))]


@pytest.mark.parametrize("name", TILED)
@torch.no_grad()
def test_tiles_shrink_each_by_the_same_share_and_newlines_go(name):
    family = FAMILIES[name]
    model, batch = family.tiny(), family.prompt(12)
    entered = int((batch["input_ids"] == IMAGE).sum())
    with Pick(step=2).on(model) as run:
        model(**batch)
        left = run.kept()[0]["input"]
    visual = batch["input_ids"][0] == IMAGE
    dropped = [i for i in range(visual.shape[0]) if i not in left]
    assert all(visual[i] for i in dropped), "only image rows go"
    kept_visual = entered - len(dropped)
    # 16 x 32 pixels: the overview and two tiles of 16 patches each, whole, and the newlines of the grid
    assert kept_visual == 3 * N // 2


@torch.no_grad()
def test_what_the_tower_kept_is_told_per_tile():
    model, batch = LLAVA.tiny(), LLAVA.prompt(12, images=2)
    with Prune(drop=2).on(model) as run:
        model(**batch)
    assert run.tower_kept == [list(range(4, N))] * 2


@torch.no_grad()
def test_later_tower_layers_see_fewer_patches():
    model, batch = LLAVA.tiny(), LLAVA.prompt(12, images=2)
    widths = []
    handles = [
        layer.register_forward_pre_hook(lambda m, args: widths.append(args[0].shape[1]))
        for layer in Anatomy.of(model).vision.layers
    ]
    with Prune(drop=3).on(model):
        model(**batch)
    for handle in handles:
        handle.remove()
    per_tile = [1 + N, 1 + N, N - 2, N - 2, N - 5, N - 5]
    assert widths == per_tile * 2


@torch.no_grad()
def test_plain_and_leaving_restore_the_tower():
    model, batch = LLAVA.tiny(), LLAVA.prompt(12)
    plain = model(**batch).logits
    own = [set(vars(model.model)), set(vars(model.model.vision_tower)), model.model.vision_tower.config]
    with (Prune() | Pick()).on(model) as run:
        assert not torch.equal(model(**batch).logits[:, -1], plain[:, -1])
        with run.plain():
            assert torch.equal(model(**batch).logits, plain)
        assert model(**batch).logits.shape[1] < plain.shape[1]
    assert torch.equal(model(**batch).logits, plain)
    assert own == [set(vars(model.model)), set(vars(model.model.vision_tower)), model.model.vision_tower.config]


@torch.no_grad()
def test_a_failure_in_the_tower_leaves_the_run_usable():
    model, batch = LLAVA.tiny(), LLAVA.prompt(12)
    with Pick().on(model) as run:
        wanted = model(**batch).logits
        with pytest.raises((RuntimeError, ValueError)):
            model(**{**batch, "pixel_values": torch.randn(1, 3, 99, 99)})
        assert torch.equal(model(**batch).logits, wanted) and run.acted


def test_a_tower_with_a_patch_merger_is_not_shortened():
    model = FAMILIES["qwen25_vl"].tiny()
    with pytest.raises(UnsupportedModel, match=r"its vision tower cannot be shortened .*; use a method that acts at"):
        Prune().on(model).__enter__()
    assert "_seqwise_run" not in vars(model) and "generate" not in vars(model)


@torch.no_grad()
def test_a_second_prompt_has_its_own_images():
    model = LLAVA.tiny()
    batches = [LLAVA.prompt(12, 1), LLAVA.prompt(12, 2, images=2), LLAVA.prompt(12, 3, images=0)]
    fresh = []
    for batch in batches:
        with Pick().on(model):
            fresh.append(model(**batch).logits)
    with Pick().on(model):
        for batch, wanted in zip(batches, fresh, strict=True):
            assert torch.equal(model(**batch).logits, wanted)


# towers that join patches


MERGED = ["qwen2_vl", "qwen25_vl", "idefics3", "smolvlm", "internvl"]
SIZED = ["llava", *TILED, "idefics3", "internvl"]
SEEN: list[Tower] = []


@dataclass(frozen=True)
class Best(Method):
    """The first `budget` tokens of each tile by attention received: chosen in the tower, or on the embedded prompt."""

    budget: int = 2
    inside: bool = True

    slots: ClassVar[tuple[str, ...]] = ("input.rows",)

    def watched_tower(self, anatomy):
        return (0,)

    def scores(self, tower):
        return tower.received(layer=0).sum(1)[:, tower.specials :]

    def keep_input(self, tower):
        SEEN.append(tower)
        return self.scores(tower).topk(self.budget).indices.sort(-1).values


@dataclass(frozen=True)
class Carried(Best):
    """The same choice by scores that travel to the language model's rows."""

    def watch_tower(self, tower, run):
        index = Best.keep_input(self, tower)
        return {"best": torch.zeros(tower.projected.shape[:2]).scatter(1, index, 1.0)}

    keep_input = Method.keep_input

    def cut_input(self, stage):
        assert stage.layer == 0 and stage.hidden.shape[:2] == stage.order.shape
        return (stage.state["best"] > 0.5) | ~stage.visual


@pytest.fixture(autouse=True)
def _forget():
    SEEN.clear()


@pytest.mark.parametrize("name", MERGED)
@torch.no_grad()
def test_a_visual_token_is_made_of_its_patches(name):
    family = FAMILIES[name]
    model, batch = family.tiny(), family.prompt(12)
    with Best(budget=1).on(model):
        model(**batch)
    tower, vision = SEEN[0], Anatomy.of(model).vision
    groups = tower.groups[0]
    patches = groups.numel()
    assert (
        tower.merged
        and groups.shape == (tower.patches, 4)
        and sorted(groups.flatten().tolist()) == list(range(patches))
    )
    row = 0

    def only_one_patch(module, args, output):
        out = torch.zeros_like(output)
        out.view(-1, out.shape[-1])[vision.specials + row] = torch.randn(out.shape[-1])
        return out

    handle = vision.layers[-1].register_forward_hook(only_one_patch)
    images = {key: value for key, value in batch.items() if key in ("pixel_values", "image_grid_thw")}
    try:
        for row in range(patches):
            features = torch.cat(list(model.model.get_image_features(**images).pooler_output)).view(tower.patches, -1)
            unlike = [(features - feature).abs().sum(-1).gt(1e-6).sum() == tower.patches - 1 for feature in features]
            assert [t for t, one in enumerate(unlike) if one] == (groups == row).any(-1).nonzero()[:, 0].tolist()
    finally:
        handle.remove()


@pytest.mark.parametrize("name", MERGED)
@torch.no_grad()
def test_attention_received_by_a_token_is_its_patches_mean(name):
    family = FAMILIES[name]
    model, batch = family.tiny(), family.prompt(16, images=2)
    with Best(budget=1).on(model):
        model(**batch)
    for tower in SEEN:
        query, key, _, scaling = tower.layers[0]
        eager = (query @ key.mT * scaling).softmax(-1).sum(-2)  # (T, h, specials + patches)
        groups = tower.groups.expand(query.shape[0], -1, -1)
        wanted = torch.stack([e[:, tower.specials + g].mean(-1) for e, g in zip(eager, groups, strict=True)])
        torch.testing.assert_close(tower.received(layer=0)[..., tower.specials :], wanted)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen25_vl"])
@torch.no_grad()
def test_images_of_other_sizes_are_seen_one_by_one(name):
    family = FAMILIES[name]
    model, batch = family.tiny(), family.prompt(16, images=2)
    with Best(budget=3).on(model) as run:
        model(**batch)
        together, grids, kept = list(SEEN), batch["image_grid_thw"], run.kept()[0]["input"]
        facts = run.segments
    assert [tower.grid for tower in together] == [(h // 2, w // 2) for _, h, w in grids.tolist()] == [(2, 2), (3, 2)]
    starts = [0, int(grids[0].prod()), int(grids.prod(-1).sum())]
    for i, tower in enumerate(together):
        SEEN.clear()
        with Best(budget=3).on(model):
            model.model.get_image_features(batch["pixel_values"][starts[i] : starts[i + 1]], grids[i : i + 1])
        torch.testing.assert_close(SEEN[0].received(), tower.received())
        torch.testing.assert_close(SEEN[0].received(layer=0), tower.received(layer=0))
    visual = (batch["input_ids"][0] == IMAGE).nonzero()[:, 0]
    assert len([p for p in kept if p in visual.tolist()]) == 6
    assert facts.image[0, visual].tolist() == [0] * 4 + [1] * 6
    assert (
        facts.row[0, visual].tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2]
        and facts.column[0, visual].tolist() == [0, 1] * 5
    )


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen25_vl"])
@torch.no_grad()
def test_frames_of_a_video_are_tiles(name):
    family = FAMILIES[name]
    model = family.tiny()
    grid = torch.tensor([[3, 4, 4]])
    ids = torch.tensor([[5, 6, 99, *[98] * 12, 100, 7, 8, 9]])
    video = torch.randn(48, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": video, "video_grid_thw": grid,
        "mm_token_type_ids": (ids == 98).long() * 2,
    }  # fmt: skip
    with Best(budget=2).on(model) as run:
        model.generate(**batch, max_new_tokens=3, do_sample=False)
        kept, facts = run.kept()[0]["input"], run.segments
    (tower,) = SEEN
    assert tower.projected.shape[:2] == (3, 4) and tower.grid == (2, 2)
    assert [sum(3 + 4 * t <= p < 7 + 4 * t for p in kept) for t in range(3)] == [2, 2, 2]
    assert facts.tile[0, 3:15].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    SEEN.clear()
    with Best(budget=2).on(model):
        model.model.get_image_features(video[16:32], torch.tensor([[1, 4, 4]]))
    torch.testing.assert_close(SEEN[0].received(), tower.received()[1:2])


def test_a_masked_patch_gets_no_attention():
    family = FAMILIES["idefics3"]
    model, batch = family.tiny(), family.prompt(12, images=2)
    shown = torch.ones(1, 2, 32, 32, dtype=torch.bool)
    shown[0, 1, :, 16:] = False  # the right half of the second image is padding
    with torch.no_grad(), Best(budget=2).on(model):
        model(**batch, pixel_attention_mask=shown)
    received = SEEN[0].received(layer=0).sum(1)  # (2, 16)
    assert (received[0] > 0).all() and (received[1] > 0).tolist() == [True, True, False, False] * 4
    plain = model(**batch, pixel_attention_mask=shown).logits
    with torch.no_grad(), Best(budget=16).on(model):
        torch.testing.assert_close(model(**batch, pixel_attention_mask=shown).logits, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*SIZED, "qwen25_vl"])
@torch.no_grad()
def test_scores_travel_from_the_tower_to_the_prompts_rows(name):
    family = FAMILIES[name]
    model = family.tiny()
    batch = family.pad_left([family.prompt(9, 1), family.prompt(14, 2, images=2)])
    kept = []
    for method in (Best(budget=2), Carried(budget=2)):
        with method.on(model) as run:
            out = model.generate(**batch, max_new_tokens=4, do_sample=False, num_beams=2)
            kept.append((run.kept()[0]["input"], run.kept()[-1]["input"], out.tolist()))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", TILED)
@torch.no_grad()
def test_a_tiled_images_rows_know_their_place_on_its_joint_map(name):
    family = FAMILIES[name]
    model, batch = family.tiny(), family.prompt(8, images=1)
    with Best(budget=2).on(model) as run:
        model(**batch)
    facts = run.segments
    visual = (batch["input_ids"][0] == IMAGE).nonzero()[:, 0]
    tile, row, column = (getattr(facts, fact)[0, visual] for fact in ("tile", "row", "column"))
    assert tile[:16].eq(0).all() and tile[16:].eq(1).all()
    assert row[:16].tolist() == [i // 4 for i in range(16)] and column[:16].tolist() == [0, 1, 2, 3] * 4
    newline = column == -1
    lines = int(newline.sum())
    width = (len(visual) - 16) // lines
    assert row[16:].tolist() == [i // width for i in range(lines * width)]
    assert column[16:].tolist() == [*range(width - 1), -1] * lines


@dataclass(frozen=True)
class Halves(Method):
    """Two tokens per tile: the means of its first and second half, before the projector or on the embeddings."""

    slots: ClassVar[tuple[str, ...]] = ("input.rows",)

    def keep_input(self, tower):
        T, N = tower.projected.shape[:2]
        patches = tower.features[:, tower.specials :].unflatten(1, (2, -1)).mean(2)
        member = torch.arange(N).div(N // 2, rounding_mode="floor").expand(T, -1)
        return Merged(torch.tensor([[3, 5]]).expand(T, -1), tower.project(patches), member)


@torch.no_grad()
def test_merged_tokens_enter_at_their_cells_and_the_run_tells_whom_they_stand_for():
    model, batch = LLAVA.tiny(), LLAVA.prompt(12, images=2)
    features = pruned_features(model, batch["pixel_values"], 0)
    hidden = {}
    handle = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: hidden.setdefault("x", args[0])
    )
    model(**batch)
    handle.remove()
    merged = model.model.multi_modal_projector(hidden["x"].unflatten(1, (2, 8)).mean(2))  # (2, 2, D)
    assert features.shape == (2, 16, merged.shape[-1])
    ids = batch["input_ids"][0]
    visual = (ids == IMAGE).nonzero()[:, 0].view(2, 16)
    keep = ids != IMAGE
    keep[visual[:, [3, 5]]] = True
    rows = model.get_input_embeddings()(ids)
    rows[visual[:, [3, 5]]] = merged
    wanted = model.lm_head(model.model.language_model(inputs_embeds=rows[keep][None]).last_hidden_state)
    with Halves().on(model) as run:
        torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-5, rtol=1e-4)
    (members,) = run.members("input")
    assert members == {
        int(image[cell]): image[8 * half : 8 * half + 8].tolist()
        for image in visual
        for half, cell in enumerate((3, 5))
    }
    assert run.members("layer 3") == [{}]


@dataclass(frozen=True)
class Average(Method):
    """All visual rows go as one: their mean, at the input or in front of layer 2."""

    at: int = 0
    positions: ClassVar[str] = "keep"
    slots: ClassVar[tuple[str, ...]] = ("input.rows", "layer.rows")

    def merge(self, stage):
        first = stage.visual & (stage.order == torch.where(stage.visual, stage.order, 999).amin(-1, keepdim=True))
        mean = (stage.hidden * stage.visual[..., None]).sum(1, keepdim=True) / stage.visual.sum(-1)[:, None, None]
        into = torch.where(stage.visual, first.long().argmax(-1, keepdim=True), -1)
        stage.replace(torch.where(first[..., None], mean, stage.hidden), into)
        return first | ~stage.visual

    def cut_input(self, stage):
        return self.merge(stage) if self.at == 0 else None

    def stages(self, anatomy):
        return (self.at,) if self.at else ()

    def keep_rows(self, stage):
        return self.merge(stage)


@pytest.mark.parametrize("at", [0, 2])
@torch.no_grad()
def test_rows_may_be_merged_on_their_way(at):
    model, batch = LLAVA.tiny(), LLAVA.prompt(10)
    together = LLAVA.pad_left([batch, LLAVA.prompt(14, 3)])
    with Average(at).on(model) as run:
        alone = model.generate(
            **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        (members,) = run.members("layer 2" if at else "input")
    visual = (batch["input_ids"][0] == IMAGE).nonzero()[:, 0].tolist()
    assert members == {visual[0]: visual}
    with Average(at).on(model) as run:
        both = model.generate(
            **together, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert run.members("layer 2" if at else "input")[0] == members
    torch.testing.assert_close(both.logits[-1][0], alone.logits[-1][0], atol=1e-4, rtol=1e-3)
    rows = model.model.language_model
    embeds = model.get_input_embeddings()(batch["input_ids"])
    embeds[0, visual] = pruned_features(model, batch["pixel_values"], 0)[0]
    if at == 0:
        keep = [i for i in range(embeds.shape[1]) if i not in visual[1:]]
        embeds[0, visual[0]] = embeds[0, visual].mean(0)
        wanted = model.lm_head(rows(inputs_embeds=embeds[:, keep]).last_hidden_state)[0, -1]
        torch.testing.assert_close(alone.logits[0][0], wanted, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_the_tower_knows_its_samples_text_and_its_pixels():
    model = LLAVA.tiny()
    batch = LLAVA.pad_left([LLAVA.prompt(9, 1), LLAVA.prompt(14, 2, images=2)])
    with Best(budget=2).on(model):
        for call in (lambda: model(**batch), lambda: model.generate(**batch, max_new_tokens=1, do_sample=False)):
            SEEN.clear()
            call()
            ids, real = batch["input_ids"], batch["attention_mask"].bool()
            embeds = model.get_input_embeddings()
            means = [embeds(row[m & (row != IMAGE)]).mean(0) for row, m in zip(ids, real, strict=True)]
            torch.testing.assert_close(SEEN[0].text(), torch.stack([means[0], means[1], means[1]]))
            assert torch.equal(SEEN[0].pixels, batch["pixel_values"]) and SEEN[0].tiles.tolist() == [1, 1, 1]


def test_videos_whose_features_are_pooled_are_refused_where_the_tower_is_read():
    model = FAMILIES["llava_onevision"].tiny()
    video = torch.randn(1, 2, 3, 16, 16)
    with torch.no_grad(), Best().on(model), pytest.raises(UnsupportedModel, match="give the frames as images"):
        model.model.get_video_features(video, vision_feature_layer=-1, vision_feature_select_strategy="full")


@dataclass(frozen=True)
class Noted(Method):
    """Drops every second visual row at the input, with its own positions, and half of the rest in front of layer 2 by a
    number that it noted at the input."""

    slots: ClassVar[tuple[str, ...]] = ("input.rows", "layer.rows")
    input_positions: ClassVar[str] = "keep"
    positions: ClassVar[str] = "keep"

    def cut_input(self, stage):
        stage.state["place"] = stage.order.float()
        return ~stage.visual | (stage.order % 2 == 0)

    def stages(self, anatomy):
        return (2,)

    def keep_rows(self, stage):
        assert torch.equal(stage.state["place"][stage.live], stage.order[stage.live].float())
        last = stage.live & (stage.order == stage.order.amax(-1, keepdim=True))
        for received, (query, key, *_), layer in (
            (stage.received, stage.projections(), "coming"),
            (stage.received_before, stage.previous(), "before"),
        ):
            scores = query[:, :, -1:] @ key.repeat_interleave(2, 1).mT * query.shape[-1] ** -0.5
            eager = scores.masked_fill(~stage.live[:, None, None], float("-inf")).softmax(-1)[:, :, 0]
            torch.testing.assert_close(received(last), eager, msg=layer.__add__)
        return ~stage.visual | (stage.order % 4 == 0)


@torch.no_grad()
def test_rows_may_keep_their_positions_and_take_their_notes_along():
    model = LLAVA.tiny()
    prompts = [LLAVA.prompt(10), LLAVA.prompt(15, 3, images=2)]
    alone = []
    for prompt in prompts:
        with Noted().on(model) as run:
            alone.append(model.generate(**prompt, max_new_tokens=4, do_sample=False))
            assert run.kept()[0]["layer 2"] == [
                i for i, token in enumerate(prompt["input_ids"][0]) if token != IMAGE or i % 4 == 0
            ]
    with Noted().on(model) as run:
        both = model.generate(**LLAVA.pad_left(prompts), max_new_tokens=4, do_sample=False)
    assert [row[-4:].tolist() for row in both] == [out[0, -4:].tolist() for out in alone]
    ids = prompts[0]["input_ids"][0]
    places = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: places.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    with Noted().on(model):
        model.generate(**prompts[0], max_new_tokens=2, do_sample=False)
    handle.remove()
    assert places == [[i for i, token in enumerate(ids) if token != IMAGE or i % 2 == 0], [len(ids)]]


@torch.no_grad()
def test_the_last_row_stays_whatever_it_is():
    model, batch = LLAVA.tiny(), LLAVA.prompt(10)
    end = int((batch["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
    batch = {name: x[:, :end] if name != "pixel_values" else x for name, x in batch.items()}
    for method, stage in ((Pick(step=3, offset=0), "input"), (Noted(), "layer 2")):
        with method.on(model) as run:
            model.generate(**batch, max_new_tokens=2, do_sample=False)
            assert run.kept()[0][stage][-1] == end - 1
