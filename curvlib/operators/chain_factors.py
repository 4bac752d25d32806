r"""One Kronecker factor of a chain: lag moments of a stationary series, whitened.

Symbols: F_0 = E[f_t f_t^T] and F_1 = E[f_{t+1} f_t^T] (d, d) the lag moments; R (d, d) a root, F_0 = R R^T;
R^+ its pseudo-inverse; Psi = R^+ F_1 R^+^T the transition of the whitened series.

Everything is float64, whatever the moments are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators.checks import check_alike, check_size, check_tensor, symmetrized
from curvlib.operators.state import OperatorError

FACTOR_NAMES = ("G", "A")

# A negative eigenvalue beyond this part of the largest is no rounding error of float32 sums: a covariance has none.
_MOST_NEGATIVE = 1e-5


@dataclass(frozen=True, kw_only=True, eq=False)
class WhitenedFactor:
    """A factor in the coordinates in which F_0 is the identity on its range.

    Attributes:
        name: which factor it is, for messages.
        root: R = Q diag(e)^1/2 from F_0 = Q diag(e) Q^T, with zeros for the eigenvalues at rounding level.
        inverse_root: R^+.
        transition: Psi.
        spectrum: e, (d,).
    """

    name: str
    root: Float[Tensor, "d d"]
    inverse_root: Float[Tensor, "d d"]
    transition: Float[Tensor, "d d"]
    spectrum: Float[Tensor, " d"]

    def check_full_rank(self) -> None:
        """Check that F_0 is not singular.

        Raises:
            OperatorError: it is, to working precision.
        """
        rank, size = int((self.spectrum > 0.0).sum()), len(self.spectrum)
        if rank < size:
            raise OperatorError(
                f"{self.name} is singular, of rank {rank} and size {size}, so that the chain has no inverse: use a "
                f"damping > 0 (the largest eigenvalue is {float(self.spectrum.max()):.3g})."
            )


def whitened(lag0: Float[Tensor, "d d"], lag1: Float[Tensor, "d d"], name: str) -> WhitenedFactor:
    r"""Return the whitened factor of two lag moments.

    .. math:: F_0 = R R^T, \qquad \Psi = R^+ F_1 R^{+T}

    Eigenvalues of F_0 up to d eps max(e), with the eps of the moments' own type, are rounding and taken for 0. F_1 lies
    in the range of F_0, since [[F_0, F_1^T], [F_1, F_0]] is positive semi-definite: what rounding puts outside of it is
    dropped.

    Raises:
        OperatorError: an entry is not finite, F_0 is not symmetric or not positive semi-definite, or a decomposition
            fails.
    """
    F0, F1 = symmetrized(lag0.double(), f"lag0, {name},"), lag1.double()
    bad = int((~F1.isfinite()).sum())
    if bad:
        raise OperatorError(
            f"lag1, {name}, has {bad} entries that are not finite: skip this update, and look for overflow in the "
            "statistics it was made of."
        )
    e, Q = decomposed(torch.linalg.eigh, F0, name)
    largest = e.abs().amax()
    if bool(e[0] < -_MOST_NEGATIVE * largest):
        raise OperatorError(
            f"lag0, {name}, must be positive semi-definite, but has the eigenvalue {float(e[0]):.3g} beside "
            f"{float(largest):.3g}: pass second moments E[f f^T]."
        )
    in_range = e > len(e) * torch.finfo(lag0.dtype).eps * largest
    e = torch.where(in_range, e, 0.0)
    inverse_root = torch.where(in_range, e.rsqrt(), 0.0).unsqueeze(1) * Q.T
    return WhitenedFactor(
        name=name,
        root=Q * e.sqrt(),
        inverse_root=inverse_root,
        transition=inverse_root @ F1 @ inverse_root.T,
        spectrum=e,
    )


def decomposed(function: Callable[[Tensor], Any], M: Float[Tensor, "d d"], name: str) -> Any:
    """Return ``function(M)``, a decomposition, with the factor named where it fails.

    Raises:
        OperatorError: it fails.
    """
    try:
        return function(M)
    except torch.linalg.LinAlgError as error:
        raise OperatorError(
            f"{name}: the decomposition of a matrix of shape {tuple(M.shape)} failed: {error}. Rescale it; its entries "
            f"reach {float(M.abs().max()):.3g}."
        ) from error


@dataclass(frozen=True, eq=False, repr=False)
class LagMoments:
    """The fields that the chains share, with their checks. Shapes are checked at once, entries at the first use."""

    lag0: tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]
    lag1: tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name, pair in (("lag0", self.lag0), ("lag1", self.lag1)):
            if not isinstance(pair, tuple) or len(pair) != len(FACTOR_NAMES):
                got = f"{len(pair)} of them" if isinstance(pair, tuple) else type(pair).__name__
                raise TypeError(f"{owner}: {name} must be a tuple of two matrices (G, A), got {got}.")
            for i, (moment, first) in enumerate(zip(pair, self.lag0, strict=True)):
                label = f"{name}[{i}]"
                check_tensor(owner, label, moment, ("d", "d"))
                check_tensor(owner, label, moment, (first.shape[0], first.shape[0]))
                check_alike(owner, **{"lag0[0]": self.lag0[0], label: moment})
        check_size(owner, self.size)

    @property
    def size(self) -> int:
        """D = d_out d_in."""
        return self.lag0[0].shape[0] * self.lag0[1].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """That of the moments."""
        return self.lag0[0].dtype

    @property
    def device(self) -> torch.device:
        """That of the moments."""
        return self.lag0[0].device

    @cached_property
    def whitened_factors(self) -> tuple[WhitenedFactor, ...]:
        """The factors G and A, whitened.

        Raises:
            OperatorError: as :func:`whitened`.
        """
        moments = zip(FACTOR_NAMES, self.lag0, self.lag1, strict=True)
        return tuple(whitened(F0, F1, f"factor {name} of {self!r}") for name, F0, F1 in moments)
