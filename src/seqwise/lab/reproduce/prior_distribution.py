"""Prior influence in a small model that counts: frequent answers are right more often, and one tuned layer may help.

    counting   COUNT, n marks among fillers, ASK, the answer's token: n of 1 to 16, answers frequent by a Zipf law over a
               drawn order, so that how frequent an answer is says nothing of how large it is
    control    COPY, a letter among fillers, ASK, the letter: 16 letters alike
    prior      log p of each counting answer behind COUNT, no marks or some fillers alone, ASK

One layer, the one where the lens sees the prior enter, is tuned on half of the answers and judged on the other half.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from seqwise.insight.probe.prior_distribution import (
    Adapters,
    Item,
    PriorInfluence,
    Reading,
    computed_inside,
    logistic_slope,
    prior_layer,
    split_answers,
)
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction

NUMBERS = LETTERS = 16
MARK, ASK, COUNT, COPY = 0, 1, 2, 3
FILLER_ID, FILLERS = 4, 4
NUMBER_ID = FILLER_ID + FILLERS  # number n has the id NUMBER_ID + n - 1
LETTER_ID = NUMBER_ID + NUMBERS
VOCABULARY = LETTER_ID + LETTERS
LENGTH = 24  # tokens between the task's token and ASK
LAYERS, WIDTH = 3, 64
ZIPF = 1.5  # the k-th answer's frequency is 1 / k^1.5
STEPS, WARM_UP, BATCH, RATE = 800, 50, 64, 3e-3
EACH = 24  # test items per answer, and per letter
TUNING = 960  # items
FOLDS = 6  # of test items, for slopes and gains
TUNE = PriorInfluence(rank=8, alpha=16.0, rate=3e-3, epochs=2, batch=32)

CLAIMS = (
    Claim(
        key="slope",
        text="right answers depend on the prior: slope of log-odds on log pi, per fold of items",
        paper="tasks fail where the right answer is improbable",
        direction=">",
        margin=0.0,
        baseline="0",
    ),
    Claim(
        key="inside",
        text="the right answer is there: some layer prefers it where the model's answer is wrong (share)",
        paper="often computed inside",
        direction=">",
        margin=0.0,
        baseline="some layer prefers another wrong answer",
    ),
    Claim(
        key="held-out",
        text="one layer tuned on half of the answers: right more often on unlikely answers that were held out",
        paper="high performance on held-out answers",
        direction=">",
        margin=0.0,
        baseline="before tuning",
    ),
    Claim(
        key="prior-dominated",
        text="the gain on unlikely held-out answers is larger than on a task without a prior (per fold)",
        paper="significantly more effective for prior-dominated tasks",
        direction=">",
        margin=0.0,
        baseline="gain on copying letters",
    ),
    Claim(
        key="uncorrelated",
        text="after tuning, right held-out answers depend less on the prior (slope, per fold)",
        paper="errors are no longer correlated with the prior",
        direction="<",
        margin=0.0,
        baseline="before tuning",
    ),
    Claim(
        key="not-merely-rare",
        text="a control: answers do not merely become rare where the right one is likely (mean log pi of answers, nats)",
        paper="none",
        direction=">=",
        margin=0.2,
        baseline="before tuning",
    ),
    Claim(
        key="layer",
        text="the layer where the prior enters does as well as another: right on held-out answers",
        paper="a few layers carry the prior; tuning those suffices",
        direction=">=",
        margin=0.05,
        baseline="the mean of the other layers, tuned alike",
    ),
    Claim(
        key="prompt",
        text="a sentence that asks not to rely on the prior helps on prior-dominated tasks",
        paper="dramatic improvements",
        direction=">",
        margin=0.0,
        baseline="without it",
    ),
)


def untrained(seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=WIDTH**-0.5,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def frequencies(seed: int) -> Tensor:
    """How frequent each number is in training (NUMBERS,): Zipf's law over a drawn order."""
    order = torch.randperm(NUMBERS, generator=torch.Generator().manual_seed(seed))
    weights = torch.arange(1, NUMBERS + 1, dtype=torch.float64) ** -ZIPF
    return torch.empty_like(weights).scatter(0, order, weights / weights.sum())


