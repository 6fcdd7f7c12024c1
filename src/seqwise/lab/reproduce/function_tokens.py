"""Function tokens in a small language model of documentation: where its loss is, what falls first, who meets features.

A two-layer model of words and punctuation on the prose of the Python documentation. Of every five paragraphs four are
trained on and counted, one is measured. Sparse features are those of a TopK autoencoder of the stream behind layer 1.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from seqwise.insight.probe.function_tokens import (
    CONTENT,
    FUNCTION,
    FunctionTokens,
    GroupedLoss,
    by_frequency,
    count_tokens,
    coverage_at,
    cumulative_coverage,
    feature_edges,
    half_fall,
    hidden_states,
    learned_features,
    mean_active,
    per_occurrence,
    token_classes,
    train_sae,
)
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.lab.zoo.text import paragraphs

BREAK = "\n"  # before each paragraph
WIDTH, LENGTH, BATCH = 128, 64, 16
CHECKPOINTS = (0, 5, 10, 20, 30, 40, 60, 80, 100, 130, 160, 200, 250, 300)  # steps
EARLY = 60
DOCUMENTS, FOLDS = 120, 6  # measured paragraphs, and groups of them in which the fall of losses is timed
FEATURES, ACTIVE, SAE_STEPS = 1024, 32, 200
REPEATS = 2  # autoencoders per checkpoint
DRAWS, TYPES = 20, 10

CLAIMS = (
    Claim(
        key="hardest",
        text="content behind function tokens is the hardest to predict (nats per token, per paragraph)",
        paper="the highest loss of the four groups throughout training (1.5B and 8B)",
        direction=">",
        margin=0.0,
        baseline="content behind content, the next hardest by type",
    ),
    Claim(
        key="hardest-early",
        text=f"it is so already after {EARLY} of {CHECKPOINTS[-1]} steps",
        paper="the highest loss of the four groups throughout training (1.5B and 8B)",
        direction=">",
        margin=0.0,
        baseline="content behind content",
    ),
    Claim(
        key="function-first",
        text="losses of function tokens fall first (step by which half of the fall is done, per group of paragraphs)",
        paper="losses of predicting function tokens fall first and soonest",
        direction="<",
        margin=0.0,
        baseline="losses of content tokens",
    ),
    Claim(
        key="cover",
        text="the ten most frequent types cover most of the features that are active anywhere (share)",
        paper="76.5 % in the middle layer of Gemma2-9B, 48.5 % and 68.3 % in a shallow and a deep one",
        direction=">",
        margin=0.0,
        baseline="ten types drawn from those that occur",
    ),
    Claim(
        key="occurrence",
        text="a control: an occurrence of a function token meets more features (share by equally many positions)",
        paper="none: its coverage is not corrected for how often a type occurs",
        direction=">",
        margin=0.0,
        baseline="as many positions of content tokens",
    ),
    Claim(
        key="growth",
        text="features grow in training (share of a dictionary that is active on a fixed text)",
        paper="the number of learned features grows with steps",
        direction=">",
        margin=0.0,
        baseline=f"after {EARLY} steps",
    ),
    Claim(
        key="scale",
        text="a larger model gains most on content behind function tokens",
        paper="from 1.5B to 8B parameters",
        direction=">",
        margin=0.0,
        baseline="the other three groups",
    ),
    Claim(
        key="steering",
        text="a feature added at the last function token changes language or answer",
        paper="examples: a reply in Chinese, Russia for the UK",
        direction=">",
        margin=0.0,
        baseline="without it",
    ),
)


@lru_cache(maxsize=1)
def documents() -> tuple[tuple[Tensor, ...], int]:
    """Paragraphs as ids of words and punctuation, each behind a break with id 0, and the number of types."""
    words = [[BREAK, *re.findall(r"\w+|[^\w\s]", text)] for text in paragraphs()]
    ids = {word: i for i, word in enumerate(dict.fromkeys(word for one in words for word in one))}
    return tuple(torch.tensor([ids[word] for word in one]) for one in words), len(ids)


def untrained(seed: int, vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, text: Tensor, generator: torch.Generator) -> None:
    """One step on random windows of the text (N,)."""
    start = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=generator)
    ids = text[start + torch.arange(LENGTH)]  # (B, n)
    logits = model(input_ids=ids, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def half_falls(groups: list[list[GroupedLoss]], column: int) -> list[float]:
    """Per fold of paragraphs when the loss of next tokens of a class has done half of its fall, the last step where
    it never falls; groups: by checkpoint."""
    found = []
    for fold in range(FOLDS):
        losses = [
            sum(float(one.total[:, column].sum()) for one in at[fold::FOLDS])
            / sum(int(one.tokens[:, column].sum()) for one in at[fold::FOLDS])
            for at in groups
        ]
        fall = float(half_fall(torch.tensor(CHECKPOINTS), torch.tensor(losses, dtype=torch.float64)))
        found.append(CHECKPOINTS[-1] if math.isnan(fall) else fall)
    return found


def hardest(groups: list[GroupedLoss]) -> Measured:
    """Nats per token of f->c and c->c, of paragraphs that have both."""
    means = [one.mean() for one in groups if bool((one.tokens[:, CONTENT] > 0).all())]
    return Measured(
        ours=[float(mean[FUNCTION, CONTENT]) for mean in means],
        baseline=[float(mean[CONTENT, CONTENT]) for mean in means],
    )


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    every, vocabulary = documents()
    trained = [one for i, one in enumerate(every) if i % 5 != seed % 5]
    measured = [one[:LENGTH] for i, one in enumerate(every) if i % 5 == seed % 5][:DOCUMENTS]
    text, counts = torch.cat(trained), count_tokens(trained, vocabulary)[0]
    classes = token_classes(counts)
    model = untrained(seed, vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    groups: list[list[GroupedLoss]] = []
    features: dict[int, list[Tensor]] = {}
    for done in range(CHECKPOINTS[-1] + 1):
        if done in CHECKPOINTS:
            groups.append(FunctionTokens().losses(model, measured, classes, special=[0]))
            progress(f"{done} of {CHECKPOINTS[-1]} steps")
        if done in (EARLY, CHECKPOINTS[-1]):
            states, seen = (
                states_of(model, text),
                torch.cat([hidden_states(model, one[None], 0)[0] for one in measured]),
            )
            features[done] = []
            for repeat in range(REPEATS):
                sae = train_sae(states, FEATURES, ACTIVE, steps=SAE_STEPS, seed=10 * seed + repeat)
                features[done].append(sae.encode(seen) > 0)
                progress(f"{done} steps: {mean_active(features[done][-1]):.0f} features per token")
        if done < CHECKPOINTS[-1]:
            model.train()
            step(model, optimizer, text, generator)
            model.eval()
    tokens = torch.cat(measured)
    told = tokens != 0  # breaks are at the beginning of each text, as BOS is
    active = features[CHECKPOINTS[-1]][0][told]
    tokens = tokens[told]
    edges, types = feature_edges(tokens, active), tokens.unique()
    order = by_frequency(counts)
    order = order[order != 0][:TYPES]
    ten = float(cumulative_coverage(edges, order)[-1])
    drawn = [
        coverage_at(active, torch.isin(tokens, types[torch.randperm(len(types), generator=generator)[:TYPES]]))
        for _ in range(DRAWS)
    ]
    by_draw = per_occurrence(active, classes[tokens] == FUNCTION, DRAWS, seed)
    grown = {at: [learned_features(one) / FEATURES for one in found] for at, found in features.items()}
    return {
        "hardest": hardest(groups[-1]),
        "hardest-early": hardest(groups[CHECKPOINTS.index(EARLY)]),
        "function-first": Measured(ours=half_falls(groups, FUNCTION), baseline=half_falls(groups, CONTENT)),
        "cover": Measured(ours=[ten] * DRAWS, baseline=drawn),
        "occurrence": Measured(ours=by_draw[:, 0].tolist(), baseline=by_draw[:, 1].tolist()),
        "growth": Measured(ours=grown[CHECKPOINTS[-1]], baseline=grown[EARLY]),
    }


def states_of(model: LlamaForCausalLM, text: Tensor) -> Tensor:
    """The stream behind layer 1 on the whole text, window by window; the first state of a window is left out: (N, D)."""
    windows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    return torch.cat([hidden_states(model, rows, 0)[:, 1:].flatten(0, 1) for rows in windows.split(64)])


REPRODUCTION = Reproduction(
    slug="function-tokens",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A two-layer model of width 128 and 28,000 words of documentation instead of models of 1.5 and 8 billion "
        "parameters on 627 billion tokens; one autoencoder of 1,024 features, trained here, instead of published ones of a "
        "million; words and punctuation instead of sub-word tokens. Coverage counts how often a type occurs; the control "
        "takes that out."
    ),
    not_testable={
        "scale": "one size of model is trained; two that differ fivefold need more text than there is",
        "steering": "a model of two layers follows no instruction whose answer could change; the paper has examples only",
    },
)
