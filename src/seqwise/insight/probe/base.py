"""What probes of probability share: the surprisal of every token of many texts, in batched passes.

S_t = -ln p(token_t | tokens before it)      in nats; the first token of a text has none
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from seqwise.core.errors import PromptError
from seqwise.insight.explain.base import reading

ROWS = 8  # texts in one pass: their logits are the largest tensor


def padded(sequences: Sequence[Sequence[int] | Tensor]) -> tuple[Tensor, Tensor]:
    """Token lists as ids (B, n), padded on the right by 0, and the mask (B, n) of what is no padding, both int64.

    Raises PromptError where there is none, or an empty one; says which.
    """
    for i, ids in enumerate(sequences):
        if not len(ids):
            raise PromptError(f"text {i + 1} of {len(sequences)} must have at least one token, got none")
    if not sequences:
        raise PromptError("there must be at least one text, got none")
    rows = [torch.as_tensor(one, dtype=torch.long) for one in sequences]
    ones = [torch.ones_like(row) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(ones, batch_first=True)


def token_surprisals(logits: Tensor, ids: Tensor) -> Tensor:
    """S_t of ids (..., n) under logits (..., n, V) of the same forward: (..., n) float32, NaN at t = 0."""
    logps = logits[..., :-1, :].float().log_softmax(-1)  # half precision cannot hold a sum over a vocabulary
    found = -logps.gather(-1, ids[..., 1:, None])[..., 0]
    return pad(found, (1, 0), value=math.nan)


def surprisals(model: Any, sequences: Sequence[Sequence[int] | Tensor]) -> list[Tensor]:
    """S_t of each text under a causal language model: per text (n,) float32 on the CPU, NaN at t = 0.

    sequences: token ids, special tokens included where the model is used to them. Texts of similar length share a pass;
    padding is on the right, so positions are those of each text alone. Raises PromptError for an empty text.
    """
    padded(sequences)  # all of them are checked before the first pass
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    device = next(model.parameters()).device
    with reading(model):
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            ids, mask = (x.to(device) for x in padded([sequences[i] for i in rows]))
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, n, V)
            for i, one in zip(rows, token_surprisals(logits, ids).cpu(), strict=True):
                found[i] = one[: len(sequences[i])].clone()
    return found
