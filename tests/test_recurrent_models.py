"""Exact products, gradients and values of models with recurrent layers, frozen randomness, and what is refused."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import Network
from recurrent_models import Labelled
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from curvlib import GGN, Fisher, FusedKernelWarning, Hessian, Objective, StaleEvaluationError, UnsupportedLayerError
from curvlib.approximations import KFAC, BlockDiagonal, Diagonal, Exact
from curvlib.optimizers import hessian_free, kfac
from curvlib.optimizers.situation import take

sys.path.insert(0, str(Path(__file__).parent / "extensions"))
from recurrent_cases import recurrent_cells, recurrent_layers

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
KINDS = [nn.RNN, nn.LSTM, nn.GRU]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(case=st.one_of(recurrent_layers(), recurrent_cells()))
def test_exact_products_equal_brute_force(case):
    network = Network(case.module, nn.MSELoss(), case.inputs, None)
    network.targets = torch.randn_like(network.outputs(network.theta)).detach()
    evaluation = Objective(case.module, network.loss).at((case.inputs, network.targets))
    torch.testing.assert_close(Exact(GGN()).estimate(evaluation).to_dense(), network.ggn(), **CLOSE)
    torch.testing.assert_close(evaluation.gradient(), network.gradient(), **CLOSE)


@every_kind
def test_the_hessian_equals_brute_force(kind):
    torch.manual_seed(0)
    network = Network(
        Labelled(kind(1, 2, batch_first=True), 2, features=2).double(),
        nn.CrossEntropyLoss(),
        torch.randn(2, 3, 1).double(),
        torch.randint(2, (2, 3)),
    )
    evaluation = Objective(network.model, network.loss).at((network.inputs, network.targets))
    theta = network.theta
    dense = torch.stack(
        [torch.autograd.functional.hvp(network.value, theta, e)[1] for e in torch.eye(len(theta)).double()]
    )
    torch.testing.assert_close(Exact(Hessian()).estimate(evaluation).to_dense(), dense, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_kind
def test_native_kernels_in_single_precision(kind, dtype):
    """float32 LSTMs run in another kernel (oneDNN) than float64 ones where there is one."""
    torch.manual_seed(0)
    model = Labelled(kind(2, 3, 2, bidirectional=True, batch_first=True), 3, features=6)
    x, y = torch.randn(4, 6, 2), torch.randint(3, (4, 6))
    wide = Labelled(kind(2, 3, 2, bidirectional=True, batch_first=True), 3, features=6).double()
    wide.load_state_dict(model.state_dict())
    reference = Objective(wide, nn.CrossEntropyLoss()).at((x.double(), y))
    evaluation = Objective(model.to(dtype), nn.CrossEntropyLoss()).at((x.to(dtype), y))
    v = torch.linspace(-1, 1, evaluation.layout.size, dtype=dtype)
    for approximation in (Exact(GGN()), KFAC(GGN()), Diagonal(GGN())):
        expected = approximation.estimate(reference) @ v.double()
        # float32 sums of some hundred products
        torch.testing.assert_close(
            (approximation.estimate(evaluation) @ v).double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )


def drops(kind, **options):
    torch.manual_seed(0)
    return Labelled(kind(2, 8, 3, dropout=0.5, batch_first=True, **options), 3, features=8).double()


@every_kind
def test_dropout_between_layers_is_frozen_for_one_evaluation(kind):
    model = drops(kind)
    objective = Objective(model, nn.CrossEntropyLoss())
    x, y = torch.randn(4, 5, 2).double(), torch.randint(3, (4, 5))
    evaluation = objective.at((x, y))
    before = torch.get_rng_state()
    blocks = [BlockDiagonal(GGN()).estimate(evaluation) for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())  # drawn again, without a trace
    C = Exact(GGN()).estimate(evaluation).to_dense()
    coordinates = evaluation.layers[0].coordinates
    for block in blocks:
        part = block.to_dense()[coordinates][:, coordinates]
        torch.testing.assert_close(part, C[coordinates][:, coordinates], **CLOSE)
    torch.testing.assert_close(evaluation.value_at(objective.parameter_vector()), evaluation.value)
    assert objective.at((x, y)).value != evaluation.value


def test_random_numbers_that_cannot_be_drawn_again_are_noticed(monkeypatch):
    evaluation = Objective(drops(nn.LSTM), nn.CrossEntropyLoss()).at(
        (torch.randn(4, 5, 2).double(), torch.randint(3, (4, 5)))
    )
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    with pytest.raises(RuntimeError, match=r"dropout=0\.5.*could not be drawn again"):
        KFAC(Fisher()).estimate(evaluation)


class Vexed(torch.autograd.Function):
    """A backward pass like cuDNN's: its derivative is missing unless cuDNN was switched off in the forward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.fused = torch.backends.cudnn.enabled
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return VexedBackward.apply(g, ctx.fused)


class VexedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, fused):
        ctx.fused = fused
        return g.clone()

    @staticmethod
    def backward(ctx, g):
        if ctx.fused:
            raise RuntimeError("the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not")
        return g, None


class LikeCudnn(Labelled):
    def forward(self, x):
        return Vexed.apply(super().forward(x))


@every_kind
def test_fused_recurrent_kernels_give_way_to_differentiable_ones_and_say_so_once(kind):
    torch.manual_seed(0)
    model = LikeCudnn(kind(2, 3, batch_first=True), 3).double()
    objective = Objective(model, nn.CrossEntropyLoss())
    batch = torch.randn(4, 5, 2).double(), torch.randint(3, (4, 5))
    network = Network(model, objective.loss, *batch)
    with pytest.warns(FusedKernelWarning, match="without cuDNN"):
        C = Exact(GGN()).estimate(objective.at(batch)).to_dense()
    torch.testing.assert_close(C, network.ggn(), **CLOSE)
    assert torch.backends.cudnn.enabled
    again = Exact(GGN()).estimate(objective.at(batch)).to_dense()  # without a warning
    torch.testing.assert_close(again, C, **CLOSE)


@every_kind
def test_evaluation_mode_does_not_use_cudnn(kind):
    """Its backward pass exists in training mode alone."""
    used = []

    class Watched(Labelled):
        def forward(self, x):
            used.append(torch.backends.cudnn.enabled)
            return super().forward(x)

    model = Watched(kind(2, 3, batch_first=True), 3)
    batch = torch.randn(4, 5, 2), torch.randint(3, (4, 5))
    for mode in (True, False):
        Objective(model.train(mode), nn.CrossEntropyLoss()).at(batch)
    assert used == [True, False]


