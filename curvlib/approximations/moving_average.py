"""Running averages of an approximation's statistics."""

from __future__ import annotations

from typing import Any

import torch

from curvlib.approximations.base import StatisticalApproximation, adds_up
from curvlib.approximations.running import RunningAverage, keys_of, running_average
from curvlib.approximations.statistics import Statistics
from curvlib.objective import Evaluation, Objective
from curvlib.operators import LinearOperator


class MovingAverage(RunningAverage):
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
        if not adds_up(approximation):
            raise TypeError(
                f"MovingAverage needs an approximation with statistics that average (KFAC, Diagonal, BlockDiagonal, "
                f"Dense, Identity), got {approximation!r}. (EKFAC has an EigenbasisAverage.)"
            )
        super().__init__(decay)
        self.approximation = approximation
        self._statistics: Statistics | None = None

    def update(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> bool:
        """Take in the statistics of one evaluation; return whether they were finite (others are left out, counted)."""
        statistics = self.approximation.statistics(evaluation, generator)
        if not statistics.is_finite():
            self.skipped += 1
            return False
        self._statistics = self._averaged(self._statistics, statistics)
        return True

    def operator(self, objective: Objective) -> LinearOperator:
        """Return the operator of the averaged statistics, the l2 term included.

        Raises:
            RuntimeError: there was no update with finite statistics yet.
        """
        return self.approximation.operator(objective, self._known(self._statistics))

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged tensors, their names and counts."""
        return {
            "approximation": repr(self.approximation),
            "updates": self.updates,
            "skipped": self.skipped,
            **state_of(self._statistics),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: the state is that of another approximation, or incomplete; nothing is changed.
        """
        self._check_state(state, self.approximation)
        statistics = statistics_of(state)
        self.updates, self.skipped, self._statistics = state["updates"], state["skipped"], statistics


@running_average.register
def _(approximation: StatisticalApproximation, decay: float) -> RunningAverage:
    return MovingAverage(approximation, decay)


def state_of(statistics: Statistics | None, **more: Any) -> dict[str, Any]:
    """Return the entries of a state dictionary for statistics, or for none yet, and more; keys name all tensors."""
    entries = {
        "means": dict(statistics.means) if statistics else None,
        "sums": dict(statistics.sums) if statistics else None,
        "roots": dict(statistics.roots) if statistics else None,
        **more,
    }
    return {**entries, "keys": keys_of(entries)}


def statistics_of(state: dict[str, Any]) -> Statistics | None:
    """Return the statistics of a state dictionary."""
    if state["means"] is None:
        return None
    return Statistics(*(dict(state[kind] or {}) for kind in ("means", "sums", "roots")))
