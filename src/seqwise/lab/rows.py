"""From measurements to statements: one row per method, task, mode, length and metric.

    value       mean over prompts, with its 95 % interval
    difference  mean over prompts of (method - plain model), paired, with its 95 % interval
    tiers       at equal cost, best first: a method is behind the best of the rest only where the interval of their
                paired difference excludes 0; never stated under 30 prompts

Costs are means over prompts, except for the ratios of seconds: medians of ratios to the plain model's on the same
prompt, measured one right after the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from seqwise.lab.intervals import clustered_mean, wilson
from seqwise.lab.measure import Measurement, Mode
from seqwise.lab.tasks import Better

ENOUGH = 30  # prompts that a ranking needs
TOLERANCE = 0.10  # what still counts as equal cost
PLAIN = "Full()"
DEPTHS = 5  # parts of the context in which answers are counted
PROPORTIONS = ("accuracy",)  # metrics whose items are 0 or 1

_MEANS = ("kept_tokens", "cache_bytes", "live_bytes", "plain_bytes", "peak_bytes", "attention_work", "tokens")


class Cell(NamedTuple):
    """What one set of paired prompts is about. task: its label; length: tokens of context, None for own files."""

    task: str
    mode: Mode
    length: int | None


Measured = Mapping[int, Measurement]  # by the prompt's index


def rows_of(
    cell: Cell,
    metrics: Mapping[str, Better],
    found: Mapping[str, Measured],
    failures: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The rows of one cell: those of `found` (by method, the plain model's among them), then those of `failures`
    (reason by method), once per metric."""
    plain = found.get(PLAIN, {})
    rows = []
    for method in dict.fromkeys([*found, *failures]):
        base: dict[str, Any] = {"method": method, "task": cell.task, "mode": cell.mode, "length": cell.length}
        for metric in metrics:
            if method in failures:
                row = {
                    **base,
                    "n": 0,
                    "metric": metric,
                    "value": None,
                    "low": None,
                    "high": None,
                    "difference": None,
                    **dict.fromkeys(_COSTS),
                    "acted": False,
                    "status": "failed",
                    "reason": failures[method],
                    "per_prompt": [],
                }
            else:
                measured = found[method]
                each = [
                    {"prompt": i, "value": one.scores[metric], "text": one.text, "depth": one.depth}
                    for i, one in sorted(measured.items())
                ]
                row = {
                    **base,
                    **_quality(metric, measured, plain, method),
                    **_cost(measured, plain),
                    "status": "ok",
                    "reason": None,
                    "per_prompt": each,
                }
            rows.append(row)
    return rows


def _quality(metric: str, measured: Measured, plain: Measured, method: str) -> dict[str, Any]:
    values = [measured[i].scores[metric] for i in sorted(measured)]
    low, high = _bounds(metric, values)
    return {
        "n": len(values),
        "metric": metric,
        "value": statistics.fmean(values),
        "low": low,
        "high": high,
        "difference": None if method == PLAIN else difference(metric, measured, plain),
    }


def difference(metric: str, ours: Measured, theirs: Measured) -> dict[str, Any] | None:
    """Mean of ours - theirs over the prompts that both have, and its interval (bounds None under 2 prompts)."""
    both = sorted(set(ours) & set(theirs))
    if not both:
        return None
    a, b = [ours[i].scores[metric] for i in both], [theirs[i].scores[metric] for i in both]
    value = statistics.fmean(x - y for x, y in zip(a, b, strict=True))
    if len(both) < 2:
        return {"value": value, "low": None, "high": None}
    low, high = newcombe(a, b) if metric in PROPORTIONS else _mean_bounds([x - y for x, y in zip(a, b, strict=True)])
    return {"value": value, "low": low, "high": high}


