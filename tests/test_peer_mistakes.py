"""Mistakes of other libraries with losses, scales and options, each as a test with a name.

Tests elsewhere hold many more cases against brute force; this file is the list, and the place of those that had none:

* class weights, ignore_index, label smoothing in K-FAC and all others: ``test_peers``; for the losses alone, with 3-D
  cross-entropy, the 2 of squared error, 1 / variance and the scale of draws: ``test_output_losses_regressions``; the
  same losses with positions and both reductions: ``test_against_brute_force``
* the empirical Fisher as a sum over per-example gradients: ``test_against_brute_force``
* convolutions, and modules that are used several times: ``test_peer_mistakes_layers``
* unknown fallbacks, a weight used outside of its module: ``test_driver``
"""

import itertools

import pytest
import torch
from torch import nn

from curvlib import GGN, EmpiricalFisher, Fisher, Objective, UnsupportedLayerError
from curvlib.approximations import KFAC, BlockDiagonal, Dense, Diagonal, Exact, PerLayer, Reduce

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
APPROXIMATIONS = (Exact, Dense, BlockDiagonal, Diagonal, KFAC)
for_every_approximation = pytest.mark.parametrize("approximation", APPROXIMATIONS, ids=lambda a: a.__name__)


def estimate(approximation, model, loss, inputs, targets):
    return approximation.estimate(Objective(model, loss).at((inputs, targets))).to_dense()


def images(N, C=2, size=4):
    return torch.randn(N, C, size, size, dtype=torch.float64)


def segmentation(C=2, classes=3):
    """Convolutions from images to logits at each pixel: cross-entropy with 4-D outputs."""
    return nn.Sequential(nn.Conv2d(C, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, classes, 1)).double()


# Losses


@for_every_approximation
def test_class_weights_multiply_the_curvature(approximation):
    """curvlinops' K-FAC and GGN diagonal leave them out."""
    model, x, y = segmentation(), images(1), torch.full((1, 4, 4), 2)
    weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    plain, weighted = (
        estimate(approximation(GGN()), model, nn.CrossEntropyLoss(weight=w, reduction="sum"), x, y)
        for w in (None, weight)
    )
    torch.testing.assert_close(weighted, 5 * plain, **CLOSE)
    assert plain.trace() > 1e-3


@pytest.mark.parametrize("ignored", [-100, 1])
@for_every_approximation
def test_examples_that_are_ignored_are_not_there(approximation, ignored):
    """BackPACK counts targets of -100."""
    model, x = segmentation(), images(3)
    y = torch.randint(2, (3, 4, 4)) * 2
    y[1] = ignored
    loss = nn.CrossEntropyLoss(ignore_index=ignored)
    expected = estimate(approximation(GGN()), model, loss, x[[0, 2]], y[[0, 2]])
    torch.testing.assert_close(estimate(approximation(GGN()), model, loss, x, y), expected, **CLOSE)


@pytest.mark.parametrize("matrix", [GGN(), EmpiricalFisher()], ids=str)
@for_every_approximation
def test_label_smoothing_counts(approximation, matrix):
    """Without class weights it moves the gradient, so the empirical Fisher, and leaves the loss's Hessian as it is."""
    model, x, y = segmentation(), images(2), torch.randint(3, (2, 4, 4))
    plain, smooth = (
        estimate(approximation(matrix), model, nn.CrossEntropyLoss(label_smoothing=s), x, y) for s in (0.0, 0.5)
    )
    assert torch.allclose(plain, smooth, **CLOSE) == (matrix == GGN())


@pytest.mark.parametrize("matrix", [GGN(), EmpiricalFisher()], ids=str)
@for_every_approximation
def test_a_sum_is_a_mean_times_the_number_of_targets(approximation, matrix):
    """24 pixels of 32 count. The empirical Fisher c sum_n g_n g_n^T has the same factor c: g_n is that of a sum."""
    model, x, y = segmentation(), images(2), torch.randint(3, (2, 4, 4))
    y[:, 0] = -100
    mean, total = (
        estimate(approximation(matrix), model, nn.CrossEntropyLoss(reduction=reduction), x, y)
        for reduction in ("mean", "sum")
    )
    torch.testing.assert_close(total, 24 * mean, **CLOSE)


@for_every_approximation
def test_squared_error_is_not_halved(approximation):
    """l = (w x - y)^2 with w = 2, x = 3, y = 1: curvature 2 x^2 = 18, gradient 2 (w x - y) x = 30."""
    model = nn.Conv2d(1, 1, 1, bias=False).double()
    nn.init.constant_(model.weight, 2.0)
    x, y = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (3.0, 1.0))
    assert float(estimate(approximation(GGN()), model, nn.MSELoss(), x, y)) == pytest.approx(18.0)
    assert float(estimate(approximation(EmpiricalFisher()), model, nn.MSELoss(), x, y)) == pytest.approx(900.0)


