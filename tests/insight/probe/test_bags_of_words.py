import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqwise.insight.probe.bags_of_words import (
    LEAST_CASES,
    BagsOfWords,
    clamped_scale,
    credit,
    hard_captions,
    hard_images,
    macro_average,
    negclip_loss,
    noun_phrases,
    order_options,
    permute_all_but_nouns_and_adjectives,
    permute_blocks,
    permute_cells,
    permute_columns,
    permute_nouns_and_adjectives,
    permute_rows,
    permute_trigrams,
    permute_within_trigrams,
    permute_words,
    recall_at_k,
    redrawn,
    words_of,
)

WORDS = [
    "a",
    "small",
    "red",
    "dog",
    "quickly",
    "chases",
    "two",
    "black",
    "cats",
    "over",
    "the",
    "old",
    "wooden",
    "fence",
]
TAGS = ["DT", "JJ", "JJ", "NN", "RB", "VBZ", "CD", "JJ", "NNS", "IN", "DT", "JJ", "JJ", "NN"]
words_lists = st.lists(st.sampled_from(["ann", "bob", "cut", "dug"]), max_size=11)
seeds = st.integers(0, 1000)


def rng(seed=0):
    return np.random.default_rng(seed)


# words


@given(seeds)
def test_nouns_and_adjectives_stay_among_themselves(seed):
    found = permute_nouns_and_adjectives(WORDS, TAGS, rng(seed))
    for kind in ("NN", "JJ"):
        places = [i for i, tag in enumerate(TAGS) if tag.startswith(kind)]
        assert Counter(found[i] for i in places) == Counter(WORDS[i] for i in places)
    rest = [i for i, tag in enumerate(TAGS) if tag[:2] not in ("NN", "JJ")]
    assert [found[i] for i in rest] == [WORDS[i] for i in rest]


@given(seeds)
def test_all_but_nouns_and_adjectives(seed):
    found = permute_all_but_nouns_and_adjectives(WORDS, TAGS, rng(seed))
    kept = [i for i, tag in enumerate(TAGS) if tag[:2] in ("NN", "JJ")]
    assert [found[i] for i in kept] == [WORDS[i] for i in kept] and Counter(found) == Counter(WORDS)


@given(words_lists, seeds)
def test_trigrams_are_blocks_from_the_left(words, seed):
    within, blocks = permute_within_trigrams(words, rng(seed)), permute_trigrams(words, rng(seed))
    for i in range(0, len(words), 3):
        assert Counter(within[i : i + 3]) == Counter(words[i : i + 3])
    cut = Counter(tuple(words[i : i + 3]) for i in range(0, len(words), 3))
    options, rest = set(), list(cut.elements())

    def order(left, done):
        if not left:
            options.add(tuple(done))
        for k in {left.index(one) for one in left}:
            order(left[:k] + left[k + 1 :], [*done, *left[k]])

    order(rest, [])
    assert tuple(blocks) in options
    assert Counter(permute_words(words, rng(seed))) == Counter(words)


def test_every_order_is_equally_likely():
    """By the draws of the generator itself, of either kind."""
    counts = Counter(tuple(permute_words("abc", rng(seed))) for seed in range(600))
    assert len(counts) == 6 and min(counts.values()) > 60
    for kind in (np.random.default_rng, np.random.RandomState):
        order = kind(7).permutation(5)
        assert permute_words("vwxyz", kind(7)) == ["vwxyz"[i] for i in order]
    drawn = np.random.RandomState(3)
    nouns, adjectives = drawn.permutation(3), drawn.permutation(5)
    found = permute_nouns_and_adjectives(WORDS, TAGS, np.random.RandomState(3))
    assert [found[i] for i in (3, 8, 13)] == [WORDS[(3, 8, 13)[i]] for i in nouns], "nouns are drawn first"
    assert [found[i] for i in (1, 2, 7, 11, 12)] == [WORDS[(1, 2, 7, 11, 12)[i]] for i in adjectives]


def test_captions_are_lower_case_and_cut():
    assert words_of("A Red  Dog", 2) == ["a", "red"] and len(words_of("w " * 40)) == 30


def test_tags_are_one_per_word():
    with pytest.raises(ValueError, match="tags must be one per word, got 1 for 2 words"):
        permute_nouns_and_adjectives(["a", "b"], ["NN"], rng())


def test_what_stays_as_it_is_is_drawn_again_or_skipped():
    draws = iter([["a", "b"], ["b", "a"], ["c", "c"]])
    assert redrawn(["a", "b"], lambda: next(draws), [["b", "a"]]) == ["c", "c"]
    assert redrawn(["a"], lambda: ["a"]) is None
    assert order_options(["dog"], None, rng()) is None
    assert order_options(["one", "dog", "two", "three", "four", "five"], ["CD", "NN", *["CD"] * 4], rng()) is None, (
        "one noun"
    )


