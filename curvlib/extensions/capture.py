"""The driver: one forward pass that remembers the layers' calls, and the layer rules run on any output-space vector.

BackPACK's own hooks break on modules called twice, tied weights, in-place activations and partial backward passes. The
driver therefore notes each call's input and the *gradient edge* of its output, which stays right when the output tensor
is modified in place afterwards; ``torch.autograd.grad(outputs, edges, v)`` then gives the gradient at every call's own
output and computes no weight gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvlib.extensions.factors import LayerFactors
from curvlib.extensions.layers import LayerPlan, UnsupportedLayerError
from curvlib.extensions.rule import LayerRule, PositionFactors
from curvlib.parameters import trainable_parameters


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module during the forward pass.

    Attributes:
        name: the module's name.
        module: the module.
        layer: index of its layer in the plan.
        input: the tensor that it was called with.
        input_version: the version of that tensor then; a later one means that it was modified in place.
        input_edge: where the input came from, or None if it does not depend on a parameter.
        edge: the output of the call in the autograd graph.
    """

    name: str
    module: nn.Module
    layer: int
    input: Tensor
    input_version: int
    input_edge: GradientEdge | None
    edge: GradientEdge


class Tape:
    """The calls of a model's layers in one forward pass.

    Attributes:
        plan: the layers whose calls are complete; after :meth:`close`, layers with parameters that were also used
            outside of their modules' calls have moved to ``plan.unsupported``.
    """

    def __init__(self, plan: LayerPlan) -> None:
        self.plan = plan
        self._calls: list[Call] = []
        self._extension = PositionFactors()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note every call of the plan's modules inside the block."""
        handles = [
            module.register_forward_hook(self._hook(name, rule, layer), with_kwargs=True, prepend=True)
            for name, module, rule, layer in self.plan.modules
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def close(self, model: nn.Module, outputs: Tensor) -> None:
        """Find parameters that reach the outputs on a way that no recorded call covers; their layers are unsupported.

        An example is a decoder that computes ``F.linear(h, self.encoder.weight.t())``: the calls of ``encoder`` alone
        would give the wrong curvature.
        """
        used = _parameters_outside_calls(outputs, self._calls)
        names = {id(parameter): name for name, parameter in trainable_parameters(model).items()}
        escaped = {
            names[key]: "used outside of its module's own call"
            for key in used
            if key in names and names[key] not in self.plan.unsupported
        }
        before, self.plan = self.plan, self.plan.without(escaped)
        if escaped:
            index = {id(layer): new for new, layer in enumerate(self.plan.layers)}
            kept = [call for call in self._calls if id(before.layers[call.layer]) in index]
            self._calls = [Call(**{**vars(call), "layer": index[id(before.layers[call.layer])]}) for call in kept]

    def factors(self, outputs: Tensor, vector: Tensor) -> Iterator[LayerFactors]:
        """Yield (a, g) of every layer for one output-space vector, by one backward pass down to the layers' outputs.

        Args:
            outputs: the model's outputs (N, ...), with their graph, which is kept.
            vector: v, of the outputs' shape.

        Raises:
            RuntimeError: an input was modified in place after its use.
            UnsupportedLayerError: a call does not have the outputs' number of examples.
        """
        if not self._calls:
            return
        edges = [call.edge for call in self._calls]
        gradients = torch.autograd.grad(outputs, edges, vector.to(outputs.dtype), retain_graph=True, allow_unused=True)
        uses: list[list] = [[] for _ in self.plan.layers]
        for call, gradient in zip(self._calls, gradients, strict=True):
            if gradient is None:
                continue  # a branch that the outputs do not depend on
            _check_call(call, outputs.shape[0])
            uses[call.layer].append(self._extension.collect(call.module, call.input, gradient))
        for layer, layer_uses in zip(self.plan.layers, uses, strict=True):
            if layer_uses:
                yield LayerFactors(layer, tuple(layer_uses))

    def _hook(self, name: str, rule: LayerRule, layer: int):  # type: ignore[no-untyped-def]
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if not output.requires_grad:
                return
            x = rule.call_input(module, args, kwargs)
            edge = get_gradient_edge(x) if x.requires_grad else None
            self._calls.append(Call(name, module, layer, x, x._version, edge, get_gradient_edge(output)))

        return note


def _check_call(call: Call, examples: int) -> None:
    if call.input._version != call.input_version:
        raise RuntimeError(
            f"the input of module {call.name!r} was modified in place after the module used it, so its statistics "
            "would be wrong. Replace the in-place operation that follows it by one that makes a new tensor."
        )
    if call.input.ndim < 2 or call.input.shape[0] != examples:
        raise UnsupportedLayerError(
            f"module {call.name!r} was called with an input of shape {tuple(call.input.shape)}, but the model's "
            f"outputs have {examples} examples along their first dimension. Statistics need the examples "
            "first in both: keep (N, ...) through the model, also for its outputs."
        )


def _parameters_outside_calls(outputs: Tensor, calls: list[Call]) -> set[int]:
    """Return the ids of the leaves that the outputs reach when each recorded call is stepped over to its input."""
    shortcut = {call.edge.node: call.input_edge for call in calls}
    stack, seen, leaves = [outputs.grad_fn], set(), set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise UnsupportedLayerError(
                "the model uses torch.utils.checkpoint with use_reentrant=True, which hides its parameters from "
                "torch.autograd.grad: their gradient would silently be zero. Use use_reentrant=False."
            )
        if node in shortcut:
            edge = shortcut[node]
            stack.append(edge.node if edge is not None else None)
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.add(id(leaf))
        stack.extend(successor for successor, _ in node.next_functions)
    return leaves
