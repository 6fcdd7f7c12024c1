"""Staged: a LLaVA-architecture model whose decoder still needs the image in its later half.

    image     24 x 24 px, 6 x 6 patches of 4 px, Gaussian noise of sd 0.5; one patch per key holds an object
    object    left half: the pattern of one of 2 keys; right half: the pattern of one of 5 values
    prompt    BOS, 36 image tokens, then 6 pairs (Q, key)
    answer    at each key token: the token of that key's value
    mask      in decoder layers 1 and 2 (1-based) text rows do not see the image, and image rows see only themselves
              and what precedes the image; layers 3 and 4 are causal
    loss      cross-entropy of the answers, for projector and decoder; the tower has losses of its own and its
              features are detached: patch -> key and value class, CLS (at hidden state -2) -> value of each key

For methods that drop image tokens between decoder layers. An ordinary small model has read the image into the text
rows after layer 1, and image rows that see each other smear the objects over all patches: any pruning is then free.
Here dropping the whole image after layer 2 falls to chance (1/5), and one patch holds each answer.

The mask is part of the model, not of the training: `build` hooks it into the instance, each forward and `generate`
runs under it. See `ImageBlind` for how it finds the image when another hook has dropped rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Cache, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

SIDE, PATCH = 6, 4
PATCHES = SIDE * SIDE
KEYS, VALUES, QUESTIONS = 2, 5, 6
NOISE = 0.5
BLIND_LAYERS = 2
BOS_ID, IMAGE_ID, Q_ID, KEY_ID = 0, 1, 2, 3
VALUE_ID = KEY_ID + KEYS
VOCABULARY = VALUE_ID + VALUES
_TRAINING_STREAM = 1_000_003  # keeps training draws apart from the `batch` of the same seed

_KEY_ROWS = (("##", "##", "..", ".."), ("..", "..", "##", "##"))  # upper half, lower half
_VALUE_ROWS = (
    ("##", "..", "##", ".."),
    ("..", "##", "..", "##"),
    ("#.", "#.", "#.", "#."),
    (".#", ".#", ".#", ".#"),
    ("#.", ".#", "#.", ".#"),
)


def _patterns(rows: tuple[tuple[str, ...], ...]) -> Tensor:  # (patterns, 4, 2), +-1
    return torch.tensor([[[1.0 if pixel == "#" else -1.0 for pixel in row] for row in one] for one in rows])


KEY_PATTERNS, VALUE_PATTERNS = _patterns(_KEY_ROWS), _patterns(_VALUE_ROWS)


class StagedBatch(NamedTuple):
    """`answers[b, j]` is the token to predict at position `asked[j]`, a key token's."""

    input_ids: Tensor  # (B, 1 + 36 + 12) int64
    pixel_values: Tensor  # (B, 3, 24, 24)
    answers: Tensor  # (B, 6) int64
    asked: Tensor  # (6,) int64, positions
    objects: Tensor  # (B, 2) int64: the patch that holds key 0, key 1
    values: Tensor  # (B, 2) int64: the value of key 0, key 1


def batch(n: int, seed: int, questions: int = QUESTIONS) -> StagedBatch:
    """Draws `n` images with `questions` questions each.

    Raises:
        ValueError: n < 1 or questions < 1.
    """
    return _draw(n, torch.Generator().manual_seed(seed), questions)


