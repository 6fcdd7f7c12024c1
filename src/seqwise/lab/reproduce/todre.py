"""ToDRE on the glyph model: are diverse tokens the ones that a question needs, and when can all of them go?

36 patches, four with an object, one question an image about one of them. The models are those of FoPru's reproduction,
trained once a seed. The pivot comes from the feature layer of the tower: training never reaches the CLS token of the
layer behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from seqwise.core.method import param
from seqwise.core.run import Run
from seqwise.core.towers import Tower
from seqwise.core.views import Stage
from seqwise.lab.reproduce._glyphs import RandomPatches, answered
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.lab.zoo.glyphs import GlyphBatch, batch, trained
from seqwise.methods.reduce.baselines import FastV
from seqwise.methods.reduce.fopru import FoPru
from seqwise.methods.reduce.todre import ToDRE

IMAGES = 512  # per seed
QUARTER, TENTH = 9, 4  # of 36 patches; 10 % would be 3.6
FEATURE = 4  # the 0-based tower layer that the projector reads
HALF, LATE = 1, 2  # 0-based decoder layers l of 4: behind HALF two layers are left, behind LATE one, as 7 L / 8 means
TAU = 0.1  # the paper's
FORCED = 2.0  # a tau that every share of attention is below

_FULL = "the model with all 36 patches"

CLAIMS = (
    Claim(
        key="quarter",
        text="with 25 % of the visual tokens (stage 1) accuracy falls by no more than the paper's 1.8 %",
        paper="720 of 2880 tokens: 98.2 % of the full model, eight benchmarks (LLaVA-NeXT-7B)",
        direction=">=",
        margin=0.018,
        baseline=_FULL,
    ),
    Claim(
        key="tenth",
        text="with 11 % of the visual tokens (stage 1) accuracy falls by no more than the paper's 5 %",
        paper="288 of 2880 tokens: 95.0 %",
        direction=">=",
        margin=0.05,
        baseline=_FULL,
    ),
    Claim(
        key="random",
        text="at 11 % diverse tokens answer more questions than tokens drawn by chance",
        paper="no figure known",
        direction=">",
        margin=0.0,
        baseline="4 patches drawn by chance",
    ),
    Claim(
        key="cls",
        text="at 11 % diverse tokens answer more questions than those that CLS attends to most",
        paper="95.0 % against FasterVLM's 91.4 %",
        direction=">",
        margin=0.0,
        baseline="the 4 patches of most CLS attention in the feature layer",
    ),
    Claim(
        key="fastv",
        text="at 11 % diverse tokens answer more questions than those of most attention in the language model",
        paper="95.0 % against FastV's 88.8 %",
        direction=">",
        margin=0.0,
        baseline="FastV, 4 patches behind layer 2",
    ),
    Claim(
        key="max-min",
        text="at 11 % max-sum diversity answers more questions than max-min diversity (k-center)",
        paper="95.0 % against DivPrune's 93.5 %, which maximises the least distance",
        direction=">",
        margin=0.0,
        baseline="objective='kcenter', from the same pivot",
    ),
    Claim(
        key="pivot",
        text="at 11 % a random pivot is hardly worse than that of CLS",
        paper="95.8 % against 96.0 %",
        direction=">=",
        margin=0.01,
        baseline="the pivot of CLS",
    ),
    Claim(
        key="late",
        text="without any visual token in the last layers nothing is lost (stage 2 alone, forced)",
        paper="100.0 % behind layer 7 L / 8",
        direction=">=",
        margin=0.01,
        baseline=_FULL,
    ),
    Claim(
        key="half",
        text="without any visual token behind half of the layers much more is lost than behind the last layers",
        paper="about 88 % behind L / 2, 100.0 % behind 7 L / 8",
        direction="<",
        margin=0.05,
        baseline="behind layer 3 of 4",
    ),
    Claim(
        key="both",
        text="stage 2 (forced) costs nothing after stage 1 at 11 %",
        paper="+0.1 to +0.2 %",
        direction=">=",
        margin=0.01,
        baseline="stage 1 alone",
    ),
    Claim(
        key="migration",
        text="in the late layer text attends less to image tokens than in the first",
        paper="information migrates: late layers hardly relate the two",
        direction="<",
        margin=0.0,
        baseline="r_tv in the first layer",
    ),
    Claim(
        key="gate",
        text="in the late layer text gives image tokens less than tau = 0.1 of its attention, so that stage 2 acts",
        paper="fires at tau = 0.1 behind layer 7 L / 8",
        direction="<",
        margin=0.0,
        baseline="tau",
    ),
    Claim(
        key="speed",
        text="inference is 2.6 times as fast at 10 %",
        paper="2.6 times, FLOPs 31.4 -> 6.0 T, memory -14.5 %",
        direction=">",
        margin=0.0,
        baseline=_FULL,
    ),
    Claim(
        key="video",
        text="on videos pruned tokens answer no worse than all",
        paper="103.1 % and 100.9 % on four benchmarks",
        direction=">=",
        margin=0.01,
        baseline="all tokens",
    ),
)


@dataclass(frozen=True)
class RandomPivot(ToDRE):
    """ToDRE that starts from a token drawn by chance."""

    abstract: ClassVar[bool] = True  # a baseline of this reproduction: no list of methods shows it
    seed: int = param(0, ge=0)

    def watch_tower(self, tower: Tower, run: Run) -> dict[str, Tensor]:
        shape = tower.projected.shape[:2]
        return {"pivot": torch.rand(shape, generator=torch.Generator().manual_seed(self.seed))}


def text_to_image(model: nn.Module, drawn: GlyphBatch) -> dict[int, list[float]]:
    """r_tv per image, by 0-based decoder layer, of the whole images."""
    shares: dict[int, list[float]] = {}

    class Watch(ToDRE):
        abstract: ClassVar[bool] = True

        def keep_rows(self, stage: Stage) -> Tensor:
            shares[stage.layer - 1] = self.shares(stage)[0].tolist()
            return stage.live

    answered(model, drawn, Watch(budget=1.0, check_layer=(0, HALF, LATE)))
    return shares


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    model = trained(seed, lambda step, loss: progress(f"training, step {step}, loss {loss:.3f}"))
    progress("answering")
    drawn = batch(IMAGES, 5000 + seed)

    def diverse(budget: int | float, forced_behind: int | None = None) -> list[float]:
        tau, layer = (0.0, None) if forced_behind is None else (FORCED, forced_behind)
        return answered(model, drawn, ToDRE(budget=budget, tau=tau, check_layer=layer, pivot_layer=FEATURE))[0]

    plain, tenth, late = answered(model, drawn)[0], diverse(TENTH), diverse(1.0, LATE)
    random = RandomPatches(count=TENTH, seed=seed)
    center = ToDRE(budget=TENTH, tau=0.0, objective="kcenter", pivot_layer=FEATURE)
    shares = text_to_image(model, drawn)
    return {
        "quarter": Measured(diverse(QUARTER), plain),
        "tenth": Measured(tenth, plain),
        "random": Measured(tenth, answered(model, drawn, random)[0]),
        "cls": Measured(tenth, answered(model, drawn, FoPru(budget=TENTH, rows="cls"))[0]),
        "fastv": Measured(tenth, answered(model, drawn, FastV(budget=TENTH))[0]),
        "max-min": Measured(tenth, answered(model, drawn, center)[0]),
        "pivot": Measured(answered(model, drawn, RandomPivot(budget=TENTH, tau=0.0, seed=seed))[0], tenth),
        "late": Measured(late, plain),
        "half": Measured(diverse(1.0, HALF), late),
        "both": Measured(diverse(TENTH, LATE), tenth),
        "migration": Measured(shares[LATE], shares[0]),
        "gate": Measured(shares[LATE], [TAU] * IMAGES),
    }


REPRODUCTION = Reproduction(
    slug="todre",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A LLaVA-architecture model of width 64 with four decoder layers and 36 patches instead of 32 and 2880. Objects "
        "are outliers on plain noise, the easiest case for diversity, and CLS was trained to name them, the easiest "
        "case for its attention. A question's text is one token. Shares of accuracy mean points of it. Stage 2 is "
        "forced (tau = 2) where a claim says so, for the gate and the harm of what it lets go are measured apart."
    ),
    not_testable={
        "speed": "the time of 36 tokens in a model of width 64 says nothing about 2880 in a large one; that deeper "
        "layers get fewer rows is the contract suite's matter",
        "video": "the glyph model knows single images only",
    },
)
