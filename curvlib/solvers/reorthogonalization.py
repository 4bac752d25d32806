r"""Orthogonality of the residuals of conjugate gradients, kept by hand where rounding errors would lose it.

In exact arithmetic the residuals of conjugate gradients satisfy r_i^T P r_j = 0. Rounding errors lose that along the
extreme eigenvectors, which are then found again and again, in up to many times D iterations (Greenbaum 1989, "Behavior
of slightly perturbed Lanczos and conjugate-gradient recurrences"). Removing what r has along earlier residuals restores
it, but r would then no longer belong to x. Since r_j = A x_j - b is affine in x_j,

.. math:: r \leftarrow \frac{r - \sum_j c_j r_j}{1 - \sum_j c_j}, \quad
    x \leftarrow \frac{x - \sum_j c_j x_j}{1 - \sum_j c_j}, \quad c_j = \frac{r_j^T P r}{r_j^T P r_j}

keeps r = A x - b whatever the size of c, and the true residual follows the recurrence.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Vectors that are allocated and multiplied together: a few kernels for each group.
_GROUP = 16
# The c_j are rounding errors; sums that large come from a column that is about to end, which is left as it is.
_LARGEST_SUM = 0.5


class PastResiduals:
    """The last residuals r_j of one solve, with P r_j and the iterates x_j.

    Args:
        limit: how many are kept, the newest; memory is allocated as they come.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0
        self._groups: list[Float[Tensor, "3 G D K"]] = []
        self._squares: list[Float[Tensor, "G K"]] = []

    def append(
        self,
        r: Float[Tensor, "D K"],
        y: Float[Tensor, "D K"],
        rho: Float[Tensor, " K"],
        x: Float[Tensor, "D K"],
    ) -> None:
        """Keep a residual r with y = P r, rho = r^T y and its iterate x."""
        if self._limit == 0:
            return
        place = self._count % self._limit  # the oldest gives way
        group, row = divmod(place, _GROUP)
        if group == len(self._groups):
            rows = min(_GROUP, self._limit - group * _GROUP)
            self._groups.append(r.new_zeros(3, rows, *r.shape))
            self._squares.append(rho.new_ones(rows, *rho.shape))
        self._groups[group][:, row] = torch.stack([r, y, x])
        # Columns that have ended, or end now, take no part: c = 0.
        usable = rho.isfinite() & (rho > 0)
        self._groups[group][1, row] *= usable
        self._squares[group][row] = torch.where(usable, rho, 1.0)
        self._count += 1

    def clean(
        self, x: Float[Tensor, "D K"], r: Float[Tensor, "D K"]
    ) -> tuple[Float[Tensor, "D K"], Float[Tensor, "D K"]]:
        """Return x and r = A x - b with r^T P r_j = 0 for the residuals that are kept."""
        total = torch.zeros_like(r[0])
        new_x, new_r = x, r
        for (past_r, past_y, past_x), squares in zip(self._groups, self._squares, strict=True):
            c = torch.einsum("gdk,dk->gk", past_y, new_r) / squares
            new_r = new_r - torch.einsum("gk,gdk->dk", c, past_r)
            new_x = new_x - torch.einsum("gk,gdk->dk", c, past_x)
            total = total + c.sum(0)
        sound = total.abs() <= _LARGEST_SUM  # false for NaN
        return (
            torch.where(sound, new_x / (1 - total), x),
            torch.where(sound, new_r / (1 - total), r),
        )
