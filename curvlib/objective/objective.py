"""The objective: a model, a loss and an l2 term, as one number.

Symbols: D parameters, N examples, theta the parameters, h(theta) = L(z(theta), y) + l2/2 |theta|^2 the objective.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlib.extensions import LayerPlan, Tape, plan_layers
from curvlib.objective.evaluation import Evaluation
from curvlib.objective.forward import Batch, ForwardPass, tensors_of
from curvlib.objective.fused import watch
from curvlib.output_losses import OutputLoss, output_loss
from curvlib.parameters import ParameterLayout, trainable_parameters


class Objective:
    r"""h(theta) = loss(model(inputs), targets) + l2/2 |theta|^2, exactly as the loss module computes it.

    Every operator that curvlib makes is the curvature of *this* number, the l2 term included.

    Args:
        model: the network; its parameters that require a gradient are theta.
        loss: a supported PyTorch loss module (see :mod:`curvlib.output_losses`) or an
            :class:`~curvlib.output_losses.OutputLoss`. The module's options are read now, later changes have no effect.
        l2: weight of the squared norm of theta, at least 0.

    Attributes:
        layout: how theta's tensors lie in flat vectors (D,).
        plan: which parameters belong to which layer.
        differentiable_kernels: whether forward passes for exact products use kernels of attention and of recurrent
            layers that can be differentiated twice; set by the first exact product that needs it.

    Raises:
        TypeError: the model is no module, or the loss is not supported.
        ValueError: the model has no trainable parameter, the loss has an unsupported option, or l2 is negative.

    Example:
        >>> objective = Objective(nn.Linear(3, 2), nn.CrossEntropyLoss())
        >>> evaluation = objective.at((torch.ones(5, 3), torch.zeros(5, dtype=torch.long)))
        >>> evaluation.gradient().shape
        torch.Size([8])
    """

    def __init__(self, model: nn.Module, loss: nn.Module | OutputLoss, *, l2: float = 0.0) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Objective needs model to be a torch.nn.Module, got {type(model).__name__}.")
        if isinstance(l2, bool) or not (isinstance(l2, (int, float)) and math.isfinite(l2) and l2 >= 0):
            raise ValueError(f"Objective needs a finite l2 >= 0, got {l2!r}.")
        if isinstance(loss, nn.Module) and (loss._forward_hooks or loss._forward_pre_hooks):
            raise ValueError(
                f"{type(loss).__name__} has a forward hook, which curvlib's formulas of the loss would ignore: "
                "remove it, or write the changed loss as an OutputLoss."
            )
        self.model = model
        self.loss = output_loss(loss)
        self.l2 = float(l2)
        self.layout = ParameterLayout.of(model)
        self.plan: LayerPlan = plan_layers(model, self.layout)
        self._kinds = [
            (dtype, self.layout.device, shape)
            for dtype, shape in zip(self.layout.dtypes, self.layout.shapes, strict=True)
        ]
        self._owners = _owners(model, self.layout.names)
        watch(trainable_parameters(model).values())
        self._passed: set[tuple[Any, ...]] = set()
        self.differentiable_kernels = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters in the layout's order.

        Raises:
            RuntimeError: they are no longer those that the objective was made for.
        """
        named = trainable_parameters(self.model)
        kinds = [(parameter.dtype, parameter.device, parameter.shape) for parameter in named.values()]
        if tuple(named) != self.layout.names:
            changed = sorted(set(named) ^ set(self.layout.names))
            raise RuntimeError(
                f"requires_grad or the set of parameters has changed since the Objective was made "
                f"({', '.join(changed)}); make a new Objective (and a new optimizer)."
            )
        if kinds != self._kinds:
            raise RuntimeError(
                "dtype, device or shape of parameters has changed since the Objective was made (model.double(), "
                "model.to(device)); make a new Objective (and a new optimizer)."
            )
        if any(
            parameter is not owner.get(key)
            for parameter, (owner, key) in zip(named.values(), self._owners, strict=True)
        ):
            raise RuntimeError(
                "a module that holds parameters has been replaced since the Objective was made; make a new Objective "
                "(and a new optimizer)."
            )
        return list(named.values())

    def current_parameters(self) -> list[nn.Parameter | None]:
        """Return what stands at the parameters' places in their modules now, without a walk through the model."""
        return [owner.get(key) for owner, key in self._owners]

    def parameter_vector(self) -> Float[Tensor, " D"]:
        """Return a copy of theta as one vector (D,)."""
        return self.layout.flatten([parameter.detach() for parameter in self.parameters])

    def at(self, batch: Batch, *, linearize: bool = True) -> Evaluation:
        """Evaluate the objective on a batch at the current parameters: one forward pass, its graph kept.

        Args:
            batch: ``(inputs, targets)``; ``inputs`` is a tensor, a tuple (``model(*inputs)``) or a mapping
                (``model(**inputs)``), with the N examples along the first dimension.
            linearize: let the gradient's backward pass build its own graph as well, which is what exact products
                start from. It costs no time but keeps the backward pass's intermediate values in memory; without it,
                the first exact product makes a backward pass of its own.

        Raises:
            TypeError: the batch, its inputs or the model's outputs are not of the types above.
            ValueError: the batch is empty, lies on another device, or its targets do not fit the outputs.
        """
        inputs, targets = self._check_batch(batch)
        parameters = self.parameters
        forward = ForwardPass(self.model, inputs, self.layout.device)
        forward.differentiable_kernels = linearize and self.differentiable_kernels
        tape = Tape(self.plan)
        with torch.enable_grad(), tape.recording():
            outputs = forward()
        self._check_outputs(outputs)
        self.loss.check(outputs, targets)
        tape.close(self.model, outputs)
        # for good: in a batch of another size the numbers may agree by chance
        if tape.without_examples:
            self.plan = self.plan.without(tape.without_examples)
        return Evaluation(self, parameters, (inputs, targets), outputs, tape, forward, linearize)

    def value(self, batch: Batch) -> Float[Tensor, ""]:
        """Return h on a batch at the current parameters, without a graph."""
        inputs, targets = self._check_batch(batch)
        with torch.no_grad():
            outputs = ForwardPass(self.model, inputs, self.layout.device)()
            self._check_outputs(outputs, differentiable=False)
            self.loss.check(outputs, targets)
            return self.total(self.loss.value(outputs, targets), self.parameters)

    def describe(self, approximation: Any, batch: Batch | None = None) -> Any:
        """Return a table (``str()`` prints it): parameter, shape, layer, block of the approximation, and why.

        Args:
            approximation: whose blocks to describe.
            batch: a batch to evaluate. Without one the table shows what the model alone tells; that a parameter is used
                outside of its module's own call only shows in a forward pass.
        """
        return approximation.describe(self, self.plan if batch is None else self.at(batch, linearize=False).plan)

    def total(self, loss_value: Float[Tensor, ""], parameters: Iterable[Tensor]) -> Float[Tensor, ""]:
        """Return h from the loss at these parameters: with the l2 term, without a graph."""
        value = loss_value.detach().to(self.layout.dtype)
        if self.l2 > 0:
            squares = [parameter.detach().to(self.layout.dtype).square().sum() for parameter in parameters]
            value = value + 0.5 * self.l2 * torch.stack(squares).sum()
        return value

    def is_due(self, check: str) -> bool:
        """Return whether a check has yet to be passed that is made once for the model in its present training mode."""
        return self._key(check) not in self._passed

    def passed(self, check: str) -> None:
        """Note that a check has been passed. One that ends in any error stays due."""
        self._passed.add(self._key(check))

    def mode(self) -> tuple[bool, ...]:
        """Return the training mode of every module."""
        return tuple(module.training for module in self.model.modules())

    def _key(self, check: str) -> tuple[Any, ...]:
        return (check, *self.mode())

    def _check_batch(self, batch: Batch) -> Batch:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise TypeError(f"a batch must be a pair (inputs, targets), got {type(batch).__name__}.")
        inputs, targets = batch
        tensors = tensors_of(inputs) if not isinstance(inputs, list) else []
        if not tensors:
            raise TypeError(
                "the inputs of a batch must be a tensor, a tuple of arguments or a mapping of keyword arguments with a "
                f"tensor among them, got {type(inputs).__name__}."
            )
        for tensor in tensors:
            if tensor.ndim and tensor.shape[0] == 0:
                raise ValueError(f"the batch is empty: an input has shape {tuple(tensor.shape)}; give N >= 1 examples.")
            if tensor.device != self.layout.device:
                raise ValueError(
                    f"inputs lie on {tensor.device}, the model on {self.layout.device}: move the batch there."
                )
        return inputs, targets

    def _check_outputs(self, outputs: Any, *, differentiable: bool = True) -> None:
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or outputs.ndim == 0:
            kind = f"a {outputs.dtype} tensor {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs)
            raise TypeError(
                f"the model must return one floating-point tensor (N, ...), got {kind}. "
                "Wrap it in a module that picks the tensor which goes into the loss."
            )
        if differentiable and not outputs.requires_grad:
            raise ValueError("the model's outputs do not depend on any trainable parameter.")


def _owners(model: nn.Module, names: Iterable[str]) -> list[tuple[dict[str, nn.Parameter | None], str]]:
    """Return for each parameter the table of its module that it stands in, and its key there."""
    places = []
    for name in names:
        path, _, key = name.rpartition(".")
        places.append((model.get_submodule(path)._parameters, key))
    return places
