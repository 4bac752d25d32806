"""What networks are trained to do with sequences: add, copy, and guess the next character."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from curvlib.experiments.sequences import COPIED, Sequences
from curvlib.experiments.tasks import Metric, Task

# Hochreiter and Schmidhuber (1997) call a sequence processed correctly below this error.
_TOLERANCE = 0.04


class ShareAdded(Metric):
    """Share of the sequences whose answer is off by less than 0.04 (Hochreiter and Schmidhuber 1997, experiment 4).

    Their sums are scaled to [0, 1] and those here are within [0, 2]: the same number is twice as strict here.
    """

    name = "share within 0.04"
    description = "share of the sequences whose sum is off by less than 0.04"
    higher_is_better = True

    def __call__(self, outputs: Float[Tensor, "N 1"], targets: Float[Tensor, "N 1"]) -> Float[Tensor, ""]:
        """Return the share."""
        return ((outputs - targets).abs() < _TOLERANCE).to(outputs.dtype).mean()


class ShareCopied(Metric):
    """Share of the ten symbols at the end of every sequence that are reproduced; guesses reach 1/8."""

    name = "share copied"
    description = "share of the symbols that are reproduced (guesses: 0.125)"
    higher_is_better = True

    def __call__(self, outputs: Float[Tensor, "N C T"], targets: Int[Tensor, "N T"]) -> Float[Tensor, ""]:
        """Return the share."""
        right = outputs[..., -COPIED:].argmax(dim=1) == targets[:, -COPIED:]
        return right.to(outputs.dtype).mean()


class BitsPerCharacter(Metric):
    """Cross-entropy to the base of 2, -(1/NT) sum_nt log2 p(y_nt)."""

    name = "bits per character"
    description = "bits per character"
    higher_is_better = False

    def __call__(self, outputs: Float[Tensor, "N C T"], targets: Int[Tensor, "N T"]) -> Float[Tensor, ""]:
        """Return the mean over the characters."""
        return functional.cross_entropy(outputs, targets) / math.log(2)


class SequenceTask(Task[Sequences]):
    """A task whose targets come with the sequences."""

    def targets(self, data: Sequences) -> Tensor:
        """Return the targets of the sequences."""
        return data.targets


@dataclass(frozen=True, kw_only=True)
class Sum(SequenceTask):
    """One number at the end of a sequence, squared error averaged over sequences."""

    metric = ShareAdded()
    loss_name = "squared error"

    def loss(self, data: Sequences) -> nn.Module:
        """Return a squared error."""
        del data
        return nn.MSELoss()


class _SymbolTask(SequenceTask):
    """A symbol at every position, cross-entropy averaged over sequences and positions."""

    loss_name = "cross-entropy"

    def loss(self, data: Sequences) -> nn.Module:
        """Return a cross-entropy, of logits (N, C, T) and symbols (N, T)."""
        del data
        return nn.CrossEntropyLoss()


@dataclass(frozen=True, kw_only=True)
class Reproduction(_SymbolTask):
    """Blanks, and in the end the symbols from the beginning."""

    metric = ShareCopied()


@dataclass(frozen=True, kw_only=True)
class NextCharacter(_SymbolTask):
    """The character that follows, at every position."""

    metric = BitsPerCharacter()
