"""Directions: how a curvature and a damping turn the gradient into a proposed step.

Symbols: g gradient, C curvature operator, lambda damping, Delta proposal. A direction is a frozen configuration;
``start`` makes the running state of one optimizer (averages, inverses, warm starts).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from curvlib.approximations import Approximation, Exact, RunningAverage, joined, running_average
from curvlib.matrices import GGN
from curvlib.objective import Evaluation, Objective
from curvlib.operators import LinearOperator, operator_from_state_dict
from curvlib.optimizers.layer_damping import SolverForModel, bound
from curvlib.optimizers.proposal import (
    Direction,
    DirectionState,
    Proposal,
    Solver,
    check_approximation,
    probed_mean_curvature,
    refuse_indefinite,
    refuse_parts_of_sums,
    refuse_what_follows_steps,
    take_statistics,
)
from curvlib.optimizers.situation import Situation, check_fraction
from curvlib.solvers import CG, ProgressTest, SolveError, Status, damped_inverse, damping_structure
from curvlib.solvers.solution import IterateGrid

# An inverse made with another damping is made anew once the damping has moved by this factor.
_STALE_DAMPING = 2.0
# Refreshes of an inverse that may fail one after another while the last good one is still used.
_FAILURE_BUDGET = 5


@dataclass(frozen=True, kw_only=True)
class PreconditionedGradient(Direction):
    """Delta = -(C + lambda I)^-1 g with amortised statistics and inverses, as in K-FAC (Martens & Grosse 2015, sec. 8).

    Args:
        curvature: the approximation; one with a ``running_average`` is averaged over steps, another estimated anew
            each step. ``LBFGS()``, also in sums, learns from each step that is taken.
        solver: ``damped_inverse``, ``FactoredTikhonov()``, ``CG(...)``: anything (C, lambda) -> inverse; or
            ``LayerDamping({...})``, where the damping differs by layer.
        fraction: part of the batch that statistics are made of (tau_1).
        decay: of the moving average of statistics, for each step: one statistic in m steps decays by decay^m.
        statistics_every: steps from one statistic to the next.
        inverse_every: steps from one inverse to the next (T_3). The first three steps, a damping that has moved by a
            factor of two and a rejected step refresh it as well. The inverses of ``EKFAC``, whose average keeps an
            eigenbasis, and of ``LBFGS`` come at each step.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a number is out of range, or the curvature may be indefinite and the solver cannot do with that (one
            that can, such as ``MINRES``, has an attribute ``takes_indefinite``).
    """

    curvature: Approximation
    solver: Solver | SolverForModel = damped_inverse
    fraction: float = 1 / 8
    decay: float = 0.95
    statistics_every: int = 1
    inverse_every: int = 20

    def __post_init__(self) -> None:
        check_approximation("PreconditionedGradient", "curvature", self.curvature)
        if not (callable(self.solver) or isinstance(self.solver, SolverForModel)):
            raise TypeError(
                "PreconditionedGradient needs a solver (C, damping) -> inverse such as damped_inverse or "
                f"FactoredTikhonov(), got {self.solver!r}."
            )
        refuse_indefinite("PreconditionedGradient", "curvature", self.curvature, self.solver)
        check_fraction("PreconditionedGradient", "fraction", self.fraction)
        for name in ("statistics_every", "inverse_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"PreconditionedGradient needs an integer {name} >= 1, got {value!r}.")

    def start(self, objective: Objective) -> DirectionState:
        """Return the state before the first step."""
        average = running_average(self.curvature, self.decay**self.statistics_every)
        if average is None or average.reads_batches:
            refuse_parts_of_sums("PreconditionedGradient", self.fraction, objective)
        self.curvature.check(objective)
        solver = bound(self.solver, objective)
        return _FreshState(self, solver) if average is None else _AmortisedState(self, average, solver)


class _AmortisedState(DirectionState):
    """Statistics in a moving average, and the last inverse."""

    def __init__(self, config: PreconditionedGradient, average: RunningAverage, solver: Solver) -> None:
        self._config, self._average, self._solver = config, average, solver
        self._steps = self._failures = 0
        self._operator: LinearOperator | None = None  # what the inverse was made from, with the damping below
        self._inverse: LinearOperator | None = None
        self._inverse_damping = self._mean_curvature = 0.0
        self._rejected = False
        self._before: tuple[Any, ...] | None = None  # the state before the last proposal, until that is judged
        self._evaluation: Evaluation | None = None  # of the last proposal, likewise

    def propose(self, situation: Situation) -> Proposal:
        inverse = (self._operator, self._inverse, self._inverse_damping, self._mean_curvature)
        self._before, self._evaluation = (self._steps, self._average.state_dict(), inverse), situation.evaluation
        if self._steps % self._config.statistics_every == 0 or self._average.updates == 0:
            take_statistics(self._average, situation, self._config.fraction)
        if self._is_stale(situation.damping):
            self._refresh(self._average.operator(situation.objective), situation.damping)
        self._steps += 1
        assert self._operator is not None  # otherwise _refresh has raised
        assert self._inverse is not None
        step = -(self._inverse @ situation.gradient)
        return Proposal(
            step=step,
            operator=self._operator,
            regularizer=damping_structure(self._solver, self._operator),
            mean_curvature=self._mean_curvature,
        )

    def accepted(self, step: Tensor) -> None:
        if self._evaluation is not None:
            self._average.follow(self._evaluation, step)
        self._before = self._evaluation = None  # frees the old average

    def rejected(self) -> None:
        self._evaluation = None
        if self._before is not None:
            self._steps, average, inverse = self._before
            self._average.load_state_dict(average)
            self._operator, self._inverse, self._inverse_damping, self._mean_curvature = inverse
            self._before = None
        self._rejected = True

    def _is_stale(self, damping: float) -> bool:
        if self._inverse is None or self._rejected or self._steps < 3 or self._average.cheap_inverse:
            return True
        if self._steps % self._config.inverse_every == 0:
            return True
        low, high = sorted((damping, self._inverse_damping))
        return high > _STALE_DAMPING * low

    def _refresh(self, operator: LinearOperator, damping: float) -> None:
        """Make the inverse anew; keep the last good one, within a budget, where that fails."""
        try:
            self._inverse, self._operator = self._solver(operator, damping), operator
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
            inverse = self._solver(operator, state["inverse_damping"])
        self._average.load_state_dict(state["average"])
        self._operator, self._inverse = operator, inverse
        self._steps, self._failures, self._rejected = state["steps"], state["failures"], state["rejected"]
        self._inverse_damping, self._mean_curvature = state["inverse_damping"], state["mean_curvature"]


class _FreshState(DirectionState):
    """A curvature without statistics: estimated and solved anew at each step."""

    def __init__(self, config: PreconditionedGradient, solver: Solver) -> None:
        self._config, self._solver = config, solver

    def propose(self, situation: Situation) -> Proposal:
        evaluation = situation.part(self._config.fraction, linearize=True)
        operator = self._config.curvature.estimate(evaluation, situation.generator)
        step = -(self._solver(operator, situation.damping) @ situation.gradient)
        return Proposal(
            step=step,
            operator=operator,
            regularizer=damping_structure(self._solver, operator),
            mean_curvature=probed_mean_curvature(operator, situation.generator),
        )

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
        check_approximation("TruncatedNewton", "curvature", self.curvature)
        for name in ("preconditioner", "regularizer"):
            if getattr(self, name) is not None:
                check_approximation("TruncatedNewton", name, getattr(self, name))
                refuse_what_follows_steps("TruncatedNewton", name, getattr(self, name))
        refuse_what_follows_steps("TruncatedNewton", "curvature", self.curvature)
        if self.preconditioner is not None:
            refuse_indefinite("TruncatedNewton", "preconditioner", self.preconditioner, damped_inverse)
        if not 0 < self.regularizer_weight < float("inf"):
            raise ValueError(f"TruncatedNewton needs a finite regularizer_weight > 0, got {self.regularizer_weight!r}.")
        check_fraction("TruncatedNewton", "fraction", self.fraction)
        if not 0 <= self.warm_start <= 1:
            raise ValueError(f"TruncatedNewton needs 0 <= warm_start <= 1, got {self.warm_start!r}.")

    def start(self, objective: Objective) -> DirectionState:
        """Return the state before the first step."""
        refuse_parts_of_sums("TruncatedNewton", self.fraction, objective)
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
