"""TokenSelect: each block of queries attends to sinks, chosen tokens and its neighbours, closed up to short positions.

    keep all keys; for a block of C rows, the last of the N tokens so far, where N > n_init + k + n_local:

    q_bar  = mean over the rows of R(n_local + i) q_i           one fingerprint per head, keys unrotated
    p[h]   = softmax over candidates j of q_bar_h . k_j         candidates: all but n_init first and n_local last tokens
    s_j    = sum over h of p[h, j]                              soft vote: one set for all heads; can be max-pooled
    kept   = n_init first ++ top k of s ++ n_local last         m tokens, in order
    out    = softmax((R(c_i) q_i) . (R(j) k_j) / sqrt(D)) v_j   j = place in kept, c_i = m - C + i; causal

R is RoPE. No position exceeds n_init + k + n_local, whatever N is: this is how a model reads past its training length.
The k tokens of a decode step stay chosen while the next fingerprints have a cosine >= `reuse` to the one that chose.

"TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV Cache
Selection", arXiv 2411.02886. KV heads are those of grouped-query attention (h // group), unlike in the released
selection kernel; ties go to the earlier token; the cache of the selection follows the paper's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, max_pool1d, pad

from seqwise.core.method import Method, budget_param, param
from seqwise.core.observe import attention, take_slots
from seqwise.core.rope import rotate
from seqwise.core.select import keep_top
from seqwise.core.views import Kernel
from seqwise.core.visible import Visible
from seqwise.methods.cache.base import Held, by_sample


def fingerprint(q: Tensor, inv_freq: Tensor | None, local: int, *, interleaved: bool = False) -> Tensor:
    """The mean of a block's queries, as if they stood at `local`, `local` + 1, ...: (B, H, C, D) -> (B, H, D) fp32.

    q: without RoPE. inv_freq: (d / 2,), as in `core.rope.rotate`; None leaves the queries unrotated.
    """
    q = q.float()
    if inv_freq is not None:
        q = rotate(q, local + torch.arange(q.shape[2], device=q.device), inv_freq, interleaved=interleaved)
    return q.mean(2)


def logits(q_bar: Tensor, k: Tensor, scaling: float | None = None) -> Tensor:
    """q_bar_h . k_j, times `scaling` if given: (B, H, D), (B, Hkv, M, D) -> (B, H, M) fp32; k without RoPE."""
    z = _products(q_bar[:, :, None].to(k.dtype), k).flatten(1, 2).float()
    return z if scaling is None else z * scaling


def soft_vote(z: Tensor) -> Tensor:
    """Each head's probabilities, summed: (..., H, M) logits -> (..., M)."""
    return z.softmax(-1).sum(-2)


