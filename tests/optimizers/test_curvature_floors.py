"""Floors of the damping that follow the mean curvature, beside directions that know products alone."""

import pytest
import torch
from torch import nn

from curvlib import GGN, Objective
from curvlib.approximations import Dense, Exact
from curvlib.optimizers import (
    BacktrackingLineSearch,
    FixedLength,
    ModelDescent,
    PreconditionedGradient,
    SecondOrderOptimizer,
    TruncatedNewton,
    hessian_free,
)
from curvlib.solvers import CG, AbsoluteFloor, DampedNewton, LevenbergMarquardt, RelativeFloor

DIRECTIONS = {
    "truncated newton": TruncatedNewton(warm_start=0.0),
    "damped newton": ModelDescent(curvature=Exact(GGN()), descent=DampedNewton(solver=CG())),
    "exact, by conjugate gradients": PreconditionedGradient(curvature=Exact(GGN()), solver=CG(), fraction=1.0),
    "a trace that is known": ModelDescent(curvature=Dense(GGN()), descent=DampedNewton()),
}


def with_diagonal_curvature():
    """A regression whose C = 2/N X^T X is diagonal, so that any vector of signs gives the trace."""
    X = torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64))
    model = nn.Linear(6, 1, bias=False).double()
    return Objective(model, nn.MSELoss()), (X, torch.ones(6, 1, dtype=torch.float64)), 2 / 6 * X.square()


def control(floor):
    return LevenbergMarquardt(initial=1.0, interval=1, floor=floor)


def compose(objective, direction, floor, rule=None):
    return SecondOrderOptimizer(
        objective, direction=direction, step_rule=rule or FixedLength(), damping=control(floor), seed=3
    )


@pytest.mark.parametrize("rule", [FixedLength(), BacktrackingLineSearch()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("name", DIRECTIONS)
def test_the_damping_keeps_to_the_scale_of_the_curvature(name, rule):
    objective, batch, C = with_diagonal_curvature()
    optimizer = compose(objective, DIRECTIONS[name], RelativeFloor(0.5), rule)
    floor = 0.5 * float(C.trace()) / 6
    assert floor > 2.0  # more than the damping gets to by itself
    for _ in range(2):
        assert optimizer.step(batch).accepted
        assert optimizer.damping == pytest.approx(floor, rel=1e-12)


def test_the_hessian_free_preset_takes_the_floor():
    objective, batch, C = with_diagonal_curvature()
    optimizer = hessian_free(objective, damping=control(RelativeFloor(0.5)))
    optimizer.step(batch)
    assert optimizer.damping == pytest.approx(0.5 * float(C.trace()) / 6, rel=1e-12)


def test_an_estimate_costs_a_jacobian_vector_product_and_draws_only_where_it_is_needed():
    work, draws = [], []
    for floor in (AbsoluteFloor(), RelativeFloor(1e-9)):
        objective, batch, _ = with_diagonal_curvature()
        optimizer = compose(objective, TruncatedNewton(), floor)
        before = optimizer.state_dict()["generator"]
        work.append(optimizer.step(batch).gradient_evaluations)
        draws.append(not torch.equal(before, optimizer.state_dict()["generator"]))
    assert draws == [False, True]
    assert work[1] - work[0] == pytest.approx(2 / 3)
