"""Questions about images: data of one's own, what stayed of each image, and the comparison on a small model."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from seqwise import cli
from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import MissingExtra, UsageError
from seqwise.lab import seeing
from seqwise.lab.compare import Comparison, Settings
from seqwise.lab.looking import Pictures, Scenes, data_url, encode_pictures, pictures_of, visual_tokens
from seqwise.lab.operations import counted
from seqwise.lab.report import render
from seqwise.lab.seeing import SeeingComparison, comparison
from seqwise.lab.tables import tables
from seqwise.lab.zoo import load_vlm, scenes, sees
from seqwise.methods import AveragePool, FlowCut, FoPru, TransPrune
from seqwise.testing import FAMILIES


@pytest.fixture(scope="module")
def model():
    return scenes.build(0)


@pytest.fixture
def untrained(model, monkeypatch, tmp_path):
    monkeypatch.setenv("SEQWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(seeing, "load_vlm", lambda *args, **kwargs: (model, scenes.processor()))


@pytest.fixture
def own(tmp_path):
    """A file of one's own with two images in a folder beside it."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, one in enumerate(scenes.scenes(2, 5)):
        one.images()[0].save(folder / f"{i}.png")
    lines = [
        {"image": "images/0.png", "question": "is there a circle ?", "answer": "yes", "type": "presence"},
        {
            "image": ["images/0.png", "images/1.png"],
            "question": "<image> and <image> how many objects ?",
            "answer": "two",
        },
        {"image": ["images/0.png", "images/1.png"], "question": "what colour is the cross ?", "answer": "red"},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def line(own, **changes):
    item = {"image": "images/0.png", "question": "is there a circle ?", "answer": "yes"} | changes
    own.write_text(json.dumps({name: value for name, value in item.items() if value is not None}))
    return own


def test_a_file_of_ones_own_has_columns_by_type_and_images_where_the_question_says(own):
    task = Pictures(str(own))
    assert task.types() == ["presence", ""] and len(task.files) == 3
    (first,) = Pictures(str(own), "presence").prompts(None, 9, 0, 0)
    second, third = task.prompts(None, 9, 0, 0)
    assert first.question == "<image> is there a circle ?" and first.facts["line"] == 1
    assert second.question.startswith("<image> and <image> how many")
    assert third.question == "<image> <image> what colour is the cross ?" and len(third.images) == 2
    batch = encode_pictures(scenes.processor(), second)
    assert (
        int((batch["input_ids"] == scenes.processor().image_token_id).sum()) == 128
        and batch["pixel_values"].shape[0] == 2
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image": None}, r"line 1: field 'image' must be a path or a list of paths, got nothing"),
        ({"image": []}, r"field 'image' must be a path or a list of paths, got \[\]"),
        ({"image": "images/9.png"}, r"line 1: field 'image': .*9\.png: No such file"),
        ({"image": "own.jsonl"}, r"field 'image': .*own\.jsonl: not an image that can be read"),
        ({"question": " "}, r"line 1: field 'question' must be a text that is not empty"),
        ({"answer": 3}, r"line 1: field 'answer' must be a text that is not empty, got 3"),
        ({"type": 3}, r"line 1: field 'type' must be a text"),
        ({"question": "<image> <image> ?"}, r"field 'question' has 2 times <image> for 1 images"),
    ],
)
def test_what_cannot_be_used_is_named_with_file_line_and_field(own, changes, says):
    with pytest.raises(UsageError, match=says):
        Pictures(str(line(own, **changes))).types() and Pictures(str(own)).prompts(None, 9, 0, 0)


def test_each_kind_of_scene_is_a_task():
    for kind in ("count", "several", "frames"):
        one = Scenes(kind).prompts(None, 2, 1, 0)[1]
        assert one.question.count("<image>") == len(one.images) and one.answer and one.images[0].size == (48, 48)


