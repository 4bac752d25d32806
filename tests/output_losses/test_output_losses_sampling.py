"""Fisher draws: their second moment is the Hessian of the loss (z-test), or the Fisher documented in its place."""

import pytest
import torch
from loss_cases import Case, normal, uniform
from torch import nn
from torch.testing import assert_close

from curvlib.output_losses import AutogradLoss, OutputLoss, output_loss

DRAWS = 3000
G = torch.Generator().manual_seed(3)


def second_moment(loss, outputs, targets):
    """Mean of v[n] v[n]^T over draws and its standard error, (N, O, O)."""
    generator = torch.Generator(outputs.device).manual_seed(1)
    draws = torch.stack([loss.sample_gradient(outputs, targets, generator).flatten(1) for _ in range(DRAWS)])
    products = torch.einsum("kno,knp->knop", draws, draws)
    return products.mean(0), products.std(0) / DRAWS**0.5


def assert_moment(loss, outputs, targets, expected):
    mean, error = second_moment(loss, outputs, targets)
    # 5.5 standard errors: about 1e-6 for all entries of all cases together
    assert ((mean - expected).abs() <= 5.5 * error + 1e-9).all()
    assert error.max() < 0.1 * expected.max()  # fine enough to see a factor 2 or a forgotten weight


def both(kind, **options):
    return [kind(reduction=reduction, **options) for reduction in ("mean", "sum")]


def elementwise_cases():
    z, y = normal(G, 2, 3), normal(G, 2, 3)
    for module in both(nn.MSELoss):
        yield Case(module, z, y)
    for options in (
        {},
        {"weight": 3 * uniform(G, 2, 1)},
        {"weight": torch.tensor(7.0), "pos_weight": 3 * uniform(G, 3)},
    ):
        for module in both(nn.BCEWithLogitsLoss, **options):
            yield Case(module, z / 2, y.sigmoid().round())
    for module in both(nn.GaussianNLLLoss):
        yield Case(module, z, (y, 0.2 + uniform(G, 2, 1)))
    for module in both(nn.PoissonNLLLoss):
        yield Case(module, z / 2, y.exp().round())


def cross_entropy_cases():
    w = 0.3 + 2 * uniform(G, 3)
    index, masked = torch.tensor([0, 2]), torch.tensor([[0, -100], [1, 2]])
    for module in both(nn.CrossEntropyLoss) + both(nn.CrossEntropyLoss, weight=w, label_smoothing=0.3):
        yield Case(module, normal(G, 2, 3), index)
    for module in both(nn.CrossEntropyLoss, weight=w) + both(nn.CrossEntropyLoss, label_smoothing=0.2):
        yield Case(module, normal(G, 2, 3, 2), masked)
    for module in both(nn.CrossEntropyLoss, weight=w):
        yield Case(module, normal(G, 2, 3, 1, 2), normal(G, 2, 3, 1, 2).softmax(1))


@pytest.mark.parametrize("case", [*elementwise_cases(), *cross_entropy_cases()], ids=lambda case: f"{case.module}")
def test_second_moment_of_the_draws_is_the_hessian(case):
    assert_moment(output_loss(case.module), case.outputs, case.targets, case.blocks())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_poisson_rate_outputs_have_another_fisher_than_ggn(reduction):
    rate, y = uniform(G, 2, 3), torch.tensor([[0.0, 1.0, 4.0], [2.0, 0.0, 9.0]], dtype=torch.float64)
    loss, c = (
        output_loss(nn.PoissonNLLLoss(log_input=False, eps=1.0, reduction=reduction)),
        1 / 6 if reduction == "mean" else 1.0,
    )
    assert_moment(loss, rate, y, c * (rate + 1).reciprocal().diag_embed())
    ggn = loss.hessian_product(rate, y, torch.ones_like(rate))
    assert_close(ggn, c * y / (rate + 1).square())
    assert (ggn - c / (rate + 1)).abs().max() > 0.1 * c


def test_draws_follow_the_generator(device):
    z, y = torch.randn(50, 4, device=device), torch.zeros(50, dtype=torch.int64, device=device)
    loss = output_loss(nn.CrossEntropyLoss())
    draws = [loss.sample_gradient(z, y, torch.Generator(device).manual_seed(seed)) for seed in (1, 1, 2)]
    assert_close(draws[0], draws[1], rtol=0, atol=0)
    assert (draws[0] != draws[2]).any()
    torch.manual_seed(5)
    first = loss.sample_gradient(z, y)
    torch.manual_seed(5)
    assert_close(loss.sample_gradient(z, y), first, rtol=0, atol=0)


def test_draws_do_not_look_at_the_training_labels(device):
    z = torch.randn(20, 3, device=device)
    for module, targets in (
        (nn.CrossEntropyLoss(), [torch.full((20,), j, device=device) for j in (0, 2)]),
        (nn.MSELoss(), [torch.zeros(20, 3, device=device), torch.ones(20, 3, device=device)]),
        (nn.BCEWithLogitsLoss(), [torch.zeros(20, 3, device=device), torch.ones(20, 3, device=device)]),
        (nn.PoissonNLLLoss(log_input=True), [torch.zeros(20, 3, device=device), torch.ones(20, 3, device=device)]),
    ):
        draws = [output_loss(module).sample_gradient(z, y, torch.Generator(device).manual_seed(0)) for y in targets]
        assert_close(*draws, rtol=0, atol=0)


def test_a_third_partys_loss_samples_with_one_method():
    class Exponential(OutputLoss):
        """Exponential waiting times, z the log of the rate: l = rate y - z."""

        def value(self, outputs, targets):
            return (outputs.exp() * targets - outputs).sum() * self.scale(outputs, targets)

        def sample_gradient(self, outputs, targets, generator=None):
            clock = torch.empty_like(outputs).exponential_(generator=generator)
            return (clock - 1) * self.scale(outputs, targets).sqrt()

    z, y = normal(G, 2, 2), uniform(G, 2, 2)
    assert_moment(Exponential(), z, y, 0.5 * torch.eye(2, dtype=torch.float64).expand(2, 2, 2))


def test_a_loss_without_likelihood_refuses_to_sample():
    loss = AutogradLoss(lambda z, y: (z - y).pow(4).mean())
    with pytest.raises(NotImplementedError, match=r"AutogradLoss has no likelihood.*GGN\(\).*sample_gradient"):
        loss.sample_gradient(torch.zeros(2, 1), torch.zeros(2, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="two devices needed")
def test_a_generator_on_another_device_is_refused():
    z = torch.zeros(2, 1, device="cuda")
    with pytest.raises(ValueError, match="generator must be on cuda"):
        output_loss(nn.MSELoss()).sample_gradient(z, z, torch.Generator("cpu"))
