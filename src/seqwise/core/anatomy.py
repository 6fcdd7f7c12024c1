"""Where things are in a Hugging Face model, and what it lacks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from seqwise.core import hf
from seqwise.core.errors import UnsupportedModel

# what a method can need -> what to say where it is missing
PARTS = {
    "vision tower": "a vision tower; use a vision-language model (LLaVA, LLaVA-NeXT, ...)",
    "CLS token": "a CLS token in its vision tower; use a CLIP tower, or a setting that reads all rows",
    "RoPE": "rotary positions (RoPE)",
    "1-D positions": "one position per token; 3-axis RoPE (Qwen2-VL style) is not supported",
    "full attention": "full attention in every layer; this one has sliding windows",
    "pre-norm": "decoder layers with an attention and an MLP module",
}


@dataclass(frozen=True)
class Vision:
    """The visual side of a vision-language model."""

    owner: nn.Module  # the module with get_image_features
    tower: nn.Module
    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    projector: nn.Module | None
    feature_layer: int  # 0-based tower layer whose output the projector reads
    specials: int  # rows before the patches (CLS)
    grid: tuple[int, int]  # visual tokens of a tile, (0, 0) where images differ in size
    merge: int  # side of the square of patches that become one visual token
    image_token: int | None
    video_token: int | None
    patchwise: bool  # each visual token stands for patches of its own
    prunable: bool  # the tower and what follows accept fewer patches

    @property
    def tiled(self) -> bool:
        """Images come as several tiles, which the model packs into one run of tokens."""
        return hasattr(self.owner, "pack_image_features")

    @property
    def sized(self) -> bool:
        """All images and tiles have one size; otherwise (Qwen-VL) each has its own grid."""
        return min(self.grid) > 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids of the placeholders of visual tokens."""
        return tuple(token for token in (self.image_token, self.video_token) if token is not None)


@dataclass(frozen=True)
class Anatomy:
    """A causal language model, or a vision-language model around one."""

    model: nn.Module
    decoder: nn.Module  # the module that loops over the decoder layers
    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    mlps: tuple[nn.Module | None, ...]
    final_norm: nn.Module | None
    config: Any  # of the language model
    vision: Vision | None
    windows: tuple[int | None, ...]
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, model: nn.Module) -> Anatomy:
        """Reads a model. Raises UnsupportedModel where it is no decoder with per-layer attention."""
        name = type(model).__name__
        if not hasattr(model, "config"):
            raise UnsupportedModel(f"{name} is not a transformers model; load it with AutoModelForCausalLM")
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModel(f"{name} is an encoder-decoder; seqwise needs a decoder-only model")
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            raise UnsupportedModel(f"{name} is compiled; attach to the model before torch.compile")
        vision_owner, tower = _vision_modules(model)
        decoder, layers = _decoder(model, tower)
        attentions = []
        for i, layer in enumerate(layers):
            found = _attention(layer)
            if found is None:
                raise UnsupportedModel(
                    f"{name} has no attention module in decoder layer {i}; hybrid models are not supported"
                )
            if hasattr(found, "sinks"):
                raise UnsupportedModel(f"{name} has softmax sinks in its attention, which are not supported")
            attentions.append(found)
        config = hf.text_config(model)
        if getattr(config, "num_kv_shared_layers", 0):
            raise UnsupportedModel(f"{name} shares keys and values between layers, which is not supported")
        heads = config.num_attention_heads
        return cls(
            model=model,
            decoder=decoder,
            layers=tuple(layers),
            attentions=tuple(attentions),
            mlps=tuple(getattr(layer, "mlp", None) for layer in layers),
            final_norm=next(
                (getattr(decoder, n) for n in ("norm", "ln_f", "final_layer_norm") if hasattr(decoder, n)), None
            ),
            config=config,
            vision=None if tower is None or vision_owner is None else _vision(model, vision_owner, tower),
            windows=tuple(_window(attention, config, i) for i, attention in enumerate(attentions)),
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        )

    @property
    def parts(self) -> set[str]:
        found = set()
        if self.vision is not None:
            found.add("vision tower")
            if self.vision.specials:
                found.add("CLS token")
        if _has_rope(self):
            found.add("RoPE")
        if not getattr(self.config, "rope_parameters", None) or "mrope_section" not in self.config.rope_parameters:
            found.add("1-D positions")
        if all(window is None for window in self.windows):
            found.add("full attention")
        if all(mlp is not None for mlp in self.mlps):
            found.add("pre-norm")
        return found

    @property
    def extends(self) -> bool:
        """Whether positions beyond the trained ones can be computed: rotary ones can, learned ones cannot."""
        return "RoPE" in self.parts

    @property
    def mrope(self) -> bool:
        return "1-D positions" not in self.parts

    def require(self, needs: set[str], owner: str) -> None:
        """Raises UnsupportedModel for the first part that is missing."""
        for part in sorted(needs - self.parts):
            raise UnsupportedModel(f"{owner} needs {PARTS[part]} ({type(self.model).__name__})")

    def check_visual_budget(self, budget: Any, owner: str) -> None:
        """Raises ValueError for a count of visual tokens per image that no image of this model has."""
        if self.vision is None or not self.vision.sized or self.vision.tiled or not isinstance(budget, int):
            return
        most = self.vision.grid[0] * self.vision.grid[1]
        if budget > most:
            name = type(self.model).__name__
            raise ValueError(
                f"{owner}.budget must be in [1, {most}], the visual tokens of an image of {name}, got {budget}"
            )

    @property
    def fingerprint(self) -> str:
        """Identifies architecture and weights: shapes of all, values of a few of each."""
        return fingerprint(self.model)


