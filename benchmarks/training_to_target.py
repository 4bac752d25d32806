"""Training until a goal is reached, with every setting of a method's grid and from several seeds."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from tqdm import tqdm

from curvlib.experiments import (
    Budget,
    Comparison,
    CurvatureChoice,
    EvaluationSchedule,
    ExperimentError,
    Method,
    Problem,
    Record,
    Status,
    configure,
)
from curvlib.experiments.budgets import Progress
from curvlib.experiments.problems import LoadedProblem
from curvlib.experiments.run import Run
from curvlib.experiments.workload import Workload, check_methods, warm_up, workload_of

# Options that are searched beside the batch size; a method that is not here has the problem's settings.
GRIDS: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "sgd": {"lr": (0.003, 0.01, 0.03, 0.1, 0.3)},
    "adam": {"lr": (0.0003, 0.001, 0.003, 0.01)},
}


class Goal(ABC):
    """What ends a training."""

    training_examples: int

    @abstractmethod
    def value(self, record: Record) -> float:
        """Return the number that is looked at."""

    @abstractmethod
    def is_reached(self, value: float) -> bool:
        """Return whether the number is good enough."""

    @abstractmethod
    def cost(self, value: float) -> float:
        """Return what is lower for a better number."""

    def best(self, values: Sequence[float]) -> float:
        """Return the best of several numbers."""
        return min(values, key=self.cost)

    @abstractmethod
    def text(self, value: float) -> str:
        """Return the number as tables show it."""

    def check(self, problem: Problem) -> None:
        """Raise an ExperimentError if the problem has no such number."""
        del problem


@dataclass(frozen=True, kw_only=True)
class Accuracy(Goal):
    """Accuracy on all test examples.

    Args:
        at_least: in (0, 1].
        training_examples: whose loss is looked at, to notice that a method has diverged.
    """

    at_least: float
    training_examples: int = 100

    def value(self, record: Record) -> float:
        """Return the share of test examples that are recognised."""
        return record.test_metric or 0.0

    def is_reached(self, value: float) -> bool:
        """Return whether enough are."""
        return value >= self.at_least

    def cost(self, value: float) -> float:
        """Return the negative share."""
        return -value

    def text(self, value: float) -> str:
        """Return percents."""
        return f"{value:.2%}"

    def check(self, problem: Problem) -> None:
        """Refuse a problem without an accuracy."""
        if not problem.task.metric.higher_is_better:
            raise ExperimentError(f"{problem.name} has no accuracy: choose a classifier, such as mnist-convnet.")

    def __str__(self) -> str:
        return f"{self.at_least:.2%} of the test examples"


@dataclass(frozen=True, kw_only=True)
class TrainingLoss(Goal):
    """The objective on some training examples, always the same.

    Args:
        at_most: the loss.
        training_examples: how many.
    """

    at_most: float
    training_examples: int = 5000

    def value(self, record: Record) -> float:
        """Return the loss, infinite where it is not finite."""
        return inf if record.loss is None else record.loss

    def is_reached(self, value: float) -> bool:
        """Return whether it is low enough."""
        return value <= self.at_most

    def cost(self, value: float) -> float:
        """Return the loss."""
        return value

    def text(self, value: float) -> str:
        """Return four digits."""
        return f"{value:.4g}"

    def __str__(self) -> str:
        return f"a loss of {self.at_most:g} on {self.training_examples:,} training examples"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all trainings share.

    Args:
        problem: to be trained.
        goal: what ends a training.
        budget: what ends it as well.
        every: what is spent from one evaluation to the next, at least one step.
        seeds: trainings with each setting.
        device: where to train.
        threads: CPU threads.
        timer: the clock of all seconds.

    Raises:
        ExperimentError: the problem has no such goal.
    """

    problem: Problem
    goal: Goal
    budget: Budget
    every: Budget
    seeds: int
    device: str
    threads: int
    timer: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self.goal.check(self.problem)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        texts = {name: str(values[name]) for name in ("goal", "budget", "every")}
        return {**values, **texts, "problem": self.problem.identity(), "timer": self.timer.__name__}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A method as it was asked for, and a point of its grid.

    Attributes:
        method: its name; "kfac:diagonal" is kfac with another curvature, "sgd,batch_size=50" says what an option is,
            "sgd,lr=0.01/0.1" among which values it is searched.
        options: a point of the grid, as (name, value).
    """

    method: str
    options: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.options)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one training went.

    Attributes:
        setting: the method and its options.
        seed: of initial parameters, stream of examples and the method's own randomness.
        reached: whether the target was.
        status: where it ended: running if the target ended it.
        note: why the method could not go on.
        curve: (step, seconds of training, the goal's number) of every evaluation.
    """

    setting: Setting
    seed: int
    reached: bool
    status: str
    note: str | None
    curve: tuple[tuple[int, float, float], ...]

    @property
    def steps(self) -> float:
        """Steps to the target, infinite if it was not reached."""
        return self.curve[-1][0] if self.reached else inf

    @property
    def seconds(self) -> float:
        """Seconds of training to the target, infinite if it was not reached."""
        return self.curve[-1][1] if self.reached else inf

    @property
    def values(self) -> list[float]:
        """The goal's number at every evaluation."""
        return [value for _, _, value in self.curve]

    def __str__(self) -> str:
        outcome = f"{self.steps} steps, {self.seconds:.1f} s" if self.reached else f"not reached, {self.status}"
        return f"seed {self.seed}, {self.setting.method} {self.setting}: {outcome}, at the end {self.values[-1]:.4g}"

    def to_json(self) -> dict[str, Any]:
        """Return the training as JSON values."""
        setting = {"method": self.setting.method, "options": dict(self.setting.options)}
        return {**setting, **{name: value for name, value in vars(self).items() if name != "setting"}}


