"""Dampings that follow a plan instead of the reduction ratio.

Symbols: k the number of steps before, n the length of the plan, lambda_k the damping of step k.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

from curvlib.solvers.damping import DampingControl, DampingState
from curvlib.solvers.damping_scale import checked_damping


class DampingSchedule(DampingControl):
    """The damping is a function of the number of steps; every step stays. A subclass gives :meth:`at`."""

    @abstractmethod
    def at(self, step: int) -> float:
        """Return lambda_k, k = 0 at the first step."""

    @property
    def follows_ratio(self) -> bool:
        """False: the plan is all that counts."""
        return False

    def start(self, *, gradient_curvature: float | None = None) -> DampingState:
        """Return the state before the first step."""
        first = self._checked(0)
        return DampingState(damping=first, first=first)

    def update(self, state: DampingState, ratio: float | None, *, mean_curvature: float | None = None) -> DampingState:
        """Return the state of the next step."""
        step = state.step + 1
        return replace(state, damping=self._checked(step), step=step)

    def needs_ratio(self, state: DampingState) -> bool:
        """Never."""
        return False

    def _checked(self, step: int) -> float:
        return checked_damping(self.at(step), f"{type(self).__name__}, the damping of step {step},")


@dataclass(frozen=True, kw_only=True)
class ExponentialDamping(DampingSchedule):
    r"""From one damping to another by the same factor at each step, then constant.

    .. math:: \lambda_k = \text{initial} \, (\text{final} / \text{initial})^{\min(k / n, 1)}

    Args:
        initial: lambda_0 > 0.
        final: lambda_n > 0.
        steps: n >= 1.

    Example:
        >>> [round(ExponentialDamping(initial=1.0, final=0.01, steps=2).at(k), 6) for k in range(4)]
        [1.0, 0.1, 0.01, 0.01]
    """

    initial: float
    final: float
    steps: int

    def __post_init__(self) -> None:
        for name in ("initial", "final"):
            if not checked_damping(getattr(self, name), f"ExponentialDamping({name}=...)") > 0:
                raise ValueError(
                    f"ExponentialDamping({name}=0) is no factor away from any number: give one > 0, or use "
                    "LinearDamping."
                )
        _check_steps("ExponentialDamping", self.steps)

    def at(self, step: int) -> float:
        """Return lambda_k; exactly the final one at the end."""
        if step >= self.steps:
            return self.final
        part = step / self.steps
        return self.initial ** (1 - part) * self.final**part


@dataclass(frozen=True, kw_only=True)
class LinearDamping(DampingSchedule):
    r"""From one damping to another by the same difference at each step, then constant.

    .. math:: \lambda_k = \text{initial} + (\text{final} - \text{initial}) \min(k / n, 1)

    Args:
        initial: lambda_0 >= 0.
        final: lambda_n >= 0.
        steps: n >= 1.

    Example:
        >>> [LinearDamping(initial=1.0, final=0.0, steps=2).at(k) for k in range(4)]
        [1.0, 0.5, 0.0, 0.0]
    """

    initial: float
    final: float
    steps: int

    def __post_init__(self) -> None:
        for name in ("initial", "final"):
            checked_damping(getattr(self, name), f"LinearDamping({name}=...)")
        _check_steps("LinearDamping", self.steps)

    def at(self, step: int) -> float:
        """Return lambda_k; exactly the final one at the end."""
        if step >= self.steps:
            return self.final
        part = step / self.steps
        return (1 - part) * self.initial + part * self.final


@dataclass(frozen=True, repr=False)
class CustomDamping(DampingSchedule):
    """Any function of the number of steps.

    Checkpoints know the function by its name alone.

    Args:
        function: k -> lambda_k, a number >= 0.

    Example:
        >>> CustomDamping(lambda k: 1.0 / (1 + k)).at(3)
        0.25
    """

    function: Callable[[int], float]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"CustomDamping needs a function of the number of steps, got {self.function!r}.")

    def at(self, step: int) -> float:
        """Return lambda_k."""
        return self.function(step)

    def __repr__(self) -> str:
        # Without an address, which would make every process's checkpoints those of another control.
        return f"CustomDamping({getattr(self.function, '__qualname__', type(self.function).__qualname__)})"


def _check_steps(owner: str, steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{owner}(steps=...) must be an integer >= 1, got {steps!r}.")
