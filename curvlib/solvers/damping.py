"""How the damping follows the quality of the quadratic model.

Symbols:
    h                     the objective, M its quadratic model, d a step
    rho                   reduction ratio (h(theta + d) - h(theta)) / (M(d) - M(0)); 1 where the model is exact
    lambda                the damping, in the units of the curvature matrix
    trace(C) / D          the mean curvature, the scale of the curvature matrix

A control is a frozen configuration, its state a value: ``state = control.update(state, rho)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf, isfinite, isnan
from typing import Any

from curvlib.solvers.damping_scale import AbsoluteFloor, DampingFloor, RelativeStart, checked_damping

# How much more damping is tried where C + lambda I is not positive definite, at least: with a smaller factor one
# indefinite point may take dozens of factorisations.
_LEAST_RAISE = 2.0


@dataclass(frozen=True, kw_only=True)
class DampingState:
    """What a damping control knows; a value, with a dictionary form for checkpoints.

    Attributes:
        damping: lambda for the next step.
        step: how many steps have been judged.
        rejected: how many of them were undone. A control counts those that it does not accept, an optimizer those that
            left the parameters as they were, which beside a line search are others.
        first: lambda of the first step, for floors and ends of solves that are relative to it; None where a state made
            by hand or by a third party's control has none. An optimizer keeps it beside every control.
    """

    damping: float
    step: int = 0
    rejected: int = 0
    first: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "damping", checked_damping(self.damping))
        if self.first is not None:
            object.__setattr__(self, "first", checked_damping(self.first, "DampingState(first=...)"))

    def state_dict(self) -> dict[str, float | int | None]:
        """Return the fields as plain numbers."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> DampingState:
        """Return the state that :meth:`state_dict` described.

        Raises:
            ValueError: a field is missing or unknown.
        """
        expected = {entry.name for entry in fields(cls)}
        if set(state) != expected:
            raise ValueError(f"A damping state has the entries {sorted(expected)}, got {sorted(state)}.")
        return cls(
            damping=float(state["damping"]),
            step=int(state["step"]),
            rejected=int(state["rejected"]),
            first=None if state["first"] is None else float(state["first"]),
        )


class DampingControl(ABC):
    """Chooses the damping of each step. A third party's control gives :meth:`start` and :meth:`update`."""

    @property
    def needs_gradient_curvature(self) -> bool:
        """Whether :meth:`start` looks at the curvature along the gradient, which costs a Jacobian-vector product."""
        return False

    @property
    def needs_mean_curvature(self) -> bool:
        """Whether :meth:`update` looks at the mean curvature, which may have to be estimated. Default: no."""
        return False

    @abstractmethod
    def start(self, *, gradient_curvature: float | None = None) -> DampingState:
        """Return the state before the first step.

        Args:
            gradient_curvature: g^T C g / g^T g at the first batch, for controls that start on the curvature's scale.
        """

    @abstractmethod
    def update(self, state: DampingState, ratio: float | None, *, mean_curvature: float | None = None) -> DampingState:
        """Return the state after a step.

        Args:
            state: the state that the step was made with.
            ratio: its reduction ratio, None where it was not computed because :meth:`needs_ratio` said so.
            mean_curvature: trace(C) / D or an estimate, for controls that follow the scale of the curvature; None where
                it is unknown, which an optimizer leaves it only if :attr:`needs_mean_curvature` is False.
        """

    @property
    def follows_ratio(self) -> bool:
        """Whether the damping answers to the quality of the steps; then a radius cannot do so as well. Default: yes."""
        return True

    def needs_ratio(self, state: DampingState) -> bool:
        """Return whether the next update looks at the ratio, which costs an evaluation of the objective."""
        return True

    def accept(self, ratio: float | None) -> bool:
        """Return whether a step of this ratio stays; False asks for it to be undone. Default: always."""
        return True

    @property
    def raises_damping(self) -> bool:
        """Whether :meth:`raised` has an answer where C + lambda I is not positive definite. Default: no."""
        return False

    def raised(self, state: DampingState) -> DampingState | None:
        """Return the state after a step that could not be made, since C + lambda I was not positive definite.

        Args:
            state: the state that the step was tried with.

        Returns:
            A state of a larger damping, None where there is none; the default. Then the optimizer raises the error.
        """
        return None


