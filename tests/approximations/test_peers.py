"""K-FAC equals curvlinops and BackPACK's KFLR where they are right, and brute force where they are not."""

import warnings

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import KFLR
from cases import LOSSES, mlp, networks
from hypothesis import given, settings
from oracles import Network
from torch import nn

from curvlib import GGN, EmpiricalFisher, Objective
from curvlib.approximations import KFAC, BlockDiagonal, Diagonal, Exact

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # while a dependency of the peer is loaded
    import curvlinops

EXACT = {"rtol": 1e-12, "atol": 1e-14}
# Every depth and width, with and without bias, both reductions; the activations and losses that both peers know.
NETWORKS = networks(
    losses=[case for case in LOSSES if case.name in ("mse", "cross-entropy")],
    activations=(nn.Tanh, nn.ReLU, nn.Sigmoid),
    positions=False,
    max_examples=6,
    l2=False,
)


def our_factors(network, matrix):
    """K-FAC's A and G, by the name of the layer."""
    evaluation = Objective(network.model, network.loss).at((network.inputs, network.targets))
    statistics = KFAC(matrix).statistics(evaluation)
    names = linear_layers(network.model)
    means, sums = statistics.means, statistics.sums
    return {name: (means[f"{name}|A"] / means[f"{name}|positions"], sums[f"{name}|G"]) for name in names}


def linear_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize(("matrix", "fisher_type"), [(GGN(), "type-2"), (EmpiricalFisher(), "empirical")], ids=str)
@given(network=NETWORKS)
@settings(max_examples=40)
def test_factors_and_products_equal_curvlinops(matrix, fisher_type, network):
    """curvlinops has the same scales: A is a mean over the examples, G carries the objective's reduction."""
    parameters = list(network.model.parameters())
    peer = curvlinops.KFACLinearOperator(
        network.model,
        network.loss,
        parameters,
        [(network.inputs, network.targets)],
        fisher_type=fisher_type,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    peer.compute_kronecker_factors()
    state = peer.state_dict()
    ours = our_factors(network, matrix)
    assert ours.keys() == state["input_covariances"].keys()
    for name, (A, G) in ours.items():
        torch.testing.assert_close(A, state["input_covariances"][name], **EXACT)
        torch.testing.assert_close(G, state["gradient_covariances"][name], **EXACT)
    C = KFAC(matrix).estimate(Objective(network.model, network.loss).at((network.inputs, network.targets)))
    torch.testing.assert_close(C.to_dense(), peer @ torch.eye(C.size, dtype=torch.float64), **EXACT)


@given(NETWORKS)
@settings(max_examples=40)
def test_factors_equal_backpacks_kflr(network):
    ours = our_factors(network, GGN())
    model, loss, x = extend(network.model), extend(network.loss), network.inputs.requires_grad_()
    with backpack(KFLR()):
        loss(model(x), network.targets).backward()
    for name, layer in linear_layers(model).items():
        A, G = ours[name]
        their_G, their_A = layer.weight.kflr  # without the homogeneous coordinate
        torch.testing.assert_close(A[: layer.in_features, : layer.in_features], their_A, **EXACT)
        torch.testing.assert_close(G, their_G, **EXACT)
        if layer.bias is not None:
            torch.testing.assert_close(G, layer.bias.kflr[0], **EXACT)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside torch.func.jvp, which the peer uses
def test_exact_products_equal_curvlinops():
    model, x, y = mlp([4, 5, 3]), torch.randn(6, 4).double(), torch.randint(3, (6,))
    loss = nn.CrossEntropyLoss()
    peer = curvlinops.GGNLinearOperator(model, loss, list(model.parameters()), [(x, y)], check_deterministic=False)
    ours = Exact(GGN()).estimate(Objective(model, loss).at((x, y)))
    v = torch.randn(ours.size).double()
    torch.testing.assert_close(ours @ v, peer @ v, **EXACT)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([5.0, 1.0, 3.0]).double()),
        nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(label_smoothing=0.3),
    ],
    ids=["class weights", "ignore_index", "label smoothing"],
)
def test_loss_options_that_peers_ignore_are_in_the_curvature(loss):
    """curvlinops' K-FAC and GGN diagonal leave out class weights and ignored labels."""
    model, x = mlp([4, 3]), torch.randn(1, 4).double()
    y = torch.tensor([0])
    evaluation = Objective(model, loss).at((x, y))
    dense = Network(model, loss, x, y).ggn()
    for approximation in (KFAC(GGN()), BlockDiagonal(GGN()), Exact(GGN())):
        torch.testing.assert_close(approximation.estimate(evaluation).to_dense(), dense, **EXACT)
    torch.testing.assert_close(Diagonal(GGN()).estimate(evaluation).diagonal(), dense.diagonal(), **EXACT)
