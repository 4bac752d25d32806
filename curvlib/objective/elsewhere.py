"""The objective of an evaluation's batch at other parameters.

Symbols: theta' (D,) the other parameters, h the objective, z the model's outputs, L the loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.objective.forward import ForwardPass
from curvlib.operators import full_precision

if TYPE_CHECKING:
    from curvlib.objective.evaluation import Evaluation

# Work in gradients: a forward pass, and a backward pass with weight gradients.
FORWARD, BACKWARD = 1 / 3, 2 / 3


class Elsewhere:
    """h and its gradient on the same batch, with the same random numbers (dropout), at other parameters.

    Made by :meth:`Evaluation.elsewhere`: one forward pass, its graph kept for :meth:`gradient`. The model's own
    parameters and buffers are left as they are.

    Attributes:
        value: h(theta'), a scalar tensor without a graph.
    """

    def __init__(self, evaluation: Evaluation, forward: ForwardPass, parameters: Float[Tensor, " D"]) -> None:
        self._evaluation, self._theta = evaluation, parameters.detach()
        objective, layout = evaluation.objective, evaluation.layout
        self._parts = [part.clone().requires_grad_() for part in layout.unflatten(self._theta)]
        with torch.enable_grad():
            self._graph = forward.at(dict(zip(layout.names, self._parts, strict=True)))
        # As for the evaluation itself: the loss in float32 at least.
        self._outputs = self._graph.detach().to(torch.promote_types(self._graph.dtype, torch.float32))
        with torch.no_grad(), full_precision(layout.device):
            self.value: Float[Tensor, ""] = objective.total(
                objective.loss.value(self._outputs, evaluation.targets), self._parts
            )

    def gradient(self) -> Float[Tensor, " D"]:
        """Return dh/dtheta at theta' (D,), by one backward pass, which frees the graph: call it once."""
        evaluation, objective = self._evaluation, self._evaluation.objective
        evaluation.work += BACKWARD
        with full_precision(evaluation.layout.device):
            u = objective.loss.gradient(self._outputs, evaluation.targets).to(self._graph.dtype)
            rows = torch.autograd.grad(self._graph, self._parts, u, allow_unused=True)
            return evaluation.layout.join(rows).add(self._theta, alpha=objective.l2)
