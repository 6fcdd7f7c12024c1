"""One prompt under one method: what came out, what it took, and what stayed.

    blind   the context is the prompt; the question's rows come afterwards, on the cache that the method left
    aware   context and question are the prompt

The reply is decoded greedily; how probable the right answer was is read on a copy of the cache. Answers and
continuations are fed one token at a time, so that methods that act on decoding steps do act. Seconds are wall clock of
the forwards alone: the whole prefill, and the median decoding step.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import UsageError
from seqwise.core.method import Method
from seqwise.core.run import Run
from seqwise.lab.intervals import rank_correlation
from seqwise.lab.looking import Looking, Pictured, encode_pictures, pictures_of, visual_tokens
from seqwise.lab.operations import counted
from seqwise.lab.tasks import Output, Prompt, Task, encode, encode_answer

Mode: TypeAlias = Literal["blind", "aware"]


@dataclass(frozen=True)
class Measurement:
    """Quality and cost of one prompt. Bytes are of the cache at the end, `tokens` all that the model has seen by then.

    kept_tokens: live slots, mean over layers and KV heads. attention_work: share of the plain model's query-key
    products. prefill_s: seconds; decode_s: seconds per token, None where nothing was decoded. depth: where the answer
    stands, as a share of the context. position_correlation: Spearman's, of a prompt token's place and the share of
    (layer, KV head) that still holds it; None where all are held alike. visual_tokens: by stage, "input" first, and
    operations: of the prefill (`lab.operations`); both of prompts with images alone.
    """

    scores: dict[str, float]
    text: str
    tokens: int
    kept_tokens: float
    cache_bytes: int
    live_bytes: int
    plain_bytes: int
    peak_bytes: int
    attention_work: float
    acted: bool
    prefill_s: float
    decode_s: float | None
    depth: float | None = None
    position_correlation: float | None = None
    visual_tokens: dict[str, int] | None = None
    operations: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Traced:
    """A measurement with what is too large to keep: the scored logits (T, V), and per prompt token the share of
    (layer, KV head) that still holds it at the end (n,). pictures: what stayed of each image, stage by stage."""

    measurement: Measurement
    logits: Tensor | None
    kept: Tensor
    pictures: list[Any] = field(default_factory=list)


def modes_of(task: Task) -> tuple[Mode, ...]:
    """Text that goes on has no question, so nothing to be aware of; questions about images are part of the prompt."""
    if isinstance(task, Looking):
        return ("aware",)
    return ("blind", "aware") if task.max_new_tokens else ("blind",)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    prompt: Prompt,
    mode: Mode,
    method: Method | None = None,
    *,
    chunk: int | None = None,
    full_logits: Tensor | None = None,
) -> Traced:
    """Runs one prompt under `method`, None for the plain model.

    chunk: as in `Method.on`, for the method only. full_logits: the plain model's, for tasks that compare with them.
    Raises what the method raises, and ArithmeticError for scores that are not finite.
    """
    images: dict[str, Tensor] = {}
    if isinstance(prompt, Pictured):
        images = {name: value.to(model.device) for name, value in encode_pictures(tokenizer, prompt).items()}
        context = images.pop("input_ids")
        question = context[:, :0]
        images.pop("attention_mask", None)  # of one prompt: all ones
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    else:
        context, question = (ids.to(model.device) for ids in encode(tokenizer, prompt))
    asked = torch.cat([context, question], 1)  # (1, n)
    first = context if mode == "blind" else asked
    attached = method.on(model, chunk=chunk) if method is not None else nullcontext()
    anatomy = Anatomy.of(model)
    with attached as run, counted(anatomy) if images else nullcontext() as rows:
        driver = _Driver(model, run)
        logits, prefill_s = driver.timed(lambda: driver.prefill(first, images))  # (1, 1, V)
        operations = None if rows is None else rows.operations
        gold = encode_answer(tokenizer, prompt).to(model.device)  # (1, T)
        rest = asked[:, first.shape[1] :]  # (1, m), the question where it comes after the prompt
        text = ""
        if task.max_new_tokens:
            # after a given beginning the answer comes at once or not at all
            limit = min(gold.shape[1] + 4, task.max_new_tokens) if prompt.prefix else task.max_new_tokens
            reply, decode_s, scored = _reply(driver, asked, rest, logits, gold, limit)
            text = tokenizer.decode(reply, skip_special_tokens=True)
        else:
            scored, decode_s = _forced(driver, logits, gold)  # (T, V)
        output = Output(text, scored, gold[0], scored if full_logits is None else full_logits)
        scores = task.score(prompt, output)
        scores = {name: round(value, 5) for name, value in scores.items()}  # kernels differ in the last digits
        if not all(map(math.isfinite, scores.values())):
            raise ArithmeticError(f"scores are not finite: {scores}")
        cost = _cost(driver.cache) if run is None else _reported(run)
        kept = torch.ones(asked.shape[1]) if run is None else _kept(run, asked.shape[1])
        maps = pictures_of(run) if images and run is not None else []
        visual = None
        if images and anatomy.vision is not None:
            tokens = int(torch.isin(asked, torch.tensor(anatomy.vision.tokens, device=asked.device)).sum())
            visual = {"prompt": tokens} | ({} if run is None else visual_tokens(run))
    held = kept[: first.shape[1]]
    measured = Measurement(
        scores=scores, text=text, prefill_s=prefill_s, decode_s=decode_s, **cost, depth=prompt.facts.get("depth"),
        position_correlation=rank_correlation(held.tolist(), range(len(held))), visual_tokens=visual,
        operations=operations,
    )  # fmt: skip
    return Traced(measured, output.logits, kept, maps)


class _Driver:
    """Forwards of one prompt on its own cache, with or without a run."""

    def __init__(self, model: PreTrainedModel, run: Run | None) -> None:
        self.model = model
        self.run = run
        self.cache: Any = None
        self.seen = 0

    def prefill(self, ids: Tensor, images: dict[str, Tensor]) -> Tensor:
        """The whole prompt (1, n), in chunks where the run says so; logits of its last row (1, 1, V)."""
        n = ids.shape[1]
        if self.run is None:
            return self.forward(ids, images)
        if images and self.run.chunk is not None:
            raise UsageError("images cannot be split over chunks; leave out --chunk")
        step = self.run.chunk or n
        with self.run.expect(ids, n):
            for start in range(0, n, step):
                logits = self.forward(ids[:, start : start + step], images)
        self.run.end_prompt()
        return logits

    def forward(self, ids: Tensor, images: Mapping[str, Tensor] = MappingProxyType({})) -> Tensor:
        """Further rows (1, q); logits of the last one (1, 1, V)."""
        self.seen += ids.shape[1]
        out = self.model(
            input_ids=ids,
            attention_mask=ids.new_ones(1, self.seen),
            cache=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **images,
        )
        self.cache = out.cache
        logits: Tensor = out.logits
        return logits

    def aside(self, work: Callable[[_Driver], Tensor]) -> Tensor:
        """What `work` returns from the same place on a copy of the cache; the original stays as it is."""
        twin = copy.copy(self)
        twin.cache = copy.deepcopy(self.cache)
        if self.run is None:
            return work(twin)
        engine = self.run.engine
        cache, ledger = engine.cache, engine.ledger
        try:
            return work(twin)
        finally:
            engine.cache, engine.ledger = cache, ledger

    def timed(self, work: Any) -> tuple[Any, float]:
        """What `work()` returns, and its seconds on the device."""
        self._settle()
        start = time.perf_counter()
        result = work()
        self._settle()
        return result, time.perf_counter() - start

    def _settle(self) -> None:
        if self.model.device.type != "cpu":
            torch.accelerator.synchronize(self.model.device)


def _reply(
    driver: _Driver, asked: Tensor, rest: Tensor, logits: Tensor, gold: Tensor, limit: int
) -> tuple[list[int], float | None, Tensor]:
    """Greedy reply to `asked` (1, n), `limit` tokens at most; seconds per token; logits (T, V) of gold (1, T).

    rest: the end of `asked` that is not in the cache yet. logits: of the last row that is.
    """
    looping = driver.run is not None and "decode.loop" in driver.run.engine.by_slot
    ahead = rest[:, :-1] if looping else rest  # a loop takes the last row itself
    if ahead.shape[1]:
        logits = driver.forward(ahead)

    def judge(twin: _Driver) -> Tensor:
        last = twin.forward(rest[:, -1:]) if looping and rest.shape[1] else logits
        return _forced(twin, last, gold)[0]

    scored = driver.aside(judge)
    if looping:
        return *_looped(driver, asked, rest, logits, limit), scored
    stops = _stops(driver.model)
    reply: list[int] = []
    seconds = []
    while True:
        token = logits[:, -1:].argmax(-1)  # (1, 1)
        if int(token) in stops:
            break
        reply.append(int(token))
        if len(reply) == limit:
            break
        logits, took = driver.timed(partial(driver.forward, token))
        seconds.append(took)
    return reply, statistics.median(seconds) if seconds else None, scored


def _looped(driver: _Driver, asked: Tensor, rest: Tensor, logits: Tensor, limit: int) -> tuple[list[int], float | None]:
    """The reply of a method that brings its own decoding loop, which `generate` enters."""
    stops = _stops(driver.model)
    whole = asked
    if not rest.shape[1]:  # the prompt's last row is in the cache already: its successor begins the loop
        whole, limit = torch.cat([asked, logits[:, -1:].argmax(-1)], 1), limit - 1
        if int(whole[0, -1]) in stops:
            return [], None
    ids, took = driver.timed(
        lambda: driver.model.generate(
            whole,
            attention_mask=torch.ones_like(whole),
            cache=driver.cache,
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=next(iter(stops), 0),
        )
    )
    reply: list[int] = ids[0, asked.shape[1] :].tolist()
    made = ids.shape[1] - whole.shape[1]
    end = next((i for i, token in enumerate(reply) if token in stops), len(reply))
    return reply[:end], took / made if made else None


def _forced(driver: _Driver, logits: Tensor, gold: Tensor) -> tuple[Tensor, float | None]:
    """Logits (T, V) that predict gold (1, T), each after the true tokens before it, and seconds per token.

    logits: (1, 1, V) of the row before gold.
    """
    rows, seconds = [logits[0]], []
    for t in range(gold.shape[1] - 1):
        out, took = driver.timed(partial(driver.forward, gold[:, t : t + 1]))
        rows.append(out[0])
        seconds.append(took)
    return torch.cat(rows), statistics.median(seconds) if seconds else None


def _stops(model: PreTrainedModel) -> set[int]:
    tokens = getattr(model.generation_config, "eos_token_id", None)
    return set() if tokens is None else {tokens} if isinstance(tokens, int) else set(tokens)


def _cost(cache: Any) -> dict[str, Any]:
    """Of the plain model, from its own cache."""
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    stored = sum(x.untyped_storage().nbytes() for x in tensors)
    live = sum(x.nbytes for x in tensors)
    slots = [layer.keys.shape[2] for layer in cache.layers]
    return {
        "tokens": cache.get_seq_length(),
        "kept_tokens": statistics.fmean(slots),
        "cache_bytes": stored,
        "live_bytes": live,
        "plain_bytes": live,
        "peak_bytes": stored,
        "attention_work": 1.0,
        "acted": False,
    }


def _reported(run: Run) -> dict[str, Any]:
    report = run.report()
    return {
        "tokens": report.tokens,
        "kept_tokens": statistics.fmean(report.kept) if report.kept else float(report.tokens),
        "cache_bytes": report.cache_bytes,
        "live_bytes": report.live_bytes,
        "plain_bytes": report.plain_bytes,
        "peak_bytes": report.peak_bytes,
        "attention_work": report.attention_work,
        "acted": report.acted,
    }


def _kept(run: Run, tokens: int) -> Tensor:
    counts, heads = torch.zeros(tokens), 0
    for layer in range(len(run.anatomy.layers)):
        for held in run.kept(layer)[0]:
            heads += 1
            counts[[position for position in held if position < tokens]] += 1
    return counts / max(heads, 1)
