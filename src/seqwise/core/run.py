"""A method at work on a model: attach, phases, prompt facts, what happened, save and reopen."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seqwise.core import hf
from seqwise.core.anatomy import Anatomy
from seqwise.core.caches import SlotLayer, Stored
from seqwise.core.engine import Engine
from seqwise.core.errors import AlreadyAttached, CacheError, PromptError, UnsupportedModel, UsageError
from seqwise.core.ledger import Ledger
from seqwise.core.packed import Packed
from seqwise.core.segments import Segments

if TYPE_CHECKING:
    from seqwise.core.method import Method

_FORMAT = "seqwise-context-1"


@dataclass(frozen=True)
class Announced:
    """A prompt whose forwards are to come. lengths: real tokens per sample, where it comes in chunks on a new cache."""

    lengths: list[int] | None
    columns: int
    ids: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class Report:
    """What a run saved and cost, from storage and from counts; plain means the same prompt without the method."""

    method: str
    acted: bool
    tokens: int  # seen by the model, of the longest sample
    kept: list[float]  # live slots per layer, mean over samples and KV heads
    cache_bytes: int  # allocated, as stored
    live_bytes: int  # without padding and spare slots
    plain_bytes: int
    peak_bytes: int  # of the cache, so far
    attention_work: float  # share of the plain model's query-key products
    stages: dict[str, float]  # rows of the prompt, and those behind each stage that cut some; means over samples
    decoded: int  # tokens since the prompt that the model has read, of the longest sample
    forwards: int  # that read them

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        def mib(x: int) -> str:
            return f"{x / 2**20:.2f} MiB"

        kept = f"{min(self.kept):.0f} to {max(self.kept):.0f}" if self.kept else "no cache"
        lines = [
            f"{self.method}{'' if self.acted else '   (never acted)'}",
            f"  tokens seen        {self.tokens}",
            f"  kept per layer     {kept}",
            f"  cache              {mib(self.cache_bytes)} allocated, {mib(self.live_bytes)} live, "
            f"{mib(self.plain_bytes)} plain",
            f"  cache peak         {mib(self.peak_bytes)}",
            f"  attention work     {self.attention_work:.1%} of the plain model's",
        ]
        if len(self.stages) > 1:
            told = ", ".join(f"{n:.0f} {stage}" for stage, n in self.stages.items())
            lines.insert(2, f"  prompt rows        {told}")
        if self.decoded:
            lines.append(f"  decoding           {self.decoded} tokens read in {self.forwards} forwards")
        return "\n".join(lines)


def refuse_attached(model: nn.Module) -> None:
    """Raises AlreadyAttached for a model that runs under a method."""
    if "_seqwise_run" in vars(model):
        method = vars(model)["_seqwise_run"].method
        raise AlreadyAttached(f"{type(model).__name__} already runs under {method}; compose with `|` instead")


class Run:
    """One method attached to one model. Made by `method.on(model)`; enter it to attach."""

    def __init__(
        self, method: Method, model: nn.Module, *, chunk: int | None, scorer: Callable[[], Tensor] | None = None
    ) -> None:
        if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
            raise ValueError(f"chunk must be a whole number of tokens >= 1, got {chunk!r}")
        self.method = method
        self.model = model
        self.chunk = chunk
        self.scorer = scorer
        self.anatomy = Anatomy.of(model)
        for part in method.parts:
            self.anatomy.require(part.needs(), str(part))
            part.check(self.anatomy)
            if not part.shares_budget and {"tower.rows", "input.rows", "layer.rows"} & set(part.slots):
                self.anatomy.check_visual_budget(getattr(part, "budget", None), type(part).__name__)
        self.state: dict[Method, Any] = {}  # hot state of methods: lives as long as the run
        self.announced: Announced | None = None
        self.tower_kept: list[list[int]] = []
        self.engine = Engine(self)
        self._undos: list[Callable[[], None]] = []
        self._new_turn = False

    # attaching

    def __enter__(self) -> Run:
        refuse_attached(self.model)
        try:
            self.engine.install()
            self._set("_seqwise_run", self)
            if hasattr(self.model, "generate"):
                self._set("generate", self._generate(self.model.generate))  # type: ignore[arg-type]
        except BaseException:
            self.detach()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Restores the model exactly; what the run knows stays readable."""
        while self._undos:
            self._undos.pop()()
        self.engine.remove()

    def _set(self, name: str, value: Any) -> None:
        own = vars(self.model)
        had, old = name in own, own.get(name)
        own[name] = value
        self._undos.append((lambda: own.__setitem__(name, old)) if had else (lambda: own.pop(name, None) and None))

    # phases

    def bind(self, segments: Segments) -> None:
        """Facts of the next prompt's tokens; a length that does not match is refused when the prompt comes."""
        self.engine.facts.bound = segments

    def begin_prompt(self) -> None:
        """The next rows are a prompt, also on a kept cache (a new turn whose tokens may be dropped again)."""
        ledger = self.engine.ledger
        if ledger is not None and ledger.columns:
            ledger.phase = "prefill"
            ledger.expected = ledger.expected_columns = ledger.whole = None
        self._new_turn = True

    def end_prompt(self) -> None:
        """The prompt is complete; rows from now on count as decode steps."""
        if self.engine.ledger is not None:
            self.engine.ledger.phase = "decode"

    @contextmanager
    def expect(
        self, ids: Tensor | None, columns: int, mask: Tensor | None = None, *, kept: bool = False
    ) -> Iterator[None]:
        """The forwards inside bring this prompt, in chunks where the run has a `chunk`. `generate` calls it itself.

        ids: (B, columns) of the whole prompt, None for embeddings. mask: (B, columns). kept: it goes on from a cache.
        """
        lengths = None
        if self.chunk is not None and not kept:
            lengths = [columns] * (1 if ids is None else ids.shape[0]) if mask is None else mask.sum(-1).tolist()
            if 0 in lengths:
                raise PromptError("a prompt of the batch is empty (all padding); give each at least one token")
        self.announced = Announced(lengths, columns, ids, mask)
        try:
            yield
        finally:
            self.announced = None

    @contextmanager
    def plain(self) -> Iterator[None]:
        """The unmodified model while attached: for search objectives and scorers. Use a cache of its own."""
        before = self.engine.plain
        self.engine.rest(True)
        try:
            yield
        finally:
            self.engine.rest(before)

    def _generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            if self.engine.plain:
                return original(inputs, *args, **kwargs)
            self._refuse(kwargs)
            if self.engine.towers is not None:
                self.engine.towers.found = {}  # of a prompt that failed
            ids = inputs if inputs is not None else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
            if ids is None or ids.shape[1] == 0:
                raise PromptError("the prompt is empty; give at least one token")
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            kept = None  # the ledger of a cache that is continued
            if cache is not None and cache.get_seq_length() > 0 and isinstance(cache.layers[0], SlotLayer):
                kept = cache.layers[0].ledger
            if kept is not None and not self._new_turn:
                kept.phase = "decode"
            worder = self.engine.by_slot.get("prompt")
            asked = ids
            if worder is not None:
                if kept is not None:
                    raise PromptError(f"{worder} rewords a whole prompt; start it on an empty cache")
                inputs = ids = self._reword(worder, ids, kwargs)
                kwargs.pop("input_ids", None)
            mask = kwargs.get("attention_mask")
            if self.chunk is not None:
                kwargs["prefill_chunk_size"] = self.chunk
            if kept is not None and self._new_turn:
                kept.expected_columns = max(ids.shape[1], 0 if mask is None else mask.shape[1])
            self._new_turn = False
            looper = self.engine.by_slot.get("decode.loop")
            if looper is not None:
                if kwargs.get("streamer") is not None:
                    raise PromptError(f"{looper} has no stream of single tokens; use no streamer")
                kwargs["custom_generate"] = self._loop(looper)
            whole = ids if ids.dim() == 2 else None
            with self.expect(whole, ids.shape[1], mask, kept=kept is not None):
                out = original(inputs, *args, **kwargs)
            if worder is None:
                return out
            self.engine.account.acted = True
            return _answered(out, asked, ids.shape[1])

        return generate

    def _reword(self, worder: Method, ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The ids (B, m) that the model reads instead of `ids` (B, n), padded on the left; sets the mask for them."""
        if kwargs.get("pixel_values") is not None:
            raise UnsupportedModel(f"{worder} rewords texts; a prompt with images cannot be")
        if ids.dim() != 2 or kwargs.get("streamer") is not None:
            raise PromptError(f"{worder} rewords token ids; give no embeddings and no streamer")
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        segments, bound = self.engine.facts.take_bound(ids.shape[0]), []
        if segments is None:
            segments = Segments.infer(ids, mask, None)
        self.engine.facts.require(segments)
        if segments.type.shape[1] != ids.shape[1]:
            raise PromptError(f"segments must cover the prompt's {ids.shape[1]} tokens, got {segments.type.shape[1]}")
        texts = []
        for b in range(ids.shape[0]):
            real = mask[b].nonzero()[:, 0]
            text, facts = worder.reword(ids[b : b + 1, real], segments.sample(b).take(real[None]))
            texts.append(text)
            bound.append(facts)
        width = max(text.shape[1] for text in texts)
        pad = getattr(self.model.config, "pad_token_id", None) or 0
        padded = [torch.nn.functional.pad(text, (width - text.shape[1], 0), value=pad) for text in texts]
        kwargs["attention_mask"] = torch.cat(
            [torch.nn.functional.pad(torch.ones_like(text), (width - text.shape[1], 0)) for text in texts]
        )
        self.engine.facts.bound = Segments.padded(bound, width)
        return torch.cat(padded)

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config")
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if kwargs.get(name) is not None or getattr(config, name, None) is not None:
                raise UnsupportedModel(
                    f"generate({name}=...) cannot crop a cache that a method has changed; leave it out"
                )
        implementation = kwargs.get("cache_implementation", getattr(config, "cache_implementation", None))
        if implementation not in (None, "dynamic"):
            raise UnsupportedModel(
                f"cache_implementation={implementation!r} is not supported; use the default dynamic cache"
            )
        if kwargs.get("use_cache") is False and any(part.facts() for part in self.method.parts):
            raise PromptError(f"{self.method} reads the prompt's facts once; generate with use_cache=True")
        if self.chunk is not None and kwargs.get("pixel_values") is not None:
            raise UnsupportedModel("chunk: images cannot be split over chunks; attach without chunk")

    def _loop(self, looper: Method) -> Callable[..., Any]:
        def custom(model: Any, input_ids: Tensor, logits_processor: Any = None, stopping_criteria: Any = None,
                   generation_config: Any = None, **kwargs: Any) -> Any:  # fmt: skip
            if getattr(generation_config, "num_beams", 1) not in (None, 1):
                raise PromptError(f"{looper} does not search beams; use num_beams=1")
            if input_ids.shape[0] != 1:
                raise PromptError(f"{looper} decodes one prompt at a time, got a batch of {input_ids.shape[0]}")
            loop = Loop(self, model, input_ids, logits_processor, stopping_criteria, generation_config, kwargs)
            ids = looper.decode(loop)
            if getattr(generation_config, "return_dict_in_generate", False):
                return hf.generated(ids, self.engine.cache)
            return ids

        return custom

    # what happened

    @property
    def acted(self) -> bool:
        """Whether the method changed anything for the last prompt."""
        return self.engine.account.acted

    @property
    def cache(self) -> Any:
        """The cache of the last forward, to be continued with `generate(..., cache=run.cache)`; None without one."""
        return self.engine.cache

    @property
    def _slots(self) -> list[SlotLayer]:
        cache = self.engine.cache
        return [layer for layer in cache.layers if isinstance(layer, SlotLayer)] if cache is not None else []

    @property
    def rows(self) -> list[list[int]]:
        """Original positions of the last forward's logits rows, per sample; -1 on padding rows."""
        ledger = self.engine.ledger
        if ledger is None or not ledger.rows:
            return []
        return ledger.rows[-1].order.expand(ledger.batch, -1).tolist()

    def kept(self, layer: int | None = None) -> list[Any]:
        """Original positions that stayed, ascending, per sample.

        layer: that layer's cache, per KV head. None: all stages at which the sample lost rows, and all caches, by name
        ("input", "layer 7", "cache 0", ...).
        """
        slots = self._slots
        if layer is not None:
            if not 0 <= layer < len(slots):
                raise UsageError(f"layer must be in [0, {len(slots) - 1}], got {layer}")
            return slots[layer].kept()
        ledger = self.engine.ledger
        if ledger is None:
            return []
        stages: dict[str, list[Any]] = dict(ledger.kept)
        for slot in slots:
            stages[f"cache {slot.index}"] = slot.kept()
        return [
            {name: kept[b] for name, kept in stages.items() if b < len(kept) and kept[b] is not None}
            for b in range(ledger.batch)
        ]

    def members(self, stage: str) -> list[dict[int, list[int]]]:
        """Per sample, of each row that went on at a stage of `kept()` the original positions merged into it; empty
        where nothing was merged."""
        ledger = self.engine.ledger
        return [] if ledger is None else ledger.members.get(stage, [{} for _ in range(ledger.batch)])

    @property
    def segments(self) -> Segments | None:
        """Facts of the last prompt's tokens, (B, N): as bound, or as the model and its images tell them."""
        return None if self.engine.ledger is None else self.engine.ledger.whole

    @property
    def peak_bytes(self) -> int:
        """The most bytes that the cache of the last prompt has taken so far."""
        return 0 if self.engine.ledger is None else self.engine.ledger.peak_bytes

    def report(self) -> Report:
        """Tokens kept, cache bytes and attention work of the last prompt and what followed it."""
        slots, ledger, account = self._slots, self.engine.ledger, self.engine.account
        columns = 0 if ledger is None else ledger.columns
        plain = 0
        for slot, window in zip(slots, self.anatomy.windows, strict=False):
            if slot.is_initialized:
                k, v = slot.keys, slot.values
                token = k.shape[-1] * k.element_size() + v.shape[-1] * v.element_size()
                plain += k.shape[0] * k.shape[1] * (columns if window is None else min(columns, window - 1)) * token
        kept = [float(slot.live_mask().sum(-1).float().mean()) for slot in slots if slot.is_initialized]
        return Report(
            method=str(self.method),
            acted=account.acted,
            tokens=columns,
            kept=kept,
            cache_bytes=sum(slot.nbytes for slot in slots),
            live_bytes=sum(slot.live_bytes() for slot in slots),
            plain_bytes=plain,
            peak_bytes=self.peak_bytes,
            attention_work=account.pairs / account.plain_pairs if account.plain_pairs else 1.0,
            stages={} if ledger is None else ledger.stages(),
            decoded=0 if ledger is None else max(columns - ledger.prompt_columns, 0),
            forwards=account.forwards,
        )

    def __str__(self) -> str:
        return str(self.report())

    # a compressed context on disk

    @property
    def context_ids(self) -> Tensor | None:
        """(B, columns) ids of the prompt that the cache holds, where it came as ids."""
        return None if self.engine.ledger is None else self.engine.ledger.ids

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the cache with its ledger and the model's fingerprint as one safetensors file; returns its path."""
        from safetensors.torch import save_file

        if not self._slots or self.engine.ledger is None:
            raise CacheError("nothing to save: run a prompt with a cache first")
        ledger = self.engine.ledger
        tensors: dict[str, Tensor] = {}
        layers = []
        for slot in self._slots:
            tensors |= {f"{slot.index}.{name}": x for name, x in _slot_tensors(slot).items()}
            layers.append({"bits": [[c.keys.bits, c.values.bits] for c in slot.chunks], "in_columns": slot.in_columns,
                           "sizes": [[c.keys.size, c.values.size] for c in slot.chunks]})  # fmt: skip
        for name in ("length", "last_position", "ids"):
            value = getattr(ledger, name)
            if value is not None:
                tensors[f"ledger.{name}"] = value
        tensors |= {f"ledger.shift.{layer}": shift for layer, shift in ledger.shift.items()}
        tensors |= {f"ledger.marks.{name}": table for name, table in ledger.facts.get("marks", {}).items()}
        facts = {
            "format": _FORMAT, "method": str(self.method), "fingerprint": self.anatomy.fingerprint, "layers": layers,
            "ledger": {n: getattr(ledger, n) for n in ("batch", "step", "columns", "entered", "padded", "kept")},
        }  # fmt: skip
        target = Path(path)
        handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".part")
        os.close(handle)
        try:
            save_file(
                {name: x.contiguous().cpu().clone() for name, x in tensors.items()},  # layers may share an order
                temporary,
                {"seqwise": json.dumps(facts)},
            )
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return target

    def load(self, path: str | os.PathLike[str]) -> Any:
        """Reopens a saved context for this model and method; returns the cache to continue with.

        >>> cache = run.load("context.safetensors")
        >>> model.generate(torch.cat([run.context_ids, question], 1), cache=cache)

        Raises CacheError on another model or method, or a file that is none of ours.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                facts = json.loads((file.metadata() or {}).get("seqwise", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise CacheError(f"cannot read a context from {path}: {error}") from None
        if not facts or facts.get("format") != _FORMAT:
            raise CacheError(f"{path} is no saved context")
        if facts["fingerprint"] != self.anatomy.fingerprint:
            raise CacheError(
                f"{path} was saved from another model ({facts['fingerprint']}, this one is {self.anatomy.fingerprint})"
            )
        if facts["method"] != str(self.method):
            raise CacheError(f"{path} was saved under {facts['method']}; open it under the same method")
        device = next(self.model.parameters()).device
        tensors = {name: x.to(device) for name, x in tensors.items()}
        ledger = Ledger(
            layers=len(self.anatomy.layers), method=facts["method"], phase="decode", fresh=False, **facts["ledger"]
        )
        ledger.length, ledger.last_position = tensors["ledger.length"], tensors.get("ledger.last_position")
        ledger.ids = tensors.get("ledger.ids")
        ledger.shift = {int(n.rsplit(".", 1)[1]): x for n, x in tensors.items() if n.startswith("ledger.shift.")}
        marks = {n.removeprefix("ledger.marks."): x for n, x in tensors.items() if n.startswith("ledger.marks.")}
        if marks:
            ledger.facts["marks"] = marks
        layers = []
        for index, spec in enumerate(facts["layers"]):
            layer = SlotLayer(ledger, index)
            _fill_slot(
                layer, spec, {n.split(".", 1)[1]: x for n, x in tensors.items() if n.split(".", 1)[0] == str(index)}
            )
            layers.append(layer)
        self.engine.ledger = ledger
        self.engine.cache = hf.new_cache(layers)
        return self.engine.cache


def _slot_tensors(slot: SlotLayer) -> dict[str, Tensor]:
    assert slot.order is not None
    tensors = {"keys": slot.keys[:, :, : slot.tail], "values": slot.values[:, :, : slot.tail], "order": slot.order}
    if slot.live is not None:
        tensors["live"] = slot.live
    tensors |= {f"state.{name}": x for name, x in slot.state.items()}
    for i, chunk in enumerate(slot.chunks):
        for side, packed in (("k", chunk.keys), ("v", chunk.values)):
            for name in ("codes", "minimum", "step", "scale"):
                x = getattr(packed, name)
                if x is not None:
                    tensors[f"chunk.{i}.{side}.{name}"] = x
    return tensors


def _fill_slot(slot: SlotLayer, spec: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    slot.lazy_initialization(tensors["keys"], tensors["values"])
    slot.keys, slot.values, slot.tail = tensors["keys"], tensors["values"], tensors["keys"].shape[2]
    slot.columns = slot.ledger.columns
    slot.order, slot.live, slot.in_columns = tensors["order"], tensors.get("live"), spec["in_columns"]
    slot.state = {name.removeprefix("state."): x for name, x in tensors.items() if name.startswith("state.")}
    for i, (bits, sizes) in enumerate(zip(spec["bits"], spec["sizes"], strict=True)):
        packed = [
            Packed(bits=bits[s], size=sizes[s], codes=tensors[f"chunk.{i}.{side}.codes"],
                   minimum=tensors[f"chunk.{i}.{side}.minimum"], step=tensors[f"chunk.{i}.{side}.step"],
                   scale=tensors.get(f"chunk.{i}.{side}.scale"))
            for s, side in enumerate("kv")
        ]  # fmt: skip
        slot.chunks.append(Stored(*packed))
    slot.ledger.weigh(slot.index, slot.nbytes)


def _answered(out: Any, asked: Tensor, reworded: int) -> Any:
    """What `generate` returned for a reworded prompt, as if it had read the caller's ids (B, n)."""
    ids = out if isinstance(out, Tensor) else out.sequences
    begin = asked.repeat_interleave(ids.shape[0] // asked.shape[0], dim=0)
    text = torch.cat([begin, ids[:, reworded:]], 1)
    if isinstance(out, Tensor):
        return text
    out.sequences = text
    return out


class Loop:
    """What a decode loop works with: the prompt, and forwards that verify drafts on the run's cache."""

    def __init__(self, run: Run, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
                 generation_config: Any, kwargs: dict[str, Any]) -> None:  # fmt: skip
        self.run = run
        self.model = model
        self.input_ids = input_ids  # (1, n)
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.config = generation_config
        self._kwargs = kwargs
        self._cache = kwargs.get("cache", kwargs.get("past_key_values"))
        self.forwards = 0

    def stop(self, ids: Tensor, new: Tensor) -> tuple[int, bool]:
        """How many of the new tokens (m,) behind ids (1, n) are taken before the caller's criteria stop the text (the
        stopping token included), and whether they do."""
        text = torch.cat([ids, new[None]], 1)
        for taken in range(1, new.shape[0] + 1):
            if bool(self.stopping_criteria(text[:, : ids.shape[1] + taken], None).all()):
                return taken, True
        return new.shape[0], False

    def prefill(self) -> None:
        """Runs the prompt but its last token into the cache, vision inputs included; ends the prompt phase."""
        seen = self._cache.get_seq_length() if self._cache is not None else 0
        ids = self.input_ids[:, seen:-1]
        if ids.shape[1]:
            mask = self._kwargs.get("attention_mask")
            names = ("mm_encoder_outputs", "pixel_values", "image_sizes", "image_grid_thw")
            extra = {name: self._kwargs[name] for name in names if self._kwargs.get(name) is not None}
            positions = None if mask is None else (mask[:, : self.input_ids.shape[1]].cumsum(-1) - 1).clamp(min=0)
            step = self.run.chunk or ids.shape[1]
            for start in range(0, ids.shape[1], step):
                stop = min(start + step, ids.shape[1])
                self.model(
                    input_ids=ids[:, start:stop], attention_mask=None if mask is None else mask[:, : seen + stop],
                    position_ids=None if positions is None else positions[:, seen + start : seen + stop],
                    cache=self._cache, use_cache=True, logits_to_keep=1, **extra,
                )  # fmt: skip
                self.forwards += 1
        self.run.end_prompt()

    def verify(self, ids: Tensor, depth: Tensor, sees: Tensor) -> Tensor:
        """One forward over a draft tree: ids (1, N), depth (N,) of each node, sees (N, N) bool -> logits (1, N, V)."""
        engine = self.run.engine
        engine.tree, engine.depth, engine.deferred = sees, depth, {}
        try:
            ledger = engine.ledger if self._cache is not None and self._cache.get_seq_length() else None
            start = (
                ledger.length
                if ledger is not None and ledger.columns and ledger.length is not None
                else torch.zeros(1, dtype=torch.long, device=ids.device)
            )
            logits: Tensor = self.model(
                input_ids=ids, position_ids=start[:, None] + depth[None], cache=self._cache, use_cache=True
            ).logits
        finally:
            engine.tree = engine.depth = None
        self.forwards += 1
        return logits

    def accept(self, path: Tensor, count: int) -> None:
        """Keeps the nodes path (r,) of the last draft of `count`, in the cache and in the methods' eyes."""
        self.run.engine.attending.settle_tree(path, count)
