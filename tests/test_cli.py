"""The command line: one JSON document on stdout, one red line for a user's mistake, a traceback for ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from seqwise import cli
from seqwise.core.errors import UsageError
from seqwise.lab import catalogue

SRC = Path(__file__).resolve().parents[1] / "src"


def run(*args: str) -> int:
    """Exit code of the command line, run in this process."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(args)
    return stopped.value.code or 0


def raising(monkeypatch, error: BaseException, by: str) -> None:
    """Makes `seqwise papers` fail: `error` is raised by a function of the module named `by`."""
    namespace = {"__name__": by, "error": error}
    exec("def papers(): raise error", namespace)
    monkeypatch.setattr(catalogue, "papers", namespace["papers"])


def test_papers_as_json(capsys):
    assert run("papers", "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    document = json.loads(out)
    assert list(document) == ["papers"]
    assert [entry["number"] for entry in document["papers"]] == list(range(1, 97))
    fields = "number slug title arxiv home status object formulas facets verdict stale"
    assert all(list(entry) == fields.split() for entry in document["papers"])
    assert document["papers"][27]["title"].startswith("[CLS] Token")


def test_papers_as_a_table(capsys):
    assert run("papers") == 0
    out = capsys.readouterr().out
    assert "zipcache" in out and "2405.14256" in out and "96 papers" in out


@pytest.mark.parametrize("status", ["planned", "implemented"])
def test_papers_of_one_status(capsys, status):
    assert run("papers", "--json", "--status", status) == 0
    shown = [entry["slug"] for entry in json.loads(capsys.readouterr().out)["papers"]]
    assert shown == [paper.slug for paper in catalogue.papers() if paper.status == status]


@pytest.mark.parametrize(
    "args",
    [["papers", "--status", "done"], ["papers", "--jsn"], ["papers", "extra"], ["paper"], ["--jsn"], []],
    ids=" ".join,
)
def test_what_cannot_be_parsed_exits_2(capsys, args):
    assert run(*args) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_exits_0(capsys):
    assert run("--help") == 0
    assert "papers" in capsys.readouterr().out


@pytest.mark.parametrize("error", [UsageError("no [b]such[/b]\npaper: " + "x" * 200), ValueError("budget: got 2")])
def test_a_users_mistake_is_one_line(monkeypatch, capsys, error):
    raising(monkeypatch, error, by="seqwise.somewhere")
    assert run("papers", "--json") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == " ".join(str(error).split()) + "\n"


@pytest.mark.parametrize(
    "error, by",
    [
        (ValueError("internal"), "torch.somewhere"),
        (ValueError("lookalike"), "seqwise_plugin"),
        (RuntimeError("defect"), "seqwise.somewhere"),
    ],
)
def test_a_defect_propagates(monkeypatch, error, by):
    raising(monkeypatch, error, by)
    with pytest.raises(type(error), match=str(error)):
        cli.main(["papers"])


def test_ctrl_c_exits_130(monkeypatch, capsys):
    raising(monkeypatch, KeyboardInterrupt(), by="seqwise.somewhere")
    assert run("papers") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_papers_needs_no_model_library():
    code = (
        "import sys\nfrom seqwise import cli\ntry: cli.main(['papers', '--json'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'plotly'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["papers"]) == 96
