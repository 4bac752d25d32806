"""What a step was worth: the change of the objective and the reduction ratio.

Symbols: h objective, g gradient, d step.
"""

from __future__ import annotations

from math import nan

from curvlib.optimizers.situation import Situation
from curvlib.optimizers.step_rules import Choice
from curvlib.solvers import RatioConvention


def judge(
    situation: Situation, choice: Choice, convention: RatioConvention, *, needed: bool, moves: bool
) -> tuple[float | None, float | None]:
    """Return h(theta + d) - h(theta) and the reduction ratio, where they are known or needed.

    The ratio is NaN where there is no step, since the rule has found none or the direction has proposed none: two
    changes of 0 would pass for agreement.

    Args:
        situation: of the step.
        choice: of the rule.
        convention: of the ratio.
        needed: whether the control looks at the ratio.
        moves: whether the choice or the proposal, which a line search is judged by, is another step than 0.
    """
    evaluation = situation.evaluation
    before, dtype = float(evaluation.value), evaluation.outputs.dtype
    judged = choice.judged_value if choice.judged_value is not None else choice.value
    if judged is None and not needed:
        return None, None
    if not moves or (judged is None and choice.learning_rate == 0):
        return 0.0, nan
    if judged is None:
        small = convention.slopes_below * abs(before)
        if abs(convention.predicted_change(choice.prediction)) <= small:
            return _judge_by_slopes(situation, choice, convention, small)
        judged = float(evaluation.value_at(situation.objective.parameter_vector() + choice.step))
    ratio = convention.ratio(judged - before, choice.prediction, value=before, dtype=dtype)
    after = choice.value if choice.value is not None else judged
    return after - before, ratio


def _judge_by_slopes(
    situation: Situation, choice: Choice, convention: RatioConvention, small: float
) -> tuple[float, float]:
    """Return the same, from the slopes at both ends if the change is small."""
    evaluation = situation.evaluation
    there = evaluation.elsewhere(situation.objective.parameter_vector() + choice.step)
    before, dtype = float(evaluation.value), evaluation.outputs.dtype
    actual = float(there.value) - before
    if not abs(actual) <= small:
        return actual, convention.ratio(actual, choice.prediction, value=before, dtype=dtype)
    actual = 0.5 * float((situation.gradient + there.gradient()) @ choice.step)
    # Slopes know no rounding errors of h: every change counts.
    return actual, convention.ratio(actual, choice.prediction, value=0.0, dtype=dtype)
