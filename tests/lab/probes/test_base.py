"""Choices and replies against plain forwards; intervals that have a width where it is due."""

from __future__ import annotations

import pytest
import torch

from seqwise.core.errors import UsageError
from seqwise.core.segments import CONTEXT, QUESTION
from seqwise.lab.intervals import wilson
from seqwise.lab.probes import base
from seqwise.lab.probes.base import Asked, Progress, Settings, answer_ids, choice_logps, encode, paired, replies, share
from seqwise.methods.order.just_read_twice import JustReadTwice
from seqwise.methods.order.set_based_prompting import SetBasedPrompting


def asked(*members, question="Which?", prefix="It is"):
    content = [
        {"type": "text", "text": "Choose.\n"},
        {"type": "set", "items": [f"{member}\n" for member in members]},
        {"type": "question", "text": question},
    ]
    return Asked([{"role": "user", "content": content}], prefix)


def text_of(one):
    parts = [part.get("text") or "".join(part["items"]) for part in one.messages[0]["content"]]
    return "".join(parts) + one.prefix


def forced(model, tokenizer, text, answer):
    """Mean log-probability of the answer's tokens, from one forward."""
    prompt, more = tokenizer.encode(text), tokenizer.encode(answer)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + more])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(more)[:, None]).mean()


PROMPTS = [asked("a cat", "a dog"), asked("a dog", "a cat", "one more thing", question="Which of them?")]


@pytest.mark.parametrize("choices", [("a cat", "dog", "no such thing at all"), ("x", "y")], ids=str)
@pytest.mark.parametrize("rows", [2, 32])
def test_choices_are_scored_as_in_one_forward(tiny, monkeypatch, choices, rows):
    monkeypatch.setattr(base, "ROWS", rows)
    found = choice_logps(*tiny, PROMPTS, choices)
    expected = [[forced(*tiny, text_of(one), f" {choice}") for choice in choices] for one in PROMPTS]
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-4, rtol=1e-4)


def test_choices_of_one_token_are_scored_alike(tiny, monkeypatch):
    """Once without forcing, once beside a longer choice, which forces all of them."""
    monkeypatch.setattr(base, "answer_ids", lambda tokenizer, prefix, answer: tokenizer.encode(answer))
    alone = choice_logps(*tiny, PROMPTS, ["x", "y"])
    beside = choice_logps(*tiny, PROMPTS, ["x", "y", "zz"])
    torch.testing.assert_close(alone, beside[:, :2], atol=2e-4, rtol=1e-4)


def test_a_method_takes_part(tiny):
    """The order of the members is gone under one that hides it; the reworded prompt is the one that is read."""
    orders = [asked("a cat", "a dog", "birds"), asked("birds", "a cat", "a dog")]
    plain, ours = (
        choice_logps(*tiny, orders, ["cat", "dog"]),
        choice_logps(*tiny, orders, ["cat", "dog"], SetBasedPrompting()),
    )
    torch.testing.assert_close(ours[0], ours[1], atol=1e-4, rtol=0)
    assert (plain[0] - plain[1]).abs().max() > 1e-2
    twice = choice_logps(*tiny, orders[:1], ["cat", "dog"], JustReadTwice())
    text = "Choose.\nWhich?a cat\na dog\nbirds\na cat\na dog\nbirds\nWhich?It is"
    expected = [forced(*tiny, text, f" {choice}") for choice in ("cat", "dog")]
    torch.testing.assert_close(twice[0], torch.stack(expected), atol=2e-4, rtol=1e-4)


def test_facts_of_a_prompt(tiny):
    tokenizer = tiny[1]
    batch, facts = encode(tokenizer, [PROMPTS[0]])
    ids = batch["input_ids"][0]
    assert tokenizer.decode(ids) == "Choose.\na cat\na dog\nWhich?It is" and batch["attention_mask"].all()
    assert tokenizer.decode(ids[facts.part[0] == CONTEXT]) == "a cat\na dog\n"
    assert tokenizer.decode(ids[facts.part[0] == QUESTION]) == "Which?"
    assert tokenizer.decode(ids[facts.member[0] == 1]) == "a dog\n"
    assert facts.real.all() and facts.type.shape == batch["input_ids"].shape


def test_answers_go_on_after_the_reply_s_beginning(tiny):
    tokenizer = tiny[1]
    assert tokenizer.decode(answer_ids(tokenizer, "It is", "red")) == " red"
    assert tokenizer.decode(answer_ids(tokenizer, "", "red")) == "red"


@pytest.mark.parametrize("method", [None, SetBasedPrompting()], ids=str)
def test_replies_are_greedy(tiny, method):
    model, tokenizer = tiny
    found = replies(model, tokenizer, PROMPTS[:1], method)
    if method is None:
        ids = torch.tensor([tokenizer.encode(text_of(PROMPTS[0]))])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=base.REPLY, pad_token_id=0
        )
        assert found == [tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)]
    else:
        assert found == replies(model, tokenizer, [asked("a dog", "a cat")], method)


def test_prompts_that_do_not_fit_are_refused(tiny):
    with pytest.raises(UsageError, match="more than the 1200 positions"):
        choice_logps(*tiny, [asked("x" * 1200)], ["a"])


def test_shares_have_a_width_where_all_values_are_the_same():
    assert share([0.0] * 12) == (0.0, wilson(0, 12).high) and share([1.0] * 12) == (wilson(12, 12).low, 1.0)
    assert share([1.0, 0.0, 0.0]) == (wilson(1, 3).low, wilson(1, 3).high)
    low, high = share([0.4, 0.6, 0.0, 0.2, 0.9])
    assert 0.0 <= low < 0.42 < high <= 1.0
    assert share([0.1, 0.2]) != (None, None) and share([0.1]) == (None, None)


def test_paired_differences():
    found = paired([0.5, 0.7, 0.6], [0.5, 0.2, 0.1])
    assert found["value"] == pytest.approx(1 / 3) and found["low"] < 1 / 3 < found["high"]
    assert paired([0.5], [0.25]) == {"value": 0.25, "low": None, "high": None}


def test_progress_measures_once():
    told, kept = [], []
    progress = Progress({"a": 1}, lambda *args: told.append(args), lambda: kept.append(1))
    progress.plan(3)
    assert progress.once("a", "first", lambda: 1 / 0) == 1 and progress.once("b", "second", lambda: 2) == 2
    progress.skip(1)
    assert progress.records == {"a": 1, "b": 2} and len(kept) == 1
    assert told == [("first", 0, 3), ("second", 1, 3)] and (progress.done, progress.total) == (2, 2)


@pytest.mark.parametrize("field, value", [("items", 0), ("seed", -1)])
def test_settings_say_what_is_allowed(field, value):
    with pytest.raises(UsageError, match=f"--{field} must be a whole number >= {value + 1}, got {value}"):
        Settings(**{field: value})
