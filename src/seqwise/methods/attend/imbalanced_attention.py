"""PAINT: attend more to the image where it says something, at every generated token.

    s_loc, s_sum = sum_h A[h, CLS, patches]            A of the vision tower's first and second-last layer
    S = {j : s_sum_j > Q3 + 1.5 (Q3 - Q1)}             summary: outliers, quartiles over the image's N patches
    T = the floor(ratio N) patches of largest s_loc, without S                       local: detail of objects
    z_j <- z_j + alpha |z_j|  for j in T,   z_j + beta |z_j|  for j in S,   then softmax

z are the scores of the language model's last row (a prompt's last token, or a step's), scaled and masked, in all
heads of layers start..end. |z| lifts negative scores too and leaves 0 where it is; it depends on the level of the
scores, which softmax alone ignores.
"Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model", arXiv 2501.12206,
later renamed "PAINT: Paying Attention to INformed Tokens".
PAI, which the paper starts from, lifts all image tokens alike: `PAINT.pai()`. The official code reads the sets of the
first image of a batch; here each image has its own. Its further spatial set, off by default, is left out: it ranks
sums of softmax rows, which all are 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor, log
from typing import ClassVar

import torch
from torch import Tensor

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import PromptError, UnsupportedModel
from seqwise.core.method import Method, param
from seqwise.core.observe import normalised
from seqwise.core.run import Run
from seqwise.core.segments import Segments
from seqwise.core.select import top_k
from seqwise.core.towers import Tower
from seqwise.core.views import Block


def cls_score(cls_row: Tensor, specials: int = 1) -> Tensor:
    """s: attention that each patch receives from CLS, summed over heads, in fp32.

    cls_row: (..., h, specials + N), the row of CLS in one tower layer's attention, `A[..., 0, :]`: of the first layer
    for s_loc, of the second-last for s_sum. The first `specials` columns are no patches. Returns (..., N).
    """
    return cls_row[..., specials:].float().sum(-2)


def local_set(s_loc: Tensor, ratio: float = 0.25) -> Tensor:
    """The floor(ratio N) patches of largest score (..., N), as bool (..., N); ties to the earlier patch."""
    chosen = top_k(s_loc, floor(ratio * s_loc.shape[-1]))
    return torch.zeros_like(s_loc, dtype=torch.bool).scatter(-1, chosen, True)


def summary_set(s_sum: Tensor) -> Tensor:
    """S: the patches whose score (..., N) lies above Q3 + 1.5 (Q3 - Q1), as bool (..., N); may be empty.

    Quartiles interpolate linearly between the N scores. The share rho of outliers is the mean of the result, and
    the floor(rho N) patches of largest score are the outliers themselves.
    """
    s = s_sum.float()
    Q1, Q3 = s.quantile(s.new_tensor([0.25, 0.75]), dim=-1, keepdim=True)
    return s > Q3 + 1.5 * (Q3 - Q1)


def token_sets(s_loc: Tensor, s_sum: Tensor, ratio: float = 0.25) -> tuple[Tensor, Tensor]:
    """(T, S), bool (..., N) each, without a common patch, from both scores (..., N) of an image."""
    S = summary_set(s_sum)
    return local_set(s_loc, ratio) & ~S, S


def boost(z: Tensor, T: Tensor, S: Tensor, alpha: float = 0.7, beta: float = 0.3) -> Tensor:
    """z + alpha |z| on T, z + beta |z| on S, z elsewhere; -inf (not seen) stays -inf.

    z: (..., n), scores before softmax, scaled and masked. T, S: bool, broadcastable to z, without a common token.
    """
    lifted = z + z.abs() * (alpha * T + beta * S).to(z.dtype)
    return torch.where(z == -torch.inf, z, lifted)  # -inf + |-inf| is no number


def guided(conditional: Tensor, unconditional: Tensor, gamma: float = 1.1) -> Tensor:
    """Classifier-free guidance, PAI's: gamma (lc - lu) + lu, and -inf for tokens with lc < max lc + log 0.1.

    conditional, unconditional: (..., V), the next token's logits with the image (and the boost) and without both;
    lc and lu are their log-softmax. gamma = 1 switches it off: lc as it is. Returns (..., V), to be sampled from.
    """
    lc = conditional.log_softmax(-1)
    if gamma == 1:
        return lc
    lu = unconditional.log_softmax(-1)
    unlikely = lc < lc.amax(-1, keepdim=True) + log(0.1)
    return (gamma * (lc - lu) + lu).masked_fill(unlikely, -torch.inf)


@dataclass(frozen=True)
class PAINT(Method):
    """Raises the attention of the newest token to two sets of image tokens that the vision tower singles out.

    alpha, beta: how much of |z| the local and the summary tokens gain; 0 leaves them alone. ratio: of an image's
    patches, the share in the local set. start, end: decoder layers [start, end) that act, end None for all that follow.
    Needs a tower with a CLS token and one visual token per patch: images in tiles are refused.
    """

    alpha: float = param(0.7, ge=0, doc="gain of local tokens")
    beta: float = param(0.3, ge=0, doc="gain of summary tokens")
    ratio: float = param(0.25, ge=0, le=1, doc="share of an image's patches in the local set")
    start: int = param(2, ge=0, doc="first decoder layer that acts")
    end: int | None = param(None, ge=1, doc="decoder layer before which it ends")

    slots: ClassVar[tuple[str, ...]] = ("attention.probs",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.end is not None and self.end <= self.start:
            raise ValueError(
                f"PAINT.end must be > start = {self.start}, got {self.end} (decoder layer before which it ends)"
            )

    @classmethod
    def pai(cls, alpha: float = 0.5) -> PAINT:
        """PAI, the baseline: every image token gains the same alpha."""
        return cls(alpha=alpha, beta=alpha, ratio=1.0)

    def identity(self) -> Method:
        return replace(self, alpha=0.0, beta=0.0)

    def needs(self) -> set[str]:
        return {"vision tower", "CLS token"}

    def check(self, anatomy: Anatomy) -> None:
        name, vision, layers = type(anatomy.model).__name__, anatomy.vision, len(anatomy.layers)
        assert vision is not None
        if vision.tiled:
            raise UnsupportedModel(
                f"{self} needs one visual token per patch, but {name} packs an image's tiles with newline tokens; use "
                "a model that takes an image as one tile (LLaVA-1.5)"
            )
        if len(vision.layers) < 2:
            raise UnsupportedModel(f"{self} needs a vision tower of at least 2 layers ({name} has 1)")
        if self.start >= layers:
            raise ValueError(f"PAINT.start must be < {layers}, the decoder layers of {name}, got {self.start}")
        if self.end is not None and self.end > layers:
            raise ValueError(f"PAINT.end must be <= {layers}, the decoder layers of {name}, got {self.end}")

    def watched_tower(self, anatomy: Anatomy) -> tuple[int, ...]:
        assert anatomy.vision is not None
        return 0, len(anatomy.vision.layers) - 2

    def watch_tower(self, tower: Tower, run: Run) -> None:
        first, second_last = self.watched_tower(run.anatomy)
        s_loc, s_sum = (
            cls_score(tower.received(rows="cls", layer=layer), tower.specials) for layer in (first, second_last)
        )
        T, S = token_sets(s_loc, s_sum, self.ratio)  # (images, N) each
        run.state[self] = T.long() + 2 * S.long()

    def mark(self, segments: Segments, run: Run) -> dict[str, Tensor]:
        """paint: each token's set, 0 none, 1 local, 2 summary. paint_row: 1 on the prompt's last token, else 0."""
        real = segments.real
        last = real & (real.flip(-1).cumsum(-1).flip(-1) == 1)
        return {"paint": self._labels(segments.visual, run.state.get(self)), "paint_row": last.long()}

    def _labels(self, visual: Tensor, sets: Tensor | None) -> Tensor:
        """The sets (images, N) of the tower's patches, at the visual tokens (B, n), which follow them in order."""
        label, count = torch.zeros_like(visual, dtype=torch.long), int(visual.sum())
        if not count:
            return label
        if sets is None:
            raise PromptError(f"{self} reads the vision tower, which has not seen these images; pass pixel_values")
        copies, rest = divmod(count, sets.numel())
        if rest or not copies:
            raise PromptError(
                f"{self} needs one visual token per patch, got {count} tokens for {sets.numel()} patches of the prompt"
            )
        flat = sets.flatten().to(visual.device)
        if copies > 1:  # beams repeat each sample
            parts = flat.split(visual[::copies].sum(-1).tolist())
            flat = torch.cat([part for part in parts for _ in range(copies)])
        return label.masked_scatter(visual, flat)

    def rewritten_rows(self, rows: int) -> slice:
        return slice(rows - 1, rows)

    def rewritten_heads(self, layer: int, anatomy: Anatomy) -> tuple[int, ...]:
        acts = layer >= self.start and (self.end is None or layer < self.end)
        return tuple(range(anatomy.heads)) if acts else ()

    def rewrite(self, probabilities: Tensor, block: Block) -> Tensor:
        if "paint" not in block.marks:  # a prompt of embeddings, whose tokens nobody has told apart
            return probabilities
        acts = block.marked("paint_row", block.rows) != 0  # (B, r): no row inside a prompt that comes in pieces
        label = block.marked("paint", block.order)[..., None, :] * acts[:, None, :, None]  # (B, 1 or h, r, n)
        return normalised(boost(block.logits, label == 1, label == 2, self.alpha, self.beta))
