"""The model families of the contract suite: tiny random models, built from configs in a fraction of a second.

    family = FAMILIES["llava"]
    model = family.tiny()
    batch = family.pad_left([family.prompt(17), family.prompt(40, images=2)])
    model.generate(**batch, max_new_tokens=8)

Weights are drawn with a large spread, so that attention is peaked and what a method drops shows in the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from seqwise.core.segments import CONTEXT, QUESTION, Segments

__all__ = ["FAMILIES", "Batch", "Family", "marked"]

Batch = dict[str, Tensor]

_PAD, _WORDS, _IMAGE, _VIDEO, _VISION_START, _VISION_END = 0, 96, 97, 98, 99, 100  # words are the ids 1..96
_TEXT: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": _PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}


def marked(batch: Batch) -> Segments:
    """Facts for the prompts of a batch: behind half of the words a set of three members, each with a box, and then the
    question; the rest is context."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    facts = Segments.infer(ids, mask, _IMAGE)
    words = facts.real & (ids <= _WORDS)
    share = words.cumsum(-1) / words.sum(-1, keepdim=True)  # (B, N) in (0, 1]
    after = (ids == _IMAGE).long().flip(-1).cumsum(-1).flip(-1) > 0  # an image is still to come
    inside = words & ~after & (share > 0.5) & (share <= 0.9)
    member = torch.where(inside, ((share - 0.5) / 0.4 * 3).ceil().long().clamp(1, 3) - 1, -1)
    corner = torch.tensor([[40.0, 9.0], [3.0, 50.0], [3.0, 2.0], [torch.nan, torch.nan]])[member]  # (B, N, 2)
    part = torch.where(facts.real, torch.where(share > 0.9, QUESTION, CONTEXT), -1)
    box = torch.cat([corner, corner + 5], -1)
    return replace(facts, set=torch.where(inside, 0, -1), member=member, part=part, box=box)


@dataclass(frozen=True)
class Family:
    """One kind of model.

    make: builds the model, its weights from torch's global generator. pixels: how an image goes into a batch, None for
    a text model. sizes: (height, width) of a prompt's first, second, ... image; they differ where the family cuts
    images into tiles. tolerance: for `torch.testing.assert_close` of float32 logits.
    """

    name: str
    make: Callable[[], nn.Module]
    pixels: str | None = None
    sizes: tuple[tuple[int, int], ...] = ((16, 16),)
    atol: float = 5e-5
    side: int = 16  # pixels of an image, or of a tile of it

    def __str__(self) -> str:
        return self.name

    @property
    def vision(self) -> bool:
        return self.pixels is not None

    @property
    def tolerance(self) -> dict[str, Any]:
        return {"atol": self.atol, "rtol": 1e-4}

    def tiny(self) -> Any:
        """A fresh model: the same weights every time, float32, eval mode; torch's generator stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().eval()

    def prompt(self, n: int, seed: int = 0, images: int | None = None) -> Batch:
        """A batch of one prompt of n <= 96 words, all different, with images between them.

        images: how many; the default is one for a vision-language family. Their placeholder tokens come on top of n.
        """
        images = (1 if self.vision else 0) if images is None else images
        if not 1 <= n <= _WORDS or (images and not self.vision):
            raise ValueError(
                f"prompt must have 1 to {_WORDS} words and images only for a vision family, got {n}, {images}"
            )
        random = torch.Generator().manual_seed(1000 + seed)
        words = torch.randperm(_WORDS, generator=random)[:n] + 1
        if not images:
            return {"input_ids": words[None], "attention_mask": torch.ones(1, n, dtype=torch.long)}
        sizes = [self.sizes[i % len(self.sizes)] for i in range(images)]
        batch = self._images(sizes, random)
        pieces: list[Tensor] = []
        for i, size in enumerate(sizes):  # images split the first half of the words evenly
            start, stop = (n // 2) * i // images, (n // 2) * (i + 1) // images
            visual = torch.full((_placeholders(self.name, size),), _IMAGE)
            pieces += [words[start:stop], torch.tensor([_VISION_START]), visual, torch.tensor([_VISION_END])]
        ids = torch.cat([*pieces, words[n // 2 :]])[None]
        batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.pixels == "patches":
            batch["mm_token_type_ids"] = (ids == _IMAGE).long()
        return batch

    def pad_left(self, prompts: Sequence[Batch]) -> Batch:
        """The prompts as one batch, padding on the left."""
        width = max(prompt["input_ids"].shape[1] for prompt in prompts)
        batch: Batch = {}
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if any(name in prompt for prompt in prompts):
                rows = [prompt.get(name, torch.zeros_like(prompt["input_ids"])) for prompt in prompts]
                batch[name] = torch.cat([nn.functional.pad(row, (width - row.shape[1], 0), value=_PAD) for row in rows])
        for name in ("image_sizes", "image_grid_thw", "pixel_values"):
            values = [prompt[name] for prompt in prompts if name in prompt]
            if name == "pixel_values" and self.pixels in ("tiles", "grouped") and values:
                most = max(value.shape[1] for value in values)  # images of fewer tiles are filled up
                values = [nn.functional.pad(value, (0, 0) * 3 + (0, most - value.shape[1])) for value in values]
            if values:
                batch[name] = torch.cat(values)
        return batch

    def _images(self, sizes: list[tuple[int, int]], random: torch.Generator) -> Batch:
        if self.pixels == "grouped":  # per sample
            return {"pixel_values": torch.randn(1, len(sizes), 3, self.side, self.side, generator=random)}
        if self.pixels == "whole":
            return {"pixel_values": torch.randn(len(sizes), 3, self.side, self.side, generator=random)}
        if self.pixels == "tiles":
            tiles = [_tiles(self.name, size) for size in sizes]
            pixels = torch.randn(len(sizes), max(tiles), 3, 16, 16, generator=random)
            for image, count in zip(pixels, tiles, strict=True):
                image[count:] = 0
            return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
        grid = torch.tensor([(1, height // 4, width // 4) for height, width in sizes])
        return {
            "pixel_values": torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4, generator=random),
            "image_grid_thw": grid,
        }


@cache
def _tiles(name: str, size: tuple[int, int]) -> int:
    """Tiles of an image, the overview included, by the model's own rule."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config: Any = FAMILIES[name].tiny().config
    return int(image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size))


