"""A line search for the strong Wolfe conditions.

Symbols: h objective, g gradient, Delta proposal, phi(t) = h(theta + t Delta), phi'(t) = g(theta + t Delta)^T Delta.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import inf, isfinite
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from scipy.optimize import line_search
from torch import Tensor

from curvlib.objective import Elsewhere
from curvlib.optimizers.proposal import Proposal
from curvlib.optimizers.situation import Situation
from curvlib.optimizers.step_rules import Choice, StepRule, predicted


@dataclass(frozen=True, kw_only=True)
class StrongWolfe(StepRule):
    r"""d = t Delta with the strong Wolfe conditions: h has fallen enough, and its slope has flattened enough.

    .. math:: \phi(t) \le \phi(0) + c_1 t \phi'(0), \qquad |\phi'(t)| \le c_2 |\phi'(0)|

    Nocedal & Wright, "Numerical Optimization" (2006), algorithms 3.5 and 3.6, as ``scipy.optimize.line_search`` has
    them: t = 1 first, doubled while the slope is steep, then zoomed in on by interpolation. h is that of the step's
    batch. A trial costs a forward pass, and a backward pass where its value is low enough. Departures: a value that is
    not finite counts as infinite; where no trial meets both conditions, the lowest that meets the first is taken, and
    where none does (or Delta is no direction of descent), the step is 0.

    Args:
        sufficient: c_1.
        flatness: c_2, above c_1; 0.9 for Newton directions, 0.1 for nearly exact searches.
        max_doublings: of t before the search gives up.
    """

    brings_values: ClassVar[bool] = True
    finds_length: ClassVar[bool] = True

    sufficient: float = 1e-4
    flatness: float = 0.9
    max_doublings: int = 10

    def __post_init__(self) -> None:
        if not (0 < self.sufficient < self.flatness < 1 and self.max_doublings >= 1):
            raise ValueError(f"StrongWolfe needs 0 < sufficient < flatness < 1 and max_doublings >= 1, got {self}.")

    def against_radius(self) -> str | None:
        """It is a second answer to the same question."""
        return "a line search and a trust region both answer a bad step by a shorter one, each on a model of its own"

    def choose(self, situation: Situation, proposal: Proposal, previous: Float[Tensor, " D"] | None) -> Choice:
        """Return the step of the length that was found."""
        line = _Line(situation, proposal.step)
        start, slope = float(situation.evaluation.value), float(situation.gradient @ proposal.step)
        # rho compares the whole step with the model: a short step fits any model
        judged = line.value(1.0)
        rate = self._rate(line, start, slope) if slope < 0 else 0.0
        return Choice(
            step=rate * proposal.step,
            prediction=predicted(situation, proposal, proposal.step),
            learning_rate=rate,
            value=line.value(rate) if rate else start,
            judged_value=judged,
        )

    def _rate(self, line: _Line, start: float, slope: float) -> float:
        with warnings.catch_warnings():
            # What the warning says is seen from the answer.
            warnings.filterwarnings("ignore", category=RuntimeWarning, module="scipy")
            warnings.filterwarnings("ignore", message=".*line search", category=RuntimeWarning)
            found, *_, last_slope = line_search(
                lambda t: line.value(float(t[0])),
                lambda t: np.array([line.slope(float(t[0]))]),
                np.zeros(1),
                np.ones(1),
                gfk=np.array([slope]),
                old_fval=start,
                c1=self.sufficient,
                c2=self.flatness,
                maxiter=self.max_doublings,
            )
        if found is not None and last_slope is not None:
            return float(found)
        enough = [(value, t) for t, value in line.values.items() if value <= start + self.sufficient * t * slope]
        return min(enough)[1] if enough else 0.0


class _Line:
    """phi and phi', each trial evaluated once."""

    def __init__(self, situation: Situation, step: Float[Tensor, " D"]) -> None:
        self._evaluation, self._step = situation.evaluation, step
        self._theta = situation.objective.parameter_vector()
        self.values: dict[float, float] = {}
        self._slopes: dict[float, float] = {}
        self._last: tuple[float, Elsewhere] | None = None  # the only trial whose graph is kept

    def value(self, t: float) -> float:
        if t not in self.values:
            self._last = None  # frees the graph before the next one is built
            self._last = t, self._evaluation.elsewhere(self._theta + t * self._step)
            value = float(self._last[1].value)
            self.values[t] = value if isfinite(value) else inf
        return self.values[t]

    def slope(self, t: float) -> float:
        if t not in self._slopes:
            if self._last is None or self._last[0] != t:
                self._last = t, self._evaluation.elsewhere(self._theta + t * self._step)
            self._slopes[t] = float(self._last[1].gradient() @ self._step)
            self._last = None
        return self._slopes[t]
