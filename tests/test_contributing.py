"""The pieces that CONTRIBUTING shows are right, each against brute force, and its commands and its table hold."""

import re

import pytest
import torch
from oracles import Network
from test_architecture import ALLOWED
from test_readme import ROOT, check_command, commands, run_python
from torch.distributions import Exponential

import curvlib
from curvlib import GGN, Fisher
from curvlib.approximations import BlockDiagonal, Dense, MovingAverage
from curvlib.operators import BlockDiagonal as BlockDiagonalOperator
from curvlib.operators import Diagonal as DiagonalOperator
from curvlib.solvers import damped_inverse
from curvlib.testing import IdentityError, check_solver

CONTRIBUTING = ROOT / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def guide():
    # The guide registers rules for classes of its own: nothing that other tests use.
    torch.manual_seed(0)
    return run_python(CONTRIBUTING)


@pytest.fixture
def oracle(guide):
    network = Network(guide["model"], guide["objective"].loss.value, *guide["batch"])
    # the guide's optimizer has taken a step since its evaluation was made
    return network, guide["objective"].at(guide["batch"])


@pytest.mark.parametrize("words", list(commands(CONTRIBUTING)), ids=" ".join)
def test_commands_exist(words):
    check_command(words)


def test_the_table_of_imports_is_the_one_that_is_enforced():
    text = CONTRIBUTING.read_text()
    rows = dict(re.findall(r"^\| (`.*?) \| (.*?) \|$", text, re.MULTILINE))
    for parts, imports in rows.items():
        for part in re.findall(r"`(\w+)`", parts):
            if part in {"optimizers", "experiments", "testing"}:
                continue
            assert set(re.findall(r"`(\w+)`", imports)) == ALLOWED[part], part
        if "`optimizers`" in parts:
            above = {"operators", "output_losses", "objective", "matrices", "approximations", "solvers", "spectra"}
            assert above == ALLOWED["optimizers"], "all of the above but two"
    named = {part for parts in rows for part in re.findall(r"`(\w+)`", parts)}
    assert named >= ALLOWED.keys(), "every part has its row in the table"


def test_the_layer(oracle):
    network, evaluation = oracle
    exact = network.ggn()
    assert len(evaluation.layers) == 2
    blocks = torch.zeros_like(exact)
    for layer in evaluation.layers:
        rows = layer.coordinates
        blocks[rows[:, None], rows] = exact[rows[:, None], rows]
    torch.testing.assert_close(BlockDiagonal(GGN()).estimate(evaluation).to_dense(), blocks)


def test_the_loss(oracle):
    network, evaluation = oracle
    z, y = network.outputs(network.theta), network.targets
    expected = -Exponential((-z).exp()).log_prob(y).sum() / len(y)
    torch.testing.assert_close(evaluation.value, expected.detach())
    torch.testing.assert_close(Dense(GGN()).estimate(evaluation).to_dense(), network.ggn())
    # the Fisher of an exponential distribution in its log-mean is 1, whatever the mean
    J = network.jacobian()
    fisher = Dense(Fisher(samples=20_000)).estimate(evaluation, torch.Generator().manual_seed(0)).to_dense()
    torch.testing.assert_close(fisher, J.T @ J / len(y), rtol=0.0, atol=0.05 * float((J.T @ J / len(y)).abs().max()))


def test_the_approximation(guide, oracle):
    network, evaluation = oracle
    diagonal = network.ggn().diagonal()
    approximation = guide["MeanCurvature"](GGN())
    C = approximation.estimate(evaluation)
    for layer in evaluation.layers:
        mean = diagonal[layer.coordinates].mean()
        torch.testing.assert_close(C.diagonal()[layer.coordinates], mean.expand(len(layer.coordinates)))
    inputs, targets = guide["batch"]
    halves = [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])]
    over_batches = approximation.estimate_over(guide["objective"], halves, progress=False)
    torch.testing.assert_close(over_batches.diagonal(), C.diagonal())
    average = MovingAverage(approximation)
    assert average.update(evaluation)
    torch.testing.assert_close(average.operator(guide["objective"]).diagonal(), C.diagonal())
    assert "a multiple of the identity" in str(guide["objective"].describe(approximation))


def test_the_solver(guide, oracle):
    _, evaluation = oracle
    C, g = BlockDiagonal(GGN()).estimate(evaluation), evaluation.gradient()
    exact = torch.linalg.solve(C.to_dense() + 0.1 * torch.eye(C.size, dtype=C.dtype), g)
    errors = [float((guide["Richardson"](iterations=n)(C, 0.1) @ g - exact).norm()) for n in (1, 10, 100, 1000)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 * float(exact.norm())
    assert guide["first"].accepted
    assert curvlib.Objective(guide["model"], guide["objective"].loss).value(guide["batch"]) < guide["first"].loss


def test_the_sketch_of_a_solver_fails_its_suite_at_small_dampings_until_it_has_enough_steps(guide):
    with pytest.raises(IdentityError, match=r"X @ b = \(C \+ lambda I\)\^-1 b"):
        check_solver(guide["Richardson"](iterations=3000))
    C, b = DiagonalOperator(torch.tensor([1.0, 0.0], dtype=torch.float64)), torch.ones(2, dtype=torch.float64)
    for n, least, most in ((3000, 1e-2, 1.0), (20_000, 0.0, 1e-8)):
        x = guide["Richardson"](iterations=n)(C, 1e-3) @ b
        assert least <= abs(float(x[1]) * 1e-3 - 1) < most


def test_the_operator(guide):
    outer, direct, iterative = guide["Outer"], guide["directly"], guide["by_conjugate_gradients"]
    u = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
    expected = torch.linalg.inv(torch.outer(u, u) + 0.1 * torch.eye(5, dtype=u.dtype))
    torch.testing.assert_close(damped_inverse(outer(u), 0.1).to_dense(), expected)
    assert type(direct).__name__ == "LowRank"
    assert type(iterative).__name__ == "CGInverse"
    torch.testing.assert_close(direct.to_dense(), iterative.to_dense(), rtol=1e-7, atol=1e-7)
    blocks = BlockDiagonalOperator((outer(u),), (torch.arange(5),), 5)
    torch.testing.assert_close(damped_inverse(blocks, 0.1).to_dense(), expected)
