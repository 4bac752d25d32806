"""Diagonal and blocks of the Hessian, which has no vectors: every entry is that of the dense matrix by torch.func."""

import networks as architectures
import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import DiagHessian
from cases import mlp, networks
from hypothesis import given, settings
from oracles import Network
from torch import nn

from curvlib import GGN, Hessian, UnsupportedLayerError
from curvlib.approximations import (
    EKFAC,
    KFAC,
    KFRA,
    BlockDiagonal,
    ByLabel,
    ByLayer,
    ByOutputUnit,
    ByParameter,
    Dense,
    Diagonal,
    Exact,
    LanczosTruncation,
    LowRank,
    LowRankBlocks,
    MovingAverage,
    PerLayer,
    Remainder,
)
from curvlib.optimizers import FixedLength, ModelDescent, PreconditionedGradient, SecondOrderOptimizer
from curvlib.solvers import Dogleg, MoreSorensen, SolveError, TrustRegion, damped_inverse

CLOSE = {"rtol": 1e-8, "atol": 1e-10}


def labelled(layout, label):
    """For every coordinate the label of its parameter and of its first index."""
    parts = zip(layout.names, layout.shapes, strict=True)
    return [label(name, row) for name, shape in parts for row in range(shape[0]) for _ in range(shape[1:].numel())]


def masked(dense, labels):
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    labels = torch.tensor([numbers[label] for label in labels])
    return torch.where(labels.unsqueeze(1) == labels, dense, 0.0)


def kind(name):
    return name.rpartition(".")[2]


APPROXIMATIONS = {
    "diagonal": (Diagonal(Hessian()), None),
    "layers": (BlockDiagonal(Hessian(), partition=ByLayer()), lambda name, row: name.rpartition(".")[0]),
    "units": (BlockDiagonal(Hessian(), partition=ByOutputUnit()), lambda name, row: (name.rpartition(".")[0], row)),
    "parameters": (BlockDiagonal(Hessian(), partition=ByParameter()), lambda name, row: name),
    "groups": (BlockDiagonal(Hessian(), partition=ByLabel(kind)), lambda name, row: kind(name)),
}


def expected(H, layout, label):
    return torch.diag(H.diagonal()) if label is None else masked(H, labelled(layout, label))


@pytest.mark.parametrize("name", APPROXIMATIONS)
@given(network=networks())
@settings(max_examples=6)
def test_every_kept_entry_is_that_of_the_dense_hessian(name, network):
    approximation, label = APPROXIMATIONS[name]
    evaluation = network.evaluate()
    C = approximation.estimate(evaluation)
    torch.testing.assert_close(C.to_dense(), expected(network.hessian(), evaluation.layout, label), **CLOSE)


