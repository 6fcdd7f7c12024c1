"""QuoTA: share a video's visual tokens out among its frames by what each frame has to do with the question.

    p_i = P(yes | frame i, "does it show what the question is about?")     a vision-language model, one frame at a time
    w_i = p_i^gamma / sum_j p_j^gamma                                      gamma = 2
    n_i = int(Q w_i)                                                       Q tokens in all; n_i = 0 drops the frame
    h = w = floor(sqrt(n_i)),  h + 1 where (h + 1) w <= n_i                the grid that frame i is resized to

Relevant frames keep their resolution, or gain some; the others shrink to a few tokens or vanish.
"QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension", arXiv 2503.08689.
Numbers are the official code's, with its slips repaired: no entities where step 1 says no, and lists are parsed, never
evaluated. Ours: `cap` for the bilinear resizer; equal weights where all p are 0; a product Q w_i that rounding left
just under a whole number counts as that number; a lone frame gets all of Q and needs no scorer; frames that a method
has thinned inside the vision tower are merged, as they have no grid.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from math import isqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, normalize

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import PromptError, UnsupportedModel, UsageError
from seqwise.core.method import Method, budget_param, param
from seqwise.core.prepare import prepare
from seqwise.core.select import budget_count
from seqwise.core.views import Stage

Grid = tuple[int, int]  # rows, columns
Resizer = Literal["bilinear", "pool", "select", "merge", "merge2d"]

# how many tokens


def weights(p: Tensor, gamma: float = 2.0) -> Tensor:
    """w: relevance p (..., n) >= 0 of each frame -> (..., n) float64 that sum to 1. Equal where all p are 0."""
    p = p.double()
    top = p.amax(-1, keepdim=True)
    share = torch.where(top > 0, p / top.clamp_min(torch.finfo(torch.float64).tiny), 1.0).pow(gamma)
    return share / share.sum(-1, keepdim=True)


def capped(w: Tensor, m: Tensor | float) -> Tensor:
    """w (n,) with no entry above m (a number, or one per frame): what is cut off goes to the others by their weights.

    One pass in frame order, so that the total may stay below 1: with s the sum of min(w, m) and e what has been cut,
    each w_i < m gains w_i / s * e; what then exceeds m joins e for the frames behind it.
    """
    most = torch.as_tensor(m, dtype=torch.float64).expand(w.shape[0]).tolist()
    clipped = [min(a, b) for a, b in zip(w.tolist(), most, strict=True)]
    excess, total = float(w.sum()) - sum(clipped), sum(clipped)
    for i, limit in enumerate(most):
        if clipped[i] < limit:
            clipped[i] += clipped[i] / total * excess
            if clipped[i] > limit:
                excess += clipped[i] - limit
                clipped[i] = limit
    return torch.tensor(clipped, dtype=torch.float64, device=w.device)


def allocate(w: Tensor, Q: int, N: Tensor | int | None = None) -> Tensor:
    """n: tokens of each frame from weights w (n,): (n,) int64, int(Q w), at most Q in all.

    N: tokens of a frame before (one number, or one per frame), which none may then exceed; see `capped`.

    Raises:
        ValueError: Q < 1.
    """
    if Q < 1:
        raise ValueError(f"allocate: Q must be >= 1, got {Q}")
    if N is not None:
        w = capped(w, torch.as_tensor(N, dtype=torch.float64) / Q)
    return (Q * w.double() + 1e-9).floor().long()


def grid_of(n: int) -> Grid:
    """(h, w), nearly square, of at most n tokens; (0, 0) for none. n - h w <= w."""
    w = isqrt(n)
    return (w + 1 if w and (w + 1) * w <= n else w), w


# resizing a frame


def bilinear(x: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Tokens (..., H W, D) of a grid, in raster order -> (..., h w, D): bilinear, corners not aligned, no antialias."""
    planes = _planes(x, grid)
    return _tokens(interpolate(planes, size=size, mode="bilinear", align_corners=False), x)


