"""The command ``python -m benchmarks.newton_peers``: gradients to the same loss, beside SciPy and hessianfree.

One network, one batch, one start, float64: curvlib's Hessian-free optimisation, SciPy's Newton methods with exact
products of the Hessian or the GGN, and the package ``hessianfree`` of D. Rasmussen, where it is installed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from math import inf, prod
from pathlib import Path
from typing import Any

import click
import numpy as np
import scipy.optimize
import torch
from torch import nn

from benchmarks.report import machine
from curvlib import GGN, Fisher, Hessian, Objective
from curvlib.approximations import KFAC, Exact
from curvlib.experiments import PROBLEMS
from curvlib.optimizers import hessian_free
from curvlib.solvers import LevenbergMarquardt, ProgressTest, RelativeStart

# A forward pass is a third of a gradient, a backward pass two, as curvlib counts its own work. A product of hessianfree
# is a forward pass of derivatives, with two matrix products a layer, and a backward pass.
_FORWARD, _BACKWARD = 1 / 3, 2 / 3
_PRODUCT = 2 * _BACKWARD


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where a run stood after an iteration.

    Attributes:
        gradients: work so far, in gradients of the batch.
        seconds: so far, without what is done for the record alone.
        loss: of the batch.
    """

    gradients: float
    seconds: float
    loss: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """The problem that all minimise: the mean loss of a network on one batch.

    Attributes:
        widths: units of every layer, input first.
        inputs: (N, d_in), float64.
        targets: (N, C) numbers, which are one-hot for a classifier.
        classifier: softmax outputs and cross-entropy; otherwise logistic outputs and half the squared error.
        seed: of the first weights.
    """

    widths: tuple[int, ...]
    inputs: torch.Tensor
    targets: torch.Tensor
    classifier: bool
    seed: int = 0

    def objective(self) -> Objective:
        """Return the objective at the start of the seed, the same parameters at every call."""
        torch.manual_seed(self.seed)
        layers: list[nn.Module] = []
        for d_in, d_out in zip(self.widths, self.widths[1:], strict=False):
            linear = nn.Linear(d_in, d_out)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.Tanh()]
        model = nn.Sequential(*layers[:-1], *([] if self.classifier else [nn.Sigmoid()])).double()
        return Objective(model, nn.CrossEntropyLoss() if self.classifier else nn.MSELoss())

    @property
    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, targets) of curvlib's objective."""
        return self.inputs, self.targets.argmax(1) if self.classifier else self.targets

    @property
    def scale(self) -> float:
        """Loss over curvlib's objective, whose squared error is a mean over all entries."""
        return 1.0 if self.classifier else self.widths[-1] / 2

    def __str__(self) -> str:
        loss = "cross-entropy" if self.classifier else "half the squared error per image"
        return f"{'-'.join(map(str, self.widths))}, tanh, {loss}, {len(self.inputs)} images, float64"


@dataclass(eq=False)
class Meter:
    """Work and time of a run, and its points."""

    budget: float
    clock: Callable[[], float]
    gradients: float = 0.0
    points: list[Point] = field(default_factory=list)
    _start: float = 0.0
    _paused: float = 0.0

    def start(self) -> None:
        """Begin to count seconds."""
        self._start = self.clock()

    def note(self, loss: float, since: float | None = None) -> None:
        """Add a point.

        Args:
            loss: of the batch.
            since: when what is done for the record alone began.

        Raises:
            EnoughError: the budget is spent.
        """
        now = self.clock() if since is None else since
        self.points.append(Point(gradients=self.gradients, seconds=now - self._start - self._paused, loss=loss))
        self._paused += self.clock() - now
        if self.gradients >= self.budget:
            raise EnoughError


class EnoughError(Exception):
    """The budget is spent."""


def curvlib_run(subject: Subject, meter: Meter, **options: Any) -> None:
    """Take steps of the preset."""
    objective = subject.objective()
    optimizer = hessian_free(objective, **options)
    meter.start()
    while True:
        result = optimizer.step(subject.batch)
        meter.gradients += result.gradient_evaluations
        loss = result.loss + (result.actual or 0.0) * result.accepted
        meter.note(subject.scale * loss)


