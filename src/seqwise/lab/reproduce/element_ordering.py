"""Element ordering on drawn pages: what does a model that reads elements without coordinates know of their places?

page      rows of 5 to 9 elements; the right neighbour is mostly the nearest element
prompt    the values of all elements, one token each and X in place of one of them, then ASK
answer    the value of the element to the right of X
arms      one model per order: raster, t-SNE, random; the same pages, values, first weights and steps
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.methods.order.element_ordering import neighbour_distance, raster, shuffled, tsne

VALUES = 8
X_ID, ASK_ID = VALUES, VALUES + 1
ANSWER_ID = ASK_ID + 1
VOCABULARY = ANSWER_ID + VALUES

ROWS = (1, 2, 4, 8)  # of the training pages, in turn
PAGES, STEPS, BATCH = 64, 800, 64
TEST_PAGES, PROMPTS = 32, 32  # pages of the most rows, prompts per page
SPREAD_PAGES, ELEMENTS, CLUSTERS = 20, 60, 4  # pages for the distance of list neighbours

Arm = Literal["raster", "tsne", "random"]

CLAIMS = (
    Claim(
        key="order-matters",
        text="with elements in raster order more answers are right than in random order",
        paper="a random order costs about as much as removing all visible text (VisualWebArena)",
        direction=">",
        margin=0.1,
        baseline="accuracy of the model that is trained and asked in random order",
    ),
    Claim(
        key="as-no-layout",
        text="in random order the answers are no better than a guess that needs no layout",
        paper="a random order costs about as much as removing all visible text (VisualWebArena)",
        direction="<=",
        margin=0.05,
        baseline="the most frequent value of the page",
    ),
    Claim(
        key="tsne",
        text="with elements in t-SNE order more answers are right than in random order",
        paper="t-SNE order is the proposal for elements that come from pixels",
        direction=">",
        margin=0.0,
        baseline="accuracy of the model that is trained and asked in random order",
    ),
    Claim(
        key="neighbours",
        text="list neighbours in t-SNE order are less than half as far from each other as in random order, 60 elements",
        paper="one-dimensional t-SNE keeps what is close on the page close in the list",
        direction="<",
        margin=0.0,
        baseline="half the mean distance in random order, in pixels",
    ),
    Claim(
        key="agent",
        text="an agent from pixels alone solves more than twice as many OmniACT tasks as the best before it",
        paper="detector, t-SNE order and high-level actions; Gemini-1.5-pro and GPT-4V",
        direction=">",
        margin=0.0,
        baseline="the earlier best",
    ),
)


@dataclass(frozen=True)
class Page:
    boxes: Tensor  # (n, 4), in no order
    right: Tensor  # (n,) the element to the right, -1 at the end of a row


def page(rows: int, generator: torch.Generator) -> Page:
    """Rows 120 pixels apart, elements of a row 50 to 110 pixels apart."""

    def uniform(low: float, high: float, count: int) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    boxes: list[Tensor] = []
    right: list[int] = []
    for row in range(rows):
        count = int(torch.randint(5, 10, (1,), generator=generator))
        x = uniform(0, 80, 1) + uniform(50, 110, count).cumsum(0)
        y = 120 * row + 40 + uniform(-2, 2, count)
        size = torch.stack([uniform(20, 45, count), uniform(10, 16, count)], -1)
        c = torch.stack([x, y], -1)
        right += [len(right) + i + 1 for i in range(count - 1)] + [-1]
        boxes.append(torch.cat([c - size / 2, c + size / 2], -1))
    order = shuffled(len(right), generator)
    place = order.argsort()
    old = torch.tensor(right)[order]
    return Page(torch.cat(boxes)[order], torch.where(old >= 0, place[old.clamp(min=0)], -1))


def prompts(page: Page, count: int, order: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids (count, n + 1) with the elements in this order, and answers (count,)."""
    n = len(page.right)
    values = torch.randint(VALUES, (count, n), generator=generator)
    asked = (page.right >= 0).nonzero()[:, 0]  # elements with a right neighbour
    x = asked[torch.randint(len(asked), (count,), generator=generator)]
    answers = ANSWER_ID + values.gather(1, page.right[x][:, None])[:, 0]
    elements = values.scatter(1, x[:, None], X_ID)[:, order]
    return torch.cat([elements, torch.full((count, 1), ASK_ID)], 1), answers


