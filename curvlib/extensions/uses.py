"""Uses: what one call of a module means for one affine map, for one output-space vector v.

Symbols: N examples, T positions, ``groups`` independent maps side by side (1 but for grouped convolutions and for
scales and shifts), a (N, T, groups * d_in) inputs without the homogeneous coordinate, g (N, T, groups * d_out)
gradients of the map's outputs. The part of J^T v that belongs to the weight W of one example is sum_t g_t a_t^T, group
by group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import Self

# Consecutive examples, or the numbers (n,) of some.
Examples: TypeAlias = slice | Tensor

if TYPE_CHECKING:
    from curvlib.extensions.rule import LayerRule

# Numbers that the inputs or the per-example gradients of one chunk of examples may hold: 64 MiB in float32.
_CHUNK_NUMBERS = 2**24


class Use(ABC):
    """One call of a module, seen as one affine map; all examples, or some of them."""

    @property
    @abstractmethod
    def g(self) -> Float[Tensor, "N T d_out"]:
        """Gradients of the affine map's outputs, in float32 at least."""

    @property
    @abstractmethod
    def examples(self) -> int:
        """N."""

    @property
    @abstractmethod
    def numbers(self) -> int:
        """Numbers that the inputs of one example take, when they are made."""

    @property
    def valid(self) -> Bool[Tensor, "N T"] | None:
        """Which positions there are in sequences of different lengths; None where all are."""
        return None

    @abstractmethod
    def take(self, examples: Examples) -> Self:
        """Return the use by some examples alone; the inputs are made for these."""

    def output_moment(self, groups: int) -> Float[Tensor, "groups d_out d_out"]:
        """Return sum_{n,t} g_t g_t^T, which is K-FAC's G."""
        return grouped_gram(rows_of(self.g).unflatten(-1, (groups, -1)))

    def output_lag(self) -> Float[Tensor, "d_out d_out"]:
        """Return sum_{n,t} g_{t+1} g_t^T."""
        return lag_product(self.g)


class DenseUse(Use):
    """A use whose inputs are vectors."""

    @property
    @abstractmethod
    def a(self) -> Float[Tensor, "N T d_in"]:
        """Inputs of the affine map, without the homogeneous coordinate, in float32 at least."""

    def moments(self, groups: int) -> InputMoments:
        """Return the sums over examples and positions that K-FAC's A is made of, without all inputs at once."""
        return moments_of_rows(rows_of(self.a).unflatten(-1, (groups, -1)))


@dataclass(frozen=True, eq=False)
class AffineUse(DenseUse):
    """One call of a module that is one affine map; both factors are made when first asked for.

    Attributes:
        rule: the rule of the module's class.
        module: the module.
        input: what the rule has kept of the call's arguments: a tensor, or a tuple with tensors in it.
        output_gradient: J^T v at the module's output.
    """

    rule: LayerRule
    module: nn.Module
    input: Any
    output_gradient: Tensor

    @cached_property
    def a(self) -> Float[Tensor, "N T d_in"]:
        """Inputs of the affine map, without the homogeneous coordinate, in float32 at least."""
        return at_least_float32(self.rule.inputs(self.module, detached(self.input)))

    @cached_property
    def g(self) -> Float[Tensor, "N T d_out"]:
        """Gradients of the affine map's outputs, in float32 at least."""
        return at_least_float32(self.rule.output_gradients(self.module, self.output_gradient.detach()))

    @property
    def examples(self) -> int:
        """N, as the output's gradient has it."""
        return self.output_gradient.shape[0]

    @cached_property
    def numbers(self) -> int:
        """Numbers of one example's inputs, as the rule foresees them."""
        return self.rule.input_numbers(self.module, self.input, self.output_gradient)

    def take(self, examples: Examples) -> AffineUse:
        """Return the use by some examples; inputs are made for these alone."""
        if examples == slice(0, self.examples):
            return self
        return AffineUse(self.rule, self.module, taken(self.input, examples), self.output_gradient[examples])

    def moments(self, groups: int) -> InputMoments:
        """Return the sums for A by the rule, which may know a way without the inputs themselves."""
        return self.rule.input_moments(self, groups)


@dataclass(frozen=True, eq=False)
class Gradients:
    """Output gradients that several uses have in common, and their moments, made once.

    Attributes:
        value: (N, T, d_out).
    """

    value: Float[Tensor, "N T d_out"]

    @cached_property
    def moment(self) -> Float[Tensor, "1 d_out d_out"]:
        """sum_{n,t} g_t g_t^T."""
        return grouped_gram(rows_of(self.value).unsqueeze(1))

    @cached_property
    def lag(self) -> Float[Tensor, "d_out d_out"]:
        """sum_{n,t} g_{t+1} g_t^T."""
        return lag_product(self.value)


