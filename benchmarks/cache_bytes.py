"""What caches hold, counted from storage, and the peak memory of a prefill in chunks (SmolLM2-135M-Instruct).

    python benchmarks/cache_bytes.py 16384 --budget 2048 --chunk 1024

Storage: after a quarter of the prompt (at most 4,096 tokens) under each method, in float32 and in bfloat16,

    claimed    bytes by arithmetic: slots x heads x elements x bits, and the quantisation parameters
    counted    bytes of the distinct storages behind the cache's keys and values; must equal the claim
    facts      bytes beside them: which token a slot is, what a method remembers of it
    smaller    plain cache in the model's type / counted
    of 16 bit  plain cache in 16 bits / counted

Peak: each case is a process of its own that prefills through `generate`,

    cache peak    `run.peak_bytes`: the most that keys and values took at once
    memory peak   most resident memory during the prefill beyond what was resident before (the loaded model)

Chunks alone shrink the activations, not the cache. Eviction alone shrinks the cache, layer by layer, not the
activations. With both, each chunk sees the cache that the last one left.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from common import arguments, report
from prompts import prose, start
from torch import Tensor
from transformers import PreTrainedModel

from seqwise.core.method import Composition, Method
from seqwise.methods import A2SF, Full, Recent, ZipCache

LONGEST = 4096  # tokens of the storage part: what they take is nearly linear in them
CASES = ("plain", "plain, chunks", "A2SF", "A2SF, chunks", "Recent, chunks")


# storage


def claimed_bytes(method: Method, n: int, model: PreTrainedModel) -> int:
    """Bytes of keys and values by arithmetic, for one prompt of n tokens."""
    config: Any = model.config
    L, heads, D = config.num_hidden_layers, config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    slots, bits = n, [(1.0, 8 * model.dtype.itemsize)]  # (share of slots, bits per element)
    parameters = 0
    for part in method.parts:
        if isinstance(part, (A2SF, Recent)):
            assert isinstance(part.budget, float)
            slots = int(part.budget * n)
        if isinstance(part, ZipCache):
            low = int(part.ratio * slots)
            bits = [(low / slots, part.bits[1]), (1 - low / slots, part.bits[0])]
            subsets = sum(share > 0 for share, _ in bits)
            channelwise = subsets * 2 * heads * D + heads * D  # minimum and step of each key subset; c of the values
            parameters = 4 * (channelwise + 2 * slots)  # and minimum and step of each row of values
    elements = 2 * heads * D * slots
    return L * (round(sum(share * elements * width / 8 for share, width in bits)) + parameters)


def counted(tensors: list[Tensor | None]) -> int:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x is not None}
    return sum(storages.values())


def storage(model: PreTrainedModel, ids: Tensor) -> list[dict[str, Any]]:
    n = ids.shape[1]
    rows = []
    methods: list[Method] = [Full(), Recent(budget=0.25), A2SF(budget=0.25), ZipCache(), A2SF(budget=0.25) | ZipCache()]
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        for method in methods:
            with method.on(model) as run:
                model(ids, logits_to_keep=1)
                facts, layers = run.report(), run.cache.layers
            packed = [x for layer in layers for c in layer.chunks for p in (c.keys, c.values) for x in p.tensors]
            total = counted([x for layer in layers for x in (layer.keys, layer.values)] + packed)
            claim = claimed_bytes(method, n, model)
            if not total == facts.cache_bytes == claim:
                raise AssertionError(f"{method}: {total} bytes counted, {facts.cache_bytes} reported, {claim} claimed")
            beside = counted([x for layer in layers for x in (layer.order, layer.live, *layer.state.values())])
            parts = method.members if isinstance(method, Composition) else (method,)
            rows.append(
                {
                    "part": "storage",
                    "case": " | ".join(type(part).__name__ for part in parts),
                    "method": str(method),
                    "type": str(dtype).removeprefix("torch."),
                    "tokens": n,
                    "claimed": claim,
                    "counted": total,
                    "facts": beside,
                    "smaller": facts.plain_bytes / total,
                    "of 16 bit": facts.plain_bytes / dtype.itemsize * 2 / total,
                    "checked": True,
                }
            )
    model.to(torch.float32)
    return rows


# peak


def peak(case: str, n: int, budget: int, chunk: int, threads: int) -> dict[str, Any]:
    """Runs in a process of its own: one prefill, and the most memory it took."""
    options = arguments("").parse_args(["--threads", str(threads)])
    model, tokenizer = start(options)
    ids = prose(tokenizer, n)
    chunked = chunk if case.endswith("chunks") else None
    method: Method | None = None
    if not case.startswith("plain"):
        method = A2SF(budget=budget) if case.startswith("A2SF") else Recent(budget=budget)
    model.generate(ids[:, :8], max_new_tokens=1, do_sample=False)  # what the first call alone allocates
    resident, plain = forget_peak(), {} if chunked is None or method is not None else {"prefill_chunk_size": chunked}
    begin = time.perf_counter()
    with nullcontext() if method is None else method.on(model, chunk=chunked) as run:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False,
            return_dict_in_generate=True, **plain,
        )  # fmt: skip
    seconds, most = time.perf_counter() - begin, peak_resident()
    layers = [] if run is not None else out.cache.layers
    return {
        "part": "peak",
        "case": case,
        "method": None if method is None else str(method),
        "tokens": n,
        "budget": budget if method is not None else None,
        "chunk": chunked,
        "seconds": seconds,
        "cache peak": run.peak_bytes if run is not None else counted([x for y in layers for x in (y.keys, y.values)]),
        "memory peak": most - resident,
        "kept": None if run is None else max(run.report().kept),
    }


def forget_peak() -> int:
    """Resident bytes now; lets the peak count anew where Linux can do that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_resident()


