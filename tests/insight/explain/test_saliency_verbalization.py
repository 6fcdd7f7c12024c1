import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqwise.core.attribution import Attribution, Span
from seqwise.core.errors import UsageError
from seqwise.insight.explain.saliency_verbalization import (
    NOTHING,
    SaliencyVerbalization,
    best_first,
    cited,
    convolution_filters,
    coverage,
    coverage_at_k,
    instruction,
    normalise,
    search,
    span_filters,
    summary_spans,
    template,
    threshold,
)


def draw(n, seed=0, shift=0.0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def mask(n, *members):
    return torch.isin(torch.arange(n), torch.tensor(members))


def naive_search(b, filters, tau, last_window=True):
    """Plain loops over windows and filters."""
    b, L = b.tolist(), filters.shape[1]
    found = set()
    for f in filters.tolist():
        for s in range(len(b) - L + last_window):
            values = [b[s + i] for i in range(L) if f[i]]
            if min(values) >= 0 and sum(values) / len(values) > tau:
                found.add(tuple(s + i for i in range(L) if f[i]))
    return found


def naive_summary(a, found, top=5, quantile=0.75):
    a = a.tolist()
    mass = sum(max(x, 0) for x in a)

    def cov(members):
        return max(0.0, sum(a[i] for i in members) / mass)

    union = set()
    for sets in (*found, {(i,) for i in range(len(a)) if a[i] > 0}):
        union |= set(itertools.chain(*sorted(sorted(sets), key=lambda s: -cov(s))[:top]))
    runs = []
    for i in sorted(union):
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    q = np.quantile([cov(run) for run in runs], quantile)
    return [(r[0], r[-1] + 1) for r in sorted(runs, key=lambda r: -cov(r)) if cov(r) >= q - 1e-12]


def as_set(found):
    return {tuple(row.nonzero()[:, 0].tolist()) for row in found}


# formulas


def test_filters():
    assert convolution_filters(5).shape == (20, 5) and set(convolution_filters(5).sum(1).tolist()) == {2, 3}
    assert len(convolution_filters(5).unique(dim=0)) == 20
    assert span_filters(5).int().tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert span_filters(7).sum(1).tolist() == [3, 5, 7] and span_filters(4).int().tolist() == [[1, 1, 1, 0]]
    assert [len(convolution_filters(L)) for L in (4, 6, 8)] == [6, 15 + 20 + 15, 28 + 56 + 70 + 56 + 28]


def test_coverage_of_all_positive_is_one_and_of_negative_is_zero():
    a = torch.tensor([1.0, -2.0, 3.0, 0.0])
    sets = torch.stack([a > 0, a < 0, mask(4, 2), mask(4, 1, 2)])
    assert coverage(a, sets).tolist() == [1.0, 0.0, 0.75, 0.25]
    assert coverage(-a.abs(), sets).tolist() == [0.0] * 4, "no positive mass is no NaN"


def test_official_coverage_forgets_the_last_token_and_counts_the_range():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    sets = torch.stack([mask(4, 1), mask(4, 1, 2), mask(4, 0, 3)])
    assert coverage(a, sets, official=True).tolist() == pytest.approx([0.0, 0.2, 0.6])


def test_normalise_is_by_the_signed_maximum():
    assert normalise(torch.tensor([2.0, -4.0])).tolist() == [1.0, -2.0]
    assert normalise(torch.tensor([-2.0, -4.0])).tolist() == [-1.0, -2.0]
    assert normalise(torch.tensor([0.0, -4.0])).tolist() == [0.0, 0.0]


def test_thresholds():
    b = draw(13)
    ordered = sorted(b.tolist(), reverse=True)
    assert threshold(b).item() == pytest.approx(sum(ordered[:5]) / 5), "int(13 * 0.4) = 5"
    assert threshold(b, "mean", 0.01).item() == ordered[0], "at least one token"
    assert threshold(b, "mean", 1.0).item() == pytest.approx(b.mean().item())
    assert threshold(b, "quantile", 3).item() == pytest.approx(3 * np.std(b.numpy()))
    assert threshold(b, "variance", 2).item() == pytest.approx(2 * np.var(b.numpy()))
    with pytest.raises(ValueError, match="kind must be 'mean', 'quantile' or 'variance', got 'median'"):
        threshold(b, "median")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 999), st.sampled_from([4, 5, 7]), st.booleans(), st.floats(-0.2, 0.9))
