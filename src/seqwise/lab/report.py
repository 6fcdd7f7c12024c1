"""The HTML report of a comparison: one file that works offline, from the document that `compare` writes.

    cost(cell)    = cache bytes / bytes of the plain model's cache, both as stored
    verdict(cell) = loss or gain when the 95 % interval of the paired difference to Full excludes 0, else within noise

Charts are drawn here as SVG: a chart library, inlined, would weigh megabytes in each report. Whatever models and users
wrote is escaped by the templates; a content security policy forbids all else that could load or run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from seqwise.core.errors import UsageError
from seqwise.lab.compare import SCHEMA
from seqwise.lab.rows import ENOUGH, PLAIN, equal_cost, visual_stages
from seqwise.lab.tasks import TASKS, answered

Facet: TypeAlias = tuple[str, Any, str]  # task, length, metric
Verdict: TypeAlias = Literal["loss", "gain", "within noise", ""]

SHARES = {"accuracy", "match"}  # metrics in [0, 1], shown in per cent
LOWER = {name for task in TASKS.values() for name, better in task.metrics.items() if better == "lower"}
COLOURS = 10  # in report.css
DATA_IMAGE = "data:image/png;base64,"
TEMPLATES = Path(__file__).parent / "templates"


def write_report(document: Mapping[str, Any], path: Path) -> None:
    """Writes the report of `document` (schema seqwise.compare/1), atomically. Raises as `render` does, and OSError."""
    text = render(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", errors="replace")  # a token may hold half a surrogate pair
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def render(document: Mapping[str, Any]) -> str:
    """The report as one HTML text. Raises UsageError for a document of another schema."""
    if document.get("schema") != SCHEMA:
        raise UsageError(f"the report needs a document of schema {SCHEMA!r}, got {document.get('schema')!r}")
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["breakable"] = breakable
    env.globals.update(percent=percent, times=times, size=size, spread=spread, signed=signed)
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return env.get_template("report.html").render(
        page=Page(document), style=Markup(style), script=Markup(script), digest=digest, enough=ENOUGH
    )


@dataclass(frozen=True)
class Entry:
    """A method. Its number is its name in the charts; methods that differ in the budget alone share a colour."""

    number: int
    name: str
    family: str
    colour: int

    @property
    def plain(self) -> bool:
        return is_plain(self.name)


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; bounds are None where there are too few prompts for one."""

    value: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, facts: Mapping[str, Any] | None) -> Interval | None:
        value = number(facts, "value")
        return None if value is None else cls(value, number(facts, "low"), number(facts, "high"))


