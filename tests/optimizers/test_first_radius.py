"""A first radius that is a multiple of the scaled parameters: measured with the curvature of the first proposal."""

import pytest
import torch
from optimizer_cases import classification

from curvlib import GGN
from curvlib.approximations import KFAC, Dense, Diagonal
from curvlib.optimizers import CurvatureScaling, FixedLength, ModelDescent, SecondOrderOptimizer
from curvlib.solvers import MoreSorensen, RelativeRadius, TrustRegion

CURVATURES = {"exact": Dense(GGN()), "statistics": KFAC(GGN()), "diagonal": Diagonal(GGN())}
FACTOR = 0.01


def made(curvature, **direction):
    objective, batch = classification(dtype=torch.float64, examples=80)
    optimizer = SecondOrderOptimizer(
        objective,
        direction=ModelDescent(curvature=curvature, descent=MoreSorensen(), scaling=CurvatureScaling(), **direction),
        step_rule=FixedLength(),
        radius=TrustRegion(initial=RelativeRadius(FACTOR)),
    )
    return objective, batch, optimizer


@pytest.mark.parametrize("curvature", CURVATURES.values(), ids=CURVATURES.keys())
@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_the_first_radius_has_the_scales_of_the_first_proposal(curvature, fraction):
    objective, batch, optimizer = made(curvature, fraction=fraction)
    theta = objective.parameter_vector()
    result = optimizer.step(batch)
    assert result.accepted
    scales = optimizer.state_dict()["direction"]["scales"]
    assert result.radius == pytest.approx(FACTOR * float((scales * theta).norm()), rel=1e-12)


def test_the_first_radius_is_measured_on_the_curvature_batch():
    objective, (x, y), optimizer = made(Dense(GGN()))
    theta, part = objective.parameter_vector(), (x[:20], y[:20])
    s = Dense(GGN()).estimate(objective.at(part)).diagonal().sqrt()
    result = optimizer.step((x, y), curvature_batch=part)
    assert result.radius == pytest.approx(FACTOR * float((s * theta).norm()), rel=1e-12)


def test_the_curvature_of_the_first_radius_is_used_once():
    _, batch, optimizer = made(Dense(GGN()), fraction=0.25)
    first, second = optimizer.step(batch), optimizer.step(batch)
    assert first.accepted
    # both make one part of the batch and its curvature
    assert first.gradient_evaluations == pytest.approx(second.gradient_evaluations)
