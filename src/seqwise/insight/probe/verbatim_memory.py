"""Verbatim memory: does a list of nouns that was read before come as less of a surprise, and does its order count?

    text      preface list1. between cue list2.
    list2     Repeated: list1 | Permuted: list1 in another order | Novel: nouns of another list
    S(word)   = sum over its tokens of -ln p(token | everything before it)
    x1, x2    = mean S over positions 1 .. N-1 of list1, of list2 (position 0 has no cue of its own)
    R         = 100 x2 / x1 percent, per text;  summary: its median over texts

R(Repeated) far below 100: the words are retrieved. R(Permuted) > R(Repeated): so is their order. R(Novel) is near 100
where the form of a list alone does not help.
"Characterizing Verbatim Short-Term Memory in Neural Language Models", arXiv 2210.13569. Means inside a text and medians
over texts, the rotations and the draws of second lists follow the official code; nouns and stories are our own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from seqwise.core.anatomy import Anatomy
from seqwise.core.config import Configured, param
from seqwise.core.errors import PromptError, UnsupportedModel, UsageError
from seqwise.insight.probe.base import surprisals

T = TypeVar("T")
Array = npt.NDArray[np.float64]

PREFACE, LIST1, BETWEEN, LIST2, PUNCTUATION = 0, 1, 2, 3, -1
CONDITIONS = ("Repeated", "Permuted", "Novel")
Scenario: TypeAlias = Literal[
    "intact", "scrambled", "incongruent", "short", "permuted preface", "comma", "other subject", "permuted cue"
]


# lists


def rotations(words: Sequence[T]) -> list[list[T]]:
    """All circular shifts to the right: rotation r has the last r words in front; each word stands everywhere once."""
    return [[*words[len(words) - r :], *words[: len(words) - r]] for r in range(len(words))]


def permuted_lists(lists: Sequence[Sequence[T]]) -> list[list[T]]:
    """Each list in another order: list j by RandomState((543 + j) 5).

    Lists that this leaves as they were are drawn anew together, by one RandomState(123), then (133), (143) and so on,
    until none of them is. Raises UsageError for a list in which no order differs.
    """

    def shuffled(one: Sequence[T], random: np.random.RandomState) -> list[T]:
        return [one[i] for i in random.permutation(len(one))]

    for j, one in enumerate(lists):
        if all(word == one[0] for word in one):
            raise UsageError(f"list {j + 1} must hold two different words or more, got {list(one)}")
    found = [shuffled(one, np.random.RandomState((543 + j) * 5)) for j, one in enumerate(lists)]
    equal = [j for j, one in enumerate(lists) if found[j] == list(one)]
    seed = 123
    while equal and any(found[j] == list(lists[j]) for j in equal):
        random = np.random.RandomState(seed)
        for j in equal:
            found[j] = shuffled(lists[j], random)
        seed += 10
    return found


def novel_pairing(groups: Sequence[int], seed: int = 12345) -> list[int]:
    """For each list the index of one from another group: groups[j] numbers the base list of list j from 0.

    Group after group draws, with replacement, as many lists as group 0 has among those of other groups that no earlier
    group has drawn. Raises UsageError where groups differ in size or none is left to draw.
    """
    member = np.asarray(groups)
    used = np.zeros(len(member), dtype=bool)
    found = np.zeros(len(member), dtype=np.int64)
    random = np.random.RandomState(seed)
    size = int((member == 0).sum())
    for group in np.unique(member):
        pool = np.flatnonzero((member != group) & ~used)
        if not len(pool) or int((member == group).sum()) != size:
            raise UsageError(f"group {group} needs {size} lists, as group 0 has, and lists of other groups to draw")
        drawn = random.choice(pool, size=size)
        found[member == group] = drawn
        used[drawn] = True
    return [int(j) for j in found]


# texts


@dataclass(frozen=True)
class Marked:
    """A text and its words. spans: where each word is, in characters; markers: what it belongs to (PREFACE, LIST1,
    BETWEEN, LIST2 or PUNCTUATION); positions: its place in its list from 0, -1 outside of lists."""

    text: str
    spans: tuple[tuple[int, int], ...]
    markers: tuple[int, ...]
    positions: tuple[int, ...]


def stimulus(preface: str, list1: Sequence[str], between: str, list2: Sequence[str]) -> Marked:
    """preface + " " + list1 + ". " + between + " " + list2 + ".", lists joined by ", "; between ends with the cue."""
    spans: list[tuple[int, int]] = []
    markers: list[int] = []
    positions: list[int] = []
    text = ""

    def add(piece: str, marker: int, position: int = -1) -> None:
        nonlocal text
        spans.append((len(text), len(text) + len(piece)))
        markers.append(marker)
        positions.append(position)
        text += piece

    def prose(piece: str, marker: int) -> None:
        nonlocal text
        for found in re.finditer(r"\s+|[\w'’-]+|[^\w\s]", piece):
            if found.group().isspace():
                text += found.group()
            else:
                add(found.group(), marker if found.group()[0].isalnum() else PUNCTUATION)

    def words(listed: Sequence[str], marker: int) -> None:
        nonlocal text
        for position, word in enumerate(listed):
            text += " "
            add(word, marker, position)
            add("." if position == len(listed) - 1 else ",", PUNCTUATION)

    prose(preface, PREFACE)
    words(list1, LIST1)
    text += " "
    prose(between, BETWEEN)
    words(list2, LIST2)
    return Marked(text, tuple(spans), tuple(markers), tuple(positions))


def words_of_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """The word that each token belongs to, -1 for none (BOS): by offsets (start, stop) in characters of the text.

    Both ascend. A token may begin with the blank before its word; one that covers several words is the first one's.
    """
    found, word = [], 0
    for start, stop in offsets:
        while word < len(spans) and spans[word][1] <= start:
            word += 1
        inside = word < len(spans) and spans[word][0] < stop and start < stop
        found.append(word if inside else -1)
    return found


def word_surprisals(surprisal: Tensor, words: Tensor, count: int) -> Tensor:
    """Sums of the tokens' surprisals: (n,), words (n,) in [-1, count) -> (count,), NaN without any token."""
    known = words >= 0
    total = surprisal.new_zeros(count).index_add(0, words[known], surprisal[known])
    return total.masked_fill(torch.bincount(words[known], minlength=count) == 0, math.nan)


