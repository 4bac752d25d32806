"""The direction that minimises a quadratic model, in a ball where the control is one of the radius.

Symbols: g gradient, C curvature operator, lambda damping, Delta the radius, d (D,) the step, S = diag(s) the scales of
the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.approximations import Approximation, StatisticalApproximation, running_average
from curvlib.objective import Evaluation, Objective
from curvlib.operators import Diagonal, LinearOperator
from curvlib.operators.state import check_entries
from curvlib.optimizers.amortised import InverseState
from curvlib.optimizers.preconditioner import Preconditioner, check_preconditioner, start_preconditioner
from curvlib.optimizers.proposal import (
    Direction,
    DirectionState,
    Proposal,
    check_approximation,
    refuse_parts_of_sums,
    take_statistics,
)
from curvlib.optimizers.scaling import Scaling, in_scaled_parameters
from curvlib.optimizers.situation import Situation, check_fraction
from curvlib.solvers import Descent, RelativeFloor, SolveError, Status, Steihaug, Subproblem
from curvlib.solvers.definiteness import takes_indefinite

# Of the damping of a preconditioner: that of a trust region is 0 as a rule, and an approximation alone may be singular.
_FLOOR = RelativeFloor(0.01)


@dataclass(frozen=True, kw_only=True)
class ModelDescent(Direction):
    r"""The step that a descent finds for the quadratic model of any curvature.

    .. math:: \min_d \; g^T d + \tfrac12 d^T (C + \lambda I) d \quad \text{subject to} \quad |d| \le \Delta

    The radius is that of ``radius=TrustRegion(...)`` in the optimizer; with ``DampedNewton()`` there is none, and the
    control is one of the damping. For a curvature that may be indefinite, that is one that raises the damping until
    C + lambda I is positive definite, such as ``LevenbergMarquardt``: there is no step before. With a scaling all of
    this is meant in the scaled parameters S theta:

    .. math:: \min_d \; g^T d + \tfrac12 d^T (C + \lambda S^2) d \quad \text{subject to} \quad |S d| \le \Delta

    Args:
        curvature: any approximation, estimated anew at each step; ``Exact(Hessian())`` and ``Dense(Hessian())`` for
            Newton's method. ``LBFGS()``, also in sums, learns from each step that is taken.
        descent: ``Steihaug()``, ``Dogleg()``, ``MoreSorensen()``, ``TwoDimensionalSubspace()`` or ``DampedNewton()``.
        fraction: part of the batch that the curvature is made of, where the step has no curvature batch.
        decay: of the moving average of a curvature's statistics over steps; 0 takes those of the step alone.
        scaling: ``CurvatureScaling()`` or ``FixedScaling(values)`` for parameters of different sizes; None is S = I.
        preconditioner: of the descent's conjugate gradients, made at each step: a :class:`Preconditioner`; or an
            approximation, estimated at each step on the examples of C, whose damped inverse it is; or None. Its damping
            is lambda, and at least 0.01 of its mean curvature unless it has a floor of its own. With
            ``Steihaug(region=PreconditionerNorm())`` it is the shape of the region as well.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: the fraction or the decay is out of range, the curvature may be indefinite and the descent cannot do
            with that, or the descent takes no preconditioner, has one of its own or lacks one.
    """

    curvature: Approximation
    descent: Descent = field(default_factory=Steihaug)
    fraction: float = 1.0
    decay: float = 0.0
    scaling: Scaling | None = None
    preconditioner: Approximation | Preconditioner | None = None

    def __post_init__(self) -> None:
        check_approximation("ModelDescent", "curvature", self.curvature)
        if not isinstance(self.descent, Descent):
            raise TypeError(f"ModelDescent needs descent to be a Descent such as Steihaug(), got {self.descent!r}.")
        check_fraction("ModelDescent", "fraction", self.fraction)
        if self.scaling is not None and not isinstance(self.scaling, Scaling):
            raise TypeError(
                f"ModelDescent needs scaling to be None or a Scaling such as CurvatureScaling(), got {self.scaling!r}."
            )
        if not 0 <= self.decay < 1:
            raise ValueError(f"ModelDescent needs 0 <= decay < 1, got {self.decay!r}.")
        if self.decay > 0 and not isinstance(self.curvature, StatisticalApproximation):
            raise ValueError(
                f"ModelDescent(decay={self.decay}) needs a curvature with statistics that average, and "
                f"{self.curvature!r} has none: use decay=0."
            )
        if self.scaling is not None and self.scaling.needs_definite and self.curvature.may_be_indefinite:
            raise ValueError(
                f"{type(self.scaling).__name__} takes roots of the curvature's diagonal, and {self.curvature!r} may be "
                "indefinite: use a curvature of GGN(), Fisher() or EmpiricalFisher(), FixedScaling(values), or "
                "newton_trust_region(objective) for the Hessian."
            )
        if self.descent.has_radius and self.descent.needs_definite and self.curvature.may_be_indefinite:
            raise ValueError(
                f"{type(self.descent).__name__} needs a positive definite C + damping I, and {self.curvature!r} may be "
                "indefinite: use Steihaug, MoreSorensen or TwoDimensionalSubspace, or a curvature of GGN() or Fisher()."
            )
        self._check_preconditioner()

    def _check_preconditioner(self) -> None:
        if self.preconditioner is None:
            if self.descent.needs_preconditioner:
                raise ValueError(
                    f"{self.descent!r} measures its region in the norm of a preconditioner and has none: give "
                    "ModelDescent(preconditioner=...), such as KFAC(GGN()), or use EuclideanNorm()."
                )
            return
        check_preconditioner("ModelDescent", self.preconditioner)
        if not self.descent.takes_preconditioner:
            raise ValueError(
                f"ModelDescent(preconditioner=...) has no use with {self.descent!r}, which runs no conjugate gradients "
                "that take one, or has one of its own: use Steihaug() or TwoDimensionalSubspace(), or TruncatedNewton "
                "for damped steps without a radius."
            )
        if self.scaling is not None:
            raise ValueError(
                f"{self.preconditioner!r} is one of C + damping I, and with {self.scaling!r} conjugate gradients see "
                "another matrix: leave one of them out; in the norm of a preconditioner the region is scaled as well."
            )

    @property
    def has_radius(self) -> bool:
        """Whether the descent keeps to a radius."""
        return self.descent.has_radius

    @property
    def needs_damping(self) -> bool:
        """Whether the curvature may be indefinite, and the descent needs it definite and has no radius."""
        return not self.has_radius and self.descent.needs_definite and self.curvature.may_be_indefinite

    @property
    def solves_indefinite(self) -> bool:
        """Whether the descent solves such systems all the same."""
        return self.needs_damping and takes_indefinite(self.descent)

    @property
    def takes_curvature_batch(self) -> bool:
        """The curvature may be of a batch of its own."""
        return True

    @property
    def knows_lengths(self) -> bool:
        """Whether the radius bounds a norm of all vectors, and not one along the descent's own path."""
        return self.descent.euclidean_radius

    def start(self, objective: Objective) -> DirectionState:
        """Return the state before the first step."""
        refuse_parts_of_sums("ModelDescent", self.fraction, objective)
        self.curvature.check(objective)
        self.descent.check(objective.layout.size)
        if self.scaling is not None:
            self.scaling.check(objective.layout.size)
        inverse = start_preconditioner(self.preconditioner, objective, fraction=self.fraction, floor=_FLOOR)
        return _ModelDescentState(self, inverse)


