"""The second-order optimizer: a composition of a direction, a step rule and a control of damping or radius.

Symbols: theta parameters, h objective, g gradient, M quadratic model, lambda damping, Delta radius, rho
reduction ratio, d step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, isfinite, nan
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.approximations import Exact
from curvlib.matrices import GGN
from curvlib.objective import Batch, Evaluation, Objective
from curvlib.operators import full_precision
from curvlib.optimizers.control import ControlState, StepControl
from curvlib.optimizers.judgement import judge
from curvlib.optimizers.pairing import check_pairing
from curvlib.optimizers.proposal import Direction, Proposal, probed_mean_curvature
from curvlib.optimizers.situation import Situation, loaded_generator
from curvlib.optimizers.step_result import StepResult
from curvlib.optimizers.step_rules import StepRule
from curvlib.optimizers.words import in_words, objective_in_words, refuse_another
from curvlib.solvers import DampedRatio, DampingControl, NotPositiveDefiniteError, RadiusControl, RatioConvention


class NonFiniteLossError(FloatingPointError):
    """The objective or its gradient is not finite; nothing was changed."""


@dataclass(kw_only=True, eq=False)
class _Before:
    """What an error within a step returns to.

    Attributes:
        control: the state of damping and radius.
        previous: the last step.
        draws: the state of the random generator.
        direction: the snapshot of the direction.
        theta: the parameters (D,), once they are about to be written.
    """

    control: ControlState | None
    previous: Tensor | None
    draws: Tensor
    direction: Any
    theta: Tensor | None = None


class SecondOrderOptimizer(torch.optim.Optimizer):
    """theta <- theta + d, with d proposed by a curvature, scaled by a step rule and judged by a control.

    The parameters are written once, at the end of an accepted step: an error or a rejected step leaves them untouched.
    An error or an interruption at any place of a step restores everything in :meth:`state_dict` bit for bit. A rejected
    step restores the state of the direction and the last step; the damping or the radius moves as its control says,
    warm starts are forgotten, inverses made anew, and random numbers stay drawn. In both cases the buffers of the model
    and PyTorch's own random numbers are as the forward pass left them.

    Args:
        objective: what to minimise; it brings the model.
        direction: how a curvature and the damping turn the gradient into a proposal.
        step_rule: how far to go along it.
        damping: how the damping follows the reduction ratio; None for 0, with a radius.
        radius: how the radius of a trust region does, for directions whose steps keep to one; the damping then does not
            follow the ratio.
        ratio: which model the ratio compares with.
        seed: of the optimizer's own random generator (label draws, parts of batches).

    Raises:
        UnsupportedLayerError, ValueError: the objective does not fit one of the parts, or the parts do not go together;
            named before any computation.

    Example:
        >>> import curvlib
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> optimizer = curvlib.optimizers.kfac(objective)
        >>> batch = torch.randn(64, 3), torch.randn(64, 2)
        >>> first = optimizer.step(batch)
        >>> optimizer.step(batch).loss < first.loss
        True
    """

    def __init__(
        self,
        objective: Objective,
        *,
        direction: Direction,
        step_rule: StepRule,
        damping: DampingControl | None = None,
        radius: RadiusControl | None = None,
        ratio: RatioConvention | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(objective, Objective):
            raise TypeError(f"SecondOrderOptimizer needs a curvlib.Objective, got {type(objective).__name__}.")
        self.control = StepControl.of(damping, radius)
        self.ratio = ratio if ratio is not None else DampedRatio()
        check_pairing(direction, step_rule, self.control, self.ratio)
        super().__init__(objective.parameters, {})
        step_rule.check(objective)
        self.objective = objective
        self.step_rule = step_rule
        self._direction = direction.start(objective)
        self._direction.description = direction.description()
        self._takes_curvature_batch = direction.takes_curvature_batch
        # A control that starts on the scale of curvature or parameters starts with the first batch.
        late = self.control.starts_with_a_batch
        self._state: ControlState | None = None if late else self.control.start()
        self._previous: Tensor | None = None
        self._generator = torch.Generator(objective.layout.device).manual_seed(seed)

    @property
    def damping(self) -> float | None:
        """Lambda of the next step; None before the first step where it starts on the scale of the curvature."""
        return None if self._state is None else self._state.damping.damping

    @property
    def radius(self) -> float | None:
        """Delta of the next step; None where there is no trust region."""
        return None if self._state is None or self._state.radius is None else self._state.radius.radius

    def step(  # type: ignore[override]
        self, batch: Batch | Evaluation, *, curvature_batch: Batch | None = None
    ) -> StepResult:
        """Take one step on a batch ``(inputs, targets)`` and return what it did.

        Args:
            batch: of h, of its gradient, and of every value that the step is judged by. Or the objective's evaluation
                on it, ``objective.at(batch)``, at the parameters as they are: what is known there is not computed
                again, such as after a step on the same batch that was rejected.
            curvature_batch: of the curvature that the direction is made with, in place of the direction's fraction of
                the batch, such as a small batch beside all data for h and the gradient (Martens 2010, sec. 4.4). The
                model in the reduction ratio is that of the direction; a step rule's own model stays on the batch.

        Raises:
            ValueError: the direction takes no curvature batch, or it does not fit a loss that is a sum; or the
                evaluation is that of another objective.
            StaleEvaluationError: parameters or batch have changed since the evaluation was made.
            NonFiniteLossError: the objective or its gradient is NaN or infinite.
            SolveError: the curvature could not be inverted. Where C + lambda I is not positive definite and the control
                raises the damping, as ``LevenbergMarquardt`` does up to its ceiling, the step is a rejected one instead
                (``StepResult.failure``).

        After any error, also one of the model's or a KeyboardInterrupt, the parameters and :meth:`state_dict` are
        unchanged.
        """
        if curvature_batch is not None and not self._takes_curvature_batch:
            raise ValueError(
                f"step(curvature_batch=...): {self._direction.description} makes no curvature of a batch of its own; "
                "leave it out, or use TruncatedNewton, PreconditionedGradient or ModelDescent."
            )
        evaluation, work_before = self._evaluated(batch)
        before = self._snapshot()
        try:
            with full_precision(self.objective.layout.device):
                gradient, largest = self._finite_gradient(evaluation)
                if largest == 0.0:
                    return self._stationary(evaluation, work_before)
                situation = Situation(self.objective, evaluation.batch, evaluation, gradient, 0.0, self._generator)
                situation.gradient_norm, situation.curvature_batch = largest, curvature_batch
                situation.work_before = work_before
                return self._step(situation, before)
        except BaseException:  # a KeyboardInterrupt as well
            self._restore(before)
            raise

    def _evaluated(self, batch: Batch | Evaluation) -> tuple[Evaluation, float]:
        """Return the evaluation on a batch, and what of its work was no part of this step."""
        if not isinstance(batch, Evaluation):
            return self.objective.at(batch), 0.0
        if batch.objective is not self.objective:
            raise ValueError(
                "step(evaluation) needs an evaluation of the optimizer's own objective: call optimizer.objective.at."
            )
        return batch, batch.work

    def _step(self, situation: Situation, before: _Before) -> StepResult:
        """Take the step; where this raises, :meth:`_restore` undoes what it has changed."""
        state = self._state if self._state is not None else self._started(situation)
        situation.damping, first = state.damping.damping, state.damping.first
        situation.damping_share = situation.damping / first if first else 1.0
        situation.radius = inf if state.radius is None else state.radius.radius
        result, step = self._propose(situation, state)
        if result.accepted:
            self._direction.accepted(step)
            self._previous = step
        else:
            self._direction.rejected(before.direction)
            self._previous = self.step_rule.after_rejection(self._previous)
        # what the direction has learned from the step is work as well
        result = replace(result, gradient_evaluations=situation.work)
        if result.accepted:
            before.theta = self.objective.parameter_vector()
            self.objective.layout.write(self.objective.parameters, before.theta + step)
        return result

    def _snapshot(self) -> _Before:
        """Return what :meth:`_restore` takes."""
        return _Before(
            control=self._state,
            previous=self._previous,
            draws=self._generator.get_state(),
            direction=self._direction.snapshot(),
        )

    def _restore(self, before: _Before) -> None:
        """Return to what was before the step, or before a state was loaded."""
        self._direction.restore(before.direction)
        self._state, self._previous = before.control, before.previous
        self._generator.set_state(before.draws)
        if before.theta is not None:
            self.objective.layout.write(self.objective.parameters, before.theta)

    def _started(self, situation: Situation) -> ControlState:
        """Return the first state of a control that starts with the first batch."""
        curvature = length = None
        if self.control.damping.needs_gradient_curvature:
            curvature = _curvature_along(situation.gradient, situation.evaluation)
        if self.control.needs_parameter_length:
            length = self._direction.length(situation, self.objective.parameter_vector())
        return self.control.start(gradient_curvature=curvature, parameter_length=length)

    def _propose(self, situation: Situation, state: ControlState) -> tuple[StepResult, Float[Tensor, " D"]]:
        """Return a step and what there is to say about it, and move the control."""
        try:
            proposal = self._direction.propose(situation)
        except NotPositiveDefiniteError as error:
            return self._failed(situation, state, error), torch.zeros_like(situation.gradient)
        choice = self.step_rule.choose(situation, proposal, self._previous)
        moves = bool(choice.step.any())
        actual, ratio = judge(
            situation,
            choice,
            self.ratio,
            needed=self.control.needs_ratio(state),
            moves=moves or bool(proposal.step.any()),
        )
        found = choice.learning_rate != 0 and moves
        accepted = found and (choice.value is not None or self.control.accept(ratio))
        result = StepResult(
            loss=float(situation.evaluation.value),
            predicted=self.ratio.predicted_change(choice.prediction),
            actual=actual,
            ratio=ratio,
            damping=situation.damping,
            accepted=accepted,
            learning_rate=choice.learning_rate,
            momentum=choice.momentum,
            iterations=proposal.iterations,
            gradient_evaluations=situation.work,
            radius=None if state.radius is None else state.radius.radius,
            gradient_norm=situation.gradient_norm,
            step_norm=float(torch.linalg.vector_norm(choice.step if choice.learning_rate != 0 else proposal.step)),
        )
        if accepted and ratio is None and not bool(choice.step.isfinite().all()):
            raise NonFiniteLossError(
                "the proposed step is not finite; the parameters are unchanged. Use more damping or a shorter step."
            )
        self._state = self.control.update(
            state,
            ratio,
            mean_curvature=self._mean_curvature(proposal),
            on_boundary=proposal.on_boundary,
            step_length=proposal.length_of(choice.step) if moves and state.radius is not None else None,
            accepted=accepted,
        )
        return result, choice.step

    def _mean_curvature(self, proposal: Proposal) -> float | None:
        """Return trace(C) / D as the direction knows it, or an estimate where the control needs one."""
        if proposal.mean_curvature is None and self.control.needs_mean_curvature:
            return probed_mean_curvature(proposal.operator, self._generator)
        return proposal.mean_curvature

    def _failed(self, situation: Situation, state: ControlState, error: NotPositiveDefiniteError) -> StepResult:
        """Raise the damping and return what there is to say; raise the error where the control has no more damping."""
        raised = self.control.raised(state)
        if raised is None:
            raise error
        self._state = raised
        return StepResult(
            loss=float(situation.evaluation.value),
            predicted=nan,
            actual=None,
            ratio=nan,
            damping=situation.damping,
            accepted=False,
            gradient_evaluations=situation.work,
            gradient_norm=situation.gradient_norm,
            failure=str(error),
        )

    def _finite_gradient(self, evaluation: Evaluation) -> tuple[Float[Tensor, " D"], float]:
        """Return the gradient and its largest entry; refuse what is not finite before anything changes."""
        gradient = evaluation.gradient()
        value, square, largest = torch.stack([evaluation.value, gradient @ gradient, gradient.abs().amax()]).tolist()
        if not (isfinite(value) and isfinite(square)):
            raise NonFiniteLossError(
                f"the objective is {value} and its gradient has squared norm {square} on this batch; the parameters "
                "and the optimizer are unchanged. Look for non-finite inputs or targets, or start again from an "
                "earlier checkpoint with more damping."
            )
        return gradient, largest

    def _stationary(self, evaluation: Evaluation, work_before: float) -> StepResult:
        """Return the result of a batch with a zero gradient, where every proposal is zero."""
        return StepResult(
            loss=float(evaluation.value),
            predicted=0.0,
            actual=0.0,
            ratio=None,
            damping=self.damping if self.damping is not None else 0.0,
            accepted=False,
            gradient_evaluations=evaluation.work - work_before,
            radius=self.radius,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: the parameters are those of the objective, all with the same settings."""
        if hasattr(self, "objective"):
            raise TypeError(
                "SecondOrderOptimizer optimises all parameters of its objective together; make a new Objective and a "
                "new optimizer instead of adding a parameter group."
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "SecondOrderOptimizer cannot be copied or pickled: it belongs to one model. Save state_dict() and load it "
            "into an optimizer composed in the same way."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, besides the model: a resumed run continues bit for bit."""
        return {
            **super().state_dict(),
            "made_for": self._made_for(),
            "direction": self._direction.state_dict(),
            "control": None if self._state is None else self._state.state_dict(),
            "previous": self._previous,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, for an optimizer composed in the same way and a model of equal shape.

        Raises:
            ValueError: the state is that of another composition or model, or incomplete.

        After any error, also a KeyboardInterrupt, nothing is changed.
        """
        before, groups = self._snapshot(), (self.state, self.param_groups)
        try:
            self._load(state_dict)
        except BaseException as error:
            self._restore(before)
            self.state, self.param_groups = groups
            if isinstance(error, ValueError) or not isinstance(error, Exception):
                raise
            raise ValueError(
                f"the state is incomplete or cannot be read ({type(error).__name__}: {error}); nothing was changed. "
                "Load what state_dict() of an optimizer composed in the same way gave."
            ) from error

    def _load(self, state_dict: dict[str, Any]) -> None:
        """Load a state; where this raises, :meth:`load_state_dict` undoes what it has changed."""
        missing = self.state_dict().keys() - state_dict.keys()
        if missing:
            raise ValueError(f"this is no state of a SecondOrderOptimizer: it lacks {', '.join(sorted(missing))}.")
        refuse_another(self._made_for(), state_dict["made_for"])
        control, previous = self.control.loaded(state_dict["control"]), state_dict["previous"]
        if previous is not None and previous.shape != (self.objective.layout.size,):
            size = self.objective.layout.size
            raise ValueError(f"the last step of the state must have shape ({size},), got {tuple(previous.shape)}.")
        generator = loaded_generator(state_dict["generator"], self.objective.layout.device)
        self._direction.load_state_dict(state_dict["direction"])
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._state, self._previous, self._generator = control, previous, generator

    def _made_for(self) -> dict[str, Any]:
        return {
            **objective_in_words(self.objective),
            "direction": self._direction.description,
            "step rule": in_words(self.step_rule),
            "damping control": in_words(self.control.damping),
            "radius control": in_words(self.control.radius),
            "ratio": in_words(self.ratio),
        }


def _curvature_along(gradient: Float[Tensor, " D"], evaluation: Evaluation) -> float:
    """Return g^T C g / g^T g for the exact GGN, by one Jacobian-vector product."""
    form = Exact(GGN()).estimate(evaluation).quadratic_form(gradient.unsqueeze(1))
    return float(form / (gradient @ gradient))
