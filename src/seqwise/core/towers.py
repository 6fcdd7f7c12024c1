"""The vision tower: observe it, shorten it, merge its tokens, and tell what the language model's rows show.

The tower may run on fewer patches; the survivors' features then go back to their places on the full grid, so that a
model's own packing (unpadding, newline rows) works unchanged. The same packing, applied to keep masks, scores and grid
cells, tells which image rows of the language model's input go and what those that stay are.
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
from seqwise.core.errors import PromptError, SlotConflict, UnsupportedModel
from seqwise.core.method import Method
from seqwise.core.observe import received
from seqwise.core.visible import Visible

Projections = tuple[Tensor, Tensor, Tensor, float]  # query, key, value (T, h, specials + patches, d), scaling


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
    """What the tower computed for tiles of one size: all tiles of a forward, or the frames of one image or video where
    these differ in size."""

    grid: tuple[int, int]  # of visual tokens
    specials: int
    feature_layer: int
    patches: int  # N visual tokens that the tower left of each tile
    layers: dict[int, Projections]
    tiles: Tensor  # (T,) how many tiles the image of each has
    pixels: Tensor | None  # (T, 3, H, W) as the tower got them; None of images that differ in size
    features: Tensor | None  # (T, specials + N, d) output of the feature layer, specials first; None where merged
    projected: Tensor  # (T, N, D): the visual tokens as the language model gets them
    _project: Callable[[Tensor], Tensor]
    _text: Callable[[], Tensor]
    groups: Tensor | None = None  # (T or 1, N, m) rows of the tower behind each visual token, None: one each
    live: Tensor | None = None  # (T, specials + patches), where some patches are padding

    @property
    def merged(self) -> bool:
        """Several patches are one visual token."""
        return self.groups is not None

    def project(self, x: Tensor) -> Tensor:
        """The projector on features (..., d) of the tower: (..., D)."""
        return self._project(x)

    def text(self) -> Tensor:
        """(T, D): the mean of the input embeddings of all text tokens of each tile's sample."""
        return self._text()

    def received(self, rows: str = "all", layer: int | None = None) -> Tensor:
        """Attention received in a layer (default the feature layer): (T, h, specials + N) fp32, summed over `rows`:
        "all" or "cls"; where patches are merged, each token's mean over its patches."""
        query, key, _, scaling = self.layers[self.feature_layer if layer is None else layer]
        visible = Visible.of(query.shape[2], key.shape[2], causal=False, padding=self.live, device=query.device)
        take = slice(0, 1) if rows == "cls" else None
        found = received(query, key, visible=visible, rows=take, scaling=scaling)
        if self.groups is None:
            return found
        patches, groups = found[..., self.specials :], self.groups
        each = patches[..., groups[0]] if groups.shape[0] == 1 else _of_tiles(patches, groups)
        return torch.cat([found[..., : self.specials], each.mean(-1)], -1)


def _of_tiles(patches: Tensor, groups: Tensor) -> Tensor:
    """(T, h, P) at (T, N, m): (T, h, N, m)."""
    T, h, _ = patches.shape
    index = groups.flatten(1)[:, None].expand(-1, h, -1)
    return patches.gather(2, index).view(T, h, *groups.shape[1:])


@dataclass
class Merged:
    """The tokens that a reducer makes of each tile, in sequence.

    cells: (T, k) ascending, the places among the tile's N tokens that they take. features: (T, k, D), of the language
    model's width. member: (T, N) int64, which of the k each token went into, -1 for none.
    """

    cells: Tensor
    features: Tensor
    member: Tensor


@dataclass
class Found:
    """What the language model gets of the images (or videos) of one forward: rows in order, all images together."""

    counts: list[int]  # rows of each image
    patches: list[int]  # visual tokens of each image's tiles, before the model packs them
    tile: Tensor  # (rows,) each; -1 where unknown
    row: Tensor
    column: Tensor
    keep: Tensor | None = None  # (rows,) bool
    features: Tensor | None = None  # (rows, D), where tokens were merged
    member: Tensor | None = None  # (rows,) the row that each was merged into, -1 for none
    scores: dict[str, Tensor] = field(default_factory=dict)  # (rows,) each


