r"""Normal random vectors whose covariance is an operator, or its inverse: a Laplace approximation's draws.

Symbols: C (D, D) the operator, lambda the damping, z standard normal, q = 1/2 or -1/2. Any S with
S S^T = (C + lambda I)^2q serves: x = S z has that covariance. S need not be symmetric, which gives operators a rule
whose symmetric root has no structure.
"""

from __future__ import annotations

from functools import singledispatch
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import BlockDiagonal, LinearOperator, LowRank, Scaled, Shifted, Sum, full_precision
from curvlib.operators.structure import merge
from curvlib.solvers import SolveError, damped_inverse
from curvlib.solvers.damping_scale import checked_damping
from curvlib.spectra.power import matrix_power
from curvlib.spectra.probes import Normal, check_count, check_generator


def sample(
    operator: LinearOperator, count: int, generator: torch.Generator | None = None, damping: float = 0.0
) -> Float[Tensor, "D K"]:
    r"""Return independent draws of a normal distribution whose covariance is the damped operator.

    .. math:: x \sim N(0, \, C + \lambda I)

    Besides the structures of :func:`matrix_function`, :class:`LowRank` with any positive diagonal and sums of positive
    semi-definite terms have a rule, also as blocks.

    Args:
        operator: C, symmetric; C + lambda I must be positive semi-definite.
        count: K, the number of draws, at least 1.
        generator: source of the random numbers, on the operator's device; None is PyTorch's global one.
        damping: lambda >= 0, in the units of C.

    Returns:
        The draws, one a column.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of its range.
        NoStructureError: neither the structure of C nor that of a sum's terms gives its eigenvectors.
        SolveError: C + lambda I is not positive semi-definite, or a sum has a term that is not.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> x = sample(Diagonal(torch.tensor([1.0, 100.0])), 10_000, torch.Generator().manual_seed(0))
        >>> x.std(1).round()
        tensor([ 1., 10.])
    """
    return _checked_draw("sample", operator, 0.5, count, generator, damping)


def sample_inverse(
    operator: LinearOperator, count: int, generator: torch.Generator | None = None, damping: float = 0.0
) -> Float[Tensor, "D K"]:
    r"""Return independent draws of a normal distribution whose precision is the damped operator.

    .. math:: x \sim N(0, \, (C + \lambda I)^{-1})

    Rules and arguments are those of :func:`sample`. For a sum without common structure, x = (C + lambda I)^-1 y with a
    draw y of covariance C + lambda I (Papandreou & Yuille, "Gaussian sampling by local perturbations", NeurIPS 2010),
    by :func:`curvlib.solvers.damped_inverse`.

    Raises:
        TypeError, ValueError, NoStructureError: as :func:`sample`.
        SolveError: C + lambda I is not positive definite.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> x = sample_inverse(Diagonal(torch.tensor([1.0, 0.01])), 10_000, torch.Generator().manual_seed(0))
        >>> x.std(1).round()
        tensor([ 1., 10.])
    """
    return _checked_draw("sample_inverse", operator, -0.5, count, generator, damping)


def _checked_draw(
    owner: str, operator: LinearOperator, q: float, count: int, generator: torch.Generator | None, damping: float
) -> Float[Tensor, "D K"]:
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"{owner}: operator must be a LinearOperator, got {type(operator).__name__}.")
    check_count(owner, "count", count, least=1)
    check_generator(generator, operator)
    with full_precision(operator.device):
        return _draw(operator, q, count, generator, checked_damping(damping))


def _noise(size: int, count: int, like: LinearOperator, generator: torch.Generator | None) -> Float[Tensor, "D K"]:
    return Normal().draw(size, count, like.dtype, like.device, generator)


@singledispatch
def _draw(
    operator: LinearOperator, q: float, count: int, generator: torch.Generator | None, damping: float
) -> Float[Tensor, "D K"]:
    root = matrix_power(operator, q, damping)
    return root @ _noise(operator.size, count, operator, generator)


