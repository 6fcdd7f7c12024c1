"""What explainers share: reading a model without changing it, and how faithful an attribution is.

    keep(s)      each EMBEDDING ELEMENT of input i stays with probability s_i, else it becomes 0
    D(p, q)      = sum_v (sqrt p_v - sqrt q_v)^2 / sqrt 2        q: whole input, p: softly masked
    Soft-S, S_0  = 1 - D    for keep(s), and for everything zeroed
    Soft-C       = D        for keep(1 - s)
    Soft-NS      = max(0, Soft-S - S_0) / (1 - S_0)              is what is important enough by itself?
    Soft-NC      = Soft-C / (1 - S_0)                            is it missed?

"Incorporating Attribution Importance for Improving Faithfulness Metrics", arXiv 2305.10496; D as the official
code of ReAGent (arXiv 2402.00794) has it, sqrt 2 times the squared Hellinger distance.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqwise.core.attribution import Attribution
from seqwise.core.config import Configured
from seqwise.core.errors import PromptError, UnsupportedModel, UsageError


@dataclass(frozen=True)
class Explainer(Configured):
    """Base of explainers. A concrete one has `explain(model, input_ids, ...) -> Attribution`."""

    abstract: ClassVar[bool] = True


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """No gradients, dropout off; the modules' training flags are as before afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def next_logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    """Logits (B, V), fp32, after the last token of input_ids= (B, n) or inputs_embeds= (B, n, D), not padded."""
    (first,) = inputs.values()
    extra: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        extra["logits_to_keep"] = 1  # else the head makes (B, n, V), by far the largest tensor
    mask = torch.ones(first.shape[:2], dtype=torch.long, device=first.device)
    logits: Tensor = model(attention_mask=mask, **inputs, **extra).logits
    return logits[:, -1].float()


def one_prompt(input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A prompt (n,) or (1, n) without padding: ids (m,), their places (m,). PromptError for other shapes."""
    ids = torch.as_tensor(input_ids)
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise PromptError(f"input_ids must be one prompt, (n,) or (1, n), got {tuple(ids.shape)}")
    live = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask).reshape(-1)
    if live.shape != ids.shape:
        raise PromptError(f"attention_mask must have {len(ids)} entries like input_ids, got {len(live)}")
    places = live.to(ids.device).nonzero()[:, 0]
    if not len(places):
        raise PromptError("input_ids must hold at least one token that is not padding, got none")
    return ids[places], places


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """D of two distributions (..., V) -> (...,), in [0, sqrt 2]."""
    return (p.sqrt() - q.sqrt()).square().sum(-1) / math.sqrt(2)


def soft_mask(keep: Tensor, u: Tensor) -> Tensor:
    """Which embedding elements stay: keep (..., n) probabilities, u (..., n, D) uniform in [0, 1) -> bool."""
    return u < keep[..., None]


def soft_ns(soft_s: Tensor, s_0: Tensor) -> Tensor:
    """Normalised sufficiency, any shapes; NaN where zeroing everything changes nothing (S_0 = 1)."""
    return (soft_s - s_0).clamp(min=0) / (1 - s_0)


def soft_nc(soft_c: Tensor, s_0: Tensor) -> Tensor:
    """Normalised comprehensiveness, any shapes; NaN where zeroing everything changes nothing (S_0 = 1)."""
    return soft_c / (1 - s_0)


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """Soft-NS and Soft-NC per target and draw, each (T, draws); larger is more faithful."""

    soft_ns: Tensor
    soft_nc: Tensor


def faithfulness(
    model: Any,
    attribution: Attribution,
    input_ids: Tensor | None = None,
    *,
    draws: int = 20,
    seed: int = 0,
    softmax: bool = False,
) -> Faithfulness:
    """Soft-NS and Soft-NC of any attribution under the model it explains.

    input_ids: (n,), needed where the attribution has none. Scores are keep probabilities in [0, 1]; softmax=True
    makes them so. Inputs without a score (NaN) always stay. Each target is judged on the inputs it saw, by
    `draws` pairs of masks, in each the one for Soft-S first. Target t draws from a generator seeded with
    seed + t, so attributions of one prompt meet the same draws. Raises UsageError for scores outside [0, 1].
    """
    if draws < 1:
        raise UsageError(f"draws must be >= 1, got {draws} (pairs of random masks)")
    ids = attribution.input_ids if input_ids is None else input_ids
    if ids is None or len(ids) != len(attribution.inputs):
        got = "none" if ids is None else f"{len(ids)}"
        raise UsageError(f"input_ids must be the attribution's {len(attribution.inputs)} inputs, got {got}")
    if not hasattr(model, "get_input_embeddings"):
        raise UnsupportedModel("faithfulness masks embeddings; this model has no get_input_embeddings()")
    ns, nc = [], []
    with reading(model):
        embed = model.get_input_embeddings()
        embeddings: Tensor = embed(torch.as_tensor(ids, device=embed.weight.device))  # (n, D)
        for t, count in enumerate(attribution.seen):
            s = keep_probabilities(attribution.scores[t, :count], softmax=softmax)  # (n,)
            unscored = attribution.scores[t, :count].isnan()
            keep = torch.stack([s, (1 - s).masked_fill(unscored, 1.0)])  # (2, n): for Soft-S and Soft-C
            e = embeddings[:count]
            zeroed = torch.where(unscored[:, None].to(e.device), e, 0.0)
            q, p_0 = _softmax_of(model, torch.stack([e, zeroed]))
            s_0 = 1 - divergence(p_0, q)
            generator = torch.Generator().manual_seed(seed + t)
            for _ in range(draws):
                stays = soft_mask(keep, torch.rand(2, *e.shape, generator=generator)).to(e.device)
                d = divergence(_softmax_of(model, e * stays), q)  # (2,)
                ns.append(soft_ns(1 - d[0], s_0))
                nc.append(soft_nc(d[1], s_0))
    shape = len(attribution.targets), draws
    return Faithfulness(torch.stack(ns).view(shape).cpu(), torch.stack(nc).view(shape).cpu())


def keep_probabilities(scores: Tensor, softmax: bool = False) -> Tensor:
    """Scores (..., n), or their softmax over the scored inputs, as probabilities to keep; NaN becomes 1."""
    if softmax:
        scores = scores.masked_fill(scores.isnan(), -math.inf).softmax(-1).masked_fill(scores.isnan(), math.nan)
    known = scores[~scores.isnan()]
    if ((known < 0) | (known > 1 + 1e-6)).any():  # a mean of softmaxes may round up
        raise UsageError(
            f"scores must be in [0, 1], got {float(known.min()):.3g} to {float(known.max()):.3g} "
            "(probabilities to keep an input); softmax=True turns any scores into such"
        )
    return scores.masked_fill(scores.isnan(), 1.0)


def _softmax_of(model: nn.Module, inputs_embeds: Tensor) -> Tensor:
    return next_logits(model, inputs_embeds=inputs_embeds).softmax(-1)
