"""The command ``python -m benchmarks.hessian_free``: the error of Hessian-free training against its iterations.

One auto-encoder, one batch for everything, so that nothing is random but the first weights and drawn labels; for each
seed of these a run with each preconditioner of the conjugate gradients.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from benchmarks.report import machine
from curvlib import Objective
from curvlib.experiments import PROBLEMS, ExperimentError, Problem
from curvlib.experiments.curvatures import PRECONDITIONERS
from curvlib.experiments.methods import RULES
from curvlib.experiments.problems import LoadedProblem
from curvlib.optimizers import hessian_free


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where a run stood after a step.

    Attributes:
        step: steps so far, rejected ones included.
        iterations: of conjugate gradients, in all of them.
        gradients: work in gradients of the batch, by counts of passes through the network.
        seconds: of training.
        loss: the objective before the step (after it, for the last point), the l2 term included.
        error: squared error per image after the step.
        damping: of the step.
    """

    step: int
    iterations: int
    gradients: float
    seconds: float
    loss: float
    error: float
    damping: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all runs share.

    Attributes:
        problem: an auto-encoder.
        examples: the first ones of the training set.
        iterations: of conjugate gradients that end a run.
        most_in_a_step: of them.
        threads: CPU threads.
        clock: gives the seconds.
    """

    problem: Problem
    examples: int
    iterations: int
    most_in_a_step: int
    threads: int
    clock: Callable[[], float]


# Of the steps of the first run, whose lowest error so far the others are to reach.
PARTS = (1 / 4, 1 / 2, 1.0)
# The points of one seed's runs, by the name of the preconditioner, the reference first.
Runs = dict[str, list[Point]]


def train(plan: Plan, loaded: LoadedProblem, name: str, seed: int, enough: float) -> Iterator[Point]:
    """Yield a point after every step, the start first, until the iterations are spent or the error is low enough.

    Args:
        plan: what to train, and how long.
        loaded: the problem's data.
        name: of the preconditioner; "none:martens" with other rules than the preset's.
        seed: of the first weights and of drawn labels.
        enough: an error that ends the run.
    """
    preconditioner, _, rules = name.partition(":")
    own = RULES.get(rules or "short")
    torch.manual_seed(seed)
    model, batch = plan.problem.network.build(), loaded.train[torch.arange(plan.examples)].batch
    optimizer = hessian_free(
        Objective(model, loaded.loss, l2=plan.problem.l2),
        preconditioner=PRECONDITIONERS.get(preconditioner),
        stop=own.stop,
        damping=own.damping(None),
        max_iterations=plan.most_in_a_step,
        seed=seed,
    )
    metric, step, iterations, gradients, seconds = plan.problem.task.metric, 0, 0, 0.0, 0.0
    loss, damping = float(optimizer.objective.value(batch)), 0.0
    while True:
        error = _error(model, metric, batch)
        yield Point(
            step=step,
            iterations=iterations,
            gradients=gradients,
            seconds=seconds,
            loss=loss,
            error=error,
            damping=damping,
        )
        if iterations >= plan.iterations or error <= enough:
            return
        start = plan.clock()
        result = optimizer.step(batch)
        seconds += plan.clock() - start
        step, iterations, gradients = step + 1, iterations + result.iterations, gradients + result.gradient_evaluations
        loss, damping = result.loss + (result.actual or 0.0) * result.accepted, result.damping


def _error(model: nn.Module, metric: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    with torch.no_grad():
        return float(metric(model(batch[0]), batch[1]))


def first(points: Sequence[Point], error: float) -> Point | None:
    """Return the first point with an error as low as that."""
    return next((point for point in points if point.error <= error), None)


def markdown(plan: Plan, results: Mapping[int, Runs]) -> str:
    """Return the tables of each seed, and first one of all where there are several."""
    facts = ", ".join(f"{name} {value}" for name, value in machine("cpu", plan.threads).items())
    network = plan.problem.network
    parts = [
        f"{facts}, clock {plan.clock.__name__}.",
        f"{plan.problem.name}: {network}, {network.parameters:,} parameters, {plan.examples:,} images in one batch, "
        f"l2 {plan.problem.l2:g}, at most {plan.most_in_a_step} iterations a step.",
    ]
    if len(results) > 1:
        parts.append(shares(results))
    for seed, runs in results.items():
        parts += [f"Seed {seed}.", _by_iterations(plan, runs), _to_the_same_error(runs)]
    return "\n\n".join(parts) + "\n"


def shares(results: Mapping[int, Runs]) -> str:
    """Return a table of the shares in all seeds that have run with a preconditioner."""
    name = next(iter(next(iter(results.values()))))
    lines = [
        f"| error of {name} after | preconditioner | iterations | from, to | gradients | from, to | reached |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for part in PARTS:
        for other in dict.fromkeys(label for runs in results.values() for label in runs):
            pairs = [(goal(runs, part), runs[other]) for runs in results.values() if other in runs]
            done = [(own, first(points, own.error)) for own, points in pairs]
            both = [(own, reached) for own, reached in done if reached is not None]
            cells = [f"{len(both)} of {len(done)}"]
            for quantity in ("gradients", "iterations"):
                shares = [getattr(reached, quantity) / getattr(own, quantity) for own, reached in both]
                # a mean of those alone that came so far would flatter
                mean = f"{prod(shares) ** (1 / len(shares)):.2f}" if len(both) == len(done) else "-"
                cells = [mean, f"{min(shares):.2f}, {max(shares):.2f}" if shares else "-", *cells]
            lines.append(f"| {part:g} of its steps | {other} | {' | '.join(cells)} |")
    seeds = ", ".join(map(str, results))
    return f"Shares of what {name} takes to the same error, geometric means of the seeds {seeds}:\n\n" + "\n".join(
        lines
    )


def _by_iterations(plan: Plan, runs: Runs) -> str:
    marks = [round(plan.iterations * part) for part in (0, 1 / 16, 1 / 8, 1 / 4, 1 / 3, 1 / 2, 3 / 4, 1)]
    lines = [
        f"| preconditioner | {' | '.join(map(str, marks))} | steps | seconds |",
        "|---|" + "---:|" * (len(marks) + 2),
    ]
    for name, points in runs.items():
        end = points[-1].iterations
        errors = [min(point.error for point in points if point.iterations <= mark) for mark in marks if mark <= end]
        ends = [f"{error:.4g}" for error in errors] + [""] * (len(marks) - len(errors))
        row = " | ".join(ends)
        lines.append(f"| {name} | {row} | {points[-1].step} | {points[-1].seconds:.0f} |")
    return "Squared error per image, by iterations of conjugate gradients in all steps so far:\n\n" + "\n".join(lines)


def goal(runs: Runs, part: float) -> Point:
    """Return the point of the lowest error of the first run in that part of its steps."""
    reference = next(iter(runs.values()))
    last = reference[max(1, round(part * (len(reference) - 1)))].step
    return min((point for point in reference if point.step <= last), key=lambda point: point.error)


def _to_the_same_error(runs: Runs) -> str:
    name = next(iter(runs))
    lines = [
        f"| error (that of {name} after) | preconditioner | iterations | share | gradients | seconds | steps |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for part in PARTS:
        own = goal(runs, part)
        for other, points in runs.items():
            reached = first(points, own.error)
            row = (
                "- | - | - | - | -"
                if reached is None
                else f"{reached.iterations} | {reached.iterations / own.iterations:.2f} | {reached.gradients:.0f} | "
                f"{reached.seconds:.0f} | {reached.step}"
            )
            lines.append(f"| {own.error:.4g} ({own.iterations}) | {other} | {row} |")
    return "What it takes to come to the same error:\n\n" + "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--data", type=click.Path(path_type=Path), envvar="CURVLIB_DATA", help="Folder of the data files.")
@click.option("--problem", default="curves-autoencoder", help="An auto-encoder of `curvlib problems`.")
@click.option(
    "--preconditioners",
    multiple=True,
    default=(*PRECONDITIONERS, "kfac:shorter", "none:martens"),
    help="With :shorter solves that end sooner, with :martens his rules. Repeatable.",
)
@click.option("--examples", type=click.IntRange(min=1), default=1000, help="Images in the one batch.")
@click.option("--iterations", type=click.IntRange(min=1), default=1000, help="Conjugate gradients that end a run.")
@click.option("--most-in-a-step", type=click.IntRange(min=1), default=250, help="Conjugate gradients a step at most.")
@click.option(
    "--seed", "seeds", type=int, multiple=True, default=(0,), help="Of the first weights and drawn labels. Repeatable."
)
@click.option("--processor-time", is_flag=True, help="Count seconds of processor time, on a machine that others use.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=lambda: os.cpu_count() or 1, help="CPU threads.  [default: all]"
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False, writable=True),
    default=Path("results/benchmarks/hessian-free"),
    help="Folder of results.json and results.md.",
)
def main(
    *,
    data: Path | None,
    problem: str,
    preconditioners: tuple[str, ...],
    seeds: tuple[int, ...],
    processor_time: bool,
    output: Path,
    **options: Any,
) -> None:
    """Train an auto-encoder by Hessian-free optimisation with several preconditioners.

    Every run but the first ends where it has come to the lowest error of the first, with the same seed. The time of
    evaluations is not counted. Results are written after every step.
    """
    torch.set_num_threads(options["threads"])
    try:
        plan = Plan(
            problem=PROBLEMS.get(problem),
            clock=time.process_time if processor_time else time.perf_counter,
            **options,
        )
        if plan.problem.task.metric.higher_is_better:
            raise ExperimentError(f"{problem} is no auto-encoder: choose one, such as curves-autoencoder.")
        for name in preconditioners:
            PRECONDITIONERS.get(name.partition(":")[0])
            RULES.get(name.partition(":")[2] or "short")
        loaded = plan.problem.load(data)
        if plan.examples > len(loaded.train):
            raise ExperimentError(f"--examples {plan.examples}: {problem} has {len(loaded.train)} training images.")
        output.mkdir(parents=True, exist_ok=True)
    except ExperimentError as error:
        raise click.UsageError(str(error)) from error
    results: dict[int, Runs] = {}
    for seed, name in product(dict.fromkeys(seeds), preconditioners):
        runs = results.setdefault(seed, {})
        enough = min((point.error for point in next(iter(runs.values()), [])), default=0.0)
        runs[name] = []
        for point in train(plan, loaded, name, seed, enough):
            runs[name].append(point)
            click.echo(f"seed {seed}, {name}: {point}", err=True)
            (output / "results.json").write_text(json.dumps(_plain(results)) + "\n")
        (output / "results.md").write_text(markdown(plan, results))
    click.echo(markdown(plan, results))
    click.echo(f"Written to {output}.")


def _plain(results: Mapping[int, Runs]) -> dict[int, dict[str, list[dict[str, Any]]]]:
    return {
        seed: {name: [asdict(point) for point in points] for name, points in runs.items()}
        for seed, runs in results.items()
    }


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.hessian_free")
