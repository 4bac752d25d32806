r"""KFRA: K-FAC with recursively averaged output gradients (Botev, Ritter & Barber 2017).

Symbols: N examples, modules 1 .. L of a chain, a (N, columns) the inputs of a linear module with the homogeneous
coordinate, f' (N, d) the derivatives of an elementwise one, H_n (C, C) the Hessian of example n's loss by its outputs;
G the matrix (d, d) that has come down to the outputs of a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from backpack import extensions
from jaxtyping import Float
from torch import Tensor, nn

from curvlib.approximations.base import StatisticalApproximation, with_l2
from curvlib.approximations.description import BlockRow, Description
from curvlib.approximations.layerwise import check_vectors
from curvlib.approximations.statistics import Statistics
from curvlib.extensions import Layer, LayerPlan, UnsupportedLayerError, gram
from curvlib.matrices import GGN, CurvatureMatrix
from curvlib.objective import Evaluation, Objective
from curvlib.operators import BlockDiagonal, Kronecker, LinearOperator, full_precision

# What BackPACK's KFRA knows exactly these classes, and those that leave (N, d) as it is.
_ELEMENTWISE = (nn.ReLU, nn.Sigmoid, nn.Tanh)
_UNCHANGED = (nn.Flatten, nn.Identity)
_KINDS = (nn.Linear, *_ELEMENTWISE, *_UNCHANGED)
_LOSS, _INPUTS, _DERIVATIVES = "loss|H", "A", "E[f'f']"


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a module."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor


@dataclass(frozen=True)
class KFRA(StatisticalApproximation):
    r"""Block of a layer = A (x) G, A = E[a a^T], and G from the mean Jacobians of all that follows.

    .. math:: G_L = \sum_n H_n, \qquad G \leftarrow W^T G \, W, \qquad
        G \leftarrow \tfrac{1}{N} \sum_n \mathrm{diag}(f'_n) \, G \, \mathrm{diag}(f'_n) = E[f' f'^T] \circ G

    through linear and elementwise modules. No backward pass for each output, at the price that the Jacobians of an
    example are taken for independent from module to module and of the loss Hessian. Exact for one example, and for
    deep linear networks with squared error.

    For chains of modules that BackPACK's KFRA extension has, ``Linear`` on (N, d), ``ReLU``, ``Sigmoid`` and ``Tanh``
    (``Flatten`` and ``Identity`` change nothing); everything else is refused by name. E[f' f'^T] is what the extension
    makes of a matrix of ones; nothing is left on the model's modules. The sum of H_n is curvlib's own, for any loss on
    (N, C) and on the scale of the objective, where BackPACK's leaves out class weights and ignored labels.

    The statistics are A, E[f' f'^T] and the sum of H_n, which average over batches; an operator takes the weights W as
    they are when it is made.

    Source: Botev, Ritter & Barber 2017, eq. 17 and 18. Departure: A holds the homogeneous coordinate.

    Args:
        matrix: ``GGN()`` as in the paper; ``Fisher()`` and ``EmpiricalFisher()`` put their v v^T in place of H.

    Example:
        >>> objective = Objective(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)), nn.MSELoss())
        >>> KFRA().estimate(objective.at((torch.randn(9, 3), torch.zeros(9, 1)))).shape
        (11, 11)
    """

    matrix: CurvatureMatrix = field(default_factory=GGN)

    def __post_init__(self) -> None:
        check_vectors(self, self.matrix)

    def check(self, objective: Objective) -> None:
        """Refuse, by name, modules that are not in BackPACK's KFRA and parameters outside of them."""
        refused = [f"{name}: {reason}" for name, reason in objective.plan.unsupported.items()]
        refused += [
            f"module {name!r} is a {type(module).__name__}"
            for name, module in objective.model.named_modules()
            if not any(module.children()) and type(module) not in _KINDS
        ]
        refused += [
            f"layer {layer.name!r} is shared by {', '.join(layer.modules)}"
            for layer in objective.plan.layers
            if len(layer.modules) > 1
        ]
        if refused:
            kinds = ", ".join(kind.__name__ for kind in _KINDS)
            raise UnsupportedLayerError(f"KFRA is for chains of {kinds} alone; {'; '.join(refused)}. Use KFAC.")

    def statistics(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Statistics:
        """Return the statistics of one batch: one more forward pass, and no backward pass.

        Raises:
            UnsupportedLayerError: the modules were not called as a chain.
        """
        evaluation.check_fresh()
        self.check(evaluation.objective)
        if evaluation.outputs.ndim != 2:
            raise UnsupportedLayerError(
                f"KFRA needs outputs (N, C), got the shape {tuple(evaluation.outputs.shape)}. Use KFAC."
            )
        layers = _by_module(evaluation.plan)
        counted = evaluation.objective.loss.counted(evaluation.outputs, evaluation.targets)
        statistics = Statistics()
        with full_precision(evaluation.layout.device):
            for number, call in enumerate(_chain(evaluation)):
                x, y = (tensor.detach().to(evaluation.layout.dtype) for tensor in (call.input, call.output))
                if counted is not None:
                    x, y = x[counted], y[counted]
                linear = isinstance(call.module, nn.Linear)
                moment = _input_moment(layers.get(call.name), x) if linear else _derivatives(call.module, x, y)
                statistics.means[f"{number}|{call.name}|{_INPUTS if linear else _DERIVATIVES}"] = moment
            statistics.sums[_LOSS] = self._sum_over_examples(evaluation, generator)
        return statistics.to(evaluation.layout.dtype)

    def _sum_over_examples(self, evaluation: Evaluation, generator: torch.Generator | None) -> Float[Tensor, "C C"]:
        """Return sum_n H_n by C products; outer products of C vectors would be C times dearer."""
        product, like = self.matrix.output_product(evaluation, generator), evaluation.outputs
        unit = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
        H = torch.stack([product(column.expand_as(like)).sum(0) for column in unit])
        return (H + H.T) / 2

    def operator(self, objective: Objective, statistics: Statistics) -> LinearOperator:
        """Return the block-diagonal operator, by the recursion from the last module to the first."""
        layers, G = _by_module(objective.plan), statistics.sums[_LOSS]
        blocks, coordinates = [], []
        keys = {int(key.partition("|")[0]): key for key in statistics.means}
        with full_precision(objective.layout.device):
            for number in sorted(keys, reverse=True):
                name, statistic = keys[number].split("|")[1:]
                moment = statistics.means[keys[number]]
                if statistic != _INPUTS:
                    G = moment * G
                    continue
                if name in layers:
                    blocks.append(Kronecker((G, moment)))
                    coordinates.append(layers[name].coordinates)
                W = objective.model.get_parameter(f"{name}.weight" if name else "weight").detach().to(G.dtype)
                G = W.T @ G @ W
        joined = BlockDiagonal(tuple(reversed(blocks)), tuple(reversed(coordinates)), objective.layout.size)
        return with_l2(joined, objective)

    def describe(self, objective: Objective, plan: LayerPlan | None = None) -> Description:
        """Return the block of each parameter."""
        plan = plan if plan is not None else objective.plan
        of = {name: layer for layer in plan.layers for name in layer.parameters}
        rows = []
        for name, shape in zip(objective.layout.names, objective.layout.shapes, strict=True):
            layer = of.get(name)
            if layer is None or type(layer.members[0]) is not nn.Linear:
                reason = plan.unsupported.get(name, "no linear module")
                rows.append(BlockRow(name, tuple(shape), layer.name if layer else "-", "-", "refused", reason))
                continue
            part = layer.maps[0]
            block = f"Kronecker: A {part.columns} x {part.columns}, recursive G {part.d_out} x {part.d_out}"
            calls = str(plan.calls[layer.name]) if plan.calls else "-"
            rows.append(BlockRow(name, tuple(shape), layer.name or "(model)", calls, block, "in a chain of modules"))
        return Description(repr(self), tuple(rows))


def _by_module(plan: LayerPlan) -> dict[str, Layer]:
    return {layer.modules[0]: layer for layer in plan.layers}


def _input_moment(layer: Layer | None, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "columns columns"]:
    if layer is None:
        return x.new_zeros(0, 0)  # frozen: it has a place in the chain, but no block
    part, ones = layer.maps[0], x.new_ones(len(x), 1)
    columns = [*([x] if part.weight else []), *([ones] if part.bias else [])]
    return gram(torch.cat(columns, 1)) / max(len(x), 1)


def _derivatives(module: nn.Module, x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """Return E[f' f'^T], which is what BackPACK's KFRA makes of a matrix of ones that comes down to the outputs."""
    ones = x.new_ones(x.shape[1], x.shape[1])
    if not len(x):
        return torch.zeros_like(ones)
    # it looks for its quantities by the address of a tensor, also where an operation was done in place
    x, y = x.clone().requires_grad_(), y.clone()
    extension = extensions.KFRA()
    extension.saved_quantities.save_quantity(y.data_ptr(), ones, extension.accumulate_backpropagated_quantities)
    with _shown(module, input0=x, output=y):
        extension(module, (None,), (torch.zeros_like(y),))
    return extension.saved_quantities.retrieve_quantity(x.data_ptr(), delete_old=True).detach()


@contextmanager
def _shown(module: nn.Module, **attributes: Tensor) -> Iterator[None]:
    """Put the tensors that BackPACK expects on a module there for a while."""
    own = vars(module)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del own[name]
        own.update(before)


def _chain(evaluation: Evaluation) -> list[_Call]:
    """Return the calls from the first linear module on, without those that change nothing.

    Raises:
        UnsupportedLayerError: something happens between two modules, a module is called twice or not on (N, d), or
            is not called.
    """
    calls, outputs = _recorded(evaluation)
    while calls and not isinstance(calls[0].module, nn.Linear):
        calls.pop(0)  # what comes before the first layer has no part in the curvature
    called = [call.name for call in calls]
    for name, module in evaluation.objective.model.named_modules():
        if isinstance(module, nn.Linear) and called.count(name) != 1:
            raise UnsupportedLayerError(
                f"KFRA needs each layer called once, but {name!r} is called {called.count(name)} times. Use KFAC."
            )
    ends = [*((call.input, f"module {call.name!r}") for call in calls[1:]), (outputs, "the model's outputs")]
    for call, (following, where) in zip(calls, ends, strict=True):
        if call.output is not following:
            raise UnsupportedLayerError(
                f"KFRA needs a chain of modules, but between the output of module {call.name!r} and {where} is "
                "something else (a function, a branch, or a sum). Write it as a module, or use KFAC."
            )
        if call.input.ndim != 2 or call.output.ndim != 2:
            raise UnsupportedLayerError(
                f"KFRA needs inputs (N, d) of every module, but {call.name!r} turns {tuple(call.input.shape)} into "
                f"{tuple(call.output.shape)}. Use KFAC."
            )
    return [call for call in calls if not isinstance(call.module, _UNCHANGED)]


def _recorded(evaluation: Evaluation) -> tuple[list[_Call], Tensor]:
    """Return the calls of all modules without parts in another forward pass, and its outputs."""
    calls: list[_Call] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls.append(_Call(name, module, args[0], output))

        return hook

    with ExitStack() as hooks:
        for name, module in evaluation.objective.model.named_modules():
            if not any(module.children()):
                hooks.callback(module.register_forward_hook(note(name)).remove)
        return calls, evaluation.forward_again()
