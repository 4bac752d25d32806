"""Whether the examples of a batch meet inside a model: then their layer factors mix, and every statistic is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlib.extensions import UnsupportedLayerError

if TYPE_CHECKING:
    from curvlib.objective.evaluation import Evaluation


def examples_are_independent(evaluation: Evaluation) -> bool:
    """Return whether it has been seen that examples do not meet; False where nothing could be seen.

    A vector that is not zero for one example alone must give output gradients that are zero for all others, in every
    layer: tried for the first and for the last, since one may see only what comes before it or after it. Two backward
    passes.

    Raises:
        UnsupportedLayerError: a layer's output gradients are not zero for the other examples; its name.
    """
    outputs, reached = evaluation.outputs, True
    if not bool(outputs.isfinite().all()):
        return False  # NaN shows nothing
    for example in (0, evaluation.examples - 1):
        vector = torch.zeros_like(outputs)
        vector[example] = fixed_vector(vector[0].numel(), vector).view_as(vector[0])
        for factors in evaluation.layer_factors(vector):
            if factors.touches_others(example):
                raise UnsupportedLayerError(
                    f"the examples of a batch meet in the model: outputs of one depend on other rows of layer "
                    f"{factors.layer.name!r}. Layer statistics need independent examples, first in every tensor: "
                    "use model.eval() for batch normalisation, keep (N, ...) everywhere, or use Exact."
                )
            reached = reached and factors.touches(example)
    # A layer that not even its own example reaches, behind a head that starts at zero, has shown nothing yet.
    return reached


def fixed_vector(size: int, like: Tensor) -> Tensor:
    """Return a vector (size,) of normal numbers, always the same; the caller's random generators are not touched."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(size, generator=generator, device=like.device, dtype=like.dtype)
