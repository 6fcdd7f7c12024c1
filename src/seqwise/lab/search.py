"""The search behind `seqwise plan`: numbers of a staged method under a budget, without a gradient.

    maximise   mean over prompts of cos(h_full, h_pruned)     h: last hidden state of the prompt's last token, after the
                                                              final norm; 0 where it is NaN
    over       the method's own space of numbers, whose last share follows from the budget, so that everything that is
               tried sees the same average share of tokens over the layers
    against    the uniform schedule: the budget from the method's first stage on

A Gaussian process proposes what to try; the first proposals are random. Shares are measured too: a try that exceeds the
budget counts for less in proportion and is never the plan. Proposal k depends on the seed, k and the values before it
alone, so a search that was stopped goes on as if it had not been. The best of many tries on the same prompts looks
better than it is: both schedules are measured once more, on prompts that the search has not seen.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import MissingExtra, SeqwiseError, UnsupportedModel, UsageError
from seqwise.core.method import Method
from seqwise.core.plan import last_token_cosine
from seqwise.core.run import Run
from seqwise.lab.compare import reason
from seqwise.lab.registry import load_methods

RANDOM = 27  # proposals that are random, at most; a third of all where these are fewer
SLACK = 1.02  # measured shares that still keep to a budget, as a multiple of it

Batch = Mapping[str, Tensor]


# how good a method is


@dataclass
class Evaluated:
    """One method on all prompts: per prompt the cosine and the share of its tokens that the layers saw on average."""

    method: str
    cosines: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    point: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str | None = None  # why it failed; it then counts 0

    @property
    def value(self) -> float:
        return sum(self.cosines) / len(self.cosines) if self.cosines else 0.0

    @property
    def share(self) -> float | None:
        return sum(self.shares) / len(self.shares) if self.shares else None


class Objective:
    """How little a method changes the last token's final hidden state, over some prompts.

    prompts: batches as the model takes them, padded on the left. Raises UnsupportedModel for a model without a final
    norm, UsageError where there are no prompts.
    """

    def __init__(self, model: nn.Module, prompts: Iterable[Batch]) -> None:
        self.model, self.anatomy = model, Anatomy.of(model)
        self.prompts = [{name: x.to(_device(model)) for name, x in batch.items()} for batch in prompts]
        if not self.prompts:
            raise UsageError("a plan needs prompts, got none")
        self.full = [self._hidden(batch) for batch in self.prompts]  # (B, d) each

    def __call__(self, method: Method) -> Evaluated:
        """Runs all prompts under the method."""
        found, start = Evaluated(str(method)), time.perf_counter()
        with method.on(self.model) as run:
            for batch, full in zip(self.prompts, self.full, strict=True):
                found.cosines += last_token_cosine(full, self._hidden(batch)).tolist()
                found.shares += layer_shares(run)
        found.seconds = time.perf_counter() - start
        return found

    @torch.no_grad()
    def _hidden(self, batch: Batch) -> Tensor:
        norm = self.anatomy.final_norm
        if norm is None:
            raise UnsupportedModel(f"{type(self.model).__name__} has no norm behind its last layer that seqwise knows")
        seen: list[Tensor] = []
        hook = norm.register_forward_hook(lambda module, args, output: seen.append(output[:, -1]))
        short = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        try:
            self.model(**batch, **short, use_cache=False)
        finally:
            hook.remove()
        return seen[-1]


def layer_shares(run: Run) -> list[float]:
    """Per sample of the last prompt, the mean over the decoder's layers of the share of its visual tokens that a layer
    saw; of all its tokens where it has none."""
    segments, kept, layers = run.segments, run.kept(), len(run.anatomy.layers)
    if segments is None:
        return []
    shares = []
    for b, stages in enumerate(kept):
        real = segments.real[b]
        visual = segments.visual[b][real]  # by original position
        counted = visual if bool(visual.any()) else torch.ones_like(visual)
        left, total = 1.0, 0.0
        for layer in range(layers):
            name = "input" if layer == 0 else f"layer {layer}"
            if name in stages:
                left = float(counted[torch.tensor(stages[name], dtype=torch.long, device=counted.device)].sum())
                left /= int(counted.sum())
            total += left
        shares.append(total / layers)
    return shares


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# what to try next


def propose(
    space: Mapping[str, tuple[float, float]], tried: Sequence[tuple[Mapping[str, float], float]], seed: int, random: int
) -> dict[str, float]:
    """The next point of a space to try, given points and their values; the first `random` ones are drawn uniformly.

    Raises MissingExtra without optuna and scipy.
    """
    optuna = optimiser()
    number = len(tried)
    verbosity = optuna.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its Gaussian process is experimental
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            # a new one each time: what it proposes must not depend on where a search was stopped
            sampler = optuna.samplers.GPSampler(
                seed=(seed * 1_000_003 + number) % 2**32, n_startup_trials=random, deterministic_objective=True
            )
            study = optuna.create_study(direction="maximize", sampler=sampler)
            bounds = {name: optuna.distributions.FloatDistribution(low, high) for name, (low, high) in space.items()}
            for point, value in tried:
                study.add_trial(optuna.trial.create_trial(params=dict(point), distributions=bounds, value=value))
            return {name: float(value) for name, value in study.ask(bounds).params.items()}
        finally:
            optuna.logging.set_verbosity(verbosity)


def optimiser() -> Any:
    """The package optuna. Raises MissingExtra where it, or scipy, is not installed."""
    try:
        import optuna
        import scipy  # noqa: F401 - optuna's Gaussian process needs it
    except ImportError:
        raise MissingExtra("a plan is searched with optuna and scipy: pip install 'seqwise[plan]'") from None
    return optuna


class Search:
    """A search of one method: `run` evaluates what is missing; what has been found is in `baseline`, `tried`, `unseen`.

    objective, unseen: over the prompts that the search sees, and over others. Raises UnsupportedModel for a model that
    the method cannot run on, UsageError for a method without stages, ValueError for a budget that it cannot meet.
    """

    def __init__(
        self, method: Method, budget: float, objective: Objective, *, evaluations: int = 60, seed: int = 42,
        unseen: Objective | None = None,
    ) -> None:  # fmt: skip
        anatomy = objective.anatomy
        anatomy.require(method.needs(), str(method))
        method.check(anatomy)
        self.space = method.search_space(anatomy, budget)
        if not self.space:
            raise UsageError(f"{method} has no stages to plan; there is a plan for {planners()}")
        self.method, self.budget, self.evaluations, self.seed = method, budget, evaluations, seed
        self.objective, self.other = objective, unseen
        self.baseline: Evaluated | None = None
        self.tried: list[Evaluated] = []
        self.unseen: dict[str, Evaluated] = {}

    @property
    def best(self) -> Evaluated | None:
        """The best that keeps to the budget, the uniform schedule among it; the earliest of equals."""
        every = [one for one in (self.baseline, *self.tried) if one is not None and one.reason is None]
        return max((one for one in every if self.excess(one) == 1), key=lambda one: one.value, default=None)

    def excess(self, one: Evaluated) -> float:
        """How many times the budget, or the uniform schedule's share where that is more, the layers saw; 1 within 2 %,
        as counts of tokens are whole."""
        allowed = max(self.budget, (self.baseline and self.baseline.share) or 0.0)
        times = (one.share or 0.0) / allowed
        return times if times > SLACK else 1.0

    def run(self, keep: Callable[[], None], show: Callable[[str, int], None]) -> None:
        """keep: called when something is finished. show(what, how many evaluations are finished).

        Raises UsageError where the uniform schedule itself fails.
        """
        anatomy = self.objective.anatomy

        def planned(point: Mapping[str, float]) -> Method:
            return self.method.planned(point, anatomy, self.budget)

        if self.baseline is None:
            show("uniform schedule", 0)
            try:
                self.baseline = self.objective(planned({}))
            except SeqwiseError:
                raise
            except Exception as error:
                raise UsageError(f"the uniform schedule of {self.method} fails: {reason(error)}") from error
            keep()
        random = max(1, min(RANDOM, self.evaluations // 3))
        while len(self.tried) < self.evaluations:
            best = self.best
            show(f"best {best.value if best else 0:.4f}, uniform {self.baseline.value:.4f}", len(self.tried))
            values = [(one.point, one.value / self.excess(one)) for one in self.tried]
            point = propose(self.space, values, self.seed, random)
            self.tried.append(self._evaluated(partial(planned, point), self.objective, point))
            keep()
        assert self.best is not None
        for text in dict.fromkeys((self.baseline.method, self.best.method)):
            if self.other is not None and text not in self.unseen:
                show("prompts that the search has not seen", self.evaluations)
                self.unseen[text] = self._evaluated(partial(Method.parse, text), self.other, {})
                keep()

    def _evaluated(self, make: Callable[[], Method], objective: Objective, point: dict[str, float]) -> Evaluated:
        name = str(self.method)
        try:
            method = make()
            name = str(method)
            found = objective(method)
        except Exception as error:
            return Evaluated(name, point=point, reason=reason(error))
        found.point = point
        return found


def planners() -> str:
    """Names of the methods that can be planned."""
    known = load_methods().values()
    names = [one.__name__ for one in known if one.search_space is not Method.search_space]
    return ", ".join(sorted(names)) or "no method yet"
