"""Which coordinates of a curvature matrix are looked at: those of some layers, in the order of the K-FAC paper.

Symbols: D parameters, d selected ones, S (d,) their places in the flat vector.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float, Int
from torch import Tensor

import curvlib
from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.inspection_memory import size_text, unit_block_columns
from curvlib.operators import LinearOperator

# Layers that a message lists.
_MOST_NAMES = 12


@dataclass(frozen=True, kw_only=True, eq=False)
class Region:
    """A layer, or a parameter outside every layer.

    Args:
        name: of the layer or the parameter.
        coordinates: their places in the flat vector.
    """

    name: str
    coordinates: Int[Tensor, " n"]

    @property
    def size(self) -> int:
        """How many coordinates there are."""
        return len(self.coordinates)


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """Regions that are looked at, one after the other.

    Args:
        regions: at least one.
        total: D.
    """

    regions: tuple[Region, ...]
    total: int

    @property
    def coordinates(self) -> Int[Tensor, " d"]:
        """S, region by region."""
        return torch.cat([region.coordinates for region in self.regions])

    @property
    def size(self) -> int:
        """The number d of coordinates."""
        return sum(region.size for region in self.regions)

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left out."""
        return self.size == self.total

    @property
    def slices(self) -> list[slice]:
        """Where each region lies among the selected coordinates."""
        ends = [0]
        for region in self.regions:
            ends.append(ends[-1] + region.size)
        return [slice(start, stop) for start, stop in itertools.pairwise(ends)]

    def submatrix(self, operator: LinearOperator, advance: Callable[[float], None]) -> Float[Tensor, "d d"]:
        """Return C[S, S] in float64, by products with d unit vectors; the (D, D) matrix is never made.

        Args:
            operator: C, (D, D).
            advance: told which part of the products is done.
        """
        S, d = self.coordinates, self.size
        step = unit_block_columns(operator.size)
        columns = []
        for start in range(0, d, step):
            chosen = S[start : start + step]
            unit = torch.zeros(operator.size, len(chosen), dtype=operator.dtype, device=operator.device)
            unit[chosen, torch.arange(len(chosen), device=operator.device)] = 1.0
            columns.append((operator @ unit)[S].double())
            advance((start + len(chosen)) / d)
        matrix = torch.cat(columns, dim=1)
        return 0.5 * (matrix + matrix.T)


def select(evaluation: curvlib.Evaluation, patterns: Sequence[str], most: int) -> Selection:
    """Return the selected regions of a model, in the model's order.

    Args:
        evaluation: the objective on a batch.
        patterns: names of layers, with ``*`` and ``?``; none selects all.
        most: coordinates that may be selected.

    Raises:
        ExperimentError: a pattern fits nothing, or too many coordinates are selected.
    """
    regions = tuple(_regions(evaluation))
    for pattern in patterns:
        if not any(fnmatchcase(region.name, pattern) for region in regions):
            close = difflib.get_close_matches(pattern, [region.name for region in regions], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ExperimentError(f"--layers {pattern} fits no layer{hint} Layers: {_sizes(regions)}.")
    chosen = tuple(
        region for region in regions if not patterns or any(fnmatchcase(region.name, pattern) for pattern in patterns)
    )
    selection = Selection(regions=chosen, total=evaluation.layout.size)
    if selection.size > most:
        raise ExperimentError(
            f"{'The layers' if patterns else 'All layers'} have {selection.size:,} coordinates, more than --most "
            f"{most:,}; every matrix would take {size_text(8 * selection.size**2)}. {_remedy(regions, most)}, or use "
            f"--estimate, which has no pictures. Layers: {_sizes(regions)}."
        )
    return selection


def _regions(evaluation: curvlib.Evaluation) -> Iterator[Region]:
    plan = evaluation.plan
    for layer in plan.layers:
        # Martens & Grosse stack the columns of (W b), so that K-FAC's block is A (x) G: squares of G, one for each
        # entry of A. The layer's own order is row by row.
        first = layer.maps[0]
        rows = layer.coordinates.view(first.groups, first.d_out, first.columns)
        yield Region(name=layer.name or "(model)", coordinates=rows.transpose(1, 2).reshape(-1))
    for name in plan.unsupported:
        yield Region(name=name, coordinates=evaluation.layout.coordinates(name))


def _remedy(regions: Sequence[Region], most: int) -> str:
    """Return a selection that is small enough: as many layers in a row as possible, those in the middle first."""
    count = len(regions)
    runs = (
        regions[start : start + length]
        for length in range(count - 1, 0, -1)
        for start in sorted(range(count - length + 1), key=lambda start: abs(2 * start + length - count))
    )
    chosen = next((run for run in runs if sum(region.size for region in run) <= most), None)
    if chosen is not None:
        return f"Choose fewer with --layers {','.join(region.name for region in chosen)}, raise --most"
    least = min(regions, key=lambda region: region.size)
    return f"The smallest layer is {least.name} with {least.size:,}: choose it with --layers and raise --most"


def _sizes(regions: Sequence[Region]) -> str:
    shown = ", ".join(f"{region.name} ({region.size:,})" for region in regions[:_MOST_NAMES])
    more = len(regions) - _MOST_NAMES
    return f"{shown} and {more} more" if more > 0 else shown
