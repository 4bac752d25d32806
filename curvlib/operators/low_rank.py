"""A low-rank matrix plus a diagonal.

Symbols: U (D, r) the factor, w (r,) the weights, d (D,) the diagonal, lambda the damping; K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from curvlib.operators.base import LinearOperator
from curvlib.operators.checks import check_alike, check_size, check_tensor, sum_of_logs
from curvlib.operators.dense import Dense
from curvlib.operators.state import OperatorError


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(LinearOperator):
    """U diag(w) U^T + diag(d).

    Args:
        factor: U, (D, r); its columns need not be orthogonal, and r may be 0 or above D.
        weights: w, (r,), of any sign: an inverse has negative ones.
        diagonal_part: d, (D,); zeros for a matrix of low rank alone.
        dtype: type of the vectors; None is U's own. U, w and d may be more precise than the vectors, as those of an
            inverse are: products are then computed in their precision and rounded at the end.
    """

    factor: Float[Tensor, "D r"]
    weights: Float[Tensor, " r"]
    diagonal_part: Float[Tensor, " D"]
    dtype: torch.dtype | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_tensor("LowRank", "factor", self.factor, ("D", "r"))
        D, r = self.factor.shape
        check_size("LowRank", D)
        check_tensor("LowRank", "weights", self.weights, (r,))
        check_tensor("LowRank", "diagonal_part", self.diagonal_part, (D,))
        check_alike("LowRank", factor=self.factor, weights=self.weights, diagonal_part=self.diagonal_part)
        object.__setattr__(self, "dtype", self.dtype or self.factor.dtype)

    @property
    @override
    def size(self) -> int:
        return self.factor.shape[0]

    @property
    @override
    def device(self) -> torch.device:
        return self.factor.device

    @override
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        V = V.to(self.factor.dtype)
        low_rank = self.factor @ (self.weights.unsqueeze(1) * (self.factor.T @ V))
        return low_rank.addcmul_(self.diagonal_part.unsqueeze(1), V).to(self.dtype)

    @override
    def diagonal(self) -> Float[Tensor, " D"]:
        return (self.factor.square() @ self.weights + self.diagonal_part).to(self.dtype)

    @override
    def to_dense(self) -> Float[Tensor, "D D"]:
        dense = (self.factor * self.weights) @ self.factor.T
        dense.diagonal().add_(self.diagonal_part)
        return dense.to(self.dtype)

    @override
    def frobenius_norm(self) -> Float[Tensor, ""]:
        """Return |C|_F in O(D r^2) from sums in float64.

        The off-diagonal part is a difference, |U W U^T|^2 - |its diagonal|^2: where it is tiny beside these, the norm
        has an error of sqrt(eps) |U W U^T|.
        """
        U, w = self.factor.double(), self.weights.double()
        weighted_gram = w.unsqueeze(1) * (U.T @ U)
        low_rank_diagonal = U.square() @ w
        off_diagonal = (weighted_gram * weighted_gram.T).sum() - low_rank_diagonal.square().sum()
        diagonal = low_rank_diagonal + self.diagonal_part.double()
        return (off_diagonal.clamp(min=0.0) + diagonal.square().sum()).sqrt().to(self.dtype)

    @override
    def spectrum(self) -> Float[Tensor, " D"]:
        """Return the eigenvalues, where d is a multiple of ones.

        Raises:
            OperatorError: d is not constant.
        """
        d = self.diagonal_part
        if bool(d.min() != d.max()):
            raise OperatorError(
                "The eigenvalues of LowRank need a constant diagonal_part, got values from "
                f"{float(d.min()):.3g} to {float(d.max()):.3g}: use Dense(C.to_dense()) if D = {self.size} is small."
            )
        values, _ = self.orthogonal_form(torch.ones_like(d))
        return (torch.cat([values, values.new_zeros(self.size - len(values))]) + d).to(self.dtype)

    @override
    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        shifted = self.diagonal_part.double() + damping
        if bool((shifted > 0.0).all()):
            # Determinant lemma: det(E + U W U^T) = det(E) prod_j (1 + s_j), s the spectrum of E^-1/2 U W U^T E^-1/2.
            values, _ = self.orthogonal_form(shifted)
            return (shifted.log().sum() + sum_of_logs(1.0 + values, repr(self), damping)).to(self.dtype)
        self.check_rank_covers(shifted)
        return Dense(self.to_dense()).logdet(damping)

    def orthogonal_form(self, scale: Float[Tensor, " D"]) -> tuple[Float[Tensor, " m"], Float[Tensor, "D m"]]:
        """Return s and orthonormal Q with Q diag(s) Q^T = E^-1/2 U diag(w) U^T E^-1/2, E = diag(scale) > 0.

        m = min(D, r). Both are float64: s are squares of singular values, whose smaller half would be lost in float32.
        Eigenvalues at rounding level are set to 0.
        """
        Q, R = torch.linalg.qr(self.factor.double() / scale.double().sqrt().unsqueeze(1))
        values, vectors = torch.linalg.eigh((R * self.weights) @ R.T)
        rounding = len(values) * torch.finfo(torch.float64).eps * values.abs().amax() if len(values) else 0.0
        return torch.where(values.abs() <= rounding, 0.0, values), Q @ vectors

    def check_rank_covers(self, shifted: Float[Tensor, " D"]) -> None:
        """Check that U diag(w) U^T + diag(shifted) can be positive definite although ``shifted`` is not positive.

        On the n coordinates where it is not, U diag(w) U^T alone has to be positive definite, so r >= n.

        Raises:
            ArithmeticError: r < n.
        """
        count, rank = int((shifted <= 0.0).sum()), self.factor.shape[1]
        if rank < count:
            raise ArithmeticError(
                f"{self!r} of rank {rank} is not positive definite with this damping: its diagonal_part + damping is "
                f"not positive at {count} coordinates (at least {float(shifted.min()):.3g}). Use a larger damping."
            )
