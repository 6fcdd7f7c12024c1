import pytest
import torch

import seqwise.lab.reproduce.transprune as module
from seqwise.core.config import known_classes
from seqwise.core.method import Method
from seqwise.lab.zoo import staged


@pytest.fixture(scope="module")
def model():
    return staged.build(0)


def test_measures_every_testable_claim_once_per_image(monkeypatch, model):
    monkeypatch.setattr(module, "train", lambda seed, progress: model)
    monkeypatch.setattr(module, "IMAGES", 6)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert list(found) == [claim.key for claim in module.REPRODUCTION.testable]
    assert all(len(measured.ours) == len(measured.baseline) == 6 for measured in found.values())
    assert set(found["control"].baseline) == {1 / 5} and set(found["quality"].ours) <= {0.0, 1.0}
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"


@pytest.mark.parametrize("criterion, left", [("chance", (18, 9, 4)), ("last row", (18, 9, 4)), ("none", (0, 0, 0))])
def test_rivals_keep_as_many_tokens_as_the_method(model, criterion, left):
    drawn = staged.batch(4, seed=1, questions=1)
    with torch.no_grad(), module.Staged(criterion=criterion).on(model) as run:
        model(input_ids=drawn.input_ids, pixel_values=drawn.pixel_values)
    for stages in run.kept():
        for number, count in enumerate(left, 1):
            kept = stages.get(f"layer {number}", stages["layer 1"])  # a stage that cuts nothing is not noted
            assert sum(1 <= position <= 36 for position in kept) == count
            assert {0, 37, 38} <= set(kept)
    assert "Staged" not in known_classes(Method)


def test_without_any_image_token_the_answer_does_not_depend_on_the_image(model):
    drawn = staged.batch(4, seed=1, questions=1)
    nothing = module.Staged(criterion="none", budget=(0.25,), prune_after=(2,))
    found = []
    for pixels in (drawn.pixel_values, -drawn.pixel_values):
        with torch.no_grad(), nothing.on(model):
            found.append(model(input_ids=drawn.input_ids, pixel_values=pixels).logits[:, -1])
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


def test_spearman_with_position():
    score = torch.tensor([[1.0, 2.0, 3.0, 9.0], [4.0, 3.0, 2.0, 1.0], [2.0, 1.0, 4.0, 3.0]])
    assert module.spearman_with_position(score).tolist() == pytest.approx([1.0, -1.0, 1 - 6 * 4 / (4 * 15)])


def test_position_bias_reads_both_scores_at_the_same_stage(model):
    drawn = staged.batch(5, seed=2, questions=1)
    ttv, attention = module.position_bias(model, drawn)
    assert len(ttv) == len(attention) == 5 and all(0 <= value <= 1 for value in ttv + attention)
    # image rows of an untrained model attend evenly to what precedes them: the earlier, the more
    assert min(attention) > 0.8 > max(ttv)
