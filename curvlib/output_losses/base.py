"""The interface of a loss in output space, with defaults by automatic differentiation.

Symbols: z model outputs (N, *O), N examples along dimension 0 and everything else of an example (classes, positions)
in O; y targets; l_n loss of one example, summed over its elements, weights included; c the reduction's factor;
L = c sum_n l_n(z_n, y_n) the number that the loss module gives; H = d^2 L / dz^2, block diagonal over examples.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from curvlib.output_losses.tensors import full_scalar, working_precision

Reduction: TypeAlias = Literal["mean", "sum"]
Product: TypeAlias = Callable[[Tensor], Tensor]


class NoTargetsError(ValueError):
    """No target of a batch counts (all are ignored or have weight 0), so that the loss, a mean over them, is 0/0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputLoss(ABC):
    r"""A loss L(z, y) = c sum_n l_n(z_n, y_n) and its curvature in output space, H = d^2 L / dz^2.

    A subclass gives :meth:`value`; the rest follows by automatic differentiation. It overrides :meth:`normalizer` when
    its mean divides by something else than the number of examples, and gives :meth:`sample_gradient` when l_n is
    a negative log-likelihood (only ``Fisher`` asks for it). Closed forms are worth it for speed alone.

    :meth:`check` is called once a batch; all other methods presume a batch that passed it, and none of them waits for
    the device, except the inherited :meth:`hessian_sqrt`. Half precision outputs are computed with and answered in
    float32; ``value`` is differentiable in the outputs, all other results carry no graph.

    Attributes:
        reduction: ``"mean"``, c = 1 / normalizer, or ``"sum"``, c = 1.

    Raises:
        ValueError: reduction is neither of the two.

    Example:
        >>> class LogCosh(OutputLoss):
        ...     def value(self, outputs, targets):
        ...         return (outputs - targets).cosh().log().sum() * self.scale(outputs, targets)
        >>> LogCosh(reduction="sum").gradient(torch.zeros(2, 1), torch.tensor([[0.0], [10.0]]))
        tensor([[ 0.],
                [-1.]])
    """

    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(
                f"reduction of {type(self).__name__} must be 'mean' or 'sum', got {self.reduction!r}: curvature needs "
                f"an objective that is one number, so give the loss one of these reductions."
            )

    @abstractmethod
    def value(self, outputs: Float[Tensor, "N *O"], targets: Any) -> Float[Tensor, ""]:
        """Return L, the loss module's own number, differentiable (twice, where it is) in the outputs."""

    def check(self, outputs: Float[Tensor, "N *O"], targets: Any) -> None:
        """Raise for a batch that the loss cannot take; checks that read data run on the CPU only.

        Raises:
            TypeError: outputs is not a floating-point tensor, or the targets have the wrong type.
            ValueError: the batch is empty, or shapes, devices or ranges of the targets are wrong.
            NoTargetsError: the loss is a mean over the targets that count, and none does; a ValueError too.
        """
        name = type(self).__name__
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
            got = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
            raise TypeError(f"outputs of {name} must be a floating-point tensor, got {got}: return one from the model.")
        if outputs.ndim == 0 or outputs.numel() == 0:
            raise ValueError(
                f"outputs of {name} must have shape (N, ...) with N >= 1 examples and no empty dimension, got "
                f"{tuple(outputs.shape)}: leave empty batches out."
            )

    @property
    def additive(self) -> bool:
        """Whether objectives of batches add up ("sum"); otherwise they average with :meth:`batch_weight`."""
        return self.reduction == "sum"

    def normalizer(self, outputs: Float[Tensor, "N *O"], targets: Any) -> Float[Tensor, ""]:
        """Return what the mean divides by, on the outputs' device: by default N."""
        return full_scalar(outputs, outputs.shape[0])

    def counted(self, outputs: Float[Tensor, "N *O"], targets: Any) -> Bool[Tensor, " N"] | None:
        """Return which examples have a target that counts; None where all do, whatever the targets are."""
        return None

    def ignores(self, outputs: Float[Tensor, "N *O"], targets: Any) -> Bool[Tensor, " N"] | None:
        """Return which examples have a target that is ignored; None where none has, whatever the targets are."""
        return None

    def batch_weight(self, outputs: Float[Tensor, "N *O"], targets: Any) -> Float[Tensor, ""]:
        r"""Return 1/c, how much the batch counts when several make one objective.

        The loss of all data at once is sum_b w_b L_b / sum_b w_b for a mean, and sum_b L_b for a sum (w_b = 1).
        """
        return full_scalar(outputs, 1) if self.additive else self.normalizer(outputs, targets)

    def scale(self, outputs: Float[Tensor, "N *O"], targets: Any) -> Float[Tensor, ""]:
        """Return c, the factor of the reduction: 1 / normalizer for a mean, 1 for a sum."""
        return self.batch_weight(outputs, targets).reciprocal()

    def gradient(self, outputs: Float[Tensor, "N *O"], targets: Any) -> Float[Tensor, "N *O"]:
        """Return dL/dz at the targets."""
        z = working_precision(outputs.detach()).requires_grad_()
        with torch.enable_grad():
            value = self.value(z, targets)
        return torch.autograd.grad(value, z)[0]

    def empirical_gradient(self, outputs: Float[Tensor, "N *O"], targets: Any) -> Float[Tensor, "N *O"]:
        """Return sqrt(c) dl_n/dz_n at the training targets, the vector v of the empirical Fisher sum_n v_n v_n^T."""
        return self.gradient(outputs, targets) * self.batch_weight(outputs, targets).sqrt()

    def linearize(self, outputs: Float[Tensor, "N *O"], targets: Any) -> Product:
        """Return the function V -> H V, all that does not depend on V computed once; V and H V are (N, *O)."""
        z = working_precision(outputs.detach()).requires_grad_()
        with torch.enable_grad():
            gradient = torch.autograd.grad(self.value(z, targets), z, create_graph=True)[0]

        def product(V: Tensor) -> Tensor:
            if not gradient.requires_grad:  # a loss that is linear in its outputs
                return torch.zeros_like(z, requires_grad=False)
            return torch.autograd.grad(
                gradient, z, V.detach().to(z.dtype), retain_graph=True, allow_unused=True, materialize_grads=True
            )[0]

        return product

    def hessian_product(
        self, outputs: Float[Tensor, "N *O"], targets: Any, V: Float[Tensor, "N *O"]
    ) -> Float[Tensor, "N *O"]:
        """Return H V. For many products at the same outputs use :meth:`linearize`."""
        return self.linearize(outputs, targets)(V)

    def hessian_sqrt(self, outputs: Float[Tensor, "N *O"], targets: Any) -> Iterator[Float[Tensor, "N *O"]]:
        r"""Yield v_1 ... v_K with sum_k v_k[n] v_k[n]^T = H_n for every example n, one at a time; K is at most O.

        Each vector is filled for all examples at once, since examples do not meet in the network, but the outputs
        of one example do: only blocks of the same example may be read off. The default takes the eigenvectors of the
        (N, O, O) blocks, built by O Hessian products; eigenvalues within rounding of zero are taken as zero.

        Raises:
            ValueError: a block has a negative eigenvalue: the loss is not convex at these outputs.
        """
        eigenvalues, eigenvectors = torch.linalg.eigh(self._hessian_blocks(outputs, targets))
        lowest, largest = float(eigenvalues.min()), float(eigenvalues.abs().max())
        # Half the digits of the type: a Hessian by automatic differentiation carries cancellation of that order.
        if lowest < -math.sqrt(torch.finfo(eigenvalues.dtype).eps) * largest:
            raise ValueError(
                f"hessian_sqrt needs a loss that is convex in the outputs, but the Hessian of {self!r} has the "
                f"eigenvalue {lowest:.3g} here (largest magnitude {largest:.3g}): use Hessian() in place of GGN(), or "
                "a convex loss."
            )
        roots = eigenvectors * eigenvalues.clamp(min=0).sqrt().unsqueeze(1)
        yield from (root.reshape(outputs.shape) for root in roots.unbind(2))

    def sample_gradient(
        self, outputs: Float[Tensor, "N *O"], targets: Any, generator: torch.Generator | None = None
    ) -> Float[Tensor, "N *O"]:
        r"""Return a draw v of sqrt(c) dl_n/dz_n at labels drawn from the model p(y|z) = exp(-l_n), all n at once.

        E[v_n v_n^T] = H_n for losses in natural parameters. Positions of one example are drawn at once: their gradients
        are independent and have mean zero. A weight w of a term counts as w observations: sqrt(w) times the unweighted
        gradient, for w times it would have the second moment w^2 instead of the curvature w.

        Args:
            outputs: z, (N, *O).
            targets: give weights and masks alone, never the drawn labels.
            generator: source of randomness on the outputs' device; None takes PyTorch's global one.

        Raises:
            NotImplementedError: the loss gives no likelihood.
        """
        raise NotImplementedError(
            f"sample_gradient is not available: {type(self).__name__} has no likelihood to draw labels from. Use GGN() "
            f"in place of Fisher(), or subclass curvlib.output_losses.OutputLoss and implement sample_gradient."
        )

    def _hessian_blocks(self, outputs: Float[Tensor, "N *O"], targets: Any) -> Float[Tensor, "N o o"]:
        product = self.linearize(outputs, targets)
        z = working_precision(outputs.detach()).reshape(outputs.shape[0], -1)
        columns = []
        for i in range(z.shape[1]):
            unit = torch.zeros_like(z)
            unit[:, i] = 1.0
            columns.append(product(unit.reshape(outputs.shape)).reshape(z.shape))
        return torch.stack(columns, dim=2)


