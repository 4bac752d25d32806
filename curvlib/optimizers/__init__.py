"""Optimizers: compositions of curvature, solver and step control behind ``torch.optim.Optimizer``."""

from curvlib.optimizers.directions import PreconditionedGradient, TruncatedNewton
from curvlib.optimizers.layer_damping import LayerDamping, SolverForModel
from curvlib.optimizers.minimize import Minimization, MinimizationStatus, Tolerances, minimize
from curvlib.optimizers.model_descent import ModelDescent
from curvlib.optimizers.norm_constraint import NormConstraint
from curvlib.optimizers.preconditioner import Preconditioner
from curvlib.optimizers.presets import gauss_newton, hessian_free, kfac, levenberg_marquardt, newton_trust_region
from curvlib.optimizers.proposal import Direction, DirectionState, Proposal
from curvlib.optimizers.scaling import CurvatureScaling, FixedScaling, Scaling, in_scaled_parameters
from curvlib.optimizers.second_order import NonFiniteLossError, SecondOrderOptimizer
from curvlib.optimizers.step_result import StepResult
from curvlib.optimizers.step_rules import BacktrackingLineSearch, Choice, FixedLength, ModelRescaling, StepRule
from curvlib.optimizers.wolfe import StrongWolfe

__all__ = [
    "BacktrackingLineSearch",
    "Choice",
    "CurvatureScaling",
    "Direction",
    "DirectionState",
    "FixedLength",
    "FixedScaling",
    "LayerDamping",
    "Minimization",
    "MinimizationStatus",
    "ModelDescent",
    "ModelRescaling",
    "NonFiniteLossError",
    "NormConstraint",
    "PreconditionedGradient",
    "Preconditioner",
    "Proposal",
    "Scaling",
    "SecondOrderOptimizer",
    "SolverForModel",
    "StepResult",
    "StepRule",
    "StrongWolfe",
    "Tolerances",
    "TruncatedNewton",
    "gauss_newton",
    "hessian_free",
    "in_scaled_parameters",
    "kfac",
    "levenberg_marquardt",
    "minimize",
    "newton_trust_region",
]
