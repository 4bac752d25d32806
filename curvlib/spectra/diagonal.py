r"""Diagonals from products with random vectors.

Symbols: C (D, D) the operator, d (D,) its diagonal, z (D,) a test vector; * and / of vectors are entry by entry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch

from curvlib.operators import LinearOperator, full_precision
from curvlib.spectra.estimate import Estimate, exact
from curvlib.spectra.leave_one_out import LeaveOneOut
from curvlib.spectra.probes import (
    ProbeDistribution,
    Rademacher,
    check_count,
    check_distribution,
    check_estimation,
    draw,
    multiply,
)
from curvlib.spectra.trace import probe_blocks


class DiagonalEstimator(ABC):
    """An unbiased estimator of diag(C) from products: ``estimator(C, generator)`` is an :class:`Estimate` of (D,).

    Where an estimator may take D products or more, D products with unit vectors give the exact diagonal instead.
    """

    def __call__(self, operator: LinearOperator, generator: torch.Generator | None = None) -> Estimate:
        """Return the estimate.

        Args:
            operator: C, symmetric, of any definiteness.
            generator: source of the random numbers, on the operator's device; None is PyTorch's global one.

        Raises:
            TypeError: the operator or the generator is of another kind.
            ValueError: the generator is on another device.
        """
        check_estimation(type(self).__name__, operator, generator)
        with full_precision(operator.device):
            if self.budget >= operator.size:
                return exact(operator.diagonal(), operator)
            return self.estimate(operator, generator)

    @property
    @abstractmethod
    def budget(self) -> int:
        """The number of products that may be taken."""

    @abstractmethod
    def estimate(self, operator: LinearOperator, generator: torch.Generator | None) -> Estimate:
        """Return the estimate for checked arguments and fewer than D products."""


@dataclass(frozen=True, kw_only=True)
class BKSDiagonal(DiagonalEstimator):
    r"""The mean of z * (C z), weighted by z^2.

    .. math:: d = \Big(\sum_k z_k * C z_k\Big) \Big/ \Big(\sum_k z_k * z_k\Big)

    Bekas, Kokiopoulou & Saad, "An estimator for the diagonal of a matrix" (2007), equation 3. With Rademacher vectors
    entry i of one term has the variance sum_j C_ij^2 over j other than i: large beside a small d_i in a row of large
    entries. The standard error is that of the ratio, sqrt(K / (K - 1) sum_k (z_k C z_k - d z_k^2)^2) / sum_k z_k^2.

    Args:
        probes: test vectors, at least 2; one product each.
        distribution: of the test vectors; entries that may be near 0 make the ratio noisy.
    """

    probes: int = 30
    distribution: ProbeDistribution = field(default_factory=Rademacher)

    def __post_init__(self) -> None:
        check_count("BKSDiagonal", "probes", self.probes, least=2)
        check_distribution("BKSDiagonal", self.distribution)

    @property
    def budget(self) -> int:
        """One product a probe."""
        return self.probes

    def estimate(self, operator: LinearOperator, generator: torch.Generator | None) -> Estimate:
        """Return the weighted mean of z * C z."""
        # Sums of a = z * C z, b = z^2, a^2, a b, b^2, in float64: the error is a difference of the last three.
        sums = torch.zeros(5, operator.size, dtype=torch.float64, device=operator.device)
        for z in probe_blocks(self.distribution, operator, self.probes, generator):
            a, b = (z * multiply(operator, z)).double(), z.double().square()
            for row, terms in zip(sums, (a, b, a * a, a * b, b * b), strict=True):
                row += terms.sum(1)
        d = sums[0] / sums[1]
        squares = (sums[2] - 2.0 * d * sums[3] + d.square() * sums[4]).clamp(min=0.0)
        error = (squares * (self.probes / (self.probes - 1))).sqrt() / sums[1]
        return Estimate(
            value=d.to(operator.dtype),
            standard_error=error.to(operator.dtype),
            products=self.probes,
            degrees_of_freedom=self.probes - 1,
        )


@dataclass(frozen=True, kw_only=True)
class XDiag(DiagonalEstimator):
    r"""XDiag: every test vector serves the sketch and, left out of it, the complement; the mean over all of them.

    .. math:: d_i = \mathrm{diag}(Q_{(i)} Q_{(i)}^T C) + \omega_i * (I - Q_{(i)} Q_{(i)}^T) C \omega_i

    Epperly, Tropp & Webber, "XTrace: making the most of every sample in stochastic trace estimation", SIAM J. Matrix
    Anal. Appl. 45 (2024), with test vectors of signs. As Q_(i) Q_(i)^T = Q (I - s_i s_i^T) Q^T and
    C omega_i = Q R e_i, the second term is omega_i * Q s_i (s_i^T R e_i). The standard error is that of XTrace, entry
    by entry: somewhat too small, by a quarter in a trial with a flat spectrum.

    Args:
        products: at least 4; half of them, k, for the sketch C Omega, half for C Q. An odd one is not taken.
    """

    products: int = 30

    def __post_init__(self) -> None:
        check_count("XDiag", "products", self.products, least=4)

    @property
    def budget(self) -> int:
        """The number of products."""
        return self.products

    def estimate(self, operator: LinearOperator, generator: torch.Generator | None) -> Estimate:
        """Return the mean of the d_i."""
        k = self.products // 2
        parts = LeaveOneOut.of(operator, draw(Rademacher(), operator, k, generator))
        common = (parts.Q * parts.Z).sum(1)
        QS, ZS = parts.Q @ parts.S, parts.Z @ parts.S
        # The part of each that differs: its spread is small beside the common part.
        own = QS * (parts.Omega * (parts.S * parts.R).sum(0) - ZS)
        error = own.std(1) / k**0.5
        value = common + own.mean(1)
        return Estimate(
            value=value.to(operator.dtype),
            standard_error=error.to(operator.dtype),
            products=2 * k,
            degrees_of_freedom=k - 1,
        )
