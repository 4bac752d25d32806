"""The driver: one forward pass that remembers the layers' calls, and the layer rules run on any output-space vector.

BackPACK's own hooks break on modules called twice, tied weights, in-place activations and partial backward passes. The
driver therefore notes each call's input and the *gradient edge* of its output, which stays right when the output tensor
is modified in place afterwards; ``torch.autograd.grad(outputs, edges, v)`` then gives the gradient at every call's own
output and computes no weight gradient.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from curvlib.extensions.chain import chain_of_calls
from curvlib.extensions.factors import LayerFactors, map_factors
from curvlib.extensions.layers import Layer, LayerPlan, PlannedModule, UnsupportedLayerError
from curvlib.extensions.rule import PositionFactors
from curvlib.extensions.uses import Use, tensors_in
from curvlib.parameters import trainable_parameters

# Output gradients that one backward pass may leave: above it the calls are taken in two passes.
_MANY_BYTES = 2**28


@dataclass(frozen=True, eq=False)
class Output:
    """One tensor of a call's result.

    Attributes:
        edge: where it stands in the autograd graph, or the tensor that it is a view of; None where it has no graph.
        view: its size, stride and offset in that tensor; None where the edge is its own.
    """

    edge: GradientEdge | None
    view: tuple[torch.Size, tuple[int, ...], int] | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module during the forward pass.

    Attributes:
        planned: the module and its rule.
        input: what the rule has kept of the call.
        versions: the versions of the tensors in it then; a later one means that one was modified in place.
        input_edges: where the call's tensors came from, without those that do not depend on a parameter.
        outputs: the tensors of the result whose gradients the rule takes.
        examples: how many they have.
        bytes: what their gradients take.
        dimensions: of the one with most.
        refusal: why the rule cannot treat the call, or "".
    """

    planned: PlannedModule
    input: Any
    versions: tuple[int, ...]
    input_edges: tuple[GradientEdge, ...]
    outputs: tuple[Output, ...]
    examples: int
    bytes: int
    dimensions: int
    refusal: str

    @property
    def edges(self) -> tuple[GradientEdge, ...]:
        """Those of the outputs that have a graph."""
        return tuple(output.edge for output in self.outputs if output.edge is not None)


