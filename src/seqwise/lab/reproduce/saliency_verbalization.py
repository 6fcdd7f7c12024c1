"""Saliency map verbalization on planted phrases, and on a bag-of-words classifier of real paragraphs.

Planted: 40 scores of unit noise, 3 more on three neighbours. Real: paragraphs of Python's own documentation, classified
by topic; the score of a word is its exact share of the predicted topic's logit, against the mean over topics. A reader
then sees the cited words alone; here the reader is the classifier itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor

from seqwise.insight.explain.saliency_verbalization import SaliencyVerbalization, Verbalization, cited, coverage_at_k
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction

PLANTED = 200  # draws per seed
N, PHRASE, BUMP = 40, 3, 3.0
SHARE = 0.95  # of draws whose first phrase must contain the planted one
TOPICS = 8  # those with the most paragraphs
SHORTEST, LONGEST = 20, 100  # words of a paragraph; the paper's studies take at most 100
EPOCHS = 200
METHOD = SaliencyVerbalization()

CLAIMS = (
    Claim(
        key="planted",
        text=f"the first phrase contains a planted phrase of three words (bump 3, unit noise) in {SHARE:.0%} of draws",
        paper="none: real maps have no known phrase",
        direction=">=",
        margin=0.02,
        baseline=f"{SHARE:.0%}",
    ),
    Claim(
        key="planted-tokens",
        text="the first phrase contains the planted phrase more often than the three best tokens are it",
        paper="none: real maps have no known phrase",
        direction=">",
        margin=0.0,
        baseline="the three best single tokens",
    ),
    Claim(
        key="faithful",
        text="the sentence cites more of the positive mass (coverage@k, mean of k = 1..10) than as many words at random",
        paper="search-based verbalizations are faithful by design (abstract)",
        direction=">",
        margin=0.0,
        baseline="spans of the same lengths at random places",
    ),
    Claim(
        key="simulatable-random",
        text="from the cited words alone the predicted topic is told more often than from as many words at random",
        paper="no figure seen; people, not a classifier",
        direction=">",
        margin=0.0,
        baseline="spans of the same lengths at random places",
    ),
    Claim(
        key="simulatable-tokens",
        text="from the cited words the predicted topic is told less often than from as many best single words",
        paper="templates have lower simulatability than other representations (abstract)",
        direction="<",
        margin=0.0,
        baseline="extractive rationale: as many best single words",
    ),
    Claim(
        key="people",
        text="people find verbalizations by GPT-3.5 more helpful and easier to read than heat maps and templates",
        paper="rated highest by far (abstract)",
        direction=">",
        margin=0.0,
        baseline="heat map, extractive rationale, template",
    ),
    Claim(
        key="unfaithful",
        text="verbalizations by GPT-3.5 cite less of the mass than templates do",
        paper="not faithful to the numbers (abstract)",
        direction="<",
        margin=0.0,
        baseline="template",
    ),
)


class Paragraphs(NamedTuple):
    """words: of each paragraph. label: its topic, (P,). counts: (P, V). number: word -> column."""

    words: list[list[str]]
    label: Tensor
    counts: Tensor
    number: dict[str, int]


@lru_cache(maxsize=1)
def paragraphs() -> Paragraphs:
    split = {
        name: [
            words
            for block in re.split(r"\n\s*\n", text)
            if SHORTEST <= len(words := re.findall(r"[A-Za-z']+|[.,;:()]", block)) <= LONGEST
        ]
        for name, text in sorted(topics.items())
    }
    largest = sorted(split, key=lambda name: -len(split[name]))[:TOPICS]
    words = [each for name in largest for each in split[name]]
    label = torch.tensor([c for c, name in enumerate(largest) for _ in split[name]])
    number: dict[str, int] = {}
    for each in words:
        for word in each:
            number.setdefault(word.lower(), len(number))
    counts = torch.stack([_counts(each, number) for each in words])
    return Paragraphs(words, label, counts, number)


def _counts(words: list[str], number: dict[str, int]) -> Tensor:
    columns = torch.tensor([number[word.lower()] for word in words], dtype=torch.long)
    return torch.bincount(columns, minlength=len(number)).float()


def classifier(data: Paragraphs, train: Tensor, seed: int) -> torch.nn.Linear:
    """Softmax regression on word counts, trained on the paragraphs `train` (m,)."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(data.counts.shape[1], TOPICS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(EPOCHS):
        loss = torch.nn.functional.cross_entropy(model(data.counts[train]), data.label[train])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


