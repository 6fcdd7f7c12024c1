"""`seqwise plan`: finds a schedule for a staged method, keeps what is finished, and makes one document and its table.

`seqwise.lab.search` is the search itself; `docs/guide/plan.md` describes the document.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from seqwise.core.errors import SeqwiseError, UsageError
from seqwise.core.method import Method
from seqwise.lab.compare import check_writable
from seqwise.lab.files import cache_dir
from seqwise.lab.intervals import clustered_mean
from seqwise.lab.keeping import Keeper, provenance, sha256
from seqwise.lab.registry import load_methods
from seqwise.lab.search import Batch, Evaluated, Objective, Search, optimiser, planners
from seqwise.lab.zoo import SCENES, load_model, load_vlm, sees

SCHEMA = "seqwise.plan/1"
WINDOW = 256  # tokens of a text prompt


@dataclass(frozen=True)
class Settings:
    """What to plan, in the words of the command line; None stands for the default.

    budget: average share of tokens over the decoder's layers. prompts: as many that the search sees, and as many that
    it does not. task: a .jsonl file with prompts of your own.
    """

    method: str
    model: str | None = None
    budget: float = 0.25
    prompts: int = 30
    evaluations: int = 60
    seed: int = 42
    task: str | None = None
    plugins: Sequence[str] = ()
    device: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("prompts", self.prompts, 1),
            ("evaluations", self.evaluations, 1),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise UsageError(f"--{name} must be a whole number >= {least}, got {value}")
        if not 0 < self.budget < 1:
            raise UsageError(f"--budget must be a share in (0.0, 1.0), got {self.budget}")


# prompts


@dataclass(frozen=True)
class Prompts:
    """Batches that a search sees, and others that it does not; `source` says in words what they are."""

    seen: list[Batch]
    unseen: list[Batch]
    source: str

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for batch in [*self.seen, *self.unseen]:
            for name in sorted(batch):
                x = batch[name].detach().cpu().contiguous()
                digest.update(f"{name}{tuple(x.shape)}{x.dtype}".encode())
                digest.update(x.view(torch.uint8).numpy().tobytes() if x.numel() else b"")
        return digest.hexdigest()


def prompts_of(settings: Settings, model: Any, processor: Any, vision: bool) -> Prompts:
    """The prompts of a plan: drawn scenes for vision-language models, English prose for language models, or the lines
    of `task`. One prompt a batch, so that each runs at its own length.

    Raises UsageError for a file that cannot be read or has no line.
    """
    n = settings.prompts
    make = _pictures if vision else _texts
    made, source = make(settings, processor, 2 * n)
    if not made:
        raise UsageError(f"{settings.task} has no prompts")
    return Prompts(made[:n], made[n:], source)


def _pictures(settings: Settings, processor: Any, n: int) -> tuple[list[Batch], str]:
    from seqwise.lab.looking import KINDS, Pictured, Pictures, Scenes, encode_pictures

    if settings.task is None:
        by_kind = [Scenes(kind).prompts(processor, math.ceil(n / len(KINDS)), settings.seed, 0) for kind in KINDS]
        drawn = [prompt for prompts in zip(*by_kind, strict=True) for prompt in prompts][:n]
        source = "drawn scenes"
    else:
        every = [Pictures(settings.task, kind) for kind in Pictures(settings.task).types()]
        drawn = [prompt for one in every for prompt in one.prompts(processor, n, settings.seed, 0)]
        drawn = sorted(drawn, key=lambda prompt: prompt.facts["line"])[:n]
        source = settings.task
    return [encode_pictures(processor, prompt) for prompt in drawn if isinstance(prompt, Pictured)], source


def _texts(settings: Settings, tokenizer: Any, n: int) -> tuple[list[Batch], str]:
    from seqwise.lab.tasks import form_of, json_lines, text_field
    from seqwise.lab.zoo.text import passages

    if settings.task is None:
        texts, source = passages(settings.seed, tokenizer, WINDOW, n), "English prose"
    else:
        lines = list(json_lines(settings.task, form_of(("prompt",))))[:n]
        texts, source = [text_field(where, item, "prompt") for _, where, item in lines], settings.task
    return [dict(tokenizer(text, return_tensors="pt")) for text in texts], source


# the command


class Planning:
    """One plan: `run` searches, `document` says what has been found so far.

    Everything that needs no model is checked here: raises UsageError for unknown methods, fields and values.
    data(model, processor) gives prompts of your own, as a program may; the command line has none.
    """

    def __init__(
        self, settings: Settings, *, out: Path | None = None, resume: bool = False,
        data: Callable[[Any, Any], Prompts] | None = None,
    ) -> None:  # fmt: skip
        load_methods(settings.plugins)
        self.settings, self.data = settings, data
        try:
            self.method = Method.parse(settings.method)
        except SeqwiseError:
            raise
        except (ValueError, TypeError) as error:
            raise UsageError(f"cannot use {settings.method!r}: {error}") from None
        if type(self.method).search_space is Method.search_space:
            raise UsageError(f"{self.method} has no stages to plan; there is a plan for {planners()}")
        needs_eyes = "vision tower" in self.method.needs()
        self.model_name = settings.model or (SCENES if needs_eyes else "SmolLM2-135M-Instruct")
        self.vision = needs_eyes or sees(settings.model, settings.trust_remote_code)
        files = [*settings.plugins, *([] if settings.task is None else [settings.task])]
        self.facts: dict[str, Any] = asdict(settings) | {
            "method": str(self.method),
            "model": self.model_name,
            "plugins": list(settings.plugins),
            "files_sha256": {str(path): sha256(path) for path in files},
        }
        self.search: Search | None = None
        self.about: dict[str, Any] = {}
        self.complete = False
        self.keeper = Keeper(out, self._place(), schema=SCHEMA, results="a plan's results")
        if out is not None:
            check_writable(out, "--out")
        self.resume = resume

    def _place(self) -> Path:
        key = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]
        return cache_dir() / "plan" / f"{key}.json"

    def run(self, console: Console | None = None) -> None:
        """Evaluates what is missing. Keeps all that is finished in `out` as it goes, also when interrupted.

        Raises UsageError for what the model or the disk cannot do, MissingExtra without optuna, KeyboardInterrupt as it
        comes.
        """
        console, s = console or Console(stderr=True), self.settings
        optimiser()  # whether it is there shows before anything takes long
        before = self.keeper.read(self.facts, console) if self.resume else None
        with console.status(f"loading {self.model_name}"):
            model, processor = self._load()
            prompts = (self.data or self._prompts)(model, processor)
            seen, unseen = (Objective(model, some) if some else None for some in (prompts.seen, prompts.unseen))
        if seen is None:
            raise UsageError("a plan needs prompts, got none")
        search = Search(self.method, s.budget, seen, evaluations=s.evaluations, seed=s.seed, unseen=unseen)
        self.about = {
            "model": {
                "name": self.model_name,
                "fingerprint": seen.anatomy.fingerprint,
                "layers": len(seen.anatomy.layers),
            },
            "data": {
                "source": prompts.source,
                "seen": sum(len(full) for full in seen.full),
                "unseen": 0 if unseen is None else sum(len(full) for full in unseen.full),
                "sha256": prompts.sha256,
            },
        }
        if before is not None:
            self._take_over(before, search)
        self.search = search
        bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        with bars:
            bar = bars.add_task("", total=s.evaluations)
            try:
                search.run(
                    lambda: self.keeper.keep(self.document, console),
                    lambda text, done: bars.update(bar, description=text, completed=done),
                )
            except BaseException:
                self.keeper.keep(self.document, console)
                raise
        self.complete = True
        self.keeper.keep(self.document, console)

    def _load(self) -> tuple[Any, Any]:
        s = self.settings
        if self.vision:
            return load_vlm(self.model_name, s.dtype, s.device, s.trust_remote_code)
        return load_model(s.model, s.dtype, s.device, s.trust_remote_code)

    def _prompts(self, model: Any, processor: Any) -> Prompts:
        return prompts_of(self.settings, model, processor, self.vision)

    def _take_over(self, document: Mapping[str, Any], search: Search) -> None:
        for part, name in (("model", "fingerprint"), ("data", "sha256")):
            was, now = document[part][name], self.about[part][name]
            if was != now:
                raise UsageError(
                    f"cannot resume from {self.keeper.out}: the {part}'s {name} was {was}, now it is {now}"
                )
        if document["uniform"] is not None:
            search.baseline = _read(document["uniform"])
        search.tried = [_read(one) for one in document["tried"]][: search.evaluations]
        search.unseen = {one["method"]: _read(one) for one in document["unseen"]}

    # the document

    def document(self) -> dict[str, Any]:
        """All that has been found so far, as JSON values (docs/guide/plan.md)."""
        found = self.search
        uniform, best = (None, None) if found is None else (found.baseline, found.best)
        after = {} if found is None else found.unseen
        pairs = None if uniform is None or best is None else (after.get(uniform.method), after.get(best.method))
        return {
            "schema": SCHEMA,
            "settings": self.facts,
            **provenance(),
            "complete": self.complete,
            **(self.about or {"model": None, "data": None}),
            "space": {} if found is None else {name: list(bounds) for name, bounds in found.space.items()},
            "uniform": _written(uniform),
            "plan": _written(best),
            "gain": _gain(best, uniform),
            "unseen": [_written(one) for one in after.values()],
            "unseen_gain": None if pairs is None else _gain(pairs[1], pairs[0]),
            "tried": [] if found is None else [_written(one) for one in found.tried],
            "notes": self._notes(),
        }

    def _notes(self) -> list[str]:
        found = self.search
        if found is None or found.baseline is None:
            return []
        notes = []
        failed = [one for one in found.tried if one.reason is not None]
        if failed:
            notes.append(f"{len(failed)} of {len(found.tried)} tries failed and count 0, the first: {failed[0].reason}")
        over = sum(found.excess(one) > 1 for one in found.tried)
        if over:
            notes.append(f"{over} of {len(found.tried)} tries saw more tokens than the budget allows and are no plan")
        if found.best is found.baseline:
            notes.append("nothing that was tried beats the uniform schedule, which is the plan")
        if found.other is None:
            notes.append("there were no prompts left that the search has not seen: its gain is an upper estimate")
        return notes

    @property
    def failed(self) -> bool:
        """Whether every try failed."""
        return self.search is not None and bool(self.search.tried) and all(one.reason for one in self.search.tried)


def _written(one: Evaluated | None) -> dict[str, Any] | None:
    return None if one is None else {**asdict(one), "value": one.value, "share": one.share}


def _read(document: Mapping[str, Any]) -> Evaluated:
    return Evaluated(**{name: value for name, value in document.items() if name not in ("value", "share")})


def _gain(ours: Evaluated | None, uniform: Evaluated | None) -> dict[str, Any] | None:
    """Mean paired difference of the cosines, and its 95 % interval (None under 2 prompts)."""
    if ours is None or uniform is None or not ours.cosines or not uniform.cosines:
        return None
    each = [a - b for a, b in zip(ours.cosines, uniform.cosines, strict=True)]
    if len(each) < 2:
        return {"value": each[0], "low": None, "high": None}
    interval = clustered_mean([[value] for value in each])
    return {"value": interval.mean, "low": interval.low, "high": interval.high}


# the document as tables for a terminal


def tables(document: Mapping[str, Any]) -> list[RenderableType]:
    """The plan beside the uniform schedule, the method to use, and notes."""
    uniform, plan = document["uniform"], document["plan"]
    if uniform is None or plan is None:
        return [Text("nothing has been evaluated yet", style="yellow")]
    tried, settings = len(document["tried"]), document["settings"]
    grid = Table(
        box=SIMPLE_HEAD, title_justify="left", caption_justify="left", padding=(0, 1, 0, 0),
        title=f"{document['model']['name']}, budget {settings['budget']:g}, {tried} tries",
    )  # fmt: skip
    grid.caption = (
        "cosine of the last token's final hidden state to the plain model's, mean over prompts; share of the tokens "
        "that a layer sees, mean over layers; gain with its 95 % interval, paired by prompt"
    )
    grid.add_column("schedule")
    for name in ("cosine", "gain", "unseen prompts", "gain", "share"):
        grid.add_column(name, justify="right")
    after = {one["method"]: one for one in document["unseen"]}
    rows = [("uniform", uniform, None, None)]
    if plan["method"] != uniform["method"]:
        rows.append(("plan", plan, document["gain"], document["unseen_gain"]))
    for name, one, gain, later in rows:
        other = after.get(one["method"])
        value = "" if other is None else f"{other['value']:.4f}"
        share = "" if one["share"] is None else f"{one['share']:.1%}"
        grid.add_row(name, f"{one['value']:.4f}", _shown_gain(gain), value, _shown_gain(later), share)
    shown: list[RenderableType] = [grid, Text(plan["method"], style="bold")]
    data = document["data"]
    shown.append(
        Text(
            f"found with seed {settings['seed']} on {data['seen']} prompts ({data['source']}, {data['sha256'][:16]}); "
            f"model {document['model']['fingerprint']}",
            style="dim",
        )
    )
    return shown + [Text(note, style="yellow") for note in document["notes"]]


def _shown_gain(gain: Mapping[str, Any] | None) -> str:
    if gain is None:
        return ""
    span = "" if gain["low"] is None else f"\n[{gain['low']:+.4f}, {gain['high']:+.4f}]"
    return f"{gain['value']:+.4f}{span}"
