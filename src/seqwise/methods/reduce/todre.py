"""ToDRE: keep diverse visual tokens at the language model's input, and drop all of them once text stops looking.

Stage 1, X (n, D) the visual tokens as the language model gets them, in unit length, p a pivot, C = {p}:

    s_j = sum_{c in C} X_j . X_c           add argmin_j s_j to C, until |C| = k           (max-sum of distances)
    s_j = max_{c in C} X_j . X_c           likewise                                       (k-center)

Stage 2, A the attention of layer l averaged over heads, T the text rows, V the visual rows:

    r_tv = sum_{i in T, j in V} A_ij / sum_{i in T, j} A_ij
    r_vt = sum_{i in V, j in T} A_ij / sum_{i in V, j} A_ij
    r_tv < tau and r_vt < tau: layers l + 1, ... run and cache no visual row

p is the token that CLS attends to most in the tower's last layer. Ranking all tokens by attention would prefer late
positions and near-copies of one another; distances do not.
"ToDRE: Visual Token Pruning via Diversity and Task Awareness for Efficient Large Vision-Language Models", arXiv
2505.18757, later "Effective Visual Token Pruning via Token Diversity and Task Relevance". Its first version names
stage 1 greedy k-center, its second states max-sum, which is the default here.
Ours: survivors keep their order; l = floor(7 L / 8) counts from 0; without a CLS token p is the token nearest to the
mean; text in front of the first image is the system prompt, unless `system` counts its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import UnsupportedModel
from seqwise.core.method import Method, budget_param, param
from seqwise.core.run import Run
from seqwise.core.select import budget_count, top_k
from seqwise.core.towers import Tower
from seqwise.core.views import Stage
from seqwise.methods.reduce.base import patch_rows, rows_of_images, with_newlines

TIE = 1e-6  # similarities that differ by less are equal


def central(X: Tensor) -> Tensor:
    """The token nearest to the mean of all, X (..., n, D) -> (...,) int64: the pivot where there is no CLS token."""
    distance = (X.float() - X.float().mean(-2, keepdim=True)).norm(dim=-1)  # (..., n)
    return top_k(-distance, 1)[..., 0]


def diverse(X: Tensor, k: int, pivot: int | Tensor, objective: Literal["maxsum", "kcenter"] = "maxsum") -> Tensor:
    """C: the pivot and greedily the tokens least similar to those chosen, (..., min(k, n)) ascending.

    X: (..., n, D), of any length each; pivot: (...,) index. objective: the least sum of cosines to the chosen
    ("maxsum") or the least largest one ("kcenter"). fp32; similarities (for the sum: on average over the chosen)
    within 1e-6 are equal, and the earlier token wins. Time O(k n D), memory O(n D). C of k is part of C of k + 1.

    Raises:
        ValueError: k < 1, or an unknown objective.
    """
    if k < 1:
        raise ValueError(f"diverse: k must be >= 1, got {k}")
    if objective not in ("maxsum", "kcenter"):
        raise ValueError(f"diverse: objective must be 'maxsum' or 'kcenter', got {objective!r}")
    X = normalize(X.float(), dim=-1)
    *batch, n, D = X.shape
    at = torch.arange(n, device=X.device)
    c = torch.as_tensor(pivot, device=X.device).expand(batch)[..., None]  # (..., 1)
    chosen = at == c  # (..., n)
    s = torch.full((*batch, n), 0.0 if objective == "maxsum" else -torch.inf, device=X.device)
    for size in range(1, min(k, n)):
        x = X.gather(-2, c[..., None].expand(*batch, 1, D))  # (..., 1, D)
        similar = (X @ x.mT)[..., 0]  # (..., n)
        s = s + similar if objective == "maxsum" else torch.maximum(s, similar)
        free = s.masked_fill(chosen, torch.inf)  # only here: an infinite s would stay so
        tied = free <= free.amin(-1, keepdim=True) + TIE * (size if objective == "maxsum" else 1)
        c = torch.where(tied, at, n).amin(-1, keepdim=True)
        chosen = chosen | (at == c)
    return chosen.nonzero()[:, -1].view(*batch, -1)


def relevance(from_text: Tensor, from_visual: Tensor, text: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
    """(r_tv, r_vt), (...,) each: the share of their attention that text rows give to visual tokens, and the reverse.

    from_text, from_visual: (..., n) attention averaged over heads, summed over the rows T and over the rows V, i.e.
    `A[..., T, :].sum(-2)`; text, visual: (..., n) bool, T and V. Without rows a share is 0.
    """
    tiny = torch.finfo(torch.float32).tiny
    r_tv = (from_text * visual).sum(-1) / from_text.sum(-1).clamp(min=tiny)
    r_vt = (from_visual * text).sum(-1) / from_visual.sum(-1).clamp(min=tiny)
    return r_tv, r_vt


@dataclass(frozen=True)
class ToDRE(Method):
    """Prunes each image's tokens to a diverse subset, and drops all visual tokens behind a late decoder layer.

    All tiles of an image compete; newline tokens go as soon as any patch of their image does. check_layer: l, 0-based,
    one or several of which the first that passes decides, None for floor(7 L / 8). tau: 0 leaves stage 2 out. A prompt
    that ends with an image keeps it. pivot_layer: 0-based tower layer whose CLS attention finds the pivot, None for
    the last. system: tokens of the system prompt at the prompt's start, which stage 2 counts as no text; None takes
    all in front of the first image.
    """

    budget: int | float = budget_param(0.25, "visual tokens kept of each image")
    objective: Literal["maxsum", "kcenter"] = "maxsum"
    tau: float = param(0.1, ge=0, doc="share of attention below which the other modality counts as unseen")
    check_layer: int | tuple[int, ...] | None = param(None, ge=0, doc="0-based decoder layers")
    pivot_layer: int | None = param(None, ge=0, doc="0-based tower layer")
    system: int | None = param(None, ge=0, doc="tokens of the system prompt")

    slots: ClassVar[tuple[str, ...]] = ("input.rows", "layer.rows")
    positions: ClassVar[str] = "keep"  # behind layer l later tokens count as before

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.check_layer == ():
            raise ValueError("ToDRE.check_layer must name at least one layer, got (); tau=0.0 leaves stage 2 out")

    def identity(self) -> Method:
        return replace(self, budget=1.0, tau=0.0)

    def needs(self) -> set[str]:
        return {"vision tower"}

    def check(self, anatomy: Anatomy) -> None:
        vision, L = anatomy.vision, len(anatomy.layers)
        assert vision is not None
        if max(self.stages(anatomy), default=0) >= L:
            raise UnsupportedModel(
                f"ToDRE.check_layer must be < {L - 1} on this model of {L} layers, or no layer is left to do without "
                f"visual tokens; {self.check_layer!r} means {self._checked(L)}. Give check_layer, or tau=0.0 for stage "
                "1 alone"
            )
        if self.pivot_layer is None:
            return
        if not vision.specials:
            raise UnsupportedModel(
                f"ToDRE.pivot_layer needs a CLS token, which {type(vision.tower).__name__} has not; with None the "
                "token nearest to the mean is the pivot"
            )
        if self.pivot_layer >= len(vision.layers):
            raise UnsupportedModel(
                f"ToDRE.pivot_layer must be < the tower's {len(vision.layers)} layers, got {self.pivot_layer}"
            )

    def _checked(self, L: int) -> tuple[int, ...]:
        """The layers l, ascending."""
        if self.check_layer is None:
            return (7 * L // 8,)
        return (self.check_layer,) if isinstance(self.check_layer, int) else tuple(sorted(set(self.check_layer)))

    def watched_tower(self, anatomy: Anatomy) -> tuple[int, ...] | None:
        vision = anatomy.vision
        if vision is None or not vision.specials:
            return None
        return (len(vision.layers) - 1 if self.pivot_layer is None else self.pivot_layer,)

    def watch_tower(self, tower: Tower, run: Run) -> dict[str, Tensor]:
        (layer,) = self.watched_tower(run.anatomy) or ()
        score = tower.received(rows="cls", layer=layer)[..., tower.specials :].mean(1)  # (T, N)
        overview = torch.zeros(len(score), dtype=torch.bool, device=score.device)
        first, tiles = 0, tower.tiles.tolist()
        while first < len(tiles):  # images are few
            overview[first] = True
            first += tiles[first]
        return {"pivot": score * overview[:, None]}

    def cut_input(self, stage: Stage) -> Tensor:
        patches, score = patch_rows(stage), stage.state.get("pivot")
        keep = stage.live & ~stage.visual
        images = rows_of_images(patches, stage.image)
        for n in sorted({len(rows) for _, rows in images}):  # images of one size together
            samples = torch.tensor([[b] for b, rows in images if len(rows) == n], device=keep.device)  # (G, 1)
            rows = torch.stack([rows for _, rows in images if len(rows) == n])  # (G, n)
            X = stage.hidden[samples, rows]  # (G, n, D)
            pivot = central(X) if score is None else top_k(score[samples, rows], 1)[:, 0]
            chosen = diverse(X, budget_count(self.budget, n), pivot, self.objective)  # (G, k)
            keep[samples, rows.gather(1, chosen)] = True
        return with_newlines(stage, patches, keep)

    def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
        return tuple(layer + 1 for layer in self._checked(len(anatomy.layers))) if self.tau > 0 else ()

    def shares(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """r_tv and r_vt (B,) of the layer that has just run."""
        order = torch.where(stage.visual, stage.order, stage.order.amax() + 1)
        start = order.amin(-1, keepdim=True) if self.system is None else self.system
        text = stage.live & ~stage.visual & (stage.order >= start)
        from_text, from_visual = (stage.received_before(rows).mean(1) for rows in (text, stage.visual))  # (B, r)
        return relevance(from_text, from_visual, text, stage.visual)

    def keep_rows(self, stage: Stage) -> Tensor:
        r_tv, r_vt = self.shares(stage)
        drop = (r_tv < self.tau) & (r_vt < self.tau) & stage.after_image.any(-1)  # (B,)
        return stage.live & ~(stage.visual & drop[:, None])
