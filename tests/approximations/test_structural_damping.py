"""StructuralDamping equals J_h^T M J_h by brute force, alone and in sums, and says what it cannot do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recurrent import NETWORKS, Recurrent, jacobian_of_states, network, parameter_vector, sequences, states_at
from torch import nn

import curvlib
from curvlib import GGN, EmpiricalFisher, Fisher, Hessian, Objective
from curvlib.approximations import (
    Dense,
    Exact,
    Identity,
    MatchingCrossEntropy,
    MatchingLoss,
    NonFiniteStatisticsError,
    SquaredChange,
    StructuralDamping,
    joined,
)
from curvlib.objective import ObservedPass
from curvlib.operators import MatrixFree

# float64 sums of a few hundred products of numbers around 1
CLOSE = {"rtol": 1e-9, "atol": 1e-12}
LOSSES = {
    "squared change": (SquaredChange(), torch.ones_like),
    "cross-entropy": (MatchingCrossEntropy(), lambda h: 1 / (1 - h**2)),
}
BOUNDED = sorted(NETWORKS.keys() - {"relu", "projection"})


class FourthPowers(MatchingLoss):
    """What a third party writes: a loss whose second derivative depends on the states."""

    def value(self, changed, states):
        return (changed**4 / 12 - states**3 * changed / 3).sum()


def targets_for(model, inputs):
    torch.manual_seed(2)
    return torch.randn_like(model(inputs))


def evaluate(model, inputs, loss=None, **options):
    objective = Objective(model, loss or nn.MSELoss(), **options)
    return objective.at((inputs, targets_for(model, inputs)))


def dense(model, inputs, weights=torch.ones_like):
    h, J = jacobian_of_states(model, inputs)
    return J.T @ (weights(h).unsqueeze(1) * J) / len(inputs)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", BOUNDED)
def test_it_is_the_dense_matrix(name, loss):
    model, inputs = network(name), sequences()
    matching, weights = LOSSES[loss]
    S, expected = StructuralDamping(loss=matching).estimate(evaluate(model, inputs)), dense(model, inputs, weights)
    assert expected.norm() > 0.1
    V = torch.randn(S.size, 2, dtype=torch.float64)
    torch.testing.assert_close(S.to_dense(), expected, **CLOSE)
    torch.testing.assert_close(S @ V[:, 0], expected @ V[:, 0], **CLOSE)
    torch.testing.assert_close(S.quadratic_form(V), V.T @ expected @ V, **CLOSE)


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - set(BOUNDED)))
def test_unbounded_states(name):
    model, inputs = network(name), sequences()
    S = StructuralDamping().estimate(evaluate(model, inputs))
    torch.testing.assert_close(S.to_dense(), dense(model, inputs), **CLOSE)


def test_a_matching_loss_of_ones_own_needs_its_value_alone():
    model, inputs = network("gru"), sequences()
    S = StructuralDamping(loss=FourthPowers()).estimate(evaluate(model, inputs))
    torch.testing.assert_close(S.to_dense(), dense(model, inputs, torch.square), **CLOSE)


@pytest.mark.parametrize(
    "loss", [SquaredChange(), MatchingCrossEntropy(), FourthPowers()], ids=["squared", "cross-entropy", "own"]
)
def test_it_is_the_hessian_of_the_matching_loss_at_the_parameters(loss):
    model, inputs = network("lstm"), sequences()
    theta = parameter_vector(model)
    h = states_at(model, inputs, theta)

    def change(theta):
        return loss.value(states_at(model, inputs, theta), h) / len(inputs)

    gradient = torch.autograd.functional.jacobian(change, theta)
    torch.testing.assert_close(gradient, torch.zeros_like(theta), **CLOSE)  # h is where the loss is smallest
    S = StructuralDamping(loss=loss).estimate(evaluate(model, inputs))
    torch.testing.assert_close(S.to_dense(), torch.autograd.functional.hessian(change, theta), **CLOSE)


bounds = st.sampled_from([(-1.0, 1.0), (0.0, 1.0), (-2.0, 5.0)])


@given(bounds, st.lists(st.floats(0.01, 0.99), min_size=1, max_size=5))
def test_second_derivatives_of_the_matching_losses(bound, inside):
    low, high = bound
    h = low + (high - low) * torch.tensor(inside, dtype=torch.float64)
    for loss in (SquaredChange(), MatchingCrossEntropy(low=low, high=high)):
        expected = torch.autograd.functional.hessian(lambda changed, loss=loss: loss.value(changed, h), h)
        product = loss.linearize(h)
        torch.testing.assert_close(torch.stack([product(x) for x in torch.eye(len(h)).double()]), expected, **CLOSE)
        torch.testing.assert_close(MatchingLoss.linearize(loss, h)(h), expected @ h, **CLOSE)


@pytest.mark.parametrize(("function", "low", "weights"), [
    (torch.tanh, -1.0, lambda h: 1 - h**2), (torch.sigmoid, 0.0, lambda h: h * (1 - h))
], ids=["tanh", "sigmoid"])  # fmt: skip
def test_the_cross_entropy_in_terms_of_pre_activations(function, low, weights):
    s = torch.linspace(-3, 3, 7, dtype=torch.float64)
    loss = MatchingCrossEntropy(low=low)
    hessian = torch.autograd.functional.hessian(lambda changed: loss.value(function(changed), function(s)), s)
    torch.testing.assert_close(hessian, torch.diag(weights(function(s))), **CLOSE)


def test_saturated_states_count_nothing():
    model, inputs = network("rnn").float(), sequences().float()
    with torch.no_grad():
        model.rnn.bias_ih_l0[0] = 50.0  # tanh(50) is 1 in float32
    S = StructuralDamping(loss=MatchingCrossEntropy()).estimate(evaluate(model, inputs))
    product = S @ torch.ones(S.size)
    assert product.isfinite().all()
    assert product.norm() > 0


@pytest.mark.parametrize("matrix", [GGN(), Fisher(), EmpiricalFisher(), Hessian()], ids=str)
@pytest.mark.parametrize("name", ["rnn", "lstm cells"])
def test_sums_with_the_exact_matrix_joined_and_not(name, matrix):
    model, inputs = network(name), sequences()
    evaluation = evaluate(model, inputs, l2=0.3)
    C, S = Exact(matrix).estimate(evaluation), StructuralDamping().estimate(evaluation)
    expected = C.to_dense() + 0.1 * dense(model, inputs)
    V = torch.randn(C.size, 2, dtype=torch.float64)
    for operator in (C + 0.1 * S, joined(C + 0.1 * S), joined(2.0 * (0.5 * C + 0.05 * S))):
        torch.testing.assert_close(operator @ V, expected @ V, **CLOSE)
        torch.testing.assert_close(operator.quadratic_form(V), V.T @ expected @ V, **CLOSE)
    # the l2 term of C is a term of its own
    torch.testing.assert_close(joined(3.0 * (C + 0.1 * S)).to_dense(), 3 * expected, **CLOSE)


def test_joined_keeps_other_terms():
    model, inputs = network("rnn"), sequences()
    evaluation = evaluate(model, inputs)
    other = Dense(GGN()).estimate(evaluation)
    S = StructuralDamping().estimate(evaluation)
    C = Exact(GGN()).estimate(evaluation)
    expected = 2 * other.to_dense() + 3 * dense(model, inputs) - C.to_dense()
    torch.testing.assert_close(joined(2.0 * other + S + 2.0 * S - C).to_dense(), expected, **CLOSE)
    for untouched in (other, C, S, other + S, C + other):
        assert joined(untouched) is untouched
    elsewhere = StructuralDamping().estimate(evaluate(model, inputs))
    alone = C + elsewhere  # of another evaluation: nothing to share
    assert joined(alone) is alone


def test_a_joined_product_makes_the_passes_of_one():
    evaluation = evaluate(network("gru"), sequences())
    C, S = Exact(GGN()).estimate(evaluation), StructuralDamping().estimate(evaluation)
    operators, v = {"C": C, "S": S, "sum": C + S, "joined": joined(C + S)}, torch.ones(C.size, dtype=torch.float64)
    work = {}
    for name, operator in operators.items():
        operator @ v  # the first product linearises
        before = evaluation.work
        operator @ v
        work[name] = evaluation.work - before
    assert work == pytest.approx({"C": 4 / 3, "S": 4 / 3, "sum": 8 / 3, "joined": 4 / 3})


def test_a_quadratic_form_makes_no_backward_pass():
    evaluation = evaluate(network("gru"), sequences())
    S = StructuralDamping().estimate(evaluation)
    v = torch.ones(S.size, dtype=torch.float64)
    S.quadratic_form(v)
    before = evaluation.work
    S.quadratic_form(v)
    assert evaluation.work - before == pytest.approx(2 / 3)


def test_reductions():
    model, inputs = network("rnn"), sequences()
    mean = StructuralDamping().estimate(evaluate(model, inputs)).to_dense()
    total = StructuralDamping().estimate(evaluate(model, inputs, nn.MSELoss(reduction="sum"))).to_dense()
    torch.testing.assert_close(total, len(inputs) * mean, **CLOSE)
    with_l2 = StructuralDamping().estimate(evaluate(model, inputs, l2=0.7)).to_dense()
    torch.testing.assert_close(with_l2, mean, **CLOSE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_over_a_loader_it_is_that_of_one_batch(reduction):
    model, inputs = network("lstm"), sequences(5)
    labels = torch.randint(2, (5, 4), generator=torch.Generator().manual_seed(0))
    labels[0, 1:] = -100  # the loss counts labels; the states count examples
    objective = Objective(nn.Sequential(model, _ClassesSecond()), nn.CrossEntropyLoss(reduction=reduction))
    loader = [(inputs[:2], labels[:2]), (inputs[2:], labels[2:])]
    S = StructuralDamping().estimate_over(objective, loader, progress=False)
    expected = dense(model, inputs) * (5 if reduction == "sum" else 1)
    torch.testing.assert_close(S.to_dense(), expected, **CLOSE)
    v = torch.ones(S.size, dtype=torch.float64)
    torch.testing.assert_close(S.quadratic_form(v), v @ expected @ v, **CLOSE)


class _ClassesSecond(nn.Module):
    def forward(self, z):
        return z.transpose(1, 2)


class TwoRecurrent(nn.Module):
    """Two recurrent layers of their own, an activation, and one module that is never called."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.RNN(2, 3, batch_first=True), nn.GRU(3, 2, batch_first=True)
        self.head, self.act = nn.Linear(2, 2), nn.Tanh()

    def forward(self, x):
        return self.act(self.head(self.second(self.first(x)[0])[0]))


