"""K-FAC of recurrent layers: its statistics are those of the definition, padding does not count, and the errors' order.

That (a, g) are right for every cell and option is tested in ``extensions/test_layer_rules``; the algebra of the chains
in ``operators/test_kronecker_chain``.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import Network
from recurrent_models import Labelled, blocks, data
from torch import nn

from curvlib import GGN, EmpiricalFisher, Objective
from curvlib.approximations import (
    KFAC,
    Diagonal,
    Expand,
    GeneralTransition,
    Independent,
    LinearGaussian,
    MovingAverage,
    Reduce,
    SymmetricTransition,
)
from curvlib.operators import GeneralKroneckerChain, Kronecker, SymmetricKroneckerChain
from curvlib.solvers import FactoredTikhonov, damped_inverse

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
CHAINS = (LinearGaussian(SymmetricTransition()), LinearGaussian(GeneralTransition()))
STRATEGIES = (Independent(), *CHAINS, Reduce())
every_strategy = pytest.mark.parametrize("sharing", STRATEGIES, ids=str)
every_kind = pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU], ids=lambda kind: kind.__name__)
drawn = settings(max_examples=15, suppress_health_check=list(HealthCheck))


@every_kind
@pytest.mark.parametrize("sharing", CHAINS, ids=str)
def test_statistics_are_those_of_the_definition(sharing, kind):
    """From (a, g) of every step, with a homogeneous coordinate."""
    torch.manual_seed(0)
    model = Labelled(kind(2, 3, batch_first=True), 3).double()
    evaluation = Objective(model, nn.CrossEntropyLoss()).at(data([4] * 5))
    statistics = KFAC(EmpiricalFisher(), weight_sharing=sharing).statistics(evaluation)
    v = next(EmpiricalFisher().vectors(evaluation))
    for factors in evaluation.layer_factors(v):
        (part,) = factors.maps
        a, g = part.a.squeeze(2), part.g.squeeze(2)
        expected = {
            "A": torch.einsum("nti,ntj->ij", a, a) / 5,
            "A1": torch.einsum("nti,ntj->ij", a[:, 1:], a[:, :-1]) / 5,
            "lags": torch.tensor([4.0, 3.0, 2.0, 1.0]).double(),
            "G": torch.einsum("nti,ntj->ij", g, g),
            "G1": torch.einsum("nti,ntj->ij", g[:, 1:], g[:, :-1]),
        }
        own = {**statistics.means, **statistics.sums}
        for name, value in expected.items():
            torch.testing.assert_close(own[f"{factors.layer.name}|{name}"], value, **CLOSE)


@pytest.mark.parametrize("kind", [SymmetricKroneckerChain, GeneralKroneckerChain])
def test_the_operator_is_the_chain_of_the_mean_moments(kind):
    torch.manual_seed(0)
    sharing = CHAINS[0] if kind is SymmetricKroneckerChain else CHAINS[1]
    objective = Objective(Labelled(nn.RNN(2, 3, batch_first=True), 3).double(), nn.CrossEntropyLoss())
    evaluation = objective.at(data([5, 2, 4, 2]))
    kfac = KFAC(EmpiricalFisher(), weight_sharing=sharing)
    s = kfac.statistics(evaluation)
    layer = objective.plan.layers[1]
    means, sums = ({key.split("|")[1]: t for key, t in part.items() if layer.name in key} for part in (s.means, s.sums))
    w = means["lags"]
    lag0, lag1 = (sums["G"], means["A"] / w[0]), (sums["G1"], means["A1"] / w[0])
    expected = kind(lag0, lag1, *((w / w[0],) if kind is SymmetricKroneckerChain else ()))
    torch.testing.assert_close(kfac.block(layer, s).to_dense(), expected.to_dense(), **CLOSE)


@every_kind
@drawn
@given(seed=st.integers(0, 999), lengths=st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_moments_at_lags_0_and_1_are_those_of_a_process(kind, seed, lengths):
    """The Toeplitz matrix of both is positive semi-definite, since both are divided by the same number of steps."""
    torch.manual_seed(seed)
    model = Labelled(kind(2, 3, batch_first=True), 3).double()
    evaluation = Objective(model, nn.CrossEntropyLoss()).at(data(lengths, seed=seed))
    statistics = KFAC(EmpiricalFisher(), weight_sharing=LinearGaussian()).statistics(evaluation)
    for layer in evaluation.layers:
        for moment, lag, source in (("A", "A1", statistics.means), ("G", "G1", statistics.sums)):
            zero, one = source[f"{layer.name}|{moment}"], source[f"{layer.name}|{lag}"]
            toeplitz = torch.cat([torch.cat([zero, one.T], 1), torch.cat([one, zero], 1)])
            assert torch.linalg.eigvalsh(toeplitz).min() > -1e-12 * float(zero.trace() + 1)


@every_strategy
@every_kind
def test_one_step_equals_a_fully_connected_layer(kind, sharing):
    torch.manual_seed(0)
    model = Labelled(kind(2, 3, batch_first=True), 3).double()
    objective = Objective(model, nn.CrossEntropyLoss())
    batch = data([1, 1, 1])
    for name, block in blocks(objective, [batch], KFAC(GGN())).items():
        torch.testing.assert_close(blocks(objective, [batch], KFAC(GGN(), weight_sharing=sharing))[name], block)


def test_independent_is_expand():
    objective = Objective(Labelled(nn.GRU(2, 3, batch_first=True), 3).double(), nn.CrossEntropyLoss())
    batch = data([4, 2, 4])
    expand, independent = (blocks(objective, [batch], KFAC(GGN(), weight_sharing=s)) for s in (Expand(), Independent()))
    for name, block in expand.items():
        torch.testing.assert_close(independent[name], block, rtol=0, atol=0)


@pytest.mark.parametrize("sharing", CHAINS, ids=str)
def test_all_agree_where_steps_are_uncorrelated(sharing):
    objective = Objective(Labelled(nn.LSTM(2, 3, batch_first=True), 3).double(), nn.CrossEntropyLoss())
    evaluation = objective.at(data([4] * 6))
    kfac = KFAC(EmpiricalFisher(), weight_sharing=sharing)
    statistics = kfac.statistics(evaluation)
    for key in [key for key in statistics.means if key.endswith("A1")]:
        statistics.means[key].zero_()
    for layer in objective.plan.layers:
        block = kfac.block(layer, statistics)
        A, G = statistics.means[f"{layer.name}|A"] / 4, statistics.sums[f"{layer.name}|G"]
        torch.testing.assert_close(block.to_dense(), Kronecker((G, A)).to_dense(), **CLOSE)


@every_kind
@pytest.mark.parametrize("sharing", CHAINS, ids=str)
def test_solves_undo_products(sharing, kind):
    torch.manual_seed(1)
    objective = Objective(Labelled(kind(2, 3, batch_first=True), 3).double(), nn.CrossEntropyLoss())
    C = KFAC(GGN(), weight_sharing=sharing).estimate(objective.at(data([5, 3, 4, 5, 2])))
    v = torch.randn(C.size, dtype=torch.float64)
    # conjugate gradients end at a relative residual of 1e-10; the condition is below 1e4 here
    torch.testing.assert_close(damped_inverse(C, 1e-2) @ (C @ v + 1e-2 * v), v, rtol=1e-6, atol=1e-6)
    inverse = FactoredTikhonov()(C, 1e-2).to_dense()
    torch.testing.assert_close(inverse, inverse.T, rtol=1e-8, atol=1e-8)
    assert torch.linalg.eigvalsh(inverse).min() > 0


def test_averages_take_batches_of_different_lengths():
    objective = Objective(Labelled(nn.RNN(2, 3, batch_first=True), 3).double(), nn.CrossEntropyLoss())
    average = MovingAverage(KFAC(EmpiricalFisher(), weight_sharing=LinearGaussian()), decay=0.5)
    for lengths in ([3, 3], [5, 4], [2, 2]):
        average.update(objective.at(data(lengths)))
    again = MovingAverage(average.approximation, decay=0.5)
    again.load_state_dict(average.state_dict())
    torch.testing.assert_close(again.operator(objective).to_dense(), average.operator(objective).to_dense())
    lags = average.state_dict()["means"]["layer:ih_l0|lags"]
    # 1/2 of the last batch, 1/4 of the two before it
    expected = torch.tensor([2, 1, 0, 0, 0]) / 2 + torch.tensor([3, 2, 1, 0, 0]) / 4
    torch.testing.assert_close(lags.float(), expected + torch.tensor([4.5, 3.5, 2.5, 1.5, 0.5]) / 4)


@pytest.mark.parametrize("sharing", STRATEGIES, ids=str)
def test_hand_unrolled_cells_have_the_blocks_of_the_layer(sharing):
    torch.manual_seed(0)
    layer, cell = nn.LSTM(2, 3, batch_first=True).double(), nn.LSTMCell(2, 3).double()
    for name, parameter in cell.named_parameters():
        parameter.data.copy_(getattr(layer, f"{name}_l0").data)

    class Unrolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def forward(self, x):
            state, outputs = None, []
            for step in x.unbind(1):
                state = self.cell(step, state)
                outputs.append(state[0])
            return torch.stack(outputs, 1), state

    torch.manual_seed(1)
    models = [Labelled(layer, 3).double()]
    models.append(Labelled(Unrolled(), 3).double())
    models[1].readout.load_state_dict(models[0].readout.state_dict())
    kfac = KFAC(GGN(), weight_sharing=sharing)
    found = [list(blocks(Objective(m, nn.CrossEntropyLoss()), [data([4, 2, 3])], kfac).values()) for m in models]
    for fused, unrolled in zip(*found, strict=True):
        torch.testing.assert_close(unrolled, fused, **CLOSE)


class Readout(nn.Module):
    """sum_t <r_t, W a_t>: the gradient of W is sum_t r_t a_t^T, for any r."""

    def __init__(self, d_out, d_in):
        super().__init__()
        self.linear = nn.Linear(d_in, d_out, bias=False)

    def forward(self, a, r):
        return (self.linear(a) * r).sum((1, 2)).unsqueeze(1)


def chain(N, T, transition, generator):
    """N sequences of a stationary linear Gaussian chain with unit covariance."""
    d = len(transition)
    noise = torch.linalg.cholesky(torch.eye(d).double() - transition @ transition.T)
    steps = [torch.randn(N, d, generator=generator, dtype=torch.float64)]
    for _ in range(T - 1):
        new = torch.randn(N, d, generator=generator, dtype=torch.float64)
        steps.append(steps[-1] @ transition.T + new @ noise.T)
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_on_linear_gaussian_chains_the_chains_are_closer_than_independence(symmetric):
    """The exact block of 20,000 sequences, by E[(sum_t g_t a_t^T)(sum_t g_t a_t^T)^T]."""
    generator = torch.Generator().manual_seed(0)
    transitions = []
    for d in (3, 2):
        M = torch.randn(d, d, generator=generator, dtype=torch.float64)
        M = M + M.T if symmetric else M
        transitions.append(0.9 * M / torch.linalg.matrix_norm(M, 2))
    N, T = 20_000, 20
    a, r = (chain(N, T, transition, generator) for transition in transitions)
    model = Readout(2, 3).double()
    batch = (a, r), torch.zeros(N, 1, dtype=torch.float64)
    evaluation = Objective(model, nn.MSELoss()).at(batch)
    rows = torch.einsum("nto,nti->noi", r, a).flatten(1)
    exact = 2 * rows.T @ rows / N

    def error(approximation):
        return float((approximation.estimate(evaluation).to_dense() - exact).norm() / exact.norm())

    errors = [error(KFAC(GGN(), weight_sharing=sharing)) for sharing in (Independent(), *CHAINS)]
    independent, option_1, option_2 = errors
    fitting = option_1 if symmetric else min(option_1, option_2)
    # a quarter of the error of independence or less; sampling leaves about sqrt(2 / N) x (correlations) = 3 %
    assert fitting < 0.25 * independent
    assert error(Diagonal(GGN())) > fitting


def test_blocks_are_described():
    objective = Objective(Labelled(nn.LSTM(2, 3, batch_first=True), 3).double(), nn.CrossEntropyLoss())
    text = str(objective.describe(KFAC(GGN(), weight_sharing=LinearGaussian()), data([3, 3])))
    assert "Kronecker chain: A 3 x 3, G 12 x 12, lags 0 and 1" in text
    assert "layer:hh_l0" in text


def test_transitions_are_checked():
    with pytest.raises(TypeError, match="SymmetricTransition"):
        LinearGaussian("symmetric")


def test_convolutions_in_front_are_expanded():
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten()).double()
    network = Network(model, nn.MSELoss(), torch.randn(4, 2, 5).double(), torch.zeros(4, 12).double())
    evaluation = Objective(model, network.loss).at((network.inputs, network.targets))
    C = [KFAC(GGN(), weight_sharing=sharing).estimate(evaluation).to_dense() for sharing in (Expand(), CHAINS[0])]
    torch.testing.assert_close(*C, rtol=0, atol=0)
