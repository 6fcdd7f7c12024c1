"""HiPrune on the glyph model: do two layers of the vision tower find what a question needs, and who of the two does?

36 patches, four with an object, one question about one of them; the tower has six layers, the second looks for objects
and the fifth makes the feature. The models are those of FoPru's reproduction, trained once a seed. In a second set of
images the two objects are 2 x 2 patches large, each patch of an object showing the same glyph in the same colour.
"""

from __future__ import annotations

import torch

from seqwise.lab.reproduce._glyphs import RandomPatches, answered
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.lab.zoo.glyphs import (
    COLOUR_ID,
    COLOURS,
    GLYPHS,
    KEY_ID,
    KEYS,
    NOISE,
    PATCH,
    PATCHES,
    SIDE,
    GlyphBatch,
    batch,
    trained,
)
from seqwise.methods.reduce.fopru import FoPru
from seqwise.methods.reduce.hiprune import HiPrune

IMAGES = 512  # per seed and set
LARGE, MIDDLE, SMALL = 12, 8, 4  # of 36 patches, for the paper's 192, 128 and 64 of 576
# the paper's 0.1 rounds to no anchor below 26 tokens; 0.5 is the least that gives one anchor at 8 and at 12
ALPHA = 0.5
BETA = 0.1  # HiPrune++: one token more at 8 and at 12, none at 4
BLOCKS = 2  # objects of 2 x 2 patches in an image of the second set: 8 patches

_FULL = "the model with all 36 patches"
_REGISTERS = "registers alone (alpha = 0)"

CLAIMS = (
    Claim(
        key="keep-33",
        text="with a third of the visual tokens accuracy falls by no more than the paper's 0.7 %",
        paper="192 of 576: 99.3 % of the full model, nine benchmarks (LLaVA-1.5-7B)",
        direction=">=",
        margin=0.007,
        baseline=_FULL,
    ),
    Claim(
        key="keep-22",
        text="with 22 % of the visual tokens accuracy falls by no more than the paper's 2.5 %",
        paper="128 of 576: 97.5 %",
        direction=">=",
        margin=0.025,
        baseline=_FULL,
    ),
    Claim(
        key="keep-11",
        text="with 11 % of the visual tokens accuracy falls by no more than the paper's 7.3 %",
        paper="64 of 576: 92.7 %",
        direction=">=",
        margin=0.073,
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
        key="text-33",
        text="a tenth more tokens, chosen by likeness to the text (HiPrune++), answer more questions at a third",
        paper="99.9 % against 99.3 %",
        direction=">",
        margin=0.0,
        baseline="HiPrune with 12 patches",
    ),
    Claim(
        key="text-22",
        text="a tenth more tokens, chosen by likeness to the text (HiPrune++), answer more questions at 22 %",
        paper="98.8 % against 97.5 %",
        direction=">",
        margin=0.0,
        baseline="HiPrune with 8 patches",
    ),
    Claim(
        key="registers",
        text="without registers, the budget spent on anchors and buffers, fewer questions are answered (33 %)",
        paper="97.9 % of the default without registers (192 tokens)",
        direction=">",
        margin=0.0,
        baseline="two anchors, their buffers, and no more than the two patches left (alpha = 1)",
    ),
    Claim(
        key="anchors",
        text="an anchor and its buffers answer more questions than as many registers (33 %)",
        paper="99.7 % of the default without anchors and buffers (192 tokens)",
        direction=">",
        margin=0.0,
        baseline=_REGISTERS,
    ),
    Claim(
        key="anchors-blocks",
        text="where objects are 2 x 2 patches, an anchor and its buffers answer more questions than as many registers "
        "(22 %)",
        paper="99.7 % of the default without anchors and buffers; objects of photographs are many patches large",
        direction=">",
        margin=0.0,
        baseline=_REGISTERS,
    ),
    Claim(
        key="all-rows",
        text="attention of all rows ranks no worse than attention of the CLS row (33 %)",
        paper="99.8 % of the default with CLS rows (192 tokens)",
        direction=">=",
        margin=0.01,
        baseline="the 12 patches that CLS attends to most in the feature layer",
    ),
    Claim(
        key="others",
        text="it keeps more of the full model's quality than VisionZip and SparseVLM",
        paper="192, 128, 64 tokens: 99.3, 97.5, 92.7 %; VisionZip 97.7, 96.2, 92.7 %; SparseVLM 98.6, 97.0, 91.8 %",
        direction=">",
        margin=0.0,
        baseline="VisionZip, SparseVLM",
    ),
    Claim(
        key="tiled",
        text="quality stays on models that cut images into tiles or take them at any size as well",
        paper="LLaVA-NeXT 640 of 2,880: 99.4 %; Qwen2.5-VL 33 %: 98.7 %",
        direction=">=",
        margin=0.013,
        baseline="the full model",
    ),
    Claim(
        key="speed",
        text="prefill is more than twice as fast",
        paper="54.3 ms to 22.0 ms (64 tokens)",
        direction="<",
        margin=0.0,
        baseline="the full model",
    ),
)