class OneSequence(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


@pytest.mark.parametrize("approximation", [KFAC(GGN()), Diagonal(GGN())], ids=lambda value: type(value).__name__)
@every_kind
def test_a_sequence_without_a_dimension_of_examples_is_refused(kind, approximation):
    model = OneSequence(kind(2, 3))
    evaluation = Objective(model, nn.MSELoss()).at((torch.randn(5, 2), torch.randn(5, 3)))
    with pytest.raises(UnsupportedLayerError, match="0 examples along"):
        approximation.estimate(evaluation)
    assert Exact(GGN()).estimate(evaluation).size == evaluation.layout.size


def test_a_trained_initial_state_is_named_and_may_fall_back():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.GRU(2, 3, batch_first=True)
            self.start = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return self.layer(x, self.start.expand(1, len(x), 3).contiguous())[1][0]

    network = Network(Learned().double(), nn.MSELoss(), torch.randn(4, 3, 2).double(), torch.randn(4, 3).double())
    objective = Objective(network.model, network.loss)
    evaluation = objective.at((network.inputs, network.targets))
    with pytest.raises(UnsupportedLayerError, match="start"):
        KFAC(GGN()).estimate(evaluation)
    C = BlockDiagonal(GGN(), on_unsupported="dense").estimate(evaluation).to_dense()
    rows = objective.layout.coordinates("start")
    torch.testing.assert_close(C[rows][:, rows], network.ggn()[rows][:, rows], **CLOSE)


def test_outputs_modified_in_place_are_made_again():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.RNN(2, 3)

        def forward(self, x):
            out, _ = self.layer(x.transpose(0, 1))
            out += 1.0
            return out.transpose(0, 1).square().flatten(1)

    torch.manual_seed(0)
    network = Network(Shifted().double(), nn.MSELoss(), torch.randn(4, 3, 2).double(), torch.randn(4, 9).double())
    evaluation = Objective(network.model, network.loss).at((network.inputs, network.targets))
    dense, blocks = network.ggn(), BlockDiagonal(GGN()).estimate(evaluation).to_dense()
    for layer in evaluation.layers:
        rows = layer.coordinates
        torch.testing.assert_close(blocks[rows][:, rows], dense[rows][:, rows], **CLOSE)


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "bias_hh_l0", "weight_hh_l1"])
def test_partly_frozen_layers(frozen):
    torch.manual_seed(0)
    model = Labelled(nn.LSTM(2, 2, 2, batch_first=True), 2, features=2).double()
    getattr(model.layer, frozen).requires_grad_(False)
    network = Network(model, nn.CrossEntropyLoss(), torch.randn(3, 4, 2).double(), torch.randint(2, (3, 4)))
    evaluation = Objective(model, network.loss).at((network.inputs, network.targets))
    dense, blocks = network.ggn(), BlockDiagonal(GGN()).estimate(evaluation).to_dense()
    for layer in evaluation.layers:
        rows = layer.coordinates
        torch.testing.assert_close(blocks[rows][:, rows], dense[rows][:, rows], **CLOSE)
    assert sum(layer.size for layer in evaluation.layers) == evaluation.layout.size


@pytest.mark.parametrize("preset", [kfac, hessian_free])
@every_kind
def test_presets_train_recurrent_networks(kind, preset):
    torch.manual_seed(0)
    model = Labelled(kind(3, 8, batch_first=True), 3, features=8)
    x = torch.randn(64, 6, 3)
    y = x.cumsum(1).argmax(2)  # the largest running sum
    optimizer = preset(Objective(model, nn.CrossEntropyLoss()))
    losses = [optimizer.step((x, y)).loss for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]


class Started(nn.Module):
    """A layer, or a cell in a loop, whose initial states come from another layer, in a tuple or in a list."""

    def __init__(self, layer, container):
        super().__init__()
        self.first, self.layer, self.container = nn.Linear(2, 3), layer, container

    def forward(self, x):
        h = self.first(x[:, 0])
        if isinstance(self.layer, nn.LSTM):
            return self.layer(x, self.container([h.unsqueeze(0), h.sin().unsqueeze(0)]))[0].flatten(1)
        states = self.container([h, h.sin()])
        for step in x.unbind(1):
            states = self.container(self.layer(step, states))
        return torch.cat(list(states), dim=1)


@pytest.mark.parametrize("container", [tuple, list])
@pytest.mark.parametrize(
    "kind", [lambda: nn.LSTM(2, 3, batch_first=True), lambda: nn.LSTMCell(2, 3)], ids=["layer", "cell"]
)
def test_initial_states_in_tuples_and_lists(kind, container):
    torch.manual_seed(0)
    network = Network(Started(kind(), container).double(), nn.MSELoss(), torch.randn(4, 3, 2).double(), None)
    network.targets = torch.randn_like(network.outputs(network.theta)).detach()
    evaluation = Objective(network.model, network.loss).at((network.inputs, network.targets))
    dense, blocks = network.ggn(), BlockDiagonal(GGN()).estimate(evaluation).to_dense()
    assert not evaluation.plan.unsupported
    for layer in evaluation.layers:
        rows = layer.coordinates
        torch.testing.assert_close(blocks[rows][:, rows], dense[rows][:, rows], **CLOSE)


