import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from seqwise.core.errors import PromptError, UnsupportedModel, UsageError
from seqwise.insight.explain.base import next_logits
from seqwise.insight.probe.verbatim_memory import (
    BETWEEN,
    LIST1,
    LIST2,
    PREFACE,
    PUNCTUATION,
    VerbatimMemory,
    base_lists,
    bca_median,
    contrast,
    list_mean,
    list_surprisals,
    mad,
    novel_pairing,
    permuted_lists,
    position_curve,
    repeat_surprisal,
    rotations,
    shuffled_attention,
    shuffled_entries,
    stimulus,
    story,
    trials_of,
    word_surprisals,
    words_of_tokens,
    zeroed_heads,
)
from seqwise.lab.zoo.recall import recall_model

# lists


def test_rotations_go_to_the_right():
    assert rotations("abc") == [["a", "b", "c"], ["c", "a", "b"], ["b", "c", "a"]]
    assert rotations(["a"]) == [["a"]]


@given(st.integers(1, 12))
def test_every_word_stands_at_every_position_once(n):
    for position in zip(*rotations(list(range(n))), strict=True):
        assert sorted(position) == list(range(n))


def test_permutations_are_those_of_the_seeds():
    lists = [list("abcdefghij"), list("klmnopqrst"), list("0123456789")]
    wanted = [list(np.random.RandomState((543 + j) * 5).permutation(one)) for j, one in enumerate(lists)]
    assert permuted_lists(lists) == wanted


def test_lists_left_as_they_were_are_drawn_anew_together():
    """Of short lists many stay as they were; those alone are drawn again, all of them until none is left."""
    lists = [[f"{j} a", f"{j} b"] for j in range(9)]
    first = [list(np.random.RandomState((543 + j) * 5).permutation(one)) for j, one in enumerate(lists)]
    equal = [j for j in range(9) if first[j] == lists[j]]
    assert 1 < len(equal) < 9
    seed = 123
    while True:
        random = np.random.RandomState(seed)
        again = {j: list(random.permutation(lists[j])) for j in equal}
        if all(again[j] != lists[j] for j in equal):
            break
        seed += 10
    assert seed > 123, "one try is enough here: the test would not see the next seed"
    assert permuted_lists(lists) == [again.get(j, one) for j, one in enumerate(first)]


def test_a_list_without_another_order_is_refused():
    with pytest.raises(UsageError, match="list 2 must hold two different words"):
        permuted_lists([["a", "b"], ["a", "a"]])


def test_novel_lists_are_drawn_group_by_group():
    groups = np.repeat(np.arange(5), 4)
    random, used, wanted = np.random.RandomState(12345), set(), []
    for group in range(5):
        pool = [j for j in range(20) if groups[j] != group and j not in used]
        drawn = random.choice(pool, size=4)
        wanted += drawn.tolist()
        used |= set(drawn.tolist())
    found = novel_pairing(groups.tolist())
    assert found == wanted and len(set(found)) < 20, "with replacement"
    assert all(groups[j] != groups[i] for j, i in enumerate(found))
    by_group = [set(found[4 * g : 4 * g + 4]) for g in range(5)]
    assert sum(map(len, by_group)) == len(set(found)), "none that an earlier group has drawn"


@pytest.mark.parametrize("groups", [[0, 0], [0, 0, 1]])
def test_groups_that_cannot_be_paired(groups):
    with pytest.raises(UsageError, match=r"group \d needs 2 lists"):
        novel_pairing(groups)


@pytest.mark.parametrize("kind", ["arbitrary", "semantic"])
def test_base_lists_share_no_noun(kind):
    lists = base_lists(kind)
    assert [len(one) for one in lists] == [10] * 23 and len({word for one in lists for word in one}) == 230
    categories = {word: i for i, one in enumerate(base_lists("semantic")) for word in one}
    assert {len({categories[word] for word in one}) for one in lists} == ({10} if kind == "arbitrary" else {1})


# texts


def test_a_text_and_its_markers():
    text = stimulus("See this list:", ["ox", "bee"], "It's over. Again:", ["bee", "ox"])
    assert text.text == "See this list: ox, bee. It's over. Again: bee, ox."
    shown = [text.text[start:stop] for start, stop in text.spans]
    assert " ".join(shown) == "See this list : ox , bee . It's over . Again : bee , ox ."
    P, L, B, M, dot = PREFACE, LIST1, BETWEEN, LIST2, PUNCTUATION
    assert text.markers == (P, P, P, dot, L, dot, L, dot, B, B, dot, B, dot, M, dot, M, dot)
    assert [p for p, m in zip(text.positions, text.markers, strict=True) if m in (L, M)] == [0, 1, 0, 1]
    assert {p for p, m in zip(text.positions, text.markers, strict=True) if m not in (L, M)} == {-1}


