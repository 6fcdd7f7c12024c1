"""`seqwise probe`: runs probes on a model, keeps what is finished, and makes one document and its tables.

`docs/guide/probe.md` describes the document.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from seqwise.core.errors import SeqwiseError, UsageError
from seqwise.lab.compare import DEFAULT_MODEL, check_writable
from seqwise.lab.files import cache_dir
from seqwise.lab.keeping import Keeper, provenance, sha256
from seqwise.lab.probes import PROBES, base
from seqwise.lab.probes.base import Result, Settings
from seqwise.lab.registry import load_methods
from seqwise.lab.rows import PLAIN
from seqwise.lab.zoo import load_model

SCHEMA = "seqwise.probe/1"


class Probing:
    """Some probes on one model: `run` measures, `document` says what has been found so far.

    Everything that needs no model is checked here: raises UsageError for unknown probes, methods, fields and values.
    """

    def __init__(
        self, names: Sequence[str], settings: Settings, *, out: Path | None = None, resume: bool = False
    ) -> None:
        unknown = [name for name in names if name not in PROBES]
        if unknown or not names:
            said = f"unknown probe {unknown[0]!r}" if unknown else "name a probe"
            raise UsageError(f"{said}; there are {', '.join(PROBES)}")
        if settings.task is not None and len(set(names)) > 1:
            raise UsageError(f"--task holds the items of one probe, got {len(set(names))} probes; name one")
        load_methods(settings.plugins)
        self.settings = settings
        self.probes = [PROBES[name] for name in dict.fromkeys(names)]
        self.facts = self._facts()
        self.records: dict[str, dict[str, Any]] = {probe.name: {} for probe in self.probes}
        self.refused: dict[str, str] = {}  # probe -> why it could not be measured, where others could
        self.complete = False
        self.keeper = Keeper(out, self._place(), schema=SCHEMA, results="a probe's results")
        if out is not None:
            check_writable(out, "--out")
        self.resume = resume

    def _facts(self) -> dict[str, Any]:
        """The settings as JSON values, defaults filled in; two runs can be joined where they are equal."""
        s = self.settings
        files = [*s.plugins, *([] if s.task is None else [s.task])]
        own = {probe.name: probe.facts(s) for probe in self.probes}
        shared = asdict(s) | {"model": s.model or DEFAULT_MODEL, "plugins": list(s.plugins)}
        del shared["remedies"], shared["items"]  # each probe has its own defaults
        return {**shared, "files_sha256": {str(path): sha256(path) for path in files}, "probes": own}

    def _place(self) -> Path:
        key = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]
        return cache_dir() / "probe" / f"{key}.json"

    # measuring

    def run(self, console: Console | None = None) -> None:
        """Measures what is missing. Keeps all that is finished in `out` as it goes, also when interrupted.

        Raises UsageError for what the model or the disk cannot do, KeyboardInterrupt as it comes.
        """
        console = console or Console(stderr=True)
        if self.resume and (document := self.keeper.read(self.facts, console)) is not None:
            self.records = document["records"]
        s = self.settings
        with console.status(f"loading {self.facts['model']}"):
            model, tokenizer = load_model(
                s.model, dtype=s.dtype, device=s.device, trust_remote_code=s.trust_remote_code
            )
        bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        keeping, kept_at = 0.0, -math.inf

        def keep() -> None:
            nonlocal keeping, kept_at
            start = time.monotonic()
            if start - kept_at > 20 * keeping:  # intervals of many items take a while
                self.keeper.keep(self.document, console)
                kept_at, keeping = time.monotonic(), time.monotonic() - start

        with bars:
            try:
                for probe in self.probes:
                    bar = bars.add_task(probe.name)

                    def show(text: str, done: int, total: int, bar: Any = bar) -> None:
                        bars.update(bar, description=text, completed=done, total=total)

                    torch.manual_seed(s.seed)
                    try:
                        probe.measure(model, tokenizer, s, base.Progress(self.records[probe.name], show, keep))
                    except SeqwiseError as error:
                        if len(self.probes) == 1:
                            raise
                        self.refused[probe.name] = " ".join(str(error).split())
            except BaseException:
                self.keeper.keep(self.document, console)
                raise
        self.complete = True
        self.keeper.keep(self.document, console)

    # the document

    def document(self) -> dict[str, Any]:
        """All that has been found so far, as JSON values (docs/guide/probe.md)."""
        found = {
            probe.name: Result((), (), (self.refused[probe.name],))
            if probe.name in self.refused
            else probe.result(self.settings, self.records[probe.name])
            for probe in self.probes
        }
        return {
            "schema": SCHEMA,
            "settings": self.facts,
            **provenance(),
            "complete": self.complete,
            "probes": [
                {
                    "name": probe.name,
                    "asks": probe.asks,
                    "status": "failed" if probe.name in self.refused else "ok",
                    **found[probe.name].to_dict(),
                    "reading": probe.reading,
                    "finding": probe.finding,
                }
                for probe in self.probes
            ],
            "records": self.records,
        }

    @property
    def failed(self) -> bool:
        """Whether a probe or a method failed somewhere."""
        measured = [probe for probe in self.probes if probe.name not in self.refused]
        return bool(self.refused) or any(
            probe.result(self.settings, self.records[probe.name]).failed for probe in measured
        )


# the document as tables for a terminal


def tables(document: Mapping[str, Any]) -> list[RenderableType]:
    """Per probe what was asked, its tables, the verdicts, how to read it, and what papers found."""
    shown: list[RenderableType] = []
    for probe in document["probes"]:
        shown.append(Text(f"\n{probe['name']}: {probe['asks']}", style="bold"))
        if probe["status"] == "failed":
            shown += [Text(f"failed: {why}", style="red") for why in probe["notes"]]
            continue
        for group in dict.fromkeys(row["group"] for row in probe["rows"]):
            shown.append(_grid(group, [row for row in probe["rows"] if row["group"] == group]))
        for one in probe["verdicts"]:
            about = one["part"] if one["method"] == PLAIN else f"{one['part']}, {one['method']}"
            shown.append(Text.assemble(f"{about}: ", (one["verdict"], "bold"), f"; {one['reading']}"))
        why: dict[tuple[str, str], list[str]] = {}
        for row in probe["rows"]:
            if row["reason"]:
                said = f"{row['group']}, {row['status']}: {row['reason']}"
                why.setdefault((row["status"], said), []).append(row["method"])
        shown += [
            Text(f"{', '.join(methods)}: {said}", style="red" if status == "failed" else "yellow")
            for (status, said), methods in why.items()
        ]
        shown.append(Padding(Text(f"How to read it. {probe['reading']}", style="dim"), (1, 0, 0, 0)))
        shown.append(Text(f"What papers found. {probe['finding']}", style="dim"))
        shown += [Text(note, style="dim") for note in probe["notes"]]
    return shown


def _grid(group: str, rows: list[dict[str, Any]]) -> Table:
    grid = Table(box=SIMPLE_HEAD, title=Text(group), title_justify="left", caption_justify="left", padding=(0, 1, 0, 0))
    n = max(row["n"] for row in rows)
    grid.caption = f"{n} items, 95 % intervals"
    if any(row["difference"] for row in rows):
        grid.caption += "; below them the paired difference to the plain model in points, and its interval"
    columns = list(dict.fromkeys(row["what"] for row in rows))
    grid.add_column("method", overflow="fold")
    for what in columns:
        grid.add_column(what, justify="right")
    at = {(row["method"], row["what"]): row for row in rows}
    for method in dict.fromkeys(row["method"] for row in rows):
        grid.add_row(Text(method), *(_value(at.get((method, what))) for what in columns))
    return grid


def _value(row: Mapping[str, Any] | None) -> Text:
    if row is None:
        return Text("")
    if row["value"] is None:
        return Text(row["status"], style="red" if row["status"] == "failed" else "yellow")
    text = Text(f"{row['value']:.0%}")
    if row["low"] is not None:
        text.append(f"\n[{100 * row['low']:.0f}, {100 * row['high']:.0f}]", style="dim")
    if row["note"]:
        text.append(f"\n{row['note']}", style="dim")
    change = row["difference"]
    if change:
        span = "" if change["low"] is None else f"\n[{100 * change['low']:+.0f}, {100 * change['high']:+.0f}]"
        text.append(f"\n{100 * change['value']:+.0f}{span}", style="cyan")
    return text