def test_search_equals_plain_loops(n, seed, L, last_window, tau):
    b = normalise(draw(n, seed, 0.5))
    for filters in (convolution_filters(L), span_filters(L)):
        found = search(b, filters, tau, last_window=last_window)
        assert as_set(found) == naive_search(b, filters, tau, last_window)
        assert len(found) == len(as_set(found)), "each set once"
        assert not (found & (b < 0)).any()
        assert ((found * b).sum(-1) / found.sum(-1).clamp(min=1) > tau - 1e-12).all()


def test_the_last_window_counts_unless_the_official_range_is_asked_for():
    b = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 1])
    assert mask(8, 6, 7).tolist() in search(b, convolution_filters(), 0.9).tolist()
    assert not len(search(b, convolution_filters(), 0.9, last_window=False))
    assert search(torch.ones(4), convolution_filters(), 0.0).shape == (0, 4), "no windows"
    assert search(torch.ones(5), span_filters(), 0.0, last_window=False).shape == (0, 5)


def test_the_threshold_is_strict_and_zeros_may_stand_beside():
    b = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0])
    assert as_set(search(b, span_filters(), 0.6)) == {(1, 2, 3)}
    assert as_set(search(b, span_filters(), 0.59)) == {(1, 2, 3), (0, 1, 2, 3, 4)}
    b[0] = -0.1
    assert as_set(search(b, span_filters(), 0.1)) == {(1, 2, 3)}, "a negative member, though it is outside 01110"


def test_negative_search_mirrors_the_positive_one_and_ignores_filter_zeros():
    b = draw(23, 4, 0.3)
    for filters in (convolution_filters(), span_filters()):
        assert as_set(search(-b, filters, 0.2, "-")) == as_set(search(b, filters, 0.2)) != set()
    lone = torch.tensor([5.0, -1.0, -1.0, -1.0, 5.0])
    assert as_set(search(lone, span_filters(), 0.5, "-")) == {(1, 2, 3)}


def test_best_first_is_stable():
    a = torch.tensor([1.0, 2.0, 1.0, 2.0])
    order, cov = best_first(a, torch.eye(4, dtype=torch.bool))
    assert order.tolist() == [1, 3, 0, 2] and cov.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 6, 1 / 6])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(5, 40), st.integers(0, 999), st.sampled_from(["mean", "quantile"]), st.sampled_from([0.0, 0.75, 1.0])
)
def test_summary_spans_equal_the_plain_definition(n, seed, kind, quantile):
    a = draw(n, seed, 0.3)
    b = normalise(a)
    tau = threshold(b, kind, {"mean": 0.4, "quantile": 1.0}[kind])
    found = [search(b, filters, tau) for filters in (convolution_filters(), span_filters())]
    spans, cov = summary_spans(a, found, quantile=quantile)
    assert [tuple(s) for s in spans.tolist()] == naive_summary(a, [as_set(sets) for sets in found], quantile=quantile)
    mass = a.clamp(min=0).sum()
    assert cov.tolist() == pytest.approx([max(0, float(a[i:j].sum() / mass)) for i, j in spans.tolist()])
    scaled, _ = summary_spans(3.7 * a, found, quantile=quantile)
    assert scaled.equal(spans)


def test_single_tokens_win_by_score_but_officially_by_place():
    a = torch.tensor([0.1] * 7 + [5.0] + [0.1] * 2)
    spans, _ = summary_spans(a, [], top=1)
    assert spans.tolist() == [[7, 8]]
    spans, _ = summary_spans(a, [], top=5, official=True)
    assert spans.tolist() == [[0, 5]]


def test_single_tokens_that_speak_against_are_left_out():
    a = torch.tensor([1.0, -1.0, 1.0])
    assert summary_spans(a, [], quantile=0.0)[0].tolist() == [[0, 1], [2, 3]]


def test_template():
    assert template([["good"]]) == "The word » good « is most important for the prediction"
    assert (
        template([["not", "bad"], ["at", "all", "."], ["fun"]], [0.536, 0.2, 0.1])
        == "The phrase » not bad « (54 %) is most important for the prediction. "
        "The span » at all . « (20 %) is also salient. The word » fun « (10 %) is also salient"
    )
    assert template([]) == NOTHING


