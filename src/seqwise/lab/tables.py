"""A comparison's document as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from seqwise.lab.rows import PLAIN, visual_stages
from seqwise.lab.tasks import TASKS

_SHARES = ("accuracy", "match")
_LOWER = {name for kind in TASKS.values() for name, better in kind.metrics.items() if better == "lower"}


def tables(document: Mapping[str, Any]) -> list[RenderableType]:
    """Per length a table of quality for each mode and one of cost, then failures, rankings and notes."""
    shown: list[RenderableType] = []
    for length in dict.fromkeys(row["length"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["length"] == length]
        about = "your own prompts" if length is None else f"{length} tokens of context"
        looking = any(row["visual_tokens"] for row in rows)
        about = "questions about images" if looking else about
        for mode in dict.fromkeys(row["mode"] for row in rows):
            shown.append(_quality([row for row in rows if row["mode"] == mode], f"question-{mode}, {about}"))
        shown.append(_image_costs(rows, about) if looking else _costs(rows, about))
        shown += _depths([row for row in document["by_depth"] if row["length"] == length], about)
    lengths = list(dict.fromkeys(row["length"] for row in document["rows"] if row["length"] is not None))
    if len(lengths) > 1:
        shown += _lengths(document["rows"], lengths)
    reasons = dict.fromkeys((row["method"], row["reason"]) for row in document["rows"] if row["status"] == "failed")
    shown += [Text(f"{method} failed: {why}", style="red") for method, why in reasons]
    shown += [
        Text(f"{_cell(group)}: {_ranking(group)}")
        for group in document["equal_cost"]
        if group["tiers"] and len(group["methods"]) > 1
    ]
    return shown + [Text(note, style="dim") for note in document["notes"]]


def _quality(rows: list[dict[str, Any]], about: str) -> Table:
    grid = Table(
        box=SIMPLE_HEAD, title=f"Quality, {about}", title_justify="left", caption_justify="left", padding=(0, 1, 0, 0)
    )
    grid.caption = "mean, 95 % interval; ▼ worse, ▲ better than the plain model: the paired 95 % interval excludes 0"
    columns = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    grid.add_column("method", overflow="fold")
    for task, metric in columns:
        n = max(row["n"] for row in rows if (row["task"], row["metric"]) == (task, metric))
        way = " ↓" if metric in _LOWER else ""
        grid.add_column(f"{task.partition('(')[0]}\n{metric}{way}\nn={n}", justify="right", no_wrap=True)
    at = {(row["method"], row["task"], row["metric"]): row for row in rows}
    for method in dict.fromkeys(row["method"] for row in rows):
        grid.add_row(
            _name(method, [row for row in rows if row["method"] == method]),
            *(_value(at.get((method, *column))) for column in columns),
        )
    return grid


def _value(row: Mapping[str, Any] | None) -> Text:
    if row is None:
        return Text("")
    if row["status"] == "failed":
        return Text("failed", style="red")
    text = Text(f"{_mark(row)}{_number(row['metric'], row['value'])}")
    if row["low"] is not None:
        text.append(f"\n[{_number(row['metric'], row['low'])}, {_number(row['metric'], row['high'])}]", style="dim")
    return text


def _mark(row: Mapping[str, Any]) -> str:
    d = row["difference"]
    if not d or d["low"] is None or d["low"] <= 0 <= d["high"] or abs(d["value"]) < 0.005:  # less than is shown
        return ""
    return "▲ " if (d["low"] > 0) != (row["metric"] in _LOWER) else "▼ "


def _number(metric: str, value: float) -> str:
    return f"{value:.0%}" if metric in _SHARES else f"{value:.2f}"


def _name(method: str, rows: list[dict[str, Any]]) -> Text:
    text = Text(method)
    if method != PLAIN and all(row["status"] == "ok" and not row["acted"] for row in rows):
        text.append("\nnever acted", style="yellow")
    return text


def _depths(rows: list[dict[str, Any]], about: str) -> list[Table]:
    """Per task and mode a table of the main metric by where the answer stands; none where only one place was tried."""
    shown = []
    for task, mode in dict.fromkeys((row["task"], row["mode"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["mode"]) == (task, mode)]
        parts = sorted({tuple(row["depth"]) for row in mine})
        if len(parts) < 2:
            continue
        metric = mine[0]["metric"]
        grid = _plain_grid(f"{task}, {metric} by depth of the answer, question-{mode}, {about}")
        for low, high in parts:
            n = max(row["n"] for row in mine if tuple(row["depth"]) == (low, high))
            grid.add_column(f"{low:.0%} to {high:.0%}\nn={n}", justify="right", no_wrap=True)
        at = {(row["method"], tuple(row["depth"])): row for row in mine}
        for method in dict.fromkeys(row["method"] for row in mine):
            cells = (at.get((method, part)) for part in parts)
            grid.add_row(method, *("" if row is None else _number(metric, row["value"]) for row in cells))
        shown.append(grid)
    return shown


def _lengths(rows: list[dict[str, Any]], lengths: list[int]) -> list[Table]:
    """Per task, mode and main metric: methods against tokens of context."""
    shown = []
    for task, mode in dict.fromkeys((row["task"], row["mode"]) for row in rows if row["length"] is not None):
        mine = [row for row in rows if (row["task"], row["mode"]) == (task, mode)]
        metric = mine[0]["metric"]
        grid = _plain_grid(f"{task}, {metric} by length, question-{mode}")
        for length in lengths:
            grid.add_column(f"{length}\ntokens", justify="right", no_wrap=True)
        at = {(row["method"], row["length"]): row for row in mine if row["metric"] == metric}
        for method in dict.fromkeys(row["method"] for row in mine):
            grid.add_row(method, *(_value(at.get((method, length))) for length in lengths))
        shown.append(grid)
    return shown


def _plain_grid(title: str) -> Table:
    grid = Table(box=SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
    grid.add_column("method", overflow="fold")
    return grid


def _costs(rows: list[dict[str, Any]], about: str) -> Table:
    grid = Table(
        box=SIMPLE_HEAD, title=f"Cost, {about}", title_justify="left", caption_justify="left", padding=(0, 1, 0, 0)
    )
    grid.caption = (
        "means over tasks; cache and its peak as allocated; prefill and seconds per token: the plain model's = 1; "
        "rank: correlation of a prompt token's place and how much of it is kept, + for later ones"
    )
    for name in ("method", "kept", "rank", "cache", "MiB", "peak MiB", "attention", "prefill", "per token"):
        grid.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = list(
            {
                (row["task"], row["mode"]): row for row in rows if row["method"] == method and row["status"] == "ok"
            }.values()
        )
        if not mine:
            grid.add_row(method, *["-"] * 8)
            continue

        def mean(name: str, mine: list[dict[str, Any]] = mine) -> float | None:
            values = [row[name] for row in mine if row[name] is not None]
            return sum(values) / len(values) if values else None

        cache, plain, peak = mean("cache_bytes"), mean("plain_bytes"), mean("peak_bytes")
        assert cache is not None and plain is not None and peak is not None
        grid.add_row(
            method, f"{mean('kept_share'):.0%}", _rank(mean("position_correlation")),
            f"{cache / plain:.0%}", f"{cache / 2**20:.1f}", f"{peak / 2**20:.1f}",
            f"{mean('attention_work'):.0%}", _times(mean("prefill_ratio")), _times(mean("decode_ratio")),
        )  # fmt: skip
    return grid


def _image_costs(rows: list[dict[str, Any]], about: str) -> Table:
    grid = Table(
        box=SIMPLE_HEAD, title=f"Cost, {about}", title_justify="left", caption_justify="left", padding=(0, 1, 0, 0)
    )
    grid.caption = (
        "means over types; visual tokens of the prompt and behind each stage; operations of tower and decoder at "
        "prefill, prefill time and seconds per token: the plain model's = 1; cache as allocated"
    )
    for name in ("method", "visual tokens", "operations", "cache", "KiB", "prefill", "per token"):
        grid.add_column(name, justify="left" if name in ("method", "visual tokens") else "right", overflow="fold")
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method and row["status"] == "ok"]
        if not mine:
            grid.add_row(method, *["-"] * 6)
            continue
        cache, plain = (sum(row[name] for row in mine) / len(mine) for name in ("cache_bytes", "plain_bytes"))
        grid.add_row(
            method, visual_stages(mine), _share(_average(mine, "operations_ratio")), f"{cache / plain:.0%}",
            f"{cache / 2**10:.0f}", _times(_average(mine, "prefill_ratio")), _times(_average(mine, "decode_ratio")),
        )  # fmt: skip
    return grid


def _average(rows: list[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return sum(values) / len(values) if values else None


def _share(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.0%}"


def _rank(correlation: float | None) -> str:
    return "-" if correlation is None else f"{correlation:+.2f}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}×"


def _cell(group: Mapping[str, Any]) -> str:
    length = "" if group["length"] is None else f", {group['length']} tokens"
    low, high = group["share"]
    cost = {"cache_bytes": "of the cache", "attention_work": "of the attention work"}[group["cost"]]
    return f"{group['task']}, {group['mode']}{length}, at {low:.0%} to {high:.0%} {cost}"


def _ranking(group: Mapping[str, Any]) -> str:
    return " > ".join(" = ".join(tier) for tier in group["tiers"])
