"""Steps that find nothing, and steps that an error ends: nothing is lost, and nothing passes for a success."""

import pytest
import torch
from torch import nn

from curvlib import GGN, Hessian, Objective
from curvlib.approximations import KFAC, Dense, Exact
from curvlib.optimizers import (
    CurvatureScaling,
    FixedScaling,
    ModelDescent,
    hessian_free,
    levenberg_marquardt,
    minimize,
)
from curvlib.solvers import MoreSorensen


class Product(nn.Module):
    """x -> b_0 b_1 x, whose squared loss has a saddle point at b = 0."""

    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.tensor([0.1, 0.1], dtype=torch.float64))

    def forward(self, x):
        return self.b[0] * self.b[1] * x


def near_a_saddle():
    x = torch.ones(4, 1, dtype=torch.float64)
    return Objective(Product(), nn.MSELoss(reduction="sum")), (x, 2.0 * x)


def test_hessian_free_leaves_a_saddle_where_the_first_direction_has_negative_curvature():
    objective, batch = near_a_saddle()
    optimizer = hessian_free(objective, curvature=Exact(Hessian()), damping=1e-3)
    first = optimizer.step(batch)
    assert first.accepted
    assert first.actual < 0
    assert minimize(optimizer, batch, max_steps=200).value < 1e-8


def test_no_step_at_all_is_no_convergence():
    objective, batch = near_a_saddle()
    optimizer = hessian_free(objective, damping=1e-3)
    optimizer._direction.propose = lambda situation, own=optimizer._direction.propose: _nothing(own(situation))
    result = minimize(optimizer, batch, max_steps=5, patience=3)
    assert not result.converged


def _nothing(proposal):
    object.__setattr__(proposal, "step", torch.zeros_like(proposal.step))
    object.__setattr__(proposal, "candidates", ())
    return proposal


def test_scalings_that_do_not_fit_are_refused_before_any_step():
    objective, _ = near_a_saddle()
    with pytest.raises(ValueError, match="7 values, and the objective another size, 2"):
        levenberg_marquardt(objective, scaling=FixedScaling(torch.ones(7, dtype=torch.float64)))
    with pytest.raises(ValueError, match="CurvatureScaling takes roots"):
        ModelDescent(curvature=Dense(Hessian()), descent=MoreSorensen(), scaling=CurvatureScaling())
    with pytest.raises(ValueError, match="CurvatureScaling takes roots"):
        levenberg_marquardt(objective, curvature=Exact(Hessian()))
    ModelDescent(curvature=Dense(GGN()), descent=MoreSorensen(), scaling=CurvatureScaling())
    ModelDescent(curvature=KFAC(GGN()), descent=MoreSorensen(), scaling=CurvatureScaling())