def adaptive_pool(x: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Tokens (..., H W, D) of a grid, in raster order -> (..., h w, D): adaptive average pooling."""
    return _tokens(adaptive_avg_pool2d(_planes(x, grid), size), x)


def select(x: Tensor, n: int) -> Tensor:
    """n of the tokens (..., N, D), evenly spaced from the first to the last: those at int(i (N - 1) / (n - 1))."""
    index = torch.arange(n, device=x.device) * (x.shape[-2] - 1) // max(n - 1, 1)
    return x[..., index, :]


def bipartite_merge(x: Tensor, target: int) -> Tensor:
    """Tokens (..., n, D) merged down to (..., min(n, target), D), target >= 1.

    Rounds until that many are left: tokens of even index each look for their best match, by cosine, among those of odd
    index; the best matched of them, at most half of all, join it (mean of the round's members). What comes out of a
    round is the even tokens that stay, by falling similarity, and then the odd ones.
    """
    while x.shape[-2] > target:
        r = min(x.shape[-2] - target, x.shape[-2] // 2)
        A, B = x[..., ::2, :], x[..., 1::2, :]
        best, match = (normalize(A.float(), dim=-1) @ normalize(B.float(), dim=-1).mT).max(-1)  # (..., |A|)
        order = best.argsort(dim=-1, descending=True, stable=True)
        joining, staying = order[..., :r], order[..., r:]
        into = match.gather(-1, joining)[..., None].expand(*joining.shape, x.shape[-1])
        B = B.scatter_reduce(-2, into, _rows(A, joining), "mean", include_self=True)
        x = torch.cat([_rows(A, staying), B], -2)
    return x


def merge(x: Tensor, grid: Grid, n: int, side: int = 14) -> Tensor:
    """Tokens (..., H W, D), pooled to at most side x side and then merged down to n: (..., min(n, pooled), D)."""
    return bipartite_merge(adaptive_pool(x, grid, (min(grid[0], side), min(grid[1], side))), n)


def merge_axes(x: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Tokens (..., H W, D), each row merged down to w and then each column to h: (..., min(h, H) min(w, W), D)."""
    h, w = size
    narrow = bipartite_merge(x.unflatten(-2, grid), w)  # (..., H, w, D)
    return bipartite_merge(narrow.transpose(-2, -3), h).transpose(-2, -3).flatten(-3, -2)


def resize(x: Tensor, grid: Grid | None, n: int, how: Resizer = "bilinear") -> Tensor:
    """A frame's tokens (N, D) at n tokens: (k, D), k <= n, in the dtype of x.

    grid: theirs; tokens that fill none, as a tower pruner leaves them, are merged down to n, unless `how` selects.
    """
    if how == "select":
        return select(x, n)
    if grid is None:
        return bipartite_merge(x, n)
    size = grid_of(n)
    if how == "merge":
        return merge(x, grid, n)
    if size == grid:
        return x
    return {"bilinear": bilinear, "pool": adaptive_pool, "merge2d": merge_axes}[how](x, grid, size)


def lay_out(
    frames: Sequence[Tensor], newline: Tensor | None = None, layout: Literal["grid", "one_token"] = "grid"
) -> Tensor:
    """Frames (h, w, D), h and w of each its own, one after the other: (tokens, D).

    newline (D,): put after each row of each frame (h more tokens a frame, which Q does not count), or, by "one_token",
    once at the very end. None puts nothing.
    """
    if newline is None:
        return torch.cat([frame.flatten(0, 1) for frame in frames])
    if layout == "one_token":
        return torch.cat([*(frame.flatten(0, 1) for frame in frames), newline[None]])
    lines = [torch.cat([frame, newline.expand(frame.shape[0], 1, -1)], 1) for frame in frames]
    return torch.cat([line.flatten(0, 1) for line in lines])


def _planes(x: Tensor, grid: Grid) -> Tensor:
    """(..., H W, D) -> (batch, D, H, W) in float32."""
    return x.float().reshape(-1, *x.shape[-2:]).mT.unflatten(-1, grid)


def _tokens(planes: Tensor, like: Tensor) -> Tensor:
    """(batch, D, h, w) -> (..., h w, D), leading axes and dtype of `like`."""
    tokens = planes.flatten(-2).mT
    return tokens.reshape(*like.shape[:-2], *tokens.shape[-2:]).to(like.dtype)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(-2, index[..., None].expand(*index.shape, x.shape[-1]))


# what the question is about


def decouple_prompt(question: str) -> str:
    """A text prompt that has a language model name, step by step, the objects whose sight answers the question."""
    return (
        "A video will be searched for what this question needs. Work in three steps and answer in this form.\n"
        "Step 1: does the answer depend on seeing particular physical objects? yes or no\n"
        "Step 2: if so, list the objects that the question and its options name or imply\n"
        "Step 3: keep those that can be seen as physical things, as a Python list of strings; [] if there are none\n\n"
        "Question: What is the colour of the cup beside the laptop?\n"
        'Step 1: yes\nStep 2: cup, laptop, colour\nStep 3: ["cup", "laptop"]\n\n'
        "Question: What is the mood of the whole film?\n"
        "Step 1: no\nStep 2: none\nStep 3: []\n\n"
        "Question: After the dog jumps over the fence, who opens the gate? A. a farmer B. a child\n"
        "Step 1: yes\nStep 2: dog, jump, fence, gate, farmer, child\n"
        'Step 3: ["dog", "fence", "gate", "farmer", "child"]\n\n'
        f"Question: {question}\n"
    )


def parse_entities(reply: str) -> list[str]:
    """The objects that a reply to `decouple_prompt` lists; none where step 1 is not yes or step 3 has no list."""
    found = re.search(r"step\s*3\s*:[^\[]*(\[[^\]]*\])", reply, re.IGNORECASE)
    if found is None or re.search(r"step\s*1\s*:\s*yes", reply, re.IGNORECASE) is None:
        return []
    try:
        listed = ast.literal_eval(found[1])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [one.strip() for one in listed if isinstance(one, str) and one.strip()]


def scoring_prompt(question: str, objects: Sequence[str] = ()) -> str:
    """What the scorer is asked about each frame: whether it shows one of the objects; without any, whether it answers
    the question."""
    options = "A. yes, B. no\nAnswer with the option's letter directly."
    if objects:
        return f"Does the image contain any object of {', '.join(objects)}?\n{options}"
    return f"{question}\nDoes the image contain sufficient information to answer the given question?\n{options}"


def yes_probability(logits: Tensor, yes: int, no: int | None = None) -> Tensor:
    """p: next-token logits (..., V) -> (...,) float32, of `yes` among all tokens; with `no`, among these two alone."""
    if no is None:
        return logits.float().softmax(-1)[..., yes]
    return (logits[..., yes] - logits[..., no]).float().sigmoid()


def frame_scorer(
    model: Any,
    processor: Any,
    frames: Sequence[Any],
    question: str,
    objects: Sequence[str] = (),
    *,
    prompt: str | None = None,
    yes: str = "A",
    no: str | None = None,
    batch: int = 8,
) -> Callable[[], Tensor]:
    """Scores each frame alone with a vision-language model, and returns what `on(..., scorer=...)` takes.

    frames: images as the processor takes them, of all samples of the prompt in order. objects: see `parse_entities`.
    prompt: asked instead of `scoring_prompt(question, objects)`. yes, no: the answers, one token each; p is that of
    `yes` in the softmax over all tokens, or beside `no` alone, where a scorer may prefer other words. batch: frames in
    one forward. A model that runs under a method scores as the plain model.

    Raises:
        UsageError: no frames, or an answer that is not one token.
    """
    if not frames:
        raise UsageError("frame_scorer: frames must hold at least one image, got none")
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = [_single(tokenizer, word) for word in ((yes,) if no is None else (yes, no))]
    text = scoring_prompt(question, objects) if prompt is None else prompt
    run = vars(model).get("_seqwise_run")
    side, tokenizer.padding_side = tokenizer.padding_side, "left"  # the last position is then each prompt's own end
    try:
        found = []
        for start in range(0, len(frames), batch):
            talks = [
                [{"role": "user", "content": [{"type": "image", "image": frame}, {"type": "text", "text": text}]}]
                for frame in frames[start : start + batch]
            ]
            inputs, _ = prepare(processor, talks, processor_kwargs={"padding": True})
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            with torch.no_grad(), nullcontext() if run is None else run.plain():
                out = model.generate(
                    **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
                )
            found.append(yes_probability(out.logits[0], *ids))
    finally:
        tokenizer.padding_side = side
    p = torch.cat(found)
    return lambda: p


def _single(tokenizer: Any, word: str) -> int:
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise UsageError(f"frame_scorer: an answer must be one token of the scorer, {word!r} is {len(ids)}")
    return int(ids[0])


# the method


@dataclass(frozen=True)
class Frame:
    """A frame in a prompt: its sample, its rows (N,) ascending, and the grid that they fill, if any."""

    sample: int
    rows: Tensor
    grid: Grid | None


@dataclass(frozen=True)
class QuoTA(Method):
    """Resizes each frame in front of the language model to the share of the budget that its relevance earns.

    Frames are the images of a prompt, or the tiles of one (the frames of a video). `on(model, scorer=...)` takes a
    callable that returns their relevance p (frames,), of all samples in order, once per prompt; `frame_scorer` makes
    one. budget: Q, tokens or a share of each sample's visual tokens; all frames of a sample share it. gamma: how
    strongly relevance tells. resize: "bilinear" (paper's v1) may enlarge frames; "pool" (v2), "select" (v3), "merge"
    (v4) and "merge2d" (v5) cannot, so that no frame gets more tokens than it had. cap: the same limit for "bilinear";
    frames with text between them need it once they outgrow their own place. Models with 3-axis positions are refused,
    as a resized frame has other cells than its positions tell.
    """

    budget: int | float = budget_param(0.25, "visual tokens of each sample's frames together")
    gamma: float = param(2.0, gt=0, doc="exponent of the relevance")
    resize: Resizer = "bilinear"
    cap: bool = False

    slots: ClassVar[tuple[str, ...]] = ("input.rows",)
    shares_budget: ClassVar[bool] = True

    def identity(self) -> None:
        return None  # no identity: with unequal scores every budget resizes frames

    def needs(self) -> set[str]:
        return {"vision tower", "1-D positions"}

    def check(self, anatomy: Anatomy) -> None:
        assert anatomy.vision is not None  # needs() asks for it
        if anatomy.vision.tiled:
            raise UnsupportedModel(
                f"{self} resizes frames of one grid, but {type(anatomy.model).__name__} packs each image from several "
                "tiles; UniformGrid and CATP take such images"
            )

    def cut_input(self, stage: Stage) -> Tensor | None:
        frames = frames_of(stage)
        if not frames:
            return None
        counts = self._counts(frames, stage)
        hidden = stage.hidden.clone()  # (B, r, d)
        keep = stage.live & ~stage.visual
        sized = [
            resize(stage.hidden[f.sample, f.rows], f.grid, n, self.resize) if n else None
            for f, n in zip(frames, counts, strict=True)
        ]
        if all(new is not None and torch.equal(new, stage.hidden[f.sample, f.rows])
               for f, new in zip(frames, sized, strict=True)):  # fmt: skip
            return None
        for stretch in _stretches(frames, stage):
            rows = torch.cat([frames[i].rows for i in stretch])
            tokens = [0 if (x := sized[i]) is None else len(x) for i in stretch]
            for i, first in zip(stretch, self._places([len(frames[i].rows) for i in stretch], tokens), strict=True):
                if (new := sized[i]) is not None:
                    taken = rows[first : first + len(new)]
                    hidden[frames[i].sample, taken] = new
                    keep[frames[i].sample, taken] = True
        stage.replace(hidden)
        return keep

    def _counts(self, frames: list[Frame], stage: Stage) -> list[int]:
        """n of each frame."""
        per_sample = [sum(f.sample == b for f in frames) for b in range(stage.live.shape[0])]
        p = torch.ones(len(frames)) if max(per_sample) == 1 else self._relevance(per_sample, stage)
        counts: list[int] = []
        for own, each in zip(_split(frames, per_sample), p.split(per_sample), strict=True):
            if own:
                N = torch.tensor([len(f.rows) for f in own])
                cap = N if self.cap or self.resize != "bilinear" else None
                counts += allocate(weights(each, self.gamma), budget_count(self.budget, int(N.sum())), cap).tolist()
        return counts

    def _relevance(self, per_sample: list[int], stage: Stage) -> Tensor:
        """p (frames,) on the CPU; samples repeated for beams or several returned sequences share theirs."""
        if stage.scorer is None:
            raise PromptError(
                f"{self} needs the relevance of {sum(per_sample)} frames; attach it by on(model, scorer=...), for "
                "instance scorer=frame_scorer(model, processor, frames, question)"
            )
        p = torch.as_tensor(stage.scorer()).detach().float().cpu().flatten()
        copies = sum(per_sample) // max(len(p), 1)
        if not len(p) or copies * len(p) != sum(per_sample):
            raise PromptError(f"{self}: scorer must return one number per frame, {sum(per_sample)}, got {len(p)}")
        if not (p.isfinite() & (p >= 0)).all():
            raise PromptError(f"{self}: scorer must return finite numbers >= 0, got {p.tolist()}")
        return torch.cat([each for each in p.split(per_sample[::copies]) for _ in range(copies)])

    def _places(self, rows: list[int], tokens: list[int]) -> list[int]:
        """Where the resized frames of a stretch begin among its rows: at their own where there is room, else as near as
        may be. rows, tokens: of each frame, before and after."""
        if sum(tokens) > sum(rows):
            raise PromptError(
                f"{self}: relevant frames need {sum(tokens)} tokens where the prompt has {sum(rows)} between its "
                "texts; set cap=True, or give the frames without text between them"
            )
        firsts, at, own = [], 0, 0
        for before, after in zip(rows, tokens, strict=True):
            at = max(at, own)
            firsts.append(at)
            at, own = at + after, own + before
        end = sum(rows)
        for i in reversed(range(len(tokens))):
            firsts[i] = end = min(firsts[i], end - tokens[i])
        return firsts


def frames_of(stage: Stage) -> list[Frame]:
    """The frames of a prompt, sample by sample, in order: runs of visual rows of one image and one tile."""
    image, tile = stage.image.masked_fill(~stage.visual, -1), stage.fact("tile")
    row, column = stage.fact("row"), stage.fact("column")
    found = []
    for b in range(image.shape[0]):
        rows = stage.visual[b].nonzero()[:, 0]
        if not len(rows):
            continue
        key = torch.stack([image[b, rows], tile[b, rows]])
        _, sizes = torch.unique_consecutive(key, dim=1, return_counts=True)
        for own in rows.split(sizes.tolist()):
            H, W = int(row[b, own].max()) + 1, int(column[b, own].max()) + 1
            whole = int(row[b, own].min()) == 0 and len(own) == H * W
            found.append(Frame(b, own, (H, W) if whole else None))
    return found


def _stretches(frames: list[Frame], stage: Stage) -> list[list[int]]:
    """Indices of frames that follow one another with no text between them."""
    before = (stage.live & ~stage.visual).cumsum(-1)  # (B, r), text rows up to each row
    place = [(f.sample, int(before[f.sample, f.rows[0]])) for f in frames]
    return [[i for i, _ in group] for _, group in groupby(enumerate(place), key=lambda one: one[1])]


def _split(frames: list[Frame], sizes: list[int]) -> list[list[Frame]]:
    left = iter(frames)
    return [[next(left) for _ in range(size)] for size in sizes]