def test_tokens_belong_to_words_by_offsets():
    """BOS, a blank before a word, two tokens of one word, a token of two words, a blank alone, and an end."""
    spans = [(0, 3), (3, 4), (5, 9), (10, 12)]
    offsets = [(0, 0), (0, 3), (3, 4), (4, 7), (7, 10), (9, 10), (9, 12), (12, 13)]
    assert words_of_tokens(offsets, spans) == [-1, 0, 1, 2, 2, -1, 3, -1]


def test_sub_tokens_are_summed():
    words = torch.tensor([-1, 0, 2, 2, 2])
    found = word_surprisals(torch.tensor([math.nan, 1.0, 2.0, 3.0, 4.0]), words, 3)
    assert found[0] == 1 and found[1].isnan() and found[2] == 9
    assert word_surprisals(torch.tensor([math.nan, 1.0]), torch.tensor([0, 0]), 1).isnan().all()  # its first has none


@pytest.mark.parametrize("gap, least, most", [(1, 20, 35), (2, 40, 60), (3, 85, 120), (4, 170, 230), (5, 350, 450)])
def test_stories_grow_and_end_with_the_cue(gap, least, most):
    preface, between = story(gap)
    assert least <= 1.15 * len(between.split()) <= most
    assert preface.endswith("list of words:") and between.endswith("read the list again:")
    assert gap == 1 or between.startswith(
        story(gap - 1)[1].removesuffix(" When she got back, she read the list again:")
    )


def test_scenarios_change_what_they_say():
    intact = story(3)
    assert story(3, "short") == (intact[0], "And the other:")
    assert story(3, "comma") == (intact[0][:-1] + ",", intact[1][:-1] + ",")
    scrambled = story(3, "scrambled")
    assert scrambled[0] == intact[0] and scrambled[1] != intact[1]
    bare = [sorted(text.replace(".", "").replace(",", "").split()) for text in (scrambled[1], intact[1])]
    assert bare[0] == bare[1] and scrambled[1].endswith("read the list again:")
    other = story(3, "incongruent")
    assert "Prices of copper" in other[1] and "coffee" not in other[1] and other[1].endswith("list again:")
    man = story(3, "other subject")
    assert "John" in man[0] and " she " not in man[1] and "When he got back" in man[1]
    for scenario, at in (("permuted preface", 0), ("permuted cue", 1)):
        changed = story(3, scenario)
        assert changed[1 - at] == intact[1 - at] and changed[at] != intact[at] and changed[at].endswith(":")
    assert "Mary" in story(3, "permuted preface")[0]


