"""The catalogue: what `papers.toml` says of every paper, and what the recorded results say of it today.

A paper's result is `lab/results/SLUG.json` (keys `verdict` and `paper_sha256`, the hash that the paper's own
file had when it was measured); the contract passes of all methods are `lab/results/contract.json`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from seqwise.core.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(__file__).resolve().parents[1]

Status = Literal["planned", "implemented"]


@dataclass(frozen=True)
class Paper:
    """One entry of the catalogue.

    home: the paper's one file, relative to the package. object: "module:name" of what a person imports, and
    formulas: "module:function" of each public formula; None and () while the paper is planned. facets: where the method
    stands among token reducers, in the taxonomy of arXiv 2505.18227; what is unknown is left out.
    """

    number: int
    slug: str
    title: str
    arxiv: str
    home: str
    status: Status
    object: str | None = None
    formulas: tuple[str, ...] = ()
    facets: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    @property
    def file(self) -> Path:
        """The paper's own file; it may not exist yet."""
        return PACKAGE / self.home

    @property
    def result(self) -> dict[str, Any] | None:
        """The document that `seqwise reproduce` recorded, or None."""
        path = PACKAGE / "lab" / "results" / f"{self.slug}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @property
    def verdict(self) -> str | None:
        """Whether the paper's claims held in the recorded reproduction; None before there is one."""
        result = self.result
        return None if result is None else result["verdict"]

    @property
    def stale(self) -> bool:
        """Whether the paper's own file is no longer the one that the recorded result was measured with."""
        result = self.result
        return result is not None and result["paper_sha256"] != self.sha256

    @property
    def sha256(self) -> str | None:
        """Hash of the paper's own file; None while there is none."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest() if self.file.is_file() else None

    @property
    def contract(self) -> dict[str, Any] | None:
        """The method contract pass on record (`family`, `passed`, `items`), or None."""
        return contract_passes().get(self.slug)

    def to_dict(self) -> dict[str, Any]:
        """The paper as plain JSON values."""
        return {
            "number": self.number,
            "slug": self.slug,
            "title": self.title,
            "arxiv": self.arxiv,
            "home": self.home,
            "status": self.status,
            "object": self.object,
            "formulas": list(self.formulas),
            "facets": {name: list(values) for name, values in self.facets.items()},
            "verdict": self.verdict,
            "stale": self.stale,
        }


@lru_cache(maxsize=1)
def papers() -> tuple[Paper, ...]:
    """Every paper, by number."""
    with (PACKAGE / "papers.toml").open("rb") as file:
        entries = tomllib.load(file)["paper"]
    found = [
        Paper(
            **{
                **entry,
                "formulas": tuple(entry.get("formulas", ())),
                "facets": {name: tuple(values) for name, values in entry.get("facets", {}).items()},
            }
        )
        for entry in entries
    ]
    return tuple(sorted(found, key=lambda paper: paper.number))


def paper(slug: str) -> Paper:
    """The paper of that slug. Raises UsageError with the closest slugs when there is none."""
    by_slug = {paper.slug: paper for paper in papers()}
    if slug not in by_slug:
        close = difflib.get_close_matches(slug, by_slug, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`seqwise papers` lists them all"
        raise UsageError(f"no paper has the slug {slug!r}: {hint}")
    return by_slug[slug]


def with_facets(shown: Sequence[Paper], wanted: Sequence[str]) -> list[Paper]:
    """The papers that have every facet of `wanted`, such as "criterion=similarity" or "site=KV cache".

    Raises UsageError for a facet or value that the taxonomy does not know.
    """
    if not wanted:
        return list(shown)
    from seqwise.insight.probe.token_reduction_beyond_efficiency import check_facets  # imports torch

    pairs = []
    for text in wanted:
        name, _, value = text.partition("=")
        try:
            check_facets({name: value})
        except ValueError as error:
            raise UsageError(f"--facet {text}: {error}") from None
        pairs.append((name, value))
    return [paper for paper in shown if all(value in paper.facets.get(name, ()) for name, value in pairs)]


def contract_passes() -> dict[str, dict[str, Any]]:
    """The recorded contract passes: slug -> {"family": ..., "passed": ..., "items": [...]}."""
    path = PACKAGE / "lab" / "results" / "contract.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def table(shown: Sequence[Paper]) -> Table:
    """The catalogue for a terminal, one row per paper; fits 80 columns."""
    implemented = sum(paper.status == "implemented" for paper in shown)
    grid = Table(box=SIMPLE_HEAD, caption=f"{len(shown)} papers, {implemented} implemented")
    grid.add_column("#", justify="right", no_wrap=True)
    grid.add_column("paper", min_width=36)
    grid.add_column("arXiv", no_wrap=True)
    grid.add_column("status")
    for paper in shown:
        # Text, since a title such as "[CLS] Token ..." would be read as markup
        name = Text.assemble((paper.slug, "bold"), "\n", (paper.title, "dim"))
        verdict = f"{', ' + paper.verdict if paper.verdict else ''}{' (stale)' if paper.stale else ''}"
        grid.add_row(str(paper.number), name, Text(paper.arxiv), Text(paper.status + verdict))
    return grid
