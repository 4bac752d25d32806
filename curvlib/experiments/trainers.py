"""Trainers: one step of any optimizer behind one interface, so that the runner knows none of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.optimizers import SecondOrderOptimizer
from curvlib.solvers import SolveError


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a trainer tells of one step.

    Args:
        loss: objective of the batch before the step; a tensor may still be on its way from the device.
        gradients: work of the step, in gradients of the batch.
        damping: used for this step, where there is one.
        ratio: actual over predicted reduction, where it is known.
        accepted: whether the step was taken, where it can be refused.
        solver_iterations: of an iterative solver, such as conjugate gradients, where the method has one.
        radius: of the trust region, where there is one.
    """

    loss: Tensor | float
    gradients: float = 1.0
    damping: float | None = None
    ratio: float | None = None
    accepted: bool | None = None
    solver_iterations: int | None = None
    radius: float | None = None


class StepError(RuntimeError):
    """A method cannot go on, although its loss is finite; the message says why."""


class Trainer(ABC):
    """Optimizer of one model: takes steps, and saves and restores all of its state."""

    @abstractmethod
    def step(self, batch: tuple[Tensor, Tensor]) -> StepReport:
        """Change the parameters once.

        Raises:
            FloatingPointError: the loss is not finite; a trainer may also just report it.
            StepError: the method cannot go on for another reason.
        """

    @abstractmethod
    def state_dict(self) -> Mapping[str, Any]:
        """Return all state beside the parameters."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore that state."""


class _TorchTrainer(Trainer):
    """What trainers around a plain ``torch.optim`` optimizer share."""

    def __init__(self, model: nn.Module, loss: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._loss, self._optimizer = model, loss, optimizer

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state of the optimizer."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of the optimizer."""
        self._optimizer.load_state_dict(dict(state))


class GradientTrainer(_TorchTrainer):
    """One gradient a step.

    The l2 term is the optimizer's ``weight_decay``, which adds the same gradient without a graph over the parameters;
    the reported loss is without it.

    Args:
        model: to be trained.
        loss: its loss module.
        optimizer: over the model's parameters.
    """

    def step(self, batch: tuple[Tensor, Tensor]) -> StepReport:
        """Take one step."""
        inputs, targets = batch
        self._optimizer.zero_grad()
        loss = self._loss(self._model(inputs), targets)
        loss.backward()
        self._optimizer.step()
        return StepReport(loss=loss.detach())


class ClosureTrainer(_TorchTrainer):
    """An optimizer that evaluates the objective as often as it likes, such as L-BFGS with a line search.

    Args:
        model: to be trained.
        loss: its loss module.
        optimizer: over the model's parameters.
        l2: weight of the regularisation, part of the objective that the line search sees.
    """

    def __init__(self, model: nn.Module, loss: nn.Module, optimizer: torch.optim.Optimizer, l2: float) -> None:
        super().__init__(model, loss, optimizer)
        self._l2 = l2

    def step(self, batch: tuple[Tensor, Tensor]) -> StepReport:
        """Take one step of the optimizer, which is several inner iterations."""
        inputs, targets = batch
        evaluations = 0

        def closure() -> float:
            nonlocal evaluations
            evaluations += 1
            self._optimizer.zero_grad()
            objective = self._loss(self._model(inputs), targets) + l2_term(self._model, self._l2)
            objective.backward()
            return float(objective.detach())

        loss = self._optimizer.step(closure)
        return StepReport(loss=float(loss), gradients=evaluations)


class SecondOrderTrainer(Trainer):
    """One of curvlib's own optimizers.

    Args:
        optimizer: composed for the model's objective.
    """

    def __init__(self, optimizer: SecondOrderOptimizer) -> None:
        self._optimizer = optimizer

    def step(self, batch: tuple[Tensor, Tensor]) -> StepReport:
        """Take one step.

        Raises:
            NonFiniteLossError: the loss or its gradient is not finite.
            StepError: the curvature could not be inverted.
        """
        try:
            result = self._optimizer.step(batch)
        except SolveError as error:
            raise StepError(str(error)) from error
        return StepReport(
            loss=result.loss,
            gradients=result.gradient_evaluations,
            damping=result.damping,
            ratio=result.ratio,
            accepted=result.accepted,
            # A direction without an iterative solver makes none, at any step.
            solver_iterations=result.iterations or None,
            radius=result.radius,
        )

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state of the optimizer."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of the optimizer."""
        self._optimizer.load_state_dict(dict(state))


def l2_term(model: nn.Module, l2: float) -> Tensor | float:
    """Return l2/2 |theta|^2 over the parameters that are trained, a scalar."""
    if l2 == 0:
        return 0.0
    return 0.5 * l2 * torch.stack([p.square().sum() for p in model.parameters() if p.requires_grad]).sum()
