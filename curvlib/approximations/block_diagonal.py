"""The diagonal blocks of a curvature matrix, one dense block a layer.

Symbols: N examples, J_n^T v the gradient of one example for the output-space vector v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from curvlib.approximations.assignment import Fallback, layer_key
from curvlib.approximations.base import Statistics
from curvlib.approximations.layerwise import LayerwiseApproximation
from curvlib.extensions import Layer, LayerFactors, gram
from curvlib.operators import Dense as DenseOperator
from curvlib.operators import LinearOperator


@dataclass(frozen=True)
class BlockDiagonal(LayerwiseApproximation):
    """Block of a layer = sum_n sum_k (J_n^T v_k)(J_n^T v_k)^T: exact for the given matrix.

    Memory is the square of each layer's number of parameters; per-example gradients are made in chunks of at most
    64 MiB in float32, or of one example.

    Args:
        matrix: ``GGN()``, ``Fisher()`` or ``EmpiricalFisher()``.
        on_unsupported: what parameters outside every layer get: "raise", "diagonal", "dense" or "exclude".
    """

    own_fallback: ClassVar[Fallback | None] = "dense"

    def accumulate(self, factors: LayerFactors, means: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
        """Add the outer products of the per-example gradients."""
        key = layer_key(factors.layer, "block")
        for rows in factors.per_example_gradients():
            sums[key] = sums[key].add_(gram(rows)) if key in sums else gram(rows)

    def zeros(self, layer: Layer, like: Tensor) -> Statistics:
        """Return a zero block."""
        return Statistics(sums={layer_key(layer, "block"): like.new_zeros(layer.size, layer.size)})

    def block(self, layer: Layer, statistics: Statistics) -> LinearOperator:
        """Return the dense block of one layer."""
        return DenseOperator(statistics.sums[layer_key(layer, "block")])

    def describe_block(self, layer: Layer) -> str:
        """Name the size of the block."""
        return f"dense {layer.size} x {layer.size}"
