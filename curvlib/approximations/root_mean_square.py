"""The root mean square of diagonals over batches, as AdaHessian divides by it.

Symbols: D parameters, d_b (D,) the diagonal of the loss's curvature on batch b, eta the objective's l2 weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from curvlib.approximations.base import StatisticalApproximation, adds_up, with_l2
from curvlib.approximations.description import BlockRow, Description
from curvlib.approximations.statistics import Statistics
from curvlib.extensions import LayerPlan
from curvlib.objective import Evaluation, Objective
from curvlib.operators import Diagonal as DiagonalOperator
from curvlib.operators import LinearOperator
from curvlib.operators.structure import remove_shift


@dataclass(frozen=True)
class RootMeanSquareDiagonal(StatisticalApproximation):
    r"""diag(sqrt(mean_b d_b * d_b)) + eta I of another approximation's diagonals d_b, entry by entry.

    On one batch this is the diagonal's absolute value: positive semi-definite whatever the curvature is. Averages,
    of ``MovingAverage`` and over a loader, are those of the squares, batch by batch: over a loader the result depends
    on how the data are cut, and it has the scale of one batch also for a loss with ``reduction="sum"``.

    Source: Yao, Gholami, Shen, Mustafa, Keutzer & Mahoney 2021 (AdaHessian), eq. 8 to 10 with Hessian power 1:
    ``RootMeanSquareDiagonal(HutchinsonDiagonal(Hessian(), probes=1))``. Departures: no averaging over the entries of a
    filter or row, and the average over steps is that of ``MovingAverage``, de-biased in another way. Momentum belongs
    to the step rule.

    Args:
        diagonals: what gives the d_b, such as ``HutchinsonDiagonal(Hessian(), probes=1)``; of others the diagonal.

    Raises:
        TypeError: it has no statistics that average.

    Example:
        >>> import curvlib
        >>> from curvlib.approximations import HutchinsonDiagonal
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> adahessian = RootMeanSquareDiagonal(HutchinsonDiagonal(curvlib.Hessian(), probes=1))
        >>> adahessian.estimate(objective.at((torch.ones(4, 3), torch.zeros(4, 2)))).shape
        (8, 8)
    """

    diagonals: StatisticalApproximation

    def __post_init__(self) -> None:
        if not adds_up(self.diagonals):
            raise TypeError(
                "RootMeanSquareDiagonal needs an approximation with statistics, such as HutchinsonDiagonal(Hessian(), "
                f"probes=1) or Diagonal(GGN()), got {self.diagonals!r}."
            )

    @property
    def may_be_indefinite(self) -> bool:
        """False: roots of squares are not negative."""
        return False

    def statistics(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Statistics:
        """Return the squares of the diagonal of one batch."""
        objective = evaluation.objective
        operator = self.diagonals.operator(objective, self.diagonals.statistics(evaluation, generator))
        of_loss = remove_shift(operator, objective.l2) if self.diagonals.includes_l2 else operator
        # a mean over batches: squares are not on the scale of the objective
        return Statistics(means={"squares": of_loss.diagonal().square()})

    def operator(self, objective: Objective, statistics: Statistics) -> LinearOperator:
        """Return the root of the averaged squares."""
        return with_l2(DiagonalOperator(statistics.means["squares"].sqrt()), objective)

    def check(self, objective: Objective) -> None:
        """Refuse what the approximation of the diagonals refuses."""
        self.diagonals.check(objective)

    def describe(self, objective: Objective, plan: LayerPlan | None = None) -> Description:
        """Return what the approximation of the diagonals says of its blocks."""
        rows = (
            BlockRow(row.parameter, row.shape, row.layer, row.calls, f"root mean square of ({row.block})", row.reason)
            for row in self.diagonals.describe(objective, plan).rows
        )
        return Description(repr(self), tuple(rows))
