r"""Looks at a curvature matrix beside its approximations, on the coordinates of some layers.

Symbols: C (d, d) the exact matrix on the selected coordinates, B (d, d) an approximation there, g (d,) the gradient,
lambda the damping.

==================  ===========================================================
error               :math:`\|B - C\|_F / \|C\|_F`
spectral error      :math:`\|B - C\|_2 / \|C\|_2`
cosine of steps     of :math:`(C + \lambda I)^{-1} g` and :math:`(B + \lambda I)^{-1} g`
error of a layer    :math:`\|B_{ll} - C_{ll}\|_F / \|C_{ll}\|_F`
==================  ===========================================================

The inverse on selected coordinates is the inverse of the submatrix: all other parameters are held fixed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

import curvlib
from curvlib.approximations import Approximation, Exact
from curvlib.experiments.clock import TrainingClock
from curvlib.experiments.curvatures import INSPECTED_APPROXIMATIONS, INSPECTED_MATRICES
from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.inspection_choice import (
    NOT_APPLICABLE,
    ON_UNSUPPORTED,
    REFERENCES,
    Choice,
    choices_for,
    refuse_if_none_applies,
)
from curvlib.experiments.inspection_matrix import Looked, damped_step, look, relative_error, spectral_norm
from curvlib.experiments.inspection_memory import bytes_of, check_selection
from curvlib.experiments.inspection_selection import Selection, select
from curvlib.operators import LinearOperator
from curvlib.spectra import SpectralDensity, SpectralMeasure

# A short estimate is made this often, and the shortest time counts.
_REPETITIONS, _SHORT_SECONDS = 3, 0.3
# Two approximations that differ by less, relative to the matrix, are one: float32 rounds in other orders. Norms of
# differences are those of products with this many random vectors, so that no matrices have to be kept for it.
_SAME, _VECTORS = 1e-5, 16

Report = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is looked at.

    Args:
        matrix: name of the exact matrix.
        approximations: names; empty takes all but the matrix itself.
        approximated: name of the matrix that the approximations are of; None is the exact one.
        on_unsupported: what parameters outside every layer get in a layerwise approximation: "raise", "diagonal",
            "dense" or "exclude", see :class:`~curvlib.approximations.LayerwiseApproximation`.
        layers: names or patterns; empty takes all.
        most: coordinates that may be selected.
        damping: lambda > 0 in the units of C; None is the mean absolute eigenvalue of C.
        inverses: whether inverses are drawn as well.
        density: of the whole matrix, where layers are selected; None makes none.
        seed: of random draws; all matrices see the same ones.

    Raises:
        ExperimentError: an unknown name, or a value out of bounds.
    """

    matrix: str = "ggn"
    approximations: tuple[str, ...] = ()
    approximated: str | None = None
    on_unsupported: str = "raise"
    layers: tuple[str, ...] = ()
    most: int = 2000
    damping: float | None = None
    inverses: bool = False
    density: SpectralDensity | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (self.matrix, *(() if self.approximated is None else (self.approximated,))):
            INSPECTED_MATRICES.get(name)
        for name in self.approximations:
            INSPECTED_APPROXIMATIONS.get(name)
        if self.on_unsupported not in ON_UNSUPPORTED:
            raise ExperimentError(
                f"on_unsupported must be one of {', '.join(ON_UNSUPPORTED)}, got {self.on_unsupported!r}."
            )
        if len(set(self.approximations)) < len(self.approximations):
            raise ExperimentError(f"Each approximation is looked at once, got {', '.join(self.approximations)}.")
        if self.most < 1:
            raise ExperimentError(f"most must be at least 1, got {self.most}.")
        if self.damping is not None and not 0.0 < self.damping < float("inf"):
            raise ExperimentError(f"damping must be a finite number above 0, got {self.damping}.")

    @property
    def names(self) -> tuple[str, ...]:
        """The approximations that are looked at."""
        return self.approximations or tuple(name for name in INSPECTED_APPROXIMATIONS if name not in REFERENCES)

    @property
    def of(self) -> str:
        """The name of the matrix that is approximated."""
        return self.approximated or self.matrix


