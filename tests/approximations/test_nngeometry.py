"""Matrices, products and inverses equal those of nngeometry, where it is right: each module called once, float64.

Not compared: its low-rank inverse, which leaves out the orthogonal complement; modules called twice, linear layers at
several positions and grouped convolutions, which it gets wrong or refuses; K-FAC of norms and transposed convolutions.
"""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvlib import GGN, Objective
from curvlib.approximations import EKFAC, KFAC, BlockDiagonal, Dense, Diagonal, Exact, LowRank
from curvlib.solvers import FactoredTikhonov, damped_inverse

pytest.importorskip("nngeometry")

from nngeometry.metrics import FIM
from nngeometry.object import PVector, pspace

EXACT = {"rtol": 1e-9, "atol": 1e-11}
N = 7
NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "without bias": (lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)), (4,)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        (2, 4, 4),
    ),
    "dilated": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2, dilation=2), nn.Flatten(), nn.Linear(12, 3)), (2, 4, 4)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)), (2, 4)),
}
PEERS = {
    "dense": (pspace.PMatDense, Dense(GGN())),
    "diagonal": (pspace.PMatDiag, Diagonal(GGN())),
    "blocks": (pspace.PMatBlockDiag, BlockDiagonal(GGN())),
    "K-FAC": (pspace.PMatKFAC, KFAC(GGN())),
    "EKFAC": (pspace.PMatEKFAC, EKFAC(GGN())),
    "low rank": (pspace.PMatLowRank, LowRank(GGN())),
}
# How it adds the damping: K-FAC's on each factor, as Martens & Grosse (2015).
SOLVERS = dict.fromkeys(PEERS, damped_inverse) | {"K-FAC": FactoredTikhonov()}
DAMPING = 0.3


@pytest.fixture(autouse=True)
def _float64():
    """It makes helpers of PyTorch's default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def subject(name):
    """An objective, batches of unequal size, and nngeometry's loader of the same."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    data = TensorDataset(torch.randn(N, *shape), torch.randint(3, (N,)))
    loader = DataLoader(data, batch_size=4)
    return Objective(make(), nn.CrossEntropyLoss()), list(loader), loader


def peers(kind, objective, loader):
    matrix = FIM(objective.model, loader, kind, variant="classif_logits")
    if kind is pspace.PMatEKFAC:
        matrix.update_diag(loader)
    return matrix


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_matrices_and_inverses_equal_nngeometry(name, kind):
    objective, batches, loader = subject(name)
    theirs = peers(PEERS[kind][0], objective, loader)
    C = PEERS[kind][1].estimate_over(objective, batches, progress=False)
    dense = torch.diag(theirs.get_diag()) if kind == "diagonal" else theirs.to_torch()
    torch.testing.assert_close(C.to_dense(), dense, **EXACT)
    torch.testing.assert_close(C.trace(), theirs.trace(), **EXACT)
    if kind == "low rank":
        return
    b = torch.randn(C.size)
    x = theirs.solve(PVector(theirs.generator.layer_collection, vector_repr=b), regul=DAMPING).to_torch()
    torch.testing.assert_close(SOLVERS[kind](C, DAMPING) @ b, x, **EXACT)


@pytest.mark.parametrize("name", ["mlp", "convolution"])
def test_implicit_products_equal_nngeometry(name):
    objective, batches, loader = subject(name)
    theirs = peers(pspace.PMatImplicit, objective, loader)
    v = torch.randn(objective.layout.size)
    product = theirs.mv(PVector(theirs.generator.layer_collection, vector_repr=v)).to_torch()
    C = Exact(GGN()).estimate_over(objective, batches, progress=False)
    torch.testing.assert_close(C @ v, product, **EXACT)


def test_a_regression_is_half_its_squared_error():
    """Its Fisher matrix of a unit variance is the GGN of half the sum of squares, over the examples."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(N, 4), torch.randn(N, 3)
    loader = DataLoader(TensorDataset(x, y), batch_size=N)
    theirs = FIM(model, loader, pspace.PMatKFAC, variant="regression").to_torch()
    C = KFAC(GGN()).estimate(Objective(model, nn.MSELoss(reduction="sum")).at((x, y)))
    torch.testing.assert_close(C.to_dense() / (2 * N), theirs, **EXACT)
