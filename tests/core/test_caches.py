"""One cache layer against a dictionary per sample and head: original position -> key, value, remembered number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqwise.core.caches import Chunk, SlotLayer, gather_state
from seqwise.core.errors import CacheError
from seqwise.core.ledger import Ledger
from seqwise.core.packed import Packed
from seqwise.core.select import compact

B, HKV, H, D, DV = 2, 2, 4, 3, 5
CPU = torch.device("cpu")


def key_of(b, h, order):
    """Whole numbers below 256: eight bits hold them exactly."""
    return [(7 * b + 31 * h + 13 * order + 3 * d) % 256 for d in range(D)]


def value_of(b, h, order):
    return [(101 * b + 5 * h + 29 * order + 11 * d) % 256 for d in range(DV)]


class Both:
    """A layer and the dictionaries that say what it must hold; every step is done to both."""

    def __init__(self, pads=(0, 0)):
        self.ledger = Ledger(B, 1, "Some()")
        self.layer = SlotLayer(self.ledger, 0)
        self.books = [[{} for _ in range(HKV)] for _ in range(B)]
        self.names = list(range(B))  # which first sample each one descends from
        self.pads = list(pads)
        self.mask = torch.zeros(B, 0, dtype=torch.long)

    def append(self, q):
        first = self.ledger.columns
        columns = torch.arange(first, first + q)
        new = (columns >= torch.tensor(self.pads)[:, None]).long()
        self.mask = torch.cat([self.mask, new], 1)
        rows = self.ledger.begin(self.mask, q, CPU)
        order = rows.order.expand(len(self.names), -1).tolist()
        shape = (len(self.names), HKV, q)
        keys, values = torch.full((*shape, D), -99.0), torch.full((*shape, DV), -99.0)  # padding holds nonsense
        for b, name in enumerate(self.names):
            for h in range(HKV):
                for i in range(q):
                    if order[b][i] >= 0:
                        keys[b, h, i] = torch.tensor(key_of(name, h, order[b][i]))
                        values[b, h, i] = torch.tensor(value_of(name, h, order[b][i]))
                        self.books[b][h][order[b][i]] = 0.0
        assert self.layer.get_seq_length() == first, "the model asks for its positions when the ledger has counted on"
        self.layer.update(keys, values)

    def remember(self):
        """A number per query head and slot: the token's position and the head."""
        order = self.layer.order.expand(-1, HKV, -1).repeat_interleave(H // HKV, 1)
        self.layer.state["note"] = order.float() * 10 + torch.arange(H)[:, None]
        for row in self.books:
            for book in row:
                for order in book:
                    book[order] = 1.0

    def keep(self, random, density):
        live = self.layer.live_mask()
        wanted = live & (torch.rand(live.shape, generator=random) < density)
        wanted[..., -1] = live[..., -1]  # some slot always stays
        order = self.layer.order.expand_as(live)
        for b in range(len(self.names)):
            for h in range(HKV):
                left = set(order[b, h][wanted[b, h]].tolist())
                self.books[b][h] = {o: x for o, x in self.books[b][h].items() if o in left}
        index, alive = compact(wanted)
        self.layer.keep(index, None if bool(alive.all()) else alive)

    def evict_one(self, random):
        """One slot of each head, where no padding is held."""
        n = self.layer.slots
        if self.layer.live is not None or n < 2:
            return
        out = torch.randint(n, (len(self.names), HKV, 1), generator=random)
        order = self.layer.order.expand(len(self.names), HKV, -1).gather(-1, out)
        for b in range(len(self.names)):
            for h in range(HKV):
                del self.books[b][h][int(order[b, h])]
        kept = torch.arange(n - 1)
        before = self.layer.keys.data_ptr()
        self.layer.keep(kept + (kept >= out), None)
        assert self.layer.chunks or self.layer.keys.data_ptr() == before, "one slot moves, not the cache"

    def pack(self):
        tail = self.layer.live_mask()[..., self.layer.packed :]
        if not self.layer.tail:
            return
        index, alive = compact(tail)
        if not index.shape[-1]:
            return
        keys, values = self.layer.read()

        def packed(x):
            x = x[:, :, self.layer.packed :].gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
            one = torch.ones(1, 1, 1, 1)
            return Packed.pack(x.clamp(min=0).to(torch.uint8), 8, torch.zeros_like(one), one)

        self.layer.pack([Chunk(packed(keys), packed(values), index, alive)])

    def select(self, at):
        self.layer.select(torch.tensor(at))
        self.books = [[dict(book) for book in self.books[i]] for i in at]
        self.names = [self.names[i] for i in at]
        self.pads = [self.pads[i] for i in at]
        self.mask = self.mask[at]

    def check(self):
        layer = self.layer
        keys, values = layer.read()
        live = layer.live_mask()
        assert keys.shape == (len(self.names), HKV, layer.slots, D) and values.shape[-1] == DV
        order = layer.order.expand_as(live)
        note = layer.state.get("note")
        assert note is None or note.shape == (len(self.names), H, layer.slots)
        for b, name in enumerate(self.names):
            for h in range(HKV):
                held = {}
                for j in range(layer.slots):
                    if not live[b, h, j]:
                        continue
                    o = int(order[b, h, j])
                    assert o not in held, "no token twice"
                    assert keys[b, h, j].tolist() == key_of(name, h, o)
                    assert values[b, h, j].tolist() == value_of(name, h, o)
                    held[o] = 0.0
                    if note is not None:
                        for query_head in (2 * h, 2 * h + 1):
                            wanted = 10 * o + query_head if self.books[b][h][o] else 0  # new slots enter as 0
                            assert note[b, query_head, j] == wanted
                assert held.keys() == self.books[b][h].keys()
        assert layer.kept() == [[sorted(book) for book in row] for row in self.books]
        assert layer.get_seq_length() == self.ledger.columns
        assert self.ledger.peak_bytes >= layer.nbytes >= layer.live_bytes()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 6)),
        st.tuples(st.just("append"), st.just(1)),
        st.tuples(st.just("keep"), st.sampled_from([0.3, 0.8, 0.95, 1.0])),
        st.tuples(st.just("evict_one"), st.just(0)),
        st.tuples(st.just("pack"), st.none()),
        st.tuples(st.just("remember"), st.none()),
        st.tuples(st.just("select"), st.sampled_from([[1, 0], [1, 1], [0, 1]])),
        st.tuples(st.just("compact"), st.none()),
    ),
    max_size=12,
)