def settings_of(methods: Sequence[str], batch_sizes: Sequence[int]) -> list[Setting]:
    """Return every batch size with every point of the grid of every method, which may name values of its own.

    Raises:
        ExperimentError: an option is named without a value.
    """
    settings = []
    for method in methods:
        name, *assignments = method.split(",")
        own = {option: text.split("/") for option, text in map(assignment, assignments)}
        axes: dict[str, Sequence[float]] = {"batch_size": batch_sizes, **GRIDS.get(name.partition(":")[0], {})}
        searched = {option: [f"{value:g}" for value in values] for option, values in axes.items()}
        grid = {**searched, **own}
        points = itertools.product(*grid.values())
        settings += [Setting(method=method, options=tuple(zip(grid, point, strict=True))) for point in points]
    return settings


def assignment(text: str) -> tuple[str, str]:
    """Return name and value of an option.

    Raises:
        ExperimentError: one of them is missing.
    """
    name, _, value = text.partition("=")
    if not (name and value):
        raise ExperimentError(f"An option needs NAME=VALUE, such as batch_size=50, got {text!r}.")
    return name, value


def method_of(setting: Setting, problem: Problem) -> Method:
    """Return the method with its options and its curvature.

    Raises:
        ExperimentError: an unknown method, option or curvature.
    """
    name, _, curvature = setting.method.partition(",")[0].partition(":")
    method = configure(name, problem, dict(setting.options))
    return method.with_curvature(CurvatureChoice(approximation=curvature)) if curvature else method


def train_all(plan: Plan, loaded: LoadedProblem, settings: Sequence[Setting]) -> Iterator[Training]:
    """Train with every setting, one seed after the other, and show how it goes on standard error."""
    # Without a terminal there is no bar, and the lines remain.
    with tqdm(total=plan.seeds * len(settings), unit="training", disable=None) as bar:
        for seed, setting in itertools.product(range(plan.seeds), settings):
            bar.set_description(f"{setting.method} {setting}")
            training = train(plan, loaded, setting, seed, bar.set_postfix_str)
            tqdm.write(str(training), file=sys.stderr)
            bar.update()
            yield training


def train(plan: Plan, loaded: LoadedProblem, setting: Setting, seed: int, show: Callable[[str], None]) -> Training:
    """Train until the target is reached, the budget is spent, or the method cannot go on.

    Args:
        plan: what to train, and how long.
        loaded: the problem's data.
        setting: with what.
        seed: of all randomness.
        show: is told how it goes, in a few words.
    """
    method = method_of(setting, plan.problem)
    run = Run(_workload(plan, loaded, method, seed), method)
    curve: list[tuple[int, float, float]] = []
    while True:
        record = run.evaluate()
        value = plan.goal.value(record)
        curve.append((record.step, record.seconds, value))
        show(f"step {record.step}, {plan.goal.text(value)}")
        if plan.goal.is_reached(value) or record.status is not Status.RUNNING:
            break
        _advance(run, plan.every)
    return Training(
        setting=setting,
        seed=seed,
        reached=plan.goal.is_reached(value),
        status=record.status.value,
        note=record.note,
        curve=tuple(curve),
    )


def _advance(run: Run, every: Budget) -> None:
    start = run.progress

    def enough() -> bool:
        now = run.progress
        return every.fraction(Progress(step=now.step - start.step, seconds=now.seconds - start.seconds)) >= 1.0

    run.train_to_next_evaluation(lambda _: None, enough)


def check(plan: Plan, loaded: LoadedProblem, setting: Setting) -> None:
    """Refuse a setting before any training.

    Raises:
        ExperimentError: an unknown method, option or curvature, or one that cannot train the network.
    """
    check_methods(_comparison(plan, loaded, method_of(setting, plan.problem), seed=0), loaded)


def _comparison(plan: Plan, loaded: LoadedProblem, method: Method, seed: int) -> Comparison:
    return Comparison(
        problem=dataclasses.replace(plan.problem, evaluated_examples=len(loaded.test)),
        methods=(method,),
        budget=plan.budget,
        seed=seed,
        data=loaded.fingerprint,
        device=torch.device(plan.device),
        threads=plan.threads,
        schedule=EvaluationSchedule(count=1),  # at the end; the others come from `_advance`
    )


def _workload(plan: Plan, loaded: LoadedProblem, method: Method, seed: int) -> Workload:
    workload = workload_of(_comparison(plan, loaded, method, seed), loaded)
    warm_up(workload)
    some = torch.arange(min(plan.goal.training_examples, len(loaded.train)), device=plan.device)
    return dataclasses.replace(workload, evaluated_train=workload.train[some], timer=plan.timer)
