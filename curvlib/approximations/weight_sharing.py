"""How the positions of a layer that uses its weight several times enter K-FAC's factors (Eschenhagen et al. 2023).

Symbols: N examples, T positions, a (N, T, groups, d_in) inputs without the homogeneous coordinate, g (N, T, groups,
d_out) output gradients, R rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import reduce
from operator import add

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from curvlib.extensions import DenseFactors, InputMoments, LookupFactors, moments_of_rows


class WeightSharing(ABC):
    """Which rows K-FAC's factors are second moments of; with T = 1 all strategies agree."""

    @abstractmethod
    def inputs(self, a: Float[Tensor, "N T groups d_in"]) -> Float[Tensor, "R groups d_in"]:
        """Return the rows whose mean outer product, bordered by the homogeneous coordinate, is A."""

    @abstractmethod
    def output_gradients(self, g: Float[Tensor, "N T groups d_out"]) -> Float[Tensor, "R groups d_out"]:
        """Return the rows whose summed outer product is G."""

    @abstractmethod
    def lookups(self, factors: LookupFactors) -> LookupFactors:
        """Return the sparse inputs whose mean squares are the diagonal of A for embeddings."""

    def moments(self, factors: DenseFactors) -> InputMoments:
        """Return the sums that A is made of, chunk by chunk of the examples."""
        return reduce(add, (moments_of_rows(self.inputs(part.inputs)) for part in factors.chunks()))


@dataclass(frozen=True)
class Expand(WeightSharing):
    """Positions are treated as independent examples: A = mean_{n,t} a a^T, G = sum_{n,t} g g^T.

    The same product as KFC's Omega (x) Gamma (Grosse & Martens 2016, eq. 26 and 27), with the factor T in G. Exact for
    deep linear networks whose loss is a sum over positions that do not meet in the network.
    """

    @override
    def inputs(self, a: Float[Tensor, "N T groups d_in"]) -> Float[Tensor, "R groups d_in"]:
        return a.flatten(0, 1)

    @override
    def output_gradients(self, g: Float[Tensor, "N T groups d_out"]) -> Float[Tensor, "R groups d_out"]:
        return g.flatten(0, 1)

    @override
    def lookups(self, factors: LookupFactors) -> LookupFactors:
        return factors

    @override
    def moments(self, factors: DenseFactors) -> InputMoments:
        # a layer's rule may know these sums without the inputs
        return factors.moments()


@dataclass(frozen=True)
class Reduce(WeightSharing):
    """Positions are summed first: A from mean_t a, G from sum_t g.

    Exact for deep linear networks that sum over positions before the loss.
    """

    @override
    def inputs(self, a: Float[Tensor, "N T groups d_in"]) -> Float[Tensor, "R groups d_in"]:
        return a.mean(1)

    @override
    def output_gradients(self, g: Float[Tensor, "N T groups d_out"]) -> Float[Tensor, "R groups d_out"]:
        return g.sum(1)

    @override
    def lookups(self, factors: LookupFactors) -> LookupFactors:
        return factors.averaged()
