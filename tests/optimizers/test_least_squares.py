"""The presets for nonlinear least squares: quadratics, classic problems beside SciPy, units, rejected steps."""

from math import inf

import numpy as np
import pytest
import scipy.optimize
import torch
from least_squares_cases import CLASSICS
from optimizer_cases import assert_same, least_squares, linear_regression, rosenbrock
from torch import nn

from benchmarks.nist_problems import load
from curvlib import GGN, Objective
from curvlib.approximations import Dense, Exact, LowRank
from curvlib.optimizers import (
    BacktrackingLineSearch,
    CurvatureScaling,
    FixedLength,
    FixedScaling,
    ModelDescent,
    SecondOrderOptimizer,
    Tolerances,
    gauss_newton,
    levenberg_marquardt,
    minimize,
)
from curvlib.solvers import (
    ConstantDamping,
    DampedNewton,
    DampedRatio,
    LevenbergMarquardt,
    RelativeRadius,
    SlopeRatio,
    SolveError,
    TrustRegion,
    UndampedRatio,
)

# --- exactly quadratic objectives ------------------------------------------------------------------------------------


def test_one_gauss_newton_step_ends_on_a_quadratic_with_ratio_one():
    objective, batch = linear_regression()
    result = gauss_newton(objective).step(batch)
    assert result.damping == 0.0
    assert result.learning_rate == 1.0
    assert abs(result.ratio - 1) < 1e-9
    assert objective.at(batch).gradient().abs().max() < 1e-13


def test_one_damped_step_with_damping_zero_ends_on_a_quadratic():
    objective, batch = linear_regression()
    result = levenberg_marquardt(objective, control=ConstantDamping(0.0), ratio=UndampedRatio()).step(batch)
    assert result.accepted
    assert objective.at(batch).gradient().abs().max() < 1e-13


def test_the_trust_region_has_ratio_one_on_a_quadratic_and_ends_inside():
    objective, batch = linear_regression()
    results = [levenberg_marquardt(objective, control=TrustRegion(initial=1e6)).step(batch)]
    assert abs(results[0].ratio - 1) < 1e-9
    assert objective.at(batch).gradient().abs().max() < 1e-13


@pytest.mark.parametrize("convention", [DampedRatio(), UndampedRatio(), SlopeRatio()], ids=lambda c: type(c).__name__)
def test_the_damping_falls_monotonically_on_a_quadratic(convention):
    objective, batch = linear_regression()
    control = LevenbergMarquardt(initial=1.0, decrease=0.25, interval=1)
    optimizer = levenberg_marquardt(objective, control=control, ratio=convention)
    results = [optimizer.step(batch) for _ in range(8)]
    assert [result.damping for result in results] == [0.25**k for k in range(8)]
    # rho is 1 against the model without damping, and above 1 against the smaller prediction of the damped one.
    least, most = (1 + 1e-6, 2.0) if isinstance(convention, DampedRatio) else (1 - 1e-6, 1 + 1e-6)
    assert all(least < result.ratio < most for result in results[:4])


# --- classic problems ------------------------------------------------------------------------------------------------


def by_scipy(problem, tolerance):
    """The fewest evaluations and the least |r|^2 of MINPACK with exact Jacobians, in its two scalings."""
    runs = [
        scipy.optimize.least_squares(
            lambda x: problem.residuals(torch.tensor(x)).numpy(),
            np.array(problem.start),
            jac=lambda x: torch.autograd.functional.jacobian(problem.residuals, torch.tensor(x)).numpy(),
            method="lm",
            x_scale=scale,
            **dict.fromkeys(("ftol", "xtol", "gtol"), tolerance),
        )
        for scale in (1.0, "jac")
    ]
    return min(run.nfev for run in runs), min(2 * run.cost for run in runs)


@pytest.mark.parametrize("name", CLASSICS)
def test_levenberg_marquardt_finds_the_minimum_of_classic_problems_as_scipy_does(name):
    problem = CLASSICS[name]
    evaluations, value = by_scipy(problem, 1e-8)
    objective, batch = least_squares(problem.residuals, problem.start)
    result = minimize(levenberg_marquardt(objective), batch).raise_unless_converged()
    # Published minima have six digits. Sums of squares with zero at the minimum: h < gtol^2 / curvature, up to factors.
    assert result.value == pytest.approx(value, rel=1e-7, abs=1e-12)
    assert result.value == pytest.approx(problem.minimum, rel=2e-6, abs=1e-12)
    # A step evaluates one trial; the start is the first evaluation. Some problems take a few more, some fewer.
    assert result.steps + 1 <= 1.4 * evaluations + 2