@functools.singledispatch
def output_loss(loss: object) -> OutputLoss:
    """Return the :class:`OutputLoss` of a loss module; an ``OutputLoss`` is returned as it is.

    A rule for your own module type is added with ``@output_loss.register``, like any ``functools.singledispatch``.

    Args:
        loss: a loss module of PyTorch, or an ``OutputLoss``.

    Raises:
        TypeError: there is no rule for the type, or it changes ``forward`` of a type that has one.
        ValueError: the module's reduction is neither "mean" nor "sum".

    Example:
        >>> from curvlib.output_losses import output_loss
        >>> output_loss(nn.CrossEntropyLoss(reduction="sum")).additive
        True
    """
    known = sorted(
        f"{rule.__module__.split('.')[0]}.{rule.__qualname__}" for rule in output_loss.registry if rule is not object
    )
    name = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
    raise TypeError(
        f"loss must be an instance of one of {', '.join(known)}; got {name}. Either register a rule for its type with "
        f"@curvlib.output_losses.output_loss.register, or pass curvlib.output_losses.AutogradLoss(function) for a "
        f"function(outputs, targets) that is twice differentiable and convex in the outputs."
    )


@output_loss.register
def _(loss: OutputLoss) -> OutputLoss:
    return loss


def refuse_changed_forward(module: nn.Module, base: type[nn.Module]) -> None:
    """Raise TypeError when the module computes something else than ``base``, whose rule would then be wrong."""
    if getattr(module.forward, "__func__", None) is not base.forward:
        raise TypeError(
            f"loss of type {type(module).__name__} overrides forward of {base.__name__}, so the rule of "
            f"{base.__name__} does not hold for it: register a rule with @curvlib.output_losses.output_loss.register, "
            f"or pass curvlib.output_losses.AutogradLoss(loss)."
        )
