import random
import re

import pytest

from seqwise.lab.zoo.text import count, fit, paragraphs, passage, passages


class Characters:
    """One token a character, the worst case for sizing."""

    def encode(self, text, *, add_special_tokens=True):
        return [0] * add_special_tokens + list(map(ord, text))


class Words:
    def encode(self, text, *, add_special_tokens=True):
        return [0] * add_special_tokens + [len(word) for word in text.split()]


def test_paragraphs_are_prose():
    texts = paragraphs()
    assert len(texts) > 300 and sum(map(len, texts)) > 100_000
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert "\n" not in text and "  " not in text and "::=" not in text and ">>>" not in text
        assert text[0].isupper() and text[-1] in ".:" and len(text) >= 80


def test_no_six_digit_number_can_be_taken_for_a_hidden_one():
    assert not re.search(r"\d{6}", " ".join(paragraphs()))


@pytest.mark.parametrize("tokenizer", [Characters(), Words()], ids=["characters", "words"])
@pytest.mark.parametrize("length", [1, 37, 1000])
def test_passages_have_at_most_their_length_and_waste_less_than_a_word(tokenizer, length):
    for text in passages(3, tokenizer, length, 5):
        assert count(text, tokenizer) <= length
        assert count(text, tokenizer) > length - 40


def test_a_passage_longer_than_the_text_goes_round():
    text = passage(random.Random(0), Words(), 60_000)
    assert count(text, Words()) == 60_000


def test_passages_depend_on_seed_and_index_alone():
    assert passages(1, Words(), 50, 4)[:2] == passages(1, Words(), 50, 2)
    assert passages(1, Words(), 50, 4) != passages(2, Words(), 50, 4)
    assert len(set(passages(1, Words(), 50, 4))) == 4


def test_passages_are_consecutive_paragraphs():
    pieces = passages(0, Words(), 300, 1)[0].split("\n\n")
    start = paragraphs().index(pieces[0])
    assert len(pieces) > 2
    for i, piece in enumerate(pieces[:-1]):
        assert piece == paragraphs()[(start + i) % len(paragraphs())]


@pytest.mark.parametrize(
    "length, text",
    [
        (0, ""),
        (1, "one"),
        (2, "one two"),
        (3, "one two  three"),
        (4, "one two  three\nfour"),
        (9, "one two  three\nfour"),
    ],
)
def test_fit_cuts_at_words(length, text):
    assert fit("one two  three\nfour", Words(), length) == text
