import pytest
import torch

import seqwise.lab.reproduce.concentric_causal_attention as module
from seqwise.methods.order.concentric_causal_attention import concentric_mask, locate, positions


def small(monkeypatch, **more):
    for name, value in {"STEPS": 1, "BATCH": 4, "IMAGES": 1, **more}.items():
        monkeypatch.setattr(module, name, value)


def test_a_prompt_asks_for_the_object_at_its_cell_or_for_an_absent_one():
    cells = torch.cat([torch.arange(64), torch.full((64,), -1)])
    prompts = module.draw(cells, torch.Generator().manual_seed(0))
    assert prompts.ids.shape == (128, 73)
    for ids, answer, cell in zip(prompts.ids.tolist(), prompts.answers.tolist(), cells.tolist(), strict=True):
        image, asked = ids[4:68], ids[-1] - module.NAME_ID
        objects = {j: token for j, token in enumerate(image) if token < module.KINDS}
        assert len(objects) == len(set(objects.values())) == 4
        assert all(token < module.TEXT_ID for token in image)
        assert all(module.TEXT_ID <= token < module.NAME_ID for token in ids[:4] + ids[68:72])
        assert answer == (module.YES_ID if cell >= 0 else module.NO_ID)
        assert objects[cell] == asked if cell >= 0 else asked not in objects.values()


def test_training_and_the_method_give_the_same_positions_and_mask():
    ids = module.draw(torch.tensor([3, -1]), torch.Generator().manual_seed(0)).ids
    given = module.arranged(ids, concentric=True)
    ring, image = locate(module.segments(ids), None)
    assert given["position_ids"].equal(positions(ring, image))
    assert given["attention_mask"].equal(concentric_mask(ring, image))
    assert int(given["position_ids"].max()) == 72 - 64 + 4
    assert set(module.arranged(ids, concentric=False)) == {"attention_mask"}


@pytest.mark.parametrize("concentric", [True, False])
def test_answers_under_the_method_equal_those_of_the_training_forward(monkeypatch, concentric):
    small(monkeypatch)
    model = module.train(0, concentric)
    prompts = module.draw(torch.arange(-5, 5).clamp(min=-1), torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(prompts.ids, use_cache=False, **module.arranged(prompts.ids, concentric)).logits[:, -1]
    yes = logits[:, module.YES_ID] > logits[:, module.NO_ID]
    wanted = (yes == (prompts.answers == module.YES_ID)).double()
    assert module.hits(model, prompts, concentric).equal(wanted)


def test_the_attention_probe_is_the_share_of_the_upper_rows(monkeypatch):
    small(monkeypatch)
    model = module.train(0, False)
    ids = module.draw(torch.arange(3), torch.Generator().manual_seed(1)).ids
    share = module.top_share(model, ids, False)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(ids, output_attentions=True, use_cache=False).attentions
    for b in range(3):
        heads = [float(row[4:20].sum() / row[4:68].sum()) for layer in maps for row in layer[b, :, -1]]
        assert share[b] == pytest.approx(sum(heads) / len(heads), abs=1e-5)
    model.set_attn_implementation("sdpa")
    other = module.top_share(model, ids, True)
    assert model.config._attn_implementation == "sdpa"
    assert max(abs(a - b) for a, b in zip(share, other, strict=True)) > 1e-4


def test_both_arms_begin_alike_and_differ_by_order(monkeypatch):
    small(monkeypatch)
    first, again, other = (module.train(0, concentric) for concentric in (True, True, False))
    rows = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(a.equal(b) for a, b, _ in rows) and not all(a.equal(c) for a, _, c in rows)


def test_measures_every_testable_claim(monkeypatch):
    small(monkeypatch)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert {key: len(measured.ours) for key, measured in found.items()} == {
        "flat": 1, "worst-row": 1, "attention": 64, "overall": 128,
    }  # fmt: skip
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"
