"""ReAGent: which context tokens made a language model produce this next token, from forward passes alone.

    p_0 = p(z | y),  p' = p(z | y')        y' = y with a random set m of positions replaced (rate rho)
    d   = p_0 - p'                         how much the target z lost
    u_i = +d where replaced, -d where kept
    ell_i <- ell_i + logit((u_i + 1) / 2),     s = softmax(ell)
    stop once z is among the K likeliest with only the N best positions of s kept and all others replaced

B independent probes start from ell ~ U(0, 1) and freeze when they stop; the result is the mean s of those.
"ReAGent: Towards A Model-agnostic Feature Attribution Method for Generative Language Models",
arXiv 2402.00794. N, K, rho and B are those of the official demo. Ours: 300 steps instead of 3000, uniform
non-special replacements instead of ones with the same part of speech, and the mean over all probes where none
stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seqwise.core.attribution import Attribution, Span, token_texts
from seqwise.core.config import budget_param, param
from seqwise.core.errors import PromptError, UsageError
from seqwise.insight.explain.base import Explainer, next_logits, one_prompt, reading

Sampler = Callable[[Tensor, torch.Generator], Tensor]  # ids (B, n), generator -> replacements (B, n)


def update(ell: Tensor, m: Tensor, d: Tensor, stopped: Tensor | None = None) -> Tensor:
    """One step of the importance logits.

    ell: (..., n). m: bool (..., n), True where replaced. d: (...,), the target's loss of probability, in [-1, 1].
    stopped: bool (...,), probes that no longer change. Returns (..., n).
    """
    u = torch.where(m, d[..., None], -d[..., None]).clamp(-1 + 1e-6, 1 - 1e-6)  # at +-1 the logit is infinite
    moved = ell + torch.logit((u + 1) / 2)
    return moved if stopped is None else torch.where(stopped[..., None], ell, moved)


def importance(ell: Tensor, scored: Tensor | None = None) -> Tensor:
    """s = softmax(ell), (..., n), over the positions scored (bool, broadcastable), 0 at the others."""
    return (ell if scored is None else ell.masked_fill(~scored, -math.inf)).softmax(-1)


def kept_positions(s: Tensor, N: int, scored: Tensor | None = None) -> Tensor:
    """bool (..., n): the N largest of s (..., n), ties to the earlier, besides every position not scored."""
    if scored is None:
        scored = torch.ones_like(s, dtype=torch.bool)
    order = s.masked_fill(~scored, -math.inf).argsort(dim=-1, descending=True, stable=True)
    best = torch.zeros_like(s, dtype=torch.bool).scatter(-1, order[..., :N], True)
    return best | ~scored


def reproduces(logits: Tensor, target: Tensor | int, K: int) -> Tensor:
    """The stop test, bool (...,): target (...,) among the K highest of logits (..., V); ties: smaller id."""
    z = torch.as_tensor(target, device=logits.device).expand(logits.shape[:-1])[..., None]
    value = logits.gather(-1, z)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return ((logits > value) | ((logits == value) & (ids < z))).sum(-1) < K


def aggregate(s: Tensor, stopped: Tensor) -> tuple[Tensor, Tensor]:
    """Mean importance of the stopped probes, of all where none stopped, and whether any did.

    s: (..., B, n), stopped: bool (..., B). Returns ((..., n), bool (...,)).
    """
    converged = stopped.any(-1)
    weight = torch.where(converged[..., None], stopped, True).to(s.dtype)  # (..., B)
    return (s * weight[..., None]).sum(-2) / weight.sum(-1, keepdim=True), converged


def rationale(s: Tensor, N: int, overlap: int) -> Tensor:
    """bool (..., n): positions among the N best of at least `overlap` of all B probes, s (..., B, n)."""
    return kept_positions(s, N).sum(-2) >= overlap


def uniform_sampler(allowed: Tensor) -> Sampler:
    """Replacements drawn uniformly from the ids `allowed` (m,)."""

    def draw(ids: Tensor, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(allowed), ids.shape, generator=generator)
        return allowed.cpu()[index].to(ids.device)

    return draw


def inferential_sampler(model: nn.Module) -> Sampler:
    """The model's own greedy prediction of each token from the true ones before it; the first stays."""

    def predict(ids: Tensor, generator: torch.Generator) -> Tensor:
        mask = torch.ones_like(ids)
        predicted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].argmax(-1)
        return torch.cat([ids[:, :1], predicted.to(ids.dtype)], dim=-1)

    return predict


