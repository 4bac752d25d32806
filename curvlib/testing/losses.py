"""Losses with the targets that they need, to draw networks from and to test losses with.

Symbols: N examples, T positions, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvlib import AutogradLoss, OutputLoss

Loss = nn.Module | OutputLoss
Reduction = Literal["mean", "sum"]


class PositionsLast(nn.Module):
    """(N, *T, C) -> (N, C, *T), as cross-entropy wants its classes."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x with its last dimension as the second."""
        return x.movedim(-1, 1)


@dataclass(frozen=True)
class LossCase:
    """A loss with the targets that it needs for outputs of a given shape: (N, *T, C), or (N, C, *T) classes first.

    Attributes:
        name: what it is called in tests.
        make: (outputs, reduction) -> loss.
        targets: outputs -> targets.
        classes_first: whether the outputs are (N, C, *T).
        likelihood: whether labels can be drawn from the model, so that there is a Fisher matrix.
        natural: whether Fisher and GGN agree in expectation.
        final: what the network must end in for its outputs to be valid.

    Example:
        >>> case = LossCase("squares", lambda z, reduction: nn.MSELoss(reduction=reduction), torch.randn_like)
        >>> case.make(torch.zeros(2, 1), "sum")
        MSELoss()
    """

    name: str
    make: Callable[[Tensor, Reduction], Loss]
    targets: Callable[[Tensor], Any]
    classes_first: bool = False
    likelihood: bool = True
    natural: bool = True
    final: type[nn.Module] | None = None

    def __repr__(self) -> str:
        return f"LossCase({self.name!r})"

    def ending(self, position_dimensions: int = 0) -> list[nn.Module]:
        """Return the modules after the last layer."""
        last = [PositionsLast()] if self.classes_first and position_dimensions else []
        return [*([self.final()] if self.final else []), *last]


class SharedNoise(OutputLoss):
    """What a third party writes: half the squares of the errors and of their sum, the outputs' precision I + 1 1^T."""

    def value(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return half of (|e|^2 + (sum e)^2) for the errors e."""
        errors = outputs - targets
        return 0.5 * (errors.square().sum() + errors.sum(-1).square().sum()) * self.scale(outputs, targets)

    def sample_gradient(self, outputs: Tensor, targets: Any, generator: torch.Generator | None = None) -> Tensor:
        """Return own and shared noise."""
        own, shared = (
            torch.randn(shape, dtype=outputs.dtype, device=outputs.device, generator=generator)
            for shape in (outputs.shape, (*outputs.shape[:-1], 1))
        )
        return (own + shared) * self.scale(outputs, targets).sqrt()


def _log_cosh(z: Tensor, reduction: Reduction) -> Loss:
    def function(z: Tensor, y: Tensor) -> Tensor:
        return (z - y).cosh().log().sum() / (len(z) if reduction == "mean" else 1)

    return AutogradLoss(function, reduction=reduction)


def _labels(z: Tensor) -> Tensor:
    return torch.randint(z.shape[1], (z.shape[0], *z.shape[2:]))


def _ignored(z: Tensor) -> Tensor:
    labels = _labels(z)
    # the smallest number of examples is 1: keep at least one label that is not ignored
    labels.flatten()[1:][torch.rand(labels.numel() - 1) < 0.4] = -100
    return labels


def _ignored_class(z: Tensor) -> Tensor:
    labels = _labels(z)
    labels.view(-1)[0] = 1  # not 0, the class to ignore
    return labels


def _counts(z: Tensor) -> Tensor:
    return torch.poisson(torch.full_like(z, 2.0))


def _weights(z: Tensor) -> Tensor:
    return torch.rand(z.shape[1], dtype=z.dtype) + 0.5


# Losses whose targets split into batches by their first dimension, of outputs without restrictions.
LOSSES = (
    LossCase("mse", lambda z, r: nn.MSELoss(reduction=r), torch.randn_like),
    LossCase("cross-entropy", lambda z, r: nn.CrossEntropyLoss(reduction=r), _labels, True),
    LossCase(
        "cross-entropy with class weights, ignored labels and smoothing",
        lambda z, r: nn.CrossEntropyLoss(weight=_weights(z), label_smoothing=0.2, reduction=r),
        _ignored,
        True,
    ),
    LossCase(
        "cross-entropy with class probabilities",
        lambda z, r: nn.CrossEntropyLoss(weight=_weights(z), reduction=r),
        lambda z: torch.randn_like(z).softmax(1),
        True,
    ),
    LossCase(
        "cross-entropy that ignores a class",
        lambda z, r: nn.CrossEntropyLoss(weight=_weights(z), ignore_index=0, reduction=r),
        _ignored_class,
        True,
    ),
    LossCase("bce", lambda z, r: nn.BCEWithLogitsLoss(reduction=r), torch.rand_like),
    LossCase(
        "bce with weights",
        lambda z, r: nn.BCEWithLogitsLoss(
            weight=torch.rand(z.shape[-1], dtype=z.dtype) + 0.5,
            pos_weight=torch.rand(z.shape[-1], dtype=z.dtype) + 0.5,
            reduction=r,
        ),
        lambda z: (torch.rand_like(z) < 0.5).to(z.dtype),
    ),
    LossCase(
        "gaussian",
        lambda z, r: nn.GaussianNLLLoss(reduction=r),
        lambda z: (torch.randn_like(z), torch.rand_like(z) + 0.5),
    ),
    LossCase("poisson", lambda z, r: nn.PoissonNLLLoss(reduction=r), _counts),
    LossCase("log-cosh by autograd", _log_cosh, torch.randn_like, likelihood=False),
    LossCase("a third party's", lambda z, r: SharedNoise(reduction=r), torch.randn_like),
)

# With those whose targets do not all split into batches, or whose outputs are restricted.
EVERY_LOSS = (
    *LOSSES,
    LossCase(
        "gaussian with a number as variance",
        lambda z, r: nn.GaussianNLLLoss(reduction=r),
        lambda z: (torch.randn_like(z), 0.7),
    ),
    LossCase(
        "poisson with rates as outputs",
        lambda z, r: nn.PoissonNLLLoss(log_input=False, reduction=r),
        _counts,
        natural=False,
        final=nn.Softplus,
    ),
)
