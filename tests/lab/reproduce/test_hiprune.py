import torch

import seqwise.lab.reproduce.hiprune as module
from seqwise.lab.zoo import glyphs
from seqwise.methods.reduce.hiprune import anchor_count


def test_measures_every_testable_claim_once_per_image(monkeypatch):
    model = glyphs.build(0)
    monkeypatch.setattr(module, "trained", lambda seed, progress: model)
    monkeypatch.setattr(module, "IMAGES", 6)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert list(found) == [claim.key for claim in module.REPRODUCTION.testable]
    assert all(len(measured.ours) == len(measured.baseline) == 6 for measured in found.values())
    assert set(found["keep-33"].ours) <= {0.0, 1.0}
    assert module.REPRODUCTION.measure(0, lambda text: None) == found, "the seed decides everything"


def test_the_arms_have_the_anchors_that_the_claims_speak_of():
    assert [anchor_count(B, 0.1) for B in (module.LARGE, module.MIDDLE, module.SMALL)] == [0, 0, 0]
    assert [anchor_count(B, module.ALPHA) for B in (module.LARGE, module.MIDDLE)] == [1, 1]
    assert anchor_count(module.LARGE, 1.0) == 2
    assert [round(module.BETA * B) for B in (module.LARGE, module.MIDDLE, module.SMALL)] == [1, 1, 0]


def test_blocks_are_two_objects_of_four_patches_each():
    drawn = module.blocks(9, seed=3)
    patches = drawn.pixel_values.unfold(2, 4, 4).unfold(3, 4, 4)  # (B, 3, 6, 6, 4, 4)
    bright = patches.amax((1, 4, 5)).flatten(1) > 0.75  # noise of sd 0.15 stays below, an object's glyph above
    for b in range(9):
        assert bright[b].nonzero()[:, 0].tolist() == drawn.objects[b].tolist()
        asked = int(drawn.asked[b])
        row, column = divmod(asked, 6)
        block = patches[b, :, row : row + 2, column : column + 2].permute(1, 2, 0, 3, 4)  # (2, 2, 3, 4, 4)
        assert {asked, asked + 1, asked + 6, asked + 7} <= set(drawn.objects[b].tolist())
        key, colour = int(drawn.input_ids[b, -1]) - glyphs.KEY_ID, int(drawn.answers[b]) - glyphs.COLOUR_ID
        wanted = (0.3 + 0.7 * glyphs.GLYPHS[key]) * glyphs.COLOURS[colour][:, None, None]
        assert (block - wanted).abs().max() < 0.75  # noise alone
        assert drawn.scene[b, key] == colour and int((drawn.scene[b] < 6).sum()) == 2
    again = module.blocks(9, seed=3)
    assert all(torch.equal(x, y) for x, y in zip(drawn, again, strict=True))
