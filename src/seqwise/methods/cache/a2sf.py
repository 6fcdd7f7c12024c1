"""A2SF: accumulated attention with a forgetting factor, so that old tokens do not win by age alone.

    A_n[k] = alpha * A_{n-1}[k] + S[n, k]          S[q, k] = post-softmax attention of query q to key k
           = sum_{q <= n} alpha^(n-q) S[q, k]      a new key starts at S[n, n]
    keep   = the R most recent slots and the top (B - R) of the others by A, per KV head

Query heads are summed into their KV head before ranking. alpha = 1 is H2O's score, alpha = 0 TOVA's (the last row
alone), a 0/1 weight on the last w rows SnapKV's: they are presets of the same accumulator.
"A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder",
arXiv 2407.20485; H2O: 2306.14048, TOVA: 2401.06104, SnapKV: 2404.14469.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from seqwise.core.anatomy import Anatomy
from seqwise.core.caches import Kept, View
from seqwise.core.method import Method, budget_param, param
from seqwise.core.select import layer_budget, top_k


def row_weights(n: int, alpha: float, device: torch.device | None = None) -> Tensor:
    """alpha^(n-1-q) for rows q = 0..n-1, fp32 (n,): the newest row weighs 1, also for alpha = 0."""
    age = torch.arange(n - 1, -1, -1, device=device, dtype=torch.float32)
    return torch.tensor(alpha, dtype=torch.float32, device=device) ** age


def prefill_score(attention: Tensor, alpha: float) -> Tensor:
    """A after a prompt: attention (..., n, k) -> (..., k), the sum over rows weighted by alpha^(n-1-q), in fp32."""
    return row_weights(attention.shape[-2], alpha, attention.device) @ attention.float()


def accumulate(score: Tensor, rows: Tensor, alpha: float) -> Tensor:
    """A_n from an initial score (..., k) and the rows (..., q, k) that followed: alpha^q A + sum alpha^(q-1-i) S_i.

    Where the rows see keys that the score does not know yet, these start at 0.
    """
    missing = rows.shape[-1] - score.shape[-1]
    score = torch.nn.functional.pad(score.float(), (0, missing))
    return score * alpha ** rows.shape[-2] + prefill_score(rows, alpha)


def group_heads(score: Tensor, kv_heads: int) -> Tensor:
    """Sums query heads (..., H, k) into their KV heads: (..., Hkv, k)."""
    return score.unflatten(-2, (kv_heads, -1)).sum(-2)


def select(score: Tensor, budget: int, recent: int) -> Tensor:
    """Kept slots (..., min(budget, k)), ascending: the last R and the top (B - R) of the others; ties to the newer.

    R is at most B. Everything stays while k <= B.
    """
    n = score.shape[-1]
    recent = min(recent, budget, n)
    old = top_k(score[..., : n - recent], min(budget, n) - recent, prefer="later")
    young = torch.arange(n - recent, n, device=score.device).expand(*score.shape[:-1], recent)
    return torch.cat([old, young], -1)


@dataclass(frozen=True)
class A2SF(Method):
    """Evicts the KV slots with the least accumulated, forgetting attention.

    budget: slots per layer and KV head: tokens, or the share of the prompt's real tokens; the size is then held while
    decoding. forget: alpha, one value or one per layer. recent: newest slots that are always kept, one value or one per
    layer (16 in the official code). evict: at the end of the prompt and at every step (the paper), or only the former.
    window: if set, only the last `window` rows of a prompt are scored, each with weight 1 before forgetting (SnapKV).
    pool: width of a max-pool over the score of the older slots at the end of the prompt, 1 for none (SnapKV: 7).
    """

    budget: int | float | tuple[int | float, ...] = budget_param(0.5, "KV slots kept per layer and head")
    forget: float | tuple[float, ...] = param(0.9, ge=0, le=1, doc="forgetting factor alpha")
    recent: int | tuple[int, ...] = param(16, ge=0, doc="newest slots always kept")
    evict: Literal["every_step", "prefill"] = "every_step"
    window: int | None = param(None, ge=1, doc="rows of a prompt that are scored")
    pool: int = param(1, ge=1, doc="odd width of the max-pool over scores")

    slots: ClassVar[tuple[str, ...]] = ("cache.retain",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool % 2 == 0:
            raise ValueError(f"{type(self).__name__}.pool must be an odd whole number >= 1, got {self.pool}")

    def identity(self) -> Method:
        return replace(self, budget=1.0)

    def check(self, anatomy: Anatomy) -> None:
        for layer in range(len(anatomy.layers)):
            layer_budget(self.budget, layer, len(anatomy.layers), f"{type(self).__name__}.budget")
        for name, value in (("forget", self.forget), ("recent", self.recent)):
            if isinstance(value, tuple) and len(value) != len(anatomy.layers):
                raise ValueError(
                    f"{type(self).__name__}.{name} must have one entry per layer ({len(anatomy.layers)}), "
                    f"got {len(value)}"
                )

    def observes(self, phase: str) -> bool:
        return (phase == "decode" and self.evict == "every_step") or (phase == "prefill" and self.window is None)

    def retain(self, view: View) -> Kept | None:
        if view.phase == "decode" and self.evict == "prefill":
            return None
        alpha = self.forget[view.layer] if isinstance(self.forget, tuple) else self.forget
        capacity = view.capacity(layer_budget(self.budget, view.layer, view.layers))
        if view.phase == "prefill" and self.window is not None:
            rows = min(self.window, view.new)
            score = view.received(
                rows=slice(view.new - rows, view.new), weight=row_weights(rows, alpha, view.key.device)
            )
        else:
            score = view.received(weight=row_weights(view.new, alpha, view.key.device))  # (B, Hkv, n)
            if "score" in view.state:
                score = score + alpha**view.new * view.state["score"]
        view.state["score"] = score
        recent = self.recent[view.layer] if isinstance(self.recent, tuple) else self.recent
        if self.pool > 1 and view.phase == "prefill":
            young = view.order > view.newest - recent  # kept anyway: their scores must not leak to older neighbours
            score = max_pool1d(score.masked_fill(young, 0.0), self.pool, stride=1, padding=self.pool // 2)
        return view.keep(score, capacity, recent=recent, prefer="later")


@dataclass(frozen=True)
class H2O(A2SF):
    """H2O (arXiv 2306.14048) as a preset: accumulated attention that never forgets."""

    forget: float | tuple[float, ...] = param(1.0, ge=1, le=1, doc="H2O never forgets; use A2SF to forget")


@dataclass(frozen=True)
class TOVA(A2SF):
    """TOVA (arXiv 2401.06104) as a preset: the newest row's attention alone, no protected slots."""

    forget: float | tuple[float, ...] = param(0.0, ge=0, le=0, doc="TOVA keeps no history; use A2SF to keep some")
    recent: int | tuple[int, ...] = param(0, ge=0, doc="newest slots always kept")


@dataclass(frozen=True)
class SnapKV(A2SF):
    """SnapKV (arXiv 2404.14469) as a preset: a window of the prompt's last rows, max-pooled, after the prompt only."""

    forget: float | tuple[float, ...] = param(1.0, ge=1, le=1, doc="window rows weigh alike")
    recent: int | tuple[int, ...] = param(32, ge=0, doc="newest slots always kept")
    evict: Literal["every_step", "prefill"] = "prefill"
    window: int | None = param(32, ge=1, doc="rows of a prompt that are scored")
    pool: int = param(7, ge=1, doc="odd width of the max-pool over scores")
