"""The recurrence of MINRES: Lanczos vectors and the QR factorisation of their tridiagonal matrix, K columns at once.

Symbols, for each of the K columns:
    A, P                  (D, D)   the matrix, symmetric, and the preconditioner, positive definite
    r = A x - b           (D, K)   residuals; the iterates minimise |r|_P = (r^T P r)^(1/2) over the Krylov space
    v, z                  (D, K)   Lanczos vectors v_i = P z_i / beta_i, z_i^T P z_j = 0
    alpha, beta           (K,)     diagonal and subdiagonal of the Lanczos tridiagonal matrix T
    c, s                  (K,)     the last Givens reflection of the QR factorisation of T
    phibar = |r|_P        (K,)
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from curvlib.solvers.krylov import BACKWARD_STABLE, Recurrence, dot, norm_of
from curvlib.solvers.qlp import Coefficients, Factorization, Path
from curvlib.solvers.solution import Status

# |r| is on a plateau once it has not fallen by a tenth over half as many iterations again as it took to get there.
_FALLEN, _PATIENCE, _LEAST_PATIENCE = 0.9, 0.5, 10


class MinimalResidual(Recurrence):
    """Signs as in the program of Paige & Saunders (1975)."""

    lanczos_size: Float[Tensor, " K"]  # the largest column of T so far: |P^1/2 A P^1/2| from below
    sound: Float[Tensor, "D K"]  # the x of least residual, rounding errors of A x included, and its sound_size
    sound_size: Float[Tensor, " K"]
    plateau: Float[Tensor, " K"]  # |r|_P when it last fell by a tenth, and the iteration plateau_at
    plateau_at: Int[Tensor, " K"]

    def start(self) -> None:
        """Start, or start again, from the residual."""
        zero, nothing = torch.zeros_like(self.x), torch.zeros_like(self.scale)
        if self.iteration == 0:
            self.lanczos_size = nothing
        self.z_last, self.z = zero, -self.r
        self.y, self.beta = self._lanczos_norm(self.z)
        self.beta_last, self.phibar = torch.ones_like(nothing), self.beta
        self.c, self.s, self.dbar = -torch.ones_like(nothing), nothing, nothing
        self.sound, self.sound_size = self.x, torch.full_like(nothing, torch.inf)
        self.plateau, self.plateau_at = self.phibar, torch.full_like(self.iterations, self.iteration)
        self._started_at = self.iteration
        self.factorization, self.path = Factorization(nothing), Path(self.x)

    def advance(self) -> Bool[Tensor, " K"]:
        """Make one iteration."""
        v, z, alpha = self._expand()
        y, beta = self._lanczos_norm(z)
        self.lanczos_size = torch.where(
            self.running, self.lanczos_size.maximum(torch.hypot(alpha, beta)), self.lanczos_size
        )
        # The last two reflections, applied to the new column of T, and the new one.
        delta, gbar = self.c * self.dbar + self.s * alpha, self.s * self.dbar - self.c * alpha
        next_epsilon, dbar = self.s * beta, -self.c * beta
        gamma = torch.hypot(gbar, beta)
        c, s = gbar / gamma, beta / gamma
        step = c * self.phibar
        coefficients = self.factorization.add(delta, gamma, step, next_epsilon)
        x = self.path.add(v, coefficients)
        # phibar v becomes s^2 phibar v + c s phibar z / beta without a division by a beta that may be 0.
        r = s.square() * self.r + step / gamma * z
        # |A P r|_P / |r|_P of the iterate before, which is kept where that is nothing: gamma is nothing then as well.
        self.watch(torch.hypot(gbar, dbar), self._follow_residual())
        self.end(~(x.abs().amax(0).isfinite() & r.abs().amax(0).isfinite()), Status.NOT_FINITE)
        advance = self.running
        self.x, self.r = torch.where(advance, x, self.x), torch.where(advance, r, self.r)
        self.follow(coefficients)
        self.z_last, self.z, self.y, self.beta_last, self.beta = self.z, z, y, self.beta, beta
        self.phibar, self.c, self.s = s * self.phibar, c, s
        self.dbar = dbar
        return advance

    def watch(self, normal: Float[Tensor, " K"], noise: Float[Tensor, " K"]) -> None:
        """Look at |A P r|_P / |r|_P and eps |A| |x| / |r| of the iterate before, and end columns."""

    def follow(self, coefficients: Coefficients) -> None:
        """Carry what else moves with x; ``z`` and ``beta`` are still those of this iteration."""

    def settle(self, columns: Bool[Tensor, " K"]) -> Float[Tensor, "D K"]:
        """Return to the sound iterates where they are as good as the dtype allows; return their true residuals.

        In a singular system the rounding errors of b have a part in the null space, along which x grows once nothing
        else is left of r.
        """
        r = self.apply(self.sound) - self.b
        size = norm_of(r)
        rounding = torch.finfo(size.dtype).eps * (self.operator_norm * norm_of(self.sound) + norm_of(self.b))
        stable = columns & ((size <= norm_of(self.r)) | (size <= BACKWARD_STABLE * rounding))
        self.x, self.r = torch.where(stable, self.sound, self.x), torch.where(stable, r, self.r)
        return r

    def waited(self) -> Bool[Tensor, " K"]:
        """Return where |r|_P has long been on a plateau."""
        patience = (_PATIENCE * (self.plateau_at - self._started_at)).clamp(min=_LEAST_PATIENCE)
        return self.iteration - self.plateau_at > patience

    def _follow_residual(self) -> Float[Tensor, " K"]:
        """Keep the iterate of least residual, rounding errors included; end plateaus in them; return their share."""
        eps, size_of_r = torch.finfo(self.phibar.dtype).eps, norm_of(self.r)
        rounding = eps * self.operator_norm * norm_of(self.x)
        noise = rounding / size_of_r
        fallen = self.running & (self.phibar < _FALLEN * self.plateau)
        self.plateau = torch.where(fallen, self.phibar, self.plateau)
        self.plateau_at = torch.where(fallen, self.iteration, self.plateau_at)
        stable = size_of_r <= BACKWARD_STABLE * (rounding + eps * norm_of(self.b))
        self.end(stable & self.waited(), Status.ROUNDING_FLOOR)
        size = self.phibar * (1.0 + BACKWARD_STABLE * noise)
        better = self.running & (size < self.sound_size)
        self.sound = torch.where(better, self.x, self.sound)
        self.sound_size = torch.where(better, size, self.sound_size)
        return noise

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
