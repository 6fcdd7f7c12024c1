"""JRT: a model that must choose what to keep before it sees the question reads twice, or in both directions.

    prompt     Q D D Q instead of D Q: at the second reading the model knows the question and the whole context
    phi(z)     [1, z / f^(1/4), vec(z z^T) / (sqrt 2 sqrt f)]     phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt f
    y_i        (sum_{j<=i} w_ij v_j + sum_{j<=M} we_ij ve_j) / (sum_{j<=i} w_ij + sum_{j<=M} we_ij + 1e-12)
               w_ij = phi(q_i) . phi(k_j),  we_ij = phi(q_i) . phi(ke_j)     ke, ve: own projections of the prefix
    state      S = sum phi(k_j)^T v_j + sum_{j<=M} phi(ke_j)^T ve_j, z the same sum of phi; y = phi(q) S / (phi(q) . z)
    loss       next token behind the prefix of M tokens + 0.25 masked tokens of the prefix (15 %, the token itself)

Prefix tokens count twice, on purpose: each sees the whole prefix through (ke, ve) and its past through (k, v). The
state is as large as a causal model's.
"Just read twice: closing the recall gap for recurrent language models", arXiv 2407.05483.
The official "twice" prompts also put the question first, while their baseline is D Q: the gain reported for them mixes
both, so they are two switches here. Where the official code differs: it zeroes k and ke at padding before phi, and
phi(0) = [1, 0, ...], so pads leak into both sums; here phi itself is zero there. It pads prompts on the left to M
tokens, which changes nothing then. It counts the prefix in columns, here it is the first M real tokens. It works in the
model's precision, here the sums are float32 (half precision loses the small terms). Its reconstruction drops targets
with id 0. One flaw is left as it is: the loss never asks the prefix's last position for the next token, and yet the
answer to a prompt of exactly M tokens begins there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, cross_entropy, pad, scaled_dot_product_attention, silu

from seqwise.core.errors import PromptError
from seqwise.core.method import Method, param
from seqwise.core.segments import CONTEXT, QUESTION, Segments

EPS = 1e-12
_CHUNK = 128  # rows whose mutual weights are formed at once


# A. the prompt


def question_prompt(
    context: str, question: str, *, repeats: int = 2, question_first: bool = True, intro: str | None = None
) -> str:
    """The official prompt of question answering: "INTRO D.\\nD. QUESTION"; without both switches "D. QUESTION".

    intro: what stands first instead of the question. The context's own outer blanks and full stops are cut off before
    it gets its one full stop.
    """
    text = f"{context.strip().strip('.').strip()}."
    return _joined(text, question.strip(), question.strip() if intro is None else intro, repeats, question_first)


def extraction_prompt(context: str, key: str, *, repeats: int = 2, question_first: bool = True) -> str:
    """The official prompt of extraction: "Information about KEY. D\\nD KEY:"; without both switches "D KEY:"."""
    return _joined(context.strip(), f"{key}:", f"Information about {key}.", repeats, question_first)


def repeated_ids(
    context: Tensor, question: Tensor, *, repeats: int = 2, question_first: bool = True, separator: Tensor | None = None
) -> Tensor:
    """The prompt as token ids: [question] context ... context question, with `separator` wherever two pieces meet.

    context: (n,), question: (m,), separator: (s,) or None. Returns a 1-D tensor of the same dtype.
    """
    _check_repeats(repeats)
    pieces = [question] * question_first + [context] * repeats + [question]
    if separator is not None:
        pieces = [piece for part in pieces for piece in (separator, part)][1:]
    return torch.cat(pieces)


def reading_order(
    part: Tensor, *, repeats: int = 2, question_first: bool = True, max_context: int | None = None
) -> Tensor:
    """In what order the tokens of a prompt are read: indices into it, (k,).

    part: (n,), `core.segments.CONTEXT` or `QUESTION` per token, -1 for neither. The context, from its first to its last
    token and cut to its first `max_context`, is read `repeats` times. With question_first, a copy of the question goes
    before it, unless one stands there already. What lies between context and question goes between all repeated pieces;
    all other tokens stay where they are. Raises PromptError where there is no context or a question inside of it.
    """
    _check_repeats(repeats)
    n = part.shape[0]
    marked = (part == CONTEXT).nonzero()[:, 0]
    asked = (part == QUESTION).nonzero()[:, 0]
    if not len(marked):
        raise PromptError("the prompt marks no context; build it with seqwise.prepare (a part of type 'context')")
    start, stop = int(marked[0]), int(marked[-1]) + 1
    if bool(((asked > start) & (asked < stop)).any()):
        raise PromptError("the question lies inside the context; mark the pieces of one context as one part")
    every = torch.arange(n, device=part.device)
    context = every[start : stop if max_context is None else min(stop, start + max_context)]
    after = asked[asked >= stop]
    gap, question = every[:0], every[:0]
    if len(after):
        gap, question = every[stop : int(after[0])], every[int(after[0]) : int(after[-1]) + 1]
    first = [question, gap] if question_first and bool((asked >= stop).all()) else []
    return torch.cat([every[:start], *first, context, *[gap, context] * (repeats - 1), every[stop:]])


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """The official score: whether any of the answers is a part of the text, whatever the case."""
    return any(answer.lower() in text.lower() for answer in answers)


def _joined(context: str, question: str, intro: str, repeats: int, question_first: bool) -> str:
    _check_repeats(repeats)
    return f"{intro} " * question_first + "\n".join([context] * repeats) + f" {question}"


def _check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats} (times that the context is read)")


@dataclass(frozen=True)
class JustReadTwice(Method):
    """Repeats a prompt's context, with the question before it, in `generate`.

    repeats: times that the context is read. question_first: whether a copy of the question goes before it.
    max_context: tokens of the context that are read, its first ones; repeating doubles the length, and what has to be
    cut then is the context. The prompt must say what is context and question (`seqwise.prepare`).
    """

    repeats: int = param(2, ge=1, doc="times that the context is read")
    question_first: bool = True
    max_context: int | None = param(None, ge=1, doc="tokens of the context that are read")

    slots: ClassVar[tuple[str, ...]] = ("prompt",)

    def identity(self) -> Method:
        return replace(self, repeats=1, question_first=False, max_context=None)

    def facts(self) -> set[str]:
        return {"part"}

    def reword(self, ids: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
        index = reading_order(
            segments.part[0],
            repeats=self.repeats,
            question_first=self.question_first,
            max_context=self.max_context,
        )
        read = segments.take(index[None])
        # a set that is read again is another set of the same members
        sets = torch.where(read.set >= 0, read.set + _copy(index) * (int(segments.set.max()) + 1), -1)
        return ids[:, index.to(ids.device)], replace(read, set=sets)


def _copy(index: Tensor) -> Tensor:
    """How often each entry of index (k,) stood there before: (k,)."""
    order = index.argsort(stable=True)
    run = torch.arange(len(index), device=index.device)
    changed = index[order].diff(prepend=index.new_full((1,), -1)) != 0
    return torch.empty_like(index).scatter(0, order, run - torch.where(changed, run, 0).cummax(0).values)


# B. prefix linear attention


def feature_map(z: Tensor) -> Tensor:
    """phi(z) = [1, z / f^(1/4), vec(z z^T) / (sqrt 2 sqrt f)]: (..., f) -> (..., 1 + f + f^2), at least float32."""
    z = _wide(z)
    f = z.shape[-1]
    square = (z[..., :, None] * z[..., None, :]).flatten(-2) * (2 * f) ** -0.5
    return torch.cat([torch.ones_like(z[..., :1]), z * f**-0.25, square], -1)


def kernel(q: Tensor, k: Tensor) -> Tensor:
    """phi(q) . phi(k) without the features: q (..., n, f), k (..., m, f) -> 1 + s + s^2 / 2, (..., n, m)."""
    s = _wide(q) @ _wide(k).mT * q.shape[-1] ** -0.5
    return 1 + s + s.square() / 2


def prefix_state(ke: Tensor, ve: Tensor, prefix_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the prefix adds to the state: S = sum phi(ke_j)^T ve_j and z = sum phi(ke_j).

    ke: (B, H, M, f), ve: (B, H, M, dv). prefix_mask: bool (B, M), False where there is no prefix token.
    Returns S (B, H, F, dv) and z (B, H, F), F = 1 + f + f^2.
    """
    phi = feature_map(ke)
    if prefix_mask is not None:
        phi = phi * prefix_mask[:, None, :, None]
    return phi.mT @ _wide(ve), phi.sum(-2)


