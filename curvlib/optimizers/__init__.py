"""Optimizers: compositions of curvature, solver and step control behind ``torch.optim.Optimizer``."""

from curvlib.optimizers.directions import PreconditionedGradient, TruncatedNewton
from curvlib.optimizers.layer_damping import LayerDamping, SolverForModel
from curvlib.optimizers.model_descent import ModelDescent
from curvlib.optimizers.norm_constraint import NormConstraint
from curvlib.optimizers.presets import hessian_free, kfac, newton_trust_region
from curvlib.optimizers.proposal import Direction, DirectionState, Proposal
from curvlib.optimizers.second_order import NonFiniteLossError, SecondOrderOptimizer, StepResult
from curvlib.optimizers.step_rules import BacktrackingLineSearch, Choice, FixedLength, ModelRescaling, StepRule
from curvlib.optimizers.wolfe import StrongWolfe

__all__ = [
    "BacktrackingLineSearch",
    "Choice",
    "Direction",
    "DirectionState",
    "FixedLength",
    "LayerDamping",
    "ModelDescent",
    "ModelRescaling",
    "NonFiniteLossError",
    "NormConstraint",
    "PreconditionedGradient",
    "Proposal",
    "SecondOrderOptimizer",
    "SolverForModel",
    "StepResult",
    "StepRule",
    "StrongWolfe",
    "TruncatedNewton",
    "hessian_free",
    "kfac",
    "newton_trust_region",
]
