"""How long to train: a number of steps, of epochs, or of seconds; and when to look at the network meanwhile."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from curvlib.experiments.errors import ExperimentError


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come.

    Args:
        step: parameter updates.
        epoch: passes over the training data, counted by the examples that were drawn.
        seconds: of training alone.
    """

    step: int = 0
    epoch: float = 0.0
    seconds: float = 0.0


class Budget(ABC):
    """What a run may spend: a count of steps, epochs or seconds."""

    count: float

    @abstractmethod
    def fraction(self, progress: Progress) -> float:
        """Return the part that is spent, 1 or more at the end."""


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ExperimentError(f"{name} must be a finite number above 0, got {value!r}.")


@dataclass(frozen=True)
class Steps(Budget):
    """A number of parameter updates.

    Example:
        >>> Steps(100).fraction(Progress(step=25))
        0.25
    """

    count: int

    def __post_init__(self) -> None:
        _check_positive("steps", self.count)

    def fraction(self, progress: Progress) -> float:
        """Return the part that is spent."""
        return progress.step / self.count

    def __str__(self) -> str:
        return f"{self.count} step" + "s" * (self.count != 1)


@dataclass(frozen=True)
class Epochs(Budget):
    """A number of passes over the training data, which need not be whole."""

    count: float

    def __post_init__(self) -> None:
        _check_positive("epochs", self.count)

    def fraction(self, progress: Progress) -> float:
        """Return the part that is spent."""
        return progress.epoch / self.count

    def __str__(self) -> str:
        return f"{self.count:.12g} epoch" + "s" * (self.count != 1)


@dataclass(frozen=True)
class Seconds(Budget):
    """Seconds of training, without the time that evaluations and checkpoints take."""

    count: float

    def __post_init__(self) -> None:
        _check_positive("seconds", self.count)

    def fraction(self, progress: Progress) -> float:
        """Return the part that is spent."""
        return progress.seconds / self.count

    def __str__(self) -> str:
        return f"{self.count:.12g} s"


def budget_from_text(text: str) -> Budget | None:
    """Return the budget that ``str`` turned into a text, None if it was none.

    Example:
        >>> budget_from_text(str(Epochs(2.5)))
        Epochs(count=2.5)
    """
    amount, _, unit = text.partition(" ")
    try:
        match unit:
            case "step" | "steps":
                return Steps(int(amount))
            case "epoch" | "epochs":
                return Epochs(float(amount))
            case "s":
                return Seconds(float(amount))
    except ValueError:
        pass
    return None


@dataclass(frozen=True, kw_only=True)
class EvaluationSchedule:
    """Evaluations at the fractions (i / count)^2 of the budget: often at first, where the loss falls fast.

    The schedule has no memory, so a resumed run evaluates where an uninterrupted one does.

    Args:
        count: number of evaluations after the one of the initial parameters.
    """

    count: int = 40

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ExperimentError(f"The number of evaluations must be at least 1, got {self.count}.")

    def is_due(self, before: float, after: float) -> bool:
        """Whether a step that took the spent fraction from before to after passed the time of an evaluation."""
        return after >= 1.0 or math.floor(self.count * math.sqrt(after)) > math.floor(self.count * math.sqrt(before))
