"""Small stories from a grammar: a language model that trains in half a minute and writes regular text.

    story      a cast (2 people, 2 things, 1 place), then sentences about it until the text is long enough
    sentence   one of 10 templates; which one follows which: three candidates with 6 : 3 : 1
    slots      WHO, OTHER the people, THING one of the things, PLACE the place, DID any verb (Zipf),
               HOW the thing's own adjective (4 of 5 times) or any

Function words follow from the template alone, slots from the cast or by chance: as in real text some tokens are
certain and others are not. One word is one token; `WORDS[id]` is its spelling. A text may begin mid-sentence.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

TEMPLATES = (
    "WHO DID the HOW THING .",
    "then OTHER DID it too .",
    "WHO and OTHER went to the PLACE .",
    "there was a THING in the PLACE .",
    "it was HOW and it was new .",
    "the THING was HOW .",
    "OTHER said that WHO DID it .",
    "after a while they left the PLACE .",
    "WHO gave the THING to OTHER .",
    "why did WHO go to the PLACE ?",
)
_LISTS = {
    "WHO": "ada ben cleo dan eva finn gus hana ivo jane kurt lea mo nina otto pia",
    "THING": "book lamp cup key ring clock drum flute kite map pen rope sack tent vase wheel",
    "PLACE": "garden harbour kitchen library market museum office park",
    "DID": "found saw took sold broke hid cleaned wanted liked lost moved painted",
    "HOW": "red old small heavy bright broken soft round",
}
CLASSES = {name: tuple(words.split()) for name, words in _LISTS.items()}
SLOTS = {**{name: name for name in CLASSES}, "OTHER": "WHO"}
WORDS = tuple(
    dict.fromkeys(
        [word for template in TEMPLATES for word in template.split() if word not in SLOTS]
        + [word for words in CLASSES.values() for word in words]
    )
)
_IDS = {word: i for i, word in enumerate(WORDS)}


def story(length: int, draw: random.Random) -> list[int]:
    """Ids of `length` consecutive words of a story, from a random word of its first sentence on."""
    if length < 1:
        raise ValueError(f"story: length must be >= 1, got {length}")
    people, things = draw.sample(CLASSES["WHO"], 2), draw.sample(CLASSES["THING"], 2)
    place = draw.choice(CLASSES["PLACE"])
    ids: list[int] = []
    at = draw.randrange(len(TEMPLATES))
    skip = draw.randrange(len(TEMPLATES[at].split()))
    while len(ids) < skip + length:
        draw.shuffle(people)
        thing = draw.choice(things)
        how = CLASSES["HOW"][CLASSES["THING"].index(thing) % len(CLASSES["HOW"])]
        filled = {
            "WHO": people[0],
            "OTHER": people[1],
            "THING": thing,
            "PLACE": place,
            "DID": draw.choices(CLASSES["DID"], [1 / rank for rank in range(1, len(CLASSES["DID"]) + 1)])[0],
            "HOW": how if draw.random() < 0.8 else draw.choice(CLASSES["HOW"]),
        }
        ids += [_IDS[filled.get(word, word)] for word in TEMPLATES[at].split()]
        step = draw.choices((1, 3, 4), (6, 3, 1))[0]
        at = (at + step) % len(TEMPLATES)
    return ids[skip : skip + length]


def stories(batch: int, length: int, seed: int | str) -> Tensor:
    """(batch, length) int64 ids of independent stories; the seed alone decides them."""
    draw = random.Random(f"stories {seed}")
    return torch.tensor([story(length, draw) for _ in range(batch)])


def grammar_model(seed: int, layers: int = 2) -> LlamaForCausalLM:
    """An untrained Llama (width 64, 2 heads, RoPE) over `WORDS`; global random state is kept."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.125,  # 1 / sqrt(width)
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def train_grammar(
    seed: int, steps: int = 400, progress: Callable[[int, float], None] | None = None, *, length: int = 96
) -> LlamaForCausalLM:
    """Trains the model from scratch on next words: 16 stories of `length` words a step.

    AdamW, its rate falling linearly from 3e-3 to 0. progress: called as `progress(step, loss)` after each step, `step`
    from 1, loss in nats per word. Returns the model in eval mode; the seed alone decides its weights on one CPU.
    """
    if steps < 1:
        raise ValueError(f"train_grammar: steps must be >= 1, got {steps}")
    model = grammar_model(seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / steps)
    for step in range(1, steps + 1):
        ids = stories(16, length, f"{seed} {step}")
        logits = model(input_ids=ids, use_cache=False).logits  # (B, L, V)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, loss.item())
    return model.eval()
