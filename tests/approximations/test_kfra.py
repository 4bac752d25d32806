"""KFRA against its recursion by brute force and against BackPACK's own, and what it refuses."""

import io

import pytest
import torch
from backpack import backpack, extend
from backpack import extensions as backpack_extensions
from cases import EVERY_LOSS, LOSSES, mlp, networks
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Network
from torch import nn

import curvlib
from curvlib import GGN, EmpiricalFisher, Fisher, Hessian, Objective, UnsupportedLayerError
from curvlib.approximations import KFAC, KFRA, BlockDiagonal, MovingAverage

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
NETWORKS = networks(activations=(nn.Tanh, nn.ReLU, nn.Sigmoid), positions=False, max_examples=5)


def block_by_brute_force(network, H_sum):
    """The recursion with Jacobians of every module and example from autograd; the examples' own, averaged."""
    x, calls = network.inputs, []
    for module in network.model:
        calls.append((module, x))
        x = module(x).detach()
    blocks, G = [], H_sum
    for module, a in reversed(calls):
        if isinstance(module, nn.Linear):
            columns = [*([a] if module.weight.requires_grad else [])]
            if module.bias is not None and module.bias.requires_grad:
                columns.append(torch.ones(len(a), 1).double())
            a_h = torch.cat(columns, 1)
            A = sum(row.outer(row) for row in a_h) / len(a_h)
            rows = torch.kron(G.contiguous(), A)
            order = torch.arange(len(rows)).view(len(G), len(A))
            # PyTorch has the weight first and then the bias
            order = torch.cat([order[:, : a.shape[1]].flatten(), order[:, a.shape[1] :].flatten()])
            blocks.insert(0, rows[order.unsqueeze(1), order])
        J = [torch.autograd.functional.jacobian(module, row.unsqueeze(0)).squeeze(2).squeeze(0) for row in a]
        G = sum(each.T @ G @ each for each in J) / len(J)
    return torch.block_diag(*blocks)


def loss_hessian_sum(network):
    outputs = network.outputs(network.theta)
    N, C = outputs.shape
    H = network.loss_hessian().reshape(N, C, N, C)
    return sum(H[n, :, n] for n in range(N))


