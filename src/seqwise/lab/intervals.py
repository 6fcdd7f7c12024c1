"""95 % intervals for what the lab measures.

    share of hits      Wilson's score interval, which stays inside [0, 1] and has a width at 0 and at 1
    mean               percentile bootstrap over the items
    clustered mean     items inside clusters (the seeds of an experiment): bootstrap over clusters, then over the
                       items of each drawn cluster, joined with a t interval that counts the clusters
    paired differences the same on ours - baseline, item by item

Three clusters have few resamples: the bootstrap alone then spans smallest to largest cluster mean and covers about
75 %, not 95 %, whenever clusters differ. The t interval

    mean +- t_f sqrt(V),  V = (a + w) / S,  w = mean_s var_s / n_s,  a = max(0, var(m_s) - w)

over S clusters with means m_s closes that gap: its degrees of freedom f (Satterthwaite) fall to S - 1 where the
clusters' own spread a dominates, and stay near the number of items where it does not. On simulated normal data with
three clusters the two together cover 90 to 99 %, least where both spreads matter alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
RESAMPLES = 10_000

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def wilson(hits: int, n: int) -> Interval:
    """Share of `hits` among `n` >= 1 independent trials. Raises ValueError unless 0 <= hits <= n."""
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"wilson needs n >= 1 and hits in [0, n], got hits {hits!r}, n {n!r}")
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    # The ends are exact at 0 and n; only rounding could leave them beside the share.
    return Interval(p, 0.0 if hits == 0 else centre - half, 1.0 if hits == n else centre + half)


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean of independent `values`, at least one and finite, by the percentile bootstrap. Raises ValueError."""
    data = _finite(values)
    return _percentiles(float(data.mean()), _resampled_means(data, RESAMPLES, np.random.default_rng(seed)), data)


def clustered_mean(clusters: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """Mean of the clusters' means, each cluster weighing the same.

    clusters: per cluster its values, at least one and finite. One cluster alone says nothing of how clusters
    differ: its interval is that of its items. Raises ValueError.
    """
    data = [_finite(values) for values in clusters]
    if not data:
        raise ValueError("clustered_mean needs at least one cluster, got none")
    if len(data) == 1:
        return bootstrap_mean(clusters[0], seed)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(data), size=(RESAMPLES, len(data)))  # (R, S): which clusters
    means = np.empty(drawn.shape)
    for s, values in enumerate(data):
        places = drawn == s
        means[places] = _resampled_means(values, int(places.sum()), rng)
    centre = float(np.mean([values.mean() for values in data]))
    boot = _percentiles(centre, means.mean(-1), np.concatenate(data))
    half = _t_half_width(data)
    return Interval(centre, min(boot.low, centre - half), max(boot.high, centre + half))


def paired_difference(ours: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """Mean of ours - baseline, where item i of cluster s of both belongs together; see `clustered_mean`.

    Raises ValueError when clusters or items do not pair up.
    """
    if [len(cluster) for cluster in ours] != [len(cluster) for cluster in baseline]:
        raise ValueError("paired_difference needs as many clusters and items in ours as in baseline")
    return clustered_mean([_finite(a) - _finite(b) for a, b in zip(ours, baseline, strict=True)], seed)  # type: ignore[misc]


def _finite(values: Sequence[float] | Array) -> Array:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0 or not np.isfinite(data).all():
        raise ValueError(f"an interval needs a list of finite numbers, at least one, got {values!r}")
    return data


def _resampled_means(data: Array, resamples: int, rng: np.random.Generator) -> Array:
    """Means of `resamples` draws with replacement, (resamples,). Counts per value instead of an index matrix."""
    levels, inverse = np.unique(data, return_counts=True)
    draws = rng.multinomial(len(data), inverse / len(data), size=resamples)  # (resamples, distinct values)
    return np.asarray(draws @ levels / len(data), dtype=np.float64)


def _percentiles(mean: float, means: Array, data: Array) -> Interval:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # Rounding of equal values must neither push the mean out of its interval nor an end out of the data.
    low, high = max(float(low), float(data.min())), min(float(high), float(data.max()))
    return Interval(mean, min(low, mean), max(high, mean))


def _t_half_width(data: Sequence[Array]) -> float:
    """t_f sqrt(V) of the module's formula; clusters of one item bring no spread within."""
    S = len(data)
    within = np.array([values.var(ddof=1) / len(values) if len(values) > 1 else 0.0 for values in data])
    w = float(within.mean())
    a = max(0.0, float(np.var([values.mean() for values in data], ddof=1)) - w)
    if a + w == 0:
        return 0.0
    items = sum(len(values) - 1 for values in data)
    f = (a + w) ** 2 / (a**2 / (S - 1) + (w**2 / items if items else 0.0))
    return _t_quantile(f) * ((a + w) / S) ** 0.5


def _t_quantile(f: float) -> float:
    """The t that |T| stays below with 95 %, T of Student's distribution with f >= 1 degrees of freedom.

    With T = sqrt(f) tan(x), the density of x is proportional to cos(x) ** (f - 1).
    """
    f = min(f, 1e4)  # Student's distribution is the normal one by then, to 4 digits
    x = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(x) ** (f - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(f**0.5 * np.tan(np.interp(LEVEL, mass / mass[-1], x)))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation of pairs, ties at their mean rank; None under 2 pairs or where a side is constant."""
    x, y = _ranks(a), _ranks(b)
    if len(x) < 2 or not x.any() or not y.any():
        return None
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def _ranks(values: Sequence[float]) -> Array:
    """Ranks less their mean, 0 everywhere where all values are equal."""
    _, group, count = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = count.cumsum()
    ranks: Array = (last - (count - 1) / 2)[group]
    return ranks - ranks.mean() if len(ranks) else ranks
