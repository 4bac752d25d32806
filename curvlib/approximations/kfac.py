"""K-FAC: each layer's block as a Kronecker product of two small second moments (Martens & Grosse 2015).

Symbols: N examples, T positions, a (N, T, groups, columns) inputs with the homogeneous coordinate, g (N, T, groups,
d_out) output gradients for the vectors v_k of the curvature matrix. In the papers' column-stacking convention the block
is A (x) G; on the rows of (W b) one after another, PyTorch's order, it is the operator ``Kronecker((G, A))``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from torch import Tensor

from curvlib.approximations.assignment import add_to, layer_key
from curvlib.approximations.base import Statistics
from curvlib.approximations.layerwise import LayerwiseApproximation
from curvlib.approximations.weight_sharing import Expand, WeightSharing
from curvlib.extensions import AffineMap, Layer, LayerFactors, MapFactors
from curvlib.operators import BlockDiagonal, Diagonal, LinearOperator, Sum

Value = TypeVar("Value")


@dataclass(frozen=True)
class KFAC(LayerwiseApproximation):
    """Kronecker-factored curvature: block of a layer = A (x) G, A = E[a a^T], G = sum over v_k of g g^T.

    Exact when inputs and output gradients are independent: for one example, for constant inputs, and for deep linear
    networks with squared error. With ``Fisher(samples=1)`` a batch costs one backward pass down to the layers' outputs
    and two second moments a layer; with ``GGN()`` one such pass for each output of an example.

    Convolutions have patches as inputs (Grosse & Martens 2016) and one block a group; their patches are made in chunks
    of examples that hold at most 64 MiB in float32, or of one example. Embeddings have a diagonal A. Scale and shift of
    a normalisation layer get their exact diagonal. Modules that use one weight in two ways, such as an embedding and
    the output layer tied to it, get the sum of two Kronecker products, without the terms between the two uses.

    Each weight of a recurrent layer is a layer with its time steps as positions; ``LinearGaussian`` keeps their
    correlations (Martens, Ba & Johnson 2018). Statistics are those of the examples of which a target counts; in models
    with recurrent layers, and for losses that ignore targets, of their positions up to the last one that the outputs
    depend on, so that padded sequences give the same block as truncated ones.

    Source: Martens & Grosse 2015, eq. 1 and sec. 3. Departure: G carries the objective's scale (the paper's objective
    is always a mean), so that the block is the curvature of the user's own loss.

    Args:
        matrix: ``Fisher()`` as in the paper, ``GGN()`` or ``EmpiricalFisher()``.
        weight_sharing: how the positions of layers that are used at several ones enter: ``Expand()``, ``Reduce()``, or
            ``Independent()`` and ``LinearGaussian()`` for recurrent layers.
        on_unsupported: what parameters outside every layer get: "raise", "diagonal", "dense" or "exclude".
    """

    counts_positions: ClassVar[bool] = True
    weight_sharing: WeightSharing = field(default_factory=Expand, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.weight_sharing, WeightSharing):
            raise TypeError(
                "KFAC needs weight_sharing to be Expand(), Reduce(), Independent(), LinearGaussian() or another "
                f"WeightSharing, got {self.weight_sharing!r}."
            )

    def accumulate(self, factors: LayerFactors, means: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
        """Add the output gradients' statistics; the inputs are the same for every vector and counted once."""
        if is_elementwise(factors.layer):
            add_to(sums, layer_key(factors.layer, "diagonal"), factors.squared_gradients())
            return
        for part in factors.maps:
            if not of_map(part.map, means):
                means.update(keyed(part.map, self._input_statistics(factors, part)))
            for key, value in keyed(part.map, self.weight_sharing.output_statistics(part)).items():
                add_to(sums, key, value)

    def _input_statistics(self, factors: LayerFactors, part: MapFactors) -> dict[str, Tensor]:
        """Return the inputs' statistics over the examples with a target that counts."""
        if factors.counted is None:
            return self.weight_sharing.input_statistics(part)
        if not len(factors.counted):
            return self.weight_sharing.zeros(part.map, part.g)[0]
        return self.weight_sharing.input_statistics(part.take(factors.counted))

    def zeros(self, layer: Layer, like: Tensor) -> Statistics:
        """Return zero factors."""
        if is_elementwise(layer):
            return Statistics(sums={layer_key(layer, "diagonal"): like.new_zeros(layer.size)})
        means, sums = {}, {}
        for part in layer.maps:
            of_inputs, of_outputs = self.weight_sharing.zeros(part, like)
            means.update(keyed(part, of_inputs))
            sums.update(keyed(part, of_outputs))
        return Statistics(means=means, sums=sums)

    def block(self, layer: Layer, statistics: Statistics) -> LinearOperator:
        """Return the block that the strategy makes of the factors."""
        if is_elementwise(layer):
            return Diagonal(statistics.sums[layer_key(layer, "diagonal")])
        parts = []
        for part in layer.maps:
            own = of_map(part, statistics.means), of_map(part, statistics.sums)
            product = self.weight_sharing.block(part, *own)
            parts.append(product if part.order is None else BlockDiagonal((product,), (part.order,), layer.size))
        return parts[0] if len(parts) == 1 else Sum(tuple(parts))

    def describe_block(self, layer: Layer) -> str:
        """Name the sizes of the factors."""
        if is_elementwise(layer):
            return "exact diagonal"
        return " + ".join(map(self.weight_sharing.description, layer.maps))


def is_elementwise(layer: Layer) -> bool:
    """Return whether a layer scales and shifts features, so that it gets its exact diagonal."""
    return all(part.elementwise for part in layer.maps)


def keyed(part: AffineMap, statistics: dict[str, Value]) -> dict[str, Value]:
    """Return the statistics of one map under keys that begin with its name."""
    return {f"{part.name}|{name}": value for name, value in statistics.items()}


def of_map(part: AffineMap, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the statistics of one map by their own names."""
    start = f"{part.name}|"
    return {key.removeprefix(start): value for key, value in statistics.items() if key.startswith(start)}