@given(NETWORKS)
@settings(max_examples=30)
def test_it_equals_the_recursion_by_brute_force(network):
    # a final Softplus is not in BackPACK's KFRA
    if any(isinstance(module, nn.Softplus) for module in network.model):
        return
    ignored = getattr(network.loss, "ignore_index", None)
    if ignored is not None and isinstance(network.targets, torch.Tensor) and bool((network.targets == ignored).any()):
        return  # these have a test of their own
    evaluation = Objective(network.model, network.loss, l2=network.l2).at((network.inputs, network.targets))
    expected = block_by_brute_force(network, loss_hessian_sum(network))
    expected = expected + network.l2 * torch.eye(len(expected)).double()
    torch.testing.assert_close(KFRA().estimate(evaluation).to_dense(), expected, **CLOSE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", EVERY_LOSS[:-1], ids=lambda case: case.name)
def test_it_has_the_scale_of_every_loss(case, reduction):
    torch.manual_seed(0)
    model, x = mlp([3, 4, 3]), torch.randn(1, 3).double()
    z = model(x).detach()
    network = Network(model, case.make(z, reduction), x, case.targets(z))
    evaluation = Objective(model, network.loss).at((x, network.targets))
    exact = BlockDiagonal(GGN()).estimate(evaluation).to_dense()
    # exact for one example
    torch.testing.assert_close(KFRA().estimate(evaluation).to_dense(), exact, **CLOSE)
    torch.testing.assert_close(exact.diagonal(), network.ggn().diagonal(), **CLOSE)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Sigmoid])
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_backpacks_own_recursion(activation, bias):
    """In float32, as BackPACK's squared error has a float32 Hessian; its A has no homogeneous coordinate."""
    for loss, targets in ((nn.MSELoss(), torch.randn(6, 2)), (nn.CrossEntropyLoss(), torch.randint(2, (6,)))):
        torch.manual_seed(0)
        model, x = mlp([3, 4, 3, 2], activation, bias).float(), torch.randn(6, 3)
        C = KFRA().estimate(Objective(model, loss).at((x, targets)))
        with backpack(backpack_extensions.KFRA()):
            extend(loss)(extend(model)(x.requires_grad_()), targets).backward()
        for layer, block in zip([module for module in model if isinstance(module, nn.Linear)], C.blocks, strict=True):
            G, A = layer.weight.kfra
            d_in = layer.in_features
            torch.testing.assert_close(block.factors[0].matrix, G.detach(), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(block.factors[1].matrix[:d_in, :d_in], A.detach(), rtol=1e-5, atol=1e-7)


def test_it_is_exact_for_deep_linear_networks_with_squared_error():
    torch.manual_seed(0)
    objective = Objective(mlp([3, 4, 2, 3], nn.Identity), nn.MSELoss())
    evaluation = objective.at((torch.randn(7, 3).double(), torch.randn(7, 3).double()))
    exact = BlockDiagonal(GGN()).estimate(evaluation).to_dense()
    torch.testing.assert_close(KFRA().estimate(evaluation).to_dense(), exact, **CLOSE)


def test_it_differs_from_kfac_below_the_last_layer_alone():
    torch.manual_seed(0)
    objective = Objective(mlp([3, 4, 3]), nn.CrossEntropyLoss())
    evaluation = objective.at((torch.randn(8, 3).double() * 2, torch.randint(3, (8,))))
    kfra, kfac = (approximation.estimate(evaluation).to_dense() for approximation in (KFRA(), KFAC(GGN())))
    first = evaluation.layers[0].coordinates
    last = evaluation.layers[1].coordinates
    torch.testing.assert_close(kfra[last.unsqueeze(1), last], kfac[last.unsqueeze(1), last], **CLOSE)
    assert not torch.allclose(kfra[first.unsqueeze(1), first], kfac[first.unsqueeze(1), first], rtol=1e-2)


@pytest.mark.parametrize("matrix", [Fisher(samples=2), EmpiricalFisher()], ids=str)
def test_other_matrices_put_their_vectors_in_place_of_the_hessian(matrix):
    torch.manual_seed(0)
    model, x, y = mlp([3, 4, 3]), torch.randn(5, 3).double(), torch.randint(3, (5,))
    evaluation = Objective(model, nn.CrossEntropyLoss()).at((x, y))
    vectors = list(matrix.vectors(evaluation, torch.Generator().manual_seed(1)))
    network = Network(model, nn.CrossEntropyLoss(), x, y)
    expected = block_by_brute_force(network, sum(v.T @ v for v in vectors))
    C = KFRA(matrix).estimate(evaluation, torch.Generator().manual_seed(1))
    torch.testing.assert_close(C.to_dense(), expected, **CLOSE)


@given(st.sampled_from(["first weight", "first bias", "middle layer", "last layer"]))
@settings(max_examples=8)
def test_frozen_parameters_have_no_block_but_a_place_in_the_recursion(frozen):
    torch.manual_seed(0)
    model, x, y = mlp([3, 4, 2, 3]), torch.randn(5, 3).double(), torch.randint(3, (5,))
    whole = KFRA().estimate(Objective(model, nn.CrossEntropyLoss()).at((x, y))).to_dense()
    of = {"first weight": [model[0].weight], "first bias": [model[0].bias]}
    chosen = (of | {"middle layer": list(model[2].parameters()), "last layer": list(model[4].parameters())})[frozen]
    kept = torch.cat([torch.full((p.numel(),), all(p is not q for q in chosen)) for p in model.parameters()])
    for parameter in chosen:
        parameter.requires_grad_(False)
    C = KFRA().estimate(Objective(model, nn.CrossEntropyLoss()).at((x, y))).to_dense()
    torch.testing.assert_close(C, whole[kept][:, kept], **CLOSE)


def test_examples_without_a_target_do_not_count():
    model, x, y = mlp([3, 4, 3]), torch.randn(9, 3).double(), torch.randint(3, (9,))
    objective, kept = Objective(model, nn.CrossEntropyLoss()), torch.tensor([0, 2, 3, 7])
    ignored = torch.full_like(y, -100).index_copy(0, kept, y[kept])
    results = [KFRA().estimate(objective.at(batch)) for batch in ((x, ignored), (x[kept], y[kept]))]
    torch.testing.assert_close(results[0].to_dense(), results[1].to_dense(), **CLOSE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", LOSSES[:3], ids=lambda case: case.name)
def test_estimate_over_equals_one_large_batch(case, reduction):
    torch.manual_seed(3)
    model, x = mlp([3, 4, 3]), torch.randn(10, 3).double()
    y = case.targets(model(x).detach())
    objective = Objective(model, case.make(model(x).detach(), reduction), l2=0.2)
    expected = KFRA().estimate(objective.at((x, y))).to_dense()
    C = KFRA().estimate_over(objective, list(zip(x.split(4), y.split(4), strict=True)), progress=False)
    torch.testing.assert_close(C.to_dense(), expected, **CLOSE)


def test_a_moving_average_its_state_and_the_preset():
    torch.manual_seed(0)
    objective = Objective(mlp([3, 4, 2]), nn.CrossEntropyLoss())
    evaluations = [objective.at((torch.randn(5, 3).double(), torch.randint(2, (5,)))) for _ in range(3)]
    average, other = MovingAverage(KFRA(), 0.5), MovingAverage(KFRA(), 0.5)
    for evaluation in evaluations[:2]:
        average.update(evaluation)
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for each in (average, other):
        each.update(evaluations[2])
    assert torch.equal(average.operator(objective).to_dense(), other.operator(objective).to_dense())
    optimizer = curvlib.optimizers.kfac(objective, curvature=KFRA(), statistics_fraction=1.0, model_fraction=1.0)
    batch = torch.randn(30, 3).double(), torch.randint(2, (30,))
    losses = [optimizer.step(batch).loss for _ in range(10)]
    assert losses[-1] < losses[0]


def test_nothing_is_left_on_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2), nn.Tanh()).double()
    for module in model.modules():
        module.note = "mine"
    before = [
        (set(vars(module)), len(module._forward_hooks), len(module._backward_hooks)) for module in model.modules()
    ]
    evaluation = Objective(model, nn.MSELoss()).at((torch.randn(5, 3).double(), torch.randn(5, 2).double()))
    KFRA().estimate(evaluation)
    after = [(set(vars(module)), len(module._forward_hooks), len(module._backward_hooks)) for module in model.modules()]
    assert after == before
    assert all(not hasattr(parameter, "kfra") for parameter in model.parameters())


