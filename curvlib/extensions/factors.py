"""The inputs and output gradients of one layer for one output-space vector, and what approximations ask of them.

Symbols: N examples, T positions (all calls of the layer, one after another), a (N, T, groups, columns) inputs with the
homogeneous coordinate where a bias is trained, g (N, T, groups, d_out) output gradients; size = groups * d_out *
columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce, singledispatch
from operator import add

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Self

from curvlib.extensions.layers import AffineMap, Layer
from curvlib.extensions.uses import (
    DenseUse,
    Examples,
    InputMoments,
    LookupUse,
    Use,
    chunks_of,
    lag_product,
    moments_of_rows,
    rows_of,
)


class MapFactors(ABC):
    """All uses of one affine map in one forward pass.

    Attributes:
        map: the affine map.
        uses: its calls; their positions follow one another.
    """

    map: AffineMap
    uses: tuple[Use, ...]

    @property
    def examples(self) -> int:
        """N."""
        return self.uses[0].examples

    @property
    def size(self) -> int:
        """Entries of all (W b)."""
        return self.map.groups * self.map.d_out * self.map.columns

    @property
    def g(self) -> Float[Tensor, "N T groups d_out"]:
        """Output gradients of all calls."""
        gradients = [use.g for use in self.uses]
        joined = gradients[0] if len(gradients) == 1 else torch.cat(gradients, dim=1)
        return joined.unflatten(-1, (self.map.groups, self.map.d_out))

    @property
    def mean_positions(self) -> Float[Tensor, ""]:
        """How many positions an example has, on average."""
        first = self.uses[0].g
        return first.new_full((), float(sum(use.g.shape[1] for use in self.uses)))

    @abstractmethod
    def take(self, examples: Examples) -> Self:
        """Return the factors of some examples alone; inputs are made for these."""

    def limited(self, reached: Bool[Tensor, "N T"] | None) -> Self:
        """Return the factors with the positions that any output depends on; for ordered maps alone."""
        return self

    def reach(self) -> Bool[Tensor, "N T"] | None:
        """Return the positions that this vector reaches; None for maps whose positions are not ordered."""
        return None

    def output_moment(self) -> Float[Tensor, "groups d_out d_out"]:
        """Return sum_{n,t} g_t g_t^T."""
        return reduce(add, (use.output_moment(self.map.groups) for use in self.uses))

    def chunks(self, numbers: int = 0) -> Iterator[Self]:
        """Yield the factors of at least one example, and of as many as hold 64 MiB in float32.

        Args:
            numbers: what one example needs besides its inputs.
        """
        for chunk in chunks_of(self.examples, max(numbers, sum(use.numbers for use in self.uses))):
            yield self.take(chunk)

    @abstractmethod
    def per_example_gradients(self) -> Float[Tensor, "N size"]:
        """Return J_n^T v of this map, row by row of (W b), for all examples at once."""

    @abstractmethod
    def squared_gradients(self) -> Float[Tensor, " size"]:
        """Return sum_n (J_n^T v)^2, entry by entry."""


@dataclass(frozen=True, eq=False)
class DenseFactors(MapFactors):
    """Factors whose inputs are vectors.

    Attributes:
        reached: (N, T) the positions of an ordered map that the outputs depend on, all those before the last one
            included; None takes those that this vector reaches.
    """

    map: AffineMap
    uses: tuple[DenseUse, ...]
    reached: Bool[Tensor, "N T"] | None = None

    @cached_property
    def valid(self) -> Bool[Tensor, "N T"] | None:
        """Which positions are part of their sequence; None where all are. Waits for the device, for ordered maps.

        Left out are those that a sequence does not have, and those behind the last one that the outputs depend on:
        padding, whose inputs the curvature matrix does not see.
        """
        given = self._given()
        reached = self.reached if self.reached is not None else self._reached_by_this_vector()
        if reached is None or bool(reached.all()):
            return given
        return reached if given is None else reached & given

    def _reached_by_this_vector(self) -> Bool[Tensor, "N T"] | None:
        # mostly the last position of every example is: the others need not be looked at then
        return None if bool((self.g[:, -1].flatten(1) != 0).any(1).all()) else self.reach()

    def _given(self) -> Bool[Tensor, "N T"] | None:
        """Return the positions that the calls say there are."""
        if all(use.valid is None for use in self.uses):
            return None
        parts = [
            use.valid if use.valid is not None else use.g.new_ones(use.g.shape[:2], dtype=torch.bool)
            for use in self.uses
        ]
        return torch.cat(parts, dim=1)

    def limited(self, reached: Bool[Tensor, "N T"] | None) -> Self:
        """Return the factors with the positions that any output depends on."""
        return replace(self, reached=reached)

    def reach(self) -> Bool[Tensor, "N T"] | None:
        """Return the positions up to the last one with a gradient that is not zero.

        An example without any, behind a head that starts at zero, keeps all of its positions.
        """
        if not self.map.ordered or sum(use.g.shape[1] for use in self.uses) == 1:
            return None
        there = (self.g.flatten(2) != 0).any(2)
        later = there.int().flip(1).cummax(1).values.flip(1).bool()
        return later | ~later[:, :1]

    @property
    def lengths(self) -> Int[Tensor, " N"] | None:
        """How many positions each example has; None where all have T."""
        return None if self.valid is None else self.valid.sum(1)

    @property
    def mean_positions(self) -> Float[Tensor, ""]:
        """How many positions an example has, on average."""
        mean = super().mean_positions
        return mean if self.lengths is None else self.lengths.to(mean.dtype).mean()

    @property
    def inputs(self) -> Float[Tensor, "N T groups d_in"]:
        """Inputs of all calls, without the homogeneous coordinate; zero where there is no position."""
        inputs = self._inputs()
        return inputs if self.valid is None else inputs * self.valid.unsqueeze(2).unsqueeze(3)

    def _inputs(self) -> Float[Tensor, "N T groups d_in"]:
        inputs = [use.a for use in self.uses]
        joined = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)
        return joined.unflatten(-1, (self.map.groups, -1))

    @property
    def a(self) -> Float[Tensor, "N T groups columns"]:
        """Inputs with the columns that belong to trained parameters: the weight's, and a one for the bias."""
        g = self.g
        ones = g.new_ones(*g.shape[:3], 1)
        if self.valid is not None:
            ones = ones * self.valid.unsqueeze(2).unsqueeze(3)
        if not self.map.weight:
            return ones
        return torch.cat([self.inputs, ones], dim=3) if self.map.bias else self.inputs

    def take(self, examples: Examples) -> Self:
        """Return the factors of some examples."""
        reached = None if self.reached is None else self.reached[examples]
        return replace(self, uses=tuple(use.take(examples) for use in self.uses), reached=reached)

    def moments(self) -> InputMoments:
        """Return the sums of a a^T and of a over examples and positions, without the homogeneous coordinate."""
        if self.valid is None:
            return reduce(add, (use.moments(self.map.groups) for use in self.uses))
        parts = (moments_of_rows(rows_of(part.inputs)) for part in self.chunks())
        return replace(reduce(add, parts), count=self.valid.sum())

    def output_lag(self) -> Float[Tensor, "d_out d_out"]:
        """Return sum_{n,t} g_{t+1} g_t^T of an ordered map of one group."""
        if len(self.uses) == 1:
            return self.uses[0].output_lag()
        return lag_product(self.g.squeeze(2))

    def per_example_gradients(self) -> Float[Tensor, "N size"]:
        """Return sum_t g_t a_t^T of every example."""
        return self._joined(
            lambda g, a: torch.einsum("ntgo,ntgi->ngoi", g, a), lambda g: g.sum(1).unsqueeze(3)
        ).flatten(1)

    def squared_gradients(self) -> Float[Tensor, " size"]:
        """Return the sum of squares.

        With one position (g_o a_i)^2 = g_o^2 a_i^2: one matrix product, no per-example gradient is made.
        """
        return reduce(add, (part._squares() for part in self.chunks(self.size)))

    def _squares(self) -> Float[Tensor, " size"]:
        if self.g.shape[1] != 1:
            return self.per_example_gradients().square().sum(0)
        return self._joined(
            lambda g, a: torch.einsum("ntgo,ntgi->goi", g.square(), a.square()),
            lambda g: g.square().sum((0, 1)).unsqueeze(2),
        ).flatten()

    def _joined(
        self, of_weight: Callable[[Tensor, Tensor], Tensor], of_bias: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, " *N groups d_out columns"]:
        """Return the columns of the weight and the one of the bias, whose input of ones is never made."""
        # where there is no position g is zero
        g = self.g
        parts = [of_weight(g, self._inputs())] if self.map.weight else []
        if self.map.bias:
            parts.append(of_bias(g))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@dataclass(frozen=True, eq=False)
