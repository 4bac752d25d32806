r"""In which norm a trust region measures the steps along a path of conjugate gradients.

Symbols: P the preconditioner, M = P^-1, d (D,) the iterate, p the search direction, r the residual, alpha the step
along p, beta that of the next direction p <- -P r + beta p, rho = r^T P r, Delta the radius, tau >= 0 the step to the
boundary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class RegionNorm(ABC):
    """A frozen choice of the norm that the radius bounds."""

    @property
    def needs_preconditioner(self) -> bool:
        """Whether it is the norm of a preconditioner. Default: it is not."""
        return False

    @abstractmethod
    def start(self, like: Float[Tensor, " D"]) -> PathLengths:
        """Return the lengths of a path at its start d = 0, on the device of a vector."""


@dataclass(frozen=True)
class EuclideanNorm(RegionNorm):
    r"""The ball \|d\| <= Delta, whatever the preconditioner: the radius is in the units of the parameters."""

    def start(self, like: Float[Tensor, " D"]) -> PathLengths:
        """Return the lengths of a path."""
        return _Euclidean()


@dataclass(frozen=True)
class PreconditionerNorm(RegionNorm):
    r"""The ellipsoid of the preconditioner's inverse, the ball of preconditioned variables.

    .. math:: |d|_M^2 = d^T P^{-1} d \le \Delta^2

    With P = L L^T and d = L y it is \|y\| <= Delta: preconditioned conjugate gradients are plain ones on
    L^T (C + lambda I) L, and all that holds for those in a ball holds here. \|d\|_M grows from iterate to iterate, so
    that the first one outside ends the path, and no step is worse than the Cauchy point along -P g. Where P is close to
    (C + lambda I)^-1 the radius bounds the root of twice the quadratic term of the model, and is in the units of the
    root of the objective.

    Steihaug (1983), section 2; Conn, Gould & Toint, "Trust-region methods" (2000), algorithm 7.5.1. No product with M:

    .. math:: |d + \alpha p|_M^2 = |d|_M^2 + 2 \alpha \langle d, p \rangle_M + \alpha^2 |p|_M^2, \quad
        \langle d, p \rangle_M \leftarrow \beta (\langle d, p \rangle_M + \alpha |p|_M^2), \quad
        |p|_M^2 \leftarrow \rho + \beta^2 |p|_M^2

    These hold where r is orthogonal to the last d and p. As rounding errors take that away, lengths stay right to some
    1e-4 of themselves in float32 and 1e-7 in float64 (hundreds of iterations, condition numbers up to 1e6), and they
    never fall.
    """

    @property
    def needs_preconditioner(self) -> bool:
        """True."""
        return True

    def start(self, like: Float[Tensor, " D"]) -> PathLengths:
        """Return the lengths of a path."""
        return _Preconditioned(like)


class PathLengths(ABC):
    """Lengths along one path; scalars stay on the device, in float64 against the squares of a far radius."""

    @abstractmethod
    def after(self, d: Float[Tensor, " D"], p: Float[Tensor, " D"], alpha: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Return the length of d + alpha p."""

    @abstractmethod
    def to_boundary(
        self, d: Float[Tensor, " D"], p: Float[Tensor, " D"], radius: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """Return tau >= 0 where d + tau p has the length of the radius, for a d inside."""

    @abstractmethod
    def move(self, moved: Bool[Tensor, ""], alpha: Float[Tensor, ""]) -> None:
        """Learn of d <- d + alpha p, where it is moved."""

    @abstractmethod
    def turn(self, beta: Float[Tensor, ""], rho: Float[Tensor, ""]) -> None:
        """Learn of p <- -P r + beta p."""

    @abstractmethod
    def of_path(self) -> Float[Tensor, ""] | None:
        """Return the length of d, None where that is the Euclidean one."""


class _Euclidean(PathLengths):
    def after(self, d: Float[Tensor, " D"], p: Float[Tensor, " D"], alpha: Float[Tensor, ""]) -> Float[Tensor, ""]:
        return torch.linalg.vector_norm(d + alpha.to(p) * p).double()

    def to_boundary(
        self, d: Float[Tensor, " D"], p: Float[Tensor, " D"], radius: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        return _root((d @ d).double(), (d @ p).double(), (p @ p).double(), radius)

    def move(self, moved: Bool[Tensor, ""], alpha: Float[Tensor, ""]) -> None:
        pass

    def turn(self, beta: Float[Tensor, ""], rho: Float[Tensor, ""]) -> None:
        pass

    def of_path(self) -> Float[Tensor, ""] | None:
        return None


class _Preconditioned(PathLengths):
    """The recurrences; a path that has ended keeps its length, whatever the other two become."""

    def __init__(self, like: Float[Tensor, " D"]) -> None:
        self._dd = torch.zeros((), dtype=torch.float64, device=like.device)
        self._dp, self._pp = self._dd, self._dd

    def after(self, d: Float[Tensor, " D"], p: Float[Tensor, " D"], alpha: Float[Tensor, ""]) -> Float[Tensor, ""]:
        return self._square_after(alpha).sqrt()

    def to_boundary(
        self, d: Float[Tensor, " D"], p: Float[Tensor, " D"], radius: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        return _root(self._dd, self._dp, self._pp, radius)

    def move(self, moved: Bool[Tensor, ""], alpha: Float[Tensor, ""]) -> None:
        self._dd = torch.where(moved, self._square_after(alpha), self._dd)
        self._dp = self._dp + alpha * self._pp

    def turn(self, beta: Float[Tensor, ""], rho: Float[Tensor, ""]) -> None:
        self._dp, self._pp = beta * self._dp, rho + beta.square() * self._pp

    def of_path(self) -> Float[Tensor, ""] | None:
        return self._dd.sqrt()

    def _square_after(self, alpha: Float[Tensor, ""]) -> Float[Tensor, ""]:
        return self._dd + alpha * (2.0 * self._dp + alpha * self._pp)


def _root(
    dd: Float[Tensor, ""], dp: Float[Tensor, ""], pp: Float[Tensor, ""], radius: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Return tau >= 0 with dd + 2 tau dp + tau^2 pp = radius^2, without a cancellation or a square of the radius."""
    size, part = pp.sqrt(), dd.sqrt() / radius
    cosine = dp / radius / size
    room = ((1.0 - part) * (1.0 + part)).clamp(min=0.0)
    root = (cosine.square() + room).sqrt()
    return torch.where(cosine > 0, room / (cosine + root), root - cosine) * radius / size
