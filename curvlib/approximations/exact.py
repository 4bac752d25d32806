"""The exact curvature, matrix-free or dense.

Symbols: D parameters, K columns, J the Jacobian of the outputs, M the matrix in output space, eta the objective's l2
weight: C = J^T M J + eta I.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from curvlib.approximations.base import (
    Approximation,
    BlockRow,
    Description,
    NonFiniteStatisticsError,
    StatisticalApproximation,
    Statistics,
    with_l2,
)
from curvlib.approximations.joint import OutputProducts
from curvlib.extensions import LayerPlan
from curvlib.matrices import CurvatureMatrix, Products
from curvlib.objective import Batch, Evaluation, Objective, StaleEvaluationError
from curvlib.operators import Dense as DenseOperator
from curvlib.operators import LinearOperator, MatrixFree
from curvlib.output_losses import NoTargetsError

# float32 sums over batches in another order differ by about 1e-7 sqrt(batches); other data differ by far more.
_SAME_VALUE = 1e-4


@dataclass(frozen=True)
class Exact(Approximation):
    """The curvature matrix itself, by products: C v = J^T M (J v) + eta v.

    On one evaluation, J v is one backward pass through the kept graph of J^T u and J^T one ordinary backward pass:
    1.2 to 1.3 gradients a product. Quadratic forms need J v alone. Over a loader, every product runs through all
    batches, each with a forward pass of its own.

    Args:
        matrix: ``GGN()``, ``Fisher()`` (the draws are made once and kept), ``EmpiricalFisher()`` or ``Hessian()``.
    """

    matrix: CurvatureMatrix

    def __post_init__(self) -> None:
        check_matrix(self, self.matrix)

    def estimate(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> LinearOperator:
        """Return the matrix-free operator of one evaluation; it holds the evaluation and its graph.

        Raises:
            NonFiniteStatisticsError: the objective is NaN or infinite on the batch.
        """
        check_finite(self, float(evaluation.value))
        products = self.matrix.products(evaluation, generator)
        return with_l2(OutputProducts(evaluation, products), evaluation.objective)

    def estimate_over(
        self,
        objective: Objective,
        loader: Iterable[Batch],
        generator: torch.Generator | None = None,
        *,
        progress: bool = True,
    ) -> LinearOperator:
        """Return an operator that runs through the loader at each product.

        The loader must be iterable again and again with the same data; for ``Fisher()`` in the same batches, since the
        draws of a batch are repeated by its number.

        Raises:
            ValueError: the loader gives no batch.
            StaleEvaluationError: (at a product) the parameters have changed.
            RuntimeError: (at a product) the loader or the model gives another objective value than at first.
        """
        sweep = Sweep(objective, self.matrix, loader, generator, progress)
        operator = MatrixFree(
            sweep.matmat,
            objective.layout.size,
            objective.layout.dtype,
            objective.layout.device,
            quadratic_form=sweep.quadratic_form,
        )
        return with_l2(operator, objective)

    def describe(self, objective: Objective, plan: LayerPlan | None = None) -> Description:
        """All parameters are in one exact block."""
        return whole_matrix(self, objective, "exact, matrix-free")


@dataclass(frozen=True)
class Dense(StatisticalApproximation):
    """The curvature matrix itself as a (D, D) tensor, by D exact products: for small models and as an oracle.

    Args:
        matrix: any curvature matrix.
    """

    matrix: CurvatureMatrix

    def __post_init__(self) -> None:
        check_matrix(self, self.matrix)

    def statistics(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Statistics:
        """Return the matrix without the l2 term."""
        evaluation.check_fresh()
        product = self.matrix.products(evaluation, generator).product
        size, dtype, device = evaluation.layout.size, evaluation.layout.dtype, evaluation.layout.device
        columns = MatrixFree(product, size, dtype, device, columnwise=True).to_dense()
        return Statistics(sums={"matrix": 0.5 * (columns + columns.T)})

    def operator(self, objective: Objective, statistics: Statistics) -> LinearOperator:
        """Return the dense operator."""
        return with_l2(DenseOperator(statistics.sums["matrix"]), objective)

    def describe(self, objective: Objective, plan: LayerPlan | None = None) -> Description:
        """All parameters are in one exact block."""
        return whole_matrix(self, objective, "exact, dense")


class BatchProducts(Protocol):
    """What gives the products of one evaluation: a curvature matrix, or something else with these two."""

    @property
    def draws(self) -> bool:
        """Whether the products depend on random draws."""

    def products(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Products:
        """Return the products of one evaluation."""


class Sweep:
    """Products with the curvature of a loss over a loader, batch by batch, with a check that nothing changes.

    Args:
        batch_weight: how much a batch counts in a mean over batches; by default the loss's own weight.
    """

    def __init__(
        self,
        objective: Objective,
        matrix: BatchProducts,
        loader: Iterable[Batch],
        generator: torch.Generator | None,
        progress: bool,
        batch_weight: Callable[[Evaluation], Tensor] | None = None,
    ) -> None:
        if iter(loader) is loader:
            raise TypeError(
                "estimate_over runs through the loader at each product, but this one can be iterated once only: "
                "give a list or a DataLoader instead of an iterator."
            )
        self._objective, self._matrix, self._loader = objective, matrix, loader
        self._batch_weight = batch_weight if batch_weight is not None else _weight_in_loss
        self._device = objective.layout.device
        seed_device = generator.device if generator is not None else "cpu"
        self._seed = int(torch.randint(2**62, (), generator=generator, device=seed_device))
        self._versions = self._parameter_versions()
        bar = tqdm(loader, desc="objective over the data", disable=not progress, unit="batch")
        self._values = [(float(evaluation.value), float(weight)) for evaluation, weight in self._evaluations(bar)]
        for value, _ in self._values:
            check_finite(matrix, value)
        if not self._values:
            raise ValueError("estimate_over needs a loader with at least one batch, got none.")

    def matmat(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """Return C V, without the l2 term."""
        return self._total(lambda evaluation, draws: _by_columns(self._matrix.products(evaluation, draws).product, V))

    def quadratic_form(self, V: Float[Tensor, "D K"]) -> Float[Tensor, "K K"]:
        """Return V^T C V, without the l2 term."""
        return self._total(lambda evaluation, draws: self._matrix.products(evaluation, draws).quadratic_form(V))

    def _total(self, part: Callable[[Evaluation, torch.Generator], Tensor]) -> Tensor:
        if self._parameter_versions() != self._versions:
            raise StaleEvaluationError(
                "the parameters have changed since estimate_over: call it again for the curvature at new ones."
            )
        total: Tensor | None = None
        weights, values = [], []
        for number, (evaluation, batch_weight) in enumerate(self._evaluations(self._loader)):
            draws = torch.Generator(self._device).manual_seed(self._seed + number)
            weighted = batch_weight * part(evaluation, draws)
            total = weighted if total is None else total + weighted
            weights.append(batch_weight)
            values.append(evaluation.value)
        self._check_same([(float(value), float(weight)) for value, weight in zip(values, weights, strict=True)])
        assert total is not None  # _check_same has seen that there are as many batches as at first
        return total if self._objective.loss.additive else total / torch.stack(weights).sum()

    def _evaluations(self, loader: Iterable[Batch]) -> Iterator[tuple[Evaluation, Tensor]]:
        for batch in loader:
            try:
                evaluation = self._objective.at(batch, linearize=False)
            except NoTargetsError:
                continue  # all of its targets are ignored: it has no weight in the whole
            # the same on devices where targets are not looked at beforehand
            if float(_weight_in_loss(evaluation)) != 0:
                yield evaluation, self._batch_weight(evaluation)

    def _check_same(self, values: list[tuple[float, float]]) -> None:
        """Batches in another order are the same data, unless draws belong to a batch's number."""
        if self._matrix.draws:
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
        return total if self._objective.loss.additive else total / sum(weight for _, weight in values)

    def _parameter_versions(self) -> list[tuple[int, int]]:
        return [(parameter._version, parameter.data_ptr()) for parameter in self._objective.parameters]


