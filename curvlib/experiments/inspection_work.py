"""The order of an inspection: the exact matrix, then one approximation after another."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import curvlib
from curvlib.approximations import Approximation, Exact
from curvlib.experiments.clock import TrainingClock
from curvlib.experiments.curvatures import INSPECTED_MATRICES
from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.inspection import Inspected, InspectedRow, Inspection, Preparation
from curvlib.experiments.inspection_choice import NOT_APPLICABLE, Choice, refuse_if_none_applies
from curvlib.experiments.inspection_memory import bytes_of
from curvlib.operators import LinearOperator
from curvlib.spectra import SpectralMeasure

# A short estimate is made this often, and the shortest time counts.
_REPETITIONS, _SHORT_SECONDS = 3, 0.3
# Two approximations that differ by less, relative to the exact matrix, are one: float32 rounds in other orders.
SAME = 1e-5

Report = Callable[[str, float], None]


class StopInspection(Exception):  # noqa: N818 - no error: what has been looked at is kept
    """Raised by the ``report`` of an inspection to end it; the rows that are done are kept."""


class Work(ABC):
    """What is common to all ways to look at a matrix.

    Args:
        evaluation: the objective on a batch.
        inspection: what to look at.
        preparation: what is known of it.
        report: told what is done, and the part of it that is done.
    """

    def __init__(
        self, evaluation: curvlib.Evaluation, inspection: Inspection, preparation: Preparation, report: Report
    ) -> None:
        self.evaluation, self.inspection, self.report = evaluation, inspection, report
        self.selection, self._choices = preparation.selection, preparation.choices
        self._seen: list[tuple[InspectedRow, Tensor]] = []

    def same_as_earlier(
        self, name: str, operator: LinearOperator, products: Tensor, scale: float
    ) -> InspectedRow | None:
        """Return the row of an earlier approximation with the same entries, for this name; None where there is none.

        Norms of differences are those of products with random vectors: no matrices have to be kept for it.

        Args:
            name: of the approximation.
            operator: the approximation (D, D).
            products: those of the random vectors, on the selected coordinates.
            scale: the Frobenius norm of the exact matrix's products with them.
        """
        for earlier, other in self._seen:
            if float(torch.linalg.vector_norm(products - other)) <= SAME * scale:
                return dataclasses.replace(
                    earlier, name=name, same_as=earlier.name, memory=bytes_of(operator), density=None
                )
        return None

    def remember(self, row: InspectedRow, products: Tensor) -> InspectedRow:
        """Return a row after keeping it for :meth:`same_as_earlier`."""
        self._seen.append((row, products))
        return row

    @abstractmethod
    def look_at_exact(self, operator: LinearOperator) -> None:
        """Look at the exact matrix (D, D) of the whole model."""

    @abstractmethod
    def compare(self, name: str, operator: LinearOperator) -> InspectedRow:
        """Return what an approximation (D, D) of the whole model is beside it."""

    @abstractmethod
    def of_exact(self) -> dict[str, Any]:
        """Return what :class:`Inspected` says of the exact matrix."""

    def run(self) -> Inspected:
        """Look at the exact matrix, then at every approximation.

        Raises:
            ExperimentError: the exact matrix cannot be made, or no approximation applies.
        """
        with exact_matrix_can_be_made():
            operator = Exact(INSPECTED_MATRICES.get(self.inspection.matrix)).estimate(self.evaluation, self.draws())
            self.look_at_exact(operator)
        rows: list[InspectedRow] = []
        try:
            for choice in self._choices:
                rows.append(self._row(choice))
        except StopInspection:
            if not any(row.reason is None for row in rows):
                raise
        interrupted = tuple(choice.name for choice in self._choices[len(rows) :])
        refuse_if_none_applies(self.inspection.of, rows)
        return Inspected(
            inspection=self.inspection,
            selection=self.selection,
            rows=tuple(rows),
            unsupported=self.evaluation.plan.unsupported,
            interrupted=interrupted,
            **self.of_exact(),
        )

    def _row(self, choice: Choice) -> InspectedRow:
        name, approximation = choice.name, choice.approximation
        if approximation is None:
            return InspectedRow(name=name, reason=choice.reason, refuses_unsupported=choice.refuses_unsupported)
        self.report(name, 0.0)
        try:
            operator, seconds = self._timed(approximation)
            row = self.compare(name, operator)
            notes = [note for note in (choice.note, row.note) if note]
            row = dataclasses.replace(row, note="; ".join(notes) or None, seconds=seconds)
        except NOT_APPLICABLE as error:
            row = InspectedRow(name=name, reason=str(error))
        self.report(name, 1.0)
        return row

    def _timed(self, approximation: Approximation) -> tuple[LinearOperator, float]:
        shortest = float("inf")
        for _ in range(_REPETITIONS):
            clock = TrainingClock(self.evaluation.layout.device)
            with clock.running():
                operator = approximation.estimate(self.evaluation, self.draws())
            shortest = min(shortest, clock.seconds)
            if shortest > _SHORT_SECONDS:
                break
        return operator, shortest

    def density(self, operator: LinearOperator, name: str) -> SpectralMeasure | None:
        """Return the spectrum of an operator, None where none was asked for."""
        density = self.inspection.density
        if density is None:
            return None
        self.report(f"spectrum of {name}", 0.0)
        measure = density(operator, self.draws())
        self.report(f"spectrum of {name}", 1.0)
        return measure

    def draws(self) -> torch.Generator:
        """Return the source of random numbers, the same at every call."""
        return torch.Generator(self.evaluation.layout.device).manual_seed(self.inspection.seed)


@contextmanager
def exact_matrix_can_be_made() -> Iterator[None]:
    """Raise ExperimentError where the exact matrix is not for this model or machine."""
    try:
        yield
    except ExperimentError:
        raise
    except NOT_APPLICABLE as error:
        raise ExperimentError(f"The exact matrix cannot be made of this model: {error}") from error


def cosine(one: Tensor | None, other: Tensor | None) -> float | None:
    """Return the cosine of the angle between two steps, None where one does not exist or is 0."""
    if one is None or other is None:
        return None
    lengths = float(torch.linalg.vector_norm(one) * torch.linalg.vector_norm(other))
    return float(one @ other) / lengths if lengths > 0.0 else None
