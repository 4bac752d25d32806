"""Step rules that choose a length: the strong Wolfe search against SciPy's, and the norm constraint."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_cases import least_squares, linear_regression, rosenbrock, small_network
from scipy.optimize import line_search
from torch import nn

from curvlib import GGN, Fisher, Hessian, Objective
from curvlib.approximations import KFAC, Dense, Exact, Identity
from curvlib.optimizers import (
    BacktrackingLineSearch,
    FixedLength,
    ModelDescent,
    NormConstraint,
    PreconditionedGradient,
    SecondOrderOptimizer,
    StrongWolfe,
    TruncatedNewton,
)
from curvlib.solvers import ConstantDamping, DampedNewton, LevenbergMarquardt, damped_inverse


class Stretched:
    """A solver whose steps are those of damped_inverse times a factor."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, operator, damping):
        return self.factor * damped_inverse(operator, damping)


def searching(objective, factor=1.0, rule=None, damping=None):
    return SecondOrderOptimizer(
        objective,
        direction=PreconditionedGradient(curvature=Dense(GGN()), solver=Stretched(factor), fraction=1.0),
        step_rule=rule or StrongWolfe(),
        damping=damping or ConstantDamping(0.1),
    )


def value_and_gradient(objective, batch):
    """Two functions of NumPy vectors, by plain PyTorch on a model of its own."""
    model, loss = objective.model, nn.functional.cross_entropy

    def evaluate(x):
        parts = objective.layout.to_dict(torch.as_tensor(x))
        leaves = {name: part.clone().requires_grad_() for name, part in parts.items()}
        h = loss(torch.func.functional_call(model, leaves, (batch[0],)), batch[1])
        h = h + 0.5 * objective.l2 * sum(leaf.square().sum() for leaf in leaves.values())
        return h.item(), torch.cat([g.reshape(-1) for g in torch.autograd.grad(h, list(leaves.values()))]).numpy()

    return (lambda x: evaluate(x)[0]), (lambda x: evaluate(x)[1])


# --- strong Wolfe ----------------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(
    scale=st.sampled_from([0.5, 3.0, 10.0]),
    factor=st.sampled_from([0.01, 0.1, 1.0, 5.0, 100.0]),
    flatness=st.sampled_from([0.1, 0.9]),
)
def test_the_step_meets_both_conditions_and_is_that_of_scipy(scale, factor, flatness):
    objective, batch = small_network()
    theta = scale * objective.parameter_vector()
    objective.layout.write(objective.parameters, theta)
    f, gradient = value_and_gradient(objective, batch)
    evaluation = objective.at(batch)
    step = -factor * (damped_inverse(Dense(GGN()).estimate(evaluation), 0.1) @ evaluation.gradient())
    result = searching(objective, factor, StrongWolfe(flatness=flatness)).step(batch)
    t, moved = result.learning_rate, (objective.parameter_vector() - theta)
    torch.testing.assert_close(moved, t * step, rtol=1e-9, atol=1e-15)
    g0, d = gradient(theta.numpy()), step.numpy()
    g1 = gradient((theta + t * step).numpy())
    assert f((theta + t * step).numpy()) <= f(theta.numpy()) + 1e-4 * t * (g0 @ d)
    assert abs(g1 @ d) <= flatness * abs(g0 @ d)
    assert t == pytest.approx(line_search(f, gradient, theta.numpy(), d, c2=flatness, maxiter=10)[0], rel=1e-6)
    assert result.actual == pytest.approx(f((theta + t * step).numpy()) - f(theta.numpy()), rel=1e-9)


def test_the_first_trial_costs_one_gradient_and_is_taken_where_it_is_good():
    objective, batch = linear_regression()
    optimizer = searching(objective, damping=ConstantDamping(0.0))
    fixed = searching(linear_regression()[0], rule=FixedLength(), damping=ConstantDamping(0.0))
    result, reference = optimizer.step(batch), fixed.step(batch)
    assert result.learning_rate == 1.0
    assert result.gradient_evaluations == pytest.approx(reference.gradient_evaluations + 1)
    assert objective.at(batch).gradient().norm() < 1e-10


def test_a_slope_that_is_still_steep_makes_the_step_longer():
    objective, batch = small_network()
    result = searching(objective, factor=1e-3).step(batch)
    assert result.learning_rate > 50
    shortened = searching(small_network()[0], factor=1e-3, rule=StrongWolfe(max_doublings=2)).step(batch)
    # No trial was flat enough; the last one had the lowest value of those that fell enough.
    assert 1 < shortened.learning_rate < result.learning_rate
    assert shortened.accepted


