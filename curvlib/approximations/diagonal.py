"""The diagonal of a curvature matrix.

Symbols: N examples, J_n^T v the gradient of one example for the output-space vector v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curvlib.approximations.assignment import add_to, layer_key
from curvlib.approximations.fallbacks import Fallback
from curvlib.approximations.layerwise import LayerwiseApproximation
from curvlib.approximations.statistics import Statistics
from curvlib.extensions import Layer, LayerFactors
from curvlib.operators import Diagonal as DiagonalOperator
from curvlib.operators import LinearOperator


@dataclass(frozen=True)
class Diagonal(LayerwiseApproximation):
    """diag C = sum_n sum_k (J_n^T v_k)^2, entry by entry: exact for the given matrix.

    The diagonal of ``Hessian()``, which has no vectors, is exact as well, by D products, one for each parameter: for
    small models and as an oracle. ``HutchinsonDiagonal`` estimates it by a few.

    A layer used at one position needs one matrix product of squares for each vector; with several positions
    per-example gradients are made in chunks of at most 64 MiB in float32, or of one example.

    Args:
        matrix: ``GGN()``, ``Fisher()`` (an unbiased estimate of the GGN's diagonal), ``EmpiricalFisher()`` or
            ``Hessian()``.
        on_unsupported: what parameters outside every layer get: "raise", "diagonal", "dense" or "exclude".
    """

    own_fallback: ClassVar[Fallback | None] = "diagonal"
    takes_products: ClassVar[bool] = True

    def accumulate(self, factors: LayerFactors, means: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
        """Add the squared per-example gradients."""
        add_to(sums, layer_key(factors.layer, "diagonal"), factors.squared_gradients())

    def zeros(self, layer: Layer, like: Tensor) -> Statistics:
        """Return a zero diagonal."""
        return Statistics(sums={layer_key(layer, "diagonal"): like.new_zeros(layer.size)})

    def block(self, layer: Layer, statistics: Statistics) -> LinearOperator:
        """Return the diagonal of one layer."""
        return DiagonalOperator(statistics.sums[layer_key(layer, "diagonal")])

    def exact_blocks_of(self, layer: Layer) -> int:
        """One an entry."""
        return layer.size

    def statistics_of_blocks(self, layer: Layer, blocks: Float[Tensor, "B 1 1"]) -> Statistics:
        """Return the diagonal."""
        return Statistics(sums={layer_key(layer, "diagonal"): blocks.flatten()})

    def describe_block(self, layer: Layer) -> str:
        """Name the kind of block."""
        return "diagonal"
