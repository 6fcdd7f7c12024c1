"""The worked example of CONTRIBUTING.md does what the text says of it."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from seqwise import cli
from seqwise.testing import FAMILIES, check

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = TEXT.partition("## Add a paper in an afternoon\n")[2].partition("\n## ")[0]


def block(language: str, number: int = 0) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTION, re.DOTALL | re.MULTILINE)[number]


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """key_norm.py as the text has it, in the current folder."""
    (tmp_path / "key_norm.py").write_text(block("python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SEQWISE_CACHE", str(tmp_path / "cache"))
    yield importlib.import_module("key_norm")
    del sys.modules["key_norm"]


@pytest.fixture(scope="module")
def folder(byte_llama):
    """A Llama whose tokens are bytes, with more layers than the example skips."""
    return byte_llama(num_hidden_layers=4, max_position_embeddings=600)


def test_it_is_about_forty_lines():
    assert len(block("python").splitlines()) <= 45


def test_the_formula(plugin):
    keys = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    expected = [[[-(sum(x * x for x in key) ** 0.5) for key in head] for head in sample] for sample in keys.tolist()]
    torch.testing.assert_close(plugin.norm_score(keys), torch.tensor(expected))


def test_it_keeps_the_keys_of_smallest_norm(plugin):
    family = FAMILIES["llama"]
    model, batch = family.tiny(), family.prompt(33)
    with torch.no_grad():
        keys = [layer.keys for layer in model(**batch).cache.layers]
        with plugin.KeyNorm(budget=10, skip=1).on(model) as run:
            model(**batch)
    assert run.kept(0) == [[list(range(33))] * 2], "skipped"
    smallest = keys[1][0].norm(dim=-1).topk(10, largest=False).indices.sort().values  # (Hkv, 10)
    assert run.kept(1) == [smallest.tolist()]


def test_the_command(plugin, folder, capsys):
    words = shlex.split(block("sh"))
    assert words[0] == "seqwise"
    small = ["--model", folder, "--task", "needle", "--length", "160", "--prompts", "2", "--json"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words[1:], *small])
    assert not stopped.value.code
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert list(dict.fromkeys(row["method"] for row in rows)) == [
        "Full()", "KeyNorm(budget=0.25)", "Recent(budget=0.25)"
    ]  # fmt: skip
    mine = [row for row in rows if row["method"] == "KeyNorm(budget=0.25)"]
    assert all(row["status"] == "ok" and row["acted"] for row in mine)
    assert all(0.55 < row["kept_share"] < 0.75 for row in mine), "half of the layers keep a quarter of the prompt"


def test_the_contract(plugin, capsys):
    exec(block("python", 1), {})
    shown = capsys.readouterr().out.splitlines()
    assert "'1 identity', '2 restore', '3 padding', '4 less work'" in shown[0] and "'9 report'" in shown[0]
    assert shown[1] == "['1 identity', '2 restore', '3 padding']"


def test_the_contract_would_notice(plugin):
    class Blind(plugin.KeyNorm):
        def retain(self, view):
            return None

    with pytest.raises(AssertionError, match="never acted"):
        check(Blind(budget=0.4, skip=0), items=(9,))