def peak_resident() -> int:
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def peaks(n: int, budget: int, chunk: int, threads: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for case in CASES:
        command = [sys.executable, __file__, str(n), "--budget", str(budget), "--chunk", str(chunk)]
        command += ["--threads", str(threads), "--case", case]
        # glibc would give freed blocks back late, or never: large ones straight to the system
        lean = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **lean})
        if done.returncode:
            raise RuntimeError(f"{case}: {done.stderr.strip()}")
        rows.append(json.loads(done.stdout))
    plain = rows[0]
    for row in rows:
        row |= {f"{name} share": row[name] / plain[name] for name in ("cache peak", "memory peak")}
        row["checked"] = row["kept"] is None or row["kept"] <= budget
        if not row["checked"]:
            raise AssertionError(f"{row['method']} must keep at most {budget} slots, keeps {row['kept']}")
    return rows


def main() -> None:
    parser = arguments("Bytes that caches hold, and the peak of a prefill in chunks.")
    parser.set_defaults(threads=1)
    parser.add_argument("tokens", type=int, nargs="?", default=4096, help="length of the prompt")
    parser.add_argument("--budget", type=int, default=512, help="slots kept per layer and head in the second part")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a chunk")
    parser.add_argument("--case", choices=CASES, help="one process of the second part, as JSON")
    options = parser.parse_args()
    sizes = (options.tokens, options.budget, options.chunk, options.threads)
    if options.case:
        print(json.dumps(peak(options.case, *sizes)))
        return
    model, tokenizer = start(options)
    rows = storage(model, prose(tokenizer, min(options.tokens // 4, LONGEST)))
    del model
    rows += peaks(*sizes)
    mib: Callable[[Any], str] = lambda b: f"{b / 2**20:.1f} MiB"  # noqa: E731
    first: dict[str, Callable[[Any], str]] = {
        "case": str,
        "type": str,
        **dict.fromkeys(("claimed", "counted", "facts"), mib),
        **dict.fromkeys(("smaller", "of 16 bit"), "{:.2f}".format),
    }
    second: dict[str, Callable[[Any], str]] = {
        "case": str,
        "cache peak": mib,
        "cache peak share": "{:.0%}".format,
        "memory peak": mib,
        "memory peak share": "{:.0%}".format,
        "seconds": "{:.1f} s".format,
    }
    if options.json:
        report("cache bytes", rows, {}, True)
        return
    report(f"cache after {rows[0]['tokens']} tokens", [row for row in rows if row["part"] == "storage"], first, False)
    title = f"prefill of {options.tokens} tokens, budget {options.budget}, chunks of {options.chunk}"
    report(title, [row for row in rows if row["part"] == "peak"], second, False)


if __name__ == "__main__":
    main()