@dataclass(frozen=True, kw_only=True, eq=False)
class InspectedRow:
    """One approximation, and how far it is from the exact matrix; None where a number is not defined.

    Args:
        name: of the approximation.
        reason: why it does not apply here; all else is None then.
        refuses_unsupported: whether the reason is parameters for which another ``on_unsupported`` would be a remedy.
        note: something to know about its numbers.
        same_as: an earlier approximation with the same numbers on these coordinates.
        error: relative Frobenius error.
        spectral_error: relative error in the spectral norm.
        inverse_error: relative Frobenius error of the damped inverse, where inverses are looked at.
        step_cosine: cosine between the exact damped step and this one's.
        layer_errors: relative Frobenius errors of the layers' own blocks.
        memory: bytes of the operator's floating-point tensors, for the whole model.
        seconds: for the estimate of the whole model.
        looked: what is drawn.
        density: spectrum of the whole matrix.
    """

    name: str
    reason: str | None = None
    refuses_unsupported: bool = False
    note: str | None = None
    same_as: str | None = None
    error: float | None = None
    spectral_error: float | None = None
    inverse_error: float | None = None
    step_cosine: float | None = None
    layer_errors: tuple[float | None, ...] = ()
    memory: int | None = None
    seconds: float | None = None
    looked: Looked | None = None
    density: SpectralMeasure | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspected:
    """What was seen.

    Args:
        inspection: what was asked for.
        selection: the coordinates.
        damping: that was used.
        exact: the exact matrix.
        diagonal_share: part of its squared Frobenius norm that lies in the layers' own blocks.
        rows: one an approximation.
        density: spectrum of the whole exact matrix, None where all of it is looked at.
        note: something to know about the exact matrix.
        unsupported: parameters outside every layer, each with the reason.
    """

    inspection: Inspection
    selection: Selection
    damping: float
    exact: Looked
    diagonal_share: float | None
    rows: tuple[InspectedRow, ...]
    density: SpectralMeasure | None = None
    note: str | None = None
    unsupported: Mapping[str, str] = field(default_factory=dict)

    @property
    def drawn(self) -> Iterator[tuple[InspectedRow, Looked]]:
        """The approximations that apply and are not another one's copy."""
        for row in self.rows:
            if row.looked is not None and row.same_as is None:
                yield row, row.looked


def inspect_evaluation(evaluation: curvlib.Evaluation, inspection: Inspection, report: Report) -> Inspected:
    """Return the exact matrix beside its approximations on a batch.

    Args:
        evaluation: the objective on the batch.
        inspection: what to look at.
        report: told what is done, and the part of it that is done.

    Raises:
        ExperimentError: the layers are unknown or too large, no approximation applies, or the exact matrix cannot be
            made of this model.
    """
    return _Inspector(evaluation, inspection, prepare(evaluation, inspection), report).run()


@dataclass(frozen=True, kw_only=True, eq=False)
class Preparation:
    """What is known of an inspection before any computation.

    Args:
        selection: the coordinates.
        choices: the approximations.
        memory: about how many bytes the matrices on the coordinates take at once.
    """

    selection: Selection
    choices: tuple[Choice, ...]
    memory: int


def prepare(evaluation: curvlib.Evaluation, inspection: Inspection) -> Preparation:
    """Return what is known before any computation, or refuse it.

    Raises:
        ExperimentError: the layers are unknown or too large, or no approximation applies.
    """
    selection = select(evaluation, inspection.layers, inspection.most)
    return Preparation(
        selection=selection,
        memory=check_selection(selection.size, selection.total, inspection.inverses, evaluation.layout.device),
        choices=choices_for(evaluation, inspection.names, inspection.of, inspection.on_unsupported),
    )


