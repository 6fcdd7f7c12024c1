"""FlowCut: drop visual tokens a few at a time inside the vision tower, as fast as its attention concentrates.

After tower layer i, from that layer's own queries, keys and values, for the n patches j that are left:

    a_j = mean_h softmax_j(q_cls . k_j / sqrt(D))     g_j = mean_h softmax_j(v_cls . v_j)     e_j = |mean_h v_j|_1
    S   = (a / sum a + g / sum g) * e                 C = S at the first layer, then C = 0.5 C + 0.5 S
    p   = a / sum a        rho = -sum p ln p / ln n   rem = s - i - 1, with s + 1 layers making the feature
    drop: 0 if rem is odd; n - T if rem = 0; else min(n - T, round((n - T) / sqrt(rem) * (1 - rho^2)))

T patches are wanted in the end; the n - drop of largest C stay, in raster order, CLS beside them. Both softmaxes
run over CLS and patches, then the CLS entry is dropped. Where a tower has no CLS, the mean query takes its place,
no column is dropped, and S = a * e. LLaVA-NeXT cuts once more, after decoder layer index 1:

    rel = mean_h softmax_j(q_last . k_j / sqrt(D))    sem = mean_h softmax_j(v_last . v_j / sqrt(D))
    S   = (rel + sem) * e                             both softmaxes over the visual tokens only

"FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", arXiv 2505.19536.
Where the paper and its code differ (the CLS column, the scale of the value term, the dropped count), this is the
code, except that the count is each image's own: the code drops the batch's largest count from every image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from seqwise.core.anatomy import Anatomy
from seqwise.core.engine import Stage
from seqwise.core.method import Method, budget_param
from seqwise.core.select import budget_count, keep_best, top_k
from seqwise.core.towers import TowerLayer


def attention_term(q: Tensor, k: Tensor, cls: bool = True) -> Tensor:
    """Attention a that each patch receives from CLS, averaged over heads, in float32.

    q, k: (..., h, rows, D), one tower layer's, not yet scaled, after RoPE if there is one. With `cls`, row 0 is CLS
    and the result is (..., rows - 1); its sum is below 1 by what CLS gives itself. Without, the query is the mean
    over all rows of q, and the result is (..., rows).
    """
    query = q[..., :1, :] if cls else q.mean(-2, keepdim=True)  # (..., h, 1, D)
    a = _over_tokens(query, k, scale=k.shape[-1] ** -0.5)
    return a[..., 1:] if cls else a


def semantic_term(v: Tensor) -> Tensor:
    """Likeness g of each patch's value to that of CLS: (..., h, 1 + n, D) with CLS in row 0 -> (..., n), float32.

    The products are not scaled by sqrt(D), unlike in the decoder's `sem`.
    """
    return _over_tokens(v[..., :1, :], v, scale=1.0)[..., 1:]


def value_norm(v: Tensor) -> Tensor:
    """e: the L1 norm of the value averaged over heads, for every row given: (..., h, rows, D) -> (..., rows), float32.

    With grouped KV heads the KV heads are averaged: repeating each for its query heads gives the same mean.
    """
    return v.float().mean(-3).abs().sum(-1)


def layer_score(a: Tensor, g: Tensor | None, e: Tensor) -> Tensor:
    """S of one tower layer from its three terms, each (..., n); g is None for a tower without CLS. Returns (..., n)."""
    share = a / a.sum(-1, keepdim=True)
    return share * e if g is None else (share + g / g.sum(-1, keepdim=True)) * e


def accumulate(C: Tensor | None, S: Tensor) -> Tensor:
    """The running score (..., n); C is None at the first layer. Layers that drop nothing take part as well."""
    return S if C is None else 0.5 * C + 0.5 * S


def entropy_ratio(a: Tensor, eps: float = 0.0) -> Tensor:
    """rho: entropy of the attention a (..., n) over its largest value ln n, n >= 2. Returns (...,).

    eps is added inside the logarithm; the official code does so (1e-7) for towers without CLS only.
    """
    p = a.float() / a.float().sum(-1, keepdim=True)
    # clamped, because attention that underflows to 0 would give 0 * -inf
    H = -(p * (p + eps).clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)
    return H / math.log(p.shape[-1])


def drop_count(a: Tensor, T: int, rem: int, eps: float = 0.0) -> Tensor:
    """How many of its n patches each image drops after a layer: (..., n) -> (...,), int64.

    a: the layer's attention term. T: patches wanted in the end. rem = s - i - 1 >= 0. eps: see `entropy_ratio`.
    Halves round to the even count. Never leaves fewer than T; all of n - T go at rem = 0.

    Raises:
        ValueError: T < 1 or rem < 0.
    """
    if T < 1:
        raise ValueError(f"drop_count: T must be >= 1, got {T}")
    if rem < 0:
        raise ValueError(f"drop_count: rem must be >= 0, got {rem}")
    excess = a.shape[-1] - T
    if excess <= 0 or rem % 2 == 1:
        return torch.zeros(a.shape[:-1], dtype=torch.long, device=a.device)
    if rem == 0:
        return torch.full(a.shape[:-1], excess, device=a.device)
    r = excess / math.sqrt(rem) * (1 - entropy_ratio(a, eps) ** 2)  # (...,)
    return r.round().long().clamp(0, excess)


def decoder_score(q_last: Tensor, k: Tensor, v_last: Tensor, v: Tensor) -> Tensor:
    """S of the cut inside the language model, over n visual tokens; one shot, no running score. Float32, (..., n).

    q_last: (..., H, D), the last instruction token's query after RoPE. k, v: (..., Hkv, n, D), the visual tokens'
    keys (after RoPE) and values. v_last: (..., Hkv, D), the last instruction token's value.
    """
    scale = k.shape[-1] ** -0.5
    groups = q_last.shape[-2] // k.shape[-3]
    rel = _over_tokens(q_last[..., None, :], k.repeat_interleave(groups, -3), scale)
    sem = _over_tokens(v_last[..., None, :], v, scale)
    return (rel + sem) * value_norm(v)


def _over_tokens(query: Tensor, rows: Tensor, scale: float) -> Tensor:
    """softmax over rows of query . row * scale, averaged over heads: (..., h, 1, D), (..., h, n, D) -> (..., n)."""
    logits = (query.float() @ rows.float().mT)[..., 0, :] * scale  # (..., h, n)
    return logits.softmax(-1).mean(-2)


_DECODER_CUT = 2  # the layer whose input is cut on tiled models: behind decoder layer index 1
_NO_CLS_EPS = 1e-7


@dataclass(frozen=True)
class FlowCut(Method):
    """Prunes visual tokens inside the vision tower; on tiled models (LLaVA-NeXT) half there, then in the decoder.

    budget: T, visual tokens per image: a count, or the share of the patches of all its tiles. On tiled models each
    tile of several is cut to T // 2 in the tower and the image to T behind the second decoder layer, from where on
    the rows that are left have positions 0, 1, ...
    """

    budget: int | float = budget_param(0.25, "visual tokens kept per image")

    slots: ClassVar[tuple[str, ...]] = ("tower.rows", "layer.rows")
    positions: ClassVar[str] = "renumber"  # at the decoder cut

    def identity(self) -> Method:
        return replace(self, budget=1.0)

    def needs(self) -> set[str]:
        return {"vision tower"}

    def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
        tiled = anatomy.vision is not None and anatomy.vision.tiled
        everything = isinstance(self.budget, float) and self.budget == 1.0  # newline rows are more than all patches
        return (_DECODER_CUT,) if tiled and not everything and len(anatomy.layers) > _DECODER_CUT else ()

    def prune_tower(self, layer: TowerLayer) -> Tensor | None:
        T = budget_count(self.budget, layer.tiles * layer.patches)
        if layer.tiles > 1:
            T = max(1, T // 2)
        cls = layer.specials > 0
        a = attention_term(layer.query, layer.key, cls)  # (1, n)
        g = semantic_term(layer.value) if cls else None
        e = value_norm(layer.value)[..., layer.specials :]
        C = accumulate(layer.state.get("C"), layer_score(a, g, e))
        layer.state["C"] = C
        rem = layer.feature_layer - layer.index - 1
        if rem < 0 or a.shape[-1] <= T:
            return None
        drop = int(drop_count(a, T, rem, 0.0 if cls else _NO_CLS_EPS))
        return top_k(C, a.shape[-1] - drop) if drop else None

    def keep_rows(self, stage: Stage) -> Tensor | None:
        query, key, value = stage.previous()
        keep = stage.live.clone()
        for image, entered in enumerate(stage.patches.T):  # images of a prompt are few
            rows = stage.image == image  # (B, r)
            for b in range(rows.shape[0]):
                here = rows[b].nonzero()[:, 0]
                if not len(here):
                    continue
                last = int(stage.live[b].nonzero()[-1])
                S = decoder_score(query[b, :, last], key[b][:, here], value[b, :, last], value[b][:, here])
                T = torch.tensor([budget_count(self.budget, int(entered[b]))], device=S.device)
                keep[b, here] = keep_best(S[None], torch.ones_like(S[None], dtype=torch.bool), T)[0]
        return keep
