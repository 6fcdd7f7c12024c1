"""ACT: lower the attention that later sinks receive and give it back to the other tokens, in chosen heads.

    a_j    = sum_{i >= j} A[i, j] / (n - j)                 mean attention over the queries that see j
    S      = {j > 0 : a_j > tau}                            tau = 0.1 (code) or alpha / N, alpha = 5 (paper)
    A'[i, j] = beta A[i, j]                                 j in S, beta = 0.4
    A'[i, j] = A[i, j] + freed_i A[i, j] / sum_{u not in S} A[i, u]     else, token 0 included
    freed_i  = (1 - beta) sum_{j in S} A[i, j]

Rows keep their sum. Token 0, the first real token, is a useful sink, never in S; its row stays one-hot.
Layers 0, 1 and (Llama) the last are left alone; heads are those whose accuracy rises when calibrated alone.
A step of decoding calibrates its one row with the S of the prompt, or with running sums and counts per key.
"Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through
Attention Calibration", arXiv 2406.15765.
The official code drops the first element it finds above tau instead of token 0, which spares the first later
sink whenever token 0 is below tau, and mishandles single rows; both are corrected here.
"""

import math

import torch
from torch import Tensor


def column_mean(A: Tensor, live: Tensor | None = None, window: int | None = None) -> Tensor:
    """Mean attention that each key receives from the queries that see it, in fp32.

    A: (..., n, n), causal attention probabilities. live: bool, broadcastable to (..., n), False at padding;
    padded queries and keys count for nothing. window: length of a sliding window, the query included.
    Returns (..., n), 0 at padding.
    """
    n = A.shape[-1]
    i = torch.arange(n, device=A.device)
    sees = i[:, None] >= i  # (n, n)
    if window is not None:
        sees = sees & (i[:, None] - i < window)
    if live is not None:
        sees = sees & live[..., :, None] & live[..., None, :]  # (..., n, n)
    colsum = A.float().masked_fill(~sees, 0.0).sum(-2)  # (..., n)
    return mean_from_sums(colsum, sees.sum(-2))


def mean_from_sums(colsum: Tensor, count: Tensor) -> Tensor:
    """The same from streamed sums: colsum (..., n) over count (..., n) queries; 0 where nobody looked."""
    return colsum.float() / count.clamp(min=1) * (count > 0)


def threshold(rule: str, N: int | Tensor) -> float | Tensor:
    """tau of "absolute:0.1" (0.1 at any length) or "relative:5" (5 / N, N the number of real tokens).

    Where N is a tensor (B,), a relative tau is one too. Raises ValueError for any other rule.
    """
    kind, _, number = rule.partition(":")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if kind not in ("absolute", "relative") or not 0 < value < math.inf:
        raise ValueError(f"threshold must be 'absolute:x' or 'relative:x' with x > 0, got {rule!r}")
    return value if kind == "absolute" else value / N


def sink_set(a: Tensor, tau: float | Tensor, live: Tensor | None = None) -> Tensor:
    """S as bool (..., n): keys with a > tau, without padding and without the first real token.

    a: (..., n), column means. tau: a number or a tensor broadcastable to (..., n). live as in `column_mean`.
    """
    if live is None:
        live = torch.ones(a.shape[-1], dtype=torch.bool, device=a.device)
    return (a > tau) & live & (live.cumsum(-1) > 1)


def calibrate(A: Tensor, S: Tensor, beta: float = 0.4, live: Tensor | None = None) -> Tensor:
    """Calibrated rows: any block of rows of the map, one row of a decode step included.

    A: (..., r, n), probabilities of r queries. S: bool, broadcastable to (..., n). live as in `column_mean`:
    padding gives and receives nothing. A row whose whole mass lies on S stays as it is, for nobody could
    receive it. Computed in fp32, returned in A's dtype.
    """
    _check_beta(beta)
    if live is None:
        live = torch.ones(A.shape[-1], dtype=torch.bool, device=A.device)
    sinks, others = (S & live)[..., None, :], (~S & live)[..., None, :]  # (..., 1, n)
    p = A.float()
    freed = (1 - beta) * (p * sinks).sum(-1, keepdim=True)  # (..., r, 1)
    rest = (p * others).sum(-1, keepdim=True)
    received = freed * (p * others / rest)  # p / rest first: it cannot overflow
    calibrated = torch.where(sinks, beta * p, p + received)
    return torch.where(rest > 0, calibrated, p).to(A.dtype)


def calibrate_map(
    A: Tensor,
    beta: float = 0.4,
    rule: str = "absolute:0.1",
    live: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """The whole of ACT on the causal maps A (..., n, n) of one prompt each; returns the same shape and dtype.

    live and window as in `column_mean`. The first real token's row becomes one-hot on itself; rows of
    padding are returned as they came.
    """
    n = A.shape[-1]
    if live is None:
        live = torch.ones(n, dtype=torch.bool, device=A.device)
    tau = threshold(rule, live.sum(-1, keepdim=True))
    S = sink_set(column_mean(A, live, window), tau, live)  # (..., n)
    first = live & (live.cumsum(-1) == 1)  # (..., n), token 0
    one_hot = first[..., None, :].to(A.dtype).expand_as(A)
    calibrated = torch.where(first[..., :, None], one_hot, calibrate(A, S, beta, live))
    return torch.where(live[..., :, None], calibrated, A)


def calibrated_layers(layers: int, spare_last: bool = True) -> range:
    """Layers where heads may be calibrated: neither 0 nor 1, nor (spare_last, as for Llama) the last."""
    return range(2, max(2, layers - spare_last))


def accepted_heads(accuracy: Tensor, baseline: float, margin: float = 0.0) -> tuple[tuple[int, int], ...]:
    """(layer, head) pairs that, calibrated alone, beat the plain model's accuracy by more than margin.

    accuracy: (layers, heads), averaged over the data sets; NaN where a head was not tried. Ascending.
    """
    return tuple((int(layer), int(head)) for layer, head in (accuracy - baseline > margin).nonzero())


def _check_beta(beta: float) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta} (share of a sink's attention that stays)")
