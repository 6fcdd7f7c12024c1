"""What a method adds to the prefill of a language model (SmolLM2-135M-Instruct, float32, one prompt).

    python benchmarks/prefill.py 2048 4096

ratio:  the prefill under the method / the plain model's, which runs `scaled_dot_product_attention`
aim:    at 4,096 tokens; A2SF and H2O need every row's attention, SnapKV a window of the last rows
kept:   cache slots per layer and KV head afterwards

A method acts on the cache after each layer's attention, so the prompt's own logits must stay the plain model's: that is
checked before anything is timed. Attaching the method is timed too.

`--kvpress PYTHON` repeats it with kvpress 0.5.5 under another interpreter, on the same weights, and sets its ratios (to
the plain model in that interpreter) beside ours. kvpress needs an older transformers, hence an environment of its own:

    python -m venv kv && kv/bin/pip install torch==2.13.0 && kv/bin/pip install kvpress==0.5.5 'transformers<5.3'
    python benchmarks/prefill.py 2048 --kvpress kv/bin/python
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import arguments, medians, report
from prompts import prose, start
from torch import Tensor
from transformers import PreTrainedModel

from seqwise.core.method import Method
from seqwise.core.run import Report
from seqwise.lab.zoo import load_model
from seqwise.methods import A2SF, H2O, Recent, SnapKV, ZipCache

SHARE = 0.25
METHODS = (SnapKV(budget=SHARE), Recent(budget=SHARE), ZipCache(), A2SF(budget=SHARE), H2O(budget=SHARE))
AIMS = {"SnapKV": 1.03, "A2SF": 1.3, "H2O": 1.3}


def plain(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (1, 1, V) of the last token."""
    logits: Tensor = model(ids, logits_to_keep=1).logits
    return logits


def under(method: Method, model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Report]:
    with method.on(model) as run:
        logits = plain(model, ids)
    return logits, run.report()


def case(method: Method, model: PreTrainedModel, ids: Tensor) -> Callable[[], Any]:
    def prefill() -> Tensor:
        with method.on(model):
            return plain(model, ids)

    return prefill


def measure(model: PreTrainedModel, ids: Tensor, rounds: int) -> list[dict[str, Any]]:
    n = ids.shape[1]
    expected = plain(model, ids)
    kept: dict[str, float] = {"plain": float(n)}
    for method in METHODS:
        logits, facts = under(method, model, ids)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        slots = n if isinstance(method, ZipCache) else int(SHARE * n)
        if set(facts.kept) != {float(slots)}:
            raise AssertionError(f"{method} must keep {slots} slots per layer and head, keeps {facts.kept}")
        kept[str(method)] = facts.kept[0]
    cases = {"plain": lambda: plain(model, ids)} | {str(method): case(method, model, ids) for method in METHODS}
    took = medians(cases, rounds)
    return [
        {
            "method": name,
            "tokens": n,
            "seconds": seconds,
            "ratio": seconds / took["plain"],
            "aim": AIMS.get(name.partition("(")[0]),
            "kept": kept[name],
            "checked": True,
        }
        for name, seconds in took.items()
    ]


def kvpress(python: str, model: PreTrainedModel, n: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Rows of `kvpress_prefill.py` under another interpreter. Raises RuntimeError where that fails."""
    script = Path(__file__).with_name("kvpress_prefill.py")
    command = [python, str(script), str(n), "--model", model.name_or_path, "--share", str(SHARE)]
    command += ["--rounds", str(rounds), "--threads", str(threads), "--json"]
    there = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, capture_output=True, text=True, env=there)
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"{python} {script.name} failed: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    answer = json.loads(done.stdout)
    versions = answer["settings"]
    rows: list[dict[str, Any]] = answer["rows"]
    return [row | {"method": f"kvpress: {row['method']}", "versions": versions} for row in rows]


def main() -> None:
    parser = arguments("Prefill under each method, against the plain model's.")
    parser.set_defaults(threads=1, rounds=2)
    parser.add_argument("tokens", type=int, nargs="*", default=[2048], help="lengths of the prompt")
    parser.add_argument("--kvpress", metavar="PYTHON", help="an interpreter that has kvpress, to compare with")
    options = parser.parse_args()
    model, tokenizer = start(options)
    rows: list[dict[str, Any]] = []
    for n in options.tokens:
        rows += measure(model, prose(tokenizer, n), options.rounds)
        if options.kvpress:
            copy = load_model()[0]  # the first load may have read the wheel; a later one reads the safetensors copy
            try:
                rows += kvpress(options.kvpress, copy, n, options.rounds, options.threads)
            except (RuntimeError, OSError) as error:
                sys.exit(str(error))
    columns: dict[str, Callable[[Any], str]] = {
        "method": str,
        "tokens": str,
        "seconds": "{:.3f} s".format,
        "ratio": "{:.3f}".format,
        "aim": "{:.2f}".format,
        "kept": "{:.0f}".format,
    }
    report("prefill", rows, columns, options.json)
    if options.kvpress and not options.json:
        print("kvpress ran on", ", ".join(f"{name} {version}" for name, version in rows[-1]["versions"].items()))


if __name__ == "__main__":
    main()
