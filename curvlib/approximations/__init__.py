"""Approximations of a curvature matrix: which statistics of it are kept."""

from curvlib.approximations.assignment import AssignedApproximation, Assignment, layer_key
from curvlib.approximations.base import (
    Approximation,
    Description,
    NonFiniteStatisticsError,
    StatisticalApproximation,
    Statistics,
)
from curvlib.approximations.block_diagonal import BlockDiagonal
from curvlib.approximations.diagonal import Diagonal
from curvlib.approximations.exact import Dense, Exact
from curvlib.approximations.identity import Identity
from curvlib.approximations.joint import joined
from curvlib.approximations.kfac import KFAC
from curvlib.approximations.layerwise import LayerwiseApproximation
from curvlib.approximations.linear_gaussian import (
    GeneralTransition,
    LinearGaussian,
    SymmetricTransition,
    Transition,
)
from curvlib.approximations.matching import MatchingCrossEntropy, MatchingLoss, SquaredChange
from curvlib.approximations.moving_average import MovingAverage
from curvlib.approximations.per_layer import PerLayer
from curvlib.approximations.structural_damping import StructuralDamping
from curvlib.approximations.weight_sharing import Expand, Independent, OneProduct, Reduce, WeightSharing

__all__ = [
    "KFAC",
    "Approximation",
    "AssignedApproximation",
    "Assignment",
    "BlockDiagonal",
    "Dense",
    "Description",
    "Diagonal",
    "Exact",
    "Expand",
    "GeneralTransition",
    "Identity",
    "Independent",
    "LayerwiseApproximation",
    "LinearGaussian",
    "MatchingCrossEntropy",
    "MatchingLoss",
    "MovingAverage",
    "NonFiniteStatisticsError",
    "OneProduct",
    "PerLayer",
    "Reduce",
    "SquaredChange",
    "StatisticalApproximation",
    "Statistics",
    "StructuralDamping",
    "SymmetricTransition",
    "Transition",
    "WeightSharing",
    "joined",
    "layer_key",
]
