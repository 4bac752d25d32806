"""K-FAC of convolutions: its factors are those of its definition and of curvlinops, and it is exact where theory says.

The factors by definition come from loops over output locations (A) and from Jacobians at the layers' outputs (G); they
cover what curvlinops ignores: padding modes, groups (it averages them), and modules that are called twice.
"""

import itertools
import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracles import Network
from torch import nn

from curvlib import GGN, EmpiricalFisher, Objective
from curvlib.approximations import KFAC, Expand, Reduce

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # while a dependency of the peer is loaded
    import curvlinops

EXACT = {"rtol": 1e-12, "atol": 1e-14}
PADDING_MODES = ("zeros", "circular", "reflect", "replicate")
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
SHARING = pytest.mark.parametrize("sharing", [Expand(), Reduce()], ids=["expand", "reduce"])
drawn = settings(max_examples=25, suppress_health_check=list(HealthCheck))


def evaluate(network):
    return Objective(network.model, network.loss).at((network.inputs, network.targets))


def blocks(network, approximation):
    """By layer name the approximation's block, the one by brute force, and the layer's coordinates."""
    evaluation, dense = evaluate(network), network.ggn()
    C = approximation.estimate(evaluation).to_dense()
    places = {layer.name: layer.coordinates for layer in evaluation.layers}
    return {name: (C[p.unsqueeze(1), p], dense[p.unsqueeze(1), p]) for name, p in places.items()}


def relative_error(block):
    return float((block[0] - block[1]).norm() / block[1].norm())


class Pooled(nn.Module):
    """Sum over positions: (N, C, *S) -> (N, C)."""

    def forward(self, x):
        return x.flatten(2).sum(2)


# curvlinops


