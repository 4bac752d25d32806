"""Every approximation that is exact equals the dense matrix that torch.func computes by brute force."""

import pytest
import torch
from cases import EVERY_LOSS, mlp, networks
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Network
from torch import nn

from curvlib import GGN, EmpiricalFisher, Fisher, Hessian, Objective
from curvlib.approximations import KFAC, BlockDiagonal, Dense, Diagonal, Exact, Expand, Identity, Reduce

# float64 sums of a few hundred products of numbers around 1: rounding below 1e-13, with room for large logits.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def name_of(case):
    return case.name


def for_every_loss(test):
    """Some networks for each loss: left to chance alone, half of the losses would hardly be met."""
    some_networks = settings(max_examples=8)(given(data=st.data())(test))
    return pytest.mark.parametrize("case", EVERY_LOSS, ids=name_of)(some_networks)


def evaluate(network):
    objective = Objective(network.model, network.loss, l2=network.l2)
    return objective.at((network.inputs, network.targets))


def blocks_of(dense, evaluation):
    """The dense matrix with everything between different layers set to zero."""
    mask = torch.zeros_like(dense, dtype=torch.bool)
    for layer in evaluation.layers:
        mask[layer.coordinates.unsqueeze(1), layer.coordinates] = True
    return torch.where(mask, dense, 0.0)


@for_every_loss
def test_value_and_gradient(case, data):
    network = data.draw(networks(losses=(case,)))
    evaluation = evaluate(network)
    torch.testing.assert_close(evaluation.value, network.value(network.theta).detach(), **CLOSE)
    torch.testing.assert_close(evaluation.gradient(), network.gradient(), **CLOSE)


@for_every_loss
def test_exact_ggn_column_by_column(case, data):
    network = data.draw(networks(losses=(case,)))
    evaluation, dense = evaluate(network), network.ggn()
    C = Exact(GGN()).estimate(evaluation)
    torch.testing.assert_close(C @ torch.eye(C.size, dtype=torch.float64), dense, **CLOSE)
    torch.testing.assert_close(C @ torch.eye(C.size, dtype=torch.float64)[0], dense[0], **CLOSE)


@given(networks())
@settings(max_examples=40)
def test_quadratic_forms_need_no_backward_pass_and_are_right(network):
    evaluation, dense = evaluate(network), network.ggn()
    V = torch.randn(len(dense), 3, dtype=torch.float64)
    C = Exact(GGN()).estimate(evaluation)
    evaluation.jvp(V[:, 0])  # the first product of an objective may check itself by a backward pass
    evaluation._vjp = evaluation.vjp = None  # a quadratic form must not make a backward pass
    torch.testing.assert_close(C.quadratic_form(V), V.T @ dense @ V, **CLOSE)


@pytest.mark.parametrize("matrix", [GGN(), Hessian(), EmpiricalFisher()], ids=str)
def test_products_and_forms_of_no_columns(matrix):
    network = Network(mlp([2, 3]), nn.MSELoss(), torch.randn(4, 2).double(), torch.randn(4, 3).double())
    C = Exact(matrix).estimate(evaluate(network))
    none = torch.zeros(C.size, 0, dtype=torch.float64)
    assert (C @ none).shape == (C.size, 0)
    assert C.quadratic_form(none).shape == (0, 0)


@for_every_loss
def test_exact_hessian(case, data):
    network = data.draw(networks(losses=(case,)))
    evaluation, dense = evaluate(network), network.hessian().detach()
    C = Exact(Hessian()).estimate(evaluation)
    V = torch.randn(C.size, 2, dtype=torch.float64)
    torch.testing.assert_close(C.to_dense(), dense, **CLOSE)
    torch.testing.assert_close(C.quadratic_form(V), V.T @ dense @ V, **CLOSE)