def test_the_ratio_is_that_of_the_whole_step_and_the_change_that_of_the_one_taken():
    objective, batch = linear_regression()
    damping = LevenbergMarquardt(initial=1e-6, interval=1)
    result = searching(objective, factor=0.05, rule=StrongWolfe(flatness=0.1), damping=damping).step(batch)
    assert result.learning_rate > 10
    assert result.ratio == pytest.approx(1.0, abs=1e-5)  # of an exact model, whose damping is 1e-6
    assert result.actual < 5 * result.predicted < 0


def test_tighter_flatness_gives_a_lower_value_along_the_line():
    values = [
        searching(small_network()[0], factor=20.0, rule=StrongWolfe(flatness=flatness)).step(small_network()[1]).actual
        for flatness in (0.9, 0.001)
    ]
    assert values[1] < values[0] < 0


def test_values_that_are_not_finite_count_as_too_high():
    # h = (sqrt(x) - 0.1)^2 is NaN for negative x, and the Newton step at 1 is -18.
    objective, batch = least_squares(lambda x: x.sqrt() - 0.1, [1.0])
    optimizer = SecondOrderOptimizer(
        objective,
        direction=ModelDescent(curvature=Dense(Hessian()), descent=DampedNewton()),
        step_rule=StrongWolfe(),
        damping=LevenbergMarquardt(initial=1e-3, interval=1, increase=4.0),
    )
    result = optimizer.step(batch)
    assert result.accepted
    assert 0 < result.learning_rate < 0.1
    assert optimizer.damping == 4e-3  # the whole step was bad
    for _ in range(40):
        optimizer.step(batch)
    torch.testing.assert_close(objective.parameter_vector(), torch.tensor([0.01]).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("factor", [-1.0, 0.0])
def test_no_direction_of_descent_gives_no_step(factor):
    objective, batch = small_network()
    before = objective.parameter_vector()
    optimizer = searching(objective, factor, damping=LevenbergMarquardt(initial=1.0, interval=1, increase=3.0))
    result = optimizer.step(batch)
    assert (result.accepted, result.learning_rate, result.actual) == (False, 0.0, 0.0)
    assert torch.equal(objective.parameter_vector(), before)


def test_no_trial_low_enough_gives_no_step_without_a_warning():
    class Rising(nn.Module):
        """An objective whose backward pass points uphill."""

        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, inputs):
            return (self.x.detach() * 2 - self.x).unsqueeze(0)

    objective = Objective(Rising(), nn.MSELoss())
    batch = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = SecondOrderOptimizer(
            objective,
            direction=PreconditionedGradient(curvature=Identity(), fraction=1.0),
            step_rule=StrongWolfe(),
            damping=ConstantDamping(0.0),
        ).step(batch)
    assert (result.accepted, result.learning_rate) == (False, 0.0)


@pytest.mark.parametrize("rule", [StrongWolfe(), BacktrackingLineSearch(), FixedLength()], ids=str)
@pytest.mark.parametrize("factor", [300.0, -1.0])
def test_steps_are_counted_as_rejected_where_they_are_undone(rule, factor):
    objective, batch = small_network()
    control = LevenbergMarquardt(initial=0.1, increase=2.0, interval=100)
    optimizer = searching(objective, factor, rule=rule, damping=control)
    results, moved, dampings = [], [], []
    for _ in range(4):
        before = objective.parameter_vector()
        results.append(optimizer.step(batch))
        moved.append(not torch.equal(before, objective.parameter_vector()))
        dampings.append(optimizer.damping / results[-1].damping)
    assert [result.accepted for result in results] == moved
    assert optimizer.state_dict()["control"]["damping"]["rejected"] == moved.count(False)
    bad = [result.ratio is not None and not result.ratio >= 0 for result in results]
    # Below ``reject_below`` the damping rises at once, whether or not the search has made the step good.
    assert dampings == [2.0 if flag else 1.0 for flag in bad]
    if factor == 300.0:
        assert any(bad)
        assert any(moved) == (not isinstance(rule, FixedLength))


@pytest.mark.parametrize("direction", [TruncatedNewton(), ModelDescent(curvature=Dense(GGN()), descent=DampedNewton())])
def test_gauss_newton_with_the_search_solves_rosenbrock_s_problem(direction):
    objective, batch = least_squares(rosenbrock, [-1.2, 1.0])
    optimizer = SecondOrderOptimizer(
        objective, direction=direction, step_rule=StrongWolfe(), damping=ConstantDamping(1e-6)
    )
    losses = [optimizer.step(batch).loss for _ in range(60)]
    assert losses[-1] < 1e-12
    assert losses == sorted(losses, reverse=True)


