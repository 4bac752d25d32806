"""Cholesky and eigenvalue factorisations of full matrices that try harder before they give up.

A factorisation that fails is tried again in float64, then in float64 on the CPU; the result stays in the precision that
succeeded until the end. A stack of matrices is factorised by batched calls, and tried again as a whole.

Symbols: M (D, D) the matrix, or (B, D, D) a stack; L its Cholesky factor, e and Q its eigenvalues and eigenvectors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvlib.operators import CholeskyInverse, Dense, OperatorError
from curvlib.operators.checks import is_symmetric, symmetrized
from curvlib.solvers.errors import NotPositiveDefiniteError, SolveError

# A full float64 matrix of this size takes 3.2 GB; beyond it a default rule would exhaust memory.
LARGEST_DENSE = 20_000


def damped_cholesky(operator: Dense, damping: float) -> CholeskyInverse:
    r"""Return (M + damping I)^-1 as its Cholesky factor.

    A pivot with L_jj^2 <= D eps (M + damping I)_jj is nothing but rounding: the matrix is then singular in that
    precision although the factorisation has run through. The test does not depend on the scale of the coordinates.

    Raises:
        SolveError: M is not finite or not symmetric.
        NotPositiveDefiniteError: M + damping I is not; the message says which eigenvalue M has and which damping it
            needs.
    """
    M = _symmetrized(operator.matrix, f"The matrix of {operator!r}")
    for attempt in _attempts(M):
        L, definite = _cholesky(attempt, damping)
        if bool(definite):
            return CholeskyInverse(L.to(M.device), operator.dtype)
    raise _not_definite(M, damping, repr(operator))


def damped_inverses(M: Float[Tensor, "B D D"], damping: float, label: str) -> Float[Tensor, "B D D"]:
    """Return (M[b] + damping I)^-1 for every b, explicitly, with the tests of :func:`damped_cholesky`.

    Raises:
        SolveError: as there, for any of the matrices; the message names the matrix and the label of the stack.
    """
    symmetric = is_symmetric(M)
    for attempt in _attempts((M + M.mT) / 2):
        L, definite = _cholesky(attempt, damping)
        # The device is waited for once: a matrix that is not finite has no positive pivots either.
        if bool((definite & symmetric.to(definite.device)).all()):
            return torch.cholesky_inverse(L).to(M)
    raise _not_definite(_symmetrized(M, label), damping, label)


def eigendecomposition(M: Float[Tensor, "*B D D"], label: str) -> tuple[Float[Tensor, "*B D"], Float[Tensor, "*B D D"]]:
    """Return the eigenvalues and the orthogonal matrix of eigenvectors of M = Q diag(e) Q^T, or of each in a stack.

    Eigenvalues at rounding level, abs(e) <= D eps max abs(e) with M's own eps, are set to 0: their sign and size say
    nothing. Larger negative ones are kept.

    Raises:
        SolveError: M is not finite or not symmetric, or every attempt failed; the message begins with the label.
    """
    e, Q = _eigh(_symmetrized(M, label), label)
    e = torch.where(e.abs() <= _rounding(e, M.dtype), 0.0, e)
    return e.to(M), Q.to(M)


def _symmetrized(M: Float[Tensor, "*B D D"], label: str) -> Float[Tensor, "*B D D"]:
    try:
        return symmetrized(M, label)
    except OperatorError as error:
        raise SolveError(str(error)) from error


def _attempts(M: Float[Tensor, "*B D D"]) -> Iterator[Float[Tensor, "*B D D"]]:
    """Yield M in its own precision (float32 at least), in float64, and in float64 on the CPU."""
    # Half precision has no factorisations.
    own = torch.promote_types(M.dtype, torch.float32)
    yield M.to(own)
    if own != torch.float64:
        yield M.double()
    if M.device.type != "cpu":
        yield M.double().cpu()


def _cholesky(M: Float[Tensor, "*B D D"], damping: float) -> tuple[Float[Tensor, "*B D D"], Bool[Tensor, "*B"]]:
    """Return L of M + damping I, and whether all its pivots are positive and more than rounding."""
    shifted = M.clone()
    diagonal = shifted.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(damping)
    L, failure = torch.linalg.cholesky_ex(shifted)
    rounding = M.shape[-1] * torch.finfo(M.dtype).eps * diagonal
    return L, (failure == 0) & (L.diagonal(dim1=-2, dim2=-1).square() > rounding).all(-1)


def _not_definite(M: Float[Tensor, "*B D D"], damping: float, label: str) -> NotPositiveDefiniteError:
    """Return the error for the matrix that needs the largest damping."""
    e = _eigh(M, label)[0]
    needed = (-e.amin(-1)).clamp(min=0.0) + _rounding(e, torch.float64).squeeze(-1)
    worst = int(needed.argmax())
    where = label if M.ndim == 2 else f"matrix {worst} of {label}"
    return NotPositiveDefiniteError(
        f"C + damping I is not positive definite to working precision for {where} with damping = {damping:.3g}: C has "
        f"the eigenvalue {float(e.amin(-1).reshape(-1)[worst]):.3g}. Use a damping above {float(needed.max()):.3g}."
    )


def _eigh(M: Float[Tensor, "*B D D"], label: str) -> tuple[Float[Tensor, "*B D"], Float[Tensor, "*B D D"]]:
    reasons = []
    for attempt in _attempts(M):
        try:
            e, Q = torch.linalg.eigh(attempt)
        except torch.linalg.LinAlgError as error:
            reasons.append(f"{attempt.dtype} on {attempt.device}: {error}")
            continue
        if bool(e.isfinite().all() & Q.isfinite().all()):
            return e, Q
        reasons.append(f"{attempt.dtype} on {attempt.device}: the result is not finite")
    raise SolveError(
        f"{label}: the eigendecomposition of finite symmetric entries of shape {tuple(M.shape)} failed in every "
        f"precision: {'; '.join(reasons)}. Rescale them; they reach {float(M.abs().max()):.3g}."
    )


def _rounding(e: Float[Tensor, "*B D"], dtype: torch.dtype) -> Float[Tensor, "*B 1"]:
    return e.shape[-1] * torch.finfo(dtype).eps * e.abs().amax(-1, keepdim=True)
