import pytest
import torch

import seqwise.lab.reproduce.token_reduction_beyond_efficiency as module
from seqwise.lab.zoo import glyphs, scenes


@pytest.fixture(scope="module")
def model():
    return glyphs.build(0)


@pytest.fixture
def small(monkeypatch, model):
    monkeypatch.setattr(module, "trained", lambda seed, progress: model)
    monkeypatch.setattr(module.scenes, "load", lambda: (scenes.build(0), scenes.processor()))
    for name, value in (
        ("IMAGES", 4),
        ("QUESTIONS", 8),
        ("STEPS", 20),
        ("WINDOW", 5),
        ("REFERENCE_STEPS", 5),
        ("BATCHES", 3),
    ):
        monkeypatch.setattr(module, name, value)


def test_measures_every_testable_claim(small):
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert list(found) == [claim.key for claim in module.REPRODUCTION.testable]
    lengths = {key: len(measured.ours) for key, measured in found.items()}
    assert lengths["representation-hit"] == lengths["check-last"] == 4
    assert lengths["stability-norms"] == 4 and lengths["stability-loss"] == 3
    assert lengths["long-context"] == 8 and 0 < lengths["hallucination"] <= 4
    assert set(found["representation-hit"].baseline) == {0.25} and max(found["check-blind"].ours) < 1e-9
    assert set(found["check-last"].ours) == {0.5} and max(found["check-last"].baseline) < 0.5


def test_trainings_depend_on_the_seed_alone(small):
    assert module.trainings(3) == module.trainings(3) != module.trainings(4)


def test_the_source_is_noisy_in_its_targets_alone(monkeypatch):
    monkeypatch.setattr(module, "STATES", 4)
    source = module.Source(0)
    source.P = torch.eye(4).roll(1, -1)  # each state is followed by the next
    context, target = source.draw(4000)
    assert target.equal((context + 1) % 4)
    context, target = source.draw(4000, noise=0.2)
    assert (target != (context + 1) % 4).double().mean() == pytest.approx(0.2 * 0.75, abs=0.03)


def test_items_ask_for_the_patch_that_holds_the_answer():
    drawn = glyphs.batch(3, 5)
    for i, item in enumerate(module.items_of(3, 5)):
        assert item.relevant.nonzero().flatten().tolist() == [int(drawn.asked[i])] and item.answer == drawn.answers[i]
        assert item.inputs["input_ids"].equal(drawn.input_ids[i : i + 1])


def test_a_blinded_copy_leaves_the_model_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blind = module.blinded(model)
    drawn = glyphs.batch(2, 1)
    other = drawn._replace(pixel_values=-drawn.pixel_values)
    with torch.no_grad():
        a, b = (blind(input_ids=d.input_ids, pixel_values=d.pixel_values).logits[:, -1] for d in (drawn, other))
    assert a.equal(b)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_questions_say_whether_the_object_is_there():
    for item, example in zip(
        module.questions_of(8, 3), scenes.multi(8, 3, types=("presence", "colour", "presence", "place")), strict=True
    ):
        assert item.present == {"yes": True, "no": False}.get(example.answer)
        assert item.inputs["input_ids"].equal(scenes.batch([example]).input_ids)
