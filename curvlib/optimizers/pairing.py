"""Which directions, step rules and controls go together, said before the first step."""

from __future__ import annotations

from curvlib.optimizers.control import StepControl
from curvlib.optimizers.proposal import Direction
from curvlib.optimizers.step_rules import StepRule
from curvlib.solvers import RatioConvention


def check_pairing(direction: Direction, step_rule: StepRule, control: StepControl, ratio: RatioConvention) -> None:
    """Refuse parts of an optimizer that make no sense together.

    Raises:
        TypeError: a part is of another kind.
        ValueError: the parts do not go together; the reason.
    """
    if not isinstance(direction, Direction):
        raise TypeError(f"SecondOrderOptimizer needs direction to be a Direction, got {direction!r}.")
    if not isinstance(step_rule, StepRule):
        raise TypeError(f"SecondOrderOptimizer needs step_rule to be a StepRule, got {step_rule!r}.")
    if not isinstance(ratio, RatioConvention):
        raise TypeError(f"SecondOrderOptimizer needs ratio to be a RatioConvention, got {ratio!r}.")
    if ratio.slopes_below > 0.0 and step_rule.brings_values:
        raise ValueError(
            f"{ratio!r} would take no slopes: {type(step_rule).__name__} judges steps by the values of its own search. "
            "Use UndampedRatio() or DampedRatio() with a line search, or FixedLength()."
        )
    if not direction.has_radius:
        if control.radius is not None:
            raise ValueError(
                f"{control.radius!r} would control nothing: the steps of {direction.description()} have no radius. Use "
                "ModelDescent with Steihaug, Dogleg, MoreSorensen or TwoDimensionalSubspace, or a damping control such "
                "as LevenbergMarquardt."
            )
        _check_damping(direction, step_rule, control)
        return
    if control.radius is None:
        raise ValueError(
            f"{direction.description()} needs a radius, which {control.damping!r} does not give: use "
            "radius=TrustRegion(), or ModelDescent with DampedNewton for a damping alone."
        )
    if control.needs_parameter_length and not direction.knows_lengths:
        raise ValueError(
            f"{control.radius!r} starts at a multiple of the length of the parameters, and the region of "
            f"{direction.description()} has a norm that is known along its own steps alone: give the first radius as a "
            "number, or use EuclideanNorm()."
        )
    reason = step_rule.against_radius()
    if reason is not None:
        raise ValueError(
            f"{step_rule!r} does not go with a radius: {reason}. Use FixedLength() with {direction.description()}."
        )


def _check_damping(direction: Direction, step_rule: StepRule, control: StepControl) -> None:
    """Refuse a damping that stays what it is beside a direction or a rule that may need more."""
    if direction.needs_damping and not control.raises_damping:
        raise ValueError(
            f"C + damping I of {direction.description()} may be indefinite, and {control.damping!r} does not raise the "
            "damping where it is, so that some step would fail or go uphill. Use LevenbergMarquardt(...), which keeps "
            "its damping otherwise with decrease=1.0; Steihaug() or MoreSorensen() in a trust region; TruncatedNewton "
            "with a line search; or a curvature of GGN() or Fisher()."
        )
    if direction.may_lack_length and not (step_rule.finds_length or control.raises_damping):
        raise ValueError(
            f"{direction.description()} goes along -g where its C + damping I has negative curvature there, "
            f"{step_rule!r} finds no length for that, and {control.damping!r} does not raise the damping. Use "
            "BacktrackingLineSearch(), LevenbergMarquardt(...), or a curvature of GGN() or Fisher()."
        )
    if step_rule.needs_damping and not control.raises_damping:
        raise ValueError(
            f"the model of {step_rule!r} may be indefinite, and {control.damping!r} does not raise the damping where "
            "it has no minimum, so that there would be no step from there. Use LevenbergMarquardt(...), or a model "
            "with GGN() or Fisher()."
        )
    reason = step_rule.against_indefinite()
    if direction.solves_indefinite and reason is not None:
        raise ValueError(
            f"{step_rule!r} does not go with {direction.description()}, whose C + damping I may be indefinite: "
            f"{reason}. Use FixedLength() or a line search, or a curvature of GGN() or Fisher()."
        )
