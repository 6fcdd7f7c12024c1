"""The vision tower: observe it, shorten it, and tell which of the language model's rows each patch became.

The tower may run on fewer patches; the survivors' features then go back to their places on the full grid, so that a
model's own packing (unpadding, newline rows) works unchanged. The same packing, applied to the keep mask, tells which
image rows of the language model's input go.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from seqwise.core import hf
from seqwise.core.anatomy import Anatomy, Vision
from seqwise.core.errors import PromptError, UnsupportedModel
from seqwise.core.method import Method
from seqwise.core.observe import received
from seqwise.core.visible import Visible


@dataclass
class TowerLayer:
    """One tower layer that has just run on one tile: query, key, value (1, h, n, d) of its attention, CLS rows first.

    Tiles run one by one under a pruner, so that each may drop at its own pace.
    """

    index: int
    feature_layer: int
    specials: int
    grid: tuple[int, int]
    patches: int  # N, before any pruning
    tiles: int  # tiles of the image that this tile belongs to
    tiled: bool
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    state: dict[str, Tensor]  # (1, n patches) each, gathered with the survivors


@dataclass
class Tower:
    """What the tower computed for all tiles of a forward."""

    grid: tuple[int, int]
    specials: int
    feature_layer: int
    patches: int  # n that the tower left of each tile
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
    watched: frozenset[int] = frozenset()  # layers that watchers read
    on_seen: Callable[[Tower], None] | None = None
    keep: Tensor | None = None  # (image rows of the batch, in order) bool, for the next language-model forward
    _layers: dict[int, tuple[Tensor, Tensor, Tensor, float]] = field(default_factory=dict)
    _state: dict[str, Tensor] = field(default_factory=dict)
    _alive: Tensor | None = None  # (1, k) patches of the tile at hand that are left
    _kept: Tensor | None = None  # (T, N) bool, of all tiles
    _by_tile: list[tuple[Tensor, dict[int, tuple[Tensor, Tensor, Tensor, float]]]] = field(default_factory=list)
    _tiles: list[int] = field(default_factory=list)  # per tile, how many its image has
    _tile: int = 0
    patches_per_image: list[int] = field(default_factory=list)
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
        shortens = self.pruner is not None or self.reducer is not None
        if shortens and not vision.prunable:
            raise UnsupportedModel(
                f"{name}: its visual features cannot be shortened (several feature layers, CLS among the features, "
                "or a patch merger); use a method that acts between decoder layers"
            )
        undos = [hf.route_attention(list(vision.tower.modules()))]
        for i, layer in enumerate(vision.layers):
            undos.append(layer.register_forward_hook(self._after_layer(i)).remove)
        if self.pruner is not None:
            undos.append(self._override("forward", self._tile_by_tile, vision.tower))
        undos.append(self._override("get_image_features", self._get_image_features))
        if hasattr(vision.owner, "pack_image_features"):
            undos.append(self._override("pack_image_features", self._pack))
        return undos

    def _override(self, name: str, make: Callable[..., Any], owner: nn.Module | None = None) -> Callable[[], None]:
        owner = self.vision.owner if owner is None else owner
        original, own = getattr(owner, name), name in vars(owner)

        @functools.wraps(original)  # generate reads the signature to know what to pass
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

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        if mask is not None:
            raise UnsupportedModel(f"{type(self.anatomy.model).__name__}: a masked vision tower cannot be observed")
        wanted = self.pruner is not None and layer <= self.vision.feature_layer
        if self._active and (wanted or layer == self.vision.feature_layer or layer in self.watched):
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
                self._alive = torch.arange(n, device=hidden.device)[None]
            seen = TowerLayer(
                index, self.vision.feature_layer, specials, self.vision.grid, self.vision.grid[0] * self.vision.grid[1],
                self._tiles[self._tile] if self._tiles else 1, bool(self._tiles),
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

    def _tile_by_tile(self, original: Callable[..., Any], pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The tower on each tile alone; the survivors' features go back to their places on the full grid."""
        if not self._active:
            return original(pixel_values, *args, **kwargs)
        outputs: list[Any] = []
        survivors: list[Tensor] = []
        self._by_tile = []
        N, specials = self.vision.grid[0] * self.vision.grid[1], self.vision.specials
        for self._tile, tile in enumerate(pixel_values.split(1)):
            self._alive, self._state, self._layers = None, {}, {}
            output = original(tile, *args, **kwargs)
            alive = self._survivors()
            survivors.append(alive[0])
            self._by_tile.append((alive, self._layers))
            rows = torch.cat([torch.arange(specials, device=tile.device), alive[0] + specials])
            outputs.append(hf.spread_hidden(output, self.vision.feature_layer + 1, rows, specials + N))
        self._alive = None
        self._kept = (
            torch.stack([torch.zeros(N, device=alive.device).scatter(0, alive, 1.0) for alive in survivors]) > 0
        )
        return hf.joined_outputs(outputs)

    def _survivors(self) -> Tensor:
        """(1, k): patches of the tile that has just run."""
        if self._alive is None:
            raise UnsupportedModel(
                f"{type(self.anatomy.model).__name__}: its vision tower runs without its layers' hooks"
            )
        return self._alive

    def _pack(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._packing = (args, kwargs)
        return original(*args, **kwargs)

    def _get_image_features(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.resting():
            return original(*args, **kwargs)
        self._layers, self._kept, self._packing = {}, None, None
        self._tiles = hf.tiles_per_tile(self.vision.owner, inspect.signature(original).bind(*args, **kwargs).arguments)
        N = self.vision.grid[0] * self.vision.grid[1]
        self.patches_per_image = []
        at = 0
        while at < len(self._tiles):
            self.patches_per_image.append(self._tiles[at] * N)
            at += self._tiles[at]
        self._active = True
        try:
            result = original(*args, **kwargs)
        finally:
            self._active = False
        if self.on_seen is not None:
            patches = self.vision.grid[0] * self.vision.grid[1]
            self.on_seen(
                Tower(self.vision.grid, self.vision.specials, self.vision.feature_layer, patches, self._layers)
            )
        if self.pruner is None and self.reducer is None:
            self._layers = {}
            return result
        keep = self._choose()  # (T, N) bool
        flat = self._to_rows(keep)
        total = sum(feature.shape[0] for feature in result.pooler_output)
        if flat.shape[0] != total:
            raise PromptError(f"image features have {total} rows but the keep mask has {flat.shape[0]}")
        self.keep = flat
        self._layers = {}
        return result

    def _choose(self) -> Tensor:
        """(T, N) bool: the patches that the tower and the reducer leave."""
        query = self._layers[self.vision.feature_layer][0]
        N = self.vision.grid[0] * self.vision.grid[1]
        keep = self._kept
        if keep is None:
            keep = torch.ones(query.shape[0], N, dtype=torch.bool, device=query.device)
        else:
            self.on_kept("tower", [row.nonzero()[:, 0].tolist() for row in keep])
        if self.reducer is None:
            return keep
        everything = torch.arange(N, device=keep.device).expand(keep.shape[0], -1)
        tiles = self._by_tile if self._kept is not None else [(everything, self._layers)]
        chosen = []
        for alive, layers in tiles:  # all tiles at once, or each with the patches that the tower left of it
            tower = Tower(self.vision.grid, self.vision.specials, self.vision.feature_layer, alive.shape[1], layers)
            index = self.reducer.keep_input(tower)
            chosen.append(torch.zeros(alive.shape[0], N, device=keep.device).scatter(1, alive.gather(1, index), 1.0))
        return torch.cat(chosen) > 0

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
        packed, _ = type(self.vision.owner).pack_image_features(self.vision.owner, *args, **kwargs)  # type: ignore[attr-defined]
        return torch.cat([rows[:, 0] for rows in packed]) >= 0.5
