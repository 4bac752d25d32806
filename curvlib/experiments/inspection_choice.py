"""Which approximations are looked at, with what is known before any computation of why one does not apply."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import curvlib
from curvlib import UnsupportedLayerError
from curvlib.approximations import Approximation
from curvlib.experiments.curvatures import INSPECTED_APPROXIMATIONS, INSPECTED_MATRICES
from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.inspection_memory import check_cost

# What layerwise approximations can make of parameters outside every layer.
ON_UNSUPPORTED = ("raise", "diagonal", "dense", "exclude")
# The matrix itself, which is what all others are held against.
REFERENCES = ("exact", "dense", "full-rank")
# What says that an approximation is not for this model, matrix or machine. Others are mistakes of curvlib.
NOT_APPLICABLE = (TypeError, ValueError, ArithmeticError, MemoryError, RuntimeError)
_FALLBACK = "on_unsupported"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An approximation by name, or why it does not apply.

    Args:
        name: of the approximation.
        approximation: None where it does not apply.
        reason: why it does not; None where it does, as far as is known before it is estimated.
        note: what it gives the parameters outside every layer, where there are such.
        refuses_unsupported: whether the reason is parameters for which another ``on_unsupported`` would be a remedy.
    """

    name: str
    approximation: Approximation | None = None
    reason: str | None = None
    note: str | None = None
    refuses_unsupported: bool = False


def approximation_of(name: str, matrix: str, on_unsupported: str = "raise") -> Approximation:
    """Return an approximation of a matrix, both by name.

    Args:
        name: of the approximation.
        matrix: of the curvature matrix.
        on_unsupported: what parameters outside every layer get in an approximation that has this option.

    Raises:
        TypeError: the approximation is not defined for the matrix.
        ValueError: it has not this way to treat such parameters.
    """
    approximation = INSPECTED_APPROXIMATIONS.get(name)(INSPECTED_MATRICES.get(matrix))
    return _with_fallback(approximation, on_unsupported) if _has_fallback(approximation) else approximation


def choices_for(
    evaluation: curvlib.Evaluation, names: Sequence[str], matrix: str, on_unsupported: str
) -> tuple[Choice, ...]:
    """Return one choice a name, checked against the model as far as that takes no computation.

    Args:
        evaluation: the objective on a batch.
        names: of approximations.
        matrix: the name of the matrix that is approximated.
        on_unsupported: what parameters outside every layer get.

    Raises:
        ExperimentError: none of them applies.
    """
    chosen = tuple(_choice(evaluation, name, matrix, on_unsupported) for name in names)
    refuse_if_none_applies(matrix, chosen)
    return chosen


class Judged(Protocol):
    """An approximation that may have a reason not to apply."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def reason(self) -> str | None:
        """Why it does not apply."""

    @property
    def refuses_unsupported(self) -> bool:
        """Whether another ``on_unsupported`` would be a remedy."""


def refuse_if_none_applies(matrix: str, judged: Sequence[Judged]) -> None:
    """Raise ExperimentError, with every reason, where each approximation has one."""
    if all(one.reason for one in judged):
        told = "\n".join(f"  {one.name}: {one.reason}" for one in judged)
        outside = (
            f", or give --on-unsupported {', '.join(ON_UNSUPPORTED[1:-1])} or {ON_UNSUPPORTED[-1]} for the parameters "
            "outside every layer"
        )
        raise ExperimentError(
            f"No approximation is left to look at: of {matrix}, for this model,\n{told}\n"
            "Choose others with --approximation (curvlib inspect --list), or another --matrix or --approximated"
            f"{outside if any(one.refuses_unsupported for one in judged) else ''}."
        )


def _choice(evaluation: curvlib.Evaluation, name: str, matrix: str, on_unsupported: str) -> Choice:
    refusing = False
    try:
        approximation = approximation_of(name, matrix, on_unsupported)
        refusing = _has_fallback(approximation) and on_unsupported == "raise"
        approximation.check(evaluation.objective)
        check_cost(approximation, evaluation)
    except NOT_APPLICABLE as error:
        unsupported = refusing and isinstance(error, UnsupportedLayerError)
        return Choice(name=name, reason=str(error), refuses_unsupported=unsupported)
    return Choice(name=name, approximation=approximation, note=_note(approximation, evaluation))


def _note(approximation: Approximation, evaluation: curvlib.Evaluation) -> str | None:
    outside = evaluation.plan.unsupported
    if not outside or not _has_fallback(approximation):
        return None
    rows = approximation.describe(evaluation.objective, evaluation.plan).rows
    blocks: dict[str, list[str]] = {}
    for row in rows:
        if row.parameter in outside:
            blocks.setdefault(row.block, []).append(row.parameter)
    return "; ".join(f"outside every layer, {', '.join(names)}: {block}" for block, names in blocks.items())


def _with_fallback(approximation: Any, on_unsupported: str) -> Approximation:
    changed: Approximation = dataclasses.replace(approximation, on_unsupported=on_unsupported)
    return changed


def _has_fallback(approximation: Approximation) -> bool:
    return dataclasses.is_dataclass(approximation) and any(
        field.name == _FALLBACK for field in dataclasses.fields(approximation)
    )
