"""What a stochastic estimator returns: a value that knows its error.

Symbols: D the dimension of the operator; * the shape of what is estimated: () a number, (D,) a diagonal; m the draws
that the error is estimated from, s their standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.special import stdtrit
from torch import Tensor

from curvlib.operators import LinearOperator


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    r"""A stochastic estimate with its error; ``float(estimate)`` is its value, ``str(estimate)`` a sentence.

    The standard error s / sqrt(m) of m draws is itself an estimate: its square is unbiased, but s is on the average too
    small, for normal draws by the factor

    .. math:: E[s] / \sigma = \sqrt{2 / (m - 1)} \, \Gamma(m / 2) / \Gamma((m - 1) / 2)

    which is 0.80 for m = 2, 0.92 for 4 and 0.97 for 10, and less for skewed draws, such as those of a matrix with few
    large eigenvalues. :meth:`interval` takes account of m, by Student's distribution.

    Attributes:
        value: the estimate, in the type of the operator.
        standard_error: estimated standard deviation of ``value`` over the random draws, entry by entry; 0 where the
            value is exact.
        products: the number of vectors that the operator was multiplied with, quadratic forms included.
        degrees_of_freedom: of the standard error, m - 1; None where the value is exact.
        truncation_error: estimated size of the error that more draws would not remove; None where there is none.
    """

    value: Float[Tensor, " *d"]
    standard_error: Float[Tensor, " *d"]
    products: int
    degrees_of_freedom: int | None = None
    truncation_error: Float[Tensor, " *d"] | None = None

    def interval(self, coverage: float = 0.95) -> tuple[Float[Tensor, " *d"], Float[Tensor, " *d"]]:
        r"""Return both ends of an interval for what is estimated, entry by entry, without the truncation error.

        .. math:: \text{value} \pm t_{m - 1, (1 + p) / 2} \; s / \sqrt{m}

        It covers at the nominal rate for normal draws. Measured for 95 %, with D = 200, spectra from flat to i^-2 and
        exp(-i / 10), 1000 runs each: 92 to 96 % for ``Hutchinson`` and ``SquaredFrobenius`` with 30 probes; 93 to 96 %
        for ``HutchPlusPlus`` with 30 products, 91 to 94 % with 12; 92 to 95 % for the log determinant of a
        ``SpectralMeasure`` with 10 probes, 91 to 95 % with 4. The least is that of i^-2, whose draws are skewed: 87 %
        for ``Hutchinson`` with 10 probes. The terms of ``XTrace`` and ``XDiag`` are not independent: 81 to 94 % for
        ``XTrace`` with 30 products.

        Args:
            coverage: p, the probability that the truth lies inside, between 0 and 1.

        Raises:
            ValueError: the coverage is not between 0 and 1.
        """
        if not 0.0 < coverage < 1.0:
            raise ValueError(f"interval: coverage must lie between 0 and 1, such as 0.95, got {coverage!r}.")
        if self.degrees_of_freedom is None:
            return self.value, self.value
        margin = float(stdtrit(self.degrees_of_freedom, 0.5 + 0.5 * coverage)) * self.standard_error
        return self.value - margin, self.value + margin

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
    return Estimate(
        value=samples.mean(-1).to(dtype),
        standard_error=error.to(dtype),
        products=products,
        degrees_of_freedom=samples.shape[-1] - 1,
    )