class Tape:
    """The calls of a model's layers in one forward pass.

    Attributes:
        plan: the layers whose calls are complete; after :meth:`close`, layers with parameters that were also used
            outside of their modules' calls, or called with another number of examples than the outputs have, have
            moved to ``plan.unsupported``.
        without_examples: the parameters of the latter, with the reason.
    """

    def __init__(self, plan: LayerPlan) -> None:
        self.plan = plan
        self._calls: list[Call] = []
        self.without_examples: dict[str, str] = {}
        self._extension = PositionFactors()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note every call of the plan's modules inside the block."""
        # A stack removes the rest as well where an interruption comes between two hooks.
        with ExitStack() as hooks:
            for planned in self.plan.modules:
                begin, note = self._hooks(planned)
                hooks.callback(planned.module.register_forward_pre_hook(begin).remove)
                hooks.callback(planned.module.register_forward_hook(note, with_kwargs=True, prepend=True).remove)
            yield

    def close(self, model: nn.Module, outputs: Tensor) -> None:
        """Find parameters that reach the outputs on a way that no recorded call covers; their layers are unsupported.

        An example is a decoder that computes ``F.linear(h, self.encoder.weight.t())``: the calls of ``encoder`` alone
        would give the wrong curvature.
        """
        used, met = _parameters_outside_calls(outputs, self._calls)
        names = {id(parameter): name for name, parameter in trainable_parameters(model).items()}
        escaped = {
            names[key]: "used outside of its module's own call"
            for key in used
            if key in names and names[key] not in self.plan.unsupported
        }
        met_calls = [call for call in self._calls if any(edge.node in met for edge in call.edges)]
        self.without_examples = _called_without_examples(met_calls, outputs.shape[0])
        escaped = {**_refused(met_calls), **self.without_examples, **escaped}
        plan = self.plan.without(escaped) if escaped else self.plan
        kept = {id(layer) for layer in plan.layers}
        self._calls = [call for call in self._calls if not kept.isdisjoint(_layers_of(call.planned))]
        counts = Counter(key for call in self._calls for key in _layers_of(call.planned))
        self.plan = replace(plan, calls={layer.name: counts[id(layer)] for layer in plan.layers})

    @property
    def has_steps(self) -> bool:
        """Whether a layer whose positions are ordered was used at more than one."""
        return any(
            call.planned.rule.ordered
            and (call.dimensions > 2 or any(self.plan.calls[target[0].name] > 1 for target in self._targets(call)))
            for call in self._calls
        )

    @property
    def is_recurrent(self) -> bool:
        """Whether a layer that is made for sequences was used."""
        return any(call.planned.rule.recurrent for call in self._calls)

    def _targets(self, call: Call) -> list[tuple[Layer, int]]:
        return [target for target in call.planned.targets if target is not None and target[0].name in self.plan.calls]

    def chain(self, outputs: Tensor) -> tuple[Layer, ...]:
        """Return the layers in the order of their calls, where these form a chain of single positions.

        Raises:
            UnsupportedLayerError: they do not.
        """
        calls = chain_of_calls(outputs, self._calls)
        for call in calls:
            if call.dimensions > 2:
                raise UnsupportedLayerError(
                    f"layer {call.planned.name!r} is used at several positions, its outputs having {call.dimensions} "
                    "dimensions: a chain needs (N, features). Use KFAC."
                )
        return tuple(layer for call in calls for layer, _ in self._targets(call))

    def factors(self, outputs: Tensor, vector: Tensor) -> Iterator[LayerFactors]:
        """Yield (a, g) of every layer for one output-space vector, by one backward pass down to the layers' outputs.

        Args:
            outputs: the model's outputs (N, ...), with their graph, which is kept.
            vector: v, of the outputs' shape.

        Raises:
            RuntimeError: an input was modified in place after its use.
            UnsupportedLayerError: a call does not have the outputs' number of examples.
        """
        for calls in self._passes():
            edges = [edge for call in calls for edge in call.edges]
            gradients = torch.autograd.grad(
                outputs, edges, vector.to(outputs.dtype), retain_graph=True, allow_unused=True
            )
            uses = self._uses(calls, gradients, outputs.shape[0])
            del gradients
            for layer in self.plan.layers:
                by_map = sorted(uses.pop(id(layer)).items())  # what a layer's uses have made goes with them
                if by_map:
                    maps = (map_factors(found[0], layer.maps[place], tuple(found)) for place, found in by_map)
                    yield LayerFactors(layer, tuple(maps))

    def _passes(self) -> list[list[Call]]:
        """Return the calls of one backward pass or of two, so that fewer output gradients are alive at once.

        Where they take much memory, the calls behind four fifths of it get a pass of their own. It ends where they
        begin, so that it costs a part of the first one; with the outputs of convolutional networks, which become
        smaller from stage to stage, it is the part in which the large factors A are made.
        """
        total = sum(call.bytes for call in self._calls)
        if total <= _MANY_BYTES:
            return [self._calls] if self._calls else []
        first, late, before = [], [], 0
        early_layers: set[int] = set()
        for call in self._calls:
            layers = _layers_of(call.planned)
            # all calls of a layer belong together
            if before < 0.8 * total or not early_layers.isdisjoint(layers):
                early_layers |= layers
                first.append(call)
            else:
                late.append(call)
            before += call.bytes
        return [first, late] if late else [first]

    def _uses(
        self, calls: list[Call], gradients: tuple[Tensor | None, ...], examples: int
    ) -> dict[int, dict[int, list[Use]]]:
        """Return by layer and map what the calls' rules make of the gradients at their outputs."""
        uses: dict[int, dict[int, list[Use]]] = {id(layer): defaultdict(list) for layer in self.plan.layers}
        remaining = iter(gradients)
        for call in calls:
            found = [None if output.edge is None else next(remaining) for output in call.outputs]
            if all(gradient is None for gradient in found):
                continue  # a branch that the outputs do not depend on
            _check_versions(call)
            own = tuple(_as_viewed(gradient, output) for gradient, output in zip(found, call.outputs, strict=True))
            made = self._extension.collect(call.planned.module, call.input, own if len(own) > 1 else own[0])
            for target, use in zip(call.planned.targets, made, strict=True):
                if target is not None and id(target[0]) in uses:
                    _check_examples(call.planned.name, use, examples)
                    uses[id(target[0])][target[1]].append(use)
        return uses

    def _hooks(self, planned: PlannedModule) -> tuple[Callable[..., None], Callable[..., None]]:
        """Return what is called before and after the module."""
        rule = planned.rule
        begun: list[Any] = []

        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            begun[:] = [rule.call_begins(module)]

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            results = rule.call_outputs(output)
            if not any(result.requires_grad for result in results):
                return
            x = rule.call_record(module, args, kwargs, output, begun.pop())
            given = tensors_in((args, tuple(kwargs.values())))
            self._calls.append(
                Call(
                    planned,
                    x,
                    versions=tuple(tensor._version for tensor in tensors_in(x)),
                    input_edges=tuple(get_gradient_edge(tensor) for tensor in given if tensor.requires_grad),
                    outputs=tuple(map(_output, results)),
                    examples=rule.examples(module, results),
                    bytes=sum(result.numel() * result.element_size() for result in results),
                    dimensions=max(result.ndim for result in results),
                    refusal=rule.call_refusal(module),
                )
            )

        return begin, note