class _ModelDescentState(DirectionState):
    """The average of the statistics, the scales and the preconditioner, where there are such."""

    def __init__(self, config: ModelDescent, preconditioner: InverseState | None) -> None:
        self._config, self._preconditioner = config, preconditioner
        curvature = config.curvature
        averages = curvature.follows_steps or isinstance(curvature, StatisticalApproximation)
        self._average = running_average(curvature, config.decay) if averages else None
        self._scales: Tensor | None = None
        self._evaluation: Evaluation | None = None  # of the last proposal, until that is judged
        self._first: LinearOperator | None = None  # the curvature that the first radius was measured with, until used
        # The average with the statistics of an evaluation, for another step from there after a rejected one.
        self._taken: WeakKeyDictionary[Evaluation, dict[str, Any]] = WeakKeyDictionary()

    def propose(self, situation: Situation) -> Proposal:
        operator = self._first if self._first is not None else self._operator(situation)
        self._first = None
        self._scales = self._scales_for(operator)
        answer = self._descent(situation).solve(self._subproblem(operator, situation))
        if answer.status is Status.NOT_FINITE:
            raise SolveError(
                f"{type(self._config.descent).__name__} met products of {operator!r} that are not finite: look for "
                "overflow in the model, or use a smaller radius or more damping."
            )
        if answer.status is Status.BREAKDOWN and not bool(answer.step.any()):
            raise SolveError(
                f"{type(self._config.descent).__name__} broke down before its first step for {operator!r}: check that "
                "the preconditioner is positive definite and the curvature free of randomness."
            )
        s = self._scales
        return Proposal(
            step=answer.step if s is None else answer.step / s,
            operator=operator,
            regularizer=self._regularizer(operator),
            mean_curvature=None if self._average is None else float(operator.trace()) / operator.size,
            iterations=answer.iterations,
            on_boundary=answer.on_boundary,
            prediction=answer.prediction,
            scales=s,
            length=answer.length,
        )

    def _regularizer(self, operator: LinearOperator) -> LinearOperator | None:
        """Return S (I + R) S - I, where the damping of the scaled parameters is lambda (I + R)."""
        s, structure = self._scales, self._config.descent.damping_structure(operator)
        if s is None:
            return structure
        scales = Diagonal(s.square() - 1.0)
        return scales if structure is None else scales + in_scaled_parameters(structure, 1.0 / s)

    def _descent(self, situation: Situation) -> Descent:
        if self._preconditioner is None:
            return self._config.descent
        return self._config.descent.preconditioned(self._preconditioner.inverse(situation)[1])

    def _subproblem(self, operator: LinearOperator, situation: Situation) -> Subproblem:
        s = self._scales
        return Subproblem(
            operator=operator if s is None else in_scaled_parameters(operator, s),
            gradient=situation.gradient if s is None else situation.gradient / s,
            radius=situation.radius,
            damping=situation.damping,
        )

    def _scales_for(self, operator: LinearOperator) -> Float[Tensor, " D"] | None:
        scaling = self._config.scaling
        return None if scaling is None else scaling.scales(operator, self._scales)

    def length(self, situation: Situation, vector: Float[Tensor, " D"]) -> float:
        """Return |S v|, with the scales that the first proposal will have."""
        scaling = self._config.scaling
        if scaling is not None:
            self._first = self._operator(situation)
            vector = scaling.scales(self._first, None) * vector
        return float(torch.linalg.vector_norm(vector))

    def _operator(self, situation: Situation) -> LinearOperator:
        if self._average is None:
            evaluation = situation.curvature_part(self._config.fraction, linearize=True)
            return self._config.curvature.estimate(evaluation, situation.generator)
        self._evaluation = situation.evaluation
        if situation.curvature_batch is not None:
            take_statistics(self._average, situation, self._config.fraction)
        elif situation.evaluation in self._taken:
            self._average.load_state_dict(self._taken[situation.evaluation])
        else:
            take_statistics(self._average, situation, self._config.fraction)
            self._taken[situation.evaluation] = self._average.state_dict()
        return self._average.operator(situation.objective)

    def accepted(self, step: Tensor) -> None:
        self._taken.clear()
        if self._average is not None and self._evaluation is not None:
            self._average.follow(self._evaluation, step)
        if self._preconditioner is not None:
            self._preconditioner.accepted(step)
        self._evaluation = None

    def snapshot(self) -> tuple[Any, ...]:
        average = None if self._average is None else self._average.state_dict()
        return average, self._scales, None if self._preconditioner is None else self._preconditioner.snapshot()

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        self._restore_own(snapshot)
        self._taken.clear()
        if self._preconditioner is not None:
            self._preconditioner.restore(snapshot[2])

    def rejected(self, snapshot: tuple[Any, ...]) -> None:
        """Restore, and make the preconditioner anew at the next step."""
        self._restore_own(snapshot)
        if self._preconditioner is not None:
            self._preconditioner.rejected(snapshot[2])

    def _restore_own(self, snapshot: tuple[Any, ...]) -> None:
        average, self._scales, _ = snapshot
        if self._average is not None:
            self._average.load_state_dict(average)
        self._evaluation = self._first = None

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self._average is not None:
            state["average"] = self._average.state_dict()
        if self._config.scaling is not None:
            state["scales"] = self._scales
        if self._preconditioner is not None:
            state["preconditioner"] = self._preconditioner.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_entries("ModelDescent", state, self.state_dict())
        before = self.snapshot()
        try:
            if self._average is not None:
                self._average.load_state_dict(state["average"])
            if self._preconditioner is not None:
                self._preconditioner.load_state_dict(state["preconditioner"])
        except Exception:  # both or none
            self.restore(before)
            raise
        self._scales, self._evaluation = state.get("scales"), None
        self._taken.clear()