@st.composite
def convolutional_networks(draw):
    """Two convolutions with zero padding and strides, and a Linear; what curvlinops treats right."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    channels = [draw(st.integers(1, 3)) for _ in range(3)]
    size, layers = draw(st.integers(3, 6)), []
    for C_in, C_out in itertools.pairwise(channels):
        kernel, stride, padding = (
            tuple(draw(st.integers(low, high)) for _ in range(2)) for low, high in ((1, 3), (1, 2), (0, 2))
        )
        layers += [nn.Conv2d(C_in, C_out, kernel, stride, padding, bias=draw(st.booleans())), nn.Tanh()]
    x = torch.randn(draw(st.integers(1, 4)), channels[0], size, size, dtype=torch.float64)
    try:
        features = nn.Sequential(*layers).double()(x)
    except RuntimeError:  # a kernel larger than what is left of the image
        assume(False)
    pooled = draw(st.booleans())
    width = features.shape[1] if pooled else features[0].numel()
    model = nn.Sequential(*layers, Pooled() if pooled else nn.Flatten(), nn.Linear(width, 3)).double()
    reduction = draw(st.sampled_from(("mean", "sum")))
    if draw(st.booleans()):
        return Network(model, nn.CrossEntropyLoss(reduction=reduction), x, torch.randint(3, (len(x),)))
    return Network(model, nn.MSELoss(reduction=reduction), x, torch.randn(len(x), 3, dtype=torch.float64))


@SHARING
@pytest.mark.parametrize(("matrix", "fisher_type"), [(GGN(), "type-2"), (EmpiricalFisher(), "empirical")], ids=str)
@given(network=convolutional_networks())
@drawn
def test_factors_and_products_equal_curvlinops(sharing, matrix, fisher_type, network):
    """curvlinops has the same scales: A is a mean over examples and positions, G carries the objective's reduction."""
    peer = curvlinops.KFACLinearOperator(
        network.model,
        network.loss,
        list(network.model.parameters()),
        [(network.inputs, network.targets)],
        fisher_type=fisher_type,
        kfac_approx="expand" if sharing == Expand() else "reduce",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    peer.compute_kronecker_factors()
    state = peer.state_dict()
    evaluation = evaluate(network)
    kfac = KFAC(matrix, weight_sharing=sharing)
    statistics = kfac.statistics(evaluation)
    assert {layer.name for layer in evaluation.layers} == set(state["input_covariances"])
    for layer in evaluation.layers:
        A, G = factors_of(statistics, layer.name)
        torch.testing.assert_close(A, state["input_covariances"][layer.name], **EXACT)
        torch.testing.assert_close(G, state["gradient_covariances"][layer.name], **EXACT)
    C = kfac.estimate(evaluation)
    torch.testing.assert_close(C.to_dense(), peer @ torch.eye(C.size, dtype=torch.float64), **EXACT)


# The definition


def patches(module, x):
    """Inputs a (N, T, groups, d_in) of a Conv2d, location by location, from the padded image."""
    (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
    ends = (0, 0, 0, 0)
    if module.padding == "same":  # the odd one of an odd number of zeros comes last
        total = dw * (kw - 1), dh * (kh - 1)
        ends = tuple(end for t in total for end in (t // 2, t - t // 2))
    elif module.padding != "valid":
        ends = tuple(end for p in reversed(module.padding) for end in (p, p))
    mode = {"zeros": "constant"}.get(module.padding_mode, module.padding_mode)
    x = nn.functional.pad(x, ends, mode=mode) if any(ends) else x
    x = x.unflatten(1, (module.groups, -1))  # (N, groups, C, H, W)
    rows = range(0, x.shape[3] - dh * (kh - 1), sh)
    columns = range(0, x.shape[4] - dw * (kw - 1), sw)
    return torch.stack(
        [
            x[..., i : i + dh * (kh - 1) + 1 : dh, j : j + dw * (kw - 1) + 1 : dw].flatten(2)
            for i, j in itertools.product(rows, columns)
        ],
        dim=1,
    )


def factors_by_definition(network, module, sharing):
    """A and G, (groups, d, d) each: sums over all examples and positions of all calls."""
    calls = network.calls(module)
    a = torch.cat([patches(module, x) for x, _ in calls], dim=1)
    if module.bias is not None:
        a = torch.cat([a, torch.ones_like(a[..., :1])], dim=3)
    J = torch.cat([J.flatten(3).transpose(2, 3) for _, J in calls], dim=2).unflatten(3, (module.groups, -1))
    if sharing == Reduce():
        a, J = a.mean(1, keepdim=True), J.sum(2, keepdim=True)
    A = torch.einsum("ntgi,ntgj->gij", a, a) / (a.shape[0] * a.shape[1])
    return A, torch.einsum("ontgc,op,pntgd->gcd", J, network.loss_hessian(), J)


def factors_of(statistics, name):
    """A as a mean over positions, and G."""
    return statistics.means[f"{name}|A"] / statistics.means[f"{name}|positions"], statistics.sums[f"{name}|G"]


def assert_factors_are_those_of_the_definition(network, name, sharing):
    statistics = KFAC(GGN(), weight_sharing=sharing).statistics(evaluate(network))
    A, G = factors_of(statistics, name)
    ours = [factor if factor.ndim == 3 else factor.unsqueeze(0) for factor in (A, G)]
    for factor, expected in zip(ours, factors_by_definition(network, network.model[0], sharing), strict=True):
        torch.testing.assert_close(factor, expected, **CLOSE)


def behind(convolution, *middle, size=5):
    """A convolution, whatever follows it, and a nonlinear head that makes G depend on the position."""
    head = nn.Conv2d(convolution.out_channels, 2, 2)
    model = nn.Sequential(convolution, *middle, nn.Tanh(), head, nn.Tanh(), Pooled()).double()
    x = torch.randn(3, convolution.in_channels, size, size, dtype=torch.float64)
    return Network(model, nn.CrossEntropyLoss(), x, torch.randint(2, (3,)))


@SHARING
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("padding", [(1, 2), "same"], ids=["numbers", "same"])
@pytest.mark.parametrize("kernel", [(3, 2), (2, 3)], ids=str)
def test_factors_with_padding(sharing, mode, padding, kernel):
    convolution = nn.Conv2d(2, 2, kernel, padding=padding, padding_mode=mode)
    assert_factors_are_those_of_the_definition(behind(convolution), "0", sharing)


@SHARING
@pytest.mark.parametrize(
    "options",
    [
        {"dilation": 2},
        {"dilation": (1, 2), "padding": 1, "stride": (2, 1)},
        {"groups": 2},
        {"groups": 4, "bias": False, "padding": 1},
        {"groups": 2, "dilation": 2, "padding": "same", "padding_mode": "circular"},
    ],
    ids=str,
)
def test_factors_with_dilation_and_groups(sharing, options):
    convolution = nn.Conv2d(4, 4, 2 if options.get("padding") != "same" else 3, **options)
    assert_factors_are_those_of_the_definition(behind(convolution), "0", sharing)


@SHARING
@pytest.mark.parametrize("groups", [1, 2])
def test_factors_of_a_convolution_that_is_called_twice(sharing, groups):
    """All positions of both calls count alike, also when the calls have different numbers of them."""
    convolution = nn.Conv2d(2, 2, 3, padding=1, stride=2, groups=groups)
    network = behind(convolution, nn.Tanh(), convolution, size=7)
    assert len(network.calls(convolution)) == 2
    assert_factors_are_those_of_the_definition(network, "0", sharing)


# Where K-FAC is exact


@st.composite
def first_convolutions(draw):
    """Any convolution with one group; the network behind it is linear."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    kernel, stride, padding, dilation = (
        tuple(draw(st.integers(low, high)) for _ in range(2)) for low, high in ((1, 3), (1, 2), (0, 2), (1, 2))
    )
    return nn.Conv2d(
        draw(st.integers(1, 2)),
        2,
        kernel,
        stride,
        padding,
        dilation,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(PADDING_MODES)),
    )


def deep_linear(*layers, size=5, pooled=False):
    model = nn.Sequential(*layers, *([Pooled()] if pooled else [])).double()
    x = torch.randn(3, layers[0].in_channels, size, size, dtype=torch.float64)
    return Network(model, nn.MSELoss(), x, torch.randn_like(model(x)).detach())


@given(first_convolutions())
@drawn
def test_expand_is_exact_for_deep_linear_networks_with_1x1_convolutions(first):
    """No position's output sees another position, and the gradients are the same at all of them."""
    network = deep_linear(first, nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1, bias=False))
    for kfac, exact in blocks(network, KFAC(GGN(), weight_sharing=Expand())).values():
        torch.testing.assert_close(kfac, exact, **CLOSE)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_expand_is_not_exact_below_a_larger_kernel(mode):
    """An output then depends on several positions of the layer below, whose products g_s g_t^T, s != t, Expand drops.

    Circular padding does not help, although all positions are alike. The last layer itself stays exact.
    """
    network = deep_linear(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode))
    first, last = blocks(network, KFAC(GGN(), weight_sharing=Expand())).values()
    torch.testing.assert_close(*last, **CLOSE)
    assert relative_error(first) > 0.1


@pytest.mark.parametrize("kernels", [(3, 3), (3, 1), (1, 5)], ids=str)
def test_reduce_is_exact_for_deep_linear_networks_with_circular_padding_that_sum_positions(kernels):
    layers = [
        nn.Conv2d(2, 2, kernel, padding="same", padding_mode="circular", bias=bias)
        for kernel, bias in zip(kernels, (True, False), strict=True)
    ]
    network = deep_linear(*layers, nn.Conv2d(2, 3, 1), pooled=True)
    for kfac, exact in blocks(network, KFAC(GGN(), weight_sharing=Reduce())).values():
        torch.testing.assert_close(kfac, exact, **CLOSE)
    expand = blocks(network, KFAC(GGN(), weight_sharing=Expand()))
    assert min(map(relative_error, expand.values())) > 0.1


def test_reduce_is_not_exact_below_zero_padding():
    """Positions at the border reach fewer outputs, so that the gradients of the layer below depend on the position."""
    network = deep_linear(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), pooled=True)
    first, last = blocks(network, KFAC(GGN(), weight_sharing=Reduce())).values()
    torch.testing.assert_close(*last, **CLOSE)
    assert relative_error(first) > 0.01


@SHARING
@pytest.mark.parametrize(
    ("kind", "size"), [(nn.Conv1d, (4,)), (nn.Conv2d, (3, 2)), (nn.Conv3d, (2, 3, 2))], ids=["1d", "2d", "3d"]
)
@pytest.mark.parametrize("groups", [1, 2])
def test_one_example_and_one_position_equal_brute_force(sharing, kind, size, groups):
    """The first kernel covers the whole image. Groups have a block each; what lies between two groups is left out."""
    first = kind(4, 4, size, groups=groups)
    second = kind(4, 2, 1, groups=groups, bias=False)
    model = nn.Sequential(first, nn.Tanh(), second, nn.Flatten()).double()
    network = Network(model, nn.CrossEntropyLoss(), torch.randn(1, 4, *size, dtype=torch.float64), torch.tensor([1]))
    for kfac, exact in blocks(network, KFAC(GGN(), weight_sharing=sharing)).values():
        group = torch.arange(len(exact)) // (len(exact) // groups)
        expected = torch.where(group.unsqueeze(1) == group, exact, 0.0)
        torch.testing.assert_close(kfac, expected, **CLOSE)
        assert groups == 1 or (expected - exact).norm() > 0.01 * exact.norm()
