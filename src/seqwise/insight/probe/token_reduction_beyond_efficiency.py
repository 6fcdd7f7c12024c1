"""Token reduction beyond efficiency: what fewer tokens do to a model, besides making it cheaper.

    X' = P(X, E(X))      E: criterion, a score per token      P: strategy, N tokens -> M = floor(keep N)

    role 1 representation    kept tokens: hits, coverage, position; KL(full || image withdrawn after layer l)
    role 2 alignment         answer words and kept visual tokens: largest cosine, modality gap, purity of groups
    role 3 output            tokens, repetitions, objects that are named but absent
    role 4 training          gradient norms, loss spikes, steps to a loss, with and without token selection
    role 5 long input        recall over length, and the area under that curve

Each difference comes with a paired bootstrap interval, and each role with "supported", "not supported" or "no power".
Comparisons are at an equal number of tokens: with as many visual tokens drawn by chance, else with the plain model.
"Token Reduction Should Go Beyond Efficiency in Generative Models -- From Vision, Language to Multimodality", arXiv
2505.18227. The paper is a survey: the roles, the workflow and the rewards are its own, all metrics are ours. It counts
the share r that is removed; `keep` is 1 - r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, kl_div, normalize, one_hot

from seqwise.core.anatomy import Anatomy
from seqwise.core.config import Configured, param
from seqwise.core.errors import PromptError, UsageError
from seqwise.core.method import Method
from seqwise.core.run import Run
from seqwise.core.select import top_k
from seqwise.core.views import Stage

# the taxonomy

FACETS: dict[str, tuple[str, ...]] = {
    "modality": ("vision", "language", "multimodal", "agent"),
    "criterion": (
        "attention(cls)",
        "attention(last)",
        "attention(text)",
        "attention(image)",
        "attention(all)",
        "similarity",
        "gradient",
        "entropy",
        "parametric",
        "transition",
        "spatial",
    ),
    "strategy": ("prune-hard", "prune-soft", "merge", "transform", "distil", "mask-only"),
    "site": ("encoder", "projector", "prefill layers", "KV cache", "output", "loss", "data"),
    "guidance": ("none", "instruction", "answer"),
    "training": ("free", "post-hoc", "integrated"),
    "aims": (
        "efficiency",
        "representation",
        "alignment",
        "overthinking-hallucination",
        "stability",
        "long-context",
    ),
}


def check_facets(facets: Mapping[str, str | Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """A method's place in the taxonomy, one value or several per facet, as tuples; what is unknown is left out.

    Raises:
        ValueError: a facet or a value that the taxonomy does not know; names both and what is allowed.
    """
    checked = {}
    for name, given in facets.items():
        if name not in FACETS:
            raise ValueError(f"facets must be some of {', '.join(FACETS)}, got {name!r}")
        values = (given,) if isinstance(given, str) else tuple(given)
        for value in values:
            if value not in FACETS[name]:
                raise ValueError(f"facet {name} must be some of {', '.join(FACETS[name])}, got {value!r}")
        checked[name] = values
    return checked


# criteria: a score per token, larger stays


def attention_score(A: Tensor, rows: Tensor | None = None) -> Tensor:
    """Attention received from the rows Q: A (..., h, q, n), mean over heads, sum over rows -> (..., n).

    rows: bool (q,), the rows of Q (CLS, the last, the text, ...); None for all.
    """
    mean = A.mean(-3)
    return (mean if rows is None else mean[..., rows, :]).sum(-2)


def similarity_score(X: Tensor) -> Tensor:
    """How little a token repeats others: 1 - its mean cosine to the others. X (..., n, D), n >= 2 -> (..., n)."""
    unit = normalize(X, dim=-1)
    n = X.shape[-2]
    return 1 - ((unit * unit.sum(-2, keepdim=True)).sum(-1) - unit.square().sum(-1)) / (n - 1)


def gradient_score(gradient: Tensor) -> Tensor:
    """|dL / dx_i|: gradients (..., n, D) -> (..., n)."""
    return gradient.norm(dim=-1)


def entropy_score(logits: Tensor) -> Tensor:
    """Entropy of the prediction at each token in nats: logits (..., n, V) -> (..., n). (Not that of pixels.)"""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


# strategies: N tokens -> M


def kept_count(N: int, keep: float) -> int:
    """M = floor(keep N), whole products despite rounding. Raises ValueError unless keep is in (0, 1]."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep} (share of the tokens that stays)")
    return math.floor(N * keep + 1e-9)


