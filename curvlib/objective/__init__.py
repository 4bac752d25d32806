"""The objective that the user wrote, and one evaluation of it: a forward pass and all that its graph can answer."""

from curvlib.objective.elsewhere import Elsewhere
from curvlib.objective.errors import FusedKernelWarning, LinearizationError, StaleEvaluationError
from curvlib.objective.evaluation import Evaluation
from curvlib.objective.forward import Batch
from curvlib.objective.objective import Objective
from curvlib.objective.observed import ObservedPass

__all__ = [
    "Batch",
    "Elsewhere",
    "Evaluation",
    "FusedKernelWarning",
    "LinearizationError",
    "Objective",
    "ObservedPass",
    "StaleEvaluationError",
]
