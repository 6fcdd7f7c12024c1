"""Element ordering: a list of boxes on a page reads best when neighbours on the page are neighbours in the list.

    order(boxes (n, 4)) -> indices (n,)      a box is left, top, right, bottom in pixels, y downwards; c its centre
    raster    by (8 round(c_y / 8), c_x)
    origin    by the distance of the top-left corner from (0, 0)
    mst       Prim's order from the centre nearest to (0, 0), over distances in reading direction
    tsne      by a one-dimensional t-SNE of the centres: the paper's proposal

All are stable, so equal boxes stay in the order they came in. Numbers are given after ordering: the marks on the
screenshot, the lines of the list and the answers all use the new ones.
"The Impact of Element Ordering on LM Agent Performance", arXiv 2409.12089. `mst` and `origin` are in its code only;
`tsne_small` and `spectral` are ours, since the paper's t-SNE settings order fewer than about 20 boxes at random.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from seqwise.core.errors import MissingExtra, PromptError, UsageError
from seqwise.core.method import Method, param
from seqwise.core.segments import Segments
from seqwise.methods.order.base import members

ROW = 8  # pixels of a raster row


def centres(boxes: Tensor) -> Tensor:
    """Centres of boxes (n, 4): float64 (n, 2), x and y. Raises UsageError for another shape, or a NaN."""
    if boxes.dim() != 2 or boxes.shape[1] != 4 or bool(boxes.isnan().any()):
        raise UsageError(
            f"boxes must be (n, 4) numbers (left, top, right, bottom), got shape {tuple(boxes.shape)}"
            f"{' with NaN' if bool(boxes.isnan().any()) else ''}"
        )
    boxes = boxes.double()
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def raster(boxes: Tensor) -> Tensor:
    """Row by row: by (round(c_y / 8) 8, c_x), halves rounded to even. boxes: (n, 4). Returns int64 (n,)."""
    x, y = centres(boxes).unbind(-1)
    by_x = x.argsort(stable=True)
    return by_x[((y / ROW).round() * ROW)[by_x].argsort(stable=True)]


def origin(boxes: Tensor) -> Tensor:
    """By the distance of the top-left corner from (0, 0). boxes: (n, 4). Returns int64 (n,)."""
    centres(boxes)
    return boxes.double()[:, :2].norm(dim=-1).argsort(stable=True)


def reading_distance(boxes: Tensor) -> Tensor:
    """d[u, v] from box u to box v in reading direction, float64 (n, n), not symmetric: the smallest distance between

    - left corner, centre or right corner of u's bottom edge, and the same of v's top edge;
    - centre or top of u's right edge, and centre, bottom or top of v's left edge;
    - bottom of u's right edge, and top or centre of v's left edge (the code leaves out its bottom).
    """
    x, y = centres(boxes).unbind(-1)
    left, top, right, bottom = boxes.double().unbind(-1)
    below = [((a, bottom), (b, top)) for a in (left, x, right) for b in (left, x, right)]
    beside = [((right, a), (left, b)) for a in (y, top) for b in (y, bottom, top)]
    beside += [((right, bottom), (left, b)) for b in (top, y)]
    d = boxes.new_full((len(boxes), len(boxes)), float("inf"), dtype=torch.float64)
    for (x_u, y_u), (x_v, y_v) in below + beside:
        d = torch.minimum(d, torch.hypot(x_u[:, None] - x_v, y_u[:, None] - y_v))
    return d


def mst(boxes: Tensor) -> Tensor:
    """Prim's order: always the box that is nearest to any of those taken, by `reading_distance` from them.

    It starts with the centre nearest to (0, 0); equal boxes: the earlier one. boxes: (n, 4). Returns int64 (n,).
    """
    n = len(boxes)
    distance = centres(boxes).norm(dim=-1)
    if n == 0:
        return torch.zeros(0, dtype=torch.long, device=boxes.device)
    d = reading_distance(boxes)
    cost = torch.full_like(distance, float("inf"))
    outside = torch.ones(n, dtype=torch.bool, device=boxes.device)
    taken = [int(distance.argmin())]
    for _ in range(n - 1):
        outside[taken[-1]] = False
        cost = torch.minimum(cost, d[taken[-1]])
        taken.append(int(cost.masked_fill(~outside, float("inf")).argmin()))
    return torch.tensor(taken, device=boxes.device)


def tsne(
    boxes: Tensor, *, perplexity: float = 30.0, learning_rate: float | Literal["auto"] = "auto", flip: bool = False
) -> Tensor:
    """By falling value of a one-dimensional t-SNE of the centres, random_state 42. boxes: (n, 4), returns int64 (n,).

    perplexity: n - 1 is taken where n is not larger. The direction is t-SNE's; flip: begin at the end nearer to the
    top-left corner. Centres that are all equal go by `raster`. The same boxes can give another order with another
    version or another number of threads. Raises MissingExtra without scikit-learn.
    """
    c = centres(boxes)
    n = len(c)
    if n < 2 or bool((c == c[0]).all()):
        return raster(boxes)
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise MissingExtra("t-SNE order needs scikit-learn: pip install scikit-learn, or order by 'spectral'") from None
    model = TSNE(n_components=1, random_state=42, perplexity=min(perplexity, n - 1), learning_rate=learning_rate)
    value = torch.from_numpy(model.fit_transform(c.cpu().numpy())[:, 0]).to(boxes.device)
    order = value.argsort(descending=True, stable=True)
    return _from_corner(order, boxes) if flip else order


def tsne_small(boxes: Tensor) -> Tensor:
    """t-SNE for few boxes: perplexity max(2, n / 3), learning rate 10, begun near the top-left corner."""
    return tsne(boxes, perplexity=max(2.0, len(boxes) / 3), learning_rate=10.0, flip=True)


def spectral(boxes: Tensor) -> Tensor:
    """By the Fiedler vector of the graph with weights exp(-(D / s)^2), begun near the top-left corner.

    D: distances between centres, s: the mean distance to the fifth neighbour. boxes: (n, 4). Returns int64 (n,).
    Centres that are all equal go by `raster`.
    """
    c = centres(boxes)
    n = len(c)
    if n < 2 or bool((c == c[0]).all()):
        return raster(boxes)
    D = _distances(c, c)
    s = D.sort(-1).values[:, min(5, n - 1)].mean()
    s = torch.where(s > 0, s, D.mean())  # five at one point each
    W = torch.exp(-((D / s) ** 2))
    _, vectors = torch.linalg.eigh(torch.diag(W.sum(-1)) - W)
    return _from_corner(vectors[:, 1].argsort(stable=True), boxes)


def shuffled(n: int, generator: torch.Generator) -> Tensor:
    """A uniform permutation, int64 (n,)."""
    return torch.randperm(n, generator=generator)


def by_reference(boxes: Tensor, reference: Tensor) -> Tensor:
    """The order of another list of boxes (m, 4): each box takes the rank of the nearest one there, by centres.

    Equal distance: the rank that differs less from the box's own number, then the lower one. Equal ranks stay as they
    came. Returns int64 (n,).
    """
    if len(reference) == 0:
        raise UsageError("reference must hold at least one box, got 0")
    d = _distances(centres(boxes), centres(reference))  # (n, m)
    own = torch.arange(len(boxes), device=boxes.device)[:, None]
    apart = (torch.arange(len(reference), device=boxes.device) - own).abs().double()
    nearest = d <= d.amin(-1, keepdim=True)
    return apart.masked_fill(~nearest, float("inf")).argmin(-1).argsort(stable=True)


def neighbour_distance(boxes: Tensor, order: Tensor) -> float:
    """Mean distance between the centres of list neighbours, in pixels: small where the order keeps the layout."""
    c = centres(boxes)[order]
    return float((c[1:] - c[:-1]).norm(dim=-1).mean()) if len(c) > 1 else 0.0


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Between points (n, 2) and (m, 2): (n, m). Equal ones come out equal, unlike by a matrix product."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _from_corner(order: Tensor, boxes: Tensor) -> Tensor:
    first, last = centres(boxes)[order[[0, -1]]].norm(dim=-1).tolist()
    return order.flip(0) if last < first else order


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "default": lambda boxes: torch.arange(len(centres(boxes)), device=boxes.device),
    "raster": raster,
    "origin": origin,
    "mst": mst,
    "tsne": tsne,
    "tsne-small": tsne_small,
    "spectral": spectral,
}


# a screen as text


@dataclass(frozen=True)
class Element:
    """One element of a screen. tag: what it is, "StaticText" for text that no action can name."""

    tag: str
    text: str

    @property
    def numbered(self) -> bool:
        return self.tag != "StaticText"


def marks(elements: Sequence[Element], order: Tensor | Sequence[int]) -> list[int]:
    """Indices of the numbered elements in their new order: the element with the number i is `marks[i - 1]`."""
    return [i for i in _checked(order, len(elements)) if elements[i].numbered]


def serialise(elements: Sequence[Element], order: Tensor | Sequence[int]) -> str:
    """The list that an agent reads, one line per element in this order, numbered from 1 (static text has no number):

        [1] [BUTTON] [Send]
        [] [StaticText] [Your name]

    Raises UsageError where `order` is no permutation of the elements.
    """
    number = {index: i for i, index in enumerate(marks(elements, order), 1)}
    lines = []
    for index in _checked(order, len(elements)):
        element = elements[index]
        lines.append(f"[{number.get(index, '')}] [{element.tag}] [{' '.join(element.text.split())}]")
    return "\n".join(lines)


def named_element(action: str, marks: Sequence[int]) -> int | None:
    """The index, in the caller's own list, of the element that an action names: `click [3]`, `double_click [3]`,
    `hover [3]`. None for an action without an element (`type [text]`, `press [keys]`, `hotkey [keys]`).

    Raises UsageError for a number that no element has, or an action that is none of these.
    """
    found = re.fullmatch(r"\s*(\w+)\s*\[(.*)\]\s*", action, re.DOTALL)
    verb, inside = found.groups() if found else ("", "")
    if verb in ("type", "press", "hotkey"):
        return None
    if verb not in ("click", "double_click", "hover"):
        raise UsageError(
            f"action must be click, double_click, hover, type, press or hotkey with [...] behind it, got {action!r}"
        )
    if not re.fullmatch(r"\s*\d+\s*", inside) or not 1 <= int(inside) <= len(marks):
        raise UsageError(f"{verb} must name an element from 1 to {len(marks)}, got {inside!r}")
    return marks[int(inside) - 1]


def _checked(order: Tensor | Sequence[int], n: int) -> list[int]:
    indices = [int(i) for i in order]
    if sorted(indices) != list(range(n)):
        raise UsageError(f"order must be a permutation of 0 .. {n - 1}, got {indices}")
    return indices


# the method


def arrangement(segments: Segments, order: Callable[[Tensor], Tensor], owner: object = "order") -> Tensor:
    """Columns of one prompt in the order in which the model is to read them, int64 (1, n).

    segments: facts of one sample (1, n). In each set whose members have boxes, the places of the members stay, what
    stands between them too, and `order` of their boxes (K, 4), members in prompt order, says who comes where.
    Raises PromptError where only some members of a set have a box, or as `base.members` does.
    """
    (found,) = members(segments, owner, adjacent=False)
    spans = [(piece.start, piece.stop) for piece in found]
    for number in sorted({piece.set for piece in found}):
        own = [i for i, piece in enumerate(found) if piece.set == number]
        boxes = segments.box[0, [found[i].start for i in own]]  # (K, 4)
        bare = boxes.isnan().any(-1)
        if bool(bare.all()):
            continue
        if bool(bare.any()):
            missing = found[own[int(bare.long().argmax())]].member
            raise PromptError(f"{owner}: member {missing} of set {number} has no box; give each member one, or none")
        for place, i in zip(own, order(boxes).tolist(), strict=True):
            spans[place] = (found[own[i]].start, found[own[i]].stop)
    columns, at = [], 0
    for piece, span in zip(found, spans, strict=True):
        columns += [torch.arange(at, piece.start), torch.arange(*span)]
        at = piece.stop
    columns.append(torch.arange(at, segments.type.shape[1]))
    return torch.cat(columns)[None].to(segments.type.device)


@dataclass(frozen=True)
class ElementOrdering(Method):
    """Lets the model read a prompt's elements in an order that follows their boxes.

    The elements are the members of a set, each with a box: mark them with `seqwise.prepare` (a part of type "set" whose
    items have a "box") and `run.bind(segments)`. Text that holds an element's number is not rewritten; `serialise`
    writes numbered lists. by="tsne" is the paper's and needs scikit-learn; for fewer than about 60 elements use
    "raster", "spectral" or "tsne-small". by="random" draws from `seed` and the prompt's own tokens.
    """

    by: Literal["default", "raster", "origin", "mst", "tsne", "tsne-small", "spectral", "random"] = "tsne"
    seed: int = param(0, ge=0, doc="of by='random'")

    slots: ClassVar[tuple[str, ...]] = ("prompt",)

    def identity(self) -> Method:
        return replace(self, by="default")

    def facts(self) -> set[str]:
        return {"set", "box"}

    def reword(self, ids: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
        columns = arrangement(segments, self._order(ids), self)
        return ids.gather(1, columns), segments.take(columns)

    def _order(self, ids: Tensor) -> Callable[[Tensor], Tensor]:
        if self.by != "random":
            return ORDERS[self.by]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(ids.sum()))
        return lambda boxes: shuffled(len(boxes), generator)
