"""Linear systems with a chosen condition number, their solutions by dense matrices, and every iterate of a solve."""

from dataclasses import dataclass

import numpy as np
import torch

from curvlib.solvers.solution import IterateGrid


def spd(seed, size, condition=1e3, dtype=torch.float64):
    """A matrix with logarithmically spaced eigenvalues from 1 / condition to 1."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    eigenvalues = torch.logspace(0, -np.log10(condition), size, dtype=torch.float64)
    matrix = Q * eigenvalues @ Q.T
    return (0.5 * (matrix + matrix.T)).to(dtype)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64).to(dtype)


def dense_inverse(M, damping):
    return torch.linalg.inv(M + damping * torch.eye(len(M), dtype=M.dtype, device=M.device))


@dataclass(frozen=True, kw_only=True)
class EveryIterate(IterateGrid):
    def numbers(self, limit):
        return frozenset(range(1, limit + 1))
