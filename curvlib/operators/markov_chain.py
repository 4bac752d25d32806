r"""Covariances of Gaussian Markov chains whose blocks are Kronecker products, and their block-tridiagonal inverses.

A chain of vectors x_1, ..., x_l in which x_i given x_{i+1} does not depend on those behind has the covariance C and the
precision C^-1 (Martens & Grosse 2015, sec. 4.3; x_i is the gradient of layer i there):

    C = Xi^-1 Sigma Xi^-T,    C^-1 = Xi^T Sigma^-1 Xi,    (Xi x)_i = x_i - Psi_i x_{i+1},    (Xi x)_l = x_l,

    F_i = G_i (x) A_i,    E_i = G_{i,i+1} (x) A_{i,i+1},    Psi_i = E_i F_{i+1}^-1,
    Sigma_i = F_i - Psi_i F_{i+1} Psi_i^T,    Sigma_l = F_l

with F_i the covariance of x_i and E_i that of x_i with x_{i+1}: these blocks of C are as given, all others follow.
Sigma = diag(Sigma_i). As for :class:`Kronecker`, factors are in the order (G, A), and V_i (K, d_out, d_in) are the
parts of a block of columns.

Decompositions are float64, whatever the moments are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from curvlib.operators.base import LinearOperator, check_operators
from curvlib.operators.chain_factors import decomposed
from curvlib.operators.checks import check_alike, check_size, check_tensor, symmetrized
from curvlib.operators.dense import matrix_along
from curvlib.operators.kronecker import Kronecker
from curvlib.operators.kronecker_congruence import KroneckerCongruence
from curvlib.operators.state import OperatorError

# (G, A): symmetric for the blocks on the diagonal, of any shape beside it.
Pair = tuple[Float[Tensor, "d_out e_out"], Float[Tensor, "d_in e_in"]]

_NAMES = ("G", "A")
# A negative eigenvalue beyond this part of the largest is no rounding error of float32 sums.
_MOST_NEGATIVE = 1e-5


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerMarkovChain(LinearOperator):
    r"""The covariance C of a chain, from its moments; C^-1 is block tridiagonal.

    .. math:: C = \Xi^{-1} \Sigma \, \Xi^{-T}

    Where a factor is singular its pseudo-inverse stands in Psi, which changes nothing that the moments determine: cross
    moments lie in the range of their own. Coordinates go block by block.

    Args:
        moments: (G_i, A_i) for i = 1 .. l, symmetric positive semi-definite.
        cross: (G_{i,i+1}, A_{i,i+1}) for i = 1 .. l - 1: E[g_i g_{i+1}^T] and E[a_i a_{i+1}^T], of shapes (rows of
            G_i, rows of G_{i+1}) and likewise. [[G_i, G_{i,i+1}], [G_{i,i+1}^T, G_{i+1}]] must be positive
            semi-definite, and so for A.

    Example:
        >>> one, half = torch.ones(1, 1), 0.5 * torch.ones(1, 1)
        >>> KroneckerMarkovChain(((one, one), (one, one)), ((one, half),)).to_dense()
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """

    moments: tuple[Pair, ...]
    cross: tuple[Pair, ...]

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if not isinstance(self.moments, tuple) or not self.moments or len(self.cross) != len(self.moments) - 1:
            raise TypeError(f"{owner}: moments must be a tuple of l >= 1 pairs (G, A) and cross one of l - 1 pairs.")
        first = self.moments[0][0]
        for i, pair in enumerate(self.moments):
            for name, moment in zip(_NAMES, pair, strict=True):
                label = f"moments[{i}], {name},"
                check_tensor(owner, label, moment, ("d", "d"))
                check_tensor(owner, label, moment, (moment.shape[0], moment.shape[0]))
                check_alike(owner, **{"moments[0], G,": first, label: moment})
        for i, pair in enumerate(self.cross):
            for name, moment, left, right in zip(_NAMES, pair, *self.moments[i : i + 2], strict=True):
                label = f"cross[{i}], {name},"
                check_tensor(owner, label, moment, (left.shape[0], right.shape[0]))
                check_alike(owner, **{"moments[0], G,": first, label: moment})
        check_size(owner, self.size)

    @property
    @override
    def size(self) -> int:
        return sum(G.shape[0] * A.shape[0] for G, A in self.moments)

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.moments[0][0].dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.moments[0][0].device

    @override
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        parts, transitions = _parts(V, self.moments), self._own_transitions
        inputs = [parts[0]]  # Xi^-T v, from the first block to the last
        carried: list[Tensor] = []
        for (Psi_G, Psi_A), part in zip(transitions, parts[1:], strict=True):
            carried.append(_applied((Psi_G.T, Psi_A.T), inputs[-1]))
            inputs.append(part + carried[-1])
        outputs = [_applied(self.moments[-1], inputs[-1])]  # Xi^-1 Sigma of it, from the last to the first
        for i in reversed(range(len(transitions))):
            rest = outputs[0] - _applied(self.moments[i + 1], carried[i])
            outputs.insert(0, _applied(self.moments[i], inputs[i]) + _applied(transitions[i], rest))
        return _joined(outputs)

    @override
    def diagonal(self) -> Float[Tensor, " D"]:
        return torch.cat([block.diagonal() for block in map(Kronecker, self.moments)])

    @override
    def trace(self) -> Float[Tensor, ""]:
        return reduce(add, (block.trace() for block in map(Kronecker, self.moments)))

    @cached_property
    def transitions(self) -> tuple[Pair, ...]:
        """Psi_i as (Psi_G, Psi_A), float64.

        Raises:
            OperatorError: an entry is not finite, or a moment is not symmetric positive semi-definite.
        """
        pairs = []
        for i, pair in enumerate(self.cross):
            for moment, name in zip(pair, _NAMES, strict=True):
                if not bool(moment.isfinite().all()):
                    raise OperatorError(f"cross[{i}], {name}, of {self!r} is not finite: skip this update.")
            roots = (self._inverse_roots[i + 1], pair)
            G, A = (E.double() @ root.T @ root for root, E in zip(*roots, strict=True))
            pairs.append((G, A))
        return tuple(pairs)

    def inverse(self) -> KroneckerMarkovPrecision:
        r"""Return C^-1 = Xi^T Sigma^-1 Xi.

        .. math:: \Sigma_i^{-1} = (K_G \otimes K_A)^T \, \mathrm{diag}\bigl(1 / (1 - \sigma_G \sigma_A^T)\bigr) \,
            (K_G \otimes K_A), \qquad K = E^T R^+, \; F = R R^T, \;
            R^+ \, \Psi F_{i+1} \Psi^T R^{+T} = E \, \mathrm{diag}(\sigma) E^T

        for either factor (appendix B of the paper).

        Raises:
            OperatorError: C is singular, or as in :attr:`transitions`.
        """
        self._check_full_rank()
        blocks: list[LinearOperator] = []
        for i, transition in enumerate(self.transitions):
            spectra = []
            for root, Psi, moment in zip(self._inverse_roots[i], transition, self.moments[i + 1], strict=True):
                whitened = root @ Psi @ moment.double() @ Psi.T @ root.T
                sigma, E = decomposed(torch.linalg.eigh, (whitened + whitened.T) / 2, f"block {i} of {self!r}")
                spectra.append((sigma.clamp(0.0, 1.0), E.T @ root))
            (sigma_G, K_G), (sigma_A, K_A) = spectra
            gaps = 1.0 - sigma_G.outer(sigma_A)
            # float64 decompositions of moments that were rounded to their own type
            rounding = max(8 * max(gaps.shape) * torch.finfo(torch.float64).eps, torch.finfo(self.dtype).eps)
            if not bool((gaps > rounding).all()):
                raise OperatorError(
                    f"{self!r} is singular: block {i} is a function of block {i + 1} in some direction. Use a damping "
                    "> 0."
                )
            terms = ((K_G.to(self.dtype), K_A.to(self.dtype)),)
            blocks.append(KroneckerCongruence(terms, gaps.reciprocal().to(self.dtype)))
        last = tuple((root.T @ root).to(self.dtype) for root in self._inverse_roots[-1])
        return KroneckerMarkovPrecision((*blocks, Kronecker(last)), self._own_transitions)

    def _check_full_rank(self) -> None:
        for i, roots in enumerate(self._inverse_roots):
            for name, root in zip(_NAMES, roots, strict=True):
                if bool((root == 0.0).all(1).any()):
                    raise OperatorError(f"moments[{i}], {name}, of {self!r} is singular: use a damping > 0.")

    @cached_property
    def _own_transitions(self) -> tuple[Pair, ...]:
        return tuple((G.to(self.dtype), A.to(self.dtype)) for G, A in self.transitions)

    @cached_property
    def _inverse_roots(self) -> tuple[Pair, ...]:
        """R^+ with F = R R^T for every factor; rows of zeros for eigenvalues at rounding level."""
        return tuple(
            (
                _inverse_root(G, f"moments[{i}], G, of {self!r}"),
                _inverse_root(A, f"moments[{i}], A, of {self!r}"),
            )
            for i, (G, A) in enumerate(self.moments)
        )


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerMarkovPrecision(LinearOperator):
    """The inverse Xi^T diag(blocks) Xi of a :class:`KroneckerMarkovChain`: block tridiagonal.

    Args:
        blocks: Sigma_i^-1 for i = 1 .. l.
        transitions: Psi_i as (Psi_G, Psi_A) for i = 1 .. l - 1.

    Example:
        >>> half, blocks = 0.5 * torch.ones(1, 1), (Kronecker((torch.ones(1, 1),)),) * 2
        >>> KroneckerMarkovPrecision(blocks, ((half, torch.ones(1, 1)),)).to_dense()
        tensor([[ 1.0000, -0.5000],
                [-0.5000,  1.2500]])
    """

    blocks: tuple[LinearOperator, ...]
    transitions: tuple[Pair, ...]

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_operators(owner, "blocks", self.blocks)
        if not isinstance(self.transitions, tuple) or len(self.transitions) != len(self.blocks) - 1:
            raise TypeError(f"{owner}: transitions must be a tuple of pairs (Psi_G, Psi_A), one less than blocks.")
        for i, (Psi_G, Psi_A) in enumerate(self.transitions):
            rows, columns = Psi_G.shape[0] * Psi_A.shape[0], Psi_G.shape[1] * Psi_A.shape[1]
            if (rows, columns) != (self.blocks[i].size, self.blocks[i + 1].size):
                raise ValueError(
                    f"{owner}: transitions[{i}] must map block {i + 1} of size {self.blocks[i + 1].size} to block {i} "
                    f"of size {self.blocks[i].size}, got ({rows}, {columns})."
                )
            if Psi_G.dtype != self.dtype or Psi_A.dtype != self.dtype:
                raise ValueError(f"{owner}: transitions[{i}] must have the blocks' dtype {self.dtype}.")

    @property
    @override
    def size(self) -> int:
        return sum(block.size for block in self.blocks)

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.blocks[0].dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.blocks[0].device

    @override
    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        parts = list(V.split([block.size for block in self.blocks]))
        for i, Psi in enumerate(self.transitions):
            parts[i] = parts[i] - _on_columns(Psi, parts[i + 1])
        weighted = [block.matmat(part) for block, part in zip(self.blocks, parts, strict=True)]
        outputs = weighted[:1]
        for i, (Psi_G, Psi_A) in enumerate(self.transitions):
            outputs.append(weighted[i + 1] - _on_columns((Psi_G.T, Psi_A.T), weighted[i]))
        return torch.cat(outputs)


def _inverse_root(F: Float[Tensor, "d d"], name: str) -> Float[Tensor, "d d"]:
    e, Q = decomposed(torch.linalg.eigh, symmetrized(F.double(), name), name)
    largest = e.abs().amax()
    if bool(e[0] < -_MOST_NEGATIVE * largest):
        raise OperatorError(
            f"{name} must be positive semi-definite, but has the eigenvalue {float(e[0]):.3g} beside "
            f"{float(largest):.3g}: pass second moments E[f f^T]."
        )
    in_range = e > len(e) * torch.finfo(F.dtype).eps * largest
    return torch.where(in_range, e, 1.0).rsqrt().mul(in_range).unsqueeze(1) * Q.T


def _applied(pair: Pair, X: Float[Tensor, "K e_out e_in"]) -> Float[Tensor, "K d_out d_in"]:
    return matrix_along(pair[1], matrix_along(pair[0], X, 1), 2)


def _on_columns(pair: Pair, V: Float[Tensor, "e K"]) -> Float[Tensor, "d K"]:
    X = V.T.reshape(V.shape[1], pair[0].shape[1], pair[1].shape[1])
    return _applied(pair, X).flatten(1).T


def _parts(V: Float[Tensor, "D K"], moments: Sequence[Pair]) -> list[Float[Tensor, "K d_out d_in"]]:
    shapes = [(G.shape[0], A.shape[0]) for G, A in moments]
    split = V.T.split([d_out * d_in for d_out, d_in in shapes], dim=1)
    return [part.reshape(len(part), *shape) for part, shape in zip(split, shapes, strict=True)]


def _joined(parts: Sequence[Float[Tensor, "K d_out d_in"]]) -> Float[Tensor, "D K"]:
    return torch.cat([part.flatten(1) for part in parts], dim=1).T
