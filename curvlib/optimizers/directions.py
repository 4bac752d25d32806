"""Directions: how a curvature and a damping turn the gradient into a proposed step.

Symbols: g gradient, C curvature operator, lambda damping, Delta proposal. A direction is a frozen configuration;
``start`` makes the running state of one optimizer (averages, inverses, warm starts).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from curvlib.approximations import Approximation, Exact, joined
from curvlib.matrices import GGN
from curvlib.objective import Objective
from curvlib.operators.state import check_entries
from curvlib.optimizers.amortised import AmortisedInverse, InverseState
from curvlib.optimizers.layer_damping import bound
from curvlib.optimizers.preconditioner import Preconditioner, check_preconditioner, start_preconditioner
from curvlib.optimizers.proposal import (
    Direction,
    DirectionState,
    Proposal,
    check_approximation,
    refuse_parts_of_sums,
    refuse_what_follows_steps,
)
from curvlib.optimizers.situation import Situation, check_fraction
from curvlib.solvers import (
    CG,
    Prediction,
    ProgressTest,
    Solution,
    Status,
    check_deterministic,
    damping_structure,
)
from curvlib.solvers.definiteness import gives_descent
from curvlib.solvers.solution import IterateGrid


@dataclass(frozen=True, kw_only=True)
class PreconditionedGradient(AmortisedInverse, Direction):
    """Delta = -(C + lambda I)^-1 g with amortised statistics and inverses, as in K-FAC (Martens & Grosse 2015, sec. 8).

    Args:
        curvature: the approximation; one with a ``running_average`` is averaged over steps, another estimated anew
            each step. ``LBFGS()``, also in sums, learns from each step that is taken.
        solver: ``damped_inverse``, ``FactoredTikhonov()``, ``CG(...)``: anything (C, lambda) -> inverse; or
            ``LayerDamping({...})``, where the damping differs by layer.
        fraction: part of the batch that statistics are made of (tau_1), where the step has no curvature batch.
        decay: of the moving average of statistics, for each step: one statistic in m steps decays by decay^m.
        statistics_every: steps from one statistic to the next.
        inverse_every: steps from one inverse to the next (T_3). The first three steps, a damping that has moved by a
            factor of two and a rejected step refresh it as well. The inverses of ``EKFAC``, whose average keeps an
            eigenbasis, and of ``LBFGS`` come at each step.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a number is out of range, or the curvature may be indefinite and the solver cannot do with that (one
            that can, such as ``MINRES``, has an attribute ``takes_indefinite``).

    With an indefinite C + lambda I, which such a solver allows, Delta may go uphill: the optimizer asks for a control
    that raises the damping then, such as ``LevenbergMarquardt``, unless the inverse that the solver gives is positive
    definite all the same, as its attribute ``gives_descent`` says.
    """

    @property
    def needs_damping(self) -> bool:
        """Whether the curvature may be indefinite, and the solver gives its inverse."""
        return self.curvature.may_be_indefinite and not gives_descent(self.solver)

    @property
    def solves_indefinite(self) -> bool:
        """The same."""
        return self.needs_damping

    @property
    def takes_curvature_batch(self) -> bool:
        """Statistics may come from a batch of their own."""
        return True

    def start(self, objective: Objective) -> DirectionState:
        """Return the state before the first step."""
        return _GradientState(self, objective)


class _GradientState(DirectionState):
    """The amortised inverse, which the gradient is multiplied by."""

    def __init__(self, config: PreconditionedGradient, objective: Objective) -> None:
        self._solver = bound(config.solver, objective)
        self._state = config.start_inverse(objective)

    def propose(self, situation: Situation) -> Proposal:
        operator, inverse = self._state.inverse(situation)
        return Proposal(
            step=-(inverse @ situation.gradient),
            operator=operator,
            regularizer=damping_structure(self._solver, operator),
            mean_curvature=self._state.mean_curvature(situation.generator),
        )

    def snapshot(self) -> Any:
        return self._state.snapshot()

    def restore(self, snapshot: Any) -> None:
        self._state.restore(snapshot)

    def accepted(self, step: Tensor) -> None:
        self._state.accepted(step)

    def rejected(self, snapshot: Any) -> None:
        self._state.rejected(snapshot)

    def state_dict(self) -> dict[str, Any]:
        return self._state.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state.load_state_dict(state)


@dataclass(frozen=True, kw_only=True)
class TruncatedNewton(Direction):
    """Delta from conjugate gradients on (C + lambda (I + mu S)) Delta = -g, stopped early (Martens 2010).

    S = 0 where there is no regularizer. Where C and S are exact and of one evaluation, a product with both costs about
    what one with C does (``joined``). C and S are of the step's curvature batch, or else of a part of its batch; g is
    of the whole batch. The model that the step is judged by has this g and this C, as the one that was minimised.
    Where g itself is a direction of negative curvature Delta is -g, whose length means nothing: beside a curvature that
    may be indefinite the optimizer asks for a line search, a rescaling or a control that raises the damping.
    Departure from Martens's released code: the change of h in the ratio is that of the step's batch, as the paper has
    it, where the code takes the batch of C.

    All products of a solve see the same random numbers (masks of dropout, drawn labels): they share one forward pass.

    Args:
        curvature: usually ``Exact(GGN())``; any approximation works.
        cg: limit, stopping rule and stored iterates of the solver. A preconditioner of its own is one (D, D) operator
            for all steps, of which it is the more use the less C and lambda change.
        preconditioner: a :class:`Preconditioner`; or an approximation, estimated at each step on the examples of C,
            whose damped inverse it is; or None.
        warm_start: factor of the last solution where the next solve starts, in [0, 1]; a rejected step resets it.
        fraction: part of the batch that the products of C and S are made of, where the step has no curvature batch.
        regularizer: what S is, such as ``StructuralDamping()``; any approximation works, None leaves it out.
        regularizer_weight: mu; 1/30 in Martens & Sutskever (2011).
        check_products: whether to refuse, before each solve and at the cost of two products, a matrix whose products
            with one vector differ (``check_deterministic``).

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a number is out of range, an approximation learns from steps, that of the preconditioner may be
            indefinite, or ``cg`` has a preconditioner of its own beside ``preconditioner``.
    """

    curvature: Approximation = field(default_factory=lambda: Exact(GGN()))
    cg: CG = field(
        default_factory=lambda: CG(max_iterations=250, stop=ProgressTest(), store=IterateGrid(), always_verify=False)
    )
    preconditioner: Approximation | Preconditioner | None = None
    warm_start: float = 0.95
    fraction: float = 1.0
    regularizer: Approximation | None = None
    regularizer_weight: float = 1 / 30
    check_products: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.cg, CG):
            raise TypeError(f"TruncatedNewton needs cg to be conjugate gradients such as CG(), got {self.cg!r}.")
        if self.cg.preconditioner is not None and self.preconditioner is not None:
            raise ValueError(
                f"TruncatedNewton has two preconditioners, {self.cg.preconditioner!r} of cg for all steps and "
                f"{self.preconditioner!r}, which is made anew: leave one of them out."
            )
        if self.preconditioner is not None:
            check_preconditioner("TruncatedNewton", self.preconditioner)
        for name, part in (("regularizer", self.regularizer), ("curvature", self.curvature)):
            if part is not None:
                check_approximation("TruncatedNewton", name, part)
                refuse_what_follows_steps("TruncatedNewton", name, part)
        if not 0 < self.regularizer_weight < float("inf"):
            raise ValueError(f"TruncatedNewton needs a finite regularizer_weight > 0, got {self.regularizer_weight!r}.")
        check_fraction("TruncatedNewton", "fraction", self.fraction)
        if not 0 <= self.warm_start <= 1:
            raise ValueError(f"TruncatedNewton needs 0 <= warm_start <= 1, got {self.warm_start!r}.")

    @property
    def may_lack_length(self) -> bool:
        """Whether C may be indefinite: along a gradient of negative curvature the step is -g."""
        return self.curvature.may_be_indefinite

    @property
    def takes_curvature_batch(self) -> bool:
        """Products may be of a batch of their own."""
        return True

    def start(self, objective: Objective) -> DirectionState:
        """Return the state before the first step."""
        refuse_parts_of_sums("TruncatedNewton", self.fraction, objective)
        for part in (self.curvature, self.regularizer):
            if part is not None:
                part.check(objective)
        self.cg.check(objective.layout.size)
        inverse = start_preconditioner(self.preconditioner, objective, fraction=self.fraction)
        return _TruncatedState(self, inverse)


def _prediction(solution: Solution, damping: float) -> Prediction:
    """Return M(Delta) - M(0) from phi(Delta), which the solver knows, so that no product is spent on it."""
    damped, square = torch.stack([solution.model_value, solution.x @ solution.x]).tolist()
    return Prediction(damped=damped, undamped=damped - 0.5 * damping * square)


class _TruncatedState(DirectionState):
    """The last solution, which warms the next solve, and the state of the preconditioner."""

    def __init__(self, config: TruncatedNewton, preconditioner: InverseState | None) -> None:
        self._config, self._preconditioner = config, preconditioner
        self._last: Tensor | None = None

    def propose(self, situation: Situation) -> Proposal:
        config = self._config
        evaluation = situation.curvature_part(config.fraction, linearize=True)
        operator = config.curvature.estimate(evaluation, situation.generator)
        cg = replace(config.cg, stop=config.cg.stop.at(situation.damping_share))
        if self._preconditioner is not None:
            cg = replace(cg, preconditioner=self._preconditioner.inverse(situation)[1])
        regularizer, system = None, operator
        if config.regularizer is not None:
            regularizer = config.regularizer_weight * config.regularizer.estimate(evaluation, situation.generator)
            system = joined(operator + situation.damping * regularizer)
        if config.check_products:
            check_deterministic(system)
        x0 = None if self._last is None else config.warm_start * self._last
        solution = cg(system, situation.damping).solve(-situation.gradient, x0)
        # A solve that broke down later on has a step: that of the iterations before.
        broken = solution.status is Status.BREAKDOWN and solution.iterations == 0
        if broken or solution.status is Status.NOT_FINITE:
            solution.raise_if_failed()
        step, candidates = solution.x, tuple(x for _, x in solution.iterates)
        prediction = None if regularizer is not None else _prediction(solution, situation.damping)
        if solution.status in (Status.SINGULAR, Status.NEGATIVE_CURVATURE) and not bool(step.any()):
            # The gradient itself is a direction of no or negative curvature: the line search goes along it, as in the
            # truncated Newton method of Nocedal & Wright, algorithm 7.1.
            step, candidates, prediction = -situation.gradient, (), None
        self._last = solution.x
        return Proposal(
            step=step,
            operator=operator,
            regularizer=regularizer,
            candidates=candidates,
            iterations=solution.iterations,
            prediction=prediction,
        )

    def snapshot(self) -> tuple[Tensor | None, Any]:
        return self._last, None if self._preconditioner is None else self._preconditioner.snapshot()

    def restore(self, snapshot: tuple[Tensor | None, Any]) -> None:
        self._last, preconditioner = snapshot
        if self._preconditioner is not None:
            self._preconditioner.restore(preconditioner)

    def accepted(self, step: Tensor) -> None:
        if self._preconditioner is not None:
            self._preconditioner.accepted(step)

    def rejected(self, snapshot: tuple[Tensor | None, Any]) -> None:
        """Forget the solution, which has led to no good step."""
        self._last = None
        if self._preconditioner is not None:
            self._preconditioner.rejected(snapshot[1])

    def state_dict(self) -> dict[str, Any]:
        inverse = None if self._preconditioner is None else self._preconditioner.state_dict()
        return {"last": self._last, "preconditioner": inverse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_entries("TruncatedNewton", state, self.state_dict())
        if self._preconditioner is not None:
            self._preconditioner.load_state_dict(state["preconditioner"])  # changes nothing if it raises
        self._last = state["last"]
