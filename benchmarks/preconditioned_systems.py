"""The command ``python -m benchmarks.preconditioned_systems``: iterations on single systems, by preconditioner.

(G + lambda I) x = -g of an auto-encoder, G the exact Gauss-Newton matrix, after some steps of training with K-FAC: how
many iterations bring the quadratic model to a share of the lowest value that any run came to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.report import machine
from curvlib import GGN, EmpiricalFisher, Evaluation, Fisher, Objective
from curvlib.approximations import EKFAC, KFAC, Approximation, Diagonal, Exact
from curvlib.experiments import PROBLEMS, ExperimentError
from curvlib.operators import LinearOperator
from curvlib.optimizers import kfac
from curvlib.solvers import CG, FactoredTikhonov, IterateGrid, ResidualTest, damped_inverse
from curvlib.spectra import DampedPower

SHARES = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
Solver = Callable[[LinearOperator, float], LinearOperator]
# name -> (statistics, what is made of them and lambda)
PRECONDITIONERS: Mapping[str, tuple[Approximation | None, Solver]] = {
    "none": (None, damped_inverse),
    "diagonal of the empirical Fisher, power 0.75 (Martens)": (Diagonal(EmpiricalFisher()), DampedPower(0.75)),
    "diagonal, 10 drawn labels": (Diagonal(Fisher(samples=10)), damped_inverse),
    "K-FAC, 1 drawn label": (KFAC(Fisher(samples=1)), damped_inverse),
    "K-FAC, 10 drawn labels": (KFAC(Fisher(samples=10)), damped_inverse),
    "K-FAC, 10 drawn labels, lambda / 3": (KFAC(Fisher(samples=10)), lambda C, damping: damped_inverse(C, damping / 3)),
    "K-FAC, 10 drawn labels, 3 lambda": (KFAC(Fisher(samples=10)), lambda C, damping: damped_inverse(C, 3 * damping)),
    "K-FAC, 10 drawn labels, factored damping": (KFAC(Fisher(samples=10)), FactoredTikhonov()),
    "K-FAC, 50 drawn labels": (KFAC(Fisher(samples=50)), damped_inverse),
    "EKFAC, 10 drawn labels": (EKFAC(Fisher(samples=10)), damped_inverse),
}


def model_values(
    C: LinearOperator, damping: float, g: Float[Tensor, " D"], P: LinearOperator | None, iterations: int
) -> list[float]:
    """Return phi(x_i) = 1/2 x^T (C + damping I) x + g^T x for i = 0, 1, ..., from the iterates themselves."""
    every = IterateGrid(base=1 + 1 / iterations)  # so fine that no iterate is left out
    stop = ResidualTest(relative=1e-4)
    cg = CG(max_iterations=iterations, stop=stop, preconditioner=P, store=every, check_every=1)
    values = {0: 0.0}
    for i, x in cg(C, damping).solve(-g).iterates:
        values[i] = float(0.5 * C.quadratic_form(x.unsqueeze(1)) + 0.5 * damping * x @ x + g @ x)
    return [values[i] for i in sorted(values)]


def table(evaluation: Evaluation, damping: float, iterations: int, names: Sequence[str]) -> str:
    """Return a table of one system."""
    C, g = Exact(GGN()).estimate(evaluation), evaluation.gradient()
    runs = {}
    for name in names:
        approximation, solver = PRECONDITIONERS[name]
        generator = torch.Generator().manual_seed(1)
        P = None if approximation is None else solver(approximation.estimate(evaluation, generator), damping)
        runs[name] = model_values(C, damping, g, P, iterations)
        click.echo(f"{name}: {runs[name][-1]:.6g} after {len(runs[name]) - 1} iterations", err=True)
    lowest = min(min(values) for values in runs.values())
    lines = [
        f"| preconditioner | {' | '.join(f'{share:.1%}' for share in SHARES)} |",
        "|---|" + "---:|" * len(SHARES),
    ]
    for name, values in runs.items():
        counts = (next((i for i, value in enumerate(values) if value <= share * lowest), None) for share in SHARES)
        lines.append(f"| {name} | {' | '.join('-' if count is None else str(count) for count in counts)} |")
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--data", type=click.Path(path_type=Path), envvar="CURVLIB_DATA", help="Folder of the data files.")
@click.option("--problem", default="curves-autoencoder", help="One of `curvlib problems`.")
@click.option("--examples", type=click.IntRange(min=1), default=500, help="In the one batch.")
@click.option("--steps", multiple=True, type=click.IntRange(min=0), default=(0, 30), help="Of K-FAC. Repeatable.")
@click.option("--dampings", multiple=True, type=float, default=(0.1, 0.01), help="Lambda. Repeatable.")
@click.option("--iterations", type=click.IntRange(min=1), default=60, help="Of conjugate gradients at most.")
@click.option("--only", multiple=True, help="Beginning of a preconditioner's name. Repeatable.")
@click.option("--threads", type=click.IntRange(min=1), default=lambda: os.cpu_count() or 1, help="CPU threads.")
def main(*, data: Path | None, problem: str, threads: int, only: tuple[str, ...], **options: Any) -> None:
    """Compare preconditioners on single systems."""
    torch.set_num_threads(threads)
    try:
        chosen = PROBLEMS.get(problem)
        loaded = chosen.load(data)
    except ExperimentError as error:
        raise click.UsageError(str(error)) from error
    names = [name for name in PRECONDITIONERS if not only or name.startswith(only)]
    torch.manual_seed(0)
    objective = Objective(chosen.network.build(), loaded.loss, l2=chosen.l2)
    batch = loaded.train[torch.arange(min(options["examples"], len(loaded.train)))].batch
    optimizer, done = kfac(objective), 0
    click.echo(", ".join(f"{name} {value}" for name, value in machine("cpu", threads).items()) + ".")
    for steps in sorted(options["steps"]):
        for _ in range(steps - done):
            optimizer.step(batch)
        done = steps
        evaluation = objective.at(batch)
        for damping in options["dampings"]:
            click.echo(f"\n{problem}, {len(batch[0])} examples, {steps} steps, lambda {damping:g}:\n")
            click.echo(table(evaluation, damping, options["iterations"], names))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.preconditioned_systems")