@pytest.mark.parametrize("name", CLASSICS)
def test_gauss_newton_finds_the_minimum_of_classic_problems(name):
    problem = CLASSICS[name]
    objective, batch = least_squares(problem.residuals, problem.start)
    result = minimize(gauss_newton(objective), batch).raise_unless_converged()
    assert result.value == pytest.approx(problem.minimum, rel=2e-6, abs=1e-12)
    assert result.steps < 80


# --- parts -----------------------------------------------------------------------------------------------------------


def scaled_bard(units):
    """Bard's problem in other units of the parameters."""
    problem = CLASSICS["bard"]
    return least_squares(lambda x: problem.residuals(x * units), (torch.tensor(problem.start) / units).tolist())


@pytest.mark.parametrize(
    "make",
    [
        levenberg_marquardt,
        gauss_newton,
        lambda objective: levenberg_marquardt(objective, control=LevenbergMarquardt(initial=1e-3, interval=1)),
    ],
    ids=["region", "gauss-newton", "damping"],
)
def test_steps_do_not_depend_on_the_units_of_the_parameters(make):
    units = torch.tensor([1e6, 1.0, 1e-6], dtype=torch.float64)
    paths = []
    for scale in (torch.ones(3, dtype=torch.float64), units):
        objective, batch = scaled_bard(scale)
        optimizer = make(objective)
        points = []
        for _ in range(4):
            assert optimizer.step(batch).accepted
            points.append(objective.parameter_vector() * scale)
        paths.append(torch.stack(points))
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-9, atol=0.0)


def test_steps_do_not_depend_on_the_scale_of_the_loss():
    problem, points = load("Rat42"), []
    for reduction in ("sum", "mean"):
        model = problem.model(2)
        optimizer = levenberg_marquardt(Objective(model, nn.MSELoss(reduction=reduction)))
        for _ in range(6):
            optimizer.step((problem.x, problem.y))
        points.append(model.b.detach())
    torch.testing.assert_close(points[0], points[1], rtol=1e-9, atol=0.0)


def test_a_fit_in_float32_reaches_what_float32_can():
    problem = load("Rat42")
    model = problem.model(2).float()
    optimizer = levenberg_marquardt(Objective(model, nn.MSELoss(reduction="sum")))
    result = minimize(optimizer, (problem.x.float(), problem.y.float()), tolerances=Tolerances(xtol=1e-6))
    assert result.converged
    assert problem.digits(model.b.detach().double()) > 4


def test_the_scaling_is_an_option_that_changes_the_step():
    moves = []
    for scaling in (CurvatureScaling(), FixedScaling(torch.tensor([1.0, 1.0], dtype=torch.float64))):
        objective, batch = least_squares(rosenbrock, [-1.2, 1.0])
        levenberg_marquardt(objective, scaling=scaling, control=TrustRegion(initial=0.1)).step(batch)
        moves.append(objective.parameter_vector() - torch.tensor([-1.2, 1.0], dtype=torch.float64))
        if scaling == CurvatureScaling():
            jacobian = torch.tensor([[24.0, 10.0], [-1.0, 0.0]]).double()
            length = (2**0.5 * jacobian.norm(dim=0) * moves[-1]).norm()  # C = 2 J^T J
            assert length == pytest.approx(0.1, rel=1e-9)
    assert moves[1].norm() == pytest.approx(0.1, rel=1e-9)