def smooth(s: Tensor, pool: int | None) -> Tensor:
    """The maximum of `pool` (odd) scores around each one: (..., M) -> (..., M); None leaves them.

    Raises:
        ValueError: an even pool, which would shift and shorten the scores.
    """
    if pool is None:
        return s
    if pool < 1 or pool % 2 == 0:
        raise ValueError(f"TokenSelect.pool must be odd or None, got {pool} (scores around each one)")
    return max_pool1d(s.flatten(0, -2)[:, None], pool, stride=1, padding=pool // 2).view(s.shape)


def select(
    q_bar: Tensor,
    k: Tensor,
    count: Sequence[int],
    *,
    sinks: int = 128,
    local: int = 512,
    pool: int | None = None,
    scaling: float | None = None,
    sets: int = 1,
    dead: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens kept for one block: index (B, sets, m) into k's N slots, ascending, and which of them count.

    q_bar: (B, H, D) as `fingerprint` gives it, k: (B, Hkv, N, D) without RoPE. count: tokens chosen per sample. sets:
    1, or the number of KV heads, whose query heads then vote among themselves. dead: (B or 1, 1 or Hkv) first slots
    that hold no token; the sinks come after them. Where all N fit, all count.
    """
    B, H, _ = q_bar.shape
    N = k.shape[2]
    at = torch.arange(N, device=k.device)
    dead = torch.zeros(1, 1, dtype=torch.long, device=k.device) if dead is None else dead
    dead = dead[..., None].expand(B, sets, 1)
    M = max(0, N - local)
    first = at[:sinks] + dead  # (B, sets, sinks)
    near = at[M:].expand(B, sets, -1)
    parts = [(first, first < M), (near, near >= dead)]
    if M:
        open_ = at[:M] >= dead + sinks  # the candidates, (B, sets, M)
        z = logits(q_bar, k[:, :, :M], scaling).view(B, sets, -1, M)
        s = soft_vote(z.masked_fill(~open_[:, :, None], float("-inf"))).nan_to_num(nan=0.0)  # NaN: no candidates
        parts.insert(1, keep_top(smooth(s, pool), open_, [min(c, M) for c in count]))
    index, live = (torch.cat(each, -1) for each in zip(*parts, strict=True))
    return index.clamp(max=N - 1), live


def reindexed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    live: Tensor,
    inv_freq: Tensor,
    *,
    interleaved: bool = False,
    visible: Visible | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of C rows over kept slots, at positions counted within these: (B, H, C, Dv).

    q: (B, H, C, D), k: (B, Hkv, N, D), both without RoPE, v: (B, Hkv, N, Dv); index, live: (B, 1 or Hkv, m) as `select`
    gives them, the rows' own tokens last. visible: what rows see of the kept slots, default causal.
    """
    B, H, C, _ = q.shape
    Hkv = k.shape[1]
    place, at = compact(live, C)
    if visible is None:
        row = torch.arange(C, device=q.device)[None]
        visible = Visible(row, place - live.sum(-1, keepdim=True) + C, live_k=live)
    slots = index.expand(B, Hkv, -1)
    keys = rotate(take_slots(k, slots), place, inv_freq, interleaved=interleaved)
    queries = rotate(q, at.repeat_interleave(H // at.shape[1], 1), inv_freq, interleaved=interleaved)
    return attention(queries, keys, take_slots(v, slots), visible, scaling=scaling, softcap=softcap)[0]


def compact(live: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Positions of kept tokens (..., m), counted without those that are not live, and of the last `rows` of them."""
    place = live.cumsum(-1) - 1
    return place, place[..., -1:] + torch.arange(1 - rows, 1, device=live.device)


@dataclass(frozen=True)
class TokenSelect(Method):
    """Reads sinks, the tokens that a block's heads vote for, and the newest tokens, at positions counted among these.

    budget: k, tokens chosen: tokens, or the share of the prompt's real tokens. sinks, local: first and newest tokens,
    always read. block: rows of a prompt that share one selection, at most `local`. pool: scores whose maximum stands
    for each, odd. reuse: cosine from which a step keeps the tokens that an earlier one chose; None chooses at each
    step. scaled: logits of the vote times the attention's own scale; the paper's code leaves them as they are.

    Each layer keeps its keys without RoPE beside its cache (half as much again), and of a step's selection the keys and
    values as they are read; while a choice stays, tokens that leave the local ones are not read. The report's attention
    work counts scored keys as products. Where KV heads hold different tokens, because another method has evicted, each
    votes for its own, and each step chooses.
    """

    budget: int | float = budget_param(2048, "tokens chosen beside sinks and local ones")
    sinks: int = param(128, ge=0, doc="first tokens that are always read")
    local: int = param(512, ge=1, doc="newest tokens that are always read")
    block: int = param(512, ge=1, doc="rows of a prompt that share one selection")
    pool: int | None = param(None, ge=1, doc="scores around each one whose maximum counts")
    reuse: float | None = param(0.9, ge=-1, le=1, doc="cosine of fingerprints from which a selection is kept")
    scaled: bool = False

    slots: ClassVar[tuple[str, ...]] = ("attention.kernel", "cache.read")
    rotates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block > self.local:
            raise ValueError(f"TokenSelect.block must be in [1, local] = [1, {self.local}], got {self.block}")
        if self.pool is not None and self.pool % 2 == 0:
            raise ValueError(f"TokenSelect.pool must be odd or None, got {self.pool} (scores around each one)")

    def identity(self) -> Method:
        return replace(self, budget=1.0)

    def needs(self) -> set[str]:
        return {"full attention", "RoPE", "1-D positions"}

    def attend(self, kernel: Kernel) -> Tensor | None:
        visible, n = kernel.visible, kernel.key.shape[2]
        budgets = kernel.capacity(self.budget)
        if budgets is None or n <= self.sinks + min(budgets) + self.local:
            return None
        if visible.extra is not None or not visible.causal:
            return None  # rows that see what comes after them: the model's own attention
        if kernel.phase == "decode" and kernel.query.shape[2] == 1:
            return self._step(kernel, budgets)
        unrotated = replace(kernel, key=self._unrotated(kernel))
        out = by_sample(unrotated, lambda own, dead, b: self._prompt(own, dead, budgets[b]))
        kernel.pairs = unrotated.pairs
        return out

    def _select(
        self, kernel: Kernel, q_bar: Tensor, keys: Tensor, budgets: Sequence[int], dead: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return select(
            q_bar, keys, budgets, sinks=self.sinks, local=self.local, pool=self.pool, dead=dead,
            scaling=kernel.scaling if self.scaled else None,
            sets=max(kernel.visible.order_k.shape[1], 1 if dead is None else dead.shape[1]),
        )  # fmt: skip

    def _prompt(self, kernel: Kernel, dead: Tensor | None, budget: int) -> Tensor:
        """Rows in blocks; kernel.key is without RoPE, slots are by token."""
        rope, visible = kernel.rope, kernel.visible
        assert rope is not None and kernel.query_positions is not None
        turn: dict[str, Any] = {"inv_freq": rope.inv_freq, "interleaved": rope.interleaved}
        B, _, Q, _ = kernel.query.shape
        q = rope.rotate(kernel.query, -kernel.query_positions[:, None])
        n, most, outs, kernel.pairs = kernel.key.shape[2], self.sinks + budget + self.local, [], 0
        for start in range(0, Q, self.block):
            own = q[:, :, start : start + self.block]
            C = own.shape[2]
            N = n - Q + start + C
            keys = kernel.key[:, :, :N]
            if most >= N:
                index = torch.arange(N, device=q.device).expand(B, 1, -1)
                live = torch.ones_like(index, dtype=torch.bool) if dead is None else index >= dead[..., None]
            else:
                q_bar = fingerprint(own, local=self.local, **turn)
                index, live = self._select(kernel, q_bar, keys, [budget] * B, dead)
                kernel.pairs += N - self.local - self.sinks
            order = visible.order_k.expand(B, max(visible.order_k.shape[1], index.shape[1]), -1)
            order = order.gather(-1, index.expand(-1, order.shape[1], -1))
            seen = Visible(visible.order_q[:, start : start + C], order, live_k=live, rule=visible.rule)
            outs.append(
                reindexed_attention(
                    own, keys, kernel.value, index, live, visible=seen, scaling=kernel.scaling, softcap=kernel.softcap,
                    **turn,
                )
            )  # fmt: skip
            kernel.pairs += C * (min(N, most) - C) + C * (C + 1) // 2
        return torch.cat(outs, 2)

    def _step(self, kernel: Kernel, budgets: list[int]) -> Tensor:
        """One row per sample."""
        visible, rope, n, local = kernel.visible, kernel.rope, kernel.key.shape[2], self.local
        assert rope is not None and kernel.query_positions is not None and kernel.key_positions is not None
        held = Held.of(visible.order_k, visible.live_k, visible.offset is not None)
        steady = visible.offset is not None and held.slots is None  # slots stay where they are
        key, value, stored = (held.arrange(x) for x in (kernel.key, kernel.value, kernel.key_positions))
        dead = torch.zeros(1, 1, dtype=torch.long, device=key.device) if held.dead is None else held.dead
        q = rope.rotate(kernel.query, -kernel.query_positions[:, None])
        q_bar = fingerprint(q, rope.inv_freq, local, interleaved=rope.interleaved)

        near = torch.arange(n - local, n, device=key.device) >= dead[..., None]  # (B or 1, 1 or Hkv, local)
        rank = near.cumsum(-1) - near.sum(-1, keepdim=True)  # 0 for the row's own token, the one before is -1
        moved = stored[..., n - local :] - kernel.query_positions[:, None]
        even = ((moved == rank) | ~near).all()  # local tokens stand as far from the row as they shall
        layers: dict[int, dict[str, Any]] = kernel.facts.setdefault("token-select", {})
        mine = layers.get(kernel.layer) if steady else None
        if mine is not None and mine["n"] != n - 1:
            mine = None  # rows came in between
        stays = torch.zeros(len(budgets), dtype=torch.bool, device=key.device)
        if mine is not None and self.reuse is not None:
            alike = cosine_similarity(q_bar.flatten(1), mine["q_bar"].flatten(1)) >= self.reuse
            stays = alike & mine["full"]
        # One look at the device per layer: a new choice reads all keys, so that choosing in vain costs far more.
        all_stay, is_even = torch.stack([stays.all(), even]).tolist()
        kernel.pairs = self.sinks + max(budgets) + local
        if not all_stay or mine is None:
            keys = self._unrotated(kernel) if steady else rope.rotate(key, -stored)
            mine = self._choose(replace(kernel, key=keys, value=value), q_bar, budgets, held, mine, stays)
            kernel.pairs += n - local - self.sinks
        mine["n"] = n
        if steady:
            layers[kernel.layer] = mine

        last = mine["live"].sum(-1, keepdim=True) + near.sum(-1, keepdim=True) - 1  # (B, 1 or Hkv, 1)
        H, Hkv = q.shape[1], key.shape[1]
        near_key, far_q = key[:, :, n - local :], rope.rotate(q, last.repeat_interleave(H // last.shape[1], 1))
        near_q = kernel.query
        if not is_even:
            near_key, near_q = rope.rotate(near_key, last + rank - stored[..., n - local :]), far_q
        z = torch.cat([_products(far_q, mine["keys"]), _products(near_q, near_key)], -1).float() * kernel.scaling
        if kernel.softcap is not None:
            z = (z / kernel.softcap).tanh() * kernel.softcap
        seen = torch.cat([mine["live"].expand(len(z), Hkv, -1), near.expand(len(z), Hkv, -1)], -1)
        p = z.masked_fill(~seen[:, :, None], float("-inf")).softmax(-1).to(value.dtype)  # (B, Hkv, g, m)
        m = mine["keys"].shape[2]
        return (p[..., :m] @ mine["values"] + p[..., m:] @ value[:, :, n - local :]).view(len(z), H, 1, -1)

    def _choose(
        self, kernel: Kernel, q_bar: Tensor, budgets: list[int], held: Held, old: dict[str, Any] | None, stays: Tensor
    ) -> dict[str, Any]:
        """Sinks and chosen tokens of a step, where they shall not stay as they were; kernel.key is without RoPE.

        "full": there were more candidates than fit, so that the choice may stay.
        """
        rope, n = kernel.rope, kernel.key.shape[2]
        assert rope is not None
        index, live = self._select(kernel, q_bar, kernel.key, budgets, held.dead)
        index, live = index[..., : -self.local], live[..., : -self.local]
        width = self.sinks + max(budgets)  # the same at each step
        index, live = pad(index, (width - index.shape[-1], 0)), pad(live, (width - live.shape[-1], 0))
        count = n if held.dead is None else n - held.dead.amin(-1)
        full = count > torch.tensor(budgets, device=index.device) + self.sinks + self.local  # (B,)
        if old is not None:
            index = torch.where(stays[:, None, None], old["index"], index)
            live = torch.where(stays[:, None, None], old["live"], live)
            q_bar = torch.where(stays[:, None, None], old["q_bar"], q_bar)
        slots = index.expand(-1, kernel.key.shape[1], -1)
        keys = rope.rotate(take_slots(kernel.key, slots), live.cumsum(-1) - 1)
        values = take_slots(kernel.value, slots)
        return {"index": index, "live": live, "q_bar": q_bar, "full": full, "keys": keys, "values": values}

    def _unrotated(self, kernel: Kernel) -> Tensor:
        """The keys without RoPE, (B, Hkv, n, D); kept while slots stay where they are: only new ones are turned."""
        rope, n, positions = kernel.rope, kernel.key.shape[2], kernel.key_positions
        assert rope is not None and positions is not None
        if kernel.visible.order_k.shape[1] == 1:
            positions = positions[:, :1]  # one angle for all heads
        if kernel.visible.offset is None:
            return rope.rotate(kernel.key, -positions)
        kept: dict[int, tuple[Tensor, int]] = kernel.facts.setdefault("token-select keys", {})
        buffer, used = kept.get(kernel.layer, (kernel.key[:, :, :0], 0))
        if buffer.shape[2] < n:
            spare = n // 16 if used else 0
            larger = kernel.key.new_empty(*kernel.key.shape[:2], n + spare, kernel.key.shape[3])
            larger[:, :, :used] = buffer[:, :, :used]
            buffer = larger
        buffer[:, :, used:n] = rope.rotate(kernel.key[:, :, used:], -positions[..., used:])
        kept[kernel.layer] = buffer, n
        return buffer[:, :, :n]


def _products(q: Tensor, k: Tensor) -> Tensor:
    """q (B, H, 1, D), k (B, Hkv, m, D) -> (B, Hkv, g, m); much faster than q k^T for few rows."""
    return (k @ q.view(len(q), k.shape[1], -1, q.shape[3]).mT).mT
