"""K-FAC for recurrent layers with correlated time steps (Martens, Ba & Johnson 2018, sec. 3.5).

Symbols: N sequences, T time steps, a (N, T, columns) inputs with the homogeneous coordinate, g (N, T, d_out) output
gradients, w_d = E[(T - d)_+] over the sequences' lengths. Inputs and output gradients are taken for linear Gaussian
chains: with A_0, A_1 the second moments of a at the lags 0 and 1, the one at lag d is A_d = A_0^1/2 Psi_A^d A_0^1/2,
Psi_A = A_0^-1/2 A_1 A_0^-1/2, and so for g. A weight's block is then sum_d (w_d / w_0) A_d (x) G_d.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from curvlib.approximations.weight_sharing import Expand, WeightSharing, per_position
from curvlib.extensions import AffineMap, DenseFactors, MapFactors, gram, lag_product, rows_of
from curvlib.operators import GeneralKroneckerChain, Kronecker, LinearOperator, SymmetricKroneckerChain

Factors = tuple[Float[Tensor, "d_out d_out"], Float[Tensor, "columns columns"]]


class Transition(ABC):
    """What is assumed of the matrices Psi, so that the sum over all lags can be inverted."""

    @abstractmethod
    def chain(self, lag0: Factors, lag1: Factors, weights: Float[Tensor, " T"]) -> LinearOperator:
        """Return the operator of the lag-0 and lag-1 factors (G, A) and w_d / w_0."""


@dataclass(frozen=True)
class SymmetricTransition(Transition):
    """Option 1 (sec. 3.5.3): Psi is symmetric; exact for sequences of any lengths. A_1 and G_1 are symmetrised."""

    @override
    def chain(self, lag0: Factors, lag1: Factors, weights: Float[Tensor, " T"]) -> LinearOperator:
        return SymmetricKroneckerChain(lag0, lag1, weights)


@dataclass(frozen=True)
class GeneralTransition(Transition):
    """Option 2 (sec. 3.5.4): any Psi; sequences are long, w_d = w_0 for all d, so that the error falls with 1/T."""

    @override
    def chain(self, lag0: Factors, lag1: Factors, weights: Float[Tensor, " T"]) -> LinearOperator:
        return GeneralKroneckerChain(lag0, lag1)


@dataclass(frozen=True)
class LinearGaussian(WeightSharing):
    """Time steps are correlated like those of a linear Gaussian chain.

    For ordered positions: those of recurrent layers and cells, of ``Linear`` and of attention's projections. Other
    layers (convolutions, embeddings) get what ``Expand`` gives them. A module called on several sequences has no pairs
    from one to the next; the calls of a cell in a loop are one sequence.

    A_1 = (1/M) sum_t a_{t+1} a_t^T is divided by the number M of all steps, not of pairs, which keeps the moments those
    of some process (the Toeplitz matrix of A_0 and A_1 is positive semi-definite).

    Departures from the paper: option 1 takes the signed eigenvalues of Psi, where the released code takes their
    absolute values, and the distribution of the lengths as it is; layers used at one step are ``Kronecker``.

    Args:
        transition: ``SymmetricTransition()`` (option 1) or ``GeneralTransition()`` (option 2).

    Example:
        >>> import curvlib
        >>> from curvlib.approximations import KFAC, GeneralTransition, LinearGaussian
        >>> KFAC(curvlib.Fisher(), weight_sharing=LinearGaussian(GeneralTransition())).weight_sharing
        LinearGaussian(transition=GeneralTransition())
    """

    transition: Transition = field(default_factory=SymmetricTransition)

    def __post_init__(self) -> None:
        if not isinstance(self.transition, Transition):
            raise TypeError(
                "LinearGaussian needs transition to be SymmetricTransition() or GeneralTransition(), got "
                f"{self.transition!r}."
            )

    @override
    def input_statistics(self, factors: MapFactors) -> dict[str, Tensor]:
        if not (_is_chain(factors.map) and isinstance(factors, DenseFactors)):
            return Expand().input_statistics(factors)
        parts = (_moments(part) for part in factors.chunks())
        A, A1 = reduce(lambda x, y: (x[0] + y[0], x[1] + y[1]), parts)
        return {"A": A / factors.examples, "A1": A1 / factors.examples, "lags": _lags(factors)}

    @override
    def output_statistics(self, factors: MapFactors) -> dict[str, Tensor]:
        if not (_is_chain(factors.map) and isinstance(factors, DenseFactors)):
            return Expand().output_statistics(factors)
        return {"G": factors.output_moment().squeeze(0), "G1": factors.output_lag()}

    @override
    def zeros(self, part: AffineMap, like: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not _is_chain(part):
            return Expand().zeros(part, like)
        A, G = like.new_zeros(part.columns, part.columns), like.new_zeros(part.d_out, part.d_out)
        return {"A": A, "A1": A.clone(), "lags": like.new_zeros(1)}, {"G": G, "G1": G.clone()}

    @override
    def block(self, part: AffineMap, means: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> LinearOperator:
        if not _is_chain(part):
            return Expand().block(part, means, sums)
        lags = means["lags"]
        A, A1 = (per_position(means[name], lags[0]) for name in ("A", "A1"))
        if len(lags) == 1:
            return Kronecker((sums["G"], A))
        weights = torch.where(lags[0] > 0, lags / lags[0], (torch.arange(len(lags), device=lags.device) == 0).to(lags))
        return self.transition.chain((sums["G"], A), (sums["G1"], A1), weights)

    @override
    def description(self, part: AffineMap) -> str:
        if not _is_chain(part):
            return Expand().description(part)
        columns, d_out = part.columns, part.d_out
        return f"Kronecker chain: A {columns} x {columns}, G {d_out} x {d_out}, lags 0 and 1"


def _is_chain(part: AffineMap) -> bool:
    return part.ordered and not part.sparse and part.groups == 1


def _moments(factors: DenseFactors) -> tuple[Tensor, Tensor]:
    a = factors.a.squeeze(2)
    return gram(rows_of(a)), reduce(add, (lag_product(a[:, part]) for part in factors.sequences))


def _lags(factors: DenseFactors) -> Float[Tensor, " T"]:
    """Return E[(T - d)_+] for d = 0, 1, ..., over the examples, summed over the sequences of each."""
    T = max(part.stop - part.start for part in factors.sequences)
    lags = torch.arange(T, device=factors.g.device, dtype=factors.g.dtype)
    if factors.valid is None:
        return reduce(add, ((part.stop - part.start - lags).clamp(min=0) for part in factors.sequences))
    lengths = (factors.valid[:, part].sum(1, keepdim=True) for part in factors.sequences)
    return reduce(add, ((length - lags).clamp(min=0).mean(0) for length in lengths))
