"""A two-layer model that learns to say which of two things in its context came first.

A sequence is a context and some questions on it, each of which holds two things of the context, each at a mark. The
answer is the token after a question. While it trains, a linear head reads each thing's place in the context off the
state at its mark: the lookup forms within some hundred steps so, and much later or never by answers alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

WIDTH = 64
RATE = 3e-3
WARM_UP = 50  # steps


class Questions(NamedTuple):
    """Q questions on each of B contexts of length L; all sequences are laid out alike."""

    ids: Tensor  # (B, n)
    at: Tensor  # (Q,) positions whose next token is the answer
    answers: Tensor  # (B, Q) token ids
    marks: Tensor  # (Q, 2) positions of the two things in the question
    places: Tensor  # (B, Q, 2) their places in the context, in [0, L)


def model(seed: int, vocabulary: int, length: int) -> GPT2LMHeadModel:
    """An untrained two-layer GPT-2 with four heads and learned positions; global random state is kept."""
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=length, n_embd=WIDTH, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=WIDTH**-0.5, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def train(
    model: GPT2LMHeadModel, draw: Callable[[torch.Generator], Questions], steps: int, seed: int, context: int
) -> GPT2LMHeadModel:
    """Trains in place on so many drawn batches; the rate rises for 50 steps and falls to 0. context: its length L."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        place = nn.Linear(WIDTH, context)
    parameters = [*model.parameters(), *place.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / WARM_UP) * (1 - i / steps))
    model.train()
    for _ in range(steps):
        batch = draw(generator)
        states = model.transformer(batch.ids, use_cache=False).last_hidden_state  # (B, n, WIDTH)
        logits = model.lm_head(states[:, batch.at])  # (B, Q, V)
        places = place(states[:, batch.marks])  # (B, Q, 2, L)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())
        loss = loss + nn.functional.cross_entropy(places.flatten(0, 2), batch.places.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def logps(model: GPT2LMHeadModel, ids: Tensor, labels: tuple[int, int]) -> Tensor:
    """Log-probabilities of two label tokens after the last token of ids (B, n): (B, 2)."""
    return model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].log_softmax(-1)[:, list(labels)]
