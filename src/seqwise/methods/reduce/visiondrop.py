"""VisionDrop: reduce visual tokens in stages by visual attention alone; text has no say, and the rest is merged.

    REDUCE(X, s, M, D, C)    n tokens X in order, with scores s and metrics M
        dominant    the D tokens of largest s, in order
        targets     among the R = n - D others: number 0, step, 2 step, ..., C of them; step = max(1, floor(R / C))
        members     each other token goes to the target c of largest cosine of M
        contextual  X_c + mean of its members' X, 0 without members          a sum: norms about double
        output      dominant, then contextual

    encoder    s_j = sum_h A[h, CLS, j] of the feature layer, M = mean_h of its keys, X = its output, in front of the
               projector; CLS goes along as the first of the D dominant tokens
    stages     s_j = mean_h mean_i A[h, i, j] of the layer that comes, i: rows of the image, over all keys that they
               see; M = mean_h of its keys after RoPE, X = hidden states

Text rows are a bad judge of visual tokens: the last ones prefer the end of the image, and deep ones mix both kinds.
"Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment", arXiv 2506.22283.
The paper speaks of visual-to-visual attention in the encoder too; the official code reads its CLS row, and so does
this. A tower without CLS is scored by all its rows. Several images of a prompt are reduced each by its own rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import floor
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import UnsupportedModel
from seqwise.core.method import Method, budget_param, param
from seqwise.core.observe import received
from seqwise.core.plan import stage_space, stages_at
from seqwise.core.select import budget_count, top_k
from seqwise.core.towers import Merged, Tower
from seqwise.core.views import Stage
from seqwise.core.visible import Visible
from seqwise.methods.reduce.base import patch_rows

_AVERAGE, _TOKENS, _CONTEXTUAL = 32, (48, 35, 26, 19), (6, 5, 4, 3)  # the setting of LLaVA-1.5-7B


class Reduced(NamedTuple):
    """tokens: (..., D + C, d). origin: (..., D + C), the token that each was or grew from. member: (..., n), which of
    the D + C each token is in, -1 for none."""

    tokens: Tensor
    origin: Tensor
    member: Tensor


def reduce(X: Tensor, s: Tensor, M: Tensor, D: int, C: int) -> Reduced:
    """REDUCE: n tokens become D dominant ones in order and, behind them, C contextual ones in order.

    X: (..., n, d), s: (..., n), M: (..., n, m). Of equal scores the earlier token, of equal cosines the first target.
    Without C, the tokens that are not dominant are dropped. Cosines and means are taken in float32.

    Raises:
        ValueError: D or C is negative, or D + C > n.
    """
    n = X.shape[-2]
    if min(D, C, n - D - C) < 0:
        raise ValueError(f"reduce: D and C must be >= 0 with D + C <= {n}, got D = {D}, C = {C}")
    R = n - D
    dominant = top_k(s, D)  # (..., D)
    member = torch.full(s.shape, -1, device=X.device)
    member = member.scatter(-1, dominant, torch.arange(D, device=X.device).expand(dominant.shape))
    if not C:
        return Reduced(_rows(X, dominant), dominant, member)
    rest = (member >= 0).to(torch.int8).argsort(dim=-1, stable=True)[..., :R]  # (..., R)
    strided = torch.arange(0, R, max(1, R // C), device=X.device)[:C]
    targets = rest[..., strided]  # (..., C)
    own, m = _rows(X, rest), normalize(_rows(M, rest).float(), dim=-1)
    nearest = (m @ m[..., strided, :].mT).argmax(-1)  # (..., R)
    group = nearest.index_copy(-1, strided, torch.arange(C, device=X.device).expand(targets.shape))
    joins = one_hot(nearest, C).float().index_fill(-2, strided, 0)  # (..., R, C), targets join nothing
    mean = joins.mT @ own.float() / joins.sum(-2)[..., None].clamp(min=1)  # (..., C, d)
    contextual = _rows(X, targets) + mean.to(X.dtype)
    return Reduced(
        torch.cat([_rows(X, dominant), contextual], -2),
        torch.cat([dominant, targets], -1),
        member.scatter(-1, rest, D + group),
    )


def encoder_score(received: Tensor, specials: int = 1) -> Tensor:
    """s in the tower: attention that each patch receives, summed over heads, in float32.

    received: (..., h, specials + N), the CLS row of the feature layer's attention, `A[..., 0, :]`; of a tower without
    CLS the sum over all rows. The first `specials` columns are no patches. Returns (..., N).
    """
    return received[..., specials:].float().sum(-2)


def image_attention(
    q: Tensor, k: Tensor, image: tuple[int, int], real: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """s in the language model: mean attention of the image's rows to its tokens [start, stop): (B, stop - start) fp32.

    q: (B, H, n, D), k: (B, Hkv, n, D) of the prompt, after RoPE; Hkv divides H. The softmax is causal, over all keys,
    those before the image too; what comes behind the image has no part. real: (B, n) bool, False at padding. scale: of
    the logits, D^-0.5 by default.

    Raises:
        ValueError: the span is empty or outside the prompt.
    """
    start, stop = image
    if not 0 <= start < stop <= k.shape[-2]:
        raise ValueError(f"image_attention: image must satisfy 0 <= start < stop <= {k.shape[-2]}, got {image}")
    padding = None if real is None else real[:, :stop]
    visible = Visible.of(stop - start, stop, padding=padding, device=q.device)
    s = received(q[..., start:stop, :], k[..., :stop, :], visible=visible, scaling=scale)[..., start:]
    return s.mean(1) / (stop - start)


def key_metric(k: Tensor) -> Tensor:
    """M: keys (..., h, n, D) as the layer computes them (in the language model after RoPE), mean over heads."""
    return k.mean(-3)


def schedule(average: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens after the encoder and the three stages, and how many of them are contextual: the published setting (48,
    35, 26, 19 tokens with 6, 5, 4, 3 contextual ones, 32 on average over the layers), scaled to another average.

    Raises:
        ValueError: average < 1.
    """
    if average < 1:
        raise ValueError(f"schedule: average must be >= 1, got {average}")
    scaled = [[floor(x * average / _AVERAGE + 0.5) for x in numbers] for numbers in (_TOKENS, _CONTEXTUAL)]
    return tuple(max(1, x) for x in scaled[0]), tuple(scaled[1])


