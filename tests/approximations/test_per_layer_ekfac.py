"""EKFAC for some layers and other approximations for the rest: every block is that of its approximation alone."""

import pytest
import torch
from cases import mlp
from oracles import Network
from torch import nn

from curvlib import GGN, EmpiricalFisher, Fisher, Hessian, Objective, UnsupportedLayerError
from curvlib.approximations import (
    EKFAC,
    KFAC,
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenbasisAverage,
    MovingAverage,
    PerLayer,
    RootMeanSquareDiagonal,
    StatisticalWeightedSum,
    running_average,
)
from curvlib.optimizers import kfac
from curvlib.solvers import damped_inverse

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def problem(model=None, l2=0.1):
    torch.manual_seed(0)
    model = model if model is not None else mlp([3, 4, 3])
    return Objective(model, nn.CrossEntropyLoss(), l2=l2), (torch.randn(9, 3).double(), torch.randint(3, (9,)))


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def first_and_last(C):
    """The blocks of the two layers of the network, and that nothing else is there."""
    C = C.to_dense()
    assert not C[:16, 16:].any()
    return C[:16, :16], C[16:, 16:]


@pytest.mark.parametrize("other", [KFAC, Diagonal, BlockDiagonal], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("matrix", [GGN(), EmpiricalFisher(), Fisher(samples=2)], ids=str)
def test_each_block_is_that_of_its_approximation_alone_with_the_same_draws(matrix, other):
    objective, batch = problem()
    evaluation = objective.at(batch)
    mixed = PerLayer([("0", EKFAC(matrix))], otherwise=other(matrix)).estimate(evaluation, seeded())
    first, last = first_and_last(mixed)
    torch.testing.assert_close(first, first_and_last(EKFAC(matrix).estimate(evaluation, seeded()))[0], **CLOSE)
    torch.testing.assert_close(last, first_and_last(other(matrix).estimate(evaluation, seeded()))[1], **CLOSE)
    loader = [(x, y) for x, y in zip(*(part.split(4) for part in batch), strict=True)]
    mixed = PerLayer([("2", other(matrix))], otherwise=EKFAC(matrix))
    over = mixed.estimate_over(objective, loader, seeded(), progress=False)
    if not matrix.draws:
        torch.testing.assert_close(over.to_dense(), mixed.estimate(evaluation).to_dense(), rtol=1e-7, atol=1e-9)
        return
    alone = EKFAC(matrix).estimate_over(objective, loader, seeded(), progress=False)
    torch.testing.assert_close(first_and_last(over)[0], first_and_last(alone)[0], **CLOSE)


def test_matrices_may_differ_and_draw_for_themselves():
    """Over a loader both sweeps of EKFAC see one draw, though another matrix draws in the second alone."""
    objective, batch = problem()
    loader = [batch, batch]
    mixed = PerLayer([("0", KFAC(Fisher(samples=3)))], otherwise=EKFAC(Fisher()))
    last = first_and_last(mixed.estimate_over(objective, loader, seeded(), progress=False))[1]
    # the scales have the trace of the block in any basis: sum_n |g_n|^2 |a_n|^2, here of the draws of K-FAC's factors
    seeds = seeded()
    torch.randint(2**62, (), generator=seeds)
    draws = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=seeds)))
    expected = BlockDiagonal(Fisher()).estimate_over(objective, loader, draws, progress=False)
    trace = first_and_last(expected)[1].trace()
    torch.testing.assert_close(last.trace(), trace, **CLOSE)
    hessian = PerLayer([("2", BlockDiagonal(Hessian()))], otherwise=EKFAC(GGN()))
    first, last = first_and_last(hessian.estimate(objective.at(batch)))
    H = Dense(Hessian()).estimate(objective.at(batch)).to_dense()
    torch.testing.assert_close(last, H[16:, 16:], **CLOSE)
    torch.testing.assert_close(first, first_and_last(EKFAC(GGN()).estimate(objective.at(batch)))[0], **CLOSE)
    assert hessian.may_be_indefinite


