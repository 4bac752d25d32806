"""The factors of maps whose inputs are lookups: sparse inputs, never made dense.

Symbols: N examples, T positions (all calls of the layer, one after another), S indices at each, g (N, T, 1, d_out).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from curvlib.extensions.factors import MapFactors, map_factors
from curvlib.extensions.layers import AffineMap
from curvlib.extensions.uses import LookupUse


@dataclass(frozen=True, eq=False)
class LookupFactors(MapFactors):
    """Factors whose inputs are sparse: one group, no bias."""

    map: AffineMap
    uses: tuple[LookupUse, ...]
    padded: Bool[Tensor, " N"] | None = None
    reached: Bool[Tensor, "N T"] | None = None

    def per_example_gradients(self) -> Float[Tensor, "N size"]:
        """Return the gradients, dense: W is (d_out, d_in), a column for each index."""
        rows, columns, values = self._entries()
        result = values.new_zeros(self.examples * self.map.columns, self.map.d_out)
        result.index_add_(0, rows * self.map.columns + columns, values)
        return result.view(self.examples, self.map.columns, self.map.d_out).transpose(1, 2).flatten(1)

    def squared_gradients(self) -> Float[Tensor, " size"]:
        """Return the sum of squares: entries of one example and index are added up before they are squared."""
        rows, columns, values = self._entries()
        keys, places = torch.unique(rows * self.map.columns + columns, return_inverse=True)
        sums = values.new_zeros(len(keys), self.map.d_out).index_add_(0, places, values)
        result = values.new_zeros(self.map.columns, self.map.d_out)
        return result.index_add_(0, keys % self.map.columns, sums.square()).T.flatten()

    def squared_inputs(self) -> Float[Tensor, " d_in"]:
        """Return the diagonal of sum_{n,t} a a^T, by the sparse inputs alone."""
        total = torch.zeros(self.map.columns, dtype=self.uses[0].g.dtype, device=self.uses[0].g.device)
        for i, c in self._lookups():
            position = torch.arange(i.shape[0] * i.shape[1], device=i.device).view(*i.shape[:2], 1).expand_as(i)
            keys, places = torch.unique(position * self.map.columns + i, return_inverse=True)
            sums = total.new_zeros(len(keys)).index_add_(0, places.flatten(), c.flatten())
            total.index_add_(0, keys % self.map.columns, sums.square())
        return total

    def averaged(self) -> LookupFactors:
        """Return one position an example: the mean of its inputs and the sum of its output gradients."""
        lookups = list(self._lookups())
        indices = torch.cat([i.flatten(1) for i, _ in lookups], dim=1).unsqueeze(1)
        total = torch.cat([c.flatten(1) for _, c in lookups], dim=1).unsqueeze(1)
        T = sum(use.indices.shape[1] for use in self.uses)
        coefficients = total / (T if self.lengths is None else self.lengths.clamp(min=1).view(-1, 1, 1))
        g = self.g.squeeze(2).sum(1, keepdim=True)
        return LookupFactors(self.map, (LookupUse(indices, coefficients, g),))

    def _lookups(self) -> Iterator[tuple[Int[Tensor, "N T S"], Float[Tensor, "N T S"]]]:
        """Yield indices and coefficients of every call, with zeros where there is no position."""
        start = 0
        for use in self.uses:
            c, end = use.coefficients.to(use.g.dtype), start + use.indices.shape[1]
            yield use.indices, c if self.valid is None else c * self.valid[:, start:end].unsqueeze(2)
            start = end

    def _entries(self) -> tuple[Tensor, Tensor, Float[Tensor, "E d_out"]]:
        """Return example, index and gradient of every entry of the sparse inputs."""
        rows, columns, values = [], [], []
        for use in self.uses:
            n = torch.arange(use.examples, device=use.indices.device).view(-1, 1, 1).expand_as(use.indices)
            g = use.g
            value = use.coefficients.to(g.dtype).unsqueeze(3) * g.unsqueeze(2)  # (N, T, S, d_out)
            rows.append(n.flatten())
            columns.append(use.indices.flatten())
            values.append(value.flatten(0, 2))
        return torch.cat(rows), torch.cat(columns), torch.cat(values)


@map_factors.register
def _(first: LookupUse, affine_map: AffineMap, uses: tuple[LookupUse, ...]) -> MapFactors:
    return LookupFactors(affine_map, uses)