@dataclass(frozen=True)
class ConstantDamping(DampingControl):
    """The same damping at every step; every step stays.

    Args:
        value: the damping.
    """

    value: float

    def __post_init__(self) -> None:
        checked_damping(self.value, "ConstantDamping(value=...)")

    @property
    def follows_ratio(self) -> bool:
        """False."""
        return False

    def start(self, *, gradient_curvature: float | None = None) -> DampingState:
        """Return the state before the first step."""
        return DampingState(damping=self.value, first=self.value)

    def update(self, state: DampingState, ratio: float | None, *, mean_curvature: float | None = None) -> DampingState:
        """Count the step."""
        return replace(state, damping=self.value, step=state.step + 1)

    def needs_ratio(self, state: DampingState) -> bool:
        """Never."""
        return False


@dataclass(frozen=True, kw_only=True)
class LevenbergMarquardt(DampingControl):
    r"""Less damping where the model predicts well, more where it predicts badly.

    Every ``interval`` steps:

    .. math:: \rho > \text{high}: \lambda \leftarrow \text{decrease} \cdot \lambda, \qquad
        \rho < \text{low} \text{ or not finite}: \lambda \leftarrow \text{increase} \cdot \lambda

    Martens & Grosse (2015), section 6.5; More (1978). Departure: a rejected step raises the damping at once, whatever
    the interval, since the same step would otherwise be proposed again. Where C + lambda I is not positive definite,
    so that there is no step, the damping rises by ``increase`` and at least to its double (Nocedal & Wright, "Numerical
    Optimization", algorithm 3.3), up to the ceiling.

    Args:
        initial: lambda of the first step: a number between floor and ceiling, or a :class:`RelativeStart`, which is
            brought between them.
        decrease: factor after a good step, in (0, 1].
        increase: factor after a bad step, at least 1.
        low: a ratio below is bad.
        high: a ratio above is good.
        interval: steps from one adaptation to the next.
        floor: the least damping, :class:`AbsoluteFloor`, :class:`RelativeFloor` or :class:`StartFloor`.
        ceiling: the most damping; it yields to a floor that is relative to the curvature.
        reject_below: a step whose ratio is below is to be undone, so is one of ratio NaN. 0 rejects the steps that
            raise the objective, -inf none but those of ratio NaN. Beside a line search, which takes steps by values of
            its own, it undoes nothing: such a ratio, that of the whole step, raises the damping at once, and no more.

    Example:
        >>> control = LevenbergMarquardt(initial=1.0, decrease=0.5, increase=2.0, interval=1)
        >>> state = control.update(control.start(), 0.9)
        >>> state.damping, control.update(state, -0.2).damping, control.accept(-0.2)
        (0.5, 1.0, False)
    """

    initial: float | RelativeStart = 1.0
    decrease: float = 0.95**5
    increase: float = 0.95**-5
    low: float = 0.25
    high: float = 0.75
    interval: int = 5
    floor: DampingFloor = field(default_factory=AbsoluteFloor)
    ceiling: float = 1e12
    reject_below: float = 0.0

    @classmethod
    def martens_grosse(cls, *, initial: float | RelativeStart = 150.0, interval: int = 5) -> LevenbergMarquardt:
        """Return the settings of the K-FAC paper: omega = (19/20)^T1 every T1 = 5 steps, no floor, no step undone.

        Martens & Grosse (2015), section 6.5, lambda_0 = 150 as for its auto-encoders. The paper's ratio uses the
        damped model.
        """
        omega = (19 / 20) ** interval
        return cls(
            initial=initial,
            decrease=omega,
            increase=1 / omega,
            interval=interval,
            floor=AbsoluteFloor(),
            reject_below=-inf,
        )

    @classmethod
    def martens(cls, *, initial: float | RelativeStart = 1.0) -> LevenbergMarquardt:
        """Return the settings of Hessian-free optimisation: 2/3 and 3/2 at every step; worse steps are undone.

        Martens (2010), section 4.1. lambda_0 depends on the problem (0.1 in the recurrent experiments of Martens &
        Sutskever 2011). The released MATLAB code takes the undamped model in the ratio, the code for recurrent networks
        the damped one.
        """
        return cls(initial=initial, decrease=2 / 3, increase=3 / 2, interval=1, floor=AbsoluteFloor(), reject_below=0.0)

    def __post_init__(self) -> None:
        if not isinstance(self.initial, RelativeStart) and not checked_damping(
            self.initial, "LevenbergMarquardt(initial=...)"
        ):
            raise ValueError(
                "LevenbergMarquardt(initial=0) would stay 0, as the damping is multiplied: give a number > 0, or "
                "ConstantDamping(0.0)."
            )
        if not isinstance(self.floor, DampingFloor):
            raise TypeError(
                f"LevenbergMarquardt(floor=...) must be a DampingFloor such as AbsoluteFloor(0.1), got {self.floor!r}."
            )
        if not 0 < self.decrease <= 1:
            raise ValueError(f"LevenbergMarquardt(decrease=...) must lie in (0, 1], got {self.decrease!r}.")
        if not (isfinite(self.increase) and self.increase >= 1):
            raise ValueError(f"LevenbergMarquardt(increase=...) must be a finite number >= 1, got {self.increase!r}.")
        if not self.low <= self.high:
            raise ValueError(f"LevenbergMarquardt needs low <= high, got low={self.low!r}, high={self.high!r}.")
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f"LevenbergMarquardt(interval=...) must be an integer >= 1, got {self.interval!r}.")
        if not (isfinite(self.ceiling) and self.ceiling > 0):
            raise ValueError(f"LevenbergMarquardt(ceiling=...) must be a finite number > 0, got {self.ceiling!r}.")
        first = self.ceiling if isinstance(self.initial, RelativeStart) else float(self.initial)
        if not self._least_at_start(first) <= first <= self.ceiling:
            raise ValueError(
                f"LevenbergMarquardt needs floor <= initial <= ceiling, got {self.floor!r}, {self.initial!r}, "
                f"{self.ceiling!r}."
            )
        if isnan(self.reject_below):
            raise ValueError("LevenbergMarquardt(reject_below=...) must be a number or -inf, got NaN.")

    @property
    def needs_gradient_curvature(self) -> bool:
        """Whether the first damping is relative to it."""
        return isinstance(self.initial, RelativeStart)

    @property
    def needs_mean_curvature(self) -> bool:
        """Whether the floor does."""
        return self.floor.needs_mean_curvature

    def start(self, *, gradient_curvature: float | None = None) -> DampingState:
        """Return the state before the first step."""
        start = self.initial
        first = min(start.damping(gradient_curvature) if isinstance(start, RelativeStart) else start, self.ceiling)
        first = max(first, self._least_at_start(first))
        return DampingState(damping=first, first=first)

    def update(self, state: DampingState, ratio: float | None, *, mean_curvature: float | None = None) -> DampingState:
        """Return the state after a step of this ratio.

        Raises:
            ValueError: the ratio is None although :meth:`needs_ratio`, or the floor needs what is unknown.
        """
        if ratio is None and self.needs_ratio(state):
            raise ValueError("LevenbergMarquardt.update needs the reduction ratio at this step, got None.")
        rejected = not self.accept(ratio)
        damping = state.damping
        if ratio is not None and (rejected or self._adapts(state)):
            damping *= self._factor(ratio)
        # Above the ceiling only where the floor is: too little damping diverges, too much is merely slow.
        damping = max(min(damping, self.ceiling), self.floor.least(mean_curvature, state.first))
        return replace(state, damping=damping, step=state.step + 1, rejected=state.rejected + rejected)

    def needs_ratio(self, state: DampingState) -> bool:
        """Return whether the step is one that adapts the damping, or may be rejected."""
        return self._adapts(state) or self.reject_below > -inf

    def accept(self, ratio: float | None) -> bool:
        """Return whether a step of this ratio stays; one whose ratio was not computed does."""
        return ratio is None or ratio >= self.reject_below

    def _least_at_start(self, first: float) -> float:
        """Return the floor before the first step, 0 where that is unknown."""
        return 0.0 if self.floor.needs_mean_curvature else self.floor.least(None, first)

    @property
    def raises_damping(self) -> bool:
        """Whether the damping may rise at all."""
        return self.increase > 1

    def raised(self, state: DampingState) -> DampingState | None:
        """Return the state with more damping, None at the ceiling."""
        damping = min(state.damping * max(self.increase, _LEAST_RAISE), self.ceiling)
        if not (self.raises_damping and damping > state.damping):
            return None
        return replace(state, damping=damping, step=state.step + 1, rejected=state.rejected + 1)

    def _adapts(self, state: DampingState) -> bool:
        return (state.step + 1) % self.interval == 0

    def _factor(self, ratio: float) -> float:
        if not isfinite(ratio) or ratio < self.low or not self.accept(ratio):
            return self.increase
        return self.decrease if ratio > self.high else 1.0