def test_instruction_has_every_word_with_two_decimals():
    text = instruction(["So", "good"], [0.126, -1.0], "positive", "movie review", "sentiment analyzer")
    assert "So (0.13) good (-1.00)" in text and "movie review" in text
    assert "sentiment analyzer predicted 'positive'" in text and "Explain" in text
    assert "Name the words" in instruction(["a"], [1], "x", name_words=True)


def test_cited_words():
    words = ["The", "film", "is", "not", "bad", ",", "don't", "U.S.", "."]
    say = cited("The phrase » Not bad « is most important. The span » U.S. . « is also salient", words)
    assert [w for w, c in zip(words, say.tolist(), strict=True) if c] == ["not", "bad", "U.S.", "."]
    for text in ('The words "film" and "Bad," matter.', "The words ‘film’ and 'bad' matter, film's don't count."):
        assert [w for w, c in zip(words, cited(text, words).tolist(), strict=True) if c] == ["film", "bad"]
    assert [w for w, c in zip(words, cited("Mostly punctuation.", words).tolist(), strict=True) if c] == [",", "."]
    assert not cited("film, not bad", words).any(), "words that are not quoted are not cited"


def test_coverage_at_k():
    a = torch.tensor([3.0, -1.0, 4.0, 1.004, 2.0])
    held = coverage_at_k(a, mask(5, 0, 3), k=4)
    assert held.tolist() == pytest.approx([0.0, 0.3, 0.3, 0.4]), "1.004 is 1.00"
    everything = coverage_at_k(a, torch.ones(5, dtype=torch.bool), k=8)
    assert everything.tolist() == pytest.approx([0.4, 0.7, 0.9, 1, 1, 1, 1, 1])
    assert coverage_at_k(-a.abs(), mask(5, 0), 3).tolist() == [0, 0, 0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 12))
def test_citing_more_of_the_best_never_holds_less(seed, k):
    a, g = draw(12, seed), torch.Generator().manual_seed(seed)
    more = torch.rand(12, generator=g) < 0.5
    fewer = more & (torch.rand(12, generator=g) < 0.5)
    assert (coverage_at_k(a, more, k) >= coverage_at_k(a, fewer, k)).all()


# the verbalizer


@pytest.mark.parametrize("bump, least", [(2, 0.75), (3, 0.95), (4, 0.99)])
def test_a_planted_phrase_is_found(bump, least):
    hits = 0
    for seed in range(100):
        a = draw(40, seed)
        start = seed % 38
        a[start : start + 3] += bump
        first, stop = SaliencyVerbalization().verbalize_scores(a, [f"w{i}" for i in range(40)]).spans[0]
        hits += first <= start and start + 3 <= stop
    assert hits >= 100 * least


def test_says_what_it_found():
    words = ["this", "film", "is", "not", "bad", "at", "all", "I", "said", "yesterday"]
    a = [0.0, 0.2, 0.1, 2.0, 3.0, 1.0, 0.5, -1.0, -0.2, 0.1]
    said = SaliencyVerbalization(percent=True, value=0.7).verbalize_scores(a, words, "good")
    assert said.target == "good" and "this" not in said.words and said.inputs[0] == 1
    first = said.words[said.spans[0][0] : said.spans[0][1]]
    assert {"not", "bad", "at"} <= set(first)
    assert said.text.startswith(f"The phrase » {' '.join(first)} « ({100 * said.coverages[0]:.0f} %) is most")
    assert said.coverages[0] == pytest.approx(sum(said.scores[slice(*said.spans[0])]) / sum(x for x in a if x > 0))
    assert said.note == "" and set(said.searches) == {"convolution", "span", "both", "total"}
    assert [said.words[i] for (i,), _ in said.searches["total"]] == ["bad", "not", "at", "all", "film"]
    assert all(len(sets) <= 5 for sets in said.searches.values())
    shares = [share for _, share in said.searches["convolution"]]
    assert shares == sorted(shares, reverse=True) and len(shares) == 5
    one, two = (dict(said.searches[name]) for name in ("both", "span"))
    assert one and set(one) <= set(two)


