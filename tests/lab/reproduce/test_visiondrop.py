import pytest
import torch

import seqwise.lab.reproduce.visiondrop as module
from seqwise.core.config import known_classes
from seqwise.core.method import Method
from seqwise.lab.reproduce._staged import right_answers
from seqwise.lab.zoo import staged
from seqwise.methods.reduce.visiondrop import VisionDrop


@pytest.fixture(scope="module")
def model():
    return staged.build(0)


def test_measures_every_testable_claim_once_per_image(monkeypatch, model):
    monkeypatch.setattr(module, "train", lambda seed, progress: model)
    monkeypatch.setattr(module, "IMAGES", 6)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert list(found) == [claim.key for claim in module.REPRODUCTION.testable]
    assert all(len(measured.ours) == len(measured.baseline) == 6 for measured in found.values())
    assert set(found["quality"].ours) <= {0.0, 1.0}
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"


@pytest.mark.parametrize(
    "method, counts",
    [
        (module.Rival(), (36, 18, 9, 4)),
        (module.Rival(criterion="last row"), (36, 18, 9, 4)),
        (VisionDrop(budget=(1.0, *module.INSIDE), contextual=0, prune_after=module.STAGES), (36, 18, 9, 4)),
        (VisionDrop(budget=module.TOKENS, contextual=module.CONTEXTUAL, prune_after=module.STAGES), module.TOKENS),
    ],
    ids=str,
)
def test_both_arms_keep_as_many_tokens(model, method, counts):
    drawn = staged.batch(4, seed=1, questions=1)
    with torch.no_grad(), method.on(model) as run:
        model(input_ids=drawn.input_ids, pixel_values=drawn.pixel_values)
    for stages in run.kept():
        for name, count in zip(("input", "layer 1", "layer 2", "layer 3"), counts, strict=True):
            kept = stages.get(name, range(39))  # a stage that cuts nothing is not noted
            assert sum(1 <= position <= 36 for position in kept) == count
            assert {0, 37, 38} <= set(kept)
    assert "Rival" not in known_classes(Method)


def test_chance_depends_on_the_seed(model):
    drawn = staged.batch(4, seed=1, questions=1)
    kept = []
    for seed in (0, 0, 1):
        with torch.no_grad(), module.Rival(seed=seed).on(model) as run:
            model(input_ids=drawn.input_ids, pixel_values=drawn.pixel_values)
        kept.append(run.kept())
    assert kept[0] == kept[1] != kept[2]


def test_spearman_with_position():
    score = torch.tensor([[1.0, 2.0, 3.0, 9.0], [4.0, 3.0, 2.0, 1.0], [2.0, 1.0, 4.0, 3.0]])
    assert module.spearman_with_position(score).tolist() == pytest.approx([1.0, -1.0, 1 - 6 * 4 / (4 * 15)])


def test_position_bias_reads_both_scores_at_the_same_stage(model):
    drawn = staged.batch(5, seed=2, questions=1)
    visual, text = module.position_bias(model, drawn)
    assert len(visual) == len(text) == 5 and all(0 <= value <= 1 for value in visual + text)
    # image rows of an untrained model attend evenly to what precedes them: the earlier, the more
    assert min(visual) > 0.8 > max(text)


def test_right_answers_compares_the_last_row_with_the_answer(model):
    drawn = staged.batch(8, seed=3, questions=1)
    with torch.no_grad():
        said = model(input_ids=drawn.input_ids, pixel_values=drawn.pixel_values).logits[:, -1].argmax(-1)
    assert right_answers(model, drawn._replace(answers=said[:, None])) == [1.0] * 8
    wrong = said.clone()
    wrong[3] += 1
    assert right_answers(model, drawn._replace(answers=wrong[:, None])) == [1.0] * 3 + [0.0] + [1.0] * 4
