"""One random operator of every structure, each beside the dense matrix that it must equal, made by another way."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from curvlib.operators import (
    BlockDiagonal,
    CholeskyInverse,
    Dense,
    Diagonal,
    GeneralKroneckerChain,
    Identity,
    Kronecker,
    KroneckerCongruence,
    KroneckerEigen,
    KroneckerEigenStack,
    KroneckerMarkovChain,
    KroneckerMarkovPrecision,
    KroneckerStack,
    LinearOperator,
    LowRank,
    MatrixFree,
    Scaled,
    Shifted,
    Sum,
    SymmetricKroneckerChain,
)
from curvlib.testing import Draw
from curvlib.testing.numbers import draw, lags

__all__ = ["CASES", "Draw", "close", "draw", "subclasses"]


def _matrix_of(parts: list[tuple[Tensor, Tensor]], size: int) -> Tensor:
    """Embed matrices at coordinates, entry by entry."""
    dense = parts[0][0].new_zeros(size, size)
    for matrix, index in parts:
        for i, row in enumerate(index.tolist()):
            for j, column in enumerate(index.tolist()):
                dense[row, column] = matrix[i, j]
    return dense


def _kron(*matrices: Tensor) -> Tensor:
    """Kronecker product by its definition: block (i, j) is a_ij B."""
    result = matrices[0]
    for B in matrices[1:]:
        rows = [torch.cat([result[i, j] * B for j in range(result.shape[1])], dim=1) for i in range(len(result))]
        result = torch.cat(rows)
    return result


def identity(d: Draw):
    n = d.integer(1, 7)
    return Identity(n, d.dtype, d.device), torch.eye(n, dtype=d.dtype, device=d.device)


def diagonal(d: Draw):
    v = d.values(d.integer(1, 7))
    return Diagonal(v), torch.diag(v)


def dense(d: Draw):
    M = d.symmetric(d.integer(1, 7))
    return Dense(M), M


def scaled(d: Draw):
    M, c = d.symmetric(d.integer(1, 6)), d.factor()
    return Scaled(c, Dense(M)), c * M


def scaled_matrix_free(d: Draw):
    M, c = d.symmetric(d.integer(1, 6)), d.factor()
    return Scaled(c, MatrixFree(lambda V: M @ V, len(M), d.dtype, d.device)), c * M


def shifted(d: Draw):
    M, c = d.symmetric(d.integer(1, 6)), d.factor()
    return Shifted(Dense(M), c), M + c * torch.eye(len(M), dtype=d.dtype, device=d.device)


def sum_of_kronecker_and_diagonal(d: Draw):
    G, A = d.symmetric(d.integer(1, 3)), d.symmetric(d.integer(1, 3))
    v = d.values(len(G) * len(A))
    return Kronecker((G, A)) + Diagonal(v), _kron(G, A) + torch.diag(v)


def sum_of_everything_that_merges(d: Draw):
    M, N = d.symmetric(4), d.symmetric(4)
    v, c = d.values(4), d.factor()
    terms = (Dense(M), Scaled(c, Dense(N)), Sum((Diagonal(v), Identity(4, d.dtype, d.device))))
    return Sum(terms), M + c * N + torch.diag(v) + torch.eye(4, dtype=d.dtype, device=d.device)


def sum_of_block_diagonals(d: Draw):
    """Two on the same coordinates, one of them scaled, and a diagonal: one block diagonal, block by block."""
    order, c, v = d.permutation(5), d.factor(), d.values(5)
    M, N, G, A = d.symmetric(2), d.symmetric(2), d.symmetric(1), d.symmetric(3)
    w = d.values(3)
    coordinates = (order[:2], order[2:])
    first = BlockDiagonal((Dense(M), Kronecker((G, A))), coordinates, 5)
    second = BlockDiagonal((Dense(N), Diagonal(w)), coordinates, 5)
    dense = _matrix_of([(M + c * N, order[:2]), (_kron(G, A) + c * torch.diag(w), order[2:])], 5)
    return first + c * second + Diagonal(v), dense + torch.diag(v)


def sum_of_block_diagonals_that_do_not_fit(d: Draw):
    """Other coordinates, and coordinates without a block."""
    M, N, v = d.symmetric(2), d.symmetric(2), d.values(4)
    one, other = d.permutation(4)[:2], d.permutation(4)[:2]
    terms = (BlockDiagonal((Dense(M),), (one,), 4), BlockDiagonal((Dense(N),), (other,), 4), Diagonal(v))
    return Sum(terms), _matrix_of([(M, one)], 4) + _matrix_of([(N, other)], 4) + torch.diag(v)


def sum_of_low_rank_and_identity(d: Draw):
    U, w, v = d.normal(5, 2), d.values(2), d.values(5)
    low_rank = LowRank(U, w, torch.zeros_like(v))
    eye = torch.eye(5, dtype=d.dtype, device=d.device)
    return 2.0 * low_rank + Diagonal(v) + 0.5 * Identity(5, d.dtype, d.device), (
        2.0 * (U * w) @ U.T + torch.diag(v) + 0.5 * eye
    )


def block_diagonal(d: Draw):
    """Blocks of several kinds: consecutive, permuted, and missing coordinates."""
    G, A, M = d.symmetric(2), d.symmetric(d.integer(1, 2)), d.symmetric(d.integer(1, 3))
    v = d.values(2)
    free = MatrixFree(lambda V: M @ V, len(M), d.dtype, d.device)
    blocks = (Kronecker((G, A)), free, Diagonal(v))
    covered = sum(block.size for block in blocks)
    size = covered + d.integer(0, 2)
    order = d.permutation(covered - 2) + 2
    ends = (2 * len(A), covered - 2)
    coordinates = (order[: ends[0]], order[ends[0] : ends[1]], torch.arange(2, device=d.device))
    parts = zip((_kron(G, A), M, torch.diag(v)), coordinates, strict=True)
    return BlockDiagonal(blocks, coordinates, size), _matrix_of(list(parts), size)


def block_diagonal_of_structures(d: Draw):
    M, v = d.symmetric(3), d.values(2)
    coordinates = (torch.tensor([4, 0, 2], device=d.device), torch.tensor([1, 3], device=d.device))
    return BlockDiagonal((Dense(M), Diagonal(v)), coordinates, 5), _matrix_of(
        [(M, coordinates[0]), (torch.diag(v), coordinates[1])], 5
    )


def kronecker(d: Draw):
    G, A = d.symmetric(d.integer(1, 4)), d.symmetric(d.integer(1, 4))
    return Kronecker((G, A)), _kron(G, A)


def kronecker_of_one(d: Draw):
    M = d.symmetric(d.integer(1, 4))
    return Kronecker((M,)), M


def kronecker_of_three(d: Draw):
    v, M, c = d.values(d.integer(1, 3)), d.symmetric(d.integer(1, 3)), d.factor()
    eye = torch.eye(2, dtype=d.dtype, device=d.device)
    factors = (Diagonal(v), Scaled(c, Dense(M)), Identity(2, d.dtype, d.device))
    return Kronecker(factors), _kron(torch.diag(v), c * M, eye)


def kronecker_of_any(d: Draw):
    """Factors without an apply_along of their own, and a nested product."""
    M, G, A = d.symmetric(2), d.symmetric(2), d.symmetric(3)
    c = d.factor()
    factors = (MatrixFree(lambda V: M @ V, 2, d.dtype, d.device), Kronecker((G, Shifted(Dense(A), c))))
    return Kronecker(factors), _kron(M, G, A + c * torch.eye(3, dtype=d.dtype, device=d.device))


def kronecker_eigen(d: Draw):
    sizes = [d.integer(1, 4), d.integer(1, 4)]
    Q, R = (d.orthogonal(n) for n in sizes)
    e, basis = d.values(*sizes), _kron(Q, R)
    return KroneckerEigen((Q, R), e), basis @ torch.diag(e.reshape(-1)) @ basis.T


def kronecker_eigen_with_identity(d: Draw):
    Q, e = d.orthogonal(3), d.values(2, 3, 2)
    eye = torch.eye(2, dtype=d.dtype, device=d.device)
    basis = _kron(eye, Q, eye)
    return KroneckerEigen((None, Q, None), e), basis @ torch.diag(e.reshape(-1)) @ basis.T


def _stacked(blocks: list[Tensor]) -> Tensor:
    n = len(blocks[0])
    ranges = torch.arange(n * len(blocks)).reshape(-1, n)
    return _matrix_of(list(zip(blocks, ranges, strict=True)), n * len(blocks))


def kronecker_stack(d: Draw):
    G, A = (torch.stack([d.symmetric(n) for _ in range(3)]) for n in (d.integer(1, 3), d.integer(1, 3)))
    return KroneckerStack((G, A)), _stacked([_kron(*pair) for pair in zip(G, A, strict=True)])


def kronecker_stack_of_three(d: Draw):
    count = d.integer(1, 2)
    factors = tuple(torch.stack([d.symmetric(n) for _ in range(count)]) for n in (2, d.integer(1, 2), 2))
    return KroneckerStack(factors), _stacked([_kron(*block) for block in zip(*factors, strict=True)])


def kronecker_eigen_stack(d: Draw):
    n, m = d.integer(1, 3), d.integer(1, 3)
    Q, R = (torch.stack([d.orthogonal(size) for _ in range(2)]) for size in (n, m))
    e = d.values(2, n, m)
    bases = [_kron(*pair) for pair in zip(Q, R, strict=True)]
    blocks = [U @ torch.diag(values.reshape(-1)) @ U.T for U, values in zip(bases, e, strict=True)]
    return KroneckerEigenStack((Q, R), e), _stacked(blocks)


def kronecker_eigen_stack_with_identity(d: Draw):
    Q, e = torch.stack([d.orthogonal(3) for _ in range(2)]), d.values(2, 2, 3, 1)
    eye = torch.eye(2, dtype=d.dtype, device=d.device)
    bases = [_kron(eye, basis) for basis in Q]
    blocks = [U @ torch.diag(values.reshape(-1)) @ U.T for U, values in zip(bases, e, strict=True)]
    return KroneckerEigenStack((None, Q, None), e), _stacked(blocks)


def kronecker_congruence(d: Draw):
    M, L, e = d.normal(2, d.integer(1, 3)), d.normal(3, d.integer(1, 3)), d.values(2, 3)
    N = _kron(M, L)
    return KroneckerCongruence(((M, L),), e), N.T @ torch.diag(e.reshape(-1)) @ N


def kronecker_congruence_of_two_terms(d: Draw):
    n, m = d.integer(1, 3), d.integer(1, 3)
    terms = tuple((d.normal(n, 2), d.normal(1, 1), d.normal(m, 3)) for _ in range(2))
    N, e = _kron(*terms[0]) + _kron(*terms[1]), d.values(n, 1, m)
    return KroneckerCongruence(terms, e), N.T @ torch.diag(e.reshape(-1)) @ N


def symmetric_kronecker_chain(d: Draw):
    """Positive semi-definite whatever was asked for; the antisymmetric parts of the lag-1 moments do not count."""
    sizes, r = (d.integer(1, 3), d.integer(1, 3)), torch.tensor([1.0, 0.7, 0.5, 0.3, 0.1], dtype=torch.float64)
    moments, skew = [], []
    for n in sizes:
        Q, B = d.orthogonal(n), d.normal(n, n)
        moments.append(lags(d.normal(n, n), Q @ torch.diag(d.normal(n).tanh()) @ Q.T, 4))
        skew.append(B - B.T)
    M = _kron(moments[0][0], moments[1][0])
    for i in range(1, 5):
        M = M + 2.0 * float(r[i]) * _kron(moments[0][i], moments[1][i])
    lag0, lag1 = tuple(F[0] for F in moments), tuple(F[1] + K for F, K in zip(moments, skew, strict=True))
    return SymmetricKroneckerChain(lag0, lag1, r.to(d.device, d.dtype)), M


def general_kronecker_chain(d: Draw):
    """Positive semi-definite whatever was asked for."""
    sizes = (d.integer(1, 3), d.integer(1, 3))
    moments = []
    for n in sizes:
        B = d.normal(n, n)
        # 0.64^120 < 1e-23
        moments.append(lags(d.normal(n, n), 0.8 * B / torch.linalg.matrix_norm(B, 2), 120))
    M = _kron(moments[0][0], moments[1][0])
    for G, A in zip(moments[0][1:], moments[1][1:], strict=True):
        M = M + _kron(G, A) + _kron(G.T, A.T)
    return GeneralKroneckerChain(tuple(F[0] for F in moments), tuple(F[1] for F in moments)), M


def _markov_moments(d: Draw, sizes: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The blocks on the diagonal and beside it of a covariance of vectors of these sizes."""
    B = d.normal(sum(sizes), sum(sizes) + 2)
    rows = B.split(sizes)
    return [X @ X.T for X in rows], [X @ Y.T for X, Y in pairwise(rows)]


