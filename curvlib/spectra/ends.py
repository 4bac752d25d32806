"""Which eigenvalues are wanted.

Symbols: e (m,) eigenvalues.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


class SpectrumEnd(ABC):
    """An order of preference among eigenvalues."""

    @abstractmethod
    def order(self, e: Float[Tensor, " m"]) -> Int[Tensor, " m"]:
        """Return the indices of e, the most wanted first, without waiting for the device."""


@dataclass(frozen=True)
class Largest(SpectrumEnd):
    """The algebraically largest first."""

    def order(self, e: Float[Tensor, " m"]) -> Int[Tensor, " m"]:
        """Return the indices in decreasing order."""
        return e.argsort(descending=True)


@dataclass(frozen=True)
class Smallest(SpectrumEnd):
    """The algebraically smallest first: for an indefinite matrix the most negative."""

    def order(self, e: Float[Tensor, " m"]) -> Int[Tensor, " m"]:
        """Return the indices in increasing order."""
        return e.argsort()


@dataclass(frozen=True)
class LargestMagnitude(SpectrumEnd):
    """The largest absolute values first."""

    def order(self, e: Float[Tensor, " m"]) -> Int[Tensor, " m"]:
        """Return the indices in decreasing order of abs(e)."""
        return e.abs().argsort(descending=True)


@dataclass(frozen=True)
class BothEnds(SpectrumEnd):
    """The largest, the smallest, the second largest, and so on: half of them from each end."""

    def order(self, e: Float[Tensor, " m"]) -> Int[Tensor, " m"]:
        """Return the indices from both ends in turn."""
        decreasing = e.argsort(descending=True)
        turns = torch.stack([decreasing, decreasing.flip(0)], dim=1).reshape(-1)
        return turns[: len(e)]