def test_marquardts_step_is_that_of_the_matrix_with_its_diagonal():
    objective, batch = least_squares(rosenbrock, [-1.2, 1.0])
    evaluation = objective.at(batch)
    C, g = Dense(GGN()).estimate(evaluation).to_dense(), evaluation.gradient()
    expected = -torch.linalg.solve(C + 0.5 * C.diagonal().diag(), g)
    start = objective.parameter_vector()
    levenberg_marquardt(objective, control=ConstantDamping(0.5)).step(batch)
    torch.testing.assert_close(objective.parameter_vector() - start, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("curvature", [Exact(GGN()), LowRank(GGN())], ids=["products", "low-rank"])
def test_other_forms_of_the_same_matrix_give_the_same_step(curvature):
    points = []
    for form in (Dense(GGN()), curvature):
        objective, batch = least_squares(CLASSICS["bard"].residuals, [1.0, 1.0, 1.0])
        optimizer = levenberg_marquardt(objective, curvature=form, control=TrustRegion(initial=0.5))
        optimizer.step(batch)
        points.append(objective.parameter_vector())
    torch.testing.assert_close(points[0], points[1], rtol=1e-8, atol=1e-10)


def test_an_l2_term_is_part_of_the_matrix_and_of_its_scales():
    problem, norms = CLASSICS["bard"], []
    for l2 in (0.0, 0.3):
        objective, batch = least_squares(problem.residuals, problem.start)
        objective = Objective(objective.model, objective.loss, l2=l2)
        tight = Tolerances(ftol=0.0, xtol=0.0, gtol=1e-12)
        minimize(levenberg_marquardt(objective), batch, tolerances=tight).raise_unless_converged()
        norms.append(objective.parameter_vector().norm())
    assert norms[1] < 0.95 * norms[0]


def test_a_rejected_step_restores_scales_and_parameters_bit_for_bit():
    problem = CLASSICS["osborne-1"]
    objective, batch = least_squares(problem.residuals, problem.start)
    optimizer = levenberg_marquardt(objective)
    rejected = 0
    for _ in range(15):
        before, theta = optimizer.state_dict(), objective.parameter_vector().clone()
        if optimizer.step(batch).accepted:
            continue
        rejected += 1
        after = optimizer.state_dict()
        assert torch.equal(objective.parameter_vector(), theta)
        for part in ("direction", "previous", "generator"):
            assert_same(after[part], before[part])
        assert after["control"]["radius"]["radius"] < before["control"]["radius"]["radius"]
    assert rejected > 0


def test_the_first_radius_and_a_shorter_one_are_measured_in_scaled_parameters():
    problem = CLASSICS["bard"]
    objective, batch = least_squares(problem.residuals, problem.start)
    # C = 2 J^T J
    s = (2 * torch.autograd.functional.jacobian(problem.residuals, objective.parameter_vector()).square().sum(0)).sqrt()
    # every step is bad
    control = TrustRegion(initial=RelativeRadius(7.0), low=5.0, high=6.0, reject_below=5.0)
    optimizer = levenberg_marquardt(objective, control=control)
    before = optimizer.state_dict()["direction"]
    result = optimizer.step(batch)
    assert not result.accepted
    assert result.radius == pytest.approx(7.0 * float((s * objective.parameter_vector()).norm()), rel=1e-12)
    assert_same(optimizer.state_dict()["direction"], before)
    evaluation = objective.at(batch)
    step = -torch.linalg.solve(Dense(GGN()).estimate(evaluation).to_dense(), evaluation.gradient())
    assert float((s * step).norm()) < result.radius
    assert optimizer.radius == pytest.approx(0.25 * float((s * step).norm()), rel=1e-6)


def test_the_damped_model_of_a_line_search_is_that_of_the_scaled_damping():
    problem = CLASSICS["bard"]
    objective, batch = least_squares(problem.residuals, problem.start)
    optimizer = SecondOrderOptimizer(
        objective,
        direction=ModelDescent(curvature=Dense(GGN()), descent=DampedNewton(), scaling=CurvatureScaling()),
        step_rule=BacktrackingLineSearch(),
        damping=ConstantDamping(0.5),
        ratio=DampedRatio(),
    )
    evaluation = objective.at(batch)
    C, g = Dense(GGN()).estimate(evaluation).to_dense(), evaluation.gradient()
    minimum = -0.5 * g @ torch.linalg.solve(C + 0.5 * C.diagonal().diag(), g)
    assert optimizer.step(batch).predicted == pytest.approx(float(minimum), rel=1e-10)


def test_the_ratio_by_slopes_is_right_where_differences_of_the_objective_are_noise():
    t = torch.arange(5).double()
    y = torch.tensor([1.0, 0.5, 0.3, 0.1, 0.2]).double()
    objective, batch = least_squares(lambda x: torch.exp(-x[0] * t) - y, [1.0])
    optimizer = levenberg_marquardt(objective)
    results = [optimizer.step(batch) for _ in range(12)]
    # Near the minimum rho is that of the curvatures: 2 - h'' / C, for the step -g / C of the Gauss-Newton curvature C.
    theta = objective.parameter_vector()
    h = torch.autograd.functional.hessian(lambda x: (torch.exp(-x[0] * t) - y).square().sum(), theta)
    limit = 2 - float(h) / float(Dense(GGN()).estimate(objective.at(batch)).to_dense())
    late = [result for result in results if 1e-24 < -result.predicted < 1e-14]
    assert len(late) > 3
    assert all(result.ratio == pytest.approx(limit, rel=1e-3) for result in late)
    assert abs(limit - 1) > 0.05


def test_a_change_that_is_not_small_is_not_taken_from_slopes():
    # The model from x = 0 predicts a fall of 1e-8 at x = -1. There h has risen by 100, and both slopes point down.
    def residuals(x):
        return torch.stack([torch.ones_like(x[0]), 1e-4 * (1 + x[0]) + 5 * (1 - torch.cos(torch.pi * x[0]))])

    objective, batch = least_squares(residuals, [0.0])
    result = levenberg_marquardt(objective, control=TrustRegion(initial=1.0)).step(batch)
    assert result.predicted == pytest.approx(-1e-8, rel=1e-6)
    assert result.actual == pytest.approx(100.0, rel=1e-6)
    assert not result.accepted


def test_an_interrupted_step_restores_what_was_before_it(monkeypatch):
    problem = CLASSICS["bard"]
    objective, batch = least_squares(problem.residuals, problem.start)
    optimizer = levenberg_marquardt(objective)
    optimizer.step(batch)
    before, theta = optimizer.state_dict(), objective.parameter_vector().clone()

    def interrupt(*_):
        raise KeyboardInterrupt

    # between the new scales and the judgement
    monkeypatch.setattr(TrustRegion, "accept", interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(batch)
    assert_same(optimizer.state_dict(), before)
    assert torch.equal(objective.parameter_vector(), theta)


def test_a_resumed_run_goes_on_bit_for_bit():
    problem = CLASSICS["meyer"]
    objective, batch = least_squares(problem.residuals, problem.start)
    optimizer = levenberg_marquardt(objective)
    for _ in range(5):
        optimizer.step(batch)
    copy, _ = least_squares(problem.residuals, objective.parameter_vector().tolist())
    resumed = levenberg_marquardt(copy)
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        assert optimizer.step(batch) == resumed.step(batch)
    assert torch.equal(objective.parameter_vector(), copy.parameter_vector())


def test_gauss_newton_refuses_a_jacobian_without_full_rank_and_levenberg_marquardt_does_not():
    def degenerate(x):
        return torch.stack([x[0] + x[1] - 3, x[0] + x[1] - 1])

    objective, batch = least_squares(degenerate, [1.0, 5.0])
    with pytest.raises(SolveError):
        minimize(gauss_newton(objective), batch)
    result = minimize(levenberg_marquardt(objective), batch).raise_unless_converged()
    assert result.value == pytest.approx(2.0, rel=1e-12)
    # the shortest change: both move alike
    torch.testing.assert_close(objective.parameter_vector(), torch.tensor([-1.0, 3.0]).double())


def test_undamped_gauss_newton_takes_whole_steps():
    objective, batch = least_squares(rosenbrock, [-1.2, 1.0])
    optimizer = gauss_newton(objective, step_rule=FixedLength())
    optimizer.step(batch)
    assert objective.at(batch).value > 400  # far up the other side of the valley
    optimizer.step(batch)
    torch.testing.assert_close(objective.parameter_vector(), torch.ones(2).double())


def test_slopes_give_the_digits_that_differences_of_the_objective_hide():
    problem, digits = load("Lanczos3"), []
    for ratio in (UndampedRatio(), SlopeRatio()):
        model = problem.model(2)
        optimizer = levenberg_marquardt(Objective(model, nn.MSELoss(reduction="sum")), ratio=ratio)
        minimize(optimizer, (problem.x, problem.y), tolerances=Tolerances(ftol=0.0, xtol=1e-15, gtol=0.0))
        digits.append(problem.digits(model.b.detach()))
    assert digits[0] < 8
    assert digits[1] > 10


def test_arguments_are_checked():
    objective, _ = least_squares(rosenbrock, [-1.2, 1.0])
    with pytest.raises(TypeError, match="RadiusControl"):
        levenberg_marquardt(objective, control=1.0)
    with pytest.raises(TypeError, match="scaling"):
        levenberg_marquardt(objective, scaling=2.0)
    with pytest.raises(TypeError, match="convention"):
        SlopeRatio(convention=1.0)
    for below in (0.0, 1.0):
        with pytest.raises(ValueError, match="below"):
            SlopeRatio(below=below)
    for values, error in ((torch.tensor([1.0, 0.0]), ValueError), (torch.ones(2, 2), TypeError), ([1.0], TypeError)):
        with pytest.raises(error, match="values"):
            FixedScaling(values)
    with pytest.raises(ValueError, match="factor"):
        RelativeRadius(inf)
    with pytest.raises(ValueError, match="length of the parameters"):
        TrustRegion(initial=RelativeRadius()).start()
    with pytest.raises(ValueError, match="another size"):
        levenberg_marquardt(objective, scaling=FixedScaling(torch.ones(3).double())).step(
            least_squares(rosenbrock, [-1.2, 1.0])[1]
        )
