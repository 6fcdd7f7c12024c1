"""What methods on sets share: the members of a prompt's sets, and what cannot be a set."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seqwise.core.errors import PromptError
from seqwise.core.segments import Segments


@dataclass(frozen=True)
class Member:
    """One member of a set: the columns [start, stop) of a sample's row."""

    set: int
    member: int
    start: int
    stop: int


def members(segments: Segments, owner: object, *, adjacent: bool = True) -> list[list[Member]]:
    """The set members of each sample, in the order of their tokens.

    owner: who asks, for messages. adjacent: whether the members of a set must stand side by side.
    Raises PromptError for a token that is in a set and in no member of it (or the reverse), a member in several
    stretches (members overlap), a member without tokens, and text between the members where they must be adjacent.
    """
    real = segments.real
    sets, numbers = (torch.where(real, fact, -1) for fact in (segments.set, segments.member))  # (B, N)
    return [
        _of_sample(torch.stack(pair, -1), f"{owner}, sample {b}", adjacent)
        for b, pair in enumerate(zip(sets, numbers, strict=True))
    ]


def _of_sample(pairs: torch.Tensor, where: str, adjacent: bool) -> list[Member]:
    """pairs: (N, 2), set and member of each token."""
    runs, counts = torch.unique_consecutive(pairs, dim=0, return_counts=True)
    stops = counts.cumsum(0)
    found: list[Member] = []
    for (set_, member), start, stop in zip(runs.tolist(), (stops - counts).tolist(), stops.tolist(), strict=True):
        if (set_ < 0) != (member < 0):
            raise PromptError(f"{where}: token {start} has set {set_} and member {member}; give it both, or neither")
        if set_ >= 0:
            found.append(Member(set_, member, start, stop))
    for set_ in sorted({piece.set for piece in found}):
        own = [piece for piece in found if piece.set == set_]
        held = [piece.member for piece in own]
        for number in range(max(held) + 1):
            stretches = held.count(number)
            if stretches == 0:
                raise PromptError(f"{where}: member {number} of set {set_} has no tokens; give it a text or drop it")
            if stretches > 1:
                raise PromptError(
                    f"{where}: member {number} of set {set_} is in {stretches} stretches; members must not overlap, "
                    "and each is one stretch of tokens"
                )
        if adjacent and own[-1].stop - own[0].start != sum(piece.stop - piece.start for piece in own):
            raise PromptError(
                f"{where}: other tokens stand between the members of set {set_}; separators belong to the members"
            )
    return found
