r"""The QLP factorisation of the Lanczos tridiagonal matrix, which builds the iterates of MINRES stably.

MINRES forms x from W = V R^-1, T = Q R. The columns of W are as long as 1 / gamma and cancel, which costs the square of
the condition. Choi, Paige & Saunders, "MINRES-QLP: a Krylov subspace method for indefinite or singular symmetric
systems" (2011), reflect R from the right as well,

.. math:: Q T P = L, \quad x = (V P) u, \quad L u = t

with orthonormal V P, so that rounding errors of x are those of its own size. Symbols, for each of the K columns:
    gamma                 (K,)     diagonal of L, its last three still changing
    t                     (K,)     Q beta_1 e_1
    u                     (K,)     coordinates of x in V P, the last two still changing
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def reflection(
    a: Float[Tensor, " K"], b: Float[Tensor, " K"]
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"], Float[Tensor, " K"]]:
    """Return c, s and the size r >= 0 with (c, s; s, -c) (a, b) = (r, 0)."""
    size = torch.hypot(a, b)
    c = torch.where(size == 0, 1.0, a / size)
    return c, torch.where(size == 0, 0.0, b / size), size


@dataclass(frozen=True, kw_only=True, eq=False)
class Coefficients:
    """What one iteration does to the vectors: two reflections from the right, and the last coordinates of x."""

    c2: Float[Tensor, " K"]
    s2: Float[Tensor, " K"]
    c1: Float[Tensor, " K"]
    s1: Float[Tensor, " K"]
    u2: Float[Tensor, " K"]
    u1: Float[Tensor, " K"]
    u: Float[Tensor, " K"]


class Factorization:
    """Reflects R from the right and solves with L, a column at a time; names as in the MATLAB program of the authors.

    Args:
        like: (K,), of the columns' dtype and device.
    """

    def __init__(self, like: Float[Tensor, " K"]) -> None:
        nothing, minus = torch.zeros_like(like), -torch.ones_like(like)
        self._c2, self._s2 = minus, nothing
        self._gammal, self._gamma = nothing, nothing
        self._vepsl, self._veps, self._etal, self._eta = nothing, nothing, nothing, nothing
        self._taul, self._tau = nothing, nothing
        self._ul3, self._ul2 = nothing, nothing

    def add(
        self,
        delta: Float[Tensor, " K"],
        gamma: Float[Tensor, " K"],
        tau: Float[Tensor, " K"],
        next_epsilon: Float[Tensor, " K"],
    ) -> Coefficients:
        """Take delta and gamma of a column of R, its tau of t and the epsilon of the next; return what moves x."""
        gammal2, gammal = self._gammal, self._gamma
        taul2, taul = self._taul, self._tau
        # P_{k-2,k}, which the last column has announced
        c2, s2 = self._c2, self._s2
        vepsl2, etal2, etal = self._vepsl, self._etal, self._eta
        delta, vepsl = s2 * self._veps - c2 * delta, c2 * self._veps + s2 * delta
        eta, gamma = s2 * gamma, -c2 * gamma
        # P_{k-1,k}
        c1, s1, gammal = reflection(gammal, delta)
        veps, gamma = s1 * gamma, -c1 * gamma
        ul4, ul3 = self._ul3, self._ul2
        ul2 = _quotient(taul2 - etal2 * ul4 - vepsl2 * ul3, gammal2)
        ul = _quotient(taul - etal * ul3 - vepsl * ul2, gammal)
        u = (tau - eta * ul2 - veps * ul) / gamma
        self._c2, self._s2, gammal = reflection(gammal, next_epsilon)
        self._gammal, self._gamma, self._taul, self._tau = gammal, gamma, taul, tau
        self._vepsl, self._veps, self._etal, self._eta = vepsl, veps, etal, eta
        self._ul3, self._ul2 = ul3, ul2
        return Coefficients(c2=c2, s2=s2, c1=c1, s1=s1, u2=ul2, u1=ul, u=u)


class Path:
    """The iterates x = start + (V P) u, from the Lanczos vectors.

    Args:
        start: (D, K).
    """

    def __init__(self, start: Float[Tensor, "D K"]) -> None:
        zero = torch.zeros_like(start)
        self._settled, self._w_last, self._w = start, zero, zero

    def add(self, v: Float[Tensor, "D K"], by: Coefficients) -> Float[Tensor, "D K"]:
        """Return the iterate after the Lanczos vector v."""
        w2 = by.c2 * self._w_last + by.s2 * v
        w = by.s2 * self._w_last - by.c2 * v
        w, w1 = by.s1 * self._w - by.c1 * w, by.c1 * self._w + by.s1 * w
        self._settled = self._settled + by.u2 * w2
        self._w_last, self._w = w1, w
        return self._settled + by.u1 * w1 + by.u * w


def _quotient(a: Float[Tensor, " K"], b: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Return a / b, 0 where there is no such coordinate yet."""
    return torch.where(b == 0, 0.0, a / b)
