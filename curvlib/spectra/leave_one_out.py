r"""What XTrace and XDiag share: a basis of C Omega, and of it without any one of its columns.

Symbols: Omega (D, k) test vectors; Y = C Omega = Q R; Q_(i) an orthonormal basis of Y without its column i. Then

    Q_(i) Q_(i)^T = Q (I - s_i s_i^T) Q^T,    s_i = R^-T e_i / |R^-T e_i|

since Q s_i is the direction in the range of Q that is orthogonal to all other columns of Y.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import LinearOperator
from curvlib.spectra.probes import multiply


@dataclass(frozen=True, kw_only=True, eq=False)
class LeaveOneOut:
    """2 k products with C.

    Attributes:
        Omega: the test vectors.
        Q: orthonormal basis of Y = C Omega.
        R: Y = Q R.
        S: the unit vectors s_i, one a column.
        Z: C Q.
    """

    Omega: Float[Tensor, "D k"]
    Q: Float[Tensor, "D k"]
    R: Float[Tensor, "k k"]
    S: Float[Tensor, "k k"]
    Z: Float[Tensor, "D k"]

    @staticmethod
    def of(operator: LinearOperator, Omega: Float[Tensor, "D k"]) -> LeaveOneOut:
        """Multiply and factorise."""
        Q, R = torch.linalg.qr(multiply(operator, Omega))
        return LeaveOneOut(Omega=Omega, Q=Q, R=R, S=_directions(R), Z=multiply(operator, Q))


def _directions(R: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    """Return R^-T with columns of length 1.

    A matrix C of rank below k makes R singular. Diagonal entries at rounding level are lifted to it: this changes Y in
    its last digits, and then the s_i lie where C vanishes, so that nothing is taken away.
    """
    wide = R.double()
    floor = torch.finfo(R.dtype).eps * wide.abs().amax() + torch.finfo(R.dtype).tiny
    diagonal = wide.diagonal()
    lifted = torch.where(diagonal.abs() < floor, floor, diagonal)
    wide = wide - torch.diag(diagonal) + torch.diag(lifted)
    eye = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    inverse = torch.linalg.solve_triangular(wide.T, eye, upper=False)
    inverse = inverse / inverse.abs().amax(0)  # before squares leave the range
    return (inverse / torch.linalg.vector_norm(inverse, dim=0)).to(R.dtype)
