"""A curvature matrix beside its approximations, as matrices (d, d) on the selected coordinates."""

from __future__ import annotations

from typing import Any

import torch

from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.inspection import InspectedRow
from curvlib.experiments.inspection_matrix import damped_step, look, relative_error, spectral_norm
from curvlib.experiments.inspection_memory import bytes_of
from curvlib.experiments.inspection_work import Work, cosine
from curvlib.operators import LinearOperator
from curvlib.spectra import SpectralMeasure

# Random vectors whose products show whether two approximations are the same.
_VECTORS = 16


class DenseWork(Work):
    """Looks at matrices: pictures, eigenvalues and every number without an error of estimation."""

    def look_at_exact(self, operator: LinearOperator) -> None:
        """Make the matrix, its eigenvalues and its damped step.

        Raises:
            ExperimentError: it is zero or not finite.
        """
        C = self.selection.submatrix(operator, lambda part: self.report("exact", part))
        self._gradient = self.evaluation.gradient()[self.selection.coordinates].double()
        self._density = self._density_of(operator, "exact")
        if not bool(C.isfinite().all()):
            raise ExperimentError("The exact matrix has entries that are not finite: train with smaller steps.")
        self._C, self._eps = C, torch.finfo(operator.dtype).eps
        self._vectors = torch.randn(len(C), _VECTORS, dtype=C.dtype, device=C.device, generator=self.draws())
        asked, eigenvalues = self.inspection.damping, torch.linalg.eigvalsh(C)
        self._damping = asked if asked is not None else float(eigenvalues.abs().mean())
        if not self._damping > 0.0:
            raise ExperimentError("The exact matrix is zero on these layers: choose others with --layers.")
        self._norms = float(torch.linalg.matrix_norm(C)), float(eigenvalues.abs().max())
        self._exact = look(C, eigenvalues, self._damping, self.inspection.inverses, eps=self._eps)
        self._step = damped_step(C, self._gradient, self._damping)

    def of_exact(self) -> dict[str, Any]:
        """Return what is drawn of the exact matrix, and what is known of it."""
        inside = sum(float(self._C[part, part].square().sum()) for part in self.selection.slices)
        return {
            "damping": self._damping,
            "exact": self._exact.without_matrices(),
            "diagonal_share": inside / self._norms[0] ** 2,
            "density": self._density,
            "note": self._exact.indefinite_note(self._damping),
        }

    def compare(self, name: str, operator: LinearOperator) -> InspectedRow:
        """Return every number and what is drawn, or those of an earlier approximation with the same entries.

        Raises:
            ArithmeticError: an entry is not finite.
        """
        B = self.selection.submatrix(operator, lambda part: self.report(name, 0.9 * part))
        if not bool(B.isfinite().all()):
            raise ArithmeticError("it has entries that are not finite")
        C, (frobenius, spectral), slices = self._C, self._norms, self.selection.slices
        products = B @ self._vectors
        earlier = self.same_as_earlier(name, operator, products, frobenius * _VECTORS**0.5)
        if earlier is not None:
            return earlier
        eigenvalues = torch.linalg.eigvalsh(B)
        looked = look(B, eigenvalues, self._damping, self.inspection.inverses, eps=self._eps, exact=C)
        exact_inverse, inverse = self._exact.inverse, looked.inverse
        row = InspectedRow(
            name=name,
            note=looked.indefinite_note(self._damping),
            error=float(torch.linalg.matrix_norm(B - C)) / frobenius,
            spectral_error=spectral_norm(B - C) / spectral,
            inverse_error=None if inverse is None or exact_inverse is None else relative_error(inverse, exact_inverse),
            step_cosine=cosine(self._step, damped_step(B, self._gradient, self._damping)),
            layer_errors=tuple(relative_error(B[part, part], C[part, part]) for part in slices),
            memory=bytes_of(operator),
            looked=looked.against(exact_inverse).without_matrices(),
            density=self._density_of(operator, name),
        )
        return self.remember(row, products)

    def _density_of(self, operator: LinearOperator, name: str) -> SpectralMeasure | None:
        """Return the spectrum of the whole where layers are left out; otherwise all eigenvalues are known."""
        return None if self.selection.is_whole else self.density(operator, name)
