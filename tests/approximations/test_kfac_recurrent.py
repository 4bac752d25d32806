"""K-FAC of recurrent layers: its statistics are those of the definition, padding does not count, and the errors' order.

That (a, g) are right for every cell and option is tested in ``extensions/test_layer_rules``; the algebra of the chains
in ``operators/test_kronecker_chain``.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import Network
from recurrent_models import Labelled, Unpacked
from torch import nn

from curvlib import GGN, EmpiricalFisher, Fisher, Objective
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


def data(lengths, features=2, classes=3, seed=0):
    """Padded inputs, whose padding is large, and labels that are ignored there."""
    generator = torch.Generator().manual_seed(seed)
    N, T = len(lengths), max(lengths)
    x = torch.randn(N, T, features, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (N, T), generator=generator)
    padded = torch.arange(T) >= torch.tensor(lengths).unsqueeze(1)
    return x.masked_fill(padded.unsqueeze(2), 7.0), y.masked_fill(padded, -100)


def blocks(objective, batches, approximation):
    """The dense block of each layer over all batches."""
    C = approximation.estimate_over(objective, batches, progress=False)
    return {layer.name: C.to_dense()[layer.coordinates][:, layer.coordinates] for layer in objective.plan.layers}


@every_kind
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@every_strategy
def test_padded_sequences_count_like_truncated_ones(sharing, reduction, kind):
    """The bias row included, which counts positions; in the read-out as in the recurrent layer."""
    torch.manual_seed(0)
    model = Labelled(kind(2, 3, batch_first=True), 3).double()
    objective = Objective(model, nn.CrossEntropyLoss(reduction=reduction))
    x, y = data([5, 2, 4])
    kfac = KFAC(GGN(), weight_sharing=sharing)
    padded = blocks(objective, [(x, y)], kfac)
    truncated = [(x[n : n + 1, :length], y[n : n + 1, :length]) for n, length in enumerate([5, 2, 4])]
    for name, block in blocks(objective, truncated, kfac).items():
        torch.testing.assert_close(padded[name], block, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@every_kind
@every_strategy
def test_packed_sequences_count_like_truncated_ones(sharing, kind):
    """Both directions, the losses on the outputs that there are."""
    torch.manual_seed(0)
    lengths = [2, 5, 4, 2]
    model = Labelled(Unpacked(kind(2, 3, bidirectional=True)), 3, features=6).double()
    objective = Objective(model, nn.CrossEntropyLoss(reduction="sum"))
    x, y = data(lengths)
    kfac = KFAC(GGN(), weight_sharing=sharing)
    model.layer.lengths = torch.tensor(lengths)
    packed = blocks(objective, [(x, y)], kfac)
    model.layer.lengths = None
    truncated = [(x[n : n + 1, :length], y[n : n + 1, :length]) for n, length in enumerate(lengths)]
    for name, block in blocks(objective, truncated, kfac).items():
        torch.testing.assert_close(packed[name], block, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("matrix", [GGN(), Fisher(samples=3), EmpiricalFisher()], ids=str)
def test_padding_does_not_count_for_any_matrix(matrix):
    """The inputs' statistics alone: draws of labels differ."""
    torch.manual_seed(0)
    model = Labelled(nn.LSTM(2, 3, batch_first=True), 3).double()
    objective = Objective(model, nn.CrossEntropyLoss())
    x, y = data([5, 2, 4])
    statistics = KFAC(matrix, weight_sharing=LinearGaussian()).statistics(objective.at((x, y)))
    other = KFAC(matrix, weight_sharing=LinearGaussian()).statistics(objective.at((x.clamp(max=3.0), y)))
    for key, value in statistics.means.items():
        torch.testing.assert_close(value, other.means[key], **CLOSE)
    lags = [11 / 3, (4 + 1 + 3) / 3, (3 + 2) / 3, (2 + 1) / 3, 1 / 3]
    for name in ("layer:ih_l0", "layer:hh_l0", "readout"):
        torch.testing.assert_close(statistics.means[f"{name}|lags"], torch.tensor(lags).double())


def test_a_head_that_starts_at_zero_leaves_padding_out_of_averages():
    """Nothing is reached at first, so that nothing is known of the positions: the first batch counts none."""
    averages = []
    for padding in (0.0, 100.0):
        torch.manual_seed(0)
        model = Labelled(nn.RNN(2, 3, batch_first=True), 3).double()
        nn.init.zeros_(model.readout.weight)
        x, y = data([4, 2, 3])
        x = torch.where((y < 0).unsqueeze(2), padding, x)
        objective = Objective(model, nn.CrossEntropyLoss())
        average = MovingAverage(KFAC(EmpiricalFisher()), decay=0.9)
        for step in range(3):
            assert average.update(objective.at((x, y)))
            if step == 0:
                assert average.state_dict()["means"]["layer:ih_l0|positions"] == 0
                assert bool(average.operator(objective).to_dense().isfinite().all())
                nn.init.eye_(model.readout.weight)
        averages.append(average.operator(objective).to_dense())
    torch.testing.assert_close(*averages, **CLOSE)


class PerPoint(nn.Module):
    """A network of sets: the order of the points says nothing."""

    def __init__(self):
        super().__init__()
        self.point, self.readout = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.readout(torch.relu(self.point(x)).amax(1))


