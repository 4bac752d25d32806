"""One matrix as it is looked at: pictures in few pixels, eigenvalues, and the damped inverse.

Symbols: C (d, d) symmetric, in float64; lambda the damping; p the pixels of a picture.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

# Pixels on a side that a picture has at most.
MOST_PIXELS = 430


@dataclass(frozen=True, kw_only=True, eq=False)
class Looked:
    """A matrix, reduced to what is drawn.

    Args:
        eigenvalues: in decreasing order.
        rounding: d eps max |eigenvalue|, eps of the dtype of the products that made the matrix: eigenvalues of less
            than this may be rounding errors, and their signs mean nothing.
        picture: absolute values, averaged over the entries of a pixel.
        difference: the same of the difference from the exact matrix; None for the exact matrix itself.
        inverse_picture: of the damped inverse; None where it is not looked at, or does not exist.
        inverse_difference: of its difference from the exact one.
        inverse: the damped inverse itself.
    """

    eigenvalues: Float[Tensor, " d"]
    rounding: float
    picture: Float[Tensor, "p p"]
    difference: Float[Tensor, "p p"] | None = None
    inverse_picture: Float[Tensor, "p p"] | None = None
    inverse_difference: Float[Tensor, "p p"] | None = None
    inverse: Float[Tensor, "d d"] | None = None

    def against(self, exact_inverse: Float[Tensor, "d d"] | None) -> Looked:
        """Return this with the picture of the inverse's difference from the exact one, where both exist."""
        if exact_inverse is None or self.inverse is None:
            return self
        return dataclasses.replace(self, inverse_difference=picture_of(self.inverse - exact_inverse))

    def without_matrices(self) -> Looked:
        """Return this without what takes d^2 numbers."""
        return dataclasses.replace(self, inverse=None)

    def indefinite_note(self, damping: float) -> str | None:
        """Return why there is no damped step, None where there is one."""
        smallest = float(self.eigenvalues[-1])
        if smallest + damping > 0.0:
            return None
        return (
            f"C + damping I is not positive definite (smallest eigenvalue {smallest:.3g}), so that it has no damped "
            f"step and no inverse: use a damping above {-smallest:.3g}"
        )


def look(
    C: Float[Tensor, "d d"],
    eigenvalues: Float[Tensor, " d"],
    damping: float,
    inverses: bool,
    *,
    eps: float,
    exact: Float[Tensor, "d d"] | None = None,
) -> Looked:
    """Return what is drawn of a matrix that was made by products with a relative precision of eps."""
    inverse = damped_inverse_of(C, damping) if inverses else None
    return Looked(
        eigenvalues=eigenvalues.flip(0).cpu(),
        rounding=len(C) * eps * float(eigenvalues.abs().max()),
        picture=picture_of(C),
        difference=None if exact is None else picture_of(C - exact),
        inverse_picture=None if inverse is None else picture_of(inverse),
        inverse=inverse,
    )


def entries_per_pixel(size: int) -> int:
    """Return how many rows of a matrix of this size share a row of pixels."""
    return -(-size // MOST_PIXELS)


def picture_of(C: Float[Tensor, "d d"]) -> Float[Tensor, "p p"]:
    """Return the absolute values, averaged over squares of entries where there are more than pixels."""
    side = entries_per_pixel(len(C))
    pixels = functional.avg_pool2d(C.abs()[None, None], side, ceil_mode=True)
    return pixels[0, 0].float().cpu()


def damped_inverse_of(C: Float[Tensor, "d d"], damping: float) -> Float[Tensor, "d d"] | None:
    """Return (C + lambda I)^-1, None where C + lambda I is not positive definite."""
    factor = _factor(C, damping)
    return None if factor is None else torch.cholesky_inverse(factor)


def damped_step(C: Float[Tensor, "d d"], gradient: Float[Tensor, " d"], damping: float) -> Float[Tensor, " d"] | None:
    """Return -(C + lambda I)^-1 g, None where C + lambda I is not positive definite."""
    factor = _factor(C, damping)
    return None if factor is None else -torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1)


def _factor(C: Float[Tensor, "d d"], damping: float) -> Float[Tensor, "d d"] | None:
    damped = C.clone()
    damped.diagonal().add_(damping)
    factor, failure = torch.linalg.cholesky_ex(damped)
    return None if int(failure) else factor


def spectral_norm(C: Float[Tensor, "d d"]) -> float:
    """Return the largest absolute eigenvalue."""
    return float(torch.linalg.eigvalsh(C).abs().max())


def relative_error(B: Float[Tensor, "d d"], C: Float[Tensor, "d d"]) -> float | None:
    """Return |B - C|_F / |C|_F, None where C is zero."""
    scale = float(torch.linalg.matrix_norm(C))
    return float(torch.linalg.matrix_norm(B - C)) / scale if scale > 0.0 else None
