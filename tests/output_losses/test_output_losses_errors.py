"""Every bad input has an error that names the argument, what was expected, what came, and the remedy."""

import pytest
import torch
from torch import nn

from curvlib.output_losses import (
    MSE,
    AutogradLoss,
    BCEWithLogits,
    CrossEntropy,
    GaussianNLL,
    NoTargetsError,
    OutputLoss,
    PoissonNLL,
    output_loss,
)

Z = torch.zeros(4, 3)
LABELS = torch.tensor([0, 1, 2, 0])
SUPPORTED = [nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.GaussianNLLLoss, nn.PoissonNLLLoss]


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "error", "message"),
    [
        (MSE(), Z[:0], Z[:0], ValueError, r"outputs of MSE .* N >= 1 .*got \(0, 3\)"),
        (CrossEntropy(), Z[:0], LABELS[:0], ValueError, r"outputs of CrossEntropy .*got \(0, 3\)"),
        (MSE(), torch.tensor(0.0), torch.tensor(0.0), ValueError, r"outputs of MSE .*got \(\)"),
        (MSE(), Z.long(), Z, TypeError, "outputs of MSE must be a floating-point tensor, got torch.int64"),
        (MSE(), (Z,), Z, TypeError, "outputs of MSE .*got tuple"),
        (MSE(), Z, [0.0], TypeError, "targets of MSE must be a tensor, got list"),
        (MSE(), Z, Z.long(), TypeError, "targets of MSE must be floating point, got torch.int64"),
        (MSE(), Z, Z[:, :1], ValueError, r"targets of MSE must have .*\(4, 3\), got \(4, 1\)"),
        (MSE(), Z, Z.to("meta"), ValueError, "targets of MSE must be on cpu, .*got meta"),
        (BCEWithLogits(), Z, Z + 2, ValueError, r"targets of BCEWithLogits must be in \[0, 1\], got 2"),
        (BCEWithLogits(weight=torch.ones(2, 4, 3)), Z, Z, ValueError, r"weight of BCEWithLogits .*got \(2, 4, 3\)"),
        (BCEWithLogits(pos_weight=torch.ones(4)), Z, Z, ValueError, r"pos_weight of BCEWithLogits .*got \(4,\)"),
        (
            BCEWithLogits(weight=torch.ones(3)),
            Z.to("meta"),
            Z.to("meta"),
            ValueError,
            "weight of BCEWithLogits must be on meta, .*got cpu",
        ),
        (CrossEntropy(), Z[:, 0], LABELS, ValueError, r"outputs of CrossEntropy .* \(N, C, ...\) .*got \(4,\)"),
        (CrossEntropy(), Z[:, :1], LABELS, ValueError, "C >= 2 classes.*BCEWithLogitsLoss"),
        (CrossEntropy(), Z, LABELS.int(), TypeError, "targets of CrossEntropy .*got torch.int32.*long"),
        (CrossEntropy(), Z, LABELS[:3], ValueError, r"targets of CrossEntropy must have shape \(4,\).*got \(3,\)"),
        (CrossEntropy(), Z, LABELS[:, None], ValueError, r"must have shape \(4,\) .*got \(4, 1\)"),
        (CrossEntropy(), Z, LABELS + 1, ValueError, r"targets of CrossEntropy must be in 0 ... 2 .*got 1 ... 3"),
        (CrossEntropy(), Z, LABELS - 1, ValueError, r"targets of CrossEntropy must be in 0 ... 2 .*got -1"),
        (CrossEntropy(), Z, LABELS.float(), ValueError, r"if probabilities.*\(4, 3\), got \(4,\).*long"),
        (CrossEntropy(ignore_index=1), Z, Z, ValueError, "ignore_index of CrossEntropy must be negative.*got 1"),
        (CrossEntropy(), Z, Z - 1, ValueError, "if probabilities, must be >= 0, got -1"),
        (CrossEntropy(), Z, LABELS * 0 - 100, NoTargetsError, "position that counts.*ignore_index = -100"),
        (CrossEntropy(ignore_index=0), Z, LABELS * 0, NoTargetsError, "position that counts.*ignore_index = 0"),
        (CrossEntropy(weight=torch.tensor([0.0, 1, 1])), Z, LABELS * 0, NoTargetsError, "class weight 0.*leave such"),
        (
            CrossEntropy(weight=torch.ones(4)),
            Z,
            LABELS,
            ValueError,
            "weight of CrossEntropy must have 3 entries, .*got 4",
        ),
        (GaussianNLL(), Z, Z, TypeError, r"pair \(target, variance\), got Tensor"),
        (GaussianNLL(), Z, (Z, Z, Z), TypeError, r"pair \(target, variance\)"),
        (GaussianNLL(), Z, (Z[:2], 1.0), ValueError, "targets of GaussianNLL must have the outputs' shape"),
        (GaussianNLL(), Z, (Z, Z - 1), ValueError, "variance of GaussianNLL must not be negative"),
        (GaussianNLL(), Z, (Z, -1.0), ValueError, "variance of GaussianNLL must not be negative, got -1"),
        (GaussianNLL(), Z, (Z, torch.ones(3)), ValueError, r"variance of GaussianNLL must have shape.*got \(3,\)"),
        (GaussianNLL(), Z, (Z, torch.ones(1, 1)), ValueError, r"variance of GaussianNLL must have shape.*got \(1, 1\)"),
        (GaussianNLL(), Z, (Z, torch.ones(4, 3, requires_grad=True)), ValueError, "given, not predicted"),
        (GaussianNLL(), Z, (Z, "1"), TypeError, "variance of GaussianNLL must be a tensor, got str"),
        (PoissonNLL(), Z, Z - 1, ValueError, r"targets of PoissonNLL must be in \[0, inf\], got -1"),
        (PoissonNLL(log_input=False), Z - 1, Z, ValueError, "outputs of PoissonNLL with log_input=False.*got -1"),
        (AutogradLoss(lambda z, y: z), Z, Z, ValueError, r"must return a scalar, got shape \(4, 3\)"),
        (AutogradLoss(lambda z, y: 1.0), Z, Z, TypeError, "must return a tensor, got float"),
    ],
)
def test_check_names_what_is_wrong(loss, outputs, targets, error, message):
    with pytest.raises(error, match=message):
        loss.check(outputs, targets)


