"""What keeps an approximation over many batches: the interface of running averages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import singledispatch
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.approximations.base import Approximation
from curvlib.approximations.statistics import Statistics
from curvlib.objective import Evaluation, Objective
from curvlib.operators import LinearOperator
from curvlib.operators.state import check_entries


class RunningAverage(ABC):
    """S_k = epsilon_k S_{k-1} + (1 - epsilon_k) s_k, epsilon_k = min(1 - 1/k, decay), of some statistics s_k.

    Attributes:
        cheap_inverse: whether inverses of its operators cost little beside a gradient: one is made at each step.
        reads_batches: whether :meth:`update` looks at the batch; where not, no statistics have to be made for it.
        decay: weight of the past, in [0, 1).
        updates: batches that the average has taken in.
        skipped: batches whose statistics were not finite; they left the average as it was.
    """

    cheap_inverse: ClassVar[bool] = False
    reads_batches: ClassVar[bool] = True

    def __init__(self, decay: float) -> None:
        if not (isinstance(decay, (int, float)) and 0 <= decay < 1):
            raise ValueError(f"{type(self).__name__} needs 0 <= decay < 1, got {decay!r}.")
        self.decay = float(decay)
        self.updates = 0
        self.skipped = 0

    @abstractmethod
    def update(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> bool:
        """Take in one evaluation; return whether its statistics were finite (others are left out, counted)."""

    def follow(self, evaluation: Evaluation, step: Float[Tensor, " D"]) -> None:  # noqa: B027 - most learn from batches
        """Learn that an optimizer takes a step (D,) from the parameters of an evaluation, before these are written."""

    @abstractmethod
    def operator(self, objective: Objective) -> LinearOperator:
        """Return the operator of the averaged statistics, the l2 term included.

        Raises:
            RuntimeError: there was no update with finite statistics yet.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the averaged tensors and counts."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: the state is that of another approximation, or incomplete; nothing is changed.
        """

    def _averaged(self, past: Statistics | None, statistics: Statistics) -> Statistics:
        """Count one more update and return the average with it."""
        self.updates += 1
        epsilon = min(1 - 1 / self.updates, self.decay)
        if past is None or epsilon == 0:
            return statistics
        return past.times(epsilon, epsilon) + statistics.times(1 - epsilon, 1 - epsilon)

    def _known(self, statistics: Statistics | None) -> Statistics:
        if statistics is None:
            raise RuntimeError(
                f"{type(self).__name__} has no statistics yet ({self.skipped} update(s) were not finite): call update "
                "first."
            )
        return statistics

    def _check_state(self, state: dict[str, Any], approximation: Approximation) -> None:
        """Refuse a state of another approximation, or one that lacks entries or tensors, before anything is changed."""
        owner = f"a {type(self).__name__} of {approximation!r}"
        check_entries(owner, state, self.state_dict())
        if state["approximation"] != repr(approximation):
            raise ValueError(
                f"the state is that of a {type(self).__name__} of {state['approximation']}, not of {approximation!r}."
            )
        lacking = sorted(set(state.get("keys", ())) - set(keys_of(state)))
        if lacking:
            raise ValueError(f"the state of {owner} is incomplete: it lacks {', '.join(lacking)}. Nothing was changed.")


def keys_of(state: dict[str, Any]) -> list[str]:
    """Return the names of all tensors in the state of an average, by which an incomplete one is told from a whole."""
    kinds = ("means", "sums", "roots", "bases")
    return [f"{kind}[{key}]" for kind in kinds for key in state.get(kind) or {}]


@singledispatch
def running_average(approximation: Approximation, decay: float) -> RunningAverage | None:
    """Return the running average that fits an approximation, None for one that has none (it is estimated anew).

    ``MovingAverage`` for approximations with statistics that average, ``EigenbasisAverage`` for ``EKFAC``,
    ``StepPairs`` for ``LBFGS``, ``SumOfAverages`` for sums with it; register a rule for another one with
    ``running_average.register``.

    Args:
        approximation: what to average over batches.
        decay: weight of the past, in [0, 1).
    """
    return None
