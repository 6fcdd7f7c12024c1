"""Giraffe on a model trained on 64 tokens: do frequency maps rank alike by retrieval and by perplexity beyond that?

context   filler text, and at random places eight items, each a key and a value in one token
text      a filler follows from the one two places before it (4 of 5 times): its loss needs nearby tokens only
queries   the last eight tokens are keys; the answer is the item's value, wherever it stands
training  400 steps on 16 to 64 tokens with plain frequencies, then 40 more of the same under each map
test      64, 256 and 512 tokens: share of right answers, and nats per text token
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.lab.zoo.recall import FILLER_ID, FILLERS, KEY_ID, recall_batch, recall_model
from seqwise.methods.order.giraffe import Giraffe, randomise

TRAINED = 64  # tokens
LENGTHS = (16, 32, 64)  # of training batches, in turn
STEPS, MORE_STEPS, BATCH = 400, 40, 64
REGULAR = 0.8  # share of the fillers that follow the rule
LONG, LONGEST = 256, 512
SEQUENCES = 64  # per length and seed

MAPS: dict[str, Giraffe | None] = {
    "plain": None,
    "linear": Giraffe(linear=4.0),
    "power": Giraffe(linear=1.0, power=0.5),
    "truncated": Giraffe(linear=1.0, truncate=TRAINED),
}

CLAIMS = (
    Claim(
        key="reach",
        text="at four times the trained length a model tuned under linear scaling retrieves more",
        paper="LLaMA-13B retrieves nothing beyond its 2048 tokens; tuned with scale 4 FFQA at 8192 is 0.4434",
        direction=">",
        margin=0.05,
        baseline="plain frequencies, tuned alike",
    ),
    Claim(
        key="tuning",
        text="at four times the trained length linear scaling works better with tuning than without",
        paper="FFQA at 8192: 0.4434 against 0.2406",
        direction=">",
        margin=0.05,
        baseline="the model tuned with plain frequencies, evaluated under the same scale",
    ),
    Claim(
        key="short",
        text="tuned under linear scaling, the model loses little at the trained length",
        paper="FFQA at 2048: 0.3233 against 0.2217 without scaling",
        direction=">=",
        margin=0.05,
        baseline="plain frequencies, tuned alike",
    ),
    Claim(
        key="flat-loss",
        text="from the trained length to eight times it, the text loss of the truncated basis grows less",
        paper="the truncated basis extrapolates in perplexity",
        direction="<",
        margin=0.0,
        baseline="plain frequencies, tuned alike",
    ),
    Claim(
        key="perplexity-order",
        text="at four times the trained length the truncated basis has no higher text loss than linear scaling",
        paper="truncation has good perplexity",
        direction="<=",
        margin=0.05,
        baseline="linear scaling, tuned alike",
    ),
    Claim(
        key="retrieval-order",
        text="at four times the trained length the truncated basis retrieves less than linear scaling",
        paper="truncation has weak retrieval: perplexity and retrieval rank the methods differently",
        direction="<",
        margin=0.0,
        baseline="linear scaling, tuned alike",
    ),
    Claim(
        key="random-order",
        text="at four times the trained length a model tuned on random positions retrieves less than linear scaling",
        paper="randomisation has weak retrieval",
        direction="<",
        margin=0.0,
        baseline="linear scaling, tuned alike",
    ),
    Claim(
        key="power-drop",
        text="from the trained length to eight times it, power scaling loses more retrieval than linear scaling",
        paper="power 0.5 is best at short lengths and drops most sharply",
        direction=">",
        margin=0.0,
        baseline="linear scaling, tuned alike",
    ),
    Claim(
        key="wikiqa",
        text="answers from documents of 16384 tokens",
        paper="FFQA at 16384: 0.3933 with scale 8, 0.0 without; AltQA 0.5363 against 0.0",
        direction=">",
        margin=0.0,
        baseline="LLaMA-13B without scaling",
    ),
    Claim(
        key="xpos",
        text="a RoPE model tuned into xPos does not reach the loss of the other maps",
        paper="fine-tuning LLaMA-13B into xPos did not converge to the others' loss",
        direction=">",
        margin=0.0,
        baseline="linear scaling",
    ),
)


class Batch(NamedTuple):
    """`targets[b, j]` is to be predicted at position `L - Q + j`; `text[b, j]` says that token j follows the rule."""

    ids: Tensor  # (B, L)
    targets: Tensor  # (B, Q)
    text: Tensor  # (B, L) bool


def draw(count: int, length: int, generator: torch.Generator) -> Batch:
    """`count` sequences of `length` tokens."""
    recall = recall_batch(count, length, generator=generator)
    ids = recall.input_ids
    filler = (ids >= FILLER_ID) & (ids < KEY_ID)  # (B, L)
    text = torch.zeros_like(filler)
    text[:, 2:] = filler[:, 2:] & filler[:, :-2]
    regular = text & (torch.rand(ids.shape, generator=generator) < REGULAR)
    for j in range(2, length):
        follows = FILLER_ID + (5 * (ids[:, j - 2] - FILLER_ID) + 3) % FILLERS
        ids[:, j] = torch.where(regular[:, j], follows, ids[:, j])
    return Batch(ids, recall.targets, text)


def losses(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Per sequence: nats per text token, nats per answer, share of right answers, (B,) each."""
    ids, Q = batch.ids, batch.targets.shape[1]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits  # (B, L, V)
    nats = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    told = batch.text[:, 1:]
    answers = nn.functional.cross_entropy(logits[:, -Q:].transpose(1, 2), batch.targets, reduction="none")
    right = (logits[:, -Q:].argmax(-1) == batch.targets).double()
    return (nats * told).sum(-1) / told.sum(-1).clamp(min=1), answers.mean(-1), right.mean(-1)


