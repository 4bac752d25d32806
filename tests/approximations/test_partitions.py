"""Block-diagonal approximations of any partition: every block is that of the dense matrix, or its leading part."""

import networks as architectures
import pytest
import torch
from cases import LOSSES, mlp, networks
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Network
from torch import nn

from curvlib import GGN, EmpiricalFisher, Objective, UnsupportedLayerError
from curvlib.approximations import (
    BlockDiagonal,
    ByGroups,
    ByLabel,
    ByLayer,
    ByOutputUnit,
    ByParameter,
    DenseBlocks,
    Diagonal,
    LowRank,
    LowRankBlocks,
    MovingAverage,
    PerLayer,
    Statistics,
)
from curvlib.extensions import uses
from curvlib.operators import BlockDiagonal as BlockDiagonalOperator
from curvlib.operators import KroneckerStack
from curvlib.solvers import damped_inverse

CLOSE = {"rtol": 1e-8, "atol": 1e-10}


def evaluate(network):
    return Objective(network.model, network.loss, l2=network.l2).at((network.inputs, network.targets))


def masked(dense, labels):
    """The dense matrix between coordinates with the same label, zero elsewhere."""
    labels = torch.tensor(labels)
    return torch.where(labels.unsqueeze(1) == labels, dense, 0.0)


def labels_by(layout, label):
    """For every coordinate the number that a function of its parameter's name gives."""
    return [label(name) for name, numel in zip(layout.names, layout.numels, strict=True) for _ in range(numel)]


def units_of(network, evaluation):
    """For every coordinate of a network of linear layers and convolutions its output unit, from shapes alone."""
    labels, layout = [], evaluation.layout
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        layer = name.rpartition(".")[0]
        labels += [hash((layer, unit)) for unit in range(shape[0]) for _ in range(shape[1:].numel())]
    return labels


def first_letter(name):
    return name[0]


@given(data=st.data())
@settings(max_examples=25)
@pytest.mark.parametrize("matrix", [GGN(), EmpiricalFisher()], ids=str)
def test_blocks_are_those_of_the_dense_matrix(matrix, data):
    network = data.draw(networks())
    evaluation = evaluate(network)
    layout, names = evaluation.layout, evaluation.layout.names
    if matrix == GGN():
        dense = network.ggn()
    else:
        dense = network.empirical_fisher(evaluation.objective.loss.scale(evaluation.outputs, network.targets))
    cut = data.draw(st.integers(1, len(names)))
    groups = [names[cut - 1 :: -1], names[cut:]] if cut < len(names) else [names]
    for partition, labels in (
        (ByParameter(), labels_by(layout, hash)),
        (ByOutputUnit(), units_of(network, evaluation)),
        (ByGroups(groups), labels_by(layout, lambda name: name in groups[0])),
        (ByLabel(lambda name: name.endswith("bias")), labels_by(layout, lambda name: name.endswith("bias"))),
        (ByGroups([["*"]]), [0] * layout.size),
        (ByLayer(), labels_by(layout, lambda name: hash(name.rpartition(".")[0]))),
    ):
        C = BlockDiagonal(matrix, partition=partition).estimate(evaluation)
        torch.testing.assert_close(C.to_dense(), masked(dense, labels), **CLOSE)


class LastState(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(2, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


CONVOLUTIONS = (
    lambda: nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)),
    lambda: torch.randn(3, 2, 3, 3).double(),
    lambda: torch.randint(3, (3,)),
)
MODELS = {
    "grouped convolution": CONVOLUTIONS,
    "lstm": (LastState, lambda: torch.randn(3, 4, 2).double(), lambda: torch.randint(3, (3,))),
    "u-net": (architectures.UNet, lambda: torch.randn(2, 1, 4, 4).double(), lambda: torch.randint(2, (2, 4, 4))),
    "gpt": (architectures.GPT, lambda: torch.randint(5, (2, 4)), lambda: torch.randint(5, (2, 4))),
    "vit": (architectures.ViT, lambda: torch.randn(2, 2, 4, 4).double(), lambda: torch.randint(3, (2,))),
}


