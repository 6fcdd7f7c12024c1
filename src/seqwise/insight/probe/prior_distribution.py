"""Prior influence: does a model miss what it has computed, because the right answer is improbable beforehand?

    a(y)      = mean over neutral templates of the mean log p of the tokens of y behind them
    log pi(y) = a(y) - logsumexp_Y a                          Y: all answers of the task
    unlikely  fewer than half of an item's candidates have a strictly smaller pi than the right answer y*
    L_l(y)    = logit of y's first token, read behind layer l through final norm and unembedding; l = 0: embedding
    rho_l     = Spearman over y of (L_l(y), log pi(y))
    margin_l  = L_l(y*) - L_l(y^)                             y^: the strongest wrong answer
    prior layer = argmax_{l >= 1} rho_l - rho_{l-1}
    b         = slope of a logistic regression of being right on log pi(y*)

The right answer is there if some margin_l > 0 where the model's answer is wrong. Remedies: a sentence in the prompt, or
low-rank adapters in one layer alone, tuned on some answers and judged on others.
"Identifying and Mitigating the Influence of the Prior Distribution in Large Language Models", arXiv 2504.12585. From
its abstract; all exact definitions are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from seqwise.core import hf
from seqwise.core.anatomy import Anatomy
from seqwise.core.config import Configured, param
from seqwise.core.errors import PromptError, UnsupportedModel
from seqwise.insight.explain.base import reading
from seqwise.insight.probe.base import ROWS, padded, surprisals

INSTRUCTION = "Do not rely on prior knowledge or on how common an answer is; compute it from the input."

# the prior


def log_prior(scores: Tensor) -> Tensor:
    """log pi (Y,) from the length-normalised log-probability of every answer behind every template, (templates, Y)."""
    return scores.double().mean(0).log_softmax(-1)


def unlikely(log_pi: Tensor, truth: int) -> bool:
    """Whether fewer than half of the candidates, log_pi (C,), have a strictly smaller prior than the right one."""
    return int((log_pi < log_pi[truth]).sum()) < len(log_pi) / 2


def towards_prior(log_pi: Tensor, truth: int, answer: int) -> bool:
    """Whether a wrong answer has a larger prior than the right one, log_pi (C,)."""
    return answer != truth and bool(log_pi[answer] > log_pi[truth])


def split_answers(log_pi: Tensor, seed: int = 0) -> tuple[list[int], list[int]]:
    """Disjoint halves of the answers (Y,), alike in prior: of each two neighbours by prior one goes to either half."""
    generator = torch.Generator().manual_seed(seed)
    order = log_pi.argsort(descending=True, stable=True).tolist()
    halves: tuple[list[int], list[int]] = [], []
    for start in range(0, len(order), 2):
        first = int(torch.randint(2, (1,), generator=generator))
        for k, answer in enumerate(order[start : start + 2]):
            halves[(first + k) % 2].append(answer)
    return sorted(halves[0]), sorted(halves[1])


# ranks and regressions


def average_ranks(x: Tensor) -> Tensor:
    """Ranks of x (..., n) from 1 for the smallest; ties share the mean of theirs. Float64."""
    ordered, x = x.sort(-1).values.contiguous(), x.contiguous()
    below = torch.searchsorted(ordered, x)
    return (below + torch.searchsorted(ordered, x, right=True) + 1).double() / 2


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Rank correlation of x (..., n) and y (..., n), ties at their mean rank: (...,); NaN where all of one tie."""
    a, b = (ranks - ranks.mean(-1, keepdim=True) for ranks in (average_ranks(x), average_ranks(y)))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


class Slope(NamedTuple):
    """Logistic regression of hits on one predictor: log-odds = intercept + slope x; its Wald test. All NaN where hits
    are all the same or the predictor separates them: there is no finite slope."""

    intercept: float
    slope: float
    error: float
    p: float


