"""Hyperparameters: what is refused and in which words, and that text and values are the same thing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqwise.core.config import Configured, budget_param, known_classes, param
from seqwise.core.errors import SeqwiseError, UsageError


@dataclass(frozen=True)
class Gadget(Configured):
    """Base of this file's classes, so that `known` lists stay the file's own."""

    abstract: ClassVar[bool] = True


@dataclass(frozen=True)
class Dial(Gadget):
    abstract: ClassVar[bool] = False

    budget: int | float | tuple[int | float, ...] = budget_param(0.5, "what the dial keeps")
    share: float = param(0.25, gt=0, le=1, doc="share of the dial")
    low: int = param(3, ge=0)
    cold: float = param(-1.0, lt=0)
    layers: tuple[int, ...] = param((1, 2), ge=1, doc="layers, from 1")
    pair: tuple[float, float] = (0.0, 1.0)
    mode: Literal["soft", "hard"] = "soft"
    name: str | None = None
    flag: bool = False
    many: tuple[float, ...] | float = param(1.0, ge=0, lt=2)


@dataclass(frozen=True)
class Free(Gadget):
    abstract: ClassVar[bool] = False

    budget: int | float = budget_param(1.0)
    whole: int = param(2, ge=1, le=4)


@dataclass(frozen=True)
class Big(Dial):
    low: int = param(7, ge=5)


RANGE = "must be a whole number of tokens >= 1 or a share in (0.0, 1.0]"
REFUSED: list[tuple[type[Gadget], dict[str, Any], str]] = [
    (Dial, {"share": 0}, "Dial.share must be in (0, 1], got 0 (share of the dial)"),
    (Dial, {"share": 1.5}, "Dial.share must be in (0, 1], got 1.5 (share of the dial)"),
    (Dial, {"share": float("nan")}, "Dial.share must be a number, got nan (share of the dial)"),
    (Dial, {"share": float("inf")}, "Dial.share must be a number, got inf (share of the dial)"),
    (Dial, {"share": "a"}, "Dial.share must be a number, got 'a' (share of the dial)"),
    (Dial, {"share": True}, "Dial.share must be a number, got True (share of the dial)"),
    (Dial, {"low": -1}, "Dial.low must be >= 0, got -1"),
    (Dial, {"low": 1.0}, "Dial.low must be a whole number, got 1.0"),
    (Dial, {"low": False}, "Dial.low must be a whole number, got False"),
    (Dial, {"cold": 0.0}, "Dial.cold must be < 0, got 0.0"),
    (Dial, {"layers": (1, 0)}, "Dial.layers must be >= 1, got 0 (layers, from 1)"),
    (Dial, {"layers": 3}, "Dial.layers must be a tuple of a whole number, got 3 (layers, from 1)"),
    (Dial, {"pair": (1.0,)}, "Dial.pair must be a tuple of a number, got (1.0,)"),
    (Dial, {"mode": "loud"}, "Dial.mode must be one of 'soft', 'hard', got 'loud'"),
    (Dial, {"name": 3}, "Dial.name must be a text or None, got 3"),
    (Dial, {"flag": 1}, "Dial.flag must be True or False, got 1"),
    (Dial, {"many": (0.5, 2.0)}, "Dial.many must be in [0, 2), got 2.0"),
    (Big, {"low": 4}, "Big.low must be >= 5, got 4"),
    (Free, {"whole": 5}, "Free.whole must be in [1, 4], got 5"),
    *(
        (Dial, {"budget": bad}, f"Dial.budget {RANGE}, got {shown} (what the dial keeps)")
        for bad, shown in [
            (0, "0"), (-3, "-3"), (0.0, "0.0"), (1.5, "1.5"), (True, "True"), (None, "None"), ("8", "'8'"), ((), "()"),
            ((0.5, 0), "0"), (float("nan"), "nan"), (float("inf"), "inf"), ([1], "[1]"),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "values", "message"), REFUSED, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_a_bad_value_is_refused_with_field_range_and_value(owner, values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        owner(**values)


def test_a_budget_per_layer_only_where_the_field_takes_one():
    assert Dial(budget=(0.5, 3)).budget == (0.5, 3)
    with pytest.raises(ValueError, match=r"^Free\.budget must be a whole number .*, got \(0\.5, 3\) \(what stays\)$"):
        Free(budget=(0.5, 3))


def test_integers_are_numbers_and_keep_their_type():
    assert str(Dial(share=1)) == "Dial(budget=0.5, share=1)"
    assert Dial(share=1) == Dial(share=1.0)


def test_one_and_one_point_zero_are_different_budgets_in_text():
    assert str(Dial(budget=1)) == "Dial(budget=1)"
    assert str(Dial(budget=1.0)) == "Dial(budget=1.0)"
    assert type(Dial.parse("Big(budget=1)").budget) is int
    assert type(Dial.parse("Big(budget=1.0)").budget) is float


def test_the_budget_is_always_shown_and_defaults_are_not():
    assert str(Dial()) == "Dial(budget=0.5)"
    assert str(Big()) == "Big(budget=0.5)"
    assert str(Big(low=9, mode="hard")) == "Big(budget=0.5, low=9, mode='hard')"


counts = st.integers(1, 10**6)
shares = st.floats(0, 1, exclude_min=True)
budgets = st.one_of(counts, shares)
dials = st.builds(
    Dial,
    budget=st.one_of(budgets, st.lists(budgets, min_size=1, max_size=4).map(tuple)),
    share=st.one_of(shares, st.just(1)),
    low=st.integers(0, 99),
    cold=st.floats(max_value=0, exclude_max=True, allow_infinity=False),
    layers=st.lists(st.integers(1, 40), max_size=4).map(tuple),
    pair=st.tuples(st.floats(-9, 9), st.floats(-9, 9)),
    mode=st.sampled_from(["soft", "hard"]),
    name=st.one_of(st.none(), st.text(max_size=12)),
    flag=st.booleans(),
    many=st.one_of(st.floats(0, 2, exclude_max=True), st.lists(st.floats(0, 1), max_size=3).map(tuple)),
)


@given(dials)
def test_text_and_value_are_the_same_thing(dial):
    again = Gadget.parse(str(dial))
    assert again == dial and str(again) == str(dial) and type(again) is Dial
    assert type(again.budget) is type(dial.budget)


@given(dials)
def test_a_class_reads_its_own_text(dial):
    assert Dial.parse(str(dial)) == dial


def test_lists_are_read_as_tuples_and_spaces_do_not_matter():
    assert Gadget.parse("  Dial( layers=[3,4] , budget = [0.5, 8] ) ") == Dial(layers=(3, 4), budget=(0.5, 8))
    assert Gadget.parse("Dial") == Dial()


NAMES = "budget, share, low, cold, layers, pair, mode, name, flag, many"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Nope()", "unknown gadget 'Nope'; known: Big, Dial, Free"),
        ("Gadget()", "unknown gadget 'Gadget'; known: Big, Dial, Free"),
        ("Dial(size=1)", f"Dial has no field 'size'; it has {NAMES}"),
        ("Dial(0.5)", "cannot read 'Dial(0.5)': every value needs its field's name, as in budget=0.5"),
        ("Dial(**{})", "cannot read 'Dial(**{})': every value needs its field's name, as in budget=0.5"),
        ("Dial(budget=x)", "Dial.budget must be a literal, got 'x'"),
        ("Dial(name=__import__('os').getcwd())", "Dial.name must be a literal, got \"__import__('os').getcwd()\""),
        ("Dial(low=[1 for _ in 'ab'])", "Dial.low must be a literal, got \"[1 for _ in 'ab']\""),
        ("1 + 1", "cannot read '1 + 1': expected Name(field=value)"),
        ("x.Dial()", "cannot read 'x.Dial()': expected Name(field=value)"),
        ("Dial()()", "cannot read 'Dial()()': expected Name(field=value)"),
    ],
)
def test_text_that_cannot_be_read_is_refused_in_one_line(text, message):
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        Gadget.parse(text)


@pytest.mark.parametrize("text", ["", "Dial(", "Dial(budget=)", "Dial() Dial()", "(" * 9999, "Dial(\0)"])
def test_broken_syntax_is_refused_in_one_line(text):
    with pytest.raises(UsageError, match=r"^cannot read .* Write it as Name\(field=value\)$"):
        Gadget.parse(text)


def test_a_repeated_field_is_refused():
    with pytest.raises(UsageError, match="budget"):
        Gadget.parse("Dial(budget=1, budget=2)")


def test_a_bad_value_in_text_gives_the_message_of_the_constructor():
    with pytest.raises(ValueError, match=re.escape("Dial.low must be >= 0, got -1")):
        Gadget.parse("Dial(low=-1)")


def test_another_class_than_the_wanted_is_refused():
    with pytest.raises(UsageError):
        Big.parse("Free()")


def test_known_classes_are_the_concrete_ones_by_name():
    assert known_classes(Gadget) == {"Dial": Dial, "Free": Free, "Big": Big}


def test_a_usage_error_is_the_librarys_own_and_a_value_error():
    assert issubclass(UsageError, SeqwiseError) and issubclass(UsageError, ValueError)
