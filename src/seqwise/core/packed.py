"""Keys or values in 1, 2, 4 or 8 bits per element, really packed: the bytes are counted from storage.

    x_hat = (codes * step + minimum) * scale

How codes and parameters come about (channelwise, tokenwise, ...) is a paper's own affair; this is only the store.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

BITS = (1, 2, 4, 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (..., D) below 2**bits -> uint8 (..., ceil(D * bits / 8)); the last byte is filled with zeros."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
    per_byte = 8 // bits
    size = codes.shape[-1]
    short = -size % per_byte
    if short:
        codes = torch.nn.functional.pad(codes, (0, short))
    grouped = codes.to(torch.uint8).unflatten(-1, (-1, per_byte))  # (..., bytes, per_byte)
    packed = grouped[..., 0].clone()
    for place in range(1, per_byte):
        packed |= grouped[..., place] << (bits * place)
    return packed


def unpack_bits(packed: Tensor, bits: int, size: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 (..., bytes) -> uint8 codes (..., size)."""
    if bits == 8:
        return packed[..., :size]
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed[..., None] >> places) & (2**bits - 1)
    return codes.flatten(-2)[..., :size]


@dataclass(frozen=True)
class Packed:
    """Packed codes of (B, Hkv, m, D) elements and their parameters, each broadcastable to that shape."""

    codes: Tensor  # (B, Hkv, m, bytes) uint8
    bits: int
    size: int  # D
    minimum: Tensor
    step: Tensor
    scale: Tensor | None = None

    @classmethod
    def pack(cls, codes: Tensor, bits: int, minimum: Tensor, step: Tensor, scale: Tensor | None = None) -> Packed:
        """codes: uint8 (B, Hkv, m, D), unpacked."""
        return cls(pack_bits(codes, bits), bits, codes.shape[-1], minimum, step, scale)

    def dequantize(self, dtype: torch.dtype) -> Tensor:  # (B, Hkv, m, D)
        x = unpack_bits(self.codes, self.bits, self.size).float() * self.step + self.minimum
        return (x if self.scale is None else x * self.scale).to(dtype)

    def gather(self, index: Tensor) -> Packed:
        """Tokens index (B, Hkv, k) of each head; parameters per token follow, parameters per channel stay."""

        def along_tokens(x: Tensor) -> Tensor:
            if x.shape[2] == 1:
                return x
            x = x.expand(index.shape[0], index.shape[1], -1, -1)
            return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))

        codes = self.codes.gather(2, index[..., None].expand(-1, -1, -1, self.codes.shape[-1]))
        scale = None if self.scale is None else along_tokens(self.scale)
        return replace(self, codes=codes, minimum=along_tokens(self.minimum), step=along_tokens(self.step), scale=scale)

    def select(self, batch: Tensor) -> Packed:
        """Samples `batch` of the batch axis (beam search)."""

        def pick(x: Tensor) -> Tensor:  # parameters may be shared by all samples
            return x if x.shape[0] == 1 and self.codes.shape[0] != 1 else x.index_select(0, batch)

        chosen: dict[str, Any] = {name: pick(getattr(self, name)) for name in ("codes", "minimum", "step")}
        chosen["scale"] = None if self.scale is None else pick(self.scale)
        return replace(self, **chosen)

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.codes, self.minimum, self.step, self.scale) if x is not None]

    @property
    def nbytes(self) -> int:
        return storage_bytes(self.tensors)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that really lie behind tensors: each storage counts once, expansions not at all."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())
