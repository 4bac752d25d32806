"""The preset hessian_free: its rules, ends of solves, warm starts and preconditioners."""

from math import inf

import pytest
import torch
from optimizer_cases import classification, linear_regression

from curvlib import GGN, Hessian
from curvlib.approximations import Dense, Exact, Identity
from curvlib.optimizers import (
    FixedLength,
    SecondOrderOptimizer,
    TruncatedNewton,
    hessian_free,
)
from curvlib.solvers import (
    CG,
    ConstantDamping,
    CustomDamping,
    DampingControl,
    DampingState,
    ExponentialDamping,
    LevenbergMarquardt,
    LinearDamping,
    ProgressTest,
    RelativeStart,
    ResidualTest,
    StartFloor,
    TighteningTest,
)


def test_the_hessian_free_preset_judges_by_the_undamped_model():
    objective, batch = linear_regression()
    optimizer = hessian_free(objective, damping=1.0)
    results = [optimizer.step(batch) for _ in range(3)]
    assert all(abs(result.ratio - 1) < 1e-6 for result in results)
    assert [result.damping for result in results] == [1.0, 0.5, 0.25]


def test_the_hessian_free_presets_rules():
    objective, _ = linear_regression()
    rules = {
        "stop": TighteningTest(epsilon=0.05, min_window=2, fraction=0.1, tightest=5e-4, power=0.25),
        "damping": LevenbergMarquardt(
            initial=RelativeStart(0.03), decrease=0.5, increase=2.0, interval=1, floor=StartFloor(1e-4)
        ),
    }
    # the compositions in words, which a checkpoint is held against
    assert hessian_free(objective, **rules).state_dict()["made_for"] == hessian_free(objective).state_dict()["made_for"]


def test_a_tightening_test_hears_how_far_the_damping_has_fallen():
    shares = []

    class Noting(TighteningTest):
        def at(self, damping_share):
            shares.append(damping_share)
            return super().at(damping_share)

    def train(steps, damping, state=None):
        optimizer = hessian_free(objective, stop=Noting(), damping=damping)
        if state is not None:
            optimizer.load_state_dict(state)
        results = [optimizer.step(batch) for _ in range(steps)]
        return [result.damping for result in results], optimizer.state_dict()

    objective, batch = linear_regression()
    dampings, state = train(3, 2.0)
    dampings += train(1, 2.0, state)[0]
    assert dampings == [2.0, 1.0, 0.5, 0.25]
    assert shares == [1.0, 0.5, 0.25, 0.125]
    train(2, LinearDamping(initial=0.0, final=0.1, steps=1))
    assert shares[-2:] == [1.0, 1.0]  # of nothing


class Halving(DampingControl):
    """A third party's control, which keeps no first damping."""

    def start(self, *, gradient_curvature=None):
        return DampingState(damping=2.0)

    def update(self, state, ratio, *, mean_curvature=None):
        return DampingState(damping=state.damping / 2, step=state.step + 1)


@pytest.mark.parametrize(
    "control",
    [
        ExponentialDamping(initial=2.0, final=2.0 / 4**5, steps=10),
        CustomDamping(lambda k: 2.0 / 2**k),
        Halving(),
        ConstantDamping(2.0),
    ],
    ids=lambda control: type(control).__name__,
)
def test_solves_tighten_with_every_control(control):
    epsilons = []

    class Noting(TighteningTest):
        def at(self, damping_share):
            epsilons.append((damping_share, super().at(damping_share).epsilon))
            return super().at(damping_share)

    objective, batch = linear_regression()
    optimizer = hessian_free(objective, stop=Noting(power=1.0, tightest=1e-3), damping=control)
    results = [optimizer.step(batch) for _ in range(3)]
    state = optimizer.state_dict()
    assert state["control"]["damping"]["first"] == 2.0
    resumed = hessian_free(objective, stop=Noting(power=1.0, tightest=1e-3), damping=control)
    resumed.load_state_dict(state)
    results += [resumed.step(batch) for _ in range(5)]
    shares = [result.damping / 2.0 for result in results]
    assert shares == pytest.approx([1.0] * 8 if isinstance(control, ConstantDamping) else [0.5**k for k in range(8)])
    assert [share for share, _ in epsilons] == pytest.approx(shares)
    assert [epsilon for _, epsilon in epsilons] == pytest.approx([max(1e-3, 0.05 * share) for share in shares])


