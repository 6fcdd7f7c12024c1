import heapq
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seqwise
from seqwise.core.errors import MissingExtra, PromptError, UsageError
from seqwise.core.segments import Segments
from seqwise.methods.order.element_ordering import (
    ORDERS,
    Element,
    ElementOrdering,
    arrangement,
    by_reference,
    centres,
    marks,
    mst,
    named_element,
    neighbour_distance,
    origin,
    raster,
    reading_distance,
    serialise,
    shuffled,
    spectral,
    tsne,
    tsne_small,
)
from seqwise.testing.families import FAMILIES, marked

LLAMA = FAMILIES["llama"]
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}


def clusters(n, seed):
    """Boxes in four clusters on a page of 1800 x 1000, in no order."""
    random = np.random.default_rng(seed)
    middle = random.uniform((200, 150), (1600, 850), (4, 2))
    c = middle[np.arange(n) % 4] + random.normal(0, 60, (n, 2))
    size = random.uniform(10, 50, (n, 2))
    boxes = np.concatenate([c - size / 2, c + size / 2], -1)
    return torch.from_numpy(random.permutation(boxes))


def at(*points):
    """Boxes of one pixel around these centres."""
    return torch.tensor([[x - 0.5, y - 0.5, x + 0.5, y + 0.5] for x, y in points], dtype=torch.float64)


CORNER, SIDE = st.integers(0, 200), st.integers(1, 40)
ONE_BOX = st.tuples(CORNER, CORNER, SIDE, SIDE).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
BOXES = st.lists(ONE_BOX, min_size=1, max_size=12)


def prim_by_heap(boxes):
    """Prim's order with a queue of (cost, vertex)."""

    def points(box, edge):
        left, top, right, bottom = box
        x, y = (left + right) / 2, (top + bottom) / 2
        return {
            "top": [(left, top), (x, top), (right, top)],
            "bottom": [(left, bottom), (x, bottom), (right, bottom)],
            "left": {"centre": (left, y), "bottom": (left, bottom), "top": (left, top)},
            "right": {"centre": (right, y), "bottom": (right, bottom), "top": (right, top)},
        }[edge]

    def distance(u, v):
        pairs = [(a, b) for a in points(u, "bottom") for b in points(v, "top")]
        right, left = points(u, "right"), points(v, "left")
        pairs += [(right[a], left[b]) for a in ("centre", "top") for b in ("centre", "bottom", "top")]
        pairs += [(right["bottom"], left[b]) for b in ("top", "centre")]
        return min(math.hypot(a[0] - b[0], a[1] - b[1]) for a, b in pairs)

    n = len(boxes)
    start = min(range(n), key=lambda i: math.hypot(boxes[i][0] + boxes[i][2], boxes[i][1] + boxes[i][3]))
    queue, taken = [(0.0, start)], []
    while queue:
        _, u = heapq.heappop(queue)
        if u in taken:
            continue
        taken.append(u)
        for v in range(n):
            if v not in taken:
                heapq.heappush(queue, (distance(boxes[u], boxes[v]), v))
    return taken


# orders


@settings(max_examples=60, deadline=None)
@given(BOXES)
def test_every_order_is_a_permutation(boxes):
    boxes = torch.tensor(boxes, dtype=torch.float)
    for name, order in ORDERS.items():
        if not name.startswith("tsne"):
            found = order(boxes)
            assert found.dtype == torch.long and sorted(found.tolist()) == list(range(len(boxes))), name


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 7, 31])
@pytest.mark.parametrize("name", ORDERS)
def test_few_boxes_are_ordered_too(name, n):
    if name.startswith("tsne"):
        pytest.importorskip("sklearn")
    found = ORDERS[name](clusters(31, 0)[:n])
    assert found.dtype == torch.long and sorted(found.tolist()) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(BOXES)
def test_orders_equal_plain_sorting(boxes):
    tensor = torch.tensor(boxes, dtype=torch.float)
    middle = [((a + c) / 2, (b + d) / 2) for a, b, c, d in boxes]
    rows = [(round(y / 8) * 8, x) for x, y in middle]
    assert raster(tensor).tolist() == sorted(range(len(boxes)), key=lambda i: rows[i])
    assert origin(tensor).tolist() == sorted(range(len(boxes)), key=lambda i: boxes[i][0] ** 2 + boxes[i][1] ** 2)
    assert mst(tensor).tolist() == prim_by_heap(boxes)
    assert ORDERS["default"](tensor).tolist() == list(range(len(boxes)))


def test_a_raster_row_is_rounded_half_to_even():
    boxes = at((0, 4), (1, 0), (2, 12), (3, 20), (4, 16))  # rows 0, 0, 16, 16, 16
    assert raster(boxes).tolist() == [0, 1, 2, 3, 4]
    assert raster(at((9, 4), (1, 3), (0, 5))).tolist() == [1, 0, 2]  # 4 -> 0, 5 -> 8


