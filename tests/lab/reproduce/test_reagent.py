import pytest
import torch

import seqwise.lab.reproduce.reagent as module
from seqwise.insight.explain.base import next_logits
from seqwise.insight.explain.reagent import ReAGent
from seqwise.lab.zoo.recall import recall_batch, recall_model


def test_input_x_gradient_is_the_directional_derivative_along_each_embedding():
    model = recall_model(0).double()
    ids, target = torch.tensor([3, 200, 17, 210]), 235
    found = module.input_x_gradient(model, ids, target)
    e = model.get_input_embeddings()(ids[None]).detach()
    for i in range(4):
        step = torch.zeros_like(e)
        step[0, i] = 1e-3 * e[0, i]
        with torch.no_grad():
            up, down = (
                next_logits(model, inputs_embeds=x).double().log_softmax(-1)[0, target] for x in (e + step, e - step)
            )
        assert found[i].item() == pytest.approx(abs(float(up - down)) / 2e-3, rel=0.05, abs=1e-3)


def test_last_attention_is_a_distribution_over_the_context():
    model = recall_model(0)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = module.last_attention(model, torch.tensor([3, 200, 17, 210]))
    assert attention.shape == (4,) and attention.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_measures_every_claim_once_per_prompt(monkeypatch):
    """On an untrained model, whose own answers are taken as right, with few prompts, steps and draws."""
    model = recall_model(0)

    def answered(*args, **kwargs):
        batch = recall_batch(*args, **kwargs)
        with torch.no_grad():
            return batch._replace(targets=model(batch.input_ids).logits[:, -1:].argmax(-1))

    monkeypatch.setattr(module, "train_recall", lambda seed: model)
    monkeypatch.setattr(module, "recall_batch", answered)
    monkeypatch.setattr(module, "PROMPTS", 3)
    monkeypatch.setattr(module, "DRAWS", 2)
    monkeypatch.setattr(module, "METHOD", ReAGent(max_steps=3, top_k=1))
    said = []
    found = module.REPRODUCTION.measure(0, said.append)
    assert list(found) == [claim.key for claim in module.REPRODUCTION.claims]
    assert all(len(measured.ours) == len(measured.baseline) == 3 for measured in found.values())
    assert set(found["fact-first"].ours) <= {0.0, 1.0} and set(found["fact-first"].baseline) == {module.SHARE}
    assert found["soft-nc-random"].ours == found["soft-nc-gradient"].ours
    assert found["soft-nc-random"].baseline != found["soft-nc-gradient"].baseline
    assert said[-1] == "3 of 3 prompts explained"
    assert module.REPRODUCTION.measure(0, said.append) == found, "the seed decides everything"
