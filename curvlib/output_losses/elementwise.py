"""Losses that are a sum over elements, and the two most used: squared error and binary cross-entropy.

Symbols: z outputs (N, *O), y targets of the same shape; l(z, y) loss of one element; h = d^2 l / dz^2; c the factor of
the reduction, 1 / (number of elements) for a mean.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from curvlib.output_losses.base import OutputLoss, Product, output_loss, refuse_changed_forward
from curvlib.output_losses.tensors import (
    broadcasts_to,
    check_generator,
    check_tensor,
    full_scalar,
    on_host,
    standard_normal,
    working_precision,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class ElementwiseLoss(OutputLoss):
    """A loss L = c sum_i l(z_i, y_i) over elements, so that H = c diag(h).

    A subclass gives ``value``, :meth:`second_derivative` and :meth:`draw_derivative`. The targets have the outputs'
    shape: broadcasting, which PyTorch only warns about, is refused.
    """

    @abstractmethod
    def second_derivative(self, outputs: Float[Tensor, "N *O"], targets: Any) -> Float[Tensor, "N *O"]:
        """Return h >= 0 of every element, without c; outputs come without a graph and in float32 at least."""

    @abstractmethod
    def draw_derivative(
        self, outputs: Float[Tensor, "N *O"], targets: Any, generator: torch.Generator | None
    ) -> Float[Tensor, "N *O"]:
        """Return dl/dz of every element, without c, at labels drawn from the model (weights: as square roots)."""

    def check(self, outputs: Float[Tensor, "N *O"], targets: Any) -> None:
        """Raise for targets that are not a floating-point tensor of the outputs' shape and device."""
        super().check(outputs, targets)
        self.check_same_shape(outputs, targets)

    def normalizer(self, outputs: Float[Tensor, "N *O"], targets: Any) -> Float[Tensor, ""]:
        """Return the number of elements."""
        return full_scalar(outputs, outputs.numel())

    def linearize(self, outputs: Float[Tensor, "N *O"], targets: Any) -> Product:
        """Return V -> c h V."""
        diagonal = self._diagonal(outputs, targets)

        def product(V: Tensor) -> Tensor:
            return diagonal * V.detach()

        return product

    @torch.no_grad()
    def hessian_sqrt(self, outputs: Float[Tensor, "N *O"], targets: Any) -> Iterator[Float[Tensor, "N *O"]]:
        """Yield sqrt(c h_k) e_k for every element k of an example."""
        root = self._diagonal(outputs, targets).sqrt().reshape(outputs.shape[0], -1)
        for k in range(root.shape[1]):
            v = torch.zeros_like(root)
            v[:, k] = root[:, k]
            yield v.reshape(outputs.shape)

    @torch.no_grad()
    def sample_gradient(
        self, outputs: Float[Tensor, "N *O"], targets: Any, generator: torch.Generator | None = None
    ) -> Float[Tensor, "N *O"]:
        """Return sqrt(c) dl/dz at labels drawn from the model."""
        check_generator(outputs, generator)
        z = working_precision(outputs.detach())
        return self.draw_derivative(z, targets, generator) * self.scale(z, targets).sqrt()

    @torch.no_grad()
    def _diagonal(self, outputs: Tensor, targets: Any) -> Tensor:
        z = working_precision(outputs.detach())
        return self.second_derivative(z, targets) * self.scale(z, targets)

    def check_same_shape(self, outputs: Float[Tensor, "N *O"], targets: object) -> None:
        """Raise unless the targets are a floating-point tensor of the outputs' shape and device."""
        name = f"targets of {type(self).__name__}"
        targets = check_tensor(name, targets, outputs)
        if not targets.is_floating_point():
            raise TypeError(
                f"{name} must be floating point, got {targets.dtype}: convert them with targets.to(outputs.dtype)."
            )
        if targets.shape != outputs.shape:
            raise ValueError(
                f"{name} must have the outputs' shape {tuple(outputs.shape)}, got {tuple(targets.shape)}: reshape or "
                f"expand them, nothing is broadcast."
            )

    def check_range(self, targets: Float[Tensor, "N *O"], lowest: float, highest: float) -> None:
        """Raise ValueError for targets outside [lowest, highest]; not on a device, where that would wait for it."""
        if on_host(targets) and bool(((targets < lowest) | (targets > highest)).any()):
            raise ValueError(
                f"targets of {type(self).__name__} must be in [{lowest:g}, {highest:g}], got {float(targets.min()):g} "
                f"... {float(targets.max()):g}."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class MSE(ElementwiseLoss):
    """Squared error, l = (z - y)^2 and h = 2, as ``torch.nn.MSELoss``.

    As a negative log-likelihood it is a Gaussian of variance 1/2, from which labels are drawn.
    """

    def value(self, outputs: Float[Tensor, "N *O"], targets: Float[Tensor, "N *O"]) -> Float[Tensor, ""]:
        """Return the mean or the sum of (z - y)^2."""
        z = working_precision(outputs)
        return functional.mse_loss(z, targets.to(z.dtype), reduction=self.reduction)

    def second_derivative(self, outputs: Float[Tensor, "N *O"], targets: Any) -> Float[Tensor, "N *O"]:
        """Return 2."""
        return torch.full_like(outputs, 2.0)

    def draw_derivative(
        self, outputs: Float[Tensor, "N *O"], targets: Any, generator: torch.Generator | None
    ) -> Float[Tensor, "N *O"]:
        """Return 2 (z - y), y ~ N(z, 1/2)."""
        return math.sqrt(2.0) * standard_normal(outputs, generator)


@dataclass(frozen=True, kw_only=True, eq=False)
class BCEWithLogits(ElementwiseLoss):
    r"""Binary cross-entropy of logits, as ``torch.nn.BCEWithLogitsLoss``.

    l = -w (b y log s + (1 - y) log(1 - s)) with s = sigmoid(z).

    h = k s (1 - s) with k = w (1 + (b - 1) y): both weights count as a number of observations k of the element, which
    the training target y decides; labels are then drawn as y ~ Bernoulli(s), dl/dz = sqrt(k) (s - y).

    Attributes:
        weight: w, broadcastable to the outputs, not negative, or None.
        pos_weight: b, broadcastable to the outputs, not negative, or None.

    Raises:
        ValueError: a weight is negative.
    """

    weight: Float[Tensor, "..."] | None = None
    pos_weight: Float[Tensor, "..."] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, weight in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if weight is not None and bool((weight < 0).any()):
                raise ValueError(
                    f"{name} of BCEWithLogits must not be negative, got {float(weight.min())}: it makes the loss "
                    "concave."
                )

    def check(self, outputs: Float[Tensor, "N *O"], targets: Float[Tensor, "N *O"]) -> None:
        """Raise for targets that are no probabilities of the outputs' shape, or weights that do not broadcast to it."""
        super().check(outputs, targets)
        for name, weight in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if weight is None:
                continue
            check_tensor(f"{name} of BCEWithLogits", weight, outputs)
            if not broadcasts_to(weight, outputs):
                raise ValueError(
                    f"{name} of BCEWithLogits must broadcast to the outputs' shape {tuple(outputs.shape)}, got "
                    f"{tuple(weight.shape)}."
                )
        self.check_range(targets, 0.0, 1.0)

    def value(self, outputs: Float[Tensor, "N *O"], targets: Float[Tensor, "N *O"]) -> Float[Tensor, ""]:
        """Return the weighted binary cross-entropy."""
        z = working_precision(outputs)
        return functional.binary_cross_entropy_with_logits(
            z,
            targets.to(z.dtype),
            _cast(self.weight, z),
            reduction=self.reduction,
            pos_weight=_cast(self.pos_weight, z),
        )

    def second_derivative(
        self, outputs: Float[Tensor, "N *O"], targets: Float[Tensor, "N *O"]
    ) -> Float[Tensor, "N *O"]:
        """Return k s (1 - s)."""
        # sigmoid(-z) is 1 - s without its cancellation for large z
        return self._observations(outputs, targets) * outputs.sigmoid() * (-outputs).sigmoid()

    def draw_derivative(
        self, outputs: Float[Tensor, "N *O"], targets: Float[Tensor, "N *O"], generator: torch.Generator | None
    ) -> Float[Tensor, "N *O"]:
        """Return sqrt(k) (s - y), y ~ Bernoulli(s)."""
        s = outputs.sigmoid()
        return self._observations(outputs, targets).sqrt() * (s - torch.bernoulli(s, generator=generator))

    def _observations(self, outputs: Tensor, targets: Tensor) -> Tensor:
        k = torch.ones_like(outputs)
        if self.pos_weight is not None:
            k = k + (self.pos_weight.to(k.dtype) - 1) * targets.to(k.dtype)
        return k if self.weight is None else k * self.weight.to(k.dtype)


@output_loss.register
def _(loss: nn.MSELoss) -> OutputLoss:
    refuse_changed_forward(loss, nn.MSELoss)
    return MSE(reduction=loss.reduction)  # type: ignore[arg-type]


@output_loss.register
def _(loss: nn.BCEWithLogitsLoss) -> OutputLoss:
    refuse_changed_forward(loss, nn.BCEWithLogitsLoss)
    return BCEWithLogits(
        weight=loss.weight,
        pos_weight=loss.pos_weight,
        reduction=loss.reduction,  # type: ignore[arg-type]
    )


def _cast(weight: Tensor | None, z: Tensor) -> Tensor | None:
    return None if weight is None else weight.detach().to(z.dtype)
