"""What a method is asked to do: prompts whose context and question are apart, and scores on what came out.

A method acts on the context before it has seen the question, as in a served model whose cache is shared by many
questions. So each `Prompt` holds both apart, and `encode` gives their token ids apart, such that one after the
other they are exactly the ids of the whole prompt. Running a model is the caller's part; `Output` is what it hands
back. Every prompt depends on (seed, its index) alone: more prompts only append.
"""

from __future__ import annotations

import json
import random
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from seqwise.core.config import Configured, param
from seqwise.core.errors import UsageError
from seqwise.lab.zoo.text import count, fit, passage, passages

Better: TypeAlias = Literal["higher", "lower"]
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Prompt:
    """One item. Without a question it is plain text, and `answer` is how the text goes on.

    prefix: the beginning of the reply, given to the model. facts: what the item was made from (depth, key, line).
    """

    context: str
    question: str
    answer: str
    prefix: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """What a model made of a prompt.

    text: the generated reply, without the prefix. logits: (T, V), row t predicts token t of `answer_ids` (T,), so
    row 0 is the last row of the prompt. full_logits: (T, V) of the model without any method.
    """

    text: str = ""
    logits: Tensor | None = None
    answer_ids: Tensor | None = None
    full_logits: Tensor | None = None


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Token ids of the context part (1, n) and of the question part (1, m); m = 0 without a question.

    Joined they are the ids of the whole prompt. With a chat template, context and question are one user message,
    and the question part ends with the reply's header and prefix. Raises UsageError for a template that rewrites
    what it is given.
    """
    whole, end = _render(tokenizer, prompt)
    ids = _ids(tokenizer, prompt, whole)
    # A token across the border, say of blank characters, belongs to the question part.
    cut = _common(ids, _ids(tokenizer, prompt, whole[:end])) if prompt.question else len(ids)
    return torch.tensor([ids[:cut]], dtype=torch.long), torch.tensor([ids[cut:]], dtype=torch.long)


def encode_answer(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Tensor:
    """Token ids (1, T) of the gold answer as it follows the ids that `encode` gives."""
    whole, _ = _render(tokenizer, prompt)
    answer = prompt.answer
    if prompt.question and not whole[-1:].isspace():
        answer = f" {answer}"  # "The number is" goes on with a new word
    ids, longer = _ids(tokenizer, prompt, whole), _ids(tokenizer, prompt, whole + answer)
    if _common(ids, longer) == len(ids):
        gold = longer[len(ids) :]
    else:  # the answer's first characters would merge into the prompt's last token, which is given already
        gold = tokenizer.encode(answer, add_special_tokens=False)
    return torch.tensor([gold], dtype=torch.long)


def mean_logprob(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean log-probability (nats) of the tokens `ids` (..., T) under `logits` (..., T, V); row t predicts token t."""
    logps = logits.float().log_softmax(-1).gather(-1, ids.to(logits.device)[..., None])  # (..., T, 1)
    return logps[..., 0].mean(-1)


def greedy_match(logits: Tensor, full_logits: Tensor) -> Tensor:
    """Share of positions where both logits (..., T, V) have the same largest entry."""
    return (logits.argmax(-1) == full_logits.argmax(-1)).float().mean(-1)


def mean_kl(logits: Tensor, full_logits: Tensor) -> Tensor:
    """Mean over positions of KL(full || ours) in nats, from logits (..., T, V)."""
    p, q = full_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    terms = (p.exp() * (p - q)).masked_fill(p == float("-inf"), 0.0)  # 0 log 0 = 0, for masked entries
    return terms.sum(-1).mean(-1)


def answered(text: str, answer: str) -> bool:
    """Whether a reply gives the answer.

    A number counts when it is the reply's first number with as many digits (thousands separators allowed); other
    answers when they occur as whole words, whatever their case and spacing.
    """
    if answer.isdecimal():
        numbers = re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))
        return next((number for number in numbers if len(number) == len(answer)), None) == answer
    words, wanted = (" ".join(part.casefold().split()) for part in (text, answer))
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", words) is not None