def test_a_grid_is_read_line_by_line_and_translations_change_nothing():
    grid = at(*[(40 * x, 24 * y) for y in range(5) for x in range(7)])
    shuffle = shuffled(35, torch.Generator().manual_seed(0))
    assert shuffle[raster(grid[shuffle])].tolist() == list(range(35))
    boxes = clusters(25, 3)
    assert raster(boxes + torch.tensor([37.3, 32, 37.3, 32])).equal(raster(boxes))
    # moving all by 8 is not enough: halves are rounded to even
    assert raster(at((5, 4), (1, 12))).tolist() == [0, 1]
    assert raster(at((5, 12), (1, 20))).tolist() == [1, 0]


@pytest.mark.parametrize("order", [raster, origin, mst])
def test_the_order_of_arrival_counts_on_ties_only(order):
    boxes = clusters(25, 4)
    shuffle = shuffled(25, torch.Generator().manual_seed(1))
    assert shuffle[order(boxes[shuffle])].equal(order(boxes))
    assert order(boxes[:1].expand(4, 4)).tolist() == [0, 1, 2, 3]


def test_origin_goes_by_corners_and_mst_begins_by_centres():
    wide = torch.tensor([[0.0, 0, 300, 300], [20, 20, 40, 40]])
    assert origin(wide).tolist() == [0, 1] and mst(wide).tolist() == [1, 0]


def test_reading_distance_is_directed_and_misses_one_pair():
    u, v = [0.0, 0, 10, 10], [20.0, 0, 30, 10]
    d = reading_distance(torch.tensor([u, v]))
    assert float(d[0, 1]) == 10 and float(d[1, 0]) == pytest.approx(math.hypot(10, 10))
    # v left of and below u's right edge: bottom-right to bottom-left, distance 5, does not count
    low = reading_distance(torch.tensor([[0.0, 0, 10, 10], [15.0, -40, 25, 10]]))
    assert float(low[0, 1]) == pytest.approx(math.hypot(5, 5))


def test_boxes_that_are_none_are_refused():
    for bad in (torch.zeros(3, 2), torch.zeros(4), torch.tensor([[0.0, 0, math.nan, 1]])):
        for order in ORDERS.values():
            with pytest.raises(UsageError, match=r"boxes must be \(n, 4\) numbers"):
                order(bad)


def test_another_list_gives_its_ranks():
    boxes = at((0, 0), (100, 0), (50, 0), (101, 3))
    assert by_reference(boxes, at((99, 0), (51, 1), (1, 1))).tolist() == [1, 3, 2, 0]
    # as far from two: the rank that differs less from the own number, then the lower one
    assert by_reference(at((0, 0), (0, 0)), at((0, 5), (5, 0))).tolist() == [0, 1]
    assert by_reference(at((9, 9), (0, 0), (9, 9)), at((0, 5), (9, 9), (5, 0))).tolist() == [1, 0, 2]
    with pytest.raises(UsageError, match="at least one box"):
        by_reference(boxes, boxes[:0])


def test_shuffles_are_uniform_and_seeded():
    draws = [tuple(shuffled(3, torch.Generator().manual_seed(seed)).tolist()) for seed in range(600)]
    assert set(map(len, map(set, draws))) == {3}
    counts = [draws.count(order) for order in set(draws)]
    assert len(counts) == 6 and min(counts) > 60
    assert draws[:5] == [tuple(shuffled(3, torch.Generator().manual_seed(seed)).tolist()) for seed in range(5)]


# locality


def spread(order, n, seeds=range(3)):
    """Mean distance of list neighbours, as a share of a random order's."""
    ours = [neighbour_distance(clusters(n, seed), order(clusters(n, seed))) for seed in seeds]
    chance = [
        neighbour_distance(clusters(n, seed), shuffled(n, torch.Generator().manual_seed(i)))
        for seed in seeds
        for i in range(5)
    ]
    return (sum(ours) / len(ours)) / (sum(chance) / len(chance))


def test_neighbour_distance_is_the_mean_step():
    boxes = at((0, 0), (3, 4), (3, 10))
    assert neighbour_distance(boxes, torch.tensor([0, 1, 2])) == pytest.approx(5.5)
    assert neighbour_distance(boxes, torch.tensor([0, 2, 1])) == pytest.approx((math.hypot(3, 10) + 6) / 2)
    assert neighbour_distance(boxes[:1], torch.tensor([0])) == 0


@pytest.mark.parametrize("n", [20, 30, 60])
def test_mst_keeps_neighbours_better_than_raster_and_that_better_than_chance(n):
    assert spread(mst, n) < spread(raster, n) < 1
    assert spread(spectral, n) < 0.5


