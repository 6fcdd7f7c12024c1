"""The method contract: nine items that every method keeps, or refuses with a reason.

    1 identity      settings that change nothing give the plain model's logits
    2 restore       leaving the context restores the model exactly, also after an exception; entering twice is refused
    3 padding       a left-padded batch gives what each prompt gives alone
    4 less work     slots that drop, compress or skip really shrink rows, bytes, keys or forwards
    5 settings      bf16, several images, text only, sampling, turns, chunks, beams: work, or are refused with a reason
    6 errors        bad hyperparameters and models without a needed part are refused in words that help
    7 composition   methods of different slots compose; two for one slot are refused
    8 determinism   the same input gives the same tokens; kept positions ascend
    9 report        the run tells what was kept and saved, and tells the truth

Each item is a function of (method, family) that raises AssertionError. `check` runs those that apply to the method's
slots. A refusal is a `SeqwiseError` with a message; it is no pass.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from seqwise.core.anatomy import Anatomy
from seqwise.core.config import known_classes
from seqwise.core.errors import AlreadyAttached, SeqwiseError, SlotConflict, UnsupportedModel
from seqwise.core.method import Method
from seqwise.core.run import Run
from seqwise.testing.families import FAMILIES, Batch, Family, marked

__all__ = ["EXAMPLES", "ITEMS", "cell", "check", "examples", "home", "record"]

STEPS = 8  # tokens generated after a prompt

# Settings that act on a prompt of 17 to 96 tokens and a model of 4 layers, for methods whose defaults would not.
# A method that is not listed is tried with its defaults and budgets of 0.5.
EXAMPLES: dict[str, str] = {
    "Full": "Full()",
    "ElementOrdering": "ElementOrdering(by='raster')",
    "A2SF": "A2SF(budget=0.4, recent=2)",
    "H2O": "H2O(budget=12, recent=3)",
    "TOVA": "TOVA(budget=9)",
    "SnapKV": "SnapKV(budget=12, recent=4, window=5, pool=3)",
    "Recent": "Recent(budget=10, sinks=2)",
    "Random": "Random(budget=0.4, recent=2)",
    "LazyEviction": "LazyEviction(budget=12, window=3)",
    "HiPAttention": "HiPAttention(budget=6, block_q=8, window=2, sinks=1, stride=4, refresh=3, dense=1)",
    "TidalDecode": "TidalDecode(budget=6, start=1, correction=2)",
    "TokenSelect": "TokenSelect(budget=6, sinks=1, local=4, block=4)",
    "VFlowOpt": "VFlowOpt(budget=(0.5, 0.7, 0.6), prune_at=(1, 3), t=1.5, m=2.0, alpha=0.5)",
    "QuoTA": "QuoTA(budget=0.5, cap=True)",
    "FastV": "FastV(budget=0.4, layer=2)",
    "VisionDrop": "VisionDrop(budget=(10, 7, 5, 3), contextual=(3, 2, 2, 1), prune_after=(1, 2, 3))",
    "VTCCLS": "VTCCLS(budget=0.4, start=2)",
    "HiPrune": "HiPrune(budget=0.5, layer=2, alpha=1.0, beta=0.1)",
    "ToDRE": "ToDRE(budget=0.5, check_layer=1, tau=0.9)",
    "CATP": "CATP(budget=0.4, layer=2)",
    "TransPrune": "TransPrune(budget=(0.6, 0.3), prune_after=(2, 3), layers=(1, 3))",
}

_ROWS = {"tower.rows", "input.rows", "layer.rows"}
_BYTES = {"cache.retain", "cache.store"}
_SHRINKING = _ROWS | _BYTES | {"cache.read", "decode.loop"}


def examples() -> dict[str, Method]:
    """Every concrete method of the package, by name, with a setting that acts on the suite's prompts.

    Raises AssertionError for a method that has no usable example.
    """
    import seqwise.methods as methods

    for module in pkgutil.walk_packages(methods.__path__, f"{methods.__name__}."):
        importlib.import_module(module.name)
    found = {}
    for name, cls in sorted(known_classes(Method).items()):
        if cls.__module__.startswith(f"{methods.__name__}."):
            try:
                found[name] = Method.parse(EXAMPLES[name]) if name in EXAMPLES else cls(**_small(cls))
            except (ValueError, TypeError) as error:
                raise AssertionError(f"{name} needs an entry in seqwise.testing.contract.EXAMPLES: {error}") from error
    return found


def _small(cls: type[Method]) -> dict[str, Any]:
    return {spec.name: 0.5 for spec in dataclasses.fields(cls) if spec.metadata.get("budget")}


def home(method: Method) -> Family:
    """The family on which a method must pass in full: LLaVA for what acts on visual rows, else Llama."""
    visual = _ROWS & _slots(method) or any("vision tower" in part.needs() for part in method.parts)
    places = any(type(part).place is not Method.place and not part.facts() for part in method.parts)
    return FAMILIES["llava" if visual or places else "llama"]


def check(method: Method, family: Family | None = None, items: tuple[int, ...] | None = None) -> list[str]:
    """Runs the items that apply and returns their names, e.g. "1 identity".

    family: default the method's home. items: their numbers, default all. Raises AssertionError at the first that fails,
    UnsupportedModel where the family lacks a part that the method needs.
    """
    family = home(method) if family is None else family
    passed = []
    for number, (name, item) in ITEMS.items():
        if (items is None or number in items) and item(method, family) is not SKIPPED:
            passed.append(f"{number} {name}")
    return passed


# what the items have in common

SKIPPED = "does not apply"


@dataclass
class Seen:
    """What a generation showed."""

    ids: Tensor  # (B, n)
    scores: list[Tensor]  # per step (B, V); empty where a decoding loop returns ids alone
    run: Run | None = None
    kept: list[dict[str, Any]] = field(default_factory=list)


def generate(model: Any, batch: Batch, run: Run | None = None, steps: int = STEPS, **options: Any) -> Seen:
    """A greedy generation, under `run` where given."""
    options = {"do_sample": False, "max_new_tokens": steps, **options}
    out = model.generate(**batch, output_scores=True, return_dict_in_generate=True, **options)
    ids, scores = (out, []) if isinstance(out, Tensor) else (out.sequences, list(out.scores or ()))
    return Seen(ids, scores, run, [] if run is None else run.kept())


@contextmanager
def attached(method: Method, model: Any, batch: Batch, *, chunk: int | None = None) -> Iterator[Run]:
    """The method on the model, with the facts of the prompt that it asks for, and a scorer of its images."""
    with method.on(model, chunk=chunk, scorer=lambda: _relevance(batch)) as run:
        if any(part.facts() for part in method.parts):
            run.bind(marked(batch))
        yield run


def _relevance(batch: Batch) -> Tensor:
    """A number per image that depends on the image alone: (images,)."""
    pixels = batch["pixel_values"].float()
    if pixels.dim() == 5:  # samples by images, filled up with zeros
        pixels = pixels.flatten(0, 1)
        pixels = pixels[pixels.flatten(1).abs().sum(1) > 0]
    return pixels.flatten(1).mean(1).sigmoid()


def under(method: Method, model: Any, batch: Batch, *, chunk: int | None = None, **options: Any) -> Seen:
    """A generation under a method, in a context of its own."""
    with attached(method, model, batch, chunk=chunk) as run:
        return generate(model, batch, run, **options)


def agree(mine: Seen, other: Seen, family: Family, says: str, rows: tuple[int, int] | None = None) -> None:
    """The same tokens and, where both give them, the same scores; `rows`: this row of mine, that one of the other."""
    a, b = rows or (slice(None), slice(None))
    same = mine.ids[a, -STEPS:].equal(other.ids[b, -STEPS:]) if rows else mine.ids.equal(other.ids)
    assert same, f"{says}: other tokens were generated"
    for step, (x, y) in enumerate(zip(mine.scores, other.scores)):  # noqa: B905  (a loop has none)
        where = f"{says}, step {step}: "
        torch.testing.assert_close(x[a], y[b], **family.tolerance, msg=where.__add__)


def photograph(model: nn.Module) -> dict[str, Any]:
    """All that attaching could change: attributes, hooks, parameters and configs of every module."""
    facts: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            held = tuple(value.items()) if isinstance(value, dict) else value
            facts[f"{name}.{key}"] = held
            if key == "config":
                facts[f"{name}.{key} (its values)"] = str(value.to_dict()), value._attn_implementation
    return facts


def assert_restored(before: dict[str, Any], model: nn.Module, says: str) -> None:
    """Fails and names what is left on the model, what is gone, or what has changed."""
    after = photograph(model)
    changed = sorted(before.keys() ^ after.keys()) + [
        name for name in before.keys() & after.keys() if not _same(before[name], after[name])
    ]
    assert not changed, f"{says}: the model is not restored: {', '.join(changed[:5])}"


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return not isinstance(a, nn.Module) and bool(a == b)


@contextmanager
def widths(modules: tuple[nn.Module, ...]) -> Iterator[list[list[int]]]:
    """Rows that entered each module, per call: [module][call]."""
    seen: list[list[int]] = [[] for _ in modules]

    def watch(rows: list[int]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            rows.append((args[0] if args else kwargs["hidden_states"]).shape[1])

        return hook

    undo = [
        module.register_forward_pre_hook(watch(rows), with_kwargs=True)
        for module, rows in zip(modules, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in undo:
            handle.remove()


def stored_bytes(cache: Any) -> int:
    """Bytes behind all keys and values, packed or not, that a cache's layers hold, whatever they say of themselves."""
    storages: dict[int, int] = {}

    def visit(value: Any, depth: int = 0) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item, depth + 1)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            for spec in dataclasses.fields(value):
                visit(getattr(value, spec.name), depth + 1)

    for layer in cache.layers:
        for name in ("keys", "values", "chunks"):
            visit(getattr(layer, name, None))
    return sum(storages.values())


