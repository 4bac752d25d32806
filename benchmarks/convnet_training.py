"""The command ``python -m benchmarks.convnet_training``: steps and seconds to a test accuracy.

K-FAC beside first-order methods whose learning rates are searched: all train a convolutional network from the same
initial parameters on the same stream of examples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from math import inf
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from benchmarks.report import machine
from benchmarks.training_to_target import Plan, Setting, Training, settings_of, train_all
from curvlib.experiments import METHODS, PROBLEMS, ExperimentError

Measure = Callable[[Training], float]
# What it took to reach the target.
MEASURES: Mapping[str, Measure] = {"steps": attrgetter("steps"), "seconds": attrgetter("seconds")}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--data", type=click.Path(path_type=Path), envvar="CURVLIB_DATA", help="Folder of the data files.")
@click.option("--problem", default="mnist-convnet", help="A classifier among the problems of `curvlib problems`.")
@click.option(
    "--methods", multiple=True, type=click.Choice(tuple(METHODS)), default=("kfac", "sgd", "adam"), help="Repeatable."
)
@click.option("--batch-sizes", multiple=True, type=click.IntRange(min=1), default=(250, 1000), help="Repeatable.")
@click.option("--target", type=click.FloatRange(0, 1, min_open=True), default=0.985, help="Test accuracy to reach.")
@click.option("--max-steps", type=click.IntRange(min=1), default=1000, help="Steps of one training at most.")
@click.option("--every", type=click.IntRange(min=1), default=10, help="Steps between two evaluations.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, help="Trainings with each setting.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=lambda: os.cpu_count() or 1, help="CPU threads.  [default: all]"
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to train.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False, writable=True),
    default=Path("results/benchmarks/convnet-training"),
    help="Folder of results.json and results.md.",
)
def main(
    *,
    data: Path | None,
    problem: str,
    methods: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    output: Path,
    **options: Any,
) -> None:
    """Count steps and seconds to a test accuracy, with the best setting of every method.

    The time of evaluations is not counted. Results are written after every training.
    """
    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: PyTorch sees no GPU here; use --device cpu.")
    trainings: list[Training] = []
    try:
        plan = Plan(problem=PROBLEMS.get(problem), **options)
        loaded = plan.problem.load(data)
        output.mkdir(parents=True, exist_ok=True)
        write(output, plan, trainings)
    except ExperimentError as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        raise click.UsageError(f"--output {output}: {error.strerror}; name a folder that can be written.") from error
    torch.set_num_threads(plan.threads)
    for training in train_all(plan, loaded, settings_of(methods, batch_sizes)):
        trainings.append(training)
        write(output, plan, trainings)
    click.echo(markdown(plan, trainings))
    click.echo(f"Written to {output}.")


def write(folder: Path, plan: Plan, trainings: Sequence[Training]) -> None:
    """Write both files; called after every training, so that an interrupted run keeps what it has."""
    values = {
        "environment": machine(plan.device, plan.threads),
        "plan": plan.to_json(),
        "trainings": [training.to_json() for training in trainings],
    }
    (folder / "results.json").write_text(json.dumps(values) + "\n")
    (folder / "results.md").write_text(markdown(plan, trainings))


def markdown(plan: Plan, trainings: Sequence[Training]) -> str:
    """Return a table of the best setting of every method for either measure, and one of all settings.

    The best setting has the lowest median over its seeds; a training that did not reach the target counts as infinite.
    """
    groups: dict[Setting, list[Training]] = {}
    for training in trainings:
        groups.setdefault(training.setting, []).append(training)
    facts = ", ".join(f"{name} {value}" for name, value in machine(plan.device, plan.threads).items())
    network, looks = plan.problem.network, f"looked at every {plan.every} steps until step {plan.max_steps}"
    parts = [
        f"{facts}.",
        f"{plan.problem.name}: {network}, {network.parameters:,} parameters; target {plan.target:.2%} of the test "
        f"images, {looks}.",
        *(_best_settings(name, measure, groups) for name, measure in MEASURES.items()),
        _all_settings(groups),
    ]
    return "\n\n".join(parts) + "\n"


def _best_settings(name: str, measure: Measure, groups: Mapping[Setting, Sequence[Training]]) -> str:
    best: dict[str, Setting] = {}
    for setting, _ in sorted(groups.items(), key=lambda item: (_median(measure, item[1]), -_accuracy(item[1]))):
        best.setdefault(setting.method, setting)
    rows = []
    for method, setting in best.items():
        values = sorted(map(measure, groups[setting]))
        middle, low, high = map(_number, (median(values), values[0], values[-1]))
        rows.append(f"| {method} | {middle} | {low} to {high} | {_reached(groups[setting])} | {setting} |")
    head = [f"| method | {name} to the target | lowest to highest | reached | setting |", "|---|---:|---:|---:|---|"]
    return "\n".join([*head, *rows])


def _all_settings(groups: Mapping[Setting, Sequence[Training]]) -> str:
    rows = []
    for setting, group in groups.items():
        middles = " | ".join(_number(_median(measure, group)) for measure in MEASURES.values())
        rows.append(f"| {setting.method} | {setting} | {middles} | {_reached(group)} | {_accuracy(group):.2%} |")
    head = [
        f"| method | setting | {' | '.join(MEASURES)} | reached | highest accuracy |",
        "|---|---|---:|---:|---:|---:|",
    ]
    return "\n".join([*head, *rows])


def _median(measure: Measure, group: Sequence[Training]) -> float:
    return median(map(measure, group))


def _accuracy(group: Sequence[Training]) -> float:
    return median(training.highest_accuracy for training in group)


def _reached(group: Sequence[Training]) -> str:
    return f"{sum(training.reached for training in group)} of {len(group)}"


def _number(value: float) -> str:
    return "-" if value == inf else f"{value:.4g}"


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.convnet_training")
