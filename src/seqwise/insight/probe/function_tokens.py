"""Function tokens: few frequent tokens that carry most features, and behind which most is left to predict.

    FUNCTION   the most frequent tokens, up to the one by which they make up 40 % of a corpus; CONTENT the rest
    edge       (v, i): feature i is active at an occurrence of token type v;  degree(v) = |{i : (v, i)}|
    coverage   |features of the r most frequent types| / |features active anywhere|
    R(t)       = active(t) & union_{s<t} active(s)          what fires again at t
    steering   h_t <- h_t + a f_i                            at the last function token t of a prompt
    loss       next-token cross entropy by (class of the current token, class of the next): f->f, f->c, c->f, c->c

Frequent tokens occur more often and meet more features for that alone, so coverage is compared per occurrence too:
equal numbers of positions drawn from function tokens, from content tokens and from all.
"Memory Retrieval and Consolidation in Large Language Models through Function Tokens", arXiv 2510.08203. Our reading
of a summary; ties in counts, the form of the autoencoder, the steering strength and the comparison per occurrence are
ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from seqwise.core import hf
from seqwise.core.anatomy import Anatomy
from seqwise.core.config import Configured, param
from seqwise.core.errors import PromptError, UsageError
from seqwise.insight.explain.base import reading
from seqwise.insight.probe.base import surprisals

FUNCTION, CONTENT = 0, 1
IGNORED = -100  # a label that counts neither as a current nor as a next token

# classes


def count_tokens(documents: Iterable[Sequence[int] | Tensor], vocabulary: int) -> tuple[Tensor, Tensor]:
    """Occurrences of each token id, and the number of documents that hold it: (V,) int64 each."""
    counts, containing = torch.zeros(2, vocabulary, dtype=torch.long)
    for document in documents:
        found = torch.bincount(torch.as_tensor(document, dtype=torch.long), minlength=vocabulary)
        counts += found
        containing += found > 0
    return counts, containing


def by_frequency(counts: Tensor) -> Tensor:
    """Token ids (V,) from the most to the least frequent of counts (V,); ties: the smaller id."""
    return counts.argsort(descending=True, stable=True)


def token_classes(counts: Tensor, share: float = 0.4) -> Tensor:
    """FUNCTION = 0 or CONTENT = 1 of each token id: counts (V,) -> (V,) int64.

    The most frequent tokens are function tokens up to and with the one by which they reach `share` of all
    occurrences; ties: the smaller id. Take the counts of one corpus, not of the text that is measured.
    Raises ValueError unless share is in (0, 1] and something was counted.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share} (of all occurrences)")
    total = int(counts.sum())
    if total < 1:
        raise ValueError("counts must hold at least one occurrence, got none")
    order = by_frequency(counts)
    before = counts[order].cumsum(0) - counts[order]  # occurrences of all that are more frequent
    classes = torch.full_like(counts, CONTENT, dtype=torch.long)
    classes[order[before < share * total * (1 - 1e-12)]] = FUNCTION  # a whole product may round up
    return classes


# losses by transition


class GroupedLoss(NamedTuple):
    """By class of the current token (row) and of the next (column): summed loss in nats, number of tokens, (C, C)."""

    total: Tensor
    tokens: Tensor

    def mean(self) -> Tensor:
        """Nats per token, (C, C); NaN where a group is empty."""
        return self.total / self.tokens

    def share(self) -> Tensor:
        """Of the whole loss, (C, C)."""
        return self.total / self.total.sum()

    def token_share(self) -> Tensor:
        """Of all tokens, (C, C)."""
        return self.tokens / self.tokens.sum()


def group_losses(loss: Tensor, labels: Tensor, class_ids: Tensor, classes: int = 2) -> GroupedLoss:
    """Groups the losses (..., n) of the tokens labels (..., n), each given all before it.

    class_ids (V,) in [0, classes). The class of token t - 1 is the row, that of t the column; a pair with a label of
    -100 in it (padding, BOS) and the first token count nowhere.
    """
    current, following = labels[..., :-1], labels[..., 1:]
    counted = (current != IGNORED) & (following != IGNORED)
    group = class_ids[current[counted]] * classes + class_ids[following[counted]]  # (m,)
    losses = loss[..., 1:][counted]
    total = losses.new_zeros(classes * classes).index_add(0, group, losses)
    count = torch.bincount(group, minlength=classes * classes)
    return GroupedLoss(total.view(classes, classes), count.view(classes, classes))