def _slots(method: Method) -> set[str]:
    return {slot for part in method.parts for slot in part.slots}


def _inert(method: Method) -> bool:
    """Whether the method is one that changes nothing by design (the full cache)."""
    return method.identity() == method and "decode.loop" not in _slots(method)


def _batchable(method: Method) -> bool:
    return "decode.loop" not in _slots(method)


def _unsupported(method: Method, family: Family) -> bool:
    try:
        under(method, family.tiny(), family.prompt(17))
    except UnsupportedModel:
        return True
    return False


def _prompts(family: Family) -> list[Batch]:
    if not family.vision:
        return [family.prompt(17, seed=1), family.prompt(40, seed=2)]
    return [family.prompt(17, seed=1), family.prompt(24, seed=2, images=2)]


def _reason(method: Method) -> str:
    """Why a method has no identity: a comment of its class about it, or what its own `identity` says."""
    own, cls = type(method).identity, type(method)
    if own is not Method.identity and own.__doc__:
        return own.__doc__
    comments = [line.partition("#")[2].strip() for line in inspect.getsource(cls).splitlines() if "#" in line]
    return next((comment for comment in comments if "identity" in comment), "")


# the items


def item_1_identity(method: Method, family: Family) -> str | None:
    """Under `identity()` logits equal the plain model's: whole prompts and steps, padded batches included."""
    model, plain = family.tiny(), method.identity()
    if plain is None:
        reasons = [_reason(part) for part in method.parts if part.identity() is None]
        assert all(reasons), f"{method}: identity() is None and does not say why (a comment that names identity)"
        return SKIPPED
    prompts = _prompts(family)
    batches = [*prompts, family.pad_left(prompts)] if _batchable(method) else [*prompts, family.pad_left(prompts[:1])]
    for batch in batches:
        agree(under(plain, model, batch), generate(model, batch), family, f"{plain}: identity changes the model")
        with torch.no_grad():
            expected = model(**batch).logits
            with attached(plain, model, batch):
                logits = model(**batch).logits
        real = batch["attention_mask"].bool()
        assert logits.shape == expected.shape, f"{plain}: identity changes the shape of the logits"
        torch.testing.assert_close(
            logits[real], expected[real], **family.tolerance, msg=f"{plain}: identity changes the logits: ".__add__
        )
    return None


