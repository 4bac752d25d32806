"""The check that an operator gives the same product twice."""

import pytest
import torch
from operator_cases import CASES, draw
from torch import nn

from curvlib import GGN, Hessian, Objective
from curvlib.approximations import Exact
from curvlib.operators import Diagonal, MatrixFree
from curvlib.solvers import CG, DeterminismCheck, StochasticOperatorError, check_deterministic, damped_inverse


def noisy(relative, dtype, device):
    """The identity with relative errors of this size, other ones at each product."""
    return MatrixFree(lambda V: V * (1 + relative * torch.randn_like(V)), 50, dtype, device)


def model_with_dropout(device):
    model = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Dropout(0.5), nn.Linear(30, 2)).to(device).double()
    batch = torch.randn(8, 4).double().to(device), torch.randn(8, 2).double().to(device)
    return Objective(model, nn.MSELoss()), batch


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_structure_passes(case, device):
    check_deterministic(case(draw(0, device, definite=False))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_told_from_rounding(dtype, device):
    eps = torch.finfo(dtype).eps
    check_deterministic(noisy(10 * eps, dtype, device))
    with pytest.raises(StochasticOperatorError, match=r"dropout.*batch normalisation"):
        check_deterministic(noisy(30 * eps**0.5, dtype, device))


@pytest.mark.parametrize("matrix", [GGN(), Hessian()], ids=str)
def test_operators_of_one_evaluation_keep_their_dropout(matrix, device):
    objective, batch = model_with_dropout(device)
    check_deterministic(Exact(matrix).estimate(objective.at(batch)))


def test_products_that_draw_dropout_anew_are_refused_before_any_solve(device):
    objective, batch = model_with_dropout(device)

    def product(V):
        return Exact(GGN()).estimate(objective.at(batch)) @ V

    C = MatrixFree(product, objective.layout.size, torch.float64, device)
    with pytest.raises(StochasticOperatorError, match="stochastic"):
        DeterminismCheck(solver=CG())(C, 1.0)
    objective.model.eval()
    assert DeterminismCheck(solver=CG())(C, 1.0).solve(torch.ones_like(objective.parameter_vector())).solved


def test_the_caller_s_random_numbers_stay_as_they_are():
    before = torch.get_rng_state()
    check_deterministic(Diagonal(torch.ones(3)))
    assert torch.equal(before, torch.get_rng_state())


def test_the_vector_can_come_from_a_generator():
    seen = []
    C = MatrixFree(lambda V: seen.append(V) or V, 20, torch.float32, torch.device("cpu"))
    for seed in (1, 2):
        check_deterministic(C, torch.Generator().manual_seed(seed))
    assert not torch.equal(seen[0], seen[-1])


def test_values_that_are_not_finite():
    check_deterministic(Diagonal(torch.tensor([float("nan"), 1.0])))  # alike: for the status of the solver
    values = iter([torch.ones(2, 1), torch.full((2, 1), float("inf"))])
    with pytest.raises(StochasticOperatorError):
        check_deterministic(MatrixFree(lambda V: next(values), 2, torch.float32, torch.device("cpu")))


def test_the_check_hands_on_to_its_solver():
    C = Diagonal(torch.tensor([1.0, 3.0]))
    assert torch.equal(DeterminismCheck()(C, 1.0).to_dense(), damped_inverse(C, 1.0).to_dense())
    with pytest.raises(TypeError, match="solver"):
        DeterminismCheck(solver="cg")
    with pytest.raises(TypeError, match="LinearOperator"):
        check_deterministic(torch.eye(2))
