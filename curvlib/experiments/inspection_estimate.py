r"""A curvature matrix beside its approximations by products alone, for models that are too large for a matrix (d, d).

Symbols: C, B (d, d) the exact matrix and an approximation on the selected coordinates; z_p (d,) one of P vectors of
random signs; g (d,) the gradient.

====================  ====================================================================================
error                 the root of sum_p \|(B - C) z_p\|^2 / sum_p \|C z_p\|^2, with its standard error
spectral error        Lanczos on B - C and on C, to a relative residual of :data:`LANCZOS_TOLERANCE`
cosine of the steps   conjugate gradients on both, to a relative residual of :data:`CG_TOLERANCE`
====================  ====================================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.inspection import InspectedRow
from curvlib.experiments.inspection_memory import bytes_of, probes_of
from curvlib.experiments.inspection_work import SAME, Work, cosine
from curvlib.operators import LinearOperator, MatrixFree
from curvlib.solvers import CG, ResidualTest, Solution, Status
from curvlib.spectra import Lanczos, LargestMagnitude, SpectralDensity

LANCZOS_TOLERANCE, CG_TOLERANCE = 1e-2, 1e-3
_BASIS, _RESTARTS = 12, 10
_LANCZOS = Lanczos(count=1, which=LargestMagnitude(), basis=_BASIS, tolerance=LANCZOS_TOLERANCE, max_restarts=_RESTARTS)
_CG = CG(max_iterations=150, stop=ResidualTest(relative=CG_TOLERANCE))
# For the mean absolute eigenvalue, where no spectrum was asked for.
_FOR_DAMPING = SpectralDensity(steps=15, probes=4)


def most_products(size: int, approximations: int) -> int:
    """Return the most products with the exact matrix that estimates take, their spectra left out.

    Args:
        size: d, the selected coordinates.
        approximations: how many there are.
    """
    lanczos = _BASIS + _RESTARTS * _BASIS // 2
    damping = _FOR_DAMPING.steps * _FOR_DAMPING.probes
    return probes_of(size) + (1 + approximations) * lanczos + damping + _CG.max_iterations


class EstimateWork(Work):
    """Looks at products: numbers with errors of estimation, no pictures of matrices."""

    def look_at_exact(self, operator: LinearOperator) -> None:
        """Multiply the exact matrix with random vectors, and find its norm, its spectrum and its damped step.

        Raises:
            ExperimentError: it is zero or not finite.
        """
        C, report = self._on_selection(operator), self.report
        report("exact", 0.0)
        gradient, whole = self.evaluation.gradient(), self.selection.is_whole
        # The whole operator keeps the order of the flat vector.
        self._C, self._gradient = C, gradient if whole else gradient[self.selection.coordinates]
        signs = torch.randint(2, (C.size, probes_of(C.size)), generator=self.draws(), device=C.device)
        self._Z = (2 * signs - 1).to(C.dtype)
        self._CZ = C @ self._Z
        if not bool(self._CZ.isfinite().all()):
            raise ExperimentError("The exact matrix has entries that are not finite: train with smaller steps.")
        if not bool(self._CZ.any()):
            raise ExperimentError("The exact matrix is zero on these layers: choose others with --layers.")
        report("exact", 0.3)
        self._norm, self._note = self._spectral_norm(C)
        report("exact", 0.5)
        self._density = self.density(C, "exact")
        asked = self.inspection.damping
        if asked is None:
            measure = self._density if self._density is not None else _FOR_DAMPING(C, self.draws())
            asked = float(measure.trace_of(torch.abs)) / C.size
        self._damping = asked
        report("exact", 0.7)
        self._step, note = self._damped_step(C)
        self._note = self._note or note
        report("exact", 1.0)

    def of_exact(self) -> dict[str, Any]:
        """Return what is known of the exact matrix."""
        return {
            "damping": self._damping,
            "exact": None,
            "diagonal_share": None,
            "density": self._density,
            "note": self._note,
        }

    def compare(self, name: str, operator: LinearOperator) -> InspectedRow:
        """Return the estimated numbers.

        Raises:
            ArithmeticError: a product is not finite.
        """
        B = self._on_selection(operator)
        products = B @ self._Z
        earlier = self.same_as_earlier(name, operator, products, float(torch.linalg.matrix_norm(self._CZ)))
        if earlier is not None:
            return earlier
        difference = products - self._CZ
        if not bool(difference.isfinite().all()):
            raise ArithmeticError("its products are not finite")
        error, deviation = _relative_error(difference, self._CZ)
        self.report(name, 0.2)
        # Of the difference of equal matrices there are rounding errors alone, and no largest eigenvalue of them.
        same = error <= SAME
        norm, note = (None, "equal to the exact matrix up to rounding") if same else self._spectral_norm(B - self._C)
        self.report(name, 0.5)
        step, other_note = self._damped_step(B)
        self.report(name, 0.7)
        row = InspectedRow(
            name=name,
            note="; ".join(text for text in (note, other_note) if text) or None,
            error=error,
            error_deviation=deviation,
            spectral_error=None if norm is None or not self._norm else norm / self._norm,
            step_cosine=cosine(self._step, step),
            memory=bytes_of(operator),
            density=self.density(B, name),
        )
        return self.remember(row, products)

    def _on_selection(self, operator: LinearOperator) -> LinearOperator:
        if self.selection.is_whole:
            return operator
        S, d = self.selection.coordinates, self.selection.size

        def product(V: Float[Tensor, "d K"]) -> Float[Tensor, "d K"]:
            embedded = V.new_zeros(operator.size, V.shape[1])
            embedded[S] = V
            return (operator @ embedded)[S]

        return MatrixFree(product, d, operator.dtype, operator.device)

    def _spectral_norm(self, C: LinearOperator) -> tuple[float | None, str | None]:
        pairs = _LANCZOS(C, self.draws())
        if not pairs.solved and pairs.status is not Status.ITERATION_LIMIT:
            return None, f"no spectral error: {pairs}"
        note = None if pairs.solved else f"spectral error: {pairs}"
        return float(pairs.values.abs().max()), note

    def _damped_step(self, C: LinearOperator) -> tuple[Float[Tensor, " d"] | None, str | None]:
        solution: Solution = _CG(C, self._damping).solve(-self._gradient)
        if solution.solved:
            return solution.x, None
        usable = solution.status is Status.ITERATION_LIMIT
        return (solution.x if usable else None), f"{'' if usable else 'no '}damped step: {solution}"


def _relative_error(difference: Float[Tensor, "d P"], CZ: Float[Tensor, "d P"]) -> tuple[float, float]:
    """Return the relative Frobenius error and its standard error, that of a ratio of two means over the same draws."""
    a, b = (part.double().square().sum(0) for part in (difference, CZ))
    ratio = float(a.mean() / b.mean())
    deviation = float((a - ratio * b).std() / b.mean()) / len(a) ** 0.5
    return ratio**0.5, 0.5 * deviation / ratio**0.5 if ratio > 0.0 else 0.0
