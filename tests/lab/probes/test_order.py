"""Flips, positions, letters and verdicts, on models whose answers are known, and on a random one under remedies."""

from __future__ import annotations

import json
from itertools import pairwise, product

import numpy as np
import pytest

from seqwise.core.errors import UsageError
from seqwise.core.prepare import prepare
from seqwise.lab.intervals import wilson
from seqwise.lab.probes import order
from seqwise.lab.probes.base import Progress, Settings
from seqwise.lab.probes.order import (
    DEPENDS,
    DOCUMENTS,
    ITEMS,
    KINDS,
    LETTERS,
    MEMBERS,
    NO_POWER,
    NOT_FOUND,
    Order,
    content_free,
    deviation,
    documents,
    flips,
    options,
    prompt,
    read_items,
    rotated,
    shuffled_p,
    spread,
)
from seqwise.lab.rows import PLAIN, newcombe
from seqwise.lab.tasks import NOUNS
from seqwise.methods.order.pine import PINE
from seqwise.methods.order.set_based_prompting import SetBasedPrompting

WORDS = {word: kind for kind, words in KINDS.items() for word in words}
EVEN = dict.fromkeys(LETTERS[:MEMBERS], 0.2)
N = 8


# statistics


def test_flips_count_items_and_pairs():
    assert flips("aaaa") == (0.0, 0.0)
    assert flips("aaaab") == (1.0, 4 / 10)
    assert flips("aabb") == (1.0, 4 / 6)
    assert flips("abcde") == (1.0, 1.0)
    assert flips([2, 2]) == (0.0, 0.0)


def test_the_spread_is_between_positions():
    correct = np.array([[1, 0, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]], dtype=float)
    assert spread(correct) == 1.0 - 0.25


def test_the_p_value_is_the_share_of_shufflings():
    """Against all shufflings of a table that is small enough to list them."""
    rows = [(1, 0, 0), (1, 0, 0), (1, 1, 0)]
    kinds = [{(1, 0, 0), (0, 1, 0), (0, 0, 1)}] * 2 + [{(1, 1, 0), (1, 0, 1), (0, 1, 1)}]
    spreads = [spread(np.array(choice, dtype=float)) for choice in product(*kinds)]
    exact = np.mean([value >= spread(np.array(rows, dtype=float)) - 1e-9 for value in spreads])
    assert shuffled_p(np.array(rows, dtype=float)) == pytest.approx(exact, abs=0.03) and 0 < exact < 0.5
    assert shuffled_p(np.eye(5)[[2] * 9]) < 0.001  # always the third
    assert shuffled_p(np.ones((9, 5))) == 1.0


def test_deviation_is_the_distance_from_uniform():
    assert deviation([0.25] * 4) == 0 and deviation([1.0, 0.0, 0.0, 0.0]) == 0.75
    assert deviation([0.5, 0.3, 0.2]) == pytest.approx((0.5 - 1 / 3 + 2 / 3 - 0.5) / 2)


def test_spreads_resampled_hold_the_measured_one():
    correct = np.random.default_rng(3).integers(0, 2, (9, 4)).astype(float)
    low, high = order._spread_bounds(correct)
    assert low <= spread(correct) <= high and high > low
    assert order._spread_bounds(correct, correct) == (0.0, 0.0)
    assert order._spread_bounds(correct[:1]) == (None, None)
    low, high = order._spread_bounds(np.ones((9, 4)), correct)
    assert low <= -spread(correct) <= high <= 0


# items and prompts


@pytest.mark.parametrize("make", [documents, options])
def test_items_depend_on_seed_and_index_alone(make):
    assert make(9, 3)[:4] == make(4, 3) and make(4, 3) != make(4, 4)
    for item in make(40, 0):
        assert len(set(item.members)) == len(set(item.choices)) == MEMBERS >= 5
        assert item.choices[item.gold] in item.members[item.gold]
    assert {item.gold for item in make(40, 0)} == set(range(MEMBERS))


def test_questions_have_one_right_answer():
    for item in options(40, 1):
        kind = item.question.removeprefix("Which option is a kind of ").removesuffix("?")
        assert [WORDS[word] == kind for word in item.members] == [i == item.gold for i in range(MEMBERS)]
    for item in documents(40, 1):
        name = item.question.removeprefix("What is the password of ").removesuffix("?")
        assert [f"of {name} is" in note for note in item.members] == [i == item.gold for i in range(MEMBERS)]
    assert len(WORDS) == sum(map(len, KINDS.values()))  # no word is of two kinds


