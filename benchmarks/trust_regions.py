"""The command ``python -m benchmarks.trust_regions``: preconditioners and regions of truncated Newton steps.

One auto-encoder, one batch for everything, so that nothing is random but the first weights and drawn labels. All runs
of a seed start from the same weights and have the same work, in gradients of the batch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from benchmarks.report import machine
from curvlib import GGN, Fisher, Hessian, Objective
from curvlib.approximations import KFAC, Approximation, Exact
from curvlib.experiments import PROBLEMS, ExperimentError, Problem
from curvlib.experiments.problems import LoadedProblem
from curvlib.optimizers import Preconditioner, SecondOrderOptimizer, hessian_free, newton_trust_region
from curvlib.solvers import PreconditionerNorm, RelativeFloor, ResidualTest, Steihaug

# Parts of the work at which errors are shown.
MARKS = (1 / 8, 1 / 4, 1 / 2, 1.0)
# Ten drawn labels an example, as in the benchmark of Hessian-free optimisation.
_KFAC = KFAC(Fisher(samples=10))
_STEIHAUG = Steihaug(stop=ResidualTest(relative=1e-3))
_ELLIPSOID = Steihaug(stop=ResidualTest(relative=1e-3), region=PreconditionerNorm())
Maker = Callable[[Objective, "Plan", int], SecondOrderOptimizer]


def _trust_region(curvature: Approximation, descent: Steihaug, preconditioner: Approximation | None) -> Maker:
    def make(objective: Objective, plan: Plan, seed: int) -> SecondOrderOptimizer:
        return newton_trust_region(
            objective,
            curvature=curvature,
            descent=descent,
            preconditioner=preconditioner and Preconditioner(curvature=preconditioner, floor=RelativeFloor(plan.floor)),
            radius=plan.radius,
            seed=seed,
        )

    return make


# name -> (objective, plan, seed) -> optimizer
RUNS: Mapping[str, Maker] = {
    **{
        f"trust region, {matrix}, {name}": _trust_region(Exact(curvature), descent, preconditioner)
        for matrix, curvature in (("GGN", GGN()), ("Hessian", Hessian()))
        for name, descent, preconditioner in (
            ("none", _STEIHAUG, None),
            ("K-FAC, ball", _STEIHAUG, _KFAC),
            ("K-FAC, its norm", _ELLIPSOID, _KFAC),
        )
    },
    "Hessian-free, GGN, none": lambda objective, _, seed: hessian_free(objective, seed=seed),
    "Hessian-free, GGN, K-FAC": lambda objective, _, seed: hessian_free(objective, preconditioner=_KFAC, seed=seed),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run.

    Attributes:
        errors: squared error per image after each part of the work in :data:`MARKS`.
        steps: all of them.
        rejected: of these.
        iterations: of conjugate gradients.
        gradients: the work.
        seconds: of training.
    """

    errors: list[float]
    steps: int
    rejected: int
    iterations: int
    gradients: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all runs share.

    Attributes:
        problem: an auto-encoder.
        examples: the first ones of the training set.
        gradients: the work that ends a run.
        radius: the first one.
        floor: of the damping of preconditioners in trust regions, in mean curvatures.
        threads: CPU threads.
        clock: gives the seconds.
    """

    problem: Problem
    examples: int
    gradients: float
    radius: float
    floor: float
    threads: int
    clock: Callable[[], float]


def train(plan: Plan, loaded: LoadedProblem, make: Maker, seed: int) -> Outcome:
    """Return what a run came to with its work."""
    torch.manual_seed(seed)
    model, batch = plan.problem.network.build(), loaded.train[torch.arange(plan.examples)].batch
    optimizer = make(Objective(model, loaded.loss, l2=plan.problem.l2), plan, seed)
    errors: list[float] = []
    steps, rejected, iterations, gradients, seconds = 0, 0, 0, 0.0, 0.0
    while gradients < plan.gradients:
        start = plan.clock()
        result = optimizer.step(batch)
        seconds += plan.clock() - start
        steps, rejected, iterations = steps + 1, rejected + (not result.accepted), iterations + result.iterations
        gradients += result.gradient_evaluations
        with torch.no_grad():
            error = float(plan.problem.task.metric(model(batch[0]), batch[1]))
        # A step that crosses several marks counts for all of them.
        errors += [error] * sum(gradients >= part * plan.gradients for part in MARKS[len(errors) :])
    return Outcome(
        errors=errors, steps=steps, rejected=rejected, iterations=iterations, gradients=gradients, seconds=seconds
    )


def markdown(plan: Plan, outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """Return a table with the median over the seeds, and the lowest and highest error at the end."""
    facts = ", ".join(f"{name} {value}" for name, value in machine("cpu", plan.threads).items())
    seeds = max(map(len, outcomes.values()))
    marks = [f"{part * plan.gradients:.0f}" for part in MARKS]
    lines = [
        f"{facts}, clock {plan.clock.__name__}.",
        "",
        f"{plan.problem.name}: {plan.problem.network}, {plan.problem.network.parameters:,} parameters, "
        f"{plan.examples:,} images in one batch, l2 {plan.problem.l2:g}, first radius {plan.radius:g}, "
        f"floor {plan.floor:g}, {seeds} seeds.",
        "",
        f"| method, curvature, preconditioner | error after {' | '.join(marks)} gradients | lowest to highest | steps "
        "| rejected | iterations | seconds |",
        "|---|" + "---:|" * (len(MARKS) + 5),
    ]
    for name, runs in outcomes.items():
        errors = [median(column) for column in zip(*(run.errors for run in runs), strict=True)]
        last = [run.errors[-1] for run in runs]
        counts = [median(getattr(run, what) for run in runs) for what in ("steps", "rejected", "iterations", "seconds")]
        shown = " | ".join([*(f"{error:.3g}" for error in errors), f"{min(last):.3g} to {max(last):.3g}"])
        lines.append(f"| {name} | {shown} | {' | '.join(f'{count:.0f}' for count in counts)} |")
    return "\n".join(lines) + "\n"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--data", type=click.Path(path_type=Path), envvar="CURVLIB_DATA", help="Folder of the data files.")
@click.option("--problem", default="digits-autoencoder", help="An auto-encoder of `curvlib problems`.")
@click.option("--examples", type=click.IntRange(min=1), default=500, help="Images in the one batch.")
@click.option("--gradients", type=click.FloatRange(min=1), default=800.0, help="Work that ends a run.")
@click.option("--radius", type=click.FloatRange(min=0, min_open=True), default=1.0, help="The first radius.")
@click.option(
    "--floor", type=click.FloatRange(min=0), default=0.01, help="Least damping of preconditioners, in mean curvatures."
)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), help="Of weights and labels. Repeatable.")
@click.option("--only", default="", help="Runs whose names contain this text.")
@click.option("--processor-time", is_flag=True, help="Count seconds of processor time, on a machine that others use.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=lambda: os.cpu_count() or 1, help="CPU threads.  [default: all]"
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False, writable=True),
    default=Path("results/benchmarks/trust-regions"),
    help="Folder of results.json and results.md.",
)
def main(
    *,
    data: Path | None,
    problem: str,
    seeds: tuple[int, ...],
    only: str,
    processor_time: bool,
    output: Path,
    **options: Any,
) -> None:
    """Train an auto-encoder in trust regions with and without a preconditioner, for the same work.

    The time of evaluations is not counted. Results are written after every run.
    """
    torch.set_num_threads(options["threads"])
    chosen = [name for name in RUNS if only in name]
    try:
        clock = time.process_time if processor_time else time.perf_counter
        plan = Plan(problem=PROBLEMS.get(problem), clock=clock, **options)
        if plan.problem.task.metric.higher_is_better:
            raise ExperimentError(f"{problem} is no auto-encoder: choose one, such as curves-autoencoder.")
        if not chosen:
            raise ExperimentError(f"--only {only!r} fits none of {', '.join(RUNS)}.")
        loaded = plan.problem.load(data)
        if plan.examples > len(loaded.train):
            raise ExperimentError(f"--examples {plan.examples}: {problem} has {len(loaded.train)} training images.")
        output.mkdir(parents=True, exist_ok=True)
    except ExperimentError as error:
        raise click.UsageError(str(error)) from error
    outcomes: dict[str, list[Outcome]] = {}
    for seed, name in product(dict.fromkeys(seeds), chosen):
        outcomes.setdefault(name, []).append(train(plan, loaded, RUNS[name], seed))
        click.echo(f"seed {seed}, {name}: {outcomes[name][-1]}", err=True)
        values = {label: [asdict(run) for run in runs] for label, runs in outcomes.items()}
        (output / "results.json").write_text(json.dumps(values) + "\n")
        (output / "results.md").write_text(markdown(plan, outcomes))
    click.echo(markdown(plan, outcomes))
    click.echo(f"Written to {output}.")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.trust_regions")
