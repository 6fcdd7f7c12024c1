"""Rows that disappear between decoder layers, and the positions of those that go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seqwise.core import hf
from seqwise.core.entering import keep_last
from seqwise.core.errors import PromptError, SeqwiseError, UnsupportedModel
from seqwise.core.method import Method
from seqwise.core.segments import IMAGE, PAD, by_order, look_up
from seqwise.core.select import compact
from seqwise.core.views import Projection, Stage, Transition
from seqwise.core.visible import Visible

if TYPE_CHECKING:
    from seqwise.core.engine import Engine
    from seqwise.core.ledger import Ledger


class Captured(Exception):
    """Carries a layer's query and key out of its attention, where nothing else of the layer is wanted."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None) -> None:
        self.found = (query, key, value, scaling, softcap)


class StageDriver:
    """Cuts rows in front of some layers. The model hands every layer the original positions: they are cut alike."""

    def __init__(self, engine: Engine, cutter: Method) -> None:
        self.engine = engine
        self.cutter = cutter
        self.layers = cutter.stages(engine.anatomy)
        self.watched = cutter.watched(engine.anatomy)
        self.previous: Projection | None = None  # of the layer in front of a stage
        self.reset()

    def reset(self) -> None:
        """A new forward begins."""
        self.state: dict[str, Tensor] = {}  # (B, r) each, of the method, gathered with the rows
        self.picked: Tensor | None = None  # (B, r) of the forward's rows that are left
        self.ids: Tensor | None = None  # (B, r) positions where they are renumbered
        self.tables: Any = None  # RoPE tables of `ids`

    def install(self) -> list[Callable[[], None]]:
        """Hooks that observe the watched layers' modules; returns the undos."""
        a = self.engine.anatomy
        if type(a.decoder).__name__ == "GPT2Model" and self.layers:
            raise UnsupportedModel(
                "GPT-2 restores its input's shape behind the last layer, so rows cannot be dropped between its layers"
            )
        undos = []
        for i in self.watched:
            mlp = a.mlps[i]
            assert mlp is not None
            for name, module in (("attention", a.attentions[i]), ("mlp", mlp)):
                undos.append(module.register_forward_hook(self._after_module(i, name), with_kwargs=True).remove)
        return undos

    def before_layer(self, index: int, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """(args, kwargs) of a layer with its own rows and positions, or None where nothing changes."""
        ledger = self.engine.ledger
        assert ledger is not None
        if index in self.layers and ledger.phase == "prefill":
            args, kwargs = self._cut(index, layer, args, kwargs, ledger)
        elif index and index in ledger.shift and ledger.phase == "decode":
            self._lower(index, kwargs, ledger)
        if self.picked is None and self.ids is None:
            return None
        return args, self._own_positions(kwargs)

    def _own_positions(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = dict(kwargs)
        if self.ids is not None:
            kwargs |= {"position_ids": self.ids, "position_embeddings": self.tables}
        elif self.picked is not None:
            index = self.picked
            tables, ids = kwargs.get("position_embeddings"), kwargs.get("position_ids")
            if isinstance(tables, tuple):
                kwargs["position_embeddings"] = tuple(_gather_rows(x, index) for x in tables)
            if ids is not None:
                shape = (*ids.shape[:-2], index.shape[0])
                kwargs["position_ids"] = ids.expand(*shape, -1).gather(-1, index.expand(*shape, index.shape[1]))
        if "attention_mask" in kwargs:
            kwargs["attention_mask"] = None
        return kwargs

    def _cut(self, index: int, layer: nn.Module, args: Any, kwargs: dict[str, Any], ledger: Ledger) -> Any:
        segments = self.engine.segments
        if segments is None or not bool(segments.visual.any()):
            return args, kwargs
        if not ledger.fresh:
            raise PromptError(
                "rows between layers can only be dropped from a prompt in one piece; use no chunked prefill"
            )
        rows = ledger.rows[index]
        hidden = hf.hidden_argument(args, kwargs)
        B, r = hidden.shape[:2]
        order = rows.order.expand(B, -1)
        live = torch.ones(B, r, dtype=torch.bool, device=hidden.device) if rows.live is None else rows.live
        visual, image = self._types(order, ledger)
        if "entered" not in ledger.facts:
            images = torch.arange(int(image.max()) + 1, device=image.device)
            ledger.facts["entered"] = (image[..., None] == images).sum(1)
        entered = ledger.facts["entered"]
        live_k = None if rows.live is None else rows.live[:, None]
        windows = self.engine.anatomy.windows
        visible, before = (
            Visible(rows.order, rows.order[:, None], rows.live, live_k, True, window, 0)
            for window in (windows[index], windows[index - 1])
        )
        held: list[Any] = []

        def project() -> Any:
            if not held:
                held.append(self._capture(layer, args, self._own_positions(kwargs)))
            return held[0]

        stage = Stage(
            index, len(self.engine.anatomy.layers), order, live, visual, image, entered, self.state,
            ledger.facts.get("patches", entered), hidden, lambda name: self._fact(name, order, ledger),
            self.engine.run.scorer, project, visible, self.previous, before,
        )  # fmt: skip
        keep = self.cutter.keep_rows(stage)
        keep = live if keep is None else keep_last(keep & live, live, order)
        self.state = stage.state
        if stage.replaced is not None:
            hidden, member = stage.replaced
            self.engine.account.acted = True
            ledger.note_members(f"layer {index}", order, keep, member)
        if bool((keep == live).all()):
            return (args, kwargs) if stage.replaced is None else hf.replace_hidden(args, kwargs, hidden)
        picked, alive = compact(keep)
        ledger.cut(index, picked, alive)
        self.state = {name: value.gather(1, picked) for name, value in self.state.items()}
        self.picked = picked if self.picked is None else self.picked.gather(1, picked)
        self.engine.account.acted = True
        self.engine.note_kept(f"layer {index}", rows, ledger.rows[index])
        if getattr(self.cutter, "positions", "keep") == "renumber":
            dropped = live.sum(-1) - alive.sum(-1)
            earlier = [ledger.shift[s] for s in sorted(ledger.shift) if 0 < s < index]
            ledger.shift[index] = earlier[-1] + dropped if earlier else dropped
            self._rotate((alive.cumsum(-1) - 1).clamp(min=0), kwargs)
        return hf.replace_hidden(args, kwargs, hidden.gather(1, picked[..., None].expand(-1, -1, hidden.shape[-1])))

    def _types(self, order: Tensor, ledger: Ledger) -> tuple[Tensor, Tensor]:
        """visual and image of the rows with these original positions, from the prompt's segments."""
        return self._fact("type", order, ledger) == IMAGE, self._fact("image", order, ledger)

    def _fact(self, name: str, order: Tensor, ledger: Ledger) -> Tensor:
        segments = self.engine.segments
        assert segments is not None
        told: dict[str, Tensor] = ledger.facts.setdefault("told", {})
        if name not in told:
            first = ledger.rows[0].order  # the original position of each segment column
            told[name] = by_order(getattr(segments, name), first, PAD if name == "type" else -1)
        return look_up(told[name], order)

    def _capture(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs a layer just up to its attention and takes query, key and value: norms, projections and RoPE are the
        model's own, of whatever family."""
        kwargs = {name: None if hf.is_cache(value) else value for name, value in kwargs.items()}
        args = tuple(None if hf.is_cache(value) else value for value in args)
        self.engine.probing = True
        try:
            layer.forward(*args, **kwargs)
        except Captured as captured:
            return captured.found
        finally:
            self.engine.probing = False
        raise SeqwiseError(f"{type(layer).__name__} ran without its attention function")

    def _lower(self, index: int, kwargs: dict[str, Any], ledger: Ledger) -> None:
        """Later tokens' positions, less what the stages up to this layer dropped; the input's share is off already."""
        ids = kwargs.get("position_ids")
        if ids is None:
            raise UnsupportedModel("this model tells its layers no positions; use positions='keep'")
        self._rotate(ids.expand(ledger.batch, -1) - ledger.shift[index][:, None], kwargs)

    def _rotate(self, ids: Tensor, kwargs: dict[str, Any]) -> None:
        rotary = getattr(self.engine.anatomy.decoder, "rotary_emb", None)
        tables = kwargs.get("position_embeddings")
        if rotary is None or not isinstance(tables, tuple):
            raise UnsupportedModel("this model has no rotary embedding to renumber; use positions='keep'")
        self.ids, self.tables = ids, rotary(tables[0], position_ids=ids)

    def _after_module(self, index: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            engine, ledger = self.engine, self.engine.ledger
            if engine.plain or engine.probing or ledger is None or engine.segments is None or ledger.phase != "prefill":
                return
            before, after = hf.hidden_argument(args, kwargs), hf.hidden_of(output)
            self.cutter.observe_transition(Transition(index, name, before, after, ledger.rows[index].live, self.state))

        return hook


def _gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """RoPE tables (..., B or 1, r, D) at rows index (B, k)."""
    B, k = index.shape
    x = x.expand(*x.shape[:-3], B, -1, -1)
    return x.gather(-2, index[..., None].expand(*x.shape[:-3], B, k, x.shape[-1]))
