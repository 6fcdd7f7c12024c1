"""PINE on a model that prefers early documents: does the place of the answer still matter, and how good is it?

The prompts are those of `_documents`; each is asked in eight orders, in which the answer is once at every place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from seqwise.core.method import Method
from seqwise.lab.reproduce import _documents as task
from seqwise.lab.reproduce._documents import DOCUMENTS, Prompts
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.methods.order.pine import PINE

STEPS, RATE = 400, 3e-3
PROMPTS = 256  # per seed

CLAIMS = (
    Claim(
        key="flat",
        text="accuracy depends less on the place of the document with the answer: best place minus worst place",
        paper="position bias of the documents is eliminated",
        direction="<",
        margin=0.0,
        baseline="the plain model",
    ),
    Claim(
        key="same-answer",
        text="fewer prompts are answered in more than one way over eight orders",
        paper="the output does not depend on the order of the documents",
        direction="<",
        margin=0.0,
        baseline="share of such prompts under the plain model",
    ),
    Claim(
        key="worst-place",
        text="more answers are right than plainly with the answer at the place that is worst for the plain model",
        paper="8 to 10 points on RewardBench's reasoning pairs in most cases, by removing the bias",
        direction=">",
        margin=0.0,
        baseline="accuracy of the plain model there",
    ),
    Claim(
        key="average-place",
        text="accuracy is at or above the plain model's average over the places",
        paper="gains on RewardBench, retrieval QA, molecules and maths, without training",
        direction=">=",
        margin=0.05,
        baseline="accuracy of the plain model, mean over the places",
    ),
    Claim(
        key="benchmarks",
        text="gains on RewardBench's reasoning pairs; Llama-3-70B-Instruct passes GPT-4-0125-preview there",
        paper="8 to 10 points in most cases",
        direction=">",
        margin=0.0,
        baseline="the plain model",
    ),
)


def answers(model: LlamaForCausalLM, prompts: Prompts, method: Method | None) -> tuple[Tensor, Tensor]:
    """The answer in each of the orders, and whether it is right with the answer at each place: (8, B) each."""
    found, right = [], torch.zeros(DOCUMENTS, len(prompts.ids), dtype=torch.double)
    for order in task.rotations(DOCUMENTS):
        moved = prompts.permuted(order)
        found.append(task.last_logits(model, moved, method).argmax(-1))
        right.scatter_(0, moved.gold[None], (found[-1] == moved.answers).double()[None])
    return torch.stack(found), right


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    progress("training")
    trained = task.train(task.model(seed), task.batches(seed), STEPS, RATE)
    progress("answering")
    prompts = task.draw(PROMPTS, torch.Generator().manual_seed(2_000_003 + seed))
    (ours, right), (ordinary, plainly) = (answers(trained, prompts, method) for method in (PINE(), None))

    def spread(right: Tensor) -> list[float]:
        by_place = right.mean(-1)
        return [float(by_place.max() - by_place.min())]

    def changed(found: Tensor) -> list[float]:
        return (found != found[0]).any(0).double().tolist()

    worst = int(plainly.mean(-1).argmin())
    return {
        "flat": Measured(spread(right), spread(plainly)),
        "same-answer": Measured(changed(ours), changed(ordinary)),
        "worst-place": Measured(right[worst].tolist(), plainly[worst].tolist()),
        "average-place": Measured(right.mean(0).tolist(), plainly.mean(0).tolist()),
    }


REPRODUCTION = Reproduction(
    slug="pine",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2, 3, 4),
    notes=(
        "A two-layer Llama with 4 query and 2 KV heads that looks a key up in eight small documents, instead of large "
        "models; in 70 % of its training prompts the first document holds the answer, and it has never seen documents "
        "that see each other. One value per seed for the spread over places."
    ),
    not_testable={"benchmarks": "needs capable models and the benchmarks' data"},
)
