"""The approximations of ``coverage.py``: how they are made, and what they hold by a formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from curvlib import approximations
from curvlib.approximations import (
    EKFAC,
    KFAC,
    KFRA,
    LBFGS,
    BlockDiagonal,
    ByGroups,
    ByLayer,
    ByOutputUnit,
    ByParameter,
    Dense,
    Diagonal,
    Exact,
    GeneralTransition,
    HutchinsonDiagonal,
    Identity,
    LanczosTruncation,
    LinearGaussian,
    LowRank,
    LowRankBlocks,
    Nystrom,
    PerLayer,
    RandomizedSketch,
    Reduce,
    Remainder,
    RootDiagonal,
    RootMeanSquareDiagonal,
    StructuralDamping,
    TridiagonalKFAC,
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A chain of linear layers under ``Fisher(samples=1)``, which has one vector v_k.

    Attributes:
        layers: of each d_i, with the one of the bias, and d_o.
        P: parameters of each.
        D: of all.
        factors: numbers of K-FAC.
        N: examples.
    """

    layers: tuple[tuple[int, int], ...]
    P: tuple[int, ...]
    D: int
    factors: int
    N: int

    @classmethod
    def of(cls, widths: Sequence[int], examples: int) -> Sizes:
        """Return the sizes of layers between the given widths."""
        layers = tuple((d_i + 1, d_o) for d_i, d_o in pairwise(widths))
        P = tuple(d_i * d_o for d_i, d_o in layers)
        factors = sum(d_i**2 + d_o**2 for d_i, d_o in layers)
        return cls(layers=layers, P=P, D=sum(P), factors=factors, N=examples)


@dataclass(frozen=True, kw_only=True)
class Row:
    """An approximation.

    Attributes:
        name: as users write it.
        make: from a curvature matrix.
        memory: numbers that the operator holds, as a formula.
        numbers: the same formula for a chain of linear layers and ``Fisher(samples=1)``.
        time: of an estimate beside the backward passes, as a formula.
        partition: whose blocks it keeps, if it keeps blocks.
        own_draws: whether it draws labels otherwise than the dense matrix beside it: the two cannot be compared.
        own_matrix: whether it is no approximation of the matrix: the two are not compared.
    """

    name: str
    make: Callable[[object], approximations.Approximation]
    memory: str
    numbers: Callable[[Sizes], int]
    time: str
    partition: object = ByLayer()
    own_draws: bool = False
    own_matrix: bool = False


def _blocks(**options: object) -> Callable[[object], approximations.Approximation]:
    return lambda matrix: BlockDiagonal(matrix, **options)


def _sharing(strategy: approximations.WeightSharing) -> Callable[[object], approximations.Approximation]:
    return lambda matrix: KFAC(matrix, weight_sharing=strategy)


def _low_rank(method: approximations.LowRankMethod, diagonal: Remainder | None = None) -> Row:
    more = "" if diagonal is None else f", diagonal={diagonal!r}"
    products = {Nystrom: "l products", RandomizedSketch: "4 l products", LanczosTruncation: "2 r + 10 products"}
    return Row(
        name=f"LowRank(method={method.__class__.__name__}(rank=5){more})",
        make=lambda matrix: LowRank(matrix, method=method, diagonal=diagonal),
        memory="D (r + 1) + r",
        numbers=lambda s: 6 * s.D + 5,
        time=products[type(method)] + ("" if diagonal is None else "; V N D; of `Hessian` D products"),
        own_draws=True,
    )