def counted(numbers: Tensor, generator: torch.Generator) -> Tensor:
    """Prompts with so many marks, numbers (B,) from 1 (0 for none): (B, LENGTH + 2)."""
    B = len(numbers)
    body = FILLER_ID + torch.randint(FILLERS, (B, LENGTH), generator=generator)
    rank = torch.rand(B, LENGTH, generator=generator).argsort(-1).argsort(-1)
    return _asked(COUNT, body.masked_fill(rank < numbers[:, None], MARK))


def copied(letters: Tensor, generator: torch.Generator) -> Tensor:
    """Prompts with one letter, (B,) from 0: (B, LENGTH + 2)."""
    B = len(letters)
    body = FILLER_ID + torch.randint(FILLERS, (B, LENGTH), generator=generator)
    place = torch.randint(LENGTH, (B, 1), generator=generator)
    return _asked(COPY, body.scatter(1, place, LETTER_ID + letters[:, None]))


def _asked(task: int, body: Tensor) -> Tensor:
    ends = torch.full((len(body), 1), task), torch.full((len(body), 1), ASK)
    return torch.cat([ends[0], body, ends[1]], 1)


def trained(seed: int) -> LlamaForCausalLM:
    """Half of each batch counts, numbers by their frequencies; half copies."""
    model = untrained(seed).train()
    generator = torch.Generator().manual_seed(seed)
    weights = frequencies(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / WARM_UP, (STEPS - done) / STEPS)
    )
    for _ in range(STEPS):
        numbers = torch.multinomial(weights, BATCH // 2, replacement=True, generator=generator) + 1
        letters = torch.randint(LETTERS, (BATCH // 2,), generator=generator)
        ids = torch.cat([counted(numbers, generator), copied(letters, generator)])
        answers = torch.cat([NUMBER_ID + numbers - 1, LETTER_ID + letters])
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, 0]
        loss = nn.functional.cross_entropy(logits, answers)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def items_of(ids: Tensor, answers: Tensor, first: int, count: int) -> list[Item]:
    """Items of prompts (B, n) whose candidates are the ids first .. first + count - 1; answers (B,) from 0."""
    candidates = [[first + k] for k in range(count)]
    return [Item(row, candidates, truth) for row, truth in zip(ids.tolist(), answers.tolist(), strict=True)]


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    progress("training the model")
    model = trained(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    neutral = [counted(torch.zeros(1, dtype=torch.long), generator)[0].tolist() for _ in range(8)]
    numbers = torch.arange(NUMBERS).repeat(EACH)  # from 0; a fold is a run of whole rounds
    letters = torch.arange(LETTERS).repeat(EACH)
    count_items = items_of(counted(numbers + 1, generator), numbers, NUMBER_ID, NUMBERS)
    copy_items = items_of(copied(letters, generator), letters, LETTER_ID, LETTERS)
    log_pi = TUNE.log_prior(model, neutral, count_items[0].candidates)
    tuned_on, held_out = split_answers(log_pi, seed)
    likely = log_pi.argsort(descending=True, stable=True)[: NUMBERS // 2].tolist()

    def read(adapters: Adapters | None) -> tuple[list[Reading], list[Reading]]:
        with nullcontext() if adapters is None else adapters.on():
            counting = TUNE.read(model, count_items, [log_pi] * len(count_items))
            return counting, TUNE.read(model, copy_items, [torch.zeros(LETTERS)] * len(copy_items))

    before, before_copy = read(None)
    layer = prior_layer(torch.stack([one.rho for one in before]).nanmean(0))
    progress(f"counting {right(before):.0%}, copying {right(before_copy):.0%}; the prior enters at layer {layer}")
    known = torch.tensor(tuned_on)[torch.randint(len(tuned_on), (TUNING,), generator=generator)]
    tuning = items_of(counted(known + 1, generator), known, NUMBER_ID, NUMBERS)
    after: dict[int, tuple[list[Reading], list[Reading]]] = {}
    for one in range(1, LAYERS + 1):
        after[one] = read(TUNE.tune(model, one, tuning, seed))
        progress(f"layer {one} tuned: counting {right(after[one][0]):.0%}, copying {right(after[one][1]):.0%}")
    ours, ours_copy = after[layer]
    size = len(count_items) // FOLDS
    folds = [range(start, start + size) for start in range(0, len(count_items), size)]
    held = [i for i, item in enumerate(count_items) if item.truth in held_out]
    rare = [i for i in held if count_items[i].truth not in likely]
    common = [i for i, item in enumerate(count_items) if item.truth in likely]

    def slopes(found: list[Reading], some: list[int]) -> list[float]:
        return [slope_of(found, log_pi, count_items, [i for i in some if i in fold]) for fold in folds]

    def gain(old: list[Reading], new: list[Reading], some: list[int]) -> list[float]:
        by_fold = [[i for i in some if i in fold] for fold in folds]
        return [sum(new[i].right - old[i].right for i in rows) / len(rows) for rows in by_fold]

    def hits(found: list[Reading], some: list[int]) -> list[float]:
        return [float(found[i].right) for i in some]

    wrong = [one for one in before if not one.right]
    others = [hits(found, held) for one, (found, _) in after.items() if one != layer]
    every = list(range(len(count_items)))
    return {
        "slope": Measured(ours=slopes(before, every), baseline=[0.0] * FOLDS),
        "inside": Measured(  # one pair without a difference where nothing is wrong
            ours=[inside(one.margin) for one in wrong] or [0.0],
            baseline=[inside(one.bystander) for one in wrong] or [0.0],
        ),
        "held-out": Measured(ours=hits(ours, rare), baseline=hits(before, rare)),
        "prior-dominated": Measured(
            ours=gain(before, ours, rare), baseline=gain(before_copy, ours_copy, list(range(len(copy_items))))
        ),
        "uncorrelated": Measured(ours=slopes(ours, held), baseline=slopes(before, held)),
        "not-merely-rare": Measured(
            ours=[float(log_pi[ours[i].answer]) for i in common],
            baseline=[float(log_pi[before[i].answer]) for i in common],
        ),
        "layer": Measured(ours=hits(ours, held), baseline=[sum(row) / len(row) for row in zip(*others, strict=True)]),
    }


def right(found: list[Reading]) -> float:
    return sum(one.right for one in found) / len(found)


def inside(margin: Tensor | None) -> float:
    """Whether some layer before the last prefers it to the answer given."""
    assert margin is not None, "there are more than two candidates"
    return float(computed_inside(margin[:-1]))


def slope_of(found: list[Reading], log_pi: Tensor, items: list[Item], some: list[int]) -> float:
    """Slope of being right on log pi; 0 where there is none to fit: all alike, or separated by the prior."""
    slope = logistic_slope(
        torch.stack([log_pi[items[i].truth] for i in some]), torch.tensor([float(found[i].right) for i in some])
    ).slope
    return 0.0 if math.isnan(slope) else slope


REPRODUCTION = Reproduction(
    slug="prior-distribution",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A three-layer model of width 64 that counts marks instead of a language model; the prior is that of its training "
        "data, known exactly. Adapters are tuned at a rate of 3e-3 instead of 1e-4, for a model this small. The paper's "
        "full text was not available: definitions are ours, and it states no figures in its abstract. A slope counts as 0 "
        "where a fold is all right or all wrong, or separated by the prior."
    ),
    not_testable={
        "prompt": "a model of 40 tokens reads no sentences; `seqwise probe prior-distribution` asks a real one"
    },
)
