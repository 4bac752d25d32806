r"""Looks at a curvature matrix beside its approximations, on the coordinates of some layers.

Symbols: C (d, d) the exact matrix on the selected coordinates, B (d, d) an approximation there, g (d,) the gradient,
lambda the damping.

==================  ===========================================================
error               :math:`\|B - C\|_F / \|C\|_F`
spectral error      :math:`\|B - C\|_2 / \|C\|_2`
cosine of steps     of :math:`(C + \lambda I)^{-1} g` and :math:`(B + \lambda I)^{-1} g`
error of a layer    :math:`\|B_{ll} - C_{ll}\|_F / \|C_{ll}\|_F`
==================  ===========================================================

The inverse on selected coordinates is the inverse of the submatrix: all other parameters are held fixed. Where d is too
large for a matrix (d, d), all but the errors of the layers can be estimated from products: ``Inspection(estimate)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import curvlib
from curvlib.experiments.curvatures import INSPECTED_APPROXIMATIONS, INSPECTED_MATRICES
from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.inspection_choice import ON_UNSUPPORTED, REFERENCES, Choice, choices_for
from curvlib.experiments.inspection_matrix import Looked
from curvlib.experiments.inspection_memory import check_estimate, check_selection
from curvlib.experiments.inspection_selection import Selection, select
from curvlib.spectra import SpectralDensity, SpectralMeasure


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
        most: coordinates that may be selected; estimates have no such limit.
        estimate: errors, cosine and spectrum from products alone, without a matrix (d, d), pictures and inverses.
        damping: lambda > 0 in the units of C; None is the mean absolute eigenvalue of C.
        inverses: whether inverses are drawn as well.
        density: of the whole matrix, where layers are selected or estimates are made; None makes none.
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
    estimate: bool = False
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
        if self.estimate and self.inverses:
            raise ExperimentError("estimate makes no matrices, and so no inverses: leave out one of the two.")
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
        error_deviation: standard error of an estimated one.
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
    error_deviation: float | None = None
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
        exact: the exact matrix, None where estimates were made.
        diagonal_share: part of its squared Frobenius norm that lies in the layers' own blocks.
        rows: one an approximation.
        density: spectrum of the whole exact matrix, None where all of it is looked at.
        note: something to know about the exact matrix.
        unsupported: parameters outside every layer, each with the reason.
        interrupted: names of the approximations that were not looked at, because the inspection was stopped.
    """

    inspection: Inspection
    selection: Selection
    damping: float
    exact: Looked | None
    diagonal_share: float | None
    rows: tuple[InspectedRow, ...]
    density: SpectralMeasure | None = None
    note: str | None = None
    unsupported: Mapping[str, str] = field(default_factory=dict)
    interrupted: tuple[str, ...] = ()

    @property
    def drawn(self) -> Iterator[tuple[InspectedRow, Looked]]:
        """The approximations that apply and are not another one's copy."""
        for row in self.rows:
            if row.looked is not None and row.same_as is None:
                yield row, row.looked


@dataclass(frozen=True, kw_only=True, eq=False)
class Preparation:
    """What is known of an inspection before any computation.

    Args:
        selection: the coordinates.
        choices: the approximations.
        memory: about how many bytes are taken at once.
    """

    selection: Selection
    choices: tuple[Choice, ...]
    memory: int


def prepare(evaluation: curvlib.Evaluation, inspection: Inspection) -> Preparation:
    """Return what is known before any computation, or refuse it.

    Raises:
        ExperimentError: the layers are unknown or too large, there is no memory for them, or no approximation applies.
    """
    device, total = evaluation.layout.device, evaluation.layout.size
    if inspection.estimate:
        selection = select(evaluation, inspection.layers, total)
        memory = check_estimate(total, device)
    else:
        selection = select(evaluation, inspection.layers, inspection.most)
        memory = check_selection(selection.size, total, inspection.inverses, device)
    choices = choices_for(evaluation, inspection.names, inspection.of, inspection.on_unsupported)
    return Preparation(selection=selection, choices=choices, memory=memory)