@dataclass(frozen=True, eq=False)
class PositionUse(DenseUse):
    """A use whose factors are at hand, as those of the maps inside of a larger module.

    Attributes:
        inputs: (N, T, d_in); zero where there is no position.
        output_gradients: (N, T, d_out), or what holds them for several uses.
        valid: (N, T) which positions there are; None for all.
    """

    inputs: Float[Tensor, "N T d_in"]
    output_gradients: Float[Tensor, "N T d_out"] | Gradients
    valid: Bool[Tensor, "N T"] | None = None

    @property
    def a(self) -> Float[Tensor, "N T d_in"]:
        """The inputs, in float32 at least."""
        return at_least_float32(self.inputs.detach())

    @property
    def g(self) -> Float[Tensor, "N T d_out"]:
        """The output gradients, in float32 at least."""
        g = self.output_gradients
        return at_least_float32((g.value if isinstance(g, Gradients) else g).detach())

    @property
    def examples(self) -> int:
        """N."""
        return self.inputs.shape[0]

    @property
    def numbers(self) -> int:
        """Numbers of one example's inputs."""
        return self.inputs[0].numel()

    def take(self, examples: Examples) -> PositionUse:
        """Return the use by some examples."""
        if isinstance(examples, slice) and examples == slice(0, self.examples):
            return self
        valid = None if self.valid is None else self.valid[examples]
        return PositionUse(self.inputs[examples], self.g[examples], valid)

    def output_moment(self, groups: int) -> Float[Tensor, "groups d_out d_out"]:
        """Return sum_{n,t} g_t g_t^T, once for all uses with the same gradients."""
        g = self.output_gradients
        return g.moment if isinstance(g, Gradients) and groups == 1 else super().output_moment(groups)

    def output_lag(self) -> Float[Tensor, "d_out d_out"]:
        """Return sum_{n,t} g_{t+1} g_t^T, once for all uses with the same gradients."""
        g = self.output_gradients
        return g.lag if isinstance(g, Gradients) else super().output_lag()


@dataclass(frozen=True, eq=False)
class LookupUse(Use):
    """A use whose inputs are sparse: a_t = sum_s c_ts e(i_ts), e(i) the i-th unit vector of R^d_in; never one-hot.

    Attributes:
        indices: (N, T, S) the numbers i, S of them at each position.
        coefficients: (N, T, S) the numbers c; 0 leaves an index out.
        output_gradient: (N, T, d_out).
    """

    indices: Int[Tensor, "N T S"]
    coefficients: Float[Tensor, "N T S"]
    output_gradient: Float[Tensor, "N T d_out"]

    @property
    def g(self) -> Float[Tensor, "N T d_out"]:
        """Gradients of the looked-up rows, in float32 at least."""
        return at_least_float32(self.output_gradient.detach())

    @property
    def examples(self) -> int:
        """N."""
        return self.indices.shape[0]

    @property
    def numbers(self) -> int:
        """Indices of one example."""
        return self.indices[0].numel()

    def take(self, examples: Examples) -> LookupUse:
        """Return the use by some examples."""
        return LookupUse(self.indices[examples], self.coefficients[examples], self.output_gradient[examples])


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Sums over examples and positions of one group after another.

    Attributes:
        outer: (groups, d_in, d_in) sum of a a^T.
        total: (groups, d_in) sum of a.
        count: how many a; a tensor where this is not known without waiting for the device.
    """

    outer: Float[Tensor, "groups d_in d_in"]
    total: Float[Tensor, "groups d_in"]
    count: int | Float[Tensor, ""]

    def __add__(self, other: InputMoments) -> InputMoments:
        return InputMoments(self.outer + other.outer, self.total + other.total, self.count + other.count)


def moments_of_rows(rows: Float[Tensor, "R groups d_in"]) -> InputMoments:
    """Return the sums of given inputs."""
    return InputMoments(grouped_gram(rows), rows.sum(0), rows.shape[0])


def rows_of(x: Float[Tensor, "N T d"]) -> Float[Tensor, "N*T d"]:
    """Return the rows of all examples and positions, in the order in which they lie in memory where that can be."""
    return (x.transpose(0, 1) if x.stride(0) < x.stride(1) else x).flatten(0, 1)


def lag_product(x: Float[Tensor, "N T d"]) -> Float[Tensor, "d d"]:
    """Return sum_{n,t} x_{t+1} x_t^T."""
    return rows_of(x[:, 1:]).T @ rows_of(x[:, :-1])


def grouped_gram(rows: Float[Tensor, "R groups d"]) -> Float[Tensor, "groups d d"]:
    """Return X^T X for the rows X of every group."""
    if rows.shape[1] == 1:
        return gram(rows.squeeze(1)).unsqueeze(0)
    by_group = rows.transpose(0, 1)
    return by_group.transpose(1, 2) @ by_group


# Narrower blocks save more products (half of them in the limit) but run slower; measured on CPUs from 128 to 1024.
_BLOCK = 192


def gram(X: Float[Tensor, "R d"]) -> Float[Tensor, "d d"]:
    """Return X^T X, block row by block row of its lower triangle, mirrored: about (d + 192) / 2d of the products."""
    d = X.shape[1]
    if d <= 2 * _BLOCK:
        return X.T @ X
    result = X.new_empty(d, d)
    for start in range(0, d, _BLOCK):
        stop = min(start + _BLOCK, d)
        torch.mm(X[:, start:stop].T, X[:, :stop], out=result[start:stop, :stop])
        result[:start, start:stop] = result[start:stop, :start].T
    return result


def chunks_of(examples: int, numbers: int) -> Iterator[slice]:
    """Yield chunks of examples, each example with so many numbers, that hold at most 64 MiB in float32."""
    step = max(1, _CHUNK_NUMBERS // max(1, numbers))
    for start in range(0, examples, step):
        yield slice(start, min(start + step, examples))


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32 or, if it has more digits, as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a tensor, or of a tuple or list of tensors, of such again and of other things."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def detached(value: Any) -> Any:
    """Return what a rule has kept of a call, without graphs."""
    if isinstance(value, Tensor):
        return value.detach()
    return tuple(map(detached, value)) if isinstance(value, (tuple, list)) else value


def taken(value: Any, examples: Examples) -> Any:
    """Return what a rule has kept of a call for some examples: parts of its tensors, all else as it is."""
    if isinstance(value, Tensor):
        return value[examples]
    return tuple(taken(item, examples) for item in value) if isinstance(value, (tuple, list)) else value
