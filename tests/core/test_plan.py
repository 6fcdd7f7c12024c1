import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from seqwise.core.plan import average_share, last_share, last_token_cosine, shares_within, stage_space, stages_at

RELEASED = {  # budget: r0, r1, r2 of stages (0, 9, 18) of 28 layers, and their average
    0.5: ((0.7233, 0.7487, 0.487), 0.501),
    0.25: ((0.2651, 0.9833, 0.8773), 0.251),
    0.1: ((0.1166, 1.0, 0.6011), 0.100),
}


@pytest.mark.parametrize("budget", RELEASED)
def test_released_ratios_average_to_their_budget(budget):
    shares, average = RELEASED[budget]
    assert average_share((0, 9, 18), shares, 28) == pytest.approx(average, abs=5e-4)


@pytest.mark.parametrize(
    "budget, shares, last",
    [
        (0.5, (0.72332, 0.748748), 0.4830),
        (0.25, (0.265103, 0.983343), 0.8700),
        (0.1, (0.116615, 1.0), 0.6011),
        (0.5, (0.7233, 0.7487), 0.4832),
        (0.25, (0.2651, 0.9833), 0.8701),
        (0.1, (0.1166, 1.0), 0.6014),
    ],
)
def test_the_last_share_of_the_released_searches(budget, shares, last):
    assert last_share(budget, (0, 9, 18), shares, 28) == pytest.approx(last, abs=6e-5)


def test_layers_before_the_first_stage_see_every_token():
    assert average_share((3,), (0.5,), 4) == pytest.approx((3 + 0.5) / 4)
    assert average_share((1, 2), (0.5, 0.5), 5) == pytest.approx((1 + 0.5 + 3 * 0.25) / 5)
    assert last_share(0.7, (1,), (), 2) == pytest.approx(0.4)


def test_one_stage_at_the_input_keeps_the_budget_itself():
    assert last_share(0.3, (0,), (), 17) == pytest.approx(0.3)


def test_a_share_above_one_is_one():
    assert last_share(0.9, (0, 2), (0.1,), 4) == 1.0


stages_of = st.integers(1, 40).flatmap(
    lambda L: st.tuples(st.just(L), st.lists(st.integers(0, L - 1), min_size=1, max_size=4, unique=True).map(sorted))
)


@given(shape=stages_of, data=st.data(), budget=st.floats(0.02, 1.0))
def test_solving_and_averaging_are_inverse(shape, data, budget):
    layers, stages = shape
    shares = data.draw(st.lists(st.floats(0.05, 1.0), min_size=len(stages) - 1, max_size=len(stages) - 1))
    spent = average_share(stages, (*shares, 1e-12), layers)
    assume(abs(spent - budget) > 1e-9)
    if spent > budget:
        with pytest.raises(ValueError, match=r"budget must be > .*use up, got"):
            last_share(budget, stages, shares, layers)
        return
    last = last_share(budget, stages, shares, layers)
    assert 0 < last <= 1
    average = average_share(stages, (*shares, last), layers)
    assert average == pytest.approx(budget) if last < 1 else average <= budget + 1e-9


@given(shape=stages_of, data=st.data(), budget=st.floats(0.02, 1.0))
def test_free_numbers_always_give_shares_that_meet_the_budget(shape, data, budget):
    layers, stages = shape
    k = len(stages)
    places = data.draw(st.lists(st.floats(0.0, 1.0), min_size=k - 1, max_size=k - 1))
    if stages[0] >= layers * budget - 1e-9:
        with pytest.raises(ValueError, match="use up, got"):
            shares_within(stages[0] / layers, stages, places, layers)
        return
    shares = shares_within(budget, stages, places, layers)
    assert all(0 < share <= 1 for share in shares)
    assert average_share(stages, shares, layers) == pytest.approx(budget)
    uniform = shares_within(budget, stages, [0.0] * (k - 1), layers)
    first = (layers * budget - stages[0]) / (layers - stages[0])
    assert uniform == pytest.approx((first, *[1.0] * (k - 1)))
    if places and places[0] > 0:
        assert shares[0] >= uniform[0] - 1e-12


def test_a_number_at_its_end_leaves_the_later_stages_little():
    assert shares_within(0.5, (0, 2), (1.0,), 4) == pytest.approx((0.99, 0.01 / 0.99))
    with pytest.raises(ValueError, match=r"places must be one per stage but the last \(1\), got 0"):
        shares_within(0.5, (0, 2), (), 4)


@given(layers=st.integers(2, 40), data=st.data(), budget=st.floats(0.05, 0.99), from_input=st.booleans())
def test_every_point_of_a_stage_space_meets_the_budget(layers, data, budget, from_input):
    count = data.draw(st.integers(1, min(4, layers - 1)))
    own = tuple(sorted(data.draw(st.sets(st.integers(1, 40), min_size=count, max_size=count))))
    if not from_input and layers * budget <= 1:
        with pytest.raises(ValueError, match=rf"{count} stages need a budget > "):
            stage_space(count, layers, budget)
        return
    space = stage_space(count, layers, budget, from_input=from_input)
    point = {name: data.draw(st.floats(low, high)) for name, (low, high) in space.items()}
    for numbers in (point, {}):
        stages, left = stages_at(numbers, own, layers, budget, from_input=from_input)
        assert (stages[0] == 0) == from_input and len(stages) == len(left) == count
        shares = [after / before for before, after in zip((1.0, *left), left, strict=False)]
        # each share of all tokens is rounded down to 1e-4
        assert budget - 1.01e-4 <= average_share(stages, shares, layers) <= budget + 1e-4
    assert max(left) - min(left) <= 1e-4, "without numbers the schedule is uniform"


def test_own_stages_stay_where_the_budget_lets_them():
    assert stages_at({}, (7, 9, 12), 32, 0.5)[0] == (7, 9, 12)
    assert stages_at({}, (7, 9, 12), 32, 0.1)[0] == (3, 9, 12)
    assert stages_at({"first": 2.4, "gap1": 0.0, "gap2": 0.999}, (7, 9, 12), 32, 0.5)[0] == (2, 3, 31)


@pytest.mark.parametrize("stages", [(), (2, 1), (1, 1), (-1, 2), (0, 4)])
def test_bad_stages_are_refused(stages):
    with pytest.raises(ValueError, match=r"stages must ascend within \[0, 3\]"):
        average_share(stages, (0.5,) * len(stages), 4)


def test_shares_must_pair_up_with_stages():
    with pytest.raises(ValueError, match=r"one per stage \(2\), got 1"):
        average_share((0, 1), (0.5,), 4)
    with pytest.raises(ValueError, match=r"one per stage but the last \(1\), got 2"):
        last_share(0.5, (0, 1), (0.5, 0.5), 4)


def test_cosine_is_one_for_equal_directions_zero_for_nan():
    h = torch.tensor([[3.0, 4.0], [1.0, 0.0], [float("nan"), 1.0]])
    other = torch.tensor([[6.0, 8.0], [0.0, 2.0], [1.0, 1.0]])
    torch.testing.assert_close(last_token_cosine(h, other), torch.tensor([1.0, 0.0, 0.0]))
    found = last_token_cosine(h[:1].half(), -other[:1].half())
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx([-1.0])
