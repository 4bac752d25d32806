r"""Kronecker products, in ``torch.kron``'s row-major order.

For a layer whose weight is (d_out, d_in), flattened row-major, the block with input factor A (d_in, d_in) and output
factor G (d_out, d_out) is ``Kronecker((G, A))``, which is A (x) G in the column-stacking convention of the papers:

    Kronecker((G, A)) @ V.reshape(-1) = (G V A^T).reshape(-1)      V (d_out, d_in)      (vec trick; A is symmetric)

Symbols: F_i (d_i, d_i) the factors, i = 1 .. k; D = d_1 ... d_k; Q_i the eigenvectors of F_i; e (d_1, ..., d_k) the
eigenvalues; K columns. A block of columns (D, K) is handled as a tensor X (K, d_1, ..., d_k), a view for K = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from curvlib.operators.base import LinearOperator, check_operators
from curvlib.operators.checks import check_alike, check_tensor, sum_of_logs
from curvlib.operators.dense import Dense, matrix_along


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Kronecker(LinearOperator):
    """F_1 (x) F_2 (x) ... (x) F_k, never formed: a product costs D (d_1 + ... + d_k) multiplications.

    Args:
        factors: operators, or symmetric matrices, which become :class:`Dense`.

    Example:
        >>> G, A = torch.eye(2), torch.diag(torch.tensor([1.0, 2.0, 3.0]))
        >>> (Kronecker((G, A)) @ torch.ones(6)).reshape(2, 3)
        tensor([[1., 2., 3.],
                [1., 2., 3.]])
    """

    factors: tuple[LinearOperator, ...]

    def __init__(self, factors: Sequence[LinearOperator | Float[Tensor, "d d"]]) -> None:
        wrapped = tuple(Dense(factor) if isinstance(factor, Tensor) else factor for factor in factors)
        check_operators("Kronecker", "factors", wrapped)
        object.__setattr__(self, "factors", wrapped)

    @property
    @override
    def size(self) -> int:
        return prod(factor.size for factor in self.factors)

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.factors[0].dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.factors[0].device

    @override
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        X = V.T.reshape(V.shape[1], *(factor.size for factor in self.factors))
        for axis, factor in enumerate(self.factors, start=1):
            X = factor.apply_along(X, axis)
        return X.reshape(V.shape[1], self.size).T

    @override
    def diagonal(self) -> Float[Tensor, " D"]:
        return reduce(_kron, (factor.diagonal() for factor in self.factors))

    @override
    def trace(self) -> Float[Tensor, ""]:
        return reduce(torch.mul, (factor.trace() for factor in self.factors))

    @override
    def to_dense(self) -> Float[Tensor, "D D"]:
        return reduce(_kron, (factor.to_dense() for factor in self.factors))

    @override
    def frobenius_norm(self) -> Float[Tensor, ""]:
        return reduce(torch.mul, (factor.frobenius_norm() for factor in self.factors))

    @override
    def spectrum(self) -> Float[Tensor, " D"]:
        return reduce(_kron, (factor.spectrum() for factor in self.factors))

    @override
    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        values = [factor.spectrum() for factor in self.factors]
        # log det = sum_i (D / d_i) log det F_i; products of small eigenvalues would underflow.
        if damping == 0.0 and all(bool((e > 0.0).all()) for e in values):
            return reduce(torch.add, (e.log().sum() * (self.size / len(e)) for e in values))
        return sum_of_logs(reduce(_kron, values) + damping, repr(self), damping)


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerEigen(LinearOperator):
    """(Q_1 (x) ... (x) Q_k) diag(e) (Q_1 (x) ... (x) Q_k)^T; with one basis an ordinary eigendecomposition.

    Eigenvalues need not be products: EKFAC re-estimates them one by one (George et al. 2018).

    Args:
        bases: for each factor the orthogonal matrix Q_i (d_i, d_i), its columns the eigenvectors; None is the identity.
            Orthogonality is not checked.
        eigenvalues: e, (d_1, ..., d_k).
    """

    bases: tuple[Float[Tensor, "d d"] | None, ...]
    eigenvalues: Float[Tensor, " ..."]

    def __post_init__(self) -> None:
        e = self.eigenvalues
        if not isinstance(self.bases, tuple) or not self.bases:
            raise TypeError(f"KroneckerEigen: bases must be a non-empty tuple, got {type(self.bases).__name__}.")
        check_tensor("KroneckerEigen", "eigenvalues", e, tuple(f"d{i}" for i in range(1, len(self.bases) + 1)))
        for i, basis in enumerate(self.bases):
            if basis is not None:
                check_tensor("KroneckerEigen", f"bases[{i}]", basis, (e.shape[i], e.shape[i]))
                check_alike("KroneckerEigen", eigenvalues=e, **{f"bases[{i}]": basis})

    @property
    @override
    def size(self) -> int:
        return self.eigenvalues.numel()

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.eigenvalues.dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.eigenvalues.device

    def map(self, function: Callable[[Float[Tensor, " ..."]], Float[Tensor, " ..."]]) -> KroneckerEigen:
        """Return the operator with the same eigenvectors and the eigenvalues ``function(e)``: powers, inverses, roots.

        Example:
            >>> C = KroneckerEigen((None,), torch.tensor([4.0, 9.0]))
            >>> C.map(torch.sqrt).eigenvalues
            tensor([2., 3.])
        """
        return KroneckerEigen(self.bases, function(self.eigenvalues))

    def to_eigenbasis(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """Return (Q_1 (x) ... (x) Q_k)^T V, the coefficients in the order of ``spectrum()``."""
        X = V.T.reshape(V.shape[1], *self.eigenvalues.shape)
        for axis, Q in enumerate(self.bases, start=1):
            X = X if Q is None else matrix_along(Q.T, X, axis)
        return X.reshape(V.shape[1], self.size).T

    def from_eigenbasis(self, X: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """Return (Q_1 (x) ... (x) Q_k) X, the inverse of :meth:`to_eigenbasis`."""
        V = X.T.reshape(X.shape[1], *self.eigenvalues.shape)
        for axis, Q in enumerate(self.bases, start=1):
            V = V if Q is None else matrix_along(Q, V, axis)
        return V.reshape(X.shape[1], self.size).T

    @override
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self.from_eigenbasis(self.spectrum().unsqueeze(1) * self.to_eigenbasis(V))

    @override
    def diagonal(self) -> Float[Tensor, " D"]:
        X = self.eigenvalues
        for axis, Q in enumerate(self.bases):
            X = X if Q is None else matrix_along(Q.square(), X, axis)
        return X.reshape(-1).clone()

    @override
    def trace(self) -> Float[Tensor, ""]:
        return self.eigenvalues.sum()

    @override
    def frobenius_norm(self) -> Float[Tensor, ""]:
        return torch.linalg.vector_norm(self.eigenvalues)

    @override
    def spectrum(self) -> Float[Tensor, " D"]:
        return self.eigenvalues.reshape(-1)


def _kron(first: Float[Tensor, " ..."], second: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    # torch.kron fails for some column-major arguments, such as inverses by Cholesky.
    return torch.kron(first.contiguous(), second.contiguous())
