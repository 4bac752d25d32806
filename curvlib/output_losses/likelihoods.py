"""Gaussian and Poisson negative log-likelihoods.

Symbols: z outputs (N, *O), y targets of the same shape; l(z, y) loss of one element; h = d^2 l / dz^2; v variance; r
rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from curvlib.output_losses.base import OutputLoss, output_loss, refuse_changed_forward
from curvlib.output_losses.elementwise import ElementwiseLoss
from curvlib.output_losses.tensors import broadcasts_to, check_tensor, on_host, standard_normal, working_precision


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussianNLL(ElementwiseLoss):
    r"""Gaussian with a given variance, l = 1/2 (log v + (z - y)^2 / v), h = 1/v, as ``torch.nn.GaussianNLLLoss``.

    The targets are the pair (target, variance): target has the outputs' shape; variance is a number, or a tensor of
    the outputs' shape, of that shape without its last dimension, or with one dimension of size 1. A variance that the
    model predicts is not supported: its curvature is not that of an element.

    Attributes:
        full: add 1/2 log(2 pi).
        eps: lower bound of v.

    Raises:
        ValueError: eps is not positive.
    """

    full: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eps > 0:
            raise ValueError(f"eps of GaussianNLL must be positive, got {self.eps}.")

    def check(self, outputs: Float[Tensor, "N *O"], targets: tuple[Tensor, Tensor | float]) -> None:
        """Raise for targets that are not a pair (target, variance) of the right shapes, or a negative variance."""
        OutputLoss.check(self, outputs, targets)
        if not isinstance(targets, (tuple, list)) or len(targets) != 2:
            raise TypeError(
                f"targets of GaussianNLL must be the pair (target, variance), got {type(targets).__name__}."
            )
        target, variance = targets
        self.check_same_shape(outputs, target)
        if not isinstance(variance, (float, int)):
            self._check_variance_tensor(outputs, variance)
            if not on_host(variance):
                return
        if float(torch.as_tensor(variance).min()) < 0:
            raise ValueError(f"variance of GaussianNLL must not be negative, got {variance}: pass sigma^2.")

    def value(self, outputs: Float[Tensor, "N *O"], targets: tuple[Tensor, Tensor | float]) -> Float[Tensor, ""]:
        """Return the Gaussian negative log-likelihood; written out, since PyTorch's waits for the device."""
        z = working_precision(outputs)
        variance = self._variance(z, targets)
        losses = 0.5 * (variance.log() + (z - targets[0].to(z.dtype)).square() / variance)
        if self.full:
            losses = losses + 0.5 * math.log(2 * math.pi)
        return losses.sum() if self.additive else losses.mean()

    def second_derivative(
        self, outputs: Float[Tensor, "N *O"], targets: tuple[Tensor, Tensor | float]
    ) -> Float[Tensor, "N *O"]:
        """Return 1/v."""
        return self._variance(outputs, targets).reciprocal()

    def draw_derivative(
        self,
        outputs: Float[Tensor, "N *O"],
        targets: tuple[Tensor, Tensor | float],
        generator: torch.Generator | None,
    ) -> Float[Tensor, "N *O"]:
        """Return (z - y) / v, y ~ N(z, v)."""
        return standard_normal(outputs, generator) * self._variance(outputs, targets).rsqrt()

    def _variance(self, z: Tensor, targets: tuple[Tensor, Tensor | float]) -> Tensor:
        """Return the variance of every element, bounded below."""
        variance = targets[1]
        if not isinstance(variance, Tensor):
            return torch.full_like(z, max(float(variance), self.eps))
        variance = variance.detach().to(z.dtype).clamp(min=self.eps)
        if variance.ndim == z.ndim - 1:
            variance = variance.unsqueeze(-1)
        return variance.expand(z.shape)

    @staticmethod
    def _check_variance_tensor(outputs: Tensor, variance: object) -> None:
        variance = check_tensor("variance of GaussianNLL", variance, outputs)
        shape = tuple(outputs.shape)
        one_of_size_1 = variance.ndim == outputs.ndim and broadcasts_to(variance, outputs)
        mismatches = sum(a != b for a, b in zip(variance.shape, shape, strict=False))
        if not (variance.shape == shape[:-1] or (one_of_size_1 and mismatches <= 1)):
            raise ValueError(
                f"variance of GaussianNLL must have shape {shape}, {shape[:-1]}, or the first with one dimension of "
                f"size 1, got {tuple(variance.shape)}."
            )
        if variance.requires_grad:
            raise ValueError(
                "variance of GaussianNLL must be given, not predicted, but it requires a gradient: detach it, or "
                "subclass OutputLoss for a model that outputs mean and variance."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class PoissonNLL(ElementwiseLoss):
    r"""Poisson counts y with rate r, l = r - y log r, as ``torch.nn.PoissonNLLLoss``.

    * ``log_input=True``: r = exp(z) and h = r, the natural parameter: the Fisher is the GGN.
    * ``log_input=False``: l = z - y log(z + eps), h = y / (z + eps)^2. The GGN depends on the training target. Draws
      come from the rate r = z + eps (of which l is the likelihood up to a constant) with dl/dz = 1 - y/r; their
      second moment, the Fisher, is 1/r: another matrix, equal to the GGN in expectation over y ~ Poisson(r) only.

    Attributes:
        log_input: whether z is the logarithm of the rate.
        full: add Stirling's approximation of log y! where y > 1; constant in z.
        eps: offset of the rate for ``log_input=False``.

    Raises:
        ValueError: eps is not positive.
    """

    log_input: bool = True
    full: bool = False
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eps > 0:
            raise ValueError(f"eps of PoissonNLL must be positive, got {self.eps}.")

    def check(self, outputs: Float[Tensor, "N *O"], targets: Float[Tensor, "N *O"]) -> None:
        """Raise for negative counts, or rates that are not positive."""
        super().check(outputs, targets)
        self.check_range(targets, 0.0, math.inf)
        if on_host(outputs) and not self.log_input and bool((outputs + self.eps <= 0).any()):
            raise ValueError(
                f"outputs of PoissonNLL with log_input=False must be rates > -eps, got {float(outputs.min()):g}: let "
                f"the model end in nn.Softplus(), or use log_input=True."
            )

    def value(self, outputs: Float[Tensor, "N *O"], targets: Float[Tensor, "N *O"]) -> Float[Tensor, ""]:
        """Return the Poisson negative log-likelihood."""
        z = working_precision(outputs)
        return functional.poisson_nll_loss(
            z, targets.to(z.dtype), log_input=self.log_input, full=self.full, eps=self.eps, reduction=self.reduction
        )

    def second_derivative(
        self, outputs: Float[Tensor, "N *O"], targets: Float[Tensor, "N *O"]
    ) -> Float[Tensor, "N *O"]:
        """Return exp(z), or y / (z + eps)^2."""
        return outputs.exp() if self.log_input else targets.to(outputs.dtype) / (outputs + self.eps).square()

    def draw_derivative(
        self, outputs: Float[Tensor, "N *O"], targets: Any, generator: torch.Generator | None
    ) -> Float[Tensor, "N *O"]:
        """Return r - y, or 1 - y/r, y ~ Poisson(r)."""
        rate = outputs.exp() if self.log_input else outputs + self.eps
        derivative = rate - torch.poisson(rate, generator=generator)
        return derivative if self.log_input else derivative / rate


@output_loss.register
def _(loss: nn.GaussianNLLLoss) -> OutputLoss:
    refuse_changed_forward(loss, nn.GaussianNLLLoss)
    return GaussianNLL(full=loss.full, eps=loss.eps, reduction=loss.reduction)  # type: ignore[arg-type]


@output_loss.register
def _(loss: nn.PoissonNLLLoss) -> OutputLoss:
    refuse_changed_forward(loss, nn.PoissonNLLLoss)
    return PoissonNLL(
        log_input=loss.log_input,
        full=loss.full,
        eps=loss.eps,
        reduction=loss.reduction,  # type: ignore[arg-type]
    )
