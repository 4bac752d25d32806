"""Deliberately broken losses are caught by their suite, which names the identity that broke."""

import pytest
import torch
from twins import broken, name

from curvlib import AutogradLoss
from curvlib.output_losses import OutputLoss
from curvlib.testing import LossCase, check_loss


class Squares(OutputLoss):
    """Half the squared error: what the broken ones differ from."""

    def value(self, outputs, targets):
        return 0.5 * (outputs - targets).square().sum() * self.scale(outputs, targets)

    def sample_gradient(self, outputs, targets, generator=None):
        draw = torch.randn(outputs.shape, dtype=outputs.dtype, generator=generator)
        return draw * self.scale(outputs, targets).sqrt()


class GradientOfSum(Squares):
    def gradient(self, outputs, targets):
        return (outputs - targets).detach()


class WrongProduct(Squares):
    def linearize(self, outputs, targets):
        return lambda V: 2.0 * V * self.scale(outputs, targets)


class WrongDirectProduct(Squares):
    def hessian_product(self, outputs, targets, V):
        return -V * self.scale(outputs, targets)


class WrongRoot(Squares):
    def hessian_sqrt(self, outputs, targets):
        yield from (0.5**0.5 * v for v in super().hessian_sqrt(outputs, targets))


class BiasedDraws(Squares):
    """The reduction's factor in place of its root."""

    def sample_gradient(self, outputs, targets, generator=None):
        draw = torch.randn(outputs.shape, dtype=outputs.dtype, generator=generator)
        return draw * self.scale(outputs, targets)


class AtTrainingLabels(Squares):
    def sample_gradient(self, outputs, targets, generator=None):
        return (outputs - targets) * self.scale(outputs, targets).sqrt()


class GlobalDraws(Squares):
    def sample_gradient(self, outputs, targets, generator=None):
        return torch.randn_like(outputs) * self.scale(outputs, targets).sqrt()


class MeanOverElements(Squares):
    def value(self, outputs, targets):
        error = 0.5 * (outputs - targets).square()
        return error.sum() if self.additive else error.mean()


class ExamplesMeet(Squares):
    def value(self, outputs, targets):
        return super().value(outputs, targets) + outputs.sum().square() * self.scale(outputs, targets)


class Transposes(Squares):
    def linearize(self, outputs, targets):
        return lambda V: V.flip(1) * self.scale(outputs, targets)


class OneDrawForAll(Squares):
    def sample_gradient(self, outputs, targets, generator=None):
        draw = torch.randn(outputs.shape[1:], dtype=outputs.dtype, generator=generator)
        return draw.expand_as(outputs) * self.scale(outputs, targets).sqrt()


class InFloat32(Squares):
    def sample_gradient(self, outputs, targets, generator=None):
        return super().sample_gradient(outputs, targets, generator).float()


class Writes(Squares):
    def gradient(self, outputs, targets):
        return outputs.detach().sub_(targets) * self.scale(outputs, targets)


class KeepsTheGraph(Squares):
    def empirical_gradient(self, outputs, targets):
        return (outputs - targets) * self.scale(outputs, targets).sqrt()


class Quartic(Squares):
    """With a Hessian that depends on the outputs."""

    def value(self, outputs, targets):
        return (outputs - targets).pow(4).sum() * self.scale(outputs, targets)


class StaleHessian(Quartic):
    """Keeps the Hessian of the first outputs of a shape."""

    def linearize(self, outputs, targets):
        kept = self.__dict__.setdefault("kept", {})
        return kept.setdefault((outputs.shape, self.additive), super().linearize(outputs, targets))


@pytest.mark.parametrize(
    ("twin", "identity"),
    [
        (GradientOfSum, "gradient = dL/dz"),
        (WrongProduct, "linearize(z, y)(V) = H V"),
        (Transposes, "linearize(z, y)(V) = H V"),
        (WrongDirectProduct, "hessian_product(z, y, V) = H V"),
        (WrongRoot, "sum_k v_k v_k^T = H_n"),
        (BiasedDraws, "E[v_n v_n^T] = H_n for drawn gradients v (mean)"),
        (AtTrainingLabels, "drawn gradients have mean zero"),
        (GlobalDraws, "the same generator gives the same draw"),
        (MeanOverElements, "sum = batch_weight x mean"),
        (ExamplesMeet, "examples do not meet"),
        (OneDrawForAll, "drawn gradients of different examples are independent (mean)"),
        (InFloat32, "sample_gradient has z's type"),
        (Writes, "a loss leaves outputs and targets as they were"),
        (KeepsTheGraph, "results carry no graph"),
        (StaleHessian, "linearize(z, y)(V) = H V, at other outputs than before"),
    ],
    ids=name,
)
def test_broken_losses(twin, identity):
    with broken(identity) as caught:
        check_loss(LossCase(twin.__name__, lambda z, r: twin(reduction=r), torch.randn_like), draws=1000)
    assert twin.__name__ in caught.value.subject


def test_the_right_loss_passes():
    check_loss(LossCase("squares", lambda z, r: Squares(reduction=r), torch.randn_like), draws=500, examples=5)


def test_a_loss_that_claims_to_have_a_likelihood():
    def quartic(z, reduction):
        def function(z, y):
            return (z - y).pow(4).sum() / (len(z) if reduction == "mean" else 1)

        return AutogradLoss(function, reduction=reduction)

    with broken("sample_gradient(z, y, generator)"):
        check_loss(LossCase("quartic", quartic, torch.randn_like))


class Masked(Squares):
    """Half the squared error of the examples whose targets are not NaN, and the mean over these."""

    def counted(self, outputs, targets):
        return ~targets.isnan().flatten(1).any(1)

    def scale(self, outputs, targets):
        return outputs.new_ones(()) if self.additive else 1.0 / self.counted(outputs, targets).sum().to(outputs.dtype)

    def batch_weight(self, outputs, targets):
        return 1.0 / self.scale(outputs, targets)

    def value(self, outputs, targets):
        counted = self.counted(outputs, targets)
        return 0.5 * (outputs[counted] - targets[counted]).square().sum() * self.scale(outputs, targets)

    def sample_gradient(self, outputs, targets, generator=None):
        counted = self.counted(outputs, targets).reshape(-1, *[1] * (outputs.ndim - 1))
        return torch.where(counted, super().sample_gradient(outputs, targets, generator), 0.0)


class MeanOverAll(Masked):
    def value(self, outputs, targets):
        total = super().value(outputs, targets) / self.scale(outputs, targets)
        return total if self.additive else total / len(outputs)


class DrawsForIgnored(Masked):
    sample_gradient = Squares.sample_gradient


def with_a_missing_target(z):
    y = torch.randn_like(z)
    y[1:] = torch.nan
    return y


@pytest.mark.parametrize(
    ("twin", "identity"),
    [
        (MeanOverAll, "sum = batch_weight x mean"),
        (DrawsForIgnored, "no gradient is drawn for examples that do not count"),
    ],
    ids=name,
)
def test_broken_losses_that_ignore_targets(twin, identity):
    with broken(identity):
        check_loss(LossCase(twin.__name__, lambda z, r: twin(reduction=r), with_a_missing_target), examples=10)


def test_the_right_loss_that_ignores_targets_passes():
    case = LossCase("masked", lambda z, r: Masked(reduction=r), with_a_missing_target)
    check_loss(case, draws=500, examples=5)
