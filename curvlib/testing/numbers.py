"""Random tensors from one seed, and strategies for matrices: what tests of linear algebra are drawn from.

Symbols: n size, r rank, kappa condition number, F_i moments of a series at lag i.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """Random numbers from one seed, always made on the CPU so that every device gets the same ones.

    Attributes:
        generator: where they come from.
        device: where they go.
        definite: whether matrices are positive semi-definite and factors positive; otherwise both have any sign.
        dtype: their type.
        integers: (low, high) -> an integer from low to high, where sizes come from; None draws them from the generator.

    Example:
        >>> d = draw(0)
        >>> bool((torch.linalg.eigvalsh(d.symmetric(3)) > 0).all())
        True
    """

    generator: torch.Generator = field(repr=False)
    device: torch.device = field(repr=False)
    definite: bool
    dtype: torch.dtype = torch.float64
    integers: Callable[[int, int], int] | None = field(default=None, repr=False)

    def integer(self, low: int, high: int) -> int:
        """Return an integer from low to high, both included."""
        if self.integers is not None:
            return self.integers(low, high)
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)

    def permutation(self, n: int) -> Tensor:
        """Return 0 ... n-1 in random order."""
        return torch.randperm(n, generator=self.generator).to(self.device)

    def values(self, *shape: int) -> Tensor:
        """Return eigenvalues: squares of normal numbers, or normal numbers."""
        return self.normal(*shape).square() if self.definite else self.normal(*shape)

    def symmetric(self, n: int) -> Float[Tensor, "n n"]:
        """Return a symmetric matrix."""
        B = self.normal(n, n)
        return B @ B.T / n if self.definite else (B + B.T) / 2

    def orthogonal(self, n: int) -> Float[Tensor, "n n"]:
        """Return an orthogonal matrix."""
        return torch.linalg.qr(self.normal(n, n)).Q

    def factor(self) -> float:
        """Return a number other than 0."""
        return 0.1 + abs(float(self.normal(1))) if self.definite else float(self.normal(1))


def draw(
    seed: int,
    device: torch.device | str = "cpu",
    definite: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Draw:
    """Return the random numbers of a seed."""
    return Draw(torch.Generator().manual_seed(seed), torch.device(device), definite, dtype)


def draws(definite: bool | None = True, dtype: torch.dtype = torch.float64) -> SearchStrategy[Draw]:
    """Return a strategy of :class:`Draw`, to map over a function that builds an operator.

    Args:
        definite: whether matrices are positive semi-definite; None draws it.
        dtype: type of the numbers.
    """
    kinds = st.just(definite) if definite is not None else st.sampled_from((True, False))

    def make(seed: int, kind: bool, data: st.DataObject) -> Draw:
        # sizes are Hypothesis's own numbers, so that it finds the smallest
        sizes = partial(_integer, data)
        return Draw(torch.Generator().manual_seed(seed), torch.device("cpu"), kind, dtype, sizes)

    return st.builds(make, st.integers(0, 2**32 - 1), kinds, st.data())


def _integer(data: st.DataObject, low: int, high: int) -> int:
    return data.draw(st.integers(low, high))


@st.composite
def semidefinite_matrices(
    draw_from: DrawFn,
    sizes: tuple[int, int] = (1, 6),
    largest_condition: float = 1e6,
    full_rank: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "n n"]:
    """Q diag(e) Q^T with a drawn size, rank r and condition number kappa: e_1 = 1 ... e_r = 1 / kappa, the rest 0.

    Args:
        draw_from: Hypothesis's.
        sizes: smallest and largest n.
        largest_condition: largest kappa, of the part that is not zero.
        full_rank: whether r = n; otherwise r is 1 ... n.
        dtype: type of the matrix.
    """
    n = draw_from(st.integers(*sizes))
    r = n if full_rank else draw_from(st.integers(1, n))
    largest = int(torch.tensor(largest_condition).log10())
    kappa = 10.0 ** draw_from(st.integers(0, largest))
    Q = draw(draw_from(st.integers(0, 2**16))).orthogonal(n)
    e = torch.zeros(n, dtype=torch.float64)
    e[:r] = torch.logspace(0.0, -float(torch.tensor(kappa).log10()), r, dtype=torch.float64)
    M = (Q * e) @ Q.T
    return (0.5 * (M + M.T)).to(dtype)


def kronecker_factors(
    count: int = 2, sizes: tuple[int, int] = (1, 4), full_rank: bool = False
) -> SearchStrategy[tuple[Tensor, ...]]:
    """Return a strategy of positive semi-definite factors F_1 ... F_k, for K-FAC's (G, A) the sizes d_out and d_in.

    Args:
        count: k.
        sizes: smallest and largest size of a factor.
        full_rank: whether they are regular.
    """
    return st.tuples(*(semidefinite_matrices(sizes, 1e3, full_rank) for _ in range(count)))


@st.composite
def lag_moments(
    draw_from: DrawFn, sizes: tuple[int, int] = (1, 3), symmetric: bool = False, longest: int = 1
) -> list[Float[Tensor, "n n"]]:
    """F_0 ... F_longest of a stationary chain x_{t+1} = Psi x_t + noise, F_i = R Psi^i R^T with F_0 = R R^T.

    Args:
        draw_from: Hypothesis's.
        sizes: smallest and largest n.
        symmetric: whether Psi is symmetric.
        longest: the longest lag.
    """
    d = draw(draw_from(st.integers(0, 2**32 - 1)))
    n = draw_from(st.integers(*sizes))
    B = d.normal(n, n)
    B = B + B.T if symmetric else B
    psi = 0.8 * B / torch.linalg.matrix_norm(B, 2)
    return lags(d.normal(n, n), psi, longest)


def lags(root: Float[Tensor, "n n"], psi: Float[Tensor, "n n"], longest: int) -> list[Float[Tensor, "n n"]]:
    """Return R Psi^i R^T for i = 0 ... longest."""
    return [root @ torch.linalg.matrix_power(psi, i) @ root.T for i in range(longest + 1)]
