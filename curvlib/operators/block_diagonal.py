"""Blocks on disjoint sets of coordinates, zero elsewhere: the curvature of a network layer by layer.

Symbols: C_i (d_i, d_i) block i; S_i (d_i,) its coordinates in R^D, in the block's own order; K columns.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import reduce
from operator import add

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from curvlib.operators.base import LinearOperator, check_operators
from curvlib.operators.checks import check_finite_number, check_size, sum_of_logs
from curvlib.operators.diagonal import Diagonal


@dataclass(frozen=True, eq=False, repr=False)
class BlockDiagonal(LinearOperator):
    """Block i acts on the coordinates S_i alone; coordinates outside all S_i have zero curvature.

    Args:
        blocks: operators C_i of any kind, at least one.
        coordinates: for each block the index vector S_i, (d_i,) of dtype long; no coordinate may occur twice.
        size: D.

    Example:
        >>> C = BlockDiagonal((Diagonal(torch.tensor([5.0, 7.0])),), (torch.tensor([2, 0]),), 3)
        >>> C @ torch.ones(3)
        tensor([7., 0., 5.])
    """

    blocks: tuple[LinearOperator, ...]
    coordinates: tuple[Int[Tensor, " d"], ...]
    size: int
    # Slices where the coordinates are consecutive, which saves the copies of indexing.
    _selections: tuple[slice | Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        check_size("BlockDiagonal", self.size)
        check_operators("BlockDiagonal", "blocks", self.blocks)
        if not isinstance(self.coordinates, tuple) or len(self.coordinates) != len(self.blocks):
            raise ValueError(
                f"BlockDiagonal: coordinates must be a tuple with one index vector for each of the {len(self.blocks)} "
                f"blocks, got {type(self.coordinates).__name__} of length {len(self.coordinates)}."
            )
        for i in range(len(self.blocks)):
            self._check_coordinates(i)
        if bool((torch.bincount(torch.cat(self.coordinates), minlength=self.size) > 1).any()):
            raise ValueError(
                "BlockDiagonal: coordinates of the blocks must be disjoint, but some coordinate occurs twice."
            )
        object.__setattr__(self, "_selections", tuple(map(_selection, self.coordinates)))

    def _check_coordinates(self, i: int) -> None:
        index, expected = self.coordinates[i], self.blocks[i].size
        where = f"BlockDiagonal: coordinates[{i}]"
        if not isinstance(index, Tensor) or index.dtype != torch.long:
            raise TypeError(
                f"{where} must be a tensor of dtype torch.long, got {getattr(index, 'dtype', type(index))}."
            )
        if index.shape != (expected,):
            raise ValueError(f"{where} must have shape ({expected},), the size of its block, got {tuple(index.shape)}.")
        if index.device.type != self.device.type:
            raise ValueError(f"{where} must be on {self.device}, got {index.device}: move it with .to(device).")
        lowest, highest = (int(end) for end in index.aminmax())
        if lowest < 0 or highest >= self.size:
            raise ValueError(f"{where} must lie in 0 .. {self.size - 1}, got {lowest} .. {highest}.")

    def with_blocks(self, blocks: tuple[LinearOperator, ...]) -> BlockDiagonal:
        """Return other blocks on the same coordinates, without checking these again.

        Raises:
            ValueError: the sizes of the blocks are others.
        """
        check_operators("BlockDiagonal", "blocks", blocks)
        sizes, expected = [block.size for block in blocks], [block.size for block in self.blocks]
        if sizes != expected:
            raise ValueError(f"BlockDiagonal: blocks must have sizes {expected}, got {sizes}.")
        other = copy.copy(self)
        object.__setattr__(other, "blocks", blocks)
        return other

    def with_rest(self, value: float) -> BlockDiagonal:
        """Return the operator with ``value`` instead of zero on the diagonal of the uncovered coordinates."""
        value = check_finite_number("BlockDiagonal", "value", value)
        rest = self.uncovered()
        if not len(rest):
            return self
        filling = Diagonal(torch.full((len(rest),), value, dtype=self.dtype, device=self.device))
        return BlockDiagonal((*self.blocks, filling), (*self.coordinates, rest), self.size)

    def uncovered(self) -> Int[Tensor, " d"]:
        """Return the coordinates that belong to no block, in increasing order."""
        free = torch.ones(self.size, dtype=torch.bool, device=self.device)
        for selection in self._selections:
            free[selection] = False
        return free.nonzero().squeeze(1)

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.blocks[0].dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.blocks[0].device

    @override
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        result = torch.zeros_like(V, memory_format=torch.contiguous_format)
        for block, selection in zip(self.blocks, self._selections, strict=True):
            _put(result, selection, block.matmat(_take(V, selection)))
        return result

    @override
    def quadratic_form(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "K K"]:
        pairs = zip(self.blocks, self._selections, strict=True)
        return reduce(add, (block.quadratic_form(_take(V, selection)) for block, selection in pairs))

    @override
    def diagonal(self) -> Float[Tensor, " D"]:
        result = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for block, selection in zip(self.blocks, self._selections, strict=True):
            result[selection] = block.diagonal()
        return result

    @override
    def trace(self) -> Float[Tensor, ""]:
        return reduce(add, (block.trace() for block in self.blocks))

    @override
    def to_dense(self) -> Float[Tensor, "D D"]:
        result = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for block, index in zip(self.blocks, self.coordinates, strict=True):
            result[index.unsqueeze(1), index.unsqueeze(0)] = block.to_dense()
        return result

    @override
    def frobenius_norm(self) -> Float[Tensor, ""]:
        return torch.linalg.vector_norm(torch.stack([block.frobenius_norm() for block in self.blocks]))

    @override
    def spectrum(self) -> Float[Tensor, " D"]:
        covered = torch.cat([block.spectrum() for block in self.blocks])
        return torch.cat([covered, covered.new_zeros(self.size - len(covered))])

    @override
    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        covered = reduce(add, (block.logdet(damping) for block in self.blocks))
        rest = covered.new_full((self.size - sum(block.size for block in self.blocks),), damping)
        return covered + sum_of_logs(rest, repr(self), damping)


def _selection(index: Int[Tensor, " d"]) -> slice | Tensor:
    start, stop = int(index[0]), int(index[-1]) + 1
    consecutive = stop - start == len(index) and torch.equal(index, torch.arange(start, stop, device=index.device))
    return slice(start, stop) if consecutive else index


def _take(V: Float[Tensor, " ..."], selection: slice | Tensor) -> Float[Tensor, " ..."]:
    if isinstance(selection, slice):
        return V[selection]
    # Indexing one long column as a vector is ten times faster than as a matrix.
    if V.ndim == 2 and V.shape[1] == 1:
        return V.squeeze(1).index_select(0, selection).unsqueeze(1)
    return V.index_select(0, selection)


def _put(result: Float[Tensor, "D K"], selection: slice | Tensor, values: Float[Tensor, "d K"]) -> None:
    if isinstance(selection, slice):
        result[selection] = values
    elif values.shape[1] == 1:
        result.squeeze(1).scatter_(0, selection, values.squeeze(1))
    else:
        result.index_copy_(0, selection, values)
