"""TransPrune: drop image tokens in stages inside the language model, by how much its modules change them.

For each attention and MLP module, x its normed input, y its output before the residual addition, per token:

    m = |y| / |x|      d = 1 - cos(x, y)      w = m exp(d) / sum_{tokens} exp(d)        (token transition)
    TTV = sum over accumulated layers of (w_attn + w_mlp)
    IGA_j = mean_{h, i} A[h, i, j]            i: text rows behind the image, A: the next layer's attention
    s = TTV / (sum TTV + 1e-8) + IGA / (sum IGA + 1e-8)                                 (sums over image tokens)

A stage keeps the max(1, int(N r)) image tokens of largest s, N being the count before any stage, in their order.
Attention alone favours tokens by position and by sinks; the size and direction of a token's change do so less.
"TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model", arXiv 2507.20630.
The sum under w runs over each sample's own real tokens; the code lets it run over batch and padding as well, which
is the same for a single prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from seqwise.core.anatomy import Anatomy
from seqwise.core.engine import Stage, Transition
from seqwise.core.errors import UnsupportedModel
from seqwise.core.method import Method, param
from seqwise.core.observe import received
from seqwise.core.plan import stage_space, stages_at
from seqwise.core.select import keep_best
from seqwise.core.visible import Visible


def transition(x: Tensor, y: Tensor, real: Tensor | None = None) -> Tensor:
    """w of one module: x, y (..., n, D) -> (..., n), in float32.

    x: the module's input after its norm; y: its output before the residual addition. real: (..., n) bool, False at
    padding, which then gets weight 0 and no part in the sum; None means that all tokens are real.
    """
    x, y = x.float(), y.float()
    m = y.norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-12)  # (..., n)
    e = (1 - cosine_similarity(x, y, dim=-1)).exp()
    if real is not None:
        e = torch.where(real, e, 0.0)
        m = torch.where(real, m, 0.0)  # padding may hold anything, NaN included
    return m * e / e.sum(-1, keepdim=True)


def accumulate(ttv: Tensor | None, w_attn: Tensor, w_mlp: Tensor) -> Tensor:
    """TTV after one more layer; None before the first. All (..., n), over the tokens still present.

    Tokens that a stage drops take their history along: gather `ttv` with the indices that cut the hidden states.
    """
    layer = w_attn + w_mlp
    return layer if ttv is None else ttv + layer


def instruction_attention(
    q: Tensor, k: Tensor, image: tuple[int, int], real: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """IGA of the image tokens at columns [start, stop), in float32: (B, stop - start).

    q: (B, H, R, D), the text rows behind the image, which are the last R of the prompt; k: (B, Hkv, n, D), the whole
    prompt; both the next layer's, after RoPE; Hkv divides H. The softmax is causal, over all keys. real: (B, n) bool,
    False at padding, which is neither attended nor counted as a row. scale: of the logits, D^-0.5 by default.

    Raises:
        ValueError: the span is empty, outside the prompt, or reaches into the R rows.
    """
    start, stop = image
    rows, n = q.shape[-2], k.shape[-2]
    if not 0 <= start < stop <= n - rows:
        raise ValueError(
            f"instruction_attention: image must satisfy 0 <= start < stop <= {n - rows} (where the rows of q begin), "
            f"got {image}"
        )
    visible = Visible.of(rows, n, padding=real, device=q.device)
    return received(q, k, visible=visible, reduce="mean", scaling=scale)[..., start:stop].mean(-2)


def stage_score(ttv: Tensor | None, iga: Tensor | None) -> Tensor:
    """s over the current image tokens: ttv, iga (..., n) -> (..., n). None leaves a term out (the ablations).

    Raises:
        ValueError: both are None.
    """
    if ttv is None and iga is None:
        raise ValueError("stage_score: ttv and iga must not both be None")
    terms = [term / (term.sum(-1, keepdim=True) + 1e-8) for term in (ttv, iga) if term is not None]
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def keep_count(N: int, r: float) -> int:
    """Image tokens that a stage leaves: max(1, int(N r)), N the count before the first stage."""
    return max(1, int(N * r))


@dataclass(frozen=True)
class TransPrune(Method):
    """Drops image tokens in stages between decoder layers, by token transition and instruction attention.

    budget: share of each image's tokens left after each stage, of the count before any. prune_after: the stages,
    1-based: the output of that layer is cut. layers: first and last layer (1-based) whose transitions are added up.
    ttv, iga: the two terms; one of them may be left out. positions: "keep" leaves the survivors their positions
    (safer beside other methods), "renumber" counts anew after each stage, as the official code does.
    """

    budget: tuple[float, ...] = param((0.875, 0.625, 0.125), gt=0, le=1, doc="share kept after each stage")
    prune_after: tuple[int, ...] = param((7, 9, 12), ge=1, doc="1-based layers whose output is cut")
    layers: tuple[int, int] = param((7, 12), ge=1, doc="1-based first and last layer of the transitions")
    ttv: bool = True
    iga: bool = True
    positions: Literal["keep", "renumber"] = "keep"

    slots: ClassVar[tuple[str, ...]] = ("layer.rows",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.budget) != len(self.prune_after) or not self.budget:
            raise ValueError(
                f"TransPrune.budget must have one share per stage ({len(self.prune_after)}), got {self.budget!r}"
            )
        if list(self.prune_after) != sorted(set(self.prune_after)):
            raise ValueError(f"TransPrune.prune_after must ascend without repetition, got {self.prune_after!r}")
        if self.layers[0] > self.layers[1]:
            raise ValueError(f"TransPrune.layers must be (first, last) with first <= last, got {self.layers!r}")
        if not (self.ttv or self.iga):
            raise ValueError("TransPrune.ttv must be True where iga is False, got False (nothing would score)")
        which, stage = ("last", self.prune_after[-1]) if self.iga else ("first", self.prune_after[0])
        if self.ttv and self.layers[0] > stage:
            raise ValueError(
                f"TransPrune.layers must begin at or before the {which} stage ({stage}), or ttv never scores there; "
                f"got {self.layers!r}"
            )

    def identity(self) -> Method:
        return replace(self, budget=(1.0,) * len(self.budget))

    def needs(self) -> set[str]:
        parts = {"vision tower", "pre-norm"}
        return parts | {"RoPE", "1-D positions"} if self.positions == "renumber" else parts

    def check(self, anatomy: Anatomy) -> None:
        if self.prune_after[-1] >= len(anatomy.layers):
            raise UnsupportedModel(
                f"TransPrune.prune_after must be < the model's {len(anatomy.layers)} layers, got {self.prune_after!r}; "
                "choose stages of this model"
            )

    def search_space(self, anatomy: Anatomy, budget: float) -> dict[str, tuple[float, float]]:
        return stage_space(len(self.budget), len(anatomy.layers), budget)

    def planned(self, point: Mapping[str, float], anatomy: Anatomy, budget: float) -> Method:
        stages, left = stages_at(point, self.prune_after, len(anatomy.layers), budget)
        first = min(self.layers[0], stages[0])
        return replace(self, budget=left, prune_after=stages, layers=(first, max(first, stages[-1])))

    def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
        return self.prune_after  # behind the 1-based layer k is in front of the 0-based layer k

    def watched(self, anatomy: Anatomy) -> tuple[int, ...]:
        first, last = self.layers
        return tuple(range(first - 1, min(last, self.prune_after[-1]))) if self.ttv else ()

    def observe_transition(self, t: Transition) -> None:
        w = transition(t.before, t.after, t.live)  # (B, r)
        if t.module == "attention":
            t.state["attention"] = w
        else:
            t.state["ttv"] = accumulate(t.state.get("ttv"), t.state.pop("attention"), w)

    def keep_rows(self, stage: Stage) -> Tensor | None:
        share = self.budget[self.prune_after.index(stage.layer)]
        ttv = stage.state.get("ttv") if self.ttv else None
        iga = None
        if self.iga:
            text = stage.after_image
            iga = stage.received(text).mean(1) / text.sum(-1, keepdim=True).clamp(min=1)  # (B, r)
        keep = stage.live & ~stage.visual
        for image, entered in enumerate(stage.entered.T):  # images of a prompt are few
            rows = stage.image == image  # (B, r)
            s = stage_score(*(None if term is None else term * rows for term in (ttv, iga)))
            count = torch.tensor([keep_count(int(N), share) for N in entered], device=s.device)
            keep = keep | keep_best(s, rows, count)
        return keep
