"""Attention statistics next to the fused kernel: "how much attention did slot j receive from rows R?" in O(n) memory.

With the log-sum-exp L_i of each row, which fused kernels return, a probability is one product away:

    A[i, j] = exp(scale * q_i . k_j - L_i)

so a statistic costs one blocked Q K^T and the exponentials; no n x n tensor exists. Without L the rows are normalised
block by block, each block holding all the columns its rows can see.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import log
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from seqwise.core.visible import Visible

Reduce = Literal["sum", "mean", "count", "max", "entropy"]
_ROW_BLOCK = 64
_COLUMN_TILE = 2048
_LN_2 = log(2.0)
_LOG2_E = 1 / _LN_2


def received(
    query: Tensor,
    key: Tensor,
    *,
    visible: Visible | None = None,
    rows: Tensor | slice | None = None,
    weight: Tensor | None = None,
    reduce: Reduce = "sum",
    heads: Literal["query", "kv"] = "query",
    lse: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One statistic of `attention_statistics`: attention received per slot, (B, H or Hkv, n) in fp32.

    `reduce="entropy"` gives the rows' entropies in nats instead, (B, H, R).
    """
    return attention_statistics(
        query, key, visible=visible, rows=rows, weight=weight, reduce=(reduce,), heads=heads,
        lse=lse, scaling=scaling, softcap=softcap,
    )[reduce]  # fmt: skip


