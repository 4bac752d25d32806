"""Preconditioned conjugate gradients for (C + damping I) x = b, several right-hand sides at once.

Symbols, for each of the K columns:
    A = C + damping I     (D, D)   the matrix, symmetric positive definite
    P                     (D, D)   the preconditioner, an approximation of A^-1
    b, x                  (D, K)   right-hand sides and iterates
    r = A x - b           (D, K)   residuals, the gradient of phi
    p, q = A p            (D, K)   search directions and their products
    phi(x) = 1/2 x^T A x - b^T x = 1/2 x^T (r - b)   (K,) the quadratic that the iterates minimise
    i                     the number of the iteration
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvlib.operators.base import LinearOperator
from curvlib.solvers.krylov import IterativeInverse, KrylovMethod, Recurrence, dot, norm_of
from curvlib.solvers.reorthogonalization import PastResiduals
from curvlib.solvers.solution import Status

# Up to this D and D K every residual is kept unless the user says otherwise: at most 200 MB in float64.
_SMALL, _SMALL_BLOCK = 1000, 8192

# p^T A p within this many eps |A| |p|^2 of 0 is the rounding errors of A p. Below half of the largest condition number
# that the dtype can tell from infinity, 1 / (4 eps), no direction of a positive definite A is so flat.
_FLAT = 4.0
# |A| is known from below, up to this factor.
_SEMIDEFINITE = 4.0


@dataclass(frozen=True, kw_only=True, eq=False)
class CG(KrylovMethod):
    r"""Preconditioned conjugate gradients: ``CG(max_iterations=50)(C, damping) @ b`` is (C + damping I)^-1 b.

    .. math:: x \leftarrow x + \alpha p, \quad r \leftarrow r + \alpha q, \quad \alpha = r^T P r / p^T q, \quad
        p \leftarrow -P r + \beta p

    Hestenes & Stiefel (1952); Nocedal & Wright, "Numerical Optimization", algorithm 5.3. Departures: b, A and P are
    scaled to size 1, so that squares neither underflow nor overflow; the true residual is computed once at the end, and
    where it does not follow the recurrence the solve goes on from there; p^T A p <= 0 ends it with the iterate before,
    and so does a p^T A p of the size of its rounding errors, for the iterates of a singular system without a solution
    grow beyond all bounds; a recurrence that has sunk below the rounding errors of A x is not continued.

    For C = V V^T, as a Gauss-Newton matrix is, least-squares methods on V such as LSMR take the same iterations down to
    relative errors of 1e-4 in float32, and are not here for that reason (benchmarks/README.md).

    Args:
        max_iterations: the limit.
        stop: the stopping rule, :class:`ResidualTest` or :class:`ProgressTest`.
        preconditioner: a positive definite operator that approximates (C + damping I)^-1, applied with ``@``.
        store: which iterates to keep in :attr:`Solution.iterates`; None keeps none.
        check_every: iterations between two looks of the host at the device; None for 5, and 1 on the CPU, where a look
            waits for nothing. In between nothing is synchronised, and finished columns are frozen on the device, so
            that the result is the same for every value; up to ``check_every - 1`` products are wasted at the end.
        on_limit: what ``@`` does at the limit: :class:`WarnAtLimit` or :class:`RaiseAtLimit`.
        reorthogonalize: how many past residuals each new one is made P-orthogonal to again. In exact arithmetic that
            changes nothing. With rounding errors ill-conditioned systems need fewer iterations, down to the number of
            distinct eigenvalues of P A, for 3 vectors of memory and 6 D operations a residual and column. None keeps
            all of them where D <= 1000 and D K <= 8192, so that rounding errors do not decide the number of iterations
            there, and none for larger systems, of which few are solved in so many iterations that it matters.
        always_verify: whether a last product gives the true residual under a stopping rule that guarantees none as
            well, such as :class:`ProgressTest`. False saves this product there: ``Solution.residual_norm`` and
            ``Solution.model_value`` are then those of the recurrence, which rounding errors part from the true ones.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> inverse = CG(max_iterations=50)(Diagonal(torch.tensor([3.0, 3.0])), 1.0)
        >>> inverse @ torch.tensor([4.0, 8.0])
        tensor([1., 2.])
        >>> print(inverse.solve(torch.zeros(2)))
        conjugate gradients converged after 0 iterations with relative residual 0.0e+00 (asked 1e-06)
    """

    title: ClassVar[str] = "conjugate gradients"

    reorthogonalize: int | None = None
    always_verify: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        kept = self.reorthogonalize
        if kept is not None and (isinstance(kept, bool) or not isinstance(kept, int) or kept < 0):
            raise ValueError(f"CG(reorthogonalize=...) must be a number of residuals >= 0, or None, got {kept!r}.")

    def __call__(self, operator: LinearOperator, damping: float) -> CGInverse:
        """Return the operator that solves (C + damping I) x = b anew at each product.

        Raises:
            ValueError: damping is negative, NaN or infinite, or the preconditioner has another size than C.
        """
        return CGInverse(operator=operator, damping=damping, method=self)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CGInverse(IterativeInverse):
    """(C + damping I)^-1 by conjugate gradients; made by calling a :class:`CG`.

    ``@`` gives the solution, warns or raises at the limit as ``CG(on_limit=...)`` says, and raises ``SolveError`` where
    the system cannot be solved. :meth:`solve` gives the whole outcome and never raises for numerical trouble. As a map
    of b it is linear and symmetric only up to the tolerance.
    """

    def _recurrence(self, b: Float[Tensor, "D K"], x0: Float[Tensor, "D K"] | None) -> Recurrence:
        return _Conjugate(self, b, x0)


class _Conjugate(Recurrence):
    """The loop of Nocedal & Wright, algorithm 5.3."""

    p: Float[Tensor, "D K"]
    rho: Float[Tensor, " K"]  # r^T P r
    length: Float[Tensor, " K"]  # p^T P^-1 p
    largest: Float[Tensor, " K"]  # the largest r^T P A P r / r^T P r so far: |P^1/2 A P^1/2| from below
    past: PastResiduals
    solved: Float[Tensor, "D K"]  # the iterate with the least r below the rounding errors of A x, and that r
    least: Float[Tensor, " K"]

    def start(self) -> None:
        """Start, or start again, along the preconditioned gradient."""
        assert isinstance(self.method, CG)
        kept = self.method.reorthogonalize
        if kept is None:
            small = len(self.b) <= _SMALL and self.b.numel() <= _SMALL_BLOCK
            kept = min(self.method.max_iterations, len(self.b)) if small else 0
        self.past = PastResiduals(kept)
        if self.iteration == 0:
            self.largest = torch.zeros_like(self.scale)
            self.solved, self.least = self.x, torch.full_like(self.scale, torch.inf)
        y, self.rho = self._descent()
        self.p, self.length = -y, self.rho

    def advance(self) -> Bool[Tensor, " K"]:
        """Make one iteration."""
        p = torch.where(self.running, self.p, 0.0)
        q = self.apply(p)
        curvature = dot(p, q)
        flat, singular = self._judge_curvature(p, q, curvature)
        alpha = self.rho / curvature
        x, r = self.past.clean(self.x + alpha * p, self.r + alpha * q)
        # A product that overflows or holds NaN shows in these three scalars, and x stays the last finite iterate.
        finite = curvature.isfinite() & x.abs().amax(0).isfinite() & r.abs().amax(0).isfinite()
        advance = self.running & (curvature > 0) & ~flat & finite
        self.end(self.running & singular, Status.SINGULAR)
        self.end(self.running & ((curvature <= 0) | flat) & curvature.isfinite(), Status.NEGATIVE_CURVATURE)
        self.end(self.running & ~advance, Status.NOT_FINITE)
        self.x, self.r = torch.where(advance, x, self.x), torch.where(advance, r, self.r)
        return advance

    def _judge_curvature(
        self, p: Float[Tensor, "D K"], q: Float[Tensor, "D K"], curvature: Float[Tensor, " K"]
    ) -> tuple[Bool[Tensor, " K"], Bool[Tensor, " K"]]:
        """Return where p^T A p is nothing but rounding errors, and where A may still have no negative eigenvalue."""
        self.largest = torch.where(self.running, self.largest.maximum(curvature.abs() / self.rho), self.largest)
        size = norm_of(q)
        norm = self.operator_norm.maximum(size / norm_of(p))
        self.operator_norm = torch.where(self.running & norm.isfinite(), norm, self.operator_norm)
        noise = _FLAT * torch.finfo(curvature.dtype).eps * self.largest * self.length
        flat = curvature.abs() <= noise
        # |A p|^2 <= |A| p^T A p for a semi-definite A.
        return flat, flat & (size.square() <= _SEMIDEFINITE * self.operator_norm * noise)

    def needs_verification(self) -> bool:
        """Return whether the rule guarantees a residual, or all are to be verified."""
        assert isinstance(self.method, CG)
        if self.method.always_verify:
            return True
        return bool(self.method.stop.residual_target(self.rhs_norm).isfinite().any())

    def prepare(self) -> None:
        """Make the next direction conjugate to the last."""
        norm = norm_of(self.r)
        rounding = torch.finfo(norm.dtype).eps * (self.operator_norm * norm_of(self.x) + norm_of(self.b))
        better = self.running & (norm <= rounding.minimum(self.least))
        self.solved, self.least = torch.where(better, self.x, self.solved), torch.where(better, norm, self.least)
        y, rho = self._descent()
        beta = rho / self.rho
        self.p, self.rho = beta * torch.where(self.running, self.p, 0.0) - y, rho
        self.length = rho + beta.square() * self.length

    def conclude(self) -> Bool[Tensor, " K"]:
        """Return where A is flat along rounding errors alone to the iterate that solved the system."""
        back = (self.status == Status.SINGULAR.value) & self.least.isfinite()
        if bool(back.any()):
            self.x = torch.where(back, self.solved, self.x)
            self.r = self.apply(self.x) - self.b
        return torch.zeros_like(back)

    def _descent(self) -> tuple[Float[Tensor, "D K"], Float[Tensor, " K"]]:
        """Return y = P r and r^T y, and end the columns where that is not positive."""
        y = self.preconditioned(self.r)
        rho = dot(self.r, y)
        self.end(~rho.isfinite(), Status.NOT_FINITE)
        self.end(rho <= 0, Status.BREAKDOWN)
        self.past.append(self.r, y, rho, self.x)
        return y, rho
