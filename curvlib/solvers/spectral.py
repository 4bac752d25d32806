"""Eigendecompositions by structure: one short rule for each kind of operator.

Symbols: C (D, D) the operator, e its eigenvalues, Q (D, D) its eigenvectors.
"""

from __future__ import annotations

from functools import partial, reduce, singledispatch

import torch

from curvlib.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Identity,
    Kronecker,
    KroneckerEigen,
    KroneckerEigenStack,
    KroneckerStack,
    LinearOperator,
    LowRank,
    Scaled,
    Shifted,
    Sum,
    full_precision,
)
from curvlib.operators.kronecker_stack import outer
from curvlib.operators.structure import absorb_factor, add_shift, merge
from curvlib.solvers.errors import SolveError
from curvlib.solvers.factorization import LARGEST_DENSE, eigendecomposition


def eigendecompose(operator: LinearOperator) -> LinearOperator:
    r"""Return an operator equal to C for which the inverse with a new damping costs O(D).

    .. math:: C = Q \, \mathrm{diag}(e) \, Q^T

    Dense and Kronecker become :class:`KroneckerEigen`, KroneckerStack :class:`KroneckerEigenStack`; Diagonal, Identity
    and these two stay; Scaled, Shifted, Sum and BlockDiagonal hand on; any other operator is made dense first (D
    products, D^3 operations). LowRank with r < D stays, since its Woodbury inverse costs O(D r^2) with any damping.
    Eigenvalues at rounding level are set to 0.

    Args:
        operator: C, symmetric, of any definiteness.

    Returns:
        The same operator in another form.

    Raises:
        TypeError: the operator is of another kind.
        SolveError: a matrix is not finite or not symmetric, or D is above 20,000 without a structure.

    Example:
        >>> C = eigendecompose(Dense(torch.tensor([[2.0, 0.0], [0.0, 4.0]])))
        >>> C.eigenvalues
        tensor([2., 4.])
    """
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"eigendecompose: operator must be a LinearOperator, got {type(operator).__name__}.")
    with full_precision(operator.device):
        return _eigen(operator)


@singledispatch
def _eigen(operator: LinearOperator) -> LinearOperator:
    if operator.size > LARGEST_DENSE:
        raise SolveError(
            f"eigendecompose has no rule for {operator!r} and would need the whole matrix; that is refused above "
            f"D = {LARGEST_DENSE}. Register a rule with eigendecompose.register({type(operator).__name__}), or use CG."
        )
    return _eigen(Dense(operator.to_dense()))


eigendecompose.register = _eigen.register  # type: ignore[attr-defined]
eigendecompose.dispatch = _eigen.dispatch  # type: ignore[attr-defined]


@_eigen.register(Identity)
@_eigen.register(Diagonal)
@_eigen.register(KroneckerEigen)
@_eigen.register(KroneckerEigenStack)
def _(operator: LinearOperator) -> LinearOperator:
    return operator


@_eigen.register
def _(operator: LowRank) -> LinearOperator:
    covers = operator.size <= min(operator.factor.shape[1], LARGEST_DENSE)
    return _eigen(Dense(operator.to_dense())) if covers else operator


@_eigen.register
def _(operator: Dense) -> LinearOperator:
    e, Q = eigendecomposition(operator.matrix, f"The matrix of {operator!r}")
    return KroneckerEigen((Q,), e)


@_eigen.register
def _(operator: Kronecker) -> LinearOperator:
    spectra = [_spectrum(_eigen(factor)) for factor in operator.factors]
    bases = tuple(basis for spectrum in spectra for basis in spectrum.bases)
    eigenvalues = reduce(partial(torch.tensordot, dims=0), [spectrum.eigenvalues for spectrum in spectra])
    return KroneckerEigen(bases, eigenvalues)


@_eigen.register
def _(operator: KroneckerStack) -> LinearOperator:
    pairs = [eigendecomposition(F, f"factors[{i}] of {operator!r}") for i, F in enumerate(operator.factors)]
    return KroneckerEigenStack(tuple(Q for _, Q in pairs), outer(e for e, _ in pairs))


@_eigen.register
def _(operator: Scaled) -> LinearOperator:
    inner = _eigen(operator.operator)
    return absorb_factor(inner, operator.factor) or Scaled(operator.factor, inner)


@_eigen.register
def _(operator: Shifted) -> LinearOperator:
    inner = _eigen(operator.operator)
    return add_shift(inner, operator.shift) or Shifted(inner, operator.shift)


@_eigen.register
def _(operator: Sum) -> LinearOperator:
    rest, shift = merge(operator)
    if isinstance(rest, Sum):
        return _eigen.dispatch(LinearOperator)(operator)
    return _eigen(Shifted(rest, shift))


@_eigen.register
def _(operator: BlockDiagonal) -> LinearOperator:
    return operator.with_blocks(tuple(_eigen(block) for block in operator.blocks))


@singledispatch
def _spectrum(operator: LinearOperator) -> KroneckerEigen:
    """Return one Kronecker factor as bases and eigenvalues."""
    e, Q = eigendecomposition(operator.to_dense(), f"The matrix of {operator!r}")
    return KroneckerEigen((Q,), e)


@_spectrum.register
def _(operator: KroneckerEigen) -> KroneckerEigen:
    return operator


@_spectrum.register(Identity)
@_spectrum.register(Diagonal)
def _(operator: LinearOperator) -> KroneckerEigen:
    return KroneckerEigen((None,), operator.diagonal())
