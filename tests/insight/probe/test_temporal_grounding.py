import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from seqwise.core.errors import PromptError
from seqwise.insight.probe.temporal_grounding import (
    Event,
    TemporalGrounding,
    assign,
    candidates,
    consistency,
    event_ids,
    label_logps,
    lcs_f1,
    match_scores,
    mean_candidates,
    mean_description_score,
    mean_pairwise_accuracy,
    mentions,
    pairwise_accuracy,
    parse_events,
    prompt,
    reply_consistency,
    reverse,
    says_yes,
    yes_rate,
)
from seqwise.lab.zoo import load_model

answers = st.sampled_from([True, False, None])


# yes or no


def test_yes_wins_ties_and_the_last_tokens_are_compared():
    assert says_yes(torch.tensor([[-1.0], [-1.0], [-2.0]]), torch.tensor([[-1.0], [-2.0], [-1.0]])).tolist() == [
        True, True, False,
    ]  # fmt: skip
    assert says_yes(torch.tensor([-9.0, -1.0]), torch.tensor([-1.0, -2.0])), "as many tokens: the last ones"
    assert not says_yes(torch.tensor([-9.0, -1.0]), torch.tensor([-2.0])), "not as many: the sums"


def test_replies_are_searched_for_whole_words_or_for_any_substring():
    for reply in ("I know.", "not so", "None"):
        assert not mentions(reply, "no") and mentions(reply, "no", "substring")
    assert mentions("No.", "no") and mentions("It is TRUE", "yes") and mentions("False!", "no")
    assert not mentions("untrue", "yes") and mentions("untrue", "yes", "substring")
    assert not mentions("yes", "no", "substring") and not mentions("", "yes")


# consistency


def test_questions_turn_and_turn_back():
    assert reverse("Did A happen before B?") == "Did A happen after B?"
    assert reverse("AFTER that, or Before? afternoon") == "BEFORE that, or After? afternoon"
    assert reverse(reverse("Before x, after y")) == "Before x, after y"
    with pytest.raises(ValueError, match="must hold 'before' or 'after', got 'the afternoon'"):
        reverse("the afternoon")


@given(st.lists(st.tuples(answers, answers, st.booleans()), min_size=1, max_size=12))
def test_consistency_by_its_definition(pairs):
    said, gold = [(a, b) for a, b, _ in pairs], [g for _, _, g in pairs]
    right = [[a == g and a is not None, b is not None and b == (not g)] for a, b, g in pairs]
    live = [not (a is None and b is None) for a, b, _ in pairs]
    found, N = consistency(said, gold), len(pairs)
    assert found.acc == pytest.approx(sum(all(r) for r in right) / N)
    assert found.unanswered == pytest.approx((N - sum(live)) / N)
    if any(live):
        assert found.inconsistent == pytest.approx(sum(sum(r) == 1 for r in right) / sum(live))
    else:
        assert math.isnan(found.inconsistent)
    if all(live):
        assert found.acc + found.inconsistent + found.both_wrong == pytest.approx(1)


def test_habits_and_coins():
    gold = [True, False] * 10
    always = consistency([(True, True)] * 20, gold)
    assert (always.acc, always.inconsistent, always.both_wrong) == (0, 1, 0) and yes_rate([(True, True)] * 20) == 1
    wrong = consistency([(not g, g) for g in gold], gold)
    assert (wrong.acc, wrong.inconsistent, wrong.both_wrong) == (0, 0, 1), "consistent, on a wrong timeline"
    coins = np.random.default_rng(0).integers(0, 2, (20_000, 2)).astype(bool)
    found = consistency([(bool(a), bool(b)) for a, b in coins], gold * 1_000)
    assert found.acc == pytest.approx(0.25, abs=0.02) and found.inconsistent == pytest.approx(0.5, abs=0.02)
    assert yes_rate([(True, None), (False, False)]) == pytest.approx(1 / 3) and math.isnan(yes_rate([(None, None)]))
    with pytest.raises(ValueError, match="at least one, got 0 for 0 pairs"):
        consistency([], [])