@dataclass(frozen=True)
class Cell:
    """One method on one task in one mode: a row of the document."""

    entry: Entry
    row: Mapping[str, Any] = field(repr=False)

    @property
    def facet(self) -> Facet:
        return str(self.row.get("task", "")), self.row.get("length"), self.metric

    @property
    def mode(self) -> str:
        return str(self.row.get("mode") or "")

    @property
    def metric(self) -> str:
        return str(self.row.get("metric") or "")

    @property
    def n(self) -> int:
        return int(self.row.get("n") or 0)

    @property
    def failed(self) -> bool:
        return self.row.get("status") == "failed"

    @property
    def reason(self) -> str:
        return " ".join(str(self.row.get("reason") or "no reason given").split())

    @property
    def idle(self) -> bool:
        """Never acted, although it should have."""
        return self.row.get("acted") is False and not self.failed and not self.entry.plain

    @cached_property
    def quality(self) -> Interval | None:
        return None if self.failed else Interval.of(self.row)

    @cached_property
    def difference(self) -> Interval | None:
        return None if self.failed or self.entry.plain else Interval.of(self.row.get("difference"))

    @property
    def verdict(self) -> Verdict:
        d = self.difference
        if d is None or d.low is None or d.high is None:
            return ""
        low, high = (-d.high, -d.low) if self.metric in LOWER else (d.low, d.high)
        return "loss" if high < 0 else "gain" if low > 0 else "within noise"

    @property
    def cost(self) -> float | None:
        return self.share("cache_bytes")

    def share(self, name: str) -> float | None:
        """The field in bytes as a share of the plain model's cache."""
        ours, plain = number(self.row, name), number(self.row, "plain_bytes")
        return None if self.failed or ours is None or not plain else ours / plain

    def number(self, name: str) -> float | None:
        return None if self.failed else number(self.row, name)

    # as text

    @property
    def value_text(self) -> str:
        return "" if self.quality is None else measure(self.metric, self.quality.value)

    @property
    def range_text(self) -> str:
        q = self.quality
        return "" if q is None or q.low is None or q.high is None else between(self.metric, q.low, q.high)

    @property
    def difference_text(self) -> str:
        return "" if self.difference is None else measure(self.metric, self.difference.value, signed=True)

    @property
    def difference_range(self) -> str:
        d = self.difference
        return "" if d is None or d.low is None or d.high is None else between(self.metric, d.low, d.high, signed=True)

    @property
    def tip(self) -> str:
        """All about the cell, a line each, for the pointer that rests on it."""
        lines = [
            self.entry.name,
            f"{self.metric} {self.value_text}" + (f"  [{self.range_text}]" if self.range_text else ""),
        ]
        if self.difference_text:
            told = f"  [{self.difference_range}]" if self.difference_range else ""
            lines.append(
                f"to the plain model {self.difference_text}{told}" + (f", {self.verdict}" if self.verdict else "")
            )
        lines.append(f"cache {percent(self.cost)} of plain, {size(self.number('cache_bytes'))}")
        lines.append(f"{self.n} prompts" + (", never acted" if self.idle else ""))
        return "\n".join(lines)


