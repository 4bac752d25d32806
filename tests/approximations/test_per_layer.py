"""Another approximation for each layer: chosen by module, class and name, and refused where a choice fits nothing."""

import pytest
import torch
from cases import mlp
from oracles import Network
from torch import nn

from curvlib import GGN, EmpiricalFisher, Fisher, Objective, UnsupportedLayerError
from curvlib.approximations import (
    KFAC,
    BlockDiagonal,
    Dense,
    Diagonal,
    Expand,
    Identity,
    MovingAverage,
    PerLayer,
    Reduce,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.body = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh())
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        return self.head((self.scale.unsqueeze(1) * self.norm(self.body(x))).flatten(1))


def evaluation():
    torch.manual_seed(0)
    network = Network(Net().double(), nn.MSELoss(), torch.randn(4, 2, 5).double(), torch.randn(4, 2).double())
    return network, Objective(network.model, network.loss).at((network.inputs, network.targets))


def part(dense, evaluation, name):
    place = evaluation.layout.slices[name]
    return dense[place, place]


def test_choices_by_name_class_and_module():
    network, ev = evaluation()
    ggn = network.ggn()
    chosen = PerLayer(
        [("scale", BlockDiagonal(GGN())), (nn.LayerNorm, BlockDiagonal(GGN())), (network.model.body, None)],
        otherwise=Diagonal(GGN()),
    )
    C = chosen.estimate(ev).to_dense()
    torch.testing.assert_close(part(C, ev, "scale"), part(ggn, ev, "scale"), **CLOSE)
    torch.testing.assert_close(part(C, ev, "norm.weight"), part(ggn, ev, "norm.weight"), **CLOSE)
    torch.testing.assert_close(part(C, ev, "head.weight"), part(ggn, ev, "head.weight").diagonal().diag(), **CLOSE)
    assert not part(C, ev, "body.0.weight").any()
    table = str(ev.objective.describe(chosen, (network.inputs, network.targets)))
    for text in ("exact dense block", "dense 8 x 8", "none (zero curvature)", "diagonal", "excluded"):
        assert text in table


def test_the_first_choice_that_fits_counts():
    network, ev = evaluation()
    choices = [("*.weight", Diagonal(GGN())), ("head", BlockDiagonal(GGN())), ("scale", None)]
    C = PerLayer(choices, otherwise=KFAC(GGN())).estimate(ev).to_dense()
    torch.testing.assert_close(
        part(C, ev, "head.weight"), part(network.ggn(), ev, "head.weight").diagonal().diag(), **CLOSE
    )


def test_different_matrices_and_weight_sharings_side_by_side():
    _, ev = evaluation()
    choices = [
        ("scale", None),
        ("body*", KFAC(GGN(), weight_sharing=Reduce())),
        ("head", KFAC(EmpiricalFisher())),
    ]
    C = PerLayer(choices, otherwise=KFAC(GGN(), weight_sharing=Expand())).estimate(ev).to_dense()
    for name, whole in (
        ("body.0.weight", KFAC(GGN(), weight_sharing=Reduce(), on_unsupported="exclude")),
        ("head.weight", KFAC(EmpiricalFisher(), on_unsupported="exclude")),
        ("norm.weight", KFAC(GGN(), on_unsupported="exclude")),
    ):
        torch.testing.assert_close(part(C, ev, name), part(whole.estimate(ev).to_dense(), ev, name), **CLOSE)


def test_equal_matrices_share_their_draws():
    model = mlp([3, 4, 2])
    ev = Objective(model, nn.CrossEntropyLoss()).at((torch.randn(9, 3).double(), torch.randint(2, (9,))))

    def estimate(approximation):
        return approximation.estimate(ev, torch.Generator().manual_seed(3)).to_dense()

    mixed = estimate(PerLayer([("0", Diagonal(Fisher()))], otherwise=Diagonal(Fisher())))
    torch.testing.assert_close(mixed, estimate(Diagonal(Fisher())), **CLOSE)


def test_unsupported_parameters_follow_the_choice_that_fits_them():
    network, ev = evaluation()
    ggn = part(network.ggn(), ev, "scale")
    for choice, expected in (
        (Diagonal(GGN()), ggn.diagonal().diag()),
        (BlockDiagonal(GGN()), ggn),
        (None, torch.zeros_like(ggn)),
        (KFAC(GGN(), on_unsupported="diagonal"), ggn.diagonal().diag()),
    ):
        C = PerLayer([(Net, choice)], otherwise=Diagonal(GGN())).estimate(ev).to_dense()
        torch.testing.assert_close(part(C, ev, "scale"), expected, **CLOSE)
    with pytest.raises(UnsupportedLayerError, match="scale: no layer rule for Net"):
        PerLayer([("head", None)], otherwise=Diagonal(GGN())).estimate(ev)
    dense = Diagonal(GGN(), on_unsupported="dense").estimate(ev).to_dense()
    torch.testing.assert_close(part(dense, ev, "scale"), ggn, **CLOSE)


def test_moving_averages_and_data_in_batches():
    network, ev = evaluation()
    chosen = PerLayer([("scale", BlockDiagonal(GGN()))], otherwise=BlockDiagonal(GGN()))
    batches = [(network.inputs[:3], network.targets[:3]), (network.inputs[3:], network.targets[3:])]
    torch.testing.assert_close(
        chosen.estimate_over(ev.objective, batches, progress=False).to_dense(), chosen.estimate(ev).to_dense(), **CLOSE
    )
    average = MovingAverage(chosen)
    average.update(ev)
    torch.testing.assert_close(average.operator(ev.objective).to_dense(), chosen.estimate(ev).to_dense(), **CLOSE)


@pytest.mark.parametrize("selector", ["encoder*", nn.Conv2d, nn.Linear(1, 1)], ids=["name", "class", "module"])
def test_selectors_that_fit_nothing_are_errors(selector):
    _, ev = evaluation()
    with pytest.raises(ValueError, match=r"fits no layer and no parameter\. Known: body\.0, norm, head, scale"):
        PerLayer([(selector, None)], otherwise=Diagonal(GGN())).check(ev.objective)


@pytest.mark.parametrize(
    ("choices", "otherwise", "message"),
    [
        ([("a", Dense(GGN()))], Diagonal(GGN()), "layerwise approximations"),
        ([], Identity(), "layerwise approximations"),
        ([(3, None)], Diagonal(GGN()), "pairs"),
        ([("a", None, None)], Diagonal(GGN()), "pairs"),
    ],
)
def test_bad_choices_are_named(choices, otherwise, message):
    with pytest.raises(TypeError, match=message):
        PerLayer(choices, otherwise)
