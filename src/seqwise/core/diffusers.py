"""Attention of diffusers' transformers replaced by another function, through their attention processors.

A processor runs the model's own one with torch's scaled_dot_product_attention rerouted: projections, norms and RoPE
stay the model's, nothing is patched or copied.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from seqwise.core.errors import AlreadyAttached, MissingExtra, UnsupportedModel

Attend: TypeAlias = "Callable[[Tensor, Tensor, Tensor, float | None], Tensor]"  # q, k, v (B, H, n, D), scale -> out


def self_attentions(transformer: Any, owner: str) -> list[Any]:
    """The self-attention modules of a diffusers transformer, in the order of its layers, for `owner` to attach to.

    Raises MissingExtra without diffusers, UnsupportedModel for other modules, AlreadyAttached.
    """
    try:
        base = importlib.import_module("diffusers").ModelMixin
    except ImportError:
        raise MissingExtra(f'{owner} attaches to diffusers: pip install "seqwise[diffusers]"') from None
    modules = []
    if isinstance(transformer, base):
        modules = [
            module
            for module in transformer.modules()
            if hasattr(module, "get_processor") and not getattr(module, "is_cross_attention", False)
        ]
    if not modules:
        raise UnsupportedModel(
            f"{owner} needs a diffusers transformer with self-attention, got {type(transformer).__name__}"
        )
    if any(isinstance(module.get_processor(), ReroutedProcessor) for module in modules):
        raise AlreadyAttached(f"{type(transformer).__name__} already has its attention replaced; detach() that first")
    return modules


class ReroutedProcessor:
    """A diffusers attention processor: another one whose scaled_dot_product_attention is replaced.

    Projections, norms and RoPE stay those of the model's own processor.
    """

    def __init__(self, original: Any, attend: Attend) -> None:
        self.original, self.attend = original, attend
        # diffusers passes on only the keywords that it reads in this signature
        vars(self)["__call__"] = original.__call__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Rerouted(self.attend) as rerouted:
            output = self.original(*args, **kwargs)
        if rerouted.calls != 1:
            raise UnsupportedModel(
                f"{type(self.original).__name__} must call torch's scaled_dot_product_attention once, got"
                f" {rerouted.calls} calls; use the native backend: transformer.set_attention_backend('native')"
            )
        return output


class Attachment:
    """Attention processors of a transformer that are replaced until `detach()`, or until the end of a `with` block."""

    def __init__(
        self, transformer: Any, before: Callable[[Any, Any, dict[str, Any]], None], layers: Iterable[tuple[Any, Attend]]
    ) -> None:
        """before(transformer, args, kwargs): at each forward. layers: attention modules and what attends in them."""
        self._hook = transformer.register_forward_pre_hook(before, with_kwargs=True)
        self._originals: list[tuple[Any, Any]] = []
        for module, attend in layers:
            original = module.get_processor()
            module.set_processor(ReroutedProcessor(original, attend))
            self._originals.append((module, original))

    def detach(self) -> None:
        """Puts the original processors back; a second call does nothing."""
        self._hook.remove()
        while self._originals:
            module, original = self._originals.pop()
            module.set_processor(original)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


class _Rerouted(TorchFunctionMode):
    """Inside, torch's scaled_dot_product_attention is another function."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend, self.calls = attend, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._replaced(*args, **kwargs) if func is scaled_dot_product_attention else func(*args, **kwargs)

    def _replaced(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None or is_causal or dropout_p:
            raise UnsupportedModel("only self-attention without mask, causality and dropout can be replaced")
        self.calls += 1
        return self.attend(query, key, value, scale)