def test_rotations_put_the_right_one_everywhere():
    members = ("a", "b", "c", "d", "e")
    for gold, position in product(range(5), range(5)):
        turned = rotated(members, gold, position)
        assert turned[position] == members[gold]
        assert turned in [members[i:] + members[:i] for i in range(5)]


def test_prompts_hold_the_members_as_a_set(tiny):
    tokenizer = tiny[1]
    item = options(1, 0)[0]
    batch, facts = prepare(tokenizer, prompt("options", item.question, item.members, item.prefix).messages)
    text = tokenizer.decode(batch["input_ids"][0])
    assert text == "Options:\n" + "".join(f"- {word}\n" for word in item.members) + f"\n{item.question}"
    assert tokenizer.decode(batch["input_ids"][0][facts.member[0] == 2]) == f"- {item.members[2]}\n"
    batch, facts = prepare(tokenizer, content_free("Which?", 3).messages)
    assert tokenizer.decode(batch["input_ids"][0]) == "Options:\nA. N/A\nB. N/A\nC. N/A\n\nWhich?"
    assert int(facts.member.max()) == 2


# models whose answers are known


def options_of(words):
    """The options of a prompt, in their order, or None on one without; and the kind that is asked for."""
    shown = [word for before, word in pairwise(words) if before == "-"]
    kind = " ".join(words[words.index("kind") + 2 : words.index("?")]) if "kind" in words else None
    return shown, kind


def notes_of(words):
    """Whose password is which, in the order of the notes; and whose is asked for."""
    told = [
        (words[i + 2], words[i + 4]) for i, word in enumerate(words[:-4]) if word == "password" and words[i + 3] == "is"
    ]
    return told, words[-2]


def answer_of(words):
    """The right answer, its position, and all candidates in their order."""
    if "notes" in words:
        told, name = notes_of(words)
        right, every = dict(told)[name], [word for _, word in told]
    else:
        every, kind = options_of(words)
        right = next(word for word in every if WORDS[word] == kind)
    return right, every.index(right), every


def always_right(words):
    return EVEN if "N" in words else answer_of(words)[0]


def always_first(words):
    return EVEN if "N" in words else answer_of(words)[2][0]


def blind_at_the_end(words):
    """Right, unless the right one comes last: then the first."""
    if "N" in words:
        return EVEN
    right, position, every = answer_of(words)
    return every[0] if position == MEMBERS - 1 else right


def sometimes_blind(words):
    """As before for some of the right answers, always right for the others."""
    if "N" in words or len(answer_of(words)[0]) % 2:
        return blind_at_the_end(words)
    return always_right(words)


def prefers_b(words):
    return {"A": 0.1, "B": 0.6, "C": 0.1, "D": 0.1, "E": 0.1} if "N" in words else answer_of(words)[0]


def probed(by_hand, rule, monkeypatch=None, **settings):
    model, tokenizer = by_hand(rule)
    if monkeypatch is not None:
        monkeypatch.setattr(Order, "remedies", lambda self, settings: [])
    return Order().run(model, tokenizer, Settings(items=N, **settings))


def rows_of(result, group, method=PLAIN):
    return {row.what: row for row in result.rows if row.group.startswith(group) and row.method == method}


def test_a_model_that_is_always_right(by_hand, monkeypatch):
    found = probed(by_hand, always_right, monkeypatch)
    assert [(one.part, one.method, one.verdict) for one in found.verdicts] == [
        ("documents", PLAIN, NOT_FOUND), ("options", PLAIN, NOT_FOUND),
    ]  # fmt: skip
    for part in ("documents", "options"):
        rows = rows_of(found, part)
        assert (rows["accuracy"].value, rows["accuracy"].high) == (1.0, 1.0) and rows["accuracy"].low == wilson(
            N, N
        ).low
        for what in ("flip rate", "pairs that differ"):
            assert (rows[what].value, rows[what].low, rows[what].high, rows[what].n) == (0.0, 0.0, wilson(0, N).high, N)
        assert rows["best - worst"].value == 0.0 and rows["best - worst"].note == "p = 1"


def test_an_answer_that_follows_the_order_is_no_better_than_chance(by_hand):
    """Right at one position of five, whatever the members: all answers flip, and no remedy is judged."""
    found = probed(by_hand, always_first)
    for one in found.verdicts:
        assert (one.method, one.verdict) == (PLAIN, NO_POWER) and "chance 20%" in one.reading
    rows = rows_of(found, "documents")
    assert [
        rows[what].value for what in ("accuracy", "flip rate", "pairs that differ", "best - worst")
    ] == pytest.approx([0.2, 1, 1, 1])
    assert [rows[f"{k}"].value for k in range(1, 6)] == [1, 0, 0, 0, 0]
    others = [row for row in found.rows if row.method != PLAIN]
    assert {row.method for row in others} == set(map(str, Order().remedies(Settings())))
    assert all((row.status, row.value) == ("not judged", None) and "not above chance" in row.reason for row in others)


