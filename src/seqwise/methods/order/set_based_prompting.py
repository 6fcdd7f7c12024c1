"""Set-Based Prompting: no permutation of a prompt's set changes what follows it.

    prompt     A, S_1, ..., S_K, D       the S_i are the members of a set, in any physical order
    positions  A: 0 .. a-1;   each S_i: a .. a+l_i-1;   D: from a + max_i l_i;   generated tokens go on
    mask       causal, and no token of S_i sees one of S_j, j != i

Every token's position and visible set are then the same in all orders, and attention sums over keys have no order, so
the results agree up to rounding. Several sets in one prompt: each starts where the text before it ends, advances by its
longest member, and is causal towards the others.
"Set-Based Prompting: Provably Solving the Language Model Order Dependency Problem", arXiv 2406.06581.
The official GPT-2 path loses the positions after the first generated token; here they go on, as in its Llama path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqwise.core.anatomy import Anatomy
from seqwise.core.method import Method
from seqwise.core.segments import Segments
from seqwise.methods.order.base import members

if TYPE_CHECKING:
    from seqwise.core.run import Run


def positions(set: Tensor, member: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Position ids of a batch of prompts, int64 (B, L).

    set, member: (B, L), which set a token is in and which of its members, -1 at text. A member is one stretch of
    tokens, the members of a set are adjacent. attention_mask: (B, L), 0 at padding left or right of a prompt, which
    gets position 1.
    The padded variant, whose members are all filled up to the longest: padding counts as the member's, no mask here,
    and `set_mask` gets it.
    """
    live = torch.ones_like(set, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    inside = live & (set >= 0)
    set, member = torch.where(inside, set, -1), torch.where(inside, member, -1)
    opens = inside & (set != pad(set[:, :-1], (1, 0), value=-1))  # first token of a set
    block = (opens.cumsum(-1) - 1).masked_fill(~inside, -1)  # (B, L)
    begins = opens | (inside & (member != pad(member[:, :-1], (1, 0), value=-1)))
    index = torch.arange(set.shape[1], device=set.device)
    place = index - torch.where(begins, index, 0).cummax(-1).values  # (B, L), place in the member
    slot = block.clamp(min=0)
    longest = set.new_zeros(len(set), int(block.max()) + 2).scatter_reduce(  # (B, blocks + 1)
        1, slot, torch.where(inside, place + 1, 0), "amax"
    )
    passed = pad(longest.cumsum(-1), (1, 0))  # (B, blocks + 2), positions that the first sets take
    texts = (live & ~inside).cumsum(-1)  # (B, L), text tokens so far
    c = texts + passed.gather(1, slot)
    p_text = texts - 1 + passed.gather(1, block.cummax(-1).values + 1)
    return torch.where(inside, c + place, p_text).masked_fill(~live, 1)


def next_position(position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Position of the first generated token, (B,): one more than the largest of the real tokens."""
    if attention_mask is not None:
        position_ids = position_ids.masked_fill(~attention_mask.bool(), -1)
    return position_ids.amax(-1) + 1


def visible(set_q: Tensor, member_q: Tensor, set_k: Tensor, member_k: Tensor) -> Tensor:
    """Whether a query may see a key beside causality, bool: not where both are in one set and in different members.

    All arguments broadcast; -1 at text.
    """
    return (set_q != set_k) | (set_q < 0) | (member_q == member_k)


def set_mask(set: Tensor, member: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The mask of a batch of short prompts, bool (B, 1, L, L), True where seen; causality included.

    set, member: (B, L), -1 at text. attention_mask: (B, L), 0 at padding, anywhere, which nobody sees; a row that
    would see nothing sees itself. The mask is for SDPA: eager attention adds masks, and needs
    `torch.where(mask, 0, torch.finfo(dtype).min)`.
    """
    order = torch.arange(set.shape[1], device=set.device)
    seen = visible(set[:, :, None], member[:, :, None], set[:, None], member[:, None])  # (B, L, L)
    seen = seen & (order <= order[:, None])
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None]
    empty = ~seen.any(-1, keepdim=True)
    return (seen | (empty & (order == order[:, None])))[:, None]


def answer_scores(logits: Tensor, answers: Tensor) -> Tensor:
    """Probability of each candidate answer by one greedy run: softmax over the candidates of
    mean over t of logits[t, answer_t]. Returns float32 (..., C).

    logits: (..., T, V), those that the run's t-th new token was chosen from. answers: (C, m) int64, tokens of each
    candidate without special ones, -1 behind its last. Raises ValueError for a candidate without tokens, or with more
    than T.
    """
    held = answers >= 0
    lengths = held.sum(-1)  # (C,)
    T = logits.shape[-2]
    if int(lengths.min()) < 1 or int(lengths.max()) > T:
        raise ValueError(
            f"answers must have 1 to {T} tokens each (steps of the greedy run), got {lengths.tolist()}; "
            "generate with min_new_tokens, or more steps"
        )
    m = min(answers.shape[1], T)
    at = torch.arange(m, device=logits.device)
    token = logits.float()[..., at, answers[:, :m].clamp(min=0)]  # (..., C, m)
    mean = token.masked_fill(~held[:, :m], 0).sum(-1) / lengths
    return mean.softmax(-1)


@dataclass(frozen=True)
class SetBasedPrompting(Method):
    """Makes the model's answer independent of the order of a set's members, on any model with RoPE.

    Mark the set with `seqwise.prepare` (a part of type "set") and `run.bind(segments)`. Blanks and separators belong
    to the members. What comes after the set's text is invariant; text has to follow it. Members that overlap or have
    no tokens, and text between them, are refused before anything runs.
    """

    slots: ClassVar[tuple[str, ...]] = ("positions", "mask")

    # No identity: a set always hides its members from each other. With one member the prompt is the ordinary one.

    def needs(self) -> set[str]:
        # A window would have to be measured in positions; the engine measures it in tokens, which depends on the order.
        return {"RoPE", "1-D positions", "full attention"}

    def facts(self) -> set[str]:
        return {"set"}

    def place(self, segments: Segments, anatomy: Anatomy) -> Tensor:
        return positions(segments.set, segments.member, segments.real).float()

    def mark(self, segments: Segments, run: Run) -> dict[str, Tensor]:
        members(segments, self)  # refuses what is no set
        return {"set": segments.set, "member": segments.member}

    def sees(self, query: Mapping[str, Tensor], key: Mapping[str, Tensor]) -> Tensor:
        return visible(query["set"], query["member"], key["set"], key["member"])