def non_special_ids(model: Any, tokenizer: Any = None) -> Tensor:
    """Ids (m,) that may stand for a context token: those of the vocabulary without special tokens."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    special: set[int | None] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model.config.get_text_config(), name, None)
        special.update(value if isinstance(value, (list, tuple)) else [value])
    if tokenizer is not None:
        vocabulary = min(vocabulary, len(tokenizer))  # embeddings may be padded beyond the tokenizer
        special.update(tokenizer.all_special_ids)
    return torch.tensor([i for i in range(vocabulary) if i not in special])


@dataclass(frozen=True)
class ReAGent(Explainer):
    """Explains next-token predictions of any causal language model.

    `rationale` positions (details of the result) are among the top_n of at least `overlap` probes.
    """

    top_n: int | float = budget_param(5, doc="positions kept in the stop test, a share is rounded up")
    top_k: int = param(3, ge=1, doc="ranks at which the target counts as reproduced")
    rho: float = param(0.3, gt=0, lt=1, doc="share of positions replaced per step")
    max_steps: int = param(300, ge=1, doc="steps after which a probe gives up")
    probes: int = param(8, ge=1, doc="independent probes, the rows of a batch")
    overlap: int = param(2, ge=1, doc="probes that must agree on a rationale position")
    sampler: Literal["uniform", "inferential"] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlap > self.probes:
            raise ValueError(f"ReAGent.overlap must be <= probes = {self.probes}, got {self.overlap}")

    def explain(
        self,
        model: Any,
        input_ids: Tensor,
        target: int | Sequence[int] | Tensor | None = None,
        attention_mask: Tensor | None = None,
        frozen: Tensor | None = None,
        tokenizer: Any = None,
        sampler: Sampler | None = None,
        seed: int = 0,
    ) -> Attribution:
        """Explains the model's next token, a given one, or each token of a given (generated) continuation.

        input_ids: one prompt, (n,) or (1, n). attention_mask: alike, 0 at padding, which the result omits.
        target: None for the greedy next token, an id, or T ids that follow the prompt, each explained from
        all tokens before it. frozen: bool like input_ids, tokens neither replaced nor scored (chat template,
        image placeholders). sampler: used instead of the field; maps (ids (probes, m), generator) to
        replacements (probes, m). Scores are the mean softmax of converged probes: they sum to 1 per target.
        details, one entry per target: whether any probe `converged`, how many `stopped`, `steps`, the
        target's `probability`, and the `rationale`.

        Target t draws from one generator on the CPU, seeded with seed + t, in this order: the start, then in
        each step the mask, the replacements, the replacements of the stop test.
        Raises PromptError for other shapes or an all frozen prompt, UsageError for bad targets.
        """
        prompt, places = one_prompt(input_ids, attention_mask)
        prompt = prompt.to(getattr(model, "device", prompt.device))
        fixed = torch.zeros_like(prompt, dtype=torch.bool)
        if frozen is not None:
            flags = torch.as_tensor(frozen).reshape(-1)
            if len(flags) != torch.as_tensor(input_ids).numel():
                raise PromptError(f"frozen must have one entry per input id, got {len(flags)}")
            fixed = flags.to(places.device)[places].bool().to(prompt.device)
        if fixed.all():
            raise PromptError("frozen must leave at least one token to score, got all of them")
        with reading(model):
            targets = _targets(model, prompt, target)  # (T,)
            T, m = len(targets), len(prompt)
            ids = torch.cat([prompt, targets])  # (m + T,)
            scores = torch.full((T, m + T - 1), math.nan)
            details: dict[str, list[Any]] = {
                name: [] for name in ("converged", "stopped", "steps", "probability", "rationale")
            }
            if sampler is None and self.sampler == "uniform":
                sampler = uniform_sampler(non_special_ids(model, tokenizer))
            for t in range(T):
                y = ids[: m + t]
                scored = ~torch.cat([fixed, fixed.new_zeros(t)])
                draw = sampler or _repeated(inferential_sampler(model), y)
                s, stopped, steps, p_0 = self._probe(model, y, ids[m + t], scored, draw, seed + t)
                mean, converged = aggregate(s, stopped)
                scores[t, : m + t] = mean.masked_fill(~scored, math.nan).cpu()
                agreed = rationale(s, self._kept(scored), self.overlap) & scored
                details["converged"].append(bool(converged))
                details["stopped"].append(int(stopped.sum()))
                details["steps"].append(steps)
                details["probability"].append(p_0)
                details["rationale"].append(agreed.nonzero()[:, 0].tolist())
        texts = token_texts(tokenizer, ids.tolist())
        special = set() if tokenizer is None else set(tokenizer.all_special_ids)
        return Attribution(
            scores=scores,
            inputs=texts[:-1],
            targets=texts[m:],
            method=str(self),
            input_ids=ids[:-1].tolist(),
            target_ids=targets.tolist(),
            spans=[Span("special", i, i + 1) for i, token in enumerate(ids[:-1].tolist()) if token in special],
            seen=[m + t for t in range(T)],
            details=details,
        )

    def _kept(self, scored: Tensor) -> int:
        """N: top_n, or its share of the scored positions, rounded up."""
        if isinstance(self.top_n, float):
            return math.ceil(self.top_n * int(scored.sum()) - 1e-9)
        return self.top_n

    def _probe(
        self, model: Any, y: Tensor, z: Tensor, scored: Tensor, draw: Sampler, seed: int
    ) -> tuple[Tensor, Tensor, int, float]:
        """All probes of one target z of the context y (n,): s (B, n), stopped (B,), steps, p_0."""
        generator = torch.Generator().manual_seed(seed)
        B, n, N = self.probes, len(y), self._kept(scored)
        rows = y.expand(B, n)
        p_0 = next_logits(model, input_ids=y[None]).softmax(-1)[0, z]
        ell = torch.rand(B, n, generator=generator).to(y.device)
        stopped = torch.zeros(B, dtype=torch.bool, device=y.device)
        s = importance(ell, scored)
        step = 0
        for _ in range(self.max_steps):
            step += 1
            active = (~stopped).nonzero()[:, 0]  # probes that stopped cost nothing more
            m = (torch.rand(B, n, generator=generator) < self.rho).to(y.device) & scored
            y_1 = torch.where(m, _checked(draw(rows, generator), rows), rows)
            d = torch.zeros(B, device=y.device)
            d[active] = p_0 - next_logits(model, input_ids=y_1[active]).softmax(-1)[:, z]
            ell = update(ell, m, d, stopped)
            s = importance(ell, scored)
            y_2 = torch.where(kept_positions(s, N, scored), rows, _checked(draw(rows, generator), rows))
            stopped[active] = reproduces(next_logits(model, input_ids=y_2[active]), z, self.top_k)
            if stopped.all():
                break
        return s, stopped, step, float(p_0)


def _targets(model: Any, prompt: Tensor, target: int | Sequence[int] | Tensor | None) -> Tensor:
    logits = next_logits(model, input_ids=prompt[None])  # (1, V)
    if target is None:
        return logits.argmax(-1).to(prompt)
    ids = torch.as_tensor(target).reshape(-1).to(prompt)
    if not len(ids) or ids.min() < 0 or ids.max() >= logits.shape[-1]:
        raise UsageError(f"target must be ids in [0, {logits.shape[-1]}), at least one, got {ids.tolist()}")
    return ids


def _repeated(sampler: Sampler, y: Tensor) -> Sampler:
    """A sampler without chance, asked once: every probe reads the same context."""
    once = sampler(y[None], torch.Generator())
    return lambda ids, generator: once.expand_as(ids)


def _checked(replacements: Tensor, rows: Tensor) -> Tensor:
    if replacements.shape != rows.shape:
        raise UsageError(f"sampler must return ids of shape {tuple(rows.shape)}, got {tuple(replacements.shape)}")
    return replacements.to(rows)
