"""Curvatures by name: an approximation of a matrix, for the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from curvlib import GGN, EmpiricalFisher, Fisher, Hessian
from curvlib.approximations import (
    EKFAC,
    KFAC,
    KFRA,
    Approximation,
    BlockDiagonal,
    ByOutputUnit,
    ByParameter,
    Dense,
    Diagonal,
    EstimatedRemainder,
    Exact,
    GeneralTransition,
    HutchinsonDiagonal,
    Identity,
    Independent,
    LanczosTruncation,
    LinearGaussian,
    LowRank,
    LowRankBlocks,
    Nystrom,
    RandomizedSketch,
    Reduce,
    Remainder,
    RootDiagonal,
    RootMeanSquareDiagonal,
    SymmetricTransition,
    TridiagonalKFAC,
)
from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.registry import Registry
from curvlib.optimizers import Preconditioner

MATRICES: Registry[Any] = Registry("curvature matrix")
MATRICES.register("ggn", GGN())
MATRICES.register("fisher", Fisher(samples=1))
MATRICES.register("empirical-fisher", EmpiricalFisher())
# To be looked at: those that a method trains with, and the Hessian, which may be indefinite.
INSPECTED_MATRICES: Registry[Any] = Registry("curvature matrix", base=MATRICES)
INSPECTED_MATRICES.register("hessian", Hessian())

# Each takes the matrix that it approximates; the identity has no use for it.
APPROXIMATIONS: Registry[Callable[[Any], Approximation]] = Registry("curvature approximation")
APPROXIMATIONS.register("kfac", KFAC)
APPROXIMATIONS.register("kfac-reduce", partial(KFAC, weight_sharing=Reduce()))
# K-FAC with correlated time steps, for recurrent layers.
APPROXIMATIONS.register("kfac-symmetric-chain", partial(KFAC, weight_sharing=LinearGaussian(SymmetricTransition())))
APPROXIMATIONS.register("kfac-general-chain", partial(KFAC, weight_sharing=LinearGaussian(GeneralTransition())))
APPROXIMATIONS.register("ekfac", EKFAC)
# For chains of linear layers.
APPROXIMATIONS.register("kfac-tridiagonal", TridiagonalKFAC)
APPROXIMATIONS.register("kfra", KFRA)
APPROXIMATIONS.register("diagonal", Diagonal)
APPROXIMATIONS.register("block-diagonal", BlockDiagonal)
APPROXIMATIONS.register("dense", Dense)
APPROXIMATIONS.register("exact", Exact)
_IDENTITY = "identity"
APPROXIMATIONS.register(_IDENTITY, lambda matrix: Identity())
APPROXIMATIONS.register("unit-blocks", partial(BlockDiagonal, partition=ByOutputUnit()))
APPROXIMATIONS.register("low-rank", partial(LowRank, method=RandomizedSketch(rank=20), diagonal=Remainder()))

# To be looked at: all of the above, and those that are made another way, or are no curvature to train with.
INSPECTED_APPROXIMATIONS: Registry[Callable[[Any], Approximation]] = Registry(
    "curvature approximation", base=APPROXIMATIONS
)
_register = INSPECTED_APPROXIMATIONS.register
_register("kfac-independent", partial(KFAC, weight_sharing=Independent()))
_register("parameter-blocks", partial(BlockDiagonal, partition=ByParameter()))
_register("low-rank-blocks", partial(BlockDiagonal, blocks=LowRankBlocks(rank=20)))
_register("hutchinson-diagonal", HutchinsonDiagonal)
_register("root-diagonal", RootDiagonal)
# As AdaHessian has it, of one batch.
_register("adahessian-diagonal", lambda matrix: RootMeanSquareDiagonal(HutchinsonDiagonal(matrix, probes=1)))
_register("low-rank-alone", partial(LowRank, method=RandomizedSketch(rank=20)))
_register("low-rank-estimated", partial(LowRank, method=RandomizedSketch(rank=20), diagonal=EstimatedRemainder()))
_register("low-rank-nystrom", partial(LowRank, method=Nystrom(rank=20)))
_register("low-rank-lanczos", partial(LowRank, method=LanczosTruncation(rank=20)))
_register("full-rank", LowRank)

# Of conjugate gradients on an exact matrix. Ten drawn labels an example: with one, the noise of the factors costs more
# iterations than the draws save (benchmarks/README.md).
PRECONDITIONERS: Registry[Approximation | Preconditioner | None] = Registry("preconditioner")
PRECONDITIONERS.register("none", None)
PRECONDITIONERS.register("diagonal", Preconditioner.martens())
PRECONDITIONERS.register("kfac", KFAC(Fisher(samples=10)))
PRECONDITIONERS.register("ekfac", EKFAC(Fisher(samples=10)))


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """An approximation and what to call it.

    Args:
        name: for tables and figures.
        approximation: to be estimated at every step.
    """

    name: str
    approximation: Approximation


@dataclass(frozen=True, kw_only=True)
class CurvatureChoice:
    """What the command line asks for; None leaves the part to the method.

    Args:
        approximation: a name of :data:`APPROXIMATIONS`.
        matrix: a name of :data:`MATRICES`.

    Raises:
        ExperimentError: an unknown name, or a matrix for the identity.
    """

    approximation: str | None = None
    matrix: str | None = None

    def __post_init__(self) -> None:
        if self.approximation is not None:
            APPROXIMATIONS.get(self.approximation)
        if self.matrix is not None:
            MATRICES.get(self.matrix)
            if self.approximation == _IDENTITY:
                raise ExperimentError(f"The identity approximates no matrix: leave out --matrix {self.matrix}.")

    def resolve(self, default_approximation: str, default_matrix: str) -> Curvature | None:
        """Return the curvature with a method's own names where nothing was asked for, None if nothing was at all."""
        if self.approximation is None and self.matrix is None:
            return None
        approximation, matrix = self.approximation or default_approximation, self.matrix or default_matrix
        return Curvature(
            name=_IDENTITY if approximation == _IDENTITY else f"{approximation} {matrix}",
            approximation=APPROXIMATIONS.get(approximation)(MATRICES.get(matrix)),
        )
