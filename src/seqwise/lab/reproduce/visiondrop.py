"""VisionDrop on the staged model: is visual attention a better judge of visual tokens than text, and does merging help?

36 image tokens, of which two hold a key and its value; one question about one key. The decoder has four layers, and
text sees the image from the third on. Reductions: behind the encoder, and behind layers 1, 2 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from seqwise.core.anatomy import Anatomy
from seqwise.core.method import Method, param
from seqwise.core.select import keep_best
from seqwise.core.views import Stage
from seqwise.lab.reproduce._glyphs import RandomPatches
from seqwise.lab.reproduce._staged import right_answers
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.lab.zoo.staged import StagedBatch, batch, train
from seqwise.methods.reduce.visiondrop import VisionDrop

IMAGES = 512  # per seed
STAGES = (1, 2, 3)
# 11, 8, 6 and 4 of 36 tokens in layers 1 to 4, a fifth of all; CLS is one of the 8 dominant ones of the encoder
TOKENS, CONTEXTUAL = (11, 8, 6, 4), (3, 2, 2, 2)
ENCODER = (12, 3)  # the encoder's reduction alone: tokens, contextual ones among them
INSIDE = (18, 9, 4)  # the stages alone

CLAIMS = (
    Claim(
        key="quality",
        text="with a fifth of the visual tokens per layer at least 91 % of the questions are answered",
        paper="more than 91 % of the performance with 5.6 % of the tokens (LLaVA-1.5-7B)",
        direction=">=",
        margin=0.09,
        baseline="the model with all 36 image tokens",
    ),
    Claim(
        key="encoder",
        text="the encoder's reduction alone (to 12 of 36 tokens) costs little",
        paper="little lost before the stages; no figure could be read",
        direction=">=",
        margin=0.05,
        baseline="the model with all 36 image tokens",
    ),
    Claim(
        key="encoder-random",
        text="the encoder's reduction keeps more of what is asked for than chance",
        paper="no figure could be read",
        direction=">",
        margin=0.0,
        baseline="12 patches drawn by chance",
    ),
    Claim(
        key="contextual",
        text="merging the rest into contextual tokens is no worse than keeping as many dominant ones",
        paper="contextual merging helps; no figure could be read",
        direction=">=",
        margin=0.01,
        baseline="11, 8, 6 and 4 dominant tokens",
    ),
    Claim(
        key="visual-random",
        text="inside the decoder visual attention (18, 9, 4 tokens) finds more of what is asked for than chance",
        paper="no figure could be read",
        direction=">",
        margin=0.0,
        baseline="as many tokens drawn by chance",
    ),
    Claim(
        key="visual-text",
        text="inside the decoder visual attention (18, 9, 4 tokens) finds more of what is asked for than text does",
        paper="text-guided pruning loses more, the more is dropped; no figure could be read",
        direction=">",
        margin=0.0,
        baseline="attention of the last text row in the next layer",
    ),
    Claim(
        key="position",
        text="visual attention favours positions less than text does (|rank correlation| with the position, layer 3)",
        paper="the last text row prefers image tokens near the end; no figure could be read",
        direction="<",
        margin=0.0,
        baseline="attention of the last text row",
    ),
    Claim(
        key="speed",
        text="latency and computation fall (LLaVA-NeXT-7B)",
        paper="2.7 times lower latency, 6 times fewer FLOPs, 95.71 % of the performance",
        direction=">",
        margin=0.0,
        baseline="the model with all image tokens",
    ),
)


@dataclass(frozen=True)
class Rival(Method):
    """As many tokens at the same stages, by luck or by the last text row's attention in the next layer."""

    abstract: ClassVar[bool] = True  # a baseline of this reproduction: no list of methods shows it
    criterion: Literal["chance", "last row"] = "chance"
    counts: tuple[int, ...] = param(INSIDE, ge=1)
    seed: int = param(0, ge=0)

    slots: ClassVar[tuple[str, ...]] = ("layer.rows",)
    positions: ClassVar[str] = "renumber"

    def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
        return STAGES

    def keep_rows(self, stage: Stage) -> Tensor:
        if self.criterion == "last row":
            score = stage.received(stage.order == stage.order.amax(-1, keepdim=True)).mean(1)  # (B, r)
        else:
            luck = torch.Generator().manual_seed(self.seed * 100 + stage.layer)
            score = torch.rand(stage.live.shape, generator=luck)
        count = torch.full((len(score),), self.counts[STAGES.index(stage.layer)])
        return (stage.live & ~stage.visual) | keep_best(score, stage.visual, count)


def position_bias(model: nn.Module, drawn: StagedBatch) -> tuple[list[float], list[float]]:
    """|Rank correlation| of score and position behind layer 2, per image: by visual rows, and by the last text row."""
    found: list[list[float]] = []

    class Watch(Rival):
        abstract: ClassVar[bool] = True

        def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
            return (2,)

        def keep_rows(self, stage: Stage) -> Tensor:
            image = stage.visual[0]  # the same columns in every sample
            last = stage.order == stage.order.amax(-1, keepdim=True)
            for rows in (stage.visual, last):
                score = stage.received(rows).mean(1)[:, image]
                found.append(spearman_with_position(score).abs().tolist())
            return stage.live

    right_answers(model, drawn, Watch())
    visual, text = found
    return visual, text


def spearman_with_position(score: Tensor) -> Tensor:
    """Rank correlation of scores (B, n), no two of a row alike, with 0..n-1: (B,)."""
    n = score.shape[-1]
    rank = score.argsort(-1).argsort(-1).double() - (n - 1) / 2  # (B, n)
    place = torch.arange(n).double() - (n - 1) / 2
    return rank @ place / place.square().sum()


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    model = train(seed, lambda step, loss: progress(f"training, step {step}, loss {loss:.3f}"))
    progress("answering")
    drawn = batch(IMAGES, 5000 + seed, questions=1)

    def answered(method: Method | None = None) -> list[float]:
        return right_answers(model, drawn, method)

    plain = answered()
    whole = answered(VisionDrop(budget=TOKENS, contextual=CONTEXTUAL, prune_after=STAGES))
    encoder = answered(VisionDrop(budget=ENCODER[0], contextual=ENCODER[1], prune_after=()))
    inside = answered(VisionDrop(budget=(1.0, *INSIDE), contextual=0, prune_after=STAGES))
    return {
        "quality": Measured(whole, plain),
        "encoder": Measured(encoder, plain),
        "encoder-random": Measured(encoder, answered(RandomPatches(count=ENCODER[0], seed=seed))),
        "contextual": Measured(whole, answered(VisionDrop(budget=TOKENS, contextual=0, prune_after=STAGES))),
        "visual-random": Measured(inside, answered(Rival(seed=seed))),
        "visual-text": Measured(inside, answered(Rival(criterion="last row"))),
        "position": Measured(*position_bias(model, drawn)),
    }


REPRODUCTION = Reproduction(
    slug="visiondrop",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A LLaVA-architecture model with four decoder layers and 36 image tokens instead of 32 and 576; 5.6 % of these "
        "would be two. The tower's CLS token is trained to know the objects, so that it attends to them. Visual and text "
        "attention inside the decoder are compared without contextual tokens. By design the decoder's image rows do not "
        "read each other before layer 3."
    ),
    not_testable={"speed": "four narrow layers and 36 tokens spend their time elsewhere; benchmarks measure speed"},
)