def test_modules_in_place_and_those_that_change_nothing():
    torch.manual_seed(0)
    layers = nn.Linear(4, 4), nn.Linear(4, 2)
    plain = nn.Sequential(layers[0], nn.ReLU(), layers[1]).double()
    written = nn.Sequential(nn.Flatten(), layers[0], nn.Identity(), nn.Sequential(nn.ReLU(inplace=True)), layers[1])
    x, y = torch.randn(5, 2, 2).double(), torch.randint(2, (5,))
    results = [
        KFRA().estimate(Objective(model, nn.CrossEntropyLoss()).at((inputs, y))).to_dense()
        for model, inputs in ((plain, x.flatten(1)), (written, x))
    ]
    torch.testing.assert_close(*results, **CLOSE)


class Function(nn.Module):
    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x):
        return self.function(self.layers, x)


REFUSED_BY_THE_MODEL = {
    "module '1' is a Softplus": lambda: nn.Sequential(nn.Linear(3, 2), nn.Softplus()),
    "module '1' is a LayerNorm": lambda: nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)),
    "module '1' is a Conv1d": lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Flatten()),
    "module '1' is a Dropout": lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)),
    "no layer rule for Bilinear": lambda: nn.Sequential(nn.Bilinear(3, 3, 2)),
    "layer 'layers.0' is shared by layers.0, layers.1": lambda: tied(),
}
REFUSED_BY_ITS_CALLS = {
    "between the output of module 'layers.0' and module 'layers.1'": lambda: Function(
        lambda m, x: m[1](torch.tanh(m[0](x))), nn.Linear(3, 3), nn.Linear(3, 2)
    ),
    "between the output of module 'layers.1' and the model's outputs": lambda: Function(
        lambda m, x: m[1](m[0](x)) + 1.0, nn.Linear(3, 3), nn.Linear(3, 2)
    ),
    "between the output of module 'layers.0' and module 'layers.1' ": lambda: Function(
        lambda m, x: m[0](x) + m[1](x), nn.Linear(3, 2), nn.Linear(3, 2)
    ),
    "'layers.0' is called 2 times": lambda: Function(
        lambda m, x: m[1](m[0](m[0](x))), nn.Linear(3, 3), nn.Linear(3, 2)
    ),
    "'layers.1' is called 0 times": lambda: Function(lambda m, x: m[0](x), nn.Linear(3, 2), nn.Linear(3, 2)),
    "'0' turns": lambda: nn.Sequential(nn.Linear(3, 3), Function(lambda m, x: x), nn.Flatten(), nn.Linear(3, 2)),
}


