"""Estimates beside dense matrices: where an approximation claims to be exact, and where each has to be.

Symbols: C the estimate, C_l its block of layer l, M (D, D) the curvature of the loss, d_in and d_out the sizes of a
layer, e_i unit vectors, s and r lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from hypothesis.strategies import SearchStrategy, just
from torch import Tensor, nn

from curvlib.approximations import Approximation
from curvlib.testing.estimates import Estimates
from curvlib.testing.exactness import ExactOn, itself
from curvlib.testing.identities import Subject
from curvlib.testing.losses import EVERY_LOSS, LOSSES
from curvlib.testing.networks import mlp, networks, pool_before_last, with_loss
from curvlib.testing.numbers import draw
from curvlib.testing.oracles import Network
from curvlib.testing.search import search

Sides = Callable[[Tensor], tuple[Tensor, Tensor]]


def check_exact(
    approximation: Approximation,
    subject: Subject,
    claim: ExactOn,
    random: bool,
    activations: Sequence[type[nn.Module]],
    examples: int,
    draws: int,
) -> None:
    """Hold estimates against the matrix that they claim to be, or in expectation to be."""
    identity = f"C = the dense matrix that it is exact for{claim.note}"
    if random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for network in fixed_networks(min(claim.examples, 3), pooled=claim.positions):
                _unbiased(approximation, subject, network, claim.sides(network, approximation), draws)
        return
    drawn: SearchStrategy = networks(EVERY_LOSS, activations, positions=claim.positions, max_examples=claim.examples)

    def check(network: Network) -> None:
        estimates = Estimates(approximation, subject, network)
        sides = subject.value("the dense matrix", lambda: claim.sides(network, approximation))
        estimates.equal(identity, *sides(estimates.C))

    search(drawn, check, examples)
    # a few draws may all be of one layer, of one output, or without positions that meet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layered = deep_network(activations[0], min(claim.examples, 3))
        pooled = [pooled_network(activations[0], min(claim.examples, 3))] if claim.positions else []
    for network in (layered, *pooled):
        search(just(network), check, 1)


def check_sphere(
    approximation: Approximation, subject: Subject, claim: ExactOn | None, random: bool, degree: float, draws: int
) -> None:
    """Hold an approximation to the case in which every one is exact: each layer's curvature is the same c I.

    See :func:`sphere`. Of two layers the entries between them are not zero, so that the diagonal alone is compared.
    """
    for depth, what in ((1, "C = c^degree I"), (2, "the diagonal of C is c^degree")):
        identity = f"where the curvature of each layer is a multiple c I of the identity, {what}"
        for reduction in ("mean", "sum"):
            network = sphere(reduction, depth)
            where = f"{identity} (layers without activation, squared error, {reduction})"
            if claim is None:
                sides = _of_sphere(approximation, network, degree, depth)
            else:
                sides = claim.sides(network, approximation)
            if random:
                _unbiased(approximation, subject, network, sides, draws, where)
            else:
                one = Estimates(approximation, subject, network)
                one.equal(where, *sides(one.C))


def _of_sphere(approximation: Approximation, network: Network, degree: float, depth: int) -> Sides:
    shift = network.l2 if approximation.includes_l2 else 0.0
    c = network.copy(l2=0.0).ggn()[0, 0].detach()
    expected = (c**degree + shift) * torch.eye(len(network.theta), dtype=c.dtype)
    compared = itself if depth == 1 else _diagonal
    return lambda C: (compared(C), compared(expected))


def _diagonal(C: Tensor) -> Tensor:
    return C.diagonal()


def sphere(reduction: str, depth: int, d_in: int = 2, d_out: int = 3) -> Network:
    """Return linear layers of squared error whose inputs and vectors are white and independent: C_l = c I of each.

    The inputs are +-s e_i and the residuals r e_j, in all 2 d_in d_out combinations. With s^2 = d_in the inputs and
    their homogeneous coordinate have the second moment I; with r^2 = d_out / 2, GGN, Fisher, empirical Fisher and (but
    for the entries between layers) the Hessian are the same matrix. Weights have orthonormal columns and biases are 0,
    so that what passes through a layer stays white.
    """
    widths = [*[d_in] * depth, d_out]
    layers = [nn.Linear(n, m).double() for n, m in pairwise(widths)]
    for i, layer in enumerate(layers):
        layer.weight.data = draw(i).orthogonal(layer.out_features)[:, : layer.in_features].clone()
        layer.bias.data.zero_()
    model = nn.Sequential(*layers)
    signs = torch.cat([torch.eye(d_in), -torch.eye(d_in)]).double()
    a = d_in**0.5 * signs.repeat_interleave(d_out, 0)
    residuals = (d_out / 2) ** 0.5 * torch.eye(d_out, dtype=torch.float64).repeat(2 * d_in, 1)
    return Network(model, nn.MSELoss(reduction=reduction), a, model(a).detach() - residuals, 0.1)


def _unbiased(
    approximation: Approximation,
    subject: Subject,
    network: Network,
    sides: Sides,
    draws: int,
    where: str = "",
) -> None:
    """Two-sided z-test of every entry; 5 standard errors leave a false alarm below 1e-4 for 100 entries."""
    evaluation, generator = network.evaluate(), torch.Generator().manual_seed(1)
    pairs = [sides(approximation.estimate(evaluation, generator).to_dense()) for _ in range(draws)]
    samples, expected = torch.stack([got for got, _ in pairs]), pairs[0][1]
    error = samples.std(0) / draws**0.5
    z = (samples.mean(0) - expected).abs() / error.clamp(min=1e-12 + 1e-9 * float(expected.abs().max()))
    identity = "the mean over random draws = the dense matrix" + (f", {where}" if where else "")
    worst = int(z.argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape))
    subject.holds(
        identity,
        float(z.max()) < 5,
        f"expected {expected.flatten()[worst]:.4g} in entry {place}, got a mean of "
        f"{samples.mean(0).flatten()[worst]:.4g} with standard error {error.flatten()[worst]:.2g} ({network!r})",
    )


def fixed_networks(examples: int = 3, pooled: bool = False) -> list[Network]:
    """Small networks with losses in natural parameters, whose labels are drawn without rare ones."""
    made = []
    for case, reduction in ((LOSSES[0], "mean"), (LOSSES[2], "sum"), (LOSSES[6], "mean")):
        model = mlp([2, 2, 3], final=case.ending())
        inputs = torch.randn(examples, 2, dtype=torch.float64)
        made.append(with_loss(model, case, inputs, (reduction,), 0.1))  # type: ignore[arg-type]
    return [made[0], made[1], pooled_network(nn.Tanh, examples)] if pooled else made


def deep_network(activation: type[nn.Module], examples: int) -> Network:
    """Return three layers of different widths, none of them 1."""
    inputs = torch.randn(examples, 2, dtype=torch.float64)
    return with_loss(mlp([2, 3, 2, 3], activation), LOSSES[10], inputs, ("mean",), 0.1)


def pooled_network(activation: type[nn.Module], examples: int) -> Network:
    """Return two layers, the first one at three positions that meet in a mean."""
    model = mlp([2, 3, 2], activation)
    pool_before_last(model)
    return with_loss(model, LOSSES[0], torch.randn(examples, 3, 2, dtype=torch.float64), ("mean",), 0.1)