def blocks(n: int, seed: int) -> GlyphBatch:
    """Draws `n` images of two objects of 2 x 2 patches, apart from each other; `asked` is the first patch of four."""
    generator = torch.Generator().manual_seed(seed)
    half = SIDE // 2
    cell = torch.rand(n, half * half, generator=generator).argsort(-1)[:, :BLOCKS]  # (B, 2) of a 3 x 3 grid
    first = 2 * (cell // half) * SIDE + 2 * (cell % half)
    objects = first[..., None] + torch.tensor([0, 1, SIDE, SIDE + 1])  # (B, 2, 4)
    keys = torch.rand(n, KEYS, generator=generator).argsort(-1)[:, :BLOCKS]  # (B, 2), distinct
    colours = torch.randint(len(COLOURS), (n, BLOCKS), generator=generator)
    drawn = (0.3 + 0.7 * GLYPHS[keys])[:, :, None] * COLOURS[colours][..., None, None]  # (B, 2, 3, 4, 4)
    patches = torch.zeros(n, PATCHES, 3, PATCH, PATCH)
    patches[torch.arange(n)[:, None, None], objects] = drawn[:, :, None]
    image = patches.unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, SIDE * PATCH, SIDE * PATCH)
    which = torch.randint(BLOCKS, (n, 1), generator=generator)
    prompt = batch(n, seed).input_ids  # BOS, the image, and a key to be replaced
    prompt[:, -1:] = KEY_ID + keys.gather(1, which)
    return GlyphBatch(
        input_ids=prompt,
        pixel_values=image + NOISE * torch.randn(image.shape, generator=generator),
        answers=COLOUR_ID + colours.gather(1, which)[:, 0],
        objects=objects.flatten(1).sort(-1).values,
        asked=first.gather(1, which)[:, 0],
        scene=torch.full((n, KEYS), len(COLOURS)).scatter(1, keys, colours),
    )


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    model = trained(seed, lambda step, loss: progress(f"training, step {step}, loss {loss:.3f}"))
    progress("answering")
    drawn, large_objects = batch(IMAGES, 5000 + seed), blocks(IMAGES, 6000 + seed)
    plain, _ = answered(model, drawn)
    ours = {B: answered(model, drawn, HiPrune(budget=B))[0] for B in (LARGE, MIDDLE, SMALL)}
    text = {B: answered(model, drawn, HiPrune(budget=B, beta=BETA))[0] for B in (LARGE, MIDDLE)}
    chance, _ = answered(model, drawn, RandomPatches(count=SMALL, seed=seed))
    anchored, no_registers, registers = (
        answered(model, drawn, HiPrune(budget=LARGE, alpha=alpha))[0] for alpha in (ALPHA, 1.0, 0.0)
    )
    anchored_blocks, register_blocks = (
        answered(model, large_objects, HiPrune(budget=MIDDLE, alpha=alpha))[0] for alpha in (ALPHA, 0.0)
    )
    cls, _ = answered(model, drawn, FoPru(budget=LARGE, rows="cls"))
    return {
        "keep-33": Measured(ours[LARGE], plain),
        "keep-22": Measured(ours[MIDDLE], plain),
        "keep-11": Measured(ours[SMALL], plain),
        "random-11": Measured(ours[SMALL], chance),
        "text-33": Measured(text[LARGE], ours[LARGE]),
        "text-22": Measured(text[MIDDLE], ours[MIDDLE]),
        "registers": Measured(anchored, no_registers),
        "anchors": Measured(anchored, registers),
        "anchors-blocks": Measured(anchored_blocks, register_blocks),
        "all-rows": Measured(ours[LARGE], cls),
    }


REPRODUCTION = Reproduction(
    slug="hiprune",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A LLaVA-architecture model of width 64 with 36 patches instead of 576 and six tower layers instead of 24. At "
        "the paper's alpha of 0.1 so few tokens leave no room for an anchor: what is compared with the full model, with "
        "chance, with CLS rows and with HiPrune++ are registers alone. The claims about registers and anchors use "
        "alpha = 0.5, one anchor and up to four buffers. The model has seen objects of one patch only: the larger ones "
        "are the same glyph in four patches, any of which tells the answer."
    ),
    not_testable={
        "others": "VisionZip and SparseVLM merge tokens and are not part of this library",
        "tiled": "no model that cuts images into tiles or takes any size can be trained at this size in minutes",
        "speed": "38 tokens are no load; time at this size says nothing of a GPU's",
    },
)
