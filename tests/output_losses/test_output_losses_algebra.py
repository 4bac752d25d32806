"""Value, gradient, Hessian and its root of every loss, against double backward through PyTorch's own modules."""

import pytest
import torch
from hypothesis import assume, given, settings
from loss_cases import cases
from torch import nn
from torch.testing import assert_close

from curvlib.output_losses import AutogradLoss, OutputLoss, output_loss

EXAMPLES = settings(max_examples=120)


def unit_products(product, outputs):
    """Columns of the matrix of a product function, (N, O, N, O)."""
    eye = torch.eye(outputs.numel(), dtype=outputs.dtype, device=outputs.device)
    columns = [product(e.reshape(outputs.shape)).flatten() for e in eye]
    return torch.stack(columns, dim=1).reshape(len(outputs), -1, len(outputs), outputs[0].numel())


def outer_blocks(vectors, outputs):
    """sum_k v_k[n] v_k[n]^T, (N, O, O)."""
    return sum(torch.einsum("no,np->nop", v, v) for v in (v.reshape(len(outputs), -1) for v in vectors))


def on_their_own(loss):
    """The same loss with inherited methods only."""
    return type(
        "Inherited",
        (OutputLoss,),
        {"value": lambda self, z, y: loss.value(z, y), "scale": lambda self, z, y: loss.scale(z, y)},
    )(reduction=loss.reduction)


@EXAMPLES
@given(cases())
def test_value_is_the_modules_own_number(case):
    loss = output_loss(case.module)
    loss.check(case.outputs, case.targets)
    assert_close(loss.value(case.outputs, case.targets), case.torch_value(case.outputs))


@EXAMPLES
@given(cases())
def test_gradient_is_that_of_the_module(case):
    z = case.outputs.clone().requires_grad_()
    expected = torch.autograd.grad(case.torch_value(z), z)[0]
    gradient = output_loss(case.module).gradient(case.outputs, case.targets)
    assert_close(gradient, expected)
    assert not gradient.requires_grad


@EXAMPLES
@given(cases())
def test_value_is_differentiable_twice_in_the_outputs(case):
    z = case.outputs.clone().requires_grad_()
    gradient = torch.autograd.grad(output_loss(case.module).value(z, case.targets), z, create_graph=True)[0]
    HV = torch.autograd.grad(gradient, z, torch.ones_like(z))[0]
    assert_close(HV.flatten(1) if HV.ndim > 1 else HV[:, None], case.blocks().sum(2))


@EXAMPLES
@given(cases())
def test_hessian_product_is_the_dense_hessian_column_by_column(case):
    loss, expected = output_loss(case.module), case.hessian()
    linearized = loss.linearize(case.outputs, case.targets)
    assert_close(unit_products(linearized, case.outputs), expected)
    V = torch.randn_like(case.outputs)
    assert_close(loss.hessian_product(case.outputs, case.targets, V), linearized(V), rtol=0, atol=0)


@EXAMPLES
@given(cases())
def test_hessian_sqrt_multiplies_to_the_blocks_of_the_hessian(case):
    loss = output_loss(case.module)
    vectors = list(loss.hessian_sqrt(case.outputs, case.targets))
    # the softmax does not see a constant added to all logits of a position
    unseen = case.outputs[0, 0].numel() if isinstance(case.module, nn.CrossEntropyLoss) else 0
    assert len(vectors) == case.outputs[0].numel() - unseen
    assert all(v.shape == case.outputs.shape for v in vectors)
    assert_close(outer_blocks(vectors, case.outputs), case.blocks())


@settings(max_examples=60)
@given(cases())
def test_inherited_methods_equal_the_closed_forms(case):
    loss, z, y = output_loss(case.module), case.outputs, case.targets
    inherited = on_their_own(loss)
    V = torch.randn_like(z)
    assert_close(inherited.hessian_product(z, y, V), loss.hessian_product(z, y, V))
    assert_close(outer_blocks(inherited.hessian_sqrt(z, y), z), case.blocks())


@EXAMPLES
@given(cases())
def test_scale_is_the_factor_of_the_reduction(case):
    loss = output_loss(case.module)
    assert_close(loss.scale(case.outputs, case.targets), case.scale())
    assert_close(loss.batch_weight(case.outputs, case.targets), 1 / case.scale())
    assert loss.additive == (case.module.reduction == "sum")


@EXAMPLES
@given(cases())
def test_batches_make_the_loss_of_all_data(case):
    assume(len(case.outputs) > 1)
    loss, parts = output_loss(case.module), [case.example(n) for n in range(len(case.outputs))]
    losses = [output_loss(part.module) for part in parts]
    values = torch.stack([li.value(p.outputs, p.targets) for li, p in zip(losses, parts, strict=True)])
    weights = torch.stack([li.batch_weight(p.outputs, p.targets) for li, p in zip(losses, parts, strict=True)])
    assume(bool((weights > 0).all()))
    total = values.sum() if loss.additive else (weights * values).sum() / weights.sum()
    assert_close(total, loss.value(case.outputs, case.targets))


@EXAMPLES
@given(cases())
def test_empirical_gradient_is_that_of_every_example_alone(case):
    v = output_loss(case.module).empirical_gradient(case.outputs, case.targets)
    for n in range(len(case.outputs)):
        alone = case.example(n)
        z = alone.outputs.clone().requires_grad_()
        g = torch.autograd.grad(alone.torch_value(z, "sum"), z)[0].flatten()
        assert_close(torch.outer(v[n].flatten(), v[n].flatten()), case.scale() * torch.outer(g, g))