@torch.no_grad()
def test_what_stayed_is_told_in_cells_stage_by_stage(model):
    prompt = Scenes("several").prompts(None, 1, 3, 0)[0]
    batch = encode_pictures(scenes.processor(), prompt)
    with (FoPru(budget=0.25) | TransPrune(budget=(0.5,), prune_after=(2,), layers=(1, 2))).on(model) as run:
        model(**batch)
        maps, tokens = pictures_of(run), visual_tokens(run)
    n = len(prompt.images)
    assert [(one["image"], one["tile"], one["rows"], one["columns"]) for one in maps] == [
        (i, 0, 8, 8) for i in range(n)
    ]
    assert tokens == {"input": 16 * n, "layer 2": 8 * n}
    for one in maps:
        first, second = (set(stage["kept"]) for stage in one["stages"])
        assert len(first) == 16 and len(second) == 8 and second < first and max(first) < 64


@torch.no_grad()
def test_a_shortened_tower_and_merged_tokens_are_told_once(model):
    batch = encode_pictures(scenes.processor(), Scenes().prompts(None, 1, 3, 0)[0])
    with FlowCut(budget=16).on(model) as run:
        model(**batch)
        (one,) = pictures_of(run)
        assert [stage["name"] for stage in one["stages"]] == ["tower"] and len(one["stages"][0]["kept"]) == 16
        assert visual_tokens(run) == {"tower": 16, "input": 16}
    with AveragePool(budget=16).on(model) as run:
        model(**batch)
        (stage,) = pictures_of(run)[0]["stages"]
    groups = list(stage["members"].values())
    assert len(groups) == 16 and sorted(cell for group in groups for cell in group) == list(range(64))


@torch.no_grad()
def test_tiles_are_an_overview_and_a_joint_map():
    family = FAMILIES["llava_next"]
    tiled, batch = family.tiny(), family.prompt(12, images=1)
    with FoPru(budget=0.5).on(tiled) as run:
        tiled(**batch)
        maps = pictures_of(run)
    assert [(one["tile"], one["rows"]) for one in maps] == [(0, 4), (1, 4)] and maps[1]["columns"] > 4


def test_small_images_are_enlarged_and_large_ones_reduced():
    for size in ((48, 48), (300, 200), (3000, 20)):
        url = data_url(Image.new("RGB", size))
        assert url.startswith("data:image/png;base64,") and len(url) < 20_000


@pytest.mark.parametrize("name", ["llava", "llama", "qwen25_vl"])
@torch.no_grad()
def test_operations_are_those_of_the_rows_that_ran(name):
    family = FAMILIES[name]
    tiny, batch = family.tiny(), family.prompt(12)
    anatomy = Anatomy.of(tiny)
    with counted(anatomy) as found:
        tiny(**batch)
    n = batch["input_ids"].shape[1]
    assert found.decoder == [[(1, n)]] * 4
    layer = sum(m.weight.numel() for m in anatomy.layers[0].modules() if isinstance(m, torch.nn.Linear))
    decoder = 4 * (2 * n * layer + 4 * n * n * 32 / 2)
    assert found.operations >= decoder and (found.operations == decoder) == (name == "llama")
    if name == "llava":
        weights = sum(m.weight.numel() for m in anatomy.vision.layers[0].modules() if isinstance(m, torch.nn.Linear))
        assert found.operations == decoder + 6 * (2 * 17 * weights + 4 * 17 * 17 * 16)


@pytest.mark.parametrize("name", ["llama", "llava", "internvl"])
@torch.no_grad()
def test_operations_agree_with_those_that_torch_counts(name):
    family = FAMILIES[name]
    tiny, batch = family.tiny(), family.prompt(12)
    tiny.set_attn_implementation("eager")
    anatomy = Anatomy.of(tiny)
    tower = () if anatomy.vision is None else anatomy.vision.layers
    with counted(anatomy) as found, FlopCounterMode(display=False) as counter:
        tiny(**batch)
    layers = [*tower, *anatomy.layers]
    paths = {id(module): path for path, module in tiny.named_modules()}
    flops = counter.get_flop_counts()
    ran = sum(sum(flops[f"{type(tiny).__name__}.{paths[id(layer)]}"].values()) for layer in layers)
    n = batch["input_ids"].shape[1]
    # eager attention computes the whole square, of which a causal kernel needs half
    assert ran == found.operations + len(anatomy.layers) * 2 * n * n * 32


