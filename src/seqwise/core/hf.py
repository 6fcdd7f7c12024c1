"""Every difference between transformers versions, and every private name of it that the engine touches."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = "seqwise"  # the engine's name in transformers' two registries


def register_attention(attend: Callable[..., Any], name: str = ATTENTION) -> None:
    """Registers an attention function, and the mask function beside it, under a name, once; both stay registered."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, _mask_untouched)


def _mask_untouched(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The engine builds masks from slots; what this returns only travels along."""
    return attention_mask


def route_attention(modules: list[nn.Module], name: str = ATTENTION) -> Callable[[], None]:
    """Lets these modules call the attention function of this name; returns the undo.

    Modules read the name from `self.config`, which other models may share: each gets a copy of its config, as an
    instance attribute that `undo` takes back.
    """
    copies: dict[int, Any] = {}
    replaced: list[tuple[nn.Module, Any]] = []
    for module in modules:
        config = getattr(module, "config", None)
        if config is None:
            continue
        if id(config) not in copies:
            twin = copy.copy(config)
            twin._attn_implementation_internal = name
            copies[id(config)] = twin
        replaced.append((module, config))
        module.config = copies[id(config)]

    def undo() -> None:
        for module, config in replaced:
            module.config = config

    return undo


def is_cache(value: Any) -> bool:
    from transformers.cache_utils import Cache

    return isinstance(value, Cache)


def find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any | None:
    """The Cache among a layer's or model's arguments; its name differs by version and family."""
    return next((value for value in (*args, *kwargs.values()) if is_cache(value)), None)


def cache_refusal(cache: Any) -> str | None:
    """Why a cache cannot be taken over, or None."""
    from transformers.cache_utils import EncoderDecoderCache, StaticCache

    if isinstance(cache, EncoderDecoderCache):
        return "encoder-decoder caches are not supported"
    if isinstance(cache, StaticCache) or any(getattr(layer, "is_compileable", False) for layer in cache.layers):
        return "static caches are not supported; use the default dynamic cache"
    if getattr(cache, "offloading", False):
        return "offloaded caches are not supported; use the default dynamic cache"
    return None


def adopt_layers(cache: Any, layers: list[Any]) -> None:
    """Puts our layers into an empty cache, in place, so that the caller's object is the one that fills."""
    cache.layers[:] = layers
    cache.layer_class_to_replicate = None


def new_cache(layers: list[Any]) -> Any:
    from transformers.cache_utils import Cache

    return Cache(layers=layers)


def hidden_of(output: Any) -> Tensor:
    """Layers return a tensor, attention modules (and older layers) a tuple that begins with one."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def replace_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": hidden}
    return (hidden, *args[1:]), kwargs


def tiles_per_tile(owner: nn.Module, arguments: dict[str, Any]) -> list[int]:
    """For each tile of a tiled model's batch, how many tiles its image has; empty for models without tiles.

    arguments: of `get_image_features`. Where a sample has several images (LLaVA-OneVision), each is one tile.
    """
    image_sizes = arguments.get("image_sizes")
    count = getattr(sys.modules[type(owner).__module__], "image_size_to_num_patches", None)
    if image_sizes is None or count is None:
        return []
    config: Any = owner.config
    counts = [
        count(image_size=size, grid_pinpoints=config.image_grid_pinpoints, patch_size=config.vision_config.image_size)
        for size in image_sizes
    ]
    per_sample = arguments.get("batch_num_images")
    if per_sample is not None:
        alone = [int(n) == 1 for n in per_sample for _ in range(int(n))]
        counts = [n if single else 1 for n, single in zip(counts, alone, strict=True)]
    return [n for n in counts for _ in range(n)]


def patch_grid(vision_config: Any) -> tuple[int, int]:
    """Rows and columns of patches of a tile; (0, 0) where images differ in size."""
    sizes = [getattr(vision_config, name, 0) or 0 for name in ("image_size", "patch_size")]
    image, patch = (tuple(size) if isinstance(size, (list, tuple)) else (size, size) for size in sizes)
    rows, columns = (side // step if step else 0 for side, step in zip(image, patch, strict=True))
    return rows, columns


def patch_merge(owner: nn.Module, config: Any) -> int:
    """Side of the square of patches that become one visual token."""
    if hasattr(config.vision_config, "spatial_merge_size"):  # Qwen-VL
        return int(config.vision_config.spatial_merge_size)
    if hasattr(config, "scale_factor") and hasattr(owner, "connector"):  # Idefics3, SmolVLM
        return int(config.scale_factor)
    if hasattr(config, "downsample_ratio"):  # InternVL
        return round(1 / config.downsample_ratio)
    return 1


def merged_patches(owner: nn.Module, grid: tuple[int, int], merge: int) -> Tensor:
    """Patches (N, merge^2) of each visual token of a tile with this grid of tokens, by the model's own shuffling."""
    rows, columns = grid[0] * merge, grid[1] * merge
    number = torch.arange(rows * columns, dtype=torch.float32)
    if hasattr(owner, "connector"):
        shuffled = owner.connector.pixel_shuffle(number[None, :, None], merge)  # type: ignore[operator, union-attr]
    else:
        square = number.view(1, rows, columns, 1)
        shuffled = owner.pixel_shuffle(square, scale_factor=1 / merge)  # type: ignore[operator]
    return shuffled.reshape(grid[0] * grid[1], merge**2).long()


def image_grids(arguments: dict[str, Any]) -> Tensor | None:
    """(images, 3): frames, rows and columns of patches of each image or video, from what `get_image_features` or
    `get_video_features` got; None where all are alike."""
    arguments = {**arguments, **arguments.get("kwargs", {})}
    found = arguments.get("image_grid_thw")
    return arguments.get("video_grid_thw") if found is None else found


def token_order(tower: nn.Module, grids: Tensor) -> Tensor | None:
    """Where each visual token of all images stands in the tower's own order; None where that is raster order.

    A tower with window attention sorts groups of patches by window.
    """
    if not hasattr(tower, "window_size"):
        return None
    from transformers.vision_utils import get_vision_window_index

    tower_: Any = tower
    index, _ = get_vision_window_index(
        grids,
        spatial_merge_size=tower_.spatial_merge_size,
        window_size=tower_.window_size,
        patch_size=tower_.patch_size,
    )
    return torch.as_tensor(index).argsort()


def spread_hidden(output: Any, index: int, rows: Tensor, count: int) -> Any:
    """The output with entry `index` of its hidden states (1, k, d) spread over `count` rows, zeros elsewhere."""
    states = list(output["hidden_states"])
    full = states[index].new_zeros(1, count, states[index].shape[-1])
    states[index] = full.index_copy(1, rows, states[index])
    output["hidden_states"] = tuple(states)
    return output


def joined_outputs(outputs: list[Any]) -> Any:
    """Model outputs of single samples as one batch; entries whose lengths differ are dropped (None)."""
    first = outputs[0]

    def join(values: list[Any]) -> Any:
        if isinstance(values[0], Tensor):
            same = all(value.shape[1:] == values[0].shape[1:] for value in values)
            return torch.cat(values) if same else None
        if values[0] is None:
            return None
        if isinstance(values[0], tuple):
            return tuple(join(list(column)) for column in zip(*values, strict=True))
        return values[0]

    return type(first)(**{name: join([output[name] for output in outputs]) for name in first})


def generated(ids: Tensor, cache: Any) -> Any:
    """What `generate(return_dict_in_generate=True)` returns, without scores."""
    from transformers.generation import GenerateDecoderOnlyOutput

    name = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
    return GenerateDecoderOnlyOutput(sequences=ids, **{name: cache})


def text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}