@torch.no_grad()
def attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    visible: Visible | None = None,
    rows: Tensor | slice | None = None,
    weight: Tensor | None = None,
    reduce: Sequence[Reduce] = ("sum",),
    heads: Literal["query", "kv"] = "query",
    lse: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """Several reductions of the attention probabilities from one pass, in O(n) memory and without gradient.

    query: (B, H, q, D), key: (B, Hkv, n, D), after RoPE. visible: default causal, the rows being the last q columns.
    rows: which of the q rows count (slice, (R,) or (B, R) indices; default all). weight: (R,) or (B, R), multiplies a
    row's probabilities in `sum` (a forgetting factor, say); padding rows always weigh 0. heads="kv" sums (`max`: takes
    the maximum) over the query heads of each KV head. lse: (B, H, q) log-sum-exp of the scaled logits, if the fused
    kernel gave it; not usable with a softcap.

    Returns fp32: "sum", "max", "mean" (the plain sum over "count"), "count" (rows that see the slot): (B, H or Hkv, n);
    "entropy": (B, H, R), in nats.
    """
    unknown = [name for name in reduce if name not in get_args(Reduce)]
    if unknown:
        raise ValueError(f"reduce must be among {get_args(Reduce)}, got {unknown[0]!r}")
    B, H, q, D = query.shape
    Hkv, n = key.shape[1], key.shape[2]
    if H % Hkv:
        raise ValueError(f"query heads must be a multiple of KV heads ({Hkv}), got {H}")
    g = H // Hkv
    scaling = D**-0.5 if scaling is None else scaling
    visible = visible if visible is not None else Visible.of(q, n, device=query.device)
    if rows is not None:
        query, lse, visible = _take_rows(query, lse, visible, rows)
    R = query.shape[2]
    weights = _row_weights(weight, visible, B, R, query.device)  # (B or 1, R)
    if softcap is not None:
        lse = None
    strike = lse is not None and "entropy" not in reduce  # dead slots are struck out once, at the end, not in each tile
    if lse is not None:
        lse = lse.float() * _LOG2_E
        if visible.live_q is not None:
            lse = lse.masked_fill(~visible.live_q[:, None], float("inf"))  # what kernels give for padding rows differs

    k = key.float().reshape(B * Hkv, n, D)
    block, tile = _block_sizes(R, n, lse is not None)
    out: dict[str, Tensor] = {
        name: torch.zeros(B * Hkv, g, n, device=query.device) for name in reduce if name in ("sum", "mean", "max")
    }
    counting = "mean" in reduce or "count" in reduce
    seen_heads = max(visible.order_k.shape[1], 1 if visible.live_k is None else visible.live_k.shape[1])
    seen_by = torch.zeros(B, seen_heads, n, device=query.device)
    entropy = torch.zeros(B, Hkv, g, R, device=query.device) if "entropy" in reduce else None
    buffer = torch.empty(B * Hkv * g * block * min(tile, n), device=query.device)
    ones = (
        torch.ones(1, R, device=query.device) if visible.live_q is None else visible.live_q.float()
    )  # rows that count

    for start in range(0, R, block):
        stop = min(start + block, R)
        r = stop - start
        # powers of 2 cost a quarter of powers of e, so the logits are in bits
        factor = scaling if lse is None else scaling * _LOG2_E
        q_block = query[:, :, start:stop].float().reshape(B * Hkv, g * r, D) * factor
        low, high = visible.span(start, stop)
        if high <= low:
            continue
        bias = (
            torch.zeros((), device=query.device) if lse is None else -lse[:, :, start:stop].reshape(B * Hkv, g * r, 1)
        )
        for left in range(low, high, tile):
            right = min(left + tile, high)
            c = right - left
            p = buffer[: B * Hkv * g * r * c].view(B * Hkv, g * r, c)
            torch.baddbmm(bias, q_block, k[:, left:right].mT, out=p)
            if softcap is not None:
                p.div_(softcap).tanh_().mul_(softcap)
            edge = visible.open_until(start, stop, left, right) if strike or visible.live_k is None else left
            seen = visible.tile(start, stop, edge, right, dead=not strike) if edge < right else None
            p5 = p.view(B, Hkv, g, r, c)
            hidden = None if seen is None else (p5[..., edge - left :], ~seen[:, :, None])  # Hkv or 1, then g
            if lse is None:
                if hidden is not None:
                    hidden[0].masked_fill_(hidden[1], float("-inf"))
                log_p = torch.log_softmax(p, -1) if entropy is not None else None
                p.copy_(log_p.exp() if log_p is not None else torch.softmax(p, -1))
                if seen is not None:
                    p.nan_to_num_(nan=0.0)  # rows that see nothing
            else:
                log_p = p * _LN_2 if entropy is not None else None
                p.exp2_()
                if hidden is not None:
                    hidden[0].masked_fill_(hidden[1], 0.0)
            if entropy is not None and log_p is not None:
                plogp = torch.where(p > 0, p * log_p, 0.0)
                entropy[..., start:stop] -= plogp.sum(-1).view(B, Hkv, g, r)
            if counting:
                counted = ones[:, None, start:stop, None]
                seen_by[..., left:edge] += counted.sum(-2)
                seen_by[..., edge:right] += counted.sum(-2) if seen is None else (seen.float() * counted).sum(-2)
            if "sum" in out:
                _add_weighted(out["sum"][..., left:right], p, weights[:, start:stop], B, heads)
            if "mean" in out:
                _add_weighted(out["mean"][..., left:right], p, ones[:, start:stop], B, heads)
            if "max" in out:
                if visible.live_q is not None and lse is None:
                    p5.mul_(visible.live_q[:, None, None, start:stop, None])
                view = out["max"][..., left:right]
                torch.maximum(view, p.view(B * Hkv, g, r, c).amax(2), out=view)

    dead = ~visible.live_k if strike and visible.live_k is not None else None
    if dead is not None:
        seen_by = seen_by.masked_fill(dead, 0.0)
    result: dict[str, Tensor] = {}
    for name, total in out.items():
        per_head = total.view(B, Hkv, g, n)
        if dead is not None:
            per_head = per_head.masked_fill(dead[:, :, None], 0.0)
        if heads == "kv":
            result[name] = per_head.amax(2) if name == "max" else per_head.sum(2)
        else:
            result[name] = per_head.reshape(B, H, n)
    if "mean" in result:
        result["mean"] = result["mean"] / _per_head(seen_by, result["mean"].shape[1]).clamp(min=1)
    if "count" in reduce:
        wanted = Hkv if heads == "kv" else H
        result["count"] = _per_head(seen_by, wanted).expand(B, wanted, n)
    if entropy is not None:
        if visible.live_q is not None:
            entropy = entropy.masked_fill(~visible.live_q[:, None, None], 0.0)
        result["entropy"] = entropy.view(B, H, R)
    return result