@dataclass(frozen=True)
class VisionDrop(Method):
    """Reduces each image behind the encoder and at stages inside the language model, by visual attention alone.

    budget: what stays of an image after the encoder and after each stage; one number stands for all of them. A count is
    split evenly over the tiles of an image, a share is one of the image's (tile's) visual tokens before any reduction.
    contextual: how many of these are merged ones, likewise; at most all but one. prune_after: the stages, 1-based: the
    output of that layer is reduced; none is VisionZip. A stage that gets no more tokens than it may leave changes
    nothing. keep_cls: the tower's CLS token, where there is one, takes the place of one dominant token. positions:
    "renumber" counts anew after each stage, as the official code does; "keep" leaves survivors their positions.
    Models of tiles (LLaVA-NeXT) cut empty borders off the grid of an image, with the tokens that stand there.
    """

    budget: int | float | tuple[int | float, ...] = budget_param(_TOKENS, "tokens of an image that stay, per stage")
    contextual: int | float | tuple[int | float, ...] = param(_CONTEXTUAL, ge=0, doc="merged tokens among them")
    prune_after: tuple[int, ...] = param((8, 16, 24), ge=1, doc="1-based layers whose output is reduced")
    keep_cls: bool = True
    positions: Literal["renumber", "keep"] = "renumber"

    slots: ClassVar[tuple[str, ...]] = ("input.rows", "layer.rows")

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.prune_after) != sorted(set(self.prune_after)):
            raise ValueError(f"VisionDrop.prune_after must ascend without repetition, got {self.prune_after!r}")
        stages = len(self.prune_after) + 1
        for name, value in (("budget", self.budget), ("contextual", self.contextual)):
            if isinstance(value, tuple) and len(value) != stages:
                raise ValueError(
                    f"VisionDrop.{name} must have a number for the encoder and one per stage ({stages}), got {value!r}"
                )
        for number in range(stages):
            k, C = _at(self.budget, number), _at(self.contextual, number)
            if (isinstance(C, float) and C >= 1) or (type(k) is type(C) and k <= C):
                raise ValueError(f"VisionDrop.contextual must be < 1.0 and < budget ({k!r}), got {C!r}")

    @classmethod
    def averaging(cls, average: int) -> VisionDrop:
        """The published schedule, scaled to so many visual tokens on average over 32 layers (see `schedule`)."""
        budget, contextual = schedule(average)
        return cls(budget=budget, contextual=contextual)

    def identity(self) -> Method:
        return replace(self, budget=1.0, contextual=0)

    def needs(self) -> set[str]:
        renumbers = self.positions == "renumber" and self.prune_after
        return {"vision tower", "RoPE", "1-D positions"} if renumbers else {"vision tower"}

    def check(self, anatomy: Anatomy) -> None:
        name, vision = type(anatomy.model).__name__, anatomy.vision
        assert vision is not None  # needs() asks for it
        if vision.merge > 1 or not vision.sized:
            raise UnsupportedModel(
                f"VisionDrop merges features of single patches in front of the projector; {name} makes visual tokens "
                "of several patches or of images of any size: use FoPru there"
            )
        if self.prune_after and self.prune_after[-1] >= len(anatomy.layers):
            raise UnsupportedModel(
                f"VisionDrop.prune_after must be < the model's {len(anatomy.layers)} layers, got {self.prune_after!r}; "
                "choose stages of this model"
            )

    def search_space(self, anatomy: Anatomy, budget: float) -> dict[str, tuple[float, float]]:
        return stage_space(len(self.prune_after) + 1, len(anatomy.layers), budget, from_input=True)

    def planned(self, point: Mapping[str, float], anatomy: Anatomy, budget: float) -> Method:
        """A seventh of each stage's tokens are contextual ones, about as in the published setting."""
        stages, left = stages_at(point, (0, *self.prune_after), len(anatomy.layers), budget, from_input=True)
        contextual = tuple(share / 7 for share in left)
        return replace(self, budget=left, contextual=contextual, prune_after=stages[1:])

    def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
        return self.prune_after  # behind the 1-based layer k is in front of the 0-based layer k

    def keep_input(self, tower: Tower) -> Tensor | Merged:
        N, T = tower.patches, len(tower.tiles)
        everything = torch.arange(N, device=tower.projected.device)
        sizes = {tiles: self._sizes(0, N, tiles) for tiles in tower.tiles.unique().tolist()}
        width = min(N, max(k for k, _ in sizes.values()))
        if min(k for k, _ in sizes.values()) >= N:
            return everything.expand(T, -1)
        cells, member = everything[:width].repeat(T, 1), everything.repeat(T, 1)
        features = tower.projected[:, :width].clone()  # as they are, where a tile has no more than may stay
        for tiles, (k, C) in sizes.items():
            if k < N:
                at = (tower.tiles == tiles).nonzero()[:, 0]
                made = self._encoded(tower, at, k, C)
                last = torch.arange(width, device=at.device).clamp(max=k - 1)  # short tiles say their last token again
                cells[at], features[at], member[at] = made.cells[:, last], made.features[:, last], made.member
        return Merged(cells, features, member)

    def _encoded(self, tower: Tower, at: Tensor, k: int, C: int) -> Merged:
        """Tiles `at` as k tokens each."""
        assert tower.features is not None  # check() asks for it
        specials = tower.specials
        cls = int(self.keep_cls and specials > 0)
        X = tower.features[at]  # (t, specials + N, d)
        s = encoder_score(tower.received(rows="cls" if specials else "all")[at], specials)
        M = key_metric(tower.layers[tower.feature_layer][1][at])[:, specials:]
        made = reduce(X[:, specials:], s, M, k - C - cls, C)
        places = made.origin
        if cls:  # it is no patch: it takes the first cell that nobody needs
            free = torch.zeros_like(s).scatter(-1, places, 1.0).argmin(-1, keepdim=True)
            places = torch.cat([free, places], -1)
        features = tower.project(torch.cat([X[:, :cls], made.tokens], 1))
        return Merged(places.sort(-1).values, features, torch.where(made.member >= 0, made.member + cls, -1))

    def keep_rows(self, stage: Stage) -> Tensor | None:
        number = 1 + self.prune_after.index(stage.layer)
        hidden, keep = stage.hidden.clone(), stage.live.clone()
        member = torch.full_like(stage.image, -1)
        tokens = patch_rows(stage)
        for image, patches in enumerate(stage.patches.T.tolist()):
            rows = tokens & (stage.image == image)  # (B, r)
            sizes = [self._sizes(number, N) for N in patches]
            here = rows.sum(-1).tolist()
            cut = [b for b, (k, _) in enumerate(sizes) if k < here[b]]
            if not cut:
                continue
            s = stage.received(rows).mean(1)  # (B, r); the mean over rows has the same order
            M = key_metric(stage.projections()[1])
            for b in cut:
                k, C = sizes[b]
                at = rows[b].nonzero()[:, 0]  # (n,)
                made = reduce(stage.hidden[b, at], s[b, at], M[b, at], k - C, C)
                places = at[made.origin.sort().values]
                keep[b] &= stage.image[b] != image
                keep[b, places] = True
                hidden[b, places] = made.tokens
                member[b, at] = torch.where(made.member >= 0, places[made.member.clamp(min=0)], -1)
        if bool((keep == stage.live).all()):
            return None
        stage.replace(hidden, member)
        return keep

    def _sizes(self, number: int, N: int, tiles: int = 1) -> tuple[int, int]:
        """Tokens that stay and contextual ones among them, of N at the encoder (0) or at a stage."""
        budget, contextual = _at(self.budget, number), _at(self.contextual, number)
        k = budget_count(budget, N) if isinstance(budget, float) else max(1, budget // tiles)
        C = floor(contextual * N + 1e-9) if isinstance(contextual, float) else contextual // tiles
        return k, min(C, k - 1)


def _at(value: int | float | tuple[int | float, ...], number: int) -> int | float:
    return value[number] if isinstance(value, tuple) else value


def _rows(X: Tensor, index: Tensor) -> Tensor:
    """Rows index (..., k) of X (..., n, d)."""
    return X.gather(-2, index[..., None].expand(*index.shape, X.shape[-1]))
