"""CATP: prune the images of a few-shot prompt by the text they come with, then by what the query needs of them.

The prompt: n demonstrations (image i, text i), then the query (image n + 1, its text). A share R of all S_i image
tokens goes, half of it at the language model's input and half behind two shallow layers. cos01 = (1 + cos) / 2.

Input, each image alone, X_i its tokens as the language model gets them, v_i the mean embedding of its text:

    F(Y) = sum_{x in X_i} max_{y in Y} cos01(y, x) + lambda1 sum_{y in Y} cos01(y, v_i)
    greedily maximised over the Y of floor(S_i (1 - R / 2)) tokens

Behind layer K, image tokens c of all demonstrations in one ranking; v_q the mean hidden state of the query's tokens:

    max(0, A_K[last, c] - A_{K-1}[last, c]) + lambda2 cos(h_K[c], v_q)           floor((1 - R) sum S_i) stay

Behind layer K + 1, the query's image tokens; v_c the mean hidden state of the context tokens that are left:

    cos(h_{K+1}[q], v_c)                                                         floor((1 - R) S_{n+1}) stay

A is averaged over heads, last is the prompt's last token; layers count from 1. Text stays.
"CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context Learning", arXiv 2508.07871.
Ours, where the paper is silent: layer numbers mean outputs; survivors keep their positions; an image's text reaches up
to the next image; a prompt of one image has no context, and the mean of its text takes the place of v_c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import UnsupportedModel
from seqwise.core.method import Method, budget_param, param
from seqwise.core.select import keep_best
from seqwise.core.views import Stage
from seqwise.methods.reduce.base import patch_rows, rows_of_images, with_newlines

TIE = 1e-6  # gains that differ by less are equal: two tokens that have only each other for neighbours gain the same
_SQUARE = 4096  # tokens up to which all similarities are kept
_BLOCK = 128  # tokens whose gain is computed at once


def keep_count(S: int, R: float) -> int:
    """Tokens left of S when the share R goes: max(1, floor((1 - R) S)), in spite of binary rounding of 1 - R."""
    return max(1, floor((1 - R) * S + 1e-9))


def cover(X: Tensor, v: Tensor, k: int, lambda1: float = 0.7) -> Tensor:
    """Y: the min(k, n) tokens that greedily maximise F, (min(k, n),) ascending.

    X: (n, D) tokens, v: (D,) their text, a zero vector where there is none; of any length. Gains within 1e-6 are equal,
    and the earlier token wins. fp64 where the device has it. The Y of k is part of the Y of k + 1. Gains only fall as
    Y grows, so only tokens whose last known gain could still win are looked at again; up to 4,096 tokens all
    similarities are kept, (n, n), beyond that those in use are computed.

    Raises:
        ValueError: k < 1.
    """
    if k < 1:
        raise ValueError(f"cover: k must be >= 1, got {k}")
    dtype = torch.float32 if X.device.type == "mps" else torch.float64
    X, v = normalize(X.to(dtype), dim=-1), normalize(v.to(dtype), dim=-1)
    n = X.shape[0]
    square = (1 + X @ X.mT) / 2 if n <= _SQUARE else None  # (n, n)
    agreement = lambda1 * (1 + X @ v) / 2  # (n,)
    best = X.new_zeros(n)  # of each x: the largest similarity to Y
    bound = X.new_full((n,), torch.inf)  # last known gains, -inf for Y
    at = torch.arange(n, device=X.device)

    def similar(rows: Tensor) -> Tensor:  # (m, n)
        return (1 + X[rows] @ X.mT) / 2 if square is None else square[rows]

    for _ in range(min(k, n)):
        gain, stale = torch.full_like(bound, -torch.inf), bound.clone()
        while bool(stale.amax() >= gain.amax() - TIE):
            rows = stale.topk(min(_BLOCK, n)).indices
            new = (similar(rows) - best).clamp(min=0).sum(-1) + agreement[rows]
            gain[rows] = torch.where(stale[rows] > -torch.inf, new, gain[rows])
            stale[rows] = -torch.inf
        bound = torch.where(gain > -torch.inf, gain, bound)
        c = torch.where(gain >= gain.amax() - TIE, at, n).amin(-1, keepdim=True)
        best = torch.maximum(best, similar(c)[0])
        bound[c] = -torch.inf
    return (bound == -torch.inf).nonzero()[:, 0]


def context_score(
    A_K: Tensor, A_before: Tensor, h: Tensor, v_q: Tensor, lambda2: float = 0.6, normalise: bool = False
) -> Tensor:
    """Score behind layer K of the demonstrations' image tokens, in fp32: (..., n).

    A_K, A_before: (..., n) attention of the prompt's last token in layers K and K - 1, averaged over heads, over the
    same columns. h: (..., n, d) hidden states, v_q: (..., d). normalise: divide the attention term by its largest
    value (not in the paper, whose attention term is far smaller than its cosine in long prompts).
    """
    dA = (A_K - A_before).float().clamp(min=0)
    if normalise:
        dA = dA / dA.amax(-1, keepdim=True).clamp(min=torch.finfo(dA.dtype).tiny)
    return dA + lambda2 * query_score(h, v_q)


def query_score(h: Tensor, v_c: Tensor) -> Tensor:
    """Score behind layer K + 1 of the query's image tokens: the cosine of h (..., n, d) and v_c (..., d), fp32."""
    return cosine_similarity(h.float(), v_c.float()[..., None, :], dim=-1)