class Page:
    """What the template shows of a document."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.rows: list[Mapping[str, Any]] = list(document.get("rows") or [])
        self.settings: Mapping[str, Any] = document.get("settings") or {}
        self.versions: Mapping[str, Any] = document.get("versions") or {}
        self.date = str(document.get("date") or "")
        self.groups: list[Mapping[str, Any]] = list(document.get("equal_cost") or [])
        self.depth_rows: list[Mapping[str, Any]] = list(document.get("by_depth") or [])
        self.complete = document.get("complete") is not False
        self.notes = [str(note) for note in document.get("notes") or []]
        sample = document.get("sample") or {}
        names = list(dict.fromkeys(str(row.get("method", "")) for row in self.rows))
        families = list(dict.fromkeys(family(name) for name in names if not is_plain(name)))
        self.entries = [
            Entry(i, name, family(name), 0 if is_plain(name) else 1 + families.index(family(name)) % COLOURS)
            for i, name in enumerate(names, 1)
        ]
        by_name = {entry.name: entry for entry in self.entries}
        self.cells = [Cell(by_name[str(row.get("method", ""))], row) for row in self.rows]
        self.tokens = [str(token) for token in sample.get("tokens") or []]
        self.strips = [
            Strip(by_name.get(name), name, self.tokens, shares)
            for name, shares in (sample.get("kept") or {}).items()
            if shares
        ]
        self.pictures = [Picture(number, facts, by_name) for number, facts in enumerate(sample.get("pictures") or [])]

    @property
    def model(self) -> str:
        return str(self.settings.get("model") or "the model")

    @cached_property
    def modes(self) -> list[str]:
        """Question-blind first, then aware, then whatever has no question."""
        order = {"blind": 0, "aware": 1}
        modes = dict.fromkeys(cell.mode for cell in self.cells)
        return sorted(modes, key=lambda mode: next((rank for word, rank in order.items() if word in mode), 2))

    @cached_property
    def facets(self) -> list[Facet]:
        """(task, length, metric) in the order of the rows; cells that failed before they had a metric are in none."""
        return list(dict.fromkeys(cell.facet for cell in self.cells if cell.metric))

    @cached_property
    def main_facets(self) -> list[Facet]:
        """Of each task and length the first metric: what charts and the summary show."""
        return list({facet[:2]: facet for facet in reversed(self.facets)}.values())[::-1]

    def of(self, facet: Facet, mode: str) -> list[Cell]:
        """The cells of one task, length and metric in one mode, those that failed without a metric included."""
        return [
            cell
            for cell in self.cells
            if cell.mode == mode and (cell.facet == facet or (not cell.metric and cell.facet[:2] == facet[:2]))
        ]

    def facet_name(self, facet: Facet) -> str:
        task, length, _ = facet
        several = len({other[1] for other in self.facets if other[0] == task}) > 1
        return f"{task}, {length} tokens" if several else task

    @cached_property
    def panels(self) -> list[tuple[Facet, list[tuple[str, Panel]]]]:
        """Per main facet the chart of each mode, on the same axes so that both can be compared by eye."""
        found = []
        for facet in self.main_facets:
            drawn = {mode: [c for c in self.of(facet, mode) if c.quality and c.cost is not None] for mode in self.modes}
            drawn = {mode: cells for mode, cells in drawn.items() if cells}
            together = [cell for cells in drawn.values() for cell in cells]
            if together:
                found.append((facet, [(mode, Panel(cells, together)) for mode, cells in drawn.items()]))
        return found

    @cached_property
    def tables(self) -> list[tuple[Facet, str, Table]]:
        """Per facet and mode the table of its cells."""
        pairs = [(facet, mode, self.of(facet, mode)) for facet in self.facets for mode in self.modes]
        return [
            (facet, mode, Table(cells, self.tiers(facet, mode)))
            for facet, mode, cells in pairs
            if any(cell.metric for cell in cells)
        ]

    def tiers(self, facet: Facet, mode: str) -> list[Mapping[str, Any]]:
        """The document's groups of equal cost for a facet and mode."""
        return [
            group
            for group in self.groups
            if (group.get("task"), group.get("length"), group.get("metric"), group.get("mode")) == (*facet, mode)
        ]

    @cached_property
    def grids(self) -> list[Grid]:
        """Main metrics against where the answer stands, and against the length where several were tried."""
        found = []
        for task, mode, length in dict.fromkeys((r["task"], r["mode"], r["length"]) for r in self.depth_rows):
            rows = [r for r in self.depth_rows if (r["task"], r["mode"], r["length"]) == (task, mode, length)]
            about = "" if length is None else f", {length} tokens"
            keys = [(tuple(row["depth"]), "{:.0%} to {:.0%}".format(*row["depth"])) for row in rows]
            pairs = [(key, row) for (key, _), row in zip(keys, rows, strict=True)]
            title = f"{task}{about}, by depth of the answer"
            found.append(Grid(title, mode, str(rows[0]["metric"]), dict(sorted(keys)), pairs))
        for task in dict.fromkeys(facet[0] for facet in self.main_facets):
            facets = [facet for facet in self.main_facets if facet[0] == task and facet[1] is not None]
            for mode in self.modes if len(facets) > 1 else ():
                cells = [cell for facet in facets for cell in self.of(facet, mode) if cell.quality]
                if cells:
                    heads = {facet[1]: f"{facet[1]} tokens" for facet in sorted(facets, key=lambda f: int(f[1]))}
                    pairs = [(cell.facet[1], cell.row) for cell in cells]
                    found.append(Grid(f"{task}, by length", mode, cells[0].metric, heads, pairs))
        return [grid for grid in found if len(grid.heads) > 1]

    def entry(self, name: str) -> Entry:
        return next(entry for entry in self.entries if entry.name == name)

    @cached_property
    def columns(self) -> list[tuple[str, list[Facet]]]:
        """The quality columns of the summary: per mode the main facets that have cells in it."""
        shown = {mode: [f for f in self.main_facets if any(c.metric for c in self.of(f, mode))] for mode in self.modes}
        return [(mode, facets) for mode, facets in shown.items() if facets]

    def at(self, entry: Entry, facet: Facet, mode: str) -> Cell | None:
        return next((cell for cell in self.of(facet, mode) if cell.entry is entry), None)

    def costs(self, entry: Entry, name: str) -> list[float]:
        """The measured cost `name` of a method over its cells; bytes as a share of the plain model's."""
        mine = [cell for cell in self.cells if cell.entry is entry]
        found = [cell.share(name) if name.endswith("_bytes") else cell.number(name) for cell in mine]
        return [value for value in found if value is not None]

    def visual_tokens(self, entry: Entry) -> str:
        """The visual tokens of the prompts and behind each stage."""
        return visual_stages([cell.row for cell in self.cells if cell.entry is entry])

    def failures(self, entry: Entry) -> dict[str, list[str]]:
        """Reason -> the task and mode of each cell that failed for it."""
        found: dict[str, list[str]] = {}
        for cell in self.cells:
            if cell.entry is entry and cell.failed:
                where = ", ".join(part for part in (str(cell.row.get("task") or ""), mode_name(cell.mode)) if part)
                found.setdefault(cell.reason, []).append(where)
        return {reason: list(dict.fromkeys(cells)) for reason, cells in found.items()}

    def failed(self, entry: Entry) -> bool:
        """Whether the method has no result at all."""
        return all(cell.failed for cell in self.cells if cell.entry is entry)

    def idle(self, entry: Entry) -> bool:
        return any(cell.idle for cell in self.cells if cell.entry is entry)

    @property
    def few(self) -> bool:
        """Whether some number stands on too few prompts for a ranking."""
        return any(cell.n < ENOUGH for cell in self.cells if cell.quality)

    @property
    def title(self) -> str:
        tried = sum(not entry.plain for entry in self.entries)
        verbs = "saves and costs" if tried == 1 else "save and cost"
        return f"What {count(tried, 'method')} {verbs} on {self.model}"

    @cached_property
    def headline(self) -> list[tuple[str, str]]:
        """The findings in plain words, each with the words that open it."""
        found = [(mode_name(mode).capitalize(), self._finding(mode, facets)) for mode, facets in self.columns]
        if not self.complete:
            found.append(("Unfinished", "The comparison was stopped; these are the prompts finished by then."))
        if self.few:
            found.append(
                (
                    "No ranking",
                    f"Some numbers stand on fewer than {ENOUGH} prompts, so methods are not ranked. Intervals are "
                    "wide: a real loss can hide within noise.",
                )
            )
        if broken := [entry.name for entry in self.entries if self.failures(entry)]:
            found.append(("Failed", f"{listed(broken)}: the table of methods says why."))
        if idle := [entry.name for entry in self.entries if self.idle(entry)]:
            found.append(
                ("Never acted", f"{listed(idle)}: on some task nothing changed, so its numbers are the plain model's.")
            )
        return [(opening, text) for opening, text in found if text]

    def _finding(self, mode: str, facets: list[Facet]) -> str:
        """How the methods stand to the plain model in one mode; empty without a plain model."""
        verdicts: dict[Entry, list[Verdict]] = {}
        prompts: list[float] = []
        for facet in facets:
            for cell in self.of(facet, mode):
                if cell.verdict:
                    verdicts.setdefault(cell.entry, []).append(cell.verdict)
                    prompts.append(cell.n)
        losing = [entry for entry, seen in verdicts.items() if "loss" in seen]
        level = [entry for entry in verdicts if entry not in losing]
        if not verdicts:
            return ""
        based = f"On {spread(prompts, lambda n: count(n, 'prompt'))}"
        every = " on at least one task" if len(facets) > 1 else ""
        if not losing:
            return f"{based}, none of {count(len(verdicts), 'method')} loses quality measurably{every}."
        verb = "loses" if len(losing) == 1 else "lose"
        text = f"{based}, {len(losing)} of {count(len(verdicts), 'method')} measurably {verb} quality{every}."
        if len(level) > 3:
            text += f" The other {len(level)} stay within noise of the plain model, or above it."
        elif level:
            text += f" Within noise of the plain model, or above it: {listed(entry.name for entry in level)}."
        return text

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Settings and versions as (name, text)."""
        return list(flat(self.settings)) + ([("date", self.date)] if self.date else [])

    @property
    def version_facts(self) -> list[tuple[str, str]]:
        return list(flat(self.versions))

    mode_name = staticmethod(lambda mode: mode_name(mode))


class Grid:
    """One metric, methods against depths or lengths."""

    def __init__(
        self, title: str, mode: str, metric: str, heads: Mapping[Any, str], rows: list[tuple[Any, Mapping[str, Any]]]
    ) -> None:
        self.title, self.mode, self.metric, self.heads = title, mode, metric, heads
        self.names = list(dict.fromkeys(str(row["method"]) for _, row in rows))
        self.at = {(str(row["method"]), key): row for key, row in rows}

    def texts(self, name: str) -> list[tuple[str, str]]:
        """Of one method per column the value and its interval, empty where it was not measured."""
        rows = [self.at.get((name, key)) for key in self.heads]
        return [("", "") if row is None else (self.value(row), self.range(row)) for row in rows]

    def value(self, row: Mapping[str, Any]) -> str:
        return measure(self.metric, row["value"])

    def range(self, row: Mapping[str, Any]) -> str:
        return "" if row["low"] is None else between(self.metric, row["low"], row["high"])

    def n(self, key: Any) -> int:
        return max(int(row["n"]) for (_, at), row in self.at.items() if at == key)


class Table:
    """The cells of one facet and mode in groups of equal cost, with the tiers that the document states for them."""

    def __init__(self, cells: list[Cell], stated: list[Mapping[str, Any]]) -> None:
        done = {cell.entry.name: cell for cell in cells if cell.quality}
        self.failed = [cell for cell in cells if cell.failed]
        self.few = any(cell.n < ENOUGH for cell in done.values())
        self.metric = next(cell.metric for cell in cells if cell.metric)
        self.lower = self.metric in LOWER
        self.groups = grouped(list(done.values()))
        self.tier = {
            name: rank
            for group in stated
            if group["cost"] == "cache_bytes" and len(group["methods"]) > 1
            for rank, names in enumerate(group["tiers"] or [], 1)
            for name in names
        }
        for group in self.groups:
            group.sort(key=lambda cell: (self.tier.get(cell.entry.name, 0), cell.entry.number))
        # by another cost, for methods that do not save bytes: (shares, tiers of entries, whether these are ranks)
        self.same_work = [
            (
                group["share"],
                [[done[name].entry for name in tier] for tier in group["tiers"] or [group["methods"]]],
                bool(group["tiers"]),
            )
            for group in stated
            if group["cost"] == "attention_work" and len(group["methods"]) > 1
        ]
        intervals = [cell.difference for cell in done.values() if cell.difference]
        reach = [abs(x) for d in intervals for x in (d.value, d.low, d.high) if x is not None]
        self.reach = max(reach, default=0) or 1.0

    def forest(self, cell: Cell) -> tuple[float, float, float] | None:
        """(low, value, high) of the paired difference on a scale of -50 ... 50, better to the right."""
        d = cell.difference
        if d is None:
            return None
        way = -1 if self.lower else 1
        at = sorted(48 * way * (d.value if x is None else x) / self.reach for x in (d.low, d.high))
        return at[0], 48 * way * d.value / self.reach, at[1]


class Panel:
    """Quality against cost as SVG coordinates; up is better whatever the metric."""

    width, height = 440, 300
    left, right, top, bottom = 54, 14, 14, 46
    step, bar, disc, margin = 4, 8, 18, 13  # of the search; least distance of bars, of marks; around a group

    def __init__(self, cells: list[Cell], axes: list[Cell]) -> None:
        self.metric = cells[0].metric
        self.lower = self.metric in LOWER
        ends = [x for cell in axes if (q := cell.quality) for x in (q.value, q.low, q.high) if x is not None]
        self.y_ticks = ticks(0, 1) if self.metric in SHARES else ticks(min(ends), max(ends))
        low, high = min(*ends, self.y_ticks[0]), max(*ends, self.y_ticks[-1])
        pad = 0.06 * (high - low)
        self.low, self.high = low - pad, high + pad
        most = max([1.0, *(cell.cost or 0 for cell in axes)])
        self.x_ticks = ticks(0, most)
        self.most = most * 1.06
        self.points = self._spread(cells)
        x = {cell.entry: at for cell, at in self.points}
        self.bands = [
            (min(xs) - self.margin, max(xs) + self.margin)
            for group in grouped(cells)
            if len(xs := [x[cell.entry] for cell in group]) > 1
        ]
        by_family: dict[str, list[tuple[float, float]]] = {}
        for cell, at in sorted(self.points, key=lambda point: point[0].cost or 0):
            by_family.setdefault(cell.entry.family, []).append((at, self.y(cell.quality.value)))  # type: ignore[union-attr]
        colours = {cell.entry.family: cell.entry.colour for cell in cells}
        self.lines = [
            (colours[name], " ".join(f"{x:.1f},{y:.1f}" for x, y in line))
            for name, line in by_family.items()
            if len(line) > 1
        ]
        self.plain = next((self.y(cell.quality.value) for cell in cells if cell.entry.plain and cell.quality), None)

    def x(self, cost: float) -> float:
        return self.left + (self.width - self.left - self.right) * cost / self.most

    def y(self, value: float) -> float:
        up = (value - self.low) / (self.high - self.low)
        up = 1 - up if self.lower else up
        return self.height - self.bottom - (self.height - self.top - self.bottom) * up

    def value(self, tick: float) -> str:
        return percent(tick) if self.metric in SHARES else f"{tick:g}".replace("-", "\N{MINUS SIGN}")

    def _spread(self, cells: list[Cell]) -> list[tuple[Cell, float]]:
        """Each cell with its x, moved sideways as little as keeps marks, crossing bars and groups apart."""
        placed: list[tuple[Cell, float]] = []
        taken: list[tuple[float, float, float, float]] = []  # x, y and both ends of the bar
        edge = self.left + 8.0
        for group in grouped(cells):
            for cell in sorted(group, key=lambda cell: (cell.cost or 0, cell.entry.number)):
                q = cell.quality
                assert q is not None
                home, y = self.x(cell.cost or 0), self.y(q.value)
                a, b = sorted(self.y(q.value if end is None else end) for end in (q.low, q.high))
                for step in range(2 * self.width // self.step):  # 0, right, left, further right, ...
                    x = home + (step + 1) // 2 * self.step * (1 if step % 2 else -1)
                    inside = edge <= x <= self.width - self.right - 8
                    marks = all(math.hypot(x - at, y - other) >= self.disc for at, other, _, _ in taken)
                    bars = all(abs(x - at) >= self.bar or b < c or d < a for at, _, c, d in taken)
                    if inside and marks and bars:
                        break
                else:
                    x = home  # no room: marks overlap, the table still tells them apart
                placed.append((cell, x))
                taken.append((x, y, a, b))
            edge = max(edge, *(at + 2 * self.margin for cell, at in placed if cell in group))
        return placed


class Picture:
    """One question about images, and what each method kept of them."""

    def __init__(self, number: int, facts: Mapping[str, Any], by_name: Mapping[str, Entry]) -> None:
        self.type, self.question, self.answer = (str(facts.get(name) or "") for name in ("task", "question", "answer"))
        self.question = self.question.replace("<image>", "").strip()
        images = [str(url) for url in facts.get("images") or []]
        self.images = {f"image-{number}-{i}": url for i, url in enumerate(images) if url.startswith(DATA_IMAGE)}
        self.replies = [
            Reply(by_name.get(name), name, seen, self.answer, list(self.images))
            for name, seen in (facts.get("methods") or {}).items()
        ]


class Reply:
    """What one method answered, and what it saw: a cut per stage and map of visual tokens."""

    def __init__(
        self, entry: Entry | None, name: str, seen: Mapping[str, Any], answer: str, images: Sequence[str]
    ) -> None:
        self.entry, self.name, self.text = entry, name, " ".join(str(seen.get("text") or "").split())
        self.right = answered(self.text, answer)
        maps = list(seen.get("maps") or [])
        shown = len({one["image"] for one in maps}) == len(images)  # else tiles, each a part of an image
        self.cuts = [
            Cut(one, stage, images[int(one["image"])] if shown else None, _named(one, maps))
            for one in maps
            for stage in one["stages"]
        ]


def _named(one: Mapping[str, Any], maps: Sequence[Mapping[str, Any]]) -> str:
    """Which map of visual tokens, where there are several."""
    tiles = [other["tile"] for other in maps if other["image"] == one["image"]]
    several = len({other["image"] for other in maps}) > 1
    name = f"image {int(one['image']) + 1}" if several else ""
    if tiles == [0, 1]:
        name = f"{name} {'tiles' if one['tile'] else 'overview'}"
    elif len(tiles) > 1:
        name = f"{name} frame {int(one['tile']) + 1}"
    return name.strip()


class Cut:
    """The cells of one map that a stage left, as SVG paths in cells."""

    def __init__(self, one: Mapping[str, Any], stage: Mapping[str, Any], image: str | None, where: str) -> None:
        self.rows, self.columns, self.image, self.where = int(one["rows"]), int(one["columns"]), image, where
        self.stage = str(stage["name"])
        kept = {int(cell) for cell in stage["kept"]}
        merged = {int(cell) for group in stage["members"].values() for cell in group} - kept
        everything = set(range(self.rows * self.columns))
        self.kept, self.merged, self.all = len(kept), len(merged), len(everything)
        self.gone_path, self.merged_path, self.kept_path = map(self._path, (everything - kept - merged, merged, kept))

    def _path(self, cells: Iterable[int]) -> str:
        return "".join(f"M{c % self.columns} {c // self.columns}h1v1h-1z" for c in sorted(cells))

    @property
    def title(self) -> str:
        told = f"{self.stage}: {self.kept} of {self.all}"
        told += f", {self.merged} merged into them" if self.merged else ""
        return f"{self.where}, {told}" if self.where else told


class Strip:
    """What one method kept of the sample: per token the share of layers and heads that kept it, in tenths."""

    def __init__(self, entry: Entry | None, name: str, tokens: list[str], shares: Sequence[Any]) -> None:
        self.entry, self.name = entry, name
        self.shares = [min(1.0, max(0.0, float(share or 0))) for share in shares][: len(tokens)]
        self.levels = [round(10 * share) for share in self.shares]
        self.mean = sum(self.shares) / max(1, len(self.shares))
        self.everywhere, self.nowhere = self.shares.count(1.0), self.shares.count(0.0)
        self.words = [(level, "".join(tokens[a:b])) for level, a, b in runs(self.levels)]

    @property
    def paths(self) -> list[tuple[int, str]]:
        """Per level above 0 one SVG path of its tokens, a token 1 wide."""
        paths: dict[int, str] = {}
        for level, a, b in runs(self.levels):
            if level:
                paths[level] = paths.get(level, "") + f"M{a} 0h{b - a}v1h{a - b}z"
        return sorted(paths.items())


def grouped(cells: list[Cell]) -> list[list[Cell]]:
    """Cells in groups of equal cache bytes, cheapest first; those without a cost come last."""
    by_name = {cell.entry.name: cell for cell in cells}
    groups = equal_cost({name: cell.cost for name, cell in by_name.items() if cell.cost is not None})
    unknown = [cell for cell in cells if cell.cost is None]
    return [[by_name[name] for name in names] for names in groups] + ([unknown] if unknown else [])


def runs(levels: Sequence[int]) -> list[tuple[int, int, int]]:
    """Equal neighbours as (level, start, stop)."""
    found: list[tuple[int, int, int]] = []
    for i, level in enumerate(levels):
        if found and found[-1][0] == level:
            found[-1] = (level, found[-1][1], i + 1)
        else:
            found.append((level, i, i + 1))
    return found


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, four to five steps of 1, 2, 2.5 or 5 times a power of ten."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.8)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(facts: Mapping[str, Any] | None, name: str) -> float | None:
    """A finite number of a document, or None."""
    value = None if facts is None else facts.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def measure(metric: str, value: float, *, signed: bool = False) -> str:
    """A value of a metric as text; differences of shares are in percentage points."""
    if metric in SHARES:
        return plus_minus(100 * value, 0, signed) + (" points" if signed else "\N{NO-BREAK SPACE}%")
    return plus_minus(value, 3 if abs(value) < 10 else 1, signed)


def plus_minus(value: float, decimals: int, signed: bool) -> str:
    """With a minus sign as wide as the plus sign; what rounds to 0 has neither."""
    figure = f"{value:{'+' if signed else ''}.{decimals}f}"
    return figure.lstrip("+-") if float(figure) == 0 else figure.replace("-", "\N{MINUS SIGN}")


def between(metric: str, low: float, high: float, *, signed: bool = False) -> str:
    texts = [
        measure(metric, x, signed=signed).removesuffix(" points").removesuffix("\N{NO-BREAK SPACE}%")
        for x in (low, high)
    ]
    return f"{texts[0]} to {texts[1]}"


def percent(share: float | None) -> str:
    if share is None:
        return "not measured"
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%" if 0 < share < 0.0995 else f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def times(ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{ratio:.2f}\N{MULTIPLICATION SIGN}"


def signed(value: float) -> str:
    return plus_minus(value, 2, signed=True)


def spread(values: Sequence[float], text: Any) -> str:
    """The values as one text: `24 %`, or `24 to 31 %` where they differ."""
    if not values:
        return ""
    low, high = text(min(values)), text(max(values))
    unit = re.sub(r"^[\d.]+", "", high)
    return str(high) if low == high else f"{low.removesuffix(unit)} to {high}"


def size(count: float | None) -> str:
    if count is None:
        return "not measured"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.{0 if count >= 100 * scale else 1}f}\N{NO-BREAK SPACE}{unit}"
    return f"{count:.0f}\N{NO-BREAK SPACE}bytes"


def mode_name(mode: str) -> str:
    if "blind" in mode:
        return "question-blind"
    return "question-aware" if "aware" in mode else mode.replace("_", " ") or "no question"


def count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def listed(names: Iterable[str], most: int = 3) -> str:
    """`a, b and c`; above `most` names their number."""
    found = list(names)
    if len(found) > most:
        return f"{len(found)} methods"
    return " and ".join(part for part in (", ".join(found[:-1]), found[-1] if found else "") if part)


def family(name: str) -> str:
    """The method without its budgets."""
    return re.sub(r"\bbudget=(\([^)]*\)|[^,)]*)(,\s*)?", "", name)


def breakable(name: str) -> Markup:
    """A method's name, escaped, that may break after its brackets."""
    return escape(name).replace("(", Markup("(<wbr>"))


def is_plain(name: str) -> bool:
    return name in (PLAIN, PLAIN.removesuffix("()"))


def flat(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as (dotted name, text)."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            yield (
                f"{prefix}{name}",
                "\n".join(x if isinstance(x, str) else json.dumps(x, default=str) for x in value) or "none",
            )
        elif value is None or isinstance(value, bool):
            yield f"{prefix}{name}", {None: "not set", True: "yes", False: "no"}[value]
        else:
            yield f"{prefix}{name}", str(value)
