"""HiP attention: find each query block's best key blocks by a tree search, and attend to those alone.

    searchable   the T' tokens before the window of the query block's last row, M = ceil(T' / b_k) key blocks
    T' <= k      all M blocks
    else         n = ceil(k / b_k) contiguous chunks of the M blocks, chunk i from floor(M i / n) on;
                 until all chunks are single blocks:
                     each is halved: (s, z) -> (s, floor(z / 2)), (s + floor(z / 2), the rest)
                     each half scores max q . k over the rows 1, 3, 5, ... of the query block and the keys of one block
                     that stands for it, the one in its centre (or its first)
                     the n best of the 2 n halves stay
    out          softmax over the chosen blocks, the window and the sinks; causal, and each token once

Neighbouring keys score alike, so a block may stand for its chunk, and a query block looks at 2 n of them in each of
ceil(log2(M / n)) rounds: a prompt costs O(T log T). A decode step is a block of one row; it keeps the blocks that
it finds for `refresh` steps, while the window moves on. Nothing is evicted. The first `dense` layers attend to all.

"HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning" (also "A Training-Free
Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned Attention"), arXiv 2406.09827.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from seqwise.core.method import Method, budget_param, param
from seqwise.core.select import top_k
from seqwise.core.views import Kernel, Read
from seqwise.methods.cache.base import Held, by_sample

Representative = Literal["centre", "first"]
_Rule = Callable[[Tensor, Tensor], Tensor]  # rows (N, b_q), slots (B, H, N, K) -> (B, H, N, b_q, K) bool


def chunks(M: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """M (...) blocks as n contiguous chunks, whose sizes differ by at most 1: start and size, (..., n) each."""
    edge = M[..., None] * torch.arange(n + 1, device=M.device) // n
    return edge[..., :-1], edge.diff(dim=-1)


def branch(start: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of chunks (..., n), the smaller one first: start and size, (..., 2 n) each; size 0 is none."""
    half = size // 2
    return torch.stack([start, start + half], -1).flatten(-2), torch.stack([half, size - half], -1).flatten(-2)


