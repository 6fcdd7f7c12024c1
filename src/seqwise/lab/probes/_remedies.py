"""What probes share that judge remedies item by item.

A record is kept under "part/method/i", a method that failed under "part/method" with its reason; see `Progress.once`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from seqwise.core.errors import SeqwiseError, UsageError
from seqwise.core.method import Method
from seqwise.lab.compare import reason
from seqwise.lab.probes.base import Progress, Row, Settings, paired, share
from seqwise.lab.registry import parse_methods
from seqwise.lab.rows import PLAIN

Ask = Callable[[int, Method | None], dict[str, Any]]

DEFAULT = ("SetBasedPrompting()", "PINE()", "JustReadTwice()")


# methods


def remedies(settings: Settings) -> list[Method]:
    """Those asked for, else the three that the order of a set, or of context and question, is taken from."""
    return [method for method in parse_methods(settings.remedies or DEFAULT) if str(method) != PLAIN]


def measure_plain(progress: Progress, part: str, n: int, ask: Ask) -> dict[int, Any]:
    """The plain model on n items. Raises UsageError that names the item the model fails on."""
    found = {}
    for i in range(n):
        where = f"{part}, item {i + 1} of {n}"

        def work(i: int = i, where: str = where) -> dict[str, Any]:
            try:
                return ask(i, None)
            except SeqwiseError:
                raise
            except Exception as error:
                raise UsageError(f"the plain model fails on {where}: {reason(error)}") from error

        found[i] = progress.once(f"{part}/{PLAIN}/{i}", f"{where}: plain model", work)
    return found


def measure_remedies(progress: Progress, part: str, n: int, ask: Ask, methods: Sequence[Method]) -> None:
    """n items under each method. One that fails, on whatever item, is left out from there on, with its reason."""
    for method in methods:
        name = str(method)
        if f"{part}/{name}" in progress.records:
            progress.skip(n)
            continue
        for i in range(n):
            where = f"{part}, item {i + 1} of {n}: {name}"
            try:
                progress.once(f"{part}/{name}/{i}", where, lambda i=i, method=method: ask(i, method))  # type: ignore[misc]
            except Exception as error:
                progress.keep(f"{part}/{name}", {"failed": reason(error)})
                progress.skip(n - i)
                break


def found(records: Mapping[str, Any], part: str, method: str, n: int) -> dict[int, Any]:
    """The records of one part under one method, by item."""
    return {i: records[f"{part}/{method}/{i}"] for i in range(n) if f"{part}/{method}/{i}" in records}


def row(
    group: str,
    method: str,
    what: str,
    ours: Sequence[float],
    plain: Sequence[float] | None = None,
    *,
    note: str = "",
) -> Row:
    """A mean of one value in [0, 1] per item, and the paired difference to the plain model's on the same items."""
    low, high = share(ours)
    hits = all(value in (0, 1) for value in [*ours, *(plain or [])])
    difference = None if plain is None else paired(ours, plain, hits=hits)
    return Row(group, method, what, sum(ours) / len(ours), low, high, len(ours), difference, note)


# words


def percent(values: Sequence[float]) -> str:
    """Mean and interval of one value in [0, 1] per item, such as "52% [40%, 64%]"."""
    low, high = share(values)
    span = "" if low is None or high is None else f" [{low:.0%}, {high:.0%}]"
    return f"{sum(values) / len(values):.0%}{span}"


def points(ours: Sequence[float], plain: Sequence[float]) -> str:
    """Paired difference in points with its interval, such as "-12 points [-20, -4]"."""
    change = row("", "", "", ours, plain).difference or {}
    value, low, high = (change.get(name) for name in ("value", "low", "high"))
    span = "" if low is None or high is None else f" [{100 * low:+.0f}, {100 * high:+.0f}]"
    return f"{100 * (value or 0.0):+.0f} points{span}"


def direction(ours: Sequence[float], plain: Sequence[float]) -> int:
    """-1 or 1 where the interval of the paired difference lies below or above 0, else 0."""
    change = row("", "", "", ours, plain).difference or {}
    low, high = change.get("low"), change.get("high")
    return 0 if low is None or high is None else int(low > 0) - int(high < 0)
