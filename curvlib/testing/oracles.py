"""Brute-force oracles: dense curvature matrices from torch.func; of curvlib's own code, values of losses alone.

Symbols: D parameters, N examples, z (N, ...) outputs, J (number of outputs, D) their Jacobian, H the loss's Hessian by
the outputs, c the factor of its reduction, eta the l2 weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from curvlib import Objective, OutputLoss
from curvlib.objective import Batch, Evaluation


def hessian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Dense Hessian of a scalar function, reverse mode twice (forward mode warns of a deprecation inside torch)."""
    return jacrev(jacrev(function))(x)


class Network:
    """A model, a loss and a batch, with h, its outputs and the loss as functions of one flat parameter vector.

    Args:
        model: a small network.
        loss: a loss module or an OutputLoss.
        inputs: what the model is called with, as in a batch of an Objective.
        targets: what the loss is called with.
        l2: eta.
        other: the same loss with the other reduction ("sum" for "mean"), if there is one.

    Attributes:
        theta: the parameters that require a gradient, (D,), as an Objective flattens them.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> network = Network(model, nn.MSELoss(reduction="sum"), torch.eye(2), torch.zeros(2, 1))
        >>> network.ggn()
        tensor([[2., 0.],
                [0., 2.]])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module | OutputLoss,
        inputs: Any,
        targets: Any,
        l2: float = 0.0,
        other: nn.Module | OutputLoss | None = None,
    ) -> None:
        self.model, self.loss, self.inputs, self.targets, self.l2 = model, loss, inputs, targets, l2
        self.other = other
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.theta = torch.cat([p.detach().flatten() for p in self.named.values()])

    def __repr__(self) -> str:
        shapes = tuple(self.inputs.shape) if isinstance(self.inputs, Tensor) else type(self.inputs).__name__
        return f"Network({self.model}, {self.loss!r}, inputs {shapes}, targets {self.targets!r}, l2={self.l2})"

    @property
    def batch(self) -> Batch:
        """(inputs, targets)."""
        return self.inputs, self.targets

    def objective(self) -> Objective:
        """Return the objective of the model itself, not of a copy."""
        return Objective(self.model, self.loss, l2=self.l2)

    def evaluate(self) -> Evaluation:
        """Return a new objective at the batch."""
        return self.objective().at(self.batch)

    def copy(self, *, l2: float | None = None, reduction_changed: bool = False) -> Network:
        """Return the network with a copy of the model, with another l2 weight or with the other reduction."""
        loss, other = (self.other, self.loss) if reduction_changed else (self.loss, self.other)
        assert loss is not None, "no loss with the other reduction was given"
        l2 = self.l2 if l2 is None else l2
        return Network(copy.deepcopy(self.model), loss, self.inputs, self.targets, l2, other)

    def outputs(self, theta: Float[Tensor, " D"]) -> Float[Tensor, "N ..."]:
        """Return z at other parameters."""
        parts = theta.split([p.numel() for p in self.named.values()])
        parameters = {name: part.view(p.shape) for (name, p), part in zip(self.named.items(), parts, strict=True)}
        if isinstance(self.inputs, dict):
            return functional_call(self.model, parameters, (), self.inputs)
        args = self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)
        return functional_call(self.model, parameters, args)

    def loss_of_outputs(self, outputs: Float[Tensor, "N ..."], targets: Any = None) -> Float[Tensor, ""]:
        """Return the loss of given outputs."""
        targets = self.targets if targets is None else targets
        if isinstance(self.loss, OutputLoss):
            return self.loss.value(outputs, targets)
        return self.loss(outputs, *targets) if isinstance(targets, tuple) else self.loss(outputs, targets)

    def value(self, theta: Float[Tensor, " D"]) -> Float[Tensor, ""]:
        """Return h at other parameters."""
        return self.loss_of_outputs(self.outputs(theta)) + 0.5 * self.l2 * theta.square().sum()

    def gradient(self) -> Float[Tensor, " D"]:
        """Return dh/dtheta."""
        return torch.autograd.functional.jacobian(self.value, self.theta)

    def jacobian(self) -> Float[Tensor, "o D"]:
        """J of shape (number of outputs, D)."""
        # row by row: some backward passes, such as those of fused attention, cannot be batched
        return torch.autograd.functional.jacobian(lambda theta: self.outputs(theta).flatten(), self.theta)

    def _shift(self) -> Float[Tensor, "D D"]:
        return self.l2 * torch.eye(len(self.theta), dtype=self.theta.dtype)

    def loss_hessian(self) -> Float[Tensor, "o o"]:
        """H of shape (number of outputs, number of outputs)."""
        outputs = self.outputs(self.theta).detach()
        return hessian(self.loss_of_outputs, outputs).reshape(outputs.numel(), outputs.numel())

    def ggn(self) -> Float[Tensor, "D D"]:
        """Return J^T H J + eta I."""
        J = self.jacobian()
        return J.T @ self.loss_hessian() @ J + self._shift()

    def calls(self, module: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """For every call of a module its input, and the Jacobian (number of outputs, *) by the call's output."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs.append(args[0].detach().clone())
            outputs.append(output)
            return output.clone()  # what modifies the output in place finds the clone

        handle = module.register_forward_hook(note)
        try:
            z = self.outputs(self.theta.clone().requires_grad_()).flatten()
        finally:
            handle.remove()
        rows = [torch.autograd.grad(z[i], outputs, retain_graph=True) for i in range(len(z))]
        return [(a, torch.stack(J)) for a, J in zip(inputs, zip(*rows, strict=True), strict=True)]

    def hessian(self) -> Float[Tensor, "D D"]:
        """Return the second derivative of h."""
        return hessian(self.value, self.theta)

    def empirical_fisher(self, scale: Tensor | float) -> Float[Tensor, "D D"]:
        """Scale * sum_n grad l_n grad l_n^T, where the objective's loss is scale * sum_n l_n."""
        J = self.jacobian()
        outputs = self.outputs(self.theta).detach()
        per_loss = jacrev(self.loss_of_outputs)(outputs) / scale  # gradients of the l_n, one after another
        rows = (per_loss.reshape(-1, 1) * J).reshape(outputs.shape[0], -1, J.shape[1]).sum(1)
        return scale * rows.T @ rows + self._shift()
