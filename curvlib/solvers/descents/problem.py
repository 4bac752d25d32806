"""The step of a quadratic model inside a trust region: the problem, its answer, and who solves it.

Symbols: g (D,) gradient, C (D, D) curvature, lambda damping, d (D,) step, Delta the radius, mu >= 0 the multiplier of
the constraint |d| <= Delta, M(d) - M(0) = g^T d + 1/2 d^T (C + lambda I) d the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf, isnan
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import LinearOperator, Shifted
from curvlib.solvers.damping_scale import checked_damping
from curvlib.solvers.quadratic_model import QuadraticModel
from curvlib.solvers.reduction import Prediction
from curvlib.solvers.solution import Status


@dataclass(frozen=True, kw_only=True, eq=False)
class Subproblem:
    r"""Minimise the damped quadratic model in a ball.

    .. math:: \min_d \; g^T d + \tfrac12 d^T (C + \lambda I) d \quad \text{subject to} \quad |d| \le \Delta

    Args:
        operator: C, symmetric, of any definiteness.
        gradient: g (D,).
        radius: Delta > 0, in the units of the parameters; infinity is no constraint.
        damping: lambda >= 0, in the units of C.

    Raises:
        TypeError, ValueError: the gradient does not fit C, or a number is out of its range.
    """

    operator: LinearOperator
    gradient: Float[Tensor, " D"]
    radius: float = inf
    damping: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.operator, LinearOperator):
            raise TypeError(f"Subproblem(operator=...) must be a LinearOperator, got {type(self.operator).__name__}.")
        object.__setattr__(self, "damping", checked_damping(self.damping, "Subproblem(damping=...)"))
        object.__setattr__(self, "radius", checked_radius(self.radius, "Subproblem(radius=...)"))
        C, g = self.operator, self.gradient
        if not isinstance(g, Tensor) or g.shape != (C.size,) or g.dtype != C.dtype or g.device.type != C.device.type:
            came = f"{tuple(g.shape)} of {g.dtype} on {g.device}" if isinstance(g, Tensor) else type(g).__name__
            raise ValueError(
                f"Subproblem(gradient=...) must have shape ({C.size},) and dtype {C.dtype} on {C.device} to fit {C!r}, "
                f"got {came}."
            )
        object.__setattr__(self, "gradient", g.detach())

    @property
    def damped(self) -> LinearOperator:
        """C + lambda I."""
        return Shifted(self.operator, self.damping) if self.damping else self.operator

    def finite_radius(self, owner: str) -> float:
        """Return the radius.

        Raises:
            ValueError: it is infinite; ``owner`` names who cannot do with that.
        """
        if self.radius == inf:
            raise ValueError(
                f"{owner} needs a finite radius, got inf: pass Subproblem(radius=...), or use DampedNewton for a step "
                "without a trust region."
            )
        return self.radius

    def answer(
        self,
        step: Float[Tensor, " D"],
        *,
        on_boundary: bool,
        multiplier: float | None,
        status: Status = Status.CONVERGED,
        iterations: int = 0,
        length: float | None = None,
        regularizer: LinearOperator | None = None,
    ) -> DescentStep:
        """Return the step with the change that the model predicts, which costs a quadratic form of C.

        A step that is not finite becomes :meth:`no_step`. With a regularizer R (D, D) the damping of the model is
        lambda (I + R).
        """
        if not bool(step.isfinite().all()):
            return self.no_step(Status.NOT_FINITE)
        zero = torch.zeros((), dtype=step.dtype, device=step.device)
        model = QuadraticModel(
            value=zero,
            gradient=self.gradient,
            curvature=self.operator,
            damping=self.damping,
            regularizer=regularizer,
        )
        return DescentStep(
            step=step,
            on_boundary=on_boundary,
            multiplier=multiplier,
            prediction=model.predict(step),
            iterations=iterations,
            status=status,
            length=length,
        )

    def no_step(self, status: Status) -> DescentStep:
        """Return the step 0: right at a zero gradient, and all there is where something is not finite."""
        return DescentStep(
            step=torch.zeros_like(self.gradient),
            on_boundary=False,
            multiplier=0.0,
            prediction=Prediction(damped=0.0, undamped=0.0),
            iterations=0,
            status=status,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class DescentStep:
    """What came of a subproblem.

    Attributes:
        step: d (D,).
        on_boundary: whether d was stopped by the trust region, |d| = Delta.
        multiplier: mu with (C + lambda I + mu I) d = -g; 0 inside the region, None on the boundary where it is unknown.
        prediction: M(d) - M(0) with and without the damping.
        iterations: of an iterative solver, 0 for direct ones.
        status: how it ended. ``NEGATIVE_CURVATURE`` and ``ITERATION_LIMIT`` are those of a solver that was stopped
            early; the step is usable. ``NOT_FINITE`` comes with the last finite step.
        length: of d in the norm that the radius bounds, None where that is |d|.
    """

    step: Float[Tensor, " D"]
    on_boundary: bool
    multiplier: float | None
    prediction: Prediction
    iterations: int
    status: Status
    length: float | None = None

    @property
    def predicted_reduction(self) -> float:
        """M(0) - M(d), damped."""
        return -self.prediction.damped


class Descent(ABC):
    """Turns a gradient, a curvature, a damping and a radius into a step. A third party's class gives :meth:`solve`."""

    @property
    def has_radius(self) -> bool:
        """Whether the step keeps to a radius; a control of the radius makes sense for those alone. Default: it does."""
        return True

    @property
    def needs_definite(self) -> bool:
        """Whether C + damping I has to be positive definite for a step downhill. Default: any definiteness will do."""
        return False

    @property
    def takes_preconditioner(self) -> bool:
        """Whether :meth:`preconditioned` gives a descent. Default: it does not."""
        return False

    @property
    def needs_preconditioner(self) -> bool:
        """Whether it cannot solve without a preconditioner and has none. Default: it can."""
        return False

    @property
    def euclidean_radius(self) -> bool:
        r"""Whether the radius bounds \|d\|, and not a norm that is known along the path alone. Default: it does."""
        return True

    def damping_structure(self, like: LinearOperator) -> LinearOperator | None:
        """Return R (D, D), in the dtype of an operator, of a damping lambda (I + R). Default: None, for lambda I."""
        del like
        return None

    def preconditioned(self, preconditioner: LinearOperator) -> Descent:
        """Return the same descent with a preconditioner, an approximation of (C + damping I)^-1.

        Raises:
            TypeError: it takes none.
        """
        del preconditioner
        raise TypeError(f"{self!r} takes no preconditioner: use Steihaug() or TwoDimensionalSubspace() without one.")

    def check(self, size: int) -> None:  # noqa: B027 - most descents fit any size
        """Raise ValueError unless the descent fits problems of D = size, before there is one. Default: it does."""

    @abstractmethod
    def solve(self, problem: Subproblem) -> DescentStep:
        """Return the step."""


def checked_radius(radius: float, name: str) -> float:
    """Return the radius as a float.

    Raises:
        TypeError: radius is not a real number.
        ValueError: it is not greater than 0, or NaN.
    """
    if isinstance(radius, bool) or not isinstance(radius, Real):
        raise TypeError(f"{name} must be a number > 0, got {radius!r} of type {type(radius).__name__}.")
    value = float(radius)
    if isnan(value) or value <= 0:
        raise ValueError(f"{name} must be a number > 0, got {radius!r}.")
    return value
