"""What a stochastic estimator returns: a value that knows its error.

Symbols: D the dimension of the operator; * the shape of what is estimated: () a number, (D,) a diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import LinearOperator


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """A stochastic estimate with its error; ``float(estimate)`` is its value, ``str(estimate)`` a sentence.

    Attributes:
        value: the estimate, in the type of the operator.
        standard_error: estimated standard deviation of ``value`` over the random draws, entry by entry; 0 where the
            value is exact.
        products: the number of vectors that the operator was multiplied with, quadratic forms included.
        truncation_error: estimated size of the error that more draws would not remove; None where there is none.
    """

    value: Float[Tensor, " *d"]
    standard_error: Float[Tensor, " *d"]
    products: int
    truncation_error: Float[Tensor, " *d"] | None = None

    def __float__(self) -> float:
        """Return the value of an estimated number."""
        return float(self.value)

    def __str__(self) -> str:
        cost = f"({self.products} products)"
        if self.value.ndim == 0:
            text = f"{float(self.value):.6g} +- {float(self.standard_error):.2g}"
        else:
            value, error = (float(part.square().mean().sqrt()) for part in (self.value, self.standard_error))
            text = f"{self.value.numel()} values of root mean square {value:.6g} +- {error:.2g}"
        if self.truncation_error is not None:
            text += f", truncation error {float(self.truncation_error.abs().max()):.2g}"
        return f"{text} {cost}"


def exact(value: Float[Tensor, " *d"], operator: LinearOperator) -> Estimate:
    """Return a value that took D products and has no error."""
    return Estimate(value=value, standard_error=torch.zeros_like(value), products=operator.size)


def mean_over(samples: Float[Tensor, "*d K"], dtype: torch.dtype, products: int) -> Estimate:
    """Return the mean over the last dimension and its standard error."""
    error = samples.std(-1) / samples.shape[-1] ** 0.5
    return Estimate(value=samples.mean(-1).to(dtype), standard_error=error.to(dtype), products=products)
