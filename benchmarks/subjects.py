"""What a benchmark consists of: subjects that are measured, and targets that their ratios should meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.workload import Problem, Workload

GRADIENT = "gradient"

Call = Callable[[], Any]


def no_note(result: Any) -> str:
    """Say nothing about a result."""
    return ""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One thing that is measured.

    Attributes:
        name: as it appears in the report; the library first.
        prepare: makes the function to be timed from a workload of its own; what it computes is not timed.
        units: units of work in one call; ratios are per unit.
        most_repeats: a limit for calls that take many gradients.
        note: a few words for the report, from the result of a call.
    """

    name: str
    prepare: Callable[[Workload], Call]
    units: int = 1
    most_repeats: int | None = None
    note: Callable[[Any], str] = no_note


@dataclass(frozen=True, kw_only=True)
class Target:
    """The ratio that a subject should not exceed.

    Attributes:
        subject: its name.
        at_most: the ratio.
        reference: name of another subject, or the plain gradient.
    """

    subject: str
    at_most: float
    reference: str = GRADIENT


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Subjects on one problem.

    Attributes:
        name: what ``--only`` takes.
        title: a heading for the report.
        problem: the network and the batch.
        subjects: what is measured.
        targets: what should be met.
    """

    name: str
    title: str
    problem: Problem
    subjects: tuple[Subject, ...]
    targets: tuple[Target, ...] = ()

    def subject(self, name: str) -> Subject:
        """Return a subject by name; ``gradient`` is one of every benchmark.

        Raises:
            KeyError: there is none of this name.
        """
        for subject in (PLAIN_GRADIENT, *self.subjects):
            if subject.name == name:
                return subject
        raise KeyError(f"benchmark {self.name!r} has no subject {name!r}.")


PLAIN_GRADIENT = Subject(name=GRADIENT, prepare=lambda workload: workload.gradient)
