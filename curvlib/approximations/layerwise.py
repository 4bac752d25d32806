"""Approximations that are block diagonal over layers: what they share.

A subclass says which statistics of one layer's (a, g) it keeps and which operator they make. Parameters outside every
layer are refused by name before any computation, unless the caller opted for a named fallback.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from curvlib.approximations.base import (
    BlockRow,
    Description,
    StatisticalApproximation,
    Statistics,
    with_l2,
)
from curvlib.approximations.exact import check_matrix
from curvlib.extensions import Layer, LayerFactors, LayerPlan, UnsupportedLayerError
from curvlib.matrices import CurvatureMatrix
from curvlib.objective import Evaluation, Objective
from curvlib.operators import BlockDiagonal as BlockDiagonalOperator
from curvlib.operators import Diagonal as DiagonalOperator
from curvlib.operators import LinearOperator, full_precision

Fallback = Literal["raise", "diagonal", "exclude"]
_FALLBACK_BLOCKS = {"diagonal": "exact diagonal", "exclude": "none (zero curvature)"}


@dataclass(frozen=True)
class LayerwiseApproximation(StatisticalApproximation):
    """Block diagonal over layers, from the inputs a and output gradients g of each.

    Args:
        matrix: a curvature matrix with output-space vectors (not ``Hessian()``).
        on_unsupported: what parameters outside every layer get: "raise" refuses them by name before any computation;
            "diagonal" gives them their exact diagonal, by one backward pass for each example and vector; "exclude"
            gives them zero curvature, so that only the damping and the l2 term act on them.
    """

    matrix: CurvatureMatrix
    on_unsupported: Fallback = field(default="raise", kw_only=True)

    def __post_init__(self) -> None:
        check_matrix(self, self.matrix)
        if not self.matrix.has_vectors:
            raise TypeError(
                f"{type(self).__name__} needs vectors v_k with sum v_k v_k^T, and {self.matrix} has products only. "
                "Use it with Exact or Dense, or choose GGN(), Fisher() or EmpiricalFisher() here."
            )
        if self.on_unsupported not in get_args(Fallback):
            raise ValueError(f"on_unsupported must be one of {get_args(Fallback)}, got {self.on_unsupported!r}.")

    @abstractmethod
    def accumulate(self, factors: LayerFactors, means: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
        """Add one layer's part for one vector v_k to the statistics, under keys that start with the layer's name."""

    @abstractmethod
    def zeros(self, layer: Layer, like: Tensor) -> Statistics:
        """Return the statistics of a layer that the outputs do not depend on; ``like`` gives dtype and device."""

    @abstractmethod
    def block(self, layer: Layer, statistics: Statistics) -> LinearOperator:
        """Return the operator of one layer, on the rows of (W b) one after another."""

    @abstractmethod
    def describe_block(self, layer: Layer) -> str:
        """Return a few words on the block of a layer."""

    def check(self, objective: Objective) -> None:
        """Refuse parameters outside every layer, by name, unless a fallback was chosen."""
        self._check_plan(objective.plan)

    def statistics(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Statistics:
        """Return the statistics of all layers: one backward pass for each vector of the matrix."""
        evaluation.check_fresh()
        self._check_plan(evaluation.plan)
        evaluation.check_examples_are_independent()
        with full_precision(evaluation.layout.device):
            return self._statistics(evaluation, generator)

    def _statistics(self, evaluation: Evaluation, generator: torch.Generator | None) -> Statistics:
        means: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        others = tuple(evaluation.plan.unsupported) if self.on_unsupported == "diagonal" else ()
        seen: set[str] = set()
        for vector in self.matrix.vectors(evaluation, generator):
            for factors in evaluation.layer_factors(vector):
                self.accumulate(factors, means, sums)
                seen.add(factors.layer.name)
            if others:
                _accumulate_diagonals(others, evaluation.per_example_vjp(others, vector), sums)
        for layer in evaluation.layers:
            if layer.name not in seen:
                zeros = self.zeros(layer, evaluation.outputs)
                means.update(zeros.means)
                sums.update(zeros.sums)
        # parts of a model may have lower precision than the vectors that its operator takes
        dtype = evaluation.layout.dtype
        return Statistics(*({key: value.to(dtype) for key, value in part.items()} for part in (means, sums)))

    def operator(self, objective: Objective, statistics: Statistics) -> LinearOperator:
        """Return the block-diagonal operator."""
        layout, blocks, coordinates = objective.layout, [], []
        diagonals = {name for name in layout.names if _diagonal_key(name) in statistics.sums}
        for layer in objective.plan.layers:
            # A layer whose parameters were used outside of its calls has statistics of the fallback only.
            if not diagonals & set(layer.parameters) and self._has_statistics(layer, statistics):
                blocks.append(self.block(layer, statistics))
                coordinates.append(layer.coordinates)
        for name in layout.names:
            if name in diagonals:
                blocks.append(DiagonalOperator(statistics.sums[_diagonal_key(name)].flatten().to(layout.dtype)))
                coordinates.append(layout.coordinates(name))
        if not blocks:  # everything is excluded
            zeros = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
            return with_l2(DiagonalOperator(zeros), objective)
        return with_l2(BlockDiagonalOperator(tuple(blocks), tuple(coordinates), layout.size), objective)

    def describe(self, objective: Objective, plan: LayerPlan | None = None) -> Description:
        """Return each parameter's block; unsupported ones with their reason and what they get instead."""
        layout, plan = objective.layout, plan if plan is not None else objective.plan
        rows = {}
        for layer in plan.layers:
            shared = f"shared by {', '.join(layer.modules)}" if len(layer.modules) > 1 else "has a layer rule"
            for name in layer.parameters:
                rows[name] = (layer.name or "(model)", self.describe_block(layer), shared)
        for name, reason in plan.unsupported.items():
            rows[name] = ("-", _FALLBACK_BLOCKS.get(self.on_unsupported, "refused"), reason)
        return Description(
            repr(self),
            tuple(
                BlockRow(name, tuple(shape), *rows[name])
                for name, shape in zip(layout.names, layout.shapes, strict=True)
            ),
        )

    def _has_statistics(self, layer: Layer, statistics: Statistics) -> bool:
        return any(key.startswith(f"{layer.name}|") for key in statistics.sums)

    def _check_plan(self, plan: LayerPlan) -> None:
        if plan.unsupported and self.on_unsupported == "raise":
            listed = "; ".join(f"{name}: {reason}" for name, reason in plan.unsupported.items())
            raise UnsupportedLayerError(
                f"{type(self).__name__} has no layer rule for {len(plan.unsupported)} parameter(s): {listed}. "
                'Choose on_unsupported="diagonal" or "exclude" for them, freeze them, register a rule with '
                "curvlib.extensions.register, or use Exact, which needs no rules."
            )


def layer_key(layer: Layer, statistic: str) -> str:
    """Return the key of a layer's statistic."""
    return f"{layer.name}|{statistic}"


def _diagonal_key(parameter: str) -> str:
    return f"diagonal of {parameter}"


def _accumulate_diagonals(names: tuple[str, ...], rows: Iterable[list[Tensor]], sums: dict[str, Tensor]) -> None:
    for gradients in rows:
        for name, gradient in zip(names, gradients, strict=True):
            key = _diagonal_key(name)
            square = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square()
            sums[key] = sums[key] + square if key in sums else square
