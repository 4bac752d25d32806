"""The trust-region subproblem in a plane.

Symbols: A = C + lambda I (D, D), g gradient, S (D, 2) an orthonormal basis of the plane, Delta the radius.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import LinearOperator, full_precision
from curvlib.solvers.descents.more_sorensen import secular_root
from curvlib.solvers.descents.problem import Descent, DescentStep, Subproblem
from curvlib.solvers.descents.steihaug import Steihaug
from curvlib.solvers.solution import Status


@dataclass(frozen=True, kw_only=True)
class TwoDimensionalSubspace(Descent):
    r"""The exact minimiser in the ball over the plane of the gradient and a second step.

    .. math:: \min_{d \in \mathrm{span}\{g, s\}} g^T d + \tfrac12 d^T A d \quad \text{subject to} \quad |d| \le \Delta

    Byrd, Schnabel & Shultz (1988); Nocedal & Wright, section 4.1. s is the truncated Newton step of conjugate
    gradients. Departure: where these meet negative curvature, s is Steihaug's step instead of (A + a I)^-1 g, which
    would need a bound on the least eigenvalue. So the model falls at least as far as at the Cauchy point, as at the
    dogleg with the same Newton step, and at negative curvature as at Steihaug's step.

    Args:
        steihaug: limit, stopping rule and preconditioner of the conjugate gradients, with a Euclidean region.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> C = Diagonal(torch.tensor([1.0, -1.0]))
        >>> problem = Subproblem(operator=C, gradient=torch.tensor([1.0, 1.0]), radius=2.0)
        >>> TwoDimensionalSubspace().solve(problem).on_boundary
        True
    """

    steihaug: Steihaug = field(default_factory=Steihaug)

    def __post_init__(self) -> None:
        if not isinstance(self.steihaug, Steihaug):
            raise TypeError(f"TwoDimensionalSubspace(steihaug=...) must be a Steihaug, got {self.steihaug!r}.")
        if not self.steihaug.euclidean_radius:
            raise ValueError(
                f"TwoDimensionalSubspace takes the exact minimum in a Euclidean ball, got {self.steihaug!r}: leave out "
                "its region, or use that Steihaug itself."
            )

    @property
    def takes_preconditioner(self) -> bool:
        """Whether the conjugate gradients have none yet."""
        return self.steihaug.takes_preconditioner

    def preconditioned(self, preconditioner: LinearOperator) -> TwoDimensionalSubspace:
        """Return the same with a preconditioner of the conjugate gradients."""
        return replace(self, steihaug=self.steihaug.preconditioned(preconditioner))

    def check(self, size: int) -> None:
        """Refuse a preconditioner of another size."""
        self.steihaug.check(size)

    def solve(self, problem: Subproblem) -> DescentStep:
        """Return the step, with the status of the conjugate gradients; mu is unknown on the boundary.

        Raises:
            ValueError: the radius is infinite, or the preconditioner has another size than C.
        """
        radius, g = problem.finite_radius("TwoDimensionalSubspace"), problem.gradient
        solution = self.steihaug.unconstrained()(problem.operator, problem.damping).solve(-g)
        second, status, iterations = solution.x, solution.status, solution.iterations
        if status in (Status.SINGULAR, Status.NEGATIVE_CURVATURE):
            steihaug = self.steihaug.solve(problem)
            second, iterations = steihaug.step, iterations + steihaug.iterations
        if status is Status.NOT_FINITE:
            return problem.no_step(status)
        with full_precision(g.device):
            S = _plane(g, second)
            if S.shape[1] == 0:
                return problem.no_step(status)
            form = problem.damped.quadratic_form(S)
            small = torch.cat([form, (S.T @ g).unsqueeze(1)], dim=1).double().cpu()  # one transfer
            if not bool(small.isfinite().all()):
                return problem.no_step(Status.NOT_FINITE)
            e, U = torch.linalg.eigh(0.5 * (small[:, :-1] + small[:, :-1].T))
            root = secular_root(e, U.T @ small[:, -1], radius, torch.finfo(g.dtype).eps)
            step = S @ (U @ root.step).to(S)
        return problem.answer(
            step,
            on_boundary=root.on_boundary,
            multiplier=None if root.on_boundary else 0.0,
            status=status,
            iterations=iterations,
        )


def _plane(g: Float[Tensor, " D"], s: Float[Tensor, " D"]) -> Float[Tensor, "D m"]:
    """Return an orthonormal basis of span{g, s}, with fewer columns where they are collinear or zero."""
    basis: list[Tensor] = []
    for v in (g, s):
        length = v.abs().amax()
        v = v / torch.where(length > 0, length, 1.0)
        size = torch.linalg.vector_norm(v)
        for _ in range(2):  # twice, as one pass leaves errors of eps |v| / |rest|
            for q in basis:
                v = v - (q @ v) * q
        rest = torch.linalg.vector_norm(v)
        # Below that the direction of the rest is noise.
        if bool(rest > 100.0 * torch.finfo(v.dtype).eps * size):
            basis.append(v / rest)
    return torch.stack(basis, dim=1) if basis else g.new_zeros(len(g), 0)