@_draw.register
def _(
    operator: Scaled, q: float, count: int, generator: torch.Generator | None, damping: float
) -> Float[Tensor, "D K"]:
    if operator.factor <= 0.0 or not isfinite(damping / operator.factor):
        return _by_default(operator, q, count, generator, damping)
    return operator.factor**q * _draw(operator.operator, q, count, generator, damping / operator.factor)


@_draw.register
def _(
    operator: Shifted, q: float, count: int, generator: torch.Generator | None, damping: float
) -> Float[Tensor, "D K"]:
    total = damping + operator.shift
    if total < 0.0:
        return _by_default(operator, q, count, generator, damping)
    return _draw(operator.operator, q, count, generator, total)


@_draw.register
def _(operator: Sum, q: float, count: int, generator: torch.Generator | None, damping: float) -> Float[Tensor, "D K"]:
    rest, shift = merge(operator)
    if not isinstance(rest, Sum):
        return _draw(Shifted(rest, shift), q, count, generator, damping)
    if q < 0.0:
        inverse = damped_inverse(operator, damping)
        return inverse @ _draw(operator, 0.5, count, generator, damping)
    total = damping + shift
    if total < 0.0:
        raise SolveError(f"{operator!r} is drawn from term by term, but its multiples of I add up to {total:.3g} < 0.")
    # Covariances of independent vectors add up.
    draws = total**0.5 * _noise(operator.size, count, operator, generator)
    for i, term in enumerate(rest.terms):
        try:
            draws = draws + _draw(term, q, count, generator, 0.0)
        except SolveError as error:
            raise SolveError(
                f"{operator!r} is drawn from term by term, so that each has to be positive semi-definite. Term {i}: "
                f"{error} Or use Dense(C.to_dense())."
            ) from error
    return draws


@_draw.register
def _(
    operator: BlockDiagonal, q: float, count: int, generator: torch.Generator | None, damping: float
) -> Float[Tensor, "D K"]:
    result = torch.zeros(operator.size, count, dtype=operator.dtype, device=operator.device)
    for block, index in zip(operator.blocks, operator.coordinates, strict=True):
        result[index] = _draw(block, q, count, generator, damping)
    rest = operator.uncovered()
    if len(rest) and damping == 0.0 and q < 0.0:
        raise SolveError(
            f"{operator!r} has zero curvature on {len(rest)} coordinates that belong to no block, so that their "
            "variance is infinite: use a damping > 0."
        )
    if len(rest):
        result[rest] = damping**q * _noise(len(rest), count, operator, generator)
    return result


@_draw.register
def _(
    operator: LowRank, q: float, count: int, generator: torch.Generator | None, damping: float
) -> Float[Tensor, "D K"]:
    """S = E^q (I + Q ((1 + s)^q - 1) Q^T), Q diag(s) Q^T = E^-1/2 U diag(w) U^T E^-1/2, E = diag(d) + lambda I."""
    E = operator.diagonal_part.double() + damping
    if not bool((E > 0.0).all()):
        return _by_default(operator, q, count, generator, damping)
    s, Q = operator.orthogonal_form(E)
    if bool((1.0 + s <= len(s) * torch.finfo(s.dtype).eps).any()):
        raise SolveError(
            f"C + damping I is not positive definite for {operator!r} with damping = {damping:.3g}: relative to its "
            f"diagonal it has the eigenvalue {float(1.0 + s.min()):.3g}. Use a larger damping."
        )
    z = _noise(operator.size, count, operator, generator).double()
    inside = Q @ (((1.0 + s) ** q - 1.0).unsqueeze(1) * (Q.T @ z))
    return (E.unsqueeze(1) ** q * (z + inside)).to(operator.dtype)


def _by_default(
    operator: LinearOperator, q: float, count: int, generator: torch.Generator | None, damping: float
) -> Float[Tensor, "D K"]:
    return _draw.dispatch(LinearOperator)(operator, q, count, generator, damping)
