"""Methods as words, and their composition by slots."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, dataclass, replace
from itertools import permutations
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqwise.core.errors import SeqwiseError, SlotConflict, UsageError
from seqwise.core.method import SLOTS, Composition, Method, budget_param, param, seeded


@dataclass(frozen=True)
class Cutter(Method):
    budget: int | float = budget_param(0.5, "rows kept")
    deep: bool = False

    slots: ClassVar[tuple[str, ...]] = ("layer.rows",)

    def identity(self) -> Method:
        return replace(self, budget=1.0)


@dataclass(frozen=True)
class Holder(Method):
    budget: int | float | tuple[int | float, ...] = budget_param(0.5, "slots kept")
    forget: float = param(0.9, ge=0, le=1)

    slots: ClassVar[tuple[str, ...]] = ("cache.retain",)

    def identity(self) -> Method:
        return replace(self, budget=1.0)


@dataclass(frozen=True)
class Packer(Method):
    bits: tuple[int, ...] = param((4, 2), ge=1, le=8)

    slots: ClassVar[tuple[str, ...]] = ("cache.store",)


@dataclass(frozen=True)
class Everything(Method):
    slots: ClassVar[tuple[str, ...]] = ("input.rows", "cache.retain", "decode.loop")


budgets = st.one_of(st.integers(1, 9999), st.floats(0, 1, exclude_min=True))
cutters = st.builds(Cutter, budget=budgets, deep=st.booleans())
holders = st.builds(
    Holder, budget=st.one_of(budgets, st.lists(budgets, min_size=1, max_size=3).map(tuple)), forget=st.floats(0, 1)
)
packers = st.builds(Packer, bits=st.lists(st.integers(1, 8), max_size=3).map(tuple))
compositions = st.tuples(cutters, holders, packers).flatmap(
    lambda three: st.integers(2, 3).flatmap(
        lambda n: st.sampled_from([Composition.of(*p[:n]) for p in permutations(three)])
    )
)


@given(st.one_of(cutters, holders, packers, compositions))
def test_text_and_method_are_the_same_thing(method):
    again = Method.parse(str(method))
    assert again == method and str(again) == str(method) and type(again) is type(method)
    assert hash(again) == hash(method)


@given(st.tuples(cutters, holders, packers))
def test_the_order_of_writing_has_no_meaning(methods):
    texts = {str(a | b | c) for a, b, c in permutations(methods)} | {
        str(a | (b | c)) for a, b, c in permutations(methods)
    }
    assert len(texts) == 1
    a, b, c = methods
    assert (a | b | c).parts == methods, "the engine goes through them in the order of the slots"


def test_two_claims_to_one_slot_are_refused_by_name():
    message = "Holder(budget=0.5) and Everything() both claim the slot 'cache.retain'; use one of them"
    with pytest.raises(SlotConflict, match=f"^{re.escape(message)}$") as refusal:
        Holder() | Everything()
    assert isinstance(refusal.value, SeqwiseError) and isinstance(refusal.value, ValueError)
    with pytest.raises(SlotConflict, match=r"both claim the slot 'layer.rows'"):
        Method.parse("Cutter(budget=3) | Packer() | Cutter(budget=4)")


@pytest.mark.parametrize("other", [3, "Holder()", None])
def test_only_methods_compose(other):
    with pytest.raises((UsageError, TypeError)):
        Cutter() | other


@pytest.mark.parametrize(
    "text", ["Cutter() | 3", "Cutter() + Holder()", "Cutter() |", "Cutter() or Holder()", "| Cutter()"]
)
def test_text_that_is_no_composition(text):
    with pytest.raises(UsageError, match=r"^cannot read "):
        Method.parse(text)


def test_an_unknown_method_is_answered_with_the_known_ones():
    with pytest.raises(UsageError, match=r"^unknown method 'Nope'; known: .*\bCutter, .*\bHolder\b"):
        Method.parse("Nope() | Cutter()")
    with pytest.raises(UsageError, match=r"unknown method 'Composition'"):
        Method.parse("Composition()")


def test_parsing_as_one_class_refuses_others():
    assert Holder.parse("Holder(budget=3)") == Holder(budget=3)
    with pytest.raises(UsageError):
        Holder.parse("Cutter()")


def test_a_composition_is_identity_where_all_its_members_are():
    assert (Cutter() | Holder(forget=0.5)).identity() == (Cutter(budget=1.0) | Holder(budget=1.0, forget=0.5))
    assert (Cutter() | Packer()).identity() is None
    assert Packer().identity() is None


def test_a_method_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Cutter().budget = 3


def test_a_misspelt_slot_is_refused_when_the_class_is_made():
    with pytest.raises(TypeError, match=r"^Wrong\.slots names 'cache\.keep'; slots are prompt, tower\.rows, "):
        type("Wrong", (Method,), {"slots": ("cache.keep",)})


def test_slots_are_the_documented_ones():
    assert SLOTS == (
        "prompt", "tower.rows", "input.rows", "layer.rows", "hidden", "attention.probs", "attention.kernel",
        "positions", "mask", "cache.retain", "cache.store", "cache.read", "decode.loop",
    )  # fmt: skip


def test_chance_depends_on_seed_layer_and_sample_only():
    def draw(*key):
        return torch.rand(4, generator=seeded(*key, torch.device("cpu"))).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(s, layer, key)) for s in range(4) for layer in range(4) for key in range(4)}) == 64
