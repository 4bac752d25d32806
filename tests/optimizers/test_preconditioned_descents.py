"""Preconditioned steps in trust regions of the optimizer: their lengths, and what the preconditioners are made of."""

from dataclasses import dataclass
from math import inf

import pytest
import torch
from optimizer_cases import classification, linear_regression, small_network
from preconditioned_cases import ELLIPSOID, TIGHT, WITH_BLOCKS, length_in, trust
from torch import nn

from curvlib import GGN, Objective
from curvlib.approximations import KFAC, LBFGS, Dense, Exact
from curvlib.operators import Dense as DenseOperator
from curvlib.operators import Identity as IdentityOperator
from curvlib.operators import MatrixFree
from curvlib.optimizers import (
    FixedLength,
    ModelDescent,
    Preconditioner,
    SecondOrderOptimizer,
    TruncatedNewton,
    newton_trust_region,
)
from curvlib.solvers import (
    AbsoluteFloor,
    ConstantDamping,
    EuclideanNorm,
    PreconditionerNorm,
    RelativeFloor,
    RelativeRadius,
    ResidualTest,
    SolveError,
    Steihaug,
    TrustRegion,
    TwoDimensionalSubspace,
    damped_inverse,
)

strategies = pytest.mark.parametrize("name", WITH_BLOCKS)


def fixed_preconditioner(size):
    W = torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    P = W @ W.T / size + 0.1 * torch.eye(size, dtype=torch.float64)
    return DenseOperator(P), torch.linalg.inv(P)


def in_fixed_norm(objective, radius, rule=None):
    P, M = fixed_preconditioner(objective.layout.size)
    descent = Steihaug(preconditioner=P, region=PreconditionerNorm(), stop=ResidualTest(relative=1e-8))
    optimizer = SecondOrderOptimizer(
        objective,
        direction=ModelDescent(curvature=Dense(GGN()), descent=descent),
        step_rule=rule or FixedLength(),
        radius=radius,
    )
    return optimizer, M


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_no_step_leaves_the_region_in_its_own_norm():
    objective, batch = small_network()
    optimizer, M = in_fixed_norm(objective, TrustRegion(initial=0.05))
    for _ in range(6):
        before = objective.parameter_vector()
        result = optimizer.step(batch)
        moved = objective.parameter_vector() - before
        assert length_in(M, moved) <= result.radius * (1 + 1e-7)
        assert result.step_norm == pytest.approx(float(moved.norm()), rel=1e-6)
    assert optimizer.radius > 0.05  # it grew, so that steps were found to be on the boundary


@dataclass(frozen=True, kw_only=True)
class Disappointed(TrustRegion):
    """Finds every step bad, and keeps it."""

    def update(self, state, ratio, **options):
        return super().update(state, -1.0, **options)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_bad_step_inside_shrinks_the_radius_from_its_length_in_that_norm(rate):
    objective, batch = small_network()
    optimizer, M = in_fixed_norm(
        objective, Disappointed(initial=1e6, reject_below=-inf), FixedLength(learning_rate=rate)
    )
    before = objective.parameter_vector()
    assert optimizer.step(batch).accepted
    length = length_in(M, objective.parameter_vector() - before)
    assert optimizer.radius == pytest.approx(0.25 * length, rel=1e-6)


def test_a_first_radius_relative_to_an_unknown_length_is_refused():
    objective, _ = small_network()
    with pytest.raises(ValueError, match="norm that is known along its own steps alone: give the first radius"):
        in_fixed_norm(objective, TrustRegion(initial=RelativeRadius()))


# --- preconditioners that follow the curvature -----------------------------------------------------------------------


def watch(optimizer):
    """The preconditioners that the optimizer is going to make, as they come."""
    made = []
    state = optimizer._direction._preconditioner
    inverse = state.inverse

    def watched(situation):
        made.append(inverse(situation))
        return made[-1]

    state.inverse = watched
    return made


