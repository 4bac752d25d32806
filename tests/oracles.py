"""Brute-force oracles: dense curvature matrices from torch.func; of curvlib's own code, values of losses alone."""

import torch
from torch.func import functional_call, jacrev

from curvlib.output_losses import OutputLoss


def hessian(function, x):
    """Dense Hessian of a scalar function, reverse mode twice (forward mode warns of a deprecation inside torch)."""
    return jacrev(jacrev(function))(x)


class Network:
    """A model, a loss and a batch, with h, its outputs and the loss as functions of one flat parameter vector."""

    def __init__(self, model, loss, inputs, targets, l2=0.0):
        self.model, self.loss, self.inputs, self.targets, self.l2 = model, loss, inputs, targets, l2
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.theta = torch.cat([p.detach().flatten() for p in self.named.values()])

    def outputs(self, theta):
        parts = theta.split([p.numel() for p in self.named.values()])
        parameters = {name: part.view(p.shape) for (name, p), part in zip(self.named.items(), parts, strict=True)}
        if isinstance(self.inputs, dict):
            return functional_call(self.model, parameters, (), self.inputs)
        args = self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)
        return functional_call(self.model, parameters, args)

    def loss_of_outputs(self, outputs, targets=None):
        targets = self.targets if targets is None else targets
        if isinstance(self.loss, OutputLoss):
            return self.loss.value(outputs, targets)
        return self.loss(outputs, *targets) if isinstance(targets, tuple) else self.loss(outputs, targets)

    def value(self, theta):
        return self.loss_of_outputs(self.outputs(theta)) + 0.5 * self.l2 * theta.square().sum()

    def gradient(self):
        return torch.autograd.functional.jacobian(self.value, self.theta)

    def jacobian(self):
        """J of shape (number of outputs, D)."""
        # row by row: some backward passes, such as those of fused attention, cannot be batched
        return torch.autograd.functional.jacobian(lambda theta: self.outputs(theta).flatten(), self.theta)

    def _shift(self):
        return self.l2 * torch.eye(len(self.theta), dtype=self.theta.dtype)

    def loss_hessian(self):
        """H of shape (number of outputs, number of outputs)."""
        outputs = self.outputs(self.theta).detach()
        return hessian(self.loss_of_outputs, outputs).reshape(outputs.numel(), outputs.numel())

    def ggn(self):
        J = self.jacobian()
        return J.T @ self.loss_hessian() @ J + self._shift()

    def calls(self, module):
        """For every call of a module its input, and the Jacobian (number of outputs, *) by the call's output."""
        inputs, outputs = [], []

        def note(_, args, output):
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

    def hessian(self):
        return hessian(self.value, self.theta)

    def empirical_fisher(self, scale):
        """scale * sum_n grad l_n grad l_n^T, where the objective's loss is scale * sum_n l_n."""
        J = self.jacobian()
        outputs = self.outputs(self.theta).detach()
        per_loss = jacrev(self.loss_of_outputs)(outputs) / scale  # gradients of the l_n, one after another
        rows = (per_loss.reshape(-1, 1) * J).reshape(outputs.shape[0], -1, J.shape[1]).sum(1)
        return scale * rows.T @ rows + self._shift()