def fingerprint(model: nn.Module) -> str:
    """Identifies architecture and weights: shapes of all, values of a few of each."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 8)][:8]
            digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _vision_modules(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    for owner in (getattr(model, "model", None), model):
        for name in ("vision_tower", "visual", "vision_model"):
            tower = getattr(owner, name, None)
            if isinstance(tower, nn.Module):
                return owner, tower
    return None, None


def _decoder(model: nn.Module, tower: nn.Module | None) -> tuple[nn.Module, list[nn.Module]]:
    """The outermost module that owns a list of layers with attention, outside of the vision tower."""
    inside = {id(m) for m in tower.modules()} if tower is not None else set()
    for module in model.modules():
        if id(module) in inside:
            continue
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) and _attention(child[0]) is not None:
                return module, list(child)
    raise UnsupportedModel(f"{type(model).__name__} has no list of decoder layers that seqwise knows")


def _attention(layer: nn.Module) -> nn.Module | None:
    for module in layer.modules():
        if module is not layer and "Attention" in type(module).__name__ and hasattr(module, "config"):
            return module
    return None


def _window(attention: nn.Module, config: Any, layer: int) -> int | None:
    types = getattr(config, "layer_types", None)
    if types is not None:
        return getattr(config, "sliding_window", None) if "sliding" in types[layer] else None
    window = getattr(attention, "sliding_window", None)
    if (
        window is None
        and getattr(config, "use_sliding_window", True)
        and getattr(config, "model_type", "") == "mistral"
    ):
        window = getattr(config, "sliding_window", None)
    return window


def _has_rope(anatomy: Anatomy) -> bool:
    return hasattr(anatomy.decoder, "rotary_emb") or any(hasattr(a, "rotary_emb") for a in anatomy.attentions[:1])


def _vision(model: nn.Module, owner: nn.Module, tower: nn.Module) -> Vision | None:
    layers = next(
        (
            list(child)
            for module in tower.modules()
            for child in module.children()
            if isinstance(child, nn.ModuleList) and len(child) and _attention(child[0]) is not None
        ),
        [],
    )
    config: Any = model.config
    feature = getattr(config, "vision_feature_layer", -1)
    strategy = getattr(config, "vision_feature_select_strategy", "full")
    depth = len(layers)
    vision_config = config.vision_config
    has_cls = any(hasattr(module, "class_embedding") or hasattr(module, "cls_token") for module in tower.modules())
    projector = getattr(owner, "multi_modal_projector", None)
    merge = hf.patch_merge(owner, config)
    rows, columns = hf.patch_grid(vision_config)
    single = isinstance(feature, int)
    # hidden_states[-1] is the last layer's output, hidden_states[0] the embeddings
    index = (feature + depth if feature < 0 else feature - 1) if single else depth - 1
    patchwise = single and not (has_cls and strategy == "full")
    return Vision(
        owner=owner,
        tower=tower,
        layers=tuple(layers),
        attentions=tuple(_attention(layer) for layer in layers),  # type: ignore[misc]
        projector=projector,
        feature_layer=index,
        specials=1 if has_cls else 0,
        grid=(rows // merge, columns // merge),
        merge=merge,
        image_token=getattr(config, "image_token_id", None),
        video_token=getattr(config, "video_token_id", None),
        patchwise=patchwise,
        prunable=projector is not None and merge == 1 and patchwise,
    )
