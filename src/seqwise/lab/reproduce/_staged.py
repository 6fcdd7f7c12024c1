"""What reproductions on the staged model share: which answers are right."""

from __future__ import annotations

import torch
from torch import nn

from seqwise.core.method import Method
from seqwise.lab.zoo.staged import StagedBatch


def right_answers(model: nn.Module, drawn: StagedBatch, method: Method | None = None) -> list[float]:
    """Per image 1.0 where the most probable token behind its one question is the answer, else 0.0."""

    def right() -> list[float]:
        out = model(input_ids=drawn.input_ids, pixel_values=drawn.pixel_values, logits_to_keep=1, use_cache=False)
        return (out.logits[:, -1].argmax(-1) == drawn.answers[:, 0]).double().tolist()

    with torch.no_grad():
        if method is None:
            return right()
        with method.on(model):
            return right()
