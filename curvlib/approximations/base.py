"""What an approximation is: a statistic of a curvature matrix, estimated on batches, that makes a linear operator.

Symbols: D parameters, N examples, h the objective, eta its l2 weight. Every estimate is the curvature of h: for a mean
over several batches it is the curvature of the loss on all of them together, plus eta I once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from curvlib.extensions import LayerPlan
from curvlib.objective import Batch, Evaluation, Objective
from curvlib.operators import LinearOperator, Shifted, full_precision
from curvlib.output_losses import NoTargetsError


@dataclass(frozen=True)
class BlockRow:
    """One line of a description: a parameter, where it belongs and how often that is called, its block, and why."""

    parameter: str
    shape: tuple[int, ...]
    layer: str
    calls: str
    block: str
    reason: str


@dataclass(frozen=True)
class Description:
    """Which block each parameter gets; ``str()`` is a table."""

    approximation: str
    rows: tuple[BlockRow, ...]

    def __str__(self) -> str:
        head = ("parameter", "shape", "layer", "calls", "block", "why")
        lines = [(row.parameter, _shape(row.shape), row.layer, row.calls, row.block, row.reason) for row in self.rows]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [head, *lines]
        ]
        return "\n".join([self.approximation, table[0], "  ".join("-" * width for width in widths), *table[1:]])


@dataclass(frozen=True, eq=False)
class Statistics:
    """Tensors that add up over batches, each kind with its own weights.

    A vector over the lags of time series may be longer in one batch than in another: behind its end it is zero.

    Attributes:
        means: averages over examples (K-FAC's A): batches count by their number of examples.
        sums: quantities on the objective's scale (K-FAC's G, a diagonal): batches count by their part of the objective.
    """

    means: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def times(self, mean_weight: float | Tensor, sum_weight: float | Tensor) -> Statistics:
        """Return the statistics with the two kinds multiplied by a factor each."""
        return Statistics(
            {key: mean_weight * value for key, value in self.means.items()},
            {key: sum_weight * value for key, value in self.sums.items()},
        )

    def __add__(self, other: Statistics) -> Statistics:
        if self.means.keys() != other.means.keys() or self.sums.keys() != other.sums.keys():
            wrong = sorted((self.means.keys() ^ other.means.keys()) | (self.sums.keys() ^ other.sums.keys()))
            raise ValueError(f"statistics of different layers cannot be added; only one side has {', '.join(wrong)}.")
        return Statistics(
            {key: _plus(value, other.means[key]) for key, value in self.means.items()},
            {key: _plus(value, other.sums[key]) for key, value in self.sums.items()},
        )

    def is_finite(self) -> bool:
        """Whether all entries are finite. Waits for the device once."""
        finite = [value.isfinite().all() for value in (*self.means.values(), *self.sums.values())]
        return bool(torch.stack(finite).all()) if finite else True


class NonFiniteStatisticsError(ArithmeticError):
    """The statistics of a batch hold NaN or infinity, so that they make no curvature matrix."""


class Approximation(ABC):
    """A way to keep a part of a curvature matrix; a frozen value without state.

    Example:
        >>> import curvlib
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> evaluation = objective.at((torch.ones(4, 3), torch.zeros(4, 2)))
        >>> curvlib.approximations.KFAC(curvlib.GGN()).estimate(evaluation).shape
        (8, 8)
    """

    @abstractmethod
    def estimate(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> LinearOperator:
        """Return the operator (D, D) of one evaluation, the l2 term included.

        Args:
            evaluation: the objective on a batch, at the current parameters.
            generator: where random draws come from; None is PyTorch's global generator.
        """

    @abstractmethod
    def estimate_over(
        self,
        objective: Objective,
        loader: Iterable[Batch],
        generator: torch.Generator | None = None,
        *,
        progress: bool = True,
    ) -> LinearOperator:
        """Return the operator of the loss on all batches together, at the current parameters.

        With reduction "mean" batches count by what the loss divides by, with "sum" they add up; so the result is that
        of one large batch. Averages over examples take the examples of which a target counts, and count batches by the
        number of these; K-FAC's A is a mean over all positions of all batches.

        Args:
            objective: the objective.
            loader: an iterable of batches.
            generator: where random draws come from.
            progress: show a progress bar on standard error.

        Raises:
            ValueError: the loader gives no batch.
        """

    @abstractmethod
    def describe(self, objective: Objective, plan: LayerPlan | None = None) -> Description:
        """Return which block each parameter gets, and why.

        Args:
            objective: the objective.
            plan: the layers of an evaluation; None takes what the model alone shows.
        """

    def check(self, objective: Objective) -> None:  # noqa: B027 - most approximations accept every model
        """Refuse an objective that the approximation cannot treat, before any computation."""


class StatisticalApproximation(Approximation):
    """An approximation that is a function of statistics which average over batches."""

    @abstractmethod
    def statistics(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Statistics:
        """Return the statistics of one batch, without the l2 term."""

    @abstractmethod
    def operator(self, objective: Objective, statistics: Statistics) -> LinearOperator:
        """Return the operator that statistics make, the l2 term included."""

    def estimate(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> LinearOperator:
        """Return the operator of one batch's statistics.

        Raises:
            NonFiniteStatisticsError: the statistics hold NaN or infinity.
        """
        with full_precision(evaluation.layout.device):
            statistics = self._finite(self.statistics(evaluation, generator), float(evaluation.value))
            return self.operator(evaluation.objective, statistics)

    def estimate_over(
        self,
        objective: Objective,
        loader: Iterable[Batch],
        generator: torch.Generator | None = None,
        *,
        progress: bool = True,
    ) -> LinearOperator:
        """Return the operator of the statistics of all batches."""
        self.check(objective)
        total, examples, weight = None, 0, torch.zeros((), dtype=objective.layout.dtype, device=objective.layout.device)
        for batch in tqdm(loader, desc=f"{type(self).__name__} statistics", disable=not progress, unit="batch"):
            try:
                evaluation = objective.at(batch, linearize=False)
            except NoTargetsError:
                continue  # all of its targets are ignored: it has no weight in the whole
            batch_weight = objective.loss.batch_weight(evaluation.outputs, evaluation.targets)
            if float(batch_weight) == 0:
                continue  # the same on devices where targets are not looked at beforehand
            part = self.statistics(evaluation, generator).times(evaluation.counted_examples, batch_weight)
            total = part if total is None else total + part
            examples, weight = examples + evaluation.counted_examples, weight + batch_weight
        if total is None:
            raise ValueError("estimate_over needs a loader with at least one batch, got none.")
        mean = total.times(1 / max(examples, 1), 1.0 if objective.loss.additive else 1 / weight)
        return self.operator(objective, self._finite(mean, None))

    def _finite(self, statistics: Statistics, value: float | None) -> Statistics:
        if statistics.is_finite():
            return statistics
        where = "on these data" if value is None else f"on a batch where the objective is {value}"
        raise NonFiniteStatisticsError(
            f"the statistics of {type(self).__name__} are not finite {where}: look for NaN or overflow in inputs, "
            "targets and parameters. (MovingAverage leaves such batches out and counts them.)"
        )


def _plus(value: Tensor, other: Tensor) -> Tensor:
    if value.ndim == 1 and len(value) != len(other):
        short, long = sorted((value, other), key=len)
        return long + functional.pad(short, (0, len(long) - len(short)))
    return value + other


def with_l2(operator: LinearOperator, objective: Objective) -> LinearOperator:
    """Return C + eta I, the curvature of the objective with its l2 term."""
    return Shifted(operator, objective.l2) if objective.l2 > 0 else operator


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
