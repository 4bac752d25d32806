r"""What stochastic Lanczos quadrature returns: a discrete measure for each probe, and what can be asked of it.

Symbols: D the dimension; P probes; theta (P, m) nodes, tau (P, m) weights that add up to 1 in each row; t (G,) points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.spectra.estimate import Estimate
from curvlib.spectra.probes import check_count


@dataclass(frozen=True, kw_only=True, eq=False)
class Quadrature:
    """One discrete measure a row.

    Attributes:
        nodes: theta.
        weights: tau.
    """

    nodes: Float[Tensor, "P m"]
    weights: Float[Tensor, "P m"]

    def integrals(self, values: Float[Tensor, "P m *G"]) -> Float[Tensor, "P *G"]:
        """Return sum_j tau_j values_j of every row; where a weight is 0 the value does not count, whatever it is."""
        weights = self.weights.reshape(*self.weights.shape, *([1] * (values.ndim - 2)))
        return torch.where(weights > 0.0, weights * values, 0.0).sum(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class SpectralMeasure:
    """An estimate of how the D eigenvalues are distributed; made by :class:`SpectralDensity`.

    Means are over the P probes, and standard errors come from their spread, with P - 1 degrees of freedom: use
    :meth:`Estimate.interval` for few probes. What the quadrature of each probe misses is
    the truncation error: how much the mean changes from half of the steps to all of them. Far from convergence that is
    too small.

    Attributes:
        quadrature: nodes and weights of every probe, float64; one row of exact eigenvalues where these were taken.
        coarse: those of half of the steps; None where the eigenvalues are exact.
        size: D.
        products: the number of vectors that the operator was multiplied with.
        label: the operator, in words.
    """

    quadrature: Quadrature
    coarse: Quadrature | None
    size: int
    products: int
    label: str

    @property
    def nodes(self) -> Float[Tensor, "P m"]:
        """The nodes theta; all lie between the extreme eigenvalues, up to rounding."""
        return self.quadrature.nodes

    @property
    def weights(self) -> Float[Tensor, "P m"]:
        """The weights tau: the fraction of all eigenvalues that a node stands for, in its row."""
        return self.quadrature.weights

    def trace_of(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        r"""Return an estimate of a function's trace.

        .. math:: \mathrm{trace}(f(C)) = \sum_i f(e_i) \approx \frac{D}{P} \sum_{k, j} \tau_{kj} f(\theta_{kj})

        Args:
            function: f, takes and gives a float64 tensor of nodes, entry by entry.

        Raises:
            ValueError: the function gave another shape.
            ArithmeticError: it is not finite at a node whose weight is not 0.
        """

        def means(rule: Quadrature) -> Float[Tensor, " P"]:
            values = function(rule.nodes)
            if not isinstance(values, Tensor) or values.shape != rule.nodes.shape:
                came = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"trace_of: function must return shape {tuple(rule.nodes.shape)}, got {came}.")
            sums = rule.integrals(values)
            if not bool(sums.isfinite().all()):
                counts = (rule.weights > 0.0) & ~values.isfinite()
                where = f"{float(rule.nodes[counts][0]):.3g}" if bool(counts.any()) else "some node"
                raise ArithmeticError(
                    f"trace_of: the function is not finite at {where}, where {self.label} has spectrum: use another "
                    "function, or add a damping inside it."
                )
            return self.size * sums

        return self._estimate(means)

    def logdet(self, damping: float = 0.0) -> Estimate:
        """Return an estimate of log det(C + damping I).

        Raises:
            ArithmeticError: a node is not above -damping, so that C + damping I is not positive definite.
        """
        occupied = self.nodes[self.weights > 0.0]
        smallest = float(occupied.min())
        if not smallest + damping > 0.0:
            raise ArithmeticError(
                f"logdet of {self.label} needs C + damping I positive definite, but with damping = {damping} its "
                f"spectrum reaches {smallest + damping:.3g}: use a damping above {-smallest:.3g}."
            )
        return self.trace_of(lambda nodes: (nodes + damping).log())

    def cumulative(self, points: Float[Tensor, " G"]) -> Estimate:
        """Return for each point the estimated fraction of the eigenvalues that are <= it.

        Inside a gap between nodes it is a step function; the truncation error does not see that.
        """
        points = self._points("cumulative", points)
        return self._estimate(lambda rule: rule.integrals((rule.nodes.unsqueeze(-1) <= points).double()))

    def density(self, points: Float[Tensor, " G"], width: float | None = None) -> Estimate:
        r"""Return the density at each point, smoothed by a normal kernel; its integral over all t is 1.

        .. math:: \rho(t) = \frac{1}{P} \sum_{k, j} \tau_{kj}
            \frac{1}{\sqrt{2 \pi} \sigma} \exp\Big(-\frac{(t - \theta_{kj})^2}{2 \sigma^2}\Big)

        Args:
            points: t, in the units of C.
            width: sigma > 0, in the units of C; None is a hundredth of the range of the nodes.

        Raises:
            TypeError: the points are no floating-point tensor of one dimension.
            ValueError: the width is not positive.
        """
        points = self._points("density", points)
        sigma = self._default_width() if width is None else float(width)
        if not sigma > 0.0:
            raise ValueError(f"density: width must be > 0, got {width!r}.")

        def kernels(rule: Quadrature) -> Float[Tensor, "P G"]:
            distance = (points - rule.nodes.unsqueeze(-1)) / sigma
            return rule.integrals((-0.5 * distance.square()).exp() / ((2.0 * pi) ** 0.5 * sigma))

        return self._estimate(kernels)

    def grid(self, count: int = 200) -> Float[Tensor, " G"]:
        """Return ``count`` equidistant points over all nodes and four default widths beyond, for :meth:`density`."""
        check_count("grid", "count", count, least=2)
        margin = 4.0 * self._default_width()
        low, high = (float(end) for end in self.nodes.aminmax())
        return torch.linspace(low - margin, high + margin, count, dtype=self.nodes.dtype, device=self.nodes.device)

    def __str__(self) -> str:
        low, high = (float(end) for end in self.nodes.aminmax())
        probes, steps = self.nodes.shape
        kind = "all eigenvalues" if self.coarse is None else f"{probes} probes of {steps} steps"
        return f"spectrum of {self.label} from {low:.4g} to {high:.4g}, {kind} ({self.products} products)"

    def _default_width(self) -> float:
        low, high = (float(end) for end in self.nodes.aminmax())
        # A single node, as of a multiple of I, has no range.
        return (high - low) / 100.0 or max(abs(high), 1.0) / 100.0

    def _points(self, owner: str, points: Float[Tensor, " G"]) -> Float[Tensor, " G"]:
        if not isinstance(points, Tensor) or not points.is_floating_point() or points.ndim != 1:
            raise TypeError(f"{owner}: points must be a floating-point tensor of one dimension, got {points!r}.")
        return points.to(self.nodes)

    def _estimate(self, means: Callable[[Quadrature], Float[Tensor, "P *G"]]) -> Estimate:
        samples = means(self.quadrature)
        value = samples.mean(0)
        if self.coarse is None:
            return Estimate(value=value, standard_error=torch.zeros_like(value), products=self.products)
        return Estimate(
            value=value,
            standard_error=samples.std(0) / len(samples) ** 0.5,
            products=self.products,
            degrees_of_freedom=len(samples) - 1,
            truncation_error=(value - means(self.coarse).mean(0)).abs(),
        )
