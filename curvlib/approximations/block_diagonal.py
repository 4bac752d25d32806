"""The diagonal blocks of a curvature matrix, for any partition of the parameters.

Symbols: N examples, J_n^T v the gradient of one example for the output-space vector v, B blocks of one size d.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvlib.approximations.assignment import layer_key
from curvlib.approximations.block_kinds import BlockKind, DenseBlocks
from curvlib.approximations.description import BlockRow, Description
from curvlib.approximations.fallbacks import Fallback
from curvlib.approximations.grouped_blocks import grouped_operator, grouped_products, grouped_statistics
from curvlib.approximations.layerwise import LayerwiseApproximation
from curvlib.approximations.partition import ByLayer, LayerPartition, Partition
from curvlib.approximations.statistics import Statistics
from curvlib.extensions import Layer, LayerFactors, LayerPlan
from curvlib.objective import Evaluation, Objective
from curvlib.operators import LinearOperator, full_precision


@dataclass(frozen=True)
class BlockDiagonal(LayerwiseApproximation):
    """Block = sum_n sum_k x x^T, x the block's part of J_n^T v_k: exact for the given matrix where blocks are dense.

    Memory of dense blocks is the square of each one's size; per-example gradients are made in chunks of at most 64 MiB
    in float32, or of one example. A block that spans layers needs its part of the gradients of all examples at once.

    Dense blocks of ``Hessian()``, which has no vectors, are exact as well, by D products, one for each parameter: for
    small models and as an oracle. They may be indefinite.

    Args:
        matrix: ``GGN()``, ``Fisher()``, ``EmpiricalFisher()`` or ``Hessian()``.
        partition: ``ByLayer()``, ``ByOutputUnit()``, ``ByParameter()``, ``ByGroups(names)`` or ``ByLabel(function)``.
        blocks: ``DenseBlocks()``, or ``LowRankBlocks(rank)`` as in TONGA.
        on_unsupported: what parameters outside every layer get: "raise", "diagonal", "dense" (their place in the
            partition; a dense block each where the partition is one of layers) or "exclude".
    """

    partition: Partition | LayerPartition = field(default_factory=ByLayer, kw_only=True)
    blocks: BlockKind = field(default_factory=DenseBlocks, kw_only=True)
    own_fallback: ClassVar[Fallback | None] = "dense"
    takes_products: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.partition, (Partition, LayerPartition)):
            raise TypeError(
                "BlockDiagonal needs partition to be ByLayer(), ByOutputUnit(), ByParameter(), ByGroups(names) or "
                f"ByLabel(function), got {self.partition!r}."
            )
        if not isinstance(self.blocks, BlockKind):
            raise TypeError(f"BlockDiagonal needs blocks to be DenseBlocks() or LowRankBlocks(r), got {self.blocks!r}.")
        if not self.matrix.has_vectors:
            self.blocks.check_indefinite(self.matrix)

    @property
    def alone(self) -> str | None:
        """Why ``PerLayer`` cannot mix it with others, None where it can."""
        within = isinstance(self.partition, LayerPartition)
        return None if within else f"{self.partition!r} makes blocks that are not parts of one layer"

    def check(self, objective: Objective) -> None:
        """Refuse parameters outside every layer unless a fallback was chosen, and a partition that does not fit."""
        super().check(objective)
        if isinstance(self.partition, Partition):
            self.partition.check(objective)

    def statistics(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Statistics:
        """Return the statistics of all blocks: one backward pass for each vector."""
        if isinstance(self.partition, LayerPartition):
            return super().statistics(evaluation, generator)
        evaluation.check_fresh()
        assignment = self._checked(evaluation.objective, evaluation.plan)
        groups = self.partition.groups(evaluation.objective, evaluation.plan)
        with full_precision(evaluation.layout.device):
            if not self.matrix.has_vectors:
                return grouped_products(evaluation, self.matrix, generator, groups, self.blocks, assignment)
            evaluation.check_examples_are_independent()
            vectors = self.matrix.vectors(evaluation, generator)
            return grouped_statistics(evaluation, vectors, groups, self.blocks, assignment)

    def operator_of_loss(self, objective: Objective, statistics: Statistics) -> LinearOperator:
        """Return the block-diagonal operator without the l2 term."""
        if isinstance(self.partition, LayerPartition):
            return super().operator_of_loss(objective, statistics)
        return grouped_operator(objective, self.partition.groups(objective, objective.plan), self.blocks, statistics)

    def describe(self, objective: Objective, plan: LayerPlan | None = None) -> Description:
        """Return each parameter's block, and with which parameters it shares it."""
        table = super().describe(objective, plan)
        if isinstance(self.partition, LayerPartition):
            return table
        plan = plan if plan is not None else objective.plan
        of = {name: group for group in self.partition.groups(objective, plan) for name in group.parameters}
        others = self.assign(objective, plan).others
        rows = []
        for row in table.rows:
            if others.get(row.parameter, ("dense", None))[0] != "dense":
                rows.append(row)
                continue
            group = of[row.parameter]
            block = self.blocks.describe(*group.coordinates.shape)
            rows.append(BlockRow(row.parameter, row.shape, row.layer, row.calls, f"{group.name}: {block}", row.reason))
        return Description(table.approximation, tuple(rows))

    def accumulate(self, factors: LayerFactors, means: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
        """Add the outer products of the per-example gradients (of dense blocks)."""
        self.accumulate_into(factors, Statistics(means, sums))

    def accumulate_into(self, factors: LayerFactors, statistics: Statistics) -> None:
        """Add the outer products of the per-example gradients to the blocks of whatever kind."""
        blocks = self._blocks_of(factors.layer)
        for rows in factors.per_example_gradients():
            self.blocks.add(statistics, layer_key(factors.layer, "block"), rows.view(len(rows), blocks, -1))

    def zeros(self, layer: Layer, like: Tensor) -> Statistics:
        """Return zero blocks."""
        blocks = self._blocks_of(layer)
        return self.blocks.zeros(layer_key(layer, "block"), blocks, layer.size // blocks, like)

    def exact_blocks_of(self, layer: Layer) -> int:
        """As many as the partition cuts the layer into."""
        return self._blocks_of(layer)

    def statistics_of_blocks(self, layer: Layer, blocks: Float[Tensor, "B d d"]) -> Statistics:
        """Return the blocks as they are kept."""
        return self.blocks.of_matrices(layer_key(layer, "block"), blocks)

    def block(self, layer: Layer, statistics: Statistics) -> LinearOperator:
        """Return the blocks of one layer."""
        return self.blocks.operator(statistics, layer_key(layer, "block"))

    def describe_block(self, layer: Layer) -> str:
        """Name number and size of the blocks, where they are parts of the layer."""
        if not isinstance(self.partition, LayerPartition):
            return f"part of {self.partition!r}"
        blocks = self._blocks_of(layer)
        return self.blocks.describe(blocks, layer.size // blocks)

    def _blocks_of(self, layer: Layer) -> int:
        assert isinstance(self.partition, LayerPartition)  # others do not come here
        return self.partition.blocks_of(layer)
