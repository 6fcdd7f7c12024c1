"""PAROAttention: in the right one of six token orders, the attention pattern of a video model's head becomes blocks.

    grid (F, Hh, Ww) of N = F Hh Ww tokens behind n_text text tokens; an order names its axes, the slowest first
    X_o, m_o   sums and maxima of the b x b blocks of A, its rows and columns in order o
    S_o   = share of blocks with X_o < eps max X_o                         sparsity, higher is better
    Psi_o = mean over blocks of m_o / (X_o / entries)                      incoherence, lower is better
    o*    = argmax_o  w S'_o - (1 - w) Psi'_o                              ' = scaled to [0, 1] over the six orders
    M     = the d nb^2 blocks of largest mean X_o*, with those of text, of a partial last block and of the diagonal
    out   = T^-1 softmax_M((T q) (T k)^T / sqrt D) T v                     T: tokens in order o*, text stays in front

o* is one per layer and head; M also per group of timesteps. Both are fixed once, on a few prompts. The permutation
comes after RoPE; attention does not mind it, so that a full M changes nothing. Only the kept blocks are computed, and
the softmax is over them alone. Optionally q, k, P and v are rounded to INT8 or INT4 with one scale max |x| / qmax per
tile: 32 rows of q, b rows of k and v, b x b entries of P. That is simulated here: it has the numbers, not the speed.
"PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual Generation Models",
arXiv 2506.16054. Ours, since the official calibration is not public: eps = 1e-3 of the largest block, w = 1/2, the
scaling, the exact share of blocks per head instead of a tuned threshold, and the tiles of P and v.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from seqwise.core.anatomy import fingerprint
from seqwise.core.config import Configured, param
from seqwise.core.diffusers import Attachment, Attend, self_attentions
from seqwise.core.errors import PromptError, UnsupportedModel, UsageError
from seqwise.core.select import budget_count, top_k

Grid = tuple[int, int, int]
Kept = list[tuple[Tensor, Tensor]]  # see `kept_blocks`

ORDERS = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")
Q_ROWS = 32  # rows of q that share a scale
LOG2_E = math.log2(math.e)
_GATHERED = 1 << 24  # numbers of k, and of v, that are gathered at once
_FORMAT = "seqwise-paro-1"


# orders


def order_tables(grid: Grid, n_text: int = 0) -> Tensor:
    """Index tables of the six `ORDERS`, (6, n_text + N): place i of order o holds token table[o, i].

    grid: (F, Hh, Ww), all >= 1; a token's index before is n_text + (f Hh + h) Ww + w. Text keeps its place in front.
    """
    if len(grid) != 3 or min(grid) < 1 or n_text < 0:
        raise ValueError(f"grid must be three numbers >= 1 and n_text >= 0, got {grid!r} and {n_text!r}")
    index = torch.arange(math.prod(grid)).view(grid)
    tables = torch.stack([index.permute([*map("FHW".index, order)]).flatten() for order in ORDERS])  # (6, N)
    return torch.cat([torch.arange(n_text).expand(6, -1), n_text + tables], 1)


def permute(x: Tensor, tables: Tensor, orders: Tensor) -> Tensor:
    """Tokens of x (..., H, n, D) in the order of each head: orders (H,), indices of rows of tables (6, n)."""
    return x.gather(-2, tables[orders][..., None].expand(x.shape))


def unpermute(x: Tensor, tables: Tensor, orders: Tensor) -> Tensor:
    """Undoes `permute`, same shapes."""
    return permute(x, tables.argsort(-1), orders)


def permute_map(A: Tensor, tables: Tensor, orders: Tensor) -> Tensor:
    """Rows and columns of attention maps A (..., H, n, n) in the order of each head, orders (H,)."""
    return permute(permute(A, tables, orders).mT, tables, orders).mT


# blocks and their scores


def block_sums(A: Tensor, b: int) -> Tensor:
    """Sums of the b x b blocks of A (..., n, n): (..., nb, nb), nb = ceil(n / b); the last ones may be partial."""
    return _tiled(A, (b, b)).sum((-3, -1))


def block_maxima(A: Tensor, b: int) -> Tensor:
    """Largest entries of the b x b blocks of A (..., n, n), which are >= 0: (..., nb, nb)."""
    return _tiled(A, (b, b)).amax((-3, -1))


def block_counts(n: int, b: int) -> Tensor:
    """Entries of each block of an n x n map: (nb, nb)."""
    size = torch.full((-(-n // b),), b)
    size[-1] = n - b * (len(size) - 1)
    return size[:, None] * size


def block_statistics(q: Tensor, k: Tensor, b: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """`block_sums` and `block_maxima` of A = softmax(q k^T scale), one row of blocks at a time.

    q: (B, H, n, D); k: (B, Hkv, n, D), Hkv divides H. scale: None for 1 / sqrt(D). Returns two (B, H, nb, nb), fp32.
    """
    k = _repeated(k, q.shape[1]).float()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sums, maxima = [], []
    for rows in q.float().split(b, -2):
        A = (rows @ k.mT * scale).softmax(-1)  # (B, H, b, n)
        blocks = _tiled(A, (rows.shape[-2], b))[..., 0, :, :, :]  # (B, H, b, nb, b)
        sums.append(blocks.sum((-3, -1)))
        maxima.append(blocks.amax((-3, -1)))
    return torch.stack(sums, -2), torch.stack(maxima, -2)


def sparsity_score(sums: Tensor, threshold: float = 1e-3) -> Tensor:
    """S: share of blocks with less than `threshold` of the largest block's sum, (..., nb, nb) -> (...)."""
    return (sums < threshold * sums.amax((-2, -1), keepdim=True)).float().mean((-2, -1))


