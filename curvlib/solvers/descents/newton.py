"""The damped Newton step, which has no radius.

Symbols: g gradient, C curvature, lambda damping, d step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from math import inf

from jaxtyping import Float
from torch import Tensor

from curvlib.operators import LinearOperator
from curvlib.solvers.blockwise_damping import damping_structure
from curvlib.solvers.definiteness import gives_descent, takes_indefinite
from curvlib.solvers.descents.problem import Descent, DescentStep, Subproblem
from curvlib.solvers.errors import NotPositiveDefiniteError
from curvlib.solvers.inverse import damped_inverse
from curvlib.solvers.krylov import IterativeInverse, KrylovMethod
from curvlib.solvers.solution import Status

# Anything that turns (C, lambda) into an operator close to (C + lambda I)^-1.
Inverter = Callable[[LinearOperator, float], LinearOperator]


@dataclass(frozen=True, kw_only=True)
class DampedNewton(Descent):
    r"""The minimiser of the damped model without a trust region, by any solver.

    .. math:: d = -(C + \lambda I)^{-1} g

    Args:
        solver: ``damped_inverse``, ``FactoredTikhonov()``, ``CG(...)``, ``MINRES(...)``: anything (C, lambda) ->
            inverse. An iterative one gives the step that it has reached, with its status. Where C + lambda I is not
            positive definite, most have no inverse, and those that have one, such as ``MINRES``, lead to a saddle point
            rather than downhill; a solver whose inverse is positive definite all the same says so by an attribute
            ``gives_descent``. With ``BlockwiseDamping(factors=f)`` the damping is lambda diag(f), here and in the
            change that the model predicts.

    Example:
        >>> import torch
        >>> from curvlib.operators import Diagonal
        >>> C = Diagonal(torch.tensor([1.0, 3.0]))
        >>> problem = Subproblem(operator=C, gradient=torch.tensor([2.0, 4.0]), damping=1.0)
        >>> newton = DampedNewton().solve(problem)
        >>> newton.step, newton.predicted_reduction
        (tensor([-1., -1.]), 3.0)
    """

    solver: Inverter = damped_inverse

    def __post_init__(self) -> None:
        check_solver("DampedNewton", self.solver)

    @property
    def has_radius(self) -> bool:
        """False: its length follows from the damping alone."""
        return False

    def check(self, size: int) -> None:
        """Refuse an iterative solver with a preconditioner of another size."""
        if isinstance(self.solver, KrylovMethod):
            self.solver.check(size)

    @property
    def needs_definite(self) -> bool:
        """Whether there is no step downhill otherwise: the default, see the argument."""
        return not gives_descent(self.solver)

    @property
    def takes_indefinite(self) -> bool:
        """Whether the solver does."""
        return takes_indefinite(self.solver)

    def damping_structure(self, like: LinearOperator) -> LinearOperator | None:
        """Return that of the solver."""
        return damping_structure(self.solver, like)

    def solve(self, problem: Subproblem) -> DescentStep:
        """Return the step.

        Raises:
            ValueError: the problem has a radius.
            NotPositiveDefiniteError: C + lambda I is not, and there is no step; conjugate gradients give the one before
                they notice.
            SolveError: a direct solver could not invert C + lambda I for another reason.
        """
        if problem.radius != inf:
            raise ValueError(
                f"DampedNewton has no radius, got {problem.radius!r}: its length follows from the damping. Use "
                "Steihaug, Dogleg, MoreSorensen or TwoDimensionalSubspace for a trust region."
            )
        if not bool(problem.gradient.isfinite().all()):
            return problem.no_step(Status.NOT_FINITE)
        step, status, iterations = newton_step(self.solver(problem.operator, problem.damping), problem.gradient)
        if status in (Status.NEGATIVE_CURVATURE, Status.SINGULAR) and not bool(step.any()):
            raise NotPositiveDefiniteError(
                f"{self.solver!r} has no step: C + damping I with damping = {problem.damping:.3g} has no positive "
                "curvature along the first direction. Use a larger damping."
            )
        return problem.answer(
            step,
            on_boundary=False,
            multiplier=0.0,
            status=status,
            iterations=iterations,
            regularizer=self.damping_structure(problem.operator),
        )


@singledispatch
def newton_step(inverse: LinearOperator, gradient: Float[Tensor, " D"]) -> tuple[Tensor, Status, int]:
    """Return -C^-1 g, how that ended, and the iterations; iterative inverses say what they have reached."""
    return -(inverse @ gradient), Status.CONVERGED, 0


@newton_step.register
def _(inverse: IterativeInverse, gradient: Float[Tensor, " D"]) -> tuple[Tensor, Status, int]:
    solution = inverse.solve(-gradient)
    return solution.x, solution.status, solution.iterations


def check_solver(owner: str, solver: object) -> None:
    """Raise unless the solver can be called."""
    if not callable(solver):
        raise TypeError(
            f"{owner}(solver=...) must be a solver (C, damping) -> inverse such as damped_inverse or CG(), got "
            f"{solver!r}. What has to know the model first, such as LayerDamping, goes with PreconditionedGradient."
        )
