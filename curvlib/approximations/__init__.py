"""Approximations of a curvature matrix: which statistics of it are kept."""

from curvlib.approximations.assignment import AssignedApproximation, Assignment, LayerAssignment, layer_key
from curvlib.approximations.base import Approximation, StatisticalApproximation, StatisticalWeightedSum, WeightedSum
from curvlib.approximations.block_diagonal import BlockDiagonal
from curvlib.approximations.block_kinds import BlockKind, DenseBlocks, LowRankBlocks
from curvlib.approximations.description import BlockRow, Description
from curvlib.approximations.diagonal import Diagonal
from curvlib.approximations.ekfac import EKFAC, EigenbasisAverage
from curvlib.approximations.exact import Dense, Exact
from curvlib.approximations.following import StepPairs, SumOfAverages
from curvlib.approximations.hutchinson import HutchinsonDiagonal
from curvlib.approximations.identity import Identity
from curvlib.approximations.joint import joined
from curvlib.approximations.kfac import KFAC
from curvlib.approximations.kfra import KFRA
from curvlib.approximations.layerwise import LayerwiseApproximation
from curvlib.approximations.lbfgs import LBFGS, LBFGSHistory, PairRule, PowellDamping, SkipPairs
from curvlib.approximations.linear_gaussian import (
    GeneralTransition,
    LinearGaussian,
    SymmetricTransition,
    Transition,
)
from curvlib.approximations.loss_curvature import LossCurvature
from curvlib.approximations.low_rank import EstimatedRemainder, LowRank, Remainder, RemainderDiagonal
from curvlib.approximations.matching import MatchingCrossEntropy, MatchingLoss, SquaredChange
from curvlib.approximations.moving_average import MovingAverage
from curvlib.approximations.partition import (
    ByGroups,
    ByLabel,
    ByLayer,
    ByOutputUnit,
    ByParameter,
    Group,
    LayerPartition,
    Partition,
)
from curvlib.approximations.per_layer import PerLayer
from curvlib.approximations.root_diagonal import RootDiagonal
from curvlib.approximations.root_mean_square import RootMeanSquareDiagonal
from curvlib.approximations.running import RunningAverage, running_average
from curvlib.approximations.statistics import NonFiniteStatisticsError, Statistics
from curvlib.approximations.structural_damping import StructuralDamping
from curvlib.approximations.tridiagonal import TridiagonalKFAC
from curvlib.approximations.truncation import FullRank, LanczosTruncation, LowRankMethod, Nystrom, RandomizedSketch
from curvlib.approximations.weight_sharing import Expand, Independent, OneProduct, Reduce, WeightSharing

__all__ = [
    "EKFAC",
    "KFAC",
    "KFRA",
    "LBFGS",
    "Approximation",
    "AssignedApproximation",
    "Assignment",
    "BlockDiagonal",
    "BlockKind",
    "BlockRow",
    "ByGroups",
    "ByLabel",
    "ByLayer",
    "ByOutputUnit",
    "ByParameter",
    "Dense",
    "DenseBlocks",
    "Description",
    "Diagonal",
    "EigenbasisAverage",
    "EstimatedRemainder",
    "Exact",
    "Expand",
    "FullRank",
    "GeneralTransition",
    "Group",
    "HutchinsonDiagonal",
    "Identity",
    "Independent",
    "LBFGSHistory",
    "LanczosTruncation",
    "LayerAssignment",
    "LayerPartition",
    "LayerwiseApproximation",
    "LinearGaussian",
    "LossCurvature",
    "LowRank",
    "LowRankBlocks",
    "LowRankMethod",
    "MatchingCrossEntropy",
    "MatchingLoss",
    "MovingAverage",
    "NonFiniteStatisticsError",
    "Nystrom",
    "OneProduct",
    "PairRule",
    "Partition",
    "PerLayer",
    "PowellDamping",
    "RandomizedSketch",
    "Reduce",
    "Remainder",
    "RemainderDiagonal",
    "RootDiagonal",
    "RootMeanSquareDiagonal",
    "RunningAverage",
    "SkipPairs",
    "SquaredChange",
    "StatisticalApproximation",
    "StatisticalWeightedSum",
    "Statistics",
    "StepPairs",
    "StructuralDamping",
    "SumOfAverages",
    "SymmetricTransition",
    "Transition",
    "TridiagonalKFAC",
    "WeightSharing",
    "WeightedSum",
    "joined",
    "layer_key",
    "running_average",
]