def _draw(n: int, generator: torch.Generator, questions: int) -> StagedBatch:
    if n < 1:
        raise ValueError(f"batch: n must be >= 1, got {n}")
    if questions < 1:
        raise ValueError(f"batch: questions must be >= 1, got {questions}")
    objects = torch.rand(n, PATCHES, generator=generator).argsort(-1)[:, :KEYS]  # (B, 2)
    values = torch.randint(VALUES, (n, KEYS), generator=generator)  # (B, 2)
    drawn = torch.cat([KEY_PATTERNS.expand(n, -1, -1, -1), VALUE_PATTERNS[values]], -1)  # (B, 2, 4, 4)
    patches = torch.zeros(n, PATCHES, PATCH, PATCH)
    patches[torch.arange(n)[:, None], objects] = drawn
    image = patches.unflatten(1, (SIDE, SIDE)).transpose(2, 3).reshape(n, 1, SIDE * PATCH, SIDE * PATCH)
    image = image.expand(-1, 3, -1, -1)
    keys = torch.randint(KEYS, (n, questions), generator=generator)  # (B, questions)
    prompt = torch.full((n, 1 + PATCHES + 2 * questions), IMAGE_ID)
    prompt[:, 0] = BOS_ID
    prompt[:, 1 + PATCHES :: 2] = Q_ID
    prompt[:, 2 + PATCHES :: 2] = KEY_ID + keys
    return StagedBatch(
        input_ids=prompt,
        pixel_values=image + NOISE * torch.randn(image.shape, generator=generator),
        answers=VALUE_ID + values.gather(1, keys),
        asked=torch.arange(2 + PATCHES, prompt.shape[1], 2),
        objects=objects,
        values=values,
    )


class ImageBlind:
    """The mask of the first decoder layers, as hooks on one model instance.

    A hook on the whole model counts each prompt's tokens behind the image. A hook on the attention module of each
    blind layer, the last place before the mask is used, then reads off the rows it got:

        BOS = first visible slot      image = slots between BOS and the last `behind` slots

    so rows of the image may be dropped between layers, positions renumbered, and prompts padded on the left. It
    accepts the mask that the layer got in any form (None, padding (B, slots), or 4-D bool or additive) and hands on
    an additive (B, 1, rows, slots) mask, which sdpa, eager and any function that honours 4-D masks understand.
    Slots must stay in token order, and a cache may not evict from a blind layer. Where rows were dropped from a padded
    batch, the padding mask must have lost the same columns.

    Raises ValueError for a forward without input_ids, and for a padding mask that does not fit the slots.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self.behind = torch.zeros(1, dtype=torch.long)  # (B,) tokens behind the image so far
        model.register_forward_pre_hook(self._count, with_kwargs=True)
        for layer in model.model.language_model.layers[:BLIND_LAYERS]:
            layer.self_attn.register_forward_pre_hook(self._restrict, with_kwargs=True)

    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise ValueError("the staged model needs input_ids: its mask depends on where the image is")
        is_image = ids == IMAGE_ID  # (B, rows)
        if is_image.any():
            last = (is_image * torch.arange(ids.shape[1], device=ids.device)).amax(-1)  # (B,)
            self.behind = ids.shape[1] - 1 - last
        else:  # more text on a cached prompt
            self.behind = self.behind.to(ids.device) + ids.shape[1]

    def _restrict(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, mask = kwargs["hidden_states"], kwargs.get("attention_mask")
        rows = x.shape[1]
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        slots = rows if cache is None else cache.get_mask_sizes(rows, attention.layer_idx)[0]
        slot = torch.arange(slots, device=x.device)
        row = slot[slots - rows :, None]
        seen = slot <= row  # (rows, slots)
        if mask is not None and mask.dim() == 2:
            padding = mask.bool()
            if padding.shape[1] != slots and not padding.all():
                raise ValueError(f"the staged model got a padding mask of {padding.shape[1]} columns for {slots} slots")
            if padding.shape[1] == slots:
                seen = seen & padding[:, None, None, :]
        elif mask is not None:
            seen = seen & (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)
        seen = seen.expand(x.shape[0], 1, rows, slots)
        first = seen[:, :, -1].to(torch.int8).argmax(-1)  # (B, 1), the newest row sees all that is no padding
        image = (slot > first) & (slot < slots - self.behind.to(x.device)[:, None])  # (B, slots)
        seen = seen & (~image[:, None, None, :] | (slot == row))
        bias = torch.zeros(seen.shape, dtype=x.dtype, device=x.device)
        bias = bias.masked_fill(~seen, torch.finfo(x.dtype).min)
        return args, kwargs | {"attention_mask": bias}


def build(seed: int) -> LlavaForConditionalGeneration:
    """The untrained model with its mask hooked in, in eval mode; the global random state is kept.

    Weights of a trained one load with `load_state_dict`; `from_pretrained` would lose the mask.
    """
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,  # 0.02 at width 64 leaves the lookup unlearned after 300 steps
        bos_token_id=BOS_ID,
        eos_token_id=None,
        pad_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
    ImageBlind(model)
    return model


def train(
    seed: int, progress: Callable[[int, float], None] | None = None, steps: int = 300
) -> LlavaForConditionalGeneration:
    """Trains the model from scratch: AdamW, 32 images with 6 questions a step.

    The learning rate is 3e-3 for half of the steps, then falls linearly to 0; gradients are clipped to norm 1, the
    tower's apart from the decoder's, so that neither loss throttles the other.

    progress: called as `progress(step, loss)` after each step, `step` from 1; the loss is that of the answers, in
    nats. Returns the model in eval mode, without the heads of the tower's losses. On a CPU the same arguments give
    the same weights, whatever the global random state, which is left as it was.

    Raises:
        ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"train: steps must be >= 1, got {steps}")
    model = build(seed).train()
    width = model.config.vision_config.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.ModuleDict(
            {
                "key": nn.Linear(width, KEYS + 1),  # the last class: no object
                "value": nn.Linear(width, VALUES + 1),
                "scene": nn.Linear(width, KEYS * VALUES),
            }
        )
    detach = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: (args[0].detach(),))
    generator = torch.Generator().manual_seed(_TRAINING_STREAM + seed)
    tower = [*model.model.vision_tower.parameters(), *heads.parameters()]
    decoder = [p for name, p in model.named_parameters() if not name.startswith("model.vision_tower.")]
    optimizer = torch.optim.AdamW([*tower, *decoder], lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, 2 * (1 - done / steps)))
    for step in range(1, steps + 1):
        drawn = _draw(32, generator, QUESTIONS)
        out = model(
            input_ids=drawn.input_ids,
            pixel_values=drawn.pixel_values,
            logits_to_keep=drawn.asked,
            use_cache=False,
        )
        feature = out.image_outputs.hidden_states[model.config.vision_feature_layer]  # (B, 37, 64)
        answer = cross_entropy(out.logits.flatten(0, 1), drawn.answers.flatten())
        loss = answer + _tower_loss(feature, heads, drawn)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(tower, 1.0)
        nn.utils.clip_grad_norm_(decoder, 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, answer.item())
    detach.remove()
    return model.eval()


