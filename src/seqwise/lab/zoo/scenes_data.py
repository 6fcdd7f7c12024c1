"""Drawn scenes and questions in words about them: the data of `seqwise.lab.zoo.scenes`.

    image       48 x 48 px, 8 x 8 patches of 6 px, 8 bits per channel
    object      2 to 4 of them, no two of the same shape and colour, aligned to patches, not overlapping:
                circle, square, triangle, cross  x  six colours  x  small (one patch) or large (2 x 2 patches)
    background  one 6 px texture in every patch, noise, 3 to 6 patches with a grey mark
    question    presence   is there a red circle ?                           yes, no
                colour     what colour is the circle ?                       the one circle's colour
                count      how many objects / red objects / circles / large objects ?   zero .. four
                place      where is the (red) circle ?                       top-left, top-right, bottom-left, ...
                relation   is the red circle left of the blue square ?       yes, no; also right of, above, below

The two answers of a yes/no question are equally likely; where the scene allows, half of the absent objects asked for
have a colour and a shape that it does show, on different objects. Objects on the middle lines are not asked for their
place, and objects whose centres lie less than two patches apart along an axis not for their relation along it.

Several images make two more variants, of presence, colour and place questions alone. Pictures: each image is followed
by its name ("picture one ."), and half of the questions name it ("what colour is the circle in picture two ?").
Frames: the images follow each other, and only large objects are asked for, which survive resizing an image's features
to 3 x 3. One image (the needle) shows a shape that no other image shows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

Kind: TypeAlias = Literal["presence", "colour", "count", "place", "relation"]

GRID, PATCH = 8, 6
SIDE, PATCHES = GRID * PATCH, GRID * GRID
OBJECTS = 4  # at most
TYPES: tuple[Kind, ...] = ("presence", "colour", "count", "place", "relation")
SEVERAL: tuple[Kind, ...] = ("presence", "colour", "place")  # types with several images
IMAGES = (2, 3, 4)  # numbers of images per prompt there
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = ("circles", "squares", "triangles", "crosses")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
NUMBERS = ("zero", "one", "two", "three", "four")
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
DIRECTIONS = ("left of", "right of", "above", "below")
IMAGE_TOKEN = "<image>"
NOISE = 0.06
PARTS = 5  # small; upper left, upper right, lower left, lower right quarter of a large object

_RGB = torch.tensor(
    [[0.9, 0.15, 0.15], [0.15, 0.8, 0.2], [0.2, 0.3, 0.95], [0.95, 0.9, 0.15], [0.75, 0.2, 0.85], [0.15, 0.85, 0.9]]
)
_CLUTTER_ROWS = (
    ("......", ".#....", "..#...", "...#..", "....#.", "......"),
    ("......", "......", "..##..", "..##..", "......", "......"),
    ("......", ".####.", ".#....", ".#....", ".#....", "......"),
    ("......", "......", ".####.", "......", ".####.", "......"),
)
_TEXTURE_ROWS = (
    ("######", "......", "######", "......", "######", "......"),
    ("##..##", "##..##", "##..##", "##..##", "##..##", "##..##"),
    ("#..#..", "..#..#", ".#..#.", "#..#..", "..#..#", ".#..#."),
    ("##..##", "##..##", "..##..", "..##..", "##..##", "##..##"),
)
_CHUNK = 64  # scenes drawn at once


def _tiles(rows: tuple[tuple[str, ...], ...]) -> Tensor:  # (tiles, 6, 6)
    return torch.tensor([[[float(pixel == "#") for pixel in row] for row in tile] for tile in rows])


def _shape_tiles() -> Tensor:
    """(4, 5, 6, 6): per shape the small one and the quarters of the large one."""
    tiles = torch.zeros(len(SHAPES), PARTS, PATCH, PATCH)
    for large in (False, True):
        side = PATCH * (1 + large)
        v, u = torch.meshgrid(*[(2 * torch.arange(side) + 1) / side - 1] * 2, indexing="ij")  # pixel centres in (-1, 1)
        shapes = (
            u**2 + v**2 <= 0.75,
            torch.maximum(u.abs(), v.abs()) <= 0.9,
            u.abs() <= (v + 1.2) / 2,
            torch.minimum(u.abs(), v.abs()) <= 0.34,
        )
        for s, shape in enumerate(shapes):
            if large:
                quarters = shape.float().unflatten(0, (2, PATCH)).unflatten(2, (2, PATCH)).transpose(1, 2)
                tiles[s, 1:] = quarters.flatten(0, 1)
            else:
                tiles[s, 0] = shape.float()
    return tiles


_SHAPE_TILES, _CLUTTER, _TEXTURES = _shape_tiles(), _tiles(_CLUTTER_ROWS), _tiles(_TEXTURE_ROWS)


class Thing(NamedTuple):
    """One object: indices into SHAPES and COLOURS, whether it is large, and its upper left patch."""

    shape: int
    colour: int
    large: bool
    row: int
    column: int

    @property
    def name(self) -> str:
        """Such as "red circle"."""
        return f"{COLOURS[self.colour]} {SHAPES[self.shape]}"

    @property
    def centre(self) -> tuple[float, float]:
        """(row, column) in patches, from 0 to 8."""
        half = 1.0 if self.large else 0.5
        return self.row + half, self.column + half

    @property
    def patches(self) -> tuple[int, ...]:
        """Raster indices, ascending."""
        first = self.row * GRID + self.column
        return (first, first + 1, first + GRID, first + GRID + 1) if self.large else (first,)


class Drawing(NamedTuple):
    """`n` scenes. Absent objects have -1 everywhere, patches without an object have owner and part -1."""

    pixels: Tensor  # (n, 3, 48, 48) uint8
    owner: Tensor  # (n, 64) int64, index of the object
    part: Tensor  # (n, 64) int64: 0 small, 1..4 the quarters of a large object in raster order
    objects: Tensor  # (n, 4, 5) int64: shape, colour, large, row, column

    def things(self) -> list[list[Thing]]:
        """Per scene its objects."""
        return [
            [Thing(s, c, bool(big), row, column) for s, c, big, row, column in scene if s >= 0]
            for scene in self.objects.tolist()
        ]


@dataclass(frozen=True)
class Example:
    """One prompt. `relevant` indexes the prompt's visual tokens, 64 per image, and lists the patches of the objects
    that the question is about: the first patch of each object, then their other patches. It is empty where the
    question is about nothing in the images (an absent object, a count of zero)."""

    pixels: Tensor  # (images, 3, 48, 48) uint8
    owner: Tensor  # (images, 64) int64: the object on each patch, or -1
    things: tuple[tuple[Thing, ...], ...]  # per image
    type: Kind
    question: str
    answer: str
    prompt: str  # the question with an "<image>" for each image before it
    relevant: tuple[int, ...]
    needle: int  # the image that the question is about, -1 where it is about none of them

    def images(self) -> list[Image]:
        """The images for a processor. Needs Pillow."""
        from PIL import Image

        return [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in self.pixels]

    def messages(self) -> list[dict[str, Any]]:
        """The prompt as one chat message, images included."""
        texts = self.prompt.split(IMAGE_TOKEN)
        content: list[dict[str, Any]] = []
        for image, text in zip(self.images(), texts[1:], strict=True):
            content.append({"type": "image", "image": image})
            if text.strip():
                content.append({"type": "text", "text": text.strip()})
        return [{"role": "user", "content": content}]


def compose(
    n: int,
    generator: torch.Generator,
    first: Tensor | None = None,
    banned: Tensor | None = None,
    large: float = 0.3,
    most_large: int = 2,
) -> Drawing:
    """Draws `n` scenes.

    first: (n,) shape * 6 + colour of object 0, which is then large if `large` is above one half; -1 leaves it free.
    banned: (n, 4) bool, shapes that no other object may have. large: probability of a large object, of which a scene
    holds at most `most_large`.
    """
    pairs = len(SHAPES) * len(COLOURS)
    shape_of, colour_of = torch.arange(pairs) // len(COLOURS), torch.arange(pairs) % len(COLOURS)
    # Half of the scenes lean to one colour or shape, else nearly every count by colour would be zero or one.
    liking = torch.rand(n, pairs, generator=generator)
    theme = torch.randint(pairs, (n, 1), generator=generator)
    by_colour = torch.rand(n, 1, generator=generator) < 0.5
    liked = torch.where(by_colour, colour_of == colour_of[theme], shape_of == shape_of[theme])
    liking = liking + 0.4 * liked * (torch.rand(n, 1, generator=generator) < 0.5)
    if banned is not None:
        liking = liking - 10.0 * banned[:, shape_of]
    forced = torch.full((n,), -1) if first is None else first
    liking = liking + 100.0 * (torch.arange(pairs) == forced[:, None])
    pair = liking.argsort(-1, descending=True)[:, :OBJECTS]  # (n, 4)
    exists = torch.arange(OBJECTS) < torch.randint(2, OBJECTS + 1, (n, 1), generator=generator)
    big = torch.rand(n, OBJECTS, generator=generator) < large
    if large > 0.5:
        big[:, 0] |= forced >= 0
    big &= (big & exists).cumsum(-1) <= most_large

    free = torch.ones(n, GRID, GRID, dtype=torch.bool)
    owner, part = torch.full((n, PATCHES), -1), torch.full((n, PATCHES), -1)
    anchor = torch.zeros(n, OBJECTS, dtype=torch.long)
    scene = torch.arange(n)
    for k in range(OBJECTS):
        room = torch.zeros_like(free)
        room[:, :-1, :-1] = free[:, :-1, :-1] & free[:, 1:, :-1] & free[:, :-1, 1:] & free[:, 1:, 1:]
        fits = torch.where(big[:, k, None, None], room, free).flatten(1)  # (n, 64)
        anchor[:, k] = ((torch.rand(n, PATCHES, generator=generator) + 0.01) * fits).argmax(-1)
        for quarter, step in enumerate((0, 1, GRID, GRID + 1)):
            here = exists[:, k] & (big[:, k] | (quarter == 0))
            cell = anchor[here, k] + step
            owner[scene[here], cell] = k
            part[scene[here], cell] = torch.where(big[here, k], quarter + 1, 0)
            free.view(n, -1)[scene[here], cell] = False
    facts = torch.stack([shape_of[pair], colour_of[pair], big.long(), anchor // GRID, anchor % GRID], -1)
    objects = torch.where(exists[..., None], facts, -1)  # (n, 4, 5)
    return Drawing(_paint(objects, owner, part, generator), owner, part, objects)


def _paint(objects: Tensor, owner: Tensor, part: Tensor, generator: torch.Generator) -> Tensor:
    n = len(owner)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    texture = _TEXTURES[torch.randint(len(_TEXTURES), (n,), generator=generator)]  # (n, 6, 6)
    ground = 0.2 + 0.1 * rand(n, 1, 1) + 0.08 * texture
    patches = ground[:, None, None].expand(n, PATCHES, 3, PATCH, PATCH)

    marks = 3 + torch.randint(4, (n, 1), generator=generator)
    rank = (rand(n, PATCHES) + 2.0 * (owner >= 0)).argsort(-1).argsort(-1)
    mark = _CLUTTER[torch.randint(len(_CLUTTER), (n, PATCHES), generator=generator)] * (rank < marks)[..., None, None]
    grey = (0.5 + 0.4 * rand(n, PATCHES))[..., None, None, None]
    patches = torch.where(mark[:, :, None] > 0, grey, patches)

    held = owner.clamp(min=0)
    shape, colour = objects[..., 0].gather(1, held), objects[..., 1].gather(1, held)  # (n, 64), -1 never drawn
    tile = _SHAPE_TILES[shape, part.clamp(min=0)] * (owner >= 0)[..., None, None]  # (n, 64, 6, 6)
    light = (0.8 + 0.2 * rand(n, OBJECTS)).gather(1, held)  # (n, 64)
    paint = (_RGB[colour] * light[..., None])[..., None, None]  # (n, 64, 3, 1, 1)
    patches = torch.where(tile[:, :, None] > 0, paint, patches)

    image = patches.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, SIDE, SIDE)
    noisy = image + NOISE * torch.randn(image.shape, generator=generator)
    return (noisy.clamp(0, 1) * 255).round().to(torch.uint8)


class Asked(NamedTuple):
    """A question; `about` are (image, object) pairs, and `words` may go through `str.split`."""

    words: str
    answer: str
    about: tuple[tuple[int, int], ...]


def ask(
    kind: Kind,
    draw: random.Random,
    scenes: Sequence[Sequence[Thing]],
    picture: int | None = None,
    large_only: bool = False,
) -> Asked | None:
    """A question of one type about the images with these objects, or about image `picture` by its name.

    large_only: asks for large objects alone. None where these images allow no such question. Counts and relations are
    about one image.
    """
    scope = [
        (i, k, thing)
        for i, scene in enumerate(scenes)
        if picture is None or i == picture
        for k, thing in enumerate(scene)
    ]
    end = "?" if picture is None else f"in picture {NUMBERS[picture + 1]} ?"
    pairs = [(thing.shape, thing.colour) for _, _, thing in scope]
    eligible = [one for one in scope if one[2].large or not large_only]
    if kind == "presence":
        if draw.random() < 0.5:
            if not eligible:
                return None
            _, _, thing = draw.choice(eligible)
            about = tuple((a, b) for a, b, one in scope if one[:2] == thing[:2])
            return Asked(f"is there a {thing.name} {end}", "yes", about)
        absent = [(s, c) for s in range(len(SHAPES)) for c in range(len(COLOURS)) if (s, c) not in pairs]
        near = [(s, c) for s, c in absent if any(s == p[0] for p in pairs) and any(c == p[1] for p in pairs)]
        s, c = draw.choice(near if near and draw.random() < 0.5 else absent)
        return Asked(f"is there a {COLOURS[c]} {SHAPES[s]} {end}", "no", ())
    if kind == "colour":
        lone = [one for one in eligible if sum(one[2].shape == s for s, _ in pairs) == 1]
        if not lone:
            return None
        i, k, thing = draw.choice(lone)
        return Asked(f"what colour is the {SHAPES[thing.shape]} {end}", COLOURS[thing.colour], ((i, k),))
    if kind == "place":
        clear = [one for one in eligible if pairs.count(one[2][:2]) == 1 and GRID / 2 not in one[2].centre]
        if not clear:
            return None
        i, k, thing = draw.choice(clear)
        down, right = (x > GRID / 2 for x in thing.centre)
        alone = sum(thing.shape == s for s, _ in pairs) == 1
        name = SHAPES[thing.shape] if alone and draw.random() < 0.5 else thing.name
        return Asked(f"where is the {name} {end}", PLACES[2 * down + right], ((i, k),))
    if kind == "count":
        return _count(draw, scope, end)
    return _relation(draw, scope, end)


def _count(draw: random.Random, scope: list[tuple[int, int, Thing]], end: str) -> Asked:
    every = tuple((i, k) for i, k, _ in scope)
    if draw.random() < 0.25:
        return Asked(f"how many objects {end}", NUMBERS[len(every)], every)
    groups = [(f"{COLOURS[c]} objects", [one[2].colour == c for one in scope]) for c in range(len(COLOURS))]
    groups += [(PLURALS[s], [one[2].shape == s for one in scope]) for s in range(len(SHAPES))]
    groups += [
        ("large objects", [one[2].large for one in scope]),
        ("small objects", [not one[2].large for one in scope]),
    ]
    number = draw.choice(sorted({sum(member) for _, member in groups}))
    words, member = draw.choice([group for group in groups if sum(group[1]) == number])
    return Asked(f"how many {words} {end}", NUMBERS[number], tuple(x for x, m in zip(every, member, strict=True) if m))


def _relation(draw: random.Random, scope: list[tuple[int, int, Thing]], end: str) -> Asked | None:
    answer, choices = draw.random() < 0.5, []
    for a in scope:
        for b in scope:
            down, right = (y - x for x, y in zip(a[2].centre, b[2].centre, strict=True))  # of b, seen from a
            for step, (less, more) in ((right, DIRECTIONS[:2]), (down, DIRECTIONS[2:])):
                if abs(step) >= 2:
                    choices.append((a, b, less if (step > 0) == answer else more))
    if not choices:
        return None
    a, b, direction = draw.choice(choices)
    words = f"is the {a[2].name} {direction} the {b[2].name} {end}"
    return Asked(words, "yes" if answer else "no", (a[:2], b[:2]))


def scenes(n: int, seed: int, types: Sequence[Kind] = TYPES) -> list[Example]:
    """`n` questions about one image each; the types take turns. A longer list of the same seed begins with the shorter.

    Raises:
        ValueError: n < 1, or a type that is none of TYPES.
    """
    _check("scenes", n, types, TYPES)
    generator, draw = _sources(f"scenes {seed}")

    def groups() -> Iterator[Drawing]:
        while True:
            yield from _split(compose(_CHUNK, generator), 1)

    return _examples(n, groups(), draw, types, named=False, large_only=False)


def multi(n: int, seed: int, images: Sequence[int] = IMAGES, types: Sequence[Kind] = SEVERAL) -> list[Example]:
    """`n` questions about several named pictures each.

    images: the numbers of pictures that prompts may have, each from 2 to 4.

    Raises:
        ValueError: n < 1, a number of images outside 2..4, or a type that is none of SEVERAL.
    """
    _check("multi", n, types, SEVERAL)
    _check_images("multi", images)
    generator, draw = _sources(f"multi {seed}")
    return _examples(n, _needles(generator, draw, images, 0.3), draw, types, named=True, large_only=False)


def frames(n: int, seed: int, images: Sequence[int] = IMAGES, types: Sequence[Kind] = SEVERAL) -> list[Example]:
    """`n` questions about large objects in a sequence of images. Arguments and errors as in `multi`."""
    _check("frames", n, types, SEVERAL)
    _check_images("frames", images)
    generator, draw = _sources(f"frames {seed}")
    return _examples(n, _needles(generator, draw, images, 0.6), draw, types, named=False, large_only=True)


def _sources(name: str) -> tuple[torch.Generator, random.Random]:
    draw = random.Random(name)
    return torch.Generator().manual_seed(draw.getrandbits(62)), draw


def needles(n: int, images: int, generator: torch.Generator, large: float) -> Drawing:
    """`n` prompts of `images` images each, as n * images scenes; one image per prompt alone shows some shape."""
    shape = torch.randint(len(SHAPES), (n,), generator=generator)
    colour = torch.randint(len(COLOURS), (n,), generator=generator)
    where = torch.randint(images, (n,), generator=generator)
    first = torch.where(torch.arange(images) == where[:, None], (shape * len(COLOURS) + colour)[:, None], -1).flatten()
    banned = torch.arange(len(SHAPES)) == shape.repeat_interleave(images)[:, None]
    return compose(n * images, generator, first, banned, large, most_large=3 if large > 0.5 else 2)


def _needles(generator: torch.Generator, draw: random.Random, images: Sequence[int], large: float) -> Iterator[Drawing]:
    while True:
        numbers = draw.choices(list(images), k=_CHUNK)
        several = {m: iter(_split(needles(numbers.count(m), m, generator, large), m)) for m in sorted(set(numbers))}
        yield from (next(several[m]) for m in numbers)


def _split(drawn: Drawing, images: int) -> list[Drawing]:
    """Scenes of several prompts -> those of each prompt, `images` of them."""
    return [Drawing(*parts) for parts in zip(*(x.split(images) for x in drawn), strict=True)]


def _examples(
    n: int,
    groups: Iterator[Drawing],
    draw: random.Random,
    types: Sequence[Kind],
    named: bool,
    large_only: bool,
) -> list[Example]:
    made: list[Example] = []
    while len(made) < n:
        drawn = next(groups)
        things, kind = drawn.things(), types[len(made) % len(types)]
        picture = draw.randrange(len(things)) if named and draw.random() < 0.5 else None
        asked = ask(kind, draw, things, picture, large_only)
        if asked is None:
            continue
        about = asked.about
        relevant = [i * PATCHES + things[i][k].patches[0] for i, k in about]
        relevant += [i * PATCHES + patch for i, k in about for patch in things[i][k].patches[1:]]
        held = {i for i, _ in about}
        made.append(
            Example(
                pixels=drawn.pixels,
                owner=drawn.owner,
                things=tuple(map(tuple, things)),
                type=kind,
                question=asked.words,
                answer=asked.answer,
                prompt=f"{preamble(len(things), named)} {asked.words}",
                relevant=tuple(relevant),
                needle=held.pop() if len(held) == 1 else -1,
            )
        )
    return made


def preamble(images: int, named: bool) -> str:
    """What precedes the question: one "<image>" per image, each with its name if they are named."""
    return " ".join(f"{IMAGE_TOKEN} picture {NUMBERS[i + 1]} ." if named else IMAGE_TOKEN for i in range(images))


def _check(name: str, n: int, types: Sequence[Kind], allowed: tuple[Kind, ...]) -> None:
    if n < 1:
        raise ValueError(f"{name}: n must be >= 1, got {n}")
    if not types or not set(types) <= set(allowed):
        raise ValueError(f"{name}: types must be some of {', '.join(allowed)}, got {types!r}")


def _check_images(name: str, images: Sequence[int]) -> None:
    if not images or not set(images) <= set(IMAGES):
        raise ValueError(f"{name}: images must be numbers from {IMAGES[0]} to {IMAGES[-1]}, got {images!r}")