def logistic_slope(x: Tensor, hits: Tensor) -> Slope:
    """Maximum likelihood without penalty: x (n,), hits (n,) 0 or 1."""
    x, y = x.double(), hits.double()
    spread = x.std(correction=0) if len(x) else x.new_zeros(())
    low, high = (x[y == 0], x[y == 1])
    none = Slope(*[math.nan] * 4)
    if not len(low) or not len(high) or float(spread) == 0:
        return none
    if float(low.max()) <= float(high.min()) or float(high.max()) <= float(low.min()):
        return none
    centre = x.mean()
    X = torch.stack([torch.ones_like(x), (x - centre) / spread], -1)  # (n, 2)
    beta = x.new_zeros(2)

    def likelihood(at: Tensor) -> Tensor:
        return (y * (X @ at) - nn.functional.softplus(X @ at)).sum()

    for _ in range(100):
        p = (X @ beta).sigmoid()
        information = X.mT @ (X * (p * (1 - p))[:, None])
        step = torch.linalg.solve(information, X.mT @ (y - p))
        while likelihood(beta + step) < likelihood(beta) - 1e-12:  # a full Newton step may overshoot
            step = step / 2
        beta = beta + step
        if float(step.abs().max()) < 1e-10:
            break
    p = (X @ beta).sigmoid()
    error = torch.linalg.inv(X.mT @ (X * (p * (1 - p))[:, None]))[1, 1].sqrt()
    z = float(beta[1] / error)
    slope = beta[1] / spread
    return Slope(float(beta[0] - slope * centre), float(slope), float(error / spread), 2 * NormalDist().cdf(-abs(z)))


# the lens


def lens(h: Tensor, norm: Callable[[Tensor], Tensor] | None, head: Tensor, bias: Tensor | None = None) -> Tensor:
    """L_l: un-normed streams h (..., D) through the final norm and the unembedding rows head (Y, D): (..., Y) float32.

    The last entry of a library's hidden states is often normed already: pass what enters the norm.
    """
    normed = h if norm is None else norm(h)
    logits = normed.float() @ head.float().mT
    return logits if bias is None else logits + bias.float()


