"""Glyphs: a LLaVA-architecture model that looks up coloured glyphs in noise, for methods that drop visual tokens.

    image     24 x 24 px, 6 x 6 patches of 4 px, Gaussian noise of sd 0.15; 4 patches hold an object
    object    (0.3 + 0.7 glyph_k) colour_c: a binary 4 x 4 glyph, one of 8 keys, no key twice in an image
    prompt    BOS, 36 image tokens, a key token that is in the image
    answer    the token of that key's colour (6 colours)
    loss      cross-entropy of the answer + cross-entropy of "which colour has key k, or is it absent", k = 1..8,
              read from the CLS token of the feature layer

Only four of the 36 patches matter, and losing the one that is asked for costs the answer. The second loss trains the
CLS token, which LLaVA's own loss never reaches: its attention ranks patches only because of it. Tower: CLIP, 6 layers;
decoder: Llama, 4 layers, 4 query and 2 KV heads; width 64; the projector reads hidden state -2.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from seqwise.lab.files import cache_dir

Layout: TypeAlias = Literal["scattered", "band"]

SIDE, PATCH, OBJECTS = 6, 4, 4
PATCHES = SIDE * SIDE
BAND = 2  # rows of patches that hold all objects under layout "band"
NOISE = 0.15
BOS_ID, IMAGE_ID, KEY_ID = 0, 1, 2

_ROWS = (  # the glyphs of the eight keys: four rows of four pixels each
    ("####", "#..#", "#..#", "####"),  # ring
    (".##.", "####", "####", ".##."),  # disc
    ("#..#", ".##.", ".##.", "#..#"),  # cross
    ("####", "....", "####", "...."),  # stripes, lying
    ("#.#.", "#.#.", "#.#.", "#.#."),  # stripes, standing
    ("#.#.", ".#.#", "#.#.", ".#.#"),  # chequers
    ("####", "###.", "##..", "#..."),  # upper left triangle
    ("#...", "#...", "#...", "####"),  # corner
)
GLYPHS = torch.tensor([[[float(pixel == "#") for pixel in row] for row in glyph] for glyph in _ROWS])  # (8, 4, 4)
COLOURS = torch.tensor(  # (6, 3): red, green, blue, yellow, magenta, cyan
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
)
KEYS = len(GLYPHS)
COLOUR_ID = KEY_ID + KEYS
VOCABULARY = COLOUR_ID + len(COLOURS)
_TRAINING_STREAM = 1_000_003  # keeps training draws apart from the `batch` of the same seed


class GlyphBatch(NamedTuple):
    """`answers[b]` is the token to predict at the last position; `asked[b]` is the patch that holds it."""

    input_ids: Tensor  # (B, 38) int64
    pixel_values: Tensor  # (B, 3, 24, 24)
    answers: Tensor  # (B,) int64
    objects: Tensor  # (B, 4) int64, patch indices in raster order
    asked: Tensor  # (B,) int64
    scene: Tensor  # (B, 8) int64: per key its colour, or 6 where the key is absent


def batch(n: int, seed: int, layout: Layout = "scattered") -> GlyphBatch:
    """Draws `n` images with one question each.

    layout: "scattered" puts the objects anywhere, "band" into two neighbouring rows of patches.

    Raises:
        ValueError: n < 1 or an unknown layout.
    """
    return _draw(n, torch.Generator().manual_seed(seed), layout)


def _draw(n: int, generator: torch.Generator, layout: Layout) -> GlyphBatch:
    if n < 1:
        raise ValueError(f"batch: n must be >= 1, got {n}")
    if layout not in ("scattered", "band"):
        raise ValueError(f"batch: layout must be 'scattered' or 'band', got {layout!r}")
    rows, start = SIDE, torch.zeros(n, 1, dtype=torch.long)
    if layout == "band":
        rows, start = BAND, torch.randint(SIDE - BAND + 1, (n, 1), generator=generator) * SIDE
    objects = torch.rand(n, rows * SIDE, generator=generator).argsort(-1)[:, :OBJECTS].sort(-1).values + start
    keys = torch.rand(n, KEYS, generator=generator).argsort(-1)[:, :OBJECTS]  # (B, 4), distinct
    colours = torch.randint(len(COLOURS), (n, OBJECTS), generator=generator)  # (B, 4)
    drawn = (0.3 + 0.7 * GLYPHS[keys])[:, :, None] * COLOURS[colours][..., None, None]  # (B, 4, 3, 4, 4)
    patches = torch.zeros(n, PATCHES, 3, PATCH, PATCH)
    patches[torch.arange(n)[:, None], objects] = drawn
    image = patches.unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, SIDE * PATCH, SIDE * PATCH)
    which = torch.randint(OBJECTS, (n, 1), generator=generator)
    prompt = torch.full((n, PATCHES + 2), IMAGE_ID)
    prompt[:, 0] = BOS_ID
    prompt[:, -1:] = KEY_ID + keys.gather(1, which)
    return GlyphBatch(
        input_ids=prompt,
        pixel_values=image + NOISE * torch.randn(image.shape, generator=generator),
        answers=COLOUR_ID + colours.gather(1, which)[:, 0],
        objects=objects,
        asked=objects.gather(1, which)[:, 0],
        scene=torch.full((n, KEYS), len(COLOURS)).scatter(1, keys, colours),
    )


def build(seed: int) -> LlavaForConditionalGeneration:
    """The untrained model, in eval mode; the global random state is kept."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=6,
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
        return LlavaForConditionalGeneration(config).eval()


