"""Running averages of an approximation's statistics."""

from __future__ import annotations

from typing import Any

import torch

from curvlib.approximations.base import StatisticalApproximation, Statistics
from curvlib.objective import Evaluation, Objective
from curvlib.operators import LinearOperator


class MovingAverage:
    """S_k = epsilon_k S_{k-1} + (1 - epsilon_k) s_k, epsilon_k = min(1 - 1/k, decay): de-biased from the first step.

    The plain average of the first updates, then an exponential one (Martens & Grosse 2015, sec. 5). It averages the
    *statistics* (for K-FAC: the factors), not the operators.

    Args:
        approximation: what to estimate on each batch.
        decay: weight of the past, in [0, 1); 0 keeps the last estimate alone. When statistics come every m steps,
            give decay^m.

    Attributes:
        updates: batches that the average has taken in.
        skipped: batches whose statistics were not finite; they left the average as it was.

    Example:
        >>> import curvlib
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> average = MovingAverage(curvlib.approximations.KFAC(curvlib.Fisher()), decay=0.95)
        >>> average.update(objective.at((torch.ones(4, 3), torch.zeros(4, 2))))
        True
        >>> average.operator(objective).shape
        (8, 8)
    """

    def __init__(self, approximation: StatisticalApproximation, decay: float = 0.95) -> None:
        if not isinstance(approximation, StatisticalApproximation):
            raise TypeError(
                f"MovingAverage needs an approximation with statistics that average (KFAC, Diagonal, BlockDiagonal, "
                f"Dense, Identity), got {approximation!r}."
            )
        if not (isinstance(decay, (int, float)) and 0 <= decay < 1):
            raise ValueError(f"MovingAverage needs 0 <= decay < 1, got {decay!r}.")
        self.approximation = approximation
        self.decay = float(decay)
        self.updates = 0
        self.skipped = 0
        self._statistics: Statistics | None = None

    def update(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> bool:
        """Take in the statistics of one evaluation; return whether they were finite (others are left out, counted)."""
        statistics = self.approximation.statistics(evaluation, generator)
        if not statistics.is_finite():
            self.skipped += 1
            return False
        self.updates += 1
        epsilon = min(1 - 1 / self.updates, self.decay)
        if self._statistics is None or epsilon == 0:
            self._statistics = statistics
        else:
            self._statistics = self._statistics.times(epsilon, epsilon) + statistics.times(1 - epsilon, 1 - epsilon)
        return True

    def operator(self, objective: Objective) -> LinearOperator:
        """Return the operator of the averaged statistics, the l2 term included.

        Raises:
            RuntimeError: there was no update with finite statistics yet.
        """
        if self._statistics is None:
            raise RuntimeError(
                f"MovingAverage has no statistics yet ({self.skipped} update(s) were not finite): call update first."
            )
        return self.approximation.operator(objective, self._statistics)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged tensors and counts."""
        statistics = self._statistics
        return {
            "approximation": repr(self.approximation),
            "updates": self.updates,
            "skipped": self.skipped,
            "means": dict(statistics.means) if statistics else None,
            "sums": dict(statistics.sums) if statistics else None,
            "roots": dict(statistics.roots) if statistics else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: the state is that of another approximation; nothing is changed.
        """
        if state["approximation"] != repr(self.approximation):
            raise ValueError(
                f"the state is that of a MovingAverage of {state['approximation']}, not of {self.approximation!r}."
            )
        self.updates, self.skipped = state["updates"], state["skipped"]
        empty = state["means"] is None
        kinds = (dict(state.get(kind) or {}) for kind in ("means", "sums", "roots"))
        self._statistics = None if empty else Statistics(*kinds)
