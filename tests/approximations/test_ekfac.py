"""EKFAC: the diagonal of U^T C U by brute force, its error beside K-FAC's, and its running average."""

import pytest
import torch
from cases import LOSSES, mlp, networks
from eigenbasis_cases import blocks, dense_basis, estimates
from hypothesis import given, settings
from networks import GPT
from torch import nn

from curvlib import GGN, EmpiricalFisher, Fisher, Hessian, Objective, UnsupportedLayerError
from curvlib.approximations import (
    EKFAC,
    KFAC,
    Diagonal,
    EigenbasisAverage,
    Expand,
    LinearGaussian,
    MovingAverage,
    Reduce,
    WeightedSum,
    running_average,
)
from curvlib.operators import Diagonal as DiagonalOperator
from curvlib.operators import KroneckerEigen

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
EVERY_MATRIX = pytest.mark.parametrize("matrix", [GGN(), Fisher(samples=2), EmpiricalFisher()], ids=str)


class Branches(nn.Module):
    """One layer called twice, and one on several positions: T = 2 and T = 3."""

    def __init__(self):
        super().__init__()
        self.twice, self.sequence, self.out = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(5, 2)

    def forward(self, x):
        h = self.twice(torch.tanh(self.twice(x)))
        positions = torch.tanh(self.sequence(x.unsqueeze(1) * torch.arange(1, 4).to(x).view(1, 3, 1)))
        return self.out(torch.cat([h, positions.sum(1)], dim=1))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 2)

    def forward(self, tokens):
        return self.out(torch.tanh(self.table(tokens).sum(1)))


def frozen_weight():
    model = mlp([3, 4, 2])
    model[2].weight.requires_grad_(False)
    return model


MODELS = {
    "linear": (lambda: mlp([3, 4, 2]), lambda: torch.randn(6, 3)),
    "without bias": (lambda: mlp([3, 4, 2], bias=False), lambda: torch.randn(6, 3)),
    "one bias alone": (frozen_weight, lambda: torch.randn(6, 3)),
    "several positions": (Branches, lambda: torch.randn(6, 3)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)),
        lambda: torch.randn(5, 2, 3, 3),
    ),
    "groups": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(12, 2)),
        lambda: torch.randn(5, 4, 3),
    ),
    "embedding": (Words, lambda: torch.randint(5, (6, 4))),
}
every_model = pytest.mark.parametrize("name", MODELS)


def evaluation_of(name, l2=0.3):
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    x = inputs()
    x = x if x.dtype == torch.int64 else x.double()
    objective = Objective(make().double(), nn.CrossEntropyLoss(), l2=l2)
    return objective.at((x, torch.randint(2, (len(x),))))


@EVERY_MATRIX
@every_model
def test_scales_are_the_diagonal_of_the_exact_block_in_the_eigenbasis_of_kfacs_factors(name, matrix):
    evaluation = evaluation_of(name)
    ekfac, kfac, exact = map(blocks, estimates(matrix, evaluation))
    assert ekfac.keys() == exact.keys() == kfac.keys()
    for where, block in ekfac.items():
        C = exact[where].to_dense()
        if isinstance(block, DiagonalOperator):
            torch.testing.assert_close(block.diagonal(), C.diagonal(), **CLOSE)
            continue
        U = dense_basis(block)
        torch.testing.assert_close(U.T @ U, torch.eye(len(U)).double(), **CLOSE)
        torch.testing.assert_close(block.spectrum(), (U.T @ C @ U).diagonal(), **CLOSE)
        torch.testing.assert_close(block.to_dense(), U @ torch.diag((U.T @ C @ U).diagonal()) @ U.T, **CLOSE)
        inside = U.T @ kfac[where].to_dense() @ U
        torch.testing.assert_close(inside, torch.diag(inside.diagonal()), **CLOSE)


@EVERY_MATRIX
@every_model
def test_the_error_is_never_above_kfacs(name, matrix):
    ekfac, kfac, exact = (operator.to_dense() for operator in estimates(matrix, evaluation_of(name)))
    assert (ekfac - exact).norm() <= (kfac - exact).norm() * (1 + 1e-12) + 1e-12


@given(networks())
@settings(max_examples=30)
def test_the_error_is_never_above_kfacs_for_any_network(network):
    evaluation = Objective(network.model, network.loss, l2=network.l2).at((network.inputs, network.targets))
    for matrix in (GGN(), EmpiricalFisher()):
        ekfac, kfac, exact = (operator.to_dense() for operator in estimates(matrix, evaluation))
        assert (ekfac - exact).norm() <= (kfac - exact).norm() * (1 + 1e-9) + 1e-12


def test_the_error_is_below_kfacs_where_positions_depend_on_each_other():
    ekfac, kfac, exact = (operator.to_dense() for operator in estimates(GGN(), evaluation_of("several positions", 0.0)))
    assert (ekfac - exact).norm() < 0.95 * (kfac - exact).norm()