def model_of(name):
    torch.manual_seed(0)
    make, inputs, targets = MODELS[name]
    return Network(make().double(), nn.CrossEntropyLoss(), inputs(), targets())


@pytest.mark.parametrize("name", MODELS)
def test_blocks_that_span_layers_of_real_models(name):
    """Attention's projections, tied weights, norms and parameters outside of every layer."""
    network = model_of(name)
    evaluation, dense = evaluate(network), network.ggn()
    layout = evaluation.layout
    for partition, label in (
        (ByParameter(), hash),
        (ByLabel(first_letter), lambda name: ord(name[0])),
        (ByGroups([["*"]]), lambda name: 0),
    ):
        C = BlockDiagonal(GGN(), partition=partition, on_unsupported="dense").estimate(evaluation)
        torch.testing.assert_close(C.to_dense(), masked(dense, labels_by(layout, label)), **CLOSE)


@pytest.mark.parametrize("numbers", [1, 60], ids="{} numbers".format)
def test_gradients_made_in_chunks_of_examples(numbers, monkeypatch):
    network = Network(mlp([3, 4, 2]), nn.CrossEntropyLoss(), torch.randn(7, 3).double(), torch.randint(2, (7,)))
    evaluation, dense = evaluate(network), network.ggn()
    monkeypatch.setattr(uses, "_CHUNK_NUMBERS", numbers)
    for blocks in (DenseBlocks(), LowRankBlocks(26)):
        whole = BlockDiagonal(GGN(), partition=ByGroups([["*"]]), blocks=blocks).estimate(evaluation)
        torch.testing.assert_close(whole.to_dense(), dense, **CLOSE)
        units = BlockDiagonal(GGN(), partition=ByOutputUnit(), blocks=blocks).estimate(evaluation)
        torch.testing.assert_close(units.to_dense(), masked(dense, units_of(network, evaluation)), **CLOSE)
    torch.testing.assert_close(LowRank(GGN()).estimate(evaluation).to_dense(), dense, **CLOSE)


def test_output_units_of_a_grouped_convolution_are_one_batched_operator():
    network = model_of("grouped convolution")
    evaluation = evaluate(network)
    C = BlockDiagonal(GGN(), partition=ByOutputUnit()).estimate(evaluation)
    torch.testing.assert_close(C.to_dense(), masked(network.ggn(), units_of(network, evaluation)), **CLOSE)
    assert [type(block) for block in C.blocks] == [KroneckerStack, KroneckerStack]
    gradient = evaluation.gradient()
    expected = torch.linalg.solve(C.to_dense() + 0.1 * torch.eye(C.size).double(), gradient)
    torch.testing.assert_close(damped_inverse(C, 0.1) @ gradient, expected, **CLOSE)


def test_scales_and_shifts_of_a_norm_are_pairs():
    torch.manual_seed(0)
    network = Network(
        nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)).double(),
        nn.MSELoss(), torch.randn(4, 3).double(), torch.randn(4, 2).double(),
    )  # fmt: skip
    evaluation = evaluate(network)
    C = BlockDiagonal(GGN(), partition=ByOutputUnit()).estimate(evaluation)
    torch.testing.assert_close(C.to_dense(), masked(network.ggn(), units_of(network, evaluation)), **CLOSE)


