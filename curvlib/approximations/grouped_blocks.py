"""Statistics and operators of blocks that need not be parts of one layer.

Symbols: N examples, B blocks of one size d in a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlib.approximations.assignment import Assignment, add_to
from curvlib.approximations.block_kinds import BlockKind
from curvlib.approximations.by_products import groups_by_products
from curvlib.approximations.example_gradients import stacked_rows
from curvlib.approximations.fallbacks import fallback_block, fallback_keys
from curvlib.approximations.partition import Group
from curvlib.approximations.statistics import Statistics
from curvlib.extensions import LayerFactors
from curvlib.matrices import CurvatureMatrix
from curvlib.objective import Evaluation, Objective
from curvlib.operators import BlockDiagonal, LinearOperator


@dataclass(frozen=True, eq=False)
class _Piece:
    """The part of a group that one source of gradients gives.

    Attributes:
        group: the number of the group.
        columns: which of the source's columns.
        positions: where they go among the group's entries.
        whole: whether this is the whole group.
    """

    group: int
    columns: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    whole: bool


class _Cutter:
    """Which entries of a source of gradients belong to which group."""

    def __init__(self, groups: tuple[Group, ...], objective: Objective) -> None:
        layout = objective.layout
        self._sizes = [group.coordinates.numel() for group in groups]
        self._owner = torch.full((layout.size,), -1, device=layout.device)
        self._place = torch.zeros_like(self._owner)
        for number, group in enumerate(groups):
            coordinates = group.coordinates.reshape(-1)
            self._owner[coordinates] = number
            self._place[coordinates] = torch.arange(len(coordinates), device=layout.device)

    def pieces(self, coordinates: Int[Tensor, " n"]) -> list[_Piece]:
        owner, place = self._owner[coordinates], self._place[coordinates]
        result = []
        for number in owner.unique().tolist():
            if number >= 0:
                columns = (owner == number).nonzero().squeeze(1)
                # in the group's order, so that a whole group needs no second copy
                columns = columns[place[columns].argsort()]
                whole = len(columns) == self._sizes[number]
                result.append(_Piece(number, columns, place[columns], whole))
        return result


def grouped_statistics(
    evaluation: Evaluation,
    vectors: Iterable[Float[Tensor, "N ..."]],
    groups: tuple[Group, ...],
    kind: BlockKind,
    assignment: Assignment,
) -> Statistics:
    """Return the statistics of all groups, and the diagonals of parameters outside every layer that get one."""
    layout, statistics = evaluation.layout, Statistics()
    outside: dict[str, list[str]] = defaultdict(list)
    for name, (fallback, _) in assignment.others.items():
        outside[fallback].append(name)
    groups = _without(groups, outside["diagonal"], evaluation.objective)
    cutter = _Cutter(groups, evaluation.objective)
    of_layer = {layer.name: cutter.pieces(layer.coordinates) for layer in evaluation.layers}
    of_parameter = {name: cutter.pieces(layout.coordinates(name)) for name in outside["dense"]}
    names = (*outside["diagonal"], *outside["dense"])
    for vector in vectors:
        spread: dict[int, Tensor] = {}
        for factors in evaluation.layer_factors(vector):
            _add(statistics, groups, kind, spread, of_layer[factors.layer.name], factors)
        rows = stacked_rows(evaluation.per_example_vjp(names, vector)) if names else []
        for name, gradients in zip(names, rows, strict=True):
            if name in of_parameter:
                for piece in of_parameter[name]:
                    _spread(spread, groups, piece, slice(None), gradients, evaluation.examples, layout.dtype)
            else:
                add_to(statistics.sums, fallback_keys(name)[0], gradients.to(layout.dtype).square().sum(0))
        for number, gradients in spread.items():
            blocks = groups[number].coordinates.shape
            kind.add(statistics, _key(groups[number]), gradients.view(evaluation.examples, *blocks))
    like = torch.zeros((), dtype=layout.dtype, device=layout.device)
    for group in groups:
        count, size = group.coordinates.shape
        statistics.fill(kind.zeros(_key(group), count, size, like))
    return statistics


def grouped_products(
    evaluation: Evaluation,
    matrix: CurvatureMatrix,
    generator: torch.Generator | None,
    groups: tuple[Group, ...],
    kind: BlockKind,
    assignment: Assignment,
) -> Statistics:
    """Return the same of a matrix that gives products only."""
    groups = _without(groups, list(assignment.with_fallback("diagonal", matrix)), evaluation.objective)
    keyed = [(_key(group), group) for group in groups]
    return groups_by_products(evaluation, matrix, generator, keyed, kind, assignment)


def grouped_operator(
    objective: Objective, groups: tuple[Group, ...], kind: BlockKind, statistics: Statistics
) -> LinearOperator:
    """Return the block-diagonal operator of :func:`grouped_statistics`.

    Raises:
        ValueError: the statistics are those of another partition.
    """
    layout = objective.layout
    diagonals = [name for name in layout.names if fallback_keys(name)[0] in statistics.sums]
    groups = _without(groups, diagonals, objective)
    missing = [_key(group) for group in groups if _key(group) not in {**statistics.sums, **statistics.roots}]
    if missing:
        raise ValueError(
            f"the statistics have no block of the parameters {missing[0].removesuffix('|block')}: they are those of "
            "another partition. Use the partition that they, or the saved average, were made with."
        )
    blocks = [kind.operator(statistics, _key(group)) for group in groups]
    blocks += [fallback_block(name, statistics) for name in diagonals]
    coordinates = [group.coordinates.reshape(-1) for group in groups]
    coordinates += [layout.coordinates(name) for name in diagonals]
    return BlockDiagonal(tuple(blocks), tuple(coordinates), layout.size)


def _add(
    statistics: Statistics,
    groups: tuple[Group, ...],
    kind: BlockKind,
    spread: dict[int, Tensor],
    pieces: list[_Piece],
    factors: LayerFactors,
) -> None:
    """Take in one layer's gradients chunk by chunk: at once for groups inside it, into ``spread`` for others."""
    examples, start = factors.maps[0].examples, 0
    for rows in factors.per_example_gradients():
        dtype = torch.promote_types(rows.dtype, torch.float32)
        for piece in pieces:
            group = groups[piece.group]
            if piece.whole:
                part = rows[:, piece.columns].to(dtype)
                kind.add(statistics, _key(group), part.view(len(rows), *group.coordinates.shape))
            else:
                _spread(spread, groups, piece, slice(start, start + len(rows)), rows, examples, dtype)
        start += len(rows)