def test_running_averages_are_those_of_the_parts():
    objective, (x, y) = problem()
    matrix, options = EmpiricalFisher(), {"basis_every": 2}
    mixed = PerLayer([("0", EKFAC(matrix, **options))], otherwise=KFAC(matrix))
    average = running_average(mixed, 0.6)
    assert isinstance(average, EigenbasisAverage)
    parts = [EigenbasisAverage(EKFAC(matrix, **options), 0.6), MovingAverage(KFAC(matrix), 0.6)]
    for k in range(5):
        evaluation = objective.at((x[k : k + 4], y[k : k + 4]))
        for each in (average, *parts):
            assert each.update(evaluation)
    first, last = first_and_last(average.operator(objective))
    torch.testing.assert_close(first, first_and_last(parts[0].operator(objective))[0], **CLOSE)
    torch.testing.assert_close(last, first_and_last(parts[1].operator(objective))[1], **CLOSE)
    resumed = running_average(mixed, 0.6)
    resumed.load_state_dict(average.state_dict())
    for each in (average, resumed):
        each.update(objective.at((x[:3], y[:3])))
    assert torch.equal(average.operator(objective).to_dense(), resumed.operator(objective).to_dense())


def test_an_optimizer_trains_with_it():
    objective, batch = problem(l2=0.0)
    curvature = PerLayer([("0", EKFAC(Fisher(), basis_every=3))], otherwise=Diagonal(Fisher()))
    optimizer = kfac(objective, curvature=curvature, solver=damped_inverse)
    losses = [optimizer.step(batch).loss for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]


def outside():
    return nn.Sequential(nn.Linear(3, 3), nn.PReLU(3), nn.Linear(3, 3)).double()


@pytest.mark.parametrize("fallback", ["diagonal", "dense", "exclude"])
def test_parameters_outside_every_layer(fallback):
    objective, batch = problem(outside(), l2=0.0)
    evaluation = objective.at(batch)
    ggn = Network(objective.model, nn.CrossEntropyLoss(), *batch, 0.0).ggn()
    place = evaluation.layout.slices["1.weight"]
    own = ggn[place, place]
    expected = {"dense": own, "diagonal": own.diagonal().diag(), "exclude": 0.0 * own}[fallback]
    for choices, otherwise in (
        ([("0", EKFAC(GGN()))], Diagonal(GGN(), on_unsupported=fallback)),
        ([("0", Diagonal(GGN()))], EKFAC(GGN(), on_unsupported=fallback)),
    ):
        mixed = PerLayer(choices, otherwise=otherwise)
        C = mixed.estimate(evaluation).to_dense()
        torch.testing.assert_close(C[place, place], expected, **CLOSE)
        average = running_average(mixed, 0.5)
        assert all(average.update(evaluation) for _ in range(3))
        torch.testing.assert_close(average.operator(objective).to_dense(), C, rtol=1e-7, atol=1e-9)
    with pytest.raises(UnsupportedLayerError, match=r"1\.weight"):
        PerLayer([("0", Diagonal(GGN()))], otherwise=EKFAC(GGN())).estimate(evaluation)


def test_descriptions_and_refusals():
    objective, batch = problem()
    mixed = PerLayer([("0", EKFAC(GGN()))], otherwise=Diagonal(GGN()))
    blocks = [row.block for row in objective.describe(mixed).rows]
    assert blocks == ["eigenbasis: U_G 4 x 4, U_A 4 x 4, 16 scales"] * 2 + ["diagonal"] * 2
    with pytest.raises(ValueError, match=r"the same basis_every, got \[5, 20\]"):
        PerLayer([("0", EKFAC(GGN()))], otherwise=EKFAC(GGN(), basis_every=5))
    with pytest.raises(TypeError, match="EigenbasisAverage"):
        MovingAverage(mixed)
    with pytest.raises(TypeError, match="see EigenbasisAverage"):
        mixed.statistics(objective.at(batch))
    with pytest.raises(TypeError, match="approximation with statistics"):
        RootMeanSquareDiagonal(mixed)
    with pytest.raises(TypeError, match="see MovingAverage"):
        EigenbasisAverage(PerLayer([], otherwise=KFAC(GGN())))
    with pytest.raises(TypeError, match="iterated once only"):
        mixed.estimate_over(objective, iter([batch]), progress=False)
    assert not isinstance(mixed + Diagonal(GGN()), StatisticalWeightedSum)
    total = (mixed + Diagonal(GGN())).estimate(objective.at(batch)).to_dense()
    apart = [part.estimate(objective.at(batch)).to_dense() for part in (mixed, Diagonal(GGN()))]
    torch.testing.assert_close(total, sum(apart) - 0.1 * torch.eye(31).double(), **CLOSE)
