"""Tiles of visibility against a dense mask written out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqwise.core.visible import Visible


def orders(padding):
    """Place of each real token among its sample's real tokens, -1 on padding."""
    result = []
    for row in padding:
        count, places = 0, []
        for real in row:
            places.append(count if real else -1)
            count += bool(real)
        result.append(places)
    return result


def dense(rows, slots, causal=True, padding=None, mask=None, window=None, batch=1):
    """(B, rows, slots) bool, of the last `rows` columns."""
    padding = padding.tolist() if padding is not None else [[1] * slots] * batch
    order = orders(padding)
    seen = torch.zeros(len(order), rows, slots, dtype=torch.bool)
    for b, place in enumerate(order):
        for i in range(rows):
            for j in range(slots):
                pi, pj = place[slots - rows + i], place[j]
                see = bool(padding[b][j])
                if causal:
                    see = see and pj <= pi
                if window is not None:
                    see = see and pi - pj < window
                if mask is not None:
                    see = see and bool(mask[b if mask.shape[0] > 1 else 0, 0, i, j])
                seen[b, i, j] = see
    return seen


@st.composite
def calls(draw):
    slots = draw(st.integers(1, 12))
    rows = draw(st.integers(1, slots))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    padding, mask = None, None
    kind = draw(st.sampled_from(["none", "left", "holes"]))
    if kind == "left":
        padding = torch.arange(slots) >= torch.tensor([[draw(st.integers(0, slots - 1))], [0]])
    elif kind == "holes":
        padding = torch.rand(2, slots, generator=random) < 0.7
    if draw(st.booleans()):
        mask = torch.rand(draw(st.sampled_from([1, 2])), 1, rows, slots, generator=random) < 0.7
    return {
        "rows": rows,
        "slots": slots,
        "causal": draw(st.booleans()),
        "padding": padding,
        "mask": mask,
        "window": draw(st.one_of(st.none(), st.integers(1, slots + 2))),
    }


def of(call):
    rest = {name: call[name] for name in ("causal", "padding", "mask", "window")}
    return Visible.of(call["rows"], call["slots"], **rest)


def whole(visible, start=0, stop=None, low=0, high=None):
    """A tile of 2 samples as a dense mask (2, rows, columns)."""
    stop = visible.rows if stop is None else stop
    high = visible.slots if high is None else high
    tile = visible.tile(start, stop, low, high)
    if tile is None:
        tile = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    return tile[:, 0].expand(2, stop - start, high - low)


def reference(call):
    real_rows = torch.ones(2, call["rows"], dtype=torch.bool)
    if call["padding"] is not None:
        real_rows = call["padding"].bool()[:, call["slots"] - call["rows"] :]
    return dense(batch=2, **call), real_rows


@given(calls())
def test_the_whole_tile_is_the_dense_mask(call):
    seen, real = reference(call)
    assert torch.equal(whole(of(call))[real], seen[real])  # what padding rows see has no meaning


@given(calls(), st.data())
def test_tiles_are_parts_of_the_dense_mask(call, data):
    visible, (seen, real) = of(call), reference(call)
    start = data.draw(st.integers(0, call["rows"] - 1))
    stop = data.draw(st.integers(start + 1, call["rows"]))
    low = data.draw(st.integers(0, call["slots"] - 1))
    high = data.draw(st.integers(low + 1, call["slots"]))
    rows = real[:, start:stop]
    assert torch.equal(whole(visible, start, stop, low, high)[rows], seen[:, start:stop, low:high][rows])


@given(calls(), st.data())
def test_nothing_is_seen_outside_of_the_span_and_all_live_slots_before_the_open_edge(call, data):
    visible, (seen, real) = of(call), reference(call)
    start = data.draw(st.integers(0, call["rows"] - 1))
    stop = data.draw(st.integers(start + 1, call["rows"]))
    low, high = visible.span(start, stop)
    outside = torch.ones(call["slots"], dtype=torch.bool)
    outside[low:high] = False
    assert not seen[:, start:stop][..., outside][real[:, start:stop]].any()
    edge = visible.open_until(start, stop, low, high)
    assert low <= edge <= max(low, high)
    live = torch.ones(2, call["slots"], dtype=torch.bool) if call["padding"] is None else call["padding"].bool()
    for b in range(2):
        for i in range(start, stop):
            if real[b, i]:
                assert torch.equal(seen[b, i, low:edge], live[b, low:edge])


@given(calls(), st.data())
def test_taken_rows_see_what_they_saw(call, data):
    visible, (seen, real) = of(call), reference(call)
    R = call["rows"]
    kind = data.draw(st.sampled_from(["slice", "step", "shared", "own"]))
    if kind in ("slice", "step"):
        step = None if kind == "slice" else data.draw(st.integers(2, 3))
        rows = slice(data.draw(st.integers(-R, R - 1)), None, step)
        at = torch.arange(R)[rows].expand(2, -1)
    elif kind == "shared":
        rows = torch.tensor(data.draw(st.lists(st.integers(0, R - 1), min_size=1, max_size=4)))
        at = rows.expand(2, -1)
    else:
        rows = at = torch.tensor([data.draw(st.lists(st.integers(0, R - 1), min_size=3, max_size=3)) for _ in range(2)])
    taken = visible.take(rows)
    assert taken.rows == at.shape[1]
    wanted = seen.gather(1, at[..., None].expand(-1, -1, call["slots"]))
    real = real.gather(1, at)
    assert torch.equal(whole(taken)[real], wanted[real])
    low, high = taken.span(0, taken.rows)
    outside = torch.ones(call["slots"], dtype=torch.bool)
    outside[low:high] = False
    assert not wanted[..., outside][real].any()


def test_unpadded_causal_tiles_below_the_diagonal_need_no_mask():
    visible = Visible.of(8, 8)
    assert visible.tile(4, 8, 0, 4) is None and visible.tile(4, 8, 0, 5) is None
    assert visible.tile(4, 8, 0, 6) is not None
    assert visible.span(2, 4) == (0, 4)
    assert Visible.of(8, 8, window=3).span(5, 6) == (3, 6)
    assert Visible.of(8, 8, causal=False).tile(0, 8, 0, 8) is None


def test_an_additive_mask_hides_where_it_is_very_low():
    low = torch.finfo(torch.float32).min
    additive = torch.tensor([[0.0, low], [-3.0, float("-inf")]])[None, None]
    assert whole(Visible.of(2, 2, causal=False, mask=additive))[0].tolist() == [[True, False], [True, False]]


def test_slots_in_any_order_are_seen_by_their_token():
    order_k = torch.tensor([[[4, 0, 2], [1, 3, 5]]])  # (1, 2 heads, 3)
    live_k = torch.tensor([[[True, True, True], [True, False, True]]])
    visible = Visible(torch.tensor([[3, 4]]), order_k, None, live_k, window=3)
    tile = visible.tile(0, 2, 0, 3)
    assert tile.shape == (1, 2, 2, 3)
    for h in range(2):
        for i, q in enumerate((3, 4)):
            for j in range(3):
                k = int(order_k[0, h, j])
                assert bool(tile[0, h, i, j]) == (k <= q and q - k < 3 and bool(live_k[0, h, j]))


@pytest.mark.parametrize("rows", [slice(0, 2), torch.tensor([0, 1])])
def test_take_leaves_its_source_alone(rows):
    visible = Visible.of(5, 5)
    before = visible.order_q.clone()
    visible.take(rows)
    assert torch.equal(visible.order_q, before) and visible.offset == 0
