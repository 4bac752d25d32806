"""What an approximation takes of the memory: the numbers of its operator, and matrices that would be too large."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from functools import singledispatch
from pathlib import Path

import torch
from torch import Tensor

import curvlib
from curvlib.approximations import (
    EKFAC,
    KFAC,
    KFRA,
    Approximation,
    BlockDiagonal,
    Dense,
    LayerPartition,
    LowRank,
    TridiagonalKFAC,
)
from curvlib.experiments.errors import ExperimentError
from curvlib.operators import LinearOperator, OperatorError

# Matrices of more bytes than this may take a machine down before it says that they are too many.
_MOST_BYTES = 2**32
# One for each parameter, of which the exact matrix of a large model takes seconds.
_MOST_PRODUCTS = 20_000
# What is held at once of matrices (d, d): the exact one, an approximation, their difference and its absolute values,
# a damped copy and its factor, and what the eigenvalue solver takes; the inverses come on top.
_MATRICES, _INVERSES = 8, 3
# Blocks of unit vectors and of what becomes of them in a product.
_BLOCKS = 4
# Numbers of the block of unit vectors that an operator is multiplied with at once, and the most columns in it.
_NUMBERS_AT_ONCE = 2**24
_COLUMNS_AT_ONCE = 64
# Random vectors for a Frobenius error; blocks of them, of their products and of the differences are held at once.
# Beside them are the basis of Lanczos and the three blocks of a spectral density.
_LEAST_PROBES, _MOST_PROBES, _NUMBERS_OF_PROBES = 4, 30, 2**27
_VECTORS_OF_ESTIMATES = 40
_MEMORY = Path("/proc/meminfo")
_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


def bytes_of(operator: LinearOperator) -> int | None:
    """Return the bytes of an operator's floating-point tensors, None for one that is more than its tensors.

    Numbers of coordinates belong to the layers of the objective, whatever approximates them.
    """
    try:
        state = operator.state_dict()
    except OperatorError:
        return None
    tensors = {tensor.data_ptr(): tensor for tensor in _tensors(state) if tensor.is_floating_point()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _tensors(state: object) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        yield from _all_tensors(list(state.values()))
    elif isinstance(state, (tuple, list)):
        yield from _all_tensors(state)


def _all_tensors(states: Sequence[object]) -> Iterator[Tensor]:
    for state in states:
        yield from _tensors(state)


def check_cost(approximation: Approximation, evaluation: curvlib.Evaluation) -> None:
    """Refuse an approximation whose matrices would be too large, or that takes too many products.

    Raises:
        MemoryError: says how large.
        ValueError: says how many.
    """
    products = exact_products(approximation, evaluation)
    if products > _MOST_PRODUCTS:
        raise ValueError(
            f"it takes {products:,} products with the exact matrix, one for each parameter, more than the "
            f"{_MOST_PRODUCTS:,} that an approximation may take here"
        )
    needed = evaluation.outputs.element_size() * matrix_numbers(approximation, evaluation)
    limit = min(_MOST_BYTES, available_bytes(evaluation.layout.device))
    if needed > limit:
        raise MemoryError(
            f"its matrices would take {size_text(needed)} for the whole model, more than the {size_text(limit)} that "
            "an approximation may take here"
        )


def exact_products(approximation: Approximation, evaluation: curvlib.Evaluation) -> int:
    """Return how many products with the exact matrix an approximation takes that needs one for each parameter, else 0.

    That are the dense matrix, and the exact blocks or diagonal of a matrix which gives products only.
    """
    matrix = getattr(approximation, "matrix", None)
    by_products = getattr(approximation, "takes_products", False) and not getattr(matrix, "has_vectors", True)
    return evaluation.layout.size if by_products or isinstance(approximation, Dense) else 0


def check_selection(size: int, total: int, inverses: bool, device: torch.device) -> int:
    """Return about how many bytes looking at this many coordinates takes at once, refuse what there is no room for.

    Args:
        size: d, coordinates that are looked at.
        total: D.
        inverses: whether inverses are looked at as well.
        device: where.

    Raises:
        ExperimentError: says how many, and the remedy.
    """
    needed = (
        8 * size**2 * (_MATRICES + (_INVERSES if inverses else 0)) + 4 * _BLOCKS * unit_block_columns(total) * total
    )
    available = available_bytes(device)
    if needed > available:
        raise ExperimentError(
            f"Looking at {size:,} coordinates would take about {size_text(needed)}, more than the "
            f"{size_text(available)} that are free: choose fewer with --layers, or use --estimate."
        )
    return needed


def check_estimate(total: int, device: torch.device) -> int:
    """Return about how many bytes estimates take at once for D parameters, refuse what there is no room for.

    Raises:
        ExperimentError: says how many.
    """
    needed = 4 * total * (3 * probes_of(total) + _VECTORS_OF_ESTIMATES)
    available = available_bytes(device)
    if needed > available:
        raise ExperimentError(
            f"Estimates for {total:,} parameters would take about {size_text(needed)}, more than the "
            f"{size_text(available)} that are free: freeze parameters (requires_grad_(False)), or use a larger machine."
        )
    return needed


def probes_of(size: int) -> int:
    """Return how many random vectors an estimate of the Frobenius error takes."""
    return max(_LEAST_PROBES, min(_MOST_PROBES, _NUMBERS_OF_PROBES // size))


def unit_block_columns(total: int) -> int:
    """Return how many unit vectors (D,) are multiplied with at once."""
    return max(1, min(_COLUMNS_AT_ONCE, _NUMBERS_AT_ONCE // total))


def available_bytes(device: torch.device) -> int:
    """Return the bytes that are free; where the system does not tell, all that there are."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = _MEMORY.read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize


