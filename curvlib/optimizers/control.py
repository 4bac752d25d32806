"""What decides about the size of steps: a damping, and where there is one a radius.

Symbols: lambda damping, Delta radius, rho reduction ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from curvlib.operators.state import check_entries
from curvlib.solvers import ConstantDamping, DampingControl, DampingState, RadiusControl, RadiusState


@dataclass(frozen=True, kw_only=True)
class ControlState:
    """What the controls know; a value, with a dictionary form for checkpoints.

    Attributes:
        damping: the state of the damping; its first damping is known, whatever the control.
        radius: that of the radius, None where there is none.
    """

    damping: DampingState
    radius: RadiusState | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both."""
        return {
            "damping": self.damping.state_dict(),
            "radius": None if self.radius is None else self.radius.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ControlState:
        """Return the state that :meth:`state_dict` described.

        Raises:
            ValueError: an entry is missing or unknown, or the first damping is.
        """
        entries = [entry.name for entry in fields(cls)]
        check_entries("the control", state, entries)
        check_entries("the damping", state["damping"], [entry.name for entry in fields(DampingState)])
        if state["damping"]["first"] is None:
            raise ValueError(
                "the state of the damping has no first damping (first=None), which the ends of solves are relative to: "
                "it is that of an earlier version. Start again from the parameters, or enter the damping of the first "
                "step."
            )
        radius = state["radius"]
        if radius is not None:
            check_entries("the radius", radius, [entry.name for entry in fields(RadiusState)])
        return cls(
            damping=DampingState.from_state_dict(state["damping"]),
            radius=None if radius is None else RadiusState.from_state_dict(radius),
        )


@dataclass(frozen=True, kw_only=True)
class StepControl:
    """A damping control alone, or a radius control with a damping that does not follow the ratio.

    Args:
        damping: lambda of each step; None is 0, where there is a radius.
        radius: Delta of each step, or None.

    Raises:
        TypeError: a control is of another kind, or there is none.
        ValueError: both follow the ratio.
    """

    damping: DampingControl
    radius: RadiusControl | None = None

    @classmethod
    def of(cls, damping: DampingControl | None, radius: RadiusControl | None) -> StepControl:
        """Return the control that the arguments of an optimizer describe."""
        if damping is None and radius is None:
            raise TypeError(
                "SecondOrderOptimizer needs a control of the step: damping=LevenbergMarquardt(...) or another damping "
                "control, or radius=TrustRegion(...)."
            )
        return cls(damping=ConstantDamping(0.0) if damping is None else damping, radius=radius)

    def __post_init__(self) -> None:
        if not isinstance(self.damping, DampingControl):
            raise TypeError(
                f"SecondOrderOptimizer needs damping to be a DampingControl such as ConstantDamping(1e-3), got "
                f"{self.damping!r}."
            )
        if self.radius is None:
            return
        if not isinstance(self.radius, RadiusControl):
            raise TypeError(
                f"SecondOrderOptimizer needs radius to be a RadiusControl such as TrustRegion(), got {self.radius!r}."
            )
        if self.damping.follows_ratio:
            raise ValueError(
                f"{self.damping!r} and {self.radius!r} would both answer to the reduction ratio, and each would undo "
                "what the other has learned: give one of them. A damping that does not follow the ratio, such as "
                "ConstantDamping or a schedule, goes with a radius."
            )

    def needs_ratio(self, state: ControlState) -> bool:
        """Return whether the next update looks at the ratio."""
        return self.radius is not None or self.damping.needs_ratio(state.damping)

    @property
    def needs_mean_curvature(self) -> bool:
        """Whether :meth:`update` looks at the mean curvature."""
        return self.damping.needs_mean_curvature

    @property
    def needs_parameter_length(self) -> bool:
        """Whether :meth:`start` looks at the length of the parameters."""
        return self.radius is not None and self.radius.needs_parameter_length

    @property
    def starts_with_a_batch(self) -> bool:
        """Whether :meth:`start` looks at something that the first batch tells."""
        return self.damping.needs_gradient_curvature or self.needs_parameter_length

    def start(self, *, gradient_curvature: float | None = None, parameter_length: float | None = None) -> ControlState:
        """Return the state before the first step; arguments as in the controls' own ``start``."""
        radius = None
        if self.radius is not None:
            known = {"parameter_length": parameter_length} if self.needs_parameter_length else {}
            radius = self.radius.start(**known)
        damping = self.damping.start(gradient_curvature=gradient_curvature)
        return ControlState(damping=_with_first(damping, damping.damping), radius=radius)

    def loaded(self, state: Mapping[str, Any] | None) -> ControlState | None:
        """Return the state that a checkpoint holds, None for that of before a first batch.

        Raises:
            ValueError: the state is incomplete, or one without a radius where there is one, or the other way round.
        """
        if state is None:
            if not self.starts_with_a_batch:
                raise ValueError(
                    "the state of the control is incomplete: it is None, and it has a damping from the start."
                )
            return None
        known = ControlState.from_state_dict(state)
        if (known.radius is None) != (self.radius is None):
            raise ValueError(
                f"the state of the control has the radius {known.radius!r}, which {self.radius!r} does not fit."
            )
        return known

    def accept(self, ratio: float | None) -> bool:
        """Return whether a step of this ratio stays."""
        if self.radius is None:
            return self.damping.accept(ratio)
        return ratio is not None and self.radius.accept(ratio)

    @property
    def raises_damping(self) -> bool:
        """Whether more damping answers a C + lambda I that is not positive definite."""
        return self.radius is None and self.damping.raises_damping

    def raised(self, state: ControlState) -> ControlState | None:
        """Return the state with more damping after a step that could not be made, None where there is none."""
        damping = self.damping.raised(state.damping) if self.raises_damping else None
        if damping is None:
            return None
        damping = replace(damping, rejected=state.damping.rejected + 1)
        return ControlState(damping=_with_first(damping, state.damping.first))

    def update(
        self,
        state: ControlState,
        ratio: float | None,
        *,
        mean_curvature: float | None,
        on_boundary: bool,
        step_length: float | None,
        accepted: bool,
    ) -> ControlState:
        """Return the state after a step; arguments as in the controls' own methods, and whether the step is taken.

        A step that the radius rejects does not move the damping, which has no part in that. A line search decides by
        itself which steps are taken, and the control beside it does not know.
        """
        if self.radius is None or state.radius is None or ratio is None:
            return ControlState(damping=self._next_damping(state, ratio, mean_curvature, accepted))
        radius = self.radius.update(state.radius, ratio, on_boundary=on_boundary, step_length=step_length)
        damping = state.damping
        if self.radius.accept(ratio):
            damping = self._next_damping(state, ratio, mean_curvature, accepted)
        return ControlState(damping=damping, radius=radius)

    def _next_damping(
        self, state: ControlState, ratio: float | None, mean_curvature: float | None, accepted: bool
    ) -> DampingState:
        damping = self.damping.update(state.damping, ratio, mean_curvature=mean_curvature)
        damping = replace(damping, rejected=state.damping.rejected + (not accepted))
        return _with_first(damping, state.damping.first)


def _with_first(damping: DampingState, first: float | None) -> DampingState:
    """Return the state with the first damping, where a control has kept none."""
    return damping if damping.first is not None else replace(damping, first=first)
