"""How the model of `seqwise.lab.zoo.scenes` is trained."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import LlavaForConditionalGeneration

from seqwise.lab.zoo.scenes_data import (
    COLOURS,
    GRID,
    OBJECTS,
    PARTS,
    PATCHES,
    PLACES,
    SEVERAL,
    SHAPES,
    TYPES,
    Drawing,
    Kind,
    Thing,
    ask,
    compose,
    needles,
    preamble,
)
from seqwise.lab.zoo.scenes_model import EOS_ID, ID, IMAGE_ID, PAD_ID, WIDTH, build, ids_of, pixel_values, resize

TOWER_STEPS, STEPS = 700, 2000
_RATE = 2e-3
_OTHER = 0.5  # weight of the words of the questions and of <eos>
_TURNS = 8  # questions per training sequence
_SHARES: dict[Kind, float] = {"presence": 1.0, "colour": 1.0, "count": 1.2, "place": 1.5, "relation": 2.5}

# What a patch tells in stage 1; the last shape, colour and part mean that there is no object.
_PATCH_CLASSES = {"shape": len(SHAPES) + 1, "colour": len(COLOURS) + 1, "part": PARTS + 1, "row": GRID, "column": GRID}


def train(
    seed: int,
    progress: Callable[[int, float], None] | None = None,
    steps: tuple[int, int] = (TOWER_STEPS, STEPS),
) -> LlavaForConditionalGeneration:
    """Trains the model from scratch, in about a quarter of an hour on one core: AdamW, rates that rise and fall.

    progress: called as `progress(step, loss)` after each step, `step` from 1 through both stages, loss in nats.
    steps: of stage 1, the tower, and of stage 2, projector and decoder.
    Returns the model in eval mode, without the heads of the tower's losses. On a CPU the same arguments give the same
    weights, whatever the global random state, which is left as it was.

    Raises:
        ValueError: a number of steps < 1.
    """
    if min(steps) < 1:
        raise ValueError(f"train: steps must be >= 1 in both stages, got {steps}")
    model = build(seed).train()
    tell = progress or (lambda step, loss: None)
    _align(model, _train_tower(model, seed, steps[0], tell))
    _train_decoder(model, seed, steps[1], lambda step, loss: tell(steps[0] + step, loss))
    return model.eval()


def _feature_states(model: LlavaForConditionalGeneration, values: Tensor) -> Tensor:
    """Hidden state -2 of the tower, CLS first: (m, 65, width). The last layer is not run."""
    tower = model.model.vision_tower
    x = tower.pre_layrnorm(tower.embeddings(values))
    for layer in tower.encoder.layers[:-1]:
        x = layer(x, None)
    return x


def _optimise(
    groups: dict[float, list[nn.Parameter]],
    steps: int,
    loss_of: Callable[[int], Tensor],
    tell: Callable[[int, float], None],
) -> None:
    """AdamW on `groups`, each under its learning rate, which rises for 50 steps and falls in the last 70 %."""
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": rate} for rate, parameters in groups.items()],
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    warm = min(50, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / warm, max(0.02, 1.4 * (1 - done / steps)), 1.0)
    )
    every = [parameter for parameters in groups.values() for parameter in parameters]
    for step in range(1, steps + 1):
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(every, 1.0)
        optimizer.step()
        schedule.step()
        tell(step, loss.item())


def _train_tower(
    model: LlavaForConditionalGeneration, seed: int, steps: int, tell: Callable[[int, float], None]
) -> nn.Linear:
    """Returns the head that tells the facts of a patch, `_PATCH_CLASSES` in order."""
    generator = torch.Generator().manual_seed(random.Random(f"tower {seed}").getrandbits(62))
    pairs = len(SHAPES) * len(COLOURS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        patch_head = nn.Linear(WIDTH, sum(_PATCH_CLASSES.values()))
        scene_head = nn.Linear(WIDTH, pairs + OBJECTS + 1)
    place = torch.arange(PATCHES)

    def loss_of(step: int) -> Tensor:
        drawn = compose(64, generator, large=0.3 if step % 2 else 0.6)
        states = _feature_states(model, pixel_values(drawn.pixels))
        held, none = drawn.owner.clamp(min=0), drawn.owner < 0
        target = {
            "shape": drawn.objects[..., 0].gather(1, held).masked_fill(none, len(SHAPES)),
            "colour": drawn.objects[..., 1].gather(1, held).masked_fill(none, len(COLOURS)),
            "part": drawn.part.masked_fill(none, PARTS),
            "row": (place // GRID).expand_as(held),
            "column": (place % GRID).expand_as(held),
        }
        told = patch_head(states[:, 1:]).split(list(_PATCH_CLASSES.values()), -1)
        weight = torch.where(none, 0.25, 1.0).flatten()  # ten patches without an object for each one with it
        loss = torch.zeros(())
        for logits, name in zip(told, _PATCH_CLASSES, strict=True):
            each = cross_entropy(logits.flatten(0, 1), target[name].flatten(), reduction="none")
            loss = loss + (each * weight).sum() / weight.sum()
        exists = drawn.objects[..., 0] >= 0  # (B, 4)
        pair = drawn.objects[..., 0] * len(COLOURS) + drawn.objects[..., 1]
        inventory = torch.zeros(len(pair), pairs + 1).scatter(1, torch.where(exists, pair, pairs), 1.0)[:, :-1]
        scene = scene_head(states[:, 0])
        loss = loss + 5 * binary_cross_entropy_with_logits(scene[:, :pairs], inventory)
        return loss + cross_entropy(scene[:, pairs:], exists.sum(-1))

    tower = [*model.model.vision_tower.parameters(), *patch_head.parameters(), *scene_head.parameters()]
    _optimise({_RATE: tower}, steps, loss_of, tell)
    return patch_head


def _align(model: LlavaForConditionalGeneration, head: nn.Linear) -> None:
    """Starts projector and decoder from what stage 1 tells of a patch.

    Each class that is a word writes that word's embedding; a row or column writes its part of the two places that it
    may lie in. Embeddings are large and the layers' outputs small, so that words and patches stay what they are until
    the layers have learnt better. From random weights the decoder spends most of its training on a plateau, finding
    out which features mean which word.
    """
    words = [*SHAPES, None, *COLOURS, None, "small", *["large"] * (PARTS - 1), None]
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        top, bottom, left, right = (embedding[ID[word]].clone() for word in PLACES)
        for word, vector in zip(PLACES, (top + left, top + right, bottom + left, bottom + right), strict=True):
            embedding[ID[word]] = vector
        written = [torch.zeros_like(top) if word is None else embedding[ID[word]] for word in words]
        steps = torch.linspace(0, 1, GRID)
        written += [0.7 * torch.lerp(top, bottom, step) for step in steps]
        written += [0.7 * torch.lerp(left, right, step) for step in steps]
        first.weight.mul_(0.02)  # features are large: free units would drown what the words say
        first.weight[: head.out_features] = 0.15 * head.weight
        first.bias.zero_()
        first.bias[: head.out_features] = 0.15 * head.bias
        second.weight[:, : head.out_features] = torch.stack(written, 1)
        second.weight.mul_(6.0)
        second.bias.zero_()
        model.lm_head.weight.copy_(0.4 * embedding)
        embedding.mul_(6.0)
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.mul_(0.3)
            layer.mlp.down_proj.weight.mul_(0.3)


def _train_decoder(
    model: LlavaForConditionalGeneration, seed: int, steps: int, tell: Callable[[int, float], None]
) -> None:
    draw = random.Random(f"decoder {seed}")
    generator = torch.Generator().manual_seed(draw.getrandbits(62))

    def loss_of(step: int) -> Tensor:
        variant = draw.random()
        shares = _SHARES | {"relation": 0.5} if step < 0.3 * steps else _SHARES  # needs what the others teach
        if step <= 0.35 * steps:  # looking things up is learnt sooner, and cheaper, among few patches
            images, kept = 1 if variant < 0.8 else draw.randint(2, 4), draw.randint(8, 20)
            return _drawn_loss(model, draw, generator, shares, images, kept)
        if variant < 0.6:
            kept = draw.randint(8, 56) if draw.random() < 0.3 else PATCHES
            return _drawn_loss(model, draw, generator, shares, 1, kept)
        if variant < 0.78:
            return _drawn_loss(model, draw, generator, shares, draw.randint(2, 4), PATCHES)
        return _frames_loss(model, draw, generator, shares)

    projector = list(model.model.multi_modal_projector.parameters())
    decoder = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    # Features are large, and at the decoder's rate the projector loses what it starts from.
    _optimise({_RATE: decoder, 0.02 * _RATE: projector}, steps, loss_of, tell)


def _patch_features(model: LlavaForConditionalGeneration, drawn: Drawing) -> Tensor:  # (n, 64, width)
    with torch.no_grad():
        return _feature_states(model, pixel_values(drawn.pixels))[:, 1:]


def _drawn_loss(
    model: LlavaForConditionalGeneration,
    draw: random.Random,
    generator: torch.Generator,
    shares: dict[Kind, float],
    images: int,
    kept: int,
) -> Tensor:
    """Prompts of one image, or of several named pictures, with `kept` patches each; every object keeps its first."""
    n = _rows(images * kept)
    drawn = compose(n, generator) if images == 1 else needles(n, images, generator, large=0.3)
    x = _patch_features(model, drawn)  # (n * images, 64, width)
    if kept < PATCHES:
        urge = torch.rand(drawn.owner.shape, generator=generator)
        urge = urge + 0.5 * (drawn.owner >= 0) + 2.0 * ((drawn.part == 0) | (drawn.part == 1))
        stay = urge.topk(kept, -1).indices.sort(-1).values
        x = x.gather(1, stay[..., None].expand(-1, -1, x.shape[-1]))
    return _answer_loss(model, list(x.unflatten(0, (n, images)).unbind(1)), draw, shares, drawn, named=images > 1)


def _frames_loss(
    model: LlavaForConditionalGeneration,
    draw: random.Random,
    generator: torch.Generator,
    shares: dict[Kind, float],
) -> Tensor:
    images = draw.randint(1, 4)
    n = _rows(images * 30)
    drawn = needles(n, images, generator, large=0.6)
    x = [
        resize(one, (draw.randint(3, GRID), draw.randint(3, GRID)))
        for one in _patch_features(model, drawn).unflatten(0, (n, images)).unbind(1)
    ]
    return _answer_loss(model, x, draw, shares, drawn, named=False, large_only=True)


def _rows(visual: int) -> int:
    """Prompts per step, so that steps of all variants take about as long."""
    return 4100 // (visual + 66)


def _turns(
    draw: random.Random,
    shares: dict[Kind, float],
    things: list[list[Thing]],
    types: tuple[Kind, ...],
    named: bool,
    large_only: bool,
) -> list[tuple[str, str]]:
    """Questions and answers about one prompt's images, as many as a training sequence holds."""
    made: list[tuple[str, str]] = []
    while len(made) < _TURNS:
        (kind,) = draw.choices(types, [shares[kind] for kind in types])
        picture = draw.randrange(len(things)) if named and draw.random() < 0.5 else None
        asked = ask(kind, draw, things, picture, large_only)
        if asked is not None:
            made.append((asked.words, asked.answer))
    return made


