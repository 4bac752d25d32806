"""The same numbers on every device: what the CPU gives in float64, up to the order of sums."""

import copy

import pytest
import torch
from cases import mlp
from torch import nn

from curvlib import GGN, EmpiricalFisher, Fisher, Hessian, Objective
from curvlib.approximations import KFAC, BlockDiagonal, Dense, Diagonal, Exact, Identity
from curvlib.optimizers import hessian_free, kfac
from curvlib.solvers import CG, FactoredTikhonov, ResidualTest, damped_inverse

# Sums of a few hundred float64 products in another order, through solves of condition below 1e4.
SAME = {"rtol": 1e-9, "atol": 1e-10}


def on(device):
    torch.manual_seed(0)
    model, x, y = mlp([5, 8, 3]), torch.randn(20, 5).double(), torch.randint(3, (20,))
    model = copy.deepcopy(model).to(device)
    return Objective(model, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])).to(device), l2=1e-2), (
        x.to(device),
        y.to(device),
    )


@pytest.fixture
def accelerator(device):
    if device.type == "cpu":
        pytest.skip("there is no device to compare with the CPU")
    return device


ESTIMATES = [
    *(a(m) for a in (Exact, Dense, BlockDiagonal, Diagonal, KFAC) for m in (GGN(), EmpiricalFisher())),
    Exact(Hessian()),
    Identity(),
]
SOLVERS = [damped_inverse, FactoredTikhonov(), CG(stop=ResidualTest(relative=1e-11))]


@pytest.mark.parametrize("approximation", ESTIMATES, ids=str)
def test_operators_agree(approximation, accelerator):
    results = []
    for place in ("cpu", accelerator):
        objective, batch = on(place)
        C = approximation.estimate(objective.at(batch))
        assert C.device.type == torch.device(place).type
        v = torch.linspace(-1, 1, C.size, dtype=torch.float64, device=place)
        results.append([(C @ v).cpu(), C.diagonal().cpu(), C.trace().cpu()])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(here, there, **SAME)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: getattr(solver, "__name__", type(solver).__name__))
@pytest.mark.parametrize("approximation", [KFAC(GGN()), BlockDiagonal(GGN()), Diagonal(GGN()), Exact(GGN())], ids=str)
def test_damped_steps_agree(approximation, solver, accelerator):
    if isinstance(approximation, Exact) and solver is not SOLVERS[-1]:
        pytest.skip("matrix-free: conjugate gradients in any case")
    steps = []
    for place in ("cpu", accelerator):
        objective, batch = on(place)
        evaluation = objective.at(batch)
        steps.append((solver(approximation.estimate(evaluation), 0.1) @ evaluation.gradient()).cpu())
    torch.testing.assert_close(*steps, rtol=1e-7, atol=1e-9)


def test_draws_are_made_on_the_objectives_device(device):
    objective, batch = on(device)
    generator = torch.Generator(device).manual_seed(0)
    assert KFAC(Fisher()).estimate(objective.at(batch), generator).device.type == device.type


@pytest.mark.parametrize("preset", [kfac, hessian_free])
def test_presets_end_where_the_cpu_does(preset, accelerator):
    losses = []
    for place in ("cpu", accelerator):
        objective, batch = on(place)
        optimizer = preset(objective)
        for _ in range(12):
            last = optimizer.step(batch)
        losses.append(last.loss)
    # label draws differ between devices: the same basin, not the same path
    assert losses[0] == pytest.approx(losses[1], rel=0.2)
