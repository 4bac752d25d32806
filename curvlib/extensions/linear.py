"""The layer rule of fully connected layers."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from curvlib.extensions.rule import LayerRule, register


class LinearRule(LayerRule):
    """``nn.Linear`` on inputs (N, ..., d_in): all dimensions between the first and the last are positions."""

    ordered: ClassVar[bool] = True

    def inputs(self, module: nn.Module, x: Float[Tensor, "N *T d_in"]) -> Float[Tensor, "N T d_in"]:
        """Return the inputs with their positions flattened; T = 1 for (N, d_in)."""
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def output_gradients(self, module: nn.Module, g: Float[Tensor, "N *T d_out"]) -> Float[Tensor, "N T d_out"]:
        """Return the output gradients with their positions flattened."""
        return g.reshape(g.shape[0], -1, g.shape[-1])


register(nn.Linear, LinearRule())
