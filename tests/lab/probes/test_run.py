"""`seqwise probe`: one document on stdout, what is finished survives Ctrl-C, a user's mistake is one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from seqwise import cli
from seqwise.core.errors import UsageError
from seqwise.lab.probes import PROBES, order
from seqwise.lab.probes.base import Probe, Result, Row, Settings, Verdict
from seqwise.lab.probes.order import Order
from seqwise.lab.probes.run import SCHEMA, Probing
from seqwise.lab.rows import PLAIN

SRC = Path(__file__).resolve().parents[3] / "src"
REMEDIES = ("SetBasedPrompting()", "JustReadTwice(repeats=1, question_first=False)")
PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from seqwise.core.method import Method

@dataclass(frozen=True)
class Broken(Method):
    slots: ClassVar[tuple] = ("prompt",)

    def reword(self, ids, segments):
        raise RuntimeError("no\\nidea")
"""


@pytest.fixture(autouse=True)
def judged(monkeypatch):
    """A random model cannot answer; it is judged all the same."""
    monkeypatch.setattr(order._Arm, "powerful", lambda self, chance: True)


def run(*args) -> int:
    """Exit code of the command line, run in this process."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["probe", *map(str, args)])
    return stopped.value.code or 0


def settings_for(folder, **more):
    return Settings(**{"model": folder, "items": 2, "remedies": REMEDIES[:1], **more})


def own(tmp_path):
    """Items that take less time than the generated ones."""
    path = tmp_path / "own.jsonl"
    items = [{"question": f"{i}?", "options": ["a", "b", "c"], "answer": i} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, items)))
    return str(path)


def rows(document, **wanted):
    (found,) = document["probes"]
    return [row for row in found["rows"] if all(row[name] == value for name, value in wanted.items())]


class Told(Probe):
    """Measures nothing and finds one number, or cannot work on any model."""

    asks = "What?"
    reading = "So."
    finding = "None."

    def __init__(self, name, works=True):
        self.name, self.works = name, works

    def facts(self, settings):
        return {}

    def measure(self, model, tokenizer, settings, progress):
        if not self.works:
            raise UsageError("this model\nlacks a part")

    def result(self, settings, records):
        return Result((Verdict("all", PLAIN, "yes", "it is"),), (Row("all", PLAIN, "share", 0.5, n=2),))


def test_a_probe_that_cannot_work_leaves_the_others_their_report(folder, monkeypatch, capsys):
    for one in (Told("first"), Told("second", works=False), Told("third")):
        monkeypatch.setitem(PROBES, one.name, one)
    assert run("first", "second", "third", "--model", folder, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["status"]) for one in found["probes"]] == [
        ("first", "ok"), ("second", "failed"), ("third", "ok"),
    ]  # fmt: skip
    assert found["probes"][1]["notes"] == ["this model lacks a part"] and found["complete"]
    assert run("first", "second", "--model", folder) == 1
    assert "failed: this model lacks a part" in capsys.readouterr().out
    assert run("second", "--model", folder) == 2  # alone it is a plain refusal
    assert "lacks a part" in capsys.readouterr().err


def test_all_runs_every_probe_and_a_file_is_for_one(folder, tmp_path, monkeypatch, capsys):
    names = list(PROBES)
    for name in names:
        monkeypatch.setitem(PROBES, name, Told(name))
    assert run("--all", "--model", folder, "--json") == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["probes"]] == names
    assert run("--all", "--model", folder, "--task", own(tmp_path)) == 2
    assert "--task holds the items of one probe" in " ".join(capsys.readouterr().err.split())


def test_json_on_stdout_is_one_document(folder, tmp_path, capsys):
    out = tmp_path / "r.json"
    options = [word for remedy in REMEDIES for word in ("--remedy", remedy)]
    assert run("order", "--model", folder, "--task", own(tmp_path), *options, "--out", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found | {"date": 0} == json.loads(out.read_text()) | {"date": 0}
    assert found["schema"] == SCHEMA and found["complete"] and found["versions"]["torch"] == torch.__version__
    assert found["settings"]["probes"] == {"order": {"remedies": list(REMEDIES), "items": {"options": 3}}}
    assert list(found["settings"]["files_sha256"]) == [own(tmp_path)] and found["settings"]["seed"] == 0
    (probe,) = found["probes"]
    assert list(probe) == ["name", "asks", "status", "verdicts", "rows", "notes", "reading", "finding"]
    assert [one["method"] for one in probe["verdicts"]] == [PLAIN, *REMEDIES]
    fields = "group method what value low high n difference note status reason"
    assert all(list(row) == fields.split() and row["n"] == 3 for row in probe["rows"])
    assert len(found["records"]["order"]) == 3 * 3
    assert {row["value"] for row in rows(found, what="flip rate", method=REMEDIES[0])} == {0.0}
    # what changes nothing is no different
    for row in rows(found, method=REMEDIES[1]):
        assert row["difference"]["value"] == pytest.approx(0.0, abs=1e-5), row["what"]


def test_the_table_says_what_was_asked_and_how_to_read_it(folder, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(PLUGIN)
    options = ["--plugin", tmp_path / "mine.py", "--remedy", "Broken", "--remedy", "SetBasedPrompting"]
    assert run("order", "--model", folder, "--task", own(tmp_path), "--items", 2, *options) == 1
    out, err = capsys.readouterr()
    shown = " ".join(out.split())
    for words in (
        Order.asks, Order.reading, Order.finding, "flip rate", "accuracy by position of the right one",
        'all options read "N/A"', "options, SetBasedPrompting():", "2 items, 95 % intervals",
        "Broken(): options, failed: RuntimeError: no idea (mine.py, line ", "the first 2 of 3 lines",
    ):  # fmt: skip
        assert words in shown, words
    assert "Traceback" not in err


def test_a_probe_without_power_shows_no_remedy(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(order._Arm, "powerful", lambda self, chance: False)
    assert run("order", "--model", folder, "--task", own(tmp_path), "--remedy", "PINE") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "options: no power; accuracy" in shown and "PINE(): options, not judged: no power" in shown


# stopping and going on


def interrupted(monkeypatch, after: int):
    """Ctrl-C in the middle of the unit after `after`; returns what is measured."""
    units, measured = [], order._measured

    def stop(*args):
        units.append(args)
        if len(units) > after:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(order, "_measured", stop)
    return units


def test_ctrl_c_keeps_what_is_finished_and_resume_goes_on(folder, tmp_path, monkeypatch):
    settings = settings_for(folder, task=own(tmp_path), items=3)
    whole = Probing(["order"], settings)
    whole.run()
    out = tmp_path / "r.json"
    with monkeypatch.context() as patch:
        interrupted(patch, after=4)
        with pytest.raises(KeyboardInterrupt):
            Probing(["order"], settings, out=out).run()
    kept = json.loads(out.read_text())
    assert not kept["complete"] and sorted({row["n"] for row in rows(kept)}) == [1, 3]
    units = interrupted(monkeypatch, after=9)
    resumed = Probing(["order"], settings, out=out, resume=True)
    resumed.run()
    assert len(units) == 2
    assert resumed.document() | {"date": 0} == whole.document() | {"date": 0}


def test_resume_without_out_finds_its_own_place(folder, tmp_path, monkeypatch, capsys):
    args = ["order", "--model", folder, "--task", own(tmp_path), "--remedy", "SetBasedPrompting"]
    with monkeypatch.context() as patch:
        interrupted(patch, after=2)
        assert run(*args) == 130
    out, err = capsys.readouterr()
    assert "--resume" in err and "2 items" in out and "SetBased" not in out
    units = interrupted(monkeypatch, after=9)
    assert run(*args, "--resume", "--json") == 0
    assert len(units) == 4 and json.loads(capsys.readouterr().out)["complete"]


def test_failures_are_resumed_too(folder, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(PLUGIN)
    settings = settings_for(folder, task=own(tmp_path), plugins=(str(tmp_path / "mine.py"),), remedies=("Broken",))
    first = Probing(["order"], settings, out=tmp_path / "r.json")
    first.run()
    monkeypatch.setattr(order, "_measured", None)
    second = Probing(["order"], settings, out=tmp_path / "r.json", resume=True)
    second.run()
    assert second.failed and second.document()["probes"] == first.document()["probes"]


@pytest.mark.parametrize(
    "change, said",
    [({"seed": 1}, "seed was 0, now it is 1"), ({"items": 1}, "probes was"), ({"remedies": ("PINE",)}, "probes was")],
    ids=str,
)
def test_resume_refuses_other_settings(folder, tmp_path, change, said):
    settings = settings_for(folder, task=own(tmp_path))
    Probing(["order"], settings, out=tmp_path / "r.json").run()
    before = (tmp_path / "r.json").read_text()
    other = settings_for(folder, **{"task": own(tmp_path), **change})
    with pytest.raises(UsageError, match=said):
        Probing(["order"], other, out=tmp_path / "r.json", resume=True).run()
    assert (tmp_path / "r.json").read_text() == before


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"schema": "other/9"}'])
def test_resume_refuses_what_is_no_result(folder, tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UsageError, match="cannot resume from"):
        Probing(["order"], settings_for(folder), out=tmp_path / "r.json", resume=True).run()
    assert (tmp_path / "r.json").read_text() == text


def test_a_real_ctrl_c(folder, tmp_path):
    out = tmp_path / "r.json"
    options = ["--model", folder, "--items", "500", "--remedy", "SetBasedPrompting", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "seqwise.cli", "probe", "order", *options],
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in the background lets its children ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    limit = time.monotonic() + 60
    while not out.exists() and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr and "accuracy" in stdout
    assert json.loads(out.read_text())["records"]["order"]


def test_a_full_disk_leaves_the_old_result(folder, tmp_path, monkeypatch, capsys):
    def full(path, document):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seqwise.lab.keeping.write_json", full)
    out = tmp_path / "r.json"
    out.write_text("before")
    args = ["order", "--model", folder, "--task", own(tmp_path), "--items", 1, "--remedy", "Full()"]
    assert run(*args, "--out", out) == 2
    assert "cannot write" in capsys.readouterr().err and out.read_text() == "before"
    assert run(*args) == 0
    assert "cannot keep results" in capsys.readouterr().err


# a user's mistakes


@pytest.mark.parametrize(
    "args, said",
    [
        ([], "name a probe; there are order"),
        (["ordre"], "unknown probe 'ordre'; there are order"),
        (["order", "ordre"], "unknown probe 'ordre'"),
        (["order", "--model", "/no/such/folder"], "cannot load model '/no/such/folder'"),
        (["order", "--remedy", "Nothing"], "unknown method 'Nothing'"),
        (["order", "--remedy", "PINE(x=1)"], "no field 'x'"),
        (["order", "--items", "0"], "--items must be a whole number >= 1, got 0"),
        (["order", "--seed", "-1"], "--seed must be"),
        (["order", "--task", "missing.jsonl"], "cannot read missing.jsonl"),
        (["order", "--plugin", "missing.py"], "no plugin at missing.py"),
        (["order", "--dtype", "float33"], "float33"),
        (["order", "--out", "/no/folder/r.json"], "does not exist"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, capsys, args, said):
    assert run(*([] if "--model" in args else ["--model", folder]), *args) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and err.count("\n") == 1
    assert said in err


def test_a_prompt_longer_than_the_model_is_a_mistake(folder, tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"question": "q" * 1200, "options": ["a", "b"], "answer": 0}))
    assert run("order", "--model", folder, "--task", path, "--remedy", "Full()") == 2
    assert "more than the 1200 positions" in capsys.readouterr().err
