"""Steps of exactly nothing beside a gradient: no agreement with the model, and an error where a solve broke down."""

from dataclasses import dataclass
from math import isnan

import pytest
import torch
from optimizer_cases import assert_same, linear_regression

from curvlib import GGN, Hessian
from curvlib.approximations import Dense, Exact
from curvlib.operators import Dense as DenseOperator
from curvlib.operators import Diagonal
from curvlib.optimizers import (
    BacktrackingLineSearch,
    Direction,
    FixedLength,
    ModelDescent,
    Preconditioner,
    Proposal,
    SecondOrderOptimizer,
    StrongWolfe,
    TruncatedNewton,
    hessian_free,
    minimize,
    newton_trust_region,
)
from curvlib.optimizers.proposal import DirectionState
from curvlib.solvers import (
    CG,
    MINRES,
    ConstantDamping,
    DampedNewton,
    LevenbergMarquardt,
    SolveError,
    TrustRegion,
    damped_inverse,
)


def negative(operator, damping):
    """A preconditioner that is not positive definite."""
    return -1.0 * damped_inverse(operator, damping)


@dataclass(frozen=True, kw_only=True)
class Nothing(Direction):
    """Proposes 0."""

    radius: bool = False

    @property
    def has_radius(self):
        return self.radius

    def start(self, objective):
        return _NothingState()


class _NothingState(DirectionState):
    def propose(self, situation):
        operator = Exact(GGN()).estimate(situation.evaluation, situation.generator)
        return Proposal(step=torch.zeros_like(situation.gradient), operator=operator)

    def snapshot(self):
        return None

    def restore(self, snapshot):
        pass

    rejected = restore

    def accepted(self, step):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize(
    "rule", [FixedLength(), BacktrackingLineSearch(), StrongWolfe()], ids=lambda r: type(r).__name__
)
def test_a_step_of_nothing_does_not_count_as_agreement_and_the_damping_rises(rule):
    objective, batch = linear_regression()
    control = LevenbergMarquardt(initial=0.1, interval=1)
    optimizer = SecondOrderOptimizer(objective, direction=Nothing(), step_rule=rule, damping=control)
    result = optimizer.step(batch)
    assert not result.accepted
    assert isnan(result.ratio)
    assert optimizer.damping > 0.1
    assert not minimize(optimizer, batch, max_steps=30).converged


def test_a_step_of_nothing_shrinks_the_radius_by_its_factor():
    objective, batch = linear_regression()
    optimizer = SecondOrderOptimizer(
        objective, direction=Nothing(radius=True), step_rule=FixedLength(), radius=TrustRegion(initial=1.0, shrink=0.25)
    )
    result = optimizer.step(batch)
    assert not result.accepted
    assert isnan(result.ratio)
    assert optimizer.radius == 0.25


def test_a_step_of_nothing_changes_no_parameters_and_is_not_called_accepted():
    objective, batch = linear_regression()
    optimizer = SecondOrderOptimizer(
        objective, direction=Nothing(), step_rule=FixedLength(), damping=ConstantDamping(0.1)
    )
    assert not optimizer.step(batch).accepted
    assert not minimize(optimizer, batch, max_steps=30).converged


OPTIMIZERS = {
    "hessian-free": lambda q: hessian_free(q, preconditioner=Preconditioner(curvature=Dense(GGN()), solver=negative)),
    "trust region": lambda q: newton_trust_region(
        q, preconditioner=Preconditioner(curvature=Dense(GGN()), solver=negative)
    ),
    "damped Newton": lambda q: SecondOrderOptimizer(
        q,
        direction=ModelDescent(
            curvature=Dense(GGN()),
            descent=DampedNewton(solver=CG(preconditioner=Diagonal(-torch.ones(q.layout.size, dtype=torch.float64)))),
        ),
        step_rule=FixedLength(),
        damping=LevenbergMarquardt(initial=0.1, interval=1),
    ),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_solve_that_breaks_down_before_its_first_step_is_an_error(make):
    objective, batch = linear_regression()
    optimizer = make(objective)
    before, theta = optimizer.state_dict(), objective.parameter_vector()
    with pytest.raises(SolveError, match="preconditioner is positive definite"):
        optimizer.step(batch)
    assert_same(optimizer.state_dict(), before)
    assert torch.equal(objective.parameter_vector(), theta)


def test_a_warm_start_is_no_step_of_a_solve_that_broke_down():
    objective, batch = linear_regression()
    signs = iter([1.0, -1.0])
    optimizer = SecondOrderOptimizer(
        objective,
        direction=TruncatedNewton(
            cg=CG(max_iterations=1),
            preconditioner=Preconditioner(
                curvature=Dense(GGN()), solver=lambda C, d: next(signs) * damped_inverse(C, d)
            ),
        ),
        step_rule=FixedLength(),
        damping=ConstantDamping(0.1),
    )
    assert optimizer.step(batch).iterations == 1
    with pytest.raises(SolveError, match="preconditioner is positive definite"):
        optimizer.step(batch)


def test_a_preconditioner_that_may_be_indefinite_is_refused():
    for solver in (MINRES(), damped_inverse):
        with pytest.raises(ValueError, match="Preconditioner needs a positive definite"):
            Preconditioner(curvature=Dense(Hessian()), solver=solver)
    Preconditioner(curvature=Dense(GGN()), solver=MINRES())


class Absolute:
    """|C + damping I|^-1, which is positive definite for a C of any signs."""

    takes_indefinite = gives_descent = True

    def __call__(self, operator, damping):
        values, vectors = torch.linalg.eigh(operator.to_dense())
        return DenseOperator((vectors / (values + damping).abs()) @ vectors.T)


def test_a_preconditioner_of_absolute_values_may_be_of_a_hessian():
    objective, batch = linear_regression()
    optimizer = hessian_free(objective, preconditioner=Preconditioner(curvature=Dense(Hessian()), solver=Absolute()))
    assert optimizer.step(batch).accepted