def incoherence(sums: Tensor, maxima: Tensor, counts: Tensor) -> Tensor:
    """Psi: max / mean of a block's entries, averaged over blocks, an empty one counting 1.

    sums, maxima: (..., nb, nb). counts: (nb, nb), entries of each block. Returns (...).
    """
    psi = maxima * counts / sums
    return torch.where(sums > 0, psi, 1.0).mean((-2, -1))


def choose_order(sparsity: Tensor, incoherence: Tensor, weight: float = 0.5) -> Tensor:
    """Index of the best order, w S' - (1 - w) Psi': (..., 6), (..., 6) -> (...).

    S' and Psi' run from 0 to 1 over the orders, and are 0 where all are equal. Ties go to the earlier of `ORDERS`.
    """
    score = weight * _unit(sparsity) - (1 - weight) * _unit(incoherence)
    return top_k(score, 1)[..., 0]


def always_kept(n: int, n_text: int, b: int) -> Tensor:
    """bool (nb, nb): rows and columns of blocks with text, of a partial last block, and the diagonal."""
    at = torch.arange(-(-n // b))
    edge = (at < -(-n_text // b)) | ((at + 1) * b > n)
    return edge[:, None] | edge | torch.eye(len(at), dtype=torch.bool)


def static_mask(sums: Tensor, density: float, always: Tensor) -> Tensor:
    """M, bool (..., nb, nb): the floor(density nb^2) blocks of largest sum, those `always` kept among them.

    sums: (..., nb, nb), means over calibration maps. always: bool (nb, nb); if it alone holds more, all of it stays.
    Ties go to the earlier block, row by row.
    """
    count = max(budget_count(float(density), always.numel()), int(always.sum()))
    ranked = sums.masked_fill(always.to(sums.device), math.inf).flatten(-2)
    keep = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, top_k(ranked, count), True)
    return keep.view(sums.shape)


def kept_mass(sums: Tensor, mask: Tensor) -> Tensor:
    """Share of the attention that falls on kept blocks: sums, mask (..., nb, nb) -> (...)."""
    return (sums * mask).sum((-2, -1)) / sums.sum((-2, -1))


def time_group(step: int, steps: int, groups: int) -> int:
    """Group of a denoising step, 0 <= step < steps: floor((step + 1) groups / steps), at most groups - 1."""
    if not 0 <= step < steps:
        raise ValueError(f"step must be in [0, {steps}), got {step} (denoising step)")
    return min((step + 1) * groups // steps, groups - 1)


# rounding


def quantise(x: Tensor, tile: tuple[int, int], bits: int = 8) -> tuple[Tensor, Tensor]:
    """Symmetric codes with one scale per tile: x (..., n, D) -> int8 (..., n, D), fp32 (..., nt, Dt).

    tile: (rows, columns); the last ones may be partial. scale = max |x| / (2^(bits - 1) - 1), codes = round(x / scale).
    """
    top = 2 ** (_bits("bits", bits) - 1) - 1
    tiles = _tiled(x.float(), tile)  # (..., nt, r, Dt, c)
    scale = tiles.abs().amax((-3, -1), keepdim=True) / top
    codes = (tiles / torch.where(scale > 0, scale, 1.0)).round().clamp(-top, top).to(torch.int8)
    n, D = x.shape[-2:]
    return codes.flatten(-4, -3).flatten(-2)[..., :n, :D], scale[..., 0, :, 0]


def dequantise(codes: Tensor, scale: Tensor, tile: tuple[int, int]) -> Tensor:
    """codes scale, fp32 (..., n, D); shapes as in `quantise`."""
    n, D = codes.shape[-2:]
    rows = scale.repeat_interleave(tile[0], -2)[..., :n, :]
    return codes * rows.repeat_interleave(tile[1], -1)[..., :D]


def quantise_qk(
    q: Tensor, k: Tensor, b: int = 64, bits: int = 8, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of q and k whose product is the logit to the base 2: P ~ 2^(s_q s_k q_codes k_codes^T).

    q, k: (..., n, D). scale: of the softmax, None for 1 / sqrt(D); it and log2 e are folded into q's scales. Tiles are
    32 rows of q (b, if less) and b rows of k. Returns int8 (..., n, D), fp32 (..., nt, 1), and the same of k.
    """
    D = q.shape[-1]
    q_codes, q_scale = quantise(q, (min(Q_ROWS, b), D), bits)
    k_codes, k_scale = quantise(k, (b, D), bits)
    return q_codes, q_scale * (D**-0.5 if scale is None else scale) * LOG2_E, k_codes, k_scale


# attention


def kept_blocks(mask: Tensor) -> Kept:
    """The rows of blocks of a mask bool (H, nb, nb), grouped by how many blocks they keep.

    Returns pairs of rows (T,), numbered h nb + i, and their key blocks (T, m), ascending. The diagonal is always kept:
    a row without a block would have no softmax.
    """
    nb = mask.shape[-1]
    rows = (mask | torch.eye(nb, dtype=torch.bool, device=mask.device)).flatten(0, 1)  # (H nb, nb)
    count = rows.sum(-1)
    groups = []
    for m in count.unique().tolist():
        row = (count == m).nonzero()[:, 0]
        groups.append((row, rows[row].nonzero()[:, 1].view(-1, m)))
    return groups


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | Kept,
    b: int = 64,
    *,
    scale: float | None = None,
    qk_bits: int | None = None,
    pv_bits: int | None = None,
) -> Tensor:
    """Attention over the kept blocks alone; the others are never computed.

    q: (B, H, n, D). k, v: (B, Hkv, n, D), Hkv divides H. mask: bool (H, nb, nb), shared by the batch, or what
    `kept_blocks` made of it. scale: None for 1 / sqrt(D). qk_bits, pv_bits: 2 to 8, what q and k, P and v are rounded
    to; None for not. Returns (B, H, n, D).
    """
    B, H, n, D = q.shape
    Hkv, nb = k.shape[1], -(-n // b)
    scale = D**-0.5 if scale is None else scale
    kept = kept_blocks(mask) if isinstance(mask, Tensor) else mask
    rounded = qk_bits is not None or pv_bits is not None
    out_dtype = v.dtype
    if qk_bits is not None:
        q_codes, q_scale, k_codes, k_scale = quantise_qk(q, k, b, qk_bits, scale)
        q, k = dequantise(q_codes, q_scale, (min(Q_ROWS, b), D)), dequantise(k_codes, k_scale, (b, D))
    elif rounded:
        q, k = q.float() * (scale * LOG2_E), k.float()
    if pv_bits is not None:
        v = dequantise(*quantise(v, (b, v.shape[-1]), pv_bits), (b, v.shape[-1]))
    elif rounded:
        v = v.float()
    q, k, v = (_tiled(x, (b, x.shape[-1])).squeeze(-2).flatten(1, 2) for x in (q, k, v))  # (B, H nb, b, D)
    out = v.new_empty(B, H * nb, b, v.shape[-1])
    inside = torch.arange(b, device=q.device)
    for rows, keys in kept:
        m = keys.shape[1]
        for row, key in zip(*(x.split(max(1, _GATHERED // (B * m * b * D))) for x in (rows, keys)), strict=True):
            block = (row // nb // (H // Hkv) * nb)[:, None] + key  # (T, m), over all heads
            k_, v_ = (x[:, block].flatten(2, 3) for x in (k, v))  # (B, T, m b, D)
            real = None if n % b == 0 else (key[..., None] * b + inside < n).flatten(1)[None, :, None]  # (1, T, 1, m b)
            if rounded:
                out[:, row] = _rounded_attention(q[:, row], k_, v_, real, b, pv_bits)
            else:
                out[:, row] = scaled_dot_product_attention(q[:, row], k_, v_, attn_mask=real, scale=scale)
    return out.view(B, H, nb * b, -1)[:, :, :n].to(out_dtype)


def permuted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tensor,
    orders: Tensor,
    mask: Tensor | Kept,
    b: int = 64,
    *,
    scale: float | None = None,
    qk_bits: int | None = None,
    pv_bits: int | None = None,
) -> Tensor:
    """T^-1 attention(T q, T k, T v) over the kept blocks; q and k after RoPE, all in the usual order.

    tables: (6, n) of `order_tables`. orders: (Hkv,), one for each KV head and its query heads. The rest, and what is
    returned, as in `block_sparse_attention`; mask is that of the permuted tokens.
    """
    own = orders.repeat_interleave(q.shape[1] // k.shape[1])  # (H,)
    q, k, v = permute(q, tables, own), permute(k, tables, orders), permute(v, tables, orders)
    out = block_sparse_attention(q, k, v, mask, b, scale=scale, qk_bits=qk_bits, pv_bits=pv_bits)
    return unpermute(out, tables, own)


# plans


@dataclass(frozen=True, eq=False, repr=False)
class PermutationPlan:
    """What calibration found: an order per layer and head, and a mask for each group of timesteps.

    grid, n_text: the tokens that it is for, n_text text tokens and then F Hh Ww others; it is of no use for another
    grid. orders: (layers, Hkv), indices of `ORDERS`. masks: bool (groups, layers, H, nb, nb), of the permuted tokens.
    block: b. fingerprint: of the model, "" for any. Raises ValueError where these do not fit together.
    """

    grid: Grid
    n_text: int
    orders: Tensor
    masks: Tensor
    block: int = 64
    fingerprint: str = ""

    def __post_init__(self) -> None:
        nb = -(-self.tokens // self.block)
        orders, masks = tuple(self.orders.shape), tuple(self.masks.shape)
        if len(orders) != 2 or int(self.orders.min()) < 0 or int(self.orders.max()) >= len(ORDERS):
            raise ValueError(f"orders must be (layers, heads) indices in [0, 6), got {self.orders}")
        if len(masks) != 5 or masks[1] != orders[0] or masks[2] % orders[1] or masks[3:] != (nb, nb):
            raise ValueError(
                f"masks must have shape (groups, {orders[0]}, multiple of {orders[1]}, {nb}, {nb}), got {masks}"
            )

    def __repr__(self) -> str:
        counts = Counter(ORDERS[i] for i in self.orders.flatten().tolist())
        orders = ", ".join(f"{name} {counts[name]}" for name in ORDERS if counts[name])
        return (
            f"PermutationPlan(grid={self.grid}, n_text={self.n_text}, block={self.block}; {self.layers} layers x"
            f" {self.heads} heads, {self.groups} time groups, density {self.density:.3f}; {orders})"
        )

    @property
    def tokens(self) -> int:
        return self.n_text + math.prod(self.grid)

    @property
    def groups(self) -> int:
        return self.masks.shape[0]

    @property
    def layers(self) -> int:
        return self.masks.shape[1]

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return self.masks.shape[2]

    @property
    def density(self) -> float:
        """Share of all blocks that is kept."""
        return float(self.masks.float().mean())

    @cached_property
    def tables(self) -> Tensor:
        """`order_tables` of the grid."""
        return order_tables(self.grid, self.n_text)

    def require(self, grid: Sequence[int], n_text: int = 0) -> None:
        """Raises PromptError for another grid or another number of text tokens."""
        if tuple(grid) != self.grid or n_text != self.n_text:
            raise PromptError(
                f"the plan is for grid {self.grid} behind {self.n_text} text tokens, got {tuple(grid)} behind {n_text};"
                " calibrate a plan for it"
            )

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        group: int = 0,
        *,
        scale: float | None = None,
        qk_bits: int | None = None,
        pv_bits: int | None = None,
    ) -> Tensor:
        """`permuted_attention` of one layer in a group of timesteps; q (B, H, n, D), k and v (B, Hkv, n, D).

        Raises PromptError for another number of tokens.
        """
        _check_tokens(q, self.grid, self.n_text)
        return permuted_attention(
            q,
            k,
            v,
            self.tables.to(q.device),
            self.orders[layer].to(q.device),
            self.masks[group, layer].to(q.device),
            self.block,
            scale=scale,
            qk_bits=qk_bits,
            pv_bits=pv_bits,
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one safetensors file, 8 blocks of a mask to a byte; returns its path."""
        from safetensors.torch import save_file

        facts = {
            "format": _FORMAT, "grid": self.grid, "n_text": self.n_text, "block": self.block,
            "masks": tuple(self.masks.shape), "fingerprint": self.fingerprint, "about": repr(self),
        }  # fmt: skip
        packed = torch.from_numpy(np.packbits(self.masks.cpu().numpy()))
        tensors = {"orders": self.orders.to("cpu", torch.uint8).contiguous(), "masks": packed}
        save_file(tensors, path, {"seqwise": json.dumps(facts)})
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PermutationPlan:
        """Reads what `save` wrote. Raises UsageError for another file."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("seqwise", "{}"))
            if facts.get("format") != _FORMAT:
                raise UsageError(f"{path} was not written by PermutationPlan.save")
            bits = np.unpackbits(file.get_tensor("masks").numpy(), count=math.prod(facts["masks"]))
            return cls(
                grid=tuple(facts["grid"]),
                n_text=facts["n_text"],
                orders=file.get_tensor("orders").long(),
                masks=torch.from_numpy(bits).bool().view(facts["masks"]),
                block=facts["block"],
                fingerprint=facts["fingerprint"],
            )


@dataclass(frozen=True)
class PAROAttention(Configured):
    """How a plan is calibrated.

    >>> plan = PAROAttention(budget=0.25, groups=10).calibrate(
    ...     pipe.transformer, lambda: pipe(prompt, num_inference_steps=50), grid=(13, 30, 45), n_text=226, steps=50
    ... )
    >>> plan.save("cogvideox.safetensors")
    >>> with attach(pipe.transformer, plan, steps=50):
    ...     video = pipe(another_prompt, num_inference_steps=50)

    budget: share of the blocks of each head's attention map that is kept, those of text included.
    """

    budget: float = param(0.25, gt=0, le=1, doc="share of the blocks of a head's attention map")
    weight: float = param(0.5, ge=0, le=1, doc="of sparsity against incoherence in the choice of an order")
    threshold: float = param(1e-3, ge=0, lt=1, doc="share of the largest block's sum below which a block is empty")
    block: int = param(64, ge=1, doc="tokens of a block")
    groups: int = param(1, ge=1, doc="groups of timesteps that have masks of their own")

    def calibrate(
        self,
        transformer: Any,
        run: Callable[[], object],
        *,
        grid: Grid,
        n_text: int = 0,
        steps: int | None = None,
    ) -> PermutationPlan:
        """A plan for a diffusers transformer.

        run: generates with a few prompts, and is called twice: for the orders, then for the masks. grid: (F, Hh, Ww)
        of the latent patches. n_text: tokens in front of them in self-attention. steps: denoising steps of a
        generation, needed for several groups. Raises MissingExtra, UnsupportedModel, AlreadyAttached as `attach`
        does, PromptError if `run` generates another grid, UsageError if it never calls the transformer.
        """
        calibration = Calibration(self, grid, n_text)
        watch = _Watch(grid, n_text, self.groups, steps)

        def observer(layer: int) -> Attend:
            def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
                calibration.add(layer, q, k, watch.group, scale)
                return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

            return attend

        modules = self_attentions(transformer, "PAROAttention")
        with Attachment(transformer, watch, zip(modules, map(observer, range(len(modules))), strict=True)):
            run()
            calibration.choose()
            run()
        return calibration.plan(fingerprint(transformer))


class Calibration:
    """Statistics of attention maps, layer by layer, until they make a plan; n x n maps are never stored.

    >>> calibration = Calibration(PAROAttention(), grid, n_text)
    >>> calibration.add(layer, q, k)  # every layer, several timesteps, a few prompts
    >>> calibration.choose()
    >>> calibration.add(layer, q, k, group)  # the same again
    >>> plan = calibration.plan()

    Two passes, since block sums of all six orders would not fit into memory. `orders` (layers, Hkv) can also be given
    by hand, instead of `choose`.
    """

    def __init__(self, method: PAROAttention, grid: Grid, n_text: int = 0) -> None:
        self.method, self.grid, self.n_text = method, grid, n_text
        self.tables = order_tables(grid, n_text)
        n = self.tables.shape[1]
        text = -(-n_text // method.block)  # blocks with text, which say nothing about the grid
        if -(-n // method.block) <= text:
            raise ValueError(f"PAROAttention.block must leave blocks without text, got {method.block} for {n} tokens")
        self.orders: Tensor | None = None
        self._image = (..., slice(text, None), slice(text, None))
        self._counts = block_counts(n, method.block)
        self._scores: dict[int, tuple[Tensor, int]] = {}  # layer -> sum of (2, Hkv, 6), maps
        self._sums: dict[tuple[int, int], tuple[Tensor, int]] = {}  # group, layer -> sum of (H, nb, nb), maps

    @torch.no_grad()
    def add(self, layer: int, q: Tensor, k: Tensor, group: int = 0, scale: float | None = None) -> None:
        """Counts one layer's maps: q (B, H, n, D), k (B, Hkv, n, D), after RoPE, in the usual order.

        layer, group: from 0. Raises PromptError for another number of tokens.
        """
        _check_tokens(q, self.grid, self.n_text)
        tables, b, Hkv = self.tables.to(q.device), self.method.block, k.shape[1]
        if self.orders is not None:
            orders = self.orders[layer].to(q.device)
            own = orders.repeat_interleave(q.shape[1] // Hkv)
            sums, _ = block_statistics(permute(q, tables, own), permute(k, tables, orders), b, scale)
            _count(self._sums, (group, layer), sums)
            return
        scores = []
        for index in tables:
            sums, maxima = (
                x[self._image] for x in block_statistics(q[..., index, :], k[..., index, :], b, scale)
            )  # (B, H, nb, nb)
            S = sparsity_score(sums, self.method.threshold)  # (B, H)
            Psi = incoherence(sums, maxima, self._counts[self._image].to(q.device))
            scores.append(torch.stack([S, Psi], 1).unflatten(-1, (Hkv, -1)).mean(-1))  # (B, 2, Hkv)
        _count(self._scores, layer, torch.stack(scores, -1))

    def choose(self) -> None:
        """Fixes the order of each layer and KV head by the mean scores so far. Raises UsageError if there are none."""
        layers = _in_order(self._scores)
        sparsity, psi = torch.stack([total / maps for total, maps in layers], 1)  # (layers, Hkv, 6)
        self.orders = choose_order(sparsity, psi, self.method.weight)

    def plan(self, fingerprint: str = "") -> PermutationPlan:
        """The plan. A group of which no timestep was seen takes the mean over the others.

        Raises UsageError if nothing was added since the orders are known.
        """
        layers = []
        always = always_kept(self.tables.shape[1], self.n_text, self.method.block)
        for layer in range(0 if self.orders is None else len(self.orders)):
            seen = {group: total / maps for (group, at), (total, maps) in self._sums.items() if at == layer}
            if not seen:
                break
            mean = torch.stack([*seen.values()]).mean(0)
            means = [seen.get(group, mean) for group in range(self.method.groups)]
            layers.append(static_mask(torch.stack(means), self.method.budget, always))  # (groups, H, nb, nb)
        if self.orders is None or len(layers) < len(self.orders):
            raise UsageError(
                f"a plan needs maps of every layer after its orders are known; layer {len(layers)} has none"
            )
        return PermutationPlan(
            self.grid, self.n_text, self.orders, torch.stack(layers, 1), self.method.block, fingerprint
        )


# diffusers


def attach(
    transformer: Any,
    plan: PermutationPlan,
    *,
    steps: int | None = None,
    qk_bits: int | None = None,
    pv_bits: int | None = None,
) -> Attachment:
    """Puts a plan into the self-attention of a diffusers transformer, until `detach()` or the end of a `with` block.

    steps: denoising steps of a generation; needed if the plan has several time groups. A timestep below the last one
    is the next step, one above it begins a new generation. qk_bits, pv_bits: see `block_sparse_attention`. The batch
    shares the masks, so that guidance may double it.

    Raises MissingExtra without diffusers, UnsupportedModel for a module that is not one of its transformers, has other
    layers or heads than the plan or is not the calibrated model (dataclasses.replace(plan, fingerprint="") for any
    weights), AlreadyAttached, UsageError without needed steps. A forward raises PromptError for another grid, and
    UnsupportedModel where self-attention has a mask or does not come to torch's scaled_dot_product_attention.
    """
    for name, bits in (("qk_bits", qk_bits), ("pv_bits", pv_bits)):
        if bits is not None:
            _bits(name, bits)
    modules = self_attentions(transformer, "PAROAttention")
    shape = f"{len(modules)} layers of {', '.join(map(str, sorted({module.heads for module in modules})))} heads"
    if shape != f"{plan.layers} layers of {plan.heads} heads":
        raise UnsupportedModel(
            f"the plan is for {plan.layers} layers of {plan.heads} heads, {type(transformer).__name__} has {shape}"
        )
    if plan.fingerprint not in ("", found := fingerprint(transformer)):
        raise UnsupportedModel(
            f"the plan was calibrated on another model ({plan.fingerprint}, this one is {found}); calibrate it on this"
            ' model, or take it as it is with dataclasses.replace(plan, fingerprint="")'
        )
    watch = _Watch(plan.grid, plan.n_text, plan.groups, steps)
    layers = [_Planned(plan, layer, watch, qk_bits, pv_bits) for layer in range(plan.layers)]
    return Attachment(transformer, watch, zip(modules, layers, strict=True))


class _Planned:
    """One layer's attention under a plan; what is kept in the present time group is looked up once."""

    def __init__(
        self, plan: PermutationPlan, layer: int, watch: _Watch, qk_bits: int | None, pv_bits: int | None
    ) -> None:
        self.plan, self.layer, self.watch = plan, layer, watch
        self.qk_bits, self.pv_bits = qk_bits, pv_bits
        self._group = -1
        self._kept: Kept = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        plan, group = self.plan, self.watch.group
        _check_tokens(q, plan.grid, plan.n_text)
        if group != self._group or self._kept[0][0].device != q.device:
            self._group, self._kept = group, kept_blocks(plan.masks[group, self.layer].to(q.device))
        return permuted_attention(
            q,
            k,
            v,
            self.watch.tables(q.device),
            plan.orders[self.layer].to(q.device),
            self._kept,
            plan.block,
            scale=scale,
            qk_bits=self.qk_bits,
            pv_bits=self.pv_bits,
        )


class _Watch:
    """Before each forward of the transformer: is it the grid, and which denoising step is it?"""

    def __init__(self, grid: Grid, n_text: int, groups: int, steps: int | None) -> None:
        if groups > 1 and (steps is None or steps < 1):
            raise UsageError(f"steps must be >= 1 for {groups} time groups, got {steps} (steps of a generation)")
        self.grid, self.n_text, self.groups, self.steps = grid, n_text, groups, steps
        self._step, self._last = -1, -math.inf
        self._tables = order_tables(grid, n_text)

    def tables(self, device: torch.device) -> Tensor:
        self._tables = self._tables.to(device)  # all layers share it, where they share a device
        return self._tables

    @property
    def group(self) -> int:
        return 0 if self.groups == 1 or self.steps is None else time_group(self._step, self.steps, self.groups)

    def __call__(self, transformer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(transformer.forward).bind(*args, **kwargs).arguments
        latent = given["hidden_states"]
        patch = getattr(transformer.config, "patch_size", None)
        if latent.ndim == 5 and patch is not None:  # a video; the number of frames follows from that of tokens
            p, r = (patch, patch) if isinstance(patch, int) else patch[-2:]
            found = latent.shape[-2] // p, latent.shape[-1] // r
            if found != tuple(self.grid[1:]):
                raise PromptError(
                    f"the plan is for frames of {self.grid[1]} x {self.grid[2]} tokens, got {found[0]} x {found[1]};"
                    " calibrate a plan for that size"
                )
        if self.groups == 1 or self.steps is None:
            return
        timestep = float(torch.as_tensor(given["timestep"]).max())
        if timestep != self._last:  # guidance may come as a second forward of the same timestep
            self._step = self._step + 1 if timestep < self._last else 0
            self._last = timestep
        if self._step >= self.steps:
            raise UsageError(f"steps must be that of the generation, got {self.steps} and now another timestep")


# parts


def _tiled(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """(..., n, D) -> (..., nt, rows, Dt, columns), filled up with zeros."""
    r, c = tile
    x = pad(x, (0, -x.shape[-1] % c, 0, -x.shape[-2] % r))
    return x.unflatten(-1, (-1, c)).unflatten(-3, (-1, r))


def _repeated(k: Tensor, H: int) -> Tensor:
    return k if k.shape[1] == H else k.repeat_interleave(H // k.shape[1], 1)


def _unit(x: Tensor) -> Tensor:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    differ = high - low > 1e-6 * high.abs()  # else what is scaled up is rounding
    return torch.where(differ, (x - low) / torch.where(differ, high - low, 1.0), 0.0)


def _rounded_attention(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, b: int, pv_bits: int | None) -> Tensor:
    """q, k: logits to the base 2; (B, T, b, D), k and v (B, T, m b, D)."""
    logits = q @ k.mT  # (B, T, b, m b)
    if real is not None:
        logits = logits.masked_fill(~real, -math.inf)
    P = torch.exp2(logits - logits.amax(-1, keepdim=True))
    P = P / P.sum(-1, keepdim=True)
    if pv_bits is not None:
        P = dequantise(*quantise(P, (b, b), pv_bits), (b, b))
    return P @ v


def _bits(name: str, bits: int) -> int:
    if bits not in range(2, 9):
        raise ValueError(f"{name} must be in [2, 8], got {bits!r} (bits of a code)")
    return bits


def _check_tokens(q: Tensor, grid: Grid, n_text: int) -> None:
    if q.shape[-2] != n_text + math.prod(grid):
        raise PromptError(
            f"the plan is for grid {grid} behind {n_text} text tokens, {n_text + math.prod(grid)} in all, got"
            f" {q.shape[-2]}; calibrate a plan for it"
        )


def _count(kept: dict[Any, tuple[Tensor, int]], key: Any, values: Tensor) -> None:
    """Adds the B maps of values (B, ...) to a running sum on the CPU."""
    total, maps = kept.get(key, (0, 0))
    kept[key] = (total + values.sum(0).cpu(), maps + len(values))


def _in_order(kept: dict[int, tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
    if not kept or sorted(kept) != [*range(len(kept))]:
        raise UsageError(f"orders need the maps of every layer from 0 on, got those of {sorted(kept) or 'none'}")
    return [kept[layer] for layer in range(len(kept))]
