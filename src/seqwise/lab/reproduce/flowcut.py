"""FlowCut on the glyph model: do several criteria, averaged over tower layers, beat one layer's CLS attention?

36 patches, four with an object, one question about one of them; the tower has six layers, of which five make the
feature: patches go after the second and the fourth. The models are those of FoPru's reproduction, trained once a seed.
"""

from __future__ import annotations

from seqwise.lab.reproduce._glyphs import RandomPatches, answered
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.lab.zoo.glyphs import PATCHES, batch, trained
from seqwise.methods.reduce.flowcut import FlowCut
from seqwise.methods.reduce.fopru import FoPru

IMAGES = 512  # per seed
THIRD, FIFTH, NINTH = 12, 8, 4  # of 36 patches, for the paper's 192, 128 and 64 of 576

_FULL = "the model with all 36 patches"
_ONE_LAYER = "the {T} patches that CLS attends to most in the feature layer, cut behind the tower"

CLAIMS = (
    Claim(
        key="keep-33",
        text="with a third of the visual tokens accuracy is that of the full model",
        paper="192 of 576: 100.2 % of the full model's average of 12 benchmarks",
        direction=">=",
        margin=0.01,
        baseline=_FULL,
    ),
    Claim(
        key="keep-22",
        text="with 22 % of the visual tokens accuracy falls by no more than the paper's 1.5 %",
        paper="128 of 576: 98.5 %",
        direction=">=",
        margin=0.015,
        baseline=_FULL,
    ),
    Claim(
        key="keep-11",
        text="with 11 % of the visual tokens accuracy falls by no more than the paper's 4 %",
        paper="64 of 576: 96.0 %",
        direction=">=",
        margin=0.04,
        baseline=_FULL,
    ),
    Claim(
        key="one-layer-22",
        text="at 22 % accuracy is above that of ranking by one layer's CLS attention",
        paper="98.5 % against 97.2 % (VisionZip)",
        direction=">",
        margin=0.0,
        baseline=_ONE_LAYER.format(T=FIFTH),
    ),
    Claim(
        key="one-layer-11",
        text="at 11 % accuracy is above that of ranking by one layer's CLS attention",
        paper="96.0 % against 94.4 % (VisionZip)",
        direction=">",
        margin=0.0,
        baseline=_ONE_LAYER.format(T=NINTH),
    ),
    Claim(
        key="random-11",
        text="at 11 % accuracy is above that of tokens drawn by chance",
        paper="no figure known",
        direction=">",
        margin=0.0,
        baseline="4 patches drawn by chance",
    ),
    Claim(
        key="tiled",
        text="on models that cut images into tiles, with the second cut in the decoder, quality stays as well",
        paper="LLaVA-NeXT 640 of 2880: 98.2 %; Qwen2-VL 33 %: 98.7 %",
        direction=">=",
        margin=0.02,
        baseline="the full model",
    ),
    Claim(
        key="entropy-drop",
        text="the entropy of CLS attention drops sharply at CLIP layers 11 to 15",
        paper="layers 11 to 15 of 24",
        direction="<",
        margin=0.0,
        baseline="layers before 11",
    ),
    Claim(
        key="ablations",
        text="the running mean and a cut at every second layer are each worth about one point",
        paper="POPE 85.2 against 83.8 without the running mean and 83.9 with one cut at the end",
        direction=">",
        margin=0.0,
        baseline="the method without them",
    ),
    Claim(
        key="speed",
        text="prefill is three times as fast",
        paper="3.2 times (LLaVA-NeXT, A800, POPE)",
        direction=">",
        margin=0.0,
        baseline="the full model",
    ),
)


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    model = trained(seed, lambda step, loss: progress(f"training, step {step}, loss {loss:.3f}"))
    progress("answering")
    drawn = batch(IMAGES, 5000 + seed)
    plain, _ = answered(model, drawn)
    ours = {T: answered(model, drawn, FlowCut(budget=T))[0] for T in (THIRD, FIFTH, NINTH)}
    one_layer = {T: answered(model, drawn, FoPru(budget=T / PATCHES, rows="cls"))[0] for T in (FIFTH, NINTH)}
    chance, _ = answered(model, drawn, RandomPatches(count=NINTH, seed=seed))
    return {
        "keep-33": Measured(ours[THIRD], plain),
        "keep-22": Measured(ours[FIFTH], plain),
        "keep-11": Measured(ours[NINTH], plain),
        "one-layer-22": Measured(ours[FIFTH], one_layer[FIFTH]),
        "one-layer-11": Measured(ours[NINTH], one_layer[NINTH]),
        "random-11": Measured(ours[NINTH], chance),
    }


REPRODUCTION = Reproduction(
    slug="flowcut",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A LLaVA-architecture model of width 64 with 36 patches instead of 576 and six tower layers instead of 24, so "
        "that two layers prune instead of eleven. Its CLS token was trained to name the objects, as CLIP's was by "
        "captions. VisionZip also merges what it drops; the one-layer baseline here only ranks."
    ),
    not_testable={
        "tiled": "no model that cuts images into tiles can be trained at this size in minutes",
        "entropy-drop": "the tower has six layers",
        "ablations": "two layers prune here, so a running mean over them hardly differs from the last layer alone",
        "speed": "39 tokens are no load; time at this size says nothing of a GPU's",
    },
)