def size_text(count: float) -> str:
    """Return bytes in a unit that suits them."""
    unit, scale = next(((unit, scale) for unit, scale in _UNITS if count >= scale), ("B", 1.0))
    return f"{count / scale:.3g} {unit}"


@singledispatch
def matrix_numbers(approximation: Approximation, evaluation: curvlib.Evaluation) -> int:
    """Return how many numbers an approximation's matrices have, 0 for one without such."""
    return 0


@matrix_numbers.register
def _(approximation: Dense, evaluation: curvlib.Evaluation) -> int:
    return evaluation.layout.size**2


@matrix_numbers.register
def _(approximation: BlockDiagonal, evaluation: curvlib.Evaluation) -> int:
    rank = getattr(approximation.blocks, "rank", None)
    blocks = _blocks(approximation, evaluation)
    numbers = sum(count * size * (size if rank is None else min(size, rank)) for count, size in blocks)
    return numbers + _fallback_numbers(approximation, evaluation)


@matrix_numbers.register(KFAC)
@matrix_numbers.register(EKFAC)
@matrix_numbers.register(KFRA)
@matrix_numbers.register(TridiagonalKFAC)
def _(approximation: Approximation, evaluation: curvlib.Evaluation) -> int:
    maps = [part for layer in evaluation.layers for part in layer.maps if not (part.sparse or part.elementwise)]
    factors = sum(part.groups * (part.columns**2 + part.d_out**2) for part in maps)
    return factors + _fallback_numbers(approximation, evaluation)


@matrix_numbers.register
def _(approximation: LowRank, evaluation: curvlib.Evaluation) -> int:
    rank = getattr(approximation.method, "rank", 0)  # full rank has a limit of its own
    return 4 * rank * evaluation.layout.size  # the factor, its sketch, a product and a basis of it


def _blocks(approximation: BlockDiagonal, evaluation: curvlib.Evaluation) -> Iterator[tuple[int, int]]:
    """Yield numbers and sizes of blocks."""
    partition = approximation.partition
    if isinstance(partition, LayerPartition):
        for layer in evaluation.layers:
            count = partition.blocks_of(layer)
            yield count, layer.size // count
    else:
        for group in partition.groups(evaluation.objective, evaluation.plan):
            count, size = group.coordinates.shape
            yield count, size


def _fallback_numbers(approximation: Approximation, evaluation: curvlib.Evaluation) -> int:
    """Return how many numbers the dense blocks of parameters outside every layer have."""
    if getattr(approximation, "on_unsupported", None) != "dense":
        return 0
    return sum(len(evaluation.layout.coordinates(name)) ** 2 for name in evaluation.plan.unsupported)
