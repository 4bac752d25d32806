"""Models, batches and parameters that once gave wrong numbers silently: right now, or refused by name."""

import pytest
import torch
from cases import classifier, mlp
from oracles import Network
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from curvlib import (
    GGN,
    EmpiricalFisher,
    Fisher,
    FusedKernelWarning,
    Hessian,
    LinearizationError,
    Objective,
    StaleEvaluationError,
    UnsupportedLayerError,
)
from curvlib.approximations import KFAC, BlockDiagonal, Dense, Diagonal, Exact, NonFiniteStatisticsError
from curvlib.optimizers import kfac
from curvlib.solvers import (
    QuadraticModel,
    damped_inverse,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
LAYERWISE = [KFAC(GGN()), BlockDiagonal(GGN()), Diagonal(EmpiricalFisher())]


def test_products_and_quadratic_forms_of_exact_fisher_share_their_draws():
    model, x, y = mlp([4, 5, 3]), torch.randn(9, 4).double(), torch.randint(3, (9,))
    C = Exact(Fisher()).estimate(Objective(model, nn.CrossEntropyLoss()).at((x, y)))
    v = torch.randn(C.size).double()
    torch.testing.assert_close(C.quadratic_form(v), v @ (C @ v), **CLOSE)


def test_the_model_of_an_exact_fisher_predicts_its_own_newton_step():
    objective, batch = classifier()
    evaluation = objective.at(batch)
    C, g = Exact(Fisher()).estimate(evaluation), evaluation.gradient()
    step = -(damped_inverse(C, 1e-2) @ g)
    change = QuadraticModel(value=evaluation.value, gradient=g, curvature=C, damping=1e-2).change(step)
    torch.testing.assert_close(change, 0.5 * g @ step, rtol=1e-3, atol=1e-5)


class CenteredHidden(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class TimeFirst(nn.Module):
    """Swaps examples and positions around a layer; with as many positions as examples no shape tells."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x.transpose(0, 1))).transpose(0, 1))


@pytest.mark.parametrize("approximation", LAYERWISE, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    ("model", "shape", "outputs"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Linear(4, 2)), (6, 3), (6, 2)),
        (nn.Sequential(nn.Linear(3, 4), CenteredHidden(), nn.Linear(4, 2)), (6, 3), (6, 2)),
        (TimeFirst(), (4, 4, 3), (4, 4, 2)),
    ],
    ids=["batch norm", "centred", "time first"],
)
def test_models_in_which_examples_meet_are_refused(approximation, model, shape, outputs):
    objective = Objective(model, nn.MSELoss())
    for _ in range(2):  # a failed check stays due
        with pytest.raises(UnsupportedLayerError, match="examples of a batch meet in the model"):
            approximation.estimate(objective.at((torch.randn(shape), torch.randn(outputs))))


def test_batch_norm_in_evaluation_mode_is_right():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    network = Network(model, nn.MSELoss(), torch.randn(6, 3).double(), torch.randn(6, 2).double())
    evaluation = Objective(model, network.loss).at((network.inputs, network.targets))
    torch.testing.assert_close(Diagonal(GGN()).estimate(evaluation).diagonal(), network.ggn().diagonal(), **CLOSE)
    model.train()
    with pytest.raises(UnsupportedLayerError, match="batch normalisation"):
        Diagonal(GGN()).estimate(evaluation.objective.at((network.inputs, network.targets)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(3, 4), nn.Linear(4, 2), reentrant

    def forward(self, x):
        return self.b(checkpoint(lambda t: torch.tanh(self.a(t)), x, use_reentrant=self.reentrant))


def test_reentrant_checkpoints_are_refused_and_others_right():
    x, y = torch.randn(5, 3, requires_grad=True), torch.randn(5, 2)
    with pytest.raises(UnsupportedLayerError, match="use_reentrant=False"):
        Objective(Checkpointed(True), nn.MSELoss()).at((x, y))
    model = Checkpointed(False)
    evaluation = Objective(model, nn.MSELoss()).at((x, y))
    nn.functional.mse_loss(model(x), y).backward()
    torch.testing.assert_close(evaluation.gradient(), torch.cat([p.grad.flatten() for p in model.parameters()]))


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh().square())


class OpaqueTanh(nn.Module):
    def forward(self, x):
        return OnceDifferentiable.apply(x)


def test_a_backward_pass_that_cannot_be_differentiated_is_refused_for_exact_products_only():
    model = nn.Sequential(nn.Linear(3, 4), OpaqueTanh(), nn.Linear(4, 2))
    objective, batch = Objective(model, nn.MSELoss()), (torch.randn(6, 3), torch.randn(6, 2))
    C = Exact(GGN()).estimate(objective.at(batch))
    for _ in range(2):
        with pytest.raises((LinearizationError, RuntimeError), match="differentiate"):
            C @ torch.ones(C.size)
    assert KFAC(GGN()).estimate(objective.at(batch)).trace() > 0


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 4)

    def forward(self, x):
        q = self.project(x).unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(q, q, q).mean((1, 2))


@pytest.mark.parametrize("matrix", [GGN(), Hessian()])
def test_fused_attention_gives_way_to_the_differentiable_kernel_and_says_so_once(matrix):
    batch = torch.randn(2, 3, 4).double(), torch.randn(2, 4).double()
    network = Network(Attention().double(), nn.MSELoss(), *batch)
    dense = (
        network.ggn()
        if isinstance(matrix, GGN)
        else torch.autograd.functional.hessian(
            lambda theta: network.loss(math_attention(network, theta), network.targets), network.theta
        )
    )
    objective = Objective(network.model, network.loss)
    evaluation = objective.at(batch)
    factors = KFAC(GGN()).estimate(evaluation).to_dense()
    with pytest.warns(FusedKernelWarning, match=r"SDPBackend\.MATH"):
        C = Exact(matrix).estimate(evaluation).to_dense()
    torch.testing.assert_close(C, dense, **CLOSE)
    torch.testing.assert_close(evaluation.gradient(), network.gradient(), **CLOSE)
    torch.testing.assert_close(KFAC(GGN()).estimate(evaluation).to_dense(), factors, **CLOSE)
    again = objective.at(batch)  # without a warning
    torch.testing.assert_close(Exact(matrix).estimate(again).to_dense(), dense, **CLOSE)
    torch.testing.assert_close(again.value_at(network.theta), again.value)


def math_attention(network, theta):
    with sdpa_kernel(SDPBackend.MATH):
        return network.outputs(theta)


def test_excluding_everything_leaves_the_damping_alone():
    model = nn.Sequential(nn.Bilinear(2, 2, 6))
    model.forward = lambda x: model[0](x[..., 0], x[..., 1])
    objective = Objective(model, nn.MSELoss(), l2=0.5)
    C = KFAC(GGN(), on_unsupported="exclude").estimate(objective.at((torch.randn(4, 2, 3), torch.randn(4, 6))))
    torch.testing.assert_close(C.to_dense(), 0.5 * torch.eye(C.size))


def test_models_of_mixed_precision_have_statistics_of_one_type():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x.double())).float())

    objective = Objective(Mixed(), nn.MSELoss())
    evaluation = objective.at((torch.randn(5, 3), torch.randn(5, 2)))
    for approximation in (KFAC(GGN()), BlockDiagonal(GGN()), Diagonal(GGN())):
        step = damped_inverse(approximation.estimate(evaluation), 0.1) @ evaluation.gradient()
        assert step.dtype == torch.float64


def test_loaders_with_a_smaller_last_batch_may_be_shuffled():
    objective, (x, y) = classifier()
    batches = [(x[:16], y[:16]), (x[16:32], y[16:32]), (x[32:], y[32:])]
    C = Exact(GGN()).estimate_over(objective, batches, progress=False)
    v = torch.randn(C.size)
    before = C @ v
    batches[:] = [(x[24:], y[24:]), (x[8:24], y[8:24]), (x[:8], y[:8])]
    torch.testing.assert_close(C @ v, before, rtol=1e-4, atol=1e-6)


def test_a_loader_that_can_be_used_once_is_refused_for_exact():
    objective, batch = classifier()
    with pytest.raises(TypeError, match="a list or a DataLoader instead of an iterator"):
        Exact(GGN()).estimate_over(objective, iter([batch]), progress=False)


def test_products_with_no_columns():
    objective, batch = classifier()
    C = Exact(GGN()).estimate(objective.at(batch))
    assert (C @ torch.zeros(C.size, 0)).shape == (C.size, 0)


def test_changes_of_the_batch_are_noticed():
    objective, (x, y) = classifier()
    evaluation = objective.at((x, y))
    y[0] = (y[0] + 1) % 3
    with pytest.raises(StaleEvaluationError, match="the batch has changed"):
        evaluation.gradient()


@pytest.mark.parametrize(
    "use",
    [lambda e: e.value, lambda e: e.outputs, lambda e: e.output_gradient],
    ids=["value", "outputs", "output_gradient"],
)
def test_values_of_a_stale_evaluation_raise_too(use):
    objective, batch = classifier()
    evaluation = objective.at(batch)
    with torch.no_grad():
        objective.model[0].bias.add_(1.0)
    with pytest.raises(StaleEvaluationError):
        use(evaluation)


def test_a_model_whose_type_changed_needs_a_new_objective():
    objective, batch = classifier()
    objective.model.double()
    with pytest.raises(RuntimeError, match=r"dtype, device or shape.*make a new Objective"):
        objective.at((batch[0].double(), batch[1]))


def test_describe_with_a_batch_shows_what_the_model_alone_does_not():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(3, 3)

        def forward(self, x):
            return nn.functional.linear(self.encoder(x), self.encoder.weight.t())

    objective = Objective(Reused(), nn.MSELoss())
    batch = torch.randn(4, 3), torch.randn(4, 3)
    assert "used outside" not in str(objective.describe(KFAC(GGN())))
    assert "used outside of its module's own call" in str(objective.describe(KFAC(GGN()), batch))


@pytest.mark.parametrize("how", ["assign", "attribute", "frozen"])
def test_replaced_or_frozen_parameters_are_noticed(how):
    objective, batch = classifier()
    evaluation = objective.at(batch)
    C, model = Exact(GGN()).estimate(evaluation), objective.model
    if how == "assign":
        model.load_state_dict({key: value + 10 for key, value in model.state_dict().items()}, assign=True)
    elif how == "attribute":
        model[0].weight = nn.Parameter(torch.zeros(8, 5))
    else:
        model[0].weight.requires_grad_(False)
    for use in (evaluation.gradient, lambda: evaluation.value, lambda: C @ torch.ones(C.size)):
        with pytest.raises(StaleEvaluationError, match="replaced or frozen"):
            use()
    if how != "frozen":
        assert objective.at(batch).gradient().isfinite().all()


def test_replaced_modules_need_a_new_objective():
    objective, batch = classifier()
    objective.model[0] = nn.Linear(5, 8)
    with pytest.raises(RuntimeError, match="module that holds parameters has been replaced"):
        objective.at(batch)


class Shifted(nn.Module):
    """Every example sees the one before it: the first depends on itself alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h + torch.cat([torch.zeros_like(h[:1]), h[:-1]]))


@pytest.mark.parametrize("flip", [False, True])
def test_examples_that_see_only_those_before_or_after_them_are_refused(flip):
    class Model(Shifted):
        def forward(self, x):
            return super().forward(x.flip(0)).flip(0) if flip else super().forward(x)

    evaluation = Objective(Model(), nn.MSELoss()).at((torch.randn(7, 3), torch.randn(7, 2)))
    with pytest.raises(UnsupportedLayerError, match="examples of a batch meet"):
        BlockDiagonal(GGN()).estimate(evaluation)


def test_values_at_other_parameters_need_the_same_batch_and_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    objective = Objective(model, nn.CrossEntropyLoss())
    evaluation, theta = objective.at((x, y)), objective.parameter_vector()
    torch.testing.assert_close(evaluation.value_at(theta), evaluation.value)
    model.eval()
    with pytest.raises(StaleEvaluationError, match="training mode"):
        evaluation.value_at(theta)
    model.train()
    x.zero_()
    with pytest.raises(StaleEvaluationError, match="the batch"):
        evaluation.value_at(theta)


def test_gradient_hooks_on_parameters_are_refused():
    objective, batch = classifier()
    objective.model[0].weight.register_hook(lambda g: 2 * g)
    with pytest.raises(ValueError, match="gradient hook"):
        objective.at(batch)


@pytest.mark.parametrize("approximation", [*LAYERWISE, Exact(GGN()), Exact(Hessian()), Dense(GGN())], ids=repr)
def test_batches_that_are_not_finite_are_named_as_such(approximation):
    objective, (x, y) = classifier()
    x[0, 0] = float("nan")
    for _ in range(2):
        with pytest.raises(NonFiniteStatisticsError, match="objective is nan"):
            approximation.estimate(objective.at((x, y)))
    with pytest.raises(NonFiniteStatisticsError, match=r"not finite|objective is nan"):
        approximation.estimate_over(objective, [(x, y)], progress=False)


def test_examples_that_meet_are_found_after_a_batch_that_was_not_finite():
    objective = Objective(nn.Sequential(nn.Linear(3, 4), CenteredHidden(), nn.Linear(4, 2)), nn.MSELoss())
    with pytest.raises(NonFiniteStatisticsError):
        KFAC(GGN()).estimate(objective.at((torch.full((6, 3), float("inf")), torch.zeros(6, 2))))
    with pytest.raises(UnsupportedLayerError, match="meet in the model"):
        KFAC(GGN()).estimate(objective.at((torch.randn(6, 3), torch.zeros(6, 2))))


def test_padded_transformer_encoders_are_one_function_with_and_without_gradients():
    """In evaluation mode PyTorch's fast path gives zeros at padded positions, where no gradient is asked for."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x, padding):
            return self.encoder(x, src_key_padding_mask=padding)

    model, x = Encoder().eval(), torch.randn(2, 3, 4)
    batch = (x, torch.tensor([[False] * 3, [False, True, True]])), torch.randn(2, 3, 4)
    objective = Objective(model, nn.MSELoss())
    evaluation = objective.at(batch)
    assert torch.backends.mha.get_fastpath_enabled()
    torch.testing.assert_close(evaluation.value_at(objective.parameter_vector()), evaluation.value)
    torch.testing.assert_close(objective.value(batch), evaluation.value)
    assert torch.backends.mha.get_fastpath_enabled()


def test_examples_that_meet_behind_a_head_of_zeros_are_found_once_the_head_moves():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    nn.init.zeros_(model[3].weight)
    objective, batch = Objective(model, nn.MSELoss()), (torch.randn(6, 3), torch.randn(6, 2))
    Diagonal(GGN()).estimate(objective.at(batch))  # right: nothing passes the head
    nn.init.normal_(model[3].weight)
    with pytest.raises(UnsupportedLayerError, match="examples of a batch meet"):
        Diagonal(GGN()).estimate(objective.at(batch))


class TwoNames(nn.Module):
    """One module under two names, and another that shares its weight and a buffer."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a
        self.c = nn.Linear(3, 3)
        self.c.weight, self.c.bias = self.a.weight, self.a.bias
        self.register_buffer("calls", torch.zeros(()))
        self.c.register_buffer("calls", self.calls)

    def forward(self, x):
        self.c.calls += 1
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_modules_with_two_names_keep_their_parameters_and_train():
    model, batch = TwoNames().double(), (torch.randn(8, 3).double(), torch.randn(8, 3).double())
    objective = Objective(model, nn.MSELoss())
    evaluation, weight, calls = objective.at(batch), model.a.weight, float(model.calls)
    theta = objective.parameter_vector()
    for _ in range(2):
        torch.testing.assert_close(evaluation.value_at(theta), evaluation.value)
        moved = evaluation.value_at(2 * theta)
    assert model.a.weight is model.c.weight is weight
    assert float(model.calls) == calls, "values elsewhere leave the buffers as they are"
    optimizer = kfac(objective)
    losses = [optimizer.step(batch).loss for _ in range(5)]
    assert losses[-1] < losses[0]
    objective.layout.write(objective.parameters, 2 * theta)
    torch.testing.assert_close(objective.value(batch), moved)
