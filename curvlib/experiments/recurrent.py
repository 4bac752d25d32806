"""Recurrent networks and their initialisations.

Symbols: N sequences, T steps, H units, C outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.networks import Network, glorot
from curvlib.experiments.options import Bounds, check_options, option
from curvlib.experiments.sequence_layers import Entry, Exit

# Incoming recurrent connections of a unit in Martens's sparse initialisation.
_CONNECTIONS = 15


def orthogonal(layer: nn.RNNBase) -> None:
    """Draw orthogonal recurrent weights, Glorot's uniform weights of the inputs, and set zero biases.

    An orthogonal matrix keeps the length of what it multiplies, forwards and backwards, so that neither states nor
    gradients vanish or explode over the steps, apart from the activation (Saxe et al. 2014; Henaff et al. 2016). The
    blocks of an LSTM's four maps are drawn one by one.
    """
    for name, parameter in layer.named_parameters():
        if name.startswith("bias"):
            nn.init.zeros_(parameter)
            continue
        for block in parameter.split(layer.hidden_size):
            if name.startswith("weight_hh"):
                nn.init.orthogonal_(block)
            else:
                nn.init.xavier_uniform_(block)


def remembering(layer: nn.LSTM) -> None:
    """Initialise as :func:`orthogonal` does, with a bias of 1 at the forget gates: an LSTM that keeps its memory.

    At a bias of 0, half of the memory is lost at every step (Gers et al. 2000; Jozefowicz et al. 2015). PyTorch has two
    biases that are added; the one of the inputs gets the 1.
    """
    orthogonal(layer)
    with torch.no_grad():
        dict(layer.named_parameters())["bias_ih_l0"][layer.hidden_size : 2 * layer.hidden_size] = 1.0


def sparse_recurrent(layer: nn.RNN) -> None:
    """Give every unit 15 incoming recurrent N(0, 1) weights, scaled to a spectral radius of 1, and zero biases.

    This is Martens's sparse initialisation (2010, sec. 5), which Martens and Sutskever (2011) use for recurrent
    networks too, with a fixed spectral radius as in Sutskever et al. (2013): it makes the memory the same for every
    number of units. The weights of the inputs are from N(0, 1), as in the first two. Departure: the radius of the
    third is 1.1, with small weights of the inputs; Adam, without clipped gradients, learned far more slowly from there.
    """
    size = layer.hidden_size
    connections = min(_CONNECTIONS, size)
    chosen = torch.rand(size, size).topk(connections, dim=1).indices
    weight = torch.zeros(size, size).scatter_(1, chosen, torch.randn(size, connections))
    radius = torch.linalg.eigvals(weight).abs().max()
    parameters = dict(layer.named_parameters())
    with torch.no_grad():
        parameters["weight_hh_l0"].copy_(weight / radius)
        parameters["weight_ih_l0"].normal_()
        parameters["bias_ih_l0"].zero_()
        parameters["bias_hh_l0"].zero_()


@dataclass(frozen=True, kw_only=True, repr=False)
class Recurrent(Network):
    """One recurrent layer, read out by a linear one.

    Args:
        entry: how examples become sequences of numbers.
        cell: class of the recurrent layer, :class:`torch.nn.RNN` (with tanh), :class:`torch.nn.LSTM` or
            :class:`torch.nn.GRU`.
        outputs: C, None where they are the symbols of an alphabet that the data decide.
        exit: where answers are read.
        initialise: draws the parameters of the recurrent layer from PyTorch's global generator; those of the read-out
            are Glorot's.
        units: of the recurrent layer, H.
    """

    entry: Entry
    cell: Callable[..., nn.RNNBase]
    outputs: int | None
    exit: Exit
    initialise: Callable[[Any], None] = orthogonal
    units: int = option(128, "units of the recurrent layer", Bounds(at_least=1))

    def __post_init__(self) -> None:
        check_options("problem", self)
        if self.outputs is not None and self.outputs < 1:
            raise ExperimentError(f"outputs must be at least 1, got {self.outputs}.")

    def for_symbols(self, symbols: int) -> Recurrent:
        """Return the network that takes and gives the symbols of an alphabet.

        Raises:
            ExperimentError: the entry takes no symbols, or C is fixed.
        """
        if self.outputs is not None:
            raise ExperimentError(f"outputs is fixed at {self.outputs}: leave it None for the {symbols} of the data.")
        return dataclasses.replace(self, entry=self.entry.for_symbols(symbols), outputs=symbols)

    def build(self) -> nn.Sequential:
        """Return a freshly initialised network on the CPU.

        Raises:
            ExperimentError: the size of the alphabet is not known yet.
        """
        if self.outputs is None:
            raise ExperimentError("The data decide the number of outputs: use network.for_symbols(loaded.symbols).")
        layer = self.cell(self.entry.features, self.units, batch_first=True)
        self.initialise(layer)
        readout = nn.Linear(self.units, self.outputs)
        glorot(readout)
        return nn.Sequential(self.entry.build(), layer, *self.exit.build(readout))

    @property
    def parameters(self) -> int | None:
        """D, the number of weights and biases, None where the data decide it."""
        if self.outputs is None or self.entry.parameters is None:
            return None
        with torch.device("meta"):
            layer = self.cell(self.entry.features, self.units, batch_first=True)
        recurrent = sum(parameter.numel() for parameter in layer.parameters())
        return self.entry.parameters + recurrent + (self.units + 1) * self.outputs

    def __str__(self) -> str:
        outputs = "the symbols" if self.outputs is None else self.outputs
        cell = getattr(self.cell, "__name__", repr(self.cell))
        return f"{self.entry}, {cell} of {self.units}, {outputs} {self.exit}"
