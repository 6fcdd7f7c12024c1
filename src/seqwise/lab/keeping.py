"""What long commands share: their document is kept as it grows, found again by its settings, and says what made it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import seqwise
from seqwise.core import hf
from seqwise.core.errors import UsageError
from seqwise.lab.files import write_json


class Keeper:
    """Where a command keeps its document: in `out`, or at `place` where the user named none.

    schema: of the document. results: what it holds, for messages ("a comparison's results").
    """

    def __init__(self, out: Path | None, place: Path, *, schema: str, results: str) -> None:
        self.own_place = out is None
        self.out: Path | None = place if out is None else out
        self.schema, self.results = schema, results

    def keep(self, document: Callable[[], Mapping[str, Any]], console: Console) -> None:
        """Writes `document()`. Raises UsageError where the user's place cannot be written; says so of our own, once."""
        if self.out is None:
            return
        try:
            write_json(self.out, document())
        except OSError as error:
            if not self.own_place:
                raise UsageError(
                    f"cannot write {self.out} ({error.strerror}); free some space or give another --out. "
                    "What the file held before is untouched."
                ) from None
            _say(console, f"cannot keep results in {self.out.parent} ({error.strerror}); --resume will not work")
            self.out = None

    def read(self, settings: Mapping[str, Any], console: Console) -> dict[str, Any] | None:
        """The document of an earlier run with the same settings, None where there is none. Raises UsageError for a file
        that is something else, or was made with other settings."""
        if self.out is None or not self.out.is_file():
            _say(console, f"nothing to resume at {self.out}: starting anew")
            return None
        try:
            document: dict[str, Any] = json.loads(self.out.read_text(encoding="utf-8"))
            schema = document["schema"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"cannot resume from {self.out}: not {self.results} ({error!r})") from None
        if schema != self.schema:
            raise UsageError(
                f"cannot resume from {self.out}: its schema is {schema!r}, this version writes {self.schema!r}"
            )
        before = document["settings"]
        for name in {**before, **settings}:
            if before.get(name) != settings.get(name):
                raise UsageError(
                    f"cannot resume from {self.out}: {name} was {before.get(name)!r}, now it is "
                    f"{settings.get(name)!r}; give the same settings or another --out"
                )
        return document


def provenance() -> dict[str, Any]:
    """`versions` and `date` of a document."""
    return {
        "versions": {
            "seqwise": seqwise.__version__,
            **hf.versions(),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "processor": platform.machine(),
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def sha256(path: str | Path) -> str:
    """Of a file's content. Raises UsageError where it cannot be read."""
    try:
        return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _say(console: Console, text: str) -> None:
    console.print(text, style="yellow", soft_wrap=True, markup=False, highlight=False)
