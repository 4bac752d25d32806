"""What the parts of an optimizer look at during one step: the batch, its evaluation, and parts of it.

Symbols: N examples of the batch, g the gradient, lambda the damping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from curvlib.objective import Batch, Evaluation, Objective
from curvlib.output_losses import NoTargetsError


@dataclass(eq=False)
class Situation:
    """The objective on one batch at the current parameters, during one step.

    Attributes:
        objective: what is minimised.
        batch: the batch of the step.
        evaluation: the objective on the whole batch.
        gradient: g (D,).
        damping: lambda of this step.
        generator: where random choices come from.
        radius: Delta of this step, infinite where there is none.
        curvature_batch: the batch that the curvature is to be made of, None for parts of the step's batch.
        gradient_norm: the largest entry of g, by size.
        work_before: what the evaluation had cost before the step.
        damping_share: lambda over the first lambda; 1 where that is 0.
    """

    objective: Objective
    batch: Batch
    evaluation: Evaluation
    gradient: Float[Tensor, " D"]
    damping: float
    generator: torch.Generator
    radius: float = inf
    gradient_norm: float = 0.0
    curvature_batch: Batch | None = None
    damping_share: float = 1.0
    work_before: float = 0.0
    _parts: list[Evaluation] = field(default_factory=list)
    _curvature_parts: dict[float, Evaluation] = field(default_factory=dict)

    def curvature_part(self, fraction: float, *, linearize: bool) -> Evaluation:
        """Return the objective on the examples that the curvature is made of, once drawn the same for all who ask.

        The step's curvature batch, all of it, where there is one; otherwise :meth:`part`.

        Args:
            fraction: the part of the step's batch where there is no curvature batch.
            linearize: whether exact products are going to be asked for.

        Raises:
            ValueError: the loss is a sum, and the curvature batch has another number of examples than the batch.
        """
        key = fraction if self.curvature_batch is None else inf
        if key not in self._curvature_parts:
            self._curvature_parts[key] = (
                self.part(fraction, linearize=linearize)
                if self.curvature_batch is None
                else self._own(self.curvature_batch, linearize)
            )
        return self._curvature_parts[key]

    def _own(self, batch: Batch, linearize: bool) -> Evaluation:
        with self.evaluation.same_precision():
            own = self.objective.at(batch, linearize=linearize)
        if self.objective.loss.additive and own.examples != self.evaluation.examples:
            raise ValueError(
                f"a curvature_batch of {own.examples} examples does not go with a batch of {self.evaluation.examples} "
                "for a loss with reduction='sum', whose scale depends on the number of examples: use reduction='mean', "
                "or batches of one size."
            )
        self._parts.append(own)
        return own

    def part(self, fraction: float, *, linearize: bool) -> Evaluation:
        """Return the objective on a random part of the batch.

        The whole batch's evaluation, where the part is all of it or holds ignored targets alone.

        Args:
            fraction: the part, in (0, 1]; at least one example.
            linearize: whether exact products are going to be asked for.
        """
        N = self.evaluation.examples
        n = max(1, round(fraction * N))
        if n >= N:
            return self.evaluation
        chosen = torch.randperm(N, generator=self.generator, device=self.generator.device)[:n]
        try:
            with self.evaluation.same_precision():
                part = self.objective.at(take(self.batch, chosen, N), linearize=linearize)
        except NoTargetsError:
            return self.evaluation
        except ValueError as error:
            raise ValueError(
                f"a random part of the batch ({n} of {N} examples) could not be evaluated: {error} If the loss or the "
                "inputs hold one value for each example of the whole batch, take all of it (the fraction 1)."
            ) from error
        loss = self.objective.loss
        if not loss.additive and float(loss.batch_weight(part.outputs, part.targets)) == 0:
            return self.evaluation  # the same on devices where targets are not looked at beforehand
        self._parts.append(part)
        return part

    @property
    def work(self) -> float:
        """Forward and backward passes of this step so far, in gradients of the whole batch."""
        parts = sum(part.work * part.examples for part in self._parts) / self.evaluation.examples
        return self.evaluation.work - self.work_before + parts


def take(batch: Batch, examples: Tensor, N: int) -> Batch:
    """Return the chosen examples of a batch: of every tensor in it whose first dimension is N."""
    inputs, targets = batch
    return _take(inputs, examples, N), _take(targets, examples, N)


def _take(value: Any, examples: Tensor, N: int) -> Any:
    if isinstance(value, Tensor):
        return value[examples.to(value.device)] if value.ndim and value.shape[0] == N else value
    if isinstance(value, PackedSequence):
        padded, lengths = pad_packed_sequence(value, batch_first=True)
        chosen = examples.to(padded.device), examples.to(lengths.device)
        return pack_padded_sequence(padded[chosen[0]], lengths[chosen[1]], batch_first=True, enforce_sorted=False)
    if isinstance(value, Mapping):
        return {key: _take(item, examples, N) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = (_take(item, examples, N) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)  # named tuples take arguments
    return value


def check_fraction(owner: str, name: str, fraction: float) -> None:
    """Raise unless the fraction is a number with 0 < fraction <= 1."""
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise TypeError(f"{owner} needs {name} to be a number, got {fraction!r}.")
    if not 0 < fraction <= 1:
        raise ValueError(f"{owner} needs 0 < {name} <= 1, got {fraction!r}.")


def loaded_generator(state: Tensor, device: torch.device) -> torch.Generator:
    """Return a random generator on a device in a saved state.

    Raises:
        ValueError: the state is none of a generator there.
    """
    generator = torch.Generator(device)
    try:
        generator.set_state(state.cpu())
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"the state of the random generator does not fit this device: {error}") from error
    return generator
