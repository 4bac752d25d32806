"""Directions: how a curvature and a damping turn the gradient into a proposed step.

Symbols: g gradient, C curvature operator, lambda damping, Delta proposal. A direction is a frozen configuration;
``start`` makes the running state of one optimizer (averages, inverses, warm starts).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.approximations import Approximation, Exact, RunningAverage, joined, running_average
from curvlib.matrices import GGN
from curvlib.objective import Objective
from curvlib.operators import LinearOperator, operator_from_state_dict
from curvlib.optimizers.situation import Situation, check_fraction
from curvlib.solvers import CG, ProgressTest, SolveError, Status, damped_inverse
from curvlib.solvers.solution import IterateGrid

# Solver = anything that turns (C, lambda) into an operator close to (C + lambda I)^-1.
Solver = Callable[[LinearOperator, float], LinearOperator]

# An inverse made with another damping is made anew once the damping has moved by this factor.
_STALE_DAMPING = 2.0
# Refreshes of an inverse that may fail one after another while the last good one is still used.
_FAILURE_BUDGET = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposal:
    """A proposed step and what is known about it.

    Attributes:
        step: Delta (D,).
        operator: the curvature that it was made with, without the damping.
        regularizer: R, where the damping is lambda (I + R); None for lambda I.
        candidates: earlier iterates of the solver, first to last, for backtracking.
        mean_curvature: trace(C) / D, or an unbiased estimate.
        iterations: of the solver, 0 for direct ones.
    """

    step: Float[Tensor, " D"]
    operator: LinearOperator
    regularizer: LinearOperator | None = None
    candidates: tuple[Float[Tensor, " D"], ...] = ()
    mean_curvature: float | None = None
    iterations: int = 0


class DirectionState(ABC):
    """The running state of a direction in one optimizer.

    Attributes:
        description: of the configuration that it was started from.
    """

    description: str = ""

    @abstractmethod
    def propose(self, situation: Situation) -> Proposal:
        """Return a step for the situation, and update the state."""

    @abstractmethod
    def rejected(self) -> None:
        """Learn that the last proposal was not taken."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next proposal depends on."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""


class Direction(ABC):
    """A frozen configuration of a way to propose steps."""

    @abstractmethod
    def start(self, objective: Objective) -> DirectionState:
        """Return the state before the first step.

        Raises:
            UnsupportedLayerError: the curvature cannot treat the model; named before any computation.
        """

    def description(self) -> str:
        """Return the configuration in words, the same in every process: checkpoints of another one are refused."""
        values: dict[str, Any] = (
            {entry.name: getattr(self, entry.name) for entry in fields(self)} if is_dataclass(self) else {}
        )
        return f"{type(self).__name__}({', '.join(f'{name}={_in_words(value)}' for name, value in values.items())})"


