"""How the positions of a layer that uses its weight several times enter K-FAC's factors (Eschenhagen et al. 2023).

Symbols: N examples, T positions, a (N, T, groups, columns) inputs with the homogeneous coordinate, g (N, T, groups,
d_out) output gradients. Positions that an example does not have, and those behind the last one that the outputs depend
on (padding), enter nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce, singledispatch
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from curvlib.extensions import (
    AffineMap,
    DenseFactors,
    InputMoments,
    LookupFactors,
    MapFactors,
    grouped_gram,
    moments_of_rows,
)
from curvlib.operators import Diagonal, Kronecker, KroneckerStack, LinearOperator


class WeightSharing(ABC):
    """Which statistics of the inputs and of the output gradients of an affine map are kept, and the block they make.

    With T = 1 all strategies agree.
    """

    @abstractmethod
    def input_statistics(self, factors: MapFactors) -> dict[str, Tensor]:
        """Return averages over the examples, which average over batches as well."""

    @abstractmethod
    def output_statistics(self, factors: MapFactors) -> dict[str, Tensor]:
        """Return sums over the examples for one vector v_k, on the objective's scale."""

    @abstractmethod
    def zeros(self, part: AffineMap, like: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return both kinds for a map that the outputs do not depend on; ``like`` gives dtype and device."""

    @abstractmethod
    def block(self, part: AffineMap, means: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> LinearOperator:
        """Return the operator on the rows of (W b) one after another."""

    @abstractmethod
    def description(self, part: AffineMap) -> str:
        """Return a few words on the block."""


class OneProduct(WeightSharing):
    """A block that is one Kronecker product for each group of the map."""

    @abstractmethod
    def inputs(self, factors: MapFactors) -> tuple[Tensor, Tensor]:
        """Return A times a number of positions, and that number."""

    @abstractmethod
    def output_moment(self, factors: MapFactors) -> Float[Tensor, "groups d_out d_out"]:
        """Return G for one vector."""

    @override
    def input_statistics(self, factors: MapFactors) -> dict[str, Tensor]:
        A, positions = self.inputs(factors)
        return {"A": A, "positions": positions}

    @override
    def output_statistics(self, factors: MapFactors) -> dict[str, Tensor]:
        G = self.output_moment(factors)
        return {"G": G.squeeze(0) if factors.map.groups == 1 else G}

    @override
    def zeros(self, part: AffineMap, like: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        stack = (part.groups,) if part.groups > 1 else ()
        inputs = (part.columns,) if part.sparse else (part.columns, part.columns)
        A, G = like.new_zeros(*stack, *inputs), like.new_zeros(*stack, part.d_out, part.d_out)
        return {"A": A, "positions": like.new_zeros(())}, {"G": G}

    @override
    def block(self, part: AffineMap, means: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> LinearOperator:
        A, G = means["A"], sums["G"]
        # A's scale matters in the product alone: the smaller factor is divided, as that makes a copy
        if part.columns > part.d_out:
            G = per_position(G, means["positions"])
        else:
            A = per_position(A, means["positions"])
        return KroneckerStack((G, A)) if part.groups > 1 else Kronecker((G, Diagonal(A) if part.sparse else A))

    @override
    def description(self, part: AffineMap) -> str:
        A = f"diagonal of {part.columns}" if part.sparse else f"{part.columns} x {part.columns}"
        groups = f"{part.groups} times " if part.groups > 1 else ""
        return f"Kronecker: {groups}A {A}, G {part.d_out} x {part.d_out}"


@dataclass(frozen=True)
class Expand(OneProduct):
    """Positions are treated as independent examples: A = mean_{n,t} a a^T, G = sum_{n,t} g g^T.

    The same product as KFC's Omega (x) Gamma (Grosse & Martens 2016, eq. 26 and 27), with the factor T in G. Exact for
    deep linear networks whose loss is a sum over positions that do not meet in the network.
    """

    @override
    def inputs(self, factors: MapFactors) -> tuple[Tensor, Tensor]:
        return _input_sum(factors).div_(factors.examples), factors.mean_positions

    @override
    def output_moment(self, factors: MapFactors) -> Float[Tensor, "groups d_out d_out"]:
        return factors.output_moment()


@dataclass(frozen=True)
class Independent(Expand):
    """Time steps of a recurrent layer are independent: E[T] A_0 (x) G_0 (Martens, Ba & Johnson 2018, sec. 3.5.1).

    The same block as :class:`Expand`: the factor E[T] is in the sum over positions of its G.
    """


@dataclass(frozen=True)
class Reduce(OneProduct):
    """Positions are summed first: A from mean_t a, G from sum_t g.

    Exact for deep linear networks that sum over positions before the loss.
    """

    @override
    def inputs(self, factors: MapFactors) -> tuple[Tensor, Tensor]:
        one = factors.g.new_ones(())
        # an example without positions is no example
        return _reduced_inputs(factors), one if factors.lengths is None else (factors.lengths > 0).to(one).mean()

    @override
    def output_moment(self, factors: MapFactors) -> Float[Tensor, "groups d_out d_out"]:
        return grouped_gram(factors.g.sum(1))


def per_position(total: Tensor, positions: Float[Tensor, ""]) -> Tensor:
    """Return a sum over positions divided by their number; zero where there is none."""
    return total / torch.where(positions > 0, positions, 1.0)


@singledispatch
def _input_sum(factors: MapFactors) -> Tensor:
    """Return the sum of a a^T over all examples and positions; its diagonal for sparse inputs."""
    raise TypeError(f"K-FAC has no input factor for {type(factors).__name__}.")


@_input_sum.register
def _(factors: DenseFactors) -> Float[Tensor, "*groups columns columns"]:
    if not factors.map.weight:
        ones = factors.g.new_ones(*((factors.map.groups,) if factors.map.groups > 1 else ()), 1, 1)
        return ones * factors.mean_positions * factors.examples
    return _bordered(factors, factors.moments())


@_input_sum.register
def _(factors: LookupFactors) -> Float[Tensor, " columns"]:
    return factors.squared_inputs()


@singledispatch
def _reduced_inputs(factors: MapFactors) -> Tensor:
    """Return the mean over the examples of the outer product of mean_t a; its diagonal for sparse inputs."""
    raise TypeError(f"K-FAC has no input factor for {type(factors).__name__}.")


@_reduced_inputs.register
def _(factors: DenseFactors) -> Float[Tensor, "*groups columns columns"]:
    if not factors.map.weight:
        return factors.g.new_ones(*((factors.map.groups,) if factors.map.groups > 1 else ()), 1, 1)
    moments = reduce(add, (moments_of_rows(_mean_over_positions(part)) for part in factors.chunks()))
    return _bordered(factors, moments).div_(factors.examples)


@_reduced_inputs.register
def _(factors: LookupFactors) -> Float[Tensor, " columns"]:
    return factors.averaged().squared_inputs() / factors.examples


def _mean_over_positions(factors: DenseFactors) -> Float[Tensor, "N groups d_in"]:
    if factors.lengths is None:
        return factors.inputs.mean(1)
    return factors.inputs.sum(1) / factors.lengths.clamp(min=1).view(-1, 1, 1)


def _bordered(factors: DenseFactors, moments: InputMoments) -> Float[Tensor, "*groups columns columns"]:
    """Return sum a a^T with the border of the homogeneous coordinate from the rows' sum (no copy of the inputs)."""
    A = moments.outer
    if factors.map.bias:
        total = moments.total.unsqueeze(1)
        count = torch.as_tensor(moments.count, dtype=total.dtype, device=total.device).expand(len(total), 1, 1)
        A = torch.cat([torch.cat([A, total.mT], 2), torch.cat([total, count], 2)], 1)
    return A.squeeze(0) if factors.map.groups == 1 else A
