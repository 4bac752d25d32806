"""The same numbers on every device: what the CPU gives in float64, up to the order of sums."""

import copy

import pytest
import torch
from cases import mlp
from torch import nn

from curvlib import GGN, EmpiricalFisher, Fisher, Hessian, Objective
from curvlib.approximations import (
    EKFAC,
    KFAC,
    KFRA,
    LBFGS,
    BlockDiagonal,
    ByGroups,
    ByOutputUnit,
    Dense,
    Diagonal,
    Exact,
    Identity,
    LanczosTruncation,
    LowRank,
    LowRankBlocks,
    Nystrom,
    RandomizedSketch,
    Remainder,
    RootDiagonal,
    TridiagonalKFAC,
)
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
    *(
        a(m)
        for a in (Exact, Dense, BlockDiagonal, Diagonal, KFAC, EKFAC, TridiagonalKFAC, KFRA)
        for m in (GGN(), EmpiricalFisher())
    ),
    Exact(Hessian()),
    Identity(),
    LowRank(GGN()),
    BlockDiagonal(GGN(), partition=ByOutputUnit()),
    BlockDiagonal(GGN(), partition=ByGroups([["*"]]), blocks=LowRankBlocks(75)),
    RootDiagonal(GGN()),
    0.5 * KFAC(GGN()) + 2.0 * Diagonal(GGN()),
    # random directions are others on each device: as many as parameters leave nothing to chance
    *(LowRank(GGN(), method=m) for m in (RandomizedSketch(75), Nystrom(75), LanczosTruncation(75))),
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


def test_pairs_of_steps_agree(accelerator):
    results = []
    for place in ("cpu", accelerator):
        torch.manual_seed(0)
        history = LBFGS(memory=3).start()
        for _ in range(4):
            s = torch.randn(6, dtype=torch.float64)
            history.update(s.to(place), (s * torch.arange(1, 7)).to(place))
        assert history.operator().device.type == torch.device(place).type
        results.append(damped_inverse(history.operator(), 0.0).to_dense().cpu())
    torch.testing.assert_close(*results, **SAME)


def test_generators_of_the_cpu_serve_every_device(accelerator):
    objective, batch = on(accelerator)
    sketch = LowRank(GGN(), method=Nystrom(3), diagonal=Remainder())
    C = sketch.estimate(objective.at(batch), torch.Generator().manual_seed(0))
    there, here = on("cpu")
    expected = sketch.estimate(there.at(here), torch.Generator().manual_seed(0))
    torch.testing.assert_close(C.to_dense().cpu(), expected.to_dense(), **SAME)


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
