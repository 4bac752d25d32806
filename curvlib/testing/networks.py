"""Strategy for networks with data, of every depth, width, activation, loss and reduction.

Symbols: N examples, T and S positions, d features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import nn

from curvlib.testing.losses import EVERY_LOSS, LossCase, Reduction
from curvlib.testing.oracles import Network

ACTIVATIONS: tuple[type[nn.Module], ...] = (nn.Tanh, nn.ReLU, nn.Sigmoid, nn.Softplus)
POSITIONS: tuple[tuple[int, ...], ...] = ((), (1,), (3,), (1, 2), (2, 2))


class MeanOverPositions(nn.Module):
    """(N, *T, d) -> (N, d): positions that meet before the outputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean over all dimensions between the first and the last."""
        return x.flatten(1, -2).mean(1)


def mlp(
    widths: Sequence[int], activation: type[nn.Module] = nn.Tanh, bias: bool = True, *, final: Sequence[nn.Module] = ()
) -> nn.Sequential:
    """Return a float64 multi-layer perceptron with the given widths, activations between its layers."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out, bias=bias), activation()]
    return nn.Sequential(*layers[:-1], *final).double()


def pool_before_last(model: nn.Sequential) -> None:
    """Put :class:`MeanOverPositions` before the last linear layer of a perceptron."""
    last = max(i for i, module in enumerate(model) if isinstance(module, nn.Linear))
    model.insert(last, MeanOverPositions())


@st.composite
def networks(
    draw: DrawFn,
    losses: Sequence[LossCase] = EVERY_LOSS,
    activations: Sequence[type[nn.Module]] = ACTIVATIONS,
    positions: bool = True,
    max_examples: int = 4,
    l2: bool = True,
    min_examples: int = 1,
) -> Network:
    """A network with data and loss in float64.

    Args:
        draw: Hypothesis's.
        losses: which losses.
        activations: which activations.
        positions: whether inputs may be (N, T, d) and (N, T, S, d) beside (N, d), whose positions may meet in a mean.
        max_examples: largest N.
        l2: whether there may be an l2 term.
        min_examples: smallest N.
    """
    torch.manual_seed(draw(st.integers(0, 2**16)))
    case = draw(st.sampled_from(losses))
    widths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    if case.classes_first:
        widths[-1] = max(widths[-1], 2)  # a softmax over one class is refused
    T = draw(st.sampled_from(POSITIONS)) if positions else ()
    pooled = bool(T) and len(widths) > 2 and draw(st.booleans())
    ending = case.ending(0 if pooled else len(T))
    model = mlp(widths, draw(st.sampled_from(activations)), draw(st.booleans()), final=ending)
    if pooled:
        pool_before_last(model)
    N = draw(st.integers(min_examples, max_examples))
    inputs = torch.randn(N, *T, widths[0], dtype=torch.float64)
    reductions: list[Reduction] = ["mean", "sum"] if draw(st.booleans()) else ["sum", "mean"]
    weight = draw(st.sampled_from((0.0, 0.3))) if l2 else 0.0
    return with_loss(model, case, inputs, reductions, weight)


def with_loss(
    model: nn.Module, case: LossCase, inputs: torch.Tensor, reductions: Sequence[Reduction], l2: float = 0.0
) -> Network:
    """Return a network with the loss of a case, and with the same loss in the other reduction."""
    outputs = model(inputs).detach()
    losses = []
    for reduction in reductions:
        with torch.random.fork_rng(devices=[]):  # the same weights for both
            losses.append(case.make(outputs, reduction))
    torch.rand(1)  # targets are other numbers than the weights
    return Network(model, losses[0], inputs, case.targets(outputs), l2, losses[1] if len(losses) > 1 else None)
