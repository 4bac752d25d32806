"""The diagonal of a matrix that is known by its products, estimated with random signs.

Symbols: D parameters, z (D,) of independent random signs, p probes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.approximations.base import StatisticalApproximation, with_l2
from curvlib.approximations.description import Description
from curvlib.approximations.exact import check_matrix, whole_matrix
from curvlib.approximations.statistics import Statistics
from curvlib.extensions import LayerPlan
from curvlib.matrices import CurvatureMatrix
from curvlib.objective import Evaluation, Objective
from curvlib.operators import Diagonal as DiagonalOperator
from curvlib.operators import LinearOperator, MatrixFree


@dataclass(frozen=True)
class HutchinsonDiagonal(StatisticalApproximation):
    """diag C ~ mean of z * (C z) over p vectors z of random signs: unbiased, for any matrix and any model.

    The variance of entry i is sum_{j != i} C_ij^2 / p: exact for a diagonal matrix, and entries may come out negative
    although the matrix is positive semi-definite. Where ``Diagonal`` is defined it is exact for a similar cost.

    Source: Bekas, Kokiopoulou & Saad 2007, eq. 2; Yao et al. 2021 (AdaHessian) use it for the Hessian.

    Args:
        matrix: any curvature matrix; what it is made for is ``Hessian()``.
        probes: p, each with a product, at least 1.
    """

    matrix: CurvatureMatrix
    probes: int = 10

    def __post_init__(self) -> None:
        check_matrix(self, self.matrix)
        if isinstance(self.probes, bool) or not isinstance(self.probes, int) or self.probes < 1:
            raise ValueError(f"HutchinsonDiagonal needs probes >= 1, got {self.probes!r}.")

    @property
    def may_be_indefinite(self) -> bool:
        """True: entries may come out negative by chance."""
        return True

    def statistics(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Statistics:
        """Return the estimate without the l2 term; each batch has probes of its own."""
        evaluation.check_fresh()
        layout, product = evaluation.layout, self.matrix.products(evaluation, generator).product
        C = MatrixFree(product, layout.size, layout.dtype, layout.device, columnwise=True)
        return Statistics(sums={"diagonal": estimated_diagonal(C, self.probes, generator)})

    def operator(self, objective: Objective, statistics: Statistics) -> LinearOperator:
        """Return the diagonal operator."""
        return with_l2(DiagonalOperator(statistics.sums["diagonal"]), objective)

    def describe(self, objective: Objective, plan: LayerPlan | None = None) -> Description:
        """All parameters have an estimated diagonal."""
        return whole_matrix(self, objective, f"diagonal, estimated with {self.probes} probes")


def estimated_diagonal(C: LinearOperator, probes: int, generator: torch.Generator | None) -> Float[Tensor, " D"]:
    """Return the mean of z * (C z) over random signs z."""
    device = generator.device if generator is not None else C.device
    bits = torch.randint(2, (C.size, probes), generator=generator, device=device)
    Z = (2 * bits - 1).to(C.device, C.dtype)
    return (Z * (C @ Z)).mean(1)
