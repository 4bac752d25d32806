"""EKFAC beside curvlinops, where both have the same factors."""

import warnings

import pytest
import torch
from oracles import Network
from torch import nn

from curvlib import GGN, EmpiricalFisher, Objective
from curvlib.approximations import EKFAC

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # while a dependency of the peer is loaded
    import curvlinops

MATRICES = [(GGN(), "type-2"), (EmpiricalFisher(), "empirical")]


def networks():
    torch.manual_seed(0)
    x = torch.randn(12, 4, dtype=torch.float64)
    mlp = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    yield "classifier", Network(mlp, nn.CrossEntropyLoss(), x, torch.randint(3, (12,)))
    yield "sum", Network(mlp, nn.MSELoss(reduction="sum"), x, torch.randn(12, 3).double())
    convolution = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    images = torch.randn(12, 1, 3, 3, dtype=torch.float64)
    yield "convolution", Network(convolution, nn.CrossEntropyLoss(), images, torch.randint(3, (12,)))


@pytest.mark.parametrize(("matrix", "fisher_type"), MATRICES, ids=str)
@pytest.mark.parametrize("name", ["classifier", "sum", "convolution"])
def test_dense_matrices_equal_curvlinops(name, matrix, fisher_type):
    network = dict(networks())[name]
    peer = curvlinops.EKFACLinearOperator(
        network.model,
        network.loss,
        list(network.model.parameters()),
        [(network.inputs, network.targets)],
        fisher_type=fisher_type,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    C = EKFAC(matrix).estimate(Objective(network.model, network.loss).at((network.inputs, network.targets)))
    theirs = peer @ torch.eye(C.size, dtype=torch.float64)
    torch.testing.assert_close(C.to_dense(), theirs, rtol=1e-9, atol=1e-11)
