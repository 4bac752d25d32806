"""Deliberately broken layer rules are caught by their suite, which names the identity that broke."""

import pytest
import torch
from torch import nn
from twins import broken, name

from curvlib.extensions import LayerRule, Part, register
from curvlib.extensions.convolution import ConvolutionRule
from curvlib.testing import check_layer


class Row(nn.Module):
    """A linear layer with another layout of the weight, as a third party has it."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d_in, d_out)), nn.Parameter(torch.randn(d_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class RowRule(LayerRule):
    def inputs(self, module, x):
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def output_gradients(self, module, g):
        return g.reshape(g.shape[0], -1, g.shape[-1])

    def weight_matrix(self, module, weight):
        return weight.T


def variant(name, **methods):
    """A module class of its own with a rule that is the right one but for some methods."""
    kind = type(name, (Row,), {})
    register(kind, type(f"{name}Rule", (RowRule,), methods)())
    return kind


REBUILT = "sum_t g_t a_t^T = J_n^T v of every example n"


def first_alone(self, module, x):
    return RowRule.inputs(self, module, x[:1]).expand(len(x), -1, -1)


def mean_of_positions(self, module, x):
    return x.mean(1, keepdim=True).expand_as(x)


LAYERS = (
    variant("RowOfHalfInputs", inputs=lambda self, module, x: 0.5 * x),
    variant("RowOfSign", output_gradients=lambda self, module, g: -g),
    variant("RowOfFlatWeight", weight_matrix=lambda self, module, w: w.reshape(w.shape[1], -1)),
    variant("RowOfMeanPositions", inputs=mean_of_positions),
    variant("RowOfOneExample", inputs=first_alone),
)


def test_the_right_rule_passes():
    check_layer(variant("RightRow", output_gradients=RowRule.output_gradients)(3, 2), torch.randn(4, 3))


@pytest.mark.parametrize("kind", LAYERS, ids=name)
def test_broken_layer_rules(kind):
    with broken(REBUILT) as caught:
        check_layer(kind(3, 2), torch.randn(4, 2, 3))
    assert kind.__name__ in caught.value.subject


def test_a_rule_with_a_stale_cache():
    kept = {}

    def inputs(self, module, x):
        return kept.setdefault(x.shape, RowRule.inputs(self, module, x))

    with broken(f"{REBUILT}, called twice"):
        check_layer(variant("RowOfTheFirstCall", inputs=inputs)(3, 2), torch.randn(4, 3))


def test_a_module_without_a_rule():
    with broken("every parameter belongs to a layer"):
        check_layer(nn.PReLU(2), torch.randn(3, 2))


def conv_variant(title, **methods):
    """A convolution of its own whose rule is the right one but for some methods."""
    kind = type(title, (nn.Conv1d,), {})
    register(kind, type(f"{title}Rule", (ConvolutionRule,), methods)())
    return kind


def as_if(**options):
    """The inputs of a module with other options, cut or repeated to the number of positions."""

    def inputs(self, module, x):
        other = nn.Conv1d(module.in_channels, module.out_channels, module.kernel_size, **options)
        a = ConvolutionRule.inputs(self, other, x)
        T = ConvolutionRule.inputs(self, module, x).shape[1]
        return a.repeat(1, T, 1)[:, :T]

    return inputs


def groups_exchanged(self, module, x):
    a = ConvolutionRule.inputs(self, module, x)
    return a.unflatten(2, (module.groups, -1)).flip(2).flatten(2)


def in_place(self, module, x):
    return RowRule.inputs(self, module, x.detach().mul_(1.0).add_(1.0).sub_(1.0).add_(1e-3)) - 1e-3


CONVOLUTIONS = (
    (conv_variant("ConvWithoutPadding", inputs=as_if()), {"padding": 1}),
    (conv_variant("ConvOfZeros", inputs=as_if(padding=1)), {"padding": 1, "padding_mode": "circular"}),
    (conv_variant("ConvWithoutStride", inputs=as_if(padding=1)), {"padding": 1, "stride": 2}),
    (conv_variant("ConvWithoutDilation", inputs=as_if(padding=1)), {"padding": 2, "dilation": 2}),
    (conv_variant("ConvOfOtherGroups", inputs=groups_exchanged), {"groups": 2}),
)


@pytest.mark.parametrize(("kind", "options"), CONVOLUTIONS, ids=name)
def test_broken_rules_of_convolutions(kind, options):
    with broken(REBUILT) as caught:
        check_layer(kind(2, 2, 3, **options), torch.randn(2, 2, 6))
    assert kind.__name__ in caught.value.subject


def without_bias(self, module):
    return (Part(bias=None),)


def in_double(self, module, x):
    return RowRule.inputs(self, module, x).double()


@pytest.mark.parametrize(
    ("kind", "identity"),
    [
        (variant("RowWithoutBias", parts=without_bias), "every parameter belongs to a layer"),
        (variant("RowInDouble", inputs=in_double), "in float32, a and g are float32"),
        (variant("RowInPlace", inputs=in_place), "an evaluation leaves the module's inputs as they were"),
    ],
    ids=name,
)
def test_rules_that_forget_or_change_something(kind, identity):
    with broken(identity):
        check_layer(kind(3, 2), torch.randn(4, 3))
