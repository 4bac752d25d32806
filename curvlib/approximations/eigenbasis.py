r"""Curvature in the eigenbasis of K-FAC's factors, map by map.

Symbols: N examples, T positions, a (N, T, groups, columns) and g (N, T, groups, d_out) as in :mod:`.kfac`; U_G
(groups, d_out, d_out) and U_A (groups, columns, columns) the eigenvectors of G and A; U = U_G (x) U_A on the rows of
(W b) one after another; s (groups, d_out, columns) the scales, block = U diag(s) U^T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce, singledispatch
from operator import add
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.approximations.assignment import add_to, layer_key
from curvlib.approximations.kfac import KFAC, is_elementwise, keyed, of_map
from curvlib.approximations.layerwise import LayerwiseApproximation
from curvlib.approximations.statistics import Statistics
from curvlib.extensions import AffineMap, DenseFactors, Layer, LayerFactors, LookupFactors, LookupUse, MapFactors
from curvlib.operators import BlockDiagonal, Diagonal, KroneckerEigen, KroneckerEigenStack, LinearOperator, Sum

# (U_G, U_A), U_A None for the identity.
Basis: TypeAlias = tuple[Float[Tensor, "groups d_out d_out"], Float[Tensor, "groups columns columns"] | None]

_SCALES = "scales"


@dataclass(frozen=True, eq=False, repr=False)
class InEigenbasis(LayerwiseApproximation):
    """The diagonal of each layer's block in given bases: statistics that average, as long as the bases stay.

    Args:
        matrix: a curvature matrix with output-space vectors.
        bases: by map.
        factors: K-FAC of the same matrix, whose statistics are made in the same sweep; None for the scales alone.
    """

    bases: Mapping[str, Basis] = field(kw_only=True)
    factors: KFAC | None = field(default=None, kw_only=True)
    counts_positions: ClassVar[bool] = True
    in_eigenbasis: ClassVar[bool] = True

    def accumulate(self, factors: LayerFactors, means: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
        """Add the squares of the per-example gradients in the basis of each map."""
        if self.factors is not None:
            self.factors.accumulate(factors, means, sums)
        if not is_elementwise(factors.layer):
            for part in factors.maps:
                add_to(sums, _key(part.map), squares_in_basis(part, self._basis(part.map)))

    def zeros(self, layer: Layer, like: Tensor) -> Statistics:
        """Return zero scales."""
        statistics = Statistics() if self.factors is None else self.factors.zeros(layer, like)
        if not is_elementwise(layer):
            shapes = {_key(part): (part.groups, part.d_out, part.columns) for part in layer.maps}
            statistics.fill(Statistics(sums={key: like.new_zeros(shape) for key, shape in shapes.items()}))
        return statistics

    def block(self, layer: Layer, statistics: Statistics) -> LinearOperator:
        """Return U diag(s) U^T of one layer, the sum of its maps' where it has several."""
        if is_elementwise(layer):
            return Diagonal(statistics.sums[layer_key(layer, "diagonal")])
        parts = []
        for part in layer.maps:
            product = _operator(self._basis(part), statistics.sums[_key(part)])
            parts.append(product if part.order is None else BlockDiagonal((product,), (part.order,), layer.size))
        return parts[0] if len(parts) == 1 else Sum(tuple(parts))

    def describe_block(self, layer: Layer) -> str:
        """Name the sizes of the bases."""
        return "exact diagonal" if is_elementwise(layer) else " + ".join(map(_description, layer.maps))

    def _basis(self, part: AffineMap) -> Basis:
        if part.name not in self.bases:
            raise ValueError(f"layer {part.name!r} has no eigenbasis: it was not there when the bases were made.")
        return self.bases[part.name]


def eigenbases(layers: tuple[Layer, ...], statistics: Statistics) -> dict[str, Basis]:
    """Return the eigenvectors of K-FAC's factors by map; statistics are to be finite."""
    bases = {}
    for part in (part for layer in layers if not is_elementwise(layer) for part in layer.maps):
        A, G = of_map(part, statistics.means)["A"], of_map(part, statistics.sums)["G"]
        U_A = None if part.sparse else eigenvectors(A.view(part.groups, part.columns, part.columns))
        bases[part.name] = eigenvectors(G.view(part.groups, part.d_out, part.d_out)), U_A
    return bases


