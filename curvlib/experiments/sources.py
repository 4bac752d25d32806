"""Where a problem's data come from. A new kind of data is one subclass of :class:`Source` and a task that knows it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar

from torch import Tensor


class Data(Protocol):
    """One part, training or test, of what a source has."""

    @property
    def inputs(self) -> Tensor:
        """What the network takes, one example a row."""

    @property
    def symbols(self) -> int | None:
        """Size of the alphabet, where the data themselves decide it and the network follows."""

    @property
    def fingerprint(self) -> str | None:
        """What tells data that a user brought along from others, None for data that are always the same."""


D_co = TypeVar("D_co", bound=Data, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The loss of an answer that has learned next to nothing: what a network must get below.

    Args:
        loss: without the l2 term.
        answer: what is answered, in words.
    """

    loss: float
    answer: str

    def __str__(self) -> str:
        return f"{self.loss:.4g} for {self.answer}"


class Source(ABC, Generic[D_co]):
    """A training part and a test part of some data.

    A subclass is a dataclass; fields that are declared with :func:`curvlib.experiments.options.option` can be set on
    the command line.
    """

    reads_files: ClassVar[bool] = False
    examples: ClassVar[str]

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, int] | None:
        """Number of training examples and of test examples, None where a user's file decides it."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where the data come from, in a few words."""

    @property
    def baseline(self) -> Baseline | None:
        """Loss of a trivial answer, where one is known."""
        return None

    @abstractmethod
    def load(self, path: Path | None) -> tuple[D_co, D_co]:
        """Return the training part and the test part.

        Args:
            path: file or folder of data; sources without files ignore it.

        Raises:
            ExperimentError: files are missing or damaged.
        """
