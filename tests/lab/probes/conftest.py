"""A tiny random model whose tokens are bytes, and models made by hand whose tokens are words."""

from __future__ import annotations

import types

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from seqwise.lab.probes.order import KINDS, LETTERS, NAMES
from seqwise.lab.tasks import NOUNS
from seqwise.lab.zoo import load_model


@pytest.fixture(scope="session")
def folder(byte_llama):
    return byte_llama(num_hidden_layers=2, max_position_embeddings=1200, initializer_range=0.3)


@pytest.fixture(scope="session")
def tiny(folder):
    return load_model(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQWISE_CACHE", str(tmp_path / "cache"))


class ByHand:
    """Answers by a rule: the prompt's words -> the next word, or words with their probabilities."""

    device = "cpu"

    def __init__(self, tokenizer, rule):
        self.tokenizer, self.rule = tokenizer, rule
        self.config = types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace())
        self.generation_config = types.SimpleNamespace(eos_token_id=None, pad_token_id=0)
        self.asked = []

    def generate(self, input_ids, attention_mask, max_new_tokens, **options):
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            words = self.tokenizer.decode(ids[mask.bool()]).split()
            self.asked.append(words)
            said = self.rule(words)
            logits = torch.full((len(self.tokenizer),), -50.0)
            for word, p in ({said: 1.0} if isinstance(said, str) else said).items():
                logits[self.tokenizer.convert_tokens_to_ids(word)] = torch.tensor(p).log()
            rows.append(logits)
        assert max_new_tokens == 1, "these choices are words of one token"
        return types.SimpleNamespace(logits=(torch.stack(rows),))


@pytest.fixture(scope="session")
def by_hand():
    """Makes such a model from its rule, with its tokenizer."""
    told = "Read these notes . Options : - Which option is a kind of ? What the password The that right N / A letter"
    words = [*told.split(), *NAMES, *NOUNS, *LETTERS, *(w for kind, ws in KINDS.items() for w in [*kind.split(), *ws])]
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *dict.fromkeys(words)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    return lambda rule: (ByHand(tokenizer, rule), tokenizer)