class _Interruption(Exception):
    pass


def item_2_restore(method: Method, family: Family) -> str | None:
    """Nothing is left on the model: after a generation, an exception in the block or in a layer, or a second entry."""
    model, batch = family.tiny(), family.prompt(17, seed=1)
    expected = generate(model, batch)  # transformers itself leaves hooks on a tower, once
    before = photograph(model)
    under(method, model, batch)
    assert_restored(before, model, f"{method}, after a generation")
    try:
        with method.on(model):
            raise _Interruption
    except _Interruption:
        pass
    assert_restored(before, model, f"{method}, after an exception inside the context")

    def interrupt(*args: Any) -> None:
        raise _Interruption

    last = Anatomy.of(model).layers[-1]
    handle = last.register_forward_hook(interrupt)
    try:
        under(method, model, batch)
    except _Interruption:
        pass
    finally:
        handle.remove()
    assert_restored(before, model, f"{method}, after an exception in a layer")

    with method.on(model) as run:
        inside = photograph(model)
        for again in (run, method.on(model)):
            try:
                again.__enter__()
            except AlreadyAttached as error:
                assert str(error), f"{method}: entering twice is refused without a message"
            else:
                raise AssertionError(f"{method}: entering twice is not refused")
            assert_restored(inside, model, f"{method}, after a refused second entry")
    assert_restored(before, model, f"{method}, after a refused second entry")

    run = method.attach(model)
    run.detach()
    run.detach()
    assert_restored(before, model, f"{method}, after attach and detach")
    after = generate(model, batch)
    assert torch.equal(after.ids, expected.ids), f"{method}: the restored model generates other tokens"
    assert all(map(torch.equal, after.scores, expected.scores)), f"{method}: the restored model's logits differ"
    return None


