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

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import ceil
from operator import mul

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
        raise _spent(budget, left, layers)
    return min(1.0, left / lengths[-1] / reaching)


def shares_within(budget: float, stages: Sequence[int], places: Sequence[float], layers: int) -> tuple[float, ...]:
    """Shares of all stages whose average is the budget, from free numbers in [0, 1], one per stage but the last.

    Each number places its stage's share between the least and the most that the budget allows: 0 takes the share that
    may stay as it is to the end, so zeros give the uniform schedule; 1 leaves the later stages next to nothing.

    Raises ValueError as `last_share`.
    """
    lengths = _segments(stages, layers)
    if len(places) != len(lengths) - 1:
        raise ValueError(f"places must be one per stage but the last ({len(lengths) - 1}), got {len(places)}")
    left, reaching = layers * budget - stages[0], 1.0
    if left <= 0:
        raise _spent(budget, left, layers)
    shares: list[float] = []
    for i, place in enumerate(places):
        least = min(1.0, left / sum(lengths[i:]) / reaching)
        most = min(1.0, left / lengths[i] / reaching)
        share = least + min(max(place, 0.0), 1.0) * (most - least) * 0.98
        shares.append(share)
        reaching *= share
        left -= lengths[i] * reaching
    return (*shares, last_share(budget, stages, shares, layers))


def stage_space(count: int, layers: int, budget: float, *, from_input: bool = False) -> dict[str, tuple[float, float]]:
    """Bounds of the numbers that place `count` stages and their shares under an average budget, for `stages_at`: the
    first stage, how far each later one lies into the layers that are left, and all shares but the last
    (`shares_within`). from_input: the first stage is the language model's own input.

    Raises ValueError where the layers before the first stage, which see every token, use the budget up.
    """
    latest = min(ceil(layers * budget) - 1, layers - count)
    if count > layers or (latest < 1 and not from_input):
        raise ValueError(
            f"{count} stages need a budget > {1 / layers:.4g} on {layers} layers, at most {layers - 1} of them, got "
            f"{budget!r}"
        )
    space = {} if from_input else {"first": (1.0, latest + 0.999)}
    space |= {f"gap{i}": (0.0, 0.999) for i in range(1, count)}
    return space | {f"share{i}": (0.0, 1.0) for i in range(count - 1)}


def stages_at(
    point: Mapping[str, float], own: Sequence[int], layers: int, budget: float, *, from_input: bool = False
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Stages, 0-based layers whose input is cut, and the share of all tokens that each leaves, rounded down to 1e-4.

    point: numbers within `stage_space`; without them the stages `own`, as far as budget and layers let them be late,
    and the uniform schedule.
    """
    count = len(own)
    space = stage_space(count, layers, budget, from_input=from_input)
    stages = [0 if from_input else int(min(point.get("first", own[0]), space["first"][1]))]
    for i in range(1, count):
        room = layers - (count - i) - stages[-1]  # layers up to the latest place of stage i
        usual = max(0, min(own[i] - stages[-1] - 1, room - 1))
        stages.append(stages[-1] + 1 + (int(point[f"gap{i}"] * room) if f"gap{i}" in point else usual))
    shares = shares_within(budget, stages, [point.get(f"share{i}", 0.0) for i in range(count - 1)], layers)
    left = tuple(max(1e-4, int(share * 1e4 + 1e-6) / 1e4) for share in accumulate(shares, mul))
    return tuple(stages), left


def last_token_cosine(full: Tensor, pruned: Tensor) -> Tensor:
    """Cosine of the prompt's last hidden state, without and with pruning: (..., d), (..., d) -> (...), float32; 0 where
    it is NaN."""
    full, pruned = full.float(), pruned.float()
    return torch.nn.functional.cosine_similarity(full, pruned, dim=-1).nan_to_num(nan=0.0)


def _spent(budget: float, left: float, layers: int) -> ValueError:
    return ValueError(
        f"budget must be > {budget - left / layers:.4g}, which the layers before the last stage use up, got "
        f"{budget!r}; choose earlier stages or smaller shares"
    )


def _segments(stages: Sequence[int], layers: int) -> list[int]:
    """Layers from each stage up to the next."""
    if not stages or list(stages) != sorted(set(stages)) or not 0 <= stages[0] <= stages[-1] < layers:
        raise ValueError(f"stages must ascend within [0, {layers - 1}], at least one, got {tuple(stages)!r}")
    return [after - stage for stage, after in zip(stages, (*stages[1:], layers), strict=True)]