def prune(X: Tensor, s: Tensor, M: int) -> tuple[Tensor, Tensor]:
    """The M tokens of largest s, in their order: X (..., n, D), s (..., n) -> tokens (..., M, D), indices (..., M)."""
    index = top_k(s, M)
    return _rows(X, index), index


def package(X: Tensor, s: Tensor, M: int) -> tuple[Tensor, Tensor]:
    """`prune`, and behind its tokens the mean of the dropped ones, weighted by s >= 0 (alike where all are 0).

    Tokens (..., M + 1, D), or (..., n, D) where nothing is dropped.
    """
    kept, index = prune(X, s, M)
    if kept.shape[-2] == X.shape[-2]:
        return kept, index
    dropped = torch.ones_like(s, dtype=torch.bool).scatter(-1, index, False)
    weight = s.masked_fill(~dropped, 0.0)
    weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, dropped.to(s.dtype))
    summary = (weight[..., None] * X).sum(-2, keepdim=True) / weight.sum(-1)[..., None, None]
    return torch.cat([kept, summary], -2), index


def nearest(X: Tensor, centres: Tensor) -> Tensor:
    """Which of the tokens `centres` (..., M), indices, is most like each token of X (..., n, D) by cosine: (..., n)
    int64 in [0, M); centres are their own."""
    unit = normalize(X, dim=-1)
    member = (unit @ _rows(unit, centres).mT).argmax(-1)
    own = torch.arange(centres.shape[-1], device=X.device).expand(centres.shape)
    return member.scatter(-1, centres, own)


