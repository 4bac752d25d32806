"""Damping schedules: the plan, its ends, and what is refused."""

import pickle
from itertools import pairwise
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curvlib.solvers import CustomDamping, DampingState, ExponentialDamping, LinearDamping

numbers = st.floats(1e-6, 1e6)


def dampings(control, count, ratio=None):
    state, found = control.start(), []
    for _ in range(count):
        found.append(state.damping)
        state = control.update(state, ratio)
    return found


def reciprocal(step):
    return 1.0 / (1 + step)


@given(numbers, numbers, st.integers(1, 9))
def test_each_step_of_an_exponential_schedule_has_the_same_factor(initial, final, steps):
    found = dampings(ExponentialDamping(initial=initial, final=final, steps=steps), steps + 3)
    factor = (final / initial) ** (1 / steps)
    for earlier, later in pairwise(found[: steps + 1]):
        assert later / earlier == pytest.approx(factor, rel=1e-9)
    assert found[0] == pytest.approx(initial, rel=1e-12)
    assert found[steps:] == [final] * 3


@given(numbers, numbers | st.just(0.0), st.integers(1, 9))
def test_each_step_of_a_linear_schedule_has_the_same_difference(initial, final, steps):
    found = dampings(LinearDamping(initial=initial, final=final, steps=steps), steps + 3)
    for earlier, later in pairwise(found[: steps + 1]):
        assert later - earlier == pytest.approx((final - initial) / steps, abs=1e-12 * max(initial, final))
    assert found[0] == initial
    assert found[steps:] == [final] * 3


def test_any_function_of_the_step_is_a_schedule():
    assert dampings(CustomDamping(reciprocal), 4) == [1.0, 1 / 2, 1 / 3, 1 / 4]


@pytest.mark.parametrize("ratio", [None, -inf, nan, 0.5])
def test_the_ratio_does_not_count(ratio):
    control = LinearDamping(initial=2.0, final=1.0, steps=2)
    assert dampings(control, 3, ratio) == [2.0, 1.5, 1.0]
    assert control.accept(ratio)
    assert not control.needs_ratio(control.start())
    assert not control.follows_ratio


def test_a_checkpoint_goes_on_in_the_plan():
    control = ExponentialDamping(initial=1.0, final=0.1, steps=5)
    state = control.update(control.update(control.start(), None), None)
    again = DampingState.from_state_dict(state.state_dict())
    assert control.update(again, None) == control.update(state, None)
    assert state.first == again.first == 1.0


def test_the_words_of_a_custom_schedule_are_the_same_in_every_process():
    assert repr(CustomDamping(reciprocal)) == "CustomDamping(reciprocal)"
    assert pickle.loads(pickle.dumps(CustomDamping(reciprocal))) == CustomDamping(reciprocal)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "LinearDamping", lambda: ExponentialDamping(initial=1.0, final=0.0, steps=3)),
        (ValueError, "initial", lambda: ExponentialDamping(initial=-1.0, final=1.0, steps=3)),
        (ValueError, "steps", lambda: ExponentialDamping(initial=1.0, final=1.0, steps=0)),
        (ValueError, "steps", lambda: LinearDamping(initial=1.0, final=1.0, steps=1.5)),
        (ValueError, "final", lambda: LinearDamping(initial=1.0, final=nan, steps=3)),
        (TypeError, "function", lambda: CustomDamping(1.0)),
        (ValueError, "damping of step 0", lambda: CustomDamping(lambda k: -1.0).start()),
        (TypeError, "damping of step 1", lambda: dampings(CustomDamping([1.0, "x"].__getitem__), 2)),
    ],
    ids=["zero", "negative", "no steps", "part of a step", "nan", "number", "negative value", "text"],
)
def test_bad_plans_are_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()
