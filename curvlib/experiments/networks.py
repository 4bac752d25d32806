"""Networks, fully connected and convolutional, and their initialisations.

A new kind of network is one subclass of :class:`Network`.
"""

from __future__ import annotations

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from curvlib.experiments.errors import ExperimentError

# Incoming connections of a unit in Martens's sparse initialisation.
_CONNECTIONS = 15


def glorot(layer: nn.Linear | nn.Conv2d) -> None:
    """Draw uniform weights of variance 2 / (d_in + d_out) and set zero biases (Glorot and Bengio 2010).

    d_in and d_out are the connections into and out of a unit, all positions of a kernel included.
    """
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def kaiming(layer: nn.Linear | nn.Conv2d) -> None:
    """Draw normal weights of variance 2 / d_in and set zero biases (He et al. 2015), for rectified units.

    d_in is the connections into a unit, all positions of a kernel included.
    """
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def sparse(layer: nn.Linear) -> None:
    """Give every unit 15 incoming N(0, 1) weights, all others and the biases zero (Martens 2010, sec. 5)."""
    connections = min(_CONNECTIONS, layer.in_features)
    chosen = torch.rand(layer.out_features, layer.in_features).topk(connections, dim=1).indices
    with torch.no_grad():
        layer.weight.zero_().scatter_(1, chosen, torch.randn(layer.out_features, connections))
        layer.bias.zero_()


@dataclass(frozen=True, kw_only=True, repr=False)
class Network(ABC):
    """Description of a network that takes N examples, rows of numbers (N, d_in) or others, and gives (N, C, ...).

    A subclass is a dataclass with ``repr=False``: the inherited ``repr`` gives the values of all fields and is the same
    in every process.
    """

    @abstractmethod
    def build(self) -> nn.Module:
        """Return a freshly initialised network on the CPU, drawn from PyTorch's global generator."""

    def for_symbols(self, symbols: int) -> Network:
        """Return the network for data that decide the size of their alphabet.

        Raises:
            ExperimentError: this network takes no symbols.
        """
        raise ExperimentError(f"{self!r} takes no symbols, and the data have an alphabet of {symbols}: use Recurrent.")

    @property
    @abstractmethod
    def parameters(self) -> int | None:
        """D, the number of parameters that are trained, None where the data decide it."""

    def __repr__(self) -> str:
        # Functions by name: their own repr holds an address, which differs from process to process.
        values = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        texts = [f"{name}={getattr(value, '__name__', repr(value))}" for name, value in values]
        return f"{type(self).__name__}({', '.join(texts)})"

    @abstractmethod
    def __str__(self) -> str:
        """Return the layers in a few characters."""


@dataclass(frozen=True, kw_only=True, repr=False)
class FullyConnected(Network):
    """A chain of linear layers with one activation function between them; the last layer gives logits.

    Args:
        widths: units of every layer, input first.
        activation: class of the activation, made anew for every layer.
        initialise: draws the parameters of one linear layer from PyTorch's global generator.
        linear_layers: numbers of the layers (the input is layer 0) without an activation, such as the code layer of an
            auto-encoder.
    """

    widths: tuple[int, ...]
    activation: Callable[[], nn.Module]
    initialise: Callable[[nn.Linear], None] = glorot
    linear_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ExperimentError(f"widths needs at least two positive numbers of units, got {self.widths}.")

    def build(self) -> nn.Sequential:
        """Return a freshly initialised network on the CPU."""
        modules: list[nn.Module] = []
        last = len(self.widths) - 1
        for number in range(1, last + 1):
            layer = nn.Linear(self.widths[number - 1], self.widths[number])
            self.initialise(layer)
            modules.append(layer)
            if number != last and number not in self.linear_layers:
                modules.append(self.activation())
        return nn.Sequential(*modules)

    @property
    def parameters(self) -> int:
        """D, the number of weights and biases."""
        return _linear_parameters(self.widths)

    def __str__(self) -> str:
        return "-".join(map(str, self.widths))


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A layer of square kernels on images.

    Args:
        channels: of the output.
        kernel: side of the kernel in pixels.
        stride: pixels from one position of the kernel to the next.
        padding: zeros around the image on every side.
    """

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0

    def __post_init__(self) -> None:
        if min(self.channels, self.kernel, self.stride, self.padding + 1) < 1:
            raise ExperimentError(
                f"channels, kernel and stride of a convolution must be at least 1 and padding at least 0, got {self!r}."
            )

    def output_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return (channels, height, width) of the output for those of the input."""
        height, width = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in shape[1:])
        return self.channels, height, width

    def __str__(self) -> str:
        return f"{self.channels}@{self.kernel}x{self.kernel}" + (f"/{self.stride}" if self.stride > 1 else "")


