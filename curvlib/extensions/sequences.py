"""Sequences with time first, also of different lengths, and the way from and to PyTorch's other layouts.

Symbols: T steps of the longest sequence, N sequences, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from curvlib.extensions.uses import at_least_float32


@dataclass(frozen=True, eq=False, kw_only=True)
class Layout:
    """How the sequences of one call lie in its tensors.

    Attributes:
        steps: T.
        batch_first: whether N comes before T.
        packed: the sequences, where they came as a ``PackedSequence``; None where all have T steps.
        lengths: of the packed ones, (N,) on their device.
    """

    steps: int
    batch_first: bool
    packed: PackedSequence | None = None
    lengths: Int[Tensor, " N"] | None = None

    @classmethod
    def of(cls, sequences: Any, batch_first: bool) -> Layout:
        """Return the layout of a module's input."""
        if isinstance(sequences, PackedSequence):
            _, lengths = pad_packed_sequence(sequences)
            device = sequences.data.device
            steps = len(sequences.batch_sizes)
            return cls(steps=steps, batch_first=batch_first, packed=sequences, lengths=lengths.to(device))
        return cls(steps=sequences.shape[1 if batch_first else 0], batch_first=batch_first)

    def time_first(self, tensor: Tensor) -> Float[Tensor, "T N F"]:
        """Return the steps that the tensor (for packed sequences their data) holds, in float32 at least.

        Where a sequence has no step there are zeros.
        """
        tensor = at_least_float32(tensor.detach())
        if self.packed is not None:
            return pad_packed_sequence(PackedSequence(tensor, *self.packed[1:]))[0]
        return tensor.transpose(0, 1) if self.batch_first else tensor

    def in_packed_order(self, steps: Float[Tensor, "T N F"]) -> Float[Tensor, "P F"]:
        """Return the data of the packed sequences with these steps."""
        assert self.packed is not None
        order = self.packed.sorted_indices
        ordered = steps if order is None else steps[:, order]
        return torch.cat([ordered[t, :size] for t, size in enumerate(self.packed.batch_sizes.tolist())])

    def sorted(self, states: Float[Tensor, "L N F"]) -> Float[Tensor, "L N F"]:
        """Return states in the order of the packed sequences."""
        order = self.packed.sorted_indices if self.packed is not None else None
        return states if order is None else states[:, order]

    def valid(self) -> Bool[Tensor, "N T"] | None:
        """Return which steps there are, None for all."""
        if self.lengths is None:
            return None
        return torch.arange(self.steps, device=self.lengths.device) < self.lengths.unsqueeze(1)

    def reversed(self, x: Float[Tensor, "T N F"]) -> Float[Tensor, "T N F"]:
        """Return the steps of every sequence from its last to its first; what is behind its end stays there."""
        if self.lengths is None:
            return x.flip(0)
        times = torch.arange(self.steps, device=x.device).unsqueeze(1)
        mirrored = self.lengths - 1 - times
        index = torch.where(mirrored >= 0, mirrored, times)
        return x.gather(0, index.unsqueeze(2).expand_as(x))

    def at_last(self, values: Float[Tensor, "N F"]) -> Float[Tensor, "T N F"]:
        """Return zeros but for the last step of every sequence, which has these values."""
        result = values.new_zeros(self.steps, *values.shape)
        if self.lengths is None:
            result[-1] = values
            return result
        last = (self.lengths - 1).view(1, -1, 1).expand(1, *values.shape)
        return result.scatter_(0, last, values.unsqueeze(0))