def train(
    seed: int, progress: Callable[[int, float], None] | None = None, steps: int = 1600
) -> LlavaForConditionalGeneration:
    """Trains the model from scratch on scattered objects: AdamW at 1e-3, 64 images a step.

    progress: called as `progress(step, loss)` after each step, `step` from 1, loss in nats.
    Returns the model in eval mode, without the head of the second loss. On a CPU the same arguments give the same
    weights, whatever the global random state, which is left as it was.

    Raises:
        ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"train: steps must be >= 1, got {steps}")
    model = build(seed).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        presence = nn.Linear(model.config.vision_config.hidden_size, KEYS * (len(COLOURS) + 1))
    generator = torch.Generator().manual_seed(_TRAINING_STREAM + seed)
    optimizer = torch.optim.AdamW([*model.parameters(), *presence.parameters()], lr=1e-3)
    for step in range(1, steps + 1):
        drawn = _draw(64, generator, "scattered")
        out = model(input_ids=drawn.input_ids, pixel_values=drawn.pixel_values, logits_to_keep=1, use_cache=False)
        cls = out.image_outputs.hidden_states[model.config.vision_feature_layer][:, 0]  # (B, 64)
        scene = presence(cls).unflatten(-1, (KEYS, -1))  # (B, 8, 7)
        loss = nn.functional.cross_entropy(out.logits[:, -1], drawn.answers)
        loss = loss + nn.functional.cross_entropy(scene.flatten(0, 1), drawn.scene.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(step, loss.item())
    return model.eval()


def trained(seed: int, progress: Callable[[int, float], None] | None = None) -> LlavaForConditionalGeneration:
    """`train(seed)`, which takes minutes, kept in the user's cache: later calls read the weights in no time.

    The kept file belongs to this recipe: another version of this module or of torch trains anew. progress: as in
    `train`; not called when the weights are read. Where the cache cannot be written, a warning says so.
    """
    recipe = hashlib.sha256(Path(__file__).read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    kept = cache_dir() / f"glyphs-{recipe}-{seed}.safetensors"
    if kept.is_file():
        model = build(seed)
        model.load_state_dict(load_file(kept))
        return model
    model = train(seed, progress)
    try:
        _save(model, kept)
    except OSError as error:
        Console(stderr=True).print(
            f"[yellow]cannot keep the trained model in {kept.parent} ({error.strerror or error}); the next call trains "
            "again[/]",
            soft_wrap=True,
        )
    return model


def _save(model: nn.Module, path: Path) -> None:
    """Writes beside the place and renames: the file is whole or absent, also when two processes make it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, work = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, work)
        os.chmod(work, 0o644)  # mkstemp makes it private
        os.replace(work, path)
    finally:
        Path(work).unlink(missing_ok=True)


def accuracy(model: nn.Module, drawn: GlyphBatch) -> float:
    """Share of questions, in [0, 1], whose most probable next token is the answer."""
    with torch.no_grad():
        out = model(input_ids=drawn.input_ids, pixel_values=drawn.pixel_values, logits_to_keep=1, use_cache=False)
    return (out.logits[:, -1].argmax(-1) == drawn.answers).double().mean().item()
