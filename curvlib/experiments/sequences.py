"""Sequences, and two generated problems that need a long memory: addition and copying.

Symbols: N sequences, T positions, C symbols. A new source of sequences is one subclass of :class:`SequenceSource`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlib.experiments.options import Bounds, check_options, option
from curvlib.experiments.sources import Baseline, Source

# The generated sequences belong to the problem: they must not move with the seed of a run.
_DATA_SEED = 19971115
_COUNT = Bounds(at_least=1)

# The copying problem of Arjovsky, Shah and Bengio (2016): ten of eight symbols; then the blank and the signal.
COPIED = 10
_ALPHABET = 8
BLANK = _ALPHABET
_SIGNAL = _ALPHABET + 1


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Sequences and what is to be answered to them.

    Args:
        inputs: numbers (N, T, features), or symbols (N, T) as integers.
        targets: (N, C) numbers at the end of the sequences, or symbols (N, T) at every position.
        symbols: size of the alphabet where the data decide it.
        fingerprint: what tells the data of a user from others.
    """

    inputs: Tensor
    targets: Tensor
    symbols: int | None = None
    fingerprint: str | None = None


class SequenceSource(Source[Sequences]):
    """A set of training sequences and a set of test sequences."""

    examples = "sequences"


@dataclass(frozen=True, kw_only=True)
class _Generated(SequenceSource):
    """What sources of generated sequences share.

    Args:
        train_sequences: number of training sequences.
        test_sequences: number of test sequences.
    """

    train_sequences: int = option(10_000, "generated for training", _COUNT)
    test_sequences: int = option(2000, "generated for tests", _COUNT)

    def __post_init__(self) -> None:
        check_options("problem", self)

    @property
    def sizes(self) -> tuple[int, int]:
        """As given."""
        return self.train_sequences, self.test_sequences

    @property
    def origin(self) -> str:
        """Generated."""
        return "generated"

    def load(self, path: Path | None) -> tuple[Sequences, Sequences]:
        """Return generated sequences, the same ones in every run; they are kept in memory only."""
        del path
        generator = torch.Generator().manual_seed(_DATA_SEED)
        return self._draw(self.train_sequences, generator), self._draw(self.test_sequences, generator)

    @abstractmethod
    def _draw(self, count: int, generator: torch.Generator) -> Sequences:
        """Return that many sequences."""


@dataclass(frozen=True, kw_only=True)
class Addition(_Generated):
    """Sequences of numbers, two of which are marked and to be added, see :func:`generate_addition`.

    Args:
        length: steps of a sequence T.
    """

    length: int = option(30, "steps of a sequence", Bounds(at_least=2))

    @property
    def baseline(self) -> Baseline:
        """The variance 1/6 of the sum of two independent numbers from U[0, 1]."""
        return Baseline(loss=1 / 6, answer="always answering 1, the mean")

    def _draw(self, count: int, generator: torch.Generator) -> Sequences:
        inputs, targets = generate_addition(count, self.length, generator)
        return Sequences(inputs=inputs, targets=targets)


def generate_addition(
    count: int, length: int, generator: torch.Generator
) -> tuple[Float[Tensor, "N T 2"], Float[Tensor, "N 1"]]:
    """Draw sequences of the addition problem (Hochreiter and Schmidhuber 1997, experiment 4).

    x_t = (v_t, m_t) with v_t ~ U[0, 1]; m_t is 1 at two positions, one in either half of the sequence and uniform
    there, and 0 elsewhere; the target is the sum of the two v_t with m_t = 1.

    Args:
        count: number of sequences N.
        length: steps T, at least 2.
        generator: source of all randomness, on the CPU.

    Returns:
        Inputs (N, T, 2) and targets (N, 1).

    All sequences have the same length, as in Arjovsky, Shah and Bengio (2016), who also place one mark in either half.
    Hochreiter and Schmidhuber draw the length from [T, 1.1 T], values from [-1, 1], and scale the sum to [0, 1].
    """
    values = torch.rand(count, length, generator=generator)
    half = length // 2
    first = torch.randint(half, (count,), generator=generator)
    second = torch.randint(half, length, (count,), generator=generator)
    marks = torch.zeros(count, length)
    rows = torch.arange(count)
    marks[rows, first] = 1
    marks[rows, second] = 1
    targets = (values[rows, first] + values[rows, second]).unsqueeze(1)
    return torch.stack([values, marks], dim=2), targets


@dataclass(frozen=True, kw_only=True)
class CopyMemory(_Generated):
    """Ten symbols that are to be reproduced after many blanks, see :func:`generate_copy`.

    Args:
        length: blanks T between the last symbol and the first one of the answer; the sequences have T + 20 positions.
    """

    length: int = option(10, "blanks between the symbols and their reproduction", _COUNT)

    @property
    def baseline(self) -> Baseline:
        """10 log 8 / (T + 20): T + 10 blanks are certain, ten symbols are guessed."""
        loss = COPIED * math.log(_ALPHABET) / (self.length + 2 * COPIED)
        return Baseline(loss=loss, answer="blanks, then guesses")

    def _draw(self, count: int, generator: torch.Generator) -> Sequences:
        inputs, targets = generate_copy(count, self.length, generator)
        return Sequences(inputs=inputs, targets=targets)


def generate_copy(
    count: int, length: int, generator: torch.Generator
) -> tuple[Int[Tensor, "N positions"], Int[Tensor, "N positions"]]:
    """Draw sequences of the copying problem (Arjovsky, Shah and Bengio 2016, sec. 5.1).

    The inputs are ten symbols, uniform on 0, ..., 7; T - 1 blanks (8); a signal (9); ten blanks. The targets are T + 10
    blanks and the ten symbols in their order. The problem goes back to Hochreiter and Schmidhuber (1997).

    Args:
        count: number of sequences N.
        length: T, at least 1.
        generator: source of all randomness, on the CPU.

    Returns:
        Inputs (N, T + 20) and targets (N, T + 20).
    """
    symbols = torch.randint(_ALPHABET, (count, COPIED), generator=generator)
    inputs = torch.full((count, length + 2 * COPIED), BLANK)
    inputs[:, :COPIED] = symbols
    inputs[:, COPIED + length - 1] = _SIGNAL
    targets = torch.full_like(inputs, BLANK)
    targets[:, -COPIED:] = symbols
    return inputs, targets
