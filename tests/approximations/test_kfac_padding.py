"""Padding does not count in K-FAC: padded sequences have the blocks of truncated ones."""

import pytest
import torch
from recurrent_models import Labelled, Unpacked, blocks, data
from torch import nn

from curvlib import GGN, EmpiricalFisher, Fisher, Objective
from curvlib.approximations import (
    KFAC,
    GeneralTransition,
    Independent,
    LinearGaussian,
    MovingAverage,
    Reduce,
    SymmetricTransition,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
CHAINS = (LinearGaussian(SymmetricTransition()), LinearGaussian(GeneralTransition()))
STRATEGIES = (Independent(), *CHAINS, Reduce())
every_strategy = pytest.mark.parametrize("sharing", STRATEGIES, ids=str)
every_kind = pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU], ids=lambda kind: kind.__name__)


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
