"""K-FAC: each layer's block as a Kronecker product of two small second moments (Martens & Grosse 2015).

Symbols: N examples, T positions, a (N, T, groups, columns) inputs with the homogeneous coordinate, g (N, T, groups,
d_out) output gradients for the vectors v_k of the curvature matrix. In the papers' column-stacking convention the block
is A (x) G; on the rows of (W b) one after another, PyTorch's order, it is the operator ``Kronecker((G, A))``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.approximations.assignment import add_to, layer_key
from curvlib.approximations.base import Statistics
from curvlib.approximations.layerwise import LayerwiseApproximation
from curvlib.approximations.weight_sharing import Expand, WeightSharing
from curvlib.extensions import (
    AffineMap,
    DenseFactors,
    InputMoments,
    Layer,
    LayerFactors,
    LookupFactors,
    MapFactors,
    grouped_gram,
)
from curvlib.operators import BlockDiagonal, Diagonal, Kronecker, KroneckerStack, LinearOperator, Sum


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

    A is a mean over the examples of which a target counts, and over all of their positions, also those whose targets
    are ignored: padded positions make A, and with it the block, smaller or larger than without them, while G and the
    exact matrix do not change.

    Source: Martens & Grosse 2015, eq. 1 and sec. 3. Departure: G carries the objective's scale (the paper's objective
    is always a mean), so that the block is the curvature of the user's own loss.

    Args:
        matrix: ``Fisher()`` as in the paper, ``GGN()`` or ``EmpiricalFisher()``.
        weight_sharing: ``Expand()`` or ``Reduce()``, for layers used at several positions.
        on_unsupported: what parameters outside every layer get: "raise", "diagonal", "dense" or "exclude".
    """

    weight_sharing: WeightSharing = field(default_factory=Expand, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.weight_sharing, WeightSharing):
            raise TypeError(f"KFAC needs weight_sharing to be Expand() or Reduce(), got {self.weight_sharing!r}.")

    def accumulate(self, factors: LayerFactors, means: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
        """Add g g^T; the inputs are the same for every vector and counted once."""
        if _is_elementwise(factors.layer):
            add_to(sums, layer_key(factors.layer, "diagonal"), factors.squared_gradients())
            return
        for part in factors.maps:
            input_key, output_key = _key(part.map, "A"), _key(part.map, "G")
            if input_key not in means:
                means[input_key] = self._mean_of_inputs(factors, part)
            moment = grouped_gram(self.weight_sharing.output_gradients(part.g))
            add_to(sums, output_key, moment.squeeze(0) if part.map.groups == 1 else moment)

    def _mean_of_inputs(self, factors: LayerFactors, part: MapFactors) -> Tensor:
        """Return A over the examples with a target that counts."""
        if factors.counted is None:
            return _input_factor(part, self.weight_sharing)
        if not len(factors.counted):
            return self.zeros(factors.layer, part.g).means[_key(part.map, "A")]
        return _input_factor(part.take(factors.counted), self.weight_sharing)

    def zeros(self, layer: Layer, like: Tensor) -> Statistics:
        """Return zero factors."""
        if _is_elementwise(layer):
            return Statistics(sums={layer_key(layer, "diagonal"): like.new_zeros(layer.size)})
        means, sums = {}, {}
        for part in layer.maps:
            stack = (part.groups,) if part.groups > 1 else ()
            inputs = (part.columns,) if part.sparse else (part.columns, part.columns)
            means[_key(part, "A")] = like.new_zeros(*stack, *inputs)
            sums[_key(part, "G")] = like.new_zeros(*stack, part.d_out, part.d_out)
        return Statistics(means=means, sums=sums)

    def block(self, layer: Layer, statistics: Statistics) -> LinearOperator:
        """Return the Kronecker product of the two factors."""
        if _is_elementwise(layer):
            return Diagonal(statistics.sums[layer_key(layer, "diagonal")])
        parts = []
        for part in layer.maps:
            G, A = statistics.sums[_key(part, "G")], statistics.means[_key(part, "A")]
            product: LinearOperator = (
                KroneckerStack((G, A)) if part.groups > 1 else Kronecker((G, Diagonal(A) if part.sparse else A))
            )
            parts.append(product if part.order is None else BlockDiagonal((product,), (part.order,), layer.size))
        return parts[0] if len(parts) == 1 else Sum(tuple(parts))

    def describe_block(self, layer: Layer) -> str:
        """Name the sizes of the factors."""
        if _is_elementwise(layer):
            return "exact diagonal"
        return " + ".join(map(_description, layer.maps))


@singledispatch
def _input_factor(factors: MapFactors, sharing: WeightSharing) -> Tensor:
    """Return A of one affine map."""
    raise TypeError(f"K-FAC has no input factor for {type(factors).__name__}.")


@_input_factor.register
def _(factors: DenseFactors, sharing: WeightSharing) -> Float[Tensor, "*groups columns columns"]:
    if not factors.map.weight:
        groups = (factors.map.groups,) if factors.map.groups > 1 else ()
        return factors.g.new_ones(*groups, 1, 1)
    A = _bordered(sharing.moments(factors)) if factors.map.bias else _mean(sharing.moments(factors))
    return A.squeeze(0) if factors.map.groups == 1 else A


@_input_factor.register
def _(factors: LookupFactors, sharing: WeightSharing) -> Float[Tensor, " columns"]:
    rows = sharing.lookups(factors)
    return rows.squared_inputs() / max(rows.examples * rows.positions, 1)


def _mean(moments: InputMoments) -> Float[Tensor, "groups d_in d_in"]:
    # in place: the sums are nobody else's, and as large as A; no position at all makes zero
    return moments.outer.div_(max(moments.count, 1))


def _bordered(moments: InputMoments) -> Float[Tensor, "groups columns columns"]:
    """Return A with the border of the homogeneous coordinate from the rows' sum (no copy of the inputs with ones)."""
    mean = (moments.total / max(moments.count, 1)).unsqueeze(1)
    ones = mean.new_full((mean.shape[0], 1, 1), float(moments.count > 0))
    return torch.cat([torch.cat([_mean(moments), mean.mT], 2), torch.cat([mean, ones], 2)], 1)


def _is_elementwise(layer: Layer) -> bool:
    return all(part.elementwise for part in layer.maps)


def _key(part: AffineMap, statistic: str) -> str:
    return f"{part.name}|{statistic}"


def _description(part: AffineMap) -> str:
    A = f"diagonal of {part.columns}" if part.sparse else f"{part.columns} x {part.columns}"
    groups = f"{part.groups} times " if part.groups > 1 else ""
    return f"Kronecker: {groups}A {A}, G {part.d_out} x {part.d_out}"
