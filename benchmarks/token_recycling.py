"""Token recycling against greedy decoding and transformers' prompt lookup (SmolLM2-135M-Instruct, float32).

    python benchmarks/token_recycling.py 64 --nodes 80 20 10 --rounds 3

forwards    per new token, the prompt's forward included
seconds     per new token, the prompt's forward included
time        seconds / greedy decoding's, on the same prompts
hot, cold   whether the table of candidates lives on from prompt to prompt. It begins empty in every turn, so that no
            text is drafted from its own earlier decoding.

All ways must give greedy decoding's ids, which is checked before anything is timed. A forward over a draft of 80 nodes
costs a CPU far more than one row, on a GPU about the same: fewer forwards are a promise for the latter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import arguments, medians, report
from prompts import start
from torch import Tensor
from transformers import PreTrainedModel

from seqwise.lab.zoo.text import paragraphs
from seqwise.methods import TokenRecycling

Texts = list[Tensor]

LOOKUP = 10  # tokens that prompt lookup drafts, transformers' documented example


def prompts() -> dict[str, list[str]]:
    """Prose that goes on, and texts that repeat what the prompt says."""
    prose = [paragraph for paragraph in paragraphs() if len(paragraph) > 500]
    table = "\n".join(f"| row {i} | value {i * i} | ok |" for i in range(1, 5))
    echo = f"{prose[7][:150]}\n\nThe same text again:\n\n{prose[7][:30]}"
    return {"prose": [text[:200] for text in prose[:2]], "repetitive": [table, echo]}


def generate(model: PreTrainedModel, texts: Texts, new: int, **options: Any) -> Texts:
    return [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options)
        for ids in texts
    ]


def recycled(model: PreTrainedModel, texts: Texts, new: int, method: TokenRecycling) -> Texts:
    with method.on(model):
        return generate(model, texts, new)


def forwards(model: PreTrainedModel, case: Callable[[], Texts]) -> tuple[Texts, int]:
    count = 0

    def note(*_: Any) -> None:
        nonlocal count
        count += 1

    handle = model.register_forward_pre_hook(note)
    try:
        return case(), count
    finally:
        handle.remove()


def measure(
    model: PreTrainedModel, kind: str, texts: Texts, new: int, drafts: list[int], rounds: int
) -> list[dict[str, Any]]:
    cases: dict[str, Callable[[], Texts]] = {
        "greedy": lambda: generate(model, texts, new),
        "prompt lookup": lambda: generate(model, texts, new, prompt_lookup_num_tokens=LOOKUP),
    }
    for hot in (True, False):
        for nodes in drafts:
            method = TokenRecycling(nodes=nodes, hot=hot)
            name = f"{nodes} nodes, {'hot' if hot else 'cold'}"
            cases[name] = lambda method=method: recycled(model, texts, new, method)  # type: ignore[misc]
    expected, _ = forwards(model, cases["greedy"])
    count, tokens = {}, sum(ids.shape[1] for ids in expected) - sum(ids.shape[1] for ids in texts)
    for name, case in cases.items():
        got, count[name] = forwards(model, case)
        for mine, plain in zip(got, expected, strict=True):
            if not torch.equal(mine, plain):
                raise AssertionError(f"{name} must give greedy decoding's ids")
    took = medians(cases, rounds)
    return [
        {
            "case": name,
            "prompts": kind,
            "tokens": tokens,
            "forwards": count[name] / tokens,
            "seconds": seconds / tokens,
            "time": seconds / took["greedy"],
            "checked": True,
        }
        for name, seconds in took.items()
    ]


def main() -> None:
    parser = arguments("Token recycling against greedy decoding and prompt lookup.")
    parser.set_defaults(threads=1, rounds=1)
    parser.add_argument("tokens", type=int, nargs="?", default=24, help="new tokens per prompt, at most")
    parser.add_argument("--nodes", type=int, nargs="+", default=[20, 10], help="sizes of the draft; 80 suit a GPU")
    options = parser.parse_args()
    model, tokenizer = start(options)
    rows = []
    for kind, texts in prompts().items():
        ids = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
        rows += measure(model, kind, ids, options.tokens, options.nodes, options.rounds)
    columns: dict[str, Callable[[Any], str]] = {
        "prompts": str,
        "case": str,
        "tokens": str,
        "forwards": "{:.2f}".format,
        "seconds": lambda s: f"{s * 1000:.1f} ms",
        "time": "{:.2f}".format,
    }
    report("token recycling", rows, columns, options.json)


if __name__ == "__main__":
    main()