class LookupFactors(MapFactors):
    """Factors whose inputs are sparse: one group, no bias."""

    map: AffineMap
    uses: tuple[LookupUse, ...]

    def take(self, examples: Examples) -> Self:
        """Return the factors of some examples."""
        return replace(self, uses=tuple(use.take(examples) for use in self.uses))

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
        for use in self.uses:
            c, i = use.coefficients.to(total.dtype), use.indices
            position = torch.arange(i.shape[0] * i.shape[1], device=i.device).view(*i.shape[:2], 1).expand_as(i)
            keys, places = torch.unique(position * self.map.columns + i, return_inverse=True)
            sums = total.new_zeros(len(keys)).index_add_(0, places.flatten(), c.flatten())
            total.index_add_(0, keys % self.map.columns, sums.square())
        return total

    def averaged(self) -> LookupFactors:
        """Return one position an example: the mean of its inputs and the sum of its output gradients."""
        positions = sum(use.indices.shape[1] for use in self.uses)
        indices = torch.cat([use.indices.flatten(1) for use in self.uses], dim=1).unsqueeze(1)
        coefficients = torch.cat([use.coefficients.flatten(1) for use in self.uses], dim=1).unsqueeze(1) / positions
        g = self.g.squeeze(2).sum(1, keepdim=True)
        return LookupFactors(self.map, (LookupUse(indices, coefficients, g),))

    @property
    def positions(self) -> int:
        """T of all calls together."""
        return sum(use.indices.shape[1] for use in self.uses)

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


