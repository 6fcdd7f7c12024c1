"""QuoTA on drawn scenes: four frames in a row, one of which shows what the question is about.

Each frame is asked for the object by the same model: "is there a red circle ?", p = P(yes). Where the question leaves
the colour open, it is asked for each colour, and the most certain yes counts. All arms spend the same number of visual
tokens and resize frames bilinearly; the model has been trained on frames of random grids from 3 x 3 to 8 x 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.lab.zoo.scenes import PATCHES, Example, batch, frames, load
from seqwise.lab.zoo.scenes_data import COLOURS, SHAPES
from seqwise.methods.reduce.quota import QuoTA, yes_probability

QUESTIONS = 240  # per seed
FRAMES = 4  # of 64 visual tokens each
LEAST, SMALL, MEDIUM = 16, 36, 64  # of 256 tokens; alike for all frames, these are grids of 2 x 2, 3 x 3 and 4 x 4
ROWS = 40  # prompts in one forward

CLAIMS = (
    Claim(
        key="needle-least",
        text="with the fewest tokens (16 of 256) QuoTA answers more questions on a needle frame than equal shares",
        paper="VNBench, 3,136 tokens: 30.7 -> 49.2",
        direction=">",
        margin=0.0,
        baseline="the same tokens, shared out equally",
    ),
    Claim(
        key="needle-small",
        text="with few tokens (36 of 256) QuoTA answers more questions on a needle frame than equal shares",
        paper="VNBench, 6,272 tokens: 40.5 -> 58.0",
        direction=">",
        margin=0.0,
        baseline="the same tokens, shared out equally",
    ),
    Claim(
        key="needle-medium",
        text="with more tokens (64 of 256), where both are near the ceiling here, QuoTA is no worse than equal shares",
        paper="VNBench, 12,544 tokens: 54.4 -> 60.6",
        direction=">=",
        margin=0.02,
        baseline="the same tokens, shared out equally",
    ),
    Claim(
        key="gain-shrinks",
        text="the gain over equal shares is larger with 16 tokens than with 64",
        paper="VNBench: +18.5 with 3,136 tokens, +6.2 with 12,544",
        direction=">",
        margin=0.0,
        baseline="the gain with 64 tokens",
    ),
    Claim(
        key="frames",
        text="QuoTA answers more questions than whole frames drawn by chance (64 tokens: one of four frames)",
        paper="no figure could be read",
        direction=">",
        margin=0.0,
        baseline="one whole frame drawn by chance",
    ),
    Claim(
        key="shuffled",
        text="a check, no claim of the paper: with the scores of other frames nothing is gained (36 tokens)",
        paper="none",
        direction="<=",
        margin=0.02,
        baseline="the same tokens, shared out equally",
    ),
    Claim(
        key="pool",
        text="bilinear resizing is on a par with adaptive pooling (36 tokens)",
        paper="VNBench: 64.7 against 64.8",
        direction=">=",
        margin=0.05,
        baseline="adaptive pooling",
    ),
    Claim(
        key="merge",
        text="bilinear resizing is no worse than token merging (36 tokens)",
        paper="VNBench: 64.7 against 63.0",
        direction=">=",
        margin=0.05,
        baseline="token merging",
    ),
    Claim(
        key="decoupling",
        text="objects named by chain of thought score frames better than the question as it is",
        paper="an ablation; no figure could be read",
        direction=">",
        margin=0.0,
        baseline="the question as it is",
    ),
    Claim(
        key="general",
        text="averages over video benchmarks rise at an equal number of tokens",
        paper="+3.2 % over six benchmarks (LLaVA-Video-7B)",
        direction=">",
        margin=0.0,
        baseline="equal shares",
    ),
)


def objects(example: Example) -> list[str]:
    """What frames are asked for: the object of a place question; of a colour question, its shape in every colour."""
    words = example.question.split()
    shape = next(word for word in words if word in SHAPES)
    colours = [word for word in words if word in COLOURS] or COLOURS
    return [f"{colour} {shape}" for colour in colours]


def relevance(model: nn.Module, examples: Sequence[Example]) -> list[Tensor]:
    """p (frames,) of each example's frames."""
    asked = [
        replace(example, pixels=frame[None], prompt=f"<image> is there a {name} ?", answer="yes")
        for example in examples
        for frame in example.pixels
        for name in objects(example)
    ]
    found = []
    for start in range(0, len(asked), ROWS * FRAMES):
        inputs = batch(asked[start : start + ROWS * FRAMES])
        with torch.no_grad():
            logits = model(**inputs.inputs(), logits_to_keep=1, use_cache=False).logits[:, -1]
        found.append(yes_probability(logits, int(inputs.answers[0])))
    p = iter(torch.cat(found).split([len(objects(example)) for example in examples for _ in example.pixels]))
    return [torch.stack([next(p).max() for _ in example.pixels]) for example in examples]


