"""Matching losses: how much hidden states differ from what they were.

Symbols: h the states at the current parameters, h' those at others, of one shape; s pre-activations with h = tanh(s) or
h = sigmoid(s); M = d^2 L / dh'^2 at h' = h.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Product = Callable[[Tensor], Tensor]


class MatchingLoss(ABC):
    """L(h', h), a sum over all entries that is smallest at h' = h; a frozen value.

    A subclass gives :meth:`value`; the rest follows by automatic differentiation.
    """

    @abstractmethod
    def value(self, changed: Float[Tensor, "*S"], states: Float[Tensor, "*S"]) -> Float[Tensor, ""]:
        """Return L(h', h), twice differentiable in h'."""

    def linearize(self, states: Float[Tensor, "*S"]) -> Product:
        """Return the function x -> M x of the states' shape."""
        at = states.detach().clone().requires_grad_()
        with torch.enable_grad():
            gradient = torch.autograd.grad(self.value(at, states.detach()), at, create_graph=True)[0]
        return lambda x: torch.autograd.grad(gradient, at, x, retain_graph=True)[0]

    def check(self, states: Float[Tensor, "*S"]) -> None:  # noqa: B027 - most losses take every state
        """Raise ValueError for states that the loss is not defined for."""


@dataclass(frozen=True)
class SquaredChange(MatchingLoss):
    """L = 1/2 |h' - h|^2, M = I; in terms of pre-activations diag((dh/ds)^2), for tanh (1 - h^2)^2."""

    def value(self, changed: Float[Tensor, "*S"], states: Float[Tensor, "*S"]) -> Float[Tensor, ""]:
        """Return 1/2 |h' - h|^2."""
        return 0.5 * (changed - states).square().sum()

    def linearize(self, states: Float[Tensor, "*S"]) -> Product:
        """Return x -> x."""
        return lambda x: x


@dataclass(frozen=True, kw_only=True)
class MatchingCrossEntropy(MatchingLoss):
    r"""Cross-entropy of p = (h - low) / (high - low) and p' (likewise of h') as the probabilities of coins.

    .. math:: L = -\sum p \log p' + (1 - p) \log(1 - p'), \qquad M = \mathrm{diag}(1 / ((h - low) (high - h)))

    In terms of pre-activations M is diag(1 - h^2) for h = tanh(s) (low = -1, high = 1) and diag(h (1 - h)) for
    h = sigmoid(s) (low = 0, high = 1): the matching losses of Martens & Sutskever (2011), supplementary algorithm 1. A
    state that is at a bound to rounding does not move and counts 0.

    Args:
        low: the lower bound of the states.
        high: the upper bound; both are those of tanh, LSTM and GRU by default.

    Raises:
        ValueError: low is not below high, or (at an estimate) a state is out of bounds.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"MatchingCrossEntropy needs low < high, got low={self.low!r} and high={self.high!r}.")

    def value(self, changed: Float[Tensor, "*S"], states: Float[Tensor, "*S"]) -> Float[Tensor, ""]:
        """Return the cross-entropy, its entropy included."""
        p, q = ((h - self.low) / (self.high - self.low) for h in (states, changed))
        return -(torch.special.xlogy(p, q) + torch.special.xlogy(1 - p, 1 - q)).sum()

    def linearize(self, states: Float[Tensor, "*S"]) -> Product:
        """Return x -> x / ((h - low) (high - h))."""
        room = (states - self.low) * (self.high - states)
        weights = torch.where(room > 0, 1 / room, 0.0)
        return lambda x: weights * x

    def check(self, states: Float[Tensor, "*S"]) -> None:
        """Raise ValueError for states outside of [low, high]. Waits for the device once."""
        # in this form NaN is refused, too
        if not bool(((states >= self.low) & (states <= self.high)).all()):
            raise ValueError(
                f"MatchingCrossEntropy(low={self.low}, high={self.high}) is for states between these bounds, got "
                f"{float(states.min()):g} ... {float(states.max()):g}: set the bounds of the activation function, or "
                "use SquaredChange()."
            )
