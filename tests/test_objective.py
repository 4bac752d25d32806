"""Objective and Evaluation: values, staleness, bad input."""

import pytest
import torch
from oracles import Network
from torch import nn

from curvlib import GGN, Objective, StaleEvaluationError
from curvlib.approximations import KFAC, Exact

BATCH = torch.randn(4, 3), torch.randn(4, 2)


def make(**kwargs):
    return Objective(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), nn.MSELoss(), **kwargs)


def test_value_is_the_loss_modules_own_number_plus_the_l2_term():
    objective = make(l2=0.1)
    theta = objective.parameter_vector()
    expected = nn.functional.mse_loss(objective.model(BATCH[0]), BATCH[1]) + 0.05 * theta.square().sum()
    torch.testing.assert_close(objective.value(BATCH), expected.detach())
    torch.testing.assert_close(objective.at(BATCH).value, expected.detach())


@pytest.mark.parametrize("inputs", [BATCH[0], (BATCH[0],), {"input": BATCH[0]}])
def test_inputs_may_be_a_tensor_a_tuple_or_a_mapping(inputs):
    objective = make()
    torch.testing.assert_close(objective.at((inputs, BATCH[1])).value, objective.value(BATCH))


@pytest.mark.parametrize("linearize", [True, False])
def test_gradient_and_products_do_not_depend_on_when_the_linearisation_is_made(linearize):
    objective = make(l2=0.1)
    network = Network(objective.model, nn.MSELoss(), *BATCH, l2=0.1)
    evaluation = objective.at(BATCH, linearize=linearize)
    torch.testing.assert_close(evaluation.gradient(), network.gradient())
    v = torch.randn(objective.layout.size)
    torch.testing.assert_close(Exact(GGN()).estimate(evaluation) @ v, network.ggn() @ v)


def test_jvp_and_vjp_are_the_jacobians():
    objective = make()
    evaluation, J = objective.at(BATCH), Network(objective.model, nn.MSELoss(), *BATCH).jacobian()
    v, w = torch.randn(objective.layout.size), torch.randn(4, 2)
    torch.testing.assert_close(evaluation.jvp(v).flatten(), J @ v)
    torch.testing.assert_close(evaluation.vjp(w), J.T @ w.flatten())


def test_no_grad_around_the_library_changes_nothing():
    objective = make()
    expected = objective.at(BATCH).gradient()
    with torch.no_grad():
        evaluation = objective.at(BATCH)
        torch.testing.assert_close(evaluation.gradient(), expected)
        Exact(GGN()).estimate(evaluation) @ expected


def change_under_no_grad(model):
    with torch.no_grad():
        model[0].weight.add_(1.0)


def change_by_an_optimizer(model):
    model(BATCH[0]).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def change_by_fused_sgd(model):
    model(BATCH[0]).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1, fused=True).step()


def change_by_fused_adam(model):
    model(BATCH[0]).sum().backward()
    torch.optim.Adam(model.parameters(), lr=0.1, fused=True).step()


def change_by_loading(model):
    model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()})


def change_by_replacing_data(model):
    model[2].bias.data = torch.ones(2)


@pytest.mark.parametrize(
    "change",
    [
        change_under_no_grad,
        change_by_an_optimizer,
        change_by_fused_sgd,
        change_by_fused_adam,
        change_by_loading,
        change_by_replacing_data,
    ],
)
def test_a_stale_evaluation_raises(change):
    objective = make()
    evaluation = objective.at(BATCH)
    evaluation.gradient()
    C, v = Exact(GGN()).estimate(evaluation), torch.randn(objective.layout.size)
    change(objective.model)
    for use in (
        evaluation.gradient,
        lambda: C @ v,
        lambda: C.quadratic_form(v.unsqueeze(1)),
        lambda: KFAC(GGN()).estimate(evaluation),
        lambda: Exact(GGN()).estimate(evaluation),
    ):
        with pytest.raises(StaleEvaluationError, match="has changed since this Evaluation was made"):
            use()


def test_value_at_other_parameters_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))
    objective = Objective(model, nn.MSELoss(), l2=0.1)
    evaluation = objective.at(BATCH)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    theta = objective.parameter_vector()
    torch.testing.assert_close(evaluation.value_at(theta), evaluation.value)  # the same dropout mask
    assert not torch.equal(evaluation.value_at(theta + 0.1), evaluation.value)
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_tied_parameters_are_listed_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    batch = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    objective = Objective(model, nn.MSELoss())
    assert objective.layout.names == ("0.weight", "0.bias", "2.bias")
    network = Network(model, nn.MSELoss(), *batch)
    evaluation = objective.at(batch)
    torch.testing.assert_close(evaluation.gradient(), network.gradient())
    torch.testing.assert_close(Exact(GGN()).estimate(evaluation).to_dense(), network.ggn())
    torch.testing.assert_close(evaluation.value_at(objective.parameter_vector() * 2), network.value(network.theta * 2))


def test_freezing_parameters_later_is_noticed():
    objective = make()
    objective.model[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"0\.weight.*make a new Objective"):
        objective.at(BATCH)


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return x[:, :2]


@pytest.mark.parametrize(
    ("error", "pattern", "call"),
    [
        (TypeError, "model to be a torch.nn.Module", lambda: Objective(torch.tanh, nn.MSELoss())),
        (TypeError, "loss must be an instance", lambda: Objective(nn.Linear(1, 1), nn.L1Loss())),
        (ValueError, "no parameter that requires a gradient", lambda: Objective(nn.Tanh(), nn.MSELoss())),
        (ValueError, "finite l2 >= 0, got -1", lambda: make(l2=-1)),
        (ValueError, "finite l2 >= 0, got nan", lambda: make(l2=float("nan"))),
        (TypeError, r"pair \(inputs, targets\)", lambda: make().at(BATCH[0])),
        (TypeError, "a tensor, a tuple of arguments or a mapping", lambda: make().at(([1.0], BATCH[1]))),
        (ValueError, "the batch is empty", lambda: make().at((torch.ones(0, 3), torch.ones(0, 2)))),
        (ValueError, "targets", lambda: make().at((BATCH[0], torch.randn(4, 3)))),
        (TypeError, "targets", lambda: make().at((BATCH[0], torch.ones(4, 2, dtype=torch.long)))),
        (
            TypeError,
            "must return one floating-point tensor",
            lambda: Objective(nn.LSTM(3, 2), nn.MSELoss()).at((torch.randn(4, 5, 3), BATCH[1])),
        ),
        (ValueError, "do not depend on any trainable parameter", lambda: Objective(Frozen(), nn.MSELoss()).at(BATCH)),
    ],
)
def test_bad_input(error, pattern, call):
    with pytest.raises(error, match=pattern):
        call()


def test_vectors_of_the_wrong_length_or_type_are_refused():
    C = Exact(GGN()).estimate(make().at(BATCH))
    with pytest.raises(ValueError, match=r"\(32,\) or \(32, K\)"):
        C @ torch.ones(31)
    with pytest.raises(TypeError, match="float32"):
        C @ torch.ones(32, dtype=torch.float64)


def test_a_loss_with_a_hook_is_refused():
    loss = nn.MSELoss()
    loss.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match="forward hook"):
        Objective(nn.Linear(2, 2), loss)
