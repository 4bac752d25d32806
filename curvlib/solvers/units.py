"""Powers of two that bring the numbers of a linear system to size 1: scaling by them rounds nothing."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# A unit is taken from the first product with anything but 0; the very first may be with a start x0 = 0.
_PRODUCTS_OF_A_START = 2


def power_of_two(v: Float[Tensor, "D K"]) -> Float[Tensor, " K"]:
    """Return the power of two at or below the largest entry of each column by size, 1 where that is 0 or not finite."""
    largest = v.abs().amax(0)
    scale = largest.clamp(min=torch.finfo(v.dtype).tiny).log2().floor().exp2()
    return torch.where((largest > 0) & largest.isfinite(), scale, 1.0)


class Unit:
    """A power of two near the size of a matrix, for each column, found in the first products with it.

    Args:
        like: (K,), of the columns' dtype and device.
    """

    def __init__(self, like: Float[Tensor, " K"]) -> None:
        self.value = torch.ones_like(like)
        self._known = torch.zeros_like(like, dtype=torch.bool)
        self._products = 0

    def divide(self, product: Float[Tensor, "D K"], v: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """Return the product of the matrix with v in this unit."""
        self._products += 1
        if self._products <= _PRODUCTS_OF_A_START:
            ratio = power_of_two(product) / power_of_two(v)
            says = ~self._known & (product != 0).any(0) & ratio.isfinite() & (ratio > 0)
            self.value = torch.where(says, ratio, self.value)
            self._known |= (product != 0).any(0)
        return product / self.value