def markov_covariance(moments: list[Tensor], cross: list[Tensor]) -> Tensor:
    """C_ij = C_{i,i+1} C_{i+1,i+1}^-1 C_{i+1,j} for i < j: x_i given x_{i+1} knows no more of x_j."""
    rows = [[moments[-1]]]
    for F, E, following in zip(reversed(moments[:-1]), reversed(cross), reversed(moments[1:]), strict=True):
        sizes = [block.shape[1] for block in rows[0]]
        right = (E @ torch.linalg.pinv(following, hermitian=True) @ torch.cat(rows[0], dim=1)).split(sizes, dim=1)
        rows = [[F, *right], *([part.T, *row] for part, row in zip(right, rows, strict=True))]
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def kronecker_markov_chain(d: Draw):
    """Positive semi-definite whatever was asked for."""
    length = d.integer(1, 3)
    G, A = (_markov_moments(d, [d.integer(1, 3) for _ in range(length)]) for _ in range(2))
    moments, cross = (tuple(zip(*pair, strict=True)) for pair in zip(G, A, strict=True))
    return KroneckerMarkovChain(moments, cross), markov_covariance(
        [_kron(*pair) for pair in moments], [_kron(*pair) for pair in cross]
    )


def kronecker_markov_precision(d: Draw):
    sizes = [(d.integer(1, 3), d.integer(1, 3)) for _ in range(d.integer(1, 3))]
    blocks = [d.symmetric(n * m) for n, m in sizes]
    transitions = tuple((d.normal(n, k), d.normal(m, j)) for (n, m), (k, j) in pairwise(sizes))
    middle, start = torch.block_diag(*blocks), 0
    Xi = torch.eye(len(middle), dtype=d.dtype, device=d.device)
    for block, pair in zip(blocks, transitions, strict=False):
        Psi, end = _kron(*pair), start + len(block)
        Xi[start:end, end : end + Psi.shape[1]] = -Psi
        start = end
    return KroneckerMarkovPrecision(tuple(map(Dense, blocks)), transitions), Xi.T @ middle @ Xi


