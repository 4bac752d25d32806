"""TridiagonalKFAC: moments by autograd, the dense inverse of its definition, chains and what is none."""

import io
from itertools import pairwise

import pytest
import torch
from cases import LOSSES, mlp
from operator_cases import markov_covariance
from oracles import Network
from torch import nn

import curvlib
from curvlib import GGN, EmpiricalFisher, Fisher, Hessian, Objective, UnsupportedLayerError
from curvlib.approximations import KFAC, BlockDiagonal, MovingAverage, TridiagonalKFAC
from curvlib.operators import KroneckerMarkovChain
from curvlib.solvers import FactoredTikhonov, damped_inverse

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class Backwards(nn.Module):
    """Layers that are made in another order than they are called, one of them frozen, with functions in between."""

    def __init__(self):
        super().__init__()
        self.last, self.frozen, self.middle, self.first = (
            nn.Linear(4, 3), nn.Linear(2, 2), nn.Linear(2, 4, bias=False), nn.Linear(3, 2)
        )  # fmt: skip
        for parameter in self.parameters():  # far from linear, so that inputs are not nearly dependent
            nn.init.normal_(parameter, std=1.5)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        h = self.frozen(2 * torch.tanh(self.first(x))).tanh_()
        return self.last(torch.sin(self.middle(h) + 0.3) * 2)


def chains():
    torch.manual_seed(1)
    model = Backwards().double()
    yield "backwards", model, [model.first, model.middle, model.last]
    model = mlp([3, 4, 2, 3])
    yield "mlp", model, [model[0], model[2], model[4]]
    model = mlp([3, 3])
    yield "one layer", model, [model[0]]


CHAINS = {name: (model, layers) for name, model, layers in chains()}


def network_of(name, loss=None, l2=0.0):
    torch.manual_seed(2)
    loss = loss if loss is not None else nn.CrossEntropyLoss()
    return Network(CHAINS[name][0], loss, torch.randn(25, 3).double(), torch.randint(3, (25,)), l2)


def moments_by_autograd(network, layers):
    """(G, A) of the layers and of neighbours, from the Jacobians at every layer's outputs and the loss Hessian."""
    H, found = network.loss_hessian(), []
    for layer in layers:
        ((a, J),) = network.calls(layer)
        found.append((torch.cat([a, torch.ones(len(a), 1).double()], 1) if layer.bias is not None else a, J))

    def pair(one, other):
        G = torch.einsum("znp,zw,wnq->pq", one[1], H, other[1])
        return G, one[0].T @ other[0] / len(one[0])

    return [pair(each, each) for each in found], [pair(*both) for both in pairwise(found)]


def in_place(dense, coordinates):
    result = torch.zeros_like(dense)
    result[coordinates.unsqueeze(1), coordinates] = dense
    return result


def definition(moments, cross, coordinates):
    # torch.kron fails for some matrices that are not contiguous
    dense = ([torch.kron(G.contiguous(), A.contiguous()) for G, A in pairs] for pairs in (moments, cross))
    return in_place(markov_covariance(*dense), coordinates)


def coordinates_of(evaluation, layers):
    of = {layer.members[0]: layer.coordinates for layer in evaluation.layers}
    return torch.cat([of[layer] for layer in layers])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CHAINS)
def test_it_is_the_dense_matrix_of_its_own_definition(name, reduction):
    network, layers = network_of(name, nn.CrossEntropyLoss(reduction=reduction), 0.2), CHAINS[name][1]
    evaluation = Objective(network.model, network.loss, l2=0.2).at((network.inputs, network.targets))
    C = TridiagonalKFAC(GGN()).estimate(evaluation)
    moments, cross = moments_by_autograd(network, layers)
    expected = definition(moments, cross, coordinates_of(evaluation, layers))
    torch.testing.assert_close(C.to_dense(), expected + 0.2 * torch.eye(C.size).double(), **CLOSE)


