"""When an iterative solve is over, and what came of it: a value with a status, never a silent wrong answer.

Symbols: A = C + damping I the matrix (D, D), b the right-hand side (D,) or (D, K), x the solution, K columns,
r = A x - b the residual, phi(x) = 1/2 x^T A x - b^T x the quadratic that x minimises, i the iteration.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import ceil, isfinite

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvlib.solvers.errors import NotPositiveDefiniteError, SolveError


class Status(Enum):
    """How a solve of A x = b ended, from the best to the worst.

    * ``CONVERGED``: the stopping rule is satisfied, by the true residual where the rule asks for a residual.
    * ``ROUNDING_FLOOR``: the rule asks for more than the dtype can give: b - A x is already at the rounding errors of
      the product A x, so that x is the exact solution of a system that differs from A in its last digits.
    * ``ITERATION_LIMIT``: the limit came first; x is the last iterate.
    * ``ILL_CONDITIONED``: as the rounding floor, but these errors are above a hundredth of b: x solves a nearby system
      only, and may be no use for this one. MINRES gives the best x that it has met, by the true residual.
    * ``LEAST_SQUARES``: A is singular to working precision and no x solves the system: |b - A x| is within 1.005 times
      the least possible, and x is the shortest with that, see :class:`MINRES`.
    * ``SINGULAR``: p^T A p is no more than its rounding errors along a search direction p: A is singular to working
      precision, and b has a part outside of its range; x is the iterate before.
    * ``NEGATIVE_CURVATURE``: p^T A p < 0 along a search direction p: A is not positive definite.
    * ``BREAKDOWN``: the recurrence lost its meaning: the preconditioner is not positive definite, or the true
      residual does not follow the recurrence (a random or non-linear operator).
    * ``NOT_FINITE``: b, x0 or a product held NaN or infinity, or the solution is beyond the range of the dtype; x is
      the last finite iterate, or 0.
    """

    CONVERGED = 0
    ROUNDING_FLOOR = 1
    ITERATION_LIMIT = 2
    ILL_CONDITIONED = 3
    LEAST_SQUARES = 4
    SINGULAR = 5
    NEGATIVE_CURVATURE = 6
    BREAKDOWN = 7
    NOT_FINITE = 8

    @property
    def solved(self) -> bool:
        """Whether x solves the system as well as was asked, or as well as the dtype allows."""
        return self in (Status.CONVERGED, Status.ROUNDING_FLOOR)


class ConvergenceWarning(UserWarning):
    """An iterative solver stopped at its limit; the result is the last iterate."""


_DIAGNOSES = {
    Status.CONVERGED: "converged after {iterations} iterations with relative residual {residual} (asked {asked})",
    Status.ROUNDING_FLOOR: "reached the rounding errors of {dtype} after {iterations} iterations with relative "
    "residual {residual} (asked {asked}); for a smaller one raise the damping or compute in a wider dtype",
    Status.ITERATION_LIMIT: "stopped at its limit of {limit} iterations with relative residual {residual} "
    "(asked {asked}); raise max_iterations, the damping or the tolerance",
    Status.ILL_CONDITIONED: "cannot solve the system in {dtype}: after {iterations} iterations the rounding errors of "
    "its products leave a relative residual of {residual} (asked {asked}); raise the damping or compute in a wider "
    "dtype",
    Status.LEAST_SQUARES: "found no solution: the matrix is singular and the right-hand side not in its range; after "
    "{iterations} iterations x is the shortest least-squares solution, relative residual {residual}; raise the damping "
    "for a system that has a solution",
    Status.SINGULAR: "met a matrix C + damping I that is singular in {dtype} and a right-hand side that is not in its "
    "range, after {iterations} iterations with relative residual {residual}; raise the damping, or use MINRES for the "
    "shortest least-squares solution",
    Status.NEGATIVE_CURVATURE: "met negative curvature, p^T (C + damping I) p < 0, after {iterations} iterations with "
    "relative residual {residual}; raise the damping above minus the smallest eigenvalue of C, or use a positive "
    "semi-definite curvature matrix",
    Status.BREAKDOWN: "broke down after {iterations} iterations with relative residual {residual} (asked {asked}); "
    "check that the preconditioner is positive definite and the operator linear and free of randomness",
    Status.NOT_FINITE: "met NaN or infinity after {iterations} iterations, x is the last finite iterate; check the "
    "right-hand side, the start, the operator and the preconditioner",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """Outcome of an iterative method on A x = b, A = C + damping I; ``str(solution)`` is a diagnosis.

    Attributes:
        x: the solution, in the shape of b.
        statuses: the status of each column, one for a vector b.
        column_iterations: the iterations of each column.
        residual_norm: true |b - A x| / |b| of each column, from an explicit product at the end unless
            ``CG(always_verify=False)`` saved it; 0 where b = 0.
        model_value: phi(x) = 1/2 x^T A x - b^T x = 1/2 x^T (r - b), r = A x - b, of each column.
        products: how many times the operator was applied to a block, the final check included.
        iterates: pairs (i, x_i), increasing in i, the last one included; empty where none were asked for.
        method: the method's name, for the diagnosis.
        asked: what the stopping rule demands, in words.
        limit: the allowed number of iterations.
    """

    x: Float[Tensor, " D *K"]
    statuses: tuple[Status, ...]
    column_iterations: tuple[int, ...]
    residual_norm: Float[Tensor, "*K"]
    model_value: Float[Tensor, "*K"]
    products: int
    iterates: tuple[tuple[int, Tensor], ...]
    method: str
    asked: str
    limit: int

    @property
    def status(self) -> Status:
        """The worst status of the columns; converged where there is no column."""
        return max(self.statuses, key=lambda status: status.value, default=Status.CONVERGED)

    @property
    def iterations(self) -> int:
        """The most iterations that a column took."""
        return max(self.column_iterations, default=0)

    @property
    def solved(self) -> bool:
        """Whether every column is solved, see :attr:`Status.solved`."""
        return self.status.solved

    def raise_if_failed(self) -> None:
        """Do nothing where every column is solved.

        Raises:
            NotPositiveDefiniteError: a column has met negative curvature, or none, along a search direction.
            SolveError: a column is not solved for another reason; the message of both is the diagnosis, their
                ``solution`` this value.
        """
        if self.status in (Status.NEGATIVE_CURVATURE, Status.SINGULAR):
            raise NotPositiveDefiniteError(str(self), solution=self)
        if not self.solved:
            raise SolveError(str(self), solution=self)

    def __str__(self) -> str:
        worst = [column for column, status in enumerate(self.statuses) if status is self.status]
        text = _DIAGNOSES[self.status].format(
            iterations=max((self.column_iterations[column] for column in worst), default=0),
            residual=f"{max((self.residual_norm.reshape(-1)[worst].tolist()), default=0.0):.1e}",
            asked=self.asked,
            limit=self.limit,
            dtype=str(self.x.dtype).removeprefix("torch."),
        )
        columns = f" (columns {_listed(worst)} of {len(self.statuses)})" if len(self.statuses) > 1 else ""
        return f"{self.method}{columns} {text}"


class LimitAction(ABC):
    """What ``@`` does with a solution that stopped at the limit of iterations."""

    @abstractmethod
    def act(self, solution: Solution) -> None:
        """Warn, raise or do nothing."""


@dataclass(frozen=True)
class WarnAtLimit(LimitAction):
    """Emits a :class:`ConvergenceWarning` with the diagnosis; the last iterate is used."""

    def act(self, solution: Solution) -> None:
        """Warn; the place that is named is the one that applied ``@``."""
        warnings.warn(str(solution), ConvergenceWarning, stacklevel=4)


@dataclass(frozen=True)
class RaiseAtLimit(LimitAction):
    """Raises ``SolveError`` with the diagnosis."""

    def act(self, solution: Solution) -> None:
        """Raise."""
        solution.raise_if_failed()


@dataclass(frozen=True, kw_only=True, eq=False)
class Progress:
    """What a stopping rule may look at after iteration i; tensors stay on the device.

    Attributes:
        iteration: i, the number of the last iteration; 0 before the first.
        residual_norm: |r| of each column, from the recurrence.
        rhs_norm: |b| of each column.
        values: phi(x_0) ... phi(x_i), each column in a unit of its own, against underflow.
    """

    iteration: int
    residual_norm: Float[Tensor, " K"]
    rhs_norm: Float[Tensor, " K"]
    values: Sequence[Float[Tensor, " K"]]


class StoppingRule(ABC):
    """Decides for each column whether its iterate is good enough, without a look at a value on the host.

    ``str(rule)`` says what is demanded; it appears in diagnoses.
    """

    @abstractmethod
    def satisfied(self, progress: Progress) -> Bool[Tensor, " K"]:
        """Return where the iterate is good enough."""

    def at(self, damping_share: float) -> StoppingRule:
        """Return the rule of a solve within training, for its damping over the first one. Default: the same."""
        return self

    def residual_target(self, rhs_norm: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        """Return the |b - A x| that the rule guarantees; infinity (the default) where it guarantees none."""
        return torch.full_like(rhs_norm, float("inf"))


@dataclass(frozen=True, kw_only=True)
class ResidualTest(StoppingRule):
    """Stop when |b - A x| <= max(relative |b|, absolute).

    Args:
        relative: tolerance in units of |b|.
        absolute: tolerance in the units of b.
    """

    relative: float = 1e-6
    absolute: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("relative", self.relative), ("absolute", self.absolute)):
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"ResidualTest({name}=...) must be a finite number >= 0, got {value!r}.")

    def satisfied(self, progress: Progress) -> Bool[Tensor, " K"]:
        """Return where |r| is within the tolerance."""
        return progress.residual_norm <= self.residual_target(progress.rhs_norm)

    def residual_target(self, rhs_norm: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        """Return max(relative |b|, absolute)."""
        return (self.relative * rhs_norm).clamp(min=self.absolute)

    def __str__(self) -> str:
        return f"{self.relative:.0e}" + (f" or |b - A x| <= {self.absolute:.0e}" if self.absolute else "")


@dataclass(frozen=True, kw_only=True)
class ProgressTest(StoppingRule):
    r"""Stop when phi has hardly fallen over the last k iterations.

    .. math:: i > k, \quad \phi(x_i) < 0, \quad (\phi(x_i) - \phi(x_{i-k})) / \phi(x_i) < k \epsilon, \quad
        k = \max(\text{min\_window}, \lceil \text{fraction} \cdot i \rceil)

    Martens, "Deep learning via Hessian-free optimization" (2010), section 4.4. It says nothing about the residual.

    Args:
        epsilon: the least relative progress of an iteration.
        min_window: the least number of iterations that are looked back.
        fraction: the part of all iterations that is looked back.
    """

    epsilon: float = 5e-4
    min_window: int = 10
    fraction: float = 0.1

    def __post_init__(self) -> None:
        if not (isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"ProgressTest(epsilon=...) must be a finite number > 0, got {self.epsilon!r}.")
        if self.min_window < 1:
            raise ValueError(f"ProgressTest(min_window=...) must be an integer >= 1, got {self.min_window!r}.")
        if not 0 <= self.fraction < 1:
            raise ValueError(f"ProgressTest(fraction=...) must lie in [0, 1), got {self.fraction!r}.")

    def satisfied(self, progress: Progress) -> Bool[Tensor, " K"]:
        """Return where phi has stalled."""
        i = progress.iteration
        k = max(self.min_window, ceil(self.fraction * i))
        now = progress.values[-1]
        if i <= k:
            return torch.zeros_like(now, dtype=torch.bool)
        return (now < 0) & ((now - progress.values[i - k]) / now < k * self.epsilon)

    def __str__(self) -> str:
        return f"progress below {self.epsilon:.0e} an iteration"


@dataclass(frozen=True, kw_only=True)
class IterateGrid:
    """Keeps the iterates i = ceil(base^j), j = 0, 1, ...: a few early ones, ever fewer late ones.

    Martens (2010), section 4.6, with base 1.3, where the last iterate need not be the best step for the objective.

    Args:
        base: the ratio of successive numbers, above 1.
    """

    base: float = 1.3

    def __post_init__(self) -> None:
        if not (isfinite(self.base) and self.base > 1):
            raise ValueError(f"IterateGrid(base=...) must be a finite number > 1, got {self.base!r}.")

    def numbers(self, limit: int) -> frozenset[int]:
        """Return the i up to limit."""
        numbers, power = set(), 1.0
        while ceil(power) <= limit:
            numbers.add(ceil(power))
            power *= self.base
        return frozenset(numbers)


def _listed(numbers: list[int], most: int = 8) -> str:
    """Return the first numbers, and a note where there are more."""
    shown = ", ".join(str(number) for number in numbers[:most])
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"
