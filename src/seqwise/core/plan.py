"""Schedules of staged methods under a budget, and how little a schedule changes a model. Pure functions.

Stage i cuts the input of the 0-based decoder layer S_i (0: the language model's own input) to a share r_i of the
tokens that reach it. Layers before S_0 see every token, those from S_i up to the next stage see r_0 ... r_i of them:

    average = (S_0 + sum_i (S_{i+1} - S_i) r_0 ... r_i) / L          L layers, the end counts as S_{k}
    last    = min(1, (L rho - all segments but the last) / (length of the last segment r_0 ... r_{k-2}))
    value   = cos(h_full, h_pruned)                                  h: last hidden state of the prompt's last token

One share follows from the budget rho and the others, so a search has one number less to find and all that it tries
costs the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def average_share(stages: Sequence[int], shares: Sequence[float], layers: int) -> float:
    """Mean over the `layers` of the share of tokens that a layer sees.

    stages: ascending 0-based layers whose input is cut; shares: as many, what stays of the tokens that reach each.

    Raises ValueError for stages that do not ascend or lie outside [0, layers), or that do not pair up with shares.
    """
    lengths = _segments(stages, layers)
    if len(shares) != len(lengths):
        raise ValueError(f"shares must be one per stage ({len(lengths)}), got {len(shares)}")
    total, reaching = float(stages[0]), 1.0
    for length, share in zip(lengths, shares, strict=True):
        reaching *= share
        total += length * reaching
    return total / layers


def last_share(budget: float, stages: Sequence[int], shares: Sequence[float], layers: int) -> float:
    """The share of the last stage that makes the average share of tokens over the layers equal to `budget`, at most 1.

    shares: those of all stages but the last. Where the result is 1 the average may be below the budget.

    Raises ValueError as `average_share`, and where the stages before the last use the budget up.
    """
    lengths = _segments(stages, layers)
    if len(shares) != len(lengths) - 1:
        raise ValueError(f"shares must be one per stage but the last ({len(lengths) - 1}), got {len(shares)}")
    left, reaching = layers * budget - stages[0], 1.0
    for length, share in zip(lengths[:-1], shares, strict=True):
        reaching *= share
        left -= length * reaching
    if left <= 0 or reaching <= 0:
        raise ValueError(
            f"budget must be > {budget - left / layers:.4g}, which the layers before the last stage use up, got "
            f"{budget!r}; choose earlier stages or smaller shares"
        )
    return min(1.0, left / lengths[-1] / reaching)


def last_token_cosine(full: Tensor, pruned: Tensor) -> Tensor:
    """Cosine of the prompt's last hidden state, without and with pruning: (..., d), (..., d) -> (...), float32; 0 where
    it is NaN."""
    full, pruned = full.float(), pruned.float()
    return torch.nn.functional.cosine_similarity(full, pruned, dim=-1).nan_to_num(nan=0.0)


def _segments(stages: Sequence[int], layers: int) -> list[int]:
    """Layers from each stage up to the next."""
    if not stages or list(stages) != sorted(set(stages)) or not 0 <= stages[0] <= stages[-1] < layers:
        raise ValueError(f"stages must ascend within [0, {layers - 1}], at least one, got {tuple(stages)!r}")
    return [after - stage for stage, after in zip(stages, (*stages[1:], layers), strict=True)]
