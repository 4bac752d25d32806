"""The reduction ratio: how much of the decrease that a quadratic model predicted came true.

Symbols: h the objective, g its gradient, M its quadratic model, lambda (I + R) the damping, d a step,
rho = (h(theta + d) - h(theta)) / (M(d) - M(0)).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from math import inf, isfinite, nan

import torch

# The difference of two objective values is rounding noise below a few units in their last place.
_NOISE_IN_EPS = 8.0


def reduction_ratio(
    actual: float, predicted: float, *, value: float = 0.0, dtype: torch.dtype = torch.float32
) -> float:
    r"""Return rho, how much of the predicted reduction came true.

    .. math:: \rho = \frac{h(\theta + d) - h(\theta)}{M(d) - M(0)}

    Martens & Grosse (2015), section 6.5. Departures, where the quotient would mislead:

    * both changes are rounding errors of h, at most 8 eps \|h\|: 1, for nothing speaks against the model;
    * the model predicts no reduction: 0 where the objective fell all the same (the model is bad, the step is not), and
      -inf where it did not (the quotient of two increases is positive and would pass for agreement);
    * a change that is not finite: NaN.

    Args:
        actual: h(theta + d) - h(theta), both on the same data.
        predicted: M(d) - M(0).
        value: h(theta), whose size decides what is rounding.
        dtype: type that h was computed in.

    Returns:
        The ratio; every control reads NaN and infinities as a failure of the model.

    Example:
        >>> reduction_ratio(-0.9, -1.0), reduction_ratio(0.1, -1.0), reduction_ratio(1e-8, -1e-9, value=1.0)
        (0.9, -0.1, 1.0)
    """
    actual, predicted, value = float(actual), float(predicted), float(value)
    if not (isfinite(actual) and isfinite(predicted)):
        return nan
    noise = _NOISE_IN_EPS * torch.finfo(dtype).eps * abs(value)
    if abs(actual) <= noise and abs(predicted) <= noise:
        return 1.0
    if predicted >= 0:
        return 0.0 if actual < 0 else -inf
    return actual / predicted


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """M(d) - M(0) with and without the damping's 1/2 lambda d^T (I + R) d, as numbers on the host."""

    damped: float
    undamped: float


class RatioConvention(ABC):
    """Which model the reduction ratio compares the objective with: published codes differ."""

    @property
    def slopes_below(self) -> float:
        """The part of |h| below which changes of h come from slopes, see :class:`SlopeRatio`. Default: 0, never."""
        return 0.0

    @abstractmethod
    def predicted_change(self, prediction: Prediction) -> float:
        """Return the M(d) - M(0) that counts."""

    def ratio(
        self, actual: float, prediction: Prediction, *, value: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> float:
        """Return rho; arguments as in :func:`curvlib.solvers.reduction.reduction_ratio`."""
        return reduction_ratio(actual, self.predicted_change(prediction), value=value, dtype=dtype)


@dataclass(frozen=True)
class DampedRatio(RatioConvention):
    """rho against the damped model: Martens & Grosse (2015), section 6.5, and the recurrent Hessian-free code.

    The damped prediction is the smaller one, so that its rho may exceed 1 on an exact model.
    """

    def predicted_change(self, prediction: Prediction) -> float:
        """Return M(d) - M(0) with the damping."""
        return prediction.damped


@dataclass(frozen=True)
class UndampedRatio(RatioConvention):
    """rho against the model without damping: kfac-jax by default, and the MATLAB Hessian-free code."""

    def predicted_change(self, prediction: Prediction) -> float:
        """Return M(d) - M(0) without the damping."""
        return prediction.undamped


@dataclass(frozen=True, kw_only=True)
class SlopeRatio(RatioConvention):
    r"""Another convention's rho, with small changes of h from its slopes at both ends of the step.

    .. math:: h(\theta + d) - h(\theta) \approx \tfrac12 (g(\theta) + g(\theta + d))^T d

    The difference of two values of h is noise once it is below their rounding errors, when parameters are right to half
    of the digits; the slopes vanish with the step and tell good steps from bad ones almost to the last digit (Hager &
    Zhang 2005, section 2, the approximate Wolfe conditions). Exact for a quadratic h. It costs a backward pass, at
    steps whose predicted and actual change are both small.

    Args:
        convention: whose prediction counts.
        below: the part of \|h\| up to which a change is small.
    """

    convention: RatioConvention = field(default_factory=UndampedRatio)
    below: float = 1e-6

    def __post_init__(self) -> None:
        if not isinstance(self.convention, RatioConvention):
            raise TypeError(
                f"SlopeRatio(convention=...) must be a RatioConvention such as UndampedRatio(), got "
                f"{self.convention!r}."
            )
        if not 0 < self.below < 1:
            raise ValueError(f"SlopeRatio needs 0 < below < 1, got {self.below!r}.")

    @property
    def slopes_below(self) -> float:
        """The part of |h|."""
        return self.below

    def predicted_change(self, prediction: Prediction) -> float:
        """Return that of the convention."""
        return self.convention.predicted_change(prediction)