# d_i inputs (with the bias), d_o outputs and P = d_i d_o parameters of a layer, D of all, R = N T rows, V vectors v_k
ROWS = (
    Row(name="Exact", make=Exact, memory="a graph", numbers=lambda s: 0, time="one pass a product"),
    Row(name="Dense", make=Dense, memory="D^2", numbers=lambda s: s.D**2, time="D products"),
    Row(
        name="BlockDiagonal",
        make=BlockDiagonal,
        memory="sum P^2",
        numbers=lambda s: sum(P**2 for P in s.P),
        time="V N P^2; of `Hessian` D products",
    ),
    Row(
        name="BlockDiagonal(partition=ByParameter())",
        make=_blocks(partition=ByParameter()),
        memory="sum over tensors of size^2",
        numbers=lambda s: sum(((d_i - 1) * d_o) ** 2 + d_o**2 for d_i, d_o in s.layers),
        time="V N P^2; of `Hessian` D products",
        partition=ByParameter(),
    ),
    Row(
        name="BlockDiagonal(partition=ByOutputUnit())",
        make=_blocks(partition=ByOutputUnit()),
        memory="sum d_o d_i^2",
        numbers=lambda s: sum(d_o * d_i**2 for d_i, d_o in s.layers),
        time="V N d_o d_i^2; of `Hessian` D products",
        partition=ByOutputUnit(),
    ),
    Row(
        name='BlockDiagonal(partition=ByGroups([["*"]]))',
        make=_blocks(partition=ByGroups([["*"]])),
        memory="D^2",
        numbers=lambda s: s.D**2,
        time="V N D^2; of `Hessian` D products",
    ),
    Row(
        name="BlockDiagonal(blocks=LowRankBlocks(rank=3))",
        make=_blocks(blocks=LowRankBlocks(rank=3)),
        memory="sum (r + 1) P + r",
        numbers=lambda s: sum(4 * P + 3 for P in s.P),
        time="V N P r",
    ),
    Row(
        name="KFAC",
        make=KFAC,
        memory="sum d_i^2 + d_o^2",
        numbers=lambda s: s.factors,
        time="R d_i^2 + V R d_o^2",
    ),
    Row(
        name="KFAC(weight_sharing=Reduce())",
        make=_sharing(Reduce()),
        memory="the same",
        numbers=lambda s: s.factors,
        time="N d_i^2 + V N d_o^2",
    ),
    Row(
        name="KFAC(weight_sharing=LinearGaussian())",
        make=_sharing(LinearGaussian()),
        memory="the same, twice that of a recurrent layer",
        numbers=lambda s: s.factors,
        time="KFAC's, twice that of a recurrent layer",
    ),
    Row(
        name="KFAC(weight_sharing=LinearGaussian(GeneralTransition()))",
        make=_sharing(LinearGaussian(GeneralTransition())),
        memory="the same",
        numbers=lambda s: s.factors,
        time="the same",
    ),
    Row(
        name="EKFAC",
        make=EKFAC,
        memory="KFAC's and D",
        numbers=lambda s: s.factors + s.D,
        time="twice KFAC's, and V R P (T > 1)",
    ),
    Row(
        name="TridiagonalKFAC",
        make=TridiagonalKFAC,
        memory="KFAC's and its products of neighbours",
        numbers=lambda s: s.factors + sum(a * c + b * d for (a, b), (c, d) in pairwise(s.layers)),
        time="twice KFAC's",
    ),
    Row(name="KFRA", make=KFRA, memory="KFAC's", numbers=lambda s: s.factors, time="R d_i^2 + C N d_o^2"),
    Row(
        name="Diagonal",
        make=Diagonal,
        memory="D",
        numbers=lambda s: s.D,
        time="V N P (T = 1), V R P (T > 1); of `Hessian` D products",
    ),
    Row(
        name="HutchinsonDiagonal",
        make=HutchinsonDiagonal,
        memory="D",
        numbers=lambda s: s.D,
        time="a product for each probe",
        own_draws=True,
    ),
    Row(name="RootDiagonal", make=RootDiagonal, memory="D", numbers=lambda s: s.D, time="Diagonal's"),
    Row(
        name="RootMeanSquareDiagonal(HutchinsonDiagonal(...))",
        make=lambda matrix: RootMeanSquareDiagonal(HutchinsonDiagonal(matrix)),
        memory="D",
        numbers=lambda s: s.D,
        time="HutchinsonDiagonal's",
        own_draws=True,
    ),
    Row(
        name='PerLayer([("*weight*", BlockDiagonal(...))], otherwise=None)',
        make=lambda matrix: PerLayer([("*weight*", BlockDiagonal(matrix))], otherwise=None),
        memory="those of the choices",
        numbers=lambda s: sum(P**2 for P in s.P),
        time="those of the choices",
    ),
    Row(
        name="LowRank",
        make=LowRank,
        memory="D (N V + 1) + N V",
        numbers=lambda s: s.D * (s.N + 1) + s.N,
        time="V N D",
        own_draws=True,
    ),
    _low_rank(Nystrom(rank=5)),
    _low_rank(RandomizedSketch(rank=5)),
    _low_rank(LanczosTruncation(rank=5)),
    _low_rank(LanczosTruncation(rank=5), Remainder()),
    Row(
        name="0.5 * KFAC(...) + 0.5 * Diagonal(...)",
        make=lambda matrix: 0.5 * KFAC(matrix) + 0.5 * Diagonal(matrix),
        memory="those of the parts",
        numbers=lambda s: s.factors + s.D,
        time="those of the parts",
    ),
    Row(
        name="LBFGS",
        make=lambda matrix: LBFGS(),
        memory="D (2 m + 1) + 2 m with m pairs, here none",
        numbers=lambda s: s.D,
        time="a gradient a step",
        own_matrix=True,
    ),
    Row(
        name="StructuralDamping",
        make=lambda matrix: StructuralDamping(),
        memory="a graph",
        numbers=lambda s: 0,
        time="one pass a product",
        own_matrix=True,
    ),
    Row(
        name="Identity",
        make=lambda matrix: Identity(),
        memory="0",
        numbers=lambda s: 0,
        time="0",
        own_matrix=True,
    ),
)
