"""Token Recycling on the grammar model: the same text, in how many forwards?

A forward is one call of the model, the prompt's own included: plain generation needs one per new token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.lab.zoo.grammar import stories, train_grammar
from seqwise.methods.decode.token_recycling import TokenRecycling

STEPS = 400
PROMPTS = 12  # per seed
LENGTH = 32  # words of a prompt
NEW = 64  # words generated after it
FEW = 10  # nodes of the smaller tree
LOOKUP = 10  # tokens that prompt lookup drafts, the library's usual setting

CLAIMS = (
    Claim(
        key="same-text",
        text="the greedy text is the plain model's, word by word",
        paper="lossless",
        direction=">=",
        margin=0.001,
        baseline="every word the same",
    ),
    Claim(
        key="forwards",
        text="a generated token needs less than half a forward",
        paper="about 2 times as fast as plain decoding (7B to 33B)",
        direction="<",
        margin=0.5,
        baseline="forwards per token of plain greedy decoding",
    ),
    Claim(
        key="prompt-lookup",
        text="fewer forwards per token than prompt lookup",
        paper="about 30 % faster than earlier training-free methods, prompt lookup among them",
        direction="<",
        margin=0.0,
        baseline=f"forwards per token of prompt lookup with {LOOKUP} drafted tokens",
    ),
    Claim(
        key="hot",
        text="a table that earlier prompts have filled saves forwards",
        paper="a cold start loses a few percent",
        direction="<",
        margin=0.0,
        baseline="forwards per token with an empty table for each prompt",
    ),
    Claim(
        key="nodes",
        text="a larger tree saves forwards",
        paper="80 nodes, chosen because more nodes accept more",
        direction="<",
        margin=0.0,
        baseline=f"forwards per token with {FEW} nodes",
    ),
    Claim(
        key="sampled-surprise",
        text="sampled text is no more predictable than the model's distribution makes it",
        paper="none: the official code is greedy only",
        direction=">=",
        margin=0.1,
        baseline="entropy of the distribution that each word was drawn from, nats",
    ),
    Claim(
        key="wall-clock",
        text="decoding is about twice as fast, about 25 % faster than Medusa",
        paper="2.09 times on 7B: 107.52 tokens per second",
        direction=">",
        margin=0.0,
        baseline="plain decoding and Medusa",
    ),
)


@contextmanager
def forwards(model: Any) -> Iterator[list[int]]:
    """Counts calls of the model, in a list of one number."""
    count = [0]

    def hook(*_: Any) -> None:
        count[0] += 1

    handle = model.register_forward_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


def generated(model: Any, prompt: Tensor, **options: Any) -> tuple[Tensor, float]:
    """The new words (NEW,) behind a prompt (n,), and forwards per word."""
    with forwards(model) as count:
        ids = model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=NEW, do_sample=False, **options
        )
    return ids[0, len(prompt) :], count[0] / NEW


@torch.no_grad()
def surprise_and_entropy(model: Any, ids: Tensor, start: int) -> tuple[float, float]:
    """Means over words `start`.. of ids (n,), in nats: -log p(word), and the entropy of p."""
    logp = model(ids[None], use_cache=False).logits[0, start - 1 : -1].double().log_softmax(-1)  # (NEW, V)
    surprise = -logp.gather(-1, ids[start:, None])
    return float(surprise.mean()), float(-(logp.exp() * logp).sum(-1).mean())


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    progress("training the grammar model")
    model = train_grammar(seed, STEPS)
    prompts = stories(PROMPTS, LENGTH, f"prompts {seed}")
    plain = [generated(model, prompt) for prompt in prompts]
    lookup = [generated(model, prompt, prompt_lookup_num_tokens=LOOKUP)[1] for prompt in prompts]
    arms: dict[str, list[tuple[Tensor, float]]] = {}
    for name, method in (
        ("hot", TokenRecycling()),
        ("cold", TokenRecycling(hot=False)),
        ("few", TokenRecycling(nodes=FEW)),
    ):
        progress(f"decoding, {name}")
        with method.on(model):
            arms[name] = [generated(model, prompt) for prompt in prompts]
    progress("sampling")
    with TokenRecycling().on(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0}  # 0: no cut, where generate cuts at 50
        sampled = [
            model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **options)[0]
            for prompt in prompts
        ]
    surprises, entropies = zip(*(surprise_and_entropy(model, ids, LENGTH) for ids in sampled), strict=True)
    equal = [
        float((text == expected).double().mean()) for (text, _), (expected, _) in zip(arms["hot"], plain, strict=True)
    ]
    cost = {name: [each for _, each in runs] for name, runs in arms.items()}
    return {
        "same-text": Measured(equal, [1.0] * PROMPTS),
        "forwards": Measured(cost["hot"], [each for _, each in plain]),
        "prompt-lookup": Measured(cost["hot"], lookup),
        "hot": Measured(cost["hot"], cost["cold"]),
        "nodes": Measured(cost["hot"], cost["few"]),
        "sampled-surprise": Measured(surprises, entropies),
    }


REPRODUCTION = Reproduction(
    slug="token-recycling",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A two-layer model of 84 words and regular stories instead of Vicuna and Spec-Bench, so drafts are easier than "
        "in real text; forwards are counted, not seconds."
    ),
    not_testable={
        "wall-clock": "an 81-token forward costs a step's time only where memory bandwidth is the limit, and no Medusa "
        "heads exist for a model of this size"
    },
)
