"""Hypothesis strategies: networks with data, of every depth, width, activation, loss and reduction."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st
from oracles import Network
from torch import nn

from curvlib import Objective
from curvlib.output_losses import AutogradLoss, OutputLoss

ACTIVATIONS = (nn.Tanh, nn.ReLU, nn.Sigmoid, nn.Softplus)
POSITIONS = ((), (1,), (3,), (1, 2), (2, 2))


class PositionsLast(nn.Module):
    """(N, *T, C) -> (N, C, *T), as cross-entropy wants its classes."""

    def forward(self, x):
        return x.movedim(-1, 1)


@dataclass(frozen=True)
class LossCase:
    """A loss with the targets that it needs for outputs of a given shape: (N, *T, C), or (N, C, *T) classes first."""

    name: str
    make: Callable  # (outputs, reduction) -> loss
    targets: Callable  # outputs -> targets
    classes_first: bool = False
    likelihood: bool = True  # whether labels can be drawn from the model, so that there is a Fisher matrix
    natural: bool = True  # whether Fisher and GGN agree in expectation
    final: type[nn.Module] | None = None  # what the network must end in for its outputs to be valid

    def ending(self, position_dimensions=0):
        """The modules after the last layer."""
        last = [PositionsLast()] if self.classes_first and position_dimensions else []
        return [*([self.final()] if self.final else []), *last]


class SharedNoise(OutputLoss):
    """What a third party writes: half the squares of the errors and of their sum, the outputs' precision I + 1 1^T."""

    def value(self, outputs, targets):
        errors = outputs - targets
        return 0.5 * (errors.square().sum() + errors.sum(-1).square().sum()) * self.scale(outputs, targets)

    def sample_gradient(self, outputs, targets, generator=None):
        own, shared = (
            torch.randn(shape, dtype=outputs.dtype, device=outputs.device, generator=generator)
            for shape in (outputs.shape, (*outputs.shape[:-1], 1))
        )
        return (own + shared) * self.scale(outputs, targets).sqrt()


def _log_cosh(z, reduction):
    divided = (lambda z: len(z)) if reduction == "mean" else (lambda z: 1)
    return AutogradLoss(lambda z, y: (z - y).cosh().log().sum() / divided(z), reduction=reduction)


def _labels(z):
    return torch.randint(z.shape[1], (z.shape[0], *z.shape[2:]))


def _ignored(z):
    labels = _labels(z)
    # the smallest number of examples is 1: keep at least one label that is not ignored
    labels.flatten()[1:][torch.rand(labels.numel() - 1) < 0.4] = -100
    return labels


def _ignored_class(z):
    labels = _labels(z)
    labels.view(-1)[0] = 1  # not 0, the class to ignore
    return labels


def _counts(z):
    return torch.poisson(torch.full_like(z, 2.0))


def _weights(z):
    return torch.rand(z.shape[1], dtype=z.dtype) + 0.5


LOSSES = (
    LossCase("mse", lambda z, r: nn.MSELoss(reduction=r), torch.randn_like),
    LossCase("cross-entropy", lambda z, r: nn.CrossEntropyLoss(reduction=r), _labels, True),
    LossCase(
        "cross-entropy with class weights, ignored labels and smoothing",
        lambda z, r: nn.CrossEntropyLoss(weight=_weights(z), label_smoothing=0.2, reduction=r),
        _ignored,
        True,
    ),
    LossCase(
        "cross-entropy with class probabilities",
        lambda z, r: nn.CrossEntropyLoss(weight=_weights(z), reduction=r),
        lambda z: torch.randn_like(z).softmax(1),
        True,
    ),
    LossCase(
        "cross-entropy that ignores a class",
        lambda z, r: nn.CrossEntropyLoss(weight=_weights(z), ignore_index=0, reduction=r),
        _ignored_class,
        True,
    ),
    LossCase("bce", lambda z, r: nn.BCEWithLogitsLoss(reduction=r), torch.rand_like),
    LossCase(
        "bce with weights",
        lambda z, r: nn.BCEWithLogitsLoss(
            weight=torch.rand(z.shape[-1], dtype=z.dtype) + 0.5,
            pos_weight=torch.rand(z.shape[-1], dtype=z.dtype) + 0.5,
            reduction=r,
        ),
        lambda z: (torch.rand_like(z) < 0.5).to(z.dtype),
    ),
    LossCase(
        "gaussian",
        lambda z, r: nn.GaussianNLLLoss(reduction=r),
        lambda z: (torch.randn_like(z), torch.rand_like(z) + 0.5),
    ),
    LossCase("poisson", lambda z, r: nn.PoissonNLLLoss(reduction=r), _counts),
    LossCase("log-cosh by autograd", _log_cosh, torch.randn_like, likelihood=False),
    LossCase("a third party's", lambda z, r: SharedNoise(reduction=r), torch.randn_like),
)

# With those whose targets do not all split into batches, or whose outputs are restricted.
EVERY_LOSS = (
    *LOSSES,
    LossCase(
        "gaussian with a number as variance",
        lambda z, r: nn.GaussianNLLLoss(reduction=r),
        lambda z: (torch.randn_like(z), 0.7),
    ),
    LossCase(
        "poisson with rates as outputs",
        lambda z, r: nn.PoissonNLLLoss(log_input=False, reduction=r),
        _counts,
        natural=False,
        final=nn.Softplus,
    ),
)


def mlp(widths, activation=nn.Tanh, bias=True, *, final=()):
    """A float64 multi-layer perceptron with the given widths, activations between its layers."""
    layers = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out, bias=bias), activation()]
    return nn.Sequential(*layers[:-1], *final).double()


@st.composite
def networks(draw, losses=EVERY_LOSS, activations=ACTIVATIONS, positions=True, max_examples=4, l2=True):
    """A network with data and loss in float64; ``positions`` allows inputs (N, T, d) and (N, T, S, d) beside (N, d)."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    case = draw(st.sampled_from(losses))
    widths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    if case.classes_first:
        widths[-1] = max(widths[-1], 2)  # a softmax over one class is refused
    T = draw(st.sampled_from(POSITIONS)) if positions else ()
    model = mlp(widths, draw(st.sampled_from(activations)), draw(st.booleans()), final=case.ending(len(T)))
    inputs = torch.randn(draw(st.integers(1, max_examples)), *T, widths[0], dtype=torch.float64)
    outputs = model(inputs).detach()
    loss = case.make(outputs, draw(st.sampled_from(("mean", "sum"))))
    return Network(model, loss, inputs, case.targets(outputs), draw(st.sampled_from((0.0, 0.3))) if l2 else 0.0)


def classifier(seed=0, examples=40):
    """A small float32 classifier as an objective with an l2 term, and a batch for it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return Objective(model, nn.CrossEntropyLoss(), l2=1e-3), (torch.randn(examples, 5), torch.randint(3, (examples,)))
