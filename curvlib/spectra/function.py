r"""Functions of operators by structure: the same eigenvectors, other eigenvalues.

Symbols: C (D, D) the operator, e its eigenvalues, Q its eigenvectors, f a function of a number.

A rule for your own operator is one function:

    @matrix_function.register(MyOperator)
    def _(operator, function):
        return ...  # a LinearOperator, Q diag(function(e)) Q^T
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import (
    BlockDiagonal,
    CholeskyInverse,
    Dense,
    Diagonal,
    Identity,
    Kronecker,
    KroneckerEigen,
    KroneckerEigenStack,
    KroneckerStack,
    LinearOperator,
    LowRank,
    OperatorError,
    Scaled,
    Shifted,
    Sum,
    full_precision,
)
from curvlib.operators.structure import merge
from curvlib.solvers import SolveError, eigendecompose

EigenvalueFunction: TypeAlias = Callable[[Float[Tensor, " *d"]], Float[Tensor, " *d"]]


class NoStructureError(OperatorError):
    """The structure of an operator does not give its eigenvalues and eigenvectors."""


def matrix_function(operator: LinearOperator, function: EigenvalueFunction) -> LinearOperator:
    r"""Return a function of the operator, by its structure.

    .. math:: f(C) = Q \, \mathrm{diag}(f(e_1), \dots, f(e_D)) \, Q^T

    ====================================  ===================================================================
    Identity, Diagonal                    entry by entry
    Dense, Kronecker, KroneckerStack      through :func:`curvlib.solvers.eigendecompose`
    KroneckerEigen, KroneckerEigenStack   f(e) in the same basis
    CholeskyInverse                       singular value decomposition of its factor
    LowRank                               low rank plus f(d) I, where its diagonal is a multiple d of ones
    BlockDiagonal                         block by block; f(0) on the coordinates without a block
    Scaled, Shifted                       f of the scaled, of the shifted eigenvalues of what is inside
    Sum                                   where its terms merge into one structure
    any other                             refused
    ====================================  ===================================================================

    Args:
        operator: C, symmetric, of any definiteness.
        function: f, takes and gives a tensor of eigenvalues of any shape, entry by entry. It may be called several
            times, with float64 eigenvalues where these are more precise than the vectors.

    Returns:
        An operator whose products are f(C) V.

    Raises:
        TypeError: the operator or the function is of another kind.
        NoStructureError: the structure of C does not give its eigenvectors.
        SolveError: a matrix is not finite or not symmetric, or f of an eigenvalue is not finite.
        ValueError: f gave a tensor of another shape.

    Example:
        >>> matrix_function(Diagonal(torch.tensor([0.0, 1.0])), torch.exp).diagonal()
        tensor([1.0000, 2.7183])
    """
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"matrix_function: operator must be a LinearOperator, got {type(operator).__name__}.")
    if not callable(function):
        raise TypeError(f"matrix_function: function must be callable, got {type(function).__name__}.")

    def checked(e: Float[Tensor, " *d"]) -> Float[Tensor, " *d"]:
        values = function(e)
        if not isinstance(values, Tensor) or values.shape != e.shape:
            came = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"matrix_function: function must return shape {tuple(e.shape)} for such a tensor: {came}.")
        finite = values.isfinite()
        if not bool(finite.all()):
            raise SolveError(
                f"matrix_function: f(e) is not finite at the eigenvalue e = {float(e[~finite][0]):.3g} of "
                f"{operator!r}: use another function, or add a multiple of the identity to the operator."
            )
        return values.to(e.dtype)

    with full_precision(operator.device):
        return _function(operator, checked)


@singledispatch
def _function(operator: LinearOperator, function: EigenvalueFunction) -> LinearOperator:
    raise NoStructureError(
        f"The structure of {operator!r} does not give its eigenvectors. Use curvlib.operators.Dense(C.to_dense()) if "
        f"D = {operator.size} is small enough, or matrix_function.register({type(operator).__name__}); "
        "SpectralDensity estimates traces of functions from products alone."
    )


# Third parties register their rules on the public function.
matrix_function.register = _function.register  # type: ignore[attr-defined]
matrix_function.dispatch = _function.dispatch  # type: ignore[attr-defined]


@_function.register
def _(operator: Identity, function: EigenvalueFunction) -> LinearOperator:
    one = torch.ones(1, dtype=operator.dtype, device=operator.device)
    return Scaled(float(function(one)), operator)


@_function.register
def _(operator: Diagonal, function: EigenvalueFunction) -> LinearOperator:
    return Diagonal(function(operator.values))


@_function.register(KroneckerEigen)
@_function.register(KroneckerEigenStack)
def _(operator: KroneckerEigen | KroneckerEigenStack, function: EigenvalueFunction) -> LinearOperator:
    return operator.map(function)


@_function.register(Dense)
@_function.register(Kronecker)
@_function.register(KroneckerStack)
def _(operator: LinearOperator, function: EigenvalueFunction) -> LinearOperator:
    return _function(eigendecompose(operator), function)


@_function.register
def _(operator: CholeskyInverse, function: EigenvalueFunction) -> LinearOperator:
    # L = Q diag(s) R^T, so (L L^T)^-1 = Q diag(s^-2) Q^T without forming the product, which would square its condition.
    Q, s, _ = torch.linalg.svd(operator.factor)
    e = function(s.square().reciprocal())
    return KroneckerEigen((Q.to(operator.dtype),), e.to(operator.dtype))


@_function.register
def _(operator: LowRank, function: EigenvalueFunction) -> LinearOperator:
    """U diag(w) U^T + d I = Q diag(s) Q^T + d I, so f is Q diag(f(s + d) - f(d)) Q^T + f(d) I."""
    diagonal = operator.diagonal_part
    if operator.factor.shape[1] == 0:
        return Diagonal(function(diagonal.to(operator.dtype)))
    if bool(diagonal.min() != diagonal.max()):
        raise NoStructureError(
            f"The eigenvectors of {operator!r} need a constant diagonal_part, got values from "
            f"{float(diagonal.min()):.3g} to {float(diagonal.max()):.3g}: use Dense(C.to_dense()) if "
            f"D = {operator.size} is small enough."
        )
    d = diagonal[:1].double()
    s, Q = operator.orthogonal_form(torch.ones_like(diagonal))
    inside = function(s + d)
    if len(s) == operator.size:  # no orthogonal complement, at whose eigenvalue d the function may not be defined
        return LowRank(Q, inside, Q.new_zeros(operator.size), operator.dtype)
    outside = function(d)
    return LowRank(Q, inside - outside, outside.expand(operator.size), operator.dtype)


@_function.register
def _(operator: Scaled, function: EigenvalueFunction) -> LinearOperator:
    if operator.factor == 0.0:  # whatever the structure of what is inside
        zero = torch.zeros(1, dtype=operator.dtype, device=operator.device)
        return Scaled(float(function(zero)), Identity(operator.size, operator.dtype, operator.device))
    return _function(operator.operator, lambda e: function(operator.factor * e))


@_function.register
def _(operator: Shifted, function: EigenvalueFunction) -> LinearOperator:
    return _function(operator.operator, lambda e: function(e + operator.shift))


@_function.register
def _(operator: Sum, function: EigenvalueFunction) -> LinearOperator:
    rest, shift = merge(operator)
    if isinstance(rest, Sum):
        kinds = ", ".join(type(term).__name__ for term in rest.terms)
        raise NoStructureError(
            f"The eigenvectors of a sum need terms that merge into one structure, got {kinds} in {operator!r}: use "
            f"Dense(C.to_dense()) if D = {operator.size} is small enough."
        )
    return _function(Shifted(rest, shift), function)


@_function.register
def _(operator: BlockDiagonal, function: EigenvalueFunction) -> LinearOperator:
    result = operator.with_blocks(tuple(_function(block, function) for block in operator.blocks))
    if not len(operator.uncovered()):
        return result
    zero = torch.zeros(1, dtype=operator.dtype, device=operator.device)
    return result.with_rest(float(function(zero)))
