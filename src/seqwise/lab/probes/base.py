"""What a probe is: one question about a model, prompts that answer it, and how to read the answer.

    value       mean over items, each item one value, with a 95 % interval over the items
    difference  the same for (method - plain model), item by item
    answer      of given choices the one whose tokens have the highest mean log-probability after the reply's beginning

A probe measures through `Progress.once`, so what one run has measured the next one need not measure again; its
`result` is a function of these records alone. One file per probe; `seqwise.lab.probes.PROBES` lists them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from seqwise.core.errors import UsageError
from seqwise.core.method import Method
from seqwise.core.prepare import prepare
from seqwise.core.segments import CONTEXT, Segments
from seqwise.lab.intervals import Interval, clustered_mean, wilson
from seqwise.lab.registry import load_methods
from seqwise.lab.rows import newcombe

ROWS = 32  # prompts in one forward, at most
REPLY = 24  # tokens of a free reply, at most


@dataclass(frozen=True)
class Settings:
    """What probes are run on, in the words of the command line; None and empty tuples stand for the defaults.

    items: per part of a probe. remedies: methods whose effect is judged. task: a file with items of your own.
    """

    model: str | None = None
    remedies: Sequence[str] = ()
    items: int | None = None
    seed: int = 0
    task: str | None = None
    plugins: Sequence[str] = ()
    device: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (("items", self.items, 1), ("seed", self.seed, 0)):
            if value is not None and value < least:
                raise UsageError(f"--{name} must be a whole number >= {least}, got {value}")


@dataclass(frozen=True)
class Row:
    """One number. group: the table it stands in; what: its column there, or its line where there is one method.

    value: over `n` items, with its 95 % interval (None under two items). difference: the same for method - plain
    model, paired. status: "ok"; "failed" or "not judged", with the reason and without a value.
    """

    group: str
    method: str
    what: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    difference: Mapping[str, float | None] | None = None
    note: str = ""
    status: Literal["ok", "failed", "not judged"] = "ok"
    reason: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What the numbers say about one part of a probe under one method."""

    part: str
    method: str
    verdict: str
    reading: str


@dataclass(frozen=True)
class Result:
    """What a probe found. notes: what a reader should know."""

    verdicts: Sequence[Verdict]
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    @property
    def failed(self) -> bool:
        return any(row.status == "failed" for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdicts": [asdict(one) for one in self.verdicts],
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }


@dataclass
class Progress:
    """How far a probe is, and all that it has measured: `records`, JSON values by key.

    show: gets what is measured now, units done and units in all. kept: called after each new record.
    """

    records: dict[str, Any] = field(default_factory=dict)
    show: Callable[[str, int, int], None] = lambda text, done, total: None
    kept: Callable[[], None] = lambda: None
    done: int = 0
    total: int = 0

    def plan(self, units: int) -> None:
        """So many more units of work are to come."""
        self.total += units

    def skip(self, units: int) -> None:
        """So many of the planned units will not be needed."""
        self.total -= units

    def once(self, key: str, text: str, work: Callable[[], Any]) -> Any:
        """The record of this unit: an earlier one, else what `work()` returns, which is then kept."""
        self.show(text, self.done, self.total)
        if key not in self.records:
            self.keep(key, work())
        self.done += 1
        return self.records[key]

    def keep(self, key: str, record: Any) -> None:
        self.records[key] = record
        self.kept()


