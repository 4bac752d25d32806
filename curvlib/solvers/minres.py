"""Preconditioned MINRES for symmetric systems of any definiteness, several right-hand sides at once.

Symbols, for each of the K columns:
    A = C + damping I     (D, D)   the matrix, symmetric, possibly indefinite or singular
    P                     (D, D)   the preconditioner, positive definite; I where there is none
    r = A x - b           (D, K)   residuals; the iterates minimise |r|_P = (r^T P r)^(1/2) over the Krylov space
    v, z                  (D, K)   Lanczos vectors v_i = P z_i / beta_i, z_i^T P z_j = 0
    alpha, beta           (K,)     diagonal and subdiagonal of the Lanczos tridiagonal matrix T
    c, s                  (K,)     the last Givens reflection of the QR factorisation of T
    phibar = |r|_P        (K,)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvlib.operators.base import LinearOperator
from curvlib.solvers.krylov import BACKWARD_STABLE, IterativeInverse, KrylovMethod, Recurrence, dot, norm_of
from curvlib.solvers.least_squares import least_squares
from curvlib.solvers.minimal_residual import MinimalResidual
from curvlib.solvers.solution import Status

# |A P r|_P <= 10 eps^(1/2) |A| |r|_P makes x a candidate for a least-squares solution. Less is not reached by
# minimising |r|, whose square hides what r has in the range of A once that is below eps^(1/2) |r|.
_CANDIDATE = 10.0
# With this times eps |A| |r|_P the null space is hit to rounding, and no other direction is left.
_EXACT = 10.0
# A search for a null vector at a plateau of |r| costs iterations where there is none, and is the last one of its kind.
# Past a candidate x grows along the null space. Once the rounding errors of A x have grown from the first to the second
# part of r, the recurrence will soon claim anything. In an r that is hardly more than rounding errors there are no
# candidates.
_SOUND, _GROWN = 1e-3, 1e-2
# |r|_P that exceeds that of another iterate by this much has been lost to rounding errors.
_WORSE = 1.01
# A relative residual that leaves fewer than two digits of b is no solution.
_USEFUL = 1e-2


@dataclass(frozen=True, kw_only=True, eq=False)
class MINRES(KrylovMethod):
    r"""Preconditioned minimal residuals: ``MINRES(max_iterations=50)(C, damping) @ b`` for an indefinite C.

    .. math:: x_i = \arg\min_{x \in x_0 + K_i(PA, P r_0)} |A x - b|_P

    Paige & Saunders, "Solution of sparse indefinite systems of linear equations" (1975). C + damping I has to be
    symmetric only: the Hessian away from a minimum. On a positive definite system :class:`CG` makes the smaller error
    and MINRES the smaller residual. A singular system that has solutions gets the shortest one, from x0 = 0.

    One that has none ends with ``Status.LEAST_SQUARES``. What that promises is verified by products: a y with
    |A y| <= 4 eps |A| |y|, a null vector to working precision, and an x that solves

    .. math:: A x = b - \frac{b^T y}{y^T y} y

    to the residual that ``stop`` asks for or to rounding errors, and to a tenth of the part of b that was taken away,
    which no A x reaches: |A x - b| is at most 1.005 times the least. This x is the shortest, from x0 = 0, to the
    accuracy of its residual. It may take twice the iterations of a system that has a solution. Where there is no
    such y, or its x is not found, the status is ``ILL_CONDITIONED``, or ``ITERATION_LIMIT`` at the limit, and x is the
    best of the iterates, by true residuals, that rounding errors had not yet carried away.

    With a preconditioner, least squares are those of |r|_P, y is that of P^1/2 A P^1/2, and the shortest is that
    in P^-1. Departures: x is built as in MINRES-QLP (Choi, Paige & Saunders 2011, "MINRES-QLP: a Krylov subspace method
    for indefinite or singular symmetric systems"), which loses to rounding errors in proportion to the condition, and
    not to its square; the null vector and the second system take the place of its truncation of small eigenvalues,
    whose threshold nothing verifies. b, A and P are scaled to size 1; the residual vector is carried along, so that
    stopping rules look at its size in the Euclidean norm whatever P is; true residuals decide, and where they do not
    follow the recurrence the solve goes on from there.

    Args:
        max_iterations: the limit, the search for least squares included.
        stop: the stopping rule. :class:`ProgressTest` makes sense for semi-definite systems alone, where phi falls.
        preconditioner: a positive definite operator that approximates the inverse of abs(C + damping I).
        store: which iterates to keep in :attr:`Solution.iterates`; None keeps none.
        check_every: iterations between two looks of the host at the device, as in :class:`CG`.
        on_limit: what ``@`` does at the limit: :class:`WarnAtLimit` or :class:`RaiseAtLimit`.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> C = Diagonal(torch.tensor([4.0, -2.0, 0.0]))
        >>> x = MINRES()(C, 0.0) @ torch.tensor([8.0, 2.0, 0.0])
        >>> torch.allclose(x, torch.tensor([2.0, -1.0, 0.0]), atol=1e-5)
        True
        >>> MINRES()(C, 0.0).solve(torch.tensor([8.0, 2.0, 5.0])).status
        <Status.LEAST_SQUARES: 4>
    """

    title: ClassVar[str] = "MINRES"
    takes_indefinite: ClassVar[bool] = True

    def __call__(self, operator: LinearOperator, damping: float) -> MINRESInverse:
        """Return the operator that solves (C + damping I) x = b anew at each product.

        Raises:
            ValueError: damping is negative, NaN or infinite, or the preconditioner has another size than C.
        """
        return MINRESInverse(operator=operator, damping=damping, method=self)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MINRESInverse(IterativeInverse):
    """(C + damping I)^-1 by MINRES; made by calling a :class:`MINRES`.

    ``@`` and :meth:`solve` are as those of :class:`CGInverse`; ``@`` raises ``SolveError`` for a least-squares solution
    too, which solves another problem than the one that was asked.
    """

    def _recurrence(self, b: Float[Tensor, "D K"], x0: Float[Tensor, "D K"] | None) -> Recurrence:
        return _Watched(self, b, x0)


class _Watched(MinimalResidual):
    """The solve, with an eye on systems that have no solution; true residuals decide what comes of it."""

    best: Float[Tensor, "D K"]  # the x of least true residual best_r
    best_r: Float[Tensor, "D K"]
    suspect: Bool[Tensor, " K"]  # whether A P r has been small on this plateau
    doubted: Bool[Tensor, " K"]  # whether the system was called singular in vain

    def start(self) -> None:
        """Start, or start again, from the residual."""
        if self.iteration == 0:
            self.best, self.best_r = self.x, self.r
            self.doubted = torch.zeros_like(self.running)
        else:
            self._offer(self.x, self.r)
        super().start()
        self.suspect = torch.zeros_like(self.running)

    def watch(self, normal: Float[Tensor, " K"], noise: Float[Tensor, " K"]) -> None:
        """End the columns where r falls no more and may be of the null space."""
        eps = torch.finfo(normal.dtype).eps
        flat = normal <= _CANDIDATE * eps**0.5 * self.lanczos_size
        self.suspect = (self.suspect & (self.plateau_at < self.iteration)) | (self.running & flat & (noise <= _SOUND))
        stands = self.waited() | (noise >= _GROWN)
        exact = normal <= _EXACT * eps * self.lanczos_size
        self.end((self.suspect & ~self.doubted & stands) | exact, Status.LEAST_SQUARES)

    def conclude(self) -> Bool[Tensor, " K"]:
        """Solve what has no solution in least squares, and return to the best iterate where the last is worse."""
        ended = (self.status == Status.CONVERGED.value) | (self.status == Status.ROUNDING_FLOOR.value)
        size, target = norm_of(self.r), self.method.stop.residual_target(self.rhs_norm) / self.scale
        short = self.running | (ended & (size > target))
        # The recurrence follows an x that grows along the null space down to any residual.
        claimed = (self.status == Status.LEAST_SQUARES.value) | (
            ended & (size > target.maximum(_USEFUL * self._b_size))
        )
        if not bool((claimed | short).any()):
            return claimed
        self._offer(self.x, self.r)
        sound_r = self.settle(ended & short & ~claimed)
        self._offer(self.sound, sound_r)
        doubtful = self._least_squares(claimed, sound_r) if bool(claimed.any()) else claimed
        worse = self._size(self.r) > _WORSE * self._size(self.best_r)
        self._move(self.running & worse, self.best, self.best_r)
        self.status = torch.where(self.running & worse, Status.ILL_CONDITIONED.value, self.status)
        return doubtful

    def _least_squares(self, claimed: Bool[Tensor, " K"], sound_r: Float[Tensor, "D K"]) -> Bool[Tensor, " K"]:
        """Give the columns that may have no solution what is best for them; return those to go on with."""
        target = self.method.stop.residual_target(self.rhs_norm) / self.scale
        found = least_squares(self, claimed, self.sound, sound_r, target)
        self.refinements = self.refinements + found.iterations
        self._offer(found.x, torch.where(found.singular, found.r, torch.inf))
        self._move(claimed, self.best, self.best_r)
        self._move(found.solved, found.x, found.r)
        verdict = torch.where(found.cut, Status.ITERATION_LIMIT.value, Status.ILL_CONDITIONED.value)
        verdict = torch.where(found.solved, Status.LEAST_SQUARES.value, verdict)
        # A part of b in the null space that is no larger than the rounding errors is no reason to call x no solution.
        size = norm_of(self.r)
        rounding = torch.finfo(size.dtype).eps * (self.operator_norm * norm_of(self.x) + self._b_size)
        enough = torch.where(target.isfinite(), target, 0.0).maximum(
            (BACKWARD_STABLE * rounding).minimum(_USEFUL * self._b_size)
        )
        verdict = torch.where(size <= enough, Status.CONVERGED.value, verdict)
        self.status = torch.where(claimed, verdict, self.status)
        self.doubted = self.doubted | (claimed & ~found.singular)
        return claimed & (self.status == Status.ILL_CONDITIONED.value) & ~found.singular

    @property
    def _b_size(self) -> Float[Tensor, " K"]:
        return norm_of(self.b)

    def _move(self, columns: Bool[Tensor, " K"], x: Float[Tensor, "D K"], r: Float[Tensor, "D K"]) -> None:
        self.x, self.r = torch.where(columns, x, self.x), torch.where(columns, r, self.r)

    def _offer(self, x: Float[Tensor, "D K"], r: Float[Tensor, "D K"]) -> None:
        """Remember x if its true residual r is the least so far."""
        better = self._size(r) < self._size(self.best_r)
        self.best, self.best_r = torch.where(better, x, self.best), torch.where(better, r, self.best_r)

    def _size(self, r: Float[Tensor, "D K"]) -> Float[Tensor, " K"]:
        """Return |r|_P, infinity where that is not finite."""
        usable = r.isfinite().all(0)
        r = torch.where(usable & ~self.is_zero, r, 0.0)
        return torch.where(usable, dot(r, self.times_preconditioner(r)).clamp(min=0.0).sqrt(), torch.inf)