def test_a_blind_position_is_seen(by_hand, monkeypatch):
    found = probed(by_hand, blind_at_the_end, monkeypatch)
    for part in ("documents", "options"):
        rows = rows_of(found, part)
        assert rows["accuracy"].value == pytest.approx(0.8) and rows["flip rate"].value == 1.0
        assert rows["pairs that differ"].value == pytest.approx(0.4) and rows["best - worst"].value == 1.0
        assert [rows[f"{k}"].value for k in range(1, 6)] == [1, 1, 1, 1, 0]
        assert (rows["5"].low, rows["5"].high) == (0.0, wilson(0, N).high)
    for one in found.verdicts:
        assert one.verdict == DEPENDS and "accuracy differs by position (100%, 100%, 100%, 100%, 0%" in one.reading
        assert f"answers change in {N} of {N} items" in one.reading


def test_intervals_are_over_items(by_hand, monkeypatch):
    """Five prompts of an item are one item: the width is that of so many items, not prompts."""
    found = probed(by_hand, sometimes_blind, monkeypatch)
    rows = rows_of(found, "options")
    blind = sum(len(item.choices[item.gold]) % 2 for item in options(N, 0))
    assert 0 < blind < N
    assert rows["flip rate"].value == blind / N
    assert (rows["flip rate"].low, rows["flip rate"].high) == (wilson(blind, N).low, wilson(blind, N).high)
    assert rows["pairs that differ"].value == pytest.approx(0.4 * blind / N)
    per_item = np.array([0.4 if len(item.choices[item.gold]) % 2 else 0.0 for item in options(N, 0)])
    half = 2.365 * per_item.std(ddof=1) / N**0.5  # Student's t with 7 degrees of freedom
    assert rows["pairs that differ"].high >= per_item.mean() + half - 1e-3
    assert rows["accuracy"].low <= 1 - per_item.mean() / 2 - half / 2 + 1e-3


def test_letters_that_a_model_prefers(by_hand, monkeypatch):
    letters = rows_of(probed(by_hand, prefers_b, monkeypatch), "options: probability of letters")
    assert letters["B"].value == pytest.approx(0.6, abs=1e-5) and letters["E"].value == pytest.approx(0.1, abs=1e-5)
    assert letters["deviation"].value == pytest.approx(0.4, abs=1e-5) and letters["deviation"].n == N
    even = rows_of(probed(by_hand, always_right, monkeypatch), "options: probability of letters")
    assert even["deviation"].value == pytest.approx(0.0, abs=1e-5)


def test_each_item_is_asked_in_all_its_orders(by_hand, monkeypatch):
    monkeypatch.setattr(Order, "remedies", lambda self, settings: [])
    model, tokenizer = by_hand(always_right)
    Order().run(model, tokenizer, Settings(items=1))
    orders = [options_of(words)[0] for words in model.asked if "-" in words]
    item = options(1, 0)[0]
    assert orders == [list(rotated(item.members, item.gold, p)) for p in range(MEMBERS)]
    assert len(model.asked) == 2 * MEMBERS + 1  # and the letters


# remedies


def records_of(part, method, answers, gold):
    return {
        f"{part}/{method}/{i}": {"answers": said, "correct": [int(a == gold) for a in said]}
        for i, said in enumerate(answers)
    }


BETTER, SAME, WORSE = "SetBasedPrompting()", "PINE()", "JustReadTwice()"


