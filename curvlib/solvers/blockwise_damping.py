r"""A damping that differs from coordinate to coordinate, as a solver.

Symbols: C (D, D) the operator, lambda the damping, f (D,) the factors, v = lambda f (D,) the damping of each
coordinate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import singledispatch
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import BlockDiagonal, Diagonal, LinearOperator, Scaled, Shifted, full_precision
from curvlib.solvers.damping_scale import checked_damping
from curvlib.solvers.definiteness import gives_descent, takes_indefinite
from curvlib.solvers.errors import SolveError
from curvlib.solvers.inverse import damped_inverse

Inverter = Callable[[LinearOperator, float], LinearOperator]


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockwiseDamping:
    r"""Inverse with another damping for each coordinate.

    .. math:: (C + \lambda \, \mathrm{diag}(f))^{-1}

    A block of a :class:`BlockDiagonal` whose coordinates have one factor gets the solver with a damping lambda f of
    its own, so that ``FactoredTikhonov()`` shares it among the factors. Where factors differ inside a block or in an
    operator without blocks, the least damping is the solver's and the rest is added to the operator: exact with
    ``damped_inverse``, by structure for diagonal, dense and low-rank operators and by conjugate gradients for others.

    Args:
        factors: f (D,), finite and not negative.
        solver: (C, lambda) -> inverse.

    Raises:
        TypeError, ValueError: the factors are no such vector, or the solver cannot be called.

    Example:
        >>> solver = BlockwiseDamping(factors=torch.tensor([1.0, 3.0]))
        >>> solver(Diagonal(torch.tensor([1.0, 1.0])), 1.0).diagonal()
        tensor([0.5000, 0.2500])
    """

    factors: Float[Tensor, " D"]
    solver: Inverter = field(default=damped_inverse)

    def __post_init__(self) -> None:
        f = self.factors
        if not isinstance(f, Tensor) or f.ndim != 1 or not f.is_floating_point():
            raise TypeError(f"BlockwiseDamping(factors=...) must be a floating-point vector (D,), got {f!r}.")
        if not bool((f.isfinite() & (f >= 0)).all()):
            raise ValueError(f"BlockwiseDamping(factors=...) must be finite numbers >= 0, got {f.aminmax()}.")
        if not callable(self.solver):
            raise TypeError(
                f"BlockwiseDamping(solver=...) must be a solver (C, damping) -> inverse such as damped_inverse or "
                f"FactoredTikhonov(), got {self.solver!r}."
            )

    @property
    def takes_indefinite(self) -> bool:
        """Whether the solver inside does."""
        return takes_indefinite(self.solver)

    @property
    def gives_descent(self) -> bool:
        """Whether the solver inside does."""
        return gives_descent(self.solver)

    def __call__(self, operator: LinearOperator, damping: float) -> LinearOperator:
        """Return (C + damping diag(f))^-1.

        Raises:
            TypeError: the operator or the damping is of another kind.
            ValueError: the operator has another size than the factors, or the damping is negative or not finite.
            SolveError: the damped operator is not positive definite or not finite.
        """
        if not isinstance(operator, LinearOperator):
            raise TypeError(f"BlockwiseDamping: operator must be a LinearOperator, got {type(operator).__name__}.")
        damping = checked_damping(damping)
        if operator.size != len(self.factors):
            raise ValueError(
                f"BlockwiseDamping: operator must have the size {len(self.factors)} of the factors, got {operator!r}."
            )
        with full_precision(operator.device):
            return _inverse(operator, damping * self.factors.to(operator.device, torch.float64), self.solver)


@singledispatch
def damping_structure(solver: object, like: LinearOperator) -> LinearOperator | None:
    """Return the R of a solver whose damping is lambda (I + R), in the dtype of an operator; None for lambda I.

    Quadratic models of the same damping take it. ``damping_structure.register`` adds a solver of your own.
    """
    return None


@damping_structure.register
def _(solver: BlockwiseDamping, like: LinearOperator) -> LinearOperator | None:
    return Diagonal((solver.factors - 1.0).to(like.device, like.dtype))


@singledispatch
def _inverse(operator: LinearOperator, values: Float[Tensor, " D"], solver: Inverter) -> LinearOperator:
    """Return (C + diag(v))^-1 by a solver of one damping."""
    least, most = torch.stack(values.aminmax()).tolist()
    if least == most:
        return solver(operator, least)
    return solver(operator + Diagonal((values - least).to(operator.dtype)), least)


@_inverse.register
def _(operator: Shifted, values: Float[Tensor, " D"], solver: Inverter) -> LinearOperator:
    if operator.shift >= 0.0:
        return _inverse(operator.operator, values + operator.shift, solver)
    return _inverse.dispatch(LinearOperator)(operator, values, solver)


@_inverse.register
def _(operator: Scaled, values: Float[Tensor, " D"], solver: Inverter) -> LinearOperator:
    # (c C + diag(v))^-1 = (C + diag(v) / c)^-1 / c; only c > 0 leaves a damping.
    if operator.factor > 0.0 and isfinite(1.0 / operator.factor):
        return Scaled(1.0 / operator.factor, _inverse(operator.operator, values / operator.factor, solver))
    return _inverse.dispatch(LinearOperator)(operator, values, solver)


@_inverse.register
def _(operator: BlockDiagonal, values: Float[Tensor, " D"], solver: Inverter) -> LinearOperator:
    inverses = []
    for i, (block, index) in enumerate(zip(operator.blocks, operator.coordinates, strict=True)):
        try:
            inverses.append(_inverse(block, values[index], solver))
        except SolveError as error:
            raise error.within(f"Block {i} of {operator!r}") from error
    result, rest = operator.with_blocks(tuple(inverses)), operator.uncovered()
    if not len(rest):
        return result
    outside = values[rest]
    if bool((outside <= 0.0).any()):
        raise SolveError(
            f"{operator!r} has zero curvature on coordinates that belong to no block and have no damping: use a "
            "damping and a factor > 0 there."
        )
    filling = Diagonal(outside.reciprocal().to(operator.dtype))
    return BlockDiagonal((*result.blocks, filling), (*result.coordinates, rest), operator.size)
