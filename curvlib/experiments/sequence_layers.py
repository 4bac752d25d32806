"""What stands before and behind a recurrent layer: how examples become sequences, and where answers are read.

Symbols: N sequences, T steps, H units, C outputs.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from curvlib.experiments.errors import ExperimentError


@dataclass(frozen=True, kw_only=True)
class Entry(ABC):
    """How the inputs of a batch become numbers (N, T, features) for a recurrent layer.

    Args:
        features: numbers at every step.
    """

    features: int

    def __post_init__(self) -> None:
        if self.features < 1:
            raise ExperimentError(f"features must be at least 1, got {self.features}.")

    @property
    def parameters(self) -> int | None:
        """Number of parameters that are trained, None where the data decide it."""
        return 0

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the module, freshly initialised."""

    def for_symbols(self, symbols: int) -> Entry:
        """Return the entry for an alphabet of that size."""
        raise ExperimentError(f"{self!r} takes no alphabet of {symbols} symbols: use Embedded.")


@dataclass(frozen=True, kw_only=True)
class Rows(Entry):
    """Images (N, rows x features) as sequences of their rows.

    Args:
        features: pixels of a row.
        rows: of an image.
    """

    rows: int

    def build(self) -> nn.Module:
        """Return a module that cuts images into rows."""
        return nn.Unflatten(1, (self.rows, self.features))

    def __str__(self) -> str:
        return f"rows of {self.features}"


@dataclass(frozen=True, kw_only=True)
class Numbers(Entry):
    """Sequences of numbers (N, T, features) as they are."""

    def build(self) -> nn.Module:
        """Return a module that does nothing."""
        return nn.Identity()

    def __str__(self) -> str:
        return f"{self.features} numbers a step"


@dataclass(frozen=True, kw_only=True)
class OneHot(Entry):
    """Symbols (N, T) from an alphabet of that many, as vectors with a single 1."""

    def build(self) -> nn.Module:
        """Return a module without parameters."""
        return _OneHot(self.features)

    def __str__(self) -> str:
        return f"one-hot {self.features}"


@dataclass(frozen=True, kw_only=True)
class Embedded(Entry):
    """Symbols (N, T) as learned vectors, N(0, 1) at first.

    Args:
        features: length of the vectors.
        symbols: size of the alphabet, None where the data decide it.
    """

    symbols: int | None = None

    @property
    def parameters(self) -> int | None:
        """A vector a symbol."""
        return None if self.symbols is None else self.symbols * self.features

    def build(self) -> nn.Module:
        """Return an embedding.

        Raises:
            ExperimentError: the size of the alphabet is not known yet.
        """
        if self.symbols is None:
            raise ExperimentError("The data decide the size of the alphabet: use network.for_symbols(loaded.symbols).")
        return nn.Embedding(self.symbols, self.features)

    def for_symbols(self, symbols: int) -> Embedded:
        """Return the embedding for an alphabet of that size."""
        return dataclasses.replace(self, symbols=symbols)

    def __str__(self) -> str:
        return f"embedding {self.features}"


class Exit(ABC):
    """Where the answers are read off the states of a recurrent layer."""

    @abstractmethod
    def build(self, readout: nn.Linear) -> list[nn.Module]:
        """Return the modules from what the recurrent layer returns to the outputs.

        Args:
            readout: the linear map from H units to C outputs.
        """


@dataclass(frozen=True, kw_only=True)
class LastStep(Exit):
    """One answer a sequence, (N, C), from the last state."""

    def build(self, readout: nn.Linear) -> list[nn.Module]:
        """Return the read-out of the last state."""
        return [_LastState(), readout]

    def __str__(self) -> str:
        return "at the last step"


@dataclass(frozen=True, kw_only=True)
class EveryStep(Exit):
    """An answer at every step, (N, C, T), which is the layout of PyTorch's cross-entropy."""

    def build(self, readout: nn.Linear) -> list[nn.Module]:
        """Return the read-out of all states."""
        return [_AllStates(), readout, _ClassesSecond()]

    def __str__(self) -> str:
        return "at every step"


class _OneHot(nn.Module):
    identity: Tensor

    def __init__(self, symbols: int) -> None:
        super().__init__()
        # A buffer moves to the device and the floating-point type of the model.
        self.register_buffer("identity", torch.eye(symbols), persistent=False)

    def forward(self, symbols: Int[Tensor, "N T"]) -> Float[Tensor, "N T symbols"]:
        return functional.embedding(symbols, self.identity)


class _LastState(nn.Module):
    """Recurrent layers return (states at all steps, last state of each kind)."""

    def forward(self, returned: tuple[Float[Tensor, "N T H"], object]) -> Float[Tensor, "N H"]:
        return returned[0][:, -1]


class _AllStates(nn.Module):
    def forward(self, returned: tuple[Float[Tensor, "N T H"], object]) -> Float[Tensor, "N T H"]:
        return returned[0]


class _ClassesSecond(nn.Module):
    def forward(self, logits: Float[Tensor, "N T C"]) -> Float[Tensor, "N C T"]:
        return logits.transpose(1, 2)