def test_modules_are_chosen_by_class_name_or_module():
    torch.manual_seed(0)
    model = TwoRecurrent().double()
    evaluation = evaluate(model, sequences())

    def trace(*modules):
        return float(StructuralDamping(**({"modules": modules} if modules else {})).estimate(evaluation).trace())

    first, second = trace("first"), trace("second")
    assert first > 0
    assert second > 0
    assert trace(nn.RNN) == trace("fir*") == trace(model.first) == pytest.approx(first)
    assert trace() == trace("first", nn.GRU) == trace("*st", "second") == pytest.approx(first + second)
    J = torch.autograd.functional.jacobian(lambda theta: _outputs(model, theta), parameter_vector(model))
    for selector in (nn.Tanh, "(model)"):
        assert trace(selector) == pytest.approx(float(J.square().sum()) / 3)


def _outputs(model, theta):
    parts = theta.split([p.numel() for p in model.parameters()])
    named = {name: part.view(p.shape) for (name, p), part in zip(model.named_parameters(), parts, strict=True)}
    return torch.func.functional_call(model, named, (sequences(),)).flatten()


def test_frozen_parameters_are_left_out():
    model, inputs = network("rnn"), sequences()
    full = dense(model, inputs)
    model.rnn.weight_hh_l0.requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    sizes = [parameter.numel() for parameter in model.parameters()]
    kept = torch.cat([torch.full((n,), name != "rnn.weight_hh_l0") for name, n in zip(names, sizes, strict=True)])
    S = StructuralDamping().estimate(evaluate(model, inputs))
    torch.testing.assert_close(S.to_dense(), full[kept][:, kept], **CLOSE)


