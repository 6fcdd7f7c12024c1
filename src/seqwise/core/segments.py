"""Per-token facts of a prompt, beside an ordinary batch: type, image, tile or frame, grid cell, set, member."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from seqwise.core.errors import MissingExtra, PromptError

PAD, TEXT, IMAGE = 0, 1, 2


@dataclass(frozen=True)
class Segments:
    """Facts of each token, (B, N) int64 each; -1 where a fact does not apply.

    type: PAD, TEXT or IMAGE. image: which image of the sample, tile: which tile or frame of it, row and column: the
    grid cell. set and member: which set of the prompt the token belongs to, and which of its members.
    """

    type: Tensor
    image: Tensor
    tile: Tensor
    row: Tensor
    column: Tensor
    set: Tensor
    member: Tensor

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if value.shape != self.type.shape or value.dim() != 2:
                raise PromptError(
                    f"segments.{spec.name} must have shape {tuple(self.type.shape)}, got {tuple(value.shape)}"
                )

    @property
    def visual(self) -> Tensor:
        return self.type == IMAGE

    @property
    def real(self) -> Tensor:
        return self.type != PAD

    @classmethod
    def infer(cls, input_ids: Tensor, attention_mask: Tensor | None, image_token: int | None) -> Segments:
        """Facts that ids alone tell: padding, image spans (one image per run of placeholders)."""
        type_ = torch.full_like(input_ids, TEXT)
        image = torch.full_like(input_ids, -1)
        if image_token is not None:
            visual = input_ids == image_token
            starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
            type_ = torch.where(visual, IMAGE, type_)
            image = torch.where(visual, starts.cumsum(-1) - 1, image)
        if attention_mask is not None:
            type_ = torch.where(attention_mask.bool(), type_, PAD)
        unknown = torch.full_like(input_ids, -1)
        return cls(type_, image, unknown, unknown, unknown, unknown, unknown)


def prepare(processor: Any, messages: list[dict[str, Any]], **options: Any) -> tuple[dict[str, Tensor], Segments]:
    """A batch for the model and its `Segments`, from chat messages through the model's own processor or tokenizer.

    Raises MissingExtra where the model's processor cannot be constructed without torchvision.
    """
    if processor is None:
        raise MissingExtra(
            "this model's processor needs torchvision: pip install torchvision, "
            "or build the batch with its image processor and tokenizer"
        )
    batch = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt", **options
    )
    ids = batch["input_ids"]
    tokenizer = getattr(processor, "tokenizer", processor)
    token = getattr(processor, "image_token", None)
    image_token = getattr(processor, "image_token_id", None)
    if image_token is None and token is not None:
        image_token = tokenizer.convert_tokens_to_ids(token)
    return dict(batch), Segments.infer(ids, batch.get("attention_mask"), image_token)