def tied():
    model = Function(lambda m, x: m[1](m[0](x)), nn.Linear(3, 3), nn.Linear(3, 3))
    model.layers[1].weight, model.layers[1].bias = model.layers[0].weight, model.layers[0].bias
    return model


@pytest.mark.parametrize("message", REFUSED_BY_THE_MODEL)
def test_other_modules_are_refused_by_name_before_any_computation(message):
    objective = Objective(REFUSED_BY_THE_MODEL[message]().double(), nn.MSELoss())
    with pytest.raises(UnsupportedLayerError, match=message):
        KFRA().check(objective)
    with pytest.raises(UnsupportedLayerError, match=message):
        KFRA().estimate_over(objective, [], progress=False)
    assert len(objective.describe(KFRA()).rows) == len(objective.layout.names)


@pytest.mark.parametrize("message", list(REFUSED_BY_ITS_CALLS)[:-1])
def test_calls_that_are_no_chain_are_refused_by_name(message):
    torch.manual_seed(0)
    objective = Objective(REFUSED_BY_ITS_CALLS[message]().double(), nn.MSELoss())
    evaluation = objective.at((torch.randn(4, 3).double(), torch.randn(4, 2).double()))
    with pytest.raises(UnsupportedLayerError, match=message):
        KFRA().estimate(evaluation)


def test_several_positions_and_the_hessian_are_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 2), nn.Flatten(), nn.Linear(4, 2)).double()
    evaluation = Objective(model, nn.MSELoss()).at((torch.randn(4, 2, 3).double(), torch.randn(4, 2).double()))
    with pytest.raises(UnsupportedLayerError, match=r"'0' turns \(4, 2, 3\) into \(4, 2, 2\)"):
        KFRA().estimate(evaluation)
    evaluation = Objective(nn.Linear(3, 2), nn.MSELoss()).at((torch.randn(4, 5, 3), torch.randn(4, 5, 2)))
    with pytest.raises(UnsupportedLayerError, match=r"outputs \(N, C\), got the shape \(4, 5, 2\)"):
        KFRA().estimate(evaluation)
    with pytest.raises(TypeError, match=r"KFRA needs vectors .* Hessian\(\) has products only"):
        KFRA(Hessian())


def test_a_lone_layer_and_the_description():
    torch.manual_seed(0)
    objective = Objective(nn.Linear(3, 2).double(), nn.MSELoss())
    evaluation = objective.at((torch.randn(4, 3).double(), torch.randn(4, 2).double()))
    exact = BlockDiagonal(GGN()).estimate(evaluation).to_dense()
    torch.testing.assert_close(KFRA().estimate(evaluation).to_dense(), exact, **CLOSE)
    assert objective.describe(KFRA()).rows[0].block == "Kronecker: A 4 x 4, recursive G 2 x 2"
