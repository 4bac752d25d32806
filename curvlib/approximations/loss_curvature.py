"""The exact curvature of a loss on one batch or over a loader, for what uses it more than once.

Symbols: D parameters, K columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from math import isfinite
from typing import Generic, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from curvlib.approximations.base import check_repeatable, weighted_evaluations
from curvlib.approximations.joint import OutputProducts
from curvlib.approximations.statistics import NonFiniteStatisticsError
from curvlib.matrices import CurvatureMatrix, Products
from curvlib.objective import Batch, Evaluation, Objective, StaleEvaluationError
from curvlib.operators import LinearOperator, MatrixFree

# float32 sums over batches in another order differ by about 1e-7 sqrt(batches); other data differ by far more.
_SAME_VALUE = 1e-4


class BatchProducts(Protocol):
    """What gives the products of one evaluation: a curvature matrix, or something else with these two."""

    @property
    def draws(self) -> bool:
        """Whether the products depend on random draws."""

    def products(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Products:
        """Return the products of one evaluation."""


Matrix = TypeVar("Matrix", bound=BatchProducts)


class LossCurvature(ABC, Generic[Matrix]):
    """The curvature of the loss on some data, without the l2 term; whatever is drawn is the same at every use.

    Attributes:
        objective: whose loss.
        matrix: which curvature matrix of it.
    """

    objective: Objective
    matrix: Matrix

    @abstractmethod
    def parts(self) -> Iterator[tuple[Evaluation, Tensor, torch.Generator | None]]:
        """Yield each batch's evaluation, its share of the loss, and where its random draws come from."""

    def total(self, part: Callable[[Evaluation, torch.Generator | None], Tensor]) -> Tensor:
        """Return the sum of a quantity on the scale of the loss over all batches."""
        total: Tensor | None = None
        for evaluation, share, draws in self.parts():
            weighted = share * part(evaluation, draws)
            total = weighted if total is None else total + weighted
        assert total is not None  # there is a batch, or the constructor would have raised
        return total

    def operator(self) -> LinearOperator:
        """Return the matrix-free operator."""
        layout = self.objective.layout
        return MatrixFree(self._matmat, layout.size, layout.dtype, layout.device, quadratic_form=self._quadratic_form)

    def _matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self.total(lambda evaluation, draws: _by_columns(self.matrix.products(evaluation, draws).product, V))

    def _quadratic_form(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "K K"]:
        return self.total(lambda evaluation, draws: self.matrix.products(evaluation, draws).quadratic_form(V))


class OnEvaluation(LossCurvature[CurvatureMatrix]):
    """On the batch of one evaluation.

    Raises:
        NonFiniteStatisticsError: the objective is NaN or infinite there.
    """

    def __init__(self, evaluation: Evaluation, matrix: CurvatureMatrix, generator: torch.Generator | None) -> None:
        check_finite(matrix, float(evaluation.value))
        self.objective, self.matrix, self._evaluation = evaluation.objective, matrix, evaluation
        self._seed = drawn_seed(generator) if matrix.draws else None

    def parts(self) -> Iterator[tuple[Evaluation, Tensor, torch.Generator | None]]:
        """Yield the evaluation."""
        draws = None
        if self._seed is not None:
            draws = torch.Generator(self._evaluation.layout.device).manual_seed(self._seed)
        yield self._evaluation, self._evaluation.value.new_ones(()), draws

    def operator(self) -> LinearOperator:
        """Return the matrix-free operator, which makes what does not depend on the vectors once."""
        ((evaluation, _, draws),) = self.parts()
        return OutputProducts(evaluation, self.matrix.products(evaluation, draws))