def test_trials_are_all_rotations():
    trials = VerbatimMemory(length=3).trials()
    assert len(trials) == 230
    base = base_lists()

    def words(text, marker):
        return [text.text[a:b] for (a, b), m in zip(text.spans, text.markers, strict=True) if m == marker]

    for j in (0, 3, 17, 229):
        texts = trials[j].texts
        first = rotations(base[j // 10])[j % 10][:3]
        assert all(words(text, LIST1) == first for text in texts.values())
        assert words(texts["Repeated"], LIST2) == first
        changed = words(texts["Permuted"], LIST2)
        assert changed != first and sorted(changed) == sorted(first)
        assert len(set(words(texts["Novel"], LIST2)) - set(first)) == 3
    pairing = novel_pairing([j // 10 for j in range(230)])
    longer = VerbatimMemory(length=10).trials()
    for j in (0, 100, 229):  # the same pairs at all lengths
        other = rotations(base[pairing[j] // 10])[pairing[j] % 10]
        assert words(longer[j].texts["Novel"], LIST2) == other and words(trials[j].texts["Novel"], LIST2) == other[:3]


def test_a_novel_list_shares_no_word():
    with pytest.raises(PromptError, match=r"list 1 must share no word with it, got \['a'\]"):
        trials_of([["a", "b"]], [["c", "a"]], [story(1)])
    assert list(trials_of([["a", "b"]], [None], [story(1)])[0].texts) == ["Repeated", "Permuted"]


@pytest.mark.parametrize(
    "field, said",
    [({"length": 1}, r"length must be in \[2, 10\]"), ({"gap": 6}, r"gap must be in \[1, 5\]"),
     ({"scenario": "none"}, "scenario must be one of 'intact'")],
)  # fmt: skip
def test_settings_outside_their_range(field, said):
    with pytest.raises(ValueError, match=f"VerbatimMemory.{said}"):
        VerbatimMemory(**field)


# statistics


def test_means_leave_position_0_out():
    markers, positions = torch.tensor([0, 1, 1, 1, -1, 3, 3, 3]), torch.tensor([-1, 0, 1, 2, -1, 0, 1, 2])
    surprisal = torch.tensor([9.0, 50.0, 4.0, 6.0, 9.0, 50.0, 1.0, 2.0])
    assert (
        list_mean(surprisal, markers, positions, LIST1) == 5 and list_mean(surprisal, markers, positions, LIST2) == 1.5
    )
    assert list_mean(torch.stack([surprisal, 2 * surprisal]), markers, positions, LIST1).tolist() == [5, 10]


def test_repeat_surprisal_and_contrast():
    x1, x2 = torch.tensor([4.0, 2.0, 1e-9]), torch.tensor([1.0, 3.0, 1.0])
    assert repeat_surprisal(x1, x2)[:2].tolist() == [25, 150] and repeat_surprisal(x1, x2)[2].isnan()
    assert contrast(x1, x2)[:2].tolist() == pytest.approx([-0.6, 0.2])


def test_the_ratio_is_per_text_then_the_median():
    x1, x2 = torch.tensor([1.0, 2.0, 10.0]), torch.tensor([1.0, 1.0, 8.0])
    assert float(np.median(repeat_surprisal(x1, x2))) == pytest.approx(80.0)
    assert float(100 * x2.median() / x1.median()) == 50  # what it is not


def test_mad_is_not_rescaled():
    assert mad([1.0, 2.0, 4.0, 8.0, 100.0]) == 3.0


@pytest.mark.parametrize("n", [7, 16, 45])
def test_the_interval_is_scipys(n):
    values = np.random.default_rng(n).lognormal(size=n)
    wanted = bootstrap((values,), np.median, n_resamples=10_000, random_state=12345, method="BCa").confidence_interval
    median, low, high = bca_median(values)
    assert median == np.median(values) and (low, high) == pytest.approx((wanted.low, wanted.high), rel=1e-6)


def test_intervals_that_do_not_exist():
    assert bca_median([3.0])[0] == 3 and all(map(math.isnan, bca_median([3.0])[1:]))
    assert bca_median([2.0] * 5) == (2.0, 2.0, 2.0)


def test_curves_count_words_from_the_onset():
    text = stimulus("a b:", ["x", "y"], "c:", ["z", "w"])
    surprisal = torch.arange(float(len(text.spans)))  # a b : x , y . c : z , w .
    markers = torch.tensor(text.markers)
    found = position_curve(surprisal, markers, LIST2, 3, 4)  # y c... before, z w after
    assert found[:5].tolist() == [3, 5, 7, 9, 11] and found[5:].isnan().all()
    assert position_curve(surprisal, markers, LIST1, 4, 1)[:2].isnan().all()
    assert position_curve(surprisal.expand(2, -1), markers, LIST1, 1, 1).tolist() == [[1, 3]] * 2


# models that are known


def R_of(score, trials, first=1):
    """Per condition R of texts whose words have the surprisal score(word, words before it in the text)."""
    found = {}
    for name in trials[0].texts:
        values = []
        for trial in trials:
            text = trial.texts[name]
            words = [text.text[a:b] for a, b in text.spans]
            surprisal = torch.tensor([score(word, words[:i]) for i, word in enumerate(words)], dtype=torch.float64)
            markers, positions = torch.tensor(text.markers), torch.tensor(text.positions)
            if first == 1:
                x1, x2 = (list_mean(surprisal, markers, positions, marker) for marker in (LIST1, LIST2))
            else:
                x1, x2 = (list_surprisals(surprisal, text, marker).mean() for marker in (LIST1, LIST2))
            values.append(float(repeat_surprisal(x1, x2)))
        found[name] = values
    return found


def test_a_model_without_context_retrieves_nothing():
    trials = VerbatimMemory(length=5).trials()[::37]
    even = R_of(lambda word, before: 3.0, trials)
    assert all(value == pytest.approx(100) for values in even.values() for value in values)
    by_length = R_of(lambda word, before: float(len(word)), trials, first=0)  # all positions: the same multiset
    assert by_length["Repeated"] == by_length["Permuted"] == pytest.approx([100.0] * len(trials))
    assert by_length["Novel"] != pytest.approx([100.0] * len(trials))


def test_a_copier_retrieves_words_and_order():
    def copies(word, before):
        """Sure of what followed the last two words (a noun and its comma) when they came before."""
        for i in range(len(before) - 3, -1, -1):
            if before[i : i + 2] == before[-2:]:
                return 0.01 if before[i + 2] == word else 12.0
        return 5.0

    found = R_of(copies, VerbatimMemory(length=7).trials()[::23])
    assert max(found["Repeated"]) < 1 and np.median(found["Permuted"]) > 100
    assert found["Novel"] == pytest.approx([100.0] * 10)


def test_surprisals_of_a_model_are_those_of_its_words(monkeypatch):
    class Words:
        """One token per word or mark, two for nouns of more than four letters, and BOS."""

        def __call__(self, text, return_offsets_mapping):
            offsets = [(0, 0)]
            for start, stop in stimulus_spans[text]:
                middle = start + 2 if stop - start > 4 else stop
                offsets += [(max(start - 1, 0), middle)] + ([(middle, stop)] if middle < stop else [])
            return {"input_ids": [1 + i % 200 for i in range(len(offsets))], "offset_mapping": offsets}

    trials = VerbatimMemory(length=3).trials()[:2]
    stimulus_spans = {text.text: text.spans for trial in trials for text in trial.texts.values()}
    model = recall_model(0)
    found = VerbatimMemory().surprisals(model, Words(), trials)
    assert [list(one) for one in found] == [["Repeated", "Permuted", "Novel"]] * 2
    for trial, losses in zip(trials, found, strict=True):
        text = trial.texts["Novel"]
        encoded = Words()(text.text, True)
        with torch.no_grad():
            logps = model(torch.tensor([encoded["input_ids"]])).logits[0].log_softmax(-1)
        each = [-float(logps[t - 1, encoded["input_ids"][t]]) for t in range(1, len(encoded["input_ids"]))]
        word = text.markers.index(LIST2) + 2
        tokens = [t for t, w in enumerate(words_of_tokens(encoded["offset_mapping"], text.spans)) if w == word]
        assert float(losses["Novel"][word]) == pytest.approx(sum(each[t - 1] for t in tokens), rel=1e-4)


# ablations


def test_shuffling_keeps_all_entries_and_heads_apart():
    W = torch.arange(24.0).view(6, 4)
    mixed, by_head = shuffled_entries(W, 1), shuffled_entries(W, 1, 3)
    assert sorted(mixed.flatten().tolist()) == list(range(24)) and not torch.equal(mixed, W)
    assert [sorted(rows.flatten().tolist()) for rows in by_head.split(2)] == [
        list(range(8 * h, 8 * h + 8)) for h in range(3)
    ]
    assert not torch.equal(by_head, W) and not torch.equal(shuffled_entries(W, 2), mixed)


@pytest.mark.parametrize("per_head", [False, True])
def test_shuffled_attention_is_undone(per_head):
    model = recall_model(0, layers=3)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = torch.arange(9)[None]
    plain = next_logits(model, input_ids=ids)
    with pytest.raises(KeyError), shuffled_attention(model, 7, per_head=per_head):
        now = model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], now[name])}
        assert changed == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(3) for p in "qk"}
        for i in range(3):  # layer l draws from seed + 5 l
            name = f"model.layers.{i}.self_attn.q_proj.weight"
            assert torch.equal(now[name], shuffled_entries(before[name], 7 + 5 * i, 2 if per_head else 1))
        assert not torch.allclose(next_logits(model, input_ids=ids), plain)
        raise KeyError
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_zeroed_heads_read_nothing():
    model = recall_model(0)
    ids = torch.arange(9)[None]
    plain = next_logits(model, input_ids=ids)
    with zeroed_heads(model, [(1, 0)]):
        one = next_logits(model, input_ids=ids)
    weight = model.model.layers[1].self_attn.o_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[:, :32] = 0  # head 0 reaches the stream through these columns alone
        wanted = next_logits(model, input_ids=ids)
        weight.copy_(kept)
    torch.testing.assert_close(one, wanted)
    assert not torch.allclose(one, plain) and torch.equal(next_logits(model, input_ids=ids), plain)
    with zeroed_heads(model, [(layer, head) for layer in (0, 1) for head in (0, 1)]):
        moved = next_logits(model, input_ids=torch.cat([ids[:, :8].flip(1), ids[:, 8:]], 1))
        torch.testing.assert_close(moved, next_logits(model, input_ids=ids))  # nothing is read from elsewhere
    with pytest.raises(UsageError, match="heads must be of 2 layers x 2"), zeroed_heads(model, [(0, 2)]):
        pass


def test_joined_query_and_key_matrices_are_refused():
    model = recall_model(0)
    del model.model.layers[1].self_attn.q_proj
    with pytest.raises(UnsupportedModel, match="no q_proj"), shuffled_attention(model):
        pass