class Probe(ABC):
    """One question about a model. asks: the question; reading: how to read the numbers; finding: what papers found."""

    name: ClassVar[str]
    asks: ClassVar[str]
    reading: ClassVar[str]
    finding: ClassVar[str]

    @abstractmethod
    def facts(self, settings: Settings) -> dict[str, Any]:
        """The probe's own settings as JSON values, defaults filled in. Raises UsageError for what cannot be used; needs
        no model."""

    @abstractmethod
    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, progress: Progress
    ) -> None:
        """Measures all units that `progress` lacks. Raises UsageError for what the model cannot do."""

    @abstractmethod
    def result(self, settings: Settings, records: Mapping[str, Any]) -> Result:
        """What has been found by these records, also where a run was stopped."""

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Measures and says what was found.

        >>> print(Order().run(*load_model()).verdicts)
        """
        settings, progress = settings or Settings(), progress or Progress()
        load_methods(settings.plugins)
        self.facts(settings)
        self.measure(model, tokenizer, settings, progress)
        return self.result(settings, progress.records)


# intervals over items


def share(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % interval of the mean of one value in [0, 1] per item; None under two items.

    Wilson's where all values are 0 or 1, which has a width where all are the same. It holds for shares of pairs too
    where none differs: their mean is at most the share of items with a pair that differs.
    """
    if len(values) < 2:
        return None, None
    if all(value in (0, 1) for value in values):
        interval = wilson(round(sum(values)), len(values))
        return interval.low, interval.high
    interval = _mean(tuple(values))
    return max(0.0, interval.low), min(1.0, interval.high)


def paired(ours: Sequence[float], plain: Sequence[float], *, hits: bool = False) -> dict[str, float | None]:
    """Mean of ours - plain, item by item, and its 95 % interval (bounds None under two items). hits: all are 0 or 1."""
    values = [a - b for a, b in zip(ours, plain, strict=True)]
    if len(values) < 2:
        return {"value": sum(values), "low": None, "high": None}
    if hits:
        low, high = newcombe(ours, plain)
        return {"value": sum(values) / len(values), "low": low, "high": high}
    interval = _mean(tuple(values))
    return {"value": interval.mean, "low": interval.low, "high": interval.high}


@lru_cache(maxsize=4096)  # a document is made again after each few items, from mostly the same numbers
def _mean(values: tuple[float, ...]) -> Interval:
    return clustered_mean([[value] for value in values])


# asking a model


@dataclass(frozen=True)
class Asked:
    """A prompt: chat messages as `seqwise.prepare` takes them, and how the reply begins."""

    messages: list[dict[str, Any]]
    prefix: str = ""


def encode(tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked]) -> tuple[dict[str, Tensor], Segments]:
    """A batch and its facts. All prompts begin the reply alike. Sets count as context, for methods that look for it."""
    batch, segments = prepare(tokenizer, [one.messages for one in asked])
    part = torch.where((segments.set >= 0) & (segments.part < 0), CONTEXT, segments.part)
    segments = replace(segments, part=part)
    begun = tokenizer.encode(asked[0].prefix, add_special_tokens=False) if asked[0].prefix else []
    ids = torch.tensor([begun] * len(asked), dtype=torch.long)  # (B, p)
    ones = torch.ones_like(ids)
    tail = Segments.infer(ids, ones, None)
    joined = {f.name: torch.cat([getattr(segments, f.name), getattr(tail, f.name)], 1) for f in fields(Segments)}
    return {
        "input_ids": torch.cat([batch["input_ids"], ids], 1),
        "attention_mask": torch.cat([batch["attention_mask"], ones], 1),
    }, Segments(**joined)


def answer_ids(tokenizer: PreTrainedTokenizerBase, prefix: str, answer: str) -> list[int]:
    """Tokens of an answer as it goes on after the reply's beginning."""
    if not prefix:
        return tokenizer.encode(answer, add_special_tokens=False)
    begun = tokenizer.encode(prefix, add_special_tokens=False)
    longer = tokenizer.encode(f"{prefix} {answer}", add_special_tokens=False)
    if longer[: len(begun)] == begun:
        return longer[len(begun) :]
    return tokenizer.encode(f" {answer}", add_special_tokens=False)  # it would merge into what is given already