def answered(model: nn.Module, examples: Sequence[Example], p: Sequence[Tensor], method: QuoTA) -> list[float]:
    """Per example 1.0 where the most probable next token is the answer, else 0.0; p: (frames,) of each."""
    right: list[float] = []
    for start in range(0, len(examples), ROWS):
        drawn = batch(examples[start : start + ROWS])
        scores = torch.cat(list(p[start : start + ROWS]))
        with torch.no_grad(), method.on(model, scorer=lambda scores=scores: scores):  # type: ignore[misc]
            logits = model(**drawn.inputs(), logits_to_keep=1, use_cache=False).logits[:, -1]
        right += (logits.argmax(-1) == drawn.answers).double().tolist()
    return right


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    model, _ = load()
    progress("scoring frames")
    examples = frames(QUESTIONS, 7000 + seed, images=(FRAMES,), types=("colour", "place"))
    p = relevance(model, examples)
    equal = [torch.ones(FRAMES)] * len(examples)
    draw = torch.Generator().manual_seed(seed)
    lucky = [torch.eye(FRAMES)[int(torch.randint(FRAMES, (1,), generator=draw))] for _ in examples]
    progress("answering")
    ours = {Q: answered(model, examples, p, QuoTA(budget=Q)) for Q in (LEAST, SMALL, MEDIUM)}
    flat = {Q: answered(model, examples, equal, QuoTA(budget=Q)) for Q in (LEAST, SMALL, MEDIUM)}
    gains = {Q: [a - b for a, b in zip(ours[Q], flat[Q], strict=True)] for Q in (LEAST, MEDIUM)}
    return {
        "needle-least": Measured(ours[LEAST], flat[LEAST]),
        "needle-small": Measured(ours[SMALL], flat[SMALL]),
        "needle-medium": Measured(ours[MEDIUM], flat[MEDIUM]),
        "gain-shrinks": Measured(gains[LEAST], gains[MEDIUM]),
        "frames": Measured(ours[MEDIUM], answered(model, examples, lucky, QuoTA(budget=PATCHES))),
        "shuffled": Measured(answered(model, examples, [one.roll(1) for one in p], QuoTA(budget=SMALL)), flat[SMALL]),
        "pool": Measured(ours[SMALL], answered(model, examples, p, QuoTA(budget=SMALL, resize="pool"))),
        "merge": Measured(ours[SMALL], answered(model, examples, p, QuoTA(budget=SMALL, resize="merge"))),
    }


REPRODUCTION = Reproduction(
    slug="quota",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A LLaVA-architecture model of width 96 and four drawn frames of 8 x 8 visual tokens instead of 64 frames of "
        "27 x 27; questions on the colour or the place of a large object that one frame shows. The seeds are three "
        "streams of scenes on the one model that ships; it is its own scorer. What a frame is asked for comes from the "
        "question's words, as the model cannot reason in text."
    ),
    not_testable={
        "decoupling": "the small model cannot reason in text, so it names no objects",
        "general": "benchmarks of real videos need a model that answers questions on them",
    },
)