@dataclass
class TowerDriver:
    """Hooks of one attached run on a model's vision side."""

    anatomy: Anatomy
    pruner: Method | None  # claims tower.rows
    reducer: Method | None  # claims input.rows
    watchers: list[Method]  # define `watch_tower`
    run: Any
    on_kept: Callable[[str, list[list[int]]], None]
    found: dict[str, Found] = field(default_factory=dict)  # "image", "video": for the next rows of a prompt
    _layers: dict[int, list[Projections]] = field(default_factory=dict)  # one entry per call of the layer's attention
    _feature: Tensor | None = None
    _live: Tensor | None = None
    _pixels: Tensor | None = None
    _state: dict[str, Tensor] = field(default_factory=dict)
    _alive: Tensor | None = None  # (1, k) patches of the tile at hand that are left
    _kept: Tensor | None = None  # (T, N) bool, of all tiles
    _by_tile: list[tuple[Tensor, dict[int, Projections], Tensor | None]] = field(default_factory=list)
    _tiles: list[int] = field(default_factory=list)  # per tile, how many its image has
    _tile: int = 0
    _packing: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    _active: bool = False

    def __post_init__(self) -> None:
        reads = self.pruner is not None or bool(self.watchers)
        self.by_tower = self.reducer is not None and type(self.reducer).keep_input is not Method.keep_input
        self.observes = reads or self.by_tower
        members = (*self.watchers, *([self.reducer] if self.reducer is not None else []))
        self.watched = frozenset(layer for part in members for layer in part.watched_tower(self.anatomy) or ())

    @property
    def vision(self) -> Vision:
        assert self.anatomy.vision is not None
        return self.anatomy.vision

    def install(self) -> list[Callable[[], None]]:
        """Hooks and instance overrides; returns the undos."""
        vision = self.vision
        name = type(self.anatomy.model).__name__
        if self.pruner is not None and not vision.prunable:
            raise UnsupportedModel(
                f"{name}: its vision tower cannot be shortened (several feature layers, CLS among the features, or a "
                "patch merger); use a method that acts at the language model's input or between its layers"
            )
        if self.observes and not vision.patchwise:
            raise UnsupportedModel(
                f"{name}: its visual tokens are not patches (several feature layers, or CLS among the features); use a "
                "method that acts between decoder layers"
            )
        undos = []
        if self.observes:
            undos.append(hf.route_attention(list(vision.tower.modules())))
            undos.append(vision.tower.register_forward_pre_hook(self._before_tower, with_kwargs=True).remove)
            for i, layer in enumerate(vision.layers):
                undos.append(layer.register_forward_hook(self._after_layer(i)).remove)
        if self.pruner is not None:
            undos.append(self._override("forward", self._tile_by_tile, vision.tower))
        undos.append(self._override("get_image_features", functools.partial(self._features, "image")))
        if hasattr(vision.owner, "get_video_features"):
            undos.append(self._override("get_video_features", functools.partial(self._features, "video")))
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
        shown = None
        if mask is not None:
            if mask.dim() != 2 or self.pruner is not None:
                raise UnsupportedModel(f"{type(self.anatomy.model).__name__}: a masked vision tower cannot be observed")
            shown = mask.bool()[:, None, None]  # (T, 1, 1, n)
        wanted = self.pruner is not None and layer <= self.vision.feature_layer
        if self._active and (wanted or layer == self.vision.feature_layer or layer in self.watched):
            self._layers.setdefault(layer, []).append((query, key, value, scaling))
            self._live = mask
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=shown, scale=scaling)

    def _before_tower(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._active and self._pixels is None:
            self._pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]

    def _after_layer(self, index: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            if not self._active or index > self.vision.feature_layer:
                return None
            hidden = hf.hidden_of(output)  # (T, specials + n, d)
            if index == self.vision.feature_layer:
                self._feature = hidden
            if self.pruner is None:
                return None
            query, key, value, scaling = self._layers[index][-1]
            if index < self.vision.feature_layer:
                del self._layers[index]  # only the feature layer's tensors outlive their layer
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
            hidden = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
            if index == self.vision.feature_layer:
                self._feature = hidden
            return hf.with_hidden(output, hidden)

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
            self._by_tile.append((alive, self._joined(), self._feature))
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

    def _joined(self) -> dict[int, Projections]:
        """The tensors of each layer; some towers call their attention once per image or window, row after row."""
        joined = {}
        for layer, calls in self._layers.items():
            if len(calls) == 1:
                joined[layer] = calls[0]
            else:
                query, key, value = (torch.cat(tensors, 2) for tensors in list(zip(*calls, strict=True))[:3])
                joined[layer] = (query, key, value, calls[0][3])
        return joined

    def _pack(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._packing = (args, kwargs)
        return original(*args, **kwargs)

    # what became of the images

    def _features(self, kind: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.run.engine.plain:
            return original(*args, **kwargs)
        self._layers, self._kept, self._packing = {}, None, None
        self._feature = self._live = self._pixels = None
        arguments = inspect.signature(original).bind(*args, **kwargs).arguments
        self._tiles = hf.tiles_per_tile(self.vision.owner, arguments)
        self._active = True
        try:
            result = original(*args, **kwargs)
        finally:
            self._active = False
        features = list(result.pooler_output)  # per image (rows, D)
        grids = hf.image_grids(arguments)
        if self.observes and kind == "video" and grids is None:
            raise UnsupportedModel(
                f"{type(self.anatomy.model).__name__}: its video features are pooled, so no visual token is a patch; "
                "give the frames as images"
            )
        found = self._located(features, grids)
        if self.observes:
            towers = self._towers(features, grids, kind, found)
            self._watch(towers, found)
            if self.pruner is not None or self.by_tower:
                self._reduce(towers, features, found)
        self._layers, self._by_tile = {}, []
        self.found[kind] = found
        return result

    def _located(self, features: list[Tensor], grids: Tensor | None) -> Found:
        """Where the language model's rows come from: image by image, row by row."""
        device = features[0].device
        rows, columns = self.vision.grid
        N, counts = rows * columns, [feature.shape[0] for feature in features]
        if grids is not None:
            merge = self.vision.merge
            cells = [_raster(frames, (high // merge, wide // merge), device) for frames, high, wide in grids.tolist()]
            return _found(counts, counts, cells)
        if self._packing is not None:
            split = self._images()
            kinds = [torch.zeros(count, N, 2, device=device) for count in split]
            for kind in kinds:
                kind[1:, :, 0] = 1
            packed = self._packed(kinds, torch.tensor([0.0, 1.0], device=device))
            cells = [_unpacked(marks[:, 0] > 0.5, marks[:, 1] > 0.5, columns) for marks in packed]
            return _found(counts, [count * N for count in split], cells)
        if N and all(count % N == 0 for count in counts):
            cells = [_raster(count // N, (rows, columns), device) for count in counts]
            if self.vision.merge > 1:  # each tile has placeholders of its own
                counts = [N] * (sum(counts) // N)
            return _found(counts, counts, cells)
        unknown = torch.full((sum(counts),), -1, device=device)
        return Found(counts, counts, unknown, unknown, unknown)

    def _images(self) -> list[int]:
        """Tiles of each packed image."""
        assert self._packing is not None
        args, kwargs = self._packing
        return [feature.shape[0] for feature in (args[0] if args else kwargs["image_features"])]

    def _packed(self, features: list[Tensor], newline: Tensor) -> list[Tensor]:
        """Numbers of each image's patches (tiles, N, C) through the model's own packing: (rows, C) per image, with
        `newline` (C,) at newline rows."""
        assert self._packing is not None
        args, kwargs = self._packing
        if args:
            args = (features, *args[1:])
        else:
            kwargs = {**kwargs, "image_features": features}
        if kwargs.get("image_newline") is not None:
            kwargs = {**kwargs, "image_newline": newline}
        pack = type(self.vision.owner).pack_image_features  # type: ignore[attr-defined]
        return list(pack(self.vision.owner, *args, **kwargs)[0])

    def _towers(self, features: list[Tensor], grids: Tensor | None, kind: str, found: Found) -> list[Tower]:
        """The tiles that ran, in batches of one size."""
        vision = self.vision
        if self._kept is not None:  # one by one, each with the patches that the pruner left
            projected = self._projected(features)
            return [
                self._tower(layers, feature, kind, found, alive.shape[1], t, projected[t][alive[0]][None])
                for t, (alive, layers, feature) in enumerate(self._by_tile)
            ]
        layers = self._joined()
        if grids is None:
            projected = self._projected(features)
            groups = None
            if vision.merge > 1:
                groups = hf.merged_patches(vision.owner, vision.grid, vision.merge)[None].to(projected.device)
            tower = self._tower(layers, self._feature, kind, found, projected.shape[1], 0, projected)
            tower.groups = groups
            return [tower]
        return self._sized_apart(layers, features, grids, kind, found)

    def _sized_apart(
        self, layers: dict[int, Projections], features: list[Tensor], grids: Tensor, kind: str, found: Found
    ) -> list[Tower]:
        """One tower view per image or video, its frames as tiles; groups of patches come in the tower's own order."""
        vision, merge = self.vision, self.vision.merge
        order = hf.token_order(vision.tower, grids)
        lengths = grids.prod(-1).tolist()
        towers, before = [], 0
        split = {layer: [x.split(lengths, 2) for x in tensors[:3]] for layer, tensors in layers.items()}
        for i, (frames, high, wide) in enumerate(grids.tolist()):
            grid = (high // merge, wide // merge)
            N = grid[0] * grid[1]
            own = {}
            for layer, (query, key, value) in split.items():
                tiles = [x[i][0].unflatten(1, (frames, -1)).transpose(0, 1) for x in (query, key, value)]
                own[layer] = (*tiles, layers[layer][3])
            at = torch.arange(N, device=features[i].device).expand(frames, N)
            if order is not None:
                start = torch.arange(frames)[:, None] * N
                at = (order[before : before + frames * N].view(frames, N) - before - start).to(at.device)
            tower = self._tower(own, None, kind, found, N, i, features[i].view(frames, N, -1), grid)
            tower.groups = at[..., None] * merge**2 + torch.arange(merge**2, device=at.device)
            towers.append(tower)
            before += frames * N
        return towers

    def _tower(
        self,
        layers: dict[int, Projections],
        feature: Tensor | None,
        kind: str,
        found: Found,
        patches: int,
        first: int,
        projected: Tensor,
        grid: tuple[int, int] | None = None,
    ) -> Tower:
        vision, T = self.vision, projected.shape[0]
        tiles = self._tiles[first : first + T] if self._tiles else [1] * T
        return Tower(
            grid=grid or vision.grid,
            specials=vision.specials,
            feature_layer=vision.feature_layer,
            patches=patches,
            layers=layers,
            tiles=torch.tensor(tiles, device=projected.device),
            pixels=None if grid is not None or self._pixels is None else self._pixels[first : first + T],
            features=feature if vision.merge == 1 else None,
            projected=projected,
            _project=self._project,
            _text=lambda: self._texts(kind, found, first, T, grid is not None),
            live=self._live,
        )

    def _projected(self, features: list[Tensor]) -> Tensor:
        """(T, N, D): the visual tokens of all tiles, before the model packs them."""
        if self._packing is not None:
            args, kwargs = self._packing
            return torch.cat(list(args[0] if args else kwargs["image_features"]))
        N = self.vision.grid[0] * self.vision.grid[1]
        return torch.cat(features).unflatten(0, (-1, N))

    def _project(self, x: Tensor) -> Tensor:
        if self.vision.projector is None:
            raise UnsupportedModel(f"{type(self.anatomy.model).__name__} has no projector that seqwise knows")
        return self.vision.projector(x)

    def _texts(self, kind: str, found: Found, first: int, count: int, whole: bool) -> Tensor:
        """(T, D): the mean input embedding of the text of each tile's sample."""
        engine = self.run.engine
        ids, mask = engine.input_ids, engine.input_mask
        if self.run.announced is not None:  # generate encodes images before its first forward
            ids, mask = self.run.announced.ids, self.run.announced.mask
        if ids is None:
            raise PromptError("the prompt's text is unknown (it came as embeddings); give input_ids")
        token = self.vision.image_token if kind == "image" else self.vision.video_token
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[1] :].bool()
        embeds = self.anatomy.model.get_input_embeddings()(ids)  # type: ignore[operator]
        text = real & ~torch.isin(ids, torch.tensor(self.vision.tokens, device=ids.device))  # (B, n)
        mean = (embeds * text[..., None]).sum(1) / text.sum(1, keepdim=True).clamp(min=1)  # (B, D)
        per_sample = (ids == token).sum(-1)  # placeholders
        ends, samples, at = per_sample.cumsum(0), [], 0
        for rows in found.counts:
            samples.append(int((ends > at).nonzero()[0]))
            at += rows
        if whole:  # a view per image, its frames as tiles
            return mean[samples[first]].expand(count, -1)
        per_tile = [s for s, n in zip(samples, self._tiles_of(found), strict=True) for _ in range(n)]
        return mean[per_tile[first : first + count]]

    def _tiles_of(self, found: Found) -> list[int]:
        N = self.vision.grid[0] * self.vision.grid[1]
        return [max(1, patches // N) for patches in found.patches]

    def _watch(self, towers: list[Tower], found: Found) -> None:
        for part in self.watchers:
            told = [part.watch_tower(tower, self.run) for tower in towers]
            for name in (told[0] or {}) if told else ():
                scores = [values[name].float() for values in told if values is not None]  # (T, N) each
                if self._kept is not None:  # places on the full grid
                    full = torch.zeros(1, self._kept.shape[1], device=self._kept.device)
                    alive = [tile[0] for tile in self._by_tile]
                    scores = [full.scatter(1, at, score) for at, score in zip(alive, scores, strict=True)]
                found.scores[name] = self._to_rows(scores, newline=0.0)

    def _to_rows(self, values: list[Tensor], newline: float) -> Tensor:
        """Numbers of patches (T, N) of all towers as ones of the language model's rows: (rows,)."""
        if self._packing is None:
            return torch.cat([value.flatten() for value in values])
        split = torch.cat(values)[..., None].split(self._images())
        return torch.cat(self._packed(list(split), values[0].new_tensor([newline])))[:, 0]

    def _reduce(self, towers: list[Tower], features: list[Tensor], found: Found) -> None:
        """What the pruner and the reducer leave and make."""
        device = features[0].device
        keeps, merged = [], []
        if self._kept is not None:
            self.on_kept("tower", [row.nonzero()[:, 0].tolist() for row in self._kept])
        for t, tower in enumerate(towers):
            T, n = tower.projected.shape[:2]
            chosen = self.reducer.keep_input(tower) if self.by_tower and self.reducer is not None else None
            if isinstance(chosen, Merged):
                merged.append((tower, chosen))
                chosen = chosen.cells
            keep = torch.ones(T, n, device=device)
            if chosen is not None and chosen.dtype == torch.bool:
                keep = chosen.float()
            elif chosen is not None:
                keep = torch.zeros(T, n, device=device).scatter(1, chosen, 1.0)
            if self._kept is not None:  # places on the full grid
                alive = self._by_tile[t][0]
                keep = torch.zeros(1, self._kept.shape[1], device=device).scatter(1, alive, keep)
            keeps.append(keep)
        everything = all(bool(keep.all()) for keep in keeps)
        # newline rows carry the grid: they go as soon as any patch goes
        found.keep = self._to_rows(keeps, newline=float(everything)) >= 0.5
        if merged:
            self._put_merged(merged, features, found)

    def _put_merged(self, merged: list[tuple[Tower, Merged]], features: list[Tensor], found: Found) -> None:
        if self._kept is not None:
            raise SlotConflict(f"{self.reducer} merges whole grids of patches, which {self.pruner} shortens")
        grids, members, before = [], [], 0
        for tower, made in merged:
            T, N, D = tower.projected.shape
            index = made.cells[..., None].expand(-1, -1, D)
            grids.append(tower.projected.scatter(1, index, made.features.to(tower.projected.dtype)))
            start = before + torch.arange(T, device=index.device)[:, None] * N
            cell = made.cells.gather(1, made.member.clamp(min=0)) + start
            members.append(torch.where(made.member >= 0, cell, -1).flatten())
            before += T * N
        if self._packing is None:
            found.features = torch.cat([grid.flatten(0, 1) for grid in grids])
            found.member = torch.cat(members)
            return
        newline: Any = self._packing[1].get("image_newline")
        packed = self._packed(list(torch.cat(grids).split(self._images())), newline)
        found.features = torch.cat(packed)


def _found(counts: list[int], patches: list[int], cells: list[tuple[Tensor, Tensor, Tensor]]) -> Found:
    tile, row, column = (torch.cat(facts) for facts in zip(*cells, strict=True))
    return Found(counts, patches, tile, row, column)


def _raster(tiles: int, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tile, row and column of the tokens of so many tiles."""
    at = torch.arange(tiles * grid[0] * grid[1], device=device)
    inside = at % (grid[0] * grid[1])
    return at // (grid[0] * grid[1]), inside // grid[1], inside % grid[1]


def _unpacked(joint: Tensor, newline: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tile, row and column of one packed image's rows: its overview first (tile 0), then line by line the joint map of
    its tiles (tile 1). joint, newline: (rows,) bool; newline tokens have column -1."""
    at = torch.arange(len(joint), device=joint.device)
    overview = int((~joint & ~newline).sum())
    first = torch.nn.functional.pad(newline[:-1], (1, 0))  # of a line
    first = first | (at == overview)
    column = at - torch.where(first, at, 0).cummax(0).values
    tile = torch.where(at < overview, 0, 1)
    row = torch.where(at < overview, at // columns, newline.long().cumsum(0) - newline.long())
    column = torch.where(at < overview, at % columns, torch.where(newline, -1, column))
    return tile, row, column
