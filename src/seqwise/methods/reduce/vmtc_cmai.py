"""VMTC: merge an image's redundant patches by clustering. CMAI: hide from text what matters least of the image.

VMTC, on the N patches of a tile in front of the projector:

    IPS_j     = mean_h A[h, CLS, j] of the feature layer; the mean over all rows in a tower without CLS
    primary   the P patches of largest IPS; the R = N - P others are redundant
    clusters  spherical k-means of the redundant ones, on u = x / |x|: K centres, at first the redundant patches number
              floor(c R / K), c = 0 .. K - 1; 10 times: join the centre of largest cosine (ties: the first), then
              centre = normalised mean of its u, an empty cluster keeps its own; at last join once more
    token     mean of a cluster's x, in place of its earliest patch

CMAI, in a layer, A being its attention averaged over heads, T the text rows behind the image, V the image's columns:

    F = A_TT A_TV                focus: what the text that a row reads has read of the image
    logits[i, j] = -inf          in all heads, for the floor(rho |V|) columns j of lowest F[i, :], or those with
                                 F[i, j] < tau mean_j F[i, j]
    softmax again                text columns and the other columns gain what these lose

A step of decoding is one more row of T: the A_TV of all rows so far is kept, as it was before inhibition.

"Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image Redundancy", arXiv 2411.15453.
No official code; of the paper, what abstract and reviews tell: an importance score that splits patches into primary and
redundant, k-means under cosine similarity, text-to-image attention aggregated by text-to-text attention, inhibition of
low scores. Layers, shares, initial centres, the order of tokens and that both happen in one layer are our reading.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot, pad

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import CacheError, UnsupportedModel
from seqwise.core.method import Method, budget_param, param
from seqwise.core.observe import masked_logits, normalised
from seqwise.core.run import Run
from seqwise.core.segments import Segments, by_order, look_up
from seqwise.core.select import budget_count, compact, keep_best, top_k
from seqwise.core.towers import Merged, Tower
from seqwise.core.views import Kernel
from seqwise.core.visible import Visible

Weights = Literal["mean", "ips"]

_ITERATIONS = 10
_BEFORE, _TEXT = -2, -1  # marks of CMAI: text before the first image, text behind it; images are counted from 0
_ROWS = 128  # rows whose attention is written out at once


class Compressed(NamedTuple):
    """tokens: (k, d). place: (k,) ascending, the patch in whose place each is. member: (N,), which of the k each patch
    went into."""

    tokens: Tensor
    place: Tensor
    member: Tensor


def importance(received: Tensor, specials: int = 1) -> Tensor:
    """IPS: attention that each patch receives, mean over heads, in float32.

    received: (..., h, specials + N), the CLS row of the feature layer's attention, `A[..., 0, :]`, or the sum over all
    rows. The first `specials` columns are no patches. Returns (..., N).
    """
    return received[..., specials:].float().mean(-2)


def spherical_kmeans(x: Tensor, K: int, iterations: int = _ITERATIONS) -> tuple[Tensor, Tensor]:
    """Clusters of x (R, d) under cosine similarity: (assignment (R,), centres (K, d) of length 1, float32).

    No luck is involved: centres begin at the rows floor(c R / K). A cluster may end up empty.

    Raises:
        ValueError: K is not in [1, R].
    """
    R = x.shape[0]
    if not 1 <= K <= R:
        raise ValueError(f"spherical_kmeans: K must be in [1, {R}], got {K}")
    u = normalize(x.float(), dim=-1)
    centres = u[torch.arange(K, device=x.device) * R // K]
    for _ in range(iterations):
        joined = one_hot((u @ centres.mT).argmax(-1), K).float()  # (R, K)
        full = joined.sum(0)[:, None] > 0
        centres = torch.where(full, normalize(joined.mT @ u, dim=-1), centres)
    return (u @ centres.mT).argmax(-1), centres


def compress(X: Tensor, ips: Tensor, P: int, K: int, weights: Weights = "mean") -> Compressed:
    """VMTC of one tile: the P primary patches as they are, and a token of each cluster of the others that is not empty.

    X: (N, d), ips: (N,). weights: how a cluster's patches are averaged, alike or by their IPS. K = 0 drops the others
    (their member is -1); of more clusters than others there are as many as others.

    Raises:
        ValueError: P or K is negative, or P is more than N.
    """
    N = X.shape[0]
    if K < 0 or not 0 <= P <= N:
        raise ValueError(f"compress: P must be in [0, {N}] and K >= 0, got P = {P}, K = {K}")
    primary = top_k(ips, P)
    redundant = torch.ones(N, dtype=torch.bool, device=X.device).index_fill(0, primary, False).nonzero()[:, 0]  # (R,)
    K = min(K, len(redundant))
    group = torch.full((N,), -1, device=X.device).index_copy(0, primary, primary)  # the patch where each one's token is
    tokens = X.clone()
    if K:
        assignment, _ = spherical_kmeans(X[redundant], K)
        joined = one_hot(assignment, K).float()  # (R, K)
        first = redundant[joined.argmax(0)]  # (K,), meaningless where empty
        weighted = joined * (ips[redundant, None].float() if weights == "ips" else 1.0)
        merged = weighted.mT @ X[redundant].float() / weighted.sum(0)[:, None].clamp(min=1e-30)  # (K, d)
        filled = joined.any(0)
        tokens[first[filled]] = merged[filled].to(X.dtype)
        group[redundant] = first[assignment]
    at = torch.arange(N, device=X.device)
    place = (group == at).nonzero()[:, 0]
    member = torch.where(group >= 0, torch.searchsorted(place, group.clamp(min=0)), -1)
    return Compressed(tokens[place], place, member)


def focus(A_TT: Tensor, A_TV: Tensor) -> Tensor:
    """F: text-to-image attention, aggregated by text-to-text attention.

    A_TT: (..., r, t) of r text rows to the t text tokens behind the image, their own included; A_TV: (..., t, v) of
    these t rows to the image. Averaged over heads, before inhibition. No row is normalised anew: (..., r, v).
    """
    return A_TT @ A_TV


def lowest(F: Tensor, rho: float = 0.5, columns: Tensor | None = None) -> Tensor:
    """The floor(rho |V|) columns of lowest focus in each row of F (..., v), as bool. Of equals the earlier ones stay.

    columns: (..., v) bool, the columns V of one image that the row sees; default all.
    """
    V = torch.ones_like(F, dtype=torch.bool) if columns is None else columns.expand_as(F)
    size = V.sum(-1)
    stay = size - (size.double() * rho + 1e-9).floor().long()
    kept = keep_best(F.reshape(-1, F.shape[-1]), V.reshape(-1, F.shape[-1]), stay.flatten())
    return V & ~kept.view(F.shape)


def below_mean(F: Tensor, tau: float, columns: Tensor | None = None) -> Tensor:
    """The columns with F < tau mean_V F in each row of F (..., v), as bool. columns: as in `lowest`."""
    V = torch.ones_like(F, dtype=torch.bool) if columns is None else columns.expand_as(F)
    mean = (F * V).sum(-1, keepdim=True) / V.sum(-1, keepdim=True).clamp(min=1)
    return V & (tau * mean > F)


def inhibit(logits: Tensor, hidden: Tensor) -> Tensor:
    """Probabilities of text rows whose logits (..., H, r, n) become -inf where hidden, in all heads: (..., 1, r, n)."""
    return normalised(logits.masked_fill(hidden, float("-inf")))


@dataclass(frozen=True)
class VMTC(Method):
    """Visual-modality token compression: keeps primary patches and merges the others into cluster tokens.

    budget: P + K, tokens of an image, split evenly over its tiles; or the share of each tile's. Clusters that end up
    empty make it fewer. clusters: K of them, None for a third; as many as the budget leave no primary patch. weights:
    how patches are averaged, alike or by their importance.
    """

    budget: int | float = budget_param(0.25, "visual tokens of an image, merged ones included")
    clusters: int | None = param(None, ge=0, doc="merged tokens among them, a third if not given")
    weights: Weights = "mean"

    slots: ClassVar[tuple[str, ...]] = ("input.rows",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters is not None and isinstance(self.budget, int) and self.clusters > self.budget:
            raise ValueError(f"VMTC.clusters must be <= budget ({self.budget}), got {self.clusters}")

    def identity(self) -> Method:
        return replace(self, budget=1.0)

    def needs(self) -> set[str]:
        return {"vision tower"}

    def check(self, anatomy: Anatomy) -> None:
        assert anatomy.vision is not None  # needs() asks for it
        if anatomy.vision.merge > 1 or not anatomy.vision.sized:
            raise UnsupportedModel(
                f"VMTC merges features of single patches in front of the projector, but {type(anatomy.model).__name__} "
                "makes visual tokens of several patches or of images of any size; use FoPru there"
            )

    def keep_input(self, tower: Tower) -> Tensor | Merged:
        N, tiles = tower.patches, tower.tiles.tolist()
        everything = torch.arange(N, device=tower.projected.device).expand(len(tiles), -1)
        sizes = [budget_count(b, N) if isinstance(b := self.budget, float) else max(1, b // t) for t in tiles]
        if min(sizes) >= N:
            return everything
        assert tower.features is not None  # check() asks for it
        X = tower.features[:, tower.specials :]  # (T, N, d)
        ips = importance(tower.received(rows="cls" if tower.specials else "all"), tower.specials)
        made = []
        for x, score, k, t in zip(X, ips, sizes, tiles, strict=True):
            K = k // 3 if self.clusters is None else min(self.clusters // t, k)
            # a tile within the budget stays as it is
            made.append(compress(x, score, k - K, K, self.weights) if k < N else compress(x, score, N, 0))
        width = max(len(one.place) for one in made)
        # a tile of fewer tokens says its last one again
        last = [torch.arange(width, device=X.device).clamp(max=len(one.place) - 1) for one in made]
        return Merged(
            torch.stack([one.place[at] for one, at in zip(made, last, strict=True)]),
            tower.project(torch.stack([one.tokens[at] for one, at in zip(made, last, strict=True)])),
            torch.stack([one.member for one in made]),
        )


@dataclass
class _Past:
    """What one layer's text rows have read of the images so far; positions are original ones, -1 for none."""

    columns: Tensor  # (B, v) positions of image tokens
    rows: Tensor  # (B, t) positions of text rows behind the first image
    table: Tensor  # (B, t, v) A_TV

    def grow(self, columns: Tensor, rows: Tensor) -> None:
        """Room for further columns (B, v') and rows (B, t'); earlier rows have not seen the columns."""
        self.columns, self.rows = torch.cat([self.columns, columns], 1), torch.cat([self.rows, rows], 1)
        self.table = pad(self.table, (0, columns.shape[1], 0, rows.shape[1]))

    def select(self, batch: Tensor) -> None:
        at = batch.to(self.table.device)
        self.columns, self.rows, self.table = (x.index_select(0, at) for x in (self.columns, self.rows, self.table))