def ordering(arm: Arm, pages: Sequence[Page], seed: int) -> Callable[[int], Tensor]:
    """The order of page i, each time it is read: t-SNE's is computed once, a random one is drawn anew."""
    if arm == "random":
        generator = torch.Generator().manual_seed(seed)
        return lambda i: shuffled(len(pages[i].right), generator)
    orders = [(raster if arm == "raster" else tsne)(page.boxes) for page in pages]
    return lambda i: orders[i]


def train(seed: int, arm: Arm) -> LlamaForCausalLM:
    """A two-layer Llama; all arms see the same pages and values and begin with the same weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=0.125, max_position_embeddings=128, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).train()
    generator = torch.Generator().manual_seed(seed)
    pages = [page(ROWS[i % len(ROWS)], generator) for i in range(PAGES)]
    order = ordering(arm, pages, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / STEPS)
    for step in range(STEPS):
        i = step % PAGES
        ids, answers = prompts(pages[i], BATCH, order(i), generator)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        loss = nn.functional.cross_entropy(logits, answers)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def hits(model: LlamaForCausalLM | None, seed: int, arm: Arm) -> list[float]:
    """1.0 where the answer is right, over pages that no model was trained on, the same for every arm.

    model: None answers with the most frequent value of the prompt.
    """
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    pages = [page(ROWS[-1], generator) for _ in range(TEST_PAGES)]
    order = ordering(arm, pages, 1_000_003 + seed)
    right: list[float] = []
    for i in range(TEST_PAGES):
        ids, answers = prompts(pages[i], PROMPTS, order(i), generator)
        if model is None:
            found = ANSWER_ID + (ids[..., None] == torch.arange(VALUES)).sum(1).argmax(-1)
        else:
            found = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
        right += (found == answers).double().tolist()
    return right


def clusters(n: int, generator: torch.Generator) -> Tensor:
    """Boxes (n, 4) in four clusters on a page of 1800 x 1000, in no order."""
    middle = torch.tensor([200.0, 150.0]) + torch.rand(CLUSTERS, 2, generator=generator) * torch.tensor([1400.0, 700.0])
    c = middle[torch.arange(n) % CLUSTERS] + 60 * torch.randn(n, 2, generator=generator)
    size = 10 + 40 * torch.rand(n, 2, generator=generator)
    return torch.cat([c - size / 2, c + size / 2], -1)[shuffled(n, generator)]


def distances(seed: int) -> Measured:
    """Per page, the mean distance of list neighbours in t-SNE order, and half of that in the order of arrival."""
    generator = torch.Generator().manual_seed(2_000_003 + seed)
    pages = [clusters(ELEMENTS, generator) for _ in range(SPREAD_PAGES)]
    return Measured(
        [neighbour_distance(boxes, tsne(boxes)) for boxes in pages],
        [neighbour_distance(boxes, torch.arange(ELEMENTS)) / 2 for boxes in pages],
    )


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    answered: dict[str, list[float]] = {}
    arms: tuple[Arm, ...] = ("raster", "tsne", "random")
    for arm in arms:
        progress(f"training with elements in the order {arm}")
        answered[arm] = hits(train(seed, arm), seed, arm)
    progress("measuring distances")
    return {
        "order-matters": Measured(answered["raster"], answered["random"]),
        "as-no-layout": Measured(answered["random"], hits(None, seed, "random")),
        "tsne": Measured(answered["tsne"], answered["random"]),
        "neighbours": distances(seed),
    }


REPRODUCTION = Reproduction(
    slug="element-ordering",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "Two-layer Llamas that read one token per element and no coordinates, instead of agents on screens; pages of "
        "about 56 elements. t-SNE is the paper's: perplexity 30, raw pixels, its own direction."
    ),
    not_testable={"agent": "needs the agents, a detector and the tasks"},
)
