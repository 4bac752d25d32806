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
from curvlib.solvers.krylov import IterativeInverse, KrylovMethod, Recurrence, dot, norm_of
from curvlib.solvers.solution import Status

# |A P r|_P <= 10 eps^(1/2) |A| |r|_P makes x a candidate for a least-squares solution. Less is not reached by
# minimising |r|, whose square hides what r has in the range of A once that is below eps^(1/2) |r|.
_CANDIDATE = 10.0
# The true A P r may exceed that by as much again, by the rounding errors of the recurrence.
_CONFIRMED = 10.0
# With this times eps |A| |r|_P the null space is hit to rounding, and no other direction is left.
_EXACT = 10.0
# A candidate stands once |r| has not fallen by a tenth over three times as many iterations again as it took to find it.
_FALLEN = 0.9
_PATIENCE = 3
_LEAST_PATIENCE = 10
# Past a candidate x grows along the null space. Once the rounding errors of A x have grown from the first to the second
# part of r, the recurrence will soon claim anything: the true residual has to decide. In an r that is hardly more than
# rounding errors there are no candidates.
_SOUND, _GROWN = 1e-3, 1e-2
# |r|_P that exceeds the one at the start by this much has been lost to rounding errors.
_GROWN_RESIDUAL = 1.01


@dataclass(frozen=True, kw_only=True, eq=False)
class MINRES(KrylovMethod):
    r"""Preconditioned minimal residuals: ``MINRES(max_iterations=50)(C, damping) @ b`` for an indefinite C.

    .. math:: x_i = \arg\min_{x \in x_0 + K_i(PA, P r_0)} |A x - b|_P

    Paige & Saunders, "Solution of sparse indefinite systems of linear equations" (1975). C + damping I has to be
    symmetric only: the Hessian away from a minimum. On a positive definite system :class:`CG` makes the smaller error
    and MINRES the smaller residual. A singular system that has solutions gets the shortest one. One that has none ends
    with ``Status.LEAST_SQUARES`` and the shortest least-squares solution to half the digits of the dtype (the minimum
    of |r| is flat), which is lifted from the iterate as in Liu, Milzarek & Roosta, "Obtaining pseudo-inverse solutions
    with MINRES" (2023):

    .. math:: x \leftarrow x - \frac{r^T x}{r^T P r} P r

    With a preconditioner, least squares are those of |r|_P, and the shortest is that in P^-1. Departures: b, A and P
    are scaled to size 1; the residual vector is carried along, so that stopping rules look at its size in the Euclidean
    norm whatever P is; true residuals decide, and where they do not follow the recurrence the solve goes on from there,
    which repairs what the short recurrence loses on ill-conditioned systems.

    Args:
        max_iterations: the limit.
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
        return _MinimalResidual(self, b, x0)


class _MinimalResidual(Recurrence):
    """Lanczos and the QR factorisation of its matrix; signs as in the program of Paige & Saunders."""

    lanczos_size: Float[Tensor, " K"]  # the largest column of T so far: |P^1/2 A P^1/2| from below

    def start(self) -> None:
        """Start, or start again, from the residual."""
        zero, nothing = torch.zeros_like(self.x), torch.zeros_like(self.scale)
        if self.iteration == 0:
            self.lanczos_size = nothing
            self.first = self.x, self.r
        self.z_last, self.z = zero, -self.r
        self.y, self.beta = self._lanczos_norm(self.z)
        self.beta_last, self.phibar = torch.ones_like(nothing), self.beta
        self.c, self.s, self.dbar, self.epsilon = -torch.ones_like(nothing), nothing, nothing, nothing
        self.w_last, self.w = zero, zero
        # The candidate for a least-squares solution: x, its score, |r|_P and the iteration after it.
        self.best, self.best_score = self.x, torch.full_like(nothing, torch.inf)
        self.best_phibar, self.best_at = nothing, torch.zeros_like(self.iterations)

    def advance(self) -> Bool[Tensor, " K"]:
        """Make one iteration."""
        v, z, alpha = self._expand()
        y, beta = self._lanczos_norm(z)
        self.lanczos_size = torch.where(
            self.running, self.lanczos_size.maximum(torch.hypot(alpha, beta)), self.lanczos_size
        )
        # The last two reflections, applied to the new column of T, and the new one.
        epsilon, delta, gbar = self.epsilon, self.c * self.dbar + self.s * alpha, self.s * self.dbar - self.c * alpha
        next_epsilon, dbar = self.s * beta, -self.c * beta
        gamma = torch.hypot(gbar, beta)
        c, s = gbar / gamma, beta / gamma
        w = (v - epsilon * self.w_last - delta * self.w) / gamma
        x = self.x + c * self.phibar * w
        # phibar v becomes s^2 phibar v + c s phibar z / beta without a division by a beta that may be 0.
        r = s.square() * self.r + c * self.phibar / gamma * z
        # |A P r|_P / |r|_P of the iterate before, which is kept where that is nothing: gamma is nothing then as well.
        self._look_for_least_squares(torch.hypot(gbar, dbar))
        self.end(~(x.abs().amax(0).isfinite() & r.abs().amax(0).isfinite()), Status.NOT_FINITE)
        advance = self.running
        self.x, self.r = torch.where(advance, x, self.x), torch.where(advance, r, self.r)
        self.z_last, self.z, self.y, self.beta_last, self.beta = self.z, z, y, self.beta, beta
        self.w_last, self.w, self.phibar, self.c, self.s = self.w, w, s * self.phibar, c, s
        self.epsilon, self.dbar = next_epsilon, dbar
        return advance

    def _look_for_least_squares(self, normal: Float[Tensor, " K"]) -> None:
        """Remember the iterate with the smallest A P r before x grows, and end the columns where r falls no more."""
        eps = torch.finfo(normal.dtype).eps
        fallen = self.phibar < _FALLEN * self.best_phibar
        fresh = fallen | self.best_score.isinf()
        better = self.running & (normal <= _CANDIDATE * eps**0.5 * self.lanczos_size)
        noise = eps * self.operator_norm * norm_of(self.x) / norm_of(self.r)
        # Making x the shortest adds an error of |A r| / |r| times |x|, which grows while A r may still fall.
        score = normal * (self.operator_norm * norm_of(self.x) + norm_of(self.r))
        better = better & (fresh | (score < self.best_score)) & (noise <= _SOUND)
        self.best = torch.where(better, self.x, self.best)
        self.best_score = torch.where(better, score, self.best_score)
        # Measured from the first candidate of a plateau, so that a slow fall does not pass for none.
        self.best_phibar = torch.where(better & fresh, self.phibar, self.best_phibar)
        self.best_at = torch.where(better, self.iteration, self.best_at)
        waited = self.iteration - self.best_at > (_PATIENCE * self.best_at).clamp(min=_LEAST_PATIENCE)
        stands = self.best_score.isfinite() & ~(fallen & ~better) & (waited | (noise >= _GROWN))
        self.end(stands | (better & (normal <= _EXACT * eps * self.lanczos_size)), Status.LEAST_SQUARES)

    def conclude(self) -> Bool[Tensor, " K"]:
        """Return to the candidates that are no worse than x by the true residual, and verify and shorten them."""
        ends = (Status.LEAST_SQUARES, Status.ROUNDING_FLOOR, Status.CONVERGED)
        claimed = torch.stack([self.status == status.value for status in ends]).any(0)
        returning = self.best_score.isfinite() & (claimed | self.running)
        if not bool(returning.any()):
            self._give_up_what_got_worse()
            return returning
        best = torch.where(returning, self.best, 0.0)
        r = torch.where(returning, self.apply(best) - self.b, 0.0)
        y = self.times_preconditioner(r)
        Ay = self.apply(y)
        square = dot(r, y)
        normal = dot(Ay, self.times_preconditioner(Ay)).clamp(min=0.0).sqrt()
        bound = _CONFIRMED * _CANDIDATE * torch.finfo(normal.dtype).eps ** 0.5 * self.lanczos_size
        confirmed = returning & (square > 0) & (normal <= bound * square.clamp(min=0.0).sqrt())
        own = torch.where(returning, self.r, 0.0)
        confirmed = confirmed & ~(dot(own, self.times_preconditioner(own)) < _FALLEN**2 * square)
        lift = dot(r, best) / square
        self.x = torch.where(confirmed, best - lift * y, self.x)
        self.r = torch.where(confirmed, r - lift * Ay, self.r)
        self.status = torch.where(confirmed & claimed, Status.LEAST_SQUARES.value, self.status)
        # Where r has fallen after all, the system was ill-conditioned and not singular: go on from x.
        doubtful = (self.status == Status.LEAST_SQUARES.value) & ~confirmed
        self.status = torch.where(doubtful, Status.ILL_CONDITIONED.value, self.status)
        return doubtful & ~self._give_up_what_got_worse()

    def _give_up_what_got_worse(self) -> Bool[Tensor, " K"]:
        """Return to the start where the true |r|_P, which grows by rounding errors alone, is larger than there."""
        x, r = self.first
        own, start = (torch.where(self.is_zero, 0.0, v) for v in (self.r, r))
        sizes = [dot(v, self.times_preconditioner(v)) for v in (own, start)]
        grown = sizes[0] > _GROWN_RESIDUAL**2 * sizes[1]
        ends = (Status.LEAST_SQUARES.value, Status.ILL_CONDITIONED.value)
        lost = grown & (self.running | torch.stack([self.status == value for value in ends]).any(0))
        self.x, self.r = torch.where(lost, x, self.x), torch.where(lost, r, self.r)
        self.status = torch.where(lost, Status.ILL_CONDITIONED.value, self.status)
        return lost

    def _expand(self) -> tuple[Float[Tensor, "D K"], Float[Tensor, "D K"], Float[Tensor, " K"]]:
        """Return the Lanczos vector v, the next one z before it is scaled, and alpha."""
        v = torch.where(self.running, self.y / self.beta, 0.0)
        q = self.apply(v)
        self.operator_norm = torch.where(
            self.running, self.operator_norm.maximum(norm_of(q) / norm_of(v)), self.operator_norm
        )
        z = q - self.beta / self.beta_last * self.z_last
        alpha = dot(v, z)
        return v, z - alpha / self.beta * self.z, alpha

    def _lanczos_norm(self, z: Float[Tensor, "D K"]) -> tuple[Float[Tensor, "D K"], Float[Tensor, " K"]]:
        """Return y = P z and |z|_P, and end the columns where P turns out not to be positive definite."""
        y = self.preconditioned(z)
        square = dot(z, y)
        rounding = torch.finfo(square.dtype).eps * norm_of(z) * norm_of(y)
        self.end(~square.isfinite(), Status.NOT_FINITE)
        self.end(square < -rounding, Status.BREAKDOWN)
        return y, square.clamp(min=0.0).sqrt()
