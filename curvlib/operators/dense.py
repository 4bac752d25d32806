"""Operators that hold one full matrix, or its Cholesky factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from curvlib.operators.base import LinearOperator
from curvlib.operators.checks import check_size, check_tensor, sum_of_logs, symmetrized


@dataclass(frozen=True, eq=False, repr=False)
class Dense(LinearOperator):
    """A symmetric matrix, kept in full.

    The shape is checked at once. Finite and symmetric entries are checked by :meth:`symmetric_matrix`, where the
    matrix is factorised: a check at every construction would read the matrix once more and wait for the device.

    Args:
        matrix: (D, D), symmetric up to rounding.
    """

    matrix: Float[Tensor, "D D"]

    def __post_init__(self) -> None:
        check_tensor("Dense", "matrix", self.matrix, ("D", "D"))
        check_size("Dense", self.matrix.shape[0])
        if self.matrix.shape[0] != self.matrix.shape[1]:
            raise ValueError(f"Dense: matrix must be square, got shape {tuple(self.matrix.shape)}.")

    @property
    @override
    def size(self) -> int:
        return self.matrix.shape[0]

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.matrix.device

    def symmetric_matrix(self) -> Float[Tensor, "D D"]:
        """Return (M + M^T) / 2 after checking that M is finite, and symmetric up to rounding.

        Rounding means max |M - M^T| <= tol max |M| with tol = max(1e-5, sqrt(eps)).

        Raises:
            OperatorError: an entry is not finite, or the matrix is not symmetric.
        """
        return symmetrized(self.matrix, f"The matrix of {self!r}")

    @override
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self.matrix @ V

    @override
    def apply_along(self, X: Float[Tensor, " ..."], dim: int) -> Float[Tensor, " ..."]:
        return matrix_along(self.matrix, X, dim)

    @override
    def diagonal(self) -> Float[Tensor, " D"]:
        return self.matrix.diagonal().clone()

    @override
    def trace(self) -> Float[Tensor, ""]:
        return self.matrix.diagonal().sum()

    @override
    def to_dense(self) -> Float[Tensor, "D D"]:
        return self.matrix.clone()  # an operator never changes, whatever the caller does with the result

    @override
    def frobenius_norm(self) -> Float[Tensor, ""]:
        return torch.linalg.matrix_norm(self.matrix)

    @override
    def spectrum(self) -> Float[Tensor, " D"]:
        return torch.linalg.eigvalsh(self.symmetric_matrix())

    @override
    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        shifted = self.symmetric_matrix()
        shifted.diagonal().add_(damping)
        factor, failure = torch.linalg.cholesky_ex(shifted)
        # Eigenvalues say by how much the matrix is not positive definite; they also serve where only rounding failed.
        if int(failure):
            values = torch.linalg.eigvalsh(self.symmetric_matrix().double()) + damping
            return sum_of_logs(values, repr(self), damping).to(self.dtype)
        return 2.0 * factor.diagonal().log().sum()


@dataclass(frozen=True, eq=False, repr=False)
class CholeskyInverse(LinearOperator):
    """(L L^T)^-1, applied by two triangular solves.

    Args:
        factor: L, (D, D), lower triangular with a positive diagonal.
        dtype: type of the vectors; None is L's own. L may be more precise than the vectors: products are then computed
            in L's precision and rounded at the end.
    """

    factor: Float[Tensor, "D D"]
    dtype: torch.dtype | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_tensor("CholeskyInverse", "factor", self.factor, ("D", "D"))
        if self.factor.shape[0] != self.factor.shape[1]:
            raise ValueError(f"CholeskyInverse: factor must be square, got shape {tuple(self.factor.shape)}.")
        object.__setattr__(self, "dtype", self.dtype or self.factor.dtype)

    @property
    @override
    def size(self) -> int:
        return self.factor.shape[0]

    @property
    @override
    def device(self) -> torch.device:
        return self.factor.device

    @override
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return torch.cholesky_solve(V.to(self.factor.dtype), self.factor).to(self.dtype)

    @override
    def to_dense(self) -> Float[Tensor, "D D"]:
        return torch.cholesky_inverse(self.factor).to(self.dtype)

    @override
    def diagonal(self) -> Float[Tensor, " D"]:
        return self.to_dense().diagonal().clone()

    @override
    def frobenius_norm(self) -> Float[Tensor, ""]:
        return torch.linalg.matrix_norm(self.to_dense())

    @override
    def spectrum(self) -> Float[Tensor, " D"]:
        return torch.linalg.svdvals(self.factor).square().reciprocal().to(self.dtype)

    @override
    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        if damping != 0.0:
            return super().logdet(damping)
        return (-2.0 * self.factor.diagonal().log().sum()).to(self.dtype)


def matrix_along(M: Float[Tensor, "m d"], X: Float[Tensor, " ..."], dim: int) -> Float[Tensor, " ..."]:
    """Return the tensor with M applied to dimension ``dim`` of X: Y[.., i, ..] = sum_j M[i, j] X[.., j, ..].

    For contiguous X no copy is made: the product is M X, X M^T, or a batch of M X.
    """
    dim = dim % X.ndim
    shape = (*X.shape[:dim], M.shape[0], *X.shape[dim + 1 :])
    left, right = X.shape[:dim].numel(), X.shape[dim + 1 :].numel()
    if right == 1:
        return (X.reshape(left, M.shape[1]) @ M.T).reshape(shape)
    if left == 1:
        return (M @ X.reshape(M.shape[1], right)).reshape(shape)
    return torch.matmul(M, X.reshape(left, M.shape[1], right)).reshape(shape)
