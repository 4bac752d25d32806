"""The loop on one batch: every way that it ends, and what it counts."""

from dataclasses import replace

import pytest
import torch
from optimizer_cases import least_squares, rosenbrock
from torch import nn

from benchmarks.nist_problems import load
from curvlib import Objective
from curvlib.optimizers import (
    BacktrackingLineSearch,
    MinimizationStatus,
    NonFiniteLossError,
    Tolerances,
    gauss_newton,
    levenberg_marquardt,
    minimize,
)
from curvlib.solvers import ConstantDamping, TrustRegion

OFF = Tolerances(ftol=0.0, xtol=0.0, gtol=0.0)


def exponential(x):
    """Residuals that do not vanish at the minimum."""
    t = torch.arange(5).double()
    return torch.exp(-x[0] * t) - torch.tensor([1.0, 0.5, 0.3, 0.1, 0.2])


def ended(tolerances, function=exponential, start=(1.0,), control=None, **options):
    objective, batch = least_squares(function, list(start))
    result = minimize(levenberg_marquardt(objective, control=control), batch, tolerances=tolerances, **options)
    evaluation = objective.at(batch)
    assert result.value == float(evaluation.value)
    assert result.gradient_norm == float(evaluation.gradient().abs().max())
    return result


@pytest.mark.parametrize(
    ("tolerances", "status"),
    [
        (Tolerances(ftol=1e-6, xtol=0.0, gtol=0.0), MinimizationStatus.VALUE),
        (Tolerances(ftol=0.0, xtol=1e-6, gtol=0.0), MinimizationStatus.STEP),
        (Tolerances(ftol=0.0, xtol=0.0, gtol=1e-6), MinimizationStatus.GRADIENT),
    ],
    ids=["ftol", "xtol", "gtol"],
)
def test_each_tolerance_ends_the_loop_by_its_own_status(tolerances, status):
    loose = ended(tolerances)
    assert loose.status is status
    assert loose.converged
    assert "converged" in str(loose)
    tight = ended(Tolerances(ftol=tolerances.ftol * 1e-5, xtol=tolerances.xtol * 1e-5, gtol=tolerances.gtol * 1e-5))
    assert tight.status is status
    assert tight.steps > loose.steps
    assert tight.gradient_norm < loose.gradient_norm


def test_small_changes_count_only_where_the_model_agrees():
    objective, batch = least_squares(exponential, [1.0])
    step = levenberg_marquardt(objective).step(batch)
    tolerances = Tolerances(ftol=1e-6, xtol=0.0, gtol=0.0)
    for changes, status in (
        ({"ratio": 0.9}, MinimizationStatus.VALUE),
        ({"ratio": 0.2}, None),
        ({"ratio": 0.9, "accepted": False}, None),
    ):
        small = replace(step, actual=-1e-7 * step.loss, **changes)
        assert tolerances.met_by(small, parameter_norm=1.0) is status


def test_a_minimum_without_a_gradient_converges_whatever_the_tolerances():
    result = ended(OFF, rosenbrock, (1.0, 1.0))
    assert (result.status, result.value, result.steps) == (MinimizationStatus.GRADIENT, 0.0, 1)


def test_limits_and_the_caller_end_the_loop_without_convergence():
    result = ended(OFF, max_steps=3)
    assert (result.status, result.steps) == (MinimizationStatus.STEP_LIMIT, 3)
    with pytest.raises(RuntimeError, match="max_steps"):
        result.raise_unless_converged()
    seen = []
    result = ended(OFF, stop_when=lambda step: seen.append(step) or len(seen) == 2)
    assert (result.status, result.steps) == (MinimizationStatus.STOPPED, 2)
    assert result.last is seen[-1]
    assert not result.converged


def test_a_gradient_that_the_last_step_has_reached_counts():
    objective, batch = least_squares(lambda x: x - 1, [0.0, 3.0])
    result = minimize(levenberg_marquardt(objective), batch, max_steps=1)
    assert result.status is MinimizationStatus.GRADIENT


def test_steps_that_are_all_rejected_are_a_stall():
    never = TrustRegion(low=5.0, high=6.0, reject_below=5.0)
    result = ended(OFF, control=never, patience=4)
    assert (result.status, result.steps, result.accepted) == (MinimizationStatus.STALLED, 5, 0)
    assert "stalled" in str(result)
    assert result.value == float(exponential(torch.ones(1)).square().sum())


