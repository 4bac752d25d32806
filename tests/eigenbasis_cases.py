"""Blocks of estimates by their coordinates, and the dense eigenbasis of each."""

import torch

from curvlib.approximations import EKFAC, KFAC, BlockDiagonal
from curvlib.operators import KroneckerEigenStack


def estimates(matrix, evaluation):
    """EKFAC, K-FAC and the exact blocks, from the same draws."""
    return [
        approximation(matrix).estimate(evaluation, torch.Generator().manual_seed(5))
        for approximation in (EKFAC, KFAC, BlockDiagonal)
    ]


def blocks(operator):
    """The blocks of one estimate by their coordinates, without the l2 term."""
    inner = getattr(operator, "operator", operator)
    return {tuple(where.tolist()): block for block, where in zip(inner.blocks, inner.coordinates, strict=True)}


def dense_basis(block):
    """U of one block, column by column: from the bases of a KroneckerEigen or a stack."""
    if isinstance(block, KroneckerEigenStack):
        singles = [tuple(Q[b] for Q in block.bases) for b in range(block.block_count)]
        return torch.block_diag(*(torch.kron(*(Q.contiguous() for Q in pair)) for pair in singles))
    U_G, U_A = block.bases
    return torch.kron(
        U_G.contiguous(), torch.eye(block.eigenvalues.shape[1]).to(U_G) if U_A is None else U_A.contiguous()
    )