@dataclass(frozen=True, kw_only=True, repr=False)
class Convolutional(Network):
    """Convolutions, then linear layers, with one activation function between all of them; the last layer gives logits.

    The network takes images as rows of pixels.

    Args:
        image: (channels, height, width) of the input.
        convolutions: the convolutional layers.
        widths: units of the linear layers after them, the last ones the logits.
        activation: class of the activation, made anew for every layer.
        initialise: draws the parameters of one layer from PyTorch's global generator.
    """

    image: tuple[int, int, int]
    convolutions: tuple[Convolution, ...]
    widths: tuple[int, ...]
    activation: Callable[[], nn.Module]
    initialise: Callable[[nn.Linear | nn.Conv2d], None] = glorot

    def __post_init__(self) -> None:
        if not self.convolutions:
            raise ExperimentError("convolutions needs at least one layer: use FullyConnected for a network without.")
        if not self.widths or min(self.widths) < 1:
            raise ExperimentError(f"widths needs at least one positive number of units, got {self.widths}.")
        for number, shape in enumerate(self._shapes):
            if min(shape) < 1:
                raise ExperimentError(
                    f"The input of layer {number + 1} would have (channels, height, width) = {shape}: choose a larger "
                    "image, smaller kernels or strides, or more padding."
                )

    def build(self) -> nn.Sequential:
        """Return a freshly initialised network on the CPU."""
        layers: list[nn.Linear | nn.Conv2d] = [
            nn.Conv2d(shape[0], layer.channels, layer.kernel, stride=layer.stride, padding=layer.padding)
            for shape, layer in zip(self._shapes, self.convolutions, strict=False)
        ]
        layers += [nn.Linear(d_in, d_out) for d_in, d_out in itertools.pairwise(self._linear_widths)]
        modules: list[nn.Module] = [nn.Unflatten(1, self.image)]
        for number, layer in enumerate(layers):
            self.initialise(layer)
            if number == len(self.convolutions):
                modules.append(nn.Flatten())
            modules += [layer, self.activation()]
        return nn.Sequential(*modules[:-1])

    @property
    def parameters(self) -> int:
        """D, the number of weights and biases."""
        convolutions = sum(
            (shape[0] * layer.kernel**2 + 1) * layer.channels
            for shape, layer in zip(self._shapes, self.convolutions, strict=False)
        )
        return convolutions + _linear_parameters(self._linear_widths)

    def __str__(self) -> str:
        """Return the sizes: an image 1x28x28, layers of 16 kernels of 5x5 at a stride of 2 as 16@5x5/2, and units."""
        return "-".join(["x".join(map(str, self.image)), *map(str, self.convolutions), *map(str, self.widths)])

    @property
    def _shapes(self) -> list[tuple[int, int, int]]:
        """(channels, height, width) of the image and of the output of every convolution."""
        shapes = [self.image]
        for layer in self.convolutions:
            shapes.append(layer.output_shape(shapes[-1]))
        return shapes

    @property
    def _linear_widths(self) -> tuple[int, ...]:
        """Units of the linear layers, the numbers that they take first."""
        return prod(self._shapes[-1]), *self.widths


def _linear_parameters(widths: tuple[int, ...]) -> int:
    return sum((d_in + 1) * d_out for d_in, d_out in itertools.pairwise(widths))