# statistics


def list_mean(surprisal: Tensor, markers: Tensor, positions: Tensor, marker: int) -> Tensor:
    """x1 or x2: mean over the words of one list without position 0; surprisal (..., W), the others (W,) -> (...,)."""
    return surprisal[..., (markers == marker) & (positions >= 1)].mean(-1)


def repeat_surprisal(x1: Tensor, x2: Tensor) -> Tensor:
    """R = 100 x2 / x1 in percent, any shapes; NaN where the first list was no surprise (x1 < 1e-6 nats)."""
    return torch.where(x1 < 1e-6, math.nan, 100 * x2 / x1)


def contrast(x1: Tensor, x2: Tensor) -> Tensor:
    """(x2 - x1) / (x1 + x2) in [-1, 1], any shapes; below 0 where the second list is less of a surprise."""
    return (x2 - x1) / (x1 + x2)


def mad(values: Sequence[float] | Array) -> float:
    """Median of the distances from the median, not rescaled."""
    data = np.asarray(values, dtype=np.float64)
    return float(np.median(np.abs(data - np.median(data))))


def bca_median(
    values: Sequence[float] | Array, *, level: float = 0.95, resamples: int = 10_000, seed: int = 12345
) -> tuple[float, float, float]:
    """The median and the ends of its bias-corrected and accelerated bootstrap interval.

    Ends are NaN where the interval does not exist: with one value, or where all resampled medians lie on one side.
    """
    data = np.asarray(values, dtype=np.float64)
    n, median = len(data), float(np.median(data))
    drawn = np.random.RandomState(seed).randint(0, n, size=(resamples, n))
    medians = np.median(data[drawn], axis=1)  # (R,)
    below = ((medians < median).mean() + (medians <= median).mean()) / 2
    if n < 2 or not 0 < below < 1:
        return median, math.nan, math.nan
    normal = NormalDist()
    z_0 = normal.inv_cdf(float(below))
    without = np.array([np.median(np.delete(data, i)) for i in range(n)])  # (n,)
    away = without.mean() - without
    spread = float((away**2).sum())
    a = float((away**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0

    def end(z: float) -> float:
        return float(np.quantile(medians, normal.cdf(z_0 + (z_0 + z) / (1 - a * (z_0 + z)))))

    z = normal.inv_cdf((1 + level) / 2)
    return median, end(-z), end(z)


def position_curve(surprisal: Tensor, markers: Tensor, marker: int, before: int, after: int) -> Tensor:
    """Surprisal by place relative to a list's first word, punctuation not counted: (..., W), (W,) -> (..., before +
    after); the last `after` places begin with the list's first word. NaN beyond the text."""
    places = (markers != PUNCTUATION).nonzero()[:, 0]  # words alone
    onset = int((markers[places] == marker).nonzero()[0, 0])
    at = torch.arange(onset - before, onset + after)
    inside = (at >= 0) & (at < len(places))
    found = surprisal[..., places[at.clamp(0, len(places) - 1)]]
    return found.masked_fill(~inside, math.nan)


# ablations, undone on leaving


def shuffled_entries(W: Tensor, seed: int, blocks: int = 1) -> Tensor:
    """All entries of W (out, in) in another order; with blocks, those of each block of rows (a head) by themselves."""
    generator = torch.Generator().manual_seed(seed)
    parts = W.reshape(blocks, -1)
    mixed = [part[torch.randperm(len(part), generator=generator).to(W.device)] for part in parts]
    return torch.stack(mixed).view(W.shape)


@contextmanager
def shuffled_attention(model: nn.Module, seed: int = 0, *, per_head: bool = False) -> Iterator[None]:
    """Meanwhile the entries of every layer's query and key matrices are shuffled, globally or inside each head.

    Layer l draws from seed + 5 l. Values stay. Raises UnsupportedModel where queries and keys have no matrices of their
    own.
    """
    anatomy = Anatomy.of(model)
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for layer, attention in enumerate(anatomy.attentions):
            for name, heads in (("q_proj", anatomy.heads), ("k_proj", anatomy.kv_heads)):
                matrix = getattr(attention, name, None)
                if not isinstance(matrix, nn.Linear):
                    raise UnsupportedModel(
                        f"{type(attention).__name__} has no {name}; shuffling needs separate query and key matrices"
                    )
                kept.append((matrix.weight, matrix.weight.detach().clone()))
                with torch.no_grad():
                    matrix.weight.copy_(shuffled_entries(matrix.weight, seed + 5 * layer, heads if per_head else 1))
        yield
    finally:
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)


@contextmanager
def zeroed_heads(model: nn.Module, heads: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Meanwhile the attention weights of these (layer, head), from 0, are zero behind the softmax.

    Raises UsageError for heads that are not there, UnsupportedModel where heads are not joined by one matrix.
    """
    anatomy = Anatomy.of(model)
    hooks = []
    try:
        for layer, head in sorted(set(heads)):
            if not (0 <= layer < len(anatomy.attentions) and 0 <= head < anatomy.heads):
                raise UsageError(
                    f"heads must be of {len(anatomy.attentions)} layers x {anatomy.heads}, got {layer, head}"
                )
            attention = anatomy.attentions[layer]
            names = ("o_proj", "c_proj", "dense", "out_proj")
            joined = next((getattr(attention, name) for name in names if hasattr(attention, name)), None)
            if joined is None:
                raise UnsupportedModel(f"{type(attention).__name__} has none of {', '.join(names)} behind its heads")

            def zero(_: nn.Module, args: tuple[Any, ...], head: int = head) -> tuple[Any, ...]:
                mixed = args[0].unflatten(-1, (anatomy.heads, -1)).clone()  # (B, n, H, D)
                mixed[..., head, :] = 0  # without weights a head reads nothing
                return (mixed.flatten(-2), *args[1:])

            hooks.append(joined.register_forward_pre_hook(zero))
        yield
    finally:
        for hook in hooks:
            hook.remove()


# what is read

_PREFACE = "Before the meeting, {name} wrote down the following list of words:"
_CUE = "When {she} got back, {she} read the list again:"
_STORY = (
    ("After the meeting, {she} took a break and had a cup of coffee.",),
    ("The kitchen was quiet at that hour, and the machine needed a while to warm up, so {she} waited by the window.",),
    (
        "Outside it had begun to rain, and a neighbour ran across the street with a newspaper over his head.",
        "Somebody had left the radio on, and a man was telling how he had once missed the last train home and walked "
        "along the river until the morning came.",
    ),
    (
        "He had met a baker on that walk, who was on his way to work and who gave him the first bread of the day.",
        "The two of them sat on the steps of the shop, and the baker talked about his brother, who had gone to sea "
        "when he was young and had never learned to swim.",
        "Once, he said, the brother had written a letter from a port in the north, where the ships could not leave "
        "because of the ice, and where the sailors played cards all day.",
    ),
    (
        "In the letter the brother told of an old captain who could not sleep, and told the same story every night.",
        "It was about a lighthouse whose keeper had kept a diary for thirty years, in which every page said nothing "
        "but the weather and the number of ships that had passed.",
        "When the keeper died, his daughter read all of it in one winter, and on the last page she found a sentence "
        "that had nothing to do with the weather.",
        "The captain never said what that sentence was, and the sailors made bets about it, until one of them claimed "
        "to have met the daughter, who kept a small hotel by then and did not like to be asked.",
        "The baker laughed when he came to that part, and the man on the radio laughed too, and said that he had gone "
        "home by the first train, had slept until noon, and had never seen the baker again.",
        "Then there was some music, the rain grew weaker, the machine had long been ready, and the first of the others "
        "came in to ask whether there was any milk left.",
    ),
)
_OTHER_STORY = (
    "Prices of copper rose for the third week in a row, as two mines in the south reported lower output than expected.",
    "The committee will vote on the new tax in spring, and most of its members are said to be against it.",
    "Cells of this type divide twice a day, and their number doubles until there is no more room on the glass.",
    "The second half began with a free kick, which the goalkeeper saved without much trouble.",
)

_CATEGORIES = (
    "dog cat horse cow pig sheep goat lion bear wolf",
    "apple lemon orange banana cherry grape peach pear plum berry",
    "table chair desk bed couch shelf cabinet bench lamp mirror",
    "hammer knife saw drill axe shovel needle scissors wrench rope",
    "car bus train truck bicycle boat ship plane wagon rocket",
    "shirt hat coat dress sock shoe jacket glove belt cap",
    "hand foot knee nose ear mouth finger shoulder neck chest",
    "river lake ocean mountain valley forest desert island beach hill",
    "rain snow wind storm cloud thunder fog ice sun frost",
    "piano guitar violin drum flute trumpet harp organ bell horn",
    "bread cheese butter rice soup cake meat sugar salt egg",
    "doctor teacher farmer lawyer soldier nurse driver judge artist baker",
    "house church castle school hospital bridge tower prison hotel museum",
    "mother father sister brother uncle aunt son daughter cousin wife",
    "gold silver iron copper steel tin lead brass zinc nickel",
    "red blue green yellow black white brown purple pink gray",
    "rose tree grass flower leaf root seed branch moss vine",
    "eagle duck chicken crow turkey owl pigeon goose hawk sparrow",
    "pen paper book letter pencil ink map page card envelope",
    "bottle cup plate bowl spoon fork glass pot basket bucket",
    "king queen prince knight slave duke lord pope monk priest",
    "door window roof wall floor stairs garden kitchen fence chimney",
    "ball game chess dice kite doll puzzle toy bat club",
)


def base_lists(kind: Literal["arbitrary", "semantic"] = "arbitrary") -> list[list[str]]:
    """23 lists of 10 nouns, no noun twice: of one category each, or the same nouns, each of another category."""
    lists = [words.split() for words in _CATEGORIES]
    if kind == "semantic":
        return lists
    return [[lists[(i + 2 * k) % len(lists)][k] for k in range(10)] for i in range(len(lists))]


def story(gap: int, scenario: Scenario = "intact", seed: int = 0) -> tuple[str, str]:
    """Preface, and what stands between the lists with the cue at its end. gap: 1 to 5, from one sentence to many."""
    random = np.random.RandomState(seed)

    def mixed(sentence: str) -> str:
        words = re.findall(r"[\w'’-]+", sentence)
        return " ".join(words[i] for i in random.permutation(len(words))) + sentence[-1]

    name, she = ("John", "he") if scenario == "other subject" else ("Mary", "she")

    def told(sentence: str) -> str:
        return sentence.replace("{name}", name).replace("{she}", she)

    preface, cue = told(_PREFACE), told(_CUE)
    sentences = [told(sentence) for part in _STORY[:gap] for sentence in part]
    if scenario == "scrambled":
        sentences = [mixed(sentences[i]) for i in random.permutation(len(sentences))]
    elif scenario == "incongruent":
        sentences = [_OTHER_STORY[i % len(_OTHER_STORY)] for i in range(len(sentences))]
    elif scenario == "short":
        sentences, cue = [], "And the other:"
    elif scenario == "permuted preface":
        preface = mixed(preface)
    elif scenario == "permuted cue":
        cue = mixed(cue)
    elif scenario == "comma":
        preface, cue = preface[:-1] + ",", cue[:-1] + ","
    return preface, " ".join([*sentences, cue])


@dataclass(frozen=True)
class Trial:
    """The texts of one list: by condition, "Novel" only where there is another list."""

    texts: dict[str, Marked]


@dataclass(frozen=True)
class VerbatimMemory(Configured):
    """Lists of nouns in all rotations, and the surprisal of their words at both readings."""

    length: int = param(10, ge=2, le=10, doc="nouns of a list; the paper has 3, 5, 7 and 10")
    gap: int = param(1, ge=1, le=5, doc="what stands between the lists, from one sentence to a long story")
    kind: Literal["arbitrary", "semantic"] = "arbitrary"
    scenario: Scenario = "intact"

    abstract: ClassVar[bool] = False

    def trials(self) -> list[Trial]:
        """230 trials: 23 base lists in each of their 10 rotations, shorter lists the beginnings of rotated ones."""
        bases = base_lists(self.kind)
        turned = [one for base in bases for one in rotations(base)]
        novel = novel_pairing([j // 10 for j in range(len(turned))])
        first = [one[: self.length] for one in turned]
        return trials_of(first, [first[j] for j in novel], [story(self.gap, self.scenario)] * len(first))

    def surprisals(self, model: Any, tokenizer: Any, trials: Sequence[Trial]) -> list[dict[str, Tensor]]:
        """Per trial and condition the surprisal of every word of the text: (W,) nats, NaN for a first token."""
        texts = [text for trial in trials for text in trial.texts.values()]
        encoded = [tokenizer(text.text, return_offsets_mapping=True) for text in texts]
        scored = surprisals(model, [one["input_ids"] for one in encoded])
        found = iter(
            word_surprisals(loss, torch.tensor(words_of_tokens(one["offset_mapping"], text.spans)), len(text.spans))
            for text, one, loss in zip(texts, encoded, scored, strict=True)
        )
        return [{condition: next(found) for condition in trial.texts} for trial in trials]


def trials_of(
    first: Sequence[Sequence[str]], novel: Sequence[Sequence[str] | None], prose: Sequence[tuple[str, str]]
) -> list[Trial]:
    """Trials of first lists and, where there is one, a novel list each, without a word in common.

    prose: per list its preface, and what stands between the lists with the cue at its end. Raises PromptError for a
    novel list that shares a word.
    """
    trials = []
    lists = zip(first, permuted_lists(first), novel, prose, strict=True)
    for j, (one, changed, other, (preface, between)) in enumerate(lists):
        second = {"Repeated": list(one), "Permuted": changed}
        if other is not None:
            if shared := set(one) & set(other):
                raise PromptError(f"the novel list of list {j + 1} must share no word with it, got {sorted(shared)}")
            second["Novel"] = list(other)
        trials.append(Trial({name: stimulus(preface, one, between, listed) for name, listed in second.items()}))
    return trials


def list_surprisals(surprisal: Tensor, text: Marked, marker: int) -> Tensor:
    """Surprisal of the words of LIST1 or LIST2 by position: (W,) -> (N,)."""
    return surprisal[torch.tensor(text.markers) == marker]