def read_rows(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor, mask: Tensor | None = None, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that read a state and their own past: y (B, H, n, dv), and the state (S, z) with them in it.

    q, k: (B, H, n, f), v: (B, H, n, dv), S: (B, H, F, dv), z: (B, H, F). mask: bool (B, n), False at padding.
    Rows are taken in chunks: O(n) memory, and no features of more than one chunk at a time.
    """
    rows = []
    real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if mask is None else mask
    for start in range(0, q.shape[2], _CHUNK):
        here = slice(start, start + _CHUNK)
        live = real[:, None, here]  # (B, 1, c)
        value = _wide(v[:, :, here])
        w = (kernel(q[:, :, here], k[:, :, here]) * live[:, :, None]).tril()  # (B, H, c, c)
        phi = feature_map(q[:, :, here])
        above = w @ value + phi @ S
        below = w.sum(-1) + (phi @ z[..., None])[..., 0]
        rows.append(above / (below + eps)[..., None])
        added = feature_map(k[:, :, here]) * live[..., None]
        S, z = S + added.mT @ value, z + added.sum(-2)
    return torch.cat(rows, 2).to(v), S, z


def prefix_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ke: Tensor,
    ve: Tensor,
    mask: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    eps: float = EPS,
) -> Tensor:
    """y of the formula above, all rows at once.

    q, k: (B, H, n, f), v: (B, H, n, dv), ke: (B, H, M, f), ve: (B, H, M, dv); M = 0 is causal linear attention.
    mask: bool (B, n), prefix_mask: bool (B, M), False at padding. Returns (B, H, n, dv) in v's dtype.
    """
    if mask is not None and prefix_mask is None:
        prefix_mask = mask[:, : ke.shape[2]]
    return read_rows(q, k, v, *prefix_state(ke, ve, prefix_mask), mask, eps)[0]


def linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    """One token: S += phi(k)^T v, z += phi(k), y = phi(q) S / (phi(q) . z + eps).

    q, k: (B, H, f), v: (B, H, dv). Returns y (B, H, dv) and the new state; what was passed in is left as it was.
    """
    phi_q, phi_k = feature_map(q), feature_map(k)
    S = S + phi_k[..., None] * _wide(v)[..., None, :]
    z = z + phi_k
    y = (phi_q[..., None, :] @ S)[..., 0, :] / ((phi_q * z).sum(-1, keepdim=True) + eps)
    return y.to(v), S, z


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# C. the model

State = tuple[Tensor, ...]
Kind = Literal["linear", "window", "conv"]


def default_kinds(layers: int) -> tuple[Kind, ...]:
    """Mixers of the paper's stack: linear in layers 1, 6, 11, ..., window in 2, 7, 12, ..., conv elsewhere."""
    kinds: dict[int, Kind] = {1: "linear", 2: "window"}
    return tuple(kinds.get(layer % 5, "conv") for layer in range(layers))


class PrefixLinearAttention(nn.Module):
    """Linear attention that reads the first `prefix` tokens in both directions; a causal layer with prefix = 0.

    d_model: width; heads: H, a divisor of it; feature_dim: f, width of queries and keys. No biases, no positions.
    """

    def __init__(self, d_model: int, heads: int, *, prefix: int, feature_dim: int = 16) -> None:
        super().__init__()
        _check_sizes(d_model=d_model, heads=heads, feature_dim=feature_dim)
        if d_model % heads:
            raise ValueError(f"heads must divide d_model ({d_model}), got {heads}")
        if prefix < 0:
            raise ValueError(f"prefix must be >= 0, got {prefix} (tokens read in both directions)")
        self.heads, self.prefix = heads, prefix
        self.Wq, self.Wk = (nn.Linear(d_model, heads * feature_dim, bias=False) for _ in range(2))
        self.Wv = nn.Linear(d_model, d_model, bias=False)
        if prefix:
            self.Wke = nn.Linear(d_model, heads * feature_dim, bias=False)
            self.Wve = nn.Linear(d_model, d_model, bias=False)
        self.Wo = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, state: State | None = None) -> tuple[Tensor, State]:
        """x: (B, n, d), mask: bool (B, n), False at padding. state: None at the start of a sequence, else what the last
        call returned, and then x goes on causally. Returns y (B, n, d) and the state (S, z)."""
        q, k, v = (self._heads(W(x)) for W in (self.Wq, self.Wk, self.Wv))
        S, z = self._prefix(x, mask, q.shape[-1]) if state is None else state
        y, S, z = read_rows(q, k, v, S, z, mask)
        return self.Wo(y.transpose(1, 2).flatten(2)), (S, z)

    def _prefix(self, x: Tensor, mask: Tensor | None, f: int) -> tuple[Tensor, Tensor]:
        B, n = x.shape[:2]
        if not self.prefix:
            S = _wide(x.new_zeros(B, self.heads, 1 + f + f * f, x.shape[-1] // self.heads))
            return S, S[..., 0]
        if mask is None:
            inside, M = None, min(self.prefix, n)
        else:  # the first real tokens, wherever padding has moved them
            inside = mask & (mask.cumsum(-1) <= self.prefix)
            M = n if n <= self.prefix else int((inside * torch.arange(1, n + 1, device=x.device)).max())
            inside = inside[:, :M]
        xe = x[:, :M]
        return prefix_state(self._heads(self.Wke(xe)), self._heads(self.Wve(xe)), inside)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class SlidingWindowAttention(nn.Module):
    """Causal softmax attention to the last `window` tokens, the own one included, with RoPE over the whole head."""

    def __init__(self, d_model: int, heads: int, *, window: int = 256, theta: float = 10_000.0) -> None:
        super().__init__()
        _check_sizes(d_model=d_model, heads=heads, window=window)
        if d_model % (2 * heads):
            raise ValueError(f"heads must divide d_model ({d_model}) into even widths, got {heads}")
        self.heads, self.window, self.theta = heads, window, theta
        self.Wqkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.Wo = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, state: State | None = None) -> tuple[Tensor, State]:
        """Like `PrefixLinearAttention.forward`; the state holds keys and values of the last window - 1 tokens (B, H,
        w - 1, D), which of them are real (B, w - 1), and how many real tokens there were (B,)."""
        B, n, d = x.shape
        w, D = self.window, d // self.heads
        real = torch.ones(B, n, dtype=torch.bool, device=x.device) if mask is None else mask
        if state is None:
            none = x.new_zeros(B, self.heads, w - 1, D)
            state = (none, none, real.new_zeros(B, w - 1), torch.zeros(B, dtype=torch.long, device=x.device))
        past_k, past_v, past_real, seen = state
        q, k, v = self.Wqkv(x).unflatten(-1, (3, self.heads, D)).permute(2, 0, 3, 1, 4)  # (B, H, n, D) each
        positions = seen[:, None] + (real.cumsum(-1) - 1).clamp(min=0)  # (B, n)
        q, k = _rotated(q, positions, self.theta), _rotated(k, positions, self.theta)
        k, v, real = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2), torch.cat([past_real, real], 1)
        y = _banded(q, k, v, real, w)
        state = (k[:, :, n:], v[:, :, n:], real[:, n:], seen + real[:, w - 1 :].sum(-1))
        return self.Wo(y.transpose(1, 2).flatten(2)), state


