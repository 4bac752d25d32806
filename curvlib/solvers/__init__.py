"""Solvers: how (C + damping I)^-1 is applied, how a quadratic model is minimised, how the damping adapts."""

from curvlib.solvers import kronecker_chain, markov_chain  # noqa: F401 - their rules
from curvlib.solvers.cg import CG, CGInverse
from curvlib.solvers.damping import ConstantDamping, DampingControl, DampingState, LevenbergMarquardt
from curvlib.solvers.damping_scale import AbsoluteFloor, DampingFloor, RelativeFloor, RelativeStart
from curvlib.solvers.descents import (
    DampedNewton,
    Descent,
    DescentStep,
    Dogleg,
    MoreSorensen,
    Steihaug,
    Subproblem,
    TwoDimensionalSubspace,
)
from curvlib.solvers.errors import SolveError
from curvlib.solvers.factored_tikhonov import Balance, FactoredTikhonov, FixedPi, TraceNormPi, UnitPi
from curvlib.solvers.inverse import damped_inverse, eigendecompose
from curvlib.solvers.krylov import IterativeInverse, KrylovMethod
from curvlib.solvers.minres import MINRES, MINRESInverse
from curvlib.solvers.quadratic_model import (
    DampedRatio,
    Prediction,
    QuadraticModel,
    RatioConvention,
    Rescaling,
    UndampedRatio,
)
from curvlib.solvers.radius import RadiusControl, RadiusState, TrustRegion
from curvlib.solvers.reduction import reduction_ratio
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

__all__ = [
    "CG",
    "MINRES",
    "AbsoluteFloor",
    "Balance",
    "CGInverse",
    "ConstantDamping",
    "ConvergenceWarning",
    "DampedNewton",
    "DampedRatio",
    "DampingControl",
    "DampingFloor",
    "DampingState",
    "Descent",
    "DescentStep",
    "Dogleg",
    "FactoredTikhonov",
    "FixedPi",
    "IterateGrid",
    "IterativeInverse",
    "KrylovMethod",
    "LevenbergMarquardt",
    "LimitAction",
    "MINRESInverse",
    "MoreSorensen",
    "Prediction",
    "Progress",
    "ProgressTest",
    "QuadraticModel",
    "RadiusControl",
    "RadiusState",
    "RaiseAtLimit",
    "RatioConvention",
    "RelativeFloor",
    "RelativeStart",
    "Rescaling",
    "ResidualTest",
    "Solution",
    "SolveError",
    "Status",
    "Steihaug",
    "StoppingRule",
    "Subproblem",
    "TraceNormPi",
    "TrustRegion",
    "TwoDimensionalSubspace",
    "UndampedRatio",
    "UnitPi",
    "WarnAtLimit",
    "damped_inverse",
    "eigendecompose",
    "reduction_ratio",
]
