"""What an approximation says of each parameter: the block that it gets, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockRow:
    """One line of a description: a parameter, where it belongs and how often that is called, its block, and why."""

    parameter: str
    shape: tuple[int, ...]
    layer: str
    calls: str
    block: str
    reason: str


@dataclass(frozen=True)
class Description:
    """Which block each parameter gets; ``str()`` is a table."""

    approximation: str
    rows: tuple[BlockRow, ...]

    def __str__(self) -> str:
        head = ("parameter", "shape", "layer", "calls", "block", "why")
        lines = [(row.parameter, _shape(row.shape), row.layer, row.calls, row.block, row.reason) for row in self.rows]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [head, *lines]
        ]
        return "\n".join([self.approximation, table[0], "  ".join("-" * width for width in widths), *table[1:]])


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