@dataclass(frozen=True, kw_only=True)
class PreconditionedGradient(Direction):
    """Delta = -(C + lambda I)^-1 g with amortised statistics and inverses, as in K-FAC (Martens & Grosse 2015, sec. 8).

    Args:
        curvature: the approximation; one with a ``running_average`` is averaged over steps, another estimated anew
            each step.
        solver: ``damped_inverse``, ``FactoredTikhonov()``, ``CG(...)``: anything (C, lambda) -> inverse.
        fraction: part of the batch that statistics are made of (tau_1).
        decay: of the moving average of statistics, for each step: one statistic in m steps decays by decay^m.
        statistics_every: steps from one statistic to the next.
        inverse_every: steps from one inverse to the next (T_3). The first three steps, a damping that has moved by a
            factor of two and a rejected step refresh it as well. The inverses of ``EKFAC``, whose average keeps an
            eigenbasis, come at each step.
    """

    curvature: Approximation
    solver: Solver = damped_inverse
    fraction: float = 1 / 8
    decay: float = 0.95
    statistics_every: int = 1
    inverse_every: int = 20

    def __post_init__(self) -> None:
        _check_approximation("PreconditionedGradient", "curvature", self.curvature)
        if not callable(self.solver):
            raise TypeError(
                "PreconditionedGradient needs a solver (C, damping) -> inverse such as damped_inverse or "
                f"FactoredTikhonov(), got {self.solver!r}."
            )
        check_fraction("PreconditionedGradient", "fraction", self.fraction)
        for name in ("statistics_every", "inverse_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"PreconditionedGradient needs an integer {name} >= 1, got {value!r}.")

    def start(self, objective: Objective) -> DirectionState:
        """Return the state before the first step."""
        _refuse_parts_of_sums("PreconditionedGradient", self.fraction, objective)
        self.curvature.check(objective)
        average = running_average(self.curvature, self.decay**self.statistics_every)
        return _FreshState(self) if average is None else _AmortisedState(self, average)


class _AmortisedState(DirectionState):
    """Statistics in a moving average, and the last inverse."""

    def __init__(self, config: PreconditionedGradient, average: RunningAverage) -> None:
        self._config, self._average = config, average
        self._steps = self._failures = 0
        self._operator: LinearOperator | None = None  # what the inverse was made from, with the damping below
        self._inverse: LinearOperator | None = None
        self._inverse_damping = self._mean_curvature = 0.0
        self._rejected = False

    def propose(self, situation: Situation) -> Proposal:
        if self._steps % self._config.statistics_every == 0 or self._average.updates == 0:
            self._update_statistics(situation)
        if self._is_stale(situation.damping):
            self._refresh(self._average.operator(situation.objective), situation.damping)
        self._steps += 1
        assert self._operator is not None  # otherwise _refresh has raised
        assert self._inverse is not None
        step = -(self._inverse @ situation.gradient)
        return Proposal(step=step, operator=self._operator, mean_curvature=self._mean_curvature)

    def rejected(self) -> None:
        self._rejected = True

    def _is_stale(self, damping: float) -> bool:
        if self._inverse is None or self._rejected or self._steps < 3 or self._average.diagonalised:
            return True
        if self._steps % self._config.inverse_every == 0:
            return True
        low, high = sorted((damping, self._inverse_damping))
        return high > _STALE_DAMPING * low

    def _update_statistics(self, situation: Situation) -> None:
        evaluation = situation.part(self._config.fraction, linearize=False)
        if not self._average.update(evaluation, situation.generator):
            warnings.warn(
                f"the statistics of a batch were not finite and were left out ({self._average.skipped} so far)",
                RuntimeWarning,
                stacklevel=2,
            )

    def _refresh(self, operator: LinearOperator, damping: float) -> None:
        """Make the inverse anew; keep the last good one, within a budget, where that fails."""
        try:
            self._inverse, self._operator = self._config.solver(operator, damping), operator
            self._inverse_damping, self._failures, self._rejected = damping, 0, False
            self._mean_curvature = float(operator.trace()) / operator.size
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
        operator = inverse = None
        if state["operator"] is not None:
            operator = operator_from_state_dict(state["operator"])
            inverse = self._config.solver(operator, state["inverse_damping"])
        self._average.load_state_dict(state["average"])
        self._operator, self._inverse = operator, inverse
        self._steps, self._failures, self._rejected = state["steps"], state["failures"], state["rejected"]
        self._inverse_damping, self._mean_curvature = state["inverse_damping"], state["mean_curvature"]


class _FreshState(DirectionState):
    """A curvature without statistics: estimated and solved anew at each step."""

    def __init__(self, config: PreconditionedGradient) -> None:
        self._config = config

    def propose(self, situation: Situation) -> Proposal:
        evaluation = situation.part(self._config.fraction, linearize=True)
        operator = self._config.curvature.estimate(evaluation, situation.generator)
        step = -(self._config.solver(operator, situation.damping) @ situation.gradient)
        return Proposal(step=step, operator=operator, mean_curvature=_probe(operator, situation.generator))

    def rejected(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class TruncatedNewton(Direction):
    """Delta from conjugate gradients on (C + lambda (I + mu S)) Delta = -g, stopped early (Martens 2010).

    S = 0 where there is no regularizer. Where C and S are exact and of one evaluation, a product with both costs about
    what one with C does (``joined``).

    Args:
        curvature: usually ``Exact(GGN())``; any approximation works.
        cg: limit, stopping rule and stored iterates of the solver.
        preconditioner: an approximation whose damped inverse preconditions the solver, or None.
        warm_start: factor of the last solution where the next solve starts, in [0, 1]; a rejected step resets it.
        fraction: part of the batch that the products of C and S are made of.
        regularizer: what S is, such as ``StructuralDamping()``; any approximation works, None leaves it out.
        regularizer_weight: mu; 1/30 in Martens & Sutskever (2011).
    """

    curvature: Approximation = field(default_factory=lambda: Exact(GGN()))
    cg: CG = field(
        default_factory=lambda: CG(max_iterations=250, stop=ProgressTest(), store=IterateGrid(), check_every=1)
    )
    preconditioner: Approximation | None = None
    warm_start: float = 0.95
    fraction: float = 1.0
    regularizer: Approximation | None = None
    regularizer_weight: float = 1 / 30

    def __post_init__(self) -> None:
        _check_approximation("TruncatedNewton", "curvature", self.curvature)
        for name in ("preconditioner", "regularizer"):
            if getattr(self, name) is not None:
                _check_approximation("TruncatedNewton", name, getattr(self, name))
        if not 0 < self.regularizer_weight < float("inf"):
            raise ValueError(f"TruncatedNewton needs a finite regularizer_weight > 0, got {self.regularizer_weight!r}.")
        check_fraction("TruncatedNewton", "fraction", self.fraction)
        if not 0 <= self.warm_start <= 1:
            raise ValueError(f"TruncatedNewton needs 0 <= warm_start <= 1, got {self.warm_start!r}.")

    def start(self, objective: Objective) -> DirectionState:
        """Return the state before the first step."""
        _refuse_parts_of_sums("TruncatedNewton", self.fraction, objective)
        for part in (self.curvature, self.preconditioner, self.regularizer):
            if part is not None:
                part.check(objective)
        return _TruncatedState(self)


class _TruncatedState(DirectionState):
    """The last solution, which warms the next solve."""

    def __init__(self, config: TruncatedNewton) -> None:
        self._config = config
        self._last: Tensor | None = None

    def propose(self, situation: Situation) -> Proposal:
        config = self._config
        evaluation = situation.part(config.fraction, linearize=True)
        operator = config.curvature.estimate(evaluation, situation.generator)
        cg = config.cg
        if config.preconditioner is not None:
            preconditioner = config.preconditioner.estimate(evaluation, situation.generator)
            cg = replace(cg, preconditioner=damped_inverse(preconditioner, situation.damping))
        regularizer, system = None, operator
        if config.regularizer is not None:
            regularizer = config.regularizer_weight * config.regularizer.estimate(evaluation, situation.generator)
            system = joined(operator + situation.damping * regularizer)
        x0 = None if self._last is None else config.warm_start * self._last
        solution = cg(system, situation.damping).solve(-situation.gradient, x0)
        if solution.status is Status.NOT_FINITE:
            solution.raise_if_failed()
        self._last = solution.x
        return Proposal(
            step=solution.x,
            operator=operator,
            regularizer=regularizer,
            candidates=tuple(x for _, x in solution.iterates),
            iterations=solution.iterations,
        )

    def rejected(self) -> None:
        self._last = None

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last = state["last"]


def _in_words(value: object) -> str:
    """Return repr, or the name of what has a repr that differs from process to process."""
    text = repr(value)
    return text if " at 0x" not in text else str(getattr(value, "__qualname__", type(value).__qualname__))


def _check_approximation(owner: str, name: str, value: object) -> None:
    if not isinstance(value, Approximation):
        raise TypeError(f"{owner} needs {name} to be an approximation such as KFAC(Fisher()), got {value!r}.")


def _refuse_parts_of_sums(owner: str, fraction: float, objective: Objective) -> None:
    if fraction < 1 and objective.loss.additive:
        raise ValueError(
            f"{owner} cannot take curvature from a part of the batch (fraction={fraction}) for a loss with "
            "reduction='sum', whose scale depends on the number of examples: use reduction='mean', or the fraction 1 "
            "(in the presets statistics_fraction, model_fraction and curvature_fraction)."
        )


def _probe(operator: LinearOperator, generator: torch.Generator) -> float:
    """Return an unbiased estimate of trace(C) / D from one vector of random signs (Hutchinson)."""
    signs = torch.randint(0, 2, (operator.size, 1), generator=generator, device=generator.device).to(
        operator.device, operator.dtype
    )
    return float(operator.quadratic_form(2 * signs - 1)) / operator.size