@dataclass(frozen=True)
class Task(Configured):
    """Makes prompts and scores outputs. `metrics` names the scores, the main one first, and which way is better."""

    abstract: ClassVar[bool] = True
    name: ClassVar[str]
    metrics: ClassVar[Mapping[str, Better]]
    max_new_tokens: ClassVar[int] = 0  # 0: nothing is generated, the score reads logits
    reads_full: ClassVar[bool] = False  # needs Output.full_logits
    sized: ClassVar[bool] = True  # contexts of a wanted length

    @property
    def files(self) -> tuple[str, ...]:
        """What the prompts are read from."""
        return ()

    @abstractmethod
    def prompts(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int, length: int) -> list[Prompt]:
        """`n` prompts whose contexts have about `length` tokens of `tokenizer`, never more."""

    @abstractmethod
    def score(self, prompt: Prompt, output: Output) -> dict[str, float]:
        """The metrics of one item; those whose input is missing from `output` are left out."""


@dataclass(frozen=True)
class Answering(Task):
    """A question with one right answer: found in the reply or not, and how probable the gold answer was."""

    abstract: ClassVar[bool] = True
    metrics: ClassVar[Mapping[str, Better]] = {"accuracy": "higher", "logprob": "higher"}
    max_new_tokens: ClassVar[int] = 24

    def score(self, prompt: Prompt, output: Output) -> dict[str, float]:
        scores = {"accuracy": float(answered(output.text, prompt.answer))}
        if output.logits is not None and output.answer_ids is not None:
            scores["logprob"] = mean_logprob(output.logits, output.answer_ids).item()
        return scores


@dataclass(frozen=True)
class Needle(Answering):
    """A six-digit number hidden in real text; prompt i hides it at the i-th depth, round and round.

    A depth is the share of the text that stands before the number; it is moved to the nearest end of a sentence.
    """

    depths: tuple[float, ...] = param((0.0, 0.25, 0.5, 0.75, 1.0), ge=0, le=1, doc="0 is the start of the context")

    name: ClassVar[str] = "needle"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.depths:
            raise ValueError("Needle.depths must hold at least one depth in [0, 1], got ()")

    def prompts(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int, length: int) -> list[Prompt]:
        items = []
        for i in range(n):
            draw, depth = random.Random(f"needle {seed} {i}"), self.depths[i % len(self.depths)]
            number = _numbers(draw, 1)[0]
            context = _hide(draw, tokenizer, length, [f"The secret number is {number}."], [depth])
            items.append(
                Prompt(context, "What is the secret number?", number, "The secret number is", {"depth": depth})
            )
        return items


@dataclass(frozen=True)
class Needles(Answering):
    """Several things, each with its six-digit number, at random places in real text; one is asked for."""

    needles: int = param(4, ge=2, le=32, doc="numbers hidden at once")

    name: ClassVar[str] = "needles"

    def prompts(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int, length: int) -> list[Prompt]:
        items = []
        for i in range(n):
            draw = random.Random(f"needles {seed} {i}")
            keys, numbers = draw.sample(NOUNS, self.needles), _numbers(draw, self.needles)
            depths = [draw.random() for _ in keys]
            told = [f"The secret number of the {key} is {number}." for key, number in zip(keys, numbers, strict=True)]
            asked = draw.randrange(self.needles)
            key, facts = keys[asked], {"key": keys[asked], "depth": depths[asked]}
            items.append(
                Prompt(
                    _hide(draw, tokenizer, length, told, depths),
                    f"What is the secret number of the {key}?",
                    numbers[asked],
                    f"The secret number of the {key} is",
                    facts,
                )
            )
        return items


