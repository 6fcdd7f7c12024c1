"""Where the lab keeps what it may lose, and how it writes what it must not lose half of."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """The user's cache: `SEQWISE_CACHE`, else `XDG_CACHE_HOME`/seqwise, else ~/.cache/seqwise. May not exist yet."""
    if own := os.environ.get("SEQWISE_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "seqwise"
    return Path.home() / ".cache" / "seqwise"


def write_json(path: Path, document: Any) -> None:
    """Writes `document` as JSON, atomically: readers see the old file or the whole new one.

    Raises OSError when the folder cannot be written, ValueError for NaN or infinity.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp makes it private
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
