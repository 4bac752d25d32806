"""The reduction ratio: how much of the decrease that a quadratic model predicted came true.

Symbols: h the objective, M its quadratic model, d a step, rho = (h(theta + d) - h(theta)) / (M(d) - M(0)).
"""

from __future__ import annotations

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
