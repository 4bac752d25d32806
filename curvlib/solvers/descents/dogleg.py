"""The dogleg step of a trust region.

Symbols: A = C + lambda I (D, D), g gradient, Delta the radius, d_c the minimiser along -g, d_n the Newton step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import full_precision
from curvlib.solvers.blockwise_damping import damping_structure
from curvlib.solvers.descents.newton import Inverter, check_solver, newton_step
from curvlib.solvers.descents.problem import Descent, DescentStep, Subproblem
from curvlib.solvers.errors import SolveError
from curvlib.solvers.inverse import damped_inverse
from curvlib.solvers.krylov import KrylovMethod
from curvlib.solvers.solution import Status

_REMEDY = "Use more damping, a positive semi-definite curvature, or Steihaug, MoreSorensen or TwoDimensionalSubspace."


@dataclass(frozen=True, kw_only=True)
class Dogleg(Descent):
    r"""The point of the path 0 -> d_c -> d_n on the boundary, or the Newton step where that lies inside.

    .. math:: d_c = -\frac{g^T g}{g^T A g} g, \qquad d_n = -A^{-1} g

    Powell (1970); Nocedal & Wright, section 4.1. Along the path the model falls and the length grows, if C + damping I
    is positive definite; an indefinite one is refused. One solve serves every radius.

    Args:
        solver: of the Newton step; ``damped_inverse`` finds every indefinite matrix, an iterative solver only one that
            it meets.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> C = Diagonal(torch.tensor([1.0, 4.0]))
        >>> answer = Dogleg().solve(Subproblem(operator=C, gradient=torch.tensor([4.0, 4.0]), radius=2.0))
        >>> round(float(answer.step.norm()), 5), answer.on_boundary
        (2.0, True)
    """

    solver: Inverter = damped_inverse

    def __post_init__(self) -> None:
        check_solver("Dogleg", self.solver)

    @property
    def needs_definite(self) -> bool:
        """True."""
        return True

    def check(self, size: int) -> None:
        """Refuse an iterative solver with a preconditioner of another size."""
        if isinstance(self.solver, KrylovMethod):
            self.solver.check(size)

    def solve(self, problem: Subproblem) -> DescentStep:
        """Return the step.

        Raises:
            ValueError: the radius is infinite, or the solver's damping differs by coordinate.
            SolveError: C + damping I is not positive definite, or the solver could not invert it.
        """
        radius, g = problem.finite_radius("Dogleg"), problem.gradient
        if damping_structure(self.solver, problem.operator) is not None and problem.damping > 0.0:
            raise ValueError(
                f"Dogleg needs a solver of C + damping I, as its Cauchy point is made with, and {self.solver!r} damps "
                "coordinates differently: use DampedNewton with that solver, or a damping of 0."
            )
        if not bool(g.isfinite().all()):
            return problem.no_step(Status.NOT_FINITE)
        if not bool(g.any()):
            return problem.no_step(Status.CONVERGED)
        with full_precision(g.device):
            newton, status, iterations = self._newton(problem)
            length = torch.linalg.vector_norm(g)
            unit = g / length
            model = problem.damped.quadratic_form(torch.stack([unit, newton / torch.linalg.vector_norm(newton)]).T)
            values = [length, model[0, 0], model[1, 1], torch.linalg.vector_norm(newton), unit @ newton]
            slope, along, along_newton, reach, descent = torch.stack(values).tolist()
            if not (along > 0.0 and along_newton > 0.0 and descent < 0.0):
                raise SolveError(
                    f"Dogleg needs a positive definite C + damping I: {problem.operator!r} with damping = "
                    f"{problem.damping:.3g} has curvature {along:.3g} along the gradient and {along_newton:.3g} along "
                    f"the Newton step. {_REMEDY}"
                )
            if reach <= radius:
                return problem.answer(newton, on_boundary=False, multiplier=0.0, status=status, iterations=iterations)
            cauchy = min(slope / along, radius)
            step = -cauchy * unit if cauchy >= radius else _second_leg(-cauchy * unit, newton, radius)
            return problem.answer(step, on_boundary=True, multiplier=None, status=status, iterations=iterations)

    def _newton(self, problem: Subproblem) -> tuple[Float[Tensor, " D"], Status, int]:
        try:
            newton, status, iterations = newton_step(self.solver(problem.operator, problem.damping), problem.gradient)
        except SolveError as error:
            raise SolveError(
                f"Dogleg needs a positive definite C + damping I: {error} {_REMEDY}", error.solution
            ) from error
        if status is Status.BREAKDOWN:
            raise SolveError(
                f"the solver of Dogleg's Newton step broke down after {iterations} iterations: check that its "
                "preconditioner is positive definite and the operator linear and free of randomness."
            )
        if status in (Status.LEAST_SQUARES, Status.SINGULAR, Status.NEGATIVE_CURVATURE, Status.NOT_FINITE):
            raise SolveError(
                f"Dogleg needs a positive definite C + damping I, but the solver of its Newton step ended with "
                f"{status.name} after {iterations} iterations. {_REMEDY}"
            )
        return newton, status, iterations


def _second_leg(start: Float[Tensor, " D"], end: Float[Tensor, " D"], radius: float) -> Float[Tensor, " D"]:
    """Return the point of the segment at the radius, |start| <= radius <= |end|."""
    leg = end - start
    a, b, s = (leg @ leg).double(), (start @ leg).double(), (start @ start).double()
    room = (radius * radius - s).clamp(min=0.0)
    root = (b.square() + a * room).sqrt()
    tau = torch.where(b > 0, room / (b + root), (root - b) / a).clamp(max=1.0)
    return start + tau.to(leg) * leg
