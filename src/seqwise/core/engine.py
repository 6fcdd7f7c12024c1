"""The hooks of one attached run: rows, attention, cache and positions, for every decoder family alike.

One forward goes through here in this order:
    before_model   columns enter the ledger; image rows that a reducer dropped go; positions are placed
    before_layer   layer 0 adopts the cache; stages (`stages.py`) cut rows
    attend         the attention function: mask from slots, rewrite, sparse read, then retain and store
    after_model    the prompt's counts are closed
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seqwise.core import hf
from seqwise.core.caches import SlotLayer, View
from seqwise.core.errors import CacheError, PromptError, SeqwiseError, UnsupportedModel
from seqwise.core.ledger import Ledger, Rows
from seqwise.core.method import Method
from seqwise.core.observe import attention, attention_statistics, gathered_attention, probabilities
from seqwise.core.segments import PAD, Segments
from seqwise.core.select import compact
from seqwise.core.stages import Captured, StageDriver
from seqwise.core.towers import TowerDriver
from seqwise.core.views import Block, Read, Stage, Transition
from seqwise.core.visible import Visible

if TYPE_CHECKING:
    from seqwise.core.run import Run

# attention module -> the callable that serves it; one process-wide map behind the one registered function
_SITES: weakref.WeakKeyDictionary[nn.Module, Callable[..., Tensor]] = weakref.WeakKeyDictionary()

_REWRITE_ROWS = 128
_SERVED = {
    *("tower.rows", "input.rows", "layer.rows", "attention.probs", "positions"),
    *("cache.retain", "cache.store", "cache.read", "decode.loop"),
}


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
    rows: dict[int, int] = field(default_factory=dict)
    acted: bool = False


class Engine:
    """Attached to one model for one run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.anatomy = run.anatomy
        self.by_slot: dict[str, Method] = {slot: part for part in run.method.parts for slot in part.slots}
        for slot in self.by_slot:
            if slot not in _SERVED:
                raise SeqwiseError(
                    f"{self.by_slot[slot]} claims the slot {slot!r}, which the engine does not serve yet"
                )
        self.ledger: Ledger | None = None
        self.cache: Any = None
        self.account = Account()
        self.segments: Segments | None = None
        self.bound: Segments | None = None
        self.input_ids: Tensor | None = None
        self.plain = False
        self.tree: Tensor | None = None  # (N, N) bool: what each draft node sees of the draft
        self.depth: Tensor | None = None  # (N,) of the draft's nodes
        self.deferred: dict[int, tuple[Tensor, float, float | None]] | None = None
        self.shared: dict[str, Any] = {}
        self.probing = False  # a layer runs only to show its query and key
        self._last_before: Tensor = torch.zeros(0)  # the newest position before the current rows
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
        pruner, reducer = self.by_slot.get("tower.rows"), self.by_slot.get("input.rows")
        if pruner is not None or reducer is not None:
            self.towers = TowerDriver(a, pruner, reducer, self._note_tower, lambda: self.plain)
            self._undos += self.towers.install()
            assert a.vision is not None
            for i, module in enumerate(a.vision.attentions):
                _SITES[module] = self._tower_site(i)
                self._undos.append(functools.partial(_SITES.pop, module, None))

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
        if ledger.phase == "prefill":
            self.segments = self._segments_for(rows, q, mask)
            if self.input_ids is not None and self.input_ids.shape[1] == q:
                ledger.ids = self.input_ids if ledger.ids is None else torch.cat([ledger.ids, self.input_ids], 1)
        if (
            embeds is not None
            and self.towers is not None
            and self.towers.keep is not None
            and ledger.phase == "prefill"
        ):
            kwargs = self._drop_images(kwargs, ledger)
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
            if self.run.prompt is not None:
                lengths, mine.expected_columns = self.run.prompt
                if lengths is not None:  # beams and several returned sequences repeat the prompts
                    mine.expected = [length for length in lengths for _ in range(B // len(lengths))]
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

    def _segments_for(self, rows: Rows, q: int, mask: Tensor | None) -> Segments | None:
        visual_token = self.anatomy.vision.image_token if self.anatomy.vision is not None else None
        if self.bound is not None:
            bound, self.bound = self.bound, None
            if bound.type.shape[1] != q:
                raise PromptError(f"segments must cover the prompt's {q} tokens, got {bound.type.shape[1]}")
            return bound
        ids = self.input_ids
        if ids is None or ids.shape[1] != q:
            if {"layer.rows", "positions"} & set(self.by_slot):
                raise PromptError(
                    "the prompt's token types are unknown (it came as embeddings); bind them: run.bind(segments)"
                )
            return None
        return Segments.infer(ids, None if mask is None else mask[:, -q:], visual_token)

    def _drop_images(self, kwargs: dict[str, Any], ledger: Ledger) -> dict[str, Any]:
        assert self.towers is not None and self.segments is not None
        keep_rows, self.towers.keep = self.towers.keep, None
        assert keep_rows is not None
        if bool(keep_rows.all()):
            return kwargs
        visual = self.segments.visual
        copies = int(visual.sum()) // keep_rows.shape[0]  # beams repeat each sample
        if copies > 1:
            parts = keep_rows.split(visual[::copies].sum(-1).tolist())
            keep_rows = torch.cat([part for part in parts for _ in range(copies)])
        keep = torch.ones_like(visual).masked_scatter(visual, keep_rows.to(visual.device))
        rows = ledger.rows[0]
        if rows.live is not None:
            keep = keep & rows.live
        index, live = compact(keep)
        embeds = kwargs["inputs_embeds"]
        kwargs["inputs_embeds"] = embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))
        kwargs["attention_mask"] = None
        positions = kwargs.get("position_ids")
        B, q = visual.shape
        if self.anatomy.mrope:
            if positions is not None:
                kwargs["position_ids"] = positions.gather(-1, index.expand(*positions.shape[:-1], -1))
        else:
            # survivors move together: compact positions, and all later ones are lowered by what was dropped
            dropped = ledger.rows[0].count - live.sum(-1) if rows.live is None else rows.live.sum(-1) - live.sum(-1)
            kwargs["position_ids"] = (live.cumsum(-1) - 1).clamp(min=0)
            ledger.shift[0] = dropped
        ledger.cut(0, index, live)
        self.segments = _gather_segments(self.segments, index, live)
        self.account.acted = True
        self.note_kept("input", ledger.rows[0])
        return kwargs

    def _placed(self, kwargs: dict[str, Any], ledger: Ledger, q: int) -> dict[str, Any]:
        """RoPE positions: a method's own for a prompt, one more per token afterwards; lowered by dropped rows."""
        placer = self.by_slot.get("positions")
        if placer is not None:
            assert ledger.length is not None
            rows = ledger.rows[0]
            if ledger.phase == "prefill" and ledger.fresh:
                assert self.segments is not None
                positions = placer.place(self.segments, self.anatomy)
                if not positions.is_floating_point():
                    raise TypeError(f"{placer}.place must return float positions, got {positions.dtype}")
                ledger.last_position = positions.masked_fill(~self.segments.real, float("-inf")).amax(-1).ceil()
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
        if ledger.phase == "prefill":
            ledger.enter()
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
            return self._attend(index, query, key, value, dropout, scaling, softcap, _model_mask(mask, query, key))

        return site

    def _visible(self, index: int, q: int, layer: SlotLayer | None, extra: Tensor | None = None) -> Visible:
        assert self.ledger is not None
        rows = self.ledger.rows[index]
        window = self.anatomy.windows[index]
        if layer is None:
            live = None if rows.live is None else rows.live[:, None]
            return Visible(rows.order, rows.order[:, None], rows.live, live, True, window, 0, extra)
        assert layer.order is not None
        offset = layer.slots - q if layer.in_columns and self.tree is None else None
        if self.tree is not None:
            extra = torch.ones(1, 1, q, layer.slots, dtype=torch.bool, device=self.tree.device)
            extra[..., layer.slots - q :] = self.tree
        return Visible(rows.order, layer.order, rows.live, layer.live, True, window, offset, extra)

    def _attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float,
        softcap: float | None, extra: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ledger = self.ledger
        assert ledger is not None
        layer: SlotLayer | None = self.cache.layers[index] if self.cache is not None else None
        H, q, n = query.shape[1], query.shape[2], key.shape[2]
        visible = self._visible(index, q, layer, extra)
        retainer, storer = self.by_slot.get("cache.retain"), self.by_slot.get("cache.store")
        watching = [m for m in (retainer, storer) if m is not None and layer is not None]
        want = any(method.observes(ledger.phase) for method in watching) and self.tree is None
        spans = ledger.rows[index].spans if n == q else None
        before = ledger.columns - q
        self.account.plain_pairs += H * (q * before + q * (q + 1) // 2)
        row_probabilities = lse = None

        chosen = self._read(index, layer, query, key, scaling) if q == 1 and "cache.read" in self.by_slot else None
        if chosen is not None:
            out = gathered_attention(query, key, value, *chosen, scaling=scaling)
            self.account.pairs += H * chosen[0].shape[-1]
            self.account.acted = True
        else:
            self.account.pairs += H * (q * (n - q) + q * (q + 1) // 2)
            if want and q == 1:
                row_probabilities = probabilities(query, key, visible, scaling=scaling, softcap=softcap)  # (B, H, 1, n)
                out = _weighted(row_probabilities, value)
            else:
                out, lse = attention(
                    query,
                    key,
                    value,
                    visible,
                    scaling=scaling,
                    softcap=softcap,
                    dropout=dropout,
                    spans=spans,
                    want_lse=want,
                )
        rewriter = self.by_slot.get("attention.probs")
        if rewriter is not None:
            out = self._rewrite(rewriter, index, query, key, value, out, visible, layer, scaling, softcap, lse)
        if self.stages is not None and index + 1 in self.stages.layers and ledger.phase == "prefill":
            self.stages.previous = (query, key, value)
        if layer is not None and watching:
            if self.deferred is not None:
                self.deferred[index] = (query, scaling, softcap)
            else:
                self._settle(index, layer, query, key, value, scaling, softcap, visible, lse, row_probabilities)
        if layer is not None and visible.window is not None and self.tree is None:
            layer.forget_outside(visible.window)
        return out

    def _read(
        self, index: int, layer: SlotLayer | None, query: Tensor, key: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor] | None:
        assert self.ledger is not None
        if self.ledger.phase != "decode" or layer is None:
            return None
        read = Read(index, len(self.anatomy.layers), query, key, layer.live, scaling, self.shared, layer)
        return self.by_slot["cache.read"].read(read)

    def _settle(
        self, index: int, layer: SlotLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float,
        softcap: float | None, visible: Visible, lse: Tensor | None, row_probabilities: Tensor | None,
    ) -> None:  # fmt: skip
        """Retain, then store, on what the attention of these rows has shown."""
        ledger = layer.ledger
        final = ledger.expected_columns is None or ledger.columns >= ledger.expected_columns
        view = View(
            index,
            len(self.anatomy.layers),
            layer,
            query,
            key,
            value,
            scaling,
            softcap,
            visible,
            lse,
            row_probabilities,
            final,
        )
        retainer, storer = self.by_slot.get("cache.retain"), self.by_slot.get("cache.store")
        if retainer is not None:
            kept = retainer.retain(view)
            if kept is not None:
                slots = layer.slots
                layer.keep(*kept)
                self.account.acted = self.account.acted or kept[0].shape[-1] < slots or layer.live is not None
                if storer is not None:  # what the rows have shown still holds for the slots that are left
                    view.key, view.value = layer.read()
                    view.visible, view.row_probabilities = self._visible(index, query.shape[2], layer), None
        if storer is not None:
            chunks = storer.store(view)
            if chunks:
                layer.pack(chunks)
                self.account.acted = True

    def settle_tree(self, path: Tensor, count: int) -> None:
        """A verified draft: only the accepted rows stay, then the methods see them as steps."""
        assert self.ledger is not None and self.cache is not None
        ledger = self.ledger
        r = path.shape[0]
        self.account.acted = True
        ledger.columns -= count - r
        ledger.step -= count - r
        assert ledger.length is not None
        ledger.length = ledger.length - (count - r)
        rows = Rows(ledger.length[:, None] - r + torch.arange(r, device=path.device))
        ledger.rows = [rows] * ledger.layers
        if ledger.last_position is not None:
            ledger.last_position = self._last_before + r
        deferred, self.deferred = self.deferred or {}, None
        for index, layer in enumerate(self.cache.layers):
            layer.accept(path, count - r)
            if index in deferred:
                query, scaling, softcap = deferred[index]
                key, value = layer.read()
                visible = self._visible(index, r, layer)
                self._settle(
                    index, layer, query.index_select(2, path), key, value, scaling, softcap, visible, None, None
                )

    def _rewrite(
        self, method: Method, index: int, query: Tensor, key: Tensor, value: Tensor, out: Tensor, visible: Visible,
        layer: SlotLayer | None, scaling: float, softcap: float | None, lse: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Replaces the chosen heads' output by rewritten probabilities times values, in blocks of rows."""
        heads = method.rewritten_heads(index, self.anatomy)
        if not heads:
            return out
        ledger = self.ledger
        assert ledger is not None and ledger.length is not None
        B, H, q, _ = query.shape
        g = H // key.shape[1]
        pick = torch.tensor(heads, device=query.device)
        chosen_q = query.index_select(1, pick)
        chosen_k = key.index_select(1, pick // g)
        chosen_v = value.index_select(1, pick // g)
        h, n = len(heads), key.shape[2]

        def per_head(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[1] == 1 else x.index_select(1, pick // g)

        order_k, live_k = per_head(visible.order_k), per_head(visible.live_k)
        assert order_k is not None
        own = Visible(
            visible.order_q, order_k, visible.live_q, live_k, True, visible.window, visible.offset, visible.extra
        )
        lse = None if lse is None else lse.index_select(1, pick)

        def statistics(reduce: tuple[str, ...]) -> dict[str, Tensor]:
            return attention_statistics(
                chosen_q,
                chosen_k,
                visible=own,
                lse=lse,
                scaling=scaling,
                softcap=softcap,
                reduce=reduce,  # type: ignore[arg-type]
            )

        live = torch.ones(B, h, n, dtype=torch.bool, device=query.device) if live_k is None else live_k.expand(B, h, n)
        state = layer.state if layer is not None else {}
        block = Block(index, heads, ledger.phase, visible.order_q, order_k, live, ledger.length, state, H, statistics)
        method.prepare(block)
        pieces = []
        for start in range(0, q, _REWRITE_ROWS):
            stop = min(start + _REWRITE_ROWS, q)
            part = own.take(slice(start, stop))
            p = probabilities(chosen_q[:, :, start:stop], chosen_k, part, scaling=scaling, softcap=softcap)
            block.rows = part.order_q
            pieces.append(method.rewrite(p, block).to(value.dtype) @ chosen_v)
        self.account.acted = True
        return out.index_copy(1, pick, torch.cat(pieces, 2))

    # reports

    def note_kept(self, stage: str, rows: Rows) -> None:
        assert self.ledger is not None
        order = rows.order.expand(self.ledger.batch, -1)
        self.ledger.kept[stage] = [[i for i in row if i >= 0] for row in order.tolist()]

    def _note_tower(self, stage: str, kept: list[list[int]]) -> None:
        self.run.tower_kept = kept
        if any(
            len(row) < self.anatomy.vision.grid[0] * self.anatomy.vision.grid[1] for row in kept if self.anatomy.vision
        ):
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


def _gather_segments(segments: Segments, index: Tensor, live: Tensor) -> Segments:
    def pick(x: Tensor, fill: int) -> Tensor:
        return x.gather(1, index).masked_fill(~live, fill)

    return Segments(
        pick(segments.type, PAD), pick(segments.image, -1), pick(segments.tile, -1), pick(segments.row, -1),
        pick(segments.column, -1), pick(segments.set, -1), pick(segments.member, -1),
    )  # fmt: skip


def _weighted(p: Tensor, value: Tensor) -> Tensor:
    """Probabilities (B, H, q, n) times values (B, Hkv, n, D), query heads grouped by KV head."""
    B, H, q, n = p.shape
    Hkv = value.shape[1]
    grouped = p.to(value.dtype).reshape(B, Hkv, -1, n) @ value  # (B, Hkv, g q, D)
    return grouped.reshape(B, H, q, value.shape[-1])


__all__ = ["Account", "Block", "Engine", "Read", "Stage", "Transition", "attend"]
