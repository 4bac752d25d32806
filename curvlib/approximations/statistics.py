"""Statistics of batches: tensors that add up, each kind in its own way.

Symbols: B blocks, r rank, d size of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class Statistics:
    """Tensors that add up over batches, each kind with its own weights.

    A vector over the lags of time series may be longer in one batch than in another: behind its end it is zero.

    Attributes:
        means: averages over examples (K-FAC's A): batches count by their number of examples.
        sums: quantities on the objective's scale (K-FAC's G, a diagonal): batches count by their part of the objective.
        roots: factors F (..., r, d) of sums F^T F on the objective's scale, which themselves are not kept: a sum of two
            is F^T F of the r leading directions alone.
    """

    means: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    roots: dict[str, Tensor] = field(default_factory=dict)

    def times(self, mean_weight: float | Tensor, sum_weight: float | Tensor) -> Statistics:
        """Return the statistics with the two kinds of weights, of which a root takes the square root."""
        return Statistics(
            {key: mean_weight * value for key, value in self.means.items()},
            {key: sum_weight * value for key, value in self.sums.items()},
            {key: sum_weight**0.5 * value for key, value in self.roots.items()},
        )

    def __add__(self, other: Statistics) -> Statistics:
        wrong = sorted(
            key for mine, its in zip(self._kinds, other._kinds, strict=True) for key in mine.keys() ^ its.keys()
        )
        if wrong:
            raise ValueError(f"statistics of different layers cannot be added; only one side has {', '.join(wrong)}.")
        return Statistics(
            {key: _plus(value, other.means[key]) for key, value in self.means.items()},
            {key: _plus(value, other.sums[key]) for key, value in self.sums.items()},
            {key: sum_of_roots(value, other.roots[key], value.shape[-2]) for key, value in self.roots.items()},
        )

    def to(self, dtype: torch.dtype) -> Statistics:
        """Return the statistics in another type."""
        return Statistics(*({key: value.to(dtype) for key, value in kind.items()} for kind in self._kinds))

    def fill(self, other: Statistics) -> None:
        """Take over, in place, what the other has under keys that are missing here."""
        for mine, its in zip(self._kinds, other._kinds, strict=True):
            mine.update({key: value for key, value in its.items() if key not in mine})

    def renamed(self, name: Callable[[str], str]) -> Statistics:
        """Return the statistics under other keys."""
        return Statistics(*({name(key): value for key, value in kind.items()} for kind in self._kinds))

    def under(self, prefix: str) -> Statistics:
        """Return those statistics whose keys begin so, without the prefix."""
        return Statistics(
            *(
                {key.removeprefix(prefix): value for key, value in kind.items() if key.startswith(prefix)}
                for kind in self._kinds
            )
        )

    def joined(self, other: Statistics) -> Statistics:
        """Return both side by side; their keys are to be different."""
        return Statistics(*(mine | its for mine, its in zip(self._kinds, other._kinds, strict=True)))

    @property
    def _kinds(self) -> tuple[dict[str, Tensor], ...]:
        return self.means, self.sums, self.roots

    def is_finite(self) -> bool:
        """Whether all entries are finite. Waits for the device once."""
        finite = [value.isfinite().all() for kind in self._kinds for value in kind.values()]
        return bool(torch.stack(finite).all()) if finite else True


class NonFiniteStatisticsError(ArithmeticError):
    """The statistics of a batch hold NaN or infinity, so that they make no curvature matrix."""


def _plus(value: Tensor, other: Tensor) -> Tensor:
    if value.ndim == 1 and len(value) != len(other):
        short, long = sorted((value, other), key=len)
        return long + functional.pad(short, (0, len(long) - len(short)))
    return value + other


def sum_of_roots(F: Float[Tensor, "*B n d"], H: Float[Tensor, "*B m d"], rank: int) -> Float[Tensor, "*B rank d"]:
    """Return R whose R^T R is F^T F + H^T H, projected onto its ``rank`` leading directions; rows of zeros fill it up.

    R = P^T (F; H), P the leading eigenvectors of the Gram matrix of the rows (F; H): an orthogonal projection, so that
    the squares in the Gram matrix cost no precision. Where there are more rows than columns, R is made of eigenvalues
    and eigenvectors of the sum itself. Both in float64.
    """
    rows = torch.cat([F, H], dim=-2)
    n, d = rows.shape[-2:]
    if n <= rank:
        return functional.pad(rows, (0, 0, 0, rank - n))
    if not rows.numel():
        return rows.new_zeros(*rows.shape[:-2], rank, d)
    # NaN would make the eigenvalue solver fail, and the statistics are refused by their own check
    wide = rows.double()
    finite = wide.isfinite().all(-1).all(-1)[..., None, None]
    wide = torch.where(finite, wide, 0.0)
    if n <= d:
        _, P = torch.linalg.eigh(wide @ wide.mT)
        result = P[..., -rank:].mT @ wide
    else:
        e, Q = torch.linalg.eigh(wide.mT @ wide)
        leading = e[..., -rank:].clamp(min=0.0).sqrt().unsqueeze(-1) * Q[..., -rank:].mT
        result = functional.pad(leading, (0, 0, 0, rank - leading.shape[-2]))
    return torch.where(finite, result, torch.nan).to(rows.dtype)