def grouped_next_token_loss(logits: Tensor, labels: Tensor, class_ids: Tensor, classes: int = 2) -> GroupedLoss:
    """Next-token cross entropy by transition: logits (..., n, V) and the labels (..., n) they were computed on.

    labels: the input ids, -100 where they do not count; row t of the logits predicts label t + 1. class_ids as in
    `group_losses`. Float32, with gradients: `.total.sum() / .tokens.sum()` is the ordinary loss.
    """
    logps = logits[..., :-1, :].float().log_softmax(-1)
    loss = -logps.gather(-1, labels[..., 1:, None].clamp_min(0))[..., 0]  # (..., n - 1)
    return group_losses(nn.functional.pad(loss, (1, 0)), labels, class_ids, classes)


def half_fall(steps: Tensor, losses: Tensor) -> Tensor:
    """When a loss has done half of its whole fall: steps (c,) ascending, losses (..., c) -> (...,), in steps.

    The fall goes from the first loss to the smallest; between two checkpoints the loss counts as a straight line. NaN
    where it never falls.
    """
    start, least = losses[..., :1], losses.amin(-1, keepdim=True)
    half = (start + least) / 2
    after = (losses <= half).to(torch.int8).argmax(-1, keepdim=True).clamp_min(1)  # (..., 1) the first below
    y_0, y_1 = losses.gather(-1, after - 1), losses.gather(-1, after)
    x_0, x_1 = steps.to(losses)[after - 1], steps.to(losses)[after]
    crossed = x_0 + (y_0 - half) / (y_0 - y_1) * (x_1 - x_0)
    return torch.where(least < start, crossed, math.nan)[..., 0]


# the graph of token types and features


def active_features(activations: Tensor, threshold: Tensor | float = 0.0) -> Tensor:
    """Which features are active: activations (..., F) above the threshold, one or (F,) (of a JumpReLU): bool."""
    return activations > threshold