@given(seeds)
def test_options_differ_and_hold_the_same_words(seed):
    options = order_options(WORDS, TAGS, rng(seed))
    assert len(options) == 5 and options[0] == WORDS and len({tuple(one) for one in options}) == 5
    assert all(Counter(one) == Counter(WORDS) for one in options)
    assert len(order_options(WORDS, None, rng(seed))) == 3


# images


@given(st.integers(3, 13), st.integers(3, 13), st.integers(1, 3), st.integers(1, 3), seeds)
def test_blocks_move_and_the_rest_is_lost(H, W, rows, columns, seed):
    image = torch.arange(2 * H * W, dtype=torch.float).view(2, H, W) + 1
    order = torch.as_tensor(rng(seed).permutation(rows * columns))
    found = permute_blocks(image, rows, columns, order)
    h, w = H // rows, W // columns
    expected = torch.zeros_like(image)
    for place, source in enumerate(order.tolist()):
        (r, c), (y, x) = divmod(place, columns), divmod(source, columns)
        block = image[:, y * h : (y + 1) * h, x * w : (x + 1) * w]
        expected[:, r * h : (r + 1) * h, c * w : (c + 1) * w] = block
    assert found.equal(expected)


def test_bands_and_cells_are_one_permutation_for_all_images():
    image = torch.rand(3, 2, 12, 12)
    for permute, cuts in ((permute_rows, (4, 1)), (permute_columns, (1, 4)), (permute_cells, (3, 3))):
        order = torch.as_tensor(rng(5).permutation(cuts[0] * cuts[1]))
        found = permute(image, rng(5))
        assert found.equal(permute_blocks(image, *cuts, order)) and not found.equal(image)
        assert found[1].equal(permute(image[1], rng(5)))


def test_blocks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"rows, columns must be in \[1, 2\], \[1, 3\], got 3, 1"):
        permute_blocks(torch.ones(2, 3), 3, 1, torch.arange(3))
    with pytest.raises(ValueError, match="permutation of 2 blocks"):
        permute_blocks(torch.ones(2, 3), 2, 1, torch.tensor([0, 0]))


# metrics


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.data())
def test_credit_is_shared_whatever_the_order_of_the_options(scores, data):
    true = data.draw(st.integers(0, len(scores) - 1))
    found = float(credit(torch.tensor(scores, dtype=torch.float), true))
    highest = max(scores)
    assert found == pytest.approx((scores[true] == highest) / scores.count(highest))
    order = data.draw(st.permutations(range(len(scores))))
    moved = torch.tensor([scores[i] for i in order], dtype=torch.float)
    assert float(credit(moved, order.index(true))) == found


def test_a_bag_of_words_gets_chance():
    """A mean of word vectors, in whatever order they are added up."""
    torch.manual_seed(0)
    table = {word: torch.randn(64) for word in WORDS}
    image = torch.randn(64)

    def bag(image, texts):
        return torch.stack([torch.stack([table[w] for w in text.split()]).mean(0) @ image for text in texts])

    found = BagsOfWords(tolerance=1e-5).order(bag, [image] * 4, [" ".join(WORDS)] * 4, [TAGS] * 4, rng())
    assert found.credits == (0.2,) * 4 and found.mean == pytest.approx(0.2) and found.skipped == 0
    true, false = "the red dog chases the cats", "the cats chases the red dog"
    table |= {word: torch.randn(64) for word in ["the", "dog", "red", "chases", "cats"]}
    assert BagsOfWords(tolerance=1e-5).pairs(bag, [image], [true], [false]).credits == (0.5,)


def test_a_reader_gets_all_and_unfair_captions_are_skipped():
    captions = [" ".join(WORDS).upper(), "Dog"]
    found = BagsOfWords().order(
        lambda image, texts: torch.tensor([float(text == image) for text in texts]),
        [" ".join(WORDS), "dog"], captions, [TAGS, ["NN"]], rng(),
    )  # fmt: skip
    assert found.credits == (1.0,) and found.skipped == 1
    none = BagsOfWords().order(lambda *a: 1 / 0, [None], ["dog"], None, rng())
    assert none.credits == () and math.isnan(none.mean)
    with pytest.raises(ValueError, match=r"BagsOfWords\.most must be"):
        BagsOfWords(most=1)