@cache
def _placeholders(name: str, size: tuple[int, int]) -> int:
    """Language-model rows of an image of this size: as many as the model makes features of it."""
    family = FAMILIES[name]
    images = family._images([size], torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = family.tiny().model.get_image_features(**images).pooler_output
    return sum(len(feature) for feature in features)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_TEXT))


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_TEXT, head_dim=8))


def _mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_TEXT, sliding_window=12))


def _gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**_TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=12))


def _neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shared = {name: value for name, value in _TEXT.items() if name != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shared))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    names = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
    }
    shared = {names.get(name, name): value for name, value in _TEXT.items() if name != "num_key_value_heads"}
    return GPT2LMHeadModel(GPT2Config(**shared))


def _llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_TOWER),
        text_config=LlamaConfig(**_TEXT),
        image_token_id=_IMAGE,
        vision_feature_layer=-2,
    )
    return LlavaForConditionalGeneration(_spread(config))


def _llava_next() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_TOWER),
        text_config=LlamaConfig(**_TEXT),
        image_token_id=_IMAGE,
        vision_feature_layer=-2,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    return LlavaNextForConditionalGeneration(_spread(config))


def _llava_onevision() -> nn.Module:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tower = SiglipVisionConfig(**{name: value for name, value in _TOWER.items() if name != "initializer_range"})
    config = LlavaOnevisionConfig(
        vision_config=tower,
        text_config=Qwen2Config(**_TEXT),
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    return LlavaOnevisionForConditionalGeneration(_spread(config))


def _qwen25_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tower = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        vision_config=tower,
        text_config={**_TEXT, "rope_parameters": rope},
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        vision_start_token_id=_VISION_START,
        vision_end_token_id=_VISION_END,
    )
    return Qwen2_5_VLForConditionalGeneration(_spread(config))


def _qwen2_vl() -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tower = {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 32,
        "mlp_ratio": 2,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        vision_config=tower,
        text_config={**_TEXT, "rope_parameters": rope},
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        vision_start_token_id=_VISION_START,
        vision_end_token_id=_VISION_END,
    )
    return Qwen2VLForConditionalGeneration(_spread(config))


def _idefics3() -> nn.Module:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    return Idefics3ForConditionalGeneration(_shuffled(Idefics3Config))


def _smolvlm() -> nn.Module:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    return SmolVLMForConditionalGeneration(_shuffled(SmolVLMConfig))


def _shuffled(make: Any) -> Any:
    """Idefics3 and its small twin: a SigLIP tower, four patches shuffled into each visual token."""
    from transformers import LlamaConfig

    config = make(
        vision_config={**_TOWER, "num_hidden_layers": 3, "image_size": 32},
        text_config=LlamaConfig(**_TEXT),
        image_token_id=_IMAGE,
        scale_factor=2,
        pad_token_id=_PAD,
    )
    return _spread(config)


def _internvl() -> nn.Module:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

    tower = {**_TOWER, "image_size": [32, 32], "patch_size": [4, 4], "num_hidden_layers": 3}
    config = InternVLConfig(
        vision_config=tower, text_config=Qwen2Config(**_TEXT), image_token_id=_IMAGE, downsample_ratio=0.5
    )
    return InternVLForConditionalGeneration(_spread(config))


def _spread(config: Any) -> Any:
    """The outer config of a composite model decides the spread of its own weights (projector, newline)."""
    config.initializer_range = _TEXT["initializer_range"]
    return config


_MIXED_SIZES = ((16, 32), (28, 20))  # of two and of four tiles
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", _llama),
        Family("qwen3", _qwen3),
        Family("mistral", _mistral),
        Family("gemma2", _gemma2),
        Family("neox", _neox),
        Family("gpt2", _gpt2),
        Family("llava", _llava, "whole"),
        Family("llava_next", _llava_next, "tiles", _MIXED_SIZES),
        Family("llava_onevision", _llava_onevision, "tiles", _MIXED_SIZES),
        Family("qwen2_vl", _qwen2_vl, "patches", ((16, 16), (24, 16))),
        Family("qwen25_vl", _qwen25_vl, "patches", ((16, 16), (24, 16))),
        Family("idefics3", _idefics3, "grouped", side=32),
        Family("smolvlm", _smolvlm, "grouped", side=32),
        Family("internvl", _internvl, "whole", side=32),
    )
}