class GatedConvolution(nn.Module):
    """Wo (conv(Wx x) * silu(Wg x)): a causal depthwise convolution over `width` tokens with a gate."""

    def __init__(self, d_model: int, *, width: int = 3) -> None:
        super().__init__()
        _check_sizes(d_model=d_model, width=width)
        self.Wx = nn.Linear(d_model, d_model, bias=False)
        self.Wg = nn.Linear(d_model, d_model, bias=False)
        self.taps = nn.Parameter(torch.randn(d_model, 1, width) * width**-0.5)
        self.Wo = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, state: State | None = None) -> tuple[Tensor, State]:
        """Like `PrefixLinearAttention.forward`; the state holds the last width - 1 inputs of the convolution."""
        u = self.Wx(x)
        if mask is not None:
            u = u * mask[..., None]
        before = self.taps.shape[-1] - 1
        past = u.new_zeros(u.shape[0], before, u.shape[-1]) if state is None else state[0]
        u = torch.cat([past, u], 1)
        y = conv1d(u.mT, self.taps, groups=u.shape[-1]).mT
        return self.Wo(y * silu(self.Wg(x))), (u[:, u.shape[1] - before :],)


class _Block(nn.Module):
    def __init__(self, mixer: nn.Module, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.norms = nn.ModuleList([nn.RMSNorm(d_model) for _ in range(2)])
        self.up = nn.Linear(d_model, 2 * d_mlp, bias=False)
        self.down = nn.Linear(d_mlp, d_model, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, state: State | None) -> tuple[Tensor, State]:
        y, state = self.mixer(self.norms[0](x), mask, state)
        x = x + y
        gate, value = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(silu(gate) * value), state


class JRTModel(nn.Module):
    """The recurrent language model: blocks of linear attention, sliding windows and short convolutions.

    vocabulary, d_model, heads: sizes. prefix: tokens that linear layers read in both directions, 0 for a causal model.
    kinds: the mixer of each layer, a tuple or the number of layers of the paper's stack (`default_kinds`). feature_dim,
    window, width: of the mixers. d_mlp: inner width of the SwiGLU, None for 2 d_model. The paper's model of 360M: 26
    layers, d_model 1024, 16 heads, prefix 1024; its training: AdamW (betas 0.9, 0.95, weight decay 0.1), windows of
    2048 tokens, 60,000 steps, the rate from 8e-4 to 8e-5 along a cosine. Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        vocabulary: int,
        d_model: int,
        heads: int,
        *,
        kinds: Sequence[Kind] | int,
        prefix: int,
        feature_dim: int = 16,
        window: int = 256,
        width: int = 3,
        d_mlp: int | None = None,
    ) -> None:
        super().__init__()
        kinds = default_kinds(kinds) if isinstance(kinds, int) else tuple(kinds)
        _check_sizes(vocabulary=vocabulary, layers=len(kinds))

        def mixer(kind: str) -> nn.Module:
            if kind == "linear":
                return PrefixLinearAttention(d_model, heads, prefix=prefix, feature_dim=feature_dim)
            if kind == "window":
                return SlidingWindowAttention(d_model, heads, window=window)
            if kind == "conv":
                return GatedConvolution(d_model, width=width)
            raise ValueError(f"kinds must be among 'linear', 'window', 'conv', got {kind!r}")

        self.embed = nn.Embedding(vocabulary, d_model)
        self.blocks = nn.ModuleList([_Block(mixer(kind), d_model, d_mlp or 2 * d_model) for kind in kinds])
        self.norm = nn.RMSNorm(d_model)
        self.head = nn.Linear(d_model, vocabulary, bias=False)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, states: Sequence[State] | None = None
    ) -> tuple[Tensor, list[State]]:
        """ids: (B, n), mask: (B, n), 0 at padding. states: None for a sequence from its start, else those of the last
        call; tokens then go on causally. Returns logits (B, n, vocabulary) and the states."""
        real = None if mask is None else mask.bool()
        x = self.embed(ids)
        after = []
        for i, block in enumerate(self.blocks):
            x, state = block(x, real, None if states is None else states[i])
            after.append(state)
        return self.head(self.norm(x)), after

    @torch.no_grad()
    def generate(self, ids: Tensor, mask: Tensor | None = None, max_new_tokens: int = 48) -> Tensor:
        """Greedy continuation of left-padded prompts: (B, n) -> (B, n + max_new_tokens)."""
        logits, states = self(ids, mask)
        for step in range(max_new_tokens):
            new = logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], 1)
            if step + 1 < max_new_tokens:
                logits, states = self(new, states=states)
        return ids


def _rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE, halves of a head paired: x (B, H, n, D), positions (B, n)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, n, half)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _banded(q: Tensor, k: Tensor, v: Tensor, real: Tensor, w: int) -> Tensor:
    """Attention of n queries to w keys each, the last of which is their own, in blocks: O(n w) memory.

    q: (B, H, n, D), k, v: (B, H, w - 1 + n, D), real: bool (B, w - 1 + n). Returns (B, H, n, D).
    """
    n = q.shape[2]
    c = min(w, n)
    extra = -n % c
    q, k, v = (pad(x, (0, 0, 0, extra)) for x in (q, k, v))
    real = pad(real, (0, extra))
    q = q.unflatten(2, (-1, c))  # (B, H, blocks, c, D)
    k, v = (x.unfold(2, w - 1 + c, c).mT for x in (k, v))  # (B, H, blocks, w - 1 + c, D)
    i = torch.arange(c, device=q.device)[:, None]
    j = torch.arange(w - 1 + c, device=q.device)
    own = j == i + w - 1  # always seen, so that padding rows have something to average
    band = (j >= i) & (j <= i + w - 1)
    seen = (band & real.unfold(1, w - 1 + c, c)[:, None, :, None]) | own  # (B, 1, blocks, c, w - 1 + c)
    return scaled_dot_product_attention(q, k, v, attn_mask=seen).flatten(2, 3)[:, :, :n]


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be >= 1, got {size}")


# D. the loss


def training_example(
    tokens: Tensor, prefix: int, mask_id: int, *, generator: torch.Generator, probability: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Inputs and labels of text windows: tokens (B, N + 1) -> two (B, N).

    Of the first `prefix` inputs a share `probability` is replaced by `mask_id`, always by it; the label there is the
    token itself, and -100 elsewhere in the prefix. Behind it the label is the next token. Raises ValueError.
    """
    if not 0 <= prefix < tokens.shape[1]:
        raise ValueError(f"prefix must be in [0, {tokens.shape[1] - 1}], got {prefix} (tokens read in both directions)")
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability} (of a prefix token to be masked)")
    draws = torch.rand(len(tokens), prefix, generator=generator, device=generator.device).to(tokens.device)
    masked = draws < probability
    inputs = torch.cat([tokens[:, :prefix].masked_fill(masked, mask_id), tokens[:, prefix:-1]], 1)
    labels = torch.cat([tokens[:, :prefix].masked_fill(~masked, -100), tokens[:, prefix + 1 :]], 1)
    return inputs, labels