def test_networks_of_sets_count_all_points_in_any_order():
    torch.manual_seed(0)
    objective = Objective(PerPoint().double(), nn.CrossEntropyLoss())
    x, y = torch.randn(5, 12, 2).double(), torch.randint(3, (5,))
    statistics = [KFAC(GGN()).statistics(objective.at((points, y))).means for points in (x, x.flip(1))]
    assert statistics[0]["point|positions"] == 12
    torch.testing.assert_close(statistics[0]["point|A"], statistics[1]["point|A"], **CLOSE)


class Characters(nn.Module):
    """What a padded language model is made of."""

    def __init__(self, padding_idx):
        super().__init__()
        self.embedding = nn.Embedding(6, 2, padding_idx=padding_idx)
        self.layer, self.norm, self.readout = nn.LSTM(2, 3, batch_first=True), nn.LayerNorm(3), nn.Linear(3, 6)

    def forward(self, x):
        return self.readout(self.norm(self.layer(self.embedding(x))[0])).transpose(1, 2)


@pytest.mark.parametrize("padding_idx", [None, 0])
@every_strategy
def test_padding_does_not_count_in_an_embedding_in_front(sharing, padding_idx):
    torch.manual_seed(0)
    lengths = [5, 2, 4]
    objective = Objective(Characters(padding_idx).double(), nn.CrossEntropyLoss())
    x = torch.randint(1, 6, (3, 5))
    y = torch.randint(6, (3, 5)).masked_fill(torch.arange(5) >= torch.tensor(lengths).unsqueeze(1), -100)
    x = x.masked_fill(y < 0, 0)
    kfac = KFAC(GGN(), weight_sharing=sharing)
    truncated = [(x[n : n + 1, :length], y[n : n + 1, :length]) for n, length in enumerate(lengths)]
    padded = blocks(objective, [(x, y)], kfac)
    for name, block in blocks(objective, truncated, kfac).items():
        torch.testing.assert_close(padded[name], block, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


class Pair(nn.Module):
    """One layer on two padded batches, each read at the last step that there is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(2, 3, batch_first=True)

    def forward(self, x, y, last_x, last_y):
        rows = torch.arange(len(x))
        return torch.cat([self.layer(x)[0][rows, last_x], self.layer(y)[0][rows, last_y]], dim=1)


@pytest.mark.parametrize("sharing", STRATEGIES[:3], ids=str)
def test_each_call_of_a_layer_is_a_sequence_with_an_end_of_its_own(sharing):
    torch.manual_seed(0)
    objective = Objective(Pair().double(), nn.MSELoss())
    lengths = torch.tensor([[3, 1], [2, 4]])
    x, y = torch.randn(2, 2, 4, 2).double().unbind()
    found = []
    for padding in (0.0, 50.0):
        parts = [
            sequence.masked_fill((torch.arange(4) >= length.unsqueeze(1)).unsqueeze(2), padding)
            for sequence, length in zip((x, y), lengths, strict=True)
        ]
        batch = (*parts, *(length - 1 for length in lengths)), torch.zeros(2, 6).double()
        found.append(KFAC(GGN(), weight_sharing=sharing).statistics(objective.at(batch)).means)
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], **CLOSE)
    if isinstance(sharing, LinearGaussian):
        # (3, 1) and (2, 4) steps in two examples: no pair from one call to the next
        assert found[0]["layer:ih_l0|lags"].tolist() == [5, 3, 1.5, 0.5]


def test_examples_without_a_target_that_counts_do_not_count():
    torch.manual_seed(0)
    model = Labelled(nn.RNN(2, 3, batch_first=True), 3).double()
    x, y = data([4, 3, 4])
    y[2] = -100
    kfac = KFAC(EmpiricalFisher(), weight_sharing=LinearGaussian())
    objective = Objective(model, nn.CrossEntropyLoss())
    means, without = (kfac.statistics(objective.at(batch)).means for batch in ((x, y), (x[:2], y[:2])))
    for key, value in without.items():
        torch.testing.assert_close(means[key], value, **CLOSE)


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


class CellsAlone(nn.Module):
    """Logits (N, C, T) of a cell and a read-out, both called once a step: no module sees more than one position."""

    def __init__(self):
        super().__init__()
        self.cell, self.readout = nn.GRUCell(2, 3), nn.Linear(3, 3)

    def forward(self, x):
        h, outputs = None, []
        for step in x.unbind(1):
            h = self.cell(step, h)
            outputs.append(self.readout(h))
        return torch.stack(outputs, dim=2)


@pytest.mark.parametrize("sharing", STRATEGIES, ids=str)
def test_padding_does_not_count_in_loops_over_cells(sharing):
    torch.manual_seed(0)
    objective = Objective(CellsAlone().double(), nn.CrossEntropyLoss())
    x, y = data([4, 2, 3])
    kfac = KFAC(GGN(), weight_sharing=sharing)
    truncated = [(x[n : n + 1, :length], y[n : n + 1, :length]) for n, length in enumerate([4, 2, 3])]
    padded = blocks(objective, [(x, y)], kfac)
    for name, block in blocks(objective, truncated, kfac).items():
        torch.testing.assert_close(padded[name], block, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


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
