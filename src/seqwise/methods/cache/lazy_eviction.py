"""LazyEviction: evict late and in batches, and never a token that is still inside its usual silence.

    a     = softmax(q K^T / sqrt(D)) at decode step t = 1, 2, ...; a slot is active where a >= alpha
    active: mri = max(mri, t - last), last = t        (mri: maximum recurrence interval, in steps)
    score = 2 / (1 + exp(1 + (t - last) / (mri + 1e-5))) + [mri > 0] 2 / (1 + exp(mri - 1))
    if S > B and t mod W = 0: keep the W newest slots and the B - W best of the others

Prompt slots start with last = mri = 0, the slot appended at step t with last = t - 1, mri = 0. Nothing is evicted
at prefill; after the first eviction S stays between B and B + W - 1. The output of a step uses all S slots.

The first term is high while the silence is short beside the longest one survived, the second (at most 1) for tokens
that come back often. A token that was active in one burst and never again keeps mri = 1, hence a second term of 1.0,
more than the first term can ever reach (2 / (1 + e) = 0.54): where such noise abounds, recurrent tokens lose.
`score="first_term"` has no such bias.

Under grouped-query attention one state per KV head serves its group, a = max over the group's query heads (ours; the
release keeps one cache per query head, as does `track` on query-head attention).

"LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long Reasoning", arXiv 2506.15969.
The constants 1 and 1e-5 are the code's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from seqwise.core.caches import Kept, View
from seqwise.core.errors import PromptError
from seqwise.core.method import Method, budget_param, param
from seqwise.core.select import layer_budget, top_k

_EPSILON = 1e-5


def group_attention(attention: Tensor, kv_heads: int) -> Tensor:
    """Attention of query heads (..., H, S) -> of KV heads (..., Hkv, S): the maximum over each group."""
    return attention.unflatten(-2, (kv_heads, -1)).amax(-2)


def track(last: Tensor, mri: Tensor, attention: Tensor, alpha: float, t: int) -> tuple[Tensor, Tensor]:
    """One decode step of the state.

    last, mri: (..., S or fewer) integers, in steps; slots missing at the end were appended at this step and start with
    last = t - 1, mri = 0. attention: (..., S) probabilities of the step's query, 0 on padding. alpha: probability from
    which a slot counts as active; the average probability is 1/S, so short sequences need a larger one.
    Returns the new (last, mri), both (..., S) int32: half-precision counters stop being exact at 256 (bfloat16) steps.
    """
    born = attention.shape[-1] - last.shape[-1]
    last = torch.nn.functional.pad(last.to(torch.int32), (0, born), value=t - 1)
    mri = torch.nn.functional.pad(mri.to(torch.int32), (0, born))
    active = attention >= alpha
    return last.masked_fill(active, t), torch.where(active, torch.maximum(mri, t - last), mri)


def mri_score(t: int, last: Tensor, mri: Tensor, score: Literal["code", "first_term"] = "code") -> Tensor:
    """Score of each slot at step t, fp32 (..., S): "code" in [0, 1.54), "first_term" alone in [0, 0.54).

    A slot that was never active scores exactly 0.
    """
    silence, interval = (t - last).float(), mri.float()
    first = 2 / (1 + torch.exp(1 + silence / (interval + _EPSILON)))
    if score == "first_term":
        return first
    return first + torch.where(mri == 0, 0.0, 2 / (1 + torch.exp(interval - 1)))


def due(t: int, slots: int, budget: int, window: int) -> bool:
    """Whether step t evicts: only every `window` steps, and only above the budget."""
    return slots > budget and t % window == 0


def select(score: Tensor, budget: int, window: int) -> Tensor:
    """Kept slots (..., min(budget, S)), ascending: the last `window` and the best of the others by score (..., S).

    Ties, such as the zeros of slots that were never active, go to the newer slot.

    Raises:
        ValueError: unless 1 <= window < budget.
    """
    if not 1 <= window < budget:
        raise ValueError(f"LazyEviction.window must be in [1, budget) = [1, {budget}), got {window}")
    slots = score.shape[-1]
    old = max(slots - window, 0)
    best = top_k(score[..., :old], budget - window, prefer="later")  # (..., min(budget - window, old))
    newest = torch.arange(old, slots, device=score.device).expand(*score.shape[:-1], -1)
    return torch.cat([best, newest], -1)


@dataclass(frozen=True)
class LazyEviction(Method):
    """Evicts in batches while decoding, and keeps tokens that are still inside their usual silence.

    budget: slots per layer and KV head (the cache grows to budget + window - 1 in between): tokens, or the share of
    the prompt's real tokens. window: W, steps between evictions and newest slots always kept; about the 80th
    percentile of the recurrence intervals (27 to 363 in the official scripts). alpha: attention from which a slot
    counts as active (1e-4 or 5e-4 in the official scripts at 1,500 slots). score: see `mri_score`.
    """

    budget: int | float | tuple[int | float, ...] = budget_param(0.5, "KV slots kept per layer and head")
    window: int = param(27, ge=1, doc="steps between evictions, newest slots always kept")
    alpha: float = param(5e-4, gt=0, lt=1, doc="attention from which a slot is active")
    score: Literal["code", "first_term"] = "code"

    slots: ClassVar[tuple[str, ...]] = ("cache.retain",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for budget in self.budget if isinstance(self.budget, tuple) else (self.budget,):
            if isinstance(budget, int) and self.window >= budget:
                raise ValueError(f"LazyEviction.window must be in [1, budget) = [1, {budget}), got {self.window}")

    def identity(self) -> Method:
        return replace(self, budget=1.0)

    def observes(self, phase: str) -> bool:
        return phase == "decode"

    def retain(self, view: View) -> Kept | None:
        capacity = view.capacity(layer_budget(self.budget, view.layer, view.layers, "LazyEviction.budget"))
        if view.phase == "prefill":
            if capacity is not None and view.final and min(capacity) <= self.window:
                raise PromptError(
                    f"LazyEviction.window must be < the budget, which is {min(capacity)} slots for this prompt, "
                    f"got {self.window}"
                )
            if view.step:  # a new prompt on a kept cache resets the state: its steps count from here
                shape = (*view.key.shape[:2], view.slots)
                view.state["last"] = torch.full(shape, view.step, dtype=torch.int32, device=view.key.device)
                view.state["mri"] = torch.zeros(shape, dtype=torch.int32, device=view.key.device)
            return None
        attention = group_attention(view.probabilities().transpose(1, 2), view.key.shape[1])  # (B, q, Hkv, n)
        first = view.step - view.new + 1  # step of this forward's first row
        last, mri = self._state(view, first)
        for row in range(view.new):
            last, mri = track(last, mri, attention[:, row], self.alpha, first + row)
        view.state["last"], view.state["mri"] = last, mri
        if capacity is None or view.step // self.window == (first - 1) // self.window:
            return None
        score = mri_score(view.step, last, mri, self.score)
        return view.keep(score, capacity, recent=self.window, prefer="later")

    def _state(self, view: View, first: int) -> tuple[Tensor, Tensor]:
        """last and mri (B, Hkv, n) before this forward's rows; its own slots were born one step before each."""
        shape = (*view.key.shape[:2], view.slots)
        zeros = torch.zeros(shape, dtype=torch.int32, device=view.key.device)
        last, mri = view.state.get("last", zeros), view.state.get("mri", zeros)
        born = torch.arange(first - 1, first - 1 + view.new, dtype=torch.int32, device=view.key.device)
        return torch.cat([last[..., : view.slots - view.new], born.expand(*shape[:2], -1)], -1), mri
