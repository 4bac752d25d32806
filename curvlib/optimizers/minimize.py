"""An optimizer on one batch until it has converged.

Symbols: h the objective on the batch, g its gradient, theta the parameters, d a step, rho its reduction ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from math import inf
from numbers import Real

import torch

from curvlib.objective import Batch, Evaluation, Objective
from curvlib.optimizers.second_order import SecondOrderOptimizer
from curvlib.optimizers.step_result import StepResult

# A step of this ratio agrees well enough with the model for its size to say something about the minimum.
_AGREES = 0.25
# The difference of two values of h is rounding noise below a few units in their last place.
_NOISE_IN_EPS = 8.0


class MinimizationStatus(Enum):
    r"""How a minimization ended.

    * ``GRADIENT``: max \|g_i\| < gtol.
    * ``VALUE``: a step that agrees with its model (rho > 1/4) has lowered h by less than ftol h.
    * ``STEP``: a proposed step is shorter than xtol (xtol + \|theta\|).
    * ``ROUNDING_FLOOR``: for ``patience`` steps neither h nor the gradient has fallen below its least so far, and the
      model predicts changes of h below its rounding errors: the tolerances ask for more than the dtype can give.
    * ``STEP_LIMIT``: ``max_steps`` came first.
    * ``STALLED``: for ``patience`` steps neither has fallen, although the model predicts that h should: all steps were
      rejected, or a line search has found none. So ends an exact fit, whose h falls to the squares of rounding errors,
      where all tolerances are 0.
    * ``STOPPED``: the caller's ``stop_when`` asked for it.
    """

    GRADIENT = 0
    VALUE = 1
    STEP = 2
    ROUNDING_FLOOR = 3
    STEP_LIMIT = 4
    STALLED = 5
    STOPPED = 6

    @property
    def converged(self) -> bool:
        """Whether a tolerance was met, or the minimum is as close as the dtype allows."""
        return self.value <= MinimizationStatus.ROUNDING_FLOOR.value


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """When a minimum is close enough, in the meaning of ``scipy.optimize.least_squares``; 0 turns one off.

    Args:
        ftol: of the relative change of h.
        xtol: of the relative change of the parameters.
        gtol: of the largest entry of the gradient, in the units of h over those of the parameter. h is |r|^2 for
            ``MSELoss(reduction="sum")``, of which SciPy takes one half.

    Raises:
        TypeError, ValueError: a tolerance is no number in [0, 1) (gtol: no finite number >= 0).
    """

    ftol: float = 1e-8
    xtol: float = 1e-8
    gtol: float = 1e-8

    def __post_init__(self) -> None:
        for name, most in (("ftol", 1.0), ("xtol", 1.0), ("gtol", float("inf"))):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"Tolerances({name}=...) must be a number, got {value!r}.")
            if not 0 <= float(value) < most:
                raise ValueError(f"Tolerances needs 0 <= {name} < {most}, got {value!r}.")

    def met_by(self, result: StepResult, parameter_norm: float) -> MinimizationStatus | None:
        """Return which of them a step has met, if any.

        Args:
            result: of the step.
            parameter_norm: |theta| after it.
        """
        if result.gradient_norm < self.gtol or result.gradient_norm == 0.0:
            return MinimizationStatus.GRADIENT
        agrees = result.ratio is None or result.ratio > _AGREES
        if (
            result.accepted
            and agrees
            and result.actual is not None
            and abs(result.actual) < self.ftol * abs(result.loss)
        ):
            return MinimizationStatus.VALUE
        # A step of exactly nothing beside a gradient is a failure to find one, and no sign of a minimum.
        if 0.0 < result.step_norm < self.xtol * (self.xtol + parameter_norm):
            return MinimizationStatus.STEP
        return None


@dataclass(frozen=True, kw_only=True)
class Minimization:
    """What a minimization has reached. The parameters are in the model.

    Attributes:
        status: how it ended.
        value: h at the end.
        gradient_norm: the largest entry of the gradient at the end, by size.
        steps: how many were tried.
        accepted: how many of them were taken.
        gradient_evaluations: work in gradients of the batch, as in :class:`StepResult`.
        last: what the last step did, None if there was none.
    """

    status: MinimizationStatus
    value: float
    gradient_norm: float
    steps: int
    accepted: int
    gradient_evaluations: float
    last: StepResult | None

    @property
    def converged(self) -> bool:
        """Whether a tolerance was met, or the minimum is as close as the dtype allows."""
        return self.status.converged

    def raise_unless_converged(self) -> Minimization:
        """Return self.

        Raises:
            RuntimeError: it has not converged.
        """
        if not self.converged:
            raise RuntimeError(f"the minimization {self}.")
        return self

    def __str__(self) -> str:
        return (
            f"{_DIAGNOSES[self.status]} after {self.steps} steps ({self.accepted} of them taken): objective "
            f"{self.value:.10g}, largest entry of the gradient {self.gradient_norm:.3g}"
        )


_DIAGNOSES = {
    MinimizationStatus.GRADIENT: "converged, the gradient is below gtol,",
    MinimizationStatus.VALUE: "converged, the objective changes by less than ftol,",
    MinimizationStatus.STEP: "converged, the steps are shorter than xtol,",
    MinimizationStatus.ROUNDING_FLOOR: "converged to the rounding errors of the dtype, above the tolerances,",
    MinimizationStatus.STEP_LIMIT: "stopped at max_steps without meeting a tolerance",
    MinimizationStatus.STALLED: "stalled, neither the objective nor its gradient falls,",
    MinimizationStatus.STOPPED: "was stopped by stop_when",
}


def minimize(
    optimizer: SecondOrderOptimizer,
    batch: Batch,
    *,
    tolerances: Tolerances | None = None,
    max_steps: int = 1000,
    patience: int = 50,
    stop_when: Callable[[StepResult], bool] | None = None,
) -> Minimization:
    """Take steps on one batch until a tolerance is met, and say how that ended.

    After a rejected step the next one starts from the same evaluation: value, gradient and the statistics of
    ``ModelDescent`` are not computed again, and a model with dropout keeps its masks. A KeyboardInterrupt passes
    through; the parameters are then those of the last accepted step, and a second call goes on from there.

    Args:
        optimizer: any; ``levenberg_marquardt(objective)`` or ``gauss_newton(objective)`` for least squares.
        batch: ``(inputs, targets)``, all of the data.
        tolerances: ``Tolerances()`` by default.
        max_steps: the most steps, at least 1.
        patience: the most steps in a row that bring neither a lower h nor a smaller gradient, at least 1.
        stop_when: looks at each step's result; True ends the loop.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of its range; nothing is changed.
        NonFiniteLossError: the objective is not finite where a step starts: at the first, or where a step that no ratio
            and no line search judges has led.
        SolveError: the curvature could not be inverted; the parameters are those of the last accepted step.

    Example:
        >>> import curvlib
        >>> x = torch.linspace(0.0, 1.0, 5, dtype=torch.float64).unsqueeze(1)
        >>> objective = curvlib.Objective(torch.nn.Linear(1, 1).double(), torch.nn.MSELoss(reduction="sum"))
        >>> minimize(curvlib.optimizers.levenberg_marquardt(objective), (x, 3.0 * x)).converged
        True
    """
    if not isinstance(optimizer, SecondOrderOptimizer):
        raise TypeError(f"minimize needs a SecondOrderOptimizer, got {type(optimizer).__name__}.")
    tolerances = tolerances if tolerances is not None else Tolerances()
    if not isinstance(tolerances, Tolerances):
        raise TypeError(f"minimize needs tolerances to be Tolerances(...), got {tolerances!r}.")
    for name, count in (("max_steps", max_steps), ("patience", patience)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"minimize needs an integer {name} >= 1, got {count!r}.")
    objective, status, results = optimizer.objective, None, _Totals()
    evaluations = _Evaluations(objective, batch)
    while status is None:
        result = optimizer.step(evaluations.here())
        results.add(result)
        status = tolerances.met_by(result, float(torch.linalg.vector_norm(objective.parameter_vector())))
        if status is None and stop_when is not None and stop_when(result):
            status = MinimizationStatus.STOPPED
        if status is None and results.without_progress >= patience:
            status = _why_without_progress(result, objective.layout.dtype)
        if status is None and results.steps >= max_steps:
            status = MinimizationStatus.STEP_LIMIT
    value, gradient_norm = evaluations.at_the_end()
    if status is MinimizationStatus.STEP_LIMIT and gradient_norm < tolerances.gtol:
        status = MinimizationStatus.GRADIENT
    return Minimization(
        status=status,
        value=value,
        gradient_norm=gradient_norm,
        steps=results.steps,
        accepted=results.accepted,
        gradient_evaluations=results.work + evaluations.work,
        last=results.last,
    )


class _Evaluations:
    """The objective on the batch where the parameters are, made anew only where these have changed.

    Attributes:
        work: what the evaluations have cost outside of steps.
    """

    def __init__(self, objective: Objective, batch: Batch) -> None:
        self._objective, self._batch = objective, batch
        self._last: Evaluation | None = None
        self.work = 0.0

    def here(self, *, linearize: bool = True) -> Evaluation:
        if self._last is None or not self._last.is_fresh:
            self._last = None  # frees its graph before the next one is built
            self._last = self._objective.at(self._batch, linearize=linearize)
            self.work += self._last.work
        return self._last

    def at_the_end(self) -> tuple[float, float]:
        """Return h and the largest entry of the gradient."""
        evaluation = self.here(linearize=False)
        before = evaluation.work
        value, largest = torch.stack([evaluation.value, evaluation.gradient().abs().amax()]).tolist()
        self.work += evaluation.work - before
        return value, largest


def _why_without_progress(result: StepResult, dtype: torch.dtype) -> MinimizationStatus:
    # The model is right about such small changes, and a difference of values of h cannot see them. No step at all
    # beside a gradient is a failure to find one.
    small = _NOISE_IN_EPS * torch.finfo(dtype).eps * abs(result.loss)
    at_floor = result.step_norm > 0.0 and abs(result.predicted) <= small
    return MinimizationStatus.ROUNDING_FLOOR if at_floor else MinimizationStatus.STALLED


class _Totals:
    """Sums over the steps so far, and the least values."""

    def __init__(self) -> None:
        self.steps = self.accepted = self.without_progress = 0
        self.work, self._value, self._gradient_norm = 0.0, inf, inf
        self.last: StepResult | None = None

    def add(self, result: StepResult) -> None:
        progress = result.loss < self._value or result.gradient_norm < self._gradient_norm
        self.without_progress = 0 if progress else self.without_progress + 1
        self._value = min(self._value, result.loss)
        self._gradient_norm = min(self._gradient_norm, result.gradient_norm)
        self.steps += 1
        self.accepted += result.accepted
        self.work += result.gradient_evaluations
        self.last = result