def item_3_padding(method: Method, family: Family) -> str | None:
    """Each row of a left-padded batch keeps and generates what its prompt does alone, whatever its neighbours."""
    model, prompts = family.tiny(), _prompts(family)
    alone = [under(method, model, prompt) for prompt in prompts]
    batches = [[0, 1], [1, 0]] if _batchable(method) else []
    for order in batches:
        together = under(method, model, family.pad_left([prompts[i] for i in order]))
        for row, i in enumerate(order):
            says = f"{method}: row {row} of a padded batch"
            assert together.kept[row] == alone[i].kept[0], (
                f"{says} keeps other tokens than alone: {_difference(together.kept[row], alone[i].kept[0])}"
            )
            agree(together, alone[i], family, says, rows=(row, 0))
    columns = ("input_ids", "attention_mask", "mm_token_type_ids")
    padded = {name: nn.functional.pad(x, (5, 0)) if name in columns else x for name, x in prompts[0].items()}
    single = under(method, model, padded)
    assert single.kept == alone[0].kept, (
        f"{method}: a padded prompt keeps other tokens than alone: {_difference(single.kept[0], alone[0].kept[0])}"
    )
    agree(single, alone[0], family, f"{method}: a padded prompt", rows=(0, 0))
    return None


def _difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    return next((f"{name}: {a.get(name)} and {b.get(name)}" for name in {**a, **b} if a.get(name) != b.get(name)), "")


def item_4_less_work(method: Method, family: Family) -> str | None:
    """What a slot promises to shrink is smaller than in the plain model: counted in modules and in storage."""
    model, batch = family.tiny(), _prompts(family)[-1]
    anatomy = Anatomy.of(model)
    slots = _slots(method) & _SHRINKING
    if None not in anatomy.windows:  # the plain cache holds a short window only: less than most budgets
        slots -= _BYTES
    if not slots or _inert(method):
        return SKIPPED
    tower = anatomy.vision.layers[: anatomy.vision.feature_layer + 2] if anatomy.vision is not None else ()

    def measured(plain: bool) -> tuple[list[list[int]], list[list[int]], int, Seen]:
        with widths(anatomy.layers) as rows, widths(tower) as patches:
            if plain:
                out = model.generate(**batch, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True)
                cache = out.cache
                return rows, patches, stored_bytes(cache), Seen(out.sequences, [])
            with attached(method, model, batch) as run:
                seen = generate(model, batch, run)
                return rows, patches, stored_bytes(run.cache), seen

    plain_rows, plain_patches, plain_bytes, _ = measured(True)
    rows, patches, stored, seen = measured(False)
    assert seen.run is not None
    report = seen.run.report()
    if "tower.rows" in slots:
        assert patches[-1] < plain_patches[-1], f"{method}: the tower's last layer still sees all patches"
    if slots & {"tower.rows", "input.rows"}:
        assert rows[0][0] < plain_rows[0][0], f"{method}: the language model's first layer still sees every row"
    if any("layer.rows" in part.slots and part.stages(anatomy) for part in method.parts):
        assert rows[-1][0] < rows[0][0], f"{method}: the last decoder layer sees as many rows as the first"
    if slots & (_ROWS | _BYTES):
        assert stored < plain_bytes, f"{method}: the cache takes {stored} bytes, the plain one {plain_bytes}"
        assert report.cache_bytes < report.plain_bytes, f"{method}: the report shows no bytes saved"
    if slots & (_ROWS | {"cache.retain", "cache.read"}):
        assert report.attention_work < 1, (
            f"{method}: no attention work is saved ({report.attention_work:.3f} of the plain model's)"
        )
    if "decode.loop" in slots:
        steps = 3 * STEPS
        with method.on(model) as run:
            generate(model, batch, run, steps=steps)  # what a loop learns from one answer may serve the next
            with widths(anatomy.layers[:1]) as calls:
                generate(model, batch, run, steps=steps)
        assert len(calls[0]) < steps, f"{method}: {len(calls[0])} forwards for {steps} tokens"
    return None


