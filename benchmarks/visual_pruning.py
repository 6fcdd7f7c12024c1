"""Prefill of a vision-language model whose visual tokens are pruned, against the work that is left.

    python benchmarks/visual_pruning.py --width 768

A random LLaVA: 24 decoder layers, a CLIP tower of 24 narrow layers (its share of the work is then about that of a real
7B model's), one image of 576 visual tokens, 64 text tokens, float32.

budget      share of the visual tokens that a method leaves in the end
rows        rows of the decoder's layers, mean, as they really ran
measured    prefill time, tower included, / the plain model's
theory      floating point operations of the rows that ran in each layer (linear layers and attention of tower and
            decoder) / the plain model's; what scores the tokens is not in it

Under identity settings every method must give the plain model's logits, and every stage must leave the rows that the
budget says, before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from common import arguments, medians, report
from prompts import quiet
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from seqwise.core import hf
from seqwise.core.method import Method
from seqwise.methods import FlowCut, FoPru, TransPrune

LAYERS, PATCHES, TEXT = 24, 576, 64
VOCABULARY, IMAGE = 1000, 999
HEAD = 64
SHARES = (0.5, 0.25, 0.125)


def llava(width: int) -> LlavaForConditionalGeneration:
    """Random weights. width: of the decoder; the tower has a quarter of it."""
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=LAYERS,
        num_attention_heads=width // HEAD, num_key_value_heads=width // HEAD,
        max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    tower = CLIPVisionConfig(
        hidden_size=width // 4, intermediate_size=width, num_hidden_layers=LAYERS,
        num_attention_heads=max(1, width // 4 // HEAD), image_size=336, patch_size=14,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=IMAGE, vision_feature_layer=-2)
    return LlavaForConditionalGeneration(config).eval()


def prompt() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    words = torch.randint(2, IMAGE, (TEXT,), generator=random)
    ids = torch.cat([words[:8], torch.full((PATCHES,), IMAGE), words[8:]])[None]
    pixels = torch.randn(1, 3, 336, 336, generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def methods() -> list[tuple[float, Method]]:
    staged = [(0.875, 0.625, 0.125), (0.5, 0.25, 0.125)]  # the paper's shares, and harder ones
    return [
        *((share, FoPru(budget=share)) for share in SHARES),
        *((share, FlowCut(budget=share)) for share in SHARES),
        *((shares[-1], TransPrune(budget=shares)) for shares in staged),
    ]


def prefill(model: nn.Module, batch: dict[str, Tensor], method: Method | None = None) -> Tensor:
    """Logits of the last token."""
    with nullcontext() if method is None else method.on(model):
        logits: Tensor = model(**batch, logits_to_keep=1).logits
    return logits


@contextmanager
def counted_rows(layers: list[nn.Module]) -> Iterator[list[int]]:
    """Rows that entered each layer of one forward."""
    rows: list[int] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows.append(hf.hidden_argument(args, kwargs).shape[1])

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def operations(rows: list[int], layer: nn.Module, width: int, causal: bool) -> float:
    """Floating point operations of layers alike with so many rows each."""
    linear = sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear))
    return sum(2.0 * n * linear + 4.0 * n * n * width / (2 if causal else 1) for n in rows)


class Work:
    """Rows and operations of one prefill."""

    def __init__(self, model: LlavaForConditionalGeneration, batch: dict[str, Tensor], method: Method | None) -> None:
        tower, decoder = [*model.model.vision_tower.encoder.layers], [*model.model.language_model.layers]
        attached: AbstractContextManager[Any] = nullcontext() if method is None else method.on(model)
        # hooks that come after the engine's own see the rows as the layers get them
        with attached, counted_rows(tower) as self.tower, counted_rows(decoder) as self.decoder:
            model(**batch, logits_to_keep=1)
        config: Any = model.config
        self.operations = operations(self.tower, tower[0], config.vision_config.hidden_size, causal=False)
        self.operations += operations(self.decoder, decoder[0], config.text_config.hidden_size, causal=True)


def check(model: LlavaForConditionalGeneration, batch: dict[str, Tensor], work: dict[Method, Work]) -> None:
    plain = prefill(model, batch)
    for method, done in work.items():
        same = method.identity()
        assert same is not None
        torch.testing.assert_close(prefill(model, batch, same), plain, rtol=1e-3, atol=1e-3)
        if isinstance(method, TransPrune):
            shares = [1.0] * LAYERS
            for after, share in zip(method.prune_after, method.budget, strict=True):
                shares[after:] = [share] * (LAYERS - after)
        else:
            assert isinstance(method, (FoPru, FlowCut))
            shares = [float(method.budget)] * LAYERS
        expected = [TEXT + int(PATCHES * share) for share in shares]
        if done.decoder != expected:
            raise AssertionError(f"{method}: layers must get {expected} rows, got {done.decoder}")


def main() -> None:
    parser = arguments("Prefill of a vision-language model under pruning, against the work that is left.")
    parser.set_defaults(threads=1)
    parser.add_argument("--width", type=int, default=512, help=f"of the decoder, a multiple of {4 * HEAD}")
    options = parser.parse_args()
    if options.width < 4 * HEAD or options.width % (4 * HEAD):
        parser.error(f"--width must be a multiple of {4 * HEAD}, got {options.width}")
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    quiet()
    model, batch = llava(options.width), prompt()
    chosen = methods()
    plain = Work(model, batch, None)
    work = {method: Work(model, batch, method) for _, method in chosen}
    check(model, batch, work)
    cases: dict[str, Callable[[], Any]] = {"plain": lambda: prefill(model, batch)}
    for _, method in chosen:
        cases[str(method)] = lambda method=method: prefill(model, batch, method)  # type: ignore[misc]
    took = medians(cases, options.rounds)
    rows = []
    measured: list[tuple[float, Method | None, Work]] = [(1.0, None, plain)]
    measured += [(share, method, work[method]) for share, method in chosen]
    for share, pruner, done in measured:
        name = "plain" if pruner is None else str(pruner)
        rows.append(
            {
                "case": "plain" if pruner is None else type(pruner).__name__,
                "method": name,
                "budget": share,
                "rows": sum(done.decoder) / LAYERS,
                "tower rows": sum(done.tower) / LAYERS,
                "seconds": took[name],
                "measured": took[name] / took["plain"],
                "theory": done.operations / plain.operations,
                "checked": True,
            }
        )
    columns: dict[str, Callable[[Any], str]] = {
        "case": str,
        "budget": "{:.3f}".format,
        **dict.fromkeys(("rows", "tower rows"), "{:.0f}".format),
        "seconds": "{:.3f} s".format,
        **dict.fromkeys(("measured", "theory"), "{:.2f}".format),
    }
    report(f"pruned prefill, {LAYERS} layers of width {options.width}", rows, columns, options.json)


if __name__ == "__main__":
    main()