def jrt_loss(logits: Tensor, labels: Tensor, prefix: int, weight: float = 0.25) -> Tensor:
    """CE of the labels behind the prefix + weight * CE of those in it, each a mean over labels other than -100.

    logits: (B, N, V), labels: (B, N), both as `training_example` lays them out; nothing is shifted here. A part without
    labels adds 0.
    """
    after = _mean_loss(logits[:, prefix:], labels[:, prefix:])
    return after + weight * _mean_loss(logits[:, :prefix], labels[:, :prefix])


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    total = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


# F. set disjointness


def disjoint_sets(
    count: int, first: int, second: int, *, generator: torch.Generator, vocabulary: int = 2048
) -> tuple[Tensor, Tensor]:
    """Which token do two lists share? ids (count, first + second + 3): [1] list [2] list [3]; labels of that shape.

    Ids from 4 on are cut into two random halves, one for each list, without repetition; then one token of the first
    list takes a random place of the second. It is the label at [3]; all others are -100. Raises ValueError where a list
    is longer than its half.
    """
    half = vocabulary // 2
    for name, length, room in (("first", first, min(half, vocabulary - 4)), ("second", second, vocabulary - 4 - half)):
        if not 1 <= length <= room:
            raise ValueError(f"{name} must be in [1, {room}] with {vocabulary} ids, got {length} (tokens of the list)")
    order = torch.rand(count, vocabulary - 4, generator=generator).argsort(-1) + 4
    a, b = order[:, :first], order[:, half : half + second].clone()
    shared = a.gather(1, torch.randint(first, (count, 1), generator=generator))  # (count, 1)
    b.scatter_(1, torch.randint(second, (count, 1), generator=generator), shared)
    marks = torch.tensor([1, 2, 3]).expand(count, -1)
    ids = torch.cat([marks[:, :1], a, marks[:, 1:2], b, marks[:, 2:]], 1)
    labels = torch.full_like(ids, -100)
    labels[:, -1:] = shared
    return ids, labels
