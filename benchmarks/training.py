"""The command ``python -m benchmarks.training``: steps and seconds to a test accuracy or to a training loss.

K-FAC beside first-order methods whose learning rates are searched: all train a network from the same initial parameters
on the same stream of examples.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from math import inf
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from benchmarks.report import machine
from benchmarks.training_to_target import (
    Accuracy,
    Goal,
    Plan,
    Setting,
    Training,
    TrainingLoss,
    assignment,
    check,
    method_of,
    settings_of,
    train_all,
)
from curvlib.experiments import PROBLEMS, ExperimentError, Seconds, Steps

Measure = Callable[[Training], float]
# What it took to reach the target.
MEASURES: Mapping[str, Measure] = {"steps": attrgetter("steps"), "seconds": attrgetter("seconds")}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--data", type=click.Path(path_type=Path), envvar="CURVLIB_DATA", help="Folder of the data files.")
@click.option("--problem", default="mnist-convnet", help="One of the problems of `curvlib problems`.")
@click.option("--set", "assignments", multiple=True, metavar="OPTION=VALUE", help="Of the problem. Repeatable.")
@click.option(
    "--methods",
    multiple=True,
    default=("kfac", "sgd", "adam"),
    help="A method of `curvlib methods`; with another curvature: kfac:diagonal; with options, or values to search: "
    "sgd,batch_size=50,lr=0.01/0.03. Repeatable.",
)
@click.option("--batch-sizes", multiple=True, type=click.IntRange(min=1), default=(250, 1000), help="Repeatable.")
@click.option("--target", type=click.FloatRange(0, 1, min_open=True), default=0.985, help="Test accuracy to reach.")
@click.option("--training-loss", type=float, help="Loss on 5,000 training examples to reach, in place of an accuracy.")
@click.option("--max-steps", type=click.IntRange(min=1), default=1000, help="Steps of one training at most.")
@click.option("--every", type=click.IntRange(min=1), default=10, help="Steps between two evaluations.")
@click.option("--max-seconds", type=float, help="Seconds of one training at most, in place of --max-steps.")
@click.option("--every-seconds", type=float, help="Seconds between two evaluations, in place of --every.")
@click.option("--processor-time", is_flag=True, help="Count seconds of processor time, on a machine that others use.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, help="Trainings with each setting.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=lambda: os.cpu_count() or 1, help="CPU threads.  [default: all]"
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to train.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False, writable=True),
    default=Path("results/benchmarks/training"),
    help="Folder of results.json and results.md.",
)
def main(
    *,
    data: Path | None,
    problem: str,
    methods: tuple[str, ...],
    assignments: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    target: float,
    training_loss: float | None,
    max_steps: int,
    max_seconds: float | None,
    every: int,
    every_seconds: float | None,
    processor_time: bool,
    output: Path,
    **options: Any,
) -> None:
    """Count steps and seconds to a goal, with the best setting of every method.

    The time of evaluations is not counted. Results are written after every training.
    """
    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: PyTorch sees no GPU here; use --device cpu.")
    if options["device"] == "cuda" and processor_time:
        raise click.UsageError("--processor-time does not count a GPU's work: leave it out with --device cuda.")
    trainings: list[Training] = []
    try:
        goal = Accuracy(at_least=target) if training_loss is None else TrainingLoss(at_most=training_loss)
        plan = Plan(
            problem=PROBLEMS.get(problem).with_options(dict(map(assignment, assignments))),
            goal=goal,
            budget=Steps(max_steps) if max_seconds is None else Seconds(max_seconds),
            every=Steps(every) if every_seconds is None else Seconds(every_seconds),
            timer=time.process_time if processor_time else time.perf_counter,
            **options,
        )
        settings = settings_of(methods, batch_sizes)
        for setting in settings:
            method_of(setting, plan.problem)
        loaded = plan.problem.load(data)
        for setting in settings:
            check(plan, loaded, setting)
        output.mkdir(parents=True, exist_ok=True)
        write(output, plan, trainings)
    except ExperimentError as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        raise click.UsageError(f"--output {output}: {error.strerror}; name a folder that can be written.") from error
    torch.set_num_threads(plan.threads)
    for training in train_all(plan, loaded, settings):
        trainings.append(training)
        write(output, plan, trainings)
    click.echo(markdown(plan, trainings))
    click.echo(f"Written to {output}.")


def write(folder: Path, plan: Plan, trainings: Sequence[Training]) -> None:
    """Write both files; called after every training, so that an interrupted run keeps what it has."""
    values = {
        "environment": _environment(plan),
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
    facts = ", ".join(f"{name} {value}" for name, value in _environment(plan).items())
    network, looks = plan.problem.network, f"looked at every {plan.every} for {plan.budget} at most"
    parts = [
        f"{facts}.",
        f"{plan.problem.name}: {network}, {network.parameters:,} parameters; target: {plan.goal}, {looks}.",
        *(_best_settings(name, measure, groups, plan.goal) for name, measure in MEASURES.items()),
        _all_settings(groups, plan.goal),
    ]
    return "\n\n".join(parts) + "\n"


def _environment(plan: Plan) -> dict[str, Any]:
    return {**machine(plan.device, plan.threads), "clock": plan.timer.__name__}


def _best_settings(name: str, measure: Measure, groups: Mapping[Setting, Sequence[Training]], goal: Goal) -> str:
    def order(item: tuple[Setting, Sequence[Training]]) -> tuple[float, float]:
        return _median(measure, item[1]), goal.cost(_best(item[1], goal))

    best: dict[str, Setting] = {}
    for setting, _ in sorted(groups.items(), key=order):
        best.setdefault(setting.method, setting)
    rows = []
    for method, setting in best.items():
        values = sorted(map(measure, groups[setting]))
        middle, low, high = map(_number, (median(values), values[0], values[-1]))
        rows.append(f"| {method} | {middle} | {low} to {high} | {_reached(groups[setting])} | {setting} |")
    head = [f"| method | {name} to the target | lowest to highest | reached | setting |", "|---|---:|---:|---:|---|"]
    return "\n".join([*head, *rows])


def _all_settings(groups: Mapping[Setting, Sequence[Training]], goal: Goal) -> str:
    rows = []
    for setting, group in groups.items():
        middles = " | ".join(_number(_median(measure, group)) for measure in MEASURES.values())
        rows.append(
            f"| {setting.method} | {setting} | {middles} | {_reached(group)} | {goal.text(_best(group, goal))} |"
        )
    head = [
        f"| method | setting | {' | '.join(MEASURES)} | reached | best value |",
        "|---|---|---:|---:|---:|---:|",
    ]
    return "\n".join([*head, *rows])


def _median(measure: Measure, group: Sequence[Training]) -> float:
    return median(map(measure, group))


def _best(group: Sequence[Training], goal: Goal) -> float:
    return median(goal.best(training.values) for training in group)


def _reached(group: Sequence[Training]) -> str:
    return f"{sum(training.reached for training in group)} of {len(group)}"


def _number(value: float) -> str:
    return "-" if value == inf else f"{value:.4g}"


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.training")
