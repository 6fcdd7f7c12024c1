"""The hooks of one attached run: rows, attention, cache and positions, for every decoder family alike.

One forward goes through here in this order:
    before_model   columns enter the ledger (`facts.py`: what is known of them); image rows that a reducer dropped go;
                   positions are placed
    before_layer   layer 0 adopts the cache; stages (`stages.py`) cut rows
    attend         the attention function (`attending.py`)
    after_model    the prompt's counts are closed
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seqwise.core import hf
from seqwise.core.attending import AttentionDriver
from seqwise.core.caches import SlotLayer
from seqwise.core.entering import enter_images
from seqwise.core.errors import CacheError, PromptError, SeqwiseError, SlotConflict, UnsupportedModel
from seqwise.core.facts import PromptFacts
from seqwise.core.ledger import Ledger, Rows
from seqwise.core.method import Method
from seqwise.core.observe import attention
from seqwise.core.rope import Rope, frequencies_of
from seqwise.core.segments import Segments
from seqwise.core.stages import Captured, StageDriver
from seqwise.core.towers import TowerDriver
from seqwise.core.views import Block, Kernel, Read, Stage, Transition
from seqwise.core.visible import Visible

if TYPE_CHECKING:
    from seqwise.core.run import Run

# attention module -> the callable that serves it; one process-wide map behind the one registered function
_SITES: weakref.WeakKeyDictionary[nn.Module, Callable[..., Tensor]] = weakref.WeakKeyDictionary()


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls while a run is attached: (B, H, q, D) -> (B, q, H, D)."""
    site = _SITES.get(module)
    if site is None:
        raise SeqwiseError("this model is a copy made while a method was attached; copy it outside of `with`")
    out = site(
        query, key, value, attention_mask, dropout, query.shape[-1] ** -0.5 if scaling is None else scaling, **kwargs
    )
    return out.transpose(1, 2).contiguous(), None


@dataclass
class Account:
    """Attention work and what became of the rows, counted on the host."""

    pairs: int = 0  # query-key pairs computed, times query heads
    plain_pairs: int = 0
    forwards: int = 0  # since the prompt
    acted: bool = False


