import math
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import seqwise.insight.probe.sequence_order_recall as sort
from seqwise.core.errors import PromptError
from seqwise.insight.probe.sequence_order_recall import (
    PREFIX,
    SequenceOrderRecall,
    answer_logps,
    ask,
    book_edges,
    choice,
    counterbalanced,
    draw_excerpts,
    draw_items,
    draw_pair,
    label_logps,
    label_spellings,
    occurrences,
    recall,
    sentence_starts,
    sort_items,
    uniform_p,
)
from seqwise.lab.zoo import load_model

NONE = -math.inf


# items


@given(
    excerpt=st.integers(21, 90), segment=st.integers(1, 7), n=st.integers(1, 9), seed=st.integers(0, 9),
    edges=st.lists(st.integers(0, 60), min_size=2, max_size=4, unique=True),
)  # fmt: skip
def test_items_are_as_the_paper_says(excerpt, segment, n, seed, edges):
    edges, X = sorted(edges), np.arange(1_000) * 3
    if edges[-2] >= excerpt - segment - 1:
        with pytest.raises(ValueError, match="edges: each bin must begin below"):
            draw_items(len(X), excerpt, segment, edges, n, seed, extra=2 + n % 2)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        items = draw_items(len(X), excerpt, segment, edges, n, seed, extra=2 + n % 2)
    m = len(edges) - 1
    assert items.starts.shape == (n,) and items.shown.shape == (m, n, 2) and items.answers.shape == (m, n)
    assert (items.starts >= 0).all() and (items.starts <= len(X) - excerpt - 1).all()
    for b in range(m):
        assert (items.distances[b] > edges[b]).all() and (items.distances[b] <= edges[b + 1]).all()
        for k in range(n):
            excerpted = items.excerpt_of(X, k)
            first, second = items.segments_of(X, b, k)
            places = [int(np.flatnonzero(excerpted == one[0])[0]) for one in (first, second)]
            assert len(excerpted) == excerpt and len(first) == len(second) == segment
            assert items.answers[b, k] == int(np.argmin(places)), "0 where the one shown first is the earlier one"
            assert all((excerpted[p : p + segment] == s).all() for p, s in zip(places, (first, second), strict=True))
    assert items.unambiguous(X).all()


def test_answers_are_balanced_before_spares_are_dropped():
    items = draw_items(5_000, 60, 5, (5, 20, 40), 80, 0, extra=0)
    assert (items.answers.mean(-1) == 0.5).all() and items.chance == 0.5
    dropped = draw_items(5_000, 60, 5, (5, 20, 40), 41, 0, extra=39)
    assert dropped.chance == max(dropped.answers.mean(), 1 - dropped.answers.mean()) > 0.5
    assert (items.answers[0] != items.answers[1]).any(), "each bin has a permutation of its own"


def test_the_seed_decides_everything():
    one, two, other = (draw_items(900, 50, 4, (4, 9, 30), 10, seed, extra=4) for seed in (3, 3, 4))
    assert (one.shown == two.shown).all() and (one.starts == two.starts).all()
    assert (one.starts != other.starts).any()


def test_pairs_are_drawn_as_by_redrawing():
    """Against a loop that draws i until it has a partner, then j among its partners."""
    places, left, right, draws = np.array([0, 3, 4, 11, 12, 30, 31]), 2, 9, 20_000
    rng = np.random.default_rng(0)
    for closed in (True, False):
        most = right if closed else right - 1
        partners = {i: [j for j in places if left < abs(i - j) <= most] for i in places}
        able = [i for i in places if partners[i]]
        exact = {(i, j): 1 / len(able) / len(partners[i]) for i in able for j in partners[i]}
        drawn = [draw_pair(places, left, right, rng, closed=closed) for _ in range(draws)]
        assert set(drawn) == set(exact)
        for pair, p in exact.items():
            assert drawn.count(pair) / draws == pytest.approx(p, abs=4 * (p / draws) ** 0.5)
        assert 30 not in able and ((3, 12) in exact) == closed
    assert draw_pair(np.array([0, 1, 2]), 5, 9, rng) is None
    assert draw_pair(np.array([5]), 0, 9, rng) is None


def test_a_distance_at_the_end_of_the_bin_counts_only_without_sentences():
    rng = np.random.default_rng(0)
    assert draw_pair(np.array([0, 9]), 2, 9, rng) is not None
    assert draw_pair(np.array([0, 9]), 2, 9, rng, closed=False) is None
    assert draw_pair(np.array([0, 2]), 2, 9, rng) is None