def test_one_target_that_counts_is_enough():
    CrossEntropy().check(Z, torch.tensor([-100, -100, 2, -100]))
    assert issubclass(NoTargetsError, ValueError)


def test_sums_may_ignore_every_target():
    loss = CrossEntropy(reduction="sum")
    loss.check(Z, LABELS * 0 - 100)
    assert not loss.gradient(Z, LABELS * 0 - 100).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossEntropy(weight=torch.tensor([1.0, -1.0])), "weight of CrossEntropy .*without negative"),
        (lambda: CrossEntropy(weight=torch.ones(2, 2)), "weight of CrossEntropy must be a vector"),
        (lambda: CrossEntropy(label_smoothing=1.5), r"label_smoothing of CrossEntropy must be in \[0, 1\], got 1.5"),
        (lambda: BCEWithLogits(weight=torch.tensor(-1.0)), "weight of BCEWithLogits must not be negative, got -1"),
        (lambda: BCEWithLogits(pos_weight=torch.tensor(-1.0)), "pos_weight of BCEWithLogits must not be negative"),
        (lambda: GaussianNLL(eps=0.0), "eps of GaussianNLL must be positive, got 0"),
        (lambda: PoissonNLL(eps=-1.0), "eps of PoissonNLL must be positive, got -1"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", SUPPORTED)
def test_reduction_none_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=r"reduction of \w+ must be 'mean' or 'sum', got 'none'"):
        output_loss(kind(reduction="none"))


@pytest.mark.parametrize("loss", [nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(), nn.KLDivLoss(), lambda z, y: z.sum()])
def test_other_losses_get_the_list_and_the_remedies(loss):
    with pytest.raises(TypeError) as caught:
        output_loss(loss)
    message = str(caught.value)
    assert type(loss).__name__ in message
    assert all(f"torch.{kind.__name__}" in message for kind in SUPPORTED)
    assert "output_loss.register" in message
    assert "AutogradLoss" in message


def test_a_loss_class_in_place_of_an_instance_is_named():
    with pytest.raises(TypeError, match=r"an instance of .* got the class MSELoss"):
        output_loss(nn.MSELoss)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_a_subclass_that_changes_forward_is_refused_until_it_is_registered(kind):
    plain = type("Plain", (kind,), {})
    assert isinstance(output_loss(plain()), type(output_loss(kind())))
    changed = type("Focal", (kind,), {"forward": lambda self, z, y: (z - y).square().sum()})
    with pytest.raises(TypeError, match=f"Focal overrides forward of {kind.__name__}.*register"):
        output_loss(changed())
    patched = kind()
    patched.forward = lambda z, y: z.sum()
    with pytest.raises(TypeError, match="overrides forward"):
        output_loss(patched)
    output_loss.register(changed, lambda module: MSE(reduction="sum"))
    assert output_loss(changed()).reduction == "sum"


def test_an_output_loss_is_returned_as_it_is():
    loss = MSE(reduction="sum")
    assert output_loss(loss) is loss


def test_a_loss_without_value_cannot_be_made():
    with pytest.raises(TypeError, match="value"):
        type("Nothing", (OutputLoss,), {})()


def test_strategies_are_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        MSE().reduction = "sum"
    with pytest.raises(TypeError, match="positional"):
        CrossEntropy(None)
    with pytest.raises(TypeError, match=r"function of AutogradLoss must be callable .*got 'mse'"):
        AutogradLoss("mse")


def concave(z, y):
    return -(z[:, 0] ** 2).sum() + (z[:, 1] ** 2).sum()


def test_a_loss_that_is_not_convex_has_no_root():
    loss = AutogradLoss(concave, reduction="sum")
    z = torch.randn(3, 2)
    assert (loss.hessian_product(z, None, z) == 2 * z * torch.tensor([-1.0, 1.0])).all()
    with pytest.raises(ValueError, match=r"convex in the outputs.*eigenvalue -2 .*Hessian\(\)"):
        list(loss.hessian_sqrt(z, None))


def test_autograd_loss_tells_when_the_function_does_not_split_over_examples():
    z, y = torch.randn(2, 5, 3).unbind(0)

    def squares(z, y):
        return (z - y).square().sum()

    AutogradLoss(squares, reduction="sum").check(z, y)
    AutogradLoss(lambda z, y: squares(z, y) / len(z)).check(z, y)
    AutogradLoss(lambda z, y: squares(z, y[0]) / len(z)).check(z, (y, [y]))
    AutogradLoss(lambda z, y: squares(z, y) * torch.nan).check(z, y)
    AutogradLoss(lambda z, y: squares(z, 0.0).sqrt()).check(z, {"structure": "unknown"})
    for wrong in (
        AutogradLoss(squares),
        AutogradLoss(lambda z, y: squares(z, y) / len(z), reduction="sum"),
        AutogradLoss(lambda z, y: squares(z, y).sqrt(), reduction="sum"),
    ):
        with pytest.raises(ValueError, match=f"must be a {wrong.reduction} over the N examples"):
            wrong.check(z, y)
