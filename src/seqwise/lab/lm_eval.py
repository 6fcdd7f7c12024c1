"""Any task of lm-evaluation-harness under any method.

    log-likelihood   the context is the prompt; continuations follow token by token on the cache that it left
    rolling          the first half of each window is the prompt, scored by its own rows; the second half follows
    generation       an ordinary `generate` under the method

Continuations follow one token at a time, so that methods that act while decoding do act. Those of one context share
its prompt. Without a method all of it is the harness's own HFLM, to the last digit.
"""

from __future__ import annotations

import copy
import difflib
import logging
import math
import platform
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import seqwise
from seqwise.core import hf
from seqwise.core.errors import MissingExtra, UsageError
from seqwise.core.method import Method
from seqwise.core.run import Run
from seqwise.lab.registry import load_methods, parse_methods
from seqwise.lab.rows import PLAIN
from seqwise.lab.zoo import load_model

try:
    import lm_eval
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm  # type: ignore[import-untyped]
except ImportError as error:
    raise MissingExtra(
        f"seqwise eval needs lm-evaluation-harness ({error}): pip install 'seqwise[eval]', or pip install lm-eval"
    ) from error

logger = logging.getLogger(__name__)
SCHEMA = "seqwise.eval/1"
DEFAULT_MODEL = "SmolLM2-135M-Instruct"


class MethodLM(HFLM):
    """A causal language model under a method, as the harness's model.

    >>> lm_eval.simple_evaluate(MethodLM(model, tokenizer, A2SF(budget=0.25)), tasks=["hellaswag"])

    method: None for the plain model. batch_size: prompts generated from, or continuations of one context scored, at
    once. `acted` tells afterwards whether the method changed anything on any prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        method: Method | None = None,
        *,
        batch_size: int = 1,
    ) -> None:
        with _quiet("lm_eval.models.huggingface"):  # warns that it got a model, not a name
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.method = method
        self.acted = False
        self.continuations = self.single = 0  # scored under the method, and those of one token
        self._run: Run | None = None

    @contextmanager
    def _attached(self) -> Iterator[Run]:
        assert self.method is not None
        with self.method.on(self.model) as self._run:
            try:
                yield self._run
            finally:
                self._run = None

    # log-likelihood

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        if self.method is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        members: dict[tuple[int, ...], list[int]] = defaultdict(list)  # prompt -> requests that continue it
        cut = 0
        for i, (text, context, continuation) in enumerate(requests):
            count = len(continuation)
            if not 0 < count <= self.max_length:
                shown = "" if text is None else f" for {text[1][:60]!r}"
                raise UsageError(f"a continuation must have 1 to {self.max_length} tokens, got {count}{shown}")
            self.continuations, self.single = self.continuations + 1, self.single + (count == 1)
            cut += len(context) + count > self.max_length + 1
            members[tuple((context + continuation)[-self.max_length - 1 : -count])].append(i)
        if cut:
            logger.warning("%d contexts do not fit into %d positions and lose their beginning", cut, self.max_length)
        answers = [(0.0, False)] * len(requests)
        with self._attached() as run, tqdm(total=len(requests), disable=disable_tqdm, desc=str(self.method)) as bar:
            for prompt in sorted(members, key=len, reverse=True):  # what does not fit into memory fails at once
                before, cache = self._prefill(run, list(prompt))
                continuations = [requests[i][2] for i in members[prompt]]
                for i, answer in zip(members[prompt], self._follow(before[-1], cache, continuations), strict=True):
                    answers[i] = answer
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                self.acted |= run.acted
                bar.update(len(continuations))
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        if self.method is None:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        totals = []
        with self._attached() as run:
            for request in tqdm(requests, disable=disable_tqdm, desc=str(self.method)):
                (text,) = request.args
                windows = get_rolling_token_windows(
                    self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
                )
                total = sum(self._window(run, *make_disjoint_window(window)) for window in windows)
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
                totals.append(total)
        return totals

    def _window(self, run: Run, context: list[int], text: list[int]) -> float:
        """Log-probability of text after context: half of both is the prompt, the rest follows."""
        half = max((len(context) + len(text)) // 2 - len(context), 0)
        log_p, cache = self._prefill(run, context + text[:half], rows=half + 1)  # (half + 1, V)
        gold = torch.tensor(text[:half], dtype=torch.long, device=self.device)
        own = log_p[:half].gather(1, gold[:, None]).sum()
        ((rest, _),) = self._follow(log_p[half], cache, [text[half:]])
        self.acted |= run.acted
        return float(own) + rest

    @torch.no_grad()
    def _prefill(self, run: Run, prompt: list[int], rows: int = 1) -> tuple[Tensor, Any]:
        """Log-probabilities (rows, V) that the last rows of the prompt give, and the cache that the method left."""
        out = self.model(input_ids=torch.tensor([prompt], device=self.device), use_cache=True, logits_to_keep=rows)
        run.end_prompt()
        return log_softmax(out.logits[0], -1, dtype=self.softmax_dtype), out.cache

    @torch.no_grad()
    def _follow(self, before: Tensor, cache: Any, continuations: list[list[int]]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one; uses the cache up.

        before: (V,), log-probabilities of the first token.
        """
        answers: list[tuple[float, bool]] = []
        size = self.batch_size
        for start in range(0, len(continuations), size):
            part = [torch.tensor(ids, device=self.device) for ids in continuations[start : start + size]]
            branch = copy.deepcopy(cache) if start + size < len(continuations) else cache
            if len(part) > 1:
                branch.batch_select_indices(torch.zeros(len(part), dtype=torch.long, device=self.device))
            ids = pad_sequence(part, batch_first=True)  # (k, T); what is fed behind a short one touches no other
            T = ids.shape[1]
            log_p = before.expand(len(part), -1)  # (k, V)
            scores, greedy = [], []
            for t in range(T):
                gold = ids[:, t : t + 1]
                scores.append(log_p.gather(1, gold))
                greedy.append(log_p.argmax(-1, keepdim=True) == gold)
                if t + 1 < T:
                    logits = self.model(input_ids=gold, cache=branch, use_cache=True).logits[:, -1]
                    log_p = log_softmax(logits, -1, dtype=self.softmax_dtype)
            lengths = torch.tensor([len(one) for one in part], device=self.device)
            beyond = torch.arange(T, device=self.device) >= lengths[:, None]  # (k, T)
            totals = torch.cat(scores, 1).masked_fill(beyond, 0).sum(1).tolist()
            answers += zip(totals, (torch.cat(greedy, 1) | beyond).all(1).tolist(), strict=True)
        return answers

    # generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        with nullcontext() if self.method is None else self._attached():
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        ids: Tensor = super()._model_generate(*args, **kwargs)
        self.acted |= self._run is not None and self._run.acted
        return ids


