"""Comparison of methods on one problem: the same data, the same initial parameters, the same budget."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from curvlib.experiments.budgets import Budget, EvaluationSchedule
from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.methods import Method
from curvlib.experiments.problems import Problem
from curvlib.experiments.records import Record


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared, and how.

    Args:
        problem: to be trained.
        methods: with which, in this order.
        budget: of every method.
        seed: of initial parameters, data order and all randomness in training.
        device: where to train.
        threads: CPU threads, or None for PyTorch's own choice.
        schedule: when to evaluate.
        data: fingerprint of the loaded data, where a user brings them along.

    Raises:
        ExperimentError: no method, a method twice, or a negative seed or no threads.
    """

    problem: Problem
    methods: tuple[Method, ...]
    budget: Budget
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int | None = None
    schedule: EvaluationSchedule = field(default_factory=EvaluationSchedule)
    data: str | None = None

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        if not names or len(set(names)) < len(names):
            raise ExperimentError(f"methods needs one or more different methods, got {names}.")
        if not 0 <= self.seed < 2**31:
            raise ExperimentError(f"seed must be at least 0 and below 2^31, got {self.seed}.")
        if self.threads is not None and self.threads < 1:
            raise ExperimentError(f"threads must be at least 1, got {self.threads}.")

    def settings(self) -> dict[str, str]:
        """Return, as text, everything that the records depend on; a resumed comparison must have the same."""
        return {
            **self.problem.identity(),
            **({} if self.data is None else {"data": self.data}),
            "method": ", ".join(method.name for method in self.methods),
            "budget": str(self.budget),
            "seed": str(self.seed),
            "device": str(self.device),
            "threads": str(self.threads),
            "evaluations": str(self.schedule.count),
            **{f"{method.name}.{key}": text for method in self.methods for key, text in method.settings().items()},
        }


class Monitor:
    """Is told how a comparison goes; this one does nothing, a subclass shows it."""

    def started(self, method: Method) -> None:
        """A method begins, or goes on."""

    def advanced(self, method: Method, fraction: float) -> None:
        """A step was taken; fraction is the part of the budget that is spent."""

    def recorded(self, method: Method, record: Record) -> None:
        """The network was evaluated."""

    def stopping(self) -> None:
        """The first interrupt has come, and the comparison ends after the current step.

        It is called inside a signal handler, at any moment.
        """


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a comparison gave.

    Args:
        records: all of them, methods in the order of the comparison.
        interrupted: whether it was stopped by a signal before its end.
    """

    records: tuple[Record, ...]
    interrupted: bool