@given(pads=st.sampled_from([(0, 0), (2, 0), (1, 3)]), steps=steps, seed=st.integers(0, 99))
def test_any_life_of_a_layer(pads, steps, seed):
    random = torch.Generator().manual_seed(seed)
    both = Both(pads)
    both.append(7)
    both.check()
    for name, argument in steps:
        if name == "keep":
            both.keep(random, argument)
        elif name == "evict_one":
            both.evict_one(random)
        elif name == "compact":
            both.layer.compact()
        elif argument is None:
            getattr(both, name)()
        else:
            getattr(both, name)(argument)
        both.check()


def test_slots_stay_columns_until_something_is_evicted():
    both = Both()
    both.append(5)
    both.append(1)
    assert both.layer.in_columns and both.layer.live is None
    both.keep(torch.Generator().manual_seed(0), 0.5)
    assert not both.layer.in_columns


def test_dead_packed_slots_leave_storage_when_there_are_many():
    both = Both()
    both.append(64)
    both.pack()
    full = both.layer.nbytes
    keep = torch.ones(B, HKV, 64, dtype=torch.bool)
    keep[..., :7] = False  # less than an eighth: marked only
    both.layer.keep(*compact(keep))
    assert both.layer.slots == 64 and both.layer.nbytes == full
    keep[..., :9] = False
    both.layer.keep(*compact(keep))
    assert both.layer.slots == 55 and both.layer.nbytes < full
    assert both.layer.kept() == [[list(range(9, 64))] * HKV] * B


def test_bytes_are_what_is_allocated():
    both = Both()
    both.append(10)
    token = B * HKV * (D + DV) * 4
    assert both.layer.nbytes == 10 * token == both.layer.live_bytes()
    both.append(1)  # a spare is allocated ahead, so that steps do not copy
    assert 11 * token < both.layer.nbytes <= 16 * token and both.layer.live_bytes() == 11 * token
    address = both.layer.keys.data_ptr()
    both.append(1)
    assert both.layer.keys.data_ptr() == address
    both.layer.keep(torch.arange(3).expand(B, HKV, 3), None)
    assert both.layer.nbytes == 3 * token
    both.pack()
    assert both.layer.nbytes == B * HKV * 3 * (D + DV) + 2 * (4 + 4)  # codes, and two shared parameters each


