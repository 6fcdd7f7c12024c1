"""ZipCache: store the salient tokens of a KV cache in more bits than the others; a few probe rows tell which they are.

    P = the most recent 5 % of the rows and as many random earlier ones (together about 10 %)
    s_i = sum_{r in P} sum_{h in group} A[h, r, i]          attention received, per KV head
    p_i = s_i / |{r in P: r >= i}|                          per row that can see token i
    U   = the floor(rho n) tokens of smallest p, in ascending order of p (2 bits); the rest by position (4 bits)

    codes = round((x - min) / step), step = (max - min) / (2^b - 1), x_hat = codes * step + min
    keys:   channelwise, min and max per channel over the tokens of one subset
    values: channel-separable tokenwise, c_j = sqrt(max_i |x_ij|) over ALL tokens; y = x / c, min and max of y per row
            over all heads and channels; x_hat = y_hat * c

U differs per head: row j of a subset holds the j-th token of each head's own list, and those share the row's min and
max. All statistics are per sample and exclude padding. The prefill's own output comes from full-precision keys and
values. New tokens stay in full precision; each 100 of them are then split and stored as a chunk with parameters of
its own, scored by the current query row (as the code does) or by `probe_rows` among them (as the paper does).

"ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification", arXiv 2405.14256.
The paper's denominator is the default; `denominator="all"` is the code's n - i, which favours late tokens, since the
probes stand mostly at the end. Probe rows are drawn without repetition (the code may draw a row twice).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from seqwise.core.caches import Chunk, View
from seqwise.core.method import Method, param, seeded
from seqwise.core.packed import Packed
from seqwise.core.select import compact, descending

BITS = (1, 2, 4, 8)


def probe_rows(length: int, generator: torch.Generator) -> Tensor:
    """Probe rows of `length` query rows, ascending: the recent 5 %, and floor(0.05 length) distinct earlier ones.

    Below 20 rows there are no random probes; the last row is always a probe.
    """
    recent = int(0.95 * length)
    drawn = torch.randperm(recent, generator=generator, device=generator.device)[: int(0.05 * length)]
    return torch.cat([drawn.sort().values, torch.arange(recent, length, device=generator.device)])


def saliency(
    received: Tensor,
    rows: Tensor,
    *,
    positions: Tensor | None = None,
    denominator: Literal["probe", "all"] = "probe",
) -> Tensor:
    """Attention received, over the number of rows that can see the token: fp32 (B, Hkv, n).

    received: (B, Hkv, n), probabilities summed over the probe rows and over the query heads of each KV head:
    `A.unflatten(1, (Hkv, -1)).sum((2, 3))` of dense rows A (B, H, R, n). rows: (R,) or (B, R), the probe rows'
    positions; -1 fills up samples that have fewer, a row given twice counts twice. positions: (n,) or
    (B, 1 or Hkv, n), the slots' positions, -1 on padding; default 0..n-1.
    denominator: "probe" counts probe rows (paper), "all" every row up to the last probe (code).
    """
    B, Hkv, n = received.shape
    if positions is None:
        positions = torch.arange(n, device=received.device)
    positions = positions.expand(B, Hkv, n).contiguous()
    rows = (rows if rows.dim() == 2 else rows[None]).to(positions)[:, None].expand(B, Hkv, -1)  # (B, Hkv, R)
    if denominator == "probe":
        seen_by = rows.shape[-1] - torch.searchsorted(rows.sort(-1).values.contiguous(), positions)
    else:
        seen_by = rows.amax(-1, keepdim=True) + 1 - positions
    return received.float() / seen_by.clamp(min=1)


def split(
    score: Tensor, ratio: float = 0.4, live: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The unsalient and the salient slots of each head, as two pairs (index, live) of shape (B, Hkv, m).

    score: (B, Hkv, n). ratio: rho in [0, 1]; floor(rho n') of a head's n' live slots are unsalient, least salient
    first, the lower index first among ties; the salient ones ascend by index. live: (B, n) or (B, 1 or Hkv, n) bool,
    False on padding, which is in neither subset. Where counts differ, m is the largest, and `live` of the pair is
    False on what fills up (behind the unsalient, in front of the salient).

    Raises:
        ValueError: ratio outside [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ZipCache.ratio must be in [0, 1], got {ratio} (share of unsalient tokens)")
    live = _live(live, score)
    count = (live.sum(-1, keepdim=True).double() * ratio).long()  # (B, Hkv, 1)
    rising = descending(-score.float().masked_fill(~live, float("inf")))  # (B, Hkv, n)
    low = torch.arange(score.shape[-1], device=score.device) < count  # (B, Hkv, n): ranks that are unsalient
    width = int(count.max())
    unsalient = rising[..., :width], low[..., :width]
    salient = compact(live & ~torch.zeros_like(low).scatter(-1, rising, low))
    return unsalient, salient


def quantize_keys(x: Tensor, bits: int, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Channelwise codes of one subset's keys (B, Hkv, m, D).

    live: as in `split`, over the m tokens. Returns codes (uint8, like x, 0 where not live), minimum and step, both
    fp32 (B, Hkv, 1, D). A constant channel, such as a single token's, is restored exactly.
    """
    return _quantize(x, bits, (2,), live)