@for_every_loss
def test_exact_empirical_fisher(case, data):
    network = data.draw(networks(losses=(case,)))
    evaluation = evaluate(network)
    scale = evaluation.objective.loss.scale(evaluation.outputs, network.targets)
    dense = network.empirical_fisher(scale)
    torch.testing.assert_close(Exact(EmpiricalFisher()).estimate(evaluation).to_dense(), dense, **CLOSE)
    torch.testing.assert_close(Dense(EmpiricalFisher()).estimate(evaluation).to_dense(), dense, **CLOSE)


@pytest.mark.parametrize(("reduction", "scale"), [("mean", 1 / 5), ("sum", 1.0)])
def test_empirical_fisher_is_the_sum_over_per_example_gradients(reduction, scale):
    model, x, y = mlp([3, 4, 3]), torch.randn(5, 3).double(), torch.tensor([0, 2, 1, 1, 0])
    objective = Objective(model, nn.CrossEntropyLoss(reduction=reduction))
    expected = 0
    for n in range(5):
        loss = nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1], reduction="sum")
        g = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])
        expected = expected + scale * g.outer(g)
    evaluation = objective.at((x, y))
    torch.testing.assert_close(Dense(EmpiricalFisher()).estimate(evaluation).to_dense(), expected, **CLOSE)
    layerwise = BlockDiagonal(EmpiricalFisher()).estimate(evaluation).to_dense()
    torch.testing.assert_close(layerwise, blocks_of(expected, evaluation), **CLOSE)


@for_every_loss
def test_dense_block_diagonal_and_diagonal_of_the_ggn(case, data):
    network = data.draw(networks(losses=(case,)))
    evaluation, dense = evaluate(network), network.ggn()
    torch.testing.assert_close(Dense(GGN()).estimate(evaluation).to_dense(), dense, **CLOSE)
    torch.testing.assert_close(
        BlockDiagonal(GGN()).estimate(evaluation).to_dense(), blocks_of(dense, evaluation), **CLOSE
    )
    diagonal = Diagonal(GGN()).estimate(evaluation)
    torch.testing.assert_close(diagonal.to_dense(), torch.diag(dense.diagonal()), **CLOSE)


@for_every_loss
def test_diagonal_and_blocks_of_the_empirical_fisher(case, data):
    network = data.draw(networks(losses=(case,)))
    evaluation = evaluate(network)
    dense = network.empirical_fisher(evaluation.objective.loss.scale(evaluation.outputs, network.targets))
    torch.testing.assert_close(
        BlockDiagonal(EmpiricalFisher()).estimate(evaluation).to_dense(), blocks_of(dense, evaluation), **CLOSE
    )
    torch.testing.assert_close(Diagonal(EmpiricalFisher()).estimate(evaluation).diagonal(), dense.diagonal(), **CLOSE)


