"""From chat messages to a batch and its `Segments`: images by placeholder, and pieces whose order or role matters.

A message's content is a text or a list of parts. Beside the chat format's own parts (`text`, `image`), three mark
what some methods need to know:

    {"type": "set", "items": ["one document", {"text": "another", "box": [left, top, right, bottom]}, ...]}
    {"type": "context", "text": "..."}      {"type": "question", "text": "..."}

The pieces go through the chat template once, in their places, and each is tokenised alone: the ids of a member do not
depend on its neighbours, so a permuted set holds the same tokens. Blanks and separators belong to the pieces.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seqwise.core.errors import MissingExtra, PromptError
from seqwise.core.segments import CONTEXT, QUESTION, Segments

_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters around each marked piece while the template runs
_PARTS = {"context": CONTEXT, "question": QUESTION}


def prepare(processor: Any, messages: list[Any], **options: Any) -> tuple[dict[str, Tensor], Segments]:
    """A batch for the model and its `Segments`, from chat messages through the model's own processor or tokenizer.

    messages: one conversation, or a list of them, which are padded on the left where they hold marked pieces. A
    tokenizer without a chat template joins the contents of the messages. options: of `apply_chat_template`.

    >>> batch, segments = prepare(tokenizer, [{"role": "user", "content": [
    ...     {"type": "text", "text": "Which is a fruit?"}, {"type": "set", "items": [" apple", " chair"]}]}])

    Raises PromptError for a set without members or a member without text, MissingExtra where the model's processor
    cannot be constructed without torchvision.
    """
    if processor is None:
        raise MissingExtra(
            "this model's processor needs torchvision: pip install torchvision, "
            "or build the batch with its image processor and tokenizer"
        )
    conversations = messages if messages and isinstance(messages[0], list) else [messages]
    if any(_is_marked(message) for conversation in conversations for message in conversation):
        tokenizer = getattr(processor, "tokenizer", processor)
        return _batch([_tokenise(tokenizer, conversation, options) for conversation in conversations], tokenizer)
    batch = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt", **options
    )
    ids = batch["input_ids"]
    tokenizer = getattr(processor, "tokenizer", processor)
    token = getattr(processor, "image_token", None)
    image_token = getattr(processor, "image_token_id", None)
    if image_token is None and token is not None:
        image_token = tokenizer.convert_tokens_to_ids(token)
    return dict(batch), Segments.infer(ids, batch.get("attention_mask"), image_token)


def _is_marked(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(part.get("type") in ("set", *_PARTS) for part in content)


class _Piece:
    """A stretch of the prompt that is tokenised alone."""

    def __init__(self, text: str, set: int = -1, member: int = -1, part: int = -1, box: Any = None) -> None:
        self.text, self.set, self.member, self.part, self.box = text, set, member, part, box


def _tokenise(tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Tensor]:
    """ids, set, member, part (n,) and box (n, 4) of one conversation."""
    pieces: list[_Piece] = []
    flat = [{**message, "content": _flatten(message["content"], pieces)} for message in messages]
    templated = getattr(tokenizer, "chat_template", None)
    if templated:
        text = tokenizer.apply_chat_template(flat, tokenize=False, **{"add_generation_prompt": True, **options})
    else:
        text = "".join(message["content"] for message in flat)
    found: list[_Piece] = []
    rest = str(text)
    for piece in pieces:
        before, opened, rest = rest.partition(_OPEN)
        held, closed, rest = rest.partition(_CLOSE)
        if not (opened and closed) or held != piece.text:
            raise PromptError(
                "the tokenizer's chat template rewrites a marked piece, so its tokens cannot be told; "
                "set tokenizer.chat_template = None to use plain prompts"
            )
        found += [_Piece(before), piece]
    found.append(_Piece(rest))
    ids: list[int] = []
    facts: dict[str, list[Any]] = {"set": [], "member": [], "part": [], "box": []}
    for i, piece in enumerate(found):
        own = tokenizer.encode(piece.text, add_special_tokens=not templated and i == 0)
        if not own and piece.set >= 0:
            raise PromptError(f"member {piece.member} of set {piece.set} has no tokens; give it a text")
        ids += own
        for name in facts:
            value = getattr(piece, name)
            facts[name] += [value if name != "box" or value is not None else [float("nan")] * 4] * len(own)
    numbers = {name: torch.tensor(facts[name], dtype=torch.long) for name in ("set", "member", "part")}
    return {"ids": torch.tensor(ids), **numbers, "box": torch.tensor(facts["box"], dtype=torch.float).view(-1, 4)}


def _flatten(content: Any, pieces: list[_Piece]) -> str:
    """The content as one text, marked pieces between `_OPEN` and `_CLOSE`; appends them to `pieces`."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts = []
    for part in parts:
        kind = part.get("type")
        if kind == "text":
            texts.append(_text(part.get("text"), "text"))
        elif kind == "set":
            number = max((piece.set for piece in pieces), default=-1) + 1
            items = part.get("items")
            if not isinstance(items, (list, tuple)) or not items:
                raise PromptError(f"items of set {number} must be a list with at least one member, got {items!r}")
            for member, item in enumerate(items):
                item = item if isinstance(item, dict) else {"text": item}
                where = f"member {member} of set {number}"
                pieces.append(_Piece(_text(item.get("text"), where), number, member, box=_box(item.get("box"), where)))
                texts.append(f"{_OPEN}{pieces[-1].text}{_CLOSE}")
        elif kind in _PARTS:
            pieces.append(_Piece(_text(part.get("text"), kind), part=_PARTS[kind]))
            texts.append(f"{_OPEN}{pieces[-1].text}{_CLOSE}")
        else:
            raise PromptError(
                f"a part of a marked prompt must be of type text, set, context or question, got {kind!r}; "
                "prompts with images cannot hold marked pieces"
            )
    return "".join(texts)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise PromptError(f"{where} must be a text that is not empty, got {value!r}")
    if _OPEN in value or _CLOSE in value:
        raise PromptError(f"{where} holds the private-use characters U+E000 or U+E001; remove them")
    return value


def _box(value: Any, where: str) -> list[float] | None:
    if value is None:
        return None
    try:
        left, top, right, bottom = map(float, value)
    except (TypeError, ValueError):
        raise PromptError(f"box of {where} must be (left, top, right, bottom), got {value!r}") from None
    if not (left <= right and top <= bottom):
        raise PromptError(f"box of {where} must have left <= right and top <= bottom, got {value!r}")
    return [left, top, right, bottom]


def _batch(rows: list[dict[str, Tensor]], tokenizer: Any) -> tuple[dict[str, Tensor], Segments]:
    width = max(len(row["ids"]) for row in rows)
    if width == 0:
        raise PromptError("the prompt is empty; give at least one token")

    def padded(name: str, fill: float) -> Tensor:
        pads = [(width - len(row["ids"]), 0) for row in rows]
        sides = [(0, 0, *pad) if name == "box" else pad for pad in pads]
        return torch.stack(
            [torch.nn.functional.pad(row[name], side, value=fill) for row, side in zip(rows, sides, strict=True)]
        )

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    mask = torch.stack([(torch.arange(width) >= width - len(row["ids"])).long() for row in rows])
    batch = {"input_ids": padded("ids", pad), "attention_mask": mask}
    plain = Segments.infer(batch["input_ids"], mask, None)
    marks = {name: padded(name, -1) for name in ("set", "member", "part")}
    segments = replace(plain, **marks, box=padded("box", float("nan")))
    return batch, segments
