import math
import re
import warnings
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqwise.core.errors import UsageError
from seqwise.insight.explain.lexrank import (
    Idf,
    LexRank,
    centroid_scores,
    degree_centrality,
    graph_centrality,
    idf_cosine,
    inverse_document_frequency,
    min_max,
    pick,
    position_scores,
    sentences_of,
    spread,
    transition,
    words_of,
)

# The paper's example: 11 sentences of 5 documents, similarities printed with two decimals.
UPPER = """
1 .45 .02 .17 .03 .22 .03 .28 .06 .06 0
1 .16 .27 .03 .19 .03 .21 .03 .15 0
1 .03 0 .01 .03 .04 0 .01 0
1 .01 .16 .28 .17 0 .09 .01
1 .29 .05 .15 .20 .04 .18
1 .05 .29 .04 .20 .03
1 .06 0 0 .01
1 .25 .20 .17
1 .26 .38
1 .12
1
"""
TABLE = [0.6007, 0.8466, 0.3491, 0.7520, 0.5907, 0.7993, 0.3548, 1.0, 0.5921, 0.6910, 0.5921]


def example():
    rows = [[float(x) for x in line.split()] for line in UPPER.split("\n") if line]
    upper = torch.tensor([[0.0] * (11 - len(row)) + row for row in rows], dtype=torch.float64)
    return upper + upper.T - torch.eye(11)


def graph(N, seed=0, density=0.4):
    g = torch.Generator().manual_seed(seed)
    s = torch.rand(N, N, generator=g, dtype=torch.float64) * (torch.rand(N, N, generator=g) < density)
    s = torch.maximum(s, s.T)
    s.fill_diagonal_(1.0)
    return s


def counts(N, V, seed=0):
    return torch.poisson(torch.full((N, V), 0.4), generator=torch.Generator().manual_seed(seed)).double()


def naive_cosine(words_x, words_y, idf):
    x, y = Counter(words_x), Counter(words_y)
    numerator = sum(x[w] * y[w] * idf[w] ** 2 for w in set(x) & set(y))
    norms = [math.sqrt(sum((t[w] * idf[w]) ** 2 for w in t)) for t in (x, y)]
    return numerator / (norms[0] * norms[1]) if all(norms) else 0.0


def connected(links):
    """Components as lists of nodes, by walking."""
    left, found = set(range(len(links))), []
    while left:
        group, border = set(), {min(left)}
        while border:
            group |= border
            border = {j for i in border for j in range(len(links)) if links[i][j]} - group
        found.append(sorted(group))
        left -= group
    return found


# formulas


def test_the_papers_example():
    s = example()
    assert degree_centrality(s, 0.1).tolist() == [5, 7, 2, 6, 5, 7, 2, 9, 5, 6, 5]
    assert degree_centrality(s, 0.3).tolist() == [2, 2, 1, 1, 1, 1, 1, 1, 2, 1, 2]
    p = graph_centrality(s, 0.1, 0.15)
    assert (p / p.max()).tolist() == pytest.approx(TABLE, abs=7e-4)
    other_way = graph_centrality(s, 0.1, 0.85)
    assert (other_way / other_way.max()).tolist() != pytest.approx(TABLE, abs=0.05), "0.85 is no teleport probability"
    assert graph_centrality(s, 0.3).tolist() == pytest.approx([1 / 11] * 11)


def test_the_threshold_is_strict():
    s = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    assert degree_centrality(s, 0.5).tolist() == [1, 1] and degree_centrality(s, 0.49).tolist() == [2, 2]


def test_idf_and_words_never_seen():
    idf = inverse_document_frequency(torch.tensor([1, 4, 8, 0]), 8)
    assert idf.tolist() == pytest.approx([math.log(8), math.log(2), 0, math.log(8)])
    mine = Idf.of([["a", "b", "a"], ["b"], ["b", "c"]])
    assert mine.values == pytest.approx({"a": math.log(3), "b": 0, "c": math.log(3)}) and mine.unseen == math.log(3)
    with pytest.raises(UsageError, match="got none"):
        Idf.of([])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 999))