@pytest.mark.parametrize("fallback", ["diagonal", "dense", "exclude", "raise"])
@pytest.mark.parametrize("partition", [ByGroups([["*"]]), ByParameter(), ByLayer(), ByOutputUnit()], ids=str)
@pytest.mark.parametrize("blocks", [DenseBlocks(), LowRankBlocks(1000)], ids=str)
def test_parameters_outside_every_layer(partition, fallback, blocks):
    network = model_of("vit")
    evaluation, dense = evaluate(network), network.ggn()
    approximation = BlockDiagonal(GGN(), partition=partition, blocks=blocks, on_unsupported=fallback)
    if fallback == "raise":
        with pytest.raises(UnsupportedLayerError, match="token"):
            approximation.estimate(evaluation)
        return
    C, layout = approximation.estimate(evaluation).to_dense(), evaluation.layout
    inside = torch.ones(layout.size, dtype=torch.bool)
    for name in ("token", "positions"):
        place = layout.slices[name]
        inside[place] = False
        expected = {"diagonal": dense[place, place].diagonal().diag(), "dense": dense[place, place]}
        torch.testing.assert_close(C[place, place], expected.get(fallback, torch.zeros_like(C[place, place])), **CLOSE)
        if fallback != "dense":
            assert not C[place][:, inside].any()
    if partition == ByGroups([["*"]]):
        torch.testing.assert_close(C[inside][:, inside], dense[inside][:, inside], **CLOSE)
    assert layout.names == tuple(row.parameter for row in evaluation.objective.describe(approximation).rows)


@pytest.mark.parametrize("partition", [ByLayer(), ByOutputUnit(), ByParameter(), ByGroups([["*"]])], ids=str)
@pytest.mark.parametrize("matrix", [GGN(), EmpiricalFisher()], ids=str)
def test_low_rank_blocks_are_exact_up_to_their_rank(partition, matrix):
    network = Network(mlp([3, 4, 2]), nn.CrossEntropyLoss(), torch.randn(5, 3).double(), torch.randint(2, (5,)), 0.3)
    evaluation = evaluate(network)
    dense = BlockDiagonal(matrix, partition=partition).estimate(evaluation).to_dense()
    low = BlockDiagonal(matrix, partition=partition, blocks=LowRankBlocks(5)).estimate(evaluation)
    torch.testing.assert_close(low.to_dense(), dense, **CLOSE)
    eye = torch.eye(len(dense), dtype=torch.float64)
    torch.testing.assert_close(damped_inverse(low, 0.1) @ (dense + 0.1 * eye), eye, **CLOSE)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("partition", [ByLayer(), ByOutputUnit(), ByGroups([["*"]])], ids=str)
def test_low_rank_blocks_of_one_batch_and_vector_are_the_best_of_their_rank(partition, rank):
    network = Network(mlp([3, 4, 2]), nn.CrossEntropyLoss(), torch.randn(9, 3).double(), torch.randint(2, (9,)))
    evaluation = evaluate(network)
    dense = BlockDiagonal(EmpiricalFisher(), partition=partition).estimate(evaluation)
    low = BlockDiagonal(EmpiricalFisher(), partition=partition, blocks=LowRankBlocks(rank)).estimate(evaluation)
    units = [block.to_dense() for block in dense.blocks]
    # block by block, the units of a stack one by one
    parts = [M for M, block in zip(units, dense.blocks, strict=True) for M in _unstacked(M, block)]
    mine = [
        M for block, exact in zip(low.blocks, dense.blocks, strict=True) for M in _unstacked(block.to_dense(), exact)
    ]
    for M, expected in zip(mine, parts, strict=True):
        e, Q = torch.linalg.eigh(expected)
        torch.testing.assert_close(M, (Q[:, -rank:] * e[-rank:]) @ Q[:, -rank:].T, **CLOSE)


def _unstacked(M, block):
    count = block.block_count if isinstance(block, KroneckerStack) else 1
    n = len(M) // count
    return [M[i * n : (i + 1) * n, i * n : (i + 1) * n] for i in range(count)]


