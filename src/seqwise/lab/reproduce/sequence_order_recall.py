"""Sequence order recall on a small model: is order known from the context, and from nothing else?

A sequence of symbols that repeat after 16 places at the earliest; excerpts of 16, segments of 2. The model learns on
sequences of its own which of two segments came first, and is asked about a new one: with the excerpt before the
question, with the excerpt's symbols in another order, and without them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from seqwise.insight.probe.sequence_order_recall import choice, draw_items
from seqwise.lab.reproduce import _order
from seqwise.lab.reproduce._order import Questions
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction

SYMBOLS, EXCERPT, SEGMENT = 32, 16, 2
ASK, A, B = SYMBOLS, SYMBOLS + 1, SYMBOLS + 2  # ids after those of the symbols
ASKED = 8  # questions per training context
EDGES = (2, 5, 9, 13)
ITEMS = 100  # per bin and seed
LENGTH = 4_000  # of the sequence that is asked about
STEPS, BATCH = 400, 32

CLAIMS = (
    Claim(
        key="in-context",
        text="with the excerpt in the prompt the order of two segments is recalled",
        paper="highly accurate with the text in context",
        direction=">",
        margin=0.25,
        baseline="chance, 0.5",
    ),
    Claim(
        key="without",
        text="without the excerpt, on a sequence never seen, accuracy stays within 0.1 of chance",
        paper="below 60 %, near chance, without the text in context",
        direction="<=",
        margin=0.1,
        baseline="chance, 0.5",
    ),
    Claim(
        key="order-of-the-excerpt",
        text="it is the order of the excerpt that is used: accuracy falls when its symbols come in another order",
        paper="none: the paper's control is the missing excerpt",
        direction=">",
        margin=0.25,
        baseline="the same questions after the excerpt's symbols in a random order",
    ),
    Claim(
        key="weights",
        text="training on the text is not enough: order is not recalled from the weights",
        paper="accuracy stays near chance after training on the books, while people who read one recall its order",
        direction="<",
        margin=0.0,
        baseline="people who read the book, 155 participants",
    ),
)


def draw(generator: torch.Generator) -> Questions:
    """Contexts of symbols without repeats, and questions on pairs of segments that do not overlap."""
    symbols = torch.rand(BATCH, SYMBOLS, generator=generator).argsort(-1)[:, :EXCERPT]
    starts = torch.arange(EXCERPT - SEGMENT + 1)
    first, second = torch.nonzero((starts[:, None] - starts).abs() >= SEGMENT, as_tuple=True)
    pairs = torch.stack([first, second], -1)
    places = pairs[torch.randint(len(pairs), (BATCH, ASKED), generator=generator)]  # (B, Q, 2)
    read = (places[..., None] + torch.arange(SEGMENT)).flatten(2)  # (B, Q, 4)
    shown = symbols.gather(1, read.flatten(1)).view_as(read)
    asked = torch.cat([torch.full((BATCH, ASKED, 1), ASK), shown], -1)  # (B, Q, 5)
    at = EXCERPT + torch.arange(ASKED) * asked.shape[-1] + asked.shape[-1] - 1
    answers = torch.where(places[..., 0] < places[..., 1], A, B)
    marks = torch.stack([at - SEGMENT, at], -1)  # the last symbol of each segment
    return Questions(torch.cat([symbols, asked.flatten(1)], 1), at, answers, marks, places)


def sequence(length: int, seed: int) -> list[int]:
    """Symbols at random, none of which comes again within an excerpt."""
    rng = np.random.default_rng(seed)
    found: list[int] = []
    for _ in range(length):
        free = np.setdiff1d(np.arange(SYMBOLS), found[1 - EXCERPT :] if found else [])
        found.append(int(rng.choice(free)))
    return found


def questions(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Excerpts (n, 16) and questions (n, 5) on a sequence of its own, and the answers (n,)."""
    text = sequence(LENGTH, 1_000 + seed)
    # 14 possible starts are too few to pass as uniform in `sort_items`
    items = draw_items(LENGTH, EXCERPT, SEGMENT, EDGES, ITEMS, seed)
    excerpts, asked = [], []
    for b in range(len(EDGES) - 1):
        for n in range(ITEMS):
            excerpts.append(items.excerpt_of(text, n))
            first, second = items.segments_of(text, b, n)
            asked.append([ASK, *first, *second])
    return torch.tensor(excerpts), torch.tensor(asked), torch.from_numpy(items.answers).flatten()


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    progress("training")
    untrained = _order.model(seed, SYMBOLS + 3, EXCERPT + ASKED * (1 + 2 * SEGMENT))
    model = _order.train(untrained, draw, STEPS, seed, EXCERPT)
    progress("asking")
    excerpts, asked, answers = questions(seed)
    other = torch.rand(excerpts.shape, generator=torch.Generator().manual_seed(2_000 + seed)).argsort(-1)

    def right(context: Tensor) -> list[float]:
        said = choice(_order.logps(model, torch.cat([context, asked], 1), (A, B)))
        return (said == answers).double().tolist()

    with_it, half = right(excerpts), [0.5] * len(answers)
    return {
        "in-context": Measured(with_it, half),
        "without": Measured(right(excerpts[:, :0]), half),
        "order-of-the-excerpt": Measured(with_it, right(excerpts.gather(1, other))),
    }


REPRODUCTION = Reproduction(
    slug="sequence-order-recall",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A two-layer GPT-2 of width 64 trained on random symbols for 400 steps, instead of pretrained models on books. "
        "A second loss on the places of the segments helps it learn to look them up."
    ),
    not_testable={"weights": "needs language models trained on whole books, and people who read them"},
)
