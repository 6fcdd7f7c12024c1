"""Questions about images: prompts, tasks, and what stayed of each image, stage by stage."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from seqwise.core.config import param
from seqwise.core.errors import MissingExtra, UsageError
from seqwise.core.prepare import prepare
from seqwise.core.run import Run
from seqwise.core.segments import Segments
from seqwise.lab.tasks import Answering, Better, Output, Prompt, answered, form_of, json_lines, text_field

IMAGE = "<image>"


@dataclass(frozen=True)
class Pictured(Prompt):
    """A question about images; `question` holds "<image>" where each of them stands."""

    images: tuple[Any, ...] = ()  # PIL images


def encode_pictures(processor: Any, prompt: Pictured) -> dict[str, Tensor]:
    """What the model takes for the prompt: ids (1, n), pixels and what else its processor makes."""
    texts = prompt.question.split(IMAGE)
    content: list[dict[str, Any]] = [{"type": "text", "text": texts[0].strip()}] if texts[0].strip() else []
    for image, text in zip(prompt.images, texts[1:], strict=True):
        content.append({"type": "image", "image": image})
        if text.strip():
            content.append({"type": "text", "text": text.strip()})
    batch, _ = prepare(processor, [{"role": "user", "content": content}])
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Looking(Answering):
    """A question about images with one right answer."""

    abstract: ClassVar[bool] = True
    metrics: ClassVar[Mapping[str, Better]] = {"accuracy": "higher"}
    max_new_tokens: ClassVar[int] = 16
    sized: ClassVar[bool] = False

    def score(self, prompt: Prompt, output: Output) -> dict[str, float]:
        return {"accuracy": float(answered(output.text, prompt.answer))}


Kind = Literal["presence", "colour", "count", "place", "relation", "several", "frames"]
KINDS: tuple[Kind, ...] = ("presence", "colour", "count", "place", "relation")


@dataclass(frozen=True)
class Scenes(Looking):
    """Drawn scenes of coloured shapes (`lab.zoo.scenes`). kind: of the question; "several": of all kinds, one of two to
    four images matters; "frames": these follow one another without text."""

    kind: Kind = "colour"

    name: ClassVar[str] = "scenes"
    max_new_tokens: ClassVar[int] = 2

    def prompts(self, tokenizer: Any, n: int, seed: int, length: int) -> list[Prompt]:
        _pillow()
        from seqwise.lab.zoo import scenes

        if self.kind == "several":
            examples = scenes.multi(n, seed)
        elif self.kind == "frames":
            examples = scenes.frames(n, seed)
        else:
            examples = scenes.scenes(n, seed, (self.kind,))
        return [
            Pictured("", one.prompt, one.answer, facts={"relevant": one.relevant}, images=tuple(one.images()))
            for one in examples
        ]


@dataclass(frozen=True)
class Pictures(Looking):
    """Questions of your own: a JSON Lines file whose lines have `image` (a path, or a list of them, relative to the
    file), `question`, `answer` and, if you like, `type`, which makes a table column of its own.

    "<image>" in the question says where an image stands; without it images come first. Raises UsageError with file,
    line and field for a line that is not so, or an image that cannot be read.
    """

    path: str = param(doc="a .jsonl file")
    kind: str = param("", doc="the lines of this type alone")

    name: ClassVar[str] = "pictures"

    @property
    def files(self) -> tuple[str, ...]:
        """The file and its images."""
        found = [self.path]
        for _, where, item in _lines(self.path):
            found += map(str, _paths(self.path, where, item))
        return tuple(dict.fromkeys(found))

    def types(self) -> list[str]:
        """The types of the file's lines, in order of appearance; "" where a line has none."""
        return list(dict.fromkeys(_type(where, item) for _, where, item in _lines(self.path)))

    def prompts(self, tokenizer: Any, n: int, seed: int, length: int) -> list[Prompt]:
        lines = [line for line in _lines(self.path) if _type(*line[1:]) == self.kind]
        return [self._prompt(*line) for line in lines[:n]]

    def _prompt(self, number: int, where: str, item: dict[str, Any]) -> Prompt:
        question, answer = (text_field(where, item, name) for name in ("question", "answer"))
        images = tuple(_open(where, path) for path in _paths(self.path, where, item))
        asked = question.count(IMAGE)
        if asked and asked != len(images):
            raise UsageError(f"{where}: field 'question' has {asked} times {IMAGE} for {len(images)} images")
        text = question if asked else " ".join([*[IMAGE] * len(images), question])
        return Pictured("", text, answer, facts={"line": number}, images=images)