def scipy_run(subject: Subject, meter: Meter, *, method: str, matrix: Any) -> None:
    """Minimise with SciPy; value, gradient and products at one x share curvlib's evaluation, and its count of work."""
    objective, batch = subject.objective(), subject.batch
    kept: dict[str, Any] = {}

    def at(x: np.ndarray) -> Any:
        if "x" not in kept or not np.array_equal(kept["x"], x):
            with torch.no_grad():
                objective.layout.write(objective.parameters, torch.from_numpy(x.copy()))
            evaluation = objective.at(batch)
            meter.gradients += evaluation.work
            kept.update(x=x.copy(), evaluation=evaluation, operator=None)
        return kept["evaluation"]

    def counted(evaluation: Any, call: Callable[[], torch.Tensor]) -> np.ndarray:
        before = evaluation.work
        result = call().numpy().copy()
        meter.gradients += evaluation.work - before
        return result

    def gradient(x: np.ndarray) -> np.ndarray:
        evaluation = at(x)
        return counted(evaluation, evaluation.gradient)

    def product(x: np.ndarray, v: np.ndarray) -> np.ndarray:
        evaluation = at(x)
        if kept["operator"] is None:
            kept["operator"] = Exact(matrix).estimate(evaluation)
        return counted(evaluation, lambda: kept["operator"] @ torch.from_numpy(v.copy()))

    twin = subject.objective()  # writing into the model itself would spoil what is kept

    def note(x: np.ndarray) -> None:
        since = meter.clock()
        twin.layout.write(twin.parameters, torch.from_numpy(x.copy()))
        meter.note(subject.scale * float(twin.value(batch)), since)

    start = objective.parameter_vector().numpy().copy()
    meter.start()
    scipy.optimize.minimize(
        lambda x: float(at(x).value), start, method=method, jac=gradient, hessp=product, callback=note
    )


def hessianfree_run(subject: Subject, meter: Meter) -> None:
    """Take updates of the package ``hessianfree``, with its default settings."""
    package = import_module("hessianfree")

    class Counted(package.FFNet):
        """Its network, with a count of passes."""

        def forward(self, *arguments: Any, **options: Any) -> Any:
            meter.gradients += _FORWARD
            return super().forward(*arguments, **options)

        def calc_grad(self) -> Any:
            meter.gradients += _BACKWARD
            return super().calc_grad()

        def calc_G(self, *arguments: Any, **options: Any) -> Any:  # noqa: N802 - its name
            meter.gradients += _PRODUCT
            return super().calc_G(*arguments, **options)

    losses, layers = package.loss_funcs, package.nl
    objective = subject.objective()
    weights = [layer for layer in objective.model if isinstance(layer, nn.Linear)]
    network = Counted(
        list(subject.widths),
        layers=[
            layers.Linear(),
            *(layers.Tanh() for _ in weights[:-1]),
            layers.Softmax() if subject.classifier else layers.Logistic(),
        ],
        loss_type=losses.CrossEntropy() if subject.classifier else losses.SquaredError(),
        load_weights=np.concatenate([_flat(layer) for layer in weights]),
        dtype=np.float64,
    )
    network.optimizer = package.opt.HessianFree(plotting=False)
    inputs, targets = subject.inputs.numpy(), subject.targets.numpy()
    meter.start()
    while True:
        network.cache_minibatch(inputs, targets)
        network.W += network.optimizer.compute_update()
        since, gradients = meter.clock(), meter.gradients
        network.activations = None
        loss = float(network.error())
        meter.gradients = gradients  # the loss after the update is for the record
        meter.note(loss, since)


def _flat(layer: nn.Linear) -> np.ndarray:
    """Return the weights in the order of hessianfree: (d_in, d_out), then the biases."""
    return np.concatenate([layer.weight.detach().T.reshape(-1).numpy(), layer.bias.detach().numpy()])


Run = Callable[[Subject, Meter], None]
RUNS: Mapping[str, Run] = {
    "curvlib: hessian_free": curvlib_run,
    "curvlib: hessian_free, K-FAC preconditioner": lambda subject, meter: curvlib_run(
        subject, meter, preconditioner=KFAC(Fisher(samples=10))
    ),
    "curvlib: hessian_free, Martens's rules": lambda subject, meter: curvlib_run(
        subject, meter, stop=ProgressTest(), damping=LevenbergMarquardt.martens(initial=RelativeStart(0.3))
    ),
    "hessianfree": hessianfree_run,
    **{
        f"SciPy: {method}, {name} products": (
            lambda subject, meter, method=method, matrix=matrix: scipy_run(subject, meter, method=method, matrix=matrix)
        )
        for method in ("Newton-CG", "trust-ncg", "trust-krylov")
        for name, matrix in (("Hessian", Hessian()), ("GGN", GGN()))
    },
}


