"""What does each method save, and what does it cost, on my model?

    for each prompt, task, length and mode:  plain model, then every method, one right after the other

So prompts are paired over methods, ratios of seconds compare neighbours in time, and a comparison that is stopped
has every finished prompt for every method. `docs/guide/compare.md` describes the document that comes out.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import SeqwiseError, UsageError
from seqwise.lab.files import cache_dir
from seqwise.lab.keeping import Keeper, provenance, sha256
from seqwise.lab.measure import Measurement, Traced, measure, modes_of
from seqwise.lab.registry import load_methods, parse_methods
from seqwise.lab.rows import ENOUGH, PLAIN, Cell, by_depth, groups_of, rows_of
from seqwise.lab.tasks import File, Prompt, Task, encode, encode_answer, task
from seqwise.lab.zoo import load_model, trained_positions

SCHEMA = "seqwise.compare/1"
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_BUDGETS = ("0.5",)
DEFAULT_METHODS = ("Recent", "Random", "H2O", "A2SF", "SnapKV", "ZipCache", "TidalDecode", "LazyEviction(window=8)")
DEFAULT_TASKS = ("needle", "Perplexity(continuation=16)")
DEFAULT_LENGTHS, DEFAULT_PROMPTS = (512,), 5
RESERVED = 192  # of a length in multiples of the trained one, for the question, the template and the answer
QUICK_METHODS = ("Recent", "A2SF", "SnapKV")
QUICK_LENGTHS, QUICK_PROMPTS, QUICK_SECONDS = (256,), 3, 50.0


@dataclass(frozen=True)
class Settings:
    """What to compare, in the words of the command line; empty tuples and None stand for the defaults.

    budgets multiply over the methods that have a budget. lengths: tokens of context, or "2x": so many times the
    positions that the model was trained on, question and answer included. prompts: per task and length.
    """

    model: str | None = None
    methods: Sequence[str] = ()
    budgets: Sequence[str] = ()
    tasks: Sequence[str] = ()
    lengths: Sequence[int | str] = ()
    prompts: int | None = None
    seed: int = 0
    chunk: int | None = None
    quick: bool = False
    plugins: Sequence[str] = ()
    device: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        at_least: list[tuple[str, int | None, int]] = [("length", n, 1) for n in self.lengths if isinstance(n, int)]
        at_least += [("prompts", self.prompts, 1), ("chunk", self.chunk, 1), ("seed", self.seed, 0)]
        for name, value, least in at_least:
            if value is not None and value < least:
                raise UsageError(f"--{name} must be a whole number >= {least}, got {value}")


class Comparison:
    """One comparison: `run` measures, `document` says what has been measured so far.

    Everything that needs no model is checked here: raises UsageError for unknown methods, tasks, fields and values.
    """

    default_model: ClassVar[str] = DEFAULT_MODEL
    default_methods: ClassVar[Sequence[str]] = DEFAULT_METHODS
    default_budgets: ClassVar[Sequence[str]] = DEFAULT_BUDGETS
    default_prompts: ClassVar[int] = DEFAULT_PROMPTS
    quick_methods: ClassVar[Sequence[str]] = QUICK_METHODS
    quick_prompts: ClassVar[int] = QUICK_PROMPTS

    def __init__(self, settings: Settings, *, out: Path | None = None, resume: bool = False) -> None:
        self.settings = settings
        self.notes: list[str] = []
        load_methods(settings.plugins)
        quick = settings.quick
        names = settings.methods or (self.quick_methods if quick else self.default_methods)
        budgets = settings.budgets or (() if settings.methods else self.default_budgets)
        self.methods = [method for method in parse_methods(names, budgets) if str(method) != PLAIN]
        self.tasks = self._tasks()
        self.lengths = self._lengths()
        prompts = settings.prompts or (self.quick_prompts if quick else self.default_prompts)
        self.settings = replace(settings, lengths=self.lengths, prompts=prompts)
        self.cells = [
            Cell(name, mode, length)
            for name, one in self.tasks.items()
            for length in (self.lengths if one.sized else [None])
            for mode in modes_of(one)
        ]
        self.found: dict[Cell, dict[str, dict[int, Measurement]]] = {cell: {} for cell in self.cells}
        self.failures: dict[Cell, dict[str, str]] = {cell: {} for cell in self.cells}
        self.sample: dict[str, Any] = {}
        self.complete = False
        self.facts = self._facts()
        self.keeper = Keeper(out, self._place(), schema=SCHEMA, results="a comparison's results")
        if out is not None:
            check_writable(out, "--out")
        self.resume = resume

    # what is compared

    def _tasks(self) -> dict[str, Task]:
        return {label(one): one for one in map(_task, self.settings.tasks or DEFAULT_TASKS)}

    def _lengths(self) -> tuple[int, ...]:
        lengths = [self._tokens(length) for length in self.settings.lengths]
        return tuple(dict.fromkeys(lengths or (QUICK_LENGTHS if self.settings.quick else DEFAULT_LENGTHS)))

    def _tokens(self, length: int | str) -> int:
        """Tokens of context that a length stands for."""
        if isinstance(length, int):
            return length
        times = re.fullmatch(r"(\d+(?:\.\d+)?)x", length.strip())
        if times is None and not length.strip().isdecimal():
            raise UsageError(f'--length must be tokens, or "2x" for twice the trained length, got {length!r}')
        if times is None:
            return int(length)
        name = self.settings.model if self.settings.model != DEFAULT_MODEL else None
        return max(1, round(float(times[1]) * trained_positions(name, self.settings.trust_remote_code)) - RESERVED)

    def _facts(self) -> dict[str, Any]:
        """The settings as JSON values, defaults filled in; two comparisons can be joined where they are equal."""
        facts = asdict(self.settings) | {
            "model": self.settings.model or self.default_model,
            "methods": [PLAIN, *map(str, self.methods)],
            "tasks": list(self.tasks),
            "lengths": list(self.settings.lengths),
            "plugins": list(self.settings.plugins),
        }
        del facts["budgets"]  # the methods' own texts have them
        files = [*self.settings.plugins, *(path for one in self.tasks.values() for path in one.files)]
        facts["files_sha256"] = {str(path): sha256(path) for path in files}
        return facts

    def _place(self) -> Path:
        key = hashlib.sha256(repr(sorted(self.facts.items())).encode()).hexdigest()[:16]
        return cache_dir() / "compare" / f"{key}.json"

    # measuring

    def run(self, console: Console | None = None) -> None:
        """Measures what is missing. Keeps all that is finished in `out` after each prompt, also when interrupted.

        Raises UsageError for what the model or the disk cannot do, KeyboardInterrupt as it comes.
        """
        console = console or Console(stderr=True)
        if self.resume:
            self._reload(console)
        with console.status(f"loading {self.facts['model']}"):
            model, tokenizer = self._load()
        deadline = time.monotonic() + QUICK_SECONDS if self.settings.quick else None
        prompts = self._prompts(model, tokenizer)
        units = [
            (i, cell) for i in range(max(map(len, prompts.values()))) for cell in self.cells if i < len(prompts[cell])
        ]
        missing = [(i, cell) for i, cell in units if i not in self.found[cell].get(PLAIN, {})]
        if missing:
            measure(
                model, tokenizer, self.tasks[missing[0][1].task], prompts[missing[0][1]][missing[0][0]], "blind"
            )  # warms up
        progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        with progress:
            bar = progress.add_task("", total=len(units) * (1 + len(self.methods)))
            progress.advance(bar, (len(units) - len(missing)) * (1 + len(self.methods)))
            longest = keeping = 0.0
            kept_at = -math.inf
            try:
                for number, (i, cell) in enumerate(missing):
                    start = time.monotonic()
                    if number and deadline is not None and start + longest > deadline:
                        self.notes.append(
                            f"--quick stopped after {number} of {len(missing)} rounds, so that it ends within a minute"
                        )
                        break
                    self._unit(model, tokenizer, cell, prompts[cell][i], i, len(prompts[cell]), progress, bar)
                    done = time.monotonic()
                    longest = max(longest, done - start)
                    if done - kept_at > 20 * keeping:  # intervals of many prompts take a while
                        self.keeper.keep(self.document, console)
                        kept_at, keeping = time.monotonic(), time.monotonic() - done
            except KeyboardInterrupt:
                self.keeper.keep(self.document, console)
                raise
        self.complete = True
        self.keeper.keep(self.document, console)

    def _unit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cell: Cell,
        prompt: Prompt,
        i: int,
        count: int,
        progress: Progress,
        bar: Any,
    ) -> None:
        """One prompt under the plain model and every method; all of it counts, or none of it."""
        task, failures = self.tasks[cell.task], dict(self.failures[cell])
        where = f"{cell.task}, {cell.mode}, prompt {i + 1} of {count}"
        progress.update(bar, description=f"{where}: plain model")
        try:
            plain = measure(model, tokenizer, task, prompt, cell.mode)
        except SeqwiseError:
            raise
        except Exception as error:
            raise UsageError(f"the plain model fails on {where}: {reason(error)}") from error
        progress.advance(bar)
        traced = {PLAIN: plain}
        turn = i % max(1, len(self.methods))  # each method comes first once, as drift would favour one place
        for method in [*self.methods[turn:], *self.methods[:turn]]:
            name = str(method)
            if name not in failures:
                progress.update(bar, description=f"{where}: {name}")
                torch.manual_seed(self.settings.seed)
                try:
                    traced[name] = measure(
                        model, tokenizer, task, prompt, cell.mode, method,
                        chunk=self.settings.chunk, full_logits=plain.logits if task.reads_full else None,
                    )  # fmt: skip
                except Exception as error:
                    failures[name] = reason(error)
            progress.advance(bar)
        for name, one in traced.items():
            self.found[cell].setdefault(name, {})[i] = one.measurement
        self.failures[cell] = failures
        self._take_sample(tokenizer, cell, prompt, i, count, traced)

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        name = None if self.facts["model"] == DEFAULT_MODEL else self.settings.model
        s = self.settings
        return load_model(name, dtype=s.dtype, device=s.device, trust_remote_code=s.trust_remote_code)

    def _prompts(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[Cell, list[Prompt]]:
        """The prompts of each cell, checked: not empty, and not longer than the model can take."""
        assert self.settings.prompts is not None
        anatomy = Anatomy.of(model)
        limit = getattr(anatomy.config, "max_position_embeddings", None)
        beyond: set[int | None] = set()
        made: dict[tuple[str, int | None], list[Prompt]] = {}
        for cell in self.cells:
            key, task = (cell.task, cell.length), self.tasks[cell.task]
            if key in made:
                continue
            made[key] = task.prompts(tokenizer, self.settings.prompts, self.settings.seed, cell.length or 0)
            for prompt in made[key]:
                context, question = encode(tokenizer, prompt)
                if not context.shape[1]:
                    raise UsageError(f"task {cell.task}: a context has no tokens for this tokenizer")
                after = task.max_new_tokens or encode_answer(tokenizer, prompt).shape[1]
                needed = context.shape[1] + question.shape[1] + after
                if limit is not None and needed > limit:
                    if not anatomy.extends:
                        raise UsageError(
                            f"task {cell.task} needs {needed} tokens, more than the {limit} positions of "
                            f"{self.facts['model']}; use a smaller --length"
                        )
                    beyond.add(cell.length)
        for length in sorted(beyond, key=lambda n: n or 0):
            where = "your own prompts" if length is None else f"{length} tokens of context"
            self.notes.append(f"{where}: beyond the {limit} positions that {self.facts['model']} was trained on")
        return {cell: made[cell.task, cell.length] for cell in self.cells}

    # the sample: what was kept of one text

    def _sample_cell(self) -> Cell:
        return next((cell for cell in self.cells if self.tasks[cell.task].max_new_tokens), self.cells[0])

    def _take_sample(
        self,
        tokenizer: PreTrainedTokenizerBase,
        cell: Cell,
        prompt: Prompt,
        i: int,
        count: int,
        traced: dict[str, Traced],
    ) -> None:
        """What was kept of the middle prompt of one cell."""
        if self.sample or cell != self._sample_cell() or i != count // 2:
            return
        ids = torch.cat(encode(tokenizer, prompt), 1)[0].tolist()
        order = [PLAIN, *map(str, self.methods)]
        self.sample = {
            **cell._asdict(),
            "prompt": i,
            "tokens": [tokenizer.decode([token]) for token in ids],
            "kept": {
                name: [round(share, 4) for share in traced[name].kept.tolist()] for name in order if name in traced
            },
        }

    # the document

    def document(self) -> dict[str, Any]:
        """All that has been measured so far, as JSON values (docs/guide/compare.md)."""
        order = [PLAIN, *map(str, self.methods)]
        rows: list[dict[str, Any]] = []
        groups: list[dict[str, Any]] = []
        depths: list[dict[str, Any]] = []
        for cell in self.cells:
            failures = self.failures[cell]
            found = {
                name: self.found[cell][name] for name in order if name in self.found[cell] and name not in failures
            }
            metrics = {name: better for name, better in self.tasks[cell.task].metrics.items() if _has(found, name)}
            rows += rows_of(cell, metrics, found, failures)
            groups += groups_of(cell, metrics, found) if metrics else []
            depths += by_depth(cell, metrics, found) if metrics else []
        rows.sort(key=lambda row: order.index(row["method"]))
        return {
            "schema": SCHEMA,
            "settings": self.facts,
            **provenance(),
            "complete": self.complete,
            "rows": rows,
            "equal_cost": groups,
            "by_depth": depths,
            "sample": self.sample,
            "notes": [*self.notes, *_notes(rows)],
            "measurements": [
                {**cell._asdict(), "prompt": i, "method": name, **one.to_dict()}
                for cell in self.cells
                for name, ones in self.found[cell].items()
                for i, one in sorted(ones.items())
            ],
        }

    def _reload(self, console: Console) -> None:
        document = self.keeper.read(self.facts, console)
        if document is None:
            return
        for one in document["measurements"]:
            cell, method, i = (
                Cell(one.pop("task"), one.pop("mode"), one.pop("length")),
                one.pop("method"),
                one.pop("prompt"),
            )
            self.found[cell].setdefault(method, {})[i] = Measurement(**one)
        for row in document["rows"]:
            if row["status"] == "failed":
                self.failures[Cell(row["task"], row["mode"], row["length"])][row["method"]] = row["reason"]
        self.sample = document["sample"]

    @property
    def failed(self) -> bool:
        """Whether a method failed somewhere."""
        return any(self.failures.values())


def label(task: Task) -> str:
    """A task's name in tables: `needle`, or with its fields where these are not the defaults."""
    if isinstance(task, File):
        return f"file:{task.path}"
    return task.name if task == type(task)() else str(task)


