"""Approximations in the eigenbases of K-FAC's factors: a first sweep over the layers makes these, a second the rest.

Symbols: as in :mod:`.eigenbasis`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvlib.approximations.assignment import AssignedApproximation, LayerAssignment
from curvlib.approximations.base import check_repeatable, finite_statistics, statistics_over
from curvlib.approximations.eigenbasis import Basis, eigenbases
from curvlib.approximations.loss_curvature import drawn_seed
from curvlib.approximations.statistics import Statistics
from curvlib.extensions import Layer
from curvlib.matrices import CurvatureMatrix
from curvlib.objective import Batch, Evaluation, Objective
from curvlib.operators import LinearOperator, full_precision

# What stands for a matrix in the sweeps, where these are to see the same draws; matrices that are not here stay.
Standing = Mapping[CurvatureMatrix, CurvatureMatrix]


class TwoSweeps(LayerAssignment):
    """An approximation some of whose layers are diagonal in the eigenbases of K-FAC's factors.

    Attributes:
        basis_every: updates of a running average from one eigenbasis to the next.
    """

    basis_every: int

    @abstractmethod
    def first_sweep(self, standing: Standing) -> AssignedApproximation:
        """Return what makes the factors, for matrices or for what stands for them."""

    @abstractmethod
    def second_sweep(
        self, bases: Mapping[str, Basis], standing: Standing, *, with_factors: bool = False
    ) -> AssignedApproximation:
        """Return what makes the scales in given bases, all that needs no basis, and the factors if asked for."""

    def layers_with_bases(self, evaluation: Evaluation, factors: Statistics) -> tuple[Layer, ...]:
        """Return the layers that have factors, in an evaluation."""
        return self._with_bases(evaluation.objective, evaluation.layers, factors)

    def estimate_in_two_sweeps(self, evaluation: Evaluation, generator: torch.Generator | None) -> LinearOperator:
        """Return the operator of one batch.

        Raises:
            NonFiniteStatisticsError: the statistics hold NaN or infinity.
        """
        with full_precision(evaluation.layout.device):
            factors, standing = self.first_factors(evaluation, generator)
            factors = finite_statistics(type(self).__name__, factors, float(evaluation.value))
            second = self.second_sweep(eigenbases(self.layers_with_bases(evaluation, factors), factors), standing)
            found = finite_statistics(type(self).__name__, second.statistics(evaluation, generator), None)
            return second.operator(evaluation.objective, factors.joined(found))

    def estimate_over_in_two_sweeps(
        self, objective: Objective, loader: Iterable[Batch], generator: torch.Generator | None, progress: bool
    ) -> LinearOperator:
        """Return the operator of all batches, with the same draws in both sweeps where the batches come in one order.

        Raises:
            TypeError: the loader can be iterated once only.
        """
        self.check(objective)
        name = type(self).__name__
        check_repeatable(f"estimate_over of {name}", loader)
        random = [matrix for matrix in self.assign(objective, objective.plan).matrices() if matrix.draws]
        seeds = [drawn_seed(generator) for _ in random]

        def standing() -> Standing:
            made = [torch.Generator(objective.layout.device).manual_seed(seed) for seed in seeds]
            return {m: _Seeded(m, draws, m.dense_vectors) for m, draws in zip(random, made, strict=True)}

        with full_precision(objective.layout.device):
            first = self.first_sweep(standing())
            factors = statistics_over(first, objective, loader, None, f"{name}'s factor", progress)
            bases = eigenbases(self._with_bases(objective, objective.plan.layers, factors), factors)
            second = self.second_sweep(bases, standing())
            found = statistics_over(second, objective, loader, None, f"{name}'s scale", progress)
            return second.operator(objective, factors.joined(found))

    def first_factors(self, evaluation: Evaluation, generator: torch.Generator | None) -> tuple[Statistics, Standing]:
        """Return K-FAC's statistics of a batch, and matrices that have the vectors that they were made of."""
        assignment = self._checked(evaluation.objective, evaluation.plan)
        standing = {
            matrix: _Drawn(tuple(matrix.vectors(evaluation, generator)), matrix.dense_vectors)
            for matrix in assignment.matrices()
            if matrix.draws
        }
        return self.first_sweep(standing).statistics(evaluation, generator), standing

    def _with_bases(self, objective: Objective, layers: tuple[Layer, ...], factors: Statistics) -> tuple[Layer, ...]:
        chosen = self.assign(objective, objective.plan).layers
        return tuple(layer for layer in layers if _in_eigenbasis(chosen, layer) and _has_factors(layer.name, factors))


@dataclass(frozen=True, eq=False)
class _Drawn(CurvatureMatrix):
    """The vectors of one evaluation, drawn once, so that several sweeps over the layers see the same ones."""

    drawn: tuple[Tensor, ...]
    dense_vectors: bool  # type: ignore[misc]

    def vectors(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Yield the vectors."""
        return iter(self.drawn)

    def output_product(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Any:
        """Refuse: the vectors are for layer statistics."""
        raise TypeError("vectors drawn once have no products.")


@dataclass(frozen=True, eq=False)
class _Seeded(CurvatureMatrix):
    """A matrix with draws of its own, whatever else draws in the same sweep."""

    matrix: CurvatureMatrix
    draws_from: torch.Generator = field(repr=False)
    dense_vectors: bool  # type: ignore[misc]

    def vectors(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Yield the matrix's vectors."""
        return self.matrix.vectors(evaluation, self.draws_from)

    def output_product(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Any:
        """Refuse: the vectors are for layer statistics."""
        raise TypeError("vectors with draws of their own have no products.")


def _in_eigenbasis(chosen: Mapping[str, Any], layer: Layer) -> bool:
    approximation = chosen.get(layer.name)
    return approximation is not None and approximation.in_eigenbasis


def _has_factors(layer: str, statistics: Statistics) -> bool:
    return any(key.startswith(f"{layer}|") for key in statistics.sums)