def _refused(calls: list[Call]) -> dict[str, str]:
    """Return the parameters of layers with a call that its rule cannot treat, with the reason."""
    refused = [(call.refusal, target[0]) for call in calls if call.refusal for target in call.planned.targets if target]
    return {name: reason for reason, layer in refused for name in layer.parameters}


def _called_without_examples(calls: list[Call], examples: int) -> dict[str, str]:
    """Return the parameters of layers that were called with another number of examples than the outputs have.

    One is a table of positions that is looked up once and added to every example: what reaches it is a sum.
    """
    return {
        name: (
            f"module {call.planned.name!r} was called with {call.examples} examples along the first dimension while "
            f"the model's outputs have {examples} examples along theirs (statistics need both: keep (N, ...))"
        )
        for call in calls
        if call.examples != examples
        for target in call.planned.targets
        if target is not None
        for name in target[0].parameters
    }


def _output(output: Tensor) -> Output:
    """Return where a tensor of a call's result stands in the graph.

    An in-place operation on a view (``Linear`` with a bias returns one for inputs with several dimensions) gives the
    view another node and leaves that of its base: where the view is all of its base, the base's edge is kept.
    """
    if not output.requires_grad:
        return Output(None)
    base = output._base
    if base is None or base.numel() != output.numel() or not base.is_contiguous() or base.grad_fn is None:
        return Output(get_gradient_edge(output))
    view = output.size(), output.stride(), int(output.storage_offset()) - int(base.storage_offset())
    return Output(get_gradient_edge(base), view)


def _as_viewed(gradient: Tensor | None, output: Output) -> Tensor | None:
    """Return the gradient of a tensor from that of the one that it is a view of."""
    if gradient is None or output.view is None:
        return gradient
    size, stride, offset = output.view
    gradient = gradient.contiguous()
    return gradient.as_strided(size, stride, gradient.storage_offset() + offset)


def _layers_of(planned: PlannedModule) -> set[int]:
    return {id(target[0]) for target in planned.targets if target is not None}


def _check_versions(call: Call) -> None:
    if tuple(tensor._version for tensor in tensors_in(call.input)) != call.versions:
        raise RuntimeError(
            f"the input of module {call.planned.name!r} was modified in place after the module used it, so its "
            "statistics would be wrong. Replace the in-place operation that follows it by one that makes a new tensor."
        )


def _check_examples(name: str, use: Use, examples: int) -> None:
    if use.examples != examples:
        raise UnsupportedLayerError(
            f"module {name!r} was called with {use.examples} examples along the first dimension, but the model's "
            f"outputs have {examples} examples along theirs. Statistics need the examples first in both: keep (N, ...) "
            "through the model, also for its outputs."
        )


def _parameters_outside_calls(outputs: Tensor, calls: list[Call]) -> tuple[set[int], set[Node]]:
    """Return the ids of the leaves that the outputs reach when each recorded call is stepped over to its input.

    And the nodes that were met on the way.
    """
    shortcut = {edge.node: call.input_edges for call in calls for edge in call.edges}
    stack: list[Node | None] = [outputs.grad_fn]
    seen: set[Node] = set()
    leaves: set[int] = set()
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
            stack.extend(edge.node for edge in shortcut[node])
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.add(id(leaf))
        stack.extend(successor for successor, _ in node.next_functions)
    return leaves, seen
