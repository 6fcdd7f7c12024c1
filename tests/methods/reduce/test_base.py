import torch

from seqwise.core.views import Stage
from seqwise.methods.reduce.base import patch_rows, rows_of_images, with_newlines

# two samples: two images of 3 and 2 patches, the first with a newline; one image of 2 patches on the left-padded right
IMAGE = torch.tensor([[-1, 0, 0, 0, 0, -1, 1, 1, -1], [-1, -1, -1, -1, 0, 0, 0, -1, -1]])
TILE = torch.tensor([[-1, 0, 1, 1, 1, -1, 0, 0, -1], [-1, -1, -1, -1, 0, 1, 1, -1, -1]])
COLUMN = torch.tensor([[-1, 0, 0, 1, -1, -1, 0, 1, -1], [-1, -1, -1, -1, 0, 0, -1, -1, -1]])


def stage(tile: torch.Tensor = TILE, column: torch.Tensor = COLUMN) -> Stage:
    facts = {"tile": tile, "column": column}
    live = torch.ones(2, 9, dtype=torch.bool)
    live[1, :3] = False
    order = torch.where(live, live.cumsum(-1) - 1, -1)
    nothing = torch.zeros(2, 2, dtype=torch.long)
    return Stage(0, 4, order, live, IMAGE >= 0, IMAGE, nothing, {}, nothing, torch.zeros(2, 9, 3), facts.__getitem__)


def test_newline_tokens_are_no_patches_and_unknown_cells_are():
    assert patch_rows(stage()).nonzero().tolist() == [[0, 1], [0, 2], [0, 3], [0, 6], [0, 7], [1, 4], [1, 5]]
    unknown = torch.full_like(TILE, -1)
    assert patch_rows(stage(unknown, unknown)).equal(IMAGE >= 0)


def test_each_image_comes_once_with_its_rows():
    found = [(b, rows.tolist()) for b, rows in rows_of_images(patch_rows(stage()), IMAGE)]
    assert found == [(0, [1, 2, 3]), (0, [6, 7]), (1, [4, 5])]
    assert rows_of_images(torch.zeros(2, 9, dtype=torch.bool), IMAGE) == []


def test_newlines_go_with_the_first_lost_patch_of_their_own_image():
    at = stage()
    patches = patch_rows(at)
    text = at.live & ~at.visual
    assert with_newlines(at, patches, text | patches).equal(at.live)
    keep = text | patches
    keep[0, 7] = False  # of the image without newline
    assert with_newlines(at, patches, keep).equal(at.live & keep | (IMAGE == 0) & at.visual & at.live)
    keep[1, 4] = False
    kept = with_newlines(at, patches, keep)
    assert kept[0, 4] and not kept[1, 6]