def feature_edges(tokens: Tensor, active: Tensor) -> Tensor:
    """Edges (v, i) of the token types tokens (N,) and the features active (N, F) at them: (E, 2) int64, each once.

    Sorted by v, then i. Edges of several batches join by `torch.cat(...).unique(dim=0)`.
    """
    position, feature = active.nonzero(as_tuple=True)
    F = active.shape[-1]
    pair = (tokens[position] * F + feature).unique()
    return torch.stack([pair // F, pair % F], -1)


def degrees(edges: Tensor, vocabulary: int) -> Tensor:
    """Features joined to each token type: edges (E, 2) -> (V,) int64."""
    return torch.bincount(edges[:, 0], minlength=vocabulary)


def cumulative_coverage(edges: Tensor, order: Tensor) -> Tensor:
    """Share of the features active anywhere that the first 1, 2, ... types of `order` (r,) cover: (r,), not falling.

    order: different token ids, from the most frequent on.
    """
    vocabulary = int(max(edges[:, 0].max(), order.max())) + 1
    rank = torch.full((vocabulary,), len(order), device=edges.device)
    rank[order] = torch.arange(len(order), device=edges.device)
    features, index = edges[:, 1].unique(return_inverse=True)
    first = torch.full_like(features, len(order)).scatter_reduce(0, index, rank[edges[:, 0]], "amin")
    return torch.bincount(first, minlength=len(order) + 1)[:-1].cumsum(0) / len(features)


def activation_rate(edges: Tensor, features: int) -> float:
    """Share of a dictionary of so many features that is active anywhere."""
    return len(edges[:, 1].unique()) / features


def coverage_at(active: Tensor, positions: Tensor) -> float:
    """Share of the features active anywhere in active (N, F) that are active at the positions (m,)."""
    return int(active[positions].any(0).sum()) / int(active.any(0).sum())


def per_occurrence(active: Tensor, function: Tensor, draws: int, seed: int = 0) -> Tensor:
    """Coverage by equally many positions, which takes frequency out: (draws, 3) for function, content and any tokens.

    active (N, F), function (N,) bool: whether the token at each position is a function token. Each draw takes, without
    replacement, as many positions as the rarer class has halves of.
    Raises ValueError where a class has fewer than two positions.
    """
    pools = [function.nonzero()[:, 0], (~function).nonzero()[:, 0], torch.arange(len(function))]
    m = min(len(pools[0]), len(pools[1])) // 2  # less than all, or every draw of the rarer class would be the same
    if m < 1:
        raise ValueError(f"function and content need 2 positions each, got {len(pools[0])} and {len(pools[1])}")
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(draws):
        drawn = [pool[torch.randperm(len(pool), generator=generator)[:m]] for pool in pools]
        rows.append([coverage_at(active, positions) for positions in drawn])
    return torch.tensor(rows)


def reactivated(active: Tensor) -> Tensor:
    """R(t): which features active (..., n, F) fire at t and fired before it in the same context, same shape."""
    before = active.cumsum(-2) - active.long()
    return active & (before > 0)


# sparse features


class TopKSAE(nn.Module):
    """z = top_k(W_e (h - b_d) + b_e), h^ = W_d z + b_d, the columns of W_d of length 1; what is negative stays 0."""

    def __init__(self, D: int, width: int, k: int = 32, seed: int = 0) -> None:
        super().__init__()
        if not 1 <= k <= width:
            raise ValueError(f"k must be in [1, width] = [1, {width}], got {k} (features per token)")
        self.k = k
        directions = torch.randn(width, D, generator=torch.Generator().manual_seed(seed))
        self.decoder = nn.Parameter(nn.functional.normalize(directions, dim=-1))  # (F, D), W_d transposed
        self.encoder = nn.Parameter(self.decoder.detach().clone())  # (F, D)
        self.b_e, self.b_d = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(D))

    def pre(self, h: Tensor) -> Tensor:
        """W_e (h - b_d) + b_e: (..., D) -> (..., F)."""
        return (h - self.b_d) @ self.encoder.mT + self.b_e

    def encode(self, h: Tensor) -> Tensor:
        """z: (..., D) -> (..., F), at most k above 0."""
        return _top(self.pre(h), self.k)

    def decode(self, z: Tensor) -> Tensor:
        """h^: (..., F) -> (..., D)."""
        return z @ self.decoder + self.b_d


def train_sae(
    h: Tensor, width: int, k: int = 32, *, steps: int = 300, batch: int = 512, rate: float = 1e-3, seed: int = 0
) -> TopKSAE:
    """An autoencoder of hidden states h (N, D), trained by Adam on their mean squared error; the seed decides it.

    Features that no token of 20 steps has used must explain what is left over, with weight 1/32: few stay dead. States
    are scaled to a mean square of 1 in the loss alone.
    """
    sae = TopKSAE(h.shape[-1], width, k, seed).to(h)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.b_d.copy_(h.mean(0))
    scale = (h - h.mean(0)).square().mean().clamp_min(1e-12)
    optimizer = torch.optim.Adam(sae.parameters(), lr=rate)
    idle = torch.zeros(width, device=h.device)  # steps since a feature was last used
    for _ in range(steps):
        x = h[torch.randint(len(h), (batch,), generator=generator)]
        pre = sae.pre(x)
        z = _top(pre, k)
        left = x - sae.decode(z)
        loss = left.square().mean() / scale
        idle = torch.where((z > 0).any(0), 0.0, idle + 1)
        dead = idle >= 20
        if dead.any():
            spare = _top(pre.masked_fill(~dead, -math.inf), min(k, int(dead.sum())))
            loss = loss + (left.detach() - spare @ sae.decoder).square().mean() / scale / 32
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            sae.decoder.copy_(nn.functional.normalize(sae.decoder, dim=-1))
    return sae.requires_grad_(False).eval()


def learned_features(active: Tensor) -> int:
    """Features that are active at least once on a fixed text, active (N, F)."""
    return int(active.any(0).sum())


def mean_active(active: Tensor) -> float:
    """L0: active features per position of active (N, F). Where it is near F, every degree is the same."""
    return float(active.sum(-1).double().mean())


def _top(pre: Tensor, k: int) -> Tensor:
    values, index = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, index, values.clamp_min(0))


