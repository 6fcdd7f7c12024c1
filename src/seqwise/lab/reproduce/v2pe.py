"""V2PE on prompts of many small images: does a model trained on 128 positions find a key among 8 times more images?

image     <img> 16 visual tokens </img>; one of them is an item, a key and a value in one token
prompt    images with text between them, then questions: keys that are in one image each; the answer is the value
training  128 tokens with 2 to 5 images and text; positions step by a random delta per image, or by 1
test      40 images and nothing between them: 724 tokens, 124 positions with delta = 1/16
"""

from __future__ import annotations

import random
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from seqwise.core.segments import IMAGE, TEXT, Segments
from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.methods.order.v2pe import V2PE, draw_deltas, positions

KEYS, VALUES, FILLERS = 24, 8, 16
FILLER_ID = KEYS * VALUES  # visual tokens are the ids below TEXT_ID: items, then fillers
TEXT_ID = FILLER_ID + FILLERS
OPEN_ID, CLOSE_ID = TEXT_ID + 16, TEXT_ID + 17
KEY_ID = CLOSE_ID + 1
VALUE_ID = KEY_ID + KEYS
VOCABULARY = VALUE_ID + VALUES

WINDOW = 128  # positions of training
TOKENS = 16  # per image
TRAINED = (2, 3, 5)  # images of a training prompt, in turn
MANY = 8 * max(TRAINED)
QUESTIONS = 4
STEPS, BATCH = 500, 32
PROMPTS = 40  # per seed

CLAIMS = (
    Claim(
        key="many-images",
        text="8 times more images than in training: V2PE keeps answers that ordinary positions lose",
        paper="performance drops sharply when positions exceed the window; V2PE, trained on 256K tokens, reaches 1M",
        direction=">",
        margin=0.1,
        baseline="accuracy of a model trained and used with ordinary positions",
    ),
    Claim(
        key="same-model",
        text="the same model answers more where delta keeps its positions inside the window",
        paper="a smaller delta is better once positions exceed the window",
        direction=">",
        margin=0.0,
        baseline="accuracy of the model trained with random deltas at delta = 1",
    ),
    Claim(
        key="random-training",
        text="training with random deltas is what makes a small delta work",
        paper="variable increments in training beat fixed ones",
        direction=">",
        margin=0.0,
        baseline="accuracy of a model trained with ordinary positions at the same small delta",
    ),
    Claim(
        key="few-images",
        text="random deltas in training cost nothing on prompts of the trained length",
        paper="on par with the original model on standard benchmarks",
        direction=">=",
        margin=0.05,
        baseline="accuracy of a model trained and used with ordinary positions",
    ),
    Claim(
        key="million-tokens",
        text="after training on 256K tokens, multimodal prompts of up to 1M tokens are handled",
        paper="MM-NIAH, MileBench, Long-VQA, with InternVL2-2B",
        direction=">",
        margin=0.0,
        baseline="InternVL2-2B with ordinary positions",
    ),
)


def prompt(images: int, questions: int, draw: random.Random, length: int | None = None) -> tuple[list[int], list[int]]:
    """Ids of one prompt and the answers at its last `questions` tokens; with `length`, text fills it up to that."""
    keys = draw.sample(range(KEYS), questions)
    others = [key for key in range(KEYS) if key not in keys]
    held = keys + [draw.choice(others) for _ in range(images - questions)]
    values = [draw.randrange(VALUES) for _ in held]
    spare = 0 if length is None else length - images * (TOKENS + 2) - questions
    cuts = sorted(draw.randint(0, spare) for _ in range(images))
    gaps = [stop - start for start, stop in zip([0, *cuts], [*cuts, spare], strict=True)]
    ids: list[int] = []
    for gap, i in zip(gaps, draw.sample(range(images), images), strict=False):
        inside = [FILLER_ID + draw.randrange(FILLERS) for _ in range(TOKENS)]
        inside[draw.randrange(TOKENS)] = held[i] * VALUES + values[i]
        ids += [*_text(gap, draw), OPEN_ID, *inside, CLOSE_ID]
    ids += _text(gaps[-1], draw)
    return ids + [KEY_ID + key for key in keys], [VALUE_ID + value for value in values[:questions]]


def prompts(count: int, images: int, questions: int, seed: str, length: int | None = None) -> tuple[Tensor, Tensor]:
    """ids (count, n) and answers (count, questions); the seed alone decides them."""
    draw = random.Random(f"v2pe {seed}")
    ids, answers = zip(*(prompt(images, questions, draw, length) for _ in range(count)), strict=True)
    return torch.tensor(ids), torch.tensor(answers)


def train(seed: int, deltas: Literal["random", "ordinary"]) -> LlamaForCausalLM:
    """A two-layer Llama; both kinds see the same prompts and begin with the same weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.125, max_position_embeddings=WINDOW, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / STEPS)
    for step in range(STEPS):
        images = TRAINED[step % len(TRAINED)]
        ids, answers = prompts(BATCH, images, min(images, QUESTIONS), f"train {seed} {step}", WINDOW)
        delta = draw_deltas((BATCH, images), generator) if deltas == "random" else 1.0
        logits = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions(ids < TEXT_ID, delta),
            use_cache=False, logits_to_keep=answers.shape[1],
        ).logits  # fmt: skip
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracies(model: Any, method: V2PE | None, ids: Tensor, answers: Tensor) -> list[float]:
    """Share of right answers per prompt, under a method or plain."""
    shares = []
    for part, wanted in zip(ids.split(10), answers.split(10), strict=True):
        batch = {"input_ids": part, "attention_mask": torch.ones_like(part), "logits_to_keep": wanted.shape[1]}
        if method is None:
            logits = model(**batch, use_cache=False).logits
        else:
            with method.on(model) as run:
                run.bind(segments(part))
                logits = model(**batch, use_cache=False).logits
        shares += (logits.argmax(-1) == wanted).double().mean(-1).tolist()
    return shares


def segments(ids: Tensor) -> Segments:
    unknown = torch.full_like(ids, -1)
    return Segments(torch.where(ids < TEXT_ID, IMAGE, TEXT), *[unknown] * 6)


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    progress("training with random deltas")
    tuned = train(seed, "random")
    progress("training with ordinary positions")
    ordinary = train(seed, "ordinary")
    progress("answering")
    many = prompts(PROMPTS, MANY, QUESTIONS, f"many {seed}")
    few = prompts(PROMPTS, max(TRAINED), QUESTIONS, f"few {seed}", WINDOW)
    fitting = V2PE(delta=None)
    ours = accuracies(tuned, fitting, *many)
    return {
        "many-images": Measured(ours, accuracies(ordinary, None, *many)),
        "same-model": Measured(ours, accuracies(tuned, V2PE(delta=1.0), *many)),
        "random-training": Measured(ours, accuracies(ordinary, fitting, *many)),
        "few-images": Measured(accuracies(tuned, V2PE(delta=1.0), *few), accuracies(ordinary, None, *few)),
    }


def _text(count: int, draw: random.Random) -> list[int]:
    return [TEXT_ID + draw.randrange(16) for _ in range(count)]


REPRODUCTION = Reproduction(
    slug="v2pe",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "A two-layer Llama with drawn visual tokens, 16 per image, instead of InternVL2-2B with 256 per tile. An "
        "answer needs one token of one image, whatever its order there, so delta has no lower bound here."
    ),
    not_testable={"million-tokens": "needs the 2B model and long multimodal training data"},
)
