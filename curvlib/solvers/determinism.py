"""Whether an operator gives the same product twice, as every solver takes for granted.

Symbols: C (D, D) the operator, v (D,) a vector of random signs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

import torch

from curvlib.operators import LinearOperator, full_precision
from curvlib.solvers.blockwise_damping import damping_structure
from curvlib.solvers.definiteness import gives_descent, takes_indefinite
from curvlib.solvers.errors import SolveError
from curvlib.solvers.inverse import damped_inverse


class StochasticOperatorError(SolveError):
    """Two products of an operator with one vector differ by more than rounding."""


def check_deterministic(operator: LinearOperator, generator: torch.Generator | None = None) -> None:
    r"""Refuse an operator whose products with one vector differ.

    .. math:: |C v - (C v)'| > \sqrt{\epsilon} \, \max(|C v|, |(C v)'|)

    Conjugate gradients and everything else that multiplies more than once solve no system at all if the matrix is
    another one each time. Rounding in parallel sums, which differs from call to call on some devices, stays far below
    half of the digits; a mask of dropout that is drawn anew, or another batch, far above.

    Args:
        operator: C; two products are made.
        generator: where v comes from; None is a fixed vector.

    Raises:
        StochasticOperatorError: the products differ, or one is finite and the other is not.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> check_deterministic(Diagonal(torch.ones(3)))
    """
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"check_deterministic needs a LinearOperator, got {type(operator).__name__}.")
    source = generator if generator is not None else torch.Generator(operator.device).manual_seed(0)
    bits = torch.randint(2, (operator.size,), generator=source, device=source.device)
    v = (2 * bits - 1).to(operator.device, operator.dtype)
    with full_precision(operator.device):
        products = torch.stack([operator @ v, operator @ v]).detach()
    difference = torch.linalg.vector_norm(products[0] - products[1])
    sizes = torch.linalg.vector_norm(products, dim=1)
    off, first, second = torch.stack([difference, *sizes]).tolist()
    # Two that are not finite are for the solver's own status.
    alike = off <= torch.finfo(operator.dtype).eps ** 0.5 * max(first, second)
    if (isfinite(off) and alike) or not (isfinite(first) or isfinite(second)):
        return
    raise StochasticOperatorError(
        f"two products of {operator!r} with one vector differ by {off:.3g}, their norms are {first:.3g} and "
        f"{second:.3g}: the operator is stochastic, and no solver that multiplies twice can use it. Call model.eval() "
        "to switch off dropout and to freeze batch normalisation, or keep the random numbers: the operators of one "
        "evaluation do, objective.at(batch) draws once."
    )


@dataclass(frozen=True, kw_only=True)
class DeterminismCheck:
    """A solver that first refuses operators whose products with one vector differ, at the cost of two products.

    Args:
        solver: (C, damping) -> inverse, which is asked afterwards.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> DeterminismCheck()(Diagonal(torch.ones(2)), 1.0).diagonal()
        tensor([0.5000, 0.5000])
    """

    solver: Callable[[LinearOperator, float], LinearOperator] = damped_inverse

    def __post_init__(self) -> None:
        if not callable(self.solver):
            raise TypeError(
                "DeterminismCheck(solver=...) must be a solver (C, damping) -> inverse such as damped_inverse or CG(), "
                f"got {self.solver!r}."
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
        """Return the solver's inverse.

        Raises:
            StochasticOperatorError: the products differ.
        """
        check_deterministic(operator)
        return self.solver(operator, damping)


@damping_structure.register
def _(solver: DeterminismCheck, like: LinearOperator) -> LinearOperator | None:
    return damping_structure(solver.solver, like)