def test_macro_average_weighs_groups_alike_and_drops_small_ones():
    credits, groups = [1.0, 1.0, 1.0, 0.0, 0.5], ["a", "a", "a", "b", "c"]
    mean, means = macro_average(credits, groups)
    assert mean == pytest.approx(0.5) and means == {"a": 1.0, "b": 0.0, "c": 0.5}
    assert macro_average(credits, groups, least=2) == (1.0, {"a": 1.0}) and LEAST_CASES == 25
    assert math.isnan(macro_average(credits, groups, least=4)[0])
    with pytest.raises(ValueError, match="groups must be one per case, got 1 for 2"):
        macro_average([1, 1], ["a"])


def test_recall_counts_queries_with_a_match_among_the_first():
    similarity = torch.tensor([[0.1, 0.9, 0.5], [0.4, 0.4, 0.4], [0.3, 0.2, 0.1]])
    matches = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 1, 0]], dtype=torch.bool)
    assert [recall_at_k(similarity, matches, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 1, 1])
    with pytest.raises(ValueError, match=r"k must be in \[1, 3\], got 4"):
        recall_at_k(similarity, matches, 4)


# NegCLIP


@given(st.integers(1, 5), st.integers(0, 7), seeds)
def test_the_loss_is_the_mean_of_both_directions(n, more, seed):
    g = torch.Generator().manual_seed(seed)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(k, 6, generator=g, dtype=torch.double), dim=-1) for k in (n, n + more)
    )
    tau, total = 7.0, 0.0
    for a in range(n):
        row = [math.exp(tau * float(images[a] @ texts[b])) for b in range(n + more)]
        column = [math.exp(tau * float(texts[a] @ images[b])) for b in range(n)]
        total -= math.log(row[a] / sum(row)) + math.log(column[a] / sum(column))
    assert float(negclip_loss(images, texts, tau)) == pytest.approx(total / (2 * n), abs=1e-9)


def test_hard_captions_have_no_row_of_their_own():
    images, texts = torch.eye(3), torch.eye(3)
    loss = float(negclip_loss(images, texts, 5.0))
    far = torch.cat([texts, -texts])  # columns far from every image cost almost nothing
    assert float(negclip_loss(images, far, 5.0)) == pytest.approx(loss, abs=0.02)
    assert float(negclip_loss(images, torch.cat([texts, texts]), 5.0)) > loss + 0.3
    with pytest.raises(ValueError, match="at least as many as images, 3, got 2"):
        negclip_loss(images, texts[:2], 1.0)


def test_the_scale_stays_between_one_and_a_hundred():
    assert clamped_scale(torch.tensor([-3.0, 0.0, 2.0, 9.0])).tolist() == pytest.approx([1, 1, math.exp(2), 100])


def test_noun_phrases_are_runs_that_end_with_a_noun():
    assert [WORDS[a:b] for a, b in noun_phrases(TAGS)] == [
        ["small", "red", "dog"], ["black", "cats"], ["old", "wooden", "fence"],
    ]  # fmt: skip
    assert noun_phrases(["NN", "JJ"]) == [(0, 1)] and noun_phrases(["JJ"]) == [] and noun_phrases([]) == []


def test_hard_captions_swap_two_of_a_kind():
    kinds = Counter()
    for seed in range(60):
        found = hard_captions(WORDS, TAGS, rng(seed))
        assert len(found) == 3, "nouns, adjectives, noun phrases; one adverb and one verb have no partner"
        for one in found:
            assert Counter(one) == Counter(WORDS) and one != WORDS
        places = [[i for i in range(len(WORDS)) if one[i] != WORDS[i]] for one in found[:2]]
        for where, kind in zip(places, ("NN", "JJ"), strict=True):
            assert len(where) == 2 and all(TAGS[i].startswith(kind) for i in where)
            kinds[kind, tuple(where)] += 1
    assert len([key for key in kinds if key[0] == "NN"]) == 3 and len([key for key in kinds if key[0] == "JJ"]) == 10
    words, tags = ["a", "cat", "and", "a", "cat"], ["DT", "NN", "CC", "DT", "NN"]
    assert hard_captions(words, tags, rng()) == [], "equal words give the caption itself"


def test_phrases_of_different_length_change_places():
    words, tags = ["the", "red", "dog", "sees", "cats"], ["DT", "JJ", "NN", "VBZ", "NNS"]
    assert ["the", "cats", "sees", "red", "dog"] in hard_captions(words, tags, rng())


def test_hard_images_are_the_nearest_others():
    torch.manual_seed(0)
    features = torch.randn(17, 5)
    cosine = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1).fill_diagonal_(-2)
    for block in (4, 100):
        assert hard_images(features, 3, block).equal(cosine.topk(3).indices)
    assert hard_images(torch.ones(4, 2), 2).tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]
    with pytest.raises(ValueError, match=r"k must be in \[1, 16\], got 17"):
        hard_images(features, 17)
