"""Saliency map verbalization: token scores searched for salient spans, and said in one or two sentences.

    b = a / |max a|
    score(f, s) = sum_l f_l b_{s+l} / sum_l f_l       f: 0/1 filter of length L, s: start of a window
    found:        {s + l : f_l = 1}, where none of these b is negative and score > tau
    cov(S)      = sum_{i in S} a_i / sum_i max(a_i, 0)
    summary:      the best sets of the convolution search (2 .. L - 2 ones), of the span search (centred runs) and the
                  best single tokens, joined; runs of neighbours whose cov reaches the 0.75 quantile, best first

The sentence is faithful by construction: it cites only what has the mass. The other way, giving a language model the
scores and asking it for an explanation, is `instruction`; `coverage_at_k` tells how much of the mass either text cites.
"Saliency Map Verbalization: Comparing Feature Importance Representations from Model-free and Instruction-based
Methods", arXiv 2210.07222. Where its official code slips we follow the definitions: the last window is searched too,
and a set's coverage counts its last token. Ours: tokens are joined to words first, single tokens must have a positive
score, and the search for negative scores mirrors the one for positive ones.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from seqwise.core.attribution import Attribution
from seqwise.core.config import Configured, param
from seqwise.core.errors import UsageError

Found = tuple[tuple[int, ...], float]  # indices, coverage

NOTHING = "No token is salient for the prediction"


def coverage(a: Tensor, members: Tensor, official: bool = False) -> Tensor:
    """Share of the positive mass of a (n,) that each set holds, at least 0; 0 where nothing is positive.

    members: bool (..., n). Returns (...,). official=True sums, as the official summary does, the whole range from a
    set's first token to the one before its last: a single token then has 0.
    """
    if official:
        at = torch.arange(a.shape[-1], device=a.device)
        first = torch.where(members, at, a.shape[-1]).amin(-1, keepdim=True)
        last = torch.where(members, at, -1).amax(-1, keepdim=True)
        members = (at >= first) & (at < last)
    mass = a.clamp(min=0).sum(-1)
    return ((members * a).sum(-1) / mass.clamp(min=torch.finfo(a.dtype).tiny)).clamp(min=0)


def normalise(a: Tensor) -> Tensor:
    """b = a / |max a|: (..., n) -> (..., n). All 0 where the largest value is 0."""
    top = a.amax(-1, keepdim=True)
    return torch.where(top == 0, 0.0, a / top.abs())


def threshold(b: Tensor, kind: Literal["mean", "quantile", "variance"] = "mean", value: float = 0.4) -> Tensor:
    """tau of b (n,), a scalar: mean of the best max(1, int(n * value)), or value times the population's standard
    deviation ("quantile") or variance. Raises ValueError for other kinds."""
    if kind == "mean":
        return b.topk(min(len(b), max(1, int(len(b) * value)))).values.mean()
    if kind == "quantile":
        return value * b.std(correction=0)
    if kind == "variance":
        return value * b.var(correction=0)
    raise ValueError(f"kind must be 'mean', 'quantile' or 'variance', got {kind!r}")


def convolution_filters(L: int = 5) -> Tensor:
    """All filters of length L with 2 .. L - 2 ones: bool (F, L), 20 for L = 5."""
    rows = [row for row in itertools.product((False, True), repeat=L) if 2 <= sum(row) <= L - 2]
    return torch.tensor(rows, dtype=torch.bool).reshape(-1, L)


def span_filters(L: int = 5) -> Tensor:
    """Centred runs of odd length above 1: bool (F, L); 01110 and 11111 for L = 5."""
    at = torch.arange(L)
    return torch.stack([(at >= (L - k) // 2) & (at < (L - k) // 2 + k) for k in range(3, L + 1, 2)])


def search(
    b: Tensor, filters: Tensor, tau: Tensor | float, sign: Literal["+", "-"] = "+", last_window: bool = True
) -> Tensor:
    """The sets that filters (F, L) find in b (n,): bool (m, n), each once, in the order of their indices.

    sign "-" looks for negative values, whose mean is below -tau. last_window=False leaves the last window out, as the
    official code does. None are found where n < L.
    """
    L, n = filters.shape[1], len(b)
    windows = n - L + 1 if last_window else n - L
    if windows < 1:
        return torch.zeros(0, n, dtype=torch.bool, device=b.device)
    filters = filters.to(b.device)
    window = b.unfold(0, L, 1)[:windows, None]  # (W, 1, L)
    score = (window * filters).sum(-1) / filters.sum(-1)  # (W, F)
    wrong = (window < 0) if sign == "+" else (window >= 0)
    above = score > tau if sign == "+" else -score > tau
    start, f = (above & ~(wrong & filters).any(-1)).nonzero(as_tuple=True)  # (h,)
    index = torch.where(filters[f], start[:, None] + torch.arange(L, device=b.device), n)  # (h, L), n: none
    index = index.sort(-1).values.unique(dim=0)  # one filter moved by one finds what another finds
    found = torch.zeros(len(index), n + 1, dtype=torch.bool, device=b.device)
    return found.scatter_(1, index, True)[:, :n]


def best_first(a: Tensor, sets: Tensor, official: bool = False) -> tuple[Tensor, Tensor]:
    """Sets (m, n) by falling coverage of a (n,), (m,) each: their order and coverages; ties: the earlier set."""
    cov = coverage(a, sets, official)
    order = cov.argsort(descending=True, stable=True)
    return order, cov[order]


def summary_spans(
    a: Tensor, found: Sequence[Tensor], top: int = 5, quantile: float = 0.75, official: bool = False
) -> tuple[Tensor, Tensor]:
    """What is worth saying: spans (k, 2), start and stop, by falling coverage, and the coverages (k,).

    a: (n,). found: the sets (m, n) of each search. The `top` sets of highest coverage of each, and of the single
    tokens, are joined; of the runs of neighbours those stay whose coverage reaches the quantile of the runs'.
    official=True takes the official coverage, for which single tokens are all alike and the first ones win.
    """
    n = len(a)
    single = torch.eye(n, dtype=torch.bool, device=a.device)
    if not official:
        single = single[a > 0]
    union = torch.zeros(n, dtype=torch.bool, device=a.device)
    for sets in (*found, single):
        union |= sets[best_first(a, sets, official)[0][:top]].any(0)
    edge = torch.nn.functional.pad(union.to(torch.int8), (1, 1)).diff()
    spans = torch.stack([(edge == 1).nonzero()[:, 0], (edge == -1).nonzero()[:, 0]], -1)  # (r, 2)
    if not len(spans):
        return spans, a.new_zeros(0)
    at = torch.arange(n, device=a.device)
    runs = (at >= spans[:, :1]) & (at < spans[:, 1:])  # (r, n)
    order, cov = best_first(a, runs, official)
    stays = cov >= torch.quantile(cov.double(), quantile) - 1e-12
    return spans[order][stays], cov[stays]


def template(phrases: Sequence[Sequence[str]], coverages: Sequence[float] | None = None) -> str:
    """The sentence for phrases (the words of each), most important first; coverages add what each holds in percent."""
    parts = []
    for i, words in enumerate(phrases):
        text = " ".join(words)
        kind = "word" if len(words) == 1 else "span" if "." in text else "phrase"
        share = "" if coverages is None else f" ({100 * coverages[i]:.0f} %)"
        role = "is most important for the prediction" if i == 0 else "is also salient"
        parts.append(f"The {kind} » {text} «{share} {role}")
    return ". ".join(parts) or NOTHING


def instruction(
    words: Sequence[str],
    a: Sequence[float],
    label: str,
    text: str = "text",
    model: str = "language model",
    name_words: bool = False,
) -> str:
    """A prompt that asks a language model to put the scores a of `words` into words.

    text: what the words are ("news article"); model: what predicted `label` ("topic classifier").
    name_words: asks for the most important words instead of an explanation.
    """
    scored = " ".join(f"{word} ({score:.2f})" for word, score in zip(words, a, strict=True))
    task = (
        "Name the words that were most important for this prediction."
        if name_words
        else "Explain briefly, from the scores, why this was predicted."
    )
    return (
        f"Below is a {text} in which every word is followed by its importance score in parentheses.\n"
        f"A {model} predicted '{label}' for it. The score says how important the word was for that prediction. The "
        f"scores were computed after the prediction; the {model} could not use them.\n\n{scored}\n\n{task}"
    )


def cited(text: str, words: Sequence[str]) -> Tensor:
    """Which of the words a text cites, bool (n,): those inside » «, or inside quotation marks where there is no » «.

    Case does not count. A text that mentions punctuation cites all words without a letter or digit.
    """
    parts = re.findall(r"»(.*?)«", text, re.S) or [
        part for pair in re.findall(r"\"(.*?)\"|“(.*?)”|(?<!\w)['‘](.*?)['’](?!\w)", text, re.S) for part in pair
    ]
    named = {_bare(word) for part in parts for word in part.split()} - {""}
    marks = "punctuation" in text.lower()
    quoted = {word.lower() for part in parts for word in part.split()}
    return torch.tensor(
        [
            _bare(w) in named or w.lower().strip() in quoted or (marks and not any(c.isalnum() for c in w))
            for w in words
        ],
        dtype=torch.bool,
    )


def coverage_at_k(a: Tensor, cites: Tensor, k: int = 10) -> Tensor:
    """Share of the positive mass that the cited of the 1 .. k best tokens carry: (k,); 0 where nothing is positive.

    a: (n,), taken with two decimals. cites: bool (n,). All ones give the upper bound. Entries beyond n repeat the last.
    """
    a = a.round(decimals=2)
    order = a.argsort(descending=True, stable=True)[:k]
    mass = a.clamp(min=0)
    held = (mass * cites)[order].cumsum(0) / mass.sum().clamp(min=torch.finfo(a.dtype).tiny)
    return torch.nn.functional.pad(held[None], (0, k - len(held)), mode="replicate")[0]


@dataclass(frozen=True)
class Verbalization:
    """What was said about one target.

    text: the sentence. words: those searched. scores: theirs. inputs: which word of the attribution (joined to words)
    each is. spans: start and stop in `words`, best first. coverages: share of the positive mass of each.
    searches: the best sets of "convolution", "span", "both" and "total" (single tokens). note: why less was
    searched or found than usual, or "".
    """

    target: str
    text: str
    words: Sequence[str]
    scores: Sequence[float]
    inputs: Sequence[int]
    spans: Sequence[tuple[int, int]]
    coverages: Sequence[float]
    searches: Mapping[str, Sequence[Found]]
    note: str = ""


@dataclass(frozen=True)
class SaliencyVerbalization(Configured):
    """Says any attribution in a sentence per target; needs no model."""

    length: int = param(5, ge=4, le=8, doc="of the filters; their number doubles with each token")
    threshold: Literal["mean", "quantile", "variance"] = "mean"
    value: float = param(0.4, gt=0, doc="share of the tokens (mean), or factor: the paper's quantile takes 3")
    top: int = param(5, ge=1, doc="sets of each search that are shown and joined")
    quantile: float = param(0.75, ge=0, le=1, doc="of the spans' coverages that a span must reach")
    percent: bool = False

    def verbalize(self, attribution: Attribution) -> list[Verbalization]:
        """One verbalization per target, of its text inputs: image patches and special tokens are left out, and so is
        what has no score or 0."""
        joined = attribution.to_words()
        skipped = torch.zeros(len(joined.inputs), dtype=torch.bool)
        for span in joined.spans:
            if span.grid is not None or span.name == "special":
                skipped[span.start : span.stop] = True
        said = []
        for t, target in enumerate(joined.targets):
            a = joined.scores[t].nan_to_num(0.0)
            inputs = ((a != 0) & ~skipped).nonzero()[:, 0]
            words = [joined.inputs[i].strip() for i in inputs.tolist()]
            said.append(self._said(a[inputs], words, inputs.tolist(), target))
        return said

    def verbalize_scores(self, a: Sequence[float] | Tensor, words: Sequence[str], target: str = "") -> Verbalization:
        """The same for bare scores (n,) of words; zeros are left out. Raises UsageError where they do not match."""
        a = torch.as_tensor(a, dtype=torch.float32)
        if a.shape != (len(words),) or not a.isfinite().all():
            raise UsageError(f"a must hold one finite score for each of {len(words)} words, got {tuple(a.shape)}")
        inputs = a.nonzero()[:, 0]
        return self._said(a[inputs], [words[i] for i in inputs.tolist()], inputs.tolist(), target)

    def ask(
        self,
        attribution: Attribution,
        chat: Callable[[str], str],
        label: str | None = None,
        text: str = "text",
        model: str = "language model",
    ) -> list[str]:
        """Instruction-based: per target the answer of `chat` to `instruction`; label: what was predicted, default the
        target. Unlike `verbalize` nothing binds the answer to the scores: check it by `cited` and `coverage_at_k`."""
        return [
            chat(instruction(said.words, said.scores, said.target.strip() if label is None else label, text, model))
            for said in self.verbalize(attribution)
        ]

    def _said(self, a: Tensor, words: list[str], inputs: list[int], target: str) -> Verbalization:
        if not (a > 0).any():
            none: dict[str, list[Found]] = {name: [] for name in ("convolution", "span", "both", "total")}
            return Verbalization(target, NOTHING, words, a.tolist(), inputs, [], [], none, "no score is positive")
        b = normalise(a)
        tau = threshold(b, self.threshold, self.value)
        convolution = search(b, convolution_filters(self.length), tau)
        span = search(b, span_filters(self.length), tau)
        spans, cov = summary_spans(a, (convolution, span), self.top, self.quantile)
        ranges = [(int(start), int(stop)) for start, stop in spans.tolist()]
        both = convolution[(convolution[:, None] == span).all(-1).any(-1)] if len(span) else convolution[:0]
        sets = {"convolution": convolution, "span": span, "both": both, "total": torch.eye(len(a), dtype=torch.bool)}
        note = ""
        if len(a) < self.length:
            note = f"fewer than {self.length} scored words: single words only"
        elif not len(convolution) and not len(span):
            note = f"no window of {self.length} words is above the threshold {float(tau):.3g}: single words only"
        said = template([words[start:stop] for start, stop in ranges], cov.tolist() if self.percent else None)
        shown = {name: self._shown(a, each) for name, each in sets.items()}
        return Verbalization(target, said, words, a.tolist(), inputs, ranges, cov.tolist(), shown, note)

    def _shown(self, a: Tensor, sets: Tensor) -> list[Found]:
        order, cov = best_first(a, sets)
        return [
            (tuple(sets[i].nonzero()[:, 0].tolist()), share)
            for i, share in zip(order[: self.top].tolist(), cov.tolist(), strict=False)
        ]


def _bare(word: str) -> str:
    """A word in lower case without marks around it."""
    return re.sub(r"^\W+|\W+$", "", word.lower())
