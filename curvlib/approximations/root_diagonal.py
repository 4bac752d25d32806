"""The square root of a diagonal second moment, as first-order methods with adaptive step sizes use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from curvlib.approximations.base import with_l2
from curvlib.approximations.diagonal import Diagonal
from curvlib.approximations.exact import check_matrix
from curvlib.approximations.fallbacks import Fallback
from curvlib.approximations.statistics import Statistics
from curvlib.extensions import Layer
from curvlib.objective import Objective
from curvlib.operators import Diagonal as DiagonalOperator
from curvlib.operators import LinearOperator


@dataclass(frozen=True)
class RootDiagonal(Diagonal):
    """diag(C)^(1/2) + eta I, entry by entry: what RMSProp and Adam divide the gradient by.

    It is not a curvature: multiplying the objective by c multiplies it by sqrt(c), so that damping, learning rate and
    the l2 term next to it have other units than elsewhere, and a step does not become invariant to the scale of a
    parameter. ``MovingAverage`` averages the second moments before the root.

    Source: Tieleman & Hinton 2012 (RMSProp), Kingma & Ba 2015 (Adam), with ``EmpiricalFisher()``. Departure: they
    square the mean gradient of a mini-batch; the diagonal here sums the squares of each example's gradient.
    For diagonals that may be negative see ``RootMeanSquareDiagonal``.

    Args:
        matrix: ``EmpiricalFisher()``, ``GGN()`` or ``Fisher()``.
        on_unsupported: what parameters outside every layer get: "raise", "diagonal" (the root of theirs) or "exclude".
    """

    own_fallback: ClassVar[Fallback | None] = None
    takes_products: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_matrix(self, self.matrix)
        if not self.matrix.has_vectors:
            raise TypeError(
                f"RootDiagonal needs a diagonal without negative entries, and {self.matrix} may be indefinite: use "
                f"RootMeanSquareDiagonal(Diagonal({self.matrix})), or of HutchinsonDiagonal({self.matrix}, probes=1) "
                "as AdaHessian does."
            )
        super().__post_init__()
        if self.on_unsupported == "dense":
            raise ValueError('RootDiagonal has no dense blocks: choose on_unsupported="diagonal" or "exclude".')

    @property
    def alone(self) -> str | None:
        """Why ``PerLayer`` cannot mix it with others."""
        return "its blocks are roots of curvatures, in other units than the blocks of other layers"

    def operator(self, objective: Objective, statistics: Statistics) -> LinearOperator:
        """Return the root of the averaged diagonal."""
        second_moment = self.operator_of_loss(objective, statistics).diagonal()
        return with_l2(DiagonalOperator(second_moment.sqrt()), objective)

    def describe_block(self, layer: Layer) -> str:
        """Name the kind of block."""
        return "root of the diagonal"
