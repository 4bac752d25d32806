"""The radius control: what each field does, properties over any history, checkpoints, two descents."""

import json
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvlib.operators import Dense
from curvlib.solvers import (
    MoreSorensen,
    RadiusState,
    RelativeRadius,
    Steihaug,
    Subproblem,
    TrustRegion,
    reduction_ratio,
)

ratios = st.one_of(st.floats(-10, 10), st.sampled_from([nan, inf, -inf, 0.25, 0.75]))
histories = st.lists(st.tuples(ratios, st.booleans(), st.one_of(st.none(), st.floats(0, 1e3))), max_size=30)


def radius_after(control, ratio, *, on_boundary=True, step_length=None):
    return control.update(control.start(), ratio, on_boundary=on_boundary, step_length=step_length).radius


def test_the_algorithm_of_nocedal_and_wright():
    control = TrustRegion(initial=2.0)
    assert [radius_after(control, ratio) for ratio in (0.24, 0.25, 0.75, 0.76)] == [0.5, 2.0, 2.0, 4.0]
    assert [radius_after(control, ratio, on_boundary=False) for ratio in (0.24, 0.25, 0.76)] == [0.5, 2.0, 2.0]


def test_fields():
    control = TrustRegion(initial=2.0, shrink=0.5, grow=3.0, low=0.1, high=0.5, floor=1.5, ceiling=5.0)
    assert [radius_after(control, ratio) for ratio in (0.09, 0.1, 0.5, 0.51)] == [1.5, 2.0, 2.0, 5.0]
    wide = TrustRegion(initial=2.0, shrink=0.5, grow=3.0)
    assert [radius_after(wide, ratio) for ratio in (0.0, 1.0)] == [1.0, 6.0]


@pytest.mark.parametrize("ratio", [nan, inf, -inf])
def test_a_ratio_that_is_not_finite_shrinks_and_is_rejected(ratio):
    control = TrustRegion(initial=2.0)
    state = control.update(control.start(), ratio, on_boundary=True)
    assert (state.radius, state.rejected) == (0.5, 1)
    assert not control.accept(ratio)


def test_a_short_bad_step_shrinks_from_its_own_length():
    control = TrustRegion(initial=100.0)
    assert radius_after(control, -1.0, on_boundary=False, step_length=2.0) == 0.5
    for silent in (None, 0.0, nan, inf, 1e9):
        assert radius_after(control, -1.0, step_length=silent) == 25.0
    assert radius_after(control, 0.9, step_length=2.0) == 200.0


def test_reject_below():
    control = TrustRegion(reject_below=0.1)
    assert [control.accept(ratio) for ratio in (0.1, 0.0999, nan, inf)] == [True, False, False, False]
    state = control.update(control.start(), 0.05, on_boundary=True)
    assert (state.step, state.rejected) == (1, 1)
    assert TrustRegion(reject_below=-inf).accept(-5.0)


@given(histories, st.floats(-1, 0.25))
def test_properties_of_any_history(history, reject_below):
    control = TrustRegion(initial=1.0, floor=1e-3, ceiling=1e3, reject_below=reject_below)
    state, rejected = control.start(), 0
    for ratio, on_boundary, length in history:
        following = control.update(state, ratio, on_boundary=on_boundary, step_length=length)
        assert 1e-3 <= following.radius <= 1e3
        if following.radius > state.radius:
            assert on_boundary
            assert ratio > 0.75
        # What is undone is never proposed again, but at the floor.
        if not control.accept(ratio):
            rejected += 1
            assert following.radius < state.radius or following.radius == 1e-3
            assert length is None or length == 0 or following.radius < length or following.radius == 1e-3
        state = following
    assert (state.step, state.rejected) == (len(history), rejected)
    assert RadiusState.from_state_dict(json.loads(json.dumps(state.state_dict()))) == state


def test_a_quadratic_is_reached_with_a_growing_radius():
    C, theta = torch.diag(torch.tensor([1.0, 10.0, 100.0])).double(), torch.full((3,), 50.0).double()
    control = TrustRegion(initial=0.1)
    state = control.start()
    for _ in range(25):
        answer = Steihaug().solve(Subproblem(operator=Dense(C), gradient=C @ theta, radius=state.radius))
        change = float(0.5 * (theta + answer.step) @ C @ (theta + answer.step) - 0.5 * theta @ C @ theta)
        ratio = reduction_ratio(change, answer.prediction.damped, value=float(theta @ C @ theta), dtype=torch.float64)
        state = control.update(state, ratio, on_boundary=answer.on_boundary, step_length=float(answer.step.norm()))
        theta = theta + answer.step
    assert float(theta.norm()) < 1e-3
    assert state.rejected == 0
    assert state.radius > 10.0


def test_rosenbrocks_valley_is_followed_from_an_indefinite_start():
    def h(x):
        return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    x, control = torch.tensor([0.0, 1.0], dtype=torch.float64), TrustRegion(initial=0.5)
    state, indefinite = control.start(), 0
    for _ in range(60):
        H = torch.autograd.functional.hessian(h, x)
        g = torch.autograd.functional.jacobian(h, x)
        indefinite += bool(torch.linalg.eigvalsh(H).min() < 0)
        answer = MoreSorensen().solve(Subproblem(operator=Dense(H), gradient=g, radius=state.radius))
        ratio = reduction_ratio(
            float(h(x + answer.step) - h(x)), answer.prediction.damped, value=float(h(x)), dtype=torch.float64
        )
        state = control.update(state, ratio, on_boundary=answer.on_boundary, step_length=float(answer.step.norm()))
        x = x + answer.step if control.accept(ratio) else x
    assert indefinite > 0
    torch.testing.assert_close(x, torch.ones(2, dtype=torch.float64), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "fields",
    [
        {"initial": 0.0},
        {"initial": inf},
        {"initial": nan},
        {"shrink": 0.0},
        {"shrink": 1.0},
        {"grow": 0.9},
        {"grow": inf},
        {"low": 0.8},
        {"floor": 2.0},
        {"ceiling": 0.5},
        {"reject_below": 0.3},
        {"reject_below": nan},
    ],
    ids=str,
)
def test_bad_values_are_refused(fields):
    with pytest.raises(ValueError, match="got"):
        TrustRegion(**fields)


@pytest.mark.parametrize("state", [{}, {"radius": 1.0, "step": 1}, {"radius": 1.0, "step": 1, "rejected": 0, "x": 1}])
def test_states_of_another_shape_are_refused(state):
    with pytest.raises(ValueError, match="radius state has the entries"):
        RadiusState.from_state_dict(state)


def test_a_relative_radius_is_a_multiple_of_the_length_of_the_parameters():
    control = TrustRegion(initial=RelativeRadius(3.0), floor=1e-3, ceiling=50.0)
    assert control.needs_parameter_length
    assert not TrustRegion().needs_parameter_length
    lengths = (2.0, 0.0, 1e-9, 1e9)
    assert [control.start(parameter_length=length).radius for length in lengths] == [6.0, 3.0, 1e-3, 50.0]
    for length in (None, nan, inf):
        with pytest.raises(ValueError, match="length of the parameters"):
            control.start(parameter_length=length)