def test_idf_cosine_is_the_sum_over_common_words(N, V, seed):
    tf = counts(N, V, seed)
    idf = torch.rand(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = idf_cosine(tf, idf)
    words = [[w for w in range(V) for _ in range(int(tf[i, w]))] for i in range(N)]
    for i in range(N):
        for j in range(N):
            expected = 1.0 if i == j else naive_cosine(words[i], words[j], idf.tolist())
            assert found[i, j].item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(idf_cosine(tf.to_sparse(), idf), found, rtol=0, atol=1e-12)


def test_without_weighted_words_a_sentence_resembles_only_itself():
    tf, idf = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 2, 0], [1, 0, 3]]), torch.tensor([1.0, 0.0, 1.0])
    for s in (idf_cosine(tf, idf), idf_cosine(tf.to_sparse(), idf)):
        assert s[1].tolist() == [0, 1, 0, 0] and s[2].tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("threshold", [0.1, 0.5, None])
@pytest.mark.parametrize("teleport", [0.0, 0.15, 0.85])
def test_scores_are_the_leading_left_eigenvector(threshold, teleport):
    s = graph(13, 3)
    p = graph_centrality(s, threshold, teleport)
    M = teleport / 13 + (1 - teleport) * transition(s, threshold)
    torch.testing.assert_close(p @ M, p)
    assert p.sum().item() == pytest.approx(1) and (p > 0).all()
    values, vectors = torch.linalg.eig(M.T)
    if teleport or len(connected((s > (threshold or 0)).tolist())) == 1:
        v = vectors[:, values.real.argmax()].real
        torch.testing.assert_close(p, v / v.sum())
    assert not torch.allclose(M @ p, p), "the other direction is another vector"


def test_transition_rows_sum_to_one():
    s = graph(7, 1)
    torch.testing.assert_close(transition(s, None), s / s.sum(1, keepdim=True))
    links = (s > 0.4).double()
    torch.testing.assert_close(transition(s, 0.4), links / links.sum(1, keepdim=True))
    assert transition(torch.zeros(3, 3), None).equal(torch.eye(3).double())
    assert transition(torch.zeros(3, 3), 0.1).equal(torch.eye(3).double())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 999), st.sampled_from([0.05, 0.4, None]), st.sampled_from([0.0, 0.15, 0.6]))
def test_a_permutation_permutes_the_scores(N, seed, threshold, teleport):
    s = graph(N, seed)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    p = graph_centrality(s, threshold, teleport)
    torch.testing.assert_close(graph_centrality(s[order][:, order], threshold, teleport), p[order], rtol=0, atol=1e-8)


@pytest.mark.parametrize("threshold", [0.3, None])
@pytest.mark.parametrize("density", [0.04, 0.4])
def test_without_teleport_it_is_the_degree_within_each_component(threshold, density):
    s = graph(17, 5, density)
    weight = s if threshold is None else (s > threshold).double()
    p = graph_centrality(s, threshold, 0.0)
    groups = connected((weight > 0).tolist())
    assert (len(groups) > 1) == (density == 0.04)
    for group in groups:
        degree = weight[group].sum(1)
        torch.testing.assert_close(p[group], degree / degree.sum() * len(group) / 17, rtol=1e-6, atol=0)
    if len(groups) == 1:
        assert not torch.allclose(graph_centrality(s, threshold, 0.15), p, rtol=1e-3)


@pytest.mark.parametrize("teleport", [0.0, 0.15, 0.7, 1.0])
def test_an_isolated_unit_has_its_share_and_a_regular_graph_ranks_nothing(teleport):
    s = graph(6, 2, 0.9)
    s[2] = s[:, 2] = 0
    s[2, 2] = 1
    assert graph_centrality(s, 0.1, teleport)[2].item() == pytest.approx(1 / 6, abs=1e-12)
    ring = torch.eye(7) + torch.eye(7).roll(1, 0) + torch.eye(7).roll(-1, 0)
    p = graph_centrality(ring.double(), 0.1, teleport)
    assert p.tolist() == pytest.approx([1 / 7] * 7) and spread(p).item() == pytest.approx(1)
    if teleport == 1:
        assert graph_centrality(s, 0.1, teleport).tolist() == pytest.approx([1 / 6] * 6)


