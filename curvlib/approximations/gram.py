"""Second-moment matrices X^T X, of which only half has to be computed."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Narrower blocks save more products (half of them in the limit) but run slower; measured on CPUs from 128 to 1024.
_BLOCK = 192


def gram(X: Float[Tensor, "R d"]) -> Float[Tensor, "d d"]:
    """Return X^T X, block row by block row of its lower triangle, mirrored: about (d + 192) / 2d of the products."""
    d = X.shape[1]
    if d <= 2 * _BLOCK:
        return X.T @ X
    result = X.new_empty(d, d)
    for start in range(0, d, _BLOCK):
        stop = min(start + _BLOCK, d)
        torch.mm(X[:, start:stop].T, X[:, :stop], out=result[start:stop, :stop])
        result[:start, start:stop] = result[start:stop, :start].T
    return result
