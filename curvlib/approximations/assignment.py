"""Approximations made layer by layer: who treats which layer, and what parameters outside every layer get.

The operator is block diagonal over layers. Parameters outside every layer are refused by name before any computation,
unless the caller opted for a named fallback.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlib.approximations.base import Approximation, StatisticalApproximation, with_l2
from curvlib.approximations.by_products import blocks_by_products
from curvlib.approximations.description import BlockRow, Description
from curvlib.approximations.fallbacks import FALLBACK_BLOCKS, Fallback, fallback_block, fallback_keys
from curvlib.approximations.statistics import Statistics
from curvlib.extensions import Layer, LayerPlan, UnsupportedLayerError
from curvlib.matrices import CurvatureMatrix
from curvlib.objective import Evaluation, Objective
from curvlib.operators import BlockDiagonal as BlockDiagonalOperator
from curvlib.operators import Diagonal as DiagonalOperator
from curvlib.operators import LinearOperator, full_precision

if TYPE_CHECKING:
    from curvlib.approximations.layerwise import LayerwiseApproximation


@dataclass(frozen=True, eq=False)
class Assignment:
    """Who treats what.

    Attributes:
        layers: by layer name the approximation, None for no curvature.
        others: by name of a parameter outside every layer what it gets, and the curvature matrix that it is of.
    """

    layers: Mapping[str, LayerwiseApproximation | None]
    others: Mapping[str, tuple[Fallback, CurvatureMatrix | None]]

    def matrices(self) -> tuple[CurvatureMatrix, ...]:
        """Return the different curvature matrices, in order."""
        used = [approximation.matrix for approximation in self.layers.values() if approximation is not None]
        used += [matrix for fallback, matrix in self.others.values() if fallback != "exclude" and matrix is not None]
        return tuple(dict.fromkeys(used))

    def counts_positions(self, matrix: CurvatureMatrix) -> bool:
        """Return whether an approximation of this matrix averages over positions."""
        chosen = (approximation for approximation in self.layers.values() if approximation is not None)
        return any(approximation.counts_positions and approximation.matrix == matrix for approximation in chosen)

    def with_fallback(self, fallback: Fallback, matrix: CurvatureMatrix) -> tuple[str, ...]:
        """Return the parameters that get this fallback for this matrix."""
        return tuple(name for name, chosen in self.others.items() if chosen == (fallback, matrix))


class LayerAssignment(Approximation):
    """What says for each layer and each other parameter who treats it, whatever the statistics are."""

    @abstractmethod
    def assign(self, objective: Objective, plan: LayerPlan) -> Assignment:
        """Return who treats which layer of the plan, and what the other parameters get."""

    def check(self, objective: Objective) -> None:
        """Refuse parameters outside every layer unless a fallback was chosen, and layers not taken, by name."""
        self._checked(objective, objective.plan)

    def describe(self, objective: Objective, plan: LayerPlan | None = None) -> Description:
        """Return each parameter's block; unsupported ones with their reason and what they get instead."""
        layout, plan = objective.layout, plan if plan is not None else objective.plan
        assignment = self.assign(objective, plan)
        rows = []
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            if name in plan.unsupported:
                block = FALLBACK_BLOCKS[assignment.others[name][0]]
                rows.append(BlockRow(name, tuple(shape), "-", "-", block, plan.unsupported[name]))
            else:
                rows.append(_row(name, tuple(shape), plan, assignment))
        return Description(repr(self), tuple(rows))

    def _checked(self, objective: Objective, plan: LayerPlan) -> Assignment:
        assignment = self.assign(objective, plan)
        refused = [name for name, (fallback, _) in assignment.others.items() if fallback == "raise"]
        if refused:
            listed = "; ".join(f"{name}: {plan.unsupported[name]}" for name in refused)
            raise UnsupportedLayerError(
                f"{type(self).__name__} has no layer rule for {len(refused)} parameter(s): {listed}. Choose "
                'on_unsupported="diagonal", "dense" or "exclude" for them, freeze them, register a rule with '
                "curvlib.extensions.register, or use Exact, which needs no rules."
            )
        reasons = {name: _refusal(layer, assignment) for layer in plan.layers for name in layer.parameters}
        not_taken = "; ".join(f"{name} of {reason}" for name, reason in reasons.items() if reason)
        if not_taken:
            raise UnsupportedLayerError(
                f"{type(self).__name__} does not take every layer: {not_taken}. Give these another approximation by "
                "PerLayer (None for no curvature), or freeze their parameters."
            )
        return assignment