@given(networks(positions=False, max_examples=1))
@settings(max_examples=20)
def test_ekfac_is_exact_for_one_example_with_one_vector(network):
    """One rank-one block: its eigenvector is in the basis."""
    evaluation = Objective(network.model, network.loss, l2=network.l2).at((network.inputs, network.targets))
    ekfac, kfac, exact = (operator.to_dense() for operator in estimates(EmpiricalFisher(), evaluation))
    torch.testing.assert_close(ekfac, exact, **CLOSE)
    torch.testing.assert_close(kfac, exact, **CLOSE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ekfac_equals_kfac_for_deep_linear_networks_with_squared_error(reduction):
    torch.manual_seed(0)
    objective = Objective(mlp([3, 4, 2, 3], nn.Identity), nn.MSELoss(reduction=reduction))
    evaluation = objective.at((torch.randn(7, 3).double(), torch.randn(7, 3).double()))
    ekfac, kfac, exact = (operator.to_dense() for operator in estimates(GGN(), evaluation))
    torch.testing.assert_close(ekfac, kfac, **CLOSE)
    torch.testing.assert_close(ekfac, exact, **CLOSE)


def test_both_orders_of_the_products_give_the_same_scales():
    """Many positions of a small map turn the gradients, few of a large one the positions."""
    torch.manual_seed(1)
    for positions, width in ((40, 2), (2, 6)):
        model, x = nn.Linear(width, width).double(), torch.randn(3, positions, width).double()
        objective = Objective(model, nn.MSELoss())
        ekfac, _, exact = map(blocks, estimates(GGN(), objective.at((x, torch.zeros_like(x)))))
        for where, block in ekfac.items():
            U = dense_basis(block)
            torch.testing.assert_close(block.spectrum(), (U.T @ exact[where].to_dense() @ U).diagonal(), **CLOSE)


def test_chunks_of_examples_add_up(monkeypatch):
    evaluation = evaluation_of("several positions")
    whole = EKFAC(GGN()).estimate(evaluation).to_dense()
    monkeypatch.setattr("curvlib.extensions.uses._CHUNK_NUMBERS", 30)
    torch.testing.assert_close(EKFAC(GGN()).estimate(evaluation).to_dense(), whole, **CLOSE)


def test_tied_maps_are_a_sum_of_two_eigenbases():
    torch.manual_seed(0)
    model, tokens = GPT(layers=1).double(), torch.randint(5, (3, 4))
    evaluation = Objective(model, nn.CrossEntropyLoss()).at((tokens, torch.randint(5, (3, 4))))
    for matrix in (GGN(), EmpiricalFisher()):
        ekfac, kfac, _ = map(blocks, estimates(matrix, evaluation))
        tied = next(where for where, block in ekfac.items() if type(block).__name__ == "Sum")
        assert [type(term).__name__ for term in kfac[tied].terms] == ["Kronecker", "BlockDiagonal"]
        for ours, theirs in zip(ekfac[tied].terms, kfac[tied].terms, strict=True):
            torch.testing.assert_close(ours.trace(), theirs.trace(), rtol=0.7, atol=0)  # T = 4: of one scale
        looked_up = ekfac[tied].terms[0]
        assert looked_up.bases[1] is None
        assert torch.equal(looked_up.matvec(torch.zeros(looked_up.size).double()), torch.zeros(looked_up.size).double())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", LOSSES[:3], ids=lambda case: case.name)
def test_estimate_over_equals_one_large_batch(case, reduction):
    torch.manual_seed(3)
    model, x = mlp([3, 4, 3]), torch.randn(10, 3).double()
    y = case.targets(model(x).detach())
    objective = Objective(model, case.make(model(x).detach(), reduction), l2=0.2)
    expected = EKFAC(GGN()).estimate(objective.at((x, y))).to_dense()
    C = EKFAC(GGN()).estimate_over(objective, list(zip(x.split(4), y.split(4), strict=True)), progress=False)
    torch.testing.assert_close(C.to_dense(), expected, **CLOSE)


def test_fisher_draws_the_same_labels_for_the_basis_and_for_the_scales_also_over_a_loader():
    evaluation = evaluation_of("linear", l2=0.0)
    ekfac, _, exact = estimates(Fisher(), evaluation)
    torch.testing.assert_close(ekfac.trace(), exact.trace(), **CLOSE)
    x, y = torch.randn(9, 3).double(), torch.randint(2, (9,))
    objective, batches = evaluation.objective, list(zip(x.split(3), y.split(3), strict=True))
    seen = []
    sample = type(objective.loss).sample_gradient

    def noted(self, outputs, targets, generator=None):
        seen.append(sample(self, outputs, targets, generator))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(objective.loss), "sample_gradient", noted)
        for seed in (0, 1):
            EKFAC(Fisher()).estimate_over(objective, batches, torch.Generator().manual_seed(seed), progress=False)
    assert len(seen) == 12
    assert not torch.equal(seen[0], seen[6])
    assert all(torch.equal(first, second) for first, second in zip(seen[:3], seen[3:6], strict=True))
    assert not torch.equal(seen[0], seen[1])


