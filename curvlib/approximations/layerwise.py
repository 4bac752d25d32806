"""Approximations with the same kind of block for every layer: what they share.

A subclass says which statistics of one layer's (a, g) it keeps and which operator they make.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curvlib.approximations.assignment import AssignedApproximation, Assignment
from curvlib.approximations.base import Approximation
from curvlib.approximations.exact import check_matrix
from curvlib.approximations.fallbacks import Fallback, check_fallback
from curvlib.approximations.statistics import Statistics
from curvlib.extensions import Layer, LayerFactors, LayerPlan
from curvlib.matrices import CurvatureMatrix
from curvlib.objective import Objective
from curvlib.operators import LinearOperator


@dataclass(frozen=True)
class LayerwiseApproximation(AssignedApproximation):
    """Block diagonal over layers, from the inputs a and output gradients g of each.

    Args:
        matrix: a curvature matrix with output-space vectors; where :attr:`takes_products` is true also ``Hessian()``.
        on_unsupported: what parameters outside every layer get: "raise" refuses them by name before any computation;
            "diagonal" and "dense" give each its exact diagonal or its exact dense block, by one backward pass for each
            example and vector; "exclude" gives them zero curvature, so that only the damping and the l2 term act on
            them.
    """

    matrix: CurvatureMatrix
    on_unsupported: Fallback = field(default="raise", kw_only=True)
    # What a parameter outside every layer gets that PerLayer gives to this approximation by name.
    own_fallback: ClassVar[Fallback | None] = None
    # Whether a matrix that gives products only will do: see exact_blocks_of.
    takes_products: ClassVar[bool] = False
    # Whether it is diagonal in eigenbases that have to be made first.
    in_eigenbasis: ClassVar[bool] = False
    # Whether statistics average over positions, so that padded ones have to be known.
    counts_positions: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_matrix(self, self.matrix)
        if not (self.takes_products and not self.matrix.has_vectors):
            check_vectors(self, self.matrix)
        check_fallback(self.on_unsupported)

    @abstractmethod
    def accumulate(self, factors: LayerFactors, means: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
        """Add one layer's part for one vector v_k to the statistics, under keys that start with the layer's name."""

    def accumulate_into(self, factors: LayerFactors, statistics: Statistics) -> None:
        """Add one layer's part for one vector; for those that keep other kinds of statistics than these two."""
        self.accumulate(factors, statistics.means, statistics.sums)

    @property
    def alone(self) -> str | None:
        """Why ``PerLayer`` cannot mix it with others, None where it can."""
        return None

    @abstractmethod
    def zeros(self, layer: Layer, like: Tensor) -> Statistics:
        """Return the statistics of a layer that the outputs do not depend on; ``like`` gives dtype and device."""

    @abstractmethod
    def block(self, layer: Layer, statistics: Statistics) -> LinearOperator:
        """Return the operator of one layer, in the order of its coordinates."""

    def refusal(self, layer: Layer) -> str:
        """Return why it cannot treat a layer, "" where it can; asked by the model alone, before any computation."""
        return ""

    def exact_blocks_of(self, layer: Layer) -> int:
        """Return B: the exact blocks that :meth:`statistics_of_blocks` takes are B of equal size, in the layer's order.

        Defined where :attr:`takes_products` is true.
        """
        raise NotImplementedError(f"{type(self).__name__} is not made of exact blocks.")

    def statistics_of_blocks(self, layer: Layer, blocks: Float[Tensor, "B d d"]) -> Statistics:
        """Return the statistics of a layer whose exact blocks are known, for a matrix that gives products only."""
        raise NotImplementedError(f"{type(self).__name__} is not made of exact blocks.")

    @abstractmethod
    def describe_block(self, layer: Layer) -> str:
        """Return a few words on the block of a layer."""

    def assign(self, objective: Objective, plan: LayerPlan) -> Assignment:
        """Return that this approximation treats every layer."""
        return Assignment(
            dict.fromkeys((layer.name for layer in plan.layers), self),
            dict.fromkeys(plan.unsupported, (self.on_unsupported, self.matrix)),
        )


def check_vectors(approximation: Approximation, matrix: CurvatureMatrix) -> None:
    """Raise TypeError for what is no curvature matrix with output-space vectors."""
    check_matrix(approximation, matrix)
    if not matrix.has_vectors:
        raise TypeError(
            f"{type(approximation).__name__} needs vectors v_k with sum v_k v_k^T, and {matrix} has products only. "
            "Use it with Exact, Dense, BlockDiagonal, Diagonal, HutchinsonDiagonal or LowRank, or choose GGN(), "
            "Fisher() or EmpiricalFisher() here."
        )