def test_the_papers_tsne_needs_many_boxes_and_the_small_variant_does_not():
    pytest.importorskip("sklearn")
    assert spread(tsne, 60) < 0.5
    assert spread(tsne_small, 20) < 0.5
    assert spread(tsne, 10) > 0.6, "perplexity n - 1 orders few boxes no better than chance"


def test_tsne_falls_by_value_and_flips_where_asked():
    pytest.importorskip("sklearn")
    from sklearn.manifold import TSNE

    boxes = clusters(40, 2)
    value = TSNE(n_components=1, random_state=42, perplexity=30).fit_transform(centres(boxes).numpy())[:, 0]
    order = tsne(boxes)
    assert neighbour_distance(boxes, order) == pytest.approx(
        neighbour_distance(boxes, torch.from_numpy((-value).argsort())), rel=0.2
    )
    for seed in range(3):
        flipped = tsne(clusters(12, seed), flip=True)
        first, last = centres(clusters(12, seed))[flipped[[0, -1]]].norm(dim=-1)
        assert first <= last
        assert tsne(clusters(12, seed)).tolist() in (flipped.tolist(), flipped.flip(0).tolist())


@pytest.mark.parametrize("order", [tsne, tsne_small, spectral])
def test_centres_that_are_all_equal_go_by_raster(order):
    same = torch.tensor([[0.0, 0, 10, 10], [2, 2, 8, 8], [4, 4, 6, 6]])
    assert order(same).tolist() == [0, 1, 2]


def test_spectral_takes_a_line_from_its_end_near_the_corner_and_bears_coincident_boxes():
    line = at(*[(1000 - 10 * i, 500 - 5 * i) for i in range(20)])
    assert spectral(line).tolist() == list(range(19, -1, -1))
    heaps = at(*[(0, 0)] * 8, *[(100, 0)] * 8)
    assert sorted(spectral(heaps).tolist()) == list(range(16))
    assert all(i < 8 for i in spectral(heaps).tolist()[:8])


def test_tsne_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(MissingExtra, match="pip install scikit-learn, or order by 'spectral'"):
        tsne(clusters(5, 0))


# a screen as text


SCREEN = [
    Element("BUTTON", "Send"),
    Element("StaticText", "Your\n name "),
    Element("INPUT", ""),
    Element("IMG", "logo"),
]


def test_lines_are_numbered_in_the_new_order_and_answers_map_back():
    order = torch.tensor([3, 1, 2, 0])
    assert (
        serialise(SCREEN, order) == "[1] [IMG] [logo]\n[] [StaticText] [Your name]\n[2] [INPUT] []\n[3] [BUTTON] [Send]"
    )
    numbers = marks(SCREEN, order)
    assert numbers == [3, 2, 0]
    for line in serialise(SCREEN, order).splitlines():
        number = line[1 : line.index("]")]
        if number:
            element = SCREEN[named_element(f"click [{number}]", numbers)]
            assert line == f"[{number}] [{element.tag}] [{element.text}]"
    assert named_element(" double_click [2] ", numbers) == 2 and named_element("hover [ 1 ]", numbers) == 3
    for action in ("type [3]", "press [Enter]", "hotkey [ctrl+c]", "type [a]b\nc]"):
        assert named_element(action, numbers) is None


@pytest.mark.parametrize(
    "action, message",
    [
        ("click [4]", "click must name an element from 1 to 3, got '4'"),
        ("click [0]", "from 1 to 3, got '0'"),
        ("hover [-1]", "got '-1'"),
        ("click [Send]", "got 'Send'"),
        ("drag [1]", "action must be click, double_click, hover, type, press or hotkey .* got 'drag "),
        ("click 1", "action must be click"),
    ],
)
def test_answers_that_name_nothing_are_refused(action, message):
    with pytest.raises(UsageError, match=message):
        named_element(action, [3, 2, 0])


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4]])
def test_an_order_that_is_none_is_refused(order):
    with pytest.raises(UsageError, match=r"permutation of 0 \.\. 3"):
        serialise(SCREEN, order)


# the method


def facts(members, boxes, sets=None):
    """One prompt: the member of each token, -1 at text, and each member's box."""
    member = torch.tensor([members])
    plain = Segments.infer(torch.ones_like(member), None, None)
    box = torch.full((1, len(members), 4), math.nan)
    for j, i in enumerate(members):
        if i >= 0 and boxes[i] is not None:
            box[0, j] = torch.tensor(boxes[i], dtype=torch.float)
    number = torch.where(member >= 0, 0, -1) if sets is None else torch.tensor([sets])
    return replace(plain, set=number, member=member, box=box)


def box(x, y):
    return (x, y, x + 10, y + 4)


