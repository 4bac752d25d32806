"""The objective of a batch at other parameters, with its gradient."""

import copy

import pytest
import torch
from torch import nn

from curvlib import Objective, StaleEvaluationError


def problem(*extra, l2=0.3, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *extra, nn.Linear(5, 3)).to(device, dtype)
    batch = torch.randn(9, 4).to(device, dtype), torch.randint(3, (9,)).to(device)
    return Objective(model, nn.CrossEntropyLoss(), l2=l2), batch


def test_value_and_gradient_are_those_of_the_model_with_these_parameters(device):
    objective, batch = problem(device=device)
    theta = objective.parameter_vector()
    other = theta + torch.randn_like(theta)
    there = objective.at(batch).elsewhere(other)
    moved = copy.deepcopy(objective.model)
    moved_objective = Objective(moved, nn.CrossEntropyLoss(), l2=0.3)
    moved_objective.layout.write(moved_objective.parameters, other)
    expected = moved_objective.at(batch)
    torch.testing.assert_close(there.value, expected.value, rtol=1e-14, atol=0)
    torch.testing.assert_close(there.gradient(), expected.gradient(), rtol=1e-12, atol=1e-15)
    assert torch.equal(objective.parameter_vector(), theta)


def test_dropout_is_that_of_the_evaluation_and_buffers_stay(device):
    objective, batch = problem(nn.Dropout(0.5), nn.BatchNorm1d(5), device=device)
    evaluation = objective.at(batch)
    buffers = [buffer.clone() for buffer in objective.model.buffers()]
    there = evaluation.elsewhere(objective.parameter_vector())
    torch.testing.assert_close(there.value, evaluation.value, rtol=1e-14, atol=0)
    torch.testing.assert_close(there.gradient(), evaluation.gradient(), rtol=1e-12, atol=1e-15)
    assert all(torch.equal(one, other) for one, other in zip(buffers, objective.model.buffers(), strict=True))
    evaluation.gradient()  # the evaluation is still fresh
    assert all(parameter.grad is None for parameter in objective.parameters)


def test_low_precision_parameters_give_float32():
    objective, batch = problem(dtype=torch.bfloat16)
    there = objective.at(batch).elsewhere(objective.parameter_vector())
    assert there.value.dtype == there.gradient().dtype == torch.float32


def test_work_is_counted():
    objective, batch = problem()
    evaluation = objective.at(batch)
    before = evaluation.work
    there = evaluation.elsewhere(objective.parameter_vector())
    assert evaluation.work == pytest.approx(before + 1 / 3)
    there.gradient()
    assert evaluation.work == pytest.approx(before + 1)


def test_a_batch_that_has_changed_is_noticed():
    objective, (x, y) = problem()
    evaluation = objective.at((x, y))
    x.mul_(2.0)
    with pytest.raises(StaleEvaluationError):
        evaluation.elsewhere(objective.parameter_vector())