def test_low_rank_blocks_never_exceed_the_exact_ones_and_average():
    """TONGA: a decaying sum of which the leading directions are kept; with enough of them it is that of the blocks."""
    torch.manual_seed(4)
    model, x, y = mlp([3, 4, 2]), torch.randn(12, 3).double(), torch.randint(2, (12,))
    objective = Objective(model, nn.CrossEntropyLoss(), l2=0.1)
    batches = list(zip(x.split(4), y.split(4), strict=True))
    for partition in (ByLayer(), ByOutputUnit(), ByGroups([["*"]])):
        dense, full, short = (
            BlockDiagonal(EmpiricalFisher(), partition=partition, blocks=blocks)
            for blocks in (DenseBlocks(), LowRankBlocks(12), LowRankBlocks(2))
        )
        exact, same, part = (MovingAverage(a, decay=0.5) for a in (dense, full, short))
        for batch in batches:
            for average in (exact, same, part):
                average.update(objective.at(batch))
        expected = exact.operator(objective).to_dense()
        torch.testing.assert_close(same.operator(objective).to_dense(), expected, **CLOSE)
        difference = torch.linalg.eigvalsh(expected - part.operator(objective).to_dense())
        assert difference.min() > -1e-12
        assert difference.max() > 1e-6
        over = full.estimate_over(objective, batches, progress=False).to_dense()
        torch.testing.assert_close(over, dense.estimate(objective.at((x, y))).to_dense(), **CLOSE)
        resumed = MovingAverage(short, decay=0.5)
        resumed.load_state_dict(part.state_dict())
        assert torch.equal(resumed.operator(objective).to_dense(), part.operator(objective).to_dense())


@given(st.integers(0, 5), st.integers(0, 5), st.integers(1, 4), st.integers(1, 6))
def test_roots_add_up_to_the_leading_part(n, m, rank, d):
    F, H = torch.randn(2, n, d).double(), torch.randn(2, m, d).double()
    if n > rank:
        return  # a root has no more rows than its rank
    F = nn.functional.pad(F, (0, 0, 0, rank - n))
    total = (Statistics(roots={"x": F}) + Statistics(roots={"x": H})).roots["x"]
    assert total.shape == (2, rank, d)
    e, Q = torch.linalg.eigh(F.mT @ F + H.mT @ H)
    best = (Q[..., -rank:] * e[..., -rank:].unsqueeze(1)) @ Q[..., -rank:].mT
    torch.testing.assert_close(total.mT @ total, best, rtol=1e-10, atol=1e-12)
    quarter = Statistics(roots={"x": F}).times(7.0, 0.25).roots["x"]
    torch.testing.assert_close(quarter, F / 2)


def test_memory_of_low_rank_blocks_is_linear():
    network = Network(mlp([20, 20, 2]), nn.CrossEntropyLoss(), torch.randn(9, 20).double(), torch.randint(2, (9,)))
    statistics = BlockDiagonal(EmpiricalFisher(), blocks=LowRankBlocks(2)).statistics(evaluate(network))
    assert [tuple(F.shape) for F in statistics.roots.values()] == [(1, 2, 420), (1, 2, 42)]
    assert not statistics.sums


@pytest.mark.parametrize("case", LOSSES[:2], ids=lambda case: case.name)
def test_partitions_over_a_loader(case):
    torch.manual_seed(3)
    model, inputs = mlp([3, 4, 3]), torch.randn(10, 3).double()
    targets = case.targets(model(inputs).detach())
    objective = Objective(model, case.make(model(inputs), "mean"), l2=0.2)
    batches = list(zip(inputs.split(4), targets.split(4), strict=True))
    for partition in (ByOutputUnit(), ByParameter(), ByGroups([["0.*", "2.bias"], ["2.weight"]])):
        approximation = BlockDiagonal(GGN(), partition=partition)
        whole = approximation.estimate(objective.at((inputs, targets))).to_dense()
        over = approximation.estimate_over(objective, batches, progress=False).to_dense()
        torch.testing.assert_close(over, whole, **CLOSE)


def test_dead_layers_have_zero_blocks():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 3), nn.Linear(2, 2)

        def forward(self, x):
            self.unused(x)
            return self.used(x)

    network = Network(Branches().double(), nn.MSELoss(), torch.randn(4, 2).double(), torch.randn(4, 3).double())
    for partition in (ByParameter(), ByOutputUnit(), ByGroups([["*"]]), ByLabel(first_letter)):
        for blocks in (DenseBlocks(), LowRankBlocks(12)):
            C = BlockDiagonal(GGN(), partition=partition, blocks=blocks).estimate(evaluate(network)).to_dense()
            torch.testing.assert_close(C.diagonal(), network.ggn().diagonal(), **CLOSE)