def test_both_are_the_sets_of_both_searches():
    a = draw(30, 2, 0.4)
    said = SaliencyVerbalization(top=99, value=0.9).verbalize_scores(a, [str(i) for i in range(30)])
    sets = {name: {members for members, _ in found} for name, found in said.searches.items()}
    assert sets["both"] == sets["convolution"] & sets["span"] != set()


@pytest.mark.parametrize("a", [[-1.0, -2.0, -0.5], [0.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
def test_nothing_positive_is_said_and_is_no_nan(a):
    said = SaliencyVerbalization().verbalize_scores(a, ["a", "b", "c"])
    assert said.text == NOTHING and said.note == "no score is positive" and not said.spans and not said.coverages
    assert said.searches == {"convolution": [], "span": [], "both": [], "total": []}


def test_few_words_and_high_thresholds_leave_single_words():
    short = SaliencyVerbalization().verbalize_scores([1.0, -1.0, 3.0], ["a", "b", "c"])
    assert short.text == "The word » c « is most important for the prediction"
    assert short.note == "fewer than 5 scored words: single words only"
    high = SaliencyVerbalization(threshold="quantile", value=9.0).verbalize_scores(draw(12).abs(), list("abcdefghijkl"))
    assert re.match(r"no window of 5 words is above the threshold \d", high.note) and high.spans


def test_scaling_changes_nothing():
    a = draw(25, 7, 0.2)
    words = [f"w{i}" for i in range(25)]
    one, two = (SaliencyVerbalization().verbalize_scores(c * a, words) for c in (1.0, 64.0))
    assert one.text == two.text and one.spans == two.spans


def test_verbalizes_each_target_of_an_attribution_by_words():
    inputs = ["<s>", "I", " lo", "ved", " it", ".", "\n", "<img>", "<img>", " So", " much", " fun"]
    nan = math.nan
    scores = torch.tensor(
        [
            [9.0, 0.1, 1.0, 1.0, 0.5, 0.1, 0.0, 7.0, 7.0, 0.2, 0.1, 0.1],
            [nan, nan, 0.1, 0.1, 0.0, 0.1, nan, 7.0, 7.0, 0.1, 1.0, 3.0],
        ]
    )
    spans = [Span("special", 0, 1), Span("image 0", 7, 9, (1, 2))]
    first, second = SaliencyVerbalization().verbalize(Attribution(scores, inputs, [" yes", "!"], spans=spans))
    assert first.target == " yes" and second.target == "!"
    assert list(first.words) == ["I", "loved", "it.", "So", "much", "fun"] and first.scores[1] == 2.0
    assert "loved" in first.text and "fun" in second.text and "<" not in first.text + second.text
    assert list(second.words) == ["loved", "it.", "So", "much", "fun"], "what has no score is not there"
    assert first.inputs[1] == second.inputs[0]


def test_asks_a_language_model():
    attribution = Attribution(torch.tensor([[1.0, 2.0]]), ["so", " good"], [" yes"])
    asked = []
    answer = SaliencyVerbalization().ask(attribution, lambda prompt: asked.append(prompt) or 'The word "good".')
    assert answer == ['The word "good".'] and "so (1.00) good (2.00)" in asked[0] and "'yes'" in asked[0]
    SaliencyVerbalization().ask(attribution, lambda prompt: asked.append(prompt) or "", label="positive")
    assert "'positive'" in asked[1]
    assert coverage_at_k(torch.tensor([1.0, 2.0]), cited(answer[0], ["so", "good"]), 1).item() == pytest.approx(2 / 3)


def test_bad_input_is_named():
    with pytest.raises(UsageError, match=r"one finite score for each of 2 words, got \(3,\)"):
        SaliencyVerbalization().verbalize_scores([1, 2, 3], ["a", "b"])
    with pytest.raises(UsageError, match="finite"):
        SaliencyVerbalization().verbalize_scores([1, math.nan], ["a", "b"])
    for field, value in (("length", 9), ("length", 3), ("value", 0.0), ("top", 0), ("quantile", 1.5)):
        with pytest.raises(ValueError, match=rf"SaliencyVerbalization.{field} must be .*got {value}"):
            SaliencyVerbalization(**{field: value})
    with pytest.raises(ValueError, match="threshold"):
        SaliencyVerbalization(threshold="median")
