"""Dampings that follow the scale of the curvature: how one starts and below what it never falls.

Symbols: g the gradient, C (D, D) the curvature matrix, trace(C) / D the mean curvature.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import isfinite
from numbers import Real


def checked_damping(damping: float, name: str = "damping") -> float:
    """Return the damping as a float.

    Raises:
        TypeError: damping is not a real number.
        ValueError: it is negative, NaN or infinite.
    """
    if isinstance(damping, bool) or not isinstance(damping, Real):
        raise TypeError(f"{name} must be a number >= 0, got {damping!r} of type {type(damping).__name__}.")
    value = float(damping)
    if not (isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {damping!r}.")
    return value


class DampingFloor(ABC):
    """The least damping, given the mean curvature trace(C) / D and the first damping."""

    @property
    def needs_mean_curvature(self) -> bool:
        """Whether :meth:`least` looks at the mean curvature, which is unknown before the first step. Default: yes."""
        return True

    @abstractmethod
    def least(self, mean_curvature: float | None, first: float | None) -> float:
        """Return the least damping.

        Args:
            mean_curvature: trace(C) / D, None where the caller does not know it.
            first: the damping of the first step, likewise.
        """


@dataclass(frozen=True)
class AbsoluteFloor(DampingFloor):
    """The damping never falls below a fixed number.

    Args:
        value: in the units of the curvature matrix.
    """

    value: float = 0.0

    def __post_init__(self) -> None:
        checked_damping(self.value, "AbsoluteFloor(value=...)")

    @property
    def needs_mean_curvature(self) -> bool:
        """False."""
        return False

    def least(self, mean_curvature: float | None, first: float | None) -> float:
        """Return the number."""
        return self.value


@dataclass(frozen=True)
class RelativeFloor(DampingFloor):
    """The damping never falls below fraction * trace(C) / D, so that it keeps to the scale of the curvature.

    Under mini-batch noise a damping without such a floor can sink until the steps diverge. Where products are all that
    is known of C, an optimizer estimates the trace from one vector of random signs at each step, a Jacobian-vector
    product, and the floor has the noise of that; ``StartFloor`` costs nothing.

    Args:
        fraction: the part of the mean curvature.
    """

    fraction: float = 1e-3

    def __post_init__(self) -> None:
        checked_damping(self.fraction, "RelativeFloor(fraction=...)")

    def least(self, mean_curvature: float | None, first: float | None) -> float:
        """Return fraction * mean_curvature; 0 where the mean is negative, as that of an indefinite matrix may be.

        Raises:
            ValueError: the mean curvature is unknown or not finite.
        """
        if mean_curvature is None or not isfinite(mean_curvature):
            raise ValueError(
                f"RelativeFloor needs a finite mean curvature, got {mean_curvature!r}: pass "
                "mean_curvature=float(C.trace()) / C.size to update, or use AbsoluteFloor."
            )
        return self.fraction * max(float(mean_curvature), 0.0)


@dataclass(frozen=True)
class StartFloor(DampingFloor):
    """The damping never falls below a fraction of the first damping.

    A floor on the scale of the objective where trace(C) is unknown, as with products alone. Without one, good steps
    multiply the damping by ever less, and the way back takes as many bad steps.

    Args:
        fraction: the part of the first damping.
    """

    fraction: float = 1e-6

    def __post_init__(self) -> None:
        if not checked_damping(self.fraction, "StartFloor(fraction=...)") <= 1:
            raise ValueError(f"StartFloor(fraction=...) must be at most 1, got {self.fraction!r}.")

    @property
    def needs_mean_curvature(self) -> bool:
        """False."""
        return False

    def least(self, mean_curvature: float | None, first: float | None) -> float:
        """Return fraction * first.

        Raises:
            ValueError: the first damping is unknown.
        """
        if first is None:
            raise ValueError(
                "StartFloor needs the first damping, and the state has none: begin with the state that the control's "
                "start() returns, or give DampingState(damping=..., first=...)."
            )
        return self.fraction * first


@dataclass(frozen=True)
class RelativeStart:
    """The first damping is a fraction of the curvature along the gradient, g^T C g / g^T g.

    A start that keeps to the scale of the objective: multiplying the loss by a constant multiplies the damping by it.

    Args:
        fraction: greater than 0.
    """

    fraction: float = 0.03

    def __post_init__(self) -> None:
        if not (checked_damping(self.fraction, "RelativeStart(fraction=...)") > 0):
            raise ValueError(f"RelativeStart(fraction=...) must be greater than 0, got {self.fraction!r}.")

    def damping(self, gradient_curvature: float | None) -> float:
        """Return fraction * g^T C g / g^T g.

        Raises:
            ValueError: the curvature along the gradient is unknown, not finite or not positive.
        """
        if gradient_curvature is None or not (isfinite(gradient_curvature) and gradient_curvature > 0):
            raise ValueError(
                f"RelativeStart needs a positive curvature along the gradient, got {gradient_curvature!r}: pass "
                "gradient_curvature=float(g @ (C @ g) / (g @ g)) to start, or give the first damping as a number "
                "(damping=1.0 in a preset)."
            )
        return self.fraction * gradient_curvature
