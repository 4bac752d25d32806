"""Step rules: how far to go along a proposal.

Symbols: h objective, M its quadratic model, g gradient, Delta proposal, d_prev the last step, d the step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isnan
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.approximations import Exact
from curvlib.matrices import GGN, CurvatureMatrix
from curvlib.objective import Objective
from curvlib.optimizers.proposal import Proposal
from curvlib.optimizers.situation import Situation, check_fraction
from curvlib.solvers import Prediction, QuadraticModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """The step to take.

    Attributes:
        step: d (D,).
        prediction: M(d) - M(0), with and without damping.
        learning_rate: coefficient of the proposal.
        momentum: coefficient of the last step.
        value: h at theta + d, if the rule has made sure that it falls: the step is taken, whatever the ratio.
        judged_value: h at the step that the prediction is of, where that is another one than d.
    """

    step: Float[Tensor, " D"]
    prediction: Prediction
    learning_rate: float
    momentum: float = 0.0
    value: float | None = None
    judged_value: float | None = None


class StepRule(ABC):
    """A frozen configuration of a way to choose the step from a proposal."""

    #: Whether a choice brings the values of h that the step is judged by, as line searches do.
    brings_values: ClassVar[bool] = False

    #: Whether a choice finds a length for any direction of descent, as line searches and rescalings do.
    finds_length: ClassVar[bool] = False

    def check(self, objective: Objective) -> None:  # noqa: B027 - most rules accept every objective
        """Refuse an objective that the rule cannot treat, before any computation."""

    def after_rejection(self, previous: Float[Tensor, " D"] | None) -> Float[Tensor, " D"] | None:
        """Return d_prev of the step after a rejected one. Default: what it was before."""
        return previous

    @property
    def needs_damping(self) -> bool:
        """Whether a model of its own may be indefinite and have no minimum until the damping rises. Default: no."""
        return False

    def against_indefinite(self) -> str | None:
        """Return why the rule does not go with steps -C^-1 g of an indefinite C, None where it does, the default."""
        return None

    def against_radius(self) -> str | None:
        """Return why the rule does not go with a radius, None where it does. Default: it does not."""
        return "it chooses a length itself, which would leave the region or judge the model by another step"

    @abstractmethod
    def choose(self, situation: Situation, proposal: Proposal, previous: Float[Tensor, " D"] | None) -> Choice:
        """Return the step.

        Args:
            situation: the objective on the batch.
            proposal: what the direction gave.
            previous: d_prev, or None before the first step; after a rejected one what :meth:`after_rejection` says.
        """


@dataclass(frozen=True, kw_only=True)
class ModelRescaling(StepRule):
    """d = alpha Delta + mu d_prev, the minimum of the quadratic model with the exact matrix over both coefficients.

    Martens & Grosse 2015, sec. 6.4 and 7. It costs two Jacobian-vector products on a part of the batch.

    Args:
        matrix: the exact curvature of the model.
        fraction: part of the batch that the model's quadratic form is computed on (tau_2).
        momentum: whether d_prev takes part.
    """

    finds_length: ClassVar[bool] = True

    matrix: CurvatureMatrix = field(default_factory=GGN)
    fraction: float = 1 / 4
    momentum: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.matrix, CurvatureMatrix):
            raise TypeError(f"ModelRescaling needs a curvature matrix such as GGN(), got {self.matrix!r}.")
        check_fraction("ModelRescaling", "fraction", self.fraction)

    @property
    def needs_damping(self) -> bool:
        """Whether the matrix is no GGN or Fisher matrix."""
        return Exact(self.matrix).may_be_indefinite

    def check(self, objective: Objective) -> None:
        """Refuse a part of the batch for a loss that is a sum."""
        if self.fraction < 1 and objective.loss.additive:
            raise ValueError(
                f"ModelRescaling cannot use a part of the batch (fraction={self.fraction}) for a loss with "
                "reduction='sum': use reduction='mean', or the fraction 1 (model_fraction in the preset)."
            )

    def against_radius(self) -> str | None:
        """It rescales."""
        return "a step that is rescaled and gets momentum leaves the region"

    def choose(self, situation: Situation, proposal: Proposal, previous: Float[Tensor, " D"] | None) -> Choice:
        """Return the best combination of the proposal and the last step."""
        evaluation = situation.part(self.fraction, linearize=True)
        proposals = [proposal.step] if previous is None or not self.momentum else [proposal.step, previous]
        model = QuadraticModel(
            value=situation.evaluation.value,
            gradient=situation.gradient,
            curvature=Exact(self.matrix).estimate(evaluation, situation.generator),
            damping=situation.damping,
            regularizer=proposal.regularizer,
        )
        best = model.minimise_over(torch.stack(proposals).T)  # each column contiguous, as products want them
        alpha, *mu = best.coefficients.tolist()
        return Choice(step=best.step, prediction=best.prediction, learning_rate=alpha, momentum=mu[0] if mu else 0.0)


@dataclass(frozen=True, kw_only=True)
class FixedLength(StepRule):
    """d = alpha Delta + mu d_prev with fixed coefficients; the prediction is that of the proposal's own curvature.

    Args:
        learning_rate: alpha.
        momentum: mu, in [0, 1).
    """

    learning_rate: float = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_rates("FixedLength", self.learning_rate, self.momentum)

    def after_rejection(self, previous: Float[Tensor, " D"] | None) -> Float[Tensor, " D"] | None:
        """Return None where there is momentum: with a fixed coefficient no damping would ever shorten that part."""
        return previous if self.momentum == 0 else None

    def against_radius(self) -> str | None:
        """Whether it lengthens the step."""
        if self.learning_rate <= 1 and self.momentum == 0:
            return None
        return "a learning rate above 1 and momentum lengthen the step, which then leaves the region"

    def choose(self, situation: Situation, proposal: Proposal, previous: Float[Tensor, " D"] | None) -> Choice:
        """Return the combination with the fixed coefficients."""
        step = proposal.step if self.learning_rate == 1 else self.learning_rate * proposal.step
        if previous is not None and self.momentum > 0:
            step = step + self.momentum * previous
        return Choice(
            step=step,
            prediction=predicted(situation, proposal, step),
            learning_rate=self.learning_rate,
            momentum=self.momentum if previous is not None else 0.0,
        )


@dataclass(frozen=True, kw_only=True)
class BacktrackingLineSearch(StepRule):
    """Backtrack over the solver's iterates while h falls, then shorten the step until it falls enough (Martens 2010).

    First the stored iterates from the last to the first, as long as each has a lower h than the one after it; then
    t = 1, r, r^2, ... until h(theta + t d) <= h(theta) + c t g^T d (Armijo). h is that of the step's batch.

    Args:
        shrink: r.
        sufficient: c.
        max_trials: of the line search; after them the step is 0.
    """

    brings_values: ClassVar[bool] = True
    finds_length: ClassVar[bool] = True

    shrink: float = 0.8
    sufficient: float = 1e-2
    max_trials: int = 60

    def __post_init__(self) -> None:
        if not (0 < self.shrink < 1 and 0 < self.sufficient < 1 and self.max_trials >= 1):
            raise ValueError(
                f"BacktrackingLineSearch needs 0 < shrink, sufficient < 1 and max_trials >= 1, got {self}."
            )

    def against_radius(self) -> str | None:
        """It is a second answer to the same question."""
        return "a line search and a trust region both answer a bad step by a shorter one, each on a model of its own"

    def choose(self, situation: Situation, proposal: Proposal, previous: Float[Tensor, " D"] | None) -> Choice:
        """Return the step of the best iterate, shortened as far as needed."""
        theta = situation.objective.parameter_vector()

        def value_at(step: Tensor) -> float:
            return float(situation.evaluation.value_at(theta + step))

        step, value = _backtrack(value_at, proposal)
        # rho compares the whole step with the model, before the line search: a short step fits any model
        prediction = predicted(situation, proposal, step)
        start, slope = float(situation.evaluation.value), float(situation.gradient @ step)
        judged, rate = value, 1.0
        for _ in range(self.max_trials if slope < 0 else 0):
            if value <= start + self.sufficient * rate * slope:
                break
            rate *= self.shrink
            value = value_at(rate * step)
        else:
            rate, value = 0.0, start
        return Choice(step=rate * step, prediction=prediction, learning_rate=rate, value=value, judged_value=judged)


def _backtrack(value_at: Callable[[Tensor], float], proposal: Proposal) -> tuple[Tensor, float]:
    step, value = proposal.step, value_at(proposal.step)
    for candidate in reversed(proposal.candidates):
        if torch.equal(candidate, step):
            continue
        earlier = value_at(candidate)
        if not (earlier < value or isnan(value)):
            break
        step, value = candidate, earlier
    return step, value


def check_rates(owner: str, learning_rate: float, momentum: float) -> None:
    """Raise ValueError unless the learning rate is positive and the momentum in [0, 1)."""
    if not learning_rate > 0:
        raise ValueError(f"{owner} needs learning_rate > 0, got {learning_rate!r}.")
    if not 0 <= momentum < 1:
        raise ValueError(f"{owner} needs 0 <= momentum < 1, got {momentum!r}.")


def predicted(situation: Situation, proposal: Proposal, step: Tensor) -> Prediction:
    """Return M(d) - M(0) by the proposal's own curvature: what the solver knows, or else a quadratic form."""
    if step is proposal.step and proposal.prediction is not None:
        return proposal.prediction
    return proposal_model(situation, proposal).predict(step)


def proposal_model(situation: Situation, proposal: Proposal) -> QuadraticModel:
    """Return the quadratic model of the proposal's own curvature."""
    return QuadraticModel(
        value=situation.evaluation.value,
        gradient=situation.gradient,
        curvature=proposal.operator,
        damping=situation.damping,
        regularizer=proposal.regularizer,
    )
