r"""Inverses of sums: by a common structure where there is one, else by well preconditioned conjugate gradients.

Symbols: F = F_1 (x) ... (x) F_k and S = S_1 (x) ... (x) S_k Kronecker products of equal shape; d a diagonal; mu >= 0
everything that is added to the diagonal, the damping among it; R_i the Cholesky factors, S_i = R_i R_i^T.

Two Kronecker products are made diagonal together, factor by factor: with R_i^-1 F_i R_i^-T = Q_i diag(e_i) Q_i^T and
N_i = Q_i^T R_i^-1,

.. math:: (F + S)^{-1} = (N_1 \otimes ... \otimes N_k)^T \frac{1}{e_1 \otimes ... \otimes e_k + 1} (N_1 \otimes ...)

(Martens & Grosse 2015, appendix B). A multiple of the identity beside them leaves no such basis.
"""

from __future__ import annotations

import contextlib
from functools import reduce, singledispatch
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import Dense, Diagonal, Kronecker, KroneckerCongruence, LinearOperator, Scaled, Shifted, Sum
from curvlib.operators.structure import diagonal_values, merge
from curvlib.solvers.errors import SolveError
from curvlib.solvers.factored_tikhonov import TraceNormPi
from curvlib.solvers.inverse import damped_inverse, inverse_by_cg

_Factors = tuple[Float[Tensor, "d d"], ...]


@damped_inverse.register(Sum)  # type: ignore[attr-defined]
def _(operator: Sum, damping: float) -> LinearOperator:
    rest, shift = merge(operator)
    if not isinstance(rest, Sum):
        return damped_inverse(Shifted(rest, shift), damping)
    mu = shift + damping
    shifted = Shifted(rest, shift) if shift else rest
    if len(rest.terms) != 2 or mu < 0.0:
        return inverse_by_cg(shifted, damping)
    first, second = (kronecker_factors(term) for term in rest.terms)
    if first is not None and second is not None and _sizes(first) == _sizes(second):
        exact = _inverse_of_pair(first, second) if mu == 0.0 else None
        return exact if exact is not None else inverse_by_cg(shifted, damping, _for_pair(first, second, mu))
    return inverse_by_cg(shifted, damping, _beside_a_diagonal(rest, mu))


@singledispatch
def kronecker_factors(operator: LinearOperator) -> _Factors | None:
    """Return the factors of an operator that is one Kronecker product, None for any other."""
    return None


@kronecker_factors.register
def _(operator: Kronecker) -> _Factors:
    return tuple(factor.to_dense() for factor in operator.factors)


@kronecker_factors.register
def _(operator: Scaled) -> _Factors | None:
    inner = kronecker_factors(operator.operator)
    return None if inner is None else (operator.factor * inner[0], *inner[1:])


def _sizes(factors: _Factors) -> list[int]:
    return [len(M) for M in factors]


def _for_pair(first: _Factors, second: _Factors, mu: float) -> LinearOperator | None:
    """Return (F + S')^-1, S' the smaller product with mu in its factors, which the sum then hardly notices."""
    smaller, larger = sorted((first, second), key=lambda factors: prod(float(M.trace()) for M in factors))
    return _inverse_of_pair(larger, _with_damping(smaller, mu)) if mu > 0.0 else None


def _with_damping(factors: _Factors, mu: float) -> _Factors:
    shares = TraceNormPi().shares(tuple(Dense(M) for M in factors))
    root = mu ** (1.0 / len(factors))
    return tuple(
        M + share * root * torch.eye(len(M), dtype=M.dtype, device=M.device)
        for M, share in zip(factors, shares, strict=True)
    )


def _inverse_of_pair(first: _Factors, second: _Factors) -> LinearOperator | None:
    """Return (F + S)^-1, None where neither F nor S is positive definite or their sum is not."""
    for F, S in ((first, second), (second, first)):
        diagonalised = [_together(M.double(), L.double()) for M, L in zip(F, S, strict=True)]
        if any(pair is None for pair in diagonalised):
            continue
        pairs = [pair for pair in diagonalised if pair is not None]
        e = reduce(lambda left, right: left.unsqueeze(-1) * right, (values for values, _ in pairs)) + 1.0
        if bool((e > 0.0).all()):
            dtype = first[0].dtype
            return KroneckerCongruence((tuple(N.to(dtype) for _, N in pairs),), e.reciprocal().to(dtype))
    return None


def _together(
    F: Float[Tensor, "d d"], S: Float[Tensor, "d d"]
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]] | None:
    """Return e and N with N^-T F N^-1 = diag(e) and N^-T S N^-1 = I for a pair, None where S is not definite."""
    R, failed = torch.linalg.cholesky_ex(S)
    if bool(failed) or not bool(F.isfinite().all()):
        return None
    half = torch.linalg.solve_triangular(R, F, upper=False)
    whitened = torch.linalg.solve_triangular(R, half.T, upper=False)
    e, Q = torch.linalg.eigh(0.5 * (whitened + whitened.T))
    return e, torch.linalg.solve_triangular(R.T, Q, upper=True).T.contiguous()


def _beside_a_diagonal(rest: Sum, mu: float) -> LinearOperator | None:
    """Return the better preconditioner of F + diag(d) + mu I of two: its diagonal's inverse, or F + mean I inverted.

    The first is good where the diagonal is large, the second where it varies little. Estimates of the conditions that
    they leave decide; the mean is the geometric one, between whose sides the condition is shared.
    """
    values = [diagonal_values(term) for term in rest.terms]
    factors = [kronecker_factors(term) for term in rest.terms]
    if sum(v is not None for v in values) != 1 or sum(f is not None for f in factors) != 1:
        return None
    d = next(v for v in values if v is not None) + mu
    product = Kronecker(next(f for f in factors if f is not None))
    own = product.diagonal()
    if not bool((d > 0.0).all()) or not bool((own >= 0.0).all()) or not bool(d.isfinite().all()):
        return None
    largest = prod(float(torch.linalg.matrix_norm(factor.to_dense(), ord=2)) for factor in product.factors)
    whole = own + d
    left_by_diagonal = (1.0 + largest / float(whole.mean())) * float((whole / d).max())
    left_by_mean = float(d.max() / d.min())
    if left_by_mean < left_by_diagonal:
        with contextlib.suppress(SolveError):  # of a product that is indefinite: the solve itself must say whether
            return damped_inverse(product, float(d.log().mean().exp()))
    return Diagonal(whole.reciprocal())
