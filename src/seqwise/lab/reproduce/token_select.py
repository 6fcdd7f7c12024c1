"""TokenSelect on one-hop recall: trained on up to 64 tokens, does re-indexed selection read four times as many?

text       8 items (a key and a value in one token) among filler, then 8 keys; the answer at each is its item's value
training   16, 32 or 64 tokens, full attention, two layers
test       64 and 256 tokens; the keys come as single steps, each of which selects 32 tokens beside 2 sinks and 8 newest
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from seqwise.core.method import Method
from seqwise.core.observe import attention
from seqwise.core.views import Kernel
from seqwise.core.visible import Visible
from seqwise.lab.reproduce._recall import hits, stepwise
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.lab.zoo.recall import recall_batch, train_recall
from seqwise.methods.baselines import Full
from seqwise.methods.cache.token_select import TokenSelect, fingerprint

TRAINED, LONG, QUESTIONS = 64, 256, 8
SEQUENCES = 96  # per seed
SIZES: dict[str, Any] = {"budget": 32, "sinks": 2, "local": 8, "block": 8}
REPEATS = 6  # of each question, for the selection cache

CLAIMS = (
    Claim(
        key="exact",
        text="where sinks, chosen and newest tokens are all there are, logits are the plain model's",
        paper="follows from the algorithm",
        direction="<=",
        margin=1e-6,
        baseline="0 (largest difference)",
    ),
    Claim(
        key="extrapolation",
        text=f"at {LONG} tokens, 4 times the longest trained on, more answers are right than with full attention",
        paper="extrapolates Llama-3-8B and Qwen2-7B on InfiniteBench, RULER and LongBench (tables not verified)",
        direction=">",
        margin=0.05,
        baseline="the same model with full attention",
    ),
    Claim(
        key="re-indexing",
        text=f"it is the positions that do it, at {LONG} tokens",
        paper="RoPE positions stay inside the training window",
        direction=">",
        margin=0.05,
        baseline="the same tokens selected, at their own positions",
    ),
    Claim(
        key="selection",
        text=f"the vote finds the tokens, at {LONG} tokens",
        paper="selected tokens keep accuracy at a budget of 2K",
        direction=">",
        margin=0.2,
        baseline="as many random tokens, re-indexed alike",
    ),
    Claim(
        key="trained-length",
        text=f"at {TRAINED} tokens, of which 42 are read, no answer is lost",
        paper="comparable with full attention",
        direction=">=",
        margin=0.02,
        baseline="full attention",
    ),
    Claim(
        key="selection-cache",
        text="a selection that is kept while fingerprints are alike answers as well (each question is asked 6 times)",
        paper="consecutive queries are alike; threshold 0.9",
        direction=">=",
        margin=0.02,
        baseline="a selection at each step",
    ),
    Claim(
        key="skipped",
        text="a selection is kept in more than half of the steps and layers then, so that scoring is skipped",
        paper="the selection cache is what makes token-level selection cheap",
        direction=">",
        margin=0.5,
        baseline="0",
    ),
    Claim(
        key="soft-vote",
        text="each head's probabilities as votes select better than summed logits",
        paper="an ablation (from memory)",
        direction=">",
        margin=0.0,
        baseline="logits summed over heads",
    ),
    Claim(
        key="speed",
        text="attention gets faster",
        paper="up to 23.84 times (attention) and 2.28 times (end to end)",
        direction="<",
        margin=0.0,
        baseline="time of full attention with a fused kernel on a GPU",
    ),
)


@dataclass(frozen=True)
class _InPlace(TokenSelect):
    """The same tokens, at the positions that they were stored with."""

    abstract: ClassVar[bool] = True

    def attend(self, kernel: Kernel) -> Tensor | None:
        rope, n, Q = kernel.rope, kernel.key.shape[2], kernel.query.shape[2]
        most = self.sinks + int(self.budget) + self.local
        if n <= most:
            return None
        assert rope is not None and kernel.query_positions is not None
        q, keys = rope.rotate(kernel.query, -kernel.query_positions[:, None]), self._unrotated(kernel)
        B, Hkv = keys.shape[:2]
        outs = []
        for start in range(0, Q, self.block):
            rows = slice(start, min(start + self.block, Q))
            N = n - Q + rows.stop
            q_bar = fingerprint(q[:, :, rows], rope.inv_freq, self.local, interleaved=rope.interleaved)
            index, live = self._select(kernel, q_bar, keys[:, :, :N], [int(self.budget)] * B, None)
            order = kernel.order.expand(B, 1, -1).gather(-1, index)
            slots = index.expand(-1, Hkv, -1)[..., None].expand(-1, -1, -1, keys.shape[3])
            kept = kernel.key.gather(2, slots), kernel.value.gather(2, slots)
            seen = Visible(kernel.rows[:, rows], order, live_k=live)
            outs.append(attention(kernel.query[:, :, rows], *kept, seen, scaling=kernel.scaling)[0])
        return torch.cat(outs, 2)


@dataclass(frozen=True)
class _Anywhere(TokenSelect):
    """Random tokens instead of those that the vote chooses."""

    abstract: ClassVar[bool] = True

    def _select(
        self, kernel: Kernel, q_bar: Tensor, keys: Tensor, budgets: Any, dead: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        B, N = len(keys), keys.shape[2]
        draw = torch.rand(
            B, 1, N - self.sinks - self.local, generator=torch.Generator().manual_seed(97 * kernel.layer + N)
        )
        chosen = self.sinks + draw.argsort(-1)[..., : budgets[0]].sort(-1).values
        at = torch.arange(N).expand(B, 1, -1)
        index = torch.cat([at[..., : self.sinks], chosen, at[..., N - self.local :]], -1)
        return index, torch.ones_like(index, dtype=torch.bool)


@dataclass(frozen=True)
class _Counting(TokenSelect):
    """Counts selections of steps."""

    abstract: ClassVar[bool] = True
    made: ClassVar[list[int]] = []

    def _choose(self, kernel: Kernel, *args: Any) -> dict[str, Any]:
        self.made.append(int((~args[-1]).sum()))  # samples that do not keep theirs
        return super()._choose(kernel, *args)


def answers(model: Any, ids: Tensor, targets: Tensor, method: Method) -> list[float]:
    return hits(stepwise(model, ids, ids.shape[1] - targets.shape[1], method)[1], targets)


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    progress("training the recall model")
    model = train_recall(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    short, long = (recall_batch(SEQUENCES, n, generator=generator, queries=QUESTIONS) for n in (TRAINED, LONG))
    everything = TokenSelect(budget=TRAINED, sinks=2, local=8, block=8)
    prompt = TRAINED - QUESTIONS
    whole, plain = (stepwise(model, short.input_ids, prompt, method)[1] for method in (everything, Full()))
    arms: dict[str, Method] = {
        "full": Full(),
        "ours": TokenSelect(**SIZES, reuse=None),
        "in place": _InPlace(**SIZES, reuse=None),
        "random": _Anywhere(**SIZES, reuse=None),
    }
    found = {
        (name, n): answers(model, batch.input_ids, batch.targets, method)
        for n, batch in ((TRAINED, short), (LONG, long))
        for name, method in arms.items()
    }
    shown = ", ".join(f"{name} {mean(found[name, TRAINED]):.3f} and {mean(found[name, LONG]):.3f}" for name in arms)
    progress(f"accuracy at {TRAINED} and {LONG} tokens: {shown}")

    context, questions = long.input_ids[:, :-QUESTIONS], long.input_ids[:, -QUESTIONS:]
    asked = torch.cat([context, questions[:, :2].repeat_interleave(REPEATS, 1)], 1)  # the newest 8 tokens hold no item
    targets = long.targets[:, :2].repeat_interleave(REPEATS, 1)
    _Counting.made.clear()
    kept = answers(model, asked, targets, _Counting(**SIZES))
    steps = 2 * REPEATS * model.config.num_hidden_layers * SEQUENCES
    skipped = 1 - sum(_Counting.made) / steps
    anew = answers(model, asked, targets, arms["ours"])
    progress(
        f"asked again: kept {mean(kept):.3f}, anew {mean(anew):.3f}; kept in {skipped:.2f} of the steps and layers"
    )
    return {
        "exact": Measured([(whole - plain).abs().max().item()], [0.0]),
        "extrapolation": Measured(found["ours", LONG], found["full", LONG]),
        "re-indexing": Measured(found["ours", LONG], found["in place", LONG]),
        "selection": Measured(found["ours", LONG], found["random", LONG]),
        "trained-length": Measured(found["ours", TRAINED], found["full", TRAINED]),
        "selection-cache": Measured(kept, anew),
        "skipped": Measured([skipped], [0.0]),
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


REPRODUCTION = Reproduction(
    slug="token-select",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A two-layer Llama (width 64) on one-hop recall; the context is read in blocks of 8 tokens, each with a "
        "selection of its own, the questions are steps. 42 tokens are read at a time."
    ),
    not_testable={
        "soft-vote": "the recall model answers as well with summed logits",
        "speed": "it needs a GPU kernel; benchmarks/sparse_read.py times one layer on a CPU",
    },
)
