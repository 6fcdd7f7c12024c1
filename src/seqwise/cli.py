"""The command line: parses, calls the lab, prints. What a command does lives in `seqwise.lab`.

Results go to stdout, everything else to stderr. Exit codes: 0, 2 for unusable input, 130 for Ctrl-C.
Commands import what they run inside themselves, so that those that need no model start at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Annotated, Literal, Optional

import typer
from rich.console import Console
from rich.text import Text

from seqwise.core.errors import SeqwiseError

app = typer.Typer(
    name="seqwise",
    help="Decide which tokens of a sequence matter, in what order they come, and what to do with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def root() -> None:
    """Keeps `papers` a subcommand while it is the only one."""


@app.command()
def papers(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    status: Annotated[
        Optional[Literal["planned", "implemented"]],  # noqa: UP045 - typer evaluates it on Python 3.10
        typer.Option(help="Show only papers of this status."),
    ] = None,
) -> None:
    """List the papers: what is implemented, and whether its claims held when reproduced."""
    from seqwise.lab import catalogue

    shown = [paper for paper in catalogue.papers() if status in (None, paper.status)]
    if as_json:
        print(json.dumps({"papers": [paper.to_dict() for paper in shown]}, indent=2, ensure_ascii=False))
    else:
        Console().print(catalogue.table(shown))


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line on `args` (default: the process's own) and exits with its code.

    A user's mistake is one red line on stderr and exit code 2. Anything else that goes wrong is a defect and
    propagates with its traceback.
    """
    try:
        app(args)
    except (SeqwiseError, ValueError) as error:
        if not isinstance(error, SeqwiseError) and not _raised_by_us(error.__traceback__):
            raise
        line = " ".join(str(error).split())
        Console(stderr=True).print(Text(line, style="red"), soft_wrap=True)
        sys.exit(2)


def _raised_by_us(trace: TracebackType | None) -> bool:
    """Whether the error was raised in seqwise itself, where messages are written for the user."""
    module = ""
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        trace = trace.tb_next
    return module.split(".")[0] == "seqwise"


if __name__ == "__main__":
    main()
