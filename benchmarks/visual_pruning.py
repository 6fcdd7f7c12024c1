"""Prefill of a vision-language model whose visual tokens are pruned, against the work that is left.

    python benchmarks/visual_pruning.py                            minutes
    python benchmarks/visual_pruning.py --width 4096 --layers 3    the shape of a 7B model, three of its layers

A random LLaVA: a decoder of few layers, a CLIP tower of 24 narrow layers (its share of the work is then about that of a
real 7B model's), one image of 576 visual tokens, 64 text tokens, float32.

share       of the visual tokens that a method leaves
rows        rows of the decoder's layers, mean, as they really ran
measured    prefill time, tower included, / the plain model's
theory      floating point operations of the rows that ran in each layer of tower and decoder / the plain model's; what
            scores the tokens is not in it
realised    (1 - measured) / (1 - theory): the part of the saving that is really saved
own         seconds inside the method's own hooks (scores and selection) / the plain model's prefill
peak        the most memory that torch held at once during the prefill / the plain model's

Under identity settings every method must give the plain model's logits before anything is timed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from common import arguments, medians, peak_bytes, report
from prompts import quiet
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import SeqwiseError
from seqwise.core.method import Method
from seqwise.lab.operations import counted
from seqwise.lab.registry import load_methods

PATCHES, TEXT, TOWER = 576, 64, 24
VOCABULARY, IMAGE = 1000, 999
HEAD = 64
SHARES = (1 / 2, 1 / 4, 1 / 9, 1 / 16)
NAMES = ("RandomTokens", "AveragePool", "FoPru", "VTCCLS", "HiPrune", "FlowCut", "ToDRE", "VMTC", "FastV")
HOOKS = ("watch_tower", "prune_tower", "keep_input", "cut_input", "observe_transition", "keep_rows")


def llava(width: int, layers: int) -> LlavaForConditionalGeneration:
    """Random weights. width: of the decoder; the tower has a quarter of it."""
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=width // HEAD, num_key_value_heads=width // HEAD,
        max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    tower = CLIPVisionConfig(
        hidden_size=width // 4, intermediate_size=width, num_hidden_layers=TOWER,
        num_attention_heads=max(1, width // 4 // HEAD), image_size=336, patch_size=14,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=IMAGE, vision_feature_layer=-2)
    return LlavaForConditionalGeneration(config).eval()


def prompt(device: str) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    words = torch.randint(2, IMAGE, (TEXT,), generator=random)
    ids = torch.cat([words[:8], torch.full((PATCHES,), IMAGE), words[8:]])[None]
    pixels = torch.randn(1, 3, 336, 336, generator=random)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: value.to(device) for name, value in batch.items()}


def methods(layers: int, names: list[str], shares: list[float]) -> list[tuple[float, Method]]:
    """Each method at each share; in layers where they are staged."""
    load_methods()
    more = {"ToDRE": ", check_layer=1"}
    texts = [(share, f"{name}(budget={share:.6f}{more.get(name, '')})") for name in NAMES for share in shares or SHARES]
    early, late = max(1, layers // 3), max(2, 2 * layers // 3)
    texts += [
        (1 / 9, f"TransPrune(budget=(0.5, 0.1111), prune_after=({early}, {late}), layers=(1, {late}))"),
        (1 / 9, f"VFlowOpt(budget=(0.2, 0.7, 0.8), prune_at=({early}, {late}), t=1.5, m=4.0)"),
    ]
    return [(share, Method.parse(text)) for share, text in texts if not names or text.partition("(")[0] in names]


def prefill(model: nn.Module, batch: dict[str, Tensor], method: Method | None = None) -> Tensor:
    """Logits of the last token."""
    with nullcontext() if method is None else method.on(model):
        logits: Tensor = model(**batch, logits_to_keep=1).logits
    return logits


@contextmanager
def own_seconds(method: Method) -> Iterator[list[float]]:
    """Time inside the method's hooks."""
    took = [0.0]
    kind = type(method)

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                took[0] += time.perf_counter() - start

        return call

    own = {name: getattr(kind, name) for name in HOOKS if getattr(kind, name) is not getattr(Method, name)}
    inherited = [name for name in own if name not in vars(kind)]
    for name, original in own.items():
        setattr(kind, name, timed(original))
    try:
        yield took
    finally:
        for name, original in own.items():
            if name in inherited:
                delattr(kind, name)
            else:
                setattr(kind, name, original)


