"""Ways to a matrix of low rank: all of the rows that it is made of, or a few directions found by products.

Symbols: C (D, D) the matrix, r rank, l >= r columns of a sketch, m steps, U (D, r) and w (r,) with C ~ U diag(w) U^T.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.approximations.example_gradients import example_gradients
from curvlib.approximations.loss_curvature import LossCurvature
from curvlib.matrices import CurvatureMatrix
from curvlib.operators import LinearOperator

Factors = tuple[Float[Tensor, "D r"], Float[Tensor, " r"]]


class LowRankMethod(ABC):
    """Which factor of low rank stands for a curvature matrix."""

    @abstractmethod
    def factors(self, curvature: LossCurvature, generator: torch.Generator | None) -> Factors:
        """Return U (D, r) and w (r,) with U diag(w) U^T near the matrix; its columns need not be orthogonal."""

    def check(self, matrix: CurvatureMatrix) -> None:  # noqa: B027 - most methods take every matrix
        """Raise TypeError for a matrix that the method cannot treat."""


@dataclass(frozen=True, kw_only=True)
class FullRank(LowRankMethod):
    """U = V, the columns J_n^T v_k of all examples n and vectors v_k: V V^T is the matrix itself, of rank r <= N K.

    K vectors an example: as many as it has outputs for ``GGN()`` (or fewer), one for ``EmpiricalFisher()``, the draws
    for ``Fisher()``. The layers' gradients come from their inputs and output gradients; parameters outside every layer
    take a backward pass an example and vector.

    Args:
        memory_limit: bytes that V may take; an inverse takes about four times as many more.
    """

    memory_limit: int = 2**30

    def __post_init__(self) -> None:
        _check_count(self, "memory_limit", self.memory_limit, 1)

    def check(self, matrix: CurvatureMatrix) -> None:
        """Refuse a matrix without vectors."""
        _check_vectors(self, matrix)

    def factors(self, curvature: LossCurvature, generator: torch.Generator | None) -> Factors:
        """Return V and ones.

        Raises:
            MemoryError: V would be larger than ``memory_limit``.
        """
        layout, blocks, columns = curvature.objective.layout, [], 0
        for evaluation, share, draws in curvature.parts():
            vectors = []
            for vector in curvature.matrix.vectors(evaluation, draws):
                vectors.append(vector)
                columns += evaluation.examples
                self._check_memory(columns, layout.size, layout.dtype.itemsize)
            blocks += [share.sqrt() * example_gradients(evaluation, vector) for vector in vectors]
        V = torch.cat(blocks).T
        return V, V.new_ones(V.shape[1])

    def _check_memory(self, columns: int, size: int, itemsize: int) -> None:
        if columns * size * itemsize > self.memory_limit:
            raise MemoryError(
                f"FullRank needs at least {columns} columns of {size} numbers, {columns * size * itemsize:,} bytes, "
                f"above memory_limit = {self.memory_limit:,}: give fewer examples, EmpiricalFisher() or "
                "Fisher(samples=1), a larger memory_limit, or RandomizedSketch(rank) or LanczosTruncation(rank)."
            )


@dataclass(frozen=True)
class RandomizedSketch(LowRankMethod):
    """U diag(w) U^T, the r largest eigenvalues (by size) of Q Q^T C Q Q^T, Q a basis of C^(q + 1) Omega, Omega random.

    Takes q + 2 products with blocks of l = r + oversampling vectors, and so q + 2 runs through a loader. The expected
    error falls to that of the best approximation of rank r as q grows. Also for indefinite matrices.

    Source: Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.3. Departure: of the l eigenpairs, r are kept.

    Args:
        rank: r, at least 1.
        oversampling: l - r.
        power_iterations: q.
    """

    rank: int
    oversampling: int = 10
    power_iterations: int = 2

    def __post_init__(self) -> None:
        _check_count(self, "rank", self.rank, 1)
        _check_count(self, "oversampling", self.oversampling, 0)
        _check_count(self, "power_iterations", self.power_iterations, 0)

    def factors(self, curvature: LossCurvature, generator: torch.Generator | None) -> Factors:
        """Return the leading Ritz pairs in the sketched space."""
        C = curvature.operator()
        Q = _basis(C @ _normal(C, min(C.size, self.rank + self.oversampling), generator))
        for _ in range(self.power_iterations):
            Q = _basis(C @ Q)
        return _leading(Q, Q.T @ (C @ Q), self.rank)


@dataclass(frozen=True)
class Nystrom(LowRankMethod):
    """U diag(w) U^T from (C Q)(Q^T C Q)^-1 (C Q)^T, Q a random basis: one product with a block of l vectors.

    It never exceeds C: the remainder is positive semi-definite. For positive semi-definite matrices.

    Source: Frangella, Tropp & Udell 2023, algorithm 2.1; Halko, Martinsson & Tropp 2011, algorithm 5.5. The shift that
    keeps the small matrix positive definite is made and taken off again in float64.

    Args:
        rank: r, at least 1.
        oversampling: l - r.
    """

    rank: int
    oversampling: int = 10

    def __post_init__(self) -> None:
        _check_count(self, "rank", self.rank, 1)
        _check_count(self, "oversampling", self.oversampling, 0)

    def check(self, matrix: CurvatureMatrix) -> None:
        """Refuse a matrix that may be indefinite."""
        _check_vectors(self, matrix)

    def factors(self, curvature: LossCurvature, generator: torch.Generator | None) -> Factors:
        """Return the eigenpairs of the Nystrom approximation.

        Raises:
            ArithmeticError: the products are not those of a positive semi-definite matrix.
        """
        C = curvature.operator()
        Q = _basis(_normal(C, min(C.size, self.rank + self.oversampling), generator))
        Y = (C @ Q).double()
        # rounding of the products, in their own precision, is what could make Q^T Y indefinite
        shift = 8.0 * torch.finfo(C.dtype).eps * torch.linalg.matrix_norm(Y)
        Q = Q.double()
        Y = torch.where(shift > 0.0, Y + shift * Q, Q)  # the zero matrix has any eigenvectors
        core = Q.T @ Y
        L, failure = torch.linalg.cholesky_ex(0.5 * (core + core.T))
        if int(failure):
            raise ArithmeticError(
                f"{self!r} needs a positive semi-definite matrix, but products with {curvature.matrix!r} have a "
                "negative eigenvalue or are not finite: use RandomizedSketch or LanczosTruncation."
            )
        U, S, _ = torch.linalg.svd(torch.linalg.solve_triangular(L, Y.T, upper=False).T, full_matrices=False)
        w = torch.where(shift > 0.0, (S.square() - shift).clamp(min=0.0), 0.0)
        return U[:, : self.rank].to(C.dtype), w[: self.rank].to(C.dtype)


@dataclass(frozen=True)
class LanczosTruncation(LowRankMethod):
    """U diag(w) U^T, the r largest Ritz values (by size) and their vectors after m steps of Lanczos.

    One product a step, with full reorthogonalisation, done twice. Where the Krylov space is exhausted, as for a matrix
    of low rank or with equal eigenvalues, it goes on with a new random direction. Also for indefinite matrices. Over a
    loader every step is a run through it: :class:`RandomizedSketch` needs fewer.

    Source: Golub & Van Loan, Matrix Computations, sec. 10.3.

    Args:
        rank: r, at least 1.
        steps: m >= r; None takes 2 r + 10.
    """

    rank: int
    steps: int | None = None

    def __post_init__(self) -> None:
        _check_count(self, "rank", self.rank, 1)
        if self.steps is not None:
            _check_count(self, "steps", self.steps, self.rank)

    def factors(self, curvature: LossCurvature, generator: torch.Generator | None) -> Factors:
        """Return the leading Ritz pairs in the Krylov space."""
        C = curvature.operator()
        m = min(C.size, self.steps or 2 * self.rank + 10)
        # fresh directions are drawn beforehand: whether one is needed is decided on the device, without waiting for it
        fresh = _normal(C, m, generator)
        Q = torch.zeros_like(fresh)
        T = fresh.new_zeros(m, m)
        Q[:, 0] = fresh[:, 0] / torch.linalg.vector_norm(fresh[:, 0])
        largest = fresh.new_zeros(())
        for step in range(m):
            product = C @ Q[:, step].contiguous()
            T[:, step] = Q.T @ product  # column by column: right whether or not a new direction was taken
            largest = torch.maximum(largest, torch.linalg.vector_norm(product))
            if step + 1 < m:
                known = Q[:, : step + 1]
                direction, other = _orthogonal(product, known), _orthogonal(fresh[:, step + 1], known)
                length = torch.linalg.vector_norm(direction)
                exhausted = length <= 10.0 * torch.finfo(C.dtype).eps * C.size**0.5 * largest
                chosen = torch.where(exhausted, other, direction)
                Q[:, step + 1] = _orthogonal(chosen / torch.linalg.vector_norm(chosen), known)
                Q[:, step + 1] /= torch.linalg.vector_norm(Q[:, step + 1])
        upper = T.triu()
        return _leading(Q, upper + upper.triu(1).T, self.rank)


def _leading(Q: Float[Tensor, "D l"], T: Float[Tensor, "l l"], rank: int) -> Factors:
    """Return the eigenpairs of Q T Q^T that are largest by size."""
    if not bool(T.isfinite().all()):  # the eigenvalue solver would fail; the caller refuses what is not finite
        return Q[:, :rank], T.new_full((min(rank, len(T)),), torch.nan)
    values, vectors = torch.linalg.eigh(0.5 * (T + T.T).double())
    order = values.abs().argsort(descending=True)[:rank]
    return (Q.double() @ vectors[:, order]).to(Q.dtype), values[order].to(Q.dtype)


def _basis(Y: Float[Tensor, "D l"]) -> Float[Tensor, "D l"]:
    return torch.linalg.qr(Y).Q


def _orthogonal(v: Float[Tensor, " D"], Q: Float[Tensor, "D m"]) -> Float[Tensor, " D"]:
    """Return v without its part in the span of Q; a second time, for what rounding has left."""
    for _ in range(2):
        v = v - Q @ (Q.T @ v)
    return v


def _normal(C: LinearOperator, columns: int, generator: torch.Generator | None) -> Float[Tensor, "D l"]:
    device = generator.device if generator is not None else C.device
    return torch.randn(C.size, columns, generator=generator, dtype=C.dtype, device=device).to(C.device)


def _check_vectors(method: LowRankMethod, matrix: CurvatureMatrix) -> None:
    if not matrix.has_vectors:
        raise TypeError(
            f"{type(method).__name__} needs vectors v_k with sum v_k v_k^T, and {matrix} has products only: it may be "
            f"indefinite. Use LowRank({matrix}, method=LanczosTruncation(rank)), which keeps the eigenpairs that are "
            "largest by size, or RandomizedSketch(rank) over a loader."
        )


def _check_count(owner: object, name: str, value: object, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise ValueError(f"{type(owner).__name__} needs {name} to be an int >= {smallest}, got {value!r}.")
