"""A limit of the step's length in the norm of the curvature.

Symbols: g gradient, C curvature with its damping, Delta = -C^-1 g proposal, eta learning rate, d_prev the last step, d
the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from jaxtyping import Float
from torch import Tensor

from curvlib.optimizers.proposal import Proposal
from curvlib.optimizers.situation import Situation
from curvlib.optimizers.step_rules import Choice, StepRule, check_rates, proposal_model


@dataclass(frozen=True, kw_only=True)
class NormConstraint(StepRule):
    r"""d = nu eta Delta + mu d_prev, where nu keeps the squared norm of the first part in the metric C below a limit.

    .. math:: \nu = \min\Bigl(1, \sqrt{\frac{c}{\eta^2 \, g^T C^{-1} g}}\Bigr)

    Ba, Grosse & Martens, "Distributed second-order optimization using Kronecker-factored approximations" (2017);
    to second order a limit of the KL divergence between the predictions before and after the step, if C is the Fisher
    matrix. g^T C^-1 g is -g^T Delta, so that C contains the damping. An indefinite C is no metric: g^T C^-1 g may be 0
    or negative however long Delta is, so that it limits nothing. Directions that solve such systems, as with ``MINRES``
    and a Hessian, are therefore refused when the optimizer is made. Where g^T C^-1 g is not positive all the same, by
    an inexact solve, there is no step, and a control that follows the reduction ratio raises the damping.

    Args:
        constraint: c > 0.
        learning_rate: eta.
        momentum: mu, in [0, 1).
    """

    constraint: float = 1e-3
    learning_rate: float = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not (self.constraint > 0 and isfinite(self.constraint)):
            raise ValueError(f"NormConstraint needs a finite constraint > 0, got {self.constraint!r}.")
        check_rates("NormConstraint", self.learning_rate, self.momentum)

    def after_rejection(self, previous: Float[Tensor, " D"] | None) -> Float[Tensor, " D"] | None:
        """Return None where there is momentum: with a fixed coefficient no damping would ever shorten that part."""
        return previous if self.momentum == 0 else None

    def against_indefinite(self) -> str | None:
        """It needs a metric."""
        return "it limits g^T C^-1 g, which may be 0 or negative for steps of any length, since C is no metric then"

    def against_radius(self) -> str | None:
        """It takes g^T C^-1 g from the proposal."""
        return "it reads g^T C^-1 g off a proposal -C^-1 g, and a step that a radius has cut off is none"

    def choose(self, situation: Situation, proposal: Proposal, previous: Float[Tensor, " D"] | None) -> Choice:
        """Return the limited step."""
        square = -float(situation.gradient @ proposal.step)
        if not square > 0:
            zero = situation.gradient.new_zeros(len(situation.gradient))
            return Choice(step=zero, prediction=proposal_model(situation, proposal).predict(zero), learning_rate=0.0)
        rate = self.learning_rate * min(1.0, (self.constraint / square) ** 0.5 / self.learning_rate)
        step, momentum = rate * proposal.step, 0.0
        if previous is not None and self.momentum > 0:
            step, momentum = step + self.momentum * previous, self.momentum
        return Choice(
            step=step,
            prediction=proposal_model(situation, proposal).predict(step),
            learning_rate=rate,
            momentum=momentum,
        )
