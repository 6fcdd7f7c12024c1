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

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqwise.core.anatomy import Anatomy
from seqwise.core.engine import Block
from seqwise.core.errors import UnsupportedModel, UsageError
from seqwise.core.method import Method, param


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


@dataclass(frozen=True)
class AttentionCalibration(Method):
    """ACT: lowers later sinks in chosen heads of a prompt's attention, and in the steps that follow.

    beta: share of a sink's attention that stays. threshold: see the function of this name. heads: (layer, head) pairs,
    0-based, as `fit` finds them; None calibrates every head of the calibrated layers. fingerprint, seed, data: of the
    model, the order of the search and the data that `fit` used; another model is refused.
    """

    beta: float = param(0.4, ge=0, le=1, doc="share of a sink's attention that stays")
    threshold: str = "absolute:0.1"
    heads: tuple[tuple[int, int], ...] | None = None
    fingerprint: str = ""
    seed: int = param(0, ge=0)
    data: str = ""

    slots: ClassVar[tuple[str, ...]] = ("attention.probs",)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            threshold(self.threshold, 1)
        except ValueError as error:
            raise ValueError(f"AttentionCalibration.{error}") from None

    def identity(self) -> Method:
        return replace(self, beta=1.0)

    def check(self, anatomy: Anatomy) -> None:
        if self.fingerprint and self.fingerprint != anatomy.fingerprint:
            raise UnsupportedModel(
                f"AttentionCalibration was fitted on another model ({self.fingerprint}, this one is "
                f"{anatomy.fingerprint}); run fit on this model"
            )
        for layer, head in self.heads or ():
            if not (0 <= layer < len(anatomy.layers) and 0 <= head < anatomy.heads):
                raise UnsupportedModel(
                    f"AttentionCalibration.heads must be in [0, {len(anatomy.layers) - 1}] x [0, {anatomy.heads - 1}], "
                    f"got {(layer, head)}"
                )

    def rewritten_heads(self, layer: int, anatomy: Anatomy) -> tuple[int, ...]:
        if self.heads is not None:
            return tuple(head for at, head in self.heads if at == layer)
        spare_last = getattr(anatomy.config, "model_type", "") != "mistral"
        return tuple(range(anatomy.heads)) if layer in calibrated_layers(len(anatomy.layers), spare_last) else ()

    def prepare(self, block: Block) -> None:
        """S from the prompt's running column sums; steps keep it, and what they append is no sink."""
        if block.phase != "prefill":
            return
        found = block.statistics(("sum", "count"))  # (B, h, n) each
        H = block.query_heads
        at = torch.tensor(block.heads, device=found["sum"].device)
        for name, value in (("act_sum", found["sum"]), ("act_count", found["count"])):
            total = block.state.get(name)
            if total is None:
                total = torch.zeros(value.shape[0], H, value.shape[2], device=value.device)
            block.state[name] = total.index_copy(1, at, total.index_select(1, at) + value)
        a = mean_from_sums(block.state["act_sum"][:, at], block.state["act_count"][:, at])
        tau = threshold(self.threshold, block.lengths[:, None, None])
        sinks = (a > tau) & block.live & (block.order > 0)  # never the first real token
        marked = torch.zeros_like(block.state["act_sum"])
        block.state["act_sink"] = marked.index_copy(1, at, sinks.float())

    def rewrite(self, probabilities: Tensor, block: Block) -> Tensor:
        if "act_sink" not in block.state:
            return probabilities
        at = torch.tensor(block.heads, device=probabilities.device)
        S = block.state["act_sink"].index_select(1, at) > 0
        return calibrate(probabilities, S, self.beta, block.live)

    def fit(
        self,
        model: nn.Module,
        data: Sequence[dict[str, Any]],
        *,
        seed: int = 0,
        budget_s: float | None = None,
        margin: float = 0.0,
        resume: str | Path | None = None,
    ) -> AttentionCalibration:
        """Keeps the heads whose accuracy rises by more than `margin` when each is calibrated alone.

        data: labelled items, each {"input_ids": (n,) long, "choices": token ids, "label": index of the right one}; the
        choice of the highest next-token probability counts. seed: order in which heads are tried. budget_s: seconds
        after which no further head is begun; untried heads are left out. resume: a JSON file that keeps the accuracies
        found so far, of this model and data only.
        """
        if not data:
            raise UsageError("data must hold at least one labelled item, got none")
        anatomy = Anatomy.of(model)
        digest = hashlib.sha256(json.dumps([_plain(item) for item in data]).encode()).hexdigest()[:16]
        key = f"{anatomy.fingerprint} {digest} beta={self.beta} {self.threshold}"
        known = _known(resume, key)
        pairs = [
            (layer, head)
            for layer in range(len(anatomy.layers))
            for head in replace(self, heads=None).rewritten_heads(layer, anatomy)
        ]
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
        baseline = _accuracy(model, data)
        start = time.monotonic()
        for at in order:
            name = "{}.{}".format(*pairs[at])
            if name in known:
                continue
            if budget_s is not None and time.monotonic() - start > budget_s:
                break
            with replace(self, heads=(pairs[at],), fingerprint="").on(model):
                known[name] = _accuracy(model, data)
            if resume is not None:
                part = Path(f"{resume}.part")  # replaced whole, so that a search may be stopped at any time
                part.write_text(json.dumps({"key": key, "accuracy": known}))
                os.replace(part, resume)
        accuracy = torch.full((len(anatomy.layers), anatomy.heads), math.nan)
        for name, value in known.items():
            layer, head = map(int, name.split("."))
            accuracy[layer, head] = value
        heads = accepted_heads(accuracy, baseline, margin)
        return replace(self, heads=heads, fingerprint=anatomy.fingerprint, seed=seed, data=digest)


def _plain(item: dict[str, Any]) -> list[Any]:
    return [item["input_ids"].tolist(), list(map(int, item["choices"])), int(item["label"])]


def _known(resume: str | Path | None, key: str) -> dict[str, float]:
    if resume is None or not Path(resume).exists():
        return {}
    try:
        saved = json.loads(Path(resume).read_text())
    except ValueError:
        saved = None
    if not isinstance(saved, dict) or saved.get("key") != key:
        raise UsageError(f"{resume} holds a search on another model, data or setting; remove it or name another file")
    return dict(saved["accuracy"])


@torch.no_grad()
def _accuracy(model: nn.Module, data: Sequence[dict[str, Any]]) -> float:
    """Share of items whose right choice has the highest next-token probability."""
    device = next(model.parameters()).device
    right = 0
    for item in data:
        logits = model(item["input_ids"][None].to(device), use_cache=False).logits[0, -1]
        choices = torch.as_tensor(item["choices"], device=device)
        right += int(logits[choices].argmax()) == int(item["label"])
    return right / len(data)
