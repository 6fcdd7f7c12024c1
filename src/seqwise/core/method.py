"""A method: frozen hyperparameters, the slots where it acts, and one hook per slot that the engine calls.

    SCORE tokens -> SELECT (keep, merge, order) -> ACT at a slot

A paper's file subclasses `Method`, declares `slots`, and defines the hooks of these slots; nothing else. The engine
owns hooks, masks, positions, caches, padding and batching. `a | b` composes methods whose slots differ.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from seqwise.core.config import Configured, budget_param, param
from seqwise.core.errors import SlotConflict, UsageError

if TYPE_CHECKING:
    from seqwise.core.anatomy import Anatomy
    from seqwise.core.caches import Chunk, Kept, View
    from seqwise.core.run import Loop, Run
    from seqwise.core.segments import Segments
    from seqwise.core.towers import Merged, Tower, TowerLayer
    from seqwise.core.views import Block, Kernel, Read, Stage, Transition

__all__ = ["SLOTS", "Composition", "Method", "budget_param", "param"]

SLOTS = (
    "prompt",
    "tower.rows",
    "input.rows",
    "layer.rows",
    "hidden",
    "attention.probs",
    "attention.kernel",
    "positions",
    "mask",
    "cache.retain",
    "cache.store",
    "cache.read",
    "decode.loop",
)


@dataclass(frozen=True)
class Method(Configured):
    """Base of every method that attaches to a model. Subclasses are frozen dataclasses of literals.

    >>> with MyMethod(budget=0.5).on(model) as run:
    ...     model.generate(**batch)
    """

    abstract: ClassVar[bool] = True
    slots: ClassVar[tuple[str, ...]] = ()
    looks_ahead: ClassVar[bool] = False  # `sees` decides alone, without causality
    shares_budget: ClassVar[bool] = False  # a count of visual tokens is for all images of a prompt together
    input_positions: ClassVar[str] = "compact"  # of rows that `cut_input` leaves, or "keep" for their own
    rotates: ClassVar[bool] = False  # `attend` moves keys: it gets each slot's position and the model's RoPE

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        unknown = [slot for slot in cls.slots if slot not in SLOTS]
        if unknown:
            raise TypeError(f"{cls.__name__}.slots names {unknown[0]!r}; slots are {', '.join(SLOTS)}")

    # attaching

    def on(self, model: nn.Module, *, chunk: int | None = None, scorer: Callable[[], Tensor] | None = None) -> Run:
        """The method on a model, as a context manager.

        chunk: prefill in blocks of so many tokens, each of which sees the cache that the last one left, so that peak
        memory falls. scorer: for methods that ask another model: called once per prompt, returns the scores of its
        images or frames (n,) that the method's documentation names.
        Raises UnsupportedModel where the model lacks a part, ValueError for bad arguments; both before any change.
        """
        from seqwise.core.run import Run

        return Run(self, model, chunk=chunk, scorer=scorer)

    def attach(self, model: nn.Module, *, chunk: int | None = None, scorer: Callable[[], Tensor] | None = None) -> Run:
        """Like `on`, for pipelines and servers: attached until `run.detach()`."""
        return self.on(model, chunk=chunk, scorer=scorer).__enter__()

    def __or__(self, other: Method) -> Composition:
        return Composition.of(self, other)

    @property
    def parts(self) -> tuple[Method, ...]:
        return (self,)

    # what a method says of itself

    def identity(self) -> Method | None:
        """The same method with settings that change nothing, or None where there are none (say why in a comment)."""
        return None

    def needs(self) -> set[str]:
        """Parts the model must have, in `anatomy.PARTS` words."""
        return set()

    def check(self, anatomy: Anatomy) -> None:
        """Refuses what cannot work on this model: raises UnsupportedModel or ValueError. Runs before any change."""

    def search_space(self, anatomy: Anatomy, budget: float) -> dict[str, tuple[float, float]]:
        """Bounds of the numbers that a search may choose for this model under an average share of visual tokens over
        the decoder's layers; empty where the method has no stages to plan."""
        return {}

    def planned(self, point: Mapping[str, float], anatomy: Anatomy, budget: float) -> Method:
        """The method with these numbers, its last share solved so that the average over the layers is the budget.

        Raises ValueError where no share does that.
        """
        raise NotImplementedError

    def facts(self) -> set[str]:
        """Facts of `Segments` that a prompt must come with ("set", "part", "box"); a prompt without them is refused."""
        return set()

    def begin(self, run: Run) -> None:
        """A new prompt begins."""

    # the slots' hooks; a subclass defines those of the slots it claims

    def reword(self, ids: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
        """`prompt`, in `generate`: the ids (1, m) and facts of the prompt that the model reads instead of the caller's
        ids (1, n), which come without padding. Returned texts begin with the caller's prompt all the same."""
        raise NotImplementedError

    def watched_tower(self, anatomy: Anatomy) -> tuple[int, ...] | None:
        """0-based tower layers whose attention `watch_tower` and `keep_input` need beside the feature layer's; None
        where `watch_tower` does without this model's tower."""
        return ()

    def watch_tower(self, tower: Tower, run: Run) -> dict[str, Tensor] | None:
        """Whatever slot the method claims: the tower has run on tiles of a prompt. Returned scores (T, N), by name,
        travel with the visual tokens as `state` of every stage, where other rows have 0."""
        raise NotImplementedError

    def prune_tower(self, layer: TowerLayer) -> Tensor | None:
        """`tower.rows`, after each tower layer: patches (images, k) that stay, ascending, or None for all."""
        raise NotImplementedError

    def keep_input(self, tower: Tower) -> Tensor | Merged:
        """`input.rows`: of each tile's visual tokens those that enter the language model, (T, k) ascending or a mask
        (T, N) bool, or the tokens that are made of them."""
        raise NotImplementedError

    def cut_input(self, stage: Stage) -> Tensor | None:
        """`input.rows`, instead of `keep_input`, on the whole prompt's embeddings (stage.layer is 0): (B, r) bool, True
        on rows that go on; None cuts nothing."""
        raise NotImplementedError

    def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
        """`layer.rows`: 0-based decoder layers whose input is cut."""
        raise NotImplementedError

    def watched(self, anatomy: Anatomy) -> tuple[int, ...]:
        """`layer.rows`: 0-based decoder layers whose modules' inputs and outputs `observe_transition` sees."""
        return ()

    def observe_transition(self, transition: Transition) -> None:
        """`layer.rows`: one module of a watched layer has run."""
        raise NotImplementedError

    def keep_rows(self, stage: Stage) -> Tensor | None:
        """`layer.rows`, at a stage: (B, r) bool, True on rows that go on; None cuts nothing."""
        raise NotImplementedError

    def rewritten_rows(self, rows: int) -> slice:
        """`attention.probs`: which of this forward's rows `rewrite` gets; the others keep their attention."""
        return slice(None)

    def rewritten_heads(self, layer: int, anatomy: Anatomy) -> tuple[int, ...]:
        """`attention.probs`: query heads of this layer whose probabilities `rewrite` replaces."""
        raise NotImplementedError

    def prepare(self, block: Block) -> None:
        """`attention.probs`: once per layer and forward, before its rows; statistics of the whole map come here."""

    def rewrite(self, probabilities: Tensor, block: Block) -> Tensor:
        """`attention.probs`: fp32 probabilities (B, h, r, n) of the chosen heads' rows at hand -> the same shape."""
        raise NotImplementedError

    def attend(self, kernel: Kernel) -> Tensor | None:
        """`attention.kernel`: one layer's attention of this forward's rows, (B, H, q, D); None for the model's own."""
        raise NotImplementedError

    def place(self, segments: Segments, anatomy: Anatomy) -> Tensor | None:
        """`positions`: RoPE positions (B, N) float32 of a whole prompt from its tokens' facts; None for ordinary ones.
        Later tokens go on from the largest, rounded up, plus one."""
        return None

    def frequencies(self, inv_freq: Tensor, anatomy: Anatomy) -> Tensor:
        """`positions`: the rotary frequencies (d / 2,) float32 while attached, from the model's own."""
        return inv_freq

    def mark(self, segments: Segments, run: Run) -> dict[str, Tensor]:
        """`mask`, `attention.kernel`, `attention.probs`: numbers of a whole prompt's tokens, (B, N) int64 by name, -1
        where none: what `sees` compares, and what kernels and blocks look up. Tokens after the prompt have -1."""
        return {}

    def sees(self, query: Mapping[str, Tensor], key: Mapping[str, Tensor]) -> Tensor:
        """`mask`, in a prompt: whether a row sees a slot, (B, h, r, c) bool, beside causality and padding; with
        `looks_ahead` instead of causality. query: (B, 1, r, 1), key: (B, h, 1, c) of each of `mark`'s numbers and of
        "order", the original position."""
        raise NotImplementedError

    def observes(self, phase: str) -> bool:
        """`cache.retain`, `cache.store`: whether every row's attention is needed in this phase (then the fused
        kernel's log-sum-exp is kept; window statistics do without)."""
        return False

    def retain(self, view: View) -> Kept | None:
        """`cache.retain`, after each layer's attention: slots to keep, as `view.keep` gives them; None keeps all."""
        raise NotImplementedError

    def store(self, view: View) -> list[Chunk] | None:
        """`cache.store`, after retain: packed chunks that cover the full-precision tail; None leaves it."""
        raise NotImplementedError

    def read(self, read: Read) -> tuple[Tensor, Tensor] | None:
        """`cache.read`, one-row steps: slots (B, H, k) each query head attends to, and which of them count (bool, False
        on padding); None reads all."""
        return None

    def decode(self, loop: Loop) -> Tensor:
        """`decode.loop`: generates and returns the whole ids (B, n), the prompt first."""
        raise NotImplementedError

    @classmethod
    def _from_ast(cls, tree: ast.expr, text: str) -> Configured:
        if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
            left, right = Method._from_ast(tree.left, text), Method._from_ast(tree.right, text)
            assert isinstance(left, Method) and isinstance(right, Method)
            return left | right
        return super()._from_ast(tree, text)


@dataclass(frozen=True)
class Composition(Method):
    """Methods with different slots, on one model. The order of writing has no meaning."""

    abstract: ClassVar[bool] = True
    members: tuple[Method, ...] = ()

    @classmethod
    def of(cls, *methods: Method) -> Composition:
        for method in methods:
            if not isinstance(method, Method):
                raise UsageError(f"only methods compose, got {method!r}")
        members = tuple(part for method in methods for part in method.parts)
        claims: dict[str, Method] = {}
        for member in members:
            for slot in member.slots:
                if slot in claims:
                    raise SlotConflict(f"{claims[slot]} and {member} both claim the slot {slot!r}; use one of them")
                claims[slot] = member
        ordered = sorted(members, key=lambda m: (min((SLOTS.index(s) for s in m.slots), default=99), str(m)))
        return cls(tuple(ordered))

    def __post_init__(self) -> None:  # members are methods, not literals
        pass

    def __str__(self) -> str:
        return " | ".join(str(member) for member in self.members)

    @property
    def parts(self) -> tuple[Method, ...]:
        return self.members

    def identity(self) -> Method | None:
        plain = [member.identity() for member in self.members]
        if any(method is None for method in plain):
            return None
        return Composition.of(*(method for method in plain if method is not None))


def seeded(seed: int, layer: int, sample_key: int, device: torch.device) -> torch.Generator:
    """A generator that depends on the seed, the layer and a sample's own tokens only, never on batch mates."""
    mixed = (seed * 1_000_003 + layer * 7_919 + sample_key * 104_729 + 12_345) % (2**63 - 1)
    return torch.Generator(device=device).manual_seed(mixed)
