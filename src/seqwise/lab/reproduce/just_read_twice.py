"""JRT on two synthetic tasks: which of two lists comes first, and whether a context is read once or twice.

sets      [1] list [2] list [3] -> the one token that both hold; lists of 4 and 32 tokens of 128, in either order; a
          model with two linear layers (width 48, f = 4), causal or reading all of the input in both directions; each
          is trained on both orders and tested on each
prompts   24 pairs (key and value in one token), then a key; the answer is its value; a causal model with two linear
          layers (width 16, f = 2: 7 features), trained anew for each format: D Q, D D Q, Q D Q, Q D D Q
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.lab.zoo.recall import KEY_ID, KEYS, VALUE_ID, VALUES, VOCABULARY
from seqwise.methods.order.just_read_twice import JRTModel, disjoint_sets, repeated_ids

SHORT, LONG = 4, 32
IDS = 128  # each list is drawn from half of them
SET_STEPS, PROMPT_STEPS = 1500, 1500
BATCH = 64
SET_RATE, PROMPT_RATE = 5e-3, 1e-2
EXAMPLES = 400  # per test
FORMATS = {"D Q": (1, False), "D D Q": (2, False), "Q D Q": (1, True), "Q D D Q": (2, True)}

CLAIMS = (
    Claim(
        key="order-matters",
        text="causal linear attention finds the common token better when the short list comes first",
        paper="the state needed is about the smaller set only if that comes first",
        direction=">",
        margin=0.05,
        baseline="accuracy of the same model when the long list comes first",
    ),
    Claim(
        key="order-is-nothing",
        text="read in both directions, the order of the lists does not matter",
        paper="non-causal models show no gap",
        direction=">=",
        margin=0.05,
        baseline="accuracy of the same model when the short list comes first (ours: the long one first)",
    ),
    Claim(
        key="both-directions",
        text="with the long list first, reading in both directions beats a causal model with a state of the same size",
        paper="JRT-RNN reaches 99 % of a Transformer's quality at 360M",
        direction=">",
        margin=0.1,
        baseline="accuracy of the causal model, trained alike",
    ),
    Claim(
        key="twice",
        text="reading the context twice beats reading it once: D D Q against D Q",
        paper="+11.0 points for the official prompt, over 16 recurrent models and 6 tasks",
        direction=">",
        margin=0.0,
        baseline="accuracy of a model trained and tested on D Q",
    ),
    Claim(
        key="question-first",
        text="the question before the context beats the context alone: Q D Q against D Q",
        paper="not reported apart; the official prompt mixes it with the second reading",
        direction=">",
        margin=0.0,
        baseline="accuracy of a model trained and tested on D Q",
    ),
    Claim(
        key="official-prompt",
        text="both together, the official prompt: Q D D Q against D Q",
        paper="+11.0 points over 16 recurrent models and 6 tasks",
        direction=">",
        margin=0.0,
        baseline="accuracy of a model trained and tested on D Q",
    ),
    Claim(
        key="pretrained",
        text="recurrent language models answer questions about texts better with the official prompt, without training",
        paper="+11.0 points, 16 recurrent models, 6 tasks; 11.9 times the prefill throughput of FlashAttention-2",
        direction=">",
        margin=0.0,
        baseline="the same models with the prompt D Q",
    ),
    Claim(
        key="language",
        text="JRT-RNN comes close to a Transformer in language modelling and recall",
        paper="99 % at 360M and 30B tokens, 96 % at 1.3B and 50B; 19.2 times the prefill throughput",
        direction=">=",
        margin=0.05,
        baseline="a Transformer of the same size",
    ),
)


Batch = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # step, generator -> ids (B, n), answers (B,)


def train(model: JRTModel, batch: Batch, seed: int, steps: int, rate: float) -> JRTModel:
    """Cross-entropy of the last position; warm-up of 50 steps, then a linear decay."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1, (done + 1) / 50) * (1 - done / steps))
    for step in range(steps):
        ids, answers = batch(step, generator)
        loss = cross_entropy(model(ids)[0][:, -1], answers)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def sets(count: int, first: int, second: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lists of so many tokens: ids (count, n) and the common token (count,)."""
    ids, labels = disjoint_sets(count, first, second, vocabulary=IDS, generator=generator)
    return ids, labels[:, -1]


def prompts(count: int, name: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs and a question in a format: ids (count, n) and answers (count,); equal draws for all formats."""
    repeats, question_first = FORMATS[name]
    keys = torch.rand(count, KEYS, generator=generator).argsort(-1)  # (count, 24)
    values = torch.randint(VALUES, (count, KEYS), generator=generator)
    asked = torch.randint(KEYS, (count, 1), generator=generator)
    ids = [
        repeated_ids(context, question, repeats=repeats, question_first=question_first)
        for context, question in zip(keys * VALUES + values, KEY_ID + keys.gather(1, asked), strict=True)
    ]
    return torch.stack(ids), VALUE_ID + values.gather(1, asked)[:, 0]


def finder(seed: int, prefix: int) -> JRTModel:
    """For the sets: alternately a short convolution and linear attention. Causal with prefix 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return JRTModel(IDS, 48, 2, kinds=("conv", "linear", "conv", "linear"), prefix=prefix, feature_dim=4)


def reader(seed: int) -> JRTModel:
    """For the prompts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return JRTModel(VOCABULARY, 16, 1, kinds=("linear", "linear"), prefix=0, feature_dim=2)


@torch.no_grad()
def hits(model: JRTModel, ids: Tensor, answers: Tensor) -> list[float]:
    """Per example, 1 where the last position's most probable token is the answer."""
    return (model(ids)[0][:, -1].argmax(-1) == answers).double().tolist()


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    found: dict[str, dict[str, list[float]]] = {}
    orders = {"short first": (SHORT, LONG), "long first": (LONG, SHORT)}

    def both_orders(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return sets(BATCH, *list(orders.values())[step % 2], generator)

    def test() -> torch.Generator:
        return torch.Generator().manual_seed(10_000 + seed)

    for name, prefix in (("causal", 0), ("both", LONG + SHORT + 3)):
        progress(f"sets, {name}")
        model = train(finder(seed, prefix), both_orders, seed, SET_STEPS, SET_RATE)
        found[name] = {order: hits(model, *sets(EXAMPLES, *lengths, test())) for order, lengths in orders.items()}
    answered = {}
    for name in FORMATS:
        progress(f"prompts, {name}")

        def batch(step: int, generator: torch.Generator, name: str = name) -> tuple[Tensor, Tensor]:
            return prompts(BATCH, name, generator)

        model = train(reader(seed), batch, seed, PROMPT_STEPS, PROMPT_RATE)
        answered[name] = hits(model, *prompts(EXAMPLES, name, test()))
    causal, both = found["causal"], found["both"]
    return {
        "order-matters": Measured(causal["short first"], causal["long first"]),
        "order-is-nothing": Measured(both["long first"], both["short first"]),
        "both-directions": Measured(both["long first"], causal["long first"]),
        "twice": Measured(answered["D D Q"], answered["D Q"]),
        "question-first": Measured(answered["Q D Q"], answered["D Q"]),
        "official-prompt": Measured(answered["Q D D Q"], answered["D Q"]),
    }


REPRODUCTION = Reproduction(
    slug="just-read-twice",
    claims=CLAIMS,
    measure=measure,
    notes="Lists of 4 and 32 of 128 tokens instead of up to 768 of 2048, 0.1 instead of 11 million examples. The prompt"
    " is tried on models trained for their format, with two layers: in one, a second reading forms the same keys and"
    " values again and provably changes nothing.",
    not_testable={
        "pretrained": "no pretrained recurrent language model is at hand without a download",
        "language": "needs models of 360M parameters trained on 30B tokens",
    },
)