def choice_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    choices: Sequence[str],
    method: Method | None = None,
) -> Tensor:
    """Mean log-probability (nats per token) of each choice as the reply to each prompt: float32 (B, C).

    All through `generate`, so that every method takes part. Choices of one token are read from one forward; else each
    (prompt, choice) is a row whose reply is forced. Raises what the method raises, ArithmeticError where it is not
    finite.
    """
    batch, segments = encode(tokenizer, asked)
    answers = [answer_ids(tokenizer, asked[0].prefix, choice) for choice in choices]
    T, B, C = max(map(len, answers)), len(asked), len(choices)
    _check_room(model, batch, T)
    if T == 1:
        every = torch.cat([_logits(model, batch, segments, rows, None, method) for rows in _blocks(B)])  # (B, 1, V)
        found = every[:, 0].log_softmax(-1)[:, [ids[0] for ids in answers]]
    else:
        forced = torch.tensor([ids + ids[-1:] * (T - len(ids)) for ids in answers])  # (C, T)
        counted = torch.tensor([[t < len(ids) for t in range(T)] for ids in answers])  # (C, T)
        means = []
        for rows in _blocks(B * C):
            words = forced[rows % C]  # (r, T)
            logits = _logits(model, batch, segments, rows // C, words, method)
            logps = logits.log_softmax(-1).gather(-1, words[..., None])[..., 0]  # (r, T)
            live = counted[rows % C]
            means.append(logps.masked_fill(~live, 0).sum(-1) / live.sum(-1))
        found = torch.cat(means).view(B, C)
    if not found.isfinite().all():
        raise ArithmeticError(f"log-probabilities of the choices are not finite: {found.tolist()}")
    return found


def replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked], method: Method | None = None
) -> list[str]:
    """Greedy replies of at most `REPLY` tokens, without their given beginning."""
    batch, segments = encode(tokenizer, asked)
    _check_room(model, batch, REPLY)
    n = batch["input_ids"].shape[1]
    texts: list[str] = []
    for rows in _blocks(len(asked)):
        ids = _generate(model, batch, segments, rows, method, max_new_tokens=REPLY).sequences
        texts += tokenizer.batch_decode(ids[:, n:], skip_special_tokens=True)
    return texts


class _Forced(LogitsProcessor):
    """Lets each row say its own tokens, words (B, T), and nothing else."""

    def __init__(self, words: Tensor) -> None:
        self.words, self.step = words, 0  # counted, as a method may reword the prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        word = self.words[:, self.step : self.step + 1].to(scores.device)
        self.step += 1
        return torch.full_like(scores, float("-inf")).scatter(1, word, 0.0)


def _logits(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    segments: Segments,
    rows: Tensor,
    words: Tensor | None,
    method: Method | None,
) -> Tensor:
    """(r, T, V) float32 on the CPU: the model's own logits before each token of `words` (r, T), None for one step."""
    steps = 1 if words is None else words.shape[1]
    processors = [] if words is None else [_Forced(words)]
    out = _generate(model, batch, segments, rows, method, max_new_tokens=steps, logits_processor=processors)
    return torch.stack(out.logits, 1).float().cpu()


@torch.no_grad()
def _generate(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    segments: Segments,
    rows: Tensor,
    method: Method | None,
    **options: Any,
) -> Any:
    end = model.generation_config.eos_token_id
    pad = model.generation_config.pad_token_id
    with method.on(model) if method is not None else nullcontext() as run:
        if run is not None:
            run.bind(Segments(**{f.name: getattr(segments, f.name)[rows].to(model.device) for f in fields(Segments)}))
        return model.generate(
            **{name: value[rows].to(model.device) for name, value in batch.items()},
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=pad if pad is not None else (end[0] if isinstance(end, list) else end) or 0,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )


def _blocks(rows: int) -> tuple[Tensor, ...]:
    return torch.arange(rows).split(ROWS)


def _check_room(model: PreTrainedModel, batch: dict[str, Tensor], after: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = batch["input_ids"].shape[1] + after
    if limit is not None and needed > limit:
        raise UsageError(
            f"a prompt needs {needed} tokens, more than the {limit} positions of the model; use shorter ones"
        )
