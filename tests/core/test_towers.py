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
from seqwise.core.towers import Tower, TowerLayer
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
            assert run.kept()[0].get("input", list(range(14))) == kept[b]["input"]
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


@pytest.mark.parametrize("method", [Pick(), Prune()], ids=str)
def test_a_tower_with_a_patch_merger_is_refused(method):
    model = FAMILIES["qwen25_vl"].tiny()
    with pytest.raises(
        UnsupportedModel, match=r"its visual features cannot be shortened .*; use a method that acts between"
    ):
        method.on(model).__enter__()
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
