"""The networks and batches that everything is measured on.

Symbols: N examples; a gradient is one forward pass, the loss, and one backward pass to all parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from curvlib import Objective


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """One subject's own model and the batch; nobody else puts hooks on the model.

    Attributes:
        model: the network.
        loss: the loss module.
        inputs: (N, ...).
        targets: what the loss takes.
    """

    model: nn.Module
    loss: nn.Module
    inputs: Shaped[Tensor, "N ..."]
    targets: Shaped[Tensor, "N ..."]

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets)."""
        return self.inputs, self.targets

    @property
    def objective(self) -> Objective:
        """The objective of the model and the loss."""
        return Objective(self.model, self.loss)

    @property
    def size(self) -> int:
        """D, the number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def gradient(self) -> tuple[Tensor, ...]:
        """Return one plain gradient, as PyTorch alone computes it: what all ratios refer to."""
        value = self.loss(self.model(self.inputs), self.targets)
        return torch.autograd.grad(value, list(self.model.parameters()))

    def first(self, examples: int) -> tuple[Tensor, Tensor]:
        """Return the first examples of the batch."""
        return self.inputs[:examples], self.targets[:examples]

    def vectors(self, columns: int) -> Shaped[Tensor, "D K"]:
        """Return normal random vectors in parameter space, in columns."""
        generator = torch.Generator(self.inputs.device).manual_seed(1)
        return torch.randn(self.size, columns, device=self.inputs.device, generator=generator)


class Problem(ABC):
    """A network and a random batch, in float32; ``str()`` describes it.

    Attributes:
        name: as it appears in the report.
    """

    name: str

    @abstractmethod
    def workload(self, device: torch.device) -> Workload:
        """Return the batch and a model of its own, the same numbers at every call."""

    @abstractmethod
    def tiny(self) -> Problem:
        """Return the same problem with few units and examples, to try the code out."""


@dataclass(frozen=True, kw_only=True)
class Chain(Problem):
    """A fully connected network with tanh units.

    Args:
        name: as it appears in the report.
        widths: units of every layer, input first.
        examples: N.
        classification: cross-entropy on random labels; otherwise the squared error of reconstructing the inputs.
        linear_layers: numbers of the layers (the input is layer 0) without tanh.
    """

    name: str
    widths: tuple[int, ...]
    examples: int
    classification: bool
    linear_layers: tuple[int, ...] = ()

    def workload(self, device: torch.device) -> Workload:
        """Return the batch and a model of its own."""
        torch.manual_seed(0)
        inputs = torch.rand(self.examples, self.widths[0])
        labels = torch.randint(self.widths[-1], (self.examples,))
        model = self._model().to(device)
        inputs = inputs.to(device)
        if self.classification:
            return Workload(model=model, loss=nn.CrossEntropyLoss(), inputs=inputs, targets=labels.to(device))
        return Workload(model=model, loss=nn.MSELoss(), inputs=inputs, targets=inputs)

    def tiny(self) -> Chain:
        """Return the same problem with at most 8 units a layer and 16 examples."""
        widths = tuple(min(width, 8) for width in self.widths)
        return Chain(
            name=f"{self.name} (tiny)",
            widths=widths,
            examples=min(self.examples, 16),
            classification=self.classification,
            linear_layers=self.linear_layers,
        )

    def __str__(self) -> str:
        loss = "cross-entropy" if self.classification else "squared error"
        return f"{self.name}: {'-'.join(map(str, self.widths))}, tanh, {loss}, N = {self.examples}, float32"

    def _model(self) -> nn.Sequential:
        modules: list[nn.Module] = []
        last = len(self.widths) - 1
        for number in range(1, last + 1):
            modules.append(nn.Linear(self.widths[number - 1], self.widths[number]))
            if number != last and number not in self.linear_layers:
                modules.append(nn.Tanh())
        return nn.Sequential(*modules)


AUTOENCODER = Chain(
    name="auto-encoder",
    widths=(784, 1000, 500, 250, 30, 250, 500, 1000, 784),
    examples=1000,
    classification=False,
    linear_layers=(4,),
)
SMALL_NETWORK = Chain(name="small network", widths=(20, 32, 32, 10), examples=64, classification=True)
