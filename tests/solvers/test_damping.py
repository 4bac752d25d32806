"""Damping controls: what each field does, exact quadratics, failures of the ratio, checkpoints."""

import json
from math import inf, nan

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from curvlib.operators import Dense
from curvlib.solvers import (
    AbsoluteFloor,
    ConstantDamping,
    DampingState,
    LevenbergMarquardt,
    RelativeFloor,
    RelativeStart,
    StartFloor,
    reduction_ratio,
)
from curvlib.solvers.damping_scale import checked_damping
from curvlib.solvers.quadratic_model import QuadraticModel
from curvlib.solvers.reduction import DampedRatio, UndampedRatio

numbers = st.floats(1e-3, 1e3)


def control(**fields):
    return LevenbergMarquardt(**{"initial": 1.0, "decrease": 0.5, "increase": 4.0, "interval": 1, **fields})


def damping_after(control, *ratios, **options):
    state = control.start()
    for ratio in ratios:
        state = control.update(state, ratio, **options)
    return state.damping


# --- exact quadratics ------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.integers(2, 8), st.sampled_from([1, 3]))
@settings(max_examples=25)
def test_on_an_exact_quadratic_the_ratio_is_one_and_the_damping_falls(seed, size, interval):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    C, theta = root @ root.T, torch.randn(size, generator=generator, dtype=torch.float64)
    marquardt = LevenbergMarquardt(initial=1e3, decrease=0.5, increase=2.0, interval=interval)
    state, dampings, values = marquardt.start(), [], []
    for _ in range(12):
        value = 0.5 * theta @ C @ theta
        model = QuadraticModel(value=value, gradient=C @ theta, curvature=Dense(C), damping=state.damping)
        step = -torch.linalg.solve(C + state.damping * torch.eye(size, dtype=C.dtype), C @ theta)
        actual = float(0.5 * (theta + step) @ C @ (theta + step) - value)
        ratio = UndampedRatio().ratio(actual, model.predict(step), value=float(value), dtype=torch.float64)
        assert ratio == pytest.approx(1.0, rel=1e-6)
        assert DampedRatio().ratio(actual, model.predict(step), value=float(value), dtype=torch.float64) >= 1.0 - 1e-6
        assert marquardt.accept(ratio)
        dampings.append(state.damping)
        values.append(float(value))
        state, theta = marquardt.update(state, ratio), theta + step
    assert dampings == [1e3 * 0.5 ** (i // interval) for i in range(12)]
    assert values == sorted(values, reverse=True)
    assert (state.step, state.rejected) == (12, 0)


# --- Levenberg-Marquardt ---------------------------------------------------------------------------------------------


@given(numbers, st.floats(0.1, 0.99), st.floats(1.01, 10.0))
@settings(max_examples=30)
def test_factors(initial, decrease, increase):
    marquardt = control(initial=initial, decrease=decrease, increase=increase)
    assert damping_after(marquardt) == initial
    assert damping_after(marquardt, 0.9) == pytest.approx(initial * decrease)
    assert damping_after(marquardt, 0.5) == initial
    assert damping_after(marquardt, 0.1) == pytest.approx(initial * increase)


@pytest.mark.parametrize("ratio", [nan, inf, -inf, -0.1, -1e300])
@pytest.mark.parametrize("reject_below", [0.0, -inf])
def test_failures_raise_the_damping(ratio, reject_below):
    assert damping_after(control(reject_below=reject_below), ratio) == 4.0


def test_low_and_high():
    marquardt = control(low=0.4, high=0.6)
    assert [damping_after(marquardt, ratio) for ratio in (0.39, 0.4, 0.6, 0.61)] == [4.0, 1.0, 1.0, 0.5]


def test_interval():
    state, seen = control(interval=3).start(), []
    for _ in range(7):
        state = control(interval=3).update(state, 0.9)
        seen.append(state.damping)
    assert seen == [1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_a_rejected_step_raises_the_damping_at_once_and_is_counted():
    marquardt = control(interval=5, reject_below=0.1)
    accepted, rejected = (marquardt.update(marquardt.start(), ratio) for ratio in (0.11, 0.09))
    assert (accepted.damping, accepted.rejected) == (1.0, 0)
    assert (rejected.damping, rejected.rejected) == (4.0, 1)
    # A threshold above `low` must not lower or keep the damping of a step that is undone.
    assert damping_after(control(reject_below=0.8), 0.79) == 4.0


def test_reject_below():
    marquardt = control(reject_below=0.1)
    assert [marquardt.accept(ratio) for ratio in (0.1, 0.0999, -inf, nan, None)] == [True, False, False, False, True]
    never = control(reject_below=-inf)
    assert [never.accept(ratio) for ratio in (-5.0, -inf, nan)] == [True, True, False]


def test_needs_ratio_tells_when_the_objective_must_be_evaluated():
    marquardt = control(interval=3, reject_below=-inf)
    state, needed = marquardt.start(), []
    for _ in range(6):
        needed.append(marquardt.needs_ratio(state))
        state = marquardt.update(state, 0.9 if needed[-1] else None)
    assert needed == [False, False, True, False, False, True]
    assert state.damping == 0.25
    assert control(interval=3, reject_below=0.0).needs_ratio(marquardt.start())
    with pytest.raises(ValueError, match="needs the reduction ratio"):
        control().update(control().start(), None)


def test_floor_and_ceiling():
    assert damping_after(control(floor=AbsoluteFloor(0.3)), 0.9, 0.9, 0.9) == 0.3
    assert damping_after(control(ceiling=10.0), 0.1, 0.1, 0.1) == 10.0
    assert damping_after(control(ceiling=10.0, floor=RelativeFloor(1.0)), 0.1, mean_curvature=20.0) == 20.0
    assert damping_after(control(), *[nan] * 2000) == 1e12


def test_relative_floor_follows_the_curvature():
    marquardt = control(floor=RelativeFloor(0.01))
    ratios = [0.9] * 20
    assert damping_after(marquardt, *ratios, mean_curvature=5.0) == pytest.approx(0.05)
    assert damping_after(marquardt, *ratios, mean_curvature=5e-3) == pytest.approx(5e-5)
    assert damping_after(marquardt, 0.5, mean_curvature=1e4) == pytest.approx(100.0)
    assert damping_after(marquardt, 0.9, mean_curvature=-3.0) == 0.5
    for unknown in (None, nan, inf):
        with pytest.raises(ValueError, match="RelativeFloor needs a finite mean curvature"):
            marquardt.update(marquardt.start(), 0.9, mean_curvature=unknown)


def test_start_floor_is_a_part_of_the_first_damping():
    relative = control(initial=RelativeStart(0.25), floor=StartFloor(0.01))
    state = relative.start(gradient_curvature=8.0)
    for _ in range(3):
        state = relative.update(state, 0.9)
    assert state.damping == 0.25  # of 2.0: not there yet
    for _ in range(20):
        state = relative.update(state, 0.9)
    assert state.damping == pytest.approx(0.02)
    assert relative.update(state, 0.1).damping == pytest.approx(0.08)  # one bad step is felt at once
    assert damping_after(control(initial=3.0, floor=StartFloor(1.0)), *[0.9] * 5) == 3.0
    with pytest.raises(ValueError, match="StartFloor needs the first damping"):
        relative.update(DampingState(damping=1.0), 0.9)
    with pytest.raises(ValueError, match=r"at most 1, got 1\.5"):
        StartFloor(1.5)


def test_published_settings():
    kfac = LevenbergMarquardt.martens_grosse()
    assert (kfac.initial, kfac.interval, kfac.low, kfac.high, kfac.reject_below) == (150.0, 5, 0.25, 0.75, -inf)
    assert damping_after(kfac, *[0.9] * 5) == pytest.approx(150.0 * 0.95**5)
    assert damping_after(kfac, *[0.1] * 5) == pytest.approx(150.0 / 0.95**5)
    assert damping_after(LevenbergMarquardt.martens_grosse(initial=2.0, interval=2), 0.9, 0.9) == pytest.approx(
        2 * 0.95**2
    )
    free = LevenbergMarquardt.martens(initial=3.0)
    assert damping_after(free, 0.8) == pytest.approx(2.0)
    assert damping_after(free, 0.2) == pytest.approx(4.5)
    assert not free.accept(-1e-9)


# --- constant damping, states ----------------------------------------------------------------------------------------


def test_constant_damping():
    constant = ConstantDamping(0.3)
    assert damping_after(constant, nan, 0.9, None, -5.0) == 0.3
    assert constant.accept(nan)
    assert not constant.needs_ratio(constant.start())
    assert constant.update(constant.start(), None) == DampingState(damping=0.3, step=1, first=0.3)


@given(st.lists(st.sampled_from([0.9, 0.5, 0.1, -1.0, nan]), max_size=12), st.integers(0, 12), st.integers(1, 4))
@settings(max_examples=40)
def test_a_saved_state_goes_on_as_if_nothing_had_happened(ratios, cut, interval):
    marquardt = control(interval=interval, floor=StartFloor(0.1))
    state = whole = marquardt.start()
    for ratio in ratios:
        whole = marquardt.update(whole, ratio)
    for number, ratio in enumerate(ratios):
        if number == cut:
            state = DampingState.from_state_dict(json.loads(json.dumps(state.state_dict())))
        state = marquardt.update(state, ratio)
    assert state == whole
    assert whole.rejected == sum(not ratio >= 0 for ratio in ratios)


def test_states_refuse_unknown_entries():
    with pytest.raises(ValueError, match="damping', 'first', 'rejected', 'step"):
        DampingState.from_state_dict({"damping": 1.0, "step": 0})
    with pytest.raises(ValueError, match="damping"):
        DampingState(damping=-1.0)


# --- the ratio -------------------------------------------------------------------------------------------------------


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_ratio_is_the_quotient(actual, fall):
    assert reduction_ratio(actual, -fall) == actual / -fall


@pytest.mark.parametrize(
    ("actual", "predicted", "expected"),
    [(-1.0, 0.5, 0.0), (1.0, 0.5, -inf), (0.0, 0.5, -inf), (-1.0, 0.0, 0.0), (1.0, 0.0, -inf), (0.0, 0.0, 1.0)],
)
def test_a_model_that_predicts_no_reduction(actual, predicted, expected):
    assert reduction_ratio(actual, predicted) == expected
    assert control().accept(expected) is (actual < 0 or predicted == actual == 0)
    assert expected == 1.0 or damping_after(control(), expected) == 4.0


@pytest.mark.parametrize(("actual", "predicted"), [(nan, -1.0), (inf, -1.0), (-inf, -1.0), (-1.0, nan), (-1.0, -inf)])
def test_changes_that_are_not_finite(actual, predicted):
    assert reduction_ratio(actual, predicted) != reduction_ratio(actual, predicted)  # NaN


@given(st.floats(-7, 7), st.floats(-7, 7), st.floats(1e-6, 1e6), st.sampled_from([torch.float32, torch.float64]))
def test_differences_at_rounding_level_speak_neither_way(actual, predicted, value, dtype):
    ulp = torch.finfo(dtype).eps * value
    assert reduction_ratio(actual * ulp, predicted * ulp, value=-value, dtype=dtype) == 1.0
    assume(predicted < -1.0)
    assert reduction_ratio(100 * ulp, predicted * ulp, value=value, dtype=dtype) < 0
    assert reduction_ratio(actual * ulp, predicted * ulp, value=0.0, dtype=dtype) == pytest.approx(actual / predicted)


def test_ratio_takes_scalar_tensors():
    assert reduction_ratio(torch.tensor(-1.0), torch.tensor(-2.0), value=torch.tensor(3.0)) == 0.5


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1e-12, nan, inf, -inf])
@pytest.mark.parametrize(
    "make",
    [
        checked_damping,
        ConstantDamping,
        AbsoluteFloor,
        RelativeFloor,
        StartFloor,
        lambda value: control(initial=value),
        lambda value: DampingState(damping=value),
        lambda value: DampingState(damping=1.0, first=value),
    ],
)
def test_negative_or_infinite_damping_is_refused(make, bad):
    with pytest.raises(ValueError, match=r"must be a finite number >= 0, got"):
        make(bad)


@pytest.mark.parametrize("bad", [None, "1", True, torch.ones(1)])
def test_damping_of_another_type_is_refused(bad):
    with pytest.raises(TypeError, match="must be a number"):
        checked_damping(bad)


@pytest.mark.parametrize(
    "fields",
    [
        {"ceiling": 0.5},
        {"floor": AbsoluteFloor(2.0)},
        {"initial": RelativeStart(), "floor": AbsoluteFloor(2.0), "ceiling": 1.0},
    ],
    ids=["above the ceiling", "below the floor", "floor above the ceiling"],
)
def test_a_first_damping_outside_of_floor_and_ceiling_is_refused(fields):
    with pytest.raises(ValueError, match="needs floor <= initial <= ceiling, got"):
        control(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"decrease": 0.0},
        {"decrease": 1.5},
        {"increase": 0.9},
        {"increase": inf},
        {"low": 0.8},
        {"interval": 0},
        {"interval": 1.5},
        {"ceiling": 0.0},
        {"ceiling": nan},
        {"reject_below": nan},
    ],
)
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=r"LevenbergMarquardt.*got"):
        control(**fields)


def test_relative_start_follows_the_scale_of_the_curvature():
    marquardt = control(initial=RelativeStart(0.25))
    assert marquardt.needs_gradient_curvature
    assert not control().needs_gradient_curvature
    assert marquardt.start(gradient_curvature=8.0).damping == 2.0
    for floor in (AbsoluteFloor(), StartFloor(1.0), RelativeFloor()):
        state = control(initial=RelativeStart(0.25), ceiling=1.5, floor=floor).start(gradient_curvature=8.0)
        assert state.damping == state.first == 1.5
    state = control(initial=RelativeStart(0.25), floor=AbsoluteFloor(3.0)).start(gradient_curvature=8.0)
    assert state.damping == state.first == 3.0
    assert control(initial=3.0).start(gradient_curvature=8.0).damping == 3.0
    for bad in (None, 0.0, -1.0, nan, inf):
        with pytest.raises(ValueError, match="positive curvature along the gradient"):
            marquardt.start(gradient_curvature=bad)
    with pytest.raises(ValueError, match="greater than 0"):
        RelativeStart(0.0)
