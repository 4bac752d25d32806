"""NIST's nonlinear regression problems: certified parameters and standard errors, beside SciPy's method "lm"."""

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

from benchmarks.nist_problems import NAMES, load
from curvlib import GGN, Objective
from curvlib.approximations import Dense
from curvlib.optimizers import Tolerances, levenberg_marquardt, minimize
from curvlib.solvers import damped_inverse

PROBLEMS = {name: load(name) for name in NAMES}
HIGHER = [name for name, problem in PROBLEMS.items() if problem.level == "Higher"]
# Certified values have 11 digits: the exact parameters may differ from them by 0.5e-10 in relative terms, 10.3 digits.
ALL_DIGITS = 10.2


def fit(problem, start):
    model = problem.model(start)
    objective = Objective(model, nn.MSELoss(reduction="sum"))
    result = minimize(
        levenberg_marquardt(objective),
        (problem.x, problem.y),
        tolerances=Tolerances(ftol=0.0, xtol=1e-15, gtol=0.0),
        max_steps=2000,
    )
    return objective, result, problem.digits(model.b.detach())


def digits_by_scipy(problem, start):
    """The best of exact and finite-difference Jacobians, in MINPACK's two scalings, to the tightest tolerances."""

    def residuals(b):
        return problem.residuals(torch.tensor(b)).numpy()

    def jacobian(b):
        b = torch.tensor(b).expand(len(problem.y), -1).clone().requires_grad_()
        # one copy of the parameters for each observation: a single backward pass gives all rows
        one = torch.vmap(lambda b, x, y: problem.formula(b, x.unsqueeze(0)).squeeze(0) - y)
        (rows,) = torch.autograd.grad(one(b, problem.x, problem.y).sum(), b)
        return rows.numpy()

    best = 0.0
    for jac in (jacobian, "2-point"):
        for scale in (1.0, "jac"):
            with np.errstate(all="ignore"):
                run = scipy.optimize.least_squares(
                    residuals,
                    problem.starts[start - 1].numpy(),
                    jac=jac,
                    method="lm",
                    x_scale=scale,
                    max_nfev=2000,
                    **dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15),
                )
            best = max(best, problem.digits(torch.tensor(run.x)))
    return best


def test_the_data_are_those_that_the_certified_values_belong_to():
    assert len(HIGHER) == 8
    for name, problem in PROBLEMS.items():
        value = float(problem.residuals(problem.certified).square().sum())
        # Residuals of Lanczos1 are 1e-13: rounding of the certified parameters to 11 digits hides them.
        tolerance = {"rel": 0.0, "abs": 1e-20} if name == "Lanczos1" else {"rel": 1e-9}
        assert value == pytest.approx(problem.residual_sum, **tolerance), name


@pytest.mark.parametrize("start", [1, 2])
@pytest.mark.parametrize("name", HIGHER)
def test_all_certified_digits_of_the_harder_problems_and_no_fewer_than_scipy(name, start):
    problem = PROBLEMS[name]
    _, result, digits = fit(problem, start)
    assert result.converged
    assert digits >= ALL_DIGITS
    assert result.value == pytest.approx(problem.residual_sum, rel=1e-9)
    assert digits >= min(digits_by_scipy(problem, start), ALL_DIGITS)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(HIGHER)))
def test_all_certified_digits_and_standard_errors_of_the_other_problems(name):
    problem = PROBLEMS[name]
    objective, result, digits = fit(problem, 2)
    assert result.converged
    assert digits >= ALL_DIGITS
    # Covariance s^2 (J^T J)^-1, s^2 = |r|^2 / (N - D); C = 2 J^T J.
    C = Dense(GGN()).estimate(objective.at((problem.x, problem.y)))
    variance = result.value / (len(problem.y) - C.size)
    errors = (2 * variance * damped_inverse(C, 0.0).diagonal()).sqrt()
    if name != "Lanczos1":  # whose residuals are rounding errors of the data
        torch.testing.assert_close(errors, problem.deviations, rtol=1e-7, atol=0.0)
