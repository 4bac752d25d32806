"""Per-example gradients put together from (a, g), and every exact block, equal autograd's for each layer and option."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_cases import (
    Attention,
    LayerCase,
    attentions,
    convolutions,
    embedding_bags,
    embeddings,
    norms,
    transposed_convolutions,
)
from oracles import Network
from recurrent_cases import recurrent_cells, recurrent_layers
from torch import nn

from curvlib import GGN, Objective, UnsupportedLayerError
from curvlib.approximations import KFAC, BlockDiagonal, Diagonal, Reduce
from curvlib.extensions import LookupFactors, uses

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
    "recurrent": recurrent_layers(),
    "recurrent cell": recurrent_cells(),
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
                positions = sum(use.indices.shape[1] for use in part.uses)
                one_hot = torch.zeros(part.examples, positions, part.map.columns, dtype=torch.float64)
                start = 0
                for use in part.uses:
                    one_hot[:, start : start + use.indices.shape[1]].scatter_add_(2, use.indices, use.coefficients)
                    start += use.indices.shape[1]
                torch.testing.assert_close(part.squared_inputs(), one_hot.square().sum((0, 1)), **EXACT)
            elif part.map.weight:
                moments, rows = part.moments(), part.inputs.flatten(0, 1)
                torch.testing.assert_close(moments.outer, torch.einsum("rgi,rgj->gij", rows, rows), **EXACT)
                torch.testing.assert_close(moments.total, rows.sum(0), **EXACT)
                assert moments.count == (len(rows) if part.valid is None else part.valid.sum())


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


@pytest.mark.parametrize("numbers", [1, 100])
@for_every_kind
@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_chunks_of_examples_add_up(cases, numbers, data):
    _, evaluation = evaluate(data.draw(cases))
    approximations = (KFAC(GGN()), KFAC(GGN(), weight_sharing=Reduce()), Diagonal(GGN()), BlockDiagonal(GGN()))
    whole = [approximation.estimate(evaluation).to_dense() for approximation in approximations]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uses, "_CHUNK_NUMBERS", numbers)
        parts = [approximation.estimate(evaluation).to_dense() for approximation in approximations]
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


class Asked(nn.Module):
    """A transposed convolution that is asked for the size of its output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.ConvTranspose2d(2, 3, 3, stride=3, padding=1)

    def forward(self, x):
        return self.layer(x, output_size=(6, 5))


def test_transposed_convolutions_follow_the_size_that_the_call_asks_for():
    case = LayerCase(Asked().double(), torch.randn(2, 2, 2, 2, dtype=torch.float64))
    network, evaluation = evaluate(case)
    assert evaluation.outputs.shape[2:] == (6, 5)
    dense = network.ggn()
    torch.testing.assert_close(BlockDiagonal(GGN()).estimate(evaluation).to_dense(), dense, **EXACT)
    torch.testing.assert_close(Diagonal(GGN()).estimate(evaluation).diagonal(), dense.diagonal(), **EXACT)


class Standardised(nn.Conv2d):
    """Overrides what its ``forward`` calls."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.norm(), bias)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Standardised(1, 1, 1), r"Standardised overrides Conv2d\._conv_forward"),
        (nn.Embedding(3, 2, max_norm=1.0), "max_norm changes its own rows"),
        (nn.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq has another gradient"),
        (nn.EmbeddingBag(3, 2, max_norm=1.0), "max_norm changes its own rows"),
        (nn.EmbeddingBag(3, 2, mode="max"), "no affine map"),
    ],
    ids=["conv forward", "max norm", "frequency", "bag max norm", "bag max"],
)
def test_options_that_no_rule_describes_are_refused_by_name(module, reason):
    with pytest.raises(UnsupportedLayerError, match=reason):
        KFAC(GGN()).check(Objective(nn.Sequential(module), nn.MSELoss()))


def test_dropout_inside_attention_is_refused_and_may_fall_back():
    model = nn.Sequential(Attending(nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)), nn.Linear(4, 2))
    objective = Objective(model, nn.MSELoss())
    batch = torch.randn(3, 2, 4), torch.randn(3, 2, 2)
    with pytest.raises(UnsupportedLayerError, match="draws random numbers"):
        KFAC(GGN()).estimate(objective.at(batch))
    evaluation = objective.at(batch)
    excluded = KFAC(GGN(), on_unsupported="exclude").estimate(evaluation)
    assert not excluded.diagonal()[objective.layout.slices["0.attention.in_proj_weight"]].any()
    assert "draws random numbers" in str(objective.describe(KFAC(GGN()), batch))
    model.eval()
    assert KFAC(GGN()).estimate(objective.at(batch)).diagonal().all()


@pytest.mark.parametrize("mask", [None, torch.tensor([[0.0, 1.0], [2.0, 0.0]])], ids=["no mask", "mask"])
def test_attention_under_autocast(mask):
    attention = Attention(nn.MultiheadAttention(4, 2, batch_first=True), {"attn_mask": mask})
    batch = (torch.randn(3, 2, 4),) * 3, torch.randn(3, 2, 4)
    objective = Objective(attention, nn.MSELoss())
    full = KFAC(GGN()).estimate(objective.at(batch)).to_dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = KFAC(GGN()).estimate(objective.at(batch)).to_dense()
    # bfloat16 keeps 8 bits: 2^-8 a rounding, some of them in a row
    assert (low - full).norm() < 16 * 2**-8 * full.norm()


def test_norms_with_a_shift_alone():
    norm = nn.LayerNorm(3)
    norm.weight = None
    network, evaluation = evaluate(LayerCase(nn.Sequential(nn.Linear(3, 3), norm).double(), torch.randn(2, 3).double()))
    torch.testing.assert_close(Diagonal(GGN()).estimate(evaluation).diagonal(), network.ggn().diagonal(), **EXACT)


def test_embeddings_with_sparse_gradients_are_as_others():
    results = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Linear(3, 2)).double()
        evaluation = Objective(model, nn.MSELoss()).at((torch.randint(5, (4,)), torch.randn(4, 2).double()))
        curvatures = [approximation.estimate(evaluation) for approximation in (KFAC(GGN()), Diagonal(GGN()))]
        results.append([evaluation.gradient(), *(C.diagonal() for C in curvatures)])
    torch.testing.assert_close(*results, **EXACT)