@pytest.mark.parametrize("name", CHAINS)
def test_its_inverses_are_those_of_its_own_definition(name):
    network, layers = network_of(name), CHAINS[name][1]
    evaluation = Objective(network.model, network.loss, l2=0.05).at((network.inputs, network.targets))
    C, damping = TridiagonalKFAC(GGN()).estimate(evaluation), 0.1
    moments, cross = moments_by_autograd(network, layers)
    where, eye = coordinates_of(evaluation, layers), torch.eye(C.size).double()
    exact = torch.linalg.inv(definition(moments, cross, where) + (damping + 0.05) * eye)
    torch.testing.assert_close(damped_inverse(C, damping) @ eye, exact, rtol=1e-7, atol=1e-7)  # conjugate gradients
    damped, gamma = [], (damping + 0.05) ** 0.5
    for G, A in moments:
        pi = float((A.trace() / len(A)) / (G.trace() / len(G))) ** 0.5
        damped.append((G + gamma / pi * torch.eye(len(G)).double(), A + gamma * pi * torch.eye(len(A)).double()))
    factored = torch.linalg.inv(definition(damped, cross, where))
    torch.testing.assert_close(FactoredTikhonov()(C, damping).to_dense(), factored, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("matrix", [GGN(), Fisher(samples=3), EmpiricalFisher()], ids=str)
def test_blocks_on_the_diagonal_are_kfacs(matrix):
    network = network_of("mlp", l2=0.1)
    evaluation = Objective(network.model, network.loss, l2=0.1).at((network.inputs, network.targets))
    C, K = (a(matrix).estimate(evaluation, torch.Generator().manual_seed(3)) for a in (TridiagonalKFAC, KFAC))
    torch.testing.assert_close(C.diagonal(), K.diagonal(), **CLOSE)
    dense, kfac = C.to_dense(), K.to_dense()
    for layer in evaluation.layers:
        inside = layer.coordinates.unsqueeze(1), layer.coordinates
        torch.testing.assert_close(dense[inside], kfac[inside], **CLOSE)
    assert (dense - kfac).norm() > 0.1 * kfac.norm()


def test_one_layer_is_kfac():
    network = network_of("one layer", l2=0.1)
    evaluation = Objective(network.model, network.loss, l2=0.1).at((network.inputs, network.targets))
    C, K = (approximation(GGN()).estimate(evaluation) for approximation in (TridiagonalKFAC, KFAC))
    torch.testing.assert_close(C.to_dense(), K.to_dense(), **CLOSE)


@pytest.fixture(scope="module")
def autoencoder():
    """A small trained auto-encoder, its exact damped inverse, and the step of the exact matrix."""
    torch.manual_seed(0)
    model = mlp([6, 5, 3, 5, 6])
    x = (torch.randn(200, 3) @ torch.randn(3, 6)).double().sigmoid()
    objective = Objective(model, nn.BCEWithLogitsLoss(), l2=1e-4)
    optimizer = curvlib.optimizers.kfac(objective, statistics_fraction=1.0, model_fraction=1.0)
    losses = [optimizer.step((x, x)).loss for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]
    evaluation = objective.at((x, x))
    return evaluation, Network(model, nn.BCEWithLogitsLoss(), x, x, l2=1e-4).ggn()


@pytest.mark.parametrize("damping", [1e-1, 1e-2, 1e-3, 1e-4])
def test_its_inverse_is_nearer_to_the_exact_one_than_block_diagonal_kfacs(autoencoder, damping):
    evaluation, dense = autoencoder
    exact = torch.linalg.inv(dense + damping * torch.eye(len(dense)).double())

    def error(inverse):
        return float((inverse @ torch.eye(len(dense)).double() - exact).norm() / exact.norm())

    chain, blocks = (approximation(GGN()).estimate(evaluation) for approximation in (TridiagonalKFAC, KFAC))
    assert error(damped_inverse(chain, damping)) < 0.6 * error(damped_inverse(blocks, damping))
    exact_blocks = BlockDiagonal(GGN()).estimate(evaluation)
    assert error(damped_inverse(chain, damping)) < error(damped_inverse(exact_blocks, damping))
    assert error(FactoredTikhonov()(chain, damping)) < error(FactoredTikhonov()(blocks, damping))


def batches(reduction="mean", case=LOSSES[2]):
    torch.manual_seed(3)
    model, x = mlp([3, 4, 3]), torch.randn(10, 3).double()
    z = model(x).detach()
    y = case.targets(z)
    return Objective(model, case.make(z, reduction), l2=0.2), (x, y), list(zip(x.split(4), y.split(4), strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", LOSSES[:3], ids=lambda case: case.name)
def test_estimate_over_equals_one_large_batch(case, reduction):
    objective, whole, parts = batches(reduction, case)
    expected = TridiagonalKFAC(GGN()).estimate(objective.at(whole)).to_dense()
    C = TridiagonalKFAC(GGN()).estimate_over(objective, parts, progress=False)
    torch.testing.assert_close(C.to_dense(), expected, **CLOSE)


def test_examples_without_a_target_do_not_count():
    model, x, y = mlp([3, 4, 3]), torch.randn(9, 3).double(), torch.randint(3, (9,))
    objective, kept = Objective(model, nn.CrossEntropyLoss()), torch.tensor([0, 2, 3, 7])
    ignored = torch.full_like(y, -100).index_copy(0, kept, y[kept])
    results = [TridiagonalKFAC(GGN()).estimate(objective.at(at)) for at in ((x, ignored), (x[kept], y[kept]))]
    torch.testing.assert_close(results[0].to_dense(), results[1].to_dense(), **CLOSE)


def test_a_moving_average_and_its_state():
    objective, _, parts = batches()
    average, other = (MovingAverage(TridiagonalKFAC(EmpiricalFisher()), 0.5) for _ in range(2))
    for part in parts[:2]:
        average.update(objective.at(part))
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for each in (average, other):
        each.update(objective.at(parts[2]))
    assert torch.equal(average.operator(objective).to_dense(), other.operator(objective).to_dense())
    singles = [TridiagonalKFAC(EmpiricalFisher()).statistics(objective.at(part)) for part in parts]
    mean = (singles[0].times(0.5, 0.5) + singles[1].times(0.5, 0.5)).times(0.5, 0.5) + singles[2].times(0.5, 0.5)
    expected = TridiagonalKFAC(EmpiricalFisher()).operator(objective, mean).to_dense()
    torch.testing.assert_close(average.operator(objective).to_dense(), expected, **CLOSE)


def test_the_preset_trains_with_it_and_a_resumed_one_goes_on():
    def start():
        torch.manual_seed(0)
        model, x = mlp([6, 4, 2, 4, 6]), torch.randn(50, 6).double().sigmoid()
        objective = Objective(model, nn.BCEWithLogitsLoss())
        curvature = TridiagonalKFAC(Fisher())
        return x, curvlib.optimizers.kfac(objective, curvature=curvature, statistics_fraction=1.0, model_fraction=1.0)

    x, optimizer = start()
    losses = [optimizer.step((x, x)).loss for _ in range(12)]
    assert losses[-1] < losses[0]
    _, resumed = start()
    resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for mine, its in zip(resumed.objective.parameters, optimizer.objective.parameters, strict=True):
            mine.copy_(its)
    assert [optimizer.step((x, x)).loss for _ in range(3)] == [resumed.step((x, x)).loss for _ in range(3)]


def test_the_chain_is_one_operator_in_the_order_of_the_calls():
    network = network_of("backwards")
    evaluation = Objective(network.model, network.loss).at((network.inputs, network.targets))
    assert [layer.name for layer in evaluation.layer_chain()] == ["first", "middle", "last"]
    (block,) = TridiagonalKFAC(GGN()).estimate(evaluation).blocks
    assert isinstance(block, KroneckerMarkovChain)
    assert [tuple(G.shape) for G, _ in block.cross] == [(2, 4), (4, 3)]


class Module(nn.Module):
    """A model from a function and its layers."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def residual():
    return Module(lambda m, x: m.c((h := m.a(x)) + m.b(h)), a=nn.Linear(3, 3), b=nn.Linear(3, 3), c=nn.Linear(3, 2))


def skip_to_the_outputs():
    return Module(lambda m, x: m.b(h := m.a(x)) + h, a=nn.Linear(3, 2), b=nn.Linear(2, 2))


def two_branches():
    return Module(lambda m, x: m.a(x) * m.b(x), a=nn.Linear(3, 2), b=nn.Linear(3, 2))


def called_twice():
    return Module(lambda m, x: m.b(m.a(m.a(x).tanh())), a=nn.Linear(3, 3), b=nn.Linear(3, 2))


def dead_end():
    return Module(lambda m, x: (m.b(x), m.a(x))[1], a=nn.Linear(3, 2), b=nn.Linear(3, 2))


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    return model


def positions():
    return Module(lambda m, x: m.b(m.a(x.unsqueeze(1).expand(-1, 2, -1)).sum(1)), a=nn.Linear(3, 3), b=nn.Linear(3, 2))


def convolution():
    return nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(4, 2))


def grouped():
    return nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv1d(3, 3, 1, groups=3), nn.Flatten(), nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("make", "message", "by_the_model_alone"),
    [
        (residual, "the inputs of layer 'c' depend directly on the outputs of layers 'a' and 'b'", False),
        (skip_to_the_outputs, "the outputs of the model depend directly on the outputs of layers 'a' and 'b'", False),
        (two_branches, "the outputs of the model depend directly on the outputs of layers 'a' and 'b'", False),
        (called_twice, "layer 'a': it is called 2 times", False),
        (dead_end, "layer 'b': the outputs do not depend on it", False),
        (positions, "layer 'a' is used at several positions", False),
        (convolution, "layer '1' is used at several positions", False),
        (tied, "layer '0': its weight is shared by 0, 2", True),
        (grouped, "layer '1': Conv1d has 3 groups", True),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), "layer '1': LayerNorm scales and shifts", True),
        (lambda: Module(lambda m, x: m.a(x), a=nn.LSTMCell(3, 2)), "LSTMCell has several maps", True),
        (lambda: Module(lambda m, x: m.a(x, x), a=nn.Bilinear(3, 3, 2)), "a.weight: no layer rule for Bilinear", True),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_no_chain_is_refused_by_name(make, message, by_the_model_alone):
    torch.manual_seed(0)
    objective = Objective(make().double(), nn.MSELoss())
    if by_the_model_alone:
        with pytest.raises(UnsupportedLayerError, match=message):
            TridiagonalKFAC(GGN()).check(objective)
        assert any(row.block == "refused" for row in objective.describe(TridiagonalKFAC(GGN())).rows)
        return
    TridiagonalKFAC(GGN()).check(objective)
    evaluation = objective.at((torch.randn(4, 3).double(), torch.randn(4, 2).double()))
    with pytest.raises(UnsupportedLayerError, match=message):
        TridiagonalKFAC(GGN()).estimate(evaluation)


def test_embeddings_and_the_hessian_are_refused_by_name():
    words = Module(lambda m, x: m.b(m.a(x).sum(1)), a=nn.Embedding(5, 3), b=nn.Linear(3, 2))
    with pytest.raises(UnsupportedLayerError, match="the inputs of Embedding are lookups"):
        TridiagonalKFAC(GGN()).check(Objective(words, nn.MSELoss()))
    with pytest.raises(TypeError, match=r"TridiagonalKFAC needs vectors .* Hessian\(\) has products only"):
        TridiagonalKFAC(Hessian())


def test_describe():
    network = network_of("mlp")
    evaluation = Objective(network.model, network.loss).at((network.inputs, network.targets))
    rows = evaluation.objective.describe(TridiagonalKFAC(GGN())).rows
    assert rows[2].block == "Kronecker: A 5 x 5, G 2 x 2, with its neighbours'"
    assert TridiagonalKFAC(GGN()).describe(evaluation.objective, evaluation.plan).rows[0].calls == "1"