@EXAMPLES
@given(cases())
def test_examples_do_not_meet_in_the_hessian(case):
    H = case.hessian()
    for n in range(len(H)):
        H[n, :, n] = 0
    assert not H.any()


class LogCosh(OutputLoss):
    """What a third party writes."""

    def value(self, outputs, targets):
        return (outputs - targets).cosh().log().sum() * self.scale(outputs, targets)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_third_partys_loss_needs_its_value_alone(reduction, device):
    z, y = torch.randn(2, 4, 3, dtype=torch.float64, device=device).unbind(0)
    loss, c = output_loss(LogCosh(reduction=reduction)), 1 / 4 if reduction == "mean" else 1.0
    diagonal = c / (z - y).cosh().square()
    loss.check(z, y)
    assert_close(loss.gradient(z, y), c * (z - y).tanh())
    assert_close(loss.empirical_gradient(z, y), c**0.5 * (z - y).tanh())
    assert_close(loss.hessian_product(z, y, z), diagonal * z)
    assert_close(outer_blocks(loss.hessian_sqrt(z, y), z), diagonal.diag_embed())


@settings(max_examples=60)
@given(cases())
def test_autograd_loss_equals_the_closed_forms(case):
    reduction, z, y = case.module.reduction, case.outputs, case.targets
    loss, V = AutogradLoss(lambda z, y: output_loss(case.module).value(z, y), reduction=reduction), torch.randn_like(z)
    assert_close(loss.value(z, y), case.torch_value(z))
    assert_close(loss.hessian_product(z, y, V), output_loss(case.module).hessian_product(z, y, V))
    assert_close(outer_blocks(loss.hessian_sqrt(z, y), z), case.blocks())


def test_autograd_loss_of_a_linear_function_has_no_curvature():
    z = torch.randn(3, 2)
    for function in (lambda z, y: z.sum(), lambda z, y: (z[:, 0] ** 2).sum() * 0 + z.sum()):
        loss = AutogradLoss(function, reduction="sum")
        assert not loss.hessian_product(z, None, z).any()
        assert not torch.stack(list(loss.hessian_sqrt(z, None))).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("module", [nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.CrossEntropyLoss()])
def test_half_precision_outputs_are_computed_in_float32(module, dtype, device):
    z, y = torch.rand(2, 4, 3, device=device, dtype=dtype).unbind(0)
    loss, wide = output_loss(module), (z.float(), y.float())
    loss.check(z, y)
    for method in (loss.value, loss.gradient, loss.empirical_gradient, loss.scale, loss.batch_weight):
        assert method(z, y).dtype == torch.float32
        assert_close(method(z, y), method(*wide))
    assert_close(loss.hessian_product(z, y, z), loss.hessian_product(*wide, z.float()))
    assert_close(torch.stack(list(loss.hessian_sqrt(z, y))), torch.stack(list(loss.hessian_sqrt(*wide))))
    assert loss.sample_gradient(z, y).dtype == torch.float32


def test_results_keep_no_graph():
    z, y = torch.randn(3, 2, requires_grad=True), torch.tensor([0, 1, 1])
    V = torch.randn(3, 2, requires_grad=True)
    for loss in (output_loss(nn.CrossEntropyLoss()), AutogradLoss(nn.functional.cross_entropy)):
        results = [
            loss.gradient(z, y),
            loss.hessian_product(z, y, V),
            *loss.hessian_sqrt(z, y),
        ]
        assert not any(result.requires_grad for result in results)
    mse = output_loss(nn.MSELoss())
    results = [
        mse.hessian_product(z, z, V),
        mse.sample_gradient(z, z),
        *mse.hessian_sqrt(z, z),
    ]
    assert not any(result.requires_grad for result in results)


def test_masked_and_extreme_logits_stay_finite(device):
    inf = torch.inf
    z = torch.tensor([[0, -inf, 1], [-inf, -inf, 0], [0, -inf, -inf], [900.0, -900, 0]], device=device)
    y, V = torch.tensor([2, 2, 0, 0], device=device), torch.randn(4, 3, device=device)
    loss = output_loss(nn.CrossEntropyLoss())
    p = z.double().softmax(1)
    expected = (p.diag_embed() - torch.einsum("ni,nj->nij", p, p)) / 4
    assert_close(outer_blocks(loss.hessian_sqrt(z, y), z).double(), expected, atol=1e-6, rtol=1e-5)
    assert loss.hessian_product(z, y, V).isfinite().all()
    assert loss.sample_gradient(z, y).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="synchronisation needs a GPU")
@pytest.mark.parametrize("module", [nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.CrossEntropyLoss(), nn.PoissonNLLLoss()])
def test_nothing_waits_for_the_device(module):
    z = torch.rand(4, 3, device="cuda")
    y = torch.arange(4, device="cuda") % 3 if isinstance(module, nn.CrossEntropyLoss) else torch.ones_like(z)
    loss = output_loss(module)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss.check(z, y)
        loss.value(z, y), loss.empirical_gradient(z, y), loss.hessian_product(z, y, z), loss.sample_gradient(z, y)
        list(loss.hessian_sqrt(z, y))
    finally:
        torch.cuda.set_sync_debug_mode("default")
