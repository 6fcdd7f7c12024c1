"""Sequence order recall (SORT): which of two segments of a sequence came first?

    excerpt    X[s : s + E],  s uniform in 0 .. T - E - 1, the same excerpts for every bin of distances
    segments   S elements from i and j of the excerpt, i uniform in 0 .. E - S - 1, j uniform where l < |i - j| <= r
    answer     0 where the segment shown first is the earlier one, else 1; exactly half of each are drawn
    reply      A where log p(A) >= log p(B) at the first answer position; none where neither is among the candidates

Any sequence gives items without annotation. With the excerpt in the prompt they measure memory in context, without it
memory in the weights, and on a sequence that nobody has seen what the segments alone give away.
In text the units are words, and excerpts and segments begin where sentences do.
"Assessing Episodic Memory in LLMs with Sequence Order Recall Tasks", arXiv 2410.08133.
The paper takes the first spelling of a label that is among the candidates; here the spellings are added up by default.
The wording of the prompt is ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seqwise.core.config import Configured, param
from seqwise.core.errors import PromptError
from seqwise.core.prepare import prepare

Ints = npt.NDArray[np.int64]

EXTRA = 50  # spare excerpts
REDRAWS = 100  # of all excerpts, for uniform starts
SIGNIFICANCE = 0.05
TITLES = ("mr.", "mrs.", "dr.")  # full stops that end no sentence
LABELS = ("A", "B")
PREFIX = "Answer: Segment"
SYSTEM = "You remember texts exactly, above all in which order things were told."
BATCH = 8  # prompts in one forward


# items: pure functions of lengths and a seed


@dataclass(frozen=True)
class Items:
    """N items in each of m bins of distances, on the same N excerpts.

    starts: (N,) first element of each excerpt. shown: (m, N, 2) first elements of the two segments inside the excerpt,
    in the order of showing. answers: (m, N), 0 where the segment shown first is the earlier one.
    """

    starts: Ints
    shown: Ints
    answers: Ints
    excerpt: int
    segment: int
    edges: tuple[int, ...]

    @property
    def distances(self) -> Ints:
        """(m, N), inside each item's bin."""
        return np.abs(self.shown[..., 0] - self.shown[..., 1])

    @property
    def chance(self) -> float:
        """What always giving the more frequent answer scores: spares are dropped at random, so it may exceed 0.5."""
        ones = float(self.answers.mean())
        return max(ones, 1 - ones)

    def excerpt_of(self, sequence: Any, n: int) -> Any:
        """The excerpt of item n of every bin, a slice of the sequence."""
        return sequence[self.starts[n] : self.starts[n] + self.excerpt]

    def segments_of(self, sequence: Any, b: int, n: int) -> tuple[Any, Any]:
        """The two segments of item n of bin b as they are shown, slices of the sequence."""
        first, second = self.starts[n] + self.shown[b, n]
        return sequence[first : first + self.segment], sequence[second : second + self.segment]

    def unambiguous(self, sequence: Any) -> npt.NDArray[np.bool_]:
        """(m, N): whether both segments occur once in their excerpt, so that the question has an answer."""
        m, N = self.answers.shape
        found = np.zeros((m, N), dtype=bool)
        for n in range(N):
            excerpt = self.excerpt_of(sequence, n)
            for b in range(m):
                found[b, n] = all(occurrences(excerpt, one) == 1 for one in self.segments_of(sequence, b, n))
        return found


def occurrences(sequence: Any, segment: Any) -> int:
    """How often a segment (S, ...) is found in a sequence (E, ...), overlaps included."""
    # each element becomes a number, so that texts and vectors compare alike
    both = np.concatenate([np.asarray(sequence), np.asarray(segment)])
    codes = np.unique(both, axis=0, return_inverse=True)[1].reshape(-1)
    E = len(sequence)
    if len(segment) > E:
        return 0
    windows = np.lib.stride_tricks.sliding_window_view(codes[:E], len(segment))  # (E - S + 1, S)
    return int((windows == codes[E:]).all(-1).sum())