def test_excerpts_are_drawn_anew_until_they_are_uniform(monkeypatch):
    said = iter([0.01, 0.05, 0.06])
    monkeypatch.setattr(sort, "uniform_p", lambda values, high: next(said))
    found = draw_excerpts(100, 10, 7, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    third = [rng.integers(0, 90, 7) for _ in range(3)][2]
    assert (found == third).all(), "the starts of the draw that passed, and no others"
    monkeypatch.setattr(sort, "uniform_p", lambda values, high: 0.05)
    with pytest.raises(ValueError, match="not uniform in 100 draws"):
        draw_excerpts(100, 10, 7, np.random.default_rng(5))


def test_excerpts_without_a_pair_leave_all_bins():
    """Sentences of 10 words, but one stretch has none: excerpts there have no pair."""
    sentences = np.array([i for i in range(0, 3_000, 10) if not 500 < i < 1_500])
    items = draw_items(3_000, 60, 5, (5, 15, 45), 30, 1, extra=50, sentences=sentences)
    assert set(items.starts) <= set(sentences) and (items.starts != 500).all()
    assert ((items.starts[:, None] + items.shown) % 10 == 0).all()
    assert (items.distances < np.array([[15], [45]])).all() and (items.distances > np.array([[5], [15]])).all()
    with pytest.raises(ValueError, match="fewer than n = 30"):
        draw_items(3_000, 60, 5, (5, 15, 45), 30, 1, extra=50, sentences=np.array([0]))


def test_an_excerpt_moves_back_to_its_sentence_and_keeps_its_length():
    sentences = np.arange(0, 2_000, 7)
    plain = draw_excerpts(2_000, 50, 14, np.random.default_rng(2))
    items = draw_items(2_000, 50, 4, (4, 40), 14, 2, extra=0, sentences=sentences)
    assert (items.starts == plain // 7 * 7).all()
    assert len(items.excerpt_of(range(2_000), 0)) == 50


def test_segments_shown_first_must_be_spread(monkeypatch):
    kwargs = {"length": 4_000, "excerpt": 100, "segment": 5, "n": 100}
    with pytest.raises(ValueError, match="do not start uniformly"):
        sort_items(edges=(85, 92), seed=0, **kwargs)  # only the ends have partners so far away
    passed = sort_items(edges=(5, 20, 40), seed=0, **kwargs)
    assert uniform_p(passed.shown[..., 0].ravel(), 95) > 0.05
    seen = []
    monkeypatch.setattr(sort, "uniform_p", lambda values, high: seen.append((len(values), high)) or 1.0)
    sort_items(edges=(5, 20, 40), seed=0, **kwargs)
    assert seen == [(150, 0.975), (200, 95)], "all excerpts, spares included; then the kept items of all bins"


@pytest.mark.parametrize("n", [5, 40, 333])
def test_uniform_p_is_the_kolmogorov_smirnov_test(n):
    scipy = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(n)
    for stretch in (1.0, 0.9, 0.7):
        values = rng.random(n) * stretch * 12.0
        assert uniform_p(values, 12.0) == pytest.approx(scipy.kstest(values / 12.0, "uniform").pvalue, abs=0.015)
    assert uniform_p((np.arange(n) + 0.5) / n, 1.0) == 1.0
    assert uniform_p(np.full(n, 2.0), 1.0) < 1e-3, "values beyond the range"


def test_bins_of_book_sort():
    assert book_edges(250, 20) == (20, 62, 83, 125, 200)
    assert book_edges(2500, 50) == (50, 625, 833, 1250, 2000)
    assert book_edges(10000, 50) == (50, 1000, 2500, 5000, 8000)


def test_sentences_begin_after_their_marks():
    words = "He met Mr. Smith; then U.S.A today. Why? Dr. No! said so. End."
    assert sentence_starts(words.split()).tolist() == [0, 4, 6, 7, 8, 10, 12]
    assert sentence_starts(["One"]).tolist() == [0]


@pytest.mark.parametrize(
    "change, told",
    [
        ({"segment": 0}, r"segment must be in \[1, excerpt - 1\] = \[1, 49\], got 0"),
        ({"segment": 50}, "segment must be in"),
        ({"n": 11}, "even sum, got 11 and 4"),
        ({"n": 0}, "n >= 1"),
        ({"edges": (5,)}, "at least two ascending"),
        ({"edges": (9, 5)}, "at least two ascending"),
        ({"edges": (5, 45, 48)}, "must begin below excerpt - segment - 1 = 45"),
        ({"length": 50}, "length must be > excerpt = 50, got 50"),
        ({"length": 52}, "must exceed excerpt = 50 by more"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, told):
    given = {"length": 500, "excerpt": 50, "segment": 4, "edges": (4, 20), "n": 10, "seed": 0, "extra": 4}
    with pytest.raises(ValueError, match=told):
        draw_items(**{**given, **change})


def test_a_bin_may_end_beyond_the_reach_and_overlaps_warn():
    assert (draw_items(500, 50, 4, (4, 44, 900), 4, 0, extra=40).distances[1] == 45).all()
    with pytest.warns(UserWarning, match="distances from 3 on let segments of 4 overlap"):
        draw_items(500, 50, 4, (2, 20), 4, 0, extra=2)


def test_repeats_make_an_item_ambiguous():
    assert occurrences(list("abcabcab"), list("abc")) == 2 and occurrences([1, 1, 1, 1], [1, 1]) == 3
    assert occurrences(np.array([[1, 2], [3, 4], [1, 2]]), np.array([[1, 2]])) == 2
    assert occurrences(["a"], ["a", "b"]) == 0
    X = np.arange(300)
    X[::2] = -1
    items = draw_items(300, 40, 1, (1, 30), 20, 0, extra=0)
    places = items.starts[None, :, None] + items.shown
    assert (items.unambiguous(X) == (places % 2 == 1).all(-1)).all()


# scores


@given(st.lists(st.floats(-20, 0), min_size=6, max_size=6), st.lists(st.booleans(), min_size=6, max_size=6))
def test_label_logps_add_up_spellings_or_take_the_first(values, live):
    logps = torch.tensor([v if ok else NONE for v, ok in zip(values, live, strict=True)], dtype=torch.double)
    spellings = ((4, 1), (2, 5, 0))
    added, first = (label_logps(logps, spellings, rule) for rule in ("logsumexp", "first"))
    for i, ids in enumerate(spellings):
        there = [float(logps[j]) for j in ids if logps[j] > NONE]
        total = math.log(sum(map(math.exp, there))) if there else NONE
        assert float(added[i]) == pytest.approx(total, abs=1e-9)
        assert float(first[i]) == (there[0] if there else NONE)


def test_only_the_first_spelling_counts_even_if_another_is_likelier():
    logps = torch.tensor([0.05, 0.4, 0.3, 0.25]).log()
    spellings = ((0, 1), (2,))  # 0.05 + 0.4 against 0.3
    assert choice(label_logps(logps, spellings)) == 0
    assert choice(label_logps(logps, spellings, "first")) == 1


def test_no_answer_is_wrong_and_ties_go_to_a():
    logps = torch.tensor([[-1.0, -2.0], [-2.0, -1.0], [-1.0, -1.0], [NONE, NONE], [NONE, -9.0]])
    assert choice(logps).tolist() == [0, 1, 0, -1, 1]
    found = recall(choice(logps), torch.tensor([0, 0, 0, 1, 1]))
    assert (float(found.accuracy), float(found.a_rate), float(found.chance)) == pytest.approx((0.6, 0.4, 0.6))


def test_recall_is_per_bin():
    found = recall(torch.tensor([[0, 1, 1], [0, 0, -1]]), torch.tensor([[0, 1, 0], [1, 1, 1]]))
    assert found.accuracy.tolist() == pytest.approx([2 / 3, 0]) and found.a_rate.tolist() == pytest.approx(
        [1 / 3, 2 / 3]
    )
    assert found.chance.tolist() == pytest.approx([2 / 3, 1])


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_a_habit_cancels_over_both_orders(habit, belief):
    """An oracle of the order whose log-odds also hold a constant for A."""
    one, two = torch.tensor([habit + belief, 0.0]), torch.tensor([habit - belief, 0.0])
    assert float(counterbalanced(one, two)) == pytest.approx(belief, abs=1e-5)
    assert float(counterbalanced(two, one)) == pytest.approx(-belief, abs=1e-5)


def test_oracles_score_as_they_should():
    X = np.random.default_rng(0).permutation(4_000)
    items = draw_items(len(X), 80, 3, (3, 20, 60), 300, 1, extra=0)
    searched, guessed = np.zeros((2, 300), dtype=int), np.zeros((2, 300), dtype=int)
    for b in range(2):
        for k in range(300):
            excerpt = list(items.excerpt_of(X, k))
            first, second = items.segments_of(X, b, k)
            searched[b, k] = int(excerpt.index(first[0]) > excerpt.index(second[0]))
            guessed[b, k] = int(first[0] > second[0])  # the segments alone
    answers = torch.from_numpy(items.answers)
    assert (recall(torch.from_numpy(searched), answers).accuracy == 1).all()
    assert abs(float(recall(torch.from_numpy(guessed), answers).accuracy.mean()) - 0.5) < 3 * 0.5 / 600**0.5


# models


class Words:
    """A tokenizer of whole words with their blank before them, or with blanks as tokens of their own."""

    def __init__(self, blanks):
        self.blanks, self.table = blanks, []

    def encode(self, text, add_special_tokens=True):
        found = []
        for piece in re.findall(r" |[^ ]+" if self.blanks else r" ?[^ ]+", text):
            if piece not in self.table:
                self.table.append(piece)
            found.append(self.table.index(piece))
        return found

    def decode(self, ids):
        return "".join(self.table[i] for i in ([ids] if isinstance(ids, int) else ids))


def test_labels_follow_the_tokenizer_s_blanks():
    glued, apart = Words(False), Words(True)
    tail, spellings = label_spellings(glued)
    assert tail == "" and [[glued.decode(i) for i in ids] for ids in spellings] == [["A", " A"], ["B", " B"]]
    tail, spellings = label_spellings(apart)
    assert tail == " " and [[apart.decode(i) for i in ids] for ids in spellings] == [["A"], ["B"]]


@pytest.fixture(scope="module")
def tiny(byte_llama):
    return load_model(byte_llama(num_hidden_layers=2, max_position_embeddings=500, initializer_range=0.3))


def test_a_model_is_asked_for_the_labels_after_the_prefix(tiny):
    model, tokenizer = tiny
    questions = [ask("one", "two", "zero one two"), ask("a longer one", "two")]
    found = answer_logps(model, tokenizer, questions)
    for row, one in zip(found, questions, strict=True):
        text = sort.SYSTEM + "\n\n" + one.excerpt + "".join(one.segments) + one.question + "\n" + PREFIX + " "
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            logps = model(ids).logits[0, -1].log_softmax(-1)
        expected = [logps[tokenizer.encode(label)[0]] for label in "AB"]
        torch.testing.assert_close(row, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert "Segment A: one" in questions[0].segments[0] and "Segment B: two" in questions[0].segments[1]
    assert questions[1].excerpt == "" and "zero one two" in questions[0].excerpt


def test_a_prompt_that_is_too_long_is_refused_and_never_cut(tiny):
    with pytest.raises(PromptError, match="more than the model's 500 positions"):
        answer_logps(*tiny, [ask("one", "two", "word " * 120)])


def test_swapped_segments_swap_the_labels_of_a_blind_model(tiny, monkeypatch):
    """A model that knows segments but not letters: its log-odds change sign."""
    known = {"one": 0.2, "two": 0.7}

    def blind(model, tokenizer, questions):
        shown = [[s.split(": ")[1].strip() for s in q.segments] for q in questions]
        return torch.tensor([[known[a], known[b]] for a, b in shown]).log()

    first, second = blind(*tiny, [ask("one", "two")]), blind(*tiny, [ask("two", "one")])
    assert first.equal(second.flip(-1)) and float(counterbalanced(first, second)) == pytest.approx(math.log(0.2 / 0.7))


def test_measures_with_and_without_the_excerpt(tiny, monkeypatch):
    words = [f"w{i}." for i in range(4_000)]
    seen = []

    def oracle(model, tokenizer, questions):
        seen.extend(questions)
        found = []
        for q in questions:
            a, b = (q.excerpt.find(s.split(": ")[1].split()[0]) for s in q.segments)
            found.append([0.0, -1.0] if a <= b else [-1.0, 0.0])  # without the excerpt always A
        return torch.tensor(found)

    monkeypatch.setattr(sort, "answer_logps", oracle)
    memory = SequenceOrderRecall(excerpt=60, segment=5).measure(*tiny, " ".join(words), n=7, seed=2)
    assert memory.in_context.shape == memory.without.shape == (4, 7, 2) and len(seen) == 56
    assert (recall(choice(memory.in_context), memory.answers).accuracy == 1).all()
    found = recall(choice(memory.without), memory.answers)
    assert (found.a_rate == 1).all() and torch.allclose(memory.gain, 1 - found.accuracy)


@pytest.mark.parametrize("fields", [{"excerpt": 1}, {"segment": 0}])
def test_fields_have_ranges(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"SequenceOrderRecall.{name} must be .*{value}"):
        SequenceOrderRecall(**fields)
