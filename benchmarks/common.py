"""What the benchmarks share: medians of cases that take turns, peak memory, versions, a table or JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from seqwise.core import hf

Case = Callable[[], Any]


def medians(cases: Mapping[str, Case], rounds: int, seconds: float = 60.0) -> dict[str, float]:
    """Seconds per case. Cases take turns, so that drift of the machine hits all alike; the first turn warms up.

    Ends after `rounds` turns, or once `seconds` are over, but not before the third turn.
    """
    took: dict[str, list[float]] = {name: [] for name in cases}
    begin = time.perf_counter()
    for turn in range(rounds + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            took[name].append(time.perf_counter() - start)
        if turn >= 3 and time.perf_counter() - begin > seconds:
            break
    return {name: statistics.median(each[1:]) for name, each in took.items()}


def peak_bytes(case: Case) -> int:
    """The most memory that torch held at once for the case, its result included, beyond what was there before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would announce itself on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = case()
    del result
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]  # in order of time
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def free_bytes() -> int:
    """Memory that a case may take without pushing others out."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def settings() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        **hf.versions(),
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=7, help="turns that are timed, after one to warm up")
    parser.add_argument("--threads", type=int, default=None, help="of torch")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def report(
    title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Callable[[Any], str]], as_json: bool
) -> None:
    """Prints the rows, as a table of `columns` (name -> how to write a value) or as JSON."""
    if as_json:
        print(json.dumps({"benchmark": title, "settings": settings(), "rows": list(rows)}, indent=1))
        return
    table = Table(title=title, caption=", ".join(f"{name} {value}" for name, value in settings().items()))
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*("" if row.get(name) is None else write(row[name]) for name, write in columns.items()))
    Console().print(table)