@pytest.mark.parametrize(
    ("layer", "first", "second"),
    [
        (lambda: nn.LSTM(3, 3, 2, batch_first=True), "weight_hh_l0", "weight_hh_l1"),
        (lambda: nn.LSTM(3, 3, batch_first=True), "bias_ih_l0", "bias_hh_l0"),
        (lambda: nn.GRU(3, 3, batch_first=True, bidirectional=True), "weight_hh_l0", "weight_hh_l0_reverse"),
    ],
    ids=["layers", "biases", "directions"],
)
def test_parameters_shared_inside_a_layer_are_refused_by_name(layer, first, second):
    torch.manual_seed(0)
    model = OneSequence(layer()).double()
    setattr(model.layer, second, getattr(model.layer, first))
    x = torch.randn(2, 4, 3).double()
    network = Network(model, nn.MSELoss(), x, torch.zeros_like(model(x)).detach())
    evaluation = Objective(model, network.loss).at((x, network.targets))
    for approximation in (KFAC(GGN()), Diagonal(GGN())):
        with pytest.raises(UnsupportedLayerError, match=f"{first}: shared by .*whose other parameters differ"):
            approximation.estimate(evaluation)
    diagonal = Diagonal(GGN(), on_unsupported="diagonal").estimate(evaluation).diagonal()
    torch.testing.assert_close(diagonal, Exact(GGN()).estimate(evaluation).diagonal(), **CLOSE)


def test_a_cells_output_modified_in_place_is_made_again():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(2, 3)

        def forward(self, x):
            h = self.cell(x[:, 0])
            h += 1.0
            return self.cell(x[:, 1], h)

    torch.manual_seed(0)
    network = Network(Shifted().double(), nn.MSELoss(), torch.randn(4, 2, 2).double(), torch.randn(4, 3).double())
    evaluation = Objective(network.model, network.loss).at((network.inputs, network.targets))
    dense, blocks = network.ggn(), BlockDiagonal(GGN()).estimate(evaluation).to_dense()
    for layer in evaluation.layers:
        rows = layer.coordinates
        torch.testing.assert_close(blocks[rows][:, rows], dense[rows][:, rows], **CLOSE)


class Once(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.cell, self.in_place = nn.RNNCell(2, 3), in_place

    def forward(self, x):
        h = self.cell(x)
        return h.add_(1.0) if self.in_place else h + 1.0


def test_a_plain_cells_output_modified_in_place_is_made_again():
    """PyTorch's own gradient refuses this model, but statistics stop at the output and would be of the wrong one."""
    x, y = torch.randn(4, 2).double(), torch.randn(4, 3).double()
    blocks = []
    for in_place in (True, False):
        torch.manual_seed(0)
        objective = Objective(Once(in_place).double(), nn.MSELoss())
        blocks.append(BlockDiagonal(GGN()).estimate(objective.at((x, y), linearize=False)).to_dense())
    torch.testing.assert_close(*blocks, **CLOSE)


class OfPacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.readout = nn.LSTM(2, 3), nn.Linear(3, 2)

    def forward(self, sequences):
        return self.readout(self.layer(sequences)[1][0][-1])


def test_packed_sequences_are_inputs_and_parts_of_batches():
    torch.manual_seed(0)
    lengths = torch.tensor([2, 5, 1, 4])
    x, y = torch.randn(5, 4, 2).double(), torch.randint(2, (4,))
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    objective = Objective(OfPacked().double(), nn.CrossEntropyLoss())
    evaluation = objective.at((packed, y))
    assert evaluation.examples == 4
    rows = torch.tensor([3, 0])
    part, labels = take((packed, y), rows, 4)
    expected = pack_padded_sequence(x[:, rows], lengths[rows], enforce_sorted=False)
    torch.testing.assert_close(objective.at((part, labels)).outputs, objective.at((expected, y[rows])).outputs)
    torch.testing.assert_close(objective.at((part, labels)).outputs, evaluation.outputs[rows])
    loss = kfac(objective).step((packed, y)).loss
    assert kfac(objective).step((packed, y)).loss < loss
    evaluation = objective.at((packed, y))
    packed.data.add_(1.0)
    with pytest.raises(StaleEvaluationError, match="the batch"):
        evaluation.gradient()
