"""VMTC and CMAI on the staged model: do they leave what a question needs, where plain down-sampling loses it?

36 image tokens, of which two hold a key and its value; one question about one key. The decoder has four layers, and
text sees the image from the third on, which is where CMAI begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from seqwise.core.method import Method, param
from seqwise.core.run import Run
from seqwise.core.segments import Segments
from seqwise.core.towers import Merged, Tower
from seqwise.lab.reproduce._staged import right_answers
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.lab.zoo.staged import SIDE, StagedBatch, batch, train
from seqwise.methods.reduce.vmtc_cmai import CMAI, VMTC, compress, importance

IMAGES = 512  # per seed
PRIMARY, CLUSTERS = 6, 3  # a sixth and a twelfth of 36 patches
MUCH = 0.75  # of the image tokens hidden, where the choice must show

CLAIMS = (
    Claim(
        key="compressed",
        text="VMTC (6 primary and 3 merged tokens of 36) keeps understanding",
        paper="kept on VQA-v2, GQA, TextVQA, MME and MMBench; no figure could be read",
        direction=">=",
        margin=0.02,
        baseline="the model with all 36 image tokens",
    ),
    Claim(
        key="pooling",
        text="VMTC keeps more than plain down-sampling to as many tokens",
        paper="down-sampling hurts understanding; no figure could be read",
        direction=">",
        margin=0.0,
        baseline="average pooling of 2 x 2 patches",
    ),
    Claim(
        key="merged",
        text="with one primary patch, three merged tokens save what the choice of that patch has lost",
        paper="no figure could be read",
        direction=">",
        margin=0.0,
        baseline="the primary patch alone",
    ),
    Claim(
        key="cohesion",
        text="patches that are merged are alike: cosine with their cluster's mean direction",
        paper="redundant tokens are clustered under cosine similarity",
        direction=">",
        margin=0.0,
        baseline="clusters of the same sizes drawn by chance",
    ),
    Claim(
        key="inhibited",
        text="CMAI, hiding half of the image from each text row, keeps understanding",
        paper="kept on VQA-v2, GQA, TextVQA, MME and MMBench; no figure could be read",
        direction=">=",
        margin=0.02,
        baseline="the model with all 36 image tokens",
    ),
    Claim(
        key="focus",
        text="what CMAI hides (three quarters) matters less than what chance hides",
        paper="inhibits attention of text to irrelevant image tokens",
        direction=">",
        margin=0.0,
        baseline="as many image tokens hidden from text by chance",
    ),
    Claim(
        key="both",
        text="VMTC and CMAI together keep understanding",
        paper="kept on VQA-v2, GQA, TextVQA, MME and MMBench; no figure could be read",
        direction=">=",
        margin=0.02,
        baseline="the model with all 36 image tokens",
    ),
    Claim(
        key="instructions",
        text="instructions on the form of the answer are followed better",
        paper="clearly better; no figure could be read",
        direction=">",
        margin=0.0,
        baseline="the model with all image tokens",
    ),
)


@dataclass(frozen=True)
class Pooling(Method):
    """Average pooling of 2 x 2 patches in front of the projector."""

    abstract: ClassVar[bool] = True  # a baseline of this reproduction: no list of methods shows it

    slots: ClassVar[tuple[str, ...]] = ("input.rows",)

    def needs(self) -> set[str]:
        return {"vision tower"}

    def keep_input(self, tower: Tower) -> Merged:
        assert tower.features is not None
        X = tower.features[:, tower.specials :].unflatten(1, (SIDE // 2, 2, SIDE // 2, 2))
        at = torch.arange(SIDE * SIDE).view(SIDE // 2, 2, SIDE // 2, 2)
        k = (SIDE // 2) ** 2
        member = torch.arange(k).view(SIDE // 2, 1, SIDE // 2, 1).expand(at.shape).flatten()
        T = X.shape[0]
        return Merged(
            at[:, 0, :, 0].flatten().expand(T, -1), tower.project(X.mean((2, 4)).flatten(1, 2)), member.expand(T, -1)
        )


@dataclass(frozen=True)
class HiddenByChance(Method):
    """Hides a share of the image's tokens, drawn by chance, from the text rows behind it."""

    abstract: ClassVar[bool] = True
    share: float = param(MUCH, ge=0, le=1)
    seed: int = param(0, ge=0)

    slots: ClassVar[tuple[str, ...]] = ("mask",)

    def mark(self, segments: Segments, run: Run) -> dict[str, Tensor]:
        """kind: 2 on image tokens to hide, 1 on text behind the image, 0 elsewhere."""
        visual = segments.visual
        luck = torch.rand(visual.shape, generator=torch.Generator().manual_seed(self.seed)).masked_fill(~visual, 2.0)
        count = (visual.sum(-1, keepdim=True) * self.share).long()
        hidden = visual & (luck.argsort(-1).argsort(-1) < count)
        text = ~visual & (visual.cumsum(-1) > 0)
        return {"kind": 2 * hidden.long() + text.long()}

    def sees(self, query: dict[str, Tensor], key: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return (query["kind"] != 1) | (key["kind"] != 2)


def cohesion(model: nn.Module, drawn: StagedBatch, seed: int) -> tuple[list[float], list[float]]:
    """Per image the mean cosine of merged patches with their cluster's mean direction: of VMTC's clusters, and of ones
    of the same sizes drawn by chance."""
    found: list[tuple[float, float]] = []
    luck = torch.Generator().manual_seed(seed)

    class Watch(VMTC):
        abstract: ClassVar[bool] = True

        def keep_input(self, tower: Tower) -> Tensor | Merged:
            assert tower.features is not None
            ips = importance(tower.received(rows="cls"), tower.specials)
            for x, score in zip(tower.features[:, tower.specials :], ips, strict=True):
                made = compress(x, score, PRIMARY, CLUSTERS)
                redundant = torch.ones(len(x), dtype=torch.bool)
                redundant[score.topk(PRIMARY).indices] = False
                u, group = normalize(x[redundant], dim=-1), made.member[redundant]
                chance = group[torch.randperm(len(group), generator=luck)]
                found.append((alike(u, group), alike(u, chance)))
            return super().keep_input(tower)

    right_answers(model, drawn, Watch())
    return [ours for ours, _ in found], [chance for _, chance in found]


def alike(u: Tensor, group: Tensor) -> float:
    """Mean cosine of unit vectors u (R, d) with the mean direction of their group (R,)."""
    joined = group[:, None] == group  # (R, R)
    return float((u * normalize(joined.float() @ u, dim=-1)).sum(-1).mean())


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    model = train(seed, lambda step, loss: progress(f"training, step {step}, loss {loss:.3f}"))
    progress("answering")
    drawn = batch(IMAGES, 5000 + seed, questions=1)

    def answered(method: Method | None = None) -> list[float]:
        return right_answers(model, drawn, method)

    plain, vmtc = answered(), VMTC(budget=PRIMARY + CLUSTERS, clusters=CLUSTERS)
    compressed = answered(vmtc)
    return {
        "compressed": Measured(compressed, plain),
        "pooling": Measured(compressed, answered(Pooling())),
        "merged": Measured(answered(VMTC(budget=4, clusters=3)), answered(VMTC(budget=1, clusters=0))),
        "cohesion": Measured(*cohesion(model, drawn, seed)),
        "inhibited": Measured(answered(CMAI()), plain),
        "focus": Measured(answered(CMAI(rho=MUCH)), answered(HiddenByChance(seed=seed))),
        "both": Measured(answered(vmtc | CMAI()), plain),
    }


REPRODUCTION = Reproduction(
    slug="vmtc-cmai",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A LLaVA-architecture model with four decoder layers and 36 image tokens, whose answers are one token. The "
        "tower's CLS token is trained to know the objects, so that it attends to them. Two text rows stand behind the "
        "image, so that the focus of the last aggregates two rows. Shares, layers and clustering are our reading."
    ),
    not_testable={
        "instructions": "the model answers every question in one token of one form: there is no instruction to follow"
    },
)