def train(model: Any, steps: int, rate: float, generator: torch.Generator) -> None:
    """AdamW on text and answers alike, the rate falling to 0; leaves the model in eval mode."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / steps)
    for step in range(steps):
        text, answers, _ = losses(model, draw(BATCH, LENGTHS[step % len(LENGTHS)], generator))
        optimizer.zero_grad(set_to_none=True)
        (text.mean() + answers.mean()).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def tuned(base: nn.Module, seed: int, how: Giraffe | str | None) -> nn.Module:
    """A copy of the base model with 10 % more steps: under a map, on "random" positions, or plain."""
    model = copy.deepcopy(base)
    undo = how.apply(model) if isinstance(how, Giraffe) else None
    if how == "random":
        undo = randomise(model, torch.Generator().manual_seed(seed))
    train(model, MORE_STEPS, 1e-3, torch.Generator().manual_seed(1_000_003 + seed))
    if undo is not None:
        undo()
    return model


@torch.no_grad()
def evaluate(model: Any, method: Giraffe | None, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Nats per text token and share of right answers, per sequence, (SEQUENCES,) each."""
    found = []
    generator = torch.Generator().manual_seed(2_000_003 + 1_000 * length + seed)
    with nullcontext() if method is None else method.on(model):
        for _ in range(0, SEQUENCES, 8):
            text, _, right = losses(model, draw(8, length, generator))
            found.append((text, right))
    return torch.cat([text for text, _ in found]), torch.cat([right for _, right in found])


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    progress("training")
    base = recall_model(seed)
    train(base, STEPS, 3e-3, torch.Generator().manual_seed(seed))
    models = {}
    for name, how in {**MAPS, "random": "random"}.items():
        progress(f"tuning: {name}")
        models[name] = tuned(base, seed, how)
    progress("evaluating")
    nats: dict[tuple[str, int], Tensor] = {}
    right: dict[tuple[str, int], Tensor] = {}
    for name, model in models.items():
        for length in (TRAINED, LONG, LONGEST):
            nats[name, length], right[name, length] = evaluate(model, MAPS.get(name), length, seed)
    untuned = evaluate(models["plain"], MAPS["linear"], LONG, seed)[1]

    def pair(ours: Tensor, baseline: Tensor) -> Measured:
        return Measured(ours.tolist(), baseline.tolist())

    def growth(values: dict[tuple[str, int], Tensor], name: str) -> Tensor:
        return values[name, LONGEST] - values[name, TRAINED]

    return {
        "reach": pair(right["linear", LONG], right["plain", LONG]),
        "tuning": pair(right["linear", LONG], untuned),
        "short": pair(right["linear", TRAINED], right["plain", TRAINED]),
        "flat-loss": pair(growth(nats, "truncated"), growth(nats, "plain")),
        "perplexity-order": pair(nats["truncated", LONG], nats["linear", LONG]),
        "retrieval-order": pair(right["truncated", LONG], right["linear", LONG]),
        "random-order": pair(right["random", LONG], right["linear", LONG]),
        "power-drop": pair(-growth(right, "power"), -growth(right, "linear")),
    }


REPRODUCTION = Reproduction(
    slug="giraffe",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A two-layer Llama (head dimension 32) trained on 64 tokens instead of LLaMA-13B on 2048; the paper tunes on "
        "twice the trained length, here tuning stays inside it. An item is one token, so retrieval needs no order."
    ),
    not_testable={
        "wikiqa": "needs the 13B model, instruction tuning and documents of 16384 tokens",
        "xpos": "whether a 13B model converges cannot be told from one of width 64",
    },
)
