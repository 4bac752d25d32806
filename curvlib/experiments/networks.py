"""Fully connected networks and their initialisations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from curvlib.experiments.errors import ExperimentError

# Incoming connections of a unit in Martens's sparse initialisation.
_CONNECTIONS = 15


def glorot(layer: nn.Linear) -> None:
    """Draw uniform weights of variance 2 / (d_in + d_out) and set zero biases (Glorot and Bengio 2010)."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)


def kaiming(layer: nn.Linear) -> None:
    """Draw normal weights of variance 2 / d_in and set zero biases (He et al. 2015), for rectified units."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)


def sparse(layer: nn.Linear) -> None:
    """Give every unit 15 incoming N(0, 1) weights, all others and the biases zero (Martens 2010, sec. 5)."""
    connections = min(_CONNECTIONS, layer.in_features)
    chosen = torch.rand(layer.out_features, layer.in_features).topk(connections, dim=1).indices
    with torch.no_grad():
        layer.weight.zero_().scatter_(1, chosen, torch.randn(layer.out_features, connections))
        layer.bias.zero_()


@dataclass(frozen=True, kw_only=True)
class FullyConnected:
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
        return sum((d_in + 1) * d_out for d_in, d_out in zip(self.widths, self.widths[1:], strict=False))

    def __repr__(self) -> str:
        # Functions by name: their own repr holds an address, which differs from process to process.
        activation, initialise = (getattr(f, "__name__", repr(f)) for f in (self.activation, self.initialise))
        return (
            f"FullyConnected(widths={self.widths}, activation={activation}, initialise={initialise}, "
            f"linear_layers={self.linear_layers})"
        )

    def __str__(self) -> str:
        return "-".join(map(str, self.widths))
