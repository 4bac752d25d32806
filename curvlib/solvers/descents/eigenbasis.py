"""A gradient in the eigenvectors of an operator, by the operator's structure and never by a dense matrix beside it.

Symbols: C = Q diag(e) Q^T the operator, g (D,) the gradient, c = Q^T g its coefficients, n <= D of them: for a low-rank
operator all directions of one eigenvalue that are orthogonal to g need no coefficient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Identity,
    KroneckerEigen,
    KroneckerEigenStack,
    LinearOperator,
    LowRank,
    Scaled,
    Shifted,
)
from curvlib.solvers.errors import SolveError
from curvlib.solvers.factorization import LARGEST_DENSE
from curvlib.solvers.spectral import eigendecompose


@dataclass(frozen=True, kw_only=True, eq=False)
class Coefficients:
    """What a function of C does to g.

    Attributes:
        eigenvalues: e (n,), float64.
        gradient: c (n,), float64.
        back: turns coefficients (n,) into a vector (D,) of g's dtype.
    """

    eigenvalues: Float[Tensor, " n"]
    gradient: Float[Tensor, " n"]
    back: Callable[[Float[Tensor, " n"]], Float[Tensor, " D"]]


def coefficients(operator: LinearOperator, gradient: Float[Tensor, " D"]) -> Coefficients:
    """Return the eigenvalues of C and the gradient in its eigenvectors, after :func:`eigendecompose`.

    A rule for your own operator is registered with ``coefficients.register``, as for ``eigendecompose``.

    Raises:
        SolveError: the operator has no structure that gives its eigenvectors and is too large to be made dense, or it
            is not finite.
    """
    return _coefficients(eigendecompose(operator), gradient)


@singledispatch
def _coefficients(operator: LinearOperator, gradient: Float[Tensor, " D"]) -> Coefficients:
    if operator.size > LARGEST_DENSE:
        raise SolveError(
            f"{operator!r} has no structure that gives its eigenvectors, and would need the whole matrix; that is "
            f"refused above D = {LARGEST_DENSE}. Use Steihaug or TwoDimensionalSubspace."
        )
    return _coefficients(eigendecompose(Dense(operator.to_dense())), gradient)


coefficients.register = _coefficients.register  # type: ignore[attr-defined]


@_coefficients.register(Identity)
@_coefficients.register(Diagonal)
def _(operator: LinearOperator, gradient: Float[Tensor, " D"]) -> Coefficients:
    return Coefficients(
        eigenvalues=operator.diagonal().double(), gradient=gradient.double(), back=lambda c: c.to(gradient.dtype)
    )


@_coefficients.register(KroneckerEigen)
@_coefficients.register(KroneckerEigenStack)
def _(operator: KroneckerEigen | KroneckerEigenStack, gradient: Float[Tensor, " D"]) -> Coefficients:
    return Coefficients(
        eigenvalues=operator.spectrum().double(),
        gradient=operator.to_eigenbasis(gradient.unsqueeze(1)).squeeze(1).double(),
        back=lambda c: operator.from_eigenbasis(c.to(gradient.dtype).unsqueeze(1)).squeeze(1),
    )


@_coefficients.register
def _(operator: Scaled, gradient: Float[Tensor, " D"]) -> Coefficients:
    inner = _coefficients(operator.operator, gradient)
    return replace(inner, eigenvalues=operator.factor * inner.eigenvalues)


@_coefficients.register
def _(operator: Shifted, gradient: Float[Tensor, " D"]) -> Coefficients:
    inner = _coefficients(operator.operator, gradient)
    return replace(inner, eigenvalues=inner.eigenvalues + operator.shift)


@_coefficients.register
def _(operator: BlockDiagonal, gradient: Float[Tensor, " D"]) -> Coefficients:
    rest = operator.uncovered()
    parts = [
        _coefficients(block, gradient[index])
        for block, index in zip(operator.blocks, operator.coordinates, strict=True)
    ]
    zero = torch.zeros(len(rest), dtype=torch.float64, device=gradient.device)

    def back(c: Float[Tensor, " n"]) -> Float[Tensor, " D"]:
        *inside, outside = c.split([*(len(part.gradient) for part in parts), len(rest)])
        result = torch.zeros_like(gradient)
        for part, index, piece in zip(parts, operator.coordinates, inside, strict=True):
            result[index] = part.back(piece)
        result[rest] = outside.to(result.dtype)
        return result

    return Coefficients(
        eigenvalues=torch.cat([*(part.eigenvalues for part in parts), zero]),
        gradient=torch.cat([*(part.gradient for part in parts), gradient[rest].double()]),
        back=back,
    )


@_coefficients.register
def _(operator: LowRank, gradient: Float[Tensor, " D"]) -> Coefficients:
    """One coefficient for the whole orthogonal complement of the factor, along what g has there."""
    d = operator.diagonal_part
    if bool(d.min() != d.max()):
        return _coefficients.dispatch(LinearOperator)(operator, gradient)
    s, Q = operator.orthogonal_form(torch.ones_like(d))
    g = gradient.double()
    c = Q.T @ g
    if Q.shape[1] < operator.size:
        outside = g - Q @ c
        outside = outside - Q @ (Q.T @ outside)
        length = torch.linalg.vector_norm(outside)
        # Where g has nothing there, any unit vector of the complement stands for it: that of the coordinate that the
        # factor covers least.
        covered = Q.square().sum(1)
        other = -(Q @ Q[covered.argmin()])
        other[covered.argmin()] += 1.0
        nothing = length <= torch.finfo(gradient.dtype).eps * torch.linalg.vector_norm(g)
        direction = torch.where(nothing, other / torch.linalg.vector_norm(other), outside / length)
        s, Q = torch.cat([s, s.new_zeros(1)]), torch.cat([Q, direction.unsqueeze(1)], dim=1)
        c = torch.cat([c, torch.where(nothing, 0.0, length).reshape(1)])
    return Coefficients(eigenvalues=s + d.double()[0], gradient=c, back=lambda c: (Q @ c).to(gradient.dtype))
