"""VTC-CLS on the glyph model: does the tower's CLS token, over its last layers, find the patches that hold objects?

36 patches, four with an object, one question about one of them; the tower has six layers, of which five make the
feature. The models are those of FoPru's reproduction, trained once a seed.
"""

from __future__ import annotations

from seqwise.core.run import Run
from seqwise.lab.reproduce._glyphs import RandomPatches, answered
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.lab.zoo.glyphs import GlyphBatch, batch, trained
from seqwise.methods.reduce.vtc_cls import VTCCLS

IMAGES = 512  # per seed
LARGE, MIDDLE, SMALL = 16, 8, 4  # of 36 patches, for the paper's 256, 128 and 64 of 576
START = 3  # layers 3 and 4 of six are added up, as 16 to 22 of 24 in the paper's setting
LAST = 4  # the feature layer alone

_FULL = "the model with all 36 patches"

CLAIMS = (
    Claim(
        key="keep-44",
        text="with 44 % of the visual tokens accuracy falls by no more than the paper's 0.6 %",
        paper="256 of 576: 61.7 against 62.1, average of eight benchmarks (LLaVA-1.5-7B)",
        direction=">=",
        margin=0.006,
        baseline=_FULL,
    ),
    Claim(
        key="keep-22",
        text="with 22 % of the visual tokens accuracy falls by no more than the paper's 2.6 %",
        paper="128 of 576: 60.5 against 62.1",
        direction=">=",
        margin=0.026,
        baseline=_FULL,
    ),
    Claim(
        key="keep-11",
        text="with 11 % of the visual tokens accuracy falls by no more than the paper's 6 %",
        paper="64 of 576: 58.4 against 62.1",
        direction=">=",
        margin=0.06,
        baseline=_FULL,
    ),
    Claim(
        key="random-11",
        text="at 11 % more questions are answered than with tokens drawn by chance",
        paper="no figure known",
        direction=">",
        margin=0.0,
        baseline="4 patches drawn by chance",
    ),
    Claim(
        key="objects-11",
        text="at 11 % a larger share of the object patches is kept than by chance",
        paper="the CLS token attends to the objects; no figure known",
        direction=">",
        margin=0.0,
        baseline="4 patches drawn by chance",
    ),
    Claim(
        key="ensemble-11",
        text="at 11 % the sum over layers answers more questions than the feature layer alone",
        paper="layers 16 to 22 are added up; no figure for one layer could be read",
        direction=">",
        margin=0.0,
        baseline="the CLS attention of the feature layer",
    ),
    Claim(
        key="fastv",
        text="it beats dropping by the prompt's attention inside the language model (FastV)",
        paper="60.5 against 56.6 with 128 tokens, 58.4 against 45.3 with 64",
        direction=">",
        margin=0.0,
        baseline="FastV",
    ),
    Claim(
        key="prumerge",
        text="it beats PruMerge+",
        paper="60.5 against 58.6 with 128 tokens, 58.4 against 56.3 with 64",
        direction=">",
        margin=0.0,
        baseline="PruMerge+",
    ),
    Claim(
        key="speed",
        text="evaluation takes little more than half of the time",
        paper="GQA 1,750 s against 3,018 s, POPE 1,216 s against 1,921 s (64 tokens)",
        direction="<",
        margin=0.0,
        baseline="the full model",
    ),
)


def kept_objects(run: Run, drawn: GlyphBatch) -> list[float]:
    """Share of each image's object patches that entered the language model."""
    shares = []
    for stages, objects in zip(run.kept(), drawn.objects.tolist(), strict=True):
        kept = {position - 1 for position in stages["input"]}  # BOS stands before the image
        shares.append(sum(patch in kept for patch in objects) / len(objects))
    return shares


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    model = trained(seed, lambda step, loss: progress(f"training, step {step}, loss {loss:.3f}"))
    progress("answering")
    drawn = batch(IMAGES, 5000 + seed)
    plain, _ = answered(model, drawn)
    large, middle = (answered(model, drawn, VTCCLS(budget=U, start=START))[0] for U in (LARGE, MIDDLE))
    small, run = answered(model, drawn, VTCCLS(budget=SMALL, start=START))
    one_layer, _ = answered(model, drawn, VTCCLS(budget=SMALL, start=LAST))
    chance, chance_run = answered(model, drawn, RandomPatches(count=SMALL, seed=seed))
    assert run is not None and chance_run is not None
    return {
        "keep-44": Measured(large, plain),
        "keep-22": Measured(middle, plain),
        "keep-11": Measured(small, plain),
        "random-11": Measured(small, chance),
        "objects-11": Measured(kept_objects(run, drawn), kept_objects(chance_run, drawn)),
        "ensemble-11": Measured(small, one_layer),
    }


REPRODUCTION = Reproduction(
    slug="vtc-cls",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A LLaVA-architecture model of width 64 with 36 patches instead of 576 and six tower layers instead of 24, so "
        "that two layers are added up instead of seven. Its CLS token was trained, at the layer that the projector "
        "reads, to name the objects, as CLIP's was by captions; an untrained one ranks patches no better than chance."
    ),
    not_testable={
        "fastv": "one of the decoder's four layers is enough to look the answer up: without any image token behind the "
        "first, as many questions are answered as with all, so that what a method drops there costs nothing",
        "prumerge": "PruMerge+ merges tokens and is not part of this library",
        "speed": "38 tokens are no load; time at this size says nothing of a GPU's",
    },
)