@singledispatch
def map_factors(first: Use, affine_map: AffineMap, uses: tuple[Use, ...]) -> MapFactors:
    """Return the factors that uses of the first one's kind make."""
    raise TypeError(f"no factors are known for uses of type {type(first).__name__}.")


@map_factors.register
def _(first: DenseUse, affine_map: AffineMap, uses: tuple[DenseUse, ...]) -> MapFactors:
    return DenseFactors(affine_map, uses)


@map_factors.register
def _(first: LookupUse, affine_map: AffineMap, uses: tuple[LookupUse, ...]) -> MapFactors:
    return LookupFactors(affine_map, uses)


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """All uses of a layer in one forward pass; J_n^T v is the sum over its maps of sum_t g_t a_t^T.

    Attributes:
        layer: the layer.
        maps: the factors of those of its maps that were used.
        counted: the numbers of the examples with a target that counts, which alone belong into averages of inputs; None
            for all of them.
    """

    layer: Layer
    maps: tuple[MapFactors, ...]
    counted: Int[Tensor, " n"] | None = None

    def limited(self, counted: Int[Tensor, " n"] | None, reached: Mapping[str, Tensor]) -> LayerFactors:
        """Return the factors with the examples that count and, by map, the positions that any output depends on."""
        maps = tuple(factors.limited(reached.get(factors.map.name)) for factors in self.maps)
        return replace(self, counted=counted, maps=maps)

    def reached(self) -> dict[str, Bool[Tensor, "N T"]]:
        """Return by map the positions that this vector reaches."""
        return {factors.map.name: found for factors in self.maps if (found := factors.reach()) is not None}

    def per_example_gradients(self) -> Iterator[Float[Tensor, "n size"]]:
        """Yield J_n^T v in the layer's own order, for chunks of examples that hold at most 64 MiB (or one)."""
        inputs = max(sum(use.numbers for use in factors.uses) for factors in self.maps)
        for chunk in chunks_of(self.maps[0].examples, max(self.layer.size, inputs)):
            yield reduce(add, (_in_layer_order(factors.take(chunk)) for factors in self.maps))

    def squared_gradients(self) -> Float[Tensor, " size"]:
        """Return sum_n (J_n^T v)^2, entry by entry."""
        if len(self.maps) == 1 and self.maps[0].map.order is None:
            return self.maps[0].squared_gradients()
        parts = [rows.square().sum(0) for rows in self.per_example_gradients()]
        return torch.stack(parts).sum(0)

    def touches(self, example: int) -> bool:
        """Return whether an output gradient of the given example is not zero. Waits for the device."""
        return any(bool(use.g[example].any()) for factors in self.maps for use in factors.uses)

    def touches_others(self, example: int) -> bool:
        """Return whether an output gradient of another example than the given one is not zero. Waits for the device."""
        gradients = [use.g for factors in self.maps for use in factors.uses]
        # NaN is not greater than 0: what is not finite says nothing about who meets whom
        return any(bool((g[:example].abs() > 0).any() or (g[example + 1 :].abs() > 0).any()) for g in gradients)


def _in_layer_order(factors: MapFactors) -> Float[Tensor, "n size"]:
    rows, order = factors.per_example_gradients(), factors.map.order
    return rows if order is None else torch.empty_like(rows).index_copy_(1, order, rows)
