"""One run: one method that trains one network, and everything that is needed to go on with it later."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from curvlib.experiments.budgets import Progress
from curvlib.experiments.clock import TrainingClock
from curvlib.experiments.example_order import ExampleOrder
from curvlib.experiments.methods import Method
from curvlib.experiments.problems import Examples
from curvlib.experiments.records import Record, Status
from curvlib.experiments.trainers import StepError, StepReport, l2_term
from curvlib.experiments.workload import Workload

# A non-finite loss is looked for at every tenth step only: on a GPU each look waits for the device.
_STEPS_BETWEEN_LOOKS = 10


class Run:
    """Training of one network with one method.

    Args:
        workload: what to train on.
        method: how to train.
    """

    def __init__(self, workload: Workload, method: Method) -> None:
        self._workload = workload
        self._method = method
        torch.manual_seed(workload.seed)
        self._model = copy.deepcopy(workload.model)
        self._trainer = method.start(self._model, workload.loss, workload.l2, workload.seed)
        self._order = ExampleOrder(len(workload.train), workload.seed, workload.device)
        self._clock = TrainingClock(workload.device, timer=workload.timer)
        self._batch_size = min(method.batch_size, len(workload.train))
        self._step = self._position = 0
        self._gradients = 0.0
        self._solver_iterations: int | None = None
        self._last: StepReport | None = None
        self._end: tuple[Status, str] | None = None

    @property
    def fraction(self) -> float:
        """Part of the budget that is spent."""
        return self._workload.budget.fraction(self.progress)

    def evaluate(self) -> Record:
        """Return loss and metrics at the current parameters."""
        work, last = self._workload, self._last
        loss, train_metric = self._evaluate(work.evaluated_train)
        _, test_metric = self._evaluate(work.evaluated_test)
        status, note = self._verdict(loss)
        progress = self.progress
        return Record(
            method=self._method.name,
            step=progress.step,
            epoch=progress.epoch,
            seconds=progress.seconds,
            gradients=self._gradients,
            loss=_finite(loss),
            train_metric=_finite(train_metric),
            test_metric=_finite(test_metric),
            batch_loss=None if last is None else _finite(float(last.loss)),
            damping=None if last is None else _finite(last.damping),
            ratio=None if last is None else _finite(last.ratio),
            accepted=None if last is None else last.accepted,
            solver_iterations=self._solver_iterations,
            radius=None if last is None else _finite(last.radius),
            status=status,
            note=note,
        )

    def train_to_next_evaluation(self, after_step: Callable[[float], None], stop: Callable[[], bool]) -> bool:
        """Train until an evaluation is due, the budget is spent, or the method cannot go on.

        Args:
            after_step: called after every step with the fraction of the budget that is spent.
            stop: asked before every step; True ends the training between two evaluations.

        Returns:
            Whether an evaluation is due.
        """
        due = False
        with self._clock.running():
            while not due and not stop():
                before = self.fraction
                try:
                    self._advance()
                except FloatingPointError as error:
                    self._end = (Status.DIVERGED, str(error))
                except (StepError, MemoryError, RuntimeError) as error:
                    if not (isinstance(error, StepError) or _is_out_of_memory(error)):
                        raise
                    self._end = (Status.FAILED, str(error))
                after = self.fraction
                due = self._end is not None or self._workload.schedule.is_due(before, after) or self._looks_diverged()
                after_step(after)
        return due

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on."""
        cuda = self._workload.device.type == "cuda"
        return {
            "model": self._model.state_dict(),
            "trainer": dict(self._trainer.state_dict()),
            "step": self._step,
            "position": self._position,
            "gradients": self._gradients,
            "solver_iterations": self._solver_iterations,
            "seconds": self._clock.seconds,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self._workload.device) if cuda else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._model.load_state_dict(state["model"])
        self._trainer.load_state_dict(state["trainer"])
        self._step, self._position, self._gradients = state["step"], state["position"], state["gradients"]
        self._solver_iterations = state["solver_iterations"]
        self._clock = TrainingClock(self._workload.device, state["seconds"], self._workload.timer)
        torch.set_rng_state(state["random"].cpu())
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"].cpu(), self._workload.device)

    @property
    def step(self) -> int:
        """Parameter updates so far."""
        return self._step

    @property
    def progress(self) -> Progress:
        """What has been spent so far."""
        epoch = self._position / len(self._workload.train)
        return Progress(step=self._step, epoch=epoch, seconds=self._clock.seconds)

    def _advance(self) -> None:
        rows = self._order.batch(self._position, self._batch_size)
        self._last = self._trainer.step(self._workload.train[rows].batch)
        self._position += self._batch_size
        self._step += 1
        self._gradients += self._last.gradients
        if self._last.solver_iterations is not None:
            self._solver_iterations = (self._solver_iterations or 0) + self._last.solver_iterations

    def _verdict(self, loss: float) -> tuple[Status, str | None]:
        if self._end is not None:
            return self._end
        if not (math.isfinite(loss) and (self._last is None or math.isfinite(float(self._last.loss)))):
            return Status.DIVERGED, "the loss is not finite"
        return (Status.FINISHED if self.fraction >= 1.0 else Status.RUNNING), None

    def _looks_diverged(self) -> bool:
        if self._last is None or self._step % _STEPS_BETWEEN_LOOKS != 0:
            return False
        return not math.isfinite(float(self._last.loss))

    @torch.no_grad()
    def _evaluate(self, examples: Examples) -> tuple[float, float]:
        work = self._workload
        self._model.eval()
        outputs = self._model(examples.inputs)
        self._model.train()
        objective: Tensor = work.loss(outputs, examples.targets) + l2_term(self._model, work.l2)
        return float(objective), float(work.metric(outputs, examples.targets))


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU allocator of PyTorch has no exception type of its own.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
