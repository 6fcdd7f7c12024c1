"""Marked pieces of a prompt keep their own tokens, whatever the template and the order."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from seqwise.core.errors import PromptError
from seqwise.core.prepare import prepare
from seqwise.core.segments import CONTEXT, PAD, QUESTION, TEXT

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[bot]{% endif %}"
)


@pytest.fixture
def tokenizer():
    """One token per byte, so that ids can be read back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", chat_template=TEMPLATE, padding_side="right"
    )


def message(*items, role="user", question="Which?"):
    content = [{"type": "text", "text": "Choose: "}, {"type": "set", "items": list(items)}]
    return {"role": role, "content": [*content, {"type": "question", "text": f" {question}"}]}


def text_of(tokenizer, batch, keep):
    return tokenizer.decode(batch["input_ids"][keep])


def test_members_and_questions_are_told_and_the_text_is_the_templates(tokenizer):
    batch, facts = prepare(tokenizer, [message(" a cat,", " a dog,")])
    plain = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Choose:  a cat, a dog, Which?"}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(batch["input_ids"][0]) == plain
    assert text_of(tokenizer, batch, facts.member == 0) == " a cat,"
    assert text_of(tokenizer, batch, facts.member == 1) == " a dog,"
    assert text_of(tokenizer, batch, facts.part == QUESTION) == " Which?"
    assert ((facts.set == 0) == (facts.member >= 0)).all() and not facts.has("box")


def test_a_permuted_set_holds_the_same_tokens(tokenizer):
    items = [" one", " two two", " 3"]
    (a, fa), (b, fb) = prepare(tokenizer, [message(*items)]), prepare(tokenizer, [message(*items[::-1])])
    for i, j in ((0, 2), (1, 1), (2, 0)):
        assert a["input_ids"][fa.member == i].equal(b["input_ids"][fb.member == j])
    assert a["input_ids"][fa.member < 0].equal(b["input_ids"][fb.member < 0])


def test_several_sets_contexts_and_boxes(tokenizer):
    boxed = {"text": "ok", "box": [0, 1.5, 10, 20]}
    parts = [
        {"type": "context", "text": "Once."},
        {"type": "set", "items": ["x", boxed]},
        {"type": "set", "items": ["y"]},
    ]
    batch, facts = prepare(tokenizer, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}])
    assert text_of(tokenizer, batch, facts.part == CONTEXT) == "Once."
    assert text_of(tokenizer, batch, facts.set == 0) == "xok" and text_of(tokenizer, batch, facts.set == 1) == "y"
    inside = (facts.set == 0) & (facts.member == 1)
    assert facts.box[inside].tolist() == [[0, 1.5, 10, 20]] * 2 and facts.box[~inside].isnan().all()


def test_conversations_are_padded_on_the_left(tokenizer):
    batch, facts = prepare(tokenizer, [[message("a", "bb")], [message("a", "b", question="Which one is it?")]])
    short = prepare(tokenizer, [message("a", "bb")])[0]["input_ids"][0]
    pads = batch["input_ids"].shape[1] - len(short)
    assert pads > 0 and batch["input_ids"][0, pads:].equal(short)
    assert batch["attention_mask"][0].tolist() == [0] * pads + [1] * len(short)
    assert facts.type[0].tolist() == [PAD] * pads + [TEXT] * len(short) and (facts.member[0, :pads] == -1).all()


def test_without_a_template_contents_are_joined(tokenizer):
    tokenizer.chat_template = None
    batch, facts = prepare(tokenizer, [message("a", "b")])
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "Choose: ab Which?"
    assert facts.member[0].tolist()[-9:] == [0, 1, *[-1] * 7]


def test_blanks_at_the_end_of_a_marked_piece_survive_a_template_that_trims(tokenizer):
    batch, facts = prepare(tokenizer, [{"role": "user", "content": [{"type": "set", "items": [" a ", " b "]}]}])
    assert text_of(tokenizer, batch, facts.member == 1) == " b "


@pytest.mark.parametrize(
    "part, says",
    [
        ({"type": "set", "items": []}, r"items of set 0 must be a list with at least one member, got \[\]"),
        ({"type": "set", "items": ["a", ""]}, "member 1 of set 0 must be a text that is not empty, got ''"),
        ({"type": "set", "items": ["a", 3]}, "member 1 of set 0 must be a text that is not empty, got 3"),
        ({"type": "set", "items": [{"text": "a", "box": [1, 2]}]}, r"box of member 0 of set 0 must be \(left, top"),
        ({"type": "set", "items": [{"text": "a", "box": [5, 0, 1, 1]}]}, "must have left <= right and top <= bottom"),
        ({"type": "set", "items": ["\ue000"]}, "private-use characters"),
        ({"type": "question", "text": None}, "question must be a text that is not empty, got None"),
    ],
)
def test_bad_parts_are_refused(tokenizer, part, says):
    with pytest.raises(PromptError, match=says):
        prepare(tokenizer, [{"role": "user", "content": [part]}])


def test_images_cannot_stand_beside_marked_pieces(tokenizer):
    content = [{"type": "image"}, {"type": "set", "items": ["a"]}]
    with pytest.raises(PromptError, match="got 'image'; prompts with images cannot hold marked pieces"):
        prepare(tokenizer, [{"role": "user", "content": content}])


def test_a_template_that_rewrites_a_piece_is_refused(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(PromptError, match="rewrites a marked piece"):
        prepare(tokenizer, [message("a", "b")])


def test_unmarked_messages_go_the_processors_way(tokenizer):
    batch, facts = prepare(tokenizer, [{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(batch["input_ids"][0]) == "<s>[user] Hi\n[bot]" and not facts.has("set")
    assert isinstance(batch["input_ids"], torch.Tensor)
