"""What is recorded of the contract, and the table that the documentation makes of it."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from seqwise.lab import catalogue
from seqwise.testing import FAMILIES, contract, examples, record

BUILD = Path(__file__).resolve().parents[2] / "docs" / "build.py"


def test_what_is_recorded(tmp_path, monkeypatch):
    shown = {name: method for name, method in examples().items() if name in ("Recent", "FoPru")}
    monkeypatch.setattr(contract, "examples", lambda: shown)
    monkeypatch.setattr(contract, "FAMILIES", {name: FAMILIES[name] for name in ("llama", "llava", "gpt2")})
    document = record(tmp_path / "contract.json", items=(1, 2, 3))
    assert json.loads((tmp_path / "contract.json").read_text(encoding="utf-8")) == document
    recent = document["Recent"]
    assert (recent["family"], recent["passed"], recent["items"]) == ("llama", True, [1, 2, 3])
    assert recent["matrix"] == {"llava": "1-3", "gpt2": "1-3"}
    fopru = next(entry for entry in document.values() if entry["family"] == "llava")
    assert set(fopru["matrix"]) == {"llama", "gpt2"}
    assert all(text.startswith("refused: ") and "vision tower" in text for text in fopru["matrix"].values())


def test_a_papers_object_is_recorded_under_its_slug(monkeypatch):
    paper = catalogue.Paper(
        *(1, "fo-pru", "FoPru", "2411.14164", "methods/reduce/fopru.py", "implemented"),
        object="seqwise.methods.reduce.fopru:FoPru",
    )
    monkeypatch.setattr(catalogue, "papers", lambda: (paper,))
    assert contract._key(examples()["FoPru"]) == "fo-pru"
    assert contract._key(examples()["Recent"]) == "Recent"


def test_the_table_method_by_family(tmp_path, monkeypatch):
    fopru = {"family": "llava", "passed": True, "items": [1, 2], "refused": {"chunked prefill": "no <images>"}}
    fopru["matrix"] = {"llama": "refused: needs a tower", "qwen3": "1-3, 5"}
    recent = {
        "family": "llama",
        "passed": False,
        "items": [],
        "failed": "failed: it",
        "matrix": {"llava": "failed: so"},
    }
    passes = {"fopru": fopru, "Recent": recent}
    monkeypatch.setattr(catalogue, "contract_passes", lambda: passes)
    spec = importlib.util.spec_from_file_location("docs_build_contract", BUILD)
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    docs.build(tmp_path)
    page = re.sub(r">\s+<", "><", (tmp_path / "contract.html").read_text(encoding="utf-8"))
    assert "<th>llama</th><th>qwen3</th><th>llava</th>" in page
    assert '<td>fopru</td><td title="refused: needs a tower"></td><td>1-3, 5</td><td><b>1, 2</b></td>' in page
    assert '<td>Recent</td><td><b>failed</b></td><td></td><td title="failed: so">failed</td>' in page
    assert "<dd>chunked prefill: no &lt;images&gt;</dd>" in page
    assert '<a href="papers/fopru.html">' in page and 'href="papers/Recent.html"' not in page


def test_the_command_fails_only_if_something_failed(monkeypatch):
    command = importlib.import_module("seqwise.testing.__main__")
    entry = {"family": "llama", "passed": True, "items": [1], "matrix": {"gpt2": "refused: no", "llava": "1"}}
    monkeypatch.setattr(command, "record", lambda: {"Good": entry})
    with pytest.raises(SystemExit) as exit_:
        command.main()
    assert exit_.value.code == 0
    monkeypatch.setattr(command, "record", lambda: {"Bad": {**entry, "failed": "failed: x"}, "Good": entry})
    with pytest.raises(SystemExit, match=r"^Bad on llama: failed: x$"):
        command.main()
