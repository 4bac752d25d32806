r"""Inverses of Markov chains of Kronecker products (Martens & Grosse 2015, sec. 4.3 and 6.6).

Symbols: C the chain, G_i and A_i its moments, lambda the damping, gamma = sqrt(lambda), pi_i the share of A_i.
"""

from __future__ import annotations

from dataclasses import replace

from curvlib.operators import Dense, KroneckerMarkovChain, LinearOperator, OperatorError
from curvlib.solvers.errors import SolveError
from curvlib.solvers.factored_tikhonov import FactoredTikhonov
from curvlib.solvers.inverse import damped_inverse, inverse_by_cg


@damped_inverse.register(KroneckerMarkovChain)  # type: ignore[attr-defined]
def _(operator: KroneckerMarkovChain, damping: float) -> LinearOperator:
    # C + lambda I is no Markov chain: what is added to a covariance is not added to its precision.
    if damping > 0.0:
        return inverse_by_cg(operator, damping, preconditioner=FactoredTikhonov()(operator, damping))
    try:
        return operator.inverse()
    except OperatorError as error:
        raise SolveError(str(error)) from error


@FactoredTikhonov.register(KroneckerMarkovChain)
def _(operator: KroneckerMarkovChain, damping: float, solver: FactoredTikhonov) -> LinearOperator:
    r"""Damp the moments of every block, G_i + gamma / pi_i I and A_i + pi_i gamma I; cross moments stay as they are."""
    root, moments = damping**0.5, []
    for pair in operator.moments:
        shares = solver.balance.shares(tuple(Dense(moment) for moment in pair))
        G, A = (moment.clone() for moment in pair)
        for moment, share in zip((G, A), shares, strict=True):
            moment.diagonal().add_(share * root)
        moments.append((G, A))
    try:
        return damped_inverse(replace(operator, moments=tuple(moments)), 0.0)
    except SolveError as error:
        raise error.within(f"{operator!r} with the damping {damping:.3g} in its moments") from error
