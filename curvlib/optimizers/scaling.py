r"""The units in which a step is measured: parameters of different sizes are brought to one scale.

Symbols: C curvature operator, s (D,) > 0 the scales, S = diag(s), z = S theta the scaled parameters, d step,
g gradient. In z the gradient is S^-1 g and the curvature S^-1 C S^-1; a radius bounds \|S d\|, a damping adds
lambda S^2 to C.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import singledispatch
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import Dense, Diagonal, LinearOperator, LowRank, MatrixFree, Shifted


class Scaling(ABC):
    """A frozen configuration of a way to choose the scales of the parameters."""

    #: Whether the scales come from a curvature that must not be indefinite.
    needs_definite: ClassVar[bool] = False

    def check(self, size: int) -> None:  # noqa: B027 - most have nothing to check
        """Refuse a number of parameters D that the scales do not fit, before any computation.

        Raises:
            ValueError: names both numbers.
        """

    @abstractmethod
    def scales(self, operator: LinearOperator, previous: Float[Tensor, " D"] | None) -> Float[Tensor, " D"]:
        """Return s (D,) > 0 of this step.

        Args:
            operator: C at the step.
            previous: s of the last step that was taken, None before the first one.
        """


@dataclass(frozen=True)
class CurvatureScaling(Scaling):
    r"""The largest root of the curvature of each parameter so far.

    .. math:: s_i \leftarrow \max(s_i, \sqrt{C_{ii}})

    For least squares these are the norms of the Jacobian's columns, times a constant, and the steps do not depend on
    the units of the parameters. More, "The Levenberg-Marquardt algorithm: implementation and theory" (1978), section
    6, as in MINPACK. The maximum keeps a parameter whose curvature has vanished on the way from running away.
    Parameters without curvature at the first step get 1. The diagonal of a matrix-free operator costs D products.
    """

    needs_definite: ClassVar[bool] = True

    def scales(self, operator: LinearOperator, previous: Float[Tensor, " D"] | None) -> Float[Tensor, " D"]:
        """Return the maximum of the last scales and the roots.

        Raises:
            ValueError: an entry of the diagonal is negative.
        """
        diagonal = operator.diagonal()
        if bool((diagonal < 0).any()):
            raise ValueError(
                f"CurvatureScaling needs a curvature whose diagonal is not negative, got {float(diagonal.min())!r} in "
                f"that of {operator!r}: use GGN(), Fisher() or EmpiricalFisher(), or FixedScaling(scales)."
            )
        roots = diagonal.sqrt()
        return torch.where(roots > 0, roots, 1.0) if previous is None else torch.maximum(previous, roots)


@dataclass(frozen=True, eq=False)
class FixedScaling(Scaling):
    """Scales that are given: the inverse of what is a small change of each parameter.

    Args:
        values: s (D,), finite numbers > 0.

    Raises:
        TypeError, ValueError: the values are no such vector.
    """

    values: Float[Tensor, " D"]

    def __post_init__(self) -> None:
        s = self.values
        if not isinstance(s, Tensor) or s.ndim != 1 or not s.is_floating_point():
            raise TypeError(f"FixedScaling(values=...) must be a floating-point vector (D,), got {s!r}.")
        if not bool((s.isfinite() & (s > 0)).all()):
            raise ValueError(f"FixedScaling(values=...) must be finite numbers > 0, got {s.tolist()}.")

    def check(self, size: int) -> None:
        """Refuse another number of parameters than there are scales.

        Raises:
            ValueError: names both numbers.
        """
        if size != len(self.values):
            raise ValueError(
                f"FixedScaling has {len(self.values)} values, and the objective another size, {size} parameters."
            )

    def scales(self, operator: LinearOperator, previous: Float[Tensor, " D"] | None) -> Float[Tensor, " D"]:
        """Return the values.

        Raises:
            ValueError: the operator is of another size.
        """
        if operator.size != len(self.values):
            raise ValueError(f"FixedScaling has {len(self.values)} values, and {operator!r} another size.")
        return self.values.to(operator.device, operator.dtype)


@singledispatch
def in_scaled_parameters(operator: LinearOperator, s: Float[Tensor, " D"]) -> LinearOperator:
    """Return S^-1 C S^-1, in the structure of C where that keeps it; ``register`` adds a rule for your own operator."""
    column = s.unsqueeze(1)
    return MatrixFree(
        lambda V: (operator @ (V / column)) / column,
        operator.size,
        operator.dtype,
        operator.device,
        quadratic_form=lambda V: operator.quadratic_form(V / column),
    )


@in_scaled_parameters.register
def _(operator: Dense, s: Float[Tensor, " D"]) -> LinearOperator:
    return Dense(operator.to_dense() / s / s.unsqueeze(1))


@in_scaled_parameters.register
def _(operator: Diagonal, s: Float[Tensor, " D"]) -> LinearOperator:
    return Diagonal(operator.diagonal() / s / s)


@in_scaled_parameters.register
def _(operator: LowRank, s: Float[Tensor, " D"]) -> LinearOperator:
    precise = s.to(operator.factor.dtype)
    return LowRank(
        operator.factor / precise.unsqueeze(1),
        operator.weights,
        operator.diagonal_part / precise / precise,
        dtype=operator.dtype,
    )


@in_scaled_parameters.register
def _(operator: Shifted, s: Float[Tensor, " D"]) -> LinearOperator:
    return in_scaled_parameters(operator.operator, s) + Diagonal(operator.shift / s / s)
