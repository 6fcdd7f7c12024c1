import torch

import seqwise.lab.reproduce.attention_calibration as module
from seqwise.lab.zoo.recall import KEY_ID, VALUE_ID, VALUES, recall_model


def test_a_separator_stands_in_front_of_every_eight_tokens_and_nowhere_else():
    ids, answers = module.separated(5, 3, 4, torch.Generator().manual_seed(0))
    assert ids.shape == (5, 3 * 9 + 4) and answers.shape == (5, 4)
    assert (ids == module.SEPARATOR).nonzero()[:, 1].tolist() == [0, 9, 18] * 5
    for prompt, wanted in zip(ids.tolist(), answers.tolist(), strict=True):
        items = dict(divmod(token, VALUES) for token in prompt if token < module.SEPARATOR)
        assert [VALUE_ID + items[asked - KEY_ID] for asked in prompt[-4:]] == wanted


def test_received_attention_is_the_column_mean_of_each_kind():
    model = recall_model(0, module.LAYERS)
    ids, _ = module.separated(2, 2, 1, torch.Generator().manual_seed(0))
    later, fillers = module.received(model, ids)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    for b in range(2):
        wanted = [
            float(sum(maps[i][b, h, 9:, 9].mean() for i in (2, 3, 4) for h in (0, 1)) / 6),
            sum(
                float(maps[i][b, h, j:, j].mean()) / 6
                for i in (2, 3, 4) for h in (0, 1) for j in range(18) if 192 < ids[b, j] < 208
            ) / sum(192 < token < 208 for token in ids[b, :18].tolist()),
        ]  # fmt: skip
        torch.testing.assert_close(torch.tensor([later[b], fillers[b]]), torch.tensor(wanted))


def test_measures_every_testable_claim(monkeypatch):
    for name, value in {"STEPS": 2, "BATCH": 2, "ASKED": 2, "CALIBRATION": 5, "HELD_OUT": 4, "MAPS": 3}.items():
        monkeypatch.setattr(module, name, value)
    said = []
    found = module.REPRODUCTION.measure(0, said.append)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    sizes = {"later-sinks": 3, "calibration-split": 5, "held-out": 4, "chosen-heads": 4}
    assert {key: len(measured.ours) for key, measured in found.items()} == sizes
    assert "heads kept" in said[-1]
    assert module.REPRODUCTION.measure(0, said.append) == found, "the seed decides everything"
