"""PAINT on the glyph model with a hint: does a boost of image tokens let the image win where text contradicts it?

prompt    BOS, 36 image tokens, a colour (the hint), a key that is in the image; the answer is that key's colour
hint      right in 75 of 100 training prompts, so that a model reads the image less the worse it can be read
image     glyphs as they are, under noise of sd 0.15 to 1
training  decoder and projector of the glyph model go on from their weights; the vision tower stays as it is
test      each image twice: with a wrong hint (a conflict), and with the right one
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqwise.core.anatomy import Anatomy
from seqwise.core.run import Run
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.lab.zoo.glyphs import COLOUR_ID, COLOURS, NOISE, PATCHES, GlyphBatch, batch, trained
from seqwise.methods.attend.imbalanced_attention import PAINT

RIGHT = 0.75  # of the hints in training
WORST = 1.0  # sd of the noise of the least readable images
STEPS, BATCH, RATE = 600, 64, 1e-3
IMAGES = 512  # per seed
ALPHA = PAINT().alpha

CLAIMS = (
    Claim(
        key="conflict",
        text="where the hint is wrong, PAINT with its defaults answers more questions than the plain model",
        paper="LLaVA-1.5-7B: CHAIR_S 46.2 -> 17.6, CHAIR_I 13.8 -> 4.0",
        direction=">",
        margin=0.0,
        baseline="the plain model",
    ),
    Claim(
        key="selection",
        text="where the hint is wrong, PAINT answers more questions than a boost of all image tokens by the same alpha",
        paper="selected tokens beat PAI, which boosts all image tokens",
        direction=">",
        margin=0.0,
        baseline="every image token boosted by alpha = 0.7",
    ),
    Claim(
        key="cost",
        text="where the hint is right, PAINT costs at most 5 points of accuracy",
        paper="F1 75.9 -> 71.8, the price of fewer hallucinations",
        direction=">=",
        margin=0.05,
        baseline="the plain model",
    ),
    Claim(
        key="informed-tokens",
        text="the boosted sets hold a larger share of the object patches than of all patches",
        paper="local tokens carry object detail, summary tokens what the whole image shows",
        direction=">",
        margin=0.0,
        baseline="share of all patches that is in the sets",
    ),
    Claim(
        key="known-objects",
        text="where the hint is wrong, the same boost on the object patches alone answers more than the plain model",
        paper="attention to informed tokens is what fixes hallucinations",
        direction=">",
        margin=0.0,
        baseline="the plain model",
    ),
    Claim(
        key="known-objects-against-all",
        text="where the hint is wrong, the object patches boosted alone answer more than all image tokens boosted",
        paper="attention to informed tokens is what fixes hallucinations",
        direction=">",
        margin=0.0,
        baseline="every image token boosted by alpha = 0.7",
    ),
    Claim(
        key="captions",
        text="captions of photographs name up to 62.3 % fewer objects that are not there",
        paper="MSCOCO val, 500 images, 512 new tokens: CHAIR_S 46.2 -> 17.6 (15.4 with the spatial set)",
        direction="<",
        margin=0.0,
        baseline="LLaVA-1.5-7B",
    ),
)


@dataclass(frozen=True)
class Given(PAINT):
    """The same boost on sets that the caller puts into `run.state`: (images, patches), 1 local, 2 summary."""

    abstract: ClassVar[bool] = True

    def watched_tower(self, anatomy: Anatomy) -> None:  # type: ignore[override]  # PAINT always looks
        return None


def noisy(drawn: GlyphBatch, generator: torch.Generator) -> GlyphBatch:
    """The same images under more noise: its sd is drawn from [NOISE, WORST] for each."""
    n = len(drawn.answers)
    sd = NOISE + (WORST - NOISE) * torch.rand(n, 1, 1, 1, generator=generator)
    more = (sd**2 - NOISE**2).sqrt() * torch.randn(drawn.pixel_values.shape, generator=generator)
    return drawn._replace(pixel_values=drawn.pixel_values + more)


def hinted(drawn: GlyphBatch, right: Tensor, generator: torch.Generator) -> GlyphBatch:
    """The prompts with a colour before the key: the answer where right (B,) bool, else one of the other colours."""
    n = len(drawn.answers)
    step = torch.randint(1, len(COLOURS), (n,), generator=generator)
    wrong = COLOUR_ID + (drawn.answers - COLOUR_ID + step) % len(COLOURS)
    hint = torch.where(right, drawn.answers, wrong)
    ids = torch.cat([drawn.input_ids[:, :-1], hint[:, None], drawn.input_ids[:, -1:]], 1)
    return drawn._replace(input_ids=ids)


def train(seed: int, progress: Progress) -> Any:
    """The glyph model of this seed, tuned to prompts with hints."""
    model = trained(seed, lambda step, loss: progress(f"training the glyph model, step {step}, loss {loss:.3f}"))
    model.model.vision_tower.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / STEPS)
    for step in range(STEPS):
        drawn = noisy(batch(BATCH, 1_000_000 * (seed + 1) + step), generator)
        drawn = hinted(drawn, torch.rand(BATCH, generator=generator) < RIGHT, generator)
        out = model(input_ids=drawn.input_ids, pixel_values=drawn.pixel_values, logits_to_keep=1, use_cache=False)
        loss = nn.functional.cross_entropy(out.logits[:, -1], drawn.answers)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def answered(
    model: Any, drawn: GlyphBatch, method: PAINT | None = None, sets: Tensor | None = None
) -> tuple[list[float], Run | None]:
    """Per image 1.0 where the answer is the likeliest token, else 0.0, and the run. sets: of a `Given` method."""
    prompt = {"input_ids": drawn.input_ids, "pixel_values": drawn.pixel_values}
    options = {"logits_to_keep": 1, "use_cache": False}
    run = None
    if method is None:
        logits = model(**prompt, **options).logits
    else:
        with method.on(model) as run:
            if sets is not None:
                run.state[method] = sets
            logits = model(**prompt, **options).logits
    return (logits[:, -1].argmax(-1) == drawn.answers).double().tolist(), run


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    progress("training on hints")
    model = train(seed, progress)
    progress("answering")
    generator = torch.Generator().manual_seed(7000 + seed)
    images = noisy(batch(IMAGES, 7000 + seed), generator)
    nobody = torch.zeros(IMAGES, dtype=torch.bool)
    conflict, agreement = hinted(images, nobody, generator), hinted(images, ~nobody, generator)
    objects = torch.zeros(IMAGES, PATCHES, dtype=torch.long).scatter(1, images.objects, 1)

    plain, _ = answered(model, conflict)
    ours, run = answered(model, conflict, PAINT())
    everything, _ = answered(model, conflict, PAINT.pai(ALPHA))
    known, _ = answered(model, conflict, Given(), objects)
    assert run is not None
    chosen = (run.state[PAINT()] > 0).double()  # (IMAGES, PATCHES)
    return {
        "conflict": Measured(ours, plain),
        "selection": Measured(ours, everything),
        "cost": Measured(answered(model, agreement, PAINT())[0], answered(model, agreement)[0]),
        "informed-tokens": Measured(chosen.gather(1, images.objects).mean(-1).tolist(), chosen.mean(-1).tolist()),
        "known-objects": Measured(known, plain),
        "known-objects-against-all": Measured(known, everything),
    }


REPRODUCTION = Reproduction(
    slug="imbalanced-attention",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A hint in the prompt stands for what a language model would say without looking; one question and one token of "
        "answer instead of a caption. The decoder has four layers, of which the last two act; the image has 36 patches. "
        "No guidance (gamma = 1). The noise, the share of right hints and the steps were set by the plain model's accuracy "
        "alone. Looked at afterwards: the asked patch is looked up in the decoder's first layer (44 % of the last row's "
        "attention, at most 13 % in later ones), where PAINT does not act by default. From layer 0 on (start=0) it answers "
        "no more conflicts either (50, 65 and 58 %; plain 50, 64 and 59 %) and loses 4 to 9 points where the hint is right; "
        "all image tokens boosted from layer 0 on gain 6 to 7 points on conflicts and lose as much."
    ),
    not_testable={"captions": "needs LLaVA-1.5-7B, MSCOCO images and the CHAIR word lists"},
)