def test_a_vision_language_model_is_compared_by_type_of_question(untrained, tmp_path):
    settings = Settings(model="scenes-vlm", prompts=2, methods=("FoPru", "FlowCut"), budgets=("0.25", "0.5"))
    found = comparison(settings, out=tmp_path / "out.json")
    assert isinstance(found, SeeingComparison) and isinstance(comparison(Settings()), Comparison)
    found.run()
    document = found.document()
    rows = {(row["method"], row["task"]): row for row in document["rows"]}
    assert {task for _, task in rows} == {"presence", "colour", "count", "place", "relation"}
    pruned = rows["FlowCut(budget=0.25)", "count"]
    assert pruned["visual_tokens"] == {"prompt": 64, "tower": 16, "input": 16} and pruned["mode"] == "aware"
    assert rows["FoPru(budget=0.25)", "count"]["operations_ratio"] > pruned["operations_ratio"] > 0
    assert rows["Full()", "count"]["operations_ratio"] == 1 and rows["Full()", "count"]["visual_tokens"] == {
        "prompt": 64
    }
    shown = [one["task"] for one in document["sample"]["pictures"]]
    assert len(shown) == len(set(shown)) and {"colour", "place", "relation"} <= set(shown)
    assert render(document).count("<image id=") == len(shown) and tables(document)
    again = comparison(settings, out=tmp_path / "out.json", resume=True)
    again.run()
    assert again.document()["rows"] == document["rows"] and again.document()["sample"] == document["sample"]


def test_own_images_are_compared(untrained, own, tmp_path, capsys):
    report = tmp_path / "report.html"
    with pytest.raises(SystemExit) as stopped:
        cli.main(
            ["compare", "--model", "scenes-vlm", "--task", str(own), "--method", "FoPru(budget=8)", "--json"]
            + ["--report", str(report)]
        )
    document = json.loads(capsys.readouterr().out)
    assert not stopped.value.code and {row["task"] for row in document["rows"]} == {"presence", str(own)}
    assert "How many" not in report.read_text() and "how many objects ?" in report.read_text()


def test_what_questions_about_images_do_not_have_is_refused(untrained, own):
    with pytest.raises(UsageError, match="--length is for language models"):
        comparison(Settings(model="scenes-vlm", lengths=(512,)))
    with pytest.raises(UsageError, match=r"--task for a vision-language model must be presence, .*, got 'needle'"):
        comparison(Settings(model="scenes-vlm", tasks=("needle",)))
    with pytest.raises(UsageError, match=r"line 1: field 'image'"):
        comparison(Settings(model="scenes-vlm", tasks=(str(line(own, image=None)),)))


def test_a_method_that_cannot_work_fails_alone(untrained, tmp_path):
    methods = ("FoPru(budget=999)", "FoPru(budget=64)", "TransPrune")
    found = comparison(Settings(model="scenes-vlm", prompts=1, methods=methods, tasks=("colour",)))
    found.run()
    rows = {row["method"].partition("(budget=(")[0].removesuffix("()"): row for row in found.document()["rows"]}
    assert rows["FoPru(budget=64)"]["status"] == "ok" and rows["FoPru(budget=64)"]["acted"] is False
    assert "FoPru.budget must be in [1, 64], the visual tokens of an image" in rows["FoPru(budget=999)"]["reason"]
    assert "prune_after" in rows["TransPrune"]["reason"] and found.failed


def test_a_model_tells_whether_it_sees(tmp_path):
    assert sees("scenes-vlm") and not sees(None)
    FAMILIES["llava"].tiny().save_pretrained(tmp_path / "llava")
    FAMILIES["llama"].tiny().save_pretrained(tmp_path / "llama")
    assert sees(tmp_path / "llava") and not sees(tmp_path / "llama")
    with pytest.raises(UsageError, match="cannot load model"):
        load_vlm(tmp_path / "llama")


def test_a_processor_that_lacks_torchvision_is_named(tmp_path, monkeypatch):
    from transformers import AutoProcessor

    FAMILIES["llava"].tiny().save_pretrained(tmp_path / "llava")

    def missing(*args, **kwargs):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", missing)
    with pytest.raises(MissingExtra, match="needs torchvision: pip install torchvision"):
        load_vlm(tmp_path / "llava")
