"""EigenbasisAverage: which basis, averaged scales, finite statistics, states, and the optimizer that uses it."""

import io
from itertools import pairwise

import pytest
import torch
from cases import mlp
from eigenbasis_cases import blocks, dense_basis
from torch import nn

import curvlib
from curvlib import GGN, EmpiricalFisher, Fisher, Objective
from curvlib.approximations import EKFAC, KFAC, BlockDiagonal, EigenbasisAverage, MovingAverage
from curvlib.approximations.eigenbasis import eigenbases, moved_scales
from curvlib.approximations.statistics import Statistics
from curvlib.operators import KroneckerEigenStack

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def batches_of(objective, count, seed=4):
    torch.manual_seed(seed)
    return [objective.at((torch.randn(8, 3).double(), torch.randint(2, (8,)))) for _ in range(count)]


def test_scales_average_exactly_as_long_as_the_basis_stays():
    objective = Objective(mlp([3, 4, 2]), nn.CrossEntropyLoss())
    evaluations = batches_of(objective, 8)
    average = EigenbasisAverage(EKFAC(EmpiricalFisher(), basis_every=100), decay=0.0)
    for evaluation in evaluations:
        average.update(evaluation)
    found = blocks(average.operator(objective))
    exact = blocks(BlockDiagonal(EmpiricalFisher()).estimate(evaluations[-1]))
    for where, block in found.items():
        U = dense_basis(block)  # that of an earlier update, and the scales of the last batch in it
        torch.testing.assert_close(block.spectrum(), (U.T @ exact[where].to_dense() @ U).diagonal(), **CLOSE)
    factors = KFAC(EmpiricalFisher()).statistics(evaluations[2])
    of_third = eigenbases(objective.plan.layers, factors)
    for name, layer in zip(of_third, objective.plan.layers, strict=True):
        # the basis stands since the fourth update, made of the factors before it: with decay 0 the third one's
        U_G = found[tuple(layer.coordinates.tolist())].bases[0]
        torch.testing.assert_close(U_G, of_third[name][0][0], **CLOSE)


def test_a_new_basis_takes_the_scales_along_as_the_nearest_diagonal():
    torch.manual_seed(0)
    s = torch.rand(2, 3, 4).double()
    old, new = (tuple(torch.linalg.qr(torch.randn(2, n, n).double()).Q for n in (3, 4)) for _ in range(2))
    moved = moved_scales(Statistics(sums={"x|scales": s}), {"x": old}, {"x": new}).sums["x|scales"]
    C = KroneckerEigenStack(old, s).to_dense()
    U = dense_basis(KroneckerEigenStack(new, s))
    torch.testing.assert_close(moved.flatten(), (U.T @ C @ U).diagonal(), **CLOSE)
    torch.testing.assert_close(moved.sum(), s.sum(), **CLOSE)
    identity = tuple((old[0], None) for _ in range(2))
    same = moved_scales(Statistics(sums={"x|scales": s}), {"x": identity[0]}, {"x": identity[1]}).sums["x|scales"]
    torch.testing.assert_close(same, s, **CLOSE)


def test_averaged_scales_go_along_into_a_new_basis():
    objective = Objective(mlp([3, 4, 2]), nn.CrossEntropyLoss())
    *evaluations, last = batches_of(objective, 3)
    average = EigenbasisAverage(EKFAC(EmpiricalFisher()), decay=0.6)
    for evaluation in evaluations:
        average.update(evaluation)
    before = blocks(average.operator(objective))
    average.update(last)
    exact = blocks(BlockDiagonal(EmpiricalFisher()).estimate(last))
    for where, block in blocks(average.operator(objective)).items():
        U = dense_basis(block)
        assert not torch.allclose(U, dense_basis(before[where]))
        C = 0.6 * before[where].to_dense() + 0.4 * exact[where].to_dense()
        torch.testing.assert_close(block.spectrum(), (U.T @ C @ U).diagonal(), **CLOSE)


@pytest.mark.parametrize("basis_every", [1, 3, 100])
def test_the_basis_is_made_anew_every_so_many_updates(basis_every):
    objective = Objective(mlp([3, 4, 2]), nn.CrossEntropyLoss())
    average, bases = EigenbasisAverage(EKFAC(EmpiricalFisher(), basis_every=basis_every), 0.9), []
    for evaluation in batches_of(objective, 8):
        average.update(evaluation)
        bases.append(next(iter(average._bases.values()))[0].clone())
    changed = [not torch.equal(one, other) for one, other in pairwise(bases)]
    # before the updates 3 and 4, and before those with a multiple of basis_every behind them, but the second
    assert changed == [number > 1 and (number <= 3 or number % basis_every == 0) for number in range(1, 8)]


