"""Small copies of well-known architectures: every approximation right or refused by name, and training works."""

from collections.abc import Callable
from dataclasses import dataclass

import networks
import pytest
import torch
from oracles import Network
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvlib
from curvlib import GGN, Fisher, Objective, UnsupportedLayerError
from curvlib.approximations import KFAC, BlockDiagonal, Diagonal, Exact, Expand, PerLayer, Reduce
from curvlib.solvers import FactoredTikhonov, damped_inverse

# float64: sums over up to a thousand positions of numbers around 1
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


def images(channels, size):
    return lambda N: torch.randn(N, channels, size, size, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """An architecture, small enough for a dense matrix, with inputs and targets for N examples."""

    name: str
    make: Callable
    inputs: Callable
    targets: Callable

    def network(self, examples=2, **options):
        model = networks.with_statistics_of_their_own(self.make(**options))
        inputs = self.inputs(examples)
        return Network(model, nn.CrossEntropyLoss(), inputs, self.targets(inputs))

    def evaluate(self, examples=2, **options):
        network = self.network(examples, **options)
        return network, Objective(network.model, network.loss).at((network.inputs, network.targets))


def labels(classes):
    return lambda x: torch.randint(classes, (len(x),))


CASES = (
    Case("resnet-18", networks.resnet18, images(3, 32), labels(3)),
    Case("gpt", networks.GPT, lambda N: torch.randint(5, (N, 4)), lambda x: torch.randint(5, x.shape)),
    Case("vit", networks.ViT, images(2, 4), labels(3)),
    Case("u-net", networks.UNet, images(1, 4), lambda x: torch.randint(2, (len(x), 4, 4))),
    Case("mobilenet", networks.MobileNet, images(3, 6), labels(3)),
    Case("unrolled", networks.Unrolled, lambda N: torch.randn(N, 3, dtype=torch.float64), labels(2)),
)
BY_NAME = {case.name: case for case in CASES}
# 2800 parameters instead of 44000: a dense matrix of them takes 60 MB
SMALLEST = {"resnet-18": {"width": 1}}
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
for_every_model = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _differentiable_kernels():
    """PyTorch's fused attention has no second derivative, which exact products need."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@for_every_model
def test_diagonal_and_blocks_equal_brute_force(case):
    network, evaluation = case.evaluate(**SMALLEST.get(case.name, {}))
    dense = network.ggn()
    diagonal = Diagonal(GGN(), on_unsupported="diagonal").estimate(evaluation)
    torch.testing.assert_close(diagonal.diagonal(), dense.diagonal(), **CLOSE)
    blocks = BlockDiagonal(GGN(), on_unsupported="dense").estimate(evaluation).to_dense()
    places = [layer.coordinates for layer in evaluation.layers]
    places += [evaluation.layout.coordinates(name) for name in evaluation.plan.unsupported]
    assert sorted(torch.cat(places).tolist()) == list(range(len(dense)))
    expected = torch.zeros_like(dense)
    for place in places:
        expected[place.unsqueeze(1), place] = dense[place.unsqueeze(1), place]
    torch.testing.assert_close(blocks, expected, **CLOSE)


@for_every_model
def test_exact_products_equal_brute_force(case):
    network, evaluation = case.evaluate()
    J, outputs = network.jacobian(), evaluation.outputs
    V = torch.randn(J.shape[1], 2, dtype=torch.float64)
    moved = (J @ V).T.reshape(2, *outputs.shape)
    # the product of the loss's Hessian by two backward passes
    z = outputs.clone().requires_grad_()
    (first,) = torch.autograd.grad(network.loss_of_outputs(z), z, create_graph=True)
    curved = [torch.autograd.grad(first, z, x, retain_graph=True)[0].flatten() for x in moved]
    C = Exact(GGN()).estimate(evaluation)
    torch.testing.assert_close(C @ V, J.T @ torch.stack(curved, dim=1), **CLOSE)


@for_every_model
def test_per_example_gradients_are_rebuilt_from_the_factors(case):
    """At the architectures' own widths, where no dense matrix is possible."""
    network, evaluation = case.evaluate(examples=3)
    v = torch.randn_like(evaluation.outputs)
    rebuilt = torch.zeros(3, evaluation.layout.size, dtype=torch.float64)
    for factors in evaluation.layer_factors(v):
        rebuilt[:, factors.layer.coordinates] += torch.cat(list(factors.per_example_gradients()))
    parameters = list(network.named.values())
    outputs = network.model(network.inputs)
    for n in range(3):
        expected = torch.autograd.grad(outputs[n], parameters, v[n], retain_graph=True)
        for name, gradient in zip(network.named, expected, strict=True):
            if name not in evaluation.plan.unsupported:
                ours = rebuilt[n, evaluation.layout.coordinates(name)]
                torch.testing.assert_close(ours, gradient.flatten(), msg=lambda m, name=name: f"{name}: {m}", **CLOSE)


@for_every_model
@pytest.mark.parametrize("sharing", [Expand(), Reduce()], ids=["expand", "reduce"])
@pytest.mark.parametrize("solver", [damped_inverse, FactoredTikhonov()], ids=["damped_inverse", "factored"])
def test_kfac_steps_are_descent_directions(case, sharing, solver):
    network, evaluation = case.evaluate(examples=4)
    C = KFAC(GGN(), weight_sharing=sharing, on_unsupported="diagonal").estimate(evaluation)
    inverse, g = solver(C, 1e-2), evaluation.gradient()
    V = torch.randn(len(g), 8, dtype=torch.float64)
    assert (V * (inverse @ V)).sum(0).min() > 0
    torch.testing.assert_close(V.T @ (inverse @ V), (inverse @ V).T @ V, rtol=1e-6, atol=1e-8)
    step = -(inverse @ g)
    assert step.isfinite().all()
    slope = g @ step
    assert slope < 0
    # short enough for a straight line, long enough for float64
    t = 1e-3 / float(step.norm())
    change = evaluation.value_at(network.theta + t * step) - evaluation.value
    torch.testing.assert_close(change, t * slope, rtol=0.05, atol=0)


@for_every_model
def test_describe_names_every_parameter(case):
    network, evaluation = case.evaluate()
    approximation = KFAC(GGN(), on_unsupported="diagonal")
    description = evaluation.objective.describe(approximation, (network.inputs, network.targets))
    assert [row.parameter for row in description.rows] == list(network.named)
    lines = str(description).splitlines()[3:]
    for name, line in zip(network.named, lines, strict=True):
        owner = network.model.get_submodule(name.rpartition(".")[0])
        elementwise = isinstance(owner, NORMS) or name in evaluation.plan.unsupported
        assert line.split()[0] == name
        assert ("exact diagonal" if elementwise else "Kronecker: ") in line


@for_every_model
def test_estimates_over_batches_equal_one_large_batch(case):
    network, evaluation = case.evaluate(examples=4)
    x, y = network.inputs, network.targets
    for approximation in (KFAC(GGN(), on_unsupported="diagonal"), Diagonal(GGN(), on_unsupported="dense")):
        over = approximation.estimate_over(evaluation.objective, [(x[:3], y[:3]), (x[3:], y[3:])], progress=False)
        v = torch.randn(over.size, dtype=torch.float64)
        torch.testing.assert_close(over @ v, approximation.estimate(evaluation) @ v, **CLOSE)


@for_every_model
def test_a_few_steps_of_kfac_lower_the_loss(case):
    network = case.network(examples=16)
    objective = Objective(network.model, network.loss)
    curvature = KFAC(Fisher(samples=1), on_unsupported="diagonal")
    optimizer = curvlib.optimizers.kfac(objective, curvature=curvature)
    batch = network.inputs, network.targets
    losses = [optimizer.step(batch).loss for _ in range(8)]
    assert objective.value(batch) < 0.95 * losses[0]


@pytest.mark.parametrize("approximation", [KFAC(GGN()), BlockDiagonal(GGN()), Diagonal(GGN())], ids=lambda a: str(a))
@pytest.mark.parametrize("name", ["resnet-18", "mobilenet"])
def test_batch_norm_in_training_mode_is_refused_by_name(name, approximation):
    network = BY_NAME[name].network(examples=3)
    network.model.train()
    objective = Objective(network.model, network.loss)
    with pytest.raises(UnsupportedLayerError, match=r"of layer '[\w.]+'.*model\.eval\(\) for batch normalisation"):
        approximation.estimate(objective.at((network.inputs, network.targets)))
    # the exact products need no layers: batch norm in training mode is a function like any other
    C = Exact(GGN()).estimate(objective.at((network.inputs, network.targets)))
    assert (C @ torch.ones(C.size, dtype=torch.float64)).isfinite().all()


def test_statistics_leave_the_buffers_and_parameters_alone():
    network, evaluation = BY_NAME["mobilenet"].evaluate()
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    KFAC(GGN()).estimate(evaluation)
    for name, value in network.model.state_dict().items():
        assert torch.equal(value, before[name])


def tied_parts(network):
    """The Jacobians (outputs, V, E) of the GPT with respect to its table as embedding and as head, one at a time."""
    model, table = network.model, network.model.embedding.weight.detach()

    def outputs(embedding, head):
        parameters = {"embedding.weight": embedding, "head.weight": head}
        return torch.func.functional_call(model, parameters, network.inputs, tie_weights=False).flatten()

    return torch.autograd.functional.jacobian(outputs, (table, table))


def test_exact_blocks_of_tied_embeddings_include_the_cross_terms():
    network, evaluation = BY_NAME["gpt"].evaluate()
    lookup, head = (J.flatten(1) for J in tied_parts(network))
    H = network.loss_hessian()
    cross = lookup.T @ H @ head
    expected = lookup.T @ H @ lookup + head.T @ H @ head + cross + cross.T
    assert cross.norm() > 0.05 * expected.norm()
    blocks = BlockDiagonal(GGN()).estimate(evaluation).to_dense()
    place = evaluation.layout.coordinates("embedding.weight")
    torch.testing.assert_close(blocks[place.unsqueeze(1), place], expected, **CLOSE)


@pytest.mark.parametrize("reduce", [False, True], ids=["expand", "reduce"])
def test_kfac_of_tied_embeddings_is_the_sum_of_two_kronecker_products(reduce):
    """Rows of the table are V tokens, columns E features: A (x) G for the lookups, G (x) A for the head."""
    network, evaluation = BY_NAME["gpt"].evaluate(examples=3)
    (_, lookup), (features, head) = (
        network.calls(module)[0] for module in (network.model.embedding, network.model.head)
    )
    one_hot, H = nn.functional.one_hot(network.inputs, 5).double(), network.loss_hessian()
    if reduce:
        one_hot, features = (a.mean(1, keepdim=True) for a in (one_hot, features))
        lookup, head = (J.sum(2, keepdim=True) for J in (lookup, head))
    # of the second moment of lookups K-FAC keeps the diagonal; without Reduce there is nothing else
    A_lookup, A_head = (torch.einsum("nti,ntj->ij", a, a) / a[..., 0].numel() for a in (one_hot, features))
    G_lookup, G_head = (torch.einsum("ontd,op,pnte->de", J, H, J).contiguous() for J in (lookup, head))
    expected = torch.kron(torch.diag(A_lookup.diagonal()), G_lookup) + torch.kron(G_head, A_head)
    sharing = Reduce() if reduce else Expand()
    kfac = KFAC(GGN(), weight_sharing=sharing).estimate(evaluation).to_dense()
    place = evaluation.layout.coordinates("embedding.weight")
    torch.testing.assert_close(kfac[place.unsqueeze(1), place], expected, **CLOSE)


def test_parameters_of_the_model_itself_are_refused_by_name_or_chosen_by_pattern():
    network, evaluation = BY_NAME["vit"].evaluate()
    with pytest.raises(UnsupportedLayerError, match=r"2 parameter\(s\): token: no layer rule for ViT.*positions: "):
        KFAC(GGN()).estimate(evaluation)
    dense = network.ggn()
    choices = [("token", BlockDiagonal(GGN())), ("positions", Diagonal(GGN())), (nn.LayerNorm, None)]
    C = PerLayer(choices, otherwise=KFAC(GGN())).estimate(evaluation).to_dense()
    token, positions, norm = (evaluation.layout.coordinates(name) for name in ("token", "positions", "ln.weight"))
    torch.testing.assert_close(C[token.unsqueeze(1), token], dense[token.unsqueeze(1), token], **CLOSE)
    expected = torch.diag(dense.diagonal()[positions])
    torch.testing.assert_close(C[positions.unsqueeze(1), positions], expected, **CLOSE)
    assert not C[norm].any()


def test_an_unrolled_layer_has_as_many_positions_as_calls():
    network, evaluation = BY_NAME["unrolled"].evaluate()
    rows = evaluation.objective.describe(KFAC(GGN()), (network.inputs, network.targets)).rows
    assert [row.calls for row in rows] == ["20", "20", "1", "1"]
    (factors, _) = evaluation.layer_factors(torch.ones_like(evaluation.outputs))
    assert factors.maps[0].a.shape == (2, 20, 1, 4)


class Broadcasting(networks.GPT):
    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.ln(self.blocks(x))).transpose(1, 2)


