"""The search of a schedule: the objective is what it says, proposals are repeatable, the plan keeps to its budget."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import pytest
import torch

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import MissingExtra, UsageError
from seqwise.core.method import Method
from seqwise.lab.search import Objective, Search, layer_shares, propose
from seqwise.methods.reduce.fopru import FoPru
from seqwise.methods.reduce.transprune import TransPrune
from seqwise.methods.reduce.vflowopt import VFlowOpt
from seqwise.testing.families import FAMILIES

pytest.importorskip("optuna")

LLAVA = FAMILIES["llava"]
SMALL = VFlowOpt(budget=(0.5, 0.75, 0.5), prune_at=(1, 3), t=1.2, m=2.0)


@pytest.fixture(scope="module")
def model():
    return LLAVA.tiny()


def some(n: int, seed: int = 0) -> list:
    return [LLAVA.prompt(9 + i % 3, seed=seed + i) for i in range(n)]


@dataclass(frozen=True)
class Fussy(VFlowOpt):
    """Refuses a positive alpha."""

    def planned(self, point, anatomy, budget):
        if point.get("alpha", 0.0) > 0:
            raise ValueError("alpha is\npositive")
        return super().planned(point, anatomy, budget)


@dataclass(frozen=True)
class Greedy(VFlowOpt):
    """Keeps everything where alpha is positive, whatever the budget."""

    def planned(self, point, anatomy, budget):
        found = super().planned(point, anatomy, budget)
        return replace(found, budget=(1.0, 1.0, 1.0)) if point.get("alpha", 0.0) > 0 else found


# the objective


def test_shares_count_visual_tokens_layer_by_layer(model):
    with SMALL.on(model) as run, torch.no_grad():
        model(**LLAVA.pad_left([LLAVA.prompt(20, seed=1), LLAVA.prompt(9, seed=2, images=2)]), use_cache=False)
    # 16 -> 8 (M = 4 make room for 2 x 2 cells) -> 6 -> 3, an image
    assert layer_shares(run) == [pytest.approx((8 + 6 + 6 + 3) / 64)] * 2
    with FoPru(budget=0.25).on(model) as run, torch.no_grad():
        model(**LLAVA.prompt(20), use_cache=False)
    assert layer_shares(run) == [0.25]
    late = TransPrune(budget=(0.5, 0.25), prune_after=(1, 3), layers=(1, 3))
    with late.on(model) as run, torch.no_grad():
        model(**LLAVA.prompt(20), use_cache=False)
    assert layer_shares(run) == [(1 + 0.5 + 0.5 + 0.25) / 4]


def test_a_prompt_without_images_has_its_own_tokens_counted(model):
    with SMALL.on(model) as run, torch.no_grad():
        model(**LLAVA.prompt(20, images=0), use_cache=False)
    assert layer_shares(run) == [1.0]


def test_the_objective_is_the_cosine_of_the_last_tokens_final_hidden_state(model):
    prompts = [LLAVA.pad_left(some(2)), LLAVA.prompt(30, seed=9)]
    found = Objective(model, prompts)(SMALL)
    wanted = []
    for batch in prompts:
        with torch.no_grad():
            full = model.model(**batch).last_hidden_state[:, -1]
            with SMALL.on(model):
                pruned = model.model(**batch).last_hidden_state[:, -1]
        wanted += torch.nn.functional.cosine_similarity(full, pruned, dim=-1).tolist()
    assert found.cosines == pytest.approx(wanted, abs=1e-5) and len(found.shares) == 3
    assert found.value == pytest.approx(sum(wanted) / 3, abs=1e-5) and max(wanted) < 0.9999
    same = Objective(model, prompts)(SMALL.identity())
    assert same.cosines == pytest.approx([1.0] * 3, abs=1e-5) and same.shares == [1.0] * 3


def test_no_prompts_are_refused(model):
    with pytest.raises(UsageError, match="needs prompts"):
        Objective(model, [])


# what to try next

SPACE = {"x": (-1.0, 2.0), "y": (0.5, 0.5), "z": (0.0, 10.0)}


def tried(n: int, seed: int = 0) -> list:
    found: list = []
    for _ in range(n):
        point = propose(SPACE, found, seed, 5)
        found.append((point, -((point["x"] - 0.4) ** 2) - 0.01 * (point["z"] - 7) ** 2))
    return found


def test_proposals_stay_inside_are_repeatable_and_come_near_the_best():
    import optuna

    verbosity, state = optuna.logging.get_verbosity(), torch.random.get_rng_state()
    found = tried(14)
    assert found[:8] == tried(8) and found[0][0] != tried(1, seed=1)[0][0]
    assert all(low <= point[name] <= high for point, _ in found for name, (low, high) in SPACE.items())
    assert max(value for _, value in found) > -0.01 > max(value for _, value in found[:5])
    assert optuna.logging.get_verbosity() == verbosity and torch.equal(torch.random.get_rng_state(), state)


def test_a_missing_optimiser_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"pip install 'seqwise\[plan\]'"):
        propose(SPACE, [], 0, 1)


# the search


def searched(model, method: Method, **more) -> Search:
    search = Search(method, 0.4, Objective(model, some(4)), **{"evaluations": 5, "seed": 3, **more})
    search.run(lambda: None, lambda text, done: None)
    return search


def test_the_plan_is_the_best_of_all_that_keeps_to_the_budget(model):
    search = searched(model, SMALL, unseen=Objective(model, some(2, seed=70)))
    assert len(search.tried) == 5 and search.baseline.method == str(SMALL.planned({}, Anatomy.of(model), 0.4))
    assert search.best.value == max(one.value for one in (search.baseline, *search.tried) if one.share <= 0.4 * 1.02)
    assert list(search.unseen) == list(dict.fromkeys([search.baseline.method, search.best.method]))
    assert all(len(one.cosines) == 2 for one in search.unseen.values())
    for one in search.tried:
        planned = SMALL.planned(one.point, Anatomy.of(model), 0.4)
        assert one.method == str(planned) and Method.parse(one.method) == planned
        assert one.cosines == Objective(model, some(4))(planned).cosines, "all see the same prompts"
    assert [one.point for one in search.tried] == [one.point for one in searched(model, SMALL).tried]


def test_what_fails_counts_nothing_and_says_why(model):
    search = searched(model, Fussy(prune_at=(1, 3), t=1.2), evaluations=6)
    failed = [one for one in search.tried if one.point["alpha"] > 0]
    assert failed and all(one.value == 0 and one.reason.startswith("ValueError: alpha is positive") for one in failed)
    assert all(one.reason is None for one in search.tried if one not in failed)
    assert search.best.reason is None


def test_what_sees_more_than_the_budget_is_never_the_plan(model):
    search = searched(model, Greedy(prune_at=(1, 3), t=1.2), evaluations=6)
    greedy = [one for one in search.tried if one.point["alpha"] > 0]
    assert greedy and all(one.value > 0.999 and one.share == 1.0 for one in greedy)
    assert all(search.excess(one) == pytest.approx(2.5, rel=0.05) for one in greedy)
    assert search.best not in greedy and search.best.share <= 0.4 * 1.02


def test_a_uniform_schedule_that_fails_stops_it(model):
    class Broken(VFlowOpt):
        abstract = True

        def keep_rows(self, stage):
            raise RuntimeError("no idea")

    with pytest.raises(UsageError, match=r"the uniform schedule of Broken.* fails: RuntimeError: no idea"):
        searched(model, Broken(prune_at=(1, 3)))


def test_a_method_without_stages_is_refused(model):
    with pytest.raises(UsageError, match=r"FoPru\(budget=0.25\) has no stages to plan; there is a plan for .*VFlowOpt"):
        Search(FoPru(), 0.4, Objective(model, some(1)))


def test_any_staged_method_can_be_planned(model):
    search = searched(model, TransPrune(budget=(0.5, 0.25), prune_after=(1, 3), layers=(1, 3)), evaluations=2)
    assert [type(Method.parse(one.method)) for one in search.tried] == [TransPrune] * 2
    # shares round down to whole tokens: of 16, up to a token a stage
    assert all(0.4 - 1 / 16 <= one.share <= 0.4 + 1e-4 for one in (search.baseline, *search.tried))
