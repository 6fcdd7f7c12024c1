"""Token activation maps: on drawn maps whose interference is known, and on the zoo's model of drawn scenes.

Drawn: five words, each with a 4 x 4 object of its own on a 14 x 14 grid; the map of each word also holds a share of the
maps of the words before it, and salt. The last word's object has to be found. Scenes: questions for the colour of one
object; the map of its noun in the question and that of the colour in the answer should show that object's patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from seqwise.insight.explain.token_activation_map import (
    TokenActivationMap,
    as_uint8,
    estimated_causal_inference,
    f1_iou,
    function_iou,
    object_iou,
    otsu,
    rank_gaussian_filter,
)
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.lab.zoo.scenes import batch, load
from seqwise.lab.zoo.scenes_data import COLOURS, GRID, SHAPES, Example, scenes
from seqwise.lab.zoo.scenes_model import ID, IMAGE_ID

DRAWS = 60  # per seed
SIDE, WORDS, OBJECT = 14, 5, 4
SHARES = 0.3, 0.9  # of an earlier word's map in a later one
SALT = 0.03  # share of cells
QUESTIONS = 60  # per seed, answered right
FUNCTION_WORDS = ("what", "is", "the")

CLAIMS = (
    Claim(
        key="eci",
        text="removing what earlier words explain finds the last word's object better (IoU, drawn maps)",
        paper="causal inference against interference is the main contribution",
        direction=">",
        margin=0.3,
        baseline="raw map",
    ),
    Claim(
        key="filter-mean",
        text="the rank Gaussian filter keeps the object better than a 3 x 3 mean filter (IoU, drawn maps)",
        paper="better than other filters (figures not seen)",
        direction=">",
        margin=0.0,
        baseline="ECI and mean filter",
    ),
    Claim(
        key="filter-none",
        text="the rank Gaussian filter finds the object better than no filter (IoU, drawn maps)",
        paper="removes activation noise (figures not seen)",
        direction=">",
        margin=0.0,
        baseline="ECI alone",
    ),
    Claim(
        key="noun",
        text="the noun's map finds the asked object better than its class activation map does (Obj-IoU, scenes)",
        paper="higher Obj-IoU than earlier explainers (figures not seen)",
        direction=">",
        margin=0.0,
        baseline="relu of the noun's logits at the image",
    ),
    Claim(
        key="answer",
        text="the answer's map finds the asked object better than its class activation map does (Obj-IoU, scenes)",
        paper="higher Obj-IoU than earlier explainers (figures not seen)",
        direction=">",
        margin=0.0,
        baseline="relu of the answer's logits at the image",
    ),
    Claim(
        key="answer-chance",
        text="the answer's map finds the asked object better than the same map with its cells shuffled (Obj-IoU, scenes)",
        paper="none",
        direction=">",
        margin=0.0,
        baseline="shuffled map",
    ),
    Claim(
        key="f1",
        text="F1-IoU of nouns and function words is higher than that of class activation maps (scenes)",
        paper="+8.96 % F1-IoU over earlier explainers on COCO Caption",
        direction=">",
        margin=0.0,
        baseline="class activation maps",
    ),
    Claim(
        key="coco",
        text="F1-IoU on COCO Caption is 8.96 % above the best earlier explainer's",
        paper="+8.96 %",
        direction=">",
        margin=0.0,
        baseline="earlier explainers",
    ),
)


def drawn_maps(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (WORDS, SIDE, SIDE), how much each word activates each other's class (WORDS, WORDS), and the last word's
    object, bool (SIDE, SIDE)."""
    room = SIDE // OBJECT
    place = torch.randperm(room * room, generator=generator)[:WORDS]
    objects = torch.zeros(WORDS, SIDE, SIDE)
    for k, p in enumerate(place.tolist()):
        top, left = p // room * OBJECT, p % room * OBJECT
        objects[k, top : top + OBJECT, left : left + OBJECT] = 1
    low, high = SHARES
    t = low + (high - low) * torch.rand(WORDS, WORDS, generator=generator)
    maps = objects.clone()
    for n in range(1, WORDS):
        maps[n] += (t[n, :n, None, None] * maps[:n]).sum(0)
    salt = torch.rand(maps.shape, generator=generator) < SALT
    return torch.where(salt, maps + maps.amax((-2, -1), keepdim=True), maps), t, objects[-1] > 0


def scaled(x: Tensor) -> Tensor:
    """Each map (..., h, w) min-max scaled, as uint8."""
    low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
    return as_uint8((x - low) / (high - low).clamp(min=1e-12))