def test_replies_count_by_their_gold_word():
    replies = [("Yes.", "No."), ("no", "no"), ("I know", "maybe"), ("yes and no", "yes and no"), ("", "yes")]
    gold = ["yes", "yes", "yes", "no", "no"]
    found = reply_consistency(replies, gold)
    assert found == pytest.approx((2 / 5, 2 / 4, 0.0, 1 / 5))  # both: 1st, 4th; one: 2nd, 5th; the 3rd says neither
    parity = reply_consistency(replies, gold, "substring")
    assert parity == pytest.approx((2 / 5, 2 / 5, 1 / 5, 0.0)), "no is in know, and is the wrong one there"


# candidate answers


@pytest.mark.parametrize(
    "said, gold, strict, f1",
    [
        ("yn", "yn", 1, 1.0),
        ("yy", "yn", 0, 2 / 3),
        ("nn", "yn", 0, 0.0),  # precision 1 without a yes said, recall 0
        ("nn", "nn", 1, 1.0),
        ("yn", "nn", 0, 0.0),  # recall 1 without a gold yes, precision 0
        ("ny", "yn", 0, 0.0),
    ],
)
def test_candidates_of_one_question(said, gold, strict, f1):
    found = candidates(*([{"y": "yes", "n": "no"}[c] for c in one] for one in (said, gold)))
    assert found == (strict, pytest.approx(f1))


def test_candidates_are_averaged_over_questions():
    said, gold = ["yes", "no", "yes", "yes"], ["yes", "no", "no", "yes"]
    found = mean_candidates(said, gold, ["a", "b", "b", "b"])
    assert found == pytest.approx((0.5, (1 + 2 / 3) / 2))
    with pytest.raises(ValueError, match="as many, at least one, got 0, 0, 0"):
        mean_candidates([], [], [])


# events


def test_events_are_parsed_at_their_tags():
    text = "so <EVENT> went <ARGS> to  the\nshop <EVENT> ate<CAUSE>fell <ARGS>"
    assert parse_events(text) == [
        Event("EVENT", "went", "to the shop"), Event("EVENT", "ate", ""), Event("CAUSE", "fell", ""),
    ]  # fmt: skip
    assert parse_events("nothing") == []


@given(st.text("ab ", max_size=9), st.text("ab ", max_size=9))
def test_the_longest_common_subsequence(a, b):
    def longest(x, y):
        if not x or not y:
            return 0
        return longest(x[1:], y[1:]) + 1 if x[0] == y[0] else max(longest(x[1:], y), longest(x, y[1:]))

    x, y = a.split(), b.split()
    assert lcs_f1(a.upper(), b) == pytest.approx(2 * longest(x, y) / (len(x) + len(y)) if x and y else 0.0)


@given(arrays(float, st.tuples(st.integers(0, 4), st.integers(0, 5)), elements=st.sampled_from([0, 0.2, 0.5, 0.9, 1])))
def test_the_matching_has_the_largest_total(scores):
    n, m = scores.shape
    columns = assign(scores)
    taken = [j for j in columns if j >= 0]
    assert len(columns) == n and len(set(taken)) == len(taken) and set(taken) <= set(range(m))
    assert all(scores[i, j] > 0 for i, j in enumerate(columns) if j >= 0)
    padded = np.zeros((max(n, m), max(n, m)))
    padded[:n, :m] = scores
    best = max((sum(padded[i, p[i]] for i in range(len(padded))) for p in permutations(range(len(padded)))), default=0)
    assert sum(scores[i, j] for i, j in enumerate(columns) if j >= 0) == pytest.approx(best)