def test_an_iterator_is_refused_for_two_sweeps():
    with pytest.raises(TypeError, match="iterated once only"):
        EKFAC(GGN()).estimate_over(evaluation_of("linear").objective, iter([]), progress=False)


def test_weight_sharing_changes_the_basis():
    evaluation = evaluation_of("several positions")
    expand, reduce = (EKFAC(GGN(), weight_sharing=w).estimate(evaluation).to_dense() for w in (Expand(), Reduce()))
    assert not torch.allclose(expand, reduce, rtol=1e-2)
    torch.testing.assert_close(expand.trace(), reduce.trace(), **CLOSE)  # of any orthogonal basis


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"matrix": Hessian()}, TypeError, r"EKFAC needs vectors .* Hessian\(\) has products only"),
        ({"matrix": "ggn"}, TypeError, "EKFAC needs a curvature matrix"),
        ({"matrix": GGN(), "weight_sharing": LinearGaussian()}, TypeError, "one eigenbasis, got LinearGaussian"),
        ({"matrix": GGN(), "basis_every": 0}, ValueError, "basis_every >= 1"),
        ({"matrix": GGN(), "on_unsupported": "skip"}, ValueError, "on_unsupported must be one of"),
    ],
)
def test_undefined_combinations_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        EKFAC(**arguments)


def test_what_does_not_average_or_mix_refuses_it_by_name():
    with pytest.raises(TypeError, match=r"got EKFAC.*EKFAC has an EigenbasisAverage"):
        MovingAverage(EKFAC(GGN()))
    with pytest.raises(TypeError, match="EigenbasisAverage needs EKFAC"):
        EigenbasisAverage(KFAC(GGN()))
    with pytest.raises(UnsupportedLayerError, match=r"EKFAC has no layer rule for .* Bilinear"):
        EKFAC(GGN()).check(Objective(nn.Sequential(nn.Bilinear(2, 2, 2)), nn.MSELoss()))


def test_parameters_outside_every_layer_get_the_fallback():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.rand(2)), nn.Linear(3, 2)

        def forward(self, x):
            return self.scale * self.layer(x)

    torch.manual_seed(0)
    objective = Objective(Scaled().double(), nn.MSELoss())
    evaluation = objective.at((torch.randn(5, 3).double(), torch.randn(5, 2).double()))
    for fallback in ("diagonal", "dense"):
        C = EKFAC(GGN(), on_unsupported=fallback).estimate(evaluation).to_dense()
        expected = KFAC(GGN(), on_unsupported=fallback).estimate(evaluation).to_dense()
        torch.testing.assert_close(C[:2], expected[:2], **CLOSE)
    average = EigenbasisAverage(EKFAC(GGN(), on_unsupported="dense"), 0.5)
    average.update(evaluation)
    average.update(evaluation)
    torch.testing.assert_close(average.operator(objective).to_dense(), C, **CLOSE)


def test_a_weighted_sum_is_estimated_anew_as_its_scales_do_not_average():
    both = 0.5 * EKFAC(GGN()) + 0.5 * Diagonal(GGN())
    assert type(both) is WeightedSum
    assert running_average(both, 0.9) is None
    evaluation = evaluation_of("linear")
    parts = [approximation(GGN()).estimate(evaluation).to_dense() for approximation in (EKFAC, Diagonal)]
    torch.testing.assert_close(both.estimate(evaluation).to_dense(), sum(parts) / 2, **CLOSE)


def test_a_fresh_basis_costs_no_more_draws_than_kfac():
    """Both sweeps of an estimate see the same vectors, so that the generator moves on as K-FAC's does."""
    evaluation = evaluation_of("linear")
    states = []
    for approximation in (EKFAC(Fisher(samples=3)), KFAC(Fisher(samples=3))):
        generator = torch.Generator().manual_seed(0)
        approximation.estimate(evaluation, generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_describe_names_bases_and_diagonals():
    rows = evaluation_of("groups").objective.describe(EKFAC(GGN())).rows
    assert rows[0].block == "eigenbasis: 2 times U_G 3 x 3, U_A 5 x 5, 15 scales"
    assert rows[2].block == "exact diagonal"
    (row, *_) = evaluation_of("embedding").objective.describe(EKFAC(GGN())).rows
    assert row.block == "eigenbasis: U_G 3 x 3, U_A identity, 15 scales"
    (block, _) = EKFAC(GGN()).estimate(evaluation_of("embedding", 0.0)).blocks
    assert isinstance(block, KroneckerEigen)
    assert block.bases[1] is None
