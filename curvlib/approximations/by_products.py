"""Blocks of a matrix that gives products only, such as the Hessian: exact, by products with unit vectors.

Symbols: D parameters, B blocks of one size d, e_i (D,) a unit vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from curvlib.approximations.block_kinds import BlockKind
from curvlib.approximations.fallbacks import fallback_keys
from curvlib.approximations.partition import Group
from curvlib.approximations.statistics import Statistics
from curvlib.matrices import CurvatureMatrix
from curvlib.objective import Evaluation

if TYPE_CHECKING:
    from curvlib.approximations.assignment import Assignment

Product = Callable[[Float[Tensor, " D"]], Float[Tensor, " D"]]


def exact_blocks(
    product: Product,
    coordinates: Int[Tensor, "B d"],
    like: Float[Tensor, " D"],
    kept: Bool[Tensor, "B d"] | None = None,
) -> Float[Tensor, "B d d"]:
    """Return C between the coordinates of each block: B d products, one after another, and the memory of the blocks.

    Args:
        product: v -> C v.
        coordinates: where the entries of the blocks lie.
        like: a vector, for size, dtype and device.
        kept: entries whose rows and columns are wanted, None for all; the others are zero, without a product.
    """
    B, d = coordinates.shape
    blocks = like.new_zeros(B, d, d)
    # one transfer to the host: which products are made
    wanted = [range(d)] * B if kept is None else [row.nonzero().flatten().tolist() for row in kept.cpu()]
    for b, columns in enumerate(wanted):
        for j in columns:
            unit = torch.zeros_like(like).scatter_(0, coordinates[b, j : j + 1], 1.0)
            blocks[b, :, j] = product(unit)[coordinates[b]]
    if kept is not None:
        blocks = torch.where(kept.unsqueeze(2), blocks, 0.0)
    return 0.5 * (blocks + blocks.mT)


def blocks_by_products(
    evaluation: Evaluation, assignment: Assignment, matrix: CurvatureMatrix, generator: torch.Generator | None
) -> Statistics:
    """Return the statistics of all layers and other parameters that an assignment gives to this matrix."""
    product, like = _product(evaluation, matrix, generator)
    statistics = Statistics()
    for layer in evaluation.layers:
        approximation = assignment.layers[layer.name]
        if approximation is not None and approximation.matrix == matrix:
            coordinates = layer.coordinates.view(approximation.exact_blocks_of(layer), -1)
            blocks = exact_blocks(product, coordinates, like)
            statistics.fill(approximation.statistics_of_blocks(layer, blocks))
    statistics.sums.update(_diagonals(evaluation, product, assignment.with_fallback("diagonal", matrix), like))
    for name in assignment.with_fallback("dense", matrix):
        blocks = exact_blocks(product, evaluation.layout.coordinates(name).unsqueeze(0), like)
        statistics.sums[fallback_keys(name)[1]] = blocks.squeeze(0)
    return statistics


def groups_by_products(
    evaluation: Evaluation,
    matrix: CurvatureMatrix,
    generator: torch.Generator | None,
    groups: Iterable[tuple[str, Group]],
    kind: BlockKind,
    assignment: Assignment,
) -> Statistics:
    """Return the statistics of groups, given with their keys, that need not be parts of one layer.

    Parameters with their own diagonal are in no group; excluded ones have zero rows and columns in theirs.
    """
    product, like = _product(evaluation, matrix, generator)
    excluded = [name for name, (fallback, _) in assignment.others.items() if fallback == "exclude"]
    statistics = Statistics(sums=_diagonals(evaluation, product, assignment.with_fallback("diagonal", matrix), like))
    for key, group in groups:
        gone = [evaluation.layout.coordinates(name) for name in excluded if name in group.parameters]
        kept = ~torch.isin(group.coordinates, torch.cat(gone)) if gone else None
        statistics.fill(kind.of_matrices(key, exact_blocks(product, group.coordinates, like, kept)))
    return statistics


def _product(
    evaluation: Evaluation, matrix: CurvatureMatrix, generator: torch.Generator | None
) -> tuple[Product, Float[Tensor, " D"]]:
    layout = evaluation.layout
    like = torch.empty(layout.size, dtype=layout.dtype, device=layout.device)
    return matrix.products(evaluation, generator).product, like


def _diagonals(
    evaluation: Evaluation, product: Product, names: Iterable[str], like: Float[Tensor, " D"]
) -> dict[str, Tensor]:
    coordinates = {name: evaluation.layout.coordinates(name).unsqueeze(1) for name in names}
    return {fallback_keys(name)[0]: exact_blocks(product, where, like).flatten() for name, where in coordinates.items()}
