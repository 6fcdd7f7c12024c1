"""JSON Lines files with items of your own: what is wrong is told with file, line and field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from seqwise.core.errors import UsageError
from seqwise.lab.tasks import json_lines, text_field

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
        return text_field(self.where, self.fields, name)

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
    return [read(Line(where, item)) for _, where, item in json_lines(path, form)]