@pytest.mark.parametrize("matrix", [GGN(), EmpiricalFisher()], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@for_every_approximation
def test_every_example_twice_leaves_a_mean_and_doubles_a_sum(approximation, reduction, matrix):
    """kfac-jax has 1/N in one place and 1/N^2 in another for the empirical Fisher."""
    model, x, y = segmentation(), images(3), torch.randint(3, (3, 4, 4))
    loss = nn.CrossEntropyLoss(reduction=reduction)
    once = estimate(approximation(matrix), model, loss, x, y)
    twice = estimate(approximation(matrix), model, loss, x.repeat(2, 1, 1, 1), y.repeat(2, 1, 1))
    torch.testing.assert_close(twice, once if reduction == "mean" else 2 * once, **CLOSE)


@pytest.mark.parametrize("copies", [1, 8])
@pytest.mark.parametrize("approximation", [Exact, BlockDiagonal, Diagonal, KFAC], ids=lambda a: a.__name__)
def test_draws_have_the_scale_of_the_ggn_for_every_batch(approximation, copies):
    """asdl's Monte-Carlo Fisher is 1/n too small. The trace of K-FAC is linear in G, so unbiased as well."""
    model = nn.Sequential(nn.Conv2d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)).double()
    x, y = images(2).repeat(copies, 1, 1, 1), torch.tensor([0, 2]).repeat(copies)
    evaluation = Objective(model, nn.CrossEntropyLoss()).at((x, y))
    drawn = float(approximation(Fisher(samples=400)).estimate(evaluation, torch.Generator().manual_seed(0)).trace())
    # the standard error of 800 draws or more is below 3 percent
    assert drawn == pytest.approx(float(approximation(GGN()).estimate(evaluation).trace()), rel=0.12)


# Names and options


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, 1, 1, dtype=torch.float64))

    def forward(self, x):
        return x * self.scale


def scaled():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), Scale(), nn.Conv2d(2, 2, 1)).double()
    x = images(2)
    return Objective(model, nn.MSELoss()).at((x, torch.randn_like(x)))


@pytest.mark.parametrize(
    ("error", "pattern", "make"),
    [
        (TypeError, "weight_sharing to be Expand", lambda: KFAC(GGN(), weight_sharing="reduce")),
        (TypeError, "unexpected keyword argument 'damping'", lambda: KFAC(GGN(), damping=True)),
        (TypeError, "needs a curvature matrix", lambda: KFAC("ggn")),
        (ValueError, "on_unsupported must be one of", lambda: Diagonal(GGN(), on_unsupported="ignore")),
        (TypeError, "pairs", lambda: PerLayer(["conv"], otherwise=KFAC(GGN()))),
        (TypeError, "layerwise approximations", lambda: PerLayer([("conv", "diagonal")], otherwise=KFAC(GGN()))),
    ],
)
def test_unknown_options_are_refused(error, pattern, make):
    with pytest.raises(error, match=pattern):
        make()


@pytest.mark.parametrize("selector", ["conv.*", nn.Linear, nn.Conv2d(2, 2, 1)], ids=["pattern", "class", "module"])
def test_selectors_that_fit_nothing_are_refused_with_the_names_that_are_known(selector):
    choices = [(selector, Diagonal(GGN()))]
    with pytest.raises(ValueError, match=r"fits no layer and no parameter\. Known: 0, 2, 1\.scale"):
        PerLayer(choices, otherwise=KFAC(GGN())).estimate(scaled())


def test_parameters_without_a_rule_are_never_downgraded_in_silence():
    """kfac-jax gives them a diagonal."""
    evaluation = scaled()
    for approximation in (KFAC(GGN()), PerLayer([("0", Diagonal(GGN()))], otherwise=KFAC(GGN()))):
        with pytest.raises(UnsupportedLayerError, match=r"1 parameter\(s\): 1\.scale: no layer rule for Scale"):
            approximation.estimate(evaluation)


def test_every_option_changes_the_result():
    evaluation = scaled()
    results = [
        approximation.estimate(evaluation).to_dense()
        for approximation in (
            KFAC(GGN(), on_unsupported="diagonal"),
            KFAC(GGN(), on_unsupported="dense"),
            KFAC(GGN(), on_unsupported="exclude"),
            KFAC(GGN(), on_unsupported="exclude", weight_sharing=Reduce()),
            KFAC(EmpiricalFisher(), on_unsupported="exclude"),
            PerLayer([("0", Diagonal(GGN()))], otherwise=KFAC(GGN(), on_unsupported="exclude")),
            PerLayer([("?", None)], otherwise=KFAC(GGN(), on_unsupported="exclude")),
        )
    ]
    for one, other in itertools.combinations(results, 2):
        assert (one - other).norm() > 1e-3 * one.norm()
