"""The parts of `seqwise.lab.zoo.scenes` that its training needs too: words, processor, architecture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from seqwise.lab.zoo.scenes_data import (
    COLOURS,
    DIRECTIONS,
    GRID,
    IMAGE_TOKEN,
    NUMBERS,
    PATCH,
    PATCHES,
    PLACES,
    PLURALS,
    SHAPES,
    SIDE,
)

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", IMAGE_TOKEN)
PAD_ID, BOS_ID, EOS_ID, UNK_ID, IMAGE_ID = range(len(SPECIAL))
WORDS = (
    *("?", ".", "is", "there", "a", "what", "where", "how", "many", "the", "in", "picture", "colour", "yes", "no"),
    *("objects", "small", "large", *SHAPES, *PLURALS, *COLOURS, *NUMBERS, *PLACES),
    *dict.fromkeys(" ".join(DIRECTIONS).split()),
)
ID = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
_TEMPLATE = (
    "<bos>{% for message in messages %}"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    " {% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %} <eos>{% endif %}"
    "{% endfor %}"
)
WIDTH = 96


def processor() -> LlavaProcessor:
    """Image processor and word-level tokenizer: pads on the left, joins the contents of chat messages.

    Words in any case; what the scenes' questions do not hold is <unk>. Needs Pillow.
    """
    from transformers import CLIPImageProcessorPil

    core = Tokenizer(models.WordLevel(dict(ID), unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[?.]"), "isolated")]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS_ID)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        additional_special_tokens=[AddedToken(IMAGE_TOKEN, special=True, normalized=False)],
        model_max_length=512,
    )
    side = {"height": SIDE, "width": SIDE}
    half = [0.5] * 3
    images = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=half, image_std=half, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )


def pixel_values(pixels: Tensor) -> Tensor:
    """8-bit pixels (m, 3, 48, 48) -> what the processor makes of them, in [-1, 1]."""
    return (pixels.float() / 255 - 0.5) / 0.5


def ids_of(prompt: str, counts: Sequence[int]) -> list[int]:
    """Token ids of a prompt, `counts[i]` placeholders for its i-th image."""
    left = iter(counts)
    ids = [BOS_ID]
    for word in prompt.split():
        ids += [IMAGE_ID] * next(left) if word == IMAGE_TOKEN else [ID[word]]
    return ids


def build(seed: int) -> LlavaForConditionalGeneration:
    """The untrained model, in eval mode; the global random state is kept."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(ID),
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        # At the usual 1e4, half of a head's dimensions turn over within a prompt and drown what the content says.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.08,  # the usual 0.02 stays on a plateau for hundreds of steps at this width
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
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
    for name, token in (("bos", BOS_ID), ("eos", EOS_ID), ("pad", PAD_ID)):
        setattr(model.generation_config, f"{name}_token_id", token)
    return model


def resize(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Features (..., 64, width) -> (..., h * w, width): bilinear, corners not aligned, raster order."""
    square = x.mT.unflatten(-1, (GRID, GRID))  # (..., width, 8, 8)
    sized = interpolate(square.reshape(-1, *square.shape[-3:]), size=grid, mode="bilinear", align_corners=False)
    return sized.flatten(-2).mT.reshape(*x.shape[:-2], grid[0] * grid[1], x.shape[-1])