def channel_scale(x: Tensor, live: Tensor | None = None) -> Tensor:
    """c = sqrt(max |x| over ALL tokens) per channel: (B, Hkv, n, D) -> fp32 (B, Hkv, 1, D), never 0."""
    size = x.float().abs().masked_fill(~_live(live, x[..., 0])[..., None], 0.0)
    largest = size.amax(2, keepdim=True) if x.shape[2] else size.new_zeros(*x.shape[:2], 1, x.shape[3])
    return largest.sqrt().clamp(min=_tiny())


def quantize_values(
    x: Tensor, bits: int, scale: Tensor, live: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Channel-separable tokenwise codes of one subset's values (B, Hkv, m, D).

    scale: `channel_scale` of all tokens, not of the subset; ones give plain tokenwise quantisation. live: as in
    `split`, over the m tokens. Returns codes (uint8, like x, 0 where not live), minimum and step, both fp32
    (B, 1, m, 1), one row of all heads sharing them, and the scale.
    """
    return *_quantize(x.float() / scale, bits, (1, 3), live), scale


def dequantize(codes: Tensor, minimum: Tensor, step: Tensor, scale: Tensor | None = None) -> Tensor:
    """x_hat = (codes * step + minimum) * scale, fp32 in the codes' shape."""
    x = codes.float() * step + minimum
    return x if scale is None else x * scale


def _quantize(x: Tensor, bits: int, over: tuple[int, ...], live: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric min-max codes; minimum and maximum run over the axes `over` of x (B, Hkv, m, D)."""
    if bits not in BITS:
        raise ValueError(f"ZipCache.bits must be one of {BITS}, got {bits}")
    counts = _live(live, x[..., 0])[..., None].expand_as(x)
    x = x.float()
    if not x.numel():  # an empty subset has no extremes
        empty = x.new_zeros([1 if axis in over else size for axis, size in enumerate(x.shape)])
        return x.to(torch.uint8), empty, empty
    minimum = x.masked_fill(~counts, float("inf")).amin(over, keepdim=True)
    maximum = x.masked_fill(~counts, float("-inf")).amax(over, keepdim=True)
    nothing = minimum > maximum  # no live element
    minimum, maximum = minimum.masked_fill(nothing, 0.0), maximum.masked_fill(nothing, 0.0)
    step = ((maximum - minimum) / (2**bits - 1)).clamp(min=_tiny())
    codes = torch.where(counts, ((x - minimum) / step).round(), 0.0)  # round halves to even
    return codes.to(torch.uint8), minimum, step


def _live(live: Tensor | None, like: Tensor) -> Tensor:  # (B, Hkv, n), as `like`
    if live is None:
        return torch.ones_like(like, dtype=torch.bool)
    return (live[:, None] if live.dim() == 2 else live).bool().expand_as(like)


def _tiny() -> float:
    return torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class ZipCache(Method):
    """Stores the cache in `bits` = (salient, unsalient) bits per element; nothing is evicted.

    ratio: rho, share of unsalient tokens. gap: new tokens that stay in full precision until they are stored together.
    denominator: see `saliency`. probe: what scores the tokens of a gap, the current row ("last", the code) or 10 % of
    the gap's rows ("sampled", the paper).
    """

    bits: tuple[int, int] = (4, 2)
    ratio: float = param(0.4, ge=0, le=1, doc="share of unsalient tokens")
    gap: int = param(100, ge=1, doc="new tokens kept in full precision")
    denominator: Literal["probe", "all"] = "probe"
    probe: Literal["last", "sampled"] = "last"
    seed: int = param(0, ge=0, doc="of the probe rows")

    slots: ClassVar[tuple[str, ...]] = ("cache.store",)
    # identity() is None: every quantisation changes the stored numbers

    def __post_init__(self) -> None:
        super().__post_init__()
        for bits in self.bits:
            if bits not in BITS:
                raise ValueError(f"ZipCache.bits must each be one of {BITS}, got {self.bits!r} (salient, unsalient)")

    def store(self, view: View) -> list[Chunk] | None:
        if view.phase == "prefill":
            score = self._score(view, *self._probes(view))
        else:
            if self.probe == "sampled":
                self._sample(view)
            if view.cache.unpacked_rows < self.gap:
                return None
            score = self._gap_score(view)
        return self._chunks(view, score[..., view.cache.packed :])

    def _probes(self, view: View) -> tuple[Tensor, Tensor]:
        """Probe rows (B, R) of this forward's rows, and their weights, 0 where a shorter sample fills up."""
        spans = view.ledger.rows[view.layer].spans or [(0, view.new)] * view.ledger.batch
        drawn = [
            start + probe_rows(stop - start, seeded(self.seed, view.layer, stop - start, torch.device("cpu")))
            for start, stop in spans
        ]
        width = max(len(rows) for rows in drawn)
        rows = torch.stack([torch.nn.functional.pad(r, (width - len(r), 0)) for r in drawn])
        weight = torch.tensor([[0.0] * (width - len(r)) + [1.0] * len(r) for r in drawn])
        return rows.to(view.key.device), weight.to(view.key.device)

    def _score(self, view: View, rows: Tensor, weight: Tensor) -> Tensor:
        received = view.received(rows=rows, weight=weight)  # (B, Hkv, n)
        at = view.ledger.rows[view.layer].order.expand(rows.shape[0], -1).gather(1, rows)
        at = torch.where(weight > 0, at, -1)
        return saliency(received, at, positions=view.order, denominator=self.denominator)

    def _gap_score(self, view: View) -> Tensor:
        if self.probe == "last":
            return view.received(rows=slice(view.new - 1, view.new))
        seen = view.state["probes"].clamp(min=1)
        return view.state["received"] / seen

    def _sample(self, view: View) -> None:
        """Adds the attention of those of this forward's rows that are probes among the gap's."""
        filled = view.cache.unpacked_rows - view.new  # rows of the gap before this forward
        block = (view.step - view.cache.unpacked_rows) // self.gap
        chosen = probe_rows(self.gap, seeded(self.seed, view.layer, block, torch.device("cpu"))).tolist()
        rows = [row - filled for row in chosen if filled <= row < filled + view.new]
        zeros = torch.zeros(*view.key.shape[:2], view.slots, device=view.key.device)
        received, probes = view.state.get("received", zeros), view.state.get("probes", zeros)
        if rows:
            at = torch.tensor(rows, device=view.key.device)
            received = received + view.received(rows=at)
            own = view.ledger.rows[view.layer].order[:, at]  # (B, r)
            probes = probes + (own[:, None, None] >= view.order[..., None]).sum(-1)
        view.state["received"], view.state["probes"] = received, probes

    def _chunks(self, view: View, score: Tensor) -> list[Chunk]:
        tail = view.cache.tail
        keys, values = view.cache.keys[:, :, :tail], view.cache.values[:, :, :tail]
        live = view.live[..., view.cache.packed :]
        scale = channel_scale(values, live)
        unsalient, salient = split(score, self.ratio, live)
        chunks = []
        for (index, counts), bits in ((unsalient, self.bits[1]), (salient, self.bits[0])):
            if not index.shape[-1]:
                continue
            at = index[..., None].expand(-1, -1, -1, keys.shape[-1])
            codes, minimum, step = quantize_keys(keys.gather(2, at), bits, counts)
            packed_keys = Packed.pack(codes, bits, minimum, step)
            at = index[..., None].expand(-1, -1, -1, values.shape[-1])
            codes, minimum, step, scale = quantize_values(values.gather(2, at), bits, scale, counts)
            chunks.append(Chunk(packed_keys, Packed.pack(codes, bits, minimum, step, scale), index, counts))
        return chunks