class _Inspector:
    """The work of :func:`inspect_evaluation`, with what all approximations are held against."""

    def __init__(
        self, evaluation: curvlib.Evaluation, inspection: Inspection, preparation: Preparation, report: Report
    ) -> None:
        self._evaluation, self._inspection, self._report = evaluation, inspection, report
        self._selection, self._choices = preparation.selection, preparation.choices
        self._seen: list[tuple[InspectedRow, Tensor]] = []

    def run(self) -> Inspected:
        """Look at the exact matrix, then at every approximation."""
        ask, selection = self._inspection, self._selection
        try:
            operator = Exact(INSPECTED_MATRICES.get(ask.matrix)).estimate(self._evaluation, self._draws())
            C = selection.submatrix(operator, lambda part: self._report("exact", part))
            self._gradient = self._evaluation.gradient()[selection.coordinates].double()
            density = self._density(operator, "exact")
        except NOT_APPLICABLE as error:
            raise ExperimentError(f"The exact matrix cannot be made of this model: {error}") from error
        if not bool(C.isfinite().all()):
            raise ExperimentError("The exact matrix has entries that are not finite: train with smaller steps.")
        self._C = C
        self._vectors = torch.randn(len(C), _VECTORS, dtype=C.dtype, device=C.device, generator=self._draws())
        eigenvalues = torch.linalg.eigvalsh(C)
        self._damping = ask.damping if ask.damping is not None else float(eigenvalues.abs().mean())
        if not self._damping > 0.0:
            raise ExperimentError("The exact matrix is zero on these layers: choose others with --layers.")
        self._norms = float(torch.linalg.matrix_norm(C)), float(eigenvalues.abs().max())
        self._exact = look(C, eigenvalues, self._damping, ask.inverses)
        self._step = damped_step(C, self._gradient, self._damping)
        rows = tuple(self._row(choice) for choice in self._choices)
        refuse_if_none_applies(ask.of, [(row.name, row.reason) for row in rows])
        inside = sum(float(C[part, part].square().sum()) for part in selection.slices)
        return Inspected(
            inspection=ask,
            selection=selection,
            damping=self._damping,
            exact=self._exact.without_matrices(),
            diagonal_share=inside / self._norms[0] ** 2,
            rows=rows,
            density=density,
            note=self._exact.indefinite_note(self._damping),
            unsupported=self._evaluation.plan.unsupported,
        )

    def _row(self, choice: Choice) -> InspectedRow:
        name, approximation = choice.name, choice.approximation
        if approximation is None:
            return InspectedRow(name=name, reason=choice.reason, refuses_unsupported=choice.refuses_unsupported)
        self._report(name, 0.0)
        try:
            operator, seconds = self._timed(approximation)
            B = self._selection.submatrix(operator, lambda part: self._report(name, 0.9 * part))
            if not bool(B.isfinite().all()):
                raise ArithmeticError("it has entries that are not finite")
            row = self._compare(name, B, operator, seconds)
            notes = [note for note in (choice.note, row.note) if note]
            row = dataclasses.replace(row, note="; ".join(notes) or None)
        except NOT_APPLICABLE as error:
            row = InspectedRow(name=name, reason=str(error))
        self._report(name, 1.0)
        return row

    def _compare(self, name: str, B: Float[Tensor, "d d"], operator: LinearOperator, seconds: float) -> InspectedRow:
        C, (frobenius, spectral), slices = self._C, self._norms, self._selection.slices
        sketch = B @ self._vectors
        for earlier, other in self._seen:
            if float(torch.linalg.matrix_norm(sketch - other)) <= _SAME * frobenius * _VECTORS**0.5:
                return dataclasses.replace(
                    earlier, name=name, same_as=earlier.name, memory=bytes_of(operator), seconds=seconds, density=None
                )
        looked = look(B, torch.linalg.eigvalsh(B), self._damping, self._inspection.inverses, C)
        step = damped_step(B, self._gradient, self._damping)
        exact_inverse, inverse = self._exact.inverse, looked.inverse
        row = InspectedRow(
            name=name,
            note=looked.indefinite_note(self._damping),
            error=float(torch.linalg.matrix_norm(B - C)) / frobenius,
            spectral_error=spectral_norm(B - C) / spectral,
            inverse_error=None if inverse is None or exact_inverse is None else relative_error(inverse, exact_inverse),
            step_cosine=_cosine(self._step, step),
            layer_errors=tuple(relative_error(B[part, part], C[part, part]) for part in slices),
            memory=bytes_of(operator),
            seconds=seconds,
            looked=looked.against(exact_inverse).without_matrices(),
            density=self._density(operator, name),
        )
        self._seen.append((row, sketch))
        return row

    def _timed(self, approximation: Approximation) -> tuple[LinearOperator, float]:
        shortest = float("inf")
        for _ in range(_REPETITIONS):
            clock = TrainingClock(self._evaluation.layout.device)
            with clock.running():
                operator = approximation.estimate(self._evaluation, self._draws())
            shortest = min(shortest, clock.seconds)
            if shortest > _SHORT_SECONDS:
                break
        return operator, shortest

    def _density(self, operator: LinearOperator, name: str) -> SpectralMeasure | None:
        density = self._inspection.density
        if density is None or self._selection.is_whole:
            return None
        self._report(f"spectrum of {name}", 0.0)
        measure = density(operator, self._draws())
        self._report(f"spectrum of {name}", 1.0)
        return measure

    def _draws(self) -> torch.Generator:
        return torch.Generator(self._evaluation.layout.device).manual_seed(self._inspection.seed)


def _cosine(one: Tensor | None, other: Tensor | None) -> float | None:
    if one is None or other is None:
        return None
    lengths = float(torch.linalg.vector_norm(one) * torch.linalg.vector_norm(other))
    return float(one @ other) / lengths if lengths > 0.0 else None