@dataclass(frozen=True)
class KeyValue(Answering):
    """A list of keys with six-digit values, in one piece at a random place in real text; one value is asked for."""

    pairs: int = param(4, ge=1, le=32, doc="keys in the list")

    name: ClassVar[str] = "kv"

    def prompts(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int, length: int) -> list[Prompt]:
        items = []
        for i in range(n):
            draw = random.Random(f"kv {seed} {i}")
            keys, values = draw.sample(NOUNS, self.pairs), _numbers(draw, self.pairs)
            told = "\n".join(f"The value of the key {key} is {value}." for key, value in zip(keys, values, strict=True))
            depth, asked = draw.random(), draw.randrange(self.pairs)
            context = _hide(draw, tokenizer, length, [f"{SEPARATOR}{told}{SEPARATOR}"], [depth])
            key, facts = keys[asked], {"key": keys[asked], "depth": depth, "rank": asked}
            items.append(
                Prompt(
                    context,
                    f"What is the value of the key {key}?",
                    values[asked],
                    f"The value of the key {key} is",
                    facts,
                )
            )
        return items


@dataclass(frozen=True)
class File(Answering):
    """Questions of your own: a JSON Lines file whose lines have the texts `context`, `question` and `answer`.

    The first `n` lines, whatever the seed, their contexts whole, whatever the length. Raises UsageError with
    file, line and field for a line that is not so.
    """

    path: str = param(doc="a .jsonl file")

    name: ClassVar[str] = "file"
    sized: ClassVar[bool] = False
    fields: ClassVar[tuple[str, ...]] = ("context", "question", "answer")

    @property
    def files(self) -> tuple[str, ...]:
        return (self.path,)

    def prompts(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int, length: int) -> list[Prompt]:
        return [self._item(where, number, item) for number, where, item in json_lines(self.path, form_of(self.fields))][
            :n
        ]

    def _item(self, where: str, number: int, item: Mapping[str, Any]) -> Prompt:
        context, question, answer = (text_field(where, item, name) for name in self.fields)
        return Prompt(context, question, answer, facts={"line": number})  # stripped, as chat templates do


