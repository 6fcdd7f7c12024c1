"""Real English text that ships with Python: the prose of the language reference (`pydoc_data.topics`).

About 200,000 characters, the same on every machine with the same Python version.
"""

from __future__ import annotations

import random
import re
from functools import lru_cache
from itertools import chain
from pydoc_data.topics import topics
from typing import Protocol


class Counts(Protocol):
    """What sizing needs of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...


@lru_cache(maxsize=1)
def paragraphs() -> tuple[str, ...]:
    """Paragraphs of prose, one line each, in the order of the topics; no headings, grammar, code, tables or repeats."""
    blocks = chain.from_iterable(re.split(r"\n\s*\n", topics[name]) for name in sorted(topics))
    return tuple(dict.fromkeys(filter(_is_prose, map(_one_line, blocks))))


def passages(seed: int, tokenizer: Counts, length: int, n: int) -> list[str]:
    """`n` passages of consecutive prose, each the longest run of whole words of at most `length` tokens.

    Passage i depends on (seed, i) alone; paragraphs are joined by blank lines and go round at the end of the text.
    """
    return [passage(random.Random(f"passage {seed} {i}"), tokenizer, length) for i in range(n)]


def passage(draw: random.Random, tokenizer: Counts, length: int) -> str:
    """One passage as in `passages`, from a random paragraph on."""
    source = paragraphs()
    start = draw.randrange(len(source))
    picked: list[str] = []
    characters = 0
    while characters < 12 * length:  # prose has 4 to 5 characters a token; a byte-level tokenizer has 1
        picked.append(source[(start + len(picked)) % len(source)])
        characters += len(picked[-1])
    return fit("\n\n".join(picked), tokenizer, length)


def fit(text: str, tokenizer: Counts, length: int) -> str:
    """The longest beginning of `text` in whole words that has at most `length` tokens (special tokens apart)."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    low, high = 0, len(ends)
    while low < high:
        middle = (low + high + 1) // 2
        if count(text[: ends[middle - 1]], tokenizer) <= length:
            low = middle
        else:
            high = middle - 1
    return text[: ends[low - 1]] if low else ""


def count(text: str, tokenizer: Counts) -> int:
    """Tokens of `text` alone, without special tokens."""
    return len(tokenizer.encode(text, add_special_tokens=False))


def _one_line(block: str) -> str:
    unmarked = re.sub(r"\*(\w[^*\n]*)\*", r"\1", re.sub(r'["`]', "", block))  # quotes mark code there
    return re.sub(r"\s+", " ", unmarked).strip()


def _is_prose(text: str) -> bool:
    letters = sum(character.isalpha() or character in " ,.'’-()" for character in text)
    return (
        len(text) >= 80
        and text[0].isupper()
        and text.endswith((".", ":"))
        and letters >= 0.97 * len(text)
        and not re.search(r"::=|>>>|->|\w\(\w*\)\s\w+\(", text)
    )
