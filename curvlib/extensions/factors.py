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
    Use,
    chunks_of,
    lag_product,
    moments_of_rows,
    rows_of,
)


class MapFactors(ABC):
    """All uses of one affine map in one forward pass.

    A use at several positions is a sequence of its own; uses at one position each, such as the calls of a cell in a
    loop, follow one another and are one sequence.

    Attributes:
        map: the affine map.
        uses: its calls; their positions follow one another.
        padded: (N,) whether ordered positions of an example behind its last one that the outputs depend on are left
            out; None for no example.
        reached: (N, T) those up to the last one that any vector reaches; None takes those that this vector reaches.
    """

    map: AffineMap
    uses: tuple[Use, ...]
    padded: Bool[Tensor, " N"] | None
    reached: Bool[Tensor, "N T"] | None

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

    @cached_property
    def sequences(self) -> tuple[slice, ...]:
        """The positions of each sequence."""
        bounds: list[list[int]] = []
        end, joins = 0, False
        for use in self.uses:
            length = use.g.shape[1]
            if joins and length == 1:
                bounds[-1][1] += 1
            else:
                bounds.append([end, end + length])
            end, joins = end + length, length == 1
        return tuple(slice(*ends) for ends in bounds)

    @cached_property
    def valid(self) -> Bool[Tensor, "N T"] | None:
        """Which positions are part of their sequence; None where all are. Waits for the device, for padded maps.

        Left out are those that a sequence does not have, and those behind the last one that the outputs depend on:
        padding, whose inputs the curvature matrix does not see.
        """
        given = self._given()
        reached = self.reached if self.reached is not None else self._reached_by_this_vector()
        if reached is None or bool(reached.all()):
            return given
        return reached if given is None else reached & given

    def _given(self) -> Bool[Tensor, "N T"] | None:
        """Return the positions that the calls say there are."""
        if all(use.valid is None for use in self.uses):
            return None
        everywhere = (torch.ones_like(use.g[:, :, 0], dtype=torch.bool) for use in self.uses)
        given = (use.valid for use in self.uses)
        return torch.cat([all_ if own is None else own for own, all_ in zip(given, everywhere, strict=True)], dim=1)

    def _reached_by_this_vector(self) -> Bool[Tensor, "N T"] | None:
        if self.padded is None:
            return None
        # mostly the last position of every example is: the others need not be looked at then
        g = self.g
        ends = (g[:, part.stop - 1].flatten(1) for part in self.sequences)
        return None if all(bool((end != 0).any(1).all()) for end in ends) else self.reach()

    def reach(self) -> Bool[Tensor, "N T"] | None:
        """Return the positions up to the last one of their sequence with a gradient that is not zero.

        None where positions are not looked at.
        """
        if self.padded is None or not self.map.ordered or sum(use.g.shape[1] for use in self.uses) == 1:
            return None
        there = (self.g.flatten(2) != 0).any(2)
        ends = [there[:, part].int().flip(1).cummax(1).values.flip(1) for part in self.sequences]
        return torch.cat(ends, dim=1).bool() | ~self.padded.unsqueeze(1)

    def limited(self, padded: Bool[Tensor, " N"] | None, reached: Bool[Tensor, "N T"] | None) -> Self:
        """Return the factors with the positions that any output depends on."""
        if not self.map.ordered:
            return self
        return replace(self, padded=padded, reached=reached)  # type: ignore[type-var]

    @property
    def lengths(self) -> Int[Tensor, " N"] | None:
        """How many positions each example has; None where all have T."""
        return None if self.valid is None else self.valid.sum(1)

    @property
    def mean_positions(self) -> Float[Tensor, ""]:
        """How many positions an example has, on average."""
        g = self.uses[0].g
        if self.lengths is not None:
            return self.lengths.to(g.dtype).mean()
        return g.new_full((), float(sum(use.g.shape[1] for use in self.uses)))

    def take(self, examples: Examples) -> Self:
        """Return the factors of some examples alone; inputs are made for these."""
        padded, reached = (None if mask is None else mask[examples] for mask in (self.padded, self.reached))
        uses = tuple(use.take(examples) for use in self.uses)
        return replace(self, uses=uses, padded=padded, reached=reached)  # type: ignore[type-var]

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
    """Factors whose inputs are vectors."""

    map: AffineMap
    uses: tuple[DenseUse, ...]
    padded: Bool[Tensor, " N"] | None = None
    reached: Bool[Tensor, "N T"] | None = None

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

    def moments(self) -> InputMoments:
        """Return the sums of a a^T and of a over examples and positions, without the homogeneous coordinate."""
        if self.valid is None:
            return reduce(add, (use.moments(self.map.groups) for use in self.uses))
        parts = (moments_of_rows(rows_of(part.inputs)) for part in self.chunks())
        return replace(reduce(add, parts), count=self.valid.sum())

    def output_lag(self) -> Float[Tensor, "d_out d_out"]:
        """Return sum_{n,t} g_{t+1} g_t^T over the steps of each sequence, of an ordered map of one group."""
        if len(self.sequences) == len(self.uses):
            return reduce(add, (use.output_lag() for use in self.uses))
        g = self.g.squeeze(2)
        return reduce(add, (lag_product(g[:, part]) for part in self.sequences))

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


@singledispatch
def map_factors(first: Use, affine_map: AffineMap, uses: tuple[Use, ...]) -> MapFactors:
    """Return the factors that uses of the first one's kind make."""
    raise TypeError(f"no factors are known for uses of type {type(first).__name__}.")


@map_factors.register
def _(first: DenseUse, affine_map: AffineMap, uses: tuple[DenseUse, ...]) -> MapFactors:
    return DenseFactors(affine_map, uses)


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

    def limited(
        self, counted: Int[Tensor, " n"] | None, padded: Bool[Tensor, " N"] | None, reached: Mapping[str, Tensor]
    ) -> LayerFactors:
        """Return the factors with the examples that count and, by map, the positions that any output depends on."""
        maps = tuple(factors.limited(padded, reached.get(factors.map.name)) for factors in self.maps)
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