class Engine:
    """Attached to one model for one run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.anatomy = run.anatomy
        self.by_slot: dict[str, Method] = {slot: part for part in run.method.parts for slot in part.slots}
        if "hidden" in self.by_slot:
            raise SeqwiseError(
                f"{self.by_slot['hidden']} claims the slot 'hidden', which the engine does not serve yet"
            )
        kernel, looper = self.by_slot.get("attention.kernel"), self.by_slot.get("decode.loop")
        if kernel is not None and looper is not None:
            raise SlotConflict(f"{looper} verifies drafts with the model's own attention, which {kernel} replaces")
        placer = self.by_slot.get("positions")
        self.placer = placer if placer is not None and type(placer).place is not Method.place else None
        self.rope = Rope.of(self.anatomy) if kernel is not None and kernel.rotates else None
        self.ledger: Ledger | None = None
        self.cache: Any = None
        self.account = Account()
        self.segments: Segments | None = None
        self.facts = PromptFacts(self)
        self.attending = AttentionDriver(self)
        self.input_ids: Tensor | None = None
        self.input_mask: Tensor | None = None
        self.plain = False
        self.tree: Tensor | None = None  # (N, N) bool: what each draft node sees of the draft
        self.depth: Tensor | None = None  # (N,) of the draft's nodes
        self.deferred: dict[int, tuple[Tensor, float, float | None]] | None = None
        self.shared: dict[str, Any] = {}
        self.probing = False  # a layer runs only to show its query and key
        self._last_before: Tensor = torch.zeros(0)  # the newest position before the current rows
        self._swaps: tuple[nn.Module, Tensor, Tensor] | None = None  # the rotary module, its frequencies, the method's
        self._turned = False  # they differ
        self._undos: list[Callable[[], Any]] = []
        self.towers: TowerDriver | None = None
        cutter = self.by_slot.get("layer.rows")
        self.stages = StageDriver(self, cutter) if cutter is not None else None

    # attaching

    def install(self) -> None:
        a = self.anatomy
        hf.register_attention(attend)
        modules = list(a.decoder.modules())
        self._undos.append(hf.route_attention(modules))
        for i, module in enumerate(a.attentions):
            _SITES[module] = self._site(i)
            self._undos.append(functools.partial(_SITES.pop, module, None))
        add = self._undos.append
        outer = a.vision.owner if a.vision is not None else None
        if outer is not None:
            add(outer.register_forward_pre_hook(self._before_outer, with_kwargs=True).remove)
        add(a.decoder.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
        add(a.decoder.register_forward_hook(self._after_model).remove)
        for i, layer in enumerate(a.layers):
            add(layer.register_forward_pre_hook(self._before_layer(i), with_kwargs=True).remove)
        if self.stages is not None:
            self._undos += self.stages.install()
        self._swap_frequencies()
        pruner, reducer = self.by_slot.get("tower.rows"), self.by_slot.get("input.rows")
        parts = self.run.method.parts
        watchers = [
            part
            for part in parts
            if type(part).watch_tower is not Method.watch_tower and part.watched_tower(a) is not None
        ]
        reading = [part for part in parts if part.watched_tower(a)]
        if reading and pruner is not None:
            raise SlotConflict(f"{reading[0]} reads the whole vision tower, which {pruner} shortens")
        if pruner is not None or reducer is not None or watchers:
            assert a.vision is not None
            self.towers = TowerDriver(a, pruner, reducer, watchers, self.run, self._note_tower)
            self._undos += self.towers.install()
            for i, module in enumerate(a.vision.attentions if self.towers.observes else ()):
                _SITES[module] = self._tower_site(i)
                self._undos.append(functools.partial(_SITES.pop, module, None))

    def _swap_frequencies(self) -> None:
        placer = self.by_slot.get("positions")
        if placer is None or type(placer).frequencies is Method.frequencies:
            return
        rotary = frequencies_of(self.anatomy)
        own: Tensor = rotary.inv_freq  # type: ignore[assignment]
        changed = placer.frequencies(own.float(), self.anatomy).to(own)
        self._swaps, self._turned = (rotary, own, changed), not torch.equal(own, changed)
        self._undos.append(lambda: setattr(rotary, "inv_freq", own))
        rotary.inv_freq = changed

    def rest(self, plain: bool) -> None:
        """The unmodified model from now on, or the method again."""
        self.plain = plain
        if self._swaps is not None:
            rotary, own, changed = self._swaps
            rotary.inv_freq = own if plain else changed

    def remove(self) -> None:
        """Undoes everything, newest first."""
        while self._undos:
            self._undos.pop()()
        for layer in [] if self.cache is None else self.cache.layers:
            if isinstance(layer, SlotLayer):
                layer.attached = False

    # one forward

    def _before_outer(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Vision-language models: remember the ids, where the placeholders are."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.input_ids = ids if isinstance(ids, Tensor) and ids.dtype in (torch.long, torch.int) else None
        self.input_mask = kwargs.get("attention_mask")
        if self.towers is not None and any(
            name.startswith("pixel_values") and kwargs[name] is not None for name in kwargs
        ):
            self.towers.found = {}  # of a forward that failed

    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.plain:
            return None
        kwargs = dict(kwargs)
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        source = embeds if embeds is not None else ids
        if source is None:
            return None
        if ids is not None or self.anatomy.vision is None:
            self.input_ids = ids  # a vision-language model's own ids were noted by `_before_outer`
        B, q = source.shape[:2]
        if q == 0 or B == 0:
            raise PromptError("the prompt is empty; give at least one token")
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise PromptError("attention_mask must be a 2-D (batch, tokens) mask while a method is attached")
        cache = hf.find_cache(args, kwargs)
        ledger = self._ledger_for(cache, B)
        if mask is not None and mask.shape[1] < q:
            raise PromptError(f"attention_mask must cover the {q} new tokens, got {mask.shape[1]} columns")
        self._set_phase(ledger, q)
        fresh = ledger.columns == 0
        rows = ledger.begin(mask, q, source.device, self.depth)
        if fresh and ledger.expected is None and 0 in rows.lengths(B):
            raise PromptError("a prompt of the batch is empty (all padding); give each at least one token")
        self.shared = {}
        if self.stages is not None:
            self.stages.reset()
        if fresh:
            for part in self.run.method.parts:
                part.begin(self.run)
        if self._swaps is not None:
            self.account.acted = self.account.acted or self._turned
        if ledger.phase == "prefill":
            self.segments = self.facts.of_rows(ledger, rows, q, mask)
            if self.input_ids is not None and self.input_ids.shape[1] == q:
                ledger.ids = self.input_ids if ledger.ids is None else torch.cat([ledger.ids, self.input_ids], 1)
        if embeds is not None and self.towers is not None and self.towers.found and ledger.phase == "prefill":
            kwargs = enter_images(self, kwargs, ledger)
        return args, self._placed(kwargs, ledger, q)

    def _ledger_for(self, cache: Any, B: int) -> Ledger:
        mine = None
        if cache is not None and len(cache.layers) and isinstance(cache.layers[0], SlotLayer):
            mine = cache.layers[0].ledger
            if mine.method != str(self.run.method):
                raise CacheError(f"this cache was filled under {mine.method}; continue it under the same method")
            if not cache.layers[0].attached:
                for layer in cache.layers:
                    layer.attached = True
        elif cache is not None and cache.get_seq_length() > 0:
            raise CacheError(
                "this cache was filled without the method; start with an empty one inside `with method.on(model)`"
            )
        if mine is None:
            mine = Ledger(B, len(self.anatomy.layers), str(self.run.method))
            self.cache = None
            announced = self.run.announced
            if announced is not None:
                mine.expected_columns = announced.columns
                if announced.lengths is not None:  # beams and several returned sequences repeat the prompts
                    copies = B // len(announced.lengths)
                    mine.expected = [length for length in announced.lengths for _ in range(copies)]
            self.account = Account()
        else:
            self.cache = cache
        if mine.batch != B:
            raise CacheError(f"the cache holds {mine.batch} samples, the batch has {B}")
        self.ledger = mine
        return mine

    def _set_phase(self, ledger: Ledger, q: int) -> None:
        if self.tree is not None:
            ledger.phase = "decode"
        elif ledger.columns == 0:
            ledger.phase = "prefill"
        elif ledger.phase == "prefill":
            total = ledger.expected_columns
            done = total is not None and ledger.columns >= total
            if done or (q == 1 and total is None):
                ledger.phase = "decode"

    def _placed(self, kwargs: dict[str, Any], ledger: Ledger, q: int) -> dict[str, Any]:
        """RoPE positions: a method's own for a prompt, one more per token afterwards; lowered by dropped rows."""
        if self.placer is not None:
            assert ledger.length is not None
            rows = ledger.rows[0]
            if ledger.phase == "prefill":
                positions = self.facts.places(self.placer, ledger, q)
                self.account.acted = True
            else:
                if ledger.last_position is None:  # a prompt of one token whose first step is a draft
                    ledger.last_position = torch.full((ledger.batch,), -1.0, device=rows.order.device)
                self._last_before = ledger.last_position
                start = ledger.length - (rows.count if rows.live is None else rows.live.sum(-1))
                positions = ledger.last_position[:, None] + (rows.order - start[:, None] + 1).clamp(min=1).float()
                ledger.last_position = positions.amax(-1)
            kwargs["position_ids"] = positions
        elif 0 in ledger.shift and not ledger.fresh:
            given = kwargs.get("position_ids")
            given = ledger.rows[0].order.clamp(min=0) if given is None else given.expand(ledger.batch, -1)
            kwargs["position_ids"] = given - ledger.shift[0][:, None]
        return kwargs

    def _before_layer(self, index: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if self.plain or self.probing or self.ledger is None:
                return None
            if index == 0:
                self._adopt(hf.find_cache(args, kwargs), self.ledger)
            return None if self.stages is None else self.stages.before_layer(index, layer, args, kwargs)

        return hook

    def _adopt(self, cache: Any, ledger: Ledger) -> None:
        """Puts slot layers into an empty cache that the model or the caller made."""
        if cache is None:
            self.cache = None
            return
        if len(cache.layers) and isinstance(cache.layers[0], SlotLayer):
            self.cache = cache
            return
        refusal = hf.cache_refusal(cache)
        if refusal is not None:
            raise CacheError(refusal)
        hf.adopt_layers(cache, [SlotLayer(ledger, i) for i in range(len(self.anatomy.layers))])
        self.cache = cache

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        ledger = self.ledger
        if self.plain or ledger is None:
            return
        if ledger.phase == "decode":
            self.account.forwards += 1
        if ledger.phase == "prefill":
            ledger.enter()
            ledger.prompt_columns = ledger.columns
            if ledger.expected_columns is not None and ledger.columns >= ledger.expected_columns:
                ledger.phase = "decode"

    # attention

    def _tower_site(self, index: int) -> Callable[..., Tensor]:
        def site(
            query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float, **kw: Any
        ) -> Tensor:
            assert self.towers is not None
            return self.towers.attend(index, query, key, value, mask, scaling)

        return site

    def _site(self, index: int) -> Callable[..., Tensor]:
        def site(
            query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float, **kw: Any
        ) -> Tensor:
            softcap = kw.get("softcap")
            if self.probing:
                raise Captured(query, key, value, scaling, softcap)
            if self.plain or self.ledger is None:
                visible = Visible.of(
                    query.shape[2],
                    key.shape[2],
                    padding=None if mask is None else mask[:, -key.shape[2] :],
                    window=self.anatomy.windows[index],
                    device=query.device,
                )
                return attention(query, key, value, visible, scaling=scaling, softcap=softcap, dropout=dropout)[0]
            extra = _model_mask(mask, query, key)
            positions = kw.get("position_ids")
            return self.attending.attend(index, query, key, value, dropout, scaling, softcap, extra, positions)

        return site

    # reports

    def note_kept(self, stage: str, before: Rows, rows: Rows) -> None:
        """Notes what a stage left of the samples that lost rows there."""
        assert self.ledger is not None
        B = self.ledger.batch
        counts = zip(before.lengths(B), rows.lengths(B), rows.order.expand(B, -1).tolist(), strict=True)
        self.ledger.kept[stage] = [None if n == m else [i for i in row if i >= 0] for n, m, row in counts]

    def _note_tower(self, stage: str, kept: list[list[int]]) -> None:
        assert self.anatomy.vision is not None
        self.run.tower_kept = kept
        rows, columns = self.anatomy.vision.grid
        if any(len(row) < rows * columns for row in kept):
            self.account.acted = True


def _model_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask of the model's own making, (B or 1, 1, q, n) bool: what may be seen beyond causality and padding."""
    if mask is None or mask.dim() != 4:
        return None
    if mask.shape[-2:] != (query.shape[2], key.shape[2]):
        raise UnsupportedModel(
            "this model masks its attention by column, which does not fit a cache or rows that shrink"
        )
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


__all__ = ["Account", "Block", "Engine", "Kernel", "Read", "Stage", "Transition", "attend"]
