"""NIST's nonlinear regression problems: certified digits and evaluations of curvlib and of SciPy.

Run as ``python -m benchmarks.nist``; it prints a table in Markdown.
"""

from __future__ import annotations

from dataclasses import dataclass

import click
import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.nist_problems import NAMES, NISTProblem, load
from curvlib import Objective
from curvlib.optimizers import Minimization, Tolerances, levenberg_marquardt, minimize

# As far as float64 goes; SciPy takes no smaller ones.
TIGHTEST = 1e-15
MOST = 2000


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What came of one run.

    Attributes:
        digits: right ones, of the parameter that has the fewest; certified values have 11.
        evaluations: points at which the residuals were evaluated, without those for finite differences.
        how: the options.
    """

    digits: float
    evaluations: int
    how: str


def by_curvlib(problem: NISTProblem, start: int) -> tuple[Objective, Minimization, Fit]:
    """Fit by Levenberg-Marquardt with the settings of the preset."""
    model = problem.model(start)
    objective = Objective(model, nn.MSELoss(reduction="sum"))
    result = minimize(
        levenberg_marquardt(objective),
        (problem.x, problem.y),
        tolerances=Tolerances(ftol=0.0, xtol=TIGHTEST, gtol=0.0),
        max_steps=MOST,
    )
    fit = Fit(digits=problem.digits(model.b.detach()), evaluations=result.steps + 1, how=result.status.name.lower())
    return objective, result, fit


def by_scipy(problem: NISTProblem, start: int, *, exact: bool, scale: str | float, tolerance: float) -> Fit:
    """Fit by MINPACK, with the exact Jacobian or by finite differences, and with or without its own scaling."""

    def residuals(b: NDArray[np.float64]) -> NDArray[np.float64]:
        return problem.residuals(torch.tensor(b)).numpy()

    def jacobian(b: NDArray[np.float64]) -> NDArray[np.float64]:
        parameters = torch.tensor(b)
        columns = [torch.func.jvp(problem.residuals, (parameters,), (unit,))[1] for unit in torch.eye(len(b)).double()]
        return torch.stack(columns, dim=1).numpy()

    with np.errstate(all="ignore"):
        run = scipy.optimize.least_squares(
            residuals,
            problem.starts[start - 1].numpy(),
            jac=jacobian if exact else "2-point",
            method="lm",
            x_scale=scale,
            ftol=tolerance,
            xtol=tolerance,
            gtol=tolerance,
            max_nfev=MOST,
        )
    how = f"{'exact' if exact else 'differences'}, x_scale={scale}"
    return Fit(digits=problem.digits(torch.tensor(run.x)), evaluations=int(run.nfev), how=how)


def best_of_scipy(problem: NISTProblem, start: int) -> Fit:
    """Return the best of exact and finite-difference Jacobians and of both scalings, to the tightest tolerances."""
    fits = [
        by_scipy(problem, start, exact=exact, scale=scale, tolerance=TIGHTEST)
        for exact in (True, False)
        for scale in (1.0, "jac")
    ]
    return max(fits, key=lambda fit: (round(fit.digits, 1), -fit.evaluations))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", multiple=True, type=click.Choice(NAMES), help="Repeatable; all by default.")
def main(only: tuple[str, ...]) -> None:
    """Fit NIST's nonlinear regression problems from both starting values by curvlib and by SciPy."""
    levels = ("Higher", "Average", "Lower")
    problems = sorted((load(name) for name in only or NAMES), key=lambda problem: levels.index(problem.level))
    click.echo(
        "| problem | level | start | curvlib | evaluations | SciPy, best | evaluations | its options | by default |"
    )
    click.echo("|---|---|---|---|---|---|---|---|---|")
    for problem in problems:
        for start in (1, 2):
            _, _, ours = by_curvlib(problem, start)
            best = best_of_scipy(problem, start)
            default = by_scipy(problem, start, exact=False, scale=1.0, tolerance=1e-8)
            click.echo(
                f"| {problem.name} | {problem.level.lower()} | {start} | {ours.digits:.1f} | {ours.evaluations} | "
                f"{best.digits:.1f} | {best.evaluations} | {best.how} | {default.digits:.1f} |"
            )


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.nist")