def test_members_change_places_and_what_stands_between_them_stays():
    given = facts([-1, 0, 0, -1, 1, -1, 2, 2, 2, -1], [box(50, 0), box(0, 80), box(0, 0)])
    columns = arrangement(given, raster)
    assert columns.tolist() == [[0, 6, 7, 8, 3, 1, 2, 5, 4, 9]]
    method = ElementOrdering(by="raster")
    ids = torch.arange(100, 110)[None]
    reworded, moved = method.reword(ids, given)
    assert reworded.tolist() == [[100, 106, 107, 108, 103, 101, 102, 105, 104, 109]]
    assert moved.member.tolist() == [[-1, 2, 2, 2, -1, 0, 0, -1, 1, -1]]
    assert moved.box[0, 1].tolist() == list(box(0, 0)) and moved.box[0, 4].isnan().all()


def test_each_set_is_ordered_by_itself_and_one_without_boxes_stays():
    given = facts([0, 1, -1, 0, 1, -1, 0, 1], [box(9, 9), box(0, 0)], sets=[0, 0, -1, 1, 1, -1, 2, 2])
    given.box[0, 3:5] = math.nan
    assert arrangement(given, raster).tolist() == [[1, 0, 2, 3, 4, 5, 7, 6]]
    given.box[0, 6] = math.nan
    with pytest.raises(PromptError, match="me: member 0 of set 2 has no box; give each member one, or none"):
        arrangement(given, raster, "me")


@pytest.mark.parametrize("by", ["raster", "origin", "mst", "spectral", "default"])
def test_the_model_reads_the_ordered_prompt_and_answers_under_the_callers_ids(by):
    model, batch = LLAMA.tiny(), LLAMA.prompt(30)
    given = marked(batch)
    with ElementOrdering(by=by).on(model) as run:
        run.bind(given)
        found = model.generate(**batch, **OPTIONS)
    columns = arrangement(given, ORDERS[by])
    wanted = model.generate(batch["input_ids"].gather(1, columns), attention_mask=batch["attention_mask"], **OPTIONS)
    for ours, theirs in zip(found.scores, wanted.scores, strict=True):
        torch.testing.assert_close(ours, theirs, **LLAMA.tolerance)
    assert found.sequences[:, :30].equal(batch["input_ids"])
    assert columns.equal(torch.arange(30)[None]) == (by == "default")


def test_a_shuffled_input_gives_one_answer():
    model, seen = LLAMA.tiny(), []
    tokens, boxes = [11, 12, 13, 14], [box(60, 3), box(5, 2), box(5, 60), box(90, 40)]
    for shuffle in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        ids = torch.tensor([[1, 2, *(tokens[i] for i in shuffle), 7]])
        given = facts([-1, -1, 0, 1, 2, 3, -1], [boxes[i] for i in shuffle])
        with ElementOrdering(by="raster").on(model) as run:
            run.bind(given)
            seen.append(model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS).scores)
    for scores in seen[1:]:
        for a, b in zip(scores, seen[0], strict=True):
            torch.testing.assert_close(a, b, **LLAMA.tolerance)


def test_a_random_order_depends_on_the_seed_and_the_prompts_own_tokens():
    given = facts([-1, *range(12), -1], [box(i, i) for i in range(12)])
    ids, other = torch.arange(14)[None], torch.arange(14)[None] + 1

    def order(seed, tokens):
        return ElementOrdering(by="random", seed=seed).reword(tokens, given)[1].member.tolist()

    assert order(0, ids) == order(0, ids) != order(1, ids)
    assert order(0, other) != order(0, ids)


def test_boxes_travel_from_the_messages():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "elements", "save", "open", "close", "which"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    items = [
        {"text": "save", "box": box(50, 0)},
        {"text": "open", "box": box(0, 0)},
        {"text": "close", "box": box(0, 50)},
    ]
    content = [{"type": "text", "text": "elements"}, {"type": "set", "items": items}, {"type": "text", "text": "which"}]
    batch, given = seqwise.prepare(tokenizer, [{"role": "user", "content": content}])
    ids, _ = ElementOrdering(by="raster").reword(batch["input_ids"], given)
    assert tokenizer.decode(ids[0]) == "elements open save close which"


def test_what_is_asked_for_is_checked():
    with pytest.raises(ValueError, match=r"ElementOrdering.by must be one of 'default', 'raster'.* got 'reading'"):
        ElementOrdering(by="reading")
    with pytest.raises(ValueError, match=r"ElementOrdering.seed must be >= 0, got -1"):
        ElementOrdering(seed=-1)
    assert ElementOrdering().by == "tsne"
    model, batch = LLAMA.tiny(), LLAMA.prompt(20)
    bare = replace(marked(batch), box=None)
    with ElementOrdering(by="raster").on(model) as run, pytest.raises(PromptError, match="set members with a box"):
        run.bind(bare)
        model.generate(**batch, max_new_tokens=2)
