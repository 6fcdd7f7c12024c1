"""The command line: parses, calls the lab, prints. What a command does lives in `seqwise.lab`.

Results go to stdout, everything else to stderr. Exit codes: 0, 1 where a method failed, 2 for unusable input,
130 for Ctrl-C.
Commands import what they run inside themselves, so that those that need no model start at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from seqwise.core.errors import SeqwiseError, UsageError

if TYPE_CHECKING:
    from seqwise.lab.compare import Comparison
    from seqwise.lab.plan import Planning
    from seqwise.lab.probes.run import Probing

app = typer.Typer(
    name="seqwise",
    help="Decide which tokens of a sequence matter, in what order they come, and what to do with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


# what several commands take; typer evaluates these on Python 3.10, so None is said the old way
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Kept = Annotated[Optional[Path], typer.Option("--out", help="Write the JSON document, kept up to date.")]  # noqa: UP045
Plugin = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option(help="A Python file with methods of your own. Again for more."),
]
Device = Annotated[Optional[str], typer.Option(help="cpu, cuda, ...")]  # noqa: UP045
Dtype = Annotated[Optional[str], typer.Option(help="float32, bfloat16, ...")]  # noqa: UP045
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]


@app.command()
def papers(
    as_json: AsJson = False,
    status: Annotated[
        Optional[Literal["planned", "implemented"]],  # noqa: UP045 - typer evaluates it on Python 3.10
        typer.Option(help="Show only papers of this status."),
    ] = None,
    facet: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help='Show only token reducers with this facet: "criterion=similarity". Again for more.'),
    ] = None,
) -> None:
    """List the papers: what is implemented, and whether its claims held when reproduced."""
    from seqwise.lab import catalogue

    shown = [paper for paper in catalogue.papers() if status in (None, paper.status)]
    shown = catalogue.with_facets(shown, facet or ())
    if as_json:
        print(json.dumps({"papers": [paper.to_dict() for paper in shown]}, indent=2, ensure_ascii=False))
    else:
        Console().print(catalogue.table(shown))


@app.command()
def compare(
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A Hub name or a folder. Default: SmolLM2-135M-Instruct, which needs no download."),
    ] = None,
    method: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help='As in Python: "A2SF(budget=0.25, forget=0.9)", "A2SF | ZipCache". Again for more.'),
    ] = None,
    budget: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A share (0.25) or tokens (256) for every method that has a budget. Again for more."),
    ] = None,
    task: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="needle, needles, kv, perplexity, agreement, or a .jsonl file. Again for more."),
    ] = None,
    length: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help='Tokens of context, or "2x" for twice the trained length. Again for more.'),
    ] = None,
    prompts: Annotated[Optional[int], typer.Option(help="Prompts per task and length.")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(help="Of prompts and of methods that draw.")] = 0,
    chunk: Annotated[Optional[int], typer.Option(help="Prefill in chunks of so many tokens.")] = None,  # noqa: UP045
    quick: Annotated[bool, typer.Option("--quick", help="A smaller comparison that ends within a minute.")] = False,
    as_json: AsJson = False,
    report: Annotated[Optional[Path], typer.Option(help="Write an HTML report.")] = None,  # noqa: UP045
    out: Kept = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the same comparison was stopped.")] = False,
    plugin: Plugin = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure what each method saves and what it costs on a model.

    Question-blind: the method acts before the question is seen. Question-aware: the question is part of the prompt.
    """
    from transformers.utils import logging

    from seqwise.lab.compare import Settings, check_writable
    from seqwise.lab.seeing import comparison as comparison_of
    from seqwise.lab.tables import tables

    logging.disable_progress_bar()
    if report is not None:
        check_writable(report, "--report")
    settings = Settings(
        model=model,
        methods=tuple(method or ()),
        budgets=tuple(budget or ()),
        tasks=tuple(task or ()),
        lengths=tuple(length or ()),
        prompts=prompts,
        seed=seed,
        chunk=chunk,
        quick=quick,
        plugins=tuple(map(str, plugin or ())),
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    stderr = Console(stderr=True)
    comparison = comparison_of(settings, out=out, resume=resume)
    document, stopped = _shown(comparison, tables, as_json, stderr)
    if report is not None:
        from seqwise.lab.report import write_report

        try:
            write_report(document, report)
        except OSError as error:
            raise UsageError(f"cannot write --report {report} ({error.strerror}); give another place") from None
        stderr.print(f"report: {report}", soft_wrap=True)
    if stopped or comparison.failed:
        raise typer.Exit(130 if stopped else 1)


@app.command("eval")
def evaluate(
    tasks: Annotated[
        list[str], typer.Option(help="Tasks of lm-evaluation-harness, patterns or .yaml files. Again for more.")
    ],
    method: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help='As in Python: "A2SF(budget=0.25)". Default: the plain model.'),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A Hub name or a folder. Default: SmolLM2-135M-Instruct, which needs no download."),
    ] = None,
    include_path: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A folder with task files of your own."),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(help="Documents per task.")] = None,  # noqa: UP045
    batch_size: Annotated[int, typer.Option(help="Prompts, or continuations of one context, at once.")] = 1,
    as_json: AsJson = False,
    out: Annotated[Optional[Path], typer.Option(help="Write the JSON document.")] = None,  # noqa: UP045
    plugin: Plugin = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Run tasks of lm-evaluation-harness under a method."""
    from transformers.utils import logging

    from seqwise.lab import lm_eval
    from seqwise.lab.compare import check_writable
    from seqwise.lab.files import write_json

    logging.disable_progress_bar()
    if out is not None:
        check_writable(out, "--out")
    settings = lm_eval.Settings(
        tasks=tuple(tasks),
        model=model,
        method=method,
        include_path=None if include_path is None else str(include_path),
        limit=limit,
        batch_size=batch_size,
        plugins=tuple(map(str, plugin or ())),
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    document = lm_eval.evaluate(settings)
    if as_json:
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        Console().print(lm_eval.table(document))
    if out is not None:
        try:
            write_json(out, document)
        except OSError as error:
            raise UsageError(f"cannot write --out {out} ({error.strerror}); give another place") from None


@app.command()
def probe(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="NAME...", help="Probes; an unknown name lists them."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every probe, in one report.")] = False,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A Hub name or a folder. Default: SmolLM2-135M-Instruct, which needs no download."),
    ] = None,
    remedy: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help='A method whose effect is judged, as in Python: "SetBasedPrompting()". Again for more.'),
    ] = None,
    items: Annotated[Optional[int], typer.Option(help="Items per part of a probe.")] = None,  # noqa: UP045
    task: Annotated[Optional[str], typer.Option(help="A .jsonl file with items of your own.")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(help="Of items and of methods that draw.")] = 0,
    as_json: AsJson = False,
    out: Kept = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the same probe was stopped.")] = False,
    plugin: Plugin = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find out what a model is sensitive to, and what remedies do about it."""
    from transformers.utils import logging

    from seqwise.lab.probes import PROBES
    from seqwise.lab.probes.base import Settings
    from seqwise.lab.probes.run import Probing, tables

    logging.disable_progress_bar()
    settings = Settings(
        model=model,
        remedies=tuple(remedy or ()),
        items=items,
        seed=seed,
        task=task,
        plugins=tuple(map(str, plugin or ())),
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    stderr = Console(stderr=True)
    probing = Probing(tuple(PROBES) if every else names or (), settings, out=out, resume=resume)
    _, stopped = _shown(probing, tables, as_json, stderr)
    if stopped or probing.failed:
        raise typer.Exit(130 if stopped else 1)


@app.command()
def plan(
    method: Annotated[str, typer.Argument(help='A staged method, as in Python: "VFlowOpt", "TransPrune", "FastV".')],
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A Hub name or a folder. Default: scenes-vlm, which ships with the package."),
    ] = None,
    budget: Annotated[float, typer.Option(help="Average share of visual tokens over the decoder's layers.")] = 0.25,
    prompts: Annotated[int, typer.Option(help="Prompts that the search sees.")] = 30,
    evaluations: Annotated[int, typer.Option(help="Schedules that are tried.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the search and of the prompts.")] = 42,
    task: Annotated[Optional[str], typer.Option(help="A .jsonl file with prompts of your own.")] = None,  # noqa: UP045
    as_json: AsJson = False,
    out: Kept = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the same search was stopped.")] = False,
    plugin: Plugin = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Search the stages and shares of a method that change a model least under a budget."""
    from transformers.utils import logging

    from seqwise.lab.plan import Planning, Settings, tables

    logging.disable_progress_bar()
    settings = Settings(
        method=method,
        model=model,
        budget=budget,
        prompts=prompts,
        evaluations=evaluations,
        seed=seed,
        task=task,
        plugins=tuple(map(str, plugin or ())),
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    stderr = Console(stderr=True)
    planning = Planning(settings, out=out, resume=resume)
    _, stopped = _shown(planning, tables, as_json, stderr)
    if stopped or planning.failed:
        raise typer.Exit(130 if stopped else 1)


@app.command()
def reproduce(
    slug: Annotated[Optional[list[str]], typer.Argument(help="Papers, as `seqwise papers` lists them.")] = None,  # noqa: UP045
    every: Annotated[bool, typer.Option("--all", help="Every paper that has a reproduction.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Measure again what is recorded and up to date.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure papers' claims again, with a verdict for each."""
    from seqwise.lab.reproduction import run_reproductions

    results = run_reproductions(slug or [], all=every, force=force, console=Console(stderr=as_json))
    if as_json:
        print(json.dumps({"results": results}, indent=2, ensure_ascii=False))


def _shown(
    work: Comparison | Probing | Planning,
    tables: Callable[[dict[str, Any]], list[RenderableType]],
    as_json: bool,
    stderr: Console,
) -> tuple[dict[str, Any], bool]:
    """Runs what can be stopped and resumed and prints what was found; the document, and whether it was stopped."""
    stopped = False
    try:
        work.run(stderr)
    except KeyboardInterrupt:
        stopped = True
        stderr.print("stopped: what is finished is kept; the same command with --resume goes on", style="yellow")
    document = work.document()
    if as_json:
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        console = Console()
        for part in tables(document):
            console.print(part)
    return document, stopped


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
