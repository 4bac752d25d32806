"""What there is to say about one step of an optimizer.

Symbols: h objective, g gradient, M quadratic model, lambda damping, Delta radius, rho reduction ratio, d step.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did.

    Attributes:
        loss: h on the batch before the step, the l2 term included.
        predicted: M(d) - h by the convention of the ratio. Where a line search has shortened the step, ``predicted``
            and ``ratio`` are those of the whole step, since a short step fits any model.
        actual: h(theta + d) - h on the same batch, for the step that was taken, or None if it was not needed.
        ratio: rho, or None if it was not needed; NaN where there was no step.
        damping: lambda of this step.
        accepted: whether the parameters were changed.
        gradient_evaluations: work in gradients of the whole batch, by counts of forward and backward passes through the
            network; second moments, inverses and their products are not counted.
        learning_rate: coefficient of the proposal.
        momentum: coefficient of the last step.
        iterations: of an iterative solver.
        radius: Delta of this step, None where there is no trust region.
        gradient_norm: the largest entry of g before the step, by size.
        step_norm: |d|, whether or not it was accepted; of the proposal, where a line search has found no step along it.
        failure: the reason, where C + lambda I was not positive definite, so that there was no step to judge and the
            control has raised the damping; ``predicted`` and ``ratio`` are NaN. None otherwise.
    """

    loss: float
    predicted: float
    actual: float | None
    ratio: float | None
    damping: float
    accepted: bool
    gradient_evaluations: float
    learning_rate: float = 0.0
    momentum: float = 0.0
    iterations: int = 0
    radius: float | None = None
    gradient_norm: float = 0.0
    step_norm: float = 0.0
    failure: str | None = None
