import pytest
import torch

import seqwise.lab.reproduce.element_ordering as module
from seqwise.methods.order.element_ordering import neighbour_distance, raster


def generator(seed):
    return torch.Generator().manual_seed(seed)


def small(monkeypatch, **more):
    for name, value in {
        "ROWS": (1, 2), "PAGES": 2, "STEPS": 2, "BATCH": 4, "TEST_PAGES": 2, "PROMPTS": 3, "SPREAD_PAGES": 2, **more,
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_the_element_to_the_right_comes_next_in_raster_order(rows):
    for seed in range(5):
        page = module.page(rows, generator(seed))
        order = raster(page.boxes).tolist()
        assert int((page.right < 0).sum()) == rows and 5 * rows <= len(order) <= 9 * rows
        for i, following in zip(order, [*order[1:], -1], strict=True):
            left, top, right, bottom = page.boxes[i].tolist()
            if page.right[i] < 0:
                assert following < 0 or page.boxes[following][1] > bottom
            else:
                assert page.right[i] == following
                assert page.boxes[following][0] > right - 1e-3 - 45 and page.boxes[following][2] > right


def test_prompts_ask_for_the_value_right_of_x():
    page = module.page(3, generator(0))
    n = len(page.right)
    order = torch.randperm(n, generator=generator(1))
    ids, answers = module.prompts(page, 20, order, generator(2))
    assert ids.shape == (20, n + 1) and (ids[:, -1] == module.ASK_ID).all()
    for row, answer in zip(ids, answers, strict=True):
        (x,) = (row == module.X_ID).nonzero()[:, 0].tolist()
        neighbour = int(page.right[order[x]])
        assert neighbour >= 0
        assert row[order.tolist().index(neighbour)] == answer - module.ANSWER_ID
    plain, same = module.prompts(page, 20, torch.arange(n), generator(2))
    assert same.equal(answers) and plain[:, order].equal(ids[:, :-1]), "arms differ by the order alone"


def test_a_random_order_is_drawn_anew_and_the_others_are_not():
    pages = [module.page(4, generator(0))]
    for arm, fixed in (("raster", True), ("random", False)):
        order = module.ordering(arm, pages, 0)
        first, second = order(0), order(0)
        assert first.equal(second) == fixed
        assert module.ordering(arm, pages, 0)(0).equal(first)


def test_arms_begin_alike_and_learn_from_the_same_values(monkeypatch):
    small(monkeypatch, STEPS=1)
    first, again, other = (module.train(0, arm) for arm in ("raster", "raster", "random"))
    rows = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(a.equal(b) for a, b, _ in rows) and not all(a.equal(c) for a, _, c in rows)


def test_the_guess_without_layout_is_the_pages_most_frequent_value(monkeypatch):
    small(monkeypatch, TEST_PAGES=1, PROMPTS=30, ROWS=(4,))
    g = generator(1_000_003)
    page = module.page(4, g)
    ids, answers = module.prompts(page, 30, torch.arange(len(page.right)), g)
    wanted = []
    for row, answer in zip(ids[:, :-1].tolist(), answers.tolist(), strict=True):
        counts = [row.count(value) for value in range(module.VALUES)]
        wanted.append(float(counts.index(max(counts)) == answer - module.ANSWER_ID))
    assert module.hits(None, 0, "raster") == wanted and 0 < sum(wanted) < 30


def test_clusters_are_far_apart_for_a_list_in_no_order():
    boxes = module.clusters(60, generator(0))
    assert boxes.shape == (60, 4) and (boxes[:, :2] < boxes[:, 2:]).all()
    assert neighbour_distance(boxes, raster(boxes)) < 0.8 * neighbour_distance(boxes, torch.arange(60))


def test_measures_every_testable_claim(monkeypatch):
    pytest.importorskip("sklearn")
    small(monkeypatch)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert {key: len(measured.ours) for key, measured in found.items()} == {
        "order-matters": 6, "as-no-layout": 6, "tsne": 6, "neighbours": 2,
    }  # fmt: skip
    assert found["as-no-layout"].baseline == tuple(module.hits(None, 0, "raster")), "counting needs no order"
    assert all(
        ours < 2 * half for ours, half in zip(found["neighbours"].ours, found["neighbours"].baseline, strict=True)
    )
