"""Token reduction beyond efficiency: its claimed roles, probed at small scale; the survey has no figures of its own.

Roles 1 and 2 on the glyph model (36 patches, one question on one of four objects) under FoPru with a quarter of the
tokens; roles 3 and 5 likewise on the scenes model, with two to four pictures a prompt. Role 4 on a language model of a first-order Markov source whose training targets are random in 20 % of the
places: all targets against the 60 % with the largest excess over a reference model that has seen a few clean ones.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from seqwise.insight.probe.token_reduction_beyond_efficiency import (
    BeyondEfficiency,
    Item,
    Roles,
    excess_loss_mask,
    lower_half_share,
    norm_variation,
    position_correlation,
    steps_to,
)
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.lab.zoo import scenes
from seqwise.lab.zoo.glyphs import PATCHES, batch, trained
from seqwise.methods.reduce.fopru import FoPru

IMAGES = 128  # per seed
QUESTIONS = 96  # per seed, about several pictures
QUARTER = 0.25
EPS = 0.05  # nats
STATES, WIDTH = 32, 32  # of the Markov source, and of its models
NOISE, SHARE = 0.2, 0.6
PAIRS, CLEAN = 256, 2048  # pairs a step; clean pairs that the reference sees
STEPS, REFERENCE_STEPS, RATE = 400, 200, 1e-2
WINDOW = 40  # steps over which gradient norms vary
BATCHES = 32  # of clean validation pairs

CLAIMS = (
    Claim(
        key="check-last",
        text="a check of the probe: a selector of the last tokens has more position bias than chance",
        paper="none",
        direction=">",
        margin=0.25,
        baseline="as many tokens drawn by chance",
    ),
    Claim(
        key="check-chance",
        text="a check of the probe: scores by chance have no rank correlation with the position",
        paper="none",
        direction="<=",
        margin=0.05,
        baseline="0",
    ),
    Claim(
        key="check-blind",
        text="a check of the probe: a model that ignores its image loses nothing with it (nats, worst layer)",
        paper="none",
        direction="<=",
        margin=1e-6,
        baseline="0",
    ),
    Claim(
        key="representation-hit",
        text="role 1: the tokens that stay are those that the question is about (share of its patches that stay)",
        paper="section 4, role 1: reduction keeps what is informative; no figure of its own",
        direction=">",
        margin=0.0,
        baseline="the share of all tokens that stay",
    ),
    Claim(
        key="representation-depth",
        text="role 1: image tokens add nothing behind layer 3 of 4 (KL in nats)",
        paper="section 4, role 1: most image tokens add nothing after early layers; no figure of its own",
        direction="<=",
        margin=EPS,
        baseline="0",
    ),
    Claim(
        key="alignment-word",
        text="role 2: the tokens that stay are closer to the answer's word (largest cosine) than chance's",
        paper="section 4, role 2: reduced tokens align better with words; no figure of its own",
        direction=">",
        margin=0.0,
        baseline="as many tokens drawn by chance",
    ),
    Claim(
        key="stability-loss",
        text="role 4: trained on selected targets, the loss on clean text is lower after equal steps (nats)",
        paper="section 4, role 4, citing Rho-1; no figure of its own",
        direction="<",
        margin=0.0,
        baseline="trained on all targets",
    ),
    Claim(
        key="stability-steps",
        text="role 4: it takes fewer steps to the loss where training on all targets ends",
        paper="section 4, role 4, citing Rho-1; no figure of its own",
        direction="<",
        margin=0.0,
        baseline="trained on all targets",
    ),
    Claim(
        key="stability-norms",
        text="role 4: gradient norms vary less from step to step (coefficient of variation)",
        paper="section 4, role 4: stability; no figure of its own",
        direction="<",
        margin=0.0,
        baseline="trained on all targets",
    ),
    Claim(
        key="hallucination",
        text="role 3: fewer tokens mean fewer objects that are not there (share of yes where the answer is no)",
        paper="section 4, role 3: less hallucination; no figure of its own",
        direction="<",
        margin=0.0,
        baseline="the model with all tokens",
    ),
    Claim(
        key="overthinking",
        text="role 3: reduction shortens reasoning without losing answers",
        paper="section 4, role 3: reasoning models spend over 15,000 tokens on what a few hundred solve",
        direction="<",
        margin=0.0,
        baseline="the model with all tokens",
    ),
    Claim(
        key="long-context",
        text="role 5: what stays carries longer inputs (area under the right answers over prompts of 2 to 4 pictures)",
        paper="section 4, role 5: coherence of long inputs; no figure of its own",
        direction=">",
        margin=0.0,
        baseline="as many tokens drawn by chance",
    ),
)


def items_of(n: int, seed: int) -> list[Item]:
    """Questions of the glyph model; relevant is the patch that holds the answer."""
    drawn = batch(n, seed)
    return [
        Item(
            {
                "input_ids": drawn.input_ids[i : i + 1],
                "attention_mask": torch.ones_like(drawn.input_ids[i : i + 1]),
                "pixel_values": drawn.pixel_values[i : i + 1],
            },
            int(drawn.answers[i]),
            relevant=torch.arange(PATCHES) == drawn.asked[i],
        )
        for i in range(n)
    ]


def questions_of(n: int, seed: int) -> list[Item]:
    """Questions of the scenes model about several pictures, half of them whether an object is there."""
    examples = scenes.multi(n, seed, types=("presence", "colour", "presence", "place"))
    made = []
    for example in examples:
        drawn = scenes.batch([example])
        present = example.answer == "yes" if example.type == "presence" else None
        made.append(Item(drawn.inputs(), int(drawn.answers[0]), present=present))
    return made


def blinded(model: Any) -> Any:
    """A copy whose decoder's attention writes nothing, so that the last token sees itself alone."""
    blind = copy.deepcopy(model)
    for layer in blind.model.language_model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    return blind


