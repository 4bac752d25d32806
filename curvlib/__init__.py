"""curvlib: second-order methods for PyTorch, one axis at a time.

A curvature matrix (which output-space vectors) x an approximation (which statistics of them are kept) gives a linear
operator; a solver turns the operator and a damping into a step; a step control decides how far to go.
"""

from curvlib import approximations, extensions, operators, optimizers, output_losses, solvers, spectra
from curvlib.extensions import UnsupportedLayerError
from curvlib.matrices import GGN, CurvatureMatrix, EmpiricalFisher, Fisher, Hessian
from curvlib.objective import Evaluation, FusedKernelWarning, LinearizationError, Objective, StaleEvaluationError
from curvlib.output_losses import AutogradLoss, OutputLoss
from curvlib.parameters import ParameterLayout

__version__ = "0.1.0"

__all__ = [
    "GGN",
    "AutogradLoss",
    "CurvatureMatrix",
    "EmpiricalFisher",
    "Evaluation",
    "Fisher",
    "FusedKernelWarning",
    "Hessian",
    "LinearizationError",
    "Objective",
    "OutputLoss",
    "ParameterLayout",
    "StaleEvaluationError",
    "UnsupportedLayerError",
    "approximations",
    "extensions",
    "operators",
    "optimizers",
    "output_losses",
    "solvers",
    "spectra",
]
