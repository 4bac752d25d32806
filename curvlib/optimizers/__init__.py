"""Optimizers: compositions of curvature, solver and step control behind ``torch.optim.Optimizer``."""

from curvlib.optimizers.directions import Direction, PreconditionedGradient, Proposal, TruncatedNewton
from curvlib.optimizers.presets import hessian_free, kfac
from curvlib.optimizers.second_order import NonFiniteLossError, SecondOrderOptimizer, StepResult
from curvlib.optimizers.step_rules import BacktrackingLineSearch, Choice, FixedLength, ModelRescaling, StepRule

__all__ = [
    "BacktrackingLineSearch",
    "Choice",
    "Direction",
    "FixedLength",
    "ModelRescaling",
    "NonFiniteLossError",
    "PreconditionedGradient",
    "Proposal",
    "SecondOrderOptimizer",
    "StepResult",
    "StepRule",
    "TruncatedNewton",
    "hessian_free",
    "kfac",
]
