"""Any twice-differentiable convex loss, through automatic differentiation in output space."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.output_losses.base import OutputLoss
from curvlib.output_losses.tensors import working_precision


@dataclass(frozen=True, kw_only=True, eq=False)
class AutogradLoss(OutputLoss):
    r"""The loss L = function(z, y), a mean or a sum of per-example losses over dimension 0.

    l_n is what the function gives for example n alone; c = 1/N for a mean, 1 for a sum. Hessian products
    take two backward passes in output space, the exact root the eigenvectors of the (N, O, O) blocks. There is no
    likelihood, so ``Fisher`` needs a subclass of :class:`OutputLoss` with ``sample_gradient``.

    Attributes:
        function: (outputs, targets) -> scalar tensor, twice differentiable, and convex in the outputs for
            ``hessian_sqrt``; it is called with outputs in float32 at least.
        reduction: which of the two the function does, ``"mean"`` (default) or ``"sum"``.

    Raises:
        TypeError: function cannot be called.

    Example:
        >>> loss = AutogradLoss(lambda z, y: (z - y).pow(4).sum(1).mean())
        >>> loss.hessian_product(torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2))
        tensor([[12., 12.]])
    """

    function: Callable[[Tensor, Any], Tensor] = field(kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.function):
            raise TypeError(
                f"function of AutogradLoss must be callable as function(outputs, targets), got {self.function!r}."
            )

    def value(self, outputs: Float[Tensor, "N *O"], targets: Any) -> Float[Tensor, ""]:
        """Return function(outputs, targets)."""
        return self.function(working_precision(outputs), targets)

    @torch.no_grad()
    def check(self, outputs: Float[Tensor, "N *O"], targets: Any) -> None:
        r"""Raise unless the function gives a scalar that splits over the examples as ``reduction`` says.

        The split is tried once, on the halves of the batch: L = L_1 + L_2 for a sum, N L = N_1 L_1 + N_2 L_2 for a
        mean. Otherwise examples interact, the mean divides by something else than N, or ``reduction`` is not the
        function's, and Fisher matrices and averages over batches would be silently wrong. This waits for the device.

        Raises:
            TypeError: the function's value is not a tensor.
            ValueError: it is not a scalar, or does not split.
        """
        super().check(outputs, targets)
        whole = self.value(outputs, targets)
        if not isinstance(whole, Tensor):
            raise TypeError(f"function of AutogradLoss must return a tensor, got {type(whole).__name__}.")
        if whole.ndim != 0:
            raise ValueError(
                f"function of AutogradLoss must return a scalar, got shape {tuple(whole.shape)}: reduce it over the "
                "examples."
            )
        N = outputs.shape[0]
        halves = [(part, _examples(targets, N, part)) for part in (slice(0, N // 2), slice(N // 2, N))]
        if N == 1 or any(targets is not None and part_targets is None for _, part_targets in halves):
            return
        parts = [self._total(self.value(outputs[part], part_targets), outputs[part]) for part, part_targets in halves]
        self._check_split(self._total(whole, outputs), parts)

    def _total(self, value: Tensor, outputs: Tensor) -> float:
        return float(value) * (1 if self.additive else outputs.shape[0])

    def _check_split(self, whole: float, parts: list[float]) -> None:
        difference, size = abs(whole - sum(parts)), abs(whole) + sum(map(abs, parts))
        # Half the digits of float32: sums of different order differ by rounding, a wrong reduction by a factor.
        if math.isfinite(size) and difference > math.sqrt(torch.finfo(torch.float32).eps) * size:
            raise ValueError(
                f"function of AutogradLoss must be a {self.reduction} over the N examples of dimension 0, but the two "
                f"halves of this batch make {sum(parts):.6g} and the whole {whole:.6g} (sums over examples): pass the "
                f"reduction that the function does, or subclass OutputLoss and give value and normalizer."
            )


def _examples(targets: Any, N: int, part: slice) -> Any:
    """Return the targets of some examples, or None where their structure does not show which these are."""
    if isinstance(targets, Tensor):
        return targets[part] if targets.ndim > 0 and targets.shape[0] == N else None
    if isinstance(targets, dict):
        values = {key: _examples(target, N, part) for key, target in targets.items()}
        return None if any(value is None for value in values.values()) else values
    if isinstance(targets, (tuple, list)):
        pieces = [_examples(target, N, part) for target in targets]
        return None if any(piece is None for piece in pieces) else type(targets)(pieces)
    return None