def test_positions_looked_up_once_for_all_examples_need_a_fallback():
    """One lookup (T, E) that broadcasts over the examples has no statistic of each example, whatever the sizes."""
    objective = Objective(Broadcasting().double(), nn.CrossEntropyLoss())
    for examples in (3, 4, 4):  # four are as many as there are positions: what was found before counts
        tokens = torch.randint(5, (examples, 4))
        with pytest.raises(UnsupportedLayerError, match=r"'positions'.*keep \(N, \.\.\.\)"):
            KFAC(GGN()).estimate(objective.at((tokens, tokens)))
        dense = Network(objective.model, nn.CrossEntropyLoss(), tokens, tokens).ggn()
        for approximation in (
            KFAC(GGN(), on_unsupported="diagonal"),
            PerLayer([("positions", Diagonal(GGN()))], otherwise=KFAC(GGN())),
        ):
            C = approximation.estimate(objective.at((tokens, tokens)))
            place = objective.layout.slices["positions.weight"]
            torch.testing.assert_close(C.diagonal()[place], dense.diagonal()[place], **CLOSE)


def test_as_many_examples_as_positions_at_first_are_refused():
    objective = Objective(Broadcasting().double(), nn.CrossEntropyLoss())
    tokens = torch.randint(5, (4, 4))
    for _ in range(2):
        with pytest.raises(UnsupportedLayerError, match="examples of a batch meet"):
            KFAC(GGN(), on_unsupported="diagonal").estimate(objective.at((tokens, tokens)))
    C = Exact(GGN()).estimate(objective.at((tokens, tokens)))
    v = torch.randn(C.size, dtype=torch.float64)
    dense = Network(objective.model, nn.CrossEntropyLoss(), tokens, tokens).ggn()
    torch.testing.assert_close(C @ v, dense @ v, **CLOSE)