def mean_filter(x: Tensor) -> Tensor:
    """3 x 3 mean of maps (h, w), edges reflected."""
    return avg_pool2d(pad(x[None, None], (1, 1, 1, 1), mode="reflect"), 3, 1)[0, 0]


def class_activation(model: Any, inputs: dict[str, Tensor], classes: list[int]) -> Tensor:
    """relu of the model's own logits of each class at the image: (classes, GRID, GRID)."""
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0]  # (n, V)
    return logits[inputs["input_ids"][0] == IMAGE_ID][:, classes].relu().T.unflatten(-1, (GRID, GRID))


def asked(example: Example) -> Tensor:
    """bool (GRID, GRID): patches of the object that the question is about."""
    mask = torch.zeros(GRID * GRID, dtype=torch.bool)
    mask[list(example.relevant)] = True
    return mask.view(GRID, GRID)


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    found: dict[str, tuple[list[float], list[float]]] = {claim.key: ([], []) for claim in REPRODUCTION.testable}

    def add(key: str, ours: Tensor, baseline: Tensor) -> None:
        found[key][0].append(float(ours))
        found[key][1].append(float(baseline))

    generator = torch.Generator().manual_seed(seed)
    for _ in range(DRAWS):
        maps, t, mask = drawn_maps(generator)
        words = [str(k) for k in range(WORDS)]
        clean = estimated_causal_inference(maps.flatten(1), t, words)[-1].view(SIDE, SIDE)
        eci, rank, mean, raw = (
            object_iou(scaled(x), mask) for x in (clean, rank_gaussian_filter(clean), mean_filter(clean), maps[-1])
        )
        add("eci", eci, raw)
        add("filter-mean", rank, mean)
        add("filter-none", rank, eci)
    progress("reading scenes")
    model, processor = load()
    done = 0
    for example in scenes(20 * QUESTIONS, 7000 + seed, types=("colour",)):
        if done == QUESTIONS:
            break
        one = batch([example])
        inputs, answer = one.inputs(), ID[example.answer]
        with torch.no_grad():
            right = int(model(**inputs, logits_to_keep=1).logits[0, -1].argmax()) == answer
        if not right:
            continue
        told = TokenActivationMap(prompt_tokens=True).explain(model, inputs, [answer], tokenizer=processor.tokenizer)
        ids = list(told.target_ids or ())
        image = next(span for span in told.spans if span.grid is not None)
        ours = as_uint8(told.scores[:, image.start : image.stop].unflatten(-1, (GRID, GRID)).clamp(max=1))
        plain = scaled(class_activation(model, inputs, ids))
        mask = asked(example)
        noun = next(k for k, token in enumerate(ids) if token in {ID[shape] for shape in SHAPES})
        assert ids[-1] in {ID[colour] for colour in COLOURS}
        empty = [k for k, token in enumerate(ids) if token in {ID[word] for word in FUNCTION_WORDS}]
        add("noun", object_iou(ours[noun], mask), object_iou(plain[noun], mask))
        add("answer", object_iou(ours[-1], mask), object_iou(plain[-1], mask))
        shuffled = ours[-1].flatten()[torch.randperm(GRID * GRID, generator=generator)].view(GRID, GRID)
        add("answer-chance", object_iou(ours[-1], mask), object_iou(shuffled, mask))
        add("f1", _f1(ours, noun, empty, mask), _f1(plain, noun, empty, mask))
        done += 1
    progress(f"{done} of {QUESTIONS} questions explained")
    return {key: Measured(ours=ours, baseline=baseline) for key, (ours, baseline) in found.items()}


def _f1(maps: Tensor, noun: int, empty: list[int], mask: Tensor) -> Tensor:
    function = function_iou(maps[empty], otsu(maps[noun]).double().expand(len(empty))).mean()
    return f1_iou(object_iou(maps[noun], mask).double(), function)


REPRODUCTION = Reproduction(
    slug="token-activation-map",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A LLaVA-architecture model of width 96 that answers in one word on drawn scenes of 8 x 8 patches; one trained "
        "model, the seeds draw scenes. Objects have one or four patches, fewer than the filter's window, and F1-IoU is "
        "taken question by question. The drawn maps follow the model of interference that the method assumes. Looked at "
        "afterwards on 60 other scenes: the loss on scenes is the filter's, whose 3 x 3 median erases objects of one "
        "patch (noun 0.87 without it, 0.12 with it, raw 0.87) and trims those of four (0.71, 0.48, raw 0.81); without "
        "the filter the map is close to the raw one, since a question of six words interferes little."
    ),
    not_testable={"coco": "needs COCO Caption with its masks and a model that writes captions"},
)
