"""Every registered method keeps the contract: in full on its home family, items 1 to 3 on the others."""

import pytest

from seqwise.testing import FAMILIES, ITEMS, cell, check, examples, home

METHODS = examples()
HOME = [
    pytest.param(method, number, id=f"{name}-{number}-{ITEMS[number][0].replace(' ', '_')}")
    for name, method in METHODS.items()
    for number in ITEMS
]
ELSEWHERE = [
    pytest.param(method, family, id=f"{name}-{family}")
    for name, method in METHODS.items()
    for family in FAMILIES.values()
    if family != home(method)
]


@pytest.mark.parametrize(("method", "number"), HOME)
def test_at_home(method, number):
    check(method, items=(number,))


@pytest.mark.parametrize(("method", "family"), ELSEWHERE)
def test_elsewhere(method, family):
    cell(method, family, items=(1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "family"), ELSEWHERE)
def test_elsewhere_in_full(method, family):
    cell(method, family)
