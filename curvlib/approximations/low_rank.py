"""A curvature matrix of low rank, with or without the diagonal of what is left.

Symbols: D parameters, r rank, U (D, r), w (r,), d (D,), eta the objective's l2 weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.approximations.base import Approximation, with_l2
from curvlib.approximations.description import Description
from curvlib.approximations.exact import check_matrix, whole_matrix
from curvlib.approximations.example_gradients import exact_diagonal
from curvlib.approximations.hutchinson import estimated_diagonal
from curvlib.approximations.loss_curvature import LossCurvature, OnEvaluation, OverLoader
from curvlib.approximations.statistics import NonFiniteStatisticsError
from curvlib.approximations.truncation import FullRank, LowRankMethod
from curvlib.extensions import LayerPlan
from curvlib.matrices import CurvatureMatrix
from curvlib.objective import Batch, Evaluation, Objective
from curvlib.operators import LinearOperator, full_precision
from curvlib.operators import LowRank as LowRankOperator


class RemainderDiagonal(ABC):
    """A diagonal for what a matrix of low rank leaves out."""

    @abstractmethod
    def values(
        self, curvature: LossCurvature, low_rank: LowRankOperator, generator: torch.Generator | None
    ) -> Float[Tensor, " D"]:
        """Return d (D,) for the matrix C and U diag(w) U^T."""


@dataclass(frozen=True)
class Remainder(RemainderDiagonal):
    """d = diag(C) - diag(U diag(w) U^T): the sum has the exact diagonal, of the same draws.

    diag(C) costs a backward pass for each vector of the matrix, as ``Diagonal`` does, and D products for ``Hessian()``,
    which has none; ``EstimatedRemainder`` takes a few. An entry can be negative where U
    are Ritz vectors that have not converged, never for ``Nystrom``.
    """

    def values(
        self, curvature: LossCurvature, low_rank: LowRankOperator, generator: torch.Generator | None
    ) -> Float[Tensor, " D"]:
        """Return the exact diagonal."""
        diagonal = curvature.total(lambda evaluation, draws: exact_diagonal(evaluation, curvature.matrix, draws))
        return diagonal - low_rank.diagonal()


@dataclass(frozen=True)
class EstimatedRemainder(RemainderDiagonal):
    """d = mean of z * (C - U diag(w) U^T) z over random signs z: an unbiased estimate, with negative entries by chance.

    What is in U costs no accuracy: the variance of an entry is the sum of squares of the remainder's row, without the
    entry itself, over the number of probes.

    Args:
        probes: how many z, each with a product.
    """

    probes: int = 10

    def __post_init__(self) -> None:
        if isinstance(self.probes, bool) or not isinstance(self.probes, int) or self.probes < 1:
            raise ValueError(f"EstimatedRemainder needs probes >= 1, got {self.probes!r}.")

    def values(
        self, curvature: LossCurvature, low_rank: LowRankOperator, generator: torch.Generator | None
    ) -> Float[Tensor, " D"]:
        """Return the estimate."""
        return estimated_diagonal(curvature.operator() - low_rank, self.probes, generator)


@dataclass(frozen=True)
class LowRank(Approximation):
    """U diag(w) U^T + diag(d) + eta I, with U and w by a method of choice; its inverse is Woodbury's.

    Full rank is the exact matrix of the data, cheaper than ``Dense`` while the examples times their outputs are fewer
    than the parameters. There is no running average of such factors; over a loader, full rank puts the columns of all
    batches side by side, the others make products with the whole. For low-rank blocks that average see
    ``BlockDiagonal``.

    Args:
        matrix: ``GGN()``, ``Fisher()``, ``EmpiricalFisher()``; with ``RandomizedSketch`` and ``LanczosTruncation`` also
            ``Hessian()``.
        method: ``FullRank()``, ``RandomizedSketch(rank)``, ``Nystrom(rank)`` or ``LanczosTruncation(rank)``.
        diagonal: None for d = 0; ``Remainder()`` or ``EstimatedRemainder(probes)``.

    Raises:
        TypeError: the matrix is not for the method or the diagonal.
        ValueError: a diagonal for full rank, which leaves out nothing.

    Example:
        >>> import curvlib
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> evaluation = objective.at((torch.ones(1, 3), torch.zeros(1, 2)))
        >>> LowRank(curvlib.GGN()).estimate(evaluation).factor.shape
        torch.Size([8, 2])
    """

    matrix: CurvatureMatrix
    method: LowRankMethod = field(default_factory=FullRank, kw_only=True)
    diagonal: RemainderDiagonal | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_matrix(self, self.matrix)
        if not isinstance(self.method, LowRankMethod):
            raise TypeError(
                f"LowRank needs method to be FullRank(), RandomizedSketch(rank), Nystrom(rank) or "
                f"LanczosTruncation(rank), got {self.method!r}."
            )
        if self.diagonal is not None and not isinstance(self.diagonal, RemainderDiagonal):
            raise TypeError(
                f"LowRank needs diagonal to be None, Remainder() or EstimatedRemainder(probes), got {self.diagonal!r}."
            )
        self.method.check(self.matrix)
        if self.diagonal is not None and isinstance(self.method, FullRank):
            raise ValueError(f"FullRank leaves out nothing: leave diagonal out, got {self.diagonal!r}.")

    @property
    def takes_products(self) -> bool:
        """Whether a matrix that gives products only takes one a parameter: for the exact diagonal of the rest."""
        return isinstance(self.diagonal, Remainder)

    def estimate(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> LinearOperator:
        """Return the low-rank operator of one batch.

        Raises:
            MemoryError: full rank takes more memory than its limit.
            NonFiniteStatisticsError: the objective or the factors are not finite.
        """
        evaluation.check_fresh()
        return self._operator(OnEvaluation(evaluation, self.matrix, generator), generator)

    def estimate_over(
        self,
        objective: Objective,
        loader: Iterable[Batch],
        generator: torch.Generator | None = None,
        *,
        progress: bool = True,
    ) -> LinearOperator:
        """Return the low-rank operator of all batches together; the loader is run through several times.

        Raises:
            MemoryError: full rank takes more memory than its limit.
            NonFiniteStatisticsError: the objective or the factors are not finite.
            RuntimeError: the loader or the model gives another objective value than at first.
        """
        return self._operator(OverLoader(objective, self.matrix, loader, generator, progress), generator)

    def describe(self, objective: Objective, plan: LayerPlan | None = None) -> Description:
        """All parameters are in one block."""
        rest = "" if self.diagonal is None else f" plus diagonal, {self.diagonal!r}"
        return whole_matrix(self, objective, f"low rank, {self.method!r}{rest}")

    def _operator(self, curvature: LossCurvature, generator: torch.Generator | None) -> LinearOperator:
        with full_precision(curvature.objective.layout.device):
            U, w = self.method.factors(curvature, generator)
            operator = LowRankOperator(U, w, torch.zeros_like(U[:, 0]))
            if self.diagonal is not None:
                operator = replace(operator, diagonal_part=self.diagonal.values(curvature, operator, generator))
        parts = (operator.factor, operator.weights, operator.diagonal_part)
        if not all(bool(part.isfinite().all()) for part in parts):
            raise NonFiniteStatisticsError(
                f"the factors of {self!r} are not finite: look for NaN or overflow in inputs, targets and parameters."
            )
        return with_l2(operator, curvature.objective)
