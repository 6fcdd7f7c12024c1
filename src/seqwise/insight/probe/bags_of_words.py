"""Bags of words: does a scorer s(image, text) use the order of words, and how hard negatives in its loss make it do so.

    order      the caption c against perturbations p_1 .. p_4 of its own words: right iff s(i, c) > max_k s(i, p_k)
    relation   "the X is R the Y" against "the Y is R the X"; attribution: the two adjectives swapped
    credit     1 / |argmax| where the true one is among the highest, else 0; mean per relation, then over relations
    NegCLIP    L = 1/2 [ CE(tau I T^T, 0 .. 2B - 1) + CE(tau T[:2B] I^T, 0 .. 2B - 1) ]
               I = [own; hard images], T = [captions; those of the hard images; hard captions of both] by unit vectors

The hard captions are columns only: no row asks for an image of theirs.
"When and why vision-language models behave like bags-of-words, and what to do about it?", arXiv 2210.01936.
Equal scores share the credit here; the paper's argmax gives it to whichever option is listed first. Words are taken
apart by blanks, once for the caption and its perturbations; a noun phrase is a run of adjectives and nouns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from seqwise.core.config import Configured, param

MOST_WORDS = 30
LEAST_CASES = 25  # of an attribute pair that is counted
BANDS, CELLS = 4, 3  # row or column bands; cells along each side of the grid
LARGEST_SCALE = math.log(100.0)
NEIGHBOURS = 3
KINDS = ("NN", "JJ", "RB", "VB")  # nouns, adjectives, adverbs, verbs: how their tags begin

Words = Sequence[str]


class Draws(Protocol):
    """What draws permutations: `numpy.random.Generator` or `RandomState`."""

    def permutation(self, x: int, /) -> Any: ...


# words in another order


def words_of(caption: str, most: int = MOST_WORDS) -> list[str]:
    """A caption as lower-case words, at most so many; what the true caption and its perturbations are made of."""
    return caption.lower().split()[:most]


def permute_places(words: Words, groups: Iterable[Sequence[int]], rng: Draws) -> list[str]:
    """Words whose places of each group exchange their words at random; the groups in turn, each draws once."""
    found = list(words)
    for places in groups:
        order = rng.permutation(len(places))
        for place, source in zip(places, order, strict=True):
            found[place] = words[places[int(source)]]
    return found


def permute_nouns_and_adjectives(words: Words, tags: Words, rng: Draws) -> list[str]:
    """Nouns change places with nouns, and adjectives with adjectives. tags: Penn Treebank, one per word."""
    return permute_places(words, (_tagged(words, tags, "NN"), _tagged(words, tags, "JJ")), rng)


def permute_all_but_nouns_and_adjectives(words: Words, tags: Words, rng: Draws) -> list[str]:
    """All words but nouns and adjectives change places. tags: Penn Treebank, one per word."""
    kept = {*_tagged(words, tags, "NN"), *_tagged(words, tags, "JJ")}
    return permute_places(words, [[i for i in range(len(words)) if i not in kept]], rng)


def permute_within_trigrams(words: Words, rng: Draws) -> list[str]:
    """Words change places inside each block of three from the left; the last block may be shorter."""
    return permute_places(words, [range(i, min(i + 3, len(words))) for i in range(0, len(words), 3)], rng)


def permute_trigrams(words: Words, rng: Draws) -> list[str]:
    """The blocks of three, from the left, change places; each stays as it is."""
    blocks = [list(words[i : i + 3]) for i in range(0, len(words), 3)]
    return [word for i in rng.permutation(len(blocks)) for word in blocks[int(i)]]


def permute_words(words: Words, rng: Draws) -> list[str]:
    """All words change places."""
    return permute_places(words, [range(len(words))], rng)


def redrawn(
    words: Words, perturb: Callable[[], list[str]], others: Sequence[Words] = (), tries: int = 20
) -> list[str] | None:
    """A perturbation that differs from the words and from `others`; None where so many draws give none.

    One noun alone, or equal words, leave a caption as it is: such a case would be unfair.
    """
    taken = [list(words), *map(list, others)]
    for _ in range(tries):
        found = perturb()
        if found not in taken:
            return found
    return None


def order_options(words: Words, tags: Words | None, rng: Draws) -> list[list[str]] | None:
    """The caption and its four perturbations, all different: nouns and adjectives; all but these; within trigrams;
    trigrams. Without tags the latter two alone. None where one of them leaves every caption as it is."""
    draws: list[Callable[[], list[str]]] = [
        lambda: permute_within_trigrams(words, rng),
        lambda: permute_trigrams(words, rng),
    ]
    if tags is not None:
        draws = [
            lambda: permute_nouns_and_adjectives(words, tags, rng),
            lambda: permute_all_but_nouns_and_adjectives(words, tags, rng),
            *draws,
        ]
    found = [list(words)]
    for draw in draws:
        other = redrawn(words, draw, found)
        if other is None:
            return None
        found.append(other)
    return found


def _tagged(words: Words, tags: Words, kind: str) -> list[int]:
    if len(tags) != len(words):
        raise ValueError(f"tags must be one per word, got {len(tags)} for {len(words)} words")
    return [i for i, tag in enumerate(tags) if tag.startswith(kind)]


# images in another order


def permute_blocks(images: Tensor, rows: int, columns: int, order: Tensor) -> Tensor:
    """Images (..., H, W) cut into rows x columns blocks, in raster order, with block order[i] at place i.

    order: (rows * columns,), one permutation for all images. Where a size does not divide, the pixels at the right and
    lower edge that are left over become 0. Raises ValueError for more blocks than pixels or an order that is none.
    """
    H, W = images.shape[-2:]
    if not (1 <= rows <= H and 1 <= columns <= W):
        raise ValueError(f"rows, columns must be in [1, {H}], [1, {W}], got {rows}, {columns} (blocks along a side)")
    if sorted(order.tolist()) != list(range(rows * columns)):
        raise ValueError(f"order must be a permutation of {rows * columns} blocks, got {order.tolist()}")
    h, w = H // rows, W // columns
    cut = images[..., : rows * h, : columns * w].unflatten(-1, (columns, w)).unflatten(-3, (rows, h))
    blocks = cut.transpose(-3, -2).flatten(-4, -3)[..., order, :, :]  # (..., rows * columns, h, w)
    moved = blocks.unflatten(-3, (rows, columns)).transpose(-3, -2).flatten(-4, -3).flatten(-2)
    found = torch.zeros_like(images)
    found[..., : rows * h, : columns * w] = moved
    return found


def permute_rows(image: Tensor, rng: Draws) -> Tensor:
    """Four row bands of (..., H, W) in random order."""
    return permute_blocks(image, BANDS, 1, torch.as_tensor(rng.permutation(BANDS)))


def permute_columns(image: Tensor, rng: Draws) -> Tensor:
    """Four column bands of (..., H, W) in random order."""
    return permute_blocks(image, 1, BANDS, torch.as_tensor(rng.permutation(BANDS)))


def permute_cells(image: Tensor, rng: Draws) -> Tensor:
    """The cells of a 3 x 3 grid of (..., H, W) in random order."""
    return permute_blocks(image, CELLS, CELLS, torch.as_tensor(rng.permutation(CELLS**2)))


# metrics


def credit(scores: Tensor, true: int = 0, tolerance: float = 0.0) -> Tensor:
    """Scores of options (..., C) -> (...,): 1 where the true one is the highest, shared evenly among equal ones.

    tolerance: scores no further below the highest count as equal to it; a sum in another order is equal to rounding.
    """
    top = scores >= scores.amax(-1, keepdim=True) - tolerance  # (..., C)
    return top[..., true].double() / top.sum(-1)


def macro_average(
    credits: Sequence[float], groups: Sequence[Hashable], least: int = 1
) -> tuple[float, dict[Hashable, float]]:
    """Mean over groups of the groups' mean credit, and these; groups of fewer than `least` cases are dropped.

    Attribute pairs are counted from 25 cases on (`LEAST_CASES`). NaN where no group is left.
    """
    if len(credits) != len(groups):
        raise ValueError(f"groups must be one per case, got {len(groups)} for {len(credits)} cases")
    cases: dict[Hashable, list[float]] = {}
    for value, group in zip(credits, groups, strict=True):
        cases.setdefault(group, []).append(float(value))
    means = {group: sum(values) / len(values) for group, values in cases.items() if len(values) >= least}
    return (sum(means.values()) / len(means) if means else math.nan), means


def recall_at_k(similarity: Tensor, matches: Tensor, k: int) -> float:
    """Share of queries with a match among the k most similar: similarity (Q, N), matches bool (Q, N).

    Equal similarities go to the earlier candidate.
    """
    if not 1 <= k <= similarity.shape[-1]:
        raise ValueError(f"k must be in [1, {similarity.shape[-1]}], got {k} (candidates)")
    first = similarity.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return float(matches.gather(-1, first).any(-1).double().mean())


# NegCLIP


def negclip_loss(images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """The loss L in nats, a scalar: unit vectors images (n, D) and texts (m, D), m >= n; text j < n is image j's.

    Texts from n on are hard captions, with no row of their own. For NegCLIP n = 2B and m = 4B; with m = n this is
    CLIP's loss. scale: tau, see `clamped_scale`. Raises ValueError for fewer texts than images.
    """
    n = len(images)
    if len(texts) < n:
        raise ValueError(f"texts must be at least as many as images, {n}, got {len(texts)}")
    labels = torch.arange(n, device=images.device)
    per_image = scale * images @ texts.T  # (n, m)
    return (cross_entropy(per_image, labels) + cross_entropy(per_image[:, :n].T, labels)) / 2


def clamped_scale(log_scale: Tensor) -> Tensor:
    """tau of its learned logarithm, which is held in [0, ln 100]."""
    return log_scale.clamp(0, LARGEST_SCALE).exp()


def hard_captions(words: Words, tags: Words, rng: Draws) -> list[list[str]]:
    """At most one caption per kind with two of that kind swapped: nouns, adjectives, adverbs, verbs, noun phrases.

    tags: Penn Treebank, one per word. The two are drawn among those whose swap changes the caption; a kind without two
    such gives none.
    """
    spans = [[(i, i + 1) for i in _tagged(words, tags, kind)] for kind in KINDS]
    found: list[list[str]] = []
    for kind in [*spans, noun_phrases(tags)]:
        pairs = [(a, b) for i, a in enumerate(kind) for b in kind[i + 1 :]]
        options = [other for a, b in pairs if (other := _swapped(words, a, b)) != list(words)]
        if options:
            found.append(options[int(rng.permutation(len(options))[0])])
    return found


def noun_phrases(tags: Words) -> list[tuple[int, int]]:
    """Spans [start, stop) of the longest runs of adjectives and nouns that end with a noun, in order."""
    found, start = [], 0
    for i in range(len(tags) + 1):
        if i == len(tags) or not tags[i].startswith(("NN", "JJ")):
            stop = i
            while stop > start and not tags[stop - 1].startswith("NN"):
                stop -= 1
            if stop > start:
                found.append((start, stop))
            start = i + 1
    return found


def _swapped(words: Words, a: tuple[int, int], b: tuple[int, int]) -> list[str]:
    """Spans a and b, a before b, exchanged."""
    return [*words[: a[0]], *words[b[0] : b[1]], *words[a[1] : b[0]], *words[a[0] : a[1]], *words[b[1] :]]


def hard_images(features: Tensor, k: int = NEIGHBOURS, block: int = 1024) -> Tensor:
    """The k nearest other images of each by cosine: features (n, D) -> indices (n, k), nearest first.

    Equal ones go to the earlier image. Raises ValueError unless k < n.
    """
    n = len(features)
    if not 1 <= k < n:
        raise ValueError(f"k must be in [1, {n - 1}], got {k} (other images)")
    unit, found = normalize(features, dim=-1), []
    for rows in torch.arange(n, device=features.device).split(block):
        cosine = unit[rows] @ unit.T  # (block, n)
        cosine[torch.arange(len(rows)), rows] = float("-inf")
        found.append(cosine.argsort(dim=-1, descending=True, stable=True)[:, :k])
    return torch.cat(found)


# measuring a scorer


Scorer = Callable[[object, Sequence[str]], Tensor]  # an image (or None), C texts -> their scores (C,)


class Found(NamedTuple):
    """credits: of each case that was asked. skipped: captions that no perturbation changes. mean: their average."""

    credits: tuple[float, ...]
    skipped: int

    @property
    def mean(self) -> float:
        return sum(self.credits) / len(self.credits) if self.credits else math.nan


@dataclass(frozen=True)
class BagsOfWords(Configured):
    """Order probes of any scorer of texts given an image, or of texts alone.

    >>> BagsOfWords().order(lambda image, texts: clip_scores(image, texts), images, captions, tags, rng)

    Language models solve part of it by fluency: ask one without the image too, s(None, text), and compare.
    """

    most: int = param(MOST_WORDS, ge=2, doc="words of a caption that are kept")
    tolerance: float = param(0.0, ge=0, doc="scores that differ by no more are equal")

    def order(
        self,
        scorer: Scorer,
        images: Sequence[object],
        captions: Sequence[str],
        tags: Sequence[Words] | None,
        rng: Draws,
    ) -> Found:
        """The true caption against its perturbations, chance 1/5, without tags 1/3. tags: per caption one per word."""
        credits: list[float] = []
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            words = words_of(caption, self.most)
            options = order_options(words, None if tags is None else tags[i][: len(words)], rng)
            if options is not None:
                scores = scorer(image, [" ".join(one) for one in options])
                credits.append(float(credit(scores, 0, self.tolerance)))
        return Found(tuple(credits), len(captions) - len(credits))

    def pairs(self, scorer: Scorer, images: Sequence[object], true: Sequence[str], false: Sequence[str]) -> Found:
        """The true caption against one with a relation's sides, or two attributes, swapped; chance 1/2."""
        credits = [
            float(credit(scorer(image, [a, b]), 0, self.tolerance))
            for image, a, b in zip(images, true, false, strict=True)
        ]
        return Found(tuple(credits), 0)