@strategies
def test_each_step_keeps_to_the_ellipsoid_of_its_own_preconditioner(name):
    objective, batch = small_network()
    optimizer = trust(objective, WITH_BLOCKS[name])
    made = watch(optimizer)
    reached = 0
    for _ in range(6):
        before = objective.parameter_vector()
        result = optimizer.step(batch)
        P = made[-1][1].to_dense()
        length = length_in(torch.linalg.inv(P), objective.parameter_vector() - before)
        assert length <= result.radius * (1 + 1e-6)
        reached += length >= result.radius * (1 - 1e-6)
    assert reached > 0
    assert len(made) == 6


@strategies
@pytest.mark.parametrize(
    "descent", [TIGHT, ELLIPSOID, TwoDimensionalSubspace(steihaug=TIGHT)], ids=["ball", "ellipsoid", "plane"]
)
def test_a_step_inside_is_that_without_a_preconditioner(name, descent):
    damping = ConstantDamping(0.1)
    steps = []
    for preconditioner, by in ((None, TIGHT), (WITH_BLOCKS[name], descent)):
        objective, batch = small_network()
        optimizer = trust(objective, preconditioner, descent=by, radius=TrustRegion(initial=1e4), damping=damping)
        before = objective.parameter_vector()
        steps.append((optimizer.step(batch), objective.parameter_vector() - before))
    (plain, step), (fast, other) = steps
    torch.testing.assert_close(other, step, rtol=1e-6, atol=1e-8)
    assert plain.iterations != fast.iterations  # it does take part


def test_the_curvature_itself_solves_in_one_iteration():
    objective, batch = linear_regression()
    floor = AbsoluteFloor(0.0)  # the l2 term makes it definite
    exact = Preconditioner(curvature=Dense(GGN()), floor=floor)
    optimizer = trust(objective, exact, radius=TrustRegion(initial=100.0))
    result = optimizer.step(batch)
    assert result.iterations == 1
    assert abs(result.ratio - 1) < 1e-8
    assert objective.at(batch).gradient().norm() < 1e-9


def test_the_preset_takes_it_and_needs_fewer_iterations():
    iterations = {}
    for name, preconditioner in (("none", None), ("kfac", KFAC(GGN()))):
        objective, batch = classification(dtype=torch.float64)
        optimizer = newton_trust_region(objective, preconditioner=preconditioner, curvature=Exact(GGN()))
        iterations[name] = sum(optimizer.step(batch).iterations for _ in range(12))
        assert float(objective.value(batch)) < 0.3
    assert iterations["kfac"] < 0.6 * iterations["none"]


def test_the_region_of_the_preset_is_that_of_its_preconditioner():
    objective, _ = small_network()
    for options, region in (
        ({}, EuclideanNorm()),
        ({"preconditioner": KFAC(GGN())}, PreconditionerNorm()),
        ({"preconditioner": KFAC(GGN()), "descent": Steihaug()}, EuclideanNorm()),
    ):
        assert newton_trust_region(objective, **options)._direction._config.descent.region == region


def test_statistics_come_from_the_curvature_batch():
    objective, (x, y) = small_network()
    seen = []

    class Watching(KFAC):
        def statistics(self, evaluation, generator=None):
            seen.append(evaluation.examples)
            return super().statistics(evaluation, generator)

    for preconditioner in (Watching(GGN()), Preconditioner(curvature=Watching(GGN()))):
        optimizer = trust(objective, preconditioner, fraction=0.5)
        optimizer.step((x, y), curvature_batch=(x[:7], y[:7]))
        optimizer.step((x, y))
    assert seen == [7, 20, 7, 40]


def test_l_bfgs_learns_from_each_step_as_a_preconditioner():
    objective, batch = linear_regression()
    optimizer = trust(objective, Preconditioner(curvature=LBFGS(memory=3)), radius=TrustRegion(initial=0.05))
    made = watch(optimizer)
    for _ in range(3):
        before, gradient = objective.parameter_vector(), objective.at(batch).gradient()
        assert optimizer.step(batch).accepted
        s, y = objective.parameter_vector() - before, objective.at(batch).gradient() - gradient
        optimizer.step(batch)
        torch.testing.assert_close(made[-1][0] @ s, y, rtol=1e-8, atol=1e-10)  # the secant equation


