r"""Sums over pairs of times of Kronecker products: the curvature of a recurrent layer (Martens, Ba & Johnson 2018).

    C = sum over lags d of r_d A_d (x) G_d

A_d = E[a_{t+d} a_t^T] and G_d likewise are the second moments at lag d of the inputs a and the output gradients g,
taken to be a linear Gaussian chain, so that the lags 0 and 1 give all others; r_d = E[(T - d)_+] / E[T] is the number
of pairs of times d apart in a sequence of T steps, relative to that of single times. As for :class:`Kronecker`, factors
are in the order (G, A), and A (x) G in the papers' order of coordinates is ``Kronecker((G, A))``. C is on the scale of
its lag 0: without correlation it is ``Kronecker((G_0, A_0))``, and the curvature of whole sequences is E[T] C.

Symbols: F_d (d, d) either of A_d, G_d; R its root and Psi its whitened transition (:mod:`chain_factors`), with

    F_0 = R R^T,    F_d = R Psi^d R^T,    F_{-d} = F_d^T    (d >= 0);

Z (d_out, d_in) a vector in whitened coordinates; P the map Z -> Psi_G Z Psi_A^T.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from curvlib.operators.base import LinearOperator
from curvlib.operators.chain_factors import LagMoments, WhitenedFactor, decomposed
from curvlib.operators.checks import check_tensor
from curvlib.operators.kronecker_congruence import KroneckerCongruence, matrices_along
from curvlib.operators.state import OperatorError

# The diagonal adds up at most so many lags, in blocks of so many; a longer sum is dearer than D products.
_MOST_LAGS = 2**15
_LAGS_AT_ONCE = 16


@dataclass(frozen=True, eq=False, repr=False)
class SymmetricKroneckerChain(LagMoments, LinearOperator):
    r"""The sum over all pairs of times with symmetric transitions: exact for every distribution of lengths.

    .. math:: C = \sum_{|d| < L} r_d \, A_d \otimes G_d = (B_G \otimes B_A) \, \mathrm{diag}(S(\psi_G \psi_A^T)) \,
        (B_G \otimes B_A)^T, \qquad S(x) = 1 + 2 \sum_{d \ge 1} r_d x^d

    with Psi = U diag(psi) U^T of the symmetrised lag-1 moment and B = R U. "Option 1" of Martens, Ba & Johnson
    (2018). Departures: psi keeps its sign, so that a direction whose sign alternates has the little curvature
    that it should have; lengths may vary. Moments that no chain has (abs(psi) > 1) are those of the nearest one that
    exists, abs(psi) = 1.

    Args:
        lag0: (G_0, A_0), symmetric positive semi-definite, (d_out, d_out) and (d_in, d_in).
        lag1: (G_1, A_1), with E[f_{t+1} f_t^T] for F_1; its symmetric part counts.
        weights: r_0 = 1, r_1, ..., r_{L-1}, (L,), of any floating-point type: E[(T - d)_+] / E[T] for a distribution
            of lengths T <= L, which is a convex sequence that decreases to r_L = 0. Where a length is even, float64
            keeps the small S near x = -1.

    Example:
        >>> one, half = torch.ones(1, 1), 0.5 * torch.ones(1, 1)
        >>> two_steps = torch.tensor([1.0, 0.5])
        >>> SymmetricKroneckerChain((one, one), (one, half), two_steps).to_dense()
        tensor([[1.5000]])
    """

    weights: Float[Tensor, " L"]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tensor("SymmetricKroneckerChain", "weights", self.weights, ("L",))
        if len(self.weights) == 0:
            raise ValueError("SymmetricKroneckerChain: weights must not be empty: r_0 = 1 alone is for single steps.")
        if self.weights.device != self.device:
            raise ValueError(
                f"SymmetricKroneckerChain: weights must lie on {self.device} like lag0[0], got {self.weights.device}."
            )

    @override
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self.congruence.matmat(V)

    @override
    def diagonal(self) -> Float[Tensor, " D"]:
        return self.congruence.diagonal()

    @cached_property
    def congruence(self) -> KroneckerCongruence:
        """C in the bases B in which all lags are diagonal.

        Raises:
            OperatorError: an entry is not finite, a lag-0 moment is not positive semi-definite, or the weights are not
                those of a distribution of lengths.
        """
        bases = tuple((factor.root @ U).T.to(self.dtype) for factor, (_, U) in self._spectra)
        return KroneckerCongruence((bases,), self._sums.to(self.dtype))

    def inverse(self) -> LinearOperator:
        """Return (B_G^-T (x) B_A^-T) diag(1 / S) (B_G^-T (x) B_A^-T)^T.

        Raises:
            OperatorError: as :attr:`congruence`; also where a lag-0 moment is singular, or a sum S is 0: a direction
                that alternates without end cancels over an even number of steps.
        """
        for factor, _ in self._spectra:
            factor.check_full_rank()
        if bool((self._sums == 0.0).any()):
            raise OperatorError(
                f"{self!r} is singular: a direction whose sign alternates at every step cancels over an even number of "
                "steps. Use a damping > 0."
            )
        bases = tuple((U.T @ factor.inverse_root).to(self.dtype) for factor, (_, U) in self._spectra)
        return KroneckerCongruence((bases,), self._sums.reciprocal().to(self.dtype))

    @cached_property
    def _spectra(self) -> tuple[tuple[WhitenedFactor, tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]], ...]:
        """Each factor with the eigenvalues and eigenvectors of its transition."""
        spectra = []
        for factor in self.whitened_factors:
            psi, U = decomposed(torch.linalg.eigh, (factor.transition + factor.transition.T) / 2, factor.name)
            spectra.append((factor, (psi.clamp(-1.0, 1.0), U)))
        return tuple(spectra)

    @cached_property
    def _sums(self) -> Float[Tensor, "d_out d_in"]:
        """S of all products of eigenvalues; 0 where it is smaller than its rounding errors."""
        r = _checked_weights(self.weights, repr(self))
        x = torch.outer(*(psi for _, (psi, _) in self._spectra))
        tail = torch.zeros_like(x)
        for r_d in reversed(r[1:]):  # Horner
            tail = torch.addcmul(r_d, tail, x)
        sums = 1.0 + 2.0 * x * tail
        rounding = torch.finfo(self.weights.dtype).eps * (1.0 + 2.0 * r[1:].sum())
        return torch.where(sums <= rounding, 0.0, sums)


def _checked_weights(weights: Float[Tensor, " L"], owner: str) -> Float[Tensor, " L"]:
    """Return the weights in float64 after checking that a distribution of lengths has them.

    r_d = E[(T - d)_+] / E[T] has the second differences P(T = d) / E[T], d >= 1, and r_L = r_{L+1} = 0. So these are
    the convex sequences with r_0 = 1, and S is not negative for them. Weights may have been float32 once.
    """
    r = weights.double()
    tail = torch.cat([r, r.new_zeros(2)])
    rounding = 8.0 * max(torch.finfo(kind).eps for kind in (weights.dtype, torch.float32))
    convex = (tail[:-2] - 2.0 * tail[1:-1] + tail[2:] >= -rounding).all()
    # Comparisons with NaN are false.
    if not bool(convex & ((r[0] - 1.0).abs() <= rounding)):
        raise OperatorError(
            f"weights of {owner} must be 1, r_1, ... with r_d = E[(T - d)_+] / E[T] for lengths T (a convex sequence "
            f"that decreases to 0), got {weights.tolist()[:5]}{' ...' if len(weights) > 5 else ''}."
        )
    return r


@dataclass(frozen=True, eq=False, repr=False)
class GeneralKroneckerChain(LagMoments, LinearOperator):
    r"""The sum over all lags of an endless chain, whose transitions need not be symmetric.

    .. math:: C = \sum_{d = -\infty}^{\infty} A_d \otimes G_d = (R_G \otimes R_A) \, (I - P)^{-1} (I - P P^T)
        (I - P^T)^{-1} \, (R_G \otimes R_A)^T

    "Option 2" of Martens, Ba & Johnson (2018). For sequences of T steps the sum over all pairs of times, divided by T,
    approaches it at rate 1 / T. (I - P)^-1 = ... (I + P^4) (I + P^2) (I + P) until the next power is below rounding;
    I - P P^T is diagonal in the left singular vectors of Psi_G and Psi_A.

    Departure: the singular values of Psi are clamped to 1 - sqrt(eps), with the eps of the moments' type, in everything
    that the operator does. With singular values up to 1 - c of both, the whitened sum has eigenvalues between about c
    and 1 / c, hence a condition up to c^-2, and c = sqrt(eps) makes that 1 / eps, the most that can be inverted. A
    chain that is forgotten more slowly (over 1,000 steps in float32) is too long for this operator.

    Args:
        lag0: (G_0, A_0), symmetric positive semi-definite, (d_out, d_out) and (d_in, d_in).
        lag1: (G_1, A_1), with E[f_{t+1} f_t^T] for F_1.

    Example:
        >>> one, half = torch.ones(1, 1), 0.5 * torch.ones(1, 1)
        >>> GeneralKroneckerChain((one, one), (one - 1e-4, half)).to_dense().round(decimals=2)
        tensor([[3.]])
    """

    @override
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        roots, vectors, powers, gaps = self._tables
        X = V.T.reshape(V.shape[1], *gaps.shape)
        X = matrices_along((R.T for R in roots), X, 1)
        for pair in powers:
            X = X + matrices_along((M.T for M in pair), X, 1)
        X = gaps * matrices_along((E.T for E in vectors), X, 1)
        X = matrices_along(vectors, X, 1)
        for pair in powers:
            X = X + matrices_along(pair, X, 1)
        return matrices_along(roots, X, 1).reshape(V.shape[1], self.size).T

    @override
    def diagonal(self) -> Float[Tensor, " D"]:
        """Return the diagonal from those of the lags; by D products where more than 32,768 of them count."""
        count = 2 ** len(self._powers)
        if count > _MOST_LAGS:
            return super().diagonal()
        G, A = (_lag_diagonals(factor.root, Psi, count) for factor, (_, _, Psi) in self._sides)
        positive = torch.zeros(1, device=self.device, dtype=torch.float64)
        for g, a in zip(G, A, strict=True):
            positive = positive + g.T @ a
        lag_zero = torch.outer(*(factor.root.square().sum(1) for factor, _ in self._sides))
        return (2.0 * positive - lag_zero).reshape(-1).to(self.dtype)

    def inverse(self) -> LinearOperator:
        r"""Return N^T diag(1 / (1 - mu_G mu_A^T)) N with N = E^T (I - P) R^-1.

        E and mu are the eigenvectors and eigenvalues of Psi Psi^T, for both factors.

        Raises:
            OperatorError: an entry is not finite, or a lag-0 moment is singular or not positive semi-definite.
        """
        plain, moved = [], []
        for factor, (E, _, Psi) in self._sides:
            factor.check_full_rank()
            plain.append((E.T @ factor.inverse_root).to(self.dtype))
            moved.append((E.T @ Psi @ factor.inverse_root).to(self.dtype))
        return KroneckerCongruence((tuple(plain), (-moved[0], *moved[1:])), self._gaps.reciprocal().to(self.dtype))

    @cached_property
    def _sides(self) -> tuple[tuple[WhitenedFactor, tuple[Tensor, Tensor, Tensor]], ...]:
        """Each factor with the left singular vectors and the squared singular values of Psi, and Psi, clamped."""
        largest = 1.0 - torch.finfo(self.dtype).eps ** 0.5
        sides = []
        for factor in self.whitened_factors:
            E, s, Vh = decomposed(torch.linalg.svd, factor.transition, factor.name)
            s = s.clamp(max=largest)
            sides.append((factor, (E, s.square(), E @ (s.unsqueeze(1) * Vh))))
        return tuple(sides)

    @cached_property
    def _gaps(self) -> Float[Tensor, "d_out d_in"]:
        """The eigenvalues 1 - mu_G mu_A^T of I - P P^T."""
        return 1.0 - torch.outer(*(mu for _, (_, mu, _) in self._sides))

    @cached_property
    def _powers(self) -> list[tuple[Tensor, ...]]:
        """The powers 1, 2, 4, ... of (Psi_G, Psi_A), up to the last one whose Kronecker product is above rounding.

        What is left out, P^(2^k) (I - P)^-1, is small beside (I - P)^-1.
        """
        powers = []
        pair = tuple(Psi for _, (_, _, Psi) in self._sides)
        while float(torch.stack([torch.linalg.matrix_norm(M) for M in pair]).prod()) > torch.finfo(self.dtype).eps / 4:
            powers.append(pair)
            pair = tuple(M @ M for M in pair)
        return powers

    @cached_property
    def _tables(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[tuple[Tensor, ...]], Tensor]:
        """What a product needs, in the operator's own type: R, E, the powers of Psi, and 1 - mu_G mu_A^T."""
        roots = tuple(factor.root.to(self.dtype) for factor, _ in self._sides)
        vectors = tuple(E.to(self.dtype) for _, (E, _, _) in self._sides)
        powers = [tuple(M.to(self.dtype) for M in pair) for pair in self._powers]
        return roots, vectors, powers, self._gaps.to(self.dtype)


def _lag_diagonals(
    root: Float[Tensor, "d d"], transition: Float[Tensor, "d d"], count: int
) -> Iterator[Float[Tensor, "m d"]]:
    """Yield the diagonals of F_0, F_1, ..., F_{count - 1}, count a power of two, in blocks of at most 16 lags."""
    # F_{a + m b} = (R Psi^{m b}) (Psi^a R^T)
    right, power = root.T.unsqueeze(0), transition
    while len(right) < min(count, _LAGS_AT_ONCE):
        right = torch.cat([right, power @ right])
        power = power @ power
    left = root
    for _ in range(count // len(right)):
        yield torch.einsum("ik,aki->ai", left, right)
        left = left @ power
