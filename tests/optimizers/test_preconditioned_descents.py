"""Preconditioned steps in trust regions of the optimizer: lengths, preconditioners, rejections, checkpoints."""

from dataclasses import dataclass
from math import inf

import pytest
import torch
from optimizer_cases import small_network

from curvlib import GGN
from curvlib.approximations import Dense
from curvlib.operators import Dense as DenseOperator
from curvlib.optimizers import FixedLength, ModelDescent, SecondOrderOptimizer
from curvlib.solvers import PreconditionerNorm, RelativeRadius, ResidualTest, Steihaug, TrustRegion


def length_in(M, d):
    return float(d @ M @ d) ** 0.5


def fixed_preconditioner(size):
    W = torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    P = W @ W.T / size + 0.1 * torch.eye(size, dtype=torch.float64)
    return DenseOperator(P), torch.linalg.inv(P)


def in_fixed_norm(objective, radius, rule=None):
    P, M = fixed_preconditioner(objective.layout.size)
    descent = Steihaug(preconditioner=P, region=PreconditionerNorm(), stop=ResidualTest(relative=1e-8))
    optimizer = SecondOrderOptimizer(
        objective,
        direction=ModelDescent(curvature=Dense(GGN()), descent=descent),
        step_rule=rule or FixedLength(),
        radius=radius,
    )
    return optimizer, M


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_no_step_leaves_the_region_in_its_own_norm():
    objective, batch = small_network()
    optimizer, M = in_fixed_norm(objective, TrustRegion(initial=0.05))
    for _ in range(6):
        before = objective.parameter_vector()
        result = optimizer.step(batch)
        moved = objective.parameter_vector() - before
        assert length_in(M, moved) <= result.radius * (1 + 1e-7)
        assert result.step_norm == pytest.approx(float(moved.norm()), rel=1e-6)
    assert optimizer.radius > 0.05  # it grew, so that steps were found to be on the boundary


@dataclass(frozen=True, kw_only=True)
class Disappointed(TrustRegion):
    """Finds every step bad, and keeps it."""

    def update(self, state, ratio, **options):
        return super().update(state, -1.0, **options)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_bad_step_inside_shrinks_the_radius_from_its_length_in_that_norm(rate):
    objective, batch = small_network()
    optimizer, M = in_fixed_norm(
        objective, Disappointed(initial=1e6, reject_below=-inf), FixedLength(learning_rate=rate)
    )
    before = objective.parameter_vector()
    assert optimizer.step(batch).accepted
    length = length_in(M, objective.parameter_vector() - before)
    assert optimizer.radius == pytest.approx(0.25 * length, rel=1e-6)


def test_a_first_radius_relative_to_an_unknown_length_is_refused():
    objective, _ = small_network()
    with pytest.raises(ValueError, match="norm that is known along its own steps alone: give the first radius"):
        in_fixed_norm(objective, TrustRegion(initial=RelativeRadius()))
