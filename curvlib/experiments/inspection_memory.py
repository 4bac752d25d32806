"""What an approximation takes of the memory: the numbers of its operator, and dense blocks that would be too large."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import singledispatch

from torch import Tensor

import curvlib
from curvlib.approximations import Approximation, BlockDiagonal, Dense, LayerPartition
from curvlib.operators import LinearOperator, OperatorError

# Dense blocks of more bytes than this may take a machine down before it says that they are too many.
_MOST_BYTES = 2**32


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


def check_bytes(approximation: Approximation, evaluation: curvlib.Evaluation) -> None:
    """Refuse an approximation whose dense blocks would be too large.

    Raises:
        MemoryError: says how large.
    """
    needed = evaluation.outputs.element_size() * dense_numbers(approximation, evaluation)
    if needed > _MOST_BYTES:
        raise MemoryError(f"its dense blocks would take {needed / 1e9:,.1f} GB for the whole model")


@singledispatch
def dense_numbers(approximation: Approximation, evaluation: curvlib.Evaluation) -> int:
    """Return how many numbers an approximation's dense blocks have, 0 for one without such blocks."""
    return 0


@dense_numbers.register
def _(approximation: Dense, evaluation: curvlib.Evaluation) -> int:
    return evaluation.layout.size**2


@dense_numbers.register
def _(approximation: BlockDiagonal, evaluation: curvlib.Evaluation) -> int:
    partition = approximation.partition
    if not isinstance(partition, LayerPartition):
        return 0
    return sum(layer.size**2 // partition.blocks_of(layer) for layer in evaluation.layers)
