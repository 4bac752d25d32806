"""What every layer rule keeps: its inputs and output gradients rebuild the gradients of each example.

Symbols: N examples, T positions, a (N, T, groups, columns) inputs, g (N, T, groups, d_out) output gradients, J the
Jacobian of the outputs, v an output-space vector.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from curvlib import GGN
from curvlib.approximations import BlockDiagonal, Diagonal
from curvlib.extensions import DenseFactors, Layer, LayerFactors
from curvlib.objective import Evaluation
from curvlib.testing.identities import Subject, described
from curvlib.testing.layers import LayerCase
from curvlib.testing.oracles import Network
from curvlib.testing.search import search
from curvlib.testing.unchanged import Snapshot

# float64: sums of some hundred products of numbers around 1
_EXACT = 1e-12
# Of more parameters, which of them are frozen is left to chance.
_MOST_FROZEN = 3


def check_layer(module: nn.Module | SearchStrategy, inputs: Any = None, *, examples: int = 20) -> None:
    """Check the layer rule of a module: (a, g), blocks and diagonal against automatic differentiation, in float64.

    Parameters are also frozen one at a time, and the module is also called twice in one forward pass. Modules with
    several inputs, or whose output is no tensor, are given inside a module of yours that calls them.

    Args:
        module: a module whose parameters all belong to layers, or a Hypothesis strategy of
            :class:`~curvlib.testing.LayerCase`. It is copied, and brought to float64.
        inputs: what the module is called with: a tensor, a tuple of arguments or a dictionary, with N examples first.
        examples: how many cases are drawn.

    Raises:
        IdentityError: an identity breaks, with the smallest case that was found.

    Example:
        >>> check_layer(nn.Linear(3, 2), torch.randn(4, 3))
    """
    if not isinstance(module, (nn.Module, SearchStrategy)):
        raise TypeError(f"check_layer needs a module, such as nn.Linear(3, 2), got {described(module)}.")
    cases = module if isinstance(module, SearchStrategy) else st.just(LayerCase(module, inputs))

    def check(case: LayerCase) -> None:
        subject = Subject(f"the layer rule of {_names(case.module)}")
        torch.manual_seed(0)
        case = LayerCase(copy.deepcopy(case.module).double(), _moved(case.inputs, lambda x: x.double()))
        _one_call(subject, case)
        _frozen_parts(subject, case)
        _several_calls(subject, case)
        _single_precision(subject, case)

    search(cases, check, examples if isinstance(module, SearchStrategy) else 1)


def _names(module: nn.Module) -> str:
    own = [type(part).__name__ for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
    return " and ".join(dict.fromkeys(own)) or type(module).__name__


def _one_call(subject: Subject, case: LayerCase, note: str = "") -> None:
    """The squared error summed over outputs has the Hessian 2 I: its GGN is 2 J^T J."""
    network = Network(case.module, nn.MSELoss(reduction="sum"), case.inputs, None)
    outputs = subject.value("the module gives a tensor", lambda: network.outputs(network.theta).detach())
    network.targets, v = torch.randn_like(outputs), torch.randn_like(outputs)
    before, given = Snapshot(case.module), copy.deepcopy(case.inputs)
    evaluation = subject.value(f"the module can be evaluated{note}", network.evaluate)
    outside = evaluation.plan.unsupported
    subject.holds(f"every parameter belongs to a layer{note}", not outside, f"outside: {outside}")
    subject.equal(f"the outputs are those without curvlib{note}", evaluation.outputs, outputs)
    J = network.jacobian().reshape(len(v), -1, evaluation.layout.size)
    size = float(J.abs().max()) * (J.shape[1] + 1)
    _gradients(subject, evaluation, v, torch.einsum("no,nod->nd", v.flatten(1), J), size, note)
    before.compare(subject, "an evaluation")
    for now, then in zip(_tensors(case.inputs), _tensors(given), strict=True):
        subject.same(f"an evaluation leaves the module's inputs as they were{note}", now, then)
    rows = J.flatten(0, 1)
    _blocks(subject, evaluation, 2.0 * rows.T @ rows, note)
    before.compare(subject, "an estimate")


def _gradients(subject: Subject, evaluation: Evaluation, v: Tensor, expected: Tensor, size: float, note: str) -> None:
    rebuilt = torch.zeros_like(expected)
    found = subject.value(f"(a, g) of every layer{note}", lambda: list(evaluation.layer_factors(v)))
    for factors in found:
        layer = factors.layer
        identity = f"per-example gradients of (a, g){note}"
        rows = subject.value(identity, partial(_per_example_gradients, factors))
        rebuilt[:, layer.coordinates] += rows
        squares = subject.value(f"sums of squares of (a, g){note}", factors.squared_gradients)
        identity = f"squared_gradients = sum of squares of the per-example gradients{note}"
        subject.equal(identity, squares, rows.square().sum(0), scale=size**2, tolerance=_EXACT)
    identity = f"sum_t g_t a_t^T = J_n^T v of every example n{note}"
    subject.equal(identity, rebuilt, expected, scale=size, tolerance=_EXACT)
    for factors in found:
        _shapes(subject, factors.layer, factors.maps, len(v), note)


def _per_example_gradients(factors: LayerFactors) -> Tensor:
    return torch.cat(list(factors.per_example_gradients()))


def _shapes(subject: Subject, layer: Layer, maps: Any, N: int, note: str) -> None:
    for part in maps:
        if not isinstance(part, DenseFactors) or part.map.elementwise:
            continue
        a, g, of = part.a, part.g, part.map
        expected = (N, g.shape[1], of.groups)
        got = (tuple(a.shape), tuple(g.shape))
        fits = (*expected, of.columns) == got[0] and (*expected, of.d_out) == got[1]
        subject.holds(
            f"a is (N, T, groups, columns) and g (N, T, groups, d_out){note}",
            fits,
            f"expected {(*expected, of.columns)} and {(*expected, of.d_out)} of {layer.name!r}, got {got}",
        )
        if not of.weight:
            continue
        rows, moments = part.inputs.flatten(0, 1), part.moments()
        outer = torch.einsum("rgi,rgj->gij", rows, rows)
        scale = float(outer.abs().max()) if outer.numel() else 0.0
        subject.equal(f"moments().outer = sum of a a^T{note}", moments.outer, outer, tolerance=_EXACT)
        # sums of signed numbers: beside the root of their number times their squares
        scale = (scale * max(1, len(rows))) ** 0.5
        subject.equal(f"moments().total = sum of a{note}", moments.total, rows.sum(0), scale=scale, tolerance=_EXACT)


def _blocks(subject: Subject, evaluation: Evaluation, dense: Tensor, note: str) -> None:
    diagonal = subject.value(f"the exact diagonal{note}", lambda: Diagonal(GGN()).estimate(evaluation).diagonal())
    subject.equal(f"diagonal = diagonal of 2 J^T J{note}", diagonal, dense.diagonal(), tolerance=_EXACT)
    blocks = subject.value(f"the exact blocks{note}", lambda: BlockDiagonal(GGN()).estimate(evaluation).to_dense())
    for layer in evaluation.layers:
        rows, columns = layer.coordinates.unsqueeze(1), layer.coordinates
        expected = dense[rows, columns]
        identity = f"block of layer {layer.name!r} = block of 2 J^T J{note}"
        subject.equal(identity, blocks[rows, columns], expected, scale=dense.abs().max(), tolerance=_EXACT)


def _single_precision(subject: Subject, case: LayerCase) -> None:
    """In a float32 module a and g are float32."""
    module, inputs = copy.deepcopy(case.module).float(), _moved(case.inputs, lambda x: x.float())
    network = Network(module, nn.MSELoss(reduction="sum"), inputs, None)
    outputs = network.outputs(network.theta).detach()
    network.targets = torch.zeros_like(outputs)
    for factors in network.evaluate().layer_factors(torch.ones_like(outputs)):
        for part in factors.maps:
            if isinstance(part, DenseFactors):
                types = {part.a.dtype, part.g.dtype}
                identity = "in float32, a and g are float32"
                subject.holds(identity, types == {torch.float32}, f"got {types} of {factors.layer.name!r}")


def _frozen_parts(subject: Subject, case: LayerCase) -> None:
    trained = [name for name, parameter in case.module.named_parameters() if parameter.requires_grad]
    if len(trained) > _MOST_FROZEN:
        trained = [trained[i] for i in torch.randperm(len(trained))[:_MOST_FROZEN].tolist()]
    for name in trained if len(list(case.module.parameters())) > 1 else []:
        module = copy.deepcopy(case.module)
        module.get_parameter(name).requires_grad_(False)
        _one_call(subject, LayerCase(module, case.inputs), f", with {name} frozen")


class _Twice(nn.Module):
    """The module's outputs for its inputs and for other ones."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        first = self.module(*args, **kwargs)
        changed = _moved((args, kwargs), lambda x: 0.5 * x + 0.1)
        return torch.cat([first.flatten(1), 2.0 * self.module(*changed[0], **changed[1]).flatten(1)], dim=1)


def _several_calls(subject: Subject, case: LayerCase) -> None:
    _one_call(subject, LayerCase(_Twice(case.module), case.inputs), ", called twice")


def _moved(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return the value with a function applied to its floating-point tensors."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _moved(item, function) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, function) for item in value)
    return value


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors inside."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for item in value for x in _tensors(item)] if isinstance(value, (tuple, list)) else []