def low_rank(d: Draw):
    n, r = d.integer(1, 6), d.integer(0, 7)
    U, w, v = d.normal(n, r), d.values(r), d.values(n)
    return LowRank(U, w, v), U @ torch.diag(w) @ U.T + torch.diag(v)


def low_rank_alone(d: Draw):
    n, r = d.integer(1, 6), d.integer(1, 7)
    U, w = d.normal(n, r), d.values(r)
    return LowRank(U, w, torch.zeros_like(U[:, 0])), U @ torch.diag(w) @ U.T


def matrix_free(d: Draw):
    M = d.symmetric(d.integer(1, 6))
    return MatrixFree(lambda V: M @ V, len(M), d.dtype, d.device), M


def matrix_free_with_form(d: Draw):
    M = d.symmetric(d.integer(1, 6))
    return MatrixFree(lambda V: M @ V, len(M), d.dtype, d.device, quadratic_form=lambda V: V.T @ M @ V), M


def cholesky_inverse(d: Draw):
    B = d.normal(d.integer(1, 5), 6)
    M = B @ B.T + torch.eye(len(B), dtype=d.dtype, device=d.device)
    return CholeskyInverse(torch.linalg.cholesky(M)), torch.linalg.inv(M)


CASES: dict[str, Callable[[Draw], tuple[LinearOperator, Tensor]]] = {
    case.__name__: case
    for case in (
        identity,
        diagonal,
        dense,
        scaled,
        scaled_matrix_free,
        shifted,
        sum_of_kronecker_and_diagonal,
        sum_of_everything_that_merges,
        sum_of_block_diagonals,
        sum_of_block_diagonals_that_do_not_fit,
        sum_of_low_rank_and_identity,
        block_diagonal,
        block_diagonal_of_structures,
        kronecker,
        kronecker_of_one,
        kronecker_of_three,
        kronecker_of_any,
        kronecker_eigen,
        kronecker_eigen_with_identity,
        kronecker_stack,
        kronecker_stack_of_three,
        kronecker_eigen_stack,
        kronecker_eigen_stack_with_identity,
        kronecker_congruence,
        kronecker_congruence_of_two_terms,
        symmetric_kronecker_chain,
        general_kronecker_chain,
        kronecker_markov_chain,
        kronecker_markov_precision,
        low_rank,
        low_rank_alone,
        matrix_free,
        matrix_free_with_form,
        cholesky_inverse,
    )
}


def close(actual: Tensor, expected: Tensor, scale: Tensor | float = 1.0, tolerance: float = 1e-12) -> None:
    """Assert that the difference is small beside the largest entry of ``expected`` and beside ``scale``."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.dtype == expected.dtype
    assert actual.device.type == expected.device.type
    bound = tolerance * max(float(torch.as_tensor(scale)), float(expected.abs().max()) if expected.numel() else 0.0)
    difference = float((actual - expected).abs().max()) if expected.numel() else 0.0
    assert difference <= bound, f"difference {difference:.3g} above {bound:.3g}\n{actual}\n{expected}"


def subclasses(cls: type = LinearOperator) -> set[type]:
    """Return every operator class that curvlib.operators defines."""
    found = {cls} | {sub for child in cls.__subclasses__() for sub in subclasses(child)}
    return {sub for sub in found - {LinearOperator} if sub.__module__.startswith("curvlib.operators")}
