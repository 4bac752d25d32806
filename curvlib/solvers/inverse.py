"""Inverses by structure: one short rule for each kind of operator.

Symbols: C (D, D) the operator, lambda the damping, e eigenvalues, Q eigenvectors.

A rule for your own operator is one function:

    @damped_inverse.register(MyOperator)
    def _(operator, damping):
        return ...  # a LinearOperator, (C + damping I)^-1

A rule is called with a finite damping >= 0. Without one, conjugate gradients do it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from math import isfinite

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
    Scaled,
    Shifted,
    full_precision,
)
from curvlib.operators.structure import absorb_factor, add_shift
from curvlib.solvers.cg import CG
from curvlib.solvers.damping_scale import checked_damping
from curvlib.solvers.errors import NotPositiveDefiniteError, SolveError
from curvlib.solvers.factorization import LARGEST_DENSE, damped_cholesky
from curvlib.solvers.solution import RaiseAtLimit, ResidualTest
from curvlib.solvers.spectral import eigendecompose


def damped_inverse(operator: LinearOperator, damping: float) -> LinearOperator:
    r"""Return the exact inverse of the damped operator, by its structure.

    .. math:: (C + \lambda I)^{-1}

    ====================  ===================================================================================
    Identity, Diagonal    entry by entry
    Dense                 Cholesky
    BlockDiagonal         block by block; 1 / lambda on the coordinates without a block
    Kronecker             eigendecomposition of each factor
    KroneckerStack        the same, of all blocks at once
    KroneckerEigen        1 / (e + lambda) in the same basis
    KroneckerEigenStack   1 / (e + lambda) in the same basis
    ...KroneckerChain,    without damping by structure; else conjugate gradients, preconditioned with the
    KroneckerMarkovChain  chain that FactoredTikhonov damps
    LowRank               Woodbury: again low rank plus diagonal, with the orthogonal complement
    Scaled, Shifted, Sum  rule of what is inside, where the factor, the shift or the diagonals can be moved; two
                          Kronecker products in the basis that makes both diagonal, without damping, else conjugate
                          gradients preconditioned with that; so is a Kronecker product beside a diagonal
    any other             conjugate gradients anew at each product, to a relative residual of about 1e-10 in
                          float64 and 1e-5 in float32
    ====================  ===================================================================================

    Args:
        operator: C, symmetric; C + damping I must be positive definite.
        damping: lambda >= 0, in the units of C.

    Returns:
        An operator whose products are (C + lambda I)^-1 V.

    Raises:
        TypeError: the operator or the damping is of another kind.
        ValueError: the damping is negative or not finite.
        NotPositiveDefiniteError: C + lambda I is not positive definite. The default rule raises it at the product.
        SolveError: C is not finite, or conjugate gradients do not converge, as the default rule finds at the product.

    Example:
        >>> damped_inverse(Diagonal(torch.tensor([1.0, 3.0])), 1.0) @ torch.ones(2)
        tensor([0.5000, 0.2500])
    """
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"damped_inverse: operator must be a LinearOperator, got {type(operator).__name__}.")
    with full_precision(operator.device):
        return _inverse(operator, checked_damping(damping))


@singledispatch
def _inverse(operator: LinearOperator, damping: float) -> LinearOperator:
    return inverse_by_cg(operator, damping)


def inverse_by_cg(
    operator: LinearOperator, damping: float, preconditioner: LinearOperator | None = None
) -> LinearOperator:
    """Return the inverse by conjugate gradients to a tight tolerance, which raises SolveError where they fail."""
    # Ten times the eps that the residual can reach, and ten times the D iterations of exact arithmetic.
    tolerance = 1e-10 if operator.dtype == torch.float64 else 1e-5
    method = CG(
        max_iterations=10 * operator.size + 100,
        stop=ResidualTest(relative=tolerance),
        preconditioner=preconditioner,
        on_limit=RaiseAtLimit(),
    )
    return method(operator, damping)


def inverse_by_blocks(
    operator: BlockDiagonal, damping: float, inverse: Callable[[LinearOperator, float], LinearOperator]
) -> LinearOperator:
    """Return ``inverse(block, damping)`` for each block and 1 / damping on the coordinates without a block.

    Raises:
        SolveError: a block's inverse raised it, or the damping is 0 and a coordinate has no block.
    """
    uncovered = len(operator.uncovered())
    if uncovered and damping == 0.0:
        raise SolveError(
            f"{operator!r} has zero curvature on {uncovered} coordinates that belong to no block: use a damping > 0."
        )
    inverses = []
    for i, block in enumerate(operator.blocks):
        try:
            inverses.append(inverse(block, damping))
        except SolveError as error:
            raise error.within(f"Block {i} of {operator!r}") from error
    result = operator.with_blocks(tuple(inverses))
    return result.with_rest(1.0 / damping) if uncovered else result


# Third parties register their rules on the public functions.
damped_inverse.register = _inverse.register  # type: ignore[attr-defined]
damped_inverse.dispatch = _inverse.dispatch  # type: ignore[attr-defined]


@_inverse.register(Identity)
@_inverse.register(Diagonal)
def _(operator: LinearOperator, damping: float) -> LinearOperator:
    return Diagonal(_reciprocal(operator.diagonal(), operator, damping))


@_inverse.register
def _(operator: Dense, damping: float) -> LinearOperator:
    return damped_cholesky(operator, damping)


@_inverse.register
def _(operator: CholeskyInverse, damping: float) -> LinearOperator:
    return _inverse(Dense(operator.to_dense()), damping)


@_inverse.register(KroneckerEigen)
@_inverse.register(KroneckerEigenStack)
def _(operator: KroneckerEigen | KroneckerEigenStack, damping: float) -> LinearOperator:
    return operator.map(lambda e: _reciprocal(e, operator, damping))


@_inverse.register(Kronecker)
@_inverse.register(KroneckerStack)
def _(operator: LinearOperator, damping: float) -> LinearOperator:
    return _inverse(eigendecompose(operator), damping)


@_inverse.register
def _(operator: Scaled, damping: float) -> LinearOperator:
    factor = operator.factor
    if factor == 0.0:
        return _inverse(Diagonal(torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)), damping)
    # (c C + lambda I)^-1 = (C + lambda / c I)^-1 / c; only c > 0 leaves a damping.
    if factor > 0.0 and isfinite(damping / factor) and isfinite(1.0 / factor):
        return Scaled(1.0 / factor, _inverse(operator.operator, damping / factor))
    absorbed = absorb_factor(operator.operator, factor)
    return _by_default(operator, damping) if absorbed is None else _inverse(absorbed, damping)


@_inverse.register
def _(operator: Shifted, damping: float) -> LinearOperator:
    total = damping + operator.shift
    if total >= 0.0:
        return _inverse(operator.operator, total)
    joined = add_shift(operator.operator, total)
    return _by_default(operator, damping) if joined is None else _inverse(joined, 0.0)


@_inverse.register
def _(operator: BlockDiagonal, damping: float) -> LinearOperator:
    return inverse_by_blocks(operator, damping, _inverse)


@_inverse.register
def _(operator: LowRank, damping: float) -> LinearOperator:
    r"""Woodbury, in the orthonormal basis Q of E^-1/2 U diag(w) U^T E^-1/2 = Q diag(s) Q^T, E = diag(d) + lambda I.

    (C + lambda I)^-1 = E^-1 - F diag(s / (1 + s)) F^T, F = E^-1/2 Q. No system with the (r, r) Gram matrix of U is
    solved, whose condition is that of U squared. Within the range of U a product is a difference that loses
    log10(1 + s) digits, and that is where gradients lie: the result therefore holds float64 numbers, whatever its
    vectors are.
    """
    if not all(bool(part.isfinite().all()) for part in (operator.factor, operator.weights, operator.diagonal_part)):
        raise SolveError(f"{operator!r} holds entries that are not finite: skip this update.")
    E = operator.diagonal_part.double() + damping
    if operator.size <= operator.factor.shape[1] and operator.size <= LARGEST_DENSE:
        # There is no complement whose 1 / lambda would hide what the difference loses.
        return _inverse(Dense(operator.to_dense()), damping)
    if not bool((E > 0.0).all()):
        return _inverse(_dense_if_rank_covers(operator, E), damping)
    s, Q = operator.orthogonal_form(E)
    if bool((1.0 + s <= len(s) * torch.finfo(s.dtype).eps).any()):
        raise NotPositiveDefiniteError(
            f"C + damping I is not positive definite for {operator!r} with damping = {damping:.3g}: relative to its "
            f"diagonal it has the eigenvalue {float(1.0 + s.min()):.3g}. Use a larger damping."
        )
    return LowRank(Q / E.sqrt().unsqueeze(1), -s / (1.0 + s), E.reciprocal(), operator.dtype)


def _dense_if_rank_covers(operator: LowRank, E: Float[Tensor, " D"]) -> Dense:
    try:
        operator.check_rank_covers(E)
    except ArithmeticError as error:
        raise SolveError(str(error)) from error
    if operator.size > LARGEST_DENSE:
        raise SolveError(f"{operator!r} needs a damping that makes diagonal_part + damping positive, to stay low rank.")
    return Dense(operator.to_dense())


def _by_default(operator: LinearOperator, damping: float) -> LinearOperator:
    return _inverse.dispatch(LinearOperator)(operator, damping)


def _reciprocal(e: Float[Tensor, " ..."], operator: LinearOperator, damping: float) -> Float[Tensor, " ..."]:
    """Return 1 / (e + damping).

    Raises:
        SolveError: a sum is not finite, or not positive.
    """
    shifted = e + damping
    # Below the normal numbers the reciprocal overflows. One check for both, so that a device is waited for once.
    if bool((e.isfinite() & (shifted >= torch.finfo(e.dtype).tiny)).all()):
        return shifted.reciprocal()
    smallest, largest = (float(end) for end in e.aminmax())
    if not (isfinite(smallest) and isfinite(largest)):
        raise SolveError(
            f"{operator!r} has curvatures that are not finite ({smallest} .. {largest}): skip this update."
        )
    raise NotPositiveDefiniteError(
        f"C + damping I is not positive definite for {operator!r} with damping = {damping:.3g}: C has the "
        f"eigenvalue {smallest:.3g}. Use a damping above {abs(min(smallest, 0.0)):.3g}."
    )