def newcombe(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the difference of two paired shares, from items that are 0 or 1.

    Newcombe's square-and-add of the two Wilson intervals, with the correlation phi of the pairs. Unlike a bootstrap
    it has a width where all differences are equal.
    """
    n = len(ours)
    both, first, second = sum(x * y for x, y in zip(ours, theirs, strict=True)), sum(ours), sum(theirs)
    spread = (first * (n - first) * second * (n - second)) ** 0.5
    phi = (n * both - first * second) / spread if spread else 0.0
    a, b = wilson(round(first), n), wilson(round(second), n)
    (below_a, above_a), (below_b, above_b) = ((x.mean - x.low, x.high - x.mean) for x in (a, b))
    value = a.mean - b.mean
    down = max(0.0, below_a**2 - 2 * phi * below_a * above_b + above_b**2) ** 0.5
    up = max(0.0, above_a**2 - 2 * phi * above_a * below_b + below_b**2) ** 0.5
    return max(-1.0, value - down), min(1.0, value + up)


def _bounds(metric: str, values: Sequence[float]) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return None, None
    if metric in PROPORTIONS:
        interval = wilson(round(sum(values)), len(values))
        return interval.low, interval.high
    return _mean_bounds(values)


def _mean_bounds(values: Sequence[float]) -> tuple[float, float]:
    # each prompt a cluster: few prompts then have the t interval's width, which a bootstrap alone lacks
    interval = clustered_mean([[value] for value in values])
    return interval.low, interval.high


def _cost(measured: Measured, plain: Measured) -> dict[str, Any]:
    ones = list(measured.values())
    cost: dict[str, Any] = {name: statistics.fmean(getattr(one, name) for one in ones) for name in _MEANS}
    cost |= {name: round(cost[name]) for name in _MEANS if name.endswith("_bytes")}
    cost["kept_share"] = cost["kept_tokens"] / cost["tokens"]
    found = [one.position_correlation for one in ones if one.position_correlation is not None]
    cost["position_correlation"] = statistics.fmean(found) if found else None
    both = [(measured[i], plain[i]) for i in measured if i in plain]
    cost["prefill_ratio"] = _median(a.prefill_s / b.prefill_s for a, b in both)
    cost["decode_ratio"] = _median(a.decode_s / b.decode_s for a, b in both if a.decode_s and b.decode_s)
    cost["operations_ratio"] = _mean(a.operations / b.operations for a, b in both if a.operations and b.operations)
    stages = dict.fromkeys(stage for one in ones for stage in one.visual_tokens or {})
    tokens = {stage: [(one.visual_tokens or {}).get(stage) for one in ones] for stage in stages}
    cost["visual_tokens"] = {
        stage: statistics.fmean(n for n in counts if n is not None) for stage, counts in tokens.items()
    } or None
    # the plain model never acts; everybody else should
    cost["acted"] = any(one.acted for one in ones)
    return cost


def visual_stages(rows: Sequence[Mapping[str, Any]]) -> str:
    """Such as `64, tower 32, layer 2 16`: the prompt's visual tokens, and those behind each stage; means over rows."""
    stages = dict.fromkeys(stage for row in rows for stage in row.get("visual_tokens") or {})
    means = {
        stage: statistics.fmean(
            row["visual_tokens"][stage] for row in rows if stage in (row.get("visual_tokens") or {})
        )
        for stage in stages
    }
    return ", ".join(f"{n:.0f}" if stage == "prompt" else f"{stage} {n:.0f}" for stage, n in means.items())


_COSTS = (
    *_MEANS, "kept_share", "position_correlation", "operations_ratio", "visual_tokens", "prefill_ratio", "decode_ratio",
)  # fmt: skip


def by_depth(cell: Cell, metrics: Mapping[str, Better], found: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """The main metric where the answer stands in each fifth of the context, per method; empty where no prompt knows."""
    metric = next(iter(metrics))
    rows = []
    for method, measured in found.items():
        for part in range(DEPTHS):
            values = [
                one.scores[metric]
                for _, one in sorted(measured.items())
                if one.depth is not None and min(int(one.depth * DEPTHS), DEPTHS - 1) == part
            ]
            if values:
                low, high = _bounds(metric, values)
                span = [part / DEPTHS, (part + 1) / DEPTHS]
                facts = {**cell._asdict(), "method": method, "metric": metric, "depth": span, "n": len(values)}
                rows.append({**facts, "value": statistics.fmean(values), "low": low, "high": high})
    return rows


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.fmean(found) if found else None


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def equal_cost(costs: Mapping[str, float]) -> list[list[str]]:
    """Names in groups, cheapest first: a group's costs are at most 10 % above its cheapest."""
    groups: list[list[str]] = []
    for name in sorted(costs, key=lambda name: costs[name]):
        if groups and costs[name] <= (1 + TOLERANCE) * costs[groups[-1][0]]:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def tiers(metric: str, better: Better, found: Mapping[str, Measured], names: Sequence[str]) -> list[list[str]] | None:
    """`names` in tiers, best first; None where one of them has too few prompts to state that."""
    if any(len(found[name]) < ENOUGH for name in names):
        return None
    sign = 1 if better == "higher" else -1
    left = sorted(names, key=lambda name: -sign * statistics.fmean(one.scores[metric] for one in found[name].values()))
    ranked = []
    while left:
        tier = [name for name in left if name == left[0] or not _behind(sign, metric, found[name], found[left[0]])]
        ranked.append(tier)
        left = [name for name in left if name not in tier]
    return ranked


def _behind(sign: int, metric: str, ours: Measured, best: Measured) -> bool:
    found = difference(metric, ours, best)
    if found is None or found["low"] is None:
        return False
    return bool(found["high"] < 0 if sign > 0 else found["low"] > 0)


def groups_of(cell: Cell, metrics: Mapping[str, Better], found: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """The cell's methods side by side at equal measured cost, by cache bytes and by attention work; with tiers of
    the main metric where prompts suffice."""
    metric, better = next(iter(metrics.items()))
    groups = []
    for name, share in (
        ("cache_bytes", lambda one: one.cache_bytes / one.plain_bytes),
        ("attention_work", lambda one: one.attention_work),
    ):
        costs = {method: statistics.fmean(map(share, ones.values())) for method, ones in found.items() if ones}
        for names in equal_cost(costs):
            groups.append(
                {
                    **cell._asdict(),
                    "metric": metric,
                    "cost": name,
                    "share": [costs[names[0]], costs[names[-1]]],
                    "methods": names,
                    "tiers": tiers(metric, better, found, names),
                }
            )
    return groups