def json_lines(path: str, form: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Each line's number, where it is ("file, line 3") and its object.

    form: a line's form, for the message if there is none. Raises UsageError for what cannot be read.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    empty = True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        empty, where = False, f"{path}, line {number}"
        try:
            item = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{where}: not JSON ({error})") from None
        if not isinstance(item, dict):
            raise UsageError(f"{where}: must be an object, got {type(item).__name__}")
        yield number, where, item
    if empty:
        raise UsageError(f"{path} has no lines; each is {form}")


def form_of(fields: Sequence[str]) -> str:
    """Such as {"question": ..., "answer": ...}."""
    return "{" + ", ".join(f'"{name}": ...' for name in fields) + "}"


def text_field(where: str, item: Mapping[str, Any], name: str) -> str:
    """A field's text without blanks around it. Raises UsageError where it is missing, empty or no text."""
    value = item.get(name)
    if not isinstance(value, str) or not value.strip():
        got = "nothing" if name not in item else repr(value)
        raise UsageError(f"{where}: field {name!r} must be a text that is not empty, got {got}")
    return value.strip()


@dataclass(frozen=True)
class Continuing(Task):
    """Real text that goes on after the context: the scores read the logits of the text's true continuation."""

    abstract: ClassVar[bool] = True

    continuation: int = param(128, ge=1, doc="tokens after the context")

    def prompts(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int, length: int) -> list[Prompt]:
        _check_length(length, at_least=16)
        items = []
        for text in passages(seed, tokenizer, length + self.continuation, n):
            context = fit(text, tokenizer, length)
            items.append(Prompt(context, "", text[len(context) :]))
        return items


@dataclass(frozen=True)
class Perplexity(Continuing):
    """How well the text's continuation is predicted: `nll`, nats per token; perplexity is exp of its mean."""

    name: ClassVar[str] = "perplexity"
    metrics: ClassVar[Mapping[str, Better]] = {"nll": "lower"}

    def score(self, prompt: Prompt, output: Output) -> dict[str, float]:
        if output.logits is None or output.answer_ids is None:
            return {}
        return {"nll": -mean_logprob(output.logits, output.answer_ids).item()}


@dataclass(frozen=True)
class Agreement(Continuing):
    """How close the predictions stay to the plain model's, token by token along the text's continuation."""

    name: ClassVar[str] = "agreement"
    metrics: ClassVar[Mapping[str, Better]] = {"match": "higher", "kl": "lower"}
    reads_full: ClassVar[bool] = True

    def score(self, prompt: Prompt, output: Output) -> dict[str, float]:
        if output.logits is None or output.full_logits is None:
            return {}
        full = output.full_logits.to(output.logits.device)
        return {"match": greedy_match(output.logits, full).item(), "kl": mean_kl(output.logits, full).item()}


TASKS: Mapping[str, type[Task]] = {kind.name: kind for kind in (Needle, Needles, KeyValue, Perplexity, Agreement, File)}


def task(text: str) -> Task:
    """Reads `needle`, `file:questions.jsonl` or, with its fields, `Needle(depths=(0.5,))`. Raises UsageError."""
    name, _, path = text.partition(":")
    if name == File.name:
        if not path:
            raise UsageError("task file needs a path, as in file:questions.jsonl")
        return File(path=path)
    if text in TASKS:
        return TASKS[text]()
    if "(" in text:
        return Task.parse(text)
    raise UsageError(f"unknown task {text!r}; known: {', '.join(TASKS)} (file as file:PATH)")


_WORDS = """
anchor apple basket bridge candle castle cherry copper desert dragon engine falcon feather forest garden hammer harbor
island jacket kettle ladder lantern lemon magnet marble meadow mirror monkey needle ocean orange palace pencil pepper
piano pillow planet pocket rabbit river rocket saddle shadow silver spider temple ticket tiger
"""
NOUNS = tuple(_WORDS.split())


def _numbers(draw: random.Random, k: int) -> list[str]:
    """Distinct six-digit numbers."""
    return [str(number) for number in draw.sample(range(100_000, 1_000_000), k)]


def _hide(
    draw: random.Random, tokenizer: PreTrainedTokenizerBase, length: int, told: list[str], depths: list[float]
) -> str:
    """Real text with each of `told` at its depth, at most `length` tokens together."""
    needed = sum(count(f" {text}", tokenizer) for text in told)
    _check_length(length, at_least=needed + 16)
    room = length - needed
    filler = passage(draw, tokenizer, room)
    while count(context := _insert(filler, told, depths), tokenizer) > length:  # tokens split where texts meet
        room -= 1
        filler = fit(filler, tokenizer, room)
    return context


def _insert(filler: str, told: list[str], depths: list[float]) -> str:
    ends = [0, *(match.end() for match in re.finditer(r"[.:](?=\s|$)", filler)), len(filler)]
    places = [min(ends, key=lambda end: abs(end - depth * len(filler))) for depth in depths]
    parts, last = [], 0
    for place, text in sorted(zip(places, told, strict=True), key=lambda pair: pair[0]):
        parts += [filler[last:place].rstrip(), text]
        last = place
    joined = " ".join([*parts, filler[last:].lstrip(" ")])
    return re.sub(r" *\n[ \n]*", lambda gap: "\n\n" if gap[0].count("\n") > 1 else "\n", joined).strip()


def _check_length(length: int, at_least: int) -> None:
    if length < at_least:
        raise UsageError(f"length must be >= {at_least} tokens for this task, got {length}")


def _render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[str, int]:
    """The whole prompt as text, and where its context ends in it."""
    if not prompt.question:
        return prompt.context, len(prompt.context)
    message = f"{prompt.context}{SEPARATOR}{prompt.question}"
    if not tokenizer.chat_template:
        return f"{message}\n{prompt.prefix}", len(prompt.context)
    chat = [{"role": "user", "content": message}]
    whole = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    start = whole.find(message)
    if start < 0:
        raise UsageError(
            "the tokenizer's chat template rewrites the user message, so context and question cannot be told "
            "apart; set tokenizer.chat_template = None to use plain prompts"
        )
    return whole + prompt.prefix, start + len(prompt.context)


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str) -> list[int]:
    templated = bool(prompt.question and tokenizer.chat_template)
    return tokenizer.encode(text, add_special_tokens=not templated)  # a template writes its own special tokens


def _common(left: list[int], right: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
