"""The ledger against a list of tokens per sample."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqwise.core.ledger import Ledger, Rows
from seqwise.core.select import compact

CPU = torch.device("cpu")


def ledger(batch=2, layers=3):
    return Ledger(batch, layers, "Some()")


def left(*pads, width):
    return (torch.arange(width) >= torch.tensor(pads)[:, None]).long()


def orders(rows, batch):
    return rows.order.expand(batch, -1).tolist()


@st.composite
def histories(draw):
    """A 2-D mask, or None, and how its columns come in blocks."""
    blocks = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    n = sum(blocks)
    kind = draw(st.sampled_from(["none", "ones", "left", "holes"]))
    if kind == "none":
        return None, blocks
    if kind == "ones":
        return torch.ones(2, n, dtype=torch.long), blocks
    if kind == "left":  # only in the first block, as generate has it
        return left(draw(st.integers(0, blocks[0] - 1)), 0, width=n), blocks
    mask = torch.tensor([draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)) for _ in range(2)])
    if len(blocks) > 1 or n == 1:
        mask[:, :] = 1
    return mask, blocks


@given(histories())
def test_real_tokens_are_counted_from_zero_over_all_blocks(history):
    mask, blocks = history
    book, seen, at = ledger(), [0, 0], 0
    for count in blocks:
        rows = book.begin(None if mask is None else mask[:, : at + count], count, CPU)
        for b, got in enumerate(orders(rows, 2)):
            for column in range(count):
                real = mask is None or bool(mask[b, at + column])
                assert got[column] == (seen[b] if real else -1)
                seen[b] += real
        assert rows.lengths(2) == [sum(i >= 0 for i in row) for row in orders(rows, 2)]
        at += count
        assert book.columns == at and book.length.tolist() == seen
        assert book.fresh == (at == count)


def test_padding_is_known_by_its_spans():
    book = ledger()
    rows = book.begin(left(3, 0, width=5), 5, CPU)
    assert rows.spans == [(3, 5), (0, 5)] and rows.lengths(2) == [2, 5] and book.padded
    assert rows.live.tolist() == [[False] * 3 + [True] * 2, [True] * 5]
    unpadded = ledger().begin(torch.ones(2, 5), 5, CPU)
    assert unpadded.live is None and unpadded.lengths(2) == [5, 5]


def test_padding_in_the_middle_is_not_counted_as_tokens():
    rows = ledger().begin(torch.tensor([[1, 0, 1, 0, 1], [1, 1, 1, 1, 1]]), 5, CPU)
    assert rows.spans is None and rows.lengths(2) == [3, 5]
    assert orders(rows, 2) == [[0, -1, 1, -1, 2], [0, 1, 2, 3, 4]]


def test_a_draft_tree_counts_by_depth():
    book = ledger(batch=1)
    book.begin(None, 4, CPU)
    book.phase = "decode"
    rows = book.begin(None, 3, CPU, depth=torch.tensor([0, 1, 1]))
    assert orders(rows, 1) == [[4, 5, 5]]
    assert book.columns == 7 and book.step == 3


def test_only_decoding_counts_steps():
    book = ledger()
    book.begin(None, 4, CPU)
    assert book.step == 0
    book.phase = "decode"
    book.begin(None, 1, CPU)
    book.begin(None, 2, CPU)
    assert book.step == 3


def test_a_cut_holds_from_its_layer_on():
    book = ledger()
    book.begin(left(2, 0, width=6), 6, CPU)
    keep = torch.tensor([[0, 0, 1, 0, 1, 1], [1, 0, 1, 1, 0, 1]]).bool()
    book.cut(1, *compact(keep))
    assert [rows.count for rows in book.rows] == [6, 4, 4]
    assert orders(book.rows[1], 2) == [[-1, 0, 2, 3], [0, 2, 3, 5]]
    assert book.rows[2].lengths(2) == [3, 4] and book.rows[2].spans == [(1, 4), (0, 4)]
    book.cut(2, *compact(torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]).bool()))
    assert [rows.count for rows in book.rows] == [6, 4, 2]
    assert orders(book.rows[2], 2) == [[2, 3], [3, 5]] and book.rows[2].live is None


def test_survivors_of_equal_number_need_no_padding():
    rows = Rows(torch.arange(5)[None]).gather(*compact(torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 1, 1]]).bool()))
    assert rows.live is None and rows.spans is None
    assert rows.order.tolist() == [[0, 2, 4], [1, 3, 4]]


def test_a_share_refers_to_the_prompts_real_tokens_at_each_layer():
    book = ledger()
    book.begin(left(2, 0, width=6), 6, CPU)
    assert book.base(0) == [4, 6]
    book.cut(1, *compact(torch.tensor([[0, 0, 1, 0, 0, 1], [1, 0, 1, 0, 0, 1]]).bool()))
    assert book.base(0) == [4, 6] and book.base(1) == book.base(2) == [2, 3]
    book.enter()
    book.phase = "decode"
    book.begin(torch.cat([left(2, 0, width=6), torch.ones(2, 1)], 1), 1, CPU)
    assert book.base(0) == [4, 6] and book.base(2) == [2, 3], "steps do not count"


def test_a_share_of_a_prompt_in_chunks_grows_with_it_unless_its_length_is_known():
    book = ledger(batch=1)
    for count, seen in ((4, 4), (3, 7)):
        book.begin(None, count, CPU)
        assert book.base(1) == [seen]
        book.enter()
    told = ledger(batch=1)
    told.expected = [9]
    told.begin(None, 4, CPU)
    assert told.base(1) == [9]


def test_bytes_now_and_at_most():
    book = ledger()
    book.weigh(0, 100)
    book.weigh(1, 50)
    book.weigh(0, 10)
    book.weigh(2, 20)
    assert book.bytes == {0: 10, 1: 50, 2: 20} and book.peak_bytes == 150


@pytest.mark.parametrize("at", [[1, 1, 0], [1], [0, 1]])
def test_samples_take_all_that_is_theirs_along(at):
    book = ledger()
    book.begin(left(2, 0, width=6), 6, CPU)
    book.ids = torch.arange(12).view(2, 6)
    book.enter()
    book.expected = [4, 6]
    book.kept = {"input": [[0, 1], [2]]}
    book.shift = {0: torch.tensor([5, 7])}
    book.last_position = torch.tensor([3.0, 5.5])
    book.select(torch.tensor(at))
    assert book.batch == len(at)
    assert book.length.tolist() == [[4, 6][i] for i in at]
    assert book.entered == [[[4, 6][i] for i in at]] * 3
    assert book.base(0) == [[4, 6][i] for i in at]
    assert book.kept == {"input": [[[0, 1], [2]][i] for i in at]}
    assert book.shift[0].tolist() == [[5, 7][i] for i in at]
    assert book.last_position.tolist() == [[3.0, 5.5][i] for i in at]
    assert torch.equal(book.ids, torch.arange(12).view(2, 6)[at])
