"""What a direction is: a frozen configuration, the state of one optimizer, and the step that it proposes.

Symbols: g gradient, C curvature operator, lambda damping, Delta proposal.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.approximations import Approximation, RunningAverage
from curvlib.objective import Objective
from curvlib.operators import LinearOperator
from curvlib.optimizers.situation import Situation
from curvlib.optimizers.step_state import StepState
from curvlib.optimizers.words import in_words
from curvlib.solvers import Prediction
from curvlib.solvers.definiteness import takes_indefinite

# Solver = anything that turns (C, lambda) into an operator close to (C + lambda I)^-1.
Solver = Callable[[LinearOperator, float], LinearOperator]


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposal:
    """A proposed step and what is known about it.

    Attributes:
        step: Delta (D,).
        operator: the curvature that it was made with, without the damping.
        regularizer: R, where the damping is lambda (I + R); None for lambda I.
        candidates: earlier iterates of the solver, first to last, for backtracking.
        mean_curvature: trace(C) / D, or an unbiased estimate; None where it is not known at once, and the optimizer
            estimates it from ``operator`` for controls that need it.
        iterations: of the solver, 0 for direct ones.
        on_boundary: whether the step was stopped by the radius.
        prediction: M(Delta) - M(0), where the solver knows it.
        scales: s (D,), where the radius bounds |diag(s) Delta|; None for |Delta|.
        length: of the step as the radius measures it, where that norm is known of this step alone.
    """

    step: Float[Tensor, " D"]
    operator: LinearOperator
    regularizer: LinearOperator | None = None
    candidates: tuple[Float[Tensor, " D"], ...] = ()
    mean_curvature: float | None = None
    iterations: int = 0
    on_boundary: bool = False
    prediction: Prediction | None = None
    scales: Float[Tensor, " D"] | None = None
    length: float | None = None

    def length_of(self, step: Float[Tensor, " D"]) -> float:
        """Return the length of a step as the radius measures it; with a ``length``, of multiples of the step alone."""
        if self.length is not None:
            whole, part = torch.stack([torch.linalg.vector_norm(v) for v in (self.step, step)]).tolist()
            return self.length * part / whole if whole > 0 else 0.0
        return float(torch.linalg.vector_norm(step if self.scales is None else self.scales * step))


class DirectionState(StepState):
    """The running state of a direction in one optimizer.

    Attributes:
        description: of the configuration that it was started from.
    """

    description: str = ""

    @abstractmethod
    def propose(self, situation: Situation) -> Proposal:
        """Return a step for the situation, and update the state."""

    def length(self, situation: Situation, vector: Float[Tensor, " D"]) -> float:
        """Return the length of a vector (D,) as the radius measures it, before the first proposal. Default: |v|."""
        return float(torch.linalg.vector_norm(vector))


class Direction(ABC):
    """A frozen configuration of a way to propose steps."""

    @property
    def has_radius(self) -> bool:
        """Whether its steps keep to the radius of the situation, and need one. Default: they do not."""
        return False

    @property
    def needs_damping(self) -> bool:
        """Whether its C + lambda I may turn out not to be positive definite, and has to be. Default: no.

        At some step it then raises ``NotPositiveDefiniteError`` or goes uphill, and a control that raises the damping
        is asked for.
        """
        return False

    @property
    def solves_indefinite(self) -> bool:
        """Whether its steps may be -(C + lambda I)^-1 g of an indefinite C + lambda I. Default: no."""
        return False

    @property
    def may_lack_length(self) -> bool:
        """Whether a step may be a direction of descent alone, without a minimum of a model along it. Default: no."""
        return False

    @property
    def takes_curvature_batch(self) -> bool:
        """Whether it asks for :meth:`Situation.curvature_part`, which may be a batch of its own. Default: no."""
        return False

    @property
    def knows_lengths(self) -> bool:
        """Whether :meth:`DirectionState.length` tells the length of any vector. Default: it does."""
        return True

    @abstractmethod
    def start(self, objective: Objective) -> DirectionState:
        """Return the state before the first step.

        Raises:
            UnsupportedLayerError: the curvature cannot treat the model; named before any computation.
        """

    def description(self) -> str:
        """Return the configuration in words, the same in every process: checkpoints of another one are refused."""
        return in_words(self)


def check_approximation(owner: str, name: str, value: object) -> None:
    """Raise TypeError unless the value is an approximation."""
    if not isinstance(value, Approximation):
        raise TypeError(f"{owner} needs {name} to be an approximation such as KFAC(Fisher()), got {value!r}.")


def refuse_indefinite(owner: str, name: str, approximation: Approximation, solver: object) -> None:
    """Raise ValueError for an approximation that may be indefinite and a solver that cannot do with that."""
    if approximation.may_be_indefinite and not takes_indefinite(solver):
        raise ValueError(
            f"{owner} needs a positive definite C + damping I for {solver!r}, and {name}={approximation!r} may be "
            "indefinite, so that training would fail at some step. Use a curvature of GGN() or Fisher(), "
            "RootMeanSquareDiagonal(...) for a diagonal as in AdaHessian, or ModelDescent with Steihaug() in a trust "
            "region. With LevenbergMarquardt(), which raises the damping, ModelDescent with DampedNewton() or MINRES() "
            "as the solver goes as well."
        )


def refuse_parts_of_sums(owner: str, fraction: float, objective: Objective) -> None:
    """Raise ValueError for a part of the batch and a loss that is a sum."""
    if fraction < 1 and objective.loss.additive:
        raise ValueError(
            f"{owner} cannot take curvature from a part of the batch (fraction={fraction}) for a loss with "
            "reduction='sum', whose scale depends on the number of examples: use reduction='mean', or the fraction 1 "
            "(in the presets statistics_fraction, model_fraction and curvature_fraction)."
        )


def probed_mean_curvature(operator: LinearOperator, generator: torch.Generator) -> float:
    """Return an unbiased estimate of trace(C) / D from one vector of random signs (Hutchinson)."""
    signs = torch.randint(0, 2, (operator.size, 1), generator=generator, device=generator.device).to(
        operator.device, operator.dtype
    )
    return float(operator.quadratic_form(2 * signs - 1)) / operator.size


def refuse_what_follows_steps(owner: str, name: str, approximation: Approximation) -> None:
    """Raise ValueError for an approximation that learns from steps, where it would be estimated anew at each."""
    if approximation.follows_steps:
        raise ValueError(
            f"{owner} estimates {name} anew at each step, and {approximation!r} learns from steps: use it as the "
            "curvature of PreconditionedGradient or ModelDescent."
        )


def take_statistics(average: RunningAverage, situation: Situation, fraction: float) -> None:
    """Let the average take in the statistics of a part of the batch; warn where they are not finite and left out."""
    if not average.reads_batches:
        return
    evaluation = situation.curvature_part(fraction, linearize=False)
    if not average.update(evaluation, situation.generator):
        warnings.warn(
            f"the statistics of a batch were not finite and were left out ({average.skipped} so far)",
            RuntimeWarning,
            stacklevel=2,
        )
