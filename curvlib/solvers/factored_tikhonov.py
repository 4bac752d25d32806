r"""Factored Tikhonov regularisation of Kronecker blocks.

Symbols: F_i (d_i, d_i) the factors of a block, i = 1 .. k; lambda the damping; p_i the share of factor i, with
p_1 ... p_k = 1; A and G the input and output factor of a layer, the last and the first of ``Kronecker((G, A))``;
gamma = sqrt(lambda). In a stack of B blocks there are n_i and p_i for each block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import singledispatch
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.operators import (
    BlockDiagonal,
    CholeskyInverse,
    Dense,
    Kronecker,
    KroneckerStack,
    LinearOperator,
    Scaled,
    Shifted,
    full_precision,
)
from curvlib.solvers.damping_scale import checked_damping
from curvlib.solvers.errors import SolveError
from curvlib.solvers.factorization import damped_inverses
from curvlib.solvers.inverse import damped_inverse, inverse_by_blocks


class Balance(ABC):
    """How the damping is shared among the factors of a Kronecker product: F_i gets p_i lambda^(1/k)."""

    @abstractmethod
    def shares(self, factors: tuple[LinearOperator, ...]) -> tuple[float, ...]:
        """Return p_1 ... p_k, positive numbers whose product is 1."""

    def stack_shares(self, stack: KroneckerStack) -> Float[Tensor, "k B"]:
        """Return the shares of each block of a stack, in float64.

        Default: :meth:`shares` block by block, which is slow for many blocks; override it with batched operations.
        """
        blocks = zip(*stack.factors, strict=True)
        shares = [self.shares(tuple(Dense(factor) for factor in block)) for block in blocks]
        return torch.tensor(shares, dtype=torch.float64, device=stack.device).T


@dataclass(frozen=True)
class TraceNormPi(Balance):
    r"""Shares in proportion to the mean curvature of each factor.

    .. math:: p_i = n_i / (n_1 \cdots n_k)^{1/k}, \qquad n_i = \mathrm{tr}(F_i) / d_i

    For two factors p_A = pi and p_G = 1 / pi with pi = sqrt((tr A / dim A) / (tr G / dim G)): Martens & Grosse (2015),
    section 6.3. The result does not change under A -> c A, G -> G / c. All shares are 1 where a trace is not positive.
    """

    def shares(self, factors: tuple[LinearOperator, ...]) -> tuple[float, ...]:
        """Return the shares by the traces of the factors."""
        means = torch.tensor([float(factor.trace()) / factor.size for factor in factors], dtype=torch.float64)
        return tuple(_over_geometric_mean(means).tolist())

    def stack_shares(self, stack: KroneckerStack) -> Float[Tensor, "k B"]:
        """Return the shares of each block by the traces of its own factors."""
        traces = [factor.diagonal(dim1=1, dim2=2).double().mean(1) for factor in stack.factors]
        return _over_geometric_mean(torch.stack(traces))


@dataclass(frozen=True)
class UnitPi(Balance):
    """The same damping lambda^(1/k) for every factor: pi = 1."""

    def shares(self, factors: tuple[LinearOperator, ...]) -> tuple[float, ...]:
        """Return ones."""
        return (1.0,) * len(factors)

    def stack_shares(self, stack: KroneckerStack) -> Float[Tensor, "k B"]:
        """Return ones."""
        return _for_every_block((1.0,) * len(stack.factors), stack)


@dataclass(frozen=True)
class FixedPi(Balance):
    """A given pi for blocks of two factors ``Kronecker((G, A))``: A gets pi gamma, G gets gamma / pi.

    Args:
        pi: a finite number > 0.
    """

    pi: float

    def __post_init__(self) -> None:
        if not (isfinite(self.pi) and self.pi > 0.0):
            raise ValueError(f"FixedPi: pi must be a finite number > 0, got {self.pi}.")

    def shares(self, factors: tuple[LinearOperator, ...]) -> tuple[float, ...]:
        """Return (1 / pi, pi).

        Raises:
            ValueError: the block has not two factors.
        """
        return self._pair(len(factors))

    def stack_shares(self, stack: KroneckerStack) -> Float[Tensor, "k B"]:
        """Return (1 / pi, pi) for every block.

        Raises:
            ValueError: the blocks have not two factors.
        """
        return _for_every_block(self._pair(len(stack.factors)), stack)

    def _pair(self, count: int) -> tuple[float, float]:
        if count != 2:
            raise ValueError(f"FixedPi needs blocks of two factors, got {count}: use TraceNormPi or UnitPi.")
        return (1.0 / self.pi, self.pi)


def _over_geometric_mean(means: Float[Tensor, "k *B"]) -> Float[Tensor, "k *B"]:
    """Return n_i / (n_1 ... n_k)^(1/k), and 1 where one of n_1 .. n_k is not positive or not finite."""
    # In logarithms, since the product of many small means underflows.
    logs = means.log()
    return torch.where(logs.isfinite().all(0), (logs - logs.mean(0)).exp(), 1.0)


def _for_every_block(shares: tuple[float, ...], stack: KroneckerStack) -> Float[Tensor, "k B"]:
    column = torch.tensor(shares, dtype=torch.float64, device=stack.device)
    return column.unsqueeze(1).expand(-1, stack.block_count)


@dataclass(frozen=True, kw_only=True)
class FactoredTikhonov:
    r"""Inverse with the damping put into the factors of each Kronecker block.

    .. math:: \bigotimes_i (F_i + p_i \lambda^{1/k} I)^{-1} = \bigotimes_i
        \Bigl(\frac{c}{n_i} F_i + \lambda^{1/k} I\Bigr)^{-1}, \qquad p_i = \frac{n_i}{c}

    For two factors (G + gamma / pi I)^-1 (x) (A + pi gamma I)^-1: Martens & Grosse (2015), section 6.3. It approximates
    (C + lambda I)^-1, for which use :func:`damped_inverse`, and regularises more: by lambda I and by the cross terms.

    Blocks of a :class:`BlockDiagonal` are taken one by one, those of a :class:`KroneckerStack` all at once, each with
    its own shares; in a chain of a recurrent layer the factors are its lag-0 moments; a shift is added to the damping;
    operators of any other structure get :func:`damped_inverse`. A rule for your own structure is one function:

        @FactoredTikhonov.register(MyOperator)
        def _(operator, damping, solver):
            return ...  # a LinearOperator; solver(block, damping) for what is inside

    Args:
        balance: how the damping is shared among the factors.

    Example:
        >>> import torch
        >>> block = Kronecker((2.0 * torch.eye(2), 2.0 * torch.eye(2)))
        >>> 16.0 * FactoredTikhonov()(block, 4.0).diagonal()
        tensor([1., 1., 1., 1.])
    """

    balance: Balance = field(default_factory=TraceNormPi)

    def __post_init__(self) -> None:
        if not isinstance(self.balance, Balance):
            raise TypeError(
                f"FactoredTikhonov: balance must be a Balance such as TraceNormPi(), got {type(self.balance).__name__}."
            )

    def __call__(self, operator: LinearOperator, damping: float) -> LinearOperator:
        """Return the inverse of the regularised operator.

        Args:
            operator: C.
            damping: lambda >= 0, in the units of C.

        Raises:
            TypeError: the operator or the damping is of another kind.
            ValueError: the damping is negative or not finite.
            SolveError: a regularised factor is not positive definite or not finite.
        """
        if not isinstance(operator, LinearOperator):
            raise TypeError(f"FactoredTikhonov: operator must be a LinearOperator, got {type(operator).__name__}.")
        with full_precision(operator.device):
            return _factored(operator, checked_damping(damping), self)

    @staticmethod
    def register(*arguments: Any) -> Callable:
        """Register a rule ``(operator, damping, solver) -> LinearOperator`` for a class of operators."""
        return _factored.register(*arguments)


@singledispatch
def _factored(operator: LinearOperator, damping: float, solver: FactoredTikhonov) -> LinearOperator:
    return damped_inverse(operator, damping)


@_factored.register
def _(operator: Kronecker, damping: float, solver: FactoredTikhonov) -> LinearOperator:
    root = damping ** (1.0 / len(operator.factors))
    shares = solver.balance.shares(operator.factors)
    inverses = []
    for i, (factor, share) in enumerate(zip(operator.factors, shares, strict=True)):
        try:
            inverses.append(_explicit(damped_inverse(factor, share * root)))
        except SolveError as error:
            raise error.within(
                f"Factor {i} of {operator!r}, which gets the damping {share * root:.3g} of {damping:.3g}"
            ) from error
    return Kronecker(tuple(inverses))


@_factored.register
def _(operator: KroneckerStack, damping: float, solver: FactoredTikhonov) -> LinearOperator:
    root = damping ** (1.0 / len(operator.factors))
    inverses = []
    for i, (F, shares) in enumerate(zip(operator.factors, solver.balance.stack_shares(operator), strict=True)):
        # (F + p root I)^-1 = (F / p + root I)^-1 / p: one damping for all blocks.
        p = shares.reshape(-1, 1, 1).to(torch.promote_types(F.dtype, torch.float32))
        inverses.append((damped_inverses(F / p, root, f"factors[{i}] / p of {operator!r}") / p).to(F.dtype))
    return KroneckerStack(tuple(inverses))


@_factored.register
def _(operator: BlockDiagonal, damping: float, solver: FactoredTikhonov) -> LinearOperator:
    return inverse_by_blocks(operator, damping, solver)


@_factored.register
def _(operator: Shifted, damping: float, solver: FactoredTikhonov) -> LinearOperator:
    total = damping + operator.shift
    if total < 0.0:
        raise SolveError(
            f"FactoredTikhonov needs damping + shift >= 0 for {operator!r}, got {damping:.3g} + {operator.shift:.3g}: "
            "use a larger damping, or damped_inverse."
        )
    return solver(operator.operator, total)


@_factored.register
def _(operator: Scaled, damping: float, solver: FactoredTikhonov) -> LinearOperator:
    # c F_1 (x) F_2 with lambda is c times F_1 (x) F_2 with lambda / c; other signs have no factored damping.
    if operator.factor <= 0.0 or not isfinite(damping / operator.factor):
        return damped_inverse(operator, damping)
    return Scaled(1.0 / operator.factor, solver(operator.operator, damping / operator.factor))


@singledispatch
def _explicit(inverse: LinearOperator) -> LinearOperator:
    """Return the inverse of a factor in the form that is fastest to apply."""
    return inverse


@_explicit.register
def _(inverse: CholeskyInverse) -> LinearOperator:
    # One matrix product per application, where two triangular solves are several times slower.
    return Dense(inverse.to_dense())
