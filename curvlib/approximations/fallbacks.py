"""What a parameter outside every layer gets, where the caller opted for that."""

from __future__ import annotations

from typing import Literal, get_args

from curvlib.approximations.statistics import Statistics
from curvlib.operators import Dense, Diagonal, LinearOperator

Fallback = Literal["raise", "diagonal", "dense", "exclude"]

FALLBACK_BLOCKS = {
    "raise": "refused",
    "diagonal": "exact diagonal",
    "dense": "exact dense block",
    "exclude": "none (zero curvature)",
}


def check_fallback(on_unsupported: object) -> None:
    """Raise ValueError for an unknown fallback."""
    if on_unsupported not in get_args(Fallback):
        raise ValueError(f"on_unsupported must be one of {get_args(Fallback)}, got {on_unsupported!r}.")


def fallback_keys(parameter: str) -> tuple[str, str]:
    """Return the keys of a parameter's own diagonal and of its own dense block."""
    return f"diagonal of {parameter}", f"block of {parameter}"


def fallback_block(parameter: str, statistics: Statistics) -> LinearOperator:
    """Return the operator of a parameter outside every layer."""
    diagonal_key, dense_key = fallback_keys(parameter)
    if diagonal_key in statistics.sums:
        return Diagonal(statistics.sums[diagonal_key])
    return Dense(statistics.sums[dense_key])
