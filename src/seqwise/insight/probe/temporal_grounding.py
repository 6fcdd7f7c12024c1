"""Temporal grounding: does a language model hold one consistent timeline of a story?

    yes or no     yes iff log p(yes | prompt) >= log p(no | prompt)
    consistency   q and its reversal q' (before <-> after) have opposite answers; over N pairs
                  acc = both right / N,  inconsistent = exactly one right / (N - unanswered)
    ordering      |before(gold) & before(found)| / |before(gold)|,  before(x) = all (i, j) with i earlier in x
    candidates    per question strict = all judged right, and F1 of yes; mean over questions

A model that always says yes has acc 0 and inconsistent 1; two wrong answers are consistent, on a wrong timeline.
Ordering is (Kendall's tau + 1)/2 where both hold the same events; missing events lose their pairs, extra ones cost
nothing. Any question whose reversal turns its answer gives a consistency probe, not only before and after.
"Are Large Language Models Temporally Grounded?", arXiv 2311.08398.
Replies are searched for whole words here, for any substring in the paper ("no" is in "not"); descriptions of events
are compared by the longest common subsequence of lower-case words, without stemming. The wording of the prompt is ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seqwise.core.config import Configured, param
from seqwise.core.errors import PromptError

Match = Literal["word", "substring"]

YES, NO = "yes", "no"
ARGUMENTS = "ARGS"  # the tag between an event's verb and its description
BATCH = 8  # prompts in one forward

_REVERSED = {"before": "after", "after": "before"}


# yes or no


def says_yes(yes: Tensor, no: Tensor) -> Tensor:
    """Log-probabilities of the two labels' tokens, (..., k) and (..., l) -> bool (...); yes wins ties.

    The last tokens are compared where k = l, the sums over all tokens where a tokenizer cuts the labels differently.
    """
    if yes.shape[-1] == no.shape[-1]:
        return yes[..., -1] >= no[..., -1]
    return yes.sum(-1) >= no.sum(-1)


def mentions(reply: str, word: str, match: Match = "word") -> bool:
    """Whether a reply holds a word, in any case; "true" counts as yes and "false" as no.

    match: "substring" finds the word inside others too, as the paper's code does.
    """
    text = reply.lower()
    others = [word, *(other for other, meant in (("true", YES), ("false", NO)) if meant == word)]
    if match == "substring":
        return any(one in text for one in others)
    return any(re.search(rf"\b{re.escape(one)}\b", text) for one in others)


# one timeline: a question and its reversal


def reverse(question: str) -> str:
    """The question with before and after exchanged, as whole words; its own inverse. Raises ValueError without any."""

    def other(found: re.Match[str]) -> str:
        word = found.group()
        turned = _REVERSED[word.lower()]
        return turned.upper() if word.isupper() else turned.capitalize() if word[0].isupper() else turned

    turned, count = re.subn(r"\b(before|after)\b", other, question, flags=re.IGNORECASE)
    if count == 0:
        raise ValueError(f"question must hold 'before' or 'after', got {question!r}")
    return turned


class Consistency(NamedTuple):
    """acc, both_wrong, unanswered: shares of N pairs. inconsistent: share of the answered pairs, NaN without any."""

    acc: float
    inconsistent: float
    both_wrong: float
    unanswered: float


def consistency(said: Sequence[tuple[bool | None, bool | None]], gold: Sequence[bool]) -> Consistency:
    """Of N pairs: what was said to a question and to its reversal (None: no answer), and the question's right answer.

    The reversal's right answer is the opposite. An answer that is missing beside one that is there is wrong. Raises
    ValueError for no pairs.
    """
    if len(said) != len(gold) or not gold:
        raise ValueError(f"gold must be one per pair, at least one, got {len(gold)} for {len(said)} pairs")
    answered = [pair for pair in said if pair != (None, None)]
    right = [(a is not None and a == g, b is not None and b != g) for (a, b), g in zip(said, gold, strict=True)]
    N, unanswered = len(gold), len(gold) - len(answered)
    both, one = sum(a and b for a, b in right), sum(a != b for a, b in right)
    return Consistency(
        both / N, one / len(answered) if answered else math.nan, (len(answered) - both - one) / N, unanswered / N
    )


def reply_consistency(replies: Sequence[tuple[str, str]], gold: Sequence[str], match: Match = "word") -> Consistency:
    """The same from free replies to a question and its reversal; gold: "yes" or "no", the question's.

    A reply is right where it mentions its gold word, whatever else it says. A pair is unanswered where neither word is
    in either reply.
    """
    said: list[tuple[bool | None, bool | None]] = []
    for pair, word in zip(replies, gold, strict=True):
        right, opposite = word == YES, NO if word == YES else YES
        if not any(mentions(reply, one, match) for reply in pair for one in (YES, NO)):
            said.append((None, None))
            continue
        said.append((right == mentions(pair[0], word, match), right != mentions(pair[1], opposite, match)))
    return consistency(said, [word == YES for word in gold])


def yes_rate(said: Sequence[tuple[bool | None, bool | None]]) -> float:
    """Share of yes among all answers, 0.5 for a consistent model; NaN without answers. Why a model is inconsistent."""
    answers = [one for pair in said for one in pair if one is not None]
    return sum(answers) / len(answers) if answers else math.nan


# candidate answers


class Candidates(NamedTuple):
    strict: float
    f1: float


def candidates(said: Sequence[str], gold: Sequence[str]) -> Candidates:
    """Of one question: "yes" or "no" to each candidate, compared as strings.

    precision = right yes / said yes, 1 where none is said; recall = right yes / gold yes, 1 where there is none.
    """
    hits = sum(a == b == YES for a, b in zip(said, gold, strict=True))
    p = hits / said.count(YES) if said.count(YES) else 1.0
    r = hits / gold.count(YES) if gold.count(YES) else 1.0
    return Candidates(float(list(said) == list(gold)), 2 * p * r / (p + r) if p + r else 0.0)


def mean_candidates(said: Sequence[str], gold: Sequence[str], questions: Sequence[Hashable]) -> Candidates:
    """Mean over questions of `candidates`; questions: whose each candidate is. Raises ValueError for none."""
    if not said or not len(said) == len(gold) == len(questions):
        counts = f"{len(said)}, {len(gold)}, {len(questions)}"
        raise ValueError(f"said, gold and questions must be as many, at least one, got {counts}")
    groups: dict[Hashable, tuple[list[str], list[str]]] = {}
    for a, b, question in zip(said, gold, questions, strict=True):
        both = groups.setdefault(question, ([], []))
        both[0].append(a)
        both[1].append(b)
    scores = [candidates(*both) for both in groups.values()]
    return Candidates(*(sum(values) / len(scores) for values in zip(*scores, strict=True)))


# events in order


class Event(NamedTuple):
    """An event: its tag, its verb, and the description after <ARGS>."""

    tag: str
    verb: str
    description: str


def parse_events(text: str) -> list[Event]:
    """Events of "<EVENT> verb <ARGS> description <EVENT> ...", in order; what is before the first tag is left out."""
    pieces = re.split(rf"<((?!{ARGUMENTS}>)[^<>]+)>", text)[1:]  # tag, body, tag, body, ...
    found = []
    for tag, body in zip(pieces[::2], pieces[1::2], strict=True):
        verb, _, description = body.partition(f"<{ARGUMENTS}>")
        found.append(Event(tag, verb.strip(), " ".join(description.split())))
    return found


def lcs_f1(a: str, b: str) -> float:
    """F1 of the longest common subsequence of lower-case words; 0 where a text has none."""
    x, y = (re.findall(r"\w+", one.lower()) for one in (a, b))
    if not x or not y:
        return 0.0
    longest = [0] * (len(y) + 1)
    for word in x:
        before = 0  # of the shorter x and the shorter y
        for j, other in enumerate(y, 1):
            above = longest[j]
            longest[j] = before + 1 if word == other else max(above, longest[j - 1])
            before = above
    return 2 * longest[-1] / (len(x) + len(y))


def match_scores(found: Sequence[Event], gold: Sequence[Event]) -> npt.NDArray[np.float64]:
    """1[same tag] 1[same verb] F1(descriptions): (found, gold)."""
    scores = [
        [lcs_f1(a.description, b.description) if (a.tag, a.verb) == (b.tag, b.verb) else 0.0 for b in gold]
        for a in found
    ]
    return np.asarray(scores, dtype=np.float64).reshape(len(found), len(gold))


def assign(scores: npt.NDArray[np.float64]) -> list[int]:
    """The one-to-one matching of largest total, scores (n, m) >= 0: per row its column, -1 for none or score 0."""
    n, m = scores.shape
    size = max(n, m)
    cost = np.zeros((size + 1, size + 1))
    cost[1 : n + 1, 1 : m + 1] = -scores
    # Shortest augmenting paths with dual prices u (rows) and v (columns); row and column 0 stand for none.
    u, v = np.zeros(size + 1), np.zeros(size + 1)
    row_of = np.zeros(size + 1, dtype=int)
    for i in range(1, size + 1):
        row_of[0], j = i, 0
        least, way = np.full(size + 1, np.inf), np.zeros(size + 1, dtype=int)
        used = np.zeros(size + 1, dtype=bool)
        while row_of[j]:
            used[j] = True
            free = ~used
            slack = cost[row_of[j]] - u[row_of[j]] - v
            better = free & (slack < least)
            least[better], way[better] = slack[better], j
            nearest = int(np.where(free, least, np.inf).argmin())
            step = least[nearest]
            u[row_of[used]] += step
            v[used] -= step
            least[free] -= step
            j = nearest
        while j:
            row_of[j], j = row_of[way[j]], way[j]
    columns = [-1] * n
    for j in range(1, m + 1):
        if row_of[j] <= n and scores[row_of[j] - 1, j - 1] > 0:
            columns[row_of[j] - 1] = j - 1
    return columns


def event_ids(found: Sequence[Event], gold: Sequence[Event]) -> list[int]:
    """Which gold event each found one is, by the best matching; others get ids from len(gold) on."""
    columns = assign(match_scores(found, gold))
    fresh = iter(range(len(gold), len(gold) + len(found)))
    return [column if column >= 0 else next(fresh) for column in columns]


def pairwise_accuracy(found: Sequence[Hashable], gold: Sequence[Hashable]) -> float:
    """Share of gold's ordered pairs that `found` has in the same order; NaN for one gold event, which has no pair."""
    pairs = set(combinations(gold, 2))
    return len(pairs & set(combinations(found, 2))) / len(pairs) if pairs else math.nan


