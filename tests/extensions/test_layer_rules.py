"""Per-example gradients put together from (a, g), and every exact block, equal autograd's for each layer and option."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_cases import attentions, convolutions, embedding_bags, embeddings, norms, transposed_convolutions
from oracles import Network
from torch import nn

from curvlib import GGN, Objective, UnsupportedLayerError
from curvlib.approximations import KFAC, BlockDiagonal, Diagonal
from curvlib.extensions import LookupFactors

# PyTorch's own word on its speed, not on its result
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# float64: sums of some hundred products of numbers around 1
EXACT = {"rtol": 1e-12, "atol": 1e-12}
CASES = {
    "convolution": convolutions(),
    "transposed convolution": transposed_convolutions(),
    "norm": norms(),
    "embedding": embeddings(),
    "embedding bag": embedding_bags(),
    "attention": attentions(),
}
for_every_kind = pytest.mark.parametrize("cases", CASES.values(), ids=CASES.keys())
drawn = settings(max_examples=40, suppress_health_check=list(HealthCheck))


def evaluate(case):
    """Half the squared error summed over outputs: H = I, so that the GGN is J^T J."""
    network = Network(case.module, nn.MSELoss(reduction="sum"), case.inputs, None)
    network.targets = torch.randn_like(network.outputs(network.theta)).detach()
    return network, Objective(case.module, network.loss).at((case.inputs, network.targets))


@for_every_kind
@drawn
@given(data=st.data())
def test_per_example_gradients_are_rebuilt_from_the_factors(cases, data):
    network, evaluation = evaluate(data.draw(cases))
    v = torch.randn_like(evaluation.outputs)
    rebuilt = torch.zeros(len(v), evaluation.layout.size, dtype=torch.float64)
    for factors in evaluation.layer_factors(v):
        rebuilt[:, factors.layer.coordinates] += torch.cat(list(factors.per_example_gradients()))
    J = network.jacobian().reshape(len(v), -1, evaluation.layout.size)
    torch.testing.assert_close(rebuilt, torch.einsum("no,nod->nd", v.flatten(1), J), **EXACT)


@for_every_kind
@drawn
@given(data=st.data())
def test_diagonal_and_blocks_equal_brute_force(cases, data):
    network, evaluation = evaluate(data.draw(cases))
    dense = network.ggn()
    torch.testing.assert_close(Diagonal(GGN()).estimate(evaluation).diagonal(), dense.diagonal(), **EXACT)
    blocks = BlockDiagonal(GGN()).estimate(evaluation).to_dense()
    for layer in evaluation.layers:
        rows, columns = layer.coordinates.unsqueeze(1), layer.coordinates
        torch.testing.assert_close(blocks[rows, columns], dense[rows, columns], **EXACT)


@for_every_kind
@drawn
@given(data=st.data())
def test_input_moments_are_those_of_the_inputs(cases, data):
    """Convolutions have a way of their own to the second moment of their patches, without the patches."""
    _, evaluation = evaluate(data.draw(cases))
    for factors in evaluation.layer_factors(torch.randn_like(evaluation.outputs)):
        for part in factors.maps:
            if isinstance(part, LookupFactors):
                one_hot = torch.zeros(part.examples, part.positions, part.map.columns, dtype=torch.float64)
                start = 0
                for use in part.uses:
                    one_hot[:, start : start + use.indices.shape[1]].scatter_add_(2, use.indices, use.coefficients)
                    start += use.indices.shape[1]
                torch.testing.assert_close(part.squared_inputs(), one_hot.square().sum((0, 1)), **EXACT)
            elif part.map.weight:
                moments, rows = part.moments(), part.inputs.flatten(0, 1)
                torch.testing.assert_close(moments.outer, torch.einsum("rgi,rgj->gij", rows, rows), **EXACT)
                torch.testing.assert_close(moments.total, rows.sum(0), **EXACT)
                assert moments.count == len(rows)


class Attending(nn.Module):
    """The attention of a sequence to itself."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("examples", [1, 2])  # the first dimension, which is none of examples
@pytest.mark.parametrize("approximation", [KFAC(GGN()), Diagonal(GGN())], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (lambda C: nn.Conv1d(C, C, 2), (4,)),
        (lambda C: nn.Conv2d(C, C, 2), (4, 3)),
        (lambda C: nn.ConvTranspose1d(C, C, 2), (4,)),
        (lambda C: nn.ConvTranspose2d(C, C, 2), (4, 3)),
        (lambda C: nn.InstanceNorm1d(C, affine=True), (4,)),
        (lambda C: nn.InstanceNorm2d(C, affine=True), (4, 3)),
        (lambda C: Attending(nn.MultiheadAttention(4, 2)), (4,)),
    ],
    ids=["conv1d", "conv2d", "transposed 1d", "transposed 2d", "instance norm 1d", "instance norm 2d", "attention"],
)
def test_inputs_without_a_dimension_of_examples_are_refused(kind, shape, approximation, examples):
    model, x = nn.Sequential(kind(examples)).double(), torch.randn(examples, *shape, dtype=torch.float64)
    evaluation = Objective(model, nn.MSELoss()).at((x, torch.zeros_like(model(x)).detach()))
    message = r"statistics need (the examples first|batches|both: keep \(N, \.\.\.\))"
    with pytest.raises((ValueError, UnsupportedLayerError), match=message):
        approximation.estimate(evaluation)