def _answer_loss(
    model: LlavaForConditionalGeneration,
    x: list[Tensor],
    draw: random.Random,
    shares: dict[Kind, float],
    drawn: Drawing,
    named: bool,
    large_only: bool = False,
) -> Tensor:
    """x: per image of a prompt (B, k, width) tower features, with questions about the scenes that they show."""
    things, images = drawn.things(), len(x)
    types = TYPES if images == 1 and not large_only else SEVERAL
    asked = [
        _turns(draw, shares, things[i : i + images], types, named, large_only) for i in range(0, len(things), images)
    ]
    return _loss_of_turns(model, x, preamble(images, named), asked)


def _loss_of_turns(
    model: LlavaForConditionalGeneration, x: list[Tensor], before: str, asked: list[list[tuple[str, str]]]
) -> Tensor:
    """Cross-entropy of the answers, plus `_OTHER` times that of the questions' words and <eos>; a mean each."""
    head = ids_of(before, [one.shape[1] for one in x])
    rows, ends = [], []
    for turns in asked:
        row, end = list(head), [False] * len(head)
        for words, answer in turns:
            row += [ID[word] for word in words.split()] + [ID[answer], EOS_ID]
            end += [False] * (len(row) - len(end) - 2) + [True, False]
        rows.append(row)
        ends.append(end)
    width = max(map(len, rows))  # padding on the right, behind all that is asked: causal attention needs no mask
    ids = torch.tensor([row + [PAD_ID] * (width - len(row)) for row in rows])
    is_answer = torch.tensor([end + [False] * (width - len(end)) for end in ends])[:, 1:]
    visual = model.model.multi_modal_projector(torch.cat(x, 1))  # (B, sum of k, width)
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == IMAGE_ID)[..., None], visual)
    states = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
    wanted = ids[:, 1:]
    is_other = ~is_answer & (wanted != PAD_ID) & (wanted != IMAGE_ID)
    is_other[:, : len(head) - 1] = False
    answer_loss = cross_entropy(model.lm_head(states[is_answer]), wanted[is_answer])
    return answer_loss + _OTHER * cross_entropy(model.lm_head(states[is_other]), wanted[is_other])
