"""LexRank: a sentence is salient if it resembles many sentences that are salient themselves.

    sim(x, y) = sum_w tf_wx tf_wy idf_w^2 / (|tf_x idf| |tf_y idf|)         idf_w = log(D / n_w)
    threshold:  A_ij = 1[sim(i, j) > t] with self-links, P = A with rows divided by their sums
    continuous: P_ij = sim(i, j) / sum_k sim(i, k)
    p = M^T p,  M = tau / N + (1 - tau) P                                   tau: probability of teleporting
    summary:    w_c centrality + w_p position, from the best down; what resembles a chosen sentence is skipped

Without teleporting p is the degree (row sum) over the sum of all degrees inside each connected component, which as a
whole gets its share of the sentences: only the teleport makes LexRank differ from degree centrality. Any units with a
similarity can be ranked so, not only sentences.
"LexRank: Graph-based Lexical Centrality as Salience in Text Summarization", arXiv 1109.2128. Ours: equal weights of
centrality and position, log D for words the background never saw, and a sentence that no longer fits the budget makes
room for the next.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from seqwise.core.attribution import Attribution
from seqwise.core.config import Configured, param
from seqwise.core.errors import UsageError
from seqwise.core.select import descending

STEPS = 10_000  # of the power method; with teleporting a few hundred are enough
EPSILON = 1e-12  # change of p, summed over units, at which the power method ends


def inverse_document_frequency(n_w: Tensor, D: int) -> Tensor:
    """idf_w = log(D / n_w), any shape; n_w: documents with the word. Words in no document get the largest, log D."""
    return math.log(D) - n_w.double().clamp(min=1).log()


def idf_cosine(tf: Tensor, idf: Tensor) -> Tensor:
    """Cosine of the tf * idf vectors, the idf-modified cosine: (..., N, N).

    tf: (..., N, V) counts, dense, or sparse COO (N, V); idf: (V,). The diagonal is 1; a unit without any weighted
    word has similarity 0 to all others.
    """
    if tf.is_sparse:
        tf = tf.coalesce()
        row, word = tf.indices()
        x = tf.values() * idf[word]
        norm = x.new_zeros(tf.shape[0]).index_add(0, row, x.square()).sqrt()
        x = x / norm.clamp(min=torch.finfo(x.dtype).tiny)[row]
        unit = torch.sparse_coo_tensor(tf.indices(), x, tf.shape, check_invariants=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support")  # used inside the product
            similarity = torch.sparse.mm(unit, unit.t()).to_dense()  # (N, N)
    else:
        dense = tf * idf
        dense = dense / dense.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(dense.dtype).tiny)
        similarity = dense @ dense.mT
    similarity.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return similarity


def degree_centrality(similarity: Tensor, threshold: float = 0.1, mask: Tensor | None = None) -> Tensor:
    """How many units each one resembles, itself included: (..., N, N) -> (..., N); 0 where mask (..., N) is False."""
    return _links(similarity, threshold, mask).sum(-1).to(similarity.dtype)


def transition(similarity: Tensor, threshold: float | None = 0.1, mask: Tensor | None = None) -> Tensor:
    """P: the links (or with threshold None the similarities) with rows divided by their sums, (..., N, N) float64.

    A row without any weight links to itself. Rows and columns of units that are absent, mask (..., N) False, are 0.
    Raises ValueError for negative similarities without a threshold.
    """
    if threshold is not None:
        weight = _links(similarity, threshold, mask).double()
    else:
        weight = similarity.double()
        if mask is not None:
            weight = weight.masked_fill(~(mask[..., None] & mask[..., None, :]), 0.0)
        if (weight < 0).any():
            raise ValueError(
                f"similarity must be >= 0 where threshold is None, got {float(weight.min()):.3g} (weights of a graph)"
            )
        lone = torch.diag_embed((weight.sum(-1) == 0).double())  # no weight at all, not even to itself
        weight = weight + (lone if mask is None else lone * mask[..., None])
    return weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def graph_centrality(
    similarity: Tensor, threshold: float | None = 0.1, teleport: float = 0.15, mask: Tensor | None = None
) -> Tensor:
    """LexRank scores p of the units of each graph, sum 1: (..., N, N) -> (..., N).

    similarity: row i, column j: how much i resembles j; units 1 on the diagonal. threshold: similarities above it
    (strictly) are links; None weighs links by similarity, the continuous form. teleport: tau, in [0, 1].
    mask: bool (..., N), False where a unit is absent: its score is 0. Raises ValueError for a bad teleport.
    """
    if not 0 <= teleport <= 1:
        raise ValueError(f"teleport must be in [0, 1], got {teleport!r} (probability of jumping to any unit)")
    P = transition(similarity, threshold, mask)
    live = torch.ones(P.shape[:-1], dtype=torch.bool, device=P.device) if mask is None else mask.expand(P.shape[:-1])
    uniform = live / live.sum(-1, keepdim=True).clamp(min=1).double()  # (..., N)
    p = uniform
    for _ in range(STEPS):
        moved = (p[..., None, :] @ P)[..., 0, :]  # p^T P = (P^T p)^T: along the links, not against them
        new = teleport * uniform + (1 - teleport) * moved
        change = float((new - p).abs().sum(-1).max()) if p.numel() else 0.0
        p = new
        if change < EPSILON:
            break
    else:
        warnings.warn(f"the power method still changed by {change:.1e} after {STEPS} steps", stacklevel=2)
    return p.to(similarity.dtype)


def centroid_scores(tf: Tensor, idf: Tensor, cutoff: float = 0.0) -> Tensor:
    """The centroid baseline: the centroid's value, summed over the words of each sentence: (..., N, V) -> (..., N).

    Centroid: tf * idf averaged over the N sentences; values that do not exceed `cutoff` are dropped.
    """
    centroid = (tf * idf).mean(-2, keepdim=True)  # (..., 1, V)
    return (tf * centroid.masked_fill(centroid <= cutoff, 0.0)).sum(-1)


def position_scores(place: Tensor, length: Tensor) -> Tensor:
    """1 for the first sentence of its document, falling linearly to 0 for the last: place, length (N,) -> (N,)."""
    return 1 - place / (length - 1).clamp(min=1)


def min_max(score: Tensor) -> Tensor:
    """Scores (..., N) on [0, 1]; all 0 where they are equal."""
    low, high = score.amin(-1, keepdim=True), score.amax(-1, keepdim=True)
    return (score - low) / (high - low).clamp(min=torch.finfo(score.dtype).tiny)


def spread(p: Tensor) -> Tensor:
    """Largest over smallest score, (..., N) -> (...,): 1 means that the graph ranks nothing."""
    return p.amax(-1) / p.amin(-1)


def pick(
    score: Tensor,
    similarity: Tensor,
    cost: Tensor,
    budget: int,
    redundancy: float = 0.5,
    allowed: Tensor | None = None,
) -> Tensor:
    """Goes down the ranking and skips what resembles a chosen unit: indices (k,), ascending.

    score (N,), similarity (N, N), cost (N,): what each takes of the budget. A unit is skipped if its similarity to a
    chosen one exceeds `redundancy`, if it is not allowed (bool (N,)), or if it no longer fits.
    """
    order = descending(score)  # (N,)
    free = (torch.ones_like(score, dtype=torch.bool) if allowed is None else allowed) & (cost <= budget)
    chosen: list[int] = []
    left = budget
    while True:
        ahead = free[order].nonzero()
        if not len(ahead):
            break
        i = int(order[ahead[0, 0]])
        chosen.append(i)
        left -= int(cost[i])
        free = free & (similarity[:, i] <= redundancy) & (cost <= left)
        free[i] = False
    return torch.tensor(sorted(chosen), dtype=torch.long, device=score.device)


def sentences_of(text: str) -> list[str]:
    """Splits after . ! or ? before white space and at blank lines; a plain splitter, that any other may replace."""
    parts = re.split(r"(?<=[.!?])[\"')\]]*\s+|\n\s*\n", text)
    return [" ".join(part.split()) for part in parts if part.strip()]


def words_of(sentence: str) -> list[str]:
    """Runs of letters, digits and inner apostrophes, in lower case."""
    return re.findall(r"\w+(?:['’]\w+)*", sentence.lower())


@dataclass(frozen=True)
class Idf:
    """Word weights: values by word, `unseen` for all others."""

    values: Mapping[str, float]
    unseen: float

    @classmethod
    def of(cls, documents: Iterable[Iterable[str]]) -> Idf:
        """From the words of each background document. Raises UsageError where there is none."""
        n_w: Counter[str] = Counter()
        D = 0
        for words in documents:
            n_w.update(set(words))
            D += 1
        if not D:
            raise UsageError("documents must hold at least one, got none (the background of the word weights)")
        idf = inverse_document_frequency(torch.tensor(list(n_w.values())), D)
        return cls(dict(zip(n_w, idf.tolist(), strict=True)), math.log(D))


@dataclass(frozen=True, eq=False)
class Ranking:
    """What LexRank says of N sentences.

    sentences, document, place: each sentence, the document it is from, and which of that document's it is.
    centrality: (N,) float64, sum 1. score: (N,), centrality and position weighed. spread: largest over smallest
    centrality. chosen: the summary's sentences, ascending.
    """

    sentences: Sequence[str]
    document: Sequence[int]
    place: Sequence[int]
    centrality: Tensor
    score: Tensor
    spread: float
    chosen: Sequence[int]
    method: str = ""

    @property
    def order(self) -> list[int]:
        """All sentences, most central first; ties: the earlier."""
        return [int(i) for i in descending(self.centrality)]

    @property
    def summary(self) -> str:
        return " ".join(self.sentences[i] for i in self.chosen)

    def attribution(self) -> Attribution:
        """Centrality in the shape of every explanation: one target, the summary, and the sentences as inputs."""
        inputs = [sentence if i == 0 else f" {sentence}" for i, sentence in enumerate(self.sentences)]
        details = {"spread": self.spread, "chosen": list(self.chosen)}
        return Attribution(self.centrality[None], inputs, ["summary"], self.method, details=details)


@dataclass(frozen=True)
class LexRank(Configured):
    """Ranks the sentences of a cluster of documents and writes an extractive summary; needs no model.

    Borders of documents play no part in the centrality. N sentences take N x N memory: about 10,000 fit.
    """

    threshold: float | None = param(0.1, ge=0, lt=1, doc="similarity above which sentences are linked, None weighs")
    teleport: float = param(0.15, ge=0, le=1, doc="probability of jumping to any sentence")
    centrality_weight: float = param(1.0, ge=0, doc="of the centrality on [0, 1]")
    position_weight: float = param(1.0, ge=0, doc="of the place in the document, 1 first to 0 last")
    redundancy: float = param(0.5, ge=0, le=1, doc="similarity to a chosen sentence above which one is skipped")
    min_words: int = param(9, ge=0, doc="shorter sentences never enter the summary")
    budget: int = param(665, ge=1, doc="size of the summary in `unit`")
    unit: Literal["bytes", "words", "sentences"] = "bytes"

    def rank(
        self,
        documents: Sequence[str | Sequence[str]],
        idf: Idf | None = None,
        *,
        split: Callable[[str], Sequence[str]] = sentences_of,
        tokenize: Callable[[str], Sequence[str]] = words_of,
    ) -> Ranking:
        """Scores every sentence and chooses the summary.

        documents: each a text, or its sentences. idf: word weights of a background of similar texts; without one
        the documents themselves are it, and the sentences of a single document. Give one where documents share
        boilerplate, or words that all of them have: those weigh nothing then, or are central by construction.
        split: text -> sentences; tokenize: sentence -> words (drop stop words or stem there).
        Warns where all scores are equal. Raises UsageError where there is no sentence.
        """
        if isinstance(documents, str):
            raise UsageError("documents must be a sequence of texts, got one text; write [text]")
        split_up = [list(split(text)) if isinstance(text, str) else list(text) for text in documents]
        sentences = [sentence for each in split_up for sentence in each]
        if not sentences:
            raise UsageError(f"documents must hold at least one sentence, got none in {len(documents)}")
        place = [i for each in split_up for i in range(len(each))]
        document = [d for d, each in enumerate(split_up) for _ in each]
        length = torch.tensor([len(each) for each in split_up for _ in each])
        words = [list(tokenize(sentence)) for sentence in sentences]
        idf = idf or self._own_idf(words, document)
        similarity = idf_cosine(*_counted(words, idf))
        p = graph_centrality(similarity, self.threshold, self.teleport)
        ratio = float(spread(p))
        if ratio < 1 + 1e-9 and len(sentences) > 1:
            warnings.warn("all sentences are equally central: this graph ranks nothing", stacklevel=2)
        position = position_scores(torch.tensor(place), length)
        score = self.centrality_weight * min_max(p) + self.position_weight * position
        long = torch.tensor([len(sentence.split()) >= self.min_words for sentence in sentences])
        room = self.budget + (self.unit == "bytes")  # no space stands behind the last sentence
        chosen = pick(score, similarity, self._cost(sentences), room, self.redundancy, long)
        return Ranking(sentences, document, place, p, score, ratio, chosen.tolist(), str(self))

    def _own_idf(self, words: Sequence[Sequence[str]], document: Sequence[int]) -> Idf:
        if len(set(document)) == 1:
            return Idf.of(words)
        joined: dict[int, set[str]] = {}
        for d, each in zip(document, words, strict=True):
            joined.setdefault(d, set()).update(each)
        return Idf.of(joined.values())

    def _cost(self, sentences: Sequence[str]) -> Tensor:
        size: dict[str, Callable[[str], int]] = {
            "bytes": lambda s: len(s.encode()) + 1,  # and the space behind it
            "words": lambda s: len(s.split()),
            "sentences": lambda s: 1,
        }
        return torch.tensor([size[self.unit](sentence) for sentence in sentences])


def _links(similarity: Tensor, threshold: float, mask: Tensor | None) -> Tensor:
    """bool (..., N, N): similarity strictly above the threshold, every unit linked to itself."""
    N = similarity.shape[-1]
    links = (similarity > threshold) | torch.eye(N, dtype=torch.bool, device=similarity.device)
    return links if mask is None else links & mask[..., None] & mask[..., None, :]


def _counted(words: Sequence[Sequence[str]], idf: Idf) -> tuple[Tensor, Tensor]:
    """Word counts, sparse (N, V) float64, and the weights (V,) of the words that occur."""
    number: dict[str, int] = {}
    ids = [[number.setdefault(word, len(number)) for word in each] for each in words]
    rows = torch.arange(len(words)).repeat_interleave(torch.tensor([len(each) for each in ids]))
    columns = torch.tensor([i for each in ids for i in each], dtype=torch.long)
    ones = torch.ones(len(columns), dtype=torch.float64)
    shape = len(words), max(1, len(number))
    tf = torch.sparse_coo_tensor(torch.stack([rows, columns]), ones, shape, check_invariants=False).coalesce()
    weights = [idf.values.get(word, idf.unseen) for word in number] or [0.0]
    return tf, torch.tensor(weights, dtype=torch.float64)
