"""How the radius of a trust region follows the quality of the quadratic model.

Symbols: h the objective, M its quadratic model, d a step, Delta the radius, rho the reduction ratio
(h(theta + d) - h(theta)) / (M(d) - M(0)). A control is a frozen configuration, its state a value, as in
:mod:`curvlib.solvers.damping`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import inf, isfinite, isnan

from curvlib.solvers.descents.problem import checked_radius


@dataclass(frozen=True, kw_only=True)
class RadiusState:
    """What a radius control knows; a value, with a dictionary form for checkpoints.

    Attributes:
        radius: Delta for the next step.
        step: how many steps have been judged.
        rejected: how many of them were undone.
    """

    radius: float
    step: int = 0
    rejected: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", checked_radius(self.radius, "radius"))

    def state_dict(self) -> dict[str, float | int]:
        """Return the fields as plain numbers."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, float | int]) -> RadiusState:
        """Return the state that :meth:`state_dict` described.

        Raises:
            ValueError: a field is missing or unknown.
        """
        expected = {entry.name for entry in fields(cls)}
        if set(state) != expected:
            raise ValueError(f"A radius state has the entries {sorted(expected)}, got {sorted(state)}.")
        return cls(radius=float(state["radius"]), step=int(state["step"]), rejected=int(state["rejected"]))


@dataclass(frozen=True)
class RelativeRadius:
    """The first radius is a multiple of the length of the parameters: factor |theta|, and the factor at theta = 0.

    Where the region is one of scaled parameters, so is the length: |S theta|. In the norm of a preconditioner the
    length of the parameters is unknown, and it is refused. More (1978), section 6; MINPACK's ``factor``.

    Args:
        factor: greater than 0; MINPACK recommends 0.1 to 100.
    """

    factor: float = 10.0

    def __post_init__(self) -> None:
        if checked_radius(self.factor, "RelativeRadius(factor=...)") == inf:
            raise ValueError("RelativeRadius(factor=...) must be finite, got inf.")

    def radius(self, parameter_length: float | None) -> float:
        """Return factor |theta|.

        Raises:
            ValueError: the length is unknown or not finite.
        """
        if parameter_length is None or not isfinite(parameter_length):
            raise ValueError(
                f"RelativeRadius needs the finite length of the parameters, got {parameter_length!r}: pass "
                "parameter_length=float(theta.norm()) to start, or give the first radius as a number."
            )
        return self.factor * (parameter_length if parameter_length > 0 else 1.0)


class RadiusControl(ABC):
    """Chooses the radius of each step. A third party's control gives :meth:`start` and :meth:`update`."""

    @property
    def needs_parameter_length(self) -> bool:
        """Whether :meth:`start` looks at the length of the parameters; others are called without it. Default: no."""
        return False

    @abstractmethod
    def start(self, *, parameter_length: float | None = None) -> RadiusState:
        """Return the state before the first step.

        Args:
            parameter_length: |theta|, or |S theta| where the radius bounds |S d|.
        """

    @abstractmethod
    def update(
        self, state: RadiusState, ratio: float, *, on_boundary: bool, step_length: float | None = None
    ) -> RadiusState:
        """Return the state after a step.

        Args:
            state: the state that the step was made with.
            ratio: its reduction ratio; NaN and infinities are failures of the model.
            on_boundary: whether the step was stopped by the radius.
            step_length: of d in the norm that the radius bounds, which may be far below the radius.
        """

    def accept(self, ratio: float) -> bool:
        """Return whether a step of this ratio stays; False asks for it to be undone. Default: unless it is NaN."""
        return not isnan(ratio)


