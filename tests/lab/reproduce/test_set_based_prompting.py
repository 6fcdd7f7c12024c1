import pytest
import torch

import seqwise.lab.reproduce._documents as task
import seqwise.lab.reproduce.set_based_prompting as module
from seqwise.methods.order.set_based_prompting import SetBasedPrompting


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(task, "BATCH", 4)
    for name, value in {"STEPS": 2, "MORE_STEPS": 1, "PROMPTS": 5}.items():
        monkeypatch.setattr(module, name, value)


def test_training_and_the_method_read_a_prompt_alike():
    model = task.model(0).eval()
    prompts = task.draw(3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(prompts.ids, **module.edited(prompts), use_cache=False).logits[:, -1]
    torch.testing.assert_close(
        task.last_logits(model, prompts, SetBasedPrompting()), wanted, atol=1e-5, rtol=1e-4
    )  # fmt: skip


def test_only_both_edits_together_make_probabilities_the_same_in_all_orders():
    model = task.model(0).eval()
    prompts = task.draw(3, torch.Generator().manual_seed(0))
    changes = [
        max(module.change(module.probabilities(model, prompts, method)))
        for method in (SetBasedPrompting(), module.MaskAlone(), module.PositionsAlone(), None)
    ]
    assert changes[0] < 1e-5 and min(changes[1:]) > 1e-2, changes


def test_probabilities_are_those_of_the_values():
    model = task.model(0).eval()
    prompts = task.draw(2, torch.Generator().manual_seed(0))
    p = module.probabilities(model, prompts, None)
    assert p.shape == (8, 2, task.VALUES)
    logits = task.last_logits(model, prompts.permuted(task.rotations(8)[3]))
    torch.testing.assert_close(p[3], logits[:, task.VALUE_ID :].softmax(-1))
    right = module.hits(torch.eye(8)[(prompts.answers - task.VALUE_ID)][None], prompts)
    assert right.tolist() == [[1.0, 1.0]]


def test_measures_every_testable_claim():
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert all(len(measured.ours) == len(measured.baseline) == 5 for measured in found.values())
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"