def reason(error: BaseException) -> str:
    """An error in one line; where it is not one of ours, with its type and place."""
    line = " ".join(str(error).split())[:400]
    if isinstance(error, SeqwiseError):
        return line
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {line}{place}"


def check_writable(path: Path, option: str) -> None:
    """Raises UsageError where a file cannot be written; leaves nothing behind."""
    folder = path.expanduser().resolve().parent
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; give a file's name")
    if not folder.is_dir():
        raise UsageError(f"{option} {path}: the folder {folder} does not exist; make it first")
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix=".seqwise.")
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot write in {folder} ({error.strerror}); give another place") from None


def _task(text: str) -> Task:
    if text.endswith(".jsonl") and not text.startswith("file:") and "(" not in text:
        return File(path=text)
    try:
        return task(text)
    except SeqwiseError:
        raise
    except (ValueError, TypeError) as error:
        raise UsageError(f"cannot use task {text!r}: {error}") from None


def _has(found: dict[str, dict[int, Measurement]], metric: str) -> bool:
    measured = [one for ones in found.values() for one in ones.values()]
    return bool(measured) and all(metric in one.scores for one in measured)


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    counts = [row["n"] for row in rows if row["status"] == "ok"]
    if not counts or min(counts) >= ENOUGH:
        return []
    few = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return [f"{few} prompts per cell are under {ENOUGH}: no ranking is stated, intervals are wide"]