def network_of(model, *shape, classes=3, l2=0.3):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(4, *shape, dtype=torch.float64)
    return Network(model.double(), nn.CrossEntropyLoss(), x, torch.randint(classes, (4,)), l2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class OnSteps(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize(
    "network",
    [
        network_of(Tied(), 3),
        network_of(OnSteps(), 3, 2),
        network_of(nn.Sequential(nn.Conv2d(2, 2, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)), 2, 3, 3),
        network_of(
            nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Tanh(), nn.Linear(3, 3)), 3
        ),
    ],
    ids=["tied", "gru", "grouped convolution", "batch norm in training mode"],
)
def test_other_layers_and_examples_that_meet(network):
    evaluation, H = network.evaluate(), network.hessian()
    torch.testing.assert_close(Diagonal(Hessian()).estimate(evaluation).diagonal(), H.diagonal(), **CLOSE)
    C = BlockDiagonal(Hessian()).estimate(evaluation).to_dense()
    for layer in evaluation.layers:
        p = layer.coordinates
        torch.testing.assert_close(C[p][:, p], H[p][:, p], **CLOSE)
        C[p.unsqueeze(1), p] = 0.0
    assert not (C - 0.3 * torch.eye(len(C)).double() * (C != 0)).any()


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_the_diagonal_is_backpacks():
    network = network_of(mlp([3, 4, 3]), 3, l2=0.0)
    ours = Diagonal(Hessian()).estimate(network.evaluate()).diagonal()
    assert ours.min() < 0 < ours.max()
    model, loss = extend(network.copy().model), extend(nn.CrossEntropyLoss())
    with backpack(DiagHessian()):
        loss(model(network.inputs), network.targets).backward()
    torch.testing.assert_close(ours, torch.cat([p.diag_h.flatten() for p in model.parameters()]), **CLOSE)


def outside():
    """A layer without rule between two layers."""
    return network_of(nn.Sequential(nn.Linear(3, 3), nn.PReLU(3), nn.Linear(3, 3)), 3)


@pytest.mark.parametrize("fallback", ["diagonal", "dense", "exclude"])
@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_parameters_outside_every_layer(name, fallback):
    network = outside()
    evaluation, H = network.evaluate(), network.hessian() - 0.3 * torch.eye(27).double()
    approximation, label = APPROXIMATIONS[name]
    options = {"partition": approximation.partition} if isinstance(approximation, BlockDiagonal) else {}
    with pytest.raises(UnsupportedLayerError, match=r"1\.weight"):
        approximation.estimate(evaluation)
    C = type(approximation)(Hessian(), on_unsupported=fallback, **options).estimate(evaluation).to_dense()
    reference = expected(H, evaluation.layout, label)
    slope = evaluation.layout.coordinates("1.weight")
    if not (fallback == "dense" and name == "groups"):  # where it shares its group's block
        reference[slope], reference[:, slope] = 0.0, 0.0
        own = {"diagonal": torch.diag(H.diagonal()[slope]), "dense": H[slope][:, slope]}
        reference[slope.unsqueeze(1), slope] = own.get(fallback, torch.zeros(3, 3).double())
    torch.testing.assert_close(C, reference + 0.3 * torch.eye(27).double(), **CLOSE)


def test_one_product_for_each_parameter_that_needs_one():
    network = network_of(mlp([3, 4, 3]), 3)
    evaluation = network.evaluate()
    Exact(Hessian()).estimate(evaluation) @ evaluation.gradient()
    before = evaluation.work
    Exact(Hessian()).estimate(evaluation) @ evaluation.gradient()
    one = evaluation.work - before
    for approximation, products in (
        (Diagonal(Hessian()), 31),
        (BlockDiagonal(Hessian()), 31),
        (PerLayer([("0", Diagonal(Hessian()))], otherwise=None), 16),
    ):
        before = evaluation.work
        approximation.estimate(evaluation)
        assert evaluation.work - before == pytest.approx(products * one)


def test_layers_may_mix_it_with_vectors():
    network = network_of(mlp([3, 4, 3]), 3)
    evaluation, H = network.evaluate(), network.hessian()
    mixed = PerLayer([("0", BlockDiagonal(Hessian()))], otherwise=KFAC(GGN()))
    C = mixed.estimate(evaluation).to_dense()
    torch.testing.assert_close(C[:16, :16], H[:16, :16], **CLOSE)
    assert torch.equal(C[16:, 16:], KFAC(GGN()).estimate(evaluation).to_dense()[16:, 16:])
    assert mixed.may_be_indefinite
    assert not PerLayer([("0", BlockDiagonal(GGN()))], otherwise=None).may_be_indefinite


def test_batches_and_averages():
    network = network_of(mlp([3, 4, 3]), 3)
    objective, parts = network.objective(), list(zip(network.inputs.split(3), network.targets.split(3), strict=True))
    H = network.hessian()
    C = Diagonal(Hessian()).estimate_over(objective, parts, progress=False)
    torch.testing.assert_close(C.diagonal(), H.diagonal(), **CLOSE)
    average = MovingAverage(BlockDiagonal(Hessian(), partition=ByParameter()), decay=0.5)
    assert all(average.update(objective.at(network.batch)) for _ in range(2))
    torch.testing.assert_close(average.operator(objective).to_dense()[:12, :12], H[:12, :12], **CLOSE)
    resumed = MovingAverage(BlockDiagonal(Hessian(), partition=ByParameter()), decay=0.5)
    resumed.load_state_dict(average.state_dict())
    assert torch.equal(resumed.operator(objective).to_dense(), average.operator(objective).to_dense())


def test_solvers_and_descents_treat_it_as_indefinite():
    network = network_of(mlp([3, 4, 3]), 3, l2=0.0)
    objective = network.objective()
    C = BlockDiagonal(Hessian()).estimate(objective.at(network.batch))
    smallest = float(torch.linalg.eigvalsh(C.to_dense()).min())
    assert smallest < 0
    with pytest.raises(SolveError, match="not positive definite"):
        damped_inverse(C, -0.5 * smallest)
    damped_inverse(C, -1.1 * smallest)
    with pytest.raises(ValueError, match=r"Dogleg needs a positive definite .* may be indefinite"):
        ModelDescent(curvature=BlockDiagonal(Hessian()), descent=Dogleg())
    with pytest.raises(ValueError, match="may be indefinite"):
        PreconditionedGradient(curvature=Diagonal(Hessian()))
    direction = ModelDescent(curvature=BlockDiagonal(Hessian()), descent=MoreSorensen())
    optimizer = SecondOrderOptimizer(objective, direction=direction, step_rule=FixedLength(), radius=TrustRegion())
    losses = [optimizer.step(network.batch).loss for _ in range(10)]
    assert losses[-1] < 0.3 * losses[0]


def test_what_cannot_keep_it_says_what_can():
    with pytest.raises(TypeError, match=r"LowRankBlocks.*DenseBlocks\(\), or LowRank\(Hessian\(\), method=Lanczos"):
        BlockDiagonal(Hessian(), blocks=LowRankBlocks(2))
    with pytest.raises(TypeError, match=r"LowRank\(Hessian\(\), method=LanczosTruncation\(rank\)\)"):
        LowRank(Hessian())
    LowRank(Hessian(), method=LanczosTruncation(2))
    for kind in (KFAC, EKFAC, KFRA):
        with pytest.raises(TypeError, match=r"has products only\. Use it with Exact, Dense, BlockDiagonal, Diagonal"):
            kind(Hessian())


def test_single_precision_inside_autocast():
    network = network_of(mlp([3, 4, 3]), 3)
    H = network.hessian().diagonal()
    single = Network(network.copy().model.float(), network.loss, network.inputs.float(), network.targets, 0.3)
    evaluation = single.evaluate()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        C = Diagonal(Hessian()).estimate(evaluation)
    assert C.dtype == torch.float32
    torch.testing.assert_close(C.diagonal().double(), H, rtol=1e-5, atol=1e-6)


def test_the_remainder_of_its_leading_eigenpairs():
    """The eigenpairs are the largest by size, of both signs; with the remainder's diagonal the whole one is exact."""
    network = network_of(mlp([3, 4, 3]), 3)
    H, eye = network.hessian() - 0.3 * torch.eye(31).double(), torch.eye(31).double()
    low = LowRank(Hessian(), method=LanczosTruncation(6, 31)).estimate(network.evaluate()).to_dense() - 0.3 * eye
    e, Q = torch.linalg.eigh(H)
    largest = e.abs().argsort(descending=True)[:6]
    assert e[largest].min() < 0 < e[largest].max()
    torch.testing.assert_close(low, Q[:, largest] @ torch.diag(e[largest]) @ Q[:, largest].T, **CLOSE)
    both = LowRank(Hessian(), method=LanczosTruncation(6, 31), diagonal=Remainder()).estimate(network.evaluate())
    torch.testing.assert_close(both.diagonal(), H.diagonal() + 0.3, **CLOSE)


@pytest.mark.filterwarnings("ignore::curvlib.FusedKernelWarning")
def test_a_vision_transformer():
    network = network_of(architectures.ViT(), 2, 4, 4)
    evaluation = network.evaluate()
    C = Diagonal(Hessian(), on_unsupported="diagonal").estimate(evaluation)
    torch.testing.assert_close(C.diagonal(), Dense(Hessian()).estimate(evaluation).diagonal(), **CLOSE)
