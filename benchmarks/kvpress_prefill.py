"""The prefill under kvpress, for `prefill.py --kvpress PYTHON`; runs where kvpress is installed and seqwise is not.

    kv/bin/python benchmarks/kvpress_prefill.py 2048 --model FOLDER

SnapKVPress runs beside the plain model's fused attention. ObservedAttentionPress scores by the attention that each key
received, as H2O does, and takes it from eager attention. Ratios are to the plain fused prefill here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description="Prefill under kvpress, against the plain model's.")
    parser.add_argument("tokens", type=int, nargs="?", default=2048)
    parser.add_argument("--model", help="folder with the model's safetensors weights")
    parser.add_argument("--share", type=float, default=0.25, help="of the cache that stays")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        import kvpress
        import transformers
    except ImportError as error:
        print(f"kvpress is not installed here ({error}); see the head of prefill.py", file=sys.stderr)
        return
    if options.model is None:
        parser.error("--model FOLDER is missing; prefill.py --kvpress passes it")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    models = {
        kind: transformers.AutoModelForCausalLM.from_pretrained(options.model, attn_implementation=kind).eval()
        for kind in ("sdpa", "eager")
    }
    vocabulary = models["sdpa"].config.vocab_size
    ids = torch.randint(vocabulary, (1, options.tokens), generator=torch.Generator().manual_seed(0))

    def prefill(kind: str, press: Any = None) -> Any:
        cache = transformers.DynamicCache()
        with nullcontext() if press is None else press(models[kind]):
            logits = models[kind](ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits, cache.get_seq_length()

    dropped = 1 - options.share
    snapkv = kvpress.SnapKVPress(compression_ratio=dropped)
    observed = kvpress.ObservedAttentionPress(compression_ratio=dropped)
    cases: dict[str, Callable[[], Any]] = {
        "plain": lambda: prefill("sdpa"),
        "SnapKVPress": lambda: prefill("sdpa", snapkv),
        "plain, eager": lambda: prefill("eager"),
        "ObservedAttentionPress, eager": lambda: prefill("eager", observed),
    }
    expected, kept = prefill("sdpa")[0], {}
    for name, case in cases.items():  # a press acts after each layer's attention: the prompt's own logits stay
        logits, kept[name] = case()
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    took: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            took[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(each) for name, each in took.items()}
    rows = [
        {
            "method": name,
            "tokens": options.tokens,
            "seconds": median,
            "ratio": median / seconds["plain"],
            "kept": kept[name],
            "checked": True,
        }
        for name, median in seconds.items()
    ]
    versions = {name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")}
    if options.json:
        print(json.dumps({"benchmark": "kvpress prefill", "settings": versions, "rows": rows}))
        return
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for row in rows:
        print(f"{row['method']:30} {row['tokens']:6} tokens {row['seconds']:8.3f} s {row['ratio']:6.3f}")


if __name__ == "__main__":
    main()