@dataclass(frozen=True, kw_only=True)
class TrustRegion(RadiusControl):
    r"""A wider region where the model predicts well and the region was in the way, a narrower one after a bad step.

    .. math:: \rho < \text{low} \text{ or not finite}: \Delta \leftarrow \text{shrink} \cdot \Delta, \qquad
        \rho > \text{high} \text{ and } |d| = \Delta: \Delta \leftarrow \min(\text{grow} \cdot \Delta, \text{ceiling})

    Nocedal & Wright, "Numerical Optimization" (2006), algorithm 4.1. Departures: where the length of a bad step is
    given, the radius shrinks from that if it is smaller (as in their first edition), since the same step would be
    proposed again otherwise; a floor.

    Args:
        initial: Delta of the first step, in the units of the parameters or of the norm of the region, or a
            :class:`RelativeRadius`.
        shrink: factor after a bad step, in (0, 1).
        grow: factor after a good step to the boundary, at least 1.
        low: a ratio below is bad.
        high: a ratio above is good.
        floor: the least radius.
        ceiling: the largest radius.
        reject_below: eta, a step whose ratio is below is to be undone, so is one whose ratio is NaN or infinite; at
            most ``low``.

    Example:
        >>> control = TrustRegion(initial=1.0)
        >>> state = control.update(control.start(), 0.9, on_boundary=True)
        >>> state.radius, control.update(state, 0.1, on_boundary=True).radius, control.accept(-0.2)
        (2.0, 0.5, False)
    """

    initial: float | RelativeRadius = 1.0
    shrink: float = 0.25
    grow: float = 2.0
    low: float = 0.25
    high: float = 0.75
    floor: float = 1e-12
    ceiling: float = 1e12
    reject_below: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            ("floor", "ceiling") if isinstance(self.initial, RelativeRadius) else ("initial", "floor", "ceiling")
        ):
            value = checked_radius(getattr(self, name), f"TrustRegion({name}=...)")
            if value == inf:
                raise ValueError(f"TrustRegion({name}=...) must be finite, got inf.")
        first = self.floor if isinstance(self.initial, RelativeRadius) else self.initial
        if not self.floor <= first <= self.ceiling:
            raise ValueError(
                f"TrustRegion needs floor <= initial <= ceiling, got {self.floor!r}, "
                f"{self.initial!r}, {self.ceiling!r}."
            )
        if not 0 < self.shrink < 1:
            raise ValueError(f"TrustRegion(shrink=...) must lie in (0, 1), got {self.shrink!r}.")
        if not (isfinite(self.grow) and self.grow >= 1):
            raise ValueError(f"TrustRegion(grow=...) must be a finite number >= 1, got {self.grow!r}.")
        if not self.low <= self.high:
            raise ValueError(f"TrustRegion needs low <= high, got low={self.low!r}, high={self.high!r}.")
        if not self.reject_below <= self.low:
            raise ValueError(
                f"TrustRegion needs reject_below <= low, got reject_below={self.reject_below!r}, low={self.low!r}: "
                "a step that is undone has to shrink the radius, or it would be proposed again."
            )

    @property
    def needs_parameter_length(self) -> bool:
        """Whether the first radius is relative to it."""
        return isinstance(self.initial, RelativeRadius)

    def start(self, *, parameter_length: float | None = None) -> RadiusState:
        """Return the state before the first step."""
        if isinstance(self.initial, RelativeRadius):
            return RadiusState(radius=max(min(self.initial.radius(parameter_length), self.ceiling), self.floor))
        return RadiusState(radius=self.initial)

    def update(
        self, state: RadiusState, ratio: float, *, on_boundary: bool, step_length: float | None = None
    ) -> RadiusState:
        """Return the state after a step of this ratio."""
        radius = state.radius
        if not isfinite(ratio) or ratio < self.low:
            # A length that is not finite, or 0, says nothing.
            shorter = step_length is not None and 0 < step_length < radius
            radius = self.shrink * (step_length if shorter and step_length is not None else radius)
        elif ratio > self.high and on_boundary:
            radius = self.grow * radius
        radius = max(min(radius, self.ceiling), self.floor)
        return RadiusState(radius=radius, step=state.step + 1, rejected=state.rejected + (not self.accept(ratio)))

    def accept(self, ratio: float) -> bool:
        """Return whether a step of this ratio stays."""
        return isfinite(ratio) and ratio >= self.reject_below
