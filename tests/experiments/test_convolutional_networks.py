"""Convolutional networks: their description, and comparisons that train one."""

from dataclasses import dataclass

import pytest
import torch
from command_line_calls import compare, results
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from curvlib.experiments import Convolution, Convolutional, ExperimentError, Network
from curvlib.experiments.networks import glorot, kaiming
from curvlib.extensions import find_rule

SMALL = Convolutional(
    image=(1, 8, 6),
    convolutions=(Convolution(channels=4, kernel=3, padding=1), Convolution(channels=5, kernel=2, stride=2)),
    widths=(7, 3),
    activation=nn.Tanh,
)
LAYERS = st.builds(
    Convolution,
    channels=st.integers(1, 4),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
)


def test_layers_come_in_their_order_with_activations_between_them_alone():
    kinds = [type(module) for module in SMALL.build()]
    assert kinds == [
        nn.Unflatten, nn.Conv2d, nn.Tanh, nn.Conv2d, nn.Tanh, nn.Flatten, nn.Linear, nn.Tanh, nn.Linear
    ]  # fmt: skip
    assert str(SMALL) == "1x8x6-4@3x3-5@2x2/2-7-3"
    assert SMALL.parameters == (9 + 1) * 4 + (4 * 4 + 1) * 5 + (5 * 4 * 3 + 1) * 7 + (7 + 1) * 3


@settings(max_examples=40)
@given(
    image=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    convolutions=st.lists(LAYERS, min_size=1, max_size=3).map(tuple),
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
)
def test_every_network_that_can_be_described_takes_rows_of_pixels(image, convolutions, widths):
    shapes = [image]
    for layer in convolutions:
        shapes.append(layer.output_shape(shapes[-1]))
    assume(min(map(min, shapes)) >= 1)
    network = Convolutional(image=image, convolutions=convolutions, widths=widths, activation=nn.ReLU)
    model = network.build()
    assert sum(p.numel() for p in model.parameters()) == network.parameters
    assert model(torch.rand(2, image[0] * image[1] * image[2])).shape == (2, widths[-1])


def test_options_of_a_convolution_reach_the_layer():
    image, layer = torch.rand(2, 48), SMALL.convolutions[0]
    first = SMALL.build()[1]
    expected = nn.functional.conv2d(image.view(2, 1, 8, 6), first.weight, first.bias, padding=1)
    torch.testing.assert_close(first(image.view(2, 1, 8, 6)), expected)
    assert expected.shape[1:] == layer.output_shape(SMALL.image) == (4, 8, 6)


def test_initialisation_counts_the_connections_of_a_unit():
    layer = nn.Conv2d(20, 30, 5)
    for initialise, variance in ((glorot, 2 / (25 * 50)), (kaiming, 2 / (25 * 20))):
        initialise(layer)
        assert layer.weight.var().item() == pytest.approx(variance, rel=0.05)
        assert torch.count_nonzero(layer.bias) == 0
        initialise(nn.Conv2d(2, 3, 5, bias=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"convolutions": ()}, "use FullyConnected"),
        ({"widths": ()}, "widths needs at least one positive"),
        ({"widths": (4, 0)}, "widths needs at least one positive"),
        ({"image": (0, 8, 6)}, r"The input of layer 1 would have .* = \(0, 8, 6\)"),
        ({"image": (1, 8, 1)}, r"The input of layer 3 would have .* = \(5, 4, 0\)"),
    ],
)
def test_a_network_that_cannot_be_is_refused(change, message):
    described = {"image": SMALL.image, "convolutions": SMALL.convolutions, "widths": (3,), "activation": nn.Tanh}
    with pytest.raises(ExperimentError, match=message):
        Convolutional(**{**described, **change})


@pytest.mark.parametrize("wrong", [{"channels": 0}, {"kernel": 0}, {"stride": 0}, {"padding": -1}])
def test_a_convolution_that_cannot_be_is_refused(wrong):
    with pytest.raises(ExperimentError, match="must be at least 1 and padding at least 0"):
        Convolution(**{"channels": 2, "kernel": 3, **wrong})


@dataclass(frozen=True, kw_only=True, repr=False)
class Affine(Network):
    """A kind of network that is not in the library."""

    size: int
    make: type

    @property
    def parameters(self):
        return self.size + 1

    def build(self):
        return self.make(self.size, 1)

    def __str__(self):
        return f"{self.size}-1"


def test_a_description_names_every_field_and_is_the_same_in_every_process():
    assert repr(SMALL) == (
        "Convolutional(image=(1, 8, 6), convolutions=(Convolution(channels=4, kernel=3, stride=1, padding=1), "
        "Convolution(channels=5, kernel=2, stride=2, padding=0)), widths=(7, 3), activation=Tanh, initialise=glorot)"
    )
    assert repr(Affine(size=3, make=nn.Linear)) == "Affine(size=3, make=Linear)"


def improvements(path, *methods, steps):
    words = [word for method in methods for word in ("--method", method)]
    outcome = compare(path, "--problem", "digits-convnet", "--batch-size", 100, "--steps", steps, *words)
    assert outcome.exit_code == 0, outcome.output
    records = {name: [r for r in results(path) if r["method"] == name] for name in methods}
    assert len({own[0]["loss"] for own in records.values()}) == 1
    return {name: own[0]["loss"] - own[-1]["loss"] for name, own in records.items()}


def test_methods_without_layer_rules_train_convolutions(tmp_path):
    assert min(improvements(tmp_path, "sgd", "adam", "lbfgs", steps=10).values()) > 0.1
    assert improvements(tmp_path / "hessian-free", "hessian-free", steps=2)["hessian-free"] > 0.1


@pytest.mark.skipif(find_rule(nn.Conv2d(1, 1, 1))[0] is None, reason="needs a layer rule for Conv2d")
def test_kfac_trains_convolutions(tmp_path):
    assert improvements(tmp_path, "kfac", steps=10)["kfac"] > 0.1
