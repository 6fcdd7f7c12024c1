"""Temporal grounding on a small model: does training on one wording of a question make the other one consistent?

A story is a sequence of events in the order in which they happen; a question names two of them with before or after
between them. Both arms see the same stories and events; one is only ever asked with before, the other with either.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from seqwise.insight.probe.temporal_grounding import consistency, says_yes
from seqwise.lab.reproduce import _order
from seqwise.lab.reproduce._order import Questions
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction

EVENTS, STORY = 32, 12
ASK, BEFORE, AFTER, YES, NO = range(EVENTS, EVENTS + 5)  # ids after those of the events
ASKED = 8  # questions per training story
ITEMS = 300  # pairs of questions per seed
STEPS, BATCH = 600, 32

CLAIMS = (
    Claim(
        key="trained-direction",
        text="asked with before, the model trained on before alone is as good as the one trained on both, within 0.05",
        paper="none: the paper's models are trained elsewhere",
        direction=">=",
        margin=0.05,
        baseline="accuracy of the model trained on both",
    ),
    Claim(
        key="inconsistent",
        text="it contradicts itself more often over a question and its reversal",
        paper="GPT-4 contradicts itself in 27.23 % of pairs at best, Llama-2-7B-chat in 71 %, Llama-2-7B in all",
        direction=">",
        margin=0.2,
        baseline="share of inconsistent pairs of the model trained on both",
    ),
    Claim(
        key="both-right",
        text="accuracy on single questions hides it: fewer pairs are right on both sides than single questions are right",
        paper="GPT-4 has both right in 64 to 68 % of pairs",
        direction="<",
        margin=0.2,
        baseline="accuracy of the same model on the questions with before",
    ),
    Claim(
        key="benchmarks",
        text="large models lag behind people and small specialised models on McTACO, CaTeRS and TempEvalQA-Bi",
        paper="TempEvalQA-Bi both right: GPT-4 0.674, Llama-2-70B-chat 0.473, Llama-2-7B-chat 0.210",
        direction="<",
        margin=0.0,
        baseline="people, and models trained on the tasks",
    ),
)


def draw(generator: torch.Generator, directions: tuple[int, ...], count: int = BATCH) -> Questions:
    """Stories and questions "x before y" or "x after y", whose answers follow each."""
    story = torch.rand(count, EVENTS, generator=generator).argsort(-1)[:, :STORY]
    places = torch.rand(count, ASKED, STORY, generator=generator).argsort(-1)[..., :2]  # (B, Q, 2), different
    shown = story.gather(1, places.flatten(1)).view_as(places)
    which = torch.randint(len(directions), (count, ASKED), generator=generator)
    asked = torch.tensor(directions)[which]
    earlier = places[..., 0] < places[..., 1]
    answers = torch.where(earlier == (asked == BEFORE), YES, NO)
    question = torch.stack([torch.full_like(asked, ASK), shown[..., 0], asked, shown[..., 1]], -1)  # (B, Q, 4)
    at = STORY + torch.arange(ASKED) * 4 + 3
    ids = torch.cat([story, question.flatten(1)], 1)
    return Questions(ids, at, answers, torch.stack([at - 2, at], -1), places)


def train(seed: int, directions: tuple[int, ...]) -> _order.GPT2LMHeadModel:
    untrained = _order.model(seed, EVENTS + 5, STORY + 4 * ASKED)
    return _order.train(untrained, partial(draw, directions=directions), STEPS, seed, STORY)


def answers(model: _order.GPT2LMHeadModel, ids: Tensor) -> list[bool]:
    """Whether the model says yes to each prompt (n, N)."""
    logps = _order.logps(model, ids, (YES, NO))
    return [bool(one) for one in says_yes(logps[:, :1], logps[:, 1:])]


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    batch = draw(torch.Generator().manual_seed(1_000 + seed), (BEFORE,), ITEMS)
    asked = batch.ids[:, : STORY + 4]  # the first question of each story
    turned = asked.clone()
    turned[:, STORY + 2] = AFTER
    gold = [bool(one) for one in batch.answers[:, 0] == YES]
    right: dict[str, list[float]] = {}
    wrong: dict[str, list[float]] = {}
    both: dict[str, list[float]] = {}
    for name, directions in (("one", (BEFORE,)), ("two", (BEFORE, AFTER))):
        progress(f"training on {name} of the directions")
        model = train(seed, directions)
        said = list(zip(answers(model, asked), answers(model, turned), strict=True))
        pairs = [consistency([pair], [g]) for pair, g in zip(said, gold, strict=True)]
        right[name] = [float(a == g) for (a, _), g in zip(said, gold, strict=True)]
        wrong[name] = [pair.inconsistent for pair in pairs]
        both[name] = [pair.acc for pair in pairs]
    return {
        "trained-direction": Measured(right["one"], right["two"]),
        "inconsistent": Measured(wrong["one"], wrong["two"]),
        "both-right": Measured(both["one"], right["one"]),
    }


REPRODUCTION = Reproduction(
    slug="temporal-grounding",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A two-layer GPT-2 of width 64 trained from scratch on stories of 12 symbols instead of pretrained models on "
        "articles; stories are told in the order of time. A second loss on the places of the events helps it learn to "
        "look them up. The word after is in no training question of the first arm, so its answers there are a habit."
    ),
    not_testable={"benchmarks": "needs pretrained models, the three data sets and people"},
)
