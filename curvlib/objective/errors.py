"""What an evaluation refuses to answer, and why."""

from __future__ import annotations


class StaleEvaluationError(RuntimeError):
    """An evaluation was used after its parameters or its batch had changed."""


class LinearizationError(RuntimeError):
    """The model's backward pass cannot be differentiated, so that exact products are not available."""


class FusedKernelWarning(UserWarning):
    """Attention or a recurrent layer is computed by another kernel than PyTorch would choose, for exact products."""


class FusedKernelError(LinearizationError):
    """A fused kernel stands in the way of exact products."""