def test_tolerances_that_the_dtype_cannot_give_end_at_its_rounding_errors():
    result = ended(OFF, patience=3)
    assert result.status is MinimizationStatus.ROUNDING_FLOOR
    assert result.converged
    assert "rounding errors" in str(result)
    assert result.gradient_norm < 1e-15
    assert result.steps < 100


def test_a_gradient_that_still_falls_is_progress_where_the_objective_does_not():
    problem = load("ENSO")
    model = problem.model(2)
    optimizer = levenberg_marquardt(Objective(model, nn.MSELoss(reduction="sum")))
    result = minimize(optimizer, (problem.x, problem.y), tolerances=OFF, patience=8)
    assert result.status is MinimizationStatus.ROUNDING_FLOOR
    assert result.gradient_norm < 1e-9
    assert problem.digits(model.b.detach()) > 10


def test_a_line_search_that_finds_no_step_is_a_stall_and_no_convergence():
    objective, batch = least_squares(rosenbrock, [-1.2, 1.0])
    optimizer = gauss_newton(objective, step_rule=BacktrackingLineSearch(max_trials=1))
    result = minimize(optimizer, batch, patience=3)
    assert (result.status, result.accepted, result.steps) == (MinimizationStatus.STALLED, 0, 4)
    assert result.last.step_norm > 1


def test_a_line_search_that_finds_no_step_at_the_minimum_has_converged():
    objective, batch = least_squares(exponential, [1.0])
    result = minimize(gauss_newton(objective), batch, tolerances=Tolerances(ftol=0.0, xtol=1e-10, gtol=0.0))
    assert result.status is MinimizationStatus.STEP


def test_it_counts_steps_and_work():
    objective, batch = least_squares(rosenbrock, [-1.2, 1.0])
    results = []
    total = minimize(levenberg_marquardt(objective), batch, stop_when=results.append)
    assert total.steps >= len(results)
    assert total.accepted <= total.steps
    assert total.gradient_evaluations > sum(result.gradient_evaluations for result in results)
    # each of the two numbers is about the point before the step
    assert results[0].gradient_norm == pytest.approx(215.6)
    assert results[0].step_norm > 0


def test_what_is_not_finite_at_the_start_is_refused():
    objective, batch = least_squares(lambda x: 1 / x, [0.0])
    with pytest.raises(NonFiniteLossError):
        minimize(levenberg_marquardt(objective), batch)


def test_a_step_to_where_the_objective_is_not_finite_is_rejected():
    objective, batch = least_squares(lambda x: torch.cat([x.log(), x - 0.1]), [5.0])
    result = minimize(levenberg_marquardt(objective, control=TrustRegion(initial=100.0)), batch)
    assert result.converged
    assert result.accepted < result.steps


def test_an_interruption_leaves_the_last_accepted_step():
    objective, batch = least_squares(rosenbrock, [-1.2, 1.0])
    points = []

    def interrupt(step):
        points.append(objective.parameter_vector().clone())
        if len(points) == 3:
            raise KeyboardInterrupt
        return False

    optimizer = levenberg_marquardt(objective)
    with pytest.raises(KeyboardInterrupt):
        minimize(optimizer, batch, stop_when=interrupt)
    assert torch.equal(objective.parameter_vector(), points[-1])
    assert minimize(optimizer, batch).converged


def test_arguments_are_checked_before_anything_is_changed():
    objective, batch = least_squares(rosenbrock, [-1.2, 1.0])
    optimizer = levenberg_marquardt(objective, control=ConstantDamping(1.0))
    with pytest.raises(TypeError, match="SecondOrderOptimizer"):
        minimize(torch.optim.SGD(objective.parameters, lr=0.1), batch)
    with pytest.raises(TypeError, match="tolerances"):
        minimize(optimizer, batch, tolerances=1e-8)
    for name in ("max_steps", "patience"):
        for value in (0, 2.5, True):
            with pytest.raises(ValueError, match=name):
                minimize(optimizer, batch, **{name: value})
    for name in ("ftol", "xtol", "gtol"):
        with pytest.raises(ValueError, match=name):
            Tolerances(**{name: -1e-8})
        with pytest.raises(TypeError, match=name):
            Tolerances(**{name: "1e-8"})
    with pytest.raises(ValueError, match="ftol"):
        Tolerances(ftol=1.0)
    torch.testing.assert_close(objective.parameter_vector(), torch.tensor([-1.2, 1.0]).double())
