"""Truncated Newton steps with an indefinite curvature, and with a preconditioner that learns from the steps taken."""

import pytest
import torch
from optimizer_cases import least_squares, linear_regression

from curvlib import GGN, Hessian
from curvlib.approximations import LBFGS, Exact
from curvlib.optimizers import (
    BacktrackingLineSearch,
    FixedLength,
    ModelRescaling,
    NormConstraint,
    Preconditioner,
    SecondOrderOptimizer,
    StrongWolfe,
    TruncatedNewton,
)
from curvlib.solvers import ConstantDamping, ExponentialDamping, LevenbergMarquardt, damped_inverse


def truncated(objective, matrix, step_rule, damping, **direction):
    return SecondOrderOptimizer(
        objective,
        direction=TruncatedNewton(curvature=Exact(matrix), **direction),
        step_rule=step_rule,
        damping=damping,
    )


@pytest.mark.parametrize("rule", [FixedLength(), FixedLength(learning_rate=0.1), NormConstraint()], ids=repr)
@pytest.mark.parametrize(
    "control", [ConstantDamping(0.0), ExponentialDamping(initial=1.0, final=0.1, steps=9)], ids=repr
)
def test_a_length_that_nothing_chooses_is_refused(rule, control):
    objective, _ = linear_regression()
    with pytest.raises(ValueError, match=r"goes along -g .* finds no length .* BacktrackingLineSearch"):
        truncated(objective, Hessian(), rule, control)
    truncated(objective, GGN(), rule, control)


@pytest.mark.parametrize("rule", [BacktrackingLineSearch(), StrongWolfe(), ModelRescaling()], ids=repr)
def test_a_rule_that_finds_a_length_goes_with_a_constant_damping(rule):
    truncated(linear_regression()[0], Hessian(), rule, ConstantDamping(0.0))


def test_a_damping_that_rises_shortens_steps_along_negative_curvature():
    # h = (xy - 1)^2 has the Hessian [[0, -2], [-2, 0]] at 0, and curvature -2 along its gradient nearby
    objective, batch = least_squares(lambda x: (x[0] * x[1] - 1).reshape(1), [0.1, 0.1])
    optimizer = truncated(objective, Hessian(), FixedLength(), LevenbergMarquardt(initial=1e-3, interval=1))
    for _ in range(60):
        optimizer.step(batch)
    assert float(objective.at(batch).value) < 1e-6


def test_a_preconditioner_learns_from_the_steps_that_are_taken():
    objective, batch = linear_regression()
    seen = []

    def watched(operator, damping):
        seen.append(operator)
        return damped_inverse(operator, damping)

    optimizer = truncated(
        objective,
        GGN(),
        FixedLength(learning_rate=0.5),
        ConstantDamping(0.1),
        preconditioner=Preconditioner(curvature=LBFGS(), solver=watched),
    )
    points, gradients = [], []
    for _ in range(4):
        points.append(objective.parameter_vector())
        gradients.append(objective.at(batch).gradient())
        assert optimizer.step(batch).accepted
    for k in range(
        1, 4
    ):  # the secant equation B s = y of the last step; the update divides by s^T B s, no small number
        s, y = points[k] - points[k - 1], gradients[k] - gradients[k - 1]
        torch.testing.assert_close(seen[k] @ s, y, rtol=1e-8, atol=1e-10 * float(y.norm()))
