"""Running averages of curvatures that learn from the steps of an optimizer: L-BFGS, and sums with it.

Symbols: s (D,) a step, y (D,) the change of the loss's gradient along it, on the batch of the step, eta the l2 weight.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.approximations.base import StatisticalWeightedSum, WeightedSum, with_l2
from curvlib.approximations.lbfgs import LBFGS
from curvlib.approximations.moving_average import MovingAverage
from curvlib.approximations.running import RunningAverage, running_average
from curvlib.objective import Evaluation, Objective
from curvlib.operators import LinearOperator


class StepPairs(RunningAverage):
    """The pairs (s, y) of :class:`LBFGS` over the steps of an optimizer, and the l2 term.

    y is the change of the loss's gradient on one batch, that of the step, also where batches differ: one more gradient
    a step.
    Nothing is averaged, and the decay has no meaning.

    Args:
        approximation: memory, rule for the pairs, delta, and pairs to begin with.
        decay: not used.

    Attributes:
        updates: pairs taken in.
        skipped: pairs left out, because of their curvature or because they were not finite.
    """

    cheap_inverse: ClassVar[bool] = True
    reads_batches: ClassVar[bool] = False

    def __init__(self, approximation: LBFGS, decay: float = 0.0) -> None:
        super().__init__(decay)
        self.approximation = approximation
        self._history = approximation.start()

    def update(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> bool:
        """Do nothing: a batch alone makes no pair."""
        return True

    def follow(self, evaluation: Evaluation, step: Float[Tensor, " D"]) -> None:
        """Take in the pair of a step from the parameters of an evaluation."""
        objective = evaluation.objective
        after = evaluation.elsewhere(objective.parameter_vector() + step).gradient()
        self._history.update(step, after - evaluation.gradient() - objective.l2 * step)
        self.updates, self.skipped = self._history.updates, self._history.skipped

    def operator(self, objective: Objective) -> LinearOperator:
        """Return B + eta I, with B = delta I before the first pair."""
        return with_l2(self._history.operator(objective), objective)

    def state_dict(self) -> dict[str, Any]:
        """Return the pairs and counts."""
        return self._history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: the state is that of another configuration, or incomplete; nothing is changed.
        """
        self._history.load_state_dict(state)
        self.updates, self.skipped = self._history.updates, self._history.skipped


class SumOfAverages(RunningAverage):
    """The running averages of the parts of a weighted sum, one of which learns from steps.

    Args:
        approximation: the sum.
        decay: weight of the past, in [0, 1).

    Attributes:
        updates: batches that the averages have taken in.
        skipped: batches that one of them has left out, because its statistics were not finite.

    Raises:
        TypeError: a part has no running average.
    """

    cheap_inverse: ClassVar[bool] = True

    def __init__(self, approximation: WeightedSum, decay: float = 0.95) -> None:
        super().__init__(decay)
        self.approximation = approximation
        self._averages: list[RunningAverage] = []
        for _, part in approximation.parts:
            average = running_average(part, decay)
            if average is None:
                raise TypeError(
                    f"{part!r} is estimated anew at each step, and a part of {approximation!r} learns from steps: add "
                    "approximations that have a running average, such as KFAC, EKFAC, Diagonal or Identity."
                )
            self._averages.append(average)

    def update(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> bool:
        """Let every part take in the evaluation; return whether the statistics of all were finite."""
        taken = [average.update(evaluation, generator) for average in self._averages]
        self.updates += 1
        self.skipped += not all(taken)
        return all(taken)

    def follow(self, evaluation: Evaluation, step: Float[Tensor, " D"]) -> None:
        """Let every part learn of the step."""
        for average in self._averages:
            average.follow(evaluation, step)

    def operator(self, objective: Objective) -> LinearOperator:
        """Return the weighted sum, the l2 term included once."""
        return self.approximation.combined([average.operator(objective) for average in self._averages], objective)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the parts and the counts."""
        return {
            "approximation": repr(self.approximation),
            "updates": self.updates,
            "skipped": self.skipped,
            "parts": [average.state_dict() for average in self._averages],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: the state is that of another approximation, or incomplete; nothing is changed.
        """
        self._check_state(state, self.approximation)
        if len(state["parts"]) != len(self._averages):
            raise ValueError(
                f"the state has {len(state['parts'])} parts, and {self.approximation!r} {len(self._averages)}."
            )
        before = [average.state_dict() for average in self._averages]
        try:
            for average, part in zip(self._averages, state["parts"], strict=True):
                average.load_state_dict(part)
        except Exception:  # all parts or none
            for average, part in zip(self._averages, before, strict=True):
                average.load_state_dict(part)
            raise
        self.updates, self.skipped = state["updates"], state["skipped"]


@running_average.register
def _(approximation: LBFGS, decay: float) -> RunningAverage:
    return StepPairs(approximation, decay)


@running_average.register
def _(approximation: WeightedSum, decay: float) -> RunningAverage | None:
    return SumOfAverages(approximation, decay) if approximation.follows_steps else None


@running_average.register
def _(approximation: StatisticalWeightedSum, decay: float) -> RunningAverage:
    return MovingAverage(approximation, decay)
