"""A layer's tokens in their order, and prompts of the methods that read through it."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from seqwise.core.method import Method
from seqwise.methods import A2SF, HiPAttention, TokenSelect
from seqwise.methods.cache.base import Held
from seqwise.testing.families import FAMILIES

LLAMA = FAMILIES["llama"]
METHODS = [
    HiPAttention(budget=6, block_q=4, window=2, sinks=1, dense=0, refresh=3),
    TokenSelect(budget=6, sinks=2, local=5, block=4, reuse=None),
]


def test_slots_in_another_order_come_back_by_token():
    order = torch.tensor([[[3, 0, -1, 2, 5]], [[-1, -1, 0, 1, 2]]])
    held = Held.of(order, order >= 0, False)
    assert held.dead.tolist() == [[1], [2]]
    assert held.arrange(order).tolist() == [[[-1, 0, 2, 3, 5]], [[-1, -1, 0, 1, 2]]]
    x = torch.randn(2, 2, 5, 3)
    assert torch.equal(held.arrange(x)[0, 1], x[0, 1, [2, 1, 3, 0, 4]])
    assert held.slot(torch.tensor([[[1, 3]], [[2, 4]]]).expand(2, 4, 2))[0].tolist() == [[1, 0]] * 4
    assert Held.of(order[1:], order[1:] >= 0, False).slots is None
    assert Held.of(order[1:], None, True) == Held(None, None)
    marked = Held.of(torch.tensor([[[0, 1, 2]]]), torch.tensor([[[True, False, True]]]), False)  # dead, not yet gone
    assert marked.dead.tolist() == [[1]] and marked.slots.tolist() == [[[1, 0, 2]]]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_mask_with_holes_is_a_prompt_without_them(method):
    model, ids, mask = LLAMA.tiny(), LLAMA.prompt(40)["input_ids"], torch.ones(1, 50, dtype=torch.long)
    mask[0, [0, 1, 2, 7, 20, 21, 22, 33, 40, 41]] = 0
    spread = torch.zeros(1, 50, dtype=torch.long).masked_scatter(mask.bool(), ids)
    logits = []
    for inputs, real in ((ids, torch.ones_like(ids)), (spread, mask)):
        with torch.no_grad(), method.on(model) as run:
            place = (real.cumsum(-1) - 1).clamp(min=0)
            out = [model(input_ids=inputs, attention_mask=real, position_ids=place, use_cache=True).logits[:, -1]]
            run.end_prompt()
            for step in range(5):
                real = torch.nn.functional.pad(real, (0, 1), value=1)
                out.append(
                    model(
                        input_ids=torch.tensor([[5 + step]]), attention_mask=real, cache=run.cache, use_cache=True,
                        position_ids=torch.tensor([[40 + step]]),
                    ).logits[:, -1]
                )  # fmt: skip
        logits.append(torch.stack(out))
    torch.testing.assert_close(*logits, **LLAMA.tolerance)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_padded_batch_counts_the_products_of_its_longest_sample(method):
    model, prompts = LLAMA.tiny(), [LLAMA.prompt(17, seed=1), LLAMA.prompt(40, seed=2)]
    counts = []
    for batch in (LLAMA.pad_left(prompts), prompts[1]):
        with torch.no_grad(), method.on(model) as run:
            model(**batch)
        counts.append(run.engine.account.pairs)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    "method",
    [
        HiPAttention(budget=0.2, block_q=3, window=2, sinks=1, dense=0),
        TokenSelect(budget=0.2, sinks=1, local=3, block=3),
    ],
    ids=str,
)
def test_samples_whose_budgets_differ_on_caches_of_one_length(method):
    """Both prompts leave 12 slots, without padding, and a share of a long prompt is more than of a short one."""
    model, prompts = LLAMA.tiny(), [LLAMA.prompt(17, seed=1), LLAMA.prompt(40, seed=2)]
    more, outs = LLAMA.prompt(10, seed=3)["input_ids"], []
    for batch in (LLAMA.pad_left(prompts), *prompts):
        mask = batch["attention_mask"]
        B, n = mask.shape
        with torch.no_grad(), (method | A2SF(budget=12, recent=2)).on(model) as run:
            at = (mask.cumsum(-1) - 1).clamp(min=0)
            model(**batch, position_ids=at, use_cache=True)
            run.end_prompt()
            assert run.cache.layers[0].live_mask().all() and run.cache.layers[0].slots == 12
            mask = torch.cat([mask, torch.ones(B, 10, dtype=torch.long)], 1)
            at = at[:, -1:] + torch.arange(1, 11)
            ids = more.expand(B, -1)
            outs.append(
                model(input_ids=ids, attention_mask=mask, position_ids=at, cache=run.cache, use_cache=True).logits
            )
    torch.testing.assert_close(outs[0], torch.cat(outs[1:]), **LLAMA.tolerance)


@dataclass(frozen=True)
class Near(Method):
    """Hides from each row of a prompt what is more than 9 tokens away."""

    slots: ClassVar[tuple[str, ...]] = ("mask",)
    abstract: ClassVar[bool] = True

    def mark(self, segments, run):
        return {"near": torch.where(segments.real, 0, -1)}

    def sees(self, query, key):
        return query["order"] - key["order"] <= 9


@pytest.mark.parametrize(
    "method",
    [
        HiPAttention(budget=6, block_q=8, window=10, sinks=1, dense=0),
        TokenSelect(budget=6, sinks=1, local=14, block=5),
    ],
    ids=str,
)
def test_another_methods_mask_hides_tokens_here_as_well(method):
    """Where the newest tokens hold all that the mask shows, what is chosen does not matter."""
    model, batch = LLAMA.tiny(), LLAMA.pad_left([LLAMA.prompt(61, seed=1), LLAMA.prompt(50, seed=2)])
    with torch.no_grad():
        with Near().on(model):
            expected = model(**batch).logits
        with (method | Near()).on(model) as run:
            logits = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], **LLAMA.tolerance)
    assert run.report().attention_work < 1
