"""What it costs to know how much attention every token received: beside the fused kernel, and from eager attention.

    python benchmarks/attention_statistics.py 1024 4096 --shape smollm2

eager:      the whole matrix of probabilities, as transformers' eager attention makes it, and its column sums
fused:      `scaled_dot_product_attention` alone, without any statistics
streamed:   the fused kernel and `observe.received` beside it
speedup:    eager / streamed
share:      (streamed - fused) / fused, the price of the statistics
extra:      peak memory beyond the fused kernel's, as a share of the matrix (query heads x n x n, float32)

One causal layer in float32, without padding. Before anything is timed, both ways must give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import arguments, free_bytes, medians, peak_bytes, report
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from seqwise.core.observe import attention, received
from seqwise.core.visible import Visible

SHAPES = {"smollm2": (9, 3, 64), "7b": (32, 32, 128)}  # query heads, KV heads, head size


@dataclass
class Layer:
    """One layer's query (1, H, n, D), key and value (1, Hkv, n, D)."""

    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def of(cls, shape: str, n: int) -> Layer:
        H, Hkv, D = SHAPES[shape]
        random = torch.Generator().manual_seed(0)
        return cls(*(torch.randn(1, heads, n, D, generator=random) for heads in (H, Hkv, Hkv)))

    @property
    def matrix_bytes(self) -> int:
        return self.query.shape[1] * self.query.shape[2] ** 2 * 4

    def eager(self) -> tuple[Tensor, Tensor]:
        groups = self.query.shape[1] // self.key.shape[1]
        n, D = self.query.shape[2:]
        mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)
        logits = self.query @ self.key.repeat_interleave(groups, 1).mT * D**-0.5
        logits = logits + mask
        probabilities = logits.softmax(-1, dtype=torch.float32)
        return probabilities @ self.value.repeat_interleave(groups, 1), probabilities.sum(-2)

    def fused(self) -> Tensor:
        return scaled_dot_product_attention(self.query, self.key, self.value, is_causal=True, enable_gqa=True)

    def streamed(self) -> tuple[Tensor, Tensor]:
        visible = Visible.of(self.query.shape[2], self.key.shape[2])
        out, lse = attention(self.query, self.key, self.value, visible, want_lse=True)
        return out, received(self.query, self.key, visible=visible, lse=lse)


def measure(shape: str, n: int, rounds: int) -> dict[str, Any]:
    layer = Layer.of(shape, n)
    cases = {"eager": layer.eager, "fused": layer.fused, "streamed": layer.streamed}
    fits = 3 * layer.matrix_bytes < free_bytes()  # eager attention holds two matrices at once
    if fits:
        for mine, plain in zip(layer.streamed(), layer.eager(), strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-4)  # a fast wrong answer is none
    else:
        del cases["eager"]
    row: dict[str, Any] = {"shape": shape, "tokens": n}
    took = medians(cases, rounds)
    row |= took
    row["speedup"] = took["eager"] / took["streamed"] if fits else None
    row["share"] = took["streamed"] / took["fused"] - 1
    peaks = {name: peak_bytes(case) for name, case in cases.items()}
    row |= {f"{name} bytes": peak for name, peak in peaks.items()}
    row["extra"] = (peaks["streamed"] - peaks["fused"]) / layer.matrix_bytes
    row["eager extra"] = (peaks["eager"] - peaks["fused"]) / layer.matrix_bytes if fits else None
    row["checked"] = fits
    return row


def main() -> None:
    parser = arguments("Attention statistics beside the fused kernel, against eager attention.")
    parser.add_argument("tokens", type=int, nargs="*", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--shape", choices=[*SHAPES], default=None, help="one of the shapes; default all")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with torch.no_grad():
        shapes = [options.shape] if options.shape else [*SHAPES]
        rows = [measure(shape, n, options.rounds) for shape in shapes for n in options.tokens]
    columns: dict[str, Callable[[Any], str]] = {
        "shape": str,
        "tokens": str,
        **dict.fromkeys(("eager", "fused", "streamed"), "{:.3f} s".format),
        "speedup": "{:.1f}".format,
        "share": "{:.2f}".format,
        **dict.fromkeys(("extra", "eager extra"), "{:.1%}".format),
    }
    report("attention statistics", rows, columns, options.json)
    if not all(row["checked"] for row in rows) and not options.json:
        print("Eager attention was left out where two of its matrices would not fit into free memory.")


if __name__ == "__main__":
    main()