def _spread(
    spread: dict[int, Tensor],
    groups: tuple[Group, ...],
    piece: _Piece,
    examples: slice,
    rows: Float[Tensor, "n columns"],
    count: int,
    dtype: torch.dtype,
) -> None:
    """Put rows at their place among the gradients of all examples of a group."""
    if piece.group not in spread:
        spread[piece.group] = rows.new_zeros(count, groups[piece.group].coordinates.numel(), dtype=dtype)
    spread[piece.group][examples, piece.positions] = rows[:, piece.columns].to(dtype)


def _without(groups: tuple[Group, ...], names: list[str], objective: Objective) -> tuple[Group, ...]:
    """Return the groups without some parameters, which get a block of their own."""
    result = []
    for group in groups:
        gone = [name for name in names if name in group.parameters]
        if not gone:
            result.append(group)
            continue
        apart = torch.isin(group.coordinates, torch.cat([objective.layout.coordinates(name) for name in gone]))
        rest = group.coordinates[~apart].unsqueeze(0)
        kept = tuple(name for name in group.parameters if name not in gone)
        if rest.numel():
            result.append(Group(group.name, kept, rest))
    return tuple(result)


def _key(group: Group) -> str:
    # by its parameters, so that averages of another partition, whose names may be the same, are not taken for its own
    return f"{', '.join(group.parameters)}|block"
