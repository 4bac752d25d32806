"""Autocast reaches the forward pass alone: statistics, products and solves keep their precision."""

import pytest
import torch
from cases import classifier
from operator_cases import CASES, draw
from torch import nn

from curvlib import (
    GGN,
    EmpiricalFisher,
    Objective,
)
from curvlib.approximations import KFAC, BlockDiagonal, Dense, Diagonal, Exact
from curvlib.operators.state import OperatorError
from curvlib.optimizers import (
    hessian_free,
    kfac,
)
from curvlib.solvers import (
    FactoredTikhonov,
    QuadraticModel,
    damped_inverse,
)

LAYERWISE = [KFAC(GGN()), BlockDiagonal(GGN()), Diagonal(EmpiricalFisher())]


def bfloat16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "approximation", [*LAYERWISE, Exact(GGN()), Dense(GGN())], ids=lambda value: type(value).__name__
)
def test_estimates_and_products_inside_autocast_have_full_precision(approximation):
    objective, batch = classifier()
    reference = approximation.estimate(objective.at(batch)).to_dense()
    with bfloat16():
        evaluation = objective.at(batch)
        C = approximation.estimate(evaluation)
        # (the products of Exact go through the low-precision graph: too rough for a tight solve, which says so)
        solvers = [] if isinstance(approximation, Exact) else [damped_inverse, FactoredTikhonov()]
        steps = [solver(C, 1.0) @ evaluation.gradient() for solver in solvers]
        product = C @ evaluation.gradient()
    assert {x.dtype for x in (C, product, *steps)} == {torch.float32}
    # the forward pass alone keeps 8 bits
    assert (C.to_dense() - reference).norm() < 0.05 * reference.norm()
    torch.testing.assert_close(product, C @ evaluation.gradient())


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_numbers_of_an_operator_inside_autocast_have_full_precision(make):
    C, _ = make(draw(0, dtype=torch.float32))
    for name in ("diagonal", "trace", "to_dense", "frobenius_norm", "spectrum", "logdet"):
        try:
            expected = getattr(C, name)()
        except (ArithmeticError, OperatorError):
            continue  # not given by the structure
        with bfloat16():
            inside = getattr(C, name)()
        assert inside.dtype == torch.float32
        assert torch.equal(inside, expected), name


@pytest.mark.parametrize("preset", [kfac, hessian_free])
def test_presets_train_inside_one_autocast_block(preset):
    objective, batch = classifier()
    optimizer = preset(objective)
    with bfloat16():
        losses = [optimizer.step(batch).loss for _ in range(12)]
        # PyTorch caches low-precision copies of the parameters for a whole block
        inside = objective.value(batch)
    with bfloat16():
        assert torch.equal(inside, objective.value(batch))
    assert len(set(losses)) == 12
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "approximation", [KFAC(GGN()), Diagonal(GGN()), Exact(GGN())], ids=lambda value: type(value).__name__
)
def test_quadratic_forms_and_models_ignore_autocast(approximation):
    objective, batch = classifier()
    evaluation = objective.at(batch)
    C, V = approximation.estimate(evaluation), torch.randn(75, 2)
    model = QuadraticModel(value=evaluation.value, gradient=evaluation.gradient(), curvature=C, damping=0.1)
    outside = C.quadratic_form(V), model.minimise_over(V).step, model.change(V[:, 0])
    with bfloat16():
        inside = C.quadratic_form(V), model.minimise_over(V).step, model.change(V[:, 0])
    for a, b in zip(outside, inside, strict=True):
        assert torch.equal(a, b)


class FullPrecision(nn.Module):
    def forward(self, x):
        return x.float()


@pytest.mark.parametrize("seed", range(5))
def test_a_low_precision_body_with_float32_outputs_is_no_broken_backward_pass(seed):
    torch.manual_seed(seed)
    body = [layer for _ in range(5) for layer in (nn.Linear(64, 64), nn.Tanh())]
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), *body, nn.Linear(64, 10), FullPrecision())
    with bfloat16():
        evaluation = Objective(model, nn.CrossEntropyLoss()).at((torch.randn(64, 20), torch.randint(10, (64,))))
        C = Exact(GGN()).estimate(evaluation)
        assert (C @ evaluation.gradient()).isfinite().all()
