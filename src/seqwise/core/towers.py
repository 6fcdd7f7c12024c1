"""The vision tower: observe it, shorten it, and tell which of the language model's rows each patch became.

The tower may run on fewer patches; behind the projector the survivors are scattered back onto the full grid, so that a
model's own packing (unpadding, newline rows) works unchanged. The same packing, applied to the keep mask, tells which
image rows of the language model's input go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seqwise.core import hf
from seqwise.core.anatomy import Anatomy, Vision
from seqwise.core.errors import PromptError, UnsupportedModel
from seqwise.core.method import Method
from seqwise.core.observe import received
from seqwise.core.visible import Visible


@dataclass
class TowerLayer:
    """One tower layer that has just run: query, key, value (T, h, n, d) of its attention, CLS rows first."""

    index: int
    feature_layer: int
    specials: int
    grid: tuple[int, int]
    patches: int  # N, before any pruning
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    state: dict[str, Tensor]  # (T, n patches) each, gathered with the survivors


@dataclass
class Tower:
    """What the tower computed for all tiles of a forward."""

    grid: tuple[int, int]
    specials: int
    feature_layer: int
    patches: int  # N
    alive: Tensor | None  # (T, k) patches that survived the tower, None for all
    layers: dict[int, tuple[Tensor, Tensor, Tensor, float]]

    def received(self, rows: str = "all", layer: int | None = None) -> Tensor:
        """Attention received in a layer (default the feature layer): (T, h, specials + n) fp32, summed over `rows`:
        "all" or "cls"."""
        query, key, _, scaling = self.layers[self.feature_layer if layer is None else layer]
        visible = Visible.of(query.shape[2], key.shape[2], causal=False, device=query.device)
        take = slice(0, 1) if rows == "cls" else None
        return received(query, key, visible=visible, rows=take, scaling=scaling)


@dataclass
class TowerDriver:
    """Hooks of one attached run on a model's vision side."""

    anatomy: Anatomy
    pruner: Method | None  # claims tower.rows
    reducer: Method | None  # claims input.rows
    on_kept: Callable[[str, list[list[int]]], None]
    resting: Callable[[], bool]  # the run is under `plain()`
    keep: Tensor | None = None  # (image rows of the batch, in order) bool, for the next language-model forward
    _layers: dict[int, tuple[Tensor, Tensor, Tensor, float]] = field(default_factory=dict)
    _state: dict[str, Tensor] = field(default_factory=dict)
    _alive: Tensor | None = None
    _packing: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    _active: bool = False

    @property
    def vision(self) -> Vision:
        assert self.anatomy.vision is not None
        return self.anatomy.vision

    def install(self) -> list[Callable[[], None]]:
        """Hooks and instance overrides; returns the undos."""
        vision = self.vision
        name = type(self.anatomy.model).__name__
        if not vision.prunable:
            raise UnsupportedModel(
                f"{name}: its visual features cannot be shortened (several feature layers, CLS among the features, "
                "or a patch merger); use a method that acts between decoder layers"
            )
        undos = [hf.route_attention(list(vision.tower.modules()))]
        for i, layer in enumerate(vision.layers):
            undos.append(layer.register_forward_hook(self._after_layer(i)).remove)
        assert vision.projector is not None
        undos.append(vision.projector.register_forward_hook(self._after_projector).remove)
        undos.append(self._override("get_image_features", self._get_image_features))
        if hasattr(vision.owner, "pack_image_features"):
            undos.append(self._override("pack_image_features", self._pack))
        return undos

    def _override(self, name: str, make: Callable[..., Any]) -> Callable[[], None]:
        owner, original = self.vision.owner, getattr(self.vision.owner, name)
        own = name in vars(owner)

        def call(*args: Any, **kwargs: Any) -> Any:
            return make(original, *args, **kwargs)

        setattr(owner, name, call)

        def undo() -> None:
            if own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)

        return undo

    # attention of the tower

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        if mask is not None:
            raise UnsupportedModel(f"{type(self.anatomy.model).__name__}: a masked vision tower cannot be observed")
        wanted = self.pruner is not None and layer <= self.vision.feature_layer
        if self._active and (wanted or layer == self.vision.feature_layer):
            self._layers[layer] = (query, key, value, scaling)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)

    def _after_layer(self, index: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            if not self._active or self.pruner is None or index > self.vision.feature_layer:
                return None
            query, key, value, scaling = self._layers[index]
            if index < self.vision.feature_layer:
                del self._layers[index]  # only the feature layer's tensors outlive their layer
            hidden = hf.hidden_of(output)  # (T, specials + n, d)
            specials = self.vision.specials
            n = hidden.shape[1] - specials
            if self._alive is None:
                self._alive = torch.arange(n, device=hidden.device).expand(hidden.shape[0], -1)
            seen = TowerLayer(
                index, self.vision.feature_layer, specials, self.vision.grid, self.vision.grid[0] * self.vision.grid[1],
                query, key, value, scaling, self._state,
            )  # fmt: skip
            keep = self.pruner.prune_tower(seen)
            if keep is None or keep.shape[1] == n:
                return None
            self._alive = self._alive.gather(1, keep)
            self._state = {name: value.gather(1, keep) for name, value in self._state.items()}
            rows = torch.cat([torch.arange(specials, device=keep.device).expand(keep.shape[0], -1), keep + specials], 1)
            return hf.with_hidden(output, hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1])))

        return hook

    def _after_projector(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        if not self._active or self._alive is None:
            return None
        N = self.vision.grid[0] * self.vision.grid[1]
        if output.shape[1] == N:
            return None
        full = output.new_zeros(output.shape[0], N, output.shape[-1])
        return full.scatter(1, self._alive[..., None].expand(-1, -1, output.shape[-1]), output)

    def _pack(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._packing = (args, kwargs)
        return original(*args, **kwargs)

    def _get_image_features(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.resting():
            return original(*args, **kwargs)
        self._layers, self._state, self._alive, self._packing = {}, {}, None, None
        self._active = True
        try:
            result = original(*args, **kwargs)
        finally:
            self._active = False
        keep = self._kept()  # (T, N) bool
        flat = self._to_rows(keep)
        total = sum(feature.shape[0] for feature in result.pooler_output)
        if flat.shape[0] != total:
            raise PromptError(f"image features have {total} rows but the keep mask has {flat.shape[0]}")
        self.keep = flat
        self._layers = {}
        return result

    def _kept(self) -> Tensor:
        grid = self.vision.grid
        N = grid[0] * grid[1]
        tiles = next(iter(self._layers.values()))[0].shape[0]
        device = next(iter(self._layers.values()))[0].device
        keep = torch.ones(tiles, N, dtype=torch.bool, device=device)
        if self._alive is not None:
            keep = torch.zeros_like(keep).scatter(1, self._alive, True)
            self.on_kept("tower", [row.nonzero()[:, 0].tolist() for row in keep])
        if self.reducer is not None:
            tower = Tower(grid, self.vision.specials, self.vision.feature_layer, N, self._alive, self._layers)
            chosen = self.reducer.keep_input(tower)
            if chosen.dtype != torch.bool:
                mask = torch.zeros(tiles, N if self._alive is None else self._alive.shape[1], dtype=torch.bool, device=device)
                chosen = mask.scatter(1, chosen, True)
            if self._alive is not None and chosen.shape[1] != N:
                chosen = torch.zeros(tiles, N, dtype=torch.bool, device=device).scatter(1, self._alive, chosen)
            keep = keep & chosen
        return keep

    def _to_rows(self, keep: Tensor) -> Tensor:
        """The keep mask of patches (T, N) as one of the language model's image rows, through the model's own packing.
        Newline rows carry the grid: they go as soon as any patch goes."""
        if self._packing is None:
            return keep.flatten()
        args, kwargs = self._packing
        features = args[0] if args else kwargs["image_features"]
        split = list(torch.split(keep.float()[..., None], [feature.shape[0] for feature in features], dim=0))
        newline = torch.ones(1, device=keep.device) if bool(keep.all()) else torch.zeros(1, device=keep.device)
        if args:
            args = (split, *args[1:])
        else:
            kwargs = {**kwargs, "image_features": split}
        if "image_newline" in kwargs:
            kwargs = {**kwargs, "image_newline": newline}
        packed, _ = getattr(type(self.vision.owner), "pack_image_features")(self.vision.owner, *args, **kwargs)
        return torch.cat([rows[:, 0] for rows in packed]) >= 0.5
