"""Reproductions: a paper's claims, measured at a size that runs anywhere, with a verdict from paired intervals.

    d_si    = ours_si - baseline_si                    item i of seed s
    [l, h]  = 95 % interval of the mean of d, clustered over seeds, then items
    ">"  holds iff l >  margin         "<"  holds iff h < -margin       (ours is better by more than the margin)
    ">=" holds iff l > -margin         "<=" holds iff h <  margin       (ours is no worse than by the margin)

Claims, margins, baselines and seeds are constants of the file that states them, written before any result.
A file `seqwise/lab/reproduce/<slug with _>.py` holds one `REPRODUCTION`; its result is `seqwise/lab/results/SLUG.json`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import json
import math
import pkgutil
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table
from rich.text import Text

import seqwise.lab.reproduce
from seqwise.core.errors import UsageError
from seqwise.lab import catalogue
from seqwise.lab.files import cache_dir, write_json
from seqwise.lab.intervals import Interval, paired_difference

RESULTS = Path(__file__).parent / "results"
NOT_TESTABLE: Literal["not testable at this size"] = "not testable at this size"

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


def judge(claim: Claim, difference: Interval) -> Verdict:
    """The verdict on a claim from the interval of ours - baseline, by the rules at the top of this file."""
    above = claim.direction.startswith(">")
    holds = difference.low > _bound(claim) if above else difference.high < _bound(claim)
    return "holds" if holds else "does not hold"


def reproduce(
    rep: Reproduction, progress: Progress, *, force: bool = False, results: Path | None = None
) -> dict[str, Any]:
    """Measures every seed, judges every claim, writes `results`/SLUG.json and returns that document.

    Seeds that an interrupted run finished are taken over while the paper's file and the reproduction's are the
    same; `force` measures them again. Raises UsageError when there is no such paper, its file does not exist or the
    result cannot be written, ValueError when `measure` does not answer exactly the testable claims.
    """
    hashes = _hashes(rep)
    partial = cache_dir() / "reproduce" / f"{rep.slug}.json"
    finished = {} if force else _finished(partial, hashes)
    for number, seed in enumerate(rep.seeds, 1):
        where = f"{rep.slug}: seed {seed} ({number} of {len(rep.seeds)})"
        if str(seed) in finished:
            progress(f"{where}, measured before")
            continue
        progress(where)
        start = time.perf_counter()
        measured = rep.measure(seed, _under(where, progress))
        _check_answered(rep, measured)
        finished[str(seed)] = {
            "seconds": time.perf_counter() - start,
            "measured": {key: {"ours": m.ours, "baseline": m.baseline} for key, m in measured.items()},
        }
        try:
            write_json(partial, {**hashes, "seeds": finished})
        except OSError as error:
            progress(f"{where}: cannot keep it for a later run ({error.strerror or error})")
    document = _document(rep, [finished[str(seed)] for seed in rep.seeds], hashes)
    path = (results or RESULTS) / f"{rep.slug}.json"
    try:
        write_json(path, document)
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror or error}); measured seeds are in {partial}") from None
    with suppress(OSError):  # not there, or never could be written
        partial.unlink()
    return document


def available() -> tuple[str, ...]:
    """Slugs of the papers that have a reproduction, sorted."""
    modules = pkgutil.iter_modules(seqwise.lab.reproduce.__path__)
    return tuple(sorted(module.name.replace("_", "-") for module in modules if not module.name.startswith("_")))


def load(slug: str) -> Reproduction:
    """The reproduction of that slug. Raises UsageError with the closest slugs when there is none."""
    if slug not in available():
        close = difflib.get_close_matches(slug, available(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(available()) or 'none yet'}"
        raise UsageError(f"no reproduction has the slug {slug!r}: {hint}")
    module = importlib.import_module(f"seqwise.lab.reproduce.{slug.replace('-', '_')}")
    found = module.REPRODUCTION
    if not isinstance(found, Reproduction) or found.slug != slug:
        raise TypeError(f"{module.__name__}.REPRODUCTION must be a Reproduction with the slug {slug!r}")
    return found


def run_reproductions(
    slugs: Sequence[str], *, all: bool = False, force: bool = False, console: Console | None = None
) -> list[dict[str, Any]]:
    """What `seqwise reproduce` does: measures, prints a table per paper, returns the result documents.

    all: every reproduction there is, instead of `slugs`. force: measure also what a recorded result of the same two
    files answers already. console: where progress and tables go; standard error when None. Raises UsageError for an
    unknown slug before anything is measured; Ctrl-C keeps the finished seeds.
    """
    console = console or Console(stderr=True)
    if not slugs and not all:
        raise UsageError(f"name a paper to reproduce, or --all; there are {', '.join(available()) or 'none yet'}")
    documents = []
    for rep in [load(slug) for slug in (available() if all else dict.fromkeys(slugs))]:
        document = None if force else _recorded(rep)
        if document is not None:
            console.print(f"[dim]{rep.slug}: recorded {document['date']}, same files; --force measures again[/]")
        else:
            try:
                with console.status(rep.slug) as status:
                    document = reproduce(rep, _show(status), force=force)
            except KeyboardInterrupt:
                console.print(f"{rep.slug}: interrupted; finished seeds are kept, the same command goes on from there")
                raise
        console.print(table(document))
        documents.append(document)
    return documents


def table(document: Mapping[str, Any]) -> Table:
    """A result document for a terminal, one row per claim."""
    seeds = ", ".join(map(str, document["seeds"]))
    caption = f"seeds {seeds}; {document['date']}; {document['seconds']:.0f} s"
    if document["notes"]:
        caption += f"\n{document['notes']}"
    grid = Table(box=SIMPLE_HEAD, title=Text(f"{document['slug']}: {document['verdict']}"), caption=Text(caption))
    for name in ("claim", "paper", "ours", "baseline", "difference, 95 %", "verdict"):
        grid.add_column(name)
    for claim in document["claims"]:
        if claim["verdict"] == NOT_TESTABLE:
            cells = ["", claim["baseline"], "", f"{NOT_TESTABLE}: {claim['reason']}"]
        else:
            low, high = claim["interval"]
            claimed = f"claimed {claim['direction'][0]} {claim['bound']:g}"
            cells = [
                f"{claim['ours_mean']:.4g}",
                f"{claim['baseline']}: {claim['baseline_mean']:.4g}",
                f"{claim['difference']:+.3g} [{low:+.3g}, {high:+.3g}]\n{claimed}",
                claim["verdict"],
            ]
        style = "green" if claim["verdict"] == "holds" else "red" if claim["verdict"] == "does not hold" else "dim"
        grid.add_row(Text(claim["text"]), Text(claim["paper"]), *map(Text, cells[:-1]), Text(cells[-1], style=style))
    return grid


def _bound(claim: Claim) -> float:
    """What the interval of ours - baseline must lie beyond."""
    return claim.margin if claim.direction in (">", "<=") else 0.0 - claim.margin


def _show(status: Status) -> Progress:
    return lambda text: status.update(escape(text))


def _under(where: str, progress: Progress) -> Progress:
    return lambda text: progress(f"{where}, {text}")


def _hashes(rep: Reproduction) -> dict[str, str]:
    """What a measured value depends on: the paper's own file and the reproduction's."""
    paper = catalogue.paper(rep.slug)
    if paper.sha256 is None:
        raise UsageError(f"{rep.slug} cannot be reproduced: {paper.home} does not exist")
    own = inspect.getsourcefile(inspect.unwrap(rep.measure))
    if own is None:
        raise TypeError(f"Reproduction.measure of {rep.slug} must be a function of a file")
    return {"paper_sha256": paper.sha256, "reproduction_sha256": hashlib.sha256(Path(own).read_bytes()).hexdigest()}


def _finished(partial: Path, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Seeds measured earlier with the same files; none when there is no whole file to read."""
    try:
        kept = json.loads(partial.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(kept["seeds"]) if all(kept.get(name) == value for name, value in hashes.items()) else {}


def _recorded(rep: Reproduction) -> dict[str, Any] | None:
    """The recorded result, if it was measured with the files as they are now."""
    try:
        document = dict(json.loads((RESULTS / f"{rep.slug}.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    return document if all(document.get(name) == value for name, value in _hashes(rep).items()) else None


def _check_answered(rep: Reproduction, measured: Mapping[str, Measured]) -> None:
    wanted = {claim.key for claim in rep.testable}
    if set(measured) != wanted:
        raise ValueError(f"{rep.slug}: measure must answer {sorted(wanted)}, got {sorted(measured)}")


def _document(rep: Reproduction, seeds: Sequence[Mapping[str, Any]], hashes: Mapping[str, str]) -> dict[str, Any]:
    claims = [_judged(rep, claim, seeds) for claim in rep.claims]
    verdicts = {claim["verdict"] for claim in claims} - {NOT_TESTABLE}
    verdict = NOT_TESTABLE if not verdicts else "holds" if verdicts == {"holds"} else "does not hold"
    return {
        "slug": rep.slug,
        "verdict": verdict,
        "claims": claims,
        "seeds": list(rep.seeds),
        "notes": rep.notes,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(sum(seed["seconds"] for seed in seeds), 1),
        "versions": _versions(),
        **hashes,
    }


def _judged(rep: Reproduction, claim: Claim, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    stated = {
        "key": claim.key,
        "text": claim.text,
        "paper": claim.paper,
        "direction": claim.direction,
        "margin": claim.margin,
        "bound": _bound(claim),
        "baseline": claim.baseline,
    }
    if claim.key in rep.not_testable:
        return {**stated, "verdict": NOT_TESTABLE, "reason": rep.not_testable[claim.key]}
    ours = [seed["measured"][claim.key]["ours"] for seed in seeds]
    baseline = [seed["measured"][claim.key]["baseline"] for seed in seeds]
    difference = paired_difference(ours, baseline)
    per_seed = [[sum(items) / len(items) for items in arm] for arm in (ours, baseline)]
    return {
        **stated,
        "verdict": judge(claim, difference),
        "ours_mean": sum(per_seed[0]) / len(seeds),
        "baseline_mean": sum(per_seed[1]) / len(seeds),
        "difference": difference.mean,
        "interval": [difference.low, difference.high],
        "ours_per_seed": per_seed[0],
        "baseline_per_seed": per_seed[1],
        "items_per_seed": [len(items) for items in ours],
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("seqwise", "torch", "transformers", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source folder
            continue
    return versions
