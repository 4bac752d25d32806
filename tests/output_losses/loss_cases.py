"""Loss modules with every option, and batches for them, drawn by Hypothesis; PyTorch's own modules are the oracle."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

REDUCTIONS = st.sampled_from(["mean", "sum"])
POSITIONS = st.sampled_from([(), (2,), (2, 2)])


@dataclass(frozen=True)
class Case:
    """One loss module and a batch."""

    module: nn.Module
    outputs: Tensor
    targets: Any

    def torch_value(self, outputs, reduction=None):
        """PyTorch's own number."""
        module = copy.copy(self.module)
        module.reduction = reduction or self.module.reduction
        return module(outputs, *self.targets) if isinstance(self.targets, tuple) else module(outputs, self.targets)

    def hessian(self):
        """Dense Hessian (N, O, N, O) by double backward through PyTorch's module."""
        N = len(self.outputs)
        O = self.outputs[0].numel()  # noqa: E741
        return torch.autograd.functional.hessian(self.torch_value, self.outputs).reshape(N, O, N, O)

    def blocks(self):
        """The diagonal blocks of the dense Hessian, (N, O, O)."""
        return torch.einsum("nonp->nop", self.hessian())

    def scale(self):
        """Return c, read off PyTorch's two reductions."""
        return self.torch_value(self.outputs) / self.torch_value(self.outputs, "sum")

    def example(self, n):
        """Example n alone."""
        N = len(self.outputs)

        def pick(x):
            return x[n : n + 1] if isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == N else x

        module = copy.copy(self.module)
        if isinstance(module, nn.BCEWithLogitsLoss):
            module = nn.BCEWithLogitsLoss(
                weight=module.weight
                if module.weight is None or module.weight.ndim < self.outputs.ndim
                else pick(module.weight),
                pos_weight=module.pos_weight,
                reduction=module.reduction,
            )
        targets = tuple(map(pick, self.targets)) if isinstance(self.targets, tuple) else pick(self.targets)
        return Case(module, self.outputs[n : n + 1], targets)


@st.composite
def generators(draw):
    return torch.Generator().manual_seed(draw(st.integers(0, 2**20)))


def normal(generator, *shape):
    return 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)


def uniform(generator, *shape):
    return 0.1 + torch.rand(shape, generator=generator, dtype=torch.float64)


@st.composite
def output_shapes(draw):
    return (draw(st.integers(1, 3)), *draw(st.sampled_from([(), (3,), (2, 2), (1, 2, 2)])))


@st.composite
def mse(draw):
    g, shape = draw(generators()), draw(output_shapes())
    return Case(nn.MSELoss(reduction=draw(REDUCTIONS)), normal(g, *shape), normal(g, *shape))


@st.composite
def bce(draw):
    g, shape = draw(generators()), draw(output_shapes())
    weight = draw(st.sampled_from([None, (), shape[1:], (shape[0], *(1,) * (len(shape) - 1)), shape]))
    pos_weight = draw(st.sampled_from([None, (), shape[1:]]))
    targets = torch.rand(shape, generator=g, dtype=torch.float64)
    module = nn.BCEWithLogitsLoss(
        weight=None if weight is None else 3 * uniform(g, *weight),
        pos_weight=None if pos_weight is None else 3 * uniform(g, *pos_weight),
        reduction=draw(REDUCTIONS),
    )
    return Case(module, normal(g, *shape), targets.round() if draw(st.booleans()) else targets)


@st.composite
def gaussian(draw):
    g, shape = draw(generators()), draw(output_shapes())
    variances = [shape, shape[:-1], *((*shape[:i], 1, *shape[i + 1 :]) for i in range(len(shape)))]
    variance = draw(st.sampled_from([0.7, *variances]))
    variance = variance if isinstance(variance, float) else uniform(g, *variance)
    module = nn.GaussianNLLLoss(
        full=draw(st.booleans()), eps=draw(st.sampled_from([1e-6, 0.5])), reduction=draw(REDUCTIONS)
    )
    return Case(module, normal(g, *shape), (normal(g, *shape), variance))


@st.composite
def poisson(draw, log_inputs=(True, False)):
    g, shape, log_input = draw(generators()), draw(output_shapes()), draw(st.sampled_from(log_inputs))
    module = nn.PoissonNLLLoss(
        log_input=log_input,
        full=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-8, 0.2])),
        reduction=draw(REDUCTIONS),
    )
    outputs = normal(g, *shape) if log_input else 3 * uniform(g, *shape)
    return Case(module, outputs, torch.poisson(4 * uniform(g, *shape), generator=g))


@st.composite
def cross_entropy(draw):
    g, N, C, positions = draw(generators()), draw(st.integers(1, 3)), draw(st.integers(2, 4)), draw(POSITIONS)
    ignore_index = draw(st.sampled_from([-100, 1, 77]))
    outputs = normal(g, N, C, *positions)
    if draw(st.booleans()):
        targets = normal(g, N, C, *positions).softmax(1)
        ignore_index = min(ignore_index, -1)
    else:
        targets = torch.randint(C, (N, *positions), generator=g)
        ignored = torch.rand(targets.shape, generator=g) < draw(st.sampled_from([0.0, 0.4]))
        targets[ignored] = ignore_index
        if bool((targets == ignore_index).all()):
            targets.view(-1)[0] = 0
    module = nn.CrossEntropyLoss(
        weight=draw(st.sampled_from([None, uniform(g, C)])),
        ignore_index=ignore_index,
        label_smoothing=draw(st.sampled_from([0.0, 0.3])),
        reduction=draw(REDUCTIONS),
    )
    return Case(module, outputs, targets)


def cases():
    """Every supported loss with every option."""
    return st.one_of(mse(), bce(), gaussian(), poisson(), cross_entropy(), cross_entropy(), cross_entropy())


def natural_cases():
    """Losses whose Fisher is the GGN."""
    return st.one_of(mse(), bce(), gaussian(), poisson(log_inputs=(True,)), cross_entropy(), cross_entropy())
