"""Prompts of small documents, one of which holds the answer, and a two-layer Llama that learns to find it.

    prompt     BOS, K documents, ASK, key        answer: the value of the document with that key
    document   2 to 5 tokens: fillers, and at a random place an item, a key and a value in one token

In training the first document holds the answer in most prompts, so the model learns to prefer what comes early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from seqwise.core.method import Method
from seqwise.core.segments import Segments

KEYS, VALUES, FILLERS = 24, 8, 16
FILLER_ID = KEYS * VALUES  # items are the ids below
BOS_ID, ASK_ID = FILLER_ID + FILLERS, FILLER_ID + FILLERS + 1
KEY_ID = ASK_ID + 1
VALUE_ID = KEY_ID + KEYS
VOCABULARY = VALUE_ID + VALUES
SHORTEST, LONGEST = 2, 5  # tokens of a document

DOCUMENTS = 8
FIRST = 0.7  # share of training prompts whose first document holds the answer
BATCH = 64


class Prompts(NamedTuple):
    """Prompts whose documents have the same lengths, so that a batch of them needs no padding."""

    ids: Tensor  # (B, n)
    answers: Tensor  # (B,) to be predicted at the last token
    gold: Tensor  # (B,) place of the document that holds it
    lengths: tuple[int, ...]  # of the documents

    @property
    def segments(self) -> Segments:
        """The documents as one set, numbered as they stand."""
        inside = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        member = nn.functional.pad(inside, (1, 2), value=-1).expand_as(self.ids)
        return replace(Segments.infer(self.ids, None, None), set=member.clamp(max=0), member=member)

    def permuted(self, order: Sequence[int]) -> Prompts:
        """The same prompts with document order[i] at place i."""
        _, *documents, _ = self.ids.split([1, *self.lengths, 2], dim=1)
        ids = torch.cat([self.ids[:, :1], *(documents[j] for j in order), self.ids[:, -2:]], 1)
        place = torch.tensor(order).argsort()
        return Prompts(ids, self.answers, place[self.gold], tuple(self.lengths[j] for j in order))


def rotations(count: int) -> list[list[int]]:
    """Orders in which every document is once at every place."""
    return [[(i + start) % count for i in range(count)] for start in range(count)]


def draw(count: int, generator: torch.Generator, first: float | None = None) -> Prompts:
    """first: share of the prompts whose first document holds the answer; None for every place alike."""
    K = DOCUMENTS
    lengths = torch.randint(SHORTEST, LONGEST + 1, (K,), generator=generator).tolist()
    keys = torch.rand(count, KEYS, generator=generator).argsort(-1)[:, :K]  # (B, K), all different
    values = torch.randint(VALUES, (count, K), generator=generator)
    share = 1 / K if first is None else first
    weights = torch.tensor([share] + [(1 - share) / (K - 1)] * (K - 1))
    gold = torch.multinomial(weights, count, replacement=True, generator=generator)  # (B,)
    items = keys * VALUES + values
    documents = []
    for j, length in enumerate(lengths):
        fillers = FILLER_ID + torch.randint(FILLERS, (count, length), generator=generator)
        place = torch.randint(length, (count, 1), generator=generator)
        documents.append(fillers.scatter(1, place, items[:, j : j + 1]))
    asked = KEY_ID + keys.gather(1, gold[:, None])
    ends = [torch.full((count, 1), token) for token in (BOS_ID, ASK_ID)]
    ids = torch.cat([ends[0], *documents, ends[1], asked], 1)
    return Prompts(ids, VALUE_ID + values.gather(1, gold[:, None])[:, 0], gold, tuple(lengths))


def batches(seed: int) -> Iterator[Prompts]:
    """Training prompts, most of them with the answer in front."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield draw(BATCH, generator, FIRST)


def model(seed: int) -> LlamaForCausalLM:
    """An untrained two-layer Llama with four query and two KV heads."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.125, max_position_embeddings=128, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    batches: Iterable[Prompts],
    steps: int,
    rate: float,
    inputs: Callable[[Prompts], dict[str, Tensor]] = lambda prompts: {},
) -> LlamaForCausalLM:
    """Trains in place on the answers of so many batches; the rate falls to 0. inputs: mask and positions of a batch."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / steps)
    for _, batch in zip(range(steps), batches, strict=False):
        logits = model(input_ids=batch.ids, use_cache=False, logits_to_keep=1, **inputs(batch)).logits[:, -1]
        loss = nn.functional.cross_entropy(logits, batch.answers)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def last_logits(model: Any, prompts: Prompts, method: Method | None = None) -> Tensor:
    """(B, V) at the last token, under a method or plain."""
    batch = {"input_ids": prompts.ids, "use_cache": False, "logits_to_keep": 1}
    if method is None:
        return model(**batch).logits[:, -1]
    with method.on(model) as run:
        run.bind(prompts.segments)
        return model(**batch).logits[:, -1]