def test_the_average_stays_near_the_best_diagonal_in_its_basis():
    """Scales that have been taken along twice differ from those that were always in the last basis, but little."""
    objective = Objective(mlp([3, 4, 2]), nn.CrossEntropyLoss())
    evaluations = batches_of(objective, 30)
    average = EigenbasisAverage(EKFAC(GGN(), basis_every=10), decay=0.9)
    for evaluation in evaluations:
        average.update(evaluation)
    average_of_blocks = MovingAverage(BlockDiagonal(GGN()), 0.9)
    for evaluation in evaluations:
        average_of_blocks.update(evaluation)
    exact, found = blocks(average_of_blocks.operator(objective)), blocks(average.operator(objective))
    for where, block in found.items():
        U, C = dense_basis(block), exact[where].to_dense()
        best = U @ torch.diag((U.T @ C @ U).diagonal()) @ U.T
        torch.testing.assert_close(block.trace(), C.trace(), **CLOSE)
        error, least = (block.to_dense() - C).norm(), (best - C).norm()
        assert least < error < 1.1 * least


def test_batches_that_are_not_finite_never_enter_the_average():
    objective = Objective(mlp([3, 4, 2]), nn.CrossEntropyLoss())
    average = EigenbasisAverage(EKFAC(GGN()))
    bad = objective.at((torch.full((4, 3), float("nan")).double(), torch.randint(2, (4,))))
    with pytest.raises(RuntimeError, match=r"EigenbasisAverage has no statistics yet"):
        average.operator(objective)
    assert not average.update(bad)
    good, other = batches_of(objective, 2)
    assert average.update(good)
    before = average.operator(objective).to_dense()
    assert not average.update(bad)
    assert (average.updates, average.skipped) == (1, 2)
    assert torch.equal(average.operator(objective).to_dense(), before)
    assert average.update(other)


def test_the_state_continues_bit_for_bit_and_is_refused_by_another():
    objective = Objective(mlp([3, 4, 2]), nn.CrossEntropyLoss())
    evaluations = batches_of(objective, 7)
    first, second = (EigenbasisAverage(EKFAC(Fisher(), basis_every=2), 0.8) for _ in range(2))
    for number, evaluation in enumerate(evaluations[:4]):
        first.update(evaluation, torch.Generator().manual_seed(number))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for number, evaluation in enumerate(evaluations[4:]):
        for average in (first, second):
            average.update(evaluation, torch.Generator().manual_seed(number))
    assert torch.equal(first.operator(objective).to_dense(), second.operator(objective).to_dense())
    with pytest.raises(ValueError, match="the state is that of a EigenbasisAverage of EKFAC"):
        EigenbasisAverage(EKFAC(GGN())).load_state_dict(first.state_dict())


def classifier_training(curvature, steps, optimizer_state=None):
    torch.manual_seed(2)
    model = mlp([4, 6, 3])
    batch = torch.randn(40, 4).double(), torch.randint(3, (40,))
    optimizer = curvlib.optimizers.kfac(
        Objective(model, nn.CrossEntropyLoss(), l2=1e-3),
        curvature=curvature,
        statistics_fraction=1.0,
        model_fraction=1.0,
    )
    return optimizer, [optimizer.step(batch).loss for _ in range(steps)], batch


def test_the_preset_trains_with_it_and_renews_the_inverse_at_each_step():
    optimizer, losses, batch = classifier_training(EKFAC(Fisher(), basis_every=5), 25)
    assert losses[-1] < 0.6 * losses[0]
    state = optimizer._direction._state
    assert isinstance(state._average, EigenbasisAverage)
    before = state._operator
    optimizer.step(batch)
    assert state._operator is not before


def test_a_resumed_training_goes_on_bit_for_bit():
    optimizer, _, batch = classifier_training(EKFAC(Fisher(), basis_every=3), 5)
    resumed, _, _ = classifier_training(EKFAC(Fisher(), basis_every=3), 0)
    resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for mine, its in zip(resumed.objective.parameters, optimizer.objective.parameters, strict=True):
            mine.copy_(its)
    for _ in range(4):
        assert optimizer.step(batch).loss == resumed.step(batch).loss
