"""Cholesky and eigenvalue factorisations of one full matrix that try harder before they give up.

A factorisation that fails is tried again in float64, then in float64 on the CPU; the result stays in the precision that
succeeded until the end. Symbols: M (D, D) the matrix, L its Cholesky factor, e and Q its eigenvalues and eigenvectors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import CholeskyInverse, Dense, OperatorError
from curvlib.solvers.errors import SolveError

# A full float64 matrix of this size takes 3.2 GB; beyond it a default rule would exhaust memory.
LARGEST_DENSE = 20_000


def damped_cholesky(operator: Dense, damping: float) -> CholeskyInverse:
    r"""Return (M + damping I)^-1 as its Cholesky factor.

    A pivot with L_jj^2 <= D eps (M + damping I)_jj is nothing but rounding: the matrix is then singular in that
    precision although the factorisation has run through. The test does not depend on the scale of the coordinates.

    Raises:
        SolveError: M is not finite, not symmetric, or M + damping I is not positive definite; the message says which
            eigenvalue M has and which damping it needs.
    """
    M = _symmetric(operator)
    for attempt in _attempts(M):
        shifted = attempt.clone()
        shifted.diagonal().add_(damping)
        L, failure = torch.linalg.cholesky_ex(shifted)
        rounding = len(M) * torch.finfo(L.dtype).eps * shifted.diagonal()
        if not int(failure) and bool((L.diagonal().square() > rounding).all()):
            return CholeskyInverse(L.to(M.device), operator.dtype)
    e = _eigh(M)[0]
    smallest, noise = float(e.min()), _rounding(e, torch.float64)
    raise SolveError(
        f"C + damping I is not positive definite to working precision for {operator!r} with damping = {damping:.3g}: C "
        f"has the eigenvalue {smallest:.3g}. Use a damping above {max(-smallest, 0.0) + noise:.3g}."
    )


def eigendecomposition(operator: Dense) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    """Return the eigenvalues and the orthogonal matrix of eigenvectors of M = Q diag(e) Q^T.

    Eigenvalues at rounding level, abs(e) <= D eps max abs(e) with M's own eps, are set to 0: their sign and size say
    nothing. Larger negative ones are kept.

    Raises:
        SolveError: M is not finite or not symmetric, or every attempt failed.
    """
    M = _symmetric(operator)
    e, Q = _eigh(M)
    e = torch.where(e.abs() <= _rounding(e, operator.dtype), 0.0, e)
    return e.to(M), Q.to(M)


def _symmetric(operator: Dense) -> Float[Tensor, "D D"]:
    try:
        return operator.symmetric_matrix()
    except OperatorError as error:
        raise SolveError(str(error)) from error


def _attempts(M: Float[Tensor, "D D"]) -> Iterator[Float[Tensor, "D D"]]:
    """Yield M in its own precision (float32 at least), in float64, and in float64 on the CPU."""
    # Half precision has no factorisations.
    own = torch.promote_types(M.dtype, torch.float32)
    yield M.to(own)
    if own != torch.float64:
        yield M.double()
    if M.device.type != "cpu":
        yield M.double().cpu()


def _eigh(M: Float[Tensor, "D D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    reasons = []
    for attempt in _attempts(M):
        try:
            e, Q = torch.linalg.eigh(attempt)
        except torch.linalg.LinAlgError as error:
            reasons.append(f"{attempt.dtype} on {attempt.device}: {error}")
            continue
        if bool(e.isfinite().all()) and bool(Q.isfinite().all()):
            return e, Q
        reasons.append(f"{attempt.dtype} on {attempt.device}: the result is not finite")
    raise SolveError(
        f"The eigendecomposition of a finite symmetric ({len(M)}, {len(M)}) matrix failed in every precision: "
        f"{'; '.join(reasons)}. Rescale the matrix; its entries reach {float(M.abs().max()):.3g}."
    )


def _rounding(e: Float[Tensor, " D"], dtype: torch.dtype) -> float:
    return len(e) * torch.finfo(dtype).eps * float(e.abs().max())
