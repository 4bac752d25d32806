r"""Inverses of the chains of recurrent layers.

Symbols: C the chain, G_0 and A_0 its lag-0 moments, lambda the damping, gamma = sqrt(lambda), p_G and p_A the shares of
the factors, with p_G p_A = 1: p_A = pi and p_G = 1 / pi.
"""

from __future__ import annotations

from dataclasses import replace

from curvlib.operators import Dense, GeneralKroneckerChain, LinearOperator, OperatorError, SymmetricKroneckerChain
from curvlib.solvers.errors import SolveError
from curvlib.solvers.factored_tikhonov import FactoredTikhonov
from curvlib.solvers.inverse import damped_inverse, inverse_by_cg

Chain = SymmetricKroneckerChain | GeneralKroneckerChain


@damped_inverse.register(SymmetricKroneckerChain)  # type: ignore[attr-defined]
@damped_inverse.register(GeneralKroneckerChain)  # type: ignore[attr-defined]
def _(operator: Chain, damping: float) -> LinearOperator:
    # A multiple of the identity is diagonal in no basis in which the lags are.
    if damping > 0.0:
        return inverse_by_cg(operator, damping, preconditioner=FactoredTikhonov()(operator, damping))
    try:
        return operator.inverse()
    except OperatorError as error:
        raise SolveError(str(error)) from error


@FactoredTikhonov.register(SymmetricKroneckerChain)
@FactoredTikhonov.register(GeneralKroneckerChain)
def _(operator: Chain, damping: float, solver: FactoredTikhonov) -> LinearOperator:
    r"""Damp the lag-0 moments: G_0 + gamma / pi I and A_0 + pi gamma I, the lag-1 moments as they are.

    Martens, Ba & Johnson (2018). What correlates is then a smaller part of each step.
    """
    shares = solver.balance.shares(tuple(Dense(moment) for moment in operator.lag0))
    root = damping**0.5
    G, A = (moment.clone() for moment in operator.lag0)
    for moment, share in zip((G, A), shares, strict=True):
        moment.diagonal().add_(share * root)
    try:
        return damped_inverse(replace(operator, lag0=(G, A)), 0.0)
    except SolveError as error:
        raise error.within(f"{operator!r} with the damping {damping:.3g} in its lag-0 moments") from error
