"""Scenes: a small vision-language model that ships with the package and answers questions in words about drawn scenes.

    data       see `seqwise.lab.zoo.scenes_data`: 48 x 48 px, 64 patches, 2 to 4 objects; questions of five types
    model      an ordinary LlavaForConditionalGeneration: CLIP tower with CLS, 5 layers; MLP projector on hidden state
               -2; Llama decoder, 5 layers, 4 query and 2 KV heads of 32; width 96
    stage 1    the tower by losses of its own: each patch says shape, colour and size (or none), its row and column;
               the CLS of the feature layer says which of the 24 kinds of objects are there, and how many objects
    stage 2    projector and decoder on the frozen features: cross-entropy of the answers, and half as much of the
               other words, in conversations  <bos> images question answer <eos> question answer <eos> ...

The tower's own losses make CLS attention mean something, which LLaVA's loss never touches, and keep what is on an
object in the object's patches: dropping those costs the answer, dropping the others costs little. Stage 2 mixes single
images, named pictures ("picture one .") and frames whose features are resized to random grids; some prompts lose a
random part of their patches, so that any number of them is familiar.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from seqwise.lab.zoo.scenes_data import GRID, PATCH, PATCHES, SIDE, TYPES, Example, frames, multi, scenes
from seqwise.lab.zoo.scenes_model import ID, PAD_ID, build, ids_of, pixel_values, processor, resize
from seqwise.lab.zoo.scenes_train import STEPS, TOWER_STEPS, train

__all__ = [
    "GRID",
    "PATCH",
    "PATCHES",
    "SIDE",
    "TYPES",
    "WEIGHTS",
    "Batch",
    "Example",
    "accuracy",
    "answers",
    "batch",
    "build",
    "features",
    "frames",
    "load",
    "multi",
    "pixel_values",
    "processor",
    "resize",
    "scenes",
    "train",
]

WEIGHTS = Path(__file__).parent / "weights" / "scenes-vlm.safetensors"


class Batch(NamedTuple):
    """Model inputs of prompts, padded on the left; `answers[b]` is the token to predict at the last position."""

    input_ids: Tensor  # (B, n) int64
    attention_mask: Tensor  # (B, n) int64
    pixel_values: Tensor  # (images of all prompts, 3, 48, 48)
    answers: Tensor  # (B,) int64

    def inputs(self) -> dict[str, Tensor]:
        """What `model(...)` and `model.generate(...)` take."""
        return {name: getattr(self, name) for name in ("input_ids", "attention_mask", "pixel_values")}


def batch(examples: Sequence[Example]) -> Batch:
    """Model inputs of examples, in order, as the processor makes them.

    Raises:
        ValueError: no examples.
    """
    if not examples:
        raise ValueError("batch: examples must hold at least one, got none")
    rows = [ids_of(example.prompt, [PATCHES] * len(example.pixels)) for example in examples]
    ids, mask = _left(rows)
    pixels = torch.cat([example.pixels for example in examples])
    return Batch(ids, mask, pixel_values(pixels), torch.tensor([ID[example.answer] for example in examples]))


def _left(rows: list[list[int]]) -> tuple[Tensor, Tensor]:  # (B, n) each
    width = max(map(len, rows))
    ids = torch.tensor([[PAD_ID] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def load() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The shipped model in float32, eval mode, and its processor. Needs Pillow.

    >>> model, processor = load()
    >>> example = scenes(1, seed=0)[0]
    >>> inputs = processor(images=example.images(), text=example.prompt, return_tensors="pt")
    >>> answer = processor.decode(model.generate(**inputs, max_new_tokens=2)[0, inputs["input_ids"].shape[1]:])
    """
    model = build(0)
    model.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return model, processor()


def features(model: LlavaForConditionalGeneration, examples: Sequence[Example]) -> list[list[Tensor]]:
    """Projected features per example and image, (64, width) each: what the decoder gets in the placeholders' rows."""
    with torch.no_grad():
        values = pixel_values(torch.cat([example.pixels for example in examples]))
        found = iter(model.get_image_features(values).pooler_output)
    return [[next(found) for _ in example.pixels] for example in examples]


def answers(
    model: LlavaForConditionalGeneration,
    examples: Sequence[Example],
    visual: Sequence[Sequence[Tensor]] | None = None,
) -> list[str]:
    """The most probable next word after each prompt.

    visual: per example and image, the projected features (k, width) to put in the image's place, any k >= 1; None for
    the whole images.
    """
    if visual is None:
        inputs: dict[str, Any] = batch(examples).inputs()
    else:
        rows = [
            ids_of(example.prompt, [len(one) for one in every]) for example, every in zip(examples, visual, strict=True)
        ]
        ids, mask = _left(rows)
        ready = BaseModelOutputWithPooling(pooler_output=[one for every in visual for one in every])
        inputs = {"input_ids": ids, "attention_mask": mask, "mm_encoder_outputs": {"image": ready}}
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]  # (B, V)
    words = list(ID)
    return [words[i] for i in logits.argmax(-1).tolist()]


def accuracy(
    model: LlavaForConditionalGeneration,
    examples: Sequence[Example],
    visual: Sequence[Sequence[Tensor]] | None = None,
) -> float:
    """Share of examples, in [0, 1], whose most probable next word is the answer; visual as in `answers`."""
    told = answers(model, examples, visual)
    return sum(word == example.answer for word, example in zip(told, examples, strict=True)) / len(examples)


def main() -> None:
    """Trains seed 0 and writes the weights that `load` reads."""
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("training", total=TOWER_STEPS + STEPS)
        model = train(0, lambda step, loss: bar.update(task, completed=step))
    WEIGHTS.parent.mkdir(exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, WEIGHTS)


if __name__ == "__main__":
    main()