def subjects() -> Iterator[tuple[str, Subject, tuple[float, ...]]]:
    """Yield name, problem and the losses to reach."""
    images = PROBLEMS.get("digits-classifier").load().train
    pixels, labels = images.inputs.double(), nn.functional.one_hot(images.targets, 10).double()
    yield (
        "classifier",
        Subject(widths=(64, 100, 50, 10), inputs=pixels, targets=labels, classifier=True),
        (0.3, 0.1, 0.03, 0.01, 0.001),
    )
    yield (
        "auto-encoder",
        Subject(widths=(64, 100, 50, 10, 50, 100, 64), inputs=pixels, targets=pixels, classifier=False),
        (3.0, 2.0, 1.0, 0.7, 0.5),
    )


def run(subject: Subject, call: Run, budget: float, clock: Callable[[], float]) -> tuple[list[Point], str]:
    """Return the points of a run and how it ended."""
    meter = Meter(budget=budget, clock=clock)
    try:
        call(subject, meter)
    except EnoughError:
        return meter.points, "budget"
    except ModuleNotFoundError as error:
        return [], f"{error.name} is not installed"
    return meter.points, "ended by itself"


def markdown(results: Mapping[str, Any], facts: str) -> str:
    """Return a table for each problem."""
    parts = [facts]
    for name, result in results.items():
        goals = result["losses"]
        lines = [
            f"| method | {' | '.join(f'{goal:g}' for goal in goals)} | lowest loss | seconds | end |",
            "|---|" + "---:|" * (len(goals) + 2) + "---|",
        ]
        for method, runs in result["runs"].items():
            cells = [_gradients_to([points for points, _ in runs], goal) for goal in goals]
            lowest = _mean([min((point.loss for point in points), default=inf) for points, _ in runs])
            seconds = _mean([points[-1].seconds if points else 0.0 for points, _ in runs])
            ends = ", ".join(dict.fromkeys(end for _, end in runs))
            lines.append(f"| {method} | {' | '.join(cells)} | {lowest:.2g} | {seconds:.1f} | {ends} |")
        seeds = ", ".join(map(str, result["seeds"]))
        title = f"{name}: {result['subject']}; geometric means of the seeds {seeds}. Gradients to a loss of"
        parts += [title, "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _gradients_to(runs: list[list[Point]], loss: float) -> str:
    """Return the mean, or - where a run does not come so far: without it the others' mean would flatter."""
    reached = [next((point.gradients for point in points if point.loss <= loss), inf) for points in runs]
    return "-" if inf in reached else f"{_mean(reached):.0f}"


def _mean(values: Sequence[float]) -> float:
    return prod(values) ** (1 / len(values))


def _plain(runs: Mapping[str, list[tuple[list[Point], str]]]) -> dict[str, list[Any]]:
    return {method: [[list(map(asdict, points)), end] for points, end in own] for method, own in runs.items()}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--only", multiple=True, help="Beginning of a method's name. Repeatable.")
@click.option("--budget", type=click.FloatRange(0, min_open=True), default=3000.0, help="Gradients of one run.")
@click.option("--processor-time", is_flag=True, help="Count seconds of processor time, on a machine that others use.")
@click.option("--threads", type=click.IntRange(min=1), default=lambda: os.cpu_count() or 1, help="CPU threads.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False, writable=True),
    default=Path("results/benchmarks/newton-peers"),
    help="Folder of results.json and results.md.",
)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), help="Of the first weights. Repeatable.")
def main(
    *, only: tuple[str, ...], seeds: tuple[int, ...], budget: float, processor_time: bool, threads: int, output: Path
) -> None:
    """Count the gradients that Newton methods need to the same loss from the same start."""
    torch.set_num_threads(threads)
    clock = time.process_time if processor_time else time.perf_counter
    chosen = {name: call for name, call in RUNS.items() if not only or name.startswith(only)}
    if not chosen:
        raise click.UsageError(f"--only: none of {', '.join(RUNS)} begins so.")
    versions = {"scipy": scipy.__version__, **machine("cpu", threads), "clock": clock.__name__}
    facts = ", ".join(f"{name} {value}" for name, value in versions.items()) + f"; at most {budget:g} gradients."
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name, subject, goals in subjects():
        results[name] = {"subject": str(subject), "losses": goals, "seeds": list(dict.fromkeys(seeds)), "runs": {}}
        for method, call in chosen.items():
            runs = results[name]["runs"].setdefault(method, [])
            for seed in results[name]["seeds"]:
                points, end = run(replace(subject, seed=seed), call, budget, clock)
                runs.append((points, end))
                click.echo(f"{name}, {method}, seed {seed}: {end}, {points[-1] if points else ''}", err=True)
    values = {name: {**result, "runs": _plain(result["runs"])} for name, result in results.items()}
    (output / "results.json").write_text(json.dumps(values) + "\n")
    (output / "results.md").write_text(markdown(results, facts))
    click.echo(markdown(results, facts))
    click.echo(f"Written to {output}.")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.newton_peers")