class _Slots(NamedTuple):
    """Where tokens stand among n slots: slot (B, h, p), h being 1 where all heads hold the same; held: if they do."""

    slot: Tensor
    held: Tensor

    @classmethod
    def of(cls, positions: Tensor, visible: Visible) -> _Slots:
        """The tokens with these original positions (B, p)."""
        order = visible.order_k if visible.live_k is None else torch.where(visible.live_k, visible.order_k, -1)
        order, at = order.expand(positions.shape[0], -1, -1).sort(-1)  # (B, h, n)
        wanted = positions[:, None].expand(-1, order.shape[1], -1).contiguous()
        found = torch.searchsorted(order, wanted).clamp(max=order.shape[-1] - 1)
        return cls(at.gather(-1, found), (order.gather(-1, found) == wanted) & (wanted >= 0))

    def mean(self, A: Tensor) -> Tensor:
        """A (B, H, r, n) at these tokens, averaged over heads; 0 where a head does not hold one: (B, r, p)."""
        h = self.slot.shape[1]
        A = A.mean(1, keepdim=True) if h == 1 else A
        slot, held = (x.repeat_interleave(A.shape[1] // h, 1)[:, :, None] for x in self)
        return A.gather(-1, slot.expand(-1, -1, A.shape[2], -1)).masked_fill(~held, 0.0).mean(1)

    def spread(self, marked: Tensor, heads: int, n: int) -> Tensor:
        """Tokens marked (B, r, p) as slots (B, 1 or H, r, n) of each query head."""
        B, h, _ = self.slot.shape
        r = marked.shape[1]
        into = torch.where(self.held, self.slot, n)[:, :, None].expand(-1, -1, r, -1)
        slots = marked.new_zeros(B, h, r, n + 1).scatter(-1, into, marked[:, None].expand(-1, h, -1, -1))[..., :n]
        return slots if h == 1 else slots.repeat_interleave(heads // h, 1)


@dataclass(frozen=True)
class CMAI(Method):
    """Cross-modality attention inhibition: each text row behind an image sees only the part of it that matters most.

    rho: share of the image's tokens, of those left in the layer, that a row loses. threshold: tau, instead of rho: it
    loses those below tau times the image's mean focus. first: 1-based first layer that inhibits. source: "same", the
    focus of the layer itself, or "previous", that of the layer before. Images of a prompt are judged each by itself; T
    is all text behind the first. A context that was saved cannot be continued.
    """

    rho: float = param(0.5, ge=0, le=1, doc="share of an image's tokens hidden from a text row")
    threshold: float | None = param(None, ge=0, doc="share of the mean focus below which a token is hidden")
    first: int = param(3, ge=1, doc="1-based first layer that inhibits")
    source: Literal["same", "previous"] = "same"

    slots: ClassVar[tuple[str, ...]] = ("attention.kernel",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source == "previous" and self.first < 2:
            raise ValueError(f"CMAI.first must be >= 2 with source='previous', got {self.first}")

    def identity(self) -> Method:
        return replace(self, rho=0.0, threshold=None)

    def needs(self) -> set[str]:
        return {"vision tower"}

    def check(self, anatomy: Anatomy) -> None:
        if self.first > len(anatomy.layers):
            raise UnsupportedModel(
                f"CMAI.first must be <= {len(anatomy.layers)}, the decoder layers of "
                f"{type(anatomy.model).__name__}, got {self.first}"
            )

    def mark(self, segments: Segments, run: Run) -> dict[str, Tensor]:
        """cmai: a visual token's image, counted over all turns; -1 on text behind the first image, -2 before it."""
        assert run.engine.ledger is not None
        earlier = run.engine.ledger.facts.get("marks", {}).get("cmai")
        visual = segments.visual
        images = torch.zeros_like(segments.type[:, :1])  # (B, 1) of earlier turns
        if earlier is not None:
            images = earlier.amax(-1, keepdim=True).clamp(min=-1) + 1
        text = torch.where((visual.cumsum(-1) > 0) | (images > 0), _TEXT, _BEFORE)
        return {"cmai": torch.where(visual, images + segments.image.clamp(min=0), text)}

    def attend(self, kernel: Kernel) -> Tensor | None:
        acts = self.rho > 0 if self.threshold is None else self.threshold > 0
        begins = self.first - 1  # 0-based
        if not acts or kernel.layer < begins - (self.source == "previous") or "cmai" not in kernel.marks:
            return None
        past, index, live = self._noted(kernel)
        if not past.columns.shape[1] or not index.shape[1]:
            return None
        new = self._text_rows(kernel, past, index, live)  # (B, H, r, D)
        if kernel.layer < begins:
            return None
        q, n = kernel.query.shape[2], kernel.key.shape[2]
        kernel.pairs = index.shape[1] * n
        if q == 1 and kernel.phase == "decode":
            return new
        kernel.pairs += q * (n - q) + q * (q + 1) // 2
        out = kernel.plain()
        at = index[:, None, :, None].expand_as(new)
        return out.scatter(2, at, torch.where(live[:, None, :, None], new, out.gather(2, at)))

    def _noted(self, kernel: Kernel) -> tuple[_Past, Tensor, Tensor]:
        """The layer's past with room for this forward's tokens, and which of its rows are text behind an image: index
        (B, r), live (B, r)."""
        layers: dict[int, _Past] = kernel.facts.setdefault("cmai", {})
        B, _, q, _ = kernel.query.shape
        order = kernel.rows.expand(B, -1)  # (B, q)
        past = layers.get(kernel.layer)
        if past is None:
            if kernel.key.shape[2] > q and bool((kernel.marks["cmai"] >= 0).any()):
                raise CacheError(f"{self} needs what the prompt's text has read of the image; run the prompt again")
            past = layers[kernel.layer] = _Past(order[:, :0], order[:, :0], torch.zeros(B, 0, 0, device=order.device))
        if q == 1 and kernel.phase == "decode":
            past.grow(order[:, :0], order)
            return past, torch.zeros_like(order), order >= 0
        role = kernel.marked("cmai", order)
        image, there = compact((role >= 0) & (order >= 0))
        index, live = compact((role == _TEXT) & (order >= 0))
        past.grow(
            order.gather(1, image).masked_fill(~there, -1),
            order.gather(1, index).masked_fill(~live, -1),
        )
        return past, index, live

    def _text_rows(self, kernel: Kernel, past: _Past, index: Tensor, live: Tensor) -> Tensor:
        """Attention of the rows index (B, r), inhibited: (B, H, r, D); notes what they read of the images."""
        query, key, value, visible = kernel.query, kernel.key, kernel.value, kernel.visible
        (B, H, _, D), (_, Hkv, n, _), r = query.shape, key.shape, index.shape[1]
        columns, text = _Slots.of(past.columns, visible), _Slots.of(past.rows, visible)
        image = kernel.marked("cmai", past.columns)  # (B, v)
        images, before = int(image.max()) + 1, past.table.shape[1] - r
        steered = self.source == "previous" and kernel.layer >= self.first - 1
        steering = self._previous(kernel, past) if steered else None
        focuses, pieces = [], []
        for start in range(0, r, _ROWS):
            at = index[:, start : start + _ROWS]
            q = query.gather(2, at[:, None, :, None].expand(-1, H, -1, D))
            logits = masked_logits(q, key, visible.take(at), kernel.scaling, kernel.softcap)  # (B, H, r', n)
            A = normalised(logits.detach())  # it only decides what is hidden
            past.table[:, before + start : before + start + at.shape[1]] = columns.mean(A)
            F = focus(text.mean(A), past.table)  # (B, r', v); rows to come have no part: A is causal
            focuses.append(F)
            if steering is not None:
                F = steering[:, start : start + _ROWS]
            seen = columns.mean((logits > float("-inf")).float()) > 0
            hidden = torch.zeros_like(seen)
            for i in range(images):
                V = seen & (image == i)[:, None]
                hidden |= lowest(F, self.rho, V) if self.threshold is None else below_mean(F, self.threshold, V)
            P = inhibit(logits, columns.spread(hidden, H, n)).to(value.dtype)
            pieces.append((P.reshape(B, Hkv, -1, n) @ value).view(B, H, -1, value.shape[-1]))
        if self.source == "previous":
            kernel.facts["cmai focus"] = (past.columns, torch.cat(focuses, 1))
        return torch.cat(pieces, 2)

    def _previous(self, kernel: Kernel, past: _Past) -> Tensor:
        """The focus of the layer before on this layer's columns, of which it may have had more: (B, r, v)."""
        theirs, F = kernel.facts["cmai focus"]
        numbers = torch.arange(theirs.shape[1], device=F.device).expand_as(theirs)
        at = look_up(by_order(numbers, theirs), past.columns).clamp(min=0)
        return F.gather(-1, at[:, None].expand(-1, F.shape[1], -1))
