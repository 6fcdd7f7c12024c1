"""Every registered method keeps the contract: in full on its home family, items 1 to 3 on the others."""

import json

import pytest

from seqwise.testing import FAMILIES, ITEMS, cell, check, examples, home, record

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


def test_what_is_on_record(tmp_path, monkeypatch):
    shown = {"Recent": METHODS["Recent"], "FoPru": METHODS["FoPru"]}
    monkeypatch.setattr("seqwise.testing.contract.examples", lambda: shown)
    monkeypatch.setattr(
        "seqwise.testing.contract.FAMILIES", {name: FAMILIES[name] for name in ("llama", "llava", "gpt2")}
    )
    document = record(tmp_path / "contract.json", items=(1, 2, 3))
    assert json.loads((tmp_path / "contract.json").read_text(encoding="utf-8")) == document
    recent = document["Recent"]
    assert (recent["family"], recent["passed"], recent["items"]) == ("llama", True, [1, 2, 3])
    assert recent["matrix"] == {"llava": "1-3", "gpt2": "1-3"}
    fopru = next(entry for entry in document.values() if entry["family"] == "llava")
    assert set(fopru["matrix"]) == {"llama", "gpt2"}
    assert all(text.startswith("refused: ") and "vision tower" in text for text in fopru["matrix"].values())