class OverLoader(LossCurvature[Matrix]):
    """On all batches of a loader together, batch by batch at every use, with a check that nothing changes.

    Args:
        batch_weight: how much a batch counts in a mean over batches; by default the loss's own weight.

    Raises:
        TypeError: the loader can be iterated once only.
        ValueError: the loader gives no batch.
        NonFiniteStatisticsError: the objective is NaN or infinite on a batch.
    """

    def __init__(
        self,
        objective: Objective,
        matrix: Matrix,
        loader: Iterable[Batch],
        generator: torch.Generator | None,
        progress: bool,
        batch_weight: Callable[[Evaluation], Tensor] | None = None,
    ) -> None:
        check_repeatable(f"estimate_over with exact products of {matrix!r}", loader)
        self._batch_weight = batch_weight
        self.objective, self.matrix, self._loader = objective, matrix, loader
        self._device = objective.layout.device
        self._seed = drawn_seed(generator)
        self._versions = self._parameter_versions()
        bar = tqdm(loader, desc="objective over the data", disable=not progress, unit="batch")
        seen = [(evaluation.value, weight) for evaluation, weight in self._evaluations(bar)]
        self._values = [(float(value), float(weight)) for value, weight in seen]
        for value, _ in self._values:
            check_finite(matrix, value)
        if not self._values:
            raise ValueError("estimate_over needs a loader with at least one batch, got none.")
        self._divisor = 1.0 if objective.loss.additive else torch.stack([weight for _, weight in seen]).sum()

    def parts(self) -> Iterator[tuple[Evaluation, Tensor, torch.Generator | None]]:
        """Yield every batch.

        Raises:
            StaleEvaluationError: the parameters have changed.
            RuntimeError: (at the end) the loader or the model gives another objective value than at first.
        """
        if self._parameter_versions() != self._versions:
            raise StaleEvaluationError(
                "the parameters have changed since estimate_over: call it again for the curvature at new ones."
            )
        seen = []
        for number, (evaluation, weight) in enumerate(self._evaluations(self._loader)):
            yield evaluation, weight / self._divisor, torch.Generator(self._device).manual_seed(self._seed + number)
            seen.append((evaluation.value, weight))
        self._check_same([(float(value), float(weight)) for value, weight in seen])

    def _evaluations(self, loader: Iterable[Batch]) -> Iterator[tuple[Evaluation, Tensor]]:
        for evaluation, weight in weighted_evaluations(self.objective, loader):
            yield evaluation, weight if self._batch_weight is None else self._batch_weight(evaluation)

    def _check_same(self, values: list[tuple[float, float]]) -> None:
        """Batches in another order are the same data, unless draws belong to a batch's number."""
        if self.matrix.draws:
            before, now = [value for value, _ in self._values], [value for value, _ in values]
        else:
            before, now = [self._objective_value(self._values)], [self._objective_value(values)]
        same = len(before) == len(now) and all(
            abs(a - b) <= _SAME_VALUE * max(abs(a), abs(b)) for a, b in zip(before, now, strict=True)
        )
        if not same:
            raise RuntimeError(
                "the loader or the model gave another objective value than at first, so the products are not those of "
                "one matrix. Use a fixed order without augmentation, and model.eval() (or no dropout)."
            )

    def _objective_value(self, values: list[tuple[float, float]]) -> float:
        """The objective on all batches together, up to its l2 term."""
        total = sum(value * weight for value, weight in values)
        return total if self.objective.loss.additive else total / (sum(weight for _, weight in values) or 1.0)

    def _parameter_versions(self) -> list[tuple[int, int]]:
        return [(parameter._version, parameter.data_ptr()) for parameter in self.objective.parameters]


def check_finite(what: object, value: float) -> None:
    """Raise NonFiniteStatisticsError unless the objective is finite."""
    if not isfinite(value):
        raise NonFiniteStatisticsError(
            f"{what!r} cannot be made of a batch where the objective is {value}: look for NaN or overflow in inputs, "
            "targets and parameters."
        )


def drawn_seed(generator: torch.Generator | None) -> int:
    """Return a seed, drawn from the generator."""
    device = generator.device if generator is not None else "cpu"
    return int(torch.randint(2**62, (), generator=generator, device=device))


def _by_columns(product: Callable[[Tensor], Tensor], V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
    return torch.stack([product(v) for v in V.T.contiguous()], dim=1)
