"""Damped inverses whose statistics come from running averages and which are not made anew at every step.

Symbols: C curvature operator, lambda damping.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.approximations import Approximation, RunningAverage, StatisticalApproximation, running_average
from curvlib.objective import Evaluation, Objective
from curvlib.operators import LinearOperator, operator_from_state_dict
from curvlib.operators.state import check_entries
from curvlib.optimizers.layer_damping import SolverForModel, bound
from curvlib.optimizers.proposal import (
    Solver,
    check_approximation,
    probed_mean_curvature,
    refuse_indefinite,
    refuse_parts_of_sums,
    take_statistics,
)
from curvlib.optimizers.situation import Situation, check_fraction
from curvlib.optimizers.step_state import StepState
from curvlib.solvers import SolveError, damped_inverse

# An inverse made with another damping is made anew once the damping has moved by this factor.
_STALE_DAMPING = 2.0
# Refreshes of an inverse that may fail one after another while the last good one is still used.
_FAILURE_BUDGET = 5


class InverseState(StepState):
    """The running state of an inverse in one optimizer."""

    @abstractmethod
    def inverse(self, situation: Situation) -> tuple[LinearOperator, LinearOperator]:
        """Return C and its damped inverse for the situation, and update the state."""

    @abstractmethod
    def mean_curvature(self, generator: torch.Generator) -> float:
        """Return trace(C) / D of the last C, or an unbiased estimate."""


@dataclass(frozen=True, kw_only=True)
class AmortisedInverse:
    """The configuration of an inverse; :meth:`start_inverse` makes the state of one optimizer.

    Args:
        curvature: the approximation; one with a ``running_average`` is averaged over steps, another estimated anew
            each step.
        solver: (C, lambda) -> inverse.
        fraction: part of the batch that statistics are made of.
        decay: of the moving average of statistics, for each step: one statistic in m steps decays by decay^m.
        statistics_every: steps from one statistic to the next.
        inverse_every: steps from one inverse to the next.
    """

    curvature: Approximation
    solver: Solver | SolverForModel = damped_inverse
    fraction: float = 1 / 8
    decay: float = 0.95
    statistics_every: int = 1
    inverse_every: int = 20

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_approximation(owner, "curvature", self.curvature)
        if not (callable(self.solver) or isinstance(self.solver, SolverForModel)):
            raise TypeError(
                f"{owner} needs a solver (C, damping) -> inverse such as damped_inverse or FactoredTikhonov(), got "
                f"{self.solver!r}."
            )
        refuse_indefinite(owner, "curvature", self.curvature, self.solver)
        check_fraction(owner, "fraction", self.fraction)
        if not 0 <= self.decay < 1:
            raise ValueError(f"{owner} needs 0 <= decay < 1, got {self.decay!r}.")
        for name in ("statistics_every", "inverse_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{owner} needs an integer {name} >= 1, got {value!r}.")

    def start_inverse(self, objective: Objective) -> InverseState:
        """Return the state before the first step.

        Raises:
            UnsupportedLayerError, ValueError: the curvature, the fraction or the solver does not fit the objective.
        """
        average = running_average(self.curvature, self.decay**self.statistics_every)
        if average is None:
            return self.start_anew(objective)
        if average.reads_batches:
            refuse_parts_of_sums(type(self).__name__, self.fraction, objective)
        self.curvature.check(objective)
        return _Amortised(self, average, bound(self.solver, objective))

    def damping_of_inverse(self, situation: Situation, mean_curvature: Callable[[], float]) -> float:
        """Return the damping that the inverse is made with. Default: that of the step.

        Args:
            situation: of the step.
            mean_curvature: gives trace(C) / D, or an unbiased estimate.
        """
        del mean_curvature
        return situation.damping

    def start_anew(self, objective: Objective) -> InverseState:
        """Return a state that estimates and inverts the curvature anew at each step and remembers nothing."""
        refuse_parts_of_sums(type(self).__name__, self.fraction, objective)
        self.curvature.check(objective)
        return _Fresh(self, bound(self.solver, objective))


class _Amortised(InverseState):
    """Statistics in a moving average, and the last inverse."""

    def __init__(self, config: AmortisedInverse, average: RunningAverage, solver: Solver) -> None:
        self._config, self._average, self._solver = config, average, solver
        self._steps = self._failures = 0
        self._operator: LinearOperator | None = None  # what the inverse was made from, with the damping below
        self._inverse: LinearOperator | None = None
        self._inverse_damping = self._mean_curvature = 0.0
        self._rejected = False
        self._evaluation: Evaluation | None = None  # of the last step, until that is judged

    def inverse(self, situation: Situation) -> tuple[LinearOperator, LinearOperator]:
        self._evaluation = situation.evaluation
        if self._steps % self._config.statistics_every == 0 or self._average.updates == 0:
            take_statistics(self._average, situation, self._config.fraction)
        if self._is_stale(self._config.damping_of_inverse(situation, lambda: self._mean_curvature)):
            self._refresh(self._average.operator(situation.objective), situation)
        self._steps += 1
        assert self._operator is not None  # otherwise _refresh has raised
        assert self._inverse is not None
        return self._operator, self._inverse

    def mean_curvature(self, generator: torch.Generator) -> float:
        return self._mean_curvature

    def snapshot(self) -> tuple[Any, ...]:
        counts = (self._steps, self._failures, self._rejected)
        inverse = (self._operator, self._inverse, self._inverse_damping, self._mean_curvature)
        return self._average.state_dict(), counts, inverse

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        average, counts, inverse = snapshot
        self._average.load_state_dict(average)
        self._steps, self._failures, self._rejected = counts
        self._operator, self._inverse, self._inverse_damping, self._mean_curvature = inverse
        self._evaluation = None

    def accepted(self, step: Tensor) -> None:
        if self._evaluation is not None:
            self._average.follow(self._evaluation, step)
        self._evaluation = None

    def rejected(self, snapshot: tuple[Any, ...]) -> None:
        """Restore, and make the inverse anew at the next step; a refresh that has failed counts all the same."""
        failures = self._failures
        self.restore(snapshot)
        self._failures, self._rejected = failures, True

    def _is_stale(self, damping: float) -> bool:
        if self._inverse is None or self._rejected or self._steps < 3 or self._average.cheap_inverse:
            return True
        if self._steps % self._config.inverse_every == 0:
            return True
        low, high = sorted((damping, self._inverse_damping))
        return high > _STALE_DAMPING * low

    def _refresh(self, operator: LinearOperator, situation: Situation) -> None:
        """Make the inverse anew; keep the last good one, within a budget, where that fails."""
        mean = float(operator.trace()) / operator.size
        damping = self._config.damping_of_inverse(situation, lambda: mean)
        try:
            self._inverse, self._operator = self._solver(operator, damping), operator
            self._inverse_damping, self._failures, self._rejected = damping, 0, False
            self._mean_curvature = mean
        except SolveError as error:
            self._failures += 1
            if self._inverse is None or self._failures > _FAILURE_BUDGET:
                raise
            warnings.warn(
                f"kept the last inverse ({self._failures} failures in a row): {error}", RuntimeWarning, stacklevel=2
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "average": self._average.state_dict(),
            "steps": self._steps,
            "failures": self._failures,
            "rejected": self._rejected,
            # The inverse is made again from these two: half the size, and any solver's result can be saved.
            "operator": None if self._operator is None else self._operator.state_dict(),
            "inverse_damping": self._inverse_damping,
            "mean_curvature": self._mean_curvature,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # everything that can fail comes first
        check_entries("the damped inverse", state, self.state_dict())
        operator = inverse = None
        if state["operator"] is not None:
            operator = operator_from_state_dict(state["operator"])
            inverse = self._solver(operator, state["inverse_damping"])
        self._average.load_state_dict(state["average"])
        self._operator, self._inverse = operator, inverse
        self._steps, self._failures, self._rejected = state["steps"], state["failures"], state["rejected"]
        self._inverse_damping, self._mean_curvature = state["inverse_damping"], state["mean_curvature"]


class _Fresh(InverseState):
    """A curvature without statistics: estimated and solved anew at each step."""

    def __init__(self, config: AmortisedInverse, solver: Solver) -> None:
        self._config, self._solver = config, solver
        self._operator: LinearOperator | None = None

    def inverse(self, situation: Situation) -> tuple[LinearOperator, LinearOperator]:
        evaluation = situation.curvature_part(self._config.fraction, linearize=True)
        C = self._operator = self._config.curvature.estimate(evaluation, situation.generator)

        def mean() -> float:
            # The operators of statistics have traces by structure, where products alone would take D of them.
            structured = isinstance(self._config.curvature, StatisticalApproximation)
            return float(C.trace()) / C.size if structured else self.mean_curvature(situation.generator)

        return C, self._solver(C, self._config.damping_of_inverse(situation, mean))

    def mean_curvature(self, generator: torch.Generator) -> float:
        assert self._operator is not None  # asked for after the inverse alone
        return probed_mean_curvature(self._operator, generator)

    def accepted(self, step: Tensor) -> None:
        self._operator = None  # frees the graph of a matrix-free one

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._operator = None