def book_edges(excerpt: int, segment: int) -> tuple[int, ...]:
    """Bin edges of Book-SORT for E and S words: S, E/4, E/3, E/2, 0.8 E; from E = 5000 on S, 1000, E/4, E/2, 0.8 E."""
    second = (excerpt // 4, excerpt // 3) if excerpt < 5000 else (1000, excerpt // 4)
    return (segment, *second, excerpt // 2, excerpt * 8 // 10)


def uniform_p(values: npt.ArrayLike, high: float) -> float:
    """p-value of the two-sided Kolmogorov-Smirnov test of values (n,) against U(0, high).

    By the limit distribution with Stephens' correction for small n, within 0.01 of the exact value from n = 5 on.
    """
    x = np.sort(np.asarray(values, dtype=np.float64)) / high
    n = len(x)
    F, steps = np.clip(x, 0, 1), np.arange(n + 1) / n
    D = max(float((steps[1:] - F).max()), float((F - steps[:-1]).max()))
    z = (n**0.5 + 0.12 + 0.11 / n**0.5) * D
    if z < 0.3:  # the series would alternate for long; 1 to ten digits
        return 1.0
    k = np.arange(1, 101)
    return float(np.clip(2 * ((-1.0) ** (k - 1) * np.exp(-2 * (k * z) ** 2)).sum(), 0, 1))


def sentence_starts(words: Sequence[str]) -> Ints:
    """Where sentences begin: 0, and after each word with one of . ? ! ; in it that is not mr. mrs. or dr."""
    ends = [any(mark in word for mark in ".?!;") and word.lower() not in TITLES for word in words[:-1]]
    return np.concatenate([[0], np.flatnonzero(ends) + 1]).astype(np.int64)


def draw_excerpts(length: int, excerpt: int, count: int, rng: np.random.Generator) -> Ints:
    """Starts (count,) uniform in 0 .. T - E - 1, drawn anew until s/T passes as U(0, (T - E)/T), p > 0.05.

    Raises ValueError for a sequence that is not longer than an excerpt, or whose starts fail 100 times.
    """
    if length <= excerpt:
        raise ValueError(f"length must be > excerpt = {excerpt}, got {length} (elements of the sequence)")
    for _ in range(REDRAWS):
        starts = rng.integers(0, length - excerpt, count)
        if uniform_p(starts / length, (length - excerpt) / length) > SIGNIFICANCE:
            return starts
    raise ValueError(
        f"starts of {count} excerpts are not uniform in {REDRAWS} draws: length must exceed excerpt = {excerpt} by "
        f"more, got {length} (elements of the sequence)"
    )


def draw_pair(
    places: Ints, left: int, right: int, rng: np.random.Generator, *, closed: bool = True
) -> tuple[int, int] | None:
    """Two of the sorted places (p,) at a distance in (left, right], or in (left, right) where it is not closed.

    i is uniform among the places that have a partner, which is what redrawing it comes to, and j uniform among i's
    partners; so pairs are not equally likely. None where no place has a partner.
    """
    most = right if closed else right - 1
    above = [np.searchsorted(places, places + left, "right"), np.searchsorted(places, places + most, "right")]
    below = [np.searchsorted(places, places - most, "left"), np.searchsorted(places, places - left, "left")]
    up, down = np.maximum(above[1] - above[0], 0), np.maximum(below[1] - below[0], 0)  # (p,) partners on each side
    able = np.flatnonzero(up + down)
    if not len(able):
        return None
    i = int(rng.choice(able))
    k = int(rng.integers(up[i] + down[i]))
    j = below[0][i] + k if k < down[i] else above[0][i] + k - down[i]
    return int(places[i]), int(places[j])


def draw_items(
    length: int,
    excerpt: int,
    segment: int,
    edges: Sequence[int],
    n: int,
    seed: int,
    *,
    extra: int = EXTRA,
    sentences: Ints | None = None,
) -> Items:
    """n items per bin (edges[b], edges[b + 1]] of distances, on a sequence of `length` elements.

    extra: spare excerpts; one without a pair in some bin is dropped from all, then spares at random. sentences: where
    sentences begin, ascending from 0 on (`sentence_starts`): excerpts move back to their sentence's start, segments
    begin at one, and a distance equal to the bin's end is refused.

    Warns where the first bin lets segments overlap. Raises ValueError for lengths and edges that do not fit together,
    for n + extra odd, and where fewer than n excerpts have a pair in every bin.
    """
    edges = tuple(int(edge) for edge in edges)
    if not 1 <= segment < excerpt:
        raise ValueError(f"segment must be in [1, excerpt - 1] = [1, {excerpt - 1}], got {segment}")
    if n < 1 or extra < 0 or (n + extra) % 2:
        raise ValueError(f"n >= 1 and extra >= 0 must have an even sum, got {n} and {extra} (half of each answer)")
    if len(edges) < 2 or edges[0] < 0 or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"edges must be at least two ascending distances >= 0, got {edges}")
    if edges[-2] >= excerpt - segment - 1:
        raise ValueError(
            f"edges: each bin must begin below excerpt - segment - 1 = {excerpt - segment - 1}, the largest distance, "
            f"got {edges}"
        )
    if edges[0] < segment:
        warnings.warn(f"distances from {edges[0] + 1} on let segments of {segment} overlap", stacklevel=2)
    rng = np.random.default_rng(seed)
    count, m = n + extra, len(edges) - 1
    starts = draw_excerpts(length, excerpt, count, rng)
    if sentences is not None:
        starts = sentences[np.searchsorted(sentences, starts, "right") - 1]
    shown = np.zeros((m, count, 2), dtype=np.int64)
    answers = np.zeros((m, count), dtype=np.int64)
    able = np.ones(count, dtype=bool)
    free = np.arange(excerpt - segment)
    for b in range(m):
        answers[b] = rng.permutation(np.tile([0, 1], count // 2))
        for k in np.flatnonzero(able):
            places = free if sentences is None else _inside(sentences, starts[k], excerpt - segment)
            pair = draw_pair(places, edges[b], edges[b + 1], rng, closed=sentences is None)
            able[k] = pair is not None
            if pair is not None:
                early, late = sorted(pair)
                shown[b, k] = (early, late) if answers[b, k] == 0 else (late, early)
    if able.sum() < n:
        raise ValueError(
            f"only {able.sum()} of {count} excerpts of {excerpt} have a pair of segments of {segment} in every bin of "
            f"{edges}, fewer than n = {n}; use other edges, longer excerpts or more of them (extra)"
        )
    kept = np.sort(rng.permutation(np.flatnonzero(able))[:n])  # the same in every bin
    return Items(starts[kept], shown[:, kept], answers[:, kept], excerpt, segment, edges)


def sort_items(
    length: int,
    excerpt: int,
    segment: int,
    edges: Sequence[int],
    n: int,
    seed: int,
    *,
    extra: int = EXTRA,
    sentences: Ints | None = None,
) -> Items:
    """`draw_items` whose first-shown segments pass as spread evenly over the excerpt.

    Raises ValueError as there, and where the starts of the segments shown first, over all bins, are not U(0, E - S) by
    p > 0.05; wide distances leave the middle of an excerpt out and fail so. Another seed may pass.
    """
    items = draw_items(length, excerpt, segment, edges, n, seed, extra=extra, sentences=sentences)
    p = uniform_p(items.shown[..., 0].reshape(-1), excerpt - segment)
    if p <= SIGNIFICANCE:
        raise ValueError(
            f"seed {seed}: the segments shown first do not start uniformly in 0 .. {excerpt - segment} (p = {p:.2g}); "
            "use another seed or other edges"
        )
    return items


def _inside(sentences: Ints, start: int, room: int) -> Ints:
    """Sentence starts of an excerpt, counted from its own start, that leave room for a segment."""
    low, high = np.searchsorted(sentences, [start, start + room])
    return sentences[low:high] - start


# prompts


class Question(NamedTuple):
    """A prompt's parts: the excerpt with its introduction (empty without one), the two segments, and the question."""

    excerpt: str
    segments: tuple[str, str]
    question: str


def ask(first: str, second: str, excerpt: str | None = None, title: str = "a text") -> Question:
    """The question which of two segments came first, after the excerpt or from memory alone (None).

    The reply is to begin with `PREFIX`, so that its next token is a label.
    """
    told = f"Read this excerpt from {title}.\n\n{excerpt}\n\n" if excerpt is not None else ""
    shown = (f"Segment A: {first}\n\n", f"Segment B: {second}\n\n")
    where = "the excerpt" if excerpt is not None else title
    return Question(told, shown, f"Which of these two segments came first in {where}, Segment A or Segment B?")


# scores


def label_logps(
    logps: Tensor, spellings: Sequence[Sequence[int]], spelling: Literal["logsumexp", "first"] = "logsumexp"
) -> Tensor:
    """Log-probability of each label: logps (..., V), -inf for tokens that are no candidates -> (..., L).

    spellings: token ids per label. "logsumexp": probabilities of the spellings are added up. "first": the first
    spelling counts that is a candidate, as in the paper's code. -inf where no spelling is one.
    """
    found = []
    for ids in spellings:
        own = logps[..., list(ids)]  # (..., k)
        if spelling == "first":
            live = own > float("-inf")
            found.append(own.gather(-1, live.int().argmax(-1, keepdim=True))[..., 0])
        else:
            found.append(own.logsumexp(-1))
    return torch.stack(found, -1)


def choice(logps: Tensor) -> Tensor:
    """Label log-probabilities (..., L) -> index of the likeliest, the first of equal ones; -1 where all are -inf."""
    return torch.where((logps > float("-inf")).any(-1), logps.argmax(-1), -1)


class Recall(NamedTuple):
    """Of n choices each (...,): share that is right, share of A among all, and what the better constant answer gets."""

    accuracy: Tensor
    a_rate: Tensor
    chance: Tensor


def recall(choices: Tensor, answers: Tensor) -> Recall:
    """Choices 0, 1 or -1 (no answer, which is wrong) and answers 0 or 1, both (..., n)."""
    ones = answers.double().mean(-1)
    return Recall(
        (choices == answers).double().mean(-1), (choices == 0).double().mean(-1), torch.maximum(ones, 1 - ones)
    )


def counterbalanced(logps: Tensor, swapped: Tensor) -> Tensor:
    """Log-odds (...,) that the segment shown as A came first, free of the habit of saying A.

    logps: (..., 2) for one order of showing, swapped: the same with the segments exchanged; a constant preference for
    one label cancels.
    """
    return ((logps[..., 0] - logps[..., 1]) - (swapped[..., 0] - swapped[..., 1])) / 2


# measuring a model


def label_spellings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """What to append to the prompt, and the token ids that spell each label after it.

    Where every blank is a token of its own, a blank is appended and the labels stand alone; else both "A" and the last
    token of "Segment A" count.
    """
    test = "Which segment came first"
    blanks = sum(tokenizer.decode([one]) == " " for one in tokenizer.encode(test, add_special_tokens=False))
    alone = [tokenizer.encode(label, add_special_tokens=False)[-1] for label in LABELS]
    if blanks == test.count(" "):
        return " ", tuple((one,) for one in alone)
    after = [tokenizer.encode(f"Segment {label}", add_special_tokens=False)[-1] for label in LABELS]
    return "", tuple(tuple(dict.fromkeys(pair)) for pair in zip(alone, after, strict=True))


@torch.no_grad()
def answer_logps(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> Tensor:
    """log p(A), log p(B) in nats after `PREFIX`: (n, 2) float32. A tokenizer without a chat template gets plain text.

    Raises PromptError for a prompt longer than the model's positions: cut, it would lose its question.
    """
    tail, spellings = label_spellings(tokenizer)
    begun = torch.tensor(tokenizer.encode(PREFIX + tail, add_special_tokens=False))  # (p,)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    found = []
    for at in range(0, len(questions), BATCH):
        # the question as a marked part: conversations are padded on the left then
        messages = [
            [
                {"role": "system", "content": SYSTEM + ("" if tokenizer.chat_template else "\n\n")},
                {"role": "user", "content": [
                    {"type": "text", "text": one.excerpt + "".join(one.segments)},
                    {"type": "question", "text": one.question + ("" if tokenizer.chat_template else "\n")},
                ]},
            ]
            for one in questions[at : at + BATCH]
        ]  # fmt: skip
        batch, _ = prepare(tokenizer, messages)
        B = len(messages)
        ids = torch.cat([batch["input_ids"], begun.expand(B, -1)], 1).to(model.device)  # (B, N)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(begun).expand(B, -1)], 1).to(model.device)
        if limit is not None and ids.shape[1] > limit:
            raise PromptError(
                f"a prompt needs {ids.shape[1]} tokens, more than the model's {limit} positions; use shorter excerpts"
            )
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
        found.append(label_logps(out.logits[:, -1].float().log_softmax(-1), spellings).cpu())
    return torch.cat(found)


class Memory(NamedTuple):
    """Label log-probabilities (m, N, 2) with the excerpt in the prompt and without it, and the answers (m, N)."""

    in_context: Tensor
    without: Tensor
    answers: Tensor

    @property
    def gain(self) -> Tensor:
        """(m,): accuracy in context minus accuracy without the excerpt, per bin."""
        return (
            recall(choice(self.in_context), self.answers).accuracy - recall(choice(self.without), self.answers).accuracy
        )


@dataclass(frozen=True)
class SequenceOrderRecall(Configured):
    """Asks a causal language model for the order of segments of a text, with and without the text before it.

    >>> memory = SequenceOrderRecall(excerpt=250).measure(model, tokenizer, text, n=100)
    >>> recall(choice(memory.in_context), memory.answers).accuracy  # per bin of distances

    Inside `method.on(model)` it measures what a method does to the memory of order.
    """

    excerpt: int = param(250, ge=2, doc="words of an excerpt, E")
    segment: int = param(20, ge=1, doc="words of a segment, S")

    def items(self, words: Sequence[str], n: int, seed: int = 0) -> Items:
        """Items in the bins of Book-SORT. Raises ValueError as `sort_items` does."""
        edges, spare = book_edges(self.excerpt, self.segment), EXTRA + n % 2
        return sort_items(
            len(words), self.excerpt, self.segment, edges, n, seed, extra=spare, sentences=sentence_starts(words)
        )

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, n: int = 100, seed: int = 0
    ) -> Memory:
        """n items per bin of a text without its headings. Raises ValueError and PromptError as the parts do."""
        words = text.split()
        items = self.items(words, n, seed)
        m, N = items.answers.shape
        asked: dict[bool, list[Question]] = {True: [], False: []}
        for b in range(m):
            for k in range(N):
                first, second = (" ".join(one) for one in items.segments_of(words, b, k))
                asked[True].append(ask(first, second, " ".join(items.excerpt_of(words, k))))
                asked[False].append(ask(first, second))
        inside, without = (answer_logps(model, tokenizer, asked[one]).view(m, N, 2) for one in (True, False))
        return Memory(inside, without, torch.from_numpy(items.answers))
