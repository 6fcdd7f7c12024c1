"""The contract suite can fail: for each thing an item checks, a method that is wrong in just that way."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from typing import ClassVar

import pytest
import torch

from seqwise.core.caches import SlotLayer
from seqwise.core.errors import PromptError
from seqwise.core.method import Method, budget_param, param
from seqwise.core.run import Run
from seqwise.methods.baselines import Full, Random, Recent
from seqwise.testing import FAMILIES, check, contract, examples, home

LLAMA, LLAVA = FAMILIES["llama"], FAMILIES["llava"]


def fails(method, number, says):
    with pytest.raises(AssertionError, match=says):
        check(method, home(method), items=(number,))


@dataclass(frozen=True)
class Keeps(Method):
    """Right as it stands: keeps the newest. The methods below each break one thing of it."""

    budget: int | float = budget_param(10)
    slots: ClassVar = ("cache.retain",)

    def identity(self):
        return replace(self, budget=1.0)

    def score(self, view):
        return view.order.float().expand_as(view.live)

    def retain(self, view):
        return view.keep(self.score(view), view.capacity(self.budget))


def test_the_method_that_the_others_break_is_right():
    assert len(check(Keeps(), items=(1, 2, 3, 4, 5, 6, 8, 9))) == 8
    assert check(Keeps(), FAMILIES["gemma2"], items=(1, 2, 3)) == ["1 identity", "2 restore", "3 padding"]


# 1 identity


class StillDrops(Keeps):
    def identity(self):
        return replace(self, budget=0.5)


class NoReason(Keeps):
    def identity(self):
        return None


class AReason(Keeps):
    def identity(self):
        """None, since there is always something to drop."""
        return None


def test_identity():
    fails(StillDrops(), 1, "identity changes the model")
    fails(NoReason(), 1, "does not say why")
    assert check(AReason(), items=(1,)) == []


# 2 restore


class LeavesAttribute(Keeps):
    def begin(self, run):
        run.anatomy.layers[1].touched = True


class LeavesHook(Keeps):
    def begin(self, run):
        run.anatomy.layers[1].mlp.register_forward_hook(lambda *_: None)


class LeavesConfig(Keeps):
    def begin(self, run):
        run.model.config.use_cache = False


class LeavesWeights(Keeps):
    def begin(self, run):
        run.model.lm_head.weight.data.mul_(2)


class LeavesOnError(Keeps):
    def on(self, model, **options):
        run = super().on(model, **options)
        run.detach_well, run.detach = run.detach, lambda: None
        run.__class__ = _DetachesOnSuccess
        return run


class _DetachesOnSuccess(Run):
    def __exit__(self, kind, error, trace):
        if error is None:
            self.detach_well()


class EntersTwice(Keeps):
    def on(self, model, **options):
        run = super().on(model, **options)
        run.__class__ = _EntersTwice
        return run


class _EntersTwice(Run):
    def __enter__(self):
        return self if "_seqwise_run" in vars(self.model) else super().__enter__()


def test_restore():
    fails(LeavesAttribute(), 2, r"not restored: .*layers\.1\.touched")
    fails(LeavesHook(), 2, r"not restored: .*layers\.1\.mlp\._forward_hooks")
    fails(LeavesConfig(), 2, "not restored: .*config")
    fails(LeavesWeights(), 2, "the restored model")
    fails(LeavesOnError(), 2, "after an exception inside the context: the model is not restored")
    fails(EntersTwice(), 2, "entering twice is not refused")


# 3 padding


class CountsColumns(Keeps):
    def score(self, view):
        return (torch.arange(view.slots) % 5).float().expand_as(view.live)


class LooksAtNeighbours(Keeps):
    def score(self, view):
        luck = torch.rand(len(view.live), 1, view.ledger.columns, generator=torch.Generator().manual_seed(0))
        order = view.order.clamp(min=0).expand_as(view.live)
        return luck.expand(*order.shape[:2], -1).gather(-1, order)


@dataclass(frozen=True)
class AddsToPads(Method):
    """Changes what is generated, not what is kept: the more rows a batch has, the flatter its attention."""

    slots: ClassVar = ("attention.probs",)

    def rewritten_heads(self, layer, anatomy):
        return (0,)

    def rewrite(self, probabilities, block):
        return probabilities / len(block.lengths)


def test_padding():
    fails(CountsColumns(), 3, "keeps other tokens than alone")
    fails(LooksAtNeighbours(), 3, "row 1 of a padded batch keeps other tokens than alone")
    fails(AddsToPads(), 3, "row 0 of a padded batch")


# 4 less work


class MasksOnly(Keeps):
    def retain(self, view):
        n = view.slots
        index = torch.arange(n).expand_as(view.live)
        return index, view.live & (view.order > view.newest - self.budget)


@dataclass(frozen=True)
class ReadsAll(Method):
    slots: ClassVar = ("cache.read",)

    def read(self, read):
        index = torch.arange(read.key.shape[2]).expand(read.query.shape[0], read.query.shape[1], -1)
        return index, torch.ones_like(index, dtype=torch.bool)


@dataclass(frozen=True)
class CutsNoRows(Method):
    slots: ClassVar = ("layer.rows",)

    def stages(self, anatomy):
        return (1,)

    def keep_rows(self, stage):
        return None


@dataclass(frozen=True)
class KeepsPatches(Method):
    slots: ClassVar = ("input.rows",)

    def keep_input(self, tower):
        return torch.arange(tower.patches).expand(len(tower.received()), -1)


@dataclass(frozen=True)
class PrunesNothing(Method):
    slots: ClassVar = ("tower.rows",)

    def prune_tower(self, layer):
        return None


@dataclass(frozen=True)
class OneByOne(Method):
    """A loop that verifies a draft of nothing but the newest token."""

    slots: ClassVar = ("decode.loop",)

    def decode(self, loop):
        ids, done = loop.input_ids, False
        loop.prefill()
        root, alone = torch.zeros(1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
        while not done:
            new = loop.verify(ids[:, -1:], root, alone)[0, -1:].argmax(-1)
            loop.accept(root, 1)
            done = loop.stop(ids, new)[1]
            ids = torch.cat([ids, new[None]], 1)
        return ids


def test_less_work():
    fails(MasksOnly(), 4, "the cache takes .* bytes, the plain one")
    fails(ReadsAll(), 4, "no attention work is saved")
    fails(CutsNoRows(), 4, "the last decoder layer sees as many rows as the first")
    fails(KeepsPatches(), 4, "the language model's first layer still sees every row")
    fails(PrunesNothing(), 4, "the tower's last layer still sees all patches")
    fails(OneByOne(), 4, "25 forwards for 24 tokens")


# 5 settings


class RefusesHalf(Keeps):
    def begin(self, run):
        if run.model.dtype == torch.bfloat16:
            raise PromptError("float32 only, please")


class RefusesSilently(Keeps):
    def begin(self, run):
        if run.chunk is not None:
            raise PromptError("")


class TurnsNaN(AddsToPads):
    def rewrite(self, probabilities, block):
        return probabilities * float("nan")


class ForgetsThePrompt(OneByOne):
    def decode(self, loop):
        return super().decode(loop)[:, loop.input_ids.shape[1] :]


class ForgetsTheTurn(Keeps):
    """Its identity holds for one turn and drops at a second."""

    def identity(self):
        return replace(self, budget=1.0)

    def retain(self, view):
        late = view.phase == "decode" and view.new > 1
        return view.keep(self.score(view), [12] if late else view.capacity(self.budget))


class DrawsAnew(Keeps):
    """Sampling from one seed differs: a number that lives on between runs decides."""

    turn: ClassVar = count()

    def begin(self, run):
        object.__setattr__(self, "now", next(self.turn))

    def score(self, view):
        return ((view.order + self.now) % 7).float().expand_as(view.live)


def test_settings():
    fails(RefusesHalf(), 5, "refuses bf16: float32 only")
    fails(RefusesSilently(), 5, "chunked prefill is refused without a reason")
    fails(TurnsNaN(), 5, "bf16: NaN logits")
    fails(ForgetsThePrompt(), 5, "do not begin with the caller's prompt")
    fails(ForgetsTheTurn(), 5, "identity changes a second turn")
    fails(DrawsAnew(), 5, "sampling with one seed gives two results")


# 6 errors


@dataclass(frozen=True)
class AcceptsAnything(Keeps):
    def __post_init__(self):
        pass


@dataclass(frozen=True)
class SaysNothing(Full):
    share: float = param(0.5, gt=0, le=1)
    text: ClassVar = "bad share"

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(self.text.format(self.share))


class NamesNoValue(SaysNothing):
    text = "NamesNoValue.share must be in (0, 1], got that"


class NamesNoRange(SaysNothing):
    text = "NamesNoRange.share must be above 0, got {}"


class RaisesAnother(SaysNothing):
    text = "RaisesAnother.share must be in (0, 1], got {}"


class RunsAnyway(Keeps):
    def needs(self):
        return {"vision tower"}

    def on(self, model, **options):
        return nullcontext()


def test_errors():
    fails(AcceptsAnything(), 6, r"AcceptsAnything\.budget=0 is accepted")
    fails(SaysNothing(), 6, r"SaysNothing\.share=0\.0: the message does not name the field: bad share")
    fails(NamesNoValue(), 6, r"NamesNoValue\.share=0\.0: the message does not say 'got 0\.0'")
    fails(NamesNoRange(), 6, r"NamesNoRange\.share=2\.0: the message does not say the range")
    fails(RaisesAnother(), 6, r"RaisesAnother\.share=<class 'object'> raises TypeError, not ValueError")
    fails(RunsAnyway(), 6, "needs 'vision tower', but runs on llama")


# 7 composition


class Unreadable(Keeps):
    def __str__(self):
        return "Unreadable(budget=3)"


class ComposesWithAll(Keeps):
    def __or__(self, other):
        return self


class OnlyAlone(Keeps):
    def begin(self, run):
        if len(run.method.parts) > 1:
            run.anatomy.layers[0].shared = True


def test_composition(monkeypatch):
    monkeypatch.setattr(contract, "examples", lambda: {"Recent": Recent(), "FoPru": examples()["FoPru"]})
    fails(Unreadable(), 7, r"parse\(str\(\)\)")
    fails(ComposesWithAll(), 7, "both claim cache.retain and compose all the same")
    fails(OnlyAlone(), 7, "FoPru.*the model is not restored")


# 8 determinism


class Dice(Keeps):
    def score(self, view):
        return torch.rand(view.live.shape)


def test_determinism(monkeypatch):
    fails(Dice(), 8, "draws from torch's global generator")
    fails(DrawsAnew(), 8, "keeps other tokens the second time")
    monkeypatch.setattr(Run, "kept", lambda run, layer=None: [{"input": [2, 1]}])
    fails(Recent(budget=6), 8, r"input does not ascend: \[2, 1\]")


# 9 report


class NeverActs(Keeps):
    def retain(self, view):
        return None


def test_report(monkeypatch):
    fails(NeverActs(), 9, "never acted on llama")
    assert check(Full(), items=(9,)) == ["9 report"]  # whose point it is never to act
    with monkeypatch.context() as patch:
        patch.setattr(SlotLayer, "nbytes", property(lambda layer: 7))
        fails(Recent(budget=6), 9, "the report says 28 bytes")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "rows", property(lambda run: [[0, 1]]))
        fails(Recent(budget=6), 9, r"run\.rows does not map")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "__str__", lambda run: str(run.method))
        fails(Full(), 9, "does not tell whether it acted")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "kept", lambda run, layer=None: [{"cache 0": [[90]]}, {}])
        fails(Random(budget=6, recent=2), 9, "outside of its own 25 tokens")


# and the list of methods


def test_a_method_without_a_usable_example_fails_the_suite(monkeypatch):
    @dataclass(frozen=True)
    class Newcomer(Method):
        size: int = param(ge=1)
        slots: ClassVar = ("cache.retain",)

    Newcomer.__module__ = "seqwise.methods.cache.newcomer"
    monkeypatch.setattr(contract, "known_classes", lambda base: {"Newcomer": Newcomer})
    with pytest.raises(AssertionError, match="Newcomer needs an entry"):
        examples()
    monkeypatch.setitem(contract.EXAMPLES, "Newcomer", "Newcomer(size=0)")
    with pytest.raises(AssertionError, match="Newcomer needs an entry"):
        examples()
    monkeypatch.undo()
    Newcomer.__module__ = __name__
    assert not {"Keeps", "Newcomer"} & set(examples()), "test methods do not belong to the suite"


def test_one_failure_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(contract, "examples", lambda: {"NeverActs": NeverActs(), "Recent": Recent(budget=6)})
    monkeypatch.setattr(contract, "FAMILIES", {"llama": LLAMA})
    document = contract.record(tmp_path / "contract.json", items=(9,))
    assert not document["NeverActs"]["passed"] and "never acted" in document["NeverActs"]["failed"]
    assert document["Recent"]["passed"] and document["Recent"]["items"] == [9]
