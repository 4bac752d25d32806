"""Mistakes of other libraries with convolutions and with modules that are used several times, each with a name.

Where they are tested besides: padding modes, ``padding="same"``, dilation and groups by exact blocks in
``test_layer_rules`` and by K-FAC's factors in ``test_kfac_convolutions``; Linear layers that are called twice, tied,
modified in place or frozen in ``test_driver``; tied embeddings and residual blocks in place in ``test_real_models``.
"""

import itertools

import pytest
import torch
from oracles import Network
from torch import nn
from torch.nn import functional

from curvlib import GGN, Objective
from curvlib.approximations import KFAC, BlockDiagonal, Dense, Diagonal, Exact, Reduce
from curvlib.solvers import damped_inverse

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def images(N, C=2, size=4):
    return torch.randn(N, C, size, size, dtype=torch.float64)


def assert_exact_parts_equal_brute_force(model, inputs, loss=None):
    """Blocks and diagonal are exact, K-FAC positive semi-definite."""
    targets = torch.randn_like(model(inputs)).detach()
    network = Network(model, loss or nn.MSELoss(), inputs, targets)
    evaluation, dense = Objective(model, network.loss).at((inputs, targets)), network.ggn()
    blocks = BlockDiagonal(GGN()).estimate(evaluation).to_dense()
    assert not evaluation.plan.unsupported
    for layer in evaluation.layers:
        rows, columns = layer.coordinates.unsqueeze(1), layer.coordinates
        torch.testing.assert_close(blocks[rows, columns], dense[rows, columns], **CLOSE)
    torch.testing.assert_close(Diagonal(GGN()).estimate(evaluation).diagonal(), dense.diagonal(), **CLOSE)
    torch.testing.assert_close(Exact(GGN()).estimate(evaluation).to_dense(), dense, **CLOSE)
    kfac = KFAC(GGN()).estimate(evaluation)
    assert torch.linalg.eigvalsh(kfac.to_dense()).min() > -1e-12
    inverse = damped_inverse(kfac, 0.1).to_dense()
    shifted = kfac.to_dense() + 0.1 * torch.eye(len(dense))
    torch.testing.assert_close(inverse @ shifted, torch.eye(len(dense), dtype=torch.float64), rtol=0, atol=1e-5)


# Convolutions


@pytest.mark.parametrize(
    ("ignored", "options"),
    [
        ({"padding": 1}, {"padding": 1, "padding_mode": "circular"}),
        ({"padding": 1}, {"padding": 1, "padding_mode": "reflect"}),
        ({"padding": 1}, {"padding": 1, "padding_mode": "replicate"}),
        ({}, {"padding": "same"}),
        ({}, {"dilation": 2}),
        ({}, {"stride": 2}),
    ],
    ids=str,
)
def test_options_of_convolutions_count(ignored, options):
    """The curvature is right with the option, and another one without it."""
    x = images(2, size=5)
    diagonals = []
    for given in (ignored, options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 2, 3, **given), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
        assert_exact_parts_equal_brute_force(model, x)
        evaluation = Objective(model, nn.MSELoss()).at((x, torch.zeros(2, 2, dtype=torch.float64)))
        diagonals.append([C(GGN()).estimate(evaluation).diagonal() for C in (Diagonal, KFAC)])
    for without, right in zip(*diagonals, strict=True):
        assert (without - right).norm() > 0.05 * right.norm()


def test_groups_are_not_averaged():
    """Two groups of opposite inputs, whose average curvlinops and kfac-pytorch take: A would be zero for both."""
    model = nn.Sequential(nn.Conv2d(4, 2, 1, groups=2, bias=False), nn.Flatten()).double()
    half = images(1, C=2, size=1)
    x = torch.cat([half, -half], dim=1)
    A = KFAC(GGN()).statistics(Objective(model, nn.MSELoss()).at((x, torch.zeros(1, 2).double()))).means["0|A"]
    a = half.flatten()
    torch.testing.assert_close(A, torch.stack([a.outer(a), a.outer(a)]), **CLOSE)


# Layers used several times, in place, or in part


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        return self.conv(torch.tanh(self.conv(x)))


class InPlace(nn.Module):
    """ReLU in place after a convolution, a sum and a product in place."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.GroupNorm(1, 2), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        out = functional.relu_(self.a(x))
        out = self.norm(out)
        out *= 2
        out = self.b(out)
        out += x
        return functional.silu(out, inplace=True)


class TwoScales(nn.Module):
    """One kernel on an image and on its half: two modules with other options and the same parameters."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(2, 2, 2), nn.Conv2d(2, 2, 2, stride=2, dilation=1, padding=1)
        self.coarse.weight, self.coarse.bias = self.fine.weight, self.fine.bias

    def forward(self, x):
        return torch.cat([self.fine(x).flatten(1), self.coarse(x).tanh().flatten(1)], dim=1)


