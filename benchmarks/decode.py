"""Seconds per decoded token after a long prompt (SmolLM2-135M-Instruct, float32), against the bytes that a step reads.

    python benchmarks/decode.py 8192 --budget 512

cache:      MiB of keys and values that a step reads, by the model below
predicted:  (weights + cache) / the same of the plain model: the ratio of times if a step only waits for memory
measured:   ratio of times
agree:      share of steps whose most likely token is the plain model's

A step reads every weight once (the tied embedding as the head) and every slot's keys and values as they are stored.
TidalDecode reads a whole layer where it selects and `budget` slots per query head elsewhere. ZipCache's packed bytes
are what a kernel that unpacks in registers would read; here they are unpacked into memory first. Nor does the model
know that the plain model's cache is copied whole at each step and ours is not (the row "full"), that eviction at each
step moves the slots that stay, and that TidalDecode first gathers what it reads.

All cases are fed the same text that goes on after the prompt, in blocks of steps that take turns. Before, on a short
prompt, the steps of every method under its identity settings must give the plain model's logits, and every cache must
hold the slots that its budget allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from common import arguments, medians, report
from prompts import prose, start
from torch import Tensor
from transformers import PreTrainedModel

from seqwise.core.method import Method
from seqwise.core.run import Report
from seqwise.methods import A2SF, Full, Recent, TidalDecode, ZipCache
from seqwise.methods.cache.tidal_decode import schedule

BLOCK = 16  # steps that are timed at once


class Decoding:
    """One case: the cache that its prefill left, and steps over given tokens."""

    def __init__(self, model: PreTrainedModel, method: Method | None, prompt: Tensor, text: Tensor) -> None:
        self.model, self.method, self.text = model, method, text
        self.logits: list[Tensor] = []  # (1, V) of each step
        self.report: Report | None = None
        with self.attached() as run:
            out = model(prompt, use_cache=True, logits_to_keep=1)
            self.cache = out.cache
        self.filled: Report | None = None if run is None else run.report()  # after the prompt alone

    def attached(self) -> Any:
        return nullcontext() if self.method is None else self.method.on(self.model)

    def steps(self, count: int = BLOCK) -> None:
        """`count` more tokens of the text, one by one."""
        with self.attached() as run:
            for _ in range(count):
                at = len(self.logits)
                out = self.model(self.text[:, at : at + 1], cache=self.cache, use_cache=True, logits_to_keep=1)
                self.logits.append(out.logits[:, -1])
        self.report = None if run is None else run.report()


def check_identity(model: PreTrainedModel, methods: list[Method], ids: Tensor) -> None:
    """A fast wrong answer is none. ids: (1, n), the last 4 of them as steps."""
    prompt, text = ids[:, :-4], ids[:, -4:]
    plain = Decoding(model, None, prompt, text)
    plain.steps(4)
    for method in methods:
        same = method.identity()
        if same is not None:
            case = Decoding(model, same, prompt, text)
            case.steps(4)
            torch.testing.assert_close(torch.cat(case.logits), torch.cat(plain.logits), rtol=1e-3, atol=1e-3)


def check_kept(method: Method, facts: Report, n: int, budget: int) -> None:
    expected = min(budget, n) if "cache.retain" in method.slots and not isinstance(method, Full) else n
    if set(facts.kept) != {float(expected)}:
        raise AssertionError(f"{method} must keep {expected} slots per layer and head, keeps {facts.kept}")


def weight_bytes(model: PreTrainedModel) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())  # shared ones come once


def cache_bytes_read(method: Method | None, facts: Report, model: PreTrainedModel) -> float:
    """By the model in the head of this file, for the next step."""
    config: Any = model.config
    if isinstance(method, TidalDecode):
        L, heads = config.num_hidden_layers, config.num_attention_heads / config.num_key_value_heads
        roles = schedule(L, method.start, method.correction)
        share = min(1.0, int(method.budget) * heads / facts.tokens)
        return facts.plain_bytes * sum(share if role == "reuse" else 1.0 for role in roles) / L
    return facts.plain_bytes if method is None else facts.live_bytes


def main() -> None:
    parser = arguments("Seconds per decoded token under each method, against the bytes that a step reads.")
    parser.set_defaults(threads=1)
    parser.add_argument("tokens", type=int, nargs="?", default=4096, help="length of the prompt")
    parser.add_argument("--budget", type=int, default=512, help="slots kept or read per layer and head")
    options = parser.parse_args()
    model, tokenizer = start(options)
    n, budget = options.tokens, options.budget
    methods: dict[str, Method] = {
        "full": Full(),
        "recent": Recent(budget=budget),
        "A2SF, prefill": A2SF(budget=budget, evict="prefill"),
        "A2SF, each step": A2SF(budget=budget),
        "TidalDecode": TidalDecode(budget=budget),
        "ZipCache": ZipCache(),
    }
    ids = prose(tokenizer, n + BLOCK * (options.rounds + 1))
    check_identity(model, [*methods.values()], ids[:, : min(n, 200)])
    prompt, text = ids[:, :n], ids[:, n:]
    everything: dict[str, Method | None] = {"plain": None, **methods}
    cases = {name: Decoding(model, method, prompt, text) for name, method in everything.items()}
    for case in cases.values():
        if case.method is not None and case.filled is not None:
            check_kept(case.method, case.filled, n, budget)
    took = medians({name: case.steps for name, case in cases.items()}, options.rounds, seconds=math.inf)
    weights, full = weight_bytes(model), cases["full"]
    choices = {name: torch.cat(case.logits).argmax(-1) for name, case in cases.items()}
    rows = []
    for name, case in cases.items():
        facts = case.report or full.report
        assert facts is not None
        read = cache_bytes_read(case.method, facts, model)
        rows.append(
            {
                "case": name,
                "method": None if case.method is None else str(case.method),
                "tokens": n,
                "seconds": took[name] / BLOCK,
                "weight bytes": weights,
                "cache bytes": read,
                "predicted": (weights + read) / (weights + facts.plain_bytes),
                "measured": took[name] / took["plain"],
                "kept": max(facts.kept),
                "agree": float((choices[name] == choices["plain"]).float().mean()),
                "checked": True,
            }
        )
    columns: dict[str, Callable[[Any], str]] = {
        "case": str,
        "seconds": lambda s: f"{s * 1000:.1f} ms",
        "cache bytes": lambda b: f"{b / 2**20:.1f} MiB",
        "predicted": "{:.2f}".format,
        "measured": "{:.2f}".format,
        "kept": "{:.0f}".format,
        "agree": "{:.0%}".format,
    }
    title = f"decoding after {n} tokens, budget {budget}, weights {weights / 2**20:.0f} MiB"
    report(title, rows, columns, options.json)


if __name__ == "__main__":
    main()
