"""What a block of a block-diagonal approximation is kept as: full, or of low rank.

Symbols: R rows (gradients of examples), B blocks of one size d, r rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.approximations.statistics import Statistics, sum_of_roots
from curvlib.extensions import gram
from curvlib.matrices import CurvatureMatrix
from curvlib.operators import BlockDiagonal, Dense, KroneckerStack, LinearOperator, LowRank


class BlockKind(ABC):
    """How the sum of x x^T over rows x is kept, for B blocks of one size at once."""

    @abstractmethod
    def add(self, statistics: Statistics, key: str, rows: Float[Tensor, "R B d"]) -> None:
        """Add the rows' outer products to the statistics, in place."""

    def check_indefinite(self, matrix: CurvatureMatrix) -> None:
        """Refuse a matrix that has no vectors v_k with sum v_k v_k^T, where blocks are made of these.

        Raises:
            TypeError: they are.
        """
        raise TypeError(
            f"{self!r} keeps sums of x x^T, which the blocks of {matrix} are not, as they may be indefinite: use "
            f"DenseBlocks(), or LowRank({matrix}, method=LanczosTruncation(rank)) for all parameters in one block."
        )

    def of_matrices(self, key: str, matrices: Float[Tensor, "B d d"]) -> Statistics:
        """Return the statistics of blocks that are known, of a matrix that :meth:`check_indefinite` lets pass."""
        raise NotImplementedError(f"{self!r} takes no blocks of a matrix without vectors.")

    @abstractmethod
    def zeros(self, key: str, blocks: int, size: int, like: Tensor) -> Statistics:
        """Return the statistics of no row."""

    @abstractmethod
    def operator(self, statistics: Statistics, key: str) -> LinearOperator:
        """Return the operator (B d, B d), block by block."""

    @abstractmethod
    def describe(self, blocks: int, size: int) -> str:
        """Return a few words."""


@dataclass(frozen=True)
class DenseBlocks(BlockKind):
    """The whole blocks: memory is their size squared."""

    def add(self, statistics: Statistics, key: str, rows: Float[Tensor, "R B d"]) -> None:
        """Add X^T X of each block."""
        if rows.shape[1] == 1:
            total = gram(rows.squeeze(1)).unsqueeze(0)
        else:
            stacked = rows.transpose(0, 1)
            total = stacked.mT @ stacked
        sums = statistics.sums
        sums[key] = sums[key].add_(total) if key in sums else total

    def check_indefinite(self, matrix: CurvatureMatrix) -> None:
        """Take every matrix."""

    def of_matrices(self, key: str, matrices: Float[Tensor, "B d d"]) -> Statistics:
        """Return the blocks themselves."""
        return Statistics(sums={key: matrices})

    def zeros(self, key: str, blocks: int, size: int, like: Tensor) -> Statistics:
        """Return zero blocks."""
        return Statistics(sums={key: like.new_zeros(blocks, size, size)})

    def operator(self, statistics: Statistics, key: str) -> LinearOperator:
        """Return one dense operator, or a stack of them."""
        matrices = statistics.sums[key]
        return Dense(matrices[0]) if len(matrices) == 1 else KroneckerStack((matrices,))

    def describe(self, blocks: int, size: int) -> str:
        """Name number and size."""
        return f"dense {size} x {size}" if blocks == 1 else f"{blocks} times dense {size} x {size}"


@dataclass(frozen=True)
class LowRankBlocks(BlockKind):
    """The r leading directions of each block, F^T F with F (r, d): memory is r times the block's size.

    Rows are taken in chunk by chunk, batch by batch, and what exceeds r directions is left out each time: the block
    never exceeds the exact one, equals it while that has rank r at most, and depends slightly on how the data are cut.

    Source: Le Roux, Manzagol & Bengio 2007 (TONGA), sec. 4, there for ``EmpiricalFisher()`` with a decaying sum, which
    ``MovingAverage`` gives.

    Args:
        rank: r, at least 1.
    """

    rank: int

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LowRankBlocks needs rank >= 1, got {self.rank!r}.")

    def add(self, statistics: Statistics, key: str, rows: Float[Tensor, "R B d"]) -> None:
        """Add the rows to the root and keep its leading directions."""
        blocks, size = rows.shape[1:]
        known = statistics.roots.get(key)
        before = rows.new_zeros(blocks, 0, size) if known is None else known
        statistics.roots[key] = sum_of_roots(before, rows.transpose(0, 1), self._kept(size))

    def zeros(self, key: str, blocks: int, size: int, like: Tensor) -> Statistics:
        """Return a root of zeros."""
        return Statistics(roots={key: like.new_zeros(blocks, self._kept(size), size)})

    def operator(self, statistics: Statistics, key: str) -> LinearOperator:
        """Return one low-rank operator, or one for each block."""
        roots = statistics.roots[key]
        blocks = tuple(LowRank(F.T, F.new_ones(len(F)), torch.zeros_like(F[0])) for F in roots)
        if len(blocks) == 1:
            return blocks[0]
        coordinates = torch.arange(roots.shape[0] * roots.shape[2], device=roots.device).view(len(blocks), -1)
        return BlockDiagonal(blocks, tuple(coordinates), coordinates.numel())

    def describe(self, blocks: int, size: int) -> str:
        """Name number, rank and size."""
        kind = f"rank {self._kept(size)} of {size} x {size}"
        return kind if blocks == 1 else f"{blocks} times {kind}"

    def _kept(self, size: int) -> int:
        return min(self.rank, size)