def test_a_state_without_the_first_damping_is_refused():
    objective, batch = linear_regression()
    optimizer = hessian_free(objective, damping=ConstantDamping(0.1))
    optimizer.step(batch)
    state = optimizer.state_dict()
    state["control"]["damping"]["first"] = None
    with pytest.raises(ValueError, match="no first damping"):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict()["control"]["damping"] == {"damping": 0.1, "step": 1, "rejected": 0, "first": 0.1}


def test_solves_are_longer_where_the_damping_has_fallen():
    falling = LevenbergMarquardt(initial=1.0, decrease=1e-3, low=-inf, high=-inf, interval=1, reject_below=-inf)
    iterations = []
    for stop in (TighteningTest(power=1.0), ProgressTest(epsilon=0.05, min_window=2)):
        objective, batch = classification(dtype=torch.float64)
        optimizer = hessian_free(objective, stop=stop, damping=falling)
        iterations.append([optimizer.step(batch).iterations for _ in range(2)])
    assert iterations[0][0] == iterations[1][0]
    assert iterations[0][1] > 2 * iterations[1][1]


@pytest.mark.parametrize("structural", [None, Identity()])
def test_the_prediction_is_that_of_the_dense_model(structural):
    """By the recurrence of the solver, or by a quadratic form where the damping has a structure."""
    objective, batch = classification(dtype=torch.float64)
    damping = ConstantDamping(0.01)
    optimizer = hessian_free(objective, damping=damping, structural_damping=structural, structural_weight=2.0)
    for _ in range(3):  # the first solve has no warm start
        evaluation, theta = objective.at(batch), objective.parameter_vector()
        g, C = evaluation.gradient(), Dense(GGN()).estimate(evaluation).to_dense()
        result = optimizer.step(batch)
        step = objective.parameter_vector() - theta
        assert result.learning_rate == 1.0
        assert result.predicted == pytest.approx(float(g @ step + 0.5 * step @ C @ step), rel=1e-9)


@pytest.mark.parametrize("structural", [None, Identity()])
def test_no_product_is_spent_on_what_the_solver_knows(structural):
    objective, batch = classification(dtype=torch.float64)
    optimizer = hessian_free(objective, damping=ConstantDamping(1.0), structural_damping=structural)
    for warm in (0, 1):
        result = optimizer.step(batch)
        # A form of C d is two thirds; a gradient, a product for each iteration and for the residual of the start,
        # and the values of the last iterate and of the one before, which is no better.
        form = 0.0 if structural is None else 2 / 3
        assert result.gradient_evaluations == pytest.approx(1 + 4 / 3 * (result.iterations + warm) + 2 / 3 + form)


def test_warm_starts_shorten_the_solve():
    iterations = {}
    for warm_start in (0.0, 1.0):
        objective, batch = linear_regression()
        cg = CG(max_iterations=50, stop=ResidualTest(relative=1e-6))
        direction = TruncatedNewton(cg=cg, warm_start=warm_start)
        optimizer = SecondOrderOptimizer(
            objective,
            direction=direction,
            step_rule=FixedLength(learning_rate=1e-6),
            damping=ConstantDamping(1e-2),
        )
        iterations[warm_start] = [optimizer.step(batch).iterations for _ in range(2)]
    assert iterations[0.0][1] > 0
    assert iterations[1.0][1] < iterations[0.0][1]


def test_a_preconditioner_shortens_the_solve():
    iterations = {}
    for preconditioner in (None, Dense(GGN())):
        objective, batch = classification()
        optimizer = hessian_free(objective, preconditioner=preconditioner, damping=ConstantDamping(1e-3))
        iterations[preconditioner is None] = optimizer.step(batch).iterations
    assert iterations[False] < iterations[True]


def test_hessian_free_survives_negative_curvature():
    objective, batch = classification()
    optimizer = hessian_free(objective, curvature=Exact(Hessian()), damping=1e-4)
    losses = [optimizer.step(batch).loss for _ in range(5)]
    assert losses[-1] < losses[0]