def test_dropout_is_that_of_the_step_s_own_forward_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 30), nn.Tanh(), nn.Dropout(0.5), nn.Linear(30, 2)).double()
    objective = Objective(model, nn.MSELoss())
    batch = torch.randn(10, 3).double(), torch.randn(10, 2).double()
    result = SecondOrderOptimizer(
        objective,
        direction=ModelDescent(curvature=Exact(GGN()), descent=DampedNewton()),
        step_rule=StrongWolfe(),
        damping=ConstantDamping(1e-6),
    ).step(batch)
    assert result.actual / result.predicted == pytest.approx(1, abs=0.6)


# --- norm constraint -------------------------------------------------------------------------------------------------


def constrained(objective, **options):
    return SecondOrderOptimizer(
        objective,
        direction=PreconditionedGradient(curvature=KFAC(Fisher(samples=50)), fraction=1.0),
        step_rule=NormConstraint(**options),
        damping=ConstantDamping(0.1),
    )


@settings(max_examples=12)
@given(constraint=st.floats(1e-6, 10.0), learning_rate=st.sampled_from([0.1, 1.0, 7.0]))
def test_the_squared_norm_of_the_step_is_the_limit_or_that_of_the_whole_step(constraint, learning_rate):
    objective, batch = linear_regression()
    evaluation, theta = objective.at(batch), objective.parameter_vector()
    C = Dense(GGN()).estimate(evaluation).to_dense() + 0.1 * torch.eye(len(theta), dtype=theta.dtype)
    g = evaluation.gradient()
    natural = torch.linalg.solve(C, g)
    result = SecondOrderOptimizer(
        objective,
        direction=PreconditionedGradient(curvature=Dense(GGN()), fraction=1.0),
        step_rule=NormConstraint(constraint=constraint, learning_rate=learning_rate),
        damping=ConstantDamping(0.1),
    ).step(batch)
    step = objective.parameter_vector() - theta
    whole = learning_rate**2 * float(g @ natural)
    assert float(step @ C @ step) == pytest.approx(min(constraint, whole), rel=1e-6)
    scale = min(1.0, (constraint / whole) ** 0.5)
    torch.testing.assert_close(step, -scale * learning_rate * natural, rtol=1e-7, atol=1e-12)
    assert result.learning_rate == pytest.approx(scale * learning_rate, rel=1e-9)
    assert result.accepted


def test_a_looser_limit_changes_nothing_and_momentum_adds_the_last_step():
    objective, batch = small_network()
    other, _ = small_network()
    loose = constrained(objective, constraint=1e6, learning_rate=0.5, momentum=0.4)
    fixed = SecondOrderOptimizer(
        other,
        direction=PreconditionedGradient(curvature=KFAC(Fisher(samples=50)), fraction=1.0),
        step_rule=FixedLength(learning_rate=0.5, momentum=0.4),
        damping=ConstantDamping(0.1),
    )
    for _ in range(3):
        assert loose.step(batch) == fixed.step(batch)
    assert torch.equal(objective.parameter_vector(), other.parameter_vector())


def test_it_trains_with_a_damping_that_follows_the_ratio():
    objective, batch = small_network()
    optimizer = SecondOrderOptimizer(
        objective,
        direction=PreconditionedGradient(curvature=KFAC(GGN()), fraction=1.0),
        step_rule=NormConstraint(constraint=0.02),
        damping=LevenbergMarquardt(initial=1.0),
    )
    results = [optimizer.step(batch) for _ in range(60)]
    assert results[-1].loss < 0.5 * results[0].loss
    assert any(result.learning_rate < 1 for result in results)


def test_the_norm_constraint_takes_no_step_uphill():
    objective, batch = small_network()
    before = objective.parameter_vector()
    result = searching(objective, -1.0, NormConstraint()).step(batch)
    assert (result.accepted, result.learning_rate) == (False, 0.0)
    assert torch.equal(objective.parameter_vector(), before)


@pytest.mark.parametrize(
    "call",
    [
        lambda: StrongWolfe(sufficient=0.9, flatness=0.1),
        lambda: StrongWolfe(flatness=1.0),
        lambda: StrongWolfe(sufficient=0.0),
        lambda: StrongWolfe(max_doublings=0),
        lambda: NormConstraint(constraint=0.0),
        lambda: NormConstraint(constraint=float("inf")),
        lambda: NormConstraint(learning_rate=-1.0),
        lambda: NormConstraint(momentum=1.0),
    ],
    ids=["order", "flatness", "sufficient", "doublings", "zero", "infinite", "rate", "momentum"],
)
def test_bad_options_are_refused(call):
    with pytest.raises(ValueError, match=r"needs .* got"):
        call()
