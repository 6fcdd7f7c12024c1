import pytest
import torch

import seqwise.lab.reproduce.vmtc_cmai as module
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
    assert set(found["both"].ours) <= {0.0, 1.0}
    assert all(ours > chance for ours, chance in zip(found["cohesion"].ours, found["cohesion"].baseline, strict=True))
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"


def test_pooling_averages_squares_of_patches(model):
    drawn = staged.batch(2, seed=1, questions=1)
    rows: list[torch.Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _m, args: rows.append(args[0]))
    with torch.no_grad(), module.Pooling().on(model) as run:
        model(input_ids=drawn.input_ids, pixel_values=drawn.pixel_values)
    hook.remove()
    full, pooled = rows
    assert pooled.shape[1] == 9 and all(len(kept["input"]) == 9 + 3 for kept in run.kept())
    torch.testing.assert_close(pooled[1, 4], full[1, [14, 15, 20, 21]].mean(0))
    assert run.members("input")[0][1 + 14] == [1 + 14, 1 + 15, 1 + 20, 1 + 21]
    assert not {"Pooling", "HiddenByChance"} & set(known_classes(Method))


def test_chance_hides_so_many_image_tokens_from_text_alone(model):
    drawn = staged.batch(3, seed=1, questions=1)
    tables = []
    for seed in (0, 0, 1):
        with torch.no_grad(), module.HiddenByChance(seed=seed).on(model) as run:
            model(input_ids=drawn.input_ids, pixel_values=drawn.pixel_values)
        tables.append(run.engine.ledger.facts["marks"]["kind"][:, :39])
    assert tables[0].equal(tables[1]) and not tables[0].equal(tables[2])
    assert (tables[0] == 2).sum(-1).tolist() == [27] * 3 and (tables[0][:, 1:37] != 1).all()
    assert (tables[0][:, 37:] == 1).all() and (tables[0][:, 0] == 0).all()


def test_what_is_hidden_does_not_change_the_answer(model):
    drawn = staged.batch(3, seed=1, questions=1)
    found = []
    for pixels in (drawn.pixel_values, -drawn.pixel_values):
        with torch.no_grad(), module.HiddenByChance(share=1.0).on(model):
            found.append(model(input_ids=drawn.input_ids, pixel_values=pixels).logits[:, -1])
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


def test_alike_is_one_for_copies_and_less_for_strangers():
    u = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=-1)
    assert module.alike(u, torch.tensor([0, 0, 1])) == pytest.approx(1.0)
    assert module.alike(u, torch.tensor([0, 1, 1])) == pytest.approx((1 + 2 * 0.5**0.5) / 3)
