"""Whether the calls of a model's layers form a chain, by the autograd graph of one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.autograd.graph import Node

from curvlib.extensions.layers import UnsupportedLayerError

if TYPE_CHECKING:
    from curvlib.extensions.capture import Call


def chain_of_calls(outputs: Tensor, calls: Sequence[Call]) -> tuple[Call, ...]:
    """Return the calls from the first to the last, where each one's input is a function of the output before alone.

    From the outputs, and then from the input of each call that was found, the graph is followed back to the nearest
    calls: there must be one, until the input of the first call reaches none. What carries no gradient, such as the
    model's inputs, is not part of the graph and may enter anywhere.

    Raises:
        UnsupportedLayerError: two calls are found, or none by the outputs.
    """
    by_node = {edge.node: call for call in calls for edge in call.edges}
    chain: list[Call] = []
    where = "the outputs of the model"
    found = _nearest([outputs.grad_fn], by_node)
    while found:
        if len(found) > 1:
            names = " and ".join(sorted(repr(call.planned.name) for call in found))
            raise UnsupportedLayerError(
                f"the layers of the model are no chain: {where} depend directly on the outputs of layers {names}."
            )
        (call,) = found
        chain.append(call)
        where = f"the inputs of layer {call.planned.name!r}"
        found = _nearest([edge.node for edge in call.input_edges], by_node)
    if not chain:
        raise UnsupportedLayerError("the layers of the model are no chain: the outputs depend on none of them.")
    return tuple(reversed(chain))


def _nearest(starts: Iterable[Node | None], by_node: dict[Node, Call]) -> set[Call]:
    """Return the calls whose outputs can be reached without passing through another call."""
    stack, seen, found = list(starts), set(), set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in by_node:
            found.add(by_node[node])
        else:
            stack.extend(successor for successor, _ in node.next_functions)
    return found
