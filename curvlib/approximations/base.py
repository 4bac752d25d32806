"""What an approximation is: a statistic of a curvature matrix, estimated on batches, that makes a linear operator.

Symbols: D parameters, N examples, h the objective, eta its l2 weight. Every estimate is the curvature of h: for a mean
over several batches it is the curvature of the loss on all of them together, plus eta I once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from math import isfinite
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from curvlib.approximations.arithmetic import Terms, Weighable
from curvlib.approximations.description import BlockRow, Description
from curvlib.approximations.statistics import NonFiniteStatisticsError, Statistics
from curvlib.extensions import LayerPlan
from curvlib.objective import Batch, Evaluation, Objective
from curvlib.operators import LinearOperator, Scaled, Shifted, Sum, full_precision
from curvlib.operators.structure import remove_shift
from curvlib.output_losses import NoTargetsError


class Approximation(Weighable):
    """A way to keep a part of a curvature matrix; a frozen value without state.

    Example:
        >>> import curvlib
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> evaluation = objective.at((torch.ones(4, 3), torch.zeros(4, 2)))
        >>> curvlib.approximations.KFAC(curvlib.GGN()).estimate(evaluation).shape
        (8, 8)

    Weighted sums of approximations are approximations, such as ``0.9 * KFAC(GGN()) + 0.1 * Diagonal(GGN())``, also
    by ``A - B``, ``A / 2`` and ``sum([A, B])``: see :class:`WeightedSum`.
    """

    # Whether the l2 term is part of the estimates, as in every curvature of the objective.
    includes_l2: ClassVar[bool] = True

    def _terms(self) -> Terms:
        return ((1.0, self),)

    def _sum_of(self, terms: Terms) -> Approximation:
        return weighted_sum(*terms)

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

    @property
    def may_be_indefinite(self) -> bool:
        """Whether estimates may have negative eigenvalues beyond rounding. Default: those of ``Hessian()`` may.

        Directions and descents that need a positive definite C + damping I refuse such approximations.
        """
        return not getattr(getattr(self, "matrix", None), "has_vectors", True)

    @property
    def follows_steps(self) -> bool:
        """Whether it learns from the steps of an optimizer, by its running average. Default: from batches alone."""
        return False

    def check(self, objective: Objective) -> None:
        """Refuse an objective that the approximation cannot treat, before any computation."""


class StatisticalApproximation(Approximation):
    """An approximation that is a function of statistics which average over batches."""

    @property
    def averages(self) -> bool:
        """Whether statistics of different batches add up. Default: they do."""
        return True

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
            statistics = self.statistics(evaluation, generator)
            statistics = finite_statistics(type(self).__name__, statistics, float(evaluation.value))
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
        return self.operator(
            objective, statistics_over(self, objective, loader, generator, type(self).__name__, progress)
        )


def adds_up(approximation: object) -> bool:
    """Return whether an approximation has statistics whose averages over batches make sense."""
    return isinstance(approximation, StatisticalApproximation) and approximation.averages


def statistics_over(
    approximation: StatisticalApproximation,
    objective: Objective,
    loader: Iterable[Batch],
    generator: torch.Generator | None,
    name: str,
    progress: bool,
) -> Statistics:
    """Return the statistics of all batches together.

    Args:
        approximation: what to make of each batch.
        objective: the objective.
        loader: an iterable of batches.
        generator: where random draws come from.
        name: of the approximation that the user asked for.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: the loader gives no batch.
        NonFiniteStatisticsError: the statistics hold NaN or infinity.
    """
    total, examples, weight = None, 0, torch.zeros((), dtype=objective.layout.dtype, device=objective.layout.device)
    bar = tqdm(loader, desc=f"{name} statistics", disable=not progress, unit="batch")
    for evaluation, batch_weight in weighted_evaluations(objective, bar):
        part = approximation.statistics(evaluation, generator).times(evaluation.counted_examples, batch_weight)
        total = part if total is None else total + part
        examples, weight = examples + evaluation.counted_examples, weight + batch_weight
    if total is None:
        raise ValueError("estimate_over needs a loader with at least one batch, got none.")
    mean = total.times(1 / max(examples, 1), 1.0 if objective.loss.additive else 1 / weight)
    return finite_statistics(name, mean, None)


def finite_statistics(name: str, statistics: Statistics, value: float | None) -> Statistics:
    """Return the statistics after checking that they are finite.

    Args:
        name: of the approximation.
        statistics: to be checked.
        value: of the objective on their batch, None for several batches.

    Raises:
        NonFiniteStatisticsError: the statistics hold NaN or infinity.
    """
    if statistics.is_finite():
        return statistics
    where = "on these data" if value is None else f"on a batch where the objective is {value}"
    raise NonFiniteStatisticsError(
        f"the statistics of {name} are not finite {where}: look for NaN or overflow in inputs, "
        "targets and parameters. (MovingAverage leaves such batches out and counts them.)"
    )


def with_l2(operator: LinearOperator, objective: Objective) -> LinearOperator:
    """Return C + eta I, the curvature of the objective with its l2 term."""
    return Shifted(operator, objective.l2) if objective.l2 > 0 else operator


def check_repeatable(what: str, loader: Iterable[Batch]) -> None:
    """Raise TypeError for a loader that can be iterated once only."""
    if iter(loader) is loader:
        raise TypeError(
            f"{what} runs through the loader several times, but this one can be iterated once only: give a list or a "
            "DataLoader instead of an iterator."
        )


def weighted_evaluations(objective: Objective, loader: Iterable[Batch]) -> Iterator[tuple[Evaluation, Tensor]]:
    """Yield the evaluation of every batch that has a target, and its weight in the whole."""
    for batch in loader:
        try:
            evaluation = objective.at(batch, linearize=False)
        except NoTargetsError:
            continue  # all of its targets are ignored: it has no weight in the whole
        weight = objective.loss.batch_weight(evaluation.outputs, evaluation.targets)
        if float(weight) != 0:  # the same on devices where targets are not looked at beforehand
            yield evaluation, weight


@dataclass(frozen=True, repr=False)
class WeightedSum(Approximation):
    """sum_i w_i C_i + eta I: approximations C_i of the loss's curvature with weights, the l2 term counted once.

    Made by ``2.0 * KFAC(GGN()) + Exact(Hessian())``. The parts draw their random numbers one after another: two parts
    of ``Fisher()`` have labels of their own. Where all parts have statistics that average, the sum has them too: see
    :class:`StatisticalWeightedSum`.

    Args:
        parts: pairs (w_i, approximation), the weights finite and of any sign.

    Raises:
        TypeError: a part is no such pair.
        ValueError: a weight is not finite, or there is no part.

    Example:
        >>> import curvlib
        >>> from curvlib.approximations import KFAC, Exact
        >>> 0.5 * (KFAC(curvlib.GGN()) + 2.0 * Exact(curvlib.Hessian()))
        0.5 * KFAC(matrix=GGN(), on_unsupported='raise', weight_sharing=Expand()) + 1.0 * Exact(matrix=Hessian())
    """

    parts: tuple[tuple[float, Approximation], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(tuple(part) for part in self.parts))
        if not self.parts:
            raise ValueError(f"{type(self).__name__} needs at least one pair (weight, approximation), got none.")
        for weight, part in self.parts:
            if not isinstance(part, self._kind()) or (self._kind() is StatisticalApproximation and not adds_up(part)):
                raise TypeError(f"{type(self).__name__} needs parts of type {self._kind().__name__}, got {part!r}.")
            if isinstance(weight, bool) or not isinstance(weight, Real) or not isfinite(weight):
                raise ValueError(f"{type(self).__name__} needs finite weights, got {weight!r} for {part!r}.")

    @classmethod
    def _kind(cls) -> type[Approximation]:
        return Approximation

    def estimate(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> LinearOperator:
        """Return the weighted sum of the parts' operators."""
        operators = [part.estimate(evaluation, generator) for _, part in self.parts]
        return self.combined(operators, evaluation.objective)

    def estimate_over(
        self,
        objective: Objective,
        loader: Iterable[Batch],
        generator: torch.Generator | None = None,
        *,
        progress: bool = True,
    ) -> LinearOperator:
        """Return the weighted sum of the parts' operators over the loader, which each part runs through by itself.

        Raises:
            TypeError: the loader can be iterated once only.
        """
        self.check(objective)
        check_repeatable("estimate_over of a weighted sum", loader)
        operators = [part.estimate_over(objective, loader, generator, progress=progress) for _, part in self.parts]
        return self.combined(operators, objective)

    def describe(self, objective: Objective, plan: LayerPlan | None = None) -> Description:
        """Return for each parameter the blocks of all parts."""
        tables = [part.describe(objective, plan).rows for _, part in self.parts]
        rows = []
        for together in zip(*tables, strict=True):
            blocks = [f"{weight:g} x ({row.block})" for (weight, _), row in zip(self.parts, together, strict=True)]
            first, reasons = together[0], dict.fromkeys(row.reason for row in together)
            layer = next((row for row in together if row.layer != "-"), first)
            rows.append(
                BlockRow(first.parameter, first.shape, layer.layer, layer.calls, " + ".join(blocks), "; ".join(reasons))
            )
        return Description(repr(self), tuple(rows))

    def check(self, objective: Objective) -> None:
        """Refuse what one of the parts refuses."""
        for _, part in self.parts:
            part.check(objective)

    @property
    def may_be_indefinite(self) -> bool:
        """Whether a weight is negative or a part may be indefinite."""
        return any(weight < 0 or part.may_be_indefinite for weight, part in self.parts)

    @property
    def follows_steps(self) -> bool:
        """Whether a part does."""
        return any(part.follows_steps for _, part in self.parts)

    def _terms(self) -> Terms:
        return self.parts

    def combined(self, operators: list[LinearOperator], objective: Objective) -> LinearOperator:
        """Return the weighted sum of the parts' operators, the l2 term included once."""
        terms = []
        for (weight, part), operator in zip(self.parts, operators, strict=True):
            term = remove_shift(operator, objective.l2) if part.includes_l2 else operator
            terms.append(term if weight == 1.0 else Scaled(weight, term))
        return with_l2(terms[0] if len(terms) == 1 else Sum(tuple(terms)), objective)

    def __repr__(self) -> str:
        return " + ".join(f"{weight!r} * {part!r}" for weight, part in self.parts)


