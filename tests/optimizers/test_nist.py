"""NIST's nonlinear regression problems: certified parameters and standard errors, beside SciPy's method "lm"."""

import pytest
import torch
from click.testing import CliRunner

from benchmarks.nist import best_of_scipy, by_curvlib, main
from benchmarks.nist_problems import NAMES, load
from curvlib import GGN
from curvlib.approximations import Dense
from curvlib.solvers import damped_inverse

PROBLEMS = {name: load(name) for name in NAMES}
HIGHER = [name for name, problem in PROBLEMS.items() if problem.level == "Higher"]
# Certified values have 11 digits: the exact parameters may differ from them by 0.5e-10 in relative terms, 10.3 digits.
ALL_DIGITS = 10.2


def test_the_data_are_those_that_the_certified_values_belong_to():
    assert len(HIGHER) == 8
    for name, problem in PROBLEMS.items():
        value = float(problem.residuals(problem.certified).square().sum())
        # Residuals of Lanczos1 are 1e-13: rounding of the certified parameters to 11 digits hides them.
        tolerance = {"rel": 0.0, "abs": 1e-20} if name == "Lanczos1" else {"rel": 1e-9}
        assert value == pytest.approx(problem.residual_sum, **tolerance), name


# PyTorch's own, inside torch.func
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
@pytest.mark.parametrize("start", [1, 2])
@pytest.mark.parametrize("name", HIGHER)
def test_all_certified_digits_of_the_harder_problems_and_no_fewer_than_scipy(name, start):
    problem = PROBLEMS[name]
    _, result, fit = by_curvlib(problem, start)
    assert result.converged
    assert fit.digits >= ALL_DIGITS
    assert result.value == pytest.approx(problem.residual_sum, rel=1e-9)
    # Where both have all digits, their errors are the rounding of the certified values, up to a twentieth of a digit.
    assert fit.digits >= best_of_scipy(problem, start).digits - 0.05


@pytest.mark.parametrize("start", [1, 2])
@pytest.mark.parametrize("name", sorted(set(NAMES) - set(HIGHER)))
def test_all_certified_digits_and_standard_errors_of_the_other_problems(name, start):
    problem = PROBLEMS[name]
    objective, result, fit = by_curvlib(problem, start)
    assert result.converged
    assert fit.digits >= ALL_DIGITS
    # Covariance s^2 (J^T J)^-1, s^2 = |r|^2 / (N - D); C = 2 J^T J.
    C = Dense(GGN()).estimate(objective.at((problem.x, problem.y)))
    variance = result.value / (len(problem.y) - C.size)
    errors = (2 * variance * damped_inverse(C, 0.0).diagonal()).sqrt()
    if name != "Lanczos1":  # whose residuals are rounding errors of the data
        torch.testing.assert_close(errors, problem.deviations, rtol=1e-7, atol=0.0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_the_benchmark_prints_a_row_for_each_start():
    done = CliRunner().invoke(main, ["--only", "DanWood"])
    assert done.exit_code == 0, done.output
    header, rule, *rows = done.output.strip().splitlines()
    assert header.count("|") == rule.count("|")
    assert [row.split(" | ")[:3] for row in rows] == [["| DanWood", "lower", "1"], ["| DanWood", "lower", "2"]]
    assert all(row.count("|") == header.count("|") for row in rows)
