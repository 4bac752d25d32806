"""Weighted sums of approximations by the signs + - * /, and what to write where a sign makes no sense.

Symbols: A, B approximations, w a number: A + B, A - B, -A, w * A, A / w and sum([A, B]) are weighted sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import singledispatch
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, NoReturn, TypeGuard

from torch import Tensor

from curvlib.operators import LinearOperator

if TYPE_CHECKING:
    from curvlib.approximations.base import Approximation

Terms = tuple[tuple[float, "Approximation"], ...]

_SUMS = "Weighted sums are written A + B, A - B, 2.0 * A, A / 2.0, -A and sum([A, B])."


class Weighable(ABC):
    """What has a place in weighted sums of approximations."""

    # NumPy would otherwise take the approximation for a scalar.
    __array_ufunc__ = None

    @abstractmethod
    def _terms(self) -> Terms:
        """Return the pairs (weight, approximation) that this is the sum of."""

    @abstractmethod
    def _sum_of(self, terms: Terms) -> Approximation:
        """Return the approximation that is this sum."""

    def __add__(self, other: object) -> Approximation:
        if isinstance(other, Weighable):
            return self._sum_of((*self._terms(), *other._terms()))
        _refuse(self, "+", other)

    def __radd__(self, other: object) -> Approximation:
        if _is_number(other) and other == 0:  # where sum() starts
            return self  # type: ignore[return-value]
        _refuse(self, "+", other)

    def __sub__(self, other: object) -> Approximation:
        if isinstance(other, Weighable):
            return self._sum_of((*self._terms(), *_times(-1.0, other._terms())))
        _refuse(self, "-", other)

    def __rsub__(self, other: object) -> NoReturn:
        _refuse(self, "-", other)

    def __neg__(self) -> Approximation:
        return self._sum_of(_times(-1.0, self._terms()))

    def __mul__(self, factor: object) -> Approximation:
        if _is_number(factor):
            return self._sum_of(_times(float(factor), self._terms()))
        _refuse(self, "*", factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> Approximation:
        if not _is_number(divisor):
            _refuse(self, "/", divisor)
        # the weight itself would be refused without a word of the divisor
        if divisor == 0 or not isfinite(1.0 / float(divisor)):
            raise ValueError(f"an approximation cannot be divided by {divisor!r}: its weight would not be finite.")
        return self._sum_of(tuple((weight / float(divisor), part) for weight, part in self._terms()))

    def __rtruediv__(self, other: object) -> NoReturn:
        raise TypeError(
            f"{other!r} / {type(self).__name__} is no approximation: estimate the operator C first, and take "
            "damped_inverse(C, damping) of it."
        )

    def __matmul__(self, other: object) -> NoReturn:
        _refuse(self, "@", other)

    __rmatmul__ = __matmul__

    def __pow__(self, exponent: object) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} has no powers: estimate the operator C first, and take "
            "curvlib.spectra.matrix_power(C, exponent)."
        )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _times(factor: float, terms: Terms) -> Terms:
    return tuple((factor * weight, part) for weight, part in terms)


def _refuse(approximation: Weighable, sign: str, other: object) -> NoReturn:
    raise TypeError(f"{type(approximation).__name__} {sign} {type(other).__name__}: {_remedy(other, sign)}")


@singledispatch
def _remedy(other: object, sign: str) -> str:
    """Return what to write instead."""
    if _is_number(other) and sign in ("+", "-"):
        return (
            f"a number is no approximation. If {other!r} is a damping, give it to the solver, as in damped_inverse(C, "
            f"damping); a multiple of the identity is {other!r} * Identity()."
        )
    return f"expected {'a number' if sign in '*/' else 'another approximation'}, got {other!r}. {_SUMS}"


@_remedy.register
def _(other: LinearOperator, sign: str) -> str:
    return (
        "an approximation has no numbers before it is estimated. Estimate it first: C = approximation.estimate("
        f"evaluation), and combine operators, as in C {sign} other."
    )


@_remedy.register
def _(other: Tensor, sign: str) -> str:
    if sign == "*" and other.numel() == 1:
        return "a weight is a plain number: use float(weight)."
    return "an approximation has no products. Estimate it first: approximation.estimate(evaluation) @ vector."


@_remedy.register
def _(other: Weighable, sign: str) -> str:
    return f"products and quotients of approximations are none. {_SUMS}"