class AssignedApproximation(LayerAssignment, StatisticalApproximation):
    """An approximation that is block diagonal over layers."""

    def statistics(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Statistics:
        """Return the statistics of all layers: one backward pass for each vector of each matrix."""
        evaluation.check_fresh()
        assignment = self._checked(evaluation.objective, evaluation.plan)
        if any(matrix.has_vectors for matrix in assignment.matrices()):  # products do not ask for it
            evaluation.check_examples_are_independent()
        with full_precision(evaluation.layout.device):
            return _statistics(evaluation, assignment, generator)

    def operator(self, objective: Objective, statistics: Statistics) -> LinearOperator:
        """Return the block-diagonal operator."""
        return with_l2(self.operator_of_loss(objective, statistics), objective)

    def operator_of_loss(self, objective: Objective, statistics: Statistics) -> LinearOperator:
        """Return the block-diagonal operator without the l2 term."""
        layout, blocks, coordinates = objective.layout, [], []
        assignment = self.assign(objective, objective.plan)
        alone = {name for name in layout.names for key in fallback_keys(name) if key in statistics.sums}
        for layer in objective.plan.layers:
            approximation = assignment.layers[layer.name]
            # A layer whose parameters were used outside of its calls has statistics of the fallback only.
            if approximation is None or alone & set(layer.parameters) or not _has_statistics(layer, statistics):
                continue
            blocks.append(approximation.block(layer, statistics))
            coordinates.append(layer.coordinates)
        for name in layout.names:
            if name in alone:
                blocks.append(fallback_block(name, statistics))
                coordinates.append(layout.coordinates(name))
        if not blocks:  # everything is excluded
            zeros = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
            return DiagonalOperator(zeros)
        return BlockDiagonalOperator(tuple(blocks), tuple(coordinates), layout.size)


def _refusal(layer: Layer, assignment: Assignment) -> str:
    """Return why the approximation of a layer refuses it, or ""."""
    approximation = assignment.layers[layer.name]
    reason = approximation.refusal(layer) if approximation is not None else ""
    kinds = ", ".join(dict.fromkeys(type(member).__name__ for member in layer.members))
    return f"{kinds}: {reason}" if reason else ""


def layer_key(layer: Layer, statistic: str) -> str:
    """Return the key of a layer's statistic."""
    return f"{layer.name}|{statistic}"


def add_to(sums: dict[str, Tensor], key: str, value: Tensor) -> None:
    """Add a value to a sum that may not have begun yet."""
    sums[key] = sums[key] + value if key in sums else value


def _statistics(evaluation: Evaluation, assignment: Assignment, generator: torch.Generator | None) -> Statistics:
    statistics = Statistics()
    for matrix in assignment.matrices():
        if not matrix.has_vectors:
            statistics.fill(blocks_by_products(evaluation, assignment, matrix, generator))
            continue
        diagonal, dense = (assignment.with_fallback(fallback, matrix) for fallback in ("diagonal", "dense"))
        # one vector of several may see a part of the positions alone
        needed = not matrix.dense_vectors and assignment.counts_positions(matrix)
        reached = evaluation.reached_positions() if needed else None
        for vector in matrix.vectors(evaluation, generator):
            for factors in evaluation.layer_factors(vector, reached):
                approximation = assignment.layers[factors.layer.name]
                if approximation is not None and approximation.matrix == matrix:
                    approximation.accumulate_into(factors, statistics)
            if diagonal or dense:
                rows = evaluation.per_example_vjp(diagonal + dense, vector)
                _accumulate_others(diagonal, dense, rows, statistics.sums)
    for layer in evaluation.layers:
        approximation = assignment.layers[layer.name]
        if approximation is not None:
            _fill_with_zeros(approximation, layer, evaluation.outputs, statistics)
    # parts of a model may have lower precision than the vectors that its operator takes
    return statistics.to(evaluation.layout.dtype)


def _fill_with_zeros(approximation: LayerwiseApproximation, layer: Layer, like: Tensor, statistics: Statistics) -> None:
    """Add zero statistics for a layer, or one of its maps, that the outputs do not depend on."""
    if len(layer.maps) == 1 and _has_statistics(layer, statistics):
        return
    statistics.fill(approximation.zeros(layer, like))


def _accumulate_others(
    diagonal: tuple[str, ...], dense: tuple[str, ...], rows: Iterable[list[Tensor]], sums: dict[str, Tensor]
) -> None:
    for gradients in rows:
        for name, gradient in zip(diagonal + dense, gradients, strict=True):
            row = (
                (gradient.to_dense() if gradient.is_sparse else gradient)
                .to(torch.promote_types(gradient.dtype, torch.float32))
                .flatten()
            )
            diagonal_key, dense_key = fallback_keys(name)
            if name in diagonal:
                add_to(sums, diagonal_key, row.square())
            else:
                add_to(sums, dense_key, row.outer(row))


def _has_statistics(layer: Layer, statistics: Statistics) -> bool:
    return any(key.startswith(f"{layer.name}|") for key in (*statistics.sums, *statistics.roots))


def _row(name: str, shape: tuple[int, ...], plan: LayerPlan, assignment: Assignment) -> BlockRow:
    """Return the line of a parameter that belongs to one or several layers."""
    layers = [layer for layer in plan.layers if name in layer.parameters]
    blocks, reasons = [], []
    for layer in layers:
        approximation, refusal = assignment.layers[layer.name], _refusal(layer, assignment)
        if refusal:
            blocks.append("refused")
            reasons.append(refusal)
            continue
        blocks.append("none (zero curvature)" if approximation is None else approximation.describe_block(layer))
        shared = f"shared by {', '.join(layer.modules)}" if len(layer.modules) > 1 else "has a layer rule"
        reasons.append(shared if approximation is not None else "excluded")
    calls = [str(plan.calls[layer.name]) for layer in layers] if plan.calls else ["-"]
    return BlockRow(
        name,
        shape,
        ", ".join(layer.name or "(model)" for layer in layers),
        ", ".join(dict.fromkeys(calls)),
        ", ".join(dict.fromkeys(blocks)),
        ", ".join(dict.fromkeys(reasons)),
    )