def test_the_same_random_numbers_and_no_trace_in_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), network("gru"))
    evaluation = evaluate(model, sequences())
    hooks = [len(module._forward_hooks) for module in model.modules()]
    observed = ObservedPass(evaluation, {"1.rnn": model[1].rnn})
    torch.testing.assert_close(observed.values[0], evaluation.outputs, rtol=0, atol=0)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


class AttentionFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.rnn, self.head = nn.RNN(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        x = torch.cat([x, x], dim=2)
        return self.head(self.rnn(self.attention(x, x, x, need_weights=False)[0])[0])


def test_fused_attention_is_replaced_as_for_exact_products():
    torch.manual_seed(0)
    model = AttentionFirst()
    inputs = sequences().float()
    evaluation = evaluate(model, inputs)
    S = StructuralDamping().estimate(evaluation)
    v = torch.ones(S.size)
    with pytest.warns(curvlib.FusedKernelWarning):
        product = S @ v
    with pytest.warns(curvlib.FusedKernelWarning):  # another objective, another warning
        double = StructuralDamping().estimate(evaluate(model.double(), inputs.double())) @ v.double()
    torch.testing.assert_close(product.double(), double, rtol=1e-4, atol=1e-5)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return (2 * g.detach()).detach()


class DroppedBackward(nn.Module):
    """The backward pass on the way to the states loses its graph; the outputs do not go that way."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(2, 3), nn.Linear(2, 2)
        self.act = nn.Tanh()

    def forward(self, x):
        self.act(_Once.apply(self.inner(x)))
        return self.head(x)


def test_a_backward_pass_without_a_derivative_is_noticed():
    model = DroppedBackward().double()
    S = StructuralDamping(modules=(nn.Tanh,)).estimate(evaluate(model, sequences()))
    with pytest.raises(curvlib.LinearizationError, match="act"):
        S @ torch.ones(S.size, dtype=torch.float64)


@pytest.mark.parametrize(("modules", "message"), [
    ((nn.RNNBase, nn.RNNCellBase), r"RNNBase, RNNCellBase fits no module.*Known:.*1 \(Tanh\)"),
    (("rnn", nn.Tanh), "'rnn' fits no module"),
    ((nn.Tanh(),), "fits no module"),
], ids=["classes", "a name", "a module"])  # fmt: skip
def test_models_without_such_modules_are_refused_before_any_computation(modules, message):
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    objective = Objective(model, nn.MSELoss())
    damping = StructuralDamping(modules=modules)
    for refused in (
        lambda: damping.check(objective),
        lambda: damping.describe(objective),
        lambda: damping.estimate_over(objective, None),
        lambda: curvlib.optimizers.hessian_free(objective, structural_damping=damping),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


class Uncalled(Recurrent):
    def forward(self, x):
        return self.head(torch.zeros(*x.shape[:2], 3, dtype=x.dtype))


class Wrong(nn.Module):
    """Four examples go in, three of which come out; or their states lie in another place."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head, self.strings = nn.RNN(2, 3), nn.Linear(3, 2), _Strings()

    def forward(self, x):
        self.strings(x)
        return self.head(self.rnn(x)[0])


class _Strings(nn.Module):
    def forward(self, x):
        return "a", x


@pytest.mark.parametrize(("model", "modules", "error", "message"), [
    (lambda: Uncalled(nn.RNN), ("rnn",), ValueError, "'rnn' was not called"),
    (lambda: Uncalled(nn.RNN), ("rnn", "head"), ValueError, "'rnn' was not called.*such as 'head'"),
    (Wrong, ("rnn",), ValueError, "'rnn' was called with 4 examples.*have 3"),
    (Wrong, ("strings",), TypeError, "'strings' must return a floating-point tensor.*got str"),
], ids=["not called", "one is not called", "examples", "type"])  # fmt: skip
def test_outputs_that_cannot_be_observed_are_refused(model, modules, error, message):
    evaluation = evaluate(model().double(), sequences(3, 4))
    with pytest.raises(error, match=message):
        StructuralDamping(modules=modules).estimate(evaluation)


def test_states_that_no_parameter_reaches_are_refused():
    model = network("rnn")
    model.rnn.requires_grad_(False)
    with pytest.raises(ValueError, match="depend on no trainable parameter"):
        StructuralDamping().estimate(evaluate(model, sequences()))


def test_states_out_of_bounds_are_refused():
    evaluation = evaluate(network("projection"), 50 * sequences())
    with pytest.raises(ValueError, match=r"between these bounds, got .* \.\.\. .*SquaredChange"):
        StructuralDamping(loss=MatchingCrossEntropy(low=0.0)).estimate(evaluation)


def test_changed_parameters_and_values_that_are_not_finite_are_refused():
    model = network("rnn")
    evaluation = evaluate(model, sequences())
    S = StructuralDamping().estimate(evaluation)
    with torch.no_grad():
        model.head.bias.add_(1.0)
    for refused in (lambda: S @ torch.ones(S.size).double(), lambda: StructuralDamping().estimate(evaluation)):
        with pytest.raises(curvlib.StaleEvaluationError):
            refused()
    with pytest.raises(NonFiniteStatisticsError):
        StructuralDamping().estimate(evaluate(model, sequences() * float("nan")))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"modules": ()}, "modules"),
    ({"modules": "rnn"}, "modules"),
    ({"modules": (3,)}, "modules"),
    ({"modules": (int,)}, "modules"),
    ({"loss": nn.MSELoss()}, "matching loss"),
], ids=["none", "a name alone", "a number", "another class", "another loss"])  # fmt: skip
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        StructuralDamping(**arguments)


def test_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match="low < high"):
        MatchingCrossEntropy(low=1.0)


def test_describe_names_the_modules():
    description = str(Objective(network("lstm"), nn.MSELoss()).describe(StructuralDamping()))
    assert "change of rnn" in description


def test_it_runs_on_every_device(device):
    model, inputs = network("lstm cells").float(), sequences().float()
    expected = dense(model.double(), inputs.double())
    evaluation = evaluate(model.float().to(device), inputs.to(device))
    C, S = Exact(GGN()).estimate(evaluation), StructuralDamping().estimate(evaluation)
    v = torch.ones(S.size, device=device)
    # float32 sums of some hundred products
    torch.testing.assert_close((S @ v).cpu().double(), expected @ v.cpu().double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(joined(C + S) @ v, C @ v + S @ v, rtol=1e-4, atol=1e-5)


def test_any_operator_can_be_joined():
    objective = Objective(network("rnn"), nn.MSELoss())
    evaluation = objective.at((sequences(), torch.zeros(3, 4, 2, dtype=torch.float64)))
    assert isinstance(joined(Identity().estimate(evaluation)), type(Identity().estimate(evaluation)))
    free = MatrixFree(lambda V: V, 3)
    assert joined(free) is free