def _tower_loss(feature: Tensor, heads: nn.ModuleDict, drawn: StagedBatch) -> Tensor:
    cls, patches = feature[:, 0], feature[:, 1:]
    which = torch.arange(KEYS).expand_as(drawn.objects)
    key = torch.full(patches.shape[:2], KEYS).scatter(1, drawn.objects, which)  # (B, 36)
    value = torch.full(patches.shape[:2], VALUES).scatter(1, drawn.objects, drawn.values)  # (B, 36)
    scene = heads["scene"](cls).unflatten(-1, (KEYS, VALUES))  # (B, 2, 5)
    return (
        cross_entropy(heads["key"](patches).flatten(0, 1), key.flatten())
        + cross_entropy(heads["value"](patches).flatten(0, 1), value.flatten())
        + cross_entropy(scene.flatten(0, 1), drawn.values.flatten())
    )


def accuracy(model: nn.Module, drawn: StagedBatch) -> float:
    """Share of questions, in [0, 1], whose most probable next token is the answer."""
    with torch.no_grad():
        out = model(
            input_ids=drawn.input_ids,
            pixel_values=drawn.pixel_values,
            logits_to_keep=drawn.asked,
            use_cache=False,
        )
    return (out.logits.argmax(-1) == drawn.answers).double().mean().item()