def affine_lens(h: Tensor, last: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """A (D, D) and c (D,) with h A + c close to `last`: streams (N, D) behind a layer and behind the last one.

    Early layers write in other directions than the last; through this translation `lens` reads them with less bias.
    ridge: penalty on the distance of A from the identity, as a share of the streams' mean square.
    """
    x, y = h.double(), last.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    penalty = ridge * x.square().sum() / x.shape[1] * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    A = torch.linalg.solve(x.mT @ x + penalty, x.mT @ y + penalty)
    return A.to(h.dtype), (mean_y - mean_x @ A).to(h.dtype)


def rival(scores: Tensor, truth: int) -> int:
    """y^: the model's answer where it is wrong, else the best other candidate; scores (C,), ties: the earlier."""
    others = scores.clone()
    others[truth] = -math.inf
    return int((others == others.max()).nonzero()[0])


def bystander(candidates: int, truth: int, wrong: int) -> int | None:
    """A candidate that is neither y* nor y^, the next behind y* in their circle; None of two. What the lens prefers it
    by is what chance gives."""
    others = ((truth + k) % candidates for k in range(1, candidates))
    return next((one for one in others if one != wrong), None)


def margins(L: Tensor, truth: int, wrong: int) -> Tensor:
    """L_l(y*) - L_l(y^): (..., C) -> (...,)."""
    return L[..., truth] - L[..., wrong]


def truth_rank(L: Tensor, truth: int) -> Tensor:
    """Rank of y* among the candidates (..., C), 1 for the best, ties at their mean rank: (...,)."""
    return average_ranks(-L)[..., truth]


def prior_layer(rho: Tensor) -> int:
    """The layer l >= 1 with the largest rho_l - rho_{l-1}, rho (layers + 1,); ties: the earlier."""
    gain = rho.diff().nan_to_num(-math.inf)
    return int((gain == gain.max()).nonzero()[0]) + 1


def computed_inside(margin: Tensor) -> Tensor:
    """Whether some layer prefers y*: margins (layers + 1, ...) -> bool (...,)."""
    return (margin > 0).any(0)


# reading a model


def answer_scores(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Tensor:
    """Mean log-probability of the tokens of each answer behind each prompt: (P, Y) float32.

    Ids; answers as they go on behind the prompt, so with the blank before a word.
    """
    _check_answers(answers)
    scored = surprisals(model, [[*prompt, *answer] for prompt in prompts for answer in answers])
    lengths = [len(answer) for _ in prompts for answer in answers]
    means = [-one[-length:].mean() for one, length in zip(scored, lengths, strict=True)]
    return torch.stack(means).view(len(prompts), len(answers))


@contextmanager
def _streams(model: nn.Module) -> Iterator[list[Tensor]]:
    """The un-normed streams of each forward meanwhile: what enters layer 1, then what leaves each layer."""
    layers, kept, hooks = Anatomy.of(model).layers, list[Tensor](), []
    try:
        hooks.append(
            layers[0].register_forward_pre_hook(
                lambda module, args, kwargs: kept.append(hf.hidden_argument(args, kwargs)), with_kwargs=True
            )
        )
        hooks += [
            layer.register_forward_hook(lambda module, args, out: kept.append(hf.hidden_of(out))) for layer in layers
        ]
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def last_streams(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """At the last token of each prompt: un-normed streams (layers + 1, P, D) and log-probabilities (P, V), float32."""
    padded(prompts)
    device = next(model.parameters()).device
    streams, logps = [], []
    with reading(model), _streams(model) as kept:
        for start in range(0, len(prompts), ROWS):
            ids, mask = (x.to(device) for x in padded(prompts[start : start + ROWS]))
            kept.clear()
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            row, last = torch.arange(len(ids), device=device), mask.sum(-1) - 1
            streams.append(torch.stack([h[row, last].float().cpu() for h in kept]))
            logps.append(logits[row, last].float().log_softmax(-1).cpu())
    return torch.cat(streams, 1), torch.cat(logps)


@dataclass(frozen=True)
class Item:
    """A prompt and its candidates, token ids; truth: index of the right one."""

    prompt: Sequence[int]
    candidates: Sequence[Sequence[int]]
    truth: int


@dataclass(frozen=True)
class Reading:
    """What the model does with one item. answer: index of its best candidate (ties: the earlier); scores (C,): mean
    log-probabilities. By layer, from 0 for the embedding, (layers + 1,): margin against y^, the same of a bystander
    (None of two candidates), rank of y*, and rho. distinct: whether y^ differs from both in its first token, which is
    all that the lens reads."""

    answer: int
    right: bool
    scores: Tensor
    margin: Tensor
    bystander: Tensor | None
    rank: Tensor
    rho: Tensor
    distinct: bool


@dataclass(frozen=True)
class PriorInfluence(Configured):
    """Answers under a prior, the layers it shows in, and its removal by a sentence or by tuning one layer.

    rank, alpha, rate, epochs, batch: of the adapters in `tune`.
    """

    instruction: str = INSTRUCTION
    rank: int = param(8, ge=1, doc="of the adapters")
    alpha: float = param(16.0, gt=0, doc="adapters are scaled by alpha / rank")
    rate: float = param(1e-4, gt=0, doc="learning rate of AdamW")
    epochs: int = param(2, ge=1, doc="passes over the items")
    batch: int = param(16, ge=1, doc="items per step")

    abstract: ClassVar[bool] = False

    def instructed(self, prompt: str) -> str:
        """The prompt behind the sentence that asks to leave the prior aside."""
        return f"{self.instruction} {prompt}"

    def log_prior(self, model: Any, templates: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Tensor:
        """log pi (Y,) of answers behind neutral prompts of the same form. Keep it fixed when the model is tuned."""
        return log_prior(answer_scores(model, templates, answers))

    def read(self, model: Any, items: Sequence[Item], log_pi: Sequence[Tensor]) -> list[Reading]:
        """How the model answers each item; log_pi: per item the prior of its candidates, (C,).

        Raises PromptError for an item without two candidates, or a prior that does not fit.
        """
        for i, (item, pi) in enumerate(zip(items, log_pi, strict=True)):
            _check_answers(item.candidates)
            if not 2 <= len(item.candidates) == len(pi) or not 0 <= item.truth < len(item.candidates):
                raise PromptError(
                    f"item {i + 1} must have two candidates or more, one of them right, each with its prior, got "
                    f"{len(item.candidates)}, number {item.truth}, and {len(pi)}"
                )
        h, logps = last_streams(model, [item.prompt for item in items])  # (layers + 1, P, D), (P, V)
        anatomy = Anatomy.of(model)
        unembed = model.get_output_embeddings()
        found = []
        for p, (item, pi) in enumerate(zip(items, log_pi, strict=True)):
            first = torch.tensor([candidate[0] for candidate in item.candidates])
            if all(len(candidate) == 1 for candidate in item.candidates):
                scores = logps[p, first]
            else:
                scores = answer_scores(model, [item.prompt], item.candidates)[0]
            rows = first.to(unembed.weight.device)
            bias = getattr(unembed, "bias", None)
            with reading(model):
                L = lens(
                    h[:, p].to(unembed.weight),
                    anatomy.final_norm,
                    unembed.weight[rows],
                    None if bias is None else bias[rows],
                ).cpu()
            answer, wrong = int((scores == scores.max()).nonzero()[0]), rival(scores, item.truth)
            third = bystander(len(scores), item.truth, wrong)
            found.append(
                Reading(
                    answer,
                    answer == item.truth,
                    scores,
                    margins(L, item.truth, wrong),
                    None if third is None else margins(L, third, wrong),
                    truth_rank(L, item.truth),
                    spearman(L, pi.expand_as(L)),
                    int(first[wrong]) not in {int(first[i]) for i in (item.truth, third) if i is not None},
                )
            )
        return found

    def tune(self, model: Any, layer: int, items: Sequence[Item], seed: int = 0) -> Adapters:
        """Adapters in one layer (from 1, as the lens counts) tuned on the right answers of items, by cross entropy.

        The model's own weights stay; the adapters act only inside `with adapters.on():`.
        """
        adapters = Adapters(model, layer, self.rank, self.alpha, seed)
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(adapters.parameters(), lr=self.rate, weight_decay=0.0)
        asks = [p for p in model.parameters() if p.requires_grad]
        for p in asks:
            p.requires_grad_(False)
        try:
            with adapters.on():
                for _ in range(self.epochs):
                    for rows in torch.randperm(len(items), generator=generator).split(self.batch):
                        told = [[*items[i].prompt, *items[i].candidates[items[i].truth]] for i in rows.tolist()]
                        ids, mask = (x.to(device) for x in padded(told))
                        starts = torch.tensor([len(items[i].prompt) for i in rows.tolist()], device=device)
                        place = torch.arange(ids.shape[1], device=device)
                        counted = (place >= starts[:, None]) & (mask > 0)
                        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                        loss = nn.functional.cross_entropy(
                            logits[:, :-1][counted[:, 1:]].float(), ids[:, 1:][counted[:, 1:]]
                        )
                        optimizer.zero_grad(set_to_none=True)
                        loss.backward()
                        optimizer.step()
        finally:
            for p in asks:
                p.requires_grad_(True)
        return adapters


class Adapters(nn.Module):
    """Low-rank additions W + (alpha / rank) B A to all matrices of one layer (from 1); B begins at 0: no change."""

    def __init__(self, model: nn.Module, layer: int, rank: int = 8, alpha: float = 16.0, seed: int = 0) -> None:
        super().__init__()
        layers = Anatomy.of(model).layers
        if not 1 <= layer <= len(layers):
            raise ValueError(f"layer must be in [1, {len(layers)}], got {layer}")
        # kept out of the registered modules: the model is not a part of its adapters
        self._matrices = [module for module in layers[layer - 1].modules() if isinstance(module, nn.Linear)]
        if not self._matrices:
            raise UnsupportedModel(f"layer {layer} of {type(model).__name__} has no nn.Linear to adapt")
        generator = torch.Generator().manual_seed(seed)
        self.scale = alpha / rank
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for matrix in self._matrices:
            A = torch.randn(rank, matrix.in_features, generator=generator) / matrix.in_features**0.5
            self.A.append(nn.Parameter(A.to(matrix.weight)))
            self.B.append(nn.Parameter(torch.zeros(matrix.out_features, rank).to(matrix.weight)))

    @contextmanager
    def on(self) -> Iterator[None]:
        """Meanwhile the model runs with the additions."""

        def adding(A: Tensor, B: Tensor) -> Callable[..., Tensor]:
            return lambda module, args, out: out + args[0] @ A.mT @ B.mT * self.scale

        hooks = [
            matrix.register_forward_hook(adding(A, B))
            for matrix, A, B in zip(self._matrices, self.A, self.B, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _check_answers(answers: Sequence[Sequence[int]]) -> None:
    if not answers or not all(len(answer) for answer in answers):
        raise PromptError(f"answers must have at least one token each, got {[len(answer) for answer in answers]}")