@given(networks(positions=False, max_examples=1))
@settings(max_examples=40)
def test_kfac_is_exact_for_one_example(network):
    """With exact GGN vectors v_k, sum_k g_k a a^T g_k is A (x) G for a single a."""
    evaluation, dense = evaluate(network), network.ggn()
    kfac = KFAC(GGN()).estimate(evaluation)
    torch.testing.assert_close(kfac.to_dense(), blocks_of(dense, evaluation), **CLOSE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
def test_kfac_is_exact_for_deep_linear_networks_with_squared_error(reduction, bias):
    model = mlp([3, 4, 2, 3], nn.Identity, bias)
    network = Network(model, nn.MSELoss(reduction=reduction), torch.randn(7, 3).double(), torch.randn(7, 3).double())
    evaluation = evaluate(network)
    torch.testing.assert_close(
        KFAC(GGN()).estimate(evaluation).to_dense(), blocks_of(network.ggn(), evaluation), **CLOSE
    )


def test_kfac_expand_is_exact_for_deep_linear_networks_with_a_squared_error_at_each_position():
    network = Network(
        mlp([3, 4, 2], nn.Identity), nn.MSELoss(), torch.randn(4, 5, 3).double(), torch.randn(4, 5, 2).double()
    )
    evaluation = evaluate(network)
    dense = blocks_of(network.ggn(), evaluation)
    torch.testing.assert_close(KFAC(GGN(), weight_sharing=Expand()).estimate(evaluation).to_dense(), dense, **CLOSE)
    reduced = KFAC(GGN(), weight_sharing=Reduce()).estimate(evaluation).to_dense()
    assert not torch.allclose(reduced, dense, rtol=1e-2)


class SummedPositions(nn.Module):
    def forward(self, x):
        return x.sum(1)


def test_kfac_reduce_is_exact_for_deep_linear_networks_that_sum_their_positions():
    model = mlp([3, 4, 2], nn.Identity, final=[SummedPositions()])
    network = Network(model, nn.MSELoss(), torch.randn(4, 5, 3).double(), torch.randn(4, 2).double())
    evaluation = evaluate(network)
    dense = blocks_of(network.ggn(), evaluation)
    torch.testing.assert_close(KFAC(GGN(), weight_sharing=Reduce()).estimate(evaluation).to_dense(), dense, **CLOSE)
    assert not torch.allclose(KFAC(GGN()).estimate(evaluation).to_dense(), dense, rtol=1e-2)


def test_kfac_is_exact_for_constant_inputs_of_the_first_layer():
    inputs = torch.randn(1, 3).double().expand(6, 3).contiguous()
    network = Network(mlp([3, 4, 2]), nn.CrossEntropyLoss(), inputs, torch.tensor([0, 1, 1, 0, 1, 0]))
    evaluation = evaluate(network)
    kfac = KFAC(GGN()).estimate(evaluation).to_dense()
    torch.testing.assert_close(kfac, blocks_of(network.ggn(), evaluation), **CLOSE)


def test_kfac_is_not_exact_for_a_softmax_network():
    network = Network(mlp([3, 4, 3]), nn.CrossEntropyLoss(), torch.randn(6, 3).double() * 3, torch.randint(3, (6,)))
    evaluation = evaluate(network)
    kfac, dense = KFAC(GGN()).estimate(evaluation).to_dense(), blocks_of(network.ggn(), evaluation)
    error = (kfac - dense).norm() / dense.norm()
    assert error > 0.1


def fisher_draws(approximation, evaluation, draws):
    generator = torch.Generator().manual_seed(1)
    return torch.stack([approximation.estimate(evaluation, generator).to_dense() for _ in range(draws)])


def assert_mean_is(samples, expected):
    """Two-sided z-test of every entry; 5 standard errors leave a false alarm below 1e-4 for 100 entries."""
    error = samples.std(0) / len(samples) ** 0.5
    z = (samples.mean(0) - expected).abs() / error.clamp(min=1e-12 + 1e-9 * expected.abs())
    assert z.max() < 5, f"z = {z.max():.1f}"


def small_network(case):
    model, inputs = mlp([2, 2, 3], final=case.ending()), torch.randn(3, 2).double()
    outputs = model(inputs).detach()
    return Network(model, case.make(outputs, "mean"), inputs, case.targets(outputs))


@pytest.mark.parametrize("approximation", [Exact, Dense, BlockDiagonal, Diagonal])
@pytest.mark.parametrize("case", [case for case in EVERY_LOSS if case.likelihood and case.natural], ids=name_of)
def test_fisher_converges_to_the_ggn(approximation, case):
    network = small_network(case)
    evaluation = evaluate(network)
    dense = network.ggn()
    if approximation is BlockDiagonal:
        dense = blocks_of(dense, evaluation)
    if approximation is Diagonal:
        dense = torch.diag(dense.diagonal())
    assert_mean_is(fisher_draws(approximation(Fisher(samples=2)), evaluation, 200), dense)


@pytest.mark.parametrize("case", [case for case in EVERY_LOSS if not case.natural], ids=name_of)
def test_fisher_of_rates_converges_to_another_matrix_than_the_ggn(case):
    """For outputs that are Poisson rates r, the mean over 9 of them: Fisher J^T diag(1/r) J / 9, GGN with y/r^2."""
    network = small_network(case)
    J, rate = network.jacobian(), network.outputs(network.theta).detach().flatten()
    fisher = J.T @ torch.diag(1 / rate) @ J / 9
    assert_mean_is(fisher_draws(Exact(Fisher(samples=2)), evaluate(network), 400), fisher)
    assert not torch.allclose(fisher, network.ggn(), rtol=0.1)


@pytest.mark.parametrize("approximation", [Exact, KFAC, Diagonal])
@pytest.mark.parametrize("case", [case for case in EVERY_LOSS if not case.likelihood], ids=name_of)
def test_fisher_is_refused_without_a_likelihood(approximation, case):
    with pytest.raises(NotImplementedError, match=r"has no likelihood to draw labels from\. Use GGN\(\)"):
        approximation(Fisher()).estimate(evaluate(small_network(case)))


def test_fisher_draws_at_several_positions_are_unbiased():
    model = mlp([2, 3])
    network = Network(model, nn.MSELoss(), torch.randn(2, 3, 2).double(), torch.randn(2, 3, 3).double())
    evaluation = evaluate(network)
    assert_mean_is(fisher_draws(BlockDiagonal(Fisher()), evaluation, 800), network.ggn())


def test_the_spread_of_fisher_falls_with_the_number_of_samples():
    network = Network(mlp([2, 2, 3]), nn.CrossEntropyLoss(), torch.randn(3, 2).double(), torch.randint(3, (3,)))
    evaluation = evaluate(network)
    one, many = (fisher_draws(Diagonal(Fisher(samples=s)), evaluation, 100).var(0).sum() for s in (1, 25))
    assert 10 < one / many < 60  # 25 in expectation


def test_fisher_draws_follow_the_given_generator():
    network = Network(mlp([2, 3]), nn.CrossEntropyLoss(), torch.randn(9, 2).double(), torch.randint(3, (9,)))
    evaluation = evaluate(network)

    def estimate(seed):
        return KFAC(Fisher()).estimate(evaluation, torch.Generator().manual_seed(seed)).to_dense()

    assert torch.equal(estimate(0), estimate(0))
    assert not torch.equal(estimate(0), estimate(1))


def test_exact_keeps_its_fisher_draws_for_all_products():
    network = Network(mlp([2, 3]), nn.CrossEntropyLoss(), torch.randn(9, 2).double(), torch.randint(3, (9,)))
    C = Exact(Fisher()).estimate(evaluate(network))
    v = torch.randn(C.size).double()
    assert torch.equal(C @ v, C @ v)


def test_identity():
    network = Network(mlp([2, 3]), nn.MSELoss(), torch.randn(4, 2).double(), torch.randn(4, 3).double(), l2=0.5)
    torch.testing.assert_close(Identity().estimate(evaluate(network)).to_dense(), 1.5 * torch.eye(9).double())


@given(st.integers(1, 3), st.booleans())
@settings(max_examples=10)
def test_dead_layers_have_zero_curvature(depth, bias):
    """A layer that the outputs do not depend on gets a zero block, not a missing one."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 3, bias=bias), nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))

        def forward(self, x):
            for layer in self.unused:
                layer(x)
            return self.used(x)

    network = Network(Branches().double(), nn.MSELoss(), torch.randn(4, 2).double(), torch.randn(4, 3).double())
    evaluation = evaluate(network)
    for approximation in (KFAC(GGN()), Diagonal(GGN()), BlockDiagonal(GGN()), Exact(GGN())):
        C = approximation.estimate(evaluation).to_dense()
        torch.testing.assert_close(C.diagonal(), network.ggn().diagonal(), **CLOSE)