def _weight_in_loss(evaluation: Evaluation) -> Float[Tensor, ""]:
    return evaluation.objective.loss.batch_weight(evaluation.outputs, evaluation.targets)


def check_matrix(approximation: Approximation, matrix: object) -> None:
    """Raise TypeError unless ``matrix`` is a curvature matrix."""
    if not isinstance(matrix, CurvatureMatrix):
        raise TypeError(
            f"{type(approximation).__name__} needs a curvature matrix such as curvlib.GGN() or curvlib.Fisher(), "
            f"got {matrix!r}."
        )


def check_finite(what: object, value: float) -> None:
    """Raise NonFiniteStatisticsError unless the objective is finite."""
    if not isfinite(value):
        raise NonFiniteStatisticsError(
            f"{what!r} cannot be made of a batch where the objective is {value}: look for NaN or overflow in inputs, "
            "targets and parameters."
        )


def whole_matrix(approximation: Approximation, objective: Objective, block: str) -> Description:
    """Return the description of an approximation that treats all parameters alike."""
    rows = [
        BlockRow(name, tuple(shape), "-", "-", block, "no layer structure needed")
        for name, shape in zip(objective.layout.names, objective.layout.shapes, strict=True)
    ]
    return Description(repr(approximation), tuple(rows))


def _by_columns(product: Callable[[Tensor], Tensor], V: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
    return torch.stack([product(v) for v in V.T.contiguous()], dim=1)