def merge(X: Tensor, member: Tensor, M: int, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x' = sum w x / sum w over the members of each group, w the patches that a token stands for.

    X (..., n, D), member (..., n) int64 in [0, M), sizes (..., n), None: 1 each. Returns (tokens (..., M, D), sizes
    (..., M), float32 or wider); a group without members is 0 with size 0. Merging in two steps equals merging in one.
    """
    wide = torch.promote_types(X.dtype, torch.float32)  # half precision cannot count beyond a few hundred patches
    w = torch.ones_like(member, dtype=wide) if sizes is None else sizes.to(wide)
    total = torch.zeros(*member.shape[:-1], M, dtype=wide, device=X.device).scatter_add(-1, member, w)
    summed = torch.zeros(*total.shape, X.shape[-1], dtype=wide, device=X.device)
    summed = summed.scatter_add(-2, member[..., None].expand(X.shape), w[..., None] * X)
    return (summed / total.clamp_min(torch.finfo(wide).tiny)[..., None]).to(X.dtype), total


def pool(X: Tensor, M: int) -> Tensor:
    """Average pooling along the sequence: X (..., n, D) -> (..., M, D)."""
    flat = X.reshape(-1, *X.shape[-2:]).mT
    return adaptive_avg_pool1d(flat, M).mT.reshape(*X.shape[:-2], M, X.shape[-1])


def distil(X: Tensor, Q: Tensor, W_K: Tensor, W_V: Tensor) -> Tensor:
    """softmax(Q (X W_K)^T / sqrt d) X W_V: X (..., n, D), queries Q (M, d), W_K (D, d), W_V (D, E) -> (..., M, E)."""
    return (Q @ (X @ W_K).mT * Q.shape[-1] ** -0.5).softmax(-1) @ (X @ W_V)


@dataclass(frozen=True)
class Reduced:
    """tokens (..., M', D); sizes (..., M'): patches that each stands for; member (..., n): which token each went into,
    -1 for none."""

    tokens: Tensor
    sizes: Tensor
    member: Tensor


def reduce(
    X: Tensor,
    criterion: Tensor | Callable[[Tensor], Tensor],
    strategy: Literal["prune-hard", "prune-soft", "merge", "transform"],
    keep: float,
    sizes: Tensor | None = None,
) -> Reduced:
    """The generic workflow X' = P(X, E(X)) on tokens X (..., n, D); what stays is in its original order.

    criterion: scores (..., n), or what makes them of X; "transform" pools and needs none. "prune-soft" packages the
    dropped tokens into one more; "merge" joins each of them to the most similar kept one. keep = 1 is the identity.

    Raises:
        ValueError: keep outside (0, 1], too small for one token, or an unknown strategy.
    """
    n = X.shape[-2]
    M = kept_count(n, keep)
    if M < 1:
        raise ValueError(f"keep must leave at least one of {n} tokens, got {keep}")
    wide = torch.promote_types(X.dtype, torch.float32)
    w = torch.ones(X.shape[:-1], dtype=wide, device=X.device) if sizes is None else sizes.to(wide)
    if strategy == "transform":
        member = (torch.arange(n, device=X.device) * M // n).expand(X.shape[:-1])
        return Reduced(pool(X, M), merge(w[..., None], member, M, w)[1], member)
    s = criterion(X) if callable(criterion) else criterion
    tokens, index = prune(X, s, M)
    place = torch.arange(M, device=X.device).expand(index.shape)
    gone = torch.full(s.shape, -1, device=X.device)
    if strategy == "prune-hard":
        return Reduced(tokens, w.gather(-1, index), gone.scatter(-1, index, place))
    if strategy == "prune-soft":
        tokens, _ = package(X, s, M)
        member = torch.full_like(gone, M).scatter(-1, index, place)
        return Reduced(tokens, merge(w[..., None], member, tokens.shape[-2], w)[1], member)
    if strategy == "merge":
        member = nearest(X, index)
        tokens, total = merge(X, member, M, w)
        return Reduced(tokens, total, member)
    raise ValueError(f"strategy must be one of prune-hard, prune-soft, merge, transform, got {strategy!r}")


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(-2, index[..., None].expand(*index.shape, x.shape[-1]))


# metrics of role 1: representation


def position_correlation(s: Tensor) -> Tensor:
    """Spearman's correlation of scores (..., n) and token index, ties at their mean rank: (...,); 0 where all tie."""
    ascending, s = s.sort(-1).values.contiguous(), s.contiguous()
    rank = (torch.searchsorted(ascending, s) + torch.searchsorted(ascending, s, right=True)).double()  # 2 mean rank + 1
    rank = rank - rank.mean(-1, keepdim=True)
    place = torch.arange(s.shape[-1], dtype=torch.float64, device=s.device)
    place = place - place.mean()
    scale = rank.square().sum(-1).sqrt() * place.square().sum().sqrt()
    return torch.where(scale > 0, (rank * place).sum(-1) / scale.clamp_min(1e-300), 0.0)


def lower_half_share(kept: Tensor) -> Tensor:
    """Share of the kept tokens, bool (..., N), that are in the second half of the sequence (lower image rows)."""
    half = kept.shape[-1] // 2 + kept.shape[-1] % 2
    return kept[..., half:].sum(-1) / kept.sum(-1).clamp(min=1)


def coverage_entropy(kept: Tensor, grid: tuple[int, int], cells: int = 4) -> Tensor:
    """Entropy of the kept tokens, bool (..., H W), over cells x cells equal parts of their grid, over log cells^2.

    1 where all parts hold alike, 0 where one holds all. A grid that no whole cells fill has nearly equal ones.
    """
    H, W = grid
    row = torch.arange(H, device=kept.device) * cells // H
    column = torch.arange(W, device=kept.device) * cells // W
    cell = (row[:, None] * cells + column).flatten()
    counts = kept.double() @ one_hot(cell, cells**2).double()  # (..., cells^2)
    p = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return -torch.xlogy(p, p).sum(-1) / math.log(cells**2)


def hit_rate(kept: Tensor, relevant: Tensor) -> Tensor:
    """Share of the relevant tokens, bool (..., N), that were kept: (...,); NaN where none is relevant."""
    return (kept & relevant).sum(-1) / relevant.sum(-1)


def withdrawal_kl(full: Tensor, withdrawn: Tensor) -> Tensor:
    """KL(full || withdrawn) in nats of next-token logits (..., V), withdrawn (l, ..., V) one per layer -> (l, ...)."""
    full, withdrawn = full.double().log_softmax(-1), withdrawn.double().log_softmax(-1)
    return kl_div(withdrawn, full.expand_as(withdrawn), reduction="none", log_target=True).sum(-1)


def first_unused_layer(kl: Tensor, eps: float) -> int | None:
    """The first of the layers 1.. after which the image can go at less than eps nats, kl (l,); None for none."""
    below = (kl < eps).nonzero()[:, 0]
    return int(below[0]) + 1 if len(below) else None


# metrics of role 2: alignment


def word_alignment(words: Tensor, visual: Tensor) -> Tensor:
    """Mean over answer words (w, D) of the largest cosine to a visual token (n, D): a scalar."""
    return (normalize(words, dim=-1) @ normalize(visual, dim=-1).mT).amax(-1).mean()


def modality_gap(visual: Tensor, text: Tensor) -> Tensor:
    """|mean v - mean t| of unit vectors, visual (n, D) and text (m, D): a scalar."""
    return (normalize(visual, dim=-1).mean(0) - normalize(text, dim=-1).mean(0)).norm()


def object_purity(member: Tensor, owner: Tensor, M: int) -> Tensor:
    """Of each of M tokens the share of its patches that lie on one object: (M,), NaN for tokens without patches.

    member (N,): which token each patch went into, -1 for none; owner (N,): the object on each patch, -1 background,
    which counts as one.
    """
    inside = member >= 0
    pair = member[inside] * (int(owner.max()) + 2) + owner[inside] + 1
    counts = torch.bincount(pair, minlength=M * (int(owner.max()) + 2)).view(M, -1)
    return counts.amax(-1) / counts.sum(-1)


# metrics of role 3: output


def tokens_per_correct(lengths: Sequence[int], correct: Sequence[bool]) -> float:
    """Tokens of all answers over the number of correct ones; infinite without one."""
    return sum(lengths) / hits if (hits := sum(map(bool, correct))) else math.inf


def repeated_ngrams(ids: Sequence[int], n: int = 3) -> float:
    """Share of a text's n-grams that occurred before in it; 0 for texts of fewer than n tokens."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def yes_rate(yes: Sequence[bool]) -> float:
    """Share of yes among the answers to balanced questions; 0.5 is without bias."""
    return sum(map(bool, yes)) / len(yes)


def presence_f1(yes: Sequence[bool], truth: Sequence[bool]) -> float:
    """F1 of "yes" on object-presence questions; 0 without a true yes."""
    hits = sum(bool(a and b) for a, b in zip(yes, truth, strict=True))
    return 2 * hits / total if (total := sum(map(bool, yes)) + sum(map(bool, truth))) else 0.0


def absent_objects(named: Sequence[str], present: Sequence[str]) -> int:
    """Different objects that an answer names and the image does not hold."""
    return len(set(named) - set(present))


# metrics of role 4: training


def norm_variation(norms: Sequence[float]) -> float:
    """Coefficient of variation of gradient norms: standard deviation (of the population) over mean."""
    x = torch.tensor(norms, dtype=torch.float64)
    return float(x.std(correction=0) / x.mean())


def loss_spikes(losses: Sequence[float], window: int = 50, deviations: float = 4.0) -> int:
    """Losses above mean + 4 standard deviations of the `window` before them; the first `window` cannot be any."""
    x = torch.tensor(losses, dtype=torch.float64)
    if len(x) <= window:
        return 0
    before = x.unfold(0, window, 1)[:-1]  # (steps, window)
    return int((x[window:] > before.mean(-1) + deviations * before.std(-1, correction=0)).sum())


def steps_to(losses: Sequence[float], target: float) -> int | None:
    """Steps, from 1, until a loss is at most the target; None where none is."""
    return next((step for step, loss in enumerate(losses, 1) if loss <= target), None)


def excess_loss_mask(current: Tensor, reference: Tensor, share: float) -> Tensor:
    """Tokens to train on: the floor(share n) with the largest current - reference loss, (n,) each -> bool (n,).

    Noise is hard for the reference too, so that it does not stand out.
    """
    index = top_k((current - reference).detach(), kept_count(current.shape[-1], share))
    return torch.zeros_like(current, dtype=torch.bool).scatter(-1, index, True)


# metrics of role 5: long input


def recall_area(lengths: Sequence[float], recall: Sequence[float]) -> float:
    """Area under recall over ascending lengths, trapezoids, over the range of the lengths: in the unit of recall."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (lengths, recall))
    return float(torch.trapezoid(y, x) / (x[-1] - x[0]))


# rewards for the length of reasoning


def exact_length_reward(correct: bool, n_target: int, n_y: int, alpha: float) -> float:
    """I(y = y*) - alpha |n_t - n_y|."""
    return float(correct) - alpha * abs(n_target - n_y)


def maximum_length_reward(correct: bool, n_target: int, n_y: int, alpha: float, delta: float = 0.5) -> float:
    """I(y = y*) clip(alpha (n_t - n_y) + delta, 0, 1)."""
    return float(correct) * min(max(alpha * (n_target - n_y) + delta, 0.0), 1.0)


def efficiency_reward(length: float, accuracy: float, L_ref: float, A_ref: float, lam: float) -> float:
    """L_ref / L(y) - 1 + lambda (A(y) - A_ref); L_ref, A_ref: means of a reference model on the prompt."""
    return L_ref / length - 1 + lam * (accuracy - A_ref)


# intervals and verdicts

SUPPORTED, NOT_SUPPORTED, NO_POWER = "supported", "not supported", "no power"
LEAST_ITEMS = 8  # fewer say nothing


@dataclass(frozen=True)
class Paired:
    """Mean of ours - baseline over n items, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int


def paired_bootstrap(ours: Sequence[float], baseline: Sequence[float], seed: int = 0, resamples: int = 2000) -> Paired:
    """The difference, item by item. Raises ValueError where items do not pair up or are none."""
    if len(ours) != len(baseline) or not len(ours):
        raise ValueError(f"paired_bootstrap needs as many items on both sides, got {len(ours)} and {len(baseline)}")
    d = torch.tensor(ours, dtype=torch.float64) - torch.tensor(baseline, dtype=torch.float64)
    draw = torch.randint(len(d), (resamples, len(d)), generator=torch.Generator().manual_seed(seed))
    low, high = torch.quantile(d[draw].mean(-1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Paired(float(d.mean()), low, high, len(d))


def judge(found: Paired, effect: float, *, no_less: bool = False) -> str:
    """Does the difference support that ours is more?

    Supported where the interval lies above 0, not supported where it lies below `effect`, the least difference that
    matters. no_less: the claim is that ours is not less by `effect`: supported above -effect, not supported below 0.
    Otherwise, or under 8 items, there is no power to tell.
    """
    if found.n < LEAST_ITEMS:
        return NO_POWER
    if found.low > (-effect if no_less else 0.0):
        return SUPPORTED
    return NOT_SUPPORTED if found.high < (0.0 if no_less else effect) else NO_POWER


# the probe


@dataclass(frozen=True)
class Item:
    """A prompt whose next token is known. What a role needs and the item lacks, it leaves out.

    inputs: of the model, (1, n). answer: a token id. relevant: bool (visual tokens,), what the question is about;
    owner: int64 (visual tokens,), the object on each, -1 background. present: of a question whether an object is there,
    whether it is.
    """

    inputs: Mapping[str, Tensor]
    answer: int
    relevant: Tensor | None = None
    owner: Tensor | None = None
    present: bool | None = None


@dataclass(frozen=True)
class Row:
    """One metric of one role: means of the method and of what it is compared with, and their paired difference, signed
    so that more is better. verdict: see `judge`; "no power" with the reason in `note` where it was not measured. pairs:
    (ours, theirs) of each item."""

    role: int
    metric: str
    baseline: str = ""
    ours: float | None = None
    theirs: float | None = None
    difference: Paired | None = None
    verdict: str = NO_POWER
    note: str = ""
    pairs: tuple[tuple[float, float], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Roles:
    """What a probe found. depth: mean KL(full || image withdrawn after layer l) in nats, l = 1.. of the plain model.

    kept: share of the visual tokens that are left behind the method's last cut; work: of attention, see `Run.report`.
    """

    rows: tuple[Row, ...]
    depth: tuple[float, ...]
    accuracy: tuple[float, float]  # of the method, of the plain model
    tokens_per_correct: tuple[float, float]
    kept: float
    work: float

    def role(self, number: int) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.role == number)


@dataclass(frozen=True)
class BeyondEfficiency(Configured):
    """Runs a vision-language model with and without a method and asks for each claimed role whether it shows.

    >>> found = BeyondEfficiency().probe(model, items, FoPru(budget=0.25), yes=yes_id)
    >>> [(row.metric, row.verdict) for row in found.rows]
    """

    effect: float = param(0.05, gt=0, doc="least difference that matters, in the metric's unit")
    eps: float = param(0.05, gt=0, doc="nats under which a withdrawn image changes nothing")
    cells: int = param(4, ge=2, doc="coverage is told over cells x cells parts of the grid")
    max_new_tokens: int = param(8, ge=1, doc="length of a reply, at most")
    ngram: int = param(3, ge=1, doc="repetitions are told in texts of so many tokens")
    seed: int = param(0, ge=0, doc="of the tokens drawn by chance and of the intervals")

    def probe(self, model: Any, items: Sequence[Item], method: Method, *, yes: int | None = None) -> Roles:
        """Each prompt alone, greedily, through `generate`: plain, under the method, and with as many visual tokens at
        the input as the method leaves in the end, drawn by chance.

        yes: the token id of a yes, for items that say what is `present`. Raises UsageError without items, PromptError
        for a prompt without visual tokens or with facts of another length.
        """
        if not items:
            raise UsageError("items must hold at least one prompt, got none")
        anatomy = Anatomy.of(model)
        anatomy.require({"vision tower"}, "BeyondEfficiency")
        seen = [self._seen(model, anatomy, item, method, number) for number, item in enumerate(items)]
        depth = torch.stack([one.depth for one in seen]).mean(0)  # (L - 1,)
        kept = torch.cat([one.kept for one in seen])
        return Roles(
            rows=(*self._representation(seen), *self._alignment(seen), *self._output(seen, yes),
                  Row(4, "training", note="a trained model shows nothing of its training; see training_role"),
                  self._long_input(seen)),
            depth=tuple(depth.tolist()),
            accuracy=tuple(_mean(getattr(one, arm).right for one in seen) for arm in ("ours", "plain")),  # type: ignore[arg-type]
            tokens_per_correct=tuple(  # type: ignore[arg-type]
                tokens_per_correct([len(getattr(one, arm).reply) for one in seen],
                                   [getattr(one, arm).right for one in seen]) for arm in ("ours", "plain")
            ),
            kept=float(kept.float().mean()),
            work=_mean(one.work for one in seen),
        )  # fmt: skip

    def _seen(self, model: Any, anatomy: Anatomy, item: Item, method: Method, number: int) -> _Seen:
        with _entering(anatomy) as embeds, torch.no_grad():
            plain = self._reply(model, item)
        with method.on(model) as run, _entering(anatomy) as left, torch.no_grad():
            ours = self._reply(model, item)
        assert run.segments is not None
        visual, text = run.segments.visual[0], run.segments.real[0] & ~run.segments.visual[0]
        if not visual.any():
            raise PromptError(f"item {number} has no visual tokens; role probes ask what becomes of them")
        order = run.segments.real[0].cumsum(-1) - 1  # original positions
        last = torch.tensor(_last_rows(run, order), device=order.device)
        kept = torch.isin(order[visual], last)
        entered = torch.tensor(run.kept()[0].get("input", order.tolist()), device=order.device)  # (r,)
        stayed = left[0][0, torch.isin(entered, order[visual]) & torch.isin(entered, last)]
        for name in ("relevant", "owner"):
            value = getattr(item, name)
            if value is not None and len(value) != len(kept):
                raise PromptError(f"item {number}: {name} must have {len(kept)} entries, one per visual token, "
                                  f"got {len(value)}")  # fmt: skip
        luck = torch.rand(len(kept), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + number))
        drawn = torch.zeros(len(kept), dtype=torch.bool).scatter(0, top_k(luck, int(kept.sum())), True)
        with _Only(stays=tuple(drawn.tolist())).on(model), torch.no_grad():
            chance = self._reply(model, item)
        withdrawn = []
        for layer in range(1, len(anatomy.layers)):
            with _Withdrawn(layer=layer).on(model), torch.no_grad():
                withdrawn.append(self._reply(model, item, 1).logits)
        rows, columns = run.segments.row[0, visual], run.segments.column[0, visual]
        grid = (int(rows.max()) + 1, int(columns.max()) + 1)
        return _Seen(
            item, plain, ours, chance, kept.cpu(), drawn, withdrawal_kl(plain.logits, torch.stack(withdrawn)),
            grid if grid[0] * grid[1] == len(kept) else None, embeds[0][0, visual][drawn.to(visual.device)].cpu(),
            stayed.cpu(), embeds[0][0, text].cpu(),
            model.get_input_embeddings().weight[item.answer].detach().cpu(), _groups(run, order, visual),
            run.report().attention_work, int(run.segments.real.sum()),
        )  # fmt: skip

    def _reply(self, model: Any, item: Item, steps: int | None = None) -> _Reply:
        out = model.generate(
            **item.inputs, do_sample=False, max_new_tokens=steps or self.max_new_tokens, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        first = out.logits[0][0].float().cpu()  # (V,)
        reply = out.sequences[0, item.inputs["input_ids"].shape[1] :].tolist()
        return _Reply(first, reply, int(first.argmax()) == item.answer)

    def _row(
        self, role: int, metric: str, baseline: str, ours: Sequence[float], theirs: Sequence[float], *, sign: int = 1,
        no_less: bool = False,
    ) -> Row:  # fmt: skip
        """sign: -1 where less is better."""
        if not ours:
            return Row(role, metric, baseline, note="no item tells")
        found = paired_bootstrap([sign * x for x in ours], [sign * x for x in theirs], self.seed)
        verdict = judge(found, self.effect, no_less=no_less)
        pairs = tuple(zip(ours, theirs, strict=True))
        return Row(role, metric, baseline, _mean(ours), _mean(theirs), found, verdict, pairs=pairs)

    def _representation(self, seen: Sequence[_Seen]) -> list[Row]:
        if all(bool(one.kept.all()) for one in seen):
            none = "the method drops no visual rows"
            rows = [Row(1, name, note=none) for name in ("hit rate", "coverage", "position bias")]
        else:
            about = [one for one in seen if one.item.relevant is not None and one.item.relevant.any()]
            rows = [
                self._row(1, "hit rate", "the share of tokens that stay",
                          [float(hit_rate(one.kept, one.item.relevant.cpu())) for one in about],  # type: ignore[union-attr]
                          [float(one.kept.float().mean()) for one in about]),
                self._row(1, "coverage", "chance", *_pairs(
                    (float(coverage_entropy(mask, one.grid, self.cells)) for mask in (one.kept, one.drawn))
                    for one in seen if one.grid is not None
                ), no_less=True),
                self._row(1, "position bias", "chance", *_pairs(
                    (abs(float(lower_half_share(mask)) - 0.5) for mask in (one.kept, one.drawn)) for one in seen
                ), sign=-1, no_less=True),
            ]  # fmt: skip
        middle = len(seen[0].depth) // 2
        late = [float(one.depth[middle]) for one in seen]
        name = f"KL without the image after layer {middle + 1}"
        return [*rows, self._row(1, name, f"{self.eps} nats", late, [self.eps] * len(late), sign=-1)]

    def _alignment(self, seen: Sequence[_Seen]) -> list[Row]:
        if all(bool(one.kept.all()) for one in seen):
            return [Row(2, name, note="the method drops no visual rows") for name in ("word alignment", "modality gap")]
        dropping = [one for one in seen if one.kept.any()]
        purity = [one for one in seen if one.item.owner is not None and one.groups is not None]
        return [
            self._row(2, "word alignment", "chance", *_pairs(
                (float(word_alignment(one.word[None], visual)) for visual in (one.stayed, one.lucky))
                for one in dropping
            )),
            self._row(2, "modality gap", "chance", *_pairs(
                (float(modality_gap(visual, one.text)) for visual in (one.stayed, one.lucky))
                for one in dropping
            ), sign=-1),
            self._row(2, "object purity", "the same groups on shuffled patches",
                      *_pairs(self._purities(one) for one in purity)),
        ]  # fmt: skip

    def _purities(self, one: _Seen) -> tuple[float, float]:
        assert one.groups is not None and one.item.owner is not None
        owner, M = one.item.owner.cpu(), int(one.groups.max()) + 1
        mixed = owner[torch.randperm(len(owner), generator=torch.Generator().manual_seed(self.seed))]
        ours, theirs = (float(object_purity(one.groups, labels, M).nanmean()) for labels in (owner, mixed))
        return ours, theirs

    def _output(self, seen: Sequence[_Seen], yes: int | None) -> list[Row]:
        absent = [one for one in seen if one.item.present is False] if yes is not None else []
        metrics: tuple[tuple[str, Sequence[_Seen], Callable[[_Reply], float]], ...] = (
            ("tokens per answer", seen, lambda reply: float(len(reply.reply))),
            ("repeated n-grams", seen, lambda reply: repeated_ngrams(reply.reply, self.ngram)),
            ("yes to absent objects", absent, lambda reply: float(int(reply.logits.argmax()) == yes)),
        )
        rows = []
        for name, some, metric in metrics:
            for baseline, other in (("the plain model", "plain"), ("chance", "chance")):
                both = _pairs((metric(one.ours), metric(getattr(one, other))) for one in some)
                rows.append(self._row(3, name, baseline, *both, sign=-1))
        return rows

    def _long_input(self, seen: Sequence[_Seen]) -> Row:
        """Right answers over prompt length against chance; each item weighs what the area gives its length."""
        lengths = sorted({one.length for one in seen})
        if len(lengths) < 2:
            return Row(5, "area under recall over length", "chance", note="all prompts have one length")
        span = lengths[-1] - lengths[0]
        weight = {}
        for i, length in enumerate(lengths):
            sides = (lengths[max(i - 1, 0)], lengths[min(i + 1, len(lengths) - 1)])
            own = sum(one.length == length for one in seen)
            weight[length] = (sides[1] - sides[0]) / 2 / span * len(seen) / own
        ours, theirs = _pairs((weight[one.length] * reply.right for reply in (one.ours, one.chance)) for one in seen)
        return self._row(5, "area under recall over length", "chance", ours, theirs)


def training_role(
    full: Sequence[Sequence[float]], selected: Sequence[Sequence[float]], target: float, *, effect: float = 0.05
) -> tuple[Row, ...]:
    """Role 4 from the clean validation losses, step by step, of trainings on all tokens and on selected ones; runs of
    one seed pair up. Spikes, and steps to the target as a share of the run (1 where it is never reached)."""

    def steps(losses: Sequence[float]) -> float:
        return (steps_to(losses, target) or len(losses)) / len(losses)

    rows = []
    for name, metric in (("loss spikes", lambda x: float(loss_spikes(x))), (f"steps to {target:g}", steps)):
        ours, theirs = [metric(x) for x in selected], [metric(x) for x in full]
        found = paired_bootstrap([-x for x in ours], [-x for x in theirs])
        pairs = tuple(zip(ours, theirs, strict=True))
        verdict = judge(found, effect)
        rows.append(Row(4, name, "all tokens", _mean(ours), _mean(theirs), found, verdict, pairs=pairs))
    return tuple(rows)


@dataclass(frozen=True)
class _Reply:
    logits: Tensor  # (V,) of the first token
    reply: list[int]
    right: bool


@dataclass(frozen=True)
class _Seen:
    """What the probe saw of one item; masks are over its visual tokens."""

    item: Item
    plain: _Reply
    ours: _Reply
    chance: _Reply
    kept: Tensor  # (N,) bool
    drawn: Tensor  # (N,) bool
    depth: Tensor  # (L - 1,)
    grid: tuple[int, int] | None
    lucky: Tensor  # (k, d) the drawn tokens at the language model's input
    stayed: Tensor  # (k, d) and those that the method leaves, as it made them
    text: Tensor  # (m, d)
    word: Tensor  # (d,) embedding of the answer
    groups: Tensor | None  # (N,) which merged token each patch went into
    work: float
    length: int


@dataclass(frozen=True)
class _Only(Method):
    """The visual tokens that are given, of a prompt alone."""

    abstract: ClassVar[bool] = True
    stays: tuple[bool, ...] = ()

    slots: ClassVar[tuple[str, ...]] = ("input.rows",)

    def cut_input(self, stage: Stage) -> Tensor:
        stays = torch.tensor(self.stays, device=stage.visual.device)
        return (stage.live & ~stage.visual).masked_scatter(stage.visual, stays)


@dataclass(frozen=True)
class _Withdrawn(Method):
    """No visual token goes on behind so many layers."""

    abstract: ClassVar[bool] = True
    layer: int = param(1, ge=1)

    slots: ClassVar[tuple[str, ...]] = ("layer.rows",)

    def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
        return (self.layer,)

    def keep_rows(self, stage: Stage) -> Tensor:
        return stage.live & ~stage.visual


@contextmanager
def _entering(anatomy: Anatomy) -> Iterator[list[Tensor]]:
    """What enters the language model meanwhile, forward by forward: (1, r, d) each."""
    embeds: list[Tensor] = []
    hook = anatomy.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        yield embeds
    finally:
        hook.remove()


def _last_rows(run: Run, order: Tensor) -> list[int]:
    """Original positions that are left behind the last cut of rows; all where nothing was cut."""
    cuts = {name: kept for name, kept in run.kept()[0].items() if name == "input" or name.startswith("layer")}
    return list(cuts[max(cuts, key=lambda name: -1 if name == "input" else int(name.split()[1]))]) if cuts else (
        order.tolist()
    )  # fmt: skip


def _groups(run: Run, order: Tensor, visual: Tensor) -> Tensor | None:
    """(N,): which token each visual token was merged into at the input, -1 for none; None where nothing was merged."""
    merged = run.members("input")[0]
    if not merged:
        return None
    at = {int(position): i for i, position in enumerate(order[visual].tolist())}
    groups = torch.full((len(at),), -1)
    for number, positions in enumerate(merged.values()):
        groups[[at[position] for position in positions if position in at]] = number
    return groups


def _pairs(values: Any) -> tuple[list[float], list[float]]:
    """Pairs (ours, theirs) as two lists."""
    both = [tuple(pair) for pair in values]
    return [a for a, _ in both], [b for _, b in both]


def _mean(values: Any) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found)
