"""The inputs and output gradients of one layer for one output-space vector, and what approximations ask of them.

Symbols: N examples, T positions (all calls of the layer, one after another), a (N, T, columns) inputs with the
homogeneous coordinate where a bias is trained, g (N, T, d_out) output gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.extensions.layers import Layer
from curvlib.extensions.rule import AffineUse

# Numbers that one chunk of per-example gradients may hold: 64 MiB in float32.
_CHUNK_NUMBERS = 2**24


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """All uses of a layer in one forward pass; per-example gradients are J_n^T v = sum_t g_t a_t^T.

    Attributes:
        layer: the layer.
        uses: its calls; their positions follow one another.
    """

    layer: Layer
    uses: tuple[AffineUse, ...]

    @cached_property
    def inputs(self) -> Float[Tensor, "N T d_in"]:
        """Inputs of all calls, without the homogeneous coordinate."""
        return self.uses[0].a if len(self.uses) == 1 else torch.cat([use.a for use in self.uses], dim=1)

    @cached_property
    def g(self) -> Float[Tensor, "N T d_out"]:
        """Output gradients of all calls."""
        return self.uses[0].g if len(self.uses) == 1 else torch.cat([use.g for use in self.uses], dim=1)

    @cached_property
    def a(self) -> Float[Tensor, "N T columns"]:
        """Inputs with the columns that belong to trained parameters: the weight's, and a one for the bias."""
        parts = [self.inputs] if self.layer.weight is not None else []
        if self.layer.bias is not None:
            parts.append(self.inputs.new_ones(*self.inputs.shape[:2], 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def per_example_gradients(self) -> Iterator[Float[Tensor, "n d_out*columns"]]:
        """Yield J_n^T v of this layer, row by row of (W b), for chunks of n examples that hold at most 64 MiB."""
        chunk = max(1, _CHUNK_NUMBERS // (self.layer.d_out * self.layer.columns))
        for a, g in zip(self.a.split(chunk), self.g.split(chunk), strict=True):
            yield torch.einsum("nto,nti->noi", g, a).flatten(1)

    def squared_gradients(self) -> Float[Tensor, " d_out*columns"]:
        """Return sum_n (J_n^T v)^2, entry by entry.

        With one position (g_o a_i)^2 = g_o^2 a_i^2: one matrix product, no per-example gradient is made.
        """
        if self.g.shape[1] == 1:
            return (self.g.squeeze(1).square().T @ self.a.squeeze(1).square()).flatten()
        parts = [rows.square().sum(0) for rows in self.per_example_gradients()]
        return torch.stack(parts).sum(0)