def peak(case: Callable[[], Any]) -> int:
    """The most of two readings: the profiler now and then misses the first blocks of one."""
    return max(peak_bytes(case) for _ in range(2))


def main() -> None:
    parser = arguments("Prefill of a vision-language model under pruning, against the work that is left.")
    parser.set_defaults(threads=1, rounds=3)
    parser.add_argument("--width", type=int, default=1024, help=f"of the decoder, a multiple of {4 * HEAD}")
    parser.add_argument("--layers", type=int, default=8, help="of the decoder, at least 3")
    parser.add_argument("--method", action="append", default=[], help="the name of one; again for more")
    parser.add_argument("--share", action="append", type=float, default=[], help="that is left; again for more")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.width < 4 * HEAD or options.width % (4 * HEAD):
        parser.error(f"--width must be a multiple of {4 * HEAD}, got {options.width}")
    if options.layers < 3:
        parser.error(f"--layers must be >= 3, got {options.layers}")
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    quiet()
    model, batch = llava(options.width, options.layers).to(options.device), prompt(options.device)
    anatomy = Anatomy.of(model)
    plain = prefill(model, batch)
    with counted(anatomy) as whole:
        prefill(model, batch)
    chosen, rows = [], []
    for share, method in methods(options.layers, options.method, options.share):
        same = method.identity()
        if same is not None:
            torch.testing.assert_close(prefill(model, batch, same), plain, rtol=1e-3, atol=1e-3)
        try:
            with method.on(model), counted(anatomy) as left:
                model(**batch, logits_to_keep=1)
        except SeqwiseError as error:
            raise SystemExit(f"{method}: {error}") from None
        chosen.append((share, method, left))
    cases: dict[str, Callable[[], Any]] = {"plain": lambda: prefill(model, batch)}
    cases |= {str(method): functools.partial(prefill, model, batch, method) for _, method, _ in chosen}
    took = medians(cases, options.rounds, seconds=600.0)
    most = peak(cases["plain"])
    for share, pruner, left in [(1.0, None, whole), *chosen]:
        name = "plain" if pruner is None else str(pruner)
        measured, theory = took[name] / took["plain"], left.operations / whole.operations
        own = 0.0
        if pruner is not None:
            with own_seconds(pruner) as seconds:
                prefill(model, batch, pruner)
            own = seconds[0] / took["plain"]
        rows.append(
            {
                "case": "plain" if pruner is None else type(pruner).__name__,
                "method": name,
                "share": share,
                "rows": sum(n for calls in left.decoder for _, n in calls) / options.layers,
                "seconds": took[name],
                "measured": measured,
                "theory": theory,
                "realised": None if pruner is None else (1 - measured) / (1 - theory),
                "own": own,
                "peak": peak(cases[name]) / most,
            }
        )
    columns: dict[str, Callable[[Any], str]] = {
        "case": str,
        "share": "{:.3f}".format,
        "rows": "{:.0f}".format,
        "seconds": "{:.3f} s".format,
        **dict.fromkeys(("measured", "theory"), "{:.2f}".format),
        "realised": "{:.0%}".format,
        "own": "{:.1%}".format,
        "peak": "{:.2f}".format,
    }
    report(f"pruned prefill, {options.layers} layers of width {options.width}", rows, columns, options.json)


if __name__ == "__main__":
    main()