def test_descriptions_name_the_blocks():
    objective = Objective(mlp([3, 4, 2]), nn.CrossEntropyLoss())

    def blocks(**options):
        return [row.block for row in objective.describe(BlockDiagonal(GGN(), **options)).rows]

    assert blocks() == ["dense 16 x 16"] * 2 + ["dense 10 x 10"] * 2
    assert blocks(partition=ByOutputUnit())[0] == "4 times dense 4 x 4"
    assert blocks(partition=ByParameter())[1:3] == ["0.bias: dense 4 x 4", "2.weight: dense 8 x 8"]
    assert (
        blocks(partition=ByGroups([["*.bias"], ["*.weight"]]), blocks=LowRankBlocks(3))
        == [
            "group 1: rank 3 of 20 x 20",
            "group 0: rank 3 of 6 x 6",
        ]
        * 2
    )
    assert "first_letter" in repr(BlockDiagonal(GGN(), partition=ByLabel(first_letter)))
    assert "0x" not in repr(ByLabel(first_letter))


def test_partitions_in_a_choice_by_layer():
    network = Network(mlp([3, 4, 2]), nn.CrossEntropyLoss(), torch.randn(5, 3).double(), torch.randint(2, (5,)))
    evaluation = evaluate(network)
    units = BlockDiagonal(GGN(), partition=ByOutputUnit())
    low = BlockDiagonal(GGN(), blocks=LowRankBlocks(20))
    C = PerLayer([("0", units), ("2", low)], otherwise=Diagonal(GGN())).estimate(evaluation)
    labels = units_of(network, evaluation)[:16] + [-1] * 10
    torch.testing.assert_close(C.to_dense(), masked(network.ggn(), labels), **CLOSE)
    assert isinstance(C, BlockDiagonalOperator)
    for partition in (ByParameter(), ByGroups([["*"]]), ByLabel(first_letter)):
        with pytest.raises(TypeError, match=r"PerLayer cannot mix .* not parts of one layer"):
            PerLayer([("0", BlockDiagonal(GGN(), partition=partition))], otherwise=Diagonal(GGN()))


def test_bad_partitions_are_named():
    objective = Objective(mlp([3, 4, 2]), nn.CrossEntropyLoss())
    for groups, message in (
        ([["0.*"]], r"'2\.weight' is in no group"),
        ([["*"], ["0.bias"]], r"'0\.bias' is in 2 groups"),
        ([["*"], ["head*"]], r"'head\*' fits no trainable parameter; known: 0\.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockDiagonal(GGN(), partition=ByGroups(groups)).check(objective)
        with pytest.raises(ValueError, match=message):
            BlockDiagonal(GGN(), partition=ByGroups(groups)).estimate(
                objective.at((torch.randn(2, 3).double(), torch.tensor([0, 1])))
            )
    for make in (
        lambda: BlockDiagonal(GGN(), partition="layer"),
        lambda: BlockDiagonal(GGN(), blocks="dense"),
        lambda: ByGroups("abc"),
        lambda: ByGroups(["abc"]),
        lambda: ByGroups([[1]]),
        lambda: ByLabel("abc"),
    ):
        with pytest.raises(TypeError):
            make()
    with pytest.raises(ValueError, match="rank >= 1"):
        LowRankBlocks(0)


def test_averages_of_another_partition_are_not_taken_for_ones_own():
    """Both functions are lambdas of one name, and make two groups of equal sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    objective = Objective(model, nn.MSELoss())
    labels = (lambda name: name[0], lambda name: (name[0] == "0") == name.endswith("weight"))
    one, other = (MovingAverage(BlockDiagonal(GGN(), partition=ByLabel(label))) for label in labels)
    one.update(objective.at((torch.randn(5, 4).double(), torch.randn(5, 4).double())))
    other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match=r"no block of the parameters 0\.weight, 2\.bias.*another partition"):
        other.operator(objective)