# reading and steering a model


def last_function(ids: Tensor, class_ids: Tensor) -> int:
    """Place of the last function token in a prompt (n,). Raises PromptError where it has none."""
    places = (class_ids[ids] == FUNCTION).nonzero()[:, 0]
    if not len(places):
        raise PromptError(f"the prompt must hold a function token, got none among {len(ids)} tokens")
    return int(places[-1])


def steer(h: Tensor, f: Tensor, a: float, position: int) -> Tensor:
    """h + a f at one position: h (..., n, D), f (D,) -> (..., n, D)."""
    at = torch.zeros(h.shape[-2], 1, dtype=h.dtype, device=h.device)
    at[position] = a
    return h + at * f.to(h)


@contextmanager
def steering(model: nn.Module, f: Tensor, a: float, layer: int, position: int) -> Iterator[None]:
    """Meanwhile the output of decoder layer `layer` (from 0) is steered at one position of every prompt.

    f: (D,) the decoder row of a feature. position: from 0, in prompts of two tokens or more without padding on the
    left. `generate` works: single rows that follow a prompt are left alone. Raises UsageError for other places.
    """
    module = _layer(model, layer)
    if position < 0:
        raise UsageError(f"position must be >= 0, got {position}")

    def add(_: nn.Module, args: Any, output: Any) -> Any:
        h = hf.hidden_of(output)
        return hf.with_hidden(output, steer(h, f, a, position)) if h.shape[-2] > max(position, 1) else output

    hook = module.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def hidden_states(model: nn.Module, ids: Tensor, layer: int) -> Tensor:
    """Residual stream behind decoder layer `layer` (from 0) on ids (B, n) without padding: (B, n, D)."""
    kept: list[Tensor] = []
    hook = _layer(model, layer).register_forward_hook(lambda module, args, output: kept.append(hf.hidden_of(output)))
    try:
        with reading(model):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        hook.remove()
    return kept[0]


def _layer(model: nn.Module, layer: int) -> nn.Module:
    layers = Anatomy.of(model).layers
    if not 0 <= layer < len(layers):
        raise UsageError(f"layer must be in [0, {len(layers) - 1}], got {layer}")
    return layers[layer]


@dataclass(frozen=True)
class FunctionTokens(Configured):
    """Which transitions carry a model's loss, with function tokens by the counts of one corpus."""

    share: float = param(0.4, gt=0, le=1, doc="of all occurrences that function tokens make up")

    abstract: ClassVar[bool] = False

    def function_ids(self, corpus: Iterable[Sequence[int] | Tensor], vocabulary: int) -> list[int]:
        """The function tokens by documents of token ids, which should not be those to be measured; ascending."""
        classes = token_classes(count_tokens(corpus, vocabulary)[0], self.share)
        return (classes == FUNCTION).nonzero()[:, 0].tolist()

    def class_ids(self, function_ids: Sequence[int], vocabulary: int) -> Tensor:
        """FUNCTION or CONTENT of each id: (V,) int64."""
        classes = torch.full((vocabulary,), CONTENT)
        classes[torch.as_tensor(function_ids, dtype=torch.long)] = FUNCTION
        return classes

    def losses(
        self, model: Any, documents: Sequence[Sequence[int] | Tensor], class_ids: Tensor, special: Iterable[int] = ()
    ) -> list[GroupedLoss]:
        """Per document of token ids its losses by transition, in nats.

        special: ids (BOS, padding) that count neither as a current nor as a next token.
        """
        found = []
        ignored = torch.tensor(sorted(special), dtype=torch.long)
        for ids, loss in zip(documents, surprisals(model, documents), strict=True):
            labels = torch.as_tensor(ids, dtype=torch.long)
            found.append(group_losses(loss, labels.masked_fill(torch.isin(labels, ignored), IGNORED), class_ids))
        return found