@dataclass(frozen=True)
class Settings:
    """What to evaluate, in the words of the command line; None stands for the default.

    tasks: names, patterns ("mmlu_*") or .yaml files; commas separate several in one text. include_path: a folder with
    more task files. limit: documents per task. batch_size: as in `MethodLM`.
    """

    tasks: Sequence[str]
    model: str | None = None
    method: str | None = None
    include_path: str | None = None
    limit: int | None = None
    batch_size: int = 1
    plugins: Sequence[str] = ()
    device: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, value in (("limit", self.limit), ("batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be a whole number >= 1, got {value}")
        object.__setattr__(self, "tasks", tuple(name for text in self.tasks for name in text.split(",") if name))
        if not self.tasks:
            raise UsageError("--tasks must name at least one task, or a task's .yaml file")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise UsageError(f"--include-path must be a folder with task files, got {self.include_path!r}")


def evaluate(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Runs the tasks and returns the document of `docs/guide/eval.md`. Progress goes to stderr.

    Raises UsageError for what cannot be used, and what the method raises. Seeds are those of the harness.
    """
    console = console or Console(stderr=True)
    load_methods(settings.plugins)
    (method,) = parse_methods([settings.method or PLAIN])
    with console.status("reading tasks"):
        tasks = _tasks(settings.tasks, settings.include_path)
    with console.status(f"loading {settings.model or DEFAULT_MODEL}"):
        model, tokenizer = load_model(
            settings.model, dtype=settings.dtype, device=settings.device, trust_remote_code=settings.trust_remote_code
        )
    lm = MethodLM(model, tokenizer, None if str(method) == PLAIN else method, batch_size=settings.batch_size)
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    found = lm_eval.evaluate(lm, tasks, limit=settings.limit, log_samples=False)
    return {
        "schema": SCHEMA,
        "settings": asdict(settings)
        | {"model": settings.model or DEFAULT_MODEL, "method": str(method), "tasks": list(settings.tasks)}
        | {"plugins": list(settings.plugins)},
        "versions": {
            "seqwise": seqwise.__version__,
            **hf.versions(),
            "lm_eval": lm_eval.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "acted": lm.acted,
        "rows": _rows(found),
        "notes": _notes(lm),
    }


def table(document: dict[str, Any]) -> Table:
    """A document as a table for a terminal."""
    method = document["settings"]["method"]
    silent = "" if document["acted"] or method == PLAIN else " (never acted: these are the plain model's numbers)"
    grid = Table(box=SIMPLE_HEAD, title=f"{method}{silent}", title_justify="left", padding=(0, 1, 0, 0))
    grid.caption, grid.caption_justify = "\n".join(document["notes"]) or None, "left"
    for name in ("task", "metric", "filter", "n", "value", "± standard error"):
        grid.add_column(name, justify="right" if name in ("n", "value") else "left", overflow="fold")
    for row in document["rows"]:
        way = {True: " ↑", False: " ↓", None: ""}[row["higher_is_better"]]
        grid.add_row(
            row["task"], row["metric"] + way, row["filter"], "" if row["n"] is None else str(row["n"]),
            "-" if row["value"] is None else f"{row['value']:.4f}",
            "" if row["stderr"] is None else f"± {row['stderr']:.4f}",
        )  # fmt: skip
    return grid


def _tasks(names: Sequence[str], include_path: str | None) -> Any:
    """The harness's tasks by name, pattern or file, ready to be evaluated.

    Its own index of some ten thousand tasks takes half a minute to read, so it is read only where it is needed.
    """
    for name in names:
        if _is_file(name) and not Path(name).expanduser().is_file():
            raise UsageError(f"no task file at {name}")
    patterns = any(set("*?[") & set(name) for name in names)
    for defaults in (True,) if patterns else (False, True):
        manager = TaskManager(include_path=include_path, include_defaults=defaults)
        found = {name: [name] if _is_file(name) else manager.match_tasks([name]) for name in names}
        unknown = next((name for name, specs in found.items() if not specs), None)
        if unknown is not None:
            if not defaults:
                continue
            close = difflib.get_close_matches(unknown, manager.all_tasks, n=3)
            hint = f"; close: {', '.join(close)}" if close else ""
            raise UsageError(f"unknown task {unknown!r}: give a task of lm-evaluation-harness or a .yaml file{hint}")
        try:
            loaded = manager.load(list(dict.fromkeys(spec for specs in found.values() for spec in specs)))
            break
        except Exception as error:  # a task is code and data of others: anything can go wrong
            if isinstance(error, KeyError) and not defaults:
                continue  # a group whose members are the harness's own
            line = " ".join(str(error).split())[:300]
            raise UsageError(f"cannot load {', '.join(names)}: {type(error).__name__}: {line}") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "MULTIMODAL", False):
            raise UsageError(f"task {name} has images; seqwise eval runs tasks of text")
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(
                f"task {name} runs code that the model writes; if you consent, call lm_eval.simple_evaluate with "
                "seqwise.lab.lm_eval.MethodLM and confirm_run_unsafe_code=True"
            )
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per task (or group of tasks), metric and filter."""
    rows = []
    for task, values in found["results"].items():
        better = found["higher_is_better"].get(task) or {}
        for key, value in values.items():
            metric, comma, how = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                rows.append(
                    {
                        "task": task,
                        "metric": metric,
                        "filter": how,
                        "n": found["n-samples"].get(task, {}).get("effective", values.get("sample_len")),
                        "value": _number(value),
                        "stderr": _number(values.get(f"{metric}_stderr,{how}")),
                        "higher_is_better": better.get(metric),
                        "fewshot": found["n-shot"].get(task),
                        "version": str(found["versions"].get(task, "")),
                    }
                )
    return rows


def _notes(lm: MethodLM) -> list[str]:
    if not lm.single:
        return []
    return [
        f"{lm.single} of {lm.continuations} continuations have one token, which the prompt's own last row predicts: "
        "what a method does to the cache afterwards cannot change their scores"
    ]


def _number(value: Any) -> float | None:
    number = isinstance(value, (int, float, np.number)) and math.isfinite(value)
    return float(value) if number else None


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Holds a logger's warnings back."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
