"""Set-Based Prompting on a model that prefers early documents: is the answer the same in all orders, and how good?

The prompts are those of `_documents`; each is asked in eight orders, in which every document is once at every place.
The method is put on a model that was trained on ordinary prompts, and on one that was then trained on a few of its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from seqwise.core.method import Method
from seqwise.lab.reproduce import _documents as task
from seqwise.lab.reproduce._documents import DOCUMENTS, VALUE_ID, VALUES, Prompts
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.methods.order.set_based_prompting import SetBasedPrompting, answer_scores, positions, set_mask

STEPS, RATE = 400, 3e-3
MORE_STEPS, MORE_RATE = 100, 1e-3
PROMPTS = 256  # per seed

CLAIMS = (
    Claim(
        key="mask-alone",
        text="the order changes the answers' probabilities less than where only the mask is edited",
        paper="both edits together make the output independent of the order; neither does alone",
        direction="<",
        margin=0.01,
        baseline="largest change over eight orders with the mask alone",
    ),
    Claim(
        key="positions-alone",
        text="the order changes the answers' probabilities less than where only the positions are edited",
        paper="both edits together make the output independent of the order; neither does alone",
        direction="<",
        margin=0.01,
        baseline="largest change over eight orders with the positions alone",
    ),
    Claim(
        key="same-answer",
        text="fewer prompts are answered in more than one way over eight orders",
        paper="any permutation of the set gives the same output",
        direction="<",
        margin=0.0,
        baseline="share of such prompts under the plain model",
    ),
    Claim(
        key="worst-order",
        text="without training, more prompts are answered right than plainly in all of their orders",
        paper="accuracy is usually inside the band between the best and the worst order",
        direction=">",
        margin=0.0,
        baseline="share of prompts that the plain model answers right in every order",
    ),
    Claim(
        key="average-order",
        text="without training, accuracy drops little against the average order",
        paper="the impact on expected accuracy is small",
        direction=">=",
        margin=0.1,
        baseline="accuracy of the plain model, mean over the orders",
    ),
    Claim(
        key="after-training",
        text="after a few steps on prompts with these masks and positions the accuracy is that of the average order",
        paper="fine-tuning with such inputs recovers the loss (arXiv 2503.23483)",
        direction=">=",
        margin=0.05,
        baseline="accuracy of the plain model, trained as many steps more, mean over the orders",
    ),
    Claim(
        key="benchmarks",
        text="the same on CommonsenseQA and MMLU with the options as the set",
        paper="GPT-2, Llama-2, Llama-3, Mistral and Vicuna",
        direction=">=",
        margin=0.05,
        baseline="accuracy of the plain model, mean over the orders",
    ),
)


@dataclass(frozen=True)
class MaskAlone(SetBasedPrompting):
    """Ordinary positions."""

    slots: ClassVar[tuple[str, ...]] = ("mask",)


@dataclass(frozen=True)
class PositionsAlone(SetBasedPrompting):
    """The causal mask."""

    slots: ClassVar[tuple[str, ...]] = ("positions",)


def edited(prompts: Prompts) -> dict[str, Tensor]:
    """Mask and positions of a training batch."""
    facts = prompts.segments
    return {
        "attention_mask": set_mask(facts.set, facts.member),
        "position_ids": positions(facts.set, facts.member),
    }  # fmt: skip


def probabilities(model: LlamaForCausalLM, prompts: Prompts, method: Method | None) -> Tensor:
    """Of each answer, in each of the orders: (orders, B, answers)."""
    answers = VALUE_ID + torch.arange(VALUES)[:, None]  # (C, 1): one token each
    return torch.stack(
        [
            answer_scores(task.last_logits(model, prompts.permuted(order), method)[:, None], answers)
            for order in task.rotations(DOCUMENTS)
        ]
    )


def change(p: Tensor) -> list[float]:
    """Per prompt, by how much a probability differs over the orders at most: (orders, B, answers) -> B."""
    return (p.amax(0) - p.amin(0)).amax(-1).tolist()


def hits(p: Tensor, prompts: Prompts) -> Tensor:
    """(orders, B) 1.0 where the most probable answer is right."""
    return (p.argmax(-1) == prompts.answers - VALUE_ID).double()


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    progress("training")
    plain = task.train(task.model(seed), task.batches(seed), STEPS, RATE)
    progress("training on, with ordinary prompts")
    longer = task.train(copy.deepcopy(plain), task.batches(1_000_003 + seed), MORE_STEPS, MORE_RATE)
    progress("training on, with sets")
    tuned = task.train(copy.deepcopy(plain), task.batches(1_000_003 + seed), MORE_STEPS, MORE_RATE, edited)
    progress("answering")
    prompts = task.draw(PROMPTS, torch.Generator().manual_seed(2_000_003 + seed))
    method = SetBasedPrompting()
    ours, ordinary = probabilities(plain, prompts, method), probabilities(plain, prompts, None)
    changed = {
        name: (p.argmax(-1) != p[0].argmax(-1)).any(0).double().tolist() for name, p in (("ours", ours), ("plain", ordinary))
    }  # fmt: skip
    right, plainly = hits(ours, prompts), hits(ordinary, prompts)
    after = hits(probabilities(tuned, prompts, method), prompts)
    return {
        "mask-alone": Measured(change(ours), change(probabilities(plain, prompts, MaskAlone()))),
        "positions-alone": Measured(change(ours), change(probabilities(plain, prompts, PositionsAlone()))),
        "same-answer": Measured(changed["ours"], changed["plain"]),
        "worst-order": Measured(right[0].tolist(), plainly.amin(0).tolist()),
        "average-order": Measured(right.mean(0).tolist(), plainly.mean(0).tolist()),
        "after-training": Measured(
            after.mean(0).tolist(), hits(probabilities(longer, prompts, None), prompts).mean(0).tolist()
        ),
    }


REPRODUCTION = Reproduction(
    slug="set-based-prompting",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A two-layer Llama with 4 query and 2 KV heads that looks a key up in eight small documents, instead of large "
        "models on multiple-choice questions; in 70 % of its training prompts the first document holds the answer. "
        "The last claim that is measured is that of a later paper."
    ),
    not_testable={"benchmarks": "needs the models and the question sets"},
)