# --- the damping of the preconditioner -------------------------------------------------------------------------------


class Noting:
    """A solver that notes what it is asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, operator, damping):
        self.asked.append((operator, damping))
        return damped_inverse(operator, damping)


def noted(approximation=None, damping=None, steps=1, **options):
    """The (operator, damping) that P was made of in some steps of a trust region."""
    objective, batch = small_network()
    solver = Noting()
    preconditioner = Preconditioner(curvature=approximation or KFAC(GGN()), solver=solver, **options)
    optimizer = trust(objective, preconditioner, damping=damping)
    for _ in range(steps):
        optimizer.step(batch)
    return solver.asked


def mean_of(operator):
    return float(operator.trace()) / operator.size


def test_without_a_floor_of_its_own_a_hundredth_of_the_mean_curvature():
    (operator, damping), *_ = noted()
    assert damping == 0.01 * mean_of(operator) > 0
    objective, batch = small_network()
    optimizer = trust(objective, KFAC(GGN()))
    made = watch(optimizer)
    optimizer.step(batch)
    operator, P = made[0]
    expected = damped_inverse(operator, 0.01 * mean_of(operator)).to_dense()
    torch.testing.assert_close(P.to_dense(), expected, rtol=1e-12, atol=0)


def test_the_floor_and_the_damping_whichever_is_more():
    (operator, damping), *_ = noted(floor=RelativeFloor(0.5))
    assert damping == 0.5 * mean_of(operator)
    assert noted(floor=AbsoluteFloor(0.125))[0][1] == 0.125
    assert noted(floor=AbsoluteFloor(0.125), damping=ConstantDamping(0.25))[0][1] == 0.25
    assert noted(floor=AbsoluteFloor(0.0))[0][1] == 0.0


def test_in_truncated_newton_there_is_none_but_what_is_asked_for():
    for floor, expected in ((None, 0.05), (AbsoluteFloor(0.5), 0.5)):
        objective, batch = small_network()
        solver = Noting()
        direction = TruncatedNewton(preconditioner=Preconditioner(curvature=KFAC(GGN()), solver=solver, floor=floor))
        optimizer = SecondOrderOptimizer(
            objective, direction=direction, step_rule=FixedLength(), damping=ConstantDamping(0.05)
        )
        optimizer.step(batch)
        assert solver.asked[0][1] == expected


def test_inverses_are_made_as_often_as_asked_where_the_damping_is_zero():
    assert len(noted(steps=9)) == 9
    assert len(noted(steps=9, inverse_every=3)) == 5  # the first three, then steps number 3 and 6


def test_a_singular_approximation_is_no_obstacle():
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64)
    objective, batch = Objective(nn.Linear(6, 4).double(), nn.CrossEntropyLoss()), (x, torch.arange(5) % 4)
    result = trust(objective, Dense(GGN())).step(batch)
    assert result.accepted
    singular = Preconditioner(curvature=Dense(GGN()), floor=AbsoluteFloor(0.0))
    with pytest.raises(SolveError, match=r"positive definite|singular"):
        trust(objective, singular).step(batch)


def test_the_floor_of_products_alone_takes_one_product_and_not_d():
    columns = []

    class Counted(Exact):
        def estimate(self, evaluation, generator=None):
            inner = super().estimate(evaluation, generator)

            def matmat(V):
                columns.append(V.shape[1])
                return inner @ V

            return MatrixFree(matmat, inner.size, inner.dtype, inner.device)

    asked = []

    def solver(operator, damping):
        asked.append((sum(columns), damping))
        return IdentityOperator(operator.size, operator.dtype)

    objective, batch = small_network()
    preconditioner = Preconditioner(curvature=Counted(GGN()), solver=solver, floor=RelativeFloor(0.1))
    exact = mean_of(Dense(GGN()).estimate(objective.at(batch)))
    trust(objective, preconditioner).step(batch)
    (products, damping), *_ = asked
    assert products == 1
    # An unbiased estimate from one vector of signs, of a matrix of rank 2 or 3 above the l2 term.
    assert 0.1 < damping / (0.1 * exact) < 10
