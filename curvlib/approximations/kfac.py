"""K-FAC: each layer's block as a Kronecker product of two small second moments (Martens & Grosse 2015).

Symbols: N examples, T positions, a (N, T, columns) inputs with the homogeneous coordinate, g (N, T, d_out) output
gradients for the vectors v_k of the curvature matrix. In the papers' column-stacking convention the block is A (x) G;
on the rows of (W b) one after another, PyTorch's order, it is the operator ``Kronecker((G, A))``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.approximations.base import Statistics
from curvlib.approximations.gram import gram
from curvlib.approximations.layerwise import LayerwiseApproximation, layer_key
from curvlib.extensions import Layer, LayerFactors
from curvlib.operators import Kronecker, LinearOperator


class WeightSharing(ABC):
    """How the T positions of a layer enter its two factors (Eschenhagen et al. 2023); T = 1 makes no difference."""

    @abstractmethod
    def inputs(self, x: Float[Tensor, "N T d_in"]) -> Float[Tensor, "R d_in"]:
        """Return the rows whose mean outer product, bordered by the homogeneous coordinate, is A."""

    @abstractmethod
    def output_gradients(self, g: Float[Tensor, "N T d_out"]) -> Float[Tensor, "R d_out"]:
        """Return the rows whose summed outer product is G."""


@dataclass(frozen=True)
class Expand(WeightSharing):
    """Positions are treated as independent examples: A = mean_{n,t} a a^T, G = sum_{n,t} g g^T.

    The same product as KFC's Omega (x) Gamma (Grosse & Martens 2016, eq. 26 and 27), with the factor T in G. Exact for
    deep linear networks whose loss is a sum over positions.
    """

    def inputs(self, x: Float[Tensor, "N T d_in"]) -> Float[Tensor, "R d_in"]:
        """Return all positions of all examples."""
        return x.flatten(0, 1)

    def output_gradients(self, g: Float[Tensor, "N T d_out"]) -> Float[Tensor, "R d_out"]:
        """Return all positions of all examples."""
        return g.flatten(0, 1)


@dataclass(frozen=True)
class Reduce(WeightSharing):
    """Positions are summed first: A from mean_t a, G from sum_t g.

    Exact for deep linear networks that sum over positions before the loss.
    """

    def inputs(self, x: Float[Tensor, "N T d_in"]) -> Float[Tensor, "R d_in"]:
        """Return the mean over the positions of each example."""
        return x.mean(1)

    def output_gradients(self, g: Float[Tensor, "N T d_out"]) -> Float[Tensor, "R d_out"]:
        """Return the sum over the positions of each example."""
        return g.sum(1)


@dataclass(frozen=True)
class KFAC(LayerwiseApproximation):
    """Kronecker-factored curvature: block of a layer = A (x) G, A = E[a a^T], G = sum over v_k of g g^T.

    Exact when inputs and output gradients are independent: for one example, for constant inputs, and for deep linear
    networks with squared error. With ``Fisher(samples=1)`` a batch costs one backward pass down to the layers' outputs
    and two second moments a layer; with ``GGN()`` one such pass for each output of an example.

    Source: Martens & Grosse 2015, eq. 1 and sec. 3. Departure: G carries the objective's scale (the paper's objective
    is always a mean), so that the block is the curvature of the user's own loss.

    Args:
        matrix: ``Fisher()`` as in the paper, ``GGN()`` or ``EmpiricalFisher()``.
        weight_sharing: ``Expand()`` or ``Reduce()``, for layers used at several positions.
        on_unsupported: what parameters outside every layer get: "raise", "diagonal" or "exclude".
    """

    weight_sharing: WeightSharing = field(default_factory=Expand, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.weight_sharing, WeightSharing):
            raise TypeError(f"KFAC needs weight_sharing to be Expand() or Reduce(), got {self.weight_sharing!r}.")

    def accumulate(self, factors: LayerFactors, means: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
        """Add g g^T; the inputs are the same for every vector and counted once."""
        input_key, output_key = layer_key(factors.layer, "A"), layer_key(factors.layer, "G")
        if input_key not in means:
            means[input_key] = self._input_moment(factors)
        moment = gram(self.weight_sharing.output_gradients(factors.g))
        sums[output_key] = sums[output_key] + moment if output_key in sums else moment

    def zeros(self, layer: Layer, like: Tensor) -> Statistics:
        """Return zero factors."""
        return Statistics(
            means={layer_key(layer, "A"): like.new_zeros(layer.columns, layer.columns)},
            sums={layer_key(layer, "G"): like.new_zeros(layer.d_out, layer.d_out)},
        )

    def block(self, layer: Layer, statistics: Statistics) -> LinearOperator:
        """Return the Kronecker product of the two factors."""
        return Kronecker((statistics.sums[layer_key(layer, "G")], statistics.means[layer_key(layer, "A")]))

    def describe_block(self, layer: Layer) -> str:
        """Name the sizes of the factors."""
        return f"Kronecker: A {layer.columns} x {layer.columns}, G {layer.d_out} x {layer.d_out}"

    def _input_moment(self, factors: LayerFactors) -> Float[Tensor, "columns columns"]:
        """Return A, its homogeneous border from the rows' sum instead of a column of ones (no copy of the inputs)."""
        rows = self.weight_sharing.inputs(factors.inputs)
        if factors.layer.weight is None:
            return rows.new_ones(1, 1)
        moment = gram(rows).div_(rows.shape[0])
        if factors.layer.bias is None:
            return moment
        mean = rows.mean(0, keepdim=True)
        return torch.cat([torch.cat([moment, mean.T], 1), torch.cat([mean, mean.new_ones(1, 1)], 1)], 0)