def test_padding_of_unequal_samples_is_told_apart_from_what_is_alive():
    both = Both((6, 0))
    both.append(8)
    token = HKV * (D + DV) * 4
    assert both.layer.nbytes == 2 * 8 * token and both.layer.live_bytes() == (2 + 8) * token


@pytest.mark.parametrize("packed", [False, True])
def test_an_accepted_draft_leaves_only_its_path(packed):
    both = Both()
    both.append(6)
    if packed:
        both.pack()
    both.ledger.begin(None, 4, CPU, depth=torch.tensor([0, 1, 1, 2]))
    drafts = torch.arange(4.0)[:, None].expand(B, HKV, 4, D), torch.arange(4.0)[:, None].expand(B, HKV, 4, DV)
    both.layer.update(*drafts)
    both.layer.state["note"] = torch.arange(10.0).expand(B, H, 10)
    both.layer.accept(torch.tensor([0, 2, 3]), 1)
    assert both.layer.slots == 9
    assert both.layer.order.expand(B, HKV, -1)[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert both.layer.read()[0][0, 0, 6:, 0].tolist() == [0, 2, 3]
    assert both.layer.state["note"][0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9]


def test_the_layer_tells_transformers_columns_and_slots():
    both = Both()
    assert both.layer.get_seq_length() == 0
    both.append(10)
    both.layer.keep(torch.arange(4).expand(B, HKV, 4), None)
    assert both.layer.get_seq_length() == 10, "positions go on counting"
    assert both.layer.get_mask_sizes(3) == (7, 0)
    assert not both.layer.is_croppable and not both.layer.is_compileable
    both.layer.reorder_cache(torch.tensor([1, 0]))
    both.layer.batch_repeat_interleave(2)
    assert both.layer.read()[0].shape[0] == 4 and both.ledger.batch == 4
    both.layer.batch_select_indices(torch.tensor([3]))
    assert both.layer.read()[0][0, 0, 0].tolist() == key_of(0, 0, 0), "swapped, doubled, and the last of four taken"
    both.layer.reset()
    assert both.layer.get_seq_length() == 0 and both.layer.kept() == []


@pytest.mark.parametrize("pads", [(0, 0), (3, 0)])
def test_what_no_later_row_can_see_through_a_window_is_forgotten(pads):
    both = Both(pads)
    both.append(9)
    both.layer.forget_outside(5)
    assert both.layer.kept() == [[list(range(n - 4, n))] * HKV for n in (9 - pads[0], 9)]
    both.append(1)
    both.layer.forget_outside(11)
    assert [len(sample[0]) for sample in both.layer.kept()] == [5, 5], "there is room"
    short = Both((6, 0))
    short.append(9)
    short.layer.forget_outside(5)
    assert short.layer.kept() == [[[0, 1, 2]] * HKV, [[5, 6, 7, 8]] * HKV]


def test_a_detached_layer_takes_nothing_more():
    both = Both()
    both.append(3)
    both.layer.attached = False
    with pytest.raises(CacheError, match=r"continue inside `with method\.on\(model\)`$"):
        both.append(1)


def test_budgets_in_slots_per_sample():
    both = Both((4, 0))
    both.append(10)
    assert both.layer.capacity(3) == [3, 3]
    assert both.layer.capacity(0.5) == [3, 5]
    assert both.layer.capacity(1.0) is None


def test_state_of_query_heads_follows_their_kv_head():
    value = torch.arange(2 * 4 * 5).view(2, 4, 5)
    index = torch.tensor([[[0, 4], [1, 2]], [[3, 3], [2, 0]]])
    got = gather_state(value, index)
    for b in range(2):
        for h in range(4):
            assert got[b, h].tolist() == value[b, h, index[b, h // 2]].tolist()
    assert torch.equal(gather_state(value[:, :2], index), value[:, :2].gather(-1, index))


def test_a_stored_chunk_is_as_long_as_its_codes():
    one = torch.ones(1, 1, 1, 1)
    packed = Packed.pack(torch.zeros(1, 1, 4, 3, dtype=torch.uint8), 2, one, one)
    chunk = Chunk(packed, packed, torch.arange(4)[None, None], torch.ones(1, 1, 4, dtype=torch.bool))
    assert chunk.count == 4
