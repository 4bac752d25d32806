"""Softmax cross-entropy with every option of ``torch.nn.CrossEntropyLoss``.

Symbols: z logits (N, C, *T), C classes, T positions; p = softmax(z) over the classes; q targets as probabilities,
after smoothing; w class weights; kappa = sum_j w_j q_j the weight of a position (0 where ignored); c the factor of the
reduction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from curvlib.output_losses.base import NoTargetsError, OutputLoss, Product, output_loss, refuse_changed_forward
from curvlib.output_losses.tensors import check_generator, check_tensor, full_scalar, on_host, working_precision


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossEntropy(OutputLoss):
    r"""Cross-entropy of logits, l_n = -sum_t sum_j w_j q_j log p_j, as ``torch.nn.CrossEntropyLoss`` computes it.

    At every position H = c kappa (diag(p) - p p^T): weights and smoothing move the curvature through kappa alone.
    Targets are class indices, int64 (N, *T), or probabilities of the outputs' shape (N, C, *T). As in PyTorch, the mean
    divides by the sum of w_y, without smoothing, over positions that are not ignored for class indices, and by the
    number of positions for probabilities, with which an ``ignore_index`` that names a class is refused.

    Attributes:
        weight: class weights (C,), not negative, or None.
        ignore_index: class index of positions that do not count.
        label_smoothing: share of the uniform distribution in the targets, 0 to 1.

    Raises:
        ValueError: weight is not a vector or has negative entries, or label_smoothing is outside [0, 1].
    """

    weight: Float[Tensor, " C"] | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight is not None and (self.weight.ndim != 1 or bool((self.weight < 0).any())):
            raise ValueError(
                f"weight of CrossEntropy must be a vector (C,) without negative entries, got {self.weight}: a negative "
                f"weight makes the loss concave."
            )
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing of CrossEntropy must be in [0, 1], got {self.label_smoothing}.")

    def check(self, outputs: Float[Tensor, "N C *T"], targets: Shaped[Tensor, "..."]) -> None:
        """Raise for logits without a class dimension, or for targets of the wrong type, shape, device or range.

        Raises:
            TypeError: the targets are neither int64 nor floating point.
            ValueError: shapes, devices or ranges are wrong.
            NoTargetsError: reduction is "mean" and all targets are ignored or have class weight 0; read on a CPU only.
        """
        super().check(outputs, targets)
        if outputs.ndim < 2 or outputs.shape[1] < 2:
            raise ValueError(
                f"outputs of CrossEntropy must have shape (N, C, ...) with C >= 2 classes, got {tuple(outputs.shape)}: "
                f"for two classes from one logit use nn.BCEWithLogitsLoss."
            )
        if self.weight is not None:
            check_tensor("weight of CrossEntropy", self.weight, outputs)
            if len(self.weight) != outputs.shape[1]:
                raise ValueError(
                    f"weight of CrossEntropy must have {outputs.shape[1]} entries, one a class, got {len(self.weight)}."
                )
        check_tensor("targets of CrossEntropy", targets, outputs)
        if targets.is_floating_point():
            self._check_probabilities(outputs, targets)
        else:
            self._check_indices(outputs, targets)
        if on_host(outputs) and not self.additive and float(self.normalizer(outputs, targets)) == 0.0:
            raise NoTargetsError(
                f"targets of CrossEntropy must have a position that counts, but all are ignored (ignore_index = "
                f"{self.ignore_index}) or have class weight 0, so the mean is 0/0: leave such batches out."
            )

    def value(self, outputs: Float[Tensor, "N C *T"], targets: Shaped[Tensor, "..."]) -> Float[Tensor, ""]:
        """Return the cross-entropy."""
        z = working_precision(outputs)
        return functional.cross_entropy(
            z,
            targets.to(z.dtype) if targets.is_floating_point() else targets,
            weight=self._weight(z),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    def normalizer(self, outputs: Float[Tensor, "N C *T"], targets: Shaped[Tensor, "..."]) -> Float[Tensor, ""]:
        """Return the number of positions for probabilities, and the sum of w_y over those not ignored for indices."""
        z = working_precision(outputs.detach())
        if targets.is_floating_point():
            return full_scalar(z, z.numel() // z.shape[1])
        return self._weight_of_label(z, targets).sum()

    def counted(self, outputs: Float[Tensor, "N C *T"], targets: Shaped[Tensor, "..."]) -> Bool[Tensor, " N"] | None:
        """Return which examples have a position that is not ignored; None for probabilities, of which all count."""
        if targets.is_floating_point():
            return None
        return (targets != self.ignore_index).reshape(targets.shape[0], -1).any(1)

    def ignores(self, outputs: Float[Tensor, "N C *T"], targets: Shaped[Tensor, "..."]) -> Bool[Tensor, " N"] | None:
        """Return which examples have a target with the ignored index."""
        if targets.is_floating_point():
            return None
        return (targets == self.ignore_index).reshape(targets.shape[0], -1).any(1)

    def linearize(self, outputs: Float[Tensor, "N C *T"], targets: Shaped[Tensor, "..."]) -> Product:
        """Return V -> c kappa (p * V - p <p, V>)."""
        p = working_precision(outputs.detach()).softmax(1)
        weighted = self._coefficient(outputs, targets) * p

        def product(V: Tensor) -> Tensor:
            V = V.detach().to(p.dtype)
            return weighted * (V - (p * V).sum(1, keepdim=True))

        return product

    @torch.no_grad()
    def hessian_sqrt(
        self, outputs: Float[Tensor, "N C *T"], targets: Shaped[Tensor, "..."]
    ) -> Iterator[Float[Tensor, "N C *T"]]:
        r"""Yield the (C - 1) T columns of the Cholesky factor, class by class at each position.

        With the tails r_j = sum_{i >= j} p_i, column j of diag(p) - p p^T = B B^T is
        sqrt(p_j r_{j+1} / r_j) (e_j - sum_{i > j} (p_i / r_{j+1}) e_i), j = 1 ... C - 1: one column less than the
        symmetric root diag(sqrt(p)) - p sqrt(p)^T has (Tanabe & Sagae 1992, for the covariance of a multinomial).
        Quotients are taken as differences of logarithms, so that probabilities that underflow stay harmless.
        """
        z = working_precision(outputs.detach()).reshape(*outputs.shape[:2], -1)
        size, log_p, log_tail = self._cholesky(z, self._coefficient(outputs, targets).reshape(z.shape[0], 1, -1))
        for t in range(z.shape[2]):
            for j in range(z.shape[1] - 1):
                v = torch.zeros_like(z)
                v[:, j, t] = size[:, j, t]
                v[:, j + 1 :, t] = -size[:, j, t, None] * (log_p[:, j + 1 :, t] - log_tail[:, j + 1, t, None]).exp()
                yield v.reshape(outputs.shape)

    @torch.no_grad()
    def sample_gradient(
        self,
        outputs: Float[Tensor, "N C *T"],
        targets: Shaped[Tensor, "..."],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "N C *T"]:
        """Return sqrt(c kappa) (p - e_label), label ~ p at every position; E[v v^T] = H.

        The label is the first of C exponential clocks with rates p, which samples exactly and, unlike
        ``torch.multinomial``, without waiting for the device.
        """
        check_generator(outputs, generator)
        p = working_precision(outputs.detach()).softmax(1)
        label = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(1, keepdim=True)
        return self._coefficient(outputs, targets).sqrt() * (p - torch.zeros_like(p).scatter_(1, label, 1.0))

    def _weight(self, z: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.detach().to(z.dtype)

    def _weight_of_label(self, z: Tensor, targets: Tensor) -> Tensor:
        """Return w_y, 0 where ignored, (N, *T)."""
        counts, weight = targets != self.ignore_index, self._weight(z)
        if weight is None:
            return counts.to(z.dtype)
        return weight[targets.where(counts, 0)] * counts

    @torch.no_grad()
    def _coefficient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return c kappa, (N, 1, *T)."""
        z, epsilon = working_precision(outputs.detach()), self.label_smoothing
        weight = self._weight(z)
        mean_weight = 1.0 if weight is None else weight.mean()
        if targets.is_floating_point():
            q, shape = targets.detach().to(z.dtype), (-1, *(1,) * (z.ndim - 2))
            weight_of_target = q.sum(1) if weight is None else (q * weight.reshape(shape)).sum(1)
            kappa = (1 - epsilon) * weight_of_target + epsilon * mean_weight
        else:
            # a Python float times a boolean tensor would be float32, whatever the type of z
            smooth = epsilon * mean_weight * (targets != self.ignore_index).to(z.dtype)
            kappa = (1 - epsilon) * self._weight_of_label(z, targets) + smooth
        return (self.scale(outputs, targets) * kappa).unsqueeze(1)

    @staticmethod
    def _cholesky(z: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return sizes of the columns (N, C - 1, T), log p and the logarithms of its tails (N, C, T)."""
        # Logits of -inf (masked classes) would give inf - inf below; p of this floor is 0 all the same.
        log_p = z.log_softmax(1).clamp(min=torch.finfo(z.dtype).min / 4)
        log_tail = log_p.flip(1).logcumsumexp(1).flip(1)
        log_size = (log_p[:, :-1] + log_tail[:, 1:] - log_tail[:, :-1]) / 2
        return coefficient.sqrt() * log_size.exp(), log_p, log_tail

    def _check_probabilities(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.shape != outputs.shape:
            raise ValueError(
                f"targets of CrossEntropy, if probabilities, must have the outputs' shape {tuple(outputs.shape)}, got "
                f"{tuple(targets.shape)} of {targets.dtype}: pass class indices as int64 with targets.long()."
            )
        if self.ignore_index >= 0:
            raise ValueError(
                f"ignore_index of CrossEntropy must be negative for targets that are probabilities, got "
                f"{self.ignore_index}: give the examples to ignore probabilities of 0."
            )
        if on_host(targets) and not bool((targets >= 0).all()):
            raise ValueError(f"targets of CrossEntropy, if probabilities, must be >= 0, got {float(targets.min())}.")

    def _check_indices(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.dtype != torch.int64:
            raise TypeError(
                f"targets of CrossEntropy must be class indices (int64) or probabilities (floating point), got "
                f"{targets.dtype}: convert them with targets.long()."
            )
        shape = (outputs.shape[0], *outputs.shape[2:])
        if targets.shape != shape:
            raise ValueError(
                f"targets of CrossEntropy must have shape {shape} for outputs {tuple(outputs.shape)} (N, C, ...), got "
                f"{tuple(targets.shape)}: the classes are dimension 1 of the outputs and no dimension of class indices."
            )
        if on_host(targets):
            counted = targets[targets != self.ignore_index]
            if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= outputs.shape[1]):
                raise ValueError(
                    f"targets of CrossEntropy must be in 0 ... {outputs.shape[1] - 1} or ignore_index = "
                    f"{self.ignore_index}, got {int(counted.min())} ... {int(counted.max())}."
                )


@output_loss.register
def _(loss: nn.CrossEntropyLoss) -> OutputLoss:
    refuse_changed_forward(loss, nn.CrossEntropyLoss)
    return CrossEntropy(
        weight=loss.weight,
        ignore_index=loss.ignore_index,
        label_smoothing=loss.label_smoothing,
        reduction=loss.reduction,  # type: ignore[arg-type]
    )
