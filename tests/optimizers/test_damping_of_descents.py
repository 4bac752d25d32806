"""DampedNewton with another damping for each coordinate: the model that a step is judged by has it as well."""

import pytest
import torch
from optimizer_cases import linear_regression, small_network

from curvlib import GGN
from curvlib.approximations import Dense
from curvlib.operators import Dense as DenseOperator
from curvlib.optimizers import (
    FixedLength,
    FixedScaling,
    LayerDamping,
    ModelDescent,
    PreconditionedGradient,
    SecondOrderOptimizer,
)
from curvlib.solvers import (
    BlockwiseDamping,
    DampedNewton,
    DampedRatio,
    DeterminismCheck,
    Dogleg,
    LevenbergMarquardt,
    Subproblem,
    UndampedRatio,
    damping_structure,
)

DAMPING = 0.3


def factors(size):
    return torch.linspace(0.0, 50.0, size, dtype=torch.float64)


def brute_force(objective, batch, damping):
    """d = -(C + damping)^-1 g and M(d) - M(0), with and without the damping (D, D)."""
    evaluation = objective.at(batch)
    g = evaluation.gradient()
    C = Dense(GGN()).estimate(evaluation, torch.Generator()).to_dense()
    d = -torch.linalg.solve(C + damping, g)
    undamped = g @ d + 0.5 * d @ C @ d
    return d, float(undamped + 0.5 * d @ damping @ d), float(undamped)


def optimizer_of(objective, direction, ratio):
    return SecondOrderOptimizer(
        objective,
        direction=direction,
        step_rule=FixedLength(),
        damping=LevenbergMarquardt(initial=DAMPING, interval=1, reject_below=float("-inf")),
        ratio=ratio,
    )


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("problem", [linear_regression, small_network])
def test_prediction_and_ratio_are_those_of_the_damping_that_the_step_was_made_with(problem, checked, scaled):
    objective, batch = problem()
    f = factors(objective.layout.size)
    s = torch.linspace(0.5, 3.0, len(f), dtype=torch.float64)
    solver = BlockwiseDamping(factors=f)
    # |S d|^2 is what the damping weighs in scaled parameters
    step, damped, undamped = brute_force(objective, batch, DAMPING * torch.diag(f * s.square() if scaled else f))
    direction = ModelDescent(
        curvature=Dense(GGN()),
        descent=DampedNewton(solver=DeterminismCheck(solver=solver) if checked else solver),
        scaling=FixedScaling(s) if scaled else None,
    )
    for ratio, expected in ((DampedRatio(), damped), (UndampedRatio(), undamped)):
        objective, batch = problem()
        theta, before = objective.parameter_vector(), float(objective.at(batch).value)
        result = optimizer_of(objective, direction, ratio).step(batch)
        torch.testing.assert_close(objective.parameter_vector() - theta, step, rtol=1e-9, atol=1e-12)
        assert result.predicted == pytest.approx(expected, rel=1e-9)
        assert result.ratio == pytest.approx((float(objective.at(batch).value) - before) / expected, rel=1e-6)


def test_a_shortened_step_is_judged_by_the_same_damping():
    objective, batch = linear_regression()
    evaluation, f = objective.at(batch), factors(objective.layout.size)
    g = evaluation.gradient()
    A = Dense(GGN()).estimate(evaluation, torch.Generator()).to_dense() + DAMPING * torch.diag(f)
    d = -0.5 * torch.linalg.solve(A, g)
    optimizer = SecondOrderOptimizer(
        objective,
        direction=ModelDescent(curvature=Dense(GGN()), descent=DampedNewton(solver=BlockwiseDamping(factors=f))),
        step_rule=FixedLength(learning_rate=0.5),
        damping=LevenbergMarquardt(initial=DAMPING, interval=1),
    )
    assert optimizer.step(batch).predicted == pytest.approx(float(g @ d + 0.5 * d @ A @ d), rel=1e-9)


def test_the_same_step_and_ratio_as_by_layer_damping_in_a_preconditioned_gradient():
    results = []
    for by_layer in (True, False):
        objective, batch = small_network()
        solver = LayerDamping({"2": 20.0})
        if by_layer:
            direction = PreconditionedGradient(curvature=Dense(GGN()), solver=solver, fraction=1.0)
        else:
            descent = DampedNewton(solver=solver.bind(objective))
            direction = ModelDescent(curvature=Dense(GGN()), descent=descent)
        result = optimizer_of(objective, direction, DampedRatio()).step(batch)
        results.append((result.predicted, result.ratio))
    assert results[0] == pytest.approx(results[1], rel=1e-9)


def test_the_descent_itself_predicts_with_that_damping():
    C = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    g, f = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([3.0, 0.5], dtype=torch.float64)
    problem = Subproblem(operator=DenseOperator(C), gradient=g, damping=DAMPING)
    answer = DampedNewton(solver=BlockwiseDamping(factors=f)).solve(problem)
    A = C + DAMPING * torch.diag(f)
    torch.testing.assert_close(answer.step, -torch.linalg.solve(A, g))
    assert answer.predicted_reduction == pytest.approx(0.5 * float(g @ torch.linalg.solve(A, g)))


def test_a_check_of_products_keeps_the_structure_of_the_damping():
    like = DenseOperator(torch.eye(2, dtype=torch.float64))
    solver = DeterminismCheck(solver=BlockwiseDamping(factors=torch.tensor([1.0, 3.0])))
    torch.testing.assert_close(damping_structure(solver, like).diagonal(), torch.tensor([0.0, 2.0]).double())


def test_a_damping_by_layer_is_sent_to_the_direction_that_knows_the_layers():
    with pytest.raises(TypeError, match="LayerDamping, goes with PreconditionedGradient"):
        DampedNewton(solver=LayerDamping({"2": 20.0}))


def test_a_dogleg_whose_cauchy_point_would_have_another_damping_is_refused():
    descent = Dogleg(solver=BlockwiseDamping(factors=torch.tensor([1.0, 5.0], dtype=torch.float64)))
    C, g = DenseOperator(torch.eye(2, dtype=torch.float64)), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="damps coordinates differently: use DampedNewton"):
        descent.solve(Subproblem(operator=C, gradient=g, radius=1.0, damping=0.1))
    assert descent.solve(Subproblem(operator=C, gradient=g, radius=1.0)).on_boundary


@pytest.mark.parametrize("decay", [-0.9, 1.0, 1.5])
def test_a_decay_out_of_range_is_refused_by_the_direction(decay):
    with pytest.raises(ValueError, match="PreconditionedGradient needs 0 <= decay < 1"):
        PreconditionedGradient(curvature=Dense(GGN()), decay=decay, statistics_every=2)
