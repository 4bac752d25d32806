"""The exact curvature, matrix-free or dense.

Symbols: D parameters, K columns, J the Jacobian of the outputs, M the matrix in output space, eta the objective's l2
weight: C = J^T M J + eta I.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from curvlib.approximations.base import Approximation, StatisticalApproximation, with_l2
from curvlib.approximations.description import BlockRow, Description
from curvlib.approximations.joint import OutputProducts
from curvlib.approximations.loss_curvature import OverLoader, check_finite
from curvlib.approximations.statistics import Statistics
from curvlib.extensions import LayerPlan
from curvlib.matrices import CurvatureMatrix
from curvlib.objective import Batch, Evaluation, Objective
from curvlib.operators import Dense as DenseOperator
from curvlib.operators import LinearOperator, MatrixFree


@dataclass(frozen=True)
class Exact(Approximation):
    """The curvature matrix itself, by products: C v = J^T M (J v) + eta v.

    On one evaluation, J v is one backward pass through the kept graph of J^T u and J^T one ordinary backward pass:
    1.2 to 1.3 gradients a product. Quadratic forms need J v alone. Over a loader, every product runs through all
    batches, each with a forward pass of its own.

    Args:
        matrix: ``GGN()``, ``Fisher()`` (the draws are made once and kept), ``EmpiricalFisher()`` or ``Hessian()``.
    """

    matrix: CurvatureMatrix

    def __post_init__(self) -> None:
        check_matrix(self, self.matrix)

    def estimate(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> LinearOperator:
        """Return the matrix-free operator of one evaluation; it holds the evaluation and its graph.

        Raises:
            NonFiniteStatisticsError: the objective is NaN or infinite on the batch.
        """
        check_finite(self, float(evaluation.value))
        products = self.matrix.products(evaluation, generator)
        return with_l2(OutputProducts(evaluation, products), evaluation.objective)

    def estimate_over(
        self,
        objective: Objective,
        loader: Iterable[Batch],
        generator: torch.Generator | None = None,
        *,
        progress: bool = True,
    ) -> LinearOperator:
        """Return an operator that runs through the loader at each product.

        The loader must be iterable again and again with the same data; for ``Fisher()`` in the same batches, since the
        draws of a batch are repeated by its number.

        Raises:
            ValueError: the loader gives no batch.
            StaleEvaluationError: (at a product) the parameters have changed.
            RuntimeError: (at a product) the loader or the model gives another objective value than at first.
        """
        sweep = OverLoader(objective, self.matrix, loader, generator, progress)
        return with_l2(sweep.operator(), objective)

    def describe(self, objective: Objective, plan: LayerPlan | None = None) -> Description:
        """All parameters are in one exact block."""
        return whole_matrix(self, objective, "exact, matrix-free")


@dataclass(frozen=True)
class Dense(StatisticalApproximation):
    """The curvature matrix itself as a (D, D) tensor, by D exact products: for small models and as an oracle.

    Args:
        matrix: any curvature matrix.
    """

    matrix: CurvatureMatrix

    def __post_init__(self) -> None:
        check_matrix(self, self.matrix)

    def statistics(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Statistics:
        """Return the matrix without the l2 term."""
        evaluation.check_fresh()
        product = self.matrix.products(evaluation, generator).product
        size, dtype, device = evaluation.layout.size, evaluation.layout.dtype, evaluation.layout.device
        columns = MatrixFree(product, size, dtype, device, columnwise=True).to_dense()
        return Statistics(sums={"matrix": 0.5 * (columns + columns.T)})

    def operator(self, objective: Objective, statistics: Statistics) -> LinearOperator:
        """Return the dense operator."""
        return with_l2(DenseOperator(statistics.sums["matrix"]), objective)

    def describe(self, objective: Objective, plan: LayerPlan | None = None) -> Description:
        """All parameters are in one exact block."""
        return whole_matrix(self, objective, "exact, dense")


def check_matrix(approximation: Approximation, matrix: object) -> None:
    """Raise TypeError unless ``matrix`` is a curvature matrix."""
    if not isinstance(matrix, CurvatureMatrix):
        raise TypeError(
            f"{type(approximation).__name__} needs a curvature matrix such as curvlib.GGN() or curvlib.Fisher(), "
            f"got {matrix!r}."
        )


def whole_matrix(approximation: Approximation, objective: Objective, block: str) -> Description:
    """Return the description of an approximation that treats all parameters alike."""
    rows = [
        BlockRow(name, tuple(shape), "-", "-", block, "no layer structure needed")
        for name, shape in zip(objective.layout.names, objective.layout.shapes, strict=True)
    ]
    return Description(repr(approximation), tuple(rows))