def test_matching_is_one_to_one_on_tag_verb_and_description():
    gold = [Event("E", "went", "to the shop"), Event("E", "went", "to the old shop"), Event("E", "ate", "a cake")]
    found = [Event("E", "went", "to the old shop"), Event("E", "ate", "bread"), Event("C", "ate", "a cake"), gold[0]]
    assert match_scores(found, gold)[2].tolist() == [0, 0, 0], "another tag"
    assert event_ids(found, gold) == [1, 3, 4, 0]
    assert mean_description_score(found, gold) == pytest.approx(2 / 3) and math.isnan(mean_description_score([], []))
    assert mean_pairwise_accuracy([found, gold, gold[:1]], [gold, gold, gold[:1]]) == pytest.approx((0 + 1) / 2)
    assert math.isnan(mean_pairwise_accuracy([gold], [gold[:1]]))


@given(st.permutations(range(6)), st.integers(0, 6))
def test_ordering_is_the_share_of_gold_s_pairs(order, kept):
    scipy = pytest.importorskip("scipy.stats")
    tau = scipy.kendalltau(range(6), np.argsort(order)).statistic
    assert pairwise_accuracy(order, range(6)) == pytest.approx((tau + 1) / 2)
    part = order[:kept]
    count = sum(i < j for a, i in enumerate(part) for j in part[a + 1 :])
    assert pairwise_accuracy([*part, 77, 78], range(6)) == pytest.approx(count / 15), "missing lose, extra cost nothing"


def test_orders_at_the_ends():
    assert pairwise_accuracy("abcd", "abcd") == 1 and pairwise_accuracy("dcba", "abcd") == 0
    assert pairwise_accuracy("wxyz", "abcd") == 0 and math.isnan(pairwise_accuracy("ab", "a"))
    orders = list(permutations(range(4)))
    assert sum(pairwise_accuracy(one, range(4)) for one in orders) / len(orders) == pytest.approx(0.5)


# models


@pytest.fixture(scope="module")
def tiny(byte_llama):
    return load_model(byte_llama(num_hidden_layers=2, max_position_embeddings=260, initializer_range=0.3))


def test_labels_are_scored_as_the_last_word(tiny):
    """Bytes: " yes" has four tokens and " no" three, and prompts of two lengths share a batch."""
    model, tokenizer = tiny
    prompts = [prompt("It rained.", "before?"), prompt("It rained, then it snowed.", "Was it so after?")]
    yes, no = label_logps(model, tokenizer, prompts)
    for label, found in (("yes", yes), ("no", no)):
        for text, own in zip(prompts, found, strict=True):
            ids, n = tokenizer.encode(f"{text} {label}"), len(tokenizer.encode(text))
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = torch.stack([logps[i - 1, ids[i]] for i in range(n, len(ids))])
            assert len(own) == len(label) + 1
            torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(PromptError, match="more than the model's 260 positions"):
        label_logps(model, tokenizer, [prompt("x" * 260, "before?")])


def test_questions_are_asked_both_ways_on_cut_articles(tiny, monkeypatch):
    seen = []

    def scored(model, tokenizer, prompts):
        seen.extend(prompts)
        return [torch.tensor([float("before" in p)]) for p in prompts], [torch.tensor([0.5]) for _ in prompts]

    monkeypatch.setattr("seqwise.insight.probe.temporal_grounding.label_logps", scored)
    said = TemporalGrounding(article=5).ask(*tiny, ["abcdefgh", "xyz"], ["Was it before A?", "Was it after B?"])
    assert said == [(True, False), (False, True)]
    assert seen == [
        prompt("abcde", "Was it before A?"), prompt("abcde", "Was it after A?"),
        prompt("xyz", "Was it after B?"), prompt("xyz", "Was it before B?"),
    ]  # fmt: skip
    turned = TemporalGrounding().ask(*tiny, ["a"], ["left"], lambda q: {"left": "right"}[q])
    assert turned == [(False, False)] and seen[-1] == prompt("a", "right")
    with pytest.raises(ValueError, match=r"TemporalGrounding\.article must be .*0"):
        TemporalGrounding(article=0)
