"""Reproductions: a paper's claims, measured at a size that runs anywhere, with a verdict from paired intervals.

    d_si    = ours_si - baseline_si                    item i of seed s
    [l, h]  = 95 % interval of the mean of d, clustered over seeds, then items
    ">"  holds iff l >  margin         "<"  holds iff h < -margin       (ours is better by more than the margin)
    ">=" holds iff l > -margin         "<=" holds iff h <  margin       (ours is no worse than by the margin)

Claims, margins, baselines and seeds are constants of the file that states them, written before any result.
A file `seqwise/lab/reproduce/<slug with _>.py` holds one `REPRODUCTION`; its result is `seqwise/lab/results/SLUG.json`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Direction: TypeAlias = Literal[">", "<", ">=", "<="]
Verdict: TypeAlias = Literal["holds", "does not hold", "not testable at this size"]
Progress: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Claim:
    """One statement of the paper that can turn out false.

    key: a short name, unique in its reproduction. text: the claim in words. paper: the paper's own figure, as text.
    direction: how ours must stand to the baseline. margin: in the unit of the measured values, >= 0; for ">=" and
    "<=" it is the loss that still counts as none, and must be > 0. baseline: what ours is compared with.
    """

    key: str
    text: str
    paper: str
    direction: Direction
    margin: float
    baseline: str

    def __post_init__(self) -> None:
        if self.direction not in (">", "<", ">=", "<="):
            raise ValueError(f"Claim.direction must be one of '>', '<', '>=', '<=', got {self.direction!r}")
        strict = self.direction in (">", "<")
        if not math.isfinite(self.margin) or self.margin < 0 or (self.margin == 0 and not strict):
            allowed = ">= 0" if strict else f"> 0 for {self.direction!r}"
            raise ValueError(f"Claim.margin must be {allowed}, got {self.margin!r} (unit of the measured values)")


@dataclass(frozen=True)
class Measured:
    """What one seed measured for one claim: item i of `ours` and item i of `baseline` belong together."""

    ours: Sequence[float]
    baseline: Sequence[float]

    def __post_init__(self) -> None:
        for name in ("ours", "baseline"):
            values = tuple(float(value) for value in getattr(self, name))
            if not values or not all(map(math.isfinite, values)):
                raise ValueError(f"Measured.{name} must hold finite numbers, at least one, got {values!r}")
            object.__setattr__(self, name, values)
        if len(self.ours) != len(self.baseline):
            raise ValueError(
                f"Measured.ours and .baseline must pair up, got {len(self.ours)} and {len(self.baseline)} items"
            )


Measure: TypeAlias = Callable[[int, Progress], Mapping[str, Measured]]


@dataclass(frozen=True)
class Reproduction:
    """A paper's claims and how to measure them.

    slug: the paper's. measure(seed, progress): trains and runs whatever it needs from `seed` alone, says in
    `progress` where it is, returns one `Measured` per testable claim's key. seeds: at least three, distinct.
    not_testable: claim key -> why this size cannot decide it. notes: what differs from the paper's setting.
    """

    slug: str
    claims: Sequence[Claim]
    measure: Measure
    seeds: Sequence[int] = (0, 1, 2)
    notes: str = ""
    not_testable: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "claims", tuple(self.claims))
        object.__setattr__(self, "seeds", tuple(self.seeds))
        keys = [claim.key for claim in self.claims]
        if not keys or len(set(keys)) != len(keys):
            raise ValueError(f"Reproduction.claims must have distinct keys, at least one, got {keys!r}")
        if len(set(self.seeds)) < 3 or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"Reproduction.seeds must be at least 3 distinct numbers, got {self.seeds!r}")
        if strange := set(self.not_testable) - set(keys):
            raise ValueError(f"Reproduction.not_testable must name claims of {keys!r}, got {sorted(strange)!r}")

    @property
    def testable(self) -> tuple[Claim, ...]:
        return tuple(claim for claim in self.claims if claim.key not in self.not_testable)