def scores(model: torch.nn.Linear, columns: Tensor, predicted: int) -> Tensor:
    """What each word (n,) adds to the predicted topic's logit, against the mean over topics: (n,)."""
    weight = model.weight[:, columns]  # (C, n)
    return weight[predicted] - weight.mean(0)


def random_places(said: Verbalization, generator: torch.Generator) -> Tensor:
    """bool (n,): as many words as the spans hold, in spans of the same lengths at random places."""
    n = len(said.words)
    while True:  # until they do not overlap
        places = torch.zeros(n, dtype=torch.bool)
        for start, stop in said.spans:
            at = int(torch.randint(n - (stop - start) + 1, (), generator=generator))
            places[at : at + stop - start] = True
        if int(places.sum()) == sum(stop - start for start, stop in said.spans):
            return places


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    generator = torch.Generator().manual_seed(seed)
    planted, tokens = [], []
    for _ in range(PLANTED):
        a = torch.randn(N, generator=generator)
        start = int(torch.randint(N - PHRASE + 1, (), generator=generator))
        a[start : start + PHRASE] += BUMP
        (first, stop), *_ = METHOD.verbalize_scores(a, [f"w{i}" for i in range(N)]).spans
        planted.append(float(first <= start and start + PHRASE <= stop))
        tokens.append(float(sorted(a.topk(PHRASE).indices.tolist()) == list(range(start, start + PHRASE))))
    progress("training the classifier")
    data = paragraphs()
    order = torch.randperm(len(data.words), generator=generator)
    held_out, train = order[: len(order) // 5], order[len(order) // 5 :]
    model = classifier(data, train, seed)
    found: dict[str, list[float]] = {
        name: [] for name in ("cites", "cites-random", "told", "told-random", "told-tokens")
    }
    for p in held_out.tolist():
        columns = torch.tensor([data.number[word.lower()] for word in data.words[p]])
        predicted = int(model(data.counts[p]).argmax())
        said = METHOD.verbalize_scores(scores(model, columns, predicted), data.words[p], str(predicted))
        if not said.spans:
            continue
        a, columns = torch.tensor(said.scores), columns[torch.tensor(said.inputs)]
        places = torch.zeros(len(a), dtype=torch.bool)
        for start, stop in said.spans:
            places[start:stop] = True
        chance = random_places(said, generator)
        best = torch.zeros_like(places)
        best[a.topk(int(places.sum())).indices] = True
        found["cites"].append(float(coverage_at_k(a, cited(said.text, said.words)).mean()))
        found["cites-random"].append(float(coverage_at_k(a, _all_of(said.words, chance)).mean()))
        for name, seen in (("told", places), ("told-random", chance), ("told-tokens", best)):
            counts = torch.bincount(columns[seen], minlength=data.counts.shape[1]).float()
            found[name].append(float(int(model(counts).argmax()) == predicted))
    progress(f"{len(found['told'])} paragraphs verbalized")
    return {
        "planted": Measured(planted, [SHARE] * len(planted)),
        "planted-tokens": Measured(planted, tokens),
        "faithful": Measured(found["cites"], found["cites-random"]),
        "simulatable-random": Measured(found["told"], found["told-random"]),
        "simulatable-tokens": Measured(found["told"], found["told-tokens"]),
    }


def _all_of(words: Sequence[str], places: Tensor) -> Tensor:
    """A text that cites a word cites it everywhere: bool (n,)."""
    lower = [word.lower() for word in words]
    named = {word for word, there in zip(lower, places.tolist(), strict=True) if there}
    return torch.tensor([word in named for word in lower])


REPRODUCTION = Reproduction(
    slug="saliency-verbalization",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "Softmax regression on paragraphs of Python's documentation instead of BERT on IMDb and AG News; exact "
        "contributions instead of integrated gradients. The reader of simulatable-* is the classifier itself: it adds "
        "up single words and cannot profit from a phrase as people might."
    ),
    not_testable={
        "people": "needs people and GPT-3.5",
        "unfaithful": "needs GPT-3.5; the language model at hand has 135 million parameters and cites scores at will",
    },
)
