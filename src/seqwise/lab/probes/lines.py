"""JSON Lines files with items of your own: what is wrong is told with file, line and field."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from seqwise.core.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """One object of a file. where: file and line, as messages begin."""

    where: str
    fields: Mapping[str, Any]

    def fail(self, name: str, wanted: str) -> UsageError:
        """What to raise for a field that is not as wanted."""
        got = "nothing" if name not in self.fields else repr(self.fields[name])
        return UsageError(f"{self.where}: field {name!r} must be {wanted}, got {got}")

    def text(self, name: str) -> str:
        """A text, without blanks around it. Raises UsageError where it is missing or empty."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.fail(name, "a text that is not empty")
        return value.strip()

    def texts(self, name: str, least: int = 1) -> list[str]:
        """A list of so many texts or more. Raises UsageError for anything else."""
        value = self.fields.get(name)
        if (
            not isinstance(value, list)
            or len(value) < least
            or not all(isinstance(one, str) and one.strip() for one in value)
        ):
            raise self.fail(name, f"a list of {least} or more texts that are not empty")
        return [one.strip() for one in value]


def read_lines(path: str, read: Callable[[Line], T], form: str) -> list[T]:
    """What `read` makes of each line that is not blank, at least one. form: a line's form, for the message if not.

    Raises UsageError for a file that cannot be read, and for a line that is no object.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{where}: not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise UsageError(f"{where}: must be an object, got {type(fields).__name__}")
        found.append(read(Line(where, fields)))
    if not found:
        raise UsageError(f"{path} has no lines; each is {form}")
    return found
