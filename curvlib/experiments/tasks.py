"""What a network is trained to do: targets, loss and the number that is reported. Here the tasks on images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.images import Images
from curvlib.experiments.sources import Data

D = TypeVar("D", bound=Data)


class Metric(ABC):
    """A number that tells a practitioner how good a network is."""

    name: str
    description: str
    higher_is_better: bool

    @abstractmethod
    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, ""]:
        """Return the mean over the examples."""


class SquaredErrorPerImage(Metric):
    """Squared distance of an image and its reconstruction, (1/N) sum_n |sigmoid(z_n) - x_n|^2."""

    name = "squared error per image"
    description = "squared distance of an image and its reconstruction"
    higher_is_better = False

    def __call__(self, outputs: Float[Tensor, "N C"], targets: Float[Tensor, "N C"]) -> Float[Tensor, ""]:
        """Return the mean over the images."""
        return (outputs.sigmoid() - targets).square().sum(dim=1).mean()


class Accuracy(Metric):
    """Share of the examples whose largest output is that of their class, between 0 and 1."""

    name = "accuracy"
    description = "share of the images that are recognised"
    higher_is_better = True

    def __call__(self, outputs: Float[Tensor, "N C"], targets: Int[Tensor, " N"]) -> Float[Tensor, ""]:
        """Return the share."""
        return (outputs.argmax(dim=1) == targets).to(outputs.dtype).mean()


class Task(ABC, Generic[D]):
    """Targets, loss and metric of a problem."""

    metric: Metric
    loss_name: str

    @abstractmethod
    def targets(self, data: D) -> Tensor:
        """Return what the network should answer, one row an example."""

    @abstractmethod
    def loss(self, data: D) -> nn.Module:
        """Return the loss module, whose mean is over examples."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Task[Images]):
    """Auto-encoder: the image itself, pixel-wise cross-entropy summed over pixels and averaged over images."""

    metric = SquaredErrorPerImage()
    loss_name = "pixel cross-entropy"

    def targets(self, data: Images) -> Float[Tensor, "N pixels"]:
        """Return the pixels."""
        return data.pixels

    def loss(self, data: Images) -> nn.Module:
        """Return a binary cross-entropy on logits.

        Its mean is over all N x pixels entries; the weight turns the mean over pixels into their sum.
        """
        return nn.BCEWithLogitsLoss(weight=torch.tensor(float(data.pixels.shape[1])))


@dataclass(frozen=True, kw_only=True)
class Classification(Task[Images]):
    """Classifier: the label, cross-entropy averaged over images."""

    metric = Accuracy()
    loss_name = "cross-entropy"

    def targets(self, data: Images) -> Int[Tensor, " N"]:
        """Return the class numbers.

        Raises:
            ExperimentError: the images have no labels.
        """
        if data.labels is None:
            raise ExperimentError("Classification needs labelled images, and these have none: use Reconstruction.")
        return data.labels

    def loss(self, data: Images) -> nn.Module:
        """Return a cross-entropy."""
        del data
        return nn.CrossEntropyLoss()