def mean_pairwise_accuracy(found: Sequence[Sequence[Event]], gold: Sequence[Sequence[Event]]) -> float:
    """Mean over stories with two gold events or more; NaN without one."""
    scores = [pairwise_accuracy(event_ids(a, b), range(len(b))) for a, b in zip(found, gold, strict=True)]
    counted = [score for score in scores if not math.isnan(score)]
    return sum(counted) / len(counted) if counted else math.nan


def mean_description_score(found: Sequence[Event], gold: Sequence[Event]) -> float:
    """How well events are copied at all: mean matching score over the gold events, unmatched ones 0; NaN for none."""
    scores = match_scores(found, gold)
    total = sum(scores[i, j] for i, j in enumerate(assign(scores)) if j >= 0)
    return float(total / len(gold)) if len(gold) else math.nan


# measuring a model


def prompt(article: str, question: str) -> str:
    """What is read before the label; the label follows after one blank."""
    return (
        "Answer the question by the article, only with yes or no.\n\n"
        f"Article: {article}\n\nQuestion: {question}\n\nThe answer is:"
    )


@torch.no_grad()
def label_logps(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> tuple[list[Tensor], list[Tensor]]:
    """Per prompt the log-probabilities in nats of the tokens of yes, and of no, as its last word: (k,) and (l,) each.

    Raises PromptError for a prompt longer than the model's positions.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    given = [tokenizer.encode(one) for one in prompts]
    rows: list[tuple[list[int], int]] = []  # ids of prompt and label, and where the label begins
    for label in (YES, NO):
        for one, ids in zip(prompts, given, strict=True):
            whole = tokenizer.encode(f"{one} {label}")
            # a final token that the tokenizer may add is none of the label's
            while len(whole) > len(ids) and whole[-1] in tokenizer.all_special_ids:
                whole.pop()
            start = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), len(ids))
            if limit is not None and len(whole) > limit:
                raise PromptError(f"a prompt needs {len(whole)} tokens, more than the model's {limit} positions")
            rows.append((whole, start))
    found: list[Tensor] = []
    for at in range(0, len(rows), BATCH):
        part = rows[at : at + BATCH]
        width = max(len(ids) for ids, _ in part)
        batch = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part], device=model.device)  # (B, n)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part], device=model.device)
        keep = width - min(start for _, start in part) + 1
        logits = model(input_ids=batch, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
        for (ids, start), own in zip(part, logits.float().cpu(), strict=True):
            first = start - 1 - (width - own.shape[0])
            logps = own[first : first + len(ids) - start].log_softmax(-1)  # (k, V)
            found.append(logps.gather(-1, torch.tensor(ids[start:])[:, None])[:, 0])
    return found[: len(prompts)], found[len(prompts) :]


@dataclass(frozen=True)
class TemporalGrounding(Configured):
    """Asks a causal language model a question and its reversal, and says how often it contradicts itself.

    >>> said = TemporalGrounding().ask(model, tokenizer, articles, questions)
    >>> consistency(said, gold), yes_rate(said)
    """

    article: int = param(1900, ge=1, doc="tokens of an article that are read, from its beginning")

    def ask(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        articles: Sequence[str],
        questions: Sequence[str],
        transform: Callable[[str], str] = reverse,
    ) -> list[tuple[bool | None, bool | None]]:
        """Per question whether the model says yes to it, and to its reversal.

        transform: its own inverse, turns a question into one with the opposite answer (longer and shorter, left and
        right). Raises ValueError for a question that it cannot turn, PromptError for a prompt that is too long.
        """
        prompts = []
        for article, question in zip(articles, questions, strict=True):
            ids = tokenizer.encode(article, add_special_tokens=False)
            read = article if len(ids) <= self.article else tokenizer.decode(ids[: self.article])
            prompts += [prompt(read, question), prompt(read, transform(question))]
        yes, no = label_logps(model, tokenizer, prompts)
        said = [bool(says_yes(a, b)) for a, b in zip(yes, no, strict=True)]
        return list(zip(said[::2], said[1::2], strict=True))