class StatisticalWeightedSum(WeightedSum, StatisticalApproximation):
    """A :class:`WeightedSum` of approximations whose statistics average: with MovingAverage, and in one pass over data.

    The weights multiply the operators, not the statistics, so that products of statistics such as K-FAC's count once.
    """

    @classmethod
    def _kind(cls) -> type[Approximation]:
        return StatisticalApproximation

    estimate = StatisticalApproximation.estimate
    estimate_over = StatisticalApproximation.estimate_over

    def statistics(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Statistics:
        """Return the statistics of all parts, each under the number of its part."""
        named = [part.statistics(evaluation, generator).renamed(f"{i}: ".__add__) for i, part in self._numbered()]
        return reduce(Statistics.joined, named)

    def operator(self, objective: Objective, statistics: Statistics) -> LinearOperator:
        """Return the weighted sum of the parts' operators."""
        operators = [part.operator(objective, statistics.under(f"{i}: ")) for i, part in self._numbered()]
        return self.combined(operators, objective)

    def _numbered(self) -> Iterator[tuple[int, StatisticalApproximation]]:
        for i, (_, part) in enumerate(self.parts):
            assert isinstance(part, StatisticalApproximation)  # checked at construction
            yield i, part


def weighted_sum(*parts: tuple[float, Approximation]) -> WeightedSum:
    """Return the sum with weights, with statistics where all parts have them."""
    statistical = all(adds_up(part) for _, part in parts)
    return (StatisticalWeightedSum if statistical else WeightedSum)(parts)