def pairs_of(found: Roles, metric: str, baseline: str | None = None) -> Measured:
    """Item by item what a row compares."""
    (row,) = [row for row in found.rows if row.metric == metric and baseline in (None, row.baseline)]
    return Measured([ours for ours, _ in row.pairs], [theirs for _, theirs in row.pairs])


class Source:
    """A Markov source: `draw(n)` gives contexts (n,) and targets (n,), of which a share `noise` is random."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.P = (3 * torch.randn(STATES, STATES, generator=self.generator)).softmax(-1)

    def draw(self, n: int, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        context = torch.randint(STATES, (n,), generator=self.generator)
        target = torch.multinomial(self.P[context], 1, generator=self.generator)[:, 0]
        luck = torch.rand(n, generator=self.generator) < noise
        return context, torch.where(luck, torch.randint(STATES, (n,), generator=self.generator), target)


def model_of(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Embedding(STATES, WIDTH), nn.GELU(), nn.Linear(WIDTH, STATES))


def trainings(seed: int) -> dict[str, Measured]:
    """Role 4: training on selected targets (ours) and on all, from one start and on one stream of pairs."""
    source = Source(seed)
    seen, truth = source.draw(CLEAN)
    reference = model_of(1000 + seed)
    optimizer = torch.optim.Adam(reference.parameters(), lr=RATE)
    for _ in range(REFERENCE_STEPS):
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(reference(seen), truth).backward()
        optimizer.step()
    stream = [source.draw(PAIRS, NOISE) for _ in range(STEPS)]
    check, right = source.draw(BATCHES * PAIRS)
    curves: dict[bool, list[float]] = {}
    norms: dict[bool, list[float]] = {}
    final: dict[bool, list[float]] = {}
    for selects in (True, False):
        model = model_of(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        curves[selects], norms[selects] = [], []
        for context, target in stream:
            losses = cross_entropy(model(context), target, reduction="none")
            if selects:
                with torch.no_grad():
                    other = cross_entropy(reference(context), target, reduction="none")
                losses = losses[excess_loss_mask(losses, other, SHARE)]
            optimizer.zero_grad(set_to_none=True)
            losses.mean().backward()
            norms[selects].append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))  # type: ignore[misc]
            optimizer.step()
            with torch.no_grad():
                clean = cross_entropy(model(check), right, reduction="none").view(BATCHES, PAIRS).mean(-1)
            curves[selects].append(float(clean.mean()))
        final[selects] = clean.tolist()
    steps = [steps_to(curves[selects], curves[False][-1]) or STEPS for selects in (True, False)]
    varied = {
        selects: [norm_variation(norms[selects][i : i + WINDOW]) for i in range(0, STEPS, WINDOW)]
        for selects in (True, False)
    }
    return {
        "stability-loss": Measured(final[True], final[False]),
        "stability-steps": Measured(steps[:1], steps[1:]),
        "stability-norms": Measured(varied[True], varied[False]),
    }


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    model = trained(seed, lambda step, loss: progress(f"training, step {step}, loss {loss:.3f}"))
    items = items_of(IMAGES, 8000 + seed)
    probe = BeyondEfficiency(max_new_tokens=1, eps=EPS, seed=seed)
    progress("probing")
    found = probe.probe(model, items, FoPru(budget=QUARTER))
    progress("probing a model that ignores its image")
    blind = probe.probe(blinded(model), items[:8], FoPru(budget=QUARTER))
    luck = torch.rand(IMAGES, PATCHES, generator=torch.Generator().manual_seed(seed))
    chance = luck >= luck.kthvalue(PATCHES - PATCHES // 4 + 1, -1, keepdim=True).values
    last = (torch.arange(PATCHES) >= PATCHES - PATCHES // 4).expand(IMAGES, -1)
    late = len(found.depth) - 1
    progress("asking about several pictures")
    pictures, processor = scenes.load()
    yes = processor.tokenizer.convert_tokens_to_ids("yes")
    several = probe.probe(pictures, questions_of(QUESTIONS, 9000 + seed), FoPru(budget=QUARTER), yes=yes)
    progress("training on noisy text")
    return {
        "check-last": Measured(*((lower_half_share(kept) - 0.5).abs().tolist() for kept in (last, chance))),
        "check-chance": Measured(position_correlation(luck).tolist(), [0.0] * IMAGES),
        "check-blind": Measured([max(blind.depth)], [0.0]),
        "representation-hit": pairs_of(found, "hit rate"),
        "representation-depth": Measured([found.depth[late]], [0.0]),
        "alignment-word": pairs_of(found, "word alignment"),
        **trainings(seed),
        "hallucination": pairs_of(several, "yes to absent objects", "the plain model"),
        "long-context": pairs_of(several, "area under recall over length"),
    }


REPRODUCTION = Reproduction(
    slug="token-reduction-beyond-efficiency",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "The paper is a survey without measurements: claims are its section 4 in our metrics. One method (FoPru, a "
        "quarter of the tokens) stands for reduction. Position bias is the distance of the lower half's share of the "
        "kept tokens from one half. Roles 3 and 5: three streams of scenes on the one model that ships, answers of one "
        "word. Role 4: the selected gradients are means over fewer targets."
    ),
    not_testable={
        "overthinking": "the models answer in one word; there is no reasoning to shorten",
    },
)