def item_5_settings(method: Method, family: Family) -> str | None:
    """Every way to generate works, or is refused with a reason (see `refusals`); bf16 and sampling always work."""
    refused = refusals(method, family)
    for name in ("bf16", "sampling"):
        assert name not in refused, f"{method} refuses {name}: {refused[name]}"
    return None


def refusals(method: Method, family: Family) -> dict[str, str]:
    """The ways to generate that are refused, and why; raises AssertionError where one fails otherwise."""
    refused = {}
    for name, scenario in SCENARIOS.items():
        if family.vision or name not in ("several images", "text-only prompt"):
            try:
                scenario(method, family)
            except SeqwiseError as error:
                assert str(error), f"{method}: {name} is refused without a reason"
                refused[name] = str(error)
    return refused


def _finite(seen: Seen, batch: Batch, says: str) -> None:
    assert all(score.isfinite().any(-1).all() and not score.isnan().any() for score in seen.scores), (
        f"{says}: NaN logits"
    )
    prompt = batch["input_ids"]
    repeated = prompt.repeat_interleave(len(seen.ids) // len(prompt), 0)
    assert torch.equal(seen.ids[:, : prompt.shape[1]], repeated), (
        f"{says}: the ids do not begin with the caller's prompt"
    )
    assert seen.ids.shape[1] > prompt.shape[1], f"{says}: nothing was generated"


def _copies_agree(many: Seen, one: Seen, says: str) -> None:
    """Several sequences of one prompt share what was dropped from the prompt."""
    times = len(many.kept) // len(one.kept)
    for i, stages in enumerate(many.kept):
        for stage, kept in one.kept[i // times].items():
            if not stage.startswith("cache"):
                assert stages.get(stage) == kept, (
                    f"{says}: sequence {i} keeps {stages.get(stage)} at {stage}, not {kept}"
                )


def _bf16(method: Method, family: Family) -> None:
    model, batch = family.tiny().to(torch.bfloat16), _prompts(family)[-1]
    batch = {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in batch.items()}
    _finite(under(method, model, batch), batch, f"{method}, bf16")


def _several_images(method: Method, family: Family) -> None:
    batch = family.prompt(20, seed=4, images=3)
    _finite(under(method, family.tiny(), batch), batch, f"{method}, several images")


def _text_only(method: Method, family: Family) -> None:
    model, batch = family.tiny(), family.prompt(30, seed=5, images=0)
    seen = under(method, model, batch)
    _finite(seen, batch, f"{method}, text-only prompt")
    if _slots(method) <= _ROWS:
        agree(seen, generate(model, batch), family, f"{method}: a text-only prompt has no visual rows to drop")


def _sampling(method: Method, family: Family) -> None:
    model, batch = family.tiny(), family.prompt(30, seed=6)
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.5}
    if _batchable(method):
        options["num_return_sequences"] = 2
    draws = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            draws.append(under(method, model, batch, **options))
    _finite(draws[0], batch, f"{method}, sampling")
    _copies_agree(draws[0], under(method, model, batch), f"{method}, sampling")
    assert torch.equal(draws[0].ids, draws[1].ids), f"{method}: sampling with one seed gives two results"


def _second_turn(method: Method, family: Family) -> None:
    model, batch = family.tiny(), family.prompt(30, seed=8)
    question = family.prompt(6, seed=9, images=0)["input_ids"]

    def turns(run: Run | None) -> Seen:
        out = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        ids = out if isinstance(out, Tensor) else out.sequences
        cache = out.cache if run is None else run.cache
        whole = torch.cat([ids, question], 1)
        second: Batch = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        if "mm_token_type_ids" in batch:
            types = batch["mm_token_type_ids"]
            second["mm_token_type_ids"] = nn.functional.pad(types, (0, whole.shape[1] - types.shape[1]))
        seen = generate(model, second, run, cache=cache)
        _finite(seen, second, f"{method}, second turn")
        return seen

    with attached(method, model, batch) as run:
        turns(run)
    if (plain := method.identity()) is not None:
        with attached(plain, model, batch) as run:
            mine = turns(run)
        agree(mine, turns(None), family, f"{plain}: identity changes a second turn")


def _chunked(method: Method, family: Family) -> None:
    model, batch = family.tiny(), _prompts(family)[-1]
    _finite(under(method, model, batch, chunk=7), batch, f"{method}, chunked prefill")
    if (plain := method.identity()) is not None:
        agree(
            under(plain, model, batch, chunk=7),
            generate(model, batch),
            family,
            f"{plain}: identity changes a chunked prefill",
        )


def _beams(method: Method, family: Family) -> None:
    model = family.tiny()
    batch = family.pad_left(_prompts(family)) if _batchable(method) else _prompts(family)[-1]
    seen = under(method, model, batch, num_beams=3)
    _copies_agree(seen, under(method, model, batch), f"{method}, beams")
    assert seen.ids.shape[1] > batch["input_ids"].shape[1], f"{method}, beams: nothing was generated"
    if (plain := method.identity()) is not None:
        mine = under(plain, model, batch, num_beams=3)
        assert torch.equal(mine.ids, generate(model, batch, num_beams=3).ids), (
            f"{plain}: identity changes a beam search"
        )


SCENARIOS: dict[str, Callable[[Method, Family], None]] = {
    "bf16": _bf16,
    "several images": _several_images,
    "text-only prompt": _text_only,
    "sampling": _sampling,
    "second turn": _second_turn,
    "chunked prefill": _chunked,
    "beams": _beams,
}


def item_6_errors(method: Method, family: Family) -> str | None:
    """Bad values raise ValueError that names field, range and value; missing parts raise UnsupportedModel."""
    for part in method.parts:
        for name, bad, says in _bad_values(part):
            where = f"{type(part).__name__}.{name}={bad!r}"
            try:
                dataclasses.replace(part, **{name: bad})
            except ValueError as error:
                item = bad[0] if isinstance(bad, tuple) else bad
                allowed, _, got = str(error).rpartition("got ")
                assert f"{type(part).__name__}.{name}" in allowed, (
                    f"{where}: the message does not name the field: {error}"
                )
                assert repr(item) in got, f"{where}: the message does not say 'got {item!r}': {error}"
                assert all(word in allowed for word in says), f"{where}: the message does not say the range: {error}"
            except Exception as error:
                raise AssertionError(f"{where} raises {type(error).__name__}, not ValueError: {error}") from error
            else:
                raise AssertionError(f"{where} is accepted")
        for need in sorted(part.needs()):
            for other in FAMILIES.values():
                model = other.tiny()
                if need not in Anatomy.of(model).parts:
                    before = photograph(model)
                    try:
                        with part.on(model):
                            pass
                    except UnsupportedModel as error:
                        assert str(part) in str(error) or type(part).__name__ in str(error), (
                            f"{part}: who refuses {other}? {error}"
                        )
                    else:
                        raise AssertionError(f"{part} needs {need!r}, but runs on {other}")
                    assert_restored(before, model, f"{part}, refused on {other}")
                    break
    return None


def _bad_values(method: Method) -> Iterator[tuple[str, Any, list[str]]]:
    """(field, bad value, words of the message) for each range that a field declares, and for its type."""
    hints = get_type_hints(type(method))
    for spec in dataclasses.fields(method):
        if spec.metadata.get("budget"):
            for value in (0, -3, 0.0, 1.5, float("nan"), True, "half", (0,)):
                yield spec.name, value, ["(0.0, 1.0]"]
            continue
        expected = hints[spec.name]
        number: type[int] | type[float] = float if _takes(expected, 0.5) or _takes(expected, (0.5,)) else int
        for kind, bound in (spec.metadata.get("bounds") or {}).items():
            if bound is not None:
                x = number(bound + {"gt": 0, "ge": -1, "lt": 0, "le": 1}[kind])
                yield spec.name, next(v for v in (x, (x,), (x, x)) if _takes(expected, v)), [str(bound)]
        for other in (object, "no such value", -0.5, True, None):
            if not _takes(expected, other):
                yield spec.name, other, []


def _takes(expected: Any, value: Any) -> bool:
    """Whether a field's type admits a value."""
    from seqwise.core.config import _matches

    return _matches(value, expected)


def item_7_composition(method: Method, family: Family) -> str | None:
    """With every registered method of other slots: same text both ways, runs, restores. One slot twice is refused."""
    assert Method.parse(str(method)) == method, f"{method}: parse(str()) gives {Method.parse(str(method))}"
    for other in examples().values():
        clash = _slots(method) & _slots(other)
        if clash:
            try:
                method | other
            except SlotConflict as error:
                assert any(slot in str(error) for slot in clash), (
                    f"{method} | {other}: the refusal names no slot: {error}"
                )
            else:
                raise AssertionError(f"{method} | {other} both claim {', '.join(clash)} and compose all the same")
            continue
        both = method | other
        assert both == other | method and str(both) == str(other | method), f"{both}: the order of writing matters"
        assert Method.parse(str(both)) == both, f"{both}: parse(str()) gives {Method.parse(str(both))}"
        where = family if family.vision else max(family, home(both), key=lambda f: f.vision)
        model, batch = where.tiny(), _prompts(where)[-1]
        generate(model, batch, steps=1)  # transformers itself leaves hooks on a tower, once
        before = photograph(model)
        try:
            seen = under(both, model, batch)
        except SlotConflict as error:
            named = all(type(part).__name__ in str(error) for one in (method, other) for part in one.parts)
            assert named, f"{both}: the refusal does not name both: {error}"
            continue
        except UnsupportedModel as error:
            assert _unsupported(method, where) or _unsupported(other, where), (
                f"{both}: refused though each runs alone: {error}"
            )
            continue
        finally:
            assert_restored(before, model, str(both))
        _finite(seen, batch, str(both))
        assert seen.run is not None and (seen.run.acted or (_inert(method) and _inert(other))), f"{both} never acted"
    return None


def item_8_determinism(method: Method, family: Family) -> str | None:
    """Run twice, whatever torch's global generator: the same tokens, bit by bit; kept positions ascend."""
    model = family.tiny()
    repeated = family.prompt(24, seed=3)
    repeated["input_ids"] = torch.where(repeated["input_ids"] <= 96, 5, repeated["input_ids"])  # ties everywhere
    for batch in (_prompts(family)[-1], repeated):
        runs = []
        for seed in (1, 2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                state = torch.get_rng_state()
                runs.append(under(method, model, batch))
                assert torch.equal(state, torch.get_rng_state()), f"{method} draws from torch's global generator"
        first, second = runs
        assert first.kept == second.kept, (
            f"{method} keeps other tokens the second time: {_difference(first.kept[0], second.kept[0])}"
        )
        assert torch.equal(first.ids, second.ids), f"{method} generates other tokens the second time"
        assert all(map(torch.equal, first.scores, second.scores)), f"{method}: logits differ the second time"
        for stage, kept in first.kept[0].items():
            for positions in kept if kept and isinstance(kept[0], list) else [kept]:
                ascends = positions == sorted(set(positions))
                assert ascends, f"{method}: {stage} does not ascend: {positions}"
    return None


def item_9_report(method: Method, family: Family) -> str | None:
    """The run names kept positions per stage, bytes as stored, and work; rows of the logits map back to the prompt."""
    model = family.tiny()
    prompts = _prompts(family) if _batchable(method) else _prompts(family)[-1:]
    batch = family.pad_left(prompts)
    with attached(method, model, batch) as run:
        seen = generate(model, batch, run)
        report, held = run.report(), stored_bytes(run.cache)
        if not _inert(method):
            assert run.acted, f"{method} never acted on {family}: it needs an example that does (EXAMPLES)"
    assert run.kept() == seen.kept, f"{method}: what was kept is not readable after the context"
    assert len(seen.kept) == len(prompts), f"{method}: kept() has {len(seen.kept)} samples of {len(prompts)}"
    for b, stages in enumerate(seen.kept):
        total = prompts[b]["input_ids"].shape[1] + STEPS
        if "prompt" in _slots(method):  # positions are those of the prompt that the model read
            total = max(position for heads in stages["cache 0"] for position in heads) + 1
        for stage, kept in stages.items():
            for positions in kept if kept and isinstance(kept[0], list) else [kept]:
                assert positions and min(positions) >= 0 and max(positions) < total, (
                    f"{method}: {stage} of sample {b} is {positions}, outside of its own {total} tokens"
                )
    assert report.method == str(method) and str(method) in str(run), f"{method}: the report names {report.method}"
    assert ("never acted" in str(run)) == (not run.acted), f"{method}: the report does not tell whether it acted"
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.cache_bytes == held, f"{method}: the report says {report.cache_bytes} bytes, the storage has {held}"
    assert 0 < report.live_bytes <= report.cache_bytes <= report.peak_bytes, f"{method}: {report}"
    assert len(report.kept) == len(Anatomy.of(model).layers) and min(report.kept) > 0, (
        f"{method}: kept per layer: {report.kept}"
    )
    assert report.attention_work > 0, f"{method}: attention work is {report.attention_work}"
    with torch.no_grad(), attached(method, model, batch) as run:
        logits = model(**batch).logits
        rows = run.rows
    assert [len(row) for row in rows] == [logits.shape[1]] * len(prompts), f"{method}: run.rows does not map the logits"
    for prompt, row in zip(prompts, rows, strict=True):
        real = [position for position in row if position >= 0]
        assert real == sorted(set(real)) and real[-1] == prompt["input_ids"].shape[1] - 1, (
            f"{method}: run.rows is {row}"
        )
    return None


ITEMS: dict[int, tuple[str, Callable[[Method, Family], str | None]]] = {
    1: ("identity", item_1_identity),
    2: ("restore", item_2_restore),
    3: ("padding", item_3_padding),
    4: ("less work", item_4_less_work),
    5: ("settings", item_5_settings),
    6: ("errors", item_6_errors),
    7: ("composition", item_7_composition),
    8: ("determinism", item_8_determinism),
    9: ("report", item_9_report),
}


# the record


def cell(method: Method, family: Family, items: tuple[int, ...] | None = None) -> str:
    """The items that hold on a family: "1-3, 5", or "refused: <why>" where the model lacks a part.

    Where the method finds nothing to act on (no image, say), they hold for that reason alone: "never acts". Raises
    AssertionError where an item fails.
    """
    try:
        run = under(method, family.tiny(), _prompts(family)[-1]).run
        if run is not None and not run.acted and not _inert(method):
            check(method, family, items=(1, 2, 3))
            return "never acts"
        return _ranges([int(name.split()[0]) for name in check(method, family, items)])
    except UnsupportedModel as error:
        assert str(error), f"{method} is refused on {family} without a reason"
        return f"refused: {error}"


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 5] -> "1-3, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def record(path: Path | None = None, items: tuple[int, ...] | None = None) -> dict[str, dict[str, Any]]:
    """Runs the whole contract over `examples()` and writes what passed, by the paper's slug or the class's name.

    Each entry: method (its example), family (home), passed and items (there), refused (ways to generate that are, and
    why), matrix (every other family: see `cell`, or "failed: <how>"). path: default lab/results/contract.json.
    """
    from seqwise.lab.catalogue import PACKAGE
    from seqwise.lab.files import write_json

    document = {_key(method): _entry(method, items) for method in examples().values()}
    write_json(PACKAGE / "lab" / "results" / "contract.json" if path is None else path, dict(sorted(document.items())))
    return document


def _entry(method: Method, items: tuple[int, ...] | None) -> dict[str, Any]:
    family = home(method)
    entry: dict[str, Any] = {"method": str(method), "family": family.name, "passed": True, "items": [], "refused": {}}
    try:
        entry["items"] = [int(name.split()[0]) for name in check(method, family, items)]
        if 5 in entry["items"]:
            entry["refused"] = refusals(method, family)
    except (AssertionError, SeqwiseError) as error:
        entry |= {"passed": False, "failed": f"failed: {error}"}
    entry["matrix"] = {}
    for other in FAMILIES.values():
        if other.name != family.name:
            try:
                entry["matrix"][other.name] = cell(method, other, items)
            except (AssertionError, SeqwiseError) as error:
                entry["matrix"][other.name] = f"failed: {error}"
    return entry


def _key(method: Method) -> str:
    """The slug of the paper whose object the method is, or the class's name."""
    from seqwise.lab.catalogue import papers

    for paper in papers():
        module, _, name = (paper.object or "").partition(":")
        if module.startswith("seqwise.methods") and getattr(importlib.import_module(module), name, None) is type(
            method
        ):
            return paper.slug
    return type(method).__name__
