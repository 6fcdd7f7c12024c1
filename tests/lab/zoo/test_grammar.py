import random
import re

import pytest
import torch

from seqwise.lab.zoo.grammar import CLASSES, SLOTS, TEMPLATES, WORDS, grammar_model, stories, story, train_grammar


def spelled(ids):
    return " ".join(WORDS[i] for i in ids)


def pattern(template):
    words = [f"({'|'.join(CLASSES[SLOTS[word]])})" if word in SLOTS else re.escape(word) for word in template.split()]
    return re.compile(" ".join(words))


def test_every_whole_sentence_follows_a_template_and_the_cast():
    for seed in range(20):
        text = spelled(story(120, random.Random(seed)))
        sentences = [part.strip() for part in re.findall(r"[^.?]*[.?]", text)[1:]]  # the first may lack its beginning
        assert len(sentences) > 10
        for sentence in sentences:
            assert sum(bool(pattern(template).fullmatch(sentence)) for template in TEMPLATES) == 1, sentence
        words = set(text.split())
        assert len(words & set(CLASSES["WHO"])) <= 2 and len(words & set(CLASSES["THING"])) <= 2
        assert len(words & set(CLASSES["PLACE"])) <= 1


def test_two_people_of_a_sentence_differ():
    text = spelled(story(4000, random.Random(0)))
    pairs = re.findall(r"(\w+) and (\w+) went", text)
    assert len(pairs) > 20 and all(a != b for a, b in pairs)


def test_followers_come_with_6_to_3_to_1():
    text = spelled(story(60_000, random.Random(1)))
    after = re.findall(r"after a while they left the \w+ \. (\w+ \w+)", text)
    shares = [sum(bool(re.fullmatch(p, words)) for words in after) / len(after) for p in (r"\w+ gave", r"then \w+")]
    assert len(after) > 500 and abs(shares[0] - 0.6) < 0.08 and abs(shares[1] - 0.1) < 0.05


def test_length_seed_and_ids():
    ids = stories(3, 40, 7)
    assert ids.shape == (3, 40) and ids.dtype == torch.int64 and int(ids.min()) >= 0 and int(ids.max()) < len(WORDS)
    assert ids.equal(stories(3, 40, 7)) and not ids.equal(stories(3, 40, 8))
    assert len(set(WORDS)) == len(WORDS)
    with pytest.raises(ValueError, match="length must be >= 1, got 0"):
        story(0, random.Random(0))
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        train_grammar(0, steps=0)


def test_the_model_learns_and_the_seed_alone_decides_its_weights():
    torch.manual_seed(3)
    state, losses = torch.random.get_rng_state(), []
    model = train_grammar(0, 40, lambda step, loss: losses.append((step, loss)), length=48)
    assert torch.random.get_rng_state().equal(state) and not model.training
    assert [step for step, _ in losses] == list(range(1, 41)) and losses[-1][1] < losses[0][1] / 2
    pairs = zip(train_grammar(1, 1, length=8).parameters(), train_grammar(1, 1, length=8).parameters(), strict=True)
    assert all(a.equal(b) for a, b in pairs)
    assert grammar_model(0).config.vocab_size == len(WORDS)