def _add_weighted(out: Tensor, p: Tensor, weight: Tensor, B: int, heads: str) -> None:
    """out (N, g, c) += weight . p over the rows of p (N, g r, c), N = B Hkv; weight: (B or 1, r). For KV heads all goes
    into group 0, summed later."""
    N, g, c = out.shape
    r = p.shape[1] // g
    w = weight.expand(B, r).repeat_interleave(N // B, dim=0)  # (N, r)
    if heads == "kv":
        out[:, :1] += torch.bmm(w.repeat(1, g)[:, None], p)
    else:
        out += torch.matmul(w[:, None, None], p.view(N, g, r, c))[:, :, 0]


def _per_head(x: Tensor, H: int) -> Tensor:
    return x if x.shape[1] in (1, H) else x.repeat_interleave(H // x.shape[1], dim=1)


def _block_sizes(rows: int, slots: int, have_lse: bool) -> tuple[int, int]:
    """Rows per block and columns per tile: small enough for the cache and for 5 % of an n x n matrix."""
    block = max(1, min(_ROW_BLOCK, rows, max(16, slots // 32)))
    return block, (min(_COLUMN_TILE, slots) if have_lse else slots)


def _row_weights(weight: Tensor | None, visible: Visible, B: int, R: int, device: torch.device) -> Tensor:
    weights = torch.ones(1, R, device=device) if weight is None else weight.float().to(device)
    weights = weights[None] if weights.dim() == 1 else weights
    if weights.shape[-1] != R or weights.shape[0] not in (1, B):
        raise ValueError(f"weight must have shape ({R},) or ({B}, {R}), got {tuple(weights.shape)}")
    return weights if visible.live_q is None else weights * visible.live_q


def _take_rows(
    query: Tensor, lse: Tensor | None, visible: Visible, rows: Tensor | slice
) -> tuple[Tensor, Tensor | None, Visible]:
    if isinstance(rows, slice):
        return query[:, :, rows], None if lse is None else lse[:, :, rows], visible.take(rows)
    B, H, _, D = query.shape
    at = (rows if rows.dim() == 2 else rows[None]).expand(B, -1)[:, None].expand(B, H, -1)  # (B, H, R)
    return (
        query.gather(2, at[..., None].expand(-1, -1, -1, D)),
        None if lse is None else lse.gather(2, at),
        visible.take(rows),
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visible,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    spans: Sequence[tuple[int, int]] | None = None,
    want_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention under `visible` through the fused kernel, with masks only as tiles.

    query: (B, H, q, D), key, value: (B, Hkv, n, D). spans: per sample the [start, stop) of its real rows, where rows
    and slots are the same fresh columns: each sample then runs on its own length, as it would alone. Returns the output
    (B, H, q, D), zero on padding rows, and the log-sum-exp (B, H, q) if wanted and available.
    """
    q, n = query.shape[2], key.shape[2]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = visible.window is not None and visible.window < n
    plain = visible.causal and visible.offset == 0 and q == n and not window and visible.extra is None
    plain = plain and visible.rule is None
    if softcap is not None:
        return _softcapped(query, key, value, visible, scaling, softcap), None
    if plain and visible.live_k is None:
        return _fused(query, key, value, None, q > 1, scaling, dropout, want_lse)
    if plain and spans is not None:
        out = query.new_zeros(*query.shape[:3], value.shape[-1])
        lse = query.new_zeros(query.shape[:3], dtype=torch.float32)
        complete = want_lse
        for b, (start, stop) in enumerate(spans):
            if start == stop:  # the kernel cannot take zero rows
                continue
            part = slice(start, stop)
            o, one = _fused(
                query[b : b + 1, :, part], key[b : b + 1, :, part], value[b : b + 1, :, part],
                None, stop - start > 1, scaling, dropout, want_lse,
            )  # fmt: skip
            out[b, :, part] = o[0]
            if one is not None:
                lse[b, :, part] = one[0]
            complete = complete and one is not None
        return out, lse if complete else None
    outs, lses = [], []
    block = q if visible.offset is None and q <= 512 else 256
    for start in range(0, q, block):
        stop = min(start + block, q)
        low, high = visible.span(start, stop)
        seen = visible.tile(start, stop, low, high)
        if seen is not None:
            seen = _mask_heads(seen, query.shape[1])
        o, one = _fused(
            query[:, :, start:stop], key[:, :, low:high], value[:, :, low:high], seen, False, scaling, dropout, want_lse
        )
        outs.append(o)
        lses.append(one)
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
    if visible.live_q is not None:
        out = out.masked_fill(~visible.live_q[:, None, :, None], 0.0)
    if not want_lse or any(one is None for one in lses):
        return out, None
    return out, lses[0] if len(lses) == 1 else torch.cat([one for one in lses if one is not None], 2)


def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    live: Tensor | None = None,
    *,
    scaling: float | None = None,
) -> Tensor:
    """One-row attention of each query head over its slots index (B, H, k), reading only these keys and values.

    query: (B, H, 1, D), key: (B, Hkv, n, D), value: (B, Hkv, n, Dv); live (B, H, k) is False on padding of the index.
    Returns (B, H, 1, Dv).
    """
    B, H, k = index.shape
    flat = index.reshape(B, key.shape[1], -1)  # (B, Hkv, g k): a group reads from its own KV head

    def read(x: Tensor) -> Tensor:  # (B, H, k, D)
        return take_slots(x, flat).view(B, H, k, -1)

    seen = None if live is None else live[:, :, None]  # (B, H, 1, k)
    return scaled_dot_product_attention(query, read(key), read(value), attn_mask=seen, scale=scaling)


def take_slots(x: Tensor, index: Tensor) -> Tensor:
    """x (B, h, n, D) at slots index (B, h, k): (B, h, k, D), whole rows at once, which `gather` does not do."""
    B, h, n, D = x.shape
    b, head, row, one = x.stride()
    if one != 1 or row < D or head % row or b % row or x.requires_grad or not x.numel():
        return x.gather(2, index[..., None].expand(-1, -1, -1, D))
    last = (B - 1) * (b // row) + (h - 1) * (head // row) + n  # rows of the storage from x on
    table = x.as_strided((last, D), (row, 1))
    start = torch.arange(B, device=x.device)[:, None] * (b // row) + torch.arange(h, device=x.device) * (head // row)
    return table.index_select(0, (index + start[..., None]).flatten()).view(B, h, -1, D)


def _mask_heads(seen: Tensor, H: int) -> Tensor:
    return seen if seen.shape[1] in (1, H) else seen.repeat_interleave(H // seen.shape[1], dim=1)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    causal: bool,
    scaling: float,
    dropout: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if want_lse and not dropout and lse_available(query.device.type, query.dtype) and value.shape[-1] == key.shape[-1]:
        bias = None
        if seen is not None:
            bias = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
            bias.masked_fill_(~seen, torch.finfo(query.dtype).min)
            bias = bias.expand(query.shape[0], -1, -1, -1) if bias.shape[0] != 1 else bias
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scaling
        )
        if seen is not None:  # rows that see nothing come as a mean of all values
            blind = ~seen.any(-1)
            out, lse = out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, 0.0)
        return out, lse
    grouped = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=seen, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
    )
    if seen is not None:
        out = out.nan_to_num(nan=0.0) if not seen.is_cuda else out  # rows that see nothing
    return out, None


def _softcapped(query: Tensor, key: Tensor, value: Tensor, visible: Visible, scaling: float, softcap: float) -> Tensor:
    """Row-blocked attention with capped logits, which no fused CPU kernel offers."""
    B, H, q, _ = query.shape
    g = H // key.shape[1]
    outs = []
    for start in range(0, q, 256):
        stop = min(start + 256, q)
        low, high = visible.span(start, stop)
        p = softcapped_probabilities(
            query[:, :, start:stop], key[:, :, low:high], visible.tile(start, stop, low, high), scaling, softcap
        )
        outs.append(p.to(value.dtype) @ value[:, :, low:high].repeat_interleave(g, dim=1))
    out = torch.cat(outs, 2)
    return out if visible.live_q is None else out.masked_fill(~visible.live_q[:, None, :, None], 0.0)


def probabilities(
    query: Tensor, key: Tensor, visible: Visible, *, scaling: float | None = None, softcap: float | None = None
) -> Tensor:
    """Dense fp32 probabilities (B, H, q, n) of a FEW rows (a decode step, a window); not for whole prompts."""
    return normalised(masked_logits(query, key, visible, scaling, softcap))


def masked_logits(
    query: Tensor, key: Tensor, visible: Visible, scaling: float | None = None, softcap: float | None = None
) -> Tensor:
    """Dense fp32 logits (B, H, q, n) of a FEW rows, scaled and capped, -inf where not seen."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _logits(query, key, visible.tile(0, query.shape[2], 0, key.shape[2]), scaling, softcap)


def normalised(logits: Tensor) -> Tensor:
    """Softmax of logits (..., n); rows that see nothing are 0."""
    return logits.softmax(-1).nan_to_num(nan=0.0)


def softcapped_probabilities(
    query: Tensor, key: Tensor, seen: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    return normalised(_logits(query, key, seen, scaling, softcap))


def _logits(query: Tensor, key: Tensor, seen: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
    B, H, r, D = query.shape
    Hkv, n = key.shape[1], key.shape[2]
    logits = query.float().reshape(B, Hkv, -1, D) @ key.float().mT * scaling  # (B, Hkv, g r, n)
    logits = logits.view(B, Hkv, H // Hkv, r, n)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    if seen is not None:
        logits = logits.masked_fill(~seen[:, :, None], float("-inf"))
    return logits.view(B, H, r, n)


@cache
def lse_available(device: str, dtype: torch.dtype) -> bool:
    """Whether this device's fused kernel gives a log-sum-exp that agrees with a plain one, probed once."""
    operator = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if device != "cpu" or operator is None:
        return False
    q = torch.linspace(-1, 1, 2 * 3 * 8).view(1, 2, 3, 8).to(dtype)
    try:
        _, lse = operator(q, q, q, 0.0, True, attn_mask=None, scale=1.0)
    except (RuntimeError, TypeError):
        return False
    logits = (q.float() @ q.float().mT).masked_fill(torch.ones(3, 3).triu(1).bool(), float("-inf"))
    return bool(torch.allclose(lse, logits.logsumexp(-1), atol=2e-2 if dtype != torch.float32 else 1e-4))
