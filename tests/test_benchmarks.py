"""Each benchmark runs at a tiny size, checks its results before it times, and prints JSON or a table."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqwise.methods import FoPru
from seqwise.methods.cache.hip_attention import rounds
from seqwise.testing import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


def call(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def rows_of(script, *arguments):
    done = call(script, *arguments, "--rounds", 1, "--threads", 1, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["settings"].keys() >= {"torch", "transformers", "python", "processor", "threads"}
    assert answer["settings"]["threads"] == 1
    assert answer["rows"] and all(row["checked"] for row in answer["rows"])
    return answer["rows"]


@pytest.fixture(scope="module")
def visual_pruning():
    sys.path.insert(0, str(BENCHMARKS))  # the scripts share two modules beside them
    try:
        spec = importlib.util.spec_from_file_location("visual_pruning", BENCHMARKS / "visual_pruning.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def test_attention_statistics():
    (row,) = rows_of("attention_statistics.py", 65, "--shape", "smollm2")
    assert row["tokens"] == 65 and row["fused"] > 0 and row["speedup"] == row["eager"] / row["streamed"]


def test_a_table_names_the_versions(visual_pruning, capsys):
    visual_pruning.report(
        "speed", [{"case": "plain", "ratio": 1.0}, {"case": "ours"}], {"case": str, "ratio": str}, False
    )
    table = capsys.readouterr().out
    assert "speed" in table and "ours" in table and "None" not in table
    assert f"torch {torch.__version__}" in table and "threads" in table


@pytest.mark.slow
def test_prefill():
    rows = {row["method"]: row for row in rows_of("prefill.py", 65)}
    assert rows["plain"]["ratio"] == 1
    assert {name.partition("(")[0]: row["kept"] for name, row in rows.items()} == {
        **dict.fromkeys(("plain", "ZipCache"), 65),
        **dict.fromkeys(("SnapKV", "Recent", "A2SF", "H2O"), 16),
    }


@pytest.mark.slow
def test_prefill_says_why_kvpress_did_not_run():
    done = call("prefill.py", 33, "--rounds", 1, "--kvpress", sys.executable)  # which has no kvpress
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "kvpress_prefill.py failed: kvpress is not installed here" in done.stderr


def test_kvpress_script_without_kvpress_says_what_to_do():
    done = call("kvpress_prefill.py")
    assert done.returncode == 0 and not done.stdout  # `make bench` runs it, too
    assert "kvpress is not installed here" in done.stderr and "prefill.py" in done.stderr


@pytest.mark.slow
def test_decode():
    rows = {row["case"]: row for row in rows_of("decode.py", 65, "--budget", 16)}
    plain, recent, tidal = rows["plain"], rows["recent"], rows["TidalDecode"]
    assert plain["predicted"] == plain["measured"] == plain["agree"] == rows["full"]["agree"] == 1
    assert rows["full"]["cache bytes"] == plain["cache bytes"]
    assert recent["kept"] == 16 and rows["A2SF, prefill"]["kept"] == 16 + 2 * 16 and plain["kept"] == 65 + 2 * 16
    weights = plain["weight bytes"]
    assert recent["cache bytes"] == plain["cache bytes"] * 16 / plain["kept"]
    assert recent["predicted"] == (weights + recent["cache bytes"]) / (weights + plain["cache bytes"])
    # 30 layers: 0, 1, the two that select, and 26 that read 16 slots for each of three query heads per KV head
    assert tidal["cache bytes"] == pytest.approx(plain["cache bytes"] * (4 + 26 * 48 / plain["kept"]) / 30)


@pytest.mark.slow
def test_cache_bytes():
    rows = rows_of("cache_bytes.py", 800, "--budget", 200, "--chunk", 256)
    stored = {(row["case"], row["type"]): row for row in rows if row["part"] == "storage"}
    assert all(row["counted"] == row["claimed"] and row["tokens"] == 200 for row in stored.values())
    assert stored["Full", "float32"]["of 16 bit"] == 0.5 and stored["Recent", "bfloat16"]["of 16 bit"] == 4
    zipped = stored["ZipCache", "float32"], stored["ZipCache", "bfloat16"]
    assert zipped[0]["counted"] == zipped[1]["counted"] and 4 < zipped[0]["of 16 bit"] < 5  # 3.2 bits and parameters
    peaks = {row["case"]: row for row in rows if row["part"] == "peak"}
    assert peaks["plain"]["cache peak"] == peaks["plain, chunks"]["cache peak"] == 30 * 3 * 800 * 128 * 4
    assert peaks["A2SF, chunks"]["cache peak"] < 0.5 * peaks["plain"]["cache peak"]
    assert all(row["memory peak"] > 0 for row in peaks.values())


@pytest.mark.slow
def test_token_recycling():
    rows = {(row["prompts"], row["case"]): row for row in rows_of("token_recycling.py", 6, "--nodes", 10)}
    assert len(rows) == 2 * 4
    for prompts in ("prose", "repetitive"):
        assert rows[prompts, "greedy"]["forwards"] == rows[prompts, "greedy"]["time"] == 1
    assert rows["repetitive", "prompt lookup"]["forwards"] < 1


@pytest.mark.slow
def test_visual_pruning():
    names = [word for name in ("FoPru", "FlowCut", "AveragePool") for word in ("--method", name)]
    rows = rows_of("visual_pruning.py", "--width", 256, "--layers", 3, *names)
    assert rows[0]["theory"] == rows[0]["measured"] == rows[0]["peak"] == 1 and rows[0]["rows"] == 640
    by_case = {(row["case"], round(row["share"], 3)): row for row in rows}
    assert by_case["FoPru", 0.25]["rows"] == by_case["FlowCut", 0.25]["rows"] == 64 + 144
    assert by_case["FlowCut", 0.25]["theory"] < by_case["FoPru", 0.25]["theory"], "its tower runs on fewer patches"
    theory = [by_case["FoPru", share]["theory"] for share in (0.5, 0.25, 0.111, 0.062)]
    assert 1 > theory[0] > theory[1] > theory[2] > theory[3] > 0
    assert all(0 < row["own"] < 1 for row in rows[1:])


def test_visual_pruning_needs_whole_heads(visual_pruning, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["visual_pruning.py", "--width", "300"])
    with pytest.raises(SystemExit, match="2"):
        visual_pruning.main()
    assert "--width must be a multiple of 256, got 300" in capsys.readouterr().err


def test_visual_pruning_times_what_is_in_a_methods_hooks_alone(visual_pruning):
    method, model = FoPru(budget=0.5), FAMILIES["llava"].tiny()
    before = dict(vars(FoPru))
    with visual_pruning.own_seconds(method) as took:
        assert took == [0.0]
        visual_pruning.prefill(model, FAMILIES["llava"].prompt(9), method)
    assert 0 < took[0] < 60 and dict(vars(FoPru)) == before


@pytest.mark.slow
def test_lexrank():
    pytest.importorskip("sumy")
    rows = {row["against"]: row for row in rows_of("lexrank.py", 60)}
    assert set(rows) == {"lexrank", "sumy"} and all(
        row["difference"] < 1e-6 and row["checked"] for row in rows.values()
    )


@pytest.mark.slow
def test_sparse_read():
    small = ("--heads", 4, "--kv-heads", 2, "--head-size", 16, "--prefill-heads", 1, "--prefill-dtype", "float32")
    rows = rows_of("sparse_read.py", 3000, *small, "--prefill", 800, 1200, 1600, "--real", 120)
    steps = {row["case"]: row for row in rows if row["part"] == "decode"}
    assert steps["full"]["mass"] == steps["full"]["speedup"] == 1 and steps["full"]["keys"] == 3000 + (1 + 18) / 2
    hip = 16 + 512 + 256 + rounds(3000, 512, 2, 256) * 2 * 512 / 8
    assert steps["HiPAttention"]["keys"] == hip and steps["TokenSelect, each step"]["anew"] == pytest.approx(1)
    full = steps["full"]["keys"]
    assert steps["TidalDecode"]["keys"] == pytest.approx((4 * full + 28 * 256) / 32)
    assert all(0.2 < row["mass"] <= 1 and row["aim"] is None for row in steps.values())
    prompts = [row for row in rows if row["part"] == "prefill"]
    assert [row["exponent"] is not None for row in prompts] == [False] * 4 + [True] * 2 and prompts[-1]["aim"] == 1.2
    real = {row["case"]: row for row in rows if row["part"] == "recall"}
    for case in ("HiPAttention", "TokenSelect", "TidalDecode"):
        assert real[case]["read"] == real[f"{case}: best"]["read"] < 1
        assert real[case]["mass"] < real[f"{case}: best"]["mass"]