def rounds(longest: int, budget: int, block: int, window: int) -> int:
    """Halvings until chunks are single blocks, for a query block whose last row sees `longest` tokens."""
    searchable = max(0, longest - window)
    if searchable <= budget:
        return 0
    M, n = -(-searchable // block), -(-budget // block)
    return (-(-M // n) - 1).bit_length()


def scored_rows(q: Tensor, real: Tensor, stride: int = 2) -> Tensor:
    """The rows of query blocks q (B, H, N, b_q, D) that score: stride - 1, 2 stride - 1, ..., (B, H, N, r, D).

    real: (N,) rows of each block that are no padding behind it; a block of fewer rows than `stride` is scored by its
    last one, a row that would be padding repeats the one before.
    """
    t = torch.arange(max(1, q.shape[3] // stride), device=q.device)
    real = real[:, None]
    at = torch.where(real < stride, real - 1, torch.minimum(t, real // stride - 1) * stride + stride - 1)  # (N, r)
    return q.gather(3, at[..., None].expand(*q.shape[:2], -1, -1, q.shape[-1]))


def search(
    rows: Tensor,
    k: Tensor,
    visible: Tensor,
    longest: int,
    *,
    budget: int,
    block: int,
    window: int,
    representative: Representative = "centre",
    dead: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The tree search of N query blocks: chosen key blocks (B, H, N, n), ascending, and how many count (B, H, N).

    rows: (B, H, N, r, D) as `scored_rows` gives them, k: (B, Hkv, T, D), both after RoPE. visible: tokens that the last
    row of a block sees, (B or 1, Hkv or 1, N), `longest` the most of them. dead: (B, Hkv or 1) first slots of k that
    hold no token; blocks are counted from the first that does. Ties go to the earlier block.
    """
    B, H, N, _, D = rows.shape
    T = k.shape[2]
    n = -(-budget // block)
    visible = visible.expand(B, -1, -1).repeat_interleave(H // visible.shape[1], 1)  # (B, H, N)
    searchable = (visible - window).clamp(min=0)
    M = (searchable + block - 1) // block
    start, size = chunks(M, n)  # (B, H, N, n)
    own, inside = rows.reshape(B * H * N, -1, D), torch.arange(block, device=k.device)
    for _ in range(rounds(longest, budget, block, window)):
        start, size = branch(start, size)  # (B, H, N, 2 n)
        first = (start + size // 2 if representative == "centre" else start) * block  # token
        offset = 0 if dead is None else dead.repeat_interleave(H // dead.shape[1], 1)[..., None, None]
        slot = (first + offset).clamp(max=T - block)  # the last block may be cut: it is read from earlier on
        keys = runs(k, slot, block).view(B * H * N, 2 * n * block, D)
        z = own @ keys.mT if own.shape[1] > 1 else (keys @ own.mT).mT  # much faster for one row
        score = z.amax(1).view(B, H, N, 2 * n, block)
        if window < block:  # else all its tokens are there and visible
            token = (slot - offset)[..., None] + inside
            score = score.masked_fill((token < first[..., None]) | (token >= visible[..., None, None]), float("-inf"))
        best = top_k(score.amax(-1).masked_fill(size == 0, float("-inf")), n)
        start, size = start.gather(-1, best), size.gather(-1, best)
    every = searchable <= budget
    start = torch.where(every[..., None], torch.arange(n, device=k.device), start)
    return start, torch.where(every, M, n)


def key_blocks(
    q: Tensor,
    k: Tensor,
    budget: int = 512,
    *,
    block_q: int = 64,
    block_k: int = 2,
    window: int = 256,
    stride: int = 2,
    representative: Representative = "centre",
) -> tuple[Tensor, Tensor]:
    """The first token of each key block that each query block chooses, ascending (B, H, N, n), and how many of these n
    count (B, H, N): the first ones; N = ceil(q / block_q), n = ceil(budget / block_k).

    q: (B, H, q, D), k: (B, Hkv, T, D), after RoPE; the rows are the last q of the T tokens. Blocks of queries begin at
    the first row.
    """
    options: dict[str, Any] = {"budget": budget, "block": block_k, "window": window, "representative": representative}
    found = [
        search(scored_rows(part, real, stride), k, last[None, None], longest, **options)
        for part, real, last, longest in _query_blocks(q, k.shape[2], block_q, _at_once(q, budget + window + block_q))
    ]
    return torch.cat([blocks for blocks, _ in found], 2) * block_k, torch.cat([count for _, count in found], 2)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    count: Tensor,
    before: Tensor,
    *,
    block: int,
    window: int,
    sinks: int,
    scaling: float | None = None,
    dead: Tensor | None = None,
    rule: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Attention of N query blocks over their key blocks, the window and the sinks, reading only these.

    q: (B, H, N, b_q, D), k: (B, Hkv, T, D), v: (B, Hkv, T, Dv); blocks: (B, H, N, n), of which the first `count`
    (B, H, N) count. before: (B or 1, Hkv or 1, N) tokens before a block's first row. Row i sees, once each, the tokens
    of its blocks, the last `window` >= 1 ones up to itself, and the first `sinks`; none after itself. dead: as in
    `search`. rule: what slots (B, H, N, K) rows see besides, (B, H, N, b_q, K) bool. Returns (B, H, N, b_q, Dv).
    """
    B, H, N, b_q, D = q.shape
    device, n = q.device, blocks.shape[-1]
    before = before.expand(B, -1, -1).repeat_interleave(H // before.shape[1], 1)[..., None]  # (B, H, N, 1)
    row, span = torch.arange(b_q, device=device), torch.arange(window + b_q - 1, device=device)
    first = torch.arange(sinks, device=device).expand(B, H, N, -1)
    chosen = (blocks[..., None] * block + torch.arange(block, device=device)).flatten(-2)  # (B, H, N, n block)
    near = before - window + 1 + span  # the windows of all rows
    unlisted = (torch.arange(n, device=device) >= count[..., None]).repeat_interleave(block, -1) | (chosen < sinks)
    far = torch.cat([first, chosen.masked_fill(unlisted, torch.iinfo(torch.long).max)], -1)
    band = (span >= row[:, None]) & (span < row[:, None] + window) & (near >= 0)[..., None, :]
    seen = torch.cat([far[..., None, :] <= (before + row - window)[..., None], band], -1)  # (B, H, N, b_q, K)
    slot = torch.cat([first, chosen, near], -1)
    if dead is not None:
        slot = slot + dead.repeat_interleave(H // dead.shape[1], 1)[..., None, None]
    slot = slot.clamp(0, k.shape[2] - 1)
    if rule is not None:
        seen = seen & rule(slot)

    def read(x: Tensor) -> Tensor:
        return runs(x, slot, 1).view(B * H * N, 1, -1, x.shape[-1])

    own, mask = q.reshape(B * H * N, 1, b_q, D), seen.view(B * H * N, 1, b_q, -1)
    return scaled_dot_product_attention(own, read(k), read(v), attn_mask=mask, scale=scaling).view(B, H, N, b_q, -1)


def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    budget: int = 512,
    *,
    block_q: int = 64,
    block_k: int = 2,
    window: int = 256,
    sinks: int = 16,
    stride: int = 2,
    representative: Representative = "centre",
    scaling: float | None = None,
    dead: Tensor | None = None,
    rule: _Rule | None = None,
) -> Tensor:
    """Search and attention of all rows, a few query blocks at a time: (B, H, q, Dv).

    q: (B, H, q, D), k: (B, Hkv, T, D), v: (B, Hkv, T, Dv), after RoPE; the rows are the last q of the T tokens. dead:
    as in `search`. rule: which slots a row sees besides.
    """
    Q, T = q.shape[2], k.shape[2]
    options: dict[str, Any] = {"block": block_k, "window": window, "dead": dead}
    pieces = []
    at_once = _at_once(q, budget + window + block_q)
    for i, (part, real, last, longest) in enumerate(_query_blocks(q, T, block_q, at_once)):
        visible = last[None, None] if dead is None else last - dead[..., None]  # (B or 1, Hkv or 1, N)
        rows = scored_rows(part, real, stride)
        blocks, count = search(rows, k, visible, longest, budget=budget, representative=representative, **options)
        own = None
        if rule is not None:
            start = i * at_once * block_q + torch.arange(part.shape[2] * block_q, device=q.device)
            own = functools.partial(rule, start.clamp(max=Q - 1).view(-1, block_q))
        pieces.append(
            block_sparse_attention(
                part, k, v, blocks, count, visible - real, sinks=sinks, scaling=scaling, rule=own, **options
            )
        )
    return torch.cat(pieces, 2).flatten(2, 3)[:, :, :Q]


def products(
    rows: int, tokens: int, budget: int, *, block_q: int, block_k: int, window: int, sinks: int, stride: int
) -> int:
    """At most so many query-key products per head does `hip_attention` need for the last `rows` of `tokens`."""
    before, n = tokens - rows, -(-budget // block_k)
    total = sum(min(i + 1, sinks + n * block_k + window) for i in range(before, tokens))
    for start in range(0, rows, block_q):
        real = min(block_q, rows - start)
        searched = rounds(before + start + real, budget, block_k, window) * 2 * n * block_k
        total += searched * max(1, real // stride)
    return total


def runs(x: Tensor, first: Tensor, length: int) -> Tensor:
    """Runs of `length` slots of x (B, Hkv, n, D) from `first` (B, H, ...) on: (B, H, ..., length, D)."""
    B, Hkv, n, D = x.shape
    if x.stride(3) != 1 or x.stride(2) != D or x.stride(1) % D or (B > 1 and x.stride(0) % D):
        x = x.contiguous()
    b, head = x.stride(0) // D if B > 1 else 0, x.stride(1) // D
    H = first.shape[1]
    heads = torch.arange(Hkv, device=x.device).repeat_interleave(H // Hkv) * head
    at = torch.arange(B, device=x.device)[:, None] * b + heads  # (B, H)
    table = x.as_strided(((B - 1) * b + (Hkv - 1) * head + n - length + 1, length * D), (D, 1))  # they overlap
    index = first + at.view(B, H, *[1] * (first.dim() - 2))
    return table.index_select(0, index.flatten()).view(*first.shape, length, D)


def _query_blocks(q: Tensor, T: int, block_q: int, at_once: int) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Query blocks (B, H, N, b_q, D), `at_once` of them a time; how many rows of each are real and how many of T tokens
    its last row sees, (N,) each, and the most of these."""
    Q = q.shape[2]
    if Q % block_q:
        q = pad(q, (0, 0, 0, -Q % block_q))
    q = q.unflatten(2, (-1, block_q))
    for i in range(0, q.shape[2], at_once):
        part = q[:, :, i : i + at_once]
        start = torch.arange(i, i + part.shape[2], device=q.device) * block_q
        stop = (start + block_q).clamp(max=Q)
        yield part, stop - start, T - Q + stop, T - Q + min(Q, (i + at_once) * block_q)


def _at_once(q: Tensor, keys: int) -> int:
    """Query blocks of which each head reads so many keys that are handled at once: what they read must fit into a CPU's
    cache, or keep a GPU busy."""
    elements = 2**27 if q.is_cuda else 2**22
    return max(1, elements // (2 * q.shape[0] * q.shape[1] * keys * q.shape[3]))


@dataclass(frozen=True)
class HiPAttention(Method):
    """Each block of query rows attends to the key blocks that a tree search finds, to a window and to the first tokens.

    budget: k, tokens in the blocks that are chosen per query head: tokens, or the share of the prompt's real tokens.
    block_q, block_k: rows of a query block (prompts), tokens of a key block. window, sinks: tokens always read.
    stride: every so many rows score. refresh: decode steps that share one search; a step's search scores at most
    2 budget log2(n / budget) keys per head, which the report's attention work leaves out. dense: first layers that
    attend to all. Where another method has evicted, each step searches.
    """

    budget: int | float = budget_param(512, "tokens in the chosen key blocks of a query block")
    block_q: int = param(64, ge=1, doc="rows of a query block")
    block_k: int = param(2, ge=1, doc="tokens of a key block")
    window: int = param(256, ge=1, doc="newest tokens that each row reads")
    sinks: int = param(16, ge=0, doc="first tokens that each row reads")
    stride: int = param(2, ge=1, doc="one in so many rows of a query block scores")
    representative: Representative = "centre"
    refresh: int = param(8, ge=1, doc="decode steps that share one search")
    dense: int = param(3, ge=0, doc="first layers that attend to all")

    slots: ClassVar[tuple[str, ...]] = ("attention.kernel", "cache.read")

    def identity(self) -> Method:
        return replace(self, budget=1.0)

    def needs(self) -> set[str]:
        return {"full attention"}

    def attend(self, kernel: Kernel) -> Tensor | None:
        visible, rows, n = kernel.visible, kernel.query.shape[2], kernel.key.shape[2]
        if kernel.layer < self.dense or (kernel.phase == "decode" and rows == 1):
            return None
        if visible.extra is not None or not visible.causal or kernel.softcap is not None:
            return None  # rows that see what comes after them, or capped logits: the model's own attention
        budgets = kernel.capacity(self.budget)
        if budgets is None or n <= min(budgets) + self.window:
            return None
        return by_sample(kernel, lambda own, dead, b: self._prompt(own, dead, budgets[b]))

    def _prompt(self, kernel: Kernel, dead: Tensor | None, budget: int) -> Tensor:
        visible = kernel.visible
        shape: dict[str, Any] = {
            name: getattr(self, name) for name in ("block_q", "block_k", "window", "sinks", "stride")
        }

        def rule(rows: Tensor, slots: Tensor) -> Tensor:
            B, H = slots.shape[:2]
            order_k = visible.order_k.expand(B, -1, -1).repeat_interleave(H // visible.order_k.shape[1], 1)
            order_k = order_k.gather(-1, slots.flatten(2)).view(slots.shape)  # (B, H, N, K)
            assert visible.rule is not None
            return visible.rule(visible.order_q[:, rows][:, None, ..., None], order_k[..., None, :])

        kernel.pairs = products(kernel.query.shape[2], kernel.key.shape[2], budget, **shape)
        return hip_attention(
            kernel.query, kernel.key, kernel.value, budget, **shape, representative=self.representative,
            scaling=kernel.scaling, dead=dead, rule=None if visible.rule is None else rule,
        )  # fmt: skip

    def read(self, read: Read) -> tuple[Tensor, Tensor] | None:
        budgets = read.capacity(self.budget)
        if read.layer < self.dense or budgets is None:
            return None
        cache, ledger = read.cache, read.cache.ledger
        known: dict[Any, Any] = ledger.facts.setdefault("hip", {})
        turn = ledger.columns - ledger.step  # columns of prompts
        if known.get("turn", (None,))[0] != turn:
            known.clear()
            known["turn"] = turn, ledger.step - 1
        # A period's search is that of its first step: what all fitted then, no search has left out.
        period, age = divmod(ledger.step - 1 - known["turn"][1], self.refresh) if cache.in_columns else (-1, 0)
        n, H, window = read.key.shape[2], read.query.shape[1], self.window
        if n <= min(budgets) + window:
            return None
        assert cache.order is not None
        held = Held.of(cache.order, read.live, cache.in_columns)
        visible = torch.full((1, 1), n, device=read.key.device) if held.dead is None else n - held.dead
        visible = visible.expand(len(budgets), -1).repeat_interleave(H // visible.shape[1], 1)[..., None]  # (B, H, 1)
        k = torch.tensor(budgets, device=visible.device)[:, None, None]
        searchable = torch.where(visible - window <= k, visible, visible - age) - window
        blocks, listed = self._blocks(read, held, budgets, known, period)
        every = searchable <= k
        at = torch.arange(blocks.shape[-1], device=visible.device)
        blocks = torch.where(every, at, blocks)
        listed = torch.where(every, at < (searchable + self.block_k - 1) // self.block_k, listed)

        inside = torch.arange(self.block_k, device=visible.device)
        chosen = (blocks[..., None] * self.block_k + inside).flatten(-2)  # (B, H, n b_k)
        first = torch.arange(self.sinks, device=visible.device).expand(*visible.shape[:2], -1)
        far = torch.cat([first, chosen], -1)
        counts = torch.cat([first >= 0, listed.repeat_interleave(self.block_k, -1) & (chosen >= self.sinks)], -1)
        near = torch.arange(n - window, n, device=visible.device).expand(*visible.shape[:2], -1)
        dead = n - visible
        index = torch.cat([(far + dead).clamp(max=n - 1), near.clamp(min=0)], -1)
        return held.slot(index), torch.cat([counts & (far < visible - window), near >= dead], -1)

    def _blocks(
        self, read: Read, held: Held, budgets: list[int], known: dict[Any, Any], period: int
    ) -> tuple[Tensor, Tensor]:
        """Blocks (B, H, n) that this period's steps read, and which of them are chosen: searched once."""
        mine: tuple[int, Tensor, Tensor] | None = known.get(read.layer)
        if mine is not None and mine[0] == period >= 0:
            return mine[1:]
        n, key = read.key.shape[2], held.arrange(read.key)
        dead = held.dead
        visible = torch.full((1, 1, 1), n, device=key.device) if dead is None else (n - dead)[..., None]
        found = []
        for b, k in enumerate(budgets[:1] if len(set(budgets)) == 1 else budgets):
            own = slice(None) if len(set(budgets)) == 1 else slice(b, b + 1)
            found.append(
                search(
                    read.query[own, :, None], key[own], visible if dead is None else visible[own], n, budget=k,
                    block=self.block_k, window=self.window, representative=self.representative,
                    dead=None if dead is None else dead[own],
                )
            )  # fmt: skip
        width = max(blocks.shape[-1] for blocks, _ in found)
        at = torch.arange(width, device=key.device)
        blocks = torch.cat([pad(blocks, (0, width - blocks.shape[-1])) for blocks, _ in found])[:, :, 0]
        listed = torch.cat([at < count[..., None] for _, count in found])[:, :, 0]
        known[read.layer] = (period, blocks, listed)
        return blocks, listed
