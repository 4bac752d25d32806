"""Mistakes that other libraries make, each with its number worked out by hand or by PyTorch."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from curvlib.output_losses import output_loss

LOGITS = torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1])


def covariance(logits):
    p = logits.softmax(-1)
    return p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)


def root_blocks(loss, outputs, targets):
    vectors = torch.stack(list(loss.hessian_sqrt(outputs, targets))).flatten(2)
    return torch.einsum("kno,knp->nop", vectors, vectors)


def draws_trace(loss, outputs, targets, draws=4000):
    generator = torch.Generator().manual_seed(0)
    squares = [loss.sample_gradient(outputs, targets, generator).square().sum() for _ in range(draws)]
    return torch.stack(squares).mean()


def test_class_weights_scale_the_curvature():
    weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    loss = output_loss(nn.CrossEntropyLoss(weight=weight, reduction="sum"))
    expected = weight[LABELS][:, None, None] * covariance(LOGITS)
    assert_close(root_blocks(loss, LOGITS, LABELS), expected)
    assert_close(draws_trace(loss, LOGITS, LABELS), torch.einsum("noo->", expected), rtol=0.1, atol=0)
    mean = output_loss(nn.CrossEntropyLoss(weight=weight))
    assert_close(root_blocks(mean, LOGITS, LABELS), expected / 8)


@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_ignored_targets_have_no_curvature_and_do_not_count(ignore_index):
    labels = torch.tensor([0, ignore_index, 2])
    loss = output_loss(nn.CrossEntropyLoss(ignore_index=ignore_index))
    expected = covariance(LOGITS) * torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)[:, None, None]
    assert_close(root_blocks(loss, LOGITS, labels), expected)
    assert float(loss.normalizer(LOGITS, labels)) == 2.0
    for v in (
        loss.gradient(LOGITS, labels),
        loss.empirical_gradient(LOGITS, labels),
        loss.sample_gradient(LOGITS, labels),
    ):
        assert not v[1].any()
        assert v[[0, 2]].any(dim=1).all()


def test_label_smoothing_changes_the_gradient_and_with_weights_the_curvature():
    weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    plain, smooth = (output_loss(nn.CrossEntropyLoss(label_smoothing=s, reduction="sum")) for s in (0.0, 0.3))
    difference = smooth.gradient(LOGITS, LABELS) - plain.gradient(LOGITS, LABELS)
    assert_close(difference, 0.3 * (nn.functional.one_hot(LABELS, 3) - 1 / 3).double())
    assert_close(root_blocks(smooth, LOGITS, LABELS), covariance(LOGITS))
    weighted = output_loss(nn.CrossEntropyLoss(weight=weight, label_smoothing=0.3, reduction="sum"))
    kappa = 0.7 * weight[LABELS] + 0.1 * weight.sum()
    assert_close(root_blocks(weighted, LOGITS, LABELS), kappa[:, None, None] * covariance(LOGITS))


@pytest.mark.parametrize("positions", [(2,), (2, 3)])
def test_positions_of_cross_entropy_are_separate_outputs_of_one_example(positions):
    z = torch.randn(2, 3, *positions, dtype=torch.float64)
    y = torch.randint(3, (2, *positions))
    loss, T = output_loss(nn.CrossEntropyLoss()), y[0].numel()
    vectors = list(loss.hessian_sqrt(z, y))
    assert len(vectors) == 2 * T
    assert all(int(v[n].any(0).sum()) == 1 for v in vectors for n in range(2))
    expected = covariance(z.flatten(2).movedim(1, 2)) / (2 * T)
    blocks = root_blocks(loss, z, y).reshape(2, 3, T, 3, T)
    assert_close(torch.einsum("nitjt->ntij", blocks), expected)


@pytest.mark.parametrize(("reduction", "c"), [("mean", 1 / 9), ("sum", 1.0)])
def test_squared_error_has_the_factor_two_everywhere(reduction, c):
    loss, y = output_loss(nn.MSELoss(reduction=reduction)), torch.zeros_like(LOGITS)
    assert_close(loss.hessian_product(LOGITS, y, LOGITS), 2 * c * LOGITS)
    assert_close(loss.gradient(LOGITS, y), 2 * c * LOGITS)
    assert_close(loss.empirical_gradient(LOGITS, y), 2 * c**0.5 * LOGITS)
    expected = torch.tensor(9 * 2 * c, dtype=torch.float64)
    assert_close(draws_trace(loss, LOGITS, y), expected, rtol=0.05, atol=0)


def test_gaussian_curvature_is_one_over_the_variance():
    loss, variance = output_loss(nn.GaussianNLLLoss(reduction="sum")), torch.full_like(LOGITS, 4.0)
    targets = (torch.zeros_like(LOGITS), variance)
    assert_close(loss.hessian_product(LOGITS, targets, torch.ones_like(LOGITS)), torch.full_like(LOGITS, 0.25))
    assert_close(loss.empirical_gradient(LOGITS, targets), LOGITS / 4)
    expected = torch.tensor(9 / 4, dtype=torch.float64)
    assert_close(draws_trace(loss, LOGITS, targets), expected, rtol=0.05, atol=0)


def test_gaussian_eps_bounds_the_variance():
    loss = output_loss(nn.GaussianNLLLoss(eps=0.5, reduction="sum"))
    H = loss.hessian_product(LOGITS, (LOGITS, 1e-3), torch.ones_like(LOGITS))
    assert_close(H, torch.full_like(LOGITS, 2.0))


@pytest.mark.parametrize("copies", [1, 8])
def test_monte_carlo_fisher_of_a_mean_does_not_shrink_with_the_batch(copies):
    z, y = LOGITS.repeat(copies, 1), LABELS.repeat(copies)
    expected = torch.einsum("noo->", covariance(LOGITS)) / 3
    assert_close(draws_trace(output_loss(nn.CrossEntropyLoss()), z, y), expected, rtol=0.1, atol=0)


def test_bce_weights_scale_the_curvature():
    s, ones = LOGITS.sigmoid(), torch.ones_like(LOGITS)
    y = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.5]], dtype=torch.float64)
    weight, pos_weight = torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([1.0, 4.0, 0.5])
    module = nn.BCEWithLogitsLoss(weight=weight, pos_weight=pos_weight, reduction="sum")
    expected = weight * (1 - y + pos_weight * y) * s * (1 - s)
    assert_close(output_loss(module).hessian_product(LOGITS, y, ones), expected)


def test_bce_with_the_number_of_pixels_as_weight_sums_over_them():
    y = torch.rand(3, 3, dtype=torch.float64)
    module = nn.BCEWithLogitsLoss(weight=torch.tensor(3.0))
    ones = torch.ones_like(LOGITS)
    summed = output_loss(nn.BCEWithLogitsLoss(reduction="sum")).hessian_product(LOGITS, y, ones)
    assert_close(output_loss(module).hessian_product(LOGITS, y, ones), summed / 3)


def test_stirlings_term_moves_the_value_alone():
    y = torch.tensor([[0.0, 1.0, 5.0]])
    z = torch.zeros_like(y)
    plain, full = (output_loss(nn.PoissonNLLLoss(full=f)) for f in (False, True))
    assert float(full.value(z, y)) > float(plain.value(z, y)) + 1
    assert_close(full.gradient(z, y), plain.gradient(z, y))
