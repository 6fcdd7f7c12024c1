"""What the reproductions on the glyph model share: which answers are right, and patches drawn by chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from seqwise.core.method import Method, param
from seqwise.core.run import Run
from seqwise.core.select import top_k
from seqwise.core.towers import Tower
from seqwise.lab.zoo.glyphs import GlyphBatch


@dataclass(frozen=True)
class RandomPatches(Method):
    """Keeps `count` patches of each image, drawn by chance, in their order."""

    abstract: ClassVar[bool] = True  # a baseline of these reproductions: no list of methods shows it
    count: int = param(9, ge=1)
    seed: int = param(0, ge=0)

    slots: ClassVar[tuple[str, ...]] = ("input.rows",)

    def needs(self) -> set[str]:
        return {"vision tower"}

    def keep_input(self, tower: Tower) -> Tensor:
        images = tower.layers[tower.feature_layer][0].shape[0]
        luck = torch.rand(images, tower.patches, generator=torch.Generator().manual_seed(self.seed))
        return top_k(luck, self.count)


def answered(model: nn.Module, drawn: GlyphBatch, method: Method | None = None) -> tuple[list[float], Run | None]:
    """Per image 1.0 where the most probable next token is the answer, else 0.0; and the run, if a method is given."""
    batch = {"input_ids": drawn.input_ids, "pixel_values": drawn.pixel_values}
    with torch.no_grad():
        if method is None:
            run, out = None, model(**batch, logits_to_keep=1, use_cache=False)
        else:
            with method.on(model) as run:
                out = model(**batch, logits_to_keep=1, use_cache=False)
    return (out.logits[:, -1].argmax(-1) == drawn.answers).double().tolist(), run
