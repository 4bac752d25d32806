"""A second forward pass of an evaluation in which outputs of modules are observed, and products with all Jacobians.

Symbols: D parameters, N examples, theta the parameters; y_0 = z the model's outputs and y_1, y_2, ... the observed
outputs as functions of theta, J_i = dy_i/dtheta, u_i of y_i's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, singledispatch
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from curvlib.objective.errors import LinearizationError
from curvlib.objective.evaluation import Evaluation
from curvlib.operators import full_precision

# Work in gradients, as an evaluation counts it.
_BACKWARD = 2 / 3

Maps = tuple[Callable[[Tensor], Tensor] | None, ...]


class ObservedPass:
    """The outputs of an evaluation and of some of its modules on one graph, so that one product serves all of them.

    It costs a forward pass, and at the first product a backward pass that keeps its own graph: the memory of a second
    evaluation.

    Args:
        evaluation: the objective on a batch.
        modules: what to observe, by name: a module's output is a tensor, a packed sequence, or a tuple with one of
            these first. Every call counts.

    Attributes:
        evaluation: the argument.
        values: y_i, detached, in float32 at least, y_0 = z; without those that no parameter reaches.

    Raises:
        TypeError: an observed output is none of these.
        ValueError: a module was not called, one has another number of examples than the model's outputs, or no
            parameter reaches their outputs.
    """

    def __init__(self, evaluation: Evaluation, modules: Mapping[str, nn.Module]) -> None:
        self.evaluation, self._modules = evaluation, dict(modules)
        self._graph, self._linear = self._forward(), False
        self.values = tuple(y.detach().to(torch.promote_types(y.dtype, torch.float32)) for y in self._graph)

    def jvp(self, vector: Float[Tensor, " D"], chosen: Sequence[int]) -> tuple[Tensor, ...]:
        """Return J_i v for the chosen numbers i, by one backward pass through the graph of sum_i J_i^T u_i.

        Raises:
            LinearizationError: an operation of the model has a backward pass that cannot be differentiated.
        """
        self.evaluation.check_fresh()
        self.evaluation.layout.check(vector)
        with full_precision(self.evaluation.layout.device):
            self._check_linearization()
            return self._jvp(vector, chosen)

    def product(self, maps: Maps, vector: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
        """Return sum_i J_i^T M_i J_i v, at the price of one product with the outputs alone.

        Args:
            maps: a function x -> M_i x for every i, None for M_i = 0.
            vector: v.
        """
        chosen = [i for i, function in enumerate(maps) if function is not None]
        moved = self.jvp(vector, chosen)
        with full_precision(self.evaluation.layout.device):
            return self._vjp([_applied(maps[i], x) for i, x in zip(chosen, moved, strict=True)], chosen)

    def quadratic_form(self, maps: Maps, V: Float[Tensor, "D K"]) -> Float[Tensor, "K K"]:
        """Return V^T (sum_i J_i^T M_i J_i) V from the products J_i V alone; maps as in :meth:`product`."""
        chosen = [i for i, function in enumerate(maps) if function is not None]
        moved = [self.jvp(v, chosen) for v in V.T.contiguous()]
        with full_precision(self.evaluation.layout.device):
            left = torch.stack([_one_vector(x) for x in moved])
            right = [_one_vector([_applied(maps[i], part) for i, part in zip(chosen, x, strict=True)]) for x in moved]
            return left @ torch.stack(right, dim=1)

    def _jvp(self, vector: Tensor, chosen: Sequence[int]) -> tuple[Tensor, ...]:
        try:
            moved = self._differentiate(vector, chosen)
        except RuntimeError as error:
            if "not implemented" not in str(error):
                raise
            # An evaluation knows which kernels can be replaced by others that can be differentiated twice.
            self.evaluation.jvp(vector)
            vars(self).pop("_transposed", None)
            self._graph = self._forward()
            moved = self._differentiate_or_name(vector, chosen)
        return tuple(x.to(self.values[i].dtype) for i, x in zip(chosen, moved, strict=True))

    def _differentiate_or_name(self, vector: Tensor, chosen: Sequence[int]) -> tuple[Tensor, ...]:
        try:
            return self._differentiate(vector, chosen)
        except RuntimeError as error:
            if "not implemented" not in str(error):
                raise
            raise LinearizationError(
                f"exact products need a backward pass that can be differentiated, but on the way to the output of "
                f"{', '.join(map(repr, self._modules))}: {error}"
            ) from error

    def _differentiate(self, vector: Tensor, chosen: Sequence[int]) -> tuple[Tensor, ...]:
        leaves, transposed = self._transposed
        self.evaluation.work += _BACKWARD
        return torch.autograd.grad(
            transposed, [leaves[i] for i in chosen], vector, retain_graph=True, materialize_grads=True
        )

    def _vjp(self, vectors: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
        self.evaluation.work += _BACKWARD
        rows = torch.autograd.grad(
            [self._graph[i] for i in chosen],
            self.evaluation.objective.parameters,
            [x.to(self._graph[i].dtype) for i, x in zip(chosen, vectors, strict=True)],
            retain_graph=True,
            allow_unused=True,
        )
        return self.evaluation.layout.join(rows)

    @cached_property
    def _transposed(self) -> tuple[list[Tensor], Float[Tensor, " D"]]:
        """Leaves u_i, and sum_i J_i^T u_i with the graph that makes it a function of them."""
        self.evaluation.work += _BACKWARD
        leaves = [torch.zeros_like(y).requires_grad_() for y in self._graph]
        with torch.enable_grad():
            rows = torch.autograd.grad(
                self._graph, self.evaluation.objective.parameters, leaves, create_graph=True, allow_unused=True
            )
            return leaves, self.evaluation.layout.join(rows)

    def _check_linearization(self) -> None:
        """Hold <u, J J^T u> against <J^T u, J^T u>, once: autograd can drop a custom backward pass silently.

        With J^T u by an ordinary backward pass, also a J v that is dropped altogether shows; for the outputs and the
        observed outputs by themselves, whose sizes differ.
        """
        evaluation = self.evaluation
        check = f"linearization of {', '.join(self._modules)}"
        if self._linear or not evaluation.objective.is_due(check):
            return
        _ = self._transposed  # it is needed anyway; what comes after is not counted
        work, shown = evaluation.work, True
        for chosen in ([0], list(range(1, len(self.values)))):
            # some fixed numbers of both signs
            u = [torch.arange(y.numel(), dtype=y.dtype, device=y.device).cos().view_as(y) for y in self.values]
            vector = self._vjp([u[i] for i in chosen], chosen)
            square = vector.square().sum()
            moved = self._jvp(vector, chosen)
            difference = (_one_vector([u[i] for i in chosen]) @ _one_vector(moved) - square).abs()
            # Half the digits of the coarsest type, as for the outputs alone.
            if bool(difference > evaluation.coarsest_eps() ** 0.5 * square):
                raise LinearizationError(
                    f"<u, J J^T u> and <J^T u, J^T u> differ by {float(difference / square):.1e} of their size with "
                    f"the outputs of {', '.join(map(repr, self._modules))} observed: some operation's backward pass "
                    "cannot be differentiated (once_differentiable, or computed outside of PyTorch). Give it a "
                    "differentiable one."
                )
            shown = shown and bool(square > 0)
        self._linear = True
        # where nothing moves, nothing has been shown for other parameters
        if shown:
            evaluation.objective.passed(check)
        evaluation.work = work

    def _forward(self) -> tuple[Tensor, ...]:
        """Make the pass and return z and the observed outputs, with their graph."""
        calls: list[_Call] = []

        def note(name: str) -> Callable[..., None]:
            return lambda module, _, output: calls.append(_call(name, module, output))

        with ExitStack() as hooks:
            for name, module in self._modules.items():
                hooks.callback(module.register_forward_hook(note(name)).remove)
            outputs = self.evaluation.forward_again()
        absent = self._modules.keys() - {call.name for call in calls}
        if absent or not calls:
            raise ValueError(
                f"module {', '.join(map(repr, sorted(absent)))} was not called in the model's forward pass, so that "
                "it has no output to observe: choose modules that are called by themselves (module(x)), such as "
                f"{', '.join(repr(call.name) for call in calls[:1]) or 'none of these'}."
            )
        for call in calls:
            call.check(outputs.shape[0])
        observed = [call.output for call in calls if call.output.requires_grad]
        if not observed:
            raise ValueError(
                f"the outputs of {', '.join(map(repr, self._modules))} depend on no trainable parameter, so they "
                "cannot change: choose other modules, or let a parameter before them require a gradient."
            )
        return (outputs, *observed)


@dataclass(frozen=True, eq=False)
class _Call:
    """The output of one call of a module, and how many examples are in it."""

    name: str
    output: Tensor
    examples: int

    def check(self, examples: int) -> None:
        if self.examples % examples != 0:
            raise ValueError(
                f"module {self.name!r} was called with {self.examples} examples, but the model's outputs have "
                f"{examples} along their first dimension, so an average over examples is not defined: keep all "
                "examples together through the model (recurrent modules in the order that their batch_first says, all "
                "others with the examples first)."
            )


def _call(name: str, module: nn.Module, output: Any) -> _Call:
    first = output[0] if isinstance(output, tuple) and not isinstance(output, PackedSequence) and output else output
    packed = isinstance(first, PackedSequence)
    y = first.data if packed else first
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.ndim == 0:
        kind = f"a {y.dtype} tensor {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(
            f"module {name!r} must return a floating-point tensor (N, ...), a PackedSequence, or a tuple with one of "
            f"them first, to be observed, got {kind}."
        )
    examples = int(first.batch_sizes[0]) if packed else number_of_examples(module, y)
    # A copy has a place of its own in the graph, whatever is done in place to the output afterwards.
    return _Call(name, y.clone(), examples)


@singledispatch
def number_of_examples(module: nn.Module, output: Float[Tensor, " ..."]) -> int:
    """Return how many examples a module's output has; by default the length of its first dimension."""
    return output.shape[0]


@number_of_examples.register
def _(module: nn.RNNBase, output: Float[Tensor, "..."]) -> int:
    return output.shape[0 if module.batch_first else 1] if output.ndim == 3 else 1


@number_of_examples.register
def _(module: nn.RNNCellBase, output: Float[Tensor, "..."]) -> int:
    return output.shape[0] if output.ndim == 2 else 1


def _applied(function: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    assert function is not None  # chosen by that
    return function(x)


def _one_vector(parts: Sequence[Tensor]) -> Tensor:
    """Return all entries as one vector."""
    return torch.cat([part.flatten() for part in parts])