@pytest.mark.parametrize("threshold", [0.2, None])
def test_batches_with_absent_units_give_what_each_graph_gives_alone(threshold):
    s = torch.stack([graph(9, 1), graph(9, 2)])
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, [0, 4]] = False
    p = graph_centrality(s, threshold, 0.15, mask)
    live = mask[1].nonzero()[:, 0]
    torch.testing.assert_close(p[0], graph_centrality(s[0], threshold, 0.15))
    torch.testing.assert_close(p[1, live], graph_centrality(s[1][live][:, live], threshold, 0.15))
    assert p[1, [0, 4]].tolist() == [0, 0]
    degree = degree_centrality(s, 0.2, mask)
    assert degree[1, [0, 4]].tolist() == [0, 0]
    assert degree[1, live].equal(degree_centrality(s[1][live][:, live], 0.2))


def test_bad_graphs_are_refused():
    with pytest.raises(ValueError, match=r"teleport must be in \[0, 1\], got 1.5"):
        graph_centrality(torch.eye(2), 0.1, 1.5)
    with pytest.raises(ValueError, match=r"similarity must be >= 0 where threshold is None, got -0\.5"):
        graph_centrality(torch.tensor([[1, -0.5], [-0.5, 1]]), None)
    assert graph_centrality(torch.tensor([[1, -0.5], [-0.5, 1]]), 0.1).tolist() == [0.5, 0.5]


def test_dtype_stays():
    for dtype in (torch.float32, torch.bfloat16):
        assert graph_centrality(graph(5).to(dtype)).dtype == degree_centrality(graph(5).to(dtype)).dtype == dtype


def test_a_chain_that_mixes_too_slowly_is_told(monkeypatch):
    monkeypatch.setattr("seqwise.insight.explain.lexrank.STEPS", 3)
    with pytest.warns(UserWarning, match="still changed by .* after 3 steps"):
        graph_centrality(graph(9, 4), 0.1, 0.0)


def test_centroid_sums_over_occurrences_and_drops_low_values():
    tf, idf = torch.tensor([[2.0, 1, 0], [0, 1, 1]]), torch.tensor([1.0, 0.5, 3.0])
    # centroid: (1, 0.5, 1.5)
    assert centroid_scores(tf, idf).tolist() == [2.5, 2.0]
    assert centroid_scores(tf, idf, cutoff=1.0).tolist() == [0.0, 1.5]


def test_position_and_scaling():
    place, length = torch.tensor([0, 1, 2, 0]), torch.tensor([3, 3, 3, 1])
    assert position_scores(place, length).tolist() == [1, 0.5, 0, 1]
    assert min_max(torch.tensor([[1.0, 3, 2], [4, 4, 4]])).tolist() == [[0, 1, 0.5], [0, 0, 0]]


def naive_pick(score, s, cost, budget, redundancy, allowed):
    chosen = []
    for i in sorted(range(len(score)), key=lambda i: (-score[i], i)):
        left = budget - sum(cost[j] for j in chosen)
        if allowed[i] and cost[i] <= left and all(s[i][j] <= redundancy for j in chosen):
            chosen.append(i)
    return sorted(chosen)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 15), st.integers(0, 999), st.integers(1, 30), st.sampled_from([0.0, 0.3, 1.0]))
def test_pick_is_the_greedy_walk(N, seed, budget, redundancy):
    g = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 5, (N,), generator=g).double()  # ties
    cost = torch.randint(1, 9, (N,), generator=g)
    allowed = torch.rand(N, generator=g) < 0.8
    found = pick(score, graph(N, seed), cost, budget, redundancy, allowed).tolist()
    assert found == naive_pick(score.tolist(), graph(N, seed).tolist(), cost.tolist(), budget, redundancy, allowed)


