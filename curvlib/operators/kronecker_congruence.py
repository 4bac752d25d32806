r"""Congruences with sums of Kronecker products: diagonal in bases that need not be orthogonal.

    KroneckerCongruence(terms, e) = N^T diag(e) N,      N = sum_t M_t1 (x) ... (x) M_tk

Symbols: M_ti (r_i, d_i) matrix i of term t, i = 1 .. k; e (r_1, ..., r_k) the values; D = d_1 ... d_k; K columns. A
block of columns (D, K) is handled as a tensor X (K, d_1, ..., d_k), a view for K = 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import prod
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from curvlib.operators.base import LinearOperator
from curvlib.operators.checks import check_alike, check_size, check_tensor
from curvlib.operators.dense import matrix_along
from curvlib.operators.precision import full_precision


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerCongruence(LinearOperator):
    """N^T diag(e) N with N = sum_t M_t1 (x) ... (x) M_tk; a product costs a Kronecker product's two for each term.

    Two Kronecker products can be made diagonal together in this form, and with two terms it is the inverse of a
    :class:`GeneralKroneckerChain`.

    Args:
        terms: for each term its matrices M_ti (r_i, d_i), not checked to be of full rank.
        values: e, (r_1, ..., r_k), of any sign.

    Example:
        >>> M = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
        >>> KroneckerCongruence(((M,),), torch.tensor([1.0, 3.0])).to_dense()
        tensor([[13.,  6.],
                [ 6.,  3.]])
    """

    terms: tuple[tuple[Float[Tensor, "r d"], ...], ...]
    values: Float[Tensor, " ..."]

    def __post_init__(self) -> None:
        owner, e = "KroneckerCongruence", self.values
        if not isinstance(self.terms, tuple) or not self.terms:
            raise TypeError(f"{owner}: terms must be a non-empty tuple, got {type(self.terms).__name__}.")
        for t, term in enumerate(self.terms):
            if not isinstance(term, tuple) or not term or len(term) != len(self.terms[0]):
                raise TypeError(f"{owner}: terms[{t}] must be a tuple of as many matrices as terms[0], got {term!r}.")
        check_tensor(owner, "values", e, tuple(f"r{i}" for i in range(1, len(self.terms[0]) + 1)))
        for t, term in enumerate(self.terms):
            for i, M in enumerate(term):
                width = "d" if t == 0 else self.terms[0][i].shape[1]
                check_tensor(owner, f"terms[{t}][{i}]", M, (e.shape[i], width))
                check_alike(owner, values=e, **{f"terms[{t}][{i}]": M})
        check_size(owner, self.size)

    @property
    @override
    def size(self) -> int:
        return prod(M.shape[1] for M in self.terms[0])

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.values.device

    @override
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        X = V.T.reshape(V.shape[1], *(M.shape[1] for M in self.terms[0]))
        Y = self.values * reduce(add, (matrices_along(term, X, 1) for term in self.terms))
        Z = reduce(add, (matrices_along((M.T for M in term), Y, 1) for term in self.terms))
        return Z.reshape(V.shape[1], self.size).T

    @override
    def diagonal(self) -> Float[Tensor, " D"]:
        with full_precision(self.device):
            parts = [matrices_along((M.T for M in pair), self.values) for pair in self._products_of_terms()]
        return reduce(add, parts).reshape(-1)

    def _products_of_terms(self) -> Iterator[tuple[Float[Tensor, "r d"], ...]]:
        """Yield the entrywise products M_si * M_ti, i = 1 .. k, for all pairs (s, t): their sum is N * N."""
        for first, second in product(self.terms, repeat=2):
            yield tuple(M * L for M, L in zip(first, second, strict=True))


def matrices_along(
    matrices: Iterable[Float[Tensor, "m d"]], X: Float[Tensor, " ..."], start: int = 0
) -> Float[Tensor, " ..."]:
    """Return the tensor with the matrices applied to dimensions start, start + 1, ... of X."""
    for dim, M in enumerate(matrices, start):
        X = matrix_along(M, X, dim)
    return X
