r"""Stacks of equally sized Kronecker products: the curvature of a grouped or depthwise convolution, one block a group.

    KroneckerStack((F_1, ..., F_k)) = diag(C_1, ..., C_B),      C_b = F_1[b] (x) ... (x) F_k[b]

A :class:`BlockDiagonal` of B :class:`Kronecker` products on consecutive coordinates is the same matrix; here each
operation is a few batched calls, however many blocks there are.

Symbols: B blocks; F_i (B, d_i, d_i) the factors, i = 1 .. k; D = B d_1 ... d_k; Q_i (B, d_i, d_i) the eigenvectors of
F_i; e (B, d_1, ..., d_k) the eigenvalues; K columns. A block of columns (D, K) is handled as a tensor X
(B, d_1, ..., d_k, K), which is a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, reduce

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from curvlib.operators.base import LinearOperator
from curvlib.operators.checks import check_alike, check_size, check_tensor, sum_of_logs, symmetrized


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerStack(LinearOperator):
    """Block b is F_1[b] (x) ... (x) F_k[b], in ``torch.kron``'s row-major order; coordinates go block by block.

    As in :class:`Dense`, shapes are checked at once, entries where the factors are factorised.

    Args:
        factors: for each i the symmetric matrices F_i, (B, d_i, d_i), one for each block.

    Example:
        >>> G = torch.tensor([1.0, 10.0]).reshape(2, 1, 1)
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 3.0])).expand(2, 3, 3)
        >>> KroneckerStack((G, A)) @ torch.ones(6)
        tensor([ 1.,  2.,  3., 10., 20., 30.])
    """

    factors: tuple[Float[Tensor, "B d d"], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.factors, tuple) or not self.factors:
            raise TypeError(f"KroneckerStack: factors must be a non-empty tuple, got {type(self.factors).__name__}.")
        for i, factor in enumerate(self.factors):
            name = f"factors[{i}]"
            check_tensor("KroneckerStack", name, factor, ("B", "d", "d"))
            check_tensor("KroneckerStack", name, factor, (self.block_count, factor.shape[1], factor.shape[1]))
            check_alike("KroneckerStack", **{"factors[0]": self.factors[0], name: factor})
        check_size("KroneckerStack", self.size)

    @property
    def block_count(self) -> int:
        """B, the number of blocks."""
        return self.factors[0].shape[0]

    @property
    @override
    def size(self) -> int:
        return reduce(lambda size, factor: size * factor.shape[1], self.factors, self.block_count)

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
        X = V.reshape(self.block_count, *(factor.shape[1] for factor in self.factors), V.shape[1])
        for axis, factor in enumerate(self.factors, start=1):
            X = _matrices_along(factor, X, axis)
        return X.reshape(V.shape)

    @override
    def diagonal(self) -> Float[Tensor, " D"]:
        return outer(map(_diagonals, self.factors)).reshape(-1)

    @override
    def trace(self) -> Float[Tensor, ""]:
        return reduce(torch.mul, (_diagonals(factor).sum(1) for factor in self.factors)).sum()

    @override
    def to_dense(self) -> Float[Tensor, "D D"]:
        return _to_dense(self, self.block_count)

    @override
    def frobenius_norm(self) -> Float[Tensor, ""]:
        return torch.linalg.vector_norm(reduce(torch.mul, map(torch.linalg.matrix_norm, self.factors)))

    @override
    def spectrum(self) -> Float[Tensor, " D"]:
        return outer(self._spectra()).reshape(-1)

    @override
    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        values = self._spectra()
        # log det C_b = sum_i (d_1 ... d_k / d_i) log det F_i[b]; products of small eigenvalues would underflow.
        if damping == 0.0 and all(bool((e > 0.0).all()) for e in values):
            return reduce(torch.add, (e.log().sum() * (self.size / e.numel()) for e in values))
        return sum_of_logs(outer(values).reshape(-1) + damping, repr(self), damping)

    def _spectra(self) -> list[Float[Tensor, "B d"]]:
        named = ((f"factors[{i}] of {self!r}", factor) for i, factor in enumerate(self.factors))
        return [torch.linalg.eigvalsh(symmetrized(factor, label)) for label, factor in named]


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerEigenStack(LinearOperator):
    """Block b is (Q_1[b] (x) ... (x) Q_k[b]) diag(e[b]) (Q_1[b] (x) ... (x) Q_k[b])^T; coordinates go block by block.

    Args:
        bases: for each i the orthogonal matrices Q_i (B, d_i, d_i), their columns the eigenvectors; None is the
            identity. Orthogonality is not checked.
        eigenvalues: e, (B, d_1, ..., d_k). They need not be products.
    """

    bases: tuple[Float[Tensor, "B d d"] | None, ...]
    eigenvalues: Float[Tensor, "B ..."]

    def __post_init__(self) -> None:
        owner, e = "KroneckerEigenStack", self.eigenvalues
        if not isinstance(self.bases, tuple) or not self.bases:
            raise TypeError(f"{owner}: bases must be a non-empty tuple, got {type(self.bases).__name__}.")
        check_tensor(owner, "eigenvalues", e, ("B", *(f"d{i}" for i in range(1, len(self.bases) + 1))))
        for i, basis in enumerate(self.bases):
            if basis is not None:
                check_tensor(owner, f"bases[{i}]", basis, (e.shape[0], e.shape[i + 1], e.shape[i + 1]))
                check_alike(owner, eigenvalues=e, **{f"bases[{i}]": basis})
        check_size(owner, self.size)

    @property
    def block_count(self) -> int:
        """B, the number of blocks."""
        return self.eigenvalues.shape[0]

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

    def map(self, function: Callable[[Float[Tensor, "B ..."]], Float[Tensor, "B ..."]]) -> KroneckerEigenStack:
        """Return the operator with the same eigenvectors and the eigenvalues ``function(e)``: powers, inverses, roots.

        Example:
            >>> C = KroneckerEigenStack((None,), torch.tensor([[4.0, 9.0], [1.0, 25.0]]))
            >>> C.map(torch.sqrt).diagonal()
            tensor([2., 3., 1., 5.])
        """
        return KroneckerEigenStack(self.bases, function(self.eigenvalues))

    def to_eigenbasis(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """Return (Q_1[b] (x) ... (x) Q_k[b])^T V of every block, the coefficients in the order of ``spectrum()``."""
        X = V.reshape(*self.eigenvalues.shape, V.shape[1])
        for axis, Q in enumerate(self.bases, start=1):
            X = X if Q is None else _matrices_along(Q.mT, X, axis)
        return X.reshape(V.shape)

    def from_eigenbasis(self, X: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """Return (Q_1[b] (x) ... (x) Q_k[b]) X of every block, the inverse of :meth:`to_eigenbasis`."""
        V = X.reshape(*self.eigenvalues.shape, X.shape[1])
        for axis, Q in enumerate(self.bases, start=1):
            V = V if Q is None else _matrices_along(Q, V, axis)
        return V.reshape(X.shape)

    @override
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self.from_eigenbasis(self.spectrum().unsqueeze(1) * self.to_eigenbasis(V))

    @override
    def diagonal(self) -> Float[Tensor, " D"]:
        X = self.eigenvalues
        for axis, Q in enumerate(self.bases, start=1):
            X = X if Q is None else _matrices_along(Q.square(), X, axis)
        return X.reshape(-1).clone()

    @override
    def trace(self) -> Float[Tensor, ""]:
        return self.eigenvalues.sum()

    @override
    def to_dense(self) -> Float[Tensor, "D D"]:
        return _to_dense(self, self.block_count)

    @override
    def frobenius_norm(self) -> Float[Tensor, ""]:
        return torch.linalg.vector_norm(self.eigenvalues)

    @override
    def spectrum(self) -> Float[Tensor, " D"]:
        return self.eigenvalues.reshape(-1)


def outer(values: Iterable[Float[Tensor, "B d"]]) -> Float[Tensor, "B ..."]:
    """Return the outer products (B, d_1, ..., d_k) of one vector (d_i,) of each argument, block by block."""
    return reduce(partial(torch.einsum, "b...,bj->b...j"), values)


def _diagonals(matrices: Float[Tensor, "B d d"]) -> Float[Tensor, "B d"]:
    return matrices.diagonal(dim1=1, dim2=2)


def _matrices_along(M: Float[Tensor, "B m d"], X: Float[Tensor, "B ..."], dim: int) -> Float[Tensor, "B ..."]:
    """Return the tensor with M[b] applied to dimension ``dim`` of X[b], dim > 0, for all b at once."""
    shape = (*X.shape[:dim], M.shape[1], *X.shape[dim + 1 :])
    count, left, right = X.shape[0], X.shape[1:dim].numel(), X.shape[dim + 1 :].numel()
    # Without copies where one of the sides is empty.
    if right == 1:
        return (X.reshape(count, left, M.shape[2]) @ M.mT).reshape(shape)
    if left == 1:
        return (M @ X.reshape(count, M.shape[2], right)).reshape(shape)
    return torch.einsum("bij,bljr->blir", M, X.reshape(count, left, M.shape[2], right)).reshape(shape)


def _to_dense(operator: LinearOperator, block_count: int) -> Float[Tensor, "D D"]:
    """Return the matrix by D / B products: the same columns of the identity in all blocks give all blocks at once."""
    n = operator.size // block_count
    unit = torch.eye(n, dtype=operator.dtype, device=operator.device)
    blocks = (operator @ unit.repeat(block_count, 1)).reshape(block_count, n, n)
    result = unit.new_zeros(block_count, n, block_count, n)
    result.diagonal(dim1=0, dim2=2).copy_(blocks.permute(1, 2, 0))
    return result.reshape(operator.shape)
