from dataclasses import replace

import pytest
import torch

from seqwise.core.errors import PromptError
from seqwise.core.segments import Segments
from seqwise.methods.order.base import Member, members


def facts(sets, numbers, mask=None):
    """One prompt per row, sets and members of its tokens."""
    sets, numbers = torch.tensor(sets), torch.tensor(numbers)
    plain = Segments.infer(torch.ones_like(sets), None if mask is None else torch.tensor(mask), None)
    return replace(plain, set=sets, member=numbers)


def test_members_come_in_the_order_of_their_tokens_whatever_their_numbers():
    found = members(facts([[-1, 0, 0, 0, -1, 3, 3, -1]], [[-1, 1, 1, 0, -1, 0, 1, -1]]), "me")
    assert found == [[Member(0, 1, 1, 3), Member(0, 0, 3, 4), Member(3, 0, 5, 6), Member(3, 1, 6, 7)]]


def test_padding_belongs_to_nothing_and_samples_are_told_apart():
    sets = [[0, 0, -1, 0, 0], [-1, -1, -1, -1, -1]]
    numbers = [[0, 0, -1, 0, 1], [-1, -1, -1, -1, -1]]
    found = members(facts(sets, numbers, [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]), "me")
    assert found == [[Member(0, 0, 3, 4), Member(0, 1, 4, 5)], []]


def test_one_member_of_two_sets_side_by_side_is_two_members():
    assert len(members(facts([[-1, 0, 1]], [[-1, 0, 0]]), "me")[0]) == 2


@pytest.mark.parametrize(
    "sets, numbers, message",
    [
        (
            [-1, 0, 0, 0, -1],
            [-1, 0, 1, 0, -1],
            r"me, sample 1: member 0 of set 0 is in 2 stretches; members must not ov",
        ),
        ([-1, 0, 0, -1, -1], [-1, 0, 2, -1, -1], r"me, sample 1: member 1 of set 0 has no tokens"),
        ([-1, 0, 0, -1, -1], [-1, 1, 2, -1, -1], r"member 0 of set 0 has no tokens"),
        ([-1, 0, -1, 0, -1], [-1, 0, -1, 1, -1], r"other tokens stand between the members of set 0; separators belong"),
        ([-1, 0, 0, -1, -1], [-1, 0, -1, -1, -1], r"token 2 has set 0 and member -1; give it both"),
        ([-1, -1, 0, -1, -1], [-1, 0, 0, -1, -1], r"token 1 has set -1 and member 0"),
        ([-1, 0, 1, 0, -1], [-1, 0, 0, 1, -1], r"other tokens stand between the members of set 0"),
    ],
)
def test_what_is_no_set_is_refused_by_name(sets, numbers, message):
    plain = [-1] * 5
    with pytest.raises(PromptError, match=message):
        members(facts([plain, sets], [plain, numbers]), "me")


def test_text_between_members_is_allowed_where_asked():
    found = members(facts([[0, -1, 0]], [[0, -1, 1]]), "me", adjacent=False)
    assert [(piece.start, piece.stop) for piece in found[0]] == [(0, 1), (2, 3)]