@lru_cache(maxsize=4)
def _lines(path: str) -> list[tuple[int, str, dict[str, Any]]]:
    return list(json_lines(path, form_of(("image", "question", "answer"))))


def _type(where: str, item: Mapping[str, Any]) -> str:
    return text_field(where, item, "type") if "type" in item else ""


def _paths(file: str, where: str, item: Mapping[str, Any]) -> list[Path]:
    value = item.get("image")
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        got = "nothing" if "image" not in item else repr(value)
        raise UsageError(f"{where}: field 'image' must be a path or a list of paths, got {got}")
    return [Path(file).expanduser().parent / Path(name).expanduser() for name in names]


def _open(where: str, path: Path) -> Any:
    Image = _pillow()
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        told = getattr(error, "strerror", None) or "not an image that can be read"
        raise UsageError(f"{where}: field 'image': {path}: {told}") from None


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra("images need Pillow: pip install pillow") from None
    return Image


# what stayed


def visual_tokens(run: Run) -> dict[str, int]:
    """Visual tokens of the last prompt that were left behind each stage that cut some."""
    segments = run.segments
    if segments is None:
        return {}
    visual = {i for i, is_visual in enumerate(_by_position(segments, "type")) if is_visual == 2}
    left = {"tower": sum(map(len, run.tower_kept))} if run.tower_kept else {}
    return left | {stage: sum(p in visual for p in kept) for stage, kept in _stages(run)}


def _stages(run: Run) -> Iterable[tuple[str, list[int]]]:
    found = run.kept()
    return [(name, kept) for name, kept in (found[0].items() if found else ()) if not name.startswith("cache ")]


def pictures_of(run: Run) -> list[dict[str, Any]]:
    """What stayed of the last prompt's first sample, per map of visual tokens (an image, an overview, a joint map of
    tiles, a frame): `image`, `tile`, `rows`, `columns`, and `stages`: name, kept cells and, where tokens were merged,
    the cells that each stands for. Empty where the cells are unknown."""
    segments = run.segments
    if segments is None or not segments.has("row"):
        return []
    facts = {name: _by_position(segments, name) for name in ("image", "tile", "row", "column")}
    maps: dict[tuple[int, int], dict[int, int]] = {}  # (image, tile) -> original position -> place in raster order
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    for p, (image, tile, row, column) in enumerate(zip(*facts.values(), strict=True)):
        if image >= 0 and row >= 0 and column >= 0:
            maps.setdefault((image, tile), {})[p] = row * 4096 + column
            rows, columns = sizes.get((image, tile), (0, 0))
            sizes[image, tile] = (max(rows, row + 1), max(columns, column + 1))
    found = []
    for number, (key, places) in enumerate(maps.items()):
        columns = sizes[key][1]
        cell = {p: place // 4096 * columns + place % 4096 for p, place in places.items()}
        stages: list[dict[str, Any]] = []
        if run.tower_kept and len(run.tower_kept) == len(maps):
            stages.append({"name": "tower", "kept": run.tower_kept[number], "members": {}})
        for name, positions in _stages(run):
            members = run.members(name)[0] if run.members(name) else {}
            kept = sorted(cell[p] for p in positions if p in cell)
            if not members and stages and stages[-1]["kept"] == kept:
                continue  # what the tower left enters as it is
            stages.append(
                {
                    "name": name,
                    "kept": kept,
                    "members": {
                        str(cell[p]): sorted(cell[q] for q in group if q in cell)
                        for p, group in members.items()
                        if p in cell and len(group) > 1
                    },
                }
            )
        found.append({"image": key[0], "tile": key[1], "rows": sizes[key][0], "columns": columns, "stages": stages})
    return found


def _by_position(segments: Segments, name: str) -> list[int]:
    """A fact of the first sample's real tokens, by original position."""
    value: Tensor = getattr(segments, name)[0]
    return value[segments.real[0]].tolist()


def data_url(image: Any, side: int = 512) -> str:
    """A PIL image as a PNG in a data URL, no side longer than `side` pixels, small ones enlarged without smoothing."""
    image = image.copy()
    if max(image.size) > side:
        image.thumbnail((side, side))
    elif max(image.size) <= side // 4:
        times = side // 2 // max(image.size)
        image = image.resize((image.width * times, image.height * times), resample=0)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
