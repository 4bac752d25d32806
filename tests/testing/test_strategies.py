"""The strategies draw what they say, and the package says what it needs."""

import subprocess
import sys

import pytest
import torch
from hypothesis import find, given, settings
from torch import nn

import curvlib.testing
from curvlib import GGN
from curvlib.approximations import Diagonal
from curvlib.operators import Dense
from curvlib.solvers import CG, damped_inverse
from curvlib.testing import (
    NOWHERE,
    check_approximation,
    check_layer,
    check_loss,
    check_operator,
    check_solver,
    draw,
    draws,
    kronecker_factors,
    lag_moments,
    networks,
    semidefinite_matrices,
)


def condition(M):
    e = torch.linalg.eigvalsh(M)
    return float(e.max() / e[e > 1e-9 * e.max()].min())


@given(semidefinite_matrices(largest_condition=1e4))
@settings(max_examples=30)
def test_matrices_are_semidefinite_with_the_condition_number(M):
    e = torch.linalg.eigvalsh(M)
    assert torch.equal(M, M.T)
    assert e.min() > -1e-14
    torch.testing.assert_close(e.max(), torch.ones_like(e.max()))
    assert condition(M) < 1.001e4


@pytest.mark.parametrize(
    "wanted",
    [
        lambda M: len(M) > 3 and torch.linalg.matrix_rank(M) == 2,
        lambda M: condition(M) > 0.9e6,
        lambda M: len(M) == torch.linalg.matrix_rank(M) == 6,
    ],
    ids=["low rank", "badly conditioned", "full rank"],
)
def test_every_kind_of_matrix_is_drawn(wanted):
    find(semidefinite_matrices(), wanted, settings=settings(max_examples=500))


@given(semidefinite_matrices(full_rank=True, largest_condition=10.0), kronecker_factors(3))
@settings(max_examples=10)
def test_full_rank_and_factors(M, factors):
    assert condition(M) < 11
    assert torch.linalg.matrix_rank(M) == len(M)
    assert len(factors) == 3


@given(lag_moments(longest=4))
@settings(max_examples=20)
def test_moments_of_a_chain_make_a_positive_semidefinite_matrix_of_all_lags(moments):
    rows = [[moments[s - t] if s >= t else moments[t - s].T for t in range(5)] for s in range(5)]
    joint = torch.cat([torch.cat(row, dim=1) for row in rows])
    assert torch.linalg.eigvalsh(joint).min() > -1e-10 * joint.abs().max()


def test_a_draw_is_repeated_by_its_seed():
    first, second = (draw(3, dtype=torch.float32) for _ in range(2))
    assert torch.equal(first.symmetric(3), second.symmetric(3))
    assert first.normal(2).dtype == torch.float32


@given(draws(definite=None))
@settings(max_examples=20)
def test_draws_are_definite_where_they_say_so(d):
    lowest = float(torch.linalg.eigvalsh(d.symmetric(4)).min())
    assert lowest > 0 or not d.definite


@given(networks())
@settings(max_examples=20)
def test_networks_have_the_other_reduction_of_the_same_loss(network):
    z = network.outputs(network.theta).detach()
    changed = network.copy(reduction_changed=True)
    mean, total = sorted((network, changed), key=lambda n: n.loss.reduction)
    ratio = total.loss_of_outputs(z) / mean.loss_of_outputs(z)
    weight = mean.objective().loss.batch_weight(z, network.targets)
    torch.testing.assert_close(ratio, weight)


def test_hypothesis_is_asked_for_by_name():
    code = "import sys; sys.modules['hypothesis'] = None; import curvlib.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "curvlib[testing]"' in done.stderr


def test_everything_that_is_exported_is_described():
    for name in curvlib.testing.__all__:
        assert hasattr(curvlib.testing, name)
        member = getattr(curvlib.testing, name)
        assert not callable(member) or member.__doc__, name


@pytest.mark.parametrize(
    ("check", "given", "words"),
    [
        (check_operator, torch.eye(3), "needs an operator .* got tensor"),
        (check_operator, Dense, "the class Dense: give an instance"),
        (check_approximation, Diagonal, "needs an approximation, .* the class Diagonal: give an instance"),
        (check_layer, nn.Linear, "needs a module, .* the class Linear: give an instance"),
        (check_loss, nn.MSELoss(), r"needs a LossCase, .* got MSELoss\(\)"),
        (check_solver, CG, "the class CG: give an instance"),
        (check_solver, 0.1, r"needs a function of \(operator, damping\), .* got 0.1"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_what_a_suite_is_not_for_is_refused_by_name(check, given, words):
    with pytest.raises(TypeError, match=f"{check.__name__} .*{words}"):
        check(given)


def test_random_numbers_are_as_before():
    layer, state = nn.Linear(2, 1), torch.get_rng_state()
    check_operator(draws().map(lambda d: Dense(d.symmetric(2))), examples=2)
    check_layer(layer, torch.ones(3, 2))
    check_solver(damped_inverse, examples=1)
    check_approximation(Diagonal(GGN()), exact_on=NOWHERE, examples=1)
    assert torch.equal(torch.get_rng_state(), state)
