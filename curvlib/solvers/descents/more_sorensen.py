r"""The exact solution of the trust-region subproblem, from eigenvalues.

Symbols: A = C + lambda I = Q diag(e) Q^T, c = Q^T g, Delta the radius, mu >= 0 the multiplier, low = max(0, -min e) its
least value, t = mu - low, h = e + low >= 0; d = -Q (c / (h + t)).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, nan

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import full_precision
from curvlib.solvers.descents.eigenbasis import coefficients
from curvlib.solvers.descents.problem import Descent, DescentStep, Subproblem
from curvlib.solvers.solution import Status

_MOST_ITERATIONS = 60
_CHECK_EVERY = 6
# Rounding errors of sums over n terms, in units of n^(1/2) eps.
_ROUNDING = 10.0


@dataclass(frozen=True)
class MoreSorensen(Descent):
    r"""The exact minimiser in the ball, for operators whose structure gives eigenvectors.

    .. math:: (C + \lambda I + \mu I) d = -g, \quad \mu \ge 0, \quad \mu (\Delta - |d|) = 0, \quad
        C + \lambda I + \mu I \succeq 0

    More & Sorensen, "Computing a trust region step" (1983); Conn, Gould & Toint, "Trust-region methods", section 7.3.
    mu is the root of the secular equation 1 / Delta = 1 / |d(mu)|, by Newton's method from the left, where it is
    monotone. In the hard case, in which g has no part along the eigenvectors of the least eigenvalue and they are
    needed to reach the boundary, one of them is added. Departure: all in the eigenvectors of :func:`eigendecompose`,
    which stay Kronecker products where C has them, so that an iteration costs O(D); parts of g along the least
    eigenvalue at rounding level are taken for none, so that a singular C does not send the step to the boundary along
    noise.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> C = Diagonal(torch.tensor([-2.0, 1.0]))
        >>> hard = MoreSorensen().solve(Subproblem(operator=C, gradient=torch.tensor([0.0, 3.0]), radius=2.0))
        >>> hard.multiplier, hard.on_boundary, abs(hard.step)
        (2.0, True, tensor([1.7321, 1.0000]))
    """

    def solve(self, problem: Subproblem) -> DescentStep:
        """Return the step.

        Raises:
            ValueError: the radius is infinite.
            SolveError: C is not finite, or has no structure and is too large to be made dense.
        """
        radius = problem.finite_radius("MoreSorensen")
        if not bool(problem.gradient.isfinite().all()):
            return problem.no_step(Status.NOT_FINITE)
        with full_precision(problem.gradient.device):
            basis = coefficients(problem.damped, problem.gradient)
            eps = torch.finfo(problem.gradient.dtype).eps
            root = secular_root(basis.eigenvalues, basis.gradient, radius, eps)
            if not isfinite(root.multiplier):
                return problem.no_step(Status.NOT_FINITE)
            return problem.answer(
                basis.back(root.step),
                on_boundary=root.on_boundary,
                multiplier=root.multiplier,
                iterations=root.iterations,
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class SecularRoot:
    """The solution in coefficients.

    Attributes:
        step: -c / (e + mu) (n,), in the hard case with a part along the least eigenvalue.
        on_boundary: whether |step| is the radius.
        multiplier: mu, NaN where e or c is not finite.
        iterations: of Newton's method.
    """

    step: Float[Tensor, " n"]
    on_boundary: bool
    multiplier: float
    iterations: int


def secular_root(e: Float[Tensor, " n"], c: Float[Tensor, " n"], radius: float, eps: float) -> SecularRoot:
    """Return the minimiser of c^T d + 1/2 d^T diag(e) d in the ball.

    Args:
        e: eigenvalues, float64.
        c: the gradient's coefficients, float64.
        radius: Delta.
        eps: relative errors that e and c come with.
    """
    rounding = _ROUNDING * len(e) ** 0.5 * eps
    # A semi-definite C has no negative curvature: rounding errors of eigenvalues must not send steps to the boundary.
    e = torch.where((e < 0) & (e >= -rounding * e.abs().amax()), 0.0, e)
    low = (-e.amin()).clamp(min=0.0)
    h = e + low
    # What g has along the eigenvalues that are the least to rounding, if that is rounding itself.
    bottom = h <= rounding * e.abs().amax()
    part = torch.linalg.vector_norm(torch.where(bottom, c, 0.0))
    c = torch.where(bottom & (part <= rounding * torch.linalg.vector_norm(c)), 0.0, c)
    zero = c == 0.0

    def step_at(t: Float[Tensor, ""]) -> Float[Tensor, " n"]:
        return torch.where(zero, 0.0, -c / (h + t))

    # No coefficient alone may leave the ball: a lower bound from which Newton's method on 1 / |d| is monotone.
    start = (c.abs() / radius - h).amax().clamp(min=0.0)
    t, done, iterations = start, torch.linalg.vector_norm(step_at(start)) <= radius, torch.zeros_like(start)
    for iteration in range(_MOST_ITERATIONS):
        # The only synchronisation inside the loop.
        if iteration % _CHECK_EVERY == 0 and bool(done):
            break
        d = step_at(t)
        norm = torch.linalg.vector_norm(d)
        slope = torch.where(zero, 0.0, d.square() / (h + t)).sum()  # -1/2 of the derivative of |d|^2
        following = t + (norm / radius - 1.0) * norm.square() / slope
        advance = ~done & (following > t)
        done = done | ~advance
        t, iterations = torch.where(advance, following, t), iterations + advance
    d = step_at(t)
    norm = torch.linalg.vector_norm(d)
    room = (radius - norm) * (radius + norm)
    values = [low, t, norm, room, iterations, (e.isfinite() & c.isfinite()).all()]
    least, shift, length, squared_room, count, finite = torch.stack([v.double() for v in values]).tolist()
    if not finite:
        return SecularRoot(step=d, on_boundary=False, multiplier=nan, iterations=0)
    inside = shift == 0.0 and length < radius
    if inside and least > 0.0:
        d[h.argmin()] = max(squared_room, 0.0) ** 0.5
        inside = False
    elif not inside and length > 0.0:
        d = d * (radius / length)  # rounding errors of the root alone
    return SecularRoot(
        step=d, on_boundary=not inside, multiplier=0.0 if inside else least + shift, iterations=int(count)
    )