def moved_scales(statistics: Statistics, old: Mapping[str, Basis], new: Mapping[str, Basis]) -> Statistics:
    """Return the statistics with the scales of the same blocks in new bases.

    They are s' = diag(U'^T U diag(s) U^T U'): of all matrices that are diagonal in the new basis the nearest one in
    Frobenius norm to the old block.
    """
    sums = dict(statistics.sums)
    for name, (U_G, U_A) in new.items():
        scales = sums[f"{name}|{_SCALES}"]
        old_U_G, old_U_A = old[name]
        scales = (U_G.mT @ old_U_G).square() @ scales
        if U_A is not None and old_U_A is not None:
            scales = scales @ (old_U_A.mT @ U_A).square()
        sums[f"{name}|{_SCALES}"] = scales
    return Statistics(statistics.means, sums, statistics.roots)


def eigenvectors(M: Float[Tensor, "*B d d"]) -> Float[Tensor, "*B d d"]:
    """Return the eigenvectors of symmetric matrices, from float64 where the matrices' own type has not the digits.

    Raises:
        ArithmeticError: the decomposition fails in float64 as well.
    """
    symmetric = (M + M.mT) / 2
    for attempt in dict.fromkeys((symmetric.dtype, torch.float64)):
        try:
            _, U = torch.linalg.eigh(symmetric.to(attempt))
        except torch.linalg.LinAlgError as error:
            reason = str(error)
            continue
        return U.to(M.dtype)
    raise ArithmeticError(f"the eigenvectors of a factor of shape {tuple(M.shape)} were not found: {reason}")


@singledispatch
def squares_in_basis(factors: MapFactors, basis: Basis) -> Float[Tensor, "groups d_out columns"]:
    """Return sum_n (U_G^T (sum_t g_t a_t^T) U_A)^2, entry by entry: the diagonal of U^T C U for one vector."""
    raise TypeError(f"there is no eigenbasis for {type(factors).__name__}.")


@squares_in_basis.register
def _(factors: DenseFactors, basis: Basis) -> Float[Tensor, "groups d_out columns"]:
    # with one position no gradient of an example is made
    numbers = factors.size if factors.g.shape[1] > 1 else factors.map.groups * factors.map.columns
    return reduce(add, (_squares(part, *basis) for part in factors.chunks(numbers)))


@squares_in_basis.register
def _(factors: LookupFactors, basis: Basis) -> Float[Tensor, "1 d_out columns"]:
    U_G = basis[0][0].to(factors.uses[0].g.dtype)
    uses = tuple(LookupUse(use.indices, use.coefficients, use.g @ U_G) for use in factors.uses)
    return LookupFactors(factors.map, uses).squared_gradients().view(1, factors.map.d_out, factors.map.columns)


def _squares(factors: DenseFactors, U_G: Tensor, U_A: Tensor | None) -> Float[Tensor, "groups d_out columns"]:
    assert U_A is not None  # the inputs are dense
    g, a = factors.g, factors.a
    U_G, U_A = U_G.to(g.dtype), U_A.to(g.dtype)
    T, d_out, columns = g.shape[1], g.shape[3], a.shape[3]
    # T (d_out^2 + columns^2) products turn the positions of an example, these its gradient
    if T > 1 and T * (d_out**2 + columns**2) > d_out * columns * (d_out + columns):
        gradients = torch.einsum("ntgo,ntgi->ngoi", g, a)
        return (U_G.mT @ gradients @ U_A).square().sum(0)
    g, a = torch.einsum("ntgo,gop->ntgp", g, U_G), torch.einsum("ntgi,gij->ntgj", a, U_A)
    if T == 1:
        return torch.einsum("ntgo,ntgi->goi", g.square(), a.square())
    return torch.einsum("ntgo,ntgi->ngoi", g, a).square().sum(0)


def _operator(basis: Basis, scales: Float[Tensor, "groups d_out columns"]) -> LinearOperator:
    U_G, U_A = basis
    if len(scales) > 1:
        return KroneckerEigenStack((U_G, U_A), scales)
    return KroneckerEigen((U_G[0], None if U_A is None else U_A[0]), scales[0])


def _description(part: AffineMap) -> str:
    groups = f"{part.groups} times " if part.groups > 1 else ""
    U_A = "identity" if part.sparse else f"{part.columns} x {part.columns}"
    return f"eigenbasis: {groups}U_G {part.d_out} x {part.d_out}, U_A {U_A}, {part.d_out * part.columns} scales"


def _key(part: AffineMap) -> str:
    (key,) = keyed(part, {_SCALES: None})
    return key
