"""What MINRES does beside its own system where that has no solution: finds its null vector, and solves without it.

Symbols, for each of the K columns:
    A, P                  (D, D)   the matrix, symmetric and singular, and the preconditioner, positive definite
    r                     (D, K)   the residual of an iterate
    n = r - P^-1 Z        (D, K)   its part in the null space: A P n = 0, so that P n is a null vector of A
    Z                     (D, K)   the solution of A Z = A P r from 0
    |r|_P = (r^T P r)^(1/2)   (K,)

A Z = A P r has solutions whatever r is, and so has A x = b - n (n^T P b) / (n^T P n). MINRES solves both stably, and
products verify both, where minimising |r| leaves A r at eps^(1/2) |A| |r| and cannot tell that from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from curvlib.solvers.krylov import BACKWARD_STABLE, Recurrence, dot, norm_of
from curvlib.solvers.minimal_residual import MinimalResidual
from curvlib.solvers.qlp import Coefficients, Path
from curvlib.solvers.solution import Progress, Status, StoppingRule

# |A P n|_P <= 4 eps |A| |n|_P is a null vector to working precision: a product rounds by that. CG's limit is the same.
_NULL = 4.0
# The recurrences aim at half of what products verify, so that these may round as well.
_AIM = 0.5
# Where less than half of r is left, r was not yet a residual of least squares.
_LEFT = 0.5
# Of the residual of least squares at most this may lie in the range of A: |r|_P is then 1.005 times the least.
SHARE = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class _Within(StoppingRule):
    """|r| <= target (K,)."""

    target: Float[Tensor, " K"]

    def satisfied(self, progress: Progress) -> Bool[Tensor, " K"]:
        return progress.residual_norm <= self.target

    def residual_target(self, rhs_norm: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        return self.target


class _Never(StoppingRule):
    def satisfied(self, progress: Progress) -> Bool[Tensor, " K"]:
        return torch.zeros_like(progress.residual_norm, dtype=torch.bool)


class _Beside(MinimalResidual):
    """A system of the same matrix, in the units of the solve that needs it, whose products it counts as its own.

    Args:
        owner: that solve; the iterations that it has left are the limit.
        b, x0: right-hand sides, 0 in columns of no interest, and starts.
        rule: when to stop.
    """

    def __init__(
        self,
        owner: Recurrence,
        b: Float[Tensor, "D K"],
        x0: Float[Tensor, "D K"] | None,
        rule: StoppingRule,
    ) -> None:
        self.owner = owner
        method = replace(owner.method, stop=rule, store=None)
        super().__init__(replace(owner.inverse, method=method), b, x0)
        self.limit = owner.limit - owner.iteration

    def apply(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """Return A V."""
        return self.owner.apply(V)

    def times_preconditioner(self, r: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """Return P r."""
        return self.owner.times_preconditioner(r)


class _Rest(_Beside):
    """The system without the null part, to the first iterate that is as good as the dtype allows.

    What is left of r then has a part in the null space, along which more iterations would move x.
    """

    def start(self) -> None:
        """Start, or start again, from the residual."""
        super().start()
        if self.iteration == 0:
            self.operator_norm = self.owner.operator_norm
        self.prepare()

    def prepare(self) -> None:
        """End the columns whose residual is rounding errors."""
        size = norm_of(self.r)
        rounding = torch.finfo(size.dtype).eps * (self.operator_norm * norm_of(self.x) + norm_of(self.b))
        self.end(size <= _AIM * BACKWARD_STABLE * rounding, Status.ROUNDING_FLOOR)

    def conclude(self) -> Bool[Tensor, " K"]:
        """Return to iterates that have not grown along the null space."""
        ended = (self.status == Status.CONVERGED.value) | (self.status == Status.ROUNDING_FLOOR.value)
        short = ended & (norm_of(self.r) * self.scale > self.method.stop.residual_target(self.rhs_norm))
        if bool(short.any()):
            self.settle(short)
        return torch.zeros_like(short)


class _NullPart(_Beside):
    """The part n of r in the null space; ``found`` says where a product confirms it."""

    found: Bool[Tensor, " K"]

    def __init__(self, owner: MinimalResidual, r: Float[Tensor, "D K"]) -> None:
        self._r, self._y = r, owner.times_preconditioner(r)
        self._square = dot(r, self._y)
        self._norm = owner.lanczos_size
        super().__init__(owner, owner.apply(self._y), None, _Never())

    def start(self) -> None:
        """Start, or start again, from the residual."""
        super().start()
        if self.iteration == 0:
            self._dual = torch.zeros_like(self.x)  # P^-1 Z
        self._dual_path = Path(self._dual)
        self.prepare()

    def follow(self, coefficients: Coefficients) -> None:
        """Carry P^-1 Z along."""
        plain = self.method.preconditioner is None
        dual = self.x if plain else self._dual_path.add(self.z / self.beta, coefficients)
        self._dual = torch.where(self.running, dual, self._dual)

    def prepare(self) -> None:
        """End the columns where n is a null vector, and those where too little is left."""
        n, y = self.part()
        square = dot(n, y).clamp(min=0.0)
        self.end(self.phibar * self.scale <= _AIM * self._bound() * square.sqrt(), Status.CONVERGED)
        self.end(square < _LEFT**2 * self._square, Status.ILL_CONDITIONED)

    def part(self) -> tuple[Float[Tensor, "D K"], Float[Tensor, "D K"]]:
        """Return n and P n."""
        return self._r - self._dual * self.scale, self._y - self.x * self.scale

    def conclude(self) -> Bool[Tensor, " K"]:
        """Verify the null vectors by a product; return those that are none, to go on from there."""
        n, y = self.part()
        product = self.apply(y)
        self.r = -product / self.scale
        square = dot(n, y)
        small = dot(product, self.times_preconditioner(product)) <= self._bound().square() * square
        self.found = small & (square > 0) & (square >= _LEFT**2 * self._square)
        ended = (self.status == Status.CONVERGED.value) | (self.status == Status.ROUNDING_FLOOR.value)
        return ended & ~self.found & ~self.is_zero

    def _bound(self) -> Float[Tensor, " K"]:
        return _NULL * torch.finfo(self._norm.dtype).eps * self._norm.maximum(self.lanczos_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class LeastSquares:
    """What came of a search for a least-squares solution.

    Attributes:
        x, r: the candidate and its true residual, 0 where no null vector was found.
        singular: whether a null vector was found.
        solved: whether x is a least-squares solution.
        cut: whether the limit of iterations ended it.
        iterations: of each column.
    """

    x: Float[Tensor, "D K"]
    r: Float[Tensor, "D K"]
    singular: Bool[Tensor, " K"]
    solved: Bool[Tensor, " K"]
    cut: Bool[Tensor, " K"]
    iterations: Int[Tensor, " K"]


def least_squares(
    owner: MinimalResidual,
    columns: Bool[Tensor, " K"],
    x: Float[Tensor, "D K"],
    r: Float[Tensor, "D K"],
    target: Float[Tensor, " K"],
) -> LeastSquares:
    """Return the shortest least-squares solutions of A x = b, from iterates x.

    Args:
        owner: the solve, whose b, A, P and units they are.
        columns: those of interest.
        x: where to start.
        r: A x - b.
        target: the size of a residual that is small enough in the range of A.
    """
    null = _NullPart(owner, torch.where(columns, r, 0.0))
    null.run()
    singular = columns & null.found
    n, y = (torch.where(singular, part, 0.0) for part in null.part())
    square = torch.where(singular, dot(n, y), 1.0)
    b = torch.where(singular, owner.b, 0.0)
    unreachable = dot(b, y) / square * n
    start = torch.where(singular, x, 0.0)
    start = start - dot(start, n) / square * y
    owner.limit -= null.iteration
    rest = _Rest(owner, b - unreachable, start, _Within(target=target.minimum(SHARE * norm_of(unreachable))))
    rest.run()
    owner.limit -= rest.iteration
    x = torch.where(singular, rest.x * rest.scale, 0.0)
    # Rounding errors of the products have given x a part in the null space again.
    x = x - dot(x, n) / square * y
    r = torch.where(singular, owner.apply(x) - b, 0.0)
    left = r + unreachable
    small = dot(left, owner.times_preconditioner(left)) <= SHARE**2 * dot(b, y).square() / square
    limited = (null.status == Status.ITERATION_LIMIT.value) | (rest.status == Status.ITERATION_LIMIT.value)
    # As good as was asked, or as the dtype allows, whatever share of b that is.
    ends = (Status.CONVERGED, Status.ROUNDING_FLOOR, Status.ILL_CONDITIONED)
    judged = torch.stack([rest.status == status.value for status in ends]).any(0)
    return LeastSquares(
        x=x,
        r=r,
        singular=singular,
        solved=singular & judged & small,
        cut=columns & limited,
        iterations=torch.where(columns, null.iterations + rest.iterations, 0),
    )