# the summariser

CATS = [
    "The old cat slept on the warm mat by the kitchen door. The cat likes the warm mat. Rain fell on the roof "
    "of the house through the whole long night.",
    "By the kitchen door the old cat slept on its mat, warm and dry. Nobody in the street had seen a dog or a "
    "cart for many days now.",
]
PLAIN = Idf(dict.fromkeys(["the", "of", "and", "a", "on", "for"], 0.0), 1.0)  # stop words weigh nothing


def test_ranks_sentences_of_all_documents_as_one_graph():
    r = LexRank(threshold=None).rank(CATS, idf=PLAIN)
    assert len(r.sentences) == 5 and list(r.document) == [0, 0, 0, 1, 1] and list(r.place) == [0, 1, 2, 0, 1]
    assert r.centrality.sum().item() == pytest.approx(1) and r.centrality.dtype == torch.float64
    words = [words_of(s) for s in r.sentences]
    s = torch.eye(5, dtype=torch.float64)
    for i in range(5):
        for j in set(range(5)) - {i}:
            s[i, j] = naive_cosine(words[i], words[j], {w: PLAIN.values.get(w, 1.0) for w in words[i] + words[j]})
    torch.testing.assert_close(r.centrality, graph_centrality(s, None))
    assert r.spread > 1.1
    assert r.order == sorted(range(5), key=lambda i: -r.centrality[i])
    assert r.spread == pytest.approx(float(r.centrality.max() / r.centrality.min()))


def test_summary_skips_the_short_and_the_redundant_and_stays_in_document_order():
    r = LexRank(threshold=0.05).rank(CATS, idf=PLAIN)
    assert 1 not in r.chosen, "six words are too few"
    assert list(r.chosen) == [0, 2, 4], "3 says what 0 says"
    both = LexRank(threshold=0.05, redundancy=1.0).rank(CATS, idf=PLAIN)
    assert list(both.chosen) == [0, 2, 3, 4]
    assert r.summary == " ".join(r.sentences[i] for i in (0, 2, 4))


@pytest.mark.parametrize("unit", ["bytes", "words", "sentences"])
def test_the_budget_is_never_exceeded_and_can_be_met_exactly(unit):
    sizes = {"bytes": lambda s: len(s.encode()), "words": lambda s: len(s.split()), "sentences": lambda s: 1}
    full = LexRank(unit=unit, budget=10_000, min_words=0, redundancy=1.0).rank(CATS, idf=PLAIN)
    assert len(full.chosen) == 5
    whole = 5 if unit == "sentences" else sizes[unit](full.summary)
    for budget in (1, 3, 40, whole - 1, whole):
        r = LexRank(unit=unit, budget=budget, min_words=0, redundancy=1.0).rank(CATS, idf=PLAIN)
        assert (len(r.chosen) if unit == "sentences" else sizes[unit](r.summary)) <= budget
        assert (len(r.chosen) == 5) == (budget >= whole)


def test_a_sentence_that_does_not_fit_makes_room_for_the_next():
    r = LexRank(unit="words", budget=14, position_weight=0.0).rank(CATS, idf=PLAIN)
    assert len(r.chosen) == 1 and len(r.summary.split()) <= 14


def test_position_decides_where_it_has_all_the_weight():
    r = LexRank(centrality_weight=0.0, unit="sentences", budget=2, redundancy=1.0).rank(CATS, idf=PLAIN)
    assert list(r.chosen) == [0, 3]


def test_own_word_weights_take_documents_or_the_sentences_of_one():
    one = LexRank().rank([["a b", "a c", "d e"]])
    idf = {"a": math.log(1.5), **dict.fromkeys("bcde", math.log(3))}
    s = naive_cosine("ab", "ac", idf)
    expected = graph_centrality(torch.tensor([[1, s, 0], [s, 1, 0], [0, 0, 1]], dtype=torch.float64))
    torch.testing.assert_close(one.centrality, expected)
    with pytest.warns(UserWarning, match="equally central"):
        two = LexRank(threshold=None).rank([["a b"], ["a c"]])  # "a" is in every document and weighs nothing
    assert two.spread == 1


