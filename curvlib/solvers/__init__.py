"""Solvers: how (C + damping I)^-1 is applied, how a quadratic model is minimised, how the damping adapts."""

from curvlib.solvers import kronecker_chain, markov_chain, sums  # noqa: F401 - their rules
from curvlib.solvers.blockwise_damping import BlockwiseDamping, damping_structure
from curvlib.solvers.cg import CG, CGInverse
from curvlib.solvers.damping import ConstantDamping, DampingControl, DampingState, LevenbergMarquardt
from curvlib.solvers.damping_scale import AbsoluteFloor, DampingFloor, RelativeFloor, RelativeStart, StartFloor
from curvlib.solvers.damping_schedules import CustomDamping, DampingSchedule, ExponentialDamping, LinearDamping
from curvlib.solvers.descents import (
    DampedNewton,
    Descent,
    DescentStep,
    Dogleg,
    EuclideanNorm,
    MoreSorensen,
    PreconditionerNorm,
    RegionNorm,
    Steihaug,
    Subproblem,
    TwoDimensionalSubspace,
)
from curvlib.solvers.determinism import DeterminismCheck, StochasticOperatorError, check_deterministic
from curvlib.solvers.errors import NotPositiveDefiniteError, SolveError
from curvlib.solvers.factored_tikhonov import Balance, FactoredTikhonov, FixedPi, TraceNormPi, UnitPi
from curvlib.solvers.inverse import damped_inverse, eigendecompose
from curvlib.solvers.krylov import IterativeInverse, KrylovMethod
from curvlib.solvers.minres import MINRES, MINRESInverse
from curvlib.solvers.quadratic_model import QuadraticModel, Rescaling
from curvlib.solvers.radius import RadiusControl, RadiusState, RelativeRadius, TrustRegion
from curvlib.solvers.reduction import (
    DampedRatio,
    Prediction,
    RatioConvention,
    SlopeRatio,
    UndampedRatio,
    reduction_ratio,
)
from curvlib.solvers.solution import (
    ConvergenceWarning,
    IterateGrid,
    LimitAction,
    Progress,
    ProgressTest,
    RaiseAtLimit,
    ResidualTest,
    Solution,
    Status,
    StoppingRule,
    WarnAtLimit,
)
from curvlib.solvers.tightening import TighteningTest

__all__ = [
    "CG",
    "MINRES",
    "AbsoluteFloor",
    "Balance",
    "BlockwiseDamping",
    "CGInverse",
    "ConstantDamping",
    "ConvergenceWarning",
    "CustomDamping",
    "DampedNewton",
    "DampedRatio",
    "DampingControl",
    "DampingFloor",
    "DampingSchedule",
    "DampingState",
    "Descent",
    "DescentStep",
    "DeterminismCheck",
    "Dogleg",
    "EuclideanNorm",
    "ExponentialDamping",
    "FactoredTikhonov",
    "FixedPi",
    "IterateGrid",
    "IterativeInverse",
    "KrylovMethod",
    "LevenbergMarquardt",
    "LimitAction",
    "LinearDamping",
    "MINRESInverse",
    "MoreSorensen",
    "NotPositiveDefiniteError",
    "PreconditionerNorm",
    "Prediction",
    "Progress",
    "ProgressTest",
    "QuadraticModel",
    "RadiusControl",
    "RadiusState",
    "RaiseAtLimit",
    "RatioConvention",
    "RegionNorm",
    "RelativeFloor",
    "RelativeRadius",
    "RelativeStart",
    "Rescaling",
    "ResidualTest",
    "SlopeRatio",
    "Solution",
    "SolveError",
    "StartFloor",
    "Status",
    "Steihaug",
    "StochasticOperatorError",
    "StoppingRule",
    "Subproblem",
    "TighteningTest",
    "TraceNormPi",
    "TrustRegion",
    "TwoDimensionalSubspace",
    "UndampedRatio",
    "UnitPi",
    "WarnAtLimit",
    "check_deterministic",
    "damped_inverse",
    "damping_structure",
    "eigendecompose",
    "reduction_ratio",
]
