"""The order in which training examples are seen: the same endless stream for every method, cut into its batches."""

from __future__ import annotations

import torch
from torch import Tensor

# Epoch numbers stay below this, so that two seeds never share the permutation of an epoch.
_EPOCHS_PER_SEED = 1 << 31


class ExampleOrder:
    """An endless stream of example numbers, one seeded permutation of all of them after the other.

    Entry p of the stream depends on (size, seed, p) alone: the position is the whole state of the data order.

    Args:
        size: number of examples N.
        seed: chooses the stream.
        device: where the numbers are wanted.
    """

    def __init__(self, size: int, seed: int, device: torch.device) -> None:
        self._size, self._seed, self._device = size, seed, device
        self._permutations: dict[int, Tensor] = {}

    def batch(self, position: int, length: int) -> Tensor:
        """Return entries position, ..., position + length - 1, shape (length,); a batch may span two epochs."""
        parts = []
        while length > 0:
            epoch, offset = divmod(position, self._size)
            part = self._permutation(epoch)[offset : offset + length]
            parts.append(part)
            position, length = position + len(part), length - len(part)
        return torch.cat(parts)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(self._seed * _EPOCHS_PER_SEED + epoch)
            permutation = torch.randperm(self._size, generator=generator).to(self._device)
            self._permutations = {
                **{number: kept for number, kept in self._permutations.items() if number == epoch - 1},
                epoch: permutation,
            }
        return self._permutations[epoch]
