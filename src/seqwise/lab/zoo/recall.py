"""One-hop recall: a language model that trains in seconds and fails visibly when a context token is lost.

    context   x_1 .. x_{L-Q}     filler, and at random places one item token per (key, value) pair
    queries   x_{L-Q+1} .. x_L   key tokens, each asking for one item of the context
    target    at the query for key k: the value v of the item (k, v)

An item is one token id, so a single attention read answers a query: evicting, blurring or skipping the
item's slot costs exactly that answer. Ids: items 0..191 (8 key + value), fillers 192..207, keys 208..231,
values 232..239 (only as targets).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

KEYS, VALUES, FILLERS = 24, 8, 16
FILLER_ID = KEYS * VALUES
KEY_ID = FILLER_ID + FILLERS
VALUE_ID = KEY_ID + KEYS
VOCABULARY = VALUE_ID + VALUES


class RecallBatch(NamedTuple):
    """`targets[b, j]` is to be predicted at position `L - Q + j`; `sources[b, j]` is its item's place."""

    input_ids: Tensor  # (B, L) int64
    targets: Tensor  # (B, Q) int64
    sources: Tensor  # (B, Q) int64


def recall_batch(
    batch: int,
    length: int = 64,
    *,
    generator: torch.Generator,
    items: int = 8,
    queries: int = 8,
    span: tuple[int, int] | None = None,
) -> RecallBatch:
    """Draws `batch` sequences of `length` tokens, the last `queries` of which ask for distinct items.

    span: context positions [start, stop) that may hold items; None means the whole context,
    `(0, 20)` puts all items early. Keys are distinct within a sequence; the order of the queries is random.

    Raises:
        ValueError: counts that do not fit (`queries <= items <= 24`, and `items` places within the span).
    """
    context = length - queries
    start, stop = (0, context) if span is None else span
    if batch < 1:
        raise ValueError(f"recall_batch: batch must be >= 1, got {batch}")
    if not 1 <= items <= KEYS:
        raise ValueError(f"recall_batch: items must be in [1, {KEYS}], got {items}")
    if not 1 <= queries <= items:
        raise ValueError(f"recall_batch: queries must be in [1, items] = [1, {items}], got {queries}")
    if not 0 <= start <= stop <= context:
        raise ValueError(f"recall_batch: span must lie within the context [0, {context}), got {span}")
    if stop - start < items:
        raise ValueError(
            f"recall_batch: span must have a place for each of the {items} items, got {stop - start} places"
        )

    def draw(of: int, count: int) -> Tensor:  # (batch, count) without repetition, in random order
        return torch.rand(batch, of, generator=generator).argsort(-1)[:, :count]

    keys = draw(KEYS, items)  # (B, items)
    values = torch.randint(VALUES, (batch, items), generator=generator)  # (B, items)
    places = start + draw(stop - start, items)  # (B, items)
    asked = draw(items, queries)  # (B, Q)
    tokens = FILLER_ID + torch.randint(FILLERS, (batch, context), generator=generator)  # (B, L - Q)
    tokens.scatter_(1, places, keys * VALUES + values)
    return RecallBatch(
        input_ids=torch.cat([tokens, KEY_ID + keys.gather(1, asked)], dim=1),
        targets=VALUE_ID + values.gather(1, asked),
        sources=places.gather(1, asked),
    )


def recall_model(seed: int, layers: int = 2) -> LlamaForCausalLM:
    """An untrained Llama (width 64, 2 heads, RoPE) over the task's 240 ids; global random state is kept."""
    if layers < 1:
        raise ValueError(f"recall_model: layers must be >= 1, got {layers}")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.125,  # 1 / sqrt(width): from the default 0.02 the lookup forms late or never
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def train_recall(
    seed: int,
    steps: int = 400,
    progress: Callable[[int, float], None] | None = None,
    *,
    layers: int = 2,
    lengths: Sequence[int] = (16, 32, 64),
) -> LlamaForCausalLM:
    """Trains the recall model from scratch: 64 sequences a step, their length taken in turn from `lengths`.

    AdamW, its rate falling linearly from 3e-3 to 0; the short lengths let the lookup form early.

    progress: called as `progress(step, loss)` after each step, `step` from 1, loss in nats per answer.
    Returns the model in eval mode. On a CPU the same arguments give the same weights, whatever the global
    random state, which is left as it was.
    """
    if steps < 1:
        raise ValueError(f"train_recall: steps must be >= 1, got {steps}")
    if not lengths:
        raise ValueError(f"train_recall: lengths must name at least one length, got {lengths!r}")
    model = recall_model(seed, layers).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / steps)
    for step in range(1, steps + 1):
        batch = recall_batch(64, lengths[step % len(lengths)], generator=generator)
        logits = _answer_logits(model, batch)  # (B, Q, vocabulary)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, loss.item())
    return model.eval()


def recall_accuracy(model: nn.Module, batch: RecallBatch) -> float:
    """Share of queries, in [0, 1], whose most probable next token is the target."""
    with torch.no_grad():
        answers = _answer_logits(model, batch).argmax(-1)  # (B, Q)
    return (answers == batch.targets.to(answers.device)).double().mean().item()


def _answer_logits(model: nn.Module, batch: RecallBatch) -> Tensor:
    device = next(model.parameters()).device
    output = model(input_ids=batch.input_ids.to(device), logits_to_keep=batch.targets.shape[1], use_cache=False)
    logits: Tensor = output.logits
    return logits  # (B, Q, vocabulary)
