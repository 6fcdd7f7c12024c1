from dataclasses import replace

import pytest
import torch

import seqwise.lab.reproduce.quota as module
from seqwise.lab.zoo import scenes
from seqwise.methods.reduce.quota import QuoTA, allocate, frame_scorer, grid_of, weights


@pytest.fixture(scope="module")
def model():
    return scenes.build(0)


@pytest.fixture(scope="module")
def drawn():
    return scenes.frames(6, 1, images=(4,), types=("colour", "place"))


def test_measures_every_testable_claim_once_per_question(monkeypatch, model):
    monkeypatch.setattr(module, "load", lambda: (model, None))
    monkeypatch.setattr(module, "QUESTIONS", 6)
    monkeypatch.setattr(module, "ROWS", 4)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert list(found) == [claim.key for claim in module.REPRODUCTION.testable]
    assert all(len(measured.ours) == len(measured.baseline) == 6 for measured in found.values())
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"


def test_frames_are_asked_for_what_the_question_names(drawn):
    for example in drawn:
        names = module.objects(example)
        (frame,) = {k // scenes.PATCHES for k in example.relevant}
        held = {thing.name for thing in example.things[frame]}
        assert len(names) == (6 if example.type == "colour" else 1)
        assert len(held & set(names)) == 1
        others = {thing.name for i, things in enumerate(example.things) if i != frame for thing in things}
        assert not others & set(names)  # one frame alone shows it


def test_relevance_is_the_most_certain_yes_of_each_frame(model, drawn):
    p = module.relevance(model, drawn[:2])
    assert [one.shape for one in p] == [(4,), (4,)]
    for example, own in zip(drawn[:2], p, strict=True):
        told = []
        for name in module.objects(example):
            one = scenes.batch([replace(example, pixels=example.pixels[2:3], prompt=f"<image> is there a {name} ?",
                                        answer="yes")])  # fmt: skip
            with torch.no_grad():
                told.append(model(**one.inputs()).logits[0, -1].softmax(-1)[one.answers[0]])
        torch.testing.assert_close(own[2], max(told))


def test_answered_gives_each_prompt_its_own_scores(model, drawn, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 4)
    p = [torch.rand(4, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    told = []
    for example, own in zip(drawn, p, strict=True):
        (whole,) = scenes.features(model, [example])
        sizes = [grid_of(n) for n in allocate(weights(own), 36).tolist()]
        shown = [scenes.resize(x, size) for x, size in zip(whole, sizes, strict=True) if min(size)]
        text = example.prompt.replace("<image> " * 4, "<image> " * len(shown))
        told += scenes.answers(model, [replace(example, prompt=text)], [shown])
    told = [replace(example, answer=word) for example, word in zip(drawn, told, strict=True)]
    wrong = replace(told[0], answer="yes" if told[0].answer != "yes" else "no")
    assert module.answered(model, [*told[1:], wrong], [*p[1:], p[0]], QuoTA(budget=36)) == [1.0] * 5 + [0.0]


def test_the_librarys_scorer_agrees_through_the_processor(model, drawn):
    example = drawn[1]
    (name,) = module.objects(example)
    p = frame_scorer(model, scenes.processor(), example.images(), "", prompt=f"is there a {name} ?", yes="yes", batch=3)
    torch.testing.assert_close(p(), module.relevance(model, [example])[0])