def test_remedies_are_compared_item_by_item():
    """Answers per item by position of the right one, which is 0."""
    plain = [[0, 0, 0, 0, 1], [0, 0, 0, 2, 1], [0, 0, 0, 0, 0], [0, 0, 3, 3, 3], [0, 0, 0, 0, 1], [0, 0, 1, 0, 1]]
    records = records_of(DOCUMENTS, PLAIN, plain, 0)
    records |= records_of(DOCUMENTS, BETTER, [[0] * 5] * 6, 0)
    records |= records_of(DOCUMENTS, SAME, plain, 0)
    records |= records_of(DOCUMENTS, WORSE, [[1, 2, 3, 4, 0]] * 6, 0)
    found = Order().result(Settings(items=6, remedies=(BETTER, SAME, WORSE)), records)
    verdicts = {one.method: one for one in found.verdicts}
    assert {one.part for one in found.verdicts} == {DOCUMENTS}  # the other part has no records
    assert verdicts[PLAIN].verdict == DEPENDS
    assert verdicts[BETTER].verdict == "less dependent on order, accuracy rises"
    assert verdicts[BETTER].reading.startswith("the same answer in every order of every item; ")
    assert verdicts[SAME].verdict == "no change of dependence found, no change of accuracy found"
    assert verdicts[WORSE].verdict == "more dependent on order, accuracy falls"
    assert [name for name, one in verdicts.items() if "is not above chance" in one.reading] == [WORSE]
    rows = rows_of(found, DOCUMENTS, BETTER)
    hits = [row.count(0) / 5 for row in plain]
    assert rows["accuracy"].difference["value"] == pytest.approx(sum(1 - hit for hit in hits) / 6)
    flipped = [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    assert rows["flip rate"].difference["value"] == pytest.approx(-5 / 6)
    assert (rows["flip rate"].difference["low"], rows["flip rate"].difference["high"]) == newcombe([0.0] * 6, flipped)
    pairs = [0.4, 0.7, 0.0, 0.6, 0.4, 0.6]
    assert rows["pairs that differ"].difference["value"] == pytest.approx(-sum(pairs) / 6)
    assert rows["5"].difference["value"] == pytest.approx(1 - 1 / 6)
    assert rows["best - worst"].difference["value"] == pytest.approx(-5 / 6)
    assert all(row.difference is None for row in rows_of(found, DOCUMENTS).values())


def test_a_stopped_remedy_is_compared_on_the_items_that_both_have():
    plain = [[0, 0, 0, 0, 1]] * 3 + [[0] * 5] * 3
    records = records_of(DOCUMENTS, PLAIN, plain, 0) | records_of(DOCUMENTS, BETTER, [[0] * 5] * 3, 0)
    rows = rows_of(Order().result(Settings(items=6, remedies=(BETTER,)), records), DOCUMENTS, BETTER)
    assert rows["accuracy"].n == 3 and rows["accuracy"].difference["value"] == pytest.approx(0.2)


def test_the_default_remedies_are_the_order_methods_that_take_such_prompts():
    found = {str(method) for method in Order().remedies(Settings())}
    assert {"SetBasedPrompting()", "PINE()", "JustReadTwice()"} <= found
    assert not any("Giraffe" in name or "V2PE" in name or "ElementOrdering" in name for name in found)
    assert Order().remedies(Settings(remedies=("Full()", "PINE"))) == [PINE()]


@pytest.fixture(scope="module")
def under_remedies(tiny):
    """A random model, which cannot answer, judged all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order._Arm, "powerful", lambda self, chance: True)
        settings = Settings(items=2, remedies=("SetBasedPrompting()", "PINE()", "JustReadTwice()"))
        return Order().run(*tiny, settings)


@pytest.mark.parametrize("method", [SetBasedPrompting(), PINE()], ids=str)
@pytest.mark.parametrize("part", ["documents", "options"])
def test_an_invariant_remedy_flips_nothing(under_remedies, part, method):
    rows = rows_of(under_remedies, part, str(method))
    assert rows["flip rate"].value == rows["pairs that differ"].value == rows["best - worst"].value == 0.0
    assert {rows[f"{k}"].value for k in range(1, 6)} == {rows["accuracy"].value}
    before = rows_of(under_remedies, part)
    assert before["flip rate"].value == 1.0 and rows["flip rate"].difference["value"] == -1.0


def test_a_remedy_that_is_not_invariant_still_flips(under_remedies):
    assert not under_remedies.failed
    assert rows_of(under_remedies, "documents", "JustReadTwice()")["flip rate"].value > 0


def test_a_remedy_that_fails_is_a_row_that_says_why(tiny, monkeypatch):
    monkeypatch.setattr(order._Arm, "powerful", lambda self, chance: True)
    kept = []
    progress = Progress(kept=lambda: kept.append(1))
    found = Order().run(
        *tiny, Settings(items=2, remedies=("ElementOrdering(by='raster')", "SetBasedPrompting")), progress
    )
    failed = [row for row in found.rows if row.status == "failed"]
    assert found.failed and [(row.group, row.method) for row in failed] == [
        ("documents", "ElementOrdering(by='raster')"), ("options", "ElementOrdering(by='raster')"),
    ]  # fmt: skip
    assert all("box" in row.reason and row.value is None for row in failed)
    assert rows_of(found, "options", "SetBasedPrompting()")["accuracy"].n == 2
    assert progress.done == progress.total == 8 and len(kept) == 10
    again = Progress(progress.records, kept=lambda: kept.append(2))
    assert (
        Order().run(
            None, None, Settings(items=2, remedies=("ElementOrdering(by='raster')", "SetBasedPrompting")), again
        )
        == found
    )
    assert again.done == again.total == 8 and 2 not in kept


# items of your own


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


OPTION = {"question": "Which is red?", "options": ["a ripe tomato", "snow"], "answer": 0}
NOTE = {"question": "Who came?", "documents": ["Anna came.", "Tom left.", "It rained."], "gold": 0, "answer": "Anna"}


def test_items_of_your_own(tiny, tmp_path):
    path = write(tmp_path / "own.jsonl", OPTION, NOTE, "", {**OPTION, "answer": 1}, NOTE)
    parts = read_items(path)
    assert {part: len(items) for part, items in parts.items()} == {"documents": 2, "options": 2}
    found = Order().run(*tiny, Settings(task=path, items=2, remedies=("PINE",)))
    assert [one.verdict for one in found.verdicts] == [NO_POWER, NO_POWER]
    assert "chance 0%" in found.verdicts[0].reading and "chance 50%" in found.verdicts[1].reading
    places = [rows_of(found, f"{part}: accuracy by position") for part in ("documents", "options")]
    assert [list(one) for one in places] == [["1", "2", "3"], ["1", "2"]]
    assert not any("first" in note for note in found.notes)


def test_more_lines_than_items_are_told(by_hand, tmp_path):
    path = write(tmp_path / "own.jsonl", *[OPTION] * 5)
    assert Order().result(Settings(task=path, items=3), {}).notes == [
        "options: the first 3 of 5 lines; --items 5 takes all"
    ]
    assert Order().facts(Settings(task=path))["items"] == {"options": 5} and ITEMS > 5


def test_replies_of_your_own_are_compared_by_what_they_answer(monkeypatch):
    """A right answer in other words is no flip; wrong ones are compared without case and blanks."""
    texts = [" Anna came.", "anna, I think", "  Nobody  ", "nobody", "I do not know"]
    monkeypatch.setattr(order, "replies", lambda *args: texts)
    item = order.Item("Who came?", ("a", "b", "c", "d", "e"), 0, answer="Anna")
    found = order._measured(None, None, DOCUMENTS, item, None)
    assert found == {"answers": ["Anna", "Anna", "nobody", "nobody", "i do not know"], "correct": [1, 1, 0, 0, 0]}


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "line 2: not JSON"),
        ([1], "line 2: must be an object, got list"),
        ({"question": "q"}, "line 2: must have one of the fields 'options' and 'documents'"),
        ({**OPTION, **NOTE}, "line 2: must have one of the fields"),
        ({**OPTION, "question": " "}, "line 2: field 'question' must be a text that is not empty, got ' '"),
        ({**OPTION, "options": "ab"}, "line 2: field 'options' must be a list of texts"),
        ({**OPTION, "options": ["a"]}, "line 2: field 'options' must be a list of 2 to 26 different texts"),
        ({**OPTION, "options": ["a", " a"]}, "different texts"),
        ({**OPTION, "options": ["a", "b", "c"]}, "field 'options' must hold as many as in the first such line, 2"),
        ({**OPTION, "answer": 2}, "line 2: field 'answer' must be a whole number in [0, 1], an index of"),
        ({**OPTION, "answer": True}, "got True"),
        ({**OPTION, "answer": "snow"}, "got 'snow'"),
        ({**NOTE, "gold": -1}, "line 2: field 'gold' must be a whole number in [0, 2]"),
        (dict(list(NOTE.items())[:-1]), "line 2: field 'answer' must be a text that is not empty, got nothing"),
    ],
)  # fmt: skip
def test_bad_lines_say_file_line_and_field(tmp_path, line, said):
    path = write(tmp_path / "own.jsonl", OPTION, line)
    with pytest.raises(UsageError) as caught:
        read_items(path)
    assert said in str(caught.value) and str(caught.value).startswith(path)


def test_files_that_cannot_be_read_or_are_empty(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*none.jsonl"):
        read_items(str(tmp_path / "none.jsonl"))
    with pytest.raises(UsageError, match="has no lines; each is"):
        read_items(write(tmp_path / "empty.jsonl", ""))


def test_words_of_the_generated_items_are_known():
    assert len(set(NOUNS)) == len(NOUNS) >= MEMBERS and len(order.NAMES) >= MEMBERS and len(KINDS) >= MEMBERS