def test_boilerplate_is_central_until_a_background_says_how_common_it_is():
    plate = "read more news about the vote"
    documents = [
        ["the vote on the bridge was close", plate],
        ["the bridge was closed after the storm", plate],
        ["storm on the coast and the bridge", plate],
        ["news of the coast", plate],
    ]
    flat = LexRank(threshold=None).rank(documents, idf=Idf({}, 1.0))
    assert {flat.sentences[i] for i in flat.order[:4]} == {plate}
    background = Idf.of([*([[*plate.split(), "on"]] * 50), ["bridge"], ["storm", "coast"]])
    weighed = LexRank(threshold=None).rank(documents, idf=background)
    assert "bridge" in weighed.sentences[weighed.order[0]]


def test_a_uniform_graph_is_told_and_a_single_sentence_is_not():
    with pytest.warns(UserWarning, match="ranks nothing"):
        r = LexRank().rank([["a b", "c d", "e f"]])
    assert r.spread == 1 and r.order == [0, 1, 2], "ties: the earlier first"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LexRank().rank([["alone"]]).centrality.tolist() == [1.0]


def test_the_attribution_joins_to_the_text():
    r = LexRank().rank(CATS)
    a = r.attribution()
    assert "".join(a.inputs) == " ".join(r.sentences) and a.targets == ("summary",) and a.method == "LexRank()"
    assert a.top(5) == r.order and a.details["chosen"] == list(r.chosen)
    assert type(a).from_dict(a.to_dict()).top(1) == r.order[:1]


def test_splitter_tokenizer_and_stop_words_are_arguments():
    r = LexRank().rank(
        ["a x|b x|c d"],
        split=lambda t: t.split("|"),
        tokenize=lambda s: [w for w in s.split() if w != "x"],
        idf=Idf({}, 1.0),
    )
    assert list(r.sentences) == ["a x", "b x", "c d"] and r.spread == 1


def test_default_splitter_and_tokenizer():
    text = 'It rained. "Why?" she asked! Then\nit stopped...\n\nA title without a stop\n\nThe end'
    assert sentences_of(text) == ["It rained.", '"Why?', "she asked!", "Then it stopped...", "A title without a stop",
                                  "The end"]  # fmt: skip
    assert sentences_of("  \n") == []
    assert words_of("Don't stop: ÄRGER, x_1!") == ["don't", "stop", "ärger", "x_1"]


def test_bad_input_and_hyperparameters_are_named():
    for documents in ([], ["  "], [[]]):
        with pytest.raises(UsageError, match="at least one sentence"):
            LexRank().rank(documents)
    with pytest.raises(UsageError, match="sequence of texts"):
        LexRank().rank("one text")
    for field, value, allowed in [
        ("threshold", 1.0, "[0, 1)"),
        ("teleport", -0.1, "[0, 1]"),
        ("redundancy", 2.0, "[0, 1]"),
        ("budget", 0, ">= 1"),
    ]:
        with pytest.raises(ValueError, match=rf"LexRank.{field} must be .*{re.escape(allowed)}, got {value}"):
            LexRank(**{field: value})
    assert str(LexRank.parse("LexRank(threshold=None, teleport=0.2)")) == "LexRank(threshold=None, teleport=0.2)"


def test_many_sentences_take_seconds():
    g = torch.Generator().manual_seed(0)
    lines = [" ".join(f"w{i}" for i in row) for row in torch.randint(0, 3000, (1500, 12), generator=g).tolist()]
    r = LexRank().rank([lines], idf=Idf({}, 1.0))
    assert len(r.order) == 1500 and r.centrality.sum().item() == pytest.approx(1)