@dataclass(frozen=True)
class CATP(Method):
    """Prunes the image tokens of a multi-image few-shot prompt in two steps, by text and by the query's needs.

    The last image is the query's, those before it are demonstrations, which compete with each other for what they may
    keep together. budget: 1 - R, the share of each image's tokens left in the end, or that many tokens per image.
    layer: K, 1-based; two more layers must follow. The paper has 6 for models of 7 to 8 billion parameters and 10 for
    13. Newline tokens go as soon as any patch of their image does. normalise: see `context_score`.
    """

    budget: int | float = budget_param(0.222, "visual tokens left of each image")
    layer: int = param(6, ge=2, doc="1-based decoder layer K")
    lambda1: float = param(0.7, ge=0, doc="weight of the image's own text at the input")
    lambda2: float = param(0.6, ge=0, doc="weight of the cosine behind layer K")
    normalise: bool = False

    slots: ClassVar[tuple[str, ...]] = ("input.rows", "layer.rows")
    input_positions: ClassVar[str] = "keep"  # survivors keep their original positions
    positions: ClassVar[str] = "keep"

    def identity(self) -> Method:
        return replace(self, budget=1.0)

    def needs(self) -> set[str]:
        return {"vision tower"}

    def check(self, anatomy: Anatomy) -> None:
        L = len(anatomy.layers)
        if self.layer > L - 2:
            raise UnsupportedModel(
                f"CATP.layer must be in [2, {L - 2}] on this model of {L} layers, for two layers must follow; got "
                f"{self.layer}"
            )

    def _removed(self, sizes: Sequence[int]) -> float:
        """R over images of so many tokens."""
        left = self.budget if isinstance(self.budget, float) else sum(min(self.budget, S) for S in sizes) / sum(sizes)
        return 1 - left

    def cut_input(self, stage: Stage) -> Tensor:
        patches, text = patch_rows(stage), stage.live & ~stage.visual
        behind = stage.image.cummax(-1).values  # (B, r), the last image in front of each row
        keep, S = text.clone(), torch.zeros_like(stage.order)
        for b, rows in rows_of_images(patches, stage.image):
            own = text[b] & (behind[b] == stage.image[b, rows[0]])  # (r,)
            v = _mean(stage.hidden[b : b + 1], own[None])[0]  # (d,)
            n = S[b, rows] = len(rows)
            k = keep_count(n, self._removed([n]) / 2)
            keep[b, rows[cover(stage.hidden[b, rows], v, k, self.lambda1)]] = True
        stage.state["S"] = S
        return with_newlines(stage, patches, keep)

    def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
        return self.layer - 1, self.layer, self.layer + 1  # behind the 1-based layer k is in front of the 0-based k

    def keep_rows(self, stage: Stage) -> Tensor | None:
        if stage.layer < self.layer:
            stage.state["A"] = _last_row(stage)  # of layer K - 1; nothing is cut until K has run
            return None
        patches, query = patch_rows(stage), stage.image.amax(-1, keepdim=True)  # (B, r), (B, 1)
        context, asking = patches & (stage.image < query), patches & (stage.image == query)
        start = torch.where(asking, stage.order, stage.order.amax() + 1).amin(-1, keepdim=True)
        member = stage.live & (stage.order >= start)  # the query's image and text
        if stage.layer == self.layer:
            A_K, A_before = _last_row(stage) * context, stage.state["A"] * context
            v_q = _mean(stage.hidden, member)
            s = context_score(A_K, A_before, stage.hidden, v_q, self.lambda2, self.normalise)
        else:
            known = torch.where(context.any(-1, keepdim=True), context, member & ~stage.visual)
            s = query_score(stage.hidden, _mean(stage.hidden, known))
        ranked, counts = (context if stage.layer == self.layer else asking), []
        for b, sizes in enumerate(_sizes(stage).tolist()):
            n = int(query[b])
            sizes = sizes[:n] if stage.layer == self.layer else sizes[n : n + 1]
            counts.append(keep_count(sum(sizes), self._removed(sizes)) if any(sizes) else 0)
        return stage.live & (~ranked | keep_best(s, ranked, torch.tensor(counts, device=s.device)))


def _last_row(stage: Stage) -> Tensor:
    """(B, r): attention of each sample's last token in the layer that has just run, averaged over heads."""
    last = stage.live & (stage.order == stage.order.amax(-1, keepdim=True))
    return stage.received_before(last).mean(1)


def _mean(hidden: Tensor, rows: Tensor) -> Tensor:
    """(B, d): the mean of the rows (B, r) bool of hidden (B, r, d), 0 where there are none."""
    return (hidden.float() * rows[..., None]).sum(1) / rows.sum(-1, keepdim=True).clamp(min=1)


def _sizes(stage: Stage) -> Tensor:
    """(B, images): the S_i, noted at the input; a prompt of embeddings did not pass there."""
    if "S" not in stage.state:
        return stage.entered
    S = torch.zeros_like(stage.entered)
    return S.scatter_reduce(1, stage.image.clamp(min=0), stage.state["S"] * stage.visual, "amax")