class AutoEncoder(nn.Module):
    """A decoder that is the transposed convolution with the encoder's weight."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(2, 3, (2, 3), stride=2, bias=False)
        self.decoder = nn.ConvTranspose2d(3, 2, (2, 3), stride=2, output_padding=(0, 1), bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(torch.tanh(self.encoder(x)))


class GroupedAndNot(nn.Module):
    """A weight (4, 1, 2, 2) as that of four filters of one channel, and of two groups of two filters."""

    def __init__(self):
        super().__init__()
        self.whole, self.grouped = nn.Conv2d(1, 4, 2, bias=False), nn.Conv2d(2, 4, 2, groups=2, bias=False)
        self.grouped.weight = self.whole.weight

    def forward(self, x):
        return torch.tanh(self.whole(x[:, :1])) + self.grouped(x)


@pytest.mark.parametrize("make", [Twice, InPlace, TwoScales, AutoEncoder, GroupedAndNot])
def test_convolutions_called_twice_tied_or_followed_by_in_place_operations(make):
    assert_exact_parts_equal_brute_force(make().double(), images(2))


@pytest.mark.parametrize(
    "frozen", [*itertools.combinations(range(6), 1), *itertools.combinations(range(6), 3)], ids=str
)
def test_frozen_parameters_leave_the_curvature_of_the_others(frozen):
    """Of a convolution with groups, a norm and an embedding: the rest is a part of the whole matrix, nothing else."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.conv = nn.Embedding(3, 2), nn.Conv1d(2, 2, 2, groups=2)
            self.norm, self.last = nn.GroupNorm(1, 2), nn.Conv1d(2, 1, 1, bias=False)

        def forward(self, x):
            return self.last(torch.tanh(self.norm(self.conv(self.table(x).transpose(1, 2)))))

    model, x, y = Model().double(), torch.randint(3, (4, 3)), torch.randn(4, 1, 2, dtype=torch.float64)
    whole = Objective(model, nn.MSELoss())
    names = whole.layout.names
    kept = torch.cat([whole.layout.coordinates(name) for i, name in enumerate(names) if i not in frozen])
    approximations = [
        *(approximation(GGN()) for approximation in (Exact, Dense, BlockDiagonal, Diagonal, KFAC)),
        KFAC(GGN(), weight_sharing=Reduce()),
    ]
    full = [approximation.estimate(whole.at((x, y))).to_dense() for approximation in approximations]
    for i in frozen:
        model.get_parameter(names[i]).requires_grad_(False)
    for approximation, matrix in zip(approximations, full, strict=True):
        part = approximation.estimate(Objective(model, nn.MSELoss()).at((x, y))).to_dense()
        torch.testing.assert_close(part, matrix[kept.unsqueeze(1), kept], **CLOSE)


# Recurrent layers


class Sequence(nn.Module):
    """The outputs of a recurrent layer, or h_n, from a given initial state or from zeros."""

    def __init__(self, layer, last, start):
        super().__init__()
        self.layer, self.last, self.start = layer, last, start

    def forward(self, x):
        state = None
        if self.start:
            start = x[:, 0, :2].unsqueeze(0).contiguous()
            state = (start, start.cos()) if isinstance(self.layer, nn.LSTM) else start
        out, final = self.layer(x, state)
        final = final[0] if isinstance(final, tuple) else final
        return final.transpose(0, 1).flatten(1) if self.last else out.flatten(1)


@pytest.mark.parametrize("last", [False, True], ids=["outputs", "h_n"])
@pytest.mark.parametrize("start", [False, True], ids=["zeros", "given state"])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU], ids=lambda kind: kind.__name__)
def test_initial_states_and_losses_on_the_last_state(kind, start, last):
    """BackPACK's per-example gradients leave given initial states out (error 2.2), and fail for losses on h_n."""
    torch.manual_seed(0)
    model = Sequence(kind(3, 2, batch_first=True), last, start).double()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    targets = torch.randn_like(model(x)).detach()
    network = Network(model, nn.MSELoss(), x, targets)
    evaluation, dense = Objective(model, network.loss).at((x, targets)), network.ggn()
    blocks = BlockDiagonal(GGN()).estimate(evaluation).to_dense()
    for layer in evaluation.layers:
        rows, columns = layer.coordinates.unsqueeze(1), layer.coordinates
        torch.testing.assert_close(blocks[rows, columns], dense[rows, columns], **CLOSE)
